//! `make bench-gate`: instructions that a request costs, counted by callgrind, against recorded ones.
//!
//! Each path is run with N and with 2N requests, one after the other on one connection (or each on its own,
//! with a TLS handshake), and the difference is divided by N: start-up, other handshakes and the first
//! allocations cancel out. Only the thread that serves is counted, so that background work does not disturb. Calls of
//! Mixer are counted in the same way.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{
    bootstrap::{self, Http, bootstrap, cluster, http, listener},
    load::{self, Extent, Pace, Plan, Protocol},
    mixer,
    process::{LOAD_CPU, PROXY_CPU, Running, use_processor},
    scenario::{Site, last_route, many_routes},
};

/// The recorded counts.
const RECORD: &str = "e2e/bench/instructions.json";
/// Requests of the shorter run.
const REQUESTS: u64 = 2000;
/// More than this much above the record fails.
const TOLERANCE: f64 = 0.05;
/// Calls of Mixer: name here, scenario of `bench mixer`, and how many of the shorter run. A report is a batch.
const MIXER: [(&str, &str, u64); 2] = [
    ("mixer-check", "check", 1000),
    ("mixer-report", "report", 50),
];
/// Callgrind makes a program some fifty times slower.
const START: Duration = Duration::from_secs(120);

/// One hot path.
struct HotPath {
    name: &'static str,
    plan: Plan,
    listener: Value,
    http2: bool,
}

/// What to do.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) proxy: PathBuf,
    pub(crate) mixer: PathBuf,
    /// Record what is counted.
    pub(crate) accept: bool,
}

fn paths(site: &Site, at: SocketAddr, log: &Path) -> Vec<HotPath> {
    let h1 = Plan::new(Protocol::Http1, 1, 1);
    let h2 = Plan::new(Protocol::Http2, 1, 1);
    let path = |name, plan: &Plan, options, tls: Option<Value>| HotPath {
        name,
        http2: plan.protocol == Protocol::Http2,
        plan: plan.clone(),
        listener: listener(at, &http(options), tls.as_ref()),
    };
    let tls = bootstrap::downstream_tls(&site.folder, "ecdsa", false, &["http/1.1"]);
    let over_tls = Plan {
        tls: Some(site.tls.clone()),
        ..h1.clone()
    };
    let handshake = Plan {
        fresh: true,
        ..over_tls.clone()
    };
    let logged = Http {
        more: vec![("access_log", bootstrap::access_log(log, false))],
        ..Http::default()
    };
    let guarded = Http {
        filters: vec![bootstrap::rbac(&json!({"any": true}))],
        ..Http::default()
    };
    vec![
        path("h1", &h1, Http::default(), None),
        path("h2", &h2, Http::default(), None),
        path("tls", &over_tls, Http::default(), Some(tls.clone())),
        path("handshake", &handshake, Http::default(), Some(tls)),
        path("routes", &last_route(h1.clone()), many_routes(), None),
        path("access-log", &h1, logged, None),
        path("rbac", &h1, guarded, None),
    ]
}

/// Instructions by thread.
type Counts = BTreeMap<String, u64>;

/// What was recorded, and what is counted now.
struct Gate {
    recorded: Counts,
    counted: Counts,
    worse: Vec<String>,
}

impl Gate {
    fn new(recorded: Counts) -> Gate {
        println!(
            "{:<12} {:>12} {:>12} {:>8}",
            "path", "recorded", "counted", ""
        );
        Gate {
            recorded,
            counted: BTreeMap::new(),
            worse: Vec::new(),
        }
    }

    /// Counts a path and tells how that compares.
    fn count(
        &mut self,
        name: &str,
        launch: Launch<'_>,
        requests: u64,
        folder: &Path,
    ) -> anyhow::Result<()> {
        let count = |requests| threads(launch, requests, folder).with_context(|| name.to_owned());
        let (once, twice) = (count(requests)?, count(2 * requests)?);
        // The thread that serves is the one to which the requests made the difference.
        let difference = twice
            .iter()
            .map(|(thread, count)| count.saturating_sub(*once.get(thread).unwrap_or(&0)))
            .max()
            .unwrap_or(0);
        let instructions = difference / requests;
        anyhow::ensure!(instructions > 0, "{name}: nothing was counted");
        self.counted.insert(name.to_owned(), instructions);
        let before = self.recorded.get(name).copied();
        let change = before.map(|before| instructions as f64 / before as f64 - 1.0);
        println!(
            "{name:<12} {:>12} {instructions:>12} {:>8}",
            before.map(|before| before.to_string()).unwrap_or_default(),
            change
                .map(|change| format!("{:+.1} %", change * 100.0))
                .unwrap_or_default()
        );
        match change {
            Some(change) if change <= TOLERANCE => {
                if change < -TOLERANCE {
                    println!("  better than recorded; `make bench-gate ACCEPT=1` keeps it so");
                }
            }
            Some(change) => self.worse.push(format!("{name} {:+.1} %", change * 100.0)),
            None => self.worse.push(format!("{name} (not recorded)")),
        }
        Ok(())
    }
}

/// Counts every path and compares, or records.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    use_processor(LOAD_CPU)?;
    let folder = tempfile::tempdir()?;
    let site = Site::open(folder.path())?;
    let recorded: Counts = match fs::read(RECORD) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| RECORD)?,
        Err(error) if settings.accept => {
            eprintln!("{RECORD} will be made: {error}");
            BTreeMap::new()
        }
        Err(error) => return Err(error).context(RECORD),
    };
    let mut gate = Gate::new(recorded);
    let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    for path in paths(&site, at, &folder.path().join("access.log")) {
        let to = if path.http2 { site.http2 } else { site.http1 };
        let admin = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let bootstrap = bootstrap(
            admin,
            std::slice::from_ref(&path.listener),
            &[cluster("up", to, path.http2, None)],
        );
        let file = folder.path().join(format!("{}.json", path.name));
        fs::write(&file, serde_json::to_vec(&bootstrap)?)?;
        let launch = |launcher: &[String]| {
            let running = proxy(launcher, settings, &file, at, folder.path())?;
            Ok((running, at, path.plan.clone()))
        };
        gate.count(path.name, &launch, REQUESTS, folder.path())?;
    }
    for (name, scenario, calls) in MIXER {
        let folder = folder.path().join(name);
        fs::create_dir(&folder)?;
        let launch =
            |launcher: &[String]| mixer::launched(launcher, &settings.mixer, scenario, &folder);
        gate.count(name, &launch, calls, &folder)?;
    }
    let Gate { counted, worse, .. } = gate;
    if settings.accept {
        let text = serde_json::to_string_pretty(&counted)? + "\n";
        return fs::write(RECORD, text).context(RECORD);
    }
    anyhow::ensure!(
        worse.is_empty(),
        "more than {:.0} % more instructions per request: {}. Find out why; if it must be so, record it with \
         `make bench-gate ACCEPT=1`, commit {RECORD} and say in the commit what is bought with it.",
        TOLERANCE * 100.0,
        worse.join(", ")
    );
    Ok(())
}

/// What a run is: the program under callgrind, where it listens, and what is sent.
type Launch<'a> = &'a dyn Fn(&[String]) -> anyhow::Result<(Running, SocketAddr, Plan)>;

/// Instructions of every thread of a program that serves so many requests.
fn threads(launch: Launch<'_>, requests: u64, folder: &Path) -> anyhow::Result<Counts> {
    let out = folder.join("callgrind");
    fs::remove_dir_all(&out).ok();
    fs::create_dir(&out)?;
    let launcher = [
        "valgrind".to_owned(),
        "--tool=callgrind".to_owned(),
        "--separate-threads=yes".to_owned(),
        format!("--callgrind-out-file={}", out.join("counts").display()),
    ];
    let (running, at, plan) = launch(&launcher)?;
    load::run(at, &plan, Pace::Closed, &Extent::Requests(requests), &[])?;
    running.finish(START)?;
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(&out)? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())?;
        // The file of the whole has none; each thread has its own.
        let total = text
            .lines()
            .find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok());
        if let Some(total) = total {
            counts.insert(entry.file_name().to_string_lossy().into_owned(), total);
        }
    }
    Ok(counts)
}

/// A proxy with this bootstrap.
fn proxy(
    launcher: &[String],
    settings: &Settings,
    bootstrap: &Path,
    at: SocketAddr,
    folder: &Path,
) -> anyhow::Result<Running> {
    let [program, arguments @ ..] = launcher else {
        anyhow::bail!("there is no program");
    };
    let mut arguments = arguments.to_vec();
    arguments.push(settings.proxy.display().to_string());
    arguments.push("-c".to_owned());
    arguments.push(bootstrap.display().to_string());
    arguments.extend(["--concurrency", "1", "-l", "error"].map(str::to_owned));
    let log = folder.join("callgrind.log");
    let mut proxy = Running::start(Path::new(program), &arguments, PROXY_CPU, log)?;
    proxy.listens(at, START)?;
    Ok(proxy)
}
