//! Log entries to a file that can be shown to an auditor: a report is answered when its entries are on the
//! disk, none is dropped silently, and each line carries the hash of the one before, so that a line that was
//! changed or taken out shows.
//!
//! `stdio` is for logs that may be lost, and never makes a report wait.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use chrono::Utc;
use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Counter, Env, Handler, HandlerError, Info, ReportHandler,
    Value,
    instance::{LogEntry, ReportInstance},
    params, template,
};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::{
    json::{json as value_json, rfc3339},
    stdio::RotatedFile,
};

/// Reports that may wait for the disk; the next one waits until its deadline for a place.
const MAX_WAITING: usize = 1024;
/// Reports that are made durable at once.
const MAX_BATCH: usize = 256;
/// Longest line that the chain can be taken up from.
const MAX_LINE: u64 = 1 << 20;

/// The adapter. There is one writer for each file, whatever handlers come and go.
#[derive(Debug, Default)]
pub struct Audit(Mutex<HashMap<PathBuf, Weak<Journal>>>);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    path: PathBuf,
    #[serde(alias = "max_megabytes", deserialize_with = "params::integer")]
    max_megabytes: u32,
    #[serde(alias = "max_files", deserialize_with = "params::integer")]
    max_files: u32,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            max_megabytes: 100,
            max_files: 100,
        }
    }
}

fn config(raw: &Json) -> Result<Params, String> {
    let params = params::parse::<Params>(raw)?;
    if !params.path.is_absolute() {
        return Err(format!(
            "path: {:?} is not absolute; say which file",
            params.path.display().to_string()
        ));
    }
    if params.max_megabytes == 0 || params.max_files == 0 {
        return Err("maxMegabytes and maxFiles must not be 0".to_owned());
    }
    Ok(params)
}

impl Adapter for Audit {
    fn info(&self) -> Info {
        Info {
            name: "audit",
            description: "writes log entries to a file that shows whether it was changed",
            templates: const { &[&template::LOGENTRY] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        config(candidate.params).err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = config(candidate.params).map_err(BuildError)?;
        let limits = Limits {
            max_bytes: u64::from(params.max_megabytes) << 20,
            max_files: params.max_files,
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, journal| journal.strong_count() > 0);
        let running = all.get(&params.path).and_then(Weak::upgrade);
        let journal = match running {
            Some(journal) => {
                *journal
                    .limits
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = limits;
                journal
            }
            None => {
                let started = Journal::start(&params.path, limits)
                    .map_err(|e| BuildError(format!("{}: {e}", params.path.display())))?;
                let journal = Arc::new(started);
                all.insert(params.path, Arc::downgrade(&journal));
                journal
            }
        };
        Ok(Handler::new().with_report(Arc::new(Auditor {
            journal,
            lost: env.counter("records_lost"),
        })))
    }
}

struct Auditor {
    journal: Arc<Journal>,
    /// Entries that could not be written.
    lost: Counter,
}

impl ReportHandler for Auditor {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let entries: Vec<_> = batch
                .into_iter()
                .filter_map(|instance| match instance {
                    ReportInstance::LogEntry(entry) => Some(record(&entry)),
                    _ => None,
                })
                .collect();
            // Counted when this future is dropped, too: the deadline has passed.
            let mut unwritten = Unwritten {
                count: entries.len() as u64,
                lost: &self.lost,
            };
            let (done, outcome) = oneshot::channel();
            let sent = self.journal.sender.send(Entries { entries, done }).await;
            let outcome = match sent {
                Ok(()) => outcome
                    .await
                    .unwrap_or_else(|_| Err("the writer is gone".to_owned())),
                Err(_) => Err("the writer is gone".to_owned()),
            };
            outcome.map_err(|problem| {
                HandlerError::unavailable(format!("the audit log cannot be written: {problem}"))
            })?;
            unwritten.count = 0;
            Ok(())
        }
        .boxed()
    }
}

struct Unwritten<'a> {
    count: u64,
    lost: &'a Counter,
}

impl Drop for Unwritten<'_> {
    fn drop(&mut self) {
        self.lost.inc_by(self.count);
    }
}

/// An entry without its place in the chain.
fn record(entry: &LogEntry) -> Map<String, Json> {
    let time = match &entry.timestamp {
        Some(Value::Timestamp(time)) => *time,
        _ => Utc::now(),
    };
    let mut record = Map::new();
    record.insert("time".to_owned(), rfc3339(&time).into());
    record.insert("instance".to_owned(), entry.name.to_string().into());
    if !entry.severity.is_empty() {
        record.insert("severity".to_owned(), entry.severity.to_string().into());
    }
    let variables = entry.variables.iter();
    let variables: Map<String, Json> = variables
        .map(|(name, v)| (name.to_string(), value_json(v)))
        .collect();
    record.insert("variables".to_owned(), Json::Object(variables));
    record
}

struct Entries {
    entries: Vec<Map<String, Json>>,
    done: oneshot::Sender<Result<(), String>>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    max_bytes: u64,
    max_files: u32,
}

/// A file and the thread that writes it, which ends when nobody can send any more.
#[derive(Debug)]
struct Journal {
    sender: mpsc::Sender<Entries>,
    limits: Arc<Mutex<Limits>>,
}

impl std::fmt::Debug for Entries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entries")
            .field("entries", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl Journal {
    fn start(path: &Path, limits: Limits) -> io::Result<Self> {
        let mut chain = Chain::take_up(path)?;
        let mut file = RotatedFile::open(path.to_owned(), limits.max_bytes, limits.max_files)?;
        let limits = Arc::new(Mutex::new(limits));
        let shared = Arc::clone(&limits);
        let (sender, mut receiver) = mpsc::channel::<Entries>(MAX_WAITING);
        std::thread::Builder::new()
            .name("mixer-audit".to_owned())
            .spawn(move || {
                let mut waiting = Vec::new();
                while receiver.blocking_recv_many(&mut waiting, MAX_BATCH) > 0 {
                    let Limits {
                        max_bytes,
                        max_files,
                    } = *shared.lock().unwrap_or_else(PoisonError::into_inner);
                    file.set_limits(max_bytes, max_files);
                    let entries = waiting
                        .iter_mut()
                        .flat_map(|w| std::mem::take(&mut w.entries));
                    let written = write(&mut file, &mut chain, entries).map_err(|e| e.to_string());
                    if let Err(problem) = &written {
                        tracing::error!(problem, "the audit log cannot be written");
                    }
                    for done in waiting.drain(..).map(|w| w.done) {
                        // Who asked may have given up.
                        let _gone = done.send(written.clone());
                    }
                }
            })?;
        Ok(Self { sender, limits })
    }
}

fn write(
    file: &mut RotatedFile,
    chain: &mut Chain,
    entries: impl Iterator<Item = Map<String, Json>>,
) -> io::Result<()> {
    for mut record in entries {
        record.insert("sequence".to_owned(), (chain.sequence + 1).into());
        record.insert("previous".to_owned(), json!(hex::encode(chain.last)));
        let mut line = Json::Object(record).to_string();
        let hash = Sha256::digest(&line);
        line.push('\n');
        if let Err(error) = file.write_all(line.as_bytes()) {
            file.cut_to_line()?;
            return Err(error);
        }
        // Only now is it part of the chain.
        chain.sequence += 1;
        chain.last = hash.into();
    }
    file.sync()
}

/// The end of the chain.
struct Chain {
    sequence: u64,
    /// SHA-256 of the last line, without its end.
    last: [u8; 32],
}

impl Chain {
    /// Goes on where the file ends; a new file begins with zeros.
    fn take_up(path: &Path) -> io::Result<Self> {
        let new = Self {
            sequence: 0,
            last: [0; 32],
        };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(new),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Ok(new); // a pipe or a device has no end to go on from
        }
        file.seek(SeekFrom::Start(metadata.len().saturating_sub(MAX_LINE)))?;
        let mut tail = Vec::new();
        file.take(MAX_LINE).read_to_end(&mut tail)?;
        let broken =
            || io::Error::other("its last line is none of an audit log; move the file away");
        let whole = tail.iter().rposition(|b| *b == b'\n').ok_or_else(broken)?;
        let torn = (tail.len() - whole - 1) as u64;
        if torn > 0 {
            // The machine stopped while it was written, so nobody was told that it is there.
            tracing::warn!(path = %path.display(), torn, "the audit log ends within a line, which is cut off");
            let file = File::options().write(true).open(path)?;
            file.set_len(metadata.len() - torn)?;
            file.sync_data()?;
        }
        let lines = tail.get(..whole).unwrap_or_default();
        let last = lines.rsplit(|b| *b == b'\n').next().unwrap_or_default();
        let record: Json = serde_json::from_slice(last).map_err(|_| broken())?;
        Ok(Self {
            sequence: record
                .get("sequence")
                .and_then(Json::as_u64)
                .ok_or_else(broken)?,
            last: Sha256::digest(last).into(),
        })
    }
}
