//! The floor: a TCP relay that knows no protocol. What it needs per message is what the kernel asks of
//! any proxy that reads and writes sockets.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
};

use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};

const LISTENER: Token = Token(usize::MAX);
/// Large enough that bulk data is not held back by system calls.
const BUFFER_BYTES: usize = 256 * 1024;
/// Reads in one turn before other connections get theirs.
const TURN: usize = 8;

/// One socket of a relayed connection.
#[derive(Debug)]
struct Side {
    socket: TcpStream,
    /// What the peer has sent and this socket has not taken.
    unsent: Vec<u8>,
    connected: bool,
}

enum Pumped {
    Open,
    Ended,
}

/// Relays every connection to `listen` to one of its own to `upstream`, for ever.
pub(crate) fn run(listen: SocketAddr, upstream: SocketAddr) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(listen)?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(256);
    // Sides 2n and 2n+1 belong together.
    let mut sides: Vec<Option<Side>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        if let Err(error) = poll.poll(&mut events, None)
            && error.kind() != io::ErrorKind::Interrupted
        {
            return Err(error.into());
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((socket, _)) = listener.accept() {
                    let slot = free.pop().unwrap_or_else(|| {
                        sides.extend([None, None]);
                        sides.len() - 2
                    });
                    let both = [(socket, true), (TcpStream::connect(upstream)?, false)];
                    for (index, (mut socket, connected)) in both.into_iter().enumerate() {
                        socket.set_nodelay(true).ok();
                        poll.registry().register(
                            &mut socket,
                            Token(slot + index),
                            Interest::READABLE | Interest::WRITABLE,
                        )?;
                        sides[slot + index] = Some(Side {
                            socket,
                            unsent: Vec::new(),
                            connected,
                        });
                    }
                }
                continue;
            }
            let index = event.token().0;
            let mut ended = false;
            // Every event says "writable" too; only a side that others wait for is looked at.
            let awaited = sides[index]
                .as_ref()
                .is_some_and(|side| !side.connected || !side.unsent.is_empty());
            if event.is_writable() && awaited {
                ended |= flush(&mut sides, index).is_err();
                ended |= matches!(
                    pump(&mut sides, index ^ 1, false, &poll, &mut buffer),
                    Ok(Pumped::Ended) | Err(_)
                );
                // What came before the connection stood has had its event.
                ended |= matches!(
                    pump(&mut sides, index, false, &poll, &mut buffer),
                    Ok(Pumped::Ended) | Err(_)
                );
            } else if event.is_readable() {
                let closed = event.is_read_closed();
                ended |= matches!(
                    pump(&mut sides, index, closed, &poll, &mut buffer),
                    Ok(Pumped::Ended) | Err(_)
                );
            }
            if ended && sides[index].is_some() {
                let slot = index & !1;
                for side in &mut sides[slot..slot + 2] {
                    if let Some(mut side) = side.take() {
                        poll.registry().deregister(&mut side.socket).ok();
                    }
                }
                free.push(slot);
            }
        }
    }
}

/// Writes what waits for a socket.
fn flush(sides: &mut [Option<Side>], index: usize) -> io::Result<()> {
    let Some(side) = &mut sides[index] else {
        return Ok(());
    };
    side.connected = true;
    let mut sent = 0;
    while sent < side.unsent.len() {
        match side.socket.write(&side.unsent[sent..]) {
            Ok(written) => sent += written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    side.unsent.drain(..sent);
    Ok(())
}

/// Moves bytes from a side to its peer until there are none or the peer is full.
fn pump(
    sides: &mut [Option<Side>],
    index: usize,
    closed: bool,
    poll: &Poll,
    buffer: &mut [u8],
) -> io::Result<Pumped> {
    let pair = &mut sides[index & !1..(index & !1) + 2];
    let [Some(left), Some(right)] = pair else {
        return Ok(Pumped::Open);
    };
    let (from, to) = if index.is_multiple_of(2) {
        (left, right)
    } else {
        (right, left)
    };
    if !from.connected {
        return Ok(Pumped::Open);
    }
    for _ in 0..TURN {
        if !to.unsent.is_empty() {
            return Ok(Pumped::Open);
        }
        let read = match from.socket.read(buffer) {
            Ok(0) => return Ok(Pumped::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Pumped::Open),
            Err(error) => return Err(error),
        };
        let mut sent = 0;
        while to.connected && sent < read {
            match to.socket.write(&buffer[sent..read]) {
                Ok(written) => sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        to.unsent.extend_from_slice(&buffer[sent..read]);
        if read < buffer.len() && !closed {
            return Ok(Pumped::Open);
        }
    }
    poll.registry().reregister(
        &mut from.socket,
        Token(index),
        Interest::READABLE | Interest::WRITABLE,
    )?;
    Ok(Pumped::Open)
}
