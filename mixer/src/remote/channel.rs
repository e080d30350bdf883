//! The connection to an adapter: where it is dialled, with which TLS configuration, and when a new one takes its
//! place.

use std::{io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::credentials::Renew;

/// Longest wait for a connection, TCP and TLS together.
pub(super) const CONNECT: Duration = Duration::from_secs(2);
/// A connection that says nothing for so long is asked whether it lives, and given up when it does not.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// TLS as a connection begins with it.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

/// Any stream.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// The channel that calls take. Nothing is dialled before the first call.
pub(super) struct Link {
    address: Arc<str>,
    channel: ArcSwap<Channel>,
}

impl Link {
    /// To `address`, which is `HOST:PORT`.
    pub(super) fn new(address: &str, tls: Option<TlsSettings>) -> Result<Self, String> {
        Ok(Self {
            address: Arc::from(address),
            channel: ArcSwap::from_pointee(dial(address, tls)?),
        })
    }

    /// For one call.
    pub(super) fn channel(&self) -> Channel {
        Channel::clone(&self.channel.load())
    }
}

impl Renew for Link {
    /// Calls under way end on the old connection.
    fn renew(&self, tls: TlsSettings) -> Result<(), String> {
        let channel = dial(&self.address, Some(tls))?;
        self.channel.store(Arc::new(channel));
        Ok(())
    }
}

fn dial(address: &str, tls: Option<TlsSettings>) -> Result<Channel, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let origin = format!("{scheme}://{address}").parse();
    let origin = origin.map_err(|error| format!("{address:?} is no HOST:PORT: {error}"))?;
    // tonic refuses https without TLS of its own, so it dials http and only says https.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| format!("{address:?} is no HOST:PORT: {error}"))?
        .origin(origin)
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    let address: Arc<str> = Arc::from(address);
    let connect = tower::service_fn(move |_| connect(Arc::clone(&address), tls.clone()));
    Ok(endpoint.connect_with_connector_lazy(connect))
}

/// Dials `address`, which is `HOST:PORT`.
pub(super) async fn connect(
    address: Arc<str>,
    tls: Option<TlsSettings>,
) -> io::Result<TokioIo<Box<dyn Io>>> {
    let stream = TcpStream::connect(&*address).await?;
    stream.set_nodelay(true)?;
    let stream: Box<dyn Io> = match tls {
        None => Box::new(stream),
        Some(tls) => {
            let connector = TlsConnector::from(tls.config);
            Box::new(connector.connect(tls.name, stream).await?)
        }
    };
    Ok(TokioIo::new(stream))
}
