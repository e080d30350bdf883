//! One run: start the proxies, warm up, read the kernel's account of their CPU time at both ends of the
//! window, read their memory, stop them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdListener},
    path::Path,
    process::{Child, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use e2e::http::Client;
use tokio::{net::TcpListener, task::LocalSet};

use crate::{
    load::{self, Counts},
    scenario::{Ports, Scenario},
};

/// Load before the window.
const WARM_UP: Duration = Duration::from_secs(1);

/// What one proxy (or pair) needed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// CPU time per request, microseconds, all proxies of the scenario together.
    pub(crate) cpu_us: f64,
    /// Resident memory under load, MiB, all proxies together.
    pub(crate) memory_mib: f64,
    /// Requests per second, for the record.
    pub(crate) rate: f64,
    /// Requests that failed; a run with any does not count.
    pub(crate) bad: u64,
}

/// Both peers, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    pub(crate) ours: Sample,
    pub(crate) envoy: Sample,
}

struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Binds this process to one processor, if the machine has it.
pub(crate) fn use_processor(number: usize) -> anyhow::Result<()> {
    let processors = std::thread::available_parallelism()?.get();
    if number < processors {
        let status = Command::new("taskset")
            .args(["-pc", &number.to_string(), &std::process::id().to_string()])
            .stdout(Stdio::null())
            .status()
            .context("taskset (util-linux) is needed")?;
        anyhow::ensure!(status.success(), "taskset refused");
    }
    Ok(())
}

pub(crate) async fn run(
    scenario: Scenario,
    program: &Path,
    window: Duration,
) -> anyhow::Result<Sample> {
    let folder = tempfile::tempdir()?;
    let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let ports = Ports {
        entry: free_port()?,
        middle: free_port()?,
        upstream: upstream.local_addr()?,
        admin: [free_port()?, free_port()?],
    };
    let mut proxies = Vec::new();
    for (index, bootstrap) in scenario
        .bootstraps(ports, folder.path())?
        .iter()
        .enumerate()
    {
        let file = folder.path().join(format!("{index}.json"));
        fs::write(&file, serde_json::to_vec(bootstrap)?)?;
        let log = fs::File::create(folder.path().join(format!("{index}.log")))?;
        let child = Command::new("taskset")
            .args(["-c", "0"])
            .arg(program)
            .arg("-c")
            .arg(&file)
            .args(["--concurrency", "1", "-l", "error", "--base-id"])
            .arg((std::process::id() % 20_000 + u32::try_from(index)?).to_string())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        proxies.push(Proxy(child));
    }
    for admin in ports.admin.iter().take(proxies.len()) {
        ready(*admin).await?;
    }
    let local = LocalSet::new();
    local.spawn_local(load::upstream(upstream));
    local
        .run_until(async {
            let counts = Rc::new(Counts::default());
            let end = Instant::now() + WARM_UP + window;
            let load = tokio::task::spawn_local(load::run(ports.entry, counts.clone(), end));
            tokio::time::sleep(WARM_UP).await;
            let before = (cpu_ns(&proxies)?, counts.good.get(), Instant::now());
            tokio::time::sleep(window - Duration::from_millis(100)).await;
            let after = (cpu_ns(&proxies)?, counts.good.get(), Instant::now());
            let memory_mib = memory_mib(&proxies)?;
            load.await??;
            let requests = (after.1 - before.1) as f64;
            anyhow::ensure!(
                requests > 0.0,
                "no request came through {}",
                program.display()
            );
            Ok(Sample {
                cpu_us: (after.0 - before.0) as f64 / 1000.0 / requests,
                memory_mib,
                rate: requests / (after.2 - before.2).as_secs_f64(),
                bad: counts.bad.get(),
            })
        })
        .await
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(StdListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

async fn ready(admin: SocketAddr) -> anyhow::Result<()> {
    let client = Client::new();
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        match client.get(&format!("http://{admin}/ready")).await {
            Ok(response) if response.status == 200 => return Ok(()),
            _ if Instant::now() > deadline => anyhow::bail!("{admin} is not ready after 15 s"),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// CPU time of all threads; the kernel counts it in nanoseconds.
fn cpu_ns(proxies: &[Proxy]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for Proxy(child) in proxies {
        for task in fs::read_dir(format!("/proc/{}/task", child.id()))? {
            // A thread may end between the two calls.
            if let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) {
                let ns = text.split_whitespace().next().unwrap_or("0");
                sum += ns.parse::<u64>()?;
            }
        }
    }
    Ok(sum)
}

fn memory_mib(proxies: &[Proxy]) -> anyhow::Result<f64> {
    let mut kib = 0.0;
    for Proxy(child) in proxies {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        kib += status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
            .context("no VmRSS")?;
    }
    Ok(kib / 1024.0)
}
