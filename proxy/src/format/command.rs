//! Commands of a format string: `%NAME(parameters):limit%`, read and checked.

use chrono::format::Item;

use super::time::{Point, Precision, Zone, time_format};
use crate::{config_error::ConfigError, head::Name, proto::invalid, route::matcher::HeaderKey};

#[derive(Debug)]
pub(super) struct Command {
    pub(super) op: Op,
    pub(super) limit: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Section {
    Request,
    Response,
    Trailers,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Whole {
    Address,
    WithoutPort,
    Port,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    DownstreamRemote,
    DownstreamDirectRemote,
    DownstreamLocal,
    UpstreamLocal,
    UpstreamRemote,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Tls {
    Version,
    Cipher,
    PeerUriSan,
    PeerDnsSan,
    PeerSubject,
    PeerIssuer,
    PeerSerial,
    PeerFingerprint,
    PeerCert,
    PeerSha1,
    PeerIpSan,
    PeerEmailSan,
    PeerFrom,
    PeerUntil,
    LocalUriSan,
    LocalSubject,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Span {
    Total,
    Request,
    Response,
    ResponseTx,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum GrpcStyle {
    Camel,
    Snake,
    Number,
}

/// Which path of a request, before or after it was rewritten.
#[derive(Clone, Copy, Debug)]
pub(super) enum PathKind {
    Present,
    Original,
    OriginalOrPresent,
}

#[derive(Debug)]
pub(super) enum Op {
    Header(Section, HeaderKey, Option<HeaderKey>),
    StartTime(Option<Vec<Item<'static>>>, Zone),
    Now(Option<Vec<Item<'static>>>, Zone),
    Span(Span),
    Between(Point, Point, Precision),
    HeaderBytes(Section),
    BytesReceived,
    BytesSent,
    Protocol,
    ResponseCode,
    ResponseFlags,
    ResponseFlagsLong,
    ResponseCodeDetails,
    TransportFailure,
    UpstreamCluster,
    UpstreamName(Whole),
    UpstreamProtocol,
    UpstreamMetadata(Vec<String>),
    TerminationDetails,
    Address(End, Whole),
    AttemptCount,
    ServerName,
    FilterChain,
    RouteName,
    VirtualHost,
    Hostname(String),
    ConnectionId,
    GrpcStatus(GrpcStyle),
    Downstream(Tls),
    Upstream(Tls),
    RouteMetadata(Vec<String>),
    DynamicMetadata(Vec<String>),
    Environment(Option<String>),
    LocalReply,
    Path(PathKind, bool),
    Query,
    QueryParam(String),
    LogType,
    Constant(&'static str),
    UniqueId,
    Absent,
}

impl Command {
    /// Parses `NAME(params):limit%`, and gives what follows.
    pub(super) fn parse(text: &str) -> Result<(Command, &str), ConfigError> {
        let broken = |why: &str| invalid("format", format!("{why} at %{}", excerpt(text)));
        let name_end = text
            .find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
            .filter(|end| *end > 0)
            .ok_or_else(|| broken("no command"))?;
        let (name, mut rest) = text.split_at(name_end);
        let mut params = None;
        if let Some(after) = rest.strip_prefix('(') {
            let end = after
                .find(')')
                .ok_or_else(|| broken("no closing parenthesis"))?;
            params = Some(&after[..end]);
            rest = &after[end + 1..];
        }
        let mut limit = None;
        if let Some(after) = rest.strip_prefix(':') {
            let end = after
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(after.len());
            limit = Some(after[..end].parse().map_err(|_| broken("not a length"))?);
            rest = &after[end..];
        }
        let rest = rest
            .strip_prefix('%')
            .ok_or_else(|| broken("no closing %"))?;
        let op = Op::new(name, params)?;
        Ok((Command { op, limit }, rest))
    }
}

pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

impl Op {
    fn new(name: &str, params: Option<&str>) -> Result<Op, ConfigError> {
        use self::{End as E, Tls as T, Whole as W};
        let needs =
            || params.ok_or_else(|| invalid("format", format!("%{name}% needs parameters")));
        Ok(match name {
            "REQ" | "RESP" | "TRAILER" => {
                let section = match name {
                    "REQ" => Section::Request,
                    "RESP" => Section::Response,
                    _ => Section::Trailers,
                };
                let params = needs()?;
                let (main, other) = match params.split_once('?') {
                    Some((main, other)) => (main, Some(other)),
                    None => (params, None),
                };
                if main.is_empty() || other.is_some_and(|other| other.contains('?')) {
                    return Err(invalid(
                        "format",
                        format!("%{name}({params})% names no header"),
                    ));
                }
                Op::Header(section, HeaderKey::new(main), other.map(HeaderKey::new))
            }
            "START_TIME" => Op::StartTime(optional_time_format(params)?, Zone::Utc),
            "START_TIME_LOCAL" => Op::StartTime(optional_time_format(params)?, Zone::Local),
            "EMIT_TIME" => Op::Now(optional_time_format(params)?, Zone::Utc),
            "EMIT_TIME_LOCAL" => Op::Now(optional_time_format(params)?, Zone::Local),
            "COMMON_DURATION" => between(needs()?)?,
            "REQUEST_HEADERS_BYTES" => Op::HeaderBytes(Section::Request),
            "RESPONSE_HEADERS_BYTES" => Op::HeaderBytes(Section::Response),
            "RESPONSE_TRAILERS_BYTES" => Op::HeaderBytes(Section::Trailers),
            "DURATION" => Op::Span(Span::Total),
            "REQUEST_DURATION" => Op::Span(Span::Request),
            "RESPONSE_DURATION" => Op::Span(Span::Response),
            "RESPONSE_TX_DURATION" => Op::Span(Span::ResponseTx),
            "BYTES_RECEIVED" => Op::BytesReceived,
            "BYTES_SENT" => Op::BytesSent,
            "PROTOCOL" => Op::Protocol,
            "RESPONSE_CODE" => Op::ResponseCode,
            "RESPONSE_FLAGS" => Op::ResponseFlags,
            "RESPONSE_FLAGS_LONG" => Op::ResponseFlagsLong,
            "RESPONSE_CODE_DETAILS" => Op::ResponseCodeDetails,
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Op::TransportFailure,
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Op::UpstreamCluster,
            "UPSTREAM_HOST_NAME" => Op::UpstreamName(W::Address),
            "UPSTREAM_HOST_NAME_WITHOUT_PORT" => Op::UpstreamName(W::WithoutPort),
            "UPSTREAM_PROTOCOL" => Op::UpstreamProtocol,
            "CONNECTION_TERMINATION_DETAILS" => Op::TerminationDetails,
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => {
                Op::Address(E::UpstreamRemote, W::Address)
            }
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Op::Address(E::UpstreamRemote, W::WithoutPort)
            }
            "UPSTREAM_REMOTE_PORT" => Op::Address(E::UpstreamRemote, W::Port),
            "UPSTREAM_LOCAL_ADDRESS" => Op::Address(E::UpstreamLocal, W::Address),
            "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Op::Address(E::UpstreamLocal, W::WithoutPort),
            "UPSTREAM_LOCAL_PORT" => Op::Address(E::UpstreamLocal, W::Port),
            "DOWNSTREAM_LOCAL_ADDRESS" => Op::Address(E::DownstreamLocal, W::Address),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => {
                Op::Address(E::DownstreamLocal, W::WithoutPort)
            }
            "DOWNSTREAM_LOCAL_PORT" => Op::Address(E::DownstreamLocal, W::Port),
            "DOWNSTREAM_REMOTE_ADDRESS" => Op::Address(E::DownstreamRemote, W::Address),
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Op::Address(E::DownstreamRemote, W::WithoutPort)
            }
            "DOWNSTREAM_REMOTE_PORT" => Op::Address(E::DownstreamRemote, W::Port),
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
                Op::Address(E::DownstreamDirectRemote, W::Address)
            }
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Op::Address(E::DownstreamDirectRemote, W::WithoutPort)
            }
            "DOWNSTREAM_DIRECT_REMOTE_PORT" => Op::Address(E::DownstreamDirectRemote, W::Port),
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Op::AttemptCount,
            "REQUESTED_SERVER_NAME" => Op::ServerName,
            "FILTER_CHAIN_NAME" => Op::FilterChain,
            "ROUTE_NAME" => Op::RouteName,
            "VIRTUAL_HOST_NAME" => Op::VirtualHost,
            "HOSTNAME" => Op::Hostname(hostname()),
            "CONNECTION_ID" => Op::ConnectionId,
            "GRPC_STATUS" => Op::GrpcStatus(match params {
                None | Some("" | "CAMEL_STRING") => GrpcStyle::Camel,
                Some("SNAKE_STRING") => GrpcStyle::Snake,
                Some("NUMBER") => GrpcStyle::Number,
                Some(other) => {
                    return Err(invalid(
                        "format",
                        format!("%GRPC_STATUS({other})% is not known"),
                    ));
                }
            }),
            "GRPC_STATUS_NUMBER" => Op::GrpcStatus(GrpcStyle::Number),
            "DOWNSTREAM_TLS_VERSION" => Op::Downstream(T::Version),
            "DOWNSTREAM_TLS_CIPHER" => Op::Downstream(T::Cipher),
            "DOWNSTREAM_PEER_URI_SAN" => Op::Downstream(T::PeerUriSan),
            "DOWNSTREAM_PEER_DNS_SAN" => Op::Downstream(T::PeerDnsSan),
            "DOWNSTREAM_PEER_SUBJECT" => Op::Downstream(T::PeerSubject),
            "DOWNSTREAM_PEER_ISSUER" => Op::Downstream(T::PeerIssuer),
            "DOWNSTREAM_PEER_SERIAL" => Op::Downstream(T::PeerSerial),
            "DOWNSTREAM_PEER_FINGERPRINT_256" => Op::Downstream(T::PeerFingerprint),
            "DOWNSTREAM_PEER_CERT" => Op::Downstream(T::PeerCert),
            "DOWNSTREAM_PEER_FINGERPRINT_1" => Op::Downstream(T::PeerSha1),
            "DOWNSTREAM_PEER_IP_SAN" => Op::Downstream(T::PeerIpSan),
            "DOWNSTREAM_PEER_EMAIL_SAN" => Op::Downstream(T::PeerEmailSan),
            "DOWNSTREAM_PEER_CERT_V_START" => Op::Downstream(T::PeerFrom),
            "DOWNSTREAM_PEER_CERT_V_END" => Op::Downstream(T::PeerUntil),
            "DOWNSTREAM_LOCAL_URI_SAN" => Op::Downstream(T::LocalUriSan),
            "DOWNSTREAM_LOCAL_SUBJECT" => Op::Downstream(T::LocalSubject),
            "UPSTREAM_TLS_VERSION" => Op::Upstream(T::Version),
            "UPSTREAM_TLS_CIPHER" => Op::Upstream(T::Cipher),
            "UPSTREAM_PEER_URI_SAN" => Op::Upstream(T::PeerUriSan),
            "UPSTREAM_PEER_DNS_SAN" => Op::Upstream(T::PeerDnsSan),
            "UPSTREAM_PEER_SUBJECT" => Op::Upstream(T::PeerSubject),
            "UPSTREAM_PEER_ISSUER" => Op::Upstream(T::PeerIssuer),
            "UPSTREAM_PEER_CERT" => Op::Upstream(T::PeerCert),
            "UPSTREAM_LOCAL_URI_SAN" => Op::Upstream(T::LocalUriSan),
            "UPSTREAM_LOCAL_SUBJECT" => Op::Upstream(T::LocalSubject),
            "METADATA" => match needs()?.split_once(':') {
                Some(("ROUTE", path)) => {
                    Op::RouteMetadata(path.split(':').map(str::to_owned).collect())
                }
                Some(("DYNAMIC", path)) => {
                    Op::DynamicMetadata(path.split(':').map(str::to_owned).collect())
                }
                Some(("UPSTREAM_HOST", path)) => {
                    Op::UpstreamMetadata(path.split(':').map(str::to_owned).collect())
                }
                // What these carry is not kept.
                Some(("CLUSTER" | "LISTENER" | "VIRTUAL_HOST", _)) => Op::Absent,
                _ => return Err(invalid("format", "%METADATA% needs TYPE:NAMESPACE:KEY")),
            },
            "DYNAMIC_METADATA" => {
                Op::DynamicMetadata(needs()?.split(':').map(str::to_owned).collect())
            }
            "UPSTREAM_METADATA" => {
                Op::UpstreamMetadata(needs()?.split(':').map(str::to_owned).collect())
            }
            "CLUSTER_METADATA" | "FILTER_STATE" | "UPSTREAM_FILTER_STATE" => {
                needs()?;
                Op::Absent
            }
            "DOWNSTREAM_TRANSPORT_FAILURE_REASON"
            | "TRACE_ID"
            | "DOWNSTREAM_TLS_SESSION_ID"
            | "UPSTREAM_TLS_SESSION_ID"
            | "UPSTREAM_DETECTED_CLOSE_TYPE"
            | "DOWNSTREAM_DETECTED_CLOSE_TYPE" => Op::Absent,
            "ENVIRONMENT" => {
                Op::Environment(std::env::var_os(needs()?).map(|v| v.to_string_lossy().into()))
            }
            "LOCAL_REPLY_BODY" => Op::LocalReply,
            "PATH" => path(params.unwrap_or_default())?,
            "QUERY_PARAMS" => Op::Query,
            "STREAM_ID" => Op::Header(
                Section::Request,
                HeaderKey::Header(Name::new("x-request-id")),
                None,
            ),
            "QUERY_PARAM" => Op::QueryParam(needs()?.to_owned()),
            "ACCESS_LOG_TYPE" => Op::LogType,
            "UNIQUE_ID" => Op::UniqueId,
            // Set by extensions only, of which there is none.
            "CUSTOM_FLAGS" => Op::Constant(""),
            "TRAFFIC_DIRECTION" => Op::Constant("UNSPECIFIED"),
            _ => {
                return Err(invalid(
                    "format",
                    format!("the command %{name}% is not known"),
                ));
            }
        })
    }
}

fn optional_time_format(params: Option<&str>) -> Result<Option<Vec<Item<'static>>>, ConfigError> {
    match params {
        None | Some("") => Ok(None),
        Some(format) => time_format(format).map(Some),
    }
}

/// The parameters of `%COMMON_DURATION(START:END:PRECISION)%`.
fn between(params: &str) -> Result<Op, ConfigError> {
    let wrong = |why: String| invalid("format", format!("%COMMON_DURATION({params})%: {why}"));
    let mut parts = params.split(':');
    let (Some(from), Some(to), precision, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(wrong("START:END:PRECISION is wanted".to_owned()));
    };
    let point = |name: &str| {
        Point::named(name).ok_or_else(|| {
            wrong(format!(
                "the point {name} is not known; known are DS_RX_BEG, DS_RX_END, US_RX_BEG and DS_TX_END"
            ))
        })
    };
    let precision = match precision {
        None | Some("ms") => Precision::Milli,
        Some("us") => Precision::Micro,
        Some("ns") => Precision::Nano,
        Some(other) => return Err(wrong(format!("{other} is none of ms, us, ns"))),
    };
    Ok(Op::Between(point(from)?, point(to)?, precision))
}

/// The parameters of `%PATH(QUERY:KIND)%`: with the query (`WQ`, the default) or without (`NQ`); as it is (`PATH`), as
/// it was (`ORIG`), or as it was where it was rewritten (`ORIG_OR_PATH`, the default).
fn path(params: &str) -> Result<Op, ConfigError> {
    let (query, kind) = params.split_once(':').unwrap_or((params, ""));
    let with_query = match query {
        "" | "WQ" => Some(true),
        "NQ" => Some(false),
        _ => None,
    };
    let kind = match kind {
        "" | "ORIG_OR_PATH" => Some(PathKind::OriginalOrPresent),
        "PATH" => Some(PathKind::Present),
        "ORIG" => Some(PathKind::Original),
        _ => None,
    };
    match (with_query, kind) {
        (Some(query), Some(kind)) => Ok(Op::Path(kind, query)),
        _ => Err(invalid("format", format!("%PATH({params})% is not known"))),
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}
