//! One downstream connection: which HTTP it speaks, how long it may live, how it drains.

use std::{
    cell::Cell,
    future::poll_fn,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use lateen_protocols::envoy::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::CodecType;
use tokio::time::Instant;

use super::{ConnectionManager, h1, h2};
use crate::{
    boxed::boxed,
    drain::{Drain, Watch},
    head::Protocol,
    info::ConnectionInfo,
    net::{Transport, stock},
    stats::Gauge,
    timer::Deadline,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes read, and forgotten, of a peer that was told to go, so that it gets to read why. More waits in the
/// kernel and holds the peer up: who floods us does not get to send at full speed until the wait is over.
pub(super) const LINGER_BYTES: usize = 1 << 20;

/// What the streams of one connection share.
#[derive(Debug)]
pub struct ConnectionContext {
    pub(super) manager: Arc<ConnectionManager>,
    pub(super) info: Rc<ConnectionInfo>,
    drains: Box<[(Drain, Watch)]>,
    active: Cell<usize>,
    requests: Cell<u64>,
    idle_since: Cell<Instant>,
    /// The connection is to end after the streams it has.
    closing: Cell<bool>,
    /// When it ends at the latest once it is closing and has no streams.
    gone_by: Cell<Option<Instant>>,
    /// Its longest life is over.
    old: Cell<bool>,
}

/// What becomes of a connection after a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It may carry more.
    Stays,
    /// It is to end, which the response says; until its peer goes, or its time is over, it carries more.
    Leaves,
    /// It ends with the response.
    Ends,
}

/// Why a connection ends, or begins to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A head was not complete in time.
    Head,
    /// It is to take no more streams.
    Closing,
    /// It has been told to go long enough.
    Gone,
}

impl ConnectionContext {
    pub(super) fn new(
        manager: Arc<ConnectionManager>,
        info: Rc<ConnectionInfo>,
        drains: Vec<Drain>,
    ) -> ConnectionContext {
        ConnectionContext {
            manager,
            idle_since: Cell::new(info.started),
            info,
            drains: drains
                .into_iter()
                .map(|drain| {
                    let watch = drain.watch();
                    (drain, watch)
                })
                .collect(),
            active: Cell::new(0),
            requests: Cell::new(0),
            closing: Cell::new(false),
            gone_by: Cell::new(None),
            old: Cell::new(false),
        }
    }

    pub(super) fn stream_began(&self) {
        self.active.set(self.active.get() + 1);
        self.requests.set(self.requests.get() + 1);
    }

    pub(super) fn stream_ended(&self, now: Instant) {
        self.active.set(self.active.get().saturating_sub(1));
        self.idle_since.set(now);
    }

    /// Number of streams that have not ended.
    pub(super) fn active(&self) -> usize {
        self.active.get()
    }

    /// Whether it takes no more streams.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.get()
    }

    /// What becomes of the connection after the present response. Envoy: `DrainState`.
    pub(super) fn after_response(&self, protocol: Protocol) -> Fate {
        let stats = &self.manager.stats;
        let most = self.manager.limits.requests_per_connection;
        if most > 0 && self.requests.get() >= most {
            // HTTP/2 goes on to count; the first time is the one that matters.
            if protocol != Protocol::Http2 || self.requests.get() == most {
                stats.cx_max_requests_reached.inc();
            }
            return Fate::Ends;
        }
        if !self.closing.get() {
            if self.drains.iter().any(|(drain, _)| drain.should_close()) {
                stats.cx_drain_close.inc();
            } else if self.is_old() {
                self.old.set(true);
                stats.cx_max_duration_reached.inc();
            } else {
                return Fate::Stays;
            }
            self.close_gracefully(Instant::now());
        }
        match self.gone_by.get() {
            Some(by) if by > Instant::now() => Fate::Leaves,
            _ => Fate::Ends,
        }
    }

    fn is_old(&self) -> bool {
        self.manager
            .limits
            .connection_duration
            .is_some_and(|limit| self.info.started.elapsed() >= limit)
    }

    /// Ends the connection after the streams it has; a peer that does not go by itself is waited for
    /// as long as `drain_timeout` says.
    pub(super) fn close_gracefully(&self, now: Instant) {
        if !self.closing.replace(true) {
            self.gone_by.set(Some(now + self.manager.limits.drain));
        }
    }

    /// The time to go by itself is over and has been acted on.
    pub(super) fn forget_gone(&self) {
        self.gone_by.set(None);
    }

    /// Ready when the clock or a drain ends the connection, or begins to. `head_since` is when the first byte
    /// of an incomplete head came.
    pub(super) fn poll_end(
        &self,
        head_since: Option<Instant>,
        deadline: &mut Deadline,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        let stats = &self.manager.stats;
        let limits = &self.manager.limits;
        loop {
            let idle = self.active.get() == 0 && head_since.is_none();
            let head_end = limits
                .head
                .zip(head_since)
                .map(|(limit, since)| since + limit);
            let idle_end = limits
                .connection_idle
                .filter(|_| idle && !self.closing.get())
                .map(|limit| self.idle_since.get() + limit);
            let old_at = limits
                .connection_duration
                .filter(|_| !self.old.get())
                .map(|limit| self.info.started + limit);
            let drained_at = if self.closing.get() {
                None
            } else {
                self.drains
                    .iter()
                    .filter_map(|(drain, watch)| {
                        watch.register(cx);
                        drain.deadline()
                    })
                    .min()
            };
            let gone_by = self.gone_by.get();
            let next = [head_end, idle_end, old_at, drained_at, gone_by]
                .into_iter()
                .flatten()
                .min();
            let Some(next) = next else {
                deadline.clear();
                return Poll::Pending;
            };
            deadline.set(next);
            ready!(deadline.poll(cx));
            let now = Instant::now();
            let is_over = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            if is_over(head_end) {
                return Poll::Ready(End::Head);
            }
            if is_over(gone_by) {
                return Poll::Ready(End::Gone);
            }
            if is_over(old_at) {
                self.old.set(true);
                stats.cx_max_duration_reached.inc();
                self.close_gracefully(now);
                return Poll::Ready(End::Closing);
            }
            if is_over(idle_end) {
                stats.cx_idle_timeout.inc();
                self.close_gracefully(now);
                return Poll::Ready(End::Closing);
            }
            if is_over(drained_at) {
                self.close_gracefully(now);
                // The time to go by itself was the drain.
                self.gone_by.set(Some(now));
                return Poll::Ready(End::Closing);
            }
        }
    }
}

impl ConnectionManager {
    /// Serves a connection to its end. `input` is what was read of it already; `drains` are those of the
    /// process and of the listener.
    pub fn serve(
        self: Arc<Self>,
        io: Transport,
        input: BytesMut,
        info: Rc<ConnectionInfo>,
        drains: Vec<Drain>,
    ) -> impl Future<Output = ()> {
        let tls = info.tls.is_some();
        let cx = Rc::new(ConnectionContext::new(self.clone(), info, drains));
        let mut start = Start { io, input };
        // As small as can be: it is there as long as the connection.
        async move {
            let _open = Open::new(&self, tls);
            let Some(speaks_h2) = boxed(|| start.sniff(&cx)).await else {
                return;
            };
            let stats = &self.stats;
            let (total, active) = if speaks_h2 {
                (&stats.cx_http2_total, &stats.cx_http2_active)
            } else {
                (&stats.cx_http1_total, &stats.cx_http1_active)
            };
            total.inc();
            let _active = Active::new(active);
            if speaks_h2 {
                boxed(|| h2::serve(cx, start.io, start.input)).await;
            } else {
                boxed(|| h1::serve(cx, start.io, start.input)).await;
            }
        }
    }
}

/// A connection before it is known which HTTP it speaks.
struct Start {
    io: Transport,
    input: BytesMut,
}

impl Start {
    /// Whether HTTP/2 is spoken; `None` when the peer said nothing in time, or left.
    async fn sniff(&mut self, cx: &ConnectionContext) -> Option<bool> {
        let alpn = cx.info.tls.as_ref().and_then(|tls| tls.alpn.as_deref());
        match (cx.manager.codec(), alpn) {
            (CodecType::Http1, _) => return Some(false),
            (CodecType::Http2, _) | (_, Some(b"h2")) => return Some(true),
            (_, Some(_)) => return Some(false),
            _ => {}
        }
        let mut deadline = Deadline::default();
        let mut since = None;
        poll_fn(|task| self.poll_sniff(cx, &mut deadline, &mut since, task)).await
    }

    fn poll_sniff(
        &mut self,
        cx: &ConnectionContext,
        deadline: &mut Deadline,
        since: &mut Option<Instant>,
        task: &mut Context<'_>,
    ) -> Poll<Option<bool>> {
        let stats = &cx.manager.stats;
        loop {
            if !PREFACE.starts_with(&self.input[..self.input.len().min(PREFACE.len())]) {
                return Poll::Ready(Some(false));
            }
            if self.input.len() >= PREFACE.len() {
                return Poll::Ready(Some(true));
            }
            let read = match self.io.poll_readable(task) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Err(_)) => return Poll::Ready(None),
                Poll::Ready(Ok(())) => {
                    if self.input.capacity() == 0 {
                        self.input = stock::get();
                    }
                    self.io.poll_read(task, &mut self.input)
                }
            };
            match read {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(None),
                Poll::Ready(Ok(n)) => {
                    stats.cx_rx_bytes_total.add(n as u64);
                    since.get_or_insert_with(Instant::now);
                }
                // Saying nothing is idling; a preface that trickles in is a head that does.
                Poll::Pending => match ready!(cx.poll_end(*since, deadline, task)) {
                    // Who has said nothing has nothing to wait for.
                    End::Closing if since.is_none() => {
                        stats.cx_destroy_local.inc();
                        return Poll::Ready(None);
                    }
                    End::Closing => {}
                    End::Head | End::Gone => {
                        stats.cx_destroy_local.inc();
                        return Poll::Ready(None);
                    }
                },
            }
        }
    }
}

/// Counts an open connection as long as it lives.
struct Open<'a> {
    manager: &'a ConnectionManager,
    tls: bool,
    since: Instant,
}

impl<'a> Open<'a> {
    fn new(manager: &'a ConnectionManager, tls: bool) -> Open<'a> {
        manager.stats.cx_total.inc();
        manager.stats.cx_active.inc();
        if tls {
            manager.stats.cx_ssl_total.inc();
            manager.stats.cx_ssl_active.inc();
        }
        Open {
            manager,
            tls,
            since: Instant::now(),
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let stats = &self.manager.stats;
        stats.cx_active.dec();
        stats.cx_destroy.inc();
        if self.tls {
            stats.cx_ssl_active.dec();
        }
        let lived = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        stats.cx_length_ms.record(lived);
    }
}

/// A gauge that is one higher as long as this lives.
pub(super) struct Active<'a>(&'a Gauge);

impl<'a> Active<'a> {
    pub(super) fn new(gauge: &'a Gauge) -> Active<'a> {
        gauge.inc();
        Active(gauge)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
