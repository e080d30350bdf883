//! The HTTP endpoint for operators: `/healthz/ready`, `/healthz/live`, `/metrics` and whatever the program
//! adds. Reads no request bodies, answers one request at a time per connection, gives slow clients up.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::shutdown::Drain;

/// Connections served at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 128;
/// Request line and headers, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Headers in one request.
const MAX_HEADERS: usize = 64;
/// A client must send its request within this time; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// A handler must answer within this time.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(10);
/// No connection is older: a client that reads too slowly is cut off here.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(300);

/// An answer of a route.
#[derive(Clone, Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// Value of `content-type`.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

impl Reply {
    /// 200 with plain text.
    pub fn text(body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }

    /// 200 with JSON text.
    pub fn json(body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "application/json",
            body: body.into(),
        }
    }

    /// Plain text with a status of its own.
    pub fn status(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            ..Self::text(body)
        }
    }
}

/// The query of a request.
#[derive(Clone, Debug, Default)]
pub struct Query(String);

impl Query {
    /// As sent, without the question mark.
    pub fn raw(&self) -> &str {
        &self.0
    }

    /// The first value of a parameter, decoded. A parameter without `=` is the empty string.
    pub fn get(&self, name: &str) -> Option<String> {
        self.pairs()
            .find_map(|(key, value)| (key == name).then_some(value))
    }

    /// Whether the parameter is there at all.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// All parameters, decoded, as sent.
    pub fn pairs(&self) -> impl Iterator<Item = (String, String)> {
        url::form_urlencoded::parse(self.0.as_bytes()).into_owned()
    }
}

type Handler = Arc<dyn Fn(Query) -> Pin<Box<dyn Future<Output = Reply> + Send>> + Send + Sync>;

/// Whether the program is ready, as a set of named gates that must all be open.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Vec<(String, Gate)>>>);

/// One condition of readiness; closed at first.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Readiness {
    /// No gates: ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a closed gate.
    pub fn gate(&self, name: impl Into<String>) -> Gate {
        let gate = Gate::default();
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gates.push((name.into(), gate.clone()));
        gate
    }

    /// Names of the gates that are closed.
    pub fn closed(&self) -> Vec<String> {
        let gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = gates.iter().filter(|(_, gate)| !gate.is_open());
        closed.map(|(name, _)| name.clone()).collect()
    }

    /// Whether all gates are open.
    pub fn is_ready(&self) -> bool {
        self.closed().is_empty()
    }
}

impl Gate {
    /// The condition holds.
    pub fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// The condition does not hold (any more).
    pub fn close(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The server, before it runs. Register metrics first, then hand the registry over.
pub struct Admin {
    routes: BTreeMap<(Method, String), Handler>,
    readiness: Readiness,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let routes: Vec<_> = self
            .routes
            .keys()
            .map(|(method, path)| format!("{method} {path}"))
            .collect();
        f.debug_struct("Admin")
            .field("routes", &routes)
            .field("readiness", &self.readiness)
            .finish()
    }
}

impl Admin {
    /// Serves health and the metrics of `registry`.
    pub fn new(registry: Registry) -> Self {
        let readiness = Readiness::new();
        let registry = Arc::new(registry);
        let ready = readiness.clone();
        Self {
            routes: BTreeMap::new(),
            readiness,
        }
        .route("/healthz/live", |_| async { Reply::text("ok\n") })
        .route("/healthz/ready", move |_| {
            let closed = ready.closed();
            async move {
                match closed.as_slice() {
                    [] => Reply::text("ok\n"),
                    waiting => Reply::status(
                        StatusCode::SERVICE_UNAVAILABLE,
                        format!("waiting for: {}\n", waiting.join(", ")),
                    ),
                }
            }
        })
        .route("/metrics", move |_| {
            let registry = Arc::clone(&registry);
            async move {
                let mut text = String::new();
                match prometheus_client::encoding::text::encode(&mut text, &registry) {
                    Ok(()) => Reply {
                        content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                        ..Reply::text(text)
                    },
                    Err(error) => {
                        Reply::status(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                    }
                }
            }
        })
    }

    /// The gates behind `/healthz/ready`.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Adds, or replaces, what GET (and HEAD) of exactly `path` answers.
    pub fn route<F, R>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        self.method(Method::GET, path, handler)
    }

    /// Adds what POST of exactly `path` does. The body is not read.
    pub fn post<F, R>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        self.method(Method::POST, path, handler)
    }

    fn method<F, R>(mut self, method: Method, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |query| Box::pin(handler(query)));
        self.routes.insert((method, path.to_owned()), handler);
        self
    }

    /// Binds `address` and serves until `drain` stops. Returns the address bound.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn serve(self, address: SocketAddr, drain: &Drain) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address).await.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot bind the admin address {address}: {error}"),
            )
        })?;
        let address = listener.local_addr()?;
        drain.spawn_until_stop(accept(listener, Arc::new(self)));
        tracing::info!(%address, "admin endpoint bound");
        Ok(address)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let head = request.method() == Method::HEAD;
        let method = if head {
            Method::GET
        } else {
            request.method().clone()
        };
        let Some(handler) = self.routes.get(&(method, path.to_owned())) else {
            return self.unknown(path);
        };
        let query = Query(request.uri().query().unwrap_or_default().to_owned());
        let reply = tokio::time::timeout(HANDLER_TIMEOUT, handler(query))
            .await
            .unwrap_or_else(|_| {
                tracing::warn!(path, "admin handler timed out");
                Reply::status(StatusCode::GATEWAY_TIMEOUT, "timed out\n")
            });
        respond(reply)
    }

    fn unknown(&self, path: &str) -> Response<Full<Bytes>> {
        let allowed: Vec<_> = self
            .routes
            .keys()
            .filter(|(_, known)| known == path)
            .map(|(method, _)| method.as_str())
            .collect();
        if allowed.is_empty() {
            return respond(Reply::status(StatusCode::NOT_FOUND, "not found\n"));
        }
        let mut response = respond(Reply::status(
            StatusCode::METHOD_NOT_ALLOWED,
            "method not allowed\n",
        ));
        if let Ok(allowed) = HeaderValue::from_str(&allowed.join(", ")) {
            response.headers_mut().insert(ALLOW, allowed);
        }
        response
    }
}

fn respond(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(reply.body));
    *response.status_mut() = reply.status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    response.headers_mut().insert(
        CACHE_CONTROL,
        HeaderValue::from_static("no-cache, max-age=0"),
    );
    response
}

async fn accept(listener: TcpListener, admin: Arc<Admin>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped together with this future, which ends all connections when stopping.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: wait for some to be freed instead of spinning.
                tracing::warn!(%error, "admin endpoint cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = Arc::clone(&admin);
        connections.spawn(async move {
            let _slot = slot;
            let service = service_fn(move |request| {
                let admin = Arc::clone(&admin);
                async move { Ok::<_, Infallible>(admin.answer(request).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_BYTES)
                .max_headers(MAX_HEADERS)
                .serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(MAX_CONNECTION_AGE, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "admin connection ended"),
                Err(_) => tracing::debug!("admin connection cut off"),
            }
        });
    }
}

#[cfg(test)]
mod tests;
