//! Mesh-wide settings: Istio's MeshConfig, key `mesh` of the ConfigMap `istio`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::networking::{LocalityBalancing, OutboundTrafficPolicy};
use crate::value::Duration;

/// Mesh-wide settings, with today's defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MeshConfig {
    /// `HOST:PORT` of Mixer's policy checks; empty: none.
    pub mixer_check_server: String,
    /// `HOST:PORT` of Mixer's reports; empty: none.
    pub mixer_report_server: String,
    /// No checks at all.
    pub disable_policy_checks: bool,
    /// No reports from HTTP filters.
    pub disable_mixer_http_reports: bool,
    /// Checks by the client's sidecar too.
    pub enable_client_side_policy_check: bool,
    /// Let requests pass when Mixer cannot be reached.
    pub policy_check_fail_open: bool,
    /// Callers may ask, with a header, why Mixer lets a request pass or refuses it. Not Istio's.
    pub allow_policy_explanation: bool,
    /// Report batches: entries.
    pub report_batch_max_entries: u32,
    /// Report batches: time.
    pub report_batch_max_time: Option<Duration>,
    /// Path of access logs; empty: none.
    pub access_log_file: String,
    /// Their format; empty: the default.
    pub access_log_format: String,
    /// `TEXT` or `JSON`.
    pub access_log_encoding: AccessLogEncoding,
    /// Whether requests are traced.
    pub enable_tracing: bool,
    /// Trust domain of the mesh's identities.
    pub trust_domain: String,
    /// Further trust domains accepted.
    pub trust_domain_aliases: Vec<String>,
    /// Where mesh-wide objects live.
    pub root_namespace: String,
    /// Unknown destinations.
    pub outbound_traffic_policy: OutboundTrafficPolicy,
    /// To connect within, upstream.
    pub connect_timeout: Option<Duration>,
    /// To recognise a protocol within; 0: no limit.
    pub protocol_detection_timeout: Option<Duration>,
    /// mTLS between sidecars without being told.
    pub enable_auto_mtls: bool,
    /// Which localities traffic goes to, unless a DestinationRule says so itself.
    pub locality_lb_setting: Option<LocalityBalancing>,
    /// Between DNS look-ups.
    pub dns_refresh_rate: Option<Duration>,
    /// Default `exportTo` of services.
    pub default_service_export_to: Vec<String>,
    /// Default `exportTo` of VirtualServices.
    pub default_virtual_service_export_to: Vec<String>,
    /// Default `exportTo` of DestinationRules.
    pub default_destination_rule_export_to: Vec<String>,
    /// Labels of the ingress gateway's pods: `istio: VALUE`.
    pub ingress_selector: String,
    /// Service of the ingress gateway; the label's value too unless that is set.
    pub ingress_service: String,
    /// Which Ingresses are served: `OFF`, `DEFAULT` (those of its class and of none), `STRICT` (of its class).
    pub ingress_controller_mode: String,
    /// The class.
    pub ingress_class: String,
    /// Outbound listener of sidecars.
    pub proxy_listen_port: u16,
    /// Inbound listener of sidecars.
    pub proxy_inbound_listen_port: u16,
    /// Defaults of proxies.
    pub default_config: ProxyConfig,
    /// Services that policies name: see [`MeshConfig::authorizer`].
    pub extension_providers: Vec<Value>,
    /// Providers of what Telemetry objects do not name any for.
    pub default_providers: DefaultProviders,
    /// What we do not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            mixer_check_server: String::new(),
            mixer_report_server: String::new(),
            disable_policy_checks: false,
            disable_mixer_http_reports: false,
            enable_client_side_policy_check: false,
            policy_check_fail_open: false,
            allow_policy_explanation: false,
            report_batch_max_entries: 0,
            report_batch_max_time: None,
            access_log_file: String::new(),
            access_log_format: String::new(),
            access_log_encoding: AccessLogEncoding::Text,
            enable_tracing: false,
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            outbound_traffic_policy: OutboundTrafficPolicy::default(),
            connect_timeout: None,
            protocol_detection_timeout: None,
            enable_auto_mtls: true,
            locality_lb_setting: None,
            dns_refresh_rate: None,
            default_service_export_to: Vec::new(),
            default_virtual_service_export_to: Vec::new(),
            default_destination_rule_export_to: Vec::new(),
            ingress_selector: String::new(),
            ingress_service: "istio-ingressgateway".into(),
            ingress_controller_mode: "STRICT".into(),
            ingress_class: "istio".into(),
            proxy_listen_port: 15001,
            proxy_inbound_listen_port: 15006,
            default_config: ProxyConfig::default(),
            extension_providers: Vec::new(),
            default_providers: DefaultProviders::default(),
            other: BTreeMap::new(),
        }
    }
}

impl MeshConfig {
    /// To connect within: 10 s unless set.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
            .unwrap_or(Duration::from_millis(10_000))
    }

    /// The provider of that name, for AuthorizationPolicies of action CUSTOM.
    ///
    /// # Errors
    /// There is none, it cannot be read, or it is none that can be asked; the text says which.
    pub fn authorizer(&self, name: &str) -> Result<Authorizer, String> {
        let provider = self
            .extension_providers
            .iter()
            .find(|provider| provider.get("name").and_then(Value::as_str) == Some(name))
            .ok_or_else(|| format!("there is no extensionProvider {name:?}"))?;
        let of = |field: &str, kind: AuthorizerKind| {
            let spec = provider.get(field)?;
            let read = Authorizer::deserialize(spec)
                .map_err(|error| format!("extensionProvider {name:?}: {field}: {error}"))
                .and_then(|read| match (read.service.is_empty(), read.port) {
                    (true, _) => Err(format!("extensionProvider {name:?}: {field}: no service")),
                    (false, 0) => Err(format!("extensionProvider {name:?}: {field}: no port")),
                    (false, _) => Ok(Authorizer { kind, ..read }),
                });
            Some(read)
        };
        of("envoyExtAuthzGrpc", AuthorizerKind::Grpc)
            .or_else(|| of("envoyExtAuthzHttp", AuthorizerKind::Http))
            .unwrap_or_else(|| {
                Err(format!(
                    "extensionProvider {name:?} is neither envoyExtAuthzGrpc nor envoyExtAuthzHttp"
                ))
            })
    }

    /// Whether either Mixer server is set.
    #[must_use]
    pub fn has_mixer(&self) -> bool {
        !self.mixer_check_server.is_empty() || !self.mixer_report_server.is_empty()
    }
}

/// Names of providers, by what they take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct DefaultProviders {
    /// Spans: the first.
    pub tracing: Vec<String>,
    /// Metrics; without effect.
    pub metrics: Vec<String>,
    /// Access logs.
    pub access_logging: Vec<String>,
}

/// How an authorizer is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthorizerKind {
    /// `envoy.service.auth.v3.Authorization`.
    #[default]
    Grpc,
    /// A request with the same method and path.
    Http,
}

/// A service that decides about requests: `envoyExtAuthzGrpc` or `envoyExtAuthzHttp`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Authorizer {
    /// How it is asked.
    #[serde(skip)]
    pub kind: AuthorizerKind,
    /// Its host, `HOST` or `NAMESPACE/HOST`.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// To answer within.
    pub timeout: Option<Duration>,
    /// Whether a request goes on when nobody answers.
    pub fail_open: bool,
    /// Whether an answer that changes headers may change the route.
    pub clear_route_cache: bool,
    /// What a request gets when nobody answers; unset: 403.
    #[serde(deserialize_with = "status")]
    pub status_on_error: Option<u16>,
    /// How much of the body it is shown.
    #[serde(rename = "includeRequestBodyInCheck")]
    pub body: Option<CheckedBody>,
    /// HTTP: before the path.
    pub path_prefix: String,
    /// HTTP: headers it is shown, `x`, `x*` or `*x`.
    #[serde(
        rename = "includeRequestHeadersInCheck",
        alias = "includeHeadersInCheck"
    )]
    pub request_headers: Vec<String>,
    /// HTTP: headers added to the question.
    #[serde(rename = "includeAdditionalHeadersInCheck")]
    pub additional_headers: BTreeMap<String, String>,
    /// HTTP: headers of its answer that the workload gets.
    #[serde(rename = "headersToUpstreamOnAllow")]
    pub to_upstream_on_allow: Vec<String>,
    /// HTTP: headers of its answer that the client gets with the workload's.
    #[serde(rename = "headersToDownstreamOnAllow")]
    pub to_downstream_on_allow: Vec<String>,
    /// HTTP: headers of its answer that the client gets with the refusal.
    #[serde(rename = "headersToDownstreamOnDeny")]
    pub to_downstream_on_deny: Vec<String>,
}

/// How much of a body an authorizer is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CheckedBody {
    /// Bytes.
    pub max_request_bytes: u32,
    /// Whether a longer body is cut; else it is refused with 413.
    pub allow_partial_message: bool,
    /// Not as text.
    pub pack_as_bytes: bool,
}

/// An HTTP status, written as text.
fn status<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .ok()
        .filter(|status| (200..600).contains(status))
        .map(Some)
        .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no HTTP status")))
}

/// How access logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AccessLogEncoding {
    /// Lines of text.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// Defaults of proxies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ProxyConfig {
    /// Tracing.
    pub tracing: Option<Tracing>,
    /// Worker threads.
    pub concurrency: Option<u32>,
    /// What we do not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// Where traces go and how many.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Tracing {
    /// Share of requests, in percent; unset: 1.
    pub sampling: Option<f64>,
    /// Zipkin collector.
    pub zipkin: Option<Collector>,
    /// OpenTelemetry collector (OTLP over gRPC); Lateen's addition.
    pub open_telemetry: Option<Collector>,
    /// What we do not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// A collector's address.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Collector {
    /// `HOST:PORT`.
    pub address: String,
}
