//! An OPA server, asked over its REST API.

use http_body_util::{BodyExt as _, Full, Limited};
use lateen_adapter::Env;
use serde_json::Value as Json;
use tokio::time::Instant;

use crate::{
    config::remote::handler::{AuthHeader, Authentication},
    remote::http1::{Server, Target},
};

/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// What to ask, and whom.
pub(super) struct Question {
    uri: http::Uri,
    target: Target,
}

impl Question {
    /// Rule `path` (`PACKAGE.RULE`) at `url`, with `authentication` as written.
    pub(super) fn new(url: &str, path: &str, authentication: &Json) -> Result<Self, String> {
        let wrong = || format!("serverUrl: {url:?} is not of the form https://HOST:PORT");
        let base: http::Uri = url.parse().map_err(|_| wrong())?;
        if base.query().is_some() {
            return Err(wrong());
        }
        let mut authentication = Authentication::read(authentication)
            .map_err(|fault| format!("authentication{}: {}", fault.field, fault.reason))?;
        if let Authentication::Tls(tls) = &mut authentication
            && tls.custom_header.is_empty()
        {
            tls.auth_header = AuthHeader::Bearer; // OPA knows no other way
        }
        let text = format!(
            "{}/v1/data/{}",
            url.trim_end_matches('/'),
            path.replace('.', "/")
        );
        Ok(Self {
            uri: text.parse().map_err(|_| wrong())?,
            target: Target::new(&base, authentication)
                .map_err(|problem| format!("serverUrl: {problem}"))?,
        })
    }
}

/// Where to ask.
pub(super) struct Remote {
    uri: http::Uri,
    server: Server,
}

impl Remote {
    /// Reads the credentials.
    pub(super) fn build(question: Question, env: &Env) -> Result<Self, String> {
        let server = Server::build(&question.target, env)
            .map_err(|problem| format!("authentication: {problem}"))?;
        Ok(Self {
            uri: question.uri,
            server,
        })
    }

    /// The server's answer; `None`: undefined.
    pub(super) async fn ask(
        &self,
        input: &Json,
        deadline: Instant,
    ) -> Result<Option<Json>, String> {
        let asked = tokio::time::timeout_at(deadline, self.call(input, deadline)).await;
        asked
            .unwrap_or_else(|_| Err("does not answer".to_owned()))
            .map_err(|problem| format!("OPA at {}: {problem}", self.uri))
    }

    async fn call(&self, input: &Json, deadline: Instant) -> Result<Option<Json>, String> {
        let body = serde_json::json!({ "input": input }).to_string();
        let request = http::Request::post(self.uri.clone())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map_err(|e| e.to_string())?;
        let response = self.server.send(request, deadline).await?;
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
