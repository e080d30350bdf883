//! Lets requests pass whose JSON Web Tokens are as the rules require. Envoy: `envoy.filters.http.jwt_authn`.

use std::{collections::HashMap, sync::Arc};

use lateen_protocols::envoy::{
    envoy::extensions::filters::http::jwt_authn::v3 as proto, google::protobuf as pb,
};
use proto::{per_route_config::RequirementSpecifier, requirement_rule::RequirementType};

use self::{
    provider::{Found, Provider},
    requirement::{AllowMissing, Requirement},
    status::Status,
};
use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    head::{Known, Name, RequestHead},
    info::ResponseFlags,
    proto::invalid,
    reject::Reject,
    route::RequestMatch,
    shared::Shared,
    stats::{Counter, Scope},
};

mod keys;
mod provider;
mod remote;
mod requirement;
mod status;
#[cfg(test)]
mod tests;
mod token;
mod values;

/// Where verified payloads go in dynamic metadata.
const METADATA: &str = "envoy.filters.http.jwt_authn";
/// Longest path that is told in `www-authenticate`. Envoy: `MaximumUriLength`.
const MAX_REALM_PATH: usize = 256;

/// The filter of one connection manager.
#[derive(Debug)]
pub struct JwtAuthn {
    providers: Vec<Arc<Provider>>,
    rules: Vec<(RequestMatch, Option<Arc<Requirement>>)>,
    named: HashMap<String, Arc<Requirement>>,
    bypass_preflight: bool,
    strip: bool,
    allowed: Counter,
    denied: Counter,
    bypassed: Counter,
}

impl JwtAuthn {
    /// Compiles the filter; counts in `http.PREFIX.jwt_authn.`.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(
        config: &proto::JwtAuthentication,
        scope: &Scope,
        shared: &Shared,
    ) -> Result<JwtAuthn, ConfigError> {
        if config.filter_state_rules.is_some() {
            return Err(invalid("filter_state_rules", "not supported"));
        }
        let mut names: Vec<_> = config.providers.iter().collect();
        names.sort_by_key(|(name, _)| *name);
        let provider = |(name, provider): (&String, _)| {
            Provider::compile(name, provider)
                .map(Arc::new)
                .map_err(|error| error.within(format_args!("providers[{name}]")))
        };
        let providers: Vec<_> = names.into_iter().map(provider).collect::<Result<_, _>>()?;
        let named = config.requirement_map.iter().map(|(name, requirement)| {
            let compiled = Requirement::compile(requirement, &providers)
                .map_err(|error| error.within(format_args!("requirement_map[{name}]")))?;
            Ok((name.clone(), Arc::new(compiled)))
        });
        let named: HashMap<_, _> = named.collect::<Result<_, ConfigError>>()?;
        let rules = config.rules.iter().enumerate().map(|(index, rule)| {
            let within = |error: ConfigError| error.within(format_args!("rules[{index}]"));
            let matches = rule
                .r#match
                .as_ref()
                .ok_or_else(|| within(invalid("match", "absent")))?;
            let matches = RequestMatch::compile(matches, shared).map_err(within)?;
            let requirement = match rule.requirement_type.as_ref() {
                None => None,
                Some(RequirementType::Requires(requirement)) => Some(Arc::new(
                    Requirement::compile(requirement, &providers).map_err(within)?,
                )),
                Some(RequirementType::RequirementName(name)) => {
                    let found = named.get(name).cloned();
                    Some(found.ok_or_else(|| {
                        within(invalid(
                            "requirement_name",
                            format!("{name:?} is not in requirement_map"),
                        ))
                    })?)
                }
            };
            Ok((matches, requirement))
        });
        let prefix = format!("jwt_authn.{}", config.stat_prefix);
        Ok(JwtAuthn {
            rules: rules.collect::<Result<_, ConfigError>>()?,
            providers,
            named,
            bypass_preflight: config.bypass_cors_preflight,
            strip: config.strip_failure_response,
            allowed: scope.counter(&format!("{prefix}allowed")),
            denied: scope.counter(&format!("{prefix}denied")),
            bypassed: scope.counter(&format!("{prefix}cors_preflight_bypassed")),
        })
    }

    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        if self.bypass_preflight && is_preflight(head) {
            self.bypassed.inc();
            return Ok(());
        }
        let requirement = match self.requirement(cx, head) {
            Ok(requirement) => requirement,
            Err(reject) => {
                self.denied.inc();
                return Err(reject);
            }
        };
        for provider in &self.providers {
            provider.sanitize(head);
        }
        let Some(requirement) = requirement else {
            self.allowed.inc();
            return Ok(());
        };
        match self.check(&requirement, cx, head).await {
            Ok(()) => {
                self.allowed.inc();
                Ok(())
            }
            Err(status) => {
                self.denied.inc();
                Err(self.refusal(head, status))
            }
        }
    }

    fn requirement(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
    ) -> Result<Option<Arc<Requirement>>, Reject> {
        if let Some(RouteFilterConfig::JwtAuthn(name)) = cx.config(head) {
            return match self.named.get(&**name) {
                Some(found) => Ok(Some(found.clone())),
                None => {
                    let text = format!("Wrong requirement_name: {name}");
                    Err(Reject::new(
                        403,
                        format!("Failed JWT authentication: {text}"),
                        ResponseFlags::default(),
                        details(&text),
                    ))
                }
            };
        }
        let info = cx.info.borrow();
        let tls = info.connection.tls.as_deref();
        let rule = self.rules.iter().find(|(rule, _)| rule.holds(head, tls));
        Ok(rule.and_then(|(_, requirement)| requirement.clone()))
    }

    async fn check(
        &self,
        requirement: &Requirement,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Status> {
        match requirement {
            Requirement::Provider(provider, audiences) => {
                let tokens = provider.tokens(head);
                if tokens.is_empty() {
                    return Err(Status::Missing);
                }
                for found in &tokens {
                    self.verify(provider, found, audiences.as_deref(), cx, head)
                        .await?;
                }
                Ok(())
            }
            Requirement::Anyone(how) => {
                let outcome = self.anyone(cx, head).await;
                match (outcome, how) {
                    (Err(Status::Missing), _) | (Err(_), AllowMissing::OrFailed) => Ok(()),
                    (outcome, _) => outcome,
                }
            }
            Requirement::All(all) => {
                for one in all {
                    Box::pin(self.check(one, cx, head)).await?;
                }
                Ok(())
            }
            Requirement::Any(any, allow) => {
                let mut last = Status::Missing;
                for one in any {
                    match Box::pin(self.check(one, cx, head)).await {
                        Ok(()) => return Ok(()),
                        // What is wrong with a token tells more than that it is of somebody else, and that
                        // more than that there is none.
                        Err(status) => {
                            let vague = matches!(status, Status::Missing | Status::UnknownIssuer);
                            if !vague || last == Status::Missing {
                                last = status;
                            }
                        }
                    }
                }
                match allow {
                    Some(AllowMissing::OrFailed) => Ok(()),
                    Some(AllowMissing::Only) if last == Status::Missing => Ok(()),
                    _ => Err(last),
                }
            }
        }
    }

    /// Verifies the tokens of the request, whoever of the providers they are of.
    async fn anyone(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Status> {
        let mut outcome = Err(Status::Missing);
        for provider in &self.providers {
            for found in &provider.tokens(head) {
                if provider.claims_to_be_of(found) {
                    self.verify(provider, found, None, cx, head).await?;
                    outcome = Ok(());
                } else if outcome == Err(Status::Missing) {
                    outcome = Err(Status::UnknownIssuer);
                }
            }
        }
        outcome
    }

    async fn verify(
        &self,
        provider: &Provider,
        found: &Found,
        audiences: Option<&[String]>,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Status> {
        let wall = cx.info.borrow().start_time;
        let token = provider.verify(cx.shared, found, audiences, wall).await;
        let token = match token {
            Ok(token) => token,
            Err(status) => {
                tracing::debug!(provider = %provider.name, status = status.text(), "token refused");
                return Err(status);
            }
        };
        provider.accept(head, found, &token);
        let mut said = HashMap::new();
        let mut say = |key: &String, all| {
            if !key.is_empty() {
                let kind = pb::value::Kind::StructValue(values::fields(all));
                said.insert(key.clone(), pb::Value { kind: Some(kind) });
            }
        };
        say(&provider.header_key, &token.header);
        say(&provider.payload_key, &provider.payload(&token));
        let fields = pb::Struct {
            fields: said.into_iter().collect(),
        };
        cx.info.borrow_mut().add_metadata(METADATA, fields);
        if provider.clear_route_cache {
            cx.clear_route_cache();
        }
        Ok(())
    }

    fn refusal(&self, head: &RequestHead, status: Status) -> Reject {
        let text = status.text();
        let body = if self.strip { "" } else { text };
        let reject = Reject::new(status.http(), body, ResponseFlags::default(), details(text));
        if self.strip {
            return reject;
        }
        let part = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let path = head.path.get(..MAX_REALM_PATH).unwrap_or(&head.path);
        let mut value = format!(
            "Bearer realm=\"{}://{}{}\"",
            part(&head.scheme),
            part(&head.authority),
            part(path)
        );
        if status != Status::Missing {
            value.push_str(", error=\"invalid_token\"");
        }
        reject.with_header(Name::new("www-authenticate"), value)
    }
}

/// Compiles a route's configuration.
///
/// # Errors
/// When it says nothing.
pub fn compile_route(config: &proto::PerRouteConfig) -> Result<RouteFilterConfig, ConfigError> {
    match config.requirement_specifier.as_ref() {
        Some(RequirementSpecifier::Disabled(true)) => Ok(RouteFilterConfig::Disabled),
        Some(RequirementSpecifier::Disabled(false)) => Err(invalid("disabled", "may only be true")),
        Some(RequirementSpecifier::RequirementName(name)) if !name.is_empty() => {
            Ok(RouteFilterConfig::JwtAuthn(name.as_str().into()))
        }
        _ => Err(invalid("requirement_name", "absent")),
    }
}

fn details(text: &str) -> String {
    format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"))
}

fn is_preflight(head: &RequestHead) -> bool {
    let given = |value: Option<&[u8]>| value.is_some_and(|value| !value.is_empty());
    head.method.as_ref() == b"OPTIONS"
        && given(head.headers.known(Known::Origin))
        && given(
            head.headers
                .get(&Name::new("access-control-request-method")),
        )
}
