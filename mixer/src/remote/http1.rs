//! A server that is asked over HTTP/1.1 by a compiled adapter, with the credentials that adapter processes are
//! called with: TLS, mutual TLS and tokens by files, which are read again when they change.

use std::{
    fmt, io,
    sync::Arc,
    task::{Context, Poll},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri, uri::Scheme};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo},
};
use lateen_adapter::Env;
use tokio::time::{Instant, timeout};
use tower_service::Service;

use super::{
    channel::{self, CONNECT, Io, TlsSettings},
    credentials::{Credentials, Renew},
};
use crate::config::remote::handler::{Authentication, Tls};

/// Connections that are kept for the next request.
const MAX_IDLE: usize = 32;

/// Who is asked, and with which credentials. Nothing is read or dialled yet.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// `HOST:PORT`.
    address: String,
    authentication: Authentication,
}

impl Target {
    /// The server of `uri`. `https` without an `authentication` trusts the system's roots.
    ///
    /// # Errors
    /// It is neither `http://HOST…` nor `https://HOST…`, or credentials would go over the wire in the clear.
    pub(crate) fn new(uri: &Uri, authentication: Authentication) -> Result<Self, String> {
        let is_tls = uri.scheme() == Some(&Scheme::HTTPS);
        let host = uri.host().filter(|host| !host.is_empty());
        let (Some(host), true) = (host, is_tls || uri.scheme() == Some(&Scheme::HTTP)) else {
            return Err(format!("{uri} is not of the form https://HOST:PORT"));
        };
        let authentication = match authentication {
            Authentication::Plain if is_tls => Authentication::Tls(Tls::default()),
            Authentication::Tls(_) | Authentication::Mutual(_) if !is_tls => {
                return Err(format!("{uri}: authentication needs https://"));
            }
            said => said,
        };
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        Ok(Self {
            address: format!("{host}:{port}"),
            authentication,
        })
    }
}

/// The way to a server.
pub(crate) struct Server {
    link: Arc<Link>,
    credentials: Arc<Credentials>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.link.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Reads the credentials, and has them looked at from now on. The server need not run yet.
    ///
    /// # Errors
    /// A file cannot be used.
    pub(crate) fn build(target: &Target, env: &Env) -> Result<Self, String> {
        let Target {
            address,
            authentication,
        } = target;
        let (credentials, tls) = Credentials::load(address, authentication, b"http/1.1")?;
        let address: Arc<str> = Arc::from(address.as_str());
        let link = Arc::new(Link {
            client: ArcSwap::from_pointee(client(&address, tls)),
            address,
        });
        let credentials = Arc::new(credentials);
        credentials.watch(&link, env)?;
        Ok(Self { link, credentials })
    }

    /// Sends `request`, with the token if there is one. The caller minds the deadline: dropping this future gives the
    /// request up.
    ///
    /// # Errors
    /// There is no token, no connection or no answer.
    pub(crate) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Result<Response<Incoming>, String> {
        if let Some((name, value)) = self.credentials.header(deadline).await? {
            let name = HeaderName::from_bytes(name.as_str().as_bytes())
                .map_err(|error| error.to_string())?;
            let mut value = HeaderValue::from_bytes(value.as_encoded_bytes())
                .map_err(|error| error.to_string())?;
            value.set_sensitive(true);
            request.headers_mut().insert(name, value);
        }
        let client = HttpClient::clone(&self.link.client.load());
        let response = client.request(request).await.map_err(|error| {
            match std::error::Error::source(&error) {
                Some(cause) => format!("{error}: {cause}"),
                None => error.to_string(),
            }
        })?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.credentials.refuse();
        }
        Ok(response)
    }
}

type HttpClient = Client<Connector, Full<Bytes>>;

struct Link {
    address: Arc<str>,
    client: ArcSwap<HttpClient>,
}

impl Renew for Link {
    /// Requests under way end on the old connections.
    fn renew(&self, tls: TlsSettings) -> Result<(), String> {
        self.client
            .store(Arc::new(client(&self.address, Some(tls))));
        Ok(())
    }
}

fn client(address: &Arc<str>, tls: Option<TlsSettings>) -> HttpClient {
    let connector = Connector {
        address: Arc::clone(address),
        tls,
    };
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(MAX_IDLE)
        .build(connector)
}

/// Dials one address, whatever a request's URI says.
#[derive(Clone)]
struct Connector {
    address: Arc<str>,
    tls: Option<TlsSettings>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Io>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialled = channel::connect(Arc::clone(&self.address), self.tls.clone());
        // The client goes on to dial when the request that asked for it is given up.
        let bounded = timeout(CONNECT, dialled);
        bounded
            .map(|done| done.unwrap_or_else(|late| Err(late.into())))
            .boxed()
    }
}

impl Connection for Box<dyn Io> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}
