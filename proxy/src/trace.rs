//! Distributed tracing: joins or begins a trace per request, hands its context on upstream and exports one
//! span per stream (two, when the upstream side has a span of its own).
//!
//! A connection manager without `tracing` has no [`Tracer`], and trace headers pass it untouched.

use std::{sync::Arc, time::Duration};

use lateen_protocols::envoy::{
    envoy::{
        config::{
            core::v3::TrafficDirection,
            trace::v3::{OpenTelemetryConfig, ZipkinConfig, tracing::http::ConfigType},
        },
        extensions::filters::network::http_connection_manager::v3::http_connection_manager::Tracing,
        r#type::{
            tracing::v3::{CustomTag, custom_tag},
            v3::Percent,
        },
    },
    google::protobuf as pb,
};
use opentelemetry::trace::{SpanId, TraceId};

use crate::{
    config_error::ConfigError,
    format::{Facts, Format},
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    proto::{Chance, invalid, unpack},
    route::Selected,
    shared::Shared,
};

pub mod context;
mod export;
mod span;

use context::SpanContext;
use export::Exporter;

/// Envoy's default for `max_path_tag_length`.
const MAX_PATH_TAG_LENGTH: u32 = 256;

/// What a connection manager does about traces.
#[derive(Debug)]
pub struct Tracer {
    direction: Direction,
    sampling: Sampling,
    /// Of the downstream side's span; the default if there is none.
    operation: Option<Format>,
    upstream_operation: Option<Format>,
    /// The upstream side has a span of its own.
    spawn_upstream: bool,
    propagate: bool,
    max_path_length: usize,
    tags: Vec<(String, Tag)>,
    node_id: String,
    zone: String,
    exporter: Arc<Exporter>,
}

/// Which side of its workload a listener is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

#[derive(Clone, Copy, Debug)]
struct Sampling {
    client: Chance,
    random: Chance,
    overall: Chance,
}

#[derive(Debug)]
enum Tag {
    Literal(String),
    Header { name: Name, default: String },
    Format(Format),
}

/// The trace of one request. Ended by [`Trace::finish`]; dropped without it, nothing is recorded.
#[derive(Debug)]
pub struct Trace {
    tracer: Arc<Tracer>,
    context: SpanContext,
    /// Of the upstream side's span.
    upstream: Option<SpanId>,
    trace_state: String,
    /// Name of the span, when route or peer gave one.
    operation: Option<String>,
    /// Goes downstream in `x-envoy-decorator-operation`.
    answer_operation: Option<Arc<str>>,
}

impl Tracer {
    /// Compiles the `tracing` of a connection manager on a listener of this direction. Without a provider
    /// there is no tracer: headers pass untouched, as in Envoy when its bootstrap has none either.
    ///
    /// # Errors
    /// When something is invalid, or a provider, tag or sampler is not supported.
    pub fn compile(
        config: &Tracing,
        direction: TrafficDirection,
        shared: &Shared,
    ) -> Result<Option<Arc<Tracer>>, ConfigError> {
        let Some(provider) = config.provider.as_ref() else {
            return Ok(None);
        };
        let within = |error: ConfigError| error.within(format_args!("provider {}", provider.name));
        let Some(ConfigType::TypedConfig(any)) = provider.config_type.as_ref() else {
            return Err(within(invalid("typed_config", "absent")));
        };
        Ok(Some(Arc::new(Tracer {
            // As Envoy: a listener that does not say is taken for an inbound one.
            direction: match direction {
                TrafficDirection::Outbound => Direction::Egress,
                TrafficDirection::Inbound | TrafficDirection::Unspecified => Direction::Ingress,
            },
            sampling: Sampling {
                client: chance("client_sampling", config.client_sampling.as_ref())?,
                random: chance("random_sampling", config.random_sampling.as_ref())?,
                overall: chance("overall_sampling", config.overall_sampling.as_ref())?,
            },
            operation: operation("operation", &config.operation)?,
            upstream_operation: operation("upstream_operation", &config.upstream_operation)?,
            spawn_upstream: config
                .spawn_upstream_span
                .as_ref()
                .is_some_and(|spawn| spawn.value),
            propagate: !config.no_context_propagation,
            max_path_length: config
                .max_path_tag_length
                .as_ref()
                .map_or(MAX_PATH_TAG_LENGTH, |length| length.value)
                as usize,
            tags: config
                .custom_tags
                .iter()
                .map(|tag| {
                    let compiled = Tag::compile(tag)
                        .map_err(|error| error.within(format_args!("custom_tags {}", tag.tag)))?;
                    Ok((tag.tag.clone(), compiled))
                })
                .collect::<Result<_, ConfigError>>()?,
            node_id: shared.node.id.clone(),
            zone: shared
                .node
                .locality
                .as_ref()
                .map(|locality| locality.zone.clone())
                .unwrap_or_default(),
            exporter: exporter(any, shared).map_err(within)?,
        })))
    }

    /// Joins the trace of a request, or begins one, and writes its context into the head. Call it once
    /// the route is selected and before any filter runs.
    pub fn start(self: &Arc<Tracer>, head: &mut RequestHead, route: Option<&Selected>) -> Trace {
        let incoming = context::extract(&head.headers);
        let (trace, parent) = match incoming.parent {
            Some((trace, span)) => (trace, Some(span)),
            None => (new_trace_id(), None),
        };
        // The caller's decision holds, or the trace would have holes.
        let sampled = incoming
            .sampled
            .unwrap_or_else(|| self.sampling.decide(&head.headers));
        let context = SpanContext {
            trace,
            span: new_span_id(),
            parent,
            sampled,
            flags: incoming.flags,
        };
        let upstream = self.spawn_upstream.then(new_span_id);
        let trace_state = match (sampled, incoming.w3c) {
            (true, true) => trace_state(&head.headers),
            _ => String::new(),
        };
        let (operation, answer_operation) = self.decorate(&mut head.headers, route);
        if self.propagate {
            let handed_on = match upstream {
                Some(span) => SpanContext {
                    span,
                    parent: Some(context.span),
                    ..context
                },
                None => context,
            };
            context::inject(&handed_on, &incoming, &mut head.headers);
        }
        Trace {
            tracer: self.clone(),
            context,
            upstream,
            trace_state,
            operation,
            answer_operation,
        }
    }

    /// What route and peer call the operation: the span's name, and what to tell the downstream. Envoy:
    /// `ActiveStream::traceRequest`.
    fn decorate(
        &self,
        headers: &mut Headers,
        route: Option<&Selected>,
    ) -> (Option<String>, Option<Arc<str>>) {
        let route = route.map(Selected::route);
        let decorator = route
            .and_then(|route| route.decorator.clone())
            .filter(|operation| !operation.is_empty());
        let told = decorator
            .clone()
            .filter(|_| route.is_some_and(|route| route.decorator_propagates));
        match self.direction {
            Direction::Egress => {
                if let Some(operation) = told {
                    headers.set(Known::XEnvoyDecoratorOperation, operation.to_string());
                }
                (decorator.map(|operation| operation.to_string()), None)
            }
            Direction::Ingress => match headers.take(Known::XEnvoyDecoratorOperation) {
                Some(given) if !given.is_empty() => (Some(span::text(&given)), None),
                _ => (decorator.map(|operation| operation.to_string()), told),
            },
        }
    }
}

impl Sampling {
    /// Whether a request whose caller has not decided is recorded.
    fn decide(&self, headers: &Headers) -> bool {
        let asked = |name| headers.known(name).is_some_and(|value| !value.is_empty());
        let wanted = asked(Known::XClientTraceId) && self.client.hits()
            || asked(Known::XEnvoyForceTrace)
            || self.random.hits();
        wanted && self.overall.hits()
    }
}

impl Trace {
    /// The context of the downstream side's span.
    pub fn context(&self) -> &SpanContext {
        &self.context
    }

    /// Lets the operation's name through between proxies, and no further. Call it before the response
    /// head goes downstream.
    pub fn on_response(&mut self, head: &mut ResponseHead) {
        match self.tracer.direction {
            Direction::Egress => {
                if let Some(given) = head.headers.take(Known::XEnvoyDecoratorOperation)
                    && !given.is_empty()
                {
                    self.operation = Some(span::text(&given));
                }
            }
            Direction::Ingress => {
                if let Some(operation) = &self.answer_operation {
                    head.headers
                        .set(Known::XEnvoyDecoratorOperation, operation.to_string());
                }
            }
        }
    }

    /// Records the stream, if its trace is recorded. Call it once, when the facts are final, on a worker.
    pub fn finish(&self, shared: &Arc<Shared>, facts: &Facts<'_>) {
        if !self.context.sampled {
            return;
        }
        let exporter = &self.tracer.exporter;
        // The upstream side first: it ended first.
        if let Some(span) = self.upstream
            && facts.info.upstream_attempts > 0
        {
            exporter.push(shared, self.upstream_span(span, facts));
        }
        exporter.push(shared, self.downstream_span(facts));
    }
}

impl Tag {
    fn compile(tag: &CustomTag) -> Result<Tag, ConfigError> {
        if tag.tag.is_empty() {
            return Err(invalid("tag", "absent"));
        }
        match tag.r#type.as_ref() {
            Some(custom_tag::Type::Literal(literal)) => Ok(Tag::Literal(literal.value.clone())),
            Some(custom_tag::Type::RequestHeader(header)) if !header.name.is_empty() => {
                Ok(Tag::Header {
                    name: Name::new(&header.name),
                    default: header.default_value.clone(),
                })
            }
            Some(custom_tag::Type::RequestHeader(_)) => {
                Err(invalid("request_header", "names no header"))
            }
            Some(custom_tag::Type::Value(format)) => Ok(Tag::Format(Format::text(format, true)?)),
            Some(custom_tag::Type::Environment(_)) => Err(invalid(
                "environment",
                "not supported: the environment is read at start only; use a literal",
            )),
            Some(custom_tag::Type::Metadata(_)) => Err(invalid("metadata", "not supported")),
            None => Err(invalid("type", "absent")),
        }
    }
}

/// Sends the spans that wait on this worker, for at most `limit`; call it before the worker ends.
pub async fn flush(limit: Duration) {
    export::flush(limit).await;
}

fn exporter(any: &pb::Any, shared: &Shared) -> Result<Arc<Exporter>, ConfigError> {
    if let Some(config) = unpack::<OpenTelemetryConfig>(any)? {
        return Exporter::opentelemetry(&config, shared);
    }
    if let Some(config) = unpack::<ZipkinConfig>(any)? {
        return Exporter::zipkin(&config, shared);
    }
    Err(invalid(
        any.type_url.clone(),
        "this trace provider is not supported; OpenTelemetryConfig and ZipkinConfig are",
    ))
}

/// Envoy's percentages are 100 unless they are given.
fn chance(field: &str, percent: Option<&Percent>) -> Result<Chance, ConfigError> {
    match percent.map(|percent| percent.value) {
        None => Ok(Chance::ALWAYS),
        // Between 0 and 1,000,000.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the range is checked"
        )]
        Some(value) if (0.0..=100.0).contains(&value) => {
            Ok(Chance((value * 10_000.0).round() as u32))
        }
        Some(_) => Err(invalid(field, "not a percentage")),
    }
}

fn operation(field: &str, format: &str) -> Result<Option<Format>, ConfigError> {
    if format.is_empty() {
        return Ok(None);
    }
    let format = Format::text(format, true).map_err(|error| error.within(field))?;
    Ok(Some(format))
}

fn trace_state(headers: &Headers) -> String {
    let name = Name::Known(Known::TraceState);
    let all: Vec<_> = headers.all(&name).map(span::text).collect();
    all.join(",")
}

fn new_trace_id() -> TraceId {
    TraceId::from(rand::random_range(1..=u128::MAX))
}

fn new_span_id() -> SpanId {
    SpanId::from(rand::random_range(1..=u64::MAX))
}

#[cfg(test)]
mod tests;
