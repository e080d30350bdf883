//! `lateen test`: unit tests of policy, which `mixer test` runs.

use std::ffi::OsString;

use anyhow::Context as _;
use e2e::process;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The folder, and what `mixer test --help` lists.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "DIR"
    )]
    arguments: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mixer = process::program("mixer")?;
    let status = std::process::Command::new(&mixer)
        .arg("test")
        .args(&options.arguments)
        .status()
        .with_context(|| format!("cannot run {}", mixer.display()))?;
    anyhow::ensure!(status.success(), "mixer test says no");
    Ok(())
}
