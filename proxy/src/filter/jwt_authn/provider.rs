//! An issuer of tokens: where its tokens stand in requests, what must be true of them, and its keys.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lateen_protocols::envoy::envoy::extensions::filters::http::jwt_authn::v3 as proto;
use proto::jwt_provider::JwksSourceSpecifier;
use serde_json::{Map, Value};

use super::{
    keys::Keys,
    remote::RemoteKeys,
    status::Status,
    token::{Token, encode},
    values::{find, text_of},
};
use crate::{
    config_error::ConfigError,
    head::{Known, Name, RequestHead},
    proto::{invalid, optional_duration},
    route::{
        data_source,
        matcher::{StringMatch, cookie, joined, query_parameter},
    },
    shared::Shared,
};

/// Envoy: `kDefaultClockSkewSeconds`.
const DEFAULT_SKEW_SECONDS: u32 = 60;

#[derive(Debug)]
pub(super) struct Provider {
    pub(super) name: String,
    /// Empty: any.
    issuer: String,
    /// Empty: any.
    audiences: Vec<String>,
    subjects: Option<StringMatch>,
    require_expiration: bool,
    max_lifetime: Option<Duration>,
    skew: u64,
    places: Vec<Place>,
    keys: Source,
    /// The token goes on to the upstream.
    forward: bool,
    payload_header: Option<(Name, bool)>,
    claim_headers: Vec<(Name, Vec<String>)>,
    pub(super) payload_key: String,
    pub(super) header_key: String,
    pub(super) space_delimited: Vec<String>,
    pub(super) clear_route_cache: bool,
}

/// Where a token may stand.
#[derive(Debug)]
enum Place {
    Header { name: Name, prefix: String },
    Parameter(String),
    Cookie(String),
}

#[derive(Debug)]
enum Source {
    Local(Keys),
    Remote(Box<RemoteKeys>),
}

/// A token as it stands in a request.
#[derive(Debug)]
pub(super) struct Found {
    text: String,
    place: usize,
}

impl Provider {
    pub(super) fn compile(
        name: &str,
        config: &proto::JwtProvider,
    ) -> Result<Provider, ConfigError> {
        if !config.failed_status_in_metadata.is_empty() {
            return Err(invalid("failed_status_in_metadata", "not supported"));
        }
        let keys = match config.jwks_source_specifier.as_ref() {
            Some(JwksSourceSpecifier::LocalJwks(source)) => {
                let text = data_source(source).map_err(|error| error.within("local_jwks"))?;
                // Envoy: such keys verify nothing, and the rest of the configuration holds.
                Source::Local(Keys::parse(&text).unwrap_or_else(|error| {
                    tracing::warn!(provider = name, error, "local_jwks: every token is refused");
                    Keys::none()
                }))
            }
            Some(JwksSourceSpecifier::RemoteJwks(remote)) => {
                let remote = RemoteKeys::compile(remote);
                Source::Remote(Box::new(
                    remote.map_err(|error| error.within("remote_jwks"))?,
                ))
            }
            None => {
                return Err(invalid(
                    "local_jwks",
                    "neither this nor remote_jwks is given",
                ));
            }
        };
        let claim_headers = config.claim_to_headers.iter().map(|claim| {
            if claim.header_name.is_empty() {
                return Err(invalid("claim_to_headers", "a header or claim has no name"));
            }
            let path: Vec<String> = match claim.claim_path.as_slice() {
                [] => claim.claim_name.split('.').map(str::to_owned).collect(),
                path => path.iter().map(|segment| segment.key.clone()).collect(),
            };
            if path.iter().any(String::is_empty) {
                return Err(invalid("claim_to_headers", "a header or claim has no name"));
            }
            Ok((Name::new(&claim.header_name), path))
        });
        let normalize = config.normalize_payload_in_metadata.as_ref();
        Ok(Provider {
            name: name.to_owned(),
            issuer: config.issuer.clone(),
            audiences: config.audiences.iter().map(|a| sanitized(a)).collect(),
            subjects: config
                .subjects
                .as_ref()
                .map(|subjects| StringMatch::compile("subjects", subjects))
                .transpose()?,
            require_expiration: config.require_expiration,
            max_lifetime: optional_duration("max_lifetime", config.max_lifetime.as_ref())?,
            skew: u64::from(match config.clock_skew_seconds {
                0 => DEFAULT_SKEW_SECONDS,
                seconds => seconds,
            }),
            places: places(config)?,
            keys,
            forward: config.forward,
            payload_header: Some(config.forward_payload_header.as_str())
                .filter(|name| !name.is_empty())
                .map(|name| (Name::new(name), config.pad_forward_payload_header)),
            claim_headers: claim_headers.collect::<Result<_, _>>()?,
            payload_key: config.payload_in_metadata.clone(),
            header_key: config.header_in_metadata.clone(),
            space_delimited: normalize
                .map(|normalize| normalize.space_delimited_claims.clone())
                .unwrap_or_default(),
            clear_route_cache: config.clear_route_cache,
        })
    }

    /// Takes away headers that only this filter may set.
    pub(super) fn sanitize(&self, head: &mut RequestHead) {
        if let Some((name, _)) = &self.payload_header {
            head.headers.remove(name);
        }
        for (name, _) in &self.claim_headers {
            head.headers.remove(name);
        }
    }

    /// The tokens of a request, in the order of the places.
    pub(super) fn tokens(&self, head: &RequestHead) -> Vec<Found> {
        let mut found = Vec::new();
        for (place, at) in self.places.iter().enumerate() {
            let text = match at {
                Place::Header { name, prefix } => joined(&head.headers, name).and_then(|value| {
                    let value = String::from_utf8_lossy(&value).into_owned();
                    let (_, rest) = value.split_once(prefix.as_str())?;
                    Some(rest.trim().to_owned())
                }),
                Place::Parameter(name) => head
                    .query()
                    .and_then(|query| query_parameter(query, name.as_bytes()))
                    .map(|value| String::from_utf8_lossy(value).into_owned()),
                Place::Cookie(name) => cookie(&head.headers, name)
                    .map(|value| String::from_utf8_lossy(value).into_owned()),
            };
            if let Some(text) = text.filter(|text| !text.is_empty()) {
                found.push(Found { text, place });
            }
        }
        found
    }

    /// Whether the token says that it is of this issuer; nothing of it was verified.
    pub(super) fn claims_to_be_of(&self, found: &Found) -> bool {
        Token::parse(&found.text).is_ok_and(|token| self.is_issuer(&token))
    }

    fn is_issuer(&self, token: &Token) -> bool {
        self.issuer.is_empty() || token.iss == self.issuer
    }

    /// Verifies a token of the request.
    pub(super) async fn verify(
        &self,
        shared: &Arc<Shared>,
        found: &Found,
        audiences: Option<&[String]>,
        wall: SystemTime,
    ) -> Result<Token, Status> {
        let token = Token::parse(&found.text)?;
        if !self.is_issuer(&token) {
            return Err(Status::UnknownIssuer);
        }
        if let Some(subjects) = &self.subjects
            && !subjects.matches(token.sub.as_bytes())
        {
            return Err(Status::SubjectNotAllowed);
        }
        let now = wall
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        token.check_time(now, self.skew)?;
        if self.require_expiration && token.exp == 0 {
            return Err(Status::NoExpiration);
        }
        if let Some(limit) = self.max_lifetime {
            let begin = if token.iat == 0 { token.nbf } else { token.iat };
            let begin = if begin == 0 { now } else { begin };
            if token.exp == 0 || token.exp.saturating_sub(begin) > limit.as_secs() {
                return Err(Status::LivesTooLong);
            }
        }
        let wanted = audiences.unwrap_or(&self.audiences);
        let meant = |audience: &String| wanted.contains(&sanitized(audience));
        if !wanted.is_empty() && !token.audiences.iter().any(meant) {
            return Err(Status::AudienceNotAllowed);
        }
        match &self.keys {
            Source::Local(keys) => keys.verify(&token)?,
            Source::Remote(remote) => remote.keys(shared).await?.verify(&token)?,
        }
        Ok(token)
    }

    /// Changes the request whose token was verified.
    pub(super) fn accept(&self, head: &mut RequestHead, found: &Found, token: &Token) {
        if let Some((name, pad)) = &self.payload_header {
            let value = match pad {
                false => token.payload_text.clone(),
                true => encode(
                    &super::token::decode(&token.payload_text).unwrap_or_default(),
                    true,
                ),
            };
            head.headers.append(name.clone(), value);
        }
        for (name, path) in &self.claim_headers {
            if let Some(text) = find(&token.payload, path).and_then(text_of) {
                head.headers.append(name.clone(), text);
            }
        }
        if self.forward {
            return;
        }
        match self.places.get(found.place) {
            Some(Place::Header { name, .. }) => {
                head.headers.remove(name);
            }
            Some(Place::Parameter(name)) => remove_parameter(head, name),
            // Cookies stay, as with Envoy: they are the application's as well.
            Some(Place::Cookie(_)) | None => {}
        }
    }

    /// The payload for metadata.
    pub(super) fn payload(&self, token: &Token) -> Map<String, Value> {
        let mut payload = token.payload.clone();
        for claim in &self.space_delimited {
            if let Some(value) = payload.get_mut(claim)
                && let Some(text) = value.as_str()
            {
                *value = text.split_whitespace().map(Value::from).collect();
            }
        }
        payload
    }
}

fn places(config: &proto::JwtProvider) -> Result<Vec<Place>, ConfigError> {
    let mut places = Vec::new();
    for header in &config.from_headers {
        if header.name.is_empty() {
            return Err(invalid("from_headers", "a header has no name"));
        }
        places.push(Place::Header {
            name: Name::new(&header.name),
            prefix: header.value_prefix.clone(),
        });
    }
    places.extend(config.from_params.iter().cloned().map(Place::Parameter));
    places.extend(config.from_cookies.iter().cloned().map(Place::Cookie));
    if places.is_empty() {
        places.push(Place::Header {
            name: Known::Authorization.into(),
            prefix: "Bearer ".to_owned(),
        });
        places.push(Place::Parameter("access_token".to_owned()));
    }
    Ok(places)
}

/// An audience without what does not tell services apart. Envoy: `CheckAudience::sanitizeAudience`.
pub(super) fn sanitized(audience: &str) -> String {
    let text = audience
        .strip_prefix("http://")
        .or_else(|| audience.strip_prefix("https://"))
        .unwrap_or(audience);
    text.strip_suffix('/').unwrap_or(text).to_owned()
}

fn remove_parameter(head: &mut RequestHead, name: &str) {
    let Some(query) = head.query() else { return };
    let own = |pair: &&[u8]| {
        let key = pair.split(|b| *b == b'=').next().unwrap_or_default();
        key != name.as_bytes()
    };
    let left: Vec<&[u8]> = query.split(|b| *b == b'&').filter(own).collect();
    let mut path = head.path_only().to_vec();
    if !left.is_empty() {
        path.push(b'?');
        path.extend_from_slice(&left.join(&b'&'));
    }
    head.path = path.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audiences_are_compared_without_scheme_and_last_slash() {
        for text in ["a.example/x", "http://a.example/x", "https://a.example/x/"] {
            assert_eq!(sanitized(text), "a.example/x");
        }
    }
}
