//! Where log lines go: every worker appends to a buffer of its own, and one writer thread per file takes
//! the buffers and writes them. A full buffer drops lines (they are counted), because a slow disk must not
//! hold up requests.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::Thread,
    time::{Duration, Instant},
};

use crate::stats;

/// What may wait in one worker's buffer.
const LARGEST: usize = 1 << 20;
/// The writer is woken early for this much.
const BATCH: usize = 64 * 1024;
/// Lines are written after this time at the latest. Envoy: `--file-flush-interval-msec`, 10 s.
const FLUSH: Duration = Duration::from_millis(250);

/// An open log file. All access logs of one path share it, so that their lines never mix.
#[derive(Debug)]
pub(super) struct Sink {
    shared: Arc<Shared>,
    writer: Thread,
}

#[derive(Debug)]
struct Shared {
    path: String,
    /// By worker; the lock is free but for the moment in which the writer takes the buffer.
    buffers: Box<[Buffer]>,
    /// The writer sleeps until somebody wakes it.
    asleep: AtomicBool,
    reopen: AtomicBool,
    closed: AtomicBool,
    dropped: AtomicU64,
    /// Who is to be told when everything before is written.
    waiting: Mutex<Vec<SyncSender<()>>>,
}

/// On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Buffer(Mutex<Vec<u8>>);

/// What was done to the files of all sinks since it was last read.
#[derive(Debug)]
struct Written {
    /// Lines that went through a buffer.
    buffered: AtomicU64,
    /// Buffers that were written, or could not be.
    completed: AtomicU64,
    failed: AtomicU64,
    reopen_failed: AtomicU64,
}

static WRITTEN: Written = Written {
    buffered: AtomicU64::new(0),
    completed: AtomicU64::new(0),
    failed: AtomicU64::new(0),
    reopen_failed: AtomicU64::new(0),
};

/// Brings `filesystem.*` up to date. Called before statistics are shown.
pub fn count(registry: &stats::Registry) {
    let scope = registry.scope("filesystem.");
    for (name, count) in [
        ("write_buffered", &WRITTEN.buffered),
        ("write_completed", &WRITTEN.completed),
        ("write_failed", &WRITTEN.failed),
        ("reopen_failed", &WRITTEN.reopen_failed),
    ] {
        scope.counter(name).add(count.swap(0, Ordering::Relaxed));
    }
    let waiting: usize = sinks()
        .iter()
        .flat_map(|sink| {
            sink.shared
                .buffers
                .iter()
                .map(|buffer| lock(&buffer.0).len())
        })
        .sum();
    scope.gauge("write_total_buffered").set(waiting as u64);
}

/// All open sinks by path. Process-wide, because the files are.
static OPEN: Mutex<Option<HashMap<String, Weak<Sink>>>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A line that was cut by a panic is still a line.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: &str) -> io::Result<File> {
    Ok(match path {
        // The descriptor itself: opening /dev/stdout anew fails on sockets and truncates nothing.
        "/dev/stdout" | "/dev/fd/1" => File::from(io::stdout().as_fd().try_clone_to_owned()?),
        "/dev/stderr" | "/dev/fd/2" => File::from(io::stderr().as_fd().try_clone_to_owned()?),
        path => OpenOptions::new().create(true).append(true).open(path)?,
    })
}

impl Sink {
    /// Opens a file for appending, or joins those who have it open.
    pub(super) fn open(path: &str) -> io::Result<Arc<Sink>> {
        let mut sinks = lock(&OPEN);
        let sinks = sinks.get_or_insert_default();
        if let Some(sink) = sinks.get(path).and_then(Weak::upgrade) {
            return Ok(sink);
        }
        sinks.retain(|_, sink| sink.strong_count() > 0);
        let file = open(path)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            buffers: (0..stats::SHARDS).map(|_| Buffer::default()).collect(),
            asleep: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            waiting: Mutex::default(),
        });
        let writer = std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.write_lines(file)
            })?;
        let sink = Arc::new(Sink {
            shared,
            writer: writer.thread().clone(),
        });
        sinks.insert(path.to_owned(), Arc::downgrade(&sink));
        Ok(sink)
    }

    /// Lets `write` append a line to the calling worker's buffer; never waits for the disk.
    pub(super) fn append(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut lines = lock(&self.shared.buffers[stats::worker()].0);
        let before = lines.len();
        if before > LARGEST {
            drop(lines);
            self.shared.drop_line();
            return;
        }
        write(&mut lines);
        let after = lines.len();
        drop(lines);
        let first = before == 0 && self.shared.asleep.load(Ordering::SeqCst);
        if first || before < BATCH && after >= BATCH {
            self.writer.unpark();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.writer.unpark();
    }
}

/// Every open sink.
fn sinks() -> Vec<Arc<Sink>> {
    lock(&OPEN)
        .iter()
        .flatten()
        .filter_map(|(_, sink)| sink.upgrade())
        .collect()
}

/// Waits until all lines appended so far are written, or `limit` has passed. Call before exit.
pub fn flush(limit: Duration) {
    let deadline = Instant::now() + limit;
    for sink in sinks() {
        let (done, written) = sync_channel(1);
        lock(&sink.shared.waiting).push(done);
        sink.writer.unpark();
        let left = deadline.saturating_duration_since(Instant::now());
        if written.recv_timeout(left).is_err() {
            tracing::warn!(
                path = sink.shared.path,
                "access log lines were not written in time"
            );
        }
    }
}

/// Opens all files anew, after somebody has moved them away. Envoy: `/reopen_logs`, SIGUSR1.
pub fn reopen() {
    for sink in sinks() {
        sink.shared.reopen.store(true, Ordering::Release);
        sink.writer.unpark();
    }
}

impl Shared {
    fn drop_line(&self) {
        let before = self.dropped.fetch_add(1, Ordering::Relaxed);
        if before.is_multiple_of(10_000) {
            tracing::warn!(
                path = self.path,
                "access log lines are being dropped: the file cannot be written fast enough"
            );
        }
    }

    /// The writer thread, until the sink is dropped.
    fn write_lines(&self, mut file: File) {
        let mut spare = Vec::new();
        loop {
            let closed = self.closed.load(Ordering::Acquire);
            let waiting = std::mem::take(&mut *lock(&self.waiting));
            let wrote = self.write_buffers(&mut file, &mut spare);
            for done in waiting {
                // Who asked may have given up waiting.
                let _gone = done.send(());
            }
            if closed {
                return;
            }
            // After the lines from before: they belong to the old file.
            if self.reopen.swap(false, Ordering::AcqRel) {
                match open(&self.path) {
                    Ok(new) => file = new,
                    Err(error) => {
                        WRITTEN.reopen_failed.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(path = self.path, %error, "access log cannot be opened anew");
                    }
                }
            }
            if wrote {
                std::thread::park_timeout(FLUSH);
                continue;
            }
            self.asleep.store(true, Ordering::SeqCst);
            // A line that came before somebody could see that we sleep.
            if self.buffers.iter().all(|buffer| lock(&buffer.0).is_empty()) {
                std::thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }

    /// Whether there was anything.
    fn write_buffers(&self, file: &mut File, spare: &mut Vec<u8>) -> bool {
        let mut wrote = false;
        for buffer in &self.buffers {
            {
                let mut lines = lock(&buffer.0);
                if lines.is_empty() {
                    continue;
                }
                std::mem::swap(&mut *lines, spare);
            }
            wrote = true;
            let lines = spare.iter().filter(|byte| **byte == b'\n').count();
            WRITTEN.buffered.fetch_add(lines as u64, Ordering::Relaxed);
            let result = file.write_all(spare);
            match result {
                Ok(()) => &WRITTEN.completed,
                Err(_) => &WRITTEN.failed,
            }
            .fetch_add(1, Ordering::Relaxed);
            if let Err(error) = result {
                tracing::warn!(path = self.path, %error, "access log cannot be written");
            }
            spare.clear();
            // After a burst, memory goes back.
            spare.shrink_to(2 * BATCH);
        }
        wrote
    }
}
