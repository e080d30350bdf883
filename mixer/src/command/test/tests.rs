use std::fs;

use super::*;

const POLICY: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: deny, namespace: istio-system }
spec: { compiledAdapter: denier, params: { status: { code: 7, message: not you } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: nothing, namespace: istio-system }
spec: { compiledTemplate: checknothing }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: red, namespace: istio-system }
spec:
  match: source.labels["version"] == "v3"
  actions: [ { handler: deny, instances: [ nothing ] } ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: headers, namespace: istio-system }
spec:
  requestHeaderOperations: [ { name: x-user, values: [ 'request.auth.principal | "nobody"' ] } ]
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: limits, namespace: istio-system }
spec:
  compiledAdapter: ADAPTER
  params:
    quotas:
    - name: requestcount.instance.istio-system
      maxAmount: 2
      validDuration: 5s
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: requestcount, namespace: istio-system }
spec: { compiledTemplate: quota, params: { dimensions: { source: source.name | "unknown" } } }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: quota, namespace: istio-system }
spec: { actions: [ { handler: limits, instances: [ requestcount ] } ] }
"#;

const TESTS: &str = r#"
attributes: { source.labels: { version: v1 } }
tests:
- name: red is denied
  attributes: { source.labels: { version: v3 } }
  expect: { code: PERMISSION_DENIED, rule: red, message: not you }
- name: black is not
  attributes: recorded.json
  expect: { requestHeaders: { x-user: jason } }
- name: two in five seconds
  steps:
  - quotas: { requestcount: 1 }
    repeat: 3
    expect: { granted: { requestcount: [ 1, 1, 0 ] } }
  - after: 6s
    quotas: { requestcount: 1 }
    expect: { granted: { requestcount: 1 } }
"#;

async fn run_in(files: &[(&str, &str)], more: &[&str]) -> (Result<(), String>, String) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let options = Options {
        directory: folder.path().to_owned(),
        run: more.first().map(|s| (*s).to_owned()),
        verbose: false,
    };
    let mut out = Vec::new();
    let result = run(&options, &mut out).await.map_err(|e| format!("{e:#}"));
    let out = String::from_utf8(out).unwrap();
    (
        result,
        out.replace(&folder.path().display().to_string(), "DIR"),
    )
}

const RECORDED: &str = r#"{"request.auth.principal": "jason", "source.ip": "10.0.0.1"}"#;

#[tokio::test]
async fn good_policy_passes_with_either_quota_adapter() {
    for adapter in ["memquota", "redisquota"] {
        let policy = POLICY.replace("ADAPTER", adapter);
        let files = [
            ("policy.yaml", &*policy),
            ("a_test.yaml", TESTS),
            ("recorded.json", RECORDED),
        ];
        let (result, out) = run_in(&files, &[]).await;
        assert_eq!(result, Ok(()), "{out}");
        assert!(out.starts_with("3 passed, 0 failed in "), "{out}");
    }
}

#[tokio::test]
async fn what_is_not_as_expected_is_told_with_its_place_and_why() {
    let policy = POLICY.replace("ADAPTER", "memquota");
    let tests = "tests:\n- name: red passes\n  attributes: { source.labels: { version: v3 } }\n- name: no limit\n  attributes: { source.labels: {} }\n  quotas: { requestcount: 1 }\n  repeat: 3\n  expect: { granted: { requestcount: 1 }, requestHeaders: { x-user: me } }\n";
    let (result, out) = run_in(&[("policy.yaml", &policy), ("a_test.yaml", tests)], &[]).await;
    assert_eq!(result, Err("2 tests failed".to_owned()));
    for line in [
        "FAILED DIR/a_test.yaml:2: red passes",
        "  is PERMISSION_DENIED deny.handler.istio-system:not you, not OK",
        "    red.rule.istio-system DIR/policy.yaml:15: if source.labels[\"version\"] == \"v3\"",
        "      deny.handler.istio-system (denier) given nothing.instance.istio-system: PERMISSION_DENIED deny.handler.istio-system:not you",
        "    source.labels[version] = \"v3\"",
        "FAILED DIR/a_test.yaml:4: no limit",
        "  request 3: quota requestcount: 0 granted, not 1",
        "  request 1: request header x-user is Some(Some(\"nobody\")), not Some(\"me\")",
    ] {
        assert!(out.lines().any(|l| l == line), "{line}\nin\n{out}");
    }
    let (result, out) = run_in(
        &[("policy.yaml", &policy), ("a_test.yaml", tests)],
        &["limit"],
    )
    .await;
    assert_eq!(result, Err("1 tests failed".to_owned()), "{out}");
}

#[tokio::test]
async fn wrong_files_are_errors() {
    let policy = POLICY.replace("ADAPTER", "memquota");
    for (policy, tests, want) in [
        (&*policy, "tests: [ { nmae: x } ]", "unknown field `nmae`"),
        (&policy, "tests: []", "no test was run"),
        (
            &policy,
            "tests: [ { name: x, attributes: { source.nam: x } } ]",
            "no manifest declares source.nam",
        ),
        (
            &policy,
            "tests: [ { name: x, steps: [ { after: soon } ] } ]",
            "\"soon\" is no time",
        ),
        (
            &policy.replace("== \"v3\"", "== 3"),
            "tests: [ { name: x } ]",
            "the configuration has 1 errors",
        ),
    ] {
        let (result, out) = run_in(&[("policy.yaml", policy), ("a_test.yaml", tests)], &[]).await;
        assert!(
            result.clone().unwrap_err().contains(want),
            "{result:?} {out}"
        );
    }
    let (result, _) = run_in(&[("policy.yaml", &policy)], &[]).await;
    assert_eq!(
        result.unwrap_err().split(" in ").next(),
        Some("there is no *_test.yaml")
    );
}

#[tokio::test]
async fn sixty_cases_take_less_than_a_second() {
    let policy = POLICY.replace("ADAPTER", "memquota");
    let mut tests = "tests:\n".to_owned();
    for i in 0..60 {
        tests.push_str(&format!(
            "- name: case {i}\n  attributes: {{ source.labels: {{ version: v3 }}, source.name: s{i} }}\n  expect: {{ code: PERMISSION_DENIED, rule: red }}\n"
        ));
    }
    let begun = Instant::now();
    let (result, out) = run_in(&[("policy.yaml", &policy), ("a_test.yaml", &tests)], &[]).await;
    assert_eq!(result, Ok(()), "{out}");
    assert!(out.starts_with("60 passed"), "{out}");
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}
