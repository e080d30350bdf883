//! A non-blocking socket with what it has not taken yet, plain or TLS (client side).

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    sync::Arc,
};

use mio::{Interest, Registry, Token, net::TcpStream};
use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};

/// The name that TLS scenarios ask for and that their certificates carry.
pub(crate) const SERVER_NAME: &str = "svc.example";
/// Reads or writes in one turn before others get theirs.
const TURN: usize = 8;

/// How reading or writing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The socket has no more; it will wake us.
    Waits,
    /// There is more, but others want a turn: ask to be woken.
    More,
    /// The peer has closed.
    Closed,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    /// To be sent, from `sent` on.
    pub(crate) out: Vec<u8>,
    sent: usize,
}

impl Wire {
    pub(crate) fn connect(to: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> anyhow::Result<Wire> {
        let tls = match tls {
            Some(config) => {
                let name = ServerName::try_from(SERVER_NAME)?;
                let mut session = ClientConnection::new(config.clone(), name)?;
                session.set_buffer_limit(None);
                Some(Box::new(session))
            }
            None => None,
        };
        Ok(Wire {
            socket: TcpStream::connect(to)?,
            tls,
            out: Vec::new(),
            sent: 0,
        })
    }

    pub(crate) fn accepted(socket: TcpStream) -> Wire {
        socket.set_nodelay(true).ok();
        Wire {
            socket,
            tls: None,
            out: Vec::new(),
            sent: 0,
        }
    }

    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(
            &mut self.socket,
            token,
            Interest::READABLE | Interest::WRITABLE,
        )
    }

    /// Asks to be woken again although nothing has changed.
    pub(crate) fn wake(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.reregister(
            &mut self.socket,
            token,
            Interest::READABLE | Interest::WRITABLE,
        )
    }

    /// Takes the socket out of the poll, which a closed one would leave by itself.
    pub(crate) fn deregister(&mut self, registry: &Registry) {
        registry.deregister(&mut self.socket).ok();
    }

    /// Whether the connection stands; an error when it was refused.
    pub(crate) fn connected(&mut self) -> io::Result<bool> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        match self.socket.peer_addr() {
            Ok(_) => {
                self.socket.set_nodelay(true)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether TLS still shakes hands.
    pub(crate) fn shaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Gives everything that is there to `on`. `to_end`: the peer is known to have closed.
    pub(crate) fn read(
        &mut self,
        buffer: &mut [u8],
        to_end: bool,
        mut on: impl FnMut(&[u8]),
    ) -> io::Result<After> {
        let Some(tls) = &mut self.tls else {
            for _ in 0..TURN {
                match self.socket.read(buffer) {
                    Ok(0) => return Ok(After::Closed),
                    Ok(read) => {
                        on(&buffer[..read]);
                        // A short read has emptied the socket: the next bytes wake us.
                        if read < buffer.len() && !to_end {
                            return Ok(After::Waits);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(After::Waits);
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok(After::More);
        };
        loop {
            let ended = match tls.read_tls(&mut self.socket) {
                Ok(read) => read == 0,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(After::Waits),
                Err(error) => return Err(error),
            };
            tls.process_new_packets().map_err(io::Error::other)?;
            loop {
                match tls.reader().read(buffer) {
                    Ok(0) => return Ok(After::Closed),
                    Ok(read) => on(&buffer[..read]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => return Ok(After::Closed),
                }
            }
            if ended {
                return Ok(After::Closed);
            }
        }
    }

    /// Sends what `out` holds, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            if !self.out.is_empty() && !tls.is_handshaking() {
                tls.writer().write_all(&self.out)?;
                self.out.clear();
            }
            while tls.wants_write() {
                match tls.write_tls(&mut self.socket) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            return Ok(());
        }
        while self.sent < self.out.len() {
            match self.socket.write(&self.out[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }

    /// Bytes that wait for the socket.
    pub(crate) fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Writes `block` again and again without keeping anything; the bytes taken.
    pub(crate) fn pour(&mut self, block: &[u8]) -> io::Result<(u64, After)> {
        let mut taken = 0;
        for _ in 0..TURN {
            match self.socket.write(block) {
                Ok(written) => taken += written as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((taken, After::Waits));
                }
                Err(error) => return Err(error),
            }
        }
        Ok((taken, After::More))
    }
}
