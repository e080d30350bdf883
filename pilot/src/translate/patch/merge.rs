//! A message and a patch become one: as protobuf merges, but durations and wrappers are one value, and of two `Any` of
//! one type the messages within are merged. What is listed is appended.

use lateen_protocols::json;
use prost::{Message, Name};
use prost_reflect::{DynamicMessage, Kind, MapKey, ReflectMessage, Value};

/// Nesting beyond which a patch is not followed; Envoy's own messages have half of that.
const DEPTH_LIMIT: usize = 48;

/// `message` with what `patch`, an encoded message of the same type, says.
pub(super) fn merged<M: Message + Name + Default>(message: &M, patch: &[u8]) -> Result<M, String> {
    let name = M::full_name();
    let descriptor = json::pool()
        .get_message_by_name(&name)
        .ok_or_else(|| format!("{name} is not known to this version"))?;
    let read = |bytes: &[u8]| {
        DynamicMessage::decode(descriptor.clone(), bytes).map_err(|error| error.to_string())
    };
    let mut whole = read(&message.encode_to_vec())?;
    merge(&mut whole, &read(patch)?, 0)?;
    M::decode(whole.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

fn merge(into: &mut DynamicMessage, from: &DynamicMessage, depth: usize) -> Result<(), String> {
    if depth > DEPTH_LIMIT {
        return Err(format!("it is nested deeper than {DEPTH_LIMIT}"));
    }
    for (field, value) in from.fields() {
        match value {
            Value::List(more) => {
                if let Value::List(all) = into.get_field_mut(&field) {
                    all.extend(more.iter().cloned());
                }
            }
            Value::Map(more) => {
                for (key, value) in more {
                    let there = map_entry(into, &field, key);
                    let value = one(there, value, depth)?;
                    if let Value::Map(all) = into.get_field_mut(&field) {
                        all.insert(key.clone(), value);
                    }
                }
            }
            value => {
                let there = into
                    .has_field(&field)
                    .then(|| into.get_field(&field).into_owned());
                let value = match field.kind() {
                    Kind::Message(_) => one(there, value, depth)?,
                    _ => value.clone(),
                };
                into.set_field(&field, value);
            }
        }
    }
    Ok(())
}

fn map_entry(
    message: &DynamicMessage,
    field: &prost_reflect::FieldDescriptor,
    key: &MapKey,
) -> Option<Value> {
    match &*message.get_field(field) {
        Value::Map(all) => all.get(key).cloned(),
        _ => None,
    }
}

/// What comes of one value and the one that is patched in.
fn one(there: Option<Value>, patch: &Value, depth: usize) -> Result<Value, String> {
    let (Some(Value::Message(mut there)), Value::Message(patch)) = (there, patch) else {
        return Ok(patch.clone());
    };
    let descriptor = patch.descriptor();
    match descriptor.full_name() {
        "google.protobuf.Any" => any(&there, patch, depth),
        // Durations and wrappers are values.
        "google.protobuf.Struct" => {
            merge(&mut there, patch, depth + 1)?;
            Ok(Value::Message(there))
        }
        name if name.starts_with("google.protobuf.") => Ok(Value::Message(patch.clone())),
        _ => {
            merge(&mut there, patch, depth + 1)?;
            Ok(Value::Message(there))
        }
    }
}

fn any(there: &DynamicMessage, patch: &DynamicMessage, depth: usize) -> Result<Value, String> {
    let parts = |any: &DynamicMessage| -> Option<(String, Vec<u8>)> {
        let url = any.get_field_by_name("type_url")?.as_str()?.to_owned();
        let value = any.get_field_by_name("value")?.as_bytes()?.to_vec();
        Some((url, value))
    };
    let whole = || Ok(Value::Message(patch.clone()));
    let (Some((url, old)), Some((patch_url, new))) = (parts(there), parts(patch)) else {
        return whole();
    };
    let name = |url: &str| url.rsplit('/').next().unwrap_or_default().to_owned();
    if name(&url) != name(&patch_url) {
        return whole();
    }
    let Some(descriptor) = patch
        .descriptor()
        .parent_pool()
        .get_message_by_name(&name(&url))
    else {
        return whole();
    };
    let read = |bytes: &[u8]| {
        DynamicMessage::decode(descriptor.clone(), bytes).map_err(|error| error.to_string())
    };
    let mut inner = read(&old)?;
    merge(&mut inner, &read(&new)?, depth + 1)?;
    let mut result = there.clone();
    result.set_field_by_name("value", Value::Bytes(inner.encode_to_vec().into()));
    Ok(Value::Message(result))
}
