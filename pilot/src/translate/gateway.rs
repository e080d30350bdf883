//! A gateway's listeners: servers of all Gateway objects that select the node, merged by port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener,
};
use envoy_types::pb::envoy::config::route::v3::{
    Route, RouteConfiguration, VirtualHost, virtual_host::TlsRequirementType,
};
use lateen_config::networking::{Server, TcpDestination};

use crate::model::{InboundPort, Protocol, Routes, full_host, gateway_services, host_matches};

use super::http::{self, Side};
use super::interception::gateway_bind;
use super::listener::tls_inspector;
use super::mixer::{self, Direction};
use super::route::{self, Binding};
use super::tcp;
use super::wire::{ip_address, u32_value};
use super::{Resources, Scope, tls};

const DIRECT_RESPONSE_LIMIT_BYTES: u32 = 1 << 20;

/// By it callers inside the mesh ask proxies why Mixer decided as it did.
const EXPLAIN_HEADER: &str = "x-lateen-explain";

/// Label of a Service whose target ports are nothing to Gateways.
const NO_TRANSLATION: &str = "experimental.istio.io/disable-gateway-port-translation";

/// What servers of one port must have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http,
    Tcp,
    Tls,
}

/// A server and the Gateway it is of, `NAMESPACE/NAME`.
struct Opened<'a> {
    gateway: String,
    namespace: &'a str,
    server: &'a Server,
    /// Its port as users know it: what routes may match on.
    port: u16,
}

impl Opened<'_> {
    fn protocol(&self) -> Protocol {
        let name = self
            .server
            .port
            .as_ref()
            .map_or("", |port| port.protocol.as_str());
        // `HTTP_PROXY` and the like are plain HTTP here.
        Protocol::by_name(&name.to_ascii_lowercase()).unwrap_or(Protocol::Http)
    }

    fn kind(&self) -> Kind {
        let protocol = self.protocol();
        if self.terminates() || protocol.is_opaque_tls() {
            Kind::Tls
        } else if protocol.is_http() {
            Kind::Http
        } else {
            Kind::Tcp
        }
    }

    fn tls_mode(&self) -> &str {
        self.server.tls.as_ref().map_or("", |tls| tls.mode.as_str())
    }

    /// Whether TLS ends here.
    fn terminates(&self) -> bool {
        matches!(
            self.tls_mode(),
            "SIMPLE" | "MUTUAL" | "OPTIONAL_MUTUAL" | "ISTIO_MUTUAL"
        )
    }

    /// Host patterns, each with the namespaces of VirtualServices it takes (`*`: any).
    fn hosts(&self) -> impl Iterator<Item = (&str, String)> {
        self.server
            .hosts
            .iter()
            .map(|host| match host.split_once('/') {
                None => ("*", host.to_ascii_lowercase()),
                Some((".", host)) => (self.namespace, host.to_ascii_lowercase()),
                Some((namespace, host)) => (namespace, host.to_ascii_lowercase()),
            })
    }

    /// The hosts that both this server and a VirtualService are for: the narrower of each pair.
    fn common_hosts(&self, routes: &Routes) -> BTreeSet<String> {
        let mut common = BTreeSet::new();
        for (namespace, pattern) in self.hosts() {
            if namespace != "*" && namespace != routes.namespace() {
                continue;
            }
            let pattern = full_host(&pattern, self.namespace);
            for host in &routes.hosts {
                if host_matches(&pattern, host) {
                    common.insert(host.clone());
                } else if host_matches(host, &pattern) {
                    common.insert(pattern.clone());
                }
            }
        }
        common
    }

    /// SNI to match, none for every name.
    fn server_names(&self) -> Vec<String> {
        let names: BTreeSet<String> = self.hosts().map(|(_, host)| host).collect();
        if names.contains("*") {
            Vec::new()
        } else {
            names.into_iter().collect()
        }
    }
}

pub(super) fn listeners(scope: &Scope<'_>, resources: &mut Resources) {
    let mut by_port: BTreeMap<(IpAddr, u16), Vec<Opened<'_>>> = BTreeMap::new();
    let inbound = scope.snapshot.inbound_ports(scope.node);
    for (object, gateway) in scope.snapshot.gateways(scope.node) {
        for server in &gateway.servers {
            let Ok(port) = u16::try_from(server.port_number()) else {
                continue;
            };
            let bind = server
                .bind
                .parse()
                .unwrap_or_else(|_| gateway_bind(scope.node));
            for workload_port in workload_ports(&inbound, gateway_services(object), port) {
                by_port
                    .entry((bind, workload_port))
                    .or_default()
                    .push(Opened {
                        gateway: format!("{}/{}", object.key.namespace, object.key.name),
                        namespace: &object.key.namespace,
                        server,
                        port,
                    });
            }
        }
    }
    for ((bind, port), mut servers) in by_port {
        let Some(kind) = servers.first().map(Opened::kind) else {
            continue;
        };
        servers.retain(|opened| {
            let fits = opened.kind() == kind;
            if !fits {
                resources.conflicts.push(format!(
                    "port {port}: a server of {} is {:?}, an older one {kind:?}, which wins",
                    opened.gateway,
                    opened.kind()
                ));
            }
            fits
        });
        listener(scope, resources, bind, port, &servers);
    }
}

/// The ports a gateway's pod serves for one of its Services'. A port that no Service has is served as it is,
/// unless the Gateway names the Services it stands behind.
fn workload_ports(inbound: &[InboundPort], named: Option<Vec<&str>>, port: u16) -> BTreeSet<u16> {
    let found: BTreeSet<u16> = inbound
        .iter()
        .filter(|inbound| match &named {
            Some(hosts) => hosts.contains(&&*inbound.service.hostname),
            None => !inbound.service.labels.contains_key(NO_TRANSLATION),
        })
        .filter(|inbound| inbound.port.number == port)
        .map(|inbound| inbound.workload_port)
        .collect();
    if found.is_empty() && named.is_none() {
        return BTreeSet::from([port]);
    }
    found
}

fn listener(
    scope: &Scope<'_>,
    resources: &mut Resources,
    bind: IpAddr,
    port: u16,
    servers: &[Opened<'_>],
) {
    let name = format!("{bind}_{port}");
    let mut chains = Vec::new();
    let mut names = Names::default();
    let plain_http: Vec<&Opened<'_>> = servers
        .iter()
        .filter(|opened| opened.protocol().is_http() && !opened.terminates())
        .collect();
    if !plain_http.is_empty() {
        let route_name = format!("http.{port}");
        let config = routes(scope, &route_name, &plain_http, &mut resources.conflicts);
        resources.routes.insert(route_name.clone(), config);
        chains.push(FilterChain {
            filters: vec![manager(scope, &name, route_name)],
            ..Default::default()
        });
    }
    for opened in servers
        .iter()
        .filter(|opened| !opened.protocol().is_http() || opened.terminates())
    {
        let http = opened.protocol().is_http()
            || opened.protocol() == Protocol::Https && opened.terminates();
        if http {
            let port_name = opened
                .server
                .port
                .as_ref()
                .map_or("", |port| port.name.as_str());
            let (namespace, gateway) = opened
                .gateway
                .split_once('/')
                .unwrap_or(("", &opened.gateway));
            let route_name = format!("https.{}.{port_name}.{gateway}.{namespace}", opened.port);
            let Some(server_names) = names.take(opened, &mut resources.conflicts, port) else {
                continue;
            };
            let socket = opened
                .server
                .tls
                .as_ref()
                .and_then(|settings| tls::gateway_server(scope, settings, true));
            let config = routes(scope, &route_name, &[opened], &mut resources.conflicts);
            resources.routes.insert(route_name.clone(), config);
            chains.push(FilterChain {
                filter_chain_match: sni(server_names, true),
                filters: vec![manager(scope, &name, route_name.clone())],
                transport_socket: socket,
                name: route_name,
                ..Default::default()
            });
        } else if opened.protocol().is_opaque_tls() {
            tls_chains(scope, resources, opened, port, &mut names, &mut chains);
        } else {
            tcp_chain(scope, resources, opened, port, &mut chains);
        }
    }
    if chains.is_empty() {
        return;
    }
    let inspects = chains
        .iter()
        .any(|chain| chain.filter_chain_match.is_some());
    resources.listeners.insert(
        name.clone(),
        Listener {
            address: ip_address(bind, port),
            filter_chains: chains,
            listener_filters: if inspects {
                vec![tls_inspector()]
            } else {
                Vec::new()
            },
            traffic_direction: TrafficDirection::Outbound as i32,
            name,
            ..Default::default()
        },
    );
}

/// SNI names in use on one listener: two chains with one name are refused by Envoy.
#[derive(Default)]
struct Names(BTreeMap<String, String>);

impl Names {
    /// What of a server's names is free; `None` if nothing is.
    fn take(
        &mut self,
        opened: &Opened<'_>,
        conflicts: &mut Vec<String>,
        port: u16,
    ) -> Option<Vec<String>> {
        let wanted = opened.server_names();
        let all = if wanted.is_empty() {
            vec![String::new()]
        } else {
            wanted
        };
        let free = self.free(all, &opened.gateway, conflicts, port);
        if free.is_empty() {
            None
        } else {
            Some(free.into_iter().filter(|name| !name.is_empty()).collect())
        }
    }

    fn free(
        &mut self,
        names: Vec<String>,
        owner: &str,
        conflicts: &mut Vec<String>,
        port: u16,
    ) -> Vec<String> {
        names
            .into_iter()
            .filter(|name| match self.0.get(name) {
                Some(winner) => {
                    conflicts.push(format!("port {port}: SNI {name:?} of {owner} is already that of {winner}, which wins"));
                    false
                }
                None => {
                    self.0.insert(name.clone(), owner.to_owned());
                    true
                }
            })
            .collect()
    }
}

fn sni(server_names: Vec<String>, tls: bool) -> Option<FilterChainMatch> {
    Some(FilterChainMatch {
        transport_protocol: if tls { "tls" } else { "" }.to_owned(),
        server_names,
        ..Default::default()
    })
}

fn manager(scope: &Scope<'_>, listener: &str, route_name: String) -> Filter {
    http::connection_manager(
        scope,
        Side::Gateway,
        format!("outbound_{listener}"),
        route_name,
        scope.http_hooks(Direction::Outbound, None, None),
    )
}

/// One virtual host as VirtualServices come together in it.
#[derive(Default)]
struct Merged {
    /// Of the first server.
    port: u16,
    routes: Vec<Route>,
    https_only: bool,
}

impl Merged {
    fn of(port: u16) -> Self {
        Self {
            port,
            ..Self::default()
        }
    }
}

/// VirtualServices for one host merge: oldest first, what matches everything last.
fn routes(
    scope: &Scope<'_>,
    name: &str,
    servers: &[&Opened<'_>],
    conflicts: &mut Vec<String>,
) -> RouteConfiguration {
    let mut hosts: BTreeMap<String, Merged> = BTreeMap::new();
    let mut seen: BTreeSet<(String, String, u16)> = BTreeSet::new();
    for opened in servers {
        let redirects = opened
            .server
            .tls
            .as_ref()
            .is_some_and(|tls| tls.https_redirect);
        if redirects {
            for (_, host) in opened.hosts() {
                hosts
                    .entry(full_host(&host, opened.namespace))
                    .or_insert_with(|| Merged::of(opened.port))
                    .https_only = true;
            }
        }
        for virtual_service in scope.snapshot.gateway_routes(&opened.gateway) {
            if !virtual_service.export_to.allows(&scope.node.namespace) {
                continue;
            }
            for host in opened.common_hosts(virtual_service) {
                let key = virtual_service.object.key.to_string();
                // Two servers of one port may both be for it.
                if !seen.insert((key, host.clone(), opened.port)) {
                    continue;
                }
                let built = route::of_virtual_service(
                    scope,
                    virtual_service,
                    Binding::Gateway(&opened.gateway),
                    opened.port,
                );
                let merged = hosts
                    .entry(host.clone())
                    .or_insert_with(|| Merged::of(opened.port));
                if built.iter().any(route::is_catch_all)
                    && merged.routes.iter().any(route::is_catch_all)
                {
                    conflicts.push(format!(
                        "{} on {}: {} matches every request to {host}, and so does an older one, which wins",
                        name, opened.gateway, virtual_service.object.key
                    ));
                }
                merged.https_only |= redirects;
                merged.routes.extend(built);
            }
        }
    }
    let mut virtual_hosts: Vec<VirtualHost> = hosts
        .into_iter()
        .map(|(host, mut merged)| {
            // Stable: order by age stays within each half.
            merged.routes.sort_by_key(route::is_catch_all);
            VirtualHost {
                name: format!("{host}:{}", merged.port),
                domains: vec![host],
                routes: merged.routes,
                require_tls: if merged.https_only {
                    TlsRequirementType::All as i32
                } else {
                    TlsRequirementType::None as i32
                },
                include_request_attempt_count: true,
                ..Default::default()
            }
        })
        .filter(|host| !host.routes.is_empty() || host.require_tls != 0)
        .collect();
    if virtual_hosts.is_empty() {
        virtual_hosts.push(VirtualHost {
            name: format!(
                "blackhole:{}",
                servers.first().map_or(0, |opened| opened.port)
            ),
            domains: vec!["*".to_owned()],
            // No route: 404.
            ..Default::default()
        });
    }
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        // Strangers are not told why Mixer refuses them, by sidecars behind this gateway neither.
        request_headers_to_remove: if scope.snapshot.mesh().allow_policy_explanation {
            vec![EXPLAIN_HEADER.to_owned()]
        } else {
            Vec::new()
        },
        // Clients name the port they know, which need not be this one.
        ignore_port_in_host_matching: true,
        max_direct_response_body_size_bytes: u32_value(DIRECT_RESPONSE_LIMIT_BYTES),
        ..Default::default()
    }
}

/// Chains by SNI: TLS passed through, or ended here and passed on as TCP.
fn tls_chains(
    scope: &Scope<'_>,
    resources: &mut Resources,
    opened: &Opened<'_>,
    port: u16,
    names: &mut Names,
    chains: &mut Vec<FilterChain>,
) {
    if opened.tls_mode() == "AUTO_PASSTHROUGH" {
        resources.conflicts.push(format!(
            "{}: AUTO_PASSTHROUGH on port {port} is not supported yet",
            opened.gateway
        ));
        return;
    }
    let socket = opened
        .server
        .tls
        .as_ref()
        .and_then(|settings| tls::gateway_server(scope, settings, false));
    let binding = Binding::Gateway(&opened.gateway);
    for virtual_service in scope.snapshot.gateway_routes(&opened.gateway) {
        let common = opened.common_hosts(virtual_service);
        if common.is_empty() {
            continue;
        }
        let mut wanted: Vec<(Vec<String>, &[TcpDestination])> = Vec::new();
        for route in &virtual_service.spec().tls {
            for entry in route
                .matches
                .iter()
                .filter(|entry| tcp::tls_fits(scope, virtual_service, entry, binding, opened.port))
            {
                let sni_hosts = entry
                    .sni_hosts
                    .iter()
                    .filter(|sni| {
                        common
                            .iter()
                            .any(|host| host_matches(host, sni) || host_matches(sni, host))
                    })
                    .cloned()
                    .collect();
                wanted.push((sni_hosts, &route.route));
            }
        }
        if opened.terminates() {
            for route in &virtual_service.spec().tcp {
                if tcp_route_fits(scope, virtual_service, route, binding, opened.port) {
                    wanted.push((common.iter().cloned().collect(), &route.route));
                }
            }
        }
        for (sni_hosts, to) in wanted {
            let server_names: Vec<String> =
                names.free(sni_hosts, &opened.gateway, &mut resources.conflicts, port);
            let to = tcp::destinations(scope, virtual_service, to, opened.port);
            let Some(first) = to.first().map(|weighted| weighted.cluster.clone()) else {
                continue;
            };
            if server_names.is_empty() {
                continue;
            }
            let filters = tcp::filters(
                scope,
                Direction::Outbound,
                None,
                mixer::Destination::Named(&first),
                &first,
                to,
            );
            let server_names = if server_names.iter().any(|name| name == "*") {
                Vec::new()
            } else {
                server_names
            };
            chains.push(FilterChain {
                filter_chain_match: sni(server_names, true),
                filters,
                transport_socket: socket.clone(),
                name: format!("{}#{}", opened.gateway, chains.len()),
                ..Default::default()
            });
        }
    }
}

fn tcp_route_fits(
    scope: &Scope<'_>,
    routes: &Routes,
    route: &lateen_config::networking::TcpRoute,
    binding: Binding<'_>,
    port: u16,
) -> bool {
    route.matches.is_empty() && binding.is_bound(routes)
        || route
            .matches
            .iter()
            .any(|entry| tcp::tcp_fits(scope, routes, entry, binding, port))
}

/// The one chain of plain TCP on a port: the oldest route's.
fn tcp_chain(
    scope: &Scope<'_>,
    resources: &mut Resources,
    opened: &Opened<'_>,
    port: u16,
    chains: &mut Vec<FilterChain>,
) {
    if chains
        .iter()
        .any(|chain| chain.filter_chain_match.is_none())
    {
        resources.conflicts.push(format!(
            "port {port}: TCP of {} meets another server without TLS, which wins",
            opened.gateway
        ));
        return;
    }
    let binding = Binding::Gateway(&opened.gateway);
    for virtual_service in scope.snapshot.gateway_routes(&opened.gateway) {
        if opened.common_hosts(virtual_service).is_empty() {
            continue;
        }
        let fitting = virtual_service
            .spec()
            .tcp
            .iter()
            .find(|route| tcp_route_fits(scope, virtual_service, route, binding, opened.port));
        let Some(route) = fitting else { continue };
        let to = tcp::destinations(scope, virtual_service, &route.route, opened.port);
        let Some(first) = to.first().map(|weighted| weighted.cluster.clone()) else {
            continue;
        };
        let service = tcp::first_service(scope, virtual_service, &route.route);
        let destination = match service {
            Some(service) => mixer::Destination::Service(service),
            None => mixer::Destination::Named(&first),
        };
        chains.push(FilterChain {
            filters: tcp::filters(scope, Direction::Outbound, None, destination, &first, to),
            name: first,
            ..Default::default()
        });
        return;
    }
}
