//! Ours, Envoy and the relay beside each other: all of a scenario are up at once, and the load visits them in
//! turn, so that the machine's drift falls on all alike. Ratios are medians of the rounds' ratios.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    load::{self, Extent, Live, Outcome, Pace, Plan, Protocol},
    process::{LOAD_CPU, Memory, PROXY_CPU, Running, real_time, use_processor},
    report::{Progress, Row, Unit as RowUnit},
    scenario::{self, Idle, Ports, Scenario, Site, Unit},
};

/// What to compare and how long.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) ours: PathBuf,
    pub(crate) envoy: PathBuf,
    /// All when empty.
    pub(crate) scenarios: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
    pub(crate) idle_connections: usize,
}

/// Part of the window that is run before it.
const WARM_UP: f64 = 0.2;
/// The open loop's rate as a part of Envoy's saturated one.
const RATE_SHARE: f64 = 0.3;
/// Longest wait for a proxy to listen: Envoy takes its time with 10,000 clusters.
const START: Duration = Duration::from_secs(120);
/// Memory is read when a proxy has had time to settle.
const SETTLE: Duration = Duration::from_millis(700);

/// One of those that are compared.
#[derive(Debug)]
struct Peer {
    name: &'static str,
    processes: Vec<Running>,
    entry: SocketAddr,
    plan: Plan,
}

/// Medians of what the load found out about one peer.
#[derive(Clone, Debug, Default)]
struct Costs {
    /// µs per request or ns per byte, round by round.
    each: Vec<f64>,
    rate: Vec<f64>,
    bad: u64,
    problems: Vec<String>,
}

/// Starts proxies of scenarios.
#[derive(Debug)]
struct Starter<'a> {
    settings: &'a Settings,
    folder: &'a Path,
    started: u32,
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

impl Starter<'_> {
    fn proxy(
        &mut self,
        program: &Path,
        bootstraps: &dyn Fn(&Ports) -> Vec<Value>,
    ) -> anyhow::Result<(Vec<Running>, SocketAddr)> {
        self.started += 1;
        let number = self.started;
        let ports = Ports {
            entry: free_port()?,
            middle: free_port()?,
            admin: [free_port()?, free_port()?],
            log: self.folder.join(format!("access-{number}.log")),
        };
        let mut processes = Vec::new();
        // The one behind first, so that the entry finds it.
        for (index, bootstrap) in bootstraps(&ports).iter().enumerate().rev() {
            let file = self.folder.join(format!("{number}-{index}.json"));
            fs::write(&file, serde_json::to_vec(bootstrap)?)?;
            let base = std::process::id() % 10_000 + number * 2 + u32::try_from(index)?;
            let arguments = [
                "-c".to_owned(),
                file.display().to_string(),
                "--concurrency".to_owned(),
                "1".to_owned(),
                "-l".to_owned(),
                "error".to_owned(),
                "--base-id".to_owned(),
                base.to_string(),
            ];
            let log = self.folder.join(format!("{number}-{index}.log"));
            let mut process = Running::start(program, &arguments, PROXY_CPU, log)?;
            let port = if index == 0 {
                ports.entry
            } else {
                ports.middle
            };
            process
                .listens(port, START)
                .with_context(|| program.display().to_string())?;
            processes.push(process);
        }
        Ok((processes, ports.entry))
    }

    fn relay(&mut self, to: SocketAddr) -> anyhow::Result<(Vec<Running>, SocketAddr)> {
        self.started += 1;
        let entry = free_port()?;
        let log = self.folder.join(format!("{}-relay.log", self.started));
        let arguments = ["relay".to_owned(), entry.to_string(), to.to_string()];
        let mut process = Running::start(&std::env::current_exe()?, &arguments, PROXY_CPU, log)?;
        process.listens(entry, START)?;
        Ok((vec![process], entry))
    }

    fn peers(&mut self, scenario: &Scenario) -> anyhow::Result<Vec<Peer>> {
        let mut peers = Vec::new();
        let settings = self.settings;
        for (name, program) in [("ours", &settings.ours), ("envoy", &settings.envoy)] {
            let (processes, entry) = self.proxy(program, &*scenario.bootstraps)?;
            peers.push(Peer {
                name,
                processes,
                entry,
                plan: scenario.plan.clone(),
            });
        }
        if let Some((plan, to)) = &scenario.relay {
            let (processes, entry) = self.relay(*to)?;
            peers.push(Peer {
                name: "relay",
                processes,
                entry,
                plan: plan.clone(),
            });
        }
        Ok(peers)
    }
}

impl Peer {
    fn visit(&self, pace: Pace, window: Duration) -> anyhow::Result<Outcome> {
        let clocks = self
            .processes
            .iter()
            .map(Running::clock)
            .collect::<Result<Vec<_>, _>>()?;
        let extent = Extent::Window {
            warm_up: window.mul_f64(WARM_UP),
            window,
        };
        load::run(self.entry, &self.plan, pace, &extent, &clocks)
            .with_context(|| format!("load on {}", self.name))
    }

    fn memory(&self) -> anyhow::Result<Memory> {
        self.processes
            .iter()
            .try_fold(Memory::default(), |sum, process| {
                let memory = process.memory()?;
                Ok(Memory {
                    resident: sum.resident + memory.resident,
                    anonymous: sum.anonymous + memory.anonymous,
                })
            })
    }
}

/// Middle of the values; not a number when there are none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn ratio(ours: &[f64], theirs: &[f64]) -> f64 {
    let ratios: Vec<_> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    median(&ratios)
}

/// Value of a sorted list below which a part of it lies, µs.
fn percentile(sorted_ns: &[u64], part: f64) -> f64 {
    if sorted_ns.is_empty() {
        return f64::NAN;
    }
    let index = (sorted_ns.len() as f64 * part) as usize;
    sorted_ns[index.min(sorted_ns.len() - 1)] as f64 / 1000.0
}

/// Runs what is asked for.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<Findings> {
    use_processor(LOAD_CPU)?;
    let folder = tempfile::tempdir()?;
    let site = Site::open(folder.path())?;
    let scenarios = scenario::all(&site);
    let known: Vec<_> = scenarios
        .iter()
        .map(|scenario| scenario.name)
        .chain(scenario::IDLE.iter().map(|idle| idle.name))
        .chain([scenario::MEMORY, scenario::CLUSTERS_NAME])
        .collect();
    for name in &settings.scenarios {
        anyhow::ensure!(
            known.contains(&name.as_str()),
            "no scenario {name:?}; there are: {}",
            known.join(", ")
        );
    }
    let wanted = |name: &str| {
        settings.scenarios.is_empty() || settings.scenarios.iter().any(|wanted| wanted == name)
    };
    let steps = known.iter().filter(|name| wanted(name)).count();
    let mut progress = Progress::new(steps);
    let mut rows = Rows::default();
    let mut failures = Vec::new();
    // What cannot be measured does not take the rest with it.
    let mut failed = |name: &str, error: anyhow::Error, progress: &Progress| {
        let failure = format!("{name}: {error:#}");
        progress.say(&failure);
        failures.push(failure);
    };
    for scenario in &scenarios {
        // Memory is read beside the first scenario.
        let memory = scenario.name == "h1" && wanted(scenario::MEMORY);
        if (wanted(scenario.name) || memory)
            && let Err(error) = compare(settings, scenario, folder.path(), &mut progress, &mut rows)
        {
            failed(scenario.name, error, &progress);
        }
    }
    let mut all = rows.cpu;
    all.extend(rows.latency);
    if wanted(scenario::MEMORY) {
        all.extend(rows.memory);
    }
    for idle in scenario::IDLE.iter().filter(|idle| wanted(idle.name)) {
        let of = scenarios.iter().find(|scenario| scenario.name == idle.of);
        let of = of.context("an idle scenario needs another")?;
        match weigh(settings, idle, of, folder.path(), &mut progress) {
            Ok(row) => all.push(row),
            Err(error) => failed(idle.name, error, &progress),
        }
    }
    if wanted(scenario::CLUSTERS_NAME) {
        match clusters(settings, &site, folder.path(), &mut progress) {
            Ok(rows) => all.extend(rows),
            Err(error) => failed(scenario::CLUSTERS_NAME, error, &progress),
        }
    }
    progress.end();
    Ok(Findings {
        rows: all,
        failures,
    })
}

/// What came out.
#[derive(Debug)]
pub(crate) struct Findings {
    pub(crate) rows: Vec<Row>,
    /// Scenarios that could not be measured, and why.
    pub(crate) failures: Vec<String>,
}

#[derive(Debug, Default)]
struct Rows {
    cpu: Vec<Row>,
    latency: Vec<Row>,
    memory: Vec<Row>,
}

fn compare(
    settings: &Settings,
    scenario: &Scenario,
    folder: &Path,
    progress: &mut Progress,
    rows: &mut Rows,
) -> anyhow::Result<()> {
    progress.begin(scenario.title);
    let mut starter = Starter {
        settings,
        folder,
        started: 0,
    };
    let peers = starter.peers(scenario)?;
    std::thread::sleep(SETTLE);
    let rest = peers
        .iter()
        .map(Peer::memory)
        .collect::<Result<Vec<_>, _>>()?;
    let mut costs = vec![Costs::default(); peers.len()];
    for round in 0..settings.rounds {
        progress.round(round + 1, settings.rounds);
        for turn in 0..peers.len() {
            let index = (round + turn) % peers.len();
            let outcome = peers[index].visit(Pace::Closed, settings.window)?;
            let cost = &mut costs[index];
            let (units, scale) = match scenario.unit {
                Unit::Request => (outcome.good, 1000.0),
                Unit::Byte => (outcome.bytes, 1.0),
            };
            cost.each
                .push(outcome.cpu_ns as f64 / scale / units.max(1) as f64);
            cost.rate.push(outcome.good as f64 / outcome.seconds);
            cost.bad += outcome.bad + u64::from(units == 0);
            cost.problems.extend(outcome.problems);
        }
    }
    for (peer, cost) in peers.iter().zip(&costs) {
        for problem in cost.problems.iter().take(3) {
            progress.say(&format!("{}, {}: {problem}", scenario.name, peer.name));
        }
    }
    let [ours, envoy, relay @ ..] = &costs[..] else {
        anyhow::bail!("ours and Envoy are always there");
    };
    rows.cpu.push(Row {
        name: scenario.name.to_owned(),
        title: scenario.title.to_owned(),
        unit: match scenario.unit {
            Unit::Request => RowUnit::CpuPerRequest,
            Unit::Byte => RowUnit::CpuPerByte,
        },
        ours: median(&ours.each),
        envoy: median(&envoy.each),
        relay: relay.first().map(|relay| median(&relay.each)),
        envoy_ratio: ratio(&ours.each, &envoy.each),
        envoy_goal: scenario.envoy_goal,
        relay_ratio: relay.first().map(|relay| ratio(&ours.each, &relay.each)),
        relay_goal: scenario.relay_goal,
        bad: costs.iter().map(|cost| cost.bad).sum(),
        rounds: (0..settings.rounds)
            .map(|round| costs.iter().map(|cost| cost.each[round]).collect())
            .collect(),
    });
    if scenario.name == "h1" {
        let load = peers
            .iter()
            .map(Peer::memory)
            .collect::<Result<Vec<_>, _>>()?;
        for (title, at) in [("Memory at rest", &rest), ("Memory under load", &load)] {
            let mib = |memory: Memory| memory.resident as f64 / 1024.0;
            rows.memory.push(Row::two(
                scenario::MEMORY,
                title,
                RowUnit::Mebibytes,
                (mib(at[0]), mib(at[1])),
                scenario::MEMORY_GOAL,
            ));
        }
    }
    if let Some(goal) = scenario.latency_goal {
        let rate = RATE_SHARE * median(&envoy.rate);
        let bad: u64 = costs.iter().map(|cost| cost.bad).sum();
        anyhow::ensure!(rate > 1.0, "Envoy answered nothing ({bad} bad)");
        rows.latency
            .extend(latency(settings, scenario, &peers, rate, goal, progress)?);
    }
    Ok(())
}

/// Latency at a fixed rate, over that without a proxy. At real-time priority, so that a busy machine's
/// other work stays out of it.
fn latency(
    settings: &Settings,
    scenario: &Scenario,
    peers: &[Peer],
    rate: f64,
    goal: f64,
    progress: &mut Progress,
) -> anyhow::Result<Vec<Row>> {
    let direct = Peer {
        name: "direct",
        processes: Vec::new(),
        entry: scenario.direct,
        plan: scenario.plan.clone(),
    };
    let all: Vec<&Peer> = peers.iter().chain([&direct]).collect();
    let mut medians = vec![Vec::new(); all.len()];
    let mut tails = vec![Vec::new(); all.len()];
    let mut bad = 0;
    let rounds = settings.rounds.div_ceil(2);
    for round in 0..rounds {
        progress.round(round + 1, rounds);
        for turn in 0..all.len() {
            let index = (round + turn) % all.len();
            let peer = all[index];
            let processes = || {
                let proxies = peer.processes.iter().map(Running::id);
                proxies.chain([std::process::id()])
            };
            if !real_time(processes(), true) {
                progress.once("no right to real-time priority: latencies include other work");
            }
            let outcome = peer.visit(Pace::Rate(rate), settings.window.mul_f64(1.5));
            real_time(processes(), false);
            let outcome = outcome?;
            medians[index].push(percentile(&outcome.latencies, 0.50));
            tails[index].push(percentile(&outcome.latencies, 0.99));
            bad += outcome.bad;
        }
    }
    let base = median(&medians[all.len() - 1]);
    let added = |values: &[f64]| median(values) - base;
    let name = format!("{}-latency", scenario.name);
    let relay = (peers.len() > 2).then_some(2);
    let title = |what: &str| format!("{what}, {}", scenario.title);
    let mut p50 = Row::two(
        &name,
        &title("Added p50"),
        RowUnit::Latency,
        (added(&medians[0]), added(&medians[1])),
        goal,
    );
    p50.relay = relay.map(|index| added(&medians[index]));
    p50.bad = bad;
    let tail = all.len() - 1;
    let mut p99 = Row::two(
        &format!("{name}-p99"),
        &title("Added p99"),
        RowUnit::Latency,
        (
            median(&tails[0]) - median(&tails[tail]),
            median(&tails[1]) - median(&tails[tail]),
        ),
        1.0,
    );
    // "Never above Envoy's": of the latencies themselves, since a difference of tails is mostly noise.
    p99.envoy_ratio = ratio(&tails[0], &tails[1]);
    p99.relay = relay.map(|index| median(&tails[index]) - median(&tails[tail]));
    Ok(vec![p50, p99])
}

/// Anonymous memory per idle connection.
fn weigh(
    settings: &Settings,
    idle: &Idle,
    of: &Scenario,
    folder: &Path,
    progress: &mut Progress,
) -> anyhow::Result<Row> {
    progress.begin(idle.title);
    let mut starter = Starter {
        settings,
        folder,
        started: 100,
    };
    let connections = settings.idle_connections;
    let mut weights = Vec::new();
    let mut bad = 0;
    for program in [&settings.ours, &settings.envoy] {
        let (processes, entry) = starter.proxy(program, &*of.bootstraps)?;
        let peer = Peer {
            name: "idle",
            processes,
            entry,
            plan: Plan {
                connections,
                ..of.plan.clone()
            },
        };
        std::thread::sleep(SETTLE);
        let before = peer.memory()?.anonymous;
        let live = Arc::new(Live::default());
        let load = {
            let (live, plan) = (live.clone(), peer.plan.clone());
            std::thread::spawn(move || {
                load::run(entry, &plan, Pace::Closed, &Extent::Held(live), &[])
            })
        };
        let deadline = Instant::now() + START;
        while live.good.load(Ordering::Relaxed) < connections as u64 {
            anyhow::ensure!(
                Instant::now() < deadline && !load.is_finished(),
                "only {:?} of {connections} connections were answered",
                live.good
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(2 * SETTLE);
        let after = peer.memory()?.anonymous;
        live.stop.store(true, Ordering::Relaxed);
        let outcome = load
            .join()
            .map_err(|_| anyhow::anyhow!("load panicked"))??;
        bad += outcome.bad;
        weights.push(after.saturating_sub(before) as f64 * 1024.0 / connections as f64);
    }
    let mut row = Row::two(
        idle.name,
        idle.title,
        RowUnit::Bytes,
        (weights[0], weights[1]),
        idle.envoy_goal,
    );
    row.bad = bad;
    Ok(row)
}

/// Start with very many clusters: CPU to the first answer, anonymous memory then.
fn clusters(
    settings: &Settings,
    site: &Site,
    folder: &Path,
    progress: &mut Progress,
) -> anyhow::Result<Vec<Row>> {
    let title = "10,000 static clusters";
    progress.begin(title);
    let bootstraps = scenario::many_clusters(site);
    let mut starter = Starter {
        settings,
        folder,
        started: 200,
    };
    let (mut memory, mut cpu) = (Vec::new(), Vec::new());
    for program in [&settings.ours, &settings.envoy] {
        let (processes, entry) = starter.proxy(program, &*bootstraps)?;
        let plan = Plan::new(Protocol::Http1, 1, 1);
        load::run(entry, &plan, Pace::Closed, &Extent::Requests(1), &[])?;
        let clocks = processes
            .iter()
            .map(Running::clock)
            .collect::<Result<Vec<_>, _>>()?;
        cpu.push(crate::process::CpuClock::sum(&clocks)? as f64 / 1e6);
        std::thread::sleep(SETTLE);
        memory.push(processes[0].memory()?.anonymous as f64 / 1024.0);
    }
    let (memory_goal, cpu_goal) = scenario::CLUSTERS_GOALS;
    Ok(vec![
        Row::two(
            scenario::CLUSTERS_NAME,
            &format!("{title}, memory"),
            RowUnit::Mebibytes,
            (memory[0], memory[1]),
            memory_goal,
        ),
        Row::two(
            scenario::CLUSTERS_NAME,
            &format!("{title}, CPU to ready"),
            RowUnit::Milliseconds,
            (cpu[0], cpu[1]),
            cpu_goal,
        ),
    ])
}
