//! `lateen`, the operator's command line. It only calls the other programs and their interfaces.

mod adapter;
mod analyze;
mod check;
mod cluster;
mod completion;
mod crds;
mod inject;
mod install;
mod output;
mod proxy_config;
mod proxy_status;
mod source;
mod terminal;
mod test;
mod up;
mod validate;
mod version;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

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
    /// Install the mesh in a Kubernetes cluster.
    Install(install::Options),
    /// Bring an installation to this version, or to other values.
    Upgrade(install::UpgradeOptions),
    /// Take away what `lateen install` applied, and nothing else.
    Uninstall(install::UninstallOptions),
    /// Say whether the mesh can be installed in a cluster, or whether what is installed is well.
    Check(check::Options),
    /// Show the version of this program, and of every component in a cluster.
    Version(version::Options),
    /// Print a script with which a shell completes commands.
    Completion(completion::Options),
    /// Show for every proxy whether it has taken over what Pilot sent.
    ProxyStatus(proxy_status::Options),
    /// Show what a proxy has loaded: listeners, routes, clusters, endpoints, secrets, bootstrap, levels of its log.
    ProxyConfig(proxy_config::Options),
    /// Run unit tests of policy and quota, without a mesh.
    Test(test::Options),
    /// Say what is wrong with configuration taken together, with Istio's codes.
    Analyze(analyze::Options),
    /// Make, test and run adapters for Mixer.
    Adapter(adapter::Options),
    /// Say whether configuration would be let in, and where it is wrong.
    Validate(validate::Options),
    /// Print the definitions of the kinds that the mesh reads, for `kubectl apply -f -`.
    Crds(crds::Options),
    /// Add sidecars to the workloads of a YAML file.
    Inject(inject::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Up(options) => up::run(options).await.map(done),
        Command::Install(options) => install::run(options).await,
        Command::Upgrade(options) => install::upgrade(options).await,
        Command::Uninstall(options) => install::uninstall(options).await,
        Command::Check(options) => check::run(options).await,
        Command::Version(options) => version::run(options).await,
        Command::Completion(options) => completion::run(&options, Cli::command()),
        Command::ProxyStatus(options) => proxy_status::run(options).await.map(done),
        Command::ProxyConfig(options) => proxy_config::run(options).await,
        Command::Test(options) => test::run(&options).map(done),
        Command::Analyze(options) => analyze::run(&options),
        Command::Adapter(options) => adapter::run(&options).map(done),
        Command::Validate(options) => validate::run(&options),
        Command::Crds(options) => crds::run(&options),
        Command::Inject(options) => inject::run(&options),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{} {error:#}", terminal::red("error:"));
            ExitCode::FAILURE
        }
    }
}

/// What needs no other word than that it has been done.
fn done((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
