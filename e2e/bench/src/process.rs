//! Child processes under measurement: where they run, what the kernel says they used.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    time::{ClockId, clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

/// The processor of the proxies.
pub(crate) const PROXY_CPU: usize = 0;
/// The processor of load and upstream.
pub(crate) const LOAD_CPU: usize = 1;

/// The CPU clock of a process: nanoseconds of all its threads, ended ones too, user and system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuClock(ClockId);

impl CpuClock {
    pub(crate) fn of(process: u32) -> anyhow::Result<CpuClock> {
        Ok(CpuClock(clock_getcpuclockid(Pid::from_raw(
            process.cast_signed(),
        ))?))
    }

    pub(crate) fn sum(clocks: &[CpuClock]) -> anyhow::Result<u64> {
        clocks.iter().try_fold(0, |sum, CpuClock(id)| {
            let time = Duration::from(clock_gettime(*id).context("a process has ended")?);
            Ok(sum + time.as_nanos() as u64)
        })
    }
}

/// Binds the calling thread, and threads it will start, to one processor.
pub(crate) fn use_processor(number: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(number)?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .context("this machine does not have two processors for us")?;
    Ok(())
}

/// Lets this process and its children open as many files as the system allows; how many that is.
pub(crate) fn raise_file_limit() -> anyhow::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Resident memory, KiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    /// The part that is no file's.
    pub(crate) anonymous: u64,
}

/// A process that ends with this value.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts `command` on one processor, its output in `log`.
    pub(crate) fn start(
        program: &Path,
        arguments: &[String],
        processor: usize,
        log: PathBuf,
    ) -> anyhow::Result<Running> {
        let file = File::create(&log)?;
        let child = Command::new("taskset")
            .arg("-c")
            .arg(processor.to_string())
            .arg(program)
            .args(arguments)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("taskset (util-linux) is needed")?;
        Ok(Running { child, log })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn clock(&self) -> anyhow::Result<CpuClock> {
        CpuClock::of(self.id())
    }

    /// An error with the first words of the log if it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let said: Vec<_> = log.lines().take(8).collect();
            let said = said.join("\n");
            anyhow::bail!("a process ended with {status}:\n{said}");
        }
        Ok(())
    }

    /// Waits until `port` takes connections.
    pub(crate) fn listens(&mut self, port: SocketAddr, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        while TcpStream::connect(port).is_err() {
            self.check()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "{port} takes no connections after {limit:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| {
                    line.strip_prefix(name)?
                        .split_whitespace()
                        .next()?
                        .parse()
                        .ok()
                })
                .with_context(|| format!("no {name} in /proc"))
        };
        Ok(Memory {
            resident: field("VmRSS:")?,
            anonymous: field("RssAnon:")?,
        })
    }

    /// Ends it as an operator would; for programs that write something when they end.
    pub(crate) fn finish(mut self, limit: Duration) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.id().cast_signed()), Signal::SIGTERM)?;
        let deadline = Instant::now() + limit;
        while self.child.try_wait()?.is_none() {
            anyhow::ensure!(Instant::now() < deadline, "a process does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Gives all threads of processes real-time priority, or takes it back; false when that is not allowed.
pub(crate) fn real_time(processes: impl IntoIterator<Item = u32>, on: bool) -> bool {
    let policy: &[&str] = if on {
        &["-r", "-p", "1"]
    } else {
        &["-o", "-p", "0"]
    };
    processes.into_iter().all(|process| {
        Command::new("chrt")
            .arg("-a")
            .args(policy)
            .arg(process.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}
