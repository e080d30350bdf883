//! `-o`: what is for programs.

use std::io::Write as _;

use anyhow::Context as _;
use serde_json::Value;

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    Yaml,
    Json,
}

impl Format {
    /// `value` on standard output.
    pub(crate) fn print(self, value: &Value) -> anyhow::Result<()> {
        let text = match self {
            Format::Json => serde_json::to_string_pretty(value)? + "\n",
            Format::Yaml => serde_saphyr::to_string(value).context("cannot be written as YAML")?,
        };
        std::io::stdout().lock().write_all(text.as_bytes())?;
        Ok(())
    }
}
