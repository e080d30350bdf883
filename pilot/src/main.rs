//! The program `pilot`: flags, build, run, drain; or one of its tools.

use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use lateen_service::shutdown::{self, Drain};
use lateen_service::telemetry::{self, TelemetryArgs};
use pilot::server::{Config, Pilot};
use pilot::tool::{Tool, ToolError};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long streams and tasks get to end.
const DRAIN: Duration = Duration::from_secs(10);

/// Discovery and routing rules into Envoy configuration, served over xDS.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Args {
    #[command(subcommand)]
    tool: Option<Tool>,
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    telemetry: TelemetryArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Not `Option<Config>`: clap takes a group of flags with a group inside for absent whatever is written.
    let matches = Args::command().get_matches();
    if matches.subcommand().is_some() {
        let tool = Tool::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        return match tool.run(&mut std::io::stdout().lock(), &mut std::io::stderr().lock()) {
            // Who reads has seen enough.
            Err(ToolError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                Ok(())
            }
            done => Ok(done?),
        };
    }
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    telemetry::init("pilot", &args.telemetry)?;
    lateen_service::init_crypto();
    let stop = shutdown::signal()?;
    let drain = Drain::new();
    let _pilot = Pilot::start(&args.config, &drain).await?;
    stop.await;
    drain.finish(DRAIN).await;
    Ok(())
}
