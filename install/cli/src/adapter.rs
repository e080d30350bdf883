//! `lateen adapter`: what the author of an adapter for Mixer needs.

mod scaffold;

use std::{
    path::{Path, PathBuf},
    process::Command as Process,
};

use anyhow::Context as _;
use clap::Subcommand;
use lateen_adapter::{Template, template, wit};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a crate of a new adapter.
    New(scaffold::Options),
    /// Run an adapter's cases (DIR/cases/*.yaml), without a mesh.
    Test {
        /// Folder of the adapter.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Serve an adapter to a mesh on this machine, until Ctrl-C.
    Run {
        /// Folder of the adapter.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// Folder of the mesh's configuration, as `lateen up` shows it; the adapter's objects go there as
        /// adapter-NAME.yaml, unless such a file is there already.
        #[arg(long, value_name = "DIR")]
        config_dir: Option<PathBuf>,
        /// Where it serves.
        #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9070")]
        address: std::net::SocketAddr,
    },
    /// Print the WIT package for adapters that are WebAssembly components.
    Wit {
        /// Templates the adapter takes; without any, all of them.
        #[arg(long, value_name = "TEMPLATE", value_delimiter = ',')]
        template: Vec<String>,
    },
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    match &options.command {
        Command::New(options) => scaffold::run(options),
        Command::Test { folder } => test(folder),
        Command::Run {
            folder,
            config_dir,
            address,
        } => serve(folder, config_dir.as_deref(), *address),
        Command::Wit { template } => {
            print!("{}", package(template)?);
            Ok(())
        }
    }
}

/// The templates called `names`.
fn templates(names: &[String]) -> anyhow::Result<Vec<&'static Template>> {
    if names.is_empty() {
        return Ok(template::ALL.to_vec());
    }
    let find = |name: &String| {
        let known = || {
            let known: Vec<_> = template::ALL.iter().map(|t| t.name).collect();
            known.join(", ")
        };
        template::find(name)
            .with_context(|| format!("there is no template {name}; there are {}", known()))
    };
    names.iter().map(find).collect()
}

fn package(names: &[String]) -> anyhow::Result<String> {
    let interfaces = templates(names)?.into_iter().map(wit::interface);
    Ok(wit::package(&interfaces.collect::<Result<Vec<_>, _>>()?))
}

/// Cargo, in the adapter's folder, running its program.
fn cargo(folder: &Path) -> Process {
    let mut cargo = Process::new("cargo");
    cargo.current_dir(folder);
    cargo.args(["run", "--quiet", "--"]);
    cargo
}

fn cases(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cases = folder.join("cases");
    let entries = std::fs::read_dir(&cases).with_context(|| format!("no {}", cases.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "yaml") {
            files.push(Path::new("cases").join(path.file_name().unwrap_or_default()));
        }
    }
    anyhow::ensure!(!files.is_empty(), "{} has no *.yaml", cases.display());
    files.sort();
    Ok(files)
}

fn test(folder: &Path) -> anyhow::Result<()> {
    let files = cases(folder)?;
    let status = cargo(folder).arg("test").args(&files).status();
    let status = status.context("cannot run cargo; is Rust installed?")?;
    anyhow::ensure!(
        status.success(),
        "not all cases of {} pass",
        folder.display()
    );
    println!("{} files of cases pass", files.len());
    Ok(())
}

fn serve(
    folder: &Path,
    config_dir: Option<&Path>,
    address: std::net::SocketAddr,
) -> anyhow::Result<()> {
    if let Some(config_dir) = config_dir {
        let output = cargo(folder)
            .args(["config", "--address", &address.to_string()])
            .output()
            .context("cannot run cargo; is Rust installed?")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "it does not build: {complaint}");
        let name = folder.canonicalize()?;
        let name = name.file_name().unwrap_or_default().to_string_lossy();
        let file = config_dir.join(format!("adapter-{name}.yaml"));
        if file.exists() {
            println!("{} is there already and stays", file.display());
        } else {
            let next = config_dir.join(format!(".adapter-{name}.new"));
            std::fs::write(&next, &output.stdout)
                .and_then(|()| std::fs::rename(&next, &file))
                .with_context(|| format!("cannot write {}", file.display()))?;
            println!("{} tells the mesh of it", file.display());
        }
    }
    println!("serving at {address}, until Ctrl-C");
    let status = cargo(folder)
        .args(["serve", "--address", &address.to_string()])
        .status()
        .context("cannot run cargo; is Rust installed?")?;
    anyhow::ensure!(status.success(), "it ended: {status}");
    Ok(())
}
