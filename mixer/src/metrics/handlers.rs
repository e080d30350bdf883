//! What is counted of each handler and each rule. The counters stay while the handler or rule is configured,
//! also when it is built anew, and go with it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::{Outcome, latency::Latency};

/// Templates of one handler that are told apart; no adapter takes so many.
const MAX_TEMPLATES: usize = 64;

/// What is counted of one handler.
#[derive(Debug)]
pub(crate) struct HandlerStats {
    name: Arc<str>,
    adapter: &'static str,
    under_way: AtomicI64,
    by_template: RwLock<Vec<Arc<TemplateStats>>>,
}

#[derive(Debug)]
struct TemplateStats {
    template: Box<str>,
    outcomes: [AtomicU64; Outcome::ALL.len()],
    took: Latency,
}

/// A call under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay<'a>(&'a AtomicI64);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl HandlerStats {
    fn new(name: &Arc<str>, adapter: &'static str) -> Self {
        Self {
            name: Arc::clone(name),
            adapter,
            under_way: AtomicI64::new(0),
            by_template: RwLock::default(),
        }
    }

    /// A call begins.
    pub(crate) fn begin(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(&self.under_way)
    }

    /// Calls under way.
    pub(crate) fn under_way(&self) -> i64 {
        self.under_way.load(Ordering::Relaxed)
    }

    /// A call with instances of `template` has ended.
    pub(crate) fn ended(&self, template: &str, outcome: Outcome, took: Duration) {
        let count = |stats: &TemplateStats| {
            if let Some(counter) = stats.outcomes.get(outcome as usize) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            stats.took.observe(took);
        };
        {
            let known = self
                .by_template
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(stats) = known.iter().find(|s| *s.template == *template) {
                return count(stats);
            }
        }
        let mut known = self
            .by_template
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let stats = match known.iter().find(|s| *s.template == *template) {
            Some(stats) => Arc::clone(stats),
            None if known.len() >= MAX_TEMPLATES => return,
            None => {
                let stats = Arc::new(TemplateStats {
                    template: template.into(),
                    outcomes: Default::default(),
                    took: Latency::default(),
                });
                known.push(Arc::clone(&stats));
                stats
            }
        };
        drop(known);
        count(&stats);
    }

    /// Calls that have ended, and how long they took in all; and how many of them brought no answer.
    pub(crate) fn totals(&self) -> (u64, Duration, u64) {
        let known = self
            .by_template
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut totals = (0, Duration::ZERO, 0);
        for stats in known.iter() {
            let outcomes = stats.outcomes.iter().map(|c| c.load(Ordering::Relaxed));
            totals.0 += stats.took.count();
            totals.1 += stats.took.total();
            totals.2 += outcomes.skip(Outcome::Answered as usize + 1).sum::<u64>();
        }
        totals
    }
}

/// What is counted of one rule.
#[derive(Debug, Default)]
pub(crate) struct RuleStats {
    pub(crate) matched: AtomicU64,
    pub(crate) denied: AtomicU64,
    pub(crate) match_errors: AtomicU64,
    pub(crate) instance_errors: AtomicU64,
    /// From its match to the answer of a handler.
    pub(crate) took: Latency,
}

/// All handlers and rules that are configured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configured(Arc<Inner>);

#[derive(Default)]
struct Inner {
    handlers: Mutex<BTreeMap<Arc<str>, Arc<HandlerStats>>>,
    rules: RwLock<HashMap<Arc<str>, Arc<RuleStats>>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configured").finish_non_exhaustive()
    }
}

impl Configured {
    /// The counters of handler `name`, the same as before if it had some.
    pub(crate) fn handler(&self, name: &Arc<str>, adapter: &'static str) -> Arc<HandlerStats> {
        let mut all = self
            .0
            .handlers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = all.get(name).filter(|stats| stats.adapter == adapter);
        if let Some(stats) = known {
            return Arc::clone(stats);
        }
        let stats = Arc::new(HandlerStats::new(name, adapter));
        all.insert(Arc::clone(name), Arc::clone(&stats));
        stats
    }

    /// The counters of rule `name`.
    pub(crate) fn rule(&self, name: &Arc<str>) -> Arc<RuleStats> {
        {
            let all = self.0.rules.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(stats) = all.get(name) {
                return Arc::clone(stats);
            }
        }
        let mut all = self.0.rules.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(Arc::clone(name)).or_default())
    }

    /// The counters of rule `name`, if it has done anything yet.
    pub(crate) fn known_rule(&self, name: &str) -> Option<Arc<RuleStats>> {
        let all = self.0.rules.read().unwrap_or_else(PoisonError::into_inner);
        all.get(name).cloned()
    }

    /// Lets go of rules that are not configured any more, and of handlers that nobody holds.
    pub(crate) fn retain(&self, is_rule: impl Fn(&str) -> bool) {
        let mut rules = self.0.rules.write().unwrap_or_else(PoisonError::into_inner);
        rules.retain(|name, _| is_rule(name));
        drop(rules);
        let mut handlers = self
            .0
            .handlers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        handlers.retain(|_, stats| Arc::strong_count(stats) > 1);
    }

    fn handlers(&self) -> Vec<Arc<HandlerStats>> {
        let all = self
            .0
            .handlers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.values().cloned().collect()
    }

    fn rules(&self) -> Vec<(Arc<str>, Arc<RuleStats>)> {
        let all = self.0.rules.read().unwrap_or_else(PoisonError::into_inner);
        let all = all
            .iter()
            .map(|(name, stats)| (Arc::clone(name), Arc::clone(stats)));
        let mut all: Vec<_> = all.collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

type Written = Result<(), std::fmt::Error>;

impl Configured {
    fn encode_handlers(&self, encoder: &mut DescriptorEncoder<'_>) -> Written {
        let handlers = self.handlers();
        let mut each = |name: &str,
                        help: &str,
                        kind: MetricType,
                        write: &mut dyn FnMut(
            &HandlerStats,
            &TemplateStats,
            &mut MetricEncoder<'_>,
        ) -> Written|
         -> Written {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for handler in &handlers {
                let templates = handler
                    .by_template
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                for stats in &templates {
                    write(handler, stats, &mut family)?;
                }
            }
            Ok(())
        };
        each(
            "mixer_dispatches",
            "Calls of handlers by outcome",
            MetricType::Counter,
            &mut |handler, stats, family| {
                for (outcome, counter) in Outcome::ALL.iter().zip(&stats.outcomes) {
                    let count = counter.load(Ordering::Relaxed);
                    if count == 0 {
                        continue;
                    }
                    let labels = [
                        ("handler", &*handler.name),
                        ("adapter", handler.adapter),
                        ("template", &*stats.template),
                        ("outcome", outcome.name()),
                    ];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
                Ok(())
            },
        )?;
        each(
            "mixer_dispatch_seconds",
            "Time that calls of handlers take",
            MetricType::Histogram,
            &mut |handler, stats, family| {
                let labels = [
                    ("handler", &*handler.name),
                    ("adapter", handler.adapter),
                    ("template", &*stats.template),
                ];
                stats.took.encode(family.encode_family(&labels)?)
            },
        )?;
        let mut family = encoder.encode_descriptor(
            "mixer_handler_calls",
            "Calls of handlers under way",
            None,
            MetricType::Gauge,
        )?;
        for handler in &handlers {
            let labels = [("handler", &*handler.name), ("adapter", handler.adapter)];
            ConstGauge::new(handler.under_way()).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn encode_rules(&self, encoder: &mut DescriptorEncoder<'_>) -> Written {
        type Read = fn(&RuleStats) -> &AtomicU64;
        let rules = self.rules();
        let counters: [(&str, &str, Read); 4] = [
            (
                "mixer_rule_matches",
                "Checks and reports that rules applied to",
                |r| &r.matched,
            ),
            ("mixer_rule_denials", "Checks that rules had denied", |r| {
                &r.denied
            }),
            ("mixer_match_errors", "Matches that failed", |r| {
                &r.match_errors
            }),
            ("mixer_instance_errors", "Instances that failed", |r| {
                &r.instance_errors
            }),
        ];
        for (name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (rule, stats) in &rules {
                let count = read(stats).load(Ordering::Relaxed);
                if count > 0 {
                    let labels = [("rule", &**rule)];
                    let one = family.encode_family(&labels)?;
                    ConstCounter::new(count).encode(one)?;
                }
            }
        }
        let mut family = encoder.encode_descriptor(
            "mixer_rule_seconds",
            "Time from a rule's match to a handler's answer, in checks",
            None,
            MetricType::Histogram,
        )?;
        for (rule, stats) in rules.iter().filter(|(_, stats)| stats.took.count() > 0) {
            stats
                .took
                .encode(family.encode_family(&[("rule", &**rule)])?)?;
        }
        Ok(())
    }
}

impl Collector for Configured {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.encode_handlers(&mut encoder)?;
        self.encode_rules(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    fn shown(configured: &Configured) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(configured.clone()));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn counters_live_as_long_as_what_they_count() {
        let configured = Configured::default();
        let name = Arc::from("h.handler.ns");
        let handler = configured.handler(&name, "denier");
        handler.ended("checknothing", Outcome::Late, Duration::from_micros(30));
        let under_way = handler.begin();
        let rule = configured.rule(&Arc::from("r.rule.ns"));
        rule.denied.fetch_add(2, Ordering::Relaxed);
        rule.took.observe(Duration::from_millis(1));

        // Built anew: it goes on counting.
        drop(under_way);
        let again = configured.handler(&name, "denier");
        drop(handler);
        configured.retain(|_| true);
        again.ended("checknothing", Outcome::Late, Duration::from_secs(60));
        assert_eq!(again.totals(), (2, Duration::from_micros(60_000_030), 2));
        let text = shown(&configured);
        for line in [
            r#"mixer_dispatches_total{handler="h.handler.ns",adapter="denier",template="checknothing",outcome="Late"} 2"#,
            r#"mixer_dispatch_seconds_bucket{le="0.00002",handler="h.handler.ns",adapter="denier",template="checknothing"} 0"#,
            r#"mixer_dispatch_seconds_bucket{le="+Inf",handler="h.handler.ns",adapter="denier",template="checknothing"} 2"#,
            r#"mixer_handler_calls{handler="h.handler.ns",adapter="denier"} 0"#,
            r#"mixer_rule_denials_total{rule="r.rule.ns"} 2"#,
            r#"mixer_rule_seconds_count{rule="r.rule.ns"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }

        drop(again);
        configured.retain(|_| false);
        let text = shown(&configured);
        assert!(
            !text.contains("h.handler.ns") && !text.contains("r.rule.ns"),
            "{text}"
        );
    }
}
