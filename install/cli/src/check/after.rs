//! After an installation: is everything there, do the programs run, do the webhooks answer.

use kube::api::{Api, DynamicObject, PostParams};
use serde_json::{Value, json};

use super::{Finding, text};
use crate::cluster::{Cluster, Key, inventory::Inventory, is_established};

/// How what was installed is.
pub(crate) async fn after(
    cluster: &mut Cluster,
    installed: &Inventory,
) -> anyhow::Result<Vec<Finding>> {
    let mut missing = Vec::new();
    let mut findings = Vec::new();
    let mut definitions = (0, Vec::new());
    for key in &installed.objects {
        let Some(object) = cluster.get(key).await? else {
            missing.push(key.to_string());
            continue;
        };
        match key.kind.as_str() {
            "Deployment" => findings.push(deployment(key, &object)),
            "CustomResourceDefinition" => {
                definitions.0 += 1;
                if !is_established(Some(&object)) {
                    definitions.1.push(key.name.clone());
                }
            }
            "MutatingWebhookConfiguration" => findings.push(injector(cluster, key, &object).await?),
            "ValidatingWebhookConfiguration" => {
                findings.push(validator(cluster, key, &object).await?);
            }
            _ => {}
        }
    }
    findings.insert(
        0,
        match missing.is_empty() {
            true => {
                let count = installed.objects.len();
                Finding::passed("objects", format!("all {count} objects are there"))
            }
            false => Finding::failed(
                "objects",
                format!(
                    "gone: {}; `lateen upgrade` puts them back",
                    missing.join(", ")
                ),
            ),
        },
    );
    if !definitions.1.is_empty() {
        let message = format!("not served by the cluster: {}", definitions.1.join(", "));
        findings.push(Finding::failed("definitions", message));
    } else if definitions.0 > 0 {
        let message = format!("{} kinds are served", definitions.0);
        findings.push(Finding::passed("definitions", message));
    }
    Ok(findings)
}

/// Whether as many pods are available as shall be.
pub(crate) fn is_ready(deployment: &Value) -> bool {
    let wanted = deployment["spec"]["replicas"].as_u64().unwrap_or(1);
    let status = &deployment["status"];
    let is_seen =
        status["observedGeneration"].as_u64() >= deployment["metadata"]["generation"].as_u64();
    let updated = status["updatedReplicas"].as_u64().unwrap_or(0);
    let available = status["availableReplicas"].as_u64().unwrap_or(0);
    is_seen && updated >= wanted && available >= wanted
}

fn deployment(key: &Key, object: &Value) -> Finding {
    let wanted = object["spec"]["replicas"].as_u64().unwrap_or(1);
    if is_ready(object) {
        return Finding::passed("deployments", format!("{key}: {wanted} available"));
    }
    let available = object["status"]["availableReplicas"].as_u64().unwrap_or(0);
    let conditions = object["status"]["conditions"].as_array();
    let said: Vec<&str> = conditions
        .into_iter()
        .flatten()
        .filter(|one| one["status"] == "False" || one["type"] == "ReplicaFailure")
        .filter_map(|one| one["message"].as_str())
        .collect();
    let why = match said.is_empty() {
        true => String::new(),
        false => format!(" ({})", said.join("; ")),
    };
    Finding::failed(
        "deployments",
        format!("{key}: {available} of {wanted} available{why}"),
    )
}

/// Whether Pilot has put its roots into every webhook of `object`.
fn has_roots(object: &Value) -> bool {
    let webhooks = object["webhooks"].as_array();
    webhooks.is_some_and(|all| {
        all.iter()
            .all(|one| !text(one, "/clientConfig/caBundle").is_empty())
    })
}

const NO_ROOTS: &str = "Pilot has not put its roots in yet (caBundle)";

/// Asks it to refuse something.
async fn validator(cluster: &mut Cluster, key: &Key, object: &Value) -> anyhow::Result<Finding> {
    if !has_roots(object) {
        return Ok(Finding::failed("webhooks", format!("{key}: {NO_ROOTS}")));
    }
    // Let in by the schema of its definition, and wrong by our rules: a weight below zero.
    let wrong = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "lateen-check", "namespace": "istio-system"},
        "spec": {"hosts": ["lateen-check.invalid"], "http": [{"route": [
            {"destination": {"host": "a.invalid"}, "weight": -1},
        ]}]},
    });
    Ok(match dry_run(cluster, &wrong).await? {
        Err(message) if message.contains("admission webhook") && message.contains("denied") => {
            Finding::passed("webhooks", format!("{key} refuses what is wrong"))
        }
        Err(message) => Finding::failed("webhooks", format!("{key} does not answer: {message}")),
        Ok(_) => Finding::failed("webhooks", format!("{key} lets in what is wrong")),
    })
}

/// Asks it for a sidecar.
async fn injector(cluster: &mut Cluster, key: &Key, object: &Value) -> anyhow::Result<Finding> {
    if !has_roots(object) {
        return Ok(Finding::failed("webhooks", format!("{key}: {NO_ROOTS}")));
    }
    let revision = key.name.strip_prefix("lateen-sidecar-injector-");
    let label = match revision {
        Some(revision) => json!({"istio.io/rev": revision}),
        None => json!({"sidecar.istio.io/inject": "true"}),
    };
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "lateen-check", "namespace": "default", "labels": label},
        "spec": {"serviceAccountName": "default", "containers": [{"name": "app", "image": "app"}]},
    });
    Ok(match dry_run(cluster, &pod).await? {
        Ok(pod) => {
            let has_proxy = ["containers", "initContainers"].iter().any(|field| {
                let containers = pod["spec"][field].as_array();
                containers.is_some_and(|all| all.iter().any(|one| one["name"] == "istio-proxy"))
            });
            match has_proxy {
                true => Finding::passed("webhooks", format!("{key} adds sidecars")),
                false => Finding::failed(
                    "webhooks",
                    format!("{key} adds no sidecar to a pod that asks"),
                ),
            }
        }
        Err(message) => Finding::failed("webhooks", format!("{key}: {message}")),
    })
}

/// What the cluster would make of it; the inner error is its refusal.
async fn dry_run(cluster: &mut Cluster, object: &Value) -> anyhow::Result<Result<Value, String>> {
    let key = Key::of(object);
    let Some((resource, _)) = cluster.kind(&key).await? else {
        return Ok(Err(format!("the cluster has no {}", key.kind)));
    };
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &key.namespace, &resource);
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    match api.create(&params, &object).await {
        Ok(made) => Ok(Ok(serde_json::to_value(made)?)),
        Err(kube::Error::Api(status)) => Ok(Err(status.message.clone())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_is_ready_when_its_newest_pods_are() {
        let object = |generation: u64, updated: u64, available: u64| {
            json!({
                "metadata": {"generation": 2}, "spec": {"replicas": 2},
                "status": {"observedGeneration": generation, "updatedReplicas": updated, "availableReplicas": available},
            })
        };
        assert!(is_ready(&object(2, 2, 2)));
        assert!(!is_ready(&object(1, 2, 2)), "not seen yet");
        assert!(!is_ready(&object(2, 1, 2)), "old pods");
        assert!(!is_ready(&object(2, 2, 1)));
        assert!(!is_ready(
            &json!({"metadata": {"generation": 1}, "spec": {}})
        ));
    }
}
