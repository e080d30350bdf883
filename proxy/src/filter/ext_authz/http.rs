//! Asking by plain HTTP: the request's own method and path (behind a prefix), some of its headers, and the
//! answer's status.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use lateen_protocols::envoy::envoy::{
    config::core::v3::http_uri::HttpUpstreamType, extensions::filters::http::ext_authz::v3 as proto,
};

use super::{
    Question,
    decision::{Allowed, Change, Decision, How, Refusal},
    patterns,
};
use crate::{
    body::Body,
    config_error::ConfigError,
    grpc::Upstream,
    head::{Headers, Known, Name, Protocol, RequestHead},
    proto::{duration, invalid},
    route::matcher::StringMatch,
    shared::Shared,
};

/// Longest body of an answer.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// The service names request headers to remove here. Envoy: `EnvoyAuthHeadersToRemove`.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";
/// What a client sees of a refusal besides what `allowed_client_headers` names.
const CLIENT_ALWAYS: [&str; 4] = [
    "www-authenticate",
    "proxy-authenticate",
    "location",
    "set-cookie",
];

#[derive(Debug)]
pub(super) struct HttpService {
    upstream: Upstream,
    path_prefix: String,
    path_override: String,
    add: Vec<(Name, Bytes)>,
    to_upstream: Vec<StringMatch>,
    to_upstream_append: Vec<StringMatch>,
    /// Empty: everything.
    to_client: Vec<StringMatch>,
    to_client_on_success: Vec<StringMatch>,
}

impl HttpService {
    /// Compiles the service, and the request headers that its own (old) list allows.
    pub(super) fn compile(
        service: &proto::HttpService,
    ) -> Result<(HttpService, Vec<StringMatch>), ConfigError> {
        if service.retry_policy.is_some() {
            return Err(invalid("retry_policy", "not supported"));
        }
        let uri = service
            .server_uri
            .as_ref()
            .ok_or_else(|| invalid("server_uri", "absent"))?;
        let Some(HttpUpstreamType::Cluster(cluster)) = uri.http_upstream_type.as_ref() else {
            return Err(invalid("server_uri", "no cluster"));
        };
        let timeout = uri
            .timeout
            .as_ref()
            .map(|limit| duration("timeout", limit))
            .transpose()?
            .unwrap_or(Duration::from_secs(1));
        for (field, path) in [
            ("path_prefix", &service.path_prefix),
            ("path_override", &service.path_override),
        ] {
            if !path.is_empty() && !path.starts_with('/') {
                return Err(invalid(field, "does not begin with /"));
            }
        }
        let request = service.authorization_request.clone().unwrap_or_default();
        let response = service.authorization_response.clone().unwrap_or_default();
        if response.dynamic_metadata_from_headers.is_some() {
            return Err(invalid("dynamic_metadata_from_headers", "not supported"));
        }
        let add = request.headers_to_add.iter().map(|header| {
            if header.value.contains('%') {
                return Err(invalid(
                    header.key.clone(),
                    "format strings are not supported",
                ));
            }
            Ok((Name::new(&header.key), Bytes::from(header.value.clone())))
        });
        let compiled = HttpService {
            upstream: Upstream::new(cluster, timeout)?,
            path_prefix: service.path_prefix.clone(),
            path_override: service.path_override.clone(),
            add: add.collect::<Result<_, _>>()?,
            to_upstream: patterns(
                "allowed_upstream_headers",
                response.allowed_upstream_headers.as_ref(),
            )?,
            to_upstream_append: patterns(
                "allowed_upstream_headers_to_append",
                response.allowed_upstream_headers_to_append.as_ref(),
            )?,
            to_client: patterns(
                "allowed_client_headers",
                response.allowed_client_headers.as_ref(),
            )?,
            to_client_on_success: patterns(
                "allowed_client_headers_on_success",
                response.allowed_client_headers_on_success.as_ref(),
            )?,
        };
        let allowed = patterns("allowed_headers", request.allowed_headers.as_ref())?;
        Ok((compiled, allowed))
    }

    pub(super) async fn ask(&self, shared: &Arc<Shared>, question: &Question<'_>) -> Decision {
        let (head, body) = self.request(question);
        let answer = self.upstream.exchange(shared, head, body).await;
        let (head, body) = match answer {
            Ok(answer) => answer,
            Err(reject) => {
                tracing::debug!(details = %reject.details, cluster = %self.upstream.cluster(), "the authorization service cannot be asked");
                return Decision::Error(None);
            }
        };
        if head.status >= 500 {
            return Decision::Error(None);
        }
        let Ok(body) = body.collect(MAX_ANSWER_BYTES).await else {
            return Decision::Error(None);
        };
        match head.status {
            200 => Decision::Allowed(self.allowed(&head.headers)),
            status => Decision::Denied(self.denied(status, &head.headers, &body)),
        }
    }

    fn request(&self, question: &Question<'_>) -> (RequestHead, Body) {
        let mut headers = Headers::with_capacity(8);
        let body = question.body.as_ref().map(|body| body.data.clone());
        let length = body.as_ref().map_or(0, Bytes::len);
        headers.append(Known::ContentLength, length.to_string());
        question.headers(|name, value| {
            if !name.starts_with(b":") && name != b"content-length" {
                headers.append(Name::new(name), value);
            }
        });
        for (name, value) in &self.add {
            headers.set(name.clone(), value);
        }
        headers.append(Name::new("x-envoy-internal"), "true");
        let path = match self.path_override.as_str() {
            "" => Bytes::from([self.path_prefix.as_bytes(), &question.head.path].concat()),
            path => Bytes::from(path.to_owned()),
        };
        let head = RequestHead {
            method: question.head.method.clone(),
            scheme: Bytes::from_static(b"http"),
            authority: question.head.authority.clone(),
            path,
            protocol: Protocol::Http11,
            headers,
        };
        (head, body.map_or_else(Body::empty, Body::full))
    }

    fn allowed(&self, headers: &Headers) -> Allowed {
        let mut allowed = Allowed::default();
        for (name, value) in headers.iter() {
            let name = name.as_bytes();
            if name == TO_REMOVE.as_bytes() {
                let names = value.split(|b| *b == b',');
                allowed.remove.extend(
                    names
                        .map(|name| String::from_utf8_lossy(name.trim_ascii()).into_owned())
                        .filter(|name| !name.is_empty()),
                );
            }
            let listed = |list: &[StringMatch]| list.iter().any(|pattern| pattern.matches(name));
            if listed(&self.to_upstream) {
                allowed.request.push(change(name, value, How::Set));
            }
            if listed(&self.to_upstream_append) {
                allowed.request.push(change(name, value, How::Add));
            }
            if listed(&self.to_client_on_success) {
                allowed.response.push(change(name, value, How::Add));
            }
        }
        allowed
    }

    fn denied(&self, status: u16, headers: &Headers, body: &[u8]) -> Refusal {
        let shown = |name: &[u8]| {
            if self.to_client.is_empty() {
                return name != b"host";
            }
            CLIENT_ALWAYS.iter().any(|always| always.as_bytes() == name)
                || self.to_client.iter().any(|pattern| pattern.matches(name))
        };
        Refusal {
            status,
            headers: headers
                .iter()
                .filter(|(name, _)| shown(name.as_bytes()))
                .map(|(name, value)| change(name.as_bytes(), value, How::Add))
                .collect(),
            body: String::from_utf8_lossy(body).into_owned(),
        }
    }
}

fn change(name: &[u8], value: &[u8], how: How) -> Change {
    Change {
        name: String::from_utf8_lossy(name).into_owned(),
        value: Bytes::copy_from_slice(value),
        how,
    }
}
