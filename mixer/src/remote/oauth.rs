//! Tokens by OAuth 2.0 client credentials (RFC 6749 §4.4): fetched ahead of need, renewed before they expire.

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use lateen_adapter::Counter;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Notify, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;
use url::Url;
use zeroize::Zeroizing;

use super::{credentials::Material, tls};
use crate::config::remote::handler::OAuth;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// After a failure the next attempt comes, at first soon, then more seldom.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long a token is used of which its giver does not say how long it is good.
const USUAL_LIFE: Duration = Duration::from_secs(300);
/// The part of its life after which a token is renewed.
const RENEW_AT: f64 = 0.75;

/// The tokens of one connection.
pub(super) struct Tokens {
    oauth: OAuth,
    endpoint: Url,
    state: watch::Sender<State>,
    refused: Notify,
}

#[derive(Clone)]
enum State {
    Fetching,
    Have(Arc<Zeroizing<String>>, Instant),
    Failed(Arc<str>),
}

/// RFC 6749 §5.1.
#[derive(Deserialize)]
struct Answer {
    access_token: Zeroizing<String>,
    #[serde(default)]
    token_type: String,
    #[serde(default)]
    expires_in: Option<f64>,
}

/// Why there is no token.
enum FetchError {
    /// The way in which Mixer said who it is, is not understood or not accepted: 400 or 401.
    Client(String),
    Other(String),
}

impl Tokens {
    pub(super) fn new(oauth: OAuth) -> Result<Self, String> {
        let fail = |reason: &str| Err(format!("oauth.tokenUrl {}: {reason}", oauth.token_url));
        let Ok(endpoint) = Url::parse(&oauth.token_url) else {
            return fail("it is no URL");
        };
        let is_here = match endpoint.host() {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            None => return fail("it has no host"),
        };
        // RFC 6749 §3.2: the request has a password in it.
        if endpoint.scheme() != "https" && !(endpoint.scheme() == "http" && is_here) {
            return fail("only https keeps the client's secret secret");
        }
        let (state, _) = watch::channel(State::Fetching);
        Ok(Self {
            oauth,
            endpoint,
            state,
            refused: Notify::new(),
        })
    }

    /// The token in force. Waits for the first; while there is none to be had it does not.
    pub(super) async fn token(&self, deadline: Instant) -> Result<Arc<Zeroizing<String>>, String> {
        let mut states = self.state.subscribe();
        let settled = states.wait_for(|state| !matches!(state, State::Fetching));
        match timeout_at(deadline, settled).await {
            Ok(Ok(state)) => match &*state {
                State::Have(token, _) => Ok(Arc::clone(token)),
                State::Failed(reason) => Err(reason.to_string()),
                State::Fetching => Err("there is no token".to_owned()),
            },
            Ok(Err(_)) => Err("no token is fetched any more".to_owned()),
            Err(_late) => Err("there is no token yet".to_owned()),
        }
    }

    /// The token is not accepted, or the secret has changed: another is fetched.
    pub(super) fn refuse(&self) {
        self.refused.notify_one();
    }

    /// Fetches tokens without end.
    pub(super) async fn keep(
        &self,
        material: impl Fn() -> Arc<Material> + Send + Sync,
        fetched: &Counter,
        failures: &Counter,
    ) {
        let mut pause = RETRY.0;
        loop {
            let begun = Instant::now();
            let wait = match timeout(PATIENCE, self.fetch(&material())).await {
                Ok(Ok((token, life))) => {
                    fetched.inc();
                    pause = RETRY.0;
                    self.state
                        .send_replace(State::Have(Arc::new(token), begun + life));
                    life.mul_f64(RENEW_AT)
                }
                failed => {
                    failures.inc();
                    let reason = match failed {
                        Ok(Err(reason)) => reason,
                        _ => format!("no answer within {PATIENCE:?}"),
                    };
                    let reason = format!("no token from {}: {reason}", self.endpoint);
                    tracing::warn!(reason, ?pause, "a token is not fetched");
                    self.state.send_if_modified(|state| {
                        // One that is still good is used until it is not.
                        let is_good =
                            matches!(state, State::Have(_, end) if *end > Instant::now() + pause);
                        if !is_good {
                            *state = State::Failed(reason.into());
                        }
                        !is_good
                    });
                    let wait = pause;
                    pause = (pause * 2).min(RETRY.1);
                    wait
                }
            };
            // Never more often than this, whoever refuses the tokens.
            sleep(RETRY.0.min(wait)).await;
            tokio::select! {
                () = sleep(wait.saturating_sub(RETRY.0)) => {}
                () = self.refused.notified() => {}
            }
        }
    }

    /// A token, and how long it is good.
    async fn fetch(&self, material: &Material) -> Result<(Zeroizing<String>, Duration), String> {
        let secret = std::str::from_utf8(&material.secret)
            .map(str::trim)
            .unwrap_or_default();
        if secret.is_empty() {
            return Err("oauth.clientSecret: the file has no secret".to_owned());
        }
        // In the header, as every server must understand it; some want it among the parameters (§2.3.1).
        let answer = match self.ask(material, secret, true).await {
            Err(FetchError::Client(first)) => {
                self.ask(material, secret, false)
                    .await
                    .map_err(|error| match error {
                        FetchError::Client(second) if second != first => {
                            format!("{first}; and with the secret in the body: {second}")
                        }
                        FetchError::Client(reason) | FetchError::Other(reason) => reason,
                    })?
            }
            Err(FetchError::Other(reason)) => return Err(reason),
            Ok(answer) => answer,
        };
        if !answer.token_type.is_empty() && !answer.token_type.eq_ignore_ascii_case("bearer") {
            return Err(format!("the token is of type {:?}", answer.token_type));
        }
        let life = match answer.expires_in {
            Some(seconds) if seconds.is_finite() && seconds >= 1.0 => {
                Duration::from_secs_f64(seconds.min(1e9))
            }
            Some(_) => Duration::from_secs(1),
            None => USUAL_LIFE,
        };
        Ok((answer.access_token, life))
    }

    /// The parameters of a request, with the client's secret if that goes with them.
    fn form(&self, secret: Option<&str>) -> String {
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "client_credentials");
        if !self.oauth.scopes.is_empty() {
            form.append_pair("scope", &self.oauth.scopes.join(" "));
        }
        for (name, value) in &self.oauth.endpoint_params {
            form.append_pair(name, value);
        }
        if let Some(secret) = secret {
            form.append_pair("client_id", &self.oauth.client_id);
            form.append_pair("client_secret", secret);
        }
        form.finish()
    }

    async fn ask(
        &self,
        material: &Material,
        secret: &str,
        in_header: bool,
    ) -> Result<Answer, FetchError> {
        let other = |error: &dyn std::fmt::Display| FetchError::Other(error.to_string());
        let form = self.form((!in_header).then_some(secret));
        let uri: Uri = self.endpoint.as_str().parse().map_err(|e| other(&e))?;
        let host = uri.host().unwrap_or_default();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::post(path)
            .header(header::HOST, uri.authority().map_or(host, |a| a.as_str()))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        if in_header {
            let encode = |text: &str| {
                url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>()
            };
            let pair = Zeroizing::new(format!(
                "{}:{}",
                encode(&self.oauth.client_id),
                encode(secret)
            ));
            let basic = base64::prelude::BASE64_STANDARD.encode(pair.as_bytes());
            request = request.header(header::AUTHORIZATION, format!("Basic {basic}"));
        }
        let request = request
            .body(Full::new(Bytes::from(form)))
            .map_err(|e| other(&e))?;

        let port = self.endpoint.port_or_known_default().unwrap_or(443);
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((bare, port))
            .await
            .map_err(|e| other(&e))?;
        let (status, body) = if self.endpoint.scheme() == "https" {
            let settings = tls::https(material, bare).map_err(FetchError::Other)?;
            let connector = TlsConnector::from(settings.config);
            let stream = connector
                .connect(settings.name, stream)
                .await
                .map_err(|e| other(&e))?;
            send(stream, request).await
        } else {
            send(stream, request).await
        }
        .map_err(FetchError::Other)?;
        match status {
            StatusCode::OK => serde_json::from_slice(&body)
                .map_err(|error| FetchError::Other(format!("the answer is no token: {error}"))),
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => {
                Err(FetchError::Client(format!("{status}: {}", problem(&body))))
            }
            status => Err(FetchError::Other(format!("{status}: {}", problem(&body)))),
        }
    }
}

/// RFC 6749 §5.2: `error`, which is a code for programs. What else a server says may be anything.
fn problem(body: &[u8]) -> String {
    let error = serde_json::from_slice::<serde_json::Value>(body).ok();
    let error = error.as_ref().and_then(|answer| answer["error"].as_str());
    error.unwrap_or_default().chars().take(100).collect()
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let (head, body) = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?
            .into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok((head.status, body))
    };
    tokio::pin!(exchange);
    // The connection does the work; it may end before the exchange has read all of it.
    tokio::select! {
        done = &mut exchange => done,
        _ended = connection => exchange.await,
    }
}
