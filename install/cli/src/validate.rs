//! `lateen validate`: whether configuration would be let in, and what is doubtful about it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use lateen_config::{Finding, Object, Problem, check_references, parse_file, review, validate};
use serde_json::{Value, json};

use crate::source;
use crate::terminal::{bold, paint_error, paint_warning};

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("input").required(true)))]
pub(crate) struct Options {
    /// Files, or directories with all below them; `-` is standard input.
    #[arg(short, long = "filename", value_name = "FILE", num_args = 1.., group = "input")]
    filenames: Vec<PathBuf>,
    /// A file of rows with `name` and `resource`; prints a verdict a row.
    #[arg(long, value_name = "FILE", group = "input")]
    jsonl: Option<PathBuf>,
    /// Fail on warnings too.
    #[arg(long)]
    strict: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(path) = &options.jsonl {
        let files = source::read(std::slice::from_ref(path))?;
        for (file, text) in &files {
            print!("{}", verdicts(file, text)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let files = source::read(&options.filenames)?;
    anyhow::ensure!(!files.is_empty(), "no YAML or JSON files there");
    let (objects, problems) = judge(&files);
    let errors = problems.iter().filter(|problem| problem.is_error()).count();
    let warnings = problems.len() - errors;
    for problem in &problems {
        println!("{}", shown(problem));
    }
    println!(
        "{}",
        bold(&format!(
            "{} in {}: {} and {}",
            counted(objects, "object"),
            counted(files.len(), "file"),
            counted(errors, "error"),
            counted(warnings, "warning")
        ))
    );
    Ok(if errors > 0 || options.strict && warnings > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Everything wrong with these texts, alone and together; and how many objects were read.
fn judge(files: &[(String, String)]) -> (usize, Vec<Problem>) {
    let mut problems = Vec::new();
    let mut good: Vec<Object> = Vec::new();
    let mut count = 0;
    for (name, text) in files {
        let (objects, found) = parse_file(name, text);
        problems.extend(found);
        count += objects.len();
        for object in objects {
            let found = validate(&object);
            if !found.iter().any(Problem::is_error) {
                good.push(object);
            }
            problems.extend(found);
        }
    }
    problems.extend(check_references(&good));
    problems.sort();
    problems.dedup();
    (count, problems)
}

fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// `FILE:LINE: error: …`
fn shown(problem: &Problem) -> String {
    let text = problem.to_string();
    let place = format!("{}:{}: ", problem.file, problem.line);
    let rest = text.strip_prefix(&place).unwrap_or(&text);
    let level = if problem.is_error() {
        paint_error("error:")
    } else {
        paint_warning("warning:")
    };
    format!("{place}{level} {rest}")
}

/// A line for each row: `{"name", "valid", "errors", "warnings"}`.
fn verdicts(file: &str, text: &str) -> anyhow::Result<String> {
    let mut out = String::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let row: Value = serde_json::from_str(line)
            .with_context(|| format!("{file}:{}: not a JSON object", index + 1))?;
        let resource = row
            .get("resource")
            .with_context(|| format!("{file}:{}: the row has no resource", index + 1))?;
        out.push_str(&verdict(row.get("name").unwrap_or(&Value::Null), resource).to_string());
        out.push('\n');
    }
    Ok(out)
}

fn verdict(name: &Value, resource: &Value) -> Value {
    let findings = review(resource).unwrap_or_else(|finding| vec![finding]);
    let (errors, warnings): (Vec<Finding>, Vec<Finding>) =
        findings.into_iter().partition(Finding::is_error);
    let texts = |all: &[Finding]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
    json!({
        "name": name,
        "valid": errors.is_empty(),
        "errors": texts(&errors),
        "warnings": texts(&warnings),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_get_verdicts() {
        let rows = r#"{"name": "good", "resource": {"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "a"}, "spec": {"hosts": ["a.b"]}}}

{"name": "bad", "resource": {"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "a"}, "spec": {}}}
{"name": "worse", "resource": 5}
"#;
        let said = verdicts("x", rows).unwrap();
        let valid: Vec<Value> = said
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["valid"].clone())
            .collect();
        assert_eq!(valid, [json!(true), json!(false), json!(false)]);
        assert!(
            said.contains(r#""errors":["spec.hosts: at least one host is required"]"#),
            "{said}"
        );
        assert!(verdicts("x", "{}").is_err());
        assert_eq!(
            verdicts("x", "{").unwrap_err().to_string(),
            "x:1: not a JSON object"
        );
    }

    /// The documented example says what the page shows.
    #[test]
    fn the_page_is_true() {
        let page = include_str!("../../../docs/reference/validation.md");
        let yaml = page.split("```yaml\n").nth(1).unwrap();
        let text = yaml.split("```").next().unwrap().to_owned();
        let (_, problems) = judge(&[("shop.yaml".to_owned(), text)]);
        let lines: Vec<String> = problems.iter().map(shown).collect();
        let block = format!(
            "$ lateen validate -f shop.yaml\n{}\n2 objects",
            lines.join("\n")
        );
        assert!(page.contains(&block), "{block}");
    }

    #[test]
    fn files_are_judged_together() {
        let route = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: a }
spec: { hosts: [a], gateways: [g], http: [{ route: [{ destination: { host: a } }] }] }
";
        let gateway = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: g }
spec: { servers: [{ port: { number: 80, name: a, protocol: HTTP }, hosts: ['*'] }] }
";
        let alone = [("a.yaml".to_owned(), route.to_owned())];
        let (count, problems) = judge(&alone);
        assert_eq!(count, 1);
        assert_eq!(
            shown(&problems[0]),
            "a.yaml:5: warning: VirtualService default/a: spec.gateways[0]: gateway default/g is not defined \
             (the routes have no effect there until it is)"
        );
        let both = [alone[0].clone(), ("g.yaml".to_owned(), gateway.to_owned())];
        assert_eq!(judge(&both), (2, Vec::new()));
    }
}
