//! Values in the forms that adapters need them in.

use std::{borrow::Cow, net::IpAddr};

use lateen_engine::{StringMap, Value};

/// A STRING.
pub fn string(text: &str) -> Value {
    Value::from(text)
}

/// An IP_ADDRESS.
pub fn address(ip: IpAddr) -> Value {
    Value::Ip(ip.to_canonical())
}

/// A STRING_MAP.
pub fn string_map<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Value {
    Value::StringMap(entries.into_iter().collect::<StringMap>())
}

/// Text of a value: what a label, a list entry or a dimension is compared by.
pub fn text(value: &Value) -> Cow<'_, str> {
    match value.as_str() {
        Some(text) => Cow::Borrowed(text),
        None => Cow::Owned(value.to_string()),
    }
}

/// The address of an IP_ADDRESS, or of text that is one.
pub fn ip(value: &Value) -> Option<IpAddr> {
    match value {
        Value::Ip(ip) => Some(ip.to_canonical()),
        other => other
            .as_str()?
            .parse::<IpAddr>()
            .ok()
            .map(|ip| ip.to_canonical()),
    }
}

/// A number of a value: durations in seconds, text if it is a number.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        #[allow(clippy::cast_precision_loss, reason = "metrics are doubles")]
        Value::Int64(n) => Some(*n as f64),
        Value::Double(n) => Some(*n),
        Value::Duration(span) => {
            let nanos = f64::from(span.subsec_nanos());
            #[allow(clippy::cast_precision_loss, reason = "metrics are doubles")]
            Some(span.num_seconds() as f64 + nanos / 1e9)
        }
        other => other.as_str()?.parse().ok(),
    }
}
