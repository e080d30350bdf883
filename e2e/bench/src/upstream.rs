//! Applications behind the proxies: fixed answers in every protocol, one thread.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
};

use anyhow::Context as _;
use mio::{Events, Interest, Poll, Token, net::TcpListener};

use crate::{
    frame::{self, Block},
    wire::{After, Wire},
};

/// What one port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// HTTP/1.1 with a body of so many bytes; answers an upgrade and then echoes.
    Http1(usize),
    /// HTTP/2 with prior knowledge, a body of so many bytes.
    Http2(usize),
    /// gRPC: a message of so many bytes and `grpc-status: 0`.
    Grpc(usize),
    /// `envoy.service.auth.v3.Authorization` that allows everything.
    Authorization,
    /// Sends back what comes.
    Echo,
    /// Sends without end.
    Source,
    /// Takes without end.
    Sink,
}

/// Read buffer, and the block of `Source`.
const BUFFER_BYTES: usize = 256 * 1024;
/// Answers that may wait for the socket of an HTTP/2 connection.
const MAX_UNSENT: usize = 1 << 20;

/// What a kind answers.
#[derive(Debug)]
enum Answer {
    Http1(Vec<u8>),
    Http2 {
        head: Block,
        body: Vec<u8>,
        trailers: Option<Vec<u8>>,
    },
    Echo,
    Source(Vec<u8>),
    Sink,
}

impl Answer {
    fn new(kind: Kind) -> Answer {
        let grpc = |message: &[u8]| Answer::Http2 {
            head: Block::new(&[(":status", "200"), ("content-type", "application/grpc")]),
            body: grpc_message(message),
            trailers: Some(frame::literals(&[("grpc-status", "0")])),
        };
        match kind {
            Kind::Http1(bytes) => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {bytes}\r\nserver: up\r\n\r\n"
                );
                let mut answer = head.into_bytes();
                answer.resize(answer.len() + bytes, b'x');
                Answer::Http1(answer)
            }
            Kind::Http2(bytes) => Answer::Http2 {
                head: Block::new(&[
                    (":status", "200"),
                    ("content-type", "text/plain"),
                    ("content-length", &bytes.to_string()),
                    ("server", "up"),
                ]),
                body: vec![b'x'; bytes],
                trailers: None,
            },
            Kind::Grpc(bytes) => grpc(&vec![b'x'; bytes]),
            // CheckResponse { status: Status {} }
            Kind::Authorization => grpc(&[0x0a, 0x00]),
            Kind::Echo => Answer::Echo,
            Kind::Source => Answer::Source(vec![b'x'; BUFFER_BYTES]),
            Kind::Sink => Answer::Sink,
        }
    }
}

/// A message with its gRPC prefix.
pub(crate) fn grpc_message(message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}

/// Binds a port of the system's choice.
pub(crate) fn bind(port: u16) -> anyhow::Result<(std::net::TcpListener, SocketAddr)> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // A killed upstream comes back on the port it had.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    let wanted = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    socket
        .bind(&wanted.into())
        .with_context(|| format!("cannot listen on {wanted}"))?;
    socket.listen(4096)?;
    let listener = std::net::TcpListener::from(socket);
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// One connection.
#[derive(Debug)]
struct Connection {
    wire: Wire,
    answer: Rc<Answer>,
    speech: Speech,
}

#[derive(Debug)]
enum Speech {
    Http1(Http1),
    Http2(Http2),
    Raw,
}

/// Answers on all ports for ever.
pub(crate) fn serve(ports: Vec<(std::net::TcpListener, Kind)>) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let mut listeners = Vec::new();
    for (listener, kind) in ports {
        let mut listener = TcpListener::from_std(listener);
        poll.registry()
            .register(&mut listener, Token(listeners.len()), Interest::READABLE)?;
        listeners.push((listener, Rc::new(Answer::new(kind))));
    }
    let first = listeners.len();
    let mut events = Events::with_capacity(512);
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut free = Vec::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if let Err(error) = poll.poll(&mut events, None)
            && error.kind() != io::ErrorKind::Interrupted
        {
            return Err(error.into());
        }
        for event in &events {
            let token = event.token();
            if let Some((listener, answer)) = listeners.get(token.0) {
                while let Ok((socket, _)) = listener.accept() {
                    let mut connection = Connection {
                        wire: Wire::accepted(socket),
                        answer: answer.clone(),
                        speech: match **answer {
                            Answer::Http1(_) => Speech::Http1(Http1::default()),
                            Answer::Http2 { .. } => Speech::Http2(Http2::new()),
                            _ => Speech::Raw,
                        },
                    };
                    let slot = free.pop().unwrap_or_else(|| {
                        connections.push(None);
                        connections.len() - 1
                    });
                    connection
                        .wire
                        .register(poll.registry(), Token(first + slot))?;
                    connections[slot] = Some(connection);
                }
                continue;
            }
            let slot = token.0 - first;
            let Some(connection) = connections[slot].as_mut() else {
                continue;
            };
            match connection.turn(event, &mut buffer) {
                Ok(After::Waits) => {}
                Ok(After::More) => connection.wire.wake(poll.registry(), token)?,
                Ok(After::Closed) | Err(_) => {
                    connection.wire.deregister(poll.registry());
                    connections[slot] = None;
                    free.push(slot);
                }
            }
        }
    }
}

impl Connection {
    fn turn(&mut self, event: &mio::event::Event, buffer: &mut [u8]) -> io::Result<After> {
        let Connection {
            wire,
            answer,
            speech,
        } = self;
        let mut after = After::Waits;
        if event.is_readable() {
            let mut out = std::mem::take(&mut wire.out);
            let read = wire.read(buffer, event.is_read_closed(), |bytes| {
                match (&mut *speech, &**answer) {
                    (Speech::Http1(http1), Answer::Http1(answer)) => {
                        http1.feed(bytes, answer, &mut out);
                    }
                    (Speech::Http2(http2), _) => http2.feed(bytes, &mut out),
                    (Speech::Raw, Answer::Echo) => out.extend_from_slice(bytes),
                    _ => {}
                }
            });
            wire.out = out;
            after = read?;
        }
        if let Answer::Source(block) = &**answer {
            let (_, poured) = wire.pour(block)?;
            return Ok(if after == After::Closed {
                after
            } else {
                poured
            });
        }
        loop {
            if let (
                Speech::Http2(http2),
                Answer::Http2 {
                    head,
                    body,
                    trailers,
                },
            ) = (&mut *speech, &**answer)
            {
                http2.answer(wire, head, body, trailers.as_deref());
            }
            if wire.unsent() == 0 {
                break;
            }
            wire.flush()?;
            if wire.unsent() > 0 {
                break;
            }
        }
        Ok(after)
    }
}

/// Reads requests and puts an answer for each.
#[derive(Debug, Default)]
struct Http1 {
    head: Vec<u8>,
    body_left: usize,
    upgraded: bool,
}

impl Http1 {
    fn feed(&mut self, mut bytes: &[u8], answer: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            if self.upgraded {
                out.extend_from_slice(bytes);
                return;
            }
            if self.body_left > 0 {
                let skip = self.body_left.min(bytes.len());
                self.body_left -= skip;
                bytes = &bytes[skip..];
                if self.body_left == 0 {
                    out.extend_from_slice(answer);
                }
                continue;
            }
            let held = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = find_end(&self.head, held) else {
                return;
            };
            bytes = &bytes[end - held..];
            let head = &self.head[..end];
            if header(head, "upgrade").is_some() {
                self.upgraded = true;
                out.extend_from_slice(
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n",
                );
            } else {
                // Every request of the load says its length, and a proxy keeps it.
                self.body_left = header(head, "content-length")
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0);
                if self.body_left == 0 {
                    out.extend_from_slice(answer);
                }
            }
            self.head.clear();
        }
    }
}

/// The end of a head, looking only where it can newly be.
pub(crate) fn find_end(bytes: &[u8], looked: usize) -> Option<usize> {
    let from = looked.saturating_sub(3);
    bytes[from..]
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|at| from + at + 4)
}

/// A header's value; names in any case.
pub(crate) fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    head.split(|byte| *byte == b'\n').skip(1).find_map(|line| {
        let (found, value) = line.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        found
            .eq_ignore_ascii_case(name.as_bytes())
            .then(|| std::str::from_utf8(value).ok().map(str::trim))?
    })
}

/// Reads requests, of which only the ends matter, and answers within the windows.
#[derive(Debug)]
struct Http2 {
    preface_left: usize,
    reader: frame::Reader,
    table: u32,
    sent_head: bool,
    initial_window: i64,
    window: i64,
    unreported: u32,
    /// Streams that are owed an answer: id, bytes sent (head not yet: `None`), window.
    owed: Vec<(u32, Option<usize>, i64)>,
}

impl Http2 {
    fn new() -> Http2 {
        Http2 {
            preface_left: frame::PREFACE.len(),
            reader: frame::Reader::default(),
            table: 4096,
            sent_head: false,
            initial_window: 65_535,
            window: 65_535,
            unreported: 0,
            owed: Vec::new(),
        }
    }

    fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        if self.preface_left > 0 {
            let skip = self.preface_left.min(bytes.len());
            self.preface_left -= skip;
            bytes = &bytes[skip..];
            if self.preface_left > 0 {
                return;
            }
            frame::put_settings(
                out,
                &[
                    (frame::SETTINGS_MAX_CONCURRENT_STREAMS, 1000),
                    (frame::SETTINGS_INITIAL_WINDOW_SIZE, frame::STREAM_WINDOW),
                ],
            );
        }
        let Http2 {
            reader,
            table,
            initial_window,
            window,
            unreported,
            owed,
            ..
        } = self;
        reader.feed(bytes, |head, payload| match head.kind {
            frame::DATA | frame::HEADERS => {
                if head.kind == frame::DATA {
                    *unreported += head.length as u32;
                }
                if head.has(frame::END_STREAM) {
                    owed.push((head.stream, None, *initial_window));
                }
            }
            frame::SETTINGS if !head.has(frame::ACK) => {
                for (id, value) in frame::settings(payload) {
                    match id {
                        frame::SETTINGS_HEADER_TABLE_SIZE => *table = value,
                        frame::SETTINGS_INITIAL_WINDOW_SIZE => *initial_window = i64::from(value),
                        _ => {}
                    }
                }
                frame::put(out, frame::SETTINGS, frame::ACK, 0, &[]);
            }
            frame::PING if !head.has(frame::ACK) => {
                frame::put(out, frame::PING, frame::ACK, 0, payload);
            }
            frame::RST_STREAM => owed.retain(|(stream, ..)| *stream != head.stream),
            frame::WINDOW_UPDATE => {
                let more = i64::from(frame::number(payload));
                if head.stream == 0 {
                    *window += more;
                } else if let Some(stream) = owed.iter_mut().find(|(id, ..)| *id == head.stream) {
                    stream.2 += more;
                }
            }
            _ => {}
        });
        if self.unreported > frame::REFILL {
            frame::put_window(out, 0, self.unreported);
            self.unreported = 0;
        }
    }

    /// Puts what the windows allow of every answer owed.
    fn answer(&mut self, wire: &mut Wire, head: &Block, body: &[u8], trailers: Option<&[u8]>) {
        let mut index = 0;
        while let Some((stream, sent, window)) = self.owed.get_mut(index) {
            if wire.unsent() > MAX_UNSENT {
                return;
            }
            let stream = *stream;
            let sent = sent.get_or_insert_with(|| {
                let block = head.bytes(self.sent_head, self.table);
                self.sent_head = true;
                frame::put(
                    &mut wire.out,
                    frame::HEADERS,
                    frame::END_HEADERS,
                    stream,
                    block,
                );
                0
            });
            let allowed = (*window)
                .min(self.window)
                .clamp(0, frame::MAX_PAYLOAD as i64) as usize;
            let size = (body.len() - *sent).min(allowed);
            let last = *sent + size == body.len();
            if size == 0 && !last {
                index += 1;
                continue;
            }
            let end = if last && trailers.is_none() {
                frame::END_STREAM
            } else {
                0
            };
            frame::put(
                &mut wire.out,
                frame::DATA,
                end,
                stream,
                &body[*sent..*sent + size],
            );
            *sent += size;
            *window -= size as i64;
            self.window -= size as i64;
            if !last {
                // The others' turn.
                index += 1;
                if index == self.owed.len() {
                    index = 0;
                }
                continue;
            }
            if let Some(trailers) = trailers {
                frame::put(
                    &mut wire.out,
                    frame::HEADERS,
                    frame::END_HEADERS | frame::END_STREAM,
                    stream,
                    trailers,
                );
            }
            self.owed.remove(index);
        }
    }
}
