//! From a snapshot to what one node gets: a pure function without clock or I/O, its output sorted.
//!
//! [`translate`] → [`listener`] (outbound), [`inbound`] ([`gateway`] for routers) and [`route`] (virtual hosts,
//! VirtualServices) → [`cluster`] (by DestinationRule: [`policy`]) → [`endpoint`] ([`locality`]).
//! What EnvoyFilters change of it all: [`patch`]. Beside the path: [`names`],
//! [`tls`], [`secret`], [`http`] (connection manager), [`tcp`], [`telemetry`] ([`access_log`]), [`authorization`] ([`rbac`], [`external`]), [`tokens`], [`mixer`], and [`wire`] for the small change
//! of protobuf. Where traffic enters and leaves is read from the node in [`interception`] only.
//!
//! Stock Envoy gets stock filters only; nothing here makes it refuse a resource that another node's
//! configuration, or a user's valid object, led to.

mod names;
mod wire;
mod interception;
mod policy;
mod tls;
mod mixer;
mod authorization;
mod external;
mod rbac;
mod tokens;
mod fail_mode;
mod access_log;
mod telemetry;
mod http;
mod tcp;
mod route;
mod virtual_host;
mod listener;
mod inbound;
mod gateway;
mod cluster;
mod endpoint;
mod locality;
mod secret;
mod patch;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;

use crate::model::{BoundQuota, Node, Role, Service, Snapshot};

use self::interception::Traffic;
use self::mixer::{Destination, Direction, Hooks, Mixer, RouteHooks};

/// All that a node gets, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    /// LDS.
    pub listeners: BTreeMap<String, Listener>,
    /// RDS.
    pub routes: BTreeMap<String, RouteConfiguration>,
    /// CDS.
    pub clusters: BTreeMap<String, Cluster>,
    /// EDS.
    pub endpoints: BTreeMap<String, ClusterLoadAssignment>,
    /// ECDS: what EnvoyFilters add.
    pub extensions: BTreeMap<String, TypedExtensionConfig>,
    /// SDS: what its listeners and clusters name, as far as the node may have it.
    pub secrets: BTreeMap<String, Secret>,
    /// What had to be left out for this node, and the winner: ports, hosts, domains; what is stricter than written.
    pub conflicts: Vec<String>,
}

/// Computes what a node gets. Pure.
#[must_use]
pub fn translate(snapshot: &Snapshot, node: &Node) -> Resources {
    let scope = Scope::new(snapshot, node);
    let mut resources = Resources::default();
    match node.role {
        Role::Sidecar => {
            listener::outbound(&scope, &mut resources);
            inbound::inbound(&scope, &mut resources);
        }
        Role::Router => gateway::listeners(&scope, &mut resources),
        // Reads configuration objects only.
        Role::Reader => return resources,
    }
    cluster::clusters(&scope, &mut resources);
    patch::apply(&scope, &mut resources);
    endpoint::all(&scope, &mut resources);
    secret::all(&scope, &mut resources);
    resources.conflicts.extend(scope.notes.take());
    resources.conflicts.sort();
    resources.conflicts.dedup();
    resources
}

/// The endpoints of one cluster as a node gets them: what is to be computed when endpoints change.
/// `None` for a name that is no EDS cluster of the node.
#[must_use]
pub fn endpoints(
    snapshot: &Snapshot,
    cluster_name: &str,
    node: &Node,
) -> Option<ClusterLoadAssignment> {
    let scope = Scope::of_endpoints(snapshot, node);
    endpoint::of_cluster(&scope, cluster_name)
}

/// The service whose endpoints a load assignment of that name lists.
#[must_use]
pub fn host_of(cluster_name: &str) -> Option<&str> {
    names::Outbound::parse(cluster_name).map(|parts| parts.host)
}

/// What translation for one node reads over and over.
struct Scope<'a> {
    snapshot: &'a Snapshot,
    node: &'a Node,
    /// Services the node may call, by host name.
    services: Vec<&'a Arc<Service>>,
    /// Where its traffic enters and leaves.
    traffic: Traffic,
    /// How it calls Mixer.
    mixer: Option<Mixer>,
    /// What it logs and traces.
    telemetry: telemetry::Settings,
    /// Names of secrets that what was translated so far asks for.
    credentials: RefCell<BTreeSet<String>>,
    /// What could only be said to the node in a stricter way.
    notes: RefCell<BTreeSet<String>>,
}

impl<'a> Scope<'a> {
    fn new(snapshot: &'a Snapshot, node: &'a Node) -> Self {
        let mut scope = Self {
            services: snapshot.visible_services(node),
            mixer: Mixer::of(snapshot, node),
            ..Self::of_endpoints(snapshot, node)
        };
        scope.telemetry = telemetry::Settings::of(&scope);
        scope
    }

    /// Only what endpoints depend on: these are computed often and one by one.
    fn of_endpoints(snapshot: &'a Snapshot, node: &'a Node) -> Self {
        Self {
            snapshot,
            node,
            services: Vec::new(),
            traffic: Traffic::of(node),
            mixer: None,
            telemetry: telemetry::Settings::default(),
            credentials: RefCell::default(),
            notes: RefCell::default(),
        }
    }

    /// Labels of the workload: what the registry says before what the node says.
    fn labels(&self) -> &crate::model::Labels {
        self.snapshot
            .workload(self.node)
            .map_or(&self.node.labels, |workload| &*workload.labels)
    }

    /// What a connection manager needs for Mixer. `address` is the workload's and `service` the one it serves, for
    /// inbound listeners.
    fn http_hooks(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
        service: Option<Destination<'_>>,
    ) -> Hooks<HttpFilter> {
        let mixer = self.mixer.as_ref();
        mixer
            .map(|mixer| mixer.http(direction, address, service))
            .unwrap_or_default()
    }

    /// What a route needs for Mixer.
    fn route_hooks(
        &self,
        direction: Direction,
        service: Destination<'_>,
        quotas: &[BoundQuota<'_>],
    ) -> RouteHooks {
        let mixer = self.mixer.as_ref();
        mixer
            .map(|mixer| mixer.route(direction, service, quotas))
            .unwrap_or_default()
    }

    /// The cluster of the first of these host names that is a service the node may call, with that port. A name nobody
    /// serves would make Envoy refuse some listeners.
    fn cluster_of(&self, hosts: &[String], port: u16) -> Option<String> {
        let service = hosts.iter().find_map(|host| self.snapshot.service(host))?;
        service.port(port)?;
        self.services
            .iter()
            .any(|visible| visible.hostname == service.hostname)
            .then(|| names::outbound(port, "", &service.hostname))
    }

    fn note(&self, text: String) {
        self.notes.borrow_mut().insert(text);
    }

    fn is_router(&self) -> bool {
        self.node.role == Role::Router
    }

    /// Trust domains whose identities are let in.
    fn trust_domains(&self) -> impl Iterator<Item = &str> {
        let mesh = self.snapshot.mesh();
        std::iter::once(mesh.trust_domain.as_str())
            .chain(mesh.trust_domain_aliases.iter().map(String::as_str))
            .map(|domain| {
                if domain.is_empty() {
                    "cluster.local"
                } else {
                    domain
                }
            })
    }
}

#[cfg(test)]
mod tests;
