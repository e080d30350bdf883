//! Adapters that are processes of their own, called over gRPC in Istio's out-of-process protocol: for each
//! template a service `Handle…`, and `InfrastructureBackend` for those that keep sessions.
//!
//! A call: the circuit ([`breaker`]) → the session ([`session`]) and the token ([`credentials`]) → the connection
//! ([`channel`]) → one attempt, or two when the first never arrived and the budget allows → the answer ([`wire`]).
//! It takes at most what the handler's connection or the caller allows. What goes wrong is an error of that call,
//! and the rule's fail mode says what that means. Reports are queued and sent in batches ([`report`]).
//!
//! Servers that compiled adapters ask over HTTP/1.1 ([`http1`]) are reached with the same credentials.
//!
//! reference: istio.io/api `mixer/adapter/model/v1beta1`.

mod breaker;
mod channel;
mod credentials;
pub(crate) mod http1;
mod oauth;
mod report;
mod session;
mod tls;
pub(crate) mod wire;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::uri::PathAndQuery;
use lateen_adapter::{
    Call, CheckResult, Counter, Env, HandlerError, QuotaArgs, QuotaResult, codec::Raw,
};
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::{Code as RpcCode, Request, Status as RpcStatus};

use self::{
    breaker::{Breaker, Open, RetryBudget},
    channel::Link,
    credentials::Credentials,
    report::Reports,
    session::{InUse, Session},
};
use crate::{
    config::{
        object::Source,
        remote::{
            RemoteTemplate,
            handler::{Connection, RemoteHandler},
            instance::RemoteInstance,
            types::inferred_type,
        },
    },
    instance::{Encoded, Found},
};

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// What a handler of an adapter process is made of.
#[derive(Clone, Debug)]
pub struct Signature {
    /// `NAME.adapter.NAMESPACE`.
    pub adapter: Arc<str>,
    /// The adapter as written.
    pub source: Source,
    params: prost_types::Any,
    connection: Connection,
    /// For an adapter with sessions: the types of the instances it gets, by name.
    session: Option<BTreeMap<String, prost_types::Any>>,
}

impl PartialEq for Signature {
    fn eq(&self, other: &Self) -> bool {
        // What else the adapter says of itself makes no difference to who is called with what.
        self.adapter == other.adapter
            && self.params == other.params
            && self.connection == other.connection
            && self.session == other.session
    }
}

impl Signature {
    /// Of `handler`, which gets `instances`.
    pub fn of<'a>(
        handler: &RemoteHandler,
        instances: impl Iterator<Item = &'a RemoteInstance>,
    ) -> Self {
        let session = handler.adapter.session_based.then(|| {
            instances
                .map(|instance| (instance.name.to_string(), inferred_type(instance)))
                .collect()
        });
        Self {
            adapter: Arc::clone(&handler.adapter.name),
            source: handler.adapter.source.clone(),
            params: handler.params.clone(),
            connection: handler.connection.clone(),
            session,
        }
    }
}

/// A handler whose adapter is a process.
pub struct Process {
    caller: Arc<Caller>,
    reports: Reports,
    _session: Option<InUse>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("address", &self.caller.address)
            .finish_non_exhaustive()
    }
}

impl Process {
    /// Makes ready to call. The process need not run yet.
    ///
    /// # Errors
    /// A file of the connection cannot be used.
    pub fn build(name: &Arc<str>, signature: &Signature, env: Env) -> Result<Self, String> {
        let connection = &signature.connection;
        let (credentials, tls) =
            Credentials::load(&connection.address, &connection.authentication, b"h2")?;
        let link = Arc::new(Link::new(&connection.address, tls)?);
        let credentials = Arc::new(credentials);
        credentials.watch(&link, &env)?;
        let config = signature.params.encode_to_vec();
        let has_params = !signature.params.type_url.is_empty();
        let caller = Arc::new(Caller {
            handler: Arc::clone(name),
            address: Arc::from(connection.address.as_str()),
            timeout: connection.timeout,
            config: (signature.session.is_none() && has_params).then(|| config.into()),
            link,
            credentials,
            session: signature.session.as_ref().map(|_| Session::default()),
            breaker: Breaker::new(env.clock().clone(), env.counter("circuit_opened")),
            budget: RetryBudget::new(),
            retries: env.counter("calls_retried"),
            dedup_id: AtomicU64::new(rand::random()),
        });
        let mut session = None;
        if let Some(types) = &signature.session {
            let params = has_params.then(|| signature.params.clone());
            session = Some(session::keep(&caller, params, types.clone(), &env)?);
        }
        let reports = Reports::start(&caller, session.clone(), &env)?;
        Ok(Self {
            caller,
            reports,
            _session: session,
        })
    }

    /// Asks for a verdict, and for what was found out.
    ///
    /// # Errors
    /// The process does not answer, or its answer makes no sense.
    pub async fn check(
        &self,
        instance: Encoded,
        call: &Call,
    ) -> Result<(CheckResult, Found), HandlerError> {
        let template = &instance.instance.template;
        let request = self
            .caller
            .request(template, std::slice::from_ref(&instance.message));
        let answer = self.caller.ask(template, request, call.deadline).await?;
        wire::checked(template, answer)
    }

    /// Asks for attributes.
    ///
    /// # Errors
    /// The process does not answer, or its answer makes no sense.
    pub async fn generate(&self, instance: Encoded, call: &Call) -> Result<Found, HandlerError> {
        let template = &instance.instance.template;
        let request = self
            .caller
            .request(template, std::slice::from_ref(&instance.message));
        let answer = self.caller.ask(template, request, call.deadline).await?;
        wire::generated(template, answer)
    }

    /// Asks for an amount.
    ///
    /// # Errors
    /// The process does not answer, or its answer makes no sense.
    pub async fn quota(
        &self,
        instance: Encoded,
        args: &QuotaArgs,
        call: &Call,
    ) -> Result<QuotaResult, HandlerError> {
        let (template, name) = (&instance.instance.template, &instance.instance.name);
        let own;
        let dedup_id = match &*args.dedup_id {
            "" => {
                own = self.caller.next_id();
                own.as_str()
            }
            id => id,
        };
        let request = wire::request(
            template,
            std::slice::from_ref(&instance.message),
            self.caller.config.as_deref(),
            dedup_id,
            Some((name, args)),
        );
        let answer = self.caller.ask(template, request, call.deadline).await?;
        wire::granted(name, answer)
    }

    /// Queues a batch.
    ///
    /// # Errors
    /// The queue is full: what found no place is dropped and counted.
    pub fn report(&self, batch: Vec<Encoded>) -> Result<(), HandlerError> {
        self.reports.push(batch)
    }
}

/// Makes calls.
struct Caller {
    handler: Arc<str>,
    address: Arc<str>,
    timeout: Option<Duration>,
    /// The parameters, if they go with each call.
    config: Option<Bytes>,
    link: Arc<Link>,
    credentials: Arc<Credentials>,
    session: Option<Session>,
    breaker: Breaker,
    budget: RetryBudget,
    retries: Counter,
    dedup_id: AtomicU64,
}

/// A call has no answer.
#[derive(Debug)]
enum Failure {
    /// It was not made: the adapter has failed too often.
    Open(Open),
    /// It was not made: there is no session, or no token.
    NotReady(String),
    /// There was no answer in time.
    Late(Duration),
    /// The process says that it failed, or nothing at all.
    Refused(RpcStatus),
}

impl Failure {
    /// Whether the adapter is out of order, and not this one call.
    fn is_outage(&self) -> bool {
        match self {
            Self::Open(_) | Self::NotReady(_) => false,
            Self::Late(_) => true,
            Self::Refused(status) => matches!(
                status.code(),
                RpcCode::Unavailable
                    | RpcCode::DeadlineExceeded
                    | RpcCode::Internal
                    | RpcCode::Unknown
                    | RpcCode::DataLoss
                    | RpcCode::Cancelled
            ),
        }
    }

    /// Whether a call that nobody waits for may be made again.
    fn may_come_again(&self) -> bool {
        matches!(self, Self::Open(_) | Self::NotReady(_)) || self.may_pass()
    }

    /// Whether the same call may find another answer at once.
    fn may_pass(&self) -> bool {
        matches!(self, Self::Refused(status) if is_unheard(status))
    }
}

/// Whether a call had no answer of the process: that was not there, or the connection broke, as when it restarts.
/// It may have been heard then; the call's id tells that it is the same when it is made again.
fn is_unheard(status: &RpcStatus) -> bool {
    let is_ours = std::error::Error::source(status).is_some();
    match status.code() {
        RpcCode::Unavailable => true,
        RpcCode::Unknown | RpcCode::Internal => is_ours,
        _ => false,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(open) => write!(
                f,
                "it has failed {} times in a row and is not called again for {:.1} s",
                open.failures,
                open.left.as_secs_f64()
            ),
            Self::NotReady(reason) => f.write_str(reason),
            Self::Late(limit) => write!(f, "no answer within {limit:?}"),
            Self::Refused(status) => {
                let mut told = format!("{:?}: {}", status.code(), status.message());
                let mut cause = std::error::Error::source(status);
                while let Some(error) = cause {
                    let text = error.to_string();
                    // tonic says some causes again and again.
                    if !told.contains(&text) {
                        told.push_str(": ");
                        told.push_str(&text);
                    }
                    cause = error.source();
                }
                f.write_str(&told)
            }
        }
    }
}

impl Caller {
    /// An id for all attempts of a call.
    fn next_id(&self) -> String {
        self.dedup_id.fetch_add(1, Ordering::Relaxed).to_string()
    }

    fn request(&self, template: &RemoteTemplate, instances: &[Bytes]) -> Bytes {
        let config = self.config.as_deref();
        wire::request(template, instances, config, &self.next_id(), None)
    }

    async fn ask(
        &self,
        template: &RemoteTemplate,
        request: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, HandlerError> {
        self.call(template, request, deadline)
            .await
            .map_err(|failure| {
                HandlerError::unavailable(format!("the adapter at {}: {failure}", self.address))
            })
    }

    /// Calls a template's method. A call that did not arrive is made once more, with the same id, if the budget
    /// allows; and so is one of a session that the process has lost.
    async fn call(
        &self,
        template: &RemoteTemplate,
        request: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        let begun = Instant::now();
        let deadline = match self.timeout {
            Some(timeout) => deadline.min(begun + timeout),
            None => deadline,
        };
        self.budget.earn();
        let mut is_first = true;
        loop {
            let session = match &self.session {
                None => None,
                Some(session) => Some(session.id(deadline).await.map_err(Failure::NotReady)?),
            };
            let permit = self.breaker.admit().map_err(Failure::Open)?;
            let attempt = self.attempt(template, &request, session.as_deref(), deadline);
            let answer = match timeout_at(deadline, attempt).await {
                // tonic's own timer may be the first to notice.
                Ok(Err(Failure::Refused(status)))
                    if status.code() == RpcCode::Cancelled && Instant::now() >= deadline =>
                {
                    Err(Failure::Late(deadline.duration_since(begun)))
                }
                Ok(answer) => answer,
                Err(_) => Err(Failure::Late(deadline.duration_since(begun))),
            };
            let failure = match answer {
                Ok(answer) => {
                    permit.answered();
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            if failure.is_outage() {
                permit.failed();
            } else if let Failure::Refused(_) = failure {
                permit.answered();
            }
            if let (Failure::Refused(status), Some(session), Some(id)) =
                (&failure, &self.session, &session)
                && session::is_lost(status)
            {
                session.lose(id);
            } else if let Failure::Refused(status) = &failure
                && status.code() == RpcCode::Unauthenticated
            {
                self.credentials.refuse();
                return Err(failure);
            } else if !failure.may_pass() {
                return Err(failure);
            }
            if !is_first || Instant::now() >= deadline || !self.budget.take() {
                return Err(failure);
            }
            is_first = false;
            self.retries.inc();
        }
    }

    async fn attempt(
        &self,
        template: &RemoteTemplate,
        request: &Bytes,
        session: Option<&str>,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        let message = match session {
            None => request.clone(),
            Some(id) => wire::with_session(template, request, id),
        };
        let mut request = Request::new(message);
        // For adapters that would rather not look into the message; not every id can be a header's value.
        if let Some(Ok(id)) = session.map(str::parse) {
            request.metadata_mut().insert(session::METADATA, id);
        }
        self.credentials
            .sign(&mut request, deadline)
            .await
            .map_err(Failure::NotReady)?;
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let path = template.path.clone();
        self.unary(request, path).await.map_err(Failure::Refused)
    }

    async fn unary(&self, request: Request<Bytes>, path: PathAndQuery) -> Result<Bytes, RpcStatus> {
        let mut grpc = tonic::client::Grpc::new(self.link.channel())
            .max_decoding_message_size(MAX_ANSWER_BYTES);
        grpc.ready()
            .await
            .map_err(|error| RpcStatus::from_error(Box::new(error)))?;
        let answer = grpc.unary(request, path, Raw).await?;
        Ok(answer.into_inner())
    }

    /// Longest time for calls that nobody waits for.
    fn patience(&self) -> Duration {
        self.timeout.unwrap_or(PATIENCE)
    }
}

/// For calls that nobody waits for, when the connection says nothing.
const PATIENCE: Duration = Duration::from_secs(5);
