//! Status of Gateway API objects: conditions, in Istio's words, as their writer will put them.

use std::sync::Arc;

use lateen_config::Object;
use lateen_config::gateway_api::{GROUP, INFERENCE_GROUP};
use serde_json::{Value, json};

use super::Fault;

/// When a condition came about is for its writer to say, who knows the clock and what was written before.
const UNTIMED: &str = "1970-01-01T00:00:00Z";

/// The status of one object. `observedGeneration` and `lastTransitionTime` are its writer's to fill in.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// API group.
    pub group: &'static str,
    /// Version to write it in.
    pub version: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Namespace; empty for GatewayClasses.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// The whole `status`.
    pub value: Value,
}

/// Kinds in the order that statuses are listed in; others come first.
const KINDS: [&str; 6] = [
    "GatewayClass",
    "Gateway",
    "HTTPRoute",
    "GRPCRoute",
    "TLSRoute",
    "TCPRoute",
];

impl Status {
    pub(super) fn of(object: &Object, kind: &'static str, value: Value) -> Self {
        Self {
            group: match kind {
                "InferencePool" => INFERENCE_GROUP,
                _ => GROUP,
            },
            version: match kind {
                "TCPRoute" => "v1alpha2",
                _ => "v1",
            },
            kind,
            namespace: object.key.namespace.clone(),
            name: object.key.name.clone(),
            value,
        }
    }

    pub(super) fn order(&self) -> (usize, &str, &str, &str) {
        let kind = KINDS.iter().position(|kind| *kind == self.kind);
        (
            kind.map_or(0, |place| place + 1),
            &self.namespace,
            &self.name,
            self.kind,
        )
    }

    /// As an object that says nothing but its status.
    #[must_use]
    pub fn document(&self) -> Value {
        let mut metadata = json!({ "name": *self.name });
        if !self.namespace.is_empty() {
            metadata["namespace"] = json!(*self.namespace);
        }
        json!({
            "apiVersion": format!("{}/{}", self.group, self.version),
            "kind": self.kind,
            "metadata": metadata,
            "spec": null,
            "status": self.value,
        })
    }
}

/// One condition: what is said when all is well, and what is wrong instead.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) kind: &'static str,
    /// Status when all is well.
    good: bool,
    reason: &'static str,
    message: String,
    pub(super) fault: Option<Fault>,
}

impl Condition {
    pub(super) fn new(
        kind: &'static str,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            good: true,
            reason,
            message: message.into(),
            fault: None,
        }
    }

    /// One that is `False` when all is well.
    pub(super) fn negative(kind: &'static str, reason: &'static str, message: &str) -> Self {
        Self {
            good: false,
            ..Self::new(kind, reason, message)
        }
    }

    pub(super) fn fault(mut self, fault: Option<Fault>) -> Self {
        self.fault = fault;
        self
    }

    pub(super) fn say(&mut self, message: String) {
        self.message = message;
    }

    fn value(&self) -> Value {
        let (status, reason, message) = match &self.fault {
            Some(fault) => (!self.good, fault.reason, fault.message.as_str()),
            None => (self.good, self.reason, self.message.as_str()),
        };
        json!({
            "lastTransitionTime": UNTIMED,
            "message": message,
            "reason": reason,
            "status": if status { "True" } else { "False" },
            "type": self.kind,
        })
    }
}

/// The conditions there were, with ours in the place of those of the same type, else after them by type.
pub(super) fn conditions(before: &Value, mut ours: Vec<Condition>) -> Value {
    ours.sort_by_key(|condition| condition.kind);
    let mut all: Vec<Value> = before.as_array().cloned().unwrap_or_default();
    for condition in &ours {
        let value = condition.value();
        match all.iter_mut().find(|there| there["type"] == value["type"]) {
            Some(there) => *there = value,
            None => all.push(value),
        }
    }
    Value::Array(all)
}
