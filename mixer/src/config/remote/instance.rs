//! Instances of remote templates: expressions wherever the template's message has a value, type-checked at
//! load, and encoded into the message for each request.

use std::{collections::HashMap, sync::Arc};

use lateen_engine::{
    AttributeTable, Bag, EvalError, Expression, Language, Tracker, Value, ValueType,
};
use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value as Reflected,
};
use serde_json::{Map, Value as Json};

use super::{NAME_FIELD, RemoteTemplate};
use crate::config::object::{Fault, Source};

/// A compiled instance.
#[derive(Debug)]
pub struct RemoteInstance {
    /// `NAME.KIND.NAMESPACE`.
    pub name: Arc<str>,
    /// The first part of it: how a request names a quota.
    pub short_name: Arc<str>,
    /// Its template.
    pub template: Arc<RemoteTemplate>,
    fields: Vec<(FieldDescriptor, Plan)>,
}

/// An instance has no form for a request.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// An expression has no value.
    #[error(transparent)]
    Evaluate(#[from] EvalError),
    /// A number does not fit into the field.
    #[error("{value} does not fit into field {field}")]
    Range {
        /// The value.
        value: String,
        /// The field.
        field: String,
    },
}

/// How a field gets its value.
#[derive(Debug)]
enum Plan {
    Expression(Expression),
    /// Named in the configuration.
    Enum(i32),
    Message(MessageDescriptor, Vec<(FieldDescriptor, Plan)>),
    Map(Vec<(MapKey, Plan)>),
    List(Vec<Plan>),
}

impl RemoteInstance {
    /// Compiles the parameters of `source`, which is an instance of `template`; answers with everything that is
    /// wrong.
    ///
    /// # Errors
    /// Unknown fields, expressions that do not compile or have the wrong type.
    pub fn compile(
        source: &Source,
        template: Arc<RemoteTemplate>,
        params: Option<&Map<String, Json>>,
        table: &AttributeTable,
    ) -> Result<Self, Vec<Fault>> {
        let mut compiler = Compiler {
            language: source.language().map_err(|fault| vec![fault])?,
            table,
            faults: Vec::new(),
        };
        let fields = match params {
            Some(params) => compiler.message(&template.instance, params, "params"),
            None => Vec::new(),
        };
        if compiler.faults.is_empty() {
            Ok(Self {
                name: source.key.full_name(),
                short_name: Arc::clone(&source.key.name),
                template,
                fields,
            })
        } else {
            Err(compiler.faults)
        }
    }

    /// The template's message for a request.
    ///
    /// # Errors
    /// An expression has no value, or one that does not fit.
    pub fn encode(&self, bag: &Bag, tracker: &mut Tracker) -> Result<DynamicMessage, EncodeError> {
        let mut message = encode_message(&self.template.instance, &self.fields, bag, tracker)?;
        if let Some(field) = self.template.instance.get_field(NAME_FIELD) {
            set(
                &mut message,
                &field,
                Reflected::String(self.name.to_string()),
            )?;
        }
        Ok(message)
    }
}

/// Descriptors come from outside: what they say of a field and of its type may not go together.
fn set(
    message: &mut DynamicMessage,
    field: &FieldDescriptor,
    value: Reflected,
) -> Result<(), EncodeError> {
    message
        .try_set_field(field, value)
        .map_err(|_| EncodeError::Range {
            value: "a value of this type".to_owned(),
            field: field.full_name().to_owned(),
        })
}

fn encode_message(
    descriptor: &MessageDescriptor,
    fields: &[(FieldDescriptor, Plan)],
    bag: &Bag,
    tracker: &mut Tracker,
) -> Result<DynamicMessage, EncodeError> {
    let mut message = DynamicMessage::new(descriptor.clone());
    for (field, plan) in fields {
        let value = encode(field, plan, bag, tracker)?;
        set(&mut message, field, value)?;
    }
    Ok(message)
}

fn encode(
    field: &FieldDescriptor,
    plan: &Plan,
    bag: &Bag,
    tracker: &mut Tracker,
) -> Result<Reflected, EncodeError> {
    Ok(match plan {
        Plan::Expression(expression) => {
            let value = expression.evaluate(bag, tracker)?;
            reflect(field, &value).ok_or_else(|| EncodeError::Range {
                value: value.to_string(),
                field: field.full_name().to_owned(),
            })?
        }
        Plan::Enum(number) => Reflected::EnumNumber(*number),
        Plan::Message(descriptor, fields) => {
            Reflected::Message(encode_message(descriptor, fields, bag, tracker)?)
        }
        Plan::Map(entries) => {
            let value_field = map_value(field);
            let mut map = HashMap::with_capacity(entries.len());
            for (key, plan) in entries {
                let value = encode(value_field.as_ref().unwrap_or(field), plan, bag, tracker)?;
                map.insert(key.clone(), value);
            }
            Reflected::Map(map)
        }
        Plan::List(items) => {
            let items: Result<Vec<_>, _> = items
                .iter()
                .map(|plan| encode(field, plan, bag, tracker))
                .collect();
            Reflected::List(items?)
        }
    })
}

fn map_value(field: &FieldDescriptor) -> Option<FieldDescriptor> {
    match field.kind() {
        Kind::Message(entry) if field.is_map() => Some(entry.map_entry_value_field()),
        _ => None,
    }
}

/// The messages of `policy/v1beta1/type.proto` that stand for one type each.
const TYPED: [(&str, ValueType); 6] = [
    ("istio.policy.v1beta1.IPAddress", ValueType::IpAddress),
    ("istio.policy.v1beta1.TimeStamp", ValueType::Timestamp),
    ("istio.policy.v1beta1.Duration", ValueType::Duration),
    ("istio.policy.v1beta1.DNSName", ValueType::DnsName),
    ("istio.policy.v1beta1.EmailAddress", ValueType::EmailAddress),
    ("istio.policy.v1beta1.Uri", ValueType::Uri),
];

const ANY_VALUE: &str = "istio.policy.v1beta1.Value";

/// The type that an expression for a single value of `field` must have.
enum Wanted {
    Exactly(ValueType),
    Anything,
    /// No expression at all.
    Structure,
}

fn wanted(kind: &Kind) -> Wanted {
    Wanted::Exactly(match kind {
        Kind::String => ValueType::String,
        Kind::Bool => ValueType::Bool,
        Kind::Double | Kind::Float => ValueType::Double,
        Kind::Int32
        | Kind::Int64
        | Kind::Uint32
        | Kind::Uint64
        | Kind::Sint32
        | Kind::Sint64
        | Kind::Fixed32
        | Kind::Fixed64
        | Kind::Sfixed32
        | Kind::Sfixed64 => ValueType::Int64,
        Kind::Message(message) => match message.full_name() {
            ANY_VALUE => return Wanted::Anything,
            "google.protobuf.Timestamp" => ValueType::Timestamp,
            "google.protobuf.Duration" => ValueType::Duration,
            "istio.policy.v1beta1.StringMap" => ValueType::StringMap,
            name => match TYPED.iter().find(|(n, _)| *n == name) {
                Some((_, ty)) => *ty,
                None => return Wanted::Structure,
            },
        },
        Kind::Bytes | Kind::Enum(_) => return Wanted::Structure,
    })
}

/// A value in the form of a field; `None` when it does not fit.
fn reflect(field: &FieldDescriptor, value: &Value) -> Option<Reflected> {
    if field.is_map() {
        let entries = value.as_map()?.iter();
        let entries = entries.map(|(key, value)| {
            (
                MapKey::String(key.to_string()),
                Reflected::String(value.to_string()),
            )
        });
        return Some(Reflected::Map(entries.collect()));
    }
    Some(match (field.kind(), value) {
        (Kind::String, value) => Reflected::String(value.as_str()?.to_owned()),
        (Kind::Bool, value) => Reflected::Bool(value.as_bool()?),
        (Kind::Double, value) => Reflected::F64(value.as_f64()?),
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the field has no more digits"
        )]
        (Kind::Float, value) => Reflected::F32(value.as_f64()? as f32),
        (Kind::Int64 | Kind::Sint64 | Kind::Sfixed64, value) => Reflected::I64(value.as_i64()?),
        (Kind::Int32 | Kind::Sint32 | Kind::Sfixed32, value) => {
            Reflected::I32(value.as_i64()?.try_into().ok()?)
        }
        (Kind::Uint64 | Kind::Fixed64, value) => Reflected::U64(value.as_i64()?.try_into().ok()?),
        (Kind::Uint32 | Kind::Fixed32, value) => Reflected::U32(value.as_i64()?.try_into().ok()?),
        (Kind::Message(message), value) => Reflected::Message(reflect_message(&message, value)?),
        (Kind::Bytes | Kind::Enum(_), _) => return None,
    })
}

fn reflect_message(descriptor: &MessageDescriptor, value: &Value) -> Option<DynamicMessage> {
    let mut message = DynamicMessage::new(descriptor.clone());
    let mut set = |name: &str, value: Reflected| message.try_set_field_by_name(name, value).ok();
    match (descriptor.full_name(), value) {
        (ANY_VALUE, value) => {
            let name = match value.value_type() {
                ValueType::String => "string_value",
                ValueType::Int64 => "int64_value",
                ValueType::Double => "double_value",
                ValueType::Bool => "bool_value",
                ValueType::IpAddress => "ip_address_value",
                ValueType::Timestamp => "timestamp_value",
                ValueType::Duration => "duration_value",
                ValueType::EmailAddress => "email_address_value",
                ValueType::DnsName => "dns_name_value",
                ValueType::Uri => "uri_value",
                ValueType::StringMap => "string_map_value",
            };
            let field = descriptor.get_field_by_name(name)?;
            set(name, reflect(&field, value)?)?;
        }
        ("google.protobuf.Timestamp", Value::Timestamp(time)) => {
            set("seconds", Reflected::I64(time.timestamp()))?;
            let nanos = time.timestamp_subsec_nanos().min(999_999_999);
            set("nanos", Reflected::I32(nanos.try_into().ok()?))?;
        }
        ("google.protobuf.Duration", Value::Duration(span)) => {
            set("seconds", Reflected::I64(span.num_seconds()))?;
            set("nanos", Reflected::I32(span.subsec_nanos()))?;
        }
        (_, Value::Ip(ip)) => {
            let bytes = match ip {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            set("value", Reflected::Bytes(bytes.into()))?;
        }
        // The other messages of type.proto have one field, `value`.
        (_, value) => {
            let field = descriptor.get_field_by_name("value")?;
            let inner = match (field.kind(), value) {
                (Kind::String, value) => Reflected::String(value.as_str()?.to_owned()),
                _ => reflect(&field, value)?,
            };
            set("value", inner)?;
        }
    }
    Some(message)
}

struct Compiler<'a> {
    language: Language,
    table: &'a AttributeTable,
    faults: Vec<Fault>,
}

impl Compiler<'_> {
    fn fault<T>(&mut self, at: &str, reason: impl std::fmt::Display) -> Option<T> {
        self.faults.push(Fault::new(at, reason));
        None
    }

    fn message(
        &mut self,
        descriptor: &MessageDescriptor,
        written: &Map<String, Json>,
        at: &str,
    ) -> Vec<(FieldDescriptor, Plan)> {
        let mut plans: Vec<(FieldDescriptor, Plan)> = Vec::new();
        for (key, json) in written {
            let at = format!("{at}.{key}");
            let found = descriptor
                .get_field_by_name(key)
                .or_else(|| descriptor.get_field_by_json_name(key))
                .filter(|field| field.number() != NAME_FIELD);
            let Some(field) = found else {
                let known: Vec<String> = descriptor
                    .fields()
                    .filter(|field| field.number() != NAME_FIELD)
                    .map(|field| field.name().to_owned())
                    .collect();
                self.fault::<()>(
                    &at,
                    format!(
                        "the template has no such field; it has {}",
                        known.join(", ")
                    ),
                );
                continue;
            };
            if plans.iter().any(|(other, _)| *other == field) {
                self.fault::<()>(&at, "the field is there twice");
                continue;
            }
            if json.is_null() || json.as_str() == Some("") {
                continue;
            }
            if let Some(plan) = self.field(&field, json, &at) {
                plans.push((field, plan));
            }
        }
        plans
    }

    fn field(&mut self, field: &FieldDescriptor, json: &Json, at: &str) -> Option<Plan> {
        let Some(value_field) = map_value(field) else {
            if !field.is_list() {
                return self.single(field, json, at);
            }
            let Some(items) = json.as_array() else {
                return self.fault(at, format!("{json} is no list"));
            };
            let plans = items
                .iter()
                .enumerate()
                .filter_map(|(i, item)| self.single(field, item, &format!("{at}[{i}]")));
            return Some(Plan::List(plans.collect()));
        };
        let Kind::Message(entry) = field.kind() else {
            return self.fault(at, "the template has a map without entries");
        };
        let key_kind = entry.map_entry_key_field().kind();
        match json {
            Json::Object(entries) => {
                let mut plans = Vec::with_capacity(entries.len());
                for (key, json) in entries {
                    let at = format!("{at}.{key}");
                    let Some(key) = map_key(&key_kind, key) else {
                        self.fault::<()>(&at, format!("{key} is no key of type {key_kind:?}"));
                        continue;
                    };
                    plans.extend(self.single(&value_field, json, &at).map(|plan| (key, plan)));
                }
                Some(Plan::Map(plans))
            }
            // A map of texts may come from one expression.
            _ if key_kind == Kind::String && value_field.kind() == Kind::String => {
                self.expression(json, Some(ValueType::StringMap), at)
            }
            other => self.fault(at, format!("{other} is no map")),
        }
    }

    fn single(&mut self, field: &FieldDescriptor, json: &Json, at: &str) -> Option<Plan> {
        let kind = field.kind();
        match (wanted(&kind), &kind, json) {
            (Wanted::Exactly(ty), ..) => self.expression(json, Some(ty), at),
            (Wanted::Anything, ..) => self.expression(json, None, at),
            (Wanted::Structure, Kind::Enum(values), json) => {
                let number = match json {
                    Json::String(name) => values.get_value_by_name(name).map(|v| v.number()),
                    json => json.as_i64().and_then(|n| i32::try_from(n).ok()),
                };
                match number {
                    Some(number) => Some(Plan::Enum(number)),
                    None => {
                        let names: Vec<String> =
                            values.values().map(|v| v.name().to_owned()).collect();
                        self.fault(at, format!("{json} is none of {}", names.join(", ")))
                    }
                }
            }
            (Wanted::Structure, Kind::Message(message), Json::Object(written)) => {
                let fields = self.message(message, written, at);
                Some(Plan::Message(message.clone(), fields))
            }
            (Wanted::Structure, Kind::Message(_), other) => {
                self.fault(at, format!("{other} is no map"))
            }
            (Wanted::Structure, ..) => self.fault(at, "no expression has such values (bytes)"),
        }
    }

    fn expression(&mut self, json: &Json, want: Option<ValueType>, at: &str) -> Option<Plan> {
        let expression = match Expression::compile_param(self.language, json, self.table) {
            Ok(expression) => expression,
            Err(error) => return self.fault(at, error),
        };
        let ty = expression.value_type();
        let faults: Vec<Fault> = expression
            .faults()
            .iter()
            .map(|f| Fault::new(at, f))
            .collect();
        self.faults.extend(faults);
        if let Some(want) = want.filter(|want| *want != ty) {
            let reason = format!("'{}' is {ty}, but the field is {want}", expression.text());
            return self.fault(at, reason);
        }
        Some(Plan::Expression(expression))
    }
}

fn map_key(kind: &Kind, text: &str) -> Option<MapKey> {
    Some(match kind {
        Kind::String => MapKey::String(text.to_owned()),
        Kind::Bool => MapKey::Bool(text.parse().ok()?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => MapKey::I32(text.parse().ok()?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => MapKey::I64(text.parse().ok()?),
        Kind::Uint32 | Kind::Fixed32 => MapKey::U32(text.parse().ok()?),
        Kind::Uint64 | Kind::Fixed64 => MapKey::U64(text.parse().ok()?),
        _ => return None,
    })
}
