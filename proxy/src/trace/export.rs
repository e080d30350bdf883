//! Sends finished spans to a collector: one bounded queue per worker, emptied in batches. When the
//! collector is slow or gone, spans are dropped and counted; requests never wait for it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use lateen_protocols::envoy::envoy::config::{
    core::v3::{GrpcService, grpc_service::TargetSpecifier},
    trace::v3::{OpenTelemetryConfig, ZipkinConfig, zipkin_config::CollectorEndpointVersion},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{self as otlp, ResourceSpans, ScopeSpans, span::SpanKind, status::StatusCode},
};
use prost::Message as _;
use serde_json::json;
use tokio::sync::Notify;

use super::span::{Kind, Span};
use crate::{
    config_error::ConfigError,
    grpc::{CallError, Upstream},
    head::{Headers, Known, Name},
    proto::{invalid, optional_duration},
    shared::Shared,
    stats::{Counter, Scope},
};

/// Spans that wait on one worker; more are dropped and counted.
const MAX_WAITING: usize = 2048;
/// So many make a batch at once.
const BATCH: usize = 512;
/// Fewer are sent after this time.
const BATCH_TIME: Duration = Duration::from_secs(1);
/// Longest wait for the collector, unless configuration says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer of a collector.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Where spans go. Shared by all workers, and by all connection managers with the same provider.
#[derive(Debug)]
pub(super) struct Exporter {
    id: u64,
    wire: Wire,
    upstream: Upstream,
    spans_sent: Counter,
    spans_dropped: Counter,
}

#[derive(Debug)]
enum Wire {
    Otlp {
        resource: Resource,
        metadata: Vec<(Name, Bytes)>,
    },
    Zipkin {
        path: Bytes,
        service: String,
    },
}

/// Exporters by provider configuration, so that a new listener goes on with the queues of the old one.
static EXPORTERS: Mutex<Vec<(Vec<u8>, Weak<Exporter>)>> = Mutex::new(Vec::new());
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Spans that wait on one worker.
#[derive(Debug, Default)]
struct Queue {
    waiting: RefCell<Vec<Span>>,
    /// There is enough for a batch.
    full: Notify,
    /// A task empties the queue.
    attended: Cell<bool>,
    /// Nothing more is waited for.
    closing: Cell<bool>,
    /// The task that emptied the queue has ended.
    emptied: Notify,
}

type Queues = HashMap<u64, (Weak<Exporter>, Rc<Queue>)>;

thread_local! {
    /// This worker's queues, by exporter.
    static QUEUES: RefCell<Queues> = RefCell::default();
}

/// Sends what waits on this worker, for at most `limit`. For a worker that is about to end.
pub(super) async fn flush(limit: Duration) {
    let queues: Vec<Rc<Queue>> =
        QUEUES.with_borrow(|queues| queues.values().map(|(_, queue)| queue.clone()).collect());
    let all = async {
        for queue in queues {
            queue.closing.set(true);
            queue.full.notify_one();
            while queue.attended.get() {
                queue.emptied.notified().await;
            }
            queue.closing.set(false);
        }
    };
    if tokio::time::timeout(limit, all).await.is_err() {
        tracing::warn!("a trace collector is too slow; the last spans are lost");
    }
}

impl Exporter {
    /// An exporter of OTLP over gRPC.
    ///
    /// # Errors
    /// When the collector is not given as a cluster of ours, or sampling is left to a plugin.
    pub(super) fn opentelemetry(
        config: &OpenTelemetryConfig,
        shared: &Shared,
    ) -> Result<Arc<Exporter>, ConfigError> {
        let unsupported = [
            ("http_service", config.http_service.is_some()),
            ("exporter", config.exporter.is_some()),
            ("sampler", config.sampler.is_some()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
            return Err(invalid(*field, "not supported; use grpc_service"));
        }
        for detector in &config.resource_detectors {
            tracing::warn!(detector = %detector.name, "resource detector left out");
        }
        let service = config
            .grpc_service
            .as_ref()
            .ok_or_else(|| invalid("grpc_service", "absent"))?;
        let (upstream, metadata) =
            collector(service).map_err(|error| error.within("grpc_service"))?;
        let resource = Resource {
            attributes: vec![
                attribute("service.name", service_name(&config.service_name)),
                attribute("telemetry.sdk.language", "rust"),
                attribute("telemetry.sdk.name", "lateen"),
                attribute("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
            ],
            ..Resource::default()
        };
        let wire = Wire::Otlp { resource, metadata };
        let scope = shared.stats.scope("tracing.opentelemetry.");
        Ok(Exporter::get(config.encode_to_vec(), shared, || {
            Exporter::new(wire, upstream, &scope)
        }))
    }

    /// An exporter of Zipkin's JSON, version 2.
    ///
    /// # Errors
    /// When the collector is not given as a cluster of ours, or another encoding is asked for.
    pub(super) fn zipkin(
        config: &ZipkinConfig,
        shared: &Shared,
    ) -> Result<Arc<Exporter>, ConfigError> {
        if config.collector_service.is_some() {
            return Err(invalid(
                "collector_service",
                "not supported; use collector_cluster",
            ));
        }
        if config.collector_endpoint_version() == CollectorEndpointVersion::HttpProto {
            return Err(invalid(
                "collector_endpoint_version",
                "HTTP_PROTO is not supported",
            ));
        }
        if !config.collector_endpoint.starts_with('/') {
            return Err(invalid("collector_endpoint", "not a path"));
        }
        let upstream = Upstream::new(&config.collector_cluster, TIMEOUT)?
            .with_authority(&config.collector_hostname);
        let service = match shared.node.cluster.as_str() {
            "" => service_name(""),
            cluster => cluster,
        };
        let wire = Wire::Zipkin {
            path: config.collector_endpoint.clone().into(),
            service: service.to_owned(),
        };
        let scope = shared.stats.scope("tracing.zipkin.");
        Ok(Exporter::get(config.encode_to_vec(), shared, || {
            Exporter::new(wire, upstream, &scope)
        }))
    }

    fn new(wire: Wire, upstream: Upstream, scope: &Scope) -> Exporter {
        Exporter {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            wire,
            upstream,
            spans_sent: scope.counter("spans_sent"),
            spans_dropped: scope.counter("spans_dropped"),
        }
    }

    fn get(mut key: Vec<u8>, shared: &Shared, make: impl FnOnce() -> Exporter) -> Arc<Exporter> {
        // Which Shared it counts in is part of the key: tests run several in one process.
        key.extend_from_slice(&(std::ptr::from_ref(&*shared.stats) as usize).to_ne_bytes());
        let mut exporters = EXPORTERS.lock().unwrap_or_else(PoisonError::into_inner);
        exporters.retain(|(_, exporter)| exporter.strong_count() > 0);
        let known = exporters
            .iter()
            .find_map(|(known, exporter)| (*known == key).then(|| exporter.upgrade())?);
        known.unwrap_or_else(|| {
            let exporter = Arc::new(make());
            exporters.push((key, Arc::downgrade(&exporter)));
            exporter
        })
    }

    /// Puts a span into this worker's queue.
    pub(super) fn push(self: &Arc<Exporter>, shared: &Arc<Shared>, span: Span) {
        let queue = self.queue();
        let waiting = {
            let mut waiting = queue.waiting.borrow_mut();
            if waiting.len() >= MAX_WAITING {
                self.spans_dropped.inc();
                return;
            }
            waiting.push(span);
            waiting.len()
        };
        if waiting == BATCH {
            queue.full.notify_one();
        }
        if !queue.attended.replace(true) {
            let attendance = Attendance(queue.clone());
            tokio::task::spawn_local(self.clone().attend(shared.clone(), attendance));
        }
    }

    fn queue(self: &Arc<Exporter>) -> Rc<Queue> {
        QUEUES.with_borrow_mut(|queues| {
            if let Some((_, queue)) = queues.get(&self.id) {
                return queue.clone();
            }
            queues.retain(|_, (exporter, _)| exporter.strong_count() > 0);
            let queue = Rc::<Queue>::default();
            queues.insert(self.id, (Arc::downgrade(self), queue.clone()));
            queue
        })
    }

    /// Sends what the queue has, batch by batch, until it is empty.
    async fn attend(self: Arc<Exporter>, shared: Arc<Shared>, attendance: Attendance) {
        let queue = &attendance.0;
        loop {
            if queue.waiting.borrow().len() < BATCH && !queue.closing.get() {
                // Either end of the wait means: send.
                let _time_or_size = tokio::time::timeout(BATCH_TIME, queue.full.notified()).await;
            }
            let batch: Vec<Span> = {
                let mut waiting = queue.waiting.borrow_mut();
                let size = waiting.len().min(BATCH);
                waiting.drain(..size).collect()
            };
            if batch.is_empty() {
                return;
            }
            let spans = batch.len() as u64;
            match self.send(&shared, batch).await {
                Ok(refused) => {
                    let refused = refused.min(spans);
                    self.spans_sent.add(spans - refused);
                    self.spans_dropped.add(refused);
                }
                Err(error) => {
                    self.spans_dropped.add(spans);
                    let cluster = self.upstream.cluster();
                    tracing::debug!(%error, %cluster, spans, "spans are lost");
                }
            }
        }
    }

    /// Sends a batch; how many of it the collector refused.
    async fn send(&self, shared: &Arc<Shared>, batch: Vec<Span>) -> Result<u64, CallError> {
        match &self.wire {
            Wire::Otlp { resource, metadata } => {
                let request = otlp_request(resource, batch).encode_to_vec();
                let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
                let answer = self
                    .upstream
                    .unary::<ExportTraceServiceResponse>(
                        shared,
                        path,
                        metadata,
                        &request,
                        MAX_ANSWER_BYTES,
                    )
                    .await?;
                let refused = answer
                    .message
                    .partial_success
                    .map_or(0, |partial| partial.rejected_spans);
                Ok(u64::try_from(refused).unwrap_or(0))
            }
            Wire::Zipkin { path, service } => {
                let spans: Vec<_> = batch
                    .iter()
                    .map(|span| zipkin_span(span, service))
                    .collect();
                let body = serde_json::Value::Array(spans).to_string();
                let mut headers = Headers::with_capacity(2);
                headers.append(Known::ContentType, "application/json");
                headers.append(Known::ContentLength, body.len().to_string());
                let (_, body) = self
                    .upstream
                    .post(shared, path.clone(), headers, body.into())
                    .await?;
                body.collect(MAX_ANSWER_BYTES)
                    .await
                    .map_err(CallError::Body)?;
                Ok(0)
            }
        }
    }
}

/// That a task empties a queue; ends with the task, however that ends.
#[derive(Debug)]
struct Attendance(Rc<Queue>);

impl Drop for Attendance {
    fn drop(&mut self) {
        self.0.attended.set(false);
        // One permit is kept when nobody waits; a later `flush` just looks once more.
        self.0.emptied.notify_one();
    }
}

/// Upstream and metadata of a collector.
fn collector(service: &GrpcService) -> Result<(Upstream, Vec<(Name, Bytes)>), ConfigError> {
    let Some(TargetSpecifier::EnvoyGrpc(grpc)) = service.target_specifier.as_ref() else {
        return Err(invalid("envoy_grpc", "absent; nothing else is supported"));
    };
    let timeout = optional_duration("timeout", service.timeout.as_ref())?
        .filter(|timeout| !timeout.is_zero())
        .unwrap_or(TIMEOUT);
    let metadata = service
        .initial_metadata
        .iter()
        .map(|header| {
            let value = if header.raw_value.is_empty() {
                header.value.clone().into()
            } else {
                Bytes::from(header.raw_value.to_vec())
            };
            (Name::new(&header.key), value)
        })
        .collect();
    let upstream = Upstream::new(&grpc.cluster_name, timeout)
        .map_err(|error| error.within("envoy_grpc"))?
        .with_authority(&grpc.authority);
    Ok((upstream, metadata))
}

/// OpenTelemetry wants a name in any case.
fn service_name(given: &str) -> &str {
    match given {
        "" => "unknown_service:lateen",
        name => name,
    }
}

fn attribute(key: impl Into<String>, value: impl Into<String>) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: Some(AnyValue {
            value: Some(Value::StringValue(value.into())),
        }),
        ..KeyValue::default()
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn otlp_request(resource: &Resource, batch: Vec<Span>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: "lateen".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope),
                spans: batch.into_iter().map(otlp_span).collect(),
                schema_url: String::new(),
            }],
            schema_url: String::new(),
        }],
    }
}

pub(super) fn otlp_span(span: Span) -> otlp::Span {
    // Bits 8 and 9 of `flags`: whether it is known that the parent is remote, and whether it is.
    const SAMPLED: u32 = 0x1;
    const HAS_IS_REMOTE: u32 = 0x100;
    const IS_REMOTE: u32 = 0x200;
    let remote = span.parent.is_some() && span.parent_is_remote;
    otlp::Span {
        trace_id: span.trace.to_bytes().to_vec(),
        span_id: span.id.to_bytes().to_vec(),
        parent_span_id: span
            .parent
            .map(|parent| parent.to_bytes().to_vec())
            .unwrap_or_default(),
        trace_state: span.trace_state,
        flags: SAMPLED | HAS_IS_REMOTE | if remote { IS_REMOTE } else { 0 },
        name: span.name,
        kind: match span.kind {
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
        }
        .into(),
        start_time_unix_nano: nanoseconds(span.start),
        end_time_unix_nano: nanoseconds(span.start + span.duration),
        attributes: span
            .tags
            .into_iter()
            .map(|(key, value)| attribute(key, value))
            .collect(),
        status: span.failed.then(|| otlp::Status {
            code: StatusCode::Error.into(),
            message: String::new(),
        }),
        ..otlp::Span::default()
    }
}

/// <https://zipkin.io/zipkin-api/zipkin2-api.yaml>. Spans are never shared between client and server.
pub(super) fn zipkin_span(span: &Span, service: &str) -> serde_json::Value {
    let tags: serde_json::Map<_, _> = span
        .tags
        .iter()
        .map(|(key, value)| (key.to_string(), value.as_str().into()))
        .collect();
    let mut out = json!({
        "traceId": span.trace.to_string(),
        "id": span.id.to_string(),
        "name": span.name,
        "kind": match span.kind { Kind::Server => "SERVER", Kind::Client => "CLIENT" },
        "timestamp": nanoseconds(span.start) / 1000,
        // Zipkin takes 0 for "not known".
        "duration": u64::try_from(span.duration.as_micros()).unwrap_or(u64::MAX).max(1),
        "localEndpoint": { "serviceName": service },
        "tags": tags,
    });
    if let (Some(parent), Some(out)) = (span.parent, out.as_object_mut()) {
        out.insert("parentId".to_owned(), parent.to_string().into());
    }
    out
}
