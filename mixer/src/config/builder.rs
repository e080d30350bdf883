//! Builds snapshots, and remembers what was good.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use lateen_adapter::{Adapter, template};
use lateen_config::Severity;
use lateen_engine::AttributeTable;
use serde_json::Value as Json;

use super::{
    Update, api_spec, doubts,
    instance::Instance,
    names::{self, Found, Names, OwnNames},
    object::{Fault, Key, Problem, Source},
    recipe::Recipe,
    remote::{RemoteAdapter, RemoteTemplate, handler::RemoteHandler, instance::RemoteInstance},
    rule::Draft,
    sent::Sent,
    snapshot::{Remotes, Snapshot},
    vendor,
};
use crate::{
    adapter::{Inventory, noop::Noop},
    handler::{LiveHandler, Signature, World},
    remote,
};

/// Kinds of Istio that mean something to Pilot alone.
const OTHER_KINDS: [&str; 2] = ["QuotaSpec", "QuotaSpecBinding"];

/// Owned by the one task that takes updates.
pub struct Builder {
    inventory: Inventory,
    world: World,
    default_namespace: String,
    is_dry: bool,
    generation: u64,
    fingerprint: Vec<(Source, Vec<Source>)>,
    good: Good,
}

/// What was in force last.
#[derive(Default)]
struct Good {
    manifests: BTreeMap<Key, Source>,
    templates: BTreeMap<Key, Source>,
    adapters: BTreeMap<Key, Source>,
    instances: BTreeMap<Key, Source>,
    handlers: BTreeMap<Key, Source>,
    rules: BTreeMap<Key, InForce>,
    live: HashMap<Key, Arc<LiveHandler>>,
}

/// A rule in force with all that it uses, so that it can go on when that is changed or deleted.
struct InForce {
    source: Source,
    /// Each with its template, if that is described by an object.
    instances: Vec<(Source, Option<Arc<RemoteTemplate>>)>,
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
            is_dry: false,
            generation: first_generation.max(1),
            fingerprint: Vec::new(),
            good: Good::default(),
        }
    }

    /// Checks only: handlers touch nothing and do nothing.
    #[must_use]
    pub fn dry(mut self) -> Self {
        self.is_dry = true;
        self
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
            templates,
            adapters,
            instances,
            remote_instances,
            handlers,
            live,
            drafts,
            problems,
            ..
        } = &mut attempt;
        let remotes = Remotes::of(templates, adapters, handlers, remote_instances);
        let mut rules = Vec::with_capacity(drafts.len());
        let mut fingerprint = Vec::with_capacity(drafts.len());
        let mut good = Good {
            manifests: std::mem::take(manifests),
            templates: sources(templates),
            adapters: sources(adapters),
            instances: sources(instances)
                .into_iter()
                .chain(sources(remote_instances))
                .collect(),
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
                            .filter_map(|(key, sent)| {
                                let template = match sent {
                                    Sent::Compiled(_) => None,
                                    Sent::Remote(instance) => Some(Arc::clone(&instance.template)),
                                };
                                Some((used(&good.instances, key)?, template))
                            })
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
            let mut uses = Vec::new();
            for (instance, template) in &in_force.instances {
                uses.push(instance.clone());
                uses.extend(template.as_ref().map(|t| t.source.clone()));
            }
            for (handler, live) in &in_force.handlers {
                uses.push(handler.clone());
                if let Signature::Remote(signature) = &live.signature {
                    uses.push(signature.source.clone());
                }
            }
            let is_guard = draft.is_guard();
            rules.extend(draft.finish(|key| in_force.handler(key)).map(Arc::new));
            fingerprint.push((source.clone(), uses));
            if !is_guard {
                good.rules.insert(source.key, in_force);
            }
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
        let by_name: HashMap<Arc<str>, &Source> = self
            .good
            .rules
            .iter()
            .map(|(key, rule)| (key.full_name(), &rule.source))
            .collect();
        let written = |name: &str| by_name.get(name).copied();
        problems.extend(doubts::absent_attributes(table, &rules, written));
        problems.extend(doubts::unknown_quotas(wanted_quotas, &rules));
        problems.sort();
        problems.dedup();
        Snapshot {
            remotes,
            ..Snapshot::new(
                self.generation,
                table.clone(),
                rules,
                problems,
                &self.default_namespace,
            )
        }
    }

    fn sort(&self, objects: Vec<Source>) -> Sorted {
        let mut sorted = Sorted::default();
        for source in objects {
            let kind = &*source.key.kind;
            let place = if kind == "rule" {
                &mut sorted.rules
            } else if kind == "attributemanifest" {
                &mut sorted.manifests
            } else if kind == "template" {
                &mut sorted.templates
            } else if kind == "adapter" {
                &mut sorted.adapters
            } else if kind == "instance" || template::find(kind).is_some() {
                &mut sorted.instances
            } else if kind == "handler"
                || self.inventory.find(kind).is_some()
                || vendor::find(kind).is_some()
            {
                &mut sorted.handlers
            } else if OTHER_KINDS.contains(&kind) {
                continue;
            } else if api_spec::KINDS.contains(&kind) {
                let wrong = api_spec::check(kind, &source.spec).err();
                sorted
                    .problems
                    .extend(wrong.map(|fault| source.error(&fault.field, fault.reason)));
                continue;
            } else {
                let reason =
                    format!("Mixer has no kind {kind}, and no adapter or template of that name");
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
            templates: BTreeMap::new(),
            adapters: BTreeMap::new(),
            instances: BTreeMap::new(),
            remote_instances: BTreeMap::new(),
            handlers: BTreeMap::new(),
            live: HashMap::new(),
            drafts: Vec::new(),
            lost: Vec::new(),
            problems: Vec::new(),
        };
        let Attempt {
            templates,
            adapters,
            problems,
            ..
        } = &mut attempt;
        let read = |s: &Source| RemoteTemplate::read(s).map(Arc::new).map_err(|f| vec![f]);
        take(
            &sorted.templates,
            &self.good.templates,
            read,
            templates,
            problems,
        );
        // Nobody else asks for them, and most have no such adapters.
        if !sorted.adapters.is_empty() {
            self.built_in_templates(templates);
        }
        let read = |s: &Source| RemoteAdapter::read(s).map(Arc::new).map_err(|f| vec![f]);
        take(
            &sorted.adapters,
            &self.good.adapters,
            read,
            adapters,
            problems,
        );
        problems.extend(self.unknown_templates(templates, adapters));
        self.compile_instances(sorted, &mut attempt);
        let Attempt {
            adapters,
            handlers,
            problems,
            ..
        } = &mut attempt;
        let read = |s: &Source| Recipe::read(s, &self.inventory, adapters, &self.default_namespace);
        take(
            &sorted.handlers,
            &self.good.handlers,
            read,
            handlers,
            problems,
        );
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

    /// Istio's templates, for adapter processes, unless objects of those names describe them.
    fn built_in_templates(&self, templates: &mut BTreeMap<Key, Found<Arc<RemoteTemplate>>>) {
        for template in template::ALL {
            let built_in = RemoteTemplate::built_in(template.name, &self.default_namespace);
            let Some(what) = built_in.map(Arc::new) else {
                continue;
            };
            let source = what.source.clone();
            let place = templates.entry(source.key.clone());
            place.or_insert(Found { source, what });
        }
    }

    /// Templates that adapters say they take and that are not there.
    fn unknown_templates(
        &self,
        templates: &BTreeMap<Key, Found<Arc<RemoteTemplate>>>,
        adapters: &BTreeMap<Key, Found<Arc<RemoteAdapter>>>,
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        for Found { source, what } in adapters.values() {
            for (i, name) in what.templates.iter().enumerate() {
                let found = self.template(templates, name, &what.namespace);
                if found.is_none() && template::find(name).is_none() {
                    let reason = format!("there is no template {name}; rules cannot use it");
                    let field = format!("templates[{i}]");
                    problems.push(source.problem(Severity::Warning, &field, reason));
                }
            }
        }
        problems
    }

    /// The template that `name` means in `namespace`.
    fn template(
        &self,
        templates: &BTreeMap<Key, Found<Arc<RemoteTemplate>>>,
        name: &str,
        namespace: &str,
    ) -> Option<Arc<RemoteTemplate>> {
        names::find(
            templates,
            name,
            "template",
            namespace,
            &self.default_namespace,
        )
        .ok()
        .map(|(_, found)| Arc::clone(&found.what))
    }

    fn compile_instances(&self, sorted: &Sorted, attempt: &mut Attempt) {
        let Attempt {
            table,
            templates,
            instances,
            remote_instances,
            problems,
            ..
        } = attempt;
        let remote = |source: &Source| -> Option<Arc<RemoteTemplate>> {
            let name = source.spec.get("template")?.as_str()?;
            // Instances of Istio's templates get the form for processes where a rule sends them to one.
            (&*source.key.kind == "instance")
                .then(|| self.template(templates, name, &source.key.namespace))?
                .filter(|template| !template.is_built_in)
        };
        let (of_remote, compiled): (BTreeMap<_, _>, BTreeMap<_, _>) = sorted
            .instances
            .iter()
            .map(|(key, source)| (key.clone(), source.clone()))
            .partition(|(_, source)| remote(source).is_some());
        let compile = |source: &Source| Instance::compile(source, table).map(Arc::new);
        take(
            &compiled,
            &self.good.instances,
            compile,
            instances,
            problems,
        );
        let compile_remote = |source: &Source| {
            let template = remote(source)
                .ok_or_else(|| vec![Fault::new("template", "there is no such template")])?;
            RemoteInstance::read(source, template, table).map(Arc::new)
        };
        take(
            &of_remote,
            &self.good.instances,
            compile_remote,
            remote_instances,
            problems,
        );
        // A template of Istio's may be described by an object too; adapters that are part of this program take
        // its instances all the same.
        for source in of_remote.values() {
            if let Ok(instance) = compile(source) {
                let found = Found {
                    source: source.clone(),
                    what: instance,
                };
                instances.insert(source.key.clone(), found);
            }
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
                handlers: &attempt.handlers,
                instances: &attempt.instances,
                remote_instances: &attempt.remote_instances,
                templates: &attempt.templates,
                table: &attempt.table,
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
                    if last.is_some() && held.is_none() {
                        attempt.lost.push(source.key.clone());
                    }
                    let drafted = held.or_else(|| {
                        Some(Drafted {
                            draft: Draft::guard(source, &attempt.table, &faults)?,
                            is_frozen: false,
                        })
                    });
                    let is_held = drafted.as_ref().is_some_and(|d| !d.draft.is_guard());
                    problems.extend(tell(source, faults, is_held));
                    drafted
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
        let mut used: BTreeMap<Key, BTreeMap<Arc<str>, Sent>> = BTreeMap::new();
        let drafts = attempt.drafts.iter().filter(|d| !d.is_frozen);
        for (handler, sent) in drafts.flat_map(|d| &d.draft.actions) {
            let instances = used.entry(handler.clone()).or_default();
            for (_, instance) in sent {
                instances.insert(Arc::clone(instance.name()), instance.clone());
            }
        }
        let mut live = HashMap::new();
        let mut found_broken = BTreeMap::new();
        for (key, instances) in used {
            let Some(found) = attempt.handlers.get(&key) else {
                continue;
            };
            let running = self.good.live.get(&key);
            let (params_field, built) = match &found.what {
                Recipe::Compiled {
                    adapter,
                    params,
                    params_field,
                } => {
                    let built = self.build_compiled(&key, running, &**adapter, params, instances);
                    (*params_field, built)
                }
                Recipe::Remote(handler) => (
                    "connection",
                    self.build_remote(&key, running, handler, &instances),
                ),
                Recipe::Vendor(_) => continue, // no rule that uses one is let in
            };
            let reasons = match built {
                Ok(handler) => {
                    live.insert(key, handler);
                    continue;
                }
                Err(reasons) => reasons,
            };
            let faults: Vec<_> = reasons
                .iter()
                .map(|r| Fault::new(params_field, r))
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

    fn build_compiled(
        &self,
        key: &Key,
        running: Option<&Arc<LiveHandler>>,
        adapter: &dyn Adapter,
        params: &Json,
        instances: BTreeMap<Arc<str>, Sent>,
    ) -> Result<Arc<LiveHandler>, Vec<String>> {
        let types = instances.into_values().filter_map(|sent| match sent {
            Sent::Compiled(instance) => Some(instance.types.clone()),
            Sent::Remote(_) => None,
        });
        let signature = Signature::Compiled {
            adapter: adapter.info().name,
            params: params.clone(),
            instances: types.collect(),
        };
        if let Some(running) = running.filter(|r| r.signature == signature) {
            return Ok(Arc::clone(running));
        }
        let name = key.full_name();
        let reasons = LiveHandler::problems(&name, adapter, &signature);
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let builds: &dyn Adapter = if self.is_dry { &Noop } else { adapter };
        let built = LiveHandler::build(name, builds, signature, &self.world);
        built.map(Arc::new).map_err(|reason| vec![reason])
    }

    fn build_remote(
        &self,
        key: &Key,
        running: Option<&Arc<LiveHandler>>,
        handler: &RemoteHandler,
        instances: &BTreeMap<Arc<str>, Sent>,
    ) -> Result<Arc<LiveHandler>, Vec<String>> {
        let remote = instances.values().filter_map(|sent| match sent {
            Sent::Remote(instance) => Some(&**instance),
            Sent::Compiled(_) => None,
        });
        let signature = Signature::Remote(Box::new(remote::Signature::of(handler, remote)));
        if let Some(running) = running
            && running.signature == signature
        {
            return Ok(Arc::clone(running));
        }
        let built = if self.is_dry {
            LiveHandler::idle(key.full_name(), signature, &self.world)
        } else {
            LiveHandler::build_remote(key.full_name(), signature, &self.world)
        };
        built.map(Arc::new).map_err(|reason| vec![reason])
    }
}

/// Objects by what they are.
#[derive(Default)]
struct Sorted {
    manifests: BTreeMap<Key, Source>,
    templates: BTreeMap<Key, Source>,
    adapters: BTreeMap<Key, Source>,
    instances: BTreeMap<Key, Source>,
    handlers: BTreeMap<Key, Source>,
    rules: BTreeMap<Key, Source>,
    problems: Vec<Problem>,
}

/// A build under way.
struct Attempt {
    table: AttributeTable,
    manifests: BTreeMap<Key, Source>,
    templates: BTreeMap<Key, Found<Arc<RemoteTemplate>>>,
    adapters: BTreeMap<Key, Found<Arc<RemoteAdapter>>>,
    instances: BTreeMap<Key, Found<Arc<Instance>>>,
    remote_instances: BTreeMap<Key, Found<Arc<RemoteInstance>>>,
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

/// Takes each object in its present version, or else in its last good one.
fn take<T>(
    sources: &BTreeMap<Key, Source>,
    good: &BTreeMap<Key, Source>,
    read: impl Fn(&Source) -> Result<T, Vec<Fault>>,
    found: &mut BTreeMap<Key, Found<T>>,
    problems: &mut Vec<Problem>,
) {
    // Descriptors make libraries work on what they have never seen; one object must not stop all the others.
    let read = |source: &Source| {
        let read = std::panic::AssertUnwindSafe(|| read(source));
        std::panic::catch_unwind(read).unwrap_or_else(|_| {
            Err(vec![Fault::new(
                "",
                "reading it failed; this is a defect, please report it",
            )])
        })
    };
    for (key, source) in sources {
        let taken = match read(source) {
            Ok(what) => Some((source, what)),
            Err(faults) => {
                let last = good.get(key).and_then(|s| Some((s, read(s).ok()?)));
                problems.extend(tell(source, faults, last.is_some()));
                last
            }
        };
        found.extend(taken.map(|(source, what)| {
            let source = source.clone();
            (key.clone(), Found { source, what })
        }));
    }
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
        for (source, template) in &self.instances {
            let sent = match template {
                None => Sent::Compiled(Arc::new(Instance::compile(source, table).ok()?)),
                Some(template) => {
                    let instance = RemoteInstance::read(source, Arc::clone(template), table);
                    Sent::Remote(Arc::new(instance.ok()?))
                }
            };
            instances.insert(source.key.clone(), sent);
        }
        let names = OwnNames {
            handlers: self
                .handlers
                .iter()
                .map(|(source, live)| (source.key.clone(), live.signature.is_remote()))
                .collect(),
            instances,
            default_namespace,
        };
        Draft::compile(&self.source, table, &names).ok()
    }
}

fn tell(source: &Source, faults: Vec<Fault>, is_held: bool) -> Vec<Problem> {
    let problem = |fault: Fault| Problem {
        is_held,
        ..source.error(&fault.field, fault.reason)
    };
    faults.into_iter().map(problem).collect()
}
