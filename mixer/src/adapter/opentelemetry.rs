//! Metrics, log entries and spans to an OpenTelemetry collector, by OTLP over gRPC.
//!
//! Metrics are added up here and sent as cumulative sums every `exportInterval`; log entries and spans are sent
//! in batches as they come. The three go on independently: each has its queue, and its service at the collector.

mod metrics;
mod signal;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::Utc;
use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Counter, Env, Handler, HandlerError, Info, ReportHandler,
    Value, instance::ReportInstance, params, template, value,
};
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, KeyValueList, any_value},
    logs::v1::LogRecord,
    resource::v1::Resource,
};
use prost::Message as _;
use serde::Deserialize;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};

use self::{
    metrics::{Instruments, RawMetric},
    signal::{Collector, Logs, Span, Spans},
};
use super::{
    export::{Limits, Queue, outcome},
    json::{go_duration, rfc3339},
    span::Ids,
};

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct OpenTelemetry;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    address: String,
    headers: BTreeMap<String, String>,
    resource: BTreeMap<String, String>,
    #[serde(alias = "export_interval", deserialize_with = "params::duration")]
    export_interval: Duration,
    metrics: Vec<RawMetric>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            address: "localhost:4317".to_owned(),
            headers: BTreeMap::new(),
            resource: BTreeMap::new(),
            export_interval: Duration::from_secs(10),
            metrics: Vec::new(),
        }
    }
}

struct Config {
    address: String,
    headers: MetadataMap,
    resource: BTreeMap<String, String>,
    export_interval: Duration,
    instruments: Instruments,
}

fn config(raw: &serde_json::Value) -> Result<Config, Vec<String>> {
    let params = params::parse::<Params>(raw).map_err(|e| vec![e])?;
    let mut problems = Vec::new();
    let address = match params.address.strip_prefix("http://") {
        Some(rest) => rest.trim_end_matches('/').to_owned(),
        None => params.address,
    };
    if address.rsplit_once(':').is_none_or(|(host, port)| {
        host.is_empty() || host.contains('/') || port.parse::<u16>().is_err()
    }) {
        problems.push(format!(
            "address: {address:?} is not HOST:PORT (without TLS)"
        ));
    }
    let mut headers = MetadataMap::new();
    for (name, text) in &params.headers {
        let key = MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes());
        match (key, MetadataValue::try_from(text.as_str())) {
            (Ok(key), Ok(value)) => {
                headers.insert(key, value);
            }
            _ => problems.push(format!(
                "headers: {name} is no header, or its value is none"
            )),
        }
    }
    if params.export_interval < Duration::from_millis(10) {
        problems.push("exportInterval: it must be at least 10ms".to_owned());
    }
    let mut resource = params.resource;
    let named = resource.entry("service.name".to_owned());
    named.or_insert_with(|| "mixer".to_owned());
    let instruments = Instruments::new(params.metrics).unwrap_or_else(|wrong| {
        problems.extend(wrong);
        Instruments::default()
    });
    if problems.is_empty() {
        Ok(Config {
            address,
            headers,
            resource,
            export_interval: params.export_interval,
            instruments,
        })
    } else {
        Err(problems)
    }
}

impl Adapter for OpenTelemetry {
    fn info(&self) -> Info {
        Info {
            name: "opentelemetry",
            description: "sends metrics, log entries and spans to an OpenTelemetry collector",
            templates: const { &[&template::METRIC, &template::LOGENTRY, &template::TRACESPAN] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        match config(candidate.params) {
            Ok(config) => config.instruments.problems(candidate.instances),
            Err(problems) => problems,
        }
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let config = config(candidate.params).map_err(|p| BuildError(p.join("; ")))?;
        let collector = Collector::new(&config.address, config.headers).map_err(BuildError)?;
        let resource = config.resource.iter().map(|(n, v)| attribute(n, text(v)));
        let resource: Vec<KeyValue> = resource.collect();
        let (name, limits) = (candidate.name, Limits::default());
        let logs = Logs {
            collector: collector.clone(),
            resource: of(&resource),
            refused: env.counter("records_refused"),
        };
        let spans = Spans {
            collector: collector.clone(),
            resource: resource.clone(),
            refused: env.counter("records_refused"),
        };
        let instruments = Arc::new(config.instruments);
        let alive = if instruments.is_empty() {
            None
        } else {
            let interval = config.export_interval;
            let started =
                metrics::start(&env, name, &instruments, collector, of(&resource), interval)?;
            Some(started)
        };
        Ok(Handler::new().with_report(Arc::new(Exporter {
            instruments,
            clock: env.clock().clone(),
            logs: Queue::start(&env, name, limits, logs)?,
            spans: Queue::start(&env, name, limits, spans)?,
            traceless: env.counter("spans_without_trace"),
            overflow: env.counter("series_overflow"),
            _alive: alive,
        })))
    }
}

struct Exporter {
    instruments: Arc<Instruments>,
    clock: lateen_adapter::Clock,
    logs: Queue<LogRecord>,
    spans: Queue<Span>,
    /// Requests that are part of no trace.
    traceless: Counter,
    /// Samples beyond the budget of their metric.
    overflow: Counter,
    /// Its end tells the task that sends metrics to send them for the last time.
    _alive: Option<metrics::Alive>,
}

impl ReportHandler for Exporter {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let mut dropped = 0;
            let mut problem = None; // the last one speaks for all; the others are recorded
            let now = self.clock.now();
            for instance in batch {
                match instance {
                    ReportInstance::Metric(metric) => match self.instruments.record(&metric, now) {
                        Ok(together) => self.overflow.inc_by(together),
                        Err(error) => problem = Some(error),
                    },
                    ReportInstance::LogEntry(entry) => {
                        let record = log_record(entry);
                        let bytes = record.encoded_len();
                        dropped += usize::from(!self.logs.push(record, bytes));
                    }
                    ReportInstance::TraceSpan(span) => match Ids::read(&span) {
                        Ok(Some(ids)) => {
                            let span = Span::new(&span, &ids);
                            let bytes = span.bytes();
                            dropped += usize::from(!self.spans.push(span, bytes));
                        }
                        Ok(None) => self.traceless.inc(),
                        Err(error) => problem = Some(error),
                    },
                    ReportInstance::ReportNothing(_) | ReportInstance::Custom(_) => {}
                }
            }
            problem.map_or_else(|| outcome(dropped), Err)
        }
        .boxed()
    }
}

fn of(attributes: &[KeyValue]) -> Resource {
    Resource {
        attributes: attributes.to_vec(),
        ..Resource::default()
    }
}

fn text(text: &str) -> any_value::Value {
    any_value::Value::StringValue(text.to_owned())
}

fn attribute(name: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

/// A value with its type; spans of time and moments as text, as they are nowhere else in OTLP's values.
fn any(value: &Value) -> any_value::Value {
    match value {
        Value::Int64(n) => any_value::Value::IntValue(*n),
        Value::Double(n) => any_value::Value::DoubleValue(*n),
        Value::Bool(b) => any_value::Value::BoolValue(*b),
        Value::Duration(span) => any_value::Value::StringValue(go_duration(*span)),
        Value::Timestamp(time) => any_value::Value::StringValue(rfc3339(time)),
        Value::StringMap(map) => any_value::Value::KvlistValue(KeyValueList {
            values: map.iter().map(|(k, v)| attribute(k, text(v))).collect(),
        }),
        other => text(&value::text(other)),
    }
}

fn nanos(time: &chrono::DateTime<Utc>) -> u64 {
    let nanos = time.timestamp_nanos_opt().unwrap_or_default();
    u64::try_from(nanos).unwrap_or_default()
}

/// Logs data model, appendix B: what syslog and the like call it.
fn severity(text: &str) -> i32 {
    match text.to_ascii_lowercase().as_str() {
        "trace" => 1,
        "debug" => 5,
        "info" | "informational" | "default" => 9,
        "notice" => 10,
        "warn" | "warning" => 13,
        "err" | "error" => 17,
        "critical" | "alert" => 18,
        "emergency" | "fatal" => 21,
        _ => 0,
    }
}

fn log_record(entry: lateen_adapter::instance::LogEntry) -> LogRecord {
    let time = match &entry.timestamp {
        Some(Value::Timestamp(time)) => nanos(time),
        _ => 0,
    };
    LogRecord {
        time_unix_nano: time,
        observed_time_unix_nano: nanos(&Utc::now()),
        severity_number: severity(&entry.severity),
        severity_text: entry.severity.to_string(),
        event_name: entry.name.to_string(),
        attributes: entry
            .variables
            .iter()
            .map(|(name, v)| attribute(name, any(v)))
            .collect(),
        ..LogRecord::default()
    }
}
