//! How many connections a filter chain may have. Envoy: `envoy.filters.network.connection_limit`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lateen_protocols::envoy::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit as LimitProto;

use crate::{
    config_error::ConfigError,
    proto::{invalid, optional_duration},
    stats::{Counter, Gauge, Registry},
};

/// The filter of one filter chain; all workers share it.
#[derive(Debug)]
pub struct ConnectionLimit {
    most: u64,
    /// How long a connection that is refused stays open, so that who tries again is slowed down.
    pub delay: Option<Duration>,
    active: Arc<Active>,
    limited: Counter,
}

#[derive(Debug)]
struct Active {
    count: AtomicU64,
    gauge: Gauge,
}

/// The place of one connection; free again when dropped.
#[derive(Debug)]
pub struct Place(Arc<Active>);

impl ConnectionLimit {
    /// Compiles the filter; counts in `connection_limit.PREFIX.`. `None` if it is switched off.
    ///
    /// # Errors
    /// A field is absent or not valid.
    pub fn compile(
        config: &LimitProto,
        stats: &Registry,
    ) -> Result<Option<ConnectionLimit>, ConfigError> {
        if config.stat_prefix.is_empty() {
            return Err(invalid("stat_prefix", "absent"));
        }
        let most = config.max_connections.as_ref().map_or(0, |max| max.value);
        if most == 0 {
            return Err(invalid("max_connections", "absent or 0"));
        }
        let delay = optional_duration("delay", config.delay.as_ref())?;
        let enabled = config.runtime_enabled.as_ref().is_none_or(|flag| {
            flag.default_value
                .as_ref()
                .is_none_or(|default| default.value)
        });
        let scope = stats.scope(&format!("connection_limit.{}.", config.stat_prefix));
        Ok(enabled.then(|| ConnectionLimit {
            most,
            delay,
            active: Arc::new(Active {
                count: AtomicU64::new(0),
                gauge: scope.gauge("active_connections"),
            }),
            limited: scope.counter("limited_connections"),
        }))
    }

    /// A place for a connection, if one is free.
    pub fn admit(&self) -> Option<Place> {
        let free = |count: u64| (count < self.most).then_some(count + 1);
        if self
            .active
            .count
            .fetch_update(Relaxed, Relaxed, free)
            .is_ok()
        {
            self.active.gauge.inc();
            Some(Place(self.active.clone()))
        } else {
            self.limited.inc();
            None
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Relaxed);
        self.0.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use lateen_protocols::envoy::google::protobuf::{BoolValue, UInt64Value};

    use super::*;

    fn config(most: u64) -> LimitProto {
        LimitProto {
            stat_prefix: "p".to_owned(),
            max_connections: Some(UInt64Value { value: most }),
            ..LimitProto::default()
        }
    }

    #[test]
    fn a_place_is_free_again_when_its_connection_ends() {
        let stats = Registry::new();
        let limit = ConnectionLimit::compile(&config(2), &stats)
            .unwrap()
            .unwrap();
        let (first, second) = (limit.admit(), limit.admit());
        assert!(first.is_some() && second.is_some() && limit.admit().is_none());
        drop(first);
        let third = limit.admit();
        assert!(third.is_some() && limit.admit().is_none());
        let scope = stats.scope("connection_limit.p.");
        assert_eq!(scope.counter("limited_connections").value(), 2);
        assert_eq!(scope.gauge("active_connections").value(), 2);
    }

    #[test]
    fn a_limit_of_none_is_refused_and_one_switched_off_is_left_out() {
        let stats = Registry::new();
        assert!(ConnectionLimit::compile(&config(0), &stats).is_err());
        let mut off = config(1);
        off.runtime_enabled = Some(
            lateen_protocols::envoy::envoy::config::core::v3::RuntimeFeatureFlag {
                default_value: Some(BoolValue { value: false }),
                runtime_key: "k".to_owned(),
            },
        );
        assert!(ConnectionLimit::compile(&off, &stats).unwrap().is_none());
    }
}
