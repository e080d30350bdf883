//! A sidecar's outbound listeners.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{CidrRange, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::{
    AdditionalAddress, Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter,
    listener_filter,
};
use envoy_types::pb::envoy::extensions::filters::listener::{
    http_inspector::v3::HttpInspector, tls_inspector::v3::TlsInspector,
};
use ipnet::IpNet;
use lateen_config::networking::OutboundMode;
use prost::{Message, Name};

use crate::model::{Port, Protocol, Service};

use super::http::{self, Side};
use super::interception::{Traffic, may_bind};
use super::mixer::{self, Direction};
use super::route::Binding;
use super::tcp::{self, Weighted};
use super::wire::{ZERO, any, bool_value, duration, ip_address, u32_value};
use super::{Resources, Scope, names, virtual_host};

/// What the HTTP inspector calls what it has seen.
pub(super) const PLAIN_HTTP: &[&str] = &["http/1.0", "http/1.1", "h2c"];

/// A server that speaks first keeps the inspector waiting; after this the connection is taken as plain.
const INSPECTION: lateen_config::Duration = lateen_config::Duration::from_millis(100);

pub(super) fn listener_filter<M: Message + Name>(name: &str, config: &M) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

pub(super) fn tls_inspector() -> ListenerFilter {
    listener_filter(
        "envoy.filters.listener.tls_inspector",
        &TlsInspector::default(),
    )
}

pub(super) fn http_inspector() -> ListenerFilter {
    listener_filter(
        "envoy.filters.listener.http_inspector",
        &HttpInspector::default(),
    )
}

pub(super) fn chain(name: impl Into<String>, filters: Vec<Filter>) -> FilterChain {
    FilterChain {
        name: name.into(),
        filters,
        ..Default::default()
    }
}

/// Outbound listeners and the routes they ask for.
pub(super) fn outbound(scope: &Scope<'_>, resources: &mut Resources) {
    match scope.traffic {
        Traffic::Bound {
            outbound,
            http_proxy_port,
        } => {
            let name = format!("{outbound}_{http_proxy_port}");
            let manager = manager(scope, &name, names::HTTP_PROXY.to_owned());
            insert(
                resources,
                Listener {
                    name,
                    address: ip_address(outbound, http_proxy_port),
                    filter_chains: vec![chain("", vec![manager])],
                    traffic_direction: TrafficDirection::Outbound as i32,
                    ..Default::default()
                },
            );
            virtual_host::http_proxy(scope, resources);
            bound_listeners(scope, resources, outbound, http_proxy_port);
        }
        Traffic::Redirected { .. } => {
            redirected_listeners(scope, resources);
            catch_all_outbound(scope, resources);
        }
    }
}

pub(super) fn insert(resources: &mut Resources, listener: Listener) {
    resources.listeners.insert(listener.name.clone(), listener);
}

/// One listener as it comes together: chains by address and name, HTTP by what it looks like, the rest.
#[derive(Default)]
struct Chains {
    /// The route configuration of HTTP, and whether the port is declared to be HTTP.
    http: Option<(String, bool)>,
    by_range: Vec<FilterChain>,
    ranges: BTreeSet<IpNet>,
    by_sni: Vec<FilterChain>,
    names: BTreeSet<String>,
    rest: Option<(FilterChain, String)>,
    /// Whether the rest is to be told from HTTP by its first bytes.
    sniffed: bool,
}

/// `0.0.0.0_PORT` for what is told apart by its first bytes or its port alone, `ADDRESS_PORT` for the rest.
fn redirected_listeners(scope: &Scope<'_>, resources: &mut Resources) {
    let any = wildcard(scope);
    let mut listeners: BTreeMap<(IpAddr, u16), Chains> = BTreeMap::new();
    // Declared HTTP first: it wins over TCP on the same port of no address.
    for service in &scope.services {
        for port in service.ports.iter().filter(|port| port.protocol.is_http()) {
            listeners.entry((any, port.number)).or_default().http =
                Some((port.number.to_string(), true));
        }
    }
    for service in &scope.services {
        for port in &service.ports {
            if port.protocol.is_http() || port.protocol == Protocol::Udp {
                continue;
            }
            let ranges: Vec<IpNet> = service
                .addresses
                .iter()
                .filter(|address| address.contains('/'))
                .filter_map(|address| address.parse::<IpNet>().ok())
                .map(|range| range.trunc())
                .collect();
            let addresses = own_addresses(scope, service, port);
            if addresses.is_empty() || !ranges.is_empty() {
                let chains = listeners.entry((any, port.number)).or_default();
                let conflicts = &mut resources.conflicts;
                add_to_wildcard(scope, chains, service, port, ranges, conflicts);
            }
            for address in addresses {
                let chains = listeners.entry((address, port.number)).or_default();
                if port.protocol == Protocol::Unknown {
                    chains.http.get_or_insert_with(|| {
                        (format!("{}:{}", service.hostname, port.number), false)
                    });
                    chains.sniffed = true;
                }
                add_service(
                    scope,
                    chains,
                    service,
                    port,
                    false,
                    &mut resources.conflicts,
                );
            }
        }
    }
    for ((address, port), chains) in listeners {
        if let Some((name, declared)) = &chains.http {
            if *declared || *name == port.to_string() {
                virtual_host::of_port(scope, port, resources);
            } else {
                virtual_host::of_service_port(scope, name, port, resources);
            }
        }
        redirected_listener(scope, resources, address, port, chains);
    }
}

/// Where connections to a service port go by address: its virtual ones, or those of a headless one's pods.
fn own_addresses(scope: &Scope<'_>, service: &Service, port: &Port) -> BTreeSet<IpAddr> {
    if service.headless {
        return scope
            .snapshot
            .endpoints(&service.hostname, port.number)
            .iter()
            .filter_map(|endpoint| endpoint.address.parse().ok())
            .collect();
    }
    service
        .addresses
        .iter()
        .filter_map(|address| address.parse().ok())
        .collect()
}

/// Services without an address of their own, or with ranges of them, share a port's listener.
fn add_to_wildcard(
    scope: &Scope<'_>,
    chains: &mut Chains,
    service: &Arc<Service>,
    port: &Port,
    ranges: Vec<IpNet>,
    conflicts: &mut Vec<String>,
) {
    let declared = matches!(chains.http, Some((_, true)));
    if port.protocol == Protocol::Unknown {
        chains
            .http
            .get_or_insert_with(|| (port.number.to_string(), false));
        chains.sniffed |= ranges.is_empty();
    }
    if ranges.is_empty() {
        if declared && port.protocol == Protocol::Tcp {
            conflicts.push(format!(
                "port {} of {} is taken by HTTP, which wins: TCP services without addresses need ports of their own",
                port.number, service.hostname
            ));
            return;
        }
        add_service(scope, chains, service, port, true, conflicts);
        return;
    }
    let free: Vec<CidrRange> = ranges
        .into_iter()
        .filter(|range| {
            let free = chains.ranges.insert(*range);
            if !free {
                conflicts.push(format!(
                    "{range} port {} of {} is already that of an older service, which wins",
                    port.number, service.hostname
                ));
            }
            free
        })
        .map(|range| CidrRange {
            address_prefix: range.addr().to_string(),
            prefix_len: u32_value(range.prefix_len().into()),
        })
        .collect();
    if free.is_empty() {
        return;
    }
    let cluster = names::outbound(port.number, "", &service.hostname);
    let matcher = FilterChainMatch {
        prefix_ranges: free,
        ..Default::default()
    };
    let passed = |transport: &str| FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            transport_protocol: transport.to_owned(),
            ..matcher.clone()
        }),
        ..chain(cluster.clone(), service_filters(scope, service, port))
    };
    if port.protocol == Protocol::Unknown {
        // Envoy does not go back from a transport to another, so each stands for itself.
        let name = port.number.to_string();
        chains.by_range.push(FilterChain {
            filter_chain_match: Some(FilterChainMatch {
                transport_protocol: "raw_buffer".to_owned(),
                application_protocols: plain_http(),
                ..matcher.clone()
            }),
            ..chain("", vec![manager(scope, &format!("0.0.0.0_{name}"), name)])
        });
        chains
            .by_range
            .extend([passed("raw_buffer"), passed("tls")]);
    } else {
        chains.by_range.push(passed(""));
    }
}

fn plain_http() -> Vec<String> {
    PLAIN_HTTP
        .iter()
        .map(|protocol| (*protocol).to_owned())
        .collect()
}

/// Every address, of the family the node has.
fn wildcard(scope: &Scope<'_>) -> IpAddr {
    if scope.node.addresses.iter().any(IpAddr::is_ipv4) {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    }
}

/// What a listener of every IPv4 address needs to have those of the other family as well.
pub(super) fn other_family(
    scope: &Scope<'_>,
    address: IpAddr,
    port: u16,
) -> Vec<AdditionalAddress> {
    let both = address == IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        && scope.node.addresses.iter().any(IpAddr::is_ipv6);
    if !both {
        return Vec::new();
    }
    vec![AdditionalAddress {
        address: ip_address(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port),
        ..Default::default()
    }]
}

fn manager(scope: &Scope<'_>, listener: &str, route_name: String) -> Filter {
    http::connection_manager(
        scope,
        Side::Outbound,
        format!("outbound_{listener}"),
        route_name,
        scope.http_hooks(Direction::Outbound, None, None),
    )
}

fn redirected_listener(
    scope: &Scope<'_>,
    resources: &mut Resources,
    address: IpAddr,
    port: u16,
    chains: Chains,
) {
    let name = format!("{address}_{port}");
    let shared = address.is_unspecified();
    let has_http = chains.http.is_some();
    let has_sni = !chains.by_sni.is_empty();
    let declared = matches!(chains.http, Some((_, true)));
    let mut filter_chains = chains.by_range;
    let by_address = !filter_chains.is_empty();
    filter_chains.extend(chains.by_sni);
    if let Some((route_name, _)) = chains.http {
        filter_chains.push(FilterChain {
            filter_chain_match: Some(FilterChainMatch {
                transport_protocol: "raw_buffer".to_owned(),
                application_protocols: plain_http(),
                ..Default::default()
            }),
            ..chain("", vec![manager(scope, &name, route_name)])
        });
    }
    // What nobody here is for goes where the client wanted, as without any listener of this port.
    let mut default = None;
    match chains.rest {
        Some((rest, _)) if filter_chains.is_empty() => filter_chains.push(rest),
        Some((rest, _)) => default = Some(rest),
        None if shared => {
            default = Some(chain(
                names::PASSTHROUGH_CHAIN,
                tcp_to(scope, unknown_destination(scope)),
            ));
        }
        None => {}
    }
    if filter_chains.is_empty() {
        return;
    }
    let inspects_tls = has_http || has_sni || by_address && chains.sniffed;
    let mut listener_filters = Vec::new();
    if inspects_tls {
        listener_filters.push(tls_inspector());
    }
    if has_http {
        listener_filters.push(http_inspector());
    }
    let inspects = !listener_filters.is_empty();
    insert(
        resources,
        Listener {
            name,
            address: ip_address(address, port),
            additional_addresses: other_family(scope, address, port),
            filter_chains,
            default_filter_chain: default,
            listener_filters,
            listener_filters_timeout: if inspects {
                // Clients of declared HTTP speak first; of everything else, who knows.
                inspection(scope, !declared)
            } else {
                None
            },
            continue_on_listener_filters_timeout: inspects,
            traffic_direction: TrafficDirection::Outbound as i32,
            bind_to_port: bool_value(false),
            ..Default::default()
        },
    );
}

/// Without redirection: one listener for each TCP port, on the node's outbound address.
fn bound_listeners(scope: &Scope<'_>, resources: &mut Resources, bind: IpAddr, proxy_port: u16) {
    let mut listeners: BTreeMap<u16, Chains> = BTreeMap::new();
    for service in &scope.services {
        for port in &service.ports {
            if port.protocol.is_http() || port.protocol == Protocol::Udp {
                continue;
            }
            if !may_bind(scope.node, port.number) {
                resources.conflicts.push(format!(
                    "port {} of {} needs a privilege to bind; TCP clients of this node cannot reach it",
                    port.number, service.hostname
                ));
                continue;
            }
            if port.number == proxy_port {
                resources.conflicts.push(format!(
                    "port {} of {} is taken on {bind} by HTTP, which wins",
                    port.number, service.hostname
                ));
                continue;
            }
            let chains = listeners.entry(port.number).or_default();
            add_service(scope, chains, service, port, true, &mut resources.conflicts);
        }
    }
    for (port, chains) in listeners {
        let has_sni = !chains.by_sni.is_empty();
        let mut filter_chains = chains.by_sni;
        filter_chains.extend(chains.rest.map(|(chain, _)| chain));
        if filter_chains.is_empty() {
            continue;
        }
        insert(
            resources,
            Listener {
                name: format!("{bind}_{port}"),
                address: ip_address(bind, port),
                filter_chains,
                listener_filters: if has_sni {
                    vec![tls_inspector()]
                } else {
                    Vec::new()
                },
                listener_filters_timeout: if has_sni { duration(INSPECTION) } else { None },
                continue_on_listener_filters_timeout: has_sni,
                traffic_direction: TrafficDirection::Outbound as i32,
                ..Default::default()
            },
        );
    }
}

/// The filters of plain TCP to a service port.
fn service_filters(scope: &Scope<'_>, service: &Arc<Service>, port: &Port) -> Vec<Filter> {
    let to = tcp::for_service(scope, service, port.number);
    tcp::filters(
        scope,
        Direction::Outbound,
        None,
        mixer::Destination::Service(service),
        &names::outbound(port.number, "", &service.hostname),
        to,
    )
}

/// `by_name`: nothing but the name tells TLS services on this address apart.
fn add_service(
    scope: &Scope<'_>,
    chains: &mut Chains,
    service: &Arc<Service>,
    port: &Port,
    by_name: bool,
    conflicts: &mut Vec<String>,
) {
    let cluster = names::outbound(port.number, "", &service.hostname);
    if port.protocol.is_opaque_tls() && tls_routes(scope, chains, service, port.number) {
        return;
    }
    if port.protocol.is_opaque_tls() && by_name {
        let name = service.hostname.to_string();
        if add_sni(chains, vec![name.clone()]).is_empty() {
            return;
        }
        let filters = tcp::filters(
            scope,
            Direction::Outbound,
            None,
            mixer::Destination::Service(service),
            &cluster,
            vec![Weighted {
                cluster: cluster.clone(),
                weight: 1,
            }],
        );
        chains.by_sni.push(sni_chain(&cluster, vec![name], filters));
        return;
    }
    if let Some((_, winner)) = &chains.rest {
        conflicts.push(format!(
            "port {} of {} is already that of {winner}, which wins: TCP services on one address need different ports",
            port.number, service.hostname
        ));
        return;
    }
    chains.rest = Some((
        chain(cluster, service_filters(scope, service, port)),
        service.hostname.to_string(),
    ));
}

/// The names of these that no chain has yet.
fn add_sni(chains: &mut Chains, names: Vec<String>) -> Vec<String> {
    names
        .into_iter()
        .filter(|name| chains.names.insert(name.to_ascii_lowercase()))
        .collect()
}

fn sni_chain(name: &str, server_names: Vec<String>, filters: Vec<Filter>) -> FilterChain {
    FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            server_names,
            ..Default::default()
        }),
        ..chain(name, filters)
    }
}

/// Routes by SNI for a service; whether there were any.
fn tls_routes(scope: &Scope<'_>, chains: &mut Chains, service: &Service, port: u16) -> bool {
    let Some(routes) = scope.snapshot.mesh_routes(&service.hostname, scope.node) else {
        return false;
    };
    let mut any = false;
    for route in &routes.spec().tls {
        for entry in &route.matches {
            if !tcp::tls_fits(scope, routes, entry, Binding::Mesh, port) {
                continue;
            }
            any = true;
            let names = add_sni(chains, entry.sni_hosts.clone());
            let to = tcp::destinations(scope, routes, &route.route, port);
            if names.is_empty() || to.is_empty() {
                continue;
            }
            let cluster = names::outbound(port, "", &service.hostname);
            let attributed = tcp::first_service(scope, routes, &route.route).unwrap_or(service);
            let filters = tcp::filters(
                scope,
                Direction::Outbound,
                None,
                mixer::Destination::Service(attributed),
                &cluster,
                to,
            );
            let name = format!("{cluster}#{}", chains.by_sni.len());
            chains.by_sni.push(sni_chain(&name, names, filters));
        }
    }
    any
}

/// `virtualOutbound`: everything the kernel redirects that no other listener is for.
fn catch_all_outbound(scope: &Scope<'_>, resources: &mut Resources) {
    let port = scope.snapshot.mesh().proxy_listen_port;
    let address = wildcard(scope);
    insert(
        resources,
        Listener {
            name: "virtualOutbound".to_owned(),
            address: ip_address(address, port),
            additional_addresses: other_family(scope, address, port),
            filter_chains: vec![
                // A connection to the listener itself would go round for ever.
                FilterChain {
                    filter_chain_match: Some(FilterChainMatch {
                        destination_port: u32_value(port.into()),
                        ..Default::default()
                    }),
                    ..chain("virtualOutbound-trap", tcp_to(scope, names::BLACK_HOLE))
                },
                chain(
                    "virtualOutbound-catchall-tcp",
                    tcp_to(scope, unknown_destination(scope)),
                ),
            ],
            use_original_dst: bool_value(true),
            transparent: transparent(scope),
            traffic_direction: TrafficDirection::Outbound as i32,
            ..Default::default()
        },
    );
}

/// Where connections to nobody's address go.
fn unknown_destination(scope: &Scope<'_>) -> &'static str {
    match scope.snapshot.outbound_policy(scope.node).mode {
        OutboundMode::AllowAny => names::PASSTHROUGH,
        OutboundMode::RegistryOnly => names::BLACK_HOLE,
    }
}

/// The filters of a chain that leads to a special cluster.
fn tcp_to(scope: &Scope<'_>, cluster: &str) -> Vec<Filter> {
    tcp::filters(
        scope,
        Direction::Outbound,
        None,
        mixer::Destination::Named(cluster),
        cluster,
        vec![Weighted {
            cluster: cluster.to_owned(),
            weight: 1,
        }],
    )
}

pub(super) fn transparent(
    scope: &Scope<'_>,
) -> Option<envoy_types::pb::google::protobuf::BoolValue> {
    match scope.traffic {
        Traffic::Redirected { transparent: true } => bool_value(true),
        Traffic::Redirected { transparent: false } | Traffic::Bound { .. } => None,
    }
}

/// How long the first bytes are waited for; nothing: for ever.
pub(super) fn inspection(
    scope: &Scope<'_>,
    server_may_speak: bool,
) -> Option<envoy_types::pb::google::protobuf::Duration> {
    let mesh = scope
        .snapshot
        .mesh()
        .protocol_detection_timeout
        .filter(|timeout| !timeout.0.is_zero());
    match (mesh, server_may_speak) {
        (Some(timeout), true) => duration(timeout),
        (None, true) => duration(INSPECTION),
        // Clients of HTTP speak first, whenever they like.
        (_, false) => ZERO,
    }
}
