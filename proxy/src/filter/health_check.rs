//! Answers health checks in the upstream's place, or caches the upstream's answers. Envoy:
//! `envoy.filters.http.health_check`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lateen_protocols::envoy::envoy::extensions::filters::http::health_check::v3::HealthCheck as HealthProto;
use tokio::time::Instant;

use crate::{
    config_error::ConfigError,
    filter::{FilterContext, FilterState, ResponseContext},
    head::{Name, RequestHead, ResponseHead},
    info::ResponseFlags,
    proto::{duration, invalid},
    reject::Reject,
    route::matcher::HeaderMatch,
    shared::Shared,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct HealthCheck {
    pass_through: bool,
    headers: Vec<HeaderMatch>,
    /// Sorted by name.
    clusters: Vec<(String, f64)>,
    cache: Option<Cache>,
}

/// The upstream's last answer.
#[derive(Debug)]
struct Cache {
    time: Duration,
    answer: Mutex<Option<(Instant, u16)>>,
}

/// A request that is a health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// We answered it.
    Answered,
    /// The upstream did.
    Passed,
}

impl HealthCheck {
    /// Compiles the filter.
    ///
    /// # Errors
    /// A field is absent, not valid or does not go with the mode.
    pub fn compile(config: &HealthProto) -> Result<HealthCheck, ConfigError> {
        let pass_through = config
            .pass_through_mode
            .as_ref()
            .ok_or_else(|| invalid("pass_through_mode", "absent"))?
            .value;
        let time = config
            .cache_time
            .as_ref()
            .map(|time| duration("cache_time", time))
            .transpose()?
            .filter(|time| !time.is_zero());
        if time.is_some() && !pass_through {
            return Err(invalid("cache_time", "goes with pass_through_mode only"));
        }
        if pass_through && !config.cluster_min_healthy_percentages.is_empty() {
            return Err(invalid(
                "cluster_min_healthy_percentages",
                "goes without pass_through_mode only",
            ));
        }
        let mut clusters: Vec<_> = config
            .cluster_min_healthy_percentages
            .iter()
            .map(|(name, percent)| (name.clone(), percent.value))
            .collect();
        clusters.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(HealthCheck {
            pass_through,
            headers: config
                .headers
                .iter()
                .map(HeaderMatch::compile)
                .collect::<Result<_, _>>()?,
            clusters,
            cache: time.map(|time| Cache {
                time,
                answer: Mutex::new(None),
            }),
        })
    }

    /// Answers the request if it is a health check that does not go on.
    ///
    /// # Errors
    /// The answer.
    pub(super) fn on_request(
        &self,
        cx: &mut FilterContext<'_>,
        head: &RequestHead,
    ) -> Result<(), Reject> {
        if !self.headers.iter().all(|header| header.matches(head)) {
            return Ok(());
        }
        cx.info.borrow_mut().health_check = true;
        let failing = cx.shared.drain.is_health_check_failing();
        let cached = self.cache.as_ref().and_then(Cache::get);
        if self.pass_through && !failing && cached.is_none() {
            cx.state.health_check = Some(Check::Passed);
            return Ok(());
        }
        cx.state.health_check = Some(Check::Answered);
        let (status, details) = match cached {
            _ if failing => (503, "health_check_failed"),
            Some(status) => (status, "health_check_cached"),
            None => self.of_clusters(cx.shared),
        };
        let flags = if (200..300).contains(&status) {
            ResponseFlags::default()
        } else {
            ResponseFlags::FAILED_LOCAL_HEALTH_CHECK
        };
        Err(Reject::new(status, "", flags, details))
    }

    fn of_clusters(&self, shared: &Arc<Shared>) -> (u16, &'static str) {
        for (name, least) in &self.clusters {
            let Some(cluster) = shared.clusters.get(name) else {
                return (503, "health_check_failed_no_cluster_found");
            };
            let stats = &cluster.stats;
            let total = stats.membership_total.value();
            let healthy = stats.membership_healthy.value() + stats.membership_degraded.value();
            if total == 0 {
                if *least == 0.0 {
                    continue;
                }
                return (503, "health_check_failed_cluster_empty");
            }
            #[allow(clippy::cast_precision_loss, reason = "far below 2^52 hosts")]
            if 100.0 * (healthy as f64) < (total as f64) * least {
                return (503, "health_check_failed_cluster_unhealthy");
            }
        }
        (200, "health_check_ok")
    }

    pub(super) fn on_response(
        &self,
        cx: &ResponseContext<'_>,
        state: &FilterState,
        head: &mut ResponseHead,
    ) {
        if let Some(check) = state.health_check {
            if let (Check::Passed, Some(cache)) = (check, &self.cache) {
                cache.put(head.status);
            }
            head.headers.set(
                Name::new("x-envoy-upstream-healthchecked-cluster"),
                &cx.shared.node.cluster,
            );
        }
        if cx.shared.drain.is_health_check_failing() {
            head.headers
                .set(Name::new("x-envoy-immediate-health-check-fail"), "true");
        }
    }
}

impl Cache {
    fn get(&self) -> Option<u16> {
        let answer = *self.lock();
        answer
            .filter(|(until, _)| Instant::now() < *until)
            .map(|(_, status)| status)
    }

    fn put(&self, status: u16) {
        *self.lock() = Some((Instant::now() + self.time, status));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Instant, u16)>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
