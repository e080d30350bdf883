//! Adds a sidecar to workloads, as `lateen inject` does to files and a webhook to pods.
//!
//! `text` (YAML in and out) → `workload` (where in an object its pod is) → `decide` (whether) → `pod` (what is added):
//! `template` (what a sidecar is) with `annotation` (what the workload asks for) and `probe` (checks that the kubelet
//! makes), merged by `merge` with what the workload says itself of its `istio-proxy`.
//!
//! Names (containers, volumes, environment, labels, annotations) are Istio's: what reads injected pods knows those.
//! No I/O, no clock.

pub mod text;
pub mod workload;
mod decide;
mod pod;
pub mod template;
mod annotation;
mod probe;
mod merge;
pub mod settings;

pub use decide::{Facts, Skipped, WISH, is_selected};
pub use settings::Settings;
pub use text::{Injected, inject_text};

use serde_json::Value;

/// Name of the sidecar's container.
pub const PROXY: &str = "istio-proxy";
/// Name of the container that has the kernel send traffic to it.
pub const INIT: &str = "istio-init";
/// Annotation that tells what was added.
pub const STATUS: &str = "sidecar.istio.io/status";

/// Why a workload gets no sidecar though it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// The object is not of its kind's shape.
    #[error("{kind} has no {path}")]
    Shape {
        /// Its kind.
        kind: String,
        /// What is missing or of another type.
        path: &'static str,
    },
    /// An annotation's value.
    #[error("annotation {name}: {reason}")]
    Annotation {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A probe that cannot be rewritten.
    #[error("container {container}: {reason}")]
    Probe {
        /// Of which container.
        container: String,
        /// What is wrong.
        reason: String,
    },
    /// A template.
    #[error("template {name}: {reason}")]
    Template {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// What the result would be is no pod.
    #[error("{0}")]
    Result(String),
}

/// What became of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has sidecars now, so many.
    Injected(usize),
    /// It is as it was.
    Left(Skipped),
}

/// Adds sidecars to an object: a Pod, whatever has a template of one, or a List of these.
///
/// # Errors
/// When one of its pods should get a sidecar and cannot; then the object is as it was.
pub fn inject(object: &mut Value, settings: &Settings) -> Result<Outcome, InjectError> {
    let mut changed = object.clone();
    let mut injected = 0;
    let mut left = Skipped::NotAWorkload;
    for found in workload::find(&mut changed)? {
        match decide::skip(&found, settings) {
            Some(why) => left = why,
            None => {
                pod::inject(found, settings)?;
                injected += 1;
            }
        }
    }
    if injected == 0 {
        return Ok(Outcome::Left(left));
    }
    *object = changed;
    Ok(Outcome::Injected(injected))
}

/// A pod that is on its way into a cluster.
#[derive(Debug)]
pub struct Arriving {
    /// What became of it.
    pub outcome: Result<Outcome, InjectError>,
    /// `pod NAMESPACE/NAME (KIND OWNER)`, for messages.
    pub name: String,
}

/// Adds a sidecar to a pod as an API server shows it to a webhook: its namespace may be said beside it only, and whose
/// it is by its owner references. If it cannot, the pod is as it was.
pub fn inject_pod(pod: &mut Value, namespace: &str, settings: &Settings) -> Arriving {
    let mut changed = pod.clone();
    let owner = workload::owner(&changed);
    let text = |path: &str| changed.pointer(path).and_then(Value::as_str);
    let name = match text("/metadata/name") {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!("{}*", text("/metadata/generateName").unwrap_or_default()),
    };
    let name = match &owner {
        Some(owner) => format!("pod {namespace}/{name} ({} {})", owner.kind, owner.name),
        None => format!("pod {namespace}/{name}"),
    };
    let outcome = workload::find(&mut changed).and_then(|found| {
        let Some(mut found) = found.into_iter().next() else {
            return Ok(Outcome::Left(Skipped::NotAWorkload));
        };
        namespace.clone_into(&mut found.namespace);
        if let Some(owner) = owner {
            (found.api_version, found.kind, found.name) =
                (owner.api_version, owner.kind, owner.name);
        }
        if let Some(why) = decide::skip(&found, settings) {
            return Ok(Outcome::Left(why));
        }
        pod::inject(found, settings)?;
        Ok(Outcome::Injected(1))
    });
    if matches!(outcome, Ok(Outcome::Injected(_))) {
        *pod = changed;
    }
    Arriving { outcome, name }
}
