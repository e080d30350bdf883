//! Attributes straight from the bytes of a message into bags: no allocation for a word or an attribute.
//!
//! Only what a well-behaved client sends is read here. Whatever is unusual (malformed, over a limit, split, an
//! attribute twice) is left to [`decode`](super::decode) and [`decode_report`](super::decode_report), which say
//! what is wrong with it; so both ways have one meaning, and a property test holds them to it.

use std::sync::Arc;

use super::{Limits, check_global_words, duration, timestamp};
use crate::bag::Bag;
use crate::dictionary::{MessageWords, MessageWordsBuilder};
use crate::table::{AttributeTable, MAX_ATTRIBUTES, Slot};
use crate::value::{StringMap, Value, ValueType};

/// A CheckRequest without quotas.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawCheck<'a> {
    /// Its attributes: a CompressedAttributes.
    pub attributes: &'a [u8],
    /// How many words of the global dictionary its sender knows.
    pub global_word_count: u32,
    /// Equal for repetitions of one request.
    pub deduplication_id: &'a str,
}

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;

/// What is left of a message. `None` of its methods: it is malformed, or unusual.
#[derive(Clone, Copy, Debug)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                return None;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.varint()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn fixed64(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*bytes))
    }

    /// Field number and wire type of the next field; `Some(None)` at the end.
    #[allow(
        clippy::option_option,
        reason = "the outer one is malformed, the inner one is over"
    )]
    fn field(&mut self) -> Option<Option<(u32, u8)>> {
        if self.0.is_empty() {
            return Some(None);
        }
        let key = u32::try_from(self.varint()?).ok()?;
        let number = key >> 3;
        // Low three bits of a number fit.
        let kind = u8::try_from(key & 7).ok()?;
        (number > 0).then_some(Some((number, kind)))
    }
}

/// Zig-zag, as `sint32`.
fn sint32(value: u64) -> Option<i32> {
    let value = u32::try_from(value).ok()?;
    Some((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
}

/// An `int64`, as it came.
fn int64(value: u64) -> i64 {
    value.cast_signed()
}

/// An `int32`: negative ones come with their sign extended.
fn int32(value: u64) -> Option<i32> {
    i32::try_from(value.cast_signed()).ok()
}

impl<'a> RawCheck<'a> {
    /// Takes a CheckRequest apart. `None`: it is unusual, or has quotas.
    pub fn parse(message: &'a [u8]) -> Option<Self> {
        let mut check = Self::default();
        let mut has_attributes = false;
        let mut reader = Reader(message);
        while let Some((number, kind)) = reader.field()? {
            match (number, kind) {
                (1, LENGTH) if !has_attributes => {
                    has_attributes = true;
                    check.attributes = reader.bytes()?;
                }
                (2, VARINT) => check.global_word_count = u32::try_from(reader.varint()?).ok()?,
                (3, LENGTH) => {
                    check.deduplication_id = std::str::from_utf8(reader.bytes()?).ok()?
                }
                _ => return None,
            }
        }
        Some(check)
    }

    /// Its attributes. `None`: they are unusual.
    pub fn bag(&self, table: &AttributeTable, limits: &Limits) -> Option<Bag> {
        check_global_words(self.global_word_count).ok()?;
        let words = words(self.attributes, 1, limits)?.build();
        let mut bag = Bag::new(table);
        overlay(&mut bag, self.attributes, &words, limits)?;
        Some(bag)
    }
}

/// The attribute sets of a ReportRequest, in order. `None`: it is unusual.
pub fn report(message: &[u8], table: &AttributeTable, limits: &Limits) -> Option<Vec<Bag>> {
    let mut sets = Vec::new();
    let mut is_delta = true;
    let mut reader = Reader(message);
    while let Some((number, kind)) = reader.field()? {
        match (number, kind) {
            (1, LENGTH) => {
                sets.push(reader.bytes()?);
                if sets.len() > limits.sets {
                    return None;
                }
            }
            (2, LENGTH) => _ = reader.bytes()?, // a word
            (3, VARINT) => {
                let count = u32::try_from(reader.varint()?).ok()?;
                check_global_words(count).ok()?;
            }
            (4, VARINT) => is_delta = reader.varint()? == 0,
            _ => return None,
        }
    }
    let shared = words(message, 2, limits)?.build();
    let mut bags: Vec<Bag> = Vec::with_capacity(sets.len());
    for set in sets {
        let mut bag = match bags.last() {
            Some(before) if is_delta => before.clone(),
            _ => Bag::new(table),
        };
        let own = words(set, 1, limits)?;
        let own = (own.len() > 0).then(|| own.build());
        let words = own.as_ref().unwrap_or(&shared);
        overlay(&mut bag, set, words, limits)?;
        bags.push(bag);
    }
    Some(bags)
}

/// All fields `number` of a message, which are words.
fn words(message: &[u8], number: u32, limits: &Limits) -> Option<MessageWordsBuilder> {
    let mut all = MessageWordsBuilder::default();
    let mut reader = Reader(message);
    while let Some((field, kind)) = reader.field()? {
        match kind {
            LENGTH => {
                let bytes = reader.bytes()?;
                if field == number {
                    all.push(std::str::from_utf8(bytes).ok()?);
                    if all.len() > limits.words || all.bytes() > limits.word_bytes {
                        return None;
                    }
                }
            }
            VARINT => _ = reader.varint()?,
            _ => return None,
        }
    }
    Some(all)
}

/// The attributes that a message has given so far.
struct Given([u64; MAX_ATTRIBUTES / 64]);

impl Given {
    /// Whether it was there already.
    fn insert(&mut self, slot: Slot) -> Option<bool> {
        let bits = self.0.get_mut(slot.index() / 64)?;
        let bit = 1 << (slot.index() % 64);
        let was = *bits & bit != 0;
        *bits |= bit;
        Some(was)
    }
}

/// Puts the attributes of a message into a bag, over what it has.
fn overlay(bag: &mut Bag, message: &[u8], words: &MessageWords, limits: &Limits) -> Option<()> {
    let mut given = Given([0; MAX_ATTRIBUTES / 64]);
    let (mut attributes, mut entries) = (0, 0);
    let mut reader = Reader(message);
    while let Some((number, kind)) = reader.field()? {
        if kind != LENGTH || !(1..=9).contains(&number) {
            return None;
        }
        let entry = reader.bytes()?;
        if number == 1 {
            continue; // a word
        }
        attributes += 1;
        if attributes > limits.attributes {
            return None;
        }
        let (name, value) = pair(entry)?;
        let slot = match usize::try_from(name) {
            Ok(index) => bag.table().slot_of_word(index),
            Err(_) => words.get(name).and_then(|name| bag.table().slot(&name)),
        };
        let ty = slot.map(|slot| bag.table().type_of(slot));
        let mut is_whole = true;
        let value = match number {
            2 => {
                let text = words.get(sint32(value.varint()?)?);
                text.map(|text| {
                    ty.and_then(|ty| Value::from_text(ty, text.clone()))
                        .unwrap_or(Value::String(text))
                })
            }
            3 => Some(Value::Int64(int64(value.varint()?))),
            4 => Some(Value::Double(f64::from_bits(value.fixed64()?))),
            5 => Some(Value::Bool(value.varint()? != 0)),
            6 => {
                let (seconds, nanos) = seconds_and_nanos(value.message()?)?;
                let time = prost_types::Timestamp { seconds, nanos };
                Some(Value::Timestamp(timestamp(&time)?))
            }
            7 => {
                let (seconds, nanos) = seconds_and_nanos(value.message()?)?;
                let span = prost_types::Duration { seconds, nanos };
                Some(Value::Duration(duration(&span)?))
            }
            8 => {
                Value::ip_from_bytes(value.message()?).filter(|_| ty == Some(ValueType::IpAddress))
            }
            _ => {
                let map = map(value.message()?, words, &mut entries, &mut is_whole)?;
                if entries > limits.map_entries {
                    return None;
                }
                Some(Value::StringMap(map))
            }
        };
        put(bag, slot, value, is_whole, &mut given)?;
    }
    Some(())
}

/// As [`super::Writer::put`].
fn put(
    bag: &mut Bag,
    slot: Option<Slot>,
    value: Option<Value>,
    is_whole: bool,
    given: &mut Given,
) -> Option<()> {
    let Some(slot) = slot else {
        bag.ignore();
        return Some(());
    };
    if given.insert(slot)? {
        return None;
    }
    if value.is_none() || !is_whole {
        bag.ignore();
    }
    if let Some(value) = value {
        bag.set(slot, value);
    }
    Some(())
}

/// The value of an entry of a map, not yet read.
#[derive(Clone, Copy, Debug)]
enum Field<'a> {
    Missing,
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn varint(self) -> Option<u64> {
        match self {
            Field::Missing => Some(0),
            Field::Varint(value) => Some(value),
            Field::Fixed64(_) | Field::Bytes(_) => None,
        }
    }

    fn fixed64(self) -> Option<u64> {
        match self {
            Field::Missing => Some(0),
            Field::Fixed64(value) => Some(value),
            Field::Varint(_) | Field::Bytes(_) => None,
        }
    }

    fn message(self) -> Option<&'a [u8]> {
        match self {
            Field::Missing => Some(&[]),
            Field::Bytes(bytes) => Some(bytes),
            Field::Varint(_) | Field::Fixed64(_) => None,
        }
    }
}

/// An entry of a map with `sint32` keys. A key or value that is left out has its default.
fn pair(entry: &[u8]) -> Option<(i32, Field<'_>)> {
    let mut reader = Reader(entry);
    let (mut key, mut value) = (None, Field::Missing);
    while let Some((number, kind)) = reader.field()? {
        match (number, kind) {
            (1, VARINT) if key.is_none() => key = Some(sint32(reader.varint()?)?),
            (2, _) if !matches!(value, Field::Missing) => return None,
            (2, VARINT) => value = Field::Varint(reader.varint()?),
            (2, FIXED64) => value = Field::Fixed64(reader.fixed64()?),
            (2, LENGTH) => value = Field::Bytes(reader.bytes()?),
            _ => return None,
        }
    }
    Some((key.unwrap_or(0), value))
}

/// The fields of google.protobuf.Timestamp and Duration.
fn seconds_and_nanos(message: &[u8]) -> Option<(i64, i32)> {
    let (mut seconds, mut nanos) = (0, 0);
    let mut reader = Reader(message);
    while let Some((number, kind)) = reader.field()? {
        match (number, kind) {
            (1, VARINT) => seconds = int64(reader.varint()?),
            (2, VARINT) => nanos = int32(reader.varint()?)?,
            _ => return None,
        }
    }
    Some((seconds, nanos))
}

/// A StringMap. `None`: it is unusual, a key twice among that.
fn map(
    message: &[u8],
    words: &MessageWords,
    entries: &mut usize,
    is_whole: &mut bool,
) -> Option<StringMap> {
    let mut known = Vec::with_capacity(16);
    let mut reader = Reader(message);
    while let Some((number, kind)) = reader.field()? {
        if (number, kind) != (1, LENGTH) {
            return None;
        }
        *entries += 1;
        let (key, value) = pair(reader.bytes()?)?;
        let value = sint32(value.varint()?)?;
        match (words.get(key), words.get(value)) {
            (Some(key), Some(value)) => known.push((key, value)),
            _ => *is_whole = false,
        }
    }
    known.sort_by(|a, b| a.0.cmp(&b.0));
    if known
        .windows(2)
        .any(|pair| matches!(pair, [a, b] if a.0 == b.0))
    {
        return None;
    }
    Some(StringMap::sorted(Arc::from(known)))
}

#[cfg(test)]
mod tests;
