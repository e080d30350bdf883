//! The hosts of dynamic forward proxies: names that requests bring, resolved when first asked for and kept
//! fresh while they are used. A cache is shared by filters and clusters that name it. Envoy:
//! `envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig`.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use lateen_protocols::envoy::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use tokio::{runtime::Handle, sync::watch, time::Instant};

use super::{Cluster, config::Dns, dns::choose};
use crate::{
    config_error::ConfigError,
    proto::{duration, invalid, optional_duration},
    shared::Shared,
    stats::{Counter, Gauge, Scope},
};

/// Envoy: `dns_refresh_rate` "defaults to 60s".
const REFRESH: Duration = Duration::from_secs(60);
/// Envoy: `dns_min_refresh_rate` "defaults to 5s".
const LEAST_REFRESH: Duration = Duration::from_secs(5);
/// Envoy: `host_ttl` "defaults to 5m".
const HOST_TTL: Duration = Duration::from_secs(300);
/// Envoy: `dns_query_timeout` "defaults to 5s".
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy: `max_hosts` and `max_pending_requests` "default to 1024".
const MOST: u32 = 1024;

/// The caches of this process, by name.
#[derive(Default)]
pub(super) struct DnsCaches(Mutex<HashMap<String, Weak<DnsCache>>>);

/// One cache. Its look-ups run on the main runtime, which writes the entries; workers read them.
pub(crate) struct DnsCache {
    config: DnsCacheConfig,
    settings: Settings,
    entries: ArcSwap<HashMap<Arc<str>, Arc<Entry>>>,
    /// Requests that wait for a name.
    pending: AtomicU64,
    /// Clusters that go by it: they count its hosts.
    users: Mutex<Vec<Weak<Cluster>>>,
    began: Instant,
    runtime: Handle,
    stats: Stats,
}

#[derive(Debug, PartialEq)]
struct Settings {
    dns: Dns,
    refresh_after_failure: Duration,
    /// A name that does not resolve is forgotten at once.
    forget_failures: bool,
    ttl: Duration,
    max_hosts: usize,
    max_pending: u64,
    timeout: Duration,
}

/// A name and what it resolves to.
struct Entry {
    found: ArcSwapOption<Found>,
    /// Tells who waits that there is something.
    known: watch::Sender<bool>,
    /// Milliseconds from the cache's beginning.
    used: AtomicU64,
}

/// The address of a name, or Envoy's words for why there is none.
type Found = Result<SocketAddr, &'static str>;

struct Stats {
    attempt: Counter,
    success: Counter,
    failure: Counter,
    timeout: Counter,
    added: Counter,
    removed: Counter,
    changed: Counter,
    overflow: Counter,
    pending_overflow: Counter,
    hosts: Gauge,
}

/// Why a request cannot go to the name it brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unresolved {
    /// Too many requests wait already.
    Pending,
    /// There are too many names already.
    Overflow,
    /// The name has no address; Envoy's words for it.
    Failed(&'static str),
}

impl DnsCaches {
    /// The cache of this name and these settings, made if there is none.
    ///
    /// # Errors
    /// The settings are not valid, not supported, or not those of the present cache of that name.
    pub(super) fn get(
        &self,
        config: &DnsCacheConfig,
        shared: &Shared,
    ) -> Result<Arc<DnsCache>, ConfigError> {
        if config.name.is_empty() {
            return Err(invalid("dns_cache_config.name", "is required"));
        }
        let mut caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(present) = caches.get(&config.name).and_then(Weak::upgrade) {
            if present.config != *config {
                return Err(invalid(
                    "dns_cache_config",
                    format!("the cache {} has other settings", config.name),
                ));
            }
            return Ok(present);
        }
        let settings = Settings::read(config).map_err(|error| error.within("dns_cache_config"))?;
        let cache = Arc::new(DnsCache {
            settings,
            entries: ArcSwap::default(),
            pending: AtomicU64::new(0),
            users: Mutex::default(),
            began: Instant::now(),
            runtime: shared.runtime.clone(),
            stats: Stats::new(&shared.stats.scope(&format!("dns_cache.{}.", config.name))),
            config: config.clone(),
        });
        for name in &config.preresolve_hostnames {
            use lateen_protocols::envoy::envoy::config::core::v3::socket_address::PortSpecifier;
            let Some(PortSpecifier::PortValue(port)) = name.port_specifier else {
                return Err(invalid("preresolve_hostnames", "a port is missing"));
            };
            // What is too much is counted.
            let _entry = cache.entry(&format!("{}:{port}", name.address));
        }
        caches.retain(|_, cache| cache.strong_count() > 0);
        caches.insert(config.name.clone(), Arc::downgrade(&cache));
        Ok(cache)
    }
}

impl Settings {
    fn read(config: &DnsCacheConfig) -> Result<Settings, ConfigError> {
        #[allow(deprecated, reason = "refused as well")]
        let unsupported = [
            ("use_tcp_for_dns_lookups", config.use_tcp_for_dns_lookups),
            (
                "dns_resolution_config",
                config.dns_resolution_config.is_some(),
            ),
            (
                "typed_dns_resolver_config",
                config.typed_dns_resolver_config.is_some(),
            ),
            ("key_value_config", config.key_value_config.is_some()),
            (
                "resolved_address_filter",
                config.resolved_address_filter.is_some(),
            ),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, given)| *given) {
            return Err(invalid(*field, "not supported"));
        }
        let time = |field: &str, value, default: Duration| {
            let time = optional_duration(field, value)?.unwrap_or(default);
            match time.is_zero() {
                true => Err(invalid(field, "must be greater than 0")),
                false => Ok(time),
            }
        };
        let refresh = time(
            "dns_refresh_rate",
            config.dns_refresh_rate.as_ref(),
            REFRESH,
        )?;
        let after_failure = config.dns_failure_refresh_rate.as_ref();
        let after_failure = after_failure.and_then(|rate| rate.base_interval.as_ref());
        let most = config.max_hosts.map_or(MOST, |most| most.value);
        if most == 0 {
            return Err(invalid("max_hosts", "must be greater than 0"));
        }
        let pending = config.dns_cache_circuit_breaker.as_ref();
        let pending = pending.and_then(|breaker| breaker.max_pending_requests);
        Ok(Settings {
            dns: Dns {
                refresh: refresh.max(time(
                    "dns_min_refresh_rate",
                    config.dns_min_refresh_rate.as_ref(),
                    LEAST_REFRESH,
                )?),
                family: config.dns_lookup_family(),
            },
            refresh_after_failure: match after_failure {
                Some(base) => {
                    duration("dns_failure_refresh_rate", base)?.max(Duration::from_millis(1))
                }
                None => refresh,
            },
            forget_failures: config.disable_dns_refresh_on_failure,
            ttl: time("host_ttl", config.host_ttl.as_ref(), HOST_TTL)?,
            max_hosts: most as usize,
            max_pending: pending.map_or(MOST, |most| most.value).into(),
            // Without a limit Envoy waits as long as its resolver does, and so do we.
            timeout: optional_duration("dns_query_timeout", config.dns_query_timeout.as_ref())?
                .filter(|time| !time.is_zero())
                .unwrap_or(QUERY_TIMEOUT),
        })
    }
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        Stats {
            attempt: scope.counter("dns_query_attempt"),
            success: scope.counter("dns_query_success"),
            failure: scope.counter("dns_query_failure"),
            timeout: scope.counter("dns_query_timeout"),
            added: scope.counter("host_added"),
            removed: scope.counter("host_removed"),
            changed: scope.counter("host_address_changed"),
            overflow: scope.counter("host_overflow"),
            pending_overflow: scope.counter("dns_rq_pending_overflow"),
            hosts: scope.gauge("num_hosts"),
        }
    }
}

impl DnsCache {
    /// Makes `cluster` count the hosts.
    pub(super) fn serve(&self, cluster: &Arc<Cluster>) {
        let mut users = self.users();
        users.retain(|user| user.strong_count() > 0);
        users.push(Arc::downgrade(cluster));
        drop(users);
        self.count_hosts();
    }

    /// Waits until it is known where a host (with its port) is.
    ///
    /// # Errors
    /// It cannot be known, or nowhere.
    pub(crate) async fn load(self: &Arc<Self>, host: &str) -> Result<(), Unresolved> {
        /// Counts a request that waits.
        struct Waiting<'a>(&'a AtomicU64);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Relaxed);
            }
        }
        let before = self.pending.fetch_add(1, Relaxed);
        let _waiting = Waiting(&self.pending);
        if before >= self.settings.max_pending {
            self.stats.pending_overflow.inc();
            return Err(Unresolved::Pending);
        }
        let entry = self.entry(host).ok_or(Unresolved::Overflow)?;
        let mut known = entry.known.subscribe();
        // It ends with the entry only after the last look-up, which told.
        let _ended = known.wait_for(|known| *known).await;
        match entry.found.load().as_deref() {
            Some(Ok(_)) => Ok(()),
            Some(Err(reason)) => Err(Unresolved::Failed(reason)),
            None => Err(Unresolved::Failed("not_started")),
        }
    }

    /// Where a host is, if that is known.
    pub(crate) fn address(&self, host: &str) -> Option<SocketAddr> {
        let entries = self.entries.load();
        let entry = entries.get(host)?;
        entry.touch(self);
        entry.found.load().as_deref().and_then(|found| found.ok())
    }

    /// The entry of a host, made if need be; `None` if there are too many.
    fn entry(self: &Arc<Self>, host: &str) -> Option<Arc<Entry>> {
        if let Some(present) = self.entries.load().get(host) {
            present.touch(self);
            return Some(present.clone());
        }
        // Serialises those who add and remove.
        let _users = self.users();
        let present = self.entries.load();
        if let Some(present) = present.get(host) {
            return Some(present.clone());
        }
        if present.len() >= self.settings.max_hosts {
            self.stats.overflow.inc();
            return None;
        }
        let name: Arc<str> = host.into();
        let entry = Arc::new(Entry {
            found: ArcSwapOption::empty(),
            known: watch::Sender::new(false),
            used: AtomicU64::new(0),
        });
        entry.touch(self);
        let mut all = HashMap::clone(&present);
        all.insert(name.clone(), entry.clone());
        self.stats.added.inc();
        self.stats.hosts.set(all.len() as u64);
        self.entries.store(Arc::new(all));
        let cache = Arc::downgrade(self);
        self.runtime.spawn(follow(cache, name, entry.clone()));
        Some(entry)
    }

    fn forget(&self, host: &str) {
        let users = self.users();
        let mut all = HashMap::clone(&self.entries.load());
        all.remove(host);
        self.stats.removed.inc();
        self.stats.hosts.set(all.len() as u64);
        self.entries.store(Arc::new(all));
        drop(users);
        self.count_hosts();
    }

    /// Takes what a look-up gave. The last good address stays if it gave none.
    fn found(&self, entry: &Entry, found: Found) {
        let before = entry.found.load();
        let address = |found: Option<&Found>| found.and_then(|found| found.ok());
        match (address(before.as_deref()), found) {
            (Some(_), Err(_)) => {}
            (present, found) => {
                let now = found.ok();
                if now.is_some() && now != present {
                    self.stats.changed.inc();
                }
                entry.found.store(Some(Arc::new(found)));
                if present.is_none() && now.is_some() {
                    self.count_hosts();
                }
            }
        }
        entry.known.send_replace(true);
    }

    /// Tells the clusters how many hosts there are.
    fn count_hosts(&self) {
        let users = self.users();
        let entries = self.entries.load();
        let hosts = entries
            .values()
            .filter(|entry| matches!(entry.found.load().as_deref(), Some(Ok(_))))
            .count() as u64;
        for cluster in users.iter().filter_map(Weak::upgrade) {
            if cluster.stats.membership_total.value() != hosts {
                cluster.stats.membership_change.inc();
            }
            cluster.stats.membership_total.set(hosts);
            cluster.stats.membership_healthy.set(hosts);
        }
    }

    fn users(&self) -> MutexGuard<'_, Vec<Weak<Cluster>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn age(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl fmt::Debug for DnsCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.entries.load().len();
        write!(f, "DnsCache({}, {hosts} hosts)", self.config.name)
    }
}

impl Entry {
    fn touch(&self, cache: &DnsCache) {
        self.used.store(cache.age(), Relaxed);
    }
}

/// Resolves a host again and again, until nobody has asked for it for long or the cache is gone.
async fn follow(cache: Weak<DnsCache>, host: Arc<str>, entry: Arc<Entry>) {
    loop {
        let Some(present) = cache.upgrade() else {
            return;
        };
        present.stats.attempt.inc();
        let (family, wait) = (present.settings.dns.family, present.settings.timeout);
        drop(present);
        let looked_up = tokio::time::timeout(wait, look_up(&host)).await;
        let Some(present) = cache.upgrade() else {
            return;
        };
        let stats = &present.stats;
        let found = match looked_up {
            Err(_) => {
                stats.timeout.inc();
                Err("resolve_timeout")
            }
            Ok(Ok(addresses)) => {
                stats.success.inc();
                // An address that was given as such needs no family.
                let given = addresses
                    .first()
                    .copied()
                    .filter(|_| literal(&host).is_some());
                let chosen = given.or_else(|| choose(addresses, family).first().copied());
                chosen.ok_or("cares_norecords:Domain_name_not_found")
            }
            Ok(Err(error)) if is_unknown(&error) => {
                stats.success.inc();
                Err("cares_norecords:Domain_name_not_found")
            }
            Ok(Err(error)) => {
                tracing::debug!(host = &*host, %error, "name does not resolve");
                stats.failure.inc();
                Err("cares_failure:DNS_server_returned_general_failure")
            }
        };
        present.found(&entry, found);
        let settings = &present.settings;
        if found.is_err() && settings.forget_failures {
            present.forget(&host);
            return;
        }
        let pause = match found {
            Ok(_) => settings.dns.refresh,
            Err(_) => settings.refresh_after_failure,
        };
        let ttl = u64::try_from(settings.ttl.as_millis()).unwrap_or(u64::MAX);
        drop(present);
        tokio::time::sleep(pause).await;
        let Some(present) = cache.upgrade() else {
            return;
        };
        if present.age().saturating_sub(entry.used.load(Relaxed)) > ttl {
            present.forget(&host);
            return;
        }
    }
}

/// Name and port.
fn split(host: &str) -> Option<(&str, u16)> {
    let (name, port) = host.rsplit_once(':')?;
    Some((name, port.parse().ok()?))
}

/// The address that a host is already.
fn literal(host: &str) -> Option<SocketAddr> {
    let (name, port) = split(host)?;
    let name = name
        .strip_prefix('[')
        .and_then(|n| n.strip_suffix(']'))
        .unwrap_or(name);
    let ip: IpAddr = name.parse().ok()?;
    Some(SocketAddr::new(ip, port))
}

async fn look_up(host: &str) -> io::Result<Vec<SocketAddr>> {
    if let Some(address) = literal(host) {
        return Ok(vec![address]);
    }
    let (name, port) = split(host).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(tokio::net::lookup_host((name, port)).await?.collect())
}

/// Whether the resolver says that there is no such name, and not that it could not tell.
fn is_unknown(error: &io::Error) -> bool {
    // The system's code does not come through, only its words.
    let text = error.to_string();
    text.contains("not known") || text.contains("No address associated")
}

/// A request's authority with the port that it means.
pub(crate) fn with_port(authority: &[u8], secure: bool) -> Option<String> {
    let text = std::str::from_utf8(authority)
        .ok()
        .filter(|text| !text.is_empty())?;
    let has_port = crate::route::without_port(authority).len() < authority.len();
    Some(match (has_port, secure) {
        (true, _) => text.to_owned(),
        (false, true) => format!("{text}:443"),
        (false, false) => format!("{text}:80"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Proxy;

    fn cache(proxy: &Proxy, yaml: &str) -> Result<Arc<DnsCache>, ConfigError> {
        let config: DnsCacheConfig = lateen_protocols::json::from_yaml(yaml).unwrap();
        proxy.shared.clusters.dns_cache(&config, &proxy.shared)
    }

    #[test]
    fn ports_are_those_that_are_meant() {
        for (authority, secure, want) in [
            ("a", false, Some("a:80")),
            ("a", true, Some("a:443")),
            ("a:81", true, Some("a:81")),
            ("[::1]", false, Some("[::1]:80")),
            ("[::1]:81", false, Some("[::1]:81")),
            ("", false, None),
        ] {
            assert_eq!(with_port(authority.as_bytes(), secure).as_deref(), want);
        }
        assert_eq!(literal("[::1]:81"), Some("[::1]:81".parse().unwrap()));
        assert_eq!(literal("1.2.3.4:5"), Some("1.2.3.4:5".parse().unwrap()));
        assert_eq!(literal("localhost:5"), None);
    }

    #[tokio::test]
    async fn names_are_resolved_once_and_bounded() {
        let proxy = Proxy::start();
        let yaml = "{name: d, max_hosts: 2, dns_lookup_family: V4_ONLY}";
        let dns = cache(&proxy, yaml).unwrap();
        assert!(Arc::ptr_eq(&dns, &cache(&proxy, yaml).unwrap()));
        assert!(cache(&proxy, "{name: d}").is_err(), "other settings");
        assert_eq!(dns.address("localhost:81"), None);
        assert_eq!(dns.load("localhost:81").await, Ok(()));
        assert_eq!(dns.load("localhost:81").await, Ok(()));
        assert_eq!(
            dns.address("localhost:81"),
            Some("127.0.0.1:81".parse().unwrap())
        );
        assert_eq!(dns.load("[::1]:82").await, Ok(()));
        assert_eq!(dns.load("c:83").await, Err(Unresolved::Overflow));
        proxy.wait_for("dns_cache.d.dns_query_attempt", 2).await;
        proxy.wait_for("dns_cache.d.num_hosts", 2).await;
        proxy.wait_for("dns_cache.d.host_overflow", 1).await;
    }

    #[tokio::test]
    async fn names_that_nobody_asks_for_are_forgotten() {
        let proxy = Proxy::start();
        let yaml =
            "{name: t, host_ttl: 0.01s, dns_refresh_rate: 0.02s, dns_min_refresh_rate: 0.02s}";
        let dns = cache(&proxy, yaml).unwrap();
        assert_eq!(dns.load("127.0.0.1:81").await, Ok(()));
        proxy.wait_for("dns_cache.t.host_removed", 1).await;
        assert_eq!(dns.address("127.0.0.1:81"), None);
    }

    #[tokio::test]
    async fn too_many_may_not_wait() {
        let proxy = Proxy::start();
        let yaml = "{name: p, dns_cache_circuit_breaker: {max_pending_requests: 0}}";
        let dns = cache(&proxy, yaml).unwrap();
        assert_eq!(dns.load("127.0.0.1:81").await, Err(Unresolved::Pending));
        for bad in [
            "{}",
            "{name: x, max_hosts: 0}",
            "{name: x, use_tcp_for_dns_lookups: true}",
        ] {
            assert!(cache(&proxy, bad).is_err(), "{bad}");
        }
    }
}
