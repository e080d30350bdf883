//! Hosts: what discovery says of an endpoint, and what we remember of it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use lateen_protocols::envoy::{
    envoy::config::{
        cluster::v3::Cluster as Proto,
        core::v3::{self as core, HealthStatus},
        endpoint::v3::{self as endpoint, ClusterLoadAssignment, lb_endpoint::HostIdentifier},
    },
    google::protobuf as pb,
};

use tokio::time::Instant;

use super::transport::Transports;
use crate::{clock, config_error::ConfigError, outlier::Monitor, proto::invalid};

/// Where a host listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Ip(SocketAddr),
    /// A unix socket.
    Pipe(Arc<str>),
}

impl Address {
    /// The TCP address; for a unix socket the unspecified one, as there is none to show.
    pub fn socket(&self) -> Option<SocketAddr> {
        match self {
            Address::Ip(address) => Some(*address),
            Address::Pipe(_) => None,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ip(address) => address.fmt(f),
            Address::Pipe(path) => f.write_str(path),
        }
    }
}

/// Region, zone and sub-zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Sub-zone.
    pub sub_zone: String,
}

/// Whether a host may be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Healthy,
    /// When there are not enough healthy ones.
    Degraded,
    /// Only in panic.
    Unhealthy,
}

/// Which hosts a filter may insist on. Envoy: `override_host_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverrideHealth {
    healthy: bool,
    degraded: bool,
    unhealthy: bool,
}

impl OverrideHealth {
    pub(super) fn read(proto: &Proto) -> OverrideHealth {
        let common = proto.common_lb_config.as_ref();
        match common.and_then(|common| common.override_host_status.as_ref()) {
            None => OverrideHealth {
                healthy: true,
                degraded: true,
                unhealthy: false,
            },
            Some(set) => {
                let has = |status: &[HealthStatus]| set.statuses().any(|s| status.contains(&s));
                OverrideHealth {
                    healthy: has(&[HealthStatus::Unknown, HealthStatus::Healthy]),
                    degraded: has(&[HealthStatus::Degraded]),
                    unhealthy: has(&[
                        HealthStatus::Unhealthy,
                        HealthStatus::Draining,
                        HealthStatus::Timeout,
                    ]),
                }
            }
        }
    }

    /// Whether a host of this health may be insisted on.
    pub fn allows(self, health: Health) -> bool {
        match health {
            Health::Healthy => self.healthy,
            Health::Degraded => self.degraded,
            Health::Unhealthy => self.unhealthy,
        }
    }
}

/// What is remembered of an address while it is in the cluster, whatever else changes about it.
#[derive(Debug, Default)]
pub struct HostState {
    /// Outlier detection.
    pub monitor: Monitor,
    active: AtomicU32,
    /// What each active health check found last, four bits each; 0 when there is none.
    checked: AtomicU64,
    /// In [`milliseconds`], when it came into service; 0 when it is not.
    in_service: AtomicU64,
    /// Numbers for `/clusters`.
    pub numbers: Numbers,
}

/// Counters of one host, shown by `/clusters` under these names.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "Envoy's names")]
pub struct Numbers {
    pub cx_active: AtomicU64,
    pub cx_total: AtomicU64,
    pub cx_connect_fail: AtomicU64,
    pub rq_total: AtomicU64,
    pub rq_success: AtomicU64,
    pub rq_error: AtomicU64,
    pub rq_timeout: AtomicU64,
}

/// What an active health check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActiveHealth {
    /// The host is well.
    Passed,
    /// It serves, but not as well as it should.
    Degraded,
    /// It is not well, or was not asked yet.
    Failed,
}

/// Active health checks one cluster may have: four bits each in [`HostState`].
pub(super) const MAX_CHECKS: usize = 16;
const PENDING: u64 = 1;

impl HostState {
    /// The worst that the active health checks found; `None` without any.
    pub fn active_health(&self) -> Option<ActiveHealth> {
        let found = self.checked.load(Relaxed);
        (0..MAX_CHECKS)
            .filter_map(|check| match (found >> (4 * check)) & 15 {
                0 => None,
                2 => Some(ActiveHealth::Passed),
                3 => Some(ActiveHealth::Degraded),
                _ => Some(ActiveHealth::Failed),
            })
            .max_by_key(|health| *health as u8)
    }

    /// Whether some active health check has not answered yet.
    pub fn is_pending(&self) -> bool {
        let found = self.checked.load(Relaxed);
        (0..MAX_CHECKS).any(|check| (found >> (4 * check)) & 15 == PENDING)
    }

    /// Holds the host back until as many checks as there are have answered. Nothing for a host that is
    /// being checked already.
    pub(super) fn await_checks(&self, checks: usize) {
        let pending =
            (0..checks.min(MAX_CHECKS)).fold(0, |all, check| all | PENDING << (4 * check));
        // Fails when it is checked already: then that stays.
        let _present = self.checked.compare_exchange(0, pending, Relaxed, Relaxed);
    }

    pub(super) fn set_active_health(&self, check: usize, health: ActiveHealth) {
        let code = match health {
            ActiveHealth::Passed => 2,
            ActiveHealth::Degraded => 3,
            ActiveHealth::Failed => 4,
        };
        let shift = 4 * check;
        // Only the check's own task changes its bits, but the others' may change meanwhile.
        let change = |found: u64| Some(found & !(15 << shift) | code << shift);
        let _previous = self.checked.fetch_update(Relaxed, Relaxed, change);
    }

    /// How long discovery and the active health checks have let it serve; `None` while they do not, or nobody
    /// has looked yet. Ejections do not count, as in Envoy.
    pub fn in_service_for(&self) -> Option<Duration> {
        let since = self.in_service.load(Relaxed);
        let now = milliseconds(clock::now());
        (since > 0).then(|| Duration::from_millis(now.saturating_sub(since)))
    }

    pub(crate) fn note_service(&self, serves: bool, now: Instant) {
        if !serves {
            self.in_service.store(0, Relaxed);
        } else if self.in_service.load(Relaxed) == 0 {
            self.in_service.store(milliseconds(now), Relaxed);
        }
    }

    /// Requests under way, over all workers.
    pub fn active_requests(&self) -> u32 {
        self.active.load(Relaxed)
    }

    pub(crate) fn request_began(&self) {
        self.active.fetch_add(1, Relaxed);
        self.numbers.rq_total.fetch_add(1, Relaxed);
    }

    pub(crate) fn request_ended(&self) {
        self.active.fetch_sub(1, Relaxed);
    }
}

/// Milliseconds since this was first asked, at least 1.
fn milliseconds(at: Instant) -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(|| at);
    let passed = at.saturating_duration_since(first).as_millis();
    u64::try_from(passed).unwrap_or(u64::MAX).saturating_add(1)
}

/// One endpoint as the balancer sees it.
#[derive(Debug)]
pub struct Host {
    /// Where it listens.
    pub address: Address,
    /// Its name, if it was found by one or discovery gave one.
    pub hostname: Option<Arc<str>>,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// 0 is preferred.
    pub priority: u32,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// Weight of its locality; 0 when none was given.
    pub locality_weight: u32,
    /// `envoy.lb` metadata, for subsets.
    pub labels: BTreeMap<String, pb::Value>,
    /// All that discovery says of it, by the name of who is to read it; none where there is nothing.
    pub metadata: Option<Arc<HashMap<String, pb::Struct>>>,
    /// `envoy.lb` / `hash_key`.
    pub hash_key: Option<Arc<str>>,
    /// Which of the cluster's transport sockets it wants.
    pub transport: usize,
    /// What discovery says of its health.
    pub reported: Health,
    /// What is remembered of it.
    pub state: Arc<HostState>,
}

impl Host {
    /// Discovery's word, that of the active health checks and outlier detection's together: the worst.
    pub fn health(&self) -> Health {
        if self.state.monitor.is_ejected() || self.reported == Health::Unhealthy {
            return Health::Unhealthy;
        }
        match self.state.active_health() {
            Some(ActiveHealth::Failed) => Health::Unhealthy,
            Some(ActiveHealth::Degraded) => Health::Degraded,
            Some(ActiveHealth::Passed) | None => self.reported,
        }
    }

    /// Whether discovery and the active health checks let it serve, ejected or not.
    pub(super) fn serves(&self) -> bool {
        self.reported == Health::Healthy
            && matches!(
                self.state.active_health(),
                Some(ActiveHealth::Passed) | None
            )
    }

    /// A host known by its address only.
    pub(crate) fn bare(address: SocketAddr) -> Host {
        Host {
            address: Address::Ip(address),
            hostname: None,
            weight: 1,
            priority: 0,
            locality: Arc::default(),
            metadata: None,
            locality_weight: 0,
            labels: BTreeMap::new(),
            hash_key: None,
            transport: Transports::DEFAULT,
            reported: Health::Healthy,
            state: Arc::default(),
        }
    }
}

/// The hosts of a cluster at one moment; never changed, replaced whole.
#[derive(Debug)]
pub struct HostSet {
    /// In the order discovery gave them.
    pub hosts: Vec<Arc<Host>>,
    /// How much more than its share a level takes before the next one helps, in percent. Envoy: 140.
    pub overprovisioning: u32,
    /// Differs between any two sets of a cluster.
    pub version: u64,
}

impl Default for HostSet {
    fn default() -> HostSet {
        HostSet {
            hosts: Vec::new(),
            overprovisioning: 140,
            version: 0,
        }
    }
}

impl HostSet {
    /// The monitors of all hosts.
    pub(crate) fn monitors(&self) -> Vec<&Monitor> {
        self.hosts.iter().map(|host| &host.state.monitor).collect()
    }
}

/// An endpoint as configured: the address may still be a name.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    pub(super) target: SpecTarget,
    hostname: Option<Arc<str>>,
    weight: u32,
    priority: u32,
    locality: Arc<Locality>,
    locality_weight: u32,
    labels: BTreeMap<String, pb::Value>,
    metadata: Option<Arc<HashMap<String, pb::Struct>>>,
    transport: usize,
    reported: Health,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum SpecTarget {
    Address(Address),
    Name(Arc<str>, u16),
}

/// Endpoints of an assignment, read.
#[derive(Clone, Debug, Default)]
pub(super) struct Assignment {
    pub(super) specs: Vec<Spec>,
    overprovisioning: Option<u32>,
}

impl Assignment {
    pub(super) fn read(
        proto: &ClusterLoadAssignment,
        transports: &Transports,
        names_allowed: bool,
    ) -> Result<Assignment, ConfigError> {
        let mut specs = Vec::new();
        for group in &proto.endpoints {
            if group.lb_config.is_some() {
                return Err(invalid("endpoints.lb_config", "not supported"));
            }
            let locality = group
                .locality
                .as_ref()
                .map_or_else(Locality::default, |l| Locality {
                    region: l.region.clone(),
                    zone: l.zone.clone(),
                    sub_zone: l.sub_zone.clone(),
                });
            let locality = shared(locality);
            let locality_weight = group.load_balancing_weight.as_ref().map_or(0, |w| w.value);
            for endpoint in &group.lb_endpoints {
                let Some(HostIdentifier::Endpoint(at)) = endpoint.host_identifier.as_ref() else {
                    return Err(invalid("lb_endpoints.endpoint_name", "not supported"));
                };
                specs.push(Spec {
                    target: target(at, names_allowed)
                        .map_err(|error| error.within("endpoint.address"))?,
                    hostname: Some(at.hostname.as_str())
                        .filter(|name| !name.is_empty())
                        .map(Arc::from),
                    weight: endpoint
                        .load_balancing_weight
                        .as_ref()
                        .map_or(1, |w| w.value.max(1)),
                    priority: priority(group)?,
                    locality: locality.clone(),
                    locality_weight,
                    labels: labels(endpoint.metadata.as_ref()),
                    metadata: endpoint
                        .metadata
                        .as_ref()
                        .filter(|metadata| !metadata.filter_metadata.is_empty())
                        .map(|metadata| Arc::new(metadata.filter_metadata.clone())),
                    transport: transports
                        .matching(endpoint.metadata.as_ref(), group.metadata.as_ref()),
                    reported: reported(endpoint.health_status()),
                });
            }
        }
        let policy = proto.policy.as_ref();
        if policy.is_some_and(|policy| !policy.drop_overloads.is_empty()) {
            return Err(invalid("policy.drop_overloads", "not supported"));
        }
        Ok(Assignment {
            specs,
            overprovisioning: policy
                .and_then(|policy| policy.overprovisioning_factor.as_ref())
                .map(|factor| factor.value),
        })
    }

    /// Hosts for the endpoints. `resolved` gives the addresses of those with names. Hosts at addresses
    /// that `previous` knows keep what is remembered of them.
    pub(super) fn hosts(
        &self,
        previous: &HostSet,
        version: u64,
        resolved: impl Fn(&SpecTarget) -> Vec<SocketAddr>,
    ) -> HostSet {
        let mut states: HashMap<Address, Arc<HostState>> = previous
            .hosts
            .iter()
            .map(|host| (host.address.clone(), host.state.clone()))
            .collect();
        let mut hosts = Vec::with_capacity(self.specs.len());
        for spec in &self.specs {
            let addresses = match &spec.target {
                SpecTarget::Address(address) => vec![address.clone()],
                name => resolved(name).into_iter().map(Address::Ip).collect(),
            };
            let by_name = match &spec.target {
                SpecTarget::Name(name, _) => Some(name.clone()),
                SpecTarget::Address(_) => None,
            };
            for address in addresses {
                let state = states.entry(address.clone()).or_default().clone();
                hosts.push(Arc::new(Host {
                    address,
                    hostname: spec.hostname.clone().or(by_name.clone()),
                    weight: spec.weight,
                    priority: spec.priority,
                    locality: spec.locality.clone(),
                    locality_weight: spec.locality_weight,
                    hash_key: spec
                        .labels
                        .get("hash_key")
                        .and_then(|value| match &value.kind {
                            Some(pb::value::Kind::StringValue(text)) => Some(text.as_str().into()),
                            _ => None,
                        }),
                    labels: spec.labels.clone(),
                    metadata: spec.metadata.clone(),
                    transport: spec.transport,
                    reported: spec.reported,
                    state,
                }));
            }
        }
        HostSet {
            hosts,
            overprovisioning: self.overprovisioning.unwrap_or(140),
            version,
        }
    }
}

/// Most endpoints have no locality, or that of the one before.
fn shared(locality: Locality) -> Arc<Locality> {
    static LAST: Mutex<Option<Arc<Locality>>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match &*last {
        Some(last) if **last == locality => last.clone(),
        _ => last.insert(Arc::new(locality)).clone(),
    }
}

/// Envoy: priorities are 0 to 128.
fn priority(group: &endpoint::LocalityLbEndpoints) -> Result<u32, ConfigError> {
    if group.priority > 128 {
        return Err(invalid("endpoints.priority", "is greater than 128"));
    }
    Ok(group.priority)
}

fn labels(metadata: Option<&core::Metadata>) -> BTreeMap<String, pb::Value> {
    metadata
        .and_then(|metadata| metadata.filter_metadata.get("envoy.lb"))
        .map(|labels| {
            labels
                .fields
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect()
        })
        .unwrap_or_default()
}

fn reported(status: HealthStatus) -> Health {
    match status {
        HealthStatus::Unknown | HealthStatus::Healthy => Health::Healthy,
        HealthStatus::Degraded => Health::Degraded,
        HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout => {
            Health::Unhealthy
        }
    }
}

fn target(endpoint: &endpoint::Endpoint, names_allowed: bool) -> Result<SpecTarget, ConfigError> {
    use core::{address::Address as Kind, socket_address::PortSpecifier};
    let address = endpoint
        .address
        .as_ref()
        .and_then(|address| address.address.as_ref());
    match address {
        Some(Kind::SocketAddress(socket)) => {
            let port = match socket.port_specifier {
                Some(PortSpecifier::PortValue(port)) => u16::try_from(port)
                    .map_err(|_| invalid("port_value", "is greater than 65535"))?,
                _ => return Err(invalid("port_value", "is required")),
            };
            match socket.address.parse::<IpAddr>() {
                Ok(ip) => Ok(SpecTarget::Address(Address::Ip(SocketAddr::new(ip, port)))),
                Err(_) if names_allowed && !socket.address.is_empty() => {
                    Ok(SpecTarget::Name(socket.address.as_str().into(), port))
                }
                Err(_) => Err(invalid(
                    "address",
                    format!(
                        "'{}' is not an IP address; names need a DNS cluster",
                        socket.address
                    ),
                )),
            }
        }
        Some(Kind::Pipe(pipe)) => Ok(SpecTarget::Address(Address::Pipe(
            pipe.path.as_str().into(),
        ))),
        Some(Kind::EnvoyInternalAddress(_)) => {
            Err(invalid("envoy_internal_address", "not supported"))
        }
        None => Err(invalid("address", "is required")),
    }
}
