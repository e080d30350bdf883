//! What a request must be like to take a route.

use bytes::Bytes;
use lateen_protocols::envoy::envoy::config::route::v3 as proto;
use proto::route_match::PathSpecifier;
use regex::bytes::Regex;

use super::{
    matcher::{CookieMatch, HeaderMatch, QueryMatch, whole_regex},
    template::Template,
};
use crate::{
    config_error::ConfigError,
    head::RequestHead,
    info::TlsInfo,
    layers::Fraction,
    proto::{Chance, invalid},
    shared::Shared,
};

#[derive(Debug)]
pub(super) struct Conditions {
    pub(super) path: PathMatch,
    fold: bool,
    chance: Fraction,
    headers: Vec<HeaderMatch>,
    query: Vec<QueryMatch>,
    cookies: Vec<CookieMatch>,
    grpc: bool,
    tls_presented: Option<bool>,
    tls_validated: Option<bool>,
}

#[derive(Debug)]
pub(super) enum PathMatch {
    Prefix(Bytes),
    Exact(Bytes),
    Regex(Regex),
    Separated(Bytes),
    Template(Template),
    Connect,
}

impl Conditions {
    pub(super) fn compile(
        rules: &proto::RouteMatch,
        shared: &Shared,
    ) -> Result<Conditions, ConfigError> {
        if !rules.dynamic_metadata.is_empty() || !rules.filter_state.is_empty() {
            return Err(invalid("dynamic_metadata", "not supported"));
        }
        let path = match rules.path_specifier.as_ref() {
            Some(PathSpecifier::Prefix(prefix)) => PathMatch::Prefix(prefix.clone().into()),
            Some(PathSpecifier::Path(path)) => PathMatch::Exact(path.clone().into()),
            Some(PathSpecifier::SafeRegex(regex)) => {
                PathMatch::Regex(whole_regex("safe_regex", regex)?)
            }
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                PathMatch::Separated(prefix.clone().into())
            }
            Some(PathSpecifier::ConnectMatcher(_)) => PathMatch::Connect,
            Some(PathSpecifier::PathMatchPolicy(policy)) => PathMatch::Template(
                Template::of_extension(policy).map_err(|e| e.within("path_match_policy"))?,
            ),
            None => return Err(invalid("path_specifier", "absent")),
        };
        let tls = rules.tls_context.as_ref();
        Ok(Conditions {
            path,
            fold: rules
                .case_sensitive
                .as_ref()
                .is_some_and(|sensitive| !sensitive.value),
            chance: shared
                .layers
                .fraction(rules.runtime_fraction.as_ref(), Chance::ALWAYS),
            headers: rules
                .headers
                .iter()
                .map(HeaderMatch::compile)
                .collect::<Result<_, _>>()?,
            query: rules
                .query_parameters
                .iter()
                .map(QueryMatch::compile)
                .collect::<Result<_, _>>()?,
            cookies: rules
                .cookies
                .iter()
                .map(CookieMatch::compile)
                .collect::<Result<_, _>>()?,
            grpc: rules.grpc.is_some(),
            tls_presented: tls.and_then(|tls| tls.presented.as_ref()).map(|v| v.value),
            tls_validated: tls.and_then(|tls| tls.validated.as_ref()).map(|v| v.value),
        })
    }

    pub(super) fn hold(&self, head: &RequestHead, path: &[u8], tls: Option<&TlsInfo>) -> bool {
        self.path.matches(head, path, self.fold)
            && (!self.grpc || head.is_grpc())
            && self.headers.iter().all(|header| header.matches(head))
            && self
                .query
                .iter()
                .all(|parameter| parameter.matches(head.query()))
            && self
                .cookies
                .iter()
                .all(|cookie| cookie.matches(&head.headers))
            && self
                .tls_presented
                .is_none_or(|want| tls.is_some_and(TlsInfo::is_mutual) == want)
            && self
                .tls_validated
                .is_none_or(|want| tls.is_some_and(TlsInfo::is_mutual) == want)
            && self.chance.hits()
    }
}

/// A condition on requests as routes have them, for filters that have some of their own.
#[derive(Debug)]
pub struct RequestMatch(Conditions);

impl RequestMatch {
    /// Compiles Envoy's `RouteMatch`.
    ///
    /// # Errors
    /// When it is not valid, or asks for what is not supported.
    pub fn compile(rules: &proto::RouteMatch, shared: &Shared) -> Result<Self, ConfigError> {
        Conditions::compile(rules, shared).map(RequestMatch)
    }

    /// Whether a request is meant.
    pub fn holds(&self, head: &RequestHead, tls: Option<&TlsInfo>) -> bool {
        self.0.hold(head, head.path_only(), tls)
    }
}

impl PathMatch {
    fn matches(&self, head: &RequestHead, path: &[u8], fold: bool) -> bool {
        let same = |want: &[u8], text: &[u8]| {
            if fold {
                want.eq_ignore_ascii_case(text)
            } else {
                want == text
            }
        };
        match self {
            PathMatch::Prefix(prefix) => path.get(..prefix.len()).is_some_and(|p| same(prefix, p)),
            PathMatch::Exact(want) => same(want, path),
            PathMatch::Regex(regex) => regex.is_match(path),
            PathMatch::Separated(prefix) => {
                path.get(..prefix.len()).is_some_and(|p| same(prefix, p))
                    && matches!(path.get(prefix.len()), None | Some(b'/'))
            }
            PathMatch::Template(template) => template.matches(path),
            PathMatch::Connect => head.method.as_ref() == b"CONNECT",
        }
    }
}
