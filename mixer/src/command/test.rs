//! `mixer test`: unit tests of policy and quota. Each case meets a Mixer of its own with the folder's
//! configuration, real adapters and a clock that moves only when a step says so; nothing is listened on, and
//! nothing outside is asked.

mod offline;

use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lateen_adapter::{Call, Clock, Code};
use lateen_config::ConfigSet;
use lateen_engine::{Bag, parse_duration};
use lateen_protocols::istio::mixer::v1::{
    CheckResponse, check_request::QuotaParams, header_operation::Operation,
};
use lateen_service::prometheus_client::registry::Registry;
use serde::Deserialize;
use serde_json::{Map, Value as Json};
use tokio_util::task::TaskTracker;

use super::{attributes, client, validate};
use crate::{
    adapter::{Inventory, prometheus::Exposition, rbac::PolicyView},
    check,
    config::{Builder, Snapshot, folder},
    explain::Explanation,
    handler::World,
    metrics::Metrics,
    workloads::WorkloadView,
};

/// What the names of files with tests end in.
const SUFFIXES: [&str; 2] = ["_test.yaml", "_test.yml"];
/// A check that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// `mixer test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Folder with `*_test.yaml`; its other YAML files are the configuration under test.
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    pub run: Option<String>,
    /// Name every case, and why each verdict came out as it did.
    #[arg(short, long)]
    pub verbose: bool,
}

/// A file of cases.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    /// Files and folders with the configuration; those beside the tests when there are none.
    config: Vec<PathBuf>,
    /// Namespace whose rules apply everywhere.
    config_namespace: Option<String>,
    /// Attributes of every request.
    attributes: Given,
    tests: Vec<Case>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Case {
    name: String,
    attributes: Given,
    quotas: BTreeMap<String, i64>,
    #[serde(rename = "bestEffort")]
    best_effort: bool,
    repeat: Option<u32>,
    expect: Expect,
    /// Several requests one after the other, to the same Mixer.
    steps: Vec<Step>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Step {
    /// So much later than the one before.
    after: Option<String>,
    attributes: Given,
    quotas: BTreeMap<String, i64>,
    #[serde(rename = "bestEffort")]
    best_effort: bool,
    repeat: Option<u32>,
    expect: Expect,
}

/// Attributes, or the file they are recorded in.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Given {
    Recorded(PathBuf),
    Written(Map<String, Json>),
}

impl Default for Given {
    fn default() -> Self {
        Self::Written(Map::new())
    }
}

/// What is expected of the answer; what is not written may be anything, but for `code`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Expect {
    /// Name of the status code; OK when it is not written.
    code: Option<String>,
    /// Part of the message.
    message: Option<String>,
    /// The rule that denied: its name, or `NAME.rule.NAMESPACE`.
    rule: Option<String>,
    /// Rules on trial that would have denied.
    dry_run: Option<Vec<String>>,
    /// For each quota the amount granted, or a list of amounts for repetitions.
    granted: BTreeMap<String, Json>,
    /// Headers of the request as the rules leave them; null: removed.
    request_headers: BTreeMap<String, Option<String>>,
    /// Headers of the response as the rules leave them; null: removed.
    response_headers: BTreeMap<String, Option<String>>,
}

/// Runs all tests, and prints what came of them.
///
/// # Errors
/// A test failed, or there is something wrong with the files.
pub async fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut paths = Vec::new();
    list(&options.directory, &mut paths)?;
    let (tests, configuration): (Vec<_>, Vec<_>) =
        paths.into_iter().partition(|path| is_test(path));
    anyhow::ensure!(
        !tests.is_empty(),
        "there is no *_test.yaml in {}",
        options.directory.display()
    );
    let mut tally = Tally::default();
    let mut own: Option<ConfigSet> = None;
    for path in tests {
        let place = path.display().to_string();
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {place}"))?;
        let file: File = serde_saphyr::from_str(&text).with_context(|| place.clone())?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let set = if file.config.is_empty() {
            match &own {
                Some(set) => set.clone(),
                None => own.insert(validate::read(&configuration)?).clone(),
            }
        } else {
            let paths: Vec<PathBuf> = file.config.iter().map(|p| folder.join(p)).collect();
            validate::read(&paths)?
        };
        let suite = Suite {
            file: &file,
            folder,
            place: &place,
            text: &text,
            set: &set,
            namespace: file.config_namespace.as_deref().unwrap_or("istio-system"),
        };
        suite.refused(out, &mut tally)?;
        for case in &file.tests {
            if options
                .run
                .as_ref()
                .is_none_or(|part| case.name.contains(part))
            {
                suite.run(case, options.verbose, out, &mut tally).await?;
            }
        }
    }
    let took = begun.elapsed();
    writeln!(
        out,
        "{} passed, {} failed in {took:.1?}",
        tally.passed, tally.failed
    )?;
    anyhow::ensure!(
        tally.refused == 0,
        "the configuration has {} errors",
        tally.refused
    );
    anyhow::ensure!(tally.failed == 0, "{} tests failed", tally.failed);
    anyhow::ensure!(tally.passed > 0, "no test was run");
    Ok(())
}

#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: usize,
    refused: usize,
}

fn is_test(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// YAML files of a folder and the folders in it, sorted.
fn list(folder: &Path, paths: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        found.push(entry?.path());
    }
    found.sort();
    for path in found {
        let is_hidden = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if is_hidden {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            list(&path, paths)?;
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            paths.push(path);
        }
    }
    Ok(())
}

/// A file of cases, and what they need.
struct Suite<'a> {
    file: &'a File,
    folder: &'a Path,
    place: &'a str,
    text: &'a str,
    set: &'a ConfigSet,
    namespace: &'a str,
}

/// Mixer for one case.
struct Bench {
    snapshot: Snapshot,
    metrics: Arc<Metrics>,
    clock: Clock,
}

impl Suite<'_> {
    /// Says what is refused: tests of something else are of no use.
    fn refused(&self, out: &mut impl Write, tally: &mut Tally) -> anyhow::Result<()> {
        for problem in self
            .bench()
            .snapshot
            .problems
            .iter()
            .filter(|p| p.is_refused)
        {
            writeln!(out, "error: {problem}")?;
            tally.refused += 1;
        }
        Ok(())
    }

    fn bench(&self) -> Bench {
        let clock = Clock::manual();
        let metrics = Metrics::register(&mut Registry::default());
        let workloads = WorkloadView::default();
        let world = World {
            clock: clock.clone(),
            workloads: Arc::new(workloads.clone()),
            tracker: TaskTracker::new(),
            metrics: Arc::clone(&metrics),
        };
        let policies = PolicyView::default();
        let exposition = Arc::new(Exposition::new(clock.clone()));
        let inventory =
            Inventory::built_in(exposition, policies.clone()).with(Arc::new(offline::RedisQuota));
        let mut update = folder::update(self.set);
        workloads.replace(std::mem::take(&mut update.workloads));
        let (_, wrong) = policies.take(&mut update.objects);
        update.problems.extend(wrong);
        let snapshot = Builder::new(inventory, world, self.namespace, 1).build(update, false);
        Bench {
            snapshot,
            metrics,
            clock,
        }
    }

    async fn run(
        &self,
        case: &Case,
        verbose: bool,
        out: &mut impl Write,
        tally: &mut Tally,
    ) -> anyhow::Result<()> {
        let place = format!("{}:{}", self.place, self.line(&case.name));
        let bench = self.bench();
        let single = Step {
            quotas: case.quotas.clone(),
            best_effort: case.best_effort,
            repeat: case.repeat,
            expect: case.expect.clone(),
            ..Step::default()
        };
        let steps: Vec<&Step> = if case.steps.is_empty() {
            vec![&single]
        } else {
            case.steps.iter().collect()
        };
        let mut wrong = Vec::new();
        let mut why = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let at = if case.steps.is_empty() {
                String::new()
            } else {
                format!("step {}: ", i + 1)
            };
            let bag = self
                .bag(
                    &bench,
                    &[&self.file.attributes, &case.attributes, &step.attributes],
                )
                .with_context(|| format!("{place}: {at}attributes"))?;
            if let Some(text) = &step.after {
                let span = parse_duration(text).and_then(|span| span.to_std().ok());
                bench.clock.advance(span.with_context(|| {
                    format!("{place}: {at}after: {text:?} is no time; write 5s")
                })?);
            }
            for round in 0..step.repeat.unwrap_or(1) {
                let id = format!("{i}-{round}");
                let (answer, explanation) = bench.ask(&bag, step, id).await?;
                let found = mismatches(&step.expect, &answer, &explanation, round);
                let at = match step.repeat {
                    Some(_) => format!("{at}request {}: ", round + 1),
                    None => at.clone(),
                };
                if !found.is_empty() || verbose {
                    why.push(explanation);
                }
                wrong.extend(found.into_iter().map(|reason| format!("{at}{reason}")));
            }
        }
        if wrong.is_empty() {
            tally.passed += 1;
        } else {
            tally.failed += 1;
        }
        if !wrong.is_empty() || verbose {
            let verdict = if wrong.is_empty() { "ok" } else { "FAILED" };
            writeln!(out, "{verdict} {place}: {}", case.name)?;
        }
        for reason in &wrong {
            writeln!(out, "  {reason}")?;
        }
        for explanation in why.iter().take(if verbose { usize::MAX } else { 1 }) {
            client::explain(explanation, out)?;
        }
        Ok(())
    }

    fn bag(&self, bench: &Bench, given: &[&Given]) -> anyhow::Result<Bag> {
        let mut bag = Bag::new(&bench.snapshot.table);
        for given in given {
            match given {
                Given::Written(written) => attributes::fill(&mut bag, written)?,
                Given::Recorded(path) => {
                    let path = self.folder.join(path);
                    let recorded = attributes::read(&path)?;
                    let recorded = recorded
                        .as_object()
                        .with_context(|| format!("{} is no map", path.display()))?;
                    attributes::fill(&mut bag, recorded)?;
                }
            }
        }
        Ok(bag)
    }

    /// Where a case is written.
    fn line(&self, name: &str) -> usize {
        let found = self.text.lines().position(|line| {
            let rest = line.trim_start().trim_start_matches("- ").trim_start();
            let value = rest.strip_prefix("name:").map(str::trim);
            value.is_some_and(|value| value.trim_matches(['"', '\'']) == name)
        });
        found.map_or(1, |line| line + 1)
    }
}

impl Bench {
    async fn ask(
        &self,
        bag: &Bag,
        step: &Step,
        id: String,
    ) -> anyhow::Result<(CheckResponse, Explanation)> {
        let quotas: HashMap<String, QuotaParams> = step
            .quotas
            .iter()
            .map(|(name, amount)| {
                let params = QuotaParams {
                    amount: *amount,
                    best_effort: step.best_effort,
                };
                (name.clone(), params)
            })
            .collect();
        let mut explanation = Explanation::default();
        let call = Call {
            deadline: tokio::time::Instant::now() + TIMEOUT,
        };
        let request = client::request(bag, quotas, id);
        let answer = check::check(
            &self.snapshot,
            &self.metrics,
            request,
            &call,
            true,
            Some(&mut explanation),
        );
        Ok((answer.await?, explanation))
    }
}

/// Whether `rule` is what a test calls it.
fn is_called(rule: &str, name: &str) -> bool {
    rule == name
        || rule
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(".rule."))
}

/// What is not as expected.
fn mismatches(
    expect: &Expect,
    answer: &CheckResponse,
    why: &Explanation,
    round: u32,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let precondition = answer.precondition.clone().unwrap_or_default();
    let status = precondition.status.unwrap_or_default();
    let code = Code::from_number(i64::from(status.code)).map_or("UNKNOWN", Code::name);
    let want = expect.code.as_deref().unwrap_or("OK");
    if code != want {
        wrong.push(format!("is {code} {}, not {want}", status.message));
    }
    if let Some(part) = expect
        .message
        .as_ref()
        .filter(|part| !status.message.contains(*part))
    {
        wrong.push(format!(
            "the message is {:?}, without {part:?}",
            status.message
        ));
    }
    let denied = |tried: bool| {
        why.rules
            .iter()
            .filter(move |rule| rule.dry_run == tried && rule.asked.iter().any(|a| a.code != "OK"))
            .map(|rule| rule.rule.as_str())
    };
    if let Some(rule) = &expect.rule {
        let first = denied(false).next().unwrap_or("none");
        if !is_called(first, rule) {
            wrong.push(format!("the rule that denied is {first}, not {rule}"));
        }
    }
    if let Some(rules) = &expect.dry_run {
        let got: Vec<&str> = denied(true).collect();
        let same = got.len() == rules.len() && got.iter().zip(rules).all(|(g, r)| is_called(g, r));
        if !same {
            wrong.push(format!(
                "rules on trial that would deny are {got:?}, not {rules:?}"
            ));
        }
    }
    for (name, want) in &expect.granted {
        let want = match want {
            Json::Array(amounts) => amounts.get(round as usize).and_then(Json::as_i64),
            amount => amount.as_i64(),
        };
        let got = answer.quotas.get(name).map(|quota| quota.granted_amount);
        if got != want {
            let shown =
                |amount: Option<i64>| amount.map_or("nothing asked".to_owned(), |a| a.to_string());
            wrong.push(format!(
                "quota {name}: {} granted, not {}",
                shown(got),
                shown(want)
            ));
        }
    }
    let directive = precondition.route_directive.unwrap_or_default();
    let sides = [
        (
            "request",
            &expect.request_headers,
            directive.request_header_operations,
        ),
        (
            "response",
            &expect.response_headers,
            directive.response_header_operations,
        ),
    ];
    for (side, want, operations) in sides {
        for (name, want) in want {
            let mut got: Option<Option<String>> = None;
            for operation in operations
                .iter()
                .filter(|o| o.name.eq_ignore_ascii_case(name))
            {
                got = match (operation.operation(), got) {
                    (Operation::Remove, _) => Some(None),
                    (Operation::Append, Some(Some(old))) => {
                        Some(Some(format!("{old},{}", operation.value)))
                    }
                    _ => Some(Some(operation.value.clone())),
                };
            }
            if got.as_ref() != Some(want) {
                wrong.push(format!("{side} header {name} is {got:?}, not {want:?}"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests;
