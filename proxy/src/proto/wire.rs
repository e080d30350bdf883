//! Protocol buffers written straight from what is at hand, without the messages' structs.

use prost::encoding::{WireType, encode_key, encode_varint};

/// A message, or text whose length is not known before: it is written first and then moved by the bytes
/// that its length takes, most often one or two.
pub(crate) fn message(out: &mut Vec<u8>, field: u32, write: impl FnOnce(&mut Vec<u8>)) {
    encode_key(field, WireType::LengthDelimited, out);
    let start = out.len();
    out.push(0);
    write(out);
    let mut length = out.len() - start - 1;
    // The byte that is there already takes the last seven bits.
    let mut at = start;
    while length >= 0x80 {
        out.insert(at, (length & 0x7f) as u8 | 0x80);
        length >>= 7;
        at += 1;
    }
    if let Some(last) = out.get_mut(at) {
        *last = (length & 0x7f) as u8;
    }
}

/// A bytes field (or a string field of text that is known to be UTF-8), unless it is empty.
pub(crate) fn bytes(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    if !value.is_empty() {
        encode_key(field, WireType::LengthDelimited, out);
        encode_varint(value.len() as u64, out);
        out.extend_from_slice(value);
    }
}

/// A field of an unsigned, `int32`, `int64` or `bool` type, unless it is 0.
pub(crate) fn number(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}

/// A field of a `sint32` type, 0 included.
pub(crate) fn signed(out: &mut Vec<u8>, field: u32, value: i32) {
    encode_key(field, WireType::Varint, out);
    let zigzag = (value << 1) ^ (value >> 31);
    encode_varint(u64::from(zigzag.cast_unsigned()), out);
}

/// A `double` field.
pub(crate) fn double(out: &mut Vec<u8>, field: u32, value: f64) {
    encode_key(field, WireType::SixtyFourBit, out);
    out.extend_from_slice(&value.to_le_bytes());
}
