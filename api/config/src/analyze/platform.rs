//! What surrounds the mesh: webhooks, external control planes, mesh networks.

use super::{Mesh, Resource};
use crate::object::Labels;
use crate::review::{At, text};

/// IST0126: mesh networks name a registry that no remote secret brings.
pub(super) fn mesh_networks(mesh: &mut Mesh<'_>) {
    let mut known = vec!["Kubernetes".to_owned()];
    for secret in mesh.of("", "Secret").filter(|secret| {
        secret.labels.get("istio/multiCluster").map(String::as_str) == Some("true")
    }) {
        for field in ["data", "stringData"] {
            known.extend(secret.at(field).entries().map(|(name, _)| name.to_owned()));
        }
    }
    let networks = At::new(mesh.networks, "networks").get("networks");
    for (name, network) in networks.entries() {
        for endpoint in network.get("endpoints").items() {
            let registry = endpoint.str("fromRegistry");
            if registry.is_empty() || known.iter().any(|other| other == registry) {
                continue;
            }
            mesh.messages.push(super::Message {
                code: "IST0126",
                level: super::level("IST0126"),
                resource: format!("MeshNetworks {}/meshnetworks", mesh.root()),
                text: format!(
                    "network {name} is of registry {registry}, which no remote secret brings"
                ),
                file: String::new(),
                line: 1,
            });
        }
    }
}

fn webhooks_of(configuration: &Resource) -> Vec<At<'_>> {
    configuration.at("webhooks").items().collect()
}

/// Istio's own webhook configurations, by their names.
fn of_istio<'a>(mesh: &Mesh<'a>) -> Vec<&'a Resource> {
    const GROUP: &str = "admissionregistration.k8s.io";
    let validating = mesh
        .of(GROUP, "ValidatingWebhookConfiguration")
        .filter(|it| {
            it.name.contains("istio-validator") || it.name.contains("istiod-default-validator")
        });
    let mutating = mesh
        .of(GROUP, "MutatingWebhookConfiguration")
        .filter(|it| it.name.contains("istio-sidecar-injector"));
    validating.chain(mutating).collect()
}

/// IST0163: a webhook that reaches nobody; IST0164: one that goes to an address instead of a name.
pub(super) fn external_control_plane(mesh: &mut Mesh<'_>) {
    for configuration in of_istio(mesh) {
        for webhook in webhooks_of(configuration) {
            let client = webhook.get("clientConfig");
            let url = client.get("url");
            if client.has("service") {
                continue;
            }
            let name = webhook.str("name");
            if url.text().is_empty() {
                mesh.report(
                    "IST0163",
                    configuration,
                    &client.path,
                    format!("webhook {name} has neither url nor service"),
                );
                break;
            }
            match text::url_parts(url.text()) {
                None | Some((_, "", _)) => {
                    mesh.report(
                        "IST0163",
                        configuration,
                        &url.path,
                        format!("webhook {name}: {:?} is not a URL", url.text()),
                    );
                    break;
                }
                Some((_, host, _)) if text::is_ip(host.trim_matches(['[', ']'])) => {
                    mesh.report("IST0164", configuration, &url.path, format!("webhook {name} goes to address {host}, which no certificate names; use a host name"));
                    break;
                }
                Some(_) => {}
            }
        }
    }
}

/// Whether a Kubernetes label selector matches; an empty one matches everything.
pub(super) fn selector_matches(selector: &At<'_>, labels: &Labels) -> bool {
    let by_labels = selector
        .get("matchLabels")
        .entries()
        .all(|(key, value)| labels.get(key).map(String::as_str) == Some(value.text()));
    by_labels
        && selector.get("matchExpressions").items().all(|expression| {
            let value = labels.get(expression.str("key"));
            let values = expression.get("values").texts();
            match expression.str("operator") {
                "In" => value.is_some_and(|value| values.contains(&value.as_str())),
                "NotIn" => value.is_none_or(|value| !values.contains(&value.as_str())),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// IST0139: an injector whose Service is not there, or several that take the same pods.
pub(super) fn webhooks(mesh: &mut Mesh<'_>) {
    let injectors: Vec<(&Resource, At<'_>)> = mesh
        .of(
            "admissionregistration.k8s.io",
            "MutatingWebhookConfiguration",
        )
        .filter(|it| {
            it.name.contains("istio-sidecar-injector")
                || it.labels.get("app").map(String::as_str) == Some("sidecar-injector")
        })
        .flat_map(|it| {
            webhooks_of(it)
                .into_iter()
                .map(move |webhook| (it, webhook))
        })
        .collect();
    for (configuration, webhook) in &injectors {
        let service = webhook.get("clientConfig").get("service");
        if !service.is_set() {
            continue;
        }
        let there = mesh
            .of("", "Service")
            .any(|it| it.name == service.str("name") && it.namespace() == service.str("namespace"));
        if !there {
            let text = format!(
                "Service {}/{} of the webhook is not there",
                service.str("namespace"),
                service.str("name")
            );
            mesh.report("IST0139", configuration, &service.path, text);
        }
    }
    for (configuration, samples) in overlapping(&injectors) {
        mesh.report("IST0139", configuration, "webhooks", samples);
    }
}

/// Labels that selectors ask about, in the combinations that people use.
fn samples() -> Vec<(Labels, Labels)> {
    let labels = |pairs: &[(&str, &str)]| -> Labels {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    };
    let namespaces = [
        labels(&[]),
        labels(&[("istio-injection", "enabled")]),
        labels(&[("istio-injection", "disabled")]),
        labels(&[("istio.io/rev", "default")]),
        labels(&[("istio.io/rev", "canary")]),
    ];
    let objects = [
        labels(&[]),
        labels(&[("sidecar.istio.io/inject", "true")]),
        labels(&[("sidecar.istio.io/inject", "false")]),
        labels(&[("istio.io/rev", "default")]),
        labels(&[("istio.io/rev", "canary")]),
    ];
    namespaces
        .iter()
        .flat_map(|namespace| {
            objects
                .iter()
                .map(|object| (namespace.clone(), object.clone()))
        })
        .collect()
}

/// Each configuration that shares pods with another one.
fn overlapping<'a>(injectors: &[(&'a Resource, At<'a>)]) -> Vec<(&'a Resource, String)> {
    let mut found: Vec<(&Resource, String)> = Vec::new();
    for (configuration, _) in injectors {
        if found
            .iter()
            .any(|(other, _)| std::ptr::eq(*other, *configuration))
        {
            continue;
        }
        let takes = |of: &Resource, namespace: &Labels, object: &Labels| {
            injectors
                .iter()
                .filter(|(it, _)| std::ptr::eq(*it, of))
                .any(|(_, webhook)| {
                    selector_matches(&webhook.get("namespaceSelector"), namespace)
                        && selector_matches(&webhook.get("objectSelector"), object)
                })
        };
        let rival = injectors
            .iter()
            .map(|(it, _)| *it)
            .filter(|it| !std::ptr::eq(*it, *configuration))
            .find(|rival| {
                samples().iter().any(|(namespace, object)| {
                    takes(configuration, namespace, object) && takes(rival, namespace, object)
                })
            });
        if let Some(rival) = rival {
            found.push((
                configuration,
                format!(
                    "{} takes pods that this takes too; they would be injected twice",
                    rival.shown()
                ),
            ));
        }
    }
    found
}
