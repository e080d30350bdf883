//! Limits requests by buckets of tokens of our own. Envoy: `envoy.filters.http.local_ratelimit`.

use std::{cell::RefCell, sync::Arc, time::Duration};

use lateen_protocols::envoy::envoy::extensions::{
    common::ratelimit::v3::{
        VhRateLimitsOptions as CommonOptions, XRateLimitHeadersRfcVersion as Version,
    },
    filters::http::{
        local_ratelimit::v3::LocalRateLimit as FilterProto,
        ratelimit::v3::rate_limit_per_route::VhRateLimitsOptions,
    },
};

use super::{
    bucket::TokenBucket,
    ratelimit::policy::{Descriptors, Policies, Subject},
};
use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig},
    format::Facts,
    head::{Name, RequestHead, ResponseHead},
    info::{ResponseFlags, StreamInfo},
    layers::Fraction,
    proto::{Chance, invalid},
    reject::Reject,
    route::{Selected, headers::HeaderOps},
    shared::Shared,
    stats::Counter,
};

/// Shortest time in which a bucket may be filled. Envoy: the same.
const SHORTEST_FILL: Duration = Duration::from_millis(50);
/// Most buckets that one filter may have for descriptors.
const MAX_DESCRIPTORS: usize = 10_000;

/// The filter of one connection manager or route; all workers share its buckets.
#[derive(Debug)]
pub struct LocalRateLimit {
    bucket: Option<Arc<TokenBucket>>,
    limits: Vec<Limit>,
    enabled: Fraction,
    enforced: Fraction,
    status: u16,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
    stage: u32,
    own: Policies,
    of_vhost: VhRateLimitsOptions,
    always_default: bool,
    tells: bool,
    retry_after: bool,
    resource_exhausted: bool,
    stats: Stats,
}

/// A bucket for requests of one descriptor. An entry without a value stands for any, which all share.
#[derive(Debug)]
struct Limit {
    entries: Vec<(String, String)>,
    bucket: Arc<TokenBucket>,
    shadow: bool,
}

#[derive(Debug)]
struct Stats {
    enabled: Counter,
    enforced: Counter,
    rate_limited: Counter,
    ok: Counter,
}

/// The bucket that the client is told of.
#[derive(Debug)]
pub(crate) struct Kept(Arc<TokenBucket>);

impl LocalRateLimit {
    /// Compiles the filter, or what a route has in its place; counts in `PREFIX.http_local_rate_limit.`.
    ///
    /// # Errors
    /// When something is invalid, or not supported and would change what happens.
    pub fn compile(config: &FilterProto, shared: &Shared) -> Result<LocalRateLimit, ConfigError> {
        if config.stat_prefix.is_empty() {
            return Err(invalid("stat_prefix", "absent"));
        }
        let unsupported = [
            (
                "local_rate_limit_per_downstream_connection",
                config.local_rate_limit_per_downstream_connection,
            ),
            (
                "local_cluster_rate_limit",
                config.local_cluster_rate_limit.is_some(),
            ),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(invalid(*field, "not supported"));
        }
        if config.descriptors.len() > MAX_DESCRIPTORS {
            return Err(invalid(
                "descriptors",
                format!("more than {MAX_DESCRIPTORS}"),
            ));
        }
        let bucket = config
            .token_bucket
            .as_ref()
            .map(|bucket| TokenBucket::compile(bucket, SHORTEST_FILL).map(Arc::new))
            .transpose()?;
        let limits = config.descriptors.iter().enumerate().map(|(index, proto)| {
            let within = |error: ConfigError| error.within(format_args!("descriptors[{index}]"));
            let bucket = proto
                .token_bucket
                .as_ref()
                .ok_or_else(|| within(invalid("token_bucket", "absent")))?;
            if proto.entries.iter().any(|entry| entry.value.is_empty()) {
                return Err(within(invalid(
                    "entries",
                    "an entry without a value, one bucket for each value, is not supported",
                )));
            }
            let entries = proto.entries.iter();
            Ok(Limit {
                entries: entries.map(|e| (e.key.clone(), e.value.clone())).collect(),
                bucket: Arc::new(TokenBucket::compile(bucket, SHORTEST_FILL).map_err(within)?),
                shadow: proto.shadow_mode,
            })
        });
        let mut limits: Vec<Limit> = limits.collect::<Result<_, ConfigError>>()?;
        // Of those that match a request, the slowest to fill is asked first.
        limits.sort_by(|a, b| a.bucket.rate().total_cmp(&b.bucket.rate()));
        let layers = &shared.layers;
        let status = config.status.as_ref().map_or(0, |status| status.code);
        let scope = shared
            .stats
            .scope(&format!("{}.http_local_rate_limit.", config.stat_prefix));
        Ok(LocalRateLimit {
            bucket,
            limits,
            enabled: layers.fraction(config.filter_enabled.as_ref(), Chance::NEVER),
            enforced: layers.fraction(config.filter_enforced.as_ref(), Chance::NEVER),
            // As Envoy, which does not let a refusal look like a success.
            status: u16::try_from(status)
                .ok()
                .filter(|status| (400..600).contains(status))
                .unwrap_or(429),
            request_headers: HeaderOps::compile(
                &config.request_headers_to_add_when_not_enforced,
                &[],
            )?,
            response_headers: HeaderOps::compile(&config.response_headers_to_add, &[])?,
            stage: config.stage,
            own: Policies::inline(&config.rate_limits, layers)?,
            of_vhost: match config.vh_rate_limits() {
                CommonOptions::Override => VhRateLimitsOptions::Override,
                CommonOptions::Include => VhRateLimitsOptions::Include,
                CommonOptions::Ignore => VhRateLimitsOptions::Ignore,
            },
            always_default: config
                .always_consume_default_token_bucket
                .is_none_or(|flag| flag.value),
            tells: config.enable_x_ratelimit_headers() == Version::DraftVersion03,
            retry_after: config.enable_retry_after_header,
            resource_exhausted: config.rate_limited_as_resource_exhausted,
            stats: Stats {
                enabled: scope.counter("enabled"),
                enforced: scope.counter("enforced"),
                rate_limited: scope.counter("rate_limited"),
                ok: scope.counter("ok"),
            },
        })
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        match cx.config(head) {
            Some(RouteFilterConfig::LocalRateLimit(own)) => own.clone().limit(cx, head),
            _ => self.limit(cx, head),
        }
    }

    fn limit(&self, cx: &mut FilterContext<'_>, head: &mut RequestHead) -> Result<(), Reject> {
        if !self.enabled.hits() {
            return Ok(());
        }
        self.stats.enabled.inc();
        let route = cx.route(head).cloned();
        let descriptors = self.descriptors(cx, head, route.as_ref());
        let (allowed, bucket) = self.take(&descriptors);
        if let Some(bucket) = &bucket
            && self.tells
        {
            cx.state.local_ratelimit = Some(Kept(bucket.clone()));
        }
        if allowed {
            self.stats.ok.inc();
            return Ok(());
        }
        self.stats.rate_limited.inc();
        if !self.enforced.hits() {
            let values = values(&self.request_headers, cx.info, head, route.as_ref());
            self.request_headers.apply(&mut head.headers, values);
            return Ok(());
        }
        self.stats.enforced.inc();
        let mut reject = Reject::new(
            self.status,
            "local_rate_limited",
            ResponseFlags::RATE_LIMITED,
            "local_rate_limited",
        );
        let values = values(&self.response_headers, cx.info, head, route.as_ref());
        self.response_headers.apply(&mut reject.headers, values);
        if let Some(bucket) = bucket
            && self.retry_after
            && self.status == 429
        {
            let seconds = seconds(bucket.wait()).max(1).to_string();
            reject.headers.set(Name::new("retry-after"), seconds);
        }
        if self.resource_exhausted {
            reject.grpc_status = Some(8);
        }
        Err(reject)
    }

    fn descriptors(
        &self,
        cx: &FilterContext<'_>,
        head: &RequestHead,
        route: Option<&Selected>,
    ) -> Descriptors {
        let Some(selected) = route.filter(|_| !self.limits.is_empty()) else {
            return Descriptors::default();
        };
        let cluster = selected.target(head).map(|target| target.cluster);
        let subject = Subject {
            head,
            info: &cx.info.borrow(),
            selected,
            cluster: cluster.as_deref().unwrap_or_default(),
            us: &cx.shared.node.cluster,
        };
        subject.descriptors(&self.own, self.stage, self.of_vhost)
    }

    /// Takes tokens for a request; whether there were enough, and the bucket that says so.
    fn take(&self, descriptors: &Descriptors) -> (bool, Option<Arc<TokenBucket>>) {
        let mut told = None;
        for limit in &self.limits {
            let asked = descriptors.all.iter().find(|asked| {
                let entries = asked.entries.iter().map(|e| (&*e.key, &*e.value));
                entries.eq(limit.entries.iter().map(|(key, value)| (&**key, &**value)))
            });
            let Some(asked) = asked else { continue };
            let hits = asked.hits_addend.map_or(1, |hits| hits.value);
            if !limit.bucket.take(hits) && !limit.shadow {
                return (false, Some(limit.bucket.clone()));
            }
            told.get_or_insert_with(|| limit.bucket.clone());
        }
        if let Some(bucket) = &self.bucket
            && (told.is_none() || self.always_default)
        {
            if !bucket.take(1) {
                return (false, Some(bucket.clone()));
            }
            told.get_or_insert_with(|| bucket.clone());
        }
        (true, told)
    }
}

impl Kept {
    pub(super) fn on_response(&self, head: &mut ResponseHead) {
        let bucket = &self.0;
        let values = [
            ("x-ratelimit-limit", u64::from(bucket.most())),
            ("x-ratelimit-remaining", u64::from(bucket.left())),
            ("x-ratelimit-reset", seconds(bucket.wait())),
        ];
        for (name, value) in values {
            head.headers.append(Name::new(name), value.to_string());
        }
    }
}

fn values(
    ops: &HeaderOps,
    info: &RefCell<StreamInfo>,
    head: &RequestHead,
    route: Option<&Selected>,
) -> Vec<bytes::Bytes> {
    ops.values(&Facts {
        request: Some(head),
        route,
        ..Facts::of_connection(&info.borrow())
    })
}

/// Whole seconds, begun ones included.
fn seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}
