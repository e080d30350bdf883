//! Whether a pod gets a sidecar.

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
            Skipped::Refused(value) => write!(f, "sidecar.istio.io/inject is {value:?}"),
            Skipped::NotAsked => f.write_str("does not ask for a sidecar"),
            Skipped::Already => f.write_str("has a sidecar already"),
        }
    }
}

/// Why it gets none; `None` if it gets one.
pub(crate) fn skip(found: &Found<'_>, settings: &Settings) -> Option<Skipped> {
    let pod = &*found.pod;
    if pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return Some(Skipped::HostNetwork);
    }
    if SYSTEM.contains(&found.namespace.as_str()) {
        return Some(Skipped::SystemNamespace(found.namespace.clone()));
    }
    let metadata = |part: &str, name: &str| pod.get("metadata")?.get(part)?.get(name);
    // The label is what webhooks select by, so it counts first.
    let said = metadata("labels", "sidecar.istio.io/inject")
        .or_else(|| metadata("annotations", "sidecar.istio.io/inject"));
    let said = said.map(|value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    });
    match said.as_deref() {
        None | Some("") if !settings.inject_by_default => return Some(Skipped::NotAsked),
        None | Some("" | "true" | "y" | "yes" | "on") => {}
        Some(other) => return Some(Skipped::Refused(other.to_owned())),
    }
    metadata("annotations", STATUS).map(|_| Skipped::Already)
}
