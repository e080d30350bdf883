//! Keeps calls away from an adapter that does not answer, and bounds how many calls are tried again.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use lateen_adapter::{Clock, Counter};

/// So many failures in a row open the circuit.
const THRESHOLD: u32 = 5;
/// How long it stays open at first, and at most; each failed probe doubles it.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A circuit breaker: closed, open after [`THRESHOLD`] failures in a row, and after a pause half open, when one
/// call is let through to see.
#[derive(Debug)]
pub(super) struct Breaker {
    clock: Clock,
    opened: Counter,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    failures: u32,
    pause: Duration,
    /// By the breaker's clock.
    open_until: Duration,
    is_probing: bool,
}

/// A call that is let through. Dropped without a word, it has told nothing: its caller left.
#[derive(Debug)]
pub(super) struct Permit<'a> {
    breaker: &'a Breaker,
    is_probe: bool,
    is_settled: bool,
}

/// The circuit is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Open {
    /// Failures in a row.
    pub(super) failures: u32,
    /// When the next call is let through.
    pub(super) left: Duration,
}

impl Breaker {
    pub(super) fn new(clock: Clock, opened: Counter) -> Self {
        Self {
            clock,
            opened,
            state: Mutex::new(State {
                failures: 0,
                pause: PAUSE.0,
                open_until: Duration::ZERO,
                is_probing: false,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a call through, or says why not.
    pub(super) fn admit(&self) -> Result<Permit<'_>, Open> {
        let now = self.clock.now();
        let mut state = self.state();
        let is_probe = state.failures >= THRESHOLD;
        if is_probe && (now < state.open_until || state.is_probing) {
            return Err(Open {
                failures: state.failures,
                left: state.open_until.saturating_sub(now),
            });
        }
        state.is_probing = is_probe;
        Ok(Permit {
            breaker: self,
            is_probe,
            is_settled: false,
        })
    }
}

impl Permit<'_> {
    /// The adapter answered, whatever it said.
    pub(super) fn answered(mut self) {
        self.is_settled = true;
        let mut state = self.breaker.state();
        state.failures = 0;
        state.pause = PAUSE.0;
        state.is_probing = false;
    }

    /// It did not, or only that it failed.
    pub(super) fn failed(mut self) {
        self.fail();
    }

    fn fail(&mut self) {
        self.is_settled = true;
        let now = self.breaker.clock.now();
        let mut state = self.breaker.state();
        state.failures = state.failures.saturating_add(1);
        if self.is_probe {
            state.is_probing = false;
            state.pause = (state.pause * 2).min(PAUSE.1);
        }
        // Calls that were under way when it opened do not keep it open longer.
        if self.is_probe || state.failures == THRESHOLD {
            state.open_until = now + state.pause;
            self.breaker.opened.inc();
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.is_probe && !self.is_settled {
            self.breaker.state().is_probing = false;
        }
    }
}

/// How many calls may be tried again: a tenth of all, and ten at once.
#[derive(Debug)]
pub(super) struct RetryBudget {
    /// In tenths of a call.
    left: AtomicI64,
}

const RETRIES_AT_ONCE: i64 = 10;
const CALLS_PER_RETRY: i64 = 10;

impl RetryBudget {
    pub(super) fn new() -> Self {
        Self {
            left: AtomicI64::new(RETRIES_AT_ONCE * CALLS_PER_RETRY),
        }
    }

    /// A call is made for the first time.
    pub(super) fn earn(&self) {
        let most = RETRIES_AT_ONCE * CALLS_PER_RETRY;
        if self.left.load(Ordering::Relaxed) < most {
            self.left.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether a call may be tried again.
    pub(super) fn take(&self) -> bool {
        let spend = |left: i64| (left >= CALLS_PER_RETRY).then(|| left - CALLS_PER_RETRY);
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> (Breaker, Clock, Counter) {
        let (clock, opened) = (Clock::manual(), Counter::default());
        (Breaker::new(clock.clone(), opened.clone()), clock, opened)
    }

    fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            breaker.admit().unwrap().failed();
        }
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_probe_closes_it() {
        let (breaker, clock, opened) = breaker();
        fail(&breaker, THRESHOLD - 1);
        breaker.admit().unwrap().answered();
        fail(&breaker, THRESHOLD);
        let open = breaker.admit().unwrap_err();
        assert_eq!((open.failures, open.left), (THRESHOLD, PAUSE.0));
        clock.advance(PAUSE.0);
        let probe = breaker.admit().unwrap();
        assert!(breaker.admit().is_err(), "one probe at a time");
        probe.answered();
        fail(&breaker, THRESHOLD - 1);
        assert!(breaker.admit().is_ok(), "counted anew");
        assert_eq!(opened.get(), 1);
    }

    #[test]
    fn failed_probes_come_more_seldom() {
        let (breaker, clock, _) = breaker();
        fail(&breaker, THRESHOLD);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let left = breaker.admit().unwrap_err().left;
            pauses.push(left.as_secs());
            clock.advance(left);
            breaker.admit().unwrap().failed();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn a_probe_whose_caller_leaves_makes_room_for_the_next() {
        let (breaker, clock, _) = breaker();
        fail(&breaker, THRESHOLD);
        clock.advance(PAUSE.0);
        drop(breaker.admit().unwrap());
        assert!(breaker.admit().is_ok());
    }

    #[test]
    fn calls_under_way_do_not_prolong_the_pause() {
        let (breaker, clock, opened) = breaker();
        let late: Vec<_> = (0..3).map(|_| breaker.admit().unwrap()).collect();
        fail(&breaker, THRESHOLD);
        clock.advance(PAUSE.0 / 2);
        for permit in late {
            permit.failed();
        }
        assert_eq!(breaker.admit().unwrap_err().left, PAUSE.0 / 2);
        assert_eq!(opened.get(), 1);
    }

    #[test]
    fn one_call_in_ten_may_be_tried_again() {
        let budget = RetryBudget::new();
        let burst = (0..100).filter(|_| budget.take()).count();
        assert_eq!(burst, 10);
        let mut retries = 0;
        for _ in 0..1000 {
            budget.earn();
            retries += usize::from(budget.take());
        }
        assert_eq!(retries, 100);
    }
}
