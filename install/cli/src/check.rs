//! `lateen check`: can it be installed here; is what was installed well. The same checks come before and after `lateen install`.
//!
//! [`before`] and [`after`] ask the cluster → [`Finding`]s → a table, or JSON.

mod after;
mod before;

use std::process::ExitCode;

use lateen_render::Chart;
use serde::Serialize;
use serde_json::Value;

pub(crate) use after::{after, is_ready};
pub(crate) use before::before;

use crate::cluster::{self, Cluster, inventory::Inventory};
use crate::install;
use crate::output::Format;
use crate::terminal::{green, paint_error, paint_warning};

/// Exit code when a check fails; nothing was changed.
pub(crate) const FAILED: u8 = 3;
/// Where a failure is explained.
const DOCUMENT: &str = "docs/operations/checks.md";

/// Whether Lateen can be installed in a cluster, or whether what is installed is well.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Check whether it can be installed, even if it is.
    #[arg(long)]
    pre: bool,
    /// Profile that would be installed.
    #[arg(long, value_name = "NAME", default_value = "default")]
    profile: String,
    /// Of this revision.
    #[arg(long, value_name = "NAME", default_value = "")]
    revision: String,
    /// Print findings as YAML or JSON.
    #[arg(short = 'o', long, value_enum)]
    output: Option<Format>,
    #[command(flatten)]
    cluster: cluster::Options,
}

/// What came of one check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Finding {
    /// Which check: a heading of the document.
    pub(crate) check: &'static str,
    pub(crate) state: State,
    pub(crate) message: String,
    /// Where it is explained, when it is not well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) see: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Passed,
    /// It goes on, but somebody should know.
    Doubtful,
    Failed,
}

impl Finding {
    pub(crate) fn passed(check: &'static str, message: impl Into<String>) -> Finding {
        Finding {
            check,
            state: State::Passed,
            message: message.into(),
            see: None,
        }
    }

    pub(crate) fn doubtful(check: &'static str, message: impl Into<String>) -> Finding {
        Finding {
            state: State::Doubtful,
            see: Some(format!("{DOCUMENT}#{check}")),
            ..Finding::passed(check, message)
        }
    }

    pub(crate) fn failed(check: &'static str, message: impl Into<String>) -> Finding {
        Finding {
            state: State::Failed,
            ..Finding::doubtful(check, message)
        }
    }
}

/// Whether one of them is a failure.
pub(crate) fn has_failed(findings: &[Finding]) -> bool {
    findings
        .iter()
        .any(|finding| finding.state == State::Failed)
}

/// For people.
pub(crate) fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let mark = match finding.state {
            State::Passed => green("✓"),
            State::Doubtful => paint_warning("!"),
            State::Failed => paint_error("✗"),
        };
        out += &format!("  {mark} {}: {}\n", finding.check, finding.message);
        if let Some(see) = &finding.see {
            out += &format!("    see {see}\n");
        }
    }
    out
}

/// Does it.
pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut cluster = Cluster::connect(&options.cluster).await?;
    let installed = Inventory::read(&mut cluster, &options.revision).await?;
    let findings = match &installed {
        Some(installed) if !options.pre => after(&mut cluster, installed).await?,
        _ => {
            let chart = Chart::ours()?;
            let mut chosen = Vec::new();
            if !options.revision.is_empty() {
                chosen.push(serde_json::json!({ "revision": options.revision }));
            }
            let values = chart.values(&options.profile, &chosen)?;
            let objects = install::objects(&chart, &values, installed.is_some())?;
            before(&mut cluster, &objects, installed.as_ref()).await?
        }
    };
    match options.output {
        Some(format) => format.print(&serde_json::to_value(&findings)?)?,
        None => print!("{}", table(&findings)),
    }
    Ok(match has_failed(&findings) {
        true => ExitCode::from(FAILED),
        false => ExitCode::SUCCESS,
    })
}

/// A text inside of an object, or nothing.
fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_a_heading_of_the_document() {
        let document = include_str!("../../../docs/operations/checks.md");
        let sources = [
            include_str!("check/before.rs"),
            include_str!("check/after.rs"),
        ]
        .concat();
        let mut checks = 0;
        for constructor in ["failed(", "doubtful("] {
            for call in sources.split(&format!("Finding::{constructor}")).skip(1) {
                let check = call.split('"').nth(1).unwrap();
                assert!(document.contains(&format!("\n## {check}\n")), "{check}");
                checks += 1;
            }
        }
        assert!(checks > 8, "{checks}");
    }

    #[test]
    fn a_failure_says_where_it_is_explained() {
        let findings = [
            Finding::passed("version", "good"),
            Finding::doubtful("rights", "hm"),
            Finding::failed("kinds", "bad"),
        ];
        assert!(has_failed(&findings) && !has_failed(&findings[..2]));
        let text = table(&findings);
        assert!(
            text.contains("see docs/operations/checks.md#kinds"),
            "{text}"
        );
        assert!(!text.contains("#version"), "{text}");
    }
}
