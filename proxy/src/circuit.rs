//! Circuit breakers: how much a cluster may have open at once, over all workers.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use lateen_protocols::envoy::{
    envoy::config::{
        cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
        core::v3::RoutingPriority,
    },
    google::protobuf::UInt32Value,
};

use crate::{
    config_error::ConfigError,
    proto::invalid,
    stats::{LazyGauge, Scope, instruments},
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

impl Resource {
    const ALL: [Resource; 4] = [
        Resource::Connections,
        Resource::Pending,
        Resource::Requests,
        Resource::Retries,
    ];
}

instruments! {
    /// The gauges of a cluster's breakers.
    struct Gauges {
        gauge {
            default_cx_open = "circuit_breakers.default.cx_open",
            default_rq_pending_open = "circuit_breakers.default.rq_pending_open",
            default_rq_open = "circuit_breakers.default.rq_open",
            default_rq_retry_open = "circuit_breakers.default.rq_retry_open",
            default_cx_pool_open = "circuit_breakers.default.cx_pool_open",
            high_cx_open = "circuit_breakers.high.cx_open",
            high_rq_pending_open = "circuit_breakers.high.rq_pending_open",
            high_rq_open = "circuit_breakers.high.rq_open",
            high_rq_retry_open = "circuit_breakers.high.rq_retry_open",
            high_cx_pool_open = "circuit_breakers.high.cx_pool_open",
        }
        gauge_on_demand {
            default_remaining_cx = "circuit_breakers.default.remaining_cx",
            default_remaining_pending = "circuit_breakers.default.remaining_pending",
            default_remaining_rq = "circuit_breakers.default.remaining_rq",
            default_remaining_retries = "circuit_breakers.default.remaining_retries",
            high_remaining_cx = "circuit_breakers.high.remaining_cx",
            high_remaining_pending = "circuit_breakers.high.remaining_pending",
            high_remaining_rq = "circuit_breakers.high.remaining_rq",
            high_remaining_retries = "circuit_breakers.high.remaining_retries",
        }
    }
}

impl Gauges {
    fn open(&self, high: bool, resource: Resource) -> &LazyGauge {
        match (high, resource) {
            (false, Resource::Connections) => &self.default_cx_open,
            (false, Resource::Pending) => &self.default_rq_pending_open,
            (false, Resource::Requests) => &self.default_rq_open,
            (false, Resource::Retries) => &self.default_rq_retry_open,
            (true, Resource::Connections) => &self.high_cx_open,
            (true, Resource::Pending) => &self.high_rq_pending_open,
            (true, Resource::Requests) => &self.high_rq_open,
            (true, Resource::Retries) => &self.high_rq_retry_open,
        }
    }

    fn remaining(&self, high: bool, resource: Resource) -> &LazyGauge {
        match (high, resource) {
            (false, Resource::Connections) => &self.default_remaining_cx,
            (false, Resource::Pending) => &self.default_remaining_pending,
            (false, Resource::Requests) => &self.default_remaining_rq,
            (false, Resource::Retries) => &self.default_remaining_retries,
            (true, Resource::Connections) => &self.high_remaining_cx,
            (true, Resource::Pending) => &self.high_remaining_pending,
            (true, Resource::Requests) => &self.high_remaining_rq,
            (true, Resource::Retries) => &self.high_remaining_retries,
        }
    }
}

#[derive(Debug)]
struct Counted {
    max: u32,
    current: AtomicU32,
}

impl Counted {
    fn new(max: u32) -> Counted {
        Counted {
            max,
            current: AtomicU32::new(0),
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
    high: bool,
    /// Whether gauges say what is left.
    tracked: bool,
    gauges: Arc<Gauges>,
}

/// A unit of something counted; gives it back on drop.
#[derive(Debug)]
pub struct Permit {
    circuit: Arc<Circuit>,
    resource: Resource,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.circuit.give_back(self.resource);
    }
}

impl Circuit {
    fn new(
        thresholds: &Thresholds,
        high: bool,
        gauges: &Arc<Gauges>,
    ) -> Result<Circuit, ConfigError> {
        let max = |value: Option<&UInt32Value>, default| {
            Counted::new(value.map_or(default, |value| value.value))
        };
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
        let circuit = Circuit {
            connections: max(thresholds.max_connections.as_ref(), MAX),
            pending: max(thresholds.max_pending_requests.as_ref(), MAX),
            requests: max(thresholds.max_requests.as_ref(), MAX),
            retries: max(thresholds.max_retries.as_ref(), MAX_RETRIES),
            budget,
            high,
            tracked: thresholds.track_remaining,
            gauges: gauges.clone(),
        };
        for resource in Resource::ALL {
            circuit.show_remaining(resource, 0);
        }
        Ok(circuit)
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
        self.take(resource).then(|| Permit {
            circuit: self.clone(),
            resource,
        })
    }

    /// Gives back what was taken by [`Circuit::take`].
    pub(crate) fn give_back(&self, resource: Resource) {
        let counted = self.counted(resource);
        let before = counted.current.fetch_sub(1, Relaxed);
        let open = before > counted.max;
        self.changed(resource, before.saturating_sub(1), open);
    }

    /// As [`Circuit::try_acquire`], for who holds the circuit anyway and gives back in a drop of its own. Whether
    /// there was one.
    pub(crate) fn take(&self, resource: Resource) -> bool {
        let counted = self.counted(resource);
        let max = match (resource, self.budget) {
            (Resource::Retries, Some(budget)) => self.retry_budget(budget),
            _ => counted.max,
        };
        let added = counted
            .current
            .fetch_update(Relaxed, Relaxed, |n| (n < max).then(|| n + 1));
        match added {
            Ok(before) => self.changed(resource, before + 1, before + 1 >= max),
            Err(_) => {
                self.gauges.open(self.high, resource).set(1);
                return false;
            }
        }
        true
    }

    /// One unit beyond any limit: the one connection that keeps waiting requests from waiting for ever.
    pub fn acquire_beyond(self: &Arc<Circuit>, resource: Resource) -> Permit {
        let counted = self.counted(resource);
        let before = counted.current.fetch_add(1, Relaxed);
        self.changed(resource, before + 1, before + 1 >= counted.max);
        Permit {
            circuit: self.clone(),
            resource,
        }
    }

    fn changed(&self, resource: Resource, current: u32, open: bool) {
        // Written at the edge only: the gauge is one cache line for all workers.
        if current.abs_diff(self.counted(resource).max) <= 1 {
            self.gauges.open(self.high, resource).set(u64::from(open));
        }
        self.show_remaining(resource, current);
    }

    fn show_remaining(&self, resource: Resource, current: u32) {
        if self.tracked {
            let left = self.counted(resource).max.saturating_sub(current);
            self.gauges
                .remaining(self.high, resource)
                .set(u64::from(left));
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
        let gauges = scope.group();
        let of = |priority: RoutingPriority| {
            let found = config.thresholds.iter().find(|t| t.priority() == priority);
            let high = priority == RoutingPriority::High;
            Circuit::new(found.unwrap_or(&Thresholds::default()), high, &gauges)
                .map(Arc::new)
                .map_err(|error| error.within("circuit_breakers"))
        };
        Ok(Circuits {
            default: of(RoutingPriority::Default)?,
            high: of(RoutingPriority::High)?,
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
