//! Envoy v3 configuration in JSON; ours and Envoy get the same.

use std::{net::SocketAddr, path::Path};

use serde_json::{Value, json};

use crate::wire::SERVER_NAME;

fn typed(kind: &str, mut value: Value) -> Value {
    value["@type"] = json!(format!("type.googleapis.com/envoy.{kind}"));
    value
}

/// `Address` of a socket.
pub(crate) fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// A whole bootstrap without dynamic parts.
pub(crate) fn bootstrap(admin: SocketAddr, listeners: &[Value], clusters: &[Value]) -> Value {
    json!({
        "node": {"id": "bench", "cluster": "bench"},
        "admin": {"address": address(admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

/// A listener with one filter chain.
pub(crate) fn listener(at: SocketAddr, filter: &Value, tls: Option<&Value>) -> Value {
    let mut chain = json!({"filters": [filter]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls.clone();
    }
    json!({"name": format!("listener-{}", at.port()), "address": address(at), "filter_chains": [chain]})
}

/// The TCP proxy to cluster `up`.
pub(crate) fn tcp_proxy() -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": typed(
            "extensions.filters.network.tcp_proxy.v3.TcpProxy",
            json!({"stat_prefix": "tcp", "cluster": "up"}),
        ),
    })
}

/// Options of an HTTP connection manager.
#[derive(Clone, Debug, Default)]
pub(crate) struct Http {
    /// Virtual hosts; one that sends everything to cluster `up` when empty.
    pub(crate) virtual_hosts: Vec<Value>,
    /// Filters before the router.
    pub(crate) filters: Vec<Value>,
    /// Further fields of the message.
    pub(crate) more: Vec<(&'static str, Value)>,
}

/// An HTTP connection manager.
pub(crate) fn http(options: Http) -> Value {
    let Http {
        mut virtual_hosts,
        mut filters,
        more,
    } = options;
    if virtual_hosts.is_empty() {
        virtual_hosts.push(json!({
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}],
        }));
    }
    filters.push(json!({
        "name": "envoy.filters.http.router",
        "typed_config": typed("extensions.filters.http.router.v3.Router", json!({})),
    }));
    let mut manager = typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "ingress",
            "route_config": {"name": "local", "virtual_hosts": virtual_hosts},
            "http_filters": filters,
        }),
    );
    for (field, value) in more {
        manager[field] = value;
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": manager})
}

/// A static cluster with one endpoint.
pub(crate) fn cluster(name: &str, to: SocketAddr, http2: bool, tls: Option<&Value>) -> Value {
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(to)}}]}],
        },
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = http2_options();
    }
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls.clone();
    }
    cluster
}

/// `typed_extension_protocol_options` of a cluster that speaks HTTP/2.
pub(crate) fn http2_options() -> Value {
    let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({kind: {
        "@type": format!("type.googleapis.com/{kind}"),
        "explicit_http_config": {"http2_protocol_options": {}},
    }})
}

fn certificate(folder: &Path, leaf: &str) -> Value {
    let file = |end: &str| json!({"filename": folder.join(format!("{leaf}.{end}"))});
    json!({"certificate_chain": file("pem"), "private_key": file("key")})
}

fn trust(folder: &Path) -> Value {
    json!({"trusted_ca": {"filename": folder.join("root.pem")}})
}

/// TLS of a listener.
pub(crate) fn downstream_tls(folder: &Path, leaf: &str, mutual: bool, protocols: &[&str]) -> Value {
    let mut common = json!({
        "tls_certificates": [certificate(folder, leaf)],
        "alpn_protocols": protocols,
    });
    if mutual {
        common["validation_context"] = trust(folder);
    }
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed(
            "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            json!({"require_client_certificate": mutual, "common_tls_context": common}),
        ),
    })
}

/// TLS 1.3 of a cluster that presents the certificate `client`.
pub(crate) fn upstream_tls(folder: &Path, protocol: &str) -> Value {
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed(
            "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({
                "sni": SERVER_NAME,
                "common_tls_context": {
                    "tls_params": {
                        "tls_minimum_protocol_version": "TLSv1_3",
                        "tls_maximum_protocol_version": "TLSv1_3",
                        "ecdh_curves": ["X25519", "P-256"],
                    },
                    "tls_certificates": [certificate(folder, "client")],
                    "validation_context": trust(folder),
                    "alpn_protocols": [protocol],
                },
            }),
        ),
    })
}

/// A gRPC check of every request by cluster `authz`.
pub(crate) fn ext_authz() -> Value {
    json!({
        "name": "envoy.filters.http.ext_authz",
        "typed_config": typed(
            "extensions.filters.http.ext_authz.v3.ExtAuthz",
            json!({
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": "authz"}, "timeout": "5s"},
            }),
        ),
    })
}

/// Five policies, of which the second lets the load in by its path and its identity.
pub(crate) fn rbac(principal: &Value) -> Value {
    let policies: serde_json::Map<_, _> = (0..5)
        .map(|number| {
            let path =
                json!({"name": ":path", "string_match": {"prefix": format!("/api/v{number}")}});
            (
                format!("policy-{number}"),
                json!({"permissions": [{"header": path}], "principals": [principal]}),
            )
        })
        .collect();
    json!({
        "name": "envoy.filters.http.rbac",
        "typed_config": typed(
            "extensions.filters.http.rbac.v3.RBAC",
            json!({"rules": {"action": "ALLOW", "policies": policies}}),
        ),
    })
}

/// An access log in a file; Envoy's own format, or JSON as sidecars write it.
pub(crate) fn access_log(file: &Path, as_json: bool) -> Value {
    let mut log = typed(
        "extensions.access_loggers.file.v3.FileAccessLog",
        json!({"path": file}),
    );
    if as_json {
        log["log_format"] = json!({"json_format": {
            "start_time": "%START_TIME%",
            "method": "%REQ(:METHOD)%",
            "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
            "protocol": "%PROTOCOL%",
            "response_code": "%RESPONSE_CODE%",
            "response_flags": "%RESPONSE_FLAGS%",
            "bytes_received": "%BYTES_RECEIVED%",
            "bytes_sent": "%BYTES_SENT%",
            "duration": "%DURATION%",
            "authority": "%REQ(:AUTHORITY)%",
            "request_id": "%REQ(X-REQUEST-ID)%",
            "user_agent": "%REQ(USER-AGENT)%",
            "upstream_host": "%UPSTREAM_HOST%",
            "upstream_cluster": "%UPSTREAM_CLUSTER%",
            "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
            "downstream_peer": "%DOWNSTREAM_PEER_URI_SAN%",
        }});
    }
    json!([{"name": "envoy.access_loggers.file", "typed_config": log}])
}
