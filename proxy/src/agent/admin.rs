//! Asking Envoy, over its admin endpoint, to drain, and watching it do so.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// One admin request.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer read.
const MAX_BYTES: usize = 1 << 20;
/// How often to look.
const POLL: Duration = Duration::from_millis(250);

/// Where Envoy's admin endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Tcp(SocketAddr),
    Pipe(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Pipe(path) => path.display().fmt(f),
        }
    }
}

/// Tells Envoy to drain and waits until no connection is open, at most `limit`. An admin endpoint that does
/// not answer is no reason to wait.
pub(super) async fn drain(endpoint: &Endpoint, limit: Duration) {
    // `graceful`: clients are asked to leave (GOAWAY, connection: close) instead of being cut off.
    if let Err(error) = ask(
        endpoint,
        Method::POST,
        "/drain_listeners?graceful&skip_exit",
    )
    .await
    {
        tracing::warn!(%endpoint, %error, "Envoy's admin endpoint does not answer; not draining");
        return;
    }
    tracing::info!(?limit, "Envoy is draining");
    let emptied = async {
        loop {
            let stats = ask(endpoint, Method::GET, "/stats?filter=downstream_cx_active").await;
            if stats.is_ok_and(|stats| open_connections(&stats) == 0) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(limit, emptied).await.is_err() {
        tracing::info!("connections are still open at the end of the drain time");
    }
}

/// Sums `listener.ADDRESS.downstream_cx_active: N` without the admin listener, which we use ourselves.
fn open_connections(stats: &str) -> u64 {
    stats
        .lines()
        .filter(|line| line.starts_with("listener.") && !line.starts_with("listener.admin."))
        .filter_map(|line| {
            line.split_once(".downstream_cx_active: ")?
                .1
                .trim()
                .parse::<u64>()
                .ok()
        })
        .fold(0, u64::saturating_add)
}

async fn ask(endpoint: &Endpoint, method: Method, path: &str) -> io::Result<String> {
    let answer = async {
        match endpoint {
            Endpoint::Tcp(address) => over(TcpStream::connect(address).await?, method, path).await,
            Endpoint::Pipe(pipe) => over(UnixStream::connect(pipe).await?, method, path).await,
        }
    };
    tokio::time::timeout(TIMEOUT, answer).await?
}

async fn over<S>(stream: S, method: Method, path: &str) -> io::Result<String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "envoy")
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let answer = async move {
        let response = requests
            .send_request(request)
            .await
            .map_err(io::Error::other)?;
        if !response.status().is_success() {
            return Err(io::Error::other(format!("status {}", response.status())));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await;
        String::from_utf8(body.map_err(io::Error::other)?.to_bytes().to_vec())
            .map_err(io::Error::other)
    };
    // The connection must be driven while the answer is read; it may end first, with the answer read already.
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    let mut ended = false;
    loop {
        tokio::select! {
            answer = &mut answer => return answer,
            result = &mut connection, if !ended => {
                result.map_err(io::Error::other)?;
                ended = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_of_others_count() {
        let stats = "http.admin.downstream_cx_active: 1\nlistener.127.0.0.1_80.downstream_cx_active: 2\n\
                     listener.127.0.0.1_81.downstream_cx_active: 3\nlistener.admin.downstream_cx_active: 1\n\
                     listener.127.0.0.1_80.worker_0.downstream_cx_active: 2\nlistener.x.downstream_cx_total: 9\n";
        // Per-worker lines count twice; all that matters is zero.
        assert_eq!(open_connections(stats), 7);
        assert_eq!(
            open_connections("listener.admin.downstream_cx_active: 1\n"),
            0
        );
    }
}
