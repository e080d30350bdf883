//! Answers of Mixer that may be used again: for requests that agree in everything the answer referenced.
//!
//! Shared by all workers. Reading takes no lock that another worker holds for longer than a table look-up;
//! the list of shapes is an immutable snapshot.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use lateen_engine::dictionary::global_word;
use lateen_protocols::istio::mixer::v1::{ReferencedAttributes, referenced_attributes::Condition};
use tokio::time::Instant;

use super::{
    attributes::{Attributes, Key, Value},
    verdict::Verdict,
};

/// Answers kept; Istio's client keeps as many.
const MAX_ANSWERS: usize = 10_000;
/// Distinct sets of referenced attributes kept; answers of further shapes are not cached. A rule set has a
/// handful, so more of them are an attack on the walk over them.
const MAX_SHAPES: usize = 64;

thread_local! {
    /// Where keys are written that are only looked up: finding an answer allocates nothing.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::default();
}

/// What an answer depends on, in a fixed order.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    references: Vec<Reference>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    name: Key,
    /// Key of a string map.
    entry: Option<Bytes>,
    present: bool,
}

/// A cached answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) verdict: Arc<Verdict>,
    /// Configuration generation of Mixer that it came from.
    pub(super) generation: u64,
    expires: Option<Instant>,
    /// Negative: without limit.
    uses: AtomicI32,
}

impl Answer {
    pub(super) fn new(
        verdict: Arc<Verdict>,
        generation: u64,
        valid: Option<Duration>,
        uses: i32,
        now: Instant,
    ) -> Answer {
        Answer {
            verdict,
            generation,
            expires: valid.and_then(|valid| now.checked_add(valid)),
            uses: AtomicI32::new(uses),
        }
    }

    /// Whether it may be used once more; counts the use.
    pub(super) fn take(&self, now: Instant) -> bool {
        if self.expires.is_some_and(|end| now >= end) {
            return false;
        }
        // More than one worker may use the last use at once; each decrement decides for itself.
        match self.uses.load(Ordering::Relaxed) {
            ..0 => true,
            0 => false,
            1.. => self.uses.fetch_sub(1, Ordering::Relaxed) > 0,
        }
    }

    /// Whether its duration has not run out, whatever its use count.
    pub(super) fn is_unexpired(&self, now: Instant) -> bool {
        self.expires.is_none_or(|end| now < end)
    }
}

/// The cache of one Mixer cluster.
#[derive(Debug)]
pub(super) struct Cache {
    shapes: ArcSwap<Vec<Arc<Shape>>>,
    answers: quick_cache::sync::Cache<Vec<u8>, Arc<Answer>>,
}

impl Cache {
    pub(super) fn new() -> Cache {
        Cache {
            shapes: ArcSwap::default(),
            answers: quick_cache::sync::Cache::new(MAX_ANSWERS),
        }
    }

    /// The answer for such a request; its uses may have run out. One that has expired does not hide one of
    /// another shape.
    pub(super) fn find(&self, attributes: &Attributes, now: Instant) -> Option<Arc<Answer>> {
        let shapes = self.shapes.load();
        SCRATCH.with_borrow_mut(|key| {
            for (number, shape) in shapes.iter().enumerate() {
                key.clear();
                if shape.key(number, attributes, key)
                    && let Some(answer) = self.answers.get(key.as_slice())
                    && answer.is_unexpired(now)
                {
                    return Some(answer);
                }
            }
            None
        })
    }

    /// Keeps an answer, if what it references can be compared and fits the request it was given for.
    pub(super) fn keep(
        &self,
        referenced: &ReferencedAttributes,
        attributes: &Attributes,
        answer: Answer,
    ) {
        let Some(shape) = Shape::read(referenced) else {
            return;
        };
        let Some(number) = self.number(shape) else {
            return;
        };
        let shapes = self.shapes.load();
        let mut key = Vec::with_capacity(128);
        if let Some(shape) = shapes.get(number)
            && shape.key(number, attributes, &mut key)
        {
            self.answers.insert(key, Arc::new(answer));
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.answers.clear();
        self.shapes.store(Arc::default());
    }

    fn number(&self, shape: Shape) -> Option<usize> {
        let shape = Arc::new(shape);
        let mut number = None;
        self.shapes.rcu(|known| {
            let mut all = Vec::clone(known);
            number = all.iter().position(|s| **s == *shape);
            if number.is_none() && all.len() < MAX_SHAPES {
                number = Some(all.len());
                all.push(shape.clone());
            }
            all
        });
        number
    }
}

impl Shape {
    /// `None` when a reference cannot be compared exactly.
    fn read(referenced: &ReferencedAttributes) -> Option<Shape> {
        let word = |index: i32| -> Option<&str> {
            if index >= 0 {
                global_word(index)
            } else {
                let position = usize::try_from(-i64::from(index) - 1).ok()?;
                referenced.words.get(position).map(String::as_str)
            }
        };
        let mut references = Vec::with_capacity(referenced.attribute_matches.len());
        for reference in &referenced.attribute_matches {
            let present = match reference.condition() {
                Condition::Exact => true,
                Condition::Absence => false,
                Condition::Regex | Condition::Unspecified => return None,
            };
            // The wire cannot tell "no key" from index 0. Index 0 is `source.ip`, which is no key of any
            // map that is sent, so it is "no key".
            let entry = match reference.map_key {
                0 => None,
                index => Some(Bytes::from(word(index)?.to_owned())),
            };
            references.push(Reference {
                name: Key::of(word(reference.name)?)?,
                entry,
                present,
            });
        }
        references.sort();
        references.dedup();
        Some(Shape { references })
    }

    /// Writes the cache key of a request; whether the request fits this shape at all.
    fn key(&self, number: usize, attributes: &Attributes, out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(&(number as u64).to_ne_bytes());
        for reference in &self.references {
            let value = attributes.get(reference.name);
            match (&reference.entry, value, reference.present) {
                (None, None, false) | (Some(_), None, false) => {}
                (None, Some(value), true) if write_value(value, out) => {}
                (Some(entry), Some(Value::Map(map)), present) => {
                    match (map.iter().find(|(k, _)| k == entry), present) {
                        (None, false) => {}
                        (Some((_, value)), true) => write_bytes(value, out),
                        _ => return false,
                    }
                }
                _ => return false,
            }
        }
        true
    }
}

/// Whether the value can be compared; a whole map is not. The type goes first: attributes that a peer
/// sent may be of any type, and a number must not pass for a text of the same bytes.
fn write_value(value: &Value, out: &mut Vec<u8>) -> bool {
    match value {
        Value::Text(bytes) => {
            out.push(0);
            write_bytes(bytes, out);
        }
        Value::Bytes(bytes) => {
            out.push(1);
            write_bytes(bytes, out);
        }
        Value::Int(n) => {
            out.push(2);
            out.extend_from_slice(&n.to_ne_bytes());
        }
        Value::Double(n) => {
            out.push(3);
            out.extend_from_slice(&n.to_bits().to_ne_bytes());
        }
        Value::Bool(b) => out.extend_from_slice(&[4, u8::from(*b)]),
        Value::Time(time) => {
            let nanos = time
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_nanos();
            out.push(5);
            out.extend_from_slice(&nanos.to_ne_bytes());
        }
        Value::Span(span) => {
            out.push(6);
            out.extend_from_slice(&span.as_nanos().to_ne_bytes());
        }
        Value::Map(_) => return false,
    }
    true
}

/// Length first, so that two different lists never give the same bytes.
fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u64).to_ne_bytes());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::{super::attributes::KEYS, *};
    use lateen_engine::dictionary::global_index;
    use lateen_protocols::istio::mixer::v1::referenced_attributes::AttributeMatch;

    fn reference(
        name: &str,
        key: Option<&str>,
        condition: Condition,
    ) -> (AttributeMatch, Vec<String>) {
        let words = key.map(str::to_owned).into_iter().collect();
        let reference = AttributeMatch {
            name: global_index(name).unwrap(),
            map_key: if key.is_some() { -1 } else { 0 },
            condition: condition.into(),
            regex: String::new(),
        };
        (reference, words)
    }

    fn request(user: Option<&str>) -> Attributes {
        let mut all = Attributes::default();
        let headers: Arc<[_]> = user
            .map(|user| (Bytes::from("x-user"), Bytes::from(user.to_owned())))
            .into_iter()
            .collect();
        all.set(KEYS.request_headers, Value::Map(headers));
        all
    }

    fn answer(uses: i32) -> Answer {
        let verdict = Arc::new(Verdict::default());
        Answer::new(
            verdict,
            1,
            Some(Duration::from_secs(5)),
            uses,
            Instant::now(),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_serves_requests_that_agree_in_what_it_referenced() {
        let cache = Cache::new();
        for (condition, given, same, other) in [
            (Condition::Exact, Some("john"), Some("john"), Some("jane")),
            (Condition::Absence, None, None, Some("john")),
        ] {
            cache.clear();
            let (reference, words) = reference("request.headers", Some("x-user"), condition);
            let referenced = ReferencedAttributes {
                words,
                attribute_matches: vec![reference],
            };
            cache.keep(&referenced, &request(given), answer(-1));
            assert!(cache.find(&request(same), Instant::now()).is_some());
            assert!(cache.find(&request(other), Instant::now()).is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_answer_hides_no_other() {
        let cache = Cache::new();
        let john = request(Some("john"));
        let referenced = |attribute_match: (AttributeMatch, Vec<String>)| ReferencedAttributes {
            words: attribute_match.1,
            attribute_matches: vec![attribute_match.0],
        };
        let absent = referenced(reference("source.user", None, Condition::Absence));
        cache.keep(&absent, &john, answer(-1));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(cache.find(&john, Instant::now()).is_none());
        let exact = reference("request.headers", Some("x-user"), Condition::Exact);
        cache.keep(&referenced(exact), &john, answer(-1));
        assert!(cache.find(&john, Instant::now()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_fit_its_own_request_is_not_kept() {
        let cache = Cache::new();
        let (reference, words) = reference("request.headers", Some("x-user"), Condition::Exact);
        let referenced = ReferencedAttributes {
            words,
            attribute_matches: vec![reference],
        };
        cache.keep(&referenced, &request(None), answer(-1));
        assert!(cache.find(&request(None), Instant::now()).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn duration_and_use_count_are_obeyed() {
        let twice = answer(2);
        let now = Instant::now();
        assert_eq!(
            [twice.take(now), twice.take(now), twice.take(now)],
            [true, true, false]
        );
        let forever = answer(-1);
        assert!(forever.take(now));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!forever.take(Instant::now()));
    }

    #[test]
    fn values_of_different_types_never_look_alike() {
        let values = [
            Value::Text(Bytes::new()),
            Value::Bytes(Bytes::new()),
            Value::Int(0),
            Value::Double(0.0),
            Value::Bool(false),
            Value::Time(UNIX_EPOCH),
            Value::Span(Duration::ZERO),
        ];
        let keys: std::collections::HashSet<_> = values
            .iter()
            .map(|value| {
                let mut key = Vec::new();
                assert!(write_value(value, &mut key));
                key
            })
            .collect();
        assert_eq!(keys.len(), values.len());
    }
}
