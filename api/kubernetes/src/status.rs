//! Writes statuses to objects: only where what is there differs from what should be, so many a second, one at a time.
//!
//! What is there is known from following the objects ([`Observed`]), so nothing is asked for. A write carries the
//! resourceVersion that it is based on: if the object has changed meanwhile the write fails, and news of the change is
//! on its way here already.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::client::{ClusterArgs, ConnectError, Failure, within};
use crate::reduce::ObjectState;
use crate::resource::Resource;

/// Between two writes: 20 a second at most.
const PACE: Duration = Duration::from_millis(50);
/// The same status of the same generation is not written again sooner: who changes it back would do so for ever.
const CONTEST: Duration = Duration::from_secs(60);
/// As whom it writes.
const MANAGER: &str = "lateen-pilot";

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectId {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace; empty if the kind has none.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The objects of custom kinds that are followed, as the API server has them. Written by the source, after it has put the
/// objects into its store: what is here has been judged there. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Observed(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    objects: Mutex<BTreeMap<ObjectId, (Arc<Resource>, ObjectState)>>,
    changes: watch::Sender<u64>,
}

impl Observed {
    /// Is told of every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// All objects.
    #[must_use]
    pub fn ids(&self) -> Vec<ObjectId> {
        self.objects().keys().cloned().collect()
    }

    pub(crate) fn change(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let mut objects = self.objects();
        for change in changes {
            match change {
                Change::All(of, all) => {
                    objects.retain(|id, _| !of.has(id));
                    for (name, state) in all {
                        objects.insert(of.object(&name), (of.clone(), state));
                    }
                }
                Change::Is(of, name, state) => {
                    objects.insert(of.object(&name), (of, state));
                }
                Change::Gone(of, name) => {
                    objects.remove(&of.object(&name));
                }
            }
        }
        drop(objects);
        self.0.changes.send_modify(|count| *count += 1);
    }

    fn get(&self, id: &ObjectId) -> Option<(Arc<Resource>, ObjectState)> {
        self.objects().get(id).cloned()
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectId, (Arc<Resource>, ObjectState)>> {
        self.0
            .objects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// News of objects; names are `NAMESPACE/NAME`.
#[derive(Debug)]
pub(crate) enum Change {
    /// These are all of the collection.
    All(Arc<Resource>, Vec<(String, ObjectState)>),
    /// One is new or other.
    Is(Arc<Resource>, String, ObjectState),
    /// One is gone.
    Gone(Arc<Resource>, String),
}

impl Resource {
    fn has(&self, id: &ObjectId) -> bool {
        (&*self.group, &*self.kind) == (&*id.group, &*id.kind)
    }

    fn object(&self, name: &str) -> ObjectId {
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        ObjectId {
            group: self.group.clone(),
            kind: self.kind.clone(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// What a writer remembers from round to round.
#[derive(Debug, Default)]
pub struct Memory {
    /// What was last complained of, which is not said again.
    complaint: Option<String>,
    written: BTreeMap<ObjectId, Written>,
}

/// A write that has gone through.
#[derive(Debug)]
struct Written {
    at: Instant,
    /// The version it was based on.
    version: String,
    generation: i64,
    wanted: Value,
}

/// What to do about a status that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Write,
    /// Ours was written, and the news of it is on its way; or the API server has dropped what it does not know of it.
    Wait,
    /// Somebody has changed it back.
    Contested,
}

impl Memory {
    fn turn(&self, id: &ObjectId, state: &ObjectState, wanted: &Value) -> Turn {
        let same = self
            .written
            .get(id)
            .filter(|written| written.generation == state.generation && written.wanted == *wanted);
        match same {
            None => Turn::Write,
            Some(written) if written.version == state.version => Turn::Wait,
            Some(written) if written.at.elapsed() < CONTEST => Turn::Contested,
            Some(_) => Turn::Write,
        }
    }
}

/// Writes to one cluster.
pub struct Statuses {
    client: kube::Client,
    observed: Observed,
    controllers: &'static [&'static str],
    writes: Counter,
    failures: Counter,
}

impl Debug for Statuses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Statuses").finish_non_exhaustive()
    }
}

impl Statuses {
    /// To objects that are followed. `controllers` are our names in `controllerName`: what others say under theirs stays.
    /// `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(
        args: &ClusterArgs,
        observed: Observed,
        controllers: &'static [&'static str],
        registry: &mut Registry,
    ) -> Result<Option<Self>, ConnectError> {
        let (writes, failures) = (Counter::default(), Counter::default());
        registry.register(
            "pilot_status_writes",
            "Statuses written to objects",
            writes.clone(),
        );
        registry.register(
            "pilot_status_failures",
            "Statuses that could not be written",
            failures.clone(),
        );
        let client = args.client().await?;
        Ok(client.map(|client| Self {
            client,
            observed,
            controllers,
            writes,
            failures,
        }))
    }

    /// One round: writes each status that differs from what is there. Objects that are not there are passed over. Says
    /// whether all could be written.
    pub async fn write(&self, wanted: &BTreeMap<ObjectId, Value>, memory: &mut Memory) -> bool {
        let mut failed = None;
        memory.written.retain(|id, _| wanted.contains_key(id));
        for (id, status) in wanted {
            let Some((resource, state)) = self.observed.get(id) else {
                continue;
            };
            let merged = merged(&state, status, self.controllers, &Timestamp::now());
            if merged == state.status {
                continue;
            }
            match memory.turn(id, &state, status) {
                Turn::Write => {}
                Turn::Wait => continue,
                Turn::Contested => {
                    failed.get_or_insert_with(|| {
                        format!(
                            "{} {}/{}: somebody else writes it, too; is there a Pilot of another version with a lease of its own?",
                            resource.plural, id.namespace, id.name
                        )
                    });
                    continue;
                }
            }
            match self.put(&resource, id, &state, &merged).await {
                Ok(()) => {
                    self.writes.inc();
                    debug!(?id, "status written");
                    let written = Written {
                        at: Instant::now(),
                        version: state.version,
                        generation: state.generation,
                        wanted: status.clone(),
                    };
                    memory.written.insert(id.clone(), written);
                }
                // It has changed or gone meanwhile; we are about to hear of it.
                Err(error) if matches!(error.code, 404 | 409) => debug!(?id, %error, "no status"),
                Err(error) => {
                    self.failures.inc();
                    let kind = &resource.plural;
                    failed.get_or_insert_with(|| {
                        format!("{kind} {}/{}: {error}", id.namespace, id.name)
                    });
                }
            }
            sleep(PACE).await;
        }
        match (&failed, &memory.complaint) {
            (None, Some(_)) => info!("statuses are written again"),
            (Some(error), before) if before.as_ref() != Some(error) => {
                warn!(error, "a status cannot be written; trying again");
            }
            _ => {}
        }
        memory.complaint = failed;
        memory.complaint.is_none()
    }

    async fn put(
        &self,
        resource: &Resource,
        id: &ObjectId,
        state: &ObjectState,
        status: &Value,
    ) -> Result<(), Failure> {
        let collection = Resource {
            namespace: (!id.namespace.is_empty()).then(|| id.namespace.clone()),
            ..resource.clone()
        };
        // A merge patch takes away what it says is null, and keeps what it does not name.
        let mut patch = status.as_object().cloned().unwrap_or_default();
        for name in state.status.as_object().into_iter().flat_map(Map::keys) {
            patch.entry(name.clone()).or_insert(Value::Null);
        }
        let patch = json!({"metadata": {"resourceVersion": state.version}, "status": patch});
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let request = Request::new(collection.path());
        let request = request.patch_subresource("status", &id.name, &params, &Patch::Merge(patch));
        let answered = within(async {
            let request = request.map_err(kube::Error::BuildRequest)?;
            self.client.request::<Value>(request).await
        });
        answered.await.map(drop)
    }
}

/// What is to be there: what is wanted, with the generation that it is about and the time since when each condition
/// holds, beside what others have said.
fn merged(state: &ObjectState, wanted: &Value, controllers: &[&str], now: &Timestamp) -> Value {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let none = Map::new();
    let current = state.status.as_object().unwrap_or(&none);
    let mut all = current.clone();
    for (name, value) in wanted.as_object().unwrap_or(&none) {
        let before = current.get(name).unwrap_or(&Value::Null);
        let value = match name.as_str() {
            "conditions" => conditions(before, value, true, state.generation, &now),
            // One entry a parent and controller; one a listener.
            "parents" | "ancestors" | "listeners" => {
                let (before, value) = (entries(before), entries(value));
                let is_ours = |entry: &Value| match entry.get("controllerName") {
                    Some(controller) => controllers.iter().any(|ours| controller == ours),
                    None => true,
                };
                let others = before.iter().filter(|entry| !is_ours(entry)).cloned();
                let ours = value.iter().filter(|entry| is_ours(entry)).map(|entry| {
                    let same = before.iter().find(|other| who(other) == who(entry));
                    let before = same.and_then(|same| same.get("conditions"));
                    let mut entry = entry.clone();
                    if let Some(list) = entry.get_mut("conditions") {
                        let before = before.unwrap_or(&Value::Null);
                        *list = conditions(before, list, false, state.generation, &now);
                    }
                    entry
                });
                Value::Array(others.chain(ours).collect())
            }
            "observedGeneration" => json!(state.generation),
            _ => value.clone(),
        };
        all.insert(name.clone(), value);
    }
    Value::Object(all)
}

fn entries(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// What tells entries of a list apart.
fn who(entry: &Value) -> [&Value; 4] {
    ["name", "parentRef", "ancestorRef", "controllerName"]
        .map(|name| entry.get(name).unwrap_or(&Value::Null))
}

/// A condition that is as it was keeps its time. `keep`: those of types that are not ours stay.
fn conditions(before: &Value, ours: &Value, keep: bool, generation: i64, now: &str) -> Value {
    let find = |list: &Value, of: &Value| {
        let found = entries(list)
            .iter()
            .find(|one| one.get("type") == of.get("type"));
        found.cloned()
    };
    let mut all: Vec<Value> = entries(before)
        .iter()
        .filter(|one| keep && find(ours, one).is_none())
        .cloned()
        .collect();
    for one in entries(ours) {
        let mut one = one.clone();
        let before = find(before, &one).filter(|before| before.get("status") == one.get("status"));
        let since = before.and_then(|before| before.get("lastTransitionTime").cloned());
        one["lastTransitionTime"] = since.unwrap_or_else(|| json!(now));
        one["observedGeneration"] = json!(generation);
        all.push(one);
    }
    Value::Array(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[&str] = &["us"];

    fn state(status: Value) -> ObjectState {
        ObjectState {
            generation: 7,
            version: "1".into(),
            status,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn what_was_written_is_right_until_something_changes() {
        let good = json!({"conditions": [{"type": "Accepted", "status": "True", "lastTransitionTime": "x"}], "observedGeneration": 0});
        let first = merged(&state(Value::Null), &good, OURS, &at(0));
        assert_eq!(
            first,
            json!({
                "observedGeneration": 7,
                "conditions": [{
                    "type": "Accepted", "status": "True", "lastTransitionTime": "1970-01-01T00:00:00Z", "observedGeneration": 7,
                }],
            })
        );
        assert_eq!(merged(&state(first.clone()), &good, OURS, &at(60)), first);
        let bad = json!({"conditions": [{"type": "Accepted", "status": "False"}]});
        let then = merged(&state(first), &bad, OURS, &at(60));
        assert_eq!(
            then["conditions"][0]["lastTransitionTime"],
            "1970-01-01T00:01:00Z"
        );
        assert_eq!(then["observedGeneration"], 7);
    }

    #[test]
    fn nobody_is_fought_with() {
        let id = ObjectId {
            group: "g".into(),
            kind: "k".into(),
            namespace: "n".into(),
            name: "o".into(),
        };
        let (mut memory, wanted, other) = (Memory::default(), json!({"a": 1}), json!({"a": 2}));
        let is = |version: &str, generation: i64| ObjectState {
            generation,
            version: version.into(),
            status: Value::Null,
        };
        assert_eq!(memory.turn(&id, &is("1", 7), &wanted), Turn::Write);
        memory.written.insert(
            id.clone(),
            Written {
                at: Instant::now(),
                version: "1".into(),
                generation: 7,
                wanted: wanted.clone(),
            },
        );
        assert_eq!(memory.turn(&id, &is("1", 7), &wanted), Turn::Wait);
        assert_eq!(memory.turn(&id, &is("3", 7), &wanted), Turn::Contested);
        // Something else is to be said, or of another generation.
        assert_eq!(memory.turn(&id, &is("3", 7), &other), Turn::Write);
        assert_eq!(memory.turn(&id, &is("3", 8), &wanted), Turn::Write);
    }

    #[test]
    fn what_others_say_stays() {
        let before = json!({
            "conditions": [{"type": "Theirs", "status": "True", "lastTransitionTime": "t"}],
            "parents": [
                {"controllerName": "them", "parentRef": {"name": "g"}, "conditions": []},
                {"controllerName": "us", "parentRef": {"name": "gone"}, "conditions": []},
                {"controllerName": "us", "parentRef": {"name": "g"}, "conditions": [
                    {"type": "Accepted", "status": "True", "lastTransitionTime": "before"},
                    {"type": "NoLongerSaid", "status": "True", "lastTransitionTime": "before"},
                ]},
            ],
            "more": 1,
        });
        let wanted = json!({
            "conditions": [{"type": "Ours", "status": "True"}],
            "parents": [{"controllerName": "us", "parentRef": {"name": "g"}, "conditions": [
                {"type": "Accepted", "status": "True"},
            ]}],
        });
        let got = merged(&state(before.clone()), &wanted, OURS, &at(0));
        assert_eq!(got["more"], 1);
        assert_eq!(got["conditions"][0], before["conditions"][0]);
        assert_eq!(got["conditions"][1]["type"], "Ours");
        assert_eq!(got["parents"][0], before["parents"][0]);
        assert_eq!(
            got["parents"][1]["conditions"],
            json!([{"type": "Accepted", "status": "True", "lastTransitionTime": "before", "observedGeneration": 7}])
        );
        assert_eq!(got["parents"].as_array().unwrap().len(), 2);
    }
}
