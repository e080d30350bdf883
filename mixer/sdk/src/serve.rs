//! Serves an adapter as a process of its own, over Istio's out-of-process protocol: for each of its templates the
//! service `TEMPLATE.Handle…Service`, and `InfrastructureBackend` for handlers with sessions.
//!
//! Parameters come as JSON in the message that [`describe::PARAMS`] describes, by call (`adapter_config`) or by session. A handler is built for
//! each configuration when it is first seen and kept for the next call; at most [`MAX_HANDLERS`] of them, and the one
//! that was not used for longest goes first. Only sessions tell an adapter the types of its instances.
//!
//! What an adapter does wrong stays with the call: a panic is INTERNAL, a call that outlives its deadline is dropped.

pub mod describe;
mod handlers;
mod message;
mod wire;
#[cfg(test)]
mod tests;

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::task::TaskTracker;
use tonic::{Status, body::Body, server::Grpc};

use self::handlers::{Handlers, MAX_HANDLERS as HANDLERS};
use crate::{adapter::Adapter, codec::Raw, template::Template};

/// Handlers that are kept.
pub const MAX_HANDLERS: usize = HANDLERS;
/// Connections at a time; more wait.
const MAX_CONNECTIONS: usize = 256;
/// Streams of one connection at a time.
const MAX_STREAMS: u32 = 1024;
/// Largest request.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// For a call without `grpc-timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long calls under way may take when the process ends.
const GRACE: Duration = Duration::from_secs(5);

/// Serves `adapter` on `listener` until `stop` is ready; then calls under way get five seconds.
pub async fn serve(
    adapter: Arc<dyn Adapter>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) {
    let backend = Arc::new(Backend {
        handlers: Handlers::new(adapter),
    });
    let connections = TaskTracker::new();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stopping, stopped) = tokio::sync::watch::channel(());
    tokio::pin!(stop);
    loop {
        let place = tokio::select! {
            () = &mut stop => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else {
            break; // nobody closes it
        };
        // A connection that was accepted is returned at once, so none is lost when `stop` wins.
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, or the caller has gone already.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "the connection has gone");
            continue;
        }
        let (backend, mut stopped) = (Arc::clone(&backend), stopped.clone());
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let backend = Arc::clone(&backend);
                async move { Ok::<_, Infallible>(backend.answer(request).await) }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(MAX_STREAMS);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            // The connection is pinned outside of the select and goes on after either branch.
            let ended = tokio::select! {
                ended = &mut connection => ended,
                _gone = stopped.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke");
            }
            drop(place);
        });
    }
    drop(stopping);
    connections.close();
    if tokio::time::timeout(GRACE, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!("calls under way are given up");
    }
}

/// Serves `adapter` on `address` until the process is told to end (SIGINT, SIGTERM).
///
/// # Errors
/// The address is taken, or not this machine's; signals cannot be heard.
pub async fn serve_on(adapter: Arc<dyn Adapter>, address: SocketAddr) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let listener = TcpListener::bind(address).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(adapter = adapter.info().name, address = %listener.local_addr()?, "bound");
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serve(adapter, listener, stop).await;
    Ok(())
}

/// The full path of the method that takes instances of `template`.
pub fn path(template: &Template) -> String {
    let mut service = String::new();
    let mut starts_word = true;
    for c in template.name.chars() {
        match c {
            '_' | '-' => starts_word = true,
            c if starts_word => {
                service.extend(c.to_uppercase());
                starts_word = false;
            }
            c => service.push(c),
        }
    }
    // Istio's own templates are of several words and yet have one capital, but for these.
    let service = match service.as_str() {
        "Checknothing" => "CheckNothing",
        "Reportnothing" => "ReportNothing",
        "Listentry" => "ListEntry",
        "Logentry" => "LogEntry",
        "Tracespan" => "TraceSpan",
        "Apikey" => "ApiKey",
        other => other,
    };
    format!("/{}.Handle{service}Service/Handle{service}", template.name)
}

struct Backend {
    handlers: Handlers,
}

impl Backend {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let method = Method {
            path: request.uri().path().to_owned(),
            backend: self,
        };
        Grpc::new(Raw)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .unary(method, request)
            .await
    }
}

/// One call, whose path says what it is for.
struct Method {
    path: String,
    backend: Arc<Backend>,
}

impl tonic::server::UnaryService<bytes::Bytes> for Method {
    type Response = bytes::Bytes;
    type Future = BoxFuture<'static, Result<tonic::Response<bytes::Bytes>, Status>>;

    fn call(&mut self, request: tonic::Request<bytes::Bytes>) -> Self::Future {
        let (path, backend) = (self.path.clone(), Arc::clone(&self.backend));
        Box::pin(async move {
            let answer = backend.handlers.call(&path, request).await?;
            Ok(tonic::Response::new(answer))
        })
    }
}

/// How long the caller waits, by `grpc-timeout` (gRPC over HTTP/2, "Requests").
fn timeout(metadata: &tonic::metadata::MetadataMap) -> Duration {
    let read = || {
        let text = metadata.get("grpc-timeout")?.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
        Some(match unit {
            "H" => Duration::from_secs(n * 3600),
            "M" => Duration::from_secs(n * 60),
            "S" => Duration::from_secs(n),
            "m" => Duration::from_millis(n),
            "u" => Duration::from_micros(n),
            "n" => Duration::from_nanos(n),
            _ => return None,
        })
    };
    read()
        .unwrap_or(DEFAULT_TIMEOUT)
        .min(Duration::from_secs(60))
}
