//! HTTP/1.1 (and 1.0) as bytes: heads parsed and written, bodies decoded. RFC 9112, as strict as Envoy is by default.
//!
//! Parsing looks at bytes and takes nothing: the caller drops `used` bytes from its buffer. What concerns
//! one hop only (`connection` and what it nominates, `transfer-encoding`, …) is taken out of the heads and
//! told in [`RequestMeta`] and [`ResponseMeta`].

mod body;
mod lenient;
mod ordinary;
mod parse;
mod write;

pub use body::{BodyDecoder, Piece};
pub use parse::{Scan, parse_request, parse_response};
pub use write::{
    CHUNK_END, Connection, Reply, WriteError, write_chunk, write_chunk_size, write_continue,
    write_last_chunk, write_request, write_response,
};

/// What is accepted from a peer. `Default` is what Envoy does without configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest head, and longest trailers, in bytes on the wire. Envoy: `max_request_headers_kb`.
    pub head_bytes: usize,
    /// Most headers of a head, and most trailers. Envoy: `max_headers_count`.
    pub headers: usize,
    /// Take a message with both `transfer-encoding: chunked` and `content-length`, without the latter.
    pub allow_chunked_length: bool,
    /// Take `GET http://host/path`; otherwise the target is the path as it stands.
    pub allow_absolute_url: bool,
    /// Take methods that are not registered.
    pub allow_custom_methods: bool,
    /// Pass trailers on; otherwise they are read and dropped.
    pub enable_trailers: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            head_bytes: 60 * 1024,
            headers: 100,
            allow_chunked_length: false,
            allow_absolute_url: true,
            allow_custom_methods: false,
            enable_trailers: false,
        }
    }
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// As many bytes as `content-length` says.
    Length(u64),
    /// `transfer-encoding: chunked`.
    Chunked,
    /// Up to the end of the connection: old responses, and whatever follows an upgrade or CONNECT.
    UntilClose,
}

/// Outcome of looking for a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed<T> {
    /// The head is not complete: call again with more bytes and the same [`Scan`].
    Partial,
    /// The head took the first `used` bytes.
    Complete {
        /// What was read.
        head: T,
        /// Bytes of the head, empty lines before it included.
        used: usize,
    },
}

/// Whether a request asks the connection to become something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// An ordinary request.
    None,
    /// `upgrade: websocket` and the like; the header stays in the head, `connection` too. Never `h2c`.
    Protocol,
    /// `CONNECT`.
    Connect,
}

/// What a request says about its hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestMeta {
    /// Of the body. `UntilClose` for upgrades: what follows is the tunnel's.
    pub framing: Framing,
    /// Whether the connection may serve another request.
    pub keep_alive: bool,
    /// Whether the connection is to become something else.
    pub upgrade: Upgrade,
    /// `expect: 100-continue`: the client waits for `100` before it sends the body.
    pub expect_continue: bool,
    /// Whether there is an authority, be it an empty one.
    pub host_given: bool,
}

/// What a response says about its hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseMeta {
    /// Of the body. `UntilClose` for `101` and for what answers a CONNECT with 2xx, too.
    pub framing: Framing,
    /// Whether the connection may be used for another request after the body.
    pub keep_alive: bool,
    /// The response is HTTP/1.0.
    pub http_10: bool,
}

/// Why bytes of a peer are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not HTTP/1.x, or a part of a message is malformed.
    #[error("malformed HTTP/1 message")]
    Codec,
    /// A value holds bytes that none may.
    #[error("header value contains invalid characters")]
    InvalidCharacters,
    /// The head, or the trailers, are longer than the limit.
    #[error("headers size exceeds limit")]
    HeadersTooLarge,
    /// There are more headers, or trailers, than the limit.
    #[error("headers count exceeds limit")]
    TooManyHeaders,
    /// A transfer coding other than `chunked`.
    #[error("unsupported transfer encoding")]
    InvalidTransferEncoding,
    /// Both `content-length` and `transfer-encoding`.
    #[error("both content-length and transfer-encoding are set")]
    ChunkedContentLength,
    /// A CONNECT with a body.
    #[error("unsupported content length")]
    BodyDisallowed,
    /// An absolute target that is no URL, or a CONNECT target that is no authority.
    #[error("invalid url in request line")]
    InvalidUrl,
    /// An absolute target of a scheme other than http and https.
    #[error("invalid scheme")]
    InvalidScheme,
    /// `Host`, or the authority of the target, has characters that no authority has.
    #[error("invalid authority")]
    InvalidAuthority,
    /// `connection` nominates what it may not.
    #[error("invalid nominated headers in connection")]
    ConnectionHeader,
    /// The connection ended within a body.
    #[error("body ended early")]
    Truncated,
}

impl ParseError {
    /// What a server answers before it closes the connection.
    pub fn status(self) -> u16 {
        match self {
            ParseError::HeadersTooLarge | ParseError::TooManyHeaders => 431,
            ParseError::InvalidTransferEncoding => 501,
            ParseError::Codec
            | ParseError::InvalidCharacters
            | ParseError::ChunkedContentLength
            | ParseError::BodyDisallowed
            | ParseError::InvalidUrl
            | ParseError::InvalidScheme
            | ParseError::InvalidAuthority
            | ParseError::ConnectionHeader
            | ParseError::Truncated => 400,
        }
    }

    /// Envoy's `%RESPONSE_CODE_DETAILS%`.
    pub fn details(self) -> &'static str {
        match self {
            ParseError::Codec | ParseError::Truncated => "http1.codec_error",
            ParseError::InvalidCharacters => "http1.invalid_characters",
            ParseError::HeadersTooLarge => "http1.headers_too_large",
            ParseError::TooManyHeaders => "http1.too_many_headers",
            ParseError::InvalidTransferEncoding => "http1.invalid_transfer_encoding",
            ParseError::ChunkedContentLength => "http1.content_length_and_chunked_not_allowed",
            ParseError::BodyDisallowed => "http1.body_disallowed",
            ParseError::InvalidUrl => "http1.invalid_url",
            ParseError::InvalidScheme => "http1.invalid_scheme",
            ParseError::InvalidAuthority => "http.invalid_authority",
            ParseError::ConnectionHeader => "http1.connection_header_rejected",
        }
    }
}

#[cfg(test)]
mod tests;
