//! HTTP/2 (RFC 9113) and HPACK (RFC 7541) for both ends of a connection, without I/O and without a clock.
//!
//! Bytes that came go into [`Connection::receive`], which hands out [`Event`]s; what is to be sent is queued by
//! [`Connection::respond`], [`Connection::send_data`] and so on, and taken by [`Connection::output`] and
//! [`Connection::advance`]. A turn of the driver is: read, `receive`, act on the events, write what
//! `output` gives until it gives nothing, then ask [`Connection::next_writable`] who may send more.
//!
//! `frame` is the layout of frames, `hpack` the compression of headers, `message` the rules of heads,
//! `connection` the state of streams and windows, `output` what waits for the socket.

use std::fmt;

use bytes::Bytes;

use crate::head::{Headers, RequestHead, ResponseHead};

mod connection;
mod frame;
pub mod hpack;
mod message;
mod output;
mod streams;

pub use connection::Connection;

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The peer opens streams.
    Server,
    /// We open streams.
    Client,
}

/// Settings and limits. Names and defaults are Envoy's (`Http2ProtocolOptions`, the connection manager and
/// the overload runtime keys) where it has them. Shared by all connections of a listener or a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Largest dynamic table, bytes, of both directions. 4096.
    pub hpack_table_size: u32,
    /// Streams the peer may have open at once; as a client the most that we open. 1024.
    pub max_concurrent_streams: u32,
    /// Receive window of a stream, bytes. 16 MiB.
    pub initial_stream_window_size: u32,
    /// Receive window of the connection, bytes. 24 MiB.
    pub initial_connection_window_size: u32,
    /// Whether extended CONNECT (RFC 8441) is offered, as a server.
    pub allow_connect: bool,
    /// Frames of any kind that may wait to be written before the connection fails. 10000.
    pub max_outbound_frames: u32,
    /// The same of PING, SETTINGS and RST_STREAM. 1000.
    pub max_outbound_control_frames: u32,
    /// HEADERS, CONTINUATION and DATA frames in a row without payload and end of stream that are borne. 1.
    pub max_consecutive_inbound_frames_with_empty_payload: u32,
    /// PRIORITY frames borne, times one more than the streams opened. 100.
    pub max_inbound_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames borne: 5 + 2 x (streams + this x DATA frames sent). 10.
    pub max_inbound_window_update_frames_per_data_frame_sent: u32,
    /// Whether a malformed message ends its stream only instead of the connection. False.
    pub stream_error_on_invalid_http_messaging: bool,
    /// Whether literals are sent Huffman-coded when that is shorter. False: it costs both sides more than
    /// the bytes do.
    pub enable_huffman_encoding: bool,
    /// Most bytes of one decoded head, names and values, those left out included. 60 KiB.
    pub max_header_bytes: u32,
    /// Most headers of one head. 100.
    pub max_headers: u32,
    /// Bytes of one stream that may wait in [`Connection`] before [`Connection::send_capacity`] is 0. 256 KiB.
    pub send_buffer_bytes: u32,
    /// From this many ended streams on, the connection fails when half of them were reset before
    /// their time. 500.
    pub premature_reset_total_stream_count: u32,
    /// Age under which a reset by the client is before its time, milliseconds. 1000.
    pub premature_reset_min_stream_lifetime_ms: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            hpack_table_size: 4096,
            max_concurrent_streams: 1024,
            initial_stream_window_size: 16 << 20,
            initial_connection_window_size: 24 << 20,
            allow_connect: false,
            max_outbound_frames: 10_000,
            max_outbound_control_frames: 1000,
            max_consecutive_inbound_frames_with_empty_payload: 1,
            max_inbound_priority_frames_per_stream: 100,
            max_inbound_window_update_frames_per_data_frame_sent: 10,
            stream_error_on_invalid_http_messaging: false,
            enable_huffman_encoding: false,
            max_header_bytes: 60 << 10,
            max_headers: 100,
            send_buffer_bytes: 256 << 10,
            premature_reset_total_stream_count: 500,
            premature_reset_min_stream_lifetime_ms: 1000,
        }
    }
}

/// One stream of a connection. Stays unique after the stream is gone: calls with it then do nothing or
/// say [`Gone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId {
    id: u32,
    slot: u32,
}

impl StreamId {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        self.id
    }

    /// A small number that no other open stream of the connection has: an index for the driver's own state.
    /// Another stream may get it once this one has ended both ways or was reset.
    pub fn slot(self) -> usize {
        self.slot as usize
    }
}

/// An error code of RFC 9113 §7, of RST_STREAM and GOAWAY.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Code(pub u32);

macro_rules! codes {
    ($($name:ident = $value:literal),+ $(,)?) => {
        #[allow(missing_docs, reason = "each is the name in RFC 9113 §7")]
        impl Code {
            $(pub const $name: Code = Code($value);)+
        }

        impl fmt::Debug for Code {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($value => f.write_str(stringify!($name)),)+
                    other => write!(f, "{other:#x}"),
                }
            }
        }
    };
}

codes! {
    NO_ERROR = 0x0,
    PROTOCOL_ERROR = 0x1,
    INTERNAL_ERROR = 0x2,
    FLOW_CONTROL_ERROR = 0x3,
    SETTINGS_TIMEOUT = 0x4,
    STREAM_CLOSED = 0x5,
    FRAME_SIZE_ERROR = 0x6,
    REFUSED_STREAM = 0x7,
    CANCEL = 0x8,
    COMPRESSION_ERROR = 0x9,
    CONNECT_ERROR = 0xa,
    ENHANCE_YOUR_CALM = 0xb,
    INADEQUATE_SECURITY = 0xc,
    HTTP_1_1_REQUIRED = 0xd,
}

/// What the peer did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request (server). An extended CONNECT is a GET with an `upgrade` header; [`Connection::respond`] makes
    /// its `101` a `200` again. Cookies are one header; `host` has become the authority.
    Request {
        /// Its stream, new.
        stream: StreamId,
        /// The head; the authority is empty when neither `:authority` nor `host` was sent.
        head: RequestHead,
        /// Whether no body follows.
        end: bool,
    },
    /// A request that breaks the rules so that it gets no stream: it was reset, and unless
    /// `stream_error_on_invalid_http_messaging` is set or it is only too large the connection fails next.
    Malformed {
        /// Envoy's details.
        details: &'static str,
    },
    /// The final response (client). The `200` to an extended CONNECT is a `101` with `upgrade`.
    Response {
        /// Its stream.
        stream: StreamId,
        /// The head.
        head: ResponseHead,
        /// Whether no body follows.
        end: bool,
    },
    /// A `1xx` response (client).
    Informational {
        /// Its stream.
        stream: StreamId,
        /// The head.
        head: ResponseHead,
    },
    /// A piece of a body, perhaps empty when it is the last one. [`Connection::consumed`] must be told once the
    /// bytes have gone on, or the peer stops.
    Data {
        /// Its stream.
        stream: StreamId,
        /// The bytes; pieces do not follow the frames.
        data: Bytes,
        /// Whether it is the last piece.
        end: bool,
    },
    /// The end of a body, with trailers.
    Trailers {
        /// Its stream.
        stream: StreamId,
        /// Them.
        trailers: Headers,
    },
    /// The stream is over before its end; nothing more comes of it.
    Reset {
        /// Its stream.
        stream: StreamId,
        /// The code the peer gave, or that we gave it. `REFUSED_STREAM` also when the peer's GOAWAY says that it
        /// never saw the stream: it may be tried again elsewhere.
        code: Code,
        /// Envoy's details when it was we who found fault with what the peer sent.
        local: Option<&'static str>,
    },
    /// The peer's settings came, for the first time or again. See [`Connection::can_open`].
    Settings,
    /// The peer acknowledged our settings.
    SettingsAcknowledged,
    /// The peer will accept no new streams. Those it did not see have been told by [`Event::Reset`].
    GoAway {
        /// Its code.
        code: Code,
        /// Whether it announces only (last stream 2^31-1) and will name the last stream later.
        notice: bool,
    },
    /// The answer to [`Connection::ping`].
    Pong {
        /// What was sent.
        payload: [u8; 8],
    },
}

/// The connection cannot go on. A GOAWAY with `code` waits in the output: write it, then close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("HTTP/2 connection error {code:?}: {details}")]
pub struct Fatal {
    /// What the GOAWAY says.
    pub code: Code,
    /// Envoy's details, as `http2.inbound_empty_frames_flood`.
    pub details: &'static str,
    /// Which counter of Envoy's `http2.` statistics this is, as `inbound_empty_frames_flood`, if any.
    pub counter: Option<&'static str>,
}

impl Fatal {
    /// Whether a message broke the rules (RFC 9113 §8.1.1), and not the framing.
    pub fn is_malformed_message(&self) -> bool {
        [message::MESSAGING, message::INVALID_FIELD].contains(&self.details)
    }
}

/// The stream has ended or was reset before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is gone")]
pub struct Gone;

/// Why no stream could be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// As many are open as the peer or we allow.
    #[error("too many streams are open")]
    Concurrency,
    /// The peer or we said GOAWAY, or the numbers are used up.
    #[error("the connection takes no new streams")]
    GoingAway,
    /// The peer does not speak extended CONNECT.
    #[error("the peer does not allow extended CONNECT")]
    NoExtendedConnect,
}
