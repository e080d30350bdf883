//! From headers to the wire. RFC 7541 §6.

use super::{
    Name, huffman,
    table::{Dynamic, LARGEST, OVERHEAD, STATIC},
};
use crate::head::{Known, KnownSet};

/// Places of the memory of what is in the table. Two that fall together cost some compression only.
const PLACES: usize = 64;

/// How a header is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// Its value repeats: into the table at once.
    Keep,
    /// Its value may repeat: into the table when it comes a second time.
    Watch,
    /// Its value is new each time: only the name goes into the table, with the first value.
    Vary,
    /// A short secret: never into a table, here or further on (RFC 7541 §7.1.3).
    Secret,
}

fn policy(name: Name, value: &[u8]) -> Policy {
    match name {
        Name::Authority | Name::Method | Name::Scheme | Name::Status | Name::Protocol => {
            Policy::Keep
        }
        Name::Path | Name::Other => Policy::Watch,
        Name::Known(known) => match known {
            Known::Authorization => Policy::Secret,
            Known::Cookie if value.len() < 20 => Policy::Secret,
            Known::Cookie | Known::SetCookie => Policy::Watch,
            Known::XForwardedFor
            | Known::Forwarded
            | Known::Referer
            | Known::GrpcMessage
            | Known::Expect
            | Known::XEnvoyOriginalPath => Policy::Watch,
            Known::Accept
            | Known::AcceptEncoding
            | Known::ContentType
            | Known::Connection
            | Known::GrpcStatus
            | Known::Host
            | Known::KeepAlive
            | Known::Origin
            | Known::ProxyConnection
            | Known::Server
            | Known::Te
            | Known::Trailer
            | Known::TransferEncoding
            | Known::Upgrade
            | Known::UserAgent
            | Known::Via
            | Known::XB3Flags
            | Known::XB3Sampled
            | Known::XEnvoyAttemptCount
            | Known::XEnvoyDecoratorOperation
            | Known::XEnvoyExpectedRqTimeoutMs
            | Known::XEnvoyForceTrace
            | Known::XEnvoyInternal
            | Known::XEnvoyMaxRetries
            | Known::XEnvoyOverloaded
            | Known::XEnvoyRatelimited
            | Known::XEnvoyRetriableHeaderNames
            | Known::XEnvoyRetriableStatusCodes
            | Known::XEnvoyRetryGrpcOn
            | Known::XEnvoyRetryOn
            | Known::XEnvoyUpstreamRqPerTryTimeoutMs
            | Known::XEnvoyUpstreamRqTimeoutMs
            | Known::XForwardedClientCert
            | Known::XForwardedHost
            | Known::XForwardedProto => Policy::Keep,
            // Those of `VARY`.
            Known::ContentLength
            | Known::GrpcTimeout
            | Known::Location
            | Known::Date
            | Known::B3
            | Known::XB3SpanId
            | Known::XB3TraceId
            | Known::XB3ParentSpanId
            | Known::TraceParent
            | Known::TraceState
            | Known::XClientTraceId
            | Known::XEnvoyUpstreamServiceTime
            | Known::XIstioAttributes
            | Known::XRequestId => Policy::Vary,
        },
    }
}

/// Those whose value is new each time.
const VARY: KnownSet = KnownSet::of(&[
    Known::ContentLength,
    Known::GrpcTimeout,
    Known::Location,
    Known::Date,
    Known::B3,
    Known::XB3SpanId,
    Known::XB3TraceId,
    Known::XB3ParentSpanId,
    Known::TraceParent,
    Known::TraceState,
    Known::XClientTraceId,
    Known::XEnvoyUpstreamServiceTime,
    Known::XIstioAttributes,
    Known::XRequestId,
]);

/// The static entry with this name, from 1; 0 is none.
fn static_name(name: Name) -> usize {
    match name {
        Name::Authority => 1,
        Name::Method => 2,
        Name::Path => 4,
        Name::Scheme => 6,
        Name::Status => 8,
        Name::Protocol | Name::Other => 0,
        Name::Known(known) => match known {
            Known::AcceptEncoding => 16,
            Known::Accept => 19,
            Known::Authorization => 23,
            Known::ContentLength => 28,
            Known::ContentType => 31,
            Known::Cookie => 32,
            Known::Date => 33,
            Known::Expect => 35,
            Known::Host => 38,
            Known::Location => 46,
            Known::Referer => 51,
            Known::Server => 54,
            Known::SetCookie => 55,
            Known::TransferEncoding => 57,
            Known::UserAgent => 58,
            Known::Via => 60,
            _ => 0,
        },
    }
}

/// The static entry with this name and value, from 1; 0 is none.
#[inline]
fn static_row(name: Name, value: &[u8]) -> usize {
    match name {
        Name::Method => match value {
            b"GET" => 2,
            b"POST" => 3,
            _ => 0,
        },
        Name::Path => match value {
            b"/" => 4,
            b"/index.html" => 5,
            _ => 0,
        },
        Name::Scheme => match value {
            b"http" => 6,
            b"https" => 7,
            _ => 0,
        },
        Name::Status => match value {
            b"200" => 8,
            b"204" => 9,
            b"206" => 10,
            b"304" => 11,
            b"400" => 12,
            b"404" => 13,
            b"500" => 14,
            _ => 0,
        },
        Name::Known(Known::AcceptEncoding) if value == b"gzip, deflate" => 16,
        Name::Authority | Name::Protocol | Name::Known(_) | Name::Other => 0,
    }
}

/// The sending side of a connection's header compression.
#[derive(Debug)]
pub struct Encoder {
    table: Dynamic,
    /// Most that we use of what the peer allows.
    wanted: usize,
    /// Sizes to say before the next block: the smallest there was, and the one that counts.
    resize: Option<(usize, usize)>,
    huffman: bool,
    /// Entries ever added, modulo 2^16.
    added: u16,
    memory: Option<Box<Memory>>,
}

/// Where things were seen last, by hash. Nothing here is trusted: a hit is compared.
#[derive(Debug)]
struct Memory {
    /// `added` when the header with this hash was added.
    rows: [u16; PLACES],
    /// `added` when this well-known name was added or used last.
    last: [u16; Name::NUMBERS],
    /// `added` when the other name with this hash was added.
    names: [u16; PLACES / 4],
    /// Other bits of the hash of a header that came and was not added.
    watched: [u16; PLACES / 4],
}

impl Encoder {
    /// An encoder that uses at most `wanted` bytes (65535 at most) of the peer's table.
    pub fn new(wanted: usize, huffman: bool) -> Encoder {
        let wanted = wanted.min(LARGEST);
        let mut encoder = Encoder {
            table: Dynamic::new(4096),
            wanted,
            resize: None,
            huffman,
            added: 0,
            memory: None,
        };
        // What the peer has until its settings say otherwise.
        encoder.set_allowed(4096);
        encoder
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.table.memory() + self.memory.as_ref().map_or(0, |_| size_of::<Memory>())
    }

    /// The peer's SETTINGS_HEADER_TABLE_SIZE. RFC 7541 §4.2.
    pub fn set_allowed(&mut self, allowed: usize) {
        let max = allowed.min(self.wanted);
        if max == self.table.max() {
            return;
        }
        let least = self.resize.map_or(max, |(least, _)| least.min(max));
        self.resize = Some((least, max));
        self.table.set_max(max);
    }

    /// To be called before the first header of each block.
    pub fn begin(&mut self, out: &mut Vec<u8>) {
        if let Some((least, max)) = self.resize.take() {
            if least < max {
                integer(out, 0x20, 5, least);
            }
            integer(out, 0x20, 5, max);
        }
    }

    /// Appends one header. `text` is the name's, lower case.
    #[inline]
    pub fn header(&mut self, name: Name, text: &[u8], value: &[u8], out: &mut Vec<u8>) {
        let repeats = name
            .number()
            .is_some_and(|number| self.repeats(number, value, out));
        if !repeats {
            self.unlike_the_last(name, text, value, out);
        }
    }

    /// Appends a header with a well-known name.
    #[inline]
    pub fn known(&mut self, known: Known, value: &[u8], out: &mut Vec<u8>) {
        let done = if VARY.contains(known) {
            self.varies(known, value, out)
        } else {
            self.repeats(known as u8, value, out)
        };
        if !done {
            let text = known.as_str().as_bytes();
            self.unlike_the_last(Name::Known(known), text, value, out);
        }
    }

    /// Appends a pseudo header.
    #[inline]
    pub fn pseudo(&mut self, name: Name, text: &str, value: &[u8], out: &mut Vec<u8>) {
        match static_row(name, value) {
            0 => self.header(name, text.as_bytes(), value, out),
            index => out.push(0x80 | index as u8),
        }
    }

    /// Most headers say what the last of their name said: appends the place of that one, if this does. What must
    /// not be in the table is not.
    fn repeats(&mut self, number: u8, value: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(memory) = &self.memory else {
            return false;
        };
        let Some(last) = memory.last.get(usize::from(number)) else {
            return false;
        };
        let place = usize::from(self.added.wrapping_sub(*last));
        let holds = self.table.holds(place, number, value);
        if holds {
            integer(out, 0x80, 7, STATIC.len() + 1 + place);
        }
        holds
    }

    /// Appends a header whose value is not looked for, if its name is in a table.
    fn varies(&self, known: Known, value: &[u8], out: &mut Vec<u8>) -> bool {
        let mut index = static_name(Name::Known(known));
        if index == 0 {
            let last = self
                .memory
                .as_ref()
                .and_then(|memory| memory.last.get(usize::from(known as u8)));
            let Some(last) = last else { return false };
            let place = usize::from(self.added.wrapping_sub(*last));
            if !self.table.has_name(place, known as u8) {
                return false;
            }
            index = STATIC.len() + 1 + place;
        }
        integer(out, 0x00, 4, index);
        self.string(value, out);
        true
    }

    fn unlike_the_last(&mut self, name: Name, text: &[u8], value: &[u8], out: &mut Vec<u8>) {
        let index = static_row(name, value);
        if index != 0 {
            out.push(0x80 | index as u8);
            return;
        }
        let mut policy = policy(name, value);
        let size = text.len() + value.len() + OVERHEAD;
        if policy == Policy::Secret {
            return self.literal(0x10, 4, static_name(name), text, value, out);
        }
        if size * 2 > self.table.max() {
            // It would push out all else.
            return self.literal(0x00, 4, static_name(name), text, value, out);
        }
        let memory = self.memory.get_or_insert_with(|| {
            Box::new(Memory {
                rows: [0; PLACES],
                last: [0; Name::NUMBERS],
                names: [0; PLACES / 4],
                watched: [0; PLACES / 4],
            })
        });
        let number = name.number();
        let name_hash = match number {
            Some(number) => u64::from(number),
            None => hash(text.len() as u64, text),
        };
        let name_place = (name_hash >> 58) as usize % memory.names.len();
        let last = match number {
            Some(number) => &mut memory.last[usize::from(number)],
            None => &mut memory.names[name_place],
        };
        let mut name_index = 0;
        let place = self.added.wrapping_sub(*last);
        if let Some(row) = self.table.get(usize::from(place))
            && row.name == name
            && (number.is_some() || row.text == text)
        {
            name_index = STATIC.len() + 1 + usize::from(place);
            if policy != Policy::Vary && row.value == value {
                integer(out, 0x80, 7, name_index);
                return;
            }
        }
        let mut row_place = 0;
        if policy != Policy::Vary {
            let row_hash = hash(name_hash, value);
            row_place = (row_hash >> 57) as usize % PLACES;
            let place = self.added.wrapping_sub(memory.rows[row_place]);
            if let Some(row) = self.table.get(usize::from(place))
                && row.value == value
                && row.name == name
                && (number.is_some() || row.text == text)
            {
                *last = memory.rows[row_place];
                integer(out, 0x80, 7, STATIC.len() + 1 + usize::from(place));
                return;
            }
            if policy == Policy::Watch {
                let watched = &mut memory.watched[(row_hash >> 48) as usize % (PLACES / 4)];
                let tag = (row_hash >> 32) as u16 | 1;
                if *watched == tag {
                    policy = Policy::Keep;
                }
                *watched = tag;
            }
        }
        let adds = policy == Policy::Keep
            || policy == Policy::Vary && name_index == 0 && static_name(name) == 0;
        if adds {
            self.added = self.added.wrapping_add(1);
            *last = self.added;
            if policy == Policy::Keep {
                memory.rows[row_place] = self.added;
            }
        }
        match static_name(name) {
            0 => {}
            index => name_index = index,
        }
        if !adds {
            return self.literal(0x00, 4, name_index, text, value, out);
        }
        self.literal(0x40, 6, name_index, text, value, out);
        self.table.insert(name, text, value, true);
    }

    fn literal(
        &self,
        kind: u8,
        prefix: u32,
        name_index: usize,
        text: &[u8],
        value: &[u8],
        out: &mut Vec<u8>,
    ) {
        integer(out, kind, prefix, name_index);
        if name_index == 0 {
            self.string(text, out);
        }
        self.string(value, out);
    }

    fn string(&self, text: &[u8], out: &mut Vec<u8>) {
        if self.huffman {
            let len = huffman::coded_len(text);
            if len < text.len() {
                integer(out, 0x80, 7, len);
                huffman::encode(text, out);
                return;
            }
        }
        integer(out, 0x00, 7, text.len());
        out.extend_from_slice(text);
    }
}

/// An integer with a prefix of `bits` bits below `first`. §5.1.
#[inline]
fn integer(out: &mut Vec<u8>, first: u8, bits: u32, value: usize) {
    let mask = (1usize << bits) - 1;
    if value < mask {
        out.push(first | value as u8);
        return;
    }
    out.push(first | mask as u8);
    long_integer(out, value - mask);
}

fn long_integer(out: &mut Vec<u8>, mut rest: usize) {
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes text into `seed`. Not for tables that an attacker could fill: a collision here costs bytes only.
fn hash(seed: u64, text: &[u8]) -> u64 {
    let mut hash = (seed ^ text.len() as u64).wrapping_mul(MIX);
    let mut chunks = text.chunks_exact(8);
    for chunk in &mut chunks {
        if let Ok(bytes) = <[u8; 8]>::try_from(chunk) {
            hash = (hash.rotate_left(23) ^ u64::from_le_bytes(bytes)).wrapping_mul(MIX);
        }
    }
    let tail = match text.last_chunk::<8>() {
        // Some bytes twice: nothing to loop over.
        Some(last) => u64::from_le_bytes(*last),
        None => chunks
            .remainder()
            .iter()
            .fold(0, |tail, byte| (tail << 8) | u64::from(*byte)),
    };
    (hash.rotate_left(23) ^ tail).wrapping_mul(MIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_whose_values_vary_are_those_of_the_policy() {
        for known in Known::ALL {
            let varies = policy(Name::Known(*known), b"") == Policy::Vary;
            assert_eq!(VARY.contains(*known), varies, "{}", known.as_str());
        }
    }
}
