//! The last verdicts, for people who look at Mixer's page: every refusal and some of the rest.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use lateen_engine::{Bag, Text, Value};
use serde::Serialize;

/// Verdicts that are kept.
const KEPT: usize = 200;
/// Of those that let a request pass, one in so many.
const ONE_IN: u64 = 64;
/// Longest text that is kept of each, in bytes.
const MAX_TEXT: usize = 256;

/// A verdict.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recent {
    /// As the caller got it.
    pub id: String,
    /// When.
    pub at: String,
    /// Name of the status code.
    pub code: &'static str,
    /// Why.
    pub message: String,
    /// `source.principal`, or else `source.uid`, as the caller sent it.
    pub source: String,
    /// `destination.service.host`, as the caller sent it.
    pub destination: String,
    /// Generation of the configuration that decided.
    pub generation: String,
    /// Time it took, in microseconds.
    pub micros: u64,
}

/// Who asked about whom, as the caller sent it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parties {
    source: Text,
    destination: Text,
}

impl Parties {
    /// Those of a request.
    pub(crate) fn of(bag: &Bag) -> Self {
        let text = |name| bag.get_by_name(name).and_then(Value::as_text).cloned();
        let source = text("source.principal").or_else(|| text("source.uid"));
        Self {
            source: source.unwrap_or_default(),
            destination: text("destination.service.host").unwrap_or_default(),
        }
    }
}

/// The last verdicts.
#[derive(Debug, Default)]
pub struct Verdicts {
    kept: Mutex<VecDeque<Recent>>,
    seen: AtomicU64,
}

impl Verdicts {
    /// Keeps a verdict, if it is to be kept. Nobody waits: while somebody else writes or reads, it is left out.
    pub(crate) fn note(
        &self,
        code: &'static str,
        parties: &Parties,
        rest: impl FnOnce() -> (String, String, u64),
        took: Duration,
    ) {
        let number = self.seen.fetch_add(1, Ordering::Relaxed);
        if code == "OK" && !number.is_multiple_of(ONE_IN) {
            return;
        }
        let mut kept = match self.kept.try_lock() {
            Ok(kept) => kept,
            Err(TryLockError::Poisoned(kept)) => kept.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let (id, message, generation) = rest();
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(Recent {
            id,
            at: chrono::DateTime::<chrono::Utc>::from(SystemTime::now())
                .to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
            code,
            message: shortened(&message),
            source: shortened(&parties.source),
            destination: shortened(&parties.destination),
            generation: generation.to_string(),
            micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        });
    }

    /// The newest first.
    pub fn recent(&self) -> Vec<Recent> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().rev().cloned().collect()
    }
}

fn shortened(text: &str) -> String {
    let end = (0..=MAX_TEXT.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or(0)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use lateen_engine::AttributeTable;

    use super::*;

    fn note(verdicts: &Verdicts, code: &'static str, number: u64) {
        verdicts.note(
            code,
            &Parties::default(),
            || (number.to_string(), "m".repeat(1000), 7),
            Duration::from_micros(5),
        );
    }

    #[test]
    fn refusals_are_all_kept_and_approvals_now_and_then() {
        let verdicts = Verdicts::default();
        for number in 0..1000 {
            note(&verdicts, "OK", number);
        }
        assert_eq!(verdicts.recent().len(), 1000_usize.div_ceil(64));
        for number in 0..1000 {
            note(&verdicts, "PERMISSION_DENIED", number);
        }
        let recent = verdicts.recent();
        assert_eq!(recent.len(), KEPT);
        assert_eq!(recent[0].id, "999");
        assert_eq!(recent[KEPT - 1].id, "800");
        assert_eq!(recent[0].message.len(), MAX_TEXT);
    }

    #[test]
    fn who_asks_is_the_principal_or_else_the_uid() {
        let mut bag = Bag::new(&AttributeTable::default_vocabulary());
        let told = |bag: &Bag| {
            let Parties {
                source,
                destination,
            } = Parties::of(bag);
            (source.to_string(), destination.to_string())
        };
        assert_eq!(told(&bag), (String::new(), String::new()));
        bag.set_by_name("source.uid", "kubernetes://a.b").unwrap();
        bag.set_by_name("destination.service.host", "reviews")
            .unwrap();
        assert_eq!(told(&bag), ("kubernetes://a.b".into(), "reviews".into()));
        bag.set_by_name("source.principal", "a").unwrap();
        assert_eq!(told(&bag).0, "a");
    }
}
