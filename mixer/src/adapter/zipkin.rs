//! Spans to Zipkin, by its API version 2 over HTTP.

use std::{net::IpAddr, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use http::StatusCode;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Counter, Env, Handler, HandlerError, Info, ReportHandler,
    instance::{ReportInstance, TraceSpan},
    params, template, value,
};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};
use tokio::time::timeout;

use super::{
    export::{Limits, Queue, SendError, Sink, outcome},
    span::{End, Ids, ends},
};

/// Longest wait for the receiver.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest complaint of the receiver that is read.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Zipkin;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    url: String,
    #[serde(alias = "sample_probability")]
    sample_probability: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            url: "http://localhost:9411/api/v2/spans".to_owned(),
            sample_probability: 1.0,
        }
    }
}

fn config(raw: &Json) -> Result<(http::Uri, f64), String> {
    let params = params::parse::<Params>(raw)?;
    let uri: Option<http::Uri> = params.url.parse().ok();
    let uri = uri
        .filter(|u| u.scheme_str() == Some("http") && u.host().is_some() && u.path().len() > 1)
        .ok_or_else(|| {
            format!(
                "url: {:?} is not of the form http://HOST:9411/api/v2/spans",
                params.url
            )
        })?;
    if !(0.0..=1.0).contains(&params.sample_probability) {
        return Err(format!(
            "sampleProbability: {} is not between 0 and 1",
            params.sample_probability
        ));
    }
    Ok((uri, params.sample_probability))
}

impl Adapter for Zipkin {
    fn info(&self) -> Info {
        Info {
            name: "zipkin",
            description: "sends spans to Zipkin",
            templates: const { &[&template::TRACESPAN] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let mut problems: Vec<String> = config(candidate.params).err().into_iter().collect();
        for instance in candidate.instances {
            for field in ["trace_id", "span_id", "start_time", "end_time"] {
                if instance.field(field).is_none() {
                    problems.push(format!("{} has no {field}", instance.name));
                }
            }
        }
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let (uri, probability) = config(candidate.params).map_err(BuildError)?;
        let sink = Collector {
            uri,
            client: Client::builder(TokioExecutor::new()).build_http(),
        };
        Ok(Handler::new().with_report(Arc::new(Tracer {
            probability,
            queue: Queue::start(&env, candidate.name, Limits::default(), sink)?,
            traceless: env.counter("spans_without_trace"),
        })))
    }
}

struct Tracer {
    probability: f64,
    queue: Queue<String>,
    /// Requests that are part of no trace.
    traceless: Counter,
}

impl ReportHandler for Tracer {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let mut dropped = 0;
            let mut problem = None;
            for instance in batch {
                let ReportInstance::TraceSpan(span) = instance else {
                    continue;
                };
                match Ids::read(&span) {
                    Ok(Some(ids)) if self.is_sampled(&ids) => {
                        let text = encode(&span, &ids).to_string();
                        let bytes = text.len();
                        dropped += usize::from(!self.queue.push(text, bytes));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => self.traceless.inc(),
                    Err(error) => problem = Some(error), // the last one speaks for all; the others are sent
                }
            }
            problem.map_or_else(|| outcome(dropped), Err)
        }
        .boxed()
    }
}

impl Tracer {
    /// All spans of a trace, or none: the trace's id decides, in every Mixer alike.
    fn is_sampled(&self, ids: &Ids) -> bool {
        let low = u128::from_be_bytes(ids.trace) as u64;
        #[allow(clippy::cast_precision_loss, reason = "a share needs no more")]
        let share = (low.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 53) as f64;
        share < self.probability
    }
}

fn endpoint(end: End<'_>) -> Json {
    let mut all = Map::new();
    if !end.name.is_empty() {
        all.insert("serviceName".to_owned(), end.name.into());
    }
    if let Some(ip) = end.ip {
        let field = match ip {
            IpAddr::V4(_) => "ipv4",
            IpAddr::V6(_) => "ipv6",
        };
        all.insert(field.to_owned(), ip.to_string().into());
    }
    Json::Object(all)
}

/// A span as API version 2 has it.
fn encode(span: &TraceSpan, ids: &Ids) -> Json {
    let (local, remote) = ends(span);
    let mut tags: Map<String, Json> = span
        .span_tags
        .iter()
        .map(|(name, v)| (name.to_string(), Json::from(value::text(v))))
        .collect();
    let mut tag = |name: &str, value: i64| {
        if value != 0 {
            let place = tags.entry(name);
            place.or_insert_with(|| value.to_string().into());
        }
    };
    tag("http.status_code", span.http_status_code);
    tag("request.size", span.request_size);
    tag("request.total_size", span.request_total_size);
    tag("response.size", span.response_size);
    tag("response.total_size", span.response_total_size);
    if span.http_status_code >= 500 {
        tags.insert("error".to_owned(), span.http_status_code.to_string().into());
    }
    let (high, low) = ids.trace.split_at(8);
    let trace = if high.iter().all(|b| *b == 0) {
        hex::encode(low)
    } else {
        hex::encode(ids.trace)
    };
    let mut out = json!({
        "traceId": trace,
        "id": hex::encode(ids.span),
        "name": &*span.span_name,
        "kind": if span.client_span { "CLIENT" } else { "SERVER" },
        "timestamp": ids.start.timestamp_micros(),
        // 0 would mean that it is not known.
        "duration": (ids.end - ids.start).num_microseconds().unwrap_or(i64::MAX).max(1),
        "localEndpoint": endpoint(local),
        "remoteEndpoint": endpoint(remote),
        "tags": tags,
    });
    if let (Some(parent), Some(out)) = (ids.parent, out.as_object_mut()) {
        out.insert("parentId".to_owned(), hex::encode(parent).into());
    }
    out
}

/// Where spans go.
struct Collector {
    uri: http::Uri,
    client: Client<HttpConnector, Full<bytes::Bytes>>,
}

impl Sink for Collector {
    type Record = String;

    async fn send(&mut self, batch: &[String]) -> Result<(), SendError> {
        let again = |problem: String| SendError::Again(format!("{}: {problem}", self.uri));
        let request = http::Request::post(self.uri.clone())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::from(format!("[{}]", batch.join(","))))
            .map_err(|e| SendError::Never(e.to_string()))?;
        let response = timeout(TIMEOUT, self.client.request(request))
            .await
            .map_err(|_| again("it does not answer".to_owned()))?
            .map_err(|e| again(e.to_string()))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        let text = match timeout(TIMEOUT, body).await {
            Ok(Ok(body)) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            _ => String::new(),
        };
        let problem = format!("it answers {status} {text}");
        let may_come_again = status.is_server_error()
            || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
        if may_come_again {
            Err(again(problem))
        } else {
            Err(SendError::Never(format!("{}: {problem}", self.uri)))
        }
    }
}
