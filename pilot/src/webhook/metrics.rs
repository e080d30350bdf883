//! What the webhooks count, under Istio's names.

use lateen_service::prometheus_client::encoding::EncodeLabelSet;
use lateen_service::prometheus_client::metrics::counter::Counter;
use lateen_service::prometheus_client::metrics::family::Family;
use lateen_service::prometheus_client::registry::Registry;

use super::admission::GroupVersionKind;

/// Of an object that was judged. Whoever reaches the port chooses what is in a review, so kinds we do not know share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct KindLabel {
    group: String,
    kind: String,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) injection_requests: Counter,
    pub(super) injection_successes: Counter,
    pub(super) injection_failures: Counter,
    pub(super) injection_skips: Counter,
    passed: Family<KindLabel, Counter>,
    failed: Family<KindLabel, Counter>,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for (name, help, counter) in [
            (
                "sidecar_injection_requests",
                "Reviews by the injection webhook",
                &metrics.injection_requests,
            ),
            (
                "sidecar_injection_success",
                "Pods that got a sidecar",
                &metrics.injection_successes,
            ),
            (
                "sidecar_injection_failure",
                "Pods that were refused, because no sidecar could be made",
                &metrics.injection_failures,
            ),
            (
                "sidecar_injection_skip",
                "Pods that were left as they are",
                &metrics.injection_skips,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "galley_validation_passed",
            "Objects let in by the validation webhook, by group and kind",
            metrics.passed.clone(),
        );
        registry.register(
            "galley_validation_failed",
            "Objects refused by the validation webhook, by group and kind",
            metrics.failed.clone(),
        );
        metrics
    }

    pub(super) fn validated(&self, of: &GroupVersionKind, is_good: bool) {
        let family = if is_good { &self.passed } else { &self.failed };
        let label = match lateen_config::is_read(&of.group, &of.kind) {
            true => KindLabel {
                group: of.group.clone(),
                kind: of.kind.clone(),
            },
            false => KindLabel {
                group: "other".into(),
                kind: "other".into(),
            },
        };
        family.get_or_create(&label).inc();
    }
}
