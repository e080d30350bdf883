//! Keeps handshakes from starving requests: of all that are ready, only a few do their costly part in one
//! turn of the worker's loop; the others wait in line, and what is not a handshake runs between.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Steps of handshakes in one turn of the loop. A step takes 0.1 to 0.3 ms (RSA), so requests wait for
/// less than a millisecond.
const AT_ONCE: usize = 2;

thread_local! {
    static GATE: Arc<Semaphore> = Arc::new(Semaphore::new(AT_ONCE));
}

/// Leave to do one step.
pub(super) struct Turn(
    #[expect(dead_code, reason = "its drop is what counts")] Option<OwnedSemaphorePermit>,
);

/// Waits in line.
pub(super) async fn turn() -> Turn {
    let gate = GATE.with(Arc::clone);
    // The gate is never closed.
    Turn(gate.acquire_owned().await.ok())
}

/// The step is done, if it was one that had to wait: lets the next in line have the next turn of the loop.
pub(super) async fn end(turn: Option<Turn>) {
    if turn.is_some() {
        tokio::task::yield_now().await;
    }
}
