//! Decides by policies in Rego: embedded ones, or those of an OPA server.
//!
//! The policy sees `input.subject` and `input.action` as the `authorization` template has them. Its answer is
//! `true`, `false`, or an object `{allowed, http_status, body, headers}` as OPA's plugin for Envoy knows it. An
//! answer that is undefined is a denial. What becomes of a request when the policy fails is said by `failClose`
//! (`true`: denied, `false`: allowed), and where it is not written by the rule's fail mode.

mod embedded;
mod remote;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Code, Counter, DirectResponse,
    Env, Handler, HandlerError, Info, Status,
    instance::{Authorization, CheckInstance, Values},
    params, template,
};
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use self::{
    embedded::Embedded,
    remote::{Question, Remote},
};

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Opa;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    policy: Vec<String>,
    #[serde(alias = "check_method")]
    check_method: String,
    #[serde(alias = "fail_close")]
    fail_close: Option<bool>,
    #[serde(alias = "server_url")]
    server_url: String,
    /// As in the connection of an adapter process.
    authentication: Json,
    #[serde(alias = "valid_duration", deserialize_with = "params::duration")]
    valid_duration: Duration,
}

enum Engine {
    Embedded(Box<Embedded>),
    Remote(Box<Remote>),
}

/// The engine as far as it can be told without the files that it names.
enum Plan {
    Embedded(Box<Embedded>),
    Remote(Box<Question>),
}

impl Plan {
    fn build(self, env: &Env) -> Result<Engine, String> {
        match self {
            Plan::Embedded(embedded) => Ok(Engine::Embedded(embedded)),
            Plan::Remote(question) => {
                Remote::build(*question, env).map(|remote| Engine::Remote(Box::new(remote)))
            }
        }
    }
}

impl Params {
    fn plan(&self) -> Result<Plan, String> {
        let path = self.check_method.strip_prefix("data.").unwrap_or_default();
        let is_path = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if !path.split('.').all(is_path) {
            return Err(format!(
                "checkMethod: {:?} is not of the form data.PACKAGE.RULE",
                self.check_method
            ));
        }
        match (self.policy.as_slice(), self.server_url.as_str()) {
            ([], "") => Err("policy: there is none, and no serverUrl".to_owned()),
            ([], url) => Question::new(url, path, &self.authentication)
                .map(|question| Plan::Remote(Box::new(question))),
            (_, "") if !self.authentication.is_null() => {
                Err("authentication: it is for a serverUrl, and there is none".to_owned())
            }
            (policies, "") => Embedded::new(policies, &self.check_method)
                .map(|embedded| Plan::Embedded(Box::new(embedded))),
            _ => Err("policy: either policies or a serverUrl, not both".to_owned()),
        }
    }
}

impl Adapter for Opa {
    fn info(&self) -> Info {
        Info {
            name: "opa",
            description: "decides by policies in Rego",
            templates: const { &[&template::AUTHORIZATION] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let plan = params::parse::<Params>(candidate.params).and_then(|p| p.plan());
        plan.err().into_iter().collect()
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        let plan = params.plan().map_err(BuildError)?;
        Ok(Handler::new().with_check(Arc::new(Judge {
            engine: plan.build(&env).map_err(BuildError)?,
            fail_close: params.fail_close,
            valid_duration: params.valid_duration,
            failures: env.counter("policy_failures"),
        })))
    }
}

struct Judge {
    engine: Engine,
    fail_close: Option<bool>,
    /// Zero: a policy may depend on anything, so its verdicts are for once.
    valid_duration: Duration,
    failures: Counter,
}

impl CheckHandler for Judge {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        async move {
            let CheckInstance::Authorization(instance) = instance else {
                return Err(HandlerError::invalid("opa takes authorization only"));
            };
            let input = input(&instance);
            let answer = match &self.engine {
                Engine::Embedded(embedded) => embedded.ask(input, call.deadline).await,
                Engine::Remote(remote) => remote.ask(&input, call.deadline).await,
            };
            let once = |status| CheckResult {
                status,
                valid_duration: None,
                valid_use_count: None,
            };
            let status = match answer.and_then(verdict) {
                Ok(status) => status,
                Err(problem) => {
                    self.failures.inc();
                    tracing::debug!(problem, "the policy fails");
                    return match self.fail_close {
                        None => Err(HandlerError::unavailable(problem)),
                        Some(true) => Ok(once(rejected())),
                        Some(false) => Ok(once(Status::ok())),
                    };
                }
            };
            Ok(match self.valid_duration {
                Duration::ZERO => once(status),
                valid => CheckResult {
                    status,
                    valid_duration: Some(valid),
                    valid_use_count: Some(-1),
                },
            })
        }
        .boxed()
    }
}

fn rejected() -> Status {
    Status::new(Code::PermissionDenied, "opa: request was rejected")
}

/// What the policy sees. What is empty is left out.
fn input(instance: &Authorization) -> Json {
    fn part<'a>(
        texts: impl IntoIterator<Item = (&'static str, &'a str)>,
        properties: &Values,
    ) -> Json {
        let mut all: Map<String, Json> = texts
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| (name.to_owned(), Json::from(text)))
            .collect();
        if !properties.is_empty() {
            let values = properties.iter();
            let values = values.map(|(n, v)| (n.to_string(), super::json::json(v)));
            all.insert("properties".to_owned(), Json::Object(values.collect()));
        }
        Json::Object(all)
    }
    let (subject, action) = (&instance.subject, &instance.action);
    let subject = part(
        [("user", &*subject.user), ("groups", &*subject.groups)],
        &subject.properties,
    );
    let action = part(
        [
            ("namespace", &*action.namespace),
            ("service", &*action.service),
            ("method", &*action.method),
            ("path", &*action.path),
        ],
        &action.properties,
    );
    serde_json::json!({ "subject": subject, "action": action })
}

/// A policy's answer as an object.
#[derive(Debug, Deserialize)]
struct Answer {
    allowed: bool,
    #[serde(default)]
    http_status: Option<u16>,
    #[serde(default)]
    body: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

/// What an answer means. `None`: undefined.
fn verdict(answer: Option<Json>) -> Result<Status, String> {
    match answer {
        Some(Json::Bool(true)) => Ok(Status::ok()),
        Some(Json::Bool(false)) | None => Ok(rejected()),
        Some(object @ Json::Object(_)) => {
            let answer = Answer::deserialize(object).map_err(|e| format!("its answer: {e}"))?;
            if answer.allowed {
                return Ok(Status::ok());
            }
            let mut status = rejected();
            if answer.http_status.is_some() || !answer.body.is_empty() {
                let code = answer.http_status.unwrap_or(403);
                if !(200..600).contains(&code) {
                    return Err(format!("its answer: {code} is no status of a response"));
                }
                status.direct_response = Some(DirectResponse {
                    code: code.into(),
                    body: answer.body,
                    headers: answer.headers.into_iter().collect(),
                });
            }
            Ok(status)
        }
        Some(other) => Err(format!(
            "its answer is neither true, false nor an object: {other}"
        )),
    }
}
