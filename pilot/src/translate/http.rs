//! The HTTP connection manager and its filters.

use envoy_types::pb::envoy::config::core::v3::{
    CidrRange, GrpcService, Http1ProtocolOptions, grpc_service::EnvoyGrpc,
    grpc_service::TargetSpecifier,
};
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::config::trace::v3::{
    OpenTelemetryConfig, ZipkinConfig, tracing::Http, tracing::http,
    zipkin_config::CollectorEndpointVersion,
};
use envoy_types::pb::envoy::extensions::filters::http::{
    cors::v3::Cors, fault::v3::HttpFault, router::v3::Router,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, http_connection_manager::CodecType,
    http_connection_manager::ForwardClientCertDetails,
    http_connection_manager::InternalAddressConfig, http_connection_manager::RouteSpecifier,
    http_connection_manager::SetCurrentClientCertDetails, http_connection_manager::Tracing,
    http_connection_manager::UpgradeConfig, http_filter,
};
use envoy_types::pb::envoy::r#type::v3::Percent;
use prost::{Message, Name};

use super::Scope;
use super::authorization;
use super::mixer::Hooks;
use super::names;
use super::tokens;
use super::wire::{ZERO, ads, any, bool_value};

/// What the `server` header of answers says.
const SERVER_NAME: &str = "istio-envoy";

/// Share of requests traced unless the mesh says, in percent.
const DEFAULT_SAMPLING: f64 = 1.0;

/// Whose requests a connection manager serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Other workloads' to this one, on that port of it (0: one that no service leads to).
    Inbound(u16),
    /// This workload's to others.
    Outbound,
    /// The world's, at a gateway.
    Gateway,
}

pub(super) fn named<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

/// The connection manager as a network filter; its routes come by RDS under that name.
pub(super) fn connection_manager(
    scope: &Scope<'_>,
    side: Side,
    stat_prefix: String,
    route_config_name: String,
    mixer: Hooks<HttpFilter>,
) -> Filter {
    let port = match side {
        Side::Inbound(port) => Some(port),
        Side::Gateway | Side::Outbound => None,
    };
    let mut http_filters: Vec<HttpFilter> = Vec::new();
    if side != Side::Outbound {
        let beside_mixer = mixer
            .filters
            .iter()
            .any(|filter| filter.name == authorization::EXTERNAL);
        http_filters.extend(authorization::custom_filters(scope, beside_mixer));
        // Whom a token is of is known before it is decided who may do what.
        http_filters.extend(tokens::http_filter(scope, port));
        http_filters.extend(authorization::http_filters(scope));
    }
    http_filters.extend(mixer.filters);
    http_filters.push(named("envoy.filters.http.cors", &Cors {}));
    http_filters.push(named("envoy.filters.http.fault", &HttpFault::default()));
    http_filters.push(named("envoy.filters.http.router", &Router::default()));

    let details = |cert: bool| {
        Some(SetCurrentClientCertDetails {
            subject: bool_value(true),
            cert,
            dns: true,
            uri: true,
            ..Default::default()
        })
    };
    let (forward, details) = match side {
        Side::Inbound(_) => (ForwardClientCertDetails::AppendForward, details(false)),
        Side::Outbound => (ForwardClientCertDetails::Sanitize, None),
        Side::Gateway => (ForwardClientCertDetails::SanitizeSet, details(true)),
    };
    let manager = HttpConnectionManager {
        codec_type: CodecType::Auto as i32,
        stat_prefix,
        http_filters,
        tracing: tracing(scope, side),
        // Clients of an HTTP proxy send whole URLs.
        http_protocol_options: Some(Http1ProtocolOptions {
            allow_absolute_url: bool_value(true),
            accept_http_10: scope
                .node
                .metadata
                .get("HTTP10")
                .is_some_and(|flag| flag == "1"),
            ..Default::default()
        }),
        server_name: SERVER_NAME.to_owned(),
        stream_idle_timeout: ZERO,
        access_log: [scope.access_log.clone(), mixer.access_log].concat(),
        // Requests that an application sends are internal, so that it may ask for timeouts and retries by
        // `x-envoy-*` headers; what it forwards of its own client is not ours to change.
        use_remote_address: bool_value(port.is_none()),
        skip_xff_append: side == Side::Outbound,
        preserve_external_request_id: side == Side::Outbound,
        internal_address_config: (side == Side::Outbound).then(internal_addresses),
        generate_request_id: bool_value(true),
        forward_client_cert_details: forward as i32,
        set_current_client_cert_details: details,
        normalize_path: bool_value(true),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..Default::default()
        }],
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: ads(),
            route_config_name,
        })),
        ..Default::default()
    };
    Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(&manager))),
    }
}

/// Loopback and private addresses (RFC 1918, RFC 4193): where applications are.
fn internal_addresses() -> InternalAddressConfig {
    let range = |address: &str, bits: u32| CidrRange {
        address_prefix: address.to_owned(),
        prefix_len: Some(lateen_protocols::envoy::google::protobuf::UInt32Value { value: bits }),
    };
    InternalAddressConfig {
        cidr_ranges: vec![
            range("127.0.0.0", 8),
            range("10.0.0.0", 8),
            range("172.16.0.0", 12),
            range("192.168.0.0", 16),
            range("::1", 128),
            range("fc00::", 7),
        ],
        ..Default::default()
    }
}

fn tracing(scope: &Scope<'_>, side: Side) -> Option<Tracing> {
    let mesh = scope.snapshot.mesh();
    if !mesh.enable_tracing {
        return None;
    }
    let settings = mesh.default_config.tracing.as_ref();
    let sampling = settings
        .and_then(|settings| settings.sampling)
        .unwrap_or(DEFAULT_SAMPLING);
    let percent = |value: f64| {
        Some(Percent {
            value: value.clamp(0.0, 100.0),
        })
    };
    // Without a provider here, the one of the proxy's bootstrap is used, if any.
    let provider = settings.and_then(|settings| {
        let zipkin = settings
            .zipkin
            .as_ref()
            .and_then(|collector| zipkin(scope, &collector.address));
        let otlp = settings
            .open_telemetry
            .as_ref()
            .and_then(|collector| otlp(scope, &collector.address));
        otlp.or(zipkin)
    });
    Some(Tracing {
        client_sampling: percent(100.0),
        random_sampling: percent(sampling),
        overall_sampling: percent(100.0),
        provider,
        // The sidecar's two sides are spans of their own, not each other's parents.
        spawn_upstream_span: if side == Side::Gateway {
            bool_value(true)
        } else {
            None
        },
        ..Default::default()
    })
}

/// The cluster of a collector, if the node can reach it: a name nobody serves would make Envoy
/// refuse the listener.
fn collector(scope: &Scope<'_>, address: &str) -> Option<(String, String)> {
    let (host, port) = super::mixer::server(address)?;
    let host = crate::model::full_host(host, &scope.snapshot.mesh().root_namespace);
    // `zipkin.istio-system:9411` is how Istio writes it.
    let service = [
        host.clone(),
        format!("{host}.svc.{}", crate::model::DNS_DOMAIN),
    ]
    .into_iter()
    .find_map(|host| scope.snapshot.service(&host))?;
    service.port(port)?;
    scope
        .services
        .iter()
        .any(|visible| visible.hostname == service.hostname)
        .then(|| {
            (
                names::outbound(port, "", &service.hostname),
                service.hostname.to_string(),
            )
        })
}

fn zipkin(scope: &Scope<'_>, address: &str) -> Option<Http> {
    let (cluster, host) = collector(scope, address)?;
    Some(Http {
        name: "envoy.tracers.zipkin".to_owned(),
        config_type: Some(http::ConfigType::TypedConfig(any(&ZipkinConfig {
            collector_cluster: cluster,
            collector_endpoint: "/api/v2/spans".to_owned(),
            collector_hostname: host,
            collector_endpoint_version: CollectorEndpointVersion::HttpJson as i32,
            trace_id_128bit: true,
            shared_span_context: bool_value(false),
            ..Default::default()
        }))),
    })
}

fn otlp(scope: &Scope<'_>, address: &str) -> Option<Http> {
    let (cluster, _) = collector(scope, address)?;
    let node = scope.node;
    Some(Http {
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
    })
}
