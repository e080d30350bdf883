//! The good objects of all sources, as one set.
//!
//! Bad input never replaces good state: a file that is no YAML keeps all its last good objects, an
//! object that is refused keeps its own last good version, and a subset that accepted routes still
//! name outlives the DestinationRule that defined it. Every such case is listed as a [`Problem`]
//! until it is mended. A source that cannot be reached changes nothing, so what it said last stays.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use crate::object::{Key, Object, Spec};
use crate::parse::{parse_file, parse_value};
use crate::problem::{Problem, Severity};
use crate::reference::{Subsets, check_references, undefined_subsets};
use crate::validate::validate;

/// The good objects of all sources at one moment.
#[derive(Clone, Debug, Default)]
pub struct ConfigSet {
    /// By source, then by file name and line.
    pub objects: Vec<Arc<Object>>,
    /// Everything wrong at this moment.
    pub problems: Vec<Problem>,
    /// Counts up with every change of the above; 0: some source has not been read yet.
    pub generation: u64,
}

/// Where objects come from. Of two objects with one key, that of the lesser source wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// A directory of YAML files: what is on this machine overrides what a cluster says.
    Folder,
    /// Kubernetes' API.
    Kubernetes,
}

/// What sources write to, one at a time, and readers follow. Nothing is published before every source has been
/// read once.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    out: watch::Sender<Arc<ConfigSet>>,
}

#[derive(Debug)]
struct State {
    /// By source and name.
    parts: BTreeMap<(Source, Arc<str>), Part>,
    /// Sources that have not been read yet.
    awaited: BTreeSet<Source>,
}

/// A file, or what stands for one: objects that come and go together.
#[derive(Debug, Default)]
struct Part {
    /// Of a file.
    text: String,
    /// Objects that parse and are valid, or were before their present text.
    good: Vec<Arc<Object>>,
    problems: Vec<Problem>,
}

/// One source's parts, while it changes them.
#[derive(Debug)]
pub struct Parts<'a> {
    source: Source,
    state: &'a mut State,
}

impl Store {
    /// An empty store that waits for `sources`.
    #[must_use]
    pub fn new(sources: impl IntoIterator<Item = Source>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                parts: BTreeMap::new(),
                awaited: sources.into_iter().collect(),
            }),
            out: watch::Sender::new(Arc::default()),
        })
    }

    /// The set as last published; of generation 0 before the first.
    #[must_use]
    pub fn current(&self) -> Arc<ConfigSet> {
        self.out.borrow().clone()
    }

    /// Follows what is published.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<ConfigSet>> {
        self.out.subscribe()
    }

    /// Waits until nobody follows any more.
    pub async fn unwatched(&self) {
        self.out.closed().await;
    }

    /// Lets a source change its parts, then publishes the set if it is another. Parses and judges: not for an
    /// async task to call when there is much of it.
    pub fn change<T>(&self, source: Source, change: impl FnOnce(&mut Parts<'_>) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let done = change(&mut Parts {
            source,
            state: &mut state,
        });
        if state.awaited.is_empty() {
            let current = self.current();
            let next = compose(&state.parts, &current);
            let same = next.problems == current.problems
                && next.objects.len() == current.objects.len()
                && next
                    .objects
                    .iter()
                    .zip(&current.objects)
                    .all(|(a, b)| Arc::ptr_eq(a, b) || a == b);
            if !same || current.generation == 0 {
                self.out.send_replace(Arc::new(ConfigSet {
                    generation: current.generation + 1,
                    ..next
                }));
            }
        }
        done
    }
}

impl Parts<'_> {
    fn part(&mut self, name: &Arc<str>) -> &mut Part {
        self.state
            .parts
            .entry((self.source, name.clone()))
            .or_default()
    }

    /// Keeps the parts whose name `wanted` says yes to.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        let own = self.source;
        self.state
            .parts
            .retain(|(source, name), _| *source != own || wanted(name));
    }

    /// Takes a part away.
    pub fn remove(&mut self, name: &Arc<str>) {
        self.state.parts.remove(&(self.source, name.clone()));
    }

    /// The part is the objects of a YAML text.
    pub fn text(&mut self, name: &Arc<str>, text: &str) {
        let part = self.part(name);
        if text == part.text && !(part.good.is_empty() && part.problems.is_empty()) {
            return;
        }
        let (objects, problems) = parse_file(name, text);
        text.clone_into(&mut part.text);
        part.take(objects, problems);
    }

    /// The part cannot be read: its last good objects stay.
    pub fn unreadable(&mut self, name: &Arc<str>, error: &io::Error) {
        let part = self.part(name);
        part.text.clear();
        part.problems = vec![Problem {
            file: name.clone(),
            line: 1,
            severity: Severity::Error,
            key: None,
            field: String::new(),
            reason: format!("cannot be read: {error}"),
            hint: "the last good version of this file stays in effect".into(),
        }];
    }

    /// The part is these documents, which are in no file: problems name `origin` instead.
    pub fn values(&mut self, name: &Arc<str>, origin: &Arc<str>, documents: &[Value]) {
        let mut objects = Vec::new();
        let mut problems = Vec::new();
        for document in documents {
            let (object, found) = parse_value(origin, document);
            objects.extend(object);
            problems.extend(found);
        }
        let part = self.part(name);
        part.take(objects, problems);
        if part.good.is_empty() && part.problems.is_empty() {
            self.remove(name);
        }
    }

    /// The source has said all there is at this moment.
    pub fn listed(&mut self) {
        self.state.awaited.remove(&self.source);
    }
}

impl Part {
    /// Good objects replace their predecessors, bad ones do not.
    fn take(&mut self, objects: Vec<Object>, mut problems: Vec<Problem>) {
        let no_yaml = objects.is_empty()
            && problems
                .iter()
                .any(|problem| problem.key.is_none() && problem.is_error());
        if no_yaml {
            self.problems = problems;
            return;
        }
        let old = std::mem::take(&mut self.good);
        let last_good = |key: &Key| old.iter().find(|object| object.key == *key).cloned();
        for object in objects {
            let found = validate(&object);
            if found.iter().any(Problem::is_error) {
                self.good.extend(last_good(&object.key));
            } else {
                // The same object keeps its identity, so that "nothing changed" is cheap to see.
                let kept = last_good(&object.key).filter(|kept| **kept == object);
                self.good.push(kept.unwrap_or_else(|| Arc::new(object)));
            }
            problems.extend(found);
        }
        // Objects whose document says who they are but not properly what.
        let broken: BTreeSet<&Key> = problems
            .iter()
            .filter(|problem| problem.is_error())
            .filter_map(|problem| problem.key.as_ref())
            .collect();
        let missing: Vec<Arc<Object>> = broken
            .into_iter()
            .filter(|key| !self.good.iter().any(|object| object.key == **key))
            .filter_map(last_good)
            .collect();
        self.good.extend(missing);
        self.problems = problems;
    }
}

/// One set of all parts: the first of several with one key wins; routes to undefined subsets are
/// not let in; subsets still in use are not let go.
fn compose(parts: &BTreeMap<(Source, Arc<str>), Part>, last: &ConfigSet) -> ConfigSet {
    let mut problems: Vec<Problem> = parts
        .values()
        .flat_map(|part| part.problems.iter().cloned())
        .collect();
    let mut objects: Vec<Arc<Object>> = Vec::new();
    let mut seen: BTreeMap<&Key, &Arc<Object>> = BTreeMap::new();
    for object in parts.values().flat_map(|part| &part.good) {
        match seen.get(&object.key) {
            Some(first) => problems.push(object.problem(
                Severity::Error,
                "metadata.name",
                format!("already defined at {}, which wins", first.origin),
                "",
            )),
            None => {
                seen.insert(&object.key, object);
                objects.push(object.clone());
            }
        }
    }

    let before: BTreeMap<&Key, &Arc<Object>> = last
        .objects
        .iter()
        .map(|object| (&object.key, object))
        .collect();
    let subsets = Subsets::of(objects.iter().map(AsRef::as_ref));
    let mut kept_rules: BTreeMap<Key, Arc<Object>> = BTreeMap::new();
    objects.retain_mut(|object| {
        let undefined = undefined_subsets(object, &subsets);
        if undefined.is_empty() {
            return true;
        }
        problems.extend(undefined);
        // Its last good version stays, with the DestinationRules it relies on.
        let Some(accepted) = before.get(&object.key) else {
            return false;
        };
        for problem in undefined_subsets(accepted, &subsets) {
            tracing::debug!(%problem, "subset still in use");
            for rule in last
                .objects
                .iter()
                .filter(|rule| matches!(rule.spec, Spec::DestinationRule(_)))
            {
                if undefined_subsets(accepted, &Subsets::of([rule.as_ref()])).len()
                    < undefined_subsets(accepted, &Subsets::default()).len()
                {
                    kept_rules.insert(rule.key.clone(), rule.clone());
                }
            }
        }
        *object = (*accepted).clone();
        true
    });
    for (key, rule) in kept_rules {
        problems.push(rule.problem(
            Severity::Warning,
            "",
            "changed or removed while routes still name its subsets; the last version stays until they do not",
            "",
        ));
        match objects.iter_mut().find(|object| object.key == key) {
            Some(object) => *object = rule,
            None => objects.push(rule),
        }
    }
    objects.sort_by(|a, b| (&a.origin.file, a.origin.line).cmp(&(&b.origin.file, b.origin.line)));

    problems.extend(check_references(&objects));
    problems.sort();
    problems.dedup();
    ConfigSet {
        objects,
        problems,
        generation: last.generation,
    }
}
