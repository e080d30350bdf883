//! What requests read: the rules in force, as one plan for each phase.

use std::{collections::BTreeMap, fmt, sync::Arc};

use lateen_adapter::Variety;
use lateen_engine::{AttributeTable, Bag, OnMatchError, Plan, RuleSpec, Text, Tracker};
use serde_json::{Value as Json, json};

use super::{
    names::Found,
    object::{Key, Problem},
    recipe::Recipe,
    remote::{RemoteAdapter, RemoteTemplate, handler::RemoteHandler, instance::RemoteInstance},
    rule::{FailMode, Rule},
};

/// Everything in force at one moment. Immutable; made by [`super::Builder`] only.
pub struct Snapshot {
    /// Equal generations mean equal verdicts. 0: nothing is known yet, so there are none.
    pub generation: u64,
    /// The attributes there are.
    pub table: AttributeTable,
    /// All rules, by namespace and name.
    pub rules: Vec<Arc<Rule>>,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Rules that generate attributes.
    pub generate: Plan<Arc<Rule>>,
    /// Rules that check, or change headers.
    pub check: Plan<Arc<Rule>>,
    /// Rules that take quota.
    pub quota: Plan<Arc<Rule>>,
    /// Rules that report.
    pub report: Plan<Arc<Rule>>,
    /// What is described for adapters that are processes of their own.
    pub remotes: Remotes,
}

/// Adapters that are processes of their own, and all that is for them.
#[derive(Debug, Default)]
pub struct Remotes {
    /// Templates by what object describes them.
    pub templates: BTreeMap<Key, Arc<RemoteTemplate>>,
    /// Adapters.
    pub adapters: BTreeMap<Key, Arc<RemoteAdapter>>,
    /// Handlers.
    pub handlers: BTreeMap<Key, Arc<RemoteHandler>>,
    /// Instances.
    pub instances: BTreeMap<Key, Arc<RemoteInstance>>,
}

impl Remotes {
    /// Those among what is used.
    pub fn of(
        templates: &BTreeMap<Key, Found<Arc<RemoteTemplate>>>,
        adapters: &BTreeMap<Key, Found<Arc<RemoteAdapter>>>,
        handlers: &BTreeMap<Key, Found<Recipe>>,
        instances: &BTreeMap<Key, Found<Arc<RemoteInstance>>>,
    ) -> Self {
        fn plain<T: Clone>(found: &BTreeMap<Key, Found<T>>) -> BTreeMap<Key, T> {
            found
                .iter()
                .map(|(key, found)| (key.clone(), found.what.clone()))
                .collect()
        }
        let remote = |(key, found): (&Key, &Found<Recipe>)| match &found.what {
            Recipe::Remote(handler) => Some((key.clone(), Arc::clone(handler))),
            Recipe::Compiled { .. } | Recipe::Vendor(_) => None,
        };
        Self {
            templates: plain(templates),
            adapters: plain(adapters),
            handlers: handlers.iter().filter_map(remote).collect(),
            instances: plain(instances),
        }
    }

    fn describe(&self) -> Json {
        let templates = self.templates.values().map(|template| {
            json!({
                "name": *template.name,
                "templateName": template.template_name,
                "variety": format!("{:?}", template.variety),
                "method": template.path.as_str(),
            })
        });
        let adapters = self.adapters.values().map(|adapter| {
            json!({
                "name": *adapter.name,
                "description": adapter.description,
                "templates": adapter.templates,
                "params": adapter.params.as_ref().map(|p| p.full_name().to_owned()),
                "sessionBased": adapter.session_based,
            })
        });
        let handlers = self.handlers.values().map(|handler| {
            json!({
                "name": *handler.name,
                "adapter": *handler.adapter.name,
                "address": handler.connection.address,
            })
        });
        let instances = self
            .instances
            .values()
            .map(|instance| json!({"name": *instance.name, "template": *instance.template.name}));
        json!({
            "templates": templates.collect::<Vec<_>>(),
            "adapters": adapters.collect::<Vec<_>>(),
            "handlers": handlers.collect::<Vec<_>>(),
            "instances": instances.collect::<Vec<_>>(),
        })
    }
}

impl Snapshot {
    /// Plans `rules`.
    pub fn new(
        generation: u64,
        table: AttributeTable,
        mut rules: Vec<Arc<Rule>>,
        problems: Vec<Problem>,
        default_namespace: &str,
    ) -> Self {
        rules.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let plan = |is_in: &dyn Fn(&Rule) -> bool| {
            let specs = rules.iter().filter(|r| is_in(r)).map(|rule| RuleSpec {
                namespace: rule.namespace.to_string(),
                name: rule.name.to_string(),
                condition: rule.condition.clone(),
                priority: rule.priority,
                on_error: match rule.match_fail_mode {
                    FailMode::Open => OnMatchError::Skip,
                    FailMode::Closed => OnMatchError::Deny,
                },
                actions: vec![Arc::clone(rule)],
            });
            Plan::build(specs, &table, default_namespace)
        };
        Self {
            generation,
            generate: plan(&|r| r.has(Variety::AttributeGenerator)),
            check: plan(&|r| r.checks() || r.has_header_operations()),
            quota: plan(&|r| r.has(Variety::Quota)),
            report: plan(&|r| r.has(Variety::Report)),
            table,
            rules,
            problems,
            remotes: Remotes::default(),
        }
    }

    /// Nothing is configured yet.
    pub fn empty() -> Self {
        Self::new(
            0,
            AttributeTable::default_vocabulary(),
            Vec::new(),
            Vec::new(),
            "istio-system",
        )
    }

    /// Whether some rule for this request's namespace has a quota of this name, whatever its match says.
    pub fn has_quota(&self, name: &str, bag: &Bag, tracker: &mut Tracker) -> bool {
        let namespace = self.quota.namespace(bag, tracker).map(Text::as_str);
        let mut rules = self.quota.rules_for(namespace).flat_map(|r| r.actions());
        rules.any(|rule| rule.quota(name).is_some())
    }

    /// For `/debug/config`.
    pub fn describe(&self) -> Json {
        let rules: Vec<Json> = self
            .rules
            .iter()
            .map(|rule| {
                let actions: Vec<Json> = rule
                    .actions
                    .iter()
                    .map(|action| {
                        let instances: Vec<_> =
                            action.instances.iter().map(|i| &**i.name()).collect();
                        json!({
                            "handler": *action.handler.name,
                            "adapter": action.handler.signature.adapter(),
                            "instances": instances,
                        })
                    })
                    .collect();
                json!({
                    "name": *rule.name,
                    "match": rule.condition.as_ref().map(|c| c.text()),
                    "matchFailMode": format!("{:?}", rule.match_fail_mode).to_lowercase(),
                    "adapterFailMode": format!("{:?}", rule.adapter_fail_mode).to_lowercase(),
                    "dryRun": rule.is_dry_run,
                    "refused": rule.refused,
                    "place": *rule.place,
                    "priority": rule.priority,
                    "actions": actions,
                })
            })
            .collect();
        json!({
            "generation": self.generation.to_string(),
            "attributes": self.table.len(),
            "rules": rules,
            "remote": self.remotes.describe(),
            "problems": self.problems,
        })
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("generation", &self.generation)
            .field("rules", &self.rules.len())
            .field("problems", &self.problems)
            .finish_non_exhaustive()
    }
}
