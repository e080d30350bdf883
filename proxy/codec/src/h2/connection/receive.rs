//! The receiving half: frames to events. RFC 9113 §4 to §6, §8.

use bytes::{Buf as _, Bytes, BytesMut};

use super::{
    super::{
        Code, Event, Fatal, Role, StreamId,
        frame::{HEAD, Head, MAX_FRAME_SIZE, PREFACE, flag, kind, setting},
        message::{self, Kind, MESSAGING, Message, TOO_LARGE, TOO_MANY},
        streams::Stream,
    },
    Connection, End, LARGEST_WINDOW,
};
use crate::head::Known;

/// Pieces of bodies smaller than this are copied: it is cheaper than to share the read buffer.
const COPIED: usize = 1024;

/// CONTINUATION frames borne in one block. Heads are bounded by their bytes; this bounds what tiny frames cost.
const FRAGMENTS: u32 = 64;

/// Envoy's name for a fault in the frames themselves.
const CODEC: &str = "http2.unknown.nghttp2.error";

/// A block of headers in the making.
#[derive(Debug)]
pub(super) struct Block {
    id: u32,
    end: bool,
    target: Target,
    message: Message,
    /// The beginning of a header whose end is in the next fragment.
    rest: Vec<u8>,
    fragments: u32,
}

/// What a block of headers is for.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// A stream that is closed: only the compression needs it.
    Nobody,
    /// A stream that is not opened, or that breaks a rule.
    Refused(Code),
    Request,
    /// The head or the trailers of an open stream, by place.
    Open(u32),
}

/// The DATA frame that is being received.
#[derive(Debug, Default)]
pub(super) struct Data {
    /// Whose it is; `None` when it is nobody's.
    stream: Option<StreamId>,
    left: usize,
    padding: usize,
    end: bool,
}

fn fatal(code: Code, details: &'static str) -> Fatal {
    Fatal {
        code,
        details,
        counter: None,
    }
}

fn protocol() -> Fatal {
    fatal(Code::PROTOCOL_ERROR, CODEC)
}

fn frame_size() -> Fatal {
    fatal(Code::FRAME_SIZE_ERROR, CODEC)
}

fn flood(details: &'static str, counter: &'static str) -> Fatal {
    Fatal {
        code: Code::ENHANCE_YOUR_CALM,
        details,
        counter: Some(counter),
    }
}

impl Connection {
    /// Takes all whole frames off `input` (and parts of DATA frames) and tells `on` what they mean. What is
    /// left in `input` must be there, with more behind it, at the next call: at most one frame (16 KiB + 9).
    ///
    /// # Errors
    /// When the connection cannot go on; nothing may be received afterwards.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if let Some(fatal) = self.failed {
            return Err(fatal);
        }
        let result = self.frames(input, on);
        if let Err(fatal) = result {
            self.die(fatal);
        }
        result
    }

    fn frames(&mut self, input: &mut BytesMut, on: &mut impl FnMut(Event)) -> Result<(), Fatal> {
        if self.preface_left > 0 {
            let want = &PREFACE[PREFACE.len() - self.preface_left..];
            let len = want.len().min(input.len());
            if input[..len] != want[..len] {
                return Err(protocol());
            }
            input.advance(len);
            self.preface_left -= len;
            if self.preface_left > 0 {
                return Ok(());
            }
        }
        let mut at = 0;
        loop {
            if self.data.left + self.data.padding > 0 {
                if at == input.len() {
                    break;
                }
                at = self.data_piece(input, at, on);
                continue;
            }
            let Some(head) = Head::read(&input[at..]) else {
                break;
            };
            self.admit(head)?;
            if head.kind == kind::DATA {
                let mut used = HEAD;
                let mut padding = None;
                if head.has(flag::PADDED) {
                    if head.len == 0 {
                        return Err(frame_size());
                    }
                    let Some(&len) = input.get(at + HEAD) else {
                        break;
                    };
                    padding = Some(usize::from(len));
                    used += 1;
                }
                self.data(head, padding, on)?;
                at += used;
            } else {
                let Some(payload) = input.get(at + HEAD..at + HEAD + head.len) else {
                    break;
                };
                match head.kind {
                    kind::HEADERS => self.headers(head, payload, on)?,
                    kind::CONTINUATION => self.continuation(head, payload, on)?,
                    kind::PRIORITY => self.priority(head, payload, on)?,
                    kind::RST_STREAM => self.reset_by_peer(head, payload, on)?,
                    kind::SETTINGS => self.settings(head, payload, on)?,
                    kind::PUSH_PROMISE => return Err(protocol()),
                    kind::PING => self.pinged(head, payload, on)?,
                    kind::GOAWAY => self.goaway(head, payload, on)?,
                    kind::WINDOW_UPDATE => self.window_updated(head, payload, on)?,
                    _ => {} // RFC 9113 §4.1: unknown ones mean nothing
                }
                at += HEAD + head.len;
            }
            if self.output.control_frames() > self.options.max_outbound_control_frames {
                return Err(flood(
                    "http2.outbound_control_frames_flood",
                    "outbound_control_flood",
                ));
            }
            if self.output.frames() > self.options.max_outbound_frames {
                return Err(flood("http2.outbound_frames_flood", "outbound_flood"));
            }
        }
        input.advance(at);
        Ok(())
    }

    /// What holds for a frame by its head and those before it.
    fn admit(&mut self, head: Head) -> Result<(), Fatal> {
        if head.len > MAX_FRAME_SIZE {
            return Err(frame_size());
        }
        // RFC 9113 §3.4
        if !self.has_settings && (head.kind != kind::SETTINGS || head.has(flag::ACK)) {
            return Err(protocol());
        }
        let continues = head.kind == kind::CONTINUATION;
        match &self.block {
            Some(block) if !continues || block.id != head.id => Err(protocol()),
            None if continues => Err(protocol()),
            _ => Ok(()),
        }
    }

    /// Counts frames that say nothing.
    fn empty_frame(&mut self, empty: bool) -> Result<(), Fatal> {
        if !empty {
            self.empty_frames = 0;
            return Ok(());
        }
        self.empty_frames += 1;
        if self.empty_frames
            > self
                .options
                .max_consecutive_inbound_frames_with_empty_payload
        {
            return Err(flood(
                "http2.inbound_empty_frames_flood",
                "inbound_empty_frames_flood",
            ));
        }
        Ok(())
    }

    /// A DATA frame begins.
    fn data(
        &mut self,
        head: Head,
        padding: Option<usize>,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if head.id == 0 {
            return Err(protocol());
        }
        let overhead = padding.map_or(0, |padding| padding + 1);
        let Some(len) = head.len.checked_sub(overhead) else {
            return Err(protocol()); // RFC 9113 §6.1
        };
        let end = head.has(flag::END_STREAM);
        self.empty_frame(len == 0 && !end)?;
        let all = head.len as u32; // at most 16 KiB
        if all > self.receive_window {
            return Err(fatal(Code::FLOW_CONTROL_ERROR, CODEC));
        }
        self.receive_window -= all;
        let stream = self.data_stream(head.id, head.len, len, end, on)?;
        self.data = Data {
            stream,
            left: len,
            padding: padding.unwrap_or(0),
            end,
        };
        let Some(stream) = stream else {
            self.credit(all);
            return Ok(());
        };
        self.streams.at(stream.slot).unconsumed += all;
        self.consumed(stream, overhead);
        if len == 0 && end {
            self.piece(stream, Bytes::new(), true, on);
        }
        Ok(())
    }

    /// Whose a DATA frame is, if anybody's; `len` bytes without padding.
    fn data_stream(
        &mut self,
        id: u32,
        all: usize,
        len: usize,
        end: bool,
        on: &mut impl FnMut(Event),
    ) -> Result<Option<StreamId>, Fatal> {
        let Some(slot) = self.streams.find(id) else {
            if self.is_idle(id) {
                return Err(protocol());
            }
            if self.ignores(id) {
                return Ok(None);
            }
            return Err(fatal(Code::STREAM_CLOSED, CODEC));
        };
        let stream = self.streams.at(slot);
        let fault = if stream.remote_closed {
            Some((Code::STREAM_CLOSED, CODEC))
        } else if !stream.head_received {
            Some((Code::PROTOCOL_ERROR, MESSAGING))
        } else if all > stream.receive_window as usize {
            Some((Code::FLOW_CONTROL_ERROR, CODEC))
        } else {
            stream.receive_window -= all as u32;
            match &mut stream.content_left {
                None => None,
                Some(left) => match left.checked_sub(len as u64) {
                    Some(rest) if rest == 0 || !end => {
                        *left = rest;
                        None
                    }
                    _ => Some((Code::PROTOCOL_ERROR, MESSAGING)),
                },
            }
        };
        if let Some((code, details)) = fault {
            self.stream_error(id, code, details, on);
            return Ok(None);
        }
        Ok(Some(StreamId { id, slot }))
    }

    /// Takes what is there of a DATA frame, from `at` on; returns where to go on.
    fn data_piece(
        &mut self,
        input: &mut BytesMut,
        mut at: usize,
        on: &mut impl FnMut(Event),
    ) -> usize {
        let len = self.data.left.min(input.len() - at);
        if len > 0 {
            self.data.left -= len;
            let end = self.data.end && self.data.left == 0;
            match self.data.stream {
                // It may have been reset in between.
                Some(stream) if self.streams.get(stream).is_some() => {
                    let data = if len < COPIED {
                        let data = Bytes::copy_from_slice(&input[at..at + len]);
                        at += len;
                        data
                    } else {
                        input.advance(at);
                        at = 0;
                        input.split_to(len).freeze()
                    };
                    self.piece(stream, data, end, on);
                }
                _ => at += len,
            }
        }
        let padding = self.data.padding.min(input.len() - at);
        if self.data.left == 0 {
            self.data.padding -= padding;
            at += padding;
        }
        at
    }

    fn piece(&mut self, stream: StreamId, data: Bytes, end: bool, on: &mut impl FnMut(Event)) {
        on(Event::Data { stream, data, end });
        if end {
            self.streams.at(stream.slot).remote_closed = true;
            self.settle(stream.slot);
        }
    }

    /// Whether a stream was never opened. RFC 9113 §5.1.1.
    fn is_idle(&self, id: u32) -> bool {
        match (self.role, id % 2) {
            (Role::Server, 1) => id > self.last_peer && !self.ignores(id),
            (Role::Client, 1) => id >= self.next_own,
            _ => true, // pushed ones, or the server's
        }
    }

    /// Whether frames on a closed stream are to be ignored: we have reset it, or said that we will not see it.
    fn ignores(&self, id: u32) -> bool {
        self.closed.ignores(id)
            || self.role == Role::Server && self.drained_at.is_some_and(|last| id > last)
    }

    fn headers(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if head.id == 0 {
            return Err(protocol());
        }
        let mut fragment = payload;
        let mut padding = 0;
        if head.has(flag::PADDED) {
            let (len, rest) = fragment.split_first().ok_or_else(frame_size)?;
            padding = usize::from(*len);
            fragment = rest;
        }
        let mut depends_on_itself = false;
        if head.has(flag::PRIORITY) {
            let (priority, rest) = fragment.split_first_chunk::<5>().ok_or_else(frame_size)?;
            depends_on_itself = dependency(priority) == head.id;
            fragment = rest;
        }
        let len = fragment.len().checked_sub(padding).ok_or_else(protocol)?;
        fragment = &fragment[..len];
        let end = head.has(flag::END_STREAM);
        self.empty_frame(len == 0 && !end)?;
        let mut target = self.target(head.id)?;
        if depends_on_itself {
            target = Target::Refused(Code::PROTOCOL_ERROR);
        }
        let mut message = match target {
            Target::Nobody | Target::Refused(_) => Message::nobody(),
            Target::Request => Message::new(Kind::Request, &self.options),
            Target::Open(slot) => match (self.role, self.streams.at(slot).head_received) {
                (Role::Client, false) => Message::new(Kind::Response, &self.options),
                _ => Message::new(Kind::Trailers, &self.options),
            },
        };
        self.decoder.begin();
        let used = self.fragment(fragment, &mut message)?;
        if head.has(flag::END_HEADERS) {
            if used < fragment.len() {
                return Err(fatal(Code::COMPRESSION_ERROR, CODEC));
            }
            return self.block(head.id, end, target, &mut message, on);
        }
        self.block = Some(Box::new(Block {
            id: head.id,
            end,
            target,
            message,
            rest: fragment[used..].to_vec(),
            fragments: 0,
        }));
        Ok(())
    }

    fn continuation(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let last = head.has(flag::END_HEADERS);
        self.empty_frame(payload.is_empty() && !last)?;
        let Some(mut block) = self.block.take() else {
            return Err(protocol());
        };
        block.fragments += 1;
        if block.fragments > FRAGMENTS {
            return Err(flood(TOO_LARGE, "header_overflow"));
        }
        let mut bytes = std::mem::take(&mut block.rest);
        bytes.extend_from_slice(payload);
        let used = self.fragment(&bytes, &mut block.message)?;
        if last {
            if used < bytes.len() {
                return Err(fatal(Code::COMPRESSION_ERROR, CODEC));
            }
            return self.block(block.id, block.end, block.target, &mut block.message, on);
        }
        bytes.drain(..used);
        block.rest = bytes;
        self.block = Some(block);
        Ok(())
    }

    fn fragment(&mut self, bytes: &[u8], message: &mut Message) -> Result<usize, Fatal> {
        self.decoder
            .decode(bytes, message::valid, message)
            .map_err(|_| fatal(Code::COMPRESSION_ERROR, CODEC))
    }

    /// What a block of headers on a stream is for.
    fn target(&mut self, id: u32) -> Result<Target, Fatal> {
        if let Some(slot) = self.streams.find(id) {
            let stream = self.streams.at(slot);
            return Ok(if stream.remote_closed {
                Target::Refused(Code::STREAM_CLOSED)
            } else {
                Target::Open(slot)
            });
        }
        if self.role == Role::Server && id % 2 == 1 && id > self.last_peer {
            if self.drained_at.is_some() {
                return Ok(Target::Nobody);
            }
            self.last_peer = id;
            return Ok(
                if self.streams.len() < self.options.max_concurrent_streams as usize {
                    Target::Request
                } else {
                    Target::Refused(Code::REFUSED_STREAM)
                },
            );
        }
        if self.is_idle(id) {
            return Err(protocol());
        }
        if self.ignores(id) {
            return Ok(Target::Nobody);
        }
        if self.closed.has_ended(id) {
            return Err(fatal(Code::STREAM_CLOSED, CODEC));
        }
        Err(protocol()) // RFC 9113 §5.1.1: numbers only grow
    }

    /// A block of headers is complete.
    fn block(
        &mut self,
        id: u32,
        end: bool,
        target: Target,
        message: &mut Message,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        match target {
            Target::Nobody => Ok(()),
            Target::Refused(code) => {
                self.stream_error(id, code, CODEC, on);
                Ok(())
            }
            Target::Request => self.request(id, end, message, on),
            Target::Open(slot) => {
                // We may have reset it while the block came.
                let stream = StreamId { id, slot };
                let Some(state) = self.streams.get(stream) else {
                    return Ok(());
                };
                if self.role == Role::Client && !state.head_received {
                    self.response(stream, end, message, on)
                } else {
                    self.trailers(stream, end, message, on)
                }
            }
        }
    }

    fn request(
        &mut self,
        id: u32,
        end: bool,
        message: &mut Message,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let length = message.content_length();
        let head = match message.request(self.options.allow_connect) {
            Ok(head) if !(end && length.is_some_and(|length| length > 0)) => head,
            result => {
                let details = result.err().unwrap_or(MESSAGING);
                on(Event::Malformed { details });
                return self.message_error(id, details, on);
            }
        };
        self.opened = self.opened.saturating_add(1);
        let connect = &*head.method == b"CONNECT";
        let stream = self.streams.insert(Stream {
            id,
            opened_ms: self.now_ms,
            send_window: i64::from(self.peer_window),
            receive_window: self.stream_window(),
            content_left: if connect { None } else { length },
            head_received: true,
            remote_closed: end,
            upgrade: connect || head.headers.known(Known::Upgrade).is_some(),
            ..Stream::default()
        });
        on(Event::Request { stream, head, end });
        Ok(())
    }

    fn response(
        &mut self,
        stream: StreamId,
        end: bool,
        message: &mut Message,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let length = message.content_length();
        let mut head = match message.response() {
            Ok(head) => head,
            Err(details) => return self.message_error(stream.id, details, on),
        };
        // There is none of it, so it has no length. RFC 9110 §8.6.
        if matches!(head.status, 100..200 | 204) && length.is_some_and(|length| length > 0) {
            return self.message_error(stream.id, MESSAGING, on);
        }
        if head.status < 200 {
            if end {
                return self.message_error(stream.id, MESSAGING, on);
            }
            on(Event::Informational { stream, head });
            return Ok(());
        }
        let state = self.streams.at(stream.slot);
        state.head_received = true;
        let bodiless = state.bodiless || matches!(head.status, 204 | 304);
        let tunnel = state.upgrade && head.status < 300;
        state.content_left = match (tunnel, bodiless) {
            (true, _) => None,
            // Its length is that of what it has not; data would be too much.
            (false, true) => Some(0),
            (false, false) => length,
        };
        if end && state.content_left.is_some_and(|left| left > 0) {
            return self.message_error(stream.id, MESSAGING, on);
        }
        state.remote_closed = end;
        if tunnel && let Some(protocol) = state.protocol.take() {
            head.status = 101;
            head.headers.append(Known::Upgrade, &protocol);
        }
        on(Event::Response { stream, head, end });
        self.settle(stream.slot);
        Ok(())
    }

    fn trailers(
        &mut self,
        stream: StreamId,
        end: bool,
        message: &mut Message,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let left = self.streams.at(stream.slot).content_left;
        let trailers = match message.trailers() {
            Err(details) => return self.message_error(stream.id, details, on),
            Ok(_) if !end => return self.message_error(stream.id, MESSAGING, on),
            Ok(_) if left.is_some_and(|left| left > 0) => {
                return self.message_error(stream.id, MESSAGING, on);
            }
            Ok(trailers) => trailers,
        };
        self.streams.at(stream.slot).remote_closed = true;
        on(Event::Trailers { stream, trailers });
        self.settle(stream.slot);
        Ok(())
    }

    /// A message is malformed (RFC 9113 §8.1.1): its stream ends, and the connection with it unless the message is
    /// only too large or it was configured otherwise.
    fn message_error(
        &mut self,
        id: u32,
        details: &'static str,
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let large = [TOO_MANY, TOO_LARGE].contains(&details);
        let code = if large {
            Code::INTERNAL_ERROR
        } else {
            Code::PROTOCOL_ERROR
        };
        self.stream_error(id, code, details, on);
        if large || self.options.stream_error_on_invalid_http_messaging {
            return Ok(());
        }
        Err(fatal(code, details))
    }

    /// Ends a stream because of what the peer sent. RFC 9113 §5.4.2.
    fn stream_error(
        &mut self,
        id: u32,
        code: Code,
        details: &'static str,
        on: &mut impl FnMut(Event),
    ) {
        self.rst_stream(id, code);
        match self.streams.find(id) {
            Some(slot) => {
                self.release(slot, End::Reset);
                on(Event::Reset {
                    stream: StreamId { id, slot },
                    code,
                    local: Some(details),
                });
            }
            None => self.closed.add_reset(id),
        }
    }

    fn priority(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if head.id == 0 {
            return Err(protocol());
        }
        self.priority_frames = self.priority_frames.saturating_add(1);
        let borne = u64::from(self.options.max_inbound_priority_frames_per_stream)
            * (1 + u64::from(self.opened));
        if u64::from(self.priority_frames) > borne {
            return Err(flood(
                "codec_error:Too_many_PRIORITY_frames",
                "inbound_priority_frames_flood",
            ));
        }
        let code = match <&[u8; 5]>::try_from(payload) {
            Ok(priority) if dependency(priority) != head.id => return Ok(()),
            Ok(_) => Code::PROTOCOL_ERROR,
            Err(_) => Code::FRAME_SIZE_ERROR,
        };
        // A stream that is not open cannot be reset.
        if self.streams.find(head.id).is_none() {
            return Err(fatal(code, CODEC));
        }
        self.stream_error(head.id, code, CODEC, on);
        Ok(())
    }

    fn reset_by_peer(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let Ok(code) = <[u8; 4]>::try_from(payload) else {
            return Err(frame_size());
        };
        if head.id == 0 {
            return Err(protocol());
        }
        let Some(slot) = self.streams.find(head.id) else {
            return if self.is_idle(head.id) {
                Err(protocol())
            } else {
                Ok(())
            };
        };
        let stream = self.streams.at(slot);
        let age = self.now_ms.wrapping_sub(stream.opened_ms);
        let premature =
            !stream.head_sent && age <= self.options.premature_reset_min_stream_lifetime_ms;
        self.release(slot, End::Done);
        on(Event::Reset {
            stream: StreamId { id: head.id, slot },
            code: Code(u32::from_be_bytes(code)),
            local: None,
        });
        if self.role == Role::Server && premature {
            self.premature_resets += 1;
            // As Envoy: half of the limit is enough, for no later request could make it good.
            let limit = self.options.premature_reset_total_stream_count;
            if u64::from(self.premature_resets) * 2 >= u64::from(self.requests_closed.max(limit)) {
                return Err(flood(
                    "too_many_premature_resets",
                    "downstream_rq_too_many_premature_resets",
                ));
            }
        }
        Ok(())
    }

    fn settings(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if head.id != 0 {
            return Err(protocol());
        }
        if head.has(flag::ACK) {
            if !payload.is_empty() {
                return Err(frame_size());
            }
            if !self.acknowledged {
                self.acknowledged = true;
                self.decoder.settings_acknowledged();
                on(Event::SettingsAcknowledged);
            }
            return Ok(());
        }
        let (entries, []) = payload.as_chunks::<6>() else {
            return Err(frame_size());
        };
        let mut window = self.peer_window;
        for [n0, n1, v0, v1, v2, v3] in entries {
            let value = u32::from_be_bytes([*v0, *v1, *v2, *v3]);
            match u16::from_be_bytes([*n0, *n1]) {
                setting::HEADER_TABLE_SIZE => self.encoder.set_allowed(value as usize),
                setting::ENABLE_PUSH if value > 1 => return Err(protocol()),
                setting::ENABLE_PUSH if value == 1 && self.role == Role::Client => {
                    return Err(protocol());
                }
                setting::MAX_CONCURRENT_STREAMS => self.peer_streams = value,
                setting::INITIAL_WINDOW_SIZE => {
                    if value > LARGEST_WINDOW {
                        return Err(fatal(Code::FLOW_CONTROL_ERROR, CODEC));
                    }
                    window = value;
                }
                setting::MAX_FRAME_SIZE
                    if !(MAX_FRAME_SIZE..1 << 24).contains(&(value as usize)) =>
                {
                    return Err(protocol());
                }
                setting::ENABLE_CONNECT_PROTOCOL => {
                    // RFC 8441 §3: never taken back.
                    if value > 1 || (value == 0 && self.peer_connect) {
                        return Err(protocol());
                    }
                    self.peer_connect = value == 1;
                }
                _ => {}
            }
        }
        self.peer_initial_window(window)?;
        self.has_settings = true;
        let ack = Head {
            len: 0,
            kind: kind::SETTINGS,
            flags: flag::ACK,
            id: 0,
        };
        self.output.put_control(&ack.bytes());
        on(Event::Settings);
        Ok(())
    }

    /// Applies a new initial window to all streams, once a frame however often it names one. RFC 9113 §6.9.2.
    fn peer_initial_window(&mut self, window: u32) -> Result<(), Fatal> {
        let change = i64::from(window) - i64::from(self.peer_window);
        self.peer_window = window;
        if change == 0 {
            return Ok(());
        }
        let mut opened = Vec::new();
        for (slot, stream) in self.streams.iter_mut() {
            stream.send_window += change;
            if stream.send_window > i64::from(LARGEST_WINDOW) {
                return Err(fatal(Code::FLOW_CONTROL_ERROR, CODEC));
            }
            if stream.waiting.is_some() && !stream.ready && stream.send_window > 0 {
                opened.push(slot);
            }
        }
        for slot in opened {
            self.make_ready(slot);
        }
        Ok(())
    }

    fn pinged(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let Ok(payload) = <[u8; 8]>::try_from(payload) else {
            return Err(frame_size());
        };
        if head.id != 0 {
            return Err(protocol());
        }
        if head.has(flag::ACK) {
            on(Event::Pong { payload });
        } else {
            self.put_ping(payload, flag::ACK);
        }
        Ok(())
    }

    fn goaway(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        if head.id != 0 {
            return Err(protocol());
        }
        let Some(([l0, l1, l2, l3, c0, c1, c2, c3], _)) = payload.split_first_chunk::<8>() else {
            return Err(frame_size());
        };
        let last = u32::from_be_bytes([*l0, *l1, *l2, *l3]) & LARGEST_WINDOW;
        let code = Code(u32::from_be_bytes([*c0, *c1, *c2, *c3]));
        // A client's concerns only what we would open, which is nothing: it may go on to send requests. RFC 9113 §6.8.
        if self.role == Role::Client {
            self.peer_going = true;
            let unseen: Vec<StreamId> = self
                .streams
                .iter_mut()
                .filter(|(_, stream)| stream.id > last)
                .map(|(slot, stream)| StreamId {
                    id: stream.id,
                    slot,
                })
                .collect();
            for stream in unseen {
                self.release(stream.slot, End::Done);
                on(Event::Reset {
                    stream,
                    code: Code::REFUSED_STREAM,
                    local: None,
                });
            }
        }
        on(Event::GoAway {
            code,
            notice: last == LARGEST_WINDOW,
        });
        Ok(())
    }

    fn window_updated(
        &mut self,
        head: Head,
        payload: &[u8],
        on: &mut impl FnMut(Event),
    ) -> Result<(), Fatal> {
        let Ok(bytes) = <[u8; 4]>::try_from(payload) else {
            return Err(frame_size());
        };
        let more = i64::from(u32::from_be_bytes(bytes) & LARGEST_WINDOW);
        self.window_updates = self.window_updates.saturating_add(1);
        let per_data = u64::from(
            self.options
                .max_inbound_window_update_frames_per_data_frame_sent,
        );
        let borne = 5 + 2 * (u64::from(self.opened) + per_data * u64::from(self.data_frames_sent));
        if u64::from(self.window_updates) > borne {
            return Err(flood(
                "codec_error:Too_many_WINDOW_UPDATE_frames",
                "inbound_window_update_frames_flood",
            ));
        }
        if head.id == 0 {
            if more == 0 {
                return Err(protocol());
            }
            self.send_window += more;
            if self.send_window > i64::from(LARGEST_WINDOW) {
                return Err(fatal(Code::FLOW_CONTROL_ERROR, CODEC));
            }
            return Ok(());
        }
        let Some(slot) = self.streams.find(head.id) else {
            return if self.is_idle(head.id) {
                Err(protocol())
            } else {
                Ok(())
            };
        };
        let stream = self.streams.at(slot);
        stream.send_window += more;
        if more == 0 {
            self.stream_error(head.id, Code::PROTOCOL_ERROR, CODEC, on);
        } else if stream.send_window > i64::from(LARGEST_WINDOW) {
            self.stream_error(head.id, Code::FLOW_CONTROL_ERROR, CODEC, on);
        } else {
            self.make_ready(slot);
        }
        Ok(())
    }
}

/// The stream that a priority depends on.
fn dependency(priority: &[u8; 5]) -> u32 {
    let [d0, d1, d2, d3, _] = *priority;
    u32::from_be_bytes([d0, d1, d2, d3]) & LARGEST_WINDOW
}
