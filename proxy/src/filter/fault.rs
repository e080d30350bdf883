//! Fault injection, for a share of the requests: slow responses, delays, then aborts. Envoy:
//! `envoy.filters.http.fault`.

use std::{sync::Arc, time::Duration};

use lateen_protocols::envoy::envoy::extensions::filters::{
    common::fault::v3::{fault_delay::FaultDelaySecifier, fault_rate_limit::LimitType},
    http::fault::v3::{HttpFault, fault_abort::ErrorType},
};

use crate::{
    body::Body,
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig, number, pace},
    head::{Name, RequestHead},
    info::ResponseFlags,
    layers::{Fraction, Number, RuntimeLayers},
    proto::{Chance, duration, invalid},
    reject::Reject,
    route::matcher::HeaderMatch,
    stats::{Counter, Gauge, Scope},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct Fault {
    rules: Arc<FaultRules>,
    delays: Counter,
    aborts: Counter,
    rate_limits: Counter,
    overflow: Counter,
    active: Gauge,
}

/// What to inject into which requests.
#[derive(Debug)]
pub struct FaultRules {
    delay: Option<(DelayBy, Chance)>,
    abort: Option<(AbortBy, Chance)>,
    rate_limit: Option<(LimitBy, Chance)>,
    runtime: Runtime,
    abort_body: Option<String>,
    cluster: String,
    headers: Vec<HeaderMatch>,
    nodes: Vec<String>,
    max_active: Option<u64>,
}

#[derive(Debug)]
enum DelayBy {
    Fixed(Duration),
    Header,
}

#[derive(Clone, Copy, Debug)]
enum AbortBy {
    Http(u16),
    Grpc(i32),
    Header,
}

#[derive(Clone, Copy, Debug)]
enum LimitBy {
    /// KiB per second.
    Fixed(u64),
    Header,
}

/// Runtime values that override what is configured. Those of single downstream clusters are not followed.
#[derive(Debug)]
struct Runtime {
    delay_percent: Fraction,
    abort_percent: Fraction,
    rate_limit_percent: Fraction,
    delay_ms: Number,
    http_status: Number,
    grpc_status: Number,
    max_active: Number,
}

/// Faults that were injected; counted as one active until the stream ends.
#[derive(Debug)]
pub(crate) struct Active {
    gauge: Gauge,
    /// KiB per second of the response's body.
    kbps: Option<u64>,
}

impl Active {
    /// Slows the body of the response, if it is to be.
    pub(super) fn on_response(&self, body: &mut Body) {
        let Some(kbps) = self.kbps.filter(|_| !body.is_end_stream()) else {
            return;
        };
        // Every stream has its own limit.
        let bucket = Arc::new(pace::bucket(kbps, pace::INTERVAL));
        let whole = std::mem::take(body);
        *body = pace::pace(whole, bucket, pace::INTERVAL, pace::Unwatched);
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl Fault {
    /// Compiles the filter.
    ///
    /// # Errors
    /// See [`FaultRules::compile`].
    pub fn compile(
        proto: &HttpFault,
        scope: &Scope,
        layers: &RuntimeLayers,
    ) -> Result<Fault, ConfigError> {
        Ok(Fault {
            rules: Arc::new(FaultRules::compile(proto, layers)?),
            delays: scope.counter("fault.delays_injected"),
            aborts: scope.counter("fault.aborts_injected"),
            rate_limits: scope.counter("fault.response_rl_injected"),
            overflow: scope.counter("fault.faults_overflow"),
            active: scope.gauge("fault.active_faults"),
        })
    }

    pub(super) async fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &mut RequestHead,
    ) -> Result<(), Reject> {
        let rules = match cx.config(head) {
            Some(RouteFilterConfig::Fault(rules)) => rules.clone(),
            _ => self.rules.clone(),
        };
        if !rules.cluster.is_empty() {
            let target = cx.route(head).and_then(|route| route.target(head));
            if target.is_none_or(|target| *target.cluster != *rules.cluster) {
                return Ok(());
            }
        }
        if !rules.headers.iter().all(|header| header.matches(head)) || !rules.node_matches(head) {
            return Ok(());
        }
        if let Some(kbps) = rules.rate_limit(head)
            && let Some(active) = self.begin(cx, &rules)
        {
            active.kbps = Some(kbps);
            self.rate_limits.inc();
        }
        if let Some(delay) = rules.delay(head)
            && self.begin(cx, &rules).is_some()
        {
            self.delays.inc();
            cx.info
                .borrow_mut()
                .flags
                .set(ResponseFlags::DELAY_INJECTED);
            tokio::time::sleep(delay).await;
        }
        if let Some(reject) = rules.abort(head)
            && self.begin(cx, &rules).is_some()
        {
            self.aborts.inc();
            return Err(reject);
        }
        Ok(())
    }

    /// Counts the stream as one with a fault, if it is not yet; `None` when there are too many already.
    fn begin<'c>(
        &self,
        cx: &'c mut FilterContext<'_>,
        rules: &FaultRules,
    ) -> Option<&'c mut Active> {
        let present = &mut cx.state.fault;
        if present.is_none() {
            let max = rules.runtime.max_active.get().or(rules.max_active);
            if max.is_some_and(|max| self.active.value() >= max) {
                self.overflow.inc();
                return None;
            }
            self.active.inc();
            *present = Some(Active {
                gauge: self.active.clone(),
                kbps: None,
            });
        }
        present.as_mut()
    }
}

impl FaultRules {
    /// Compiles the rules.
    ///
    /// # Errors
    /// When something is invalid.
    pub fn compile(proto: &HttpFault, layers: &RuntimeLayers) -> Result<FaultRules, ConfigError> {
        let rate_limit = match proto.response_rate_limit.as_ref() {
            None => None,
            Some(limit) => {
                let by = match limit.limit_type.as_ref() {
                    Some(LimitType::FixedLimit(fixed)) if fixed.limit_kbps > 0 => {
                        LimitBy::Fixed(fixed.limit_kbps)
                    }
                    Some(LimitType::FixedLimit(_)) => {
                        return Err(invalid("limit_kbps", "must be at least 1"));
                    }
                    Some(LimitType::HeaderLimit(_)) => LimitBy::Header,
                    None => {
                        let path = "response_rate_limit";
                        return Err(invalid(path, "neither fixed nor by header"));
                    }
                };
                Some((
                    by,
                    limit.percentage.as_ref().map_or(Chance::NEVER, Chance::new),
                ))
            }
        };
        let delay = match proto.delay.as_ref() {
            None => None,
            Some(delay) => {
                let by = match delay.fault_delay_secifier.as_ref() {
                    Some(FaultDelaySecifier::FixedDelay(fixed)) => {
                        DelayBy::Fixed(duration("fixed_delay", fixed)?)
                    }
                    Some(FaultDelaySecifier::HeaderDelay(_)) => DelayBy::Header,
                    None => return Err(invalid("delay", "neither fixed nor by header")),
                };
                Some((
                    by,
                    delay.percentage.as_ref().map_or(Chance::NEVER, Chance::new),
                ))
            }
        };
        let abort = match proto.abort.as_ref() {
            None => None,
            Some(abort) => {
                let by = match abort.error_type.as_ref() {
                    Some(ErrorType::HttpStatus(status)) => AbortBy::Http(
                        http_status(u64::from(*status))
                            .ok_or_else(|| invalid("http_status", "not between 200 and 599"))?,
                    ),
                    Some(ErrorType::GrpcStatus(code)) => AbortBy::Grpc(
                        i32::try_from(*code).map_err(|_| invalid("grpc_status", "out of range"))?,
                    ),
                    Some(ErrorType::HeaderAbort(_)) => AbortBy::Header,
                    None => return Err(invalid("abort", "no status")),
                };
                Some((
                    by,
                    abort.percentage.as_ref().map_or(Chance::NEVER, Chance::new),
                ))
            }
        };
        let abort_body = proto
            .abort
            .as_ref()
            .map(|abort| abort.response_body.clone());
        Ok(FaultRules {
            delay,
            abort,
            rate_limit,
            runtime: Runtime::new(proto, layers),
            abort_body: abort_body.filter(|body| !body.is_empty()),
            cluster: proto.upstream_cluster.clone(),
            headers: proto
                .headers
                .iter()
                .map(HeaderMatch::compile)
                .collect::<Result<_, _>>()?,
            nodes: proto.downstream_nodes.clone(),
            max_active: proto
                .max_active_faults
                .as_ref()
                .map(|max| u64::from(max.value)),
        })
    }

    fn node_matches(&self, head: &RequestHead) -> bool {
        self.nodes.is_empty()
            || head
                .headers
                .get(&Name::new("x-envoy-downstream-service-node"))
                .is_some_and(|node| self.nodes.iter().any(|n| n.as_bytes() == node))
    }

    /// KiB per second of the response's body.
    fn rate_limit(&self, head: &RequestHead) -> Option<u64> {
        let (by, chance) = self.rate_limit.as_ref()?;
        let get = |name: &str| number(head.headers.get(&Name::new(name)));
        let (kbps, chance) = match by {
            LimitBy::Fixed(kbps) => (*kbps, *chance),
            LimitBy::Header => (
                get("x-envoy-fault-throughput-response").filter(|kbps| *kbps > 0)?,
                limited(*chance, get("x-envoy-fault-throughput-response-percentage")),
            ),
        };
        let chance = self.runtime.rate_limit_percent.or(chance);
        chance.hits().then_some(kbps)
    }

    fn delay(&self, head: &RequestHead) -> Option<Duration> {
        let (by, chance) = self.delay.as_ref()?;
        let get = |name: &str| number(head.headers.get(&Name::new(name)));
        let (delay, chance) = match by {
            DelayBy::Fixed(delay) => (*delay, *chance),
            DelayBy::Header => (
                Duration::from_millis(get("x-envoy-fault-delay-request")?),
                limited(*chance, get("x-envoy-fault-delay-request-percentage")),
            ),
        };
        let delay = self
            .runtime
            .delay_ms
            .get()
            .map_or(delay, Duration::from_millis);
        let chance = self.runtime.delay_percent.or(chance);
        (!delay.is_zero() && chance.hits()).then_some(delay)
    }

    fn abort(&self, head: &RequestHead) -> Option<Reject> {
        let (by, chance) = self.abort.as_ref()?;
        let get = |name: &str| number(head.headers.get(&Name::new(name)));
        let (status, grpc, chance) = match by {
            AbortBy::Http(status) => (Some(*status), None, *chance),
            AbortBy::Grpc(code) => (None, Some(*code), *chance),
            AbortBy::Header => {
                let chance = limited(*chance, get("x-envoy-fault-abort-request-percentage"));
                let http = get("x-envoy-fault-abort-request").and_then(http_status);
                match (
                    http,
                    get("x-envoy-fault-abort-grpc-request")
                        .and_then(|code| i32::try_from(code).ok()),
                ) {
                    (None, None) => return None,
                    (status, code) => (status, code.filter(|_| status.is_none()), chance),
                }
            }
        };
        if !self.runtime.abort_percent.or(chance).hits() {
            return None;
        }
        let (status, grpc) = self.runtime.statuses(status, grpc);
        let body = self
            .abort_body
            .clone()
            .map_or("fault filter abort".into(), std::borrow::Cow::Owned);
        let mut reject = Reject::new(
            status,
            body,
            ResponseFlags::FAULT_INJECTED,
            "fault_filter_abort",
        );
        reject.grpc_status = grpc;
        Some(reject)
    }
}

impl Runtime {
    fn new(proto: &HttpFault, layers: &RuntimeLayers) -> Runtime {
        let key = |own: &str, usual: &str| if own.is_empty() { usual } else { own }.to_owned();
        let percent = |own: &str, usual: &str| layers.fraction_at(&key(own, usual), Chance::NEVER);
        let number = |own: &str, usual: &str| layers.number_at(&key(own, usual));
        Runtime {
            delay_percent: percent(
                &proto.delay_percent_runtime,
                "fault.http.delay.fixed_delay_percent",
            ),
            abort_percent: percent(
                &proto.abort_percent_runtime,
                "fault.http.abort.abort_percent",
            ),
            rate_limit_percent: percent(
                &proto.response_rate_limit_percent_runtime,
                "fault.http.rate_limit.response_percent",
            ),
            delay_ms: number(
                &proto.delay_duration_runtime,
                "fault.http.delay.fixed_duration_ms",
            ),
            http_status: number(
                &proto.abort_http_status_runtime,
                "fault.http.abort.http_status",
            ),
            grpc_status: number(
                &proto.abort_grpc_status_runtime,
                "fault.http.abort.grpc_status",
            ),
            max_active: number(
                &proto.max_active_faults_runtime,
                "fault.http.max_active_faults",
            ),
        }
    }

    /// The statuses of an abort, given the configured ones: of HTTP, or else of gRPC.
    fn statuses(&self, http: Option<u16>, grpc: Option<i32>) -> (u16, Option<i32>) {
        if let Some(configured) = http {
            let own = self.http_status.get().and_then(http_status);
            return (own.unwrap_or(configured), None);
        }
        let own = self.grpc_status.get();
        let own = own.and_then(|code| i32::try_from(code).ok());
        let code = own.or(grpc).unwrap_or_default();
        // To who does not speak gRPC it is a success. Envoy: "HTTP will be set to 200".
        (200, Some(code))
    }
}

/// A percentage that a header may only lower.
fn limited(chance: Chance, percent: Option<u64>) -> Chance {
    match percent.and_then(|percent| u32::try_from(percent).ok()) {
        Some(percent) => Chance(chance.0.min(percent.saturating_mul(10_000))),
        None => chance,
    }
}

fn http_status(status: u64) -> Option<u16> {
    u16::try_from(status)
        .ok()
        .filter(|status| (200..600).contains(status))
}
