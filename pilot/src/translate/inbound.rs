//! A sidecar's inbound listeners: the workload's ports, each by mTLS mode and by what it speaks.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener,
};
use envoy_types::pb::envoy::config::route::v3::{
    RouteAction, RouteConfiguration, VirtualHost, route_action::ClusterSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use lateen_config::networking::IngressListener;
use lateen_config::security::MutualTlsMode;

use crate::model::{InboundPort, Protocol};

use super::http::{self, Side};
use super::interception::{Traffic, app_address};
use super::listener::{
    PLAIN_HTTP, chain, http_inspector, insert, inspection, listener_filter, other_family,
    tls_inspector, transparent,
};
use super::mixer::{self, Direction};
use super::tcp::{self, Weighted};
use super::wire::{ZERO, bool_value, ip_address, u32_value};
use super::{Resources, Scope, names, route, tls};

/// A port of the workload and what is known about it.
pub(super) struct Inbound {
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    /// The service port that leads to it; none for ports only the node or its Sidecar names.
    served: Option<InboundPort>,
    /// Where the application listens for it.
    pub(super) application: Application,
}

/// Where an application listens.
pub(super) enum Application {
    /// Where the client had meant to go, whichever of the workload's addresses that is.
    AsMeant,
    /// At an address.
    At(SocketAddr),
    /// At a unix socket.
    Pipe(String),
}

impl Application {
    fn of(scope: &Scope<'_>, port: u16) -> Application {
        app_address(scope.node, port).map_or(Application::AsMeant, Application::At)
    }
}

/// What a chain is for.
#[derive(Clone, Copy)]
enum Target<'a> {
    Port(&'a Inbound),
    /// Ports nobody declared.
    Rest,
}

/// The workload's ports: those of its Sidecar's ingress if that has any, else those that services lead to,
/// and those the node names itself.
pub(super) fn ports(scope: &Scope<'_>, conflicts: &mut Vec<String>) -> BTreeMap<u16, Inbound> {
    let mut served: BTreeMap<u16, InboundPort> = BTreeMap::new();
    for port in scope.snapshot.inbound_ports(scope.node) {
        match served.get(&port.workload_port) {
            None => {
                served.insert(port.workload_port, port);
            }
            Some(winner) if winner.port.protocol.is_http() != port.port.protocol.is_http() => {
                conflicts.push(format!(
                    "workload port {} is {:?} by {} and {:?} by {}; the first wins",
                    port.workload_port,
                    winner.port.protocol,
                    winner.service.hostname,
                    port.port.protocol,
                    port.service.hostname
                ));
            }
            Some(_) => {}
        }
    }
    let ingress = scope
        .snapshot
        .sidecar(scope.node)
        .map_or(&[][..], |(sidecar, _)| &sidecar.ingress);
    let mut all: BTreeMap<u16, Inbound> = if ingress.is_empty() {
        served
            .into_iter()
            .map(|(number, served)| {
                let inbound = Inbound {
                    port: number,
                    protocol: served.port.protocol,
                    served: Some(served),
                    application: Application::of(scope, number),
                };
                (number, inbound)
            })
            .collect()
    } else {
        ingress
            .iter()
            .filter_map(|listener| {
                let inbound = of_ingress(scope, listener, &mut served)?;
                Some((inbound.port, inbound))
            })
            .collect()
    };
    if matches!(scope.traffic, Traffic::Bound { .. }) {
        for port in scope.node.app_ports.keys() {
            all.entry(*port).or_insert_with(|| Inbound {
                port: *port,
                protocol: Protocol::Tcp,
                served: None,
                application: Application::of(scope, *port),
            });
        }
    }
    all
}

fn of_ingress(
    scope: &Scope<'_>,
    listener: &IngressListener,
    served: &mut BTreeMap<u16, InboundPort>,
) -> Option<Inbound> {
    let port = listener.port.as_ref()?;
    let number = u16::try_from(port.number).ok().filter(|port| *port != 0)?;
    let application = match listener.default_endpoint.strip_prefix("unix://") {
        Some(path) => Application::Pipe(path.to_owned()),
        None => match listener.default_endpoint.parse::<SocketAddr>() {
            // `0.0.0.0` and `[::]` are the workload's own address.
            Ok(named) if named.ip().is_unspecified() => {
                Application::At(SocketAddr::new(scope.node.ip(), named.port()))
            }
            Ok(named) => Application::At(named),
            Err(_) => Application::of(scope, number),
        },
    };
    Some(Inbound {
        port: number,
        protocol: Protocol::by_name(&port.protocol.to_ascii_lowercase())
            .unwrap_or_else(|| Protocol::of_service_port(None, &port.name, number, "TCP")),
        served: served.remove(&number),
        application,
    })
}

/// Inbound listeners.
pub(super) fn inbound(scope: &Scope<'_>, resources: &mut Resources) {
    let ports = ports(scope, &mut resources.conflicts);
    for inbound in ports.values() {
        if speaks(inbound.protocol) != Speaks::Tcp {
            let name = names::inbound(inbound.port);
            let config = routes(scope, Target::Port(inbound), &name);
            resources.routes.insert(name, config);
        }
    }
    match scope.traffic {
        Traffic::Bound { .. } => {
            for inbound in ports.values() {
                bound(scope, resources, inbound);
            }
        }
        Traffic::Redirected { .. } => virtual_inbound(scope, resources, &ports),
    }
}

/// What is known about the bytes of a port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http,
    Tcp,
    /// Nothing: the first bytes tell.
    Unknown,
}

fn speaks(protocol: Protocol) -> Speaks {
    match protocol {
        Protocol::Unknown => Speaks::Unknown,
        protocol if protocol.is_http() => Speaks::Http,
        _ => Speaks::Tcp,
    }
}

/// One way in: what a connection must look like, and what is made of it.
struct Door {
    http: bool,
    mesh: bool,
    transport: &'static str,
    protocols: &'static [&'static str],
}

const fn door(
    http: bool,
    mesh: bool,
    transport: &'static str,
    protocols: &'static [&'static str],
) -> Door {
    Door {
        http,
        mesh,
        transport,
        protocols,
    }
}

/// By mTLS mode and what the port speaks. Envoy does not go back from one transport to another, so whatever is
/// to be let in stands under its own.
fn doors(mode: MutualTlsMode, speaks: Speaks) -> Vec<Door> {
    let mesh_http = || door(true, true, "tls", tls::MESH_HTTP_MARKS);
    // The application's own TLS is none of ours, so it goes where plain text goes; HTTP has none.
    let opaque_tls = || door(false, false, "tls", &[]);
    let plain_tcp = || door(false, false, "raw_buffer", &[]);
    let plain_http = || door(true, false, "raw_buffer", PLAIN_HTTP);
    match (mode, speaks) {
        (MutualTlsMode::Strict, Speaks::Http) => vec![door(true, true, "tls", &[])],
        (MutualTlsMode::Strict, Speaks::Tcp) => vec![door(false, true, "tls", &[])],
        (MutualTlsMode::Strict, Speaks::Unknown) => {
            vec![mesh_http(), door(false, true, "tls", &[])]
        }
        (MutualTlsMode::Permissive, Speaks::Http) => vec![
            door(true, true, "tls", tls::MESH_MARKS),
            door(true, false, "raw_buffer", &[]),
        ],
        (MutualTlsMode::Permissive, Speaks::Tcp) => vec![
            door(false, true, "tls", tls::MESH_MARKS),
            opaque_tls(),
            plain_tcp(),
        ],
        (MutualTlsMode::Permissive, Speaks::Unknown) => vec![
            mesh_http(),
            door(false, true, "tls", tls::MESH_TCP_MARKS),
            opaque_tls(),
            plain_http(),
            plain_tcp(),
        ],
        (MutualTlsMode::Disable | MutualTlsMode::Unset, Speaks::Http) => {
            vec![door(true, false, "", &[])]
        }
        (MutualTlsMode::Disable | MutualTlsMode::Unset, Speaks::Tcp) => {
            vec![door(false, false, "", &[])]
        }
        (MutualTlsMode::Disable | MutualTlsMode::Unset, Speaks::Unknown) => {
            vec![opaque_tls(), plain_http(), plain_tcp()]
        }
    }
}

/// The chains of a port: `match_port` tells them from those of others on the same listener.
fn chains(scope: &Scope<'_>, target: Target<'_>, match_port: Option<u16>) -> Vec<FilterChain> {
    let (port, speaks) = match target {
        Target::Port(inbound) => (inbound.port, speaks(inbound.protocol)),
        // Port 0 is nobody's own setting: the workload's general one.
        Target::Rest => (match_port.unwrap_or(0), Speaks::Unknown),
    };
    let labels = scope.labels();
    let mode = scope
        .snapshot
        .mutual_tls(&scope.node.namespace, labels, port);
    doors(mode, speaks)
        .into_iter()
        .map(|door| {
            let matcher = FilterChainMatch {
                destination_port: match_port.and_then(|port| u32_value(port.into())),
                transport_protocol: door.transport.to_owned(),
                application_protocols: door
                    .protocols
                    .iter()
                    .map(|protocol| (*protocol).to_owned())
                    .collect(),
                ..Default::default()
            };
            let name = match target {
                Target::Port(inbound) => format!("0.0.0.0_{}", inbound.port),
                Target::Rest if door.http => "virtualInbound-catchall-http".to_owned(),
                Target::Rest => "virtualInbound".to_owned(),
            };
            let alpn = if door.http {
                tls::SERVE_HTTP
            } else {
                tls::MESH_TCP
            };
            FilterChain {
                filter_chain_match: Some(matcher)
                    .filter(|matcher| *matcher != FilterChainMatch::default()),
                transport_socket: door
                    .mesh
                    .then(|| tls::mesh_server(scope.trust_domains(), alpn)),
                ..chain(name, filters(scope, target, door.http))
            }
        })
        .collect()
}

fn filters(scope: &Scope<'_>, target: Target<'_>, http: bool) -> Vec<Filter> {
    let (cluster, address, stat_prefix) = match target {
        Target::Port(inbound) => {
            let ip = scope.node.ip();
            (
                names::inbound(inbound.port),
                Some((ip, inbound.port)),
                format!("inbound_{ip}_{}", inbound.port),
            )
        }
        Target::Rest => (
            names::INBOUND_PASSTHROUGH.to_owned(),
            None,
            names::INBOUND_PASSTHROUGH.to_owned(),
        ),
    };
    if http {
        // By name, so that a quota or a rule that changes does not have to wait for connections to drain.
        return vec![http::connection_manager(
            scope,
            Side::Inbound(address.map_or(0, |(_, port)| port)),
            stat_prefix,
            cluster,
            scope.http_hooks(Direction::Inbound, address, Some(destination(target))),
        )];
    }
    let service = destination(target);
    let to = vec![Weighted {
        cluster: cluster.clone(),
        weight: 1,
    }];
    tcp::filters(scope, Direction::Inbound, address, service, &cluster, to)
}

fn destination(target: Target<'_>) -> mixer::Destination<'_> {
    match target {
        Target::Port(Inbound {
            served: Some(served),
            ..
        }) => mixer::Destination::Service(&served.service),
        Target::Port(_) | Target::Rest => mixer::Destination::Named(names::INBOUND_PASSTHROUGH),
    }
}

fn routes(scope: &Scope<'_>, target: Target<'_>, name: &str) -> RouteConfiguration {
    let served = match target {
        Target::Port(inbound) => inbound.served.as_ref(),
        Target::Rest => None,
    };
    let mut route = route::everything(
        "default",
        RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(name.to_owned())),
            timeout: ZERO,
            ..Default::default()
        },
    );
    route.decorator = served.and_then(|served| {
        route::decorator(format!(
            "{}:{}/*",
            served.service.hostname, served.port.number
        ))
    });
    let quotas = served.map_or_else(Vec::new, |served| {
        scope.snapshot.quotas(&served.service.hostname)
    });
    let hooks = scope.route_hooks(Direction::Inbound, destination(target), &quotas);
    route.typed_per_filter_config.extend(hooks.configs);
    let number = match target {
        Target::Port(inbound) => served.map_or(inbound.port, |served| served.port.number),
        Target::Rest => 0,
    };
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: format!("inbound|http|{number}"),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..Default::default()
        }],
        validate_clusters: bool_value(false),
        ..Default::default()
    }
}

/// Without redirection: the port itself.
fn bound(scope: &Scope<'_>, resources: &mut Resources, inbound: &Inbound) {
    let ip = scope.node.ip();
    let speaks = speaks(inbound.protocol);
    let chains = chains(scope, Target::Port(inbound), None);
    let inspects = chains
        .iter()
        .any(|chain| chain.filter_chain_match.is_some());
    let mut listener_filters = Vec::new();
    if inspects {
        listener_filters.push(tls_inspector());
    }
    if speaks == Speaks::Unknown {
        listener_filters.push(http_inspector());
    }
    insert(
        resources,
        Listener {
            name: format!("{ip}_{}", inbound.port),
            address: ip_address(ip, inbound.port),
            filter_chains: chains,
            listener_filters,
            listener_filters_timeout: if inspects {
                // Only what the client starts can be waited for.
                inspection(scope, speaks != Speaks::Http)
            } else {
                None
            },
            continue_on_listener_filters_timeout: inspects,
            traffic_direction: TrafficDirection::Inbound as i32,
            ..Default::default()
        },
    );
}

/// `virtualInbound`: everything the kernel redirects to the workload, by port.
fn virtual_inbound(scope: &Scope<'_>, resources: &mut Resources, ports: &BTreeMap<u16, Inbound>) {
    let listen = scope.snapshot.mesh().proxy_inbound_listen_port;
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
    let mut all = vec![FilterChain {
        filter_chain_match: Some(FilterChainMatch {
            destination_port: u32_value(listen.into()),
            ..Default::default()
        }),
        ..chain("virtualInbound-blackhole", nowhere)
    }];
    for inbound in ports.values().filter(|inbound| inbound.port != listen) {
        all.extend(chains(scope, Target::Port(inbound), Some(inbound.port)));
    }
    // A mode of their own is kept by ports that no service leads to as well.
    let own_modes = scope
        .snapshot
        .ports_with_own_mutual_tls(&scope.node.namespace, scope.labels());
    for port in own_modes {
        if port != listen && !ports.contains_key(&port) {
            all.extend(chains(scope, Target::Rest, Some(port)));
        }
    }
    all.extend(chains(scope, Target::Rest, None));
    let config = routes(scope, Target::Rest, names::INBOUND_PASSTHROUGH);
    resources.routes.insert(config.name.clone(), config);

    let address = if scope.node.addresses.iter().any(IpAddr::is_ipv4) {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    insert(
        resources,
        Listener {
            name: "virtualInbound".to_owned(),
            address: ip_address(address, listen),
            additional_addresses: other_family(scope, address, listen),
            filter_chains: all,
            listener_filters: vec![
                listener_filter(
                    "envoy.filters.listener.original_dst",
                    &OriginalDst::default(),
                ),
                tls_inspector(),
                http_inspector(),
            ],
            listener_filters_timeout: inspection(scope, true),
            continue_on_listener_filters_timeout: true,
            transparent: transparent(scope),
            traffic_direction: TrafficDirection::Inbound as i32,
            ..Default::default()
        },
    );
}
