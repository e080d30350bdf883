//! Mixer's metrics about itself, on the monitoring port. What users measure is the prometheus adapter's.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        counter::Counter,
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
    unknown_quotas: Counter,
    reported: Counter,
    ignored_attributes: Counter,
    pub(crate) generation: Gauge,
    pub(crate) rules: Gauge,
    pub(crate) problems: Gauge,
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
            unknown_quotas: Counter::default(),
            reported: Counter::default(),
            ignored_attributes: Counter::default(),
            generation: Gauge::default(),
            rules: Gauge::default(),
            problems: Gauge::default(),
            workloads: Gauge::default(),
        };
        let m = &metrics;
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

    pub(crate) fn unknown_quota(&self) {
        self.unknown_quotas.inc();
    }

    pub(crate) fn took(&self, sets: usize, ignored: u32) {
        self.reported.inc_by(sets as u64);
        self.ignored_attributes.inc_by(u64::from(ignored));
    }
}
