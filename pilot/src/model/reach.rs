//! Which requests Mixer's rules can matter for, so that proxies need not ask about the others.
//!
//! What is said here must never be less than the truth: a rule counts for a destination unless its match is
//! false whatever a request holds, and the rules that count are those of the configuration *and* those that a
//! Mixer may still have, because it has not acknowledged the newest yet or refuses part of it (the last good
//! version of an object stays in force there).

use std::collections::BTreeSet;
use std::sync::Arc;

use lateen_config::policy::MixerObject;
use lateen_config::{Object, Spec};
use lateen_engine::{AttributeTable, Expression, Language, Value, Verdict};
use serde_json::Value as Json;

/// Annotation that names the language of a rule's match.
const LANGUAGE: &str = "policy.istio.io/lang";
/// Annotation of a rule that denies where it is refused: `closed`.
const FAIL_MODE: &str = "policy.istio.io/fail-mode";

/// Older rules that are kept beside the newest; with more, everything counts until Mixer has caught up.
const MAX_OLDER: usize = 4;

/// Templates whose instances are only reported.
const REPORTED: [&str; 7] = [
    "metric",
    "logentry",
    "tracespan",
    "edge",
    "reportnothing",
    "servicecontrolreport",
    "svctrlreport",
];
/// Templates whose instances are only checked.
const CHECKED: [&str; 6] = [
    "checknothing",
    "listentry",
    "apikey",
    "authorization",
    "quota",
    "keyval",
];
/// Fields of a rule that change requests.
const HEADER_OPERATIONS: [&str; 4] = [
    "requestHeaderOperations",
    "request_header_operations",
    "responseHeaderOperations",
    "response_header_operations",
];
/// The template that tells of workloads.
const KUBERNETES: &str = "kubernetes";

/// What a proxy asks Mixer to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Check, quota apart: whoever has a quota asks.
    Check,
    /// Report.
    Report,
}

/// The rules that may be in force in some Mixer. By default everything counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reach {
    /// `None`: nothing is known of what Mixers have.
    sets: Option<Vec<Arc<Rules>>>,
}

impl Reach {
    /// Of newer rules, after `before`. `confirmed`: every Mixer has the newer ones, and refuses none.
    #[must_use]
    pub fn after(before: Option<&Reach>, newest: &Arc<Rules>, confirmed: bool) -> Reach {
        if confirmed {
            return Reach {
                sets: Some(vec![newest.clone()]),
            };
        }
        let Some(older) = before.and_then(|before| before.sets.as_ref()) else {
            return Reach::default();
        };
        let mut sets = vec![newest.clone()];
        sets.extend(older.iter().filter(|old| *old != newest).cloned());
        Reach {
            sets: (sets.len() <= MAX_OLDER).then_some(sets),
        }
    }

    /// Whether these are the rules of the configuration and no others.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.sets.as_ref().is_some_and(|sets| sets.len() == 1)
    }

    /// Whether some rule can matter for requests of which `known` is known, in what Mixer takes for their
    /// namespace. An attribute for which `known` has nothing may have any value.
    #[must_use]
    pub fn matters(
        &self,
        phase: Phase,
        namespace: &str,
        known: &dyn Fn(&str) -> Option<Value>,
    ) -> bool {
        self.sets
            .as_ref()
            .is_none_or(|sets| sets.iter().any(|set| set.matters(phase, namespace, known)))
    }
}

/// All rules of one configuration.
#[derive(Debug, Default, PartialEq)]
pub struct Rules {
    root: String,
    rules: Vec<Rule>,
    /// Attributes that generators write: what is known beforehand is then no use.
    generated: BTreeSet<String>,
    /// Generated attributes that are what Pilot itself knows of the workload.
    told: BTreeSet<String>,
}

#[derive(Debug)]
struct Rule {
    namespace: String,
    check: bool,
    report: bool,
    condition: Condition,
    /// Language and text of the match.
    text: (String, String),
}

#[derive(Debug)]
enum Condition {
    Always,
    /// It does not compile here, and Mixer has its own opinion.
    Unknown,
    Match(Expression),
}

/// By what is written; the same text and vocabulary compile to the same.
impl PartialEq for Rule {
    fn eq(&self, other: &Rule) -> bool {
        let compiles = |rule: &Rule| !matches!(rule.condition, Condition::Unknown);
        (&self.namespace, &self.text, self.check, self.report)
            == (&other.namespace, &other.text, other.check, other.report)
            && compiles(self) == compiles(other)
    }
}

impl Rules {
    /// Reads all rules there are, those included that Mixer will refuse.
    pub(super) fn read(objects: &[Arc<Object>], root: &str) -> Rules {
        let all: Vec<(&Object, &MixerObject)> = objects
            .iter()
            .filter_map(|object| match &object.spec {
                Spec::Mixer(mixer) => Some((&**object, mixer)),
                _ => None,
            })
            .collect();
        let manifests = all.iter().filter(|(_, m)| m.kind == "attributemanifest");
        let table = AttributeTable::from_manifests(manifests.map(|(_, m)| &m.spec)).0;
        let named = Named(&all);
        let rules = all.iter().filter(|(_, m)| m.kind == "rule");
        let generated = all.iter().flat_map(|(_, m)| bindings(m));
        Rules {
            root: root.to_owned(),
            rules: rules
                .map(|(object, rule)| Rule::read(object, rule, &table, &named))
                .collect(),
            generated: generated.map(|(attribute, _)| attribute.clone()).collect(),
            told: named.told(root),
        }
    }

    fn matters(
        &self,
        phase: Phase,
        namespace: &str,
        known: &dyn Fn(&str) -> Option<Value>,
    ) -> bool {
        let is_usable = |name: &str| {
            // Proxies do not send labels; without a generator there are none.
            let is_sent = !name.ends_with(".labels") && !self.generated.contains(name);
            is_sent || self.told.contains(name)
        };
        let known = |name: &str| is_usable(name).then(|| known(name)).flatten();
        // Which namespace's rules a request meets is read from attributes too.
        let is_scoped = [
            "context.reporter.kind",
            "source.namespace",
            "destination.namespace",
        ]
        .into_iter()
        .all(is_usable);
        self.rules.iter().any(|rule| {
            let concerns = !is_scoped || rule.namespace == self.root || rule.namespace == namespace;
            let does = match phase {
                Phase::Check => rule.check,
                Phase::Report => rule.report,
            };
            concerns
                && does
                && match &rule.condition {
                    Condition::Always | Condition::Unknown => true,
                    Condition::Match(condition) => condition.partial(&known) != Verdict::False,
                }
        })
    }
}

impl Rule {
    fn read(
        object: &Object,
        rule: &MixerObject,
        table: &AttributeTable,
        named: &Named<'_>,
    ) -> Rule {
        let language = object
            .annotations
            .get(LANGUAGE)
            .cloned()
            .unwrap_or_default();
        let parsed = match language.as_str() {
            "" => Some(Language::Cexl),
            name => name.parse().ok(),
        };
        let condition = match &rule.spec["match"] {
            Json::Null => Condition::Always,
            Json::String(text) if text.trim().is_empty() => Condition::Always,
            json => json
                .as_str()
                .zip(parsed)
                .and_then(|(text, language)| Expression::compile_in(language, text, table).ok())
                .map_or(Condition::Unknown, Condition::Match),
        };
        let mut check = HEADER_OPERATIONS
            .iter()
            .any(|field| !rule.spec[*field].is_null());
        // Mixer denies what it holds for while it refuses it, whatever its instances are.
        check |= object
            .annotations
            .get(FAIL_MODE)
            .is_some_and(|mode| mode == "closed");
        let mut report = false;
        for (_, instance) in actions(rule) {
            let of = instance.map_or((true, true), |name| named.phases(name));
            check |= of.0;
            report |= of.1;
        }
        Rule {
            namespace: object.key.namespace.to_string(),
            check,
            report,
            condition,
            text: (language, rule.spec["match"].to_string()),
        }
    }
}

/// Handler and instance of each thing that a rule does; an instance that cannot be read is `None`.
fn actions(rule: &MixerObject) -> impl Iterator<Item = (&str, Option<&str>)> {
    let actions = rule.spec["actions"].as_array().into_iter().flatten();
    actions.flat_map(|action| {
        let handler = action["handler"].as_str().unwrap_or_default();
        let instances = action["instances"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let unreadable = instances.is_empty().then_some((handler, None));
        let instances = instances.iter().map(move |name| (handler, name.as_str()));
        unreadable.into_iter().chain(instances)
    })
}

/// The attributes that an instance writes, and what it writes there.
fn bindings(instance: &MixerObject) -> impl Iterator<Item = (&String, &Json)> {
    ["attributeBindings", "attribute_bindings"]
        .into_iter()
        .filter_map(|field| instance.spec[field].as_object())
        .flatten()
}

/// The template that an instance is of; `None` for what is no instance of Mixer's own templates.
fn template(object: &MixerObject) -> Option<&str> {
    match object.kind.as_str() {
        "instance" => object.spec["compiledTemplate"]
            .as_str()
            .or_else(|| object.spec["compiled_template"].as_str()),
        kind if REPORTED.contains(&kind) || CHECKED.contains(&kind) => Some(kind),
        KUBERNETES => Some(KUBERNETES),
        _ => None,
    }
}

/// Whether a binding takes what `kubernetesenv` tells of the same thing at the same end.
fn is_own_word(attribute: &str, text: &Json) -> bool {
    let own = match attribute {
        "source.labels" => "$out.source_labels",
        "source.namespace" => "$out.source_namespace",
        "source.uid" => "$out.source_pod_uid",
        "destination.labels" => "$out.destination_labels",
        "destination.namespace" => "$out.destination_namespace",
        "destination.uid" => "$out.destination_pod_uid",
        _ => return false,
    };
    begins(text, own)
}

/// Whether an expression is `first`, or that and something for want of it.
fn begins(text: &Json, first: &str) -> bool {
    let rest = text
        .as_str()
        .and_then(|text| text.trim().strip_prefix(first));
    rest.is_some_and(|rest| rest.is_empty() || rest.trim_start().starts_with('|'))
}

/// Objects by what rules call them.
struct Named<'a>(&'a [(&'a Object, &'a MixerObject)]);

impl<'a> Named<'a> {
    /// All objects that a name in a rule can mean: `NAME`, or `NAME.` and more.
    fn find(&self, reference: &str) -> impl Iterator<Item = &'a MixerObject> {
        self.0.iter().filter_map(move |(object, mixer)| {
            let rest = reference.strip_prefix(&*object.key.name)?;
            let is_named = rest.is_empty() || rest.starts_with('.');
            (is_named && mixer.kind != "rule").then_some(*mixer)
        })
    }

    /// Whether an instance of this name may be checked, and reported. A name that nothing has may be both.
    fn phases(&self, reference: &str) -> (bool, bool) {
        let mut found = self
            .find(reference)
            .filter(|mixer| mixer.kind != "handler")
            .peekable();
        if found.peek().is_none() {
            return (true, true);
        }
        found.fold((false, false), |sum, mixer| {
            let of = match template(mixer) {
                Some(name) if REPORTED.contains(&name) => (false, true),
                Some(name) if CHECKED.contains(&name) => (true, false),
                // It decides nothing: what fails with it is denied only where a rule may have needed it.
                Some(KUBERNETES) => (false, false),
                _ => (true, true),
            };
            (sum.0 | of.0, sum.1 | of.1)
        })
    }

    /// Attributes for which Mixer takes the word of `kubernetesenv`, which knows workloads from here: when one
    /// action generates attributes, always, and it is that.
    fn told(&self, root: &str) -> BTreeSet<String> {
        let mut generators = self
            .0
            .iter()
            .filter(|(_, mixer)| mixer.kind == "rule")
            .flat_map(|(object, rule)| {
                actions(rule).map(move |(handler, instance)| (*object, *rule, handler, instance))
            })
            .filter_map(|(object, rule, handler, instance)| {
                let instance = instance?;
                let writes = self.find(instance).any(|i| bindings(i).next().is_some());
                writes.then_some((object, rule, handler, instance))
            });
        let (Some((object, rule, handler, instance)), None) =
            (generators.next(), generators.next())
        else {
            return BTreeSet::new();
        };
        let only = |reference: &str| {
            let mut found = self.find(reference);
            found.next().filter(|_| found.next().is_none())
        };
        let (Some(handler), Some(instance)) = (only(handler), only(instance)) else {
            return BTreeSet::new();
        };
        let is_adapter = handler.kind == "kubernetesenv"
            || ["compiledAdapter", "compiled_adapter"]
                .iter()
                .any(|field| handler.spec[*field] == "kubernetesenv");
        let is_always = rule.spec["match"]
            .as_str()
            .is_none_or(|text| text.trim().is_empty());
        if !is_adapter
            || !is_always
            || *object.key.namespace != *root
            || template(instance) != Some(KUBERNETES)
        {
            return BTreeSet::new();
        }
        let params = match &instance.spec["params"] {
            Json::Null => &instance.spec,
            params => params,
        };
        let asks_for = |side: &str| {
            [format!("{side}_uid"), format!("{side}Uid")]
                .iter()
                .any(|field| begins(&params[field], &format!("{side}.uid")))
        };
        bindings(instance)
            .filter(|(attribute, text)| {
                let side = attribute.split('.').next().unwrap_or_default();
                is_own_word(attribute, text) && asks_for(side)
            })
            .map(|(attribute, _)| attribute.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests;
