//! `envoy.service.ratelimit.v3.RateLimitService`: quotas alone, for an Envoy whose configuration asks for them by
//! descriptors. What Pilot generates asks with the check instead, so that one call decides both.

use std::collections::BTreeMap;

use lateen_engine::StringMap;
use lateen_protocols::{
    envoy::{
        envoy::{
            config::core::v3::HeaderValue,
            extensions::common::ratelimit::v3::RateLimitDescriptor,
            service::ratelimit::v3::{
                RateLimitRequest, RateLimitResponse,
                rate_limit_response::{Code as Overall, DescriptorStatus},
                rate_limit_service_server::RateLimitService,
            },
        },
        google::protobuf::Duration,
    },
    istio::mixer::v1::{HeaderOperation, check_request::QuotaParams},
};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{
    answer::{Verdict, response_headers},
    claims::{self, Caller, Claims, put, put_text},
};
use crate::{
    check::Question, config::Snapshot, metrics::Method, serve::Service, workloads::WorkloadView,
};

/// Most descriptors of one request.
const MAX_DESCRIPTORS: usize = 64;
/// Keys of entries whose value is the name of a quota: ours, and that of Envoy's action `generic_key`.
const QUOTA_KEYS: [&str; 2] = ["quota", "generic_key"];
/// What Envoy's action `remote_address` says.
const REMOTE_ADDRESS: &str = "remote_address";

/// The service.
#[derive(Debug)]
pub struct RateLimits {
    service: Service,
    workloads: WorkloadView,
}

impl RateLimits {
    pub(super) fn new(service: Service, workloads: WorkloadView) -> Self {
        Self { service, workloads }
    }
}

#[tonic::async_trait]
impl RateLimitService for RateLimits {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let begun = Instant::now();
        let answer = self.limit(request).await;
        self.service.count(Method::Check, begun, answer)
    }
}

impl RateLimits {
    async fn limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let caller = Caller::of(&request);
        let (metadata, _, request) = request.into_parts();
        let count = request.descriptors.len();
        if count == 0 || count > MAX_DESCRIPTORS {
            return Err(Status::invalid_argument(format!(
                "{count} descriptors are not 1 to {MAX_DESCRIPTORS}"
            )));
        }
        let mut answer = RateLimitResponse {
            overall_code: Overall::Ok.into(),
            ..RateLimitResponse::default()
        };
        for descriptor in &request.descriptors {
            let mut said = Claims::of_call(&metadata);
            for entry in &descriptor.entries {
                said.add(&entry.key, &entry.value);
            }
            caller
                .vouch(&said, &self.workloads)
                .map_err(Status::permission_denied)?;
            let quotas = quotas(descriptor, request.hits_addend)?;
            let decided = self.service.decide(&metadata, |snapshot| {
                question(snapshot, &said, descriptor, quotas)
            });
            let (decided, _, _) = decided.await?;
            let (operations, denied) = match Verdict::of(decided) {
                Verdict::Allowed(directive) => (directive.response_header_operations, None),
                Verdict::Denied(denial) => {
                    let body = denial.body();
                    (denial.directive.response_header_operations, Some(body))
                }
            };
            let code = match denied {
                Some(_) => Overall::OverLimit,
                None => Overall::Ok,
            };
            answer.statuses.push(DescriptorStatus {
                code: code.into(),
                limit_remaining: number(&operations, "ratelimit-remaining").unwrap_or_default(),
                duration_until_reset: number(&operations, "ratelimit-reset").map(|seconds| {
                    Duration {
                        seconds: seconds.into(),
                        nanos: 0,
                    }
                }),
                ..DescriptorStatus::default()
            });
            if let Some(body) = denied
                && answer.overall_code != i32::from(Overall::OverLimit)
            {
                answer.overall_code = Overall::OverLimit.into();
                answer.raw_body = body.into_bytes();
            }
            // Of several descriptors the last that says something is told.
            let headers = plain(&operations);
            if !headers.is_empty() {
                answer.response_headers_to_add = headers;
            }
        }
        Ok(Response::new(answer))
    }
}

/// Names and amounts.
fn quotas(
    descriptor: &RateLimitDescriptor,
    of_request: u32,
) -> Result<BTreeMap<String, QuotaParams>, Status> {
    let of_request = u64::from(of_request.max(1));
    let hits = descriptor
        .hits_addend
        .as_ref()
        .map_or(of_request, |hits| hits.value);
    let amount = i64::try_from(hits).unwrap_or(i64::MAX);
    if descriptor.is_negative_hits {
        return Err(Status::invalid_argument("quotas cannot be given back"));
    }
    let all: BTreeMap<String, QuotaParams> = descriptor
        .entries
        .iter()
        .filter(|entry| QUOTA_KEYS.contains(&entry.key.as_str()))
        .map(|entry| {
            let params = QuotaParams {
                amount,
                best_effort: false,
            };
            (entry.value.clone(), params)
        })
        .collect();
    if all.is_empty() {
        return Err(Status::invalid_argument(
            "a descriptor names no quota; it needs an entry with the key quota",
        ));
    }
    Ok(all)
}

fn question(
    snapshot: &Snapshot,
    said: &Claims<'_>,
    descriptor: &RateLimitDescriptor,
    quotas: BTreeMap<String, QuotaParams>,
) -> Question {
    let mut bag = claims::bag(&snapshot.table, said);
    let mut headers = Vec::new();
    for entry in &descriptor.entries {
        let (key, value) = (entry.key.as_str(), entry.value.as_str());
        if QUOTA_KEYS.contains(&key) {
            continue;
        }
        let header = key
            .strip_prefix("request.headers[")
            .and_then(|rest| rest.strip_suffix(']'));
        match header {
            Some(name) => headers.push((name.to_ascii_lowercase(), value)),
            None if key == REMOTE_ADDRESS => {
                put_text(&mut bag, "source.ip", value);
                put_text(&mut bag, "origin.ip", value);
            }
            // Here Envoy has no other way to say what it saw.
            None => put_text(&mut bag, key, value),
        }
    }
    if !headers.is_empty() {
        let headers: StringMap = headers.into_iter().collect();
        put(&mut bag, "request.headers", headers);
    }
    Question {
        bag,
        global_words: 0,
        quotas,
        deduplication_id: String::new(),
        only_quotas: true,
    }
}

fn number(operations: &[HeaderOperation], name: &str) -> Option<u32> {
    let found = operations.iter().find(|operation| operation.name == name)?;
    found.value.parse().ok()
}

fn plain(operations: &[HeaderOperation]) -> Vec<HeaderValue> {
    response_headers(operations)
        .into_iter()
        .filter_map(|option| option.header)
        .collect()
}
