//! The HTTP connection manager: carries the requests of one downstream connection through filters and
//! routes to the router, and their responses back.
//!
//! `connection` finds out which HTTP is spoken and when the connection ends; `h1` and `h2` drive the codecs;
//! `stream` takes each request through filters and route to the router; `record` writes down what became of it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use lateen_codec::{h1::Limits as Http1, h2::Options as Http2};
use lateen_protocols::envoy::{
    envoy::{
        config::{
            core::v3::{
                CidrRange, HttpProtocolOptions, TrafficDirection,
                http_protocol_options::HeadersWithUnderscoresAction,
            },
            route::v3::RouteConfiguration,
        },
        extensions::filters::network::http_connection_manager::v3 as proto,
    },
    google::protobuf::{BoolValue, UInt32Value},
};
use proto::http_connection_manager::{
    CodecType, ForwardClientCertDetails, PathWithEscapedSlashesAction, RouteSpecifier,
    ServerHeaderTransformation, StripPortMode,
};

use crate::{
    access_log::AccessLog,
    config_error::ConfigError,
    filter::HttpFilters,
    proto::{invalid, source_file, timeout},
    route::{RouteSlot, RouteTable},
    shared::Shared,
    stats::Scope,
    trace::Tracer,
};

mod connection;
mod h1;
mod h2;
mod output;
mod late;
mod stream;
pub mod mutate;
mod connect;
mod local_reply;
mod limits;
mod record;
mod redirect;
mod stats;
pub mod cert;
#[cfg(test)]
mod tests;

pub use connection::ConnectionContext;
pub use stats::Stats;
use stats::{Http1Stats, Http2Stats};

/// Envoy's default for `max_request_headers_kb`.
const HEADERS_KIB: u32 = 60;
/// Envoy's default for `max_headers_count`.
const HEADERS_COUNT: u32 = 100;
/// Envoy's default for `stream_idle_timeout`.
const STREAM_IDLE: Duration = Duration::from_secs(5 * 60);
/// Envoy's default for `common_http_protocol_options.idle_timeout`.
const CONNECTION_IDLE: Duration = Duration::from_secs(60 * 60);
/// Envoy's default for `drain_timeout`: how long a peer that was told to go (GOAWAY) may stay.
const DRAIN: Duration = Duration::from_secs(5);
/// Envoy's default for `delayed_close_timeout`.
const DELAYED_CLOSE: Duration = Duration::from_secs(1);
/// A request head must arrive in this time. Envoy has no limit unless told; a head that trickles in for
/// longer is an attack, not a client.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// A compiled connection manager.
#[derive(Debug)]
pub struct ConnectionManager {
    pub(crate) shared: Arc<Shared>,
    pub(crate) filters: HttpFilters,
    pub(crate) access_log: Vec<AccessLog>,
    pub(crate) tracer: Option<Arc<Tracer>>,
    pub(crate) stats: Stats,
    stats_h1: Http1Stats,
    stats_h2: Http2Stats,
    routes: Routes,
    codec: CodecType,
    limits: Limits,
    server_name: Bytes,
    server_header: ServerHeaderTransformation,
    via: Bytes,
    use_remote_address: bool,
    trusted_hops: usize,
    skip_xff_append: bool,
    internal: Vec<Cidr>,
    generate_request_id: bool,
    preserve_request_id: bool,
    request_id_in_response: bool,
    client_cert: ForwardClientCertDetails,
    client_cert_details: proto::http_connection_manager::SetCurrentClientCertDetails,
    upgrades: Vec<(String, bool)>,
    normalize_path: bool,
    merge_slashes: bool,
    escaped_slashes: PathWithEscapedSlashesAction,
    strip_port: StripPort,
    strip_trailing_dot: bool,
    h1: Http1,
    h2: Arc<Http2>,
    local_replies: Option<local_reply::LocalReplies>,
    proxy_100_continue: bool,
    accept_http_10: bool,
    default_host_for_http_10: String,
    underscores: HeadersWithUnderscoresAction,
    add_user_agent: Option<Bytes>,
    append_forwarded_port: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StripPort {
    Keep,
    Matching,
    Any,
}

#[derive(Debug)]
enum Routes {
    Inline(Arc<RouteTable>),
    Slot(Arc<RouteSlot>),
}

#[derive(Debug)]
struct Limits {
    stream_idle: Option<Duration>,
    request: Option<Duration>,
    head: Option<Duration>,
    connection_idle: Option<Duration>,
    connection_duration: Option<Duration>,
    drain: Duration,
    delayed_close: Option<Duration>,
    stream_duration: Option<Duration>,
    requests_per_connection: u64,
    /// Interval of PINGs, and how long their answer may take.
    keepalive: Option<(Duration, Duration)>,
}

impl ConnectionManager {
    /// Counts a connection whose handshake failed: to Envoy it was one of HTTP before it was one of TLS.
    pub(crate) fn count_stillborn(&self) {
        self.stats.cx_total.inc();
        self.stats.cx_ssl_total.inc();
        self.stats.cx_destroy.inc();
        self.stats.count_end(true, false);
    }

    /// Compiles Envoy's `HttpConnectionManager`; `direction` is its listener's.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(
        config: &proto::HttpConnectionManager,
        direction: TrafficDirection,
        shared: &Arc<Shared>,
    ) -> Result<ConnectionManager, ConfigError> {
        refuse_unsupported(config)?;
        let scope = shared.stats.scope(&format!("http.{}.", config.stat_prefix));
        let http1 = config.http_protocol_options.clone().unwrap_or_default();
        let common = config.common_http_protocol_options.unwrap_or_default();
        let mut upgrades = Vec::new();
        for upgrade in &config.upgrade_configs {
            if !upgrade.filters.is_empty() {
                return Err(invalid(
                    "upgrade_configs",
                    "filters of their own are not supported",
                ));
            }
            upgrades.push((
                upgrade.upgrade_type.to_ascii_lowercase(),
                upgrade.enabled.as_ref().is_none_or(|enabled| enabled.value),
            ));
        }
        let truth = |value: Option<&BoolValue>, default| value.map_or(default, |value| value.value);
        Ok(ConnectionManager {
            shared: shared.clone(),
            filters: HttpFilters::compile(&config.http_filters, &scope, shared)?,
            access_log: AccessLog::compile_all(&config.access_log)?,
            tracer: match config.tracing.as_ref() {
                None => None,
                Some(tracing) => Tracer::compile(tracing, direction, shared)
                    .map_err(|error| error.within("tracing"))?,
            },
            stats: Stats::new(&scope),
            stats_h1: Http1Stats::new(&shared.stats.scope("http1.")),
            stats_h2: Http2Stats::new(shared.stats.scope("http2.")),
            routes: routes(config, &scope, shared)?,
            codec: config.codec_type(),
            limits: limits(config)?,
            server_name: match config.server_name.as_str() {
                "" => Bytes::from_static(b"envoy"),
                name => name.to_owned().into(),
            },
            server_header: config.server_header_transformation(),
            via: config.via.clone().into(),
            use_remote_address: truth(config.use_remote_address.as_ref(), false),
            trusted_hops: config.xff_num_trusted_hops as usize,
            skip_xff_append: config.skip_xff_append,
            internal: match config.internal_address_config.as_ref() {
                None => Vec::new(),
                Some(internal) => internal
                    .cidr_ranges
                    .iter()
                    .map(Cidr::compile)
                    .collect::<Result<_, _>>()?,
            },
            generate_request_id: truth(config.generate_request_id.as_ref(), true),
            preserve_request_id: config.preserve_external_request_id,
            request_id_in_response: config.always_set_request_id_in_response,
            client_cert: config.forward_client_cert_details(),
            client_cert_details: config.set_current_client_cert_details.unwrap_or_default(),
            upgrades,
            normalize_path: truth(config.normalize_path.as_ref(), false),
            merge_slashes: config.merge_slashes,
            escaped_slashes: config.path_with_escaped_slashes_action(),
            strip_port: match config.strip_port_mode {
                Some(StripPortMode::StripAnyHostPort(true)) => StripPort::Any,
                _ if config.strip_matching_host_port => StripPort::Matching,
                _ => StripPort::Keep,
            },
            strip_trailing_dot: config.strip_trailing_host_dot,
            h1: Http1 {
                head_bytes: headers_bytes(config) as usize,
                headers: headers_count(&common) as usize,
                allow_chunked_length: http1.allow_chunked_length,
                allow_absolute_url: truth(http1.allow_absolute_url.as_ref(), true),
                enable_trailers: http1.enable_trailers,
                ..Http1::default()
            },
            h2: Arc::new(http2_options(config, &common)),
            local_replies: config
                .local_reply_config
                .as_ref()
                .map(local_reply::LocalReplies::compile)
                .transpose()
                .map_err(|error| error.within("local_reply_config"))?,
            proxy_100_continue: config.proxy_100_continue,
            accept_http_10: http1.accept_http_10,
            default_host_for_http_10: http1.default_host_for_http_10,
            underscores: common.headers_with_underscores_action(),
            add_user_agent: truth(config.add_user_agent.as_ref(), false)
                .then(|| shared.node.cluster.clone().into()),
            append_forwarded_port: config.append_x_forwarded_port,
        })
    }

    /// The route table slot this waits for, if its table has not come yet.
    pub fn waiting_for(&self) -> Option<Arc<RouteSlot>> {
        match &self.routes {
            Routes::Inline(_) => None,
            Routes::Slot(slot) => slot.load().is_none().then(|| slot.clone()),
        }
    }

    fn table(&self) -> Option<Arc<RouteTable>> {
        match &self.routes {
            Routes::Inline(table) => Some(table.clone()),
            Routes::Slot(slot) => slot.load(),
        }
    }

    /// Whether HTTP/2 may be spoken on a connection whose ALPN (if any) does not decide.
    fn codec(&self) -> CodecType {
        self.codec
    }
}

fn refuse_unsupported(config: &proto::HttpConnectionManager) -> Result<(), ConfigError> {
    let unsupported = [
        (
            "original_ip_detection_extensions",
            !config.original_ip_detection_extensions.is_empty(),
        ),
        (
            "early_header_mutation_extensions",
            !config.early_header_mutation_extensions.is_empty(),
        ),
        (
            "forward_client_cert_matcher",
            config.forward_client_cert_matcher.is_some(),
        ),
        (
            "path_normalization_options",
            config.path_normalization_options.is_some(),
        ),
        ("proxy_status_config", config.proxy_status_config.is_some()),
        (
            "scheme_header_transformation",
            config.scheme_header_transformation.is_some(),
        ),
        (
            "forward_proto_config",
            config.forward_proto_config.is_some(),
        ),
        (
            "typed_header_validation_config",
            config.typed_header_validation_config.is_some(),
        ),
    ];
    if let Some((field, _)) = unsupported.iter().find(|(_, present)| *present) {
        return Err(invalid(*field, "not supported"));
    }
    if config.codec_type() == CodecType::Http3 {
        return Err(invalid("codec_type", "HTTP/3 is not supported"));
    }
    Ok(())
}

fn routes(
    config: &proto::HttpConnectionManager,
    scope: &Scope,
    shared: &Arc<Shared>,
) -> Result<Routes, ConfigError> {
    match config.route_specifier.as_ref() {
        Some(RouteSpecifier::RouteConfig(table)) => inline(table, shared),
        Some(RouteSpecifier::Rds(rds)) if !rds.route_config_name.is_empty() => {
            let slot = shared.routes.slot(&rds.route_config_name);
            slot.come_from(source_file(rds.config_source.as_ref()));
            slot.count_in(scope.scope(&format!("rds.{}.", rds.route_config_name)));
            Ok(Routes::Slot(slot))
        }
        Some(RouteSpecifier::Rds(_)) => Err(invalid("rds", "no route_config_name")),
        Some(RouteSpecifier::ScopedRoutes(_)) => Err(invalid("scoped_routes", "not supported")),
        None => Err(invalid("route_specifier", "absent")),
    }
}

fn inline(table: &RouteConfiguration, shared: &Arc<Shared>) -> Result<Routes, ConfigError> {
    let compiled = RouteTable::compile(table, shared)?;
    // Envoy: checked unless told not to, when the table stands in the listener itself.
    if table.validate_clusters.is_none() {
        compiled.require_clusters(shared)?;
    }
    Ok(Routes::Inline(Arc::new(compiled)))
}

fn headers_bytes(config: &proto::HttpConnectionManager) -> u32 {
    config
        .max_request_headers_kb
        .as_ref()
        .map_or(HEADERS_KIB, |kib| kib.value)
        .clamp(1, 8192)
        * 1024
}

fn headers_count(common: &HttpProtocolOptions) -> u32 {
    common
        .max_headers_count
        .as_ref()
        .map_or(HEADERS_COUNT, |count| count.value)
}

fn http2_options(config: &proto::HttpConnectionManager, common: &HttpProtocolOptions) -> Http2 {
    let http2 = config.http2_protocol_options.clone().unwrap_or_default();
    let number = |value: Option<&UInt32Value>, default| value.map_or(default, |value| value.value);
    let default = Http2::default();
    Http2 {
        hpack_table_size: number(http2.hpack_table_size.as_ref(), default.hpack_table_size),
        max_concurrent_streams: number(
            http2.max_concurrent_streams.as_ref(),
            default.max_concurrent_streams,
        ),
        initial_stream_window_size: number(
            http2.initial_stream_window_size.as_ref(),
            default.initial_stream_window_size,
        ),
        initial_connection_window_size: number(
            http2.initial_connection_window_size.as_ref(),
            default.initial_connection_window_size,
        ),
        allow_connect: http2.allow_connect,
        max_outbound_frames: number(
            http2.max_outbound_frames.as_ref(),
            default.max_outbound_frames,
        ),
        max_outbound_control_frames: number(
            http2.max_outbound_control_frames.as_ref(),
            default.max_outbound_control_frames,
        ),
        max_consecutive_inbound_frames_with_empty_payload: number(
            http2
                .max_consecutive_inbound_frames_with_empty_payload
                .as_ref(),
            default.max_consecutive_inbound_frames_with_empty_payload,
        ),
        max_inbound_priority_frames_per_stream: number(
            http2.max_inbound_priority_frames_per_stream.as_ref(),
            default.max_inbound_priority_frames_per_stream,
        ),
        max_inbound_window_update_frames_per_data_frame_sent: number(
            http2
                .max_inbound_window_update_frames_per_data_frame_sent
                .as_ref(),
            default.max_inbound_window_update_frames_per_data_frame_sent,
        ),
        stream_error_on_invalid_http_messaging: http2
            .override_stream_error_on_invalid_http_message
            .as_ref()
            .is_some_and(|on| on.value),
        max_header_bytes: headers_bytes(config),
        max_headers: headers_count(common),
        ..default
    }
}

fn limits(config: &proto::HttpConnectionManager) -> Result<Limits, ConfigError> {
    let common = config.common_http_protocol_options.unwrap_or_default();
    let http2 = config.http2_protocol_options.clone().unwrap_or_default();
    let keepalive =
        match http2.connection_keepalive.as_ref() {
            None => None,
            Some(keepalive) => timeout("interval", keepalive.interval.as_ref(), None)?
                .zip(timeout("timeout", keepalive.timeout.as_ref(), None)?),
        };
    Ok(Limits {
        stream_idle: timeout(
            "stream_idle_timeout",
            config.stream_idle_timeout.as_ref(),
            Some(STREAM_IDLE),
        )?,
        request: timeout("request_timeout", config.request_timeout.as_ref(), None)?,
        head: timeout(
            "request_headers_timeout",
            config.request_headers_timeout.as_ref(),
            Some(HEAD_TIMEOUT),
        )?,
        connection_idle: timeout(
            "idle_timeout",
            common.idle_timeout.as_ref(),
            Some(CONNECTION_IDLE),
        )?,
        connection_duration: timeout(
            "max_connection_duration",
            common.max_connection_duration.as_ref(),
            None,
        )?,
        drain: timeout("drain_timeout", config.drain_timeout.as_ref(), Some(DRAIN))?
            .unwrap_or_default(),
        delayed_close: timeout(
            "delayed_close_timeout",
            config.delayed_close_timeout.as_ref(),
            Some(DELAYED_CLOSE),
        )?,
        stream_duration: timeout(
            "max_stream_duration",
            common.max_stream_duration.as_ref(),
            None,
        )?,
        requests_per_connection: common
            .max_requests_per_connection
            .as_ref()
            .map_or(0, |max| u64::from(max.value)),
        keepalive,
    })
}

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    network: u128,
    bits: u8,
    v4: bool,
}

impl Cidr {
    /// Reads Envoy's `CidrRange`; an absent length means 0.
    ///
    /// # Errors
    /// When the address or length is not valid.
    pub fn compile(range: &CidrRange) -> Result<Cidr, ConfigError> {
        let broken = || {
            invalid(
                "address_prefix",
                format!("{:?} is not an address range", range.address_prefix),
            )
        };
        let address: IpAddr = range.address_prefix.parse().map_err(|_| broken())?;
        let (network, width) = as_bits(address);
        let bits = range.prefix_len.as_ref().map_or(0, |length| length.value);
        let bits = u8::try_from(bits)
            .ok()
            .filter(|bits| *bits <= width)
            .ok_or_else(broken)?;
        Ok(Cidr {
            network: network & mask(bits, width),
            bits,
            v4: width == 32,
        })
    }

    /// Whether the address lies in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (address, width) = as_bits(address);
        (width == 32) == self.v4 && address & mask(self.bits, width) == self.network
    }

    /// Length of the prefix; longer is more specific.
    pub fn bits(&self) -> u8 {
        self.bits
    }
}

fn as_bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)), 32),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => (u128::from(u32::from(v4)), 32),
            None => (u128::from(v6), 128),
        },
    }
}

fn mask(bits: u8, width: u8) -> u128 {
    let ones = if width == 128 {
        u128::MAX
    } else {
        (1 << width) - 1
    };
    match width - bits {
        128 => 0,
        rest => ones >> rest << rest & ones,
    }
}

#[cfg(test)]
mod cidr_tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = |prefix: &str, length: u32| {
            Cidr::compile(&CidrRange {
                address_prefix: prefix.to_owned(),
                prefix_len: Some(lateen_protocols::envoy::google::protobuf::UInt32Value {
                    value: length,
                }),
            })
        };
        for (prefix, length, address, want) in [
            ("10.0.0.0", 8, "10.1.2.3", true),
            ("10.0.0.0", 8, "11.1.2.3", false),
            ("0.0.0.0", 0, "11.1.2.3", true),
            ("127.0.0.1", 32, "127.0.0.1", true),
            ("127.0.0.1", 32, "127.0.0.2", false),
            ("fd00::", 8, "fd12::1", true),
            ("::", 0, "1.2.3.4", false),
            ("10.0.0.0", 8, "::ffff:10.0.0.1", true),
        ] {
            let range = range(prefix, length).unwrap();
            assert_eq!(
                range.contains(address.parse().unwrap()),
                want,
                "{prefix}/{length} {address}"
            );
        }
        assert!(range("10.0.0.0", 33).is_err() && range("x", 1).is_err());
    }
}
