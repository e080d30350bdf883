//! What the kubelet and Prometheus ask of a sidecar: whether it is ready, how the application is, and its statistics.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use super::{ADMIN_PORT, probe::Probe};
use crate::{admin, control::Control};

/// Readiness alone, for load balancers and the kubelet.
const READY_PORT: u16 = 15021;
/// Statistics alone.
const PROMETHEUS_PORT: u16 = 15090;
/// Connections at once on each port; the next wait.
const MAX_CONNECTIONS: usize = 64;
/// A head must be there by then.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of a head.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// A connection ends after this.
const MAX_AGE: Duration = Duration::from_secs(60);
/// `proxy wait` looks again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub struct Status {
    port: u16,
    pod: IpAddr,
    probes: BTreeMap<String, Probe>,
}

impl Status {
    pub(super) fn new(port: u16, pod: IpAddr, probes: BTreeMap<String, Probe>) -> Status {
        Status { port, pod, probes }
    }

    /// Binds the ports, all of the pod's addresses; the future serves until it is dropped.
    ///
    /// # Errors
    /// A port is taken.
    pub async fn bind(
        self,
        control: Arc<Control>,
    ) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        let mut ports = vec![READY_PORT, PROMETHEUS_PORT];
        // 0 says that there is none.
        ports.extend(Some(self.port).filter(|port| *port != 0));
        let mut listeners = Vec::new();
        for port in ports {
            listeners.push(bind(port).await?);
        }
        let this = Arc::new(self);
        Ok(async move {
            let mut serving = JoinSet::new();
            for listener in listeners {
                serving.spawn(serve(listener, this.clone(), control.clone()));
            }
            while serving.join_next().await.is_some() {}
        })
    }

    async fn answer(
        &self,
        request: &Request<Incoming>,
        control: &Control,
    ) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
        }
        if let Some(probe) = self.probes.get(path) {
            let status = probe.ask(self.pod).await;
            return text(status, "");
        }
        match path {
            "/healthz/ready" => match admin::state(control) {
                "LIVE" => text(StatusCode::OK, ""),
                state => text(StatusCode::SERVICE_UNAVAILABLE, state),
            },
            "/stats/prometheus" | "/metrics" => statistics().await.unwrap_or_else(|error| {
                tracing::debug!(%error, "the admin interface does not answer");
                text(StatusCode::SERVICE_UNAVAILABLE, "no statistics\n")
            }),
            _ => text(StatusCode::NOT_FOUND, "there is no such page\n"),
        }
    }
}

/// One socket for both families where there are both.
async fn bind(port: u16) -> io::Result<TcpListener> {
    let any = |ip: IpAddr| TcpListener::bind(SocketAddr::new(ip, port));
    match any(Ipv6Addr::UNSPECIFIED.into()).await {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        // IPv6 is switched off.
        Err(_) => any(Ipv4Addr::UNSPECIFIED.into()).await,
    }
}

async fn serve(listener: TcpListener, status: Arc<Status>, control: Arc<Control>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: wait for some to be freed instead of spinning.
                tracing::warn!(%error, "the status port cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (status, control) = (status.clone(), control.clone());
        connections.spawn(async move {
            let _slot = slot;
            let service = service_fn(move |request| {
                let (status, control) = (status.clone(), control.clone());
                async move { Ok::<_, Infallible>(status.answer(&request, &control).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_BYTES)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever asks again connects again.
            drop(tokio::time::timeout(MAX_AGE, connection).await);
        });
    }
}

/// What the admin interface says, which only this pod may ask.
async fn statistics() -> io::Result<Response<Full<Bytes>>> {
    let (status, body) = get(ADMIN_PORT, "/stats/prometheus").await?;
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    Ok(response)
}

async fn get(port: u16, path: &str) -> io::Result<(StatusCode, Bytes)> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let connection = tokio::spawn(async move { drop(connection.await) });
    let request = Request::get(path)
        .header(http::header::HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let response = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(io::Error::other)?;
    connection.abort();
    Ok((status, body.to_bytes()))
}

/// `proxy wait`: returns when the sidecar of this pod is ready; whether it was within `limit`.
pub async fn wait_until_ready(limit: Duration) -> bool {
    let ready = async {
        while !matches!(
            get(READY_PORT, "/healthz/ready").await,
            Ok((StatusCode::OK, _))
        ) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::time::timeout(limit, ready).await.is_ok()
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    response
}
