//! One downstream connection: which HTTP it speaks, how long it may live, how it drains.

use std::{
    cell::Cell,
    future::Future,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use lateen_protocols::envoy::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::CodecType;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, Sleep, sleep, sleep_until, timeout_at},
};

use super::{ConnectionManager, stream};
use crate::{drain::Drain, head::Protocol, info::ConnectionInfo, rewind::Rewind, stats::Counter};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the streams of one connection share.
#[derive(Debug)]
pub struct ConnectionContext {
    pub(super) manager: Arc<ConnectionManager>,
    pub(super) info: Rc<ConnectionInfo>,
    drains: Vec<Drain>,
    signals: Arc<Signals>,
    active: Cell<usize>,
    requests: Cell<u64>,
    idle_since: Cell<Instant>,
}

/// Between the byte stream (which hyper wants `Send`) and the connection's loop.
#[derive(Debug, Default)]
struct Signals {
    /// Bytes of a head are coming in while no request is served.
    head_started: AtomicBool,
    /// The connection is to end after the streams it has.
    closing: AtomicBool,
    changed: Notify,
}

impl ConnectionContext {
    pub(super) fn stream_began(&self) {
        self.signals.head_started.store(false, Ordering::Relaxed);
        self.active.set(self.active.get() + 1);
        self.requests.set(self.requests.get() + 1);
    }

    pub(super) fn stream_ended(&self) {
        self.active.set(self.active.get().saturating_sub(1));
        self.idle_since.set(Instant::now());
        // What came in meanwhile was the body.
        self.signals.head_started.store(false, Ordering::Relaxed);
        self.signals.changed.notify_one();
    }

    /// Whether the connection should end after the present response.
    pub(super) fn closes_after(&self, protocol: Protocol) -> bool {
        let stats = &self.manager.stats;
        let most = self.manager.limits.requests_per_connection;
        if most > 0 && self.requests.get() >= most {
            // HTTP/2 goes on to count; the first time is the one that matters.
            if protocol != Protocol::Http2 || self.requests.get() == most {
                stats.cx_max_requests_reached.inc();
            }
            return true;
        }
        let draining = self.drains.iter().any(Drain::should_close);
        if draining {
            stats.cx_drain_close.inc();
        }
        draining || self.signals.closing.load(Ordering::Relaxed)
    }

    /// Ends the connection after the streams it has (GOAWAY).
    pub(super) fn close_gracefully(&self) {
        if !self.signals.closing.swap(true, Ordering::Relaxed) {
            self.signals.changed.notify_one();
        }
    }
}

impl ConnectionManager {
    /// Serves a connection to its end. `drains` are those of the process and of the listener.
    pub async fn serve<S>(self: Arc<Self>, stream: S, info: Rc<ConnectionInfo>, drains: Vec<Drain>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _open = Open::new(&self, info.tls.is_some());
        let signals = Arc::new(Signals::default());
        let mut stream = Metered {
            inner: stream,
            received: self.stats.cx_rx_bytes_total.clone(),
            sent: self.stats.cx_tx_bytes_total.clone(),
            signals: signals.clone(),
            patience: self.limits.stream_idle,
            stalled: None,
        };
        let Some((h2, prefix)) = self.sniff(&mut stream, &info).await else {
            return;
        };
        let stream = TokioIo::new(Rewind::new(prefix, stream));
        let cx = Rc::new(ConnectionContext {
            manager: self.clone(),
            info,
            drains,
            signals,
            active: Cell::new(0),
            requests: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
        });
        let service = {
            let cx = cx.clone();
            service_fn(move |request| stream::serve(cx.clone(), request))
        };
        let limits = &self.limits;
        let result = if h2 {
            self.stats.cx_http2_total.inc();
            let _active = Active::new(&self.stats.cx_http2_active);
            let mut builder = http2::Builder::new(LocalExecutor);
            builder
                .timer(TokioTimer::new())
                .max_header_list_size(limits.headers_bytes)
                .max_concurrent_streams(limits.concurrent_streams)
                .initial_stream_window_size(limits.stream_window)
                .initial_connection_window_size(limits.connection_window);
            if let Some((interval, timeout)) = limits.keepalive {
                builder
                    .keep_alive_interval(interval)
                    .keep_alive_timeout(timeout);
            }
            let connection = builder.serve_connection(stream, service);
            // HTTP/2 has frames that begin no head, and its streams have limits of their own.
            drive(&cx, connection, None, http2::Connection::graceful_shutdown).await
        } else {
            self.stats.cx_http1_total.inc();
            let _active = Active::new(&self.stats.cx_http1_active);
            let headers = limits.headers_bytes as usize;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                // Ours is in `drive`: hyper's would also end connections that merely wait.
                .header_read_timeout(None)
                .max_headers(limits.headers_count as usize)
                .max_header_size(headers)
                // hyper wants at least 8 KiB; the buffer must hold a whole head.
                .max_buf_size(headers.max(8 * 1024) + 8 * 1024)
                .half_close(false)
                .serve_connection(stream, service)
                .with_upgrades();
            drive(
                &cx,
                connection,
                limits.head,
                http1::UpgradeableConnection::graceful_shutdown,
            )
            .await
        };
        if let Err(error) = result {
            if error.is_parse() {
                self.stats.cx_protocol_error.inc();
            }
            tracing::debug!(%error, connection = cx.info.id, "downstream connection failed");
        }
    }

    /// Finds out whether HTTP/2 is spoken; gives what was read for it. `None` if the peer said nothing in time.
    async fn sniff<S: AsyncRead + Unpin>(
        &self,
        stream: &mut S,
        info: &ConnectionInfo,
    ) -> Option<(bool, bytes::Bytes)> {
        let alpn = info.tls.as_ref().and_then(|tls| tls.alpn.as_deref());
        match (self.codec(), alpn) {
            (CodecType::Http1, _) => return Some((false, bytes::Bytes::new())),
            (CodecType::Http2, _) | (_, Some(b"h2")) => return Some((true, bytes::Bytes::new())),
            _ => {}
        }
        let mut read = BytesMut::with_capacity(1024);
        let opened = Instant::now();
        while read.len() < PREFACE.len() && PREFACE.starts_with(&read) {
            // Saying nothing is idling; a preface that trickles in is a head that does.
            let limit = if read.is_empty() {
                self.limits.connection_idle
            } else {
                self.limits.head
            };
            let next = stream.read_buf(&mut read);
            let result = match limit {
                Some(limit) => timeout_at(opened + limit, next).await,
                None => Ok(next.await),
            };
            match result {
                Ok(Ok(0) | Err(_)) => return None,
                Ok(Ok(_)) => {}
                Err(_) => {
                    self.stats.cx_idle_timeout.inc();
                    return None;
                }
            }
        }
        Some((read.starts_with(PREFACE), read.freeze()))
    }
}

/// Drives a connection to its end, closing it when it is idle, old, or told to.
async fn drive<F>(
    cx: &ConnectionContext,
    connection: F,
    head_limit: Option<Duration>,
    graceful: impl Fn(Pin<&mut F>),
) -> hyper::Result<()>
where
    F: Future<Output = hyper::Result<()>>,
{
    let stats = &cx.manager.stats;
    let limits = &cx.manager.limits;
    let mut connection = pin!(connection);
    let mut oldest = limits
        .connection_duration
        .map(|limit| cx.info.started + limit);
    let mut head_since: Option<Instant> = None;
    let mut closing = false;
    let mut gone_by = None;
    loop {
        let now = Instant::now();
        if cx.signals.closing.load(Ordering::Relaxed) && !closing {
            closing = true;
            gone_by = Some(now + limits.drain);
            graceful(connection.as_mut());
        }
        head_since = match (
            cx.active.get(),
            cx.signals.head_started.load(Ordering::Relaxed),
        ) {
            (0, true) => Some(head_since.unwrap_or(now)),
            _ => None,
        };
        let head_end = head_limit
            .zip(head_since)
            .map(|(limit, since)| since + limit);
        let idle_end = limits
            .connection_idle
            .filter(|_| !closing && cx.active.get() == 0 && head_since.is_none())
            .map(|limit| cx.idle_since.get() + limit);
        let drained = cx.drains.iter().filter_map(Drain::deadline).min();
        if head_end.is_some_and(|at| at <= now) {
            stats.rq_header_timeout.inc();
            stats.cx_destroy_local.inc();
            return Ok(());
        }
        if !closing && idle_end.is_some_and(|at| at <= now) {
            stats.cx_idle_timeout.inc();
            stats.cx_destroy_local.inc();
            cx.close_gracefully();
            continue;
        }
        if oldest.is_some_and(|at| at <= now) {
            oldest = None;
            stats.cx_max_duration_reached.inc();
            cx.close_gracefully();
            continue;
        }
        if !closing && drained.is_some_and(|at| at <= now) {
            cx.close_gracefully();
            continue;
        }
        // A peer that does not answer our GOAWAY is not waited for once it has no streams.
        let gone_by = gone_by.filter(|_| cx.active.get() == 0);
        if gone_by.is_some_and(|at| at <= now) {
            stats.cx_destroy_local.inc();
            return Ok(());
        }
        let next = [
            head_end,
            idle_end,
            oldest,
            drained.filter(|_| !closing),
            gone_by,
        ]
        .into_iter()
        .flatten()
        .min();
        // Cancel-safe: the connection is pinned outside, the rest only wakes us to look again.
        tokio::select! {
            result = connection.as_mut() => return result,
            () = cx.signals.changed.notified() => {}
            () = wait_until(next) => {}
            () = drain_started(&cx.drains), if drained.is_none() => {}
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn drain_started(drains: &[Drain]) {
    let mut waits: Vec<_> = drains
        .iter()
        .map(|drain| Box::pin(drain.started()))
        .collect();
    if waits.is_empty() {
        return std::future::pending().await;
    }
    std::future::poll_fn(|cx| {
        match waits
            .iter_mut()
            .any(|wait| wait.as_mut().poll(cx).is_ready())
        {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}

/// Runs hyper's HTTP/2 streams on this worker.
#[derive(Clone, Copy, Debug)]
struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
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
struct Active<'a>(&'a crate::stats::Gauge);

impl<'a> Active<'a> {
    fn new(gauge: &'a crate::stats::Gauge) -> Active<'a> {
        gauge.inc();
        Active(gauge)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts bytes, notes when a head begins to come in, and gives up a peer that reads nothing.
#[derive(Debug)]
struct Metered<S> {
    inner: S,
    received: Counter,
    sent: Counter,
    signals: Arc<Signals>,
    /// How long a write may wait for the peer. While it waits nobody asks the streams for more, so their
    /// own limits do not run. Envoy: `stream_flush_timeout`, which is `stream_idle_timeout` unless given.
    patience: Option<Duration>,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Metered<S> {
    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &polled {
            self.sent.add(*n as u64);
        }
        self.patiently(cx, polled)
    }

    /// Ends a wait for the peer that has lasted too long.
    fn patiently<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match (polled, self.patience) {
            (Poll::Ready(result), _) => {
                self.stalled = None;
                Poll::Ready(result)
            }
            (Poll::Pending, None) => Poll::Pending,
            (Poll::Pending, Some(patience)) => {
                let stalled = self
                    .stalled
                    .get_or_insert_with(|| Box::pin(sleep(patience)));
                ready!(stalled.as_mut().poll(cx));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let n = buf.filled().len() - before;
        if n > 0 {
            self.received.add(n as u64);
            if !self.signals.head_started.swap(true, Ordering::Relaxed) {
                self.signals.changed.notify_one();
            }
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.wrote(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.wrote(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.patiently(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.patiently(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_is_given_up() {
        let scope = crate::stats::Registry::new().scope("x.");
        let (inner, mut peer) = tokio::io::duplex(4);
        let mut metered = Metered {
            inner,
            received: scope.counter("received"),
            sent: scope.counter("sent"),
            signals: Arc::default(),
            patience: Some(Duration::from_secs(60)),
            stalled: None,
        };
        let mut four = [0; 4];
        let (written, read) = tokio::join!(metered.write_all(b"abcdefgh"), async {
            tokio::time::sleep(Duration::from_secs(59)).await;
            peer.read_exact(&mut four).await
        });
        written.unwrap();
        read.unwrap();
        let error = metered.write_all(b"i").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(scope.counter("sent").value(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_wait_in_a_buffer_are_not_waited_for_either() {
        let scope = crate::stats::Registry::new().scope("x.");
        let (inner, _peer) = tokio::io::duplex(4);
        let mut metered = Metered {
            inner: tokio::io::BufWriter::with_capacity(64, inner),
            received: scope.counter("received"),
            sent: scope.counter("sent"),
            signals: Arc::default(),
            patience: Some(Duration::from_secs(60)),
            stalled: None,
        };
        metered.write_all(b"abcdefgh").await.unwrap();
        let error = metered.flush().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
