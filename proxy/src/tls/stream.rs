//! A TLS connection, in either role.

use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{net::Transport, rewind::Rewind};

/// TLS over a socket.
pub struct TlsStream(tokio_rustls::TlsStream<Rewind<Transport>>);

impl TlsStream {
    /// Ready when plain bytes, the end or an error may be there.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wants_read = match &self.0 {
            tokio_rustls::TlsStream::Client(s) => s.get_ref().1.wants_read(),
            tokio_rustls::TlsStream::Server(s) => s.get_ref().1.wants_read(),
        };
        // While there are plain bytes (or the end) to be fetched, rustls wants no more.
        if !wants_read {
            return Poll::Ready(Ok(()));
        }
        match &mut self.0 {
            tokio_rustls::TlsStream::Client(s) => s.get_mut().0.get_mut().poll_readable(cx),
            tokio_rustls::TlsStream::Server(s) => s.get_mut().0.get_mut().poll_readable(cx),
        }
    }

    /// Our address on the socket beneath.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.0.get_ref().0.get_ref().local_addr()
    }
}

impl From<tokio_rustls::server::TlsStream<Rewind<Transport>>> for TlsStream {
    fn from(stream: tokio_rustls::server::TlsStream<Rewind<Transport>>) -> TlsStream {
        TlsStream(stream.into())
    }
}

impl From<tokio_rustls::client::TlsStream<Rewind<Transport>>> for TlsStream {
    fn from(stream: tokio_rustls::client::TlsStream<Rewind<Transport>>) -> TlsStream {
        TlsStream(stream.into())
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsStream")
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
