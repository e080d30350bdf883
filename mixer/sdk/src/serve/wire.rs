//! Instances, outputs and inferred types in protobuf's encoding, read and written by the template: field n of a
//! template has number n, counted from 1, as in Istio's (istio.io/istio `mixer/template/*/template.proto`), but for
//! [`EDGE`].

use std::sync::Arc;

use chrono::{DateTime, TimeDelta};
use lateen_engine::{StringMap, Value, ValueType};

use crate::{
    handler::Output,
    instance::{FieldValue, Fields, Values},
    template::{Field, FieldKind, Template},
};

/// The number of the field `name` of every instance.
const NAME: u32 = 72_295_727;
/// The numbers of the fields of template `edge`, which leave gaps.
const EDGE: [u32; 13] = [1, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25, 30, 31];
/// How deep messages may be inside each other.
const MAX_DEPTH: u32 = 8;

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message is malformed: {0}")]
pub(super) struct Malformed(&'static str);

/// What stands after a field's number.
#[derive(Clone, Copy)]
enum Part<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(Malformed("it is cut off"))?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed("a number has no end"))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| Malformed("a length is too large"))?;
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(Malformed("it is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u32, Part<'a>)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| Malformed("a field has no number"))?;
        let part = match key & 7 {
            0 => Part::Number(self.varint()?),
            1 => Part::Number(little(self.take(8)?)),
            2 => {
                let length = self.varint()?;
                Part::Bytes(self.take(length)?)
            }
            5 => Part::Number(little(self.take(4)?)),
            _ => return Err(Malformed("a field has no type")),
        };
        Ok(Some((number, part)))
    }

    /// The last value of field `number`.
    fn find(mut self, wanted: u32) -> Result<Option<Part<'a>>, Malformed> {
        let mut found = None;
        while let Some((number, part)) = self.next()? {
            if number == wanted {
                found = Some(part);
            }
        }
        Ok(found)
    }
}

fn little(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

impl<'a> Part<'a> {
    fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Number(_) => Err(Malformed("a number stands where a text should")),
        }
    }

    fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Malformed("a text is not UTF-8"))
    }

    fn number(self) -> Result<u64, Malformed> {
        match self {
            Self::Number(n) => Ok(n),
            Self::Bytes(_) => Err(Malformed("a text stands where a number should")),
        }
    }
}

/// Name and fields of an instance of `template`.
pub(super) fn instance(
    template: &'static Template,
    bytes: &[u8],
) -> Result<(Arc<str>, Fields), Malformed> {
    let name = match Reader(bytes).find(NAME)? {
        Some(name) => name.text()?,
        None => "",
    };
    Ok((Arc::from(name), fields(Known::of(template), bytes, 0)?))
}

/// The fields of a message, by number.
#[derive(Clone, Copy)]
struct Known {
    fields: &'static [Field],
    numbers: Option<&'static [u32]>,
}

impl Known {
    fn of(template: &Template) -> Self {
        Self {
            fields: template.fields,
            numbers: (template.name == "edge").then_some(&EDGE),
        }
    }

    fn inside(fields: &'static [Field]) -> Self {
        Self {
            fields,
            numbers: None,
        }
    }

    fn field(self, number: u32) -> Option<&'static Field> {
        let at = match self.numbers {
            Some(numbers) => numbers.iter().position(|n| *n == number)?,
            None => usize::try_from(number).ok()?.checked_sub(1)?,
        };
        self.fields.get(at)
    }
}

fn fields(known: Known, bytes: &[u8], depth: u32) -> Result<Fields, Malformed> {
    if depth > MAX_DEPTH {
        return Err(Malformed("it is too deep"));
    }
    let mut all = Fields::default();
    // Entries of string maps, which are made at the end: each entry is a field of its own.
    let mut maps: Vec<(&'static str, Vec<(String, String)>)> = Vec::new();
    let mut reader = Reader(bytes);
    while let Some((number, part)) = reader.next()? {
        let Some(field) = known.field(number) else {
            continue;
        };
        let at = all.0.iter().position(|(name, _)| *name == field.name);
        let before = at.map(|at| all.0.swap_remove(at).1);
        let value = match &field.kind {
            FieldKind::Exact(ValueType::StringMap) => {
                let pair = text_entry(part)?;
                match maps.iter_mut().find(|(name, _)| *name == field.name) {
                    Some((_, pairs)) => pairs.push(pair),
                    None => maps.push((field.name, vec![pair])),
                }
                continue;
            }
            FieldKind::Exact(ty) => FieldValue::One(exact(*ty, part)?),
            FieldKind::Any => match dynamic(part.bytes()?)? {
                Some(value) => FieldValue::One(value),
                None => continue,
            },
            FieldKind::Map => {
                let (key, value) = entry(part)?;
                let mut values = match before {
                    Some(FieldValue::Map(values)) => values,
                    _ => Values::new(),
                };
                if let Some(value) = value.map(Part::bytes).transpose()? {
                    values.extend(dynamic(value)?.map(|value| (Arc::from(key), value)));
                }
                FieldValue::Map(values)
            }
            FieldKind::Message(inner) => {
                FieldValue::Message(fields(Known::inside(inner), part.bytes()?, depth + 1)?)
            }
        };
        all.0.push((field.name, value));
    }
    for (name, pairs) in maps {
        let map = pairs.into_iter().collect::<StringMap>();
        all.0.push((name, FieldValue::One(Value::StringMap(map))));
    }
    Ok(all)
}

/// Key and value of an entry of a map of strings.
fn text_entry(part: Part<'_>) -> Result<(String, String), Malformed> {
    let (key, value) = entry(part)?;
    let value = value.map(Part::text).transpose()?.unwrap_or_default();
    Ok((key.to_owned(), value.to_owned()))
}

/// Key and value of a map's entry.
fn entry(part: Part<'_>) -> Result<(&str, Option<Part<'_>>), Malformed> {
    let bytes = part.bytes()?;
    let key = match Reader(bytes).find(1)? {
        Some(key) => key.text()?,
        None => "",
    };
    Ok((key, Reader(bytes).find(2)?))
}

/// A field of one type: scalars as they are, others in the messages of `istio.policy.v1beta1`.
fn exact(ty: ValueType, part: Part<'_>) -> Result<Value, Malformed> {
    fn inner(part: Part<'_>) -> Result<Option<Part<'_>>, Malformed> {
        Reader(part.bytes()?).find(1)
    }
    let wrong = Malformed("a value is none of its type");
    Ok(match ty {
        ValueType::String => Value::String(part.text()?.into()),
        #[allow(clippy::cast_possible_wrap, reason = "protobuf's int64")]
        ValueType::Int64 => Value::Int64(part.number()? as i64),
        ValueType::Double => Value::Double(f64::from_bits(part.number()?)),
        ValueType::Bool => Value::Bool(part.number()? != 0),
        ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName => {
            let text = match Reader(part.bytes()?).find(1)? {
                Some(text) => text.text()?,
                None => "",
            };
            Value::from_text(ty, text.into()).ok_or(wrong)?
        }
        ValueType::IpAddress => {
            let bytes = match Reader(part.bytes()?).find(1)? {
                Some(bytes) => bytes.bytes()?,
                None => &[],
            };
            Value::ip_from_bytes(bytes).ok_or(wrong)?
        }
        ValueType::Timestamp | ValueType::Duration => {
            let (seconds, nanos) = match inner(part)? {
                Some(time) => (
                    Reader(time.bytes()?).find(1)?,
                    Reader(time.bytes()?).find(2)?,
                ),
                None => (None, None),
            };
            let number = |part: Option<Part<'_>>| part.map_or(Ok(0), Part::number);
            #[allow(clippy::cast_possible_wrap, reason = "protobuf's int64")]
            let (seconds, nanos) = (number(seconds)? as i64, number(nanos)? as i64);
            if ty == ValueType::Timestamp {
                let nanos = u32::try_from(nanos).map_err(|_| wrong.clone())?;
                Value::Timestamp(DateTime::from_timestamp(seconds, nanos).ok_or(wrong)?)
            } else {
                let span = TimeDelta::try_seconds(seconds)
                    .and_then(|s| s.checked_add(&TimeDelta::nanoseconds(nanos)));
                Value::Duration(span.ok_or(wrong)?)
            }
        }
        ValueType::StringMap => {
            let mut reader = Reader(part.bytes()?);
            let mut pairs = Vec::new();
            while let Some((number, part)) = reader.next()? {
                if number != 1 {
                    continue;
                }
                pairs.push(text_entry(part)?);
            }
            Value::StringMap(pairs.into_iter().collect::<StringMap>())
        }
    })
}

/// The numbers of `istio.policy.v1beta1.Value`.
const CASES: [ValueType; 11] = [
    ValueType::String,
    ValueType::Int64,
    ValueType::Double,
    ValueType::Bool,
    ValueType::IpAddress,
    ValueType::Timestamp,
    ValueType::Duration,
    ValueType::EmailAddress,
    ValueType::DnsName,
    ValueType::Uri,
    ValueType::StringMap,
];

fn dynamic(bytes: &[u8]) -> Result<Option<Value>, Malformed> {
    let mut reader = Reader(bytes);
    let mut found = None;
    while let Some((number, part)) = reader.next()? {
        let case = number.checked_sub(1).and_then(|n| usize::try_from(n).ok());
        if let Some(ty) = case.and_then(|n| CASES.get(n)) {
            found = Some(exact(*ty, part)?);
        }
    }
    Ok(found)
}

/// Paths and types in the message `Type` of `template`.
pub(super) fn types(
    template: &'static Template,
    bytes: &[u8],
) -> Result<Vec<(Arc<str>, ValueType)>, Malformed> {
    let mut found = Vec::new();
    collect(Known::of(template), bytes, "", 0, &mut found)?;
    found.sort();
    Ok(found)
}

fn collect(
    known: Known,
    bytes: &[u8],
    path: &str,
    depth: u32,
    found: &mut Vec<(Arc<str>, ValueType)>,
) -> Result<(), Malformed> {
    if depth > MAX_DEPTH {
        return Err(Malformed("it is too deep"));
    }
    let ty = |part: Part<'_>| {
        let number = i32::try_from(part.number()?).map_err(|_| Malformed("a type is none"))?;
        ValueType::from_number(number).ok_or(Malformed("a type is none"))
    };
    let mut reader = Reader(bytes);
    while let Some((number, part)) = reader.next()? {
        let Some(field) = known.field(number) else {
            continue;
        };
        let path = format!("{path}{}", field.name);
        match &field.kind {
            FieldKind::Any => found.push((Arc::from(path), ty(part)?)),
            FieldKind::Map => {
                let (key, value) = entry(part)?;
                if let Some(value) = value {
                    found.push((Arc::from(format!("{path}.{key}")), ty(value)?));
                }
            }
            FieldKind::Message(inner) => {
                let inside = Known::inside(inner);
                collect(inside, part.bytes()?, &format!("{path}."), depth + 1, found)?;
            }
            FieldKind::Exact(_) => {}
        }
    }
    Ok(())
}

/// The message `OutputMsg` of `template`.
pub(super) fn output(template: &Template, output: &Output) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in output {
        let at = template.outputs.iter().position(|(n, _)| n == name);
        let number = at.and_then(|at| u64::try_from(at + 1).ok());
        if let Some(number) = number {
            put_value(&mut bytes, number, value);
        }
    }
    bytes
}

fn put_value(out: &mut Vec<u8>, number: u64, value: &Value) {
    match value {
        Value::String(text) => put_bytes(out, number, text.as_bytes()),
        #[allow(clippy::cast_sign_loss, reason = "protobuf's int64")]
        Value::Int64(n) => put_number(out, number, *n as u64),
        Value::Bool(b) => put_number(out, number, u64::from(*b)),
        Value::Double(n) => {
            put_varint(out, number << 3 | 1);
            out.extend(n.to_le_bytes());
        }
        Value::Email(text) | Value::Uri(text) | Value::DnsName(text) => {
            put_nested(out, number, |inner| put_bytes(inner, 1, text.as_bytes()));
        }
        Value::Ip(ip) => {
            let bytes = match ip {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            put_nested(out, number, |inner| put_bytes(inner, 1, &bytes));
        }
        Value::Timestamp(time) => put_nested(out, number, |inner| {
            let nanos = time.timestamp_subsec_nanos().min(999_999_999);
            put_time(inner, time.timestamp(), i64::from(nanos));
        }),
        Value::Duration(span) => put_nested(out, number, |inner| {
            put_time(inner, span.num_seconds(), span.subsec_nanos().into());
        }),
        Value::StringMap(map) => {
            for (key, value) in map.iter() {
                put_nested(out, number, |inner| {
                    put_bytes(inner, 1, key.as_bytes());
                    put_bytes(inner, 2, value.as_bytes());
                });
            }
        }
    }
}

fn put_time(out: &mut Vec<u8>, seconds: i64, nanos: i64) {
    put_nested(out, 1, |inner| {
        #[allow(clippy::cast_sign_loss, reason = "protobuf's int64")]
        put_number(inner, 1, seconds as u64);
        #[allow(clippy::cast_sign_loss, reason = "protobuf's int32")]
        put_number(inner, 2, nanos as u64);
    });
}

/// A message as field `number`.
pub(super) fn put_nested(out: &mut Vec<u8>, number: u64, write: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    write(&mut inner);
    put_bytes(out, number, &inner);
}

/// Bytes as field `number`.
pub(super) fn put_bytes(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn put_number(out: &mut Vec<u8>, number: u64, value: u64) {
    put_varint(out, number << 3);
    put_varint(out, value);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        #[allow(clippy::cast_possible_truncation, reason = "seven bits")]
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    #[allow(clippy::cast_possible_truncation, reason = "seven bits")]
    out.push(value as u8);
}
