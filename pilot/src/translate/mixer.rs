//! What proxies are told about calling Mixer: HTTP and TCP filters, access logs, what routes say of a destination.
//! Our proxy has filters for it ([`quota`] for what is charged); [`stock`] says the same in the filters of stock
//! Envoy. [`attributes`] are what both say.

mod attributes;
mod quota;
mod stock;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TcpAccessLogOptions;
use envoy_types::pb::google::protobuf::Any;
use lateen_config::{Labels, MeshConfig, Spec};
use lateen_engine::Value as Known;
use lateen_protocols::istio::mixer::v1::Attributes;
use lateen_protocols::istio::mixer::v1::attributes::attribute_value::Value;
use lateen_protocols::istio::mixer::v1::config::client::{
    HttpClientConfig, NetworkFailPolicy, ServiceConfig, TcpClientConfig, TransportConfig,
    network_fail_policy::FailPolicy,
};

use crate::model::{Agent, BoundQuota, Node, Phase, Reach, Role, Snapshot};

use self::attributes::{Builder, ip_bytes, merged};
use super::fail_mode::FailModes;
use super::names;
use super::wire::{any, duration as wire_duration};

pub(super) use self::attributes::Destination;

/// Name of our proxy's filters, and of their per-route configuration.
const FILTER: &str = "mixer";

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

/// What goes into a listener so that Mixer is asked and told.
#[derive(Debug)]
pub(super) struct Hooks<F> {
    /// Before all other filters.
    pub(super) filters: Vec<F>,
    /// Beside other logs.
    pub(super) access_log: Vec<AccessLog>,
}

impl<F> Default for Hooks<F> {
    fn default() -> Self {
        Self {
            filters: Vec::new(),
            access_log: Vec::new(),
        }
    }
}

/// What goes into a route (or a weighted cluster) so that Mixer knows where a request is going.
#[derive(Debug, Default)]
pub(super) struct RouteHooks {
    /// Per-filter configuration.
    pub(super) configs: HashMap<String, Any>,
    /// For the next proxy.
    pub(super) request_headers: Vec<HeaderValueOption>,
}

/// How one node calls Mixer.
#[derive(Debug)]
pub(super) struct Mixer {
    /// For stock Envoy: headers that its reports carry.
    stock: Option<stock::Headers>,
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
    reach: Reach,
    explains: bool,
    labels: Option<Arc<Labels>>,
}

/// `HOST:PORT`.
pub(super) fn server(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host, port.parse().ok()?))
}

impl Mixer {
    /// `None` if the mesh has no Mixer.
    pub(super) fn of(snapshot: &Snapshot, node: &Node) -> Option<Self> {
        let mesh = snapshot.mesh();
        if !mesh.has_mixer() {
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
            stock: (node.agent == Agent::Envoy).then(|| stock::Headers::of(snapshot)),
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
            reach: snapshot.reach().clone(),
            // A gateway's clients are strangers, who are told nothing.
            explains: mesh.allow_policy_explanation && node.role == Role::Sidecar,
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

    /// For a connection manager. `address` is the workload's and `service` the one it serves, for inbound listeners.
    pub(super) fn http(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
        service: Option<Destination<'_>>,
    ) -> Hooks<HttpFilter> {
        if let Some(headers) = &self.stock {
            return self.stock_http(direction, address, service, headers);
        }
        Hooks {
            filters: self.http_filter(direction, address).into_iter().collect(),
            ..Hooks::default()
        }
    }

    fn stock_http(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
        service: Option<Destination<'_>>,
        headers: &stock::Headers,
    ) -> Hooks<HttpFilter> {
        let listener = self.listener_attributes(direction, address);
        let mut hooks = Hooks::default();
        let checks = self.checks(direction);
        // A gateway's clients are strangers: what they claim to be is not believed.
        if direction == Direction::Inbound && (checks || self.report_http) {
            hooks.filters.push(stock::keep_forwarded());
        }
        let served = service.map(Destination::attributes).unwrap_or_default();
        if checks {
            let policy = self.policy(direction, &served);
            hooks
                .filters
                .push(stock::http_check(self.check_server(), &listener, &policy));
        }
        if self.report_http {
            let all = merged(listener, served);
            let log = stock::http_log(self.report_server(), direction, &all, headers);
            hooks.access_log.push(log);
        }
        hooks
    }

    fn http_filter(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
    ) -> Option<HttpFilter> {
        if !self.checks(direction) && !self.report_http {
            return None;
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
            forward_attributes: (direction == Direction::Outbound).then(|| self.forwarded()),
            // A gateway's clients are strangers: what they claim to be is not believed.
            ignore_forwarded_attributes: self.role == Role::Router,
            allow_explanation: self.explains,
        };
        Some(HttpFilter {
            name: FILTER.to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&config))),
            ..Default::default()
        })
    }

    /// What a client's proxy says of itself.
    fn forwarded(&self) -> Attributes {
        let mut forward = Builder::default();
        forward.text("source.uid", &self.uid);
        forward.finish()
    }

    /// For a TCP chain; `service` is a real one or a special cluster's name.
    pub(super) fn tcp(
        &self,
        direction: Direction,
        address: Option<(IpAddr, u16)>,
        service: Destination<'_>,
    ) -> Hooks<Filter> {
        let mut hooks = Hooks::default();
        let destination = service.attributes();
        let all = merged(
            self.listener_attributes(direction, address),
            destination.clone(),
        );
        let checks = self.checks(direction);
        if self.stock.is_some() {
            if checks {
                let policy = self.policy(direction, &destination);
                let filter = stock::tcp_check(self.check_server(), &all, &policy);
                hooks.filters.push(filter);
            }
            if self.report_tcp {
                let log = stock::tcp_log(self.report_server(), direction, &all);
                hooks.access_log.push(log);
            }
            return hooks;
        }
        // A TCP filter has the mesh's fail policy.
        let is_open = self
            .transport
            .network_fail_policy
            .unwrap_or_default()
            .policy()
            == FailPolicy::FailOpen;
        let can_skip = |phase| self.can_skip(phase, direction, &all, &["tcp"]);
        let checks = checks && !(is_open && can_skip(Phase::Check));
        let reports = self.report_tcp && !can_skip(Phase::Report);
        if checks || reports {
            let config = TcpClientConfig {
                transport: Some(self.transport.clone()),
                mixer_attributes: Some(all),
                disable_check_calls: !checks,
                disable_report_calls: !reports,
                ..Default::default()
            };
            hooks.filters.push(Filter {
                name: FILTER.to_owned(),
                config_type: Some(filter::ConfigType::TypedConfig(any(&config))),
            });
        }
        hooks
    }

    /// For one destination.
    pub(super) fn route(
        &self,
        direction: Direction,
        service: Destination<'_>,
        quotas: &[BoundQuota<'_>],
    ) -> RouteHooks {
        let attributes = service.attributes();
        let is_forwarded =
            direction == Direction::Outbound && matches!(service, Destination::Service(_));
        if self.stock.is_some() {
            return RouteHooks {
                configs: if self.checks(direction) {
                    stock::route(&attributes, quotas)
                } else {
                    HashMap::new()
                },
                request_headers: is_forwarded
                    .then(|| stock::forward(&merged(self.forwarded(), attributes)))
                    .into_iter()
                    .collect(),
            };
        }
        let is_open = self.policy(direction, &attributes).policy() == FailPolicy::FailOpen;
        let can_skip = |phase| self.can_skip(phase, direction, &attributes, &["http", "grpc"]);
        // Where requests are to be refused while Mixer cannot be asked, it has to be asked.
        let checks =
            self.checks(direction) && !(is_open && quotas.is_empty() && can_skip(Phase::Check));
        let config = any(&ServiceConfig {
            network_fail_policy: self.fail_policy(direction, &attributes),
            disable_check_calls: !checks,
            disable_report_calls: !self.report_http || can_skip(Phase::Report),
            forward_attributes: is_forwarded.then(|| attributes.clone()),
            mixer_attributes: Some(attributes),
            quota_spec: quotas.iter().map(quota::spec).collect(),
            ..Default::default()
        });
        RouteHooks {
            configs: HashMap::from([(FILTER.to_owned(), config)]),
            ..RouteHooks::default()
        }
    }

    /// When stock Envoy writes the access log of a connection; `None`: when it ends.
    pub(super) fn tcp_log_options(&self) -> Option<TcpAccessLogOptions> {
        (self.stock.is_some() && self.report_tcp).then(|| TcpAccessLogOptions {
            access_log_flush_interval: wire_duration(stock::TCP_INTERVAL),
            flush_access_log_on_connected: true,
            ..TcpAccessLogOptions::default()
        })
    }

    /// Whether no rule can matter for requests or connections to a destination, so that Mixer need not be called.
    fn can_skip(
        &self,
        phase: Phase,
        direction: Direction,
        attributes: &Attributes,
        protocols: &[&str],
    ) -> bool {
        // What Mixer will take the workload for is known when the workload is.
        let Some(labels) = &self.labels else {
            return false;
        };
        let own = self.listener_attributes(direction, None);
        let (own_labels, other_labels) = match direction {
            Direction::Inbound => ("destination.labels", "source.labels"),
            Direction::Outbound => ("source.labels", "destination.labels"),
        };
        protocols.iter().all(|protocol| {
            let known = |name: &str| match name {
                "context.protocol" => Some(Known::string(*protocol)),
                name if name == own_labels => Some(super::fail_mode::map(labels)),
                name if name == other_labels => None,
                _ => [&attributes.attributes, &own.attributes]
                    .into_iter()
                    .find_map(|all| match all.get(name)?.value.as_ref()? {
                        Value::StringValue(value) => Some(Known::string(value.as_str())),
                        _ => None,
                    }),
            };
            !self.reach.matters(phase, &self.namespace, &known)
        })
    }

    /// Other logs of connections, whose entries are not to be more than before.
    pub(super) fn other_tcp_logs(&self, logs: &[AccessLog]) -> Vec<AccessLog> {
        match self.tcp_log_options() {
            Some(_) => logs.iter().map(stock::ends_only).collect(),
            None => logs.to_vec(),
        }
    }

    fn check_server(&self) -> stock::Server<'_> {
        stock::Server {
            cluster: &self.transport.check_cluster,
            batch: None,
        }
    }

    fn report_server(&self) -> stock::Server<'_> {
        stock::Server {
            cluster: &self.transport.report_cluster,
            batch: self
                .transport
                .report_batch_max_time
                .and_then(|time| std::time::Duration::try_from(time).ok()),
        }
    }

    /// What happens when Mixer cannot be asked about a destination.
    fn policy(&self, direction: Direction, attributes: &Attributes) -> NetworkFailPolicy {
        self.fail_policy(direction, attributes)
            .or(self.transport.network_fail_policy)
            .unwrap_or_default()
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

/// Whether `host:port` is one of the mesh's Mixer servers.
pub(super) fn is_server(mesh: &MeshConfig, host: &str, port: u16) -> bool {
    [&mesh.mixer_check_server, &mesh.mixer_report_server]
        .into_iter()
        .any(|address| server(address) == Some((host, port)))
}
