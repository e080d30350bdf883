use std::collections::HashMap;

use super::*;
use crate::cluster::Locality;

struct Given {
    port: u16,
    weight: u32,
    priority: u32,
    zone: &'static str,
    locality_weight: u32,
    health: Health,
}

impl Default for Given {
    fn default() -> Given {
        Given {
            port: 0,
            weight: 1,
            priority: 0,
            zone: "",
            locality_weight: 0,
            health: Health::Healthy,
        }
    }
}

fn set(given: impl IntoIterator<Item = Given>) -> HostSet {
    let hosts = given
        .into_iter()
        .map(|given| {
            let mut host = Host::bare(([127, 0, 0, 1], given.port).into());
            host.weight = given.weight;
            host.priority = given.priority;
            host.reported = given.health;
            host.locality_weight = given.locality_weight;
            host.locality = Arc::new(Locality {
                zone: given.zone.to_owned(),
                ..Locality::default()
            });
            Arc::new(host)
        })
        .collect();
    HostSet {
        hosts,
        ..HostSet::default()
    }
}

fn plain(count: u16) -> HostSet {
    set((0..count).map(|port| Given {
        port,
        ..Given::default()
    }))
}

fn policy(algorithm: Algorithm) -> Policy {
    Policy {
        algorithm,
        ..Policy::default()
    }
}

/// How often each port was picked in `n` picks.
fn spread(balancer: &mut Balancer, n: u32) -> HashMap<u16, u32> {
    let mut counts = HashMap::new();
    for _ in 0..n {
        let host = balancer
            .pick(None, |_| false)
            .expect("a host is in service");
        let port = host.address.socket().expect("all hosts are TCP").port();
        *counts.entry(port).or_default() += 1;
    }
    counts
}

/// Half the width of an interval that a share `p` of `n` draws leaves once in a thousand times.
fn bound(n: u32, p: f64) -> f64 {
    3.3 * (f64::from(n) * p * (1.0 - p)).sqrt()
}

fn assert_share(counts: &HashMap<u16, u32>, port: u16, n: u32, p: f64) {
    let got = f64::from(counts.get(&port).copied().unwrap_or(0));
    let want = f64::from(n) * p;
    assert!(
        (got - want).abs() <= bound(n, p),
        "port {port}: {got} of {n}, wanted {want}"
    );
}

#[test]
fn round_robin_is_exact() {
    let mut balancer = Balancer::new(&policy(Algorithm::RoundRobin), &plain(3), |_| true, 1);
    assert_eq!(
        spread(&mut balancer, 30),
        HashMap::from([(0, 10), (1, 10), (2, 10)])
    );
}

#[test]
fn weights_are_exact_over_a_round() {
    let hosts = || {
        set([(0, 3), (1, 1)].map(|(port, weight)| Given {
            port,
            weight,
            ..Given::default()
        }))
    };
    let mut balancer = Balancer::new(&policy(Algorithm::RoundRobin), &hosts(), |_| true, 1);
    assert_eq!(spread(&mut balancer, 80), HashMap::from([(0, 60), (1, 20)]));
    let least = Algorithm::LeastRequest {
        choices: 2,
        bias: 1.0,
    };
    let mut balancer = Balancer::new(&policy(least), &hosts(), |_| true, 1);
    assert_eq!(spread(&mut balancer, 80), HashMap::from([(0, 60), (1, 20)]));
}

#[test]
fn random_is_even_within_the_bound() {
    let mut balancer = Balancer::new(&policy(Algorithm::Random), &plain(4), |_| true, 7);
    let counts = spread(&mut balancer, 4000);
    for port in 0..4 {
        assert_share(&counts, port, 4000, 0.25);
    }
}

#[test]
fn the_busy_host_is_avoided() {
    let hosts = plain(2);
    for _ in 0..5 {
        hosts.hosts[0].state.request_began();
    }
    let least = Algorithm::LeastRequest {
        choices: 2,
        bias: 1.0,
    };
    let mut balancer = Balancer::new(&policy(least), &hosts, |_| true, 3);
    // Both choices fall on the busy one a quarter of the time.
    assert_share(&spread(&mut balancer, 4000), 0, 4000, 0.25);
}

#[test]
fn the_next_priority_helps_when_the_first_has_lost_too_many() {
    let hosts = |health: [Health; 4]| {
        set(health.into_iter().zip(0..).map(|(health, port)| Given {
            port,
            priority: u32::from(port / 2),
            health,
            ..Given::default()
        }))
    };
    use Health::{Healthy as Up, Unhealthy as Down};
    let policy = policy(Algorithm::RoundRobin);
    let n = 4000;
    let mut balancer = Balancer::new(&policy, &hosts([Up, Up, Up, Up]), |_| true, 1);
    assert_eq!(
        spread(&mut balancer, 10)
            .keys()
            .filter(|port| **port > 1)
            .count(),
        0
    );
    // Half of the first level times the overprovisioning factor: 70 %.
    let mut balancer = Balancer::new(&policy, &hosts([Up, Down, Up, Up]), |_| true, 1);
    let counts = spread(&mut balancer, n);
    assert_share(&counts, 0, n, 0.7);
    assert_share(&counts, 2, n, 0.15);
    let mut balancer = Balancer::new(&policy, &hosts([Down, Down, Up, Up]), |_| true, 1);
    assert_eq!(spread(&mut balancer, 10), HashMap::from([(2, 5), (3, 5)]));
}

#[test]
fn too_few_healthy_hosts_is_panic_unless_forbidden() {
    let hosts = || {
        set((0..4).map(|port| Given {
            port,
            health: if port == 0 {
                Health::Healthy
            } else {
                Health::Unhealthy
            },
            ..Given::default()
        }))
    };
    let mut balancer = Balancer::new(&policy(Algorithm::RoundRobin), &hosts(), |_| true, 1);
    assert_eq!(
        spread(&mut balancer, 8).len(),
        4,
        "25 % is below the threshold of 50 %"
    );
    let never = Policy {
        panic_threshold: 0.0,
        ..Policy::default()
    };
    let mut balancer = Balancer::new(&never, &hosts(), |_| true, 1);
    assert_eq!(spread(&mut balancer, 8), HashMap::from([(0, 8)]));
    let none = set([Given {
        health: Health::Unhealthy,
        ..Given::default()
    }]);
    let mut balancer = Balancer::new(&never, &none, |_| true, 1);
    assert!(balancer.pick(None, |_| false).is_none() && balancer.is_empty());
    let mut balancer = Balancer::new(&Policy::default(), &none, |_| true, 1);
    assert!(
        balancer.pick(None, |_| false).is_some(),
        "in panic any host will do"
    );
    assert!(balancer.panicked());
    let mut balancer = Balancer::new(&Policy::default(), &plain(2), |_| true, 1);
    assert!(balancer.pick(None, |_| false).is_some() && !balancer.panicked());
}

#[test]
fn degraded_hosts_help_only_when_needed() {
    let hosts = |first: Health| {
        set(
            [(0, first), (1, Health::Degraded)].map(|(port, health)| Given {
                port,
                health,
                ..Given::default()
            }),
        )
    };
    let policy = policy(Algorithm::RoundRobin);
    let mut balancer = Balancer::new(&policy, &hosts(Health::Healthy), |_| true, 1);
    let counts = spread(&mut balancer, 4000);
    assert_share(&counts, 0, 4000, 0.7);
    let mut balancer = Balancer::new(&policy, &hosts(Health::Unhealthy), |_| true, 1);
    assert_eq!(spread(&mut balancer, 10), HashMap::from([(1, 10)]));
}

#[test]
fn localities_share_by_their_weights() {
    let policy = Policy {
        locality_weighted: true,
        ..Policy::default()
    };
    let given = [(0, "z1", 1), (1, "z1", 1), (2, "z2", 3)];
    let hosts = set(given.map(|(port, zone, locality_weight)| Given {
        port,
        zone,
        locality_weight,
        ..Given::default()
    }));
    let mut balancer = Balancer::new(&policy, &hosts, |_| true, 1);
    assert_eq!(
        spread(&mut balancer, 160),
        HashMap::from([(0, 20), (1, 20), (2, 120)])
    );
}

#[test]
fn a_hash_keeps_its_host_and_few_move_when_one_leaves() {
    let ring = Algorithm::RingHash {
        min_size: 1024,
        max_size: 8 << 20,
    };
    for algorithm in [ring, Algorithm::Maglev { table_size: 65537 }] {
        let policy = policy(algorithm);
        let mut four = Balancer::new(&policy, &plain(4), |_| true, 1);
        let mut again = Balancer::new(&policy, &plain(4), |_| true, 2);
        let mut three = Balancer::new(&policy, &plain(3), |_| true, 1);
        let mut moved = 0;
        let mut counts = [0_u32; 4];
        for key in 0..4000_u32 {
            let hash = Some(xxh64(&key.to_le_bytes(), 0));
            let port = |balancer: &mut Balancer| {
                balancer
                    .pick(hash, |_| false)
                    .and_then(|host| host.address.socket())
                    .map(|a| a.port())
            };
            let first = port(&mut four);
            assert_eq!(first, port(&mut again), "{policy:?}");
            counts[usize::from(first.unwrap())] += 1;
            if first != Some(3) && first != port(&mut three) {
                moved += 1;
            }
        }
        assert!(
            counts.iter().all(|count| (700..1300).contains(count)),
            "{policy:?} {counts:?}"
        );
        // The ring of three has more entries for each host than that of four.
        assert!(moved < 600, "{policy:?} moved {moved}");
    }
}

#[test]
fn maglev_gives_shares_by_weight() {
    let hosts = set([(0, 1), (1, 4)].map(|(port, weight)| Given {
        port,
        weight,
        ..Given::default()
    }));
    let table = maglev(&hosts.hosts, 251, &Policy::default());
    let light = table.iter().filter(|host| **host == 0).count();
    assert!((45..=55).contains(&light), "{light} of 251");
}

#[test]
fn tried_priorities_are_passed_over() {
    let hosts = set([0, 1].map(|port| Given {
        port,
        priority: u32::from(port),
        ..Given::default()
    }));
    let mut balancer = Balancer::new(&Policy::default(), &hosts, |_| true, 1);
    let mut port = |avoid: fn(u32) -> bool| {
        balancer
            .pick(None, avoid)
            .and_then(|host| host.address.socket())
            .map(|address| address.port())
    };
    assert_eq!(port(|_| false), Some(0));
    assert_eq!(port(|priority| priority == 0), Some(1));
    assert_eq!(
        port(|_| true),
        Some(0),
        "none is left: as if none had been tried"
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_host_gets_its_share_little_by_little() {
    let slow = |aggression: f64, least: f64| {
        Some(SlowStart {
            window: Duration::from_secs(10),
            aggression,
            least,
        })
    };
    let hosts = plain(2);
    // The first has been there since before anybody looked.
    tokio::time::advance(Duration::from_secs(1)).await;
    hosts.hosts[1]
        .state
        .note_service(true, tokio::time::Instant::now());
    let counts = |slow_start, algorithm| {
        let policy = Policy {
            slow_start,
            ..policy(algorithm)
        };
        let mut balancer = Balancer::new(&policy, &hosts, |_| true, 1);
        let counts = spread(&mut balancer, 1100);
        counts.get(&1).copied().unwrap_or(0)
    };
    let round_robin = || Algorithm::RoundRobin;
    assert_eq!(
        counts(slow(1.0, 0.1), round_robin()),
        100,
        "a tenth of 1000"
    );
    tokio::time::advance(Duration::from_secs(5)).await;
    let half = counts(slow(1.0, 0.1), round_robin());
    assert!((365..=368).contains(&half), "{half}: half of its weight");
    let faster = counts(slow(2.0, 0.1), round_robin());
    assert!(
        (454..=457).contains(&faster),
        "{faster}: the root of a half"
    );
    assert_eq!(counts(None, round_robin()), 550, "not asked for");
    let least = Algorithm::LeastRequest {
        choices: 2,
        bias: 1.0,
    };
    let idle = counts(slow(1.0, 0.1), least);
    assert!((365..=368).contains(&idle), "{idle}");
    hosts.hosts[1]
        .state
        .note_service(true, tokio::time::Instant::now());
    let half = counts(slow(1.0, 0.1), round_robin());
    assert!(half > 300, "seen again is not new again");
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(
        counts(slow(1.0, 0.1), round_robin()),
        550,
        "the window is over"
    );
    hosts.hosts[1]
        .state
        .note_service(false, tokio::time::Instant::now());
    hosts.hosts[1]
        .state
        .note_service(true, tokio::time::Instant::now());
    assert_eq!(
        counts(slow(1.0, 0.1), round_robin()),
        100,
        "out and in again"
    );
}

#[test]
fn a_hash_keeps_its_host_with_weighted_localities() {
    let ring = Algorithm::RingHash {
        min_size: 4096,
        max_size: 8 << 20,
    };
    for algorithm in [ring, Algorithm::Maglev { table_size: 65537 }] {
        let policy = Policy {
            locality_weighted: true,
            ..policy(algorithm)
        };
        let given = [(0, "z1", 30), (1, "z1", 30), (2, "z2", 70), (3, "z3", 0)];
        let hosts = set(given.map(|(port, zone, locality_weight)| Given {
            port,
            zone,
            locality_weight,
            ..Given::default()
        }));
        let mut first = Balancer::new(&policy, &hosts, |_| true, 1);
        let mut second = Balancer::new(&policy, &hosts, |_| true, 2);
        let mut counts = [0_u32; 4];
        for key in 0..4000_u32 {
            let hash = Some(xxh64(&key.to_le_bytes(), 0));
            let port = |balancer: &mut Balancer| {
                balancer
                    .pick(hash, |_| false)
                    .and_then(|host| host.address.socket())
                    .map(|address| address.port())
            };
            let picked = port(&mut first);
            assert_eq!(picked, port(&mut second), "{policy:?}");
            counts[usize::from(picked.unwrap())] += 1;
        }
        // 15, 15 and 70 of a hundred, as far as a hash spreads evenly.
        for (count, want) in counts.into_iter().zip([600, 600, 2800, 0]) {
            assert!(count.abs_diff(want) <= want / 5, "{policy:?} {counts:?}");
        }
    }
}

#[test]
fn the_last_level_takes_what_all_before_it_cannot() {
    use Health::{Healthy as Up, Unhealthy as Down};
    let never_panics = Policy {
        panic_threshold: 0.0,
        ..policy(Algorithm::RoundRobin)
    };
    let shares = |health: [Health; 6]| {
        let mut port = 0;
        let hosts = set(health.map(|health| {
            port += 1;
            Given {
                port: port - 1,
                priority: u32::from((port - 1) / 2),
                health,
                ..Given::default()
            }
        }));
        let mut balancer = Balancer::new(&never_panics, &hosts, |_| true, 1);
        let mut levels = [0_u32; 3];
        for (port, count) in spread(&mut balancer, 4000) {
            levels[usize::from(port / 2)] += count;
        }
        levels.map(f64::from)
    };
    assert_eq!(shares([Down, Down, Down, Down, Up, Up]), [0.0, 0.0, 4000.0]);
    // 70 %, then 70 % of which 30 are left to give.
    let [first, second, third] = shares([Up, Down, Up, Down, Up, Up]);
    assert!((first - 2800.0).abs() < bound(4000, 0.7), "{first}");
    assert!((second - 1200.0).abs() < bound(4000, 0.3), "{second}");
    assert!(third.abs() < f64::EPSILON);
}
