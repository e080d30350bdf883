//! Pods of every shape: each file of `testdata` is an input, what is printed for it is beside it as `.injected`.
#![cfg(test)]

use std::path::{Path, PathBuf};

use lateen_inject::{Outcome, Settings, Skipped, inject, inject_pod, inject_text, settings, text};
use serde_json::{Value, json};

fn inputs() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect();
    all.sort();
    all
}

#[test]
fn each_shape_becomes_what_is_kept() {
    let inputs = inputs();
    assert!(inputs.len() >= 12, "{} shapes", inputs.len());
    for path in inputs {
        let input = std::fs::read_to_string(&path).unwrap();
        let got = inject_text(&input, &Settings::default()).unwrap_or_else(|error| {
            panic!("{}: {error}", path.display());
        });
        let kept = path.with_extension("yaml.injected");
        let Ok(want) = std::fs::read_to_string(&kept) else {
            std::fs::write(&kept, got.text).unwrap();
            panic!("{} is new: look at it, and run this again", kept.display());
        };
        assert_eq!(got.text, want, "{}", path.display());
        // Again, nothing changes.
        let again = inject_text(&got.text, &Settings::default()).unwrap();
        assert_eq!(again.text, got.text, "{}", path.display());
        let changed =
            |(_, _, outcome): &(u32, String, Outcome)| matches!(outcome, Outcome::Injected(_));
        assert!(!again.outcomes.iter().any(changed), "{}", path.display());
    }
}

fn pod(metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
}

fn plain() -> Value {
    json!({"containers": [{"name": "app", "image": "app:1"}]})
}

#[test]
fn who_says_no_or_shares_the_node_gets_none() {
    let node = json!({"hostNetwork": true, "containers": [{"name": "app"}]});
    let no = |part: &str| json!({"name": "p", part: {"sidecar.istio.io/inject": "false"}});
    for (metadata, spec, want) in [
        (json!({"name": "p"}), node, Skipped::HostNetwork),
        (no("labels"), plain(), Skipped::Refused("false".to_owned())),
        (
            no("annotations"),
            plain(),
            Skipped::Refused("false".to_owned()),
        ),
        (
            json!({"name": "p", "namespace": "kube-system"}),
            plain(),
            Skipped::SystemNamespace("kube-system".to_owned()),
        ),
    ] {
        let mut object = pod(metadata, spec);
        let before = object.clone();
        let outcome = inject(&mut object, &Settings::default()).unwrap();
        assert_eq!((outcome, &object), (Outcome::Left(want), &before));
    }
    // The label counts before the annotation.
    let mut both = pod(
        json!({
            "name": "p", "labels": {"sidecar.istio.io/inject": "true"},
            "annotations": {"sidecar.istio.io/inject": "false"},
        }),
        plain(),
    );
    let shy = Settings {
        inject_by_default: false,
        ..Settings::default()
    };
    assert_eq!(inject(&mut both, &shy).unwrap(), Outcome::Injected(1));
    let mut silent = pod(json!({"name": "p"}), plain());
    let outcome = inject(&mut silent, &shy).unwrap();
    assert_eq!(outcome, Outcome::Left(Skipped::NotAsked));
}

#[test]
fn what_is_wrong_changes_nothing_and_says_where() {
    for (annotations, container, want) in [
        (
            json!({"traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.0.0.0/40"}),
            json!({"name": "app"}),
            "annotation traffic.sidecar.istio.io/excludeOutboundIPRanges: \"10.0.0.0/40\" is no CIDR range",
        ),
        (
            json!({"sidecar.istio.io/interceptionMode": "redirect"}),
            json!({"name": "app"}),
            "annotation sidecar.istio.io/interceptionMode: \"redirect\" is none of REDIRECT, TPROXY, NONE",
        ),
        (
            json!({"proxy.istio.io/config": "[1"}),
            json!({"name": "app"}),
            "annotation proxy.istio.io/config: is not YAML",
        ),
        (
            json!({"inject.istio.io/templates": "sidecar,mine"}),
            json!({"name": "app"}),
            "template mine: is not known",
        ),
        (
            json!({}),
            json!({"name": "app", "livenessProbe": {"httpGet": {"port": "web"}}}),
            "container app: livenessProbe: \"web\" is no name of a port",
        ),
    ] {
        let mut object = pod(
            json!({"name": "p", "annotations": annotations}),
            json!({"containers": [container]}),
        );
        let before = object.clone();
        let error = inject(&mut object, &Settings::default()).unwrap_err();
        assert!(error.to_string().starts_with(want), "{error}");
        assert_eq!(object, before);
    }
    let error = inject_text("kind: A\n---\n\na: [1\n", &Settings::default()).unwrap_err();
    assert!(error.to_string().starts_with("line "), "{error}");
}

#[test]
fn templates_replace_and_add() {
    let patch = json!({"spec": {
        "containers": [{"name": "istio-proxy", "env": [{"name": "W", "value": "${workload}"}], "ports": null}],
    }});
    let mut settings = Settings::default();
    settings.templates.insert("mine".to_owned(), patch);
    let mut object = pod(
        json!({"name": "p", "annotations": {"inject.istio.io/templates": "sidecar,mine"}}),
        plain(),
    );
    inject(&mut object, &settings).unwrap();
    let proxy = &object["spec"]["containers"][1];
    assert_eq!(proxy["ports"], Value::Null);
    let env = proxy["env"].as_array().unwrap();
    assert!(env.contains(&json!({"name": "W", "value": "p"})));

    let whole = json!({"spec": {"containers": [{"name": "istio-proxy", "image": "${image}"}]}});
    settings.templates.insert("sidecar".to_owned(), whole);
    let mut object = pod(json!({"name": "p"}), plain());
    inject(&mut object, &settings).unwrap();
    let proxy = json!({"name": "istio-proxy", "image": settings::Settings::default().image});
    assert_eq!(object["spec"]["containers"][1], proxy);
    assert_eq!(object["spec"]["initContainers"], Value::Null);
}

#[test]
fn what_is_not_changed_stays_as_it_is_written() {
    let input = "# before\nkind: Service   # keep\napiVersion: v1\nmetadata: {name: s}\n---\n# nothing\n---\n\
                 apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a, image: b}]}\n";
    let injected = inject_text(input, &Settings::default()).unwrap();
    assert!(injected.text.starts_with(
        "# before\nkind: Service   # keep\napiVersion: v1\nmetadata: {name: s}\n---\n# nothing\n---\n"
    ));
    let lines: Vec<(u32, &str)> = injected
        .outcomes
        .iter()
        .map(|(line, name, _)| (*line, name.as_str()))
        .collect();
    assert_eq!(lines, [(2, "Service/s"), (8, "Pod/p")]);
}

#[test]
fn strings_stay_strings_for_every_reader() {
    let strings = [
        "yes",
        "no",
        "on",
        "Off",
        "y",
        "true",
        "null",
        "~",
        "",
        "1e3",
        "0x1F",
        "012",
        "1_000",
        "1.5",
        "- a",
        "a: b",
        "a #b",
        "*",
        "{}",
        "multi\nline\n",
        "ü\u{7f}",
        "=",
        "<<",
        "2001-01-01",
        "a/b",
        ".inf",
        "%x",
        "@x",
        "'",
        "\"",
    ];
    let object = json!({"strings": strings, "nested": [[1, "no"], {"a": [{"b": {}, "c": [], "d": [{"e": 1.5}]}]}]});
    let written = text::write(&object);
    let read = lateen_config::yaml::documents(&written).unwrap();
    assert_eq!(read[0].value, object, "{written}");
    assert!(
        written.contains("- \"yes\"\n- \"no\"\n- \"on\"\n- \"Off\"\n- \"y\"\n"),
        "{written}"
    );
}

/// As the API server shows a Deployment's pod: no name, no namespace.
#[test]
fn an_arriving_pod_belongs_to_its_owners_owner() {
    let owned = |kind: &str, name: &str| {
        json!({
            "generateName": "cart-5d6c-", "labels": {"pod-template-hash": "5d6c"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": kind, "name": name, "controller": true}],
        })
    };
    let env = |pod: &Value, container: &str, name: &str| {
        let all = pod.pointer(container).unwrap()["env"].as_array().unwrap();
        let found = all.iter().find(|one| one["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}"))["value"].clone()
    };
    let mut arriving = pod(owned("ReplicaSet", "cart-5d6c"), plain());
    let got = inject_pod(&mut arriving, "shop", &Settings::default());
    assert_eq!(got.outcome, Ok(Outcome::Injected(1)));
    assert_eq!(got.name, "pod shop/cart-5d6c-* (Deployment cart)");
    assert_eq!(
        env(&arriving, "/spec/containers/1", "ISTIO_META_OWNER"),
        "kubernetes://apis/apps/v1/namespaces/shop/deployments/cart"
    );
    // The namespace is the request's business; the pod does not get one.
    assert_eq!(arriving.pointer("/metadata/namespace"), None);
    let once = arriving.clone();
    let again = inject_pod(&mut arriving, "shop", &Settings::default());
    assert_eq!(again.outcome, Ok(Outcome::Left(Skipped::Already)));
    assert_eq!(arriving, once);

    // A Job's pod ends although its sidecar does not.
    let mut of_job = pod(owned("Job", "night-28345680"), plain());
    let got = inject_pod(&mut of_job, "shop", &Settings::default());
    assert_eq!(got.name, "pod shop/cart-5d6c-* (CronJob night)");
    let native = of_job.pointer("/spec/initContainers/1/restartPolicy");
    assert_eq!(native, Some(&json!("Always")));

    let mut system = pod(json!({"name": "dns"}), plain());
    let got = inject_pod(&mut system, "kube-system", &Settings::default());
    let left = Skipped::SystemNamespace("kube-system".to_owned());
    assert_eq!(got.outcome, Ok(Outcome::Left(left)));
    assert_eq!(system, pod(json!({"name": "dns"}), plain()));
}
