//! `lateen completion`: what a shell needs to complete commands and flags.

use std::io::Write as _;
use std::process::ExitCode;

/// Print a script that completes commands, for a shell's own folder of such.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// bash, zsh, fish, elvish or powershell.
    shell: clap_complete::Shell,
}

/// Does it, for the commands of `cli`.
pub(crate) fn run(options: &Options, mut cli: clap::Command) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut cli, "lateen", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
