//! `mixer`: attribute-based policy and telemetry.
//!
//! Without a subcommand it serves.

use std::time::Duration;

use clap::Parser as _;
use lateen_service::{init_crypto, shutdown, telemetry};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long requests under way may take after a signal.
const DRAIN: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = mixer::command::Cli::parse();
    if let Some(command) = cli.command {
        return command.run().await;
    }
    let args = cli.serve;
    telemetry::init("mixer", &args.telemetry)?;
    init_crypto();
    let stop = shutdown::signal()?;
    let running = mixer::start(&args, |built_in| built_in).await?;
    stop.await;
    running.stop(DRAIN).await;
    Ok(())
}
