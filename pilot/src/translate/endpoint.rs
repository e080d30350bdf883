//! Endpoints of EDS clusters: by locality, with what the transport socket and telemetry go by.

use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, lb_endpoint::HostIdentifier,
};

use crate::model::{Endpoint, TlsMode, selects};

use super::cluster::{SOCKET_MATCH, discovery};
use super::locality::{Arrangement, arrange};
use super::names::Outbound;
use super::policy::{Policy, subset_labels};
use super::wire::{endpoint_address, metadata, structure, text, u32_value};
use super::{Resources, Scope};

/// Endpoints of every EDS cluster among the resources.
pub(super) fn all(scope: &Scope<'_>, resources: &mut Resources) {
    let eds = ClusterDiscoveryType::Type(DiscoveryType::Eds as i32);
    let assignments: Vec<ClusterLoadAssignment> = resources
        .clusters
        .values()
        .filter(|cluster| cluster.cluster_discovery_type.as_ref() == Some(&eds))
        .filter_map(|cluster| of_cluster(scope, &cluster.name))
        .collect();
    resources.endpoints.extend(
        assignments
            .into_iter()
            .map(|one| (one.cluster_name.clone(), one)),
    );
}

pub(super) fn of_cluster(scope: &Scope<'_>, name: &str) -> Option<ClusterLoadAssignment> {
    let parts = Outbound::parse(name)?;
    let service = scope.snapshot.service(parts.host)?;
    service.port(parts.port)?;
    if !service.export_to.allows(&scope.node.namespace) {
        return None;
    }
    let rule = scope
        .snapshot
        .destination_policy(parts.host, &scope.node.namespace, &scope.node.labels)
        .map(AsRef::as_ref);
    let labels = match parts.subset {
        "" => None,
        subset => Some(subset_labels(rule, subset)?),
    };
    let policy = Policy::of(rule, parts.port, parts.subset);
    if discovery(scope, service, &policy) != DiscoveryType::Eds {
        return None;
    }
    let endpoints = scope
        .snapshot
        .endpoints(parts.host, parts.port)
        .iter()
        .filter(|endpoint| labels.is_none_or(|labels| selects(labels, &endpoint.labels)));
    let arrangement = Arrangement::of(scope, service, &policy);
    Some(ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: arrange(scope, arrangement.as_ref(), endpoints.map(AsRef::as_ref)),
        ..Default::default()
    })
}

pub(super) fn lb_endpoint(scope: &Scope<'_>, endpoint: &Endpoint) -> LbEndpoint {
    let mut istio = structure([(
        "workload",
        text(format!(
            "{};{};;;",
            endpoint.workload_name, endpoint.namespace
        )),
    )]);
    let workload = endpoint
        .address
        .parse()
        .ok()
        .and_then(|ip| scope.snapshot.workload_at(ip));
    if let Some(workload) = workload {
        istio.fields.insert("uid".to_owned(), text(&workload.uid));
    }
    let mut fields = vec![("istio", istio)];
    if endpoint.tls_mode == TlsMode::Istio {
        fields.push((SOCKET_MATCH, structure([("tlsMode", text("istio"))])));
    }
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: endpoint_address(&endpoint.address, endpoint.port),
            ..Default::default()
        })),
        metadata: metadata(fields),
        load_balancing_weight: u32_value(endpoint.weight.max(1)),
        ..Default::default()
    }
}
