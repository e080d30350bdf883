//! What is written down of one stream when it ends: statistics, access log, Mixer report, trace.

use std::{cell::RefCell, rc::Rc, time::Duration};

use super::{ConnectionContext, limits::StreamLimits};
use crate::{
    clock,
    filter::{Completed, FilterState},
    format::Facts,
    head::{Headers, Known, Protocol, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    route::{Action, ForwardPolicy, Selected, internal_redirect::Taken},
    router::SharedInfo,
    trace::Trace,
};

/// Details of a stream that the downstream reset. Envoy's word.
pub(super) const REMOTE_RESET: &str = "http2.remote_reset";

/// Everything that is written down when the stream ends, exactly once: at `complete` or `fail`, or on drop,
/// which means that the downstream left.
pub(super) struct Record {
    pub(super) cx: Rc<ConnectionContext>,
    pub(super) info: SharedInfo,
    pub(super) limits: Rc<StreamLimits>,
    pub(super) protocol: Protocol,
    /// The request, once its head was understood; filters and router change it in place.
    pub(super) request: Option<RequestHead>,
    /// The head of the response, once there is one.
    pub(super) response: Option<ResponseHead>,
    pub(super) trailers: Option<Headers>,
    pub(super) route: Option<Selected>,
    pub(super) state: FilterState,
    pub(super) trace: Option<Trace>,
    /// Whether the request is gRPC.
    pub(super) grpc: bool,
    /// Redirects that were followed to come here.
    pub(super) redirects: Taken,
    /// What `%RESPONSE_CODE_DETAILS%` says if the downstream leaves.
    pub(super) left: &'static str,
    written: bool,
}

impl Record {
    /// Opens the record of a stream that begins now; boxed, since it passes through many hands.
    pub(super) fn open(cx: &Rc<ConnectionContext>, protocol: Protocol) -> Box<Record> {
        let stats = &cx.manager.stats;
        stats.rq_total.inc();
        stats.rq_active.inc();
        match protocol {
            Protocol::Http10 | Protocol::Http11 => stats.rq_http1_total.inc(),
            Protocol::Http2 => stats.rq_http2_total.inc(),
        }
        cx.stream_began();
        let info = StreamInfo::new(cx.info.clone(), Some(protocol));
        // Made where it stays; `Box::new` would copy it there.
        let place = Box::new_uninit();
        Box::write(
            place,
            Record {
                cx: cx.clone(),
                limits: Rc::new(StreamLimits::new(&cx.manager.limits, info.start)),
                info: Rc::new(RefCell::new(info)),
                protocol,
                request: None,
                response: None,
                trailers: None,
                route: None,
                state: FilterState::default(),
                trace: None,
                grpc: false,
                redirects: Taken::default(),
                left: "downstream_remote_disconnect",
                written: false,
            },
        )
    }

    /// A header of the request.
    pub(super) fn header(&self, name: Known) -> Option<&[u8]> {
        self.request.as_ref()?.headers.known(name)
    }

    /// Notes the route that was selected.
    pub(super) fn enter(&mut self, selected: Selected) {
        let mut info = self.info.borrow_mut();
        info.route_name.clone_from(&selected.route().name);
        info.virtual_host = Some(selected.virtual_host().name.clone());
        drop(info);
        if let Action::Forward { policy, .. } = &selected.route().action {
            if let Some(idle) = policy.idle_timeout {
                self.limits.set_idle(idle);
            }
            if let Some(limit) = self.longest(policy) {
                self.limits.set_whole(limit);
            }
        }
        self.route = Some(selected);
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

    /// Whether the request's method is HEAD.
    pub(super) fn is_head(&self) -> bool {
        self.request
            .as_ref()
            .is_some_and(|head| &*head.method == b"HEAD")
    }

    /// The response was sent to its end.
    pub(super) fn complete(&mut self) {
        self.write(Ending::Whole);
    }

    /// The downstream broke the protocol.
    pub(super) fn violated(&mut self, details: &'static str) {
        self.info
            .borrow_mut()
            .flags
            .set(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
        self.write(Ending::Broken(details));
    }

    /// The stream ends without an answer to a request that broke the protocol.
    pub(super) fn unanswered(&mut self, details: &'static str) {
        self.info.borrow_mut().response_code = 0;
        self.violated(details);
    }

    /// We end the stream before its response's end; what is to be said about it stands in the facts.
    pub(super) fn fail(&mut self) {
        if !self.written {
            self.cx.manager.stats.rq_tx_reset.inc();
            self.cx.manager.stats.rq_rx_reset.inc();
        }
        self.write(Ending::Cut);
    }

    /// The response is a redirect that is followed, with `resent` bytes: the stream is written down and gives
    /// its place to another, of the same request, with the head that it has by now. The limits in time go on.
    pub(super) fn follow(&mut self, response: ResponseHead, resent: u64) {
        let mut next = Record::open(&self.cx, self.protocol);
        next.request.clone_from(&self.request);
        next.limits = self.limits.clone();
        next.redirects = std::mem::take(&mut self.redirects);
        {
            let mut info = self.info.borrow_mut();
            info.response_code = response.status;
            info.response_code_details = "internal_redirect".into();
            let mut next = next.info.borrow_mut();
            next.downstream_remote = info.downstream_remote;
            // As Envoy, where the new stream receives the body once more.
            next.bytes_received = info.bytes_received + resent;
            next.request_end = Some(Duration::ZERO);
        }
        self.response = Some(response);
        self.write(Ending::Followed);
        *self = *next;
    }

    fn write(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.written, true) {
            return;
        }
        let stats = &self.cx.manager.stats;
        let mut info = self.info.borrow_mut();
        let elapsed = clock::now().saturating_duration_since(info.start);
        let ended = info.start + elapsed;
        info.response_end = Some(elapsed);
        match ending {
            Ending::Cut | Ending::Followed => {}
            // As Envoy, which resets a stream whose request has not come to its end.
            Ending::Whole if info.request_end.is_none() => stats.rq_rx_reset.inc(),
            Ending::Whole => {}
            Ending::Left => {
                info.flags.set(if self.left == REMOTE_RESET {
                    ResponseFlags::DOWNSTREAM_REMOTE_RESET
                } else {
                    ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION
                });
                info.response_code_details = self.left.into();
                stats.rq_rx_reset.inc();
            }
            Ending::Broken(details) => {
                info.response_code_details = details.into();
                stats.rq_rx_reset.inc();
            }
        }
        if !info.health_check {
            if matches!(ending, Ending::Cut | Ending::Whole) {
                stats.rq_completed.inc();
            }
            if !matches!(ending, Ending::Followed) {
                stats.count_status(info.response_code);
            }
        }
        stats
            .rq_time
            .record(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        stats.rq_active.dec();
        drop(info);
        let manager = &self.cx.manager;
        let info = self.info.borrow();
        let facts = Facts {
            info: &info,
            request: self.request.as_ref(),
            response: self.response.as_ref(),
            trailers: self.trailers.as_ref(),
            route: self.route.as_ref(),
            local_reply: "",
        };
        for log in &manager.access_log {
            log.write(&facts);
        }
        manager.filters.on_complete(&Completed {
            facts,
            state: &self.state,
        });
        if let Some(trace) = &self.trace {
            trace.finish(&manager.shared, &facts);
        }
        drop(info);
        self.cx.stream_ended(ended);
    }
}

/// How a stream ended.
enum Ending {
    /// With all of the response.
    Whole,
    /// With a response that we cut.
    Cut,
    /// With a redirect that another stream follows.
    Followed,
    /// The downstream left.
    Left,
    /// The downstream made no sense.
    Broken(&'static str),
}

impl Drop for Record {
    fn drop(&mut self) {
        self.write(Ending::Left);
    }
}
