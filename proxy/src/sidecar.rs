//! `proxy sidecar`: the proxy of an injected pod. There is no bootstrap file; what Kubernetes tells the container (its
//! environment and the files of the downward API) says who it is, where Pilot and Auth are, and how the application
//! wants to be probed.
//!
//! `config::SidecarArgs` → [`Sidecar::read`] → the [`Options`] of a proxy and the [`Status`] that answers the kubelet.

mod probe;
mod status;

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value, json};

pub use probe::{Probe, ProbeError};
pub use status::{Status, wait_until_ready};

use crate::config::{Options, SidecarArgs};

/// Where the pod's labels and annotations are: volume `istio-podinfo`.
const POD_INFO: &str = "/etc/istio/pod";
/// Where certificate and key are kept over a restart of the container: volume `istio-envoy`, in memory.
const SVID_DIR: &str = "/etc/istio/proxy/svid";
/// Port of the admin interface, of this pod only.
pub(crate) const ADMIN_PORT: u16 = 15000;

/// What the container was told does not make a sidecar.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// A variable's value.
    #[error("{name}: {reason}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A probe of the application.
    #[error("ISTIO_KUBE_APP_PROBERS")]
    Probes(#[from] ProbeError),
}

/// See the module.
#[derive(Debug)]
pub struct Sidecar {
    /// The proxy.
    pub options: Options,
    /// What answers the kubelet.
    pub status: Status,
}

impl Sidecar {
    /// Makes of `args` what is to run.
    ///
    /// # Errors
    /// Something in it is malformed.
    pub fn read(args: &SidecarArgs) -> Result<Sidecar, SidecarError> {
        let config = proxy_config(args)?;
        let info = |name: &str| pod_info(&Path::new(POD_INFO).join(name));
        let bootstrap = bootstrap(args, &config, info("labels"), info("annotations"))?;
        let mut options = Options::none();
        options.config_yaml = Some(bootstrap.to_string());
        options.log_level.clone_from(&args.log_level);
        options.concurrency = concurrency(args, &config);
        if let Some(seconds) = config.get("terminationDrainDuration").and_then(seconds) {
            options.drain_time_s = seconds;
        }
        if !args.ca_address.is_empty() {
            options.identity.auth_address = Some(args.ca_address.clone());
            options.identity.auth_root = Some(args.auth_root.clone());
            options.identity.join_token_file = Some(args.token_file.clone());
            options.identity.svid_dir = Some(SVID_DIR.into());
        }
        let pod_ip = args
            .instance_ip
            .parse()
            .map_err(|_| SidecarError::Variable {
                name: "INSTANCE_IP",
                reason: format!("{:?} is no IP address", args.instance_ip),
            })?;
        let probes = probe::read(&args.app_probers)?;
        Ok(Sidecar {
            options,
            status: Status::new(args.status_port, pod_ip, probes),
        })
    }
}

fn proxy_config(args: &SidecarArgs) -> Result<Value, SidecarError> {
    let fail = |reason: String| SidecarError::Variable {
        name: "PROXY_CONFIG",
        reason,
    };
    match serde_json::from_str(&args.proxy_config) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(fail("is no JSON map".to_owned())),
        Err(error) => Err(fail(format!("is not JSON: {error}"))),
    }
}

/// As MeshConfig: 0 and nothing mean the processors the container may use.
fn concurrency(args: &SidecarArgs, config: &Value) -> Option<usize> {
    let said = config.get("concurrency").and_then(Value::as_u64);
    let said = said.and_then(|threads| usize::try_from(threads).ok());
    said.filter(|threads| *threads > 0).or(args.cpu_limit)
}

/// `5s`, as protobuf writes durations.
fn seconds(value: &Value) -> Option<u64> {
    value
        .as_str()?
        .strip_suffix('s')?
        .parse::<f64>()
        .ok()
        .and_then(|seconds| {
            let whole = seconds.ceil();
            // Within a day, so that the cast is exact.
            (0.0..=86_400.0).contains(&whole).then_some(whole as u64)
        })
}

/// A file of the downward API: a line `name="value"` for each.
fn pod_info(path: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| {
        let (name, quoted) = line.split_once('=')?;
        let value: String = serde_json::from_str(quoted).ok()?;
        Some((name.to_owned(), Value::String(value)))
    });
    pairs.collect()
}

fn bootstrap(
    args: &SidecarArgs,
    config: &Value,
    labels: Map<String, Value>,
    annotations: Map<String, Value>,
) -> Result<Value, SidecarError> {
    let discovery = config
        .get("discoveryAddress")
        .and_then(Value::as_str)
        .unwrap_or("pilot.istio-system.svc:15012");
    let (host, port) = discovery
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
        .ok_or_else(|| SidecarError::Variable {
            name: "PROXY_CONFIG",
            reason: format!("discoveryAddress {discovery:?} is not HOST:PORT"),
        })?;
    let namespace = &args.pod_namespace;
    let socket = |address: &str, port: u16| json!({"socket_address": {"address": address, "port_value": port}});
    let cluster = labels
        .get("app")
        .and_then(Value::as_str)
        .unwrap_or(&args.pod_name);
    let mut clusters = vec![pilot_cluster(args, &socket(host, port), host)];
    if !args.ca_address.is_empty() {
        clusters.push(json!({
            // Our own certificate takes the place of what would come from here.
            "name": "sds-grpc", "type": "STATIC", "connect_timeout": "1s",
            "load_assignment": {"cluster_name": "sds-grpc", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": {"pipe": {"path": "/var/run/secrets/workload-spiffe-uds/socket"}}}},
            ]}]},
            "typed_extension_protocol_options": http2(),
        }));
    }
    Ok(json!({
        "node": {
            "id": format!("{}~{}~{}.{namespace}~{namespace}.svc.cluster.local", node_type(args), args.instance_ip, args.pod_name),
            "cluster": format!("{cluster}.{namespace}"),
            "metadata": metadata(args, labels, annotations),
        },
        "admin": {"address": socket("127.0.0.1", ADMIN_PORT)},
        "dynamic_resources": {
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {"clusters": clusters},
    }))
}

/// Pilot's word for what this proxy is.
fn node_type(args: &SidecarArgs) -> &'static str {
    if args.gateway { "router" } else { "sidecar" }
}

fn metadata(
    args: &SidecarArgs,
    labels: Map<String, Value>,
    annotations: Map<String, Value>,
) -> Value {
    let mut all: BTreeMap<String, Value> = args
        .metadata
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let addresses = match args.instance_ips.as_str() {
        "" => &args.instance_ip,
        all => all,
    };
    for (name, value) in [
        ("NAMESPACE", json!(args.pod_namespace)),
        ("SERVICE_ACCOUNT", json!(args.service_account)),
        ("INSTANCE_IPS", json!(addresses)),
        ("LABELS", Value::Object(labels)),
        ("ANNOTATIONS", Value::Object(annotations)),
    ] {
        all.insert(name.to_owned(), value);
    }
    json!(all)
}

fn pilot_cluster(args: &SidecarArgs, address: &Value, host: &str) -> Value {
    let mut cluster = json!({
        "name": "xds-grpc", "type": "STRICT_DNS", "connect_timeout": "1s", "dns_refresh_rate": "5s",
        "load_assignment": {"cluster_name": "xds-grpc", "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": address}},
        ]}]},
        "typed_extension_protocol_options": http2(),
    });
    if host.parse::<std::net::IpAddr>().is_ok() {
        cluster["type"] = json!("STATIC");
    }
    if args.ca_address.is_empty() {
        return cluster;
    }
    let secret = |name: &str| {
        json!({"name": name, "sds_config": {"resource_api_version": "V3", "api_config_source": {
            "api_type": "GRPC", "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc"}}],
        }}})
    };
    let pilot = format!("spiffe://{}/ns/istio-system/sa/pilot", args.trust_domain);
    cluster["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": host,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificate_sds_secret_configs": [secret("default")],
                "combined_validation_context": {
                    "default_validation_context": {
                        "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": pilot}}],
                    },
                    "validation_context_sds_secret_config": secret("ROOTCA"),
                },
            },
        },
    });
    cluster
}

fn http2() -> Value {
    json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }})
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use lateen_protocols::{envoy::envoy::config::bootstrap::v3::Bootstrap, json::from_json};

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SidecarArgs,
    }

    fn args(more: &[&str]) -> SidecarArgs {
        let fixed = [
            "sidecar",
            "--pod-name",
            "reviews-1",
            "--pod-namespace",
            "shop",
            "--instance-ip",
            "10.0.0.9",
        ];
        Line::try_parse_from(fixed.iter().chain(more)).unwrap().args
    }

    #[test]
    fn what_the_pod_says_becomes_a_bootstrap() {
        let config = r#"{"discoveryAddress": "pilot.mesh.svc:15012", "concurrency": 3, "terminationDrainDuration": "7.2s"}"#;
        let args = args(&[
            "--proxy-config",
            config,
            "--ca-address",
            "auth.mesh.svc:8060",
        ]);
        let sidecar = Sidecar::read(&args).unwrap();
        assert_eq!(sidecar.options.workers(), 3);
        assert_eq!(sidecar.options.drain_time_s, 8);
        assert_eq!(
            sidecar.options.identity.auth_address.as_deref(),
            Some("auth.mesh.svc:8060")
        );
        let text = sidecar.options.config_yaml.unwrap();
        let bootstrap: Bootstrap = from_json(&serde_json::from_str(&text).unwrap()).unwrap();
        let node = bootstrap.node.unwrap();
        assert_eq!(
            node.id,
            "sidecar~10.0.0.9~reviews-1.shop~shop.svc.cluster.local"
        );
        assert_eq!(node.cluster, "reviews-1.shop");
        assert_eq!(bootstrap.static_resources.unwrap().clusters.len(), 2);
    }

    #[test]
    fn a_gateway_says_that_it_is_one() {
        let sidecar = Sidecar::read(&args(&["--gateway"])).unwrap();
        let text = sidecar.options.config_yaml.unwrap();
        assert!(
            text.contains(r#""id":"router~10.0.0.9~reviews-1.shop"#),
            "{text}"
        );
    }

    #[test]
    fn without_auth_the_stream_is_plain() {
        let sidecar = Sidecar::read(&args(&[
            "--proxy-config",
            r#"{"discoveryAddress": "10.0.0.1:15010"}"#,
        ]))
        .unwrap();
        assert_eq!(sidecar.options.identity.auth_address, None);
        let text = sidecar.options.config_yaml.unwrap();
        assert!(!text.contains("transport_socket"), "{text}");
        for (flags, want) in [
            (["--proxy-config", "[]"], "PROXY_CONFIG: is no JSON map"),
            (
                ["--proxy-config", r#"{"discoveryAddress": "pilot"}"#],
                "is not HOST:PORT",
            ),
            (["--app-probers", "{"], "ISTIO_KUBE_APP_PROBERS"),
        ] {
            let error = Sidecar::read(&args(&flags)).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn labels_are_read_as_the_kubelet_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("labels");
        std::fs::write(&file, "app=\"reviews\"\nodd=\"a \\\"b\\\"=c\"\nbroken\n").unwrap();
        let labels = pod_info(&file);
        assert_eq!(json!(labels), json!({"app": "reviews", "odd": "a \"b\"=c"}));
        assert!(pod_info(&folder.path().join("none")).is_empty());
    }
}
