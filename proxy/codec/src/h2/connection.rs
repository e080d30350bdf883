//! The state of a connection: its streams, windows and settings.

mod receive;
mod send;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    Code, Fatal, Gone, Options, Role, StreamId,
    frame::{DEFAULT_WINDOW, Head, PREFACE, kind, setting},
    hpack::{Decoder, Encoder},
    output::Output,
    streams::Streams,
};
use receive::{Block, Data};

/// The largest window. RFC 9113 §6.9.1.
const LARGEST_WINDOW: u32 = 0x7fff_ffff;

/// Streams that we have reset and whose frames may still be on their way. Of older ones only the highest
/// number is kept.
const REMEMBERED_RESETS: usize = 64;

/// One HTTP/2 connection. Owned by the task that has the socket.
#[derive(Debug)]
pub struct Connection {
    role: Role,
    options: Arc<Options>,
    decoder: Decoder,
    encoder: Encoder,
    output: Output,
    streams: Streams,
    failed: Option<Fatal>,
    now_ms: u32,

    // What is being received.
    /// Bytes of the client's preface that have not come yet.
    preface_left: usize,
    /// The peer's first SETTINGS have come.
    has_settings: bool,
    /// Our SETTINGS were acknowledged.
    acknowledged: bool,
    /// A block of headers that is not complete.
    block: Option<Box<Block>>,
    /// The DATA frame that is being received.
    data: Data,

    // Windows of the connection.
    send_window: i64,
    receive_window: u32,
    receive_credit: u32,
    /// Bytes of all streams that wait for windows.
    queued: usize,
    /// Places of streams that have something to frame, in turn.
    ready: VecDeque<u32>,
    /// Streams that wait for room.
    wanting: VecDeque<StreamId>,

    // The peer's settings.
    peer_window: u32,
    peer_streams: u32,
    peer_connect: bool,

    // Numbers of streams.
    /// The highest the peer has opened (server).
    last_peer: u32,
    /// The next we open (client).
    next_own: u32,
    /// We take none above this one any more.
    drained_at: Option<u32>,
    /// The server takes no new ones (client).
    peer_going: bool,
    closed: Closed,

    // Counts against floods.
    opened: u32,
    data_frames_sent: u32,
    empty_frames: u32,
    priority_frames: u32,
    window_updates: u32,
    requests_closed: u32,
    premature_resets: u32,
}

/// What is known of streams that are closed. RFC 9113 §5.1.
#[derive(Debug, Default)]
struct Closed {
    /// Reset by us: what still comes is ignored.
    reset: VecDeque<u32>,
    /// The highest number that fell out of `reset`.
    reset_before: u32,
    /// Ended both ways or reset by the peer, the last few: frames on them are faults.
    ended: [u32; 8],
    next: u8,
}

impl Closed {
    fn add_reset(&mut self, id: u32) {
        if self.reset.len() == REMEMBERED_RESETS
            && let Some(oldest) = self.reset.pop_front()
        {
            self.reset_before = self.reset_before.max(oldest);
        }
        self.reset.push_back(id);
    }

    fn add_ended(&mut self, id: u32) {
        self.ended[usize::from(self.next % 8)] = id;
        self.next = self.next.wrapping_add(1);
    }

    /// Whether frames on the closed stream are to be ignored.
    fn ignores(&self, id: u32) -> bool {
        !self.has_ended(id) && (id <= self.reset_before || self.reset.contains(&id))
    }

    fn has_ended(&self, id: u32) -> bool {
        self.ended.contains(&id)
    }
}

/// How a stream came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Both sides have ended it, or the peer has reset it.
    Done,
    /// We have reset it.
    Reset,
}

impl Connection {
    /// A new connection; its preface and SETTINGS wait in the output. The server side expects the client's
    /// preface (`PRI * HTTP/2.0…`) as the first bytes of [`Connection::receive`].
    pub fn new(role: Role, options: Arc<Options>) -> Connection {
        let mut connection = Connection {
            decoder: Decoder::new(options.hpack_table_size as usize),
            encoder: Encoder::new(
                options.hpack_table_size as usize,
                options.enable_huffman_encoding,
            ),
            output: Output::default(),
            streams: Streams::default(),
            failed: None,
            now_ms: 0,
            preface_left: match role {
                Role::Server => PREFACE.len(),
                Role::Client => 0,
            },
            has_settings: false,
            acknowledged: false,
            block: None,
            data: Data::default(),
            send_window: i64::from(DEFAULT_WINDOW),
            receive_window: DEFAULT_WINDOW,
            receive_credit: 0,
            queued: 0,
            ready: VecDeque::new(),
            wanting: VecDeque::new(),
            peer_window: DEFAULT_WINDOW,
            peer_streams: u32::MAX,
            peer_connect: false,
            last_peer: 0,
            next_own: 1,
            drained_at: None,
            peer_going: false,
            closed: Closed::default(),
            opened: 0,
            data_frames_sent: 0,
            empty_frames: 0,
            priority_frames: 0,
            window_updates: 0,
            requests_closed: 0,
            premature_resets: 0,
            role,
            options,
        };
        connection.greet();
        connection
    }

    fn greet(&mut self) {
        if self.role == Role::Client {
            self.output.put(PREFACE, 0);
        }
        let options = Arc::clone(&self.options);
        let mut settings = Vec::with_capacity(6 * 4);
        let mut set = |name: u16, value: u32| {
            settings.extend_from_slice(&name.to_be_bytes());
            settings.extend_from_slice(&value.to_be_bytes());
        };
        set(setting::HEADER_TABLE_SIZE, self.decoder.table_size());
        match self.role {
            Role::Server => {
                set(
                    setting::MAX_CONCURRENT_STREAMS,
                    options.max_concurrent_streams,
                );
                if options.allow_connect {
                    set(setting::ENABLE_CONNECT_PROTOCOL, 1);
                }
            }
            Role::Client => set(setting::ENABLE_PUSH, 0),
        }
        set(setting::INITIAL_WINDOW_SIZE, self.stream_window());
        let head = Head {
            len: settings.len(),
            kind: kind::SETTINGS,
            flags: 0,
            id: 0,
        };
        self.output.put(&head.bytes(), 0);
        self.output.put_control(&settings);
        let more = self.connection_window() - DEFAULT_WINDOW;
        if more > 0 {
            self.receive_window += more;
            self.window_update(0, more);
        }
    }

    /// Our receive window of a stream.
    fn stream_window(&self) -> u32 {
        self.options.initial_stream_window_size.min(LARGEST_WINDOW)
    }

    /// Our receive window of the connection.
    fn connection_window(&self) -> u32 {
        self.options
            .initial_connection_window_size
            .clamp(DEFAULT_WINDOW, LARGEST_WINDOW)
    }

    /// Tells the time since some start, so that ages of streams are known; milliseconds are enough. Wanted
    /// before `receive` only by servers, for `premature_reset_*`; without it every age is 0.
    pub fn set_time(&mut self, now: Duration) {
        self.now_ms = now.as_millis() as u32;
    }

    /// How many streams may be opened now (client). 0 once either side said GOAWAY.
    pub fn can_open(&self) -> usize {
        if self.is_closing() || self.next_own > LARGEST_WINDOW {
            return 0;
        }
        let most = self.peer_streams.min(self.options.max_concurrent_streams);
        (most as usize).saturating_sub(self.streams.len())
    }

    fn is_closing(&self) -> bool {
        self.peer_going || self.drained_at.is_some() || self.failed.is_some()
    }

    /// Whether the peer's SETTINGS have come.
    pub fn has_settings(&self) -> bool {
        self.has_settings
    }

    /// Whether the peer's SETTINGS allow extended CONNECT (client).
    pub fn allows_extended_connect(&self) -> bool {
        self.peer_connect
    }

    /// Streams that are open, or still have something to send.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether nothing is left to do: GOAWAY was said by either side, no stream is open, no output waits.
    pub fn is_done(&self) -> bool {
        (self.is_closing() && self.streams.len() == 0 || self.failed.is_some())
            && self.output.pending() == 0
    }

    /// Ends a stream at once, both ways; what waits of it is dropped. Nothing when it is gone.
    pub fn reset(&mut self, stream: StreamId, code: Code) {
        if self.streams.get(stream).is_some() {
            self.rst_stream(stream.id, code);
            self.release(stream.slot, End::Reset);
        }
    }

    /// Nothing more is wanted of the peer on this stream: once all of ours was sent it is reset with NO_ERROR,
    /// if the peer has not ended it until then. RFC 9113 §8.1.
    pub fn stop_receiving(&mut self, stream: StreamId) {
        let Some(state) = self.streams.get(stream) else {
            return;
        };
        state.stop = true;
        self.settle(stream.slot);
    }

    /// Bytes of [`Event::Data`](super::Event::Data) have gone on: the peer may send as many more. Batched: a
    /// WINDOW_UPDATE is queued when half a window has gathered.
    pub fn consumed(&mut self, stream: StreamId, bytes: usize) {
        let window = self.stream_window();
        let Some(state) = self.streams.get(stream) else {
            return; // the connection's window got it when the stream went
        };
        let bytes = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(state.unconsumed);
        state.unconsumed -= bytes;
        let mut update = 0;
        if !state.remote_closed {
            state.credit += bytes;
            if state.credit >= window / 2 {
                update = std::mem::take(&mut state.credit);
                state.receive_window += update;
            }
        }
        self.credit(bytes);
        if update > 0 {
            self.window_update(stream.id, update);
        }
    }

    /// Gives bytes back to the connection's window.
    fn credit(&mut self, bytes: u32) {
        self.receive_credit += bytes;
        if self.receive_credit >= self.connection_window() / 2 {
            let update = std::mem::take(&mut self.receive_credit);
            self.receive_window += update;
            self.window_update(0, update);
        }
    }

    /// Closes a stream if both sides have ended it, or if we want no more of the peer and have sent all.
    fn settle(&mut self, slot: u32) {
        let Some(stream) = self.streams.open_at(slot) else {
            return;
        };
        if !stream.local_closed {
            return;
        }
        if stream.remote_closed {
            self.release(slot, End::Done);
        } else if stream.stop {
            let id = stream.id;
            self.rst_stream(id, Code::NO_ERROR);
            self.release(slot, End::Reset);
        }
    }

    /// Forgets a stream.
    fn release(&mut self, slot: u32, end: End) {
        let stream = self.streams.remove(slot);
        self.queued -= stream.queued;
        match end {
            End::Done => self.closed.add_ended(stream.id),
            End::Reset => self.closed.add_reset(stream.id),
        }
        if self.role == Role::Server {
            self.requests_closed = self.requests_closed.saturating_add(1);
        }
        if self.streams.len() == 0 && self.ready.capacity() + self.wanting.capacity() > 0 {
            self.ready = VecDeque::new();
            self.wanting = VecDeque::new();
        }
        self.credit(stream.unconsumed);
    }

    /// Gives the connection up: GOAWAY, and nothing else any more.
    fn die(&mut self, fatal: Fatal) {
        if self.failed.is_none() {
            self.failed = Some(fatal);
            self.put_goaway(self.last_peer, fatal.code);
        }
    }

    /// Bytes on the heap and in itself, for tests.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        size_of::<Connection>()
            + self.decoder.memory()
            + self.encoder.memory()
            + self.streams.memory()
            + self.output.memory()
            + self.closed.reset.capacity() * 4
            + self.ready.capacity() * 4
            + self.wanting.capacity() * 8
    }

    fn live(&mut self, stream: StreamId) -> Result<&mut super::streams::Stream, Gone> {
        if self.failed.is_some() {
            return Err(Gone);
        }
        self.streams.get(stream).ok_or(Gone)
    }
}

#[cfg(test)]
mod tests;
