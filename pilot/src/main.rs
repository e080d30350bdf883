//! The program `pilot`: flags, build, run, drain.

use std::time::Duration;

use clap::Parser;
use lateen_service::shutdown::{self, Drain};
use lateen_service::telemetry::{self, TelemetryArgs};
use pilot::server::{Config, Pilot};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long streams and tasks get to end.
const DRAIN: Duration = Duration::from_secs(10);

/// Discovery and routing rules into Envoy configuration, served over xDS.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    config: Config,
    #[command(flatten)]
    telemetry: TelemetryArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    telemetry::init("pilot", &args.telemetry)?;
    lateen_service::init_crypto();
    let stop = shutdown::signal()?;
    let drain = Drain::new();
    let _pilot = Pilot::start(&args.config, &drain).await?;
    stop.await;
    drain.finish(DRAIN).await;
    Ok(())
}
