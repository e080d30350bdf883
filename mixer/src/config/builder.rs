//! Builds snapshots, and remembers what was good.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use lateen_adapter::{Adapter, InstanceType, ValueType, Variety, template};
use lateen_config::Severity;
use lateen_engine::{AttributeTable, Bag, EvalError, Tracker, Value};
use serde_json::{Map, Value as Json};

use super::{
    Update,
    instance::Instance,
    object::{Fault, Key, Problem, Source},
    rule::{Directory, Draft, Rule},
    snapshot::Snapshot,
};
use crate::{
    adapter::Inventory,
    handler::{LiveHandler, Signature, World},
};

/// Kinds of Istio that mean something to others, or to nobody here.
const OTHER_KINDS: &[&str] = &[
    "QuotaSpec",
    "QuotaSpecBinding",
    "HTTPAPISpec",
    "HTTPAPISpecBinding",
];

/// Owned by the one task that takes updates.
pub struct Builder {
    inventory: Inventory,
    world: World,
    default_namespace: String,
    generation: u64,
    fingerprint: Vec<(Source, Vec<Source>)>,
    good: Good,
}

/// What was in force last.
#[derive(Default)]
struct Good {
    manifests: BTreeMap<Key, Source>,
    instances: BTreeMap<Key, Source>,
    handlers: BTreeMap<Key, Source>,
    rules: BTreeMap<Key, InForce>,
    live: HashMap<Key, Arc<LiveHandler>>,
}

/// A rule in force with all that it uses, so that it can go on when that is changed or deleted.
struct InForce {
    source: Source,
    instances: Vec<Source>,
    handlers: Vec<(Source, Arc<LiveHandler>)>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Builder {
    /// Nothing built yet. Generations count up from `first_generation`, which is not 0.
    pub fn new(
        inventory: Inventory,
        world: World,
        default_namespace: impl Into<String>,
        first_generation: u64,
    ) -> Self {
        Self {
            inventory,
            world,
            default_namespace: default_namespace.into(),
            generation: first_generation.max(1),
            fingerprint: Vec::new(),
            good: Good::default(),
        }
    }

    /// Builds what is in force after `update`. `has_moved`: the workload view has changed in a way that
    /// verdicts depend on.
    pub fn build(&mut self, update: Update, has_moved: bool) -> Snapshot {
        let Update {
            objects,
            problems,
            wanted_quotas,
            ..
        } = update;
        let sorted = self.sort(objects);
        let (table, manifests, manifest_problems) = self.table(&sorted.manifests, false);
        let mut attempt = self.attempt(&sorted, table, manifests);
        if !attempt.lost.is_empty() {
            // Rules in force need attributes whose manifest is changed or gone: those stay declared.
            let (table, manifests, _) = self.table(&sorted.manifests, true);
            let first = std::mem::replace(&mut attempt, self.attempt(&sorted, table, manifests));
            let cured: Vec<Problem> = first
                .problems
                .into_iter()
                .filter(|p| !attempt.problems.contains(p))
                .collect();
            attempt
                .problems
                .extend(cured.into_iter().map(|p| Problem { is_held: true, ..p }));
        }
        attempt.problems.extend(manifest_problems);
        attempt.problems.extend(sorted.problems);
        attempt.problems.extend(problems);
        self.finish(attempt, wanted_quotas, has_moved)
    }

    fn finish(
        &mut self,
        mut attempt: Attempt,
        wanted_quotas: Vec<(String, Source)>,
        has_moved: bool,
    ) -> Snapshot {
        let Attempt {
            table,
            manifests,
            instances,
            handlers,
            live,
            drafts,
            problems,
            ..
        } = &mut attempt;
        let mut rules = Vec::with_capacity(drafts.len());
        let mut fingerprint = Vec::with_capacity(drafts.len());
        let mut good = Good {
            manifests: std::mem::take(manifests),
            instances: sources(instances),
            handlers: sources(handlers),
            live: std::mem::take(live),
            ..Good::default()
        };
        for Drafted { draft, is_frozen } in std::mem::take(drafts) {
            let source = draft.source.clone();
            let in_force = match self.good.rules.remove(&source.key) {
                Some(old) if is_frozen => old,
                _ => {
                    let used = |map: &BTreeMap<Key, Source>, key: &Key| map.get(key).cloned();
                    InForce {
                        source: source.clone(),
                        instances: draft
                            .actions
                            .iter()
                            .flat_map(|(_, sent)| sent)
                            .filter_map(|(key, _)| used(&good.instances, key))
                            .collect(),
                        handlers: draft
                            .actions
                            .iter()
                            .filter_map(|(key, _)| {
                                let live = Arc::clone(good.live.get(key)?);
                                Some((used(&good.handlers, key)?, live))
                            })
                            .collect(),
                    }
                }
            };
            let mut uses = in_force.instances.clone();
            uses.extend(in_force.handlers.iter().map(|(handler, _)| handler.clone()));
            rules.extend(draft.finish(|key| in_force.handler(key)).map(Arc::new));
            fingerprint.push((source.clone(), uses));
            good.rules.insert(source.key, in_force);
        }
        // What frozen rules still use is there to be taken over when their handlers are good again.
        for (handler, live) in good.rules.values().flat_map(|r| &r.handlers) {
            let place = good.live.entry(handler.key.clone());
            place.or_insert_with(|| Arc::clone(live));
        }

        let is_same = fingerprint.len() == self.fingerprint.len()
            && fingerprint
                .iter()
                .zip(&self.fingerprint)
                .all(|((rule, uses), (r, u))| {
                    rule.says_the_same(r)
                        && uses.len() == u.len()
                        && uses.iter().zip(u).all(|(a, b)| a.says_the_same(b))
                })
            && good.manifests.len() == self.good.manifests.len()
            && good.manifests.iter().all(|(k, m)| {
                self.good
                    .manifests
                    .get(k)
                    .is_some_and(|old| m.says_the_same(old))
            });
        if !is_same || has_moved {
            self.generation += 1;
        }
        self.fingerprint = fingerprint;
        self.good = good;

        let mut problems = std::mem::take(problems);
        problems.extend(absent_attributes(table, &rules, &self.good.rules));
        problems.extend(unknown_quotas(wanted_quotas, &rules));
        problems.sort();
        problems.dedup();
        Snapshot::new(
            self.generation,
            table.clone(),
            rules,
            problems,
            &self.default_namespace,
        )
    }

    fn sort(&self, objects: Vec<Source>) -> Sorted {
        let mut sorted = Sorted::default();
        for source in objects {
            let kind = &*source.key.kind;
            let place = if kind == "rule" {
                &mut sorted.rules
            } else if kind == "attributemanifest" {
                &mut sorted.manifests
            } else if kind == "instance" || template::find(kind).is_some() {
                &mut sorted.instances
            } else if kind == "handler" || self.inventory.find(kind).is_some() {
                &mut sorted.handlers
            } else if OTHER_KINDS.contains(&kind) {
                continue;
            } else {
                let reason = match kind {
                    "adapter" | "template" => {
                        "adapters and templates of one's own are not supported".to_owned()
                    }
                    _ => format!("there is no adapter or template {kind} here"),
                };
                sorted.problems.push(source.error("", reason));
                continue;
            };
            place.insert(source.key.clone(), source);
        }
        sorted
    }

    /// The attributes that all good manifests declare. A refused manifest's last good version counts.
    fn table(
        &self,
        current: &BTreeMap<Key, Source>,
        keep: bool,
    ) -> (AttributeTable, BTreeMap<Key, Source>, Vec<Problem>) {
        let specs = |all: &[&Source]| -> Vec<Arc<Json>> {
            all.iter().map(|s| Arc::clone(&s.spec)).collect()
        };
        let mut sources: Vec<&Source> = current.values().collect();
        let mut problems = Vec::new();
        let refused = AttributeTable::from_manifests(specs(&sources).iter().map(|s| &**s)).1;
        for (position, error) in refused.into_iter().rev() {
            let source = sources.remove(position);
            let last = self.good.manifests.get(&source.key);
            let mut problem = source.error("attributes", error.to_string());
            problem.is_held = last.is_some();
            problems.push(problem);
            sources.extend(last);
        }
        if keep {
            sources.extend(self.good.manifests.values().filter(|old| {
                current
                    .get(&old.key)
                    .is_none_or(|new| !new.says_the_same(old))
            }));
        }
        // Manifests that were good beside others may conflict with changed ones; those are left out.
        let (table, refused) = AttributeTable::from_manifests(specs(&sources).iter().map(|s| &**s));
        for (position, _) in refused.into_iter().rev() {
            sources.remove(position);
        }
        let kept = sources
            .into_iter()
            .map(|s| (s.key.clone(), s.clone()))
            .collect();
        (table, kept, problems)
    }

    /// Compiles everything against `table`.
    fn attempt(
        &self,
        sorted: &Sorted,
        table: AttributeTable,
        manifests: BTreeMap<Key, Source>,
    ) -> Attempt {
        let mut attempt = Attempt {
            table,
            manifests,
            instances: BTreeMap::new(),
            handlers: BTreeMap::new(),
            live: HashMap::new(),
            drafts: Vec::new(),
            lost: Vec::new(),
            problems: Vec::new(),
        };
        self.compile_instances(sorted, &mut attempt);
        self.read_handlers(sorted, &mut attempt);
        // A handler that cannot be built makes its rules bad, which may change what other handlers get:
        // again until nothing changes. Each round but the last finds another broken handler.
        let mut broken: BTreeMap<Key, String> = BTreeMap::new();
        let before = attempt.problems.len();
        loop {
            attempt.problems.truncate(before);
            self.compile_rules(sorted, &broken, &mut attempt);
            let found = self.build_handlers(&broken, &mut attempt);
            if found.is_empty() {
                return attempt;
            }
            broken.extend(found);
        }
    }

    fn compile_instances(&self, sorted: &Sorted, attempt: &mut Attempt) {
        for (key, source) in &sorted.instances {
            let compile = |s: &Source| Instance::compile(s, &attempt.table);
            let found = match compile(source) {
                Ok(instance) => Some((source, instance)),
                Err(faults) => {
                    let last = self.good.instances.get(key);
                    let last = last.and_then(|s| Some((s, compile(s).ok()?)));
                    attempt
                        .problems
                        .extend(tell(source, faults, last.is_some()));
                    last
                }
            };
            attempt.instances.extend(found.map(|(source, instance)| {
                (
                    key.clone(),
                    Found {
                        source: source.clone(),
                        what: Arc::new(instance),
                    },
                )
            }));
        }
    }

    fn read_handlers(&self, sorted: &Sorted, attempt: &mut Attempt) {
        for (key, source) in &sorted.handlers {
            let read = |s: &Source| Recipe::read(s, &self.inventory);
            let found = match read(source) {
                Ok(recipe) => Some((source, recipe)),
                Err(fault) => {
                    let last = self.good.handlers.get(key);
                    let last = last.and_then(|s| Some((s, read(s).ok()?)));
                    attempt
                        .problems
                        .extend(tell(source, vec![fault], last.is_some()));
                    last
                }
            };
            attempt.handlers.extend(found.map(|(source, recipe)| {
                (
                    key.clone(),
                    Found {
                        source: source.clone(),
                        what: recipe,
                    },
                )
            }));
        }
    }

    fn compile_rules(
        &self,
        sorted: &Sorted,
        broken: &BTreeMap<Key, String>,
        attempt: &mut Attempt,
    ) {
        attempt.drafts.clear();
        attempt.lost.clear();
        let mut problems = Vec::new();
        for source in sorted.rules.values() {
            let names = Names {
                attempt,
                broken,
                default_namespace: &self.default_namespace,
            };
            let compile = |s: &Source| Draft::compile(s, &attempt.table, &names);
            let drafted = match compile(source) {
                Ok(draft) => Some(Drafted {
                    draft,
                    is_frozen: false,
                }),
                Err(faults) => {
                    let last = self.good.rules.get(&source.key);
                    // The last good rule with what there is now; failing that, with what it had then.
                    let held = last.and_then(|last| {
                        let thawed = compile(&last.source).ok();
                        let thawed = thawed.map(|draft| Drafted {
                            draft,
                            is_frozen: false,
                        });
                        thawed.or_else(|| {
                            let draft = last.compile(&attempt.table, &self.default_namespace)?;
                            Some(Drafted {
                                draft,
                                is_frozen: true,
                            })
                        })
                    });
                    problems.extend(tell(source, faults, held.is_some()));
                    if last.is_some() && held.is_none() {
                        attempt.lost.push(source.key.clone());
                    }
                    held
                }
            };
            attempt.drafts.extend(drafted);
        }
        attempt.problems.extend(problems);
    }

    /// Builds what rules use, or takes it over. Answers with handlers that cannot be built in any version.
    fn build_handlers(
        &self,
        broken: &BTreeMap<Key, String>,
        attempt: &mut Attempt,
    ) -> BTreeMap<Key, String> {
        let mut used: BTreeMap<Key, BTreeMap<Arc<str>, InstanceType>> = BTreeMap::new();
        let drafts = attempt.drafts.iter().filter(|d| !d.is_frozen);
        for (handler, sent) in drafts.flat_map(|d| &d.draft.actions) {
            let instances = used.entry(handler.clone()).or_default();
            for (_, instance) in sent {
                instances.insert(Arc::clone(&instance.name), instance.types.clone());
            }
        }
        let mut live = HashMap::new();
        let mut found_broken = BTreeMap::new();
        for (key, instances) in used {
            let Some(found) = attempt.handlers.get(&key) else {
                continue;
            };
            let instances: Vec<_> = instances.into_values().collect();
            let running = self.good.live.get(&key);
            let signature = Signature {
                adapter: found.what.adapter.info().name,
                params: found.what.params.clone(),
                instances,
            };
            if let Some(running) = running.filter(|r| r.signature == signature) {
                live.insert(key, Arc::clone(running));
                continue;
            }
            let name = key.full_name();
            let adapter = &*found.what.adapter;
            let mut reasons = LiveHandler::problems(&name, adapter, &signature);
            if reasons.is_empty() {
                match LiveHandler::build(Arc::clone(&name), adapter, signature, &self.world) {
                    Ok(handler) => {
                        live.insert(key, Arc::new(handler));
                        continue;
                    }
                    Err(reason) => reasons.push(reason),
                }
            }
            let faults: Vec<_> = reasons
                .iter()
                .map(|r| Fault::new(found.what.params_field, r))
                .collect();
            let problems = tell(&found.source, faults, running.is_some());
            attempt.problems.extend(problems);
            match running {
                // It goes on as it was; its source stays the last good one.
                Some(running) => {
                    let last = self.good.handlers.get(&key).cloned();
                    if let (Some(found), Some(last)) = (attempt.handlers.get_mut(&key), last) {
                        found.source = last;
                    }
                    live.insert(key, Arc::clone(running));
                }
                None if !broken.contains_key(&key) => {
                    found_broken.insert(key, reasons.join("; "));
                }
                None => {}
            }
        }
        attempt.live = live;
        found_broken
    }
}

/// Objects by what they are.
#[derive(Default)]
struct Sorted {
    manifests: BTreeMap<Key, Source>,
    instances: BTreeMap<Key, Source>,
    handlers: BTreeMap<Key, Source>,
    rules: BTreeMap<Key, Source>,
    problems: Vec<Problem>,
}

/// A build under way.
struct Attempt {
    table: AttributeTable,
    manifests: BTreeMap<Key, Source>,
    instances: BTreeMap<Key, Found<Arc<Instance>>>,
    handlers: BTreeMap<Key, Found<Recipe>>,
    live: HashMap<Key, Arc<LiveHandler>>,
    drafts: Vec<Drafted>,
    /// Rules that were in force and have no version that compiles.
    lost: Vec<Key>,
    problems: Vec<Problem>,
}

/// A rule that is to be in force.
struct Drafted {
    draft: Draft,
    /// It uses what it used before, not what there is now.
    is_frozen: bool,
}

/// The version of an object that is used.
struct Found<T> {
    source: Source,
    what: T,
}

fn sources<T>(found: &BTreeMap<Key, Found<T>>) -> BTreeMap<Key, Source> {
    found
        .iter()
        .map(|(key, found)| (key.clone(), found.source.clone()))
        .collect()
}

impl InForce {
    fn handler(&self, key: &Key) -> Option<Arc<LiveHandler>> {
        let mut handlers = self.handlers.iter();
        handlers
            .find(|(source, _)| source.key == *key)
            .map(|(_, live)| Arc::clone(live))
    }

    /// The rule again, with all that it had.
    fn compile(&self, table: &AttributeTable, default_namespace: &str) -> Option<Draft> {
        let mut instances = BTreeMap::new();
        for source in &self.instances {
            let instance = Instance::compile(source, table).ok()?;
            instances.insert(source.key.clone(), Arc::new(instance));
        }
        let names = OwnNames {
            rule: self,
            instances,
            default_namespace,
        };
        Draft::compile(&self.source, table, &names).ok()
    }
}

/// Names in a rule that uses what it used before.
struct OwnNames<'a> {
    rule: &'a InForce,
    instances: BTreeMap<Key, Arc<Instance>>,
    default_namespace: &'a str,
}

impl Directory for OwnNames<'_> {
    fn handler(&self, name: &str, namespace: &str) -> Result<(Key, Vec<&'static str>), String> {
        let candidates = meanings(name, "handler", namespace, self.default_namespace);
        let found = candidates
            .into_iter()
            .find(|key| self.rule.handler(key).is_some());
        // What it takes was asked when the rule came into force.
        let key = found.ok_or("the rule did not have it")?;
        Ok((key, template::ALL.iter().map(|t| t.name).collect()))
    }

    fn instance(&self, name: &str, namespace: &str) -> Result<(Key, Arc<Instance>), String> {
        let candidates = meanings(name, "instance", namespace, self.default_namespace);
        let found = candidates
            .iter()
            .find_map(|key| self.instances.get_key_value(key));
        let (key, instance) = found.ok_or("the rule did not have it")?;
        Ok((key.clone(), Arc::clone(instance)))
    }
}

fn tell(source: &Source, faults: Vec<Fault>, is_held: bool) -> Vec<Problem> {
    let problem = |fault: Fault| Problem {
        is_held,
        ..source.error(&fault.field, fault.reason)
    };
    faults.into_iter().map(problem).collect()
}

/// What a handler is to be built of.
struct Recipe {
    adapter: Arc<dyn Adapter>,
    params: Json,
    /// Where the parameters stand in the spec.
    params_field: &'static str,
}

impl Recipe {
    fn read(source: &Source, inventory: &Inventory) -> Result<Self, Fault> {
        if let Some(adapter) = inventory.find(&source.key.kind) {
            let params = (*source.spec).clone();
            return Ok(Self {
                adapter: Arc::clone(adapter),
                params,
                params_field: "",
            });
        }
        let nothing = Map::new();
        let spec = match &*source.spec {
            Json::Object(spec) => spec,
            Json::Null => &nothing,
            other => return Err(Fault::new("", format!("{other} is no map"))),
        };
        let known = [
            "name",
            "compiledAdapter",
            "compiled_adapter",
            "adapter",
            "params",
            "connection",
        ];
        if let Some(key) = spec.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(Fault::new(key, "there is no such field in a handler"));
        }
        let (field, name) = ["compiledAdapter", "compiled_adapter", "adapter"]
            .into_iter()
            .find_map(|key| Some((key, spec.get(key)?)))
            .ok_or_else(|| Fault::new("compiledAdapter", "the handler names no adapter"))?;
        let adapter = name
            .as_str()
            .and_then(|n| inventory.find(n))
            .ok_or_else(|| {
                let known: Vec<_> = inventory.names().collect();
                Fault::new(
                    field,
                    format!("unknown adapter {name}; there are {}", known.join(", ")),
                )
            })?;
        let params = spec.get("params").cloned().unwrap_or(Json::Null);
        Ok(Self {
            adapter: Arc::clone(adapter),
            params,
            params_field: "params",
        })
    }
}

/// Names in rules: `NAME`, `NAME.KIND`, `NAME.NAMESPACE`, `NAME.KIND.NAMESPACE`.
struct Names<'a> {
    attempt: &'a Attempt,
    broken: &'a BTreeMap<Key, String>,
    default_namespace: &'a str,
}

impl Names<'_> {
    fn find<'m, T>(
        &self,
        map: &'m BTreeMap<Key, Found<T>>,
        name: &str,
        generic: &str,
        namespace: &str,
    ) -> Result<(&'m Key, &'m Found<T>), String> {
        let candidates = meanings(name, generic, namespace, self.default_namespace);
        candidates
            .iter()
            .find_map(|key| map.get_key_value(key))
            .ok_or_else(|| {
                let tried: Vec<String> = candidates.iter().map(Key::to_string).collect();
                format!("there is no {} (or it is refused)", tried.join(" and no "))
            })
    }
}

/// What `name` may mean to a rule of `namespace`, the likeliest first. What a rule's own namespace lacks is
/// looked for in the mesh-wide one.
fn meanings(name: &str, generic: &str, namespace: &str, default_namespace: &str) -> Vec<Key> {
    let key = |kind: &str, namespace: &str, name: &str| Key {
        kind: Arc::from(kind),
        namespace: Arc::from(namespace),
        name: Arc::from(name),
    };
    let mut all = Vec::new();
    if let Some((front, last)) = name.rsplit_once('.') {
        if let Some((name, kind)) = front.rsplit_once('.') {
            all.push(key(kind, last, name));
        }
        all.push(key(last, namespace, front));
        all.push(key(generic, last, front));
        all.push(key(last, default_namespace, front));
    }
    all.push(key(generic, namespace, name)); // Kubernetes allows dots in names
    all.push(key(generic, default_namespace, name));
    let mut seen = BTreeSet::new();
    all.retain(|key| seen.insert(key.clone()));
    all
}

impl Directory for Names<'_> {
    fn handler(&self, name: &str, namespace: &str) -> Result<(Key, Vec<&'static str>), String> {
        let (key, found) = self.find(&self.attempt.handlers, name, "handler", namespace)?;
        if let Some(reason) = self.broken.get(key) {
            return Err(format!("{key} cannot be built: {reason}"));
        }
        let templates = found.what.adapter.info().templates;
        Ok((key.clone(), templates.iter().map(|t| t.name).collect()))
    }

    fn instance(&self, name: &str, namespace: &str) -> Result<(Key, Arc<Instance>), String> {
        let (key, found) = self.find(&self.attempt.instances, name, "instance", namespace)?;
        Ok((key.clone(), Arc::clone(&found.what)))
    }
}

/// Rules that deny requests which lack an attribute, whether their author meant it or not.
fn absent_attributes(
    table: &AttributeTable,
    rules: &[Arc<Rule>],
    sources: &BTreeMap<Key, InForce>,
) -> Vec<Problem> {
    // A request as poor as can be: what every proxy sends, and what generators always add.
    let mut bag = Bag::new(table);
    let always = rules
        .iter()
        .filter(|r| r.condition.is_none())
        .flat_map(|r| &r.actions);
    let generated = always
        .flat_map(|a| a.instances(Variety::AttributeGenerator))
        .flat_map(|i| i.generated());
    let sent = [
        "context.protocol",
        "context.reporter.kind",
        "request.headers",
    ]
    .into_iter()
    .filter_map(|name| table.slot(name));
    for slot in generated.chain(sent).collect::<Vec<_>>() {
        let value = match table.type_of(slot) {
            ValueType::StringMap => Value::StringMap(lateen_engine::StringMap::default()),
            ValueType::IpAddress => Value::Ip([0, 0, 0, 0].into()),
            ValueType::Int64 => Value::Int64(0),
            ty => match Value::from_text(ty, "".into()) {
                Some(value) => value,
                None => continue,
            },
        };
        bag.set(slot, value);
    }
    let mut problems = Vec::new();
    for rule in rules {
        if !rule.checks() && !rule.has(Variety::Quota) {
            continue;
        }
        let Some(condition) = &rule.condition else {
            continue;
        };
        if let Err(EvalError::Absent(attribute)) = condition.holds(&bag, &mut Tracker::off()) {
            let reason = format!(
                "the match cannot be told for requests without {attribute}, which this rule treats by its \
                 fail mode ({}); give a default with |",
                match rule.fail_mode {
                    super::rule::FailMode::Open => "open: it is skipped",
                    super::rule::FailMode::Closed => "closed: they are denied",
                }
            );
            let source = sources
                .values()
                .map(|r| &r.source)
                .find(|s| s.key.full_name() == rule.name);
            problems.extend(source.map(|s| s.problem(Severity::Warning, "match", reason)));
        }
    }
    problems
}

/// Quotas that proxies ask for and no rule has: such requests are denied.
fn unknown_quotas(wanted: Vec<(String, Source)>, rules: &[Arc<Rule>]) -> Vec<Problem> {
    let is_known = |name: &str| {
        rules
            .iter()
            .flat_map(|r| &r.actions)
            .flat_map(|a| a.instances(Variety::Quota))
            .any(|i| i.is_called(name))
    };
    wanted
        .into_iter()
        .filter(|(name, _)| !is_known(name))
        .map(|(name, source)| {
            source.problem(
                Severity::Warning,
                "",
                format!("no rule sends a quota instance {name} to a handler; requests charged to it are denied"),
            )
        })
        .collect()
}
