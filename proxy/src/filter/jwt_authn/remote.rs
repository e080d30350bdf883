//! Keys of an issuer that publishes them over HTTP, fetched when first needed and kept for a while.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use lateen_protocols::envoy::envoy::{
    config::core::v3::http_uri::HttpUpstreamType,
    extensions::filters::http::jwt_authn::v3::RemoteJwks,
};
use tokio::{sync::Mutex, time::Instant};
use url::Url;

use super::{keys::Keys, status::Status};
use crate::{
    body::Body,
    clock,
    config_error::ConfigError,
    grpc::Upstream,
    head::{Headers, Protocol, RequestHead},
    proto::{duration, invalid, optional_duration},
    shared::Shared,
};

/// Longest key set.
const MAX_BYTES: usize = 1 << 20;
/// Envoy: `PubkeyCacheExpirationSec`.
const DEFAULT_LIFE: Duration = Duration::from_secs(600);
/// How long a failure is remembered, so that refused requests are no load for the issuer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct RemoteKeys {
    upstream: Upstream,
    url: Url,
    life: Duration,
    /// Old keys stay in use when they cannot be fetched again. Envoy: with `async_fetch`.
    keeps: bool,
    known: ArcSwapOption<Known>,
    /// One fetches, the others wait.
    fetching: Mutex<()>,
}

#[derive(Debug)]
struct Known {
    keys: Option<Arc<Keys>>,
    until: Instant,
}

impl RemoteKeys {
    pub(super) fn compile(config: &RemoteJwks) -> Result<RemoteKeys, ConfigError> {
        if config.retry_policy.is_some() {
            return Err(invalid("retry_policy", "not supported"));
        }
        let uri = config
            .http_uri
            .as_ref()
            .ok_or_else(|| invalid("http_uri", "absent"))?;
        let Some(HttpUpstreamType::Cluster(cluster)) = uri.http_upstream_type.as_ref() else {
            return Err(invalid("http_uri", "no cluster"));
        };
        let timeout = uri
            .timeout
            .as_ref()
            .ok_or_else(|| invalid("http_uri.timeout", "absent"))?;
        let url =
            Url::parse(&uri.uri).map_err(|error| invalid("http_uri.uri", error.to_string()))?;
        Ok(RemoteKeys {
            upstream: Upstream::new(cluster, duration("http_uri.timeout", timeout)?)?,
            url,
            life: optional_duration("cache_duration", config.cache_duration.as_ref())?
                .unwrap_or(DEFAULT_LIFE),
            keeps: config.async_fetch.is_some(),
            known: ArcSwapOption::empty(),
            fetching: Mutex::const_new(()),
        })
    }

    /// The keys, fetched if there are none that are young enough.
    pub(super) async fn keys(&self, shared: &Arc<Shared>) -> Result<Arc<Keys>, Status> {
        if let Some(known) = self.fresh() {
            return known.keys.clone().ok_or(Status::FetchFails);
        }
        let _turn = self.fetching.lock().await;
        if let Some(known) = self.fresh() {
            return known.keys.clone().ok_or(Status::FetchFails);
        }
        let (keys, life) = match self.fetch(shared).await {
            Ok(keys) => (Some(Arc::new(keys)), self.life),
            Err(error) => {
                tracing::warn!(%error, url = %self.url, cluster = %self.upstream.cluster(), "keys for JWTs cannot be fetched");
                let old = self.known.load_full().and_then(|known| known.keys.clone());
                (old.filter(|_| self.keeps), RETRY_AFTER)
            }
        };
        self.known.store(Some(Arc::new(Known {
            keys: keys.clone(),
            until: clock::now() + life,
        })));
        keys.ok_or(Status::FetchFails)
    }

    fn fresh(&self) -> Option<Arc<Known>> {
        self.known
            .load_full()
            .filter(|known| clock::now() < known.until)
    }

    async fn fetch(&self, shared: &Arc<Shared>) -> Result<Keys, String> {
        let mut path = self.url.path().to_owned();
        if let Some(query) = self.url.query() {
            path.push('?');
            path.push_str(query);
        }
        let host = self.url.host_str().unwrap_or_default();
        let head = RequestHead {
            method: "GET".into(),
            scheme: self.url.scheme().to_owned().into(),
            authority: match self.url.port() {
                Some(port) => format!("{host}:{port}").into(),
                None => host.to_owned().into(),
            },
            path: path.into(),
            protocol: Protocol::Http11,
            headers: Headers::default(),
        };
        let (head, body) = self
            .upstream
            .exchange(shared, head, Body::empty())
            .await
            .map_err(|reject| reject.details.to_string())?;
        if head.status != 200 {
            return Err(format!("status {}", head.status));
        }
        let text = body.collect(MAX_BYTES).await.map_err(|e| e.to_string())?;
        Keys::parse(&text)
    }
}
