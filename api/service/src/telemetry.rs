//! Logging: to standard error, filtered by `--log-level`, as text for people or JSON for machines.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Flags about logging.
#[derive(Clone, Debug, clap::Args)]
pub struct TelemetryArgs {
    /// What to log: a level, or `target=level` pairs separated by commas.
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "info",
        env = "LATEEN_LOG",
        global = true
    )]
    pub log_level: String,
    /// How to write log lines.
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    pub log_format: LogFormat,
}

impl Default for TelemetryArgs {
    fn default() -> Self {
        Self {
            log_level: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `--log-level` does not parse.
    #[error("--log-level is not a list of target=level")]
    Filter(#[source] tracing_subscriber::filter::ParseError),
    /// Somebody installed a subscriber before.
    #[error("logging is already set up")]
    Installed(#[source] tracing_subscriber::util::TryInitError),
}

/// Says each failed attempt as an error, where we say the outage once. A level of its own in the filter brings it back.
const UNTOLD: &str = "kube_client=off";

/// Starts logging for the program `name`.
///
/// # Errors
/// When the filter does not parse, or logging was started before.
pub fn init(name: &str, args: &TelemetryArgs) -> Result<(), TelemetryError> {
    let levels = format!("{UNTOLD},{}", args.log_level);
    let filter = EnvFilter::try_new(levels).map_err(TelemetryError::Filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr);
    match args.log_format {
        LogFormat::Text => builder
            .with_ansi(stderr().is_terminal())
            .finish()
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    }
    .map_err(TelemetryError::Installed)?;
    tracing::info!(
        program = name,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    Ok(())
}
