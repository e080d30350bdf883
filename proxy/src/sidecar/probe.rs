//! Checks of the application that the kubelet has the sidecar make: as the kubelet would, but from inside of the pod.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use lateen_protocols::envoy::envoy::extensions::transport_sockets::tls::v3::UpstreamTlsContext;
use serde::Deserialize;
use tokio::net::{TcpSocket, TcpStream};

use crate::{
    cluster::health::{self, Answer},
    net::Transport,
    secret::SecretStore,
    tls::ClientContext,
};

/// Kubernetes: `timeoutSeconds` "defaults to 1 second".
const TIMEOUT: u64 = 1;
/// Most of an answer that is read before it is thrown away.
const MAX_BODY: usize = 10 * 1024;

/// Why the checks cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// They are not as the injector writes them.
    #[error("is no map of paths to checks: {0}")]
    Malformed(String),
    /// One of them.
    #[error("{path}: {reason}")]
    Check {
        /// At which path.
        path: String,
        /// What is wrong.
        reason: &'static str,
    },
}

/// One check.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocketCheck>,
    grpc: Option<Grpc>,
    timeout_seconds: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpGet {
    #[serde(default)]
    path: String,
    port: u16,
    #[serde(default)]
    scheme: String,
    #[serde(default)]
    http_headers: Vec<Header>,
}

#[derive(Clone, Debug, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Clone, Debug, Deserialize)]
struct TcpSocketCheck {
    port: u16,
}

#[derive(Clone, Debug, Deserialize)]
struct Grpc {
    port: u16,
    #[serde(default)]
    service: String,
}

/// The checks by their path at the sidecar.
pub(super) fn read(text: &str) -> Result<BTreeMap<String, Probe>, ProbeError> {
    if text.is_empty() {
        return Ok(BTreeMap::new());
    }
    let probes: BTreeMap<String, Probe> =
        serde_json::from_str(text).map_err(|error| ProbeError::Malformed(error.to_string()))?;
    for (path, probe) in &probes {
        let kinds = [
            probe.http_get.is_some(),
            probe.tcp_socket.is_some(),
            probe.grpc.is_some(),
        ];
        if kinds.iter().filter(|there| **there).count() != 1 {
            return Err(ProbeError::Check {
                path: path.clone(),
                reason: "is not one of httpGet, tcpSocket and grpc",
            });
        }
    }
    Ok(probes)
}

impl Probe {
    /// Asks the application at `pod`; gives the status to tell the kubelet.
    pub(super) async fn ask(&self, pod: IpAddr) -> StatusCode {
        let limit = Duration::from_secs(self.timeout_seconds.unwrap_or(TIMEOUT).max(1));
        match tokio::time::timeout(limit, self.ask_in_time(pod)).await {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => {
                tracing::debug!(%error, probe = ?self, "the application does not answer");
                StatusCode::INTERNAL_SERVER_ERROR
            }
            Err(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    async fn ask_in_time(&self, pod: IpAddr) -> io::Result<StatusCode> {
        if let Some(check) = &self.http_get {
            return check.ask(pod).await;
        }
        if let Some(check) = &self.tcp_socket {
            connect(pod, check.port).await?;
            return Ok(StatusCode::OK);
        }
        let Some(check) = &self.grpc else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let stream = connect(pod, check.port).await?;
        let authority = SocketAddr::new(pod, check.port).to_string();
        Ok(
            match health::grpc(&check.service, &authority, stream).await? {
                Answer::Well => StatusCode::OK,
                Answer::Degraded | Answer::Unwell | Answer::Retriable | Answer::Unreachable => {
                    StatusCode::INTERNAL_SERVER_ERROR
                }
            },
        )
    }
}

impl HttpGet {
    async fn ask(&self, pod: IpAddr) -> io::Result<StatusCode> {
        let stream = Transport::from(connect(pod, self.port).await?);
        let stream = match self.scheme.as_str() {
            // As the kubelet, which does not look at the certificate either.
            "HTTPS" => {
                let context = UpstreamTlsContext::default();
                let context = ClientContext::compile(&context, &SecretStore::new())
                    .map_err(io::Error::other)?;
                Transport::from(context.connect(stream, None, None).await?.0)
            }
            _ => stream,
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // Its errors reach whoever waits for the answer; it ends when that is dropped.
        let connection = tokio::spawn(async move { drop(connection.await) });
        let response = sender
            .send_request(self.request(pod).map_err(io::Error::other)?)
            .await
            .map_err(io::Error::other)?;
        let status = response.status();
        // An application that is cut off in the middle of its answer might complain.
        drop(Limited::new(response.into_body(), MAX_BODY).collect().await);
        connection.abort();
        Ok(status)
    }

    fn request(&self, pod: IpAddr) -> Result<http::Request<Empty<Bytes>>, http::Error> {
        let path = match self.path.as_str() {
            "" => "/".to_owned(),
            path if path.starts_with('/') => path.to_owned(),
            path => format!("/{path}"),
        };
        let mut request = http::Request::get(path).body(Empty::new())?;
        let headers = request.headers_mut();
        let host = SocketAddr::new(pod, self.port).to_string();
        headers.insert(header::HOST, HeaderValue::from_str(&host)?);
        headers.insert(
            header::USER_AGENT,
            HeaderValue::from_static("kube-probe/lateen"),
        );
        for Header { name, value } in &self.http_headers {
            let name = HeaderName::from_bytes(name.as_bytes())?;
            headers.insert(name, HeaderValue::from_str(value)?);
        }
        Ok(request)
    }
}

/// Connects to the application itself. Where the pod's traffic is redirected, what comes from this address is not.
async fn connect(pod: IpAddr, port: u16) -> io::Result<TcpStream> {
    let (socket, source) = match pod {
        IpAddr::V4(_) => (
            TcpSocket::new_v4()?,
            IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
        ),
        IpAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::V6(Ipv6Addr::from_bits(6))),
    };
    // `::6` is there only where `proxy iptables` has been.
    if let Err(error) = socket.bind(SocketAddr::new(source, 0)) {
        tracing::debug!(%error, %source, "a probe goes from any address");
    }
    socket.connect(SocketAddr::new(pod, port)).await
}
