//! Envoy's process. The one place of the agent that talks to the kernel without a safe wrapper.

use std::io;

use tokio::process::{Child, Command};

use super::EnvoyArgs;

/// Starts Envoy. It is killed when the handle is dropped, and by the kernel when our thread is gone, so that
/// no Envoy outlives its agent, however that one ends.
pub(super) fn start(args: &EnvoyArgs) -> io::Result<Child> {
    let mut command = Command::new(&args.envoy);
    command.arg("-c").arg(&args.bootstrap);
    if let Some(concurrency) = args.concurrency {
        command.arg("--concurrency").arg(concurrency.to_string());
    }
    match args.base_id {
        Some(id) => command.arg("--base-id").arg(id.to_string()),
        None => command.arg("--disable-hot-restart"),
    };
    // Envoy tells clients to leave at moments spread over its own drain time, which is 600 s unless said.
    // Immediately instead: the drain of the agent is short.
    command.args(["--drain-strategy", "immediate", "--drain-time-s"]);
    command.arg(args.drain_time.as_secs().to_string());
    command.args(&args.extra).kill_on_drop(true);
    // A group of its own: Ctrl-C on a terminal reaches us alone, and we drain before Envoy hears of it.
    command.process_group(0);
    die_with_parent(&mut command);
    command.spawn()
}

#[cfg(target_os = "linux")]
#[allow(
    unsafe_code,
    reason = "the standard library has no safe form of PR_SET_PDEATHSIG"
)]
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made (prctl, getppid), nothing is
    // allocated or locked, and the closure owns all it touches.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may be gone already, before the line above took effect.
            if u32::try_from(libc::getppid()) != Ok(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_command: &mut Command) {}

/// Sends SIGTERM, unless it has ended.
#[allow(unsafe_code, reason = "the standard library can only send SIGKILL")]
pub(super) fn terminate(child: &Child) {
    // Not reaped, so the number still means this process and no other.
    if let Some(pid) = child.id().and_then(|pid| libc::pid_t::try_from(pid).ok()) {
        // SAFETY: kill has no memory effects; the pid is that of our own unreaped child.
        if unsafe { libc::kill(pid, libc::SIGTERM) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "cannot signal Envoy");
        }
    }
}
