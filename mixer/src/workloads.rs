//! The workload view: filled by a source, read by adapters on the request path without a lock.
//!
//! It remembers what was asked for, so that a change is told to the holders of cached verdicts exactly when
//! a verdict may depend on it: when a workload that was looked up changes or goes, or one that was missed
//! appears.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use lateen_adapter::workload::{Workload, Workloads};

/// Lookups that found nothing and are remembered; above it, every new workload counts as missed.
const MAX_MISSES: usize = 10_000;

/// The view. Clones are one and the same.
#[derive(Clone, Default)]
pub struct WorkloadView(Arc<Inner>);

#[derive(Default)]
struct Inner {
    index: ArcSwap<Index>,
    misses: Mutex<Misses>,
}

#[derive(Default)]
struct Misses {
    keys: std::collections::HashSet<MissKey>,
    has_overflowed: bool,
}

#[derive(PartialEq, Eq, Hash)]
enum MissKey {
    Uid(String),
    Ip(IpAddr),
}

#[derive(Default)]
struct Index {
    by_uid: HashMap<String, Arc<Entry>>,
    by_ip: HashMap<IpAddr, Arc<Entry>>,
}

struct Entry {
    workload: Arc<Workload>,
    was_read: AtomicBool,
}

impl WorkloadView {
    /// Takes all workloads there are. Says whether a verdict given before may be another now.
    pub fn replace(&self, workloads: impl IntoIterator<Item = Workload>) -> bool {
        let old = self.0.index.load_full();
        let mut index = Index::default();
        let mut matters = false;
        for workload in workloads {
            let uid = workload.uid.clone();
            let entry = match old.by_uid.get(&uid) {
                Some(entry) if *entry.workload == workload => Arc::clone(entry),
                Some(entry) => {
                    matters |= entry.was_read.load(Ordering::Relaxed) || self.was_missed(&workload);
                    Arc::new(Entry::new(workload))
                }
                None => {
                    matters |= self.was_missed(&workload);
                    Arc::new(Entry::new(workload))
                }
            };
            if let Some(ip) = entry.workload.ip {
                index.by_ip.insert(ip.to_canonical(), Arc::clone(&entry));
            }
            index.by_uid.insert(uid, entry);
        }
        matters |= old.by_uid.iter().any(|(uid, entry)| {
            entry.was_read.load(Ordering::Relaxed) && !index.by_uid.contains_key(uid)
        });
        self.0.index.store(Arc::new(index));
        if matters {
            // Verdicts are asked for anew, and so are the lookups.
            *self.0.misses.lock().unwrap_or_else(PoisonError::into_inner) = Misses::default();
        }
        matters
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.index.load().by_uid.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn was_missed(&self, workload: &Workload) -> bool {
        let misses = self.0.misses.lock().unwrap_or_else(PoisonError::into_inner);
        misses.has_overflowed
            || misses.keys.contains(&MissKey::Uid(workload.uid.clone()))
            || workload
                .ip
                .is_some_and(|ip| misses.keys.contains(&MissKey::Ip(ip.to_canonical())))
    }

    fn miss(&self, key: MissKey) {
        let mut misses = self.0.misses.lock().unwrap_or_else(PoisonError::into_inner);
        if misses.keys.len() < MAX_MISSES {
            misses.keys.insert(key);
        } else if !misses.keys.contains(&key) {
            misses.has_overflowed = true;
        }
    }
}

impl Entry {
    fn new(workload: Workload) -> Self {
        Self {
            workload: Arc::new(workload),
            was_read: AtomicBool::new(false),
        }
    }

    fn read(&self) -> Arc<Workload> {
        if !self.was_read.load(Ordering::Relaxed) {
            self.was_read.store(true, Ordering::Relaxed); // no write to a shared line once it is set
        }
        Arc::clone(&self.workload)
    }
}

impl Workloads for WorkloadView {
    fn by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        let found = self
            .0
            .index
            .load()
            .by_uid
            .get(uid)
            .map(|entry| entry.read());
        if found.is_none() {
            self.miss(MissKey::Uid(uid.to_owned()));
        }
        found
    }

    fn by_ip(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        let ip = ip.to_canonical();
        let found = self.0.index.load().by_ip.get(&ip).map(|entry| entry.read());
        if found.is_none() {
            self.miss(MissKey::Ip(ip));
        }
        found
    }
}

impl fmt::Debug for WorkloadView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadView")
            .field("workloads", &self.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str, ip: &str, version: &str) -> Workload {
        Workload {
            uid: format!("kubernetes://{name}.default"),
            ip: Some(ip.parse().unwrap()),
            labels: [("version".to_owned(), version.to_owned())].into(),
            ..Workload::default()
        }
    }

    #[test]
    fn only_changes_that_verdicts_depend_on_matter() {
        let view = WorkloadView::default();
        assert!(
            !view.replace([workload("a", "10.0.0.1", "v1")]),
            "nobody has asked"
        );
        assert!(
            !view.replace([workload("a", "10.0.0.1", "v2")]),
            "nobody has read it"
        );
        assert!(view.by_ip("10.0.0.1".parse().unwrap()).is_some());
        assert!(!view.replace([
            workload("a", "10.0.0.1", "v2"),
            workload("b", "10.0.0.2", "v1")
        ]));
        assert!(view.replace([
            workload("a", "10.0.0.1", "v3"),
            workload("b", "10.0.0.2", "v1")
        ]));
        assert!(view.by_uid("kubernetes://c.default").is_none());
        assert!(
            !view.replace([workload("a", "10.0.0.1", "v3")]),
            "b was never read"
        );
        assert!(view.replace([
            workload("a", "10.0.0.1", "v3"),
            workload("c", "10.0.0.3", "v1")
        ]));
        assert!(view.by_uid("kubernetes://c.default").is_some());
        assert!(
            view.replace([workload("a", "10.0.0.1", "v3")]),
            "c was read and is gone"
        );
    }
}
