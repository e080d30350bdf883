//! The state of a connection: its streams, windows and settings.

use std::{io::IoSlice, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{Code, Event, Fatal, Gone, OpenError, Options, Role, StreamId};
use crate::head::{Headers, RequestHead, ResponseHead};

/// One HTTP/2 connection. Owned by the task that has the socket.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    options: Arc<Options>,
}

impl Connection {
    /// A new connection; its preface and SETTINGS wait in the output. The server side expects the client's
    /// preface (`PRI * HTTP/2.0…`) as the first bytes of [`Connection::receive`].
    pub fn new(role: Role, options: Arc<Options>) -> Connection {
        Connection { role, options }
    }

    /// Tells the time since some start, so that ages of streams are known; milliseconds are enough. Wanted
    /// before `receive` only by servers, for `premature_reset_*`; without it every age is 0.
    pub fn set_time(&mut self, now: Duration) {
        todo!("{now:?}")
    }

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
        let _ = (input, on);
        todo!()
    }

    /// How many streams may be opened now (client). 0 once either side said GOAWAY.
    pub fn can_open(&self) -> usize {
        todo!()
    }

    /// Whether the peer's SETTINGS have come.
    pub fn has_settings(&self) -> bool {
        todo!()
    }

    /// Whether the peer's SETTINGS allow extended CONNECT (client).
    pub fn allows_extended_connect(&self) -> bool {
        todo!()
    }

    /// Sends a request (client). One with an `upgrade` header becomes an extended CONNECT. `host`,
    /// connection-specific headers and `te` other than `trailers` are left out.
    ///
    /// # Errors
    /// When no stream can be opened; nothing is sent then.
    pub fn open(&mut self, head: &RequestHead, end: bool) -> Result<StreamId, OpenError> {
        let _ = (head, end);
        todo!()
    }

    /// Sends a `1xx` response (server).
    ///
    /// # Errors
    /// When the stream is gone or has its final response.
    pub fn inform(&mut self, stream: StreamId, head: &ResponseHead) -> Result<(), Gone> {
        let _ = (stream, head);
        todo!()
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
        let _ = (stream, head, end);
        todo!()
    }

    /// Sends a piece of a body. What the windows do not allow waits here: ask `send_capacity` first.
    ///
    /// # Errors
    /// When the stream is gone or was ended by us.
    pub fn send_data(&mut self, stream: StreamId, data: Bytes, end: bool) -> Result<(), Gone> {
        let _ = (stream, data, end);
        todo!()
    }

    /// Ends a body with trailers, after all that waits.
    ///
    /// # Errors
    /// When the stream is gone or was ended by us.
    pub fn send_trailers(&mut self, stream: StreamId, trailers: &Headers) -> Result<(), Gone> {
        let _ = (stream, trailers);
        todo!()
    }

    /// How many more bytes of a body should be given to `send_data` now. Once it was 0,
    /// [`Connection::next_writable`] names the stream when there is room again. A gone stream has none.
    pub fn send_capacity(&mut self, stream: StreamId) -> usize {
        let _ = stream;
        todo!()
    }

    /// The next stream that has room again since its `send_capacity` was 0. To be asked after `receive` and `advance`.
    pub fn next_writable(&mut self) -> Option<StreamId> {
        todo!()
    }

    /// Ends a stream at once, both ways; what waits of it is dropped. Nothing when it is gone.
    pub fn reset(&mut self, stream: StreamId, code: Code) {
        let _ = (stream, code);
        todo!()
    }

    /// Bytes of [`Event::Data`] have gone on: the peer may send as many more. Batched: a WINDOW_UPDATE is
    /// queued when half a window has gathered.
    pub fn consumed(&mut self, stream: StreamId, bytes: usize) {
        let _ = (stream, bytes);
        todo!()
    }

    /// Sends a PING; [`Event::Pong`] is its answer.
    pub fn ping(&mut self, payload: [u8; 8]) {
        let _ = payload;
        todo!()
    }

    /// Announces the end (GOAWAY with last stream 2^31-1): new streams are still served until [`Connection::drain`].
    pub fn drain_notice(&mut self) {
        todo!()
    }

    /// Takes no new streams (GOAWAY with the last one): those opened later are ignored, as RFC 9113 §6.8 has it. Open
    /// ones go on.
    pub fn drain(&mut self) {
        todo!()
    }

    /// Gives the connection up with `code` (GOAWAY): write the output, then close.
    pub fn fail(&mut self, code: Code) {
        let _ = code;
        todo!()
    }

    /// Streams that are open, or still have something to send.
    pub fn streams(&self) -> usize {
        todo!()
    }

    /// Whether nothing is left to do: GOAWAY was said by either side, no stream is open, no output waits.
    pub fn is_done(&self) -> bool {
        todo!()
    }

    /// Whether `output` has something.
    pub fn has_output(&self) -> bool {
        todo!()
    }

    /// Frames as much queued data as windows and fairness allow and points `slices` at the output, in
    /// order. Returns how many slices were filled; 0 when there is nothing to write.
    pub fn output<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        let _ = slices;
        todo!()
    }

    /// The first `bytes` of the output were written.
    pub fn advance(&mut self, bytes: usize) {
        let _ = bytes;
        todo!()
    }
}
