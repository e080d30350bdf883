//! `istio.mixer.v1` attributes to and from bags.

pub mod raw;

use std::net::IpAddr;

use chrono::{DateTime, TimeDelta, Utc};
use lateen_protocols::istio::mixer::v1::attributes::attribute_value;
use lateen_protocols::istio::mixer::v1::attributes::{AttributeValue, StringMap as PlainStringMap};
use lateen_protocols::istio::mixer::v1::report_request::RepeatedAttributesSemantics;
use lateen_protocols::istio::mixer::v1::{
    Attributes, CompressedAttributes, ReportRequest, StringMap as WireStringMap,
};

use crate::bag::Bag;
use crate::dictionary::{self, GLOBAL_WORDS, MessageWords, WordList};
use crate::table::{AttributeTable, Slot};
use crate::value::{StringMap, Value, ValueType};

/// Bounds on what a message may hold; above them it is refused whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Words a message brings along.
    pub words: usize,
    /// Bytes of all those words.
    pub word_bytes: usize,
    /// Attributes of one set.
    pub attributes: usize,
    /// Entries of all string maps of one set.
    pub map_entries: usize,
    /// Attribute sets of one report.
    pub sets: usize,
}

impl Default for Limits {
    /// Several times what a proxy sends: a request's headers are the largest part of it.
    fn default() -> Limits {
        Limits {
            words: 8192,
            word_bytes: 1 << 20,
            attributes: 1024,
            map_entries: 4096,
            sets: 2048,
        }
    }
}

/// Attributes that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The sender knows more global words than there are. Answered with INVALID_ARGUMENT, this text makes
    /// Istio's client fall back to the first 111 words.
    #[error("Request could not be processed due to invalid global word count {0}: {known} words are known here", known = GLOBAL_WORDS.len())]
    GlobalWords(u32),
    /// Over a limit.
    #[error("{count} {what} are more than the limit of {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many may be.
        limit: usize,
    },
    /// One attribute has two values.
    #[error("duplicate attribute '{0}'")]
    Duplicate(String),
    /// An instant or a span outside of what the protocol allows.
    #[error("attribute '{0}' is out of range")]
    Range(String),
}

/// Reads the attributes of a Check.
///
/// Attributes the table lacks, and indexes neither dictionary has, are counted in [`Bag::ignored`] and
/// otherwise absent.
///
/// # Errors
/// The message is over a limit, or says two things about one attribute.
pub fn decode(
    attributes: &CompressedAttributes,
    global_word_count: u32,
    table: &AttributeTable,
    limits: &Limits,
) -> Result<Bag, DecodeError> {
    check_global_words(global_word_count)?;
    let mut bag = Bag::new(table);
    overlay(&mut bag, attributes, &[], limits)?;
    Ok(bag)
}

/// Reads the attribute sets of a Report, in order.
///
/// # Errors
/// As [`decode`]; one bad set refuses the whole report.
pub fn decode_report(
    request: &ReportRequest,
    table: &AttributeTable,
    limits: &Limits,
) -> Result<Vec<Bag>, DecodeError> {
    check_global_words(request.global_word_count)?;
    at_most("attribute sets", request.attributes.len(), limits.sets)?;
    let delta = request.repeated_attributes_semantics
        == i32::from(RepeatedAttributesSemantics::DeltaEncoding);
    let mut bags: Vec<Bag> = Vec::with_capacity(request.attributes.len());
    for attributes in &request.attributes {
        let mut bag = match bags.last() {
            Some(before) if delta => before.clone(),
            _ => Bag::new(table),
        };
        overlay(&mut bag, attributes, &request.default_words, limits)?;
        bags.push(bag);
    }
    Ok(bags)
}

fn check_global_words(count: u32) -> Result<(), DecodeError> {
    match usize::try_from(count) {
        Ok(n) if n <= GLOBAL_WORDS.len() => Ok(()),
        _ => Err(DecodeError::GlobalWords(count)),
    }
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), DecodeError> {
    if count > limit {
        Err(DecodeError::TooMany { what, count, limit })
    } else {
        Ok(())
    }
}

/// Puts the attributes of a message into a bag, over what it has.
fn overlay(
    bag: &mut Bag,
    attributes: &CompressedAttributes,
    default_words: &[String],
    limits: &Limits,
) -> Result<(), DecodeError> {
    let a = attributes;
    let words = if a.words.is_empty() {
        default_words
    } else {
        &a.words
    };
    at_most("words", words.len(), limits.words)?;
    at_most(
        "bytes of words",
        words.iter().map(String::len).sum(),
        limits.word_bytes,
    )?;
    let count = a.strings.len()
        + a.int64s.len()
        + a.doubles.len()
        + a.bools.len()
        + a.timestamps.len()
        + a.durations.len()
        + a.bytes.len()
        + a.string_maps.len();
    at_most("attributes", count, limits.attributes)?;
    let entries = a.string_maps.values().map(|m| m.entries.len()).sum();
    at_most("string map entries", entries, limits.map_entries)?;

    let words = MessageWords::new(words);
    let mut writer = Writer {
        words: &words,
        given: vec![false; bag.table().len()],
        bag,
    };
    for (name, word) in &a.strings {
        writer.put(*name, |ty, _| {
            let text = words.get(*word)?;
            Some(Value::from_text(ty, text.clone()).unwrap_or(Value::String(text)))
        })?;
    }
    for (name, map) in &a.string_maps {
        let entry = |(key, value): (&i32, &i32)| Some((words.get(*key)?, words.get(*value)?));
        writer.put(*name, |_, ignored| {
            let known: Vec<_> = map.entries.iter().filter_map(entry).collect();
            *ignored = known.len() < map.entries.len();
            Some(Value::StringMap(StringMap::new(known)))
        })?;
    }
    for (name, value) in &a.int64s {
        writer.put(*name, |_, _| Some(Value::Int64(*value)))?;
    }
    for (name, value) in &a.doubles {
        writer.put(*name, |_, _| Some(Value::Double(*value)))?;
    }
    for (name, value) in &a.bools {
        writer.put(*name, |_, _| Some(Value::Bool(*value)))?;
    }
    for (name, value) in &a.timestamps {
        let time = timestamp(value).ok_or_else(|| writer.out_of_range(*name))?;
        writer.put(*name, |_, _| Some(Value::Timestamp(time)))?;
    }
    for (name, value) in &a.durations {
        let span = duration(value).ok_or_else(|| writer.out_of_range(*name))?;
        writer.put(*name, |_, _| Some(Value::Duration(span)))?;
    }
    for (name, value) in &a.bytes {
        writer.put(*name, |ty, _| {
            Value::ip_from_bytes(value).filter(|_| ty == ValueType::IpAddress)
        })?;
    }
    Ok(())
}

struct Writer<'a> {
    words: &'a MessageWords,
    given: Vec<bool>, // by slot: this message has had a value for it
    bag: &'a mut Bag,
}

impl Writer<'_> {
    fn put(
        &mut self,
        name: i32,
        value: impl FnOnce(ValueType, &mut bool) -> Option<Value>,
    ) -> Result<(), DecodeError> {
        let Some(slot) = self.slot(name) else {
            self.bag.ignore();
            return Ok(());
        };
        if let Some(given) = self.given.get_mut(slot.index())
            && std::mem::replace(given, true)
        {
            return Err(DecodeError::Duplicate(
                self.bag.table().name(slot).to_string(),
            ));
        }
        let mut ignored = false;
        match value(self.bag.table().type_of(slot), &mut ignored) {
            Some(value) => self.bag.set(slot, value),
            None => ignored = true,
        }
        if ignored {
            self.bag.ignore();
        }
        Ok(())
    }

    fn slot(&self, name: i32) -> Option<Slot> {
        match usize::try_from(name) {
            Ok(index) => self.bag.table().slot_of_word(index),
            Err(_) => self.bag.table().slot(&self.words.get(name)?),
        }
    }

    fn out_of_range(&self, name: i32) -> DecodeError {
        DecodeError::Range(
            self.words
                .get(name)
                .map_or(name.to_string(), |w| w.to_string()),
        )
    }
}

fn timestamp(wire: &prost_types::Timestamp) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(wire.seconds, u32::try_from(wire.nanos).ok()?)
}

fn duration(wire: &prost_types::Duration) -> Option<TimeDelta> {
    // google.protobuf.Duration: at most 10,000 years, and both parts have one sign.
    let mixed = wire.seconds.signum() * i64::from(wire.nanos.signum()) < 0;
    if wire.seconds.unsigned_abs() > 315_576_000_000
        || wire.nanos.unsigned_abs() > 999_999_999
        || mixed
    {
        return None;
    }
    TimeDelta::try_seconds(wire.seconds)?.checked_add(&TimeDelta::nanoseconds(wire.nanos.into()))
}

/// The wire form of an instant.
pub fn timestamp_to_wire(time: &DateTime<Utc>) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.timestamp(),
        nanos: i32::try_from(time.timestamp_subsec_nanos()).unwrap_or(999_999_999),
    }
}

/// The wire form of a span.
pub fn duration_to_wire(span: &TimeDelta) -> prost_types::Duration {
    prost_types::Duration {
        seconds: span.num_seconds(),
        nanos: span.subsec_nanos(),
    }
}

/// Writes attributes for a reader that knows the first `global_words` words of the global dictionary.
/// Names need not be in any table, but must be distinct.
pub fn encode<'a>(
    attributes: impl IntoIterator<Item = (&'a str, &'a Value)>,
    global_words: usize,
) -> CompressedAttributes {
    let mut words = WordList::new(global_words);
    let mut out = encode_with(attributes, &mut words);
    out.words = words.into_words();
    out
}

/// Writes attributes whose words go into a list that other sets of the same report share
/// (`ReportRequest.default_words`).
pub fn encode_with<'a>(
    attributes: impl IntoIterator<Item = (&'a str, &'a Value)>,
    words: &mut WordList,
) -> CompressedAttributes {
    let mut out = CompressedAttributes::default();
    for (name, value) in attributes {
        let name = words.index(name);
        match value {
            Value::String(t) | Value::Email(t) | Value::Uri(t) | Value::DnsName(t) => {
                out.strings.insert(name, words.index(t));
            }
            Value::Int64(v) => {
                out.int64s.insert(name, *v);
            }
            Value::Double(v) => {
                out.doubles.insert(name, *v);
            }
            Value::Bool(v) => {
                out.bools.insert(name, *v);
            }
            Value::Timestamp(v) => {
                out.timestamps.insert(name, timestamp_to_wire(v));
            }
            Value::Duration(v) => {
                out.durations.insert(name, duration_to_wire(v));
            }
            Value::Ip(v) => {
                out.bytes.insert(name, ip_bytes(v));
            }
            Value::StringMap(map) => {
                let entries = map
                    .iter()
                    .map(|(k, v)| (words.index(k), words.index(v)))
                    .collect();
                out.string_maps.insert(name, WireStringMap { entries });
            }
        }
    }
    out
}

/// The global dictionary of this version, for `global_word_count`.
pub const GLOBAL_WORD_COUNT: usize = dictionary::GLOBAL_WORDS.len();

fn ip_bytes(ip: &IpAddr) -> Vec<u8> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Reads attributes in clear, as client configuration (`mixer_attributes`) and forwarded attributes carry
/// them. They have no table: bytes of 4 or 16 are an address, other bytes are left out, and so are instants
/// out of range. Sorted by name.
pub fn from_plain(attributes: &Attributes) -> Vec<(String, Value)> {
    let mut all: Vec<(String, Value)> = attributes
        .attributes
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), plain_value(value.value.as_ref()?)?)))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn plain_value(value: &attribute_value::Value) -> Option<Value> {
    use attribute_value::Value as V;
    Some(match value {
        V::StringValue(v) => Value::from(v.as_str()),
        V::Int64Value(v) => Value::Int64(*v),
        V::DoubleValue(v) => Value::Double(*v),
        V::BoolValue(v) => Value::Bool(*v),
        V::BytesValue(v) => Value::ip_from_bytes(v)?,
        V::TimestampValue(v) => Value::Timestamp(timestamp(v)?),
        V::DurationValue(v) => Value::Duration(duration(v)?),
        V::StringMapValue(v) => Value::StringMap(
            v.entries
                .iter()
                .map(|(k, v)| (k.as_str(), v.as_str()))
                .collect(),
        ),
    })
}

/// Writes attributes in clear.
pub fn to_plain<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a Value)>) -> Attributes {
    use attribute_value::Value as V;
    let value = |value: &Value| match value {
        Value::String(t) | Value::Email(t) | Value::Uri(t) | Value::DnsName(t) => {
            V::StringValue(t.to_string())
        }
        Value::Int64(v) => V::Int64Value(*v),
        Value::Double(v) => V::DoubleValue(*v),
        Value::Bool(v) => V::BoolValue(*v),
        Value::Timestamp(v) => V::TimestampValue(timestamp_to_wire(v)),
        Value::Duration(v) => V::DurationValue(duration_to_wire(v)),
        Value::Ip(v) => V::BytesValue(ip_bytes(v)),
        Value::StringMap(map) => V::StringMapValue(PlainStringMap {
            entries: map
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
        }),
    };
    Attributes {
        attributes: attributes
            .into_iter()
            .map(|(name, v)| {
                (
                    name.to_owned(),
                    AttributeValue {
                        value: Some(value(v)),
                    },
                )
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::istio::mixer::v1::referenced_attributes::{AttributeMatch, Condition};

    use super::*;
    use crate::text::Text;
    use crate::tracker::Tracker;

    fn table() -> AttributeTable {
        AttributeTable::default_vocabulary()
    }

    fn everything() -> Vec<(&'static str, Value)> {
        let headers: StringMap = [("user-agent", "curl"), (":authority", "a.b"), ("x", "")]
            .into_iter()
            .collect();
        vec![
            ("check.cache_hit", Value::Bool(true)),
            (
                "connection.duration",
                Value::Duration(TimeDelta::nanoseconds(-1_500_000_001)),
            ),
            ("destination.port", Value::Int64(-9)),
            (
                "destination.service.host",
                Value::from("reviews.default.svc.cluster.local"),
            ),
            ("request.headers", headers.into()),
            (
                "request.time",
                Value::Timestamp(DateTime::from_timestamp(-5, 7).unwrap()),
            ),
            ("source.ip", Value::Ip("10.0.0.1".parse().unwrap())),
            ("source.name", Value::from("GET")),
        ]
    }

    fn as_refs<'a>(list: &'a [(&'a str, Value)]) -> impl Iterator<Item = (&'a str, &'a Value)> {
        list.iter().map(|(n, v)| (*n, v))
    }

    #[test]
    fn what_is_encoded_is_decoded_at_any_global_count() {
        let list = everything();
        for count in [
            0,
            1,
            dictionary::BASE_WORDS,
            GLOBAL_WORD_COUNT,
            GLOBAL_WORD_COUNT + 9,
        ] {
            let wire = encode(as_refs(&list), count);
            let known = u32::try_from(count.min(GLOBAL_WORD_COUNT)).unwrap();
            let bag = decode(&wire, known, &table(), &Limits::default()).unwrap();
            assert!(bag.iter().eq(as_refs(&list)), "{count}");
            assert_eq!(bag.ignored(), 0);
        }
    }

    #[test]
    fn plain_attributes_round_trip() {
        let list = everything();
        let plain = to_plain(as_refs(&list));
        let back = from_plain(&plain);
        assert!(back.iter().map(|(n, v)| (n.as_str(), v)).eq(as_refs(&list)));
    }

    #[test]
    fn unknown_things_are_ignored_and_counted() {
        let mut wire = CompressedAttributes {
            words: vec!["nobody.knows".into()],
            ..Default::default()
        };
        wire.bools.insert(-1, true);
        wire.bools.insert(-7, true);
        wire.strings.insert(2, 9999);
        wire.bytes.insert(0, vec![1, 2, 3]);
        wire.int64s
            .insert(dictionary::global_index("response.code").unwrap(), 200);
        let bag = decode(&wire, 0, &table(), &Limits::default()).unwrap();
        assert_eq!(
            bag.iter().collect::<Vec<_>>(),
            [("response.code", &Value::Int64(200))]
        );
        assert_eq!(bag.ignored(), 4);
    }

    #[test]
    fn one_attribute_has_one_value() {
        let mut wire = CompressedAttributes {
            words: vec!["source.ip".into()],
            ..Default::default()
        };
        wire.bytes.insert(0, vec![1, 2, 3, 4]);
        wire.strings.insert(-1, -1);
        let error = decode(&wire, 0, &table(), &Limits::default()).unwrap_err();
        assert_eq!(error, DecodeError::Duplicate("source.ip".into()));
    }

    #[test]
    fn a_value_of_another_type_is_kept_for_the_reader_to_refuse() {
        let mut wire = CompressedAttributes::default();
        wire.int64s
            .insert(dictionary::global_index("request.path").unwrap(), 5);
        let bag = decode(&wire, 0, &table(), &Limits::default()).unwrap();
        assert_eq!(bag.get_by_name("request.path"), Some(&Value::Int64(5)));
    }

    #[test]
    fn limits_refuse_the_message() {
        let limits = Limits {
            words: 2,
            word_bytes: 5,
            attributes: 1,
            map_entries: 1,
            sets: 1,
        };
        let words = |list: &[&str]| CompressedAttributes {
            words: list.iter().map(|w| (*w).to_owned()).collect(),
            ..Default::default()
        };
        let mut two = CompressedAttributes::default();
        two.int64s.insert(1, 1);
        two.int64s.insert(2, 1);
        let mut map = CompressedAttributes::default();
        map.string_maps.insert(
            5,
            WireStringMap {
                entries: [(1, 1), (2, 2)].into(),
            },
        );
        for (message, what) in [
            (words(&["a", "b", "c"]), "words"),
            (words(&["abcdef"]), "bytes of words"),
            (two, "attributes"),
            (map, "string map entries"),
        ] {
            match decode(&message, 0, &table(), &limits) {
                Err(DecodeError::TooMany { what: found, .. }) => assert_eq!(found, what),
                other => panic!("{what}: {other:?}"),
            }
        }
        let known = u32::try_from(GLOBAL_WORD_COUNT).unwrap();
        let error = decode(&words(&[]), known + 1, &table(), &limits).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("Request could not be processed due to invalid")
        );
    }

    #[test]
    fn spans_and_instants_out_of_range_are_refused() {
        let index = dictionary::global_index("response.duration").unwrap();
        for (seconds, nanos) in [(i64::MAX, 0), (1, -1), (0, i32::MAX), (i64::MIN, i32::MIN)] {
            let mut wire = CompressedAttributes::default();
            wire.durations
                .insert(index, prost_types::Duration { seconds, nanos });
            assert!(matches!(
                decode(&wire, 0, &table(), &Limits::default()),
                Err(DecodeError::Range(_))
            ));
        }
        let index = dictionary::global_index("request.time").unwrap();
        for (seconds, nanos) in [(i64::MAX, 0), (0, -1), (0, i32::MIN)] {
            let mut wire = CompressedAttributes::default();
            wire.timestamps
                .insert(index, prost_types::Timestamp { seconds, nanos });
            assert!(decode(&wire, 0, &table(), &Limits::default()).is_err());
        }
    }

    #[test]
    fn reports_are_full_sets_or_deltas() {
        let code = dictionary::global_index("response.code").unwrap();
        let mut first = CompressedAttributes::default();
        first.int64s.insert(code, 200);
        first
            .strings
            .insert(dictionary::global_index("request.path").unwrap(), -1);
        let mut second = CompressedAttributes::default();
        second.int64s.insert(code, 404);
        let request = |semantics: RepeatedAttributesSemantics| ReportRequest {
            attributes: vec![first.clone(), second.clone()],
            default_words: vec!["/x".into()],
            global_word_count: 222,
            repeated_attributes_semantics: semantics.into(),
        };
        let read = |semantics| {
            let bags = decode_report(&request(semantics), &table(), &Limits::default()).unwrap();
            bags.iter()
                .map(|bag| {
                    bag.iter()
                        .map(|(n, v)| format!("{n}={v}"))
                        .collect::<Vec<_>>()
                        .join(" ")
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(
            read(RepeatedAttributesSemantics::DeltaEncoding),
            [
                "request.path=/x response.code=200",
                "request.path=/x response.code=404"
            ]
        );
        assert_eq!(
            read(RepeatedAttributesSemantics::IndependentEncoding),
            ["request.path=/x response.code=200", "response.code=404"]
        );
    }

    #[test]
    fn references_are_encoded_by_name_and_key() {
        let table = table();
        let mut bag = Bag::new(&table);
        bag.set_by_name(
            "request.headers",
            [("x-own", "1")].into_iter().collect::<StringMap>(),
        )
        .unwrap();
        bag.set_by_name("source.name", "productpage").unwrap();
        bag.generate(
            table.slot("source.namespace").unwrap(),
            Value::from("default"),
        );
        let slot = |name: &str| table.slot(name).unwrap();
        let mut tracker = Tracker::new();
        tracker.look_up(&bag, slot("request.headers"));
        tracker.look_up_key(&bag, slot("request.headers"), &Text::from("x-own"), true);
        tracker.look_up_key(&bag, slot("request.headers"), &Text::from("cookie"), false);
        tracker.look_up(&bag, slot("source.name"));
        tracker.look_up(&bag, slot("source.namespace"));
        tracker.look_up(&bag, slot("source.labels"));
        assert_eq!(
            tracker.names(&table),
            [
                "-request.headers[cookie]",
                "-source.labels",
                "request.headers",
                "request.headers[x-own]",
                "source.name"
            ]
        );
        let wire = tracker.encode(&table, GLOBAL_WORD_COUNT);
        let global = |word: &str| dictionary::global_index(word).unwrap();
        let entry = |name, map_key, condition: Condition| AttributeMatch {
            name,
            map_key,
            condition: condition.into(),
            regex: String::new(),
        };
        assert_eq!(wire.words, ["x-own"]);
        assert_eq!(
            wire.attribute_matches,
            [
                entry(global("source.labels"), 0, Condition::Absence),
                entry(global("source.name"), 0, Condition::Exact),
                entry(
                    global("request.headers"),
                    global("cookie"),
                    Condition::Absence
                ),
                entry(global("request.headers"), -1, Condition::Exact),
            ]
        );
        assert!(!tracker.whole_map());
    }
}
