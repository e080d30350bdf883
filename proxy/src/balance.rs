//! Picking a host: priorities, panic, localities, and the policies themselves. Envoy's rules.
//!
//! A [`Balancer`] belongs to one worker and one subset of a cluster's hosts, and is built anew when
//! the hosts or their health change: picking then looks at no shared state but the hosts' own counters.

mod edf;
mod hash;

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use self::edf::Edf;
pub use self::hash::xxh64;
use crate::cluster::{Health, Host, HostSet, Locality};

/// How a cluster picks among its hosts.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Below this percentage of healthy hosts, health is disregarded.
    pub panic_threshold: f64,
    /// Rather fail than disregard health.
    pub fail_on_panic: bool,
    /// Spread over localities by their weights first.
    pub locality_weighted: bool,
    /// Hash host names instead of addresses.
    pub hash_hostnames: bool,
    /// New hosts get their share little by little.
    pub slow_start: Option<SlowStart>,
}

/// How the weight of a host grows after it came into service. Envoy: `slow_start_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowStart {
    /// How long that takes.
    pub window: Duration,
    /// 1: in step with time; above: faster at first.
    pub aggression: f64,
    /// The least share of its weight, from 0 to 1.
    pub least: f64,
}

impl SlowStart {
    /// The share of its weight that a host has now. Envoy: `applySlowStartFactor`.
    fn share(&self, host: &Host) -> f64 {
        let Some(age) = host.state.in_service_for() else {
            return 1.0;
        };
        if age >= self.window {
            return 1.0;
        }
        let time = age.as_secs_f64().max(0.001) / self.window.as_secs_f64();
        time.powf(1.0 / self.aggression).max(self.least)
    }
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            algorithm: Algorithm::RoundRobin,
            panic_threshold: 50.0,
            fail_on_panic: false,
            locality_weighted: false,
            hash_hostnames: false,
            slow_start: None,
        }
    }
}

/// The algorithm of a [`Policy`].
#[derive(Clone, Debug, PartialEq)]
pub enum Algorithm {
    /// In turn, by weight.
    RoundRobin,
    /// The least busy of some.
    LeastRequest {
        /// How many are compared.
        choices: u32,
        /// How much activity lowers the weight of a host when weights differ.
        bias: f64,
    },
    /// Any.
    Random,
    /// By hash on a ring.
    RingHash {
        /// Least number of entries.
        min_size: u64,
        /// Largest number of entries.
        max_size: u64,
    },
    /// By hash in a table.
    Maglev {
        /// Entries; a prime number.
        table_size: u64,
    },
}

impl Algorithm {
    /// Whether the same hash leads to the same host.
    fn is_hashing(&self) -> bool {
        match self {
            Algorithm::RingHash { .. } | Algorithm::Maglev { .. } => true,
            Algorithm::RoundRobin | Algorithm::LeastRequest { .. } | Algorithm::Random => false,
        }
    }
}

/// Picks hosts.
#[derive(Debug)]
pub struct Balancer {
    levels: Vec<Level>,
    /// Percentages of the traffic that go to the healthy and to the degraded hosts of each level.
    loads: Loads,
    fail_on_panic: bool,
    panicked: bool,
    rng: SmallRng,
}

#[derive(Debug, Default)]
struct Loads {
    healthy: Vec<u32>,
    degraded: Vec<u32>,
    panic: Vec<bool>,
}

/// The hosts of one priority.
#[derive(Debug)]
struct Level {
    all: Group,
    healthy: Group,
    degraded: Group,
}

/// Hosts of one level that are alike in health.
#[derive(Debug)]
struct Group {
    /// Chooses among `lists` when localities are weighted.
    localities: Option<Edf>,
    locality_weights: Vec<f64>,
    lists: Vec<List>,
}

#[derive(Debug)]
struct List {
    hosts: Vec<Arc<Host>>,
    picker: Picker,
    /// While some host has not its full weight yet.
    slow_start: Option<SlowStart>,
}

#[derive(Debug)]
enum Picker {
    RoundRobin(usize),
    Weighted(Edf),
    LeastRequest(u32),
    WeightedLeastRequest(Edf, f64),
    Random,
    Ring(Vec<(u64, u32)>),
    Table(Vec<u32>),
}

impl Balancer {
    /// A balancer over the hosts for which `keep` holds. `seed` decides where it begins.
    pub fn new(
        policy: &Policy,
        set: &HostSet,
        keep: impl Fn(&Host) -> bool,
        seed: u64,
    ) -> Balancer {
        let mut rng = SmallRng::seed_from_u64(seed);
        let hosts: Vec<&Arc<Host>> = set.hosts.iter().filter(|host| keep(host)).collect();
        let levels = hosts
            .iter()
            .map(|host| host.priority as usize + 1)
            .max()
            .unwrap_or(0);
        let mut counts = Vec::with_capacity(levels);
        let levels: Vec<Level> = (0..levels)
            .map(|priority| {
                let of = |wanted: Option<Health>| -> Vec<Arc<Host>> {
                    hosts
                        .iter()
                        .filter(|host| host.priority as usize == priority)
                        .filter(|host| wanted.is_none_or(|health| host.health() == health))
                        .map(|host| (*host).clone())
                        .collect()
                };
                let (all, healthy, degraded) = (
                    of(None),
                    of(Some(Health::Healthy)),
                    of(Some(Health::Degraded)),
                );
                counts.push((all.len(), healthy.len(), degraded.len()));
                let overprovisioning = set.overprovisioning;
                Level {
                    healthy: Group::new(policy, healthy, Some((&all, overprovisioning)), &mut rng),
                    degraded: Group::new(
                        policy,
                        degraded,
                        Some((&all, overprovisioning)),
                        &mut rng,
                    ),
                    all: Group::new(policy, all, None, &mut rng),
                }
            })
            .collect();
        Balancer {
            levels,
            loads: Loads::new(&counts, set.overprovisioning, policy.panic_threshold),
            fail_on_panic: policy.fail_on_panic,
            panicked: false,
            rng,
        }
    }

    /// The next host. `hash` is used by the consistent-hash algorithms (absent: random). Priorities for
    /// which `avoid` holds are passed over if others have hosts in service.
    pub fn pick(&mut self, hash: Option<u64>, avoid: impl Fn(u32) -> bool) -> Option<Arc<Host>> {
        self.panicked = false;
        let value = hash.unwrap_or_else(|| self.rng.random());
        let (mut level, mut degraded) = self.loads.choose(value)?;
        if avoid(u32::try_from(level).unwrap_or(u32::MAX))
            && let Some(other) = (0..self.levels.len()).find(|index| {
                !avoid(u32::try_from(*index).unwrap_or(u32::MAX))
                    && !self.levels[*index].healthy.is_empty()
            })
        {
            (level, degraded) = (other, false);
        }
        let panic = self.loads.panic.get(level).copied().unwrap_or(false);
        self.panicked = panic;
        let chosen = self.levels.get_mut(level)?;
        let group = match (panic, degraded) {
            (true, _) if self.fail_on_panic => return None,
            (true, _) => &mut chosen.all,
            (false, true) => &mut chosen.degraded,
            (false, false) => &mut chosen.healthy,
        };
        group.pick(value, &mut self.rng)
    }

    /// Whether the last pick had to disregard health.
    pub fn panicked(&self) -> bool {
        self.panicked
    }

    /// Whether any host may be picked.
    pub fn is_empty(&self) -> bool {
        self.loads
            .healthy
            .iter()
            .chain(&self.loads.degraded)
            .all(|load| *load == 0)
    }
}

impl Loads {
    /// `counts` are all, healthy and degraded hosts of each level. Envoy: "priority levels".
    fn new(counts: &[(usize, usize, usize)], overprovisioning: u32, panic_threshold: f64) -> Loads {
        let share = |part: usize, all: usize| -> u32 {
            let percent = part as u64 * u64::from(overprovisioning) / (all as u64).max(1);
            u32::try_from(percent.min(100)).unwrap_or(100)
        };
        let healthy: Vec<u32> = counts
            .iter()
            .map(|(all, healthy, _)| share(*healthy, *all))
            .collect();
        let degraded: Vec<u32> = counts
            .iter()
            .map(|(all, _, degraded)| share(*degraded, *all))
            .collect();
        let total = healthy.iter().chain(&degraded).sum::<u32>().min(100);
        let panic: Vec<bool> = counts
            .iter()
            .map(|(all, healthy, degraded)| {
                #[allow(clippy::cast_precision_loss, reason = "a number of hosts")]
                let percent = 100.0 * (healthy + degraded) as f64 / (*all).max(1) as f64;
                total < 100 && *all > 0 && percent < panic_threshold
            })
            .collect();
        if total == 0 {
            return Loads::in_total_panic(counts, panic);
        }
        let mut left = 100;
        let mut spread = |available: &[u32]| -> Vec<u32> {
            available
                .iter()
                .map(|part| {
                    let load = (part * 100 / total).min(left);
                    left -= load;
                    load
                })
                .collect()
        };
        let mut loads = Loads {
            healthy: spread(&healthy),
            degraded: spread(&degraded),
            panic,
        };
        // What rounding left goes to the first that has any.
        let Loads {
            healthy, degraded, ..
        } = &mut loads;
        if let Some(first) = healthy.iter_mut().chain(degraded).find(|load| **load > 0) {
            *first += left;
        }
        loads
    }

    /// No level has a host in service: those in panic share by their numbers of hosts.
    fn in_total_panic(counts: &[(usize, usize, usize)], panic: Vec<bool>) -> Loads {
        let hosts: usize = counts
            .iter()
            .zip(&panic)
            .filter(|(_, p)| **p)
            .map(|((all, ..), _)| all)
            .sum();
        let mut left = if hosts == 0 { 0 } else { 100 };
        let mut healthy: Vec<u32> = counts
            .iter()
            .zip(&panic)
            .map(|((all, ..), panic)| {
                let load = if *panic {
                    u32::try_from(all * 100 / hosts.max(1)).unwrap_or(0)
                } else {
                    0
                };
                left -= load;
                load
            })
            .collect();
        if let Some(first) = healthy.iter_mut().find(|load| **load > 0) {
            *first += left;
        }
        Loads {
            degraded: vec![0; counts.len()],
            healthy,
            panic,
        }
    }

    fn choose(&self, value: u64) -> Option<(usize, bool)> {
        let point = u32::try_from(value % 100).unwrap_or(0) + 1;
        let mut sum = 0;
        let both = self
            .healthy
            .iter()
            .map(|load| (*load, false))
            .enumerate()
            .chain(self.degraded.iter().map(|load| (*load, true)).enumerate());
        for (level, (load, degraded)) in both {
            sum += load;
            if point <= sum {
                return Some((level, degraded));
            }
        }
        None
    }
}

impl Group {
    /// `whole` are all hosts of the level and the overprovisioning factor: a locality that lost hosts
    /// gives up weight only beyond that factor.
    fn new(
        policy: &Policy,
        hosts: Vec<Arc<Host>>,
        whole: Option<(&[Arc<Host>], u32)>,
        rng: &mut SmallRng,
    ) -> Group {
        // A hash leads to one host whatever the localities' turn is: their weights are in the table.
        let hashing = policy.algorithm.is_hashing();
        let one = hosts
            .windows(2)
            .all(|pair| pair[0].locality == pair[1].locality);
        if !policy.locality_weighted
            || hashing
            || one
            || !hosts.iter().any(|host| host.locality_weight > 0)
        {
            return Group {
                localities: None,
                locality_weights: Vec::new(),
                lists: vec![List::new(policy, hosts, rng)],
            };
        }
        let mut lists: Vec<Vec<Arc<Host>>> = Vec::new();
        for host in hosts {
            match lists
                .iter_mut()
                .find(|list| list[0].locality == host.locality)
            {
                Some(list) => list.push(host),
                None => lists.push(vec![host]),
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "numbers of hosts")]
        let locality_weights: Vec<f64> = lists
            .iter()
            .map(|list| {
                let available = whole.map_or(1.0, |(all, factor)| {
                    let all = all
                        .iter()
                        .filter(|host| host.locality == list[0].locality)
                        .count();
                    (f64::from(factor) / 100.0 * list.len() as f64 / all.max(1) as f64).min(1.0)
                });
                f64::from(list[0].locality_weight) * available
            })
            .collect();
        Group {
            localities: Some(Edf::new(locality_weights.iter().copied())),
            locality_weights,
            lists: lists
                .into_iter()
                .map(|list| List::new(policy, list, rng))
                .collect(),
        }
    }

    fn is_empty(&self) -> bool {
        self.lists.iter().all(|list| list.hosts.is_empty())
    }

    fn pick(&mut self, value: u64, rng: &mut SmallRng) -> Option<Arc<Host>> {
        let list = match &mut self.localities {
            None => 0,
            Some(edf) => edf.pick(|index| self.locality_weights[index])?,
        };
        self.lists.get_mut(list)?.pick(value, rng)
    }
}

impl List {
    fn new(policy: &Policy, hosts: Vec<Arc<Host>>, rng: &mut SmallRng) -> List {
        let slow_start = policy
            .slow_start
            .filter(|slow| hosts.iter().any(|host| slow.share(host) < 1.0));
        let even = slow_start.is_none()
            && hosts
                .windows(2)
                .all(|pair| pair[0].weight == pair[1].weight);
        let weight = |host: &Host| weight_now(host, slow_start.as_ref());
        let started = |start: usize| {
            let mut edf = Edf::new(hosts.iter().map(|host| weight(host)));
            // Workers begin at different places, so that they do not all send their first requests to one host.
            for _ in 0..start {
                edf.pick(|index| weight(&hosts[index]));
            }
            edf
        };
        let start = if hosts.is_empty() {
            0
        } else {
            rng.random_range(0..hosts.len())
        };
        let picker = match policy.algorithm {
            Algorithm::RoundRobin if even => Picker::RoundRobin(start),
            Algorithm::RoundRobin => Picker::Weighted(started(start)),
            Algorithm::LeastRequest { choices, .. } if even => Picker::LeastRequest(choices),
            Algorithm::LeastRequest { bias, .. } => {
                Picker::WeightedLeastRequest(started(start), bias)
            }
            Algorithm::Random => Picker::Random,
            Algorithm::RingHash { min_size, max_size } => {
                Picker::Ring(ring(&hosts, min_size, max_size, policy))
            }
            Algorithm::Maglev { table_size } => Picker::Table(maglev(&hosts, table_size, policy)),
        };
        List {
            hosts,
            picker,
            slow_start,
        }
    }

    fn pick(&mut self, value: u64, rng: &mut SmallRng) -> Option<Arc<Host>> {
        let count = self.hosts.len();
        if count == 0 {
            return None;
        }
        let hosts = &self.hosts;
        let weight = |index: usize| weight_now(&hosts[index], self.slow_start.as_ref());
        let index = match &mut self.picker {
            Picker::RoundRobin(next) => {
                let index = *next % count;
                *next = index + 1;
                index
            }
            Picker::Weighted(edf) => edf.pick(weight)?,
            Picker::LeastRequest(choices) => {
                let mut best = rng.random_range(0..count);
                for _ in 1..*choices {
                    let other = rng.random_range(0..count);
                    if hosts[other].state.active_requests() < hosts[best].state.active_requests() {
                        best = other;
                    }
                }
                best
            }
            Picker::WeightedLeastRequest(edf, bias) => {
                edf.pick(|index| weight(index) / business(&hosts[index], *bias))?
            }
            Picker::Random => rng.random_range(0..count),
            Picker::Ring(ring) => {
                let at = ring.partition_point(|(point, _)| *point < value);
                ring.get(at).or(ring.first())?.1 as usize
            }
            Picker::Table(table) => {
                let at = usize::try_from(value % (table.len() as u64).max(1)).ok()?;
                *table.get(at)? as usize
            }
        };
        hosts.get(index).cloned()
    }
}

/// The weight of a host, as far as it has it already.
fn weight_now(host: &Host, slow_start: Option<&SlowStart>) -> f64 {
    f64::from(host.weight) * slow_start.map_or(1.0, |slow| slow.share(host))
}

/// By how much its requests under way lower the weight of a host.
fn business(host: &Host, bias: f64) -> f64 {
    let active = f64::from(host.state.active_requests()) + 1.0;
    if bias == 1.0 {
        active
    } else {
        active.powf(bias)
    }
}

fn hash_key(host: &Host, hostnames: bool) -> String {
    match (&host.hash_key, &host.hostname) {
        (Some(key), _) => key.to_string(),
        (None, Some(name)) if hostnames => name.to_string(),
        _ => host.address.to_string(),
    }
}

/// Normalised weights: they add up to one. With weighted localities, each locality's hosts share what it has.
fn normalised(hosts: &[Arc<Host>], policy: &Policy) -> Vec<f64> {
    let sum = |hosts: &mut dyn Iterator<Item = &Arc<Host>>| -> f64 {
        hosts
            .map(|host| f64::from(host.weight))
            .sum::<f64>()
            .max(1.0)
    };
    let weighted = policy.locality_weighted && hosts.iter().any(|host| host.locality_weight > 0);
    if !weighted {
        let total = sum(&mut hosts.iter());
        return hosts
            .iter()
            .map(|host| f64::from(host.weight) / total)
            .collect();
    }
    // Of each locality: its weight, and that of its hosts together.
    let mut localities: HashMap<&Locality, (f64, f64)> = HashMap::new();
    for host in hosts {
        let (_, hosts) = localities
            .entry(&host.locality)
            .or_insert((f64::from(host.locality_weight), 0.0));
        *hosts += f64::from(host.weight);
    }
    let total: f64 = localities.values().map(|(weight, _)| weight).sum();
    hosts
        .iter()
        .map(|host| {
            let (locality, all) = localities
                .get(&*host.locality)
                .copied()
                .unwrap_or((0.0, 1.0));
            locality / total * f64::from(host.weight) / all
        })
        .collect()
}

fn ring(hosts: &[Arc<Host>], min_size: u64, max_size: u64, policy: &Policy) -> Vec<(u64, u32)> {
    let weights = normalised(hosts, policy);
    let positive = weights.iter().copied().filter(|weight| *weight > 0.0);
    let least = positive.fold(1.0, f64::min);
    // As many entries as give the lightest host a whole number of them.
    #[allow(clippy::cast_precision_loss, reason = "ring sizes are far below 2^52")]
    let (min_size, max_size) = (min_size as f64, max_size as f64);
    let scale = ((least * min_size).ceil() / least).min(max_size);
    let mut ring = Vec::new();
    let (mut current, mut target) = (0.0, 0.0);
    for (index, (host, weight)) in (0_u32..).zip(hosts.iter().zip(&weights)) {
        let key = hash_key(host, policy.hash_hostnames);
        target += scale * weight;
        let mut number = 0;
        while current < target {
            ring.push((xxh64(format!("{key}_{number}").as_bytes(), 0), index));
            number += 1;
            current += 1.0;
        }
    }
    ring.sort_unstable();
    ring
}

fn maglev(hosts: &[Arc<Host>], table_size: u64, policy: &Policy) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    struct Build {
        offset: u64,
        skip: u64,
        weight: f64,
        target: f64,
        next: u64,
    }
    if hosts.is_empty() {
        return Vec::new();
    }
    let weights = normalised(hosts, policy);
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    let mut builds: Vec<Build> = hosts
        .iter()
        .zip(weights)
        .map(|(host, weight)| {
            let key = hash_key(host, policy.hash_hostnames);
            Build {
                offset: xxh64(key.as_bytes(), 0) % table_size,
                skip: xxh64(key.as_bytes(), 1) % (table_size - 1) + 1,
                weight,
                target: 0.0,
                next: 0,
            }
        })
        .collect();
    let Ok(size) = usize::try_from(table_size) else {
        return Vec::new();
    };
    let mut table = vec![FREE; size];
    let mut filled = 0;
    let mut round = 0.0;
    while filled < size {
        round += 1.0;
        for (index, build) in (0_u32..).zip(&mut builds) {
            if filled == size {
                break;
            }
            // Lighter hosts sit out rounds in proportion.
            if build.weight <= 0.0 || round * build.weight < build.target {
                continue;
            }
            build.target += heaviest;
            loop {
                let at = (build.offset + build.skip * build.next) % table_size;
                build.next += 1;
                if let Some(slot) = usize::try_from(at).ok().and_then(|at| table.get_mut(at))
                    && *slot == FREE
                {
                    *slot = index;
                    filled += 1;
                    break;
                }
            }
        }
    }
    table
}

#[cfg(test)]
mod tests;
