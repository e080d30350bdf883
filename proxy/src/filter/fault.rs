//! Fault injection: delays, then aborts, for a share of the requests. Envoy: `envoy.filters.http.fault`.

use std::{sync::Arc, time::Duration};

use lateen_protocols::envoy::envoy::extensions::filters::{
    common::fault::v3::fault_delay::FaultDelaySecifier,
    http::fault::v3::{HttpFault, fault_abort::ErrorType},
};

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, RouteFilterConfig, number},
    head::{Name, RequestHead},
    info::ResponseFlags,
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
    overflow: Counter,
    active: Gauge,
}

/// What to inject into which requests.
#[derive(Debug, Default)]
pub struct FaultRules {
    delay: Option<(DelayBy, Chance)>,
    abort: Option<(AbortBy, Chance)>,
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

/// A fault that was injected; counted as active until the stream ends.
#[derive(Debug)]
pub(crate) struct Active(Gauge);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Fault {
    /// Compiles the filter.
    ///
    /// # Errors
    /// See [`FaultRules::compile`].
    pub fn compile(proto: &HttpFault, scope: &Scope) -> Result<Fault, ConfigError> {
        Ok(Fault {
            rules: Arc::new(FaultRules::compile(proto)?),
            delays: scope.counter("fault.delays_injected"),
            aborts: scope.counter("fault.aborts_injected"),
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
        if let Some(delay) = rules.delay(head) {
            if self.overflows(&rules) {
                return Ok(());
            }
            self.begin(cx);
            self.delays.inc();
            cx.info
                .borrow_mut()
                .flags
                .set(ResponseFlags::DELAY_INJECTED);
            tokio::time::sleep(delay).await;
        }
        if let Some(reject) = rules.abort(head) {
            if cx.state.fault.is_none() && self.overflows(&rules) {
                return Ok(());
            }
            self.begin(cx);
            self.aborts.inc();
            return Err(reject);
        }
        Ok(())
    }

    fn overflows(&self, rules: &FaultRules) -> bool {
        let full = rules
            .max_active
            .is_some_and(|max| self.active.value() >= max);
        if full {
            self.overflow.inc();
        }
        full
    }

    fn begin(&self, cx: &mut FilterContext<'_>) {
        if cx.state.fault.is_none() {
            self.active.inc();
            cx.state.fault = Some(Active(self.active.clone()));
        }
    }
}

impl FaultRules {
    /// Compiles the rules.
    ///
    /// # Errors
    /// When something is invalid, or a response rate limit is wanted, which we do not have.
    pub fn compile(proto: &HttpFault) -> Result<FaultRules, ConfigError> {
        if proto.response_rate_limit.is_some() {
            return Err(invalid("response_rate_limit", "not supported"));
        }
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
        (!delay.is_zero() && chance.hits()).then_some(delay)
    }

    fn abort(&self, head: &RequestHead) -> Option<Reject> {
        let (by, chance) = self.abort.as_ref()?;
        let get = |name: &str| number(head.headers.get(&Name::new(name)));
        let (status, grpc, chance) = match by {
            AbortBy::Http(status) => (*status, None, *chance),
            AbortBy::Grpc(code) => (http_status_of(*code), Some(*code), *chance),
            AbortBy::Header => {
                let chance = limited(*chance, get("x-envoy-fault-abort-request-percentage"));
                let http = get("x-envoy-fault-abort-request").and_then(http_status);
                match (
                    http,
                    get("x-envoy-fault-abort-grpc-request")
                        .and_then(|code| i32::try_from(code).ok()),
                ) {
                    (Some(status), _) => (status, None, chance),
                    (None, Some(code)) => (http_status_of(code), Some(code), chance),
                    (None, None) => return None,
                }
            }
        };
        if !chance.hits() {
            return None;
        }
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

/// Envoy: `Grpc::Utility::grpcToHttpStatus`.
fn http_status_of(grpc: i32) -> u16 {
    match grpc {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}
