//! The HTTP connection manager and its filters.

use envoy_types::pb::envoy::config::core::v3::{CidrRange, Http1ProtocolOptions};
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
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
use lateen_config::telemetry::Mode;
use prost::{Message, Name};

use super::Scope;
use super::authorization;
use super::mixer::Hooks;
use super::tokens;
use super::wire::{ZERO, ads, any, bool_value};

/// What the `server` header of answers says.
const SERVER_NAME: &str = "istio-envoy";

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
    let mode = match side {
        Side::Inbound(_) => Mode::Server,
        Side::Outbound | Side::Gateway => Mode::Client,
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
        tracing: scope.telemetry.tracing(mode).map(|tracing| Tracing {
            // The sidecar's two sides are spans of their own, not each other's parents.
            spawn_upstream_span: if side == Side::Gateway {
                bool_value(true)
            } else {
                None
            },
            ..tracing.clone()
        }),
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
        access_log: [scope.telemetry.logs(mode), &mixer.access_log].concat(),
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
