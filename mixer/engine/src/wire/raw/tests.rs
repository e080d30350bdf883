use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CompressedAttributes, ReportRequest, StringMap as WireStringMap,
};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::wire;

fn table() -> AttributeTable {
    AttributeTable::default_vocabulary()
}

/// Names and words: of the global dictionary, of the message, and of neither.
fn index() -> impl Strategy<Value = i32> {
    prop_oneof![0..230_i32, -12..0_i32, Just(i32::MIN), Just(i32::MAX)]
}

fn span() -> impl Strategy<Value = (i64, i32)> {
    prop_oneof![
        (-5..2_000_000_000_i64, 0..1_000_000_000_i32),
        (any::<i64>(), any::<i32>()),
    ]
}

prop_compose! {
    fn attributes()(
        words in prop::collection::vec("[a-z.]{0,12}|source.ip|destination.port", 0..8),
        strings in prop::collection::hash_map(index(), index(), 0..6),
        int64s in prop::collection::hash_map(index(), any::<i64>(), 0..3),
        doubles in prop::collection::hash_map(index(), any::<f64>(), 0..2),
        bools in prop::collection::hash_map(index(), any::<bool>(), 0..2),
        timestamps in prop::collection::hash_map(index(), span(), 0..2),
        durations in prop::collection::hash_map(index(), span(), 0..2),
        bytes in prop::collection::hash_map(index(), prop::collection::vec(any::<u8>(), 0..17), 0..3),
        maps in prop::collection::hash_map(
            index(),
            prop::collection::hash_map(index(), index(), 0..5),
            0..3,
        ),
    ) -> CompressedAttributes {
        let time = |(name, (seconds, nanos))| (name, prost_types::Timestamp { seconds, nanos });
        let span = |(name, (seconds, nanos))| (name, prost_types::Duration { seconds, nanos });
        let map = |(name, entries)| (name, WireStringMap { entries });
        CompressedAttributes {
            words,
            strings,
            int64s,
            doubles,
            bools,
            timestamps: timestamps.into_iter().map(time).collect(),
            durations: durations.into_iter().map(span).collect(),
            bytes,
            string_maps: maps.into_iter().map(map).collect(),
        }
    }
}

/// All that a bag says. NaN is equal to itself here.
fn told(bag: &Bag) -> (Vec<String>, u32) {
    let all = bag.iter().map(|(name, value)| format!("{name} {value:?}"));
    (all.collect(), bag.ignored())
}

/// Both ways agree, or the fast one leaves it to the other. Whether it was fast.
fn check_agrees(message: &[u8]) -> bool {
    let limits = Limits::default();
    let fast =
        RawCheck::parse(message).and_then(|raw| raw.bag(&table(), &limits).map(|b| (raw, b)));
    let Some((raw, fast)) = fast else {
        return false;
    };
    let slow = CheckRequest::decode(message).expect("what is read fast is well-formed");
    assert_eq!(raw.global_word_count, slow.global_word_count);
    assert_eq!(raw.deduplication_id, slow.deduplication_id);
    assert!(slow.quotas.is_empty());
    let attributes = slow.attributes.unwrap_or_default();
    let slow = wire::decode(&attributes, slow.global_word_count, &table(), &limits);
    assert_eq!(
        told(&fast),
        told(&slow.expect("what is read fast is right"))
    );
    true
}

fn report_agrees(message: &[u8]) -> bool {
    let limits = Limits::default();
    let Some(fast) = report(message, &table(), &limits) else {
        return false;
    };
    let slow = ReportRequest::decode(message).expect("what is read fast is well-formed");
    let slow = wire::decode_report(&slow, &table(), &limits).expect("what is read fast is right");
    let all = |bags: &[Bag]| bags.iter().map(told).collect::<Vec<_>>();
    assert_eq!(all(&fast), all(&slow));
    true
}

proptest! {
    #[test]
    fn checks_are_read_alike(
        attributes in attributes(),
        global_word_count in 0..230_u32,
        deduplication_id in "[a-z]{0,4}",
    ) {
        let request = CheckRequest {
            attributes: Some(attributes),
            global_word_count,
            deduplication_id,
            ..CheckRequest::default()
        };
        check_agrees(&request.encode_to_vec());
    }

    #[test]
    fn reports_are_read_alike(
        attributes in prop::collection::vec(attributes(), 0..4),
        default_words in prop::collection::vec("[a-z]{0,6}", 0..6),
        global_word_count in 0..230_u32,
        repeated_attributes_semantics in 0..3,
    ) {
        let request = ReportRequest {
            attributes,
            default_words,
            global_word_count,
            repeated_attributes_semantics,
        };
        report_agrees(&request.encode_to_vec());
    }

    #[test]
    fn damaged_messages_are_never_read_otherwise(
        attributes in attributes(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let request = CheckRequest {
            attributes: Some(attributes),
            global_word_count: 222,
            ..CheckRequest::default()
        };
        let mut message = request.encode_to_vec();
        let position = at.index(message.len());
        message[position] = byte;
        check_agrees(&message);
        message.truncate(cut.index(message.len() + 1));
        check_agrees(&message);
    }
}

#[test]
fn what_proxies_send_is_read_fast() {
    let values = [
        (
            "source.principal",
            Value::from("cluster.local/ns/default/sa/a"),
        ),
        ("destination.port", Value::Int64(9080)),
        ("connection.mtls", Value::Bool(false)),
        (
            "request.time",
            Value::Timestamp(chrono::DateTime::UNIX_EPOCH),
        ),
        (
            "response.duration",
            Value::Duration(chrono::TimeDelta::milliseconds(7)),
        ),
        ("source.ip", Value::Ip([127, 0, 0, 1].into())),
        (
            "request.headers",
            Value::StringMap([("user-agent", "curl"), ("x", "")].into_iter().collect()),
        ),
    ];
    let attributes = wire::encode(values.iter().map(|(n, v)| (*n, v)), wire::GLOBAL_WORD_COUNT);
    let check = CheckRequest {
        attributes: Some(attributes.clone()),
        global_word_count: 222,
        deduplication_id: "1".to_owned(),
        ..CheckRequest::default()
    };
    assert!(check_agrees(&check.encode_to_vec()));
    let report = ReportRequest {
        attributes: vec![attributes.clone(), attributes],
        default_words: vec!["unused".to_owned()],
        global_word_count: 222,
        repeated_attributes_semantics: 1,
    };
    assert!(report_agrees(&report.encode_to_vec()));
}
