//! Listeners that routes attach to, and statuses that wait for how many do.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::Object;
use lateen_config::gateway_api::GROUP;
use serde_json::{Value, json};

use super::Output;
use super::status::Status;

/// A listener that routes attach to.
#[derive(Debug)]
pub(super) struct Parent {
    /// `NAMESPACE/NAME` of its Istio Gateway.
    pub(super) internal: String,
    /// Kinds of routes it takes.
    pub(super) kinds: Vec<&'static str>,
    /// Namespaces whose routes it takes, each with the host name.
    pub(super) hosts: Vec<(String, String)>,
    /// Host name as written; empty for all.
    pub(super) hostname: String,
    pub(super) section: String,
    pub(super) port: u32,
    pub(super) protocol: String,
    /// Host names of its owner's other listeners of that port and protocol.
    pub(super) others: Arc<Vec<String>>,
    /// Where its status is: of which object, which listener.
    pub(super) place: (usize, usize),
}

/// Kind, namespace and name of an object with listeners.
pub(super) type Owner = (&'static str, String, String);

/// All listeners of Gateways that are ours.
#[derive(Default)]
pub(super) struct Listeners<'a> {
    pub(super) parents: Vec<Parent>,
    /// By owner, sorted by the names of their Istio Gateways.
    pub(super) by_owner: BTreeMap<Owner, Vec<usize>>,
    pub(super) reports: Vec<Report<'a>>,
}

impl Listeners<'_> {
    /// Of an owner.
    pub(super) fn of(&self, owner: &Owner) -> &[usize] {
        self.by_owner.get(owner).map_or(&[], Vec::as_slice)
    }

    /// Sorts what each owner has, and tells its listeners of one another.
    pub(super) fn arrange(&mut self) {
        let parents = &mut self.parents;
        for indexes in self.by_owner.values_mut() {
            indexes.sort_by_key(|index| parents.get(*index).map(|parent| parent.internal.clone()));
            for index in indexes.iter() {
                let others = others(parents, indexes, *index);
                if let Some(parent) = parents.get_mut(*index) {
                    parent.others = Arc::new(others);
                }
            }
        }
    }

    /// Counts a route that has attached.
    pub(super) fn attach(&mut self, parent: usize) {
        let place = self.parents.get(parent).map(|parent| parent.place);
        if let Some((report, listener)) = place
            && let Some(listener) = self
                .reports
                .get_mut(report)
                .and_then(|report| report.listeners.get_mut(listener))
        {
            listener.attached += 1;
        }
    }
}

/// The status of an object with listeners, still without the number of routes.
pub(super) struct Report<'a> {
    pub(super) object: &'a Object,
    pub(super) kind: &'static str,
    pub(super) value: Value,
    pub(super) listeners: Vec<ListenerReport>,
}

pub(super) struct ListenerReport {
    pub(super) name: String,
    pub(super) kinds: Vec<&'static str>,
    pub(super) conditions: Value,
    pub(super) attached: u32,
}

/// Host names of the other listeners of one owner that share a listener's port and protocol.
fn others(parents: &[Parent], indexes: &[usize], index: usize) -> Vec<String> {
    let Some(own) = parents.get(index) else {
        return Vec::new();
    };
    indexes
        .iter()
        .filter(|other| **other != index)
        .filter_map(|other| parents.get(*other))
        .filter(|other| other.port == own.port && other.protocol == own.protocol)
        .map(|other| other.hostname.clone())
        .filter(|hostname| *hostname != own.hostname)
        .collect()
}

/// Puts the numbers of routes into statuses.
pub(super) fn finish(listeners: Listeners<'_>, output: &mut Output) {
    for report in listeners.reports {
        let mut value = report.value;
        if !report.listeners.is_empty() {
            let all: Vec<Value> = report
                .listeners
                .into_iter()
                .map(|listener| {
                    let kinds: Vec<Value> = listener
                        .kinds
                        .iter()
                        .map(|kind| json!({ "group": GROUP, "kind": kind }))
                        .collect();
                    json!({
                        "name": listener.name,
                        "attachedRoutes": listener.attached,
                        "supportedKinds": kinds,
                        "conditions": listener.conditions,
                    })
                })
                .collect();
            value["listeners"] = Value::Array(all);
        }
        output
            .statuses
            .push(Status::of(report.object, report.kind, value));
    }
}
