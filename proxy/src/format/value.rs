//! What commands of a format stand for in one stream, written without a text in between.

use std::{
    borrow::Cow,
    fmt,
    io::Write,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use lateen_protocols::envoy::google::protobuf as pb;
use pb::value::Kind;
use rustls::pki_types::CertificateDer;

use super::{
    Facts,
    command::{Command, End, GrpcStyle, Op, PathKind, Section, Span, Tls, Whole},
    json::{escape_from, write_json_string},
    time::{Zone, iso_time, write_iso_time},
};
use crate::{
    head::{Headers, Known, Name, NameRef, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo, TlsInfo},
    route::matcher::HeaderKey,
    tls::peer::PeerCertificate,
};

/// A value before it becomes text.
#[derive(Debug)]
enum Value<'a> {
    Absent,
    Text(Cow<'a, [u8]>),
    Number(u64),
    Time(SystemTime),
    Flags(ResponseFlags),
    Address(SocketAddr),
    Ip(IpAddr),
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

impl Value<'_> {
    /// Whether it is a text in JSON.
    fn is_text(&self) -> bool {
        !matches!(self, Value::Absent | Value::Number(_) | Value::Json(_))
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Value::Absent => {}
            Value::Text(text) => out.extend_from_slice(text),
            Value::Number(number) => write_number(out, *number),
            Value::Time(time) => write_iso_time(*time, out),
            Value::Flags(flags) => flags.write_short(out),
            Value::Address(SocketAddr::V4(address)) => {
                write_ip(out, IpAddr::V4(*address.ip()));
                out.push(b':');
                write_number(out, address.port().into());
            }
            Value::Address(address) => write_displayed(out, address),
            Value::Ip(ip) => write_ip(out, *ip),
            Value::Json(json) => out.extend_from_slice(json.as_bytes()),
        }
    }
}

fn write_displayed(out: &mut Vec<u8>, value: &dyn fmt::Display) {
    // Writing to a Vec cannot fail.
    drop(write!(out, "{value}"));
}

fn write_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            for (index, octet) in ip.octets().into_iter().enumerate() {
                if index > 0 {
                    out.push(b'.');
                }
                write_number(out, octet.into());
            }
        }
        IpAddr::V6(ip) => write_displayed(out, &ip),
    }
}

fn write_number(out: &mut Vec<u8>, number: u64) {
    const LONGEST: usize = 20;
    let mut digits = [0; LONGEST];
    let mut first = LONGEST;
    let mut left = number;
    loop {
        first -= 1;
        digits[first] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[first..]);
}

impl Command {
    /// Writes the value; `false`, and nothing is written, when there is none.
    pub(super) fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) -> bool {
        let value = self.op.value(facts);
        if matches!(value, Value::Absent) {
            return false;
        }
        self.write_cut(&value, out);
        true
    }

    /// As [`Command::write`], as JSON.
    pub(super) fn write_json(&self, facts: &Facts<'_>, out: &mut Vec<u8>) -> bool {
        let value = self.op.value(facts);
        if matches!(value, Value::Absent) {
            return false;
        }
        if value.is_text() {
            out.push(b'"');
            let start = out.len();
            self.write_cut(&value, out);
            if matches!(value, Value::Text(_)) {
                escape_from(out, start);
            }
            out.push(b'"');
        } else {
            value.write(out);
        }
        true
    }

    fn write_cut(&self, value: &Value<'_>, out: &mut Vec<u8>) {
        let start = out.len();
        value.write(out);
        if let Some(limit) = self.limit
            && value.is_text()
        {
            out.truncate(start + limit.min(out.len() - start));
        }
    }
}

impl Op {
    fn value<'a>(&'a self, facts: &Facts<'a>) -> Value<'a> {
        let info = facts.info;
        match self {
            Op::Header(section, main, other) => {
                let find = |key: &HeaderKey| header(facts, *section, key);
                Value::bytes(find(main).or_else(|| other.as_ref().and_then(find)))
            }
            Op::StartTime(None, Zone::Utc) => Value::Time(info.start_time),
            Op::StartTime(items, zone) => {
                Value::owned(zone.show(info.start_time, items.as_deref()))
            }
            Op::Span(span) => span.of(info),
            Op::BytesReceived => Value::Number(info.bytes_received),
            Op::BytesSent => Value::Number(info.bytes_sent),
            Op::Protocol => Value::of(info.protocol.map(|protocol| protocol.as_str())),
            Op::ResponseCode => Value::Number(info.response_code.into()),
            Op::ResponseFlags => Value::Flags(info.flags),
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
                    End::DownstreamDirectRemote => Some(info.connection.direct_remote),
                    End::DownstreamLocal => Some(info.connection.local),
                    End::UpstreamLocal => info.upstream_local,
                    End::UpstreamRemote => info.upstream_host,
                },
                *whole,
            ),
            Op::UpstreamName(whole) => host_name(info, *whole),
            Op::UpstreamProtocol => Value::of(info.upstream_protocol.map(|p| p.as_str())),
            Op::TerminationDetails => match info.termination_details.as_deref() {
                Some(details) => Value::of(Some(details)),
                None => Value::Absent,
            },
            Op::HeaderBytes(section) => Value::Number(match section {
                Section::Request => facts.request.map_or(0, request_bytes),
                Section::Response => facts.response.map_or(0, response_bytes),
                Section::Trailers => facts.trailers.map_or(0, headers_bytes),
            }),
            Op::Query => Value::bytes(
                facts
                    .request
                    .and_then(RequestHead::query)
                    .filter(|query| !query.is_empty())
                    .map(Cow::Borrowed),
            ),
            Op::Now(items, zone) => Value::owned(zone.show(SystemTime::now(), items.as_deref())),
            Op::Between(from, to, precision) => match (from.of(info), to.of(info)) {
                (Some(from), Some(to)) => Value::Number(precision.of(to.saturating_sub(from))),
                _ => Value::Absent,
            },
            Op::AttemptCount => Value::Number(info.upstream_attempts.into()),
            Op::FilterChain => Value::of(info.connection.filter_chain.as_deref()),
            Op::ServerName => Value::of(info.connection.requested_server_name.as_deref()),
            Op::RouteName => Value::of(info.route_name.as_deref()),
            Op::VirtualHost => Value::of(info.virtual_host.as_deref()),
            Op::Hostname(name) => Value::of(Some(name)),
            Op::ConnectionId => Value::Number(info.connection.id),
            Op::GrpcStatus(style) => match (grpc_status_of(facts), style) {
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
            Op::DynamicMetadata(path) => match &info.metadata {
                Some(all) => metadata(all, path),
                None => Value::Absent,
            },
            Op::UpstreamMetadata(path) => match &info.upstream_metadata {
                Some(all) => metadata(all, path),
                None => Value::Absent,
            },
            Op::Environment(value) => Value::of(value.as_deref()),
            Op::LocalReply => Value::Text(Cow::Borrowed(facts.local_reply.as_bytes())),
            Op::Path(which, query) => Value::bytes(path(facts, *which, *query)),
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
            Op::Constant(text) => Value::Text(Cow::Borrowed(text.as_bytes())),
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

/// Bytes of names and values. Envoy: `HeaderMap::byteSize`.
pub fn headers_bytes(headers: &Headers) -> u64 {
    let each = |(name, value): (NameRef<'_>, &[u8])| name.as_bytes().len() + value.len();
    headers.iter().map(each).sum::<usize>() as u64
}

/// Bytes of names and values of a request's head, pseudo headers among them.
pub fn request_bytes(head: &RequestHead) -> u64 {
    let pseudo = [
        (":method", &head.method),
        (":scheme", &head.scheme),
        (":authority", &head.authority),
        (":path", &head.path),
    ];
    let pseudo = pseudo.iter().map(|(name, value)| name.len() + value.len());
    pseudo.sum::<usize>() as u64 + headers_bytes(&head.headers)
}

/// Bytes of names and values of a response's head, the status among them.
pub fn response_bytes(head: &ResponseHead) -> u64 {
    (":status".len() + 3) as u64 + headers_bytes(&head.headers)
}

/// What the response to a gRPC request says, or else what its status means to a gRPC client. Envoy:
/// `Grpc::Common::getGrpcStatus`.
pub fn grpc_status_of(facts: &Facts<'_>) -> Option<i32> {
    if !facts.request?.is_grpc() {
        return None;
    }
    facts.info.grpc_status.or_else(|| {
        let code = facts.info.response_code;
        (code > 0).then(|| crate::reject::grpc_status_of(code))
    })
}

fn first<'a>(headers: &'a Headers, name: &Name) -> Option<Cow<'a, [u8]>> {
    headers.get(name).map(Cow::Borrowed)
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
            Tls::PeerIssuer => peer(tls).map_or(Value::Absent, |peer| {
                Value::owned(peer.issuer.as_ref().to_owned())
            }),
            Tls::PeerSerial => peer(tls).map_or(Value::Absent, |peer| {
                Value::owned(peer.serial.as_ref().to_owned())
            }),
            Tls::PeerFingerprint => Value::of(tls.peer_fingerprint.as_deref()),
            Tls::PeerCert => match &tls.peer_certificate_der {
                Some(der) => Value::owned(url_encoded_pem(der)),
                None => Value::Absent,
            },
            Tls::PeerSha1 => match &tls.peer_certificate_der {
                Some(der) => Value::owned(sha1(der)),
                None => Value::Absent,
            },
            Tls::PeerIpSan => listed(peer(tls), |peer| {
                peer.ip_sans.iter().map(ToString::to_string).collect()
            }),
            Tls::PeerEmailSan => listed(peer(tls), |peer| {
                peer.email_sans.iter().map(ToString::to_string).collect()
            }),
            Tls::PeerFrom => peer(tls).map_or(Value::Absent, |peer| {
                Value::owned(iso_time(peer.not_before))
            }),
            Tls::PeerUntil => {
                peer(tls).map_or(Value::Absent, |peer| Value::owned(iso_time(peer.not_after)))
            }
            Tls::LocalUriSan => Value::of(tls.local_uri_san.as_deref()),
            Tls::LocalSubject => Value::of(tls.local_subject.as_deref()),
        }
    }
}

/// What the peer's verified certificate says beside what is kept of every connection.
fn peer(tls: &TlsInfo) -> Option<Arc<PeerCertificate>> {
    let der = CertificateDer::from(tls.peer_certificate_der.as_deref()?);
    PeerCertificate::of(&der).ok()
}

/// SHA-1 in hex: a name of a certificate that old logs have, no proof of anything.
fn sha1(bytes: &[u8]) -> String {
    use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
    let digest = digest(&SHA1_FOR_LEGACY_USE_ONLY, bytes);
    let hex = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    hex.collect()
}

/// Names joined by commas.
fn listed<'a>(
    peer: Option<Arc<PeerCertificate>>,
    names: impl FnOnce(&PeerCertificate) -> Vec<String>,
) -> Value<'a> {
    match peer.map(|peer| names(&peer)) {
        Some(names) if !names.is_empty() => Value::owned(names.join(",")),
        _ => Value::Absent,
    }
}

/// The name of the host that served, or else its address.
fn host_name(info: &StreamInfo, whole: Whole) -> Value<'_> {
    match &info.upstream_name {
        Some(name) => Value::of(Some(match whole {
            Whole::WithoutPort => name.rsplit_once(':').map_or(&**name, |(name, _)| name),
            Whole::Address | Whole::Port => name,
        })),
        None => address(info.upstream_host, whole),
    }
}

/// The path of the request as it is, or as it was before it was rewritten.
fn path<'a>(facts: &Facts<'a>, kind: PathKind, with_query: bool) -> Option<Cow<'a, [u8]>> {
    let head = facts.request?;
    let present = || &*head.path;
    let original = || head.headers.known(Known::XEnvoyOriginalPath);
    let path = match kind {
        PathKind::Present => present(),
        PathKind::Original => original()?,
        PathKind::OriginalOrPresent => original().unwrap_or_else(present),
    };
    let end = match with_query {
        true => path.len(),
        false => path
            .iter()
            .position(|b| matches!(b, b'?' | b'#'))
            .unwrap_or(path.len()),
    };
    Some(Cow::Borrowed(&path[..end])).filter(|path| !path.is_empty())
}

/// A certificate in PEM.
pub fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().map(|b| char::from(*b)));
        out.push('\n');
    }
    out + "-----END CERTIFICATE-----\n"
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
        Whole::Address => Value::Address(address),
        Whole::WithoutPort => Value::Ip(address.ip()),
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
        "DR" => "DownstreamRemoteReset",
        "RLSE" => "RateLimitServiceError",
        "DF" => "DnsResolutionFailed",
        _ => "",
    };
    short.split(',').map(long).collect::<Vec<_>>().join(",")
}
