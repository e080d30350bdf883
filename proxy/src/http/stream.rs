//! One request and its response, from the head to the record at the end.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt as _, ReadHalf},
    sync::oneshot,
    time::{Instant, Sleep},
};

use super::{ConnectionContext, ConnectionManager, convert};
use crate::{
    body::{Body, BodyError, Frame},
    filter::{Completed, FilterContext, FilterState, ResponseContext},
    format::{Facts, grpc_status},
    head::{Headers, Known, Protocol, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    reject::Reject,
    route::{Action, ForwardPolicy, RouteTable, Selected, Unmatched, headers::HeaderOps},
    router,
    trace::Trace,
};

/// Serves one request. Dropping the future means that the downstream left.
pub(super) async fn serve(
    cx: Rc<ConnectionContext>,
    mut request: http::Request<Incoming>,
) -> Result<http::Response<OutBody>, Infallible> {
    let protocol = convert::protocol(request.version());
    let info = Rc::new(RefCell::new(StreamInfo::new(
        cx.info.clone(),
        Some(protocol),
    )));
    let limits = Rc::new(StreamLimits::new(&cx.manager));
    let mut record = Record::open(cx.clone(), info.clone(), protocol);
    let upgrade = convert::wanted_upgrade(request.version(), request.headers());
    let on_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (parts, incoming) = request.into_parts();
    let (tunnel, body) = match on_upgrade {
        None => (None, convert::request_body(incoming, info, limits.clone())),
        Some(on_upgrade) => {
            let (reader, io) = oneshot::channel();
            (
                Some((on_upgrade, reader)),
                convert::upgraded_body(io, info, limits.clone()),
            )
        }
    };
    let mut deadline = Deadline::new(limits.clone());
    let outcome = {
        let mut respond = pin!(respond(
            &mut record,
            &parts,
            body,
            upgrade.as_deref(),
            &limits
        ));
        // Cancel-safe: the deadline holds no data, and dropping `respond` is how a request is given up.
        tokio::select! {
            biased;
            outcome = respond.as_mut() => outcome,
            expired = poll_fn(|task| deadline.poll(task)) => {
                expired.count(&cx.manager.stats);
                Err(expired.reject(&limits))
            }
        }
    };
    Ok(finish(record, outcome, tunnel, deadline, &limits))
}

/// Decides what is answered: a filter, the route, or the upstream.
async fn respond(
    record: &mut Record,
    parts: &http::request::Parts,
    mut body: Body,
    upgrade: Option<&str>,
    limits: &Rc<StreamLimits>,
) -> Result<(ResponseHead, Body), Reject> {
    let manager = record.cx.manager.clone();
    let connection = record.cx.info.clone();
    let head = record
        .request
        .insert(convert::request_head(parts, upgrade.is_some())?);
    record.grpc = head.is_grpc();
    let origin = manager.prepare_request(head, convert::names_host(parts), &connection)?;
    record.info.borrow_mut().downstream_remote = origin.remote;
    let Some(table) = manager.table() else {
        manager.stats.no_route.inc();
        return Err(Reject::no_route());
    };
    let selected = table.select(head, connection.tls.as_ref(), origin.internal);
    if let Some(tracer) = &manager.tracer {
        record.trace = Some(tracer.start(head, selected.as_ref().ok()));
    }
    let selected = match selected {
        Ok(selected) => selected,
        Err(unmatched) => return Err(no_route(&manager, unmatched, head)),
    };
    if !origin.internal {
        for name in selected.internal_only() {
            head.headers.remove(name);
        }
    }
    record.enter(&selected, limits);
    if let Some(name) = upgrade {
        allow_upgrade(&manager, &selected, name)?;
        manager.stats.cx_upgrades_total.inc();
    }
    let selected = run_filters(
        record,
        &manager,
        &table,
        selected,
        origin.internal,
        &mut body,
    )
    .await?;
    if let Some(name) = upgrade {
        // A filter may have moved the request to another route.
        allow_upgrade(&manager, &selected, name)?;
    }
    record.enter(&selected, limits);
    let head = record.request.as_mut().ok_or_else(Reject::no_route)?;
    match &selected.route().action {
        Action::Direct { status, body } => {
            manager.stats.rq_direct_response.inc();
            direct(*status, body)
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
            manager.stats.router_rq_total.inc();
            manager.filters.router.check(head)?;
            let Some(target) = selected.target(head) else {
                manager.stats.no_cluster.inc();
                return Err(Reject::no_cluster(policy.cluster_not_found));
            };
            let suppress = manager.filters.router.suppress_envoy_headers;
            {
                let mut info = record.info.borrow_mut();
                info.suppress_envoy_headers = suppress;
                info.upstream_cluster = Some(target.cluster.clone());
            }
            for ops in selected.request_ops() {
                let values = request_values(ops, &record.info, head, &selected);
                ops.apply(&mut head.headers, values);
            }
            selected.rewrite(head, suppress);
            router::forward(
                &manager.shared,
                policy,
                &target,
                head.clone(),
                body,
                &record.info,
            )
            .await
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
        Err(Reject::new(
            403,
            "",
            ResponseFlags::default(),
            "upgrade_failed",
        ))
    }
}

fn request_values(
    ops: &HeaderOps,
    info: &RefCell<StreamInfo>,
    head: &RequestHead,
    selected: &Selected,
) -> Vec<Bytes> {
    ops.values(&Facts {
        request: Some(head),
        route: Some(selected),
        ..Facts::of_connection(&info.borrow())
    })
}

async fn run_filters(
    record: &mut Record,
    manager: &Arc<ConnectionManager>,
    table: &Arc<RouteTable>,
    selected: Selected,
    internal: bool,
    body: &mut Body,
) -> Result<Selected, Reject> {
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
    let mut cx = FilterContext::new(
        &manager.shared,
        info,
        state,
        table,
        Some(selected),
        internal,
    );
    manager.filters.on_request(&mut cx, head, body).await?;
    let selected = cx.into_route(head);
    route.clone_from(&selected);
    selected.ok_or_else(|| {
        manager.stats.no_route.inc();
        Reject::no_route()
    })
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

type Tunnel = (OnUpgrade, oneshot::Sender<ReadHalf<TokioIo<Upgraded>>>);

/// Makes the response out of the outcome, and ties the record to its body.
fn finish(
    mut record: Record,
    outcome: Result<(ResponseHead, Body), Reject>,
    tunnel: Option<Tunnel>,
    deadline: Deadline,
    limits: &Rc<StreamLimits>,
) -> http::Response<OutBody> {
    let manager = record.cx.manager.clone();
    // Envoy: "the BadRequest error code indicates there has been a messaging error".
    let senseless = matches!(&outcome, Err(reject) if reject.status == 400
        || reject.flags.contains(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR));
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
            let mut info = record.info.borrow_mut();
            info.flags.set(reject.flags);
            info.response_code_details = std::mem::take(&mut reject.details);
            drop(info);
            if reject.flags.contains(ResponseFlags::NO_CLUSTER_FOUND) {
                manager.stats.no_cluster.inc();
            }
            record.local_reply = reject.body.to_string();
            reject.into_response(record.grpc)
        }
    };
    convert::strip_hop_by_hop(&mut head);
    record.info.borrow_mut().response_code = head.status;
    if let Some(selected) = record.route.clone() {
        for ops in selected.response_ops() {
            let values = ops.values(&Facts {
                request: record.request.as_ref(),
                response: Some(&head),
                route: Some(&selected),
                ..Facts::of_connection(&record.info.borrow())
            });
            ops.apply(&mut head.headers, values);
        }
    }
    if manager.filters.router.suppress_envoy_headers {
        head.headers.take(Known::XEnvoyUpstreamServiceTime);
    }
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
    record.response = Some(head.clone());
    let mut response = http::Response::new(OutBody::nothing());
    *response.status_mut() =
        http::StatusCode::from_u16(head.status).unwrap_or(http::StatusCode::BAD_GATEWAY);
    *response.headers_mut() = convert::header_map(&head.headers);
    if head.status == 101
        && let Some((on_upgrade, reader)) = tunnel
    {
        response
            .headers_mut()
            .entry(http::header::CONNECTION)
            .or_insert(http::HeaderValue::from_static("upgrade"));
        tokio::task::spawn_local(carry(
            record,
            on_upgrade,
            reader,
            body,
            deadline,
            limits.clone(),
        ));
        return response;
    }
    // Envoy does not wait for the rest of a request that has been answered already; neither for what
    // follows a request that made no sense.
    let early = record.protocol != Protocol::Http2
        && (senseless || record.info.borrow().request_end.is_none());
    if record.cx.closes_after(record.protocol) || early {
        match record.protocol {
            Protocol::Http10 | Protocol::Http11 => {
                response.headers_mut().insert(
                    http::header::CONNECTION,
                    http::HeaderValue::from_static("close"),
                );
            }
            Protocol::Http2 => record.cx.close_gracefully(),
        }
    }
    let bodiless = matches!(head.status, 100..=199 | 204 | 304)
        || record
            .request
            .as_ref()
            .is_some_and(|head| head.method.as_ref() == b"HEAD");
    let expected = head
        .headers
        .known(Known::ContentLength)
        .and_then(|length| std::str::from_utf8(length).ok()?.parse().ok());
    if bodiless || body.is_end_stream() {
        // hyper will not ask for the body, so its end is now.
        record.complete();
    }
    *response.body_mut() = OutBody {
        body: if bodiless { Body::empty() } else { body },
        expected,
        record: Some(record),
        deadline: Some(deadline),
    };
    response
}

/// Carries an upgraded stream: response body to the downstream; the request body reads for itself.
async fn carry(
    mut record: Record,
    on_upgrade: OnUpgrade,
    reader: oneshot::Sender<ReadHalf<TokioIo<Upgraded>>>,
    mut body: Body,
    mut deadline: Deadline,
    limits: Rc<StreamLimits>,
) {
    let Ok(upgraded) = on_upgrade.await else {
        return;
    };
    let manager = record.cx.manager.clone();
    manager.stats.cx_upgrades_active.inc();
    let (read, mut write) = tokio::io::split(TokioIo::new(upgraded));
    if reader.send(read).is_err() {
        tracing::debug!("the router gave up the request body of an upgraded stream");
    }
    loop {
        // Cancel-safe: `frame` loses nothing, the deadline holds nothing.
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            expired = poll_fn(|cx| deadline.poll(cx)) => {
                expired.count(&manager.stats);
                record.info.borrow_mut().flags.set(expired.flags());
                break;
            }
        };
        limits.touch();
        match frame {
            Some(Ok(Frame::Data(data))) => {
                record.info.borrow_mut().bytes_sent += data.len() as u64;
                if write.write_all(&data).await.is_err() || write.flush().await.is_err() {
                    break;
                }
            }
            Some(Ok(Frame::Trailers(_)) | Err(_)) | None => break,
        }
    }
    // The peer may be gone already.
    drop(write.shutdown().await);
    manager.stats.cx_upgrades_active.dec();
    record.complete();
}

/// The limits in time of one stream, shared by its request body, response body and deadline.
#[derive(Debug)]
pub(super) struct StreamLimits {
    began: Instant,
    activity: Cell<Instant>,
    idle: Cell<Option<Duration>>,
    request: Cell<Option<Instant>>,
    whole: Cell<Option<Instant>>,
    request_done: Cell<bool>,
}

impl StreamLimits {
    fn new(manager: &ConnectionManager) -> StreamLimits {
        let now = Instant::now();
        let limits = &manager.limits;
        StreamLimits {
            began: now,
            activity: Cell::new(now),
            idle: Cell::new(limits.stream_idle),
            request: Cell::new(limits.request.map(|limit| now + limit)),
            whole: Cell::new(limits.stream_duration.map(|limit| now + limit)),
            request_done: Cell::new(false),
        }
    }

    /// Something was sent or received.
    pub(super) fn touch(&self) {
        self.activity.set(Instant::now());
    }

    /// The request has come entirely.
    pub(super) fn request_done(&self) {
        self.request_done.set(true);
        self.request.set(None);
        self.touch();
    }

    fn next(&self) -> Option<(Instant, Expired)> {
        let idle = self
            .idle
            .get()
            .map(|idle| (self.activity.get() + idle, Expired::Idle));
        let request = self.request.get().map(|at| (at, Expired::Request));
        let whole = self.whole.get().map(|at| (at, Expired::Whole));
        [idle, request, whole]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}

/// Which limit ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expired {
    Idle,
    Request,
    Whole,
}

impl Expired {
    fn count(self, stats: &super::Stats) {
        match self {
            Expired::Idle => stats.rq_idle_timeout.inc(),
            Expired::Request => stats.rq_timeout.inc(),
            Expired::Whole => stats.rq_max_duration_reached.inc(),
        }
    }

    fn flags(self) -> ResponseFlags {
        match self {
            Expired::Idle => ResponseFlags::STREAM_IDLE_TIMEOUT,
            Expired::Request | Expired::Whole => ResponseFlags::default(),
        }
    }

    fn reject(self, limits: &StreamLimits) -> Reject {
        let status = if limits.request_done.get() { 504 } else { 408 };
        let (body, details) = match self {
            Expired::Idle => ("stream timeout", "stream_idle_timeout"),
            Expired::Request => ("request timeout", "request_overall_timeout"),
            Expired::Whole => ("downstream duration timeout", "max_duration_timeout"),
        };
        let mut reject = Reject::new(status, body, self.flags(), details);
        if self == Expired::Whole {
            reject.grpc_status = Some(4);
        }
        reject
    }
}

/// Waits for the next limit; made once per stream, its timer moves only when it fires.
#[derive(Debug)]
struct Deadline {
    limits: Rc<StreamLimits>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Deadline {
    fn new(limits: Rc<StreamLimits>) -> Deadline {
        Deadline {
            limits,
            timer: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Expired> {
        loop {
            let Some((at, which)) = self.limits.next() else {
                return Poll::Pending;
            };
            let timer = self
                .timer
                .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            if at < timer.deadline() {
                timer.as_mut().reset(at);
            }
            match timer.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) if Instant::now() >= at => return Poll::Ready(which),
                // Something happened meanwhile, so the limit has moved.
                Poll::Ready(()) => timer.as_mut().reset(at),
            }
        }
    }
}

/// Everything that is written down when the stream ends, exactly once: at `complete`, or on drop, which
/// means that the downstream left.
struct Record {
    cx: Rc<ConnectionContext>,
    info: Rc<RefCell<StreamInfo>>,
    protocol: Protocol,
    request: Option<RequestHead>,
    response: Option<ResponseHead>,
    trailers: Option<Headers>,
    route: Option<Selected>,
    state: FilterState,
    trace: Option<Trace>,
    local_reply: String,
    grpc: bool,
    written: bool,
}

impl Record {
    fn open(
        cx: Rc<ConnectionContext>,
        info: Rc<RefCell<StreamInfo>>,
        protocol: Protocol,
    ) -> Record {
        let stats = &cx.manager.stats;
        stats.rq_total.inc();
        stats.rq_active.inc();
        match protocol {
            Protocol::Http10 | Protocol::Http11 => stats.rq_http1_total.inc(),
            Protocol::Http2 => stats.rq_http2_total.inc(),
        }
        cx.stream_began();
        Record {
            cx,
            info,
            protocol,
            request: None,
            response: None,
            trailers: None,
            route: None,
            state: FilterState::default(),
            trace: None,
            local_reply: String::new(),
            grpc: false,
            written: false,
        }
    }

    /// Notes the route that was selected.
    fn enter(&mut self, selected: &Selected, limits: &StreamLimits) {
        let mut info = self.info.borrow_mut();
        info.route_name.clone_from(&selected.route().name);
        info.virtual_host = Some(selected.virtual_host().name.clone());
        drop(info);
        if let Action::Forward { policy, .. } = &selected.route().action {
            if let Some(idle) = policy.idle_timeout {
                limits.idle.set(idle);
            }
            if let Some(limit) = self.longest(policy) {
                limits.whole.set(limit.map(|limit| limits.began + limit));
            }
        }
        self.route = Some(selected.clone());
    }

    /// The route's limit on the life of the stream; `None` leaves the connection manager's. Envoy:
    /// `ActiveStream::refreshDurationTimeout`.
    fn longest(&self, policy: &ForwardPolicy) -> Option<Option<Duration>> {
        let asked = self.request.as_ref().and_then(RequestHead::grpc_timeout);
        let Some((asked, most)) = asked.zip(policy.grpc_duration_max) else {
            return policy.max_stream_duration;
        };
        let capped = if most.is_zero() {
            asked
        } else {
            asked.min(most)
        };
        let offset = policy.grpc_duration_offset.unwrap_or_default();
        Some(Some(capped.saturating_sub(offset)).filter(|limit| !limit.is_zero()))
    }

    fn complete(&mut self) {
        self.write(true);
    }

    fn write(&mut self, completed: bool) {
        if std::mem::replace(&mut self.written, true) {
            return;
        }
        let stats = &self.cx.manager.stats;
        let mut info = self.info.borrow_mut();
        let elapsed = info.start.elapsed();
        info.response_end = Some(elapsed);
        if completed {
            stats.rq_completed.inc();
            if info.request_end.is_none() {
                stats.rq_response_before_rq_complete.inc();
            }
        } else {
            info.flags
                .set(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION);
            info.response_code_details = "downstream_remote_disconnect".into();
            if self.protocol == Protocol::Http2 {
                stats.rq_rx_reset.inc();
            }
        }
        match info.response_code {
            100..=199 => stats.rq_1xx.inc(),
            200..=299 => stats.rq_2xx.inc(),
            300..=399 => stats.rq_3xx.inc(),
            400..=499 => stats.rq_4xx.inc(),
            500..=599 => stats.rq_5xx.inc(),
            _ => {}
        }
        stats
            .rq_time
            .record(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        stats.rq_active.dec();
        drop(info);
        let info = self.info.borrow();
        let facts = Facts {
            info: &info,
            request: self.request.as_ref(),
            response: self.response.as_ref(),
            trailers: self.trailers.as_ref(),
            route: self.route.as_ref(),
            local_reply: &self.local_reply,
        };
        for log in &self.cx.manager.access_log {
            log.write(&facts);
        }
        self.cx.manager.filters.on_complete(&Completed {
            facts,
            state: &self.state,
        });
        if let Some(trace) = &self.trace {
            trace.finish(&self.cx.manager.shared, &facts);
        }
        drop(info);
        self.cx.stream_ended();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.write(false);
    }
}

/// The response body on its way to hyper; carries the record.
pub(super) struct OutBody {
    body: Body,
    expected: Option<u64>,
    record: Option<Record>,
    deadline: Option<Deadline>,
}

impl OutBody {
    fn nothing() -> OutBody {
        OutBody {
            body: Body::empty(),
            expected: None,
            record: None,
            deadline: None,
        }
    }

    fn ended(&mut self) {
        self.deadline = None;
        if let Some(record) = &mut self.record {
            record.complete();
        }
    }
}

impl http_body::Body for OutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = match this.body.poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let Some(deadline) = &mut this.deadline else {
                    return Poll::Pending;
                };
                let expired = std::task::ready!(deadline.poll(cx));
                if let Some(record) = &mut this.record {
                    expired.count(&record.cx.manager.stats);
                    record.info.borrow_mut().flags.set(expired.flags());
                }
                Some(Err(BodyError::Timeout))
            }
        };
        if let Some(deadline) = &this.deadline {
            deadline.limits.touch();
        }
        Poll::Ready(match frame {
            None => {
                this.ended();
                None
            }
            Some(Ok(Frame::Data(data))) => {
                let mut sent = 0;
                if let Some(record) = &this.record {
                    let mut info = record.info.borrow_mut();
                    info.bytes_sent += data.len() as u64;
                    sent = info.bytes_sent;
                }
                if this.body.is_end_stream()
                    || this.expected.is_some_and(|expected| sent >= expected)
                {
                    this.ended();
                }
                Some(Ok(http_body::Frame::data(data)))
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                let map = convert::header_map(&trailers);
                if let Some(record) = &mut this.record {
                    if record.grpc {
                        record.info.borrow_mut().grpc_status = grpc_status(&trailers);
                    }
                    record.trailers = Some(trailers);
                }
                this.ended();
                Some(Ok(http_body::Frame::trailers(map)))
            }
            Some(Err(error)) => {
                if let Some(record) = &this.record {
                    record.cx.manager.stats.rq_tx_reset.inc();
                }
                this.ended();
                Some(Err(error))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self.body.exact_length() {
            Some(length) => http_body::SizeHint::with_exact(length),
            None => http_body::SizeHint::default(),
        }
    }
}
