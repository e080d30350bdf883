//! One request and its response, whichever HTTP brought it: filters, route, router, and the head of the
//! response. What the codec does with it is for `h1` and `h2`.

use std::{
    cell::{Cell, RefCell},
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;

use super::{
    ConnectionManager, connect,
    limits::{Expired, StreamLimits},
    record::Record,
    redirect::Judge,
};
use crate::{
    body::Body,
    clock,
    filter::{FilterContext, ResponseContext},
    format::{Facts, grpc_status},
    head::{Headers, Known, KnownSet, RequestHead, ResponseHead},
    info::ResponseFlags,
    reject::Reject,
    route::{Action, RouteTable, Selected, Unmatched},
    router::{self, Hooks, SharedInfo},
    timer::Deadline,
};

/// What comes with the head of a request.
pub(super) struct Request {
    pub(super) body: Body,
    /// What the stream is to become: `websocket`, …, or `connect`.
    pub(super) upgrade: Option<Box<str>>,
    /// Whether there is an authority, be it an empty one.
    pub(super) host_given: bool,
}

/// A response that is ready to be sent; its head is the record's.
pub(super) struct Outgoing {
    pub(super) record: Box<Record>,
    pub(super) body: Body,
    /// The stream is a tunnel from here on.
    pub(super) tunnel: bool,
    /// It answers a request that made no sense.
    pub(super) senseless: bool,
    /// It is our own answer to the head alone.
    pub(super) hasty: bool,
}

/// Why a request needs no answer of filters or upstream any more.
pub(super) enum Broken {
    /// The downstream left; how, in Envoy's words.
    Left(&'static str),
    /// The downstream broke the protocol, and is beyond answering.
    Violated(&'static str),
    /// A limit in time ran out.
    Expired(Expired),
    /// The downstream broke the protocol; what it is told.
    Malformed(Reject),
}

/// The connection a stream is part of, while its response is awaited.
pub(super) trait Downstream {
    /// What has become known of the downstream already.
    fn broken(&mut self) -> Option<Broken>;

    /// Sends a 1xx response, unless such are not passed on.
    fn inform(&mut self, head: ResponseHead);

    /// Sends what is to be sent meanwhile (1xx responses above all), and is ready when there is nobody left
    /// to answer.
    fn poll_meanwhile(&mut self, early: &Early, cx: &mut Context<'_>) -> Poll<Broken>;
}

/// What the upstream says before its response.
#[derive(Default)]
pub(super) struct Early {
    next: RefCell<Option<ResponseHead>>,
    /// As Envoy, only the first is passed on.
    any: Cell<bool>,
}

impl Early {
    fn put(&self, head: ResponseHead) {
        if !self.any.replace(true) {
            *self.next.borrow_mut() = Some(head);
        }
    }

    /// A 1xx response that is to be passed on.
    pub(super) fn take(&self) -> Option<ResponseHead> {
        if self.any.get() {
            self.next.borrow_mut().take()
        } else {
            None
        }
    }
}

/// Serves the request in `record` up to the head of its response. `None` when the downstream left;
/// dropping the future means the same.
pub(super) async fn serve(
    mut record: Box<Record>,
    request: Request,
    downstream: &mut impl Downstream,
    deadline: &mut Deadline,
) -> Option<Outgoing> {
    let early = Early::default();
    let limits = record.limits.clone();
    let connect = request.upgrade.as_deref() == Some("connect");
    let upgrade = request.upgrade.is_some();
    let mut at_once = true;
    let outcome = {
        let mut respond = pin!(respond(&mut record, request, &early));
        // Dropping `respond` is how a request is given up.
        std::future::poll_fn(|cx| {
            let polled = respond.as_mut().poll(cx);
            if let Some(broken) = downstream.broken() {
                return Poll::Ready(Err(broken));
            }
            if let Poll::Ready(outcome) = polled {
                return Poll::Ready(Ok(outcome));
            }
            at_once = false;
            if let Poll::Ready(expired) = limits.poll(deadline, cx) {
                return Poll::Ready(Err(Broken::Expired(expired)));
            }
            downstream.poll_meanwhile(&early, cx).map(Err)
        })
        .await
    };
    if let Some(head) = early.take() {
        // It came together with the response.
        downstream.inform(head);
    }
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(Broken::Expired(expired)) => {
            expired.count(&record.cx.manager.stats);
            Err(expired.reject(&limits))
        }
        Err(Broken::Left(details)) => {
            record.left = details;
            return None;
        }
        Err(Broken::Violated(details)) => {
            record.violated(details);
            return None;
        }
        Err(Broken::Malformed(reject)) => Err(reject),
    };
    let hasty = at_once && outcome.is_err();
    let mut outgoing = finish(record, outcome);
    outgoing.hasty = hasty;
    let status = outgoing.status();
    outgoing.tunnel = upgrade
        && (status == 101 || connect && (200..300).contains(&status))
        && !outgoing.senseless;
    Some(outgoing)
}

/// The answer to what is not even a request.
pub(super) fn refuse(record: Box<Record>, reject: Reject) -> Outgoing {
    finish(record, Err(reject))
}

/// Decides what is answered, at the end of all redirects that are followed here.
async fn respond(
    record: &mut Record,
    request: Request,
    early: &Early,
) -> Result<(ResponseHead, Body), Reject> {
    let mut body = match respond_once(record, request, None, early).await? {
        Answered::Response(head, body) => return Ok((head, body)),
        Answered::Redirected(body, internal) => (body, internal),
    };
    loop {
        let request = Request {
            body: body.0,
            upgrade: None,
            host_given: true,
        };
        // Boxed, as it is rare.
        let again = Box::pin(respond_once(record, request, Some(body.1), early));
        body = match again.await? {
            Answered::Response(head, body) => return Ok((head, body)),
            Answered::Redirected(body, internal) => (body, internal),
        };
    }
}

enum Answered {
    Response(ResponseHead, Body),
    /// The request is another one now, with this body; and whether it came from inside the mesh.
    Redirected(Body, bool),
}

/// Decides what is answered: a filter, the route, or the upstream. `redirected` is whether the request came
/// from inside the mesh, if it is a redirect that is followed: it is not received, but made anew.
async fn respond_once(
    record: &mut Record,
    request: Request,
    redirected: Option<bool>,
    early: &Early,
) -> Result<Answered, Reject> {
    let Request {
        mut body,
        upgrade,
        host_given,
    } = request;
    let cx = record.cx.clone();
    let manager = &cx.manager;
    let head = record.request.as_mut().ok_or_else(Reject::no_route)?;
    record.grpc = head.is_grpc();
    let internal = match redirected {
        Some(internal) => internal,
        None => {
            let origin = manager.prepare_request(head, host_given, &cx)?;
            record.info.borrow_mut().downstream_remote = origin.remote;
            origin.internal
        }
    };
    let Some(table) = manager.table() else {
        manager.stats.no_route.inc();
        return Err(Reject::no_route());
    };
    let selected = table.select(head, cx.info.tls.as_deref(), internal);
    if let Some(tracer) = &manager.tracer {
        record.trace = Some(tracer.start(head, selected.as_ref().ok()));
    }
    let selected = match selected {
        Ok(selected) => selected,
        Err(unmatched) => {
            manager.stats.router_rq_total.inc();
            return Err(no_route(manager, unmatched, head));
        }
    };
    if !internal {
        for name in selected.internal_only() {
            head.headers.remove(name);
        }
    }
    record.enter(selected);
    if let (Some(name), Some(selected)) = (&upgrade, &record.route) {
        allow_upgrade(manager, selected, name)?;
        manager.stats.cx_upgrades_total.inc();
    }
    if !manager.filters.is_empty() {
        run_filters(record, manager, &table, internal, &mut body).await?;
        if let (Some(name), Some(selected)) = (&upgrade, &record.route) {
            // A filter may have moved the request to another route.
            allow_upgrade(manager, selected, name)?;
        }
    }
    let (Some(selected), Some(head)) = (&record.route, &mut record.request) else {
        return Err(Reject::no_route());
    };
    manager.stats.router_rq_total.inc();
    match &selected.route().action {
        Action::Direct { status, body } => {
            manager.stats.rq_direct_response.inc();
            direct(*status, body).map(|(head, body)| Answered::Response(head, body))
        }
        Action::Redirect(redirect) => {
            manager.stats.rq_redirect.inc();
            let location = redirect.location(selected.route(), head);
            Err(Reject::new(
                redirect.status(),
                "",
                ResponseFlags::default(),
                "direct_response",
            )
            .with_header(Known::Location, location))
        }
        Action::Forward { policy, .. } => {
            manager.filters.router.check(head)?;
            let Some(mut target) = selected.target(head) else {
                return Err(Reject::no_cluster(policy.cluster_not_found));
            };
            if let Some(labels) = record.info.borrow().labels() {
                target.narrow(labels);
            }
            let suppress = manager.filters.router.suppress_envoy_headers;
            {
                let mut info = record.info.borrow_mut();
                info.suppress_envoy_headers = suppress;
                info.upstream_cluster = Some(target.cluster.clone());
            }
            for ops in selected.request_ops() {
                let values = ops.values(&Facts {
                    request: Some(head),
                    route: Some(selected),
                    ..Facts::of_connection(&record.info.borrow())
                });
                ops.apply(&mut head.headers, values);
            }
            selected.rewrite(head, suppress);
            if policy.ends_connect && upgrade.as_deref() == Some("connect") {
                // Boxed, as it is rare and large.
                let end = connect::end(&manager.shared, policy, &target, head, body, &record.info);
                let (head, body) = Box::pin(end).await?;
                return Ok(Answered::Response(head, body));
            }
            let mut again = None;
            let mut follow = |response: &ResponseHead, head: &mut RequestHead, body| {
                again = policy.internal_redirect.as_deref().and_then(|redirects| {
                    let judge = Judge {
                        policy: redirects,
                        table: &table,
                        left: selected,
                        tls: cx.info.tls.as_deref(),
                        internal,
                        stats: &manager.stats,
                        info: &record.info,
                    };
                    judge.follow(response, head, body, &mut record.redirects)
                });
                again.is_some()
            };
            let hooks = Hooks {
                on_informational: &|head| early.put(head),
                follow: &mut follow,
            };
            let (mut head, mut body) = router::forward_informed(
                &manager.shared,
                policy,
                &target,
                head,
                body,
                &record.info,
                hooks,
            )
            .await?;
            if let Some(body) = again {
                record.follow(head, body.exact_length().unwrap_or(0));
                return Ok(Answered::Redirected(body, internal));
            }
            if manager.filters.holds_response(&record.state) {
                // Boxed, as it is rare.
                let filters = &manager.filters;
                let cx = ResponseContext {
                    shared: &manager.shared,
                    info: &record.info,
                    request: record.request.as_ref(),
                    route: record.route.as_ref(),
                };
                let held = filters.hold_response(&cx, &mut record.state, &mut head, &mut body);
                Box::pin(held).await?;
            }
            Ok(Answered::Response(head, body))
        }
    }
}

fn allow_upgrade(
    manager: &ConnectionManager,
    selected: &Selected,
    name: &str,
) -> Result<(), Reject> {
    let by_route = match &selected.route().action {
        Action::Forward { policy, .. } => policy.upgrade(name),
        Action::Redirect(_) | Action::Direct { .. } => None,
    };
    if by_route.unwrap_or_else(|| manager.allows_upgrade(name)) {
        Ok(())
    } else {
        manager.stats.rq_ws_on_non_ws_route.inc();
        Err(Reject::new(
            403,
            "",
            ResponseFlags::default(),
            "upgrade_failed",
        ))
    }
}

async fn run_filters(
    record: &mut Record,
    manager: &Arc<ConnectionManager>,
    table: &Arc<RouteTable>,
    internal: bool,
    body: &mut Body,
) -> Result<(), Reject> {
    let Record {
        request: Some(head),
        info,
        state,
        route,
        ..
    } = record
    else {
        return Err(Reject::no_route());
    };
    let mut cx = FilterContext::new(&manager.shared, info, state, table, route.clone(), internal);
    let outcome = manager.filters.on_request(&mut cx, head, body).await;
    let selected = cx.into_route(head);
    outcome?;
    match selected {
        Some(selected) => {
            record.enter(selected);
            Ok(())
        }
        None => {
            *route = None;
            manager.stats.no_route.inc();
            Err(Reject::no_route())
        }
    }
}

fn no_route(manager: &ConnectionManager, unmatched: Unmatched, head: &RequestHead) -> Reject {
    match unmatched {
        Unmatched::NotFound => {
            manager.stats.no_route.inc();
            Reject::no_route()
        }
        Unmatched::NeedsTls => {
            let mut location = b"https://".to_vec();
            location.extend_from_slice(&head.authority);
            location.extend_from_slice(&head.path);
            Reject::new(301, "", ResponseFlags::default(), "direct_response")
                .with_header(Known::Location, location)
        }
    }
}

fn direct(status: u16, body: &Bytes) -> Result<(ResponseHead, Body), Reject> {
    match String::from_utf8(body.to_vec()) {
        Ok(text) => Err(Reject::new(
            status,
            text,
            ResponseFlags::default(),
            "direct_response",
        )),
        Err(_) => {
            let mut headers = Headers::default();
            headers.append(Known::ContentLength, body.len().to_string());
            Ok((ResponseHead { status, headers }, Body::full(body.clone())))
        }
    }
}

/// Notes the cluster that a request would have gone to which never came to the router, as far as there is one.
fn name_cluster(record: &Record) {
    let (Some(selected), Some(head)) = (&record.route, &record.request) else {
        return;
    };
    let mut info = record.info.borrow_mut();
    let name = match info.upstream_cluster.take() {
        Some(name) => Some(name),
        None if matches!(selected.route().action, Action::Forward { .. }) => {
            selected.target(head).map(|target| target.cluster)
        }
        None => None,
    };
    let clusters = &record.cx.manager.shared.clusters;
    info.upstream_cluster = name.filter(|name| clusters.get(name).is_some());
}

/// Makes the response out of the outcome.
fn finish(mut record: Box<Record>, outcome: Result<(ResponseHead, Body), Reject>) -> Outgoing {
    let cx = record.cx.clone();
    let manager = &cx.manager;
    // Envoy: "the BadRequest error code indicates there has been a messaging error".
    let mut senseless = false;
    let (mut head, mut body) = match outcome {
        Ok((head, body)) => {
            let mut info = record.info.borrow_mut();
            if info.response_code_details.is_empty() {
                info.response_code_details = "via_upstream".into();
            }
            drop(info);
            (head, body)
        }
        Err(mut reject) => {
            senseless = reject.status == 400
                || reject
                    .flags
                    .contains(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            {
                let mut info = record.info.borrow_mut();
                info.flags.set(reject.flags);
                info.response_code_details = reject.details.clone();
                info.response_code = reject.status;
            }
            name_cluster(&record);
            if reject.flags.contains(ResponseFlags::NO_CLUSTER_FOUND) {
                manager.stats.no_cluster.inc();
            }
            if let Some(replies) = &manager.local_replies {
                replies.rewrite(
                    &mut reject,
                    &record.info,
                    record.request.as_ref(),
                    record.route.as_ref(),
                );
            }
            reject.into_response(record.grpc)
        }
    };
    strip_hop_by_hop(&mut head);
    {
        let mut info = record.info.borrow_mut();
        info.response_code = head.status;
        if info.request_end.is_none() {
            manager.stats.rq_response_before_rq_complete.inc();
        }
    }
    if let Some(selected) = &record.route {
        for ops in selected.response_ops() {
            let values = ops.values(&Facts {
                request: record.request.as_ref(),
                response: Some(&head),
                route: Some(selected),
                ..Facts::of_connection(&record.info.borrow())
            });
            ops.apply(&mut head.headers, values);
        }
    }
    if manager.filters.router.suppress_envoy_headers {
        head.headers.remove_known(Known::XEnvoyUpstreamServiceTime);
    }
    if !manager.filters.is_empty() {
        manager.filters.on_response(
            &ResponseContext {
                shared: &manager.shared,
                info: &record.info,
                request: record.request.as_ref(),
                route: record.route.as_ref(),
            },
            &mut record.state,
            &mut head,
            &mut body,
        );
    }
    if let Some(trace) = &mut record.trace {
        trace.on_response(&mut head);
    }
    let request_id = record
        .request
        .as_ref()
        .and_then(|head| head.headers.known(Known::XRequestId));
    manager.finish_response(&mut head, request_id);
    if record.grpc {
        record.info.borrow_mut().grpc_status = grpc_status(&head.headers);
    }
    record.response = Some(head);
    Outgoing {
        record,
        body,
        tunnel: false,
        senseless,
        hasty: false,
    }
}

impl Outgoing {
    /// The status of the response.
    pub(super) fn status(&self) -> u16 {
        self.record
            .response
            .as_ref()
            .map_or(0, |response| response.status)
    }

    /// Notes that nothing of the request's body counts as read.
    pub(super) fn unread(&self) {
        let mut info = self.record.info.borrow_mut();
        info.bytes_received = 0;
        if info.request_end.take().is_some() {
            let stats = &self.record.cx.manager.stats;
            stats.rq_response_before_rq_complete.inc();
        }
    }

    /// Whether a response of this status to this request has no body, whatever its head says.
    pub(super) fn is_bodiless(&self) -> bool {
        !self.tunnel && (matches!(self.status(), 100..=199 | 204 | 304) || self.record.is_head())
    }
}

/// Takes hop-by-hop headers from a response, but for those of an upgrade, and a length that none of its
/// status may have. Headers that `connection` names stay, as in Envoy: clients depend on what they get from it.
fn strip_hop_by_hop(head: &mut ResponseHead) {
    const ALWAYS: KnownSet = KnownSet::of(&[
        Known::KeepAlive,
        Known::ProxyConnection,
        Known::TransferEncoding,
    ]);
    const UNLESS_SWITCHING: KnownSet = KnownSet::of(&[Known::Connection, Known::Upgrade]);
    let status = head.status;
    head.headers.remove_all(ALWAYS);
    if status != 101 {
        head.headers.remove_all(UNLESS_SWITCHING);
    }
    if status < 200 || status == 204 {
        head.headers.remove_known(Known::ContentLength);
    }
}

/// Notes the trailers of a response.
pub(super) fn note_trailers(record: &mut Record, trailers: Headers) {
    if record.grpc {
        record.info.borrow_mut().grpc_status = grpc_status(&trailers);
    }
    record.trailers = Some(trailers);
}

/// What the body of a request writes down while it comes.
pub(super) struct Progress {
    pub(super) info: SharedInfo,
    pub(super) limits: Rc<StreamLimits>,
}

impl Progress {
    pub(super) fn of(record: &Record) -> Progress {
        Progress {
            info: record.info.clone(),
            limits: record.limits.clone(),
        }
    }

    /// A piece of the request's body passed.
    pub(super) fn received(&self, bytes: u64) {
        self.info.borrow_mut().bytes_received += bytes;
        self.limits.touch();
    }

    /// The request has no body.
    pub(super) fn ended_at_once(&self) {
        self.info.borrow_mut().request_end = Some(Duration::ZERO);
        self.limits.request_done();
    }

    /// The request has come entirely.
    pub(super) fn ended(&self) {
        let mut info = self.info.borrow_mut();
        if info.request_end.is_none() {
            let since = clock::now().saturating_duration_since(info.start);
            info.request_end = Some(since);
        }
        self.limits.request_done();
    }
}
