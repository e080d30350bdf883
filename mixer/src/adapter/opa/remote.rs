//! An OPA server, asked over its REST API.

use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value as Json;
use tokio::time::Instant;

/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Connections that are kept for the next request.
const MAX_IDLE: usize = 32;

/// Where to ask.
pub(super) struct Remote {
    uri: http::Uri,
    client: Client<HttpConnector, Full<bytes::Bytes>>,
}

impl Remote {
    /// Asks for rule `path` (`PACKAGE.RULE`) at `url`.
    pub(super) fn new(url: &str, path: &str) -> Result<Self, String> {
        let wrong = || format!("serverUrl: {url:?} is not of the form http://HOST:PORT");
        let base: http::Uri = url.parse().map_err(|_| wrong())?;
        if base.scheme_str() != Some("http") || base.host().is_none() || base.query().is_some() {
            return Err(wrong());
        }
        let text = format!(
            "{}/v1/data/{}",
            url.trim_end_matches('/'),
            path.replace('.', "/")
        );
        Ok(Self {
            uri: text.parse().map_err(|_| wrong())?,
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(MAX_IDLE)
                .build_http(),
        })
    }

    /// The server's answer; `None`: undefined.
    pub(super) async fn ask(
        &self,
        input: &Json,
        deadline: Instant,
    ) -> Result<Option<Json>, String> {
        let asked = tokio::time::timeout_at(deadline, self.call(input)).await;
        asked
            .unwrap_or_else(|_| Err("does not answer".to_owned()))
            .map_err(|problem| format!("OPA at {}: {problem}", self.uri))
    }

    async fn call(&self, input: &Json) -> Result<Option<Json>, String> {
        let body = serde_json::json!({ "input": input }).to_string();
        let request = http::Request::post(self.uri.clone())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map_err(|e| e.to_string())?;
        let response = self.client.request(request).await.map_err(|e| {
            match std::error::Error::source(&e) {
                Some(cause) => format!("{e}: {cause}"),
                None => e.to_string(),
            }
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        let bytes = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
        if status != http::StatusCode::OK {
            return Err(format!("it answers {status}"));
        }
        let mut answer: Json = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        match answer.get_mut("result") {
            Some(result) => Ok(Some(result.take())),
            None => Ok(None),
        }
    }
}
