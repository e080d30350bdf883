//! Outlier detection: taking hosts out of service by what requests to them came to.
//!
//! Workers count results with atomics on the host ([`Detector::record`]); ejecting and returning hosts
//! is done on the main runtime ([`Detector::eject`], [`Detector::tick`]), under the cluster's lock.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use lateen_protocols::envoy::{
    envoy::config::cluster::v3::OutlierDetection, google::protobuf as pb,
};
use tokio::time::Instant;

use crate::{
    config_error::ConfigError,
    proto::{invalid, optional_duration},
    stats::{LazyCounter, Scope, instruments},
};

/// What a request or connection came to, as outlier detection sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The host answered with this status.
    Status(u16),
    /// The connection was made.
    Connected,
    /// The connection could not be made, or broke before an answer.
    Failed,
    /// No answer in time.
    TimedOut,
}

/// Why a host is an outlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Server errors in a row.
    Consecutive5xx,
    /// Gateway errors in a row.
    ConsecutiveGatewayFailure,
    /// Failures to reach it in a row.
    ConsecutiveLocalOriginFailure,
    /// Succeeds much less often than its neighbours.
    SuccessRate,
    /// Fails more often than allowed.
    FailurePercentage,
}

impl Cause {
    /// How many there are.
    const COUNT: usize = Cause::FailurePercentage as usize + 1;
}

/// What is remembered of one host.
#[derive(Debug, Default)]
pub struct Monitor {
    consecutive_5xx: AtomicU32,
    consecutive_gateway: AtomicU32,
    consecutive_local: AtomicU32,
    /// Requests and successes since the last tick.
    total: AtomicU32,
    successes: AtomicU32,
    ejected: AtomicBool,
    ejection: Mutex<Ejection>,
}

#[derive(Debug, Default)]
struct Ejection {
    since: Option<Instant>,
    /// Multiplies the base time; grows with each ejection, shrinks with each good interval.
    backoff: u32,
    count: u32,
}

impl Monitor {
    /// Whether the host is out of service.
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }

    /// How often it was taken out.
    pub fn ejections(&self) -> u32 {
        self.ejection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .count
    }

    fn reset(&self) {
        for counter in [
            &self.consecutive_5xx,
            &self.consecutive_gateway,
            &self.consecutive_local,
        ] {
            counter.store(0, Relaxed);
        }
    }
}

instruments! {
    struct Stats {
        gauge { active = "outlier_detection.ejections_active" }
        counter {
            total = "outlier_detection.ejections_total",
            enforced_total = "outlier_detection.ejections_enforced_total",
            overflow = "outlier_detection.ejections_overflow",
            detected_5xx = "outlier_detection.ejections_detected_consecutive_5xx",
            detected_gateway = "outlier_detection.ejections_detected_consecutive_gateway_failure",
            detected_local = "outlier_detection.ejections_detected_consecutive_local_origin_failure",
            detected_rate = "outlier_detection.ejections_detected_success_rate",
            detected_percentage = "outlier_detection.ejections_detected_failure_percentage",
            enforced_5xx = "outlier_detection.ejections_enforced_consecutive_5xx",
            enforced_gateway = "outlier_detection.ejections_enforced_consecutive_gateway_failure",
            enforced_local = "outlier_detection.ejections_enforced_consecutive_local_origin_failure",
            enforced_rate = "outlier_detection.ejections_enforced_success_rate",
            enforced_percentage = "outlier_detection.ejections_enforced_failure_percentage",
        }
    }
}

impl Stats {
    fn detected(&self, cause: Cause) -> &LazyCounter {
        match cause {
            Cause::Consecutive5xx => &self.detected_5xx,
            Cause::ConsecutiveGatewayFailure => &self.detected_gateway,
            Cause::ConsecutiveLocalOriginFailure => &self.detected_local,
            Cause::SuccessRate => &self.detected_rate,
            Cause::FailurePercentage => &self.detected_percentage,
        }
    }

    fn enforced(&self, cause: Cause) -> &LazyCounter {
        match cause {
            Cause::Consecutive5xx => &self.enforced_5xx,
            Cause::ConsecutiveGatewayFailure => &self.enforced_gateway,
            Cause::ConsecutiveLocalOriginFailure => &self.enforced_local,
            Cause::SuccessRate => &self.enforced_rate,
            Cause::FailurePercentage => &self.enforced_percentage,
        }
    }
}

/// The detector of a cluster.
#[derive(Debug)]
pub struct Detector {
    consecutive_5xx: u32,
    consecutive_gateway: u32,
    consecutive_local: u32,
    /// Count failures to reach a host apart from its answers.
    split: bool,
    interval: Duration,
    base_time: Duration,
    max_time: Duration,
    jitter: Duration,
    max_percent: u32,
    always_one: bool,
    enforcing: [u32; Cause::COUNT],
    success_rate_hosts: u32,
    success_rate_volume: u32,
    success_rate_stdev: f64,
    failure_threshold: u32,
    failure_hosts: u32,
    failure_volume: u32,
    stats: Arc<Stats>,
}

impl Detector {
    /// Compiles the settings; statistics go under `outlier_detection.` in the cluster's scope.
    ///
    /// # Errors
    /// When something is invalid or not supported.
    pub fn compile(config: &OutlierDetection, scope: &Scope) -> Result<Detector, ConfigError> {
        Detector::read(config, scope).map_err(|error| error.within("outlier_detection"))
    }

    fn read(config: &OutlierDetection, scope: &Scope) -> Result<Detector, ConfigError> {
        if !config.monitors.is_empty() {
            return Err(invalid("monitors", "not supported"));
        }
        if config
            .detect_degraded_hosts
            .as_ref()
            .is_some_and(|on| on.value)
        {
            return Err(invalid("detect_degraded_hosts", "not supported"));
        }
        let or =
            |value: &Option<pb::UInt32Value>, default| value.as_ref().map_or(default, |v| v.value);
        let time = |path, value: &Option<pb::Duration>, default| {
            optional_duration(path, value.as_ref()).map(|given| given.unwrap_or(default))
        };
        let base_time = time(
            "base_ejection_time",
            &config.base_ejection_time,
            Duration::from_secs(30),
        )?;
        let interval = time("interval", &config.interval, Duration::from_secs(10))?;
        if interval.is_zero() {
            return Err(invalid("interval", "must be positive"));
        }
        Ok(Detector {
            consecutive_5xx: or(&config.consecutive_5xx, 5),
            consecutive_gateway: or(&config.consecutive_gateway_failure, 5),
            consecutive_local: or(&config.consecutive_local_origin_failure, 5),
            split: config.split_external_local_origin_errors,
            interval,
            base_time,
            max_time: time(
                "max_ejection_time",
                &config.max_ejection_time,
                Duration::from_secs(300),
            )?
            .max(base_time),
            jitter: time(
                "max_ejection_time_jitter",
                &config.max_ejection_time_jitter,
                Duration::ZERO,
            )?,
            max_percent: or(&config.max_ejection_percent, 10).min(100),
            always_one: config
                .always_eject_one_host
                .as_ref()
                .is_some_and(|on| on.value),
            enforcing: [
                or(&config.enforcing_consecutive_5xx, 100),
                or(&config.enforcing_consecutive_gateway_failure, 0),
                or(&config.enforcing_consecutive_local_origin_failure, 100),
                or(&config.enforcing_success_rate, 100),
                or(&config.enforcing_failure_percentage, 0),
            ],
            success_rate_hosts: or(&config.success_rate_minimum_hosts, 5),
            success_rate_volume: or(&config.success_rate_request_volume, 100),
            success_rate_stdev: f64::from(or(&config.success_rate_stdev_factor, 1900)) / 1000.0,
            failure_threshold: or(&config.failure_percentage_threshold, 85),
            failure_hosts: or(&config.failure_percentage_minimum_hosts, 5),
            failure_volume: or(&config.failure_percentage_request_volume, 50),
            stats: scope.group(),
        })
    }

    /// How often [`Detector::tick`] wants to be called.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Counts a result; `Some` when the host should now be ejected. For workers.
    pub fn record(&self, monitor: &Monitor, outcome: Outcome) -> Option<Cause> {
        let status = match outcome {
            Outcome::Status(status) => status,
            Outcome::Connected => {
                if self.split {
                    monitor.consecutive_local.store(0, Relaxed);
                }
                return None;
            }
            Outcome::Failed | Outcome::TimedOut if self.split => {
                return hit(&monitor.consecutive_local, self.consecutive_local)
                    .then_some(Cause::ConsecutiveLocalOriginFailure);
            }
            Outcome::Failed => 503,
            Outcome::TimedOut => 504,
        };
        monitor.total.fetch_add(1, Relaxed);
        if status < 500 {
            monitor.successes.fetch_add(1, Relaxed);
            monitor.consecutive_5xx.store(0, Relaxed);
            monitor.consecutive_gateway.store(0, Relaxed);
            return None;
        }
        let gateway = if (502..=504).contains(&status) {
            hit(&monitor.consecutive_gateway, self.consecutive_gateway)
        } else {
            monitor.consecutive_gateway.store(0, Relaxed);
            false
        };
        // The gateway cause goes first only if it is enforced, else it would hide the other.
        let server = hit(&monitor.consecutive_5xx, self.consecutive_5xx);
        match (server, gateway) {
            (true, _) => Some(Cause::Consecutive5xx),
            (false, true) => Some(Cause::ConsecutiveGatewayFailure),
            (false, false) => None,
        }
    }

    /// Takes a host out of service if the rules allow it; whether it did. `all` are the cluster's hosts.
    pub fn eject(&self, cause: Cause, host: &Monitor, all: &[&Monitor]) -> bool {
        if host.is_ejected() {
            return false;
        }
        let ejected = all.iter().filter(|monitor| monitor.is_ejected()).count();
        let share = (ejected + 1) as u64 * 100;
        let fits = share <= u64::from(self.max_percent) * all.len() as u64;
        let allowed = fits || (self.always_one && ejected == 0);
        self.stats.detected(cause).inc();
        // Counting starts again whether or not the host leaves, so that it is judged anew.
        host.reset();
        if !allowed {
            self.stats.overflow.inc();
            return false;
        }
        if rand::random_range(0..100) >= self.enforcing[cause as usize] {
            return false;
        }
        let mut ejection = host.ejection.lock().unwrap_or_else(PoisonError::into_inner);
        ejection.since = Some(Instant::now());
        ejection.count += 1;
        if self.base_time.saturating_mul(ejection.backoff) < self.max_time + self.base_time {
            ejection.backoff += 1;
        }
        drop(ejection);
        host.ejected.store(true, Relaxed);
        self.stats.total.inc();
        self.stats.enforced_total.inc();
        self.stats.enforced(cause).inc();
        self.stats.active.set(ejected as u64 + 1);
        true
    }

    /// The periodic work: returns hosts whose time is over and ejects by success rate. Whether anything
    /// changed.
    pub fn tick(&self, all: &[&Monitor]) -> bool {
        let mut changed = false;
        for monitor in all {
            let mut ejection = monitor
                .ejection
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if !monitor.is_ejected() {
                ejection.backoff = ejection.backoff.saturating_sub(1);
                continue;
            }
            let mut time = self
                .base_time
                .saturating_mul(ejection.backoff)
                .min(self.max_time);
            if !self.jitter.is_zero() {
                time += self.jitter.mul_f64(rand::random_range(0.0..1.0));
            }
            if ejection.since.is_none_or(|since| since.elapsed() >= time) {
                ejection.since = None;
                monitor.reset();
                monitor.ejected.store(false, Relaxed);
                changed = true;
            }
        }
        changed |= self.judge_rates(all);
        self.settle(all);
        changed
    }

    /// Makes the gauge say how many of these hosts are ejected; after hosts came or went.
    pub fn settle(&self, all: &[&Monitor]) {
        self.stats
            .active
            .set(all.iter().filter(|monitor| monitor.is_ejected()).count() as u64);
    }

    fn judge_rates(&self, all: &[&Monitor]) -> bool {
        let rates: Vec<(&Monitor, u32, f64)> = all
            .iter()
            .map(|monitor| {
                let total = monitor.total.swap(0, Relaxed);
                let successes = monitor.successes.swap(0, Relaxed);
                (
                    *monitor,
                    total,
                    100.0 * f64::from(successes) / f64::from(total.max(1)),
                )
            })
            .collect();
        let mut changed = false;
        let enough = |volume: u32| {
            rates
                .iter()
                .filter(move |(_, total, _)| *total >= volume && *total > 0)
        };
        let judged: Vec<_> = enough(self.success_rate_volume).collect();
        if !judged.is_empty() && judged.len() >= self.success_rate_hosts as usize {
            #[allow(clippy::cast_precision_loss, reason = "a number of hosts")]
            let count = judged.len() as f64;
            let mean = judged.iter().map(|(_, _, rate)| rate).sum::<f64>() / count;
            let variance = judged
                .iter()
                .map(|(_, _, rate)| (rate - mean).powi(2))
                .sum::<f64>()
                / count;
            let least = mean - self.success_rate_stdev * variance.sqrt();
            for (monitor, _, rate) in judged {
                if *rate < least {
                    changed |= self.eject(Cause::SuccessRate, monitor, all);
                }
            }
        }
        let judged: Vec<_> = enough(self.failure_volume).collect();
        if !judged.is_empty() && judged.len() >= self.failure_hosts as usize {
            for (monitor, _, rate) in judged {
                if 100.0 - rate >= f64::from(self.failure_threshold) {
                    changed |= self.eject(Cause::FailurePercentage, monitor, all);
                }
            }
        }
        changed
    }
}

/// Counts one more in a row; true exactly when the threshold is reached.
fn hit(counter: &AtomicU32, threshold: u32) -> bool {
    counter.fetch_add(1, Relaxed).saturating_add(1) == threshold
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Registry;

    fn detector(change: impl FnOnce(&mut OutlierDetection)) -> Detector {
        let mut config = OutlierDetection {
            consecutive_5xx: Some(pb::UInt32Value { value: 3 }),
            max_ejection_percent: Some(pb::UInt32Value { value: 50 }),
            base_ejection_time: Some(pb::Duration {
                seconds: 30,
                nanos: 0,
            }),
            ..OutlierDetection::default()
        };
        change(&mut config);
        Detector::compile(&config, &Registry::new().scope("cluster.a.")).unwrap()
    }

    #[test]
    fn only_errors_in_a_row_count() {
        let detector = detector(|_| {});
        let host = Monitor::default();
        let causes: Vec<_> = [500, 503, 200, 500, 500, 503]
            .map(|status| detector.record(&host, Outcome::Status(status)))
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(causes, [Cause::Consecutive5xx]);
    }

    #[test]
    fn failures_to_connect_count_as_answers_unless_split() {
        let host = Monitor::default();
        let joined = detector(|_| {});
        for _ in 0..2 {
            assert_eq!(joined.record(&host, Outcome::Failed), None);
        }
        assert_eq!(
            joined.record(&host, Outcome::TimedOut),
            Some(Cause::Consecutive5xx)
        );
        let host = Monitor::default();
        let split = detector(|config| {
            config.split_external_local_origin_errors = true;
            config.consecutive_local_origin_failure = Some(pb::UInt32Value { value: 2 });
        });
        assert_eq!(split.record(&host, Outcome::Failed), None);
        assert_eq!(split.record(&host, Outcome::Connected), None);
        assert_eq!(split.record(&host, Outcome::Failed), None);
        assert_eq!(
            split.record(&host, Outcome::Failed),
            Some(Cause::ConsecutiveLocalOriginFailure)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn ejection_lasts_longer_each_time_and_shrinks_when_all_is_well() {
        let detector = detector(|_| {});
        let (bad, good) = (Monitor::default(), Monitor::default());
        let all = [&bad, &good];
        assert!(detector.eject(Cause::Consecutive5xx, &bad, &all));
        assert!(
            !detector.eject(Cause::Consecutive5xx, &good, &all),
            "half is the most"
        );
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(!detector.tick(&all) && bad.is_ejected());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(detector.tick(&all) && !bad.is_ejected());
        assert!(detector.eject(Cause::Consecutive5xx, &bad, &all));
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(!detector.tick(&all));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(detector.tick(&all));
        assert_eq!(bad.ejections(), 2);
        detector.tick(&all);
        detector.tick(&all); // two good intervals: as if never ejected
        assert!(detector.eject(Cause::Consecutive5xx, &bad, &all));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(detector.tick(&all));
    }

    #[test]
    fn one_host_is_ejected_beyond_the_limit_only_when_asked() {
        let host = Monitor::default();
        let strict = detector(|config| config.max_ejection_percent = None);
        assert!(!strict.eject(Cause::Consecutive5xx, &host, &[&host]));
        let lenient = detector(|config| {
            config.max_ejection_percent = None;
            config.always_eject_one_host = Some(pb::BoolValue { value: true });
        });
        assert!(lenient.eject(Cause::Consecutive5xx, &host, &[&host]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_far_below_the_mean_is_ejected() {
        let detector = detector(|config| {
            config.success_rate_stdev_factor = Some(pb::UInt32Value { value: 1500 })
        });
        let hosts: Vec<Monitor> = (0..6).map(|_| Monitor::default()).collect();
        for (index, host) in hosts.iter().enumerate() {
            for n in 0..100 {
                let bad = index == 0 && n % 2 == 0;
                detector.record(host, Outcome::Status(if bad { 500 } else { 200 }));
            }
        }
        let all: Vec<&Monitor> = hosts.iter().collect();
        assert!(detector.tick(&all));
        assert_eq!(
            hosts.iter().map(Monitor::is_ejected).filter(|e| *e).count(),
            1
        );
        assert!(hosts[0].is_ejected());
    }
}
