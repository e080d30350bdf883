//! Writes the mesh's root certificates to a ConfigMap in every namespace, from where pods mount them.
//!
//! Every few seconds what is there is compared with what should be, so that a namespace that is new, and a ConfigMap that
//! somebody changed or deleted, are put right alike. Two lists a round, and a write where something differs.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, ListParams, Patch, PatchParams};
use prometheus_client::metrics::counter::Counter;
use serde::de::DeserializeOwned;
use tokio::time::sleep;

use crate::client::{ClusterArgs, ConnectError};

/// Name of the ConfigMap: Istio's, so that pods of either's injector find it.
pub const NAME: &str = "istio-ca-root-cert";
/// Its one key.
pub const KEY: &str = "root-cert.pem";
/// Between two rounds.
const INTERVAL: Duration = Duration::from_secs(5);
/// Objects of a page.
const PAGE: u32 = 500;
/// As whom it writes.
const MANAGER: &str = "lateen-auth";
/// Namespaces of Kubernetes' own, in which nothing of a mesh runs; Istio leaves out the same.
const OTHERS: [&str; 4] = [
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// Publishes to one cluster.
pub struct Roots {
    client: kube::Client,
    pem: String,
}

impl Debug for Roots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roots").finish_non_exhaustive()
    }
}

impl Roots {
    /// To publish `pem`. `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(args: &ClusterArgs, pem: String) -> Result<Option<Self>, ConnectError> {
        let client = args.client().await?;
        Ok(client.map(|client| Self { client, pem }))
    }

    /// Keeps it published, for ever. Failures are counted, the first of several is logged.
    pub async fn keep(self, failures: Counter) {
        let mut is_failing = false;
        loop {
            match self.publish().await {
                Ok(written) => {
                    if is_failing {
                        tracing::info!("the root certificates are in every namespace again");
                    }
                    if written > 0 {
                        tracing::info!(namespaces = written, "root certificates written");
                    }
                    is_failing = false;
                }
                Err(error) => {
                    failures.inc();
                    if !is_failing {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the root certificates cannot be written to every namespace (ConfigMap {NAME}); trying again"
                        );
                    }
                    is_failing = true;
                }
            }
            sleep(INTERVAL).await;
        }
    }

    /// One round; gives how many namespaces were written to.
    ///
    /// # Errors
    /// The first of them; what could be written has been.
    async fn publish(&self) -> Result<usize, kube::Error> {
        let namespaces: Vec<Namespace> =
            list(&Api::all(self.client.clone()), ListParams::default()).await?;
        let ours = ListParams::default().fields(&format!("metadata.name={NAME}"));
        let there: Vec<ConfigMap> = list(&Api::all(self.client.clone()), ours).await?;
        // Other keys are of others, and stay.
        let current: HashSet<String> = there
            .into_iter()
            .filter(|map| map.data.as_ref().and_then(|data| data.get(KEY)) == Some(&self.pem))
            .filter_map(|map| map.metadata.namespace)
            .collect();
        let (mut written, mut failed) = (0, None);
        for namespace in namespaces {
            let phase = namespace.status.and_then(|status| status.phase);
            let Some(name) = namespace.metadata.name else {
                continue;
            };
            let is_going = phase.as_deref() == Some("Terminating");
            if current.contains(&name) || is_going || OTHERS.contains(&&*name) {
                continue;
            }
            match self.write(&name).await {
                Ok(()) => written += 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(written), Err)
    }

    async fn write(&self, namespace: &str) -> Result<(), kube::Error> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let mut map = ConfigMap {
            data: Some(BTreeMap::from([(KEY.to_owned(), self.pem.clone())])),
            ..ConfigMap::default()
        };
        map.metadata.name = Some(NAME.to_owned());
        map.metadata.labels = Some(BTreeMap::from([(
            "istio.io/config".to_owned(),
            "true".to_owned(),
        )]));
        let params = PatchParams::apply(MANAGER).force();
        maps.patch(NAME, &params, &Patch::Apply(&map))
            .await
            .map(drop)
    }
}

/// Everything that is there, page by page.
async fn list<K>(api: &Api<K>, mut params: ListParams) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    params = params.limit(PAGE);
    let mut all = Vec::new();
    loop {
        let page = api.list(&params).await?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(all),
        }
    }
}
