//! Denies everything it is asked, with the status it is configured with.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Code, DirectResponse, Env,
    Handler, HandlerError, Info, QuotaArgs, QuotaHandler, QuotaResult, Status,
    instance::{CheckInstance, QuotaInstance},
    params, template,
};
use serde::Deserialize;
use serde_json::Value as Json;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Denier;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    status: RawStatus,
    #[serde(alias = "valid_duration", deserialize_with = "params::duration")]
    valid_duration: Duration,
    #[serde(alias = "valid_use_count", deserialize_with = "params::integer")]
    valid_use_count: i32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawStatus {
    code: Json,
    message: String,
    details: Vec<RawDirectResponse>,
}

/// The one detail with a meaning to the proxy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDirectResponse {
    #[serde(rename = "@type")]
    type_url: String,
    #[serde(deserialize_with = "params::integer")]
    code: u32,
    #[serde(default)]
    body: String,
    #[serde(default)]
    headers: std::collections::BTreeMap<String, String>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            status: RawStatus::default(),
            valid_duration: Duration::from_secs(5),
            valid_use_count: 1000,
        }
    }
}

impl Params {
    fn verdict(self) -> Result<Verdict, String> {
        let code = match &self.status.code {
            Json::Null => Some(Code::FailedPrecondition),
            Json::String(text) => match text.parse() {
                Ok(number) => Code::from_number(number),
                Err(_) => Code::from_name(text),
            },
            number => number.as_i64().and_then(Code::from_number),
        };
        let code =
            code.ok_or_else(|| format!("status.code: {} is no google.rpc.Code", self.status.code))?;
        if code == Code::Ok {
            return Err(
                "status.code: a denier cannot answer OK; leave the rule out instead".into(),
            );
        }
        let mut status = Status::new(code, self.status.message);
        for detail in self.status.details {
            if !detail
                .type_url
                .ends_with("/istio.policy.v1beta1.DirectHttpResponse")
            {
                return Err(format!(
                    "status.details: {} has no meaning here",
                    detail.type_url
                ));
            }
            if !(100..600).contains(&detail.code) {
                return Err(format!(
                    "status.details: {} is no HTTP status code",
                    detail.code
                ));
            }
            status.direct_response = Some(DirectResponse {
                code: detail.code,
                body: detail.body,
                headers: detail.headers.into_iter().collect(),
            });
        }
        Ok(Verdict {
            status,
            valid_duration: self.valid_duration,
            valid_use_count: self.valid_use_count,
        })
    }
}

impl Adapter for Denier {
    fn info(&self) -> Info {
        Info {
            name: "denier",
            description: "denies every check and grants no quota",
            templates: const {
                &[
                    &template::CHECKNOTHING,
                    &template::LISTENTRY,
                    &template::QUOTA,
                ]
            },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        verdict(candidate.params).err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        let verdict = Arc::new(verdict(candidate.params).map_err(BuildError)?);
        Ok(Handler::new()
            .with_check(verdict.clone())
            .with_quota(verdict))
    }
}

fn verdict(raw: &Json) -> Result<Verdict, String> {
    params::parse::<Params>(raw)?.verdict()
}

#[derive(Debug)]
struct Verdict {
    status: Status,
    valid_duration: Duration,
    valid_use_count: i32,
}

impl CheckHandler for Verdict {
    fn check<'a>(
        &'a self,
        _instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async {
            Ok(CheckResult {
                status: self.status.clone(),
                valid_duration: Some(self.valid_duration),
                valid_use_count: Some(self.valid_use_count),
            })
        }
        .boxed()
    }
}

impl QuotaHandler for Verdict {
    fn quota<'a>(
        &'a self,
        _instance: QuotaInstance,
        _args: &'a QuotaArgs,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        async {
            Ok(QuotaResult {
                status: Status::ok(),
                valid_duration: Some(self.valid_duration),
                granted: 0,
                window: None,
            })
        }
        .boxed()
    }
}
