//! Leaving politely: who asks for it, who is told, and how fast connections should go.

use std::{
    cell::RefCell,
    fmt,
    rc::{Rc, Weak},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep_until},
};

/// Whether this process is on its way out. Cheap to clone and to ask; starts as "not draining".
#[derive(Clone, Debug)]
pub struct Drain {
    state: Arc<State>,
    time: Duration,
    /// A failed health check is no reason to close connections.
    patient: bool,
}

#[derive(Debug)]
struct State {
    started: watch::Sender<Option<Instant>>,
    /// Whether `started` or `failing` say anything: what each request asks first.
    leaving: AtomicBool,
    failing: AtomicBool,
}

impl Drain {
    /// `time` is how long connections get to finish (`--drain-time-s`).
    pub fn new(time: Duration) -> Drain {
        Drain {
            state: Arc::new(State {
                started: watch::Sender::new(None),
                leaving: AtomicBool::new(false),
                failing: AtomicBool::new(false),
            }),
            time,
            patient: false,
        }
    }

    /// The same, for connections that do not go because health checks are to fail. Envoy:
    /// `drain_type: MODIFY_ONLY`.
    #[must_use]
    pub fn patient(mut self) -> Drain {
        self.patient = true;
        self
    }

    /// Begins the drain; a second call changes nothing.
    pub fn start(&self) {
        self.state.started.send_if_modified(|started| {
            let first = started.is_none();
            if first {
                *started = Some(Instant::now());
                self.state.leaving.store(true, Ordering::Release);
            }
            first
        });
    }

    /// Whether a drain has begun.
    pub fn is_draining(&self) -> bool {
        self.leaving() && self.state.started.borrow().is_some()
    }

    /// Completes when a drain has begun. Cancel-safe.
    pub async fn started(&self) {
        let mut receiver = self.state.started.subscribe();
        // The sender lives in `self`, so waiting cannot fail while we wait.
        drop(receiver.wait_for(Option::is_some).await);
    }

    /// When connections that have not finished by themselves are to be closed.
    pub fn deadline(&self) -> Option<Instant> {
        if !self.leaving() {
            return None;
        }
        self.state.started.borrow().map(|at| at + self.time)
    }

    fn leaving(&self) -> bool {
        self.state.leaving.load(Ordering::Acquire)
    }

    /// Lets the task that registers be woken when the drain's time is over. For workers: all watches of
    /// one worker share one task.
    pub(crate) fn watch(&self) -> Watch {
        let watchers = WATCHERS.with_borrow_mut(|all| {
            all.retain(|watchers| watchers.strong_count() > 0);
            let present = all
                .iter()
                .filter_map(Weak::upgrade)
                .find(|watchers| Arc::ptr_eq(&watchers.of, &self.state));
            present.unwrap_or_else(|| {
                let watchers = Rc::new_cyclic(|this: &Weak<Watchers>| Watchers {
                    of: self.state.clone(),
                    wakers: RefCell::default(),
                    task: tokio::task::spawn_local(wake(self.clone(), this.clone())).abort_handle(),
                });
                all.push(Rc::downgrade(&watchers));
                watchers
            })
        });
        let mut wakers = watchers.wakers.borrow_mut();
        let slot = wakers.free.pop().unwrap_or_else(|| {
            wakers.slots.push(None);
            wakers.slots.len() - 1
        });
        drop(wakers);
        Watch { watchers, slot }
    }

    /// How long connections get to finish.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Makes this process answer health checks with a failure (`/healthcheck/fail`), or well again.
    pub fn set_health_check_failing(&self, failing: bool) {
        self.state.failing.store(failing, Ordering::Relaxed);
        self.state.leaving.store(
            failing || self.state.started.borrow().is_some(),
            Ordering::Release,
        );
    }

    /// Whether health checks are to fail: on the operator's order, or because of a drain.
    pub fn is_health_check_failing(&self) -> bool {
        self.state.failing.load(Ordering::Relaxed) || self.is_draining()
    }

    /// Whether this answer should end its connection (`connection: close`, GOAWAY).
    ///
    /// Gradual as Envoy's default strategy: the share of connections closed grows with the time since
    /// the drain began, so that clients do not all reconnect at once.
    pub fn should_close(&self) -> bool {
        if !self.leaving() {
            return false;
        }
        let Some(started) = *self.state.started.borrow() else {
            return !self.patient && self.state.failing.load(Ordering::Relaxed);
        };
        let elapsed = started.elapsed();
        elapsed >= self.time || rand::random_range(0.0..1.0) < elapsed.div_duration_f64(self.time)
    }
}

thread_local! {
    static WATCHERS: RefCell<Vec<Weak<Watchers>>> = const { RefCell::new(Vec::new()) };
}

/// Who on this worker waits for the end of one drain.
struct Watchers {
    of: Arc<State>,
    wakers: RefCell<Wakers>,
    task: AbortHandle,
}

#[derive(Default)]
struct Wakers {
    slots: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn wake(drain: Drain, watchers: Weak<Watchers>) {
    drain.started().await;
    if let Some(watchers) = watchers.upgrade() {
        watchers.wake();
    }
    if let Some(at) = drain.deadline() {
        sleep_until(at).await;
    }
    if let Some(watchers) = watchers.upgrade() {
        watchers.wake();
    }
}

impl Watchers {
    fn wake(&self) {
        let wakers: Vec<Waker> = self
            .wakers
            .borrow()
            .slots
            .iter()
            .flatten()
            .cloned()
            .collect();
        for waker in wakers {
            waker.wake();
        }
    }
}

/// A task's place among those that are woken when a drain begins and when its time is over.
pub(crate) struct Watch {
    watchers: Rc<Watchers>,
    slot: usize,
}

impl Watch {
    /// The task that asks is the one to be woken.
    pub(crate) fn register(&self, cx: &Context<'_>) {
        if let Some(place) = self.watchers.wakers.borrow_mut().slots.get_mut(self.slot)
            && !place
                .as_ref()
                .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *place = Some(cx.waker().clone());
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watch({})", self.slot)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut wakers = self.watchers.wakers.borrow_mut();
        let old = wakers.slots.get_mut(self.slot).and_then(Option::take);
        wakers.free.push(self.slot);
        drop(wakers);
        // The last waker of a task may be the task's end, which may have a watch of its own.
        drop(old);
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

    #[tokio::test(start_paused = true)]
    async fn who_watches_is_woken_when_the_time_is_over() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let drain = Drain::new(Duration::from_secs(7));
                let (one, two) = (drain.watch(), drain.watch());
                drop(one);
                let began = Instant::now();
                drain.start();
                std::future::poll_fn(|cx| {
                    two.register(cx);
                    if drain.deadline().is_some_and(|at| at <= Instant::now()) {
                        std::task::Poll::Ready(())
                    } else {
                        std::task::Poll::Pending
                    }
                })
                .await;
                assert_eq!(began.elapsed().as_secs(), 7);
            })
            .await;
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
        assert!(!drain.clone().patient().should_close());
        drain.set_health_check_failing(false);
        assert!(!drain.is_health_check_failing());
    }
}
