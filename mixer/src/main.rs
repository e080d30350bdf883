//! `mixer`: attribute-based policy and telemetry.
//!
//! Without a subcommand it serves.

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use lateen_service::{init_crypto, shutdown, telemetry};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long requests under way may take after a signal.
const DRAIN: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = mixer::command::Cli::parse();
    if let Some(command) = cli.command {
        return Ok(match command.run().await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        });
    }
    let args = cli.serve;
    telemetry::init("mixer", &args.telemetry)?;
    init_crypto();
    let stop = shutdown::signal()?;
    let running = mixer::start(&args, |built_in| built_in).await?;
    stop.await;
    running.stop(DRAIN).await;
    Ok(ExitCode::SUCCESS)
}
