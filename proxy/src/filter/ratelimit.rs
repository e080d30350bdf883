//! Asks a rate limit service about each request. Envoy: `envoy.filters.http.ratelimit`.

mod headers;
pub(in crate::filter) mod policy;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use lateen_protocols::envoy::envoy::{
    config::core::v3::{ApiVersion, RuntimeFractionalPercent},
    extensions::filters::http::ratelimit::v3::{
        RateLimit as RateLimitProto, RateLimitPerRoute,
        rate_limit::XRateLimitHeadersRfcVersion as Version,
        rate_limit_per_route::{OverrideOptions, VhRateLimitsOptions},
    },
    service::ratelimit::v3::{RateLimitRequest, RateLimitResponse, rate_limit_response::Code},
    r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
};
use prost::Message as _;

pub use self::policy::Policies;
use self::policy::{Descriptors, Subject};
use super::{FilterContext, RouteFilterConfig, grpc_service::GrpcService, per_cluster::PerCluster};
use crate::{
    cluster::Caller,
    config_error::ConfigError,
    format::Facts,
    head::{Headers, Known, Name, RequestHead, ResponseHead},
    info::ResponseFlags,
    layers::{Fraction, RuntimeLayers},
    proto::{Chance, invalid, timeout},
    reject::Reject,
    route::headers::HeaderOps,
    shared::Shared,
    stats::{Counter, Scope},
};

/// Envoy's default for `timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(20);
/// Longest answer; statuses of all descriptors and headers fit many times.
const MAX_ANSWER_BYTES: usize = 1 << 20;
const METHOD: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
const METADATA: &str = "envoy.filters.http.ratelimit";

/// The filter of one connection manager.
#[derive(Debug)]
pub struct RateLimit {
    service: GrpcService,
    domain: String,
    stage: u32,
    /// Only requests from inside (`true`) or outside the mesh.
    internal_only: Option<bool>,
    enabled: Fraction,
    enforced: Fraction,
    /// How often a request is refused because the service cannot be asked.
    deny_on_error: Fraction,
    /// The filter's own limits, which go before those of routes.
    own: Policies,
    resource_exhausted: bool,
    limit_headers: bool,
    ratelimited_header: bool,
    retry_after: bool,
    status: u16,
    status_on_error: u16,
    response_headers: HeaderOps,
    metadata_namespace: String,
    prefix: String,
    clusters: PerCluster<Outcomes>,
}

/// What a route says.
#[derive(Debug)]
pub struct RateLimitRoute {
    of_vhost: VhRateLimitsOptions,
    own: Policies,
    domain: String,
}

/// Headers for the response to a request that passed.
#[derive(Debug)]
pub(crate) struct Kept(Headers);

#[derive(Debug)]
struct Outcomes {
    ok: Counter,
    over_limit: Counter,
    error: Counter,
    failure_mode_allowed: Counter,
}

impl RateLimit {
    /// Compiles the filter.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(config: &RateLimitProto, shared: &Shared) -> Result<RateLimit, ConfigError> {
        let service = config
            .rate_limit_service
            .as_ref()
            .ok_or_else(|| invalid("rate_limit_service", "absent"))?;
        if service.transport_api_version() != ApiVersion::V3 {
            return Err(invalid("transport_api_version", "only V3 is supported"));
        }
        if config.domain.is_empty() {
            return Err(invalid("domain", "empty"));
        }
        if config.stage > 10 {
            return Err(invalid("stage", "greater than 10"));
        }
        // Envoy waits for ever when told 0; a bound is kept all the same.
        let limit = timeout("timeout", config.timeout.as_ref(), Some(DEFAULT_TIMEOUT))?
            .unwrap_or(Duration::from_secs(3600));
        let grpc = service
            .grpc_service
            .as_ref()
            .ok_or_else(|| invalid("rate_limit_service.grpc_service", "absent"))?;
        let layers = &shared.layers;
        let or_key = |given: Option<&RuntimeFractionalPercent>, key: &str| match given {
            Some(given) => layers.fraction(Some(given), Chance::ALWAYS),
            None => by_key(layers, key),
        };
        let denies = match config.failure_mode_deny {
            true => Chance::ALWAYS,
            false => Chance::NEVER,
        };
        let status = config.rate_limited_status.as_ref().map_or(0, |s| s.code);
        let status_on_error = config.status_on_error.as_ref().map_or(0, |s| s.code);
        Ok(RateLimit {
            service: GrpcService::compile(grpc, limit)
                .map_err(|error| error.within("rate_limit_service.grpc_service"))?,
            domain: config.domain.clone(),
            stage: config.stage,
            internal_only: match config.request_type.as_str() {
                "" | "both" => None,
                "internal" => Some(true),
                "external" => Some(false),
                other => return Err(invalid("request_type", format!("{other:?} is not known"))),
            },
            enabled: or_key(
                config.filter_enabled.as_ref(),
                "ratelimit.http_filter_enabled",
            ),
            enforced: or_key(
                config.filter_enforced.as_ref(),
                "ratelimit.http_filter_enforcing",
            ),
            deny_on_error: layers.fraction(config.failure_mode_deny_percent.as_ref(), denies),
            own: Policies::inline(&config.rate_limits, layers)?,
            resource_exhausted: config.rate_limited_as_resource_exhausted,
            limit_headers: config.enable_x_ratelimit_headers() == Version::DraftVersion03,
            ratelimited_header: !config.disable_x_envoy_ratelimited_header,
            retry_after: config.enable_retry_after_header,
            // As Envoy, which does not let a refusal look like a success.
            status: u16::try_from(status)
                .ok()
                .filter(|status| (400..600).contains(status))
                .unwrap_or(429),
            status_on_error: u16::try_from(status_on_error)
                .ok()
                .filter(|status| (200..600).contains(status))
                .unwrap_or(500),
            response_headers: HeaderOps::compile(&config.response_headers_to_add, &[])?,
            metadata_namespace: match config.metadata_namespace.as_str() {
                "" => METADATA.to_owned(),
                name => name.to_owned(),
            },
            prefix: match config.stat_prefix.as_str() {
                "" => "ratelimit.".to_owned(),
                prefix => format!("ratelimit.{prefix}."),
            },
            clusters: PerCluster::default(),
        })
    }

    /// Asks about a request.
    ///
    /// # Errors
    /// The service refuses it, or cannot be asked and that is not forgiven.
    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        if self
            .internal_only
            .is_some_and(|wanted| wanted != cx.internal)
            || !self.enabled.hits()
        {
            return Ok(());
        }
        let own = match cx.config(head) {
            Some(RouteFilterConfig::RateLimit(own)) => Some(own.clone()),
            _ => None,
        };
        let own = own.as_deref();
        let Some((cluster, mut descriptors)) = self.descriptors(cx, head, own) else {
            return Ok(());
        };
        if descriptors.is_empty() {
            return Ok(());
        }
        let domain = own.map(|own| &own.domain).filter(|own| !own.is_empty());
        let question = RateLimitRequest {
            domain: domain.unwrap_or(&self.domain).clone(),
            descriptors: std::mem::take(&mut descriptors.all),
            hits_addend: 0,
        };
        let answer = self
            .service
            .unary::<RateLimitResponse>(
                cx.shared,
                METHOD,
                &question.encode_to_vec(),
                MAX_ANSWER_BYTES,
            )
            .await;
        let outcomes = self.clusters.get(cx.shared, &cluster, |scope| {
            Outcomes::new(scope, &self.prefix)
        });
        let count = |which: fn(&Outcomes) -> &Counter| {
            if let Some(outcomes) = &outcomes {
                which(outcomes).inc();
            }
        };
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, cluster = %self.service.cluster(), "the rate limit service cannot be asked");
                count(|outcomes| &outcomes.error);
                if !self.deny_on_error.hits() {
                    count(|outcomes| &outcomes.failure_mode_allowed);
                    return Ok(());
                }
                return Err(Reject::new(
                    self.status_on_error,
                    "",
                    ResponseFlags::RATE_LIMIT_SERVICE_ERROR,
                    "rate_limiter_error",
                ));
            }
        };
        if let Some(fields) = answer.dynamic_metadata.take() {
            let mut info = cx.info.borrow_mut();
            info.add_metadata(&self.metadata_namespace, fields);
        }
        let mut add = Headers::default();
        for header in &answer.response_headers_to_add {
            add.append(Name::new(&header.key), value_of(header));
        }
        let over = answer.overall_code() == Code::OverLimit;
        if over {
            count(|outcomes| &outcomes.over_limit);
            if let Some(cluster) = cx.shared.clusters.get(&cluster) {
                cluster.stats.answered(self.status, Caller::Internal);
            }
            if self.ratelimited_header {
                add.set(Known::XEnvoyRatelimited, "true");
            }
        } else {
            count(|outcomes| &outcomes.ok);
        }
        headers::limits(
            &answer.statuses,
            |index| descriptors.says(index).unwrap_or(self.limit_headers),
            &mut add,
        );
        if over && self.enforced.hits() {
            if self.retry_after && self.status == 429 {
                headers::retry_after(&answer.statuses, &mut add);
            }
            return Err(self.refusal(cx, head, answer.raw_body, add));
        }
        for header in &answer.request_headers_to_add {
            head.headers
                .append(Name::new(&header.key), value_of(header));
        }
        if !add.is_empty() {
            cx.state.ratelimit = Some(Box::new(Kept(add)));
        }
        Ok(())
    }

    /// The cluster the request goes to, and what is asked about it; `None` without a cluster.
    fn descriptors(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
        own: Option<&RateLimitRoute>,
    ) -> Option<(Arc<str>, Descriptors)> {
        let selected = cx.route(head)?.clone();
        let cluster = selected.target(head)?.cluster;
        cx.shared.clusters.get(&cluster)?;
        let info = cx.info.borrow();
        let subject = Subject {
            head,
            info: &info,
            selected: &selected,
            cluster: &cluster,
            us: &cx.shared.node.cluster,
        };
        let inline = own.map(|own| &own.own).filter(|own| !own.is_empty());
        let descriptors = subject.descriptors(
            inline.unwrap_or(&self.own),
            self.stage,
            own.map_or(VhRateLimitsOptions::Override, |own| own.of_vhost),
        );
        Some((cluster.clone(), descriptors))
    }

    fn refusal(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
        body: Vec<u8>,
        add: Headers,
    ) -> Reject {
        let body = String::from_utf8(body)
            .unwrap_or_else(|broken| String::from_utf8_lossy(broken.as_bytes()).into_owned());
        let mut reject = Reject::new(
            self.status,
            body,
            ResponseFlags::RATE_LIMITED,
            "request_rate_limited",
        );
        *reject.headers = add;
        if self.resource_exhausted {
            reject.grpc_status = Some(8);
        }
        if !self.response_headers.is_empty() {
            let route = cx.route(head).cloned();
            let info = cx.info.borrow();
            let values = self.response_headers.values(&Facts {
                request: Some(head),
                route: route.as_ref(),
                ..Facts::of_connection(&info)
            });
            self.response_headers.apply(&mut reject.headers, values);
        }
        reject
    }
}

impl RateLimitRoute {
    /// Compiles a route's configuration.
    ///
    /// # Errors
    /// When it is not valid.
    pub fn compile(
        config: &RateLimitPerRoute,
        shared: &Shared,
    ) -> Result<RateLimitRoute, ConfigError> {
        if config.override_option() != OverrideOptions::Default {
            return Err(invalid("override_option", "not supported"));
        }
        Ok(RateLimitRoute {
            of_vhost: config.vh_rate_limits(),
            own: Policies::inline(&config.rate_limits, &shared.layers)?,
            domain: config.domain.clone(),
        })
    }
}

impl Kept {
    /// Puts the service's headers into the response.
    pub(super) fn on_response(&self, head: &mut ResponseHead) {
        for (name, value) in self.0.iter() {
            head.headers.append(name.to_name(), value);
        }
    }
}

impl Outcomes {
    fn new(scope: &Scope, prefix: &str) -> Outcomes {
        let counter = |name: &str| scope.counter(&format!("{prefix}{name}"));
        Outcomes {
            ok: counter("ok"),
            over_limit: counter("over_limit"),
            error: counter("error"),
            failure_mode_allowed: counter("failure_mode_allowed"),
        }
    }
}

/// A fraction that is always, unless the runtime has another value of this key.
fn by_key(layers: &RuntimeLayers, key: &str) -> Fraction {
    let percent = RuntimeFractionalPercent {
        default_value: Some(FractionalPercent {
            numerator: 100,
            denominator: DenominatorType::Hundred.into(),
        }),
        runtime_key: key.to_owned(),
    };
    layers.fraction(Some(&percent), Chance::ALWAYS)
}

fn value_of(header: &lateen_protocols::envoy::envoy::config::core::v3::HeaderValue) -> Bytes {
    let mut value = match header.raw_value.is_empty() {
        true => header.value.clone().into_bytes(),
        false => header.raw_value.clone(),
    };
    // What the service says must not end the header.
    value.retain(|byte| !matches!(byte, b'\r' | b'\n' | 0));
    value.into()
}
