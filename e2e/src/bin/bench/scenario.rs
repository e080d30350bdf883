//! What is measured: a bootstrap per proxy of the scenario, the same for both peers.

use std::{fs, net::SocketAddr, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::{Value, json};

/// A way through one or two proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    /// HTTP/1.1 with keep-alive, one proxy.
    Http1,
    /// HTTP/1.1 through two sidecars with mutual TLS between them.
    MutualTlsPair,
}

/// Ports of a run, all on loopback.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// Where the load goes.
    pub(crate) entry: SocketAddr,
    /// Between the two proxies.
    pub(crate) middle: SocketAddr,
    /// The application.
    pub(crate) upstream: SocketAddr,
    /// Admin interface of the first proxy, and of the second.
    pub(crate) admin: [SocketAddr; 2],
}

impl Scenario {
    pub(crate) const ALL: [Scenario; 2] = [Scenario::Http1, Scenario::MutualTlsPair];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Scenario::Http1 => "HTTP/1.1 keep-alive",
            Scenario::MutualTlsPair => "mTLS sidecar pair, HTTP/1.1",
        }
    }

    /// Bootstraps of the proxies, in the order requests meet them.
    pub(crate) fn bootstraps(self, ports: Ports, folder: &Path) -> anyhow::Result<Vec<Value>> {
        Ok(match self {
            Scenario::Http1 => vec![bootstrap(
                ports.admin[0],
                listener(ports.entry, None),
                cluster(ports.upstream, None),
            )],
            Scenario::MutualTlsPair => {
                certificates(folder)?;
                vec![
                    bootstrap(
                        ports.admin[0],
                        listener(ports.entry, None),
                        cluster(ports.middle, Some(upstream_tls(folder))),
                    ),
                    bootstrap(
                        ports.admin[1],
                        listener(ports.middle, Some(downstream_tls(folder))),
                        cluster(ports.upstream, None),
                    ),
                ]
            }
        })
    }
}

fn bootstrap(admin: SocketAddr, listener: Value, cluster: Value) -> Value {
    json!({
        "admin": {"address": address(admin)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    })
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn listener(at: SocketAddr, tls: Option<Value>) -> Value {
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "route_config": {
            "name": "local",
            "virtual_hosts": [{
                "name": "all", "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "app"}}],
            }],
        },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }],
    });
    let mut chain = json!({"filters": [{
        "name": "envoy.filters.network.http_connection_manager", "typed_config": manager,
    }]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": "entry", "address": address(at), "filter_chains": [chain]})
}

fn cluster(to: SocketAddr, tls: Option<Value>) -> Value {
    let mut cluster = json!({
        "name": "app", "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": {
            "cluster_name": "app",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(to)}}]}],
        },
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}

fn tls_context(folder: &Path, name: &str) -> Value {
    let file = |file: String| json!({"filename": folder.join(file)});
    json!({
        "tls_certificates": [{
            "certificate_chain": file(format!("{name}.pem")),
            "private_key": file(format!("{name}.key")),
        }],
        "validation_context": {
            "trusted_ca": file("root.pem".to_owned()),
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}},
            ],
        },
    })
}

fn upstream_tls(folder: &Path) -> Value {
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": tls_context(folder, "a"),
        },
    })
}

fn downstream_tls(folder: &Path) -> Value {
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": tls_context(folder, "b"),
        },
    })
}

/// A root and two workload certificates (P-256), as Auth would make them.
fn certificates(folder: &Path) -> anyhow::Result<()> {
    let name = |name: &str| {
        let mut all = DistinguishedName::new();
        all.push(DnType::CommonName, name);
        all
    };
    let mut root = CertificateParams::default();
    root.distinguished_name = name("bench root");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root_key = KeyPair::generate()?;
    fs::write(folder.join("root.pem"), root.self_signed(&root_key)?.pem())?;
    let issuer = rcgen::Issuer::new(root, root_key);
    for workload in ["a", "b"] {
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = name(workload);
        let id = format!("spiffe://cluster.local/ns/default/sa/{workload}");
        leaf.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = leaf.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("{workload}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{workload}.key")), key.serialize_pem())?;
    }
    Ok(())
}
