//! A small HTTP client for tests and health checks.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri, Version};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};

/// Largest body that is read.
const MAX_BODY_BYTES: usize = 64 << 20;

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Response {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is not JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("not JSON ({}): {:.200}", self.status, self.text()))
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Keeps connections; clones share them.
#[derive(Clone, Debug)]
pub struct Client {
    inner: legacy::Client<HttpConnector, Full<Bytes>>,
    timeout: Duration,
}

impl Default for Client {
    fn default() -> Client {
        Client::new()
    }
}

impl Client {
    /// HTTP/1.1 with keep-alive; requests fail after 15 s.
    pub fn new() -> Client {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Client {
            inner: legacy::Client::builder(TokioExecutor::new()).build(connector),
            timeout: Duration::from_secs(15),
        }
    }

    /// HTTP/2 with prior knowledge.
    pub fn http2() -> Client {
        Client {
            inner: legacy::Client::builder(TokioExecutor::new())
                .http2_only(true)
                .build(HttpConnector::new()),
            timeout: Duration::from_secs(15),
        }
    }

    /// Another time limit.
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self
    }

    /// `GET`.
    ///
    /// # Errors
    /// No complete answer within the time limit.
    pub async fn get(&self, url: &str) -> anyhow::Result<Response> {
        self.send(Method::GET, url, &[], Bytes::new()).await
    }

    /// `GET` with headers; `host` replaces the one of the URL.
    ///
    /// # Errors
    /// No complete answer within the time limit.
    pub async fn get_with(&self, url: &str, headers: &[(&str, &str)]) -> anyhow::Result<Response> {
        self.send(Method::GET, url, headers, Bytes::new()).await
    }

    /// Any request.
    ///
    /// # Errors
    /// No complete answer within the time limit.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<Response> {
        let uri: Uri = url.parse().with_context(|| format!("not a URL: {url}"))?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .version(Version::HTTP_11);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body))?;
        let exchange = async {
            let response = self.inner.request(request).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_BODY_BYTES)
                .collect()
                .await
                .map_err(|e| anyhow::anyhow!(e))?
                .to_bytes();
            anyhow::Ok(Response {
                status: head.status.as_u16(),
                headers: head.headers,
                body,
            })
        };
        tokio::time::timeout(self.timeout, exchange)
            .await
            .with_context(|| format!("no answer from {url} within {:?}", self.timeout))?
            .with_context(|| format!("request to {url} failed"))
    }
}
