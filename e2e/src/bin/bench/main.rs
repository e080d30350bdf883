//! `make bench`: our proxy and stock Envoy 1.40 in turn, from the same bootstrap file, CPU time per
//! request and memory as ratios.
//!
//! The proxies run on one processor, load and upstream on the other. CPU time is the proxies' own, read
//! from the kernel (nanoseconds of every thread); rates are not compared, since load and proxy share a machine.
//! Every round visits ours and the peer one after the other; what counts is the median of the rounds' ratios.

mod load;
mod measure;
mod report;
mod scenario;

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;

use crate::{measure::Round, scenario::Scenario};

/// What is compared with what.
#[derive(Debug)]
struct Arguments {
    ours: PathBuf,
    envoy: PathBuf,
    rounds: usize,
    window: Duration,
    out: Option<PathBuf>,
}

/// `bench OURS ENVOY [--rounds N] [--seconds N] [--out FILE]`
fn arguments() -> anyhow::Result<Arguments> {
    let usage = "usage: bench OURS ENVOY [--rounds N] [--seconds N] [--out FILE]";
    let mut words = std::env::args().skip(1);
    let mut next = || words.next().context(usage);
    let mut arguments = Arguments {
        ours: next()?.into(),
        envoy: next()?.into(),
        rounds: 5,
        window: Duration::from_secs(3),
        out: None,
    };
    while let Some(flag) = words.next() {
        let value = words.next().context(usage)?;
        match flag.as_str() {
            "--rounds" => arguments.rounds = value.parse().context(usage)?,
            "--seconds" => arguments.window = Duration::from_secs(value.parse().context(usage)?),
            "--out" => arguments.out = Some(value.into()),
            _ => anyhow::bail!(usage),
        }
    }
    for program in [&arguments.ours, &arguments.envoy] {
        anyhow::ensure!(program.is_file(), "{} is not there", program.display());
    }
    Ok(arguments)
}

fn main() -> anyhow::Result<()> {
    let arguments = arguments()?;
    measure::use_processor(1)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut results = Vec::new();
        for scenario in Scenario::ALL {
            let mut rounds = Vec::new();
            for number in 1..=arguments.rounds {
                eprintln!(
                    "{}: round {number} of {}",
                    scenario.name(),
                    arguments.rounds
                );
                let ours = measure::run(scenario, &arguments.ours, arguments.window).await?;
                let envoy = measure::run(scenario, &arguments.envoy, arguments.window).await?;
                rounds.push(Round { ours, envoy });
            }
            results.push((scenario, rounds));
        }
        let text = report::markdown(&results, &arguments.window);
        println!("{text}");
        if let Some(path) = &arguments.out {
            std::fs::write(path, &text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    })
}
