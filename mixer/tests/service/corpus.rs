//! Istio's own files, unmodified: everything for the adapters and templates that exist here loads.
//!
//! The files are not ours to keep; `LATEEN_CORPUS` says where they are (`../shared/corpus` beside the
//! repository if it exists). Without them this says so and tests nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lateen_protocols::istio::mixer::v1::check_response::PreconditionResult;

use crate::support::{Mesh, map, text, told};

fn corpus() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let path = std::env::var_os("LATEEN_CORPUS").map_or(beside, PathBuf::from);
    if path.join("mixer/yaml").is_dir() {
        Some(path)
    } else {
        eprintln!("skipped: there is no corpus at {}", path.display());
        None
    }
}

/// What this version says it does not have.
const MISSING: &[&str] = &[
    "there is no adapter or template",
    "unknown adapter",
    "unknown template",
    "of one's own are not supported",
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
