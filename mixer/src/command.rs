//! What `mixer` does besides serving: expressions tried by hand and calls to a running Mixer.

pub mod attributes;
pub mod client;
pub mod eval;
pub mod test;
pub mod validate;

use crate::Args;

/// Attribute-based policy and telemetry.
#[derive(Debug, clap::Parser)]
#[command(name = "mixer", version)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What to do; without one, serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: Args,
}

/// What to do instead of serving.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Evaluate an expression, or a file of them.
    Eval(eval::Options),
    /// Ask a running Mixer about a request.
    Check(client::CheckOptions),
    /// Tell a running Mixer what happened.
    Report(client::ReportOptions),
    /// Run unit tests of policy and quota.
    Test(test::Options),
    /// Check configuration as Mixer would.
    Validate(validate::Options),
}

impl Command {
    /// Does it.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub async fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Eval(options) => eval::run(&options, &mut std::io::stdout().lock()),
            Command::Check(options) => client::check(&options, &mut std::io::stdout()).await,
            Command::Report(options) => client::report(&options, &mut std::io::stdout()).await,
            Command::Test(options) => test::run(&options, &mut std::io::stdout()).await,
            Command::Validate(options) => validate::run(&options, &mut std::io::stdout().lock()),
        }
    }
}
