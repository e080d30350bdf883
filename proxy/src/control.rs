//! What the control plane says, put into effect: compiles resources, warms what needs others first,
//! swaps them in, drains what is gone, and remembers what it did for `/config_dump`.
//!
//! Owns the writing to [`Shared`]; everything comes in through [`Sink::apply`] and the notices about
//! secrets and time. A bad resource is reported and its predecessor stays; good ones beside it are used.

pub mod dump;

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment,
            listener::v3::Listener as ListenerProto, route::v3::RouteConfiguration,
        },
        extensions::transport_sockets::tls::v3::Secret,
    },
    google::protobuf::Any,
};
use prost::{Message, Name};
use tokio::sync::watch;

use crate::{
    config_error::ConfigError,
    listener::Listener,
    route::RouteTable,
    secret::Source,
    shared::Shared,
    stats::Gauge,
    worker::Workers,
    xds::{Kind, Outcome, Resource, Sink, Update, Wanted},
};

/// How long a listener or cluster waits for what it refers to (Envoy's `initial_fetch_timeout`).
const WARMING_TIMEOUT: Duration = Duration::from_secs(15);
/// A removed cluster is kept so long, for the routes that stop naming it a moment later: CDS comes
/// before RDS.
const REMOVAL_GRACE: Duration = Duration::from_secs(5);

/// The first steps of a process, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Waiting for the first clusters and their endpoints.
    Clusters,
    /// Waiting for the first listeners, their routes and secrets.
    Listeners,
    /// Serving.
    Live,
}

/// See the module. One per process.
pub struct Control {
    shared: Arc<Shared>,
    workers: Workers,
    dynamic: Dynamic,
    state: Mutex<State>,
    wanted: watch::Sender<Wanted>,
    phase: watch::Sender<Phase>,
    connected: Gauge,
    me: Weak<Control>,
}

/// Which kinds come from a control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    /// CDS is configured.
    pub clusters: bool,
    /// LDS is configured.
    pub listeners: bool,
}

#[derive(Default)]
struct State {
    clusters: BTreeMap<String, Item>,
    endpoints: BTreeMap<String, Item>,
    listeners: BTreeMap<String, Listeners>,
    routes: BTreeMap<String, Item>,
    secrets: BTreeMap<(Source, String), Item>,
    /// Removed clusters in their time of grace.
    leaving: BTreeSet<String>,
    /// Version of the last accepted response of a kind.
    versions: BTreeMap<Kind, String>,
    /// Why the newest version of a resource is not in use.
    failures: BTreeMap<(Kind, String), Failure>,
}

/// A resource in use.
#[derive(Clone, Debug)]
struct Item {
    version: String,
    body: Any,
    updated: SystemTime,
    /// From the bootstrap; the control plane may not touch it.
    fixed: bool,
}

impl Item {
    fn new(resource: &Resource) -> Item {
        Item {
            version: resource.version.clone(),
            body: resource.body.clone(),
            updated: SystemTime::now(),
            fixed: false,
        }
    }
}

#[derive(Default)]
struct Listeners {
    active: Option<(Item, Arc<Listener>)>,
    warming: Option<(Item, Arc<Listener>)>,
}

#[derive(Clone, Debug)]
struct Failure {
    version: String,
    body: Any,
    at: SystemTime,
    reason: String,
}

impl Control {
    /// Nothing configured yet; see [`Control::start`].
    pub fn new(shared: Arc<Shared>, workers: Workers, dynamic: Dynamic) -> Arc<Control> {
        let connected = shared
            .stats
            .scope("control_plane.")
            .gauge("connected_state");
        Arc::new_cyclic(|me| Control {
            shared,
            workers,
            dynamic,
            state: Mutex::default(),
            wanted: watch::Sender::new(Wanted::default()),
            phase: watch::Sender::new(Phase::Clusters),
            connected,
            me: me.clone(),
        })
    }

    /// Applies what the bootstrap says itself, and begins asking for the rest.
    ///
    /// # Errors
    /// A static resource is bad; a process does not start with half its configuration.
    pub fn start(
        self: &Arc<Control>,
        secrets: &[Secret],
        clusters: impl IntoIterator<Item = impl Borrow<Cluster>>,
        listeners: &[ListenerProto],
    ) -> Result<(), ConfigError> {
        for secret in secrets {
            let within = |e: ConfigError| e.within("static_resources.secrets");
            self.shared
                .secrets
                .slot(&secret.name)
                .set(secret)
                .map_err(within)?;
            let item = fixed(secret);
            self.state()
                .secrets
                .insert((Source::Static, secret.name.clone()), item);
        }
        for cluster in clusters {
            let cluster = cluster.borrow();
            let within = |e: ConfigError| e.within("static_resources.clusters");
            self.shared
                .clusters
                .apply(cluster, &self.shared)
                .map_err(within)?;
            self.state()
                .clusters
                .insert(cluster.name.clone(), fixed(cluster));
        }
        for (index, proto) in listeners.iter().enumerate() {
            let within = |e: ConfigError| e.within("static_resources.listeners");
            let listener = Listener::compile(proto, &self.shared).map_err(within)?;
            let name = match proto.name.is_empty() {
                true => format!("static-{index}"),
                false => proto.name.clone(),
            };
            self.state().listeners.entry(name).or_default().warming =
                Some((fixed(proto), listener));
        }
        self.follow_changes();
        self.expire(Phase::Clusters);
        self.settle(&mut self.state(), false);
        Ok(())
    }

    /// The step reached; [`Phase::Live`] means ready.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The workers, for drain and admin.
    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    /// What it writes to.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A secret that came may be what a listener waits for; a new slot is one to ask for; a cluster
    /// that became warm is what the start waits for.
    fn follow_changes(&self) {
        let mut secrets = self.shared.secrets.changes();
        let mut clusters = self.shared.clusters.changes();
        let mut phase = self.phase();
        let me = self.me.clone();
        self.shared.runtime.spawn(async move {
            loop {
                let starting = *phase.borrow_and_update() < Phase::Live;
                // All branches are cancel-safe: they only wait for a sign to look again.
                let changed = tokio::select! {
                    changed = secrets.changed() => changed,
                    // Later on hosts change all the time, and nothing here depends on them.
                    changed = clusters.changed(), if starting => changed,
                    changed = phase.changed() => changed,
                };
                let Some(control) = me.upgrade().filter(|_| changed.is_ok()) else {
                    return;
                };
                control.settle(&mut control.state(), false);
            }
        });
    }

    /// Runs `then` after `delay`, unless the process is gone.
    fn later(&self, delay: Duration, then: impl FnOnce(&Control) + Send + 'static) {
        let me = self.me.clone();
        self.shared.runtime.spawn(async move {
            tokio::time::sleep(delay).await;
            if let Some(control) = me.upgrade() {
                then(&control);
            }
        });
    }

    /// Ends the waiting of a phase when its time is up.
    fn expire(&self, phase: Phase) {
        self.later(WARMING_TIMEOUT, move |control| {
            if *control.phase.borrow() == phase {
                tracing::warn!(?phase, "going on without waiting any longer");
                control.settle(&mut control.state(), true);
            }
        });
    }

    /// Brings everything that follows from the state up to date: activates warm listeners, moves on
    /// with the start, publishes what is wanted.
    fn settle(&self, state: &mut State, give_up_waiting: bool) {
        let phase = *self.phase.borrow();
        if phase >= Phase::Listeners || !self.dynamic.clusters {
            self.activate(state);
        }
        let next = match phase {
            Phase::Clusters => {
                let answered = state.versions.contains_key(&Kind::Cluster);
                let warm = state
                    .clusters
                    .keys()
                    .all(|name| self.shared.clusters.is_warm(name));
                let done = !self.dynamic.clusters || (answered && warm) || give_up_waiting;
                if done {
                    Phase::Listeners
                } else {
                    Phase::Clusters
                }
            }
            Phase::Listeners => {
                // Without ever having heard of listeners we serve nothing: never ready then.
                let answered =
                    !self.dynamic.listeners || state.versions.contains_key(&Kind::Listener);
                let warm = state.listeners.values().all(|l| l.warming.is_none());
                if answered && (warm || give_up_waiting) {
                    Phase::Live
                } else {
                    Phase::Listeners
                }
            }
            Phase::Live => Phase::Live,
        };
        if next != phase {
            tracing::info!(phase = ?next, "start-up moves on");
            // Who sees the new phase sees what is wanted in it, too.
            self.publish(next);
            self.phase.send_replace(next);
            if next == Phase::Listeners {
                self.expire(next);
            }
            return self.settle(state, false);
        }
        self.publish(phase);
        let scope = self.shared.stats.scope("listener_manager.");
        let count =
            |f: fn(&Listeners) -> bool| state.listeners.values().filter(|l| f(l)).count() as u64;
        scope
            .gauge("total_listeners_active")
            .set(count(|l| l.active.is_some()));
        scope
            .gauge("total_listeners_warming")
            .set(count(|l| l.warming.is_some()));
        let scope = self.shared.stats.scope("cluster_manager.");
        scope
            .gauge("active_clusters")
            .set(state.clusters.len() as u64);
        let cold = state
            .clusters
            .keys()
            .filter(|name| !self.shared.clusters.is_warm(name));
        scope.gauge("warming_clusters").set(cold.count() as u64);
    }

    fn activate(&self, state: &mut State) {
        for (name, listeners) in &mut state.listeners {
            let ready =
                |(_, listener): &mut (Item, Arc<Listener>)| listener.waiting_for().is_empty();
            if let Some((item, listener)) = listeners.warming.take_if(ready) {
                self.serve(name, listeners, item, listener);
            }
        }
    }

    fn serve(&self, name: &str, listeners: &mut Listeners, item: Item, listener: Arc<Listener>) {
        match self.workers.add_listener(listener.clone()) {
            Ok(()) => {
                tracing::info!(listener = name, "serving");
                let scope = self.shared.stats.scope("listener_manager.");
                let counter = match listeners.active.is_some() {
                    true => "listener_modified",
                    false => "listener_added",
                };
                scope.counter(counter).inc();
                scope.counter("listener_create_success").inc();
                listeners.active = Some((item, listener));
            }
            Err(error) => {
                tracing::error!(listener = name, %error, "cannot serve");
                self.shared
                    .stats
                    .scope("listener_manager.")
                    .counter("listener_create_failure")
                    .inc();
            }
        }
    }

    fn publish(&self, phase: Phase) {
        let mut wanted = Wanted {
            clusters: self.dynamic.clusters,
            listeners: self.dynamic.listeners && phase >= Phase::Listeners,
            ..Wanted::default()
        };
        let services = self.shared.clusters.eds_wanted();
        let names = services.into_iter().map(|(_, service)| service).collect();
        let eds_files = self.shared.clusters.eds_files();
        wanted.endpoints = by_stream(names, Kind::Endpoint, &eds_files, &mut wanted.files);
        let (names, rds_files) = (self.shared.routes.wanted(), self.shared.routes.files());
        wanted.routes = by_stream(names, Kind::Route, &rds_files, &mut wanted.files);
        for slot in self.shared.secrets.wanted() {
            let asked = matches!(
                slot.source(),
                Source::Ads | Source::Grpc(_) | Source::Path(_)
            );
            if asked {
                wanted
                    .secrets
                    .entry(slot.source().clone())
                    .or_default()
                    .insert(slot.name().to_string());
            }
        }
        self.wanted.send_if_modified(|old| {
            let changed = *old != wanted;
            *old = wanted;
            changed
        });
    }

    fn apply_cluster(
        &self,
        state: &mut State,
        resource: &Resource,
        cluster: &Cluster,
    ) -> Result<(), ConfigError> {
        let name = &cluster.name;
        state.leaving.remove(name);
        if state
            .clusters
            .get(name)
            .is_some_and(|old| old.fixed || old.body == resource.body)
        {
            return Ok(());
        }
        self.shared.clusters.apply(cluster, &self.shared)?;
        let scope = self.shared.stats.scope("cluster_manager.");
        match state.clusters.insert(name.clone(), Item::new(resource)) {
            None => scope.counter("cluster_added").inc(),
            Some(_) => scope.counter("cluster_modified").inc(),
        }
        Ok(())
    }

    fn remove_cluster(&self, state: &mut State, name: &str) {
        if state.clusters.get(name).is_none_or(|item| item.fixed) {
            return;
        }
        state.clusters.remove(name);
        state.leaving.insert(name.to_owned());
        self.shared
            .stats
            .scope("cluster_manager.")
            .counter("cluster_removed")
            .inc();
        let name = name.to_owned();
        self.later(REMOVAL_GRACE, move |control| {
            let mut state = control.state();
            if state.leaving.remove(&name) {
                control.shared.clusters.remove(&name);
                control.settle(&mut state, false);
            }
        });
    }

    fn apply_listener(
        &self,
        state: &mut State,
        resource: &Resource,
        proto: &ListenerProto,
    ) -> Result<(), ConfigError> {
        let entry = state.listeners.entry(proto.name.clone()).or_default();
        let newest = entry.warming.as_ref().or(entry.active.as_ref());
        if newest.is_some_and(|(old, _)| old.fixed || old.body == resource.body) {
            return Ok(());
        }
        let listener = Listener::compile(proto, &self.shared)?;
        let item = Item::new(resource);
        if listener.waiting_for().is_empty() && *self.phase.borrow() >= Phase::Listeners {
            entry.warming = None;
            // Bound here and not by `activate`, so that a port in use is told to who asked for it.
            self.workers.add_listener(listener.clone())?;
            let counter = match entry.active.is_some() {
                true => "listener_modified",
                false => "listener_added",
            };
            self.shared
                .stats
                .scope("listener_manager.")
                .counter(counter)
                .inc();
            entry.active = Some((item, listener));
            return Ok(());
        }
        let (name, waiting) = (proto.name.clone(), Arc::downgrade(&listener));
        entry.warming = Some((item, listener));
        self.refill_routes(state);
        self.later(WARMING_TIMEOUT, move |control| {
            if let Some(listener) = waiting.upgrade() {
                control.give_up_listener(&name, &listener);
            }
        });
        Ok(())
    }

    /// A listener may ask for routes that came already, for one that is gone.
    fn refill_routes(&self, state: &State) {
        for name in self.shared.routes.wanted() {
            let slot = self.shared.routes.slot(&name);
            let Some(item) = state.routes.get(&*name).filter(|_| slot.load().is_none()) else {
                continue;
            };
            let table = RouteConfiguration::decode(item.body.value.as_slice())
                .ok()
                .and_then(|proto| RouteTable::compile(&proto, &self.shared).ok());
            if let Some(table) = table {
                slot.set(Arc::new(table));
            }
        }
    }

    /// Nobody told what it waits for in time: it serves what it can (404, or no TLS).
    fn give_up_listener(&self, name: &str, listener: &Arc<Listener>) {
        let mut state = self.state();
        let Some(entry) = state.listeners.get_mut(name) else {
            return;
        };
        let same = |(_, warming): &mut (Item, Arc<Listener>)| Arc::ptr_eq(warming, listener);
        if let Some((item, listener)) = entry.warming.take_if(same) {
            tracing::warn!(listener = name, waiting_for = ?listener.waiting_for(), "no longer waiting");
            self.serve(name, entry, item, listener);
        }
        self.settle(&mut state, false);
    }

    fn remove_listener(&self, state: &mut State, name: &str) {
        let fixed = |l: &Listeners| {
            l.active
                .iter()
                .chain(&l.warming)
                .any(|(item, _)| item.fixed)
        };
        if state.listeners.get(name).is_none_or(fixed) {
            return;
        }
        if let Some(gone) = state.listeners.remove(name)
            && gone.active.is_some()
        {
            tracing::info!(listener = name, "draining");
            self.workers.remove_listener(name);
            self.shared
                .stats
                .scope("listener_manager.")
                .counter("listener_removed")
                .inc();
        }
    }

    fn apply_one(
        &self,
        state: &mut State,
        update: &Update,
        resource: &Resource,
    ) -> (String, Result<(), ConfigError>) {
        match update.kind {
            Kind::Cluster => with(
                resource,
                |c: &Cluster| &c.name,
                |c| self.apply_cluster(state, resource, c),
            ),
            Kind::Listener => with(
                resource,
                |l: &ListenerProto| &l.name,
                |l| self.apply_listener(state, resource, l),
            ),
            Kind::Endpoint => with(
                resource,
                |a: &ClusterLoadAssignment| &a.cluster_name,
                |assignment| {
                    self.shared.clusters.set_endpoints(assignment)?;
                    state
                        .endpoints
                        .insert(assignment.cluster_name.clone(), Item::new(resource));
                    Ok(())
                },
            ),
            Kind::Route => with(
                resource,
                |r: &RouteConfiguration| &r.name,
                |proto| {
                    let old = state.routes.get(&proto.name);
                    let slot = self.shared.routes.slot(&proto.name);
                    if slot.load().is_none() || old.is_none_or(|old| old.body != resource.body) {
                        slot.set(Arc::new(RouteTable::compile(proto, &self.shared)?));
                        state.routes.insert(proto.name.clone(), Item::new(resource));
                    }
                    Ok(())
                },
            ),
            Kind::Secret => with(
                resource,
                |s: &Secret| &s.name,
                |secret| {
                    let wanted = self.shared.secrets.wanted();
                    let fits = |s: &&Arc<_>| slot_is(s, &secret.name, &update.source);
                    if let Some(slot) = wanted.iter().find(fits) {
                        slot.set(secret)?;
                        let key = (update.source.clone(), secret.name.clone());
                        state.secrets.insert(key, Item::new(resource));
                    }
                    Ok(())
                },
            ),
        }
    }

    fn remove_one(&self, state: &mut State, kind: Kind, name: &str) {
        match kind {
            Kind::Cluster => self.remove_cluster(state, name),
            Kind::Listener => self.remove_listener(state, name),
            // As Envoy: users keep the last they had; whoever still waits learns that there is nothing.
            Kind::Endpoint => {
                let services = self.shared.clusters.eds_wanted();
                let cold = services.iter().any(|(cluster, service)| {
                    **service == *name && !self.shared.clusters.is_warm(cluster)
                });
                let none = ClusterLoadAssignment {
                    cluster_name: name.to_owned(),
                    ..ClusterLoadAssignment::default()
                };
                if cold && let Err(error) = self.shared.clusters.set_endpoints(&none) {
                    tracing::warn!(%error, "cannot empty a cluster");
                }
            }
            Kind::Route | Kind::Secret => {}
        }
        state.failures.remove(&(kind, name.to_owned()));
    }

    /// Forgets what nobody wants any more, so that memory follows the configuration.
    fn forget_unwanted(&self, state: &mut State) {
        let wanted = self.wanted.borrow();
        state
            .endpoints
            .retain(|name, _| wanted.names(Kind::Endpoint, &wanted.endpoints, name));
        state
            .routes
            .retain(|name, item| item.fixed || wanted.names(Kind::Route, &wanted.routes, name));
        state.secrets.retain(|(source, name), item| {
            item.fixed
                || wanted
                    .secrets
                    .get(source)
                    .is_some_and(|names| names.contains(name))
        });
    }

    fn count(&self, kind: Kind, error: bool, version: &str) {
        let scope = self.shared.stats.scope(match kind {
            Kind::Cluster => "cluster_manager.cds.",
            Kind::Endpoint => "cluster_manager.eds.",
            Kind::Listener => "listener_manager.lds.",
            Kind::Route => "rds.",
            Kind::Secret => "sds.",
        });
        scope.counter("update_attempt").inc();
        let counter = if error {
            "update_rejected"
        } else {
            "update_success"
        };
        scope.counter(counter).inc();
        scope.gauge("version").set(hash(version));
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        scope
            .gauge("update_time")
            .set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    }
}

impl Sink for Control {
    fn apply(&self, update: Update) -> Outcome {
        let mut state = self.state();
        let mut outcome = Outcome::default();
        let mut errors = Vec::new();
        let mut named = BTreeSet::new();
        for resource in &update.resources {
            let (name, applied) = self.apply_one(&mut state, &update, resource);
            let applied = match named.insert(name.clone()) {
                true => applied,
                false => Err(ConfigError::new(name.clone(), "is there twice")),
            };
            if update.kind == Kind::Route
                && let Some(slot) = self.shared.routes.find(&name)
            {
                slot.count(applied.is_ok());
            }
            let key = (update.kind, name.clone());
            match applied {
                Ok(()) => {
                    state.failures.remove(&key);
                    outcome.accepted.push((name, resource.version.clone()));
                }
                Err(error) => {
                    tracing::warn!(kind = ?update.kind, name, %error, "refusing a resource");
                    let failure = Failure {
                        version: resource.version.clone(),
                        body: resource.body.clone(),
                        at: SystemTime::now(),
                        reason: error.to_string(),
                    };
                    state.failures.insert(key, failure);
                    errors.push(error.to_string());
                }
            }
        }
        let mut removed = update.removed;
        if update.complete {
            let known: Vec<String> = match update.kind {
                Kind::Cluster => state.clusters.keys().cloned().collect(),
                Kind::Listener => state.listeners.keys().cloned().collect(),
                Kind::Endpoint | Kind::Route | Kind::Secret => Vec::new(),
            };
            removed.extend(known.into_iter().filter(|name| !named.contains(name)));
        }
        for name in removed {
            self.remove_one(&mut state, update.kind, &name);
        }
        if !errors.is_empty() {
            outcome.error = Some(errors.join("; "));
        }
        // Even a refused first answer is an answer: what is good of it serves.
        if outcome.error.is_none() || !state.versions.contains_key(&update.kind) {
            state.versions.insert(update.kind, update.version.clone());
        }
        self.count(update.kind, outcome.error.is_some(), &update.version);
        // Endpoints change all the time; once everything is up, nothing but their cluster follows them.
        if update.kind != Kind::Endpoint || *self.phase.borrow() < Phase::Live {
            self.settle(&mut state, false);
            self.forget_unwanted(&mut state);
        }
        outcome
    }

    fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    fn connected(&self, source: &Source, connected: bool) {
        if *source == Source::Ads {
            self.connected.set(u64::from(connected));
        }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("phase", &*self.phase.borrow())
            .finish_non_exhaustive()
    }
}

/// Names that streams are asked for; those that files give are put with their files.
fn by_stream(
    names: Vec<Arc<str>>,
    kind: Kind,
    of_files: &HashMap<Arc<str>, String>,
    files: &mut BTreeMap<(Kind, String), BTreeSet<String>>,
) -> BTreeSet<String> {
    let mut asked = BTreeSet::new();
    for name in names {
        match of_files.get(&name) {
            None => asked.insert(name.to_string()),
            Some(file) => files
                .entry((kind, file.clone()))
                .or_default()
                .insert(name.to_string()),
        };
    }
    asked
}

fn slot_is(slot: &crate::secret::SecretSlot, name: &str, source: &Source) -> bool {
    **slot.name() == *name && slot.source() == source
}

/// Decodes a resource, finds its name, and applies it.
fn with<M: Message + Name + Default>(
    resource: &Resource,
    name: impl Fn(&M) -> &String,
    apply: impl FnOnce(&M) -> Result<(), ConfigError>,
) -> (String, Result<(), ConfigError>) {
    let outer = resource.name.clone().unwrap_or_default();
    if resource.body.type_url != M::type_url() {
        let error = ConfigError::new(
            &outer,
            format!("{:?} is not {}", resource.body.type_url, M::type_url()),
        );
        return (outer, Err(error));
    }
    match M::decode(resource.body.value.as_slice()) {
        Ok(message) if name(&message).is_empty() => {
            let error = ConfigError::new(&outer, "the resource has no name");
            (outer, Err(error))
        }
        Ok(message) => (name(&message).clone(), apply(&message)),
        Err(error) => {
            let error = ConfigError::new(&outer, format!("does not decode: {error}"));
            (outer, Err(error))
        }
    }
}

fn fixed<M: Message + Name>(message: &M) -> Item {
    Item {
        version: String::new(),
        body: Any {
            type_url: M::type_url(),
            value: message.encode_to_vec(),
        },
        updated: SystemTime::now(),
        fixed: true,
    }
}

/// A number that shows that a version changed (Envoy: xxHash of the text).
fn hash(version: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    version.hash(&mut hasher);
    hasher.finish() >> 1 // stays a positive number of a signed gauge
}

#[cfg(test)]
mod tests;
