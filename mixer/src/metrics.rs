//! Mixer's metrics about itself, on the monitoring port. What users measure is the prometheus adapter's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lateen_adapter::{Counter as HandlerCounter, meter::Meter};
use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    },
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// How a call of a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(missing_docs, reason = "the label's values")]
pub enum Outcome {
    Answered,
    Failed,
    Panicked,
    Late,
    Refused,
}

/// Which call of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(missing_docs, reason = "the label's values")]
pub enum Method {
    Check,
    Report,
}

/// Name of a configured object as a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Name(Arc<str>);

impl EncodeLabelValue for Name {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&&*self.0, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DispatchLabels {
    handler: Name,
    adapter: &'static str,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandlerLabels {
    handler: Name,
    adapter: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: Method,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabels {
    rule: Name,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TriedLabels {
    rule: Name,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct EventLabels {
    handler: Name,
    adapter: &'static str,
    event: &'static str,
}

/// What handlers count of themselves. A counter stays when its handler is rebuilt or gone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Events(Arc<Mutex<BTreeMap<EventLabels, HandlerCounter>>>);

impl Events {
    /// The counters of one handler.
    pub(crate) fn of(&self, handler: &Arc<str>, adapter: &'static str) -> Arc<dyn Meter> {
        Arc::new(HandlerMeter {
            events: self.clone(),
            handler: Name(Arc::clone(handler)),
            adapter,
        })
    }
}

struct HandlerMeter {
    events: Events,
    handler: Name,
    adapter: &'static str,
}

impl Meter for HandlerMeter {
    fn counter(&self, event: &'static str) -> HandlerCounter {
        let labels = EventLabels {
            handler: self.handler.clone(),
            adapter: self.adapter,
            event,
        };
        let mut all = self.events.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(labels).or_default().clone()
    }
}

impl Collector for Events {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "mixer_adapter_events",
            "What handlers count of themselves",
            None,
            MetricType::Counter,
        )?;
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (labels, counter) in &*all {
            let one = family.encode_family(labels)?;
            ConstCounter::new(counter.get()).encode(one)?;
        }
        Ok(())
    }
}

/// 50 µs to 13 s: a handler in memory, and one that has hit the longest deadline.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(5e-5, 4.0, 10))
}

/// All of them. Labels name configured objects only, so their number is the configuration's.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    dispatches: Family<DispatchLabels, Counter>,
    dispatch_seconds: Family<HandlerLabels, Histogram, fn() -> Histogram>,
    match_errors: Family<RuleLabels, Counter>,
    instance_errors: Family<RuleLabels, Counter>,
    tried: Family<TriedLabels, Counter>,
    sampled_out: Family<RuleLabels, Counter>,
    unknown_quotas: Counter,
    reported: Counter,
    ignored_attributes: Counter,
    pub(crate) events: Events,
    pub(crate) generation: Gauge,
    pub(crate) rules: Gauge,
    pub(crate) problems: Gauge,
    pub(crate) refused: Gauge,
    pub(crate) held: Gauge,
    pub(crate) workloads: Gauge,
}

impl Metrics {
    /// Zero, and told to `registry`.
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let metrics = Self {
            requests: Family::default(),
            dispatches: Family::default(),
            dispatch_seconds: Family::new_with_constructor(seconds),
            match_errors: Family::default(),
            instance_errors: Family::default(),
            tried: Family::default(),
            sampled_out: Family::default(),
            unknown_quotas: Counter::default(),
            reported: Counter::default(),
            ignored_attributes: Counter::default(),
            events: Events::default(),
            generation: Gauge::default(),
            rules: Gauge::default(),
            problems: Gauge::default(),
            refused: Gauge::default(),
            held: Gauge::default(),
            workloads: Gauge::default(),
        };
        let m = &metrics;
        registry.register_collector(Box::new(m.events.clone()));
        let mixer = registry.sub_registry_with_prefix("mixer");
        mixer.register("requests", "Calls of the API by result", m.requests.clone());
        mixer.register(
            "dispatches",
            "Calls of handlers by outcome",
            m.dispatches.clone(),
        );
        mixer.register(
            "dispatch_seconds",
            "Time handlers take",
            m.dispatch_seconds.clone(),
        );
        mixer.register(
            "match_errors",
            "Matches that failed",
            m.match_errors.clone(),
        );
        mixer.register(
            "instance_errors",
            "Instances that failed",
            m.instance_errors.clone(),
        );
        mixer.register(
            "dry_run_verdicts",
            "What rules that are only tried would have done",
            m.tried.clone(),
        );
        mixer.register(
            "sampled_out",
            "Reports that sampling left out",
            m.sampled_out.clone(),
        );
        mixer.register(
            "unknown_quotas",
            "Quotas asked for that no rule has",
            m.unknown_quotas.clone(),
        );
        mixer.register("reported", "Attribute sets taken", m.reported.clone());
        mixer.register(
            "ignored_attributes",
            "Attributes received that no manifest declares",
            m.ignored_attributes.clone(),
        );
        mixer.register(
            "config_generation",
            "Generation in force",
            m.generation.clone(),
        );
        mixer.register("config_rules", "Rules in force", m.rules.clone());
        mixer.register(
            "config_problems",
            "Objects refused or doubtful",
            m.problems.clone(),
        );
        mixer.register("config_refused", "Objects refused", m.refused.clone());
        mixer.register(
            "config_held",
            "Objects refused whose last good version is in force",
            m.held.clone(),
        );
        mixer.register("workloads", "Workloads known", m.workloads.clone());
        Arc::new(metrics)
    }

    pub(crate) fn dispatched(
        &self,
        handler: &Arc<str>,
        adapter: &'static str,
        outcome: Outcome,
        took: Duration,
    ) {
        let handler = Name(Arc::clone(handler));
        self.dispatches
            .get_or_create(&DispatchLabels {
                handler: handler.clone(),
                adapter,
                outcome,
            })
            .inc();
        self.dispatch_seconds
            .get_or_create(&HandlerLabels { handler, adapter })
            .observe(took.as_secs_f64());
    }

    pub(crate) fn answered(&self, method: Method, code: &'static str) {
        self.requests
            .get_or_create(&RequestLabels { method, code })
            .inc();
    }

    pub(crate) fn match_failed(&self, rule: &Arc<str>) {
        self.match_errors
            .get_or_create(&RuleLabels {
                rule: Name(Arc::clone(rule)),
            })
            .inc();
    }

    pub(crate) fn instance_failed(&self, rule: &Arc<str>) {
        self.instance_errors
            .get_or_create(&RuleLabels {
                rule: Name(Arc::clone(rule)),
            })
            .inc();
    }

    pub(crate) fn tried(&self, rule: &Arc<str>, code: &'static str) {
        let rule = Name(Arc::clone(rule));
        self.tried.get_or_create(&TriedLabels { rule, code }).inc();
    }

    pub(crate) fn sampled_out(&self, rule: &Arc<str>) {
        let rule = Name(Arc::clone(rule));
        self.sampled_out.get_or_create(&RuleLabels { rule }).inc();
    }

    pub(crate) fn unknown_quota(&self) {
        self.unknown_quotas.inc();
    }

    pub(crate) fn took(&self, sets: usize, ignored: u32) {
        self.reported.inc_by(sets as u64);
        self.ignored_attributes.inc_by(u64::from(ignored));
    }
}
