//! A network namespace: a thread that lives in it and does what it is told.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{Pid, gettid},
};

type Job = Box<dyn FnOnce() + Send>;

/// The namespace lives as long as this, its clones, or what was started in it.
#[derive(Clone)]
pub(crate) struct Namespace {
    thread: Pid,
    jobs: Arc<Sender<Job>>,
}

impl Namespace {
    pub(crate) fn new() -> nix::Result<Namespace> {
        let (jobs, inbox) = channel::<Job>();
        let (told, made) = channel();
        std::thread::spawn(move || {
            // Of this thread alone; threads and programs that it starts inherit it.
            let entered = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid());
            told.send(entered).unwrap();
            if entered.is_ok() {
                for job in inbox {
                    job();
                }
            }
        });
        Ok(Namespace {
            thread: made.recv().unwrap()?,
            jobs: Arc::new(jobs),
        })
    }

    /// What `ip … netns` takes.
    pub(crate) fn id(&self) -> Pid {
        self.thread
    }

    /// Runs `job` inside.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job = Box::new(move || done.send(job()).unwrap());
        self.jobs.send(job).unwrap();
        result.recv().expect("the job does not panic")
    }

    /// Runs a line of shell; gives what it prints.
    pub(crate) fn try_sh(&self, line: &str) -> Result<String, String> {
        let line = line.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            match output.status.success() {
                true => Ok(text(&output.stdout)),
                false => Err(format!("{line}: {}", text(&output.stderr))),
            }
        })
    }

    pub(crate) fn sh(&self, line: &str) -> String {
        self.try_sh(line).unwrap()
    }

    /// Starts a program as `owner` (user, group); it ends when dropped.
    pub(crate) fn start(
        &self,
        program: PathBuf,
        arguments: Vec<String>,
        owner: (u32, u32),
        log: &Path,
    ) -> Child {
        use std::os::unix::process::CommandExt as _;
        let log = File::create(log).unwrap();
        self.run(move || {
            let child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .gid(owner.1)
                .uid(owner.0)
                .spawn();
            Child(child.unwrap())
        })
    }
}

pub(crate) struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
