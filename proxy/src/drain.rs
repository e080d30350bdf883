//! Leaving politely: who asks for it, who is told, and how fast connections should go.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

/// Whether this process is on its way out. Cheap to clone and to ask; starts as "not draining".
#[derive(Clone, Debug)]
pub struct Drain {
    started: Arc<watch::Sender<Option<Instant>>>,
    failing: Arc<AtomicBool>,
    time: Duration,
}

impl Drain {
    /// `time` is how long connections get to finish (`--drain-time-s`).
    pub fn new(time: Duration) -> Drain {
        Drain {
            started: Arc::new(watch::Sender::new(None)),
            failing: Arc::default(),
            time,
        }
    }

    /// Begins the drain; a second call changes nothing.
    pub fn start(&self) {
        self.started.send_if_modified(|started| {
            let first = started.is_none();
            if first {
                *started = Some(Instant::now());
            }
            first
        });
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.started.borrow().is_some()
    }

    /// Completes when a drain has begun. Cancel-safe.
    pub async fn started(&self) {
        let mut receiver = self.started.subscribe();
        // The sender lives in `self`, so waiting cannot fail while we wait.
        drop(receiver.wait_for(Option::is_some).await);
    }

    /// When connections that have not finished by themselves are to be closed.
    pub fn deadline(&self) -> Option<Instant> {
        self.started.borrow().map(|at| at + self.time)
    }

    /// How long connections get to finish.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Makes this process answer health checks with a failure (`/healthcheck/fail`), or well again.
    pub fn set_health_check_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// Whether health checks are to fail: on the operator's order, or because of a drain.
    pub fn is_health_check_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed) || self.is_draining()
    }

    /// Whether this answer should end its connection (`connection: close`, GOAWAY).
    ///
    /// Gradual as Envoy's default strategy: the share of connections closed grows with the time since
    /// the drain began, so that clients do not all reconnect at once.
    pub fn should_close(&self) -> bool {
        let Some(started) = *self.started.borrow() else {
            return self.failing.load(Ordering::Relaxed);
        };
        let elapsed = started.elapsed();
        elapsed >= self.time || rand::random_range(0.0..1.0) < elapsed.div_duration_f64(self.time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closing_is_certain_at_the_end_of_the_drain_time() {
        let drain = Drain::new(Duration::ZERO);
        assert!(!drain.should_close() && drain.deadline().is_none());
        drain.start();
        drain.started().await;
        assert!(drain.is_draining() && drain.is_health_check_failing());
        assert!(drain.should_close() && drain.deadline().is_some_and(|at| at <= Instant::now()));
    }

    #[tokio::test]
    async fn closing_is_rare_at_its_beginning() {
        let drain = Drain::new(Duration::from_secs(1_000_000));
        drain.start();
        assert!((0..100).filter(|_| drain.should_close()).count() < 50);
    }

    #[test]
    fn a_failed_health_check_closes_connections_without_a_drain() {
        let drain = Drain::new(Duration::from_secs(10));
        drain.set_health_check_failing(true);
        assert!(drain.should_close() && !drain.is_draining());
        drain.set_health_check_failing(false);
        assert!(!drain.is_health_check_failing());
    }
}
