//! Connections of one worker to one host: HTTP/1.1 connections are lent one request at a time (the
//! last returned goes first), HTTP/2 connections are shared. Requests that find none wait in a queue.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{sync::oneshot, task::spawn_local, time::Instant};

use super::{
    connect::{ConnectError, Connected, connect},
    convert::{self, InBody, OutBody, Upgrade},
    tunnel,
};
use crate::{
    body::Body,
    circuit::{Circuit, Permit, Resource},
    cluster::{Cluster, Host, Transport},
    head::{Known, Name, RequestHead, ResponseHead},
    info::TlsInfo,
    retry::Reset,
};

/// Envoy: `max_response_headers_kb` 60, `max_headers_count` 100.
const MAX_HEADER_BYTES: usize = 60 * 1024;
const MAX_HEADERS: usize = 100;
/// Windows as large as keep a fast upstream busy over a slow network; bodies are not read ahead of the
/// downstream beyond them.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Turns of the worker's loop it takes hyper to say that a connection is free again.
const RETURNING_TURNS: usize = 2;

type H1Sender = http1::SendRequest<OutBody>;
type H2Sender = http2::SendRequest<OutBody>;

/// Which HTTP version a pool's connections speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    Http1,
    Http2,
    /// By ALPN.
    Negotiate,
}

/// Why no connection was had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A circuit breaker refused.
    Overflow,
    /// Connecting failed.
    Connect(ConnectError),
}

/// Why a request had no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SendFailure {
    pub(crate) reset: Reset,
    /// Whether bytes of it may have left.
    pub(crate) sent: bool,
    /// Whether the connection had served others before.
    pub(crate) reused: bool,
}

/// Facts of a connection, fixed once it stands.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) local: Option<SocketAddr>,
    pub(crate) tls: Option<Arc<TlsInfo>>,
    established: Instant,
    /// Bytes read so far.
    read: Arc<AtomicU64>,
    /// Version of the TLS secrets it was made with.
    secrets: u64,
}

pub(crate) struct Pool {
    cluster: Arc<Cluster>,
    host: Arc<Host>,
    sni: Option<Arc<str>>,
    wanted: Wanted,
    circuit: Arc<Circuit>,
    state: RefCell<State>,
    draining: Cell<bool>,
}

#[derive(Default)]
struct State {
    idle: Vec<Idle>,
    shared: Vec<Rc<H2>>,
    /// Connections that stand or are being made.
    open: usize,
    connecting: usize,
    waiting: VecDeque<oneshot::Sender<Result<Conn, Refusal>>>,
    /// What ALPN gave last time.
    negotiated: Option<Wanted>,
}

struct Idle {
    conn: H1,
    since: Instant,
}

struct H1 {
    sender: H1Sender,
    facts: Rc<Facts>,
    requests: u32,
}

struct H2 {
    sender: H2Sender,
    facts: Rc<Facts>,
    active: Cell<u32>,
    requests: Cell<u32>,
    /// Since when no stream is open.
    idle_since: Cell<Instant>,
    retired: Cell<bool>,
}

/// A connection for one request.
enum Conn {
    H1(Lent),
    H2(Slot),
}

/// An HTTP/1.1 connection on loan; goes back to the pool when dropped if it can serve again.
struct Lent {
    conn: Option<H1>,
    pool: Rc<Pool>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take()
            && conn.sender.is_ready()
        {
            self.pool.put_back(conn);
        }
    }
}

/// A stream of an HTTP/2 connection.
struct Slot {
    conn: Rc<H2>,
    pool: Rc<Pool>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let left = self.conn.active.get().saturating_sub(1);
        self.conn.active.set(left);
        if left == 0 {
            self.conn.idle_since.set(Instant::now());
        }
        self.pool.serve_waiting();
        if self.conn.active.get() == 0 && self.pool.draining.get() {
            self.pool.forget(&self.conn);
        }
    }
}

/// A connection to send one request on, counted against the limits.
pub(crate) struct Lease {
    conn: Conn,
    guard: RequestGuard,
}

/// Counts one request while it is under way.
struct RequestGuard {
    pool: Rc<Pool>,
    _permit: Permit,
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.pool.cluster.stats.upstream_rq_active.dec();
        self.pool.host.state.request_ended();
    }
}

/// Counts one connection while it stands.
struct ConnGuard {
    pool: Rc<Pool>,
    began: Instant,
    _permit: Permit,
}

impl ConnGuard {
    fn new(pool: Rc<Pool>, permit: Permit) -> ConnGuard {
        let stats = &pool.cluster.stats;
        stats.upstream_cx_total.inc();
        stats.upstream_cx_active.inc();
        let numbers = &pool.host.state.numbers;
        numbers.cx_total.fetch_add(1, Relaxed);
        numbers.cx_active.fetch_add(1, Relaxed);
        pool.state.borrow_mut().open += 1;
        ConnGuard {
            pool,
            began: Instant::now(),
            _permit: permit,
        }
    }
}

impl Drop for ConnGuard {
    fn drop(&mut self) {
        let stats = &self.pool.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.upstream_cx_destroy.inc();
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        stats.upstream_cx_length_ms.record(ms);
        self.pool.host.state.numbers.cx_active.fetch_sub(1, Relaxed);
        self.pool.state.borrow_mut().open -= 1;
    }
}

/// Counts one request while it waits; leaving early counts as cancelled.
struct PendingGuard<'a> {
    cluster: &'a Cluster,
    _permit: Permit,
    served: bool,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.cluster.stats.upstream_rq_pending_active.dec();
        if !self.served {
            self.cluster.stats.upstream_rq_cancelled.inc();
        }
    }
}

/// Runs hyper's tasks on this worker.
#[derive(Clone, Copy, Debug)]
struct LocalExec;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        spawn_local(async move {
            future.await;
        });
    }
}

impl Pool {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        host: Arc<Host>,
        sni: Option<Arc<str>>,
        wanted: Wanted,
        high_priority: bool,
    ) -> Rc<Pool> {
        let plain = matches!(cluster.transports.get(host.transport), Transport::Plain);
        Rc::new(Pool {
            circuit: cluster.circuits.of(high_priority).clone(),
            cluster,
            host,
            sni,
            // Without TLS there is nothing to negotiate with.
            wanted: if wanted == Wanted::Negotiate && plain {
                Wanted::Http1
            } else {
                wanted
            },
            state: RefCell::default(),
            draining: Cell::new(false),
        })
    }

    /// A connection for one request: one at hand, or one that is waited for. Dropping the future leaves
    /// the queue.
    pub(crate) async fn acquire(self: &Rc<Pool>) -> Result<Lease, Refusal> {
        for _ in 0..RETURNING_TURNS {
            if let Some(conn) = self.at_hand() {
                return self.lease(conn);
            }
            if !self.has_busy_h1() {
                break;
            }
            // A response may have been read to its end just now, and its connection be on its way back.
            tokio::task::yield_now().await;
        }
        if let Some(conn) = self.at_hand() {
            return self.lease(conn);
        }
        let stats = &self.cluster.stats;
        let Some(permit) = self.circuit.try_acquire(Resource::Pending) else {
            stats.upstream_rq_pending_overflow.inc();
            return Err(Refusal::Overflow);
        };
        stats.upstream_rq_pending_total.inc();
        stats.upstream_rq_pending_active.inc();
        let mut pending = PendingGuard {
            cluster: &self.cluster,
            _permit: permit,
            served: false,
        };
        let (sender, receiver) = oneshot::channel();
        self.state.borrow_mut().waiting.push_back(sender);
        self.open_enough();
        let served = receiver.await;
        pending.served = true;
        drop(pending);
        match served {
            Ok(Ok(conn)) => self.lease(conn),
            Ok(Err(refusal)) => {
                stats.upstream_rq_pending_failure_eject.inc();
                Err(refusal)
            }
            // The pool answers everybody who waits; only the end of the worker can cut this.
            Err(_) => Err(Refusal::Overflow),
        }
    }

    /// Closes what is idle, and the rest when it has finished.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
        let mut state = self.state.borrow_mut();
        let idle = std::mem::take(&mut state.idle);
        let shared = std::mem::take(&mut state.shared);
        drop(state);
        // Dropped without the borrow: that may call back into the pool.
        drop((idle, shared));
    }

    /// Closes connections that were unused for too long, are too old, or carry old credentials.
    pub(crate) fn sweep(&self) {
        let config = &self.cluster.config;
        let too_idle = |since: Instant| {
            config
                .idle_timeout
                .is_some_and(|limit| since.elapsed() >= limit)
        };
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let mut index = 0;
        while index < state.idle.len() {
            let idle = &state.idle[index];
            let timed_out = too_idle(idle.since);
            if timed_out || idle.conn.sender.is_closed() || self.is_worn(&idle.conn.facts) {
                if timed_out {
                    self.cluster.stats.upstream_cx_idle_timeout.inc();
                }
                closed.push(state.idle.remove(index));
            } else {
                index += 1;
            }
        }
        let mut shared = Vec::new();
        state.shared.retain(|conn| {
            let timed_out = conn.active.get() == 0 && too_idle(conn.idle_since.get());
            if timed_out {
                self.cluster.stats.upstream_cx_idle_timeout.inc();
            }
            let keep = !timed_out && !conn.sender.is_closed() && !self.is_worn(&conn.facts);
            if !keep {
                shared.push(conn.clone());
            }
            keep
        });
        drop(state);
        drop((closed, shared));
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    fn at_hand(self: &Rc<Pool>) -> Option<Conn> {
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let mut found = None;
        if let Some(conn) = self.free_shared(&state) {
            found = Some(self.share(conn));
        }
        while found.is_none() {
            let Some(idle) = state.idle.pop() else { break };
            if idle.conn.sender.is_ready() && !self.is_worn(&idle.conn.facts) {
                found = Some(Conn::H1(Lent {
                    conn: Some(idle.conn),
                    pool: self.clone(),
                }));
            } else {
                closed.push(idle);
            }
        }
        drop(state);
        drop(closed);
        found
    }

    fn has_busy_h1(&self) -> bool {
        let state = self.state.borrow();
        state.open > state.idle.len() + state.shared.len() + state.connecting
    }

    fn free_shared(&self, state: &State) -> Option<Rc<H2>> {
        let limit = self.cluster.config.http2.max_concurrent_streams;
        state
            .shared
            .iter()
            .find(|conn| {
                conn.active.get() < limit
                    && !conn.retired.get()
                    && conn.sender.is_ready()
                    && !self.is_worn(&conn.facts)
            })
            .cloned()
    }

    fn share(self: &Rc<Pool>, conn: Rc<H2>) -> Conn {
        conn.active.set(conn.active.get() + 1);
        Conn::H2(Slot {
            conn,
            pool: self.clone(),
        })
    }

    fn is_worn(&self, facts: &Facts) -> bool {
        let old = self.cluster.config.max_connection_duration;
        old.is_some_and(|limit| facts.established.elapsed() >= limit)
            // A rotated certificate is used from the next connection on; requests move over at once.
            || facts.secrets != self.secrets_version()
    }

    fn secrets_version(&self) -> u64 {
        match self.cluster.transports.get(self.host.transport) {
            Transport::Plain => 0,
            Transport::Tls(context) => context.version(),
        }
    }

    fn lease(self: &Rc<Pool>, conn: Conn) -> Result<Lease, Refusal> {
        let stats = &self.cluster.stats;
        let Some(permit) = self.circuit.try_acquire(Resource::Requests) else {
            return Err(Refusal::Overflow);
        };
        stats.upstream_rq_total.inc();
        stats.upstream_rq_active.inc();
        self.host.state.request_began();
        let guard = RequestGuard {
            pool: self.clone(),
            _permit: permit,
        };
        Ok(Lease { conn, guard })
    }

    fn put_back(self: &Rc<Pool>, conn: H1) {
        let max = self.cluster.config.max_requests_per_connection;
        if max.is_some_and(|max| conn.requests >= max) {
            self.cluster.stats.upstream_cx_max_requests.inc();
        } else if !self.draining.get() && !self.is_worn(&conn.facts) {
            self.offer_h1(conn);
            return;
        }
        drop(conn);
        self.open_enough();
    }

    /// Gives a free connection to who waits longest, or keeps it.
    fn offer_h1(self: &Rc<Pool>, conn: H1) {
        let mut lent = Lent {
            conn: Some(conn),
            pool: self.clone(),
        };
        loop {
            let waiter = self.state.borrow_mut().waiting.pop_front();
            let Some(waiter) = waiter else { break };
            match waiter.send(Ok(Conn::H1(lent))) {
                Ok(()) => return,
                Err(Ok(Conn::H1(back))) => lent = back,
                Err(_) => return,
            }
        }
        if let Some(conn) = lent.conn.take()
            && !self.draining.get()
        {
            let since = Instant::now();
            self.state.borrow_mut().idle.push(Idle { conn, since });
        }
    }

    fn forget(&self, conn: &Rc<H2>) {
        self.state
            .borrow_mut()
            .shared
            .retain(|other| !Rc::ptr_eq(other, conn));
    }

    /// Gives free streams to who waits, and makes connections for the others.
    fn serve_waiting(self: &Rc<Pool>) {
        loop {
            let mut state = self.state.borrow_mut();
            state.waiting.retain(|waiter| !waiter.is_closed());
            if state.waiting.is_empty() {
                return;
            }
            let Some(conn) = self.free_shared(&state) else {
                break;
            };
            let Some(waiter) = state.waiting.pop_front() else {
                break;
            };
            drop(state);
            // If the waiter left meanwhile the slot comes back as an error and is freed by its drop.
            drop(waiter.send(Ok(self.share(conn))));
        }
        self.open_enough();
    }

    /// Makes as many connections as those who wait need and the breaker allows.
    fn open_enough(self: &Rc<Pool>) {
        loop {
            let mut state = self.state.borrow_mut();
            state.waiting.retain(|waiter| !waiter.is_closed());
            let enough = match (self.wanted, state.negotiated) {
                (Wanted::Http1, _) | (Wanted::Negotiate, Some(Wanted::Http1)) => {
                    state.waiting.len()
                }
                _ => state.waiting.len().min(1),
            };
            if state.connecting >= enough {
                return;
            }
            let permit = match self.circuit.try_acquire(Resource::Connections) {
                Some(permit) => permit,
                None => {
                    self.cluster.stats.upstream_cx_overflow.inc();
                    // Connections of others may fill the limit; without one of its own this pool would
                    // never serve those who wait. Envoy does the same.
                    if state.open > 0 {
                        return;
                    }
                    self.circuit.acquire_beyond(Resource::Connections)
                }
            };
            state.connecting += 1;
            drop(state);
            let guard = ConnGuard::new(self.clone(), permit);
            spawn_local(self.clone().establish(guard));
        }
    }

    async fn establish(self: Rc<Pool>, guard: ConnGuard) {
        let secrets = self.secrets_version();
        let alpn = self.alpn();
        let connected = connect(
            &self.cluster,
            &self.host,
            self.sni.as_deref(),
            alpn.as_deref(),
        )
        .await;
        let connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                self.state.borrow_mut().connecting -= 1;
                drop(guard);
                let waiting = std::mem::take(&mut self.state.borrow_mut().waiting);
                for waiter in waiting {
                    // Who left does not mind.
                    drop(waiter.send(Err(Refusal::Connect(error.clone()))));
                }
                return;
            }
        };
        let version = self.version_of(&connected);
        self.state.borrow_mut().negotiated = Some(version);
        let facts = Rc::new(Facts {
            local: connected.local,
            tls: connected.tls.clone(),
            established: Instant::now(),
            read: connected.read.clone(),
            secrets,
        });
        let stood = match version {
            Wanted::Http2 => self.start_h2(connected, facts, guard).await,
            Wanted::Http1 | Wanted::Negotiate => self.start_h1(connected, facts, guard).await,
        };
        if let Err(error) = stood {
            tracing::debug!(cluster = &*self.cluster.name, host = %self.host.address, %error, "handshake failed");
            self.state.borrow_mut().connecting -= 1;
            let waiting = std::mem::take(&mut self.state.borrow_mut().waiting);
            for waiter in waiting {
                let refusal = Refusal::Connect(ConnectError::Refused(error.to_string()));
                drop(waiter.send(Err(refusal)));
            }
        }
    }

    fn alpn(&self) -> Option<Vec<Vec<u8>>> {
        match self.cluster.transports.get(self.host.transport) {
            Transport::Tls(context) if context.alpn().is_empty() => match self.wanted {
                Wanted::Http1 => None,
                Wanted::Http2 => Some(vec![b"h2".to_vec()]),
                Wanted::Negotiate => Some(vec![b"h2".to_vec(), b"http/1.1".to_vec()]),
            },
            _ => None,
        }
    }

    fn version_of(&self, connected: &Connected) -> Wanted {
        if self.wanted != Wanted::Negotiate {
            return self.wanted;
        }
        let alpn = connected.tls.as_ref().and_then(|tls| tls.alpn.as_deref());
        if matches!(alpn, Some(b"h2" | b"istio-h2")) {
            Wanted::Http2
        } else {
            Wanted::Http1
        }
    }

    async fn start_h1(
        self: &Rc<Pool>,
        connected: Connected,
        facts: Rc<Facts>,
        guard: ConnGuard,
    ) -> Result<(), hyper::Error> {
        let max = self.cluster.config.max_response_headers;
        let mut builder = http1::Builder::new();
        builder
            .max_headers(
                max.and_then(|max| usize::try_from(max).ok())
                    .unwrap_or(MAX_HEADERS),
            )
            .max_header_size(MAX_HEADER_BYTES)
            .allow_obsolete_multiline_headers_in_responses(true);
        let (sender, connection) = builder.handshake(TokioIo::new(connected.stream)).await?;
        self.cluster.stats.upstream_cx_http1_total.inc();
        let pool = self.clone();
        spawn_local(async move {
            // Errors reach whoever waits for an answer.
            drop(connection.with_upgrades().await);
            pool.ended(guard);
        });
        self.state.borrow_mut().connecting -= 1;
        self.offer_h1(H1 {
            sender,
            facts,
            requests: 0,
        });
        Ok(())
    }

    async fn start_h2(
        self: &Rc<Pool>,
        connected: Connected,
        facts: Rc<Facts>,
        guard: ConnGuard,
    ) -> Result<(), hyper::Error> {
        let options = &self.cluster.config.http2;
        let mut builder = http2::Builder::new(LocalExec);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(options.stream_window.unwrap_or(STREAM_WINDOW))
            .initial_connection_window_size(options.connection_window.unwrap_or(CONNECTION_WINDOW))
            .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).unwrap_or(u32::MAX));
        if let Some((interval, timeout)) = options.keepalive {
            builder
                .keep_alive_interval(interval)
                .keep_alive_timeout(timeout)
                .keep_alive_while_idle(true);
        }
        let (sender, connection) = builder.handshake(TokioIo::new(connected.stream)).await?;
        self.cluster.stats.upstream_cx_http2_total.inc();
        let pool = self.clone();
        spawn_local(async move {
            // Errors reach whoever waits for an answer.
            drop(connection.await);
            pool.ended(guard);
        });
        let mut state = self.state.borrow_mut();
        state.connecting -= 1;
        let conn = Rc::new(H2 {
            sender,
            facts,
            active: Cell::new(0),
            requests: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            retired: Cell::new(false),
        });
        state.shared.push(conn.clone());
        drop(state);
        self.serve_waiting();
        if conn.active.get() == 0 && self.draining.get() {
            self.forget(&conn);
        }
        Ok(())
    }

    /// A connection is gone.
    fn ended(self: Rc<Pool>, guard: ConnGuard) {
        drop(guard);
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let mut index = 0;
        while index < state.idle.len() {
            if state.idle[index].conn.sender.is_closed() {
                closed.push(state.idle.remove(index));
            } else {
                index += 1;
            }
        }
        let mut shared = Vec::new();
        state.shared.retain(|conn| {
            let keep = !conn.sender.is_closed();
            if !keep {
                shared.push(conn.clone());
            }
            keep
        });
        drop(state);
        drop((closed, shared));
        self.open_enough();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("cluster", &self.cluster.name)
            .field("host", &self.host.address)
            .field("open", &self.state.borrow().open)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({:?})", self.guard.pool)
    }
}

impl Lease {
    pub(crate) fn facts(&self) -> Option<Rc<Facts>> {
        match &self.conn {
            Conn::H1(lent) => lent.conn.as_ref().map(|conn| conn.facts.clone()),
            Conn::H2(slot) => Some(slot.conn.facts.clone()),
        }
    }

    /// Sends a request and waits for the head of the answer. For an upgrade, `body` is sent only once the
    /// upstream has agreed. Dropping the future resets the stream.
    pub(crate) async fn send(
        self,
        head: &RequestHead,
        body: Body,
    ) -> Result<(ResponseHead, Body), SendFailure> {
        let Lease { conn, guard } = self;
        match conn {
            Conn::H1(lent) => send_h1(lent, guard, head, body).await,
            Conn::H2(slot) => send_h2(slot, guard, head, body).await,
        }
    }
}

/// A head that HTTP forbids: nothing was sent, and nothing would change if it were tried again.
const UNSENDABLE: SendFailure = SendFailure {
    reset: Reset::Local,
    sent: false,
    reused: false,
};

async fn send_h1(
    mut lent: Lent,
    guard: RequestGuard,
    head: &RequestHead,
    body: Body,
) -> Result<(ResponseHead, Body), SendFailure> {
    let upgrade = Upgrade::of(head);
    let (sent_body, later) = if upgrade == Upgrade::None {
        (body, None)
    } else {
        (Body::empty(), Some(body))
    };
    let Ok(request) = convert::request(head, sent_body, false) else {
        return Err(UNSENDABLE);
    };
    let Some(conn) = lent.conn.as_mut() else {
        return Err(UNSENDABLE);
    };
    let reused = conn.requests > 0;
    conn.requests += 1;
    let read_before = conn.facts.read.load(Relaxed);
    let response = match conn.sender.try_send_request(request).await {
        Ok(response) => response,
        Err(mut error) => {
            let sent = error.take_message().is_none();
            let mut reset = convert::reset(error.error());
            if reset == Reset::Termination && conn.facts.read.load(Relaxed) != read_before {
                // It ended in the midst of the head.
                reset = Reset::Protocol;
            }
            return Err(SendFailure {
                reset,
                sent,
                reused,
            });
        }
    };
    let switched = match upgrade {
        Upgrade::None => false,
        Upgrade::Protocol => response.status() == http::StatusCode::SWITCHING_PROTOCOLS,
        Upgrade::Connect => response.status().is_success(),
    };
    if !switched && response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
        // Nobody asked for it.
        return Err(SendFailure {
            reset: Reset::Protocol,
            sent: true,
            reused,
        });
    }
    if response
        .headers()
        .contains_key(http::header::CONTENT_LENGTH)
        && response
            .headers()
            .contains_key(http::header::TRANSFER_ENCODING)
    {
        // Two answers to where the body ends: RFC 9112 §6.3 calls it an attempt at smuggling.
        return Err(SendFailure {
            reset: Reset::Protocol,
            sent: true,
            reused,
        });
    }
    if switched {
        return Ok(tunnelled(
            response,
            later.unwrap_or_default(),
            (guard, lent),
        ));
    }
    // The connection is free again when the response has been read (and the request written) to the
    // end; until then the loan is in this task's hands. It fails, and closes, when the body is dropped.
    spawn_local(async move {
        if let Some(conn) = lent.conn.as_mut()
            && conn.sender.ready().await.is_err()
        {
            // Closed: not to be lent again.
            drop(lent.conn.take());
        }
    });
    Ok(answered(response, guard))
}

async fn send_h2(
    slot: Slot,
    guard: RequestGuard,
    head: &RequestHead,
    body: Body,
) -> Result<(ResponseHead, Body), SendFailure> {
    let upgrade = Upgrade::of(head);
    let (sent_body, later) = if upgrade == Upgrade::None {
        (body, None)
    } else {
        (Body::empty(), Some(body))
    };
    let Ok(request) = convert::request(head, sent_body, true) else {
        return Err(UNSENDABLE);
    };
    let conn = &slot.conn;
    let reused = conn.requests.get() > 0;
    conn.requests.set(conn.requests.get() + 1);
    if slot
        .pool
        .cluster
        .config
        .max_requests_per_connection
        .is_some_and(|max| conn.requests.get() >= max)
    {
        slot.pool.cluster.stats.upstream_cx_max_requests.inc();
        conn.retired.set(true);
        slot.pool
            .state
            .borrow_mut()
            .shared
            .retain(|other| !Rc::ptr_eq(other, conn));
    }
    let sending = conn.sender.clone().try_send_request(request);
    let mut response = match sending.await {
        Ok(response) => response,
        Err(mut error) => {
            let sent = error.take_message().is_none();
            return Err(SendFailure {
                reset: convert::reset(error.error()),
                sent,
                reused,
            });
        }
    };
    if upgrade != Upgrade::None && response.status().is_success() {
        if upgrade == Upgrade::Protocol {
            *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
            let (mut answer, body) = tunnelled(response, later.unwrap_or_default(), (guard, slot));
            if let Some(protocol) = head.headers.known(Known::Upgrade) {
                answer.headers.set(Name::Known(Known::Upgrade), protocol);
            }
            return Ok((answer, body));
        }
        return Ok(tunnelled(
            response,
            later.unwrap_or_default(),
            (guard, slot),
        ));
    }
    Ok(answered(response, (guard, slot)))
}

fn answered<H: Unpin + 'static>(
    response: http::Response<hyper::body::Incoming>,
    held: H,
) -> (ResponseHead, Body) {
    let (parts, incoming) = response.into_parts();
    let head = convert::response(&parts);
    if http_body::Body::is_end_stream(&incoming) {
        return (head, Body::empty());
    }
    let body = Body::stream(InBody {
        incoming,
        _held: held,
    });
    (head, body)
}

fn tunnelled<H: 'static>(
    mut response: http::Response<hyper::body::Incoming>,
    downstream: Body,
    held: H,
) -> (ResponseHead, Body) {
    let upgrade = hyper::upgrade::on(&mut response);
    let (parts, _) = response.into_parts();
    (
        convert::response(&parts),
        tunnel::open(upgrade, downstream, held),
    )
}

/// How often idle connections are looked through.
pub(crate) const SWEEP: Duration = Duration::from_secs(1);
