//! Log entries to Fluentd or Fluent Bit, by the forward protocol over TCP.
//!
//! Batches go out in PackedForward mode, times as EventTime, and with `requireAck` each waits for the
//! receiver's acknowledgement; without it, what is written when a connection breaks may be lost.
//! Forward Protocol Specification v1.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Env, Handler, HandlerError, Info, ReportHandler, Value,
    instance::{LogEntry, ReportInstance},
    params, template,
};
use rmp::encode as msgpack;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{
    export::{Limits, Queue, SendError, Sink, outcome},
    json::{go_duration, rfc3339},
};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest acknowledgement.
const MAX_ACK: usize = 1024;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Fluentd;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    address: String,
    #[serde(alias = "integer_duration", deserialize_with = "params::boolean")]
    integer_duration: bool,
    #[serde(alias = "instance_buffer_size", deserialize_with = "params::integer")]
    instance_buffer_size: u32,
    #[serde(alias = "max_batch_size_bytes", deserialize_with = "params::integer")]
    max_batch_size_bytes: u32,
    #[serde(
        alias = "push_interval_duration",
        deserialize_with = "params::duration"
    )]
    push_interval_duration: Duration,
    #[serde(alias = "push_timeout_duration", deserialize_with = "params::duration")]
    push_timeout_duration: Duration,
    #[serde(alias = "require_ack", deserialize_with = "params::boolean")]
    require_ack: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            address: "localhost:24224".to_owned(),
            integer_duration: false,
            instance_buffer_size: 16_384,
            max_batch_size_bytes: 8 << 20,
            push_interval_duration: Duration::from_secs(1),
            push_timeout_duration: Duration::from_secs(60),
            require_ack: false,
        }
    }
}

fn config(raw: &serde_json::Value) -> Result<Params, String> {
    let params = params::parse::<Params>(raw)?;
    let address = params.address.rsplit_once(':');
    if address.is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
        return Err(format!("address: {:?} is not HOST:PORT", params.address));
    }
    if !(1..=1 << 20).contains(&params.instance_buffer_size) {
        return Err(format!(
            "instanceBufferSize: {} is not between 1 and 1048576",
            params.instance_buffer_size
        ));
    }
    if params.max_batch_size_bytes == 0 || params.push_timeout_duration.is_zero() {
        return Err("maxBatchSizeBytes and pushTimeoutDuration must not be 0".to_owned());
    }
    Ok(params)
}

impl Adapter for Fluentd {
    fn info(&self) -> Info {
        Info {
            name: "fluentd",
            description: "sends log entries to Fluentd",
            templates: const { &[&template::LOGENTRY] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        config(candidate.params).err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = config(candidate.params).map_err(BuildError)?;
        let limits = Limits {
            records: params.instance_buffer_size as usize,
            batch_records: usize::MAX,
            batch_bytes: params.max_batch_size_bytes as usize,
            interval: params.push_interval_duration,
            ..Limits::default()
        };
        let forward = Forward {
            address: params.address,
            timeout: params.push_timeout_duration,
            require_ack: params.require_ack,
            connection: None,
            chunk: 0,
        };
        Ok(Handler::new().with_report(Arc::new(Logger {
            integer_duration: params.integer_duration,
            queue: Queue::start(&env, candidate.name, limits, forward)?,
        })))
    }
}

/// One event: its tag and `[time, record]` as the wire has it.
struct Event {
    tag: Arc<str>,
    entry: Vec<u8>,
}

struct Logger {
    integer_duration: bool,
    queue: Queue<Event>,
}

impl ReportHandler for Logger {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let mut dropped = 0;
            for instance in batch {
                let ReportInstance::LogEntry(entry) = instance else {
                    continue;
                };
                let event = self.event(entry);
                let bytes = event.entry.len() + event.tag.len();
                dropped += usize::from(!self.queue.push(event, bytes));
            }
            outcome(dropped)
        }
        .boxed()
    }
}

impl Logger {
    /// The tag is the instance's name, or what variable `tag` says.
    fn event(&self, entry: LogEntry) -> Event {
        let time = match entry.timestamp {
            Some(Value::Timestamp(time)) => time,
            _ => Utc::now(),
        };
        let is_tag = |(name, value): &&(Arc<str>, Value)| {
            **name == *"tag" && value.as_str().is_some_and(|t| !t.is_empty())
        };
        let tag = match entry.variables.iter().find(is_tag) {
            Some((_, tag)) => Arc::from(tag.as_str().unwrap_or_default()),
            None => entry.name,
        };
        let mut out = Vec::with_capacity(256);
        let written = (|| {
            msgpack::write_array_len(&mut out, 2)?;
            event_time(&mut out, &time)?;
            let variables = entry.variables.iter().filter(|pair| !is_tag(pair));
            let severity = !entry.severity.is_empty();
            let count = variables.clone().count() + usize::from(severity);
            msgpack::write_map_len(&mut out, u32::try_from(count).unwrap_or(u32::MAX))?;
            if severity {
                msgpack::write_str(&mut out, "severity")?;
                msgpack::write_str(&mut out, &entry.severity)?;
            }
            for (name, value) in variables {
                msgpack::write_str(&mut out, name)?;
                self.value(&mut out, value)?;
            }
            Ok::<_, msgpack::ValueWriteError<std::io::Error>>(())
        })();
        debug_assert!(written.is_ok(), "a Vec takes everything");
        Event { tag, entry: out }
    }

    fn value(
        &self,
        out: &mut Vec<u8>,
        value: &Value,
    ) -> Result<(), msgpack::ValueWriteError<std::io::Error>> {
        match value {
            Value::Int64(n) => msgpack::write_sint(out, *n).map(drop),
            Value::Double(n) => msgpack::write_f64(out, *n),
            Value::Bool(b) => {
                msgpack::write_bool(out, *b).map_err(msgpack::ValueWriteError::InvalidMarkerWrite)
            }
            Value::Duration(span) if self.integer_duration => {
                msgpack::write_sint(out, span.num_milliseconds()).map(drop)
            }
            Value::Duration(span) => msgpack::write_str(out, &go_duration(*span)),
            Value::Timestamp(time) => msgpack::write_str(out, &rfc3339(time)),
            Value::StringMap(map) => {
                let count = u32::try_from(map.len()).unwrap_or(u32::MAX);
                msgpack::write_map_len(out, count)?;
                for (key, value) in map.iter() {
                    msgpack::write_str(out, key)?;
                    msgpack::write_str(out, value)?;
                }
                Ok(())
            }
            other => msgpack::write_str(out, &other.to_string()),
        }
    }
}

/// Extension type 0: seconds and nanoseconds, 32 bits each.
fn event_time(
    out: &mut Vec<u8>,
    time: &DateTime<Utc>,
) -> Result<(), msgpack::ValueWriteError<std::io::Error>> {
    msgpack::write_ext_meta(out, 8, 0)?;
    let seconds = u32::try_from(time.timestamp().max(0)).unwrap_or(u32::MAX);
    out.extend(seconds.to_be_bytes());
    // A leap second is told as more than 10^9 nanoseconds.
    out.extend(time.timestamp_subsec_nanos().min(999_999_999).to_be_bytes());
    Ok(())
}

/// A connection that batches go out on.
struct Forward {
    address: String,
    timeout: Duration,
    require_ack: bool,
    connection: Option<TcpStream>,
    chunk: u64,
}

impl Sink for Forward {
    type Record = Event;

    async fn send(&mut self, batch: &[Event]) -> Result<(), SendError> {
        let mut by_tag: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
        for event in batch {
            by_tag.entry(&event.tag).or_default().push(event);
        }
        // Not kept across a failure or when this is dropped: the peer would see half a message.
        let connection = self.connection.take().filter(is_open);
        let deadline = self.timeout;
        let sent = timeout(deadline, self.write(connection, by_tag)).await;
        let connection = sent
            .unwrap_or_else(|_| Err("it does not take them in time".to_owned()))
            .map_err(|problem| {
                SendError::Again(format!("fluentd at {}: {problem}", self.address))
            })?;
        self.connection = Some(connection);
        Ok(())
    }
}

impl Forward {
    async fn write(
        &mut self,
        connection: Option<TcpStream>,
        by_tag: BTreeMap<&str, Vec<&Event>>,
    ) -> Result<TcpStream, String> {
        let mut connection = match connection {
            Some(connection) => connection,
            None => timeout(CONNECT, TcpStream::connect(&self.address))
                .await
                .map_err(|_| "it does not answer".to_owned())?
                .map_err(|e| e.to_string())?,
        };
        for (tag, events) in by_tag {
            self.chunk += 1;
            let chunk = self.require_ack.then(|| format!("{:016x}", self.chunk));
            let message = message(tag, &events, chunk.as_deref()).map_err(|e| e.to_string())?;
            connection
                .write_all(&message)
                .await
                .map_err(|e| e.to_string())?;
            if let Some(chunk) = chunk {
                acknowledged(&mut connection, &chunk).await?;
            }
        }
        Ok(connection)
    }
}

/// Whether the peer has not closed yet, as far as we have been told. It sends nothing unasked.
fn is_open(connection: &TcpStream) -> bool {
    let read = connection.try_read(&mut [0; 64]);
    matches!(read, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
}

/// PackedForward: `[tag, entries, {size, chunk}]`.
fn message(
    tag: &str,
    events: &[&Event],
    chunk: Option<&str>,
) -> Result<Vec<u8>, msgpack::ValueWriteError<std::io::Error>> {
    let bytes: usize = events.iter().map(|e| e.entry.len()).sum();
    let mut out = Vec::with_capacity(bytes + tag.len() + 64);
    msgpack::write_array_len(&mut out, 3)?;
    msgpack::write_str(&mut out, tag)?;
    msgpack::write_bin_len(&mut out, u32::try_from(bytes).unwrap_or(u32::MAX))?;
    for event in events {
        out.extend_from_slice(&event.entry);
    }
    msgpack::write_map_len(&mut out, if chunk.is_some() { 2 } else { 1 })?;
    msgpack::write_str(&mut out, "size")?;
    msgpack::write_uint(&mut out, events.len() as u64)?;
    if let Some(chunk) = chunk {
        msgpack::write_str(&mut out, "chunk")?;
        msgpack::write_str(&mut out, chunk)?;
    }
    Ok(out)
}

/// Waits for `{"ack": chunk}`.
async fn acknowledged(connection: &mut TcpStream, chunk: &str) -> Result<(), String> {
    let mut want = Vec::with_capacity(32);
    let written = msgpack::write_map_len(&mut want, 1)
        .and_then(|_| msgpack::write_str(&mut want, "ack"))
        .and_then(|()| msgpack::write_str(&mut want, chunk));
    written.map_err(|e| e.to_string())?;
    debug_assert!(want.len() <= MAX_ACK);
    let mut got = vec![0; want.len()];
    connection
        .read_exact(&mut got)
        .await
        .map_err(|e| format!("no acknowledgement: {e}"))?;
    if got == want {
        Ok(())
    } else {
        Err("it acknowledges something else".to_owned())
    }
}
