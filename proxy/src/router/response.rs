//! A response on its way down: its head is completed, its body watched until it ends.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{net::TcpStream, time::Instant};

use super::{CancelOnDrop, Clock, Request, SharedInfo, timeouts::Decimal};
use crate::{
    body::{Body, BodyError, Frame, Source},
    clock,
    cluster::Host,
    head::{Known, ResponseHead},
    info::ResponseFlags,
    outlier::Outcome,
    retry::number,
    timer::Deadline,
    upstream::LocalCluster,
};

/// A response as it came.
pub(super) struct Answer {
    pub(super) head: ResponseHead,
    pub(super) body: Body,
    pub(super) local: Rc<LocalCluster>,
    pub(super) host: Arc<Host>,
}

/// Completes the head and wraps the body.
pub(super) fn finish(
    request: Request<'_>,
    flags: ResponseFlags,
    answer: Answer,
    mut clock: Clock,
) -> (ResponseHead, Body) {
    let Answer {
        mut head,
        body,
        local,
        host,
    } = answer;
    let now = clock::now();
    let replay = request.replay;
    let ended = replay.0.ended_at();
    let began = ended.unwrap_or(now);
    let time = now.saturating_duration_since(began);
    // There will be no other attempt; mirrors still need what was kept.
    if request.policy.mirrors.is_empty() {
        replay.0.stop_keeping();
    }
    if ended.is_some() && !request.suppress {
        head.headers
            .set(Known::XEnvoyUpstreamServiceTime, Decimal::of(millis(time)));
    }
    let mut info = request.info.borrow_mut();
    info.flags.set(flags);
    info.upstream_first_byte = Some(now.saturating_duration_since(info.start));
    info.response_code_details = "via_upstream".into();
    info.grpc_status = body
        .trailers()
        .and_then(|trailers| trailers.known(Known::GrpcStatus))
        .or_else(|| head.headers.known(Known::GrpcStatus))
        .and_then(number);
    if request.policy.include_attempt_count_in_response && !request.suppress {
        head.headers.set(
            Known::XEnvoyAttemptCount,
            info.upstream_attempts.to_string(),
        );
    }
    drop(info);
    let tunnelled = request.upgrade && (head.status == 101 || request.connect && head.status < 300);
    local.cluster.stats.answered(head.status, request.caller);
    if body.is_whole() && !tunnelled {
        // The rest of the request, if there is any, goes with `replay`.
        record_time(&local, time);
        return (head, body);
    }
    if request.upgrade {
        clock.limit = None;
    }
    let mut watched = Watched {
        body,
        clock,
        info: request.info.clone(),
        local,
        host,
        replay: Some(replay),
        began,
        tunnel: request.left.filter(|_| tunnelled),
        broken: None,
        done: false,
    };
    if watched.body.is_end_stream() {
        watched.tunnel = None;
        watched.done();
        return (head, Body::empty());
    }
    (head, Body::stream(watched))
}

fn record_time(local: &LocalCluster, time: Duration) {
    local.cluster.stats.upstream_rq_time.record(millis(time));
}

/// Whole milliseconds, without the long arithmetic of `as_millis`.
fn millis(time: Duration) -> u64 {
    time.as_secs()
        .saturating_mul(1000)
        .saturating_add(u64::from(time.subsec_millis()))
}

struct Watched {
    body: Body,
    clock: Clock,
    info: SharedInfo,
    local: Rc<LocalCluster>,
    host: Arc<Host>,
    /// Dropped with the response: what is left of the request's body is not wanted then.
    replay: Option<CancelOnDrop>,
    began: Instant,
    /// For an upgraded stream: whether the downstream ended its half first.
    tunnel: Option<Rc<Cell<bool>>>,
    /// An error that is to be told at the next poll.
    broken: Option<BodyError>,
    done: bool,
}

impl Watched {
    fn done(&mut self) {
        if !self.done {
            self.done = true;
            self.stop();
            record_time(
                &self.local,
                clock::now().saturating_duration_since(self.began),
            );
            if let Some(left) = &self.tunnel {
                // A tunnel has no end of its own: one of the two sides left.
                let (flag, details) = if left.get() {
                    (
                        ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION,
                        "downstream_remote_disconnect",
                    )
                } else {
                    (
                        ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
                        "upstream_reset_after_response_started{connection_termination}",
                    )
                };
                let mut info = self.info.borrow_mut();
                info.flags.set(flag);
                info.response_code_details = details.into();
            }
        }
    }

    /// What is left of the request is not wanted any more, nor is the timer.
    fn stop(&mut self) {
        self.clock.limit = None;
        self.clock.deadline.clear();
        self.replay = None;
    }

    /// Ready when the response has taken too long.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(replay) = &self.replay else {
            return Poll::Pending;
        };
        ready!(self.clock.poll(&replay.0, cx));
        self.body = Body::empty();
        self.failed(&BodyError::Timeout);
        Poll::Ready(())
    }

    fn failed(&mut self, error: &BodyError) {
        self.done = true;
        self.stop();
        let stats = &self.local.cluster.stats;
        let (flag, details) = match error {
            BodyError::Disconnected => (
                ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
                "upstream_reset_after_response_started{connection_termination}",
            ),
            BodyError::Reset(_) => {
                stats.upstream_rq_rx_reset.inc();
                (
                    ResponseFlags::UPSTREAM_REMOTE_RESET,
                    "upstream_reset_after_response_started{remote_reset}",
                )
            }
            BodyError::Protocol(_) => {
                stats.upstream_cx_protocol_error.inc();
                (
                    ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
                    "upstream_reset_after_response_started{protocol_error}",
                )
            }
            BodyError::Timeout => {
                stats.upstream_rq_timeout.inc();
                (ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "response_timeout")
            }
            BodyError::TooLarge | BodyError::Refused(_) => {
                (ResponseFlags::LOCAL_RESET, "response_payload_too_large")
            }
        };
        let outcome = match error {
            BodyError::Timeout => Outcome::TimedOut,
            _ => Outcome::Failed,
        };
        self.local.cluster.report(&self.host, outcome);
        let mut info = self.info.borrow_mut();
        info.flags.set(flag);
        info.response_code_details = details.into();
    }
}

impl Source for Watched {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        if let Some(error) = this.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match this.body.poll_frame(cx) {
            Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                if this.body.is_end_stream() {
                    this.done();
                }
                Poll::Ready(Some(Ok(Frame::Data(data))))
            }
            Poll::Ready(Some(Ok(Frame::Trailers(trailers)))) => {
                if let Some(status) = trailers.known(Known::GrpcStatus).and_then(number) {
                    this.info.borrow_mut().grpc_status = Some(status);
                }
                this.done();
                Poll::Ready(Some(Ok(Frame::Trailers(trailers))))
            }
            Poll::Ready(None) => {
                this.done();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                this.failed(&error);
                // One turn later, so that what came before it (the head above all) is written out.
                this.broken = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Pending => {
                ready!(this.poll_clock(cx));
                Poll::Ready(Some(Err(BodyError::Timeout)))
            }
        }
    }

    fn splices(&self) -> bool {
        self.broken.is_none() && self.tunnel.is_none() && self.body.splices()
    }

    fn poll_splice(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<u64>> {
        let this = self.get_mut();
        let Poll::Ready(moved) = this.body.poll_splice(cx, to) else {
            ready!(this.poll_clock(cx));
            this.broken = Some(BodyError::Timeout);
            return Poll::Ready(Ok(0));
        };
        if matches!(moved, Ok(n) if n > 0) && this.body.is_end_stream() {
            this.done();
        }
        Poll::Ready(moved)
    }

    fn is_end_stream(&self) -> bool {
        self.broken.is_none() && self.body.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        self.body.exact_length()
    }
}

/// A body that must end by `deadline`.
pub(super) fn until(body: Body, deadline: Instant) -> Body {
    if body.is_end_stream() {
        return Body::empty();
    }
    let mut timer = Deadline::default();
    timer.set(deadline);
    Body::stream(Until {
        body,
        deadline: timer,
    })
}

struct Until {
    body: Body,
    deadline: Deadline,
}

impl Source for Until {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        match this.body.poll_frame(cx) {
            Poll::Pending if this.deadline.poll(cx).is_ready() => {
                this.body = Body::empty();
                Poll::Ready(Some(Err(BodyError::Timeout)))
            }
            polled => polled,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        self.body.exact_length()
    }
}

/// A body that notes in `ended` that it has come to its end.
pub(super) fn noting_end(body: Body, ended: Rc<Cell<bool>>) -> Body {
    Body::stream(Noting { body, ended })
}

struct Noting {
    body: Body,
    ended: Rc<Cell<bool>>,
}

impl Source for Noting {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        let polled = this.body.poll_frame(cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            this.ended.set(true);
        }
        polled
    }
}
