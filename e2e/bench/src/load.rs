//! The load: connections that send the next request when an answer is there (closed loop), or on a fixed
//! schedule (open loop, latency counted from the scheduled instant). One thread, no allocation per request.
//!
//! An answer that is not exactly the expected one is `bad`, and so is what a closed connection loses. A
//! connection that the peer ends properly (`connection: close`, GOAWAY) is opened anew.

mod http1;
mod http2;

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mio::{Events, Interest, Poll, Token, event::Event, unix::SourceFd};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use rustls::ClientConfig;

use crate::{
    process::CpuClock,
    upstream::grpc_message,
    wire::{After, SERVER_NAME, Wire},
};

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
    /// Unary calls over HTTP/2.
    Grpc,
    /// Bytes that come back; `body` of them at a time.
    Messages,
    /// An HTTP/1.1 upgrade, then as `Messages`.
    WebSocket,
    /// Bytes without end from the peer.
    Download,
    /// Bytes without end to the peer.
    Upload,
}

/// What to send and what to expect.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) protocol: Protocol,
    pub(crate) connections: usize,
    /// Requests at a time on each connection.
    pub(crate) streams: usize,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    /// Every request on a connection of its own.
    pub(crate) fresh: bool,
    pub(crate) host: String,
    pub(crate) path: String,
    /// Bytes of a request's body.
    pub(crate) body: usize,
    /// A call's message, where its contents matter; else it is `body` bytes of no meaning.
    pub(crate) message: Option<Arc<[u8]>>,
    /// Bytes of a response's body.
    pub(crate) answer: usize,
}

impl Plan {
    /// A GET with a small answer; change what differs.
    pub(crate) fn new(protocol: Protocol, connections: usize, streams: usize) -> Plan {
        Plan {
            protocol,
            connections,
            streams,
            tls: None,
            fresh: false,
            host: SERVER_NAME.to_owned(),
            path: "/api/v1/items".to_owned(),
            body: 0,
            message: None,
            answer: 128,
        }
    }
}

/// When to send.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// As soon as the answer before is there.
    Closed,
    /// So many a second, whatever the answers do.
    Rate(f64),
}

/// When to end.
#[derive(Clone, Debug)]
pub(crate) enum Extent {
    /// After a window that begins after a warm-up.
    Window { warm_up: Duration, window: Duration },
    /// After so many good answers.
    Requests(u64),
    /// When told to.
    Told(Arc<Live>),
    /// One answer on every connection; ends when told to.
    Held(Arc<Live>),
}

/// What a running load shows to others.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) good: AtomicU64,
    pub(crate) bad: AtomicU64,
    pub(crate) stop: AtomicBool,
    pub(crate) problems: Mutex<Vec<String>>,
}

/// What was counted, in the window if there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) good: u64,
    /// Over the whole run.
    pub(crate) bad: u64,
    /// Body or raw bytes that came, plus those that went in an upload.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// CPU time that the watched processes used.
    pub(crate) cpu_ns: u64,
    /// Nanoseconds, sorted; of an open loop only.
    pub(crate) latencies: Vec<u64>,
    /// The first few things that went wrong.
    pub(crate) problems: Vec<String>,
}

/// Counts as answers come.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    good: u64,
    bad: u64,
    bytes: u64,
    problems: Vec<String>,
}

impl Tally {
    pub(crate) fn good(&mut self) {
        self.good += 1;
    }

    pub(crate) fn bytes(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    pub(crate) fn bad(&mut self, number: usize, why: impl FnOnce() -> String) {
        self.bad += number as u64;
        if number > 0 && self.problems.len() < 5 {
            self.problems.push(why());
        }
    }
}

/// Pieces in which bulk data is written, and read buffer.
const BUFFER_BYTES: usize = 256 * 1024;
const TIMER: Token = Token(usize::MAX);
/// Connections to be held that may wait for their answer at once: below what clusters let wait by default (1,024).
const HELD_AT_ONCE: usize = 256;
/// An answer that takes longer is bad, and its connection is given up.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks for answers that do not come.
const LOOK: Duration = Duration::from_millis(500);
/// So many failed connections in a row end the run.
const MAX_FAILURES: u64 = 10_000;

/// A client of one protocol on one connection.
#[derive(Debug)]
enum Client {
    Http1(http1::Client),
    Http2(Box<http2::Client>),
    Raw(Raw),
    Bulk,
}

/// A message that comes back, perhaps after an upgrade.
#[derive(Debug)]
struct Raw {
    /// Bytes of the message that have not come back yet.
    left: usize,
    since: Option<Instant>,
    upgrade: Upgrade,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upgrade {
    Wanted,
    Asked,
    Done,
}

#[derive(Debug)]
struct Connection {
    wire: Wire,
    client: Client,
    connected: bool,
    ready: bool,
}

/// Runs a load against `to`; `watched` is read at both ends of the window.
pub(crate) fn run(
    to: SocketAddr,
    plan: &Plan,
    pace: Pace,
    extent: &Extent,
    watched: &[CpuClock],
) -> anyhow::Result<Outcome> {
    let mut engine = Engine {
        to,
        plan,
        request: Request::new(plan),
        poll: Poll::new()?,
        connections: Vec::new(),
        idle: VecDeque::new(),
        late: VecDeque::new(),
        open_loop: matches!(pace, Pace::Rate(_)),
        held_only: matches!(extent, Extent::Held(_)),
        tally: Tally::default(),
        latencies: Vec::new(),
        failures: 0,
        finished: Vec::new(),
    };
    engine.run(pace, extent, watched)
}

/// A request in the forms the protocols need.
#[derive(Debug)]
struct Request {
    text: Vec<u8>,
    block: crate::frame::Block,
    body: Vec<u8>,
}

impl Request {
    fn new(plan: &Plan) -> Request {
        let Plan {
            host, path, body, ..
        } = plan;
        let upgrade = plan.protocol == Protocol::WebSocket;
        let mut text = match (*body, upgrade) {
            (_, true) => format!(
                "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            ),
            (0, _) => format!(
                "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: bench\r\naccept: */*\r\n\r\n"
            ),
            (bytes, _) => format!(
                "POST {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: bench\r\naccept: */*\r\ncontent-length: {bytes}\r\n\r\n"
            ),
        }
        .into_bytes();
        let block = crate::frame::Block::new(&if plan.protocol == Protocol::Grpc {
            vec![
                (":method", "POST"),
                (":scheme", "http"),
                (":authority", host),
                (":path", path),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                ("user-agent", "bench"),
            ]
        } else {
            vec![
                (":method", if *body == 0 { "GET" } else { "POST" }),
                (":scheme", "http"),
                (":authority", host),
                (":path", path),
                ("user-agent", "bench"),
                ("accept", "*/*"),
            ]
        });
        let body = match plan.protocol {
            Protocol::Grpc => match &plan.message {
                Some(message) => grpc_message(message),
                None => grpc_message(&vec![b'a'; *body]),
            },
            Protocol::Upload => vec![b'a'; BUFFER_BYTES],
            _ => vec![b'a'; *body],
        };
        if plan.protocol == Protocol::Http1 {
            text.extend_from_slice(&body);
        }
        Request { text, block, body }
    }
}

#[derive(Debug)]
struct Engine<'a> {
    to: SocketAddr,
    plan: &'a Plan,
    request: Request,
    poll: Poll,
    connections: Vec<Connection>,
    /// Connections with room for a request, once for each (open loop).
    idle: VecDeque<usize>,
    /// Due requests that found no room (open loop).
    late: VecDeque<Instant>,
    open_loop: bool,
    held_only: bool,
    tally: Tally,
    latencies: Vec<u64>,
    failures: u64,
    finished: Vec<Instant>,
}

impl Engine<'_> {
    fn run(
        &mut self,
        pace: Pace,
        extent: &Extent,
        watched: &[CpuClock],
    ) -> anyhow::Result<Outcome> {
        self.open_more()?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let raw = timer.as_fd().as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&raw), TIMER, Interest::READABLE)?;

        let started = Instant::now();
        let (begin, end) = match extent {
            Extent::Window { warm_up, window } => {
                (Some(started + *warm_up), Some(started + *warm_up + *window))
            }
            _ => (None, None),
        };
        let interval = match pace {
            Pace::Rate(rate) => Some(Duration::from_secs_f64(1.0 / rate)),
            Pace::Closed => None,
        };
        let mut due = started + Duration::from_millis(100);
        let mut look = started + LOOK;
        let mut mark: Option<(Instant, u64, u64, u64)> = None;
        let mut events = Events::with_capacity(512);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let now = Instant::now();
            if mark.is_none() && begin.is_none_or(|begin| now >= begin) {
                self.latencies.clear();
                mark = Some((
                    now,
                    CpuClock::sum(watched)?,
                    self.tally.good,
                    self.tally.bytes,
                ));
            }
            let over = match extent {
                Extent::Window { .. } => end.is_some_and(|end| now >= end),
                Extent::Requests(number) => self.tally.good >= *number,
                Extent::Told(live) | Extent::Held(live) => {
                    live.good.store(self.tally.good, Ordering::Relaxed);
                    live.bad.store(self.tally.bad, Ordering::Relaxed);
                    live.stop.load(Ordering::Relaxed)
                }
            };
            if over {
                let (since, cpu, good, bytes) = mark.context("the window never began")?;
                let mut latencies = std::mem::take(&mut self.latencies);
                latencies.sort_unstable();
                return Ok(Outcome {
                    good: self.tally.good - good,
                    bad: self.tally.bad,
                    bytes: self.tally.bytes - bytes,
                    seconds: (now - since).as_secs_f64(),
                    cpu_ns: CpuClock::sum(watched)? - cpu,
                    latencies,
                    problems: std::mem::take(&mut self.tally.problems),
                });
            }
            if now >= look {
                look = now + LOOK;
                self.give_up_late(now)?;
                if let Extent::Told(live) | Extent::Held(live) = extent {
                    let mut problems = live.problems.lock().unwrap_or_else(PoisonError::into_inner);
                    problems.append(&mut self.tally.problems);
                    problems.truncate(100);
                }
                anyhow::ensure!(
                    self.failures < MAX_FAILURES,
                    "connections keep failing: {:?}",
                    self.tally.problems
                );
                if matches!(extent, Extent::Requests(_)) {
                    anyhow::ensure!(
                        self.tally.bad == 0,
                        "bad answers: {:?}",
                        self.tally.problems
                    );
                }
            }
            if let Some(interval) = interval {
                while due <= now {
                    self.late.push_back(due);
                    due += interval;
                }
                self.send_late()?;
            }
            let next = [
                interval.map(|_| due),
                end,
                begin.filter(|_| mark.is_none()),
                Some(look),
            ]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(look);
            if interval.is_some() {
                // The poll's own timeout knows milliseconds only.
                let wait = next
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_nanos(1));
                timer.set(
                    Expiration::OneShot(TimeSpec::from_duration(wait)),
                    TimerSetTimeFlags::empty(),
                )?;
            }
            let limit = next.saturating_duration_since(now);
            let limit = if interval.is_some() { LOOK } else { limit };
            if let Err(error) = self.poll.poll(&mut events, Some(limit))
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error.into());
            }
            for event in &events {
                if event.token() != TIMER {
                    self.turn(event, &mut buffer)?;
                }
            }
            self.open_more()?;
        }
    }

    /// Opens the plan's connections: all of them, or, where they are only held, as many as may be unanswered.
    fn open_more(&mut self) -> anyhow::Result<()> {
        let answered = (self.tally.good + self.tally.bad) as usize;
        let most = if self.held_only {
            answered.saturating_add(HELD_AT_ONCE)
        } else {
            usize::MAX
        };
        for index in self.connections.len()..self.plan.connections.min(most) {
            let connection = self.open(index)?;
            self.connections.push(connection);
        }
        Ok(())
    }

    fn open(&self, index: usize) -> anyhow::Result<Connection> {
        let mut wire = Wire::connect(self.to, self.plan.tls.as_ref())?;
        wire.register(self.poll.registry(), Token(index))?;
        Ok(Connection {
            wire,
            client: match self.plan.protocol {
                Protocol::Http1 => Client::Http1(http1::Client::default()),
                Protocol::Http2 | Protocol::Grpc => Client::Http2(Box::default()),
                Protocol::Messages | Protocol::WebSocket => Client::Raw(Raw {
                    left: 0,
                    since: None,
                    upgrade: match self.plan.protocol {
                        Protocol::WebSocket => Upgrade::Wanted,
                        _ => Upgrade::Done,
                    },
                }),
                Protocol::Download | Protocol::Upload => Client::Bulk,
            },
            connected: false,
            ready: false,
        })
    }

    /// Ends a connection and opens another in its place; what was under way is lost.
    fn reopen(&mut self, index: usize, why: Option<String>) -> anyhow::Result<()> {
        let connection = &mut self.connections[index];
        connection.wire.deregister(self.poll.registry());
        if let Some(why) = why {
            self.failures += 1;
            let lost = connection.under_way().max(1);
            self.tally.bad(lost, || format!("{lost} lost: {why}"));
        }
        self.idle.retain(|idle| *idle != index);
        self.connections[index] = self.open(index)?;
        Ok(())
    }

    fn give_up_late(&mut self, now: Instant) -> anyhow::Result<()> {
        for index in 0..self.connections.len() {
            let oldest = self.connections[index].oldest();
            if oldest.is_some_and(|since| now.saturating_duration_since(since) > PATIENCE) {
                self.reopen(index, Some(format!("no answer within {PATIENCE:?}")))?;
            }
        }
        Ok(())
    }

    /// Sends due requests on connections that have room (open loop).
    fn send_late(&mut self) -> anyhow::Result<()> {
        while let Some(due) = self.late.front().copied()
            && let Some(index) = self.idle.pop_front()
        {
            self.late.pop_front();
            let connection = &mut self.connections[index];
            connection.send(&self.request, due);
            if let Err(error) = connection.wire.flush() {
                self.reopen(index, Some(error.to_string()))?;
            }
        }
        Ok(())
    }

    fn turn(&mut self, event: &Event, buffer: &mut [u8]) -> anyhow::Result<()> {
        let index = event.token().0;
        match self.progress(index, event, buffer) {
            Ok(Progress::Open) => Ok(()),
            Ok(Progress::Done) => self.reopen(index, None),
            Ok(Progress::Closed) => self.reopen(index, Some("the peer closed".to_owned())),
            Err(error) => self.reopen(index, Some(error.to_string())),
        }
    }

    fn progress(&mut self, index: usize, event: &Event, buffer: &mut [u8]) -> io::Result<Progress> {
        let plan = self.plan;
        let connection = &mut self.connections[index];
        if !connection.connected {
            if !event.is_writable() || !connection.wire.connected()? {
                return Ok(Progress::Open);
            }
            connection.connected = true;
            // TLS says hello; without TLS this sends nothing.
            connection.wire.flush()?;
        }
        self.finished.clear();
        let mut after = After::Waits;
        if event.is_readable() {
            let closed = event.is_read_closed();
            after = connection.read(buffer, closed, plan, &mut self.tally, &mut self.finished)?;
        }
        let answered = self.finished.len();
        if answered > 0 {
            self.failures = 0;
            if self.open_loop {
                let now = Instant::now();
                self.latencies.extend(
                    self.finished
                        .iter()
                        .map(|due| (now - *due).as_nanos() as u64),
                );
            }
            if plan.fresh {
                return Ok(Progress::Done);
            }
        }
        let mut room = answered;
        let leaving = match &mut connection.client {
            Client::Http1(http1) => http1.closing,
            Client::Http2(http2) => {
                room += std::mem::take(&mut http2.refused);
                http2.leaving
            }
            Client::Raw(_) | Client::Bulk => false,
        };
        let finished = connection.under_way() == 0;
        if after == After::Closed {
            // A keep-alive connection may end between two requests; others may not.
            let proper = connection.ready
                && finished
                && matches!(connection.client, Client::Http1(_) | Client::Http2(_));
            return Ok(if proper {
                Progress::Done
            } else {
                Progress::Closed
            });
        }
        if leaving && finished {
            return Ok(Progress::Done);
        }
        if leaving {
            room = 0;
        } else if !connection.ready && connection.prepare(&self.request) {
            connection.ready = true;
            room = if self.held_only || plan.fresh {
                1
            } else {
                plan.streams
            };
        } else if self.held_only {
            room = 0;
        }
        if connection.ready {
            if self.open_loop {
                self.idle.extend(std::iter::repeat_n(index, room));
            } else if room > 0 {
                let now = Instant::now();
                for _ in 0..room {
                    connection.send(&self.request, now);
                }
            }
            if plan.protocol == Protocol::Upload {
                let (taken, poured) = connection.wire.pour(&self.request.body)?;
                self.tally.bytes += taken;
                after = poured;
            }
        }
        connection.wire.flush()?;
        if after == After::More {
            connection.wire.wake(self.poll.registry(), Token(index))?;
        }
        Ok(Progress::Open)
    }
}

/// What became of a connection in a turn.
enum Progress {
    Open,
    /// Ended as it should.
    Done,
    /// Ended by the peer although something was under way, or could be.
    Closed,
}

impl Connection {
    fn read(
        &mut self,
        buffer: &mut [u8],
        to_end: bool,
        plan: &Plan,
        tally: &mut Tally,
        finished: &mut Vec<Instant>,
    ) -> io::Result<After> {
        let Connection { wire, client, .. } = self;
        let mut out = std::mem::take(&mut wire.out);
        let grpc = plan.protocol == Protocol::Grpc;
        let after = wire.read(buffer, to_end, |bytes| match client {
            Client::Http1(http1) => http1.feed(bytes, plan.answer, tally, finished),
            Client::Http2(http2) => {
                // The peer may speak first; what answers it comes after the preface.
                http2.greet(&mut out);
                http2.feed(bytes, plan.answer, grpc, tally, finished, &mut out);
            }
            Client::Raw(raw) => raw.feed(bytes, tally, finished),
            Client::Bulk => tally.bytes(bytes.len()),
        });
        wire.out = out;
        after
    }

    /// Does what comes before the first request; whether that is done.
    fn prepare(&mut self, request: &Request) -> bool {
        if self.wire.shaking() {
            return false;
        }
        match &mut self.client {
            Client::Http1(_) | Client::Bulk => true,
            Client::Http2(http2) => {
                http2.greet(&mut self.wire.out);
                http2.ready
            }
            Client::Raw(raw) => {
                if raw.upgrade == Upgrade::Wanted {
                    raw.upgrade = Upgrade::Asked;
                    raw.since = Some(Instant::now());
                    self.wire.out.extend_from_slice(&request.text);
                }
                raw.upgrade == Upgrade::Done
            }
        }
    }

    fn send(&mut self, request: &Request, due: Instant) {
        let out = &mut self.wire.out;
        match &mut self.client {
            Client::Http1(http1) => {
                out.extend_from_slice(&request.text);
                http1.since = Some(due);
            }
            Client::Http2(http2) => http2.send(&request.block, &request.body, due, out),
            Client::Raw(raw) => {
                out.extend_from_slice(&request.body);
                raw.left = request.body.len();
                raw.since = Some(due);
            }
            Client::Bulk => {}
        }
    }

    fn under_way(&self) -> usize {
        match &self.client {
            Client::Http1(http1) => usize::from(http1.since.is_some()),
            Client::Http2(http2) => http2.under_way(),
            Client::Raw(raw) => usize::from(raw.since.is_some()),
            Client::Bulk => 0,
        }
    }

    fn oldest(&self) -> Option<Instant> {
        match &self.client {
            Client::Http1(http1) => http1.since,
            Client::Http2(http2) => http2.oldest(),
            Client::Raw(raw) => raw.since,
            Client::Bulk => None,
        }
    }
}

impl Raw {
    fn feed(&mut self, bytes: &[u8], tally: &mut Tally, finished: &mut Vec<Instant>) {
        tally.bytes(bytes.len());
        if self.upgrade != Upgrade::Done {
            // The answer has no body, and nothing follows before we speak.
            self.since = None;
            if bytes.starts_with(b"HTTP/1.1 101 ") && bytes.ends_with(b"\r\n\r\n") {
                self.upgrade = Upgrade::Done;
            } else {
                tally.bad(1, || {
                    format!("no upgrade: {}", String::from_utf8_lossy(bytes))
                });
            }
            return;
        }
        self.left = self.left.saturating_sub(bytes.len());
        if self.left == 0
            && let Some(since) = self.since.take()
        {
            tally.good();
            finished.push(since);
        }
    }
}
