//! Attributes of a request, from the wire into bags.

use std::collections::BTreeMap;

use lateen_engine::{
    AttributeTable, Bag, DecodeError, Limits,
    wire::{self, raw},
};
use lateen_protocols::istio::mixer::v1::{CheckRequest, CompressedAttributes, ReportRequest};
use prost::Message as _;
use tonic::Status;

use crate::check::Question;

/// Reads a check from its message.
///
/// # Errors
/// INVALID_ARGUMENT, and why.
pub fn read_check(message: &[u8], table: &AttributeTable) -> Result<Question, Status> {
    if let Some(check) = raw::RawCheck::parse(message)
        && let Some(bag) = check.bag(table, &Limits::default())
    {
        return Ok(Question {
            bag,
            global_words: known_words(check.global_word_count),
            quotas: BTreeMap::new(),
            deduplication_id: check.deduplication_id.to_owned(),
            only_quotas: false,
        });
    }
    let request = CheckRequest::decode(message).map_err(malformed)?;
    question(request, table)
}

/// Reads what a check asks.
///
/// # Errors
/// INVALID_ARGUMENT, and why.
pub fn question(request: CheckRequest, table: &AttributeTable) -> Result<Question, Status> {
    let attributes = request.attributes.unwrap_or_default();
    Ok(Question {
        bag: decode(&attributes, request.global_word_count, table)?,
        global_words: known_words(request.global_word_count),
        quotas: request.quotas.into_iter().collect(),
        deduplication_id: request.deduplication_id,
        only_quotas: false,
    })
}

/// Reads the attribute sets of a report from its message.
///
/// # Errors
/// INVALID_ARGUMENT, and why.
pub fn read_report(message: &[u8], table: &AttributeTable) -> Result<Vec<Bag>, Status> {
    match raw::report(message, table, &Limits::default()) {
        Some(bags) => Ok(bags),
        None => decode_report(&ReportRequest::decode(message).map_err(malformed)?, table),
    }
}

fn malformed(error: prost::DecodeError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Reads the attributes of a check.
///
/// # Errors
/// INVALID_ARGUMENT, and why.
pub fn decode(
    attributes: &CompressedAttributes,
    global_word_count: u32,
    table: &AttributeTable,
) -> Result<Bag, Status> {
    wire::decode(attributes, global_word_count, table, &Limits::default()).map_err(refuse)
}

/// Reads the attribute sets of a report.
///
/// # Errors
/// INVALID_ARGUMENT, and why.
pub fn decode_report(request: &ReportRequest, table: &AttributeTable) -> Result<Vec<Bag>, Status> {
    wire::decode_report(request, table, &Limits::default()).map_err(refuse)
}

/// How many words of the global dictionary caller and server share.
pub fn known_words(global_word_count: u32) -> usize {
    usize::try_from(global_word_count)
        .unwrap_or(usize::MAX)
        .min(wire::GLOBAL_WORD_COUNT)
}

fn refuse(error: DecodeError) -> Status {
    Status::invalid_argument(error.to_string())
}
