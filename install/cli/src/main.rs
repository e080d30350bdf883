//! `lateen`, the operator's command line. It only calls the other programs and their interfaces.

mod proxy_status;
mod terminal;
mod test;
mod up;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(version, about = "Runs and looks after a Lateen mesh")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole mesh with a sample application on this machine, until Ctrl-C.
    Up(up::Options),
    /// Show for every proxy whether it has taken over what Pilot sent.
    ProxyStatus(proxy_status::Options),
    /// Run unit tests of policy and quota, without a mesh.
    Test(test::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    let outcome = match Cli::parse().command {
        Command::Up(options) => up::run(options).await,
        Command::ProxyStatus(options) => proxy_status::run(options).await,
        Command::Test(options) => test::run(&options),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", terminal::red("error:"));
            std::process::ExitCode::FAILURE
        }
    }
}
