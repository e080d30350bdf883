//! Cross-origin requests: answers preflights, and tells browsers which origins may read a response.
//! Envoy: `envoy.filters.http.cors`; the policy is the route's.

use std::sync::Arc;

use bytes::Bytes;
use lateen_protocols::envoy::envoy::extensions::filters::http::cors::v3::CorsPolicy;

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    head::{Known, Name, RequestHead, ResponseHead},
    info::ResponseFlags,
    proto::Chance,
    reject::Reject,
    route::matcher::StringMatch,
    stats::{Counter, Scope},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Cors {
    valid: Counter,
    invalid: Counter,
}

/// A policy.
#[derive(Debug)]
pub struct CorsRules {
    origins: Vec<StringMatch>,
    methods: Bytes,
    headers: Bytes,
    expose: Bytes,
    max_age: Bytes,
    credentials: bool,
    private_network: bool,
    forward_others: bool,
    enabled: Chance,
    shadow: Chance,
}

/// An origin that was allowed, for the response.
#[derive(Debug)]
pub(crate) struct Allowed {
    origin: Bytes,
    rules: Arc<CorsRules>,
}

impl Cors {
    /// The filter, counting in `http.PREFIX.`.
    pub fn new(scope: &Scope) -> Cors {
        Cors {
            valid: scope.counter("cors.origin_valid"),
            invalid: scope.counter("cors.origin_invalid"),
        }
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
    ) -> Result<(), Reject> {
        let Some(RouteFilterConfig::Cors(rules)) = cx.config(head) else {
            return Ok(());
        };
        let rules = rules.clone();
        let enabled = rules.enabled.hits();
        if !enabled && !rules.shadow.hits() {
            return Ok(());
        }
        let Some(origin) = head
            .headers
            .known(Known::Origin)
            .filter(|origin| !origin.is_empty())
        else {
            return Ok(());
        };
        let get = |name: &str| {
            head.headers
                .get(&Name::new(name))
                .filter(|value| !value.is_empty())
        };
        let preflight =
            head.method.as_ref() == b"OPTIONS" && get("access-control-request-method").is_some();
        if !rules.origins.iter().any(|pattern| pattern.matches(origin)) {
            self.invalid.inc();
            return match enabled && preflight && !rules.forward_others {
                true => Err(answer()),
                false => Ok(()),
            };
        }
        self.valid.inc();
        if !enabled {
            return Ok(());
        }
        cx.state.cors = Some(Allowed {
            origin: Bytes::copy_from_slice(origin),
            rules: rules.clone(),
        });
        if !preflight {
            return Ok(());
        }
        let mut reply = answer().with_header(Name::new("access-control-allow-origin"), origin);
        let mut add = |name: &str, value: &Bytes| {
            if !value.is_empty() {
                reply.headers.append(Name::new(name), value.clone());
            }
        };
        if rules.credentials {
            add(
                "access-control-allow-credentials",
                &Bytes::from_static(b"true"),
            );
        }
        // Browsers take a literal `*` only without credentials; what was asked for is always right.
        let asked = |own: &Bytes, name: &str| match own.as_ref() {
            b"*" => get(name).map(Bytes::copy_from_slice).unwrap_or_default(),
            _ => own.clone(),
        };
        add(
            "access-control-allow-methods",
            &asked(&rules.methods, "access-control-request-method"),
        );
        add(
            "access-control-allow-headers",
            &asked(&rules.headers, "access-control-request-headers"),
        );
        add("access-control-max-age", &rules.max_age);
        let private = get("access-control-request-private-network").is_some_and(|v| v == b"true");
        if rules.private_network && private {
            add(
                "access-control-allow-private-network",
                &Bytes::from_static(b"true"),
            );
        }
        Err(reply)
    }
}

fn answer() -> Reject {
    Reject::new(200, "", ResponseFlags::default(), "cors_response")
}

impl CorsRules {
    /// Compiles a policy.
    ///
    /// # Errors
    /// When a pattern is not valid.
    pub fn compile(policy: &CorsPolicy) -> Result<CorsRules, ConfigError> {
        let on = |value: Option<&lateen_protocols::envoy::google::protobuf::BoolValue>,
                  default: bool| { value.map_or(default, |value| value.value) };
        Ok(CorsRules {
            origins: policy
                .allow_origin_string_match
                .iter()
                .map(|origin| StringMatch::compile("allow_origin_string_match", origin))
                .collect::<Result<_, _>>()?,
            methods: policy.allow_methods.clone().into(),
            headers: policy.allow_headers.clone().into(),
            expose: policy.expose_headers.clone().into(),
            max_age: policy.max_age.clone().into(),
            credentials: on(policy.allow_credentials.as_ref(), false),
            private_network: on(policy.allow_private_network_access.as_ref(), false),
            forward_others: on(policy.forward_not_matching_preflights.as_ref(), true),
            enabled: Chance::of_runtime(policy.filter_enabled.as_ref(), Chance::ALWAYS),
            shadow: Chance::of_runtime(policy.shadow_enabled.as_ref(), Chance::NEVER),
        })
    }
}

impl Allowed {
    pub(super) fn on_response(&self, head: &mut ResponseHead) {
        head.headers.set(
            Name::new("access-control-allow-origin"),
            self.origin.clone(),
        );
        if self.rules.credentials {
            head.headers
                .set(Name::new("access-control-allow-credentials"), "true");
        }
        if !self.rules.expose.is_empty() {
            head.headers.set(
                Name::new("access-control-expose-headers"),
                self.rules.expose.clone(),
            );
        }
    }
}
