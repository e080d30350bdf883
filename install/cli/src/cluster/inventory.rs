//! What an installation consists of: a ConfigMap in the cluster names every object of it, so that an upgrade finds what is no
//! longer wanted, and taking it away leaves nothing and touches nothing else.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Cluster, Key};

/// Where the mesh is.
pub(crate) const NAMESPACE: &str = "istio-system";
/// Name of the ConfigMap; a revision's has the revision behind it.
const NAME: &str = "lateen-inventory";
/// Its one key.
const FIELD: &str = "inventory";
/// A ConfigMap holds 1 MiB; an inventory is a few dozen KiB.
const LIMIT_BYTES: usize = 900 << 10;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Inventory {
    /// Of the chart.
    pub(crate) version: String,
    /// Empty for the installation itself.
    pub(crate) revision: String,
    pub(crate) profile: String,
    /// What the operator chose over the profile.
    pub(crate) values: Value,
    /// In the order in which they were applied.
    pub(crate) objects: Vec<Key>,
}

/// The ConfigMap of this revision.
pub(crate) fn key(revision: &str) -> Key {
    Key {
        api_version: "v1".to_owned(),
        kind: "ConfigMap".to_owned(),
        namespace: NAMESPACE.to_owned(),
        name: match revision {
            "" => NAME.to_owned(),
            revision => format!("{NAME}-{revision}"),
        },
    }
}

impl Inventory {
    /// What is installed; `None` if nothing is.
    pub(crate) async fn read(
        cluster: &mut Cluster,
        revision: &str,
    ) -> anyhow::Result<Option<Inventory>> {
        let key = key(revision);
        let Some(map) = cluster.get(&key).await? else {
            return Ok(None);
        };
        let text = map["data"][FIELD].as_str().unwrap_or_default();
        let inventory = serde_json::from_str(text);
        inventory.map(Some).with_context(|| {
            format!(
                "{key} was not written by this program, or was changed; put it right or delete it"
            )
        })
    }

    /// All that are there.
    pub(crate) async fn all(cluster: &mut Cluster) -> anyhow::Result<Vec<Inventory>> {
        let maps = cluster.list(&key("")).await?;
        let ours = maps.iter().filter(|map| {
            let meta = &map["metadata"];
            meta["namespace"] == NAMESPACE
                && meta["name"]
                    .as_str()
                    .is_some_and(|name| name.starts_with(NAME))
        });
        let texts = ours.filter_map(|map| map["data"][FIELD].as_str());
        texts
            .map(|text| serde_json::from_str(text).context("an inventory is damaged"))
            .collect()
    }

    /// Writes it.
    pub(crate) async fn write(&self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let Key {
            name, namespace, ..
        } = key(&self.revision);
        let text = serde_json::to_string(self)?;
        anyhow::ensure!(
            text.len() <= LIMIT_BYTES,
            "the inventory has {} bytes",
            text.len()
        );
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name, "namespace": namespace,
                "labels": { "app.kubernetes.io/part-of": "lateen", "app.kubernetes.io/managed-by": "lateen" },
            },
            "data": { FIELD: text },
        });
        cluster.apply(&map, true).await
    }
}
