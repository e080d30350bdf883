//! Making a connection to a host: TCP or unix socket, and TLS over it.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use rustls::CertificateError;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream},
    time::Instant,
};
use tokio_rustls::client::TlsStream;

use crate::{
    cluster::{Address, Cluster, ClusterStats, Config, Host, Transport},
    info::TlsInfo,
    stats::Counter,
};

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// It took longer than the cluster's `connect_timeout`.
    #[error("connection timeout")]
    Timeout,
    /// TCP was refused or failed; the text is Envoy's "transport failure reason".
    #[error("{0}")]
    Refused(String),
    /// TLS failed.
    #[error("TLS error: {0}")]
    Tls(String),
}

/// A connection to a host.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) stream: Stream,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) tls: Option<Arc<TlsInfo>>,
    /// Bytes read from it so far.
    pub(crate) read: Arc<AtomicU64>,
}

/// Connects to `host` within the cluster's `connect_timeout`. `sni` and `alpn` replace what the host's
/// TLS context says.
pub(crate) async fn connect(
    cluster: &Cluster,
    host: &Host,
    sni: Option<&str>,
    alpn: Option<&[Vec<u8>]>,
) -> Result<Connected, ConnectError> {
    let stats = &cluster.stats;
    let began = Instant::now();
    let connecting = establish(cluster, host, sni, alpn);
    let result = match tokio::time::timeout(cluster.config.connect_timeout, connecting).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout),
    };
    match &result {
        Ok(_) => {
            let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            stats.upstream_cx_connect_ms.record(ms);
        }
        Err(error) => {
            tracing::debug!(cluster = &*cluster.name, host = %host.address, %error, "cannot connect");
            stats.upstream_cx_connect_fail.inc();
            host.state.numbers.cx_connect_fail.fetch_add(1, Relaxed);
            if *error == ConnectError::Timeout {
                stats.upstream_cx_connect_timeout.inc();
            }
        }
    }
    result
}

async fn establish(
    cluster: &Cluster,
    host: &Host,
    sni: Option<&str>,
    alpn: Option<&[Vec<u8>]>,
) -> Result<Connected, ConnectError> {
    let socket = match &host.address {
        Address::Ip(address) => tcp(&cluster.config, *address).await.map(Socket::Tcp),
        Address::Pipe(path) => UnixStream::connect(&**path).await.map(Socket::Unix),
    };
    let socket = socket.map_err(|error| {
        ConnectError::Refused(format!("delayed connect error: {}", plain(&error)))
    })?;
    let local = match &socket {
        Socket::Tcp(stream) => stream.local_addr().ok(),
        Socket::Unix(_) => None,
    };
    let (inner, tls) = match cluster.transports.get(host.transport) {
        Transport::Plain => (Layer::Plain(socket), None),
        Transport::Tls(context) => {
            let (stream, info) = context.connect(socket, sni, alpn).await.map_err(|error| {
                count_tls_failure(&cluster.stats, &error);
                ConnectError::Tls(plain(&error))
            })?;
            cluster.stats.ssl_handshake.inc();
            (Layer::Tls(Box::new(stream)), Some(Arc::new(info)))
        }
    };
    let read = Arc::new(AtomicU64::new(0));
    let stream = Stream {
        inner,
        read: read.clone(),
        rx: cluster.stats.upstream_cx_rx_bytes_total.clone(),
        tx: cluster.stats.upstream_cx_tx_bytes_total.clone(),
    };
    Ok(Connected {
        stream,
        local,
        tls,
        read,
    })
}

fn count_tls_failure(stats: &ClusterStats, error: &io::Error) {
    let cause = error
        .get_ref()
        .and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName
            | CertificateError::NotValidForNameContext { .. }
            // Our own rules about names.
            | CertificateError::Other(_),
        )) => stats.ssl_fail_verify_san.inc(),
        Some(rustls::Error::InvalidCertificate(_)) => stats.ssl_fail_verify_error.inc(),
        _ => stats.ssl_connection_error.inc(),
    }
}

async fn tcp(config: &Config, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if let Some(keepalive) = config.keepalive {
        let mut settings = socket2::TcpKeepalive::new();
        if let Some(time) = keepalive.time {
            settings = settings.with_time(time);
        }
        if let Some(interval) = keepalive.interval {
            settings = settings.with_interval(interval);
        }
        if let Some(probes) = keepalive.probes {
            settings = settings.with_retries(probes);
        }
        socket2::SockRef::from(&socket).set_tcp_keepalive(&settings)?;
    }
    if let Some(source) = config
        .bind
        .filter(|source| source.is_ipv4() == address.is_ipv4())
    {
        socket.bind(source)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The system's words without Rust's suffix, as Envoy prints them.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The socket beneath.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[derive(Debug)]
enum Layer {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Stream {
    inner: Layer,
    read: Arc<AtomicU64>,
    rx: Counter,
    tx: Counter,
}

macro_rules! each {
    ($value:expr, $variants:ident :: {$($variant:ident),+}, $stream:ident => $call:expr) => {
        match $value { $($variants::$variant($stream) => $call),+ }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self.get_mut(), Socket::{Tcp, Unix}, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), Socket::{Tcp, Unix}, s => Pin::new(s).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), Socket::{Tcp, Unix}, s => Pin::new(s).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), Socket::{Tcp, Unix}, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), Socket::{Tcp, Unix}, s => Pin::new(s).poll_shutdown(cx))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled =
            each!(&mut this.inner, Layer::{Plain, Tls}, s => Pin::new(s).poll_read(cx, buf));
        let read = buf.filled().len() - before;
        if read > 0 {
            this.rx.add(read as u64);
            this.read.fetch_add(read as u64, Relaxed);
        }
        polled
    }
}

impl Stream {
    fn wrote(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = &polled {
            self.tx.add(*written as u64);
        }
        polled
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled =
            each!(&mut this.inner, Layer::{Plain, Tls}, s => Pin::new(s).poll_write(cx, buf));
        this.wrote(polled)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = each!(&mut this.inner, Layer::{Plain, Tls}, s => Pin::new(s).poll_write_vectored(cx, bufs));
        this.wrote(polled)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().inner, Layer::{Plain, Tls}, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().inner, Layer::{Plain, Tls}, s => Pin::new(s).poll_shutdown(cx))
    }
}
