//! What a node tells of its traffic: access logs and traces, by the mesh configuration and the Telemetry objects of
//! the mesh, the namespace and the workload, each narrower than the one before. Metrics are Mixer's.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::core::v3::{
    GrpcService, grpc_service::EnvoyGrpc, grpc_service::TargetSpecifier,
};
use envoy_types::pb::envoy::config::trace::v3::{
    OpenTelemetryConfig, ZipkinConfig, tracing::Http, tracing::http,
    zipkin_config::CollectorEndpointVersion,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::Tracing;
use envoy_types::pb::envoy::r#type::tracing::v3::{CustomTag, custom_tag, custom_tag::Type};
use envoy_types::pb::envoy::r#type::v3::Percent;
use lateen_config::provider::{OpenTelemetryProvider, Provider, ZipkinProvider};
use lateen_config::telemetry::{
    self, CustomTag as WrittenTag, LogFilter, Mode, ModeMatch, ProviderRef, Telemetry,
};
use lateen_config::{Object, Spec};

use crate::model::{Agent, DNS_DOMAIN, full_host};

use super::wire::{any, bool_value, u32_value};
use super::{Scope, access_log};

/// Share of requests traced unless somebody says, in percent.
const DEFAULT_SAMPLING: f64 = 1.0;

const ZIPKIN_PATH: &str = "/api/v2/spans";

/// What is told of the traffic of each side.
#[derive(Debug, Default)]
pub(super) struct Settings {
    client: Side,
    server: Side,
}

#[derive(Debug, Default)]
struct Side {
    logs: Vec<AccessLog>,
    tracing: Option<Tracing>,
}

impl Settings {
    pub(super) fn of(scope: &Scope<'_>) -> Self {
        let objects = objects(scope);
        let side = |mode: Mode| Side {
            logs: logs(scope, &objects, mode),
            tracing: tracing(scope, &objects, mode),
        };
        Self {
            client: side(Mode::Client),
            server: side(Mode::Server),
        }
    }

    fn side(&self, mode: Mode) -> &Side {
        match mode {
            Mode::Server => &self.server,
            Mode::Client | Mode::ClientAndServer => &self.client,
        }
    }

    /// Access logs of one side; gateways are clients.
    pub(super) fn logs(&self, mode: Mode) -> &[AccessLog] {
        &self.side(mode).logs
    }

    /// How one side traces.
    pub(super) fn tracing(&self, mode: Mode) -> Option<&Tracing> {
        self.side(mode).tracing.as_ref()
    }
}

type Written<'a> = (&'a Object, &'a Telemetry);

/// The objects that hold: the mesh's, the namespace's and the workload's, of each the oldest.
fn objects<'a>(scope: &'a Scope<'_>) -> Vec<Written<'a>> {
    let node = scope.node;
    let root = scope.snapshot.mesh().root_namespace.as_str();
    let all: Vec<Written<'a>> = scope
        .snapshot
        .telemetries(&node.namespace, scope.labels())
        .filter_map(|object| match &object.spec {
            Spec::Telemetry(telemetry) => Some((object, &**telemetry)),
            _ => None,
        })
        .collect();
    let find = |namespace: &str, selects: bool| {
        all.iter()
            .find(|(object, telemetry)| {
                let for_some = telemetry.labels().is_some() || telemetry.targets().next().is_some();
                &*object.key.namespace == namespace && for_some == selects
            })
            .copied()
    };
    let own = (node.namespace != root).then(|| find(&node.namespace, false));
    [
        find(root, false),
        own.flatten(),
        find(&node.namespace, true),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `FILE:LINE: OBJECT: FIELD`.
fn place((object, _): Written<'_>, field: &str) -> String {
    let line = object.origin.line_of(field);
    format!("{}:{line}: {}: {field}", object.origin.file, object.key)
}

fn names(providers: &[ProviderRef]) -> Vec<&str> {
    providers
        .iter()
        .map(|provider| provider.name.as_str())
        .collect()
}

/// Istio's rules: the narrowest object that names providers says which there are; each entry then says of its
/// providers (else of those of the entry before) whether and what they log.
fn logs(scope: &Scope<'_>, objects: &[Written<'_>], mode: Mode) -> Vec<AccessLog> {
    let mesh = scope.snapshot.mesh();
    let defaults = &mesh.default_providers.access_logging;
    let said = objects
        .iter()
        .any(|(_, telemetry)| !telemetry.access_logging.is_empty());
    if !said && defaults.is_empty() {
        return access_log::of(mesh);
    }
    let by_default: Vec<&str> = defaults.iter().map(String::as_str).collect();
    let mut in_scope = by_default.clone();
    for written in objects {
        let (_, telemetry) = written;
        let named: Vec<&str> = telemetry
            .access_logging
            .iter()
            .filter(|entry| ModeMatch::covers(entry.matches.as_ref(), mode))
            .flat_map(|entry| names(&entry.providers))
            .collect();
        if !named.is_empty() {
            in_scope = named;
        }
    }
    // Who logs, by what, and where that is written; in the order of the entries.
    let mut found: Vec<(&str, Option<&LogFilter>, String)> = by_default
        .iter()
        .filter(|name| in_scope.contains(name))
        .map(|name| (*name, None, "defaultProviders.accessLogging".to_owned()))
        .collect();
    let mut before = by_default;
    for written in objects {
        for (index, entry) in written.1.access_logging.iter().enumerate() {
            if !entry.providers.is_empty() {
                before = names(&entry.providers);
            }
            if !ModeMatch::covers(entry.matches.as_ref(), mode) {
                continue;
            }
            for name in before.iter().filter(|name| in_scope.contains(name)) {
                found.retain(|(there, ..)| there != name);
                if entry.disabled != Some(true) {
                    let field = format!("spec.accessLogging[{index}]");
                    found.push((name, entry.filter.as_ref(), place(*written, &field)));
                }
            }
        }
    }
    found.sort_by_key(|(name, ..)| *name);
    found
        .into_iter()
        .filter_map(|(name, filter, place)| log(scope, name, filter, &place))
        .collect()
}

fn log(
    scope: &Scope<'_>,
    provider: &str,
    filter: Option<&LogFilter>,
    place: &str,
) -> Option<AccessLog> {
    let mesh = scope.snapshot.mesh();
    let file = match mesh.provider(provider) {
        Ok(Provider::FileLog(file)) => file,
        Ok(_) => {
            scope.note(format!(
                "{place}: provider {provider:?} writes no access logs"
            ));
            return None;
        }
        Err(why) => {
            scope.note(format!("{place}: {why}; nothing is logged there"));
            return None;
        }
    };
    let mut log = access_log::to_file(mesh, &file);
    if let Some(filter) = filter.filter(|filter| !filter.expression.is_empty()) {
        log.filter = match (scope.node.agent, &filter.condition) {
            (Agent::Envoy, _) => Some(access_log::by_expression(&filter.expression)),
            (Agent::Lateen, Some(condition)) => Some(access_log::by_condition(condition)),
            (Agent::Lateen, None) => {
                scope.note(format!(
                    "{place}.filter.expression: Lateen's proxy cannot evaluate it; everything is logged there"
                ));
                None
            }
        };
    }
    Some(log)
}

/// What Telemetry says of one side, put together.
#[derive(Default)]
struct Spans<'a> {
    provider: Option<(&'a str, String)>,
    sampling: Option<f64>,
    disabled: bool,
    tags: Option<(&'a std::collections::BTreeMap<String, WrittenTag>, String)>,
}

fn tracing(scope: &Scope<'_>, objects: &[Written<'_>], mode: Mode) -> Option<Tracing> {
    let mesh = scope.snapshot.mesh();
    let mut spans = Spans {
        provider: mesh
            .default_providers
            .tracing
            .first()
            .map(|name| (name.as_str(), "defaultProviders.tracing".to_owned())),
        ..Spans::default()
    };
    for written in objects {
        for (index, entry) in written.1.tracing.iter().enumerate() {
            if ModeMatch::covers(entry.matches.as_ref(), mode) {
                let at = || place(*written, &format!("spec.tracing[{index}]"));
                overlay(&mut spans, entry, &at);
            }
        }
    }
    if spans.disabled {
        return None;
    }
    let settings = mesh.default_config.tracing.as_ref();
    let (provider, tag_length) = match &spans.provider {
        Some((name, place)) => {
            let (provider, length) = named_provider(scope, name, place)?;
            (Some(provider), length)
        }
        // As the mesh configuration has it: without a provider there, the one of the proxy's bootstrap.
        None if mesh.enable_tracing => {
            (settings.and_then(|settings| configured(scope, settings)), 0)
        }
        None => return None,
    };
    let sampling = spans
        .sampling
        .or_else(|| settings.and_then(|settings| settings.sampling))
        .unwrap_or(DEFAULT_SAMPLING);
    let percent = |value: f64| {
        Some(Percent {
            value: value.clamp(0.0, 100.0),
        })
    };
    Some(Tracing {
        client_sampling: percent(100.0),
        random_sampling: percent(sampling),
        overall_sampling: percent(100.0),
        provider,
        max_path_tag_length: (tag_length > 0).then(|| u32_value(tag_length)).flatten(),
        custom_tags: spans
            .tags
            .iter()
            .flat_map(|(tags, place)| tags.iter().map(move |(name, tag)| (name, tag, place)))
            .filter_map(|(name, tag, place)| custom_tag(scope, name, tag, place))
            .collect(),
        ..Default::default()
    })
}

fn overlay<'a>(spans: &mut Spans<'a>, entry: &'a telemetry::Tracing, place: &dyn Fn() -> String) {
    if let Some(provider) = entry.providers.first() {
        spans.provider = Some((&provider.name, place()));
    }
    if let Some(disabled) = entry.disable_span_reporting {
        spans.disabled = disabled;
    }
    spans.sampling = entry.random_sampling_percentage.or(spans.sampling);
    if !entry.custom_tags.is_empty() {
        spans.tags = Some((&entry.custom_tags, place()));
    }
}

fn custom_tag(
    scope: &Scope<'_>,
    name: &str,
    written: &WrittenTag,
    place: &str,
) -> Option<CustomTag> {
    let kind = if let Some(literal) = &written.literal {
        Type::Literal(custom_tag::Literal {
            value: literal.value.clone(),
        })
    } else if let Some(header) = &written.header {
        Type::RequestHeader(custom_tag::Header {
            name: header.name.clone(),
            default_value: header.default_value.clone(),
        })
    } else if let Some(formatter) = &written.formatter {
        Type::Value(formatter.value.clone())
    } else if let Some(variable) = &written.environment {
        if scope.node.agent == Agent::Lateen {
            scope.note(format!(
                "{place}.customTags.{name}: Lateen's proxy does not read its environment; the tag is left out"
            ));
            return None;
        }
        Type::Environment(custom_tag::Environment {
            name: variable.name.clone(),
            default_value: variable.default_value.clone(),
        })
    } else {
        return None;
    };
    Some(CustomTag {
        tag: name.to_owned(),
        r#type: Some(kind),
    })
}

/// A provider of spans by name, and the longest path in a tag (0: Envoy's own limit).
fn named_provider(scope: &Scope<'_>, name: &str, place: &str) -> Option<(Http, u32)> {
    let found = match scope.snapshot.mesh().provider(name) {
        Ok(Provider::Zipkin(provider)) => {
            collector(scope, &provider.service, provider.port).map(|(cluster, host)| {
                let length = provider.max_tag_length;
                (zipkin(cluster, host, &provider), length)
            })
        }
        Ok(Provider::OpenTelemetry(OpenTelemetryProvider {
            service,
            port,
            max_tag_length,
        })) => collector(scope, &service, port)
            .map(|(cluster, _)| (otlp(scope, cluster), max_tag_length)),
        Ok(_) => Err(format!("provider {name:?} takes no spans")),
        Err(why) => Err(why),
    };
    found
        .map_err(|why| scope.note(format!("{place}: {why}; nothing is traced")))
        .ok()
}

/// The collector that the mesh configuration itself names.
fn configured(scope: &Scope<'_>, settings: &lateen_config::mesh::Tracing) -> Option<Http> {
    let find = |collector_: &Option<lateen_config::mesh::Collector>| {
        let (host, port) = super::mixer::server(&collector_.as_ref()?.address)?;
        collector(scope, host, port).ok()
    };
    find(&settings.open_telemetry)
        .map(|(cluster, _)| otlp(scope, cluster))
        .or_else(|| {
            find(&settings.zipkin)
                .map(|(cluster, host)| zipkin(cluster, host, &ZipkinProvider::default()))
        })
}

/// Cluster and host of a collector that the node can reach: a name nobody serves would make Envoy refuse the
/// listener.
fn collector(scope: &Scope<'_>, service: &str, port: u16) -> Result<(String, String), String> {
    let host = service.split_once('/').map_or(service, |(_, host)| host);
    let full = full_host(host, &scope.snapshot.mesh().root_namespace);
    // `zipkin.istio-system:9411` is how Istio writes it.
    let hosts = [full.clone(), format!("{full}.svc.{DNS_DOMAIN}")];
    let cluster = scope.cluster_of(&hosts, port);
    let host = cluster
        .as_deref()
        .and_then(super::names::Outbound::parse)
        .map(|parts| parts.host.to_owned());
    match (cluster, host) {
        (Some(cluster), Some(host)) => Ok((cluster, host)),
        _ => Err(format!(
            "the workload may call no service {full} with port {port}"
        )),
    }
}

fn zipkin(cluster: String, host: String, provider: &ZipkinProvider) -> Http {
    Http {
        name: "envoy.tracers.zipkin".to_owned(),
        config_type: Some(http::ConfigType::TypedConfig(any(&ZipkinConfig {
            collector_cluster: cluster,
            collector_endpoint: match provider.path.as_str() {
                "" => ZIPKIN_PATH.to_owned(),
                path => path.to_owned(),
            },
            collector_hostname: host,
            collector_endpoint_version: CollectorEndpointVersion::HttpJson as i32,
            trace_id_128bit: !provider.short_trace_id,
            shared_span_context: bool_value(false),
            ..Default::default()
        }))),
    }
}

fn otlp(scope: &Scope<'_>, cluster: String) -> Http {
    let node = scope.node;
    Http {
        name: "envoy.tracers.opentelemetry".to_owned(),
        config_type: Some(http::ConfigType::TypedConfig(any(&OpenTelemetryConfig {
            grpc_service: Some(GrpcService {
                target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                    cluster_name: cluster,
                    ..Default::default()
                })),
                ..Default::default()
            }),
            service_name: format!(
                "{}.{}",
                node.labels.get("app").map_or(
                    node.workload_name.as_deref().unwrap_or(&node.name),
                    String::as_str
                ),
                node.namespace
            ),
            ..Default::default()
        }))),
    }
}
