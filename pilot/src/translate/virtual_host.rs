//! Virtual hosts of sidecars' outbound routes: one a service port, and one for all the rest.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::route::v3::{
    RouteAction, RouteConfiguration, VirtualHost, route_action::ClusterSpecifier,
};
use lateen_config::networking::OutboundMode;

use crate::model::{Protocol, Service};

use super::mixer::{Destination, Direction};
use super::route::{self, Binding};
use super::wire::{ZERO, u32_value};
use super::{Resources, Scope, names};

/// Largest body a direct response may have; validation allows as much.
const DIRECT_RESPONSE_LIMIT_BYTES: u32 = 1 << 20;

/// Whether requests to a port are routed as HTTP: also where it is not declared, for that they are HTTP has
/// been seen.
fn is_http(protocol: Protocol) -> bool {
    protocol.is_http() || protocol == Protocol::Unknown
}

/// Virtual hosts by domain: no domain twice, for Envoy refuses such a configuration whole.
struct Hosts<'a> {
    scope: &'a Scope<'a>,
    all: Vec<VirtualHost>,
    taken: BTreeMap<String, String>,
}

impl Hosts<'_> {
    fn add(&mut self, mut host: VirtualHost, conflicts: &mut Vec<String>) {
        let name = host.name.clone();
        host.domains.retain(|domain| {
            let key = domain.to_ascii_lowercase();
            match self.taken.get(&key) {
                Some(winner) => {
                    if *winner != name {
                        conflicts.push(format!(
                            "domain {domain} of {name} is already that of {winner}, which wins"
                        ));
                    }
                    false
                }
                None => {
                    self.taken.insert(key, name.clone());
                    true
                }
            }
        });
        if !host.domains.is_empty() {
            self.all.push(host);
        }
    }
}

/// The route configuration of the HTTP proxy listener: every HTTP port of every service.
pub(super) fn http_proxy(scope: &Scope<'_>, resources: &mut Resources) {
    let config = configuration(scope, names::HTTP_PROXY, None, &mut resources.conflicts);
    resources.routes.insert(config.name.clone(), config);
}

/// The route configuration of one port: that port of every service which has it.
pub(super) fn of_port(scope: &Scope<'_>, port: u16, resources: &mut Resources) {
    let config = configuration(
        scope,
        &port.to_string(),
        Some(port),
        &mut resources.conflicts,
    );
    resources.routes.insert(config.name.clone(), config);
}

/// The route configuration of HTTP that was seen at the address of one service: whatever host it names.
pub(super) fn of_service_port(scope: &Scope<'_>, name: &str, port: u16, resources: &mut Resources) {
    let service = name
        .rsplit_once(':')
        .and_then(|(host, _)| scope.snapshot.service(host));
    let Some(service) = service else { return };
    let config = RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes: of_service(scope, service, port),
            include_request_attempt_count: true,
            ..Default::default()
        }],
        max_direct_response_body_size_bytes: u32_value(DIRECT_RESPONSE_LIMIT_BYTES),
        ..Default::default()
    };
    resources.routes.insert(config.name.clone(), config);
}

fn configuration(
    scope: &Scope<'_>,
    name: &str,
    only: Option<u16>,
    conflicts: &mut Vec<String>,
) -> RouteConfiguration {
    let mut hosts = Hosts {
        scope,
        all: Vec::new(),
        taken: BTreeMap::new(),
    };
    let mut served = BTreeSet::new();
    for service in &scope.services {
        served.insert(service.hostname.to_string());
        for port in &service.ports {
            if !is_http(port.protocol) || only.is_some_and(|only| only != port.number) {
                continue;
            }
            // Who connects to a port need not repeat it; through a proxy, no port means 80.
            let bare = only.is_some() || port.number == 80;
            let host = VirtualHost {
                name: format!("{}:{}", service.hostname, port.number),
                domains: domains(scope, service, port.number, bare),
                routes: of_service(scope, service, port.number),
                include_request_attempt_count: true,
                ..Default::default()
            };
            hosts.add(host, conflicts);
        }
    }
    if only.is_none_or(|only| only == 80) {
        virtual_hosts_without_service(&mut hosts, &served, conflicts);
    }
    let rest = catch_all(scope);
    hosts.add(rest, conflicts);
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: hosts.all,
        max_direct_response_body_size_bytes: u32_value(DIRECT_RESPONSE_LIMIT_BYTES),
        ..Default::default()
    }
}

/// The routes of one service port: its VirtualService's that hold for the node, else all to itself.
fn of_service(
    scope: &Scope<'_>,
    service: &Service,
    port: u16,
) -> Vec<envoy_types::pb::envoy::config::route::v3::Route> {
    let routes = scope
        .snapshot
        .mesh_routes(&service.hostname, scope.node)
        .map(|routes| route::of_virtual_service(scope, routes, Binding::Mesh, port))
        .unwrap_or_default();
    if routes.is_empty() {
        vec![route::to_service(scope, service, port)]
    } else {
        routes
    }
}

/// VirtualServices may route hosts nobody declares as services, on port 80.
fn virtual_hosts_without_service(
    hosts: &mut Hosts<'_>,
    served: &BTreeSet<String>,
    conflicts: &mut Vec<String>,
) {
    let scope = hosts.scope;
    let declared: Vec<String> = scope
        .snapshot
        .routing()
        .mesh_hosts()
        .map(|(host, _)| host.to_owned())
        .filter(|host| !served.contains(host))
        .collect();
    for host in declared {
        // A wildcard over services is theirs.
        if host.starts_with('*')
            && served
                .iter()
                .any(|service| crate::model::host_matches(&host, service))
        {
            continue;
        }
        // Another's wildcard may cover a host whose own VirtualService the node does not see.
        let Some(routes) = scope
            .snapshot
            .mesh_routes(&host, scope.node)
            .filter(|routes| routes.hosts.contains(&host))
        else {
            continue;
        };
        let routes = route::of_virtual_service(scope, routes, Binding::Mesh, 80);
        if !routes.is_empty() && host != "*" {
            let domains = vec![host.clone(), format!("{host}:80")];
            hosts.add(
                VirtualHost {
                    name: format!("{host}:80"),
                    domains,
                    routes,
                    include_request_attempt_count: true,
                    ..Default::default()
                },
                conflicts,
            );
        }
    }
}

/// All names of a service port, seen from the node's namespace.
fn domains(scope: &Scope<'_>, service: &Service, port: u16, bare: bool) -> Vec<String> {
    let mut hosts = Vec::new();
    // A VirtualService for an alias alone has a virtual host of its own.
    let routed = |alias: &str| {
        port == 80
            && scope
                .snapshot
                .mesh_routes(alias, scope.node)
                .is_some_and(|routes| routes.hosts.iter().any(|host| host == alias))
    };
    for name in std::iter::once(&service.hostname).chain(&service.aliases) {
        if *name == service.hostname || !routed(name) {
            hosts.push(name.to_string());
        }
        let suffix = format!(".svc.{}", crate::model::DNS_DOMAIN);
        if let Some((short, namespace)) = name
            .strip_suffix(&suffix)
            .and_then(|rest| rest.rsplit_once('.'))
        {
            if namespace == scope.node.namespace {
                hosts.push(short.to_owned());
            }
            hosts.push(format!("{short}.{namespace}"));
            hosts.push(format!("{short}.{namespace}.svc"));
        }
    }
    if !service.hostname.starts_with('*') {
        hosts.push(format!("{}.", service.hostname));
    }
    if service.headless {
        hosts.push(format!("*.{}", service.hostname));
    }
    hosts.extend(
        service
            .addresses
            .iter()
            .filter(|address| !address.contains('/'))
            .map(|address| {
                if address.contains(':') {
                    format!("[{address}]")
                } else {
                    address.clone()
                }
            }),
    );
    let mut all = Vec::with_capacity(hosts.len() * 2);
    for host in hosts {
        if bare {
            all.push(host.clone());
        }
        all.push(format!("{host}:{port}"));
    }
    all
}

/// Requests to everybody else: passed on if that is allowed and possible, else refused.
fn catch_all(scope: &Scope<'_>) -> VirtualHost {
    let allowed = scope.snapshot.outbound_policy(scope.node).mode == OutboundMode::AllowAny
        && scope.traffic.knows_original_destination();
    let (name, cluster) = if allowed {
        ("allow_any", names::PASSTHROUGH)
    } else {
        ("block_all", names::BLACK_HOLE)
    };
    let mut route = if allowed {
        route::everything(
            name,
            RouteAction {
                cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
                timeout: ZERO,
                ..Default::default()
            },
        )
    } else {
        route::always(name, 502)
    };
    let hooks = scope.route_hooks(Direction::Outbound, Destination::Named(cluster), &[]);
    route.typed_per_filter_config.extend(hooks.configs);
    VirtualHost {
        name: name.to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route],
        include_request_attempt_count: true,
        ..Default::default()
    }
}
