//! A49 once more: Mixer hangs, is killed, or is slow while requests keep coming, for each fail policy.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use e2e::{
    http::Client,
    mesh::{Mesh, Options},
    process::Process,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    policy::{DENY_JOHN, fail_open},
    support::{bookinfo, eventually},
};

/// Requests a second: few enough for programs without optimization on a busy machine.
const RATE: u64 = 40;
/// A proxy waits so long for Mixer, and whoever is waiting with it.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// What became of one request.
#[derive(Clone, Copy, Debug)]
struct Answer {
    sent: Instant,
    took: Duration,
    status: u16,
    /// Whether the policy is against it.
    is_john: bool,
}

/// Loads so far: each has users of its own.
static LOADS: AtomicU64 = AtomicU64::new(0);

/// Open-loop load on productpage → details, every fourth request by john, whom the policy denies. No two requests
/// look the same to the check cache.
struct Load {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<anyhow::Result<Vec<Answer>>>,
}

impl Load {
    fn start(mesh: &Mesh) -> anyhow::Result<Load> {
        let from = mesh.instance("productpage-v1-0")?.http_proxy();
        let url = format!("{from}/details/0");
        let load = LOADS.fetch_add(1, Ordering::SeqCst);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let client = Client::new();
            let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
            let mut requests = tokio::task::JoinSet::new();
            for number in 0_u64.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                ticks.tick().await;
                let (client, url) = (client.clone(), url.clone());
                let is_john = number % 4 == 0;
                requests.spawn(async move {
                    let user = if is_john {
                        "john".to_owned()
                    } else {
                        format!("user-{load}-{number}")
                    };
                    let sent = Instant::now();
                    let headers = [("host", "details:9080"), ("x-user", &*user)];
                    let response = client.get_with(&url, &headers).await?;
                    anyhow::Ok(Answer {
                        sent,
                        took: sent.elapsed(),
                        status: response.status,
                        is_john,
                    })
                });
            }
            requests.join_all().await.into_iter().collect()
        });
        Ok(Load { stop, task })
    }

    /// Answers to requests sent until now.
    async fn finish(self) -> anyhow::Result<Vec<Answer>> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await?
    }
}

fn signal(process: &Process, signal: Signal) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(process.id().cast_signed()), signal)?)
}

/// The median and the longest wait.
fn waits(answers: &[Answer]) -> (Duration, Duration) {
    let mut all: Vec<Duration> = answers.iter().map(|a| a.took).collect();
    all.sort();
    let at = |share: usize| all.get(all.len() * share / 100).copied();
    (
        at(50).unwrap_or_default(),
        all.last().copied().unwrap_or_default(),
    )
}

/// Without Mixer: everything passes, or everything is refused as unavailable. `john` may be told his cached refusal.
fn check_without(answers: &[Answer], open: bool) -> anyhow::Result<()> {
    anyhow::ensure!(answers.len() > 20, "only {} answers", answers.len());
    for answer in answers {
        let expected: &[u16] = match (open, answer.is_john) {
            (true, false) => &[200],
            (true, true) => &[200, 403],
            (false, false) => &[503],
            (false, true) => &[503, 403],
        };
        anyhow::ensure!(
            expected.contains(&answer.status),
            "fail {}: {answer:?}",
            if open { "open" } else { "closed" }
        );
    }
    Ok(())
}

/// Until the verdicts are Mixer's again.
async fn recovered(mesh: &Mesh, client: &Client) -> anyhow::Result<()> {
    let url = format!(
        "{}/details/0",
        mesh.instance("productpage-v1-0")?.http_proxy()
    );
    eventually(Duration::from_secs(15), async || {
        for (user, expected) in [("mary", 200), ("john", 403)] {
            let headers = [("host", "details:9080"), ("x-user", user)];
            let status = client.get_with(&url, &headers).await?.status;
            anyhow::ensure!(status == expected, "{user} gets {status}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a49_a_mixer_that_hangs_dies_or_is_slow_under_load() -> anyhow::Result<()> {
    // A mesh for each: connections between proxies keep the fail policy they were accepted with until they are drained.
    for open in [false, true] {
        let (mut mesh, client) = bookinfo(Options::default()).await?;
        // As it comes it fails open, and what changes nothing makes no generation to wait for.
        if !open {
            mesh.apply("mesh.yaml", &fail_open(open)).await?;
        }
        mesh.apply("deny.yaml", DENY_JOHN).await?;
        recovered(&mesh, &client).await?;
        // What the machine itself takes: the limits below are in addition to it.
        let load = Load::start(&mesh)?;
        tokio::time::sleep(CHECK_TIMEOUT).await;
        let usual = waits(&load.finish().await?);
        let longest_allowed = CHECK_TIMEOUT + Duration::from_millis(500) + 2 * usual.1;
        let median_allowed = Duration::from_millis(50) + 2 * usual.0;

        // It hangs: its sockets are open, and nothing answers.
        let load = Load::start(&mesh)?;
        signal(&mesh.mixer, Signal::SIGSTOP)?;
        let stopped = Instant::now();
        tokio::time::sleep(3 * CHECK_TIMEOUT).await;
        signal(&mesh.mixer, Signal::SIGCONT)?;
        let answers = load.finish().await?;
        let (_, longest) = waits(&answers);
        assert!(
            longest < longest_allowed,
            "a request waited {longest:?}, without trouble {usual:?}"
        );
        // Those that came before anybody knew have waited for the whole timeout; later ones need not.
        let settled = stopped + CHECK_TIMEOUT + Duration::from_millis(300);
        let later: Vec<Answer> = answers
            .iter()
            .copied()
            .filter(|a| a.sent > settled && a.sent + a.took < stopped + 3 * CHECK_TIMEOUT)
            .collect();
        check_without(&later, open)?;
        let (median, _) = waits(&later);
        assert!(
            median < median_allowed,
            "half of the requests wait {median:?} for a Mixer that hangs"
        );
        recovered(&mesh, &client).await?;

        // It runs a fifth of the time. Whoever gets through has Mixer's verdict; nobody is let through by mistake.
        let load = Load::start(&mesh)?;
        for _ in 0..8 {
            signal(&mesh.mixer, Signal::SIGSTOP)?;
            tokio::time::sleep(Duration::from_millis(200)).await;
            signal(&mesh.mixer, Signal::SIGCONT)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for answer in load.finish().await? {
            let is_right = match (open, answer.is_john) {
                (_, false) => answer.status == 200 || (!open && answer.status == 503),
                (true, true) => [403, 200].contains(&answer.status),
                (false, true) => [403, 503].contains(&answer.status),
            };
            assert!(is_right, "slow, fail open {open}: {answer:?}");
        }
        recovered(&mesh, &client).await?;

        // It is killed.
        let load = Load::start(&mesh)?;
        mesh.mixer.crash()?;
        let killed = Instant::now();
        tokio::time::sleep(CHECK_TIMEOUT).await;
        let answers = load.finish().await?;
        let later: Vec<Answer> = answers
            .iter()
            .copied()
            .filter(|a| a.sent > killed + Duration::from_millis(200))
            .collect();
        check_without(&later, open)?;
        let (median, _) = waits(&later);
        assert!(
            median < median_allowed,
            "half of the requests wait {median:?} for a Mixer that is gone"
        );
        mesh.mixer.restart()?;
        recovered(&mesh, &client).await?;
    }
    Ok(())
}
