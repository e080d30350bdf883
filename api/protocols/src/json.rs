//! Protobuf JSON (and YAML, which is read into JSON) for Envoy's messages and ours, `Any` by `@type`.
//!
//! Not for the data path: a message takes a detour over a dynamic one, some hundred microseconds. The
//! descriptors take 20 MB while they are loaded, so they are loaded when needed and dropped when nobody
//! has needed them for a while.

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
    let value: Value = serde_saphyr::from_str_with_options(text, yaml_options())
        .map_err(|e| JsonError::Syntax(e.to_string()))?;
    from_json(&value)
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
    let shape = |reason: String| JsonError::Shape {
        message: M::full_name(),
        reason,
    };
    let descriptor = pool()
        .get_message_by_name(&M::full_name())
        .ok_or_else(|| shape("unknown message".into()))?;
    let dynamic = DynamicMessage::deserialize_with_options(
        descriptor,
        value,
        &DeserializeOptions::new().deny_unknown_fields(true),
    )
    .map_err(|e| shape(e.to_string()))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|e| shape(e.to_string()))
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
mod tests {
    use super::*;
    use crate::envoy::envoy::config::bootstrap::v3::Bootstrap;

    const BOOTSTRAP: &str = r"
node: { id: sidecar~10.0.0.1~a.b~b.svc.cluster.local, metadata: { PORT: 3 } }
static_resources:
  listeners:
  - name: l
    address: { socket_address: { address: 127.0.0.1, port_value: 80 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          http_filters:
          - name: mixer
            typed_config:
              '@type': type.googleapis.com/istio.mixer.v1.config.client.HttpClientConfig
              transport: { check_cluster: c }
";

    #[test]
    fn bootstrap_with_any_survives_the_round_trip() {
        let first: Bootstrap = from_yaml(BOOTSTRAP).unwrap();
        let json = to_json(&first).unwrap();
        assert_eq!(json["node"]["metadata"]["PORT"], 3);
        let second: Bootstrap = from_json(&json).unwrap();
        assert_eq!(first, second);
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = from_yaml::<Bootstrap>("node: { idd: x }").unwrap_err();
        assert!(error.to_string().contains("idd"), "{error}");
    }
}
