//! Why a stream ends with an answer of our own, and what that answer is. The one place where an error
//! becomes a status, a response flag and Envoy's wording.

use std::borrow::Cow;

use bytes::Bytes;

use crate::{
    body::Body,
    head::{Headers, Known, Name, ResponseHead},
    info::{Details, ResponseFlags},
};

/// A local reply: status, body and flags as Envoy gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    /// HTTP status; a gRPC client gets the matching `grpc-status` instead.
    pub status: u16,
    /// Body in Envoy's words; becomes `grpc-message` for gRPC clients.
    pub body: Cow<'static, str>,
    /// What `%RESPONSE_FLAGS%` prints.
    pub flags: ResponseFlags,
    /// What `%RESPONSE_CODE_DETAILS%` prints.
    pub details: Details,
    /// Headers of the reply besides those every local reply has.
    pub headers: Box<Headers>,
    /// gRPC status when the mapping from the HTTP status is not wanted.
    pub grpc_status: Option<i32>,
}

impl Reject {
    /// A reply with no extra headers.
    pub fn new(
        status: u16,
        body: impl Into<Cow<'static, str>>,
        flags: ResponseFlags,
        details: impl Into<Details>,
    ) -> Reject {
        Reject {
            status,
            body: body.into(),
            flags,
            details: details.into(),
            headers: Box::default(),
            grpc_status: None,
        }
    }

    /// Adds a header to the reply.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<Name>, value: impl AsRef<[u8]>) -> Reject {
        self.headers.append(name, value);
        self
    }

    /// No route matched: 404 `NR`.
    pub fn no_route() -> Reject {
        Reject::new(404, "", ResponseFlags::NO_ROUTE_FOUND, "route_not_found")
    }

    /// The route's cluster is not known: 503 (or what the route says) `NC`.
    pub fn no_cluster(status: u16) -> Reject {
        Reject::new(
            status,
            "",
            ResponseFlags::NO_CLUSTER_FOUND,
            "cluster_not_found",
        )
    }

    /// No host of the cluster may be used: 503 `UH`.
    pub fn no_healthy_upstream() -> Reject {
        Reject::new(
            503,
            "no healthy upstream",
            ResponseFlags::NO_HEALTHY_UPSTREAM,
            "no_healthy_upstream",
        )
    }

    /// A circuit breaker refused: 503 `UO`.
    pub fn overflow() -> Reject {
        Reject::new(
            503,
            "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            ResponseFlags::UPSTREAM_OVERFLOW,
            "upstream_reset_before_response_started{overflow}",
        )
        .with_header(Known::XEnvoyOverloaded, "true")
    }

    /// The route's timeout ran out before response headers: 504 `UT`.
    pub fn upstream_timeout() -> Reject {
        Reject::new(
            504,
            "upstream request timeout",
            ResponseFlags::UPSTREAM_REQUEST_TIMEOUT,
            "response_timeout",
        )
    }

    /// The per-try timeout ran out and no retry was left: 504 `UT`.
    pub fn per_try_timeout() -> Reject {
        Reject::new(
            504,
            "upstream request timeout",
            ResponseFlags::UPSTREAM_REQUEST_TIMEOUT,
            "upstream_per_try_timeout",
        )
    }

    /// Status, headers and body for the wire. A gRPC client gets 200 with `grpc-status` (trailers-only).
    pub fn into_response(self, grpc: bool) -> (ResponseHead, Body) {
        let mut headers = Headers::with_capacity(self.headers.len() + 3);
        if grpc {
            let code = self.grpc_status.unwrap_or(grpc_status_of(self.status));
            append_all(&mut headers, &self.headers);
            headers.set(Known::ContentType, "application/grpc");
            headers.set(Known::GrpcStatus, code.to_string());
            if !self.body.is_empty() {
                let message = percent_encode_grpc_message(self.body.as_bytes());
                headers.set(Known::GrpcMessage, message);
            }
            let head = ResponseHead {
                status: 200,
                headers,
            };
            return (head, Body::empty());
        }
        if !self.body.is_empty() {
            headers.append(Known::ContentLength, self.body.len().to_string());
            headers.append(Known::ContentType, "text/plain");
        }
        append_all(&mut headers, &self.headers);
        let body = match self.body {
            Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text),
        };
        let head = ResponseHead {
            status: self.status,
            headers,
        };
        (head, Body::full(body))
    }
}

fn append_all(headers: &mut Headers, more: &Headers) {
    for (name, value) in more.iter() {
        if name == Known::ContentType {
            headers.set(name, value);
        } else {
            headers.append(name, value);
        }
    }
}

/// The gRPC status a client is told for an HTTP status. Envoy: `Grpc::Utility::httpToGrpcStatus`.
pub fn grpc_status_of(http: u16) -> i32 {
    match http {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// `grpc-message` encoding: everything but printable ASCII, and `%`, becomes `%XX`.
pub fn percent_encode_grpc_message(text: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(text.len());
    for &byte in text {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_client_gets_trailers_only() {
        let (head, body) = Reject::upstream_timeout().into_response(true);
        assert_eq!(head.status, 200);
        let get = |name: Known| head.headers.known(name).map(Bytes::copy_from_slice);
        assert_eq!(get(Known::GrpcStatus), Some("14".into()));
        assert_eq!(
            get(Known::GrpcMessage),
            Some("upstream request timeout".into())
        );
        assert!(body.is_end_stream());
    }

    #[test]
    fn others_get_status_and_text() {
        let (head, body) = Reject::no_healthy_upstream().into_response(false);
        assert_eq!(head.status, 503);
        assert_eq!(body.exact_length(), Some(19));
        assert_eq!(
            head.headers.known(Known::ContentType),
            Some(&b"text/plain"[..])
        );
        let (head, body) = Reject::no_route().into_response(false);
        assert!(head.headers.is_empty() && body.is_end_stream());
    }

    #[test]
    fn grpc_messages_are_percent_encoded() {
        assert_eq!(
            percent_encode_grpc_message("a%b\né".as_bytes()),
            "a%25b%0A%C3%A9"
        );
    }
}
