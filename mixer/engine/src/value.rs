//! Attribute values and their types.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::text::Text;

/// Type of an attribute or of an expression's result: `istio.policy.v1beta1.ValueType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ValueType {
    /// UTF-8 text.
    String,
    /// 64-bit signed integer.
    Int64,
    /// 64-bit IEEE 754 number.
    Double,
    /// True or false.
    Bool,
    /// An instant.
    Timestamp,
    /// An IPv4 or IPv6 address.
    IpAddress,
    /// An RFC 5322 address without a display name.
    EmailAddress,
    /// A URI.
    Uri,
    /// A DNS name.
    DnsName,
    /// A signed span of time.
    Duration,
    /// String to string.
    StringMap,
}

impl ValueType {
    /// Every type.
    pub const ALL: [ValueType; 11] = [
        ValueType::String,
        ValueType::Int64,
        ValueType::Double,
        ValueType::Bool,
        ValueType::Timestamp,
        ValueType::IpAddress,
        ValueType::EmailAddress,
        ValueType::Uri,
        ValueType::DnsName,
        ValueType::Duration,
        ValueType::StringMap,
    ];

    /// The name in manifests: `STRING`, `IP_ADDRESS`, …
    pub const fn as_str(self) -> &'static str {
        match self {
            ValueType::String => "STRING",
            ValueType::Int64 => "INT64",
            ValueType::Double => "DOUBLE",
            ValueType::Bool => "BOOL",
            ValueType::Timestamp => "TIMESTAMP",
            ValueType::IpAddress => "IP_ADDRESS",
            ValueType::EmailAddress => "EMAIL_ADDRESS",
            ValueType::Uri => "URI",
            ValueType::DnsName => "DNS_NAME",
            ValueType::Duration => "DURATION",
            ValueType::StringMap => "STRING_MAP",
        }
    }

    /// The number in `istio.policy.v1beta1.ValueType`.
    pub const fn number(self) -> i32 {
        match self {
            ValueType::String => 1,
            ValueType::Int64 => 2,
            ValueType::Double => 3,
            ValueType::Bool => 4,
            ValueType::Timestamp => 5,
            ValueType::IpAddress => 6,
            ValueType::EmailAddress => 7,
            ValueType::Uri => 8,
            ValueType::DnsName => 9,
            ValueType::Duration => 10,
            ValueType::StringMap => 11,
        }
    }

    /// The type of a number in `istio.policy.v1beta1.ValueType`; `None` for 0 and unknown ones.
    pub fn from_number(number: i32) -> Option<ValueType> {
        ValueType::ALL.into_iter().find(|t| t.number() == number)
    }

    /// Whether values of this type are text on the wire.
    pub const fn is_text(self) -> bool {
        matches!(
            self,
            ValueType::String | ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName
        )
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for ValueType {
    type Err = ConversionError;
    fn from_str(name: &str) -> Result<ValueType, ConversionError> {
        ValueType::ALL
            .into_iter()
            .find(|t| t.as_str() == name)
            .ok_or_else(|| ConversionError(format!("unknown value type '{name}'")))
    }
}

/// Text is not of the type it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConversionError(pub String);

/// A string map, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct StringMap(Arc<[(Text, Text)]>);

impl StringMap {
    /// A map of these entries; of equal keys the last one counts.
    pub fn new(entries: impl IntoIterator<Item = (Text, Text)>) -> StringMap {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0)); // stable: the last of equal keys stays last
        entries.dedup_by(|later, first| {
            let same = later.0 == first.0;
            if same {
                first.1 = later.1.clone();
            }
            same
        });
        StringMap(entries.into())
    }

    /// A map of entries that are sorted by key, each key once.
    pub(crate) fn sorted(entries: Arc<[(Text, Text)]>) -> StringMap {
        StringMap(entries)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Text> {
        let at = self.0.binary_search_by(|(k, _)| k.as_str().cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// Entries, sorted by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Text, &Text)> {
        self.0.iter().map(|(k, v)| (k, v))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<K: Into<Text>, V: Into<Text>> FromIterator<(K, V)> for StringMap {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> StringMap {
        StringMap::new(entries.into_iter().map(|(k, v)| (k.into(), v.into())))
    }
}

/// A value. Clones are cheap: a reference count at most.
///
/// Texts of the last three types are kept as they came; a comparison tells when one is malformed.
/// `==` of `Value` compares representations; the expression language's `==`, which folds case in DNS
/// names and so on, is [`Value::equals`].
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// UTF-8 text.
    String(Text),
    /// Integer.
    Int64(i64),
    /// Number.
    Double(f64),
    /// Truth value.
    Bool(bool),
    /// Instant.
    Timestamp(DateTime<Utc>),
    /// Span of time.
    Duration(TimeDelta),
    /// IP address; IPv4-mapped IPv6 addresses are made IPv4 by [`Value::ip_from_bytes`].
    Ip(IpAddr),
    /// RFC 5322 address.
    Email(Text),
    /// URI.
    Uri(Text),
    /// DNS name.
    DnsName(Text),
    /// String map.
    StringMap(StringMap),
}

impl Value {
    /// The value's type.
    pub const fn value_type(&self) -> ValueType {
        match self {
            Value::String(_) => ValueType::String,
            Value::Int64(_) => ValueType::Int64,
            Value::Double(_) => ValueType::Double,
            Value::Bool(_) => ValueType::Bool,
            Value::Timestamp(_) => ValueType::Timestamp,
            Value::Duration(_) => ValueType::Duration,
            Value::Ip(_) => ValueType::IpAddress,
            Value::Email(_) => ValueType::EmailAddress,
            Value::Uri(_) => ValueType::Uri,
            Value::DnsName(_) => ValueType::DnsName,
            Value::StringMap(_) => ValueType::StringMap,
        }
    }

    /// A string value.
    pub fn string(text: impl Into<Text>) -> Value {
        Value::String(text.into())
    }

    /// Text of one of the four text types; `None` when `ty` is another.
    pub fn from_text(ty: ValueType, text: Text) -> Option<Value> {
        match ty {
            ValueType::String => Some(Value::String(text)),
            ValueType::EmailAddress => Some(Value::Email(text)),
            ValueType::Uri => Some(Value::Uri(text)),
            ValueType::DnsName => Some(Value::DnsName(text)),
            _ => None,
        }
    }

    /// Text of the four text types.
    pub fn as_text(&self) -> Option<&Text> {
        match self {
            Value::String(t) | Value::Email(t) | Value::Uri(t) | Value::DnsName(t) => Some(t),
            _ => None,
        }
    }

    /// Text of the four text types.
    pub fn as_str(&self) -> Option<&str> {
        self.as_text().map(Text::as_str)
    }

    /// The integer of an INT64.
    pub const fn as_i64(&self) -> Option<i64> {
        match self {
            Value::Int64(v) => Some(*v),
            _ => None,
        }
    }

    /// The number of a DOUBLE.
    pub const fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Double(v) => Some(*v),
            _ => None,
        }
    }

    /// The truth of a BOOL.
    pub const fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// The map of a STRING_MAP.
    pub const fn as_map(&self) -> Option<&StringMap> {
        match self {
            Value::StringMap(v) => Some(v),
            _ => None,
        }
    }

    /// An address from its 4 or 16 bytes; IPv4-mapped IPv6 becomes IPv4.
    pub fn ip_from_bytes(bytes: &[u8]) -> Option<Value> {
        let ip = match bytes.len() {
            4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
            16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
            _ => return None,
        };
        Some(Value::Ip(ip.to_canonical()))
    }

    /// The same value sharing no buffer with the request it came from.
    #[must_use]
    pub fn compact(&self) -> Value {
        match self {
            Value::String(t) => Value::String(t.compact()),
            Value::Email(t) => Value::Email(t.compact()),
            Value::Uri(t) => Value::Uri(t.compact()),
            Value::DnsName(t) => Value::DnsName(t.compact()),
            Value::StringMap(m) => Value::StringMap(StringMap::new(
                m.iter().map(|(k, v)| (k.compact(), v.compact())),
            )),
            other => other.clone(),
        }
    }
}

/// Text as people read it: strings bare, instants in RFC 3339, spans in seconds with an `s`, maps as
/// `{key: value, …}`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::String(t) | Value::Email(t) | Value::Uri(t) | Value::DnsName(t) => f.pad(t),
            Value::Int64(v) => v.fmt(f),
            Value::Double(v) => v.fmt(f),
            Value::Bool(v) => v.fmt(f),
            Value::Timestamp(v) => {
                write!(
                    f,
                    "{}",
                    v.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
                )
            }
            Value::Duration(v) => {
                let negative = *v < TimeDelta::zero();
                let v = v.abs();
                write!(f, "{}{}", if negative { "-" } else { "" }, v.num_seconds())?;
                let nanos = v.subsec_nanos();
                if nanos != 0 {
                    let digits = format!("{nanos:09}");
                    write!(f, ".{}", digits.trim_end_matches('0'))?;
                }
                f.write_str("s")
            }
            Value::Ip(v) => v.fmt(f),
            Value::StringMap(m) => {
                f.write_str("{")?;
                for (i, (key, value)) in m.iter().enumerate() {
                    write!(f, "{}{key}: {value}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str("}")
            }
        }
    }
}

macro_rules! value_from {
    ($($from:ty => $variant:ident),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Value {
                Value::$variant(value.into())
            }
        }
    )*};
}

value_from! {
    &str => String, String => String, Text => String, Arc<str> => String,
    i64 => Int64, f64 => Double, bool => Bool, DateTime<Utc> => Timestamp, TimeDelta => Duration,
    IpAddr => Ip, StringMap => StringMap,
}

/// An instant of RFC 3339 text, with `T` and `Z` in capitals.
///
/// # Errors
/// The text is something else.
pub fn parse_timestamp(text: &str) -> Result<DateTime<Utc>, ConversionError> {
    let strict = text.as_bytes().get(10) == Some(&b'T')
        && !text.contains('z')
        && text.as_bytes().get(17..19) != Some(b"60");
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) if strict => Ok(time.with_timezone(&Utc)),
        _ => Err(ConversionError(format!(
            "could not convert '{text}' to TIMESTAMP. expected format: '2006-01-02T15:04:05Z07:00'"
        ))),
    }
}

/// A span of time as Go writes it: `1h2m`, `-1.5s`, `10ms`, `0`; units ns, us, µs, ms, s, m, h.
/// `None` when the text is something else or longer than 292 years.
pub fn parse_duration(text: &str) -> Option<TimeDelta> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(TimeDelta::zero());
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let whole_end = digits_end(rest);
        let (whole, after) = rest.split_at(whole_end);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits_end(after)),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let unit_end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let scale: i128 = match unit {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let whole: i128 = if whole.is_empty() {
            0
        } else {
            i128::from(whole.parse::<u64>().ok()?)
        };
        total = total.checked_add(whole.checked_mul(scale)?)?;
        // Digits past the 18th are below a nanosecond for every unit.
        let fraction = fraction.get(..fraction.len().min(18))?;
        if !fraction.is_empty() {
            let digits = i128::from(fraction.parse::<u64>().ok()?);
            let power = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            total = total.checked_add(digits.checked_mul(scale)? / power)?;
        }
        if total > i128::from(i64::MAX) {
            return None;
        }
        rest = after;
    }
    let nanos = i64::try_from(total).ok()?;
    Some(TimeDelta::nanoseconds(if negative {
        -nanos
    } else {
        nanos
    }))
}

fn digits_end(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations_as_go_does() {
        for (text, want) in [
            ("0", Some(0)),
            ("10ms", Some(10_000_000)),
            ("1h2m", Some(3_720_000_000_000)),
            ("-1.5s", Some(-1_500_000_000)),
            ("+.5s", Some(500_000_000)),
            ("1.s", Some(1_000_000_000)),
            ("2\u{b5}s", Some(2_000)),
            ("", None),
            ("10", None),
            ("s", None),
            ("1x", None),
            (".s", None),
            ("-", None),
            ("3000000h", None),
            ("99999999999999999999s", None),
        ] {
            assert_eq!(
                parse_duration(text).and_then(|d| d.num_nanoseconds()),
                want,
                "{text}"
            );
        }
    }

    #[test]
    fn later_entries_of_a_map_win() {
        let map: StringMap = [("b", "1"), ("a", "2"), ("b", "3")].into_iter().collect();
        assert_eq!(Value::from(map.clone()).to_string(), "{a: 2, b: 3}");
        assert_eq!(map.get("b"), Some(&Text::from("3")));
        assert_eq!(map.get("c"), None);
    }

    #[test]
    fn prints_spans_in_seconds() {
        for (nanos, want) in [(0, "0s"), (1_500_000_000, "1.5s"), (-20_000_000, "-0.02s")] {
            assert_eq!(
                Value::Duration(TimeDelta::nanoseconds(nanos)).to_string(),
                want
            );
        }
    }
}
