//! `auth`: parse, build, run, drain.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use auth::{Cli, Command, ServeArgs};
use clap::Parser as _;
use lateen_service::shutdown::{self, Drain};
use lateen_service::telemetry;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Requests under way when told to stop get this long.
const DRAIN: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    lateen_service::init_crypto();
    let cli = Cli::parse();
    match cli.command {
        Some(Command::JoinToken(args)) => {
            println!("{}", *auth::join_token(&args, SystemTime::now())?);
            Ok(())
        }
        Some(Command::Serve(args)) => serve(args, &cli.telemetry),
        None => serve(cli.serve.context("--state is needed")?, &cli.telemetry),
    }
}

#[tokio::main]
async fn serve(args: ServeArgs, logging: &telemetry::TelemetryArgs) -> anyhow::Result<()> {
    telemetry::init("auth", logging)?;
    let stop = shutdown::signal()?;
    let drain = Drain::new();
    auth::start(args.into(), &drain).await?;
    stop.await;
    drain.finish(DRAIN).await;
    Ok(())
}
