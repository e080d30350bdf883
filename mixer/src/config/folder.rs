//! Updates from a watched folder of YAML files.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use lateen_adapter::workload::{Container, Workload};
use lateen_config::{ConfigSet, Folder, Object, Spec};
use tokio::sync::mpsc;

use super::{
    Update,
    object::{Key, Problem, Source},
};

/// A folder cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Open {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel will not tell about changes.
    #[error("cannot watch {path} for changes")]
    Watch {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Sends the state of `directory` now and whenever it changes, until the receiver is gone. The future is to
/// be spawned.
///
/// # Errors
/// When the folder cannot be read or watched.
pub fn watch(
    directory: &Path,
    updates: mpsc::Sender<Update>,
) -> Result<impl Future<Output = ()> + Send + use<>, FolderError> {
    let path = directory.to_owned();
    let folder = Folder::open(directory).map_err(|source| FolderError::Open {
        path: path.clone(),
        source,
    })?;
    let mut sets = folder.watch().map_err(|source| FolderError::Watch {
        path,
        source: Box::new(source),
    })?;
    Ok(async move {
        loop {
            let set = sets.borrow_and_update().clone();
            if updates.send(update(&set)).await.is_err() || sets.changed().await.is_err() {
                return;
            }
        }
    })
}

/// What a set of objects means to Mixer.
pub fn update(set: &ConfigSet) -> Update {
    let mut update = Update::default();
    for object in &set.objects {
        match &object.spec {
            Spec::Mixer(mixer) => update
                .objects
                .push(source(object, &mixer.kind, &mixer.spec)),
            Spec::QuotaSpec(spec) => {
                let source = source(object, "QuotaSpec", &object.raw);
                let quotas = spec.rules.iter().flat_map(|rule| &rule.quotas);
                update
                    .wanted_quotas
                    .extend(quotas.map(|quota| (quota.quota.clone(), source.clone())));
            }
            Spec::Pod(_) => update.workloads.extend(workload(object, &set.objects)),
            _ => {}
        }
    }
    // Kinds that are not Mixer's are the business of others, who watch the same folder. That nobody but Mixer
    // enforces roles is a warning to others.
    let is_ours = |p: &&lateen_config::Problem| {
        p.key.as_ref().is_none_or(|key| match &*key.group {
            "config.istio.io" => true,
            "rbac.istio.io" => p.is_error(),
            _ => false,
        })
    };
    update.problems = set
        .problems
        .iter()
        .filter(is_ours)
        .map(|p| Problem {
            object: p.key.as_ref().map(ToString::to_string).unwrap_or_default(),
            place: format!("{}:{}", p.file, p.line),
            field: p.field.clone(),
            reason: if p.hint.is_empty() {
                p.reason.clone()
            } else {
                format!("{} ({})", p.reason, p.hint)
            },
            is_refused: p.is_error(),
            is_held: p.is_error()
                && p.key
                    .as_ref()
                    .is_some_and(|k| set.objects.iter().any(|o| o.key == *k)),
        })
        .collect();
    update
}

fn source(object: &Object, kind: &str, spec: &serde_json::Value) -> Source {
    Source {
        key: Key {
            kind: Arc::from(kind),
            namespace: Arc::clone(&object.key.namespace),
            name: Arc::clone(&object.key.name),
        },
        annotations: Arc::new(object.annotations.clone()),
        spec: Arc::new(spec.clone()),
        origin: Some(object.origin.clone()),
    }
}

/// A pod as a workload. One without an address is none yet.
fn workload(object: &Object, all: &[Arc<Object>]) -> Option<Workload> {
    let Spec::Pod(pod) = &object.spec else {
        return None;
    };
    let ip: IpAddr = pod.status.pod_ip.parse().ok()?;
    let (name, namespace) = (&*object.key.name, &*object.key.namespace);
    let (kind, api_version, owner_name) = match pod.owner_references.first() {
        Some(owner) if owner.kind == "ReplicaSet" => {
            let hash = object
                .labels
                .get("pod-template-hash")
                .map_or("", String::as_str);
            match owner
                .name
                .strip_suffix(hash)
                .and_then(|front| front.strip_suffix('-'))
            {
                Some(deployment) if !hash.is_empty() => ("deployment", "apps/v1", deployment),
                _ => ("replicaset", "apps/v1", owner.name.as_str()),
            }
        }
        Some(owner) => (
            owner.kind.as_str(),
            owner.api_version.as_str(),
            owner.name.as_str(),
        ),
        None => ("pod", "v1", name),
    };
    let kind = kind.to_ascii_lowercase();
    let owner =
        format!("kubernetes://apis/{api_version}/namespaces/{namespace}/{kind}s/{owner_name}");
    Some(Workload {
        uid: format!("kubernetes://{name}.{namespace}"),
        ip: Some(ip),
        host_ip: None,
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        labels: object.labels.clone(),
        service_account: pod.spec.account().to_owned(),
        workload_name: owner_name.to_owned(),
        workload_namespace: namespace.to_owned(),
        owner,
        services: services(&object.labels, namespace, all),
        containers: pod
            .spec
            .containers
            .iter()
            .map(|c| Container {
                name: c.name.clone(),
                ports: c.ports.iter().map(|p| p.container_port).collect(),
            })
            .collect(),
    })
}

/// The services of `namespace` that select a pod with these labels.
fn services(
    labels: &BTreeMap<String, String>,
    namespace: &str,
    all: &[Arc<Object>],
) -> Vec<String> {
    all.iter()
        .filter(|o| *o.key.namespace == *namespace)
        .filter_map(|o| match &o.spec {
            Spec::Service(service) => Some((o, &service.selector)),
            _ => None,
        })
        .filter(|(_, selector)| {
            !selector.is_empty() && selector.iter().all(|(k, v)| labels.get(k) == Some(v))
        })
        .map(|(o, _)| o.key.name.to_string())
        .collect()
}
