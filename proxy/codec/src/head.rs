//! Request and response heads: a flat list of name/value slices in the order the peer sent them.
//!
//! Filters and routes see only these, never the codec's own types. Names are lower case; well-known
//! ones are small integers, so that comparing them costs one instruction.

use std::{fmt, ops::Range, time::Duration};

use bytes::Bytes;

use crate::swar;

mod known;

pub use known::{Known, KnownSet};

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

impl From<NameRef<'_>> for Name {
    fn from(name: NameRef<'_>) -> Name {
        name.to_name()
    }
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

/// Name and value of one header as offsets into the text of its list.
#[derive(Clone, Copy)]
struct Entry {
    known: Option<Known>,
    /// The text has `name: value` CR LF, of an HTTP/1 head that was read.
    line: bool,
    /// Of a well-known name only if it is a line.
    name_at: u32,
    name_len: u32,
    value_at: u32,
    value_len: u32,
}

/// Where a header stands in the text of an HTTP/1 head: a token, and a value without control characters but
/// tabs and without whitespace around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) name_at: u32,
    pub(crate) name_len: u32,
    pub(crate) value_at: u32,
    pub(crate) value_len: u32,
    /// Exactly `: ` is between them, and CR LF behind the value.
    pub(crate) line: bool,
}

/// A header as it is to be written.
#[derive(Clone, Copy)]
pub(crate) struct Written<'a> {
    entry: &'a Entry,
    text: &'a [u8],
}

impl<'a> Written<'a> {
    #[inline]
    pub(crate) fn known(self) -> Option<Known> {
        self.entry.known
    }

    /// Where in [`Headers::text`] it is a whole line of HTTP/1, if it is one.
    #[inline]
    pub(crate) fn line(self) -> Option<Range<usize>> {
        let end = self.entry.value_at as usize + self.entry.value_len as usize + 2;
        self.entry.line.then_some(self.entry.name_at as usize..end)
    }

    #[inline]
    pub(crate) fn name(self) -> &'a [u8] {
        name_ref(self.text, self.entry).text
    }

    #[inline]
    pub(crate) fn value(self) -> &'a [u8] {
        value_of(self.text, self.entry)
    }
}

/// Headers (or trailers) in order; a name may occur more than once.
///
/// One text holds all names and values, one list where they are: reading a head costs two allocations
/// however many headers it has, and dropping it touches no reference count.
#[derive(Clone, Default)]
pub struct Headers {
    text: Vec<u8>,
    list: Vec<Entry>,
    /// It was read as lines of HTTP/1: what is added is a line, too, to be written with the others around it.
    lines: bool,
    /// The well-known names in the list: asking for one that is not there, as is done many times a
    /// request, looks at nothing else.
    present: KnownSet,
}

/// A name in a list of headers.
#[derive(Clone, Copy)]
pub struct NameRef<'a> {
    known: Option<Known>,
    text: &'a [u8],
}

impl<'a> NameRef<'a> {
    /// The name in lower case.
    #[inline]
    pub fn as_bytes(self) -> &'a [u8] {
        self.text
    }

    /// The integer of a well-known name.
    #[inline]
    pub fn known(self) -> Option<Known> {
        self.known
    }

    /// A name of its own.
    pub fn to_name(self) -> Name {
        match self.known {
            Some(known) => Name::Known(known),
            None => Name::Other(Bytes::copy_from_slice(self.text)),
        }
    }
}

impl fmt::Debug for NameRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.text))
    }
}

impl PartialEq for NameRef<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self.known, other.known) {
            (None, None) => self.text == other.text,
            (one, other) => one == other,
        }
    }
}

impl PartialEq<Known> for NameRef<'_> {
    fn eq(&self, other: &Known) -> bool {
        self.known == Some(*other)
    }
}

impl PartialEq<Name> for NameRef<'_> {
    fn eq(&self, other: &Name) -> bool {
        match other {
            Name::Known(known) => self.known == Some(*known),
            Name::Other(text) => self.known.is_none() && self.text == text,
        }
    }
}

impl Headers {
    /// An empty list with room for `capacity` entries of ordinary length.
    pub fn with_capacity(capacity: usize) -> Headers {
        Headers {
            text: Vec::with_capacity(capacity * 40),
            list: Vec::with_capacity(capacity),
            ..Headers::default()
        }
    }

    /// An empty list with room for `text` bytes of names and values, and `entries` headers.
    pub(crate) fn with_room(text: usize, entries: usize) -> Headers {
        Headers {
            text: Vec::with_capacity(text),
            list: Vec::with_capacity(entries),
            ..Headers::default()
        }
    }

    /// An empty list for the headers of a head that is being read: [`Headers::add_place`] each, then
    /// [`Headers::set_text`].
    #[inline]
    pub(crate) fn with_places(entries: usize) -> Headers {
        Headers::with_room(0, entries)
    }

    /// Adds a header whose text follows by [`Headers::set_text`].
    #[inline]
    pub(crate) fn add_place(&mut self, known: Option<Known>, place: Place) {
        self.add(Entry {
            known,
            line: place.line,
            name_at: place.name_at,
            name_len: place.name_len,
            value_at: place.value_at,
            value_len: place.value_len,
        });
    }

    /// The text in which the places are, `more` bytes beside. Names become lower case if `upper` says
    /// that some are not.
    pub(crate) fn set_text(&mut self, text: &[u8], more: usize, upper: bool) {
        self.lines = true;
        self.text = Vec::with_capacity(text.len() + more);
        self.text.extend_from_slice(text);
        if upper {
            for entry in &self.list {
                let at = entry.name_at as usize;
                let name = &mut self.text[at..at + entry.name_len as usize];
                match entry.known {
                    Some(_) => swar::set_bit_5(name),
                    None => swar::make_lower(name),
                }
            }
        }
    }

    /// The first value of `name`.
    pub fn get(&self, name: &Name) -> Option<&[u8]> {
        match name {
            Name::Known(known) => self.known(*known),
            Name::Other(text) => self
                .list
                .iter()
                .find(|entry| entry.known.is_none() && self.name(entry) == text)
                .map(|entry| self.value(entry)),
        }
    }

    /// The first value of a well-known name.
    #[inline]
    pub fn known(&self, name: Known) -> Option<&[u8]> {
        if self.present.contains(name) {
            self.find(name)
        } else {
            None
        }
    }

    fn find(&self, name: Known) -> Option<&[u8]> {
        self.list
            .iter()
            .find(|entry| entry.known == Some(name))
            .map(|entry| self.value(entry))
    }

    /// The well-known names that are there.
    #[inline]
    pub fn present(&self) -> KnownSet {
        self.present
    }

    /// All values of `name`, in order.
    pub fn all<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(found, _)| found == name)
            .map(|(_, value)| value)
    }

    /// Adds a value after the existing ones.
    pub fn append(&mut self, name: impl Into<Name>, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        match name.into() {
            Name::Known(known) => self.append_known(known, value),
            Name::Other(text) => self.append_lower(None, &text, value),
        }
    }

    fn append_known(&mut self, known: Known, value: &[u8]) {
        if !(self.lines && self.append_line(known, value)) {
            self.append_lower(Some(known), b"", value);
        }
    }

    /// Adds a header as a line, if it is one.
    fn append_line(&mut self, known: Known, value: &[u8]) -> bool {
        let begin = known.begins_line();
        let at = self.text.len();
        if at + begin.len() + value.len() + 2 > u32::MAX as usize || swar::breaks_line(value) {
            return false;
        }
        self.text.reserve(begin.len() + value.len() + 2);
        self.text.extend_from_slice(begin);
        self.text.extend_from_slice(value);
        self.text.extend_from_slice(b"\r\n");
        // Not longer than the text.
        self.add(Entry {
            known: Some(known),
            line: true,
            name_at: at as u32,
            name_len: begin.len() as u32 - 2,
            value_at: (at + begin.len()) as u32,
            value_len: value.len() as u32,
        });
        true
    }

    /// Adds a header as it stands on the wire if `keep` says so once it knows the name.
    pub(crate) fn append_wire(
        &mut self,
        name: &[u8],
        value: &[u8],
        keep: impl FnOnce(Option<Known>) -> bool,
    ) {
        let known = Known::lookup_token(name);
        if !keep(known) {
            return;
        }
        let name_in_text = match known {
            Some(_) => (0, 0),
            None => {
                let (at, len) = self.push(name);
                self.text[at as usize..].make_ascii_lowercase();
                (at, len)
            }
        };
        self.add_value(known, name_in_text, value);
    }

    /// Adds a header whose name is lower case and known already to be, or not to be, a well-known one.
    #[inline]
    pub(crate) fn append_lower(&mut self, known: Option<Known>, name: &[u8], value: &[u8]) {
        let name_in_text = match known {
            Some(_) => (0, 0),
            None => self.push(name),
        };
        self.add_value(known, name_in_text, value);
    }

    /// Adds an entry whose name, unless it is a well-known one, stands in the text already.
    #[inline]
    fn add_value(&mut self, known: Option<Known>, name: (u32, u32), value: &[u8]) {
        let (value_at, value_len) = self.push(value);
        self.add(Entry {
            known,
            line: false,
            name_at: name.0,
            name_len: name.1,
            value_at,
            value_len,
        });
    }

    #[inline]
    fn add(&mut self, entry: Entry) {
        if let Some(known) = entry.known {
            self.present.insert(known);
        }
        self.list.push(entry);
    }

    /// Replaces all values of a name by one, in the place of the first.
    pub fn set(&mut self, name: impl Into<Name>, value: impl AsRef<[u8]>) {
        let name = name.into();
        let first = match name {
            Name::Known(known) if !self.present.contains(known) => None,
            _ => self.position(&name),
        };
        let Some(first) = first else {
            self.append(name, value);
            return;
        };
        let (value_at, value_len) = self.push(value.as_ref());
        let text = &self.text;
        if self.list[first + 1..]
            .iter()
            .any(|entry| name_ref(text, entry) == name)
        {
            let mut index = 0;
            self.list.retain(|entry| {
                let keep = index <= first || name_ref(text, entry) != name;
                index += 1;
                keep
            });
        }
        let entry = &mut self.list[first];
        entry.line = false;
        entry.value_at = value_at;
        entry.value_len = value_len;
    }

    /// Removes all values of a name; whether there were any.
    pub fn remove(&mut self, name: &Name) -> bool {
        if let Name::Known(known) = name {
            return self.remove_known(*known);
        }
        let before = self.list.len();
        let text = &self.text;
        self.list.retain(|entry| name_ref(text, entry) != *name);
        self.list.len() != before
    }

    /// Removes all values of a well-known name; whether there were any.
    #[inline]
    pub fn remove_known(&mut self, name: Known) -> bool {
        self.remove_all(KnownSet::of(&[name]))
    }

    /// Removes all values of some well-known names; whether there were any.
    #[inline]
    pub fn remove_all(&mut self, names: KnownSet) -> bool {
        let any = !self.present.and(names).is_empty();
        if any {
            self.remove_present(names);
        }
        any
    }

    fn remove_present(&mut self, names: KnownSet) {
        self.list
            .retain(|entry| !entry.known.is_some_and(|known| names.contains(known)));
        self.present = self.present.without(names);
    }

    /// Removes all values of a well-known name and gives the first.
    #[inline]
    pub fn take(&mut self, name: Known) -> Option<Bytes> {
        let first = self.known(name).map(Bytes::copy_from_slice)?;
        self.remove_known(name);
        Some(first)
    }

    /// Keeps only the entries for which `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(NameRef<'_>, &[u8]) -> bool) {
        let text = &self.text;
        let mut present = KnownSet::default();
        self.list.retain(|entry| {
            let kept = keep(name_ref(text, entry), value_of(text, entry));
            if let Some(known) = entry.known.filter(|_| kept) {
                present.insert(known);
            }
            kept
        });
        self.present = present;
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (NameRef<'_>, &[u8])> {
        self.list
            .iter()
            .map(|entry| (name_ref(&self.text, entry), self.value(entry)))
    }

    /// The names that are not well known, in order.
    #[inline]
    pub fn other_names(&self) -> impl Iterator<Item = &[u8]> {
        self.list
            .iter()
            .filter(|entry| entry.known.is_none())
            .map(|entry| self.name(entry))
    }

    /// All entries in order, as they are to be written in HTTP/1.
    #[inline]
    pub(crate) fn written(&self) -> impl Iterator<Item = Written<'_>> {
        self.list.iter().map(|entry| Written {
            entry,
            text: &self.text,
        })
    }

    /// What [`Written::line`] refers to.
    #[inline]
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    /// No fewer bytes than the headers have in HTTP/1.
    #[inline]
    pub(crate) fn written_len(&self) -> usize {
        // A well-known name, `: ` and CR LF are what the text may lack.
        self.text.len() + self.list.len() * (Known::LONGEST + 4)
    }

    /// Number of entries.
    #[inline]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Forgets all entries and keeps the memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.list.clear();
        self.lines = false;
        self.present = KnownSet::default();
    }

    fn position(&self, name: &Name) -> Option<usize> {
        self.list
            .iter()
            .position(|entry| name_ref(&self.text, entry) == *name)
    }

    /// Copies bytes to the end of the text. Heads are bounded far below 4 GiB before they come here;
    /// what would not fit is cut.
    #[inline]
    fn push(&mut self, bytes: &[u8]) -> (u32, u32) {
        let at = self.text.len();
        let room = (u32::MAX as usize).saturating_sub(at);
        let bytes = &bytes[..bytes.len().min(room)];
        self.text.extend_from_slice(bytes);
        (offset(at), offset(bytes.len()))
    }

    #[inline]
    fn name<'a>(&'a self, entry: &'a Entry) -> &'a [u8] {
        name_ref(&self.text, entry).text
    }

    #[inline]
    fn value(&self, entry: &Entry) -> &[u8] {
        value_of(&self.text, entry)
    }
}

#[inline]
fn offset(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[inline]
fn name_ref<'a>(text: &'a [u8], entry: &Entry) -> NameRef<'a> {
    let at = entry.name_at as usize;
    NameRef {
        known: entry.known,
        text: match entry.known {
            Some(known) => known.as_str().as_bytes(),
            None => &text[at..at + entry.name_len as usize],
        },
    }
}

#[inline]
fn value_of<'a>(text: &'a [u8], entry: &Entry) -> &'a [u8] {
    let at = entry.value_at as usize;
    &text[at..at + entry.value_len as usize]
}

impl PartialEq for Headers {
    fn eq(&self, other: &Headers) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Headers {}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, String::from_utf8_lossy(value).into_owned())),
            )
            .finish()
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
        let end = swar::find_either(&self.path, b'?', b'#').unwrap_or(self.path.len());
        &self.path[..end]
    }

    /// Whether there is a `#` in the path, which no request may have.
    pub fn has_fragment(&self) -> bool {
        swar::find_either(&self.path, b'#', b'#').is_some()
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
            .map(|(n, v)| (n.to_name(), Bytes::copy_from_slice(v)))
            .collect();
        assert_eq!(
            all,
            [("a", "5"), ("b", "2"), ("c", "4")].map(|(n, v)| (Name::new(n), Bytes::from(v)))
        );
    }
}
