//! The HTTP/2 driver: one task a connection reads frames, lets its streams act on them, and writes what all
//! of them have to say at once.
//!
//! Streams are futures inside that task; they write into the codec, and the driver flushes it once a turn.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io::IoSlice,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream::FuturesUnordered};
use lateen_codec::h2::{Code, Connection as Codec, Event, Fatal, Role, StreamId};
use tokio::time::Instant;

use super::{
    ConnectionContext,
    connection::{End, Fate, LINGER_BYTES},
    record::Record,
    stream::{self, Broken, Downstream, Early, Outgoing, Progress, Request},
};
use crate::{
    body::{Body, BodyError, Frame, Source},
    boxed::boxed,
    clock,
    head::{Headers, Known, KnownSet, Protocol, ResponseHead},
    net::{Transport, stock},
    timer::Deadline,
};

/// Reads of one turn: then others have theirs.
const READS: usize = 8;
/// Slices given to the kernel at once.
const SLICES: usize = 64;
/// Places for streams kept while there is no stream: a connection that waits holds little.
const KEPT: usize = 4;

/// What of a response's head only HTTP/1 has.
const OF_HTTP_1: KnownSet =
    KnownSet::of(&[Known::Connection, Known::Upgrade, Known::TransferEncoding]);

type Stream = Pin<Box<dyn Future<Output = ()>>>;

/// Serves a connection to its end. `input` is what was read of it already.
pub(super) async fn serve(cx: Rc<ConnectionContext>, io: Transport, input: BytesMut) {
    let fresh = !input.is_empty();
    let codec = Codec::new(Role::Server, cx.manager.h2.clone());
    let ping_at = cx
        .manager
        .limits
        .keepalive
        .map(|(interval, _)| cx.info.started + interval);
    let mut driver = Driver {
        shared: Rc::new(Shared {
            codec: RefCell::new(codec),
            open: RefCell::default(),
            turning: Cell::new(false),
            task: RefCell::default(),
            began: cx.info.started,
        }),
        cx,
        io,
        input,
        fresh,
        streams: FuturesUnordered::new(),
        arrivals: Vec::new(),
        deadline: Deadline::default(),
        stall: Deadline::default(),
        ping: Deadline::default(),
        ping_at,
        pong_by: None,
        noticed: false,
        drained: false,
        eof: false,
        malformed: false,
    };
    let end = poll_fn(|task| driver.poll(task)).await;
    driver.leave(end);
    if !matches!(end, Ended::Remote) {
        boxed(|| driver.linger()).await;
    }
}

/// How a connection ended.
#[derive(Clone, Copy)]
enum Ended {
    /// The peer left.
    Remote,
    /// All was said.
    Local,
    /// The peer broke the protocol.
    Fatal(Fatal),
}

/// What the driver and the streams of a connection share.
struct Shared {
    codec: RefCell<Codec>,
    /// Streams whose requests have not ended, or whose futures have not, by slot.
    open: RefCell<Vec<Option<Rc<Inbox>>>>,
    /// The driver is at work and will flush.
    turning: Cell<bool>,
    task: RefCell<Option<Waker>>,
    began: Instant,
}

impl Shared {
    /// There is something to write.
    fn touch(&self) {
        if !self.turning.get()
            && let Some(task) = &*self.task.borrow()
        {
            task.wake_by_ref();
        }
    }

    fn find(&self, stream: StreamId) -> Option<Rc<Inbox>> {
        self.open
            .borrow()
            .get(stream.slot())?
            .as_ref()
            .filter(|inbox| inbox.stream == stream)
            .cloned()
    }

    fn insert(&self, inbox: Rc<Inbox>) {
        let mut open = self.open.borrow_mut();
        let slot = inbox.stream.slot();
        if open.len() <= slot {
            open.resize(slot + 1, None);
        }
        if let Some(place) = open.get_mut(slot) {
            *place = Some(inbox);
        }
    }

    fn remove(&self, stream: StreamId) {
        let mut open = self.open.borrow_mut();
        let Some(place) = open.get_mut(stream.slot()) else {
            return;
        };
        if place.as_ref().is_some_and(|inbox| inbox.stream == stream) {
            *place = None;
        }
        if open.capacity() > KEPT && open.iter().all(Option::is_none) {
            *open = Vec::new();
        }
    }
}

/// What has come of a request and was not taken yet.
struct Inbox {
    stream: StreamId,
    state: RefCell<Received>,
}

#[derive(Default)]
struct Received {
    data: VecDeque<Bytes>,
    trailers: Option<Headers>,
    ended: bool,
    over: Option<Over>,
    /// Who waits for the body.
    reader: Option<Waker>,
    /// The stream's future.
    owner: Option<Waker>,
    /// The future is gone: nobody wants the body.
    abandoned: bool,
}

/// Why a stream is over before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    /// The peer reset it.
    Reset,
    /// The connection is gone.
    Closed,
    /// The peer broke the protocol.
    Violated(&'static str),
}

impl Inbox {
    fn end(&self, over: Over) {
        let mut state = self.state.borrow_mut();
        state.over.get_or_insert(over);
        state.wake_all();
    }
}

impl Received {
    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn wake_all(&mut self) {
        self.wake_reader();
        if let Some(owner) = self.owner.take() {
            owner.wake();
        }
    }

    fn own(&mut self, cx: &Context<'_>) {
        if !self
            .owner
            .as_ref()
            .is_some_and(|owner| owner.will_wake(cx.waker()))
        {
            self.owner = Some(cx.waker().clone());
        }
    }
}

struct Driver {
    cx: Rc<ConnectionContext>,
    io: Transport,
    /// Without memory while no frame is incomplete.
    input: BytesMut,
    /// There are bytes in it that the codec has not seen.
    fresh: bool,
    shared: Rc<Shared>,
    streams: FuturesUnordered<Stream>,
    /// Requests whose futures are to be made.
    arrivals: Vec<(Rc<Inbox>, Box<Record>, bool)>,
    deadline: Deadline,
    /// When a peer that reads nothing is given up.
    stall: Deadline,
    ping: Deadline,
    ping_at: Option<Instant>,
    /// When the answer to a PING must be there.
    pong_by: Option<Instant>,
    /// GOAWAY was announced.
    noticed: bool,
    /// GOAWAY was said.
    drained: bool,
    eof: bool,
    /// The connection fails because of a malformed message.
    malformed: bool,
}

impl Driver {
    fn poll(&mut self, task: &mut Context<'_>) -> Poll<Ended> {
        {
            let mut present = self.shared.task.borrow_mut();
            if !present
                .as_ref()
                .is_some_and(|waker| waker.will_wake(task.waker()))
            {
                *present = Some(task.waker().clone());
            }
        }
        self.shared.turning.set(true);
        let polled = self.turn(task);
        self.shared.turning.set(false);
        polled
    }

    fn turn(&mut self, task: &mut Context<'_>) -> Poll<Ended> {
        for _ in 0..READS {
            let read = match self.poll_read(task) {
                Poll::Ready(Ok(n)) => n > 0,
                Poll::Ready(Err(ended)) => return Poll::Ready(ended),
                Poll::Pending => false,
            };
            loop {
                // Woken streams only; new ones are among them.
                while let Poll::Ready(Some(())) = self.streams.poll_next_unpin(task) {}
                if self.cx.is_closing() && !self.noticed {
                    self.noticed = true;
                    self.shared.codec.borrow_mut().drain_notice();
                }
                let flushed = self.poll_flush(task);
                if matches!(flushed, Poll::Ready(Err(()))) {
                    return Poll::Ready(Ended::Remote);
                }
                if !self.wake_writable() {
                    break;
                }
            }
            if self.eof {
                return Poll::Ready(Ended::Remote);
            }
            if self.shared.codec.borrow().is_done() {
                return Poll::Ready(Ended::Local);
            }
            if !read {
                return self.poll_timers(task);
            }
        }
        task.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once and lets the codec understand it.
    fn poll_read(&mut self, task: &mut Context<'_>) -> Poll<Result<usize, Ended>> {
        let stats = &self.cx.manager.stats;
        let mut n = self.input.len();
        if !std::mem::take(&mut self.fresh) {
            if self.input.is_empty() {
                match ready!(self.io.poll_readable(task)) {
                    Ok(()) => self.input = stock::get(),
                    Err(_) => return Poll::Ready(Err(Ended::Remote)),
                }
            } else {
                self.input.reserve(stock::SIZE);
            }
            match self.io.poll_read(task, &mut self.input) {
                Poll::Ready(Ok(0)) => {
                    self.eof = true;
                    return Poll::Ready(Ok(0));
                }
                Poll::Ready(Ok(read)) => n = read,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Ended::Remote)),
                Poll::Pending => {
                    self.give_back();
                    return Poll::Pending;
                }
            }
            stats.cx_rx_bytes_total.add(n as u64);
        }
        let received = self.receive();
        self.give_back();
        match received {
            Ok(()) => {
                self.admit();
                Poll::Ready(Ok(n))
            }
            Err(fatal) => {
                // What was understood before is written down, too.
                self.admit();
                Poll::Ready(Err(Ended::Fatal(fatal)))
            }
        }
    }

    fn give_back(&mut self) {
        if self.input.is_empty() && self.input.capacity() > 0 {
            stock::put(std::mem::take(&mut self.input));
        }
    }

    fn receive(&mut self) -> Result<(), Fatal> {
        let shared = &self.shared;
        let arrivals = &mut self.arrivals;
        let cx = &self.cx;
        let stats = &cx.manager.stats_h2;
        let mut unwanted: Option<Vec<(StreamId, usize)>> = None;
        let mut ponged = false;
        let mut codec = shared.codec.borrow_mut();
        codec.set_time(clock::now().saturating_duration_since(shared.began));
        let result = codec.receive(&mut self.input, &mut |event| match event {
            Event::Request { stream, head, end } => {
                let inbox = Rc::new(Inbox {
                    stream,
                    state: RefCell::default(),
                });
                shared.insert(inbox.clone());
                let mut record = Record::open(cx, Protocol::Http2);
                record.request = Some(head);
                arrivals.push((inbox, record, end));
            }
            Event::Data { stream, data, end } => match shared.find(stream) {
                Some(inbox) if !inbox.state.borrow().abandoned => {
                    let mut state = inbox.state.borrow_mut();
                    if !data.is_empty() {
                        state.data.push_back(data);
                    }
                    state.ended |= end;
                    state.wake_reader();
                }
                found => {
                    if !data.is_empty() {
                        unwanted.get_or_insert_default().push((stream, data.len()));
                    }
                    if end && found.is_some() {
                        shared.remove(stream);
                    }
                }
            },
            Event::Trailers { stream, trailers } => {
                stats.trailers.inc();
                if let Some(inbox) = shared.find(stream) {
                    let mut state = inbox.state.borrow_mut();
                    state.trailers = Some(trailers);
                    state.ended = true;
                    state.wake_reader();
                    let abandoned = state.abandoned;
                    drop(state);
                    if abandoned {
                        shared.remove(stream);
                    }
                }
            }
            Event::Reset {
                stream,
                code: _,
                local,
            } => {
                match local {
                    Some(_) => {
                        stats.rx_messaging_error.inc();
                        stats.tx_reset.inc();
                    }
                    None => stats.rx_reset.inc(),
                }
                if let Some(inbox) = shared.find(stream) {
                    inbox.end(local.map_or(Over::Reset, Over::Violated));
                    shared.remove(stream);
                }
            }
            Event::Malformed { details } => {
                stats.rx_messaging_error.inc();
                Record::open(cx, Protocol::Http2).violated(details);
            }
            Event::Pong { .. } => ponged = true,
            Event::GoAway { .. }
            | Event::Settings
            | Event::SettingsAcknowledged
            | Event::Response { .. }
            | Event::Informational { .. } => {}
        });
        for (stream, bytes) in unwanted.into_iter().flatten() {
            codec.consumed(stream, bytes);
        }
        drop(codec);
        if ponged {
            self.pong_by = None;
        }
        self.malformed = result.is_err_and(|fatal| fatal.is_malformed_message());
        result
    }

    /// Begins to serve the requests that have come.
    fn admit(&mut self) {
        for (inbox, record, end) in self.arrivals.drain(..) {
            let (cx, shared) = (self.cx.clone(), self.shared.clone());
            self.streams
                .push(boxed(|| run(cx, shared, inbox, record, end)));
        }
        if self.arrivals.capacity() > 64 {
            self.arrivals = Vec::new();
        }
    }

    /// Writes what waits; pending when the socket takes no more.
    fn poll_flush(&mut self, task: &mut Context<'_>) -> Poll<Result<(), ()>> {
        let stats = &self.cx.manager.stats;
        loop {
            let mut codec = self.shared.codec.borrow_mut();
            if !codec.has_output() {
                break;
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = codec.output(&mut slices);
            let written = self
                .io
                .poll_write(task, slices.get(..filled).unwrap_or_default());
            match written {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(())),
                Poll::Ready(Ok(n)) => {
                    codec.advance(n);
                    stats.cx_tx_bytes_total.add(n as u64);
                    self.stall.clear();
                }
                Poll::Pending => {
                    drop(codec);
                    self.stalls();
                    return Poll::Pending;
                }
            }
        }
        match self.io.poll_flush(task) {
            Poll::Ready(Ok(())) => {
                self.stall.clear();
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(_)) => Poll::Ready(Err(())),
            Poll::Pending => {
                self.stalls();
                Poll::Pending
            }
        }
    }

    fn stalls(&mut self) {
        if !self.stall.is_set()
            && let Some(patience) = self.cx.manager.limits.stream_idle
        {
            self.stall.set(Instant::now() + patience);
        }
    }

    /// Wakes the streams that may write again; whether there are any.
    fn wake_writable(&mut self) -> bool {
        let mut any = false;
        loop {
            let next = self.shared.codec.borrow_mut().next_writable();
            let Some(stream) = next else { return any };
            if let Some(inbox) = self.shared.find(stream)
                && let Some(owner) = inbox.state.borrow_mut().owner.take()
            {
                owner.wake();
                any = true;
            }
        }
    }

    fn poll_timers(&mut self, task: &mut Context<'_>) -> Poll<Ended> {
        if self.stall.poll(task).is_ready() {
            self.cx.manager.stats_h2.tx_flush_timeout.inc();
            return Poll::Ready(Ended::Local);
        }
        if let Some(at) = self.pong_by.or(self.ping_at) {
            self.ping.set(at);
            if self.ping.poll(task).is_ready() {
                if self.pong_by.is_some() {
                    self.cx.manager.stats_h2.keepalive_timeout.inc();
                    return Poll::Ready(Ended::Local);
                }
                self.send_ping();
                task.waker().wake_by_ref();
            }
        }
        loop {
            match ready!(self.cx.poll_end(None, &mut self.deadline, task)) {
                End::Closing => {
                    task.waker().wake_by_ref();
                    return Poll::Pending;
                }
                End::Head => {}
                End::Gone => {
                    self.cx.forget_gone();
                    if self.cx.active() == 0 {
                        self.shared.codec.borrow_mut().drain();
                        // Not waited for: the peer had its time.
                        let _leftover = self.poll_flush(task);
                        return Poll::Ready(Ended::Local);
                    }
                    if !std::mem::replace(&mut self.drained, true) {
                        self.shared.codec.borrow_mut().drain();
                        task.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn send_ping(&mut self) {
        if let Some((interval, timeout)) = self.cx.manager.limits.keepalive {
            let now = Instant::now();
            self.shared.codec.borrow_mut().ping(*b"lateen\0\0");
            self.pong_by = Some(now + timeout);
            self.ping_at = Some(now + interval);
        }
    }

    /// Ends all streams, each with what the end of the connection means for it.
    fn leave(&mut self, ended: Ended) {
        let stats = &self.cx.manager.stats;
        stats.count_end(matches!(ended, Ended::Remote), self.cx.active() > 0);
        let over = match ended {
            Ended::Remote | Ended::Local => Over::Closed,
            Ended::Fatal(fatal) => {
                stats.cx_protocol_error.inc();
                self.cx.manager.stats_h2.count(fatal.counter);
                tracing::debug!(%fatal, connection = self.cx.info.id, "downstream connection failed");
                Over::Violated(fatal.details)
            }
        };
        let open = std::mem::take(&mut *self.shared.open.borrow_mut());
        for inbox in open.into_iter().flatten() {
            inbox.end(over);
        }
        let mut task = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(())) = self.streams.poll_next_unpin(&mut task) {}
        self.streams.clear();
        if self.malformed {
            // As Envoy, which closes without a word when a message breaks the rules.
            return;
        }
        // GOAWAY, as far as the socket takes it at once.
        let _leftover = self.poll_flush(&mut task);
    }

    /// Ends our half and waits a moment for the peer to read what was said. Envoy: `delayed_close_timeout`.
    async fn linger(mut self) {
        drop(poll_fn(|task| self.io.poll_shutdown(task)).await);
        let Some(limit) = self.cx.manager.limits.delayed_close else {
            return;
        };
        self.deadline.set(Instant::now() + limit);
        let mut left = LINGER_BYTES;
        poll_fn(|task| {
            while left > 0 {
                let mut buffer = stock::get();
                let read = self.io.poll_read(task, &mut buffer);
                stock::put(buffer);
                match read {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(()),
                    Poll::Ready(Ok(n)) => left = left.saturating_sub(n),
                    Poll::Pending => break,
                }
            }
            self.deadline.poll(task)
        })
        .await;
    }
}

/// Serves one stream.
async fn run(
    cx: Rc<ConnectionContext>,
    shared: Rc<Shared>,
    inbox: Rc<Inbox>,
    mut record: Box<Record>,
    end: bool,
) {
    let guard = Abandon {
        shared: &shared,
        inbox: &inbox,
    };
    let Some(head) = &mut record.request else {
        return;
    };
    let upgrade: Option<Box<str>> = if &*head.method == b"CONNECT" {
        Some("connect".into())
    } else {
        head.headers.known(Known::Upgrade).map(|protocol| {
            String::from_utf8_lossy(protocol)
                .trim()
                .to_ascii_lowercase()
                .into()
        })
    };
    let manager = &cx.manager;
    if head
        .headers
        .known(Known::Expect)
        .is_some_and(|expect| expect.eq_ignore_ascii_case(b"100-continue"))
        && !manager.proxy_100_continue
    {
        head.headers.remove_known(Known::Expect);
        manager.stats.rq_1xx.inc();
        let go_on = ResponseHead {
            status: 100,
            headers: Headers::default(),
        };
        inform(&shared, inbox.stream, &go_on);
    }
    let host_given = !head.authority.is_empty();
    let body = body(&shared, &inbox, &record, end);
    let request = Request {
        body,
        upgrade,
        host_given,
    };
    let mut deadline = Deadline::default();
    let mut meanwhile = Meanwhile {
        shared: &shared,
        inbox: &inbox,
        proxy_informational: manager.proxy_100_continue,
    };
    let served = stream::serve(record, request, &mut meanwhile, &mut deadline).await;
    if let Some(outgoing) = served {
        answer(&cx, &shared, &inbox, outgoing, &mut deadline).await;
    }
    drop(guard);
}

fn inform(shared: &Shared, stream: StreamId, head: &ResponseHead) {
    // A stream that is gone needs no telling.
    let _gone = shared.codec.borrow_mut().inform(stream, head);
    shared.touch();
}

/// When a stream's future ends, nobody wants what still comes of its request.
struct Abandon<'a> {
    shared: &'a Rc<Shared>,
    inbox: &'a Rc<Inbox>,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        let mut state = self.inbox.state.borrow_mut();
        state.abandoned = true;
        state.reader = None;
        state.owner = None;
        let ended = state.ended || state.over.is_some();
        let unread: usize = state.data.drain(..).map(|data| data.len()).sum();
        drop(state);
        if let Ok(mut codec) = self.shared.codec.try_borrow_mut()
            && unread > 0
        {
            codec.consumed(self.inbox.stream, unread);
        }
        if ended {
            self.shared.remove(self.inbox.stream);
        }
        self.shared.touch();
    }
}

/// The body of a request.
fn body(shared: &Rc<Shared>, inbox: &Rc<Inbox>, record: &Record, end: bool) -> Body {
    let progress = Progress::of(record);
    let mut state = inbox.state.borrow_mut();
    if end {
        state.ended = true;
        progress.ended_at_once();
        return Body::empty();
    }
    if state.ended && state.data.len() <= 1 && state.over.is_none() {
        // All of it came in the turn of its head.
        let data = state.data.pop_front().unwrap_or_default();
        let trailers = state.trailers.take();
        drop(state);
        shared.codec.borrow_mut().consumed(inbox.stream, data.len());
        progress.received(data.len() as u64);
        progress.ended();
        return Body::whole(data, trailers);
    }
    drop(state);
    Body::stream(RequestBody {
        shared: shared.clone(),
        inbox: inbox.clone(),
        progress,
        length: record
            .request
            .as_ref()
            .and_then(|head| head.headers.known(Known::ContentLength))
            .and_then(|length| std::str::from_utf8(length).ok()?.parse().ok()),
    })
}

/// Sends a response to its end.
async fn answer(
    cx: &Rc<ConnectionContext>,
    shared: &Rc<Shared>,
    inbox: &Rc<Inbox>,
    mut outgoing: Outgoing,
    deadline: &mut Deadline,
) {
    let stream = inbox.stream;
    let stats = &cx.manager.stats_h2;
    if outgoing.record.info.borrow().response_code_details == "http2.unexpected_underscore" {
        // As Envoy, whose codec finds them before there is a request to answer.
        stats.requests_rejected_with_underscores_in_headers.inc();
        stats.tx_reset.inc();
        outgoing.record.unanswered("http2.unexpected_underscore");
        shared
            .codec
            .borrow_mut()
            .reset(stream, Code::INTERNAL_ERROR);
        shared.touch();
        return;
    }
    if cx.after_response(Protocol::Http2) != Fate::Stays {
        cx.close_gracefully(Instant::now());
    }
    let bodiless = outgoing.is_bodiless();
    let mut body = if bodiless {
        Body::empty()
    } else {
        std::mem::take(&mut outgoing.body)
    };
    let tunnel = outgoing.tunnel;
    let mut record = outgoing.record;
    let Some(head) = &mut record.response else {
        return;
    };
    head.headers.remove_all(OF_HTTP_1);
    let end = !tunnel && body.is_end_stream();
    let responded = shared.codec.borrow_mut().respond(stream, head, end);
    shared.touch();
    if responded.is_err() {
        return;
    }
    let active =
        tunnel.then(|| super::connection::Active::new(&cx.manager.stats.cx_upgrades_active));
    if !end {
        let sent =
            poll_fn(|task| poll_send(shared, inbox, &mut record, &mut body, deadline, task)).await;
        match sent {
            Sent::Whole => {}
            Sent::Left => return,
            Sent::Broken => {
                stats.tx_reset.inc();
                shared
                    .codec
                    .borrow_mut()
                    .reset(stream, Code::INTERNAL_ERROR);
                shared.touch();
                record.fail();
                return;
            }
            Sent::Violated(details) => {
                record.violated(details);
                return;
            }
        }
    }
    drop(active);
    record.complete();
    if inbox.state.borrow().ended {
        return;
    }
    // Answered before the request had come: once the answer has left, the rest of it is not wanted.
    shared.codec.borrow_mut().stop_receiving(stream);
    shared.touch();
}

enum Sent {
    Whole,
    /// Only a part: the stream is to be reset.
    Broken,
    Left,
    Violated(&'static str),
}

fn poll_send(
    shared: &Rc<Shared>,
    inbox: &Rc<Inbox>,
    record: &mut Record,
    body: &mut Body,
    deadline: &mut Deadline,
    task: &mut Context<'_>,
) -> Poll<Sent> {
    let stream = inbox.stream;
    loop {
        match inbox.state.borrow().over {
            None => {}
            Some(Over::Violated(details)) => return Poll::Ready(Sent::Violated(details)),
            Some(over) => {
                record.left = over.details();
                return Poll::Ready(Sent::Left);
            }
        }
        let room = shared.codec.borrow_mut().send_capacity(stream) > 0;
        let frame = if room {
            body.poll_frame(task)
        } else {
            Poll::Pending
        };
        let Poll::Ready(frame) = frame else {
            inbox.state.borrow_mut().own(task);
            return match record.limits.clone().poll(deadline, task) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(expired) => {
                    expired.count(&record.cx.manager.stats);
                    let mut info = record.info.borrow_mut();
                    info.flags.set(expired.flags());
                    info.response_code_details = expired.details().into();
                    Poll::Ready(Sent::Broken)
                }
            };
        };
        record.limits.touch();
        let mut codec = shared.codec.borrow_mut();
        let (sent, end) = match frame {
            Some(Ok(Frame::Data(data))) => {
                record.info.borrow_mut().bytes_sent += data.len() as u64;
                let end = body.is_end_stream();
                (codec.send_data(stream, data, end), end)
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                let sent = codec.send_trailers(stream, &trailers);
                stream::note_trailers(record, trailers);
                (sent, true)
            }
            None => (codec.send_data(stream, Bytes::new(), true), true),
            Some(Err(_)) => return Poll::Ready(Sent::Broken),
        };
        drop(codec);
        shared.touch();
        match (sent, end) {
            (Err(_), _) => return Poll::Ready(Sent::Left),
            (Ok(()), true) => return Poll::Ready(Sent::Whole),
            (Ok(()), false) => {}
        }
    }
}

impl Over {
    fn details(self) -> &'static str {
        match self {
            Over::Reset => super::record::REMOTE_RESET,
            Over::Closed => "downstream_remote_disconnect",
            Over::Violated(details) => details,
        }
    }
}

/// The stream while its response is awaited.
struct Meanwhile<'a> {
    shared: &'a Rc<Shared>,
    inbox: &'a Rc<Inbox>,
    proxy_informational: bool,
}

impl Downstream for Meanwhile<'_> {
    fn broken(&mut self) -> Option<Broken> {
        self.inbox.state.borrow().over.map(|over| match over {
            Over::Reset | Over::Closed => Broken::Left(over.details()),
            Over::Violated(details) => Broken::Violated(details),
        })
    }

    fn inform(&mut self, head: ResponseHead) {
        if self.proxy_informational {
            inform(self.shared, self.inbox.stream, &head);
        }
    }

    fn poll_meanwhile(&mut self, early: &Early, task: &mut Context<'_>) -> Poll<Broken> {
        if let Some(head) = early.take() {
            self.inform(head);
        }
        self.inbox.state.borrow_mut().own(task);
        Poll::Pending
    }
}

/// The body of a request that did not come whole in the turn of its head.
struct RequestBody {
    shared: Rc<Shared>,
    inbox: Rc<Inbox>,
    progress: Progress,
    length: Option<u64>,
}

impl Source for RequestBody {
    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut state = self.inbox.state.borrow_mut();
        if let Some(data) = state.data.pop_front() {
            let last = state.ended && state.data.is_empty() && state.trailers.is_none();
            drop(state);
            self.shared
                .codec
                .borrow_mut()
                .consumed(self.inbox.stream, data.len());
            self.shared.touch();
            self.progress.received(data.len() as u64);
            if last {
                self.progress.ended();
            }
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        if state.ended {
            let trailers = state.trailers.take();
            drop(state);
            self.progress.ended();
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::Trailers(trailers))));
        }
        if state.over.is_some() {
            return Poll::Ready(Some(Err(BodyError::Disconnected)));
        }
        state.reader = Some(task.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let state = self.inbox.state.borrow();
        state.ended && state.data.is_empty() && state.trailers.is_none()
    }

    fn exact_length(&self) -> Option<u64> {
        let received = self.progress.info.borrow().bytes_received;
        self.length.map(|length| length.saturating_sub(received))
    }
}
