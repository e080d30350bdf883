//! Metrics to StatsD, over UDP. Every sample is a line; StatsD adds them up.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Env, Handler, HandlerError, Info, ReportHandler,
    instance::{Metric, ReportInstance, Values},
    params, template, value,
};
use serde::Deserialize;

use super::{
    datagram::{Kind, Packets, clean, lines, problems, report, sample},
    export::{Limits, Queue},
};

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Statsd;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    address: String,
    prefix: String,
    #[serde(alias = "flush_duration", deserialize_with = "params::duration")]
    flush_duration: Duration,
    #[serde(alias = "flush_bytes", deserialize_with = "params::integer")]
    flush_bytes: u32,
    #[serde(alias = "sampling_rate")]
    sampling_rate: f64,
    metrics: BTreeMap<String, MetricInfo>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MetricInfo {
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(alias = "name_template")]
    name_template: String,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            address: "localhost:8125".to_owned(),
            prefix: String::new(),
            flush_duration: Duration::from_millis(300),
            flush_bytes: 512, // fits any network
            sampling_rate: 1.0,
            metrics: BTreeMap::new(),
        }
    }
}

/// A part of a name.
#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Dimension(String),
}

/// `{{.target}}-{{.code}}`, of Go's templates the part that names need.
fn template(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        if !before.is_empty() {
            pieces.push(Piece::Text(before.to_owned()));
        }
        let (inside, behind) = after
            .split_once("}}")
            .ok_or_else(|| format!("{text:?}: a {{{{ has no }}}}"))?;
        let name = inside.trim().strip_prefix('.').unwrap_or_default();
        if name.is_empty() || !name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            return Err(format!(
                "{text:?}: {{{{{inside}}}}} is not of the form {{{{.DIMENSION}}}}"
            ));
        }
        pieces.push(Piece::Dimension(name.to_owned()));
        rest = behind;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    Ok(pieces)
}

fn name(pieces: &[Piece], dimensions: &Values) -> String {
    let mut name = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(text) => name.push_str(text),
            Piece::Dimension(wanted) => {
                let found = dimensions.iter().find(|(n, _)| **n == **wanted);
                name.push_str(&found.map_or_else(String::new, |(_, v)| clean(&value::text(v))));
            }
        }
    }
    name
}

struct Config {
    params: Params,
    names: BTreeMap<String, (Kind, Vec<Piece>)>,
}

fn config(raw: &serde_json::Value) -> Result<Config, String> {
    let params = params::parse::<Params>(raw)?;
    if params
        .address
        .rsplit_once(':')
        .is_none_or(|(_, port)| port.parse::<u16>().is_err())
    {
        return Err(format!("address: {:?} is not HOST:PORT", params.address));
    }
    if !(params.sampling_rate > 0.0 && params.sampling_rate <= 1.0) {
        return Err(format!(
            "samplingRate: {} is not above 0 and at most 1",
            params.sampling_rate
        ));
    }
    if !(64..=65_000).contains(&params.flush_bytes) {
        return Err(format!(
            "flushBytes: {} is not between 64 and 65000",
            params.flush_bytes
        ));
    }
    let mut names = BTreeMap::new();
    for (instance, info) in &params.metrics {
        let text = if info.name_template.is_empty() {
            instance
        } else {
            &info.name_template
        };
        let pieces =
            template(text).map_err(|e| format!("metrics: {instance}: nameTemplate: {e}"))?;
        names.insert(instance.clone(), (info.kind, pieces));
    }
    Ok(Config { params, names })
}

impl Adapter for Statsd {
    fn info(&self) -> Info {
        Info {
            name: "statsd",
            description: "sends metrics to StatsD",
            templates: const { &[&template::METRIC] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let config = match config(candidate.params) {
            Ok(config) => config,
            Err(problem) => return vec![problem],
        };
        let kinds = config.params.metrics.iter().map(|(n, i)| (n, i.kind));
        let mut problems = problems(candidate, kinds);
        for instance in candidate.instances {
            let pieces = config.names.get(&*instance.name);
            for piece in pieces.into_iter().flat_map(|(_, pieces)| pieces) {
                if let Piece::Dimension(wanted) = piece
                    && instance.map("dimensions").all(|(n, _)| n != wanted)
                {
                    problems.push(format!(
                        "metrics: {}: nameTemplate: there is no dimension {wanted}",
                        instance.name
                    ));
                }
            }
        }
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let Config { params, names } = config(candidate.params).map_err(BuildError)?;
        let bytes = params.flush_bytes as usize;
        let limits = Limits {
            interval: params.flush_duration,
            ..Limits::default()
        };
        let packets = Packets::new(params.address, bytes, env.counter("packets_lost"));
        Ok(Handler::new().with_report(Arc::new(Sender {
            prefix: clean(&params.prefix),
            rate: params.sampling_rate,
            names,
            queue: Queue::start(&env, candidate.name, limits, packets)?,
        })))
    }
}

struct Sender {
    prefix: String,
    rate: f64,
    names: BTreeMap<String, (Kind, Vec<Piece>)>,
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
        let (kind, pieces) = self
            .names
            .get(&*metric.name)
            .ok_or_else(|| HandlerError::invalid(format!("{} is no metric here", metric.name)))?;
        let Some((value, suffix)) = sample(metric, *kind, self.rate)? else {
            return Ok(Vec::new());
        };
        let name = format!("{}{}", self.prefix, name(pieces, &metric.dimensions));
        Ok(lines(*kind, &name, value, "ms", &suffix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_dimensions() {
        let pieces = template("{{.target}}.x-{{ .code }}").unwrap();
        let dimensions: Values = [("code", "200"), ("target", "a:b")]
            .map(|(n, v)| (Arc::from(n), value::string(v)))
            .into();
        assert_eq!(name(&pieces, &dimensions), "a_b.x-200");
        for bad in ["{{.a", "{{a}}", "{{}}", "{{.a.b}}", "{{.a | printf}}"] {
            assert!(template(bad).is_err(), "{bad}");
        }
    }
}
