//! One program of the mesh as a child process, its output in a log file.

use std::{
    fs::File,
    io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long a program gets after SIGTERM before SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
/// A program that ends sooner than this after its start is not started again.
const SHORT_LIFE: Duration = Duration::from_secs(5);

/// Where the programs are: `LATEEN_BIN_DIR`, else beside the running program (or its parent folder,
/// where cargo puts them when the running program is a test).
///
/// # Errors
/// `name` is in none of them.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let mut folders = Vec::new();
    if let Some(folder) = std::env::var_os("LATEEN_BIN_DIR") {
        folders.push(PathBuf::from(folder));
    }
    let own = std::env::current_exe()?;
    folders.extend(own.ancestors().skip(1).take(2).map(Path::to_owned));
    folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no program {name:?} in {folders:?}; build it first: cargo build --workspace --bins"
            )
        })
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name in logs and file names.
    pub name: String,
    /// The program.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment variables beside the inherited ones.
    pub env: Vec<(String, String)>,
    /// Puts the program in a process group of its own, so that a Ctrl-C meant for us does not reach it.
    pub own_group: bool,
}

/// A running program; ended when dropped.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    log: PathBuf,
    child: Child,
    started: Instant,
}

impl Process {
    /// Starts it; output is appended to `LOGS/NAME.log`.
    ///
    /// # Errors
    /// The log cannot be written or the program cannot be started.
    pub fn start(spec: Spec, logs: &Path) -> anyhow::Result<Process> {
        let log = logs.join(format!("{}.log", spec.name));
        let child = spawn(&spec, &log)?;
        Ok(Process {
            spec,
            log,
            child,
            started: Instant::now(),
        })
    }

    /// Name it was started under.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has printed so far.
    pub fn output(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Its exit status if it has ended.
    ///
    /// # Errors
    /// The operating system does not say.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// An error with the last lines of the log if it has ended.
    ///
    /// # Errors
    /// It has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let output = self.output();
        let lines: Vec<_> = output.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        anyhow::bail!(
            "{} {}; its last lines:\n{tail}",
            self.spec.name,
            how_ended(status)
        )
    }

    /// Starts it again if it has ended, and says how it ended.
    ///
    /// # Errors
    /// It cannot be started, or it ended right after its start: then it would again.
    pub fn restart_if_ended(&mut self) -> anyhow::Result<Option<String>> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(None);
        };
        if self.started.elapsed() < SHORT_LIFE {
            self.check()?;
        }
        self.restart()?;
        Ok(Some(format!("{} {}", self.spec.name, how_ended(status))))
    }

    /// Ends it at once, as a crash would.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn crash(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Starts it again with the same arguments; it must have ended.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.child = spawn(&self.spec, &self.log)?;
        self.started = Instant::now();
        Ok(())
    }

    /// Sends SIGTERM; `stopped` or the drop waits for the end.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
    }

    /// Waits for the end, SIGKILL after a grace period.
    pub fn stopped(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + GRACE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                _ => break,
            }
        }
        tracing::warn!(
            program = self.spec.name,
            "did not end within {GRACE:?}; killing it"
        );
        drop(self.child.kill());
        self.child.wait().ok()
    }

    fn signal(&mut self, signal: Signal) {
        if let (Ok(None), Ok(id)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            // It may have ended in between, which is what was wanted.
            kill(Pid::from_raw(id), signal).ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.terminate();
        self.stopped();
    }
}

fn how_ended(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("was ended by signal {signal}"),
        None => format!("exited with {}", status.code().unwrap_or(-1)),
    }
}

fn spawn(spec: &Spec, log: &Path) -> anyhow::Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(&spec.path);
    command
        .args(&spec.args)
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    if spec.own_group {
        command.process_group(0);
    }
    end_with_us(&mut command);
    command
        .spawn()
        .with_context(|| format!("cannot start {}", spec.path.display()))
}

/// Whoever kills us (SIGKILL asks nobody) must not leave a dozen programs on their ports: the kernel sends
/// the program SIGTERM when the thread ends that started it. That thread must live as long as we do.
#[cfg(target_os = "linux")]
#[allow(
    unsafe_code,
    reason = "one system call of the child before it becomes the program"
)]
fn end_with_us(command: &mut Command) {
    use std::os::unix::process::CommandExt as _;
    let before_exec = || nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from);
    // SAFETY: between fork and exec only prctl(2) is called, which takes no lock and no memory.
    unsafe { command.pre_exec(before_exec) };
}

#[cfg(not(target_os = "linux"))]
fn end_with_us(_: &mut Command) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn what_we_started_ends_with_us() {
        let logs = tempfile::tempdir().unwrap();
        let folder = logs.path().to_owned();
        let starter = std::thread::spawn(move || {
            let spec = Spec {
                name: "long".to_owned(),
                path: "/bin/sleep".into(),
                args: vec!["60".to_owned()],
                env: Vec::new(),
                own_group: false,
            };
            Process::start(spec, &folder).unwrap()
        });
        // To the kernel the thread is who started it.
        let mut process = starter.join().unwrap();
        let status = process.child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32));
    }

    #[test]
    fn what_ends_right_after_its_start_is_not_started_again() {
        let logs = tempfile::tempdir().unwrap();
        let spec = Spec {
            name: "brief".to_owned(),
            path: "/bin/sh".into(),
            args: vec!["-c".to_owned(), "echo no port; exit 3".to_owned()],
            env: Vec::new(),
            own_group: false,
        };
        let mut process = Process::start(spec, logs.path()).unwrap();
        process.child.wait().unwrap();
        let error = process.restart_if_ended().unwrap_err().to_string();
        assert!(error.contains("brief exited with 3"), "{error}");
        assert!(error.contains("no port"), "{error}");

        process.started -= SHORT_LIFE;
        let said = process.restart_if_ended().unwrap();
        assert_eq!(said.as_deref(), Some("brief exited with 3"));
    }
}
