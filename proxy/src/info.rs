//! What is known of one connection and of one stream, collected while it passes and read by filters,
//! access logs, metrics and the Mixer report. Envoy calls it `StreamInfo`.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use lateen_protocols::envoy::google::protobuf as pb;
use tokio::time::Instant;

use crate::{clock, cluster::Host, head::Protocol};

/// Facts of a downstream connection, fixed once it is accepted and its handshake is done.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// Unique in this process.
    pub id: u64,
    /// The peer (after PROXY protocol).
    pub remote: SocketAddr,
    /// The peer of the socket, whatever PROXY protocol says.
    pub direct_remote: SocketAddr,
    /// The address the peer meant (the original destination).
    pub local: SocketAddr,
    /// Whether `local` is what the kernel or a PROXY header tells, and not just where the connection was accepted.
    pub local_restored: bool,
    /// Present when the connection is TLS.
    pub tls: Option<Box<TlsInfo>>,
    /// Server name of the ClientHello, as a TLS inspector saw it; of no importance whether TLS ended here.
    pub requested_server_name: Option<Arc<str>>,
    /// Name of the filter chain that serves it; none when it has no name, or none was found.
    pub filter_chain: Option<Arc<str>>,
    /// What upstream connections made for it are bound to.
    pub original_src: Option<OriginalSrc>,
    /// Accept time.
    pub started: Instant,
}

/// The address of a downstream, to be the source of connections to upstreams. Envoy: filters `original_src`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OriginalSrc {
    /// Where the downstream is.
    pub ip: IpAddr,
    /// `SO_MARK`, by which answers are routed back to us; 0 is none.
    pub mark: u32,
}

/// Facts of a TLS session as one side sees them.
#[derive(Clone, Debug, Default)]
pub struct TlsInfo {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// IANA/OpenSSL name of the cipher suite.
    pub cipher: String,
    /// Server name that the client asked for, on our side of a downstream connection.
    pub server_name: Option<Arc<str>>,
    /// Negotiated ALPN protocol.
    pub alpn: Option<Bytes>,
    /// URI SAN of the peer's verified certificate (a SPIFFE ID in the mesh).
    pub peer_uri_san: Option<Arc<str>>,
    /// Subject of the peer's verified certificate, RFC 2253.
    pub peer_subject: Option<Arc<str>>,
    /// SHA-256 of the peer's certificate, hex.
    pub peer_fingerprint: Option<Arc<str>>,
    /// URI SANs of the peer's verified certificate after the first.
    pub peer_more_uri_sans: Vec<Arc<str>>,
    /// DNS SANs of the peer's certificate.
    pub peer_dns_sans: Vec<Arc<str>>,
    /// PEM of the peer's certificate, made when somebody needs it (XFCC `Cert`).
    pub peer_certificate_der: Option<Bytes>,
    /// What the peer sent after its certificate, DER, in its order.
    pub peer_chain_der: Vec<Bytes>,
    /// URI SAN of our own certificate.
    pub local_uri_san: Option<Arc<str>>,
    /// URI SANs of our own certificate after the first.
    pub local_more_uri_sans: Vec<Arc<str>>,
    /// Subject of our own certificate.
    pub local_subject: Option<Arc<str>>,
}

impl TlsInfo {
    /// Whether the peer presented a certificate that was verified.
    pub fn is_mutual(&self) -> bool {
        self.peer_certificate_der.is_some()
    }
}

/// Envoy's `%RESPONSE_CODE_DETAILS%`: mostly text that is known beforehand.
#[derive(Clone, PartialEq, Eq)]
pub enum Details {
    /// Known beforehand.
    Known(&'static str),
    /// Made for this stream; boxed, so that replies stay small.
    Made(Box<String>),
}

impl Default for Details {
    fn default() -> Details {
        Details::Known("")
    }
}

impl std::ops::Deref for Details {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Details::Known(text) => text,
            Details::Made(text) => text,
        }
    }
}

impl From<&'static str> for Details {
    fn from(text: &'static str) -> Details {
        Details::Known(text)
    }
}

impl From<String> for Details {
    fn from(text: String) -> Details {
        Details::Made(Box::new(text))
    }
}

impl PartialEq<str> for Details {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<&str> for Details {
    fn eq(&self, other: &&str) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

macro_rules! flags {
    ($($name:ident = $bit:literal, $short:literal, $doc:literal;)+) => {
        impl ResponseFlags {
            $(#[doc = $doc] pub const $name: ResponseFlags = ResponseFlags {
                bits: 1 << $bit,
                order: $bit + 1,
            };)+
            const ALL: &[(ResponseFlags, &'static str)] = &[$((ResponseFlags::$name, $short)),+];
        }
    };
}

/// Why a response is not what the upstream sent; printed by `%RESPONSE_FLAGS%`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResponseFlags {
    bits: u32,
    /// The flags' numbers, from 1, in the order in which they were set; five bits each.
    order: u64,
}

impl PartialEq for ResponseFlags {
    fn eq(&self, other: &ResponseFlags) -> bool {
        self.bits == other.bits
    }
}

impl Eq for ResponseFlags {}

flags! {
    FAILED_LOCAL_HEALTH_CHECK = 0, "LH", "Local health check failed.";
    NO_HEALTHY_UPSTREAM = 1, "UH", "No host of the cluster may be used.";
    UPSTREAM_REQUEST_TIMEOUT = 2, "UT", "The route's timeout ran out.";
    LOCAL_RESET = 3, "LR", "We reset the stream.";
    UPSTREAM_REMOTE_RESET = 4, "UR", "The upstream reset the stream.";
    UPSTREAM_CONNECTION_FAILURE = 5, "UF", "Connecting to the upstream failed.";
    UPSTREAM_CONNECTION_TERMINATION = 6, "UC", "The upstream closed the connection.";
    UPSTREAM_OVERFLOW = 7, "UO", "A circuit breaker refused the request.";
    NO_ROUTE_FOUND = 8, "NR", "No route or filter chain matched.";
    DELAY_INJECTED = 9, "DI", "The fault filter delayed the request.";
    FAULT_INJECTED = 10, "FI", "The fault filter aborted the request.";
    RATE_LIMITED = 11, "RL", "A rate limit refused the request.";
    UNAUTHORIZED_EXTERNAL_SERVICE = 12, "UAEX", "An external authorizer refused the request.";
    DOWNSTREAM_CONNECTION_TERMINATION = 13, "DC", "The downstream left.";
    UPSTREAM_RETRY_LIMIT_EXCEEDED = 14, "URX", "No retries (or connect attempts) were left.";
    STREAM_IDLE_TIMEOUT = 15, "SI", "The stream was idle too long.";
    INVALID_ENVOY_REQUEST_HEADERS = 16, "IH", "An `x-envoy-*` header was not valid.";
    DOWNSTREAM_PROTOCOL_ERROR = 17, "DPE", "The downstream broke the protocol.";
    UPSTREAM_MAX_STREAM_DURATION = 18, "UMSDR", "The stream's longest duration ran out.";
    NO_CLUSTER_FOUND = 19, "NC", "The route's cluster does not exist.";
    DURATION_TIMEOUT = 20, "DT", "The connection's longest duration ran out.";
    UPSTREAM_PROTOCOL_ERROR = 21, "UPE", "The upstream broke the protocol.";
    DOWNSTREAM_REMOTE_RESET = 22, "DR", "The downstream reset the stream.";
    RATE_LIMIT_SERVICE_ERROR = 23, "RLSE", "The rate limit service could not be asked.";
    DNS_RESOLUTION_FAILED = 24, "DF", "The host that the request names has no address.";
}

impl ResponseFlags {
    /// Adds flags.
    pub fn set(&mut self, other: ResponseFlags) {
        for number in other.numbers() {
            let bit = 1 << (number - 1);
            if self.bits & bit == 0 {
                self.bits |= bit;
                let place = 5 * (self.bits.count_ones() - 1);
                // Beyond twelve, which no stream has, the order is lost.
                self.order |= number.checked_shl(place).unwrap_or(0);
            }
        }
    }

    /// Whether all of `other` are set.
    pub fn contains(self, other: ResponseFlags) -> bool {
        self.bits & other.bits == other.bits
    }

    /// Whether none is set.
    pub fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// A bit each, by Envoy's numbers.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// Envoy's short form, in the order in which they were set: `UF,URX`, or `-`.
    pub fn short(self) -> String {
        let mut out = Vec::new();
        self.write_short(&mut out);
        String::from_utf8(out).unwrap_or_default()
    }

    /// Writes [`ResponseFlags::short`].
    pub fn write_short(self, out: &mut Vec<u8>) {
        if self.is_empty() {
            out.push(b'-');
            return;
        }
        let names = self.numbers().filter_map(|number| {
            ResponseFlags::ALL
                .iter()
                .find(|(flag, _)| flag.order == number)
        });
        for (index, (_, short)) in names.enumerate() {
            if index > 0 {
                out.push(b',');
            }
            out.extend_from_slice(short.as_bytes());
        }
    }

    fn numbers(self) -> impl Iterator<Item = u64> {
        (0..12)
            .map(move |place| (self.order >> (5 * place)) & 31)
            .take_while(|number| *number != 0)
    }
}

/// Facts of one stream: an HTTP request, or a TCP connection seen by `tcp_proxy`.
#[derive(Debug)]
pub struct StreamInfo {
    /// The connection it came on.
    pub connection: Rc<ConnectionInfo>,
    /// Wall clock at the first byte of the head; the one time the clock is read.
    pub start_time: SystemTime,
    /// Monotonic clock at the same moment.
    pub start: Instant,
    /// HTTP protocol of the downstream; `None` for TCP.
    pub protocol: Option<Protocol>,
    /// Address of the original client (x-forwarded-for rules applied).
    pub downstream_remote: SocketAddr,
    /// Name of the matched route.
    pub route_name: Option<Arc<str>>,
    /// Name of the virtual host.
    pub virtual_host: Option<Arc<str>>,
    /// Name of the cluster the stream went to (or was to go to).
    pub upstream_cluster: Option<Arc<str>>,
    /// The host of the last attempt.
    pub upstream_host: Option<SocketAddr>,
    /// Its name, if it has one.
    pub upstream_name: Option<Arc<str>>,
    /// What discovery says of it, by the name of who is to read it.
    pub upstream_metadata: Option<Arc<HashMap<String, pb::Struct>>>,
    /// HTTP protocol spoken with it.
    pub upstream_protocol: Option<Protocol>,
    /// Our address on the upstream connection.
    pub upstream_local: Option<SocketAddr>,
    /// Why connecting failed.
    pub upstream_transport_failure: Option<String>,
    /// Upstream TLS session.
    pub upstream_tls: Option<Arc<TlsInfo>>,
    /// Requests sent upstream, retries included.
    pub upstream_attempts: u32,
    /// Status sent downstream; 0 while none was sent.
    pub response_code: u16,
    /// Envoy's `%RESPONSE_CODE_DETAILS%`, e.g. `via_upstream`.
    pub response_code_details: Details,
    /// Why we closed the connection, where a filter of connections did. Envoy: `%CONNECTION_TERMINATION_DETAILS%`.
    pub termination_details: Option<Box<str>>,
    /// Why the response is not the upstream's.
    pub flags: ResponseFlags,
    /// Body bytes received from the downstream.
    pub bytes_received: u64,
    /// Body bytes sent to the downstream.
    pub bytes_sent: u64,
    /// Request body received entirely, since `start`.
    pub request_end: Option<Duration>,
    /// First response byte from the upstream, since `start`.
    pub upstream_first_byte: Option<Duration>,
    /// Last response byte sent, since `start`; set when the stream ends.
    pub response_end: Option<Duration>,
    /// gRPC status from trailers or headers.
    pub grpc_status: Option<i32>,
    /// It is a health check that a filter knows as one.
    pub health_check: bool,
    /// The router adds no `x-envoy-*` headers to request and response. Envoy:
    /// `Router.suppress_envoy_headers`.
    pub suppress_envoy_headers: bool,
    /// The host that a filter wants instead of what the balancer would pick.
    pub override_host: Option<Box<OverrideHost>>,
    /// What connections to upstreams are bound to, if a filter says so.
    pub original_src: Option<OriginalSrc>,
    /// What filters say of the stream, by the filter's name. Envoy: dynamic metadata.
    pub metadata: Option<Box<HashMap<String, pb::Struct>>>,
    /// What Mixer said, for the report: status code and message, and whether the cache answered.
    pub mixer: Option<MixerVerdict>,
}

/// A host asked for by address. Envoy: `setUpstreamOverrideHost`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverrideHost {
    /// Its address.
    pub address: SocketAddr,
    /// Rather fail than go elsewhere.
    pub strict: bool,
    /// Status when a strict request finds no such host.
    pub not_found: u16,
}

/// The outcome of the Mixer filter for the report's `check.*` and `quota.*` attributes.
#[derive(Clone, Debug, Default)]
pub struct MixerVerdict {
    /// google.rpc.Code of the refusal, 0 if the check passed.
    pub code: i32,
    /// Message of the refusal.
    pub message: String,
    /// The check was answered from the cache.
    pub check_cache_hit: bool,
    /// The quota was answered from the cache.
    pub quota_cache_hit: bool,
}

impl StreamInfo {
    /// A stream that begins now.
    pub fn new(connection: Rc<ConnectionInfo>, protocol: Option<Protocol>) -> StreamInfo {
        StreamInfo {
            downstream_remote: connection.remote,
            start_time: clock::wall(),
            start: clock::now(),
            protocol,
            route_name: None,
            virtual_host: None,
            upstream_cluster: None,
            upstream_host: None,
            upstream_name: None,
            upstream_metadata: None,
            upstream_protocol: None,
            upstream_local: None,
            upstream_transport_failure: None,
            upstream_tls: None,
            upstream_attempts: 0,
            response_code: 0,
            response_code_details: Details::default(),
            termination_details: None,
            flags: ResponseFlags::default(),
            bytes_received: 0,
            bytes_sent: 0,
            request_end: None,
            upstream_first_byte: None,
            response_end: None,
            grpc_status: None,
            health_check: false,
            suppress_envoy_headers: false,
            override_host: None,
            original_src: connection.original_src,
            metadata: None,
            mixer: None,
            connection,
        }
    }

    /// Makes the facts of the upstream those of a host that is about to be asked.
    pub fn meet(&mut self, host: &Host) {
        self.upstream_host = host.address.socket();
        self.upstream_name.clone_from(&host.hostname);
        self.upstream_metadata.clone_from(&host.metadata);
    }

    /// What filters say of the hosts that may serve the stream. Envoy: dynamic metadata `envoy.lb`.
    pub fn labels(&self) -> Option<&pb::Struct> {
        self.metadata.as_ref()?.get("envoy.lb")
    }

    /// Adds to the metadata of a filter; fields of the same name are replaced.
    pub fn add_metadata(&mut self, filter: &str, fields: pb::Struct) {
        if fields.fields.is_empty() {
            return;
        }
        let all = self.metadata.get_or_insert_default();
        let present = all.entry(filter.to_owned()).or_default();
        present.fields.extend(fields.fields);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_printed_in_the_order_they_were_set() {
        let mut flags = ResponseFlags::default();
        assert_eq!(flags.short(), "-");
        flags.set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        flags.set(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
        flags.set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        assert_eq!(flags.short(), "URX,UF");
        assert!(flags.contains(ResponseFlags::UPSTREAM_CONNECTION_FAILURE));
        let mut other = ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
        other.set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        assert_eq!(flags, other);
    }
}
