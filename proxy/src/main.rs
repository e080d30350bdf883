//! The proxy's program: parse, build, run, drain.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Parser;
use lateen_service::{identity::Source, shutdown};
use proxy::{
    agent,
    allocator::Allocator,
    config::{Command, Mode, Options, WaitArgs},
    iptables,
    logging::Logging,
    server::{self, Server},
    sidecar::{self, Sidecar},
};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// For xDS, admin, secrets and export; the data path has threads of its own.
const MAIN_THREADS: usize = 2;

fn main() -> anyhow::Result<ExitCode> {
    let mut options = Options::parse();
    let mut status = None;
    match options.command.take() {
        None => {}
        Some(Command::Iptables(command)) => {
            print!("{}", iptables::run(&command)?);
            return Ok(ExitCode::SUCCESS);
        }
        Some(Command::Wait(args)) => return wait(args),
        Some(Command::Sidecar(args)) => {
            let sidecar = Sidecar::read(&args)?;
            options = sidecar.options;
            status = Some(sidecar.status);
        }
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
        let Some(status) = status else {
            server.run(stop).await;
            return Ok(ExitCode::SUCCESS);
        };
        let answering = status.bind(server.control().clone()).await?;
        // Both branches are cancel-safe: nothing comes after them.
        tokio::select! {
            () = server.run(stop) => {}
            () = answering => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// `proxy wait`.
fn wait(args: WaitArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let limit = Duration::from_secs(args.timeout);
    let ready = runtime.block_on(sidecar::wait_until_ready(limit));
    anyhow::ensure!(
        ready,
        "the sidecar is not ready after {limit:?}; its log says why"
    );
    Ok(ExitCode::SUCCESS)
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
