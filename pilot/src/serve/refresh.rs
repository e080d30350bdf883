//! What a node should have, made of what it should have had: where only endpoints changed, only load assignments of
//! the services concerned are computed, and proxies that had the same share the result.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::Served;
use super::session::Target;
use crate::encode::{Catalog, Encoded, Encoder, Kind};
use crate::model::{Node, Snapshot};
use crate::translate::{endpoints, host_of};

/// Most hosts of which assignments are made beside the stream's other work; with more, everything is computed, on a
/// thread of its own.
const MAX_HOSTS: usize = 64;

/// Since which revision nothing but endpoints has changed, and whose. Bounded by the number of services.
#[derive(Debug, Default)]
pub struct EndpointChanges {
    /// Revisions before this one have other clusters, listeners or routes.
    since: u64,
    /// The revision in which the endpoints of a host last changed, if that was after `since`.
    hosts: BTreeMap<Arc<str>, u64>,
    /// What has been made for this revision, by what it was made from.
    made: Made,
}

impl EndpointChanges {
    /// Of a snapshot that is to be served as `revision`.
    #[must_use]
    pub fn after(before: Option<&Served>, snapshot: &Snapshot, revision: u64) -> Self {
        let changed = before.and_then(|before| {
            let changed = snapshot.changed_endpoints(&before.snapshot)?;
            Some((before, changed))
        });
        match changed {
            Some((before, changed)) => {
                let mut hosts = before.endpoints.hosts.clone();
                hosts.extend(changed.into_iter().map(|host| (host, revision)));
                Self {
                    since: before.endpoints.since,
                    hosts,
                    made: Made::default(),
                }
            }
            None => Self {
                since: revision,
                ..Self::default()
            },
        }
    }

    /// Hosts whose endpoints have changed since that revision; `None` if more has.
    fn since(&self, revision: u64) -> Option<Vec<&str>> {
        (revision >= self.since).then(|| {
            self.hosts
                .iter()
                .filter(|(_, changed)| **changed > revision)
                .map(|(host, _)| &**host)
                .collect()
        })
    }
}

/// Names of load assignments.
type Names = Arc<[Arc<str>]>;

/// By address of a catalog and something else, with the catalog, so that its address is not used again.
type ByCatalog<K, T> = Mutex<HashMap<(usize, K), (Arc<Catalog>, T)>>;

/// Catalogs of load assignments and the names in them, each with the catalog it is about.
#[derive(Debug, Default)]
struct Made {
    /// By address of the catalog and the revision it is of: names whose assignment may have changed.
    names: ByCatalog<u64, Names>,
    /// By address of the catalog and of what is put into it. Both are kept, so no address is used again.
    catalogs: ByCatalog<Vec<usize>, Arc<Catalog>>,
}

impl Made {
    fn names(&self, base: &Arc<Catalog>, revision: u64, hosts: &[&str]) -> Names {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, names) = names
            .entry((Arc::as_ptr(base).addr(), revision))
            .or_insert_with(|| {
                let changed = base
                    .keys()
                    .filter(|name| host_of(name).is_some_and(|host| hosts.contains(&host)));
                (base.clone(), changed.cloned().collect())
            });
        names.clone()
    }

    fn catalog(&self, base: &Arc<Catalog>, fresh: Vec<Arc<Encoded>>) -> Arc<Catalog> {
        let key = (
            Arc::as_ptr(base).addr(),
            fresh.iter().map(|one| Arc::as_ptr(one).addr()).collect(),
        );
        let mut catalogs = self.catalogs.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, made) = catalogs.entry(key).or_insert_with(|| {
            let mut made = Catalog::clone(base);
            made.extend(fresh.into_iter().map(|one| (one.name.clone(), one)));
            (base.clone(), Arc::new(made))
        });
        made.clone()
    }
}

/// What a node should have of `served`, made from what it should have of `revision`; `None` if that takes a whole
/// translation.
#[must_use]
pub fn refresh(
    served: &Served,
    node: &Node,
    revision: u64,
    had: &Target,
    encoder: &Encoder,
) -> Option<Target> {
    let hosts = served.endpoints.since(revision)?;
    if hosts.len() > MAX_HOSTS {
        return None;
    }
    let base = had.catalogs.get(&Kind::Endpoint)?;
    let names = served.endpoints.made.names(base, revision, &hosts);
    let mut fresh = Vec::with_capacity(names.len());
    for name in names.iter() {
        // Every name was an EDS cluster of the node's, and nothing that made it one has changed.
        let assignment = endpoints(&served.snapshot, name, node)?;
        fresh.push(encoder.encode(name, &assignment));
    }
    let catalog = served.endpoints.made.catalog(base, fresh);
    let xds = had
        .catalogs
        .iter()
        .filter(|(kind, _)| Kind::XDS.contains(kind));
    let mut catalogs = served.generic.clone();
    catalogs.extend(xds.map(|(kind, all)| (kind.clone(), all.clone())));
    catalogs.insert(Kind::Endpoint, catalog);
    Some(Target {
        generation: served.snapshot.generation,
        catalogs,
        conflicts: had.conflicts.clone(),
        endpoints_only: Some(names),
    })
}

#[cfg(test)]
#[path = "refresh/tests.rs"]
mod tests;
