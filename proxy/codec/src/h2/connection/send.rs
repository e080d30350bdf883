//! The sending half: heads, bodies by windows in turn, and what keeps the connection.

use std::io::IoSlice;

use bytes::Bytes;

use super::{
    super::{
        Code, Fatal, Gone, OpenError, Role, StreamId,
        frame::{HEAD, Head, MAX_FRAME_SIZE, flag, kind},
        hpack::{Encoder, Name},
        streams::Stream,
    },
    Connection,
};
use crate::head::{Headers, Known, KnownSet, RequestHead, ResponseHead};

/// Bytes in the output from which on no more DATA is framed: it waits with its stream, so that other streams
/// and resets have their turn.
const FRAMED: usize = 256 << 10;

/// Bytes that may wait on all streams together before each has only a frame's worth of room.
const QUEUED: usize = 1 << 20;

/// GOAWAY's last stream when more may come. RFC 9113 §6.8.
const NOTICE: u32 = 0x7fff_ffff;

impl Connection {
    /// Sends a request (client). One with an `upgrade` header becomes an extended CONNECT. `host`,
    /// connection-specific headers and `te` other than `trailers` are left out.
    ///
    /// # Errors
    /// When no stream can be opened; nothing is sent then.
    pub fn open(&mut self, head: &RequestHead, end: bool) -> Result<StreamId, OpenError> {
        if self.role == Role::Server || self.is_closing() || self.next_own > NOTICE {
            return Err(OpenError::GoingAway);
        }
        if self.can_open() == 0 {
            return Err(OpenError::Concurrency);
        }
        let connect = &*head.method == b"CONNECT";
        let protocol = match head.headers.known(Known::Upgrade) {
            Some(protocol) if !connect => Some(protocol),
            _ => None,
        };
        if protocol.is_some() && !self.peer_connect {
            return Err(OpenError::NoExtendedConnect);
        }
        let id = self.next_own;
        self.next_own += 2;
        self.opened = self.opened.saturating_add(1);
        let stream = self.streams.insert(Stream {
            id,
            opened_ms: self.now_ms,
            send_window: i64::from(self.peer_window),
            receive_window: self.stream_window(),
            head_sent: true,
            ending: end,
            local_closed: end,
            bodiless: &*head.method == b"HEAD",
            upgrade: protocol.is_some() || connect,
            protocol: protocol.map(Box::from),
            ..Stream::default()
        });
        self.headers_frame(id, end, |encoder, out| {
            let method = protocol.map_or(&*head.method, |_| b"CONNECT");
            encoder.pseudo(Name::Method, ":method", method, out);
            if !connect {
                let scheme = if head.scheme.is_empty() {
                    b"http"
                } else {
                    &*head.scheme
                };
                encoder.pseudo(Name::Scheme, ":scheme", scheme, out);
            }
            if !head.authority.is_empty() {
                encoder.pseudo(Name::Authority, ":authority", &head.authority, out);
            }
            if !connect {
                let path = if head.path.is_empty() {
                    b"/"
                } else {
                    &*head.path
                };
                encoder.pseudo(Name::Path, ":path", path, out);
            }
            if let Some(protocol) = protocol {
                encoder.pseudo(Name::Protocol, ":protocol", protocol, out);
            }
            encode(encoder, &head.headers, out);
        });
        Ok(stream)
    }

    /// Sends a `1xx` response (server).
    ///
    /// # Errors
    /// When the stream is gone or has its final response.
    pub fn inform(&mut self, stream: StreamId, head: &ResponseHead) -> Result<(), Gone> {
        if self.live(stream)?.head_sent {
            return Err(Gone);
        }
        self.response_frame(stream.id, head.status, &head.headers, false);
        Ok(())
    }

    /// Sends the final response (server). A `101` becomes a `200`.
    ///
    /// # Errors
    /// When the stream is gone or has its final response.
    pub fn respond(
        &mut self,
        stream: StreamId,
        head: &ResponseHead,
        end: bool,
    ) -> Result<(), Gone> {
        let state = self.live(stream)?;
        if state.head_sent {
            return Err(Gone);
        }
        state.head_sent = true;
        state.ending = end;
        state.local_closed = end;
        let status = match head.status {
            101 => 200,
            status => status,
        };
        self.response_frame(stream.id, status, &head.headers, end);
        self.settle(stream.slot);
        Ok(())
    }

    fn response_frame(&mut self, id: u32, status: u16, headers: &Headers, end: bool) {
        let digit = |n: u16| b'0' + (n % 10) as u8;
        let text = [digit(status / 100), digit(status / 10), digit(status)];
        self.headers_frame(id, end, |encoder, out| {
            encoder.pseudo(Name::Status, ":status", &text, out);
            encode(encoder, headers, out);
        });
    }

    /// Sends a piece of a body. What the windows do not allow waits here: ask `send_capacity` first.
    ///
    /// # Errors
    /// When the stream is gone or was ended by us, or has no head yet.
    pub fn send_data(&mut self, stream: StreamId, mut data: Bytes, end: bool) -> Result<(), Gone> {
        let idle = self.ready.is_empty();
        let state = self.live(stream)?;
        if state.ending || !state.head_sent {
            return Err(Gone);
        }
        state.ending = end;
        if data.is_empty() && !end {
            return Ok(());
        }
        let alone = state.waiting.is_none();
        if alone && (idle || data.is_empty()) && self.frame(stream.slot, &mut data) {
            self.settle(stream.slot);
            return Ok(());
        }
        let state = self.streams.at(stream.slot);
        state.queued += data.len();
        self.queued += data.len();
        let waiting = state.waiting.get_or_insert_default();
        // An empty last piece behind others says nothing: the last of those will carry the end.
        if !data.is_empty() || waiting.data.is_empty() {
            waiting.data.push_back(data);
        }
        self.make_ready(stream.slot);
        Ok(())
    }

    /// Ends a body with trailers, after all that waits.
    ///
    /// # Errors
    /// When the stream is gone or was ended by us, or has no head yet.
    pub fn send_trailers(&mut self, stream: StreamId, trailers: &Headers) -> Result<(), Gone> {
        let state = self.live(stream)?;
        if state.ending || !state.head_sent {
            return Err(Gone);
        }
        state.ending = true;
        if let Some(waiting) = &mut state.waiting {
            waiting.trailers = Some(trailers.clone());
            return Ok(());
        }
        state.local_closed = true;
        self.headers_frame(stream.id, true, |encoder, out| {
            encode(encoder, trailers, out);
        });
        self.settle(stream.slot);
        Ok(())
    }

    /// How many more bytes of a body should be given to `send_data` now. Once it was 0,
    /// [`Connection::next_writable`] names the stream when there is room again. A gone stream has none.
    pub fn send_capacity(&mut self, stream: StreamId) -> usize {
        let Some(capacity) = self.room(stream) else {
            return 0;
        };
        if capacity == 0 {
            let state = self.streams.at(stream.slot);
            if !state.wanting {
                state.wanting = true;
                self.wanting.push_back(stream);
            }
        }
        capacity
    }

    /// The next stream that has room again since its `send_capacity` was 0. To be asked after `receive` and
    /// `advance`.
    pub fn next_writable(&mut self) -> Option<StreamId> {
        let enough = self.send_buffer().min(2 * MAX_FRAME_SIZE) / 2;
        for _ in 0..self.wanting.len() {
            let stream = self.wanting.pop_front()?;
            match self.room(stream) {
                None => {}
                Some(room) if room >= enough => {
                    self.streams.at(stream.slot).wanting = false;
                    return Some(stream);
                }
                Some(_) => self.wanting.push_back(stream),
            }
        }
        None
    }

    fn send_buffer(&self) -> usize {
        (self.options.send_buffer_bytes as usize).max(1)
    }

    /// Room for a stream's data; `None` when the stream is gone.
    fn room(&mut self, stream: StreamId) -> Option<usize> {
        let (limit, pending, all) = (self.send_buffer(), self.output.pending(), self.queued);
        let state = self.streams.get(stream)?;
        let room = limit.saturating_sub(state.queued + pending);
        Some(if all < QUEUED {
            room
        } else {
            room.min(MAX_FRAME_SIZE.saturating_sub(state.queued))
        })
    }

    /// Sends a PING; [`Event::Pong`](super::super::Event::Pong) is its answer.
    pub fn ping(&mut self, payload: [u8; 8]) {
        self.put_ping(payload, 0);
    }

    pub(super) fn put_ping(&mut self, payload: [u8; 8], flags: u8) {
        let mut frame = [0; HEAD + 8];
        let head = Head {
            len: 8,
            kind: kind::PING,
            flags,
            id: 0,
        };
        frame[..HEAD].copy_from_slice(&head.bytes());
        frame[HEAD..].copy_from_slice(&payload);
        self.output.put_control(&frame);
    }

    /// Announces the end (GOAWAY with last stream 2^31-1): new streams are still served until
    /// [`Connection::drain`].
    pub fn drain_notice(&mut self) {
        if self.failed.is_none() && self.drained_at.is_none() {
            self.put_goaway(NOTICE, Code::NO_ERROR);
        }
    }

    /// Takes no new streams (GOAWAY with the last one): those opened later are ignored, as RFC 9113 §6.8 has
    /// it. Open ones go on.
    pub fn drain(&mut self) {
        if self.failed.is_none() && self.drained_at.is_none() {
            self.drained_at = Some(self.last_peer);
            self.put_goaway(self.last_peer, Code::NO_ERROR);
        }
    }

    /// Gives the connection up with `code` (GOAWAY): write the output, then close.
    pub fn fail(&mut self, code: Code) {
        self.die(Fatal {
            code,
            details: "",
            counter: None,
        });
    }

    pub(super) fn put_goaway(&mut self, last: u32, code: Code) {
        let mut frame = [0; HEAD + 8];
        let head = Head {
            len: 8,
            kind: kind::GOAWAY,
            flags: 0,
            id: 0,
        };
        frame[..HEAD].copy_from_slice(&head.bytes());
        frame[HEAD..HEAD + 4].copy_from_slice(&last.to_be_bytes());
        frame[HEAD + 4..].copy_from_slice(&code.0.to_be_bytes());
        self.output.put(&frame, 1);
    }

    pub(super) fn rst_stream(&mut self, id: u32, code: Code) {
        self.output
            .put_control(&word_frame(kind::RST_STREAM, id, code.0));
    }

    pub(super) fn window_update(&mut self, id: u32, bytes: u32) {
        self.output
            .put(&word_frame(kind::WINDOW_UPDATE, id, bytes), 1);
    }

    /// Whether `output` has something.
    pub fn has_output(&mut self) -> bool {
        self.pump();
        self.output.pending() > 0
    }

    /// Frames as much queued data as windows and fairness allow and points `slices` at the output, in
    /// order. Returns how many slices were filled; 0 when there is nothing to write.
    pub fn output<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.pump();
        self.output.slices(slices)
    }

    /// The first `bytes` of the output were written.
    pub fn advance(&mut self, bytes: usize) {
        self.output.advance(bytes);
    }

    pub(super) fn make_ready(&mut self, slot: u32) {
        let stream = self.streams.at(slot);
        if !stream.ready && stream.waiting.is_some() && stream.send_window > 0 {
            stream.ready = true;
            self.ready.push_back(slot);
        }
    }

    /// Frames queued data: a frame of each stream in turn.
    fn pump(&mut self) {
        if self.failed.is_some() {
            return;
        }
        while self.send_window > 0 && self.output.pending() < FRAMED {
            let Some(slot) = self.ready.pop_front() else {
                return;
            };
            let Some(stream) = self.streams.open_at(slot).filter(|stream| stream.ready) else {
                continue; // the place of one that is gone
            };
            stream.ready = false;
            self.pump_stream(slot);
        }
    }

    /// Frames one frame of a stream.
    fn pump_stream(&mut self, slot: u32) {
        let Some(waiting) = &mut self.streams.at(slot).waiting else {
            return;
        };
        let Some(mut piece) = waiting.data.pop_front() else {
            return;
        };
        let last = waiting.data.is_empty();
        let ends = last && waiting.trailers.is_none();
        let before = piece.len();
        let whole = self.data_frame(slot, &mut piece, ends);
        let sent = before - piece.len();
        self.queued -= sent;
        let stream = self.streams.at(slot);
        stream.queued -= sent;
        if !whole {
            if let Some(waiting) = &mut stream.waiting {
                waiting.data.push_front(piece);
            }
            self.make_ready(slot);
            return;
        }
        if !last {
            self.make_ready(slot);
            return;
        }
        let id = stream.id;
        if let Some(trailers) = stream.waiting.take().and_then(|waiting| waiting.trailers) {
            stream.local_closed = true;
            self.headers_frame(id, true, |encoder, out| encode(encoder, &trailers, out));
        }
        self.settle(slot);
    }

    /// Frames what it can of `data`; whether it was all. The end goes with the last of it.
    fn frame(&mut self, slot: u32, data: &mut Bytes) -> bool {
        loop {
            if self.data_frame(slot, data, true) {
                return true;
            }
            if self.output.pending() >= FRAMED
                || self.send_window <= 0
                || self.streams.at(slot).send_window <= 0
            {
                return false;
            }
        }
    }

    /// Frames at most one frame of `data`, with the end of the stream if that was all, `may_end` and the end was
    /// given. Whether it was all.
    fn data_frame(&mut self, slot: u32, data: &mut Bytes, may_end: bool) -> bool {
        let window = self.send_window;
        let full = self.output.pending() >= FRAMED;
        let stream = self.streams.at(slot);
        let len = data
            .len()
            .min(MAX_FRAME_SIZE)
            .min(usize::try_from(window.min(stream.send_window)).unwrap_or(0));
        if len == 0 && !data.is_empty() || full && len > 0 {
            return false;
        }
        let whole = len == data.len();
        let end = whole && may_end && stream.ending;
        stream.send_window -= len as i64;
        stream.local_closed = end;
        let head = Head {
            len,
            kind: kind::DATA,
            flags: if end { flag::END_STREAM } else { 0 },
            id: stream.id,
        };
        self.send_window -= len as i64;
        self.data_frames_sent = self.data_frames_sent.saturating_add(1);
        self.output.put(&head.bytes(), 1);
        self.output.put_payload(data.split_to(len));
        whole
    }

    /// Encodes a block of headers into HEADERS and, when it is long, CONTINUATION.
    fn headers_frame(
        &mut self,
        id: u32,
        end: bool,
        encode: impl FnOnce(&mut Encoder, &mut Vec<u8>),
    ) {
        let encoder = &mut self.encoder;
        self.output.write(1, |out| {
            let start = out.len();
            out.extend_from_slice(&[0; HEAD]);
            encoder.begin(out);
            encode(encoder, out);
            let len = out.len() - start - HEAD;
            let mut head = Head {
                len,
                kind: kind::HEADERS,
                flags: if end { flag::END_STREAM } else { 0 },
                id,
            };
            if len <= MAX_FRAME_SIZE {
                head.flags |= flag::END_HEADERS;
                out[start..start + HEAD].copy_from_slice(&head.bytes());
                return;
            }
            let block = out.split_off(start + HEAD);
            out.truncate(start);
            let mut chunks = block.chunks(MAX_FRAME_SIZE).peekable();
            while let Some(chunk) = chunks.next() {
                head.len = chunk.len();
                if chunks.peek().is_none() {
                    head.flags |= flag::END_HEADERS;
                }
                out.extend_from_slice(&head.bytes());
                out.extend_from_slice(chunk);
                head.kind = kind::CONTINUATION;
                head.flags = 0;
            }
        });
    }
}

/// The headers that may be sent in HTTP/2. RFC 9113 §8.2.2.
fn encode(encoder: &mut Encoder, headers: &Headers, out: &mut Vec<u8>) {
    for (name, value) in headers.iter() {
        match name.known() {
            Some(known) => {
                if HOP.contains(known) {
                    continue;
                }
                if known == Known::Te && !value.eq_ignore_ascii_case(b"trailers") {
                    continue;
                }
                encoder.known(known, value, out);
            }
            None => encoder.header(Name::Other, name.as_bytes(), value, out),
        }
    }
}

/// What concerns an HTTP/1 connection, or is a pseudo header.
const HOP: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::Host,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::TransferEncoding,
    Known::Upgrade,
]);

/// A frame of four bytes.
fn word_frame(kind: u8, id: u32, word: u32) -> [u8; HEAD + 4] {
    let mut frame = [0; HEAD + 4];
    let head = Head {
        len: 4,
        kind,
        flags: 0,
        id,
    };
    frame[..HEAD].copy_from_slice(&head.bytes());
    frame[HEAD..].copy_from_slice(&word.to_be_bytes());
    frame
}
