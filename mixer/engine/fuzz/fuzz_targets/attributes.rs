//! Attributes of a proxy: Check's and Report's, decoded; what was understood must survive the wire.
#![no_main]

use lateen_engine::{AttributeTable, Limits, dictionary::GLOBAL_WORDS, wire};
use lateen_protocols::istio::mixer::v1::{CompressedAttributes, ReportRequest};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

thread_local! {
    static TABLE: AttributeTable = AttributeTable::default_vocabulary();
}

fuzz_target!(|data: &[u8]| {
    TABLE.with(|table| {
        let limits = Limits::default();
        if let Ok(report) = ReportRequest::decode(data) {
            // Refusals are as good as bags here; only a panic is not.
            drop(wire::decode_report(&report, table, &limits));
        }
        let Ok(attributes) = CompressedAttributes::decode(data) else {
            return;
        };
        let words = GLOBAL_WORDS.len();
        let count = u32::try_from(words).unwrap_or(u32::MAX);
        let Ok(bag) = wire::decode(&attributes, count, table, &limits) else {
            return;
        };
        let again = wire::encode(bag.iter(), words);
        if let Ok(again) = wire::decode(&again, count, table, &limits) {
            assert_eq!(again.iter().count(), bag.iter().count());
        }
    });
});
