//! A cluster, as the commands that install need it: objects of any kind are applied, read and taken away.
//!
//! [`inventory`] says what an installation consists of.

pub(crate) mod inventory;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::discovery::{self, Scope};
use serde_json::Value;

/// As whom objects are applied: who owns a field can be seen in its `managedFields`.
pub(crate) const MANAGER: &str = "lateen";
/// Between two looks at what is being waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Objects of a page.
const PAGE: u32 = 500;

/// Which cluster, and as whom.
// No group of flags: clap would call it as the command's own.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// File with clusters and credentials [default: what $KUBECONFIG names, else ~/.kube/config].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of that file, if not the current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Key {
    /// As in the object.
    pub(crate) api_version: String,
    pub(crate) kind: String,
    /// Empty for objects of the cluster.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    /// Of this object.
    pub(crate) fn of(object: &Value) -> Key {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Key {
            api_version: text(&object["apiVersion"]),
            kind: text(&object["kind"]),
            namespace: text(&object["metadata"]["namespace"]),
            name: text(&object["metadata"]["name"]),
        }
    }

    fn gvk(&self) -> GroupVersionKind {
        let (group, version) = self
            .api_version
            .split_once('/')
            .unwrap_or(("", &self.api_version));
        GroupVersionKind::gvk(group, version, &self.kind)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// See the module.
pub(crate) struct Cluster {
    pub(crate) client: kube::Client,
    /// What the server calls kinds, asked once each; `None`: it has no such kind.
    kinds: HashMap<GroupVersionKind, Option<(ApiResource, bool)>>,
}

impl Cluster {
    /// Connects; nothing is asked yet.
    pub(crate) async fn connect(options: &Options) -> anyhow::Result<Cluster> {
        let kubeconfig = match &options.kubeconfig {
            Some(file) => Kubeconfig::read_from(file)
                .with_context(|| format!("cannot use the kubeconfig {}", file.display()))?,
            None => Kubeconfig::read()
                .context("no cluster: set $KUBECONFIG, or give --kubeconfig FILE")?,
        };
        let choice = KubeConfigOptions {
            context: options.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &choice)
            .await
            .context("the kubeconfig names no usable cluster")?;
        Ok(Cluster {
            client: kube::Client::try_from(config).context("cannot use these credentials")?,
            kinds: HashMap::new(),
        })
    }

    /// What the server calls this kind, and whether its objects are in namespaces. `None`: it has no such kind.
    pub(crate) async fn kind(&mut self, key: &Key) -> anyhow::Result<Option<(ApiResource, bool)>> {
        let gvk = key.gvk();
        if let Some(known) = self.kinds.get(&gvk) {
            return Ok(known.clone());
        }
        let found = match discovery::pinned_kind(&self.client, &gvk).await {
            Ok((resource, abilities)) => Some((resource, abilities.scope == Scope::Namespaced)),
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(kube::Error::Discovery(_)) => None,
            Err(error) => return Err(error).context("cannot ask the API server for its kinds"),
        };
        self.kinds.insert(gvk, found.clone());
        Ok(found)
    }

    /// Forgets which kinds there are not: definitions have been applied.
    pub(crate) fn forget_missing(&mut self) {
        self.kinds.retain(|_, found| found.is_some());
    }

    async fn api(&mut self, key: &Key) -> anyhow::Result<Option<Api<DynamicObject>>> {
        let found = self.kind(key).await?;
        Ok(found.map(|(resource, is_namespaced)| match is_namespaced {
            true => Api::namespaced_with(self.client.clone(), &key.namespace, &resource),
            false => Api::all_with(self.client.clone(), &resource),
        }))
    }

    /// The object as it is now.
    pub(crate) async fn get(&mut self, key: &Key) -> anyhow::Result<Option<Value>> {
        let Some(api) = self.api(key).await? else {
            return Ok(None);
        };
        match api.get(&key.name).await {
            Ok(object) => Ok(Some(serde_json::to_value(object)?)),
            // Also of a kind whose definition has just gone.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(refused(error, &format!("cannot read {key}"))),
        }
    }

    /// All objects of the kind of `key`, in all namespaces.
    pub(crate) async fn list(&mut self, key: &Key) -> anyhow::Result<Vec<Value>> {
        let Some((resource, _)) = self.kind(key).await? else {
            return Ok(Vec::new());
        };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let (mut all, mut params) = (Vec::new(), ListParams::default().limit(PAGE));
        loop {
            let page = api.list(&params).await;
            let page =
                page.map_err(|error| refused(error, &format!("cannot list {}", resource.plural)))?;
            for mut object in page.items {
                object.types.get_or_insert(kube::core::TypeMeta {
                    api_version: resource.api_version.clone(),
                    kind: resource.kind.clone(),
                });
                all.push(serde_json::to_value(object)?);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(all),
            }
        }
    }

    /// Server-side apply: only fields that are in `object` are ours. With `force` they become ours even if they are another's.
    pub(crate) async fn apply(&mut self, object: &Value, force: bool) -> anyhow::Result<()> {
        let key = Key::of(object);
        let api = self.api(&key).await?.with_context(|| {
            format!(
                "the cluster has no {} {}; it needs Kubernetes 1.28 or later",
                key.api_version, key.kind
            )
        })?;
        let mut params = PatchParams::apply(MANAGER);
        params.force = force;
        let applied = api.patch(&key.name, &params, &Patch::Apply(object)).await;
        match applied {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => anyhow::bail!(
                "{key} has fields that somebody else set: {}; --force-conflicts takes them over",
                status.message
            ),
            Err(error) => Err(refused(error, &format!("cannot apply {key}"))),
        }
    }

    /// Deletes the object, and what belongs to it in the background; false if it was not there.
    pub(crate) async fn delete(&mut self, key: &Key) -> anyhow::Result<bool> {
        let Some(api) = self.api(key).await? else {
            return Ok(false);
        };
        match api.delete(&key.name, &DeleteParams::background()).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(refused(error, &format!("cannot delete {key}"))),
        }
    }

    /// Waits until `is_done` of the object as it is then (`None`: it is not there).
    pub(crate) async fn wait(
        &mut self,
        key: &Key,
        deadline: Instant,
        is_done: impl Fn(Option<&Value>) -> bool,
    ) -> anyhow::Result<bool> {
        loop {
            if is_done(self.get(key).await?.as_ref()) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// With the API server's own words, once.
fn refused(error: kube::Error, what: &str) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{what}: {}", status.message),
        error => anyhow::Error::new(error).context(what.to_owned()),
    }
}

/// Whether this program applied the object.
pub(crate) fn is_ours(object: &Value) -> bool {
    let entries = object["metadata"]["managedFields"].as_array();
    entries.is_some_and(|entries| entries.iter().any(|entry| entry["manager"] == MANAGER))
}

/// Whether a definition of a kind serves.
pub(crate) fn is_established(definition: Option<&Value>) -> bool {
    let conditions = definition.and_then(|object| object["status"]["conditions"].as_array());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|one| one["type"] == "Established" && one["status"] == "True")
    })
}
