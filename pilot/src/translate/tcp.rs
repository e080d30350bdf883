//! The TCP proxy, and which routes of VirtualServices hold for a connection.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{
    TcpProxy, tcp_proxy::ClusterSpecifier, tcp_proxy::WeightedCluster,
    tcp_proxy::weighted_cluster::ClusterWeight,
};
use lateen_config::networking::{TcpDestination, TcpMatch, TlsMatch};
use lateen_config::telemetry::Mode;

use crate::model::{Routes, Service, full_host, selects};

use super::Scope;
use super::mixer::{Destination, Direction, Mixer};
use super::policy::Policy;
use super::route::Binding;
use super::wire::{any, duration};
use super::{authorization, names, route};

/// A weighted cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Weighted {
    pub(super) cluster: String,
    pub(super) weight: u32,
}

/// The network filters of a chain that sends to these clusters.
pub(super) fn filters(
    scope: &Scope<'_>,
    direction: Direction,
    address: Option<(std::net::IpAddr, u16)>,
    service: Destination<'_>,
    stat_prefix: &str,
    to: Vec<Weighted>,
) -> Vec<Filter> {
    let mixer = scope.mixer.as_ref();
    let hooks = mixer
        .map(|mixer| mixer.tcp(direction, address, service))
        .unwrap_or_default();
    let mode = match direction {
        Direction::Inbound => Mode::Server,
        Direction::Outbound => Mode::Client,
    };
    let logs = scope.telemetry.logs(mode);
    let mut access_log = match mixer {
        Some(mixer) => mixer.other_tcp_logs(logs),
        None => logs.to_vec(),
    };
    access_log.extend(hooks.access_log);
    let mut filters = if direction == Direction::Inbound || scope.is_router() {
        authorization::network_filters(scope)
    } else {
        Vec::new()
    };
    filters.extend(hooks.filters);
    filters.push(proxy(scope, stat_prefix, to, access_log));
    filters
}

fn proxy(
    scope: &Scope<'_>,
    stat_prefix: &str,
    to: Vec<Weighted>,
    access_log: Vec<AccessLog>,
) -> Filter {
    let first = to
        .first()
        .map(|weighted| weighted.cluster.clone())
        .unwrap_or_default();
    let idle_timeout = names::Outbound::parse(&first).and_then(|name| {
        let rule =
            scope
                .snapshot
                .destination_policy(name.host, &scope.node.namespace, &scope.node.labels);
        Policy::of(rule.map(AsRef::as_ref), name.port, name.subset)
            .pool?
            .tcp
            .idle_timeout
    });
    let cluster_specifier = if to.len() == 1 {
        ClusterSpecifier::Cluster(first)
    } else {
        ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: to
                .into_iter()
                .map(|weighted| ClusterWeight {
                    name: weighted.cluster,
                    weight: weighted.weight,
                    ..Default::default()
                })
                .collect(),
        })
    };
    Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(&TcpProxy {
            stat_prefix: stat_prefix.to_owned(),
            cluster_specifier: Some(cluster_specifier),
            access_log,
            access_log_options: scope.mixer.as_ref().and_then(Mixer::tcp_log_options),
            idle_timeout: idle_timeout.and_then(duration),
            ..Default::default()
        }))),
    }
}

/// The clusters a VirtualService's destinations mean. Never empty, never of weight zero altogether.
pub(super) fn destinations(
    scope: &Scope<'_>,
    routes: &Routes,
    list: &[TcpDestination],
    listener_port: u16,
) -> Vec<Weighted> {
    let only = list.len() == 1;
    list.iter()
        .filter(|to| only || to.weight > 0)
        .map(|to| Weighted {
            cluster: route::cluster_name(scope, routes.namespace(), &to.destination, listener_port),
            weight: u32::try_from(to.weight).unwrap_or(0).max(1),
        })
        .collect()
}

/// What VirtualServices make of plain TCP to a service port; itself if none says anything.
pub(super) fn for_service(scope: &Scope<'_>, service: &Service, port: u16) -> Vec<Weighted> {
    let own = || {
        vec![Weighted {
            cluster: names::outbound(port, "", &service.hostname),
            weight: 1,
        }]
    };
    let Some(routes) = scope.snapshot.mesh_routes(&service.hostname, scope.node) else {
        return own();
    };
    let binding = Binding::Mesh;
    routes
        .spec()
        .tcp
        .iter()
        .find(|route| {
            route.matches.is_empty() && binding.is_bound(routes)
                || route
                    .matches
                    .iter()
                    .any(|entry| tcp_fits(scope, routes, entry, binding, port))
        })
        .map(|route| destinations(scope, routes, &route.route, port))
        .filter(|to| !to.is_empty())
        .unwrap_or_else(own)
}

pub(super) fn tcp_fits(
    scope: &Scope<'_>,
    routes: &Routes,
    entry: &TcpMatch,
    binding: Binding<'_>,
    port: u16,
) -> bool {
    (entry.port == 0 || entry.port == u32::from(port))
        && binding.fits(routes, &entry.gateways)
        && source_fits(scope, &entry.source_labels, &entry.source_namespace)
}

pub(super) fn tls_fits(
    scope: &Scope<'_>,
    routes: &Routes,
    entry: &TlsMatch,
    binding: Binding<'_>,
    port: u16,
) -> bool {
    (entry.port == 0 || entry.port == u32::from(port))
        && binding.fits(routes, &entry.gateways)
        && source_fits(scope, &entry.source_labels, &entry.source_namespace)
}

/// Whether the node is a client that a match is for.
pub(super) fn source_fits(
    scope: &Scope<'_>,
    labels: &crate::model::Labels,
    namespace: &str,
) -> bool {
    selects(labels, scope.labels()) && (namespace.is_empty() || namespace == scope.node.namespace)
}

/// The service a destination names, for attributes.
pub(super) fn first_service<'a>(
    scope: &'a Scope<'_>,
    routes: &Routes,
    list: &[TcpDestination],
) -> Option<&'a Service> {
    let host = full_host(&list.first()?.destination.host, routes.namespace());
    scope.snapshot.service(&host).map(AsRef::as_ref)
}
