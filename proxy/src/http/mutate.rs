//! What the connection manager itself changes in heads: who the client is (`x-forwarded-*`), what it may
//! say (`x-envoy-*`), request ids, paths. Envoy: `ConnectionManagerUtility`.

use std::{
    borrow::Cow,
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use chrono::DateTime;
use lateen_protocols::envoy::envoy::{
    config::core::v3::http_protocol_options::HeadersWithUnderscoresAction,
    extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
        PathWithEscapedSlashesAction as Slashes, ServerHeaderTransformation as ServerHeader,
    },
};
use tokio::time::Instant;

use crate::{
    clock,
    head::{Headers, Known, KnownSet, Name, Protocol, RequestHead, ResponseHead},
    http::{ConnectionContext, ConnectionManager, StripPort, cert},
    info::{ConnectionInfo, ResponseFlags},
    reject::Reject,
    route::{matcher::joined, without_port},
};

/// What was found out about a request before routing.
#[derive(Debug)]
pub(super) struct Origin {
    /// The client, as far as `x-forwarded-for` may be trusted.
    pub remote: SocketAddr,
    /// Whether it is inside the mesh.
    pub internal: bool,
}

/// What only clients inside the mesh may say.
const OF_INTERNAL_CLIENTS: &[&[u8]] = &[
    b"x-envoy-retriable-status-codes",
    b"x-envoy-retriable-header-names",
    b"x-envoy-retry-on",
    b"x-envoy-retry-grpc-on",
    b"x-envoy-max-retries",
    b"x-envoy-upstream-alt-stat-name",
    b"x-envoy-upstream-rq-timeout-ms",
    b"x-envoy-upstream-rq-per-try-timeout-ms",
    b"x-envoy-upstream-rq-timeout-alt-response",
    b"x-envoy-expected-rq-timeout-ms",
    b"x-envoy-force-trace",
    b"x-envoy-ip-tags",
    b"x-envoy-original-url",
    b"x-envoy-hedge-on-per-try-timeout",
];
/// What the edge takes from clients outside the mesh besides.
const OF_THE_EDGE: &[&[u8]] = &[
    b"x-envoy-decorator-operation",
    b"x-envoy-downstream-service-cluster",
    b"x-envoy-downstream-service-node",
    b"x-envoy-original-path",
];

/// The well-known ones among all of this kind.
const OF_ENVOY: KnownSet = KnownSet::beginning_with("x-envoy-");

fn bad_request(details: &'static str) -> Reject {
    Reject::new(
        400,
        "Bad Request",
        ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
        details,
    )
}

/// A path that cannot be brought to its normal form.
fn unfit_path() -> Reject {
    Reject::new(
        400,
        "",
        ResponseFlags::default(),
        "path_normalization_failed",
    )
}

impl ConnectionManager {
    /// Checks a request head and makes it what filters and routes may rely on.
    ///
    /// # Errors
    /// The answer to a request that may not pass.
    pub(super) fn prepare_request(
        &self,
        head: &mut RequestHead,
        names_host: bool,
        cx: &ConnectionContext,
    ) -> Result<Origin, Reject> {
        let connection = &*cx.info;
        if head.protocol == Protocol::Http10 && !self.accept_http_10 {
            return Err(Reject::new(
                426,
                "Upgrade Required",
                ResponseFlags::default(),
                "low_version",
            ));
        }
        if !names_host {
            if head.protocol == Protocol::Http10 && !self.default_host_for_http_10.is_empty() {
                head.authority = self.default_host_for_http_10.clone().into();
            } else {
                // As Envoy: nothing is wrong with the protocol, and nothing is said about it.
                return Err(Reject::new(
                    400,
                    "",
                    ResponseFlags::default(),
                    "missing_host_header",
                ));
            }
        }
        self.underscores(head)?;
        self.normalize(head)?;
        self.strip_host(head, connection.local.port());
        let origin = self.origin(head, connection);
        self.sanitize(&mut head.headers, &origin);
        if let Some(agent) = &self.add_user_agent {
            head.headers.set(
                Name::new("x-envoy-downstream-service-cluster"),
                agent.clone(),
            );
            if head
                .headers
                .known(Known::UserAgent)
                .is_none_or(<[u8]>::is_empty)
            {
                head.headers.set(Known::UserAgent, agent.clone());
            }
            let node = &self.shared.node.id;
            if !node.is_empty() {
                head.headers
                    .set(Name::new("x-envoy-downstream-service-node"), node.clone());
            }
        }
        if !self.via.is_empty() {
            append_via(&mut head.headers, &self.via);
        }
        let edge = self.use_remote_address && !origin.internal;
        let keep = head
            .headers
            .known(Known::XRequestId)
            .is_some_and(|id| !id.is_empty())
            && (!edge || self.preserve_request_id);
        if self.generate_request_id && !keep {
            head.headers.set(Known::XRequestId, request_id());
        }
        cert::forward(
            self.client_cert,
            &self.client_cert_details,
            connection.tls.as_deref(),
            &mut head.headers,
        );
        Ok(origin)
    }

    fn underscores(&self, head: &mut RequestHead) -> Result<(), Reject> {
        if self.underscores == HeadersWithUnderscoresAction::Allow {
            return Ok(());
        }
        let headers = &mut head.headers;
        let bad: Vec<Name> = headers
            .iter()
            .filter(|(name, _)| name.as_bytes().contains(&b'_'))
            .map(|(name, _)| name.to_name())
            .collect();
        if bad.is_empty() {
            return Ok(());
        }
        let h2 = head.protocol == Protocol::Http2;
        if self.underscores == HeadersWithUnderscoresAction::RejectRequest {
            if !h2 {
                let stats = &self.stats_h1;
                stats.requests_rejected_with_underscores_in_headers.inc();
            }
            return Err(bad_request(match head.protocol {
                Protocol::Http2 => "http2.unexpected_underscore",
                Protocol::Http10 | Protocol::Http11 => "http1.unexpected_underscore",
            }));
        }
        match h2 {
            true => &self.stats_h2.dropped_headers_with_underscores,
            false => &self.stats_h1.dropped_headers_with_underscores,
        }
        .add(bad.len() as u64);
        for name in &bad {
            headers.remove(name);
        }
        Ok(())
    }

    fn strip_host(&self, head: &mut RequestHead, port: u16) {
        if self.strip_port == StripPort::Keep && !self.strip_trailing_dot {
            return;
        }
        let host = without_port(&head.authority).len();
        let given = &head.authority[host..];
        let strip = match self.strip_port {
            StripPort::Keep => false,
            StripPort::Any => true,
            StripPort::Matching => given == format!(":{port}").as_bytes(),
        };
        if strip && !given.is_empty() {
            head.authority.truncate(host);
        }
        if self.strip_trailing_dot {
            let host = without_port(&head.authority).len();
            if head.authority[..host].ends_with(b".") {
                let mut authority = head.authority.to_vec();
                authority.remove(host - 1);
                head.authority = authority.into();
            }
        }
    }

    /// Who sent the request, and the `x-forwarded-*` headers that say so.
    fn origin(&self, head: &mut RequestHead, connection: &ConnectionInfo) -> Origin {
        let peer = connection.remote;
        let own_scheme: &'static str = if connection.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let headers = &mut head.headers;
        // Several lines are one list: who looked at the first only would believe what the client wrote
        // instead of what a trusted proxy added.
        if headers.known(Known::XForwardedFor).is_some()
            && let Some(Cow::Owned(all)) = joined(headers, &Known::XForwardedFor.into())
        {
            headers.set(Known::XForwardedFor, all);
        }
        let forwarded = headers.known(Known::XForwardedFor).map(<[u8]>::to_vec);
        let (found, single) = if self.use_remote_address {
            let found = match self.trusted_hops {
                0 => None,
                hops => forwarded
                    .as_ref()
                    .and_then(|xff| last_address(xff, hops - 1)),
            };
            if !self.skip_xff_append {
                append_list(
                    headers,
                    Known::XForwardedFor,
                    &visible_address(peer.ip()).to_string(),
                );
            }
            if self.trusted_hops == 0 || headers.known(Known::XForwardedProto).is_none() {
                headers.set(Known::XForwardedProto, own_scheme);
            }
            (found.or(Some(peer.ip())), forwarded.is_none())
        } else {
            let found = forwarded
                .as_ref()
                .and_then(|xff| last_address(xff, self.trusted_hops));
            let single = forwarded.as_ref().is_some_and(|xff| !xff.contains(&b','));
            (found, single && found.is_some())
        };
        let proto = match headers.known(Known::XForwardedProto) {
            Some(proto) if proto.eq_ignore_ascii_case(b"http") => Bytes::from_static(b"http"),
            Some(proto) if proto.eq_ignore_ascii_case(b"https") => Bytes::from_static(b"https"),
            Some(_) => Bytes::from_static(own_scheme.as_bytes()),
            None => {
                headers.set(Known::XForwardedProto, own_scheme);
                Bytes::from_static(own_scheme.as_bytes())
            }
        };
        head.scheme = proto;
        if self.append_forwarded_port {
            let name = Name::new("x-forwarded-port");
            if (self.use_remote_address && self.trusted_hops == 0) || headers.get(&name).is_none() {
                headers.set(name, connection.local.port().to_string());
            }
        }
        let internal = single
            && found
                .is_some_and(|address| self.internal.iter().any(|range| range.contains(address)));
        let remote = match found {
            Some(address) if address != peer.ip() => SocketAddr::new(address, 0),
            _ => peer,
        };
        Origin { remote, internal }
    }

    /// Takes away what only trusted clients may say.
    fn sanitize(&self, headers: &mut Headers, origin: &Origin) {
        let any = !headers.present().and(OF_ENVOY).is_empty()
            || headers
                .other_names()
                .any(|name| name.starts_with(b"x-envoy-"));
        if any {
            headers.retain(|name, _| {
                let name = name.as_bytes();
                if !name.starts_with(b"x-envoy-") {
                    return true;
                }
                let own = name == b"x-envoy-internal";
                let outside = !origin.internal
                    && (OF_INTERNAL_CLIENTS.contains(&name)
                        || self.use_remote_address && OF_THE_EDGE.contains(&name));
                !(own || outside)
            });
        }
        if origin.internal {
            headers.append(Known::XEnvoyInternal, "true");
        } else if self.use_remote_address {
            headers.set(
                Name::new("x-envoy-external-address"),
                origin.remote.ip().to_string(),
            );
        }
    }

    fn normalize(&self, head: &mut RequestHead) -> Result<(), Reject> {
        if head.path.as_ref() == b"*" || head.method.as_ref() == b"CONNECT" {
            return Ok(());
        }
        if !head.path.starts_with(b"/") {
            self.stats.rq_non_relative_path.inc();
            return Err(Reject::new(
                404,
                "",
                ResponseFlags::default(),
                "absolute_path_rejected",
            ));
        }
        // A fragment is for the client alone: a route could take it for a part of the path, an upstream for none.
        if head.has_fragment() {
            return Err(unfit_path());
        }
        if !(self.normalize_path || self.merge_slashes || self.acts_on_escaped_slashes()) {
            return Ok(());
        }
        let path_end = head.path_only().len();
        let rest = head.path[path_end..].to_vec();
        let mut path = head.path[..path_end].to_vec();
        match self.escaped_slashes {
            Slashes::ImplementationSpecificDefault | Slashes::KeepUnchanged => {}
            Slashes::RejectRequest if has_escaped_slash(&path) => {
                return Err(unfit_path());
            }
            Slashes::UnescapeAndForward => path = unescape_slashes(&path),
            Slashes::UnescapeAndRedirect if has_escaped_slash(&path) => {
                let mut location = unescape_slashes(&path);
                location.extend_from_slice(&rest);
                return Err(Reject::new(
                    307,
                    "",
                    ResponseFlags::default(),
                    "path_normalization_failed",
                )
                .with_header(Known::Location, location));
            }
            Slashes::RejectRequest | Slashes::UnescapeAndRedirect => {}
        }
        if self.normalize_path {
            path = normalize_path(&path).ok_or_else(unfit_path)?;
        }
        if self.merge_slashes {
            path.dedup_by(|b, a| *a == b'/' && *b == b'/');
        }
        path.extend_from_slice(&rest);
        head.path = path.into();
        Ok(())
    }

    fn acts_on_escaped_slashes(&self) -> bool {
        !matches!(
            self.escaped_slashes,
            Slashes::ImplementationSpecificDefault | Slashes::KeepUnchanged
        )
    }

    /// Finishes a response head: `server`, `date`, `via`, `x-request-id`.
    pub(super) fn finish_response(&self, head: &mut ResponseHead, request_id: Option<&[u8]>) {
        let present = head.headers.known(Known::Server).is_some();
        match self.server_header {
            ServerHeader::Overwrite => head.headers.set(Known::Server, self.server_name.clone()),
            ServerHeader::AppendIfAbsent if !present => {
                head.headers.append(Known::Server, self.server_name.clone());
            }
            ServerHeader::AppendIfAbsent | ServerHeader::PassThrough => {}
        }
        if head.headers.known(Known::Date).is_none() {
            append_date(&mut head.headers);
        }
        if !self.via.is_empty() {
            append_via(&mut head.headers, &self.via);
        }
        if self.request_id_in_response
            && let Some(id) = request_id
        {
            head.headers.set(Known::XRequestId, id);
        }
    }

    /// Whether the connection manager (not a route) allows an upgrade.
    pub(super) fn allows_upgrade(&self, name: &str) -> bool {
        self.upgrades
            .iter()
            .any(|(n, allowed)| *allowed && n == name)
    }
}

/// A random UUID (version 4) in text.
fn request_id() -> [u8; 36] {
    let mut bits: u128 = rand::random();
    bits &= !(0xf << 76 | 0xc << 60);
    bits |= 0x4 << 76 | 0x8 << 60;
    let mut digits = [0; 32];
    let (words, _) = digits.as_chunks_mut::<8>();
    for (word, shift) in words.iter_mut().zip([96, 64, 32, 0]) {
        *word = hex((bits >> shift) as u32);
    }
    let mut text = [b'-'; 36];
    text[..8].copy_from_slice(&digits[..8]);
    text[9..13].copy_from_slice(&digits[8..12]);
    text[14..18].copy_from_slice(&digits[12..16]);
    text[19..23].copy_from_slice(&digits[16..20]);
    text[24..].copy_from_slice(&digits[20..]);
    text
}

/// The digits of a number, all at once.
fn hex(number: u32) -> [u8; 8] {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // Each digit into a byte of its own, the highest into the highest.
    let mut word = u64::from(number);
    word = (word | word << 16) & 0x0000_ffff_0000_ffff;
    word = (word | word << 8) & 0x00ff_00ff_00ff_00ff;
    word = (word | word << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    // 1 in each byte that is above nine.
    let letters = (word + 6 * ONES) >> 4 & ONES;
    (word + u64::from(b'0') * ONES + letters * u64::from(b'a' - b'0' - 10)).to_be_bytes()
}

/// Adds `date`, whose text is made once a second.
fn append_date(headers: &mut Headers) {
    thread_local! {
        /// When it was made, and until when it is good.
        static DATE: Cell<Option<(Instant, Instant, [u8; 29])>> = const { Cell::new(None) };
    }
    let now = clock::now();
    let known = DATE
        .get()
        .filter(|(from, until, _)| (*from..*until).contains(&now));
    let text = known.map_or_else(
        || {
            let since = clock::wall()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            let rest = Duration::from_nanos(1_000_000_000 - u64::from(since.subsec_nanos()));
            let text = date(since.as_secs());
            DATE.set(Some((now, now + rest, text)));
            text
        },
        |(_, _, text)| text,
    );
    headers.append(Known::Date, text);
}

/// RFC 9110 §5.6.7.
fn date(unix_seconds: u64) -> [u8; 29] {
    let date = i64::try_from(unix_seconds)
        .ok()
        .and_then(|seconds| DateTime::from_timestamp(seconds, 0))
        .unwrap_or_default()
        .format("%a, %d %b %Y %H:%M:%S GMT")
        .to_string();
    date.as_bytes().try_into().unwrap_or([b'0'; 29])
}

fn append_via(headers: &mut Headers, via: &Bytes) {
    match std::str::from_utf8(via) {
        Ok(via) => append_list(headers, Known::Via, via),
        Err(_) => headers.append(Known::Via, via.clone()),
    }
}

/// What others are told of a peer: for one on 127.0.0.1 our own address, which means something to them.
/// Envoy: `LocalInfo::address`.
fn visible_address(peer: IpAddr) -> IpAddr {
    static OWN: LazyLock<Option<IpAddr>> = LazyLock::new(|| {
        // Connecting a datagram socket sends nothing; it only asks the kernel for a route.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
        socket
            .local_addr()
            .ok()
            .map(|address| address.ip())
            .filter(|ip| !ip.is_loopback())
    });
    match peer {
        IpAddr::V4(Ipv4Addr::LOCALHOST) | IpAddr::V6(Ipv6Addr::LOCALHOST) => OWN.unwrap_or(peer),
        other => other,
    }
}

/// Adds an element to a comma-separated header.
fn append_list(headers: &mut Headers, name: Known, element: &str) {
    let value = match headers.known(name) {
        Some(earlier) if !earlier.is_empty() => {
            let mut all = earlier.to_vec();
            all.push(b',');
            all.extend_from_slice(element.as_bytes());
            all
        }
        _ => element.as_bytes().to_vec(),
    };
    headers.set(name, value);
}

/// The address `skip` places from the end of `x-forwarded-for`; the first one if there are not so many.
fn last_address(forwarded: &[u8], skip: usize) -> Option<IpAddr> {
    let text = std::str::from_utf8(forwarded).ok()?;
    text.rsplit(',').nth(skip)?.trim().parse().ok()
}

fn has_escaped_slash(path: &[u8]) -> bool {
    path.windows(3).any(is_escaped_slash)
}

fn is_escaped_slash(window: &[u8]) -> bool {
    window.eq_ignore_ascii_case(b"%2f") || window.eq_ignore_ascii_case(b"%5c")
}

fn unescape_slashes(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        match rest.get(..3) {
            Some(window) if window.eq_ignore_ascii_case(b"%2f") => {
                out.push(b'/');
                rest = &rest[3..];
            }
            Some(window) if window.eq_ignore_ascii_case(b"%5c") => {
                out.push(b'\\');
                rest = &rest[3..];
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// RFC 3986 §6 as Envoy does it: unescapes unreserved characters, turns `\` into `/`, resolves `.` and
/// `..`. `None` if the path climbs above its root or holds a NUL.
pub fn normalize_path(path: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let escaped = rest.get(1..3).filter(|_| *first == b'%').and_then(hex_pair);
        match escaped {
            Some(0) => return None,
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                decoded.push(byte);
                rest = &rest[3..];
            }
            _ => {
                decoded.push(if *first == b'\\' { b'/' } else { *first });
                rest = after;
            }
        }
    }
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut all = decoded.split(|b| *b == b'/').skip(1).peekable();
    while let Some(segment) = all.next() {
        let last = all.peek().is_none();
        match segment {
            b"." if last => segments.push(b""),
            b"." => {}
            b".." => {
                segments.pop()?;
                if last {
                    segments.push(b"");
                }
            }
            other => segments.push(other),
        }
    }
    let mut out = Vec::with_capacity(decoded.len());
    for segment in &segments {
        out.push(b'/');
        out.extend_from_slice(segment);
    }
    if out.is_empty() {
        out.push(b'/');
    }
    Some(out)
}

fn hex_pair(pair: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(pair).ok()?;
    u8::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalized() {
        for (path, want) in [
            ("/a/./b", Some("/a/b")),
            ("/a/../b", Some("/b")),
            ("/a/..", Some("/")),
            ("/a/b/.", Some("/a/b/")),
            ("/..", None),
            ("/a/%2e%2e/b", Some("/b")),
            ("/%41%7e", Some("/A~")),
            ("/a%2Fb", Some("/a%2Fb")),
            ("/a\\b", Some("/a/b")),
            ("/%00", None),
            ("//a", Some("//a")),
        ] {
            let got = normalize_path(path.as_bytes()).map(|path| String::from_utf8(path).unwrap());
            assert_eq!(got.as_deref(), want, "{path}");
        }
        assert_eq!(unescape_slashes(b"/a%2fb%5Cc%20"), b"/a/b\\c%20");
    }

    #[test]
    fn digits_are_those_of_the_number() {
        for number in [
            0,
            1,
            9,
            0xa,
            0x0f1e_2d3c,
            0x1234_5678,
            0x9abc_def0,
            u32::MAX,
        ] {
            assert_eq!(hex(number), *format!("{number:08x}").as_bytes());
        }
    }

    #[test]
    fn request_ids_are_uuids() {
        let ids: Vec<_> = (0..100)
            .map(|_| uuid::Uuid::try_parse_ascii(&request_id()).unwrap())
            .collect();
        assert!(
            ids.iter().all(|id| {
                id.get_version_num() == 4 && id.get_variant() == uuid::Variant::RFC4122
            })
        );
        assert_ne!(ids[0], ids[1]);
    }

    #[test]
    fn forwarded_for_is_read_from_the_end() {
        let list = b"1.2.3.4, 5.6.7.8,9.10.11.12";
        assert_eq!(last_address(list, 0), "9.10.11.12".parse().ok());
        assert_eq!(last_address(list, 2), "1.2.3.4".parse().ok());
        assert_eq!(last_address(list, 3), None);
        assert_eq!(last_address(b"nonsense", 0), None);
    }
}
