//! The policies in force: filled by the configuration, read on the request path without a lock.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use lateen_config::Severity;

use super::policy::{KINDS, Policies, Policy};
use crate::config::{Key, Problem, Source};

/// The view. Clones are one and the same.
#[derive(Clone, Default)]
pub struct PolicyView(Arc<Inner>);

#[derive(Default)]
struct Inner {
    policies: ArcSwap<Policies>,
    /// The last good version of each object.
    good: Mutex<BTreeMap<Key, (Source, Policy)>>,
}

impl PolicyView {
    pub(super) fn policies(&self) -> Arc<Policies> {
        self.0.policies.load_full()
    }

    /// Takes the policies out of `objects`. Says whether a verdict given before may be another now, and what
    /// is wrong; an object that is refused leaves its last good version in force.
    pub fn take(&self, objects: &mut Vec<Source>) -> (bool, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut next = BTreeMap::new();
        let mut good = self.0.good.lock().unwrap_or_else(PoisonError::into_inner);
        objects.retain(|source| {
            let key = &source.key;
            if !KINDS.contains(&&*key.kind) {
                return true;
            }
            match Policy::parse(&key.kind, &key.name, &source.spec) {
                Ok(policy) => {
                    next.insert(key.clone(), (source.clone(), policy));
                }
                Err((field, reason)) => {
                    let last = good.get(key);
                    problems.push(Problem {
                        is_held: last.is_some(),
                        ..source.error(&field, reason)
                    });
                    next.extend(last.map(|last| (key.clone(), last.clone())));
                }
            }
            false
        });
        let is_same = good.len() == next.len()
            && good
                .iter()
                .zip(&next)
                .all(|((k, (_, old)), (n, (_, new)))| k == n && old == new);
        let (policies, dangling) = Policies::new(next.iter().map(|(key, (_, policy))| {
            let name = [&*key.namespace, &*key.name];
            (key, name, policy)
        }));
        for (key, reason) in dangling {
            let source = next.get(key).map(|(source, _)| source);
            let warning = |s: &Source| s.problem(Severity::Warning, "roleRef.name", reason);
            problems.extend(source.map(warning));
        }
        if !is_same {
            self.0.policies.store(Arc::new(policies));
            *good = next;
        }
        (!is_same, problems)
    }
}

impl fmt::Debug for PolicyView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyView").finish_non_exhaustive()
    }
}
