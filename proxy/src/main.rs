//! The proxy's program: parse, build, run, drain.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use lateen_service::{identity::Source, shutdown};
use proxy::{
    agent,
    config::{Command, Mode, Options},
    iptables,
    logging::Logging,
    server::{self, Server},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// For xDS, admin, secrets and export; the data path has threads of its own.
const MAIN_THREADS: usize = 2;

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if let Some(Command::Iptables(command)) = &options.command {
        print!("{}", iptables::run(command)?);
        return Ok(ExitCode::SUCCESS);
    }
    lateen_service::init_crypto();
    let logging = Logging::start(&options.log_level, options.log_format == "json")
        .map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(MAIN_THREADS)
        .thread_name("main")
        .enable_all()
        .build()?;
    if options.mode == Mode::Validate {
        server::validate(&options, runtime.handle().clone())?;
        println!("configuration OK");
        return Ok(ExitCode::SUCCESS);
    }
    runtime.block_on(async {
        let stop = shutdown::signal()?;
        if options.envoy.is_some() {
            return run_envoy(&options, stop).await;
        }
        let server = Server::start(&options, logging).await?;
        server.run(stop).await;
        Ok(ExitCode::SUCCESS)
    })
}

/// `--envoy`: the same program as the agent of a stock Envoy.
async fn run_envoy(
    options: &Options,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<ExitCode> {
    let drain = shutdown::Drain::new();
    let identity = Source::start(&options.identity, &drain)?;
    let args = options.envoy().context("--envoy needs --config-path")?;
    let stopping = drain.clone();
    drain.spawn_until_stop(async move {
        stop.await;
        stopping.begin();
    });
    let status = agent::run_envoy(args, identity, &drain).await?;
    Ok(agent::exit_code(status).into())
}
