//! Sessions: an adapter that keeps them gets its parameters and the types of its instances once, and an id with
//! each call: in the place of the parameters, and in the metadata [`METADATA`].
//!
//! A session is opened when the handler is built, and again when the process says that it does not know it
//! (NOT_FOUND) or may have restarted (no answer). It is closed after the last call.
//!
//! reference: istio.io/api `mixer/adapter/model/v1beta1/infrastructure_backend.proto`.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use http::uri::PathAndQuery;
use lateen_adapter::Env;
use lateen_protocols::istio::mixer::adapter::model::v1beta1 as model;
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout_at},
};
use tonic::{Code as RpcCode, Request, Status as RpcStatus};

use super::{Caller, is_unheard, wire};
use crate::adapter::export::GRACE;

/// The key of the metadata that has the session's id.
pub(super) const METADATA: &str = "session_id";
/// After a failure the next attempt comes, at first soon, then more seldom.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The session of a handler.
pub(super) struct Session {
    state: watch::Sender<State>,
}

#[derive(Clone, Debug)]
enum State {
    Opening,
    Open(Arc<str>),
    Failed(Arc<str>),
}

impl Default for Session {
    fn default() -> Self {
        let (state, _) = watch::channel(State::Opening);
        Self { state }
    }
}

/// Held by all who may call: when the last is gone, the session is closed.
pub(super) type InUse = mpsc::Sender<Infallible>;

impl Session {
    /// The session's id. While it is being opened this waits; while it cannot be opened it does not.
    pub(super) async fn id(&self, deadline: Instant) -> Result<Arc<str>, String> {
        let mut states = self.state.subscribe();
        let settled = states.wait_for(|state| !matches!(state, State::Opening));
        match timeout_at(deadline, settled).await {
            Ok(Ok(state)) => match &*state {
                State::Open(id) => Ok(Arc::clone(id)),
                State::Failed(reason) => Err(reason.to_string()),
                State::Opening => Err("there is no session".to_owned()),
            },
            Ok(Err(_)) => Err("the session is closed".to_owned()),
            Err(_late) => Err("there is no session yet".to_owned()),
        }
    }

    /// Session `id` is of no more use; another is opened.
    pub(super) fn lose(&self, id: &str) {
        self.state.send_if_modified(|state| {
            let is_open = matches!(state, State::Open(open) if **open == *id);
            if is_open {
                *state = State::Opening;
            }
            is_open
        });
    }
}

/// Whether the process may not know the session that a call named.
pub(super) fn is_lost(status: &RpcStatus) -> bool {
    status.code() == RpcCode::NotFound || is_unheard(status)
}

/// Opens the session of `caller`, keeps it open, and closes it when nobody holds what this returns any more.
pub(super) fn keep(
    caller: &Arc<Caller>,
    params: Option<prost_types::Any>,
    types: BTreeMap<String, prost_types::Any>,
    env: &Env,
) -> Result<InUse, String> {
    let (in_use, mut users) = mpsc::channel(1);
    let caller = Arc::clone(caller);
    let opened = env.counter("sessions_opened");
    let task = async move {
        let Some(session) = &caller.session else {
            return;
        };
        let mut states = session.state.subscribe();
        let request = model::CreateSessionRequest {
            adapter_config: params,
            inferred_types: types.into_iter().collect(),
        };
        let mut last: Option<Arc<str>> = None;
        let mut pause = RETRY.0;
        loop {
            // Whatever is dropped here was for calls that will not come.
            let attempt = tokio::select! {
                biased;
                _ = users.recv() => break,
                attempt = open(&caller, &request) => attempt,
            };
            match attempt {
                Ok(id) => {
                    opened.inc();
                    tracing::info!(handler = %caller.handler, session = %id, "session opened");
                    session.state.send_replace(State::Open(Arc::clone(&id)));
                    let before = last.replace(Arc::clone(&id));
                    if let Some(before) = before.filter(|before| *before != id) {
                        close(&caller, &before).await;
                    }
                    let opened_at = Instant::now();
                    let lost = states.wait_for(|state| !matches!(state, State::Open(_)));
                    tokio::select! {
                        biased;
                        _ = users.recv() => break,
                        _ = lost => {}
                    }
                    tracing::info!(handler = %caller.handler, "the session is lost; another is opened");
                    if opened_at.elapsed() > RETRY.1 {
                        pause = RETRY.0;
                    }
                    // A process that forgets each session at once is not asked without end.
                    tokio::select! {
                        biased;
                        _ = users.recv() => break,
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(RETRY.1);
                }
                Err(reason) => {
                    tracing::warn!(handler = %caller.handler, reason, ?pause, "there is no session");
                    session.state.send_replace(State::Failed(reason.into()));
                    tokio::select! {
                        biased;
                        _ = users.recv() => break,
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
        if let Some(id) = last {
            close(&caller, &id).await;
        }
    };
    // Reports are sent for as long, and closing takes a call more.
    env.spawn_draining(GRACE * 2, task)
        .map_err(|error| error.to_string())?;
    Ok(in_use)
}

async fn open(caller: &Caller, request: &model::CreateSessionRequest) -> Result<Arc<str>, String> {
    let validate = model::ValidateRequest {
        adapter_config: request.adapter_config.clone(),
        inferred_types: request.inferred_types.clone(),
    };
    match call::<_, model::ValidateResponse>(caller, "Validate", &validate).await {
        Ok(answer) => agrees(answer.status, "refuses the handler's parameters")?,
        Err(status) if status.code() == RpcCode::Unimplemented => {}
        Err(status) => return Err(failed("Validate", &status)),
    }
    let answer: model::CreateSessionResponse = call(caller, "CreateSession", request)
        .await
        .map_err(|status| failed("CreateSession", &status))?;
    agrees(answer.status, "opens no session")?;
    match answer.session_id.as_str() {
        "" => Err("the adapter opens a session without id".to_owned()),
        id => Ok(Arc::from(id)),
    }
}

fn failed(method: &str, status: &RpcStatus) -> String {
    format!("{method}: {:?}: {}", status.code(), status.message())
}

fn agrees(status: Option<lateen_protocols::google::rpc::Status>, what: &str) -> Result<(), String> {
    let status = wire::status(status).map_err(|error| error.to_string())?;
    if status.is_ok() {
        Ok(())
    } else {
        Err(format!(
            "the adapter {what}: {}: {}",
            status.code, status.message
        ))
    }
}

async fn close(caller: &Caller, id: &str) {
    let request = model::CloseSessionRequest {
        session_id: id.to_owned(),
    };
    match call::<_, model::CloseSessionResponse>(caller, "CloseSession", &request).await {
        Ok(_) => tracing::debug!(handler = %caller.handler, session = id, "session closed"),
        // The process may be gone, and the session with it.
        Err(error) => {
            tracing::info!(handler = %caller.handler, session = id, %error, "a session is not closed");
        }
    }
}

/// Calls `InfrastructureBackend`.
async fn call<Q: Message, A: Message + Default>(
    caller: &Caller,
    method: &str,
    message: &Q,
) -> Result<A, RpcStatus> {
    let deadline = Instant::now() + caller.patience();
    let path = format!("/istio.mixer.adapter.model.v1beta1.InfrastructureBackend/{method}");
    let path: PathAndQuery = path
        .parse()
        .map_err(|_| RpcStatus::internal("the method's name is no path"))?;
    let mut request = Request::new(message.encode_to_vec().into());
    caller
        .credentials
        .sign(&mut request, deadline)
        .await
        .map_err(RpcStatus::unavailable)?;
    request.set_timeout(caller.patience());
    let answer = timeout_at(deadline, caller.unary(request, path))
        .await
        .map_err(|_| RpcStatus::deadline_exceeded("no answer in time"))??;
    A::decode(answer).map_err(|error| RpcStatus::internal(error.to_string()))
}
