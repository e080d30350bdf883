//! Attribute values in JSON and YAML, as people write recorded requests and tools print results.

use serde_json::{Map, Number, Value as Json};

use crate::text::Text;
use crate::value::{ConversionError, StringMap, Value, ValueType, parse_duration, parse_timestamp};

/// Largest integer that every JSON reader takes exactly.
const MAX_EXACT: i64 = 1 << 53;

impl Value {
    /// The value of a type that JSON text stands for: an INT64 is a number or text of digits, a TIMESTAMP is
    /// RFC 3339, a DURATION is `1h2m`, an IP_ADDRESS is text, a STRING_MAP an object of texts.
    ///
    /// # Errors
    /// The text is of another shape.
    pub fn from_json(ty: ValueType, json: &Json) -> Result<Value, ConversionError> {
        let wrong = || ConversionError(format!("{json} is no {ty}"));
        let text = || json.as_str().ok_or_else(wrong);
        Ok(match ty {
            ValueType::Bool => Value::Bool(json.as_bool().ok_or_else(wrong)?),
            ValueType::Int64 => match json {
                Json::String(digits) => Value::Int64(digits.parse().map_err(|_| wrong())?),
                json => Value::Int64(json.as_i64().ok_or_else(wrong)?),
            },
            ValueType::Double => match json {
                Json::String(digits) => Value::Double(digits.parse().map_err(|_| wrong())?),
                json => Value::Double(json.as_f64().ok_or_else(wrong)?),
            },
            ValueType::Timestamp => Value::Timestamp(parse_timestamp(text()?)?),
            ValueType::Duration => Value::Duration(parse_duration(text()?).ok_or_else(wrong)?),
            ValueType::IpAddress => Value::Ip(text()?.parse().map_err(|_| wrong())?),
            ValueType::StringMap => {
                let entries = json.as_object().ok_or_else(wrong)?.iter();
                let entries: Result<Vec<(Text, Text)>, ConversionError> = entries
                    .map(|(key, value)| {
                        let value = value
                            .as_str()
                            .ok_or_else(|| ConversionError(format!("{value} is no STRING")))?;
                        Ok((key.as_str().into(), value.into()))
                    })
                    .collect();
                Value::StringMap(StringMap::new(entries?))
            }
            ty => Value::from_text(ty, text()?.into()).ok_or_else(wrong)?,
        })
    }

    /// The form that [`Value::from_json`] reads; integers beyond 2⁵³ and numbers that JSON lacks are text.
    pub fn to_json(&self) -> Json {
        match self {
            Value::Bool(v) => Json::Bool(*v),
            Value::Int64(v) if (-MAX_EXACT..=MAX_EXACT).contains(v) => Json::from(*v),
            Value::Double(v) => {
                Number::from_f64(*v).map_or_else(|| Json::String(v.to_string()), Json::Number)
            }
            Value::StringMap(map) => {
                let entries = map
                    .iter()
                    .map(|(k, v)| (k.to_string(), Json::String(v.to_string())));
                Json::Object(entries.collect::<Map<_, _>>())
            }
            other => Json::String(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_type_is_read_as_it_is_written() {
        for (ty, json) in [
            (ValueType::String, json!("x")),
            (ValueType::Int64, json!(-5)),
            (ValueType::Int64, json!("9223372036854775807")),
            (ValueType::Double, json!(1.5)),
            (ValueType::Bool, json!(true)),
            (ValueType::Timestamp, json!("2026-01-02T03:04:05.6Z")),
            (ValueType::Duration, json!("90.5s")),
            (ValueType::IpAddress, json!("10.0.0.1")),
            (ValueType::EmailAddress, json!("a@b")),
            (ValueType::Uri, json!("http://x")),
            (ValueType::DnsName, json!("x.y")),
            (ValueType::StringMap, json!({"a": "b"})),
        ] {
            let value = Value::from_json(ty, &json).unwrap();
            assert_eq!(value.value_type(), ty);
            let again = Value::from_json(ty, &value.to_json()).unwrap();
            assert_eq!(again, value);
        }
        let short = Value::from_json(ValueType::Timestamp, &json!("2026-01-02T03:04:05.6Z"));
        assert_eq!(short.unwrap().to_json(), json!("2026-01-02T03:04:05.600Z"));
    }

    #[test]
    fn other_shapes_are_refused() {
        for (ty, json) in [
            (ValueType::String, json!(1)),
            (ValueType::Int64, json!(1.5)),
            (ValueType::Bool, json!("true")),
            (ValueType::Duration, json!("90")),
            (ValueType::IpAddress, json!("10.0.0")),
            (ValueType::StringMap, json!({"a": 1})),
        ] {
            assert!(Value::from_json(ty, &json).is_err(), "{ty} {json}");
        }
    }
}
