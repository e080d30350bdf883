//! An adapter as a program: `main` of a crate that `lateen adapter new` made.
//!
//! ```text
//! NAME test FILE...          cases in YAML, as the module `kit` has them
//! NAME serve [--address A]   Istio's out-of-process protocol, until SIGINT or SIGTERM
//! NAME config [--address A]  the objects that tell a Mixer of it
//! ```

use std::{io::Write as _, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, Subcommand};

use crate::{adapter::Adapter, kit::Kit, serve};

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run cases of the test kit.
    Test {
        /// Files of cases.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Serve the adapter to Mixers.
    Serve {
        /// Where.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9070")]
        address: SocketAddr,
    },
    /// Print the objects that tell a Mixer of the adapter.
    Config {
        /// Where it is served.
        #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9070")]
        address: String,
        /// Where the objects are to be.
        #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
        namespace: String,
    },
}

/// Does what the command line says with `adapter`.
pub fn main(adapter: Arc<dyn Adapter>) -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return said(&format!("no runtime: {error}")),
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Test { files } => test(adapter, &files).await,
            Command::Serve { address } => {
                tracing_subscriber::fmt()
                    .with_writer(std::io::stderr)
                    .init();
                let served = serve::serve_on(adapter, address).await;
                served.map_err(|e| format!("{address}: {e}"))
            }
            Command::Config { address, namespace } => {
                let text = serve::describe::yaml(adapter.info(), &address, &namespace);
                let written = std::io::stdout().write_all(text.as_bytes());
                written.map_err(|e| e.to_string())
            }
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => said(&reason),
    }
}

async fn test(adapter: Arc<dyn Adapter>, files: &[PathBuf]) -> Result<(), String> {
    let kit = Kit::new(adapter);
    let mut failed = 0;
    for file in files {
        let at = |reason: &dyn std::fmt::Display| format!("{}: {reason}", file.display());
        let text = std::fs::read_to_string(file).map_err(|e| at(&e))?;
        let differences = kit.run(&text).await.map_err(|e| at(&e))?;
        failed += differences.len();
        for difference in differences {
            said(&at(&difference));
        }
    }
    match failed {
        0 => Ok(()),
        n => Err(format!("{n} cases went differently")),
    }
}

fn said(reason: &str) -> ExitCode {
    // There is nobody to tell when this cannot be written.
    drop(writeln!(std::io::stderr(), "{reason}"));
    ExitCode::FAILURE
}
