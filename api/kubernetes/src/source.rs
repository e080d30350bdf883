//! The writer: starts a follower for each collection, and puts what they tell into the store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use lateen_config::{Source, Store};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{error, info};

use crate::client::{ConnectError, KubernetesArgs};
use crate::follow::{News, Update, explain, follow};
use crate::health::Health;
use crate::reduce::Reduced;
use crate::resource::{self, Resource};
use crate::status::{Change, Observed};

/// How problems name where an object is.
const ORIGIN: &str = "kubernetes";
/// Updates that wait for the writer; followers wait beyond.
const QUEUE: usize = 1024;
/// After the first update others are given this time to come along: one publication for a burst.
const GATHER: Duration = Duration::from_millis(10);
/// Under which asking what the cluster serves is known to [`Health`].
const PROBE: u64 = u64::MAX;
/// Between attempts to learn what the cluster serves.
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// A cluster as a source.
#[derive(Debug)]
pub struct Kubernetes {
    client: Arc<Client>,
    args: KubernetesArgs,
    health: Arc<Health>,
    store: Arc<Store>,
    observed: Observed,
}

/// `kube::Client` has nothing to show.
struct Client(kube::Client);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

/// One collection that is followed.
#[derive(Debug)]
struct Followed {
    resource: Arc<Resource>,
    listed: bool,
    task: tokio::task::AbortHandle,
}

/// What the writer knows.
struct Writer {
    source: Kubernetes,
    out: mpsc::Sender<Update>,
    tasks: JoinSet<()>,
    /// By number of the follower; numbers are not used twice, so that late news of one that was stopped is known.
    followed: BTreeMap<u64, Followed>,
    next: u64,
    /// The follower of definitions.
    definitions: u64,
    /// Followers of custom kinds, by the definition's name.
    custom: BTreeMap<String, u64>,
    complete: bool,
}

/// What is to be done in the store.
enum Write {
    Replace { prefix: String, all: Vec<Reduced> },
    Put { prefix: String, object: Reduced },
    Remove { name: String },
    Forget { prefix: String },
    Complete,
}

impl Kubernetes {
    /// Prepares to follow the cluster that the flags name, into `store`; [`Kubernetes::run`] begins. `None` when they
    /// name none.
    ///
    /// # Errors
    /// There are no usable credentials. A server that cannot be reached is no error: it is waited for.
    pub async fn new(
        args: &KubernetesArgs,
        store: Arc<Store>,
        health: Arc<Health>,
    ) -> Result<Option<Self>, ConnectError> {
        Ok(args.cluster.client().await?.map(|client| Self {
            client: Arc::new(Client(client)),
            args: args.clone(),
            health,
            store,
            observed: Observed::default(),
        }))
    }

    /// The objects of custom kinds, as the API server has them.
    #[must_use]
    pub fn observed(&self) -> Observed {
        self.observed.clone()
    }

    /// Follows the cluster until it is dropped.
    pub async fn run(self) {
        let (out, mut updates) = mpsc::channel(QUEUE);
        let mut writer = Writer {
            source: self,
            out,
            tasks: JoinSet::new(),
            followed: BTreeMap::new(),
            next: 0,
            definitions: 0,
            custom: BTreeMap::new(),
            complete: false,
        };
        writer.definitions = writer.start(resource::definitions());
        for resource in resource::built_in(&writer.source.args) {
            writer.start(resource);
        }
        for resource in writer.source.probed().await {
            writer.start(resource);
        }
        loop {
            let mut batch = Vec::new();
            if updates.recv_many(&mut batch, QUEUE).await == 0 {
                return;
            }
            sleep(GATHER).await;
            while batch.len() < QUEUE
                && let Ok(more) = updates.try_recv()
            {
                batch.push(more);
            }
            writer.write(batch).await;
        }
    }

    /// Of the kinds that not every cluster has, those that this one has.
    async fn probed(&self) -> Vec<Resource> {
        let mut found = Vec::new();
        self.health.open(PROBE);
        for resource in resource::endpoints() {
            if self.has(&resource).await {
                info!(
                    kind = resource.kind,
                    "endpoints of services are read from this kind"
                );
                found.push(resource);
                break;
            }
        }
        for resource in resource::optional() {
            if self.has(&resource).await {
                found.push(resource);
            }
        }
        self.health.close(PROBE);
        found
    }

    /// Whether the server has a kind; waits until it says.
    async fn has(&self, resource: &Resource) -> bool {
        loop {
            let version = resource.api_version();
            let list = if resource.group.is_empty() {
                self.client.0.list_core_api_resources(&version).await
            } else {
                self.client.0.list_api_group_resources(&version).await
            };
            match list {
                Ok(list) => {
                    return list
                        .resources
                        .iter()
                        .any(|served| served.name == resource.plural);
                }
                Err(kube::Error::Api(status)) if status.code == 404 => return false,
                Err(error) => {
                    self.health.failed(PROBE, resource, &explain(&error));
                    sleep(PROBE_WAIT).await;
                }
            }
        }
    }
}

impl Writer {
    fn start(&mut self, resource: Resource) -> u64 {
        let number = self.next;
        self.next += 1;
        self.source.health.open(number);
        let resource = Arc::new(resource);
        let task = self.tasks.spawn(follow(
            self.source.client.0.clone(),
            resource.clone(),
            number,
            self.source.health.clone(),
            self.out.clone(),
        ));
        self.followed.insert(
            number,
            Followed {
                resource,
                listed: false,
                task,
            },
        );
        number
    }

    fn stop(&mut self, number: u64) -> Option<Followed> {
        let followed = self.followed.remove(&number)?;
        followed.task.abort();
        self.source.health.close(number);
        Some(followed)
    }

    async fn write(&mut self, batch: Vec<Update>) {
        let mut writes = Vec::new();
        let mut changes = Vec::new();
        for update in batch {
            let Some(followed) = self.followed.get_mut(&update.follower) else {
                continue;
            };
            let prefix = followed.resource.id();
            if matches!(update.news, News::Listed(_)) {
                followed.listed = true;
            }
            if update.follower == self.definitions {
                self.define(update.news, &mut writes, &mut changes);
                continue;
            }
            if followed.resource.custom {
                changes.push(observed(followed.resource.clone(), &update.news));
            }
            writes.push(match update.news {
                News::Listed(all) => Write::Replace { prefix, all },
                News::Applied(object) => Write::Put { prefix, object },
                News::Deleted(name) => Write::Remove {
                    name: prefix + &name,
                },
            });
        }
        if !self.complete && self.followed.values().all(|followed| followed.listed) {
            self.complete = true;
            writes.push(Write::Complete);
            info!("Kubernetes has been read");
        }
        let store = self.source.store.clone();
        let observed = self.source.observed.clone();
        let written = tokio::task::spawn_blocking(move || {
            apply(&store, writes);
            // Only now: whoever sees an object here finds the store's verdict about it.
            observed.change(changes);
        })
        .await;
        if let Err(error) = written {
            error!(%error, "objects of Kubernetes cannot be taken in; what was good before stays");
        }
    }

    /// Custom kinds come and go with their definitions.
    fn define(&mut self, news: News, writes: &mut Vec<Write>, changes: &mut Vec<Change>) {
        match news {
            News::Listed(all) => {
                let there: BTreeSet<&str> = all.iter().map(|one| one.name.as_str()).collect();
                let gone: Vec<String> = self
                    .custom
                    .keys()
                    .filter(|name| !there.contains(name.as_str()))
                    .cloned()
                    .collect();
                for name in gone {
                    self.undefine(&name, writes, changes);
                }
                for one in all {
                    self.defined(one);
                }
            }
            News::Applied(one) => self.defined(one),
            News::Deleted(name) => self.undefine(&name, writes, changes),
        }
    }

    fn defined(&mut self, definition: Reduced) {
        let found = definition.documents.first().and_then(resource::defined);
        // Not established (any more), but not gone either: its objects stay.
        let Some(resource) = found else { return };
        if let Some(number) = self.custom.get(&definition.name) {
            let same = self
                .followed
                .get(number)
                .is_some_and(|followed| *followed.resource == resource);
            if same {
                return;
            }
            self.stop(*number);
        }
        if self.complete {
            info!(kind = resource.kind, version = %resource.api_version(), "newly defined");
        }
        let number = self.start(resource);
        self.custom.insert(definition.name, number);
    }

    fn undefine(&mut self, name: &str, writes: &mut Vec<Write>, changes: &mut Vec<Change>) {
        let followed = self
            .custom
            .remove(name)
            .and_then(|number| self.stop(number));
        if let Some(followed) = followed {
            info!(kind = followed.resource.kind, "no longer defined");
            writes.push(Write::Forget {
                prefix: followed.resource.id(),
            });
            changes.push(Change::All(followed.resource, Vec::new()));
        }
    }
}

fn observed(resource: Arc<Resource>, news: &News) -> Change {
    let state = |object: &Reduced| Some((object.name.clone(), object.state.clone()?));
    match news {
        News::Listed(all) => Change::All(resource, all.iter().filter_map(state).collect()),
        News::Deleted(name) => Change::Gone(resource, name.clone()),
        News::Applied(object) => match state(object) {
            Some((name, state)) => Change::Is(resource, name, state),
            None => Change::Gone(resource, object.name.clone()),
        },
    }
}

fn apply(store: &Store, writes: Vec<Write>) {
    let origin: Arc<str> = ORIGIN.into();
    store.change(Source::Kubernetes, |parts| {
        let put = |parts: &mut lateen_config::store::Parts<'_>, name: String, of: &[Value]| {
            parts.values(&name.into(), &origin, of);
        };
        for write in writes {
            match write {
                Write::Replace { prefix, all } => {
                    let there: BTreeSet<String> = all
                        .iter()
                        .map(|object| format!("{prefix}{}", object.name))
                        .collect();
                    parts.retain(|name| !name.starts_with(&prefix) || there.contains(name));
                    for object in all {
                        put(parts, format!("{prefix}{}", object.name), &object.documents);
                    }
                }
                Write::Put { prefix, object } => {
                    put(parts, prefix + &object.name, &object.documents);
                }
                Write::Remove { name } => parts.remove(&name.into()),
                Write::Forget { prefix } => parts.retain(|name| !name.starts_with(&prefix)),
                Write::Complete => parts.listed(),
            }
        }
    });
}
