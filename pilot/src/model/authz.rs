//! Which objects hold for a workload (AuthorizationPolicy, RequestAuthentication, EnvoyFilter, Telemetry): those of its
//! namespace and of the root namespace that select it, oldest first; those that name a Gateway instead, for the
//! gateways that say they are of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::security::PolicyTarget;
use lateen_config::{Object, Spec};

use super::service::{Labels, selects};

/// Labels by which a gateway's workload says of which Gateway (Gateway API) it is; the second is the older one.
const GATEWAY_NAME: [&str; 2] = [
    "gateway.networking.k8s.io/gateway-name",
    "istio.io/gateway-name",
];

/// Policies of one kind, by namespace.
#[derive(Debug, Default)]
pub(super) struct Policies(BTreeMap<String, Vec<Arc<Object>>>);

impl Policies {
    pub(super) fn read(objects: &[Arc<Object>], wanted: impl Fn(&Spec) -> bool) -> Self {
        let mut all: BTreeMap<String, Vec<Arc<Object>>> = BTreeMap::new();
        for object in objects.iter().filter(|object| wanted(&object.spec)) {
            all.entry(object.key.namespace.to_string())
                .or_default()
                .push(object.clone());
        }
        Self(all)
    }

    /// The root namespace's first.
    pub(super) fn of<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
        root_namespace: &str,
    ) -> impl Iterator<Item = &'a Object> {
        let own = self.0.get(namespace);
        let root = (root_namespace != namespace)
            .then(|| self.0.get(root_namespace))
            .flatten();
        root.into_iter()
            .chain(own)
            .flatten()
            .map(|object| &**object)
            .filter(|object| holds(object, namespace, labels))
    }
}

fn holds(object: &Object, namespace: &str, labels: &Labels) -> bool {
    let (targets, selector): (Vec<&PolicyTarget>, _) = match &object.spec {
        Spec::AuthorizationPolicy(policy) => (policy.targets().collect(), policy.labels()),
        Spec::RequestAuthentication(policy) => (policy.targets().collect(), policy.labels()),
        Spec::Telemetry(telemetry) => (telemetry.targets().collect(), telemetry.labels()),
        Spec::EnvoyFilter(filter) => (
            filter.target_refs.iter().collect(),
            filter
                .workload_selector
                .as_ref()
                .map(|selector| &selector.labels),
        ),
        _ => return false,
    };
    if targets.is_empty() {
        return selector.is_none_or(|selector| selects(selector, labels));
    }
    let of = GATEWAY_NAME.into_iter().find_map(|name| labels.get(name));
    &*object.key.namespace == namespace
        && of.is_some_and(|of| targets.iter().any(|target| target.gateway() == Some(of)))
}
