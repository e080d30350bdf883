//! What stock Envoy is told about calling Mixer: the filters and access logs it has, filled with the same facts as
//! our own filter. Attributes go as call metadata (a listener's), context extensions (a route's) and custom
//! tags (of the access log).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use base64::Engine as _;
use envoy_types::pb::envoy::config::accesslog::v3::{
    AccessLog, AccessLogFilter, AndFilter, LogTypeFilter, access_log,
    access_log_filter::FilterSpecifier,
};
use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, BackoffStrategy, GrpcService, HeaderValue, HeaderValueOption, RetryPolicy,
    grpc_service::{EnvoyGrpc, TargetSpecifier},
    header_value_option::HeaderAppendAction,
};
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::{
    CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    CheckSettings, ExtAuthz, ExtAuthzPerRoute, ext_authz::Services, ext_authz_per_route,
};
use envoy_types::pb::envoy::extensions::filters::http::header_to_metadata::v3::{
    Config as HeaderToMetadata,
    config::{KeyValuePair, Rule, ValueType},
};
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz as TcpExtAuthz;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter,
};
use envoy_types::pb::envoy::r#type::{
    metadata::v3::{
        MetadataKey, MetadataKind,
        metadata_key::{PathSegment, path_segment::Segment},
        metadata_kind::{Host, Kind},
    },
    tracing::v3::{
        CustomTag,
        custom_tag::{Literal, Metadata, Type},
    },
    v3::HttpStatus,
};
use envoy_types::pb::google::protobuf::Any;
use lateen_config::{Spec, StringMatch};
use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, attribute_value::Value};
use lateen_protocols::istio::mixer::v1::{
    Attributes, config::client::NetworkFailPolicy, config::client::network_fail_policy::FailPolicy,
};
use prost::{Message, Name};
use serde_json::json;

use crate::model::{BoundQuota, Snapshot};

use super::Direction;
use crate::translate::names;
use crate::translate::wire::{any, count, duration};

/// Envoy's filter for external authorization; also the key of its per-route configuration.
const AUTHORIZATION: &str = "envoy.filters.http.ext_authz";
/// Call metadata that are attributes begin so.
const METADATA_PREFIX: &str = "mixer-attribute-";
/// The context extension that says what a request is charged.
const QUOTAS: &str = "mixer-quotas";
/// Where the forwarded attributes of the proxy before are kept, for Mixer.
const NAMESPACE: &str = "lateen.mixer";
const FORWARDED: &str = "forwarded";
/// The header that proxies forward attributes in.
const FORWARD_HEADER: &str = "x-istio-attributes";
/// Name of the logs.
const LOG_NAME: &str = "mixer";

/// What our own client gives a call.
const TIMEOUT: lateen_config::Duration = lateen_config::Duration::from_millis(5000);
/// Entries wait no longer than this for more of them, unless the mesh says otherwise.
const BATCH: lateen_config::Duration = lateen_config::Duration::from_millis(1000);
/// Between two reports of a connection that lasts. Istio: `TcpClientConfig.report_interval`.
pub(super) const TCP_INTERVAL: lateen_config::Duration =
    lateen_config::Duration::from_millis(10_000);
/// Headers whose values rules read that are sent with reports, at most.
const MAX_HEADERS: usize = 64;

/// Names of the headers that reports carry, because something configured reads them.
#[derive(Debug, Default)]
pub(super) struct Headers {
    request: BTreeSet<String>,
    response: BTreeSet<String>,
}

impl Headers {
    /// Those that Mixer's configuration names: `request.headers["x-user"]`.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut all = Self::default();
        // Says whether it is gRPC.
        all.request.insert("content-type".to_owned());
        all.response
            .extend(["grpc-status", "grpc-message"].map(str::to_owned));
        for object in snapshot.objects() {
            if let Spec::Mixer(mixer) = &object.spec {
                all.read(&mixer.spec);
            }
        }
        all
    }

    fn read(&mut self, value: &serde_json::Value) {
        match value {
            serde_json::Value::String(text) => {
                named("request.headers", text, &mut self.request);
                named("response.headers", text, &mut self.response);
            }
            serde_json::Value::Array(list) => list.iter().for_each(|value| self.read(value)),
            serde_json::Value::Object(map) => map.values().for_each(|value| self.read(value)),
            _ => {}
        }
    }
}

/// Adds the keys that `map` is indexed with in an expression.
fn named(map: &str, expression: &str, into: &mut BTreeSet<String>) {
    for rest in expression.split(map).skip(1) {
        let Some(rest) = rest.trim_start().strip_prefix('[') else {
            continue;
        };
        let mut rest = rest.trim_start().chars();
        let Some(quote) = rest.next().filter(|c| matches!(c, '"' | '\'' | '`')) else {
            continue;
        };
        let Some((name, _)) = rest.as_str().split_once(quote) else {
            continue;
        };
        let is_name = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if is_name && into.len() < MAX_HEADERS {
            into.insert(name.to_ascii_lowercase());
        }
    }
}

/// A service of Mixer's: the check or the report one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Server<'a> {
    pub(super) cluster: &'a str,
    pub(super) batch: Option<std::time::Duration>,
}

impl Server<'_> {
    fn grpc(self, attributes: &Attributes, policy: Option<&NetworkFailPolicy>) -> GrpcService {
        let initial_metadata = texts(attributes)
            .into_iter()
            .map(|(name, value)| HeaderValue {
                key: format!("{METADATA_PREFIX}{name}"),
                value: literal(&value),
                ..Default::default()
            })
            .collect();
        GrpcService {
            timeout: duration(TIMEOUT),
            initial_metadata,
            retry_policy: policy.filter(|policy| policy.max_retry > 0).map(retries),
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: self.cluster.to_owned(),
                // Else it is the cluster's name, which is no authority: `|` is not allowed in one.
                authority: names::Outbound::parse(self.cluster)
                    .map_or_else(String::new, |name| name.host.to_owned()),
                ..Default::default()
            })),
        }
    }
}

fn retries(policy: &NetworkFailPolicy) -> RetryPolicy {
    let wait = |given: Option<prost_types::Duration>| {
        let given = std::time::Duration::try_from(given?).ok()?;
        // Envoy refuses waits that round to nothing.
        (given >= std::time::Duration::from_millis(1))
            .then(|| duration(lateen_config::Duration(given)))?
    };
    RetryPolicy {
        num_retries: count(i32::try_from(policy.max_retry).unwrap_or(i32::MAX)),
        retry_back_off: wait(policy.base_retry_wait).map(|base| BackoffStrategy {
            base_interval: Some(base),
            max_interval: wait(policy.max_retry_wait)
                .filter(|most| (most.seconds, most.nanos) >= (base.seconds, base.nanos)),
        }),
        ..Default::default()
    }
}

fn is_open(policy: &NetworkFailPolicy) -> bool {
    policy.policy() == FailPolicy::FailOpen
}

fn named_filter<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

/// Keeps what the proxy before forwards where both the check and the access log find it, and from the application.
pub(super) fn keep_forwarded() -> HttpFilter {
    named_filter(
        "envoy.filters.http.header_to_metadata",
        &HeaderToMetadata {
            request_rules: vec![Rule {
                header: FORWARD_HEADER.to_owned(),
                on_header_present: Some(KeyValuePair {
                    metadata_namespace: NAMESPACE.to_owned(),
                    key: FORWARDED.to_owned(),
                    r#type: ValueType::String as i32,
                    ..Default::default()
                }),
                remove: true,
                ..Default::default()
            }],
            ..Default::default()
        },
    )
}

/// Asks about every request.
pub(super) fn http_check(
    server: Server<'_>,
    attributes: &Attributes,
    policy: &NetworkFailPolicy,
) -> HttpFilter {
    named_filter(
        AUTHORIZATION,
        &ExtAuthz {
            services: Some(Services::GrpcService(server.grpc(attributes, Some(policy)))),
            transport_api_version: ApiVersion::V3 as i32,
            failure_mode_allow: is_open(policy),
            // What our own proxy answers when Mixer cannot be asked.
            status_on_error: Some(HttpStatus { code: 503 }),
            // A rule may send a request elsewhere.
            clear_route_cache: true,
            metadata_context_namespaces: vec![NAMESPACE.to_owned()],
            include_tls_session: true,
            ..Default::default()
        },
    )
}

/// Asks about every connection.
pub(super) fn tcp_check(
    server: Server<'_>,
    attributes: &Attributes,
    policy: &NetworkFailPolicy,
) -> Filter {
    Filter {
        name: "envoy.filters.network.ext_authz".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(&TcpExtAuthz {
            stat_prefix: LOG_NAME.to_owned(),
            grpc_service: Some(server.grpc(attributes, Some(policy))),
            failure_mode_allow: is_open(policy),
            transport_api_version: ApiVersion::V3 as i32,
            include_tls_session: true,
            ..Default::default()
        }))),
    }
}

/// What is said of one destination.
pub(super) fn route(attributes: &Attributes, quotas: &[BoundQuota<'_>]) -> HashMap<String, Any> {
    let mut extensions: HashMap<String, String> = texts(attributes).into_iter().collect();
    if let Some(charges) = charges(quotas) {
        extensions.insert(QUOTAS.to_owned(), charges);
    }
    let settings = ExtAuthzPerRoute {
        r#override: Some(ext_authz_per_route::Override::CheckSettings(
            CheckSettings {
                context_extensions: extensions,
                ..Default::default()
            },
        )),
    };
    HashMap::from([(AUTHORIZATION.to_owned(), any(&settings))])
}

/// What QuotaSpecs charge, in JSON; their matches are Mixer's to judge, which has all attributes.
fn charges(quotas: &[BoundQuota<'_>]) -> Option<String> {
    let pattern = |matcher: &StringMatch| match matcher {
        StringMatch::Present => json!({ "prefix": "" }),
        StringMatch::Exact(text) => json!({ "exact": text }),
        StringMatch::Prefix(text) => json!({ "prefix": text }),
        StringMatch::Regex(text) => json!({ "regex": text }),
    };
    let mut all = Vec::new();
    for rule in quotas.iter().flat_map(|bound| &bound.spec.rules) {
        let matches: Vec<BTreeMap<&str, serde_json::Value>> = rule
            .matches
            .iter()
            .map(|entry| {
                entry
                    .clause
                    .iter()
                    .map(|(name, matcher)| (name.as_str(), pattern(matcher)))
                    .collect()
            })
            .collect();
        for quota in &rule.quotas {
            let charge = quota.charge.max(1);
            all.push(if matches.is_empty() {
                json!({ "quota": quota.quota, "charge": charge })
            } else {
                json!({ "quota": quota.quota, "charge": charge, "match": matches })
            });
        }
    }
    (!all.is_empty()).then(|| serde_json::Value::Array(all).to_string())
}

/// Tells the next proxy who sends and what was meant.
pub(super) fn forward(attributes: &Attributes) -> HeaderValueOption {
    // One entry after the other, so that the bytes are the same each time.
    let mut bytes = Vec::new();
    let sorted: BTreeMap<&String, &AttributeValue> = attributes.attributes.iter().collect();
    for (name, value) in sorted {
        let one = Attributes {
            attributes: HashMap::from([(name.clone(), value.clone())]),
        };
        bytes.extend(one.encode_to_vec());
    }
    HeaderValueOption {
        header: Some(HeaderValue {
            key: FORWARD_HEADER.to_owned(),
            value: base64::engine::general_purpose::STANDARD.encode(bytes),
            ..Default::default()
        }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..Default::default()
    }
}

/// Reports every request.
pub(super) fn http_log(
    server: Server<'_>,
    direction: Direction,
    attributes: &Attributes,
    headers: &Headers,
) -> AccessLog {
    let list = |names: &BTreeSet<String>| names.iter().cloned().collect();
    AccessLog {
        name: "envoy.access_loggers.http_grpc".to_owned(),
        config_type: Some(access_log::ConfigType::TypedConfig(any(
            &HttpGrpcAccessLogConfig {
                common_config: Some(common(server, direction, attributes)),
                additional_request_headers_to_log: list(&headers.request),
                additional_response_headers_to_log: list(&headers.response),
                additional_response_trailers_to_log: ["grpc-status", "grpc-message"]
                    .map(str::to_owned)
                    .into(),
            },
        ))),
        ..Default::default()
    }
}

/// Reports every connection when it opens, while it lasts and when it closes.
pub(super) fn tcp_log(
    server: Server<'_>,
    direction: Direction,
    attributes: &Attributes,
) -> AccessLog {
    AccessLog {
        name: "envoy.access_loggers.tcp_grpc".to_owned(),
        config_type: Some(access_log::ConfigType::TypedConfig(any(
            &TcpGrpcAccessLogConfig {
                common_config: Some(common(server, direction, attributes)),
            },
        ))),
        ..Default::default()
    }
}

/// The same log for ends of connections only: other entries are for Mixer.
pub(super) fn ends_only(log: &AccessLog) -> AccessLog {
    let ends = AccessLogFilter {
        filter_specifier: Some(FilterSpecifier::LogTypeFilter(LogTypeFilter {
            types: vec![
                AccessLogType::TcpUpstreamConnected as i32,
                AccessLogType::TcpPeriodic as i32,
            ],
            exclude: true,
        })),
    };
    let filter = match log.filter.clone() {
        Some(own) => AccessLogFilter {
            filter_specifier: Some(FilterSpecifier::AndFilter(AndFilter {
                filters: vec![ends, own],
            })),
        },
        None => ends,
    };
    AccessLog {
        filter: Some(filter),
        ..log.clone()
    }
}

fn common(
    server: Server<'_>,
    direction: Direction,
    attributes: &Attributes,
) -> CommonGrpcAccessLogConfig {
    let mut custom_tags: Vec<CustomTag> = texts(attributes)
        .into_iter()
        .map(|(tag, value)| CustomTag {
            tag,
            r#type: Some(Type::Literal(Literal { value })),
        })
        .collect();
    if direction == Direction::Outbound {
        custom_tags.push(of_host("destination.uid", "istio", "uid"));
    }
    CommonGrpcAccessLogConfig {
        log_name: LOG_NAME.to_owned(),
        grpc_service: Some(server.grpc(&Attributes::default(), None)),
        transport_api_version: ApiVersion::V3 as i32,
        buffer_flush_interval: duration(server.batch.map_or(BATCH, lateen_config::Duration)),
        custom_tags,
        ..Default::default()
    }
}

/// What the chosen host's metadata say.
fn of_host(tag: &str, namespace: &str, key: &str) -> CustomTag {
    CustomTag {
        tag: tag.to_owned(),
        r#type: Some(Type::Metadata(Metadata {
            kind: Some(MetadataKind {
                kind: Some(Kind::Host(Host {})),
            }),
            metadata_key: Some(MetadataKey {
                key: namespace.to_owned(),
                path: vec![PathSegment {
                    segment: Some(Segment::Key(key.to_owned())),
                }],
            }),
            ..Default::default()
        })),
    }
}

/// Attributes as text, by name; those that have no text are left out.
fn texts(attributes: &Attributes) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => Some(text.clone()),
        Value::Int64Value(number) => Some(number.to_string()),
        Value::BoolValue(flag) => Some(flag.to_string()),
        Value::BytesValue(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice())
                .ok()
                .map(|ip| std::net::Ipv4Addr::from(ip).to_string()),
            16 => <[u8; 16]>::try_from(bytes.as_slice())
                .ok()
                .map(|ip| std::net::Ipv6Addr::from(ip).to_string()),
            _ => None,
        },
        _ => None,
    };
    attributes
        .attributes
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), text(value.value.as_ref()?)?)))
        .collect()
}

/// Metadata values are formats to Envoy: `%` begins a command.
fn literal(text: &str) -> String {
    text.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_in_expressions() {
        let mut headers = Headers::default();
        headers.read(&json!({
            "match": "request.headers[\"X-User\"] == \"john\" && (request.headers[ 'cookie' ] | \"\") != \"\"",
            "params": { "a": ["request.headers[`x-b`]", "response.headers[\"x-c\"]", "request.headers[source.user]"] },
        }));
        let names: Vec<_> = headers.request.iter().map(String::as_str).collect();
        assert_eq!(names, ["cookie", "x-b", "x-user"]);
        assert_eq!(headers.response.len(), 1);
    }
}
