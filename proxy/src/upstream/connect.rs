//! Making a connection to a host: TCP or unix socket, and TLS over it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use rustls::CertificateError;
use tokio::{
    net::{TcpSocket, TcpStream, UnixStream},
    time::Instant,
};

use crate::{
    cluster::{Address, Cluster, ClusterStats, Config, Host, Transport as Protection},
    info::{OriginalSrc, TlsInfo},
    net::Transport,
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
    /// Its bytes are the user's to count.
    pub(crate) transport: Transport,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) tls: Option<Arc<TlsInfo>>,
}

/// Connects to `host` within the cluster's `connect_timeout`. `sni` and `alpn` replace what the host's
/// TLS context says; `source` is where the connection is to come from.
pub(crate) async fn connect(
    cluster: &Cluster,
    host: &Host,
    sni: Option<&str>,
    alpn: Option<&[Vec<u8>]>,
    source: Option<OriginalSrc>,
) -> Result<Connected, ConnectError> {
    let stats = &cluster.stats;
    let began = Instant::now();
    let connecting = establish(cluster, host, sni, alpn, source);
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
    source: Option<OriginalSrc>,
) -> Result<Connected, ConnectError> {
    let socket = match &host.address {
        Address::Ip(address) => tcp(&cluster.config, *address, source)
            .await
            .map(Transport::from),
        Address::Pipe(path) => UnixStream::connect(&**path).await.map(Transport::Unix),
    };
    let socket = socket.map_err(|error| {
        ConnectError::Refused(format!("delayed connect error: {}", plain(&error)))
    })?;
    let local = socket.local_addr();
    let (transport, tls) = match cluster.transports.get(host.transport) {
        Protection::Plain => (socket, None),
        Protection::Tls(context) => {
            let (stream, info) = context.connect(socket, sni, alpn).await.map_err(|error| {
                count_tls_failure(&cluster.stats, &error);
                ConnectError::Tls(plain(&error))
            })?;
            cluster.stats.ssl_handshake.inc();
            (stream.into(), Some(Arc::new(info)))
        }
    };
    Ok(Connected {
        transport,
        local,
        tls,
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

async fn tcp(
    config: &Config,
    address: SocketAddr,
    source: Option<OriginalSrc>,
) -> io::Result<TcpStream> {
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
    let mut sources = config.bind.iter();
    if let Some(source) = source {
        bind_to(&socket, source)?;
    } else if let Some(source) = sources.find(|source| source.is_ipv4() == address.is_ipv4()) {
        socket.bind(*source)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Makes the connection come from the downstream's address.
fn bind_to(socket: &TcpSocket, source: OriginalSrc) -> io::Result<()> {
    let options = socket2::SockRef::from(socket);
    let transparent = match source.ip {
        IpAddr::V4(_) => options.set_ip_transparent_v4(true),
        IpAddr::V6(_) => options.set_ip_transparent_v6(true),
    };
    match transparent {
        // Without the capability an address of this machine can still be bound to, and binding to others fails.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        other => other?,
    }
    if source.mark != 0 {
        options.set_mark(source.mark)?;
    }
    socket.bind(SocketAddr::new(source.ip, 0))
}

/// The system's words without Rust's suffix, as Envoy prints them.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
