//! What is taken on when there is more than can be done.
//!
//! Two signs tell: how many calls are under way, and how late the program comes to what is due. The second is
//! measured by a clock task beside the calls: when it is woken late, so is every call, whatever the reason (too
//! many calls, too little processor); only calls beyond the first few after such a delay are shed, because a pause
//! alone, of the machine or of its neighbours, leaves nothing behind that has to be shed. A handler that is slow delays nobody but its own rules and is no sign.
//! Reports are shed at half the delay at which checks are: they can be missed, a check cannot.
//!
//! What is shed is answered UNAVAILABLE at once and counted; the proxy's fail policy decides then, and the proxy
//! asks nothing for a moment, which is what takes the load away.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tonic::Status;

use crate::metrics::{Method, Metrics, Shed};

/// How often the delay is measured.
const TICK: Duration = Duration::from_millis(5);
/// What cannot be told from a timer's own coarseness.
const COARSE: Duration = Duration::from_millis(2);

/// Calls since the clock task was last awake that are taken on however late it is: fewer are no crowd.
const FEW: u64 = 64;

/// How much is taken on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Checks under way.
    pub checks: usize,
    /// Reports under way.
    pub reports: usize,
    /// Delay beyond which checks are shed; reports are from half of it. `None`: no delay is too long.
    pub delay: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            checks: 4096,
            reports: 1024,
            // A proxy waits a second for a check.
            delay: Some(Duration::from_millis(100)),
        }
    }
}

/// Decides what is taken on. Clones are one and the same.
#[derive(Clone, Debug)]
pub struct Overload(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    checks: Arc<Semaphore>,
    reports: Arc<Semaphore>,
    delay: Delay,
    metrics: Arc<Metrics>,
}

/// How late the program is. Times are microseconds since `born`.
#[derive(Debug)]
struct Delay {
    born: Instant,
    /// When the clock task should run next; 0: nobody measures.
    due: AtomicU64,
    /// How late it was the last time.
    last: AtomicU64,
    /// Calls that have come since it was last awake.
    arrived: AtomicU64,
}

/// A call that is taken on, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
}

impl Delay {
    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The longer of how late it was and how late it is by now.
    fn get(&self) -> Duration {
        let due = self.due.load(Ordering::Relaxed);
        let late = match due {
            0 => 0,
            due => self.now().saturating_sub(due),
        };
        let late = Duration::from_micros(late.max(self.last.load(Ordering::Relaxed)));
        late.saturating_sub(COARSE)
    }
}

impl Overload {
    /// Nothing is under way.
    pub fn new(limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Inner {
            limits,
            checks: Arc::new(Semaphore::new(limits.checks)),
            reports: Arc::new(Semaphore::new(limits.reports)),
            delay: Delay {
                born: Instant::now(),
                due: AtomicU64::new(0),
                last: AtomicU64::new(0),
                arrived: AtomicU64::new(0),
            },
            metrics,
        }))
    }

    /// Takes a call on.
    ///
    /// # Errors
    /// UNAVAILABLE, which is counted.
    pub fn admit(&self, method: Method) -> Result<Slot, Status> {
        let Inner {
            limits,
            checks,
            reports,
            delay,
            metrics,
        } = &*self.0;
        let (slots, limit) = match method {
            Method::Check => (checks, limits.delay),
            Method::Report => (reports, limits.delay.map(|delay| delay / 2)),
        };
        let is_crowd = delay.arrived.fetch_add(1, Ordering::Relaxed) >= FEW;
        if let Some(limit) = limit.filter(|_| is_crowd) {
            let late = delay.get();
            if late > limit {
                metrics.shed(method, Shed::Delay);
                return Err(Status::unavailable(format!(
                    "mixer is overloaded: it is {} ms late",
                    late.as_millis()
                )));
            }
        }
        match Arc::clone(slots).try_acquire_owned() {
            Ok(permit) => Ok(Slot { _permit: permit }),
            Err(_) => {
                metrics.shed(method, Shed::TooMany);
                Err(Status::unavailable(format!(
                    "mixer is overloaded: {} {} are under way",
                    match method {
                        Method::Check => limits.checks,
                        Method::Report => limits.reports,
                    },
                    match method {
                        Method::Check => "checks",
                        Method::Report => "reports",
                    }
                )))
            }
        }
    }

    /// Calls of `method` under way.
    pub fn under_way(&self, method: Method) -> usize {
        let Inner {
            limits,
            checks,
            reports,
            ..
        } = &*self.0;
        match method {
            Method::Check => limits.checks.saturating_sub(checks.available_permits()),
            Method::Report => limits.reports.saturating_sub(reports.available_permits()),
        }
    }

    /// How late the program is.
    pub fn delay(&self) -> Duration {
        self.0.delay.get()
    }

    /// Measures the delay for as long as it is polled. To run on the runtime that serves.
    pub async fn watch(self) {
        /// Nobody measures any more: calls that are answered while the program stops are not late.
        struct Measuring<'a>(&'a Delay);
        impl Drop for Measuring<'_> {
            fn drop(&mut self) {
                self.0.due.store(0, Ordering::Relaxed);
                self.0.last.store(0, Ordering::Relaxed);
            }
        }
        let delay = &self.0.delay;
        let _measuring = Measuring(delay);
        loop {
            let due = Instant::now() + TICK;
            let at = u64::try_from((due - delay.born).as_micros()).unwrap_or(u64::MAX);
            delay.due.store(at, Ordering::Relaxed);
            delay.arrived.store(0, Ordering::Relaxed);
            tokio::time::sleep_until(due).await;
            let late = due.elapsed();
            let micros = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
            delay.last.store(micros, Ordering::Relaxed);
            self.0.metrics.late(late.saturating_sub(COARSE));
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn overload(limits: Limits) -> Overload {
        Overload::new(limits, Metrics::register(&mut Registry::default()))
    }

    #[test]
    fn no_more_are_under_way_than_the_limit() {
        let overload = overload(Limits {
            checks: 2,
            reports: 1,
            delay: None,
        });
        let (first, second) = (overload.admit(Method::Check), overload.admit(Method::Check));
        assert!(first.is_ok() && second.is_ok());
        let refused = overload.admit(Method::Check).unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (
                tonic::Code::Unavailable,
                "mixer is overloaded: 2 checks are under way"
            )
        );
        let report = overload.admit(Method::Report);
        assert!(report.is_ok(), "each method has its own limit");
        assert_eq!(overload.under_way(Method::Check), 2);
        drop(first);
        assert!(overload.admit(Method::Check).is_ok());
    }

    #[test]
    fn reports_are_shed_first_and_both_come_back() {
        let overload = overload(Limits {
            delay: Some(Duration::from_millis(100)),
            ..Limits::default()
        });
        let admitted = |late: Duration| {
            let micros = u64::try_from((late + COARSE).as_micros()).unwrap();
            overload.0.delay.last.store(micros, Ordering::Relaxed);
            overload.0.delay.arrived.store(FEW, Ordering::Relaxed);
            (
                overload.admit(Method::Check).is_ok(),
                overload.admit(Method::Report).is_ok(),
            )
        };
        for (millis, want) in [
            (0, (true, true)),
            (50, (true, true)),
            (60, (true, false)),
            (100, (true, false)),
            (101, (false, false)),
            (0, (true, true)),
        ] {
            assert_eq!(admitted(Duration::from_millis(millis)), want, "{millis}");
        }
        let refused = overload.0.metrics.shed_total();
        assert_eq!(refused, 4);
    }

    #[test]
    fn an_overdue_clock_counts_before_it_has_run() {
        let metrics = Metrics::register(&mut Registry::default());
        let overload = Overload::new(Limits::default(), metrics);
        let delay = &overload.0.delay;
        delay.due.store(delay.now() + 1, Ordering::Relaxed);
        assert!(overload.admit(Method::Check).is_ok());
        while delay.now() < 150_000 {
            std::thread::yield_now();
        }
        assert!(overload.admit(Method::Check).is_ok(), "few are no crowd");
        delay.arrived.store(FEW, Ordering::Relaxed);
        assert!(overload.admit(Method::Check).is_err());
        delay.due.store(delay.now() + 5_000_000, Ordering::Relaxed);
        assert!(overload.admit(Method::Check).is_ok());
    }

    #[tokio::test]
    async fn the_clock_is_measured_while_somebody_watches() {
        let overload = overload(Limits::default());
        let delay = &overload.0.delay;
        let watch = overload.clone().watch();
        tokio::pin!(watch);
        while delay.last.load(Ordering::Relaxed) == 0 {
            let turn = tokio::time::timeout(TICK / 2, watch.as_mut()).await;
            assert!(turn.is_err(), "it never ends");
        }
        assert_ne!(delay.due.load(Ordering::Relaxed), 0);
    }
}
