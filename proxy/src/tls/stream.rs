//! A TLS connection, in either role, over rustls' unbuffered connections: an idle one holds no buffer
//! of ours and none of rustls'.
//!
//! Reads go into a buffer of the worker's, are decrypted where they lie, and only what makes no whole
//! record yet is kept. All that one write is given becomes records in one buffer and leaves in one system
//! call. What the handshake leaves to be said is held back and leaves with the first data: session tickets
//! with the first response, a client's last flight with the first request (or when it waits for bytes).

use std::{
    fmt,
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use rustls::{
    ClientConfig, CommonState, Error, ProtocolVersion, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    gate,
    scratch::{self, Out},
};
use crate::net::Transport;

/// Longest handshake message, as rustls has it; also bounds what is kept of a record.
const LONGEST: usize = 64 * 1024;
/// Ciphertext read at once at most.
const READ: usize = 64 * 1024;
/// What a record adds to its plain text at most (RFC 8446 §5.2: 5 + 256; here with room to spare).
const OVERHEAD: usize = 512;
/// Plain text encrypted for one write at most: eight full records.
const WRITE: usize = 8 * RECORD;
/// Where in its buffer plain text is put together: see `stock::LEAD`.
const LEAD: usize = 1024;
/// Plain text of a full record.
const RECORD: usize = 16 * 1024;

/// rustls' side of a connection.
enum Session {
    Server(UnbufferedServerConnection),
    Client(UnbufferedClientConnection),
}

/// Calls `process_tls_records` on either.
macro_rules! step {
    ($session:expr, $input:expr, |$status:ident| $call:expr) => {
        match $session {
            Session::Server(s) => {
                let $status = s.process_tls_records($input);
                $call
            }
            Session::Client(s) => {
                let $status = s.process_tls_records($input);
                $call
            }
        }
    };
}

/// Where a session stands after it has used what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Go on with the same input.
    Busy,
    /// The handshake needs bytes from the peer.
    Handshaking,
    /// Data may be sent, and bytes from the peer are needed for more.
    Open,
    /// The peer has said that it sends no more.
    PeerClosed,
}

impl Session {
    /// Uses all of `input` that makes whole messages; gives how much of it can be forgotten.
    fn process(
        &mut self,
        input: &mut [u8],
        out: &mut Out,
        plain: &mut impl FnMut(&[u8]),
    ) -> (usize, Result<Stage, Error>) {
        let mut used = 0;
        let mut peer_closed = false;
        loop {
            let (discard, stage) = step!(self, &mut input[used..], |status| settle(
                status, out, plain
            ));
            used += discard;
            match stage {
                Ok(Stage::Busy) => {}
                // Said once; what may still be sent follows.
                Ok(Stage::PeerClosed) if !peer_closed => peer_closed = true,
                Ok(_) if peer_closed => return (input.len(), Ok(Stage::PeerClosed)),
                Ok(stage) => return (used, Ok(stage)),
                Err(error) => {
                    // What is still to be said, above all the alert that tells the peer.
                    while self.common().wants_write() {
                        let (_, stage) = step!(self, &mut input[used..], |status| settle(
                            status, out, plain
                        ));
                        if stage != Ok(Stage::Busy) {
                            break;
                        }
                    }
                    return (used, Err(error));
                }
            }
        }
    }

    /// Encrypts `plain`; `kept` is what the session has not used of its input yet.
    fn encrypt(&mut self, kept: &mut Vec<u8>, plain: &[u8], out: &mut Out) -> io::Result<()> {
        let records = plain.len().div_ceil(RECORD);
        let room = plain.len() + records * OVERHEAD;
        self.write(kept, out, room, |mut traffic, room| {
            match traffic {
                Traffic::Server(ref mut w) => w.encrypt(plain, room),
                Traffic::Client(ref mut w) => w.encrypt(plain, room),
            }
            .map_err(exhausted)
        })
    }

    /// Encrypts the alert that ends our half.
    fn close(&mut self, kept: &mut Vec<u8>, out: &mut Out) -> io::Result<()> {
        self.write(kept, out, OVERHEAD, |mut traffic, room| {
            match traffic {
                Traffic::Server(ref mut w) => w.queue_close_notify(room),
                Traffic::Client(ref mut w) => w.queue_close_notify(room),
            }
            .map_err(exhausted)
        })
    }

    fn write(
        &mut self,
        kept: &mut Vec<u8>,
        out: &mut Out,
        room: usize,
        mut with: impl FnMut(Traffic<'_>, &mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        loop {
            // rustls wants to see the beginning of a message that it has not used; never an empty slice.
            let (discard, done) = match self {
                Session::Server(s) => {
                    let status = s.process_tls_records(kept);
                    let discard = status.discard;
                    match status.state {
                        Ok(ConnectionState::WriteTraffic(w)) => {
                            let n = with(Traffic::Server(w), out.room(room))?;
                            out.fill(n);
                            (discard, true)
                        }
                        state => (discard, between(state, out)?),
                    }
                }
                Session::Client(s) => {
                    let status = s.process_tls_records(kept);
                    let discard = status.discard;
                    match status.state {
                        Ok(ConnectionState::WriteTraffic(w)) => {
                            let n = with(Traffic::Client(w), out.room(room))?;
                            out.fill(n);
                            (discard, true)
                        }
                        state => (discard, between(state, out)?),
                    }
                }
            };
            kept.drain(..discard);
            if done {
                return Ok(());
            }
        }
    }

    fn common(&self) -> &CommonState {
        match self {
            Session::Server(s) => s,
            Session::Client(s) => s,
        }
    }
}

/// Leave to encrypt, in either role.
enum Traffic<'a> {
    Server(rustls::unbuffered::WriteTraffic<'a, rustls::server::ServerConnectionData>),
    Client(rustls::unbuffered::WriteTraffic<'a, rustls::client::ClientConnectionData>),
}

/// What has to be done before something can be encrypted; always `false`, for "not yet".
fn between<D>(state: Result<ConnectionState<'_, '_, D>, Error>, out: &mut Out) -> io::Result<bool> {
    match state.map_err(invalid)? {
        ConnectionState::EncodeTlsData(mut data) => encode(&mut data, out),
        ConnectionState::TransmitTlsData(sent) => sent.done(),
        ConnectionState::PeerClosed => {}
        _ => return Err(io::ErrorKind::BrokenPipe.into()),
    }
    Ok(false)
}

/// Does what one state asks for.
fn settle<D>(
    status: UnbufferedStatus<'_, '_, D>,
    out: &mut Out,
    plain: &mut impl FnMut(&[u8]),
) -> (usize, Result<Stage, Error>) {
    let mut discard = status.discard;
    let stage = match status.state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut stage = Ok(Stage::Busy);
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        plain(record.payload);
                    }
                    Err(error) => stage = Err(error),
                }
            }
            stage
        }
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(&mut data, out);
            Ok(Stage::Busy)
        }
        // It leaves when the caller says so.
        Ok(ConnectionState::TransmitTlsData(sent)) => {
            sent.done();
            Ok(Stage::Busy)
        }
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Stage::Open),
        Ok(ConnectionState::BlockedHandshake) => Ok(Stage::Handshaking),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Stage::PeerClosed),
        // We offer no early data.
        Ok(_) => Err(Error::General("early data".to_owned())),
    };
    (discard, stage)
}

fn encode<D>(data: &mut rustls::unbuffered::EncodeTlsData<'_, D>, out: &mut Out) {
    // Asked with no room it tells how much it needs.
    if let Err(EncodeError::InsufficientSize(needed)) = data.encode(&mut [])
        && let Ok(n) = data.encode(out.room(needed.required_size))
    {
        out.fill(n);
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn exhausted(error: EncryptError) -> io::Error {
    io::Error::other(error)
}

fn unexpected_end() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the peer closed the connection without TLS close_notify",
    )
}

/// TLS over a socket.
pub struct TlsStream {
    io: Transport,
    session: Session,
    /// Received, and not yet used by the session: less than a record.
    kept: Vec<u8>,
    /// Decrypted, and not yet taken.
    plain: BytesMut,
    /// Encrypted, and not yet written.
    out: Out,
    /// `out` is held back only to leave with data.
    holding: Holding,
    peer_closed: bool,
    closed: bool,
}

/// Why something encrypted has not been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holding {
    /// The socket has not taken it.
    Nothing,
    /// The peer does not wait for it (session tickets).
    Tickets,
    /// The peer waits for it, but will get it with the first data.
    Flight,
}

impl TlsStream {
    /// Answers a client. `read` is what has been read of the connection already; `mutual` says that the
    /// client may have to prove who it is.
    pub(super) async fn accept(
        io: Transport,
        read: Vec<u8>,
        config: Arc<ServerConfig>,
        mutual: bool,
    ) -> io::Result<TlsStream> {
        let session = Session::Server(UnbufferedServerConnection::new(config).map_err(invalid)?);
        TlsStream::new(io, session, read).handshake(mutual).await
    }

    /// Calls a server.
    pub(super) async fn connect(
        io: Transport,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        alpn: Option<Vec<Vec<u8>>>,
    ) -> io::Result<TlsStream> {
        let session = match alpn {
            None => UnbufferedClientConnection::new(config, name),
            Some(alpn) => UnbufferedClientConnection::new_with_alpn(config, name, alpn),
        };
        let session = Session::Client(session.map_err(invalid)?);
        TlsStream::new(io, session, Vec::new())
            .handshake(true)
            .await
    }

    fn new(io: Transport, session: Session, read: Vec<u8>) -> TlsStream {
        TlsStream {
            io,
            session,
            kept: read,
            plain: BytesMut::new(),
            out: Out::default(),
            holding: Holding::Nothing,
            peer_closed: false,
            closed: false,
        }
    }

    async fn handshake(mut self, mutual: bool) -> io::Result<TlsStream> {
        loop {
            // A server that has agreed on a key has little left to do, unless it checks a certificate.
            let costly = mutual || self.common().negotiated_key_exchange_group().is_none();
            let turn = if costly {
                Some(gate::turn().await)
            } else {
                None
            };
            let (used, stage) = self
                .session
                .process(&mut self.kept, &mut self.out, &mut |data| {
                    self.plain.extend_from_slice(data);
                });
            self.kept.drain(..used);
            match stage {
                Err(error) => {
                    // The alert is a courtesy; the peer may be gone.
                    drop(poll_fn(|cx| Poll::Ready(self.poll_drain(cx))).await);
                    return Err(invalid(error));
                }
                Ok(Stage::Open) if !self.common().is_handshaking() => {
                    gate::end(turn).await;
                    break;
                }
                Ok(Stage::PeerClosed) => return Err(unexpected_end()),
                Ok(_) => {}
            }
            // It leaves before others have their turn, but a peer that takes nothing must not keep them
            // from it.
            if let Poll::Ready(sent) = poll_fn(|cx| Poll::Ready(self.poll_drain(cx))).await {
                sent?;
            }
            gate::end(turn).await;
            poll_fn(|cx| self.poll_drain(cx)).await?;
            let n = read_more(&mut self.io, &mut self.kept).await?;
            if n == 0 {
                return Err(unexpected_end());
            }
        }
        if self.kept.is_empty() {
            self.kept = Vec::new();
        }
        self.holding = match (&self.session, self.common().protocol_version()) {
            (_, _) if self.out.is_empty() => Holding::Nothing,
            (Session::Client(_), _) => Holding::Flight,
            (Session::Server(_), Some(ProtocolVersion::TLSv1_3)) => Holding::Tickets,
            // The client waits for it before it says anything.
            (Session::Server(_), _) => {
                poll_fn(|cx| self.poll_drain(cx)).await?;
                Holding::Nothing
            }
        };
        if self.holding == Holding::Tickets {
            self.out.shrink();
        }
        Ok(self)
    }

    /// What the handshake agreed on.
    pub fn common(&self) -> &CommonState {
        self.session.common()
    }

    /// Our address on the socket beneath.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.io.local_addr()
    }

    /// Ready when plain bytes, the end or an error may be there.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.plain.is_empty() || self.peer_closed {
            return Poll::Ready(Ok(()));
        }
        self.send_flight(cx)?;
        self.io.poll_readable(cx)
    }

    #[cfg(test)]
    pub(super) fn holds_nothing(&self) -> bool {
        self.kept.capacity() == 0 && self.plain.capacity() == 0 && self.out.is_empty()
    }

    /// Before waiting for the peer: what it waits for must have left.
    fn send_flight(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.holding == Holding::Flight
            && let Poll::Ready(result) = self.poll_drain(cx)
        {
            return result;
        }
        Ok(())
    }

    /// Writes what is encrypted.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.holding = Holding::Nothing;
        while !self.out.is_empty() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, self.out.filled()))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(n);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut scratch = scratch::take();
        let polled = self.receive(cx, buf, &mut scratch);
        scratch::give(scratch);
        polled
    }

    /// Reads until there is something for `buf`.
    fn receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        scratch: &mut [u8],
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            let kept = self.kept.len();
            // Enough for what the caller can take, so that little has to be copied twice.
            let want = (buf.remaining() + OVERHEAD).clamp(4096, READ);
            let mut read = ReadBuf::new(&mut scratch[kept..kept + want]);
            match Pin::new(&mut self.io).poll_read(cx, &mut read) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    self.send_flight(cx)?;
                    return Poll::Pending;
                }
            }
            let n = read.filled().len();
            if n == 0 {
                self.peer_closed = true;
                return Poll::Ready(Err(unexpected_end()));
            }
            scratch[..kept].copy_from_slice(&self.kept);
            let end = kept + n;
            let quiet = self.out.is_empty();
            let plain = &mut self.plain;
            let (used, stage) =
                self.session
                    .process(&mut scratch[..end], &mut self.out, &mut |data| {
                        let n = data.len().min(buf.remaining());
                        buf.put_slice(&data[..n]);
                        plain.extend_from_slice(&data[n..]);
                    });
            self.keep(&scratch[used..end])?;
            if quiet && !self.out.is_empty() {
                // An answer to a key update, or an alert: sent as far as the socket takes it now.
                drop(self.poll_drain(cx));
            }
            match stage {
                Err(error) => {
                    (self.peer_closed, self.closed) = (true, true);
                    return Poll::Ready(Err(invalid(error)));
                }
                Ok(Stage::PeerClosed) => {
                    self.peer_closed = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(_) if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Ok(_) => {}
            }
        }
    }

    fn keep(&mut self, rest: &[u8]) -> io::Result<()> {
        if rest.len() > LONGEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a TLS handshake message is too long",
            ));
        }
        if rest.is_empty() {
            self.kept = Vec::new();
        } else {
            self.kept.clear();
            self.kept.extend_from_slice(rest);
        }
        Ok(())
    }

    /// Encrypts the first `total` bytes of `bufs`: long pieces as they are, short ones side by side in
    /// `record`.
    fn seal(
        &mut self,
        bufs: &[IoSlice<'_>],
        mut total: usize,
        record: &mut [u8],
    ) -> io::Result<()> {
        let mut gathered = 0;
        for piece in bufs {
            let mut piece = &piece[..piece.len().min(total)];
            total -= piece.len();
            while !piece.is_empty() {
                let whole = if total == 0 {
                    piece.len()
                } else {
                    piece.len() - piece.len() % record.len()
                };
                if gathered == 0 && whole > 0 {
                    self.session
                        .encrypt(&mut self.kept, &piece[..whole], &mut self.out)?;
                    piece = &piece[whole..];
                    continue;
                }
                let n = piece.len().min(record.len() - gathered);
                record[gathered..gathered + n].copy_from_slice(&piece[..n]);
                gathered += n;
                piece = &piece[n..];
                if gathered == record.len() {
                    self.session
                        .encrypt(&mut self.kept, record, &mut self.out)?;
                    gathered = 0;
                }
            }
        }
        if gathered > 0 {
            self.session
                .encrypt(&mut self.kept, &record[..gathered], &mut self.out)?;
        }
        Ok(())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.holding == Holding::Nothing {
            ready!(self.poll_drain(cx))?;
        }
        let total: usize = bufs.iter().map(|b| b.len()).sum::<usize>().min(WRITE);
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let mut gathered = scratch::take();
        let sealed = self.seal(bufs, total, &mut gathered[LEAD..LEAD + RECORD]);
        scratch::give(gathered);
        sealed?;
        match self.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(total)),
        }
    }
}

/// Reads some bytes and appends them.
pub(super) async fn read_more(io: &mut Transport, to: &mut Vec<u8>) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut scratch = scratch::take();
        let mut read = ReadBuf::new(&mut scratch[..READ]);
        let polled = Pin::new(&mut *io).poll_read(cx, &mut read).map_ok(|()| {
            to.extend_from_slice(read.filled());
            read.filled().len()
        });
        scratch::give(scratch);
        if to.len() > LONGEST {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a TLS handshake message is too long",
            )));
        }
        polled
    })
    .await
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TlsStream({:?})", self.io)
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.plain.is_empty() {
            let n = this.plain.len().min(buf.remaining());
            buf.put_slice(&this.plain[..n]);
            this.plain.advance(n);
            if this.plain.is_empty() {
                this.plain = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        if this.peer_closed || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        this.poll_receive(cx, buf)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Tickets go with data, and nobody flushes without having written some.
        if this.holding == Holding::Tickets {
            return Poll::Ready(Ok(()));
        }
        this.poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closed {
            this.closed = true;
            // After a fatal alert there is nothing more to say.
            drop(this.session.close(&mut this.kept, &mut this.out));
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
