//! Stopping: a signal asks for it, a [`Drain`] tells every task and waits for those that finish.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal as unix_signal};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

/// Completes at the first SIGTERM or SIGINT. The handlers are in place when this returns, not only
/// when the future is polled.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = unix_signal(SignalKind::terminate())?;
    let mut interrupt = unix_signal(SignalKind::interrupt())?;
    Ok(async move {
        // Both branches are cancel-safe: a signal not received stays pending.
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "shutting down");
    })
}

/// Knows the tasks of a program and tells them when to stop. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Drain {
    /// Nothing running, nothing stopping.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a task that [`Drain::finish`] waits for. The task must watch [`Drain::stopping`] itself.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.tasks.spawn(task)
    }

    /// Runs a task that is simply dropped when stopping begins.
    pub fn spawn_until_stop<F>(&self, task: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let stop = self.stop.clone();
        self.tasks
            .spawn(async move { stop.run_until_cancelled(task).await })
    }

    /// Completes when stopping begins; at once if it has begun.
    pub fn stopping(&self) -> WaitForCancellationFutureOwned {
        self.stop.clone().cancelled_owned()
    }

    /// Whether stopping has begun.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The token behind [`Drain::stopping`], for libraries that want one.
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Begins stopping, does not wait.
    pub fn begin(&self) {
        self.stop.cancel();
    }

    /// Begins stopping and waits for all tasks, at most `limit`. Says whether all finished.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.begin();
        self.tasks.close();
        let finished = tokio::time::timeout(limit, self.tasks.wait()).await.is_ok();
        if !finished {
            tracing::warn!(
                tasks = self.tasks.len(),
                ?limit,
                "tasks did not finish in time; leaving them"
            );
        }
        finished
    }
}
