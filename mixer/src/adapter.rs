//! The adapters that are part of Mixer.

pub mod audit;
pub mod bypass;
mod datagram;
pub mod denier;
pub mod dogstatsd;
pub mod keyval;
pub mod kubernetesenv;
pub(crate) mod export;
pub mod fluentd;
mod json;
mod limits;
pub mod listchecker;
pub mod memquota;
pub mod noop;
pub mod opa;
pub mod opentelemetry;
pub mod prometheus;
pub mod rbac;
pub mod redisquota;
mod series;
mod span;
pub mod statsd;
pub mod stdio;
pub mod zipkin;

use std::sync::Arc;

use lateen_adapter::Adapter;

use self::{prometheus::Exposition, rbac::PolicyView};

/// The adapters a server has, by name.
#[derive(Clone)]
pub struct Inventory(Vec<Arc<dyn Adapter>>);

impl Inventory {
    /// No adapter.
    pub fn empty() -> Self {
        Self(Vec::new())
    }

    /// The built-in adapters; the prometheus adapter's metrics go to `exposition`, the rbac adapter decides by
    /// `policies`.
    pub fn built_in(exposition: Arc<Exposition>, policies: PolicyView) -> Self {
        let all = Self::empty()
            .with(Arc::new(denier::Denier))
            .with(Arc::new(listchecker::ListChecker))
            .with(Arc::new(memquota::MemQuota))
            .with(Arc::new(redisquota::RedisQuota))
            .with(Arc::new(rbac::Rbac::new(policies)))
            .with(Arc::new(opa::Opa))
            .with(Arc::new(prometheus::Prometheus::new(exposition)))
            .with(Arc::new(stdio::Stdio::default()))
            .with(Arc::new(keyval::KeyVal))
            .with(Arc::new(kubernetesenv::KubernetesEnv))
            .with(Arc::new(fluentd::Fluentd))
            .with(Arc::new(statsd::Statsd))
            .with(Arc::new(dogstatsd::Dogstatsd))
            .with(Arc::new(opentelemetry::OpenTelemetry))
            .with(Arc::new(zipkin::Zipkin))
            .with(Arc::new(audit::Audit::default()))
            .with(Arc::new(bypass::Bypass))
            .with(Arc::new(noop::Noop));
        #[cfg(feature = "wasm")]
        let all = all.with(Arc::new(lateen_wasm::Wasm::default()));
        all
    }

    /// And `adapter`; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, adapter: Arc<dyn Adapter>) -> Self {
        self.0.retain(|a| a.info().name != adapter.info().name);
        self.0.push(adapter);
        self
    }

    /// The adapter called `name`.
    pub fn find(&self, name: &str) -> Option<&Arc<dyn Adapter>> {
        self.0.iter().find(|a| a.info().name == name)
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|a| a.info().name)
    }
}

impl std::fmt::Debug for Inventory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
