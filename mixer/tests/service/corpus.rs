//! Istio's own files, unmodified: everything for the adapters and templates that exist here loads.
//!
//! The files are not ours to keep; `LATEEN_CORPUS` says where they are. Without it this says so and tests nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lateen_protocols::istio::mixer::v1::check_response::PreconditionResult;

use mixer::{
    command::validate,
    config::{
        object::{Key, Source},
        remote::RemoteTemplate,
    },
};
use prost_reflect::Kind;

use crate::support::{Mesh, map, text, told};

fn corpus() -> Option<PathBuf> {
    let Some(path) = std::env::var_os("LATEEN_CORPUS").map(PathBuf::from) else {
        eprintln!("skipped: LATEEN_CORPUS names no folder");
        return None;
    };
    let files = path.join("mixer/yaml");
    assert!(
        files.is_dir(),
        "LATEEN_CORPUS: there is no {}",
        files.display()
    );
    Some(path)
}

/// What this version says it does not have.
const MISSING: &[&str] = &[
    "no adapter or template of that name",
    "unknown adapter",
    "unknown template",
    "is not part of this Mixer",
    "a process of its own",
];

#[tokio::test]
async fn the_default_charts_load() {
    let Some(corpus) = corpus() else { return };
    for chart in [
        "mixer/yaml/1.0.9/install/kubernetes/helm/istio/charts/mixer/templates/config.rendered.yaml",
        "mixer/yaml/1.4.10/install/kubernetes/helm/istio/charts/mixer/templates/config.rendered.yaml",
    ] {
        let Ok(text) = fs::read_to_string(corpus.join(chart)) else {
            eprintln!("skipped: {chart} is not in the corpus");
            continue;
        };
        let mesh = Mesh::start(&[("chart.yaml", &text)]).await;
        assert_eq!(mesh.refused(), [""; 0], "{chart}");
        assert!(!mesh.running.snapshot.load().rules.is_empty());
    }
}

#[tokio::test]
async fn the_samples_load_beside_the_chart() {
    let Some(corpus) = corpus() else { return };
    let chart = "mixer/yaml/1.0.9/install/kubernetes/helm/istio/charts/mixer/templates/config.rendered.yaml";
    let chart = fs::read_to_string(corpus.join(chart)).unwrap();
    let mut loaded = 0;
    let mut mesh = Mesh::start(&[("chart.yaml", &chart)]).await;
    for folder in [
        "mixer/yaml/1.0.9/samples/bookinfo/policy",
        "mixer/yaml/1.0.9/mixer/testdata/config",
        "mixer/yaml/1.4.10/samples/bookinfo/policy",
        "mixer/yaml/1.4.10/samples/bookinfo/telemetry",
        "mixer/yaml/1.4.10/mixer/testdata/config",
        "mixer/yaml/1.4.10/samples/sleep/policy",
        "pilot/samples/1.4.10/samples/bookinfo/policy",
        "pilot/samples/1.4.10/samples/bookinfo/telemetry",
    ] {
        let Ok(files) = fs::read_dir(corpus.join(folder)) else {
            continue;
        };
        for file in files {
            let path = file.unwrap().path();
            let sample = fs::read_to_string(&path).unwrap();
            if path.extension().is_none_or(|e| e != "yaml") || !sample.contains("config.istio.io") {
                continue;
            }
            let sample = match path.file_name().and_then(|n| n.to_str()) {
                // Its handler is in the file beside it.
                Some("source_user_filter.yaml") => {
                    let beside = fs::read_to_string(path.with_file_name("deny.yaml")).unwrap();
                    format!("{sample}\n---\n{beside}")
                }
                _ => sample,
            };
            mesh.apply("sample.yaml", Some(&sample)).await;
            let refused = mesh.refused();
            let lacks = refused
                .iter()
                .any(|p| MISSING.iter().any(|m| p.contains(m)));
            let is_defined_twice = refused.iter().any(|p| p.contains("already defined")); // a sample that repeats the chart
            if !lacks && !is_defined_twice {
                assert_eq!(refused, [""; 0], "{}", path.display());
                loaded += 1;
            }
            mesh.apply("sample.yaml", None).await;
        }
    }
    eprintln!("{loaded} sample files load");
    assert!(loaded >= 25, "{loaded}");
}

/// All files below `folder`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn admission_is_as_the_files_are_named() {
    let Some(corpus) = corpus() else { return };
    let mut all = Vec::new();
    files(&corpus.join("mixer/yaml"), &mut all);
    let (mut accepted, mut refused) = (0, 0);
    for path in all {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let is_valid = name.ends_with("-valid.yaml");
        if !is_valid && !name.ends_with("-invalid.yaml") {
            continue;
        }
        let set = validate::read(std::slice::from_ref(&path)).unwrap();
        let problems = validate::snapshot(&set, "istio-system").problems;
        let wrong: Vec<String> = problems
            .iter()
            .filter(|p| p.is_refused)
            .map(ToString::to_string)
            .collect();
        assert_eq!(wrong.is_empty(), is_valid, "{name}: {wrong:?}");
        // Whoever gets a refusal can find the place.
        assert!(
            wrong.iter().all(|w| w.contains(&format!("{name}:"))),
            "{wrong:?}"
        );
        accepted += usize::from(is_valid);
        refused += usize::from(!is_valid);
    }
    eprintln!("{accepted} files are accepted and {refused} refused, as they are named");
    assert!(accepted > 20 && refused > 20);
}

/// Descriptors of adapters and templates, handlers and instances of them.
#[test]
fn descriptors_load() {
    let Some(corpus) = corpus() else { return };
    let mut all = Vec::new();
    files(&corpus.join("mixer/yaml"), &mut all);
    let (mut templates, mut adapters) = (0, 0);
    for path in all {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let has = |kind: &str| text.lines().any(|line| line == format!("kind: {kind}"));
        if path.to_string_lossy().contains("invalid") || !has("adapter") && !has("template") {
            continue;
        }
        let set = validate::read(std::slice::from_ref(&path)).unwrap();
        let snapshot = validate::snapshot(&set, "istio-system");
        let wrong = snapshot.problems.iter().find(|p| p.is_refused);
        assert!(wrong.is_none(), "{}", wrong.unwrap());
        templates += snapshot.remotes.templates.len();
        adapters += snapshot.remotes.adapters.len();
    }
    eprintln!("{templates} templates and {adapters} adapters are described");
    assert!(templates >= 10 && adapters >= 10, "{templates}, {adapters}");
}

async fn checked(mesh: &mut Mesh, version: &str) -> PreconditionResult {
    mesh.check(&[
        ("destination.namespace", text("default")),
        ("destination.labels", map(&[("app", "ratings")])),
        (
            "source.labels",
            map(&[("app", "reviews"), ("version", version)]),
        ),
    ])
    .await
}

#[tokio::test]
async fn the_denial_samples_deny() {
    let Some(corpus) = corpus() else { return };
    let folder = corpus.join("mixer/yaml/1.4.10/samples/bookinfo/policy");
    for (file, want) in [
        (
            "mixer-rule-deny-label.yaml",
            "PERMISSION_DENIED:denyreviewsv3handler.handler.default:Not allowed",
        ),
        (
            "mixer-rule-deny-label-crd.yaml",
            "PERMISSION_DENIED:denyreviewsv3handler.denier.default:Not allowed",
        ),
        (
            "mixer-rule-deny-whitelist.yaml",
            "PERMISSION_DENIED:whitelist.handler.default:v3 is not whitelisted",
        ),
        (
            "mixer-rule-deny-whitelist-crd.yaml",
            "PERMISSION_DENIED:whitelist.listchecker.default:v3 is not whitelisted",
        ),
    ] {
        let sample = fs::read_to_string(folder.join(file)).unwrap();
        let mut mesh = Mesh::start(&[("sample.yaml", &sample)]).await;
        assert_eq!(mesh.refused(), [""; 0], "{file}");
        assert_eq!(told(&checked(&mut mesh, "v3").await), want, "{file}");
        assert_eq!(told(&checked(&mut mesh, "v2").await), "OK:", "{file}");
    }
}

/// What processes see of a template.
fn seen(template: &RemoteTemplate) -> Vec<String> {
    let mut seen = vec![format!(
        "{} {:?} {:?}",
        template.path, template.variety, template.numbers
    )];
    let mut messages = vec![template.instance.clone()];
    messages.extend(template.types.clone());
    for message in messages {
        let fields = message.fields().map(|field| {
            let kind = format!("{:?}", field.kind());
            // Entries of maps are shown by their own fields.
            let entry = match field.kind() {
                Kind::Message(entry) if field.is_map() => {
                    format!("{:?}", entry.map_entry_value_field().kind())
                }
                _ => String::new(),
            };
            format!(
                "{} {} = {} {kind} {entry} {}",
                message.full_name(),
                field.name(),
                field.number(),
                field.is_list()
            )
        });
        let mut fields: Vec<_> = fields.collect();
        fields.sort();
        seen.extend(fields);
    }
    seen
}

#[test]
fn templates_that_are_built_in_are_istios() {
    let Some(corpus) = corpus() else { return };
    let mut found = Vec::new();
    files(&corpus.join("mixer/yaml/1.4.10/mixer"), &mut found);
    let (mut read, mut compared) = (0, Vec::new());
    for path in found {
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        if !text.contains("kind: template") {
            continue;
        }
        let first = text.split("\n---").next().unwrap();
        let object: serde_json::Value = serde_saphyr::from_str(first).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap();
        let source = Source {
            key: Key {
                kind: "template".into(),
                namespace: "istio-system".into(),
                name: name.into(),
            },
            annotations: Default::default(),
            spec: std::sync::Arc::new(object["spec"].clone()),
            origin: None,
        };
        let theirs = RemoteTemplate::read(&source)
            .unwrap_or_else(|fault| panic!("{}: {}", path.display(), fault.reason));
        read += 1;
        // Istio's tests have another template that is called quota.
        let built_in = RemoteTemplate::built_in(name, "istio-system");
        if let Some(ours) = built_in.filter(|ours| ours.template_name == theirs.template_name) {
            assert_eq!(seen(&ours), seen(&theirs), "{name}");
            compared.push(name.to_owned());
        }
    }
    compared.sort();
    eprintln!("{read} templates of Istio are read, {compared:?} are the same here");
    assert!(read >= 8 && compared.len() >= 4, "{read}, {compared:?}");
}
