//! Byte streams as the drivers see them: plain sockets and TLS behind one type, so that neither codec nor
//! driver is generic over them.
//!
//! A connection that waits holds no buffer: wait with [`Transport::poll_readable`], then borrow one from
//! the worker's [`stock`], read, and give it back when it is empty.

pub mod stock;
pub mod splice;
mod tcp;

use std::{
    fmt,
    future::Future as _,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

pub use self::tcp::Tcp;
use crate::tls::TlsStream;

/// A connection to a peer, downstream or upstream.
pub enum Transport {
    /// TCP, bytes as they are.
    Tcp(Tcp),
    /// A unix socket.
    Unix(UnixStream),
    /// TLS, in either role.
    Tls(Box<TlsStream>),
    /// A pipe in memory.
    #[cfg(test)]
    Memory(Box<Memory>),
}

/// The same with each kind, as tokio's traits have it.
macro_rules! each {
    ($value:expr, $s:ident => $call:expr) => {
        match $value {
            Transport::Tcp(tcp) => {
                let $s = tcp.raw();
                $call
            }
            Transport::Unix($s) => $call,
            Transport::Tls($s) => $call,
            #[cfg(test)]
            Transport::Memory($s) => $call,
        }
    };
}

impl Transport {
    /// Ready when bytes, the end or an error may be there; after that a read may still find nothing. Needs
    /// no buffer and, while nothing has come, no system call.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Transport::Tcp(s) => s.poll_readable(cx),
            Transport::Unix(s) => s.poll_read_ready(cx),
            Transport::Tls(s) => s.poll_readable(cx),
            #[cfg(test)]
            Transport::Memory(s) => s.poll_readable(cx),
        }
    }

    /// Whether something may have come, as far as that is known without a look; nobody is woken later.
    pub fn is_readable(&mut self) -> bool {
        match self {
            Transport::Tcp(s) => s.is_readable(),
            this => this
                .poll_readable(&mut Context::from_waker(Waker::noop()))
                .is_ready(),
        }
    }

    /// Reads into the spare capacity of `buf`, which the caller has reserved; 0 is the end of the stream.
    ///
    /// # Errors
    /// What the socket says; for TLS the source is a [`rustls::Error`] when the peer broke the protocol.
    pub fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        match self {
            Transport::Tcp(s) => s.poll_read(cx, buf),
            this => each!(this, s => pin!(s.read_buf(buf)).poll(cx)),
        }
    }

    /// Writes what the socket takes of `bufs` with one system call; gives how many bytes of them it was.
    /// TLS takes what it can encrypt at once and may hold back the end of it until
    /// [`Transport::poll_flush`].
    ///
    /// # Errors
    /// What the socket says.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match (self, bufs) {
            // One slice costs the kernel less as a plain send.
            (Transport::Tcp(s), [one]) => s.poll_write(cx, one),
            (this, bufs) => each!(this, s => Pin::new(s).poll_write_vectored(cx, bufs)),
        }
    }

    /// Whether [`Transport::try_write`] is of use.
    #[inline]
    pub fn is_plain_tcp(&self) -> bool {
        matches!(self, Transport::Tcp(_))
    }

    /// Writes what a plain socket takes of `buf` at once; nobody is woken when it takes more.
    ///
    /// # Errors
    /// What the socket says; that it would block, of all that is none.
    pub fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Transport::Tcp(s) => s.try_write(buf),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Sends what is held back. Plain sockets hold back nothing.
    ///
    /// # Errors
    /// What the socket says.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Transport::Tls(s) => Pin::new(s).poll_flush(cx),
            Transport::Tcp(_) | Transport::Unix(_) => Poll::Ready(Ok(())),
            #[cfg(test)]
            Transport::Memory(_) => Poll::Ready(Ok(())),
        }
    }

    /// Ends our half of the stream, after what is held back; the peer's half stays open.
    ///
    /// # Errors
    /// What the socket says.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_shutdown(cx))
    }

    /// The socket, if bytes pass it as they are.
    pub fn plain_tcp(&self) -> Option<&TcpStream> {
        match self {
            Transport::Tcp(s) => Some(s.stream()),
            _ => None,
        }
    }

    /// Our address on it, if it has one.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Transport::Tcp(s) => s.local_addr(),
            Transport::Tls(s) => s.local_addr(),
            _ => None,
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Tcp(_) => "Tcp",
            Transport::Unix(_) => "Unix",
            Transport::Tls(_) => "Tls",
            #[cfg(test)]
            Transport::Memory(_) => "Memory",
        })
    }
}

impl From<TcpStream> for Transport {
    fn from(stream: TcpStream) -> Transport {
        Transport::Tcp(stream.into())
    }
}

impl From<UnixStream> for Transport {
    fn from(stream: UnixStream) -> Transport {
        Transport::Unix(stream)
    }
}

impl From<TlsStream> for Transport {
    fn from(stream: TlsStream) -> Transport {
        Transport::Tls(Box::new(stream))
    }
}

#[cfg(test)]
impl From<tokio::io::DuplexStream> for Transport {
    fn from(stream: tokio::io::DuplexStream) -> Transport {
        Transport::Memory(Box::new(Memory::new(stream)))
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp(s) => s.poll_read_buf(cx, buf),
            this => each!(this, s => Pin::new(s).poll_read(cx, buf)),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Tcp(s) => s.poll_write(cx, buf),
            this => each!(this, s => Pin::new(s).poll_write(cx, buf)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => Pin::new(s).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Transport::poll_flush(self.get_mut(), cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Transport::poll_shutdown(self.get_mut(), cx)
    }
}

#[cfg(test)]
pub use memory::Memory;

#[cfg(test)]
mod memory {
    use bytes::Buf as _;
    use tokio::io::DuplexStream;

    use super::*;

    /// A pipe that can be asked whether something has come, which tokio's cannot.
    #[derive(Debug)]
    pub struct Memory {
        inner: DuplexStream,
        /// Read to answer the question.
        seen: BytesMut,
        ended: bool,
    }

    impl Memory {
        pub(super) fn new(inner: DuplexStream) -> Memory {
            Memory {
                inner,
                seen: BytesMut::new(),
                ended: false,
            }
        }

        pub(super) fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            if !self.seen.is_empty() || self.ended {
                return Poll::Ready(Ok(()));
            }
            self.seen.reserve(1024);
            pin!(self.inner.read_buf(&mut self.seen))
                .poll(cx)
                .map_ok(|n| self.ended = n == 0)
        }
    }

    impl AsyncRead for Memory {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let this = self.get_mut();
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            if this.seen.is_empty() {
                return Pin::new(&mut this.inner).poll_read(cx, buf);
            }
            let n = this.seen.len().min(buf.remaining());
            buf.put_slice(&this.seen[..n]);
            this.seen.advance(n);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Memory {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write(cx, buf)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn waiting_needs_no_buffer_and_loses_no_byte() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let mut transport = Transport::from(ours);
        let mut waiting = pin!(poll_fn(|cx| transport.poll_readable(cx)));
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        peer.write_all(b"hello").await.unwrap();
        waiting.await.unwrap();
        let mut buf = stock::get();
        let n = poll_fn(|cx| transport.poll_read(cx, &mut buf))
            .await
            .unwrap();
        assert_eq!((n, &buf[..]), (5, &b"hello"[..]));
        drop(peer);
        poll_fn(|cx| transport.poll_readable(cx)).await.unwrap();
        let end = poll_fn(|cx| transport.poll_read(cx, &mut buf)).await;
        assert_eq!(end.unwrap(), 0);
    }
}
