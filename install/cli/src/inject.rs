//! `lateen inject`: adds sidecars to workloads in YAML.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use lateen_inject::{Outcome, Settings, inject_text, template};
use serde_json::Value;

/// Adds sidecars to all workloads of a file.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The file, `-` for what is piped in.
    #[arg(
        short = 'f',
        long,
        value_name = "FILE",
        required_unless_present = "print_template"
    )]
    filename: Option<PathBuf>,
    /// Where the result goes; printed otherwise. Written only when all went well.
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// YAML file with what all sidecars have in common, over the defaults.
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
    /// A template: `sidecar` replaces the built-in one, others are named by `inject.istio.io/templates`.
    #[arg(long, value_name = "NAME=FILE")]
    template: Vec<String>,
    /// Show the built-in template and end.
    #[arg(long)]
    print_template: bool,
    /// Image of the sidecar.
    #[arg(long)]
    image: Option<String>,
    /// Whether the sidecar is an init container that stays [default: for Jobs and CronJobs].
    #[arg(long, value_name = "BOOL")]
    native_sidecar: Option<bool>,
    /// Namespace of workloads that name none.
    #[arg(short = 'n', long, value_name = "NAME")]
    namespace: Option<String>,
    /// Name of the control plane's revision.
    #[arg(short = 'r', long, value_name = "NAME")]
    revision: Option<String>,
    /// Say what became of each object.
    #[arg(short = 'v', long)]
    verbose: bool,
}

/// Does it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if options.print_template {
        print!("{}", template::SIDECAR);
        return Ok(ExitCode::SUCCESS);
    }
    let settings = settings(options)?;
    let file = options.filename.as_ref().context("no --filename")?;
    let text = match file.to_str() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
        _ => read(file)?,
    };
    let injected = inject_text(&text, &settings).with_context(|| file.display().to_string())?;
    if options.verbose {
        for (line, object, outcome) in &injected.outcomes {
            let said = match outcome {
                Outcome::Injected(1) => "has a sidecar now".to_owned(),
                Outcome::Injected(n) => format!("{n} sidecars added"),
                Outcome::Left(why) => format!("left as it is: {why}"),
            };
            eprintln!("{}:{line}: {object}: {said}", file.display());
        }
    }
    match &options.output {
        Some(output) => {
            fs::write(output, injected.text).with_context(|| output.display().to_string())?;
        }
        None => std::io::stdout().write_all(injected.text.as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(options: &Options) -> anyhow::Result<Settings> {
    let mut settings: Settings = match &options.values {
        Some(file) => {
            serde_saphyr::from_str(&read(file)?).with_context(|| file.display().to_string())?
        }
        None => Settings::default(),
    };
    for template in &options.template {
        let (name, file) = template
            .split_once('=')
            .with_context(|| format!("--template {template:?} is not NAME=FILE"))?;
        let text = read(&PathBuf::from(file))?;
        let value: Value = serde_saphyr::from_str(&text).with_context(|| file.to_owned())?;
        settings.templates.insert(name.to_owned(), value);
    }
    let given = [
        (&mut settings.image, &options.image),
        (&mut settings.namespace, &options.namespace),
        (&mut settings.revision, &options.revision),
    ];
    for (setting, option) in given {
        if let Some(option) = option {
            setting.clone_from(option);
        }
    }
    if options.native_sidecar.is_some() {
        settings.native_sidecar = options.native_sidecar;
    }
    Ok(settings)
}

fn read(file: &PathBuf) -> anyhow::Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}
