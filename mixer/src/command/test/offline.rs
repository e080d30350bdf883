//! What stands in for adapters that would ask somebody outside.

use lateen_adapter::{Adapter, BuildError, Candidate, Env, Handler, adapter::Info};
use serde_json::Value as Json;

use crate::adapter::{memquota::MemQuota, redisquota};

/// The redisquota adapter with its counters in memory. Windows are rolling whatever the algorithm: a fixed one
/// differs only at its edges.
#[derive(Clone, Copy, Debug)]
pub(super) struct RedisQuota;

impl Adapter for RedisQuota {
    fn info(&self) -> Info {
        redisquota::RedisQuota.info()
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        redisquota::RedisQuota.validate(candidate)
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = in_memory(candidate.params);
        let candidate = Candidate {
            params: &params,
            ..*candidate
        };
        MemQuota.build(&candidate, env)
    }
}

/// The same limits as memquota has them: its overrides have windows of their own.
fn in_memory(params: &Json) -> Json {
    let either = |quota: &Json, a: &str, b: &str| {
        quota
            .get(a)
            .or_else(|| quota.get(b))
            .cloned()
            .unwrap_or(Json::Null)
    };
    let quotas = params["quotas"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|quota| {
            let window = either(quota, "validDuration", "valid_duration");
            let overrides = quota["overrides"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| {
                    serde_json::json!({
                        "dimensions": one["dimensions"],
                        "maxAmount": either(one, "maxAmount", "max_amount"),
                        "validDuration": window,
                    })
                });
            serde_json::json!({
                "name": quota["name"],
                "maxAmount": either(quota, "maxAmount", "max_amount"),
                "validDuration": window,
                "overrides": overrides.collect::<Vec<_>>(),
            })
        });
    serde_json::json!({"quotas": quotas.collect::<Vec<_>>()})
}
