//! What Mixer lends to a handler: a clock, tasks, counters, the workload view.

use std::{
    fmt,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::FutureExt as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clock::Clock,
    meter::{Counter, Gauge, Meter, NoMeter},
    workload::Workloads,
};

/// How many tasks of one handler may live at a time.
pub const MAX_TASKS: usize = 64; // a handler has a few daemons and bursts of refreshes, not a task per request

/// Lent to one handler. When the handler is closed, its tasks are stopped.
#[derive(Clone)]
pub struct Env {
    clock: Clock,
    workloads: Arc<dyn Workloads>,
    meter: Arc<dyn Meter>,
    tasks: Arc<Tasks>,
}

struct Tasks {
    handler: Arc<str>,
    alive: AtomicUsize,
    tracker: TaskTracker,
    closing: CancellationToken,
}

/// Closes the handler whose [`Env`] it came with: its tasks are told to stop.
#[derive(Debug)]
pub struct Closer(CancellationToken);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// The handler has [`MAX_TASKS`] tasks already, or is closed.
#[derive(Debug, thiserror::Error)]
#[error("{0} may not start another task")]
pub struct TooManyTasks(Arc<str>);

impl Env {
    /// What handler `name` gets. Tasks are counted in `tracker` as well, so that drain can wait for them.
    pub fn new(
        name: Arc<str>,
        clock: Clock,
        workloads: Arc<dyn Workloads>,
        tracker: TaskTracker,
    ) -> (Self, Closer) {
        let closing = CancellationToken::new();
        let tasks = Tasks {
            handler: name,
            alive: AtomicUsize::new(0),
            tracker,
            closing: closing.clone(),
        };
        (
            Self {
                clock,
                workloads,
                meter: Arc::new(NoMeter),
                tasks: Arc::new(tasks),
            },
            Closer(closing),
        )
    }

    /// And it counts with `meter`.
    #[must_use]
    pub fn with_meter(mut self, meter: Arc<dyn Meter>) -> Self {
        self.meter = meter;
        self
    }

    /// The handler's counter of `event`; see [`Meter::counter`].
    pub fn counter(&self, event: &'static str) -> Counter {
        self.meter.counter(event)
    }

    /// The level of one of the handler's queues; see [`Meter::gauge`].
    pub fn gauge(&self, queue: &'static str) -> Gauge {
        self.meter.gauge(queue)
    }

    /// The clock to measure with.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Who runs where.
    pub fn workloads(&self) -> &Arc<dyn Workloads> {
        &self.workloads
    }

    /// Runs `task` until it ends, panics (which is logged) or the handler is closed.
    ///
    /// # Errors
    /// When the handler has too many tasks.
    pub fn spawn(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), TooManyTasks> {
        let closing = self.tasks.closing.clone();
        self.spawn_until(async move { closing.cancelled().await }, task)
    }

    /// As [`Env::spawn`], but when the handler is closed, `task` gets up to `grace` to end by itself: for one
    /// that has something to send yet. It learns of the end by what the handler held: a channel that closes.
    ///
    /// # Errors
    /// When the handler has too many tasks.
    pub fn spawn_draining(
        &self,
        grace: Duration,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), TooManyTasks> {
        let closing = self.tasks.closing.clone();
        self.spawn_until(
            async move {
                closing.cancelled().await;
                tokio::time::sleep(grace).await;
            },
            task,
        )
    }

    /// Runs `work` on a thread that may block. It is not interrupted when the handler is closed.
    ///
    /// # Errors
    /// When the handler has too many tasks.
    pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) -> Result<(), TooManyTasks> {
        let slot = self.slot()?;
        self.tasks.tracker.spawn_blocking(move || {
            work();
            drop(slot);
        });
        Ok(())
    }

    fn spawn_until(
        &self,
        end: impl Future<Output = ()> + Send + 'static,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), TooManyTasks> {
        let slot = self.slot()?;
        self.tasks.tracker.spawn(async move {
            let task = AssertUnwindSafe(task).catch_unwind();
            // Dropping either branch is fine: the end holds no state, the task is over.
            tokio::select! {
                biased;
                outcome = task => if outcome.is_err() {
                    tracing::error!(handler = %slot.0.handler, "a task of this handler panicked");
                },
                () = end => {}
            }
            drop(slot);
        });
        Ok(())
    }

    fn slot(&self) -> Result<Slot, TooManyTasks> {
        let slot = Slot(Arc::clone(&self.tasks));
        let before = self.tasks.alive.fetch_add(1, Ordering::AcqRel);
        if before >= MAX_TASKS || self.tasks.closing.is_cancelled() {
            return Err(TooManyTasks(Arc::clone(&self.tasks.handler))); // `slot` gives the place back
        }
        Ok(slot)
    }
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Env")
            .field("handler", &self.tasks.handler)
            .finish_non_exhaustive()
    }
}

struct Slot(Arc<Tasks>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::workload::NoWorkloads;

    fn env() -> (Env, Closer) {
        Env::new(
            Arc::from("h"),
            Clock::manual(),
            Arc::new(NoWorkloads),
            TaskTracker::new(),
        )
    }

    #[tokio::test]
    async fn tasks_are_bounded_and_stop_with_the_handler() {
        let (env, closer) = env();
        let mut ends = Vec::new();
        for _ in 0..MAX_TASKS {
            let (held, end) = oneshot::channel::<()>();
            ends.push(end);
            env.spawn(async move {
                futures::future::pending::<()>().await;
                drop(held);
            })
            .unwrap();
        }
        assert!(env.spawn(async {}).is_err());
        drop(closer);
        for end in ends {
            assert!(end.await.is_err());
        }
        assert!(env.spawn(async {}).is_err(), "closed");
    }

    #[tokio::test]
    async fn a_task_that_drains_has_its_grace() {
        let (env, closer) = env();
        let (close, closed) = oneshot::channel::<()>();
        let (told, tells) = oneshot::channel();
        env.spawn_draining(Duration::from_secs(600), async move {
            let _closed = closed.await;
            told.send("the rest").unwrap();
        })
        .unwrap();
        let (held, end) = oneshot::channel::<()>();
        env.spawn_draining(Duration::from_millis(1), async move {
            futures::future::pending::<()>().await;
            drop(held);
        })
        .unwrap();
        drop(closer);
        assert!(end.await.is_err(), "its grace is over");
        drop(close);
        assert_eq!(tells.await, Ok("the rest"));
    }

    #[tokio::test]
    async fn a_panic_gives_the_place_back() {
        let (env, _closer) = env();
        env.spawn(async { panic!("mine alone") }).unwrap();
        env.tasks.tracker.close();
        env.tasks.tracker.wait().await;
        assert_eq!(env.tasks.alive.load(Ordering::SeqCst), 0);
    }
}
