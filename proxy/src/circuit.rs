//! Circuit breakers: how much a cluster may have open at once, over all workers.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use lateen_protocols::envoy::envoy::config::{
    cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
    core::v3::RoutingPriority,
};

use crate::{
    config_error::ConfigError,
    proto::invalid,
    stats::{Gauge, Scope},
};

/// Envoy's defaults.
const MAX: u32 = 1024;
const MAX_RETRIES: u32 = 3;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Connections.
    Connections,
    /// Requests waiting for a connection.
    Pending,
    /// Requests on a connection.
    Requests,
    /// Retries under way.
    Retries,
}

#[derive(Debug)]
struct Counted {
    max: u32,
    current: AtomicU32,
    open: Gauge,
    remaining: Option<Gauge>,
}

impl Counted {
    fn new(scope: &Scope, max: u32, open: &str, remaining: Option<&str>) -> Counted {
        let remaining = remaining.map(|name| scope.gauge(name));
        if let Some(gauge) = &remaining {
            gauge.set(u64::from(max));
        }
        Counted {
            max,
            current: AtomicU32::new(0),
            open: scope.gauge(open),
            remaining,
        }
    }

    fn try_add(&self, max: u32) -> bool {
        let added = self
            .current
            .fetch_update(Relaxed, Relaxed, |n| (n < max).then(|| n + 1));
        match added {
            Ok(before) => {
                self.changed(before + 1, before + 1 >= max);
                true
            }
            Err(_) => {
                self.open.set(1);
                false
            }
        }
    }

    fn add(&self) {
        let before = self.current.fetch_add(1, Relaxed);
        self.changed(before + 1, before + 1 >= self.max);
    }

    fn release(&self) {
        let before = self.current.fetch_sub(1, Relaxed);
        self.changed(before.saturating_sub(1), before > self.max);
    }

    fn changed(&self, current: u32, open: bool) {
        // Written at the edge only: the gauge is one cache line for all workers.
        if current.abs_diff(self.max) <= 1 {
            self.open.set(u64::from(open));
        }
        if let Some(gauge) = &self.remaining {
            gauge.set(u64::from(self.max.saturating_sub(current)));
        }
    }
}

/// Retries allowed as a share of the requests under way instead of a fixed number.
#[derive(Clone, Copy, Debug)]
struct Budget {
    percent: f64,
    min_concurrency: u32,
}

/// The breakers of one routing priority.
#[derive(Debug)]
pub struct Circuit {
    connections: Counted,
    pending: Counted,
    requests: Counted,
    retries: Counted,
    budget: Option<Budget>,
}

/// A unit of something counted; gives it back on drop.
#[derive(Debug)]
pub struct Permit {
    circuit: Arc<Circuit>,
    resource: Resource,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.circuit.counted(self.resource).release();
    }
}

impl Circuit {
    fn new(thresholds: &Thresholds, scope: &Scope) -> Result<Circuit, ConfigError> {
        let max = |value: Option<u32>, default| value.unwrap_or(default);
        let track = thresholds.track_remaining;
        let name = |name| track.then_some(name);
        let budget = match thresholds.retry_budget.as_ref() {
            None => None,
            Some(budget) => {
                if budget
                    .budget_interval
                    .as_ref()
                    .is_some_and(|d| d.seconds != 0 || d.nanos != 0)
                {
                    return Err(invalid("retry_budget.budget_interval", "not supported"));
                }
                Some(Budget {
                    percent: budget.budget_percent.as_ref().map_or(20.0, |p| p.value),
                    min_concurrency: budget.min_retry_concurrency.as_ref().map_or(3, |n| n.value),
                })
            }
        };
        Ok(Circuit {
            connections: Counted::new(
                scope,
                max(thresholds.max_connections.as_ref().map(|v| v.value), MAX),
                "cx_open",
                name("remaining_cx"),
            ),
            pending: Counted::new(
                scope,
                max(
                    thresholds.max_pending_requests.as_ref().map(|v| v.value),
                    MAX,
                ),
                "rq_pending_open",
                name("remaining_pending"),
            ),
            requests: Counted::new(
                scope,
                max(thresholds.max_requests.as_ref().map(|v| v.value), MAX),
                "rq_open",
                name("remaining_rq"),
            ),
            retries: Counted::new(
                scope,
                max(
                    thresholds.max_retries.as_ref().map(|v| v.value),
                    MAX_RETRIES,
                ),
                "rq_retry_open",
                name("remaining_retries"),
            ),
            budget,
        })
    }

    fn counted(&self, resource: Resource) -> &Counted {
        match resource {
            Resource::Connections => &self.connections,
            Resource::Pending => &self.pending,
            Resource::Requests => &self.requests,
            Resource::Retries => &self.retries,
        }
    }

    /// One unit, unless the breaker is open.
    pub fn try_acquire(self: &Arc<Circuit>, resource: Resource) -> Option<Permit> {
        let counted = self.counted(resource);
        let max = match (resource, self.budget) {
            (Resource::Retries, Some(budget)) => self.retry_budget(budget),
            _ => counted.max,
        };
        counted.try_add(max).then(|| Permit {
            circuit: self.clone(),
            resource,
        })
    }

    /// One unit beyond any limit: the one connection that keeps waiting requests from waiting for ever.
    pub fn acquire_beyond(self: &Arc<Circuit>, resource: Resource) -> Permit {
        self.counted(resource).add();
        Permit {
            circuit: self.clone(),
            resource,
        }
    }

    /// How many units are out.
    pub fn current(&self, resource: Resource) -> u32 {
        self.counted(resource).current.load(Relaxed)
    }

    /// How many units there may be.
    pub fn max(&self, resource: Resource) -> u32 {
        self.counted(resource).max
    }

    fn retry_budget(&self, budget: Budget) -> u32 {
        let active = self
            .current(Resource::Requests)
            .saturating_add(self.current(Resource::Pending));
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float to integer cast saturates"
        )]
        let share = (f64::from(active) * budget.percent / 100.0) as u32;
        share.max(budget.min_concurrency)
    }
}

/// The breakers of a cluster, by routing priority.
#[derive(Debug)]
pub struct Circuits {
    default: Arc<Circuit>,
    high: Arc<Circuit>,
}

impl Circuits {
    /// Compiles the thresholds of a cluster; gauges go under `circuit_breakers.` in its scope.
    ///
    /// # Errors
    /// When something is not supported.
    pub fn compile(
        config: Option<&CircuitBreakers>,
        scope: &Scope,
    ) -> Result<Circuits, ConfigError> {
        let none = CircuitBreakers::default();
        let config = config.unwrap_or(&none);
        if !config.per_host_thresholds.is_empty() {
            return Err(invalid(
                "circuit_breakers.per_host_thresholds",
                "not supported",
            ));
        }
        let of = |priority: RoutingPriority, name: &str| {
            let found = config.thresholds.iter().find(|t| t.priority() == priority);
            let scope = scope.scope(&format!("circuit_breakers.{name}."));
            Circuit::new(found.unwrap_or(&Thresholds::default()), &scope)
                .map(Arc::new)
                .map_err(|error| error.within("circuit_breakers"))
        };
        Ok(Circuits {
            default: of(RoutingPriority::Default, "default")?,
            high: of(RoutingPriority::High, "high")?,
        })
    }

    /// The breakers for one routing priority.
    pub fn of(&self, high_priority: bool) -> &Arc<Circuit> {
        if high_priority {
            &self.high
        } else {
            &self.default
        }
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::google::protobuf::UInt32Value;

    use super::*;
    use crate::stats::Registry;

    fn circuits(thresholds: Thresholds) -> (Arc<Registry>, Circuits) {
        let registry = Registry::new();
        let config = CircuitBreakers {
            thresholds: vec![thresholds],
            per_host_thresholds: Vec::new(),
        };
        let circuits = Circuits::compile(Some(&config), &registry.scope("cluster.a.")).unwrap();
        (registry, circuits)
    }

    #[test]
    fn a_permit_returns_its_unit_when_dropped() {
        let (registry, circuits) = circuits(Thresholds {
            max_requests: Some(UInt32Value { value: 2 }),
            ..Thresholds::default()
        });
        let circuit = circuits.of(false);
        let first = circuit.try_acquire(Resource::Requests);
        let second = circuit.try_acquire(Resource::Requests);
        assert!(first.is_some() && second.is_some());
        assert!(circuit.try_acquire(Resource::Requests).is_none());
        let open = || registry.value("cluster.a.circuit_breakers.default.rq_open");
        assert_eq!(open(), Some(1));
        assert!(circuits.of(true).try_acquire(Resource::Requests).is_some());
        drop(second);
        assert_eq!(open(), Some(0));
        assert!(circuit.try_acquire(Resource::Requests).is_some());
        drop(first);
        assert_eq!(circuit.current(Resource::Requests), 0);
    }

    #[test]
    fn nothing_may_be_allowed() {
        let (_, circuits) = circuits(Thresholds {
            max_pending_requests: Some(UInt32Value { value: 0 }),
            ..Thresholds::default()
        });
        assert!(circuits.of(false).try_acquire(Resource::Pending).is_none());
        assert_eq!(circuits.of(false).max(Resource::Connections), 1024);
    }

    #[test]
    fn a_budget_grows_with_the_requests_under_way() {
        use lateen_protocols::envoy::envoy::{
            config::cluster::v3::circuit_breakers::thresholds::RetryBudget, r#type::v3::Percent,
        };
        let (_, circuits) = circuits(Thresholds {
            retry_budget: Some(RetryBudget {
                budget_percent: Some(Percent { value: 50.0 }),
                budget_interval: None,
                min_retry_concurrency: Some(UInt32Value { value: 1 }),
            }),
            ..Thresholds::default()
        });
        let circuit = circuits.of(false);
        let take = || circuit.try_acquire(Resource::Retries);
        let one = take();
        assert!(one.is_some() && take().is_none());
        let requests: Vec<_> = (0..4)
            .map(|_| circuit.try_acquire(Resource::Requests))
            .collect();
        let two = take();
        assert!(two.is_some() && take().is_none());
        drop(requests);
    }
}
