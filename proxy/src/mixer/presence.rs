//! Whether Mixer is there, as far as its answers show.
//!
//! A Mixer that hangs would cost every request the whole timeout, so after a failed call nobody asks for a moment,
//! and then one at a time asks until there is an answer. What one request does must not decide for the others,
//! least of all where they go on unasked: an error about that request is an answer, and a call without one says
//! nothing of a Mixer that has answered somebody since.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::client::Unavailable;
use crate::grpc::CallError;

/// After a failed call nobody asks for this long.
const REST: Duration = Duration::from_millis(100);

/// Shared by all workers. Times are microseconds since `born`; 0: never.
#[derive(Debug)]
pub(super) struct Presence {
    born: Instant,
    answered: AtomicU64,
    rest_until: AtomicU64,
    /// The last call failed: until one is answered, one asks at a time.
    is_away: AtomicBool,
    /// Somebody asks whether Mixer is back.
    is_probed: AtomicBool,
}

/// Leave to call; what becomes of the call is told to it.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    presence: &'a Presence,
    sent: u64,
    is_probe: bool,
}

impl Presence {
    pub(super) fn new() -> Presence {
        Presence {
            born: Instant::now(),
            answered: AtomicU64::new(0),
            rest_until: AtomicU64::new(0),
            is_away: AtomicBool::new(false),
            is_probed: AtomicBool::new(false),
        }
    }

    /// Leave to call now.
    ///
    /// # Errors
    /// Mixer has not answered, and it is not this call's turn to find out whether it does again.
    pub(super) fn turn(&self) -> Result<Turn<'_>, Unavailable> {
        let sent = self.now();
        if sent < self.rest_until.load(Ordering::Relaxed) {
            return Err(Unavailable("Mixer did not answer a moment ago".to_owned()));
        }
        let is_probe = self.is_away.load(Ordering::Relaxed);
        if is_probe && self.is_probed.swap(true, Ordering::Relaxed) {
            return Err(Unavailable("Mixer has not answered yet".to_owned()));
        }
        Ok(Turn {
            presence: self,
            sent,
            is_probe,
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Turn<'_> {
    /// Mixer has answered.
    pub(super) fn answered(&self) {
        let presence = self.presence;
        presence
            .answered
            .fetch_max(presence.now(), Ordering::Relaxed);
        presence.is_away.store(false, Ordering::Relaxed);
    }

    /// Mixer is not there, as far as this call can tell, and nobody tries again for this request.
    pub(super) fn failed(&self, error: &CallError) {
        let presence = self.presence;
        // When Mixer itself says that it has too much to do, it is left alone whoever else it answers.
        let is_told = matches!(error, CallError::Status { .. });
        if !is_told && presence.answered.load(Ordering::Relaxed) > self.sent {
            return;
        }
        presence.is_away.store(true, Ordering::Relaxed);
        let rest = u64::try_from(REST.as_micros()).unwrap_or(u64::MAX);
        presence
            .rest_until
            .fetch_max(presence.now().saturating_add(rest), Ordering::Relaxed);
    }
}

impl Drop for Turn<'_> {
    /// Also when the request that asked is gone: another one asks then.
    fn drop(&mut self) {
        if self.is_probe {
            self.presence.is_probed.store(false, Ordering::Relaxed);
        }
    }
}

/// Whether Mixer refused this request as it is: it would say the same again, and has nothing against others.
pub(super) fn is_about_request(error: &CallError) -> bool {
    const DEADLINE_EXCEEDED: i32 = 4;
    const UNIMPLEMENTED: i32 = 12;
    const UNAVAILABLE: i32 = 14;
    match error {
        // Overload is UNAVAILABLE, of Istio's Mixer too; RESOURCE_EXHAUSTED is what Go's gRPC says of a message that
        // is too large.
        CallError::Status { code, .. } => {
            ![DEADLINE_EXCEEDED, UNIMPLEMENTED, UNAVAILABLE].contains(code)
        }
        CallError::Malformed(_) => true,
        CallError::Rejected(_) | CallError::Http(_) | CallError::Body(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    fn status(code: i32) -> CallError {
        CallError::Status {
            code,
            message: String::new(),
        }
    }

    fn no_answer() -> CallError {
        CallError::Rejected("upstream request timeout".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn one_asks_whether_mixer_is_back() {
        let presence = Presence::new();
        presence.turn().unwrap().failed(&no_answer());
        assert!(presence.turn().is_err(), "it rests");
        tokio::time::advance(REST).await;
        let probe = presence.turn().unwrap();
        assert!(presence.turn().is_err(), "one at a time");
        drop(probe);
        let probe = presence.turn().expect("whoever asked is gone");
        tokio::time::advance(MOMENT).await;
        probe.failed(&no_answer());
        drop(probe);
        assert!(presence.turn().is_err(), "it rests again");
        tokio::time::advance(REST).await;
        let probe = presence.turn().unwrap();
        probe.answered();
        let (_one, _another) = (presence.turn().unwrap(), presence.turn().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_answer_does_not_speak_for_those_who_have() {
        let presence = Presence::new();
        let slow = presence.turn().unwrap();
        tokio::time::advance(MOMENT).await;
        presence.turn().unwrap().answered();
        tokio::time::advance(MOMENT).await;
        slow.failed(&no_answer());
        presence.turn().expect("Mixer is there");
        // Unless Mixer asks for it.
        slow.failed(&status(14));
        assert!(presence.turn().is_err());
        tokio::time::advance(REST).await;
        presence.turn().unwrap().answered();
        // An answer before the question is no such sign.
        let late = presence.turn().unwrap();
        tokio::time::advance(MOMENT).await;
        late.failed(&no_answer());
        assert!(presence.turn().is_err());
    }

    #[test]
    fn errors_about_a_request_are_told_from_those_about_mixer() {
        // INVALID_ARGUMENT, RESOURCE_EXHAUSTED, OUT_OF_RANGE, INTERNAL.
        for code in [3, 8, 11, 13] {
            assert!(is_about_request(&status(code)), "{code}");
        }
        assert!(is_about_request(&CallError::Malformed("")));
        for code in [4, 12, 14] {
            assert!(!is_about_request(&status(code)), "{code}");
        }
        assert!(!is_about_request(&CallError::Rejected(String::new())));
        assert!(!is_about_request(&CallError::Http(503)));
    }
}
