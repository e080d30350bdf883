//! Connections of one worker to one host: HTTP/1.1 connections are lent one request at a time (the
//! last returned goes first), HTTP/2 connections are shared. Requests that find none wait in a queue.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{sync::oneshot, task::spawn_local, time::Instant};

use super::{
    connect::{ConnectError, Connected, connect},
    h1,
    h2::{self, Slot},
};
use crate::{
    body::Body,
    circuit::{Circuit, Permit, Resource},
    clock,
    cluster::{Cluster, Host, Transport},
    head::{Protocol, RequestHead, ResponseHead},
    info::{OriginalSrc, TlsInfo},
    retry::Reset,
    timer::Deadline,
};

/// How often pools are looked through for connections that are worn.
pub(crate) const SWEEP: Duration = Duration::from_secs(1);

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

/// A head that HTTP forbids: nothing was sent, and nothing would change if it were tried again.
pub(super) const UNSENDABLE: SendFailure = SendFailure {
    reset: Reset::Local,
    sent: false,
    reused: false,
};

/// Is told of each `1xx` response before the final one.
pub(crate) type OnInformational<'a> = &'a dyn Fn(ResponseHead);

/// Facts of a connection, fixed once it stands.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) local: Option<SocketAddr>,
    pub(crate) tls: Option<Arc<TlsInfo>>,
    established: Instant,
    /// Version of the TLS secrets it was made with.
    secrets: u64,
}

pub(crate) struct Pool {
    pub(super) cluster: Arc<Cluster>,
    host: Arc<Host>,
    sni: Option<Arc<str>>,
    /// Where its connections are to come from.
    source: Option<OriginalSrc>,
    wanted: Wanted,
    circuit: Arc<Circuit>,
    state: RefCell<State>,
    /// Connections that stand or are being made.
    open: Rc<Cell<usize>>,
    draining: Cell<bool>,
    /// Streams at once that the host allowed on its last HTTP/2 connection: what is sent on the next one
    /// before its settings come must not be refused.
    pub(super) peer_streams: Cell<u32>,
}

#[derive(Default)]
struct State {
    /// The longest unused first.
    idle: Vec<Idle>,
    shared: Vec<Rc<h2::Conn>>,
    connecting: usize,
    waiting: VecDeque<oneshot::Sender<Result<Conn, Refusal>>>,
    /// What ALPN gave last time.
    negotiated: Option<Wanted>,
    watcher: Watcher,
}

struct Idle {
    conn: Box<h1::Conn>,
    since: Instant,
}

/// The task that notices when idle connections end or have been idle too long.
#[derive(Default)]
struct Watcher {
    started: bool,
    /// Set once it runs. Whoever puts a connection back registers it for the watcher, which need not run for that.
    waker: Option<Waker>,
    deadline: Deadline,
    armed: bool,
}

/// A connection for one request.
enum Conn {
    H1(Loan),
    H2(Slot),
}

/// An HTTP/1.1 connection on loan. Dropped after it was used it is closed; see [`Loan::give_back`].
pub(super) struct Loan {
    conn: Option<Box<h1::Conn>>,
    pool: Rc<Pool>,
    used: bool,
}

impl Loan {
    /// The connection, to be used: from now on the peer may have seen bytes.
    pub(super) fn begin(&mut self) -> Option<&mut h1::Conn> {
        self.used = true;
        self.conn.as_deref_mut()
    }

    pub(super) fn conn(&mut self) -> Option<&mut h1::Conn> {
        self.conn.as_deref_mut()
    }

    pub(super) fn held(&self) -> Option<&h1::Conn> {
        self.conn.as_deref()
    }

    /// The exchange ended as it should and the connection can serve again.
    pub(super) fn give_back(mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.put_back(conn);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let Some(conn) = self.conn.take() else {
            return;
        };
        if self.used {
            conn.guard.closes_with_request();
            drop(conn);
            self.pool.open_enough();
        } else {
            self.pool.put_back(conn);
        }
    }
}

/// A connection to send one request on, counted against the limits.
pub(crate) struct Lease {
    conn: Conn,
    guard: RequestGuard,
}

/// Counts one request while it is under way.
pub(super) struct RequestGuard {
    pool: Rc<Pool>,
}

impl RequestGuard {
    /// The cluster the request went to.
    pub(super) fn cluster(&self) -> &Cluster {
        &self.pool.cluster
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.pool.circuit.give_back(Resource::Requests);
        self.pool.cluster.stats.upstream_rq_active.dec();
        self.pool.host.state.request_ended();
    }
}

/// Counts one connection while it stands.
pub(super) struct ConnGuard {
    pub(super) cluster: Arc<Cluster>,
    host: Arc<Host>,
    open: Rc<Cell<usize>>,
    began: Instant,
    by_peer: Cell<bool>,
    with_request: Cell<bool>,
    _permit: Permit,
}

impl ConnGuard {
    fn new(pool: &Pool, permit: Permit) -> ConnGuard {
        let stats = &pool.cluster.stats;
        stats.upstream_cx_total.inc();
        stats.upstream_cx_active.inc();
        let numbers = &pool.host.state.numbers;
        numbers.cx_total.fetch_add(1, Relaxed);
        numbers.cx_active.fetch_add(1, Relaxed);
        pool.open.set(pool.open.get() + 1);
        ConnGuard {
            cluster: pool.cluster.clone(),
            host: pool.host.clone(),
            open: pool.open.clone(),
            began: Instant::now(),
            by_peer: Cell::new(false),
            with_request: Cell::new(false),
            _permit: permit,
        }
    }

    /// It is the peer who ends the connection.
    pub(super) fn closes_by_peer(&self) {
        self.by_peer.set(true);
    }

    /// It ends while a request is under way.
    pub(super) fn closes_with_request(&self) {
        self.with_request.set(true);
    }
}

impl Drop for ConnGuard {
    fn drop(&mut self) {
        let stats = &self.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.upstream_cx_destroy.inc();
        if self.by_peer.get() {
            stats.upstream_cx_destroy_remote.inc();
        } else {
            stats.upstream_cx_destroy_local.inc();
        }
        if self.with_request.get() {
            stats.upstream_cx_destroy_with_active_rq.inc();
            if self.by_peer.get() {
                stats.upstream_cx_destroy_remote_with_active_rq.inc();
            } else {
                stats.upstream_cx_destroy_local_with_active_rq.inc();
            }
        }
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        stats.upstream_cx_length_ms.record(ms);
        self.host.state.numbers.cx_active.fetch_sub(1, Relaxed);
        self.open.set(self.open.get().saturating_sub(1));
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

impl Pool {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        host: Arc<Host>,
        sni: Option<Arc<str>>,
        source: Option<OriginalSrc>,
        wanted: Wanted,
        high_priority: bool,
    ) -> Rc<Pool> {
        let plain = matches!(cluster.transports.get(host.transport), Transport::Plain);
        Rc::new(Pool {
            circuit: cluster.circuits.of(high_priority).clone(),
            cluster,
            host,
            sni,
            source,
            // Without TLS there is nothing to negotiate with.
            wanted: if wanted == Wanted::Negotiate && plain {
                Wanted::Http1
            } else {
                wanted
            },
            state: RefCell::default(),
            open: Rc::default(),
            draining: Cell::new(false),
            peer_streams: Cell::new(u32::MAX),
        })
    }

    /// A connection that is at hand, if there is one.
    ///
    /// # Errors
    /// When a circuit breaker refuses.
    pub(crate) fn try_acquire(self: &Rc<Pool>) -> Option<Result<Lease, Refusal>> {
        self.at_hand().map(|conn| self.lease(conn))
    }

    /// A connection for one request: one at hand, or one that is waited for. Dropping the future leaves
    /// the queue.
    pub(crate) async fn acquire(self: &Rc<Pool>) -> Result<Lease, Refusal> {
        if let Some(acquired) = self.try_acquire() {
            return acquired;
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
        // Without the borrow: both may call back into the pool.
        drop(idle);
        for conn in shared {
            conn.retire();
        }
    }

    /// Closes connections that are too old or carry old credentials.
    pub(crate) fn sweep(&self) {
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let mut index = 0;
        while let Some(idle) = state.idle.get(index) {
            if self.is_worn(&idle.conn.facts) {
                closed.push(state.idle.remove(index));
            } else {
                index += 1;
            }
        }
        let mut worn = Vec::new();
        state.shared.retain(|conn| {
            let keep = !self.is_worn(conn.facts());
            if !keep {
                worn.push(conn.clone());
            }
            keep
        });
        drop(state);
        drop(closed);
        for conn in worn {
            conn.retire();
        }
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Whether it has connections, or some are being made.
    pub(crate) fn is_used(&self) -> bool {
        self.open.get() > 0
    }

    fn at_hand(self: &Rc<Pool>) -> Option<Conn> {
        let mut state = self.state.borrow_mut();
        if let Some(conn) = self.free_shared(&state) {
            return Some(Conn::H2(Slot::new(conn, self)));
        }
        loop {
            let mut idle = state.idle.pop()?;
            if !self.is_worn(&idle.conn.facts) && idle.conn.is_quiet_now() {
                return Some(Conn::H1(Loan {
                    conn: Some(idle.conn),
                    pool: self.clone(),
                    used: false,
                }));
            }
        }
    }

    fn free_shared(&self, state: &State) -> Option<Rc<h2::Conn>> {
        state
            .shared
            .iter()
            .find(|conn| conn.has_room() && !self.is_worn(conn.facts()))
            .cloned()
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
        if !self.circuit.take(Resource::Requests) {
            return Err(Refusal::Overflow);
        }
        stats.upstream_rq_total.inc();
        stats.upstream_rq_active.inc();
        self.host.state.request_began();
        let guard = RequestGuard { pool: self.clone() };
        Ok(Lease { conn, guard })
    }

    fn put_back(self: &Rc<Pool>, conn: Box<h1::Conn>) {
        let max = self.cluster.config.max_requests_per_connection;
        if max.is_some_and(|max| conn.requests() >= max) {
            self.cluster.stats.upstream_cx_max_requests.inc();
        } else if !self.draining.get() && !self.is_worn(&conn.facts) {
            self.offer(conn);
            return;
        }
        drop(conn);
        self.open_enough();
    }

    /// Gives a free connection to who waits longest, or keeps it.
    fn offer(self: &Rc<Pool>, conn: Box<h1::Conn>) {
        let mut conn = conn;
        loop {
            let waiter = self.state.borrow_mut().waiting.pop_front();
            let Some(waiter) = waiter else { break };
            let loan = Loan {
                conn: Some(conn),
                pool: self.clone(),
                used: false,
            };
            conn = match waiter.send(Ok(Conn::H1(loan))) {
                Ok(()) => return,
                // Who waited has left.
                Err(Ok(Conn::H1(mut loan))) => match loan.conn.take() {
                    Some(conn) => conn,
                    None => return,
                },
                Err(_) => return,
            };
        }
        if self.draining.get() {
            return;
        }
        let mut state = self.state.borrow_mut();
        let since = clock::now();
        let watcher = &mut state.watcher;
        if let Some(waker) = &watcher.waker {
            let mut cx = Context::from_waker(waker);
            if !conn.is_quiet(&mut cx) {
                drop(state);
                drop(conn);
                self.open_enough();
                return;
            }
            if let Some(limit) = self.cluster.config.idle_timeout
                && !watcher.armed
            {
                watcher.armed = true;
                watcher.deadline.set(since + limit);
                if watcher.deadline.poll(&mut cx).is_ready() {
                    waker.wake_by_ref();
                }
            }
        } else if !watcher.started {
            watcher.started = true;
            spawn_local(watch(Rc::downgrade(self)));
        }
        state.idle.push(Idle { conn, since });
    }

    /// Looks at all idle connections, and registers `cx` for what may become of them.
    fn look(&self, cx: &mut Context<'_>) {
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let State { idle, watcher, .. } = &mut *state;
        if !watcher
            .waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            watcher.waker = Some(cx.waker().clone());
        }
        let now = Instant::now();
        let limit = self.cluster.config.idle_timeout;
        let mut index = 0;
        while let Some(entry) = idle.get_mut(index) {
            let timed_out = limit.is_some_and(|limit| now >= entry.since + limit);
            if timed_out {
                self.cluster.stats.upstream_cx_idle_timeout.inc();
            }
            if timed_out || !entry.conn.is_quiet(cx) {
                closed.push(idle.remove(index));
            } else {
                index += 1;
            }
        }
        watcher.armed = false;
        if let (Some(limit), Some(first)) = (limit, idle.first()) {
            watcher.armed = true;
            watcher.deadline.set(first.since + limit);
            if watcher.deadline.poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        drop(state);
        drop(closed);
    }

    /// An HTTP/2 connection takes no more requests.
    pub(super) fn forget(&self, conn: &Rc<h2::Conn>) {
        self.state
            .borrow_mut()
            .shared
            .retain(|other| !Rc::ptr_eq(other, conn));
    }

    /// Gives free streams to who waits, and makes connections for the others.
    pub(super) fn serve_waiting(self: &Rc<Pool>) {
        loop {
            let mut state = self.state.borrow_mut();
            if state.waiting.is_empty() {
                return;
            }
            state.waiting.retain(|waiter| !waiter.is_closed());
            let Some(conn) = self.free_shared(&state) else {
                break;
            };
            let Some(waiter) = state.waiting.pop_front() else {
                return;
            };
            drop(state);
            // If the waiter left meanwhile the slot comes back as an error and is freed by its drop.
            drop(waiter.send(Ok(Conn::H2(Slot::new(conn, self)))));
        }
        self.open_enough();
    }

    /// Makes as many connections as those who wait need and the breaker allows.
    pub(super) fn open_enough(self: &Rc<Pool>) {
        loop {
            let mut state = self.state.borrow_mut();
            if state.waiting.is_empty() {
                return;
            }
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
                    if self.open.get() > 0 {
                        return;
                    }
                    self.circuit.acquire_beyond(Resource::Connections)
                }
            };
            state.connecting += 1;
            drop(state);
            let guard = ConnGuard::new(self, permit);
            let stats = &self.cluster.stats;
            match self.wanted {
                Wanted::Http1 => stats.upstream_cx_http1_total.inc(),
                Wanted::Http2 => stats.upstream_cx_http2_total.inc(),
                // Known once the peer has chosen.
                Wanted::Negotiate => {}
            }
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
            self.source,
        )
        .await;
        self.state.borrow_mut().connecting -= 1;
        let connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                if !matches!(error, ConnectError::Timeout) {
                    guard.closes_by_peer();
                }
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
            tls: connected.tls,
            established: Instant::now(),
            secrets,
        });
        let stats = &self.cluster.stats;
        let chosen = self.wanted == Wanted::Negotiate;
        match version {
            Wanted::Http2 => {
                if chosen {
                    stats.upstream_cx_http2_total.inc();
                }
                let conn = h2::start(&self, connected.transport, facts, guard);
                self.state.borrow_mut().shared.push(conn.clone());
                self.serve_waiting();
                if self.draining.get() {
                    self.forget(&conn);
                    conn.retire();
                }
            }
            Wanted::Http1 | Wanted::Negotiate => {
                if chosen {
                    stats.upstream_cx_http1_total.inc();
                }
                self.offer(Box::new(h1::Conn::new(connected.transport, facts, guard)));
            }
        }
    }

    fn alpn(&self) -> Option<Vec<Vec<u8>>> {
        match self.cluster.transports.get(self.host.transport) {
            Transport::Tls(context) if context.alpn().is_empty() => match self.wanted {
                Wanted::Http1 => Some(vec![b"http/1.1".to_vec()]),
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
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(waker) = self.state.get_mut().watcher.waker.take() {
            waker.wake();
        }
    }
}

/// Lives as long as the pool.
async fn watch(pool: Weak<Pool>) {
    poll_fn(|cx| match pool.upgrade() {
        Some(pool) => {
            pool.look(cx);
            Poll::Pending
        }
        None => Poll::Ready(()),
    })
    .await;
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("cluster", &self.cluster.name)
            .field("host", &self.host.address)
            .field("open", &self.open.get())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({:?})", self.guard.pool)
    }
}

impl Lease {
    pub(crate) fn facts(&self) -> Option<&Rc<Facts>> {
        match &self.conn {
            Conn::H1(loan) => loan.conn.as_ref().map(|conn| &conn.facts),
            Conn::H2(slot) => Some(slot.facts()),
        }
    }

    /// What is spoken with the upstream.
    pub(crate) fn protocol(&self) -> Protocol {
        match &self.conn {
            Conn::H1(_) => Protocol::Http11,
            Conn::H2(_) => Protocol::Http2,
        }
    }

    /// Sends a request and waits for the head of the answer. For an upgrade, `body` is sent only once the
    /// upstream has agreed. Dropping the future resets the stream.
    pub(crate) async fn send(
        self,
        head: &RequestHead,
        body: Body,
        on_informational: OnInformational<'_>,
    ) -> Result<(ResponseHead, Body), SendFailure> {
        let Lease { conn, guard } = self;
        match conn {
            Conn::H1(loan) => h1::send(loan, guard, head, body, on_informational).await,
            Conn::H2(slot) => h2::send(slot, guard, head, body, on_informational).await,
        }
    }
}
