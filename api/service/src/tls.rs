//! TLS for tonic: a stream of accepted connections that carry their peer's identity, and a channel that
//! makes each new connection with the newest certificate.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use lateen_identity::pki_types::{CertificateDer, ServerName};
use lateen_identity::{SpiffeId, peer_identity};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The one protocol gRPC speaks.
pub const ALPN_H2: &[u8] = b"h2";
/// A peer that has not finished its handshake by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once. When all are taken, further connections wait in the kernel's queue; each
/// slot is free again after [`HANDSHAKE_TIMEOUT`] at the latest.
const MAX_HANDSHAKES: usize = 1024;
/// Connections open at once on one listener; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 32 * 1024;
/// Finished handshakes waiting to be taken by the server.
const ACCEPT_QUEUE: usize = 64;
/// Time to connect, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is on the other side of a connection. tonic puts it into each request's extensions:
/// `request.extensions().get::<PeerIdentity>()`, or [`peer`].
#[derive(Clone, Debug, Default)]
pub struct PeerIdentity {
    spiffe_id: Option<SpiffeId>,
    not_after: Option<SystemTime>,
    remote: Option<SocketAddr>,
    encrypted: bool,
}

impl PeerIdentity {
    /// A verified peer; for tests and for servers that accept connections themselves.
    pub fn verified(spiffe_id: SpiffeId) -> Self {
        Self {
            spiffe_id: Some(spiffe_id),
            encrypted: true,
            ..Self::default()
        }
    }

    /// The ID in the certificate verified at the handshake; `None` without a certificate.
    pub fn spiffe_id(&self) -> Option<&SpiffeId> {
        self.spiffe_id.as_ref()
    }

    /// The end of life of that certificate. A connection may outlive it.
    pub fn not_after(&self) -> Option<SystemTime> {
        self.not_after
    }

    /// Address of the peer.
    pub fn remote(&self) -> Option<SocketAddr> {
        self.remote
    }

    /// Whether the connection is TLS at all.
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    fn from_chain(chain: Option<&[CertificateDer<'_>]>, remote: Option<SocketAddr>) -> Self {
        // The verifier accepted this chain, so its leaf parses; if not, it counts as no identity.
        let spiffe_id = chain.and_then(|chain| peer_identity(chain).ok());
        let not_after = chain.and_then(<[_]>::first).and_then(|leaf| {
            let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
            let seconds = u64::try_from(leaf.validity().not_after.timestamp()).ok()?;
            Some(UNIX_EPOCH + Duration::from_secs(seconds))
        });
        Self {
            spiffe_id,
            not_after,
            remote,
            encrypted: true,
        }
    }
}

/// The peer of a tonic request.
pub fn peer<T>(request: &tonic::Request<T>) -> Option<&PeerIdentity> {
    request.extensions().get()
}

/// An accepted connection, TLS or plain, for `serve_with_incoming`.
#[derive(Debug)]
pub struct Conn {
    io: Io,
    peer: PeerIdentity,
    /// Gives the connection's place back when it ends.
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Io {
    Plain(TcpStream),
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

impl Connected for Conn {
    type ConnectInfo = PeerIdentity;

    fn connect_info(&self) -> PeerIdentity {
        self.peer.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }
}

/// Accepts TLS connections. Handshakes run beside each other, each within [`HANDSHAKE_TIMEOUT`]; one that
/// fails is logged and never ends the stream. Dropping the stream stops accepting.
pub fn serve(
    listener: TcpListener,
    config: Arc<ServerConfig>,
) -> impl Stream<Item = io::Result<Conn>> + Send + use<> {
    accept(listener, Some(TlsAcceptor::from(config)))
}

/// Accepts plain connections of the same type; their peers have no identity.
pub fn serve_plain(listener: TcpListener) -> impl Stream<Item = io::Result<Conn>> + Send + use<> {
    accept(listener, None)
}

fn accept(listener: TcpListener, tls: Option<TlsAcceptor>) -> ReceiverStream<io::Result<Conn>> {
    let (sender, receiver) = mpsc::channel(ACCEPT_QUEUE);
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut handshakes = JoinSet::new();
        loop {
            let free = async {
                let slot = Arc::clone(&slots).acquire_owned().await?;
                Ok::<_, tokio::sync::AcquireError>((
                    slot,
                    Arc::clone(&places).acquire_owned().await?,
                ))
            };
            let (slot, place) = tokio::select! {
                () = sender.closed() => return,
                free = free => match free {
                    Ok(free) => free,
                    Err(_) => return,
                },
            };
            while handshakes.try_join_next().is_some() {}
            let accepted = tokio::select! {
                // Both are cancel-safe: an unaccepted connection stays in the kernel's queue.
                () = sender.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (sender, tls) = (sender.clone(), tls.clone());
            handshakes.spawn(async move {
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(stream, remote, tls, place))
                    .await
                {
                    // The slot goes back before the connection is handed over: it counts handshakes only.
                    Ok(Ok(conn)) => {
                        drop(slot);
                        drop(sender.send(Ok(conn)).await);
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(peer = %remote, %error, "TLS handshake failed")
                    }
                    Err(_) => tracing::debug!(peer = %remote, "TLS handshake timed out"),
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn handshake(
    stream: TcpStream,
    remote: SocketAddr,
    tls: Option<TlsAcceptor>,
    place: OwnedSemaphorePermit,
) -> io::Result<Conn> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        let peer = PeerIdentity {
            remote: Some(remote),
            ..PeerIdentity::default()
        };
        return Ok(Conn {
            io: Io::Plain(stream),
            peer,
            _place: place,
        });
    };
    let stream = Box::new(tls.accept(stream).await?);
    let peer = PeerIdentity::from_chain(stream.get_ref().1.peer_certificates(), Some(remote));
    Ok(Conn {
        io: Io::Tls(stream),
        peer,
        _place: place,
    })
}

/// Why an address cannot be dialled.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not `HOST:PORT`.
    #[error("{0:?} is not HOST:PORT")]
    Form(String),
    /// The host is neither a DNS name nor an IP address.
    #[error("{0:?} has no valid host")]
    Host(String),
}

/// A channel to `address` (`HOST:PORT`) over TLS. It connects at the first call and again whenever the
/// connection is lost, each time with the certificate that is newest then.
///
/// # Errors
/// When `address` is not `HOST:PORT`.
pub fn channel(address: &str, config: Arc<ClientConfig>) -> Result<Channel, AddressError> {
    let (endpoint, name) = endpoint(address, "https")?;
    let connector = TlsConnector::from(config);
    let address: Arc<str> = Arc::from(address);
    Ok(
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
            let (address, connector, name) =
                (Arc::clone(&address), connector.clone(), name.clone());
            async move {
                let stream = TcpStream::connect(&*address).await?;
                stream.set_nodelay(true)?;
                let stream = connector.connect(name, stream).await?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        })),
    )
}

/// A channel to `address` (`HOST:PORT`) without TLS, with the same limits.
///
/// # Errors
/// When `address` is not `HOST:PORT`.
pub fn channel_plain(address: &str) -> Result<Channel, AddressError> {
    Ok(endpoint(address, "http")?.0.connect_lazy())
}

fn endpoint(address: &str, scheme: &str) -> Result<(Endpoint, ServerName<'static>), AddressError> {
    let malformed = || AddressError::Form(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(malformed)?;
    port.parse::<u16>().map_err(|_| malformed())?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| AddressError::Host(address.to_owned()))?;
    // tonic refuses https without TLS of its own, so it dials http and only says https.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| malformed())?
        .origin(
            format!("{scheme}://{address}")
                .parse()
                .map_err(|_| malformed())?,
        )
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true);
    Ok((endpoint, name))
}
