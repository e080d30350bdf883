//! What was found: a table for the terminal, JSON, and docs/benchmarks.md.

use std::{
    fs,
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::plot;

/// What a row's figures count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    CpuPerRequest,
    CpuPerByte,
    Latency,
    Mebibytes,
    Bytes,
    Milliseconds,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::CpuPerRequest => "µs/request",
            Unit::CpuPerByte => "ns/byte",
            Unit::Latency => "µs",
            Unit::Mebibytes => "MiB",
            Unit::Bytes => "bytes",
            Unit::Milliseconds => "ms",
        }
    }

    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Unit::CpuPerByte => format!("{value:.3}"),
            Unit::Bytes => format!("{value:.0}"),
            _ if value.abs() >= 1000.0 => format!("{value:.0}"),
            _ => format!("{value:.1}"),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) unit: Unit,
    pub(crate) ours: f64,
    pub(crate) envoy: f64,
    pub(crate) relay: Option<f64>,
    pub(crate) envoy_ratio: f64,
    pub(crate) envoy_goal: f64,
    pub(crate) relay_ratio: Option<f64>,
    pub(crate) relay_goal: Option<f64>,
    pub(crate) bad: u64,
    /// Figures of every round: ours, Envoy, relay.
    pub(crate) rounds: Vec<Vec<f64>>,
}

impl Row {
    /// A row in which only ours and Envoy stand.
    pub(crate) fn two(
        name: &str,
        title: &str,
        unit: Unit,
        (ours, envoy): (f64, f64),
        goal: f64,
    ) -> Row {
        Row {
            name: name.to_owned(),
            title: title.to_owned(),
            unit,
            ours,
            envoy,
            relay: None,
            envoy_ratio: ours / envoy,
            envoy_goal: goal,
            relay_ratio: None,
            relay_goal: None,
            bad: 0,
            rounds: Vec::new(),
        }
    }

    /// Whether every goal is reached and nothing failed.
    pub(crate) fn met(&self) -> bool {
        self.bad == 0 && self.envoy_met() && self.relay_met()
    }

    fn envoy_met(&self) -> bool {
        rounded(self.envoy_ratio) <= self.envoy_goal
    }

    fn relay_met(&self) -> bool {
        match (self.relay_ratio, self.relay_goal) {
            (Some(ratio), Some(goal)) => rounded(ratio) <= goal,
            _ => true,
        }
    }
}

/// To the digits that are printed, which are more than the measurement gives.
fn rounded(ratio: f64) -> f64 {
    (ratio * 100.0).round() / 100.0
}

/// What is going on, on stderr.
#[derive(Debug)]
pub(crate) struct Progress {
    steps: usize,
    step: usize,
    title: String,
    terminal: bool,
    said: Vec<String>,
}

impl Progress {
    pub(crate) fn new(steps: usize) -> Progress {
        Progress {
            steps,
            step: 0,
            title: String::new(),
            terminal: std::io::stderr().is_terminal(),
            said: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self, title: &str) {
        self.step += 1;
        self.title = title.to_owned();
        if self.terminal {
            self.line("");
        } else {
            eprintln!("[{}/{}] {title}", self.step, self.steps.max(self.step));
        }
    }

    pub(crate) fn round(&self, round: usize, rounds: usize) {
        if self.terminal {
            self.line(&format!(", round {round} of {rounds}"));
        }
    }

    pub(crate) fn say(&self, what: &str) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
        eprintln!("{what}");
    }

    /// Says it if it has not been said.
    pub(crate) fn once(&mut self, what: &str) {
        if !self.said.iter().any(|said| said == what) {
            self.say(what);
            self.said.push(what.to_owned());
        }
    }

    pub(crate) fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }

    fn line(&self, more: &str) {
        let steps = self.steps.max(self.step);
        eprint!("\r\x1b[K[{}/{steps}] {}{more}", self.step, self.title);
        // A progress line that does not show is no failure.
        std::io::stderr().flush().ok();
    }
}

/// The table for people, coloured on terminals.
pub(crate) fn print(rows: &[Row]) {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let paint = |text: String, met: bool| match (colour, met) {
        (false, _) => text,
        (true, true) => format!("\x1b[32m{text}\x1b[0m"),
        (true, false) => format!("\x1b[31m{text}\x1b[0m"),
    };
    let width = rows.iter().map(|row| row.title.chars().count()).max();
    let width = width.unwrap_or(0).max(8);
    println!(
        "{:width$}  {:>10}  {:>9} {:>9} {:>9}   {:<16} {:<16} {:>5}",
        "scenario", "", "ours", "Envoy", "relay", "/ Envoy (goal)", "/ relay (goal)", "bad"
    );
    for row in rows {
        let against = |ratio: Option<f64>, goal: Option<f64>, met| {
            let text = match (ratio, goal) {
                (Some(ratio), Some(goal)) => format!("{ratio:.2} (≤ {goal:.2})"),
                (Some(ratio), None) => format!("{ratio:.2}"),
                (None, _) => String::new(),
            };
            paint(format!("{text:<16}"), met)
        };
        println!(
            "{:width$}  {:>10}  {:>9} {:>9} {:>9}   {} {} {}",
            row.title,
            row.unit.name(),
            row.unit.show(row.ours),
            row.unit.show(row.envoy),
            row.relay
                .map(|relay| row.unit.show(relay))
                .unwrap_or_default(),
            against(Some(row.envoy_ratio), Some(row.envoy_goal), row.envoy_met()),
            against(row.relay_ratio, row.relay_goal, row.relay_met()),
            paint(format!("{:>5}", row.bad), row.bad == 0),
        );
    }
    let met = rows.iter().filter(|row| row.met()).count();
    println!("{met} of {} reach their goals", rows.len());
}

/// Everything, for machines.
pub(crate) fn json(rows: &[Row]) -> Value {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name, "title": row.title, "unit": row.unit.name(),
                "ours": row.ours, "envoy": row.envoy, "relay": row.relay,
                "envoy_ratio": row.envoy_ratio, "envoy_goal": row.envoy_goal,
                "relay_ratio": row.relay_ratio, "relay_goal": row.relay_goal,
                "bad": row.bad, "met": row.met(), "rounds": row.rounds,
            })
        })
        .collect();
    json!({"rows": rows})
}

const BEGIN: &str = "<!-- Made by `make bench` from here -->";
const END: &str = "<!-- to here -->";

/// Replaces the made part of the document, and draws its plots beside it. What people wrote stays.
pub(crate) fn document(
    rows: &[Row],
    failures: &[String],
    file: &Path,
    how: &str,
) -> anyhow::Result<()> {
    let old =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let (before, rest) = old
        .split_once(BEGIN)
        .with_context(|| format!("{} lacks the line {BEGIN}", file.display()))?;
    let (_, after) = rest
        .split_once(END)
        .with_context(|| format!("{} lacks the line {END}", file.display()))?;
    let plots = file.with_extension("");
    fs::create_dir_all(&plots)?;
    fs::write(plots.join("ratios.svg"), plot::ratios(rows))?;
    fs::write(plots.join("latency.svg"), plot::latency(rows))?;
    let missing: String = failures
        .iter()
        .map(|failure| format!("\nNot measured: `{}`\n", failure.replace(['\n', '`'], " ")))
        .collect();
    let text = format!(
        "{before}{BEGIN}\n\n{}\n{how}\n{missing}\n{END}{after}",
        markdown(rows)
    );
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn markdown(rows: &[Row]) -> String {
    let mut out = String::from(
        "![Ratios to Envoy](benchmarks/ratios.svg)\n\n![Added latency](benchmarks/latency.svg)\n\n\
         | scenario | unit | ours | Envoy | relay | ours / Envoy | goal | ours / relay | goal | bad |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let mark = |ratio: f64, met: bool| {
            if met {
                format!("**{ratio:.2}**")
            } else {
                format!("{ratio:.2} ✗")
            }
        };
        let goal = |goal: Option<f64>| goal.map(|goal| format!("≤ {goal:.2}")).unwrap_or_default();
        out.push_str(&format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
            row.title,
            row.unit.name(),
            row.unit.show(row.ours),
            row.unit.show(row.envoy),
            row.relay
                .map(|relay| row.unit.show(relay))
                .unwrap_or_default(),
            mark(row.envoy_ratio, row.envoy_met()),
            goal(Some(row.envoy_goal)),
            row.relay_ratio
                .map(|ratio| mark(ratio, row.relay_met()))
                .unwrap_or_default(),
            goal(row.relay_goal),
            row.bad,
        ));
    }
    out
}
