//! What a block of headers must be to be a message. RFC 9113 §8.

use std::mem::take;

use bytes::Bytes;

use super::{
    Options,
    hpack::{Field, Fields, Name},
};
use crate::{
    head::{Headers, Known, KnownSet, Protocol, RequestHead, ResponseHead},
    swar,
};

/// Envoy's details of a message that as a whole breaks RFC 9113 §8.
pub(super) const MESSAGING: &str = "http2.violation.of.messaging.rule";
/// Envoy's details of a header that HTTP forbids, by its bytes, its name or its place.
pub(super) const INVALID_FIELD: &str = "http2.invalid.header.field";
/// Envoy's details of a head with more headers than allowed.
pub(super) const TOO_MANY: &str = "http2.too_many_headers";
/// Envoy's details of a head with more bytes than allowed.
pub(super) const TOO_LARGE: &str = "http2.header_list_size_too_large";

/// Judges a header by its bytes alone. The decoder remembers the verdict with the entry of its table.
pub(super) fn valid(name: Name, text: &[u8], value: &[u8]) -> bool {
    match name {
        Name::Known(_) | Name::Status | Name::Protocol => valid_value(value),
        Name::Other => valid_value(value) && all(text, NAME),
        Name::Method => all(value, METHOD_CHAR),
        Name::Scheme => {
            all(value, SCHEME_CHAR) && value.first().is_some_and(u8::is_ascii_alphabetic)
        }
        Name::Authority => valid_authority(value),
        Name::Path => valid_path(value),
    }
}

/// No control characters but tabs. RFC 9110 §5.5.
#[inline]
fn valid_value(value: &[u8]) -> bool {
    !swar::any(value, |word| {
        swar::below_or_del(word, b' ') & swar::differs(word, b'\t')
    })
}

fn valid_path(path: &[u8]) -> bool {
    match path.first() {
        Some(b'/') => !swar::any(path, |word| swar::below_or_del(word, b'!')),
        Some(b'*') => path.len() == 1, // and only with OPTIONS
        _ => false,
    }
}

fn valid_authority(authority: &[u8]) -> bool {
    !authority.is_empty() && swar::is_plain_host(authority) || all(authority, AUTHORITY_CHAR)
}

/// Whether there are characters and all are of a class.
fn all(text: &[u8], class: u8) -> bool {
    let classes = text
        .iter()
        .fold(class, |classes, byte| classes & CLASSES[usize::from(*byte)]);
    !text.is_empty() && classes != 0
}

/// Of a token (RFC 9110 §5.6.2) in lower case.
const NAME: u8 = 1;
/// Of a token.
const METHOD_CHAR: u8 = 2;
/// RFC 3986 §3.1.
const SCHEME_CHAR: u8 = 4;
/// Of a host, a port and, as Envoy takes it, user information.
const AUTHORITY_CHAR: u8 = 8;

static CLASSES: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0x21;
    while byte < 0x7f {
        let char = byte as u8;
        let lower = char.is_ascii_lowercase() || char.is_ascii_digit();
        let punctuation = is_in(char, b"!#$%&'*+-.^_`|~");
        if lower || punctuation {
            table[byte] |= NAME;
        }
        if char.is_ascii_alphanumeric() || punctuation {
            table[byte] |= METHOD_CHAR;
        }
        if char.is_ascii_alphanumeric() || is_in(char, b"+-.") {
            table[byte] |= SCHEME_CHAR;
        }
        if !is_in(char, b"/?#\"<>\\^`{|}") {
            table[byte] |= AUTHORITY_CHAR;
        }
        byte += 1;
    }
    table
};

const fn is_in(byte: u8, list: &[u8]) -> bool {
    let mut index = 0;
    while index < list.len() {
        if list[index] == byte {
            return true;
        }
        index += 1;
    }
    false
}

/// Well-known names with rules of their own.
const DECIDED: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::ContentLength,
    Known::Cookie,
    Known::Host,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::Te,
    Known::TransferEncoding,
    Known::Upgrade,
]);

/// Which rules hold for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
    Trailers,
}

const AUTHORITY: u8 = 1;
const METHOD: u8 = 2;
const PATH: u8 = 4;
const PROTOCOL: u8 = 8;
const SCHEME: u8 = 16;
const STATUS: u8 = 32;

/// A message in the making. Faults are remembered, not returned: the block has to be decoded to its end.
#[derive(Debug)]
pub(super) struct Message {
    kind: Kind,
    /// Pseudo headers there were.
    pseudo: u8,
    /// Whether an ordinary header came.
    regular: bool,
    fault: Option<&'static str>,
    bytes: usize,
    count: usize,
    max_bytes: usize,
    max_count: usize,
    method: Option<Bytes>,
    scheme: Option<Bytes>,
    authority: Option<Bytes>,
    path: Option<Bytes>,
    protocol: Option<Bytes>,
    status: u16,
    host: Option<Bytes>,
    cookies: Vec<u8>,
    content_length: Option<u64>,
    headers: Headers,
}

impl Fields for Message {
    /// Adds a header. After a fault they are only counted.
    // A part of the decoder's loop: as a call it costs half as much again.
    #[inline(always)]
    fn add(&mut self, field: Field<'_>) {
        self.bytes += field.bytes();
        self.count += 1;
        if self.fault.is_some() {
            return;
        }
        if self.bytes > self.max_bytes || self.count > self.max_count || !field.valid {
            return self.refuse();
        }
        match field.name {
            Name::Known(known) if !DECIDED.contains(known) => {
                self.regular = true;
                self.headers
                    .append_lower(Some(known), field.text, field.value);
            }
            name => self.decide(name, field.text, field.value),
        }
    }
}

impl Message {
    pub(super) fn new(kind: Kind, options: &Options) -> Message {
        Message {
            kind,
            pseudo: 0,
            regular: false,
            fault: None,
            bytes: 0,
            count: 0,
            max_bytes: options.max_header_bytes as usize,
            max_count: options.max_headers as usize,
            method: None,
            scheme: None,
            authority: None,
            path: None,
            protocol: None,
            status: 0,
            host: None,
            cookies: Vec::new(),
            content_length: None,
            headers: match kind {
                Kind::Request | Kind::Response => Headers::with_capacity(12),
                Kind::Trailers => Headers::with_capacity(4),
            },
        }
    }

    /// A block that has to be decoded but is nobody's: nothing of it is kept.
    pub(super) fn nobody() -> Message {
        let mut message = Message::new(
            Kind::Trailers,
            &Options {
                max_headers: 0,
                ..Options::default()
            },
        );
        message.fault = Some(MESSAGING);
        message
    }

    #[cold]
    fn refuse(&mut self) {
        self.fail(if self.bytes > self.max_bytes {
            TOO_LARGE
        } else if self.count > self.max_count {
            TOO_MANY
        } else {
            INVALID_FIELD
        });
    }

    /// Adds a header that is not simply a part of the list.
    fn decide(&mut self, name: Name, text: &[u8], value: &[u8]) {
        match name {
            Name::Known(known) => self.known(known, value),
            Name::Other => {
                self.regular = true;
                self.headers.append_lower(None, text, value);
            }
            Name::Method => {
                if self.first(METHOD, Kind::Request) {
                    self.method = Some(shared_method(value));
                }
            }
            Name::Scheme => {
                if self.first(SCHEME, Kind::Request) {
                    self.scheme = Some(shared_scheme(value));
                }
            }
            Name::Authority => {
                if self.first(AUTHORITY, Kind::Request) {
                    self.authority = Some(Bytes::copy_from_slice(value));
                }
            }
            Name::Path => {
                if self.first(PATH, Kind::Request) {
                    self.path = Some(Bytes::copy_from_slice(value));
                }
            }
            Name::Protocol => {
                if self.first(PROTOCOL, Kind::Request) {
                    self.protocol = Some(Bytes::copy_from_slice(value));
                }
            }
            Name::Status => {
                if self.first(STATUS, Kind::Response) {
                    match status(value) {
                        Some(status) => self.status = status,
                        None => self.fail(INVALID_FIELD),
                    }
                }
            }
        }
    }

    /// Whether a pseudo header may stand here: of this kind of message, once, before all others.
    fn first(&mut self, which: u8, kind: Kind) -> bool {
        if self.kind != kind || self.regular || self.pseudo & which != 0 {
            self.fail(INVALID_FIELD);
            return false;
        }
        self.pseudo |= which;
        true
    }

    fn known(&mut self, known: Known, value: &[u8]) {
        self.regular = true;
        match known {
            Known::Connection
            | Known::KeepAlive
            | Known::ProxyConnection
            | Known::TransferEncoding
            | Known::Upgrade => return self.fail(INVALID_FIELD),
            Known::Te if !value.eq_ignore_ascii_case(b"trailers") => {
                return self.fail(INVALID_FIELD);
            }
            Known::Host if self.kind == Kind::Request => {
                if self.host.is_some() {
                    return self.fail(INVALID_FIELD);
                }
                if !valid_authority(value) {
                    return self.fail(INVALID_FIELD);
                }
                self.host = Some(Bytes::copy_from_slice(value));
                return;
            }
            // RFC 9113 §8.2.3: cookies may be split for compression.
            Known::Cookie if self.kind == Kind::Request => {
                if !self.cookies.is_empty() {
                    self.cookies.extend_from_slice(b"; ");
                }
                self.cookies.extend_from_slice(value);
                return;
            }
            Known::ContentLength if self.kind != Kind::Trailers => {
                let Some(length) = length(value) else {
                    return self.fail(INVALID_FIELD);
                };
                // Also when both say the same, as Envoy.
                if self.content_length.replace(length).is_some() {
                    return self.fail(INVALID_FIELD);
                }
            }
            _ => {}
        }
        self.headers
            .append_lower(Some(known), known.as_str().as_bytes(), value);
    }

    fn fail(&mut self, details: &'static str) {
        self.fault.get_or_insert(details);
    }

    /// What `content-length` says.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.content_length
    }

    /// Takes the head of a request.
    ///
    /// # Errors
    /// With Envoy's details when it breaks the rules.
    pub(super) fn request(&mut self, allow_connect: bool) -> Result<RequestHead, &'static str> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        if let Some(host) = self.host.take()
            && self.pseudo & AUTHORITY == 0
        {
            self.authority = Some(host);
            self.pseudo |= AUTHORITY;
        }
        let has = |all: u8| self.pseudo & all == all;
        let mut method = self.method.take().unwrap_or_default();
        let path = self.path.take().unwrap_or_default();
        let connect = &*method == b"CONNECT";
        let extended = has(PROTOCOL);
        // RFC 9113 §8.3.1, §8.5; RFC 8441 §4.
        let complete = if connect && !extended {
            has(METHOD | AUTHORITY) && self.pseudo & (SCHEME | PATH) == 0
        } else {
            has(METHOD | SCHEME | PATH | AUTHORITY) && (!extended || (connect && allow_connect))
        };
        if !complete {
            return Err(MESSAGING);
        }
        if &*path == b"*" && &*method != b"OPTIONS" {
            return Err(INVALID_FIELD);
        }
        if extended {
            let protocol = self.protocol.take().unwrap_or_default();
            if protocol.is_empty() {
                return Err(INVALID_FIELD);
            }
            method = Bytes::from_static(b"GET");
            self.headers.append(Known::Upgrade, &protocol);
        }
        if !self.cookies.is_empty() {
            self.headers.append(Known::Cookie, &self.cookies);
        }
        Ok(RequestHead {
            method,
            scheme: self
                .scheme
                .take()
                .unwrap_or_else(|| Bytes::from_static(b"http")),
            authority: self.authority.take().unwrap_or_default(),
            path,
            protocol: Protocol::Http2,
            headers: take(&mut self.headers),
        })
    }

    /// Takes the head of a response.
    ///
    /// # Errors
    /// With Envoy's details when it breaks the rules.
    pub(super) fn response(&mut self) -> Result<ResponseHead, &'static str> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        // RFC 9113 §8.6: there is no 101 in HTTP/2.
        if self.status < 100 || self.status == 101 {
            return Err(MESSAGING);
        }
        Ok(ResponseHead {
            status: self.status,
            headers: take(&mut self.headers),
        })
    }

    /// Takes trailers.
    ///
    /// # Errors
    /// With Envoy's details when they break the rules.
    pub(super) fn trailers(&mut self) -> Result<Headers, &'static str> {
        match self.fault {
            Some(fault) => Err(fault),
            None => Ok(take(&mut self.headers)),
        }
    }
}

fn shared_method(method: &[u8]) -> Bytes {
    match method {
        b"GET" => Bytes::from_static(b"GET"),
        b"POST" => Bytes::from_static(b"POST"),
        b"PUT" => Bytes::from_static(b"PUT"),
        b"HEAD" => Bytes::from_static(b"HEAD"),
        b"DELETE" => Bytes::from_static(b"DELETE"),
        b"OPTIONS" => Bytes::from_static(b"OPTIONS"),
        b"PATCH" => Bytes::from_static(b"PATCH"),
        b"CONNECT" => Bytes::from_static(b"CONNECT"),
        _ => Bytes::copy_from_slice(method),
    }
}

/// Schemes are the same in any case (RFC 3986 §3.1); what decides by them sees lower case only.
fn shared_scheme(scheme: &[u8]) -> Bytes {
    let known = |scheme: &[u8]| match scheme {
        b"http" => Some(Bytes::from_static(b"http")),
        b"https" => Some(Bytes::from_static(b"https")),
        _ => None,
    };
    known(scheme).unwrap_or_else(|| {
        let scheme = scheme.to_ascii_lowercase();
        known(&scheme).unwrap_or_else(|| Bytes::from(scheme))
    })
}

fn status(value: &[u8]) -> Option<u16> {
    let [a, b, c] = value else { return None };
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| u16::from(byte - b'0'));
    let status = digit(a)? * 100 + digit(b)? * 10 + digit(c)?;
    (status >= 100).then_some(status)
}

fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0u64, |length, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        length.checked_mul(10)?.checked_add(digit)
    })
}
