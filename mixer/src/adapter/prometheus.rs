//! Keeps metrics and shows them to Prometheus.
//!
//! All handlers write to one [`Exposition`]. A series that was not written to for the handler's expiry time
//! (10 minutes unless configured) disappears; what exceeds a metric's [budget](MAX_SERIES) is counted together, in
//! a series whose labels say `overflow`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Clock, Counter, Env, Handler, HandlerError, Info,
    ReportHandler, Text, Value, ValueType,
    instance::{Metric, ReportInstance},
    params, template, value,
};
use serde::Deserialize;

pub use super::series::MAX_SERIES;
use super::series::{Buckets, Kind, Recorded, Shape, Table};

/// A series that nobody writes to goes, unless the parameters say when, or with `0s`, that it stays.
const DEFAULT_EXPIRY: Duration = Duration::from_secs(600); // what Istio's charts configure

/// The adapter.
#[derive(Debug)]
pub struct Prometheus {
    exposition: Arc<Exposition>,
}

impl Prometheus {
    /// An adapter whose handlers write to `exposition`.
    pub fn new(exposition: Arc<Exposition>) -> Self {
        Self { exposition }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    metrics: Vec<MetricInfo>,
    #[serde(alias = "metrics_expiration_policy")]
    metrics_expiration_policy: Option<ExpirationPolicy>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ExpirationPolicy {
    #[serde(
        alias = "metrics_expiry_duration",
        deserialize_with = "params::duration"
    )]
    metrics_expiry_duration: Duration,
    /// Accepted; expired series are dropped whenever the metrics are read or a metric is full.
    #[serde(
        alias = "expiry_check_interval_duration",
        deserialize_with = "params::duration"
    )]
    #[allow(dead_code, reason = "accepted so that Istio's configuration loads")]
    expiry_check_interval_duration: Duration,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MetricInfo {
    namespace: String,
    name: String,
    #[serde(alias = "instance_name")]
    instance_name: String,
    description: String,
    kind: Option<Kind>,
    buckets: Option<Buckets>,
    #[serde(alias = "label_names")]
    label_names: Vec<String>,
}

impl MetricInfo {
    fn definition(&self, expiry: Option<Duration>) -> Result<Definition, String> {
        let namespace = if self.namespace.is_empty() {
            "istio"
        } else {
            &self.namespace
        };
        let fail = |what: String| format!("metrics: {}: {what}", self.name);
        if self.name.is_empty() {
            return Err("metrics: a metric has no name".into());
        }
        let shape = Shape::new(self.kind, self.buckets.as_ref(), expiry).map_err(fail)?;
        let labels: Vec<String> = self.label_names.iter().map(|l| safe_name(l)).collect();
        for (i, label) in labels.iter().enumerate() {
            if labels.iter().take(i).any(|l| l == label) {
                return Err(fail(format!("label {label} is there twice")));
            }
            if label == "le" || label.starts_with("__") || label.is_empty() {
                return Err(fail(format!("{label:?} is no name for a label")));
            }
        }
        Ok(Definition {
            name: safe_name(&format!("{namespace}_{}", self.name)),
            help: if self.description.is_empty() {
                self.name.clone()
            } else {
                self.description.clone()
            },
            labels,
            shape,
        })
    }
}

/// `name` with everything replaced that Prometheus does not allow.
fn safe_name(name: &str) -> String {
    let mut safe: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    if safe.starts_with(|c: char| c.is_ascii_digit()) {
        safe.insert(0, '_');
    }
    safe
}

/// The definitions of `params` with the instance each is for and the dimension of each label.
fn definitions(raw: &serde_json::Value) -> Result<Vec<(MetricInfo, Definition)>, Vec<String>> {
    let params = params::parse::<Params>(raw).map_err(|e| vec![e])?;
    let policy = params.metrics_expiration_policy;
    let expiry = policy.map_or(DEFAULT_EXPIRY, |p| p.metrics_expiry_duration);
    let expiry = Some(expiry).filter(|d| !d.is_zero());
    let mut good = Vec::new();
    let mut problems = Vec::new();
    for metric in params.metrics {
        match metric.definition(expiry) {
            Ok(definition) => good.push((metric, definition)),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() {
        Ok(good)
    } else {
        Err(problems)
    }
}

impl Adapter for Prometheus {
    fn info(&self) -> Info {
        Info {
            name: "prometheus",
            description: "keeps metrics for Prometheus to read",
            templates: const { &[&template::METRIC] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let definitions = match definitions(candidate.params) {
            Ok(definitions) => definitions,
            Err(problems) => return problems,
        };
        let mut problems = Vec::new();
        for (i, (_, definition)) in definitions.iter().enumerate() {
            if definitions
                .iter()
                .take(i)
                .any(|(_, d)| d.name == definition.name)
            {
                problems.push(format!("metrics: {} is defined twice", definition.name));
            }
        }
        for instance in candidate.instances {
            let mut is_measured = false;
            for (metric, _) in definitions
                .iter()
                .filter(|(m, _)| *m.instance_name == *instance.name)
            {
                is_measured = true;
                for label in &metric.label_names {
                    if instance.map("dimensions").all(|(name, _)| name != label) {
                        problems.push(format!(
                            "metrics: {}: {} has no dimension for label {label}",
                            metric.name, instance.name
                        ));
                    }
                }
            }
            if !is_measured {
                problems.push(format!(
                    "metrics: instance {} is sent here but no metric has it as instance_name; \
                     metrics name the instance's full name",
                    instance.name
                ));
            }
            match instance.field("value") {
                Some(
                    ValueType::Int64 | ValueType::Double | ValueType::Duration | ValueType::String,
                ) => {}
                Some(other) => problems.push(format!(
                    "metrics: value of {} is {other}, not a number",
                    instance.name
                )),
                None => problems.push(format!("metrics: {} has no value", instance.name)),
            }
        }
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let definitions =
            definitions(candidate.params).map_err(|problems| BuildError(problems.join("; ")))?;
        let mut by_instance: HashMap<String, Vec<Measured>> = HashMap::new();
        for (metric, definition) in definitions {
            let family = self
                .exposition
                .define(candidate.name, definition)
                .map_err(BuildError)?;
            by_instance
                .entry(metric.instance_name)
                .or_default()
                .push(Measured {
                    family,
                    dimensions: metric.label_names,
                });
        }
        Ok(Handler::new().with_report(Arc::new(Recorder {
            by_instance,
            clock: self.exposition.clock.clone(),
            overflow: env.counter("series_overflow"),
        })))
    }
}

struct Recorder {
    by_instance: HashMap<String, Vec<Measured>>,
    clock: Clock,
    /// Samples beyond the budget of their metric.
    overflow: Counter,
}

struct Measured {
    family: Arc<Family>,
    /// The dimension of each label, in the order of the family's labels.
    dimensions: Vec<String>,
}

impl ReportHandler for Recorder {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let now = self.clock.now();
            let mut problem = Ok(());
            for instance in batch {
                let ReportInstance::Metric(metric) = instance else {
                    continue;
                };
                if let Err(error) = self.record(&metric, now) {
                    problem = Err(error); // the last one speaks for all; the others are recorded
                }
            }
            problem
        }
        .boxed()
    }
}

impl Recorder {
    fn record(&self, metric: &Metric, now: Duration) -> Result<(), HandlerError> {
        let name = &metric.name;
        let measured = self
            .by_instance
            .get(&**name)
            .ok_or_else(|| HandlerError::invalid(format!("{name} is no metric here")))?;
        let sample = metric
            .value
            .as_ref()
            .and_then(value::number)
            .filter(|sample| !sample.is_nan())
            .ok_or_else(|| HandlerError::invalid(format!("{name} has no number as its value")))?;
        for Measured { family, dimensions } in measured {
            let labels: Vec<Text> = dimensions
                .iter()
                .map(|label| {
                    let found = metric.dimensions.iter().find(|(n, _)| **n == **label);
                    found.map_or(Text::EMPTY, |(_, v)| label_text(v))
                })
                .collect();
            let definition = &family.definition;
            let recorded = family
                .series
                .record(&definition.shape, &labels, sample, now)
                .map_err(|e| HandlerError::invalid(format!("{}: {e}", definition.name)))?;
            if recorded == Recorded::Together {
                self.overflow.inc();
            }
        }
        Ok(())
    }
}

fn label_text(value: &Value) -> Text {
    match value.as_text() {
        Some(text) => text.clone(),
        None => Text::from(value.to_string()),
    }
}

/// All metrics that live handlers define, in Prometheus' text format.
#[derive(Debug)]
pub struct Exposition {
    clock: Clock,
    families: Mutex<BTreeMap<String, Vec<Owned>>>,
}

/// A metric goes with the last handler that holds it.
#[derive(Debug)]
struct Owned {
    handler: String,
    family: Weak<Family>,
}

#[derive(Clone, Debug, PartialEq)]
struct Definition {
    name: String,
    help: String,
    labels: Vec<String>,
    shape: Shape,
}

#[derive(Debug)]
struct Family {
    definition: Definition,
    series: Table,
}

impl Exposition {
    /// Nothing to show yet.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            families: Mutex::default(),
        }
    }

    /// The metric `definition` of `handler`. A metric that is already there with the same definition goes on
    /// counting: a handler that is rebuilt loses nothing.
    fn define(&self, handler: &str, definition: Definition) -> Result<Arc<Family>, String> {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let owned = families.entry(definition.name.clone()).or_default();
        owned.retain(|o| o.family.strong_count() > 0);
        for other in owned.iter() {
            let Some(family) = other.family.upgrade() else {
                continue;
            };
            if family.definition == definition {
                return Ok(family);
            }
            let differ = family.definition.shape.kind != definition.shape.kind
                || family.definition.shape.bounds != definition.shape.bounds;
            if differ && other.handler != handler {
                return Err(format!(
                    "metric {} is defined differently by {}",
                    definition.name, other.handler
                ));
            }
        }
        let family = Arc::new(Family {
            definition,
            series: Table::default(),
        });
        owned.push(Owned {
            handler: handler.to_owned(),
            family: Arc::downgrade(&family),
        });
        Ok(family)
    }

    /// Everything, as `text/plain; version=0.0.4`. Drops what has expired.
    pub fn render(&self) -> String {
        let now = self.clock.now();
        let mut families: Vec<Vec<Arc<Family>>> = Vec::new();
        {
            let mut all = self.families.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, owned| {
                owned.retain(|o| o.family.strong_count() > 0);
                families.push(owned.iter().filter_map(|o| o.family.upgrade()).collect());
                !owned.is_empty()
            });
        }
        let mut out = String::new();
        for same_name in families {
            let mut has_head = false;
            for family in same_name {
                family.render(now, &mut has_head, &mut out);
            }
        }
        out
    }
}

impl Family {
    fn render(&self, now: Duration, has_head: &mut bool, out: &mut String) {
        let Definition {
            name,
            help,
            labels,
            shape,
        } = &self.definition;
        self.series.read(shape, now, |all| {
            if all.is_empty() {
                return;
            }
            if !std::mem::replace(has_head, true) {
                let kind = match shape.kind {
                    Kind::Counter => "counter",
                    Kind::Gauge => "gauge",
                    Kind::Distribution => "histogram",
                };
                let help = help.replace('\\', "\\\\").replace('\n', "\\n");
                let _infallible = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            }
            for (values, series) in all {
                let pairs: Vec<String> = labels
                    .iter()
                    .zip(values.iter())
                    .map(|(label, value)| format!("{label}=\"{}\"", escape(value)))
                    .collect();
                let pairs = pairs.join(",");
                if shape.kind != Kind::Distribution {
                    line(out, name, "", &pairs, &go_float(series.value));
                    continue;
                }
                let comma = if pairs.is_empty() { "" } else { "," };
                let mut count = 0;
                let texts = shape
                    .bounds
                    .iter()
                    .map(|b| go_float(*b))
                    .chain(["+Inf".to_owned()]);
                for (bound, observed) in texts.zip(series.buckets.iter()) {
                    count += observed;
                    let pairs = format!("{pairs}{comma}le=\"{bound}\"");
                    line(out, name, "_bucket", &pairs, &count.to_string());
                }
                line(out, name, "_sum", &pairs, &go_float(series.value));
                line(out, name, "_count", &pairs, &count.to_string());
            }
        });
    }
}

fn line(out: &mut String, name: &str, suffix: &str, pairs: &str, value: &str) {
    out.push_str(name);
    out.push_str(suffix);
    if !pairs.is_empty() {
        let _infallible = write!(out, "{{{pairs}}}");
    }
    let _infallible = writeln!(out, " {value}");
}

fn escape(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// A number as Go prints it, because label `le` is compared as text: `0.005`, `100000`, `1e+06`.
fn go_float(number: f64) -> String {
    if number.is_infinite() {
        return if number > 0.0 {
            "+Inf".into()
        } else {
            "-Inf".into()
        };
    }
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..6).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    } else {
        number.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(kind: Kind, bounds: &[f64]) -> Definition {
        Definition {
            name: "istio_x".into(),
            help: "x".into(),
            labels: vec!["a".into(), "b".into()],
            shape: Shape {
                kind,
                bounds: bounds.to_vec(),
                expiry: Some(Duration::from_secs(60)),
            },
        }
    }

    impl Family {
        fn record(&self, labels: &[Text], sample: f64, now: Duration) -> Result<Recorded, String> {
            self.series
                .record(&self.definition.shape, labels, sample, now)
        }
    }

    fn labels(a: &str, b: &str) -> [Text; 2] {
        [Text::from(a), Text::from(b)]
    }

    #[test]
    fn numbers_are_printed_as_go_does() {
        for (number, text) in [
            (0.0, "0"),
            (0.005, "0.005"),
            (1.0, "1"),
            (100_000.0, "100000"),
            (1e6, "1e+06"),
            (1e8, "1e+08"),
            (0.00001, "1e-05"),
            (2.5, "2.5"),
            (1_234_567.5, "1.2345675e+06"),
            (f64::INFINITY, "+Inf"),
        ] {
            assert_eq!(go_float(number), text);
        }
        for number in [1_234_567.0, 123_456_789_012.5, 1.5e300, 12_345.678] {
            assert_eq!(go_float(number).parse::<f64>(), Ok(number));
        }
    }

    #[test]
    fn what_is_recorded_is_rendered() {
        let exposition = Exposition::new(Clock::manual());
        let counter = exposition
            .define("h", definition(Kind::Counter, &[]))
            .unwrap();
        counter
            .record(&labels("1", "q\"\\\n"), 2.0, Duration::ZERO)
            .unwrap();
        counter
            .record(&labels("1", "q\"\\\n"), 0.5, Duration::ZERO)
            .unwrap();
        assert!(
            counter
                .record(&labels("1", ""), -1.0, Duration::ZERO)
                .is_err()
        );
        assert_eq!(
            exposition.render(),
            "# HELP istio_x x\n# TYPE istio_x counter\nistio_x{a=\"1\",b=\"q\\\"\\\\\\n\"} 2.5\n"
        );
        drop(counter);
        assert_eq!(exposition.render(), "", "metrics go with their handler");
    }

    #[test]
    fn distributions_are_cumulative() {
        let exposition = Exposition::new(Clock::manual());
        let family = exposition
            .define("h", definition(Kind::Distribution, &[1.0, 10.0]))
            .unwrap();
        for sample in [0.5, 1.0, 3.0, 100.0] {
            family
                .record(&labels("1", "2"), sample, Duration::ZERO)
                .unwrap();
        }
        assert_eq!(
            exposition.render(),
            "# HELP istio_x x\n# TYPE istio_x histogram\n\
             istio_x_bucket{a=\"1\",b=\"2\",le=\"1\"} 2\n\
             istio_x_bucket{a=\"1\",b=\"2\",le=\"10\"} 3\n\
             istio_x_bucket{a=\"1\",b=\"2\",le=\"+Inf\"} 4\n\
             istio_x_sum{a=\"1\",b=\"2\"} 104.5\n\
             istio_x_count{a=\"1\",b=\"2\"} 4\n"
        );
    }

    #[test]
    fn idle_series_expire_and_crowds_are_counted_together() {
        let clock = Clock::manual();
        let exposition = Exposition::new(clock.clone());
        let family = exposition
            .define("h", definition(Kind::Counter, &[]))
            .unwrap();
        for i in 0..MAX_SERIES + 5 {
            let recorded = family.record(&labels(&i.to_string(), ""), 1.0, clock.now());
            let want = if i < MAX_SERIES {
                Recorded::Apart
            } else {
                Recorded::Together
            };
            assert_eq!(recorded, Ok(want));
        }
        let shown = exposition.render();
        assert_eq!(shown.lines().count(), 2 + MAX_SERIES + 1);
        assert!(shown.contains("istio_x{a=\"overflow\",b=\"overflow\"} 5\n"));
        family.record(&labels("7", ""), 1.0, clock.now()).unwrap();
        clock.advance(Duration::from_secs(60));
        family
            .record(&labels("one more", ""), 1.0, clock.now())
            .unwrap();
        assert_eq!(exposition.render().lines().count(), 3);
    }

    #[test]
    fn a_rebuilt_handler_goes_on_counting() {
        let exposition = Exposition::new(Clock::manual());
        let old = exposition
            .define("h", definition(Kind::Counter, &[]))
            .unwrap();
        old.record(&labels("1", "2"), 1.0, Duration::ZERO).unwrap();
        let new = exposition
            .define("h", definition(Kind::Counter, &[]))
            .unwrap();
        assert!(Arc::ptr_eq(&old, &new));
        assert!(
            exposition
                .define("other", definition(Kind::Gauge, &[]))
                .is_err()
        );
        assert!(exposition.define("h", definition(Kind::Gauge, &[])).is_ok());
    }
}
