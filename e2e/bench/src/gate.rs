//! `make bench-gate`: instructions that a request costs, counted by callgrind, against recorded ones.
//!
//! Each path is run with N and with 2N requests, one after the other on one connection (or each on its own,
//! with a TLS handshake), and the difference is divided by N: start-up, other handshakes and the first
//! allocations cancel out. Only the thread that serves is counted, so that background work does not disturb.

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
    process::{LOAD_CPU, PROXY_CPU, Running, use_processor},
    scenario::{Site, last_route, many_routes},
};

/// The recorded counts.
const RECORD: &str = "e2e/bench/instructions.json";
/// Requests of the shorter run.
const REQUESTS: u64 = 2000;
/// More than this much above the record fails.
const TOLERANCE: f64 = 0.05;
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

/// Counts every path and compares, or records.
pub(crate) fn run(settings: &Settings) -> anyhow::Result<()> {
    use_processor(LOAD_CPU)?;
    let folder = tempfile::tempdir()?;
    let site = Site::open(folder.path())?;
    let recorded: BTreeMap<String, u64> = match fs::read(RECORD) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| RECORD)?,
        Err(error) if settings.accept => {
            eprintln!("{RECORD} will be made: {error}");
            BTreeMap::new()
        }
        Err(error) => return Err(error).context(RECORD),
    };
    let mut counted = BTreeMap::new();
    let mut worse = Vec::new();
    println!(
        "{:<12} {:>12} {:>12} {:>8}",
        "path", "recorded", "counted", ""
    );
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
        let count = |requests| {
            threads(settings, &file, &path.plan, at, requests, folder.path()).context(path.name)
        };
        let (once, twice) = (count(REQUESTS)?, count(2 * REQUESTS)?);
        // The thread that serves is the one to which the requests made the difference.
        let difference = twice
            .iter()
            .map(|(thread, count)| count.saturating_sub(*once.get(thread).unwrap_or(&0)))
            .max()
            .unwrap_or(0);
        let instructions = difference / REQUESTS;
        anyhow::ensure!(instructions > 0, "{}: nothing was counted", path.name);
        counted.insert(path.name.to_owned(), instructions);
        let before = recorded.get(path.name).copied();
        let change = before.map(|before| instructions as f64 / before as f64 - 1.0);
        println!(
            "{:<12} {:>12} {instructions:>12} {:>8}",
            path.name,
            before.map(|before| before.to_string()).unwrap_or_default(),
            change
                .map(|change| format!("{:+.1} %", change * 100.0))
                .unwrap_or_default()
        );
        match change {
            Some(change) if change <= TOLERANCE => {
                if change < -TOLERANCE && !settings.accept {
                    println!("  better than recorded; `make bench-gate ACCEPT=1` keeps it so");
                }
            }
            Some(change) => worse.push(format!("{} {:+.1} %", path.name, change * 100.0)),
            None => worse.push(format!("{} (not recorded)", path.name)),
        }
    }
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

/// Instructions of every thread of a proxy that serves so many requests.
fn threads(
    settings: &Settings,
    bootstrap: &Path,
    plan: &Plan,
    at: SocketAddr,
    requests: u64,
    folder: &Path,
) -> anyhow::Result<BTreeMap<String, u64>> {
    let out = folder.join("callgrind");
    fs::remove_dir_all(&out).ok();
    fs::create_dir(&out)?;
    let arguments = [
        "--tool=callgrind".to_owned(),
        "--separate-threads=yes".to_owned(),
        format!("--callgrind-out-file={}", out.join("counts").display()),
        settings.proxy.display().to_string(),
        "-c".to_owned(),
        bootstrap.display().to_string(),
        "--concurrency".to_owned(),
        "1".to_owned(),
        "-l".to_owned(),
        "error".to_owned(),
    ];
    let log = folder.join("callgrind.log");
    let valgrind = Path::new("valgrind");
    let mut proxy = Running::start(valgrind, &arguments, PROXY_CPU, log)?;
    proxy.listens(at, START)?;
    load::run(at, plan, Pace::Closed, &Extent::Requests(requests), &[])?;
    proxy.finish(START)?;
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
