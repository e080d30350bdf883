//! Looks at the first bytes of a connection before a filter chain is chosen: PROXY protocol, ClientHello
//! (SNI, ALPN), HTTP version. What was read is put back, except a PROXY header.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, timeout_at},
};

use crate::tls::hello::{self, Hello};

/// A ClientHello or request line longer than this is not waited for. Envoy: 16 KiB for ClientHellos.
const LONGEST: usize = 16 * 1024;

/// Which inspectors a listener has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inspectors {
    /// `proxy_protocol`.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `tls_inspector`.
    pub tls: bool,
    /// `http_inspector`.
    pub http: bool,
}

/// What a PROXY header must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// Connections without a header may pass.
    pub optional: bool,
    /// Version 1 is no header of ours: refused, or no header at all where none is needed.
    pub refuses_v1: bool,
    /// The same of version 2.
    pub refuses_v2: bool,
}

impl ProxyProtocol {
    fn refuses(self, read: &[u8]) -> bool {
        if read.starts_with(V1) {
            self.refuses_v1
        } else {
            self.refuses_v2 && read.starts_with(V2)
        }
    }
}

/// What the first bytes tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sniffed {
    /// It is TLS.
    pub tls: bool,
    /// SNI, lower case.
    pub server_name: Option<Arc<str>>,
    /// ALPN of the ClientHello, or `http/1.1`, `http/1.0`, `h2c` of clear text.
    pub protocols: Vec<Vec<u8>>,
    /// Source and destination of a PROXY header.
    pub proxied: Option<(SocketAddr, SocketAddr)>,
}

/// Why a connection cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The peer left.
    #[error("the connection ended before it said what it is")]
    Closed,
    /// Reading failed.
    #[error("cannot read")]
    Io(#[from] io::Error),
    /// There must be a PROXY header and there is none, or it is broken.
    #[error("no valid PROXY header")]
    Proxy,
}

impl Inspectors {
    /// Whether there is anything to look at.
    pub fn any(self) -> bool {
        self.tls || self.http || self.proxy_protocol.is_some()
    }

    /// Reads until everything is known, or `limit` has passed: then what is known so far, and `true`.
    /// What was read is in `read` in any case.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn inspect<S: AsyncRead + Unpin>(
        self,
        stream: &mut S,
        read: &mut BytesMut,
        limit: Option<Duration>,
    ) -> Result<(Sniffed, bool), InspectError> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut sniffed = Sniffed::default();
        let mut proxy = self.proxy_protocol;
        loop {
            let verdict = self.look(read, &mut proxy, &mut sniffed)?;
            if verdict == Verdict::Known {
                return Ok((sniffed, false));
            }
            let next = stream.read_buf(read);
            let n = match deadline {
                None => next.await?,
                Some(at) => match timeout_at(at, next).await {
                    Ok(result) => result?,
                    Err(_) => return Ok((sniffed, true)),
                },
            };
            if n == 0 {
                return Err(InspectError::Closed);
            }
        }
    }

    fn look(
        self,
        read: &mut BytesMut,
        proxy: &mut Option<ProxyProtocol>,
        sniffed: &mut Sniffed,
    ) -> Result<Verdict, InspectError> {
        if let Some(rules) = *proxy {
            let header = if rules.refuses(read) {
                Header::Absent
            } else {
                proxy_header(read)
            };
            match header {
                Header::Incomplete => return Ok(Verdict::NeedsMore),
                Header::Found(length, addresses) => {
                    read.advance(length);
                    sniffed.proxied = addresses;
                }
                Header::Absent if rules.optional => {}
                Header::Absent | Header::Broken => return Err(InspectError::Proxy),
            }
            *proxy = None;
        }
        if self.tls {
            match client_hello(read, sniffed) {
                Verdict::NeedsMore if read.len() < LONGEST => return Ok(Verdict::NeedsMore),
                _ => {}
            }
        }
        if self.http && !sniffed.tls {
            match http_version(read) {
                None if read.len() < LONGEST => return Ok(Verdict::NeedsMore),
                Some(Some(version)) => sniffed.protocols = vec![version.to_vec()],
                Some(None) | None => {}
            }
        }
        Ok(Verdict::Known)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Known,
    NeedsMore,
}

fn client_hello(read: &[u8], sniffed: &mut Sniffed) -> Verdict {
    match hello::read(read) {
        Hello::Incomplete => return Verdict::NeedsMore,
        Hello::NotTls => {}
        // It begins as TLS; the handshake will tell the peer what is wrong with it.
        Hello::Broken => sniffed.tls = true,
        Hello::Complete(hello) => {
            sniffed.tls = true;
            sniffed.server_name = hello.server_name;
            sniffed.protocols = hello.protocols;
        }
    }
    Verdict::Known
}

/// The HTTP version: `None` if more is needed, `Some(None)` if it is not HTTP.
fn http_version(read: &[u8]) -> Option<Option<&'static [u8]>> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0";
    if read.starts_with(PREFACE) {
        return Some(Some(b"h2c"));
    }
    if PREFACE.starts_with(read) {
        return None;
    }
    let token_end = read.iter().position(|b| !b.is_ascii_uppercase());
    match token_end {
        Some(end) if end == 0 || read[end] != b' ' => return Some(None),
        _ => {}
    }
    let line_end = read.iter().position(|b| *b == b'\n')?;
    let line = read[..line_end].trim_ascii_end();
    if line.ends_with(b" HTTP/1.1") {
        Some(Some(b"http/1.1"))
    } else if line.ends_with(b" HTTP/1.0") {
        Some(Some(b"http/1.0"))
    } else {
        Some(None)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Header {
    Absent,
    Incomplete,
    Broken,
    /// Its length, and the addresses (none for LOCAL and UNKNOWN).
    Found(usize, Option<(SocketAddr, SocketAddr)>),
}

/// How version 1 begins.
const V1: &[u8] = b"PROXY ";
/// How version 2 begins.
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Reads a PROXY header, version 1 or 2.
fn proxy_header(read: &[u8]) -> Header {
    if read.len() >= V2.len() && read.starts_with(V2) {
        return proxy_v2(read);
    }
    if read.starts_with(V1) {
        return proxy_v1(read);
    }
    if V2.starts_with(read) || V1.starts_with(read) {
        Header::Incomplete
    } else {
        Header::Absent
    }
}

fn proxy_v1(read: &[u8]) -> Header {
    const LONGEST_V1: usize = 107;
    let Some(end) = read.windows(2).take(LONGEST_V1).position(|w| w == b"\r\n") else {
        return if read.len() > LONGEST_V1 {
            Header::Broken
        } else {
            Header::Incomplete
        };
    };
    let Ok(line) = std::str::from_utf8(&read[..end]) else {
        return Header::Broken;
    };
    let parts: Vec<&str> = line.split(' ').collect();
    match parts.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Header::Found(end + 2, None),
        [
            "PROXY",
            family @ ("TCP4" | "TCP6"),
            source,
            destination,
            source_port,
            destination_port,
        ] => {
            let address = |ip: &str, port: &str| -> Option<SocketAddr> {
                let ip: IpAddr = ip.parse().ok()?;
                let digits = port.bytes().all(|b| b.is_ascii_digit());
                let port = port.parse().ok().filter(|_| digits)?;
                (ip.is_ipv4() == (*family == "TCP4")).then(|| SocketAddr::new(ip, port))
            };
            match (
                address(source, source_port),
                address(destination, destination_port),
            ) {
                (Some(source), Some(destination)) => {
                    Header::Found(end + 2, Some((source, destination)))
                }
                _ => Header::Broken,
            }
        }
        _ => Header::Broken,
    }
}

fn proxy_v2(read: &[u8]) -> Header {
    const FIXED: usize = 16;
    let Some(fixed) = read.get(..FIXED) else {
        return Header::Incomplete;
    };
    let length = FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let Some(body) = read.get(FIXED..length) else {
        return if length > LONGEST {
            Header::Broken
        } else {
            Header::Incomplete
        };
    };
    let port = |at: usize| Some(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    let v4 = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 4] = body.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(octets).into())
    };
    let v6 = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = body.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(octets).into())
    };
    let pair = |source: Option<IpAddr>, destination: Option<IpAddr>, ports: usize| {
        Some((
            SocketAddr::new(source?, port(ports)?),
            SocketAddr::new(destination?, port(ports + 2)?),
        ))
    };
    let found = |pair: Option<_>| match pair {
        Some(pair) => Header::Found(length, Some(pair)),
        None => Header::Broken,
    };
    // As Envoy: what is neither stream nor datagram, or of another family, keeps its own addresses.
    match (fixed[12], fixed[13]) {
        (0x21, 0x11 | 0x12) => found(pair(v4(0), v4(4), 8)),
        (0x21, 0x21 | 0x22) => found(pair(v6(0), v6(16), 32)),
        (0x20 | 0x21, _) => Header::Found(length, None),
        _ => Header::Broken,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn proxy_headers() {
        let pair = Some(("1.2.3.4:5".parse().unwrap(), "6.7.8.9:10".parse().unwrap()));
        assert_eq!(
            proxy_header(b"PROXY TCP4 1.2.3.4 6.7.8.9 5 10\r\nGET"),
            Header::Found(33, pair)
        );
        assert_eq!(proxy_header(b"PROXY TCP4 1.2.3.4"), Header::Incomplete);
        assert_eq!(proxy_header(b"PROXY TCP4 x y 5 10\r\n"), Header::Broken);
        assert_eq!(proxy_header(b"GET / HTTP/1.1"), Header::Absent);
        for broken in [
            &b"PROXY TCP6 1.2.3.4 6.7.8.9 5 10\r\n"[..],
            b"PROXY TCP4 1.2.3.4 6.7.8.9 +5 10\r\n",
            b"PROXY TCP4 1.2.3.4 6.7.8.9 5 65536\r\n",
            b"PROXY TCP4  1.2.3.4 6.7.8.9 5 10\r\n",
        ] {
            assert_eq!(proxy_header(broken), Header::Broken);
        }
        let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
        v2.extend_from_slice(&[1, 2, 3, 4, 6, 7, 8, 9, 0, 5, 0, 10]);
        assert_eq!(proxy_header(&v2), Header::Found(28, pair));
        assert_eq!(proxy_header(&v2[..20]), Header::Incomplete);
    }

    #[test]
    fn versions_that_are_refused_are_no_header() {
        let source = "1.2.3.4:5".parse().unwrap();
        let v1 = &b"PROXY TCP4 1.2.3.4 6.7.8.9 5 10\r\n"[..];
        let v2 =
            &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x01\x02\x03\x04\x06\x07\x08\x09\0\x05\0\x0a"[..];
        for (optional, refuses_v1, bytes, want) in [
            (false, false, v1, Some(Some(source))),
            (false, true, v1, None),
            (true, true, v1, Some(None)),
            (false, true, v2, Some(Some(source))),
            (false, false, v2, None),
            (true, false, v2, Some(None)),
        ] {
            let rules = ProxyProtocol {
                optional,
                refuses_v1,
                refuses_v2: !refuses_v1,
            };
            let inspectors = Inspectors {
                proxy_protocol: Some(rules),
                ..Inspectors::default()
            };
            let (mut read, mut sniffed) = (BytesMut::from(bytes), Sniffed::default());
            let known = inspectors.look(&mut read, &mut Some(rules), &mut sniffed);
            let got = known
                .ok()
                .map(|_| sniffed.proxied.map(|(source, _)| source));
            assert_eq!(got, want, "{rules:?} {bytes:?}");
            // What is no header is the application's.
            assert_eq!(read.is_empty(), want == Some(Some(source)));
        }
    }

    #[test]
    fn http_versions() {
        assert_eq!(http_version(b"PRI * HTTP/2.0\r\n"), Some(Some(&b"h2c"[..])));
        assert_eq!(
            http_version(b"GET / HTTP/1.1\r\n"),
            Some(Some(&b"http/1.1"[..]))
        );
        assert_eq!(
            http_version(b"GET / HTTP/1.0\r\n"),
            Some(Some(&b"http/1.0"[..]))
        );
        assert_eq!(http_version(b"GE"), None);
        assert_eq!(http_version(b"\x01\x02"), Some(None));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..4usize) {
            let start: &[u8] = [&b""[..], b"\x16\x03\x01", b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT\n\x21"][kind];
            let mut read = BytesMut::from(start);
            read.extend_from_slice(&bytes);
            let all = Inspectors { proxy_protocol: Some(ProxyProtocol { optional: true, ..Default::default() }), tls: true, http: true };
            drop(all.look(&mut read, &mut all.proxy_protocol.clone(), &mut Sniffed::default()));
        }
    }
}
