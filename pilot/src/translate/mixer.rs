//! What our proxy is told about calling Mixer: HTTP and TCP filter, per-route service attributes.
//! Stock Envoy is told nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter,
};
use envoy_types::pb::google::protobuf::Any;
use lateen_config::{Labels, MeshConfig, Spec, StringMatch};
use lateen_protocols::istio::mixer::v1::Attributes;
use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, attribute_value::Value};
use lateen_protocols::istio::mixer::v1::config::client::{
    AttributeMatch, HttpClientConfig, NetworkFailPolicy, Quota, QuotaRule, QuotaSpec,
    ServiceConfig, StringMatch as ClauseMatch, TcpClientConfig, TransportConfig,
    network_fail_policy::FailPolicy, string_match::MatchType,
};

use crate::model::{Agent, BoundQuota, Node, Registry, Role, Service, Snapshot};

use super::fail_mode::FailModes;
use super::names;
use super::wire::any;

/// Name of the filters, and of their per-route configuration.
pub(super) const FILTER: &str = "mixer";

/// Annotation (or node metadata) that decides for one workload.
const CHECK: &str = "policy.istio.io/check";
const CHECK_RETRIES: &str = "policy.istio.io/checkRetries";
const CHECK_BASE_WAIT: &str = "policy.istio.io/checkBaseRetryWaitTime";
const CHECK_MAX_WAIT: &str = "policy.istio.io/checkMaxRetryWaitTime";

/// Which way traffic goes through a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the workload.
    Inbound,
    /// From the workload, or through a gateway.
    Outbound,
}

/// How one node calls Mixer.
#[derive(Debug)]
pub(super) struct Mixer {
    transport: TransportConfig,
    role: Role,
    uid: String,
    namespace: String,
    mesh_id: String,
    version: Option<String>,
    check_inbound: bool,
    check_outbound: bool,
    report_http: bool,
    report_tcp: bool,
    fail_modes: FailModes,
    labels: Option<Arc<Labels>>,
}

/// `HOST:PORT`.
pub(super) fn server(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host, port.parse().ok()?))
}

impl Mixer {
    /// `None` if the mesh has no Mixer, or the node does not know the filters.
    pub(super) fn of(snapshot: &Snapshot, node: &Node) -> Option<Self> {
        let mesh = snapshot.mesh();
        if node.agent != Agent::Lateen || !mesh.has_mixer() {
            return None;
        }
        let facts = Facts {
            node,
            annotations: annotations(snapshot, node),
        };
        let cluster = |address: &str| {
            server(address)
                .map(|(host, port)| names::outbound(port, "", host))
                .unwrap_or_default()
        };
        let has_check = !mesh.mixer_check_server.is_empty();
        let has_report = !mesh.mixer_report_server.is_empty();
        let by_mesh = !mesh.disable_policy_checks;
        let outbound_by_mesh =
            by_mesh && (node.role == Role::Router || mesh.enable_client_side_policy_check);
        let (check_inbound, check_outbound) = match facts.text(CHECK) {
            Some("disable") => (false, false),
            Some("enable" | "allow-on-error") => (true, true),
            _ => (by_mesh, outbound_by_mesh),
        };
        let fail_open = mesh.policy_check_fail_open || facts.text(CHECK) == Some("allow-on-error");
        Some(Self {
            transport: TransportConfig {
                network_fail_policy: Some(fail_policy(fail_open, &facts)),
                check_cluster: cluster(&mesh.mixer_check_server),
                report_cluster: cluster(&mesh.mixer_report_server),
                report_batch_max_entries: mesh.report_batch_max_entries,
                report_batch_max_time: mesh.report_batch_max_time.map(|time| duration(time.0)),
                ..Default::default()
            },
            role: node.role,
            uid: format!("kubernetes://{}.{}", node.name, node.namespace),
            namespace: node.namespace.clone(),
            mesh_id: node.mesh_id.clone(),
            version: node.metadata.get("ISTIO_VERSION").cloned(),
            check_inbound: has_check && check_inbound,
            check_outbound: has_check && check_outbound,
            report_http: has_report && !mesh.disable_mixer_http_reports,
            report_tcp: has_report,
            fail_modes: FailModes::of(snapshot, &node.namespace),
            labels: snapshot
                .workload(node)
                .map(|workload| workload.labels.clone()),
        })
    }

    fn checks(&self, direction: Direction) -> bool {
        match direction {
            Direction::Inbound => self.check_inbound,
            Direction::Outbound => self.check_outbound,
        }
    }

    fn listener_attributes(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
    ) -> Attributes {
        let mut all = Builder::default();
        match direction {
            Direction::Outbound => {
                all.text("source.uid", &self.uid);
                all.text("source.namespace", &self.namespace);
                all.text("context.reporter.kind", "outbound");
            }
            Direction::Inbound => {
                all.text("destination.uid", &self.uid);
                all.text("destination.namespace", &self.namespace);
                all.text("context.reporter.kind", "inbound");
                if !self.mesh_id.is_empty() {
                    all.text("destination.mesh.id", &self.mesh_id);
                }
                if let Some((ip, port)) = address {
                    all.set("destination.ip", Value::BytesValue(ip_bytes(ip)));
                    all.set("destination.port", Value::Int64Value(port.into()));
                }
            }
        }
        all.text("context.reporter.uid", &self.uid);
        if let Some(version) = &self.version {
            all.text("context.proxy_version", version);
        }
        all.finish()
    }

    /// The HTTP filter; `None` if it would do nothing. `address` is the workload's, for inbound listeners.
    pub(super) fn http_filter(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
    ) -> Option<HttpFilter> {
        if !self.checks(direction) && !self.report_http {
            return None;
        }
        let mut forward = Builder::default();
        if direction == Direction::Outbound {
            forward.text("source.uid", &self.uid);
        }
        let config = HttpClientConfig {
            transport: Some(self.transport.clone()),
            service_configs: HashMap::from([(
                "default".to_owned(),
                ServiceConfig {
                    disable_check_calls: !self.checks(direction),
                    disable_report_calls: !self.report_http,
                    ..Default::default()
                },
            )]),
            default_destination_service: "default".to_owned(),
            mixer_attributes: Some(self.listener_attributes(direction, address)),
            forward_attributes: (direction == Direction::Outbound).then(|| forward.finish()),
            // A gateway's clients are strangers: what they claim to be is not believed.
            ignore_forwarded_attributes: self.role == Role::Router,
        };
        Some(HttpFilter {
            name: FILTER.to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&config))),
            ..Default::default()
        })
    }

    /// The network filter of a TCP chain; `service` is a real one or a special cluster's name.
    pub(super) fn tcp_filter(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
        service: Destination<'_>,
    ) -> Option<Filter> {
        if !self.checks(direction) && !self.report_tcp {
            return None;
        }
        let mut attributes = self.listener_attributes(direction, address);
        attributes
            .attributes
            .extend(service.attributes().attributes);
        let config = TcpClientConfig {
            transport: Some(self.transport.clone()),
            mixer_attributes: Some(attributes),
            disable_check_calls: !self.checks(direction),
            disable_report_calls: !self.report_tcp,
            ..Default::default()
        };
        Some(Filter {
            name: FILTER.to_owned(),
            config_type: Some(filter::ConfigType::TypedConfig(any(&config))),
        })
    }

    /// The per-route configuration for one destination.
    pub(super) fn route(
        &self,
        direction: Direction,
        service: Destination<'_>,
        quotas: &[BoundQuota<'_>],
    ) -> Any {
        let attributes = service.attributes();
        any(&ServiceConfig {
            network_fail_policy: self.fail_policy(direction, &attributes),
            disable_check_calls: !self.checks(direction),
            disable_report_calls: !self.report_http,
            forward_attributes: (direction == Direction::Outbound
                && matches!(service, Destination::Service(_)))
            .then(|| attributes.clone()),
            mixer_attributes: Some(attributes),
            quota_spec: quotas.iter().map(quota_spec).collect(),
            ..Default::default()
        })
    }

    /// What rules say of their own absence, where that differs from what the mesh says.
    fn fail_policy(
        &self,
        direction: Direction,
        attributes: &Attributes,
    ) -> Option<NetworkFailPolicy> {
        if direction == Direction::Outbound {
            return None;
        }
        let mut known = attributes.clone();
        known
            .attributes
            .extend(self.listener_attributes(direction, None).attributes);
        let open = self.fail_modes.is_open(&known, self.labels.as_deref())?;
        let mesh = self.transport.network_fail_policy.unwrap_or_default();
        (open != (mesh.policy() == FailPolicy::FailOpen)).then(|| NetworkFailPolicy {
            policy: fail_open_or_close(open) as i32,
            ..mesh
        })
    }
}

/// Where a request goes, in Mixer's terms.
#[derive(Clone, Copy, Debug)]
pub(super) enum Destination<'a> {
    /// A service.
    Service(&'a Service),
    /// A special cluster, or a host nobody declared.
    Named(&'a str),
}

impl Destination<'_> {
    fn attributes(self) -> Attributes {
        let mut all = Builder::default();
        match self {
            Self::Service(service) => {
                let name = match service.registry {
                    Registry::Kubernetes => service.name.as_str(),
                    Registry::External => &*service.hostname,
                };
                all.text("destination.service.host", &service.hostname);
                all.text("destination.service.name", name);
                all.text("destination.service.namespace", &service.namespace);
                all.text(
                    "destination.service.uid",
                    &format!("istio://{}/services/{name}", service.namespace),
                );
            }
            Self::Named(name) => all.text("destination.service.name", name),
        }
        all.finish()
    }
}

#[derive(Default)]
struct Builder(HashMap<String, AttributeValue>);

impl Builder {
    fn set(&mut self, name: &str, value: Value) {
        self.0
            .insert(name.to_owned(), AttributeValue { value: Some(value) });
    }

    fn text(&mut self, name: &str, value: &str) {
        self.set(name, Value::StringValue(value.to_owned()));
    }

    fn finish(self) -> Attributes {
        Attributes { attributes: self.0 }
    }
}

fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A node's metadata, and its pod's annotations.
struct Facts<'a> {
    node: &'a Node,
    annotations: Option<&'a lateen_config::Labels>,
}

impl Facts<'_> {
    fn text(&self, key: &str) -> Option<&str> {
        self.annotations
            .and_then(|all| all.get(key))
            .or_else(|| self.node.metadata.get(key))
            .map(String::as_str)
    }

    fn wait(&self, key: &str, default_millis: u64) -> std::time::Duration {
        self.text(key)
            .and_then(lateen_config::Duration::parse)
            .unwrap_or(lateen_config::Duration::from_millis(default_millis))
            .0
    }
}

fn annotations<'a>(snapshot: &'a Snapshot, node: &Node) -> Option<&'a lateen_config::Labels> {
    snapshot
        .objects()
        .iter()
        .find(|object| {
            matches!(object.spec, Spec::Pod(_))
                && *object.key.name == *node.name
                && *object.key.namespace == *node.namespace
        })
        .map(|object| &object.annotations)
}

fn fail_policy(fail_open: bool, facts: &Facts<'_>) -> NetworkFailPolicy {
    NetworkFailPolicy {
        policy: fail_open_or_close(fail_open) as i32,
        max_retry: facts
            .text(CHECK_RETRIES)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        base_retry_wait: Some(duration(facts.wait(CHECK_BASE_WAIT, 80))),
        max_retry_wait: Some(duration(facts.wait(CHECK_MAX_WAIT, 1000))),
    }
}

fn fail_open_or_close(open: bool) -> FailPolicy {
    if open {
        FailPolicy::FailOpen
    } else {
        FailPolicy::FailClose
    }
}

fn duration(of: std::time::Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(of.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(of.subsec_nanos()).unwrap_or(0),
    }
}

fn quota_spec(bound: &BoundQuota<'_>) -> QuotaSpec {
    let clause = |matcher: &StringMatch| ClauseMatch {
        match_type: match matcher {
            StringMatch::Present => None,
            StringMatch::Exact(text) => Some(MatchType::Exact(text.clone())),
            StringMatch::Prefix(text) => Some(MatchType::Prefix(text.clone())),
            StringMatch::Regex(pattern) => Some(MatchType::Regex(pattern.clone())),
        },
    };
    QuotaSpec {
        rules: bound
            .spec
            .rules
            .iter()
            .map(|rule| QuotaRule {
                r#match: rule
                    .matches
                    .iter()
                    .map(|entry| AttributeMatch {
                        clause: entry
                            .clause
                            .iter()
                            .map(|(name, matcher)| (name.clone(), clause(matcher)))
                            .collect(),
                    })
                    .collect(),
                quotas: rule
                    .quotas
                    .iter()
                    .map(|quota| Quota {
                        quota: quota.quota.clone(),
                        charge: quota.charge.max(1),
                    })
                    .collect(),
            })
            .collect(),
    }
}

/// Whether `host:port` is one of the mesh's Mixer servers.
pub(super) fn is_server(mesh: &MeshConfig, host: &str, port: u16) -> bool {
    [&mesh.mixer_check_server, &mesh.mixer_report_server]
        .into_iter()
        .any(|address| server(address) == Some((host, port)))
}
