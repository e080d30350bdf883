//! The Envoy v3 bootstrap that a sidecar or gateway of a local mesh starts from; the same for our own
//! proxy and for stock Envoy.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::{address::PodAddress, workload::Workload};

/// The outbound HTTP proxy of a sidecar listens on this port.
pub const HTTP_PROXY_PORT: u16 = 15002;
/// The admin interface of a proxy listens on this port.
pub const ADMIN_PORT: u16 = 15000;
/// SPIFFE ID that Pilot serves under.
pub const PILOT_ID: &str = "spiffe://cluster.local/ns/istio-system/sa/pilot";

/// Whether a proxy stands beside a workload or at the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Node type `sidecar`.
    Sidecar,
    /// Node type `router`.
    Gateway,
}

/// How the proxy subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscription {
    /// Incremental xDS.
    Delta,
    /// State of the world.
    StateOfTheWorld,
}

/// The bootstrap of the proxy of `workload`.
pub fn bootstrap(
    role: Role,
    workload: &Workload,
    address: PodAddress,
    pilot: SocketAddr,
    sds_socket: &Path,
    subscription: Subscription,
) -> Value {
    json!({
        "node": node(role, workload, address),
        "admin": {"address": socket(SocketAddr::from((address.ip, ADMIN_PORT)))},
        "dynamic_resources": {
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "ads_config": {
                "api_type": match subscription {
                    Subscription::Delta => "DELTA_GRPC",
                    Subscription::StateOfTheWorld => "GRPC",
                },
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {"clusters": [xds_cluster(pilot), sds_cluster(sds_socket)]},
    })
}

fn node(role: Role, workload: &Workload, address: PodAddress) -> Value {
    let kind = match role {
        Role::Sidecar => "sidecar",
        Role::Gateway => "router",
    };
    let Workload {
        name, namespace, ..
    } = workload;
    let app_ports: Map<_, _> = workload
        .ports
        .iter()
        .map(|(_, port)| {
            let app = SocketAddr::from((address.ip, workload.app_port(*port)));
            (port.to_string(), json!(app.to_string()))
        })
        .collect();
    json!({
        "id": format!("{kind}~{}~{name}.{namespace}~{namespace}.svc.cluster.local", address.ip),
        "cluster": format!("{}.{namespace}", workload.labels.get("app").unwrap_or(name)),
        "metadata": {
            "NAMESPACE": namespace,
            "SERVICE_ACCOUNT": workload.service_account,
            "WORKLOAD_NAME": workload.deployment,
            "LABELS": workload.labels,
            "ANNOTATIONS": workload.annotations,
            "INSTANCE_IPS": address.ip.to_string(),
            "CLUSTER_ID": "local",
            "MESH_ID": "cluster.local",
            "INTERCEPTION_MODE": "NONE",
            "APP_PORTS": app_ports,
            "OUTBOUND_BIND": address.outbound.to_string(),
            "HTTP_PROXY_PORT": HTTP_PROXY_PORT.to_string(),
        },
    })
}

fn xds_cluster(pilot: SocketAddr) -> Value {
    let secret = |name: &str| json!({"name": name, "sds_config": sds()});
    json!({
        "name": "xds-grpc",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": endpoint("xds-grpc", &socket(pilot)),
        "typed_extension_protocol_options": http2(),
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "pilot.istio-system.svc",
                "common_tls_context": {
                    "alpn_protocols": ["h2"],
                    "tls_certificate_sds_secret_configs": [secret("default")],
                    "combined_validation_context": {
                        "default_validation_context": {
                            "match_typed_subject_alt_names": [
                                {"san_type": "URI", "matcher": {"exact": PILOT_ID}},
                            ],
                        },
                        "validation_context_sds_secret_config": secret("ROOTCA"),
                    },
                },
            },
        },
    })
}

fn sds_cluster(sds_socket: &Path) -> Value {
    json!({
        "name": "sds-grpc",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": endpoint("sds-grpc", &json!({"pipe": {"path": sds_socket}})),
        "typed_extension_protocol_options": http2(),
    })
}

fn sds() -> Value {
    json!({
        "resource_api_version": "V3",
        "api_config_source": {
            "api_type": "GRPC",
            "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc"}}],
        },
    })
}

fn http2() -> Value {
    json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        },
    })
}

fn endpoint(cluster: &str, address: &Value) -> Value {
    json!({
        "cluster_name": cluster,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
    })
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// Base URL of a proxy's admin interface.
pub fn admin_url(ip: Ipv4Addr) -> String {
    format!("http://{ip}:{ADMIN_PORT}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use lateen_protocols::{envoy::envoy::config::bootstrap::v3::Bootstrap, json::from_json};

    #[test]
    fn it_is_a_bootstrap() {
        let workload = Workload::new("sleep", &[("app", "sleep")], 80);
        let address = PodAddress {
            ip: Ipv4Addr::new(127, 20, 1, 11),
            outbound: Ipv4Addr::new(127, 20, 1, 131),
        };
        let value = bootstrap(
            Role::Sidecar,
            &workload,
            address,
            ([127, 20, 1, 2], 15012).into(),
            Path::new("/tmp/sds"),
            Subscription::Delta,
        );
        let parsed: Bootstrap = from_json(&value).unwrap();
        assert_eq!(
            parsed.node.unwrap().id,
            "sidecar~127.20.1.11~sleep-0.default~default.svc.cluster.local"
        );
    }
}
