//! How a service asks another one: through the HTTP proxy if there is one, with the headers that
//! must travel along so that traces connect and routing by user works.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioExecutor;

mod through {
    //! A connector that always dials the proxy and says so, which makes the client send
    //! absolute-form request targets (RFC 9112 §3.2.2).

    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll},
    };

    use http::Uri;
    use hyper_util::{
        client::legacy::connect::{Connected, Connection},
        rt::TokioIo,
    };
    use tokio::net::TcpStream;

    #[derive(Clone, Debug)]
    pub(super) struct Connector {
        pub(super) proxy: Option<String>,
    }

    #[derive(Debug)]
    pub(super) struct Stream {
        inner: TokioIo<TcpStream>,
        proxied: bool,
    }

    impl Connection for Stream {
        fn connected(&self) -> Connected {
            Connected::new().proxy(self.proxied)
        }
    }

    impl hyper::rt::Read for Stream {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: hyper::rt::ReadBufCursor<'_>,
        ) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.inner).poll_read(cx, buf)
        }
    }

    impl hyper::rt::Write for Stream {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<std::io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }

        fn poll_shutdown(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<std::io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }

    impl tower_service::Service<Uri> for Connector {
        type Response = Stream;
        type Error = std::io::Error;
        type Future = Pin<Box<dyn Future<Output = Result<Stream, std::io::Error>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, uri: Uri) -> Self::Future {
            let proxied = self.proxy.is_some();
            let target = match &self.proxy {
                Some(proxy) => proxy.clone(),
                None => format!(
                    "{}:{}",
                    uri.host().unwrap_or_default(),
                    uri.port_u16().unwrap_or(80)
                ),
            };
            Box::pin(async move {
                let stream = TcpStream::connect(target).await?;
                stream.set_nodelay(true)?;
                Ok(Stream {
                    inner: TokioIo::new(stream),
                    proxied,
                })
            })
        }
    }
}

/// Headers copied from the incoming request to what it causes.
const FORWARDED: &[&str] = &[
    "x-request-id",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "b3",
    "x-ot-span-context",
    "traceparent",
    "tracestate",
    "end-user",
    "user-agent",
    "cookie",
    "authorization",
];

/// Largest answer that is read.
const MAX_ANSWER_BYTES: usize = 4 << 20;

#[derive(Clone, Debug)]
pub(crate) struct Client {
    inner: hyper_util::client::legacy::Client<through::Connector, Empty<Bytes>>,
}

impl Client {
    /// `proxy` is a URL such as `http://127.0.0.1:15002`.
    pub(crate) fn new(proxy: Option<&str>) -> anyhow::Result<Client> {
        let proxy = proxy
            .filter(|text| !text.is_empty())
            .map(|text| {
                let uri: Uri = text
                    .parse()
                    .with_context(|| format!("HTTP_PROXY is not a URL: {text:?}"))?;
                let host = uri.host().context("HTTP_PROXY names no host")?;
                anyhow::Ok(format!("{host}:{}", uri.port_u16().unwrap_or(80)))
            })
            .transpose()?;
        Ok(Client {
            inner: hyper_util::client::legacy::Client::builder(TokioExecutor::new())
                .build(through::Connector { proxy }),
        })
    }

    /// `GET url` with the forwarded headers of `incoming`; status and body within `timeout`.
    pub(crate) async fn get(
        &self,
        url: &str,
        incoming: &HeaderMap,
        timeout: Duration,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let mut request = Request::get(url).body(Empty::new())?;
        for name in FORWARDED {
            let name = HeaderName::from_static(name);
            if let Some(value) = incoming.get(&name) {
                request.headers_mut().insert(name, value.clone());
            }
        }
        let exchange = async {
            let response = self.inner.request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|e| anyhow::anyhow!(e))?
                .to_bytes();
            anyhow::Ok((status, body))
        };
        tokio::time::timeout(timeout, exchange)
            .await
            .with_context(|| format!("no answer from {url} within {timeout:?}"))?
    }
}
