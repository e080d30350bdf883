//! Tells the API server by which roots to check webhooks: `caBundle` of all webhooks of two configurations.
//!
//! Every few seconds, and when the roots change, what is there is compared with what should be: an upgrade that applies
//! the configurations anew (without a `caBundle`, which no manifest knows) is put right soon.

use std::fmt::Debug;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::client::{ClusterArgs, ConnectError, Failure, within};

/// Between two rounds.
const INTERVAL: Duration = Duration::from_secs(5);
/// As whom it writes.
const MANAGER: &str = "lateen-pilot";

/// The two kinds of configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookKind {
    /// Of webhooks that change what is made.
    Mutating,
    /// Of webhooks that judge it.
    Validating,
}

impl WebhookKind {
    fn path(self) -> &'static str {
        match self {
            Self::Mutating => "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
            Self::Validating => {
                "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabel {
    name: String,
}

/// What it counts, under Istio's names.
#[derive(Clone, Debug, Default)]
pub struct BundleMetrics {
    attempts: Family<NameLabel, Counter>,
    failures: Family<NameLabel, Counter>,
}

impl BundleMetrics {
    /// Makes and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "webhook_patch_attempts",
            "Times the caBundle of a webhook configuration was written, or tried to be",
            metrics.attempts.clone(),
        );
        registry.register(
            "webhook_patch_failures",
            "Times a webhook configuration could not be read or written",
            metrics.failures.clone(),
        );
        metrics
    }
}

/// Writes to one cluster.
pub struct Bundles {
    client: kube::Client,
    configurations: Vec<(WebhookKind, String)>,
    metrics: BundleMetrics,
}

impl Debug for Bundles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bundles")
            .field("configurations", &self.configurations)
            .finish_non_exhaustive()
    }
}

/// How a round went for one configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Right,
    Written,
    Absent,
    Failed(Failure),
}

impl Bundles {
    /// For these configurations. `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(
        args: &ClusterArgs,
        configurations: Vec<(WebhookKind, String)>,
        metrics: BundleMetrics,
    ) -> Result<Option<Self>, ConnectError> {
        let client = args.client().await?;
        Ok(client.map(|client| Self {
            client,
            configurations,
            metrics,
        }))
    }

    /// Keeps the newest of `roots` (PEM) in the configurations, for ever. Those that are not there are waited for.
    pub async fn keep(&self, mut roots: watch::Receiver<Option<String>>) {
        let mut before = vec![Found::Right; self.configurations.len()];
        loop {
            let pem = roots.borrow_and_update().clone();
            if let Some(pem) = pem {
                let wanted = STANDARD.encode(pem);
                for ((kind, name), before) in self.configurations.iter().zip(&mut before) {
                    let found = self.put(*kind, name, &wanted).await;
                    tell(name, before, &found);
                    *before = found;
                }
            }
            match timeout(INTERVAL, roots.changed()).await {
                Err(_) | Ok(Ok(())) => {}
                // Whoever had the roots is stopping.
                Ok(Err(_)) => return std::future::pending().await,
            }
        }
    }

    async fn put(&self, kind: WebhookKind, name: &str, wanted: &str) -> Found {
        let label = NameLabel {
            name: name.to_owned(),
        };
        let failed = |reason: Failure| {
            self.metrics.failures.get_or_create(&label).inc();
            Found::Failed(reason)
        };
        let request = Request::new(kind.path());
        let current = request.get(name, &kube::api::GetParams::default());
        let current: Value = match self.ask(current).await {
            Ok(current) => current,
            Err(error) if error.code == 404 => return Found::Absent,
            Err(error) => return failed(error),
        };
        let Some(patch) = patch(&current, wanted) else {
            return Found::Right;
        };
        self.metrics.attempts.get_or_create(&label).inc();
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        // Webhooks are a list with the name as its key, so the others, and all else of each, stay.
        let request = request.patch(name, &params, &Patch::Strategic(patch));
        match self.ask(request).await {
            Ok(_) => Found::Written,
            Err(error) => failed(error),
        }
    }

    async fn ask(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Value, Failure> {
        within(async {
            let request = request.map_err(kube::Error::BuildRequest)?;
            self.client.request(request).await
        })
        .await
    }
}

/// What is to be written; `None` if all is right.
fn patch(current: &Value, wanted: &str) -> Option<Value> {
    let webhooks = current.get("webhooks").and_then(Value::as_array)?;
    let wrong: Vec<Value> = webhooks
        .iter()
        .filter(|webhook| webhook.pointer("/clientConfig/caBundle") != Some(&json!(wanted)))
        .filter_map(|webhook| webhook.get("name"))
        .map(|name| json!({"name": name, "clientConfig": {"caBundle": wanted}}))
        .collect();
    if wrong.is_empty() {
        return None;
    }
    // Somebody may be replacing it right now: then the next round sees what has become of it.
    let version = current.pointer("/metadata/resourceVersion");
    Some(json!({"metadata": {"resourceVersion": version}, "webhooks": wrong}))
}

/// Each state is said once.
fn tell(name: &str, before: &Found, found: &Found) {
    match found {
        Found::Written => info!(configuration = name, "caBundle written"),
        _ if found == before => {}
        Found::Absent => info!(
            configuration = name,
            "no such webhook configuration; waiting"
        ),
        Found::Failed(error) => {
            warn!(configuration = name, %error, "the caBundle cannot be kept right; trying again");
        }
        Found::Right => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_is_written() {
        let current = json!({
            "metadata": {"resourceVersion": "7"},
            "webhooks": [
                {"name": "a", "clientConfig": {"caBundle": "new", "url": "x"}},
                {"name": "b", "clientConfig": {"caBundle": "old"}},
                {"name": "c", "clientConfig": {"service": {}}},
            ],
        });
        assert_eq!(
            patch(&current, "new").unwrap(),
            json!({
                "metadata": {"resourceVersion": "7"},
                "webhooks": [
                    {"name": "b", "clientConfig": {"caBundle": "new"}},
                    {"name": "c", "clientConfig": {"caBundle": "new"}},
                ],
            })
        );
        assert_eq!(patch(&json!({"webhooks": []}), "new"), None);
        assert_eq!(patch(&json!({}), "new"), None);
    }
}
