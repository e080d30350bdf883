//! What a worker has of each cluster: its own balancers and its own connections.
//!
//! Nothing here is shared between workers. A worker makes its part of a cluster when the first request
//! asks for it, and lets go of it (idle connections close, busy ones finish) when the cluster is replaced
//! or removed; a change of hosts closes only the connections to those that went.

mod connect;
mod h1;
mod h2;
mod original;
mod pool;
#[cfg(test)]
pub(crate) mod testing;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use tokio::{task::spawn_local, time::MissedTickBehavior};

pub use self::connect::ConnectError;
pub(crate) use self::{
    connect::connect,
    pool::{OnInformational, Pool, Refusal, Wanted},
};
use crate::{
    balance::Balancer,
    cluster::{
        Address, Cluster, ClusterManager, Discovery, Fallback, Host, HostSet, HttpVersion, Subsets,
        with_port,
    },
    head::{Headers, Known as Header, Name, Protocol, RequestHead},
    info::{OriginalSrc, OverrideHost},
    route::policy::SubsetMatch,
};

/// Hosts of an ORIGINAL_DST cluster a worker remembers; beyond that they are made anew each time.
const MAX_ORIGINAL_HOSTS: usize = 4096;
/// Pools of one cluster a worker keeps: server names that come from requests must not fill the memory.
const MAX_POOLS: usize = 8192;
/// Subsets of one cluster a worker keeps balancers for.
const MAX_SUBSETS: usize = 128;

thread_local! {
    /// By manager: a process has one, tests have several.
    static WORKERS: RefCell<Vec<(u64, Rc<WorkerClusters>)>> = const { RefCell::new(Vec::new()) };
}

/// This worker's view of a [`ClusterManager`].
pub(crate) struct WorkerClusters {
    manager: ClusterManager,
    clusters: RefCell<HashMap<Arc<str>, Known>>,
    /// The one asked for last, while nothing has changed: mostly it is asked for again.
    last: RefCell<Option<(Rc<LocalCluster>, u64)>>,
}

struct Known {
    local: Rc<LocalCluster>,
    /// Generation of the manager at which this was known to be the present one.
    checked: u64,
}

impl WorkerClusters {
    /// The view of the worker that calls this; made, with a task that keeps it tidy, at the first call.
    pub(crate) fn of(manager: &ClusterManager) -> Rc<WorkerClusters> {
        let id = manager.id();
        let found = WORKERS.with_borrow(|workers| {
            let found = workers.iter().find(|(of, _)| *of == id);
            found.map(|(_, worker)| worker.clone())
        });
        if let Some(found) = found {
            return found;
        }
        let worker = Rc::new(WorkerClusters {
            manager: manager.clone(),
            clusters: RefCell::default(),
            last: RefCell::default(),
        });
        WORKERS.with_borrow_mut(|workers| workers.push((id, worker.clone())));
        spawn_local(tidy(worker.clone(), Leaving(id)));
        worker
    }

    /// This worker's part of a cluster.
    pub(crate) fn get(&self, name: &str) -> Option<Rc<LocalCluster>> {
        let generation = self.manager.generation();
        if let Some((local, checked)) = &*self.last.borrow()
            && *checked == generation
            && *local.cluster.name == *name
        {
            return Some(local.clone());
        }
        let found = self.find(name, generation);
        *self.last.borrow_mut() = found.clone().map(|local| (local, generation));
        found
    }

    fn find(&self, name: &str, generation: u64) -> Option<Rc<LocalCluster>> {
        if let Some(known) = self.clusters.borrow().get(name)
            && known.checked == generation
        {
            return Some(known.local.clone());
        }
        let present = self.manager.get(name);
        let mut clusters = self.clusters.borrow_mut();
        let replaced = match (clusters.get_mut(name), &present) {
            (Some(known), Some(present)) if known.local.cluster.id == present.id => {
                known.checked = generation;
                return Some(known.local.clone());
            }
            (Some(_), _) => clusters.remove(name),
            (None, _) => None,
        };
        let local = present.map(|cluster| {
            let local = Rc::new(LocalCluster::new(cluster));
            let known = Known {
                local: local.clone(),
                checked: generation,
            };
            clusters.insert(local.cluster.name.clone(), known);
            local
        });
        drop(clusters);
        if let Some(replaced) = replaced {
            replaced.local.drain();
        }
        local
    }

    fn review(&self) {
        self.last.take();
        let names: Vec<Arc<str>> = self.clusters.borrow().keys().cloned().collect();
        for name in names {
            // `get` lets go of what was replaced, and must not make anew what nobody asked for.
            let gone = self.manager.get(&name).map(|cluster| cluster.id);
            let known = self
                .clusters
                .borrow()
                .get(&name)
                .map(|known| known.local.clone());
            let Some(known) = known else { continue };
            if gone == Some(known.cluster.id) {
                known.prune();
            } else {
                self.clusters.borrow_mut().remove(&name);
                known.drain();
            }
        }
    }

    fn sweep(&self) {
        self.last.take();
        let locals: Vec<_> = self
            .clusters
            .borrow()
            .values()
            .map(|known| known.local.clone())
            .collect();
        for local in locals {
            local.sweep();
        }
    }
}

impl fmt::Debug for WorkerClusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "WorkerClusters({} clusters)",
            self.clusters.borrow().len()
        )
    }
}

/// Forgets the worker's view when its runtime ends.
struct Leaving(u64);

impl Drop for Leaving {
    fn drop(&mut self) {
        // During the end of the thread the table may be gone already.
        let forgotten = WORKERS.try_with(|workers| {
            let mut workers = workers.try_borrow_mut().ok()?;
            let place = workers.iter().position(|(id, _)| *id == self.0)?;
            Some(workers.swap_remove(place))
        });
        drop(forgotten);
    }
}

/// Lets go of what is gone or unused, as long as the worker lives.
async fn tidy(worker: Rc<WorkerClusters>, _leaving: Leaving) {
    let mut changes = worker.manager.changes();
    let mut ticks = tokio::time::interval(pool::SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Both branches are cancel-safe: neither holds anything between polls.
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                worker.review();
            }
            _ = ticks.tick() => worker.sweep(),
        }
    }
}

/// What a request asks the connection to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    None,
    /// `upgrade: websocket` and the like.
    Protocol,
    /// `CONNECT`.
    Connect,
}

impl Upgrade {
    pub(crate) fn of(head: &RequestHead) -> Upgrade {
        if &*head.method == b"CONNECT" {
            Upgrade::Connect
        } else if head.headers.known(Header::Upgrade).is_some() {
            Upgrade::Protocol
        } else {
            Upgrade::None
        }
    }
}

/// What decides which host is picked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pick<'a> {
    /// The subset asked for.
    pub(crate) subset: Option<&'a SubsetMatch>,
    /// For consistent hashing.
    pub(crate) hash: Option<u64>,
    /// Where the connection was going, for ORIGINAL_DST.
    pub(crate) original: Option<SocketAddr>,
    /// The request's headers, for ORIGINAL_DST.
    pub(crate) headers: Option<&'a Headers>,
    /// The host that the request names, for dynamic forward proxies.
    pub(crate) authority: &'a [u8],
    /// Hosts that were tried already; others are preferred if `other_hosts` allows so many looks.
    pub(crate) tried: &'a [Arc<Host>],
    /// How often another host is looked for.
    pub(crate) other_hosts: u32,
    /// Whether priorities that were tried already are passed over.
    pub(crate) other_priorities: bool,
    /// The host that is wanted before all others.
    pub(crate) wanted: Option<&'a OverrideHost>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    address: Address,
    transport: usize,
    sni: Option<Arc<str>>,
    source: Option<OriginalSrc>,
    wanted: Wanted,
    high: bool,
}

/// Places for pools used of late.
const RECENT: usize = 16;

/// A pool, and for which requests it is.
struct Recent {
    host: Arc<Host>,
    wanted: Wanted,
    high: bool,
    pool: Rc<Pool>,
}

/// A worker's part of one cluster.
pub(crate) struct LocalCluster {
    pub(crate) cluster: Arc<Cluster>,
    balancers: RefCell<Balancers>,
    pools: RefCell<HashMap<Key, Rc<Pool>>>,
    /// Pools used of late, by where their host lies in memory: finding one needs no hash of an address.
    recent: RefCell<Vec<Option<Recent>>>,
    /// Version of the hosts the pools were last pruned to.
    pruned: Cell<u64>,
}

#[derive(Default)]
struct Balancers {
    version: u64,
    all: Option<Balancer>,
    /// By what was asked for: whether it is that subset, and not what stands in for it.
    subsets: Vec<(SubsetMatch, bool, Option<Balancer>)>,
    /// All hosts, once one was wanted.
    by_address: Option<HashMap<SocketAddr, Arc<Host>>>,
    /// Hosts of an ORIGINAL_DST cluster.
    original: HashMap<SocketAddr, Arc<Host>>,
}

impl LocalCluster {
    fn new(cluster: Arc<Cluster>) -> LocalCluster {
        LocalCluster {
            cluster,
            balancers: RefCell::default(),
            pools: RefCell::default(),
            recent: RefCell::default(),
            pruned: Cell::new(0),
        }
    }

    /// The host for a request or connection.
    pub(crate) fn pick(&self, pick: &Pick<'_>) -> Option<Arc<Host>> {
        let mut balancers = self.balancers.borrow_mut();
        if let Discovery::OriginalDst { header, port } = &self.cluster.config.discovery {
            let stats = &self.cluster.stats;
            let invalid = || stats.original_dst_host_invalid.inc();
            let address = original::address(pick, header.as_ref(), *port, invalid)?;
            return Some(balancers.original_host(address));
        }
        if let Some(cache) = self.cluster.dns_cache() {
            let host = with_port(pick.authority, self.cluster.is_secure())?;
            return Some(balancers.original_host(cache.address(&host)?));
        }
        let set = self.cluster.hosts();
        if balancers.version != set.version || balancers.all.is_none() {
            *balancers = Balancers {
                version: set.version,
                all: Some(Balancer::new(
                    &self.cluster.config.policy,
                    &set,
                    |_| true,
                    rand::random(),
                )),
                ..Balancers::default()
            };
        }
        if let Some(wanted) = pick.wanted {
            let host = balancers.by_address(&set, wanted.address);
            let host =
                host.filter(|host| self.cluster.config.override_health.allows(host.health()));
            if host.is_some() || wanted.strict {
                return host;
            }
        }
        let balancer = match (&self.cluster.config.subsets, pick.subset) {
            (None, _) => balancers.all.as_mut(),
            (Some(subsets), wanted) => balancers.subset(&self.cluster, subsets, wanted),
        }?;
        let tried = |host: &Arc<Host>| pick.tried.iter().any(|tried| tried.address == host.address);
        let avoid = |priority: u32| {
            pick.other_priorities && pick.tried.iter().any(|tried| tried.priority == priority)
        };
        let picked = balancer.pick(pick.hash, avoid);
        if balancer.panicked() {
            self.cluster.stats.lb_healthy_panic.inc();
        }
        let mut host = picked?;
        for attempt in 0..pick.other_hosts {
            if !tried(&host) {
                break;
            }
            // Hashing gives the same host each time: look further along.
            let hash = pick
                .hash
                .map(|hash| hash.wrapping_add(u64::from(attempt) + 1));
            host = balancer.pick(hash, avoid)?;
        }
        Some(host)
    }

    /// Whether there is a host of this address, be it well or not.
    pub(crate) fn knows(&self, address: SocketAddr) -> bool {
        let set = self.cluster.hosts();
        let address = Address::Ip(address);
        set.hosts.iter().any(|host| host.address == address)
    }

    /// The pool for requests like this one to `host`, with connections from `source` if one is given.
    pub(crate) fn pool(
        &self,
        host: &Arc<Host>,
        head: &RequestHead,
        high: bool,
        source: Option<OriginalSrc>,
    ) -> Rc<Pool> {
        let config = &self.cluster.config;
        let wanted = match (config.version, head.protocol) {
            (HttpVersion::Http1, _) => Wanted::Http1,
            (HttpVersion::Http2, _) | (HttpVersion::Downstream, Protocol::Http2) => Wanted::Http2,
            (HttpVersion::Downstream, Protocol::Http10 | Protocol::Http11) => Wanted::Http1,
            (HttpVersion::Auto, _) => Wanted::Negotiate,
        };
        if config.auto_sni || source.is_some() {
            return self.find_pool(host, head, wanted, high, source);
        }
        let place = (Arc::as_ptr(host).addr() >> 6) % RECENT;
        if let Some(Some(recent)) = self.recent.borrow().get(place)
            && Arc::ptr_eq(&recent.host, host)
            && recent.wanted == wanted
            && recent.high == high
        {
            return recent.pool.clone();
        }
        let pool = self.find_pool(host, head, wanted, high, None);
        let mut recent = self.recent.borrow_mut();
        if recent.is_empty() {
            recent.resize_with(RECENT, || None);
        }
        if let Some(slot) = recent.get_mut(place) {
            *slot = Some(Recent {
                host: host.clone(),
                wanted,
                high,
                pool: pool.clone(),
            });
        }
        pool
    }

    fn find_pool(
        &self,
        host: &Arc<Host>,
        head: &RequestHead,
        wanted: Wanted,
        high: bool,
        source: Option<OriginalSrc>,
    ) -> Rc<Pool> {
        let config = &self.cluster.config;
        let key = Key {
            address: host.address.clone(),
            transport: host.transport,
            sni: config
                .auto_sni
                .then(|| server_name(config.auto_sni_header.as_ref(), head))
                .flatten(),
            source,
            wanted,
            high,
        };
        let mut pools = self.pools.borrow_mut();
        if let Some(pool) = pools.get(&key) {
            return pool.clone();
        }
        let pool = Pool::new(
            self.cluster.clone(),
            host.clone(),
            key.sni.clone(),
            source,
            wanted,
            high,
        );
        if pools.len() < MAX_POOLS {
            pools.insert(key, pool.clone());
        } else {
            // Serves this request and keeps nothing.
            pool.drain();
        }
        pool
    }

    /// Closes connections to hosts that are gone.
    fn prune(&self) {
        let set = self.cluster.hosts();
        if self.pruned.replace(set.version) == set.version
            || self.cluster.config.discovery.is_by_request()
        {
            return;
        }
        self.forget_recent();
        let mut gone = Vec::new();
        self.pools.borrow_mut().retain(|key, pool| {
            let stays = set.hosts.iter().any(|host| {
                host.address == key.address
                    && host.transport == key.transport
                    // The pool counts on the state it was made with.
                    && Arc::ptr_eq(&host.state, &pool.host().state)
            });
            if !stays {
                gone.push(pool.clone());
            }
            stays
        });
        for pool in gone {
            pool.drain();
        }
    }

    /// What is remembered of late is no use of it.
    fn forget_recent(&self) {
        // Without the borrow: the end of a pool may come back here.
        drop(self.recent.take());
    }

    fn sweep(&self) {
        self.forget_recent();
        let pools: Vec<_> = self.pools.borrow().values().cloned().collect();
        for pool in pools {
            pool.sweep();
        }
        // A request that asks for a connection holds the pool, too.
        self.pools
            .borrow_mut()
            .retain(|_, pool| pool.is_used() || Rc::strong_count(pool) > 1);
        // Held by the table only: no pool and no request uses it.
        self.balancers
            .borrow_mut()
            .original
            .retain(|_, host| Arc::strong_count(host) > 1);
    }

    fn drain(&self) {
        self.forget_recent();
        let pools: Vec<_> = self
            .pools
            .borrow_mut()
            .drain()
            .map(|(_, pool)| pool)
            .collect();
        for pool in pools {
            pool.drain();
        }
    }
}

impl fmt::Debug for LocalCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "LocalCluster({:?}, {} pools)",
            self.cluster,
            self.pools.borrow().len()
        )
    }
}

impl Balancers {
    fn original_host(&mut self, address: SocketAddr) -> Arc<Host> {
        if let Some(host) = self.original.get(&address) {
            return host.clone();
        }
        let host = Arc::new(Host::bare(address));
        if self.original.len() < MAX_ORIGINAL_HOSTS {
            self.original.insert(address, host.clone());
        }
        host
    }

    fn by_address(&mut self, set: &HostSet, address: SocketAddr) -> Option<Arc<Host>> {
        let all = self.by_address.get_or_insert_with(|| {
            let known = |host: &Arc<Host>| Some((host.address.socket()?, host.clone()));
            set.hosts.iter().filter_map(known).collect()
        });
        all.get(&address).cloned()
    }

    fn subset(
        &mut self,
        cluster: &Cluster,
        subsets: &Subsets,
        wanted: Option<&SubsetMatch>,
    ) -> Option<&mut Balancer> {
        let empty = SubsetMatch::default();
        let wanted = wanted.unwrap_or(&empty);
        let known = self
            .subsets
            .iter()
            .position(|(key, ..)| Arc::ptr_eq(key, wanted) || key == wanted);
        let index = match known {
            Some(index) => index,
            None => {
                let (selected, balancer) = make_subset(cluster, subsets, wanted);
                if self.subsets.len() >= MAX_SUBSETS {
                    self.subsets.clear();
                }
                self.subsets.push((wanted.clone(), selected, balancer));
                self.subsets.len() - 1
            }
        };
        let (_, selected, balancer) = self.subsets.get_mut(index)?;
        match (*selected, &balancer) {
            (true, _) => cluster.stats.lb_subsets_selected.inc(),
            (false, Some(_)) => cluster.stats.lb_subsets_fallback.inc(),
            (false, None) => {}
        }
        balancer.as_mut()
    }
}

/// The hosts that were asked for, or what stands in for them; and whether it is the former.
fn make_subset(
    cluster: &Cluster,
    subsets: &Subsets,
    wanted: &SubsetMatch,
) -> (bool, Option<Balancer>) {
    let set = cluster.hosts();
    let policy = &cluster.config.policy;
    let selected = subsets
        .selectors
        .iter()
        .any(|keys| keys.iter().eq(wanted.keys()));
    if selected && !wanted.is_empty() {
        let fits = |host: &Host| {
            wanted
                .iter()
                .all(|(key, value)| host.labels.get(key) == Some(value))
        };
        if set.hosts.iter().any(|host| fits(host)) {
            return (
                true,
                Some(Balancer::new(policy, &set, fits, rand::random())),
            );
        }
    }
    let instead = match &subsets.fallback {
        Fallback::Refuse => None,
        Fallback::Any => Some(Balancer::new(policy, &set, |_| true, rand::random())),
        Fallback::Default(labels) => {
            let fits = |host: &Host| {
                labels
                    .iter()
                    .all(|(key, value)| host.labels.get(key) == Some(value))
            };
            Some(Balancer::new(policy, &set, fits, rand::random()))
        }
    };
    (false, instead)
}

fn server_name(header: Option<&Name>, head: &RequestHead) -> Option<Arc<str>> {
    let text = match header.and_then(|name| head.headers.get(name)) {
        Some(value) => value,
        None => &head.authority,
    };
    let name = std::str::from_utf8(crate::route::without_port(text)).ok()?;
    let is_ip = name
        .trim_matches(['[', ']'])
        .parse::<std::net::IpAddr>()
        .is_ok();
    (!name.is_empty() && !is_ip).then(|| name.into())
}
