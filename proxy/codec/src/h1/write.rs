//! Bytes out of heads.

use std::ops::Range;

use bytes::BytesMut;

use crate::{
    h1::{Framing, parse::content_length},
    head::{Headers, Known, KnownSet, RequestHead, ResponseHead},
    swar,
};

/// What follows the bytes of a chunk.
pub const CHUNK_END: &[u8] = b"\r\n";

/// A head cannot be written: a method, target, name or value has bytes that would end it. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("head holds bytes that HTTP/1 cannot carry")]
pub struct WriteError;

/// What a response says about its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connection {
    /// What the head says, which is nothing but for upgrades: it stays open.
    #[default]
    Unsaid,
    /// `connection: keep-alive`, for HTTP/1.0 clients.
    KeepAlive,
    /// `connection: close`
    Close,
}

/// How a response is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Answer as `HTTP/1.0`, which has no chunks.
    pub http_10: bool,
    /// Replaces a `connection` of the head.
    pub connection: Connection,
    /// It answers a HEAD request: the head is that of a body of unknown length if it has no length.
    pub to_head: bool,
}

/// Writes the head of a request with what its `framing` needs: `content-length` (any other in the head goes)
/// or `transfer-encoding`; `content-length: 0` for methods that could have a body and have none.
/// `connection: Upgrade` is added to an `upgrade` without one.
///
/// # Errors
/// When the head would not be read as it was meant.
pub fn write_request(
    out: &mut BytesMut,
    head: &RequestHead,
    framing: Framing,
) -> Result<(), WriteError> {
    let connect = &*head.method == b"CONNECT";
    let target = match (connect, &*head.path) {
        (true, _) => &*head.authority,
        (false, b"") => b"/",
        (false, path) => path,
    };
    if head.method.is_empty() || target.is_empty() {
        return Err(WriteError);
    }
    if !visible(&head.method) || !visible(target) {
        return Err(WriteError);
    }
    let room = head.method.len() + target.len() + head.authority.len() + 96;
    let mut head_out = HeadWriter::begin(out, room, &head.headers);
    head_out.put(&head.method);
    head_out.put(b" ");
    head_out.put(target);
    head_out.put(b" HTTP/1.1\r\nhost: ");
    head_out.foreign(&head.authority);
    head_out.put(b"\r\n");
    let length = match framing {
        Framing::None => Length::Is(0),
        Framing::Length(length) => Length::Is(length),
        Framing::Chunked => Length::Unknown,
        Framing::UntilClose => Length::Any,
    };
    let found = head_out.headers(&head.headers, length, true);
    match framing {
        Framing::None => {
            let bodiless = matches!(
                &*head.method,
                b"GET" | b"HEAD" | b"DELETE" | b"TRACE" | b"CONNECT"
            );
            if !found.content_length && !bodiless {
                head_out.put(b"content-length: 0\r\n");
            }
        }
        Framing::Length(length) => {
            if !found.content_length {
                head_out.content_length(length);
            }
        }
        Framing::Chunked => head_out.put(b"transfer-encoding: chunked\r\n"),
        Framing::UntilClose => {}
    }
    if found.upgrade && !found.connection {
        head_out.put(b"connection: Upgrade\r\n");
    }
    head_out.finish()
}

/// Writes the head of a response, 1xx ones as well, with what its `framing` needs: `content-length` (any other
/// in the head goes; for no body: `0`, but for 1xx, 204, 304 and answers to HEAD), or `transfer-encoding`.
///
/// # Errors
/// When the head would not be read as it was meant.
pub fn write_response(
    out: &mut BytesMut,
    head: &ResponseHead,
    framing: Framing,
    reply: Reply,
) -> Result<(), WriteError> {
    if !(100..=999).contains(&head.status) {
        return Err(WriteError);
    }
    let mut head_out = HeadWriter::begin(out, 128, &head.headers);
    match (reply.http_10, head.status) {
        (false, 200) => head_out.put(b"HTTP/1.1 200 OK\r\n"),
        (http_10, status) => {
            head_out.put(if http_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
            head_out.decimal(u64::from(status));
            head_out.put(b" ");
            head_out.put(reason(status).as_bytes());
            head_out.put(b"\r\n");
        }
    }
    let keeps = reply.connection == Connection::Unsaid;
    let lengthless = matches!(head.status, 100..=199 | 204);
    let length = match framing {
        _ if lengthless => Length::Unknown,
        Framing::None if reply.to_head || head.status == 304 => Length::Any,
        Framing::None => Length::Is(0),
        Framing::Length(length) => Length::Is(length),
        Framing::Chunked => Length::Unknown,
        Framing::UntilClose => Length::Any,
    };
    let found = head_out.headers(&head.headers, length, keeps);
    match framing {
        _ if lengthless || found.content_length || head.status == 304 => {}
        // As Envoy: the body that GET would give has chunks.
        Framing::None if reply.to_head => {
            if !reply.http_10 {
                head_out.put(b"transfer-encoding: chunked\r\n");
            }
        }
        Framing::None => head_out.put(b"content-length: 0\r\n"),
        Framing::Length(length) => head_out.content_length(length),
        Framing::Chunked => head_out.put(b"transfer-encoding: chunked\r\n"),
        Framing::UntilClose => {}
    }
    match reply.connection {
        Connection::Unsaid if found.upgrade && !found.connection && head.status == 101 => {
            head_out.put(b"connection: Upgrade\r\n");
        }
        Connection::Unsaid => {}
        Connection::KeepAlive => head_out.put(b"connection: keep-alive\r\n"),
        Connection::Close => head_out.put(b"connection: close\r\n"),
    }
    head_out.finish()
}

/// Writes `HTTP/1.1 100 Continue`.
pub fn write_continue(out: &mut BytesMut) {
    out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
}

/// Writes what precedes the bytes of a chunk; [`CHUNK_END`] follows them. A chunk of 0 bytes would end the body.
pub fn write_chunk_size(out: &mut BytesMut, len: usize) {
    debug_assert!(len > 0, "an empty chunk ends the body");
    let mut digits = [0; 18];
    let mut at = 16;
    let mut rest = len;
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdef"[rest & 15];
        rest >>= 4;
        if rest == 0 {
            break;
        }
    }
    digits[16..].copy_from_slice(b"\r\n");
    out.extend_from_slice(&digits[at..]);
}

/// Writes a whole chunk; nothing when `data` is empty.
pub fn write_chunk(out: &mut BytesMut, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    out.reserve(data.len() + 20);
    write_chunk_size(out, data.len());
    out.extend_from_slice(data);
    out.extend_from_slice(CHUNK_END);
}

/// Ends a chunked body. Trailers that would not be read as they were meant are left out, all of them.
pub fn write_last_chunk(out: &mut BytesMut, trailers: Option<&Headers>) {
    out.extend_from_slice(b"0\r\n");
    let Some(trailers) = trailers else {
        out.extend_from_slice(b"\r\n");
        return;
    };
    let mut block = HeadWriter::begin(out, 2, trailers);
    block.headers(trailers, Length::Unknown, false);
    if block.finish().is_err() {
        out.extend_from_slice(b"\r\n");
    }
}

/// Which `content-length` of a head is written: what the body does decides, not what the head says.
#[derive(Clone, Copy)]
enum Length {
    Is(u64),
    Unknown,
    Any,
}

impl Length {
    fn allows(self, value: &[u8]) -> bool {
        match self {
            Length::Is(length) => content_length(value) == Ok(length),
            Length::Unknown => false,
            Length::Any => true,
        }
    }
}

/// What the headers of a head had.
#[derive(Default)]
struct Found {
    content_length: bool,
    connection: bool,
    upgrade: bool,
}

/// A head being written. Whatever its parts hold, it comes out with the lines that were meant or not at all.
struct HeadWriter<'a> {
    out: &'a mut BytesMut,
    start: usize,
    /// A part would have made other lines.
    broken: bool,
}

impl<'a> HeadWriter<'a> {
    /// Makes room once for `extra` bytes and the headers.
    fn begin(out: &'a mut BytesMut, extra: usize, headers: &Headers) -> HeadWriter<'a> {
        out.reserve(extra + headers.written_len());
        HeadWriter {
            start: out.len(),
            out,
            broken: false,
        }
    }

    /// Writes what is known to be right.
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Writes a part of a line that came from elsewhere.
    #[inline]
    fn foreign(&mut self, bytes: &[u8]) {
        self.broken |= swar::breaks_line(bytes);
        self.put(bytes);
    }

    /// Writes the headers: those that were read as lines in runs, as they stand.
    fn headers(&mut self, headers: &Headers, length: Length, connection: bool) -> Found {
        let mut found = Found::default();
        let mut run = 0..0;
        for header in headers.written() {
            if let Some(known) = header.known().filter(|known| DECIDED.contains(*known)) {
                match known {
                    Known::ContentLength => {
                        if found.content_length || !length.allows(header.value()) {
                            continue;
                        }
                        found.content_length = true;
                    }
                    Known::Connection => {
                        if !connection {
                            continue;
                        }
                        found.connection = true;
                    }
                    Known::Upgrade => found.upgrade = true,
                    _ => continue,
                }
            }
            match header.line() {
                Some(line) if line.start == run.end => run.end = line.end,
                Some(line) => {
                    self.read_lines(headers, run);
                    run = line;
                }
                None => {
                    self.read_lines(headers, run);
                    run = 0..0;
                    match header.known() {
                        Some(known) => self.put(known.as_str().as_bytes()),
                        None => self.foreign(header.name()),
                    }
                    self.put(b": ");
                    self.foreign(header.value());
                    self.put(b"\r\n");
                }
            }
        }
        self.read_lines(headers, run);
        found
    }

    /// Writes lines that the parser has read, which need no look.
    #[inline]
    fn read_lines(&mut self, headers: &Headers, run: Range<usize>) {
        if !run.is_empty() {
            self.put(headers.text().get(run).unwrap_or_default());
        }
    }

    fn content_length(&mut self, length: u64) {
        self.put(b"content-length: ");
        self.decimal(length);
        self.put(b"\r\n");
    }

    fn decimal(&mut self, number: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        let mut rest = number;
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.put(&digits[at..]);
    }

    /// Ends the head, unless it has lines that were not meant.
    fn finish(mut self) -> Result<(), WriteError> {
        if self.broken {
            self.out.truncate(self.start);
            return Err(WriteError);
        }
        self.put(b"\r\n");
        Ok(())
    }
}

/// Headers that are not written as they are in any case.
const DECIDED: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::ContentLength,
    Known::Host,
    Known::TransferEncoding,
    Known::Upgrade,
]);

/// Whether there are no spaces and control characters.
fn visible(text: &[u8]) -> bool {
    !swar::any(text, |word| swar::below(word, b'!'))
}

/// Envoy's phrase for a status; "Unknown" for one that has none.
fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        102 => "Processing",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        208 => "Already Reported",
        226 => "IM Used",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        305 => "Use Proxy",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Payload Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Entity",
        423 => "Locked",
        424 => "Failed Dependency",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        506 => "Variant Also Negotiates",
        507 => "Insufficient Storage",
        508 => "Loop Detected",
        510 => "Not Extended",
        511 => "Network Authentication Required",
        _ => "Unknown",
    }
}
