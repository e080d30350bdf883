//! Verdicts onto the wire.

use std::time::Duration;

use lateen_adapter::Status;
use lateen_protocols::{google::rpc, istio::policy::v1beta1::DirectHttpResponse};
use prost::Message as _;

/// Type URL of the one detail a verdict can carry.
const DIRECT_RESPONSE: &str = "type.googleapis.com/istio.policy.v1beta1.DirectHttpResponse";

/// A verdict as `google.rpc.Status`.
pub fn status(status: &Status) -> rpc::Status {
    let details = status
        .direct_response
        .iter()
        .map(|direct| prost_types::Any {
            type_url: DIRECT_RESPONSE.to_owned(),
            value: DirectHttpResponse {
                code: i32::try_from(direct.code).unwrap_or_default(),
                body: direct.body.clone(),
                headers: direct.headers.iter().cloned().collect(),
            }
            .encode_to_vec(),
        });
    rpc::Status {
        code: status.code as i32,
        message: status.message.clone(),
        details: details.collect(),
    }
}

/// A span as `google.protobuf.Duration`.
pub fn duration(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or_default(),
    }
}
