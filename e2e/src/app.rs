//! Applications that tests put behind a sidecar, inside the test's own process.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// A running application; ends when dropped.
#[derive(Debug)]
pub struct App {
    /// Where it listens.
    pub address: SocketAddr,
    /// Requests (or connections) it has seen.
    pub seen: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl App {
    /// Number of requests or connections so far.
    pub fn count(&self) -> u64 {
        self.seen.load(Ordering::SeqCst)
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves HTTP/1.1 and HTTP/2 with `answer`, which gets the request's number from 0.
///
/// # Errors
/// The address is taken.
pub async fn serve<F, R>(address: SocketAddr, answer: F) -> std::io::Result<App>
where
    F: Fn(u64, Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let seen = Arc::new(AtomicU64::new(0));
    let answer = Arc::new(answer);
    let counter = seen.clone();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answer, counter) = (answer.clone(), counter.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let number = counter.fetch_add(1, Ordering::SeqCst);
                    let response = answer(number, request);
                    async move { Ok::<_, Infallible>(response.await) }
                });
                drop(
                    auto::Builder::new(TokioExecutor::new())
                        .serve_connection_with_upgrades(TokioIo::new(stream), service)
                        .await,
                );
            });
        }
    });
    Ok(App {
        address,
        seen,
        task,
    })
}

/// Like httpbin: `/status/N`, `/delay/SECONDS`, `/headers`, anything else echoes the request as JSON.
///
/// # Errors
/// The address is taken.
pub async fn httpbin(address: SocketAddr, version: &'static str) -> std::io::Result<App> {
    serve(address, move |_, request| async move {
        let (head, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map(|b| b.to_bytes())
            .unwrap_or_default();
        let path = head.uri.path();
        if let Some(code) = path.strip_prefix("/status/").and_then(|c| c.parse().ok()) {
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() =
                http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::BAD_REQUEST);
            return response;
        }
        if let Some(seconds) = path
            .strip_prefix("/delay/")
            .and_then(|s| s.parse::<f64>().ok())
        {
            tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.0, 10.0))).await;
        }
        let headers: serde_json::Map<_, _> = head
            .headers
            .iter()
            .map(|(name, value)| {
                (
                    name.to_string(),
                    json!(String::from_utf8_lossy(value.as_bytes())),
                )
            })
            .collect();
        let echo = json!({
            "method": head.method.as_str(),
            "url": head.uri.to_string(),
            "headers": headers,
            "data": String::from_utf8_lossy(&body),
            "version": version,
        });
        Response::builder()
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(echo.to_string())))
            .unwrap_or_default()
    })
    .await
}

/// Accepts WebSocket and answers every byte with itself, whatever frame it belongs to.
///
/// # Errors
/// The address is taken.
pub async fn websocket_echo(address: SocketAddr) -> std::io::Result<App> {
    const ACCEPTED: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    connections(address, |mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        stream.write_all(ACCEPTED).await?;
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.map(drop)
    })
    .await
}

/// Answers each chunk of bytes with `prefix`, a space and the same bytes.
///
/// # Errors
/// The address is taken.
pub async fn tcp_echo(address: SocketAddr, prefix: &'static str) -> std::io::Result<App> {
    connections(address, move |mut stream| async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let read = stream.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            let mut answer = format!("{prefix} ").into_bytes();
            answer.extend_from_slice(&buffer[..read]);
            stream.write_all(&answer).await?;
        }
    })
    .await
}

/// Serves each connection with `each`; one that fails is over.
async fn connections<F, R>(address: SocketAddr, each: F) -> std::io::Result<App>
where
    F: Fn(TcpStream) -> R + Send + Sync + 'static,
    R: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let seen = Arc::new(AtomicU64::new(0));
    let counter = seen.clone();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(each(stream));
        }
    });
    Ok(App {
        address,
        seen,
        task,
    })
}
