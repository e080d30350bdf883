//! The model: one immutable [`Snapshot`] of services, workloads and configuration, indexed for the
//! questions translation asks. Built from a validated set of objects; knows no xDS and no I/O.
//!
//! Deterministic: the same objects give the same snapshot, and everything that iterates, iterates sorted.

mod node;
mod service;
mod registry;
mod delegate;
mod routing;
mod authn;
mod authz;
mod quota;
mod reach;
mod change;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use lateen_config::authorization::AuthorizationPolicy;
use lateen_config::networking::{Gateway, OutboundTrafficPolicy, Sidecar};
use lateen_config::object::Key;
use lateen_config::security::{JwtRule, MutualTlsMode};
use lateen_config::{ConfigSet, MeshConfig, Object, Secret, Spec};

use crate::gateway_api;

pub use self::node::{Agent, Interception, Node, NodeError, Role};
pub use self::quota::BoundQuota;
pub use self::reach::{Phase, Reach, Rules};
pub use self::routing::{DestinationPolicy, Routes, host_matches};
pub use self::service::{
    Container, Endpoint, ExportTo, Labels, Port, Preference, Protocol, Registry, Resolution,
    Service, Target, TlsMode, Workload, selects,
};

/// DNS domain of Kubernetes services.
pub const DNS_DOMAIN: &str = "cluster.local";

/// One generation of everything: what translation reads.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts up with every change.
    pub generation: u64,
    mesh: MeshConfig,
    objects: Vec<Arc<Object>>,
    services: BTreeMap<Arc<str>, Arc<Service>>,
    endpoints: BTreeMap<Arc<str>, BTreeMap<u16, Vec<Arc<Endpoint>>>>,
    workloads: BTreeMap<String, Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    routing: routing::Routing,
    authn: authn::Policies,
    authz: authz::Policies,
    tokens: authz::Policies,
    patches: authz::Policies,
    telemetries: authz::Policies,
    quotas: quota::Quotas,
    rules: Arc<Rules>,
    reach: Reach,
    gateways: Vec<Arc<Object>>,
    /// By namespace.
    sidecars: BTreeMap<Arc<str>, Vec<Arc<Object>>>,
    secrets: Vec<Arc<Object>>,
    /// Secrets and ConfigMaps of Gateway API objects, with the namespaces of the pods that may have them.
    credentials: BTreeMap<String, BTreeSet<String>>,
    gateway_statuses: Arc<[gateway_api::Status]>,
    status: Status,
}

/// What building a snapshot found out, for `/debug/push_status` and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    /// Pods that have no address yet.
    pub pods_without_address: usize,
    /// `HOST:PORT` of services that have a selector, and nobody answers.
    pub ports_without_endpoints: Vec<String>,
    /// Objects that lost against another one, with the winner.
    pub conflicts: Vec<String>,
}

/// A service port of a node's own workload, for inbound listeners.
#[derive(Clone, Debug)]
pub struct InboundPort {
    /// The service.
    pub service: Arc<Service>,
    /// Its port.
    pub port: Port,
    /// The port on the workload.
    pub workload_port: u16,
}

impl Snapshot {
    /// Builds the model of a set of objects; its generation is the set's.
    #[must_use]
    pub fn build(config: &ConfigSet) -> Self {
        let generation = config.generation;
        let mut objects = config.objects.clone();
        objects.sort_by(|a, b| (&a.created, &a.key).cmp(&(&b.created, &b.key)));
        let mut status = Status::default();
        let mesh = mesh_config(&objects);
        let registry = registry::read(&objects, &mesh, &mut status);
        let converted =
            gateway_api::convert(&objects, &mesh, DNS_DOMAIN, Some(&registry.endpoints));
        if !converted.objects.is_empty() {
            objects.extend(converted.objects);
            objects.sort_by(|a, b| (&a.created, &a.key).cmp(&(&b.created, &b.key)));
        }
        let problems = converted.problems.iter().map(ToString::to_string);
        status.conflicts.extend(problems);
        let whole = delegate::resolve(&objects, &mesh, &mut status);
        let routing = routing::Routing::read(&whole, &mesh, &mut status);
        let authn = authn::Policies::read(&objects, &mesh);
        let authz = authz::Policies::read(&objects, |spec| {
            matches!(spec, Spec::AuthorizationPolicy(_))
        });
        let tokens = authz::Policies::read(&objects, |spec| {
            matches!(spec, Spec::RequestAuthentication(_))
        });
        let patches = authz::Policies::read(&objects, |spec| matches!(spec, Spec::EnvoyFilter(_)));
        let telemetries =
            authz::Policies::read(&objects, |spec| matches!(spec, Spec::Telemetry(_)));
        let mut snapshot = Self {
            generation,
            routing,
            quotas: quota::Quotas::read(&objects),
            rules: Arc::new(Rules::read(&objects, &mesh.root_namespace)),
            reach: Reach::default(),
            gateways: of_kind(&objects, |spec| matches!(spec, Spec::Gateway(_))),
            sidecars: BTreeMap::new(),
            secrets: of_kind(&objects, |spec| matches!(spec, Spec::Secret(_))),
            credentials: converted.credentials,
            gateway_statuses: converted.statuses.into(),
            services: registry.services,
            endpoints: BTreeMap::new(),
            workloads: registry.workloads,
            by_address: HashMap::new(),
            authn,
            authz,
            tokens,
            patches,
            telemetries,
            mesh,
            objects,
            status,
        };
        for object in of_kind(&snapshot.objects, |spec| matches!(spec, Spec::Sidecar(_))) {
            snapshot
                .sidecars
                .entry(object.key.namespace.clone())
                .or_default()
                .push(object);
        }
        for workload in snapshot.workloads.values() {
            if let Some(ip) = workload.ip() {
                snapshot
                    .by_address
                    .entry(ip)
                    .or_insert_with(|| workload.clone());
            }
        }
        // Whether an endpoint takes mTLS depends on policy as well as on its label.
        snapshot.endpoints = registry
            .endpoints
            .into_iter()
            .map(|(host, ports)| {
                let ports = ports
                    .into_iter()
                    .map(|(port, all)| {
                        let all = all
                            .into_iter()
                            .map(|endpoint| Arc::new(snapshot.apply_policy(endpoint)))
                            .collect();
                        (port, all)
                    })
                    .collect();
                (host, ports)
            })
            .collect();
        for service in snapshot.services.values() {
            if service.selector.is_empty() {
                continue;
            }
            for port in service
                .ports
                .iter()
                .filter(|port| port.protocol != Protocol::Udp)
            {
                if snapshot
                    .endpoints(&service.hostname, port.number)
                    .is_empty()
                {
                    snapshot
                        .status
                        .ports_without_endpoints
                        .push(format!("{}:{}", service.hostname, port.number));
                }
            }
        }
        snapshot
    }

    fn apply_policy(&self, mut endpoint: Endpoint) -> Endpoint {
        if endpoint.tls_mode == TlsMode::Istio
            && self.mutual_tls(&endpoint.namespace, &endpoint.labels, endpoint.port)
                == MutualTlsMode::Disable
        {
            endpoint.tls_mode = TlsMode::Disabled;
        }
        endpoint
    }

    /// Says which of Mixer's rules count beside its own: those of the snapshot before, unless `confirmed`, which
    /// is that every Mixer has the rules of this one. A snapshot that nobody has said this of counts on nothing.
    #[must_use]
    pub fn with_reach(mut self, before: Option<&Snapshot>, confirmed: bool) -> Self {
        self.reach = Reach::after(before.map(|before| &before.reach), &self.rules, confirmed);
        self
    }

    /// EnvoyFilters for a workload of a namespace with these labels.
    pub fn envoy_filters<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Object> {
        self.patches
            .of(namespace, labels, &self.mesh.root_namespace)
    }

    /// Telemetry objects for a workload of a namespace with these labels, the root namespace's first.
    pub fn telemetries<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Object> {
        self.telemetries
            .of(namespace, labels, &self.mesh.root_namespace)
    }

    /// Which requests Mixer's rules can matter for.
    #[must_use]
    pub fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Mesh-wide settings.
    #[must_use]
    pub fn mesh(&self) -> &MeshConfig {
        &self.mesh
    }

    /// All objects, oldest first.
    #[must_use]
    pub fn objects(&self) -> &[Arc<Object>] {
        &self.objects
    }

    /// What building it found out.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// TLS material by namespace and name.
    #[must_use]
    pub fn secret(&self, namespace: &str, name: &str) -> Option<&Secret> {
        self.secrets.iter().find_map(|object| match &object.spec {
            Spec::Secret(secret)
                if &*object.key.namespace == namespace && &*object.key.name == name =>
            {
                Some(secret)
            }
            _ => None,
        })
    }

    /// Whether pods of a namespace may have what a Gateway API object names, `kubernetes-gateway://NAMESPACE/NAME`
    /// or `configmap://NAMESPACE/NAME`.
    #[must_use]
    pub fn may_have(&self, namespace: &str, credential: &str) -> bool {
        self.credentials
            .get(credential)
            .is_some_and(|pods| pods.contains(namespace) || pods.contains("*"))
    }

    /// Text of a ConfigMap.
    #[must_use]
    pub fn config_map_text(&self, namespace: &str, name: &str, key: &str) -> Option<&str> {
        self.objects.iter().find_map(|object| match &object.spec {
            Spec::ConfigMap(map)
                if &*object.key.namespace == namespace && &*object.key.name == name =>
            {
                map.data.get(key).map(String::as_str)
            }
            _ => None,
        })
    }

    /// What Gateway API objects have come to, to be written back to them.
    #[must_use]
    pub fn gateway_statuses(&self) -> &Arc<[gateway_api::Status]> {
        &self.gateway_statuses
    }

    /// All services, by host name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The service of that host name.
    #[must_use]
    pub fn service(&self, hostname: &str) -> Option<&Arc<Service>> {
        self.services.get(hostname)
    }

    /// Services a node may call: exported to its namespace, and within its Sidecar's egress hosts.
    #[must_use]
    pub fn visible_services(&self, node: &Node) -> Vec<&Arc<Service>> {
        let sidecar = self.sidecar(node);
        let routed = sidecar.map_or_else(BTreeSet::new, |(sidecar, namespace)| {
            self.routed_hosts(node, sidecar, namespace)
        });
        self.services
            .values()
            .filter(|service| service.export_to.allows(&node.namespace))
            .filter(|service| {
                sidecar
                    .is_none_or(|(sidecar, namespace)| egress_allows(sidecar, namespace, service))
                    || routed.contains(&*service.hostname)
            })
            .collect()
    }

    /// Where the VirtualServices that a Sidecar lets in lead to: that much more can be called.
    fn routed_hosts(
        &self,
        node: &Node,
        sidecar: &Sidecar,
        sidecar_namespace: &str,
    ) -> BTreeSet<String> {
        if sidecar.egress.is_empty() {
            return BTreeSet::new();
        }
        self.routing
            .mesh_hosts()
            .flat_map(|(_, all)| all)
            .filter(|routes| routes.export_to.allows(&node.namespace))
            .filter(|routes| egress_allows_routes(sidecar, sidecar_namespace, routes))
            .flat_map(|routes| {
                lateen_config::reference::destinations(routes.spec())
                    .map(|(_, to)| full_host(&to.host.to_ascii_lowercase(), routes.namespace()))
            })
            .collect()
    }

    /// The Sidecar object for a node, with its namespace: by labels, else its namespace's, else the mesh's.
    /// Gateways have none.
    #[must_use]
    pub fn sidecar(&self, node: &Node) -> Option<(&Sidecar, &str)> {
        if node.role != Role::Sidecar {
            return None;
        }
        let find = |namespace: &str, by_label: bool| {
            let of_namespace = self.sidecars.get(namespace).map_or(&[][..], Vec::as_slice);
            of_namespace.iter().find_map(|object| match &object.spec {
                Spec::Sidecar(sidecar) => {
                    let labels = sidecar
                        .workload_selector
                        .as_ref()
                        .map(|selector| &selector.labels);
                    let fits = match labels.filter(|labels| !labels.is_empty()) {
                        Some(labels) => by_label && selects(labels, &node.labels),
                        None => !by_label,
                    };
                    fits.then_some((sidecar, &*object.key.namespace))
                }
                _ => None,
            })
        };
        find(&node.namespace, true)
            .or_else(|| find(&node.namespace, false))
            .or_else(|| find(&self.mesh.root_namespace, false))
    }

    /// What becomes of a node's traffic to unknown destinations.
    #[must_use]
    pub fn outbound_policy(&self, node: &Node) -> &OutboundTrafficPolicy {
        self.sidecar(node)
            .and_then(|(sidecar, _)| sidecar.outbound_traffic_policy.as_ref())
            .unwrap_or(&self.mesh.outbound_traffic_policy)
    }

    /// Who answers for a service port, sorted by address.
    #[must_use]
    pub fn endpoints(&self, hostname: &str, port: u16) -> &[Arc<Endpoint>] {
        self.endpoints
            .get(hostname)
            .and_then(|ports| ports.get(&port))
            .map_or(&[], Vec::as_slice)
    }

    /// All workloads, by uid.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The workload at an address.
    #[must_use]
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address)
    }

    /// The workload beside which a node runs, once it is known.
    #[must_use]
    pub fn workload(&self, node: &Node) -> Option<&Arc<Workload>> {
        self.workloads
            .get(&format!("kubernetes://{}.{}", node.name, node.namespace))
            .or_else(|| node.addresses.iter().find_map(|ip| self.workload_at(*ip)))
    }

    /// Ports of the services that select a node's workload, with the workload port each goes to; sorted by
    /// workload port, then by host name. The workload's labels are believed before the node's.
    #[must_use]
    pub fn inbound_ports(&self, node: &Node) -> Vec<InboundPort> {
        let workload = self.workload(node);
        let labels = workload.map_or(&node.labels, |workload| &*workload.labels);
        let mut all: Vec<InboundPort> = self
            .services
            .values()
            .filter(|service| service.namespace == node.namespace)
            .filter(|service| !service.selector.is_empty() && selects(&service.selector, labels))
            .flat_map(|service| {
                service
                    .ports
                    .iter()
                    .filter(|port| port.protocol != Protocol::Udp)
                    .filter_map(|port| {
                        let workload_port = match (workload, &port.target) {
                            (Some(workload), target) => workload.resolve(target)?,
                            (None, Target::Number(number)) => *number,
                            (None, Target::Named(_)) => return None,
                        };
                        Some(InboundPort {
                            service: service.clone(),
                            port: port.clone(),
                            workload_port,
                        })
                    })
            })
            .collect();
        // Services without a selector list their endpoints themselves. Only those of the node's own namespace
        // count: nobody else may open ports of its workloads.
        for service in self
            .services
            .values()
            .filter(|service| service.namespace == node.namespace && service.selector.is_empty())
        {
            for port in &service.ports {
                let own = self
                    .endpoints(&service.hostname, port.number)
                    .iter()
                    .find(|endpoint| {
                        endpoint
                            .address
                            .parse()
                            .is_ok_and(|ip| node.addresses.contains(&ip))
                    });
                all.extend(own.map(|endpoint| InboundPort {
                    service: service.clone(),
                    port: port.clone(),
                    workload_port: endpoint.port,
                }));
            }
        }
        all.sort_by(|a, b| {
            (a.workload_port, &a.service.hostname, a.port.number).cmp(&(
                b.workload_port,
                &b.service.hostname,
                b.port.number,
            ))
        });
        all
    }

    /// Routing objects.
    #[must_use]
    pub fn routing(&self) -> &routing::Routing {
        &self.routing
    }

    /// All VirtualServices, oldest first.
    pub fn virtual_services(&self) -> impl Iterator<Item = &Arc<Routes>> {
        self.routing.virtual_services()
    }

    /// The VirtualService that routes a host for clients in the mesh: bound to gateway `mesh`, visible to the
    /// node; the most specific host wins, then the oldest.
    #[must_use]
    pub fn mesh_routes(&self, hostname: &str, node: &Node) -> Option<&Arc<Routes>> {
        let sidecar = self.sidecar(node);
        let visible = |routes: &Routes| {
            routes.export_to.allows(&node.namespace)
                && sidecar.is_none_or(|(sidecar, namespace)| {
                    egress_allows_routes(sidecar, namespace, routes)
                })
        };
        let home = self
            .services
            .get(hostname)
            .map(|service| &*service.namespace);
        // Gateway API: what a Service's own namespace says is for all its clients; what another says, for the clients
        // there, and goes before.
        let is_own = |routes: &Routes| routes.namespace() == node.namespace;
        if home != Some(&*node.namespace) {
            let of_client = self.routing.for_mesh(hostname, |routes| {
                routes.is_gateway_api() && is_own(routes) && visible(routes)
            });
            if of_client.is_some() {
                return of_client;
            }
        }
        self.routing.for_mesh(hostname, |routes| {
            let concerned =
                !routes.is_gateway_api() || is_own(routes) || home == Some(routes.namespace());
            concerned && visible(routes)
        })
    }

    /// The VirtualServices bound to a gateway, `NAMESPACE/NAME`, oldest first.
    #[must_use]
    pub fn gateway_routes(&self, gateway: &str) -> &[Arc<Routes>] {
        self.routing.for_gateway(gateway)
    }

    /// The policy a client in `namespace` with `labels` uses towards a host: that of the client's namespace,
    /// else of the service's, else of the root namespace; the most specific host wins.
    #[must_use]
    pub fn destination_policy(
        &self,
        hostname: &str,
        namespace: &str,
        labels: &Labels,
    ) -> Option<&Arc<DestinationPolicy>> {
        let service_namespace = self
            .services
            .get(hostname)
            .map(|service| service.namespace.as_str());
        self.routing.destination(
            hostname,
            namespace,
            labels,
            service_namespace,
            &self.mesh.root_namespace,
        )
    }

    /// Gateway objects that select a node, oldest first. An empty selector selects every gateway.
    pub fn gateways(&self, node: &Node) -> impl Iterator<Item = (&Arc<Object>, &Gateway)> {
        let labels = self.workload(node).map_or_else(
            || node.labels.clone(),
            |workload| (*workload.labels).clone(),
        );
        let role = node.role;
        let inbound = if role == Role::Router {
            self.inbound_ports(node)
        } else {
            Vec::new()
        };
        self.gateways
            .iter()
            .filter_map(move |object| match &object.spec {
                Spec::Gateway(gateway)
                    if role == Role::Router
                        && match gateway_services(object) {
                            Some(hosts) => inbound
                                .iter()
                                .any(|port| hosts.contains(&&*port.service.hostname)),
                            None => selects(&gateway.selector, &labels),
                        } =>
                {
                    Some((object, gateway))
                }
                _ => None,
            })
    }

    /// Whether the workload with these labels demands mesh mTLS on a port of its own: never `Unset`.
    #[must_use]
    pub fn mutual_tls(
        &self,
        namespace: &str,
        labels: &Labels,
        workload_port: u16,
    ) -> MutualTlsMode {
        self.authn.mode(namespace, labels, workload_port, || {
            self.services_of(namespace, labels)
        })
    }

    /// Services that select a workload.
    fn services_of(&self, namespace: &str, labels: &Labels) -> Vec<Arc<Service>> {
        self.services
            .values()
            .filter(|service| service.namespace == namespace)
            .filter(|service| !service.selector.is_empty() && selects(&service.selector, labels))
            .cloned()
            .collect()
    }

    /// Ports of a workload for which its own policy says whether they demand mesh mTLS.
    #[must_use]
    pub fn ports_with_own_mutual_tls(&self, namespace: &str, labels: &Labels) -> Vec<u16> {
        self.authn.own_ports(namespace, labels)
    }

    /// AuthorizationPolicies that hold for the workload with these labels: the root namespace's first, then
    /// oldest first.
    pub fn authorization_policies<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = (&'a Object, &'a AuthorizationPolicy)> {
        self.authz
            .of(namespace, labels, &self.mesh.root_namespace)
            .filter_map(|object| match &object.spec {
                Spec::AuthorizationPolicy(policy) => Some((object, &**policy)),
                _ => None,
            })
    }

    /// Tokens of end users that a workload knows: of all RequestAuthentications that hold for it, in the order of
    /// [`Snapshot::authorization_policies`]; where there is none, of the older Policy for that port of its own (without
    /// one: for any).
    #[must_use]
    pub fn token_rules(&self, namespace: &str, labels: &Labels, port: Option<u16>) -> TokenRules {
        let of = |rule, object: &Object| TokenRule {
            rule,
            origin: object.key.clone(),
        };
        let mut all = TokenRules::default();
        for object in self.tokens.of(namespace, labels, &self.mesh.root_namespace) {
            if let Spec::RequestAuthentication(policy) = &object.spec {
                all.rules
                    .extend(policy.jwt_rules.iter().map(|rule| of(rule.clone(), object)));
            }
        }
        if !all.rules.is_empty() {
            return all;
        }
        let old = self
            .authn
            .old_policy(namespace, port, || self.services_of(namespace, labels));
        if let Some((object, policy)) = old {
            let tokens = policy
                .origins
                .iter()
                .filter_map(|origin| origin.jwt.as_ref());
            all.rules
                .extend(tokens.map(|token| of(token.rule(), object)));
            all.required = !policy.origin_is_optional;
        }
        all
    }

    /// Quotas bound to a service, by namespace and name.
    #[must_use]
    pub fn quotas(&self, hostname: &str) -> Vec<BoundQuota<'_>> {
        self.quotas.of(hostname)
    }
}

/// Tokens that a workload knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRules {
    /// Issuers.
    pub rules: Vec<TokenRule>,
    /// Whether a request must carry a good token.
    pub required: bool,
}

/// One issuer, and who says so.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRule {
    /// How its tokens are verified.
    pub rule: JwtRule,
    /// The object with the rule.
    pub origin: Key,
}

/// Host names of the Services that a Gateway stands behind, if it names any instead of selecting by labels.
#[must_use]
pub fn gateway_services(gateway: &Object) -> Option<Vec<&str>> {
    let hosts = gateway.annotations.get(gateway_api::GATEWAY_SERVICE)?;
    Some(hosts.split(',').map(str::trim).collect())
}

/// Completes a host without dots with the namespace of the object that names it.
#[must_use]
pub fn full_host(host: &str, namespace: &str) -> String {
    if host.contains('.') || host == "*" {
        host.to_owned()
    } else {
        format!("{host}.{namespace}.svc.{DNS_DOMAIN}")
    }
}

fn of_kind(objects: &[Arc<Object>], wanted: impl Fn(&Spec) -> bool) -> Vec<Arc<Object>> {
    objects
        .iter()
        .filter(|object| wanted(&object.spec))
        .cloned()
        .collect()
}

/// The ConfigMap `istio` in its namespace of origin, or the defaults.
fn mesh_config(objects: &[Arc<Object>]) -> MeshConfig {
    objects
        .iter()
        .filter(|object| &*object.key.name == "istio")
        .find_map(|object| match &object.spec {
            Spec::ConfigMap(map) => map.mesh.as_deref().cloned(),
            _ => None,
        })
        .unwrap_or_default()
}

/// Whether a Sidecar's egress hosts, `NAMESPACE/HOST`, include a service. Without egress everything is.
fn egress_allows(sidecar: &Sidecar, own_namespace: &str, service: &Service) -> bool {
    if sidecar.egress.is_empty() {
        return true;
    }
    sidecar
        .egress
        .iter()
        .flat_map(|listener| &listener.hosts)
        .any(|pattern| {
            let (namespace, host) = pattern.split_once('/').unwrap_or(("*", pattern));
            let namespace_fits = match namespace {
                "*" => true,
                "." => service.namespace == own_namespace,
                "~" => false,
                named => service.namespace == named,
            };
            namespace_fits && host_matches(host, &service.hostname)
        })
}

/// Whether they let in a VirtualService: by its namespace and any of its hosts.
fn egress_allows_routes(sidecar: &Sidecar, own_namespace: &str, routes: &Routes) -> bool {
    if sidecar.egress.is_empty() {
        return true;
    }
    sidecar
        .egress
        .iter()
        .flat_map(|listener| &listener.hosts)
        .any(|pattern| {
            let (namespace, host) = pattern.split_once('/').unwrap_or(("*", pattern));
            let namespace_fits = match namespace {
                "*" => true,
                "." => routes.namespace() == own_namespace,
                "~" => false,
                named => routes.namespace() == named,
            };
            namespace_fits
                && routes
                    .hosts
                    .iter()
                    .any(|own| host_matches(host, own) || host_matches(own, host))
        })
}

#[cfg(test)]
mod tests;
