//! Which status each object of the cluster is to have: whether it was accepted, and which generation of it that is said
//! of; for Gateway API what [`crate::gateway_api`] has found.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lateen_config::{ConfigSet, Key, Object, Problem, review};
use lateen_kubernetes::{Memory, ObjectId, Observed, Statuses};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::gateway_api;
use crate::push::Source;
use crate::serve::Served;

/// Our names where several controllers write.
pub(super) const CONTROLLERS: [&str; 2] =
    ["istio.io/gateway-controller", "istio.io/mesh-controller"];
/// Changes are taken together until so long after the first.
const GATHER: Duration = Duration::from_millis(200);
/// After a round in which something could not be written.
const RETRY: Duration = Duration::from_secs(10);
/// Longest message of a condition: Kubernetes' own limit.
const MESSAGE: usize = 32 * 1024;
/// What an object in no file says it is in.
const ORIGIN: &str = "kubernetes";

/// Keeps the statuses right, for ever.
pub(super) async fn keep(
    statuses: &Statuses,
    observed: &Observed,
    mut source: Source,
    mut served: watch::Receiver<Option<Arc<Served>>>,
) {
    let mut changes = observed.subscribe();
    let mut memory = Memory::default();
    // Half of what there is would be a wrong verdict.
    let ready = async {
        source.wait_for(|set| set.generation > 0).await.is_ok()
            && served.wait_for(Option::is_some).await.is_ok()
    };
    if !ready.await {
        return std::future::pending().await;
    }
    loop {
        changes.mark_unchanged();
        // In this order: of an object that is observed the verdict is there already.
        let ids = observed.ids();
        let set = source.borrow_and_update().clone();
        let now = served.borrow_and_update().clone();
        let gateway = now
            .iter()
            .flat_map(|now| now.snapshot.gateway_statuses().iter());
        let wanted = wanted(&ids, &set, gateway);
        let is_done = statuses.write(&wanted, &mut memory).await;
        let again = async {
            match is_done {
                true => std::future::pending().await,
                false => sleep(RETRY).await,
            }
        };
        let open = tokio::select! {
            // All are cancel-safe, and each is a reason to look again.
            open = changes.changed() => open.is_ok(),
            open = source.changed() => open.is_ok(),
            open = served.changed() => open.is_ok(),
            () = again => true,
        };
        if !open {
            return std::future::pending().await;
        }
        sleep(GATHER).await;
    }
}

/// The statuses of the objects of the cluster.
fn wanted<'a>(
    ids: &[ObjectId],
    set: &ConfigSet,
    gateway: impl Iterator<Item = &'a gateway_api::Status>,
) -> BTreeMap<ObjectId, Value> {
    let mut accepted: BTreeMap<&Key, &Arc<Object>> = BTreeMap::new();
    for object in &set.objects {
        accepted.insert(&object.key, object);
    }
    let mut errors: BTreeMap<&Key, Vec<&Problem>> = BTreeMap::new();
    for problem in set.problems.iter().filter(|problem| problem.is_error()) {
        if let Some(key) = problem.key.as_ref().filter(|_| &*problem.file == ORIGIN) {
            errors.entry(key).or_default().push(problem);
        }
    }
    let mut all = BTreeMap::new();
    for id in ids {
        let is_gateway_api = id.group.ends_with(".k8s.io");
        if is_gateway_api || !is_ours(id) {
            continue;
        }
        let key = Key {
            group: id.group.as_str().into(),
            kind: id.kind.as_str().into(),
            namespace: id.namespace.as_str().into(),
            name: id.name.as_str().into(),
        };
        let errors = errors.get(&key).map_or(&[][..], Vec::as_slice);
        let object = accepted.get(&key);
        // One in a folder that has the same name is in force instead, of which nobody writes a status.
        let is_other = object.is_some_and(|object| &*object.origin.file != ORIGIN);
        if errors.is_empty() && (object.is_none() || is_other) {
            continue;
        }
        all.insert(id.clone(), verdict(errors, object.is_some()));
    }
    for status in gateway {
        let id = ObjectId {
            group: status.group.to_owned(),
            kind: status.kind.to_owned(),
            namespace: status.namespace.to_string(),
            name: status.name.to_string(),
        };
        all.insert(id, status.value.clone());
    }
    all
}

/// Mixer's kinds among them, which [`review`] does not know.
fn is_ours(id: &ObjectId) -> bool {
    review::is_known(&id.group, &id.kind) || lateen_config::is_read(&id.group, &id.kind)
}

fn verdict(errors: &[&Problem], is_in_force: bool) -> Value {
    let condition = match errors {
        [] => json!({
            "type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
        }),
        errors => {
            let texts: Vec<String> = errors
                .iter()
                .map(|problem| problem.what().to_string())
                .collect();
            let mut message = texts.join("; ");
            message += match is_in_force {
                true => ". Its last good version stays in force",
                false => ". It is not in force",
            };
            if message.len() > MESSAGE {
                message.truncate(message.floor_char_boundary(MESSAGE));
            }
            json!({"type": "Accepted", "status": "False", "reason": "Invalid", "message": message})
        }
    };
    json!({"conditions": [condition], "observedGeneration": 0})
}

#[cfg(test)]
mod tests {
    use lateen_config::{Source as From, Store};

    use super::*;

    fn id(kind: &str, name: &str) -> ObjectId {
        ObjectId {
            group: "networking.istio.io".into(),
            kind: kind.into(),
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn rule(name: &str, spec: Value) -> Value {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
        })
    }

    #[test]
    fn each_object_is_told_what_became_of_it() {
        let store = Store::new([From::Kubernetes]);
        let put = |name: &str, spec: Value| {
            store.change(From::Kubernetes, |parts| {
                parts.values(&name.into(), &ORIGIN.into(), &[rule(name, spec)]);
                parts.listed();
            });
        };
        put("good", json!({"host": "a"}));
        put("never", json!({"hosst": "a"}));
        put("once", json!({"host": "b"}));
        put("once", json!({"host": ""}));
        let ids: Vec<ObjectId> = ["good", "never", "once", "unread"]
            .into_iter()
            .map(|name| id("DestinationRule", name))
            .collect();
        let got = wanted(&ids, &store.current(), std::iter::empty());
        let names: Vec<&str> = got.keys().map(|id| id.name.as_str()).collect();
        assert_eq!(names, ["good", "never", "once"]);
        let said = |name: &str| {
            let condition = &got[&id("DestinationRule", name)]["conditions"][0];
            (
                condition["status"].clone(),
                condition["message"].as_str().unwrap().to_owned(),
            )
        };
        assert_eq!(said("good"), (json!("True"), String::new()));
        let (status, message) = said("never");
        assert_eq!(status, "False");
        assert!(
            message.contains("hosst") && message.ends_with(". It is not in force"),
            "{message}"
        );
        let (status, message) = said("once");
        assert_eq!(status, "False");
        assert!(
            message.ends_with(". Its last good version stays in force"),
            "{message}"
        );
    }
}
