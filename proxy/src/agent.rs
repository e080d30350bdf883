//! The agent of a stock Envoy: gives it certificates over SDS, runs it, drains it, ends with it.
//!
//! `bootstrap` (what Envoy was told) → `sds` on `socket` (where Envoy asks for secrets) → `child` (the process)
//! → `admin` (asking Envoy to drain). Restarts nothing: whoever started us sees Envoy's exit status and decides.

mod bootstrap;
mod sds;
mod socket;
mod child;
mod admin;

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use lateen_service::identity::Source;
use lateen_service::shutdown::Drain;

pub use bootstrap::BootstrapError;

/// How Envoy is run.
#[derive(Clone, Debug)]
pub struct EnvoyArgs {
    /// The program.
    pub envoy: PathBuf,
    /// Its bootstrap, YAML or JSON; Envoy gets this very file.
    pub bootstrap: PathBuf,
    /// `--concurrency`; Envoy's own default when absent.
    pub concurrency: Option<u32>,
    /// `--base-id`; hot restart is switched off when absent, so that any number of Envoys share a machine.
    pub base_id: Option<u32>,
    /// Further arguments, as they are.
    pub extra: Vec<String>,
    /// How long connections may take to end by themselves once stopping begins.
    pub drain_time: Duration,
}

/// Why Envoy was not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its bootstrap.
    #[error("the bootstrap cannot be used")]
    Bootstrap(#[from] BootstrapError),
    /// The socket for secrets.
    #[error("cannot serve secrets on {0}")]
    Socket(PathBuf, #[source] io::Error),
    /// Starting it.
    #[error("cannot start {0}; is it Envoy's executable?")]
    Start(PathBuf, #[source] io::Error),
    /// Waiting for it.
    #[error("cannot wait for Envoy")]
    Wait(#[source] io::Error),
}

/// After the polite signal, before the other one.
const KILL_AFTER: Duration = Duration::from_secs(5);

/// Serves secrets from `identity`, runs Envoy until it ends or `drain` begins, and says how it ended. When
/// stopping: Envoy drains (at most `drain_time`), gets SIGTERM, and after 5 s more SIGKILL. If this
/// future is dropped, Envoy is killed.
///
/// Call it from the main runtime: Envoy ends with the thread that started it.
///
/// # Errors
/// When Envoy could not be run. Envoy failing is an [`ExitStatus`], see [`exit_code`].
pub async fn run_envoy(
    args: EnvoyArgs,
    identity: Option<Source>,
    drain: &Drain,
) -> Result<ExitStatus, AgentError> {
    let bootstrap = bootstrap::read(&args.bootstrap).await?;
    let _secrets = match (identity, &bootstrap.sds_socket) {
        (Some(identity), Some(path)) => {
            sds::serve(path, &identity).map_err(|error| AgentError::Socket(path.clone(), error))?
        }
        (Some(_), None) => {
            tracing::warn!(
                "the bootstrap has no cluster sds-grpc; Envoy will not get our certificate"
            );
            None
        }
        (None, Some(path)) => {
            tracing::warn!(path = %path.display(), "no identity (--auth-address): serving no secrets");
            None
        }
        (None, None) => None,
    };

    let mut envoy =
        child::start(&args).map_err(|error| AgentError::Start(args.envoy.clone(), error))?;
    tracing::info!(pid = envoy.id(), envoy = %args.envoy.display(), "Envoy started");
    // Both are cancel-safe: an exit not waited for stays to be waited for.
    tokio::select! {
        status = envoy.wait() => return status.map_err(AgentError::Wait).inspect(report),
        () = drain.stopping() => {}
    }

    if let Some(endpoint) = &bootstrap.admin {
        tokio::select! {
            status = envoy.wait() => return status.map_err(AgentError::Wait).inspect(report),
            () = admin::drain(endpoint, args.drain_time) => {}
        }
    }
    child::terminate(&envoy);
    let status = match tokio::time::timeout(KILL_AFTER, envoy.wait()).await {
        Ok(status) => status,
        Err(_) => {
            tracing::warn!("Envoy did not end on SIGTERM; killing it");
            match envoy.kill().await {
                Ok(()) => envoy.wait().await,
                Err(error) => Err(error),
            }
        }
    };
    status.map_err(AgentError::Wait).inspect(report)
}

/// The exit code to end with, as a shell would say it: 128 + N for signal N.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

fn report(status: &ExitStatus) {
    tracing::info!(%status, "Envoy ended");
}

#[cfg(test)]
mod tests;
