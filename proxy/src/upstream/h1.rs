//! An HTTP/1.1 connection to a host. It has no task of its own: who has borrowed it reads and writes the
//! socket, and while it is idle it holds no buffer.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::{pending, poll_fn},
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use lateen_codec::h1::{
    self as codec, BodyDecoder, CHUNK_END, Framing, Limits, ParseError, Parsed, Piece,
    ResponseMeta, Scan,
};
use tokio::{net::TcpStream, sync::mpsc, task::spawn_local};

use super::{
    Upgrade,
    pool::{ConnGuard, Facts, Loan, OnInformational, RequestGuard, SendFailure, UNSENDABLE},
};
use crate::{
    body::{Body, BodyError, Frame, Source},
    cluster::Cluster,
    head::{Headers, Known, RequestHead, ResponseHead},
    net::{
        Transport,
        splice::{Passage, Step},
        stock,
    },
    retry::Reset,
};

/// What follows the bytes of the last chunk when it is known to be the last: its end and the body's.
const LAST_CHUNK_END: &[u8] = b"\r\n0\r\n\r\n";
/// Bodies up to this many bytes are copied out of the read buffer, which then can serve others at once.
const COPIED: usize = 4096;
/// Read at once of a long body.
const LONG_READ: usize = 128 * 1024;
/// Least room for a read.
const READ: usize = 4096;
/// Pieces of a chunked body that are joined when the body is short.
const PIECES: usize = 16;
/// Pieces read ahead of the downstream while the request is still being sent.
const QUEUE: usize = 4;

/// A connection.
pub(super) struct Conn {
    transport: Transport,
    /// Read and not used yet; without memory while there is nothing.
    input: BytesMut,
    pub(super) facts: Rc<Facts>,
    requests: u32,
    pub(super) guard: ConnGuard,
}

impl Conn {
    pub(super) fn new(transport: Transport, facts: Rc<Facts>, guard: ConnGuard) -> Conn {
        Conn {
            transport,
            input: BytesMut::new(),
            facts,
            requests: 0,
            guard,
        }
    }

    /// Requests it has served or is serving.
    pub(super) fn requests(&self) -> u32 {
        self.requests
    }

    /// As [`Conn::is_quiet`] for who does not wait. Costs no system call: what has come by now has been seen by the
    /// reactor.
    pub(super) fn is_quiet_now(&mut self) -> bool {
        !self.transport.is_readable() || self.is_quiet(&mut Context::from_waker(Waker::noop()))
    }

    /// Whether the connection stands and nothing came on it; `cx` is woken when that changes.
    pub(super) fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        if self.transport.poll_readable(cx).is_pending() {
            return true;
        }
        // A TLS record that is none of HTTP's business may have come.
        let mut buffer = stock::get();
        let read = self.transport.poll_read(cx, &mut buffer);
        let quiet = match read {
            Poll::Pending => true,
            Poll::Ready(Ok(0) | Err(_)) => {
                self.guard.closes_by_peer();
                false
            }
            Poll::Ready(Ok(_)) => {
                // Envoy: a server may say that it will wait no longer.
                if !buffer.starts_with(b"HTTP/1.1 408") && !buffer.starts_with(b"HTTP/1.0 408") {
                    self.guard.cluster.stats.upstream_cx_protocol_error.inc();
                }
                false
            }
        };
        stock::put(buffer);
        quiet
    }

    /// Reads what has come, at most `want` bytes if that is more than usual; 0 is the end. Holds no
    /// buffer while it waits for the first byte.
    fn poll_fill(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        if self.input.is_empty() {
            if self.transport.poll_readable(cx)?.is_pending() {
                self.let_go();
                return Poll::Pending;
            }
            if want > stock::SIZE {
                // Takes the last one again if its pieces have gone out meanwhile.
                stock::lengthen(&mut self.input, want.min(LONG_READ));
            } else if self.input.capacity() < READ {
                self.input = stock::get();
            }
        } else if self.input.capacity() - self.input.len() < READ {
            self.input.reserve(stock::SIZE);
        }
        let read = self.transport.poll_read(cx, &mut self.input);
        match &read {
            Poll::Ready(Ok(0) | Err(_)) => self.guard.closes_by_peer(),
            Poll::Ready(Ok(n)) => {
                let stats = &self.guard.cluster.stats;
                stats.upstream_cx_rx_bytes_total.add(*n as u64);
            }
            Poll::Pending if self.input.is_empty() => self.let_go(),
            Poll::Pending => {}
        }
        read
    }

    /// Gives the buffer back, and what is in it up.
    fn let_go(&mut self) {
        if self.input.capacity() > 0 {
            stock::put(std::mem::take(&mut self.input));
        }
    }

    /// The first `length` bytes of what was read.
    fn take(&mut self, length: usize) -> Bytes {
        if length > COPIED {
            return self.input.split_to(length).freeze();
        }
        let copy = Bytes::copy_from_slice(&self.input[..length]);
        self.input.advance(length);
        copy
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.let_go();
        if matches!(self.transport, Transport::Tls(_)) {
            // Says goodbye (close_notify) if the socket takes it at once.
            let mut cx = Context::from_waker(Waker::noop());
            drop(self.transport.poll_shutdown(&mut cx));
        }
    }
}

fn limits(cluster: &Cluster) -> Limits {
    let defaults = Limits::default();
    let headers = cluster.config.max_response_headers;
    Limits {
        headers: headers
            .and_then(|max| usize::try_from(max).ok())
            .unwrap_or(defaults.headers),
        enable_trailers: cluster.config.http1_trailers,
        ..defaults
    }
}

/// How a request's body is sent, by what its head promises; `None` when the two contradict each other.
fn framing(head: &RequestHead, body: &Body, upgrade: Upgrade) -> Option<Framing> {
    if upgrade != Upgrade::None {
        return Some(Framing::UntilClose);
    }
    let length = match head.headers.known(Known::ContentLength) {
        None => None,
        Some(text) => Some(std::str::from_utf8(text).ok()?.parse::<u64>().ok()?),
    };
    match (length, body.is_end_stream()) {
        (None | Some(0), true) => Some(Framing::None),
        (Some(_), true) => None,
        (Some(length), false) => Some(Framing::Length(length)),
        (None, false) => Some(Framing::Chunked),
    }
}

/// Why a request could not be sent to its end.
#[derive(Debug)]
enum UploadError {
    /// The downstream broke off, or sent another number of bytes than it said.
    Body,
    /// The socket.
    Closed,
}

/// A request on its way out.
struct Upload {
    /// Head, or the size of a chunk.
    text: BytesMut,
    data: Bytes,
    tail: &'static [u8],
    body: Body,
    framing: Framing,
    /// Nothing follows what is here.
    ended: bool,
    /// Whether any byte has left.
    begun: bool,
    /// Trailers are sent, too.
    trailers: bool,
}

impl Upload {
    fn new(text: BytesMut, body: Body, framing: Framing) -> Upload {
        Upload {
            ended: body.is_end_stream(),
            text,
            data: Bytes::new(),
            tail: b"",
            body,
            framing,
            begun: false,
            trailers: false,
        }
    }

    /// Sends as much as there is; ready when all of it has gone.
    fn poll(&mut self, conn: &mut Conn, cx: &mut Context<'_>) -> Poll<Result<(), UploadError>> {
        loop {
            let mut waiting = false;
            if !self.ended && self.data.is_empty() && self.tail.is_empty() {
                let splices = self.splices(conn);
                if splices && self.text.is_empty() && ready!(self.splice(conn, cx))? {
                    continue;
                }
                if !splices || self.text.is_empty() {
                    match self.body.poll_frame(cx) {
                        Poll::Pending => waiting = true,
                        Poll::Ready(frame) => self.stage(frame)?,
                    }
                }
            }
            if self.text.is_empty() && self.data.is_empty() && self.tail.is_empty() {
                if !self.ended && !waiting {
                    // An empty piece of body.
                    continue;
                }
                self.let_go();
                let flushed = conn.transport.poll_flush(cx);
                ready!(flushed.map_err(|_| UploadError::Closed)?);
                return if self.ended {
                    Poll::Ready(Ok(()))
                } else {
                    Poll::Pending
                };
            }
            ready!(self.write(conn, cx))?;
        }
    }

    /// Whether the body goes on in the kernel.
    fn splices(&self, conn: &Conn) -> bool {
        matches!(self.framing, Framing::Length(left) if left > 0)
            && conn.transport.plain_tcp().is_some()
            && self.body.splices()
    }

    /// Moves what there is of the body; `false` when a frame tells what is next.
    fn splice(&mut self, conn: &Conn, cx: &mut Context<'_>) -> Poll<Result<bool, UploadError>> {
        let (Some(to), Framing::Length(left)) = (conn.transport.plain_tcp(), &mut self.framing)
        else {
            return Poll::Ready(Ok(false));
        };
        let moved = ready!(self.body.poll_splice(cx, to)).map_err(|_| UploadError::Closed)?;
        if moved == 0 {
            return Poll::Ready(Ok(false));
        }
        self.begun = true;
        let stats = &conn.guard.cluster.stats;
        stats.upstream_cx_tx_bytes_total.add(moved);
        *left = left.checked_sub(moved).ok_or(UploadError::Body)?;
        self.ended = self.body.is_end_stream();
        if self.ended && *left > 0 {
            return Poll::Ready(Err(UploadError::Body));
        }
        Poll::Ready(Ok(true))
    }

    fn stage(&mut self, frame: Option<Result<Frame, BodyError>>) -> Result<(), UploadError> {
        match frame {
            Some(Ok(Frame::Data(data))) => {
                let last = self.body.is_end_stream();
                match &mut self.framing {
                    Framing::Length(left) => {
                        let rest = left.checked_sub(data.len() as u64);
                        *left = rest.ok_or(UploadError::Body)?;
                        if last && *left > 0 {
                            return Err(UploadError::Body);
                        }
                    }
                    Framing::Chunked if data.is_empty() => {
                        if last {
                            self.last_chunk(None);
                        }
                    }
                    Framing::Chunked => {
                        codec::write_chunk_size(self.text(), data.len());
                        self.tail = if last { LAST_CHUNK_END } else { CHUNK_END };
                    }
                    Framing::UntilClose => {}
                    Framing::None => return Err(UploadError::Body),
                }
                self.data = data;
                self.ended = last;
                Ok(())
            }
            // Envoy sends no trailers to HTTP/1.1 upstreams unless told to.
            Some(Ok(Frame::Trailers(trailers))) => {
                self.end(Some(trailers).filter(|_| self.trailers))
            }
            None => self.end(None),
            Some(Err(_)) => Err(UploadError::Body),
        }
    }

    fn end(&mut self, trailers: Option<Headers>) -> Result<(), UploadError> {
        self.ended = true;
        match self.framing {
            Framing::Length(left) if left > 0 => Err(UploadError::Body),
            Framing::Chunked => {
                self.last_chunk(trailers.as_ref());
                Ok(())
            }
            Framing::Length(_) | Framing::UntilClose | Framing::None => Ok(()),
        }
    }

    fn text(&mut self) -> &mut BytesMut {
        if self.text.capacity() == 0 {
            self.text = stock::get();
        }
        &mut self.text
    }

    fn last_chunk(&mut self, trailers: Option<&Headers>) {
        codec::write_last_chunk(self.text(), trailers);
    }

    /// One write of all that is here.
    fn write(&mut self, conn: &mut Conn, cx: &mut Context<'_>) -> Poll<Result<(), UploadError>> {
        let slices = [
            IoSlice::new(&self.text),
            IoSlice::new(&self.data),
            IoSlice::new(self.tail),
        ];
        let slices = if self.data.is_empty() && self.tail.is_empty() {
            &slices[..1]
        } else {
            &slices[..]
        };
        let mut written = match ready!(conn.transport.poll_write(cx, slices)) {
            Ok(0) | Err(_) => return Poll::Ready(Err(UploadError::Closed)),
            Ok(written) => written,
        };
        self.begun = true;
        let stats = &conn.guard.cluster.stats;
        stats.upstream_cx_tx_bytes_total.add(written as u64);
        let mut part = |length: usize| {
            let n = written.min(length);
            written -= n;
            n
        };
        let text = part(self.text.len());
        let data = part(self.data.len());
        let tail = part(self.tail.len());
        self.text.advance(text);
        self.data.advance(data);
        self.tail = self.tail.get(tail..).unwrap_or_default();
        Poll::Ready(Ok(()))
    }

    fn let_go(&mut self) {
        if self.text.capacity() > 0 {
            stock::put(std::mem::take(&mut self.text));
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.let_go();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sending {
    Goes,
    Done,
    /// The socket takes no more; there may be an answer all the same.
    Broke,
}

/// Sends a request and waits for the head of the answer.
pub(super) async fn send(
    mut loan: Loan,
    guard: RequestGuard,
    head: &RequestHead,
    body: Body,
    on_informational: OnInformational<'_>,
) -> Result<(ResponseHead, Body), SendFailure> {
    let upgrade = Upgrade::of(head);
    let (body, later) = if upgrade == Upgrade::None {
        (body, Body::empty())
    } else {
        (Body::empty(), body)
    };
    let Some(framing) = framing(head, &body, upgrade) else {
        return Err(UNSENDABLE);
    };
    let mut text = stock::get();
    if codec::write_request(&mut text, head, framing).is_err() {
        stock::put(text);
        return Err(UNSENDABLE);
    }
    let mut upload = Upload::new(text, body, framing);
    let Some(conn) = loan.begin() else {
        return Err(UNSENDABLE);
    };
    let reused = conn.requests > 0;
    conn.requests += 1;
    let limits = limits(&conn.guard.cluster);
    upload.trailers = limits.enable_trailers;
    let mut sending = Sending::Goes;
    let mut scan = Scan::default();
    let waiting = poll_fn(|cx| {
        if sending == Sending::Goes {
            match upload.poll(conn, cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => sending = Sending::Done,
                Poll::Ready(Err(UploadError::Closed)) => sending = Sending::Broke,
                Poll::Ready(Err(UploadError::Body)) => return Poll::Ready(Err(Reset::Local)),
            }
        }
        poll_head(conn, cx, &limits, &head.method, &mut scan, on_informational)
    });
    let failed = |reset, sent| SendFailure {
        reset,
        sent,
        reused,
    };
    let (mut answer, mut meta) = match waiting.await {
        Ok(answer) => answer,
        Err(reset) => return Err(failed(reset, upload.begun)),
    };
    let switched = match upgrade {
        Upgrade::None => false,
        Upgrade::Protocol => answer.status == 101,
        Upgrade::Connect => (200..300).contains(&answer.status),
    };
    if !meta.keep_alive && !switched {
        guard.cluster().stats.upstream_cx_close_notify.inc();
    }
    if !switched && answer.status == 101 {
        // Nobody asked for it. Envoy passes the head on, and nothing else of that connection.
        answer.headers.remove_known(Known::Upgrade);
        answer.headers.remove_known(Known::Connection);
        meta.framing = Framing::None;
        meta.keep_alive = false;
    }
    let mut incoming = Incoming {
        decoder: BodyDecoder::new(meta.framing, &limits),
        keep_alive: meta.keep_alive && !switched && sending != Sending::Broke,
        loan: Some(loan),
        guard: Some(guard),
        ahead: VecDeque::new(),
        end: End::Coming,
        passage: Passage::default(),
    };
    if switched {
        upload = Upload::new(BytesMut::new(), later, Framing::UntilClose);
        return Ok((answer, relay(incoming, upload, true)));
    }
    // An answer before the end of its request: the connection serves nobody after it.
    incoming.keep_alive &= sending == Sending::Done;
    if let Some(body) = incoming.at_hand(meta.framing) {
        return Ok((answer, body));
    }
    if sending == Sending::Goes {
        incoming.keep_alive = meta.keep_alive;
        return Ok((answer, relay(incoming, upload, false)));
    }
    Ok((answer, Body::stream(incoming)))
}

fn poll_head(
    conn: &mut Conn,
    cx: &mut Context<'_>,
    limits: &Limits,
    method: &[u8],
    scan: &mut Scan,
    on_informational: OnInformational<'_>,
) -> Poll<Result<(ResponseHead, ResponseMeta), Reset>> {
    loop {
        while !conn.input.is_empty() {
            match codec::parse_response(&conn.input, limits, method, scan) {
                Err(_) => return Poll::Ready(Err(Reset::Protocol)),
                Ok(Parsed::Partial) => break,
                Ok(Parsed::Complete {
                    head: (head, meta),
                    used,
                }) => {
                    conn.input.advance(used);
                    *scan = Scan::default();
                    if head.status >= 200 || head.status == 101 {
                        return Poll::Ready(Ok((head, meta)));
                    }
                    on_informational(head);
                }
            }
        }
        match ready!(conn.poll_fill(cx, 0)) {
            // It ended in the midst of the head, or before it.
            Ok(0) | Err(_) if !conn.input.is_empty() => return Poll::Ready(Err(Reset::Protocol)),
            Ok(0) | Err(_) => return Poll::Ready(Err(Reset::Termination)),
            Ok(_) => {}
        }
    }
}

/// How a body ends.
enum End {
    Coming,
    /// With these trailers, which are still to be given.
    Trailers(crate::head::Headers),
    Came,
    Failed(BodyError),
}

/// The body of a response, read by who wants it. Holds the connection until its end.
struct Incoming {
    loan: Option<Loan>,
    guard: Option<RequestGuard>,
    decoder: BodyDecoder,
    keep_alive: bool,
    /// Decoded already.
    ahead: VecDeque<Bytes>,
    end: End,
    /// What moves in the kernel.
    passage: Passage,
}

impl Incoming {
    /// The body, if all of it has been read already; the connection is free again then.
    fn at_hand(&mut self, framing: Framing) -> Option<Body> {
        let conn = self.loan.as_mut()?.conn()?;
        let data = match framing {
            Framing::None => Bytes::new(),
            Framing::Length(length) => {
                let length = usize::try_from(length).ok()?;
                if conn.input.len() < length {
                    return None;
                }
                conn.take(length)
            }
            Framing::UntilClose => return None,
            Framing::Chunked => {
                self.look_ahead(PIECES);
                let trailers = match std::mem::replace(&mut self.end, End::Came) {
                    End::Came => None,
                    End::Trailers(trailers) => Some(trailers),
                    other => {
                        self.end = other;
                        return None;
                    }
                };
                let pieces = std::mem::take(&mut self.ahead);
                return Some(Body::whole(joined(pieces), trailers));
            }
        };
        self.done();
        Some(Body::full(data))
    }

    /// Decodes what has been read, up to `pieces`, to find out whether the body ends there.
    fn look_ahead(&mut self, pieces: usize) {
        while self.ahead.len() < pieces {
            let Some(conn) = self.loan.as_mut().and_then(Loan::conn) else {
                return;
            };
            if conn.input.is_empty() && !self.decoder.is_end() {
                return;
            }
            match self.decoder.decode(&mut conn.input) {
                Ok(Some(Piece::Data(data))) => self.ahead.push_back(data),
                Ok(Some(Piece::End(trailers))) => {
                    self.done();
                    if let Some(trailers) = trailers {
                        self.end = End::Trailers(trailers);
                    }
                    return;
                }
                Ok(None) => return,
                Err(error) => {
                    self.failed(protocol(error));
                    return;
                }
            }
        }
    }

    /// The response has ended as it should.
    fn done(&mut self) {
        self.end = End::Came;
        self.guard = None;
        let Some(mut loan) = self.loan.take() else {
            return;
        };
        let Some(conn) = loan.conn() else { return };
        if !conn.input.is_empty() {
            // Nobody asked for more.
            let stats = &conn.guard.cluster.stats;
            stats.upstream_cx_protocol_error.inc();
        } else if self.keep_alive {
            conn.let_go();
            loan.give_back();
        }
    }

    fn failed(&mut self, error: BodyError) {
        self.end = End::Failed(error);
        self.guard = None;
        self.loan = None;
    }
}

/// Small pieces as one, on their own, so that they do not keep the read buffer from others.
fn joined(mut pieces: VecDeque<Bytes>) -> Bytes {
    match (pieces.len(), pieces.pop_front()) {
        (_, None) => Bytes::new(),
        (1, Some(one)) if one.len() > COPIED => one,
        (_, Some(first)) => {
            let length = first.len() + pieces.iter().map(Bytes::len).sum::<usize>();
            let mut all = Vec::with_capacity(length);
            all.extend_from_slice(&first);
            for piece in pieces {
                all.extend_from_slice(&piece);
            }
            all.into()
        }
    }
}

fn protocol(error: ParseError) -> BodyError {
    BodyError::Protocol(error.to_string())
}

impl Source for Incoming {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let this = self.get_mut();
        if let Some(data) = this.ahead.pop_front() {
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        loop {
            match std::mem::replace(&mut this.end, End::Came) {
                End::Coming => this.end = End::Coming,
                End::Came => return Poll::Ready(None),
                End::Trailers(trailers) => {
                    return Poll::Ready(Some(Ok(Frame::Trailers(trailers))));
                }
                End::Failed(error) => return Poll::Ready(Some(Err(error))),
            }
            let Some(conn) = this.loan.as_mut().and_then(Loan::conn) else {
                return Poll::Ready(None);
            };
            match this.decoder.decode(&mut conn.input) {
                Err(error) => {
                    this.failed(protocol(error));
                    continue;
                }
                Ok(Some(Piece::Data(data))) => {
                    this.look_ahead(1);
                    return Poll::Ready(Some(Ok(Frame::Data(data))));
                }
                Ok(Some(Piece::End(trailers))) => {
                    this.done();
                    if let Some(trailers) = trailers {
                        this.end = End::Trailers(trailers);
                    }
                    continue;
                }
                Ok(None) => {}
            }
            let want = this
                .decoder
                .remaining()
                .map_or(0, |left| usize::try_from(left).unwrap_or(usize::MAX));
            match ready!(conn.poll_fill(cx, want)) {
                Ok(n) if n > 0 => {}
                Ok(_) if this.decoder.close().is_ok() => {
                    this.keep_alive = false;
                    this.done();
                }
                // Envoy: a chunked body that is cut breaks the protocol, one with a length does not.
                Ok(_) if this.decoder.remaining().is_none() => {
                    this.failed(protocol(ParseError::Truncated));
                }
                Ok(_) | Err(_) => this.failed(BodyError::Disconnected),
            }
        }
    }

    fn splices(&self) -> bool {
        let Some(conn) = self.loan.as_ref().and_then(Loan::held) else {
            return false;
        };
        let left = self.decoder.remaining().unwrap_or_default();
        self.ahead.is_empty()
            && matches!(self.end, End::Coming)
            && self.passage.pays(left, !conn.input.is_empty())
            && conn.transport.plain_tcp().is_some()
    }

    fn poll_splice(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &TcpStream,
    ) -> Poll<io::Result<u64>> {
        let this = self.get_mut();
        let Some(conn) = this.loan.as_mut().and_then(Loan::conn) else {
            return Poll::Ready(Ok(0));
        };
        let (Some(from), Some(left)) = (conn.transport.plain_tcp(), this.decoder.remaining())
        else {
            return Poll::Ready(Ok(0));
        };
        let stats = &conn.guard.cluster.stats;
        let step = this
            .passage
            .poll(cx, from, to, left, !conn.input.is_empty(), |read| {
                stats.upstream_cx_rx_bytes_total.add(read);
            });
        Poll::Ready(match ready!(step) {
            Step::Moved(n) => {
                this.decoder.advance(n);
                if this.decoder.is_end() {
                    this.done();
                }
                Ok(n)
            }
            Step::Stopped => Ok(0),
            Step::Sink(error) => {
                this.failed(BodyError::Disconnected);
                Err(error)
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && matches!(self.end, End::Came)
    }

    fn exact_length(&self) -> Option<u64> {
        let ahead: u64 = self.ahead.iter().map(|data| data.len() as u64).sum();
        self.decoder.remaining().map(|left| left + ahead)
    }
}

/// Lets request and response, or both ways of a tunnel, go on at the same time: neither waits for the
/// other, as they would if both were driven by who reads the body that is returned. Dropping it ends both.
fn relay(mut incoming: Incoming, mut upload: Upload, tunnel: bool) -> Body {
    let (sender, receiver) = mpsc::channel(QUEUE);
    // Whether the connection can be used again is known when both have ended.
    let keep_alive = std::mem::replace(&mut incoming.keep_alive, false);
    spawn_local(async move {
        let incoming = RefCell::new(incoming);
        let up = async {
            let sent =
                poll_fn(
                    |cx| match incoming.borrow_mut().loan.as_mut().and_then(Loan::conn) {
                        Some(conn) => upload.poll(conn, cx),
                        None => Poll::Ready(Err(UploadError::Closed)),
                    },
                )
                .await;
            match sent {
                Ok(()) if !tunnel => incoming.borrow_mut().keep_alive = keep_alive,
                Err(UploadError::Body) if !tunnel => {
                    // The downstream broke off: mostly nobody is left to read this.
                    drop(sender.try_send(Err(BodyError::Disconnected)));
                    return;
                }
                Err(UploadError::Closed) if !tunnel => {}
                // The other direction may go on; a failure shows there.
                Ok(()) | Err(_) => {
                    let ended = poll_fn(|cx| {
                        match incoming.borrow_mut().loan.as_mut().and_then(Loan::conn) {
                            Some(conn) => conn.transport.poll_shutdown(cx),
                            None => Poll::Ready(Ok(())),
                        }
                    });
                    drop(ended.await);
                }
            }
            pending::<()>().await;
        };
        let down = async {
            loop {
                let frame = poll_fn(|cx| Pin::new(&mut *incoming.borrow_mut()).poll_frame(cx));
                let Some(frame) = frame.await else { return };
                let failed = frame.is_err();
                if sender.send(frame).await.is_err() || failed {
                    return;
                }
            }
        };
        // The end of the response ends both; the end of the request only its half. Nothing is lost with
        // the branches that are dropped: it is not wanted any more.
        tokio::select! {
            () = down => {}
            () = sender.closed() => {}
            () = up => {}
        }
    });
    Body::stream(Received(receiver))
}

struct Received(mpsc::Receiver<Result<Frame, BodyError>>);

impl Source for Received {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        self.get_mut().0.poll_recv(cx)
    }
}
