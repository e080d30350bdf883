//! Attributes of a request, from the wire into bags.

use lateen_engine::{AttributeTable, Bag, DecodeError, Limits, wire};
use lateen_protocols::istio::mixer::v1::{CompressedAttributes, ReportRequest};
use tonic::Status;

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
