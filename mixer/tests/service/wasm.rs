//! wasm: a guest in rules, what it does to its own rule and to others, and what becomes of bad ones.

use std::{fs, path::Path, time::Duration};

use lateen_adapter::template;
use lateen_wasm::testing::component;

use crate::support::{Mesh, get, text, told};

const LIST: &str = include_str!("../../wasm/tests/guests/list.wat");

/// A component that takes listentry, in `file`.
pub(crate) fn write_list(file: &Path) {
    fs::write(file, component(LIST, &[&template::LISTENTRY]).unwrap()).unwrap();
}

fn rules(file: &Path) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: guest, namespace: istio-system }}
spec:
  compiledAdapter: wasm
  params: {{ file: {}, fuel: 1000000000, timeout: 100ms }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: path, namespace: istio-system }}
spec: {{ compiledTemplate: listentry, params: {{ value: request.path | "" }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: closed, namespace: istio-system }}
spec:
  match: (request.method | "") == "GET"
  actions: [ {{ handler: guest, instances: [ path ] }} ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata:
  name: open
  namespace: istio-system
  annotations: {{ policy.istio.io/fail-mode: open }}
spec:
  match: (request.method | "") == "PUT"
  actions: [ {{ handler: guest, instances: [ path ] }} ]
"#,
        file.display()
    )
}

#[tokio::test]
async fn a_guest_decides_and_hurts_its_own_rule_only() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.wasm");
    write_list(&file);
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&file))]).await;
    assert_eq!(mesh.problems(), []);
    for (method, path, want) in [
        ("GET", "ok", "OK:"),
        (
            "GET",
            "not",
            "NOT_FOUND:guest.handler.istio-system:not on the list",
        ),
        ("POST", "trap", "OK:"),
        ("PUT", "trap", "OK:"),
        ("PUT", "loop", "OK:"),
    ] {
        let attributes = [
            ("request.method", text(method)),
            ("request.path", text(path)),
        ];
        assert_eq!(
            told(&mesh.check(&attributes).await),
            want,
            "{method} {path}"
        );
    }
    for path in ["trap", "loop", "grow", "bad", "error"] {
        let attributes = [
            ("request.method", text("GET")),
            ("request.path", text(path)),
        ];
        let verdict = told(&mesh.check(&attributes).await);
        assert!(verdict.starts_with("UNAVAILABLE:"), "{path}: {verdict}");
    }
    // While one guest loops, others are asked.
    let mut other = mesh.client.clone();
    let looping = [
        ("request.method", text("GET")),
        ("request.path", text("loop")),
    ];
    let request = crate::support::request(&looping, &[], "");
    let looping = tokio::spawn(async move { other.check(request).await.unwrap() });
    let begun = tokio::time::Instant::now();
    let attributes = [
        ("request.method", text("GET")),
        ("request.path", text("ok")),
    ];
    assert_eq!(told(&mesh.check(&attributes).await), "OK:");
    assert!(begun.elapsed() < Duration::from_secs(5));
    looping.await.unwrap();
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    for event in ["guest_traps", "guest_late", "guest_memory_refused"] {
        let counted = metrics
            .lines()
            .any(|line| line.contains("guest.handler.istio-system") && line.contains(event));
        assert!(counted, "{event}");
    }
}

#[tokio::test]
async fn a_bad_guest_is_refused_and_the_last_good_one_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (
        folder.path().join("good.wasm"),
        folder.path().join("bad.wasm"),
    );
    write_list(&good);
    fs::write(&bad, "no component").unwrap();
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&good))]).await;
    mesh.apply("rules.yaml", Some(&rules(&bad))).await;
    let problems = mesh.problems();
    let told_of = |p: &mixer::config::Problem| {
        let text = p.to_string();
        text.contains("rules.yaml") && text.contains("it is no component")
    };
    assert!(
        problems.iter().any(|p| told_of(p) && p.is_held),
        "{problems:?}"
    );
    let attributes = [
        ("request.method", text("GET")),
        ("request.path", text("not")),
    ];
    assert!(told(&mesh.check(&attributes).await).starts_with("NOT_FOUND:"));
}
