//! The limits in time of one stream, and what happens when one runs out.

use std::{
    cell::Cell,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Instant;

use super::{Limits, Stats};
use crate::{clock, info::ResponseFlags, reject::Reject, timer::Deadline};

/// Shared by a stream's request body, response body and deadline.
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
    pub(super) fn new(limits: &Limits, now: Instant) -> StreamLimits {
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
        self.activity.set(clock::now());
    }

    /// The request has come entirely.
    pub(super) fn request_done(&self) {
        self.request_done.set(true);
        self.request.set(None);
    }

    /// The longest time without a byte is the route's.
    pub(super) fn set_idle(&self, idle: Option<Duration>) {
        self.idle.set(idle);
    }

    /// The longest life is the route's.
    pub(super) fn set_whole(&self, limit: Option<Duration>) {
        self.whole.set(limit.map(|limit| self.began + limit));
    }

    fn next(&self) -> Option<(Instant, Expired)> {
        let idle = self.idle.get();
        let mut first = idle.map(|idle| (self.activity.get() + idle, Expired::Idle));
        for (at, which) in [
            (self.request.get(), Expired::Request),
            (self.whole.get(), Expired::Whole),
        ] {
            if let Some(at) = at
                && first.is_none_or(|(first, _)| at < first)
            {
                first = Some((at, which));
            }
        }
        first
    }

    /// Ready when a limit has run out. `deadline` is the one that the stream waits with.
    pub(super) fn poll(&self, deadline: &mut Deadline, cx: &mut Context<'_>) -> Poll<Expired> {
        loop {
            let Some((at, which)) = self.next() else {
                deadline.clear();
                return Poll::Pending;
            };
            deadline.set(at);
            ready!(deadline.poll(cx));
            if Instant::now() >= at {
                return Poll::Ready(which);
            }
        }
    }
}

/// Which limit ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expired {
    Idle,
    Request,
    Whole,
}

impl Expired {
    pub(super) fn count(self, stats: &Stats) {
        match self {
            Expired::Idle => stats.rq_idle_timeout.inc(),
            Expired::Request => stats.rq_timeout.inc(),
            Expired::Whole => stats.rq_max_duration_reached.inc(),
        }
    }

    pub(super) fn flags(self) -> ResponseFlags {
        match self {
            Expired::Idle => ResponseFlags::STREAM_IDLE_TIMEOUT,
            Expired::Request | Expired::Whole => ResponseFlags::default(),
        }
    }

    pub(super) fn details(self) -> &'static str {
        match self {
            Expired::Idle => "stream_idle_timeout",
            Expired::Request => "request_overall_timeout",
            Expired::Whole => "max_duration_timeout",
        }
    }

    pub(super) fn reject(self, limits: &StreamLimits) -> Reject {
        let status = if limits.request_done.get() { 504 } else { 408 };
        let body = match self {
            Expired::Idle => "stream timeout",
            Expired::Request => "request timeout",
            Expired::Whole => "downstream duration timeout",
        };
        let mut reject = Reject::new(status, body, self.flags(), self.details());
        if self == Expired::Whole {
            reject.grpc_status = Some(4);
        }
        reject
    }
}
