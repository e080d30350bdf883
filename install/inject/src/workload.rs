//! Where in an object its pods are, and who owns them.

use serde_json::Value;

use crate::InjectError;

/// A pod in an object that is about to be changed.
#[derive(Debug)]
pub struct Found<'a> {
    /// The pod, or the template of one: has `metadata` and `spec`.
    pub pod: &'a mut Value,
    /// Name of the workload; a prefix if Kubernetes makes it up.
    pub name: String,
    /// Its namespace; empty if it names none.
    pub namespace: String,
    /// `apiVersion` of the owner.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
}

impl Found<'_> {
    /// Whether it ends by itself.
    pub fn is_job(&self) -> bool {
        matches!(self.kind.as_str(), "Job" | "CronJob")
    }
}

/// The pods of an object; none of kinds that have none.
///
/// # Errors
/// When a kind that has pods lacks them.
pub fn find(object: &mut Value) -> Result<Vec<Found<'_>>, InjectError> {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or("");
    let kind = text("/kind").to_owned();
    let path = match (text("/apiVersion"), kind.as_str()) {
        ("v1", "List") => {
            let Some(items) = object.get_mut("items").and_then(Value::as_array_mut) else {
                return Ok(Vec::new());
            };
            let all = items.iter_mut().map(find).collect::<Result<Vec<_>, _>>()?;
            return Ok(all.into_iter().flatten().collect());
        }
        ("v1", "Pod") => "",
        ("apps/v1" | "apps/v1beta1" | "apps/v1beta2" | "extensions/v1beta1", "Deployment")
        | ("apps/v1" | "apps/v1beta1" | "apps/v1beta2", "StatefulSet")
        | ("apps/v1" | "apps/v1beta2" | "extensions/v1beta1", "DaemonSet" | "ReplicaSet")
        | ("batch/v1", "Job")
        | ("v1", "ReplicationController") => "/spec/template",
        ("batch/v1" | "batch/v1beta1", "CronJob") => "/spec/jobTemplate/spec/template",
        _ => return Ok(Vec::new()),
    };
    let mut name = text("/metadata/name").to_owned();
    if name.is_empty() {
        text("/metadata/generateName")
            .trim_end_matches('-')
            .clone_into(&mut name);
    }
    let namespace = text("/metadata/namespace").to_owned();
    let api_version = text("/apiVersion").to_owned();
    let shape = |path| InjectError::Shape {
        kind: kind.clone(),
        path,
    };
    let pod = object
        .pointer_mut(path)
        .filter(|pod| pod.is_object())
        .ok_or_else(|| shape("pod template"))?;
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
    if containers.is_none_or(Vec::is_empty) {
        return Err(shape("spec.containers"));
    }
    Ok(vec![Found {
        pod,
        name,
        namespace,
        api_version,
        kind,
    }])
}

/// Who made a pod, by its owner references: of a ReplicaSet the Deployment, of a Job the CronJob, as their names tell.
pub(crate) struct Owner {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) name: String,
}

pub(crate) fn owner(pod: &Value) -> Option<Owner> {
    let owners = pod.pointer("/metadata/ownerReferences")?.as_array()?;
    let owner = owners
        .iter()
        .find(|owner| owner.get("controller") == Some(&Value::Bool(true)))?;
    let text = |name: &str| owner.get(name).and_then(Value::as_str).unwrap_or("");
    let (api_version, kind, name) = (text("apiVersion"), text("kind"), text("name"));
    let hash = pod.pointer("/metadata/labels/pod-template-hash");
    let hash = hash.and_then(Value::as_str).unwrap_or("");
    let (kind, name) = match kind {
        "ReplicaSet" if !hash.is_empty() => match name.strip_suffix(hash) {
            Some(deployment) => ("Deployment", deployment.trim_end_matches('-')),
            None => (kind, name),
        },
        // Kubernetes appends the minutes since 1970 that the Job was due at.
        "Job" => match name.rsplit_once('-') {
            Some((cron, due))
                if (8..=10).contains(&due.len()) && due.bytes().all(|b| b.is_ascii_digit()) =>
            {
                ("CronJob", cron)
            }
            _ => (kind, name),
        },
        _ => (kind, name),
    };
    Some(Owner {
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
    })
}
