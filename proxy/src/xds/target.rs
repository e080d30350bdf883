//! Connecting to a management server: a cluster of the bootstrap, over TCP or a unix socket, plain or
//! with TLS whose secrets may be rotated meanwhile.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use envoy_types::pb::envoy::{
    config::{
        cluster::v3::Cluster,
        core::v3::{
            TransportSocket, address, socket_address::PortSpecifier, transport_socket::ConfigType,
        },
        endpoint::v3::lb_endpoint::HostIdentifier,
    },
    extensions::transport_sockets::{raw_buffer::v3::RawBuffer, tls::v3::UpstreamTlsContext},
};
use hyper_util::rt::TokioIo;
use prost::{Message, Name};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::watch,
};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{config_error::ConfigError, net::Transport, secret::SecretStore, tls::ClientContext};

/// Envoy's default for clusters.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that is gone without a word is noticed within the sum of these.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// See above.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A full push of a large mesh is megabytes in one message.
const WINDOW_BYTES: u32 = 4 << 20;

/// How to reach a management server.
#[derive(Debug)]
pub struct Target {
    name: String,
    places: Vec<Place>,
    tls: Option<Arc<ClientContext>>,
    timeout: Duration,
    next: AtomicUsize,
    secrets: watch::Receiver<u64>,
}

#[derive(Clone, Debug)]
enum Place {
    Tcp(String, u16),
    Unix(String),
}

impl Target {
    /// Reads a cluster. Its endpoints must be written in it; names are resolved at each attempt.
    ///
    /// # Errors
    /// It has no endpoint, or a transport socket that is neither TLS nor plain.
    pub fn compile(cluster: &Cluster, secrets: &SecretStore) -> Result<Target, ConfigError> {
        let within = |e: ConfigError| e.within(format_args!("cluster {}", cluster.name));
        let assignment = cluster.load_assignment.iter();
        let endpoints = assignment
            .flat_map(|a| &a.endpoints)
            .flat_map(|l| &l.lb_endpoints);
        let mut places = Vec::new();
        for endpoint in endpoints {
            let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else {
                continue;
            };
            match endpoint.address.as_ref().and_then(|a| a.address.as_ref()) {
                Some(address::Address::SocketAddress(socket)) => {
                    let port = match socket.port_specifier {
                        Some(PortSpecifier::PortValue(port)) => u16::try_from(port).ok(),
                        _ => None,
                    };
                    let port = port.ok_or_else(|| {
                        within(ConfigError::new("port_value", "must be 1 to 65535"))
                    })?;
                    places.push(Place::Tcp(socket.address.clone(), port));
                }
                Some(address::Address::Pipe(pipe)) => places.push(Place::Unix(pipe.path.clone())),
                _ => {
                    return Err(within(ConfigError::new(
                        "load_assignment",
                        "an endpoint has no address",
                    )));
                }
            }
        }
        if places.is_empty() {
            return Err(within(ConfigError::new(
                "load_assignment",
                "a management server's cluster needs endpoints in the bootstrap",
            )));
        }
        let timeout = cluster.connect_timeout.as_ref().and_then(|d| {
            Some(Duration::new(
                u64::try_from(d.seconds).ok()?,
                u32::try_from(d.nanos).ok()?,
            ))
        });
        Ok(Target {
            name: cluster.name.clone(),
            places,
            tls: tls(cluster.transport_socket.as_ref(), secrets).map_err(within)?,
            timeout: timeout
                .filter(|t| !t.is_zero())
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            next: AtomicUsize::new(0),
            secrets: secrets.changes(),
        })
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until the secrets for its TLS are there. Cancel-safe.
    pub async fn ready(&self) {
        let mut secrets = self.secrets.clone();
        while self.tls.as_ref().is_some_and(|tls| !tls.ready()) {
            if secrets.changed().await.is_err() {
                return;
            }
        }
    }

    /// Connects to the next endpoint in turn.
    ///
    /// # Errors
    /// It does not answer in time, or the handshake fails.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.places.len();
        let (place, tls) = (self.places[index].clone(), self.tls.clone());
        let timeout = self.timeout;
        let connector = tower::service_fn(move |_: Uri| {
            let (place, tls) = (place.clone(), tls.clone());
            async move {
                match tokio::time::timeout(timeout, dial(&place, tls.as_deref())).await {
                    Ok(stream) => stream.map(TokioIo::new),
                    Err(_) => Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("no connection to {place:?} within {timeout:?}"),
                    )),
                }
            }
        });
        Endpoint::from_static("http://xds")
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .connect_with_connector(connector)
            .await
    }
}

fn tls(
    socket: Option<&TransportSocket>,
    secrets: &SecretStore,
) -> Result<Option<Arc<ClientContext>>, ConfigError> {
    let within = |e: ConfigError| e.within("transport_socket");
    let Some(ConfigType::TypedConfig(any)) = socket.and_then(|s| s.config_type.as_ref()) else {
        return match socket {
            None => Ok(None),
            Some(_) => Err(within(ConfigError::new("typed_config", "must be set"))),
        };
    };
    if any.type_url == RawBuffer::type_url() {
        return Ok(None);
    }
    if any.type_url != UpstreamTlsContext::type_url() {
        return Err(within(ConfigError::new(&any.type_url, "is not supported")));
    }
    let context = UpstreamTlsContext::decode(any.value.as_slice())
        .map_err(|e| within(ConfigError::new("typed_config", e.to_string())))?;
    let context = ClientContext::compile(&context, secrets).map_err(within)?;
    Ok(Some(Arc::new(context)))
}

async fn dial(place: &Place, tls: Option<&ClientContext>) -> io::Result<Transport> {
    let plain = match place {
        Place::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Transport::from(stream)
        }
        Place::Unix(path) => UnixStream::connect(path).await?.into(),
    };
    match tls {
        None => Ok(plain),
        Some(tls) => {
            let alpn = [b"h2".to_vec()];
            let (stream, _) = tls.connect(plain, None, Some(&alpn)).await?;
            Ok(stream.into())
        }
    }
}
