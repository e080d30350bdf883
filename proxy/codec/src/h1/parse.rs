//! Heads out of bytes.
//!
//! [`ordinary`] reads what nearly all send, `httparse` what else is well formed. What it refuses and Envoy's parser (balsa) takes is rewritten once
//! into what it means and read again ([`lenient`]): folded lines, a CR within a value, unusual whitespace in
//! the first line, versions other than 1.0 and 1.1. Nothing of the kind is ever forwarded.

use std::mem::MaybeUninit;

use bytes::Bytes;

use crate::{
    h1::{
        Framing, Limits, ParseError, Parsed, RequestMeta, ResponseMeta, Upgrade, lenient, ordinary,
    },
    head::{Headers, Known, KnownSet, Protocol, RequestHead, ResponseHead},
    swar,
};

/// Heads of up to so many headers are read without an allocation for their places.
const STACK_HEADERS: usize = 128;
/// Envoy: `MAX_ALLOWED_NOMINATED_HEADERS`.
const NOMINATED: usize = 10;
/// Envoy: `MAX_ALLOWED_TE_VALUE_SIZE`.
const TE_BYTES: usize = 256;
/// Room in a new head for what the proxy adds to it.
const ADDED_BYTES: usize = 256;
const ADDED_HEADERS: usize = 8;
/// Headers, beside those, that a list has room for from the beginning.
const READ_HEADERS: usize = 16;

/// How far a head that is not complete was looked at, so that no byte is searched twice.
/// `Default` before each head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scan {
    /// Empty lines before the head.
    start: usize,
    /// Bytes that hold no end of a head; 0 before the first look.
    seen: usize,
}

impl Scan {
    /// The bytes that may be a head now.
    fn begin<'a>(
        &mut self,
        buf: &'a [u8],
        limits: &Limits,
        may_begin: fn(u8, &Limits) -> bool,
        empty_lines: bool,
    ) -> Result<Option<&'a [u8]>, ParseError> {
        if empty_lines && self.seen <= self.start {
            let rest = buf.get(self.start..).unwrap_or_default();
            self.start += rest
                .iter()
                .take_while(|b| matches!(b, b'\r' | b'\n'))
                .count();
        }
        let head = buf.get(self.start..).unwrap_or_default();
        let Some(first) = head.first() else {
            self.wait(buf, limits)?;
            return Ok(None);
        };
        if self.seen <= self.start {
            return if may_begin(*first, limits) {
                Ok(Some(head))
            } else {
                Err(ParseError::Codec)
            };
        }
        // The end of the head may have begun in the last two bytes.
        let from = self.seen.saturating_sub(2).max(self.start) - self.start;
        if lenient::end(head, from).is_some() {
            return Ok(Some(head));
        }
        self.wait(buf, limits)?;
        Ok(None)
    }

    fn wait(&mut self, buf: &[u8], limits: &Limits) -> Result<(), ParseError> {
        self.seen = buf.len();
        // Empty lines count as well: they stay in the buffer.
        if buf.len() > limits.head_bytes {
            return Err(ParseError::HeadersTooLarge);
        }
        Ok(())
    }
}

/// A head and its length, if the text holds a whole one.
type Read<T> = Result<Option<(T, usize)>, Trouble>;

/// Why a text is not a head.
enum Trouble {
    /// Its form; it may be one in another. The error is for when it is not.
    Form(ParseError),
    /// What it says.
    Refused(ParseError),
}

impl From<ParseError> for Trouble {
    fn from(error: ParseError) -> Trouble {
        Trouble::Refused(error)
    }
}

impl From<httparse::Error> for Trouble {
    fn from(error: httparse::Error) -> Trouble {
        match error {
            httparse::Error::TooManyHeaders => Trouble::Refused(ParseError::TooManyHeaders),
            httparse::Error::HeaderValue => Trouble::Form(ParseError::InvalidCharacters),
            httparse::Error::HeaderName
            | httparse::Error::NewLine
            | httparse::Error::Status
            | httparse::Error::Token
            | httparse::Error::Version => Trouble::Form(ParseError::Codec),
        }
    }
}

/// Reads the head of a request from the beginning of `buf`, after any empty lines.
///
/// # Errors
/// When the bytes are no acceptable head; nothing that follows on the connection can be trusted then.
pub fn parse_request(
    buf: &[u8],
    limits: &Limits,
    scan: &mut Scan,
) -> Result<Parsed<(RequestHead, RequestMeta)>, ParseError> {
    let Some(text) = scan.begin(buf, limits, begins_method, true)? else {
        return Ok(Parsed::Partial);
    };
    parse(
        buf,
        text,
        limits,
        scan,
        |text| read_request(text, limits),
        lenient::request_line,
    )
}

/// Reads the head of a response from the beginning of `buf`; `method` is that of its request. Call it
/// again for the final head after one of 1xx (but not after 101).
///
/// # Errors
/// When the bytes are no acceptable head.
pub fn parse_response(
    buf: &[u8],
    limits: &Limits,
    method: &[u8],
    scan: &mut Scan,
) -> Result<Parsed<(ResponseHead, ResponseMeta)>, ParseError> {
    let Some(text) = scan.begin(buf, limits, |first, _| first == b'H', false)? else {
        return Ok(Parsed::Partial);
    };
    parse(
        buf,
        text,
        limits,
        scan,
        |text| read_response(text, limits, method),
        lenient::status_line,
    )
}

#[inline]
fn parse<T>(
    buf: &[u8],
    text: &[u8],
    limits: &Limits,
    scan: &mut Scan,
    read: impl Fn(&[u8]) -> Read<T>,
    first_line: fn(&[u8], &mut Vec<u8>) -> Option<()>,
) -> Result<Parsed<T>, ParseError> {
    let found = match read(text) {
        Ok(found) => found,
        Err(Trouble::Refused(error)) => return Err(error),
        Err(Trouble::Form(_)) => {
            let end = lenient::end(text, 0);
            let lines = match end {
                Some(end) => end,
                None => text
                    .iter()
                    .rposition(|b| *b == b'\n')
                    .map_or(0, |last| last + 1),
            };
            if lines > limits.head_bytes {
                return Err(ParseError::HeadersTooLarge);
            }
            let lines = text.get(..lines).unwrap_or_default();
            let text = lenient::head(lines, first_line).ok_or(ParseError::Codec)?;
            match (read(&text), end) {
                (Ok(Some((head, _))), Some(end)) => Some((head, end)),
                // Bad lines are refused at once, others wait for the rest.
                (Ok(None), None) => None,
                (Err(Trouble::Refused(error) | Trouble::Form(error)), _) => return Err(error),
                _ => return Err(ParseError::Codec),
            }
        }
    };
    match found {
        Some((_, used)) if used > limits.head_bytes => Err(ParseError::HeadersTooLarge),
        Some((head, used)) => Ok(Parsed::Complete {
            head,
            used: scan.start + used,
        }),
        None => {
            scan.wait(buf, limits)?;
            Ok(Parsed::Partial)
        }
    }
}

/// Gives `httparse` places for as many headers as there may be.
macro_rules! places {
    ($places:ident, $limits:expr) => {
        let mut stack = [const { MaybeUninit::uninit() }; STACK_HEADERS];
        let mut heap = Vec::new();
        let $places: &mut [MaybeUninit<httparse::Header<'_>>] =
            match stack.get_mut(..$limits.headers) {
                Some(places) => places,
                None => {
                    heap.resize_with($limits.headers, MaybeUninit::uninit);
                    &mut heap
                }
            };
    };
}

/// The headers of a head.
struct Fields<'a> {
    headers: Headers,
    noted: Noted<'a>,
    /// Bytes up to their end.
    used: usize,
}

impl<'a> Fields<'a> {
    /// Those of an ordinary head, from `from` on.
    #[inline]
    fn ordinary(text: &'a [u8], from: usize, of: Of, limits: &Limits) -> Option<Fields<'a>> {
        let lines = text.get(from..)?;
        let mut headers = Headers::with_places(READ_HEADERS + ADDED_HEADERS);
        let mut noted = Noted::new(of);
        let (len, upper) = ordinary::headers(lines, limits.headers, |name, value, place| {
            let known = Known::lookup_token(name);
            if noted.keep(known, value) {
                headers.add_place(known, place);
            }
        })?;
        // Without the empty line at its end, so that what is added follows at once.
        headers.set_text(lines.get(..len.checked_sub(2)?)?, ADDED_BYTES, upper);
        Some(Fields {
            headers,
            noted,
            used: from + len,
        })
    }

    fn parsed(fields: &[httparse::Header<'a>], used: usize, of: Of) -> Fields<'a> {
        let mut headers = Headers::with_room(used + ADDED_BYTES, fields.len() + ADDED_HEADERS);
        let mut noted = Noted::new(of);
        for field in fields {
            headers.append_wire(field.name.as_bytes(), field.value, |known| {
                noted.keep(known, field.value)
            });
        }
        Fields {
            headers,
            noted,
            used,
        }
    }
}

#[inline]
fn read_request(text: &[u8], limits: &Limits) -> Read<(RequestHead, RequestMeta)> {
    if let Some(line) = ordinary::request_line(text)
        && let Some(fields) = Fields::ordinary(text, line.used, Of::Request, limits)
    {
        return request(line.method, line.target, line.http_10, fields, limits);
    }
    places!(places, limits);
    let mut request = httparse::Request::new(&mut []);
    let used = match request.parse_with_uninit_headers(text, places)? {
        httparse::Status::Complete(used) => used,
        httparse::Status::Partial => return Ok(None),
    };
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Trouble::Form(ParseError::Codec));
    };
    let fields = Fields::parsed(request.headers, used, Of::Request);
    self::request(
        method.as_bytes(),
        target.as_bytes(),
        version == 0,
        fields,
        limits,
    )
}

#[inline]
fn request(
    method: &[u8],
    target: &[u8],
    http_10: bool,
    fields: Fields<'_>,
    limits: &Limits,
) -> Read<(RequestHead, RequestMeta)> {
    let method = self::method(method, limits)?;
    if !target.is_ascii() {
        return Err(ParseError::Codec.into());
    }
    let connect = &*method == b"CONNECT";
    let Fields {
        mut headers,
        mut noted,
        used,
    } = fields;
    let hop = noted.hop();
    let mut upgrade = match (connect, hop.upgrade && noted.upgrade.is_some()) {
        (true, _) => Upgrade::Connect,
        (false, true) => Upgrade::Protocol,
        (false, false) => Upgrade::None,
    };
    if upgrade == Upgrade::Protocol
        && noted
            .upgrade
            .is_some_and(|name| name.eq_ignore_ascii_case(b"h2c"))
    {
        upgrade = Upgrade::None;
        headers.retain(|name, _| name.as_bytes() != b"http2-settings");
    }
    if connect && let Some(length) = noted.content_length {
        if length != b"0" {
            return Err(ParseError::BodyDisallowed.into());
        }
        headers.remove_known(Known::ContentLength);
        noted.content_length = None;
    }
    let framing = noted.framing(limits, &mut headers)?;
    if connect && framing == Some(Framing::Chunked) {
        return Err(ParseError::InvalidTransferEncoding.into());
    }

    let mut target = self::target(target, connect, &method, limits)?;
    if target.authority.is_none() {
        target.authority = match noted.host {
            Some(host) if !noted.more_hosts => Some(Bytes::copy_from_slice(host)),
            Some(_) => Some(noted.joined(Known::Host).into()),
            None => None,
        };
    }
    match upgrade {
        Upgrade::Protocol => {
            headers.append(Known::Connection, noted.joined(Known::Connection));
            headers.append(Known::Upgrade, noted.joined(Known::Upgrade));
        }
        Upgrade::None if hop.others => {
            if noted.nominated(&mut headers)? {
                target.authority = None;
            }
        }
        Upgrade::None | Upgrade::Connect => {}
    }
    if noted.te {
        let trailers = headers
            .known(Known::Te)
            .is_some_and(|te| has_token(te, b"trailers"));
        if trailers {
            headers.set(Known::Te, "trailers");
        } else {
            headers.remove_known(Known::Te);
        }
    }
    let host_given = target.authority.is_some();
    let authority = target.authority.unwrap_or_default();
    if !is_authority(&authority) {
        return Err(ParseError::InvalidAuthority.into());
    }
    let head = RequestHead {
        method,
        scheme: target.scheme,
        authority,
        path: target.path,
        protocol: if http_10 {
            Protocol::Http10
        } else {
            Protocol::Http11
        },
        headers,
    };
    let meta = RequestMeta {
        framing: match (upgrade, framing) {
            (Upgrade::Protocol | Upgrade::Connect, _) => Framing::UntilClose,
            (Upgrade::None, framing) => framing.unwrap_or(Framing::None),
        },
        keep_alive: hop.keep_alive(http_10),
        upgrade,
        expect_continue: noted.expect_continue,
        host_given,
    };
    Ok(Some(((head, meta), used)))
}

#[inline]
fn read_response(
    text: &[u8],
    limits: &Limits,
    method: &[u8],
) -> Read<(ResponseHead, ResponseMeta)> {
    if let Some(line) = ordinary::status_line(text)
        && let Some(fields) = Fields::ordinary(text, line.used, Of::Response, limits)
    {
        return response(line.status, line.http_10, fields, limits, method);
    }
    places!(places, limits);
    let mut response = httparse::Response::new(&mut []);
    let used = match httparse::ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        text,
        places,
    )? {
        httparse::Status::Complete(used) => used,
        httparse::Status::Partial => return Ok(None),
    };
    let (Some(status), Some(version)) = (response.code, response.version) else {
        return Err(Trouble::Form(ParseError::Codec));
    };
    let fields = Fields::parsed(response.headers, used, Of::Response);
    self::response(status, version == 0, fields, limits, method)
}

#[inline]
fn response(
    status: u16,
    http_10: bool,
    fields: Fields<'_>,
    limits: &Limits,
    method: &[u8],
) -> Read<(ResponseHead, ResponseMeta)> {
    if status < 100 {
        return Err(ParseError::Codec.into());
    }
    let Fields {
        mut headers,
        noted,
        used,
    } = fields;
    let hop = noted.hop();
    let switched = status == 101;
    if switched {
        if noted.connection {
            headers.append(Known::Connection, noted.joined(Known::Connection));
        }
        if noted.upgrade.is_some() {
            headers.append(Known::Upgrade, noted.joined(Known::Upgrade));
        }
    }
    let tunnel = method == b"CONNECT" && matches!(status, 200..=299);
    let framing = if tunnel {
        Some(Framing::UntilClose)
    } else {
        noted.framing(limits, &mut headers)?
    };
    let framing = match status {
        100..=199 | 204 if !tunnel => {
            // Envoy: a length of zero is papered over.
            if noted.transfer_encodings > 0 || noted.content_length.is_some_and(|n| n != b"0") {
                return Err(ParseError::Codec.into());
            }
            headers.remove_known(Known::ContentLength);
            if switched {
                Framing::UntilClose
            } else {
                Framing::None
            }
        }
        304 => Framing::None,
        _ if method == b"HEAD" => Framing::None,
        _ => framing.unwrap_or(Framing::UntilClose),
    };
    let head = ResponseHead { status, headers };
    let meta = ResponseMeta {
        framing,
        keep_alive: framing != Framing::UntilClose && hop.keep_alive(http_10),
        http_10,
    };
    Ok(Some(((head, meta), used)))
}

/// Which kind of message a head is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Request,
    Response,
}

/// What is seen of the hop's headers while a head is read.
struct Noted<'a> {
    of: Of,
    content_length: Option<&'a [u8]>,
    content_lengths: usize,
    transfer_encoding: &'a [u8],
    transfer_encodings: usize,
    connection: bool,
    proxy_connection: bool,
    upgrade: Option<&'a [u8]>,
    te: bool,
    host: Option<&'a [u8]>,
    more_hosts: bool,
    expect_continue: bool,
    /// Values of `connection`, `proxy-connection` and `upgrade`, and of `host` after the first.
    lists: Vec<(Known, &'a [u8])>,
}

/// The headers that concern the hop.
const HOP: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::ContentLength,
    Known::Expect,
    Known::Host,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::Te,
    Known::TransferEncoding,
    Known::Upgrade,
]);

impl<'a> Noted<'a> {
    fn new(of: Of) -> Noted<'a> {
        Noted {
            of,
            content_length: None,
            content_lengths: 0,
            transfer_encoding: &[],
            transfer_encodings: 0,
            connection: false,
            proxy_connection: false,
            upgrade: None,
            te: false,
            host: None,
            more_hosts: false,
            expect_continue: false,
            lists: Vec::new(),
        }
    }

    /// Looks at a header; whether it stays in the head.
    #[inline]
    fn keep(&mut self, known: Option<Known>, value: &'a [u8]) -> bool {
        match known {
            Some(known) if HOP.contains(known) => self.note(known, value),
            _ => true,
        }
    }

    /// Looks at a header of [`HOP`].
    fn note(&mut self, known: Known, value: &'a [u8]) -> bool {
        match known {
            Known::Host if self.of == Of::Request => {
                if self.host.is_some() {
                    self.more_hosts = true;
                    self.lists.push((known, value));
                } else {
                    self.host = Some(value);
                }
                false
            }
            Known::Expect => {
                let continues =
                    self.of == Of::Request && value.eq_ignore_ascii_case(b"100-continue");
                self.expect_continue |= continues;
                !continues
            }
            Known::ContentLength => {
                self.content_length = Some(value);
                self.content_lengths += 1;
                true
            }
            Known::TransferEncoding => {
                self.transfer_encoding = value;
                self.transfer_encodings += 1;
                false
            }
            Known::Connection => {
                self.connection = true;
                self.lists.push((known, value));
                false
            }
            Known::ProxyConnection => {
                self.proxy_connection = true;
                self.lists.push((known, value));
                false
            }
            Known::Upgrade => {
                self.upgrade.get_or_insert(value);
                self.lists.push((known, value));
                false
            }
            Known::KeepAlive => false,
            Known::Te => {
                self.te = true;
                true
            }
            _ => true,
        }
    }

    /// All values of one of the headers that are lists.
    fn values(&self, name: Known) -> impl Iterator<Item = &'a [u8]> {
        let first = self.host.filter(|_| name == Known::Host);
        let rest = self.lists.iter().filter(move |(known, _)| *known == name);
        first.into_iter().chain(rest.map(|(_, value)| *value))
    }

    /// The same as one.
    fn joined(&self, name: Known) -> Vec<u8> {
        let values: Vec<&[u8]> = self.values(name).collect();
        values.join(&b',')
    }

    /// The elements of all lists of a name.
    fn tokens(&self, name: Known) -> impl Iterator<Item = &'a [u8]> {
        self.values(name)
            .flat_map(|value| value.split(|b| *b == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|token| !token.is_empty())
    }

    /// How the body ends, by what the message itself says. A length that chunks overrule leaves the head.
    fn framing(
        &self,
        limits: &Limits,
        headers: &mut Headers,
    ) -> Result<Option<Framing>, ParseError> {
        if self.content_lengths > 1 {
            return Err(ParseError::Codec);
        }
        let length = self.content_length.map(content_length).transpose()?;
        let chunked =
            self.transfer_encodings == 1 && self.transfer_encoding.eq_ignore_ascii_case(b"chunked");
        match (length, self.transfer_encodings) {
            (None, 0) => Ok(None),
            (Some(0), 0) => Ok(Some(Framing::None)),
            (Some(length), 0) => Ok(Some(Framing::Length(length))),
            (Some(_), _) if !(chunked && limits.allow_chunked_length) => {
                Err(ParseError::ChunkedContentLength)
            }
            _ if !chunked => Err(ParseError::InvalidTransferEncoding),
            (length, _) => {
                if length.is_some() {
                    headers.remove_known(Known::ContentLength);
                }
                Ok(Some(Framing::Chunked))
            }
        }
    }

    fn hop(&self) -> Hop {
        let mut hop = Hop::default();
        if self.connection {
            for token in self.tokens(Known::Connection) {
                if token.eq_ignore_ascii_case(b"keep-alive") {
                    hop.stays = true;
                } else if token.eq_ignore_ascii_case(b"close") {
                    hop.closes = true;
                } else if token.eq_ignore_ascii_case(b"upgrade") {
                    hop.upgrade = true;
                } else {
                    hop.others = true;
                }
            }
        }
        if self.proxy_connection {
            hop.closes |= self
                .tokens(Known::ProxyConnection)
                .any(|t| t.eq_ignore_ascii_case(b"close"));
        }
        hop
    }

    /// Takes out the headers that `connection` nominates; whether `host` is one.
    fn nominated(&self, headers: &mut Headers) -> Result<bool, ParseError> {
        if self.tokens(Known::Connection).count() >= NOMINATED {
            return Err(ParseError::ConnectionHeader);
        }
        let mut host = false;
        for token in self.tokens(Known::Connection) {
            let is = |name: &[u8]| token.eq_ignore_ascii_case(name);
            let of_the_hop = [&b"close"[..], b"keep-alive", b"upgrade", b"http2-settings"];
            if of_the_hop.into_iter().any(is) {
                continue;
            }
            // Taking these out would hide where the request comes from.
            let origin = [
                &b"x-forwarded-for"[..],
                b"x-forwarded-host",
                b"x-forwarded-proto",
            ];
            if origin.into_iter().any(is) || token.first() == Some(&b':') {
                return Err(ParseError::ConnectionHeader);
            }
            if is(b"te") {
                // What stays of it is decided for all requests alike.
                if headers
                    .known(Known::Te)
                    .is_some_and(|te| te.len() >= TE_BYTES)
                {
                    return Err(ParseError::ConnectionHeader);
                }
                continue;
            }
            host |= is(b"host");
            headers.retain(|name, _| !is(name.as_bytes()));
        }
        Ok(host)
    }
}

/// What `connection` says.
#[derive(Default)]
struct Hop {
    closes: bool,
    stays: bool,
    upgrade: bool,
    /// There are tokens that may be names of headers.
    others: bool,
}

impl Hop {
    fn keep_alive(&self, http_10: bool) -> bool {
        !self.closes && (self.stays || !http_10)
    }
}

/// Digits only: no sign, no list, no more than 64 bits.
pub(super) fn content_length(value: &[u8]) -> Result<u64, ParseError> {
    if value.is_empty() {
        return Err(ParseError::Codec);
    }
    value.iter().try_fold(0u64, |sum, digit| {
        if !digit.is_ascii_digit() {
            return Err(ParseError::Codec);
        }
        sum.checked_mul(10)
            .and_then(|sum| sum.checked_add(u64::from(digit - b'0')))
            .ok_or(ParseError::Codec)
    })
}

fn has_token(value: &[u8], token: &[u8]) -> bool {
    value
        .split(|b| *b == b',')
        .any(|part| part.trim_ascii().eq_ignore_ascii_case(token))
}

/// Whether this may be the first byte of a request, so that other protocols are refused before a line ends.
fn begins_method(first: u8, limits: &Limits) -> bool {
    if limits.allow_custom_methods {
        first.is_ascii_graphic()
    } else {
        b"ABCDGHLMNOPRSTU".contains(&first)
    }
}

macro_rules! methods {
    ($given:expr, $($name:literal)+) => {
        match $given {
            $($name => Some(Bytes::from_static($name)),)+
            _ => None,
        }
    };
}

/// The method without a copy, if it is one that Envoy knows.
fn method(given: &[u8], limits: &Limits) -> Result<Bytes, ParseError> {
    let known = methods!(given,
        b"GET" b"POST" b"PUT" b"HEAD" b"DELETE" b"PATCH" b"OPTIONS" b"CONNECT" b"TRACE"
        b"ACL" b"BIND" b"CHECKOUT" b"COPY" b"LINK" b"LOCK" b"MERGE" b"MKACTIVITY" b"MKCALENDAR" b"MKCOL"
        b"MOVE" b"NOTIFY" b"PROPFIND" b"PROPPATCH" b"PURGE" b"REBIND" b"REPORT" b"SEARCH" b"SOURCE"
        b"SUBSCRIBE" b"UNBIND" b"UNLINK" b"UNLOCK" b"UNSUBSCRIBE"
    );
    match known {
        Some(method) => Ok(method),
        None if limits.allow_custom_methods => Ok(Bytes::copy_from_slice(given)),
        None => Err(ParseError::Codec),
    }
}

/// A request target's parts.
struct Target {
    scheme: Bytes,
    authority: Option<Bytes>,
    path: Bytes,
}

fn target(
    given: &[u8],
    connect: bool,
    method: &[u8],
    limits: &Limits,
) -> Result<Target, ParseError> {
    let http = Bytes::from_static(b"http");
    let text = || std::str::from_utf8(given).map_err(|_| ParseError::Codec);
    if connect {
        let (host, port) = text()?.rsplit_once(':').ok_or(ParseError::InvalidUrl)?;
        if !is_host(host) || !is_port(port) {
            return Err(ParseError::InvalidUrl);
        }
        return Ok(Target {
            scheme: http,
            authority: Some(Bytes::copy_from_slice(given)),
            path: Bytes::new(),
        });
    }
    let path = given;
    let origin = path.first() == Some(&b'/');
    if origin || (path == b"*" && method == b"OPTIONS") || !limits.allow_absolute_url {
        return Ok(Target {
            scheme: http,
            authority: None,
            path: match path {
                b"/" => Bytes::from_static(b"/"),
                path => Bytes::copy_from_slice(path),
            },
        });
    }
    let (scheme, rest) = text()?.split_once("://").ok_or(ParseError::Codec)?;
    let scheme = if scheme.eq_ignore_ascii_case("http") {
        http
    } else if scheme.eq_ignore_ascii_case("https") {
        Bytes::from_static(b"https")
    } else {
        return Err(ParseError::InvalidScheme);
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let authority = authority
        .rsplit_once('@')
        .map_or(authority, |(_, authority)| authority);
    if !is_authority(authority.as_bytes()) {
        return Err(ParseError::Codec);
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    if !is_host(host) || port.is_some_and(|port| !is_port(port)) {
        return Err(ParseError::InvalidUrl);
    }
    Ok(Target {
        scheme,
        authority: Some(Bytes::copy_from_slice(authority.as_bytes())),
        path: match path {
            "" => Bytes::from_static(b"/"),
            path => Bytes::copy_from_slice(path.as_bytes()),
        },
    })
}

/// A name or an address; a colon only within brackets.
fn is_host(host: &str) -> bool {
    match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .is_some_and(|address| !address.is_empty() && !address.contains(['[', ']'])),
        None => !host.is_empty() && !host.contains([':', '[', ']', '/', '?', '#', '@']),
    }
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

/// The characters of an authority. RFC 3986 §3.2, as Envoy reads it.
fn is_authority(authority: &[u8]) -> bool {
    swar::is_plain_host(authority) || authority.iter().all(|b| AUTHORITY[usize::from(*b)])
}

static AUTHORITY: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        table[byte as usize] = !matches!(
            byte,
            b'/' | b'?' | b'#' | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}'
        );
        byte += 1;
    }
    table
};
