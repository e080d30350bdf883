//! Whether a pod gets a sidecar.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::{STATUS, settings::Settings, workload::Found};

/// Namespaces of the cluster itself: a sidecar there could keep it from starting. Istio: `IgnoredNamespaces`.
const SYSTEM: [&str; 4] = [
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// Label and annotation by which a pod says whether it wants one.
pub const WISH: &str = "sidecar.istio.io/inject";
/// Label of namespaces and pods with the revision they belong to.
const REVISION: &str = "istio.io/rev";
/// The revision of those who name none.
const DEFAULT: &str = "default";

/// Why a pod has no sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// The object has no pods.
    NotAWorkload,
    /// It shares the node's network, whose traffic would all be intercepted.
    HostNetwork,
    /// It is in this namespace of the cluster itself.
    SystemNamespace(String),
    /// Its label or annotation says so, with this value.
    Refused(String),
    /// Nothing says that it should.
    NotAsked,
    /// It has one.
    Already,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Skipped::NotAWorkload => f.write_str("has no pods"),
            Skipped::HostNetwork => f.write_str("uses the node's network (hostNetwork)"),
            Skipped::SystemNamespace(name) => write!(f, "is in namespace {name}"),
            Skipped::Refused(value) => write!(f, "{WISH} is {value:?}"),
            Skipped::NotAsked => f.write_str("does not ask for a sidecar"),
            Skipped::Already => f.write_str("has a sidecar already"),
        }
    }
}

/// What decides about a pod.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Label `sidecar.istio.io/inject`, or else the annotation: the label is what webhooks select by.
    pub wish: Option<&'a str>,
    /// Whether it has annotation `sidecar.istio.io/status`.
    pub is_injected: bool,
}

impl Facts<'_> {
    /// Why it gets no sidecar; `None` if it gets one.
    #[must_use]
    pub fn skip(&self, settings: &Settings) -> Option<Skipped> {
        if self.host_network {
            return Some(Skipped::HostNetwork);
        }
        if SYSTEM.contains(&self.namespace) {
            return Some(Skipped::SystemNamespace(self.namespace.to_owned()));
        }
        match self.wish {
            None | Some("") if !settings.inject_by_default => return Some(Skipped::NotAsked),
            None | Some("" | "true" | "y" | "yes" | "on") => {}
            Some(other) => return Some(Skipped::Refused(other.to_owned())),
        }
        self.is_injected.then_some(Skipped::Already)
    }
}

/// Why it gets none; `None` if it gets one.
pub(crate) fn skip(found: &Found<'_>, settings: &Settings) -> Option<Skipped> {
    let pod = &*found.pod;
    let metadata = |part: &str, name: &str| pod.get("metadata")?.get(part)?.get(name);
    let said = metadata("labels", WISH).or_else(|| metadata("annotations", WISH));
    let said = said.map(|value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    });
    Facts {
        namespace: &found.namespace,
        host_network: pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)),
        wish: said.as_deref(),
        is_injected: metadata("annotations", STATUS).is_some(),
    }
    .skip(settings)
}

/// Whether the webhook of `revision` is asked about a pod: by labels of its namespace, or else its own. This is what the
/// selectors of Istio's webhooks say, and those of `lateen-sidecar-injector`.
#[must_use]
pub fn is_selected(
    namespace: &BTreeMap<String, String>,
    pod: &BTreeMap<String, String>,
    revision: &str,
) -> bool {
    let of = |labels: &BTreeMap<String, String>, name: &str| labels.get(name).cloned();
    let wish = of(pod, WISH);
    if wish.as_deref() == Some("false") {
        return false;
    }
    match (of(namespace, "istio-injection"), of(namespace, REVISION)) {
        (Some(injection), _) => injection == "enabled" && revision == DEFAULT,
        (None, Some(named)) => named == revision,
        // The namespace says nothing, so pods may.
        (None, None) => match of(pod, REVISION) {
            Some(named) => named == revision,
            None => wish.as_deref() == Some("true") && revision == DEFAULT,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        text.split_whitespace()
            .map(|pair| pair.split_once('=').unwrap())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn namespaces_select_before_pods() {
        for (namespace, pod, revision, wanted) in [
            ("", "", "default", false),
            ("istio-injection=enabled", "", "default", true),
            ("istio-injection=enabled", "", "canary", false),
            (
                "istio-injection=disabled",
                "sidecar.istio.io/inject=true",
                "default",
                false,
            ),
            (
                "istio-injection=enabled",
                "sidecar.istio.io/inject=false",
                "default",
                false,
            ),
            // Istio: `istio-injection` wins.
            (
                "istio-injection=enabled istio.io/rev=canary",
                "",
                "canary",
                false,
            ),
            ("istio.io/rev=canary", "", "canary", true),
            ("istio.io/rev=canary", "", "default", false),
            (
                "istio.io/rev=canary",
                "sidecar.istio.io/inject=false",
                "canary",
                false,
            ),
            ("", "sidecar.istio.io/inject=true", "default", true),
            ("", "sidecar.istio.io/inject=true", "canary", false),
            ("", "istio.io/rev=canary", "canary", true),
            (
                "",
                "istio.io/rev=canary sidecar.istio.io/inject=true",
                "default",
                false,
            ),
        ] {
            assert_eq!(
                is_selected(&labels(namespace), &labels(pod), revision),
                wanted,
                "{namespace} | {pod} | {revision}"
            );
        }
    }
}
