//! Refuses a share of the requests while too few succeed, so that an upstream in trouble gets less of it.
//! Envoy: `envoy.filters.http.admission_control`. Each worker goes by what it has seen itself.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lateen_protocols::envoy::envoy::{
    config::core::v3 as core,
    extensions::filters::http::admission_control::v3::{
        AdmissionControl as FilterProto,
        admission_control::{EvaluationCriteria, SuccessCriteria},
    },
};
use tokio::time::Instant;

use crate::{
    clock,
    config_error::ConfigError,
    filter::{FilterContext, FilterState},
    format::{Facts, grpc_status},
    head::{Known, ResponseHead},
    info::ResponseFlags,
    layers::{Decimal, Flag, RuntimeLayers},
    proto::{invalid, optional_duration},
    reject::Reject,
    stats::{Counter, Scope},
};

/// Envoy: `defaultSamplingWindow`.
const DEFAULT_WINDOW: Duration = Duration::from_secs(30);
/// What is counted together. Envoy: `defaultHistoryGranularity`.
const SAMPLE: Duration = Duration::from_secs(1);
/// gRPC statuses that are failures unless something else is said. Envoy: `SuccessCriteriaEvaluator`.
const GRPC_FAILURES: [i32; 6] = [4, 8, 10, 13, 14, 15];

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// What this worker's requests came to, by filter. Those of filters that are gone leave with the next new one.
    static WINDOWS: RefCell<HashMap<u64, (Weak<()>, Window)>> = RefCell::default();
}

/// The filter of one connection manager.
#[derive(Debug)]
pub struct AdmissionControl {
    id: u64,
    alive: Arc<()>,
    enabled: Flag,
    window: Duration,
    aggression: Decimal,
    /// In percent.
    threshold: Decimal,
    least_rps: Decimal,
    /// In percent.
    most_rejected: Decimal,
    criteria: Criteria,
    success: Counter,
    failure: Counter,
    rejected: Counter,
}

/// What counts as success.
#[derive(Debug, PartialEq, Eq)]
struct Criteria {
    http: Vec<Range<i32>>,
    /// `None`: all but [`GRPC_FAILURES`].
    grpc: Option<Vec<u32>>,
}

/// What is still to be counted of a request that was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    Response,
    /// They tell the status of the gRPC call.
    Trailers,
}

/// What the requests of the last seconds came to.
#[derive(Debug, Default)]
struct Window {
    /// Those of a second each, the oldest first: when it began.
    samples: VecDeque<(Instant, Count)>,
    all: Count,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    requests: u32,
    successes: u32,
}

impl AdmissionControl {
    /// Compiles the filter; counts in `http.PREFIX.admission_control.`.
    ///
    /// # Errors
    /// When something is invalid, or nothing says what success is.
    pub fn compile(
        config: &FilterProto,
        scope: &Scope,
        layers: &RuntimeLayers,
    ) -> Result<AdmissionControl, ConfigError> {
        let Some(EvaluationCriteria::SuccessCriteria(criteria)) =
            config.evaluation_criteria.as_ref()
        else {
            return Err(invalid("success_criteria", "absent"));
        };
        let window = optional_duration("sampling_window", config.sampling_window.as_ref())?;
        let threshold = percent("sr_threshold", config.sr_threshold.as_ref(), 95.0, layers)?;
        if config.sr_threshold.is_some() && threshold.1 < 1.0 {
            return Err(invalid("sr_threshold", "cannot be less than 1.0%"));
        }
        let most = config.max_rejection_probability.as_ref();
        let most = percent("max_rejection_probability", most, 80.0, layers)?;
        let aggression = config.aggression.as_ref();
        let least_rps = config.rps_threshold.as_ref();
        let counter = |name: &str| scope.counter(&format!("admission_control.{name}"));
        Ok(AdmissionControl {
            id: NEXT_ID.fetch_add(1, Relaxed),
            alive: Arc::default(),
            enabled: layers.flag(config.enabled.as_ref(), true),
            // Whole seconds count, as in Envoy.
            window: Duration::from_secs(window.unwrap_or(DEFAULT_WINDOW).as_secs()),
            aggression: layers.decimal(
                aggression.map_or("", |value| &value.runtime_key),
                aggression.map_or(1.0, |value| value.default_value),
            ),
            threshold: threshold.0,
            least_rps: layers.decimal(
                least_rps.map_or("", |value| &value.runtime_key),
                least_rps.map_or(0.0, |value| f64::from(value.default_value)),
            ),
            most_rejected: most.0,
            criteria: Criteria::compile(criteria)?,
            success: counter("rq_success"),
            failure: counter("rq_failure"),
            rejected: counter("rq_rejected"),
        })
    }

    pub(super) fn on_request(&self, cx: &mut FilterContext<'_>) -> Result<(), Reject> {
        if !self.enabled.is_on() || cx.info.borrow().health_check {
            return Ok(());
        }
        let now = clock::now();
        let (count, rps) = self.window(now, |window| (window.all, window.rps(now)));
        if f64::from(rps) >= self.least_rps.value()
            && rand::random_range(0.0..1.0) < self.probability(count)
        {
            self.rejected.inc();
            return Err(Reject::new(
                503,
                "",
                ResponseFlags::default(),
                "denied_by_admission_control",
            ));
        }
        cx.state.admission_control = Some(Awaited::Response);
        Ok(())
    }

    pub(super) fn on_response(&self, state: &mut FilterState, head: &ResponseHead) {
        if state.admission_control != Some(Awaited::Response) {
            return;
        }
        let grpc = head.status == 200
            && head
                .headers
                .known(Known::ContentType)
                .is_some_and(is_grpc_type);
        let success = match (grpc, grpc_status(&head.headers)) {
            (true, Some(status)) => self.criteria.takes_grpc(status),
            (true, None) => {
                state.admission_control = Some(Awaited::Trailers);
                return;
            }
            (false, _) => self.criteria.takes_http(head.status),
        };
        state.admission_control = None;
        self.record(success);
    }

    /// Counts a call whose status came with the trailers. Those that end without are not counted.
    pub(super) fn on_complete(&self, state: &FilterState, facts: &Facts<'_>) {
        if state.admission_control == Some(Awaited::Trailers)
            && let Some(trailers) = facts.trailers
        {
            let status = grpc_status(trailers);
            self.record(status.is_some_and(|status| self.criteria.takes_grpc(status)));
        }
    }

    fn record(&self, success: bool) {
        match success {
            true => self.success.inc(),
            false => self.failure.inc(),
        }
        self.window(clock::now(), |window| window.record(success));
    }

    /// This worker's window, brought up to the time.
    fn window<T>(&self, now: Instant, see: impl FnOnce(&mut Window) -> T) -> T {
        WINDOWS.with_borrow_mut(|windows| {
            if !windows.contains_key(&self.id) {
                windows.retain(|_, (alive, _)| alive.strong_count() > 0);
            }
            let (_, window) = windows
                .entry(self.id)
                .or_insert_with(|| (Arc::downgrade(&self.alive), Window::default()));
            window.advance(now, self.window);
            see(window)
        })
    }

    /// The chance of a refusal. Google's Site Reliability Engineering, "Handling Overload".
    fn probability(&self, count: Count) -> f64 {
        let requests = f64::from(count.requests);
        let threshold = (self.threshold.value() / 100.0).min(1.0);
        let excess = requests - f64::from(count.successes) / threshold;
        let chance = (excess / (requests + 1.0)).max(0.0);
        let aggression = self.aggression.value().max(1.0);
        let most = (self.most_rejected.value() / 100.0).min(1.0);
        chance.powf(1.0 / aggression).min(most)
    }
}

/// The number and its default.
fn percent(
    field: &str,
    value: Option<&core::RuntimePercent>,
    default: f64,
    layers: &RuntimeLayers,
) -> Result<(Decimal, f64), ConfigError> {
    let own = value.and_then(|value| value.default_value);
    // Envoy: of a percentage that is there without a value, the value is 0.
    let absent = if value.is_some() { 0.0 } else { default };
    let default = own.map_or(absent, |percent| percent.value);
    if !(0.0..=100.0).contains(&default) {
        return Err(invalid(field, "is not between 0 and 100"));
    }
    let key = value.map_or("", |value| &value.runtime_key);
    Ok((layers.decimal(key, default), default))
}

fn is_grpc_type(kind: &[u8]) -> bool {
    kind.strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

impl Criteria {
    fn compile(criteria: &SuccessCriteria) -> Result<Criteria, ConfigError> {
        let http = match criteria.http_criteria.as_ref() {
            // As Envoy: all but the server's errors.
            None => std::iter::once(100..500).collect(),
            Some(http) => {
                let ranges = http.http_success_status.iter();
                ranges
                    .map(|range| {
                        if range.start > range.end || range.start < 100 || range.end > 600 {
                            return Err(invalid(
                                "http_success_status",
                                format!("invalid HTTP range: [{}, {})", range.start, range.end),
                            ));
                        }
                        Ok(range.start..range.end)
                    })
                    .collect::<Result<Vec<_>, _>>()?
            }
        };
        let grpc = criteria.grpc_criteria.as_ref();
        let grpc = grpc.map(|grpc| grpc.grpc_success_status.clone());
        if http.is_empty() || grpc.as_ref().is_some_and(Vec::is_empty) {
            return Err(invalid("success_criteria", "a list of statuses is empty"));
        }
        if grpc.iter().flatten().any(|status| *status > 16) {
            return Err(invalid("grpc_success_status", "is greater than 16"));
        }
        Ok(Criteria { http, grpc })
    }

    fn takes_http(&self, status: u16) -> bool {
        let mut ranges = self.http.iter();
        ranges.any(|range| range.contains(&i32::from(status)))
    }

    fn takes_grpc(&self, status: i32) -> bool {
        match &self.grpc {
            Some(list) => u32::try_from(status).is_ok_and(|status| list.contains(&status)),
            None => (0..=16).contains(&status) && !GRPC_FAILURES.contains(&status),
        }
    }
}

impl Window {
    /// Forgets what is older than the window.
    fn advance(&mut self, now: Instant, length: Duration) {
        while let Some((began, count)) = self.samples.front()
            && now.saturating_duration_since(*began) >= length
        {
            self.all.requests -= count.requests;
            self.all.successes -= count.successes;
            self.samples.pop_front();
        }
        let newest = self.samples.back();
        if newest.is_none_or(|(began, _)| now.saturating_duration_since(*began) >= SAMPLE) {
            self.samples.push_back((now, Count::default()));
        }
    }

    fn record(&mut self, success: bool) {
        let newest = self.samples.back_mut().map(|(_, count)| count);
        for count in newest.into_iter().chain([&mut self.all]) {
            count.requests += 1;
            count.successes += u32::from(success);
        }
    }

    /// Requests a second, on average.
    fn rps(&self, now: Instant) -> u32 {
        let age = self.samples.front().map_or(0, |(began, _)| {
            now.saturating_duration_since(*began).as_secs()
        });
        self.all.requests / u32::try_from(age.max(1)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(yaml: &str) -> Result<AdmissionControl, ConfigError> {
        let proto: FilterProto = lateen_protocols::json::from_yaml(yaml).unwrap();
        let scope = crate::stats::Registry::new().scope("t.");
        AdmissionControl::compile(&proto, &scope, &RuntimeLayers::default())
    }

    #[test]
    fn the_chance_of_a_refusal_is_envoys() {
        let of = |yaml: &str, requests, successes| {
            compile(yaml).unwrap().probability(Count {
                requests,
                successes,
            })
        };
        let plain = "{success_criteria: {}, sr_threshold: {default_value: {value: 50}}}";
        assert_eq!(of(plain, 0, 0), 0.0);
        assert_eq!(of(plain, 100, 50), 0.0);
        assert_eq!(of(plain, 99, 0), 0.8);
        assert_eq!(of(plain, 99, 25), 0.49);
        let bold = "{success_criteria: {}, sr_threshold: {default_value: {value: 50}}, \
                    aggression: {default_value: 2}, max_rejection_probability: {default_value: {value: 100}}}";
        assert_eq!(of(bold, 99, 25), 0.7);
        assert_eq!(of(bold, 99, 0), 0.99_f64.sqrt());
    }

    #[tokio::test(start_paused = true)]
    async fn seconds_leave_the_window_whole() {
        let length = Duration::from_secs(3);
        let mut window = Window::default();
        for success in [true, false, false] {
            let now = Instant::now();
            window.advance(now, length);
            window.record(success);
            tokio::time::advance(Duration::from_millis(1500)).await;
        }
        // At 4.5 s the first two, of 0 s and 1.5 s, are gone.
        window.advance(Instant::now(), length);
        let last = Count {
            requests: 1,
            successes: 0,
        };
        assert_eq!(window.all, last);
        assert_eq!(window.rps(Instant::now()), 1);
        tokio::time::advance(Duration::from_secs(9)).await;
        window.advance(Instant::now(), length);
        assert_eq!((window.all, window.samples.len()), (Count::default(), 1));
        assert_eq!(window.rps(Instant::now()), 0);
    }

    #[test]
    fn success_is_what_is_configured() {
        let plain = compile("success_criteria: {}").unwrap().criteria;
        assert!(plain.takes_http(499) && !plain.takes_http(500));
        assert!(plain.takes_grpc(2) && !plain.takes_grpc(14) && !plain.takes_grpc(17));
        let own = "success_criteria: {http_criteria: {http_success_status: [{start: 200, end: 201}]}, \
                   grpc_criteria: {grpc_success_status: [14]}}";
        let own = compile(own).unwrap().criteria;
        assert!(own.takes_http(200) && !own.takes_http(201));
        assert!(own.takes_grpc(14) && !own.takes_grpc(0));
        for bad in [
            "{}",
            "success_criteria: {http_criteria: {}}",
            "success_criteria: {grpc_criteria: {}}",
            "success_criteria: {grpc_criteria: {grpc_success_status: [17]}}",
            "success_criteria: {http_criteria: {http_success_status: [{start: 300, end: 200}]}}",
            "{success_criteria: {}, sr_threshold: {default_value: {value: 0.5}}}",
            "{success_criteria: {}, max_rejection_probability: {default_value: {value: 101}}}",
        ] {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }
}
