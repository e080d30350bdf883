//! Writes log entries and metrics as lines, to the standard streams or to a file.
//!
//! Requests never wait for the writer: lines go through a bounded queue to a thread of their own, and are
//! dropped (and counted in the error the handler returns) when it is full.

use std::{
    collections::HashMap,
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use chrono::Utc;
use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Code, Counter, Env, Handler, HandlerError, Info,
    ReportHandler, Value, instance::ReportInstance, params, template,
};
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::json::{json, rfc3339};

/// Lines that may wait for the writer.
const MAX_LINES: usize = 16_384;

/// Where lines go.
pub trait Lines: Send + Sync {
    /// Takes a line without its end. `false`: there was no room.
    fn write(&self, line: String) -> bool;
}

/// The adapter.
#[derive(Clone)]
pub struct Stdio {
    stdout: Arc<dyn Lines>,
    stderr: Arc<dyn Lines>,
}

impl Default for Stdio {
    fn default() -> Self {
        Self {
            stdout: Arc::new(Writer::start("mixer-stdout", io::stdout())),
            stderr: Arc::new(Writer::start("mixer-stderr", io::stderr())),
        }
    }
}

impl Stdio {
    /// Standard output is `lines`.
    #[must_use]
    pub fn with_stdout(mut self, lines: Arc<dyn Lines>) -> Self {
        self.stdout = lines;
        self
    }
}

impl fmt::Debug for Stdio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stdio").finish_non_exhaustive()
    }
}

/// A thread that writes lines. It ends when nobody can send any more.
struct Writer(Option<SyncSender<String>>);

impl Writer {
    fn start(name: &str, mut to: impl Write + Send + 'static) -> Self {
        let (sender, receiver) = sync_channel::<String>(MAX_LINES);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Ok(mut line) = receiver.recv() {
                line.push('\n');
                // Nowhere to complain about a log that cannot be written but another log.
                if let Err(error) = to.write_all(line.as_bytes()).and_then(|()| to.flush()) {
                    tracing::warn!(%error, "a log line is lost");
                }
            }
        });
        Self(thread.is_ok().then_some(sender))
    }
}

impl Lines for Writer {
    fn write(&self, line: String) -> bool {
        match self.0.as_ref().map(|sender| sender.try_send(line)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) | None => false,
        }
    }
}

/// A file that is set aside when it is full: `access.log`, `access.log.1`, `access.log.2`.
pub(super) struct RotatedFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// Where its last whole line ends.
    whole: u64,
    max_bytes: u64,
    max_files: u32,
    /// Files that were set aside longer ago are deleted; zero: never.
    max_age: Duration,
}

impl RotatedFile {
    pub(super) fn open(path: PathBuf, max_bytes: u64, max_files: u32) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            bytes,
            whole: bytes,
            max_bytes,
            max_files,
            max_age: Duration::ZERO,
        })
    }

    /// And what is set aside is deleted when it is so old.
    fn with_max_age(mut self, max_age: Duration) -> Self {
        self.max_age = max_age;
        self
    }

    /// From now on.
    pub(super) fn set_limits(&mut self, max_bytes: u64, max_files: u32) {
        self.max_bytes = max_bytes;
        self.max_files = max_files;
    }

    /// Takes half a line away after a failure, so that the next one begins a line.
    pub(super) fn cut_to_line(&mut self) -> io::Result<()> {
        self.file.set_len(self.whole)?;
        self.bytes = self.whole;
        Ok(())
    }

    /// Waits until what is written is on the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn aside(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{n}"));
        name.into()
    }

    /// What cannot be told or deleted stays: that is no reason to lose lines.
    fn delete_old(&self) {
        let is_old = |path: &PathBuf| {
            let modified = std::fs::metadata(path).and_then(|m| m.modified());
            modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > self.max_age))
        };
        // The higher the number, the older: after the first that is not there, there are none.
        let all = (1..=self.max_files).map(|n| self.aside(n));
        for path in all.take_while(|path| path.exists()).filter(is_old) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "an old log cannot be deleted");
            }
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        for n in (1..self.max_files).rev() {
            match std::fs::rename(self.aside(n), self.aside(n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                Ok(()) | Err(_) => {}
            }
        }
        std::fs::rename(&self.path, self.aside(1))?;
        if !self.max_age.is_zero() {
            self.delete_old();
        }
        self.file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)?;
        self.bytes = 0;
        self.whole = 0;
        Ok(())
    }
}

impl Write for RotatedFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + buf.len() as u64 > self.max_bytes {
            self.rotate()?;
        }
        let written = self.file.write(buf)?;
        self.bytes += written as u64;
        if buf.get(..written).is_some_and(|b| b.ends_with(b"\n")) {
            self.whole = self.bytes;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    #[serde(alias = "log_stream")]
    log_stream: Stream,
    #[serde(alias = "severity_levels")]
    severity_levels: HashMap<String, Json>,
    #[serde(alias = "metric_level")]
    metric_level: Json,
    #[serde(alias = "output_level")]
    output_level: Json,
    #[serde(alias = "output_as_json")]
    output_as_json: bool,
    #[serde(alias = "output_path")]
    output_path: PathBuf,
    #[serde(
        alias = "max_days_before_rotation",
        deserialize_with = "params::integer"
    )]
    max_days_before_rotation: u32,
    #[serde(
        alias = "max_megabytes_before_rotation",
        deserialize_with = "params::integer"
    )]
    max_megabytes_before_rotation: u32,
    #[serde(alias = "max_rotated_files", deserialize_with = "params::integer")]
    max_rotated_files: u32,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            log_stream: Stream::Stdout,
            severity_levels: HashMap::new(),
            metric_level: Json::Null,
            output_level: Json::Null,
            output_as_json: true,
            output_path: PathBuf::new(),
            max_days_before_rotation: 30,
            max_megabytes_before_rotation: 100,
            max_rotated_files: 1000,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Stream {
    Stdout,
    Stderr,
    File,
    RotatedFile,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Info,
    Warning,
    Error,
}

impl Level {
    fn parse(json: &Json) -> Option<Self> {
        match json {
            Json::Null => Some(Self::Info),
            Json::Number(n) => match n.as_i64() {
                Some(0) => Some(Self::Info),
                Some(1) => Some(Self::Warning),
                Some(2) => Some(Self::Error),
                _ => None,
            },
            Json::String(name) => match name.as_str() {
                "INFO" | "0" => Some(Self::Info),
                "WARNING" | "1" => Some(Self::Warning),
                "ERROR" | "2" => Some(Self::Error),
                _ => None,
            },
            _ => None,
        }
    }

    /// The level of a severity that the parameters say nothing about.
    fn usual(severity: &str) -> Self {
        match severity.to_ascii_lowercase().as_str() {
            "warning" | "warn" => Self::Warning,
            "err" | "error" | "critical" | "fatal" | "alert" | "emergency" => Self::Error,
            _ => Self::Info,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warn",
            Self::Error => "error",
        }
    }
}

struct Config {
    levels: HashMap<String, Level>,
    metric_level: Level,
    output_level: Level,
    as_json: bool,
    stream: Stream,
    path: PathBuf,
    max_bytes: u64,
    max_files: u32,
    max_age: Duration,
}

fn config(raw: &Json) -> Result<Config, String> {
    let params = params::parse::<Params>(raw)?;
    let level = |what: &str, json: &Json| {
        Level::parse(json).ok_or_else(|| format!("{what}: {json} is none of INFO, WARNING, ERROR"))
    };
    let levels = params
        .severity_levels
        .iter()
        .map(|(name, json)| Ok((name.clone(), level("severityLevels", json)?)))
        .collect::<Result<_, String>>()?;
    let to_file = matches!(params.log_stream, Stream::File | Stream::RotatedFile);
    if to_file && params.output_path.as_os_str().is_empty() {
        return Err("outputPath: a file needs a path".into());
    }
    if params.log_stream == Stream::RotatedFile && params.max_rotated_files == 0 {
        return Err("maxRotatedFiles must be at least 1".into());
    }
    Ok(Config {
        levels,
        metric_level: level("metricLevel", &params.metric_level)?,
        output_level: level("outputLevel", &params.output_level)?,
        as_json: params.output_as_json,
        stream: params.log_stream,
        path: params.output_path,
        max_bytes: match params.log_stream {
            Stream::RotatedFile => u64::from(params.max_megabytes_before_rotation) << 20,
            _ => u64::MAX,
        },
        max_files: params.max_rotated_files,
        max_age: Duration::from_secs(u64::from(params.max_days_before_rotation) * 86_400),
    })
}

impl Adapter for Stdio {
    fn info(&self) -> Info {
        Info {
            name: "stdio",
            description: "writes log entries and metrics as lines",
            templates: const { &[&template::LOGENTRY, &template::METRIC] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        config(candidate.params).err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let config = config(candidate.params).map_err(BuildError)?;
        let lines: Arc<dyn Lines> = match config.stream {
            Stream::Stdout => Arc::clone(&self.stdout),
            Stream::Stderr => Arc::clone(&self.stderr),
            Stream::File | Stream::RotatedFile => {
                let path = config.path.clone();
                let file = RotatedFile::open(path, config.max_bytes, config.max_files)
                    .map(|file| file.with_max_age(config.max_age))
                    .map_err(|e| BuildError(format!("{}: {e}", config.path.display())))?;
                Arc::new(Writer::start("mixer-log-file", file))
            }
        };
        Ok(Handler::new().with_report(Arc::new(Logger {
            config,
            lines,
            dropped: env.counter("records_dropped"),
        })))
    }
}

struct Logger {
    config: Config,
    lines: Arc<dyn Lines>,
    dropped: Counter,
}

impl ReportHandler for Logger {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let lost = batch
                .into_iter()
                .filter_map(|instance| self.line(instance))
                .map(|line| self.lines.write(line))
                .filter(|is_written| !is_written)
                .count();
            self.dropped.inc_by(lost as u64);
            match lost {
                0 => Ok(()),
                lost => Err(HandlerError {
                    code: Code::ResourceExhausted,
                    message: format!("the log's reader is slow: {lost} lines are lost"),
                }),
            }
        }
        .boxed()
    }
}

impl Logger {
    fn line(&self, instance: ReportInstance) -> Option<String> {
        let (level, time, name, values) = match instance {
            ReportInstance::LogEntry(entry) => {
                let level = self
                    .config
                    .levels
                    .get(&*entry.severity)
                    .copied()
                    .unwrap_or_else(|| Level::usual(&entry.severity));
                let time = match entry.timestamp {
                    Some(Value::Timestamp(time)) => Some(time),
                    _ => None,
                };
                (level, time, entry.name, entry.variables)
            }
            ReportInstance::Metric(metric) => {
                let mut values = metric.dimensions;
                values.extend(metric.value.map(|v| (Arc::from("value"), v)));
                (self.config.metric_level, None, metric.name, values)
            }
            ReportInstance::ReportNothing(_)
            | ReportInstance::TraceSpan(_)
            | ReportInstance::Custom(_) => return None,
        };
        if level < self.config.output_level {
            return None;
        }
        let time = rfc3339(&time.unwrap_or_else(Utc::now));
        let mut values: Vec<_> = values.iter().map(|(n, v)| (&**n, json(v))).collect();
        values.sort_by(|a, b| a.0.cmp(b.0));
        Some(if self.config.as_json {
            // Written by hand to keep the order: level, time, instance, then the entry's own.
            let head = [
                ("level", Json::from(level.name())),
                ("time", Json::from(time)),
                ("instance", Json::from(&*name)),
            ];
            let mut line = String::from("{");
            for (i, (name, value)) in head.into_iter().chain(values).enumerate() {
                if i > 0 {
                    line.push(',');
                }
                line.push_str(&Json::from(name).to_string());
                line.push(':');
                line.push_str(&value.to_string());
            }
            line.push('}');
            line
        } else {
            let own: Map<String, Json> =
                values.into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
            format!("{time}\t{}\t{name}\t{}", level.name(), Json::Object(own))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;

    #[test]
    fn full_files_are_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = RotatedFile::open(path.clone(), 10, 2).unwrap();
        for line in ["1234567\n", "abcdefg\n", "ABCDEFG\n", "xyz\n"] {
            file.write_all(line.as_bytes()).unwrap();
        }
        let read = |n: &str| std::fs::read_to_string(folder.path().join(n)).unwrap();
        assert_eq!(read("log"), "xyz\n");
        assert_eq!(read("log.1"), "ABCDEFG\n");
        assert_eq!(read("log.2"), "abcdefg\n");

        let day = Duration::from_secs(86_400);
        let old = std::time::SystemTime::now() - 3 * day;
        let aged = File::options()
            .write(true)
            .open(folder.path().join("log.1"))
            .unwrap();
        aged.set_modified(old).unwrap();
        let mut file = file.with_max_age(2 * day);
        file.write_all(b"1234567\n").unwrap();
        assert_eq!(read("log.1"), "xyz\n");
        assert!(!folder.path().join("log.2").exists(), "it was old");
    }

    #[test]
    fn a_slow_reader_loses_lines_but_holds_nobody_up() {
        struct Stuck(Mutex<mpsc::Receiver<()>>);
        impl Write for Stuck {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                let _closed = self.0.lock().unwrap().recv();
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = mpsc::channel();
        let writer = Writer::start("stuck", Stuck(Mutex::new(stuck)));
        let taken = (0..MAX_LINES + 10)
            .filter(|i| writer.write(i.to_string()))
            .count();
        assert!((MAX_LINES..MAX_LINES + 2).contains(&taken), "{taken}");
        drop(release);
    }
}
