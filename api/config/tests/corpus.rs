//! Files and verdicts nobody here wrote, read where they lie: the environment variable
//! `LATEEN_CORPUS` names their folder. Without it nothing of this runs, and says so.
#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};

use lateen_config::analyze::{Input, Message, Resource, analyze, analyzers};
use lateen_config::yaml::documents;
use lateen_config::{Finding, parse_file, review, validate};

fn corpus(part: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("skipped: LATEEN_CORPUS names no folder");
        return None;
    };
    let path = Path::new(&root).join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("not run: LATEEN_CORPUS has no {}", path.display());
    None
}

fn yaml_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            yaml_files(&path, files);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            files.push(path);
        }
    }
    files.sort();
}

/// Problems that refuse something in the files below a directory.
fn errors(directory: &Path) -> (usize, Vec<String>) {
    let mut files = Vec::new();
    yaml_files(directory, &mut files);
    let mut objects_read = 0;
    let mut errors = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let (objects, mut problems) = parse_file(&path.display().to_string(), &text);
        problems.extend(objects.iter().flat_map(validate));
        errors.extend(
            problems
                .iter()
                .filter(|problem| problem.is_error())
                .map(ToString::to_string),
        );
        objects_read += objects.len();
    }
    (objects_read, errors)
}

#[test]
fn bookinfo_is_read_whole() {
    for version in ["1.4.10", "1.30.3"] {
        let Some(directory) = corpus(&format!("pilot/samples/{version}/samples/bookinfo")) else {
            return;
        };
        let (objects, errors) = errors(&directory);
        assert!(objects > 50, "{version}: only {objects} objects");
        assert_eq!(errors, Vec::<String>::new(), "{version}");
    }
}

#[test]
fn mixer_objects_are_read() {
    let Some(directory) = corpus("mixer/yaml/1.4.10/mixer/testdata/config") else {
        return;
    };
    let (objects, errors) = errors(&directory);
    assert!(objects > 10, "only {objects} objects");
    assert_eq!(errors, Vec::<String>::new());
}

/// One row of a file of admission verdicts, and ours.
struct Row {
    name: String,
    agrees: bool,
    said: String,
}

/// Every row of a file of verdicts against ours; warnings count where the row asserts them.
fn verdicts(part: &str) -> Option<Vec<Row>> {
    let text = fs::read_to_string(corpus(part)?).unwrap();
    let rows = text.lines().map(|line| {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let (errors, warnings): (Vec<Finding>, Vec<Finding>) = match review(&case["resource"]) {
            Ok(findings) => findings.into_iter().partition(Finding::is_error),
            Err(finding) => (vec![finding], Vec::new()),
        };
        let valid = errors.is_empty();
        let warned = case["warning"]
            .as_bool()
            .is_none_or(|asserted| !valid || asserted != warnings.is_empty());
        let said: Vec<String> = errors
            .iter()
            .chain(&warnings)
            .map(ToString::to_string)
            .collect();
        Row {
            name: case["name"].as_str().unwrap_or_default().to_owned(),
            agrees: case["valid"] == valid && warned,
            said: format!(
                "should be valid: {}, with warning: {} ({}); said {said:?} of {}",
                case["valid"],
                case["warning"],
                case["error_contains"],
                case["resource"]["spec"]
                    .to_string()
                    .chars()
                    .take(600)
                    .collect::<String>()
            ),
        }
    });
    Some(rows.collect())
}

fn disagreements(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .filter(|row| !row.agrees)
        .map(|row| format!("{}: {}", row.name, row.said))
        .collect()
}

/// Verdicts of Istio's admission on every kind.
#[test]
fn verdicts_agree_with_admission() {
    let Some(rows) = verdicts("pilot/validation.jsonl") else {
        return;
    };
    let disagree = disagreements(&rows);
    println!(
        "{} of {} disagree:\n{}",
        disagree.len(),
        rows.len(),
        disagree.join("\n")
    );
    assert!(rows.len() > 400);
    assert!(disagree.len() * 100 <= rows.len(), "see above");
}

/// Those of Istio 1.4, whose rules have changed since: a measure, and a guard against new ways to differ.
#[test]
fn verdicts_of_1_4_are_close() {
    let Some(rows) = verdicts("pilot/validation-1.4-networking.jsonl") else {
        return;
    };
    let disagree = disagreements(&rows);
    println!(
        "{} of {} disagree:\n{}",
        disagree.len(),
        rows.len(),
        disagree.join("\n")
    );
    assert!(disagree.len() * 10 <= rows.len(), "see above");
}

/// `istioctl analyze` on the cases of its own analyzers; what disagrees is printed, and there may not be
/// more of it.
#[test]
fn analysis_says_what_istioctl_says() {
    let Some(directory) = corpus("pilot/analysis") else {
        return;
    };
    let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    let yaml = |case: &serde_json::Value, name: &str| {
        case[name].as_str().map_or(serde_json::Value::Null, |file| {
            documents(&text(file)).unwrap().remove(0).value
        })
    };
    let cases: Vec<serde_json::Value> = serde_json::from_str(&text("cases.json")).unwrap();
    let known: Vec<&str> = analyzers().collect();
    let (mut agree, mut differ, mut missing) = (0, Vec::new(), Vec::new());
    for case in &cases {
        let analyzer = case["analyzer"].as_str().unwrap().to_owned();
        if !known.contains(&analyzer.as_str()) && !analyzer.starts_with("schemaValidation.") {
            missing.push(analyzer);
            continue;
        }
        let mut input = Input {
            mesh_config: yaml(case, "meshConfigFile"),
            mesh_networks: yaml(case, "meshNetworksFile"),
            ..Input::default()
        };
        for file in case["inputs"].as_array().unwrap() {
            let file = file.as_str().unwrap();
            input
                .resources
                .extend(Resource::read(file, &text(file)).unwrap());
        }
        let told = |message: &Message| {
            format!(
                "{} {} {}",
                message.code,
                message.level.name(),
                message.resource
            )
        };
        let mut got: Vec<String> = analyze(&input, &[analyzer]).iter().map(told).collect();
        let mut want: Vec<String> = case["expected"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| {
                let part = |name: &str| one[name].as_str().unwrap();
                format!("{} {} {}", part("code"), part("level"), part("resource"))
            })
            .collect();
        got.sort();
        want.sort();
        if got == want {
            agree += 1;
        } else {
            differ.push(format!(
                "{}:\n  got  {got:?}\n  want {want:?}",
                case["name"]
            ));
        }
    }
    println!(
        "{agree} of {} agree; without analyzer: {missing:?}; differ:\n{}",
        cases.len(),
        differ.join("\n")
    );
    assert!(agree * 100 >= cases.len() * 85, "see above");
}
