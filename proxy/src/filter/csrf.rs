//! Refuses requests that change something and come from a page of another site. Envoy:
//! `envoy.filters.http.csrf`.

use std::sync::Arc;

use lateen_protocols::envoy::envoy::extensions::filters::http::csrf::v3::CsrfPolicy;

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    head::{Known, Name, RequestHead},
    info::ResponseFlags,
    layers::{Fraction, RuntimeLayers},
    proto::{Chance, invalid},
    reject::Reject,
    route::matcher::StringMatch,
    stats::{Counter, Scope},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Csrf {
    rules: CsrfRules,
    missing: Counter,
    invalid: Counter,
    valid: Counter,
}

/// A policy.
#[derive(Debug)]
pub struct CsrfRules {
    enabled: Fraction,
    shadow: Fraction,
    /// Sites besides the request's own, as `host[:port]`.
    origins: Vec<StringMatch>,
}

impl Csrf {
    /// Compiles the filter; counts in `http.PREFIX.csrf.`.
    ///
    /// # Errors
    /// See [`CsrfRules::compile`].
    pub fn compile(
        policy: &CsrfPolicy,
        scope: &Scope,
        layers: &RuntimeLayers,
    ) -> Result<Csrf, ConfigError> {
        Ok(Csrf {
            rules: CsrfRules::compile(policy, layers)?,
            missing: scope.counter("csrf.missing_source_origin"),
            invalid: scope.counter("csrf.request_invalid"),
            valid: scope.counter("csrf.request_valid"),
        })
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
    ) -> Result<(), Reject> {
        let own: Option<Arc<CsrfRules>> = match cx.config(head) {
            Some(RouteFilterConfig::Csrf(own)) => Some(own.clone()),
            _ => None,
        };
        let rules = own.as_deref().unwrap_or(&self.rules);
        let enabled = rules.enabled.hits();
        let changes = matches!(
            head.method.as_ref(),
            b"POST" | b"PUT" | b"DELETE" | b"PATCH"
        );
        if !changes || !enabled && !rules.shadow.hits() {
            return Ok(());
        }
        match source(head) {
            None => self.missing.inc(),
            Some(source) if rules.allow(source, &head.authority) => {
                self.valid.inc();
                return Ok(());
            }
            Some(_) => self.invalid.inc(),
        }
        if !enabled {
            return Ok(());
        }
        Err(Reject::new(
            403,
            "Invalid origin",
            ResponseFlags::default(),
            "csrf_origin_mismatch",
        ))
    }
}

impl CsrfRules {
    /// Compiles a policy.
    ///
    /// # Errors
    /// When `filter_enabled` is absent, or a pattern is not valid.
    pub fn compile(policy: &CsrfPolicy, layers: &RuntimeLayers) -> Result<CsrfRules, ConfigError> {
        if policy.filter_enabled.is_none() {
            return Err(invalid("filter_enabled", "absent"));
        }
        Ok(CsrfRules {
            enabled: layers.fraction(policy.filter_enabled.as_ref(), Chance::ALWAYS),
            shadow: layers.fraction(policy.shadow_enabled.as_ref(), Chance::NEVER),
            origins: policy
                .additional_origins
                .iter()
                .map(|origin| StringMatch::compile("additional_origins", origin))
                .collect::<Result<_, _>>()?,
        })
    }

    fn allow(&self, source: &[u8], target: &[u8]) -> bool {
        source == target || self.origins.iter().any(|pattern| pattern.matches(source))
    }
}

/// `host[:port]` of the page the request comes from; of `referer` if `origin` does not tell.
fn source(head: &RequestHead) -> Option<&[u8]> {
    let tells = |url: &&[u8]| !url.is_empty() && *url != b"null";
    let origin = head.headers.known(Known::Origin).map(host_and_port);
    origin.filter(tells).or_else(|| {
        let referer = head.headers.get(&Name::new("referer"))?;
        Some(host_and_port(referer)).filter(tells)
    })
}

/// The authority of a URL; what is no URL stands for itself.
fn host_and_port(url: &[u8]) -> &[u8] {
    let Some(scheme) = url.windows(3).position(|part| part == b"://") else {
        return url;
    };
    let rest = &url[scheme + 3..];
    let end = rest.iter().position(|b| matches!(b, b'/' | b'?' | b'#'));
    &rest[..end.unwrap_or(rest.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_known_by_host_and_port() {
        for (url, want) in [
            ("http://a.example", "a.example"),
            ("https://a.example:8443/x?y", "a.example:8443"),
            ("http://a.example?x=http://b", "a.example"),
            ("a.example", "a.example"),
            ("", ""),
        ] {
            assert_eq!(host_and_port(url.as_bytes()), want.as_bytes(), "{url}");
        }
    }
}
