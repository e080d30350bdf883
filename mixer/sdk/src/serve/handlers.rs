//! Handlers by their configuration, and what calls ask of them.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher as _, Hasher as _},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt as _;
use prost::Message as _;
use prost_types::Any;
use serde_json::Value as Json;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status as RpcStatus};

use super::{message, path, timeout, wire};
use crate::{
    adapter::{Adapter, Candidate, InstanceType},
    clock::Clock,
    env::{Closer, Env},
    handler::{Call, CheckResult, Handler, HandlerError, QuotaArgs},
    instance::{
        CheckInstance, CheckOutputInstance, GenerateInstance, QuotaInstance, ReportInstance,
    },
    status::{Code, Status},
    template::{Template, Variety},
    workload::NoWorkloads,
};

/// Handlers that are kept.
pub(super) const MAX_HANDLERS: usize = 64;
/// Sessions that are kept. A Mixer that was killed leaves its own open; one that is still in use and is lost is opened
/// again by its Mixer.
const MAX_SESSIONS: usize = 256;
/// Istio's API has the session's id in the place of the parameters, in an Any of this type.
const SESSION_TYPE: &str = "google.protobuf.Any.type_url";
/// The key of the metadata that has the session's id.
const SESSION: &str = "session_id";
const BACKEND: &str = "/istio.mixer.adapter.model.v1beta1.InfrastructureBackend/";

/// A handler, closed with the last call of it.
struct Built {
    handler: Handler,
    _closer: Closer,
}

/// All handlers of one adapter.
pub(super) struct Handlers {
    adapter: Arc<dyn Adapter>,
    paths: HashMap<String, &'static Template>,
    /// By `adapter_config`.
    configured: Mutex<Kept<Vec<u8>>>,
    /// By id.
    sessions: Mutex<Kept<String>>,
}

/// Handlers by what they are found by, the last used at the end.
struct Kept<K>(Vec<(K, Arc<Built>)>);

impl<K> Kept<K> {
    fn find<Q: ?Sized>(&mut self, key: &Q) -> Option<Arc<Built>>
    where
        K: PartialEq<Q>,
    {
        let at = self.0.iter().position(|(k, _)| k == key)?;
        let used = self.0.remove(at);
        let built = Arc::clone(&used.1);
        self.0.push(used);
        Some(built)
    }

    /// Adds one; the one that was not used for longest is returned when there are more than `most`.
    fn add(&mut self, key: K, built: Arc<Built>, most: usize) -> Option<(K, Arc<Built>)> {
        self.0.push((key, built));
        (self.0.len() > most).then(|| self.0.remove(0))
    }
}

impl Handlers {
    pub(super) fn new(adapter: Arc<dyn Adapter>) -> Self {
        let templates = adapter.info().templates.iter();
        Self {
            paths: templates.map(|t| (path(t), *t)).collect(),
            adapter,
            configured: Mutex::new(Kept(Vec::new())),
            sessions: Mutex::new(Kept(Vec::new())),
        }
    }

    /// Answers one call.
    pub(super) async fn call(
        &self,
        path: &str,
        request: Request<Bytes>,
    ) -> Result<Bytes, RpcStatus> {
        if let Some(method) = path.strip_prefix(BACKEND) {
            return self.infrastructure(method, request.get_ref());
        }
        let template = self.paths.get(path).ok_or_else(|| {
            let adapter = self.adapter.info().name;
            RpcStatus::unimplemented(format!("adapter {adapter} does not take {path}"))
        })?;
        let deadline = Instant::now() + timeout(request.metadata());
        let session = request.metadata().get(SESSION).cloned();
        let call = message::Call::decode(request.into_inner()).map_err(malformed)?;
        let config = call.adapter_config.as_ref();
        let session = match &session {
            Some(id) => Some(id.as_bytes()),
            None => config
                .filter(|any| any.type_url.ends_with(SESSION_TYPE))
                .map(|any| any.value.as_slice()),
        };
        let built = match session {
            Some(id) => {
                let id = std::str::from_utf8(id).unwrap_or_default();
                let known = lock(&self.sessions).find(id);
                known.ok_or_else(|| RpcStatus::not_found("there is no such session"))?
            }
            None => self.by_config(config)?,
        };
        let work = AssertUnwindSafe(handle(&built.handler, template, call, deadline));
        match tokio::time::timeout_at(deadline, work.catch_unwind()).await {
            Ok(Ok(answer)) => answer.map(Bytes::from),
            Ok(Err(_panic)) => {
                tracing::error!(path, "the adapter panicked");
                Err(RpcStatus::internal("the adapter panicked"))
            }
            Err(_late) => Err(RpcStatus::deadline_exceeded(
                "the adapter did not answer in time",
            )),
        }
    }

    fn infrastructure(&self, method: &str, body: &Bytes) -> Result<Bytes, RpcStatus> {
        let answer = match method {
            "Validate" => {
                let request = message::Configured::decode(body.clone()).map_err(malformed)?;
                let found = self.candidate(request).map(|(params, types)| {
                    let problems = self.problems(&params, &types);
                    (!problems.is_empty()).then(|| problems.join("; "))
                });
                let status = match found {
                    Ok(None) => refusal(Code::Ok, ""),
                    Ok(Some(reason)) => refusal(Code::InvalidArgument, &reason),
                    Err(reason) => refusal(Code::InvalidArgument, &reason),
                };
                message::Agreed {
                    status: Some(status),
                }
                .encode_to_vec()
            }
            "CreateSession" => {
                let request = message::Configured::decode(body.clone()).map_err(malformed)?;
                let (session_id, status) = match self.open(request) {
                    Ok(id) => (id, refusal(Code::Ok, "")),
                    Err((code, reason)) => (String::new(), refusal(code, &reason)),
                };
                message::CreateSessionResponse {
                    session_id,
                    status: Some(status),
                }
                .encode_to_vec()
            }
            "CloseSession" => {
                let request =
                    message::CloseSessionRequest::decode(body.clone()).map_err(malformed)?;
                let mut sessions = lock(&self.sessions);
                let at = sessions
                    .0
                    .iter()
                    .position(|(id, _)| *id == request.session_id);
                let closed = at.map(|at| sessions.0.remove(at));
                drop(sessions); // the handler is closed without it
                let status = match closed {
                    Some(_) => refusal(Code::Ok, ""),
                    None => refusal(Code::NotFound, "there is no such session"),
                };
                message::Agreed {
                    status: Some(status),
                }
                .encode_to_vec()
            }
            other => {
                return Err(RpcStatus::unimplemented(format!(
                    "there is no method {other}"
                )));
            }
        };
        Ok(answer.into())
    }

    /// Parameters and instance types.
    fn candidate(&self, request: message::Configured) -> Result<(Json, Vec<InstanceType>), String> {
        let params = params(request.adapter_config.as_ref())?;
        let mut types = Vec::with_capacity(request.inferred_types.len());
        for (name, any) in request.inferred_types {
            // `type.googleapis.com/PACKAGE.Type`, and the package is the template.
            let full = any.type_url.rsplit('/').next().unwrap_or_default();
            let package = full.strip_suffix(".Type").unwrap_or(full);
            let templates = self.adapter.info().templates;
            let template = templates.iter().find(|t| t.name == package);
            let template = template.ok_or_else(|| format!("{name}: {full} is not taken"))?;
            types.push(InstanceType {
                fields: wire::types(template, &any.value).map_err(|e| format!("{name}: {e}"))?,
                name: Arc::from(name),
                template: template.name,
            });
        }
        types.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((params, types))
    }

    fn problems(&self, params: &Json, instances: &[InstanceType]) -> Vec<String> {
        let candidate = Candidate {
            name: "served",
            params,
            instances,
        };
        let validate = AssertUnwindSafe(|| self.adapter.validate(&candidate));
        std::panic::catch_unwind(validate)
            .unwrap_or_else(|_| vec!["the adapter panicked".to_owned()])
    }

    fn build(&self, params: &Json, instances: &[InstanceType]) -> Result<Built, (Code, String)> {
        let problems = self.problems(params, instances);
        if !problems.is_empty() {
            return Err((Code::InvalidArgument, problems.join("; ")));
        }
        let candidate = Candidate {
            name: "served",
            params,
            instances,
        };
        let (env, closer) = Env::new(
            Arc::from(candidate.name),
            Clock::real(),
            Arc::new(NoWorkloads),
            TaskTracker::new(),
        );
        let build = AssertUnwindSafe(|| self.adapter.build(&candidate, env));
        let handler = std::panic::catch_unwind(build)
            .map_err(|_| (Code::Internal, "the adapter panicked".to_owned()))?
            .map_err(|e| (Code::FailedPrecondition, e.to_string()))?;
        Ok(Built {
            handler,
            _closer: closer,
        })
    }

    /// The handler of a configuration that comes with each call.
    fn by_config(&self, config: Option<&Any>) -> Result<Arc<Built>, RpcStatus> {
        let key = config.map(|any| any.value.as_slice()).unwrap_or_default();
        if let Some(built) = lock(&self.configured).find(key) {
            return Ok(built);
        }
        // Built without the lock: the adapter may take its time.
        let params = params(config).map_err(RpcStatus::invalid_argument)?;
        let built = self
            .build(&params, &[])
            .map_err(|(code, reason)| RpcStatus::new((code as i32).into(), reason))?;
        let built = Arc::new(built);
        let mut configured = lock(&self.configured);
        // Another call may have been faster; there is one handler, so that there is one count of a quota.
        if let Some(first) = configured.find(key) {
            return Ok(first);
        }
        let gone = configured.add(key.to_owned(), Arc::clone(&built), MAX_HANDLERS);
        drop(configured);
        drop(gone);
        Ok(built)
    }

    fn open(&self, request: message::Configured) -> Result<String, (Code, String)> {
        let (params, types) = self
            .candidate(request)
            .map_err(|reason| (Code::InvalidArgument, reason))?;
        let built = Arc::new(self.build(&params, &types)?);
        // Each of these has keys of its own, from the system.
        let half = || RandomState::new().build_hasher().finish();
        let id = format!("{:016x}{:016x}", half(), half());
        let gone = lock(&self.sessions).add(id.clone(), built, MAX_SESSIONS);
        if gone.is_some() {
            tracing::warn!(
                "there are too many sessions; the one that was not used for longest is closed"
            );
        }
        Ok(id)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn malformed(error: prost::DecodeError) -> RpcStatus {
    RpcStatus::invalid_argument(error.to_string())
}

fn refusal(code: Code, message: &str) -> message::Status {
    message::Status {
        code: code as i32,
        message: message.to_owned(),
        details: Vec::new(),
    }
}

fn params(config: Option<&Any>) -> Result<Json, String> {
    let Some(any) = config else {
        return Ok(Json::Null);
    };
    let params = message::Params::decode(any.value.as_slice()).map_err(|e| e.to_string())?;
    match params.json.trim() {
        "" => Ok(Json::Null),
        json => serde_json::from_str(json).map_err(|e| format!("json: {e}")),
    }
}

/// Asks `handler`, and writes down what it says.
async fn handle(
    handler: &Handler,
    template: &'static Template,
    request: message::Call,
    deadline: Instant,
) -> Result<Vec<u8>, RpcStatus> {
    let call = &Call { deadline };
    let invalid = |e: &dyn std::fmt::Display| RpcStatus::invalid_argument(e.to_string());
    let mut instances = Vec::with_capacity(request.instances.len());
    for bytes in &request.instances {
        instances.push(wire::instance(template, bytes).map_err(|e| invalid(&e))?);
    }
    if template.variety == Variety::Report {
        let mut batch = Vec::with_capacity(instances.len());
        for (name, fields) in instances {
            let instance = ReportInstance::new(template, name, fields);
            batch.push(instance.map_err(|e| invalid(&e))?);
        }
        let part = handler.report().ok_or_else(unable)?;
        part.report(batch, call).await.map_err(failed)?;
        return Ok(Vec::new());
    }
    let (name, fields) = instances
        .pop()
        .ok_or_else(|| RpcStatus::invalid_argument("the call has no instance"))?;
    match template.variety {
        Variety::Check => {
            let instance = CheckInstance::new(template, name, fields).map_err(|e| invalid(&e))?;
            let part = handler.check().ok_or_else(unable)?;
            let result = part.check(instance, call).await.map_err(failed)?;
            Ok(check_result(result).encode_to_vec())
        }
        Variety::CheckWithOutput => {
            let instance =
                CheckOutputInstance::new(template, name, fields).map_err(|e| invalid(&e))?;
            let part = handler.check_output().ok_or_else(unable)?;
            let (result, output) = part.check(instance, call).await.map_err(failed)?;
            let mut answer = Vec::new();
            wire::put_bytes(&mut answer, 1, &check_result(result).encode_to_vec());
            wire::put_bytes(&mut answer, 2, &wire::output(template, &output));
            Ok(answer)
        }
        Variety::AttributeGenerator => {
            let instance =
                GenerateInstance::new(template, name, fields).map_err(|e| invalid(&e))?;
            let part = handler.generate().ok_or_else(unable)?;
            let output = part.generate(instance, call).await.map_err(failed)?;
            Ok(wire::output(template, &output))
        }
        Variety::Quota => {
            let part = handler.quota().ok_or_else(unable)?;
            let wanted = request.quota_request.unwrap_or_default().quotas;
            let mut quotas = HashMap::new();
            for (quota, wanted) in wanted {
                let instance = QuotaInstance::new(template, Arc::clone(&name), fields.clone());
                let instance = instance.map_err(|e| invalid(&e))?;
                let args = QuotaArgs {
                    dedup_id: Arc::from(request.dedup_id.as_str()),
                    amount: wanted.amount,
                    best_effort: wanted.best_effort,
                };
                let result = part.quota(instance, &args, call).await.map_err(failed)?;
                let granted = message::Granted {
                    valid_duration: result.valid_duration.and_then(span),
                    granted_amount: result.granted,
                    status: Some(status(result.status)),
                };
                quotas.insert(quota, granted);
            }
            Ok(message::QuotaResult { quotas }.encode_to_vec())
        }
        Variety::Report => Ok(Vec::new()), // answered above
    }
}

fn unable() -> RpcStatus {
    RpcStatus::unimplemented("the handler does not do this")
}

fn failed(error: HandlerError) -> RpcStatus {
    RpcStatus::new((error.code as i32).into(), error.message)
}

fn check_result(result: CheckResult) -> message::CheckResult {
    message::CheckResult {
        status: Some(status(result.status)),
        valid_duration: result.valid_duration.and_then(span),
        valid_use_count: result.valid_use_count.unwrap_or(0),
    }
}

fn status(status: Status) -> message::Status {
    let direct = status.direct_response.map(|direct| {
        let response = message::DirectHttpResponse {
            code: i32::try_from(direct.code).unwrap_or(500),
            body: direct.body,
            headers: direct.headers.into_iter().collect(),
        };
        Any {
            type_url: "type.googleapis.com/istio.policy.v1beta1.DirectHttpResponse".to_owned(),
            value: response.encode_to_vec(),
        }
    });
    message::Status {
        code: status.code as i32,
        message: status.message,
        details: direct.into_iter().collect(),
    }
}

fn span(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}
