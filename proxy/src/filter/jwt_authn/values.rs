//! Claims as headers and as metadata.

use lateen_protocols::envoy::google::protobuf as pb;
use pb::value::Kind;
use serde_json::{Map, Value};

use super::token::encode;

/// The claim at the end of a path.
pub(super) fn find<'a>(claims: &'a Map<String, Value>, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let mut value = claims.get(first)?;
    for key in rest {
        value = value.as_object()?.get(key)?;
    }
    Some(value)
}

/// A claim as the value of a header; lists and objects are JSON in base64url.
pub(super) fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => {
            let safe = |b: u8| !matches!(b, b'\r' | b'\n' | 0);
            text.bytes().all(safe).then(|| text.clone())
        }
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(_) | Value::Object(_) => Some(encode(value.to_string().as_bytes(), false)),
        Value::Null => None,
    }
}

/// JSON as metadata has it.
pub(super) fn metadata(value: &Value) -> pb::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(all) => Kind::ListValue(pb::ListValue {
            values: all.iter().map(metadata).collect(),
        }),
        Value::Object(all) => Kind::StructValue(fields(all)),
    };
    pb::Value { kind: Some(kind) }
}

/// As [`metadata`], of an object.
pub(super) fn fields(all: &Map<String, Value>) -> pb::Struct {
    pb::Struct {
        fields: all
            .iter()
            .map(|(key, value)| (key.clone(), metadata(value)))
            .collect(),
    }
}
