//! What adapters share that send records to somebody else's server: a bounded queue, and a task that sends
//! what is in it in batches, again and again until it arrives or is refused.
//!
//! Requests never wait. When the queue is full, because the receiver is slow or away, records are dropped and
//! counted (`records_dropped`); how many wait is told (queue `records`). When the handler is closed, what is queued is still sent, for at most
//! [`GRACE`].

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use lateen_adapter::{BuildError, Code, Counter, Env, HandlerError, meter::Gauge};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};

/// For what is queued when the handler is closed.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// After a failure the next attempt comes, at first soon, then more seldom.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// How much waits, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Records that may wait.
    pub(crate) records: usize,
    /// Bytes that may wait.
    pub(crate) bytes: usize,
    /// Records of one batch.
    pub(crate) batch_records: usize,
    /// Bytes of one batch, unless one record is larger.
    pub(crate) batch_bytes: usize,
    /// Longest wait of a record for others to be sent with.
    pub(crate) interval: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            records: 16_384,
            bytes: 64 << 20,
            batch_records: 1000,
            batch_bytes: 1 << 20,
            interval: Duration::from_secs(1),
        }
    }
}

/// A batch was not taken.
#[derive(Debug)]
pub(crate) enum SendError {
    /// It may be later.
    Again(String),
    /// It never will be.
    Never(String),
}

/// Sends batches.
pub(crate) trait Sink: Send + 'static {
    /// What it sends.
    type Record: Send + Sync + 'static;

    /// Sends all of `batch`, or fails as a whole.
    fn send(
        &mut self,
        batch: &[Self::Record],
    ) -> impl Future<Output = Result<(), SendError>> + Send;
}

/// The near end of the queue.
#[derive(Clone)]
pub(crate) struct Queue<T> {
    sender: mpsc::Sender<(T, usize)>,
    bytes: Arc<AtomicUsize>,
    max_bytes: usize,
    dropped: Counter,
    waiting: Gauge,
}

impl<T: Send + Sync + 'static> Queue<T> {
    /// Starts the task.
    pub(crate) fn start(
        env: &Env,
        handler: &str,
        limits: Limits,
        sink: impl Sink<Record = T>,
    ) -> Result<Self, BuildError> {
        let (sender, receiver) = mpsc::channel(limits.records.max(1));
        let bytes = Arc::<AtomicUsize>::default();
        let dropped = env.counter("records_dropped");
        let waiting = env.gauge("records");
        let worker = Worker {
            handler: handler.to_owned(),
            limits,
            receiver,
            held: None,
            bytes: Arc::clone(&bytes),
            sent: env.counter("records_sent"),
            failures: env.counter("send_failures"),
            dropped: dropped.clone(),
            waiting: waiting.clone(),
            sink,
        };
        env.spawn_draining(GRACE, worker.run())
            .map_err(|e| BuildError(e.to_string()))?;
        Ok(Self {
            sender,
            bytes,
            max_bytes: limits.bytes,
            dropped,
            waiting,
        })
    }

    /// Queues a record of `bytes` bytes. `false`: it is dropped.
    pub(crate) fn push(&self, record: T, bytes: usize) -> bool {
        // Others may push at the same time: the bound is exceeded by their records at most.
        let fits = self.bytes.load(Ordering::Relaxed).saturating_add(bytes) <= self.max_bytes;
        if fits {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            // Before it is there, so that the level is never below what is taken out.
            self.waiting.add(1);
            if self.sender.try_send((record, bytes)).is_ok() {
                return true;
            }
            self.waiting.add(-1);
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        self.dropped.inc();
        false
    }
}

/// What a report handler answers when `dropped` records found no place.
pub(crate) fn outcome(dropped: usize) -> Result<(), HandlerError> {
    match dropped {
        0 => Ok(()),
        dropped => Err(HandlerError {
            code: Code::ResourceExhausted,
            message: format!("the receiver is slow or away: {dropped} records are dropped"),
        }),
    }
}

struct Worker<S: Sink> {
    handler: String,
    limits: Limits,
    receiver: mpsc::Receiver<(S::Record, usize)>,
    /// Received, but for the next batch.
    held: Option<(S::Record, usize)>,
    bytes: Arc<AtomicUsize>,
    sent: Counter,
    failures: Counter,
    dropped: Counter,
    waiting: Gauge,
    sink: S,
}

/// What it leaves behind waits no more.
impl<S: Sink> Drop for Worker<S> {
    fn drop(&mut self) {
        let left = self.receiver.len() + usize::from(self.held.is_some());
        self.waiting.add(-i64::try_from(left).unwrap_or(i64::MAX));
    }
}

impl<S: Sink> Worker<S> {
    async fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            let is_last = self.fill(&mut batch).await;
            if !batch.is_empty() {
                self.send(&batch).await;
                batch.clear();
            }
            if is_last {
                return;
            }
        }
    }

    /// Waits for a record and those that follow soon. `true`: there will be no more.
    async fn fill(&mut self, batch: &mut Vec<S::Record>) -> bool {
        let mut bytes = 0;
        let mut until: Option<Instant> = None;
        loop {
            let next = match (self.held.take(), until) {
                (Some(held), _) => Some(held),
                (None, None) => self.receiver.recv().await,
                (None, Some(until)) => match timeout_at(until, self.receiver.recv()).await {
                    Ok(next) => next,
                    Err(_) => return false,
                },
            };
            let Some((record, size)) = next else {
                return true;
            };
            if !batch.is_empty() && bytes + size > self.limits.batch_bytes {
                self.held = Some((record, size));
                return false;
            }
            until.get_or_insert_with(|| Instant::now() + self.limits.interval);
            bytes += size;
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            self.waiting.add(-1);
            batch.push(record);
            if batch.len() >= self.limits.batch_records {
                return false;
            }
        }
    }

    async fn send(&mut self, batch: &[S::Record]) {
        let mut pause = RETRY.0;
        loop {
            match self.sink.send(batch).await {
                Ok(()) => {
                    self.sent.inc_by(batch.len() as u64);
                    return;
                }
                Err(SendError::Never(problem)) => {
                    self.failures.inc();
                    self.dropped.inc_by(batch.len() as u64);
                    tracing::warn!(handler = %self.handler, problem, records = batch.len(), "records are refused and dropped");
                    return;
                }
                Err(SendError::Again(problem)) => {
                    self.failures.inc();
                    tracing::warn!(handler = %self.handler, problem, ?pause, "records are not taken; they wait");
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use lateen_adapter::{Clock, workload::NoWorkloads};
    use tokio_util::task::TaskTracker;

    use super::*;

    /// Takes batches; fails as often as it is told.
    struct Recorder {
        fail: Vec<SendError>,
        batches: Arc<Mutex<Vec<Vec<u32>>>>,
    }

    impl Sink for Recorder {
        type Record = u32;

        async fn send(&mut self, batch: &[u32]) -> Result<(), SendError> {
            match self.fail.pop() {
                Some(error) => Err(error),
                None => {
                    let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
                    batches.push(batch.to_vec());
                    Ok(())
                }
            }
        }
    }

    /// Pushes `records` of a byte each, closes the handler and tells which batches arrived.
    async fn sent(limits: Limits, fail: Vec<SendError>, records: u32) -> (Vec<Vec<u32>>, usize) {
        let tracker = TaskTracker::new();
        let (env, closer) = Env::new(
            Arc::from("h"),
            Clock::manual(),
            Arc::new(NoWorkloads),
            tracker.clone(),
        );
        let batches = Arc::<Mutex<Vec<Vec<u32>>>>::default();
        let recorder = Recorder {
            fail,
            batches: Arc::clone(&batches),
        };
        let queue = Queue::start(&env, "h", limits, recorder).unwrap();
        let refused = (0..records).filter(|r| !queue.push(*r, 1)).count();
        drop((queue, closer));
        tracker.close();
        tracker.wait().await;
        let batches = batches.lock().unwrap().clone();
        (batches, refused)
    }

    #[tokio::test]
    async fn what_is_queued_is_sent_in_batches_even_at_the_end() {
        let limits = Limits {
            batch_records: 3,
            ..Limits::default()
        };
        let (batches, refused) = sent(limits, Vec::new(), 7).await;
        assert_eq!(batches, [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
        assert_eq!(refused, 0);
        let limits = Limits {
            batch_bytes: 4,
            ..Limits::default()
        };
        let (batches, _) = sent(limits, Vec::new(), 5).await;
        assert_eq!(batches, [vec![0, 1, 2, 3], vec![4]]);
    }

    #[tokio::test]
    async fn a_full_queue_drops_what_comes_and_keeps_what_is_there() {
        let limits = Limits {
            records: 4,
            ..Limits::default()
        };
        assert_eq!(
            sent(limits, Vec::new(), 9).await,
            (vec![vec![0, 1, 2, 3]], 5)
        );
        let limits = Limits {
            bytes: 4,
            ..Limits::default()
        };
        assert_eq!(
            sent(limits, Vec::new(), 9).await,
            (vec![vec![0, 1, 2, 3]], 5)
        );
    }

    #[tokio::test]
    async fn a_batch_comes_again_until_it_is_taken_or_refused() {
        let again = || SendError::Again("away".into());
        let fail = vec![again(), again(), again()];
        assert_eq!(
            sent(Limits::default(), fail, 2).await,
            (vec![vec![0, 1]], 0)
        );
        let limits = Limits {
            batch_records: 1,
            ..Limits::default()
        };
        let fail = vec![SendError::Never("poison".into()), again()];
        assert_eq!(sent(limits, fail, 2).await, (vec![vec![1]], 0));
    }
}
