//! What a filter counts for each cluster that requests go to, made when the first request does.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use arc_swap::ArcSwap;

use crate::{cluster::Cluster, shared::Shared, stats::Scope, upstream::WorkerClusters};

/// Counters by the name of the cluster. A cluster that was replaced gets new ones, under the same names.
pub(super) struct PerCluster<T> {
    known: ArcSwap<HashMap<Arc<str>, Known<T>>>,
}

struct Known<T> {
    cluster: Weak<Cluster>,
    counters: Arc<T>,
}

impl<T> Clone for Known<T> {
    fn clone(&self) -> Self {
        Known {
            cluster: self.cluster.clone(),
            counters: self.counters.clone(),
        }
    }
}

impl<T> Default for PerCluster<T> {
    fn default() -> Self {
        PerCluster {
            known: ArcSwap::default(),
        }
    }
}

impl<T> fmt::Debug for PerCluster<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PerCluster({})", self.known.load().len())
    }
}

impl<T> PerCluster<T> {
    /// The counters of a cluster, made in its scope if need be; `None` if there is no such cluster.
    pub(super) fn get(
        &self,
        shared: &Arc<Shared>,
        name: &Arc<str>,
        make: impl Fn(&Scope) -> T,
    ) -> Option<Arc<T>> {
        let cluster = WorkerClusters::of(&shared.clusters)
            .get(name)?
            .cluster
            .clone();
        if let Some(found) = self.known.load().get(name)
            && std::ptr::eq(found.cluster.as_ptr(), Arc::as_ptr(&cluster))
        {
            return Some(found.counters.clone());
        }
        let counters = Arc::new(make(cluster.stats.scope()));
        let new = Known {
            cluster: Arc::downgrade(&cluster),
            counters: counters.clone(),
        };
        self.known.rcu(|known| {
            let mut all = HashMap::clone(known);
            all.retain(|_, known| known.cluster.strong_count() > 0);
            all.insert(name.clone(), new.clone());
            all
        });
        Some(counters)
    }
}
