//! What is put into or selected among pods: Sidecars, Telemetries, injection.

use std::collections::BTreeMap;

use super::{Mesh, Resource, selects, strings};
use crate::object::Labels;

/// Codes of the three faults a kind of selection has.
struct Codes {
    same_pods: &'static str,
    several_defaults: &'static str,
}

/// IST0110, IST0111, IST0101, IST0167: see [`selection`].
pub(super) fn sidecars(mesh: &mut Mesh<'_>) {
    let all: Vec<&Resource> = mesh.of("networking.istio.io", "Sidecar").collect();
    let labels = |of: &Resource| strings(of.spec().get("workloadSelector").get("labels").value);
    let codes = Codes {
        same_pods: "IST0110",
        several_defaults: "IST0111",
    };
    selection(mesh, &all, labels, &codes);
    for sidecar in all {
        let wanted = labels(sidecar);
        let ambient = match wanted.is_empty() {
            true => mesh
                .namespace_labels(sidecar.namespace())
                .is_some_and(|labels| {
                    labels.get("istio.io/dataplane-mode").map(String::as_str) == Some("ambient")
                        && !labels.contains_key("istio-injection")
                        && !labels.contains_key("istio.io/rev")
                }),
            false => mesh.of("", "Pod").any(|pod| {
                pod.namespace() == sidecar.namespace()
                    && selects(&wanted, &pod.labels)
                    && is_ambient(pod)
            }),
        };
        if ambient {
            mesh.report(
                "IST0167",
                sidecar,
                "spec",
                "pods in ambient mode have no sidecar, so this has no effect",
            );
        }
    }
}

/// IST0159, IST0160, IST0101: see [`selection`].
pub(super) fn telemetries(mesh: &mut Mesh<'_>) {
    let all: Vec<&Resource> = mesh
        .of("telemetry.istio.io", "Telemetry")
        .filter(|telemetry| {
            !telemetry.spec().has("targetRef") && telemetry.spec().get("targetRefs").count() == 0
        })
        .collect();
    let labels = |of: &Resource| strings(of.spec().get("selector").get("matchLabels").value);
    let codes = Codes {
        same_pods: "IST0159",
        several_defaults: "IST0160",
    };
    selection(mesh, &all, labels, &codes);
}

fn is_ambient(pod: &Resource) -> bool {
    pod.annotations
        .get("ambient.istio.io/redirection")
        .map(String::as_str)
        == Some("enabled")
}

/// Two that pick the same pod, two that are the default of a namespace, one that picks no pod.
fn selection(
    mesh: &mut Mesh<'_>,
    all: &[&Resource],
    labels: impl Fn(&Resource) -> Labels,
    codes: &Codes,
) {
    let mut defaults: BTreeMap<&str, Vec<&Resource>> = BTreeMap::new();
    let mut selecting: Vec<(&Resource, Labels)> = Vec::new();
    for resource in all {
        let wanted = labels(resource);
        if wanted.is_empty() {
            defaults
                .entry(resource.namespace())
                .or_default()
                .push(resource);
        } else {
            selecting.push((resource, wanted));
        }
    }
    for (namespace, rivals) in defaults.iter().filter(|(_, rivals)| rivals.len() > 1) {
        let names: Vec<&str> = rivals.iter().map(|rival| rival.name.as_str()).collect();
        for rival in rivals {
            let text = format!(
                "{} are all the default of namespace {namespace}; keep one, or select workloads",
                names.join(", ")
            );
            mesh.report(codes.several_defaults, rival, "spec", text);
        }
    }
    let pods: Vec<&Resource> = mesh.of("", "Pod").collect();
    for (index, (resource, wanted)) in selecting.iter().enumerate() {
        let picks = |pod: &Resource, of: &Resource, labels: &Labels| {
            pod.namespace() == of.namespace() && selects(labels, &pod.labels)
        };
        let own: Vec<&&Resource> = pods
            .iter()
            .filter(|pod| picks(pod, resource, wanted))
            .collect();
        if own.is_empty() {
            let text = format!(
                "the selector picks no pod of namespace {}",
                resource.namespace()
            );
            mesh.report("IST0101", resource, "spec", text);
            continue;
        }
        let mut rivals: Vec<&str> = selecting
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != index)
            .filter(|(_, (other, labels))| own.iter().any(|pod| picks(pod, other, labels)))
            .map(|(_, (other, _))| other.name.as_str())
            .collect();
        rivals.sort_unstable();
        if !rivals.is_empty() {
            let text = format!(
                "{} pick the same pods; which one applies is not defined",
                rivals.join(", ")
            );
            mesh.report(codes.same_pods, resource, "spec", text);
        }
    }
}

/// IST0102, IST0103, IST0123: namespaces and pods that sidecars are not put into.
pub(super) fn injection(mesh: &mut Mesh<'_>) {
    for namespace in mesh.of("", "Namespace") {
        let name = namespace.name.as_str();
        if matches!(
            name,
            "kube-system" | "kube-public" | "kube-node-lease" | "local-path-storage"
        ) || name == mesh.root()
        {
            continue;
        }
        let labels = &namespace.labels;
        let (by_injection, by_revision) = (
            labels.get("istio-injection"),
            labels.contains_key("istio.io/rev"),
        );
        let ambient = labels.get("istio.io/dataplane-mode").map(String::as_str) == Some("ambient");
        if by_injection.is_none() && !by_revision && !ambient {
            mesh.report("IST0102", namespace, "metadata", format!("sidecars are not put into namespace {name}; kubectl label namespace {name} istio-injection=enabled, or =disabled to be silent"));
        } else if by_injection.is_some() && by_revision {
            mesh.report(
                "IST0123",
                namespace,
                "metadata.labels",
                "istio-injection wins over istio.io/rev; keep one",
            );
        }
    }
    for pod in mesh.of("", "Pod") {
        if !mesh.injects_pod(pod.namespace(), &pod.labels, &pod.annotations)
            || !mesh.injects(pod.namespace())
        {
            continue;
        }
        let spec = pod.spec();
        let native = spec.get("initContainers").items();
        let has_proxy = spec
            .get("containers")
            .items()
            .chain(native)
            .any(|container| container.str("name") == "istio-proxy");
        if !has_proxy && !spec.flag("hostNetwork") {
            mesh.report(
                "IST0103",
                pod,
                "spec.containers",
                format!("pod {} has no sidecar; restart it", pod.name),
            );
        }
    }
}

/// IST0146 and IST0147: `image: auto` where injection does not replace it.
pub(super) fn image_auto(mesh: &mut Mesh<'_>) {
    let pods = mesh.of("", "Pod").map(|pod| (pod, pod.labels.clone()));
    let deployments = mesh.of("apps", "Deployment").map(|deployment| {
        let metadata = deployment.spec().get("template").get("metadata");
        (deployment, strings(metadata.get("labels").value))
    });
    for (resource, labels) in pods.chain(deployments).collect::<Vec<_>>() {
        let auto = resource
            .pod_spec()
            .get("containers")
            .items()
            .find(|container| {
                container.str("name") == "istio-proxy" && container.str("image") == "auto"
            });
        let Some(container) = auto else { continue };
        if resource.kind == "Pod" {
            mesh.report(
                "IST0147",
                resource,
                &container.path,
                "image auto was not replaced: the pod was made without injection",
            );
        } else if !webhook_takes(mesh, resource.namespace(), &labels) {
            mesh.report(
                "IST0146",
                resource,
                &container.path,
                "image auto will not be replaced: no injection webhook takes these pods",
            );
        }
    }
}

/// Whether some injector's webhook takes pods with these labels in this namespace.
fn webhook_takes(mesh: &Mesh<'_>, namespace: &str, labels: &Labels) -> bool {
    let none = Labels::new();
    let namespace = mesh.namespace_labels(namespace).unwrap_or(&none);
    mesh.of(
        "admissionregistration.k8s.io",
        "MutatingWebhookConfiguration",
    )
    .flat_map(|configuration| configuration.at("webhooks").items().collect::<Vec<_>>())
    .filter(|webhook| webhook.str("name").contains("sidecar-injector"))
    .any(|webhook| {
        super::platform::selector_matches(&webhook.get("namespaceSelector"), namespace)
            && super::platform::selector_matches(&webhook.get("objectSelector"), labels)
    })
}
