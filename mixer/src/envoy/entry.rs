//! An entry of the access log as the attributes of a report.

use chrono::{DateTime, TimeDelta, Utc};
use lateen_engine::{AttributeTable, Bag, StringMap, Value};
use lateen_protocols::envoy::{
    envoy::{
        config::core::v3::RequestMethod,
        data::accesslog::v3::{
            AccessLogCommon, AccessLogType, HttpAccessLogEntry, HttpRequestProperties,
            HttpResponseProperties, ResponseFlags, TcpAccessLogEntry,
            tls_properties::{
                CertificateProperties, certificate_properties::subject_alt_name::San,
            },
        },
    },
    google::protobuf::{Duration, value::Kind},
};

use super::{
    FORWARDED, METADATA,
    claims::{self, Claims, REPORTER_KIND, REPORTER_UID, put},
    facts::{Ends, Head, instant, socket, told},
};
use crate::workloads::WorkloadView;

pub(super) const OPEN: &str = "open";
pub(super) const CONTINUE: &str = "continue";
pub(super) const CLOSE: &str = "close";

/// Namespace of the dynamic metadata that Envoy's filter for external authorization keeps our answer in.
const AUTHORIZATION: &str = "envoy.filters.http.ext_authz";

/// What the sender of a stream says of itself: its node's id, `sidecar~IP~NAME.NAMESPACE~DOMAIN`.
#[derive(Debug, Default)]
pub(super) struct Origin {
    uid: String,
}

impl Origin {
    pub(super) fn of_node(id: &str) -> Self {
        let mut parts = id.split('~').skip(2);
        let uid = match (parts.next(), parts.next(), parts.next()) {
            (Some(name), Some(_), None) if name.contains('.') => format!("kubernetes://{name}"),
            _ => String::new(),
        };
        Self { uid }
    }
}

/// An entry of either kind.
pub(super) trait Entry: Send + 'static {
    fn common(&self) -> Option<&AccessLogCommon>;
}

/// Makes a bag of an entry.
pub(super) type Read<T> = fn(&AttributeTable, &T, &Claims<'_>, &WorkloadView) -> Bag;

impl Entry for HttpAccessLogEntry {
    fn common(&self) -> Option<&AccessLogCommon> {
        self.common_properties.as_ref()
    }
}

/// What is to be reported of a connection.
#[derive(Debug)]
pub(super) struct Progress {
    entry: TcpAccessLogEntry,
    pub(super) event: &'static str,
    /// Bytes received and sent since the last report.
    pub(super) since: (u64, u64),
}

impl Progress {
    pub(super) fn new(entry: TcpAccessLogEntry, event: &'static str, since: (u64, u64)) -> Self {
        Self {
            entry,
            event,
            since,
        }
    }
}

impl Entry for Progress {
    fn common(&self) -> Option<&AccessLogCommon> {
        self.entry.common_properties.as_ref()
    }
}

/// Whether an entry is that of the end of a request.
pub(super) fn is_last(entry: &HttpAccessLogEntry) -> bool {
    entry.common().is_none_or(|common| {
        matches!(
            common.access_log_type(),
            AccessLogType::NotSet | AccessLogType::DownstreamEnd
        )
    })
}

/// What happened to a connection.
pub(super) fn event(entry: &TcpAccessLogEntry) -> &'static str {
    let kind = entry
        .common_properties
        .as_ref()
        .map(AccessLogCommon::access_log_type);
    match kind {
        Some(AccessLogType::TcpUpstreamConnected) => OPEN,
        Some(AccessLogType::TcpPeriodic) => CONTINUE,
        _ => CLOSE,
    }
}

/// Whether an entry can tell who the client is. A server's Envoy connects to the application while the client's
/// handshake is going on, so that the first entry does not.
pub(super) fn knows_client(entry: &TcpAccessLogEntry) -> bool {
    entry.common_properties.as_ref().is_some_and(|common| {
        let kind = common.custom_tags.get(REPORTER_KIND).map(String::as_str);
        kind == Some("outbound") || client(common).is_some()
    })
}

/// The connection's id.
pub(super) fn connection(entry: &TcpAccessLogEntry) -> &str {
    entry
        .common_properties
        .as_ref()
        .map_or("", |common| &common.stream_id)
}

/// Bytes received and sent so far.
pub(super) fn bytes(entry: &TcpAccessLogEntry) -> (u64, u64) {
    entry
        .connection_properties
        .as_ref()
        .map_or((0, 0), |all| (all.received_bytes, all.sent_bytes))
}

/// What configuration says: custom tags named like attributes, else what the node's id and the cluster's name tell.
pub(super) fn claims<'a>(common: Option<&'a AccessLogCommon>, origin: &'a Origin) -> Claims<'a> {
    let mut said = Claims::default();
    let Some(common) = common else {
        return said;
    };
    for (name, value) in &common.custom_tags {
        said.add(name, value);
    }
    let cluster = common.upstream_cluster.as_str();
    let outbound = cluster.strip_prefix("outbound|");
    let kind = if outbound.is_some() {
        "outbound"
    } else {
        "inbound"
    };
    said.add_default(REPORTER_KIND, kind);
    if !origin.uid.is_empty() {
        said.add_default(REPORTER_UID, &origin.uid);
    }
    if let Some(uid) = said.get(REPORTER_UID) {
        let own = if said.is_outbound() {
            "source.uid"
        } else {
            "destination.uid"
        };
        said.add_default(own, uid);
    }
    // outbound|PORT|SUBSET|HOST
    if let Some(host) = outbound.and_then(|rest| rest.split('|').nth(2))
        && said.get("destination.service.host").is_none()
    {
        said.add("destination.service.host", host);
        let mut parts = host.split('.');
        if let (Some(name), Some(namespace), Some("svc")) =
            (parts.next(), parts.next(), parts.next())
        {
            said.add_default("destination.service.name", name);
            said.add_default("destination.service.namespace", namespace);
        } else {
            said.add_default("destination.service.name", host);
        }
    }
    said
}

/// A report of a request.
pub(super) fn http(
    table: &AttributeTable,
    entry: &HttpAccessLogEntry,
    said: &Claims<'_>,
    workloads: &WorkloadView,
) -> Bag {
    let mut bag = claims::bag(table, said);
    let nothing = AccessLogCommon::default();
    let common = entry.common_properties.as_ref().unwrap_or(&nothing);
    of_common(&mut bag, common, said, workloads);
    let start = instant(common.start_time.as_ref());
    if let Some(start) = start {
        put(&mut bag, "request.time", start);
    }
    if let Some(request) = &entry.request {
        of_request(&mut bag, request);
    }
    if let Some(response) = &entry.response {
        of_response(&mut bag, response);
    }
    let took = common.duration.as_ref();
    let took = took.or(common.time_to_last_downstream_tx_byte.as_ref());
    if let Some(took) = took.and_then(span) {
        put(&mut bag, "response.duration", took);
        if let Some(end) = start.and_then(|start| end(start, took)) {
            put(&mut bag, "response.time", end);
        }
    }
    of_verdict(&mut bag, common);
    bag
}

/// A report of a connection.
pub(super) fn tcp(
    table: &AttributeTable,
    progress: &Progress,
    said: &Claims<'_>,
    workloads: &WorkloadView,
) -> Bag {
    let mut bag = claims::bag(table, said);
    let nothing = AccessLogCommon::default();
    let common = progress.common().unwrap_or(&nothing);
    of_common(&mut bag, common, said, workloads);
    put(&mut bag, "context.protocol", "tcp");
    let start = instant(common.start_time.as_ref());
    if let Some(start) = start {
        put(&mut bag, "context.time", start);
    }
    if let Some((_, port)) = socket(common.downstream_remote_address.as_ref()) {
        put(&mut bag, "source.port", i64::from(port));
    }
    let total = match progress.event {
        OPEN => progress.since,
        _ => bytes(&progress.entry),
    };
    put(&mut bag, "connection.id", common.stream_id.as_str());
    put(&mut bag, "connection.event", progress.event);
    for (name, count) in [
        ("connection.received.bytes", progress.since.0),
        ("connection.sent.bytes", progress.since.1),
        ("connection.received.bytes_total", total.0),
        ("connection.sent.bytes_total", total.1),
    ] {
        put(&mut bag, name, int(count));
    }
    if progress.event == CLOSE
        && let Some(took) = common.duration.as_ref().and_then(span)
    {
        put(&mut bag, "connection.duration", took);
    }
    bag
}

fn of_common(bag: &mut Bag, common: &AccessLogCommon, said: &Claims<'_>, workloads: &WorkloadView) {
    let tls = common.tls_properties.as_ref();
    let peer = client(common);
    let local = tls.and_then(|tls| tls.local_certificate_properties.as_ref());
    let ends = Ends {
        is_mutual: peer.is_some(),
        peer: peer.and_then(uri),
        local: local.and_then(uri),
        server_name: tls.map_or("", |tls| &tls.tls_sni_hostname),
        remote: socket(common.downstream_remote_address.as_ref()),
        forwarded: told(common.metadata.as_ref(), METADATA, FORWARDED)
            .filter(|_| !said.is_outbound()),
    };
    ends.fill(bag, workloads);
    if bag.get_by_name("destination.ip").is_none()
        && let Some((ip, port)) = socket(common.upstream_remote_address.as_ref())
    {
        put(bag, "destination.ip", ip);
        put(bag, "destination.port", i64::from(port));
    }
    let flags = common.response_flags.as_ref().map(short);
    put(
        bag,
        "context.proxy_error_code",
        flags.unwrap_or_else(|| "-".to_owned()),
    );
}

/// The client's certificate, if it has shown one.
fn client(common: &AccessLogCommon) -> Option<&CertificateProperties> {
    let tls = common.tls_properties.as_ref()?;
    let peer = tls.peer_certificate_properties.as_ref()?;
    (!peer.subject.is_empty() || !peer.subject_alt_name.is_empty()).then_some(peer)
}

fn uri(certificate: &CertificateProperties) -> Option<&str> {
    certificate
        .subject_alt_name
        .iter()
        .find_map(|name| match name.san.as_ref()? {
            San::Uri(uri) => Some(uri.as_str()),
            _ => None,
        })
}

fn of_request(bag: &mut Bag, request: &HttpRequestProperties) {
    let method = request.request_method();
    let mut headers = request.request_headers.clone();
    for (name, value) in [
        ("user-agent", &request.user_agent),
        ("referer", &request.referer),
        ("x-request-id", &request.request_id),
        ("x-forwarded-for", &request.forwarded_for),
    ] {
        if !value.is_empty() {
            headers
                .entry(name.to_owned())
                .or_insert_with(|| value.clone());
        }
    }
    let path = match request.original_path.as_str() {
        "" => &request.path,
        _ => &request.original_path,
    };
    let head = Head {
        method: match method {
            RequestMethod::MethodUnspecified => "",
            method => method.as_str_name(),
        },
        scheme: &request.scheme,
        authority: &request.authority,
        path,
        headers,
    };
    head.fill(bag);
    let (body, head) = (request.request_body_bytes, request.request_headers_bytes);
    put(bag, "request.size", int(body));
    put(bag, "request.total_size", int(body.saturating_add(head)));
}

fn of_response(bag: &mut Bag, response: &HttpResponseProperties) {
    // 0: the client has left before there was one; so says our own proxy too.
    let code = response.response_code.as_ref().map_or(0, |code| code.value);
    put(bag, "response.code", i64::from(code));
    let (body, head) = (
        response.response_body_bytes,
        response.response_headers_bytes,
    );
    put(bag, "response.size", int(body));
    put(bag, "response.total_size", int(body.saturating_add(head)));
    let headers: StringMap = response
        .response_headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    put(bag, "response.headers", headers);
    for (name, key) in [
        ("response.grpc_status", "grpc-status"),
        ("response.grpc_message", "grpc-message"),
    ] {
        let value = response.response_trailers.get(key);
        if let Some(value) = value.or_else(|| response.response_headers.get(key)) {
            put(bag, name, value.as_str());
        }
    }
}

/// What Mixer itself has answered about this request.
fn of_verdict(bag: &mut Bag, common: &AccessLogCommon) {
    let Some(answer) = common
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(AUTHORIZATION))
    else {
        return;
    };
    let kind = |key: &str| answer.fields.get(key).and_then(|value| value.kind.as_ref());
    #[allow(
        clippy::cast_possible_truncation,
        reason = "a code that is no small integer is no code"
    )]
    if let Some(Kind::NumberValue(code)) = kind("code") {
        put(bag, "check.error_code", *code as i64);
    }
    if let Some(Kind::StringValue(message)) = kind("message") {
        put(bag, "check.error_message", message.as_str());
    }
    put(bag, "check.cache_hit", false);
}

fn int(count: u64) -> Value {
    Value::Int64(i64::try_from(count).unwrap_or(i64::MAX))
}

fn span(of: &Duration) -> Option<TimeDelta> {
    TimeDelta::try_seconds(of.seconds)?.checked_add(&TimeDelta::nanoseconds(of.nanos.into()))
}

fn end(start: DateTime<Utc>, took: TimeDelta) -> Option<DateTime<Utc>> {
    start.checked_add_signed(took)
}

/// Response flags in Envoy's short form, `UF,URX`, or `-`.
fn short(flags: &ResponseFlags) -> String {
    let all = [
        (flags.failed_local_healthcheck, "LH"),
        (flags.no_healthy_upstream, "UH"),
        (flags.upstream_request_timeout, "UT"),
        (flags.local_reset, "LR"),
        (flags.upstream_remote_reset, "UR"),
        (flags.upstream_connection_failure, "UF"),
        (flags.upstream_connection_termination, "UC"),
        (flags.upstream_overflow, "UO"),
        (flags.no_route_found, "NR"),
        (flags.delay_injected, "DI"),
        (flags.fault_injected, "FI"),
        (flags.rate_limited, "RL"),
        (flags.unauthorized_details.is_some(), "UAEX"),
        (flags.rate_limit_service_error, "RLSE"),
        (flags.downstream_connection_termination, "DC"),
        (flags.upstream_retry_limit_exceeded, "URX"),
        (flags.stream_idle_timeout, "SI"),
        (flags.invalid_envoy_request_headers, "IH"),
        (flags.downstream_protocol_error, "DPE"),
        (flags.upstream_max_stream_duration_reached, "UMSDR"),
        (flags.response_from_cache_filter, "RFCF"),
        (flags.no_filter_config_found, "NFCF"),
        (flags.duration_timeout, "DT"),
        (flags.upstream_protocol_error, "UPE"),
        (flags.no_cluster_found, "NC"),
        (flags.overload_manager, "OM"),
        (flags.dns_resolution_failure, "DF"),
        (flags.downstream_remote_reset, "DR"),
    ];
    let set: Vec<_> = all
        .iter()
        .filter(|(is_set, _)| *is_set)
        .map(|(_, name)| *name)
        .collect();
    if set.is_empty() {
        "-".to_owned()
    } else {
        set.join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_short() {
        assert_eq!(short(&ResponseFlags::default()), "-");
        let flags = ResponseFlags {
            upstream_connection_failure: true,
            upstream_retry_limit_exceeded: true,
            ..ResponseFlags::default()
        };
        assert_eq!(short(&flags), "UF,URX");
    }

    #[test]
    fn what_is_not_said_is_read_from_names() {
        let origin = Origin::of_node("sidecar~10.0.0.1~a-1.shop~shop.svc.cluster.local");
        let common = AccessLogCommon {
            upstream_cluster: "outbound|9080|v1|reviews.default.svc.cluster.local".into(),
            ..AccessLogCommon::default()
        };
        let said = claims(Some(&common), &origin);
        for (name, want) in [
            (REPORTER_KIND, "outbound"),
            (REPORTER_UID, "kubernetes://a-1.shop"),
            ("source.uid", "kubernetes://a-1.shop"),
            (
                "destination.service.host",
                "reviews.default.svc.cluster.local",
            ),
            ("destination.service.name", "reviews"),
            ("destination.service.namespace", "default"),
        ] {
            assert_eq!(said.get(name), Some(want), "{name}");
        }
        let nobody = Origin::of_node("x");
        let common = AccessLogCommon::default();
        let said = claims(Some(&common), &nobody);
        assert_eq!(said.get(REPORTER_KIND), Some("inbound"));
        assert_eq!(said.get(REPORTER_UID), None);
    }
}
