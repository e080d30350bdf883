//! Request and response heads: a flat list of name/value slices in the order the peer sent them.
//!
//! Filters and routes see only these, never the codec's own types. Names are lower case; well-known
//! ones are small integers, so that comparing them costs one instruction.

use std::{fmt, time::Duration};

use bytes::Bytes;

macro_rules! well_known {
    ($($variant:ident = $text:literal),+ $(,)?) => {
        /// Header names that are compared as integers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "each is the name it spells")]
        pub enum Known { $($variant),+ }

        impl Known {
            /// The name in lower case.
            pub const fn as_str(self) -> &'static str {
                match self { $(Known::$variant => $text),+ }
            }

            pub(super) fn lookup(name: &[u8]) -> Option<Known> {
                $(const $variant: &[u8] = $text.as_bytes();)+
                #[allow(non_upper_case_globals, reason = "constants named after variants")]
                match name { $(_ if name == $variant => Some(Known::$variant),)+ _ => None }
            }
        }
    };
}

#[allow(non_upper_case_globals, reason = "constants named after variants")]
mod known {
    well_known! {
        Accept = "accept",
        AcceptEncoding = "accept-encoding",
        Authorization = "authorization",
        B3 = "b3",
        ContentLength = "content-length",
        ContentType = "content-type",
        Connection = "connection",
        Cookie = "cookie",
        Date = "date",
        Expect = "expect",
        Forwarded = "forwarded",
        GrpcMessage = "grpc-message",
        GrpcStatus = "grpc-status",
        GrpcTimeout = "grpc-timeout",
        Host = "host",
        KeepAlive = "keep-alive",
        Location = "location",
        Origin = "origin",
        ProxyConnection = "proxy-connection",
        Referer = "referer",
        Server = "server",
        SetCookie = "set-cookie",
        Te = "te",
        Trailer = "trailer",
        TransferEncoding = "transfer-encoding",
        Upgrade = "upgrade",
        UserAgent = "user-agent",
        Via = "via",
        XB3Flags = "x-b3-flags",
        XB3Sampled = "x-b3-sampled",
        XB3SpanId = "x-b3-spanid",
        XB3TraceId = "x-b3-traceid",
        XB3ParentSpanId = "x-b3-parentspanid",
        TraceParent = "traceparent",
        TraceState = "tracestate",
        XClientTraceId = "x-client-trace-id",
        XEnvoyAttemptCount = "x-envoy-attempt-count",
        XEnvoyDecoratorOperation = "x-envoy-decorator-operation",
        XEnvoyExpectedRqTimeoutMs = "x-envoy-expected-rq-timeout-ms",
        XEnvoyForceTrace = "x-envoy-force-trace",
        XEnvoyMaxRetries = "x-envoy-max-retries",
        XEnvoyOverloaded = "x-envoy-overloaded",
        XEnvoyRetryOn = "x-envoy-retry-on",
        XEnvoyUpstreamRqPerTryTimeoutMs = "x-envoy-upstream-rq-per-try-timeout-ms",
        XEnvoyUpstreamRqTimeoutMs = "x-envoy-upstream-rq-timeout-ms",
        XEnvoyUpstreamServiceTime = "x-envoy-upstream-service-time",
        XEnvoyOriginalPath = "x-envoy-original-path",
        XForwardedClientCert = "x-forwarded-client-cert",
        XForwardedFor = "x-forwarded-for",
        XForwardedHost = "x-forwarded-host",
        XForwardedProto = "x-forwarded-proto",
        XIstioAttributes = "x-istio-attributes",
        XRequestId = "x-request-id",
    }
}
pub use known::Known;

/// A header name, lower case.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Name {
    /// One that is compared as an integer.
    Known(Known),
    /// Any other; never spells a known one.
    Other(Bytes),
}

impl Name {
    /// Makes a name from text of any case. The bytes are not checked to be a token.
    pub fn new(name: impl AsRef<[u8]>) -> Name {
        let lower = name.as_ref().to_ascii_lowercase();
        Name::from_lower(Bytes::from(lower))
    }

    /// Makes a name from text that is lower case already, without a copy.
    pub fn from_lower(name: Bytes) -> Name {
        match known_from_lower(&name) {
            Some(known) => Name::Known(known),
            None => Name::Other(name),
        }
    }

    /// The name in lower case.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Name::Known(known) => known.as_str().as_bytes(),
            Name::Other(bytes) => bytes,
        }
    }
}

/// The well-known name that `name` (lower case) spells.
pub fn known_from_lower(name: &[u8]) -> Option<Known> {
    Known::lookup(name)
}

impl From<Known> for Name {
    fn from(known: Known) -> Name {
        Name::Known(known)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.as_bytes()))
    }
}

/// Headers (or trailers) in order; a name may occur more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    list: Vec<(Name, Bytes)>,
}

impl Headers {
    /// An empty list with room for `capacity` entries.
    pub fn with_capacity(capacity: usize) -> Headers {
        Headers {
            list: Vec::with_capacity(capacity),
        }
    }

    /// The first value of `name`.
    pub fn get(&self, name: &Name) -> Option<&Bytes> {
        self.list.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }

    /// The first value of a well-known name.
    pub fn known(&self, name: Known) -> Option<&Bytes> {
        self.list
            .iter()
            .find(|(n, _)| matches!(n, Name::Known(k) if *k == name))
            .map(|(_, v)| v)
    }

    /// All values of `name`, in order.
    pub fn all<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = &'a Bytes> {
        self.list
            .iter()
            .filter(move |(n, _)| n == name)
            .map(|(_, v)| v)
    }

    /// Adds a value after the existing ones.
    pub fn append(&mut self, name: impl Into<Name>, value: impl Into<Bytes>) {
        self.list.push((name.into(), value.into()));
    }

    /// Replaces all values of a name by one, in the place of the first.
    pub fn set(&mut self, name: impl Into<Name>, value: impl Into<Bytes>) {
        let name = name.into();
        let value = value.into();
        match self.list.iter().position(|(n, _)| *n == name) {
            Some(first) => {
                let mut index = 0;
                self.list.retain(|(n, _)| {
                    let keep = index <= first || *n != name;
                    index += 1;
                    keep
                });
                self.list[first].1 = value;
            }
            None => self.list.push((name, value)),
        }
    }

    /// Removes all values of a name; whether there were any.
    pub fn remove(&mut self, name: &Name) -> bool {
        let before = self.list.len();
        self.list.retain(|(n, _)| n != name);
        self.list.len() != before
    }

    /// Removes all values of a well-known name and gives the first.
    pub fn take(&mut self, name: Known) -> Option<Bytes> {
        let first = self.known(name).cloned();
        if first.is_some() {
            self.list
                .retain(|(n, _)| !matches!(n, Name::Known(k) if *k == name));
        }
        first
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Bytes)> {
        self.list.iter().map(|(n, v)| (n, v))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

/// Protocol of one side of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    Http11,
    /// HTTP/2
    Http2,
}

impl Protocol {
    /// As Envoy's `%PROTOCOL%` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Http10 => "HTTP/1.0",
            Protocol::Http11 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        }
    }
}

/// The head of a request: what HTTP/2 calls pseudo headers, and the headers (without `host`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// `GET`, …; case kept.
    pub method: Bytes,
    /// `http` or `https`, as the client meant it (`x-forwarded-proto` rules applied by the connection manager).
    pub scheme: Bytes,
    /// `:authority` or `Host`, port as sent.
    pub authority: Bytes,
    /// Path and query, as sent (`/a?b=c`); `*` for OPTIONS; empty for CONNECT.
    pub path: Bytes,
    /// Protocol the downstream speaks.
    pub protocol: Protocol,
    /// All other headers; hop-by-hop ones are gone, except `te: trailers` and `upgrade` of an upgrade request.
    pub headers: Headers,
}

impl RequestHead {
    /// The path up to the query.
    pub fn path_only(&self) -> &[u8] {
        let end = self
            .path
            .iter()
            .position(|b| *b == b'?' || *b == b'#')
            .unwrap_or(self.path.len());
        &self.path[..end]
    }

    /// What follows the first `?`.
    pub fn query(&self) -> Option<&[u8]> {
        let start = self.path.iter().position(|b| *b == b'?')?;
        Some(&self.path[start + 1..])
    }

    /// Whether this is a gRPC request by its content type.
    pub fn is_grpc(&self) -> bool {
        self.headers
            .known(Known::ContentType)
            .and_then(|v| v.strip_prefix(b"application/grpc"))
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    }
}

impl RequestHead {
    /// The client's deadline: `grpc-timeout`, at most eight digits and a unit. gRPC over HTTP/2.
    pub fn grpc_timeout(&self) -> Option<Duration> {
        let (unit, digits) = self.headers.known(Known::GrpcTimeout)?.split_last()?;
        if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let value: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
        Some(match unit {
            b'H' => Duration::from_secs(value * 3600),
            b'M' => Duration::from_secs(value * 60),
            b'S' => Duration::from_secs(value),
            b'm' => Duration::from_millis(value),
            b'u' => Duration::from_micros(value),
            b'n' => Duration::from_nanos(value),
            _ => return None,
        })
    }
}

/// The head of a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// 100 to 599.
    pub status: u16,
    /// All headers; hop-by-hop ones are gone.
    pub headers: Headers,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_compare_regardless_of_how_they_were_made() {
        assert_eq!(Name::new("X-Request-ID"), Name::Known(Known::XRequestId));
        assert_eq!(Name::new("X-Foo"), Name::from_lower("x-foo".into()));
    }

    #[test]
    fn grpc_is_told_from_its_relatives() {
        for (content_type, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/grpcx", false),
            ("application/json", false),
        ] {
            let mut headers = Headers::default();
            headers.append(Known::ContentType, content_type);
            let head = RequestHead {
                method: "POST".into(),
                scheme: "http".into(),
                authority: "a".into(),
                path: "/".into(),
                protocol: Protocol::Http2,
                headers,
            };
            assert_eq!(head.is_grpc(), grpc, "{content_type}");
        }
    }

    #[test]
    fn set_replaces_every_value_in_the_place_of_the_first() {
        let mut headers = Headers::default();
        for (name, value) in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")] {
            headers.append(Name::new(name), value);
        }
        headers.set(Name::new("a"), "5");
        let all: Vec<_> = headers
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        assert_eq!(
            all,
            [("a", "5"), ("b", "2"), ("c", "4")].map(|(n, v)| (Name::new(n), Bytes::from(v)))
        );
    }
}
