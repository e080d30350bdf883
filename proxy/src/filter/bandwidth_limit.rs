//! Lets bodies pass at no more than a bandwidth, that of all streams together. Envoy:
//! `envoy.filters.http.bandwidth_limit`.

use std::{
    cell::Cell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use lateen_protocols::envoy::envoy::extensions::filters::http::bandwidth_limit::v3::{
    BandwidthLimit as LimitProto, bandwidth_limit::EnableMode,
};
use tokio::time::Instant;

use crate::{
    body::Body,
    clock,
    config_error::ConfigError,
    filter::{FilterContext, FilterState, RouteFilterConfig, bucket::TokenBucket, pace},
    head::{Headers, Name, RequestHead},
    layers::Flag,
    proto::{invalid, optional_duration},
    shared::Shared,
    stats::{Counter, Gauge, Histogram, Scope},
};

/// Envoy's limits of `fill_interval`.
const INTERVALS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(20)..=Duration::from_secs(1);

/// A limit: the filter's, or a route's in its place.
#[derive(Debug)]
pub struct BandwidthLimit {
    request: bool,
    response: bool,
    kbps: u64,
    interval: Duration,
    enabled: Flag,
    trailers: Option<Arc<TrailerNames>>,
    /// For both directions of all streams.
    bucket: Arc<TokenBucket>,
    /// A stream has come, from which on the bucket counts.
    begun: AtomicBool,
    stats: Arc<[DirectionStats; 2]>,
}

/// What is counted in `STAT_PREFIX.http_bandwidth_limit.`, for one direction.
#[derive(Debug)]
struct DirectionStats {
    enabled: Counter,
    enforced: Counter,
    pending: Gauge,
    incoming_size: Gauge,
    incoming_total: Counter,
    allowed_size: Gauge,
    allowed_total: Counter,
    duration: Histogram,
}

#[derive(Debug)]
struct TrailerNames {
    request_delay: Name,
    response_delay: Name,
    request_filter_delay: Name,
    response_filter_delay: Name,
}

/// What the body of a request cost, for the trailers of its response.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// From its first byte to its last.
    whole: Duration,
    /// Of it, waiting for tokens.
    waiting: Duration,
}

/// Where the spent time of a stream's request is written down.
pub(crate) type SharedSpent = Rc<Cell<Spent>>;

impl BandwidthLimit {
    /// Compiles the filter, or a route's configuration of it, which must name a limit.
    ///
    /// # Errors
    /// When something is invalid.
    pub fn compile(
        config: &LimitProto,
        shared: &Shared,
        route: bool,
    ) -> Result<BandwidthLimit, ConfigError> {
        if config.stat_prefix.is_empty() {
            return Err(invalid("stat_prefix", "absent"));
        }
        let kbps = match config.limit_kbps {
            Some(limit) if limit.value == 0 => {
                return Err(invalid("limit_kbps", "must be at least 1"));
            }
            Some(limit) => limit.value,
            None if route => return Err(invalid("limit_kbps", "a route must give one")),
            None => u64::MAX,
        };
        let interval = optional_duration("fill_interval", config.fill_interval.as_ref())?
            .unwrap_or(pace::INTERVAL);
        if !INTERVALS.contains(&interval) {
            return Err(invalid("fill_interval", "not between 20 ms and 1 s"));
        }
        let mode = config.enable_mode();
        let prefix = format!("{}.http_bandwidth_limit.", config.stat_prefix);
        let scope = shared.stats.scope(&prefix);
        Ok(BandwidthLimit {
            request: matches!(mode, EnableMode::Request | EnableMode::RequestAndResponse),
            response: matches!(mode, EnableMode::Response | EnableMode::RequestAndResponse),
            kbps,
            interval,
            enabled: shared.layers.flag(config.runtime_enabled.as_ref(), true),
            trailers: config
                .enable_response_trailers
                .then(|| Arc::new(TrailerNames::new(&config.response_trailer_prefix))),
            bucket: Arc::new(pace::bucket(kbps, interval)),
            begun: AtomicBool::new(false),
            stats: Arc::new(["request", "response"].map(|side| DirectionStats::new(&scope, side))),
        })
    }

    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
        body: &mut Body,
    ) {
        let own = match cx.config(head) {
            Some(RouteFilterConfig::BandwidthLimit(own)) => Some(own.clone()),
            _ => None,
        };
        let limit = own.as_deref().unwrap_or(self);
        if limit.request && limit.enabled.is_on() {
            let spent = SharedSpent::default();
            cx.state.bandwidth = Some(spent.clone());
            limit.pace(0, body, spent, None);
        }
    }

    pub(super) fn on_response(
        &self,
        own: Option<&RouteFilterConfig>,
        state: &FilterState,
        body: &mut Body,
    ) {
        let limit = match own {
            Some(RouteFilterConfig::BandwidthLimit(own)) => own,
            _ => self,
        };
        if limit.response && limit.enabled.is_on() {
            let request = state.bandwidth.clone().unwrap_or_default();
            let trailers = limit.trailers.clone().map(|names| (names, request));
            limit.pace(1, body, SharedSpent::default(), trailers);
        }
    }

    fn pace(
        &self,
        direction: usize,
        body: &mut Body,
        spent: SharedSpent,
        trailers: Option<(Arc<TrailerNames>, SharedSpent)>,
    ) {
        let Some(stats) = self.stats.get(direction) else {
            return;
        };
        stats.enabled.inc();
        if !self.begun.swap(true, Relaxed) {
            self.bucket
                .leave(pace::of_interval(self.kbps, self.interval));
        }
        if body.is_end_stream() {
            return;
        }
        let watch = Watch {
            stats: self.stats.clone(),
            direction,
            interval: self.interval,
            began: None,
            spent,
            trailers,
        };
        let whole = std::mem::take(body);
        *body = pace::pace(whole, self.bucket.clone(), self.interval, watch);
    }
}

impl DirectionStats {
    fn new(scope: &Scope, side: &str) -> DirectionStats {
        let counter = |name: &str| scope.counter(&format!("{side}_{name}"));
        let gauge = |name: &str| scope.gauge(&format!("{side}_{name}"));
        DirectionStats {
            enabled: counter("enabled"),
            enforced: counter("enforced"),
            pending: gauge("pending"),
            incoming_size: gauge("incoming_size"),
            incoming_total: counter("incoming_total_size"),
            allowed_size: gauge("allowed_size"),
            allowed_total: counter("allowed_total_size"),
            duration: scope.histogram(&format!("{side}_transfer_duration")),
        }
    }
}

impl TrailerNames {
    fn new(prefix: &str) -> TrailerNames {
        let name = |name: &str| match prefix {
            "" => Name::new(name),
            prefix => Name::new(format!("{prefix}-{name}").to_ascii_lowercase()),
        };
        TrailerNames {
            request_delay: name("bandwidth-request-delay-ms"),
            response_delay: name("bandwidth-response-delay-ms"),
            request_filter_delay: name("bandwidth-request-filter-delay-ms"),
            response_filter_delay: name("bandwidth-response-filter-delay-ms"),
        }
    }

    /// Delays of less than a millisecond are not told of.
    fn write(&self, request: Spent, response: Spent, trailers: &mut Option<Headers>) {
        for (name, time) in [
            (&self.request_delay, request.whole),
            (&self.request_filter_delay, request.waiting),
            (&self.response_delay, response.whole),
            (&self.response_filter_delay, response.waiting),
        ] {
            let ms = time.as_millis();
            if ms > 0 {
                let trailers = trailers.get_or_insert_default();
                trailers.set(name.clone(), ms.to_string());
            }
        }
    }
}

/// Counts one body.
struct Watch {
    stats: Arc<[DirectionStats; 2]>,
    direction: usize,
    interval: Duration,
    /// When its first bytes came.
    began: Option<Instant>,
    spent: SharedSpent,
    /// Names of the trailers to add, and what the request cost.
    trailers: Option<(Arc<TrailerNames>, SharedSpent)>,
}

impl Watch {
    fn stats(&self) -> Option<&DirectionStats> {
        self.stats.get(self.direction)
    }

    /// The body is not pending any more, if it was.
    fn finish(&mut self) -> Option<Duration> {
        let began = self.began.take()?;
        self.stats()?.pending.dec();
        Some(clock::now().saturating_duration_since(began))
    }
}

impl pace::Watch for Watch {
    fn arrived(&mut self, bytes: usize) {
        let first = self.began.is_none();
        if first {
            self.began = Some(clock::now());
        }
        if let Some(stats) = self.stats() {
            if first {
                stats.pending.inc();
            }
            stats.incoming_size.set(bytes as u64);
            stats.incoming_total.add(bytes as u64);
        }
    }

    fn passes(&mut self, bytes: u64, others_wait: bool) {
        if let Some(stats) = self.stats() {
            stats.allowed_size.set(bytes);
            stats.allowed_total.add(bytes);
            if others_wait {
                stats.enforced.inc();
                let mut spent = self.spent.get();
                spent.waiting += self.interval;
                self.spent.set(spent);
            }
        }
    }

    fn ended(&mut self, trailers: &mut Option<Headers>) {
        let Some(whole) = self.finish() else { return };
        let spent = Spent {
            whole,
            ..self.spent.get()
        };
        self.spent.set(spent);
        if let Some(stats) = self.stats() {
            let ms = u64::try_from(whole.as_millis()).unwrap_or(u64::MAX);
            stats.duration.record(ms);
        }
        if let Some((names, request)) = &self.trailers {
            names.write(request.get(), spent, trailers);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The stream ended before its body.
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailers_tell_what_each_direction_cost() {
        let spent = |whole, waiting| Spent {
            whole: Duration::from_millis(whole),
            waiting: Duration::from_millis(waiting),
        };
        let written = |prefix: &str, request, response| {
            let mut trailers = None;
            TrailerNames::new(prefix).write(request, response, &mut trailers);
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let trailers = trailers.iter().flat_map(Headers::iter);
            trailers
                .map(|(name, value)| format!("{}: {}", text(name.as_bytes()), text(value)))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            written("", spent(0, 0), spent(3, 0)),
            ["bandwidth-response-delay-ms: 3"]
        );
        assert_eq!(
            written("Pre", spent(7, 5), spent(30, 20)),
            [
                "pre-bandwidth-request-delay-ms: 7",
                "pre-bandwidth-request-filter-delay-ms: 5",
                "pre-bandwidth-response-delay-ms: 30",
                "pre-bandwidth-response-filter-delay-ms: 20",
            ]
        );
    }
}
