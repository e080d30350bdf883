//! Protobuf JSON straight into the encoded message, without descriptors or a message in between.
//!
//! Does the common part only, and gives up on everything else: unknown fields, `null`, bytes, what has a
//! form of its own. What it writes is what the way over [`prost_reflect`] would: fields by number, defaults
//! left out.

use std::{collections::HashSet, fmt};

use prost::encoding::{WireType, encode_key, encode_varint};
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Unexpected, Visitor,
};

use super::schema::{Field, Message, Special};

// Kinds as in `FieldDescriptorProto.Type`.
const DOUBLE: u8 = 1;
const FLOAT: u8 = 2;
const INT64: u8 = 3;
const UINT64: u8 = 4;
const INT32: u8 = 5;
const BOOL: u8 = 8;
const STRING: u8 = 9;
const MESSAGE: u8 = 11;
const UINT32: u8 = 13;
const ENUM: u8 = 14;

/// The encoding of a message of this type from JSON text; `None` when the long way must be gone.
pub(super) fn from_text(message: &str, text: &str) -> Option<Vec<u8>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let out = transcode(message, &mut deserializer)?;
    deserializer.end().ok()?;
    Some(out)
}

/// The same from a JSON value.
pub(super) fn from_value(message: &str, value: &serde_json::Value) -> Option<Vec<u8>> {
    transcode(message, value)
}

fn transcode<'de>(message: &str, from: impl Deserializer<'de>) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    Body {
        message: Message::named(message)?,
        out: &mut out,
    }
    .deserialize(from)
    .ok()?;
    Some(out)
}

/// Writes a field with a length: first what it holds, then the length is put before it.
fn delimited<T, E>(
    out: &mut Vec<u8>,
    number: u32,
    write: impl FnOnce(&mut Vec<u8>) -> Result<T, E>,
) -> Result<T, E> {
    encode_key(number, WireType::LengthDelimited, out);
    let start = out.len();
    let result = write(out)?;
    let len = out.len() - start;
    encode_varint(len as u64, out);
    let prefix = out.len() - start - len;
    out[start..].rotate_right(prefix);
    Ok(result)
}

fn text(out: &mut Vec<u8>, number: u32, text: &str) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

/// The fields of one message, without its length.
struct Body<'a> {
    message: Message,
    out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Body<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        match self.message.special() {
            Special::No => from.deserialize_map(self),
            Special::Any => from.deserialize_map(Any(self.out)),
            Special::Duration => from.deserialize_str(Duration(self.out)),
            Special::Struct => from.deserialize_map(Struct(self.out)),
            Special::Value => from.deserialize_any(AnyValue(self.out)),
            Special::ListValue => from.deserialize_seq(List(self.out)),
            Special::Wrapper => {
                let Some(field) = self.message.field("value") else {
                    return Err(D::Error::custom("a wrapper has a value"));
                };
                let out = self.out;
                from.deserialize_any(Scalar { field, out })
            }
            Special::Other => Err(D::Error::custom("a form of its own")),
        }
    }
}

impl<'de> Visitor<'de> for Body<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        fields(self.message, map, self.out)
    }
}

fn fields<'de, A: MapAccess<'de>>(
    message: Message,
    mut map: A,
    out: &mut Vec<u8>,
) -> Result<(), A::Error> {
    let begin = out.len();
    let mut seen: Vec<(Field, usize)> = Vec::with_capacity(8);
    while let Some(field) = map.next_key_seed(Key(message))? {
        let twice = |(other, _): &(Field, usize)| {
            other.number == field.number || other.oneof.is_some() && other.oneof == field.oneof
        };
        if seen.iter().any(twice) {
            return Err(A::Error::custom("a field twice, or two of a oneof"));
        }
        seen.push((field, out.len()));
        map.next_value_seed(Whole {
            field,
            out: &mut *out,
        })?;
    }
    if seen.is_sorted_by_key(|(field, _)| field.number) {
        return Ok(());
    }
    let unsorted = out.split_off(begin);
    let mut parts = Vec::with_capacity(seen.len());
    let mut end = unsorted.len();
    for (field, start) in seen.iter().rev() {
        let start = start - begin;
        parts.push((field.number, start..end));
        end = start;
    }
    parts.sort_by_key(|(number, _)| *number);
    for (_, part) in parts {
        out.extend_from_slice(&unsorted[part]);
    }
    Ok(())
}

/// The name of a field.
struct Key(Message);

impl<'de> DeserializeSeed<'de> for Key {
    type Value = Field;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Field, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for Key {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Field, E> {
        self.0
            .field(name)
            .ok_or_else(|| E::unknown_field(name, &[]))
    }
}

/// A field with all its values.
struct Whole<'a> {
    field: Field,
    out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Whole<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        let Whole { field, out } = self;
        if field.map {
            return from.deserialize_map(Entries { field, out });
        }
        if !field.repeated {
            return One { field, out }.deserialize(from);
        }
        if matches!(field.kind, MESSAGE | STRING) {
            return from.deserialize_seq(Repeated { field, out });
        }
        // Numbers are packed.
        let start = out.len();
        let packed = delimited(out, field.number, |out| {
            let before = out.len();
            from.deserialize_seq(Repeated {
                field,
                out: &mut *out,
            })?;
            Ok(out.len() > before)
        })?;
        if !packed {
            out.truncate(start);
        }
        Ok(())
    }
}

/// The values of a repeated field; numbers without keys.
struct Repeated<'a> {
    field: Field,
    out: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for Repeated<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Repeated { field, out } = self;
        while list
            .next_element_seed(One {
                field,
                out: &mut *out,
            })?
            .is_some()
        {}
        Ok(())
    }
}

/// One value of a field, with its key unless it is packed.
struct One<'a> {
    field: Field,
    out: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for One<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        let One { field, out } = self;
        if field.kind != MESSAGE {
            return from.deserialize_any(Scalar { field, out });
        }
        delimited(out, field.number, |out| {
            Body {
                message: field.message(),
                out,
            }
            .deserialize(from)
        })
    }
}

/// A number, a word or a text.
struct Scalar<'a> {
    field: Field,
    out: &'a mut Vec<u8>,
}

impl Scalar<'_> {
    fn varint<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        let packed = self.field.repeated;
        if value == 0 && !packed && !self.field.presence {
            return Ok(());
        }
        if !packed {
            encode_key(self.field.number, WireType::Varint, self.out);
        }
        encode_varint(value, self.out);
        Ok(())
    }

    fn float<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        let (bits, wire) = match self.field.kind {
            DOUBLE => (value.to_bits(), WireType::SixtyFourBit),
            FLOAT => {
                #[allow(clippy::cast_possible_truncation, reason = "checked below")]
                let narrow = value as f32;
                if narrow.is_infinite() {
                    return Err(E::custom("out of range"));
                }
                (u64::from(narrow.to_bits()), WireType::ThirtyTwoBit)
            }
            _ => return Err(E::invalid_type(Unexpected::Float(value), &self)),
        };
        let packed = self.field.repeated;
        if bits == 0 && !packed && !self.field.presence {
            return Ok(());
        }
        if !packed {
            encode_key(self.field.number, wire, self.out);
        }
        let width = if wire == WireType::SixtyFourBit { 8 } else { 4 };
        self.out.extend_from_slice(&bits.to_le_bytes()[..width]);
        Ok(())
    }
}

impl Visitor<'_> for Scalar<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value of kind {}", self.field.kind)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        match self.field.kind {
            BOOL => self.varint(u64::from(value)),
            _ => Err(E::invalid_type(Unexpected::Bool(value), &self)),
        }
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        let largest = match self.field.kind {
            UINT64 => u64::MAX,
            UINT32 => u64::from(u32::MAX),
            INT64 => i64::MAX as u64,
            INT32 | ENUM => i32::MAX as u64,
            #[allow(clippy::cast_precision_loss, reason = "exact below 2^53")]
            DOUBLE | FLOAT if value < 1 << 53 => return self.float(value as f64),
            _ => return Err(E::invalid_type(Unexpected::Unsigned(value), &self)),
        };
        if value > largest {
            return Err(E::invalid_value(Unexpected::Unsigned(value), &self));
        }
        self.varint(value)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        match (self.field.kind, u64::try_from(value)) {
            (_, Ok(value)) => self.visit_u64(value),
            (INT64, _) => self.varint(value.cast_unsigned()),
            (INT32 | ENUM, _) if i32::try_from(value).is_ok() => self.varint(value.cast_unsigned()),
            #[allow(clippy::cast_precision_loss, reason = "exact above -2^53")]
            (DOUBLE | FLOAT, _) if value > -(1 << 53) => self.float(value as f64),
            _ => Err(E::invalid_type(Unexpected::Signed(value), &self)),
        }
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.float(value)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        match self.field.kind {
            STRING => {
                if !value.is_empty() || self.field.repeated || self.field.presence {
                    text(self.out, self.field.number, value);
                }
                Ok(())
            }
            ENUM => match self.field.enum_value(value) {
                Some(number) => self.varint(i64::from(number).cast_unsigned()),
                None => Err(E::unknown_variant(value, &[])),
            },
            UINT64 | INT64 if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) => {
                match value.parse() {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::invalid_value(Unexpected::Str(value), &self)),
                }
            }
            _ => Err(E::invalid_type(Unexpected::Str(value), &self)),
        }
    }
}

/// The entries of a map field.
struct Entries<'a> {
    field: Field,
    out: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let entry = self.field.message();
        let value = match (entry.field("key"), entry.field("value")) {
            (Some(key), Some(value)) if key.kind == STRING => value,
            _ => return Err(A::Error::custom("keys are not texts")),
        };
        // An entry always says its value.
        let value = value.always_written();
        let mut names = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            delimited(self.out, self.field.number, |out| {
                text(out, 1, &key);
                map.next_value_seed(One { field: value, out })
            })?;
            if !names.insert(key) {
                return Err(A::Error::custom("a key twice"));
            }
        }
        Ok(())
    }
}

/// A `google.protobuf.Any` whose `@type` comes first.
struct Any<'a>(&'a mut Vec<u8>);

impl<'de> Visitor<'de> for Any<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with its @type first")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Any(out) = self;
        if map.next_key::<String>()?.as_deref() != Some("@type") {
            return Err(A::Error::custom("@type is not first"));
        }
        let url: String = map.next_value()?;
        let message = url
            .strip_prefix("type.googleapis.com/")
            .and_then(Message::named)
            .filter(|message| message.special() == Special::No)
            .ok_or_else(|| A::Error::custom("an unknown type"))?;
        text(out, 1, &url);
        let start = out.len();
        let empty = delimited(out, 2, |out| {
            let before = out.len();
            fields(message, map, out)?;
            Ok(out.len() == before)
        })?;
        if empty {
            out.truncate(start);
        }
        Ok(())
    }
}

/// A `google.protobuf.Duration` that is not negative.
struct Duration<'a>(&'a mut Vec<u8>);

impl Visitor<'_> for Duration<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("seconds, as in 1.5s")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        /// 10,000 years.
        const LONGEST: u64 = 315_576_000_000;
        let read = || {
            let number = value.strip_suffix('s')?;
            let (whole, part) = match number.split_once('.') {
                Some((_, "")) => return None,
                Some((whole, part)) => (whole, part),
                None => (number, ""),
            };
            let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
            if whole.is_empty() || part.len() > 9 || !digits(whole) || !digits(part) {
                return None;
            }
            let seconds: u64 = whole.parse().ok().filter(|seconds| *seconds < LONGEST)?;
            let nanos: u64 = format!("{part:0<9}").parse().ok()?;
            Some((seconds, nanos))
        };
        let (seconds, nanos) =
            read().ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))?;
        for (number, value) in [(1, seconds), (2, nanos)] {
            if value != 0 {
                encode_key(number, WireType::Varint, self.0);
                encode_varint(value, self.0);
            }
        }
        Ok(())
    }
}

/// A `google.protobuf.Value`.
struct AnyValue<'a>(&'a mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for AnyValue<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        encode_key(1, WireType::Varint, self.0);
        encode_varint(0, self.0);
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        encode_key(4, WireType::Varint, self.0);
        encode_varint(u64::from(value), self.0);
        Ok(())
    }

    #[allow(clippy::cast_precision_loss, reason = "numbers of a Value are doubles")]
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.visit_f64(value as f64)
    }

    #[allow(clippy::cast_precision_loss, reason = "numbers of a Value are doubles")]
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.visit_f64(value as f64)
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        encode_key(2, WireType::SixtyFourBit, self.0);
        self.0.extend_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        text(self.0, 3, value);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        delimited(self.0, 5, |out| Struct(out).visit_map(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        delimited(self.0, 6, |out| List(out).visit_seq(list))
    }
}

/// A `google.protobuf.Struct`.
struct Struct<'a>(&'a mut Vec<u8>);

impl<'de> Visitor<'de> for Struct<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            delimited(self.0, 1, |out| {
                text(out, 1, &key);
                delimited(out, 2, |out| map.next_value_seed(AnyValue(out)))
            })?;
            if !names.insert(key) {
                return Err(A::Error::custom("a key twice"));
            }
        }
        Ok(())
    }
}

/// A `google.protobuf.ListValue`.
struct List<'a>(&'a mut Vec<u8>);

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        loop {
            let start = self.0.len();
            let more = delimited(self.0, 1, |out| list.next_element_seed(AnyValue(out)))?;
            if more.is_none() {
                self.0.truncate(start);
                return Ok(());
            }
        }
    }
}
