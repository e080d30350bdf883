//! Metrics to Datadog's agent: StatsD with tags, over UDP.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Env, Handler, HandlerError, Info, ReportHandler, Value,
    instance::{Metric, ReportInstance},
    params, template, value,
};
use serde::Deserialize;

use super::{
    datagram::{Kind, Packets, clean, lines, problems, report, sample},
    export::{Limits, Queue},
};

/// Largest packet, as Datadog's clients have it.
const PACKET: usize = 1432;
/// Longest wait of a line for others when packets are shared.
const INTERVAL: Duration = Duration::from_millis(100);

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Dogstatsd;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    address: String,
    prefix: String,
    #[serde(alias = "buffer_length", deserialize_with = "params::integer")]
    buffer_length: u32,
    #[serde(alias = "global_tags")]
    global_tags: BTreeMap<String, String>,
    #[serde(alias = "sample_rate")]
    sample_rate: f64,
    metrics: BTreeMap<String, MetricInfo>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MetricInfo {
    name: String,
    #[serde(rename = "type")]
    kind: Kind,
    tags: BTreeMap<String, String>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            address: "localhost:8125".to_owned(),
            prefix: "istio.".to_owned(),
            buffer_length: 0,
            global_tags: BTreeMap::new(),
            sample_rate: 1.0,
            metrics: BTreeMap::new(),
        }
    }
}

fn config(raw: &serde_json::Value) -> Result<Params, String> {
    let params = params::parse::<Params>(raw)?;
    if params
        .address
        .rsplit_once(':')
        .is_none_or(|(_, port)| port.parse::<u16>().is_err())
    {
        return Err(format!("address: {:?} is not HOST:PORT", params.address));
    }
    if !(params.sample_rate > 0.0 && params.sample_rate <= 1.0) {
        return Err(format!(
            "sampleRate: {} is not above 0 and at most 1",
            params.sample_rate
        ));
    }
    if let Some((name, _)) = params.metrics.iter().find(|(_, m)| m.name.is_empty()) {
        return Err(format!("metrics: {name}: it has no name"));
    }
    Ok(params)
}

/// Tags as the line has them.
fn tags<'a>(all: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<String> {
    let tag = |(name, value): (&str, &str)| {
        // A value may have colons, a name may not.
        let value = value.split(':').map(clean).collect::<Vec<_>>().join(":");
        format!("{}:{value}", clean(name))
    };
    all.into_iter().map(tag).collect()
}

impl Adapter for Dogstatsd {
    fn info(&self) -> Info {
        Info {
            name: "dogstatsd",
            description: "sends metrics to Datadog's agent",
            templates: const { &[&template::METRIC] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        match config(candidate.params) {
            Ok(params) => problems(candidate, params.metrics.iter().map(|(n, m)| (n, m.kind))),
            Err(problem) => vec![problem],
        }
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = config(candidate.params).map_err(BuildError)?;
        // Without a buffer every line is a packet; with one, as many lines as it says, if they fit.
        let limits = match params.buffer_length {
            0 => Limits {
                interval: Duration::ZERO,
                ..Limits::default()
            },
            count => Limits {
                interval: INTERVAL,
                batch_records: count as usize,
                ..Limits::default()
            },
        };
        let packet = if params.buffer_length == 0 { 0 } else { PACKET };
        let packets = Packets::new(params.address, packet, env.counter("packets_lost"));
        let global = params.global_tags.iter().map(|(n, v)| (&**n, &**v));
        let global = tags(global);
        let metrics = params
            .metrics
            .iter()
            .map(|(instance, info)| {
                let own = tags(info.tags.iter().map(|(n, v)| (&**n, &**v)));
                let measured = Measured {
                    name: clean(&format!("{}{}", params.prefix, info.name)),
                    kind: info.kind,
                    tags: global.iter().chain(&own).cloned().collect(),
                };
                (instance.clone(), measured)
            })
            .collect();
        Ok(Handler::new().with_report(Arc::new(Sender {
            rate: params.sample_rate,
            metrics,
            queue: Queue::start(&env, candidate.name, limits, packets)?,
        })))
    }
}

struct Measured {
    name: String,
    kind: Kind,
    tags: Vec<String>,
}

struct Sender {
    rate: f64,
    metrics: BTreeMap<String, Measured>,
    queue: Queue<String>,
}

impl ReportHandler for Sender {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move { report(&self.queue, batch, |metric| self.lines(metric)) }.boxed()
    }
}

impl Sender {
    fn lines(&self, metric: &Metric) -> Result<Vec<String>, HandlerError> {
        let measured = self
            .metrics
            .get(&*metric.name)
            .ok_or_else(|| HandlerError::invalid(format!("{} is no metric here", metric.name)))?;
        let Some((value, mut suffix)) = sample(metric, measured.kind, self.rate)? else {
            return Ok(Vec::new());
        };
        let texts: Vec<_> = metric
            .dimensions
            .iter()
            .map(|(name, v)| (&**name, value::text(v)))
            .collect();
        let own = tags(texts.iter().map(|(name, text)| (*name, &**text)));
        let all: Vec<_> = measured
            .tags
            .iter()
            .chain(&own)
            .map(String::as_str)
            .collect();
        if !all.is_empty() {
            suffix.push_str("|#");
            suffix.push_str(&all.join(","));
        }
        let timer = match metric.value {
            Some(Value::Duration(_)) => "ms",
            _ => "h",
        };
        Ok(lines(measured.kind, &measured.name, value, timer, &suffix))
    }
}
