//! How an instance is written as the message of its template: field by field, in an order and with keys that
//! are fixed when the configuration is loaded. Descriptors are not looked at again for a request.
//!
//! reference: protobuf.dev/programming-guides/encoding; istio.io/api `policy/v1beta1/type.proto`.

use std::sync::Arc;

use bytes::BufMut as _;
use lateen_engine::{Bag, EvalError, Expression, Tracker, Value, ValueType};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use prost_reflect::{FieldDescriptor, Kind};

/// An instance has no form for a request.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// An expression has no value.
    #[error(transparent)]
    Evaluate(#[from] EvalError),
    /// A value does not fit into the field.
    #[error("{value} does not fit into field {field}")]
    Range {
        /// The value.
        value: String,
        /// The field.
        field: Arc<str>,
    },
}

/// How one field is written.
#[derive(Debug)]
pub(super) enum Plan {
    /// A value that requests decide.
    Value {
        number: u32,
        name: Arc<str>,
        form: Form,
        expression: Expression,
    },
    /// The same for all requests: key and value.
    Constant(Vec<u8>),
    /// A message, or an entry of a map.
    Message { number: u32, fields: Vec<Plan> },
}

/// How a value is written after its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    String,
    Bool,
    Double,
    Float,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    /// `istio.policy.v1beta1.Value`: any type.
    Any,
    /// `google.protobuf.Timestamp`.
    Timestamp,
    /// `google.protobuf.Duration`.
    Duration,
    /// A message of `type.proto` for this one type, whose field 1 has the value.
    Typed(ValueType),
    /// `map<string, string>`, of all entries of a STRING_MAP.
    StringMap,
}

/// The messages of `policy/v1beta1/type.proto` that stand for one type each.
const TYPED: [(&str, ValueType); 7] = [
    ("istio.policy.v1beta1.IPAddress", ValueType::IpAddress),
    ("istio.policy.v1beta1.TimeStamp", ValueType::Timestamp),
    ("istio.policy.v1beta1.Duration", ValueType::Duration),
    ("istio.policy.v1beta1.DNSName", ValueType::DnsName),
    ("istio.policy.v1beta1.EmailAddress", ValueType::EmailAddress),
    ("istio.policy.v1beta1.Uri", ValueType::Uri),
    ("istio.policy.v1beta1.StringMap", ValueType::StringMap),
];

pub(super) const ANY_VALUE: &str = "istio.policy.v1beta1.Value";

impl Form {
    /// How one value of `kind` is written; `None`: no expression has such values.
    pub(super) fn of(kind: &Kind) -> Option<Self> {
        Some(match kind {
            Kind::String => Self::String,
            Kind::Bool => Self::Bool,
            Kind::Double => Self::Double,
            Kind::Float => Self::Float,
            Kind::Int32 => Self::Int32,
            Kind::Int64 => Self::Int64,
            Kind::Uint32 => Self::Uint32,
            Kind::Uint64 => Self::Uint64,
            Kind::Sint32 => Self::Sint32,
            Kind::Sint64 => Self::Sint64,
            Kind::Fixed32 => Self::Fixed32,
            Kind::Fixed64 => Self::Fixed64,
            Kind::Sfixed32 => Self::Sfixed32,
            Kind::Sfixed64 => Self::Sfixed64,
            Kind::Message(message) => match message.full_name() {
                ANY_VALUE => Self::Any,
                "google.protobuf.Timestamp" => Self::Timestamp,
                "google.protobuf.Duration" => Self::Duration,
                name => Self::Typed(TYPED.iter().find(|(n, _)| *n == name)?.1),
            },
            Kind::Bytes | Kind::Enum(_) => return None,
        })
    }

    /// The type that an expression for it must have; `None`: any.
    pub(super) fn value_type(self) -> Option<ValueType> {
        Some(match self {
            Self::Any => return None,
            Self::String => ValueType::String,
            Self::Bool => ValueType::Bool,
            Self::Double | Self::Float => ValueType::Double,
            Self::Timestamp => ValueType::Timestamp,
            Self::Duration => ValueType::Duration,
            Self::Typed(ty) => ty,
            Self::StringMap => ValueType::StringMap,
            Self::Int32
            | Self::Int64
            | Self::Uint32
            | Self::Uint64
            | Self::Sint32
            | Self::Sint64
            | Self::Fixed32
            | Self::Fixed64
            | Self::Sfixed32
            | Self::Sfixed64 => ValueType::Int64,
        })
    }
}

impl Plan {
    /// `field` gets what `expression` says.
    pub(super) fn value(field: &FieldDescriptor, form: Form, expression: Expression) -> Self {
        Self::Value {
            number: field.number(),
            name: Arc::from(field.full_name()),
            form,
            expression,
        }
    }

    /// An enum's value.
    pub(super) fn constant_enum(number: u32, value: i32) -> Self {
        let mut bytes = Vec::new();
        write_varint(number, i64::from(value), &mut bytes);
        Self::Constant(bytes)
    }

    /// A text.
    pub(super) fn constant_text(number: u32, text: &str) -> Self {
        let mut bytes = Vec::new();
        write_bytes(number, text.as_bytes(), &mut bytes);
        Self::Constant(bytes)
    }

    /// Key `key` of an entry of a map, whose keys are of `kind`; `None`: that is none.
    pub(super) fn map_key(kind: &Kind, key: &str) -> Option<Self> {
        let mut bytes = Vec::new();
        let number = 1;
        match kind {
            Kind::String => write_bytes(number, key.as_bytes(), &mut bytes),
            Kind::Bool => write_varint(number, i64::from(key.parse::<bool>().ok()?), &mut bytes),
            kind => {
                let integer = key.parse().ok()?;
                Form::of(kind)?.write_integer(number, integer, &mut bytes)?;
            }
        }
        Some(Self::Constant(bytes))
    }

    /// Writes the field for a request.
    pub(super) fn write(
        &self,
        bag: &Bag,
        tracker: &mut Tracker,
        buffer: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        match self {
            Self::Constant(bytes) => buffer.extend_from_slice(bytes),
            Self::Message { number, fields } => {
                let start = open(*number, buffer);
                for field in fields {
                    field.write(bag, tracker, buffer)?;
                }
                close(start, buffer);
            }
            Self::Value {
                number,
                name,
                form,
                expression,
            } => {
                let value = expression.evaluate(bag, tracker)?;
                form.write(*number, &value, buffer)
                    .ok_or_else(|| EncodeError::Range {
                        value: value.to_string(),
                        field: Arc::clone(name),
                    })?;
            }
        }
        Ok(())
    }
}

impl Form {
    /// `None`: the value does not fit.
    fn write(self, number: u32, value: &Value, buffer: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::String => write_bytes(number, value.as_str()?.as_bytes(), buffer),
            Self::Bool => write_varint(number, i64::from(value.as_bool()?), buffer),
            Self::Double => {
                encode_key(number, WireType::SixtyFourBit, buffer);
                buffer.put_f64_le(value.as_f64()?);
            }
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the field has no more digits"
            )]
            Self::Float => {
                encode_key(number, WireType::ThirtyTwoBit, buffer);
                buffer.put_f32_le(value.as_f64()? as f32);
            }
            Self::Any => {
                let start = open(number, buffer);
                write_any(value, buffer)?;
                close(start, buffer);
            }
            Self::Timestamp | Self::Duration => write_time(number, value, buffer)?,
            Self::Typed(_) => {
                let start = open(number, buffer);
                write_typed(value, buffer)?;
                close(start, buffer);
            }
            Self::StringMap => write_map(number, value, buffer)?,
            integer => integer.write_integer(number, value.as_i64()?, buffer)?,
        }
        Some(())
    }

    fn write_integer(self, number: u32, value: i64, buffer: &mut Vec<u8>) -> Option<()> {
        let zigzag = |n: i64| ((n << 1) ^ (n >> 63)).cast_unsigned();
        match self {
            Self::Int64 => write_varint(number, value, buffer),
            Self::Int32 => write_varint(number, i32::try_from(value).ok()?.into(), buffer),
            Self::Uint64 => write_varint(number, (value >= 0).then_some(value)?, buffer),
            Self::Uint32 => write_varint(number, u32::try_from(value).ok()?.into(), buffer),
            Self::Sint64 => write_varint(number, zigzag(value).cast_signed(), buffer),
            Self::Sint32 => {
                let value = i32::try_from(value).ok()?;
                write_varint(number, zigzag(value.into()).cast_signed(), buffer);
            }
            Self::Fixed64 | Self::Sfixed64 => {
                if self == Self::Fixed64 && value < 0 {
                    return None;
                }
                encode_key(number, WireType::SixtyFourBit, buffer);
                buffer.put_i64_le(value);
            }
            Self::Fixed32 => {
                let value = u32::try_from(value).ok()?;
                encode_key(number, WireType::ThirtyTwoBit, buffer);
                buffer.put_u32_le(value);
            }
            Self::Sfixed32 => {
                let value = i32::try_from(value).ok()?;
                encode_key(number, WireType::ThirtyTwoBit, buffer);
                buffer.put_i32_le(value);
            }
            _ => return None,
        }
        Some(())
    }
}

/// The one field of a `Value`.
fn write_any(value: &Value, buffer: &mut Vec<u8>) -> Option<()> {
    match value {
        Value::String(text) => write_bytes(1, text.as_str().as_bytes(), buffer),
        Value::Int64(number) => write_varint(2, *number, buffer),
        Value::Double(_) => Form::Double.write(3, value, buffer)?,
        Value::Bool(truth) => write_varint(4, i64::from(*truth), buffer),
        typed => {
            let number = match typed.value_type() {
                ValueType::IpAddress => 5,
                ValueType::Timestamp => 6,
                ValueType::Duration => 7,
                ValueType::EmailAddress => 8,
                ValueType::DnsName => 9,
                ValueType::Uri => 10,
                ValueType::StringMap => 11,
                ValueType::String | ValueType::Int64 | ValueType::Double | ValueType::Bool => {
                    return None;
                }
            };
            let start = open(number, buffer);
            write_typed(typed, buffer)?;
            close(start, buffer);
        }
    }
    Some(())
}

/// Field 1 of a message that stands for the value's type.
fn write_typed(value: &Value, buffer: &mut Vec<u8>) -> Option<()> {
    match value {
        Value::Ip(std::net::IpAddr::V4(ip)) => write_bytes(1, &ip.octets(), buffer),
        Value::Ip(std::net::IpAddr::V6(ip)) => write_bytes(1, &ip.octets(), buffer),
        Value::Timestamp(_) | Value::Duration(_) => write_time(1, value, buffer)?,
        Value::StringMap(_) => write_map(1, value, buffer)?,
        text => write_bytes(1, text.as_str()?.as_bytes(), buffer),
    }
    Some(())
}

/// `google.protobuf.Timestamp` or `Duration`: both have seconds and nanoseconds.
fn write_time(number: u32, value: &Value, buffer: &mut Vec<u8>) -> Option<()> {
    let (seconds, nanos) = match value {
        Value::Timestamp(time) => (
            time.timestamp(),
            // A leap second has more.
            i64::from(time.timestamp_subsec_nanos().min(999_999_999)),
        ),
        Value::Duration(span) => (span.num_seconds(), i64::from(span.subsec_nanos())),
        _ => return None,
    };
    let start = open(number, buffer);
    for (number, part) in [(1, seconds), (2, nanos)] {
        if part != 0 {
            write_varint(number, part, buffer);
        }
    }
    close(start, buffer);
    Some(())
}

fn write_map(number: u32, value: &Value, buffer: &mut Vec<u8>) -> Option<()> {
    let Value::StringMap(map) = value else {
        return None;
    };
    for (key, value) in map.iter() {
        let start = open(number, buffer);
        write_bytes(1, key.as_str().as_bytes(), buffer);
        write_bytes(2, value.as_str().as_bytes(), buffer);
        close(start, buffer);
    }
    Some(())
}

/// A key and a number; negative ones are written as ten bytes, as `int32` and `int64` want it.
pub(crate) fn write_varint(number: u32, value: i64, buffer: &mut Vec<u8>) {
    encode_key(number, WireType::Varint, buffer);
    encode_varint(value.cast_unsigned(), buffer);
}

/// A key and bytes: a text, or a message.
pub(crate) fn write_bytes(number: u32, bytes: &[u8], buffer: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, buffer);
    encode_varint(bytes.len() as u64, buffer);
    buffer.extend_from_slice(bytes);
}

/// Begins a message; answers with where it begins.
fn open(number: u32, buffer: &mut Vec<u8>) -> usize {
    encode_key(number, WireType::LengthDelimited, buffer);
    buffer.push(0); // most messages are shorter than 128 bytes: their length takes one
    buffer.len()
}

/// Ends the message that began at `start`: now its length is known.
fn close(start: usize, buffer: &mut Vec<u8>) {
    let length = buffer.len().saturating_sub(start) as u64;
    let mut bytes = [0; 10];
    let width = encoded_len_varint(length);
    encode_varint(length, &mut bytes.as_mut_slice());
    let place = start.saturating_sub(1)..start;
    buffer.splice(place, bytes.into_iter().take(width));
}
