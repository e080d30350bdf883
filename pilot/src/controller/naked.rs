//! Pods without a sidecar that should have one: their namespace or they themselves ask for it, and they were made before
//! it did, or while the webhook could not be asked.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::{ConfigSet, Labels, Object, Spec};
use lateen_inject::{Facts, PROXY, STATUS, Settings, WISH, is_selected};
use lateen_service::admin::{Admin, Reply};
use lateen_service::prometheus_client::metrics::gauge::Gauge;
use lateen_service::prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::push::Source;

/// A pod without its sidecar.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Naked {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Who made it: `KIND/NAME`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub owner: String,
}

/// Finds them, whenever the configuration has changed.
#[derive(Debug)]
pub struct Finder {
    out: watch::Sender<Arc<Vec<Naked>>>,
    count: Gauge,
}

impl Finder {
    /// Registers the metric.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let count = Gauge::default();
        registry.register(
            "pilot_pods_without_sidecar",
            "Pods that should have a sidecar and have none; /debug/injection lists them",
            count.clone(),
        );
        Self {
            out: watch::Sender::new(Arc::default()),
            count,
        }
    }

    /// Adds `/debug/injection`.
    #[must_use]
    pub fn page(&self, admin: Admin) -> Admin {
        let found = self.out.subscribe();
        admin.route("/debug/injection", move |_| {
            let found = found.borrow().clone();
            async move {
                match serde_json::to_vec_pretty(&serde_json::json!({"withoutSidecar": *found})) {
                    Ok(body) => Reply::json(body),
                    Err(error) => {
                        Reply::status(http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
                    }
                }
            }
        })
    }

    /// Looks until the source ends.
    pub async fn run(self, mut source: Source, mut settings: watch::Receiver<Arc<Settings>>) {
        loop {
            let set = source.borrow_and_update().clone();
            let settings_now = settings.borrow_and_update().clone();
            // Tens of thousands of pods are milliseconds of work.
            let found = tokio::task::spawn_blocking(move || find(&set, &settings_now)).await;
            match found {
                Ok(found) => self.tell(found),
                Err(error) => warn!(%error, "pods without a sidecar cannot be counted"),
            }
            let open = tokio::select! {
                // Both are cancel-safe, and either is a reason to look again.
                open = source.changed() => open.is_ok(),
                open = settings.changed() => open.is_ok(),
            };
            if !open {
                return;
            }
        }
    }

    fn tell(&self, found: Vec<Naked>) {
        self.count
            .set(i64::try_from(found.len()).unwrap_or(i64::MAX));
        let before = self.out.borrow().len();
        if found.is_empty() && before > 0 {
            info!("every pod that should have a sidecar has one");
        } else if found.len() > before {
            warn!(
                pods = found.len(),
                "pods have no sidecar though they should; restart their workloads (/debug/injection lists them)"
            );
        }
        self.out.send_replace(Arc::new(found));
    }
}

fn find(set: &ConfigSet, settings: &Settings) -> Vec<Naked> {
    let namespaces: BTreeMap<&str, &Labels> = set
        .objects
        .iter()
        .filter(|object| matches!(object.spec, Spec::Namespace(_)))
        .map(|object| (&*object.key.name, &object.labels))
        .collect();
    let none = Labels::new();
    let mut found: Vec<Naked> = set
        .objects
        .iter()
        .filter_map(|object| {
            let labels = namespaces.get(&*object.key.namespace).copied();
            naked(object, labels.unwrap_or(&none), settings)
        })
        .collect();
    found.sort();
    found
}

fn naked(object: &Object, namespace: &Labels, settings: &Settings) -> Option<Naked> {
    let Spec::Pod(pod) = &object.spec else {
        return None;
    };
    let wish = object
        .labels
        .get(WISH)
        .or_else(|| object.annotations.get(WISH));
    let facts = Facts {
        namespace: &object.key.namespace,
        host_network: pod.spec.host_network,
        wish: wish.map(String::as_str),
        is_injected: object.annotations.contains_key(STATUS),
    };
    let has_proxy = pod.spec.containers.iter().any(|one| one.name == PROXY);
    let is_wanted = is_selected(namespace, &object.labels, &settings.revision)
        && facts.skip(settings).is_none();
    (is_wanted && !has_proxy).then(|| Naked {
        namespace: object.key.namespace.to_string(),
        pod: object.key.name.to_string(),
        owner: pod
            .owner_references
            .first()
            .map(|owner| format!("{}/{}", owner.kind, owner.name))
            .unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use lateen_config::parse_file;

    use super::*;

    #[test]
    fn who_should_have_one_and_has_none_is_found() {
        let yaml = r#"
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { istio-injection: enabled } }
---
apiVersion: v1
kind: Namespace
metadata: { name: plain }
---
apiVersion: v1
kind: Pod
metadata: { name: naked, namespace: shop, ownerReferences: [{ apiVersion: apps/v1, kind: ReplicaSet, name: cart-1 }] }
spec: { containers: [{ name: app }] }
---
apiVersion: v1
kind: Pod
metadata: { name: classic, namespace: shop }
spec: { containers: [{ name: app }, { name: istio-proxy }] }
---
apiVersion: v1
kind: Pod
metadata: { name: native, namespace: shop, annotations: { sidecar.istio.io/status: "{}" } }
spec: { containers: [{ name: app }] }
---
apiVersion: v1
kind: Pod
metadata: { name: refuses, namespace: shop, annotations: { sidecar.istio.io/inject: "false" } }
spec: { containers: [{ name: app }] }
---
apiVersion: v1
kind: Pod
metadata: { name: node, namespace: shop }
spec: { hostNetwork: true, containers: [{ name: app }] }
---
apiVersion: v1
kind: Pod
metadata: { name: elsewhere, namespace: plain }
spec: { containers: [{ name: app }] }
---
apiVersion: v1
kind: Pod
metadata: { name: asks, namespace: plain, labels: { sidecar.istio.io/inject: "true" } }
spec: { containers: [{ name: app }] }
"#;
        let (objects, problems) = parse_file("a.yaml", yaml);
        assert_eq!(problems, []);
        let set = ConfigSet {
            objects: objects.into_iter().map(Arc::new).collect(),
            ..ConfigSet::default()
        };
        let found = find(&set, &Settings::default());
        let found: Vec<(&str, &str, &str)> = found
            .iter()
            .map(|one| (&*one.namespace, &*one.pod, &*one.owner))
            .collect();
        assert_eq!(
            found,
            [
                ("plain", "asks", ""),
                ("shop", "naked", "ReplicaSet/cart-1")
            ]
        );
    }
}
