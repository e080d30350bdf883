//! Where log lines go: one writer thread per file, fed by a bounded queue. A full queue drops lines (they
//! are counted), because a slow disk must not hold up requests.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

/// Lines that may wait; at 512 bytes each, 8 MiB per file.
const QUEUE: usize = 16 * 1024;
/// Bytes written at once.
const BATCH: usize = 64 * 1024;

/// An open log file. All access logs of one path share it, so that their lines never mix.
#[derive(Debug)]
pub(super) struct Sink {
    lines: SyncSender<Item>,
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    /// Tell when everything before is written.
    Flush(SyncSender<()>),
}

/// All open sinks by path. Process-wide, because the files are.
static OPEN: Mutex<Option<HashMap<String, Weak<Sink>>>> = Mutex::new(None);

impl Sink {
    /// Opens a file for appending, or joins those who have it open.
    pub(super) fn open(path: &str) -> io::Result<Arc<Sink>> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let open = open.get_or_insert_default();
        if let Some(sink) = open.get(path).and_then(Weak::upgrade) {
            return Ok(sink);
        }
        open.retain(|_, sink| sink.strong_count() > 0);
        let file = match path {
            // The descriptor itself: opening /dev/stdout anew fails on sockets and truncates nothing.
            "/dev/stdout" | "/dev/fd/1" => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            "/dev/stderr" | "/dev/fd/2" => File::from(io::stderr().as_fd().try_clone_to_owned()?),
            path => OpenOptions::new().create(true).append(true).open(path)?,
        };
        let (lines, queue) = sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_lines(file, &queue))?;
        let sink = Arc::new(Sink {
            lines,
            dropped: AtomicU64::new(0),
        });
        open.insert(path.to_owned(), Arc::downgrade(&sink));
        Ok(sink)
    }

    /// Hands a line to the writer; never waits.
    pub(super) fn write(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_)) = self.lines.try_send(Item::Line(line))
            && self
                .dropped
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(10_000)
        {
            tracing::warn!(
                "access log lines are being dropped: the file cannot be written fast enough"
            );
        }
    }
}

/// Waits until all lines handed over so far are written, or `limit` has passed. Call before exit.
pub fn flush(limit: Duration) {
    let sinks: Vec<Arc<Sink>> = {
        let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter()
            .flatten()
            .filter_map(|(_, sink)| sink.upgrade())
            .collect()
    };
    let deadline = Instant::now() + limit;
    for sink in sinks {
        let (done, written) = sync_channel(1);
        // A full queue means the writer is at work; it is not worth losing the order for.
        if sink.lines.try_send(Item::Flush(done)).is_ok() {
            let left = deadline.saturating_duration_since(Instant::now());
            if written.recv_timeout(left).is_err() {
                tracing::warn!("access log lines were not written in time");
            }
        }
    }
}

fn write_lines(mut file: File, queue: &Receiver<Item>) {
    const IDLE: Duration = Duration::from_secs(3600);
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        let first = match queue.recv_timeout(IDLE) {
            Ok(item) => item,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Line(line) => batch.extend_from_slice(&line),
                Item::Flush(done) => waiting.push(done),
            }
            next = if batch.len() < BATCH {
                queue.try_recv().ok()
            } else {
                None
            };
        }
        if let Err(error) = file.write_all(&batch) {
            tracing::warn!(%error, "access log cannot be written");
        }
        batch.clear();
        for done in waiting {
            // Who asked may have given up waiting.
            let _gone = done.send(());
        }
    }
}
