//! What all sidecars of an installation have in common.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

/// See the module. The file of `lateen inject --values` has these fields; what it leaves out has its default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// Image of the sidecar and of its init container; its program is `proxy`.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; empty leaves it to Kubernetes.
    pub image_pull_policy: String,
    /// Secrets with which the image is pulled.
    pub image_pull_secrets: Vec<String>,
    /// Pilot's xDS with mutual TLS, `HOST:PORT`. The workload's `proxy.istio.io/config` may say otherwise.
    pub discovery_address: String,
    /// Auth, `HOST:PORT`.
    pub ca_address: String,
    /// Which control plane, for annotation `istio.io/rev`.
    pub revision: String,
    /// Name of the cluster.
    pub cluster_id: String,
    /// Name of the mesh.
    pub mesh_id: String,
    /// Trust domain.
    pub trust_domain: String,
    /// Namespace of objects that name none.
    pub namespace: String,
    /// Whether workloads that say nothing get a sidecar.
    pub inject_by_default: bool,
    /// Whether the sidecar is an init container that stays (Kubernetes 1.29 and later): it starts before everything
    /// else and ends last, and Jobs end. Not said: for Jobs and CronJobs only.
    pub native_sidecar: Option<bool>,
    /// `REDIRECT`, `TPROXY` or `NONE`.
    pub interception_mode: String,
    /// Whether HTTP, TCP and gRPC probes are answered through the sidecar.
    pub rewrite_app_http_probers: bool,
    /// Whether the application's containers start only when the sidecar is ready.
    pub hold_application_until_proxy_starts: bool,
    /// Port of the sidecar's health checks of the application, and of its own.
    pub status_port: u16,
    /// Of inbound ports, when the workload says nothing.
    pub include_inbound_ports: String,
    /// Left alone inbound.
    pub exclude_inbound_ports: String,
    /// Intercepted outbound whatever their address.
    pub include_outbound_ports: String,
    /// Left alone outbound.
    pub exclude_outbound_ports: String,
    /// Destinations to intercept.
    pub include_outbound_ip_ranges: String,
    /// Destinations to leave alone.
    pub exclude_outbound_ip_ranges: String,
    /// Level of the sidecar's log.
    pub log_level: String,
    /// `resources` of the sidecar's container.
    pub resources: Value,
    /// What `proxy.istio.io/config` says of workloads that have none, in MeshConfig's `defaultConfig`.
    pub default_config: Value,
    /// Templates by name. `sidecar` replaces the built-in one; others are merged over it when
    /// `inject.istio.io/templates` names them.
    #[serde(skip)]
    pub templates: BTreeMap<String, Value>,
}

impl Default for Settings {
    fn default() -> Settings {
        let text = |text: &str| text.to_owned();
        Settings {
            image: text("lateen/proxy:0.1.0"),
            image_pull_policy: String::new(),
            image_pull_secrets: Vec::new(),
            discovery_address: text("pilot.istio-system.svc:15012"),
            ca_address: text("auth.istio-system.svc:8060"),
            revision: text("default"),
            cluster_id: text("Kubernetes"),
            mesh_id: text("cluster.local"),
            trust_domain: text("cluster.local"),
            namespace: text("default"),
            inject_by_default: true,
            native_sidecar: None,
            interception_mode: text("REDIRECT"),
            rewrite_app_http_probers: true,
            hold_application_until_proxy_starts: false,
            status_port: 15020,
            include_inbound_ports: text("*"),
            exclude_inbound_ports: String::new(),
            include_outbound_ports: String::new(),
            exclude_outbound_ports: String::new(),
            include_outbound_ip_ranges: text("*"),
            exclude_outbound_ip_ranges: String::new(),
            log_level: text("warning"),
            resources: json!({
                "requests": {"cpu": "100m", "memory": "128Mi"},
                "limits": {"cpu": "2", "memory": "1Gi"},
            }),
            default_config: json!({}),
            templates: BTreeMap::new(),
        }
    }
}
