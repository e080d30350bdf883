//! The HTTP/1.1 driver: one task a connection reads requests, has them served, and writes the answers, in
//! order. While it waits for a request it holds no buffer.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, BytesMut};
use lateen_codec::h1::{
    self, BodyDecoder, Connection as Says, Framing, ParseError, Parsed, Piece, Reply, RequestMeta,
    Scan, Upgrade,
};
use tokio::{net::TcpStream, time::Instant};

use super::{
    ConnectionContext,
    connection::{End, Fate, LINGER_BYTES},
    late::{self, Late},
    output::Output,
    record::Record,
    stream::{self, Broken, Downstream, Early, Outgoing, Progress, Request},
};
use crate::{
    body::{Body, BodyError, Frame, Source},
    boxed::boxed,
    head::{Known, Protocol, ResponseHead},
    info::ResponseFlags,
    net::{
        Transport,
        splice::{Passage, Step},
        stock,
    },
    reject::Reject,
    timer::Deadline,
};

/// Bytes read beyond the request that is being served: pipelined ones, and what shows that the peer left.
const READ_AHEAD: usize = 16 * 1024;
/// Most bytes of a body read at once.
const READ_BODY: usize = 64 * 1024;
/// Bytes of a response that wait for the socket before its body is asked for more.
const WRITE_AHEAD: usize = 64 * 1024;

/// Bytes of answers that leave at the end of the turn; more are written by the connection.
const LATE: usize = 16 * 1024;

/// Serves a connection to its end. `input` is what was read of it already.
pub(super) fn serve(
    cx: Rc<ConnectionContext>,
    io: Transport,
    input: BytesMut,
) -> impl Future<Output = ()> {
    let fresh = !input.is_empty();
    let mut connection = Connection {
        wire: Rc::new(RefCell::new(Wire {
            cx: cx.clone(),
            io,
            input,
            decoder: None,
            eof: false,
            tunnel: false,
            broken: None,
            reading: false,
            driver: None,
            late: BytesMut::new(),
            late_soon: false,
            task: None,
        })),
        cx,
        out: Output::default(),
        deadline: Deadline::default(),
        scan: Scan::default(),
        head_since: None,
        fresh,
    };
    async move {
        loop {
            let next = match poll_fn(|task| connection.poll_head(task)).await {
                Some(next) => next,
                None => return,
            };
            // Boxed, so that a connection that waits weighs little.
            let after = match next {
                Next::Request(record, meta) => boxed(|| connection.exchange(record, meta)).await,
                Next::Refused(reject) => boxed(|| connection.refuse(*reject)).await,
            };
            match after {
                After::Next => {}
                After::Linger => {
                    boxed(|| connection.linger()).await;
                    return;
                }
                After::Close => {
                    connection.cx.manager.stats.cx_destroy_local.inc();
                    drop(poll_fn(|task| connection.wire.borrow_mut().io.poll_shutdown(task)).await);
                    return;
                }
                After::Gone => return,
            }
        }
    }
}

/// The connection as its request bodies see it, too.
struct Wire {
    cx: Rc<ConnectionContext>,
    io: Transport,
    /// Read and not yet understood; without memory while nothing is in it.
    input: BytesMut,
    /// Of the request whose body has not come to its end.
    decoder: Option<BodyDecoder>,
    /// The peer has ended its half.
    eof: bool,
    /// The end of the peer's half is only the end of the request.
    tunnel: bool,
    broken: Option<Cut>,
    /// The request's body waits for bytes, so the driver does not.
    reading: bool,
    /// The driver, when it relies on the body to see what happens.
    driver: Option<Waker>,
    /// Answers that leave at the end of the turn, before all else that is written; without memory while there
    /// are none.
    late: BytesMut,
    /// The end of the turn has not come yet.
    late_soon: bool,
    /// The driver, to be told when not all of them has left.
    task: Option<Waker>,
}

/// What a request's body found out about the downstream.
#[derive(Clone, Copy)]
enum Cut {
    Left,
    Malformed(ParseError),
}

impl Wire {
    /// Reads what has come behind what is in `input`; 0 is the end of the peer's half.
    fn poll_fill(&mut self, most: usize, task: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        if self.input.is_empty() {
            if self.input.capacity() > 0 {
                stock::put(std::mem::take(&mut self.input));
            }
            ready!(self.io.poll_readable(task))?;
            self.input = if most > stock::SIZE {
                BytesMut::with_capacity(most)
            } else {
                stock::get()
            };
        } else if self.input.spare_capacity_mut().len() < most.min(stock::SIZE) / 4 {
            self.input.reserve(most);
        }
        let n = ready!(self.io.poll_read(task, &mut self.input))?;
        if n == 0 {
            self.eof = true;
        } else {
            self.cx.manager.stats.cx_rx_bytes_total.add(n as u64);
        }
        Poll::Ready(Ok(n))
    }

    /// Writes what was to leave late; ready when there is nothing of it any more.
    fn poll_late(&mut self, task: &mut Context<'_>) -> Poll<()> {
        while !self.late.is_empty() {
            match ready!(self.io.poll_write(task, &[IoSlice::new(&self.late)])) {
                // Reading tells that the peer has gone.
                Ok(0) | Err(_) => self.late.clear(),
                Ok(n) => self.left_late(n),
            }
        }
        self.end_late();
        Poll::Ready(())
    }

    fn left_late(&mut self, n: usize) {
        self.late.advance(n);
        self.cx.manager.stats.cx_tx_bytes_total.add(n as u64);
    }

    fn end_late(&mut self) {
        if self.late.capacity() > 0 {
            stock::put(std::mem::take(&mut self.late));
        }
    }

    fn cut(&mut self, cut: Cut) {
        self.broken = Some(cut);
        self.wake();
    }

    fn wake(&mut self) {
        self.reading = false;
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }
}

impl Late for RefCell<Wire> {
    fn write(&self) {
        let wire = &mut *self.borrow_mut();
        wire.late_soon = false;
        if wire.late.is_empty() {
            // It went before another answer.
            return;
        }
        if let Ok(n) = wire.io.try_write(&wire.late) {
            wire.left_late(n);
        }
        if wire.late.is_empty() {
            wire.end_late();
        } else if let Some(task) = wire.task.take() {
            // The driver sees to the rest.
            task.wake();
        }
    }
}

struct Connection {
    cx: Rc<ConnectionContext>,
    wire: Rc<RefCell<Wire>>,
    out: Output,
    deadline: Deadline,
    scan: Scan,
    /// When the first byte of a head that is not complete came.
    head_since: Option<Instant>,
    /// There are bytes that no look was taken at.
    fresh: bool,
}

enum Next {
    /// Its head stands in the record.
    Request(Box<Record>, RequestMeta),
    Refused(Box<Reject>),
}

enum After {
    /// The next request may come.
    Next,
    /// The peer may still be sending: give it time to read what we said.
    Linger,
    Close,
    Gone,
}

impl Connection {
    /// The next head; `None` at the end of the connection.
    fn poll_head(&mut self, task: &mut Context<'_>) -> Poll<Option<Next>> {
        let stats = &self.cx.manager.stats;
        let wire = &mut *self.wire.borrow_mut();
        loop {
            if std::mem::take(&mut self.fresh) && !wire.input.is_empty() {
                match h1::parse_request(&wire.input, &self.cx.manager.h1, &mut self.scan) {
                    Ok(Parsed::Complete { head, used }) => {
                        wire.input.advance(used);
                        self.scan = Scan::default();
                        self.head_since = None;
                        let (head, meta) = head;
                        let mut record = Record::open(&self.cx, head.protocol);
                        record.request = Some(head);
                        return Poll::Ready(Some(Next::Request(record, meta)));
                    }
                    Ok(Parsed::Partial) => {
                        self.head_since.get_or_insert_with(Instant::now);
                    }
                    Err(error) => return Poll::Ready(Some(Next::refuse(error))),
                }
            }
            // A peer that does not take our answers is not read from.
            let mut filled = if wire.late_soon || wire.poll_late(task).is_ready() {
                wire.poll_fill(READ_AHEAD, task)
            } else {
                Poll::Pending
            };
            if matches!(filled, Poll::Ready(Ok(0) | Err(_))) && wire.poll_late(task).is_pending() {
                filled = Poll::Pending;
            }
            match filled {
                Poll::Ready(Ok(0) | Err(_)) => {
                    stats.cx_destroy_remote.inc();
                    return Poll::Ready(None);
                }
                Poll::Ready(Ok(_)) => self.fresh = true,
                Poll::Pending => {
                    if wire.late_soon && wire.task.is_none() {
                        wire.task = Some(task.waker().clone());
                    }
                    match ready!(self.cx.poll_end(self.head_since, &mut self.deadline, task)) {
                        End::Closing => {}
                        End::Gone => {
                            stats.cx_destroy_local.inc();
                            return Poll::Ready(None);
                        }
                        End::Head => {
                            stats.rq_header_timeout.inc();
                            return Poll::Ready(Some(Next::Refused(Box::new(Reject::new(
                                408,
                                "request header timeout",
                                ResponseFlags::default(),
                                "request_header_timeout",
                            )))));
                        }
                    }
                }
            }
        }
    }

    /// Has a request served and sends the answer.
    async fn exchange(&mut self, mut record: Box<Record>, meta: RequestMeta) -> After {
        self.recall();
        if meta.expect_continue {
            let manager = &self.cx.manager;
            match &mut record.request {
                Some(head) if manager.proxy_100_continue => {
                    head.headers.append(Known::Expect, "100-continue");
                }
                _ => {
                    manager.stats.rq_1xx.inc();
                    h1::write_continue(self.out.text());
                }
            }
        }
        let upgrade: Option<Box<str>> = match meta.upgrade {
            Upgrade::None => None,
            Upgrade::Connect => Some("connect".into()),
            Upgrade::Protocol => Some(
                String::from_utf8_lossy(record.header(Known::Upgrade).unwrap_or_default())
                    .trim()
                    .to_ascii_lowercase()
                    .into(),
            ),
        };
        let body = self.body(&record, meta.framing);
        let request = Request {
            body,
            upgrade,
            host_given: meta.host_given,
        };
        let mut meanwhile = Meanwhile {
            wire: &self.wire,
            out: &mut self.out,
        };
        let served = stream::serve(record, request, &mut meanwhile, &mut self.deadline).await;
        match served {
            Some(outgoing) => {
                // As Envoy, which has not looked at the body yet when it answers the head.
                let hasty =
                    outgoing.hasty && !matches!(meta.framing, Framing::None | Framing::Length(0));
                if hasty {
                    outgoing.unread();
                }
                self.answer(outgoing, meta.keep_alive && !hasty).await
            }
            None => {
                self.cx.manager.stats.count_end(true, true);
                After::Gone
            }
        }
    }

    /// Takes answers back that have not left yet: what is said from now on follows them.
    fn recall(&mut self) {
        let mut wire = self.wire.borrow_mut();
        if !wire.late.is_empty() {
            self.out.begin_with(std::mem::take(&mut wire.late));
        }
    }

    /// The body of the request whose head has just been read.
    fn body(&mut self, record: &Record, framing: Framing) -> Body {
        let mut wire = self.wire.borrow_mut();
        wire.reading = false;
        wire.driver = None;
        let progress = Progress::of(record);
        match framing {
            Framing::None | Framing::Length(0) => {
                wire.decoder = None;
                self.fresh = true;
                progress.ended_at_once();
                return Body::empty();
            }
            // The whole body came with its head.
            Framing::Length(length)
                if usize::try_from(length)
                    .is_ok_and(|n| n <= wire.input.len() && n <= READ_BODY) =>
            {
                let n = usize::try_from(length).unwrap_or_default();
                let data = wire.input.split_to(n).freeze();
                wire.decoder = None;
                self.fresh = true;
                progress.received(n as u64);
                progress.ended();
                return Body::full(data);
            }
            Framing::Length(_) | Framing::Chunked | Framing::UntilClose => {}
        }
        wire.decoder = Some(BodyDecoder::new(framing, &self.cx.manager.h1));
        Body::stream(RequestBody {
            wire: self.wire.clone(),
            progress,
            length: match framing {
                Framing::Length(length) => Some(length),
                _ => None,
            },
            passage: Passage::default(),
        })
    }

    /// Answers what is no request.
    async fn refuse(&mut self, reject: Reject) -> After {
        self.recall();
        let record = Record::open(&self.cx, Protocol::Http11);
        if reject
            .flags
            .contains(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR)
        {
            self.cx.manager.stats.cx_protocol_error.inc();
        }
        self.answer(stream::refuse(record, reject), false).await;
        After::Linger
    }

    /// Sends a response to its end.
    async fn answer(&mut self, outgoing: Outgoing, keep_alive: bool) -> After {
        let cx = self.cx.clone();
        let stats = &cx.manager.stats;
        let protocol = outgoing.record.protocol;
        // Envoy does not wait for the rest of a request that has been answered already; neither for what
        // follows a request that made no sense.
        let early = {
            let mut wire = self.wire.borrow_mut();
            // It is being answered; what follows it is read and forgotten.
            wire.broken = None;
            outgoing.senseless || wire.decoder.is_some()
        };
        let fate = match self.cx.after_response(protocol) {
            _ if outgoing.tunnel => Fate::Stays,
            _ if !keep_alive || early => Fate::Ends,
            fate => fate,
        };
        let mut sending = match self.begin(outgoing, fate != Fate::Stays) {
            Ok(sending) => sending,
            Err(after) => return after,
        };
        if fate == Fate::Stays && self.leaves_late(&mut sending) {
            sending.record.complete();
            self.fresh = true;
            return After::Next;
        }
        // As `late` has it, for what is longer.
        let mut gathered = false;
        let sent = poll_fn(|task| {
            if !std::mem::replace(&mut gathered, true) {
                task.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.poll_send(&mut sending, task)
        })
        .await;
        let close = fate == Fate::Ends || sending.close;
        let tunnel = sending.tunnel;
        match sent {
            Sent::Whole => {
                sending.record.complete();
                self.out.give_back();
                let mut wire = self.wire.borrow_mut();
                let unread = wire.decoder.take().is_some();
                self.fresh = true;
                if !(close || tunnel) {
                    return After::Next;
                }
                if !tunnel && (unread || early || !wire.input.is_empty()) {
                    After::Linger
                } else {
                    After::Close
                }
            }
            Sent::Broken => {
                sending.record.fail();
                After::Close
            }
            Sent::Left => {
                stats.count_end(true, true);
                After::Gone
            }
        }
    }

    /// Has a short response leave at the end of the turn, if nothing can come between.
    fn leaves_late(&mut self, sending: &mut Sending) -> bool {
        if sending.tunnel || sending.close || !sending.body.is_whole() {
            return false;
        }
        if !self.wire.borrow().io.is_plain_tcp() {
            return false;
        }
        let mut task = Context::from_waker(Waker::noop());
        while !sending.ended {
            match sending.body.poll_frame(&mut task) {
                Poll::Pending => return false,
                Poll::Ready(frame) => sending.take(frame, &mut self.out, &self.cx),
            }
        }
        if sending.broken {
            return false;
        }
        let Some(text) = self.out.take_short(LATE) else {
            return false;
        };
        let mut wire = self.wire.borrow_mut();
        wire.late = text;
        if !std::mem::replace(&mut wire.late_soon, true) {
            late::put(self.wire.clone());
        }
        true
    }

    /// Writes the head of a response into the output.
    fn begin(&mut self, mut outgoing: Outgoing, close: bool) -> Result<Sending, After> {
        let bodiless = outgoing.is_bodiless();
        let http_10 =
            outgoing.record.protocol == Protocol::Http10 && self.cx.manager.accept_http_10;
        let to_head = outgoing.record.is_head();
        let tunnel = outgoing.tunnel;
        let Some(head) = &mut outgoing.record.response else {
            return Err(After::Close);
        };
        let length = head
            .headers
            .known(Known::ContentLength)
            .and_then(|length| std::str::from_utf8(length).ok()?.parse::<u64>().ok());
        let mut ends_by_closing = false;
        let framing = if tunnel {
            if head.status == 101 && head.headers.known(Known::Connection).is_none() {
                head.headers.append(Known::Connection, "upgrade");
            }
            Framing::UntilClose
        } else if bodiless {
            match (length, matches!(head.status, 100..=199 | 204 | 304)) {
                // As Envoy: a HEAD whose answer would be chunked says so.
                (None, false) if !http_10 => Framing::Chunked,
                _ => Framing::None,
            }
        } else if let Some(length) = length {
            Framing::Length(length)
        } else if outgoing.body.is_end_stream() {
            Framing::None
        } else if http_10 {
            ends_by_closing = true;
            Framing::UntilClose
        } else {
            Framing::Chunked
        };
        let says = if close || ends_by_closing {
            Says::Close
        } else if http_10 && !tunnel {
            Says::KeepAlive
        } else {
            Says::Unsaid
        };
        let reply = Reply {
            http_10,
            connection: says,
            to_head,
        };
        if h1::write_response(self.out.text(), head, framing, reply).is_err() {
            // It came malformed from an upstream or out of a format string; nothing of it was written.
            outgoing.record.fail();
            return Err(After::Close);
        }
        let body = if bodiless {
            Body::empty()
        } else {
            outgoing.body
        };
        if tunnel {
            let stats = &self.cx.manager.stats;
            stats.cx_upgrades_active.inc();
            let mut wire = self.wire.borrow_mut();
            wire.tunnel = true;
        }
        Ok(Sending {
            ended: bodiless,
            left: match framing {
                Framing::Length(length) => Some(length),
                _ => None,
            },
            chunked: framing == Framing::Chunked && !bodiless,
            tunnel,
            close: ends_by_closing,
            record: outgoing.record,
            body,
            broken: false,
        })
    }

    /// Ready when a response was sent to its end, or cannot be.
    fn poll_send(&mut self, sending: &mut Sending, task: &mut Context<'_>) -> Poll<Sent> {
        loop {
            let mut awaited = false;
            let splices = sending.splices(&self.wire);
            if splices && self.out.is_empty() {
                match self.poll_splice(sending, task) {
                    Poll::Pending => awaited = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(Sent::Left),
                    Poll::Ready(Ok(0)) => match sending.body.poll_frame(task) {
                        Poll::Pending => awaited = true,
                        Poll::Ready(frame) => sending.take(frame, &mut self.out, &self.cx),
                    },
                    Poll::Ready(Ok(_)) => {}
                }
            }
            while !sending.ended && self.out.waiting() < WRITE_AHEAD && !sending.splices(&self.wire)
            {
                match sending.body.poll_frame(task) {
                    Poll::Pending => {
                        awaited = true;
                        break;
                    }
                    Poll::Ready(frame) => sending.take(frame, &mut self.out, &self.cx),
                }
            }
            match self.poll_write(sending, task) {
                Poll::Ready(Err(_)) => return Poll::Ready(Sent::Left),
                Poll::Ready(Ok(())) if sending.ended => {
                    return Poll::Ready(if sending.broken {
                        Sent::Broken
                    } else {
                        Sent::Whole
                    });
                }
                Poll::Ready(Ok(())) if !awaited => continue,
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            if let Some(sent) = self.poll_limits(sending, task) {
                return Poll::Ready(sent);
            }
            let mut meanwhile = Meanwhile {
                wire: &self.wire,
                out: &mut self.out,
            };
            return match ready!(meanwhile.poll_watch(task)) {
                Cut::Left => Poll::Ready(Sent::Left),
                Cut::Malformed(error) => {
                    self.cx.manager.stats.cx_protocol_error.inc();
                    sending.record.violated(error.details());
                    Poll::Ready(Sent::Broken)
                }
            };
        }
    }

    /// Moves what there is of the body to the downstream, inside the kernel.
    fn poll_splice(
        &mut self,
        sending: &mut Sending,
        task: &mut Context<'_>,
    ) -> Poll<io::Result<u64>> {
        let wire = self.wire.borrow();
        let Some(to) = wire.io.plain_tcp() else {
            return Poll::Ready(Ok(0));
        };
        let moved = ready!(sending.body.poll_splice(task, to))?;
        if moved > 0 {
            self.cx.manager.stats.cx_tx_bytes_total.add(moved);
            sending.record.info.borrow_mut().bytes_sent += moved;
            sending.record.limits.touch();
            let left = sending
                .left
                .insert(sending.left.unwrap_or_default().saturating_sub(moved));
            if *left == 0 || sending.body.is_end_stream() {
                sending.end(None, &mut self.out);
            }
        }
        Poll::Ready(Ok(moved))
    }

    /// Writes all that waits.
    fn poll_write(&mut self, sending: &Sending, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = &mut *self.wire.borrow_mut();
        while !self.out.is_empty() {
            let n = ready!(self.out.poll_write(&mut wire.io, task))?;
            self.cx.manager.stats.cx_tx_bytes_total.add(n as u64);
            if !(sending.ended && self.out.is_empty()) {
                sending.record.limits.touch();
            }
        }
        wire.io.poll_flush(task)
    }

    /// What a limit in time makes of a response that is being sent.
    fn poll_limits(&mut self, sending: &mut Sending, task: &mut Context<'_>) -> Option<Sent> {
        let limits = sending.record.limits.clone();
        match limits.poll(&mut self.deadline, task) {
            Poll::Pending => None,
            Poll::Ready(expired) => {
                expired.count(&self.cx.manager.stats);
                let mut info = sending.record.info.borrow_mut();
                info.flags.set(expired.flags());
                info.response_code_details = expired.details().into();
                Some(Sent::Broken)
            }
        }
    }

    /// Ends our half, then reads and forgets what the peer still sends, so that it gets to read our answer before
    /// its kernel hears of the end. Envoy: `delayed_close_timeout`.
    async fn linger(&mut self) {
        let cx = self.cx.clone();
        let stats = &cx.manager.stats;
        let limit = cx.manager.limits.delayed_close;
        self.out.give_back();
        poll_fn(|task| {
            let mut wire = self.wire.borrow_mut();
            wire.io.poll_shutdown(task).map(drop)
        })
        .await;
        let Some(limit) = limit else {
            stats.cx_destroy_local.inc();
            return;
        };
        self.deadline.set(Instant::now() + limit);
        let mut more = LINGER_BYTES;
        let left = poll_fn(|task| {
            let mut wire = self.wire.borrow_mut();
            while more > 0 {
                wire.input.clear();
                match wire.poll_fill(READ_AHEAD, task) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(true),
                    Poll::Ready(Ok(n)) => more = more.saturating_sub(n),
                    Poll::Pending => break,
                }
            }
            self.deadline.poll(task).map(|()| false)
        })
        .await;
        if left {
            stats.cx_destroy_remote.inc();
        } else {
            stats.cx_destroy_local.inc();
            stats.cx_delayed_close_timeout.inc();
        }
    }
}

impl Next {
    fn refuse(error: ParseError) -> Next {
        Next::Refused(Box::new(malformed(error)))
    }
}

/// Envoy's answer to bytes that are no HTTP/1.
fn malformed(error: ParseError) -> Reject {
    let body = match error.status() {
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "Bad Request",
    };
    Reject::new(
        error.status(),
        body,
        ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
        error.details(),
    )
}

/// A response on its way.
struct Sending {
    record: Box<Record>,
    body: Body,
    /// Nothing more comes of the body.
    ended: bool,
    /// The body broke: what was sent of it is all there is.
    broken: bool,
    /// Bytes that the head promises and that have not come.
    left: Option<u64>,
    chunked: bool,
    tunnel: bool,
    /// The connection is to end whatever the head says.
    close: bool,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.tunnel {
            self.record.cx.manager.stats.cx_upgrades_active.dec();
        }
    }
}

enum Sent {
    Whole,
    /// Only a part; the peer can tell by the end of the connection.
    Broken,
    Left,
}

impl Sending {
    /// Puts a frame into the output.
    fn take(
        &mut self,
        frame: Option<Result<Frame, BodyError>>,
        out: &mut Output,
        cx: &ConnectionContext,
    ) {
        match frame {
            Some(Ok(Frame::Data(mut data))) => {
                if let Some(left) = &mut self.left {
                    // More than was promised would be read as the next response.
                    let fits = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len());
                    data.truncate(fits);
                    *left -= fits as u64;
                }
                if data.is_empty() {
                    return;
                }
                self.record.info.borrow_mut().bytes_sent += data.len() as u64;
                if self.chunked {
                    h1::write_chunk_size(out.text(), data.len());
                    out.data(data);
                    out.text().extend_from_slice(h1::CHUNK_END);
                } else {
                    out.data(data);
                }
                if self.left == Some(0) || self.body.is_end_stream() {
                    self.end(None, out);
                }
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                let sent = cx.manager.h1.enable_trailers.then_some(&trailers);
                self.end(sent, out);
                stream::note_trailers(&mut self.record, trailers);
            }
            Some(Err(_)) => {
                self.ended = true;
                self.broken = true;
            }
            None => self.end(None, out),
        }
    }

    /// Whether the body goes on in the kernel. Never more of it than the head promises.
    fn splices(&self, wire: &RefCell<Wire>) -> bool {
        !self.ended
            && self.left.is_some_and(|left| left > 0)
            && self.left == self.body.exact_length()
            && self.body.splices()
            && wire.borrow().io.plain_tcp().is_some()
    }

    fn end(&mut self, trailers: Option<&crate::head::Headers>, out: &mut Output) {
        self.ended = true;
        if self.chunked {
            h1::write_last_chunk(out.text(), trailers);
        }
        if self.left.is_some_and(|left| left > 0) {
            self.broken = true;
        }
    }
}

/// The connection while a response is awaited.
struct Meanwhile<'a> {
    wire: &'a Rc<RefCell<Wire>>,
    out: &'a mut Output,
}

impl Meanwhile<'_> {
    /// Ready when the downstream has left or made no sense.
    fn poll_watch(&mut self, task: &mut Context<'_>) -> Poll<Cut> {
        let mut wire = self.wire.borrow_mut();
        if let Some(cut) = wire.broken {
            return Poll::Ready(cut);
        }
        if wire.tunnel {
            return Poll::Pending;
        }
        if wire.reading {
            if !wire
                .driver
                .as_ref()
                .is_some_and(|driver| driver.will_wake(task.waker()))
            {
                wire.driver = Some(task.waker().clone());
            }
            return Poll::Pending;
        }
        while wire.input.len() < READ_AHEAD {
            match ready!(wire.poll_fill(READ_AHEAD, task)) {
                Ok(0) | Err(_) => return Poll::Ready(Cut::Left),
                Ok(_) => {}
            }
        }
        Poll::Pending
    }

    /// Puts 1xx responses of the upstream into the output, and writes what is in it.
    fn poll_output(&mut self, early: &Early, task: &mut Context<'_>) -> Poll<Cut> {
        if let Some(head) = early.take() {
            self.inform(head);
        }
        if self.out.is_empty() {
            return Poll::Pending;
        }
        let mut wire = self.wire.borrow_mut();
        while !self.out.is_empty() {
            match ready!(self.out.poll_write(&mut wire.io, task)) {
                Ok(n) => wire.cx.manager.stats.cx_tx_bytes_total.add(n as u64),
                Err(_) => return Poll::Ready(Cut::Left),
            }
        }
        match ready!(wire.io.poll_flush(task)) {
            Ok(()) => Poll::Pending,
            Err(_) => Poll::Ready(Cut::Left),
        }
    }
}

impl Cut {
    fn broken(self, wire: &Wire) -> Broken {
        match self {
            Cut::Left => Broken::Left("downstream_remote_disconnect"),
            Cut::Malformed(error) => {
                wire.cx.manager.stats.cx_protocol_error.inc();
                Broken::Malformed(malformed(error))
            }
        }
    }
}

impl Downstream for Meanwhile<'_> {
    fn broken(&mut self) -> Option<Broken> {
        let wire = self.wire.borrow();
        wire.broken.map(|cut| cut.broken(&wire))
    }

    fn inform(&mut self, head: ResponseHead) {
        let wire = self.wire.borrow();
        if !wire.cx.manager.proxy_100_continue {
            return;
        }
        wire.cx.manager.stats.rq_1xx.inc();
        let reply = Reply::default();
        if let Err(error) = h1::write_response(self.out.text(), &head, Framing::None, reply) {
            tracing::debug!(%error, status = head.status, "an informational response is left out");
        }
    }

    fn poll_meanwhile(&mut self, early: &Early, task: &mut Context<'_>) -> Poll<Broken> {
        let polled = match self.poll_output(early, task) {
            Poll::Ready(cut) => Poll::Ready(cut),
            Poll::Pending => self.poll_watch(task),
        };
        polled.map(|cut| cut.broken(&self.wire.borrow()))
    }
}

/// The body of a request that did not come whole with its head.
struct RequestBody {
    wire: Rc<RefCell<Wire>>,
    progress: Progress,
    /// What its head promised.
    length: Option<u64>,
    /// What moves in the kernel.
    passage: Passage,
}

impl Source for RequestBody {
    fn poll_frame(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        let wire = &mut *this.wire.borrow_mut();
        loop {
            let Some(decoder) = &mut wire.decoder else {
                return Poll::Ready(None);
            };
            let most = match decoder.remaining() {
                Some(left) => usize::try_from(left).unwrap_or(READ_BODY).min(READ_BODY),
                None => READ_AHEAD,
            };
            match decoder.decode(&mut wire.input) {
                Ok(Some(Piece::Data(data))) => {
                    this.progress.received(data.len() as u64);
                    if decoder.is_end() {
                        wire.decoder = None;
                        wire.wake();
                        this.progress.ended();
                    }
                    return Poll::Ready(Some(Ok(Frame::Data(data))));
                }
                Ok(Some(Piece::End(trailers))) => {
                    wire.decoder = None;
                    wire.wake();
                    this.progress.ended();
                    return Poll::Ready(trailers.map(|trailers| Ok(Frame::Trailers(trailers))));
                }
                Ok(None) => {}
                Err(error) => {
                    wire.cut(Cut::Malformed(error));
                    return Poll::Ready(Some(Err(BodyError::Protocol(error.to_string()))));
                }
            }
            if wire.eof {
                if decoder.close().is_ok() {
                    continue;
                }
                wire.cut(Cut::Left);
                return Poll::Ready(Some(Err(BodyError::Disconnected)));
            }
            match wire.poll_fill(most.max(READ_AHEAD), task) {
                Poll::Pending => {
                    wire.reading = true;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(_)) => wire.reading = false,
                Poll::Ready(Err(_)) => {
                    wire.cut(Cut::Left);
                    return Poll::Ready(Some(Err(BodyError::Disconnected)));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.wire.borrow().decoder.is_none()
    }

    fn splices(&self) -> bool {
        let wire = self.wire.borrow();
        let left = wire.decoder.as_ref().and_then(BodyDecoder::remaining);
        self.passage
            .pays(left.unwrap_or_default(), !wire.input.is_empty())
            && wire.io.plain_tcp().is_some()
    }

    fn poll_splice(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<u64>> {
        let this = self.get_mut();
        let wire = &mut *this.wire.borrow_mut();
        let (Some(decoder), Some(from)) = (&mut wire.decoder, wire.io.plain_tcp()) else {
            return Poll::Ready(Ok(0));
        };
        let left = decoder.remaining().unwrap_or_default();
        let stats = &wire.cx.manager.stats;
        let step = this
            .passage
            .poll(task, from, to, left, !wire.input.is_empty(), |read| {
                stats.cx_rx_bytes_total.add(read);
            });
        // While bytes wait for the upstream, the driver looks at what the downstream does.
        wire.reading = step.is_pending() && this.passage.inside() == 0;
        Poll::Ready(match ready!(step) {
            Step::Moved(n) => {
                decoder.advance(n);
                this.progress.received(n);
                if decoder.is_end() {
                    wire.decoder = None;
                    wire.wake();
                    this.progress.ended();
                }
                Ok(n)
            }
            Step::Stopped => Ok(0),
            Step::Sink(error) => Err(error),
        })
    }

    fn exact_length(&self) -> Option<u64> {
        self.length?;
        self.wire
            .borrow()
            .decoder
            .as_ref()
            .and_then(BodyDecoder::remaining)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // The driver watches the connection from now on. It may hold the wire while it drops us.
        if let Ok(mut wire) = self.wire.try_borrow_mut()
            && wire.reading
        {
            wire.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_waits_weighs_little() {
        fn of<A, B, C, F>(_: fn(A, B, C) -> F) -> usize {
            size_of::<F>()
        }
        let future = of(serve);
        let wire = size_of::<RefCell<Wire>>();
        assert!(future + wire < 500, "{future} + {wire}");
    }
}
