//! Webhooks that an API server calls: `/inject` (a sidecar for each pod that is made) and `/validate` (objects that are
//! wrong are not let in).
//!
//! listener (TLS by [`certificate`], limits) → [`admission`] (the review, and its answer) → `inject` or `validate`. Both
//! judge by libraries that the command line has too (`lateen inject`, `lateen validate`); neither asks anybody else, so
//! an answer depends on the request alone.

pub mod admission;
pub mod certificate;
pub(crate) mod file;
mod inject;
mod metrics;
mod validate;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Body as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use lateen_inject::Settings;
use lateen_service::prometheus_client::registry::Registry;
use lateen_service::shutdown::Drain;
use lateen_service::tls;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::admission::Review;
use self::certificate::Certificate;
use self::metrics::Metrics;

/// Largest review. An API server takes objects of 3 MiB, and a review may hold one twice.
const BODY_LIMIT: usize = 8 * 1024 * 1024;
/// Reviews that are judged at once; others wait, within their [`PATIENCE`].
const REVIEWS: usize = 32;
/// What all reviews that are being read may hold, in KiB; others wait. By size, not by number: else a few that come
/// slowly would keep all others out.
const READING_KIB: usize = 64 * 1024;
/// A review must have come whole, and been answered, within this time: an API server's own default is 10 s.
const PATIENCE: Duration = Duration::from_secs(10);
/// Told to stop, it goes on for so long: until then API servers may not have heard of it, and they ask only once.
const LINGER: Duration = Duration::from_secs(3);
/// Head of a request, in bytes.
const HEAD_LIMIT: usize = 16 * 1024;
/// Requests at once on one connection.
const STREAMS: u32 = 100;
/// Pings on an idle connection.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Flags.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct WebhookArgs {
    /// Serve the webhooks `/inject` and `/validate`, with a certificate from Auth or from files.
    #[arg(long)]
    pub webhooks: bool,
    /// Where they are served, over TLS.
    #[arg(long, value_name = "PORT", default_value_t = 15017)]
    pub webhook_port: u16,
    /// PEM file with the certificate for the webhooks and those that lead to its root, read again when it changes.
    /// Without it Auth's certificate of this program is used, which must have the Service's DNS name.
    #[arg(long, value_name = "FILE", requires_all = ["webhook_key", "webhook_roots"])]
    pub webhook_certificate: Option<PathBuf>,
    /// PEM file with its key.
    #[arg(long, value_name = "FILE", requires = "webhook_certificate")]
    pub webhook_key: Option<PathBuf>,
    /// PEM file with the root certificates that API servers shall check it by.
    #[arg(long, value_name = "FILE", requires = "webhook_certificate")]
    pub webhook_roots: Option<PathBuf>,
    /// YAML file with what all sidecars have in common, as of `lateen inject --values`; read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub inject_values: Option<PathBuf>,
    /// A template for sidecars, as of `lateen inject --template`; read again when it changes.
    #[arg(long, value_name = "NAME=FILE", value_parser = template)]
    pub inject_template: Vec<(String, PathBuf)>,
}

fn template(text: &str) -> Result<(String, PathBuf), String> {
    let named = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, file) = named.ok_or_else(|| format!("{text:?} is not NAME=FILE"))?;
    Ok((name.to_owned(), file.into()))
}

/// Why the webhooks cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// No certificate to be had.
    #[error(
        "--webhooks needs a certificate: from Auth (--auth-address), or by --webhook-certificate, --webhook-key and --webhook-roots"
    )]
    NoCertificate,
    /// Files that cannot be read or make no sense.
    #[error(transparent)]
    File(#[from] file::FileError),
}

/// What is served from.
#[derive(Debug)]
struct Webhooks {
    settings: watch::Receiver<Arc<Settings>>,
    metrics: Metrics,
    reading: Semaphore,
    judging: Semaphore,
}

/// What all sidecars of this installation have in common, as the files say it now.
///
/// # Errors
/// A file cannot be read, or makes no sense.
pub fn settings(
    args: &WebhookArgs,
    drain: &Drain,
) -> Result<watch::Receiver<Arc<Settings>>, WebhookError> {
    let mut files: Vec<PathBuf> = args.inject_values.iter().cloned().collect();
    let names: Vec<String> = args
        .inject_template
        .iter()
        .map(|one| one.0.clone())
        .collect();
    files.extend(args.inject_template.iter().map(|one| one.1.clone()));
    let has_values = args.inject_values.is_some();
    let read = move |texts: &[String]| inject::settings(texts, has_values, &names);
    Ok(file::follow(files, read, drain)?)
}

/// Serves on a listener that is bound, until a little after the drain stops; requests under way are finished.
pub fn serve(
    listener: TcpListener,
    certificate: &Certificate,
    settings: watch::Receiver<Arc<Settings>>,
    registry: &mut Registry,
    drain: &Drain,
) {
    let webhooks = Arc::new(Webhooks {
        settings,
        metrics: Metrics::new(registry),
        reading: Semaphore::new(READING_KIB),
        judging: Semaphore::new(REVIEWS),
    });
    let incoming = tls::serve(listener, certificate.server_config());
    let (asked, stopping, tasks) = (drain.stopping(), CancellationToken::new(), drain.clone());
    let stop = stopping.clone();
    drain.spawn(async move {
        asked.await;
        sleep(LINGER).await;
        stop.cancel();
    });
    drain.spawn(async move {
        let mut incoming = pin!(incoming);
        loop {
            // Both are cancel-safe: a connection that is not taken stays in the stream.
            let next = tokio::select! {
                () = stopping.cancelled() => return,
                next = incoming.next() => next,
            };
            match next {
                None => return,
                Some(Err(error)) => warn!(%error, "webhooks: a connection failed"),
                Some(Ok(connection)) => {
                    let (webhooks, stopping) = (webhooks.clone(), stopping.clone());
                    tasks.spawn(async move { webhooks.connection(connection, &stopping).await });
                }
            }
        }
    });
}

impl Webhooks {
    async fn connection(self: Arc<Self>, connection: tls::Conn, stopping: &CancellationToken) {
        let service = service_fn(move |request| {
            let webhooks = self.clone();
            async move { Ok::<_, Infallible>(webhooks.answer(request).await) }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(KEEPALIVE)
            .max_buf_size(HEAD_LIMIT);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(PATIENCE)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(u32::try_from(HEAD_LIMIT).unwrap_or(u32::MAX));
        let mut served = pin!(builder.serve_connection(TokioIo::new(connection), service));
        // The connection's future is polled on after the signal, so nothing under way is lost.
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = stopping.cancelled() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = ended {
            debug!(%error, "webhooks: a connection ended");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let judge: fn(&Review, &Settings, &Metrics) -> admission::Answer =
            match request.uri().path() {
                "/inject" => |review, settings, metrics| inject::answer(review, settings, metrics),
                "/validate" => |review, _, metrics| validate::answer(review, metrics),
                _ => return said(StatusCode::NOT_FOUND, "there are /inject and /validate\n"),
            };
        if request.method() != Method::POST {
            return said(
                StatusCode::METHOD_NOT_ALLOWED,
                "an AdmissionReview is sent by POST\n",
            );
        }
        let json = request.headers().get(header::CONTENT_TYPE);
        let json = json.and_then(|kind| kind.to_str().ok());
        if json.is_none_or(|kind| kind.split(';').next() != Some("application/json")) {
            return said(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "an AdmissionReview is application/json\n",
            );
        }
        match timeout(PATIENCE, self.judged(request, judge)).await {
            Ok(response) => response,
            Err(_) => {
                warn!(
                    seconds = PATIENCE.as_secs(),
                    "webhooks: a review took too long"
                );
                said(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "the review took too long\n",
                )
            }
        }
    }

    async fn judged(
        &self,
        request: Request<Incoming>,
        judge: fn(&Review, &Settings, &Metrics) -> admission::Answer,
    ) -> Response<Full<Bytes>> {
        let stopping = || said(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
        let Some(size) = request.body().size_hint().exact() else {
            return said(
                StatusCode::LENGTH_REQUIRED,
                "a review says how long it is\n",
            );
        };
        if size > BODY_LIMIT as u64 {
            let text = format!("a review has at most {BODY_LIMIT} bytes\n");
            return said(StatusCode::PAYLOAD_TOO_LARGE, &text);
        }
        let share = u32::try_from(size / 1024 + 1).unwrap_or(u32::MAX);
        let Ok(_share) = self.reading.acquire_many(share).await else {
            return stopping();
        };
        // No more than it has said comes, by the protocols' own rules.
        let body = match request.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                debug!(%error, "webhooks: a review did not come whole");
                return said(StatusCode::BAD_REQUEST, "the review did not come whole\n");
            }
        };
        let Ok(_turn) = self.judging.acquire().await else {
            return stopping();
        };
        let (settings, metrics) = (self.settings.borrow().clone(), self.metrics.clone());
        // A large object is milliseconds of work, which the runtime's threads have no time for.
        let work = move || match Review::parse(&body) {
            Ok(review) => {
                let answer = judge(&review, &settings, &metrics);
                (StatusCode::OK, answer.to_json(&review))
            }
            Err(reason) => (StatusCode::BAD_REQUEST, format!("{reason}\n")),
        };
        match tokio::task::spawn_blocking(work).await {
            Ok((StatusCode::OK, json)) => {
                let mut response = Response::new(Full::new(Bytes::from(json)));
                let kind = header::HeaderValue::from_static("application/json");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Ok((status, text)) => said(status, &text),
            Err(error) => {
                warn!(%error, "webhooks: a review could not be judged");
                said(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the review could not be judged\n",
                )
            }
        }
    }
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
}

/// Binds, with what is needed, and serves.
///
/// # Errors
/// There is no certificate, or a file makes no sense.
pub fn start(
    bound: (SocketAddr, TcpListener),
    certificate: &Certificate,
    args: &WebhookArgs,
    registry: &mut Registry,
    drain: &Drain,
) -> Result<watch::Receiver<Arc<Settings>>, WebhookError> {
    let settings = settings(args, drain)?;
    serve(bound.1, certificate, settings.clone(), registry, drain);
    info!(address = %bound.0, "webhooks served");
    Ok(settings)
}
