//! The collector, and what is sent to it in batches: log records and spans.

use std::{collections::BTreeMap, time::Duration};

use http::uri::PathAndQuery;
use lateen_adapter::{Counter, instance::TraceSpan};
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse},
        trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    },
    common::v1::{InstrumentationScope, KeyValue, any_value},
    logs::v1::{LogRecord, ResourceLogs, ScopeLogs},
    resource::v1::Resource,
    trace::v1::{self as otlp, ResourceSpans, ScopeSpans, span::SpanKind, status::StatusCode},
};
use prost::Message;
use tonic::{
    Code, Request,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{any, attribute, nanos, text};
use crate::adapter::{
    export::{SendError, Sink},
    span::{Ids, ends},
};

/// Longest wait for the collector.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);

/// Who writes all this.
pub(super) fn scope() -> Option<InstrumentationScope> {
    Some(InstrumentationScope {
        name: "lateen-mixer".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    })
}

/// A connection to the collector, made when it is needed.
#[derive(Clone, Debug)]
pub(super) struct Collector {
    channel: Channel,
    headers: MetadataMap,
}

impl Collector {
    pub(super) fn new(address: &str, headers: MetadataMap) -> Result<Self, String> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| format!("address: {e}"))?;
        let channel = endpoint
            .connect_timeout(CONNECT)
            .timeout(TIMEOUT)
            .connect_lazy();
        Ok(Self { channel, headers })
    }

    /// Calls `path`. What may be tried again is OTLP's list.
    pub(super) async fn export<Q, A>(&self, path: &'static str, request: Q) -> Result<A, SendError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        let again = |problem: String| SendError::Again(format!("the collector: {problem}"));
        let ready = tokio::time::timeout(CONNECT, grpc.ready()).await;
        ready
            .map_err(|_| again("it does not answer".to_owned()))?
            .map_err(|e| again(e.to_string()))?;
        let mut request = Request::new(request);
        *request.metadata_mut() = self.headers.clone();
        let path = PathAndQuery::from_static(path);
        match grpc
            .unary(request, path, ProstCodec::<Q, A>::default())
            .await
        {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => match status.code() {
                Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Aborted
                | Code::OutOfRange
                | Code::Unavailable
                | Code::DataLoss
                | Code::ResourceExhausted => Err(again(status.to_string())),
                _ => Err(SendError::Never(format!("the collector: {status}"))),
            },
        }
    }
}

/// Tells that the collector took a batch but not all of it.
pub(super) fn partly(refused: &Counter, count: i64, message: &str) {
    if count > 0 {
        refused.inc_by(count.unsigned_abs());
        tracing::warn!(count, message, "the collector refuses records");
    }
}

/// Sends log records.
pub(super) struct Logs {
    pub(super) collector: Collector,
    pub(super) resource: Resource,
    /// Records that the collector did not want.
    pub(super) refused: Counter,
}

impl Sink for Logs {
    type Record = LogRecord;

    async fn send(&mut self, batch: &[LogRecord]) -> Result<(), SendError> {
        let request = ExportLogsServiceRequest {
            resource_logs: vec![ResourceLogs {
                resource: Some(self.resource.clone()),
                scope_logs: vec![ScopeLogs {
                    scope: scope(),
                    log_records: batch.to_vec(),
                    ..ScopeLogs::default()
                }],
                ..ResourceLogs::default()
            }],
        };
        let path = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
        let answer: ExportLogsServiceResponse = self.collector.export(path, request).await?;
        if let Some(partial) = answer.partial_success {
            let count = partial.rejected_log_records;
            partly(&self.refused, count, &partial.error_message);
        }
        Ok(())
    }
}

/// A span and the service it is of.
#[derive(Clone, Debug)]
pub(super) struct Span {
    service: String,
    span: otlp::Span,
}

impl Span {
    pub(super) fn new(span: &TraceSpan, ids: &Ids) -> Self {
        let (local, remote) = ends(span);
        let mut attributes: Vec<KeyValue> = span
            .span_tags
            .iter()
            .map(|(name, v)| attribute(name, any(v)))
            .collect();
        let mut number = |name: &str, n: i64| {
            if n != 0 {
                attributes.push(attribute(name, any_value::Value::IntValue(n)));
            }
        };
        // Names of the semantic conventions, where they have any.
        number("http.response.status_code", span.http_status_code);
        number("http.request.body.size", span.request_size);
        number("http.request.size", span.request_total_size);
        number("http.response.body.size", span.response_size);
        number("http.response.size", span.response_total_size);
        for (name, value) in [
            ("peer.service", remote.name.to_owned()),
            (
                "network.peer.address",
                remote.ip.map_or_else(String::new, |ip| ip.to_string()),
            ),
            (
                "network.local.address",
                local.ip.map_or_else(String::new, |ip| ip.to_string()),
            ),
            ("network.protocol.name", span.api_protocol.to_string()),
        ] {
            if !value.is_empty() {
                attributes.push(attribute(name, text(&value)));
            }
        }
        // A caller sees its own mistakes as errors, a service only its own.
        let is_error = span.http_status_code >= if span.client_span { 400 } else { 500 };
        let status = is_error.then(|| otlp::Status {
            code: StatusCode::Error.into(),
            ..otlp::Status::default()
        });
        let kind = if span.client_span {
            SpanKind::Client
        } else {
            SpanKind::Server
        };
        Self {
            service: local.name.to_owned(),
            span: otlp::Span {
                trace_id: ids.trace.to_vec(),
                span_id: ids.span.to_vec(),
                parent_span_id: ids.parent.map(|p| p.to_vec()).unwrap_or_default(),
                name: span.span_name.to_string(),
                kind: kind.into(),
                start_time_unix_nano: nanos(&ids.start),
                end_time_unix_nano: nanos(&ids.end),
                attributes,
                status,
                ..otlp::Span::default()
            },
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.span.encoded_len() + self.service.len()
    }
}

/// Sends spans: those of a service under its name.
pub(super) struct Spans {
    pub(super) collector: Collector,
    pub(super) resource: Vec<KeyValue>,
    /// Spans that the collector did not want.
    pub(super) refused: Counter,
}

impl Sink for Spans {
    type Record = Span;

    async fn send(&mut self, batch: &[Span]) -> Result<(), SendError> {
        let mut by_service: BTreeMap<&str, Vec<otlp::Span>> = BTreeMap::new();
        for span in batch {
            let spans = by_service.entry(&span.service).or_default();
            spans.push(span.span.clone());
        }
        let resource_spans = by_service.into_iter().map(|(service, spans)| {
            let mut attributes = self.resource.clone();
            if !service.is_empty() {
                attributes.retain(|a| a.key != "service.name");
                attributes.push(attribute("service.name", text(service)));
            }
            ResourceSpans {
                resource: Some(super::of(&attributes)),
                scope_spans: vec![ScopeSpans {
                    scope: scope(),
                    spans,
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }
        });
        let request = ExportTraceServiceRequest {
            resource_spans: resource_spans.collect(),
        };
        let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
        let answer: ExportTraceServiceResponse = self.collector.export(path, request).await?;
        if let Some(partial) = answer.partial_success {
            let count = partial.rejected_spans;
            partly(&self.refused, count, &partial.error_message);
        }
        Ok(())
    }
}
