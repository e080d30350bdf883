//! A finished stream as spans, with Envoy's names and tags (`HttpTracerUtility::finalizeDownstreamSpan`).

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use opentelemetry::trace::{SpanId, TraceId};

use super::{Direction, Tag, Trace, Tracer};
use crate::{
    format::{Facts, Format},
    head::{Known, RequestHead},
    info::StreamInfo,
};

/// No value is longer; a collector's limits are not far from it.
const MAX_VALUE_BYTES: usize = 1024;

/// A span, ready to be exported.
#[derive(Debug)]
pub(super) struct Span {
    pub(super) trace: TraceId,
    pub(super) id: SpanId,
    pub(super) parent: Option<SpanId>,
    /// Whether the parent is in another process, as far as we know.
    pub(super) parent_is_remote: bool,
    pub(super) trace_state: String,
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) start: SystemTime,
    pub(super) duration: Duration,
    pub(super) tags: Vec<(Cow<'static, str>, String)>,
    pub(super) failed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Server,
    Client,
}

/// Text of a header, of bounded length.
pub(super) fn text(value: &[u8]) -> String {
    let value = &value[..value.len().min(MAX_VALUE_BYTES)];
    String::from_utf8_lossy(value).into_owned()
}

/// Collects tags in order.
#[derive(Debug, Default)]
struct Tags(Vec<(Cow<'static, str>, String)>);

impl Tags {
    fn add(&mut self, key: &'static str, value: impl Into<String>) {
        self.0.push((Cow::Borrowed(key), value.into()));
    }

    fn header(&mut self, key: &'static str, head: &RequestHead, name: Known) {
        if let Some(value) = head.headers.known(name) {
            self.add(key, text(value));
        }
    }
}

impl Trace {
    pub(super) fn downstream_span(&self, facts: &Facts<'_>) -> Span {
        let info = facts.info;
        let tracer = &*self.tracer;
        let mut tags = Tags(Vec::with_capacity(24 + tracer.tags.len()));
        tags.add("node_id", tracer.node_id.clone());
        if !tracer.zone.is_empty() {
            tags.add("zone", tracer.zone.clone());
        }
        if let Some(head) = facts.request {
            request_tags(&mut tags, head, info, tracer.max_path_length);
        }
        tags.add("request_size", info.bytes_received.to_string());
        tags.add("response_size", info.bytes_sent.to_string());
        let kind = match tracer.direction {
            Direction::Egress if !tracer.spawn_upstream => Kind::Client,
            Direction::Egress | Direction::Ingress => Kind::Server,
        };
        let failed = common_tags(&mut tags, facts, kind);
        tracer.custom_tags(&mut tags, facts);
        Span {
            trace: self.context.trace,
            id: self.context.span,
            parent: self.context.parent,
            parent_is_remote: true,
            trace_state: self.trace_state.clone(),
            name: self.name(facts),
            kind,
            start: info.start_time,
            duration: info.response_end.unwrap_or_else(|| info.start.elapsed()),
            tags: tags.0,
            failed,
        }
    }

    pub(super) fn upstream_span(&self, id: SpanId, facts: &Facts<'_>) -> Span {
        let info = facts.info;
        let mut tags = Tags(Vec::with_capacity(16));
        if let Some(protocol) = info.protocol {
            tags.add("http.protocol", protocol.as_str());
        }
        if let Some(host) = info.upstream_host {
            tags.add("upstream_address", host.to_string());
            tags.add("peer.address", host.to_string());
        }
        if info.upstream_attempts > 1 {
            tags.add("retry.count", (info.upstream_attempts - 1).to_string());
        }
        let failed = common_tags(&mut tags, facts, Kind::Client);
        self.tracer.custom_tags(&mut tags, facts);
        let cluster = info.upstream_cluster.as_deref().unwrap_or("-");
        Span {
            trace: self.context.trace,
            id,
            parent: Some(self.context.span),
            parent_is_remote: false,
            trace_state: self.trace_state.clone(),
            name: written(self.tracer.upstream_operation.as_ref(), facts)
                .unwrap_or_else(|| format!("router {cluster} egress")),
            kind: Kind::Client,
            start: info.start_time,
            duration: info.response_end.unwrap_or_else(|| info.start.elapsed()),
            tags: tags.0,
            failed,
        }
    }

    fn name(&self, facts: &Facts<'_>) -> String {
        if let Some(operation) = &self.operation {
            return operation.clone();
        }
        if let Some(operation) = written(self.tracer.operation.as_ref(), facts) {
            return operation;
        }
        match (self.tracer.direction, facts.request) {
            (Direction::Ingress, _) => "ingress".to_owned(),
            (Direction::Egress, Some(head)) => format!("egress {}", text(&head.authority)),
            (Direction::Egress, None) => "egress".to_owned(),
        }
    }
}

impl Tracer {
    fn custom_tags(&self, tags: &mut Tags, facts: &Facts<'_>) {
        for (key, tag) in &self.tags {
            let value = match tag {
                Tag::Literal(value) => value.clone(),
                Tag::Header { name, default } => facts
                    .request
                    .and_then(|head| head.headers.get(name))
                    .map_or_else(|| default.clone(), text),
                Tag::Format(format) => written(Some(format), facts).unwrap_or_default(),
            };
            if !value.is_empty() {
                tags.0.push((Cow::Owned(key.clone()), value));
            }
        }
    }
}

fn written(format: Option<&Format>, facts: &Facts<'_>) -> Option<String> {
    let mut out = Vec::new();
    format?.write(facts, &mut out);
    (!out.is_empty()).then(|| text(&out))
}

fn request_tags(tags: &mut Tags, head: &RequestHead, info: &StreamInfo, max_path: usize) {
    tags.header("guid:x-request-id", head, Known::XRequestId);
    tags.add("http.url", url(head, max_path));
    tags.add("http.method", text(&head.method));
    let or_dash = |name| {
        head.headers
            .known(name)
            .map_or_else(|| "-".to_owned(), text)
    };
    tags.add("user_agent", or_dash(Known::UserAgent));
    let protocol = info.protocol.unwrap_or(head.protocol);
    tags.add("http.protocol", protocol.as_str());
    tags.add("peer.address", info.connection.remote.ip().to_string());
    tags.header("guid:x-client-trace-id", head, Known::XClientTraceId);
    if head.is_grpc() {
        tags.add("grpc.path", text(&head.path));
        tags.add("grpc.authority", text(&head.authority));
        tags.header("grpc.content_type", head, Known::ContentType);
        tags.header("grpc.timeout", head, Known::GrpcTimeout);
    }
}

fn url(head: &RequestHead, max_path: usize) -> String {
    let path = head
        .headers
        .known(Known::XEnvoyOriginalPath)
        .unwrap_or(&head.path);
    let path = &path[..path.len().min(max_path)];
    format!(
        "{}://{}{}",
        text(&head.scheme),
        text(&head.authority),
        text(path)
    )
}

/// Tags of both sides' spans; whether the span is one of a failure.
fn common_tags(tags: &mut Tags, facts: &Facts<'_>, kind: Kind) -> bool {
    let info = facts.info;
    tags.add("component", "proxy");
    if let Some(cluster) = &info.upstream_cluster {
        tags.add("upstream_cluster", &**cluster);
        tags.add("upstream_cluster.name", &**cluster);
    }
    tags.add("http.status_code", info.response_code.to_string());
    tags.add("response_flags", info.flags.short());
    let mut error = info.response_code == 0 || info.response_code >= 500;
    if let Some(code) = info.grpc_status
        && facts.request.is_some_and(RequestHead::is_grpc)
    {
        tags.add("grpc.status_code", code.to_string());
        let message = facts
            .trailers
            .and_then(|trailers| trailers.known(Known::GrpcMessage))
            .or_else(|| facts.response?.headers.known(Known::GrpcMessage));
        if let Some(message) = message {
            tags.add("grpc.message", text(message));
        }
        error |= is_server_fault(code);
    }
    if error {
        tags.add("error", "true");
    }
    // OpenTelemetry's HTTP conventions: a client's span has also failed when it was told 4xx.
    error || kind == Kind::Client && info.response_code >= 400
}

/// Envoy: `addGrpcResponseTags`; the other codes are the caller's doing.
fn is_server_fault(code: i32) -> bool {
    // unknown, deadline exceeded, resource exhausted, unimplemented, internal, unavailable, data loss,
    // unauthenticated
    matches!(code, 2 | 4 | 8 | 12 | 13 | 14 | 15 | 16)
}
