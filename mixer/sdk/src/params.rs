//! Reading parameters as the JSON of protos allows to write them: field names in either spelling,
//! integers and numbers of enums as text, durations as `1.5s` or in Go's spelling.
//!
//! Derive `Deserialize` with `rename_all = "camelCase"`, `deny_unknown_fields`, `default`, an alias for
//! each field whose name has two words, and the functions here in `deserialize_with`.

use std::{fmt, marker::PhantomData, time::Duration};

use serde::{
    Deserializer,
    de::{self, DeserializeOwned, Visitor},
};
use serde_json::Value as Json;

/// Parameters as `T`. Nothing written at all is an empty object.
///
/// # Errors
/// What does not fit, in words for the person who wrote it.
pub fn parse<T: DeserializeOwned>(params: &Json) -> Result<T, String> {
    let empty = Json::Object(serde_json::Map::new());
    let params = if params.is_null() { &empty } else { params };
    T::deserialize(params).map_err(|e| e.to_string())
}

/// For `deserialize_with`: a duration, `1.5s`, `10m`, `1h2m3s`.
///
/// # Errors
/// When it is not one, or negative.
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    struct Text;
    impl Visitor<'_> for Text {
        type Value = Duration;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a duration such as \"1.5s\" or \"10m\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            parse_duration(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_any(Text)
}

/// For `deserialize_with`: a duration that need not be there.
///
/// # Errors
/// When it is not one, or negative.
pub fn optional_duration<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

/// For `deserialize_with`: an integer, as a number or as text.
///
/// # Errors
/// When it is none, or does not fit `T`.
pub fn integer<'de, T: TryFrom<i64>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Integer<T>(PhantomData<T>);
    impl<T: TryFrom<i64>> Visitor<'_> for Integer<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an integer in range")
        }

        fn visit_i64<E: de::Error>(self, n: i64) -> Result<T, E> {
            T::try_from(n).map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
        }

        fn visit_u64<E: de::Error>(self, n: u64) -> Result<T, E> {
            i64::try_from(n)
                .ok()
                .and_then(|n| T::try_from(n).ok())
                .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(n), &self))
        }

        fn visit_f64<E: de::Error>(self, n: f64) -> Result<T, E> {
            #[allow(clippy::cast_possible_truncation, reason = "checked by the comparison")]
            let whole = n as i64;
            #[allow(
                clippy::cast_precision_loss,
                reason = "a loss makes the comparison fail"
            )]
            if whole as f64 == n {
                return self.visit_i64(whole);
            }
            Err(E::invalid_value(de::Unexpected::Float(n), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            match text.parse::<i64>() {
                Ok(n) => self.visit_i64(n),
                Err(_) => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }
    }
    deserializer.deserialize_any(Integer(PhantomData))
}

/// For `deserialize_with`: a boolean, also in the spellings of YAML 1.1.
///
/// # Errors
/// When it is none.
pub fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    struct Bool;
    impl Visitor<'_> for Bool {
        type Value = bool;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true or false")
        }

        fn visit_bool<E: de::Error>(self, b: bool) -> Result<bool, E> {
            Ok(b)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<bool, E> {
            match text.to_ascii_lowercase().as_str() {
                "true" | "y" | "yes" | "on" => Ok(true),
                "false" | "n" | "no" | "off" => Ok(false),
                _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }
    }
    deserializer.deserialize_any(Bool)
}

/// A duration in Go's spelling (a sequence of decimal numbers with units), not negative.
pub fn parse_duration(text: &str) -> Option<Duration> {
    lateen_engine::parse_duration(text)?.to_std().ok()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
    struct Sample {
        #[serde(alias = "valid_duration", deserialize_with = "duration")]
        valid_duration: Duration,
        #[serde(alias = "max_amount", deserialize_with = "integer")]
        max_amount: i64,
    }

    #[test]
    fn proto_json_is_read_in_both_spellings() {
        let want = Sample {
            valid_duration: Duration::from_millis(1500),
            max_amount: 7,
        };
        for json in [
            r#"{"validDuration":"1.5s","maxAmount":7}"#,
            r#"{"valid_duration":"1s500ms","max_amount":"7"}"#,
            r#"{"validDuration":"1500ms","maxAmount":7.0}"#,
        ] {
            assert_eq!(
                parse::<Sample>(&serde_json::from_str(json).unwrap()).unwrap(),
                want
            );
        }
        assert_eq!(parse::<Sample>(&Json::Null).unwrap(), Sample::default());
        for bad in [
            r#"{"badField":1}"#,
            r#"{"maxAmount":1.5}"#,
            r#"{"validDuration":"-1s"}"#,
        ] {
            assert!(
                parse::<Sample>(&serde_json::from_str(bad).unwrap()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn durations_are_gos() {
        for (text, millis) in [
            ("0", 0),
            ("1h2m", 3_720_000),
            (".5s", 500),
            ("1.5m", 90_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Some(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for bad in ["", "1", "s", "1x", "-1s", "99999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
