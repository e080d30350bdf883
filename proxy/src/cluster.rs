//! Clusters: what the control plane said about them, and their hosts.
//!
//! The main runtime applies changes ([`ClusterManager`]); workers hold on to an `Arc<Cluster>` and load
//! its current [`HostSet`]. A cluster is immutable but for its hosts: a change of anything else is a
//! new cluster in its place, which takes over what is remembered of the hosts. A new cluster becomes
//! visible when it is warm: it has its first endpoints and the secrets it needs.

mod balancing;
mod config;
mod dns;
mod forward;
pub(crate) mod health;
mod host;
mod stats;
mod transport;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use lateen_protocols::envoy::envoy::{
    config::{cluster::v3::Cluster as Proto, endpoint::v3::ClusterLoadAssignment},
    extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig,
};
use prost::Message;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::AbortHandle,
    time::Instant,
};

pub use self::{
    config::{Config, Discovery, Dns, Fallback, Http2, HttpVersion, KeepAlive, Subsets},
    host::{ActiveHealth, Address, Health, Host, HostSet, HostState, Locality, Numbers},
    stats::ClusterStats,
    transport::{Transport, Transports},
};
use self::{
    forward::DnsCaches,
    health::Checker,
    host::{Assignment, MAX_CHECKS, SpecTarget},
};
pub(crate) use self::{
    forward::{DnsCache, Unresolved, with_port},
    stats::Caller,
};
use crate::{
    circuit::Circuits,
    config_error::ConfigError,
    outlier::{Cause, Detector, Outcome},
    proto::invalid,
    shared::Shared,
};

/// How long a new cluster waits for endpoints and secrets. Envoy: `initial_fetch_timeout`.
const WARMING_TIMEOUT: Duration = Duration::from_secs(15);

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// One cluster.
pub struct Cluster {
    /// Its name.
    pub name: Arc<str>,
    /// Unique in this process; differs when a cluster is replaced by one of the same name.
    pub id: u64,
    /// Its settings; clusters with the same ones share them.
    pub config: Arc<Config>,
    /// How connections are protected.
    pub transports: Transports,
    /// Limits.
    pub circuits: Circuits,
    /// Outlier detection, if configured.
    pub outlier: Option<Detector>,
    /// What it counts.
    pub stats: ClusterStats,
    /// Where the hosts that requests name are, for dynamic forward proxies.
    forward: Option<Arc<DnsCache>>,
    hosts: ArcSwap<HostSet>,
    /// Serialises changes of `hosts`.
    update: Mutex<Update>,
    initialised: AtomicBool,
    /// Tells who waits that it is initialised.
    first_hosts: Notify,
    /// Number of active health checks.
    checks: usize,
    changed: Arc<Changes>,
    runtime: Handle,
}

/// How a cluster differs from the present one of its name.
enum Difference {
    None,
    /// Only in the endpoints that it carries.
    Endpoints,
    More,
}

struct Update {
    version: u64,
    /// Hosts of the cluster this one replaced, until our own first set.
    inherited: Option<Arc<HostSet>>,
    /// What it was made of, encoded: a fraction of the decoded message, and seldom needed.
    source: Box<[u8]>,
    resolver: Option<AbortHandle>,
}

impl Drop for Update {
    fn drop(&mut self) {
        if let Some(resolver) = &self.resolver {
            resolver.abort();
        }
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("name", &self.name)
            .field("hosts", &self.hosts.load().hosts.len())
            .finish_non_exhaustive()
    }
}

impl Cluster {
    fn compile(
        proto: &Proto,
        config: Arc<Config>,
        shared: &Shared,
        changed: Arc<Changes>,
        inherited: Option<Arc<HostSet>>,
    ) -> Result<Arc<Cluster>, ConfigError> {
        let transports =
            Transports::compile(proto, &shared.secrets, Config::validates_sni(proto)?)?;
        let stat_name = if proto.alt_stat_name.is_empty() {
            &proto.name
        } else {
            &proto.alt_stat_name
        };
        let scope = shared.stats.scope(&format!("cluster.{stat_name}."));
        let circuits = Circuits::compile(proto.circuit_breakers.as_ref(), &scope)?;
        let outlier = proto
            .outlier_detection
            .as_ref()
            .map(|o| Detector::compile(o, &scope))
            .transpose()?;
        if proto.health_checks.len() > MAX_CHECKS {
            return Err(invalid(
                "health_checks",
                format!("are more than {MAX_CHECKS}"),
            ));
        }
        let checkers: Arc<[Checker]> = proto
            .health_checks
            .iter()
            .map(|check| Checker::compile(check, &scope))
            .collect::<Result<_, _>>()
            .map_err(|error| error.within("health_checks"))?;
        let forward = match &config.discovery {
            Discovery::Forward(cache) => Some(shared.clusters.dns_cache(cache, shared)?),
            _ => None,
        };
        let cluster = Arc::new(Cluster {
            name: proto.name.as_str().into(),
            id: NEXT_ID.fetch_add(1, Relaxed),
            transports,
            circuits,
            outlier,
            stats: ClusterStats::new(scope),
            hosts: ArcSwap::default(),
            update: Mutex::new(Update {
                version: 0,
                inherited,
                source: proto.encode_to_vec().into(),
                resolver: None,
            }),
            initialised: AtomicBool::new(config.discovery.is_by_request()),
            forward,
            first_hosts: Notify::new(),
            checks: checkers.len(),
            changed,
            runtime: shared.runtime.clone(),
            config,
        });
        cluster.set_inline(proto.load_assignment.as_ref())?;
        if let Some(cache) = &cluster.forward {
            cache.serve(&cluster);
        }
        if let Some(detector) = &cluster.outlier {
            let interval = detector.interval();
            let weak = Arc::downgrade(&cluster);
            cluster.runtime.spawn(watch_outliers(weak, interval));
        }
        if !checkers.is_empty() {
            let weak = Arc::downgrade(&cluster);
            cluster.runtime.spawn(health::watch(weak, checkers));
        }
        Ok(cluster)
    }

    /// The hosts at this moment.
    pub fn hosts(&self) -> arc_swap::Guard<Arc<HostSet>> {
        self.hosts.load()
    }

    /// The cache of a dynamic forward proxy's hosts.
    pub(crate) fn dns_cache(&self) -> Option<&Arc<DnsCache>> {
        self.forward.as_ref()
    }

    /// Whether connections are protected by TLS unless the endpoint says otherwise.
    pub(crate) fn is_secure(&self) -> bool {
        matches!(self.transports.get(Transports::DEFAULT), Transport::Tls(_))
    }

    /// Whether it has had its first endpoints and its secrets are there.
    pub fn is_warm(&self) -> bool {
        self.initialised.load(Acquire) && self.transports.ready()
    }

    /// The name under which the control plane knows its endpoints.
    pub fn eds_service_name(&self) -> Option<&Arc<str>> {
        match &self.config.discovery {
            Discovery::Eds(name) => Some(name),
            _ => None,
        }
    }

    /// Tells outlier detection what came of a request or connection. For workers.
    pub fn report(self: &Arc<Cluster>, host: &Host, outcome: Outcome) {
        if let Some(detector) = &self.outlier
            && let Some(cause) = detector.record(&host.state.monitor, outcome)
        {
            let (cluster, state) = (self.clone(), host.state.clone());
            // Rare, and needs the lock of the hosts: not for a worker.
            self.runtime
                .spawn(async move { cluster.eject(cause, &state) });
        }
    }

    fn eject(&self, cause: Cause, state: &HostState) {
        let mut update = self.lock();
        let set = self.hosts.load();
        let Some(detector) = &self.outlier else {
            return;
        };
        if detector.eject(cause, &state.monitor, &set.monitors()) {
            tracing::info!(cluster = &*self.name, ?cause, "host ejected");
            self.health_changed(&mut update, &set);
        }
    }

    fn review_outliers(&self) {
        let mut update = self.lock();
        let set = self.hosts.load();
        if self
            .outlier
            .as_ref()
            .is_some_and(|detector| detector.tick(&set.monitors()))
        {
            self.health_changed(&mut update, &set);
        }
    }

    /// Publishes the same hosts as a new set, from which balancers are built anew.
    fn health_changed(&self, update: &mut Update, set: &HostSet) {
        self.publish(update, |version| HostSet {
            hosts: set.hosts.clone(),
            overprovisioning: set.overprovisioning,
            version,
        });
    }

    fn publish(&self, update: &mut Update, make: impl FnOnce(u64) -> HostSet) {
        update.version += 1;
        let set = make(update.version);
        let now = Instant::now();
        for host in &set.hosts {
            host.state.note_service(host.serves(), now);
        }
        let count = |health| {
            set.hosts
                .iter()
                .filter(|host| host.health() == health)
                .count() as u64
        };
        self.stats.membership_total.set(set.hosts.len() as u64);
        self.stats.membership_healthy.set(count(Health::Healthy));
        self.stats.membership_degraded.set(count(Health::Degraded));
        self.hosts.store(Arc::new(set));
        self.changed.announce();
    }

    fn set_hosts(
        &self,
        assignment: &Assignment,
        resolved: impl Fn(&SpecTarget) -> Vec<std::net::SocketAddr>,
    ) {
        let mut update = self.lock();
        let previous = update
            .inherited
            .take()
            .unwrap_or_else(|| self.hosts.load_full());
        self.publish(&mut update, |version| {
            let set = assignment.hosts(&previous, version, resolved);
            for host in &set.hosts {
                if self.checks > 0 {
                    host.state.await_checks(self.checks);
                }
            }
            set
        });
        self.stats.membership_change.inc();
        if let Some(detector) = &self.outlier {
            detector.settle(&self.hosts.load().monitors());
        }
        self.note_initialised();
    }

    /// Endpoints are there; when they are checked, the first answers must be too.
    fn note_initialised(&self) {
        let hosts = self.hosts.load();
        if self.checks == 0 || !hosts.hosts.iter().any(|host| host.state.is_pending()) {
            self.initialised.store(true, Release);
            self.first_hosts.notify_waiters();
        }
    }

    /// An active health check has found something new about a host.
    fn active_health_changed(&self, host: &Host, health: ActiveHealth) {
        tracing::debug!(cluster = &*self.name, host = %host.address, ?health, "health check");
        let mut update = self.lock();
        let set = self.hosts.load();
        self.health_changed(&mut update, &set);
        self.note_initialised();
    }

    /// Wakes when hosts of any cluster change.
    fn watch_hosts(&self) -> watch::Receiver<u64> {
        self.changed.sender.subscribe()
    }

    /// Takes endpoints the control plane sent.
    fn set_assignment(&self, proto: &ClusterLoadAssignment) -> Result<(), ConfigError> {
        let assignment = Assignment::read(proto, &self.transports, false)?;
        self.stats.update_success.inc();
        if assignment.specs.is_empty() {
            self.stats.update_empty.inc();
        }
        self.set_hosts(&assignment, |_| Vec::new());
        Ok(())
    }

    /// Takes the endpoints that are in the cluster itself.
    fn set_inline(
        self: &Arc<Cluster>,
        inline: Option<&ClusterLoadAssignment>,
    ) -> Result<(), ConfigError> {
        let (dns, first_only) = match self.config.discovery {
            Discovery::Static => (None, false),
            Discovery::StrictDns(dns) => (Some(dns), false),
            Discovery::LogicalDns(dns) => (Some(dns), true),
            Discovery::Eds(_) | Discovery::OriginalDst { .. } | Discovery::Forward(_) => {
                return match inline {
                    Some(inline) if !inline.endpoints.is_empty() => Err(invalid(
                        "load_assignment",
                        "this type of cluster has no endpoints of its own",
                    )),
                    _ => Ok(()),
                };
            }
        };
        let none = ClusterLoadAssignment::default();
        let proto = inline.unwrap_or(&none);
        let assignment = Assignment::read(proto, &self.transports, dns.is_some())
            .map_err(|error| error.within("load_assignment"))?;
        if first_only && assignment.specs.len() != 1 {
            return Err(invalid(
                "load_assignment",
                "LOGICAL_DNS must have exactly one endpoint",
            ));
        }
        match dns {
            None => self.set_hosts(&assignment, |_| Vec::new()),
            Some(dns) => {
                let task = dns::resolve(Arc::downgrade(self), dns, first_only, assignment);
                let task = self.runtime.spawn(task).abort_handle();
                if let Some(old) = self.lock().resolver.replace(task) {
                    old.abort();
                }
            }
        }
        Ok(())
    }

    /// How `proto` differs from what the cluster was made of.
    fn difference(&self, proto: &Proto) -> Difference {
        // It was encoded here.
        let source = Proto::decode(&*self.lock().source).unwrap_or_default();
        if source == *proto {
            return Difference::None;
        }
        let without_endpoints = |mut proto: Proto| {
            proto.load_assignment = None;
            proto
        };
        match without_endpoints(source) == without_endpoints(proto.clone()) {
            true => Difference::Endpoints,
            false => Difference::More,
        }
    }

    /// Takes new endpoints in the cluster itself.
    fn replace_inline(self: &Arc<Cluster>, proto: &Proto) -> Result<(), ConfigError> {
        self.set_inline(proto.load_assignment.as_ref())?;
        self.lock().source = proto.encode_to_vec().into();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Update> {
        self.update.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn watch_outliers(cluster: Weak<Cluster>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        match cluster.upgrade() {
            Some(cluster) => cluster.review_outliers(),
            None => return,
        }
    }
}

/// All clusters. Cheap to clone; clones are the same manager.
#[derive(Clone)]
pub struct ClusterManager(Arc<Inner>);

struct Inner {
    id: u64,
    active: RwLock<HashMap<Arc<str>, Arc<Cluster>>>,
    state: Mutex<State>,
    dns_caches: DnsCaches,
    changed: Arc<Changes>,
}

/// Tells workers that something changed. They ask at every request whether something did, so that is an
/// atomic of its own and not the channel's lock.
struct Changes {
    generation: AtomicU64,
    sender: watch::Sender<u64>,
}

impl Default for Changes {
    fn default() -> Changes {
        Changes {
            generation: AtomicU64::new(1),
            sender: watch::Sender::new(1),
        }
    }
}

impl Changes {
    fn announce(&self) {
        self.generation.fetch_add(1, Release);
        self.sender.send_modify(|generation| *generation += 1);
    }
}

#[derive(Default)]
struct State {
    /// New clusters that wait for endpoints or secrets.
    warming: HashMap<Arc<str>, Arc<Cluster>>,
    /// The last endpoints of each service, for clusters that come later.
    assignments: HashMap<String, ClusterLoadAssignment>,
    /// Which clusters use the endpoints of a service.
    users: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// Settings seen last: most clusters of a mesh have one of a few.
    configs: VecDeque<Weak<Config>>,
}

impl State {
    /// The same settings, shared with a cluster that has them already.
    fn share(&mut self, config: Config) -> Arc<Config> {
        const REMEMBERED: usize = 16;
        let known = self.configs.iter().filter_map(Weak::upgrade);
        if let Some(same) = known.into_iter().find(|known| **known == config) {
            return same;
        }
        let config = Arc::new(config);
        self.configs.truncate(REMEMBERED - 1);
        self.configs.push_front(Arc::downgrade(&config));
        config
    }
}

impl Default for ClusterManager {
    fn default() -> ClusterManager {
        ClusterManager(Arc::new(Inner {
            id: NEXT_ID.fetch_add(1, Relaxed),
            active: RwLock::default(),
            state: Mutex::default(),
            dns_caches: DnsCaches::default(),
            changed: Arc::default(),
        }))
    }
}

impl fmt::Debug for ClusterManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterManager({} clusters)", self.read().len())
    }
}

impl ClusterManager {
    /// A manager without clusters.
    pub fn new() -> ClusterManager {
        ClusterManager::default()
    }

    /// Adds a cluster, or changes the one of the same name.
    ///
    /// # Errors
    /// When it is invalid or needs something unsupported; then nothing changed.
    pub fn apply(&self, proto: &Proto, shared: &Shared) -> Result<(), ConfigError> {
        self.add(proto, shared)
            .map_err(|error| error.within(format!("cluster {}", proto.name)))
    }

    fn add(&self, proto: &Proto, shared: &Shared) -> Result<(), ConfigError> {
        if proto.name.is_empty() {
            return Err(invalid("name", "is required"));
        }
        let mut state = self.state();
        let name = proto.name.as_str();
        let active = self.read().get(name).cloned();
        let present = state.warming.get(name).cloned().or_else(|| active.clone());
        if let Some(present) = &present {
            match present.difference(proto) {
                Difference::None => return Ok(()),
                Difference::Endpoints => return present.replace_inline(proto),
                Difference::More => {}
            }
        }
        let inherited = active.as_ref().map(|active| active.hosts.load_full());
        let config = state.share(Config::read(proto)?);
        let cluster = Cluster::compile(proto, config, shared, self.0.changed.clone(), inherited)?;
        if let Some(service) = cluster.eds_service_name() {
            let users = state.users.entry(service.clone()).or_default();
            if !users.contains(&cluster.name) {
                users.push(cluster.name.clone());
            }
            if let Some(assignment) = state.assignments.get(&**service) {
                cluster.set_assignment(assignment)?;
            }
        }
        if cluster.is_warm() {
            state.warming.remove(name);
            self.activate(cluster);
        } else {
            state.warming.insert(cluster.name.clone(), cluster.clone());
            let (manager, secrets) = (Arc::downgrade(&self.0), shared.secrets.changes());
            shared.runtime.spawn(warm(manager, cluster, secrets));
        }
        Ok(())
    }

    /// Removes a cluster; requests under way finish.
    pub fn remove(&self, name: &str) {
        let mut state = self.state();
        let warming = state.warming.remove(name);
        let removed = self.write().remove(name);
        let Some(cluster) = removed.or(warming) else {
            return;
        };
        if let Some(service) = cluster.eds_service_name()
            && let Some(users) = state.users.get_mut(service)
        {
            users.retain(|user| **user != *name);
            if users.is_empty() {
                state.users.remove(service);
                state.assignments.remove(&**service);
            }
        }
        drop(state);
        // Removing a scope removes those whose name begins with it: not while such a cluster lives.
        let prefix = format!("{name}.");
        if !self.read().keys().any(|other| other.starts_with(&prefix)) {
            cluster.stats.scope().remove();
        }
        self.0.changed.announce();
    }

    /// Takes the endpoints of a service, for all clusters that use it now or later.
    ///
    /// # Errors
    /// When they are invalid; then clusters keep what they had.
    pub fn set_endpoints(&self, assignment: &ClusterLoadAssignment) -> Result<(), ConfigError> {
        let name = assignment.cluster_name.as_str();
        let within = |error: ConfigError| error.within(format!("endpoints of {name}"));
        let mut state = self.state();
        // Checked even when nobody uses it yet, so that a bad one is refused now and not later.
        let unmatched = Transports::none();
        Assignment::read(assignment, &unmatched, false).map_err(within)?;
        for user in state.users.get(name).into_iter().flatten() {
            let clusters = [
                self.read().get(user).cloned(),
                state.warming.get(user).cloned(),
            ];
            for cluster in clusters.into_iter().flatten() {
                if cluster
                    .eds_service_name()
                    .is_some_and(|service| **service == *name)
                {
                    cluster.set_assignment(assignment).map_err(within)?;
                }
            }
        }
        state
            .assignments
            .insert(assignment.cluster_name.clone(), assignment.clone());
        Ok(())
    }

    /// The cluster of this name, if it is warm.
    pub fn get(&self, name: &str) -> Option<Arc<Cluster>> {
        self.read().get(name).cloned()
    }

    /// The cache of this name for dynamic forward proxies, made if there is none.
    ///
    /// # Errors
    /// Its settings are not valid, or not those of the present cache.
    pub(crate) fn dns_cache(
        &self,
        config: &DnsCacheConfig,
        shared: &Shared,
    ) -> Result<Arc<DnsCache>, ConfigError> {
        self.0.dns_caches.get(config, shared)
    }

    /// Clusters that need endpoints from the control plane, and the names these go by there.
    pub fn eds_wanted(&self) -> Vec<(Arc<str>, Arc<str>)> {
        let state = self.state();
        let mut wanted: Vec<_> = state
            .users
            .iter()
            .flat_map(|(service, users)| users.iter().map(|user| (user.clone(), service.clone())))
            .collect();
        wanted.sort();
        wanted
    }

    /// The files from which endpoints are to come, by the name of the service.
    pub(crate) fn eds_files(&self) -> HashMap<Arc<str>, String> {
        let state = self.state();
        let clusters = self.read();
        let users = state.users.iter().flat_map(|(service, users)| {
            let newest = users
                .iter()
                .filter_map(|user| state.warming.get(user).or_else(|| clusters.get(user)));
            newest.filter_map(|cluster| Some((service.clone(), cluster.config.eds_file.clone()?)))
        });
        users.collect()
    }

    /// Whether this cluster (in its newest form) serves.
    pub fn is_warm(&self, name: &str) -> bool {
        let state = self.state();
        !state.warming.contains_key(name) && self.read().contains_key(name)
    }

    /// Clusters that wait for endpoints or secrets.
    pub fn warming(&self) -> Vec<Arc<Cluster>> {
        sorted(self.state().warming.values())
    }

    /// All clusters that serve, by name.
    pub fn all(&self) -> Vec<Arc<Cluster>> {
        sorted(self.read().values())
    }

    /// Changes whenever a cluster comes or goes, and whenever hosts or their health change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.sender.subscribe()
    }

    /// Unique in this process.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// Grows with every change.
    pub(crate) fn generation(&self) -> u64 {
        self.0.changed.generation.load(Acquire)
    }

    fn activate(&self, cluster: Arc<Cluster>) {
        tracing::debug!(cluster = &*cluster.name, "cluster is active");
        self.write().insert(cluster.name.clone(), cluster);
        self.0.changed.announce();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Arc<str>, Arc<Cluster>>> {
        self.0.active.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<Arc<str>, Arc<Cluster>>> {
        self.0
            .active
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn sorted<'a>(clusters: impl Iterator<Item = &'a Arc<Cluster>>) -> Vec<Arc<Cluster>> {
    let mut all: Vec<_> = clusters.cloned().collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// Makes a cluster visible when it is warm, or when it has waited long enough.
async fn warm(manager: Weak<Inner>, cluster: Arc<Cluster>, mut secrets: watch::Receiver<u64>) {
    let deadline = Instant::now() + WARMING_TIMEOUT;
    loop {
        // Asked for before looking, so that no sign is missed.
        let first_hosts = cluster.first_hosts.notified();
        tokio::pin!(first_hosts);
        first_hosts.as_mut().enable();
        if cluster.is_warm() {
            break;
        }
        // All branches are cancel-safe: they only wait for a sign to look again.
        tokio::select! {
            () = first_hosts => {}
            changed = secrets.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(deadline) => {
                tracing::warn!(cluster = &*cluster.name, "cluster serves without endpoints or secrets, waited long enough");
                break;
            }
        }
    }
    let Some(manager) = manager.upgrade().map(ClusterManager) else {
        return;
    };
    let mut state = manager.state();
    if state
        .warming
        .get(&cluster.name)
        .is_some_and(|present| Arc::ptr_eq(present, &cluster))
    {
        state.warming.remove(&cluster.name);
        // Under the lock of the state: a removal that comes now must find it in one of the two places.
        manager.activate(cluster);
    }
}

#[cfg(test)]
mod tests;
