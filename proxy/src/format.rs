//! Envoy's format strings (`%REQ(X-A?Y):10%`): parsed when configuration is loaded, written per request
//! into a buffer. Used by access logs, header operations and local replies.

use std::{
    borrow::Cow,
    io::Write,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use chrono::{
    DateTime, Utc,
    format::{Item, StrftimeItems},
};
use lateen_protocols::envoy::google::protobuf as pb;
use pb::value::Kind;

use crate::{
    config_error::ConfigError,
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    info::{StreamInfo, TlsInfo},
    proto::invalid,
    route::{Selected, matcher::HeaderKey},
};

/// What a format string may speak of: one stream, as far as it has come.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The stream.
    pub info: &'a StreamInfo,
    /// The request as it went upstream; `None` for TCP.
    pub request: Option<&'a RequestHead>,
    /// The response, once there is one.
    pub response: Option<&'a ResponseHead>,
    /// Response trailers.
    pub trailers: Option<&'a Headers>,
    /// The route.
    pub route: Option<&'a Selected>,
    /// Text of a local reply (`%LOCAL_REPLY_BODY%`).
    pub local_reply: &'a str,
}

impl<'a> Facts<'a> {
    /// Facts of a stream of which only the connection is known (TCP).
    pub fn of_connection(info: &'a StreamInfo) -> Facts<'a> {
        Facts {
            info,
            request: None,
            response: None,
            trailers: None,
            route: None,
            local_reply: "",
        }
    }
}

/// A parsed text format.
#[derive(Debug)]
pub struct Format {
    parts: Vec<Part>,
    omit_empty: bool,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Command(Command),
}

#[derive(Debug)]
struct Command {
    op: Op,
    limit: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Section {
    Request,
    Response,
    Trailers,
}

#[derive(Clone, Copy, Debug)]
enum Whole {
    Address,
    WithoutPort,
    Port,
}

#[derive(Clone, Copy, Debug)]
enum End {
    DownstreamRemote,
    DownstreamDirectRemote,
    DownstreamLocal,
    UpstreamLocal,
    UpstreamRemote,
}

#[derive(Clone, Copy, Debug)]
enum Tls {
    Version,
    Cipher,
    PeerUriSan,
    PeerDnsSan,
    PeerSubject,
    PeerFingerprint,
    PeerCert,
    LocalUriSan,
    LocalSubject,
}

#[derive(Clone, Copy, Debug)]
enum Span {
    Total,
    Request,
    Response,
    ResponseTx,
}

#[derive(Clone, Copy, Debug)]
enum GrpcStyle {
    Camel,
    Snake,
    Number,
}

#[derive(Debug)]
enum Op {
    Header(Section, HeaderKey, Option<HeaderKey>),
    StartTime(Option<Vec<Item<'static>>>),
    Span(Span),
    BytesReceived,
    BytesSent,
    Protocol,
    ResponseCode,
    ResponseFlags,
    ResponseFlagsLong,
    ResponseCodeDetails,
    TransportFailure,
    UpstreamCluster,
    Address(End, Whole),
    AttemptCount,
    ServerName,
    RouteName,
    VirtualHost,
    Hostname(String),
    ConnectionId,
    GrpcStatus(GrpcStyle),
    Downstream(Tls),
    Upstream(Tls),
    RouteMetadata(Vec<String>),
    Environment(Option<String>),
    LocalReply,
    PathOnly,
    QueryParam(String),
    LogType,
    Constant(&'static str),
    UniqueId,
    Absent,
}

/// A value before it becomes text.
#[derive(Debug)]
enum Value<'a> {
    Absent,
    Text(Cow<'a, [u8]>),
    Number(u64),
    /// JSON already: an object, a list, a flag.
    Json(String),
}

impl<'a> Value<'a> {
    fn of(text: Option<&'a str>) -> Value<'a> {
        match text {
            Some(text) if !text.is_empty() => Value::Text(Cow::Borrowed(text.as_bytes())),
            _ => Value::Absent,
        }
    }

    fn bytes(text: Option<Cow<'a, [u8]>>) -> Value<'a> {
        text.map_or(Value::Absent, Value::Text)
    }

    fn owned(text: String) -> Value<'a> {
        Value::Text(Cow::Owned(text.into_bytes()))
    }
}

impl Format {
    /// Parses a format. Absent values print as `-`, or as nothing with `omit_empty`.
    ///
    /// # Errors
    /// When a command is not known or not well formed.
    pub fn text(format: &str, omit_empty: bool) -> Result<Format, ConfigError> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some(start) = rest.find('%') {
            text.push_str(&rest[..start]);
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                text.push('%');
                rest = after;
                continue;
            }
            let (command, after) = Command::parse(rest)?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(Part::Command(command));
            rest = after;
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        Ok(Format { parts, omit_empty })
    }

    /// The text, if no command is in it.
    pub fn literal(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Writes the text for one stream.
    pub fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) {
        for part in &self.parts {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Command(command) => match command.value(facts) {
                    Value::Absent if self.omit_empty => {}
                    Value::Absent => out.push(b'-'),
                    Value::Text(text) => out.extend_from_slice(&text),
                    Value::Number(number) => write_number(out, number),
                    Value::Json(json) => out.extend_from_slice(json.as_bytes()),
                },
            }
        }
    }
}

fn write_number(out: &mut Vec<u8>, number: u64) {
    // Writing to a Vec cannot fail.
    let _infallible = write!(out, "{number}");
}

/// A JSON log line: an object whose leaves are literals or formats; keys sorted.
#[derive(Debug)]
pub struct JsonFormat {
    root: Node,
    omit_empty: bool,
}

#[derive(Debug)]
enum Node {
    Literal(String),
    Command(Command),
    Text(Format),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl JsonFormat {
    /// Compiles Envoy's `json_format`.
    ///
    /// # Errors
    /// When a command is not known or not well formed.
    pub fn compile(format: &pb::Struct, omit_empty: bool) -> Result<JsonFormat, ConfigError> {
        Ok(JsonFormat {
            root: object(format, omit_empty, 0)?,
            omit_empty,
        })
    }

    /// Writes the object, without a line end.
    pub fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) {
        if !self.root.write(facts, self.omit_empty, out) {
            out.extend_from_slice(b"{}");
        }
    }
}

fn object(format: &pb::Struct, omit_empty: bool, depth: usize) -> Result<Node, ConfigError> {
    const DEEPEST: usize = 16;
    if depth > DEEPEST {
        return Err(invalid("json_format", "nested too deep"));
    }
    let mut entries: Vec<_> = format.fields.iter().collect();
    entries.sort_by_key(|(key, _)| key.as_str());
    let mut nodes = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let mut quoted = Vec::new();
        write_json_string(&mut quoted, key.as_bytes());
        let quoted = String::from_utf8_lossy(&quoted).into_owned();
        nodes.push((
            quoted,
            node(value, omit_empty, depth).map_err(|error| error.within(key))?,
        ));
    }
    Ok(Node::Object(nodes))
}

fn node(value: &pb::Value, omit_empty: bool, depth: usize) -> Result<Node, ConfigError> {
    Ok(match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Node::Literal("null".to_owned()),
        Some(Kind::BoolValue(flag)) => Node::Literal(flag.to_string()),
        Some(Kind::NumberValue(number)) => Node::Literal(number.to_string()),
        Some(Kind::StructValue(nested)) => object(nested, omit_empty, depth + 1)?,
        Some(Kind::ListValue(list)) => Node::List(
            list.values
                .iter()
                .map(|value| node(value, omit_empty, depth + 1))
                .collect::<Result<_, _>>()?,
        ),
        Some(Kind::StringValue(text)) => {
            let mut format = Format::text(text, omit_empty)?;
            match (format.parts.len(), format.parts.pop()) {
                (1, Some(Part::Command(command))) => Node::Command(command),
                (_, last) => {
                    format.parts.extend(last);
                    Node::Text(format)
                }
            }
        }
    })
}

impl Node {
    /// Writes the value; `false` if it is to be left out.
    fn write(&self, facts: &Facts<'_>, omit_empty: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Node::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Node::Command(command) => match command.value(facts) {
                Value::Absent if omit_empty => return false,
                Value::Absent => out.extend_from_slice(b"null"),
                Value::Text(text) => write_json_string(out, &text),
                Value::Number(number) => write_number(out, number),
                Value::Json(json) => out.extend_from_slice(json.as_bytes()),
            },
            Node::Text(format) => {
                let mut text = Vec::new();
                format.write(facts, &mut text);
                write_json_string(out, &text);
            }
            Node::List(nodes) => {
                out.push(b'[');
                let mut first = true;
                for node in nodes {
                    let before = out.len();
                    if !first {
                        out.push(b',');
                    }
                    if node.write(facts, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(b']');
            }
            Node::Object(entries) => {
                out.push(b'{');
                let mut first = true;
                for (key, node) in entries {
                    let before = out.len();
                    if !first {
                        out.push(b',');
                    }
                    out.extend_from_slice(key.as_bytes());
                    out.push(b':');
                    if node.write(facts, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(b'}');
            }
        }
        true
    }
}

/// Writes a quoted JSON string; bytes that are not UTF-8 become U+FFFD.
fn write_json_string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    for character in String::from_utf8_lossy(text).chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            control if control < ' ' => {
                let _infallible = write!(out, "\\u{:04x}", u32::from(control));
            }
            other => out.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out.push(b'"');
}

impl Command {
    /// Parses `NAME(params):limit%`, and gives what follows.
    fn parse(text: &str) -> Result<(Command, &str), ConfigError> {
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

    fn value<'a>(&'a self, facts: &Facts<'a>) -> Value<'a> {
        let value = self.op.value(facts);
        match (self.limit, value) {
            (Some(limit), Value::Text(text)) if text.len() > limit => {
                Value::Text(Cow::Owned(text[..limit].to_vec()))
            }
            (_, value) => value,
        }
    }
}

fn excerpt(text: &str) -> String {
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
            "START_TIME" => Op::StartTime(match params {
                None | Some("") => None,
                Some(format) => Some(time_format(format)?),
            }),
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
            "DOWNSTREAM_PEER_FINGERPRINT_256" => Op::Downstream(T::PeerFingerprint),
            "DOWNSTREAM_PEER_CERT" => Op::Downstream(T::PeerCert),
            "DOWNSTREAM_LOCAL_URI_SAN" => Op::Downstream(T::LocalUriSan),
            "DOWNSTREAM_LOCAL_SUBJECT" => Op::Downstream(T::LocalSubject),
            "UPSTREAM_TLS_VERSION" => Op::Upstream(T::Version),
            "UPSTREAM_TLS_CIPHER" => Op::Upstream(T::Cipher),
            "UPSTREAM_PEER_URI_SAN" => Op::Upstream(T::PeerUriSan),
            "UPSTREAM_PEER_DNS_SAN" => Op::Upstream(T::PeerDnsSan),
            "UPSTREAM_PEER_SUBJECT" => Op::Upstream(T::PeerSubject),
            "UPSTREAM_LOCAL_URI_SAN" => Op::Upstream(T::LocalUriSan),
            "UPSTREAM_LOCAL_SUBJECT" => Op::Upstream(T::LocalSubject),
            "METADATA" => match needs()?.split_once(':') {
                Some(("ROUTE", path)) => {
                    Op::RouteMetadata(path.split(':').map(str::to_owned).collect())
                }
                // No other object of ours carries metadata that filters or configuration could set.
                Some((
                    "DYNAMIC" | "CLUSTER" | "UPSTREAM_HOST" | "LISTENER" | "VIRTUAL_HOST",
                    _,
                )) => Op::Absent,
                _ => return Err(invalid("format", "%METADATA% needs TYPE:NAMESPACE:KEY")),
            },
            "DYNAMIC_METADATA"
            | "CLUSTER_METADATA"
            | "UPSTREAM_METADATA"
            | "FILTER_STATE"
            | "UPSTREAM_FILTER_STATE" => {
                needs()?;
                Op::Absent
            }
            "CONNECTION_TERMINATION_DETAILS"
            | "DOWNSTREAM_TRANSPORT_FAILURE_REASON"
            | "TRACE_ID"
            | "DOWNSTREAM_TLS_SESSION_ID"
            | "UPSTREAM_TLS_SESSION_ID"
            | "CUSTOM_FLAGS"
            | "UPSTREAM_DETECTED_CLOSE_TYPE"
            | "DOWNSTREAM_DETECTED_CLOSE_TYPE" => Op::Absent,
            "ENVIRONMENT" => {
                Op::Environment(std::env::var_os(needs()?).map(|v| v.to_string_lossy().into()))
            }
            "LOCAL_REPLY_BODY" => Op::LocalReply,
            "PATH" => match params {
                Some("NQ" | "NQ:PATH" | "NQ:ORIG_OR_PATH") => Op::PathOnly,
                None | Some("" | "WQ" | "WQ:PATH" | "WQ:ORIG_OR_PATH") => {
                    Op::Header(Section::Request, HeaderKey::Path, None)
                }
                Some(other) => {
                    return Err(invalid("format", format!("%PATH({other})% is not known")));
                }
            },
            "QUERY_PARAM" => Op::QueryParam(needs()?.to_owned()),
            "ACCESS_LOG_TYPE" => Op::LogType,
            "UNIQUE_ID" => Op::UniqueId,
            "UPSTREAM_PROTOCOL" => Op::Absent,
            "TRAFFIC_DIRECTION" => Op::Constant("UNSPECIFIED"),
            _ => {
                return Err(invalid(
                    "format",
                    format!("the command %{name}% is not known"),
                ));
            }
        })
    }

    fn value<'a>(&'a self, facts: &Facts<'a>) -> Value<'a> {
        let info = facts.info;
        match self {
            Op::Header(section, main, other) => {
                let find = |key: &HeaderKey| header(facts, *section, key);
                Value::bytes(find(main).or_else(|| other.as_ref().and_then(find)))
            }
            Op::StartTime(None) => Value::owned(iso_time(info.start_time)),
            Op::StartTime(Some(items)) => {
                let time: DateTime<Utc> = info.start_time.into();
                Value::owned(time.format_with_items(items.iter()).to_string())
            }
            Op::Span(span) => span.of(info),
            Op::BytesReceived => Value::Number(info.bytes_received),
            Op::BytesSent => Value::Number(info.bytes_sent),
            Op::Protocol => Value::of(info.protocol.map(|protocol| protocol.as_str())),
            Op::ResponseCode => Value::Number(info.response_code.into()),
            Op::ResponseFlags => Value::owned(info.flags.short()),
            Op::ResponseFlagsLong if info.flags.is_empty() => Value::of(Some("-")),
            Op::ResponseFlagsLong => Value::owned(long_flags(&info.flags.short())),
            Op::ResponseCodeDetails => Value::of(Some(&info.response_code_details)),
            // Spaces would split the log line's fields.
            Op::TransportFailure => match info.upstream_transport_failure.as_deref() {
                Some(reason) if !reason.is_empty() => Value::owned(reason.replace(' ', "_")),
                _ => Value::Absent,
            },
            Op::UpstreamCluster => Value::of(info.upstream_cluster.as_deref()),
            Op::Address(end, whole) => address(
                match end {
                    End::DownstreamRemote => Some(info.downstream_remote),
                    End::DownstreamDirectRemote => Some(info.connection.remote),
                    End::DownstreamLocal => Some(info.connection.local),
                    End::UpstreamLocal => info.upstream_local,
                    End::UpstreamRemote => info.upstream_host,
                },
                *whole,
            ),
            Op::AttemptCount => Value::Number(info.upstream_attempts.into()),
            Op::ServerName => Value::of(info.connection.requested_server_name.as_deref()),
            Op::RouteName => Value::of(info.route_name.as_deref()),
            Op::VirtualHost => Value::of(info.virtual_host.as_deref()),
            Op::Hostname(name) => Value::of(Some(name)),
            Op::ConnectionId => Value::Number(info.connection.id),
            Op::GrpcStatus(style) => match (info.grpc_status, style) {
                (None, _) => Value::Absent,
                (Some(code), GrpcStyle::Number) => match u64::try_from(code) {
                    Ok(code) => Value::Number(code),
                    Err(_) => Value::Absent,
                },
                (Some(code), style) => grpc_name(code, *style),
            },
            Op::Downstream(field) => info
                .connection
                .tls
                .as_ref()
                .map_or(Value::Absent, |tls| field.of(tls)),
            Op::Upstream(field) => info
                .upstream_tls
                .as_deref()
                .map_or(Value::Absent, |tls| field.of(tls)),
            Op::RouteMetadata(path) => match facts.route {
                Some(route) => metadata(&route.route().metadata, path),
                None => Value::Absent,
            },
            Op::Environment(value) => Value::of(value.as_deref()),
            Op::LocalReply => Value::of(Some(facts.local_reply)),
            Op::PathOnly => Value::bytes(facts.request.map(|head| Cow::Borrowed(head.path_only()))),
            Op::QueryParam(name) => Value::bytes(
                facts
                    .request
                    .and_then(RequestHead::query)
                    .and_then(|query| {
                        crate::route::matcher::query_parameter(query, name.as_bytes())
                    })
                    .map(Cow::Borrowed),
            ),
            Op::LogType if facts.request.is_some() => Value::of(Some("DownstreamEnd")),
            Op::LogType => Value::of(Some("TcpConnectionEnd")),
            Op::Constant(text) => Value::of(Some(text)),
            Op::UniqueId => Value::owned(uuid::Uuid::new_v4().to_string()),
            Op::Absent => Value::Absent,
        }
    }
}

fn header<'a>(facts: &Facts<'a>, section: Section, key: &HeaderKey) -> Option<Cow<'a, [u8]>> {
    let value = match section {
        Section::Request => match (facts.request?, key) {
            (head, HeaderKey::Header(name)) => first(&head.headers, name),
            (head, key) => key.in_request(head),
        },
        Section::Response => match (facts.response?, key) {
            (head, HeaderKey::Status) => Some(Cow::Owned(head.status.to_string().into_bytes())),
            (head, HeaderKey::Header(name)) => first(&head.headers, name),
            _ => None,
        },
        Section::Trailers => match key {
            HeaderKey::Header(name) => first(facts.trailers?, name),
            _ => None,
        },
    };
    value.filter(|value| !value.is_empty())
}

fn first<'a>(headers: &'a Headers, name: &Name) -> Option<Cow<'a, [u8]>> {
    headers.get(name).map(|value| Cow::Borrowed(value.as_ref()))
}

impl Span {
    fn of<'a>(self, info: &StreamInfo) -> Value<'a> {
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let span = match self {
            Span::Total => info.response_end,
            Span::Request => info.request_end,
            Span::Response => info.upstream_first_byte,
            Span::ResponseTx => info
                .response_end
                .zip(info.upstream_first_byte)
                .map(|(end, first)| end.saturating_sub(first)),
        };
        span.map_or(Value::Absent, |span| Value::Number(millis(span)))
    }
}

impl Tls {
    fn of(self, tls: &TlsInfo) -> Value<'_> {
        match self {
            Tls::Version => Value::of(Some(tls.version)),
            Tls::Cipher => Value::of(Some(&tls.cipher)),
            Tls::PeerUriSan => Value::of(tls.peer_uri_san.as_deref()),
            Tls::PeerDnsSan if tls.peer_dns_sans.is_empty() => Value::Absent,
            Tls::PeerDnsSan => {
                let names: Vec<&str> = tls.peer_dns_sans.iter().map(Arc::as_ref).collect();
                Value::owned(names.join(","))
            }
            Tls::PeerSubject => Value::of(tls.peer_subject.as_deref()),
            Tls::PeerFingerprint => Value::of(tls.peer_fingerprint.as_deref()),
            Tls::PeerCert => match &tls.peer_certificate_der {
                Some(der) => Value::owned(url_encoded_pem(der)),
                None => Value::Absent,
            },
            Tls::LocalUriSan => Value::of(tls.local_uri_san.as_deref()),
            Tls::LocalSubject => Value::of(tls.local_subject.as_deref()),
        }
    }
}

/// A certificate as Envoy puts it into `x-forwarded-client-cert`: PEM, URL encoded.
pub fn url_encoded_pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::with_capacity(body.len() * 11 / 10 + 100);
    out.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    for (index, character) in body.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            out.push_str("%0A");
        }
        match character {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            plain => out.push(plain),
        }
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    out
}

fn address<'a>(address: Option<SocketAddr>, whole: Whole) -> Value<'a> {
    let Some(address) = address else {
        return Value::Absent;
    };
    match whole {
        Whole::Address => Value::owned(address.to_string()),
        Whole::WithoutPort => Value::owned(match address.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => ip.to_string(),
        }),
        Whole::Port => Value::Number(address.port().into()),
    }
}

fn metadata<'a>(
    all: &'a std::collections::HashMap<String, pb::Struct>,
    path: &[String],
) -> Value<'a> {
    let Some((namespace, keys)) = path.split_first() else {
        return Value::Absent;
    };
    let Some(mut fields) = all.get(namespace).map(|found| &found.fields) else {
        return Value::Absent;
    };
    if keys.is_empty() {
        return Value::Json(json_fields(fields));
    }
    for (index, key) in keys.iter().enumerate() {
        let Some(kind) = fields.get(key).and_then(|value| value.kind.as_ref()) else {
            return Value::Absent;
        };
        let last = index + 1 == keys.len();
        match kind {
            Kind::StructValue(nested) if !last => fields = &nested.fields,
            _ if !last => return Value::Absent,
            Kind::StringValue(text) => return Value::of(Some(text)),
            other => return Value::Json(json_kind(other)),
        }
    }
    Value::Absent
}

fn json_fields(fields: &std::collections::HashMap<String, pb::Value>) -> String {
    let mut keys: Vec<_> = fields.keys().collect();
    keys.sort_unstable();
    let entries: Vec<_> = keys
        .into_iter()
        .filter_map(|key| {
            let kind = fields.get(key)?.kind.as_ref()?;
            let mut quoted = Vec::new();
            write_json_string(&mut quoted, key.as_bytes());
            Some(format!(
                "{}:{}",
                String::from_utf8_lossy(&quoted),
                json_kind(kind)
            ))
        })
        .collect();
    format!("{{{}}}", entries.join(","))
}

fn json_kind(kind: &Kind) -> String {
    match kind {
        Kind::NullValue(_) => "null".to_owned(),
        Kind::BoolValue(flag) => flag.to_string(),
        Kind::NumberValue(number) => number.to_string(),
        Kind::StringValue(text) => {
            let mut quoted = Vec::new();
            write_json_string(&mut quoted, text.as_bytes());
            String::from_utf8_lossy(&quoted).into_owned()
        }
        Kind::StructValue(nested) => json_fields(&nested.fields),
        Kind::ListValue(list) => {
            let all: Vec<_> = list
                .values
                .iter()
                .filter_map(|value| value.kind.as_ref())
                .map(json_kind)
                .collect();
            format!("[{}]", all.join(","))
        }
    }
}

/// `2026-01-02T03:04:05.678Z`.
pub fn iso_time(time: SystemTime) -> String {
    let time: DateTime<Utc> = time.into();
    time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// Parses a `strftime` format; Envoy's `%3f`, `%6f`, `%9f` and `%f` are fractions of a second.
fn time_format(format: &str) -> Result<Vec<Item<'static>>, ConfigError> {
    let mut items = Vec::new();
    for item in StrftimeItems::new(format) {
        if matches!(item, Item::Error) {
            return Err(invalid(
                "format",
                format!("not a time format: {}", excerpt(format)),
            ));
        }
        items.push(item.to_owned());
    }
    // `%#z` and the like can be read but not written.
    let mut sample = String::new();
    let written = DateTime::<Utc>::UNIX_EPOCH.format_with_items(items.iter());
    if std::fmt::write(&mut sample, format_args!("{written}")).is_err() {
        return Err(invalid(
            "format",
            format!("a time cannot be written so: {}", excerpt(format)),
        ));
    }
    Ok(items)
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}

fn grpc_name<'a>(code: i32, style: GrpcStyle) -> Value<'a> {
    const NAMES: [(&str, &str); 17] = [
        ("OK", "OK"),
        ("Canceled", "CANCELLED"),
        ("Unknown", "UNKNOWN"),
        ("InvalidArgument", "INVALID_ARGUMENT"),
        ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
        ("NotFound", "NOT_FOUND"),
        ("AlreadyExists", "ALREADY_EXISTS"),
        ("PermissionDenied", "PERMISSION_DENIED"),
        ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
        ("FailedPrecondition", "FAILED_PRECONDITION"),
        ("Aborted", "ABORTED"),
        ("OutOfRange", "OUT_OF_RANGE"),
        ("Unimplemented", "UNIMPLEMENTED"),
        ("Internal", "INTERNAL"),
        ("Unavailable", "UNAVAILABLE"),
        ("DataLoss", "DATA_LOSS"),
        ("Unauthenticated", "UNAUTHENTICATED"),
    ];
    match (
        usize::try_from(code).ok().and_then(|code| NAMES.get(code)),
        style,
    ) {
        (Some((camel, _)), GrpcStyle::Camel) => Value::of(Some(camel)),
        (Some((_, snake)), GrpcStyle::Snake | GrpcStyle::Number) => Value::of(Some(snake)),
        (None, _) => Value::owned(code.to_string()),
    }
}

fn long_flags(short: &str) -> String {
    let long = |flag: &str| match flag {
        "LH" => "FailedLocalHealthCheck",
        "UH" => "NoHealthyUpstream",
        "UT" => "UpstreamRequestTimeout",
        "LR" => "LocalReset",
        "UR" => "UpstreamRemoteReset",
        "UF" => "UpstreamConnectionFailure",
        "UC" => "UpstreamConnectionTermination",
        "UO" => "UpstreamOverflow",
        "NR" => "NoRouteFound",
        "DI" => "DelayInjected",
        "FI" => "FaultInjected",
        "RL" => "RateLimited",
        "UAEX" => "UnauthorizedExternalService",
        "DC" => "DownstreamConnectionTermination",
        "URX" => "UpstreamRetryLimitExceeded",
        "SI" => "StreamIdleTimeout",
        "IH" => "InvalidEnvoyRequestHeaders",
        "DPE" => "DownstreamProtocolError",
        "UMSDR" => "UpstreamMaxStreamDurationReached",
        "NC" => "NoClusterFound",
        "DT" => "DurationTimeout",
        "UPE" => "UpstreamProtocolError",
        _ => "",
    };
    short.split(',').map(long).collect::<Vec<_>>().join(",")
}

/// The gRPC status that headers or trailers carry.
pub fn grpc_status(headers: &Headers) -> Option<i32> {
    std::str::from_utf8(headers.known(Known::GrpcStatus)?)
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
pub(crate) mod tests;
