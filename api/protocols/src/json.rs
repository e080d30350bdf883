//! Protobuf JSON (and YAML, which is read into JSON) for Envoy's messages and ours, `Any` by `@type`.
//!
//! Reading goes straight from the text to the encoded message where it can. What it cannot, and writing,
//! take a detour over a dynamic message, some hundred microseconds. The descriptors for that take 20 MB
//! while they are loaded, so they are loaded when needed and dropped when nobody has needed them for a
//! while.

mod schema;
mod transcode;

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, SerializeOptions};
use serde_json::Value;

static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Descriptors are dropped when they have not been used for this long.
const IDLE: Duration = Duration::from_secs(3);

static LOADED: Mutex<Option<(DescriptorPool, Instant)>> = Mutex::new(None);

/// Why text is not the message it should be.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// Not YAML (or JSON) at all; the text carries line and column.
    #[error("not valid YAML or JSON: {0}")]
    Syntax(String),
    /// YAML, but no such message: an unknown field, a wrong enum name, an unknown `@type`.
    #[error("not a {message}: {reason}")]
    Shape {
        /// Full name of the protobuf message.
        message: String,
        /// What is wrong, with the path to it where known.
        reason: String,
    },
}

/// The descriptors of every message that can be read or written here; a clone is cheap. Loading them takes
/// some ten milliseconds, so hold on to the value while working through many messages.
pub fn pool() -> DescriptorPool {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((pool, used)) = &mut *loaded {
        *used = Instant::now();
        return pool.clone();
    }
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("build.rs wrote a descriptor set");
    *loaded = Some((pool.clone(), Instant::now()));
    // Without the thread the descriptors simply stay.
    std::thread::Builder::new()
        .name("descriptors".to_owned())
        .spawn(drop_when_idle)
        .ok();
    pool
}

/// Drops the descriptors at once, on the thread that loaded them: an allocator with a heap per thread gives
/// memory back sooner if it is freed where it was allocated. For programs that have read their only message.
pub fn unload() {
    *LOADED.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

fn drop_when_idle() {
    loop {
        std::thread::sleep(IDLE);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        match &*loaded {
            Some((_, used)) if used.elapsed() < IDLE => {}
            _ => {
                *loaded = None;
                return;
            }
        }
    }
}

/// Reads a message from YAML or JSON text; unknown fields are errors.
///
/// # Errors
/// The text is not YAML, or not this message.
pub fn from_yaml<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    decode(&encode_yaml::<M>(text)?)
}

/// Reads a message from YAML or JSON text into its encoding; unknown fields are errors.
///
/// # Errors
/// The text is not YAML, or not this message.
pub fn encode_yaml<M: Message + Name + Default>(text: &str) -> Result<Vec<u8>, JsonError> {
    // JSON is YAML too, but its own reader is faster and holds nothing in memory.
    if text.trim_start().starts_with('{')
        && let Some(encoded) = transcode::from_text(&M::full_name(), text)
    {
        return Ok(encoded);
    }
    let value: Value = serde_saphyr::from_str_with_options(text, yaml_options())
        .map_err(|e| JsonError::Syntax(e.to_string()))?;
    encode_json::<M>(&value)
}

/// YAML 1.2: `no` is a word, not a boolean.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! { strict_booleans: true }
}

/// Reads a message from its JSON form; unknown fields are errors.
///
/// # Errors
/// The value is not this message.
pub fn from_json<M: Message + Name + Default>(value: &Value) -> Result<M, JsonError> {
    decode(&encode_json::<M>(value)?)
}

fn encode_json<M: Message + Name>(value: &Value) -> Result<Vec<u8>, JsonError> {
    match transcode::from_value(&M::full_name(), value) {
        Some(encoded) => Ok(encoded),
        None => encode_by_descriptor(&M::full_name(), value),
    }
}

fn decode<M: Message + Name + Default>(encoded: &[u8]) -> Result<M, JsonError> {
    M::decode(encoded).map_err(|e| JsonError::Shape {
        message: M::full_name(),
        reason: e.to_string(),
    })
}

/// The way for everything, which also knows what is wrong.
fn encode_by_descriptor(message: &str, value: &Value) -> Result<Vec<u8>, JsonError> {
    let shape = |reason: String| JsonError::Shape {
        message: message.to_owned(),
        reason,
    };
    let descriptor = pool()
        .get_message_by_name(message)
        .ok_or_else(|| shape("unknown message".into()))?;
    let dynamic = DynamicMessage::deserialize_with_options(
        descriptor,
        value,
        &DeserializeOptions::new().deny_unknown_fields(true),
    )
    .map_err(|e| shape(e.to_string()))?;
    Ok(dynamic.encode_to_vec())
}

/// Writes a message in Envoy's JSON form: original field names, defaults left out.
/// An `Any` of a type unknown here makes the whole message unprintable; the error names it.
///
/// # Errors
/// An `Any` inside has an unknown type or a body that does not decode.
pub fn to_json<M: Message + Name>(message: &M) -> Result<Value, JsonError> {
    let shape = |reason: String| JsonError::Shape {
        message: M::full_name(),
        reason,
    };
    let descriptor = pool()
        .get_message_by_name(&M::full_name())
        .ok_or_else(|| shape("unknown message".into()))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|e| shape(e.to_string()))?;
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(true)
        .stringify_64_bit_integers(false);
    let mut value = dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|e| shape(e.to_string()))?;
    integral_floats(&mut value);
    Ok(value)
}

/// `google.protobuf.Value` numbers are doubles; Envoy prints `3`, not `3.0`.
fn integral_floats(value: &mut Value) {
    match value {
        Value::Number(n) if n.is_f64() => {
            if let Some(f) = n.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15) {
                #[allow(clippy::cast_possible_truncation, reason = "bounded above")]
                let whole = f as i64;
                *value = Value::from(whole);
            }
        }
        Value::Array(all) => all.iter_mut().for_each(integral_floats),
        Value::Object(map) => map.values_mut().for_each(integral_floats),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
