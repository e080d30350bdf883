//! `make bench`: our proxy beside stock Envoy and a plain TCP relay, from the same bootstrap files.
//!
//! The proxies have one processor, load and upstream the other. What counts is the proxies' CPU time,
//! which the kernel tells in nanoseconds, as a ratio to Envoy's and to the relay's in the same minutes.
//! `scenario` (what) → `bootstrap`, `certificates` → `process` (who) → `compare` (turns) → `load`, `upstream`,
//! `relay` → `report`, `plot`. Beside it `mixer`, `pilot`, `gate` (instruction
//! counts) and `soak`.

mod ads;
mod bootstrap;
mod certificates;
mod compare;
mod frame;
mod gate;
mod load;
mod mixer;
mod pilot;
mod plot;
mod process;
mod relay;
mod report;
mod scenario;
mod soak;
mod upstream;
mod wire;

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;

use crate::compare::{Findings, Settings};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the bare server is to have what Mixer has

const USAGE: &str = "\
usage: bench [--scenario NAME]... [--rounds N] [--seconds S] [--quick]
             [--proxy PATH] [--envoy PATH] [--json FILE] [--document FILE]
       bench gate [--accept] [--proxy PATH] [--mixer PATH]
       bench mixer [--scenario NAME]... [--rounds N] [--seconds S] [--distinct N] [--mixer PATH]
             [--json FILE] [--document FILE]
       bench pilot [--sizes N,N...] [--endpoints N] [--changes N] [--seconds S] [--pilot PATH] [--document FILE]
       bench soak [--seconds N] [--proxy PATH]";
/// Where `make` puts it.
const PROXY: &str = "target/release/proxy";

/// What `bench` without a subcommand does.
#[derive(Debug)]
struct Arguments {
    settings: Settings,
    quick: bool,
    json: Option<PathBuf>,
    document: Option<PathBuf>,
}

fn arguments(words: impl Iterator<Item = String>) -> anyhow::Result<Arguments> {
    let mut words = words;
    let mut arguments = Arguments {
        settings: Settings {
            ours: PROXY.into(),
            envoy: ".venv/envoy".into(),
            scenarios: Vec::new(),
            rounds: 5,
            window: Duration::from_millis(1500),
            idle_connections: 4000,
        },
        quick: false,
        json: None,
        document: None,
    };
    while let Some(flag) = words.next() {
        if flag == "--quick" {
            arguments.quick = true;
            arguments.settings.rounds = 2;
            arguments.settings.window = Duration::from_millis(600);
            arguments.settings.idle_connections = 1000;
            continue;
        }
        let value = words.next().context(USAGE)?;
        let settings = &mut arguments.settings;
        match flag.as_str() {
            "--scenario" => settings.scenarios.push(value),
            "--rounds" => settings.rounds = value.parse().context(USAGE)?,
            "--seconds" => {
                settings.window = Duration::try_from_secs_f64(value.parse().context(USAGE)?)?;
            }
            "--proxy" => settings.ours = value.into(),
            "--envoy" => settings.envoy = value.into(),
            "--json" => arguments.json = Some(value.into()),
            "--document" => arguments.document = Some(value.into()),
            _ => anyhow::bail!(USAGE),
        }
    }
    let settings = &arguments.settings;
    anyhow::ensure!(settings.rounds > 0 && !settings.window.is_zero(), USAGE);
    for program in [&settings.ours, &settings.envoy] {
        anyhow::ensure!(program.is_file(), "{} is not there", program.display());
    }
    Ok(arguments)
}

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1).peekable();
    match words.peek().map(String::as_str) {
        Some("relay") => {
            let [_, listen, upstream] = &words.collect::<Vec<_>>()[..] else {
                anyhow::bail!(USAGE);
            };
            relay::run(listen.parse()?, upstream.parse()?)
        }
        Some("upstream") => {
            let [_, http1, grpc] = &words.collect::<Vec<_>>()[..] else {
                anyhow::bail!(USAGE);
            };
            soak::upstream(http1.parse()?, grpc.parse()?)
        }
        Some("bare") => {
            let [_, address, answer] = &words.collect::<Vec<_>>()[..] else {
                anyhow::bail!(USAGE);
            };
            mixer::bare(address.parse()?, answer.as_ref())
        }
        Some("mixer") => {
            words.next();
            mixer_bench(words)
        }
        Some("pilot") => {
            words.next();
            pilot_bench(words)
        }
        Some("gate") => {
            let mut settings = gate::Settings {
                proxy: PROXY.into(),
                mixer: mixer::Settings::default().mixer,
                accept: false,
            };
            words.next();
            while let Some(flag) = words.next() {
                match flag.as_str() {
                    "--accept" => settings.accept = true,
                    "--proxy" => settings.proxy = words.next().context(USAGE)?.into(),
                    "--mixer" => settings.mixer = words.next().context(USAGE)?.into(),
                    _ => anyhow::bail!(USAGE),
                }
            }
            gate::run(&settings)
        }
        Some("soak") => {
            let mut settings = soak::Settings {
                proxy: PROXY.into(),
                seconds: 1200,
            };
            words.next();
            while let Some(flag) = words.next() {
                let value = words.next().context(USAGE)?;
                match flag.as_str() {
                    "--seconds" => settings.seconds = value.parse().context(USAGE)?,
                    "--proxy" => settings.proxy = value.into(),
                    _ => anyhow::bail!(USAGE),
                }
            }
            process::raise_file_limit()?;
            soak::run(&settings)
        }
        _ => run(&arguments(words)?),
    }
}

fn mixer_bench(mut words: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut settings = mixer::Settings::default();
    let (mut json, mut document) = (None, None);
    while let Some(flag) = words.next() {
        let value = words.next().context(USAGE)?;
        match flag.as_str() {
            "--scenario" => settings.scenarios.push(value),
            "--rounds" => settings.rounds = value.parse().context(USAGE)?,
            "--seconds" => {
                settings.window = Duration::try_from_secs_f64(value.parse().context(USAGE)?)?;
            }
            "--distinct" => settings.distinct = value.parse().context(USAGE)?,
            "--mixer" => settings.mixer = value.into(),
            "--json" => json = Some(PathBuf::from(value)),
            "--document" => document = Some(PathBuf::from(value)),
            _ => anyhow::bail!(USAGE),
        }
    }
    process::raise_file_limit()?;
    mixer::run(&settings, json.as_deref(), document.as_deref())
}

fn pilot_bench(mut words: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut settings = pilot::Settings::default();
    let mut document = None;
    while let Some(flag) = words.next() {
        let value = words.next().context(USAGE)?;
        match flag.as_str() {
            "--sizes" => {
                let sizes: Result<_, _> = value.split(',').map(str::parse).collect();
                settings.sizes = sizes.context(USAGE)?;
            }
            "--endpoints" => settings.endpoints = value.parse().context(USAGE)?,
            "--changes" => settings.changes = value.parse().context(USAGE)?,
            "--seconds" => {
                settings.patience = Duration::try_from_secs_f64(value.parse().context(USAGE)?)?;
            }
            "--pilot" => settings.pilot = value.into(),
            "--document" => document = Some(PathBuf::from(value)),
            _ => anyhow::bail!(USAGE),
        }
    }
    process::raise_file_limit()?;
    pilot::run(&settings, document.as_deref())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    process::raise_file_limit()?;
    let settings = &arguments.settings;
    let Findings { rows, failures } = compare::run(settings)?;
    report::print(&rows);
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report::json(&rows))?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(file) = &arguments.document {
        let how = format!(
            "{} rounds of {:.1} s each; idle connections: {}.",
            settings.rounds,
            settings.window.as_secs_f64(),
            settings.idle_connections
        );
        report::document(&rows, &failures, file, &how)?;
    }
    anyhow::ensure!(failures.is_empty(), "not measured: {}", failures.join("; "));
    let bad: u64 = rows.iter().map(|row| row.bad).sum();
    anyhow::ensure!(
        bad == 0,
        "{bad} answers were not the expected ones: the run does not count"
    );
    Ok(())
}
