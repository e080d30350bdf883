//! Metrics added up here and sent now and then, as cumulative sums since each series began.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lateen_adapter::{
    BuildError, Clock, Counter, Env, HandlerError, InstanceType, Text, ValueType, instance::Metric,
    value,
};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse},
    common::v1::{KeyValue, any_value},
    metrics::v1::{
        self as otlp, AggregationTemporality, Gauge, Histogram, HistogramDataPoint,
        NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::{
    attribute,
    signal::{Collector, partly, scope},
    text,
};
use crate::adapter::{
    export::{GRACE, SendError},
    series::{Buckets, Kind, OVERFLOW, Recorded, Series, Shape, Table},
};

/// A series that nobody writes to goes.
const EXPIRY: Duration = Duration::from_secs(600);

/// A metric as written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawMetric {
    #[serde(alias = "instance_name")]
    instance_name: String,
    name: String,
    description: String,
    unit: String,
    kind: Option<Kind>,
    buckets: Option<Buckets>,
}

/// All metrics of a handler.
#[derive(Debug, Default)]
pub(super) struct Instruments(Vec<Instrument>);

#[derive(Debug)]
struct Instrument {
    instance: String,
    name: String,
    description: String,
    unit: String,
    shape: Shape,
    /// Its labels are the dimensions, in the order of their names.
    series: Table,
    dimensions: std::sync::OnceLock<Vec<Arc<str>>>,
}

impl Instruments {
    pub(super) fn new(raw: Vec<RawMetric>) -> Result<Self, Vec<String>> {
        let mut all: Vec<Instrument> = Vec::new();
        let mut problems = Vec::new();
        for metric in raw {
            if metric.instance_name.is_empty() {
                problems.push("metrics: a metric has no instanceName".to_owned());
                continue;
            }
            let name = if metric.name.is_empty() {
                metric
                    .instance_name
                    .split('.')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            } else {
                metric.name
            };
            if all.iter().any(|m| m.name == name) {
                problems.push(format!("metrics: {name} is defined twice"));
            }
            match Shape::new(metric.kind, metric.buckets.as_ref(), Some(EXPIRY)) {
                Err(problem) => problems.push(format!("metrics: {name}: {problem}")),
                Ok(shape) => all.push(Instrument {
                    instance: metric.instance_name,
                    name,
                    description: metric.description,
                    unit: metric.unit,
                    shape,
                    series: Table::default(),
                    dimensions: std::sync::OnceLock::new(),
                }),
            }
        }
        if problems.is_empty() {
            Ok(Self(all))
        } else {
            Err(problems)
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is wrong with the metrics among `instances`.
    pub(super) fn problems(&self, instances: &[InstanceType]) -> Vec<String> {
        let mut problems = Vec::new();
        for instance in instances.iter().filter(|i| i.template == "metric") {
            if !self.0.iter().any(|m| *m.instance == *instance.name) {
                problems.push(format!(
                    "metrics: instance {} is sent here but no metric has it as instanceName",
                    instance.name
                ));
            }
            match instance.field("value") {
                Some(ValueType::Int64 | ValueType::Double | ValueType::Duration) => {}
                Some(other) => problems.push(format!(
                    "{}: its value is {other}, no number",
                    instance.name
                )),
                None => problems.push(format!("{} has no value", instance.name)),
            }
        }
        problems
    }

    /// Adds a sample to the metrics that want it. Says to how many it went beyond their budget.
    pub(super) fn record(&self, metric: &Metric, now: Duration) -> Result<u64, HandlerError> {
        let invalid = |what: &str| HandlerError::invalid(format!("{}: {what}", metric.name));
        let sample = metric.value.as_ref().and_then(value::number);
        let sample = sample
            .filter(|s| s.is_finite())
            .ok_or_else(|| invalid("its value is no number"))?;
        let mut together = 0;
        let wanted = self.0.iter().filter(|m| *m.instance == *metric.name);
        for instrument in wanted {
            // All instances of a name have the same dimensions, in the same order.
            let dimensions = instrument.dimensions.get_or_init(|| {
                metric
                    .dimensions
                    .iter()
                    .map(|(n, _)| Arc::clone(n))
                    .collect()
            });
            let labels: Vec<Text> = dimensions
                .iter()
                .map(|name| {
                    let mut all = metric.dimensions.iter();
                    all.find(|(n, _)| n == name).map_or(Text::EMPTY, |(_, v)| {
                        v.as_text()
                            .cloned()
                            .unwrap_or_else(|| Text::from(v.to_string()))
                    })
                })
                .collect();
            let recorded = instrument
                .series
                .record(&instrument.shape, &labels, sample, now)
                .map_err(|e| invalid(&e))?;
            together += u64::from(recorded == Recorded::Together);
        }
        Ok(together)
    }

    /// All there is, as OTLP has it. `epoch` is when the clock showed nothing.
    fn collect(&self, now: Duration, epoch: SystemTime) -> Vec<otlp::Metric> {
        let nanos = |at: Duration| {
            let since = (epoch + at).duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        };
        let metrics = self.0.iter().filter_map(|m| {
            let none = Vec::new();
            let names = m.dimensions.get().unwrap_or(&none);
            let data = m.series.read(&m.shape, now, |all| {
                (!all.is_empty()).then(|| data(&m.shape, names, all, nanos(now), &nanos))
            })?;
            Some(otlp::Metric {
                name: m.name.clone(),
                description: m.description.clone(),
                unit: m.unit.clone(),
                data: Some(data),
                ..otlp::Metric::default()
            })
        });
        metrics.collect()
    }
}

fn attributes(names: &[Arc<str>], labels: &[Text]) -> Vec<KeyValue> {
    if !labels.is_empty() && labels.iter().all(|l| *l == *OVERFLOW) {
        // Metrics SDK specification, cardinality limits.
        return vec![attribute(
            "otel.metric.overflow",
            any_value::Value::BoolValue(true),
        )];
    }
    let pairs = names.iter().zip(labels);
    pairs
        .map(|(name, label)| attribute(name, text(label)))
        .collect()
}

fn data(
    shape: &Shape,
    names: &[Arc<str>],
    all: &[(&[Text], &Series)],
    now: u64,
    nanos: &impl Fn(Duration) -> u64,
) -> Data {
    let temporality = AggregationTemporality::Cumulative.into();
    let numbers = |is_gauge: bool| {
        let points = all.iter().map(|(labels, series)| NumberDataPoint {
            attributes: attributes(names, labels),
            start_time_unix_nano: if is_gauge { 0 } else { nanos(series.begun) },
            time_unix_nano: if is_gauge { nanos(series.written) } else { now },
            value: Some(number_data_point::Value::AsDouble(series.value)),
            ..NumberDataPoint::default()
        });
        points.collect()
    };
    match shape.kind {
        Kind::Gauge => Data::Gauge(Gauge {
            data_points: numbers(true),
        }),
        Kind::Counter => Data::Sum(Sum {
            data_points: numbers(false),
            aggregation_temporality: temporality,
            is_monotonic: true,
        }),
        Kind::Distribution => {
            let points = all.iter().map(|(labels, series)| HistogramDataPoint {
                attributes: attributes(names, labels),
                start_time_unix_nano: nanos(series.begun),
                time_unix_nano: now,
                count: series.buckets.iter().sum(),
                sum: Some(series.value),
                bucket_counts: series.buckets.to_vec(),
                explicit_bounds: shape.bounds.clone(),
                ..HistogramDataPoint::default()
            });
            Data::Histogram(Histogram {
                data_points: points.collect(),
                aggregation_temporality: temporality,
            })
        }
    }
}

/// Held by the handler; when it goes, what there is is sent for the last time.
pub(super) type Alive = oneshot::Sender<()>;

/// Starts to send `instruments` every `interval`.
pub(super) fn start(
    env: &Env,
    handler: &str,
    instruments: &Arc<Instruments>,
    collector: Collector,
    resource: Resource,
    interval: Duration,
) -> Result<Alive, BuildError> {
    let (alive, gone) = oneshot::channel();
    let clock = env.clock().clone();
    let now = SystemTime::now();
    let sender = Sender {
        handler: handler.to_owned(),
        instruments: Arc::clone(instruments),
        collector,
        resource,
        epoch: now.checked_sub(clock.now()).unwrap_or(now),
        clock,
        refused: env.counter("records_refused"),
        failures: env.counter("send_failures"),
    };
    env.spawn_draining(GRACE, sender.run(interval, gone))
        .map_err(|e| BuildError(e.to_string()))?;
    Ok(alive)
}

struct Sender {
    handler: String,
    instruments: Arc<Instruments>,
    collector: Collector,
    resource: Resource,
    clock: Clock,
    epoch: SystemTime,
    refused: Counter,
    failures: Counter,
}

impl Sender {
    async fn run(self, interval: Duration, mut gone: oneshot::Receiver<()>) {
        loop {
            // `timeout` over the receiver by reference loses nothing: it only ever ends.
            let is_last = tokio::time::timeout(interval, &mut gone).await.is_ok();
            let metrics = self.instruments.collect(self.clock.now(), self.epoch);
            if !metrics.is_empty() {
                self.send(metrics).await;
            }
            if is_last {
                return;
            }
        }
    }

    /// What fails is not sent again: the next time says the same and more.
    async fn send(&self, metrics: Vec<otlp::Metric>) {
        let request = ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(self.resource.clone()),
                scope_metrics: vec![ScopeMetrics {
                    scope: scope(),
                    metrics,
                    ..ScopeMetrics::default()
                }],
                ..ResourceMetrics::default()
            }],
        };
        let path = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";
        let answer: Result<ExportMetricsServiceResponse, _> =
            self.collector.export(path, request).await;
        match answer {
            Ok(answer) => {
                if let Some(partial) = answer.partial_success {
                    let count = partial.rejected_data_points;
                    partly(&self.refused, count, &partial.error_message);
                }
            }
            Err(SendError::Again(problem) | SendError::Never(problem)) => {
                self.failures.inc();
                tracing::warn!(handler = %self.handler, problem, "metrics are not taken");
            }
        }
    }
}
