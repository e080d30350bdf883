//! The messages of `istio.mixer.adapter.model.v1beta1` and of its neighbours that have the same shape for every
//! template, with Istio's numbers.

use std::collections::HashMap;

use prost_types::Any;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Status {
    #[prost(int32, tag = "1")]
    pub(super) code: i32,
    #[prost(string, tag = "2")]
    pub(super) message: String,
    #[prost(message, repeated, tag = "3")]
    pub(super) details: Vec<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DirectHttpResponse {
    #[prost(int32, tag = "1")]
    pub(super) code: i32,
    #[prost(string, tag = "2")]
    pub(super) body: String,
    #[prost(map = "string, string", tag = "3")]
    pub(super) headers: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CheckResult {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Status>,
    #[prost(message, optional, tag = "2")]
    pub(super) valid_duration: Option<prost_types::Duration>,
    #[prost(int32, tag = "3")]
    pub(super) valid_use_count: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct QuotaParams {
    #[prost(int64, tag = "1")]
    pub(super) amount: i64,
    #[prost(bool, tag = "2")]
    pub(super) best_effort: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct QuotaRequest {
    #[prost(map = "string, message", tag = "1")]
    pub(super) quotas: HashMap<String, QuotaParams>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Granted {
    #[prost(message, optional, tag = "2")]
    pub(super) valid_duration: Option<prost_types::Duration>,
    #[prost(int64, tag = "3")]
    pub(super) granted_amount: i64,
    #[prost(message, optional, tag = "4")]
    pub(super) status: Option<Status>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct QuotaResult {
    #[prost(map = "string, message", tag = "1")]
    pub(super) quotas: HashMap<String, Granted>,
}

/// What a call carries besides its instances; those are read by the template.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Call {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(super) instances: Vec<bytes::Bytes>,
    #[prost(message, optional, tag = "2")]
    pub(super) adapter_config: Option<Any>,
    #[prost(string, tag = "3")]
    pub(super) dedup_id: String,
    #[prost(message, optional, tag = "4")]
    pub(super) quota_request: Option<QuotaRequest>,
}

/// `ValidateRequest` and `CreateSessionRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Configured {
    #[prost(message, optional, tag = "1")]
    pub(super) adapter_config: Option<Any>,
    #[prost(map = "string, message", tag = "2")]
    pub(super) inferred_types: HashMap<String, Any>,
}

/// `ValidateResponse` and `CloseSessionResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Agreed {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Status>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CreateSessionResponse {
    #[prost(string, tag = "1")]
    pub(super) session_id: String,
    #[prost(message, optional, tag = "2")]
    pub(super) status: Option<Status>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CloseSessionRequest {
    #[prost(string, tag = "1")]
    pub(super) session_id: String,
}

/// The parameters of an adapter that is served, whatever it takes.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Params {
    #[prost(string, tag = "1")]
    pub(super) json: String,
}
