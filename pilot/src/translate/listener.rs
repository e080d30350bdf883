//! A sidecar's listeners.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{CidrRange, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter, listener_filter,
};
use envoy_types::pb::envoy::config::route::v3::{
    RouteAction, RouteConfiguration, VirtualHost, route_action::ClusterSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::listener::{
    original_dst::v3::OriginalDst, tls_inspector::v3::TlsInspector,
};
use lateen_config::networking::OutboundMode;
use lateen_config::security::MutualTlsMode;
use prost::{Message, Name};

use crate::model::{InboundPort, Port, Protocol, Service};

use super::http::{self, Side};
use super::interception::{Traffic, may_bind};
use super::mixer::{self, Direction};
use super::route::{self, Binding};
use super::tcp::{self, Weighted};
use super::wire::{ZERO, any, bool_value, duration, ip_address, u32_value};
use super::{Resources, Scope, names, tls, virtual_host};

/// A server that speaks first keeps the inspector waiting; after this the connection is taken as plain.
const INSPECTION: lateen_config::Duration = lateen_config::Duration::from_millis(100);

fn listener_filter<M: Message + Name>(name: &str, config: &M) -> ListenerFilter {
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

fn chain(name: impl Into<String>, filters: Vec<Filter>) -> FilterChain {
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
            let manager = http::connection_manager(
                scope,
                Side::Outbound,
                format!("outbound_{name}"),
                names::HTTP_PROXY.to_owned(),
                scope
                    .mixer
                    .as_ref()
                    .and_then(|mixer| mixer.http_filter(Direction::Outbound, None)),
            );
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
            let taken = BTreeSet::from([http_proxy_port]);
            tcp_listeners(scope, resources, outbound, &taken, true);
        }
        Traffic::Redirected { .. } => {
            let http_ports = http_listeners(scope, resources);
            tcp_listeners(
                scope,
                resources,
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                &http_ports,
                false,
            );
            catch_all_outbound(scope, resources);
        }
    }
}

fn insert(resources: &mut Resources, listener: Listener) {
    resources.listeners.insert(listener.name.clone(), listener);
}

/// `0.0.0.0_PORT` for every HTTP port, each with its own routes.
fn http_listeners(scope: &Scope<'_>, resources: &mut Resources) -> BTreeSet<u16> {
    let ports: BTreeSet<u16> = scope
        .services
        .iter()
        .flat_map(|service| &service.ports)
        .filter(|port| virtual_host::is_http(scope, port.protocol))
        .map(|port| port.number)
        .collect();
    for port in &ports {
        let name = format!("0.0.0.0_{port}");
        let manager = http::connection_manager(
            scope,
            Side::Outbound,
            format!("outbound_{name}"),
            port.to_string(),
            scope
                .mixer
                .as_ref()
                .and_then(|mixer| mixer.http_filter(Direction::Outbound, None)),
        );
        insert(
            resources,
            Listener {
                name,
                address: ip_address(IpAddr::V4(Ipv4Addr::UNSPECIFIED), *port),
                filter_chains: vec![chain("", vec![manager])],
                traffic_direction: TrafficDirection::Outbound as i32,
                bind_to_port: bool_value(false),
                ..Default::default()
            },
        );
        virtual_host::of_port(scope, *port, resources);
    }
    ports
}

/// The chains of one TCP listener, as they come together.
#[derive(Default)]
struct Chains {
    by_sni: Vec<FilterChain>,
    names: BTreeSet<String>,
    rest: Option<(FilterChain, String)>,
}

/// One listener for each TCP port (and virtual address, where addresses tell services apart).
fn tcp_listeners(
    scope: &Scope<'_>,
    resources: &mut Resources,
    bind: IpAddr,
    taken: &BTreeSet<u16>,
    bind_to_port: bool,
) {
    let mut listeners: BTreeMap<(IpAddr, u16), Chains> = BTreeMap::new();
    for service in &scope.services {
        for port in &service.ports {
            if port.protocol.is_http() || port.protocol == Protocol::Udp {
                continue;
            }
            if bind_to_port && !may_bind(scope.node, port.number) {
                resources.conflicts.push(format!(
                    "port {} of {} needs a privilege to bind; TCP clients of this node cannot reach it",
                    port.number, service.hostname
                ));
                continue;
            }
            let addresses: Vec<IpAddr> = if bind_to_port {
                vec![bind]
            } else {
                service
                    .addresses
                    .iter()
                    .filter_map(|address| address.parse().ok())
                    .collect()
            };
            let addresses = if addresses.is_empty() {
                vec![bind]
            } else {
                addresses
            };
            for address in addresses {
                if address == bind && taken.contains(&port.number) {
                    resources.conflicts.push(format!(
                        "port {} of {} is taken on {bind} by HTTP, which wins",
                        port.number, service.hostname
                    ));
                    continue;
                }
                let chains = listeners.entry((address, port.number)).or_default();
                add_service(scope, chains, service, port, &mut resources.conflicts);
            }
        }
    }
    for ((address, port), chains) in listeners {
        let has_sni = !chains.by_sni.is_empty();
        let mut filter_chains = chains.by_sni;
        filter_chains.extend(chains.rest.map(|(chain, _)| chain));
        if filter_chains.is_empty() {
            continue;
        }
        insert(
            resources,
            Listener {
                name: format!("{address}_{port}"),
                address: ip_address(address, port),
                filter_chains,
                listener_filters: if has_sni {
                    vec![tls_inspector()]
                } else {
                    Vec::new()
                },
                listener_filters_timeout: if has_sni { duration(INSPECTION) } else { None },
                continue_on_listener_filters_timeout: has_sni,
                traffic_direction: TrafficDirection::Outbound as i32,
                bind_to_port: if bind_to_port {
                    None
                } else {
                    bool_value(false)
                },
                ..Default::default()
            },
        );
    }
}

fn add_service(
    scope: &Scope<'_>,
    chains: &mut Chains,
    service: &Arc<Service>,
    port: &Port,
    conflicts: &mut Vec<String>,
) {
    if port.protocol.is_opaque_tls() {
        let routed = tls_routes(scope, chains, service, port.number);
        if routed || add_sni(chains, vec![service.hostname.to_string()]).is_empty() {
            return;
        }
        let cluster = names::outbound(port.number, "", &service.hostname);
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
        chains.by_sni.push(sni_chain(
            &cluster,
            vec![service.hostname.to_string()],
            filters,
        ));
        return;
    }
    if let Some((_, winner)) = &chains.rest {
        conflicts.push(format!(
            "port {} of {} is already that of {winner}, which wins: TCP services on one address need different ports",
            port.number, service.hostname
        ));
        return;
    }
    let cluster = names::outbound(port.number, "", &service.hostname);
    let to = tcp::for_service(scope, service, port.number);
    let filters = tcp::filters(
        scope,
        Direction::Outbound,
        None,
        mixer::Destination::Service(service),
        &cluster,
        to,
    );
    chains.rest = Some((chain(cluster, filters), service.hostname.to_string()));
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
    let allowed = scope.snapshot.outbound_policy(scope.node).mode == OutboundMode::AllowAny;
    let cluster = if allowed {
        names::PASSTHROUGH
    } else {
        names::BLACK_HOLE
    };
    let to = |cluster: &str| {
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
    };
    insert(
        resources,
        Listener {
            name: "virtualOutbound".to_owned(),
            address: ip_address(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port),
            filter_chains: vec![
                // A connection to the listener itself would go round for ever.
                FilterChain {
                    filter_chain_match: Some(FilterChainMatch {
                        destination_port: u32_value(port.into()),
                        ..Default::default()
                    }),
                    ..chain("virtualOutbound-trap", to(names::BLACK_HOLE))
                },
                chain("virtualOutbound-catchall-tcp", to(cluster)),
            ],
            use_original_dst: bool_value(true),
            transparent: transparent(scope),
            traffic_direction: TrafficDirection::Outbound as i32,
            ..Default::default()
        },
    );
}

fn transparent(scope: &Scope<'_>) -> Option<envoy_types::pb::google::protobuf::BoolValue> {
    match scope.traffic {
        Traffic::Redirected { transparent: true } => bool_value(true),
        Traffic::Redirected { transparent: false } | Traffic::Bound { .. } => None,
    }
}

/// A port of the workload and what is known about it.
struct Inbound {
    port: u16,
    /// The service port that leads to it; none for ports only the node itself names.
    served: Option<InboundPort>,
}

/// Inbound listeners.
pub(super) fn inbound(scope: &Scope<'_>, resources: &mut Resources) {
    let mut ports: BTreeMap<u16, Inbound> = BTreeMap::new();
    for served in scope.snapshot.inbound_ports(scope.node) {
        let port = served.workload_port;
        match ports.get(&port).and_then(|inbound| inbound.served.as_ref()) {
            None => {
                ports.insert(
                    port,
                    Inbound {
                        port,
                        served: Some(served),
                    },
                );
            }
            Some(winner) if winner.port.protocol.is_http() != served.port.protocol.is_http() => {
                resources.conflicts.push(format!(
                    "workload port {port} is {:?} by {} and {:?} by {}; the first wins",
                    winner.port.protocol,
                    winner.service.hostname,
                    served.port.protocol,
                    served.service.hostname
                ));
            }
            Some(_) => {}
        }
    }
    for inbound in ports.values() {
        if let Some(served) = &inbound.served
            && served.port.protocol.is_http()
        {
            let name = names::inbound(inbound.port);
            let config = inbound_routes(scope, served, &name);
            resources.routes.insert(name, config);
        }
    }
    match scope.traffic {
        Traffic::Bound { .. } => {
            for port in scope.node.app_ports.keys() {
                ports.entry(*port).or_insert(Inbound {
                    port: *port,
                    served: None,
                });
            }
            for inbound in ports.values() {
                bound_inbound(scope, resources, inbound);
            }
        }
        Traffic::Redirected { .. } => virtual_inbound(scope, resources, &ports),
    }
}

fn bound_inbound(scope: &Scope<'_>, resources: &mut Resources, inbound: &Inbound) {
    let ip = scope.node.ip();
    let chains = inbound_chains(scope, inbound, ip, None);
    let inspects = chains.iter().any(|chain| chain.transport_socket.is_some());
    // Only what the client starts can be waited for; see INSPECTION.
    let server_may_speak = !inbound
        .served
        .as_ref()
        .is_some_and(|served| served.port.protocol.is_http());
    insert(
        resources,
        Listener {
            name: format!("{ip}_{}", inbound.port),
            address: ip_address(ip, inbound.port),
            filter_chains: chains,
            listener_filters: if inspects {
                vec![tls_inspector()]
            } else {
                Vec::new()
            },
            listener_filters_timeout: if inspects {
                inspection(scope, server_may_speak)
            } else {
                None
            },
            continue_on_listener_filters_timeout: inspects,
            traffic_direction: TrafficDirection::Inbound as i32,
            ..Default::default()
        },
    );
}

fn inspection(
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

/// The chains of one workload port: by mTLS mode, each ending in the same filters.
fn inbound_chains(
    scope: &Scope<'_>,
    inbound: &Inbound,
    ip: IpAddr,
    match_port: Option<u16>,
) -> Vec<FilterChain> {
    let labels = scope
        .snapshot
        .workload(scope.node)
        .map_or(&scope.node.labels, |workload| &*workload.labels);
    let mode = scope
        .snapshot
        .mutual_tls(&scope.node.namespace, labels, inbound.port);
    let is_http = inbound
        .served
        .as_ref()
        .is_some_and(|served| served.port.protocol.is_http());
    let filters = || inbound_filters(scope, inbound, ip);
    let alpn = if is_http {
        tls::SERVE_HTTP
    } else {
        tls::MESH_TCP
    };
    let name = format!("{ip}_{}", inbound.port);
    mode_chains(scope, mode, &name, match_port, is_http, alpn, filters)
}

fn mode_chains(
    scope: &Scope<'_>,
    mode: MutualTlsMode,
    name: &str,
    match_port: Option<u16>,
    is_http: bool,
    alpn: &[&str],
    filters: impl Fn() -> Vec<Filter>,
) -> Vec<FilterChain> {
    let base = FilterChainMatch {
        destination_port: match_port.and_then(|port| u32_value(port.into())),
        ..Default::default()
    };
    let mesh_tls = |marked: bool| FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            transport_protocol: "tls".to_owned(),
            application_protocols: if marked {
                tls::MESH_MARKS
                    .iter()
                    .map(|mark| (*mark).to_owned())
                    .collect()
            } else {
                Vec::new()
            },
            ..base.clone()
        }),
        transport_socket: Some(tls::mesh_server(scope.trust_domains(), alpn)),
        ..chain(format!("{name}-mtls"), filters())
    };
    let plain = |transport: &str| FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            transport_protocol: transport.to_owned(),
            ..base.clone()
        })
        .filter(|matcher| *matcher != FilterChainMatch::default()),
        ..chain(format!("{name}-plain"), filters())
    };
    match mode {
        MutualTlsMode::Strict => vec![mesh_tls(false)],
        // The application's own TLS is none of ours, so it goes where plain text goes; HTTP has none.
        MutualTlsMode::Permissive => vec![
            mesh_tls(true),
            plain(if is_http { "raw_buffer" } else { "" }),
        ],
        MutualTlsMode::Disable | MutualTlsMode::Unset => vec![plain("")],
    }
}

fn inbound_filters(scope: &Scope<'_>, inbound: &Inbound, ip: IpAddr) -> Vec<Filter> {
    let cluster = names::inbound(inbound.port);
    let address = Some((ip, inbound.port));
    let served = inbound.served.as_ref();
    match served.filter(|served| served.port.protocol.is_http()) {
        // By name, so that a quota or a rule that changes does not have to wait for connections to drain.
        Some(_) => vec![http::connection_manager(
            scope,
            Side::Inbound,
            format!("inbound_{ip}_{}", inbound.port),
            cluster,
            scope
                .mixer
                .as_ref()
                .and_then(|mixer| mixer.http_filter(Direction::Inbound, address)),
        )],
        None => {
            let service = match served {
                Some(served) => mixer::Destination::Service(&served.service),
                None => mixer::Destination::Named(names::INBOUND_PASSTHROUGH),
            };
            let to = vec![Weighted {
                cluster: cluster.clone(),
                weight: 1,
            }];
            tcp::filters(scope, Direction::Inbound, address, service, &cluster, to)
        }
    }
}

fn inbound_routes(scope: &Scope<'_>, served: &InboundPort, cluster: &str) -> RouteConfiguration {
    let mut route = route::everything(
        "default",
        RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: ZERO,
            ..Default::default()
        },
    );
    route.decorator = route::decorator(format!(
        "{}:{}/*",
        served.service.hostname, served.port.number
    ));
    if let Some(mixer) = &scope.mixer {
        let quotas = scope.snapshot.quotas(&served.service.hostname);
        let config = mixer.route(
            Direction::Inbound,
            mixer::Destination::Service(&served.service),
            &quotas,
        );
        route
            .typed_per_filter_config
            .insert(mixer::FILTER.to_owned(), config);
    }
    RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: format!("inbound|http|{}", served.port.number),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..Default::default()
        }],
        validate_clusters: bool_value(false),
        ..Default::default()
    }
}

/// `virtualInbound`: everything the kernel redirects to the workload, by port.
fn virtual_inbound(scope: &Scope<'_>, resources: &mut Resources, ports: &BTreeMap<u16, Inbound>) {
    let listen = scope.snapshot.mesh().proxy_inbound_listen_port;
    let ip = scope.node.ip();
    let nowhere = tcp::filters(
        scope,
        Direction::Inbound,
        None,
        mixer::Destination::Named(names::BLACK_HOLE),
        names::BLACK_HOLE,
        vec![Weighted {
            cluster: names::BLACK_HOLE.to_owned(),
            weight: 1,
        }],
    );
    let mut chains = vec![FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            destination_port: u32_value(listen.into()),
            ..Default::default()
        }),
        ..chain("virtualInbound-blackhole", nowhere)
    }];
    for inbound in ports.values() {
        chains.extend(inbound_chains(scope, inbound, ip, Some(inbound.port)));
    }
    let labels = scope
        .snapshot
        .workload(scope.node)
        .map_or(&scope.node.labels, |workload| &*workload.labels);
    // Port 0 is nobody's own setting: the workload's general one.
    let mode = scope.snapshot.mutual_tls(&scope.node.namespace, labels, 0);
    let pass = || {
        tcp::filters(
            scope,
            Direction::Inbound,
            None,
            mixer::Destination::Named(names::INBOUND_PASSTHROUGH),
            names::INBOUND_PASSTHROUGH,
            vec![Weighted {
                cluster: names::INBOUND_PASSTHROUGH.to_owned(),
                weight: 1,
            }],
        )
    };
    let catch_all = mode_chains(
        scope,
        mode,
        "virtualInbound-catchall",
        None,
        false,
        tls::MESH_TCP,
        pass,
    );
    chains.extend(catch_all.into_iter().map(|mut chain| {
        // One wildcard must tell these from chains of ports: every address.
        chain
            .filter_chain_match
            .get_or_insert_default()
            .prefix_ranges = vec![CidrRange {
            address_prefix: "0.0.0.0".to_owned(),
            prefix_len: u32_value(0),
        }];
        chain
    }));
    insert(
        resources,
        Listener {
            name: "virtualInbound".to_owned(),
            address: ip_address(IpAddr::V4(Ipv4Addr::UNSPECIFIED), listen),
            filter_chains: chains,
            listener_filters: vec![
                listener_filter(
                    "envoy.filters.listener.original_dst",
                    &OriginalDst::default(),
                ),
                tls_inspector(),
            ],
            listener_filters_timeout: inspection(scope, true),
            continue_on_listener_filters_timeout: true,
            transparent: transparent(scope),
            traffic_direction: TrafficDirection::Inbound as i32,
            ..Default::default()
        },
    );
}
