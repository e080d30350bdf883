//! HPACK (RFC 7541): headers as indexes into tables that both ends keep.

mod decode;
mod encode;
mod huffman;
mod table;

pub use decode::{DecodeError, Decoder, Field, Fields};
pub use encode::Encoder;

use crate::head::Known;

/// A header name as one byte: a pseudo header, a well-known name, or any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// `:authority`
    Authority,
    /// `:method`
    Method,
    /// `:path`
    Path,
    /// `:protocol` (RFC 8441)
    Protocol,
    /// `:scheme`
    Scheme,
    /// `:status`
    Status,
    /// A well-known name.
    Known(Known),
    /// Any other, to be read from the text.
    Other,
}

impl Name {
    /// Names with a number.
    const NUMBERS: usize = Known::ALL.len() + 6;

    /// The number of a name that is no other's, below [`Name::NUMBERS`]. Of a well-known name it is its own.
    #[inline]
    fn number(self) -> Option<u8> {
        let after = Known::ALL.len() as u8;
        Some(match self {
            Name::Known(known) => known as u8,
            Name::Authority => after,
            Name::Method => after + 1,
            Name::Path => after + 2,
            Name::Protocol => after + 3,
            Name::Scheme => after + 4,
            Name::Status => after + 5,
            Name::Other => return None,
        })
    }

    /// What the bytes spell.
    pub fn of(text: &[u8]) -> Name {
        if text.first() == Some(&b':') {
            return match text {
                b":authority" => Name::Authority,
                b":method" => Name::Method,
                b":path" => Name::Path,
                b":protocol" => Name::Protocol,
                b":scheme" => Name::Scheme,
                b":status" => Name::Status,
                _ => Name::Other,
            };
        }
        match crate::head::known_from_lower(text) {
            Some(known) => Name::Known(known),
            None => Name::Other,
        }
    }
}

#[cfg(test)]
mod tests;
