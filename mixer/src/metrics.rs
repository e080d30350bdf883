//! Mixer's metrics about itself, on the monitoring port. What users measure is the prometheus adapter's.

mod handlers;
mod latency;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lateen_adapter::{
    Counter as HandlerCounter,
    meter::{Gauge as HandlerGauge, Meter},
};
use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
    },
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

use crate::config::rule::Rule;
pub(crate) use handlers::{Configured, HandlerStats, RuleStats};
use latency::Latency;

/// How a call of a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the label's values")]
pub enum Outcome {
    Answered,
    Failed,
    Panicked,
    Late,
    Refused,
}

impl Outcome {
    /// All of them, in order.
    pub(crate) const ALL: [Self; 5] = [
        Self::Answered,
        Self::Failed,
        Self::Panicked,
        Self::Late,
        Self::Refused,
    ];

    /// The label's value.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Answered => "Answered",
            Self::Failed => "Failed",
            Self::Panicked => "Panicked",
            Self::Late => "Late",
            Self::Refused => "Refused",
        }
    }
}

/// Why a call was not taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Shed {
    /// Too many are under way.
    TooMany,
    /// The program is too late.
    Delay,
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
struct RequestLabels {
    method: Method,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShedLabels {
    method: Method,
    reason: Shed,
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
pub(crate) struct Events {
    counters: Arc<Mutex<BTreeMap<EventLabels, HandlerCounter>>>,
    /// `event` is the queue.
    queues: Arc<Mutex<BTreeMap<EventLabels, HandlerGauge>>>,
}

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

impl Events {
    fn counts(&self) -> Vec<(EventLabels, u64)> {
        let all = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(l, c)| (l.clone(), c.get())).collect()
    }

    fn levels(&self) -> Vec<(EventLabels, i64)> {
        let all = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(l, g)| (l.clone(), g.get())).collect()
    }

    /// Events and queues of one handler, by name.
    pub(crate) fn told(
        &self,
        handler: &str,
    ) -> (BTreeMap<&'static str, u64>, BTreeMap<&'static str, i64>) {
        let is_its = |l: &EventLabels| *l.handler.0 == *handler;
        let counts = self.counts().into_iter().filter(|(l, _)| is_its(l));
        let levels = self.levels().into_iter().filter(|(l, _)| is_its(l));
        (
            counts.map(|(l, count)| (l.event, count)).collect(),
            levels.map(|(l, level)| (l.event, level)).collect(),
        )
    }
}

struct HandlerMeter {
    events: Events,
    handler: Name,
    adapter: &'static str,
}

impl HandlerMeter {
    fn labels(&self, event: &'static str) -> EventLabels {
        EventLabels {
            handler: self.handler.clone(),
            adapter: self.adapter,
            event,
        }
    }
}

impl Meter for HandlerMeter {
    fn counter(&self, event: &'static str) -> HandlerCounter {
        let mut all = self
            .events
            .counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.entry(self.labels(event)).or_default().clone()
    }

    fn gauge(&self, queue: &'static str) -> HandlerGauge {
        let mut all = self
            .events
            .queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.entry(self.labels(queue)).or_default().clone()
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
        for (labels, count) in self.counts() {
            let one = family.encode_family(&labels)?;
            ConstCounter::new(count).encode(one)?;
        }
        let mut family = encoder.encode_descriptor(
            "mixer_adapter_queue",
            "What waits in queues of handlers",
            None,
            MetricType::Gauge,
        )?;
        for (labels, level) in self.levels() {
            let labels = [
                ("handler", &*labels.handler.0),
                ("adapter", labels.adapter),
                ("queue", labels.event),
            ];
            let one = family.encode_family(&labels)?;
            ConstGauge::new(level).encode(one)?;
        }
        Ok(())
    }
}

/// Time that calls of the API take, without their way here.
#[derive(Debug, Default)]
struct RequestSeconds {
    check: Latency,
    report: Latency,
}

impl RequestSeconds {
    fn of(&self, method: Method) -> &Latency {
        match method {
            Method::Check => &self.check,
            Method::Report => &self.report,
        }
    }
}

/// What Mixer measures of itself as a whole.
#[derive(Debug)]
struct Own {
    seconds: Arc<RequestSeconds>,
    delay_micros: Arc<AtomicU64>,
}

impl Collector for Own {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "mixer_request_seconds",
            "Time that calls of the API take here",
            None,
            MetricType::Histogram,
        )?;
        for (method, name) in [(Method::Check, "Check"), (Method::Report, "Report")] {
            let labels = [("method", name)];
            let one = family.encode_family(&labels)?;
            self.seconds.of(method).encode(one)?;
        }
        let delay = encoder.encode_descriptor(
            "mixer_delay_seconds",
            "How late the program comes to what is due",
            None,
            MetricType::Gauge,
        )?;
        let delay_micros = self.delay_micros.load(Ordering::Relaxed);
        ConstGauge::new(Duration::from_micros(delay_micros).as_secs_f64()).encode(delay)
    }
}

/// All of them. Labels name configured objects only, so their number is the configuration's.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    /// Of `requests`, those that nearly all calls count in: made by the first, then found without a search.
    checked: OnceLock<Counter>,
    taken: OnceLock<Counter>,
    request_seconds: Arc<RequestSeconds>,
    shed: Family<ShedLabels, Counter>,
    delay_micros: Arc<AtomicU64>,
    pub(crate) configured: Configured,
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
            checked: OnceLock::new(),
            taken: OnceLock::new(),
            request_seconds: Arc::default(),
            shed: Family::default(),
            delay_micros: Arc::default(),
            configured: Configured::default(),
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
        registry.register_collector(Box::new(m.configured.clone()));
        registry.register_collector(Box::new(Own {
            seconds: Arc::clone(&m.request_seconds),
            delay_micros: Arc::clone(&m.delay_micros),
        }));
        let mixer = registry.sub_registry_with_prefix("mixer");
        mixer.register("requests", "Calls of the API by result", m.requests.clone());
        mixer.register("shed", "Calls that were not taken on", m.shed.clone());
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

    /// A call of the API has ended.
    pub(crate) fn answered(&self, method: Method, code: &'static str, took: Duration) {
        self.request_seconds.of(method).observe(took);
        let counter = || {
            let labels = RequestLabels { method, code };
            self.requests.get_or_create_owned(&labels)
        };
        match (method, code) {
            (Method::Check, "OK") => self.checked.get_or_init(counter).inc(),
            (Method::Report, "OK") => self.taken.get_or_init(counter).inc(),
            _ => counter().inc(),
        };
    }

    /// A call was not taken on.
    pub(crate) fn shed(&self, method: Method, reason: Shed) {
        self.shed
            .get_or_create(&ShedLabels { method, reason })
            .inc();
    }

    /// Calls that were not taken on.
    #[cfg(test)]
    pub(crate) fn shed_total(&self) -> u64 {
        let all = [Method::Check, Method::Report]
            .into_iter()
            .flat_map(|method| {
                [Shed::TooMany, Shed::Delay].map(|reason| ShedLabels { method, reason })
            });
        all.map(|labels| self.shed.get_or_create(&labels).get())
            .sum()
    }

    /// How late the program is.
    pub(crate) fn late(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.delay_micros.store(micros, Ordering::Relaxed);
    }

    /// What is counted of a rule: looked up once for each version of it.
    fn rule<'a>(&self, rule: &'a Rule) -> &'a RuleStats {
        rule.stats.get_or_init(|| self.configured.rule(&rule.name))
    }

    /// A rule applied to so many checks or reports.
    pub(crate) fn rule_matched(&self, rule: &Rule, times: u64) {
        let stats = self.rule(rule);
        stats.matched.fetch_add(times, Ordering::Relaxed);
    }

    /// A handler has answered what a rule asked it.
    pub(crate) fn rule_asked(&self, rule: &Rule, took: Duration) {
        self.rule(rule).took.observe(took);
    }

    /// A check is denied if it is up to a rule.
    pub(crate) fn rule_denied(&self, rule: &Rule) {
        let stats = self.rule(rule);
        stats.denied.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn match_failed(&self, rule: &Rule) {
        let stats = self.rule(rule);
        stats.match_errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn instance_failed(&self, rule: &Rule) {
        let stats = self.rule(rule);
        stats.instance_errors.fetch_add(1, Ordering::Relaxed);
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
