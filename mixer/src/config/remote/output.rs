//! What adapters return besides their verdict: the fields of a template's `OutputMsg` as values.

use std::sync::Arc;

use bytes::Bytes;
use lateen_adapter::{Value, ValueType};
use lateen_engine::{AttributeTable, StringMap};
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _,
    Value as Reflected,
};

use super::encode::{ANY_VALUE, Form};

/// Fields and their values.
pub type Decoded = Vec<(Arc<str>, Value)>;

/// The output of a template.
#[derive(Debug)]
pub struct OutputPlan {
    descriptor: MessageDescriptor,
    fields: Vec<(FieldDescriptor, Arc<str>, ValueType)>,
    /// The fields as attributes `output.NAME`, for attribute bindings.
    pub table: AttributeTable,
}

impl OutputPlan {
    /// Of the message `descriptor`. Fields of types that no attribute has are left out, and so are nested
    /// messages, as in Istio.
    ///
    /// # Errors
    /// The names of the fields are no attributes' names.
    pub fn of(descriptor: MessageDescriptor) -> Result<Self, String> {
        let mut fields = Vec::new();
        for field in descriptor.fields() {
            if let Some(ty) = value_type(&field) {
                let name = Arc::from(field.name());
                fields.push((field, name, ty));
            }
        }
        let names = fields
            .iter()
            .map(|(_, name, ty)| (format!("output.{name}"), *ty));
        let table = AttributeTable::new(names).map_err(|error| error.to_string())?;
        Ok(Self {
            descriptor,
            fields,
            table,
        })
    }

    /// Names and types.
    pub fn fields(&self) -> impl Iterator<Item = (&Arc<str>, ValueType)> {
        self.fields.iter().map(|(_, name, ty)| (name, *ty))
    }

    /// The values in a message. A field that is not there has no value: proto3 leaves out those that are zero or
    /// empty. Nor has one whose value makes no sense.
    ///
    /// # Errors
    /// It is no such message.
    pub fn decode(&self, message: Bytes) -> Result<Decoded, prost::DecodeError> {
        let message = DynamicMessage::decode(self.descriptor.clone(), message)?;
        let values = self.fields.iter().filter_map(|(field, name, ty)| {
            if !message.has_field(field) {
                return None;
            }
            let value = value(&message.get_field(field), *ty)?;
            Some((Arc::clone(name), value))
        });
        Ok(values.collect())
    }
}

/// The attribute type of a field.
fn value_type(field: &FieldDescriptor) -> Option<ValueType> {
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else {
            return None;
        };
        let is_text = |field: FieldDescriptor| field.kind() == Kind::String;
        return (is_text(entry.map_entry_key_field()) && is_text(entry.map_entry_value_field()))
            .then_some(ValueType::StringMap);
    }
    if field.is_list() {
        return None;
    }
    match field.kind() {
        // What type it has would be known too late.
        Kind::Message(message) if message.full_name() == ANY_VALUE => None,
        Kind::Float | Kind::Double => Some(ValueType::Double),
        kind => Form::of(&kind)?.value_type(),
    }
}

fn value(found: &Reflected, ty: ValueType) -> Option<Value> {
    Some(match found {
        Reflected::String(text) => Value::from_text(ty, text.as_str().into())?,
        Reflected::Bool(truth) => Value::Bool(*truth),
        Reflected::I32(n) => Value::Int64((*n).into()),
        Reflected::I64(n) => Value::Int64(*n),
        Reflected::U32(n) => Value::Int64((*n).into()),
        Reflected::U64(n) => Value::Int64(i64::try_from(*n).ok()?),
        Reflected::F32(n) => Value::Double((*n).into()),
        Reflected::F64(n) => Value::Double(*n),
        Reflected::Bytes(bytes) if ty == ValueType::IpAddress => Value::ip_from_bytes(bytes)?,
        Reflected::Map(map) => {
            let entries = map.iter().filter_map(|(key, value)| match (key, value) {
                (MapKey::String(key), Reflected::String(value)) => {
                    Some((key.as_str(), value.as_str()))
                }
                _ => None,
            });
            Value::StringMap(entries.collect::<StringMap>())
        }
        Reflected::Message(message) => {
            let name = message.descriptor().full_name().to_owned();
            if name == "google.protobuf.Timestamp" || name == "google.protobuf.Duration" {
                return time(message, ty);
            }
            // A message of type.proto: its one field is the value.
            return value(&*message.get_field_by_number(1)?, ty);
        }
        Reflected::Bytes(_) | Reflected::EnumNumber(_) | Reflected::List(_) => return None,
    })
}

fn time(message: &DynamicMessage, ty: ValueType) -> Option<Value> {
    let seconds = message.get_field_by_number(1)?.as_i64()?;
    let nanos = message.get_field_by_number(2)?.as_i32()?;
    Some(match ty {
        ValueType::Timestamp => {
            let nanos = u32::try_from(nanos).ok()?;
            Value::Timestamp(chrono::DateTime::from_timestamp(seconds, nanos)?)
        }
        ValueType::Duration => {
            let nanos = chrono::TimeDelta::nanoseconds(nanos.into());
            Value::Duration(chrono::TimeDelta::try_seconds(seconds)?.checked_add(&nanos)?)
        }
        _ => return None,
    })
}
