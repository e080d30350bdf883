//! An HTTP/2 connection to a host: one task reads, tells the streams, and writes what all of them have to
//! send, once a turn. Streams put their frames into the connection themselves, and wake it.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io::IoSlice,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use lateen_codec::h2::{Code, Connection, Event, Fatal, OpenError, Options, Role, StreamId};
use tokio::{task::spawn_local, time::Instant};

use super::{
    Upgrade,
    pool::{ConnGuard, Facts, OnInformational, Pool, RequestGuard, SendFailure, UNSENDABLE},
};
use crate::{
    body::{Body, BodyError, Frame, Source},
    clock,
    cluster::Config,
    head::{Headers, RequestHead, ResponseHead},
    net::{Transport, stock},
    retry::Reset,
    timer::Deadline,
};

/// Windows as large as keep a fast upstream busy over a slow network; bodies are not read ahead of the
/// downstream beyond them. Envoy's are 16 and 24 MiB.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Reads of one turn; then others get theirs.
const READS: usize = 8;
/// Read at once while reads find as much as they ask for.
const LONG_READ: usize = 64 * 1024;
/// Slices of one write.
const SLICES: usize = 64;
/// Response bodies up to this many bytes that came in pieces are joined.
const JOINED: usize = 16 * 1024;
/// What a stream is reset with that we do not want any more. Envoy: all local resets.
const GIVEN_UP: Code = Code::INTERNAL_ERROR;
/// Stream states kept for the streams to come.
const SPARE: usize = 64;

/// What pool and streams see of a connection.
pub(super) struct Conn {
    facts: Rc<Facts>,
    state: RefCell<State>,
}

struct State {
    codec: Connection,
    table: Table,
    /// Streams at once, by our settings.
    limit: u32,
    /// The same until the peer's own limit has come.
    assumed: u32,
    /// Streams that are promised or open.
    active: u32,
    /// Of those, the ones that are not open yet.
    promised: usize,
    requests: u32,
    max_requests: Option<u32>,
    idle_since: Instant,
    dead: bool,
    /// Of the connection's task; taken when it is woken.
    waker: Option<Waker>,
}

/// Who is told of what the peer does.
#[derive(Default)]
struct Table {
    /// By the codec's slots.
    streams: Vec<Option<(StreamId, Rc<Stream>)>>,
    spare: Vec<Rc<Stream>>,
    /// Takes no more requests; ends with the last of those it has.
    retired: bool,
    /// Bytes that came for nobody.
    orphaned: Vec<(StreamId, usize)>,
    /// A PING was answered.
    answered: bool,
}

/// What came of one stream and has not been read yet.
#[derive(Default)]
struct Stream(RefCell<Received>);

#[derive(Default)]
struct Received {
    informational: Vec<ResponseHead>,
    head: Option<ResponseHead>,
    /// The first piece, which mostly is the only one.
    data: Bytes,
    more: VecDeque<Bytes>,
    trailers: Option<Headers>,
    /// The response has come to its end.
    ended: bool,
    failure: Option<Failure>,
    /// Who waits for the response, and who for room to send.
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Clone, Copy, Debug)]
enum Failure {
    Reset(Code),
    /// The connection went away before the peer saw the stream.
    Unseen,
    Protocol(&'static str),
    Closed,
}

impl Received {
    fn wake(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        if self.data.is_empty() && self.more.is_empty() {
            self.data = data;
        } else {
            self.more.push_back(data);
        }
    }

    fn pop(&mut self) -> Option<Bytes> {
        if self.data.is_empty() {
            return self.more.pop_front();
        }
        Some(std::mem::take(&mut self.data))
    }

    fn fail(&mut self, failure: Failure) {
        if !self.ended && self.failure.is_none() {
            self.failure = Some(failure);
        }
        self.wake();
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }
}

fn wait(slot: &mut Option<Waker>, cx: &Context<'_>) {
    if !slot
        .as_ref()
        .is_some_and(|waker| waker.will_wake(cx.waker()))
    {
        *slot = Some(cx.waker().clone());
    }
}

impl Table {
    fn stream(&self, id: StreamId) -> Option<&Rc<Stream>> {
        match self.streams.get(id.slot()) {
            Some(Some((found, stream))) if *found == id => Some(stream),
            _ => None,
        }
    }

    fn enter(&mut self, id: StreamId) -> Rc<Stream> {
        let stream = self.spare.pop().unwrap_or_default();
        if self.streams.len() <= id.slot() {
            self.streams.resize_with(id.slot() + 1, || None);
        }
        if let Some(slot) = self.streams.get_mut(id.slot()) {
            *slot = Some((id, stream.clone()));
        }
        stream
    }

    fn leave(&mut self, id: StreamId) {
        if self.stream(id).is_some()
            && let Some(slot) = self.streams.get_mut(id.slot())
        {
            *slot = None;
        }
    }

    fn recycle(&mut self, stream: Rc<Stream>) {
        if self.spare.len() < SPARE && Rc::strong_count(&stream) == 1 {
            *stream.0.borrow_mut() = Received::default();
            self.spare.push(stream);
        }
    }

    fn told(&mut self, event: Event) {
        match event {
            Event::Response { stream, head, end } => {
                if let Some(stream) = self.stream(stream) {
                    let mut received = stream.0.borrow_mut();
                    received.head = Some(head);
                    received.ended = end;
                    received.wake();
                }
            }
            Event::Informational { stream, head } => {
                if let Some(stream) = self.stream(stream) {
                    let mut received = stream.0.borrow_mut();
                    received.informational.push(head);
                    received.wake();
                }
            }
            Event::Data { stream, data, end } => match self.stream(stream) {
                Some(stream) => {
                    let mut received = stream.0.borrow_mut();
                    received.push(data);
                    received.ended = end;
                    received.wake();
                }
                None => self.orphaned.push((stream, data.len())),
            },
            Event::Trailers { stream, trailers } => {
                if let Some(stream) = self.stream(stream) {
                    let mut received = stream.0.borrow_mut();
                    received.trailers = Some(trailers);
                    received.ended = true;
                    received.wake();
                }
            }
            Event::Reset {
                stream,
                code,
                local,
            } => {
                if let Some(stream) = self.stream(stream) {
                    stream.0.borrow_mut().fail(match local {
                        Some(details) => Failure::Protocol(details),
                        None => Failure::Reset(code),
                    });
                }
            }
            Event::GoAway { .. } => {
                self.retired = true;
                // Those it did not see were told just now: they can go elsewhere.
                for (_, stream) in self.streams.iter().flatten() {
                    let mut received = stream.0.borrow_mut();
                    if let Some(Failure::Reset(Code::REFUSED_STREAM)) = received.failure {
                        received.failure = Some(Failure::Unseen);
                    }
                }
            }
            Event::Pong { .. } => self.answered = true,
            Event::Request { .. }
            | Event::Malformed { .. }
            | Event::Settings
            | Event::SettingsAcknowledged => {}
        }
    }
}

impl State {
    /// Lets the connection's task write what waits.
    fn kick(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn die(&mut self, failure: Failure) {
        self.dead = true;
        self.table.retired = true;
        for (_, stream) in self.table.streams.iter().flatten() {
            stream.0.borrow_mut().fail(failure);
        }
    }
}

impl Conn {
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Whether another request can be sent on it now.
    pub(super) fn has_room(&self) -> bool {
        let state = self.state.borrow();
        let limit = if state.codec.has_settings() {
            state.limit
        } else {
            state.limit.min(state.assumed)
        };
        !state.table.retired && state.active < limit && state.codec.can_open() > state.promised
    }

    /// It gets no more requests, and ends when those it has have ended.
    pub(super) fn retire(&self) {
        let mut state = self.state.borrow_mut();
        state.table.retired = true;
        state.kick();
    }
}

/// The right to open one stream, and then that stream's place.
pub(super) struct Slot {
    conn: Rc<Conn>,
    pool: Rc<Pool>,
    promised: bool,
}

impl Slot {
    pub(super) fn new(conn: Rc<Conn>, pool: &Rc<Pool>) -> Slot {
        let mut state = conn.state.borrow_mut();
        state.active += 1;
        state.promised += 1;
        drop(state);
        Slot {
            conn,
            pool: pool.clone(),
            promised: true,
        }
    }

    pub(super) fn facts(&self) -> &Rc<Facts> {
        &self.conn.facts
    }
}

impl Slot {
    /// Opens the stream; its head leaves with whatever else is sent this turn. Gives also whether the
    /// connection had served others before.
    fn open(
        &mut self,
        head: &RequestHead,
        end: bool,
    ) -> Result<(StreamId, Rc<Stream>, bool), SendFailure> {
        let mut state = self.conn.state.borrow_mut();
        let reused = state.requests > 0;
        let id = match state.codec.open(head, end) {
            Ok(id) => id,
            Err(OpenError::NoExtendedConnect) => return Err(UNSENDABLE),
            Err(OpenError::Concurrency | OpenError::GoingAway) => return Err(UNSEEN),
        };
        self.promised = false;
        state.promised = state.promised.saturating_sub(1);
        state.requests += 1;
        if state.max_requests.is_some_and(|max| state.requests >= max) {
            self.pool.cluster.stats.upstream_cx_max_requests.inc();
            state.table.retired = true;
        }
        let stream = state.table.enter(id);
        state.kick();
        Ok((id, stream, reused))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.conn.state.borrow_mut();
        if self.promised {
            state.promised = state.promised.saturating_sub(1);
        }
        state.active = state.active.saturating_sub(1);
        if state.active == 0 {
            state.idle_since = clock::now();
            if state.table.retired {
                state.kick();
            }
        }
        drop(state);
        self.pool.serve_waiting();
    }
}

fn options(config: &Config) -> Options {
    let http2 = &config.http2;
    let defaults = Options::default();
    Options {
        max_concurrent_streams: http2.max_concurrent_streams,
        initial_stream_window_size: http2.stream_window.unwrap_or(STREAM_WINDOW),
        initial_connection_window_size: http2.connection_window.unwrap_or(CONNECTION_WINDOW),
        max_headers: config.max_response_headers.unwrap_or(defaults.max_headers),
        ..defaults
    }
}

/// Begins to speak HTTP/2; requests can be sent at once.
pub(super) fn start(
    pool: &Rc<Pool>,
    transport: Transport,
    facts: Rc<Facts>,
    guard: ConnGuard,
) -> Rc<Conn> {
    let config = &pool.cluster.config;
    let conn = Rc::new(Conn {
        facts,
        state: RefCell::new(State {
            codec: Connection::new(Role::Client, Arc::new(options(config))),
            table: Table::default(),
            limit: config.http2.max_concurrent_streams,
            assumed: pool.peer_streams.get(),
            active: 0,
            promised: 0,
            requests: 0,
            max_requests: config.max_requests_per_connection,
            idle_since: Instant::now(),
            dead: false,
            waker: None,
        }),
    });
    let mut driver = Driver {
        conn: conn.clone(),
        pool: pool.clone(),
        transport,
        input: BytesMut::new(),
        guard,
        idle: Deadline::default(),
        keepalive: config.http2.keepalive.map(|(interval, timeout)| KeepAlive {
            interval,
            timeout,
            unanswered: false,
            deadline: Deadline::default(),
        }),
        room: 0,
        settled: false,
    };
    driver.begin();
    spawn_local(async move {
        poll_fn(|cx| driver.poll(cx)).await;
        driver.end();
    });
    conn
}

/// PINGs that find out whether the peer is still there.
struct KeepAlive {
    interval: Duration,
    timeout: Duration,
    unanswered: bool,
    deadline: Deadline,
}

/// The connection's task.
struct Driver {
    conn: Rc<Conn>,
    pool: Rc<Pool>,
    transport: Transport,
    input: BytesMut,
    guard: ConnGuard,
    idle: Deadline,
    keepalive: Option<KeepAlive>,
    /// Streams the peer allowed when we last looked.
    room: usize,
    /// The peer's settings have come.
    settled: bool,
}

impl Driver {
    fn begin(&mut self) {
        let now = Instant::now();
        if let Some(limit) = self.guard.cluster.config.idle_timeout {
            self.idle.set(now + limit);
        }
        if let Some(keepalive) = &mut self.keepalive {
            keepalive.deadline.set(now + keepalive.interval);
        }
    }

    /// Ready when the connection is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        wait(&mut self.conn.state.borrow_mut().waker, cx);
        let read = self.read(cx);
        self.timers(cx);
        if read.is_err() || self.write(cx).is_err() {
            return Poll::Ready(());
        }
        let mut state = self.conn.state.borrow_mut();
        while let Some(id) = state.codec.next_writable() {
            if let Some(stream) = state.table.stream(id)
                && let Some(waker) = stream.0.borrow_mut().writer.take()
            {
                waker.wake();
            }
        }
        if state.dead || state.table.retired && state.active == 0 && !state.codec.has_output() {
            return Poll::Ready(());
        }
        let room = state.codec.can_open();
        // Exact while there is room.
        if state.codec.has_settings() && (room > 0 || !std::mem::replace(&mut self.settled, true)) {
            let allowed = u32::try_from(room + state.codec.streams()).unwrap_or(u32::MAX);
            self.pool.peer_streams.set(allowed.max(1));
        }
        let more = room > std::mem::replace(&mut self.room, room);
        let retired = state.table.retired;
        drop(state);
        if retired {
            self.pool.forget(&self.conn);
        }
        if more || retired {
            self.pool.serve_waiting();
        }
        Poll::Pending
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), ()> {
        // The last read filled its buffer.
        let mut bulk = false;
        for _ in 0..READS {
            if self.input.is_empty() {
                match self.transport.poll_readable(cx) {
                    Poll::Pending => {
                        self.let_go();
                        return Ok(());
                    }
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return self.closed(),
                }
                if bulk {
                    stock::lengthen(&mut self.input, LONG_READ);
                } else if self.input.capacity() < stock::SIZE {
                    self.input = stock::get();
                }
            } else if self.input.capacity() - self.input.len() < stock::SIZE {
                let more = if bulk { LONG_READ } else { 2 * stock::SIZE };
                self.input.reserve(more);
            }
            match self.transport.poll_read(cx, &mut self.input) {
                Poll::Pending => {
                    if self.input.is_empty() {
                        self.let_go();
                    }
                    return Ok(());
                }
                Poll::Ready(Ok(0) | Err(_)) => return self.closed(),
                Poll::Ready(Ok(n)) => {
                    let stats = &self.guard.cluster.stats;
                    stats.upstream_cx_rx_bytes_total.add(n as u64);
                    bulk = n >= stock::SIZE;
                    self.receive(cx)?;
                }
            }
        }
        // There may be more; others first.
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Result<(), ()> {
        let mut state = self.conn.state.borrow_mut();
        let State { codec, table, .. } = &mut *state;
        let stats = &self.guard.cluster.stats;
        let received = codec.receive(&mut self.input, &mut |event| {
            match &event {
                Event::Trailers { .. } => stats.http2_trailers.inc(),
                Event::Reset { local: None, .. } => stats.http2_rx_reset.inc(),
                Event::Reset { local: Some(_), .. } => {
                    stats.http2_rx_messaging_error.inc();
                    stats.http2_tx_reset.inc();
                }
                Event::GoAway { .. } => stats.upstream_cx_close_notify.inc(),
                _ => {}
            }
            table.told(event);
        });
        for (stream, bytes) in table.orphaned.drain(..) {
            codec.consumed(stream, bytes);
        }
        if std::mem::take(&mut table.answered)
            && let Some(keepalive) = &mut self.keepalive
        {
            keepalive.unanswered = false;
            keepalive.deadline.set(Instant::now() + keepalive.interval);
        }
        if let Err(Fatal { details, .. }) = received {
            state.die(Failure::Protocol(details));
            drop(state);
            // The GOAWAY; whether it arrives does not matter.
            return self.write(cx).and(Err(()));
        }
        Ok(())
    }

    fn closed(&mut self) -> Result<(), ()> {
        self.guard.closes_by_peer();
        self.conn.state.borrow_mut().die(Failure::Closed);
        Err(())
    }

    /// Writes all there is, or all that the socket takes.
    fn write(&mut self, cx: &mut Context<'_>) -> Result<(), ()> {
        let mut state = self.conn.state.borrow_mut();
        while state.codec.has_output() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = state.codec.output(&mut slices);
            let slices = slices.get(..count).unwrap_or_default();
            match self.transport.poll_write(cx, slices) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0) | Err(_)) => {
                    self.guard.closes_by_peer();
                    state.die(Failure::Closed);
                    return Err(());
                }
                Poll::Ready(Ok(n)) => {
                    state.codec.advance(n);
                    let stats = &self.guard.cluster.stats;
                    stats.upstream_cx_tx_bytes_total.add(n as u64);
                }
            }
        }
        if let Poll::Ready(Err(_)) = self.transport.poll_flush(cx) {
            state.die(Failure::Closed);
            return Err(());
        }
        Ok(())
    }

    fn timers(&mut self, cx: &mut Context<'_>) {
        while self.idle.poll(cx).is_ready() {
            let Some(limit) = self.guard.cluster.config.idle_timeout else {
                return;
            };
            let mut state = self.conn.state.borrow_mut();
            let now = Instant::now();
            if state.active == 0 && now >= state.idle_since + limit {
                self.guard.cluster.stats.upstream_cx_idle_timeout.inc();
                state.table.retired = true;
                self.idle.clear();
                break;
            }
            // Looked at when it can be due at the earliest.
            let from = if state.active == 0 {
                state.idle_since
            } else {
                now
            };
            self.idle.set(from + limit);
        }
        if let Some(keepalive) = &mut self.keepalive {
            while keepalive.deadline.poll(cx).is_ready() {
                let mut state = self.conn.state.borrow_mut();
                if keepalive.unanswered {
                    state.die(Failure::Closed);
                    keepalive.deadline.clear();
                    break;
                }
                keepalive.unanswered = true;
                state.codec.ping([0; 8]);
                keepalive.deadline.set(Instant::now() + keepalive.timeout);
            }
        }
    }

    fn let_go(&mut self) {
        if self.input.capacity() > 0 {
            stock::put(std::mem::take(&mut self.input));
        }
    }

    fn end(mut self) {
        self.let_go();
        let mut state = self.conn.state.borrow_mut();
        if state.active > 0 {
            self.guard.closes_with_request();
        }
        state.die(Failure::Closed);
        state.waker = None;
        drop(state);
        if matches!(self.transport, Transport::Tls(_)) {
            // Says goodbye (close_notify) if the socket takes it at once.
            let mut cx = Context::from_waker(Waker::noop());
            drop(self.transport.poll_shutdown(&mut cx));
        }
        let Driver {
            conn, pool, guard, ..
        } = self;
        pool.forget(&conn);
        drop(guard);
        pool.open_enough();
    }
}

/// A stream of ours. Dropped before its end it is reset.
struct Open {
    slot: Slot,
    id: StreamId,
    stream: Option<Rc<Stream>>,
    /// Both ways have ended, or it was reset.
    over: bool,
}

impl Open {
    fn received(&self) -> Option<std::cell::RefMut<'_, Received>> {
        self.stream.as_ref().map(|stream| stream.0.borrow_mut())
    }

    /// The downstream took so many bytes.
    fn consumed(&self, bytes: usize) {
        let mut state = self.slot.conn.state.borrow_mut();
        state.codec.consumed(self.id, bytes);
        if state.codec.has_output() {
            state.kick();
        }
    }

    fn reset(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        let failure = self.received().and_then(|received| received.failure);
        if matches!(failure, None | Some(Failure::Protocol(_))) {
            let stats = &self.slot.pool.cluster.stats;
            stats.upstream_rq_tx_reset.inc();
            if failure.is_none() {
                stats.http2_tx_reset.inc();
            }
        }
        let mut state = self.slot.conn.state.borrow_mut();
        state.codec.reset(self.id, GIVEN_UP);
        state.kick();
        drop(state);
        // Who still sends the request is told.
        if let Some(mut received) = self.received() {
            received.fail(Failure::Closed);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.reset();
        let mut state = self.slot.conn.state.borrow_mut();
        state.table.leave(self.id);
        if let Some(stream) = self.stream.take() {
            state.table.recycle(stream);
        }
    }
}

/// The body of a request on its way.
struct Upload {
    conn: Rc<Conn>,
    id: StreamId,
    stream: Rc<Stream>,
    body: Body,
}

impl Upload {
    /// Ready when all has been handed to the connection, or the stream is gone; with whether the
    /// downstream broke off.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            let mut state = self.conn.state.borrow_mut();
            if state.dead || self.stream.0.borrow().failure.is_some() {
                return Poll::Ready(Ok(()));
            }
            if state.codec.send_capacity(self.id) == 0 {
                wait(&mut self.stream.0.borrow_mut().writer, cx);
                return Poll::Pending;
            }
            drop(state);
            let frame = match self.body.poll_frame(cx) {
                Poll::Pending => {
                    // The end of the stream ends this, too.
                    wait(&mut self.stream.0.borrow_mut().writer, cx);
                    return Poll::Pending;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(Some(Ok(frame))) => Some(frame),
                Poll::Ready(None) => None,
            };
            let mut state = self.conn.state.borrow_mut();
            let (sent, end) = match frame {
                Some(Frame::Data(data)) => {
                    let end = self.body.is_end_stream();
                    if data.is_empty() && !end {
                        continue;
                    }
                    (state.codec.send_data(self.id, data, end), end)
                }
                Some(Frame::Trailers(trailers)) => {
                    (state.codec.send_trailers(self.id, &trailers), true)
                }
                None => (state.codec.send_data(self.id, Bytes::new(), true), true),
            };
            state.kick();
            if end || sent.is_err() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// Nothing of it was looked at, and another connection will do.
const UNSEEN: SendFailure = SendFailure {
    reset: Reset::Refused,
    sent: false,
    reused: true,
};

/// Sends a request and waits for the head of the answer.
pub(super) async fn send(
    mut slot: Slot,
    guard: RequestGuard,
    head: &RequestHead,
    body: Body,
    on_informational: OnInformational<'_>,
) -> Result<(ResponseHead, Body), SendFailure> {
    let upgrade = Upgrade::of(head);
    let (body, later) = if upgrade == Upgrade::None {
        (body, None)
    } else {
        (Body::empty(), Some(body))
    };
    let end = later.is_none() && body.is_end_stream();
    let (id, stream, reused) = slot.open(head, end)?;
    let mut upload = (!end && later.is_none()).then(|| Upload {
        conn: slot.conn.clone(),
        id,
        stream: stream.clone(),
        body,
    });
    let mut open = Open {
        slot,
        id,
        stream: Some(stream.clone()),
        over: false,
    };
    let failed = |reset| SendFailure {
        reset,
        sent: true,
        reused,
    };
    let answer = poll_fn(|cx| {
        if let Some(sending) = &mut upload {
            match sending.poll(cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => upload = None,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(failed(Reset::Local))),
            }
        }
        let mut received = stream.0.borrow_mut();
        while !received.informational.is_empty() {
            on_informational(received.informational.remove(0));
        }
        if let Some(head) = received.head.take() {
            return Poll::Ready(Ok(head));
        }
        match received.failure {
            Some(failure) => Poll::Ready(Err(match failure {
                Failure::Unseen => return Poll::Ready(Err(UNSEEN)),
                Failure::Reset(Code::REFUSED_STREAM) => failed(Reset::Refused),
                Failure::Reset(Code::PROTOCOL_ERROR) => failed(Reset::RemoteProtocol),
                Failure::Reset(Code::CONNECT_ERROR) => failed(Reset::RemoteConnect),
                Failure::Reset(_) => failed(Reset::Remote),
                Failure::Protocol(_) => failed(Reset::Protocol),
                Failure::Closed => failed(Reset::Termination),
            })),
            None => {
                wait(&mut received.reader, cx);
                Poll::Pending
            }
        }
    })
    .await;
    drop(stream);
    let answer = answer?;
    let accepted = match upgrade {
        Upgrade::None => false,
        Upgrade::Protocol => answer.status == 101,
        Upgrade::Connect => (200..300).contains(&answer.status),
    };
    if let Some(later) = later {
        let body = if accepted { later } else { Body::empty() };
        upload = open.stream.clone().map(|stream| Upload {
            conn: open.slot.conn.clone(),
            id,
            stream,
            body,
        });
    }
    if let Some(body) = at_hand(&mut open, upload.is_none()) {
        return Ok((answer, body));
    }
    if let Some(mut upload) = upload {
        // Request and response go on at the same time, and neither waits for the other.
        spawn_local(async move {
            if poll_fn(|cx| upload.poll(cx)).await.is_err() {
                let mut state = upload.conn.state.borrow_mut();
                state.codec.reset(upload.id, GIVEN_UP);
                state.kick();
                drop(state);
                upload.stream.0.borrow_mut().fail(Failure::Closed);
            }
        });
    }
    Ok((
        answer,
        Body::stream(Incoming {
            open: Some(open),
            _guard: guard,
        }),
    ))
}

/// The body of the response, if all of it has come.
fn at_hand(open: &mut Open, sent: bool) -> Option<Body> {
    let stream = open.stream.as_ref()?;
    let mut received = stream.0.borrow_mut();
    let length = received.data.len() + received.more.iter().map(Bytes::len).sum::<usize>();
    if !received.ended || !received.more.is_empty() && length > JOINED {
        return None;
    }
    let mut data = std::mem::take(&mut received.data);
    if !received.more.is_empty() {
        let mut all = Vec::with_capacity(length);
        all.extend_from_slice(&data);
        for piece in received.more.drain(..) {
            all.extend_from_slice(&piece);
        }
        data = all.into();
    }
    let trailers = received.trailers.take();
    drop(received);
    if length > 0 {
        open.consumed(length);
    }
    // What is left of the request is not wanted, otherwise.
    open.over = sent;
    Some(Body::whole(data, trailers))
}

/// The body of a response, read by who wants it.
struct Incoming {
    open: Option<Open>,
    _guard: RequestGuard,
}

impl Source for Incoming {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        let Some(open) = &mut this.open else {
            return Poll::Ready(None);
        };
        let Some(mut received) = open.received() else {
            return Poll::Ready(None);
        };
        if let Some(data) = received.pop() {
            drop(received);
            open.consumed(data.len());
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        let polled = if received.ended {
            received
                .trailers
                .take()
                .map(|trailers| Ok(Frame::Trailers(trailers)))
        } else {
            match received.failure {
                Some(Failure::Reset(code)) => Some(Err(BodyError::Reset(Some(code.0)))),
                Some(Failure::Protocol(details)) => {
                    Some(Err(BodyError::Protocol(details.to_owned())))
                }
                Some(Failure::Closed | Failure::Unseen) => Some(Err(BodyError::Disconnected)),
                None => {
                    wait(&mut received.reader, cx);
                    return Poll::Pending;
                }
            }
        };
        drop(received);
        this.open = None;
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        match self.open.as_ref().and_then(Open::received) {
            Some(received) => {
                received.ended
                    && received.data.is_empty()
                    && received.more.is_empty()
                    && received.trailers.is_none()
            }
            None => true,
        }
    }
}
