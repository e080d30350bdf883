//! Scalars and small values users write: durations, percentages, string matches, selectors.

use std::fmt;

use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::object::Labels;

/// A span of time, written `1.5s`, `200ms`, `1h30m`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Duration(pub std::time::Duration);

impl Duration {
    /// That many milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    /// Reads `1.5s`, `200ms`, `1h30m`, `0`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text == "0" {
            return Some(Self::default());
        }
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        let mut nanos: f64 = 0.0;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .filter(|end| *end > 0)?;
            let (number, tail) = rest.split_at(digits);
            let number: f64 = number.parse().ok()?;
            let unit = tail
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit);
            nanos += number
                * match unit {
                    "ns" => 1.0,
                    "us" | "µs" => 1e3,
                    "ms" => 1e6,
                    "s" => 1e9,
                    "m" => 60e9,
                    "h" => 3600e9,
                    _ => return None,
                };
            rest = tail;
        }
        // protobuf's own limit is 10,000 years
        if text.is_empty() || !nanos.is_finite() || nanos > 3.15e20 {
            return None;
        }
        std::time::Duration::try_from_secs_f64((nanos / 1e9 * 1e9).round() / 1e9)
            .ok()
            .map(Self)
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0.as_secs_f64())
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::invalid_value(Unexpected::Str(&text), &"a duration such as \"1.5s\"")
        })
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A share of a hundred: `{ value: 12.5 }`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Percent {
    /// 0 to 100.
    pub value: f64,
}

/// How a string is compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// `{}`: it only has to be there.
    #[default]
    Present,
    /// Equal.
    Exact(String),
    /// Begins with.
    Prefix(String),
    /// RE2 expression that must match the whole.
    Regex(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    exact: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
}

impl<'de> Deserialize<'de> for StringMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match RawMatch::deserialize(deserializer)? {
            RawMatch {
                exact: None,
                prefix: None,
                regex: None,
            } => Self::Present,
            RawMatch {
                exact: Some(text),
                prefix: None,
                regex: None,
            } => Self::Exact(text),
            RawMatch {
                exact: None,
                prefix: Some(text),
                regex: None,
            } => Self::Prefix(text),
            RawMatch {
                exact: None,
                prefix: None,
                regex: Some(text),
            } => Self::Regex(text),
            _ => {
                return Err(D::Error::custom(
                    "only one of exact, prefix and regex may be set",
                ));
            }
        })
    }
}

impl Serialize for StringMatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut raw = RawMatch {
            exact: None,
            prefix: None,
            regex: None,
        };
        match self {
            Self::Present => {}
            Self::Exact(text) => raw.exact = Some(text.clone()),
            Self::Prefix(text) => raw.prefix = Some(text.clone()),
            Self::Regex(text) => raw.regex = Some(text.clone()),
        }
        raw.serialize(serializer)
    }
}

/// A gRPC status by its name or number.
#[must_use]
pub fn grpc_status(text: &str) -> Option<u32> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    (0..)
        .zip(NAMES)
        .find_map(|(number, name)| (name == text).then_some(number))
        .or_else(|| text.parse().ok().filter(|number| *number <= 16))
}

/// Which workloads an object is for, Istio's newer form: `selector: { matchLabels: … }`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct MatchLabels {
    /// All of them; empty: every workload.
    pub match_labels: Labels,
}

/// Which workloads an object is for, the networking kinds' form: `workloadSelector: { labels: … }`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadSelector {
    /// All of them; empty: every workload.
    #[serde(alias = "matchLabels")]
    pub labels: Labels,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_go_writes_them() {
        let millis = |text| Duration::parse(text).map(|d| d.0.as_millis());
        assert_eq!(millis("1.5s"), Some(1500));
        assert_eq!(millis("200ms"), Some(200));
        assert_eq!(millis("1h30m"), Some(5_400_000));
        assert_eq!(millis("0"), Some(0));
        assert_eq!(millis("0.000s"), Some(0));
        for bad in ["", "1", "-1s", "s", "1.2.3s", "1d", "99999999999999h"] {
            assert_eq!(millis(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_string_match_is_one_of() {
        let parse = |json| serde_json::from_str::<StringMatch>(json);
        assert_eq!(parse("{}").unwrap(), StringMatch::Present);
        assert_eq!(
            parse(r#"{"exact":"a"}"#).unwrap(),
            StringMatch::Exact("a".into())
        );
        assert!(parse(r#"{"exact":"a","prefix":"b"}"#).is_err());
        assert!(parse(r#"{"suffix":"a"}"#).is_err());
    }
}
