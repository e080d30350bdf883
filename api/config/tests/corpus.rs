//! Files and verdicts nobody here wrote, read where they lie: the environment variable
//! `LATEEN_CORPUS` names their folder. Without it nothing of this runs, and says so.
#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};

use lateen_config::{Problem, parse_file, validate};

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

/// Verdicts of Istio's admission on the kinds we read. Not all rules are ours yet (TLS details, locality
/// settings); what must hold is that nothing valid is refused, and most of what is invalid is.
#[test]
fn verdicts_agree_with_admission() {
    let Some(file) = corpus("pilot/validation.jsonl") else {
        return;
    };
    let kinds = [
        "VirtualService",
        "DestinationRule",
        "Gateway",
        "ServiceEntry",
        "WorkloadEntry",
        "PeerAuthentication",
    ];
    let (mut valid, mut refused_wrongly, mut invalid, mut admitted_wrongly) =
        (0, Vec::new(), 0, Vec::new());
    for line in fs::read_to_string(file).unwrap().lines() {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let kind = case["kind"].as_str().unwrap_or_default();
        if !kinds.contains(&kind)
            || case["origin"]["tag"]
                .as_str()
                .is_none_or(|tag| !tag.starts_with("1.3"))
        {
            continue;
        }
        let (objects, mut problems) = parse_file("case.yaml", &case["resource"].to_string());
        problems.extend(objects.iter().flat_map(validate));
        let refused = problems.iter().any(Problem::is_error);
        let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let line = format!(
            "{}: {} {told:?} ({})",
            case["name"], case["resource"]["spec"], case["error_contains"]
        );
        if case["valid"] == true {
            valid += 1;
            if refused {
                refused_wrongly.push(line);
            }
        } else {
            invalid += 1;
            if !refused {
                admitted_wrongly.push(line);
            }
        }
    }
    println!(
        "valid: {valid}, refused {}:\n{}",
        refused_wrongly.len(),
        refused_wrongly.join("\n")
    );
    println!(
        "invalid: {invalid}, admitted {}:\n{}",
        admitted_wrongly.len(),
        admitted_wrongly.join("\n")
    );
    assert!(valid > 100 && invalid > 100);
    assert_eq!(refused_wrongly, Vec::<String>::new());
    assert!(
        admitted_wrongly.len() * 3 <= invalid,
        "{} of {invalid} invalid cases are admitted",
        admitted_wrongly.len()
    );
}
