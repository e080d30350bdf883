//! Sends one request upstream: picks a host, waits for a connection, enforces timeouts, retries.
//!
//! Everything about a request hangs on the future of [`forward`] and, once there is a response, on its
//! body: dropping either resets the upstream stream and gives back what was counted.

mod hash;
mod hedge;
mod mirror;
mod replay;
mod response;
mod timeouts;

use std::{
    cell::{Cell, RefCell},
    future::{Future as _, poll_fn},
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use self::{
    replay::Replay,
    response::{Answer, finish},
    timeouts::Timeouts,
};
use crate::{
    body::{Body, BodyError},
    circuit::{Permit, Resource},
    cluster::{Caller, Host},
    head::{Known, Name, RequestHead, ResponseHead},
    info::{ConnectionInfo, ResponseFlags, StreamInfo},
    outlier::Outcome,
    reject::Reject,
    retry::{Reset, RetryState},
    route::{
        append_forwarded_host,
        policy::{ForwardPolicy, HostRewrite, Target},
    },
    shared::Shared,
    timer::Deadline,
    upstream::{
        ConnectError, LocalCluster, OnInformational, Pick, Refusal, Upgrade, WorkerClusters,
    },
};

/// A stream's facts, shared by the request's task and the wrappers around its bodies.
pub type SharedInfo = Rc<RefCell<StreamInfo>>;

/// Forwards one request. The head is as the filters left it, path and host rewritten; `x-envoy-*` headers
/// of clients that may not set them have been removed.
///
/// For an upgrade (`upgrade` header or CONNECT) that the upstream accepts, the response has its status
/// (101, or 2xx for CONNECT) and the bodies carry the tunnel's bytes.
///
/// Dropping the future, or the body it gave, resets the upstream stream.
///
/// # Errors
/// The local reply when there is no upstream response.
pub async fn forward(
    shared: &Arc<Shared>,
    policy: &ForwardPolicy,
    target: &Target,
    mut head: RequestHead,
    body: Body,
    info: &SharedInfo,
) -> Result<(ResponseHead, Body), Reject> {
    let hooks = Hooks {
        on_informational: &|_| {},
        follow: &mut |_, _, _| false,
    };
    forward_informed(shared, policy, target, &mut head, body, info, hooks).await
}

/// What is told of a request before its final response.
pub(crate) struct Hooks<'a> {
    /// Each `1xx` response.
    pub(crate) on_informational: OnInformational<'a>,
    /// A redirect that the route's policy looks at; the request, and its body if all of it has come and was
    /// kept. Says whether it is followed: then the response is of no more interest.
    pub(crate) follow: &'a mut dyn FnMut(&ResponseHead, &mut RequestHead, Option<Body>) -> bool,
}

/// As [`forward`], with the `hooks` told. The head is changed to what was sent upstream last. Of a response
/// that is followed the head alone is given.
///
/// # Errors
/// The local reply when there is no upstream response.
pub(crate) async fn forward_informed(
    shared: &Arc<Shared>,
    policy: &ForwardPolicy,
    target: &Target,
    head: &mut RequestHead,
    body: Body,
    info: &SharedInfo,
    hooks: Hooks<'_>,
) -> Result<(ResponseHead, Body), Reject> {
    let worker = WorkerClusters::of(&shared.clusters);
    let suppress = {
        let mut info = info.borrow_mut();
        let known = info.upstream_cluster.as_ref();
        if !known.is_some_and(|name| Arc::ptr_eq(name, &target.cluster)) {
            info.upstream_cluster = Some(target.cluster.clone());
        }
        info.suppress_envoy_headers
    };
    let Some(local) = worker.get(&target.cluster) else {
        return Err(Reject::no_cluster(policy.cluster_not_found));
    };
    let timeouts = Timeouts::of(policy, head, !suppress);
    let retry = RetryState::new(policy.retry.as_ref(), head);
    let hedged = timeouts.per_try.is_some() && hedge::wanted(policy, head) && retry.is_enabled();
    let caller = caller(head, &info.borrow());
    let kind = Upgrade::of(head);
    let upgrade = kind != Upgrade::None;
    let keep = !upgrade
        && (retry.is_enabled() || !policy.mirrors.is_empty() || policy.internal_redirect.is_some());
    let limit = policy
        .buffer_limit
        .unwrap_or(local.cluster.config.buffer_limit);
    let replay = Replay::new(body, keep.then_some(limit));
    let hashed = {
        let info = info.borrow();
        hash::of(
            &policy.hash,
            head,
            info.downstream_remote,
            info.connection.local,
        )
    };
    if !upgrade {
        mirror::start(shared, policy, head, &replay, timeouts.global);
    }
    let request = Request {
        worker,
        policy,
        target,
        info,
        timeouts,
        upgrade,
        connect: kind == Upgrade::Connect,
        suppress,
        caller,
        hash: hashed.hash,
        replay: CancelOnDrop(replay),
        current: RefCell::default(),
        hedged: RefCell::default(),
        left: upgrade.then(Rc::default),
        on_informational: hooks.on_informational,
    };
    let mut attempts = Attempts {
        local,
        retry,
        tried: Vec::new(),
        number: 0,
        after_timeout: false,
        flags: ResponseFlags::default(),
        permit: None,
    };
    let mut clock = Clock::new(timeouts.global);
    let result = {
        let mut run = pin!(async {
            if hedged && !request.upgrade {
                // Boxed, as it is rare.
                Box::pin(request.run_hedged(&mut attempts, head)).await
            } else {
                request.run(&mut attempts, head).await
            }
        });
        // The timer goes first: when both are ready, time is up. Dropping the attempts resets their stream.
        poll_fn(|cx| {
            if clock.poll(&request.replay.0, cx).is_ready() {
                return Poll::Ready(Err(request.timed_out()));
            }
            run.as_mut().poll(cx)
        })
        .await
    };
    match result {
        Ok(mut answer) => {
            let redirects = policy.internal_redirect.as_deref();
            if redirects.is_some_and(|redirects| redirects.handles(answer.head.status)) {
                let stats = &answer.local.cluster.stats;
                if (hooks.follow)(&answer.head, head, request.replay.0.entire()) {
                    stats.upstream_internal_redirect_succeeded_total.inc();
                    return Ok((answer.head, Body::empty()));
                }
                stats.upstream_internal_redirect_failed_total.inc();
            }
            if let Some(cookie) = hashed.set_cookie {
                answer.head.headers.append(Known::SetCookie, cookie);
            }
            let Attempts { flags, .. } = attempts;
            Ok(finish(request, flags, answer, clock))
        }
        Err(mut reject) => {
            let mut flags = attempts.flags;
            flags.set(reject.flags);
            reject.flags = flags;
            // A request that broke off says nothing of the cluster.
            let ours = [
                ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
                ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
            ];
            if !ours.iter().any(|flag| reject.flags.contains(*flag)) {
                let stats = &attempts.local.cluster.stats;
                stats.answered(reject.status, caller);
            }
            if policy.include_attempt_count_in_response && !suppress {
                let count = info.borrow().upstream_attempts;
                reject = reject.with_header(Known::XEnvoyAttemptCount, count.to_string());
            }
            Err(reject)
        }
    }
}

/// Counts the time of a request, or of an attempt, from the end of the request's body on.
struct Clock {
    limit: Option<Duration>,
    /// Not counted before this.
    not_before: Option<Instant>,
    deadline: Deadline,
    runs: bool,
}

impl Clock {
    fn new(limit: Option<Duration>) -> Clock {
        Clock {
            limit,
            not_before: None,
            deadline: Deadline::default(),
            runs: false,
        }
    }

    /// Ready when time is up; never without a limit.
    fn poll(&mut self, replay: &Replay, cx: &mut Context<'_>) -> Poll<()> {
        let Some(limit) = self.limit else {
            return Poll::Pending;
        };
        if !self.runs {
            let Poll::Ready(ended) = replay.poll_ended(cx) else {
                return Poll::Pending;
            };
            self.runs = true;
            let from = self.not_before.map_or(ended, |began| began.max(ended));
            self.deadline.set(from + limit);
        }
        self.deadline.poll(cx)
    }
}

/// One request, while it has no response.
struct Request<'a> {
    worker: Rc<WorkerClusters>,
    policy: &'a ForwardPolicy,
    target: &'a Target,
    info: &'a SharedInfo,
    timeouts: Timeouts,
    upgrade: bool,
    connect: bool,
    /// Add no `x-envoy-*` headers.
    suppress: bool,
    caller: Caller,
    hash: Option<u64>,
    replay: CancelOnDrop,
    /// Where the attempt under way went.
    current: RefCell<Option<Goal>>,
    /// Attempts that go on while another is under way, by number.
    hedged: RefCell<Vec<(u32, Goal)>>,
    /// For a tunnel: whether the downstream has ended its half.
    left: Option<Rc<Cell<bool>>>,
    on_informational: OnInformational<'a>,
}

/// Where an attempt goes.
type Goal = (Rc<LocalCluster>, Arc<Host>);

/// When the request is given up, so is its body.
struct CancelOnDrop(Replay);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// What the attempts of one request have in common.
struct Attempts<'a> {
    local: Rc<LocalCluster>,
    retry: RetryState<'a>,
    /// The hosts of earlier attempts.
    tried: Vec<Arc<Host>>,
    /// Of the present attempt, from 1.
    number: u32,
    /// The attempt before this one ran out of time.
    after_timeout: bool,
    flags: ResponseFlags,
    /// Counts this request among those being retried.
    permit: Option<Permit>,
}

/// What one attempt came to.
enum Ended {
    Answer(Answer),
    Reset {
        reset: Reset,
        /// Whether request bytes may have left.
        sent: bool,
        transport: Option<String>,
    },
    TimedOut,
    Final(Reject),
}

impl Request<'_> {
    fn timed_out(&self) -> Reject {
        for (_, (local, host)) in self.hedged.borrow().iter() {
            let stats = &local.cluster.stats;
            stats.upstream_rq_timeout.inc();
            stats.answered(504, self.caller);
            host.state.numbers.rq_timeout.fetch_add(1, Relaxed);
            local.cluster.report(host, Outcome::TimedOut);
        }
        if let Some((local, host)) = &*self.current.borrow() {
            let stats = &local.cluster.stats;
            stats.upstream_rq_timeout.inc();
            host.state.numbers.rq_timeout.fetch_add(1, Relaxed);
            local.cluster.report(host, Outcome::TimedOut);
        }
        Reject::upstream_timeout()
    }

    async fn run(
        &self,
        attempts: &mut Attempts<'_>,
        head: &mut RequestHead,
    ) -> Result<Answer, Reject> {
        loop {
            let outcome = match self.start(attempts, head) {
                Ok((local, host)) => {
                    let per_try = self.timeouts.per_try;
                    self.send(&local, &host, head, per_try).await
                }
                Err(reject) => Ended::Final(reject),
            };
            let again = match outcome {
                Ended::Final(reject) => return Err(reject),
                Ended::Answer(answer) => {
                    let status = answer.head.status;
                    let wanted = attempts.retry.wants_response(status, &answer.head.headers);
                    let told = match wanted {
                        true => attempts.retry.told(&answer.head.headers),
                        false => None,
                    };
                    match self.grant(attempts, wanted, told) {
                        Some(wait) => {
                            attempts.after_timeout = false;
                            attempts.local.cluster.stats.retried(status);
                            wait
                        }
                        None => return Ok(answer),
                    }
                }
                Ended::Reset {
                    reset,
                    sent,
                    transport,
                } => {
                    if let Some(error) = self.replay.0.failure() {
                        return Err(downstream_failed(&error));
                    }
                    let wanted = attempts.retry.wants_reset(reset, sent);
                    match self.grant(attempts, wanted, None) {
                        Some(wait) => {
                            attempts.after_timeout = false;
                            wait
                        }
                        None => {
                            return Err(refusal(self, reset, transport, attempts.number > 1));
                        }
                    }
                }
                Ended::TimedOut => {
                    let wanted = attempts.retry.wants_reset(Reset::Local, true);
                    match self.grant(attempts, wanted, None) {
                        Some(wait) => {
                            attempts.after_timeout = true;
                            wait
                        }
                        None => return Err(Reject::per_try_timeout()),
                    }
                }
            };
            sleep(again).await;
        }
    }

    /// Whether (and after which wait) the request is sent again; counts and flags why not. `told` is the wait that the
    /// answer asked for.
    fn grant(
        &self,
        attempts: &mut Attempts<'_>,
        wanted: bool,
        told: Option<Duration>,
    ) -> Option<Duration> {
        let cluster = &attempts.local.cluster;
        let stats = &cluster.stats;
        let retried_before = attempts.permit.take().is_some();
        if wanted && self.replay.0.passed_limit() {
            stats.retry_or_shadow_abandoned.inc();
        }
        if !wanted || self.upgrade || !self.replay.0.is_whole() {
            // There was a retry, and what it gave is not to be retried.
            if !wanted && retried_before {
                stats.upstream_rq_retry_success.inc();
            }
            return None;
        }
        let Some(wait) = attempts.retry.take_retry() else {
            stats.upstream_rq_retry_limit_exceeded.inc();
            attempts
                .flags
                .set(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
            return None;
        };
        let circuit = cluster.circuits.of(self.policy.high_priority);
        let Some(permit) = circuit.try_acquire(Resource::Retries) else {
            stats.upstream_rq_retry_overflow.inc();
            attempts.flags.set(ResponseFlags::UPSTREAM_OVERFLOW);
            return None;
        };
        attempts.permit = Some(permit);
        stats.upstream_rq_retry.inc();
        match told {
            Some(_) => stats.upstream_rq_retry_backoff_ratelimited.inc(),
            None => stats.upstream_rq_retry_backoff_exponential.inc(),
        }
        Some(told.unwrap_or(wait))
    }

    /// Picks a host for the next attempt, and makes the request one to it.
    fn start(&self, attempts: &mut Attempts<'_>, head: &mut RequestHead) -> Result<Goal, Reject> {
        // The cluster may have been replaced while an earlier attempt ran.
        if attempts.number > 0
            && let Some(present) = self.worker.get(&self.target.cluster)
        {
            attempts.local = present;
        }
        if let Some((_, host)) = self.current.take() {
            attempts.tried.push(host);
        }
        let local = attempts.local.clone();
        let Some(host) = self.pick(attempts, head) else {
            local.cluster.stats.upstream_cx_none_healthy.inc();
            self.info.borrow_mut().upstream_attempts = attempts.number + 1;
            return Err(self.no_host(&local));
        };
        attempts.number += 1;
        self.address_to(attempts, &host, head);
        *self.current.borrow_mut() = Some((local.clone(), host.clone()));
        Ok((local, host))
    }

    /// Sends the request to a host once.
    async fn send(
        &self,
        local: &Rc<LocalCluster>,
        host: &Arc<Host>,
        head: &RequestHead,
        per_try: Option<Duration>,
    ) -> Ended {
        let source = self.info.borrow().original_src;
        let pool = local.pool(host, head, self.policy.high_priority, source);
        let mut resent = false;
        loop {
            let acquired = match pool.try_acquire() {
                Some(acquired) => acquired,
                None => pool.acquire().await,
            };
            let lease = match acquired {
                Ok(lease) => lease,
                Err(refusal) => return self.refused(local, host, refusal),
            };
            if let Some(facts) = lease.facts() {
                let mut info = self.info.borrow_mut();
                info.upstream_local = facts.local;
                info.upstream_protocol = Some(lease.protocol());
                info.upstream_tls.clone_from(&facts.tls);
            }
            local.cluster.report(host, Outcome::Connected);
            let body = match &self.left {
                Some(left) => response::noting_end(self.replay.0.take_source(), left.clone()),
                None => self.replay.0.body(),
            };
            let mut clock = Clock::new(per_try);
            clock.not_before = clock.limit.map(|_| Instant::now());
            let sent = {
                let mut sending = pin!(lease.send(head, body, self.on_informational));
                // A head that arrived counts even if time ran out at the same moment.
                poll_fn(|cx| match sending.as_mut().poll(cx) {
                    Poll::Ready(sent) => Poll::Ready(Some(sent)),
                    Poll::Pending => clock.poll(&self.replay.0, cx).map(|()| None),
                })
                .await
            };
            let Some(sent) = sent else {
                return self.try_timed_out(local, host);
            };
            match sent {
                Ok((answer, body)) => {
                    let status = outcome_status(&answer);
                    let numbers = &host.state.numbers;
                    if status < 500 {
                        &numbers.rq_success
                    } else {
                        &numbers.rq_error
                    }
                    .fetch_add(1, Relaxed);
                    local.cluster.report(host, Outcome::Status(status));
                    return Ended::Answer(Answer {
                        head: answer,
                        body,
                        local: local.clone(),
                        host: host.clone(),
                    });
                }
                Err(failure) => {
                    // A connection that was closed while it lay idle says nothing about this request: it
                    // is sent once more, if that cannot do harm. RFC 9112 §9.3.1.
                    let harmless = !failure.sent
                        || (failure.reset == Reset::Termination && is_idempotent(head));
                    if failure.reused
                        && harmless
                        && !resent
                        && !self.upgrade
                        && self.replay.0.is_whole()
                    {
                        resent = true;
                        continue;
                    }
                    match failure.reset {
                        // As Envoy, which counts neither streams that were refused nor tunnels here.
                        Reset::Remote => local.cluster.stats.upstream_rq_rx_reset.inc(),
                        Reset::RemoteProtocol => local.cluster.stats.upstream_rq_tx_reset.inc(),
                        Reset::Protocol => local.cluster.stats.upstream_cx_protocol_error.inc(),
                        _ => {}
                    }
                    if failure.reset != Reset::Local {
                        host.state.numbers.rq_error.fetch_add(1, Relaxed);
                        local.cluster.report(host, Outcome::Failed);
                    }
                    return Ended::Reset {
                        reset: failure.reset,
                        sent: failure.sent,
                        transport: None,
                    };
                }
            }
        }
    }

    fn pick(&self, attempts: &Attempts<'_>, head: &RequestHead) -> Option<Arc<Host>> {
        let info = self.info.borrow();
        let retry = attempts
            .retry
            .policy()
            .filter(|_| !attempts.tried.is_empty());
        attempts.local.pick(&Pick {
            subset: self.target.subset.as_ref(),
            hash: self.hash,
            original: original_destination(&info.connection),
            headers: Some(&head.headers),
            authority: &head.authority,
            tried: &attempts.tried,
            other_hosts: retry.map_or(0, |retry| {
                if retry.avoid_previous_hosts {
                    retry.host_selection_attempts.max(1)
                } else {
                    0
                }
            }),
            other_priorities: retry
                .and_then(|retry| retry.avoid_previous_priorities)
                .is_some_and(|frequency| attempts.retry.retries() >= frequency),
            // A retry goes where the balancer says.
            wanted: (info.override_host.as_deref()).filter(|_| attempts.tried.is_empty()),
        })
    }

    /// The answer when there is no host to send the request to.
    fn no_host(&self, local: &LocalCluster) -> Reject {
        let mut reject = Reject::no_healthy_upstream();
        let info = self.info.borrow();
        let wanted = info.override_host.as_ref().filter(|wanted| wanted.strict);
        if let Some(wanted) = wanted
            && !local.knows(wanted.address)
        {
            reject.status = wanted.not_found;
        }
        reject
    }

    /// Writes into head and facts what depends on the host and the number of the attempt.
    fn address_to(&self, attempts: &Attempts<'_>, host: &Host, head: &mut RequestHead) {
        let number = attempts.number;
        let mut info = self.info.borrow_mut();
        info.upstream_attempts = number;
        info.meet(host);
        info.upstream_local = None;
        info.upstream_tls = None;
        if self.policy.include_attempt_count && !self.suppress {
            head.headers
                .set(Known::XEnvoyAttemptCount, number.to_string());
        }
        if self.policy.include_is_timeout_retry && number > 1 {
            let value = if attempts.after_timeout {
                "true"
            } else {
                "false"
            };
            head.headers
                .set(Name::new("x-envoy-is-timeout-retry"), value);
        }
        if let (HostRewrite::Auto, Some(name)) = (&self.policy.host_rewrite, &host.hostname)
            && head.authority != name.as_bytes()
        {
            if self.policy.append_x_forwarded_host {
                append_forwarded_host(&mut head.headers, &head.authority);
            }
            if !self.suppress {
                head.headers
                    .set(Name::new("x-envoy-original-host"), head.authority.clone());
            }
            head.authority = bytes::Bytes::copy_from_slice(name.as_bytes());
        }
    }

    fn refused(&self, local: &LocalCluster, host: &Arc<Host>, refusal: Refusal) -> Ended {
        let (reset, transport) = match refusal {
            Refusal::Overflow => (Reset::Overflow, None),
            Refusal::Connect(error) => {
                let outcome = match error {
                    ConnectError::Timeout => Outcome::TimedOut,
                    ConnectError::Refused(_) | ConnectError::Tls(_) => Outcome::Failed,
                };
                local.cluster.report(host, outcome);
                host.state.numbers.rq_error.fetch_add(1, Relaxed);
                match error {
                    ConnectError::Timeout => (Reset::ConnectTimeout, None),
                    other => (Reset::ConnectFailure, Some(other.to_string())),
                }
            }
        };
        Ended::Reset {
            reset,
            sent: false,
            transport,
        }
    }

    fn try_timed_out(&self, local: &LocalCluster, host: &Arc<Host>) -> Ended {
        let stats = &local.cluster.stats;
        stats.upstream_rq_per_try_timeout.inc();
        host.state.numbers.rq_timeout.fetch_add(1, Relaxed);
        local.cluster.report(host, Outcome::TimedOut);
        Ended::TimedOut
    }
}

/// Where the connection was going, if that is not to us.
pub(crate) fn original_destination(connection: &ConnectionInfo) -> Option<SocketAddr> {
    connection.local_restored.then_some(connection.local)
}

fn caller(head: &RequestHead, info: &StreamInfo) -> Caller {
    if info.health_check {
        Caller::HealthChecker
    } else if head.headers.known(Known::XEnvoyInternal).is_some() {
        Caller::Internal
    } else {
        Caller::External
    }
}

/// RFC 9110 §9.2.2.
fn is_idempotent(head: &RequestHead) -> bool {
    matches!(
        &*head.method,
        b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
    )
}

/// The status outlier detection goes by: that of gRPC if the response is nothing else.
fn outcome_status(head: &ResponseHead) -> u16 {
    let status = head
        .headers
        .known(Known::GrpcStatus)
        .and_then(crate::retry::number::<i32>);
    match status {
        None => head.status,
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        Some(_) => 500,
    }
}

/// The local reply for a reset, and why noted.
fn refusal(
    request: &Request<'_>,
    reset: Reset,
    transport: Option<String>,
    retried: bool,
) -> Reject {
    let mut refusal = reject(reset, retried);
    if let Some(reason) = &transport {
        refusal.details = format!(
            "upstream_reset_before_response_started{{remote_connection_failure|{}}}",
            reason.replace(' ', "_")
        )
        .into();
    }
    request.info.borrow_mut().upstream_transport_failure = transport;
    refusal
}

/// The local reply for a reset before the response, in Envoy's words. Why a connection could not be made
/// is for the access log only: it may name what a client should not know.
fn reject(reset: Reset, retried: bool) -> Reject {
    let (status, reason, flags, details) = match reset {
        Reset::Overflow => return Reject::overflow(),
        Reset::ConnectTimeout => (
            503,
            "connection timeout",
            ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            "upstream_reset_before_response_started{connection_timeout}",
        ),
        Reset::ConnectFailure => (
            503,
            "remote connection failure",
            ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            "upstream_reset_before_response_started{remote_connection_failure}",
        ),
        Reset::Termination => (
            503,
            "connection termination",
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "upstream_reset_before_response_started{connection_termination}",
        ),
        Reset::Remote => (
            503,
            "remote reset",
            ResponseFlags::UPSTREAM_REMOTE_RESET,
            "upstream_reset_before_response_started{remote_reset}",
        ),
        Reset::Refused => (
            503,
            "remote refused stream reset",
            ResponseFlags::UPSTREAM_REMOTE_RESET,
            "upstream_reset_before_response_started{remote_refused_stream_reset}",
        ),
        Reset::RemoteConnect => (
            503,
            "remote error with CONNECT request",
            ResponseFlags::UPSTREAM_REMOTE_RESET,
            "upstream_reset_before_response_started{remote_error_with_CONNECT_request}",
        ),
        Reset::RemoteProtocol | Reset::Protocol => (
            502,
            "protocol error",
            ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
            "upstream_reset_before_response_started{protocol_error}",
        ),
        Reset::Local => (
            503,
            "local reset",
            ResponseFlags::LOCAL_RESET,
            "upstream_reset_before_response_started{local_reset}",
        ),
    };
    let mut body = "upstream connect error or disconnect/reset before headers. ".to_owned();
    if retried {
        body.push_str("retried and the latest ");
    }
    body.push_str("reset reason: ");
    body.push_str(reason);
    Reject::new(status, body, flags, details)
}

/// The downstream's body broke before there was a response; mostly nobody is left to read this.
fn downstream_failed(error: &BodyError) -> Reject {
    match error {
        BodyError::Refused(reject) => Reject::clone(reject),
        BodyError::TooLarge => Reject::new(
            413,
            "Payload Too Large",
            ResponseFlags::default(),
            "request_payload_too_large",
        ),
        BodyError::Timeout => Reject::new(
            408,
            "request timeout",
            ResponseFlags::default(),
            "request_overall_timeout",
        ),
        BodyError::Protocol(_) => Reject::new(
            400,
            "Bad Request",
            ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
            "downstream_protocol_error",
        ),
        BodyError::Disconnected | BodyError::Reset(_) => Reject::new(
            400,
            "",
            ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
            "downstream_remote_disconnect",
        ),
    }
}

#[cfg(test)]
mod tests;
