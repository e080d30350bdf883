//! Istio's own injector inputs and what it made of them, where `LATEEN_CORPUS` names the folder that has them: every
//! input gets its sidecar, and the essentials agree but for what is listed here.
#![cfg(test)]

use std::path::{Path, PathBuf};

use lateen_config::yaml;
use lateen_inject::{INIT, Outcome, PROXY, Settings, inject, workload};
use serde_json::{Value, json};

/// Inputs that ask for what there is not, or where another answer is better.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "custom-template",
        "a template of Istio's, in Go's template language",
    ),
    (
        "grpc-agent",
        "template grpc-agent: an agent without a proxy",
    ),
    ("grpc-simple", "template grpc-simple: no proxy at all"),
    (
        "sidecar-spire",
        "a template of Istio's, in Go's template language",
    ),
    (
        "only-proxy-container",
        "a pod must have a container: Istio's result has none",
    ),
    (
        "hello-openshift",
        "a platform that gives users out itself, and rules by CNI: we have neither",
    ),
    (
        "proxy-resources-null",
        "resources by values of Istio's own installer",
    ),
    (
        "proxy-resources-zero",
        "resources by values of Istio's own installer",
    ),
    (
        "traffic-params",
        "settings of the test by values of Istio's own installer",
    ),
];

/// Volumes that Istio's agent needs and ours does not: sockets of other agents, mounted certificates, a CRL.
const NOT_OURS: [&str; 4] = [
    "workload-socket",
    "credential-socket",
    "workload-certs",
    "istio-ca-crl",
];

fn folder() -> Option<PathBuf> {
    match std::env::var_os("LATEEN_CORPUS") {
        Some(folder) => Some(Path::new(&folder).join("pilot/extra/inject")),
        None => {
            eprintln!("SKIPPED: LATEEN_CORPUS names no folder");
            None
        }
    }
}

fn read(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let documents = yaml::documents(&text).unwrap();
    documents
        .into_iter()
        .map(|document| document.value)
        .collect()
}

/// What of a pod decides how it runs and what gets through.
fn essentials(object: &Value) -> Vec<Value> {
    let mut object = object.clone();
    // One of Istio's results has no container left.
    let found = workload::find(&mut object).unwrap_or_default();
    found
        .iter()
        .map(|found| pod_essentials(found.pod))
        .collect()
}

fn pod_essentials(pod: &Value) -> Value {
    let list = |name: &str| pod["spec"][name].as_array().cloned().unwrap_or_default();
    let container = |container: &Value| {
        let name = container["name"].as_str().unwrap();
        let mut kept = json!({"name": name});
        for field in [
            "ports",
            "securityContext",
            "resources",
            "restartPolicy",
            "readinessProbe",
            "livenessProbe",
            "startupProbe",
        ] {
            if !container[field].is_null() && container[field] != json!({}) {
                kept[field] = container[field].clone();
                normalise(&mut kept[field]);
            }
        }
        if name == INIT {
            kept["interception"] = interception(container);
        }
        if name == PROXY {
            let env = container["env"].as_array().cloned().unwrap_or_default();
            let probers = env
                .iter()
                .find(|env| env["name"] == "ISTIO_KUBE_APP_PROBERS");
            if let Some(probers) = probers.and_then(|env| env["value"].as_str()) {
                kept["probers"] = serde_json::from_str(probers).unwrap();
            }
        }
        kept
    };
    let mut volumes: Vec<String> = list("volumes")
        .iter()
        .map(|volume| volume["name"].as_str().unwrap().to_owned())
        .filter(|name| !NOT_OURS.contains(&name.as_str()))
        .collect();
    volumes.sort();
    let labels = pod["metadata"]["labels"].clone();
    json!({
        "containers": list("containers").iter().map(container).collect::<Vec<_>>(),
        "initContainers": list("initContainers").iter().map(container).collect::<Vec<_>>(),
        "volumes": volumes, "labels": labels,
        "imagePullSecrets": pod["spec"]["imagePullSecrets"],
    })
}

/// Two ways to write one thing: `3000m` and `3`, the default scheme and none.
fn normalise(value: &mut Value) {
    let Value::Object(map) = value else { return };
    if map.get("scheme") == Some(&json!("HTTP")) {
        map.remove("scheme");
    }
    for (name, value) in map {
        let thousands = value.as_str().and_then(|text| text.strip_suffix("000m"));
        match thousands {
            Some(whole) if name == "cpu" => *value = json!(whole),
            _ => normalise(value),
        }
    }
}

/// The flags with their values, in no order. Istio's `-g` has the same default.
fn interception(container: &Value) -> Value {
    let words: Vec<&str> = container["args"]
        .as_array()
        .map(|args| args.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let mut flags = json!({});
    for pair in words.windows(2) {
        if pair[0].len() == 2 && pair[0].starts_with('-') && pair[0] != "-g" {
            flags[pair[0]] = json!(pair[1]);
        }
    }
    flags
}

/// The settings under which Istio's results were made.
fn settings() -> Settings {
    Settings {
        native_sidecar: Some(true),
        ..Settings::default()
    }
}

#[test]
fn istios_inputs_get_istios_essentials() {
    let Some(folder) = folder() else { return };
    let (mut same, mut differ) = (0, Vec::new());
    let mut inputs: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.ends_with(".yaml") && !name.contains(".iop.")
        })
        .collect();
    inputs.sort();
    assert!(inputs.len() > 25, "{} inputs", inputs.len());
    for path in inputs {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let wanted = folder.join(format!("{name}.yaml.injected"));
        let known = DIFFERENT.iter().find(|(known, _)| *known == name);
        let mut objects = read(&path);
        let outcomes: Result<Vec<Outcome>, _> = objects
            .iter_mut()
            .map(|object| inject(object, &settings()))
            .collect();
        if !wanted.exists() {
            // Istio refuses it, and so do we.
            assert!(outcomes.is_err(), "{name}: {outcomes:?}");
            continue;
        }
        if let (Err(error), None) = (&outcomes, known) {
            panic!("{name}: {error}");
        }
        let got: Vec<Value> = objects.iter().flat_map(essentials).collect();
        let want: Vec<Value> = read(&wanted).iter().flat_map(essentials).collect();
        match (got == want, known) {
            (true, None) => same += 1,
            (true, Some((_, why))) => panic!("{name} agrees, though it is listed: {why}"),
            (false, Some((_, why))) => eprintln!("{name} differs: {why}"),
            (false, None) => differ.push((name, got, want)),
        }
    }
    for (name, got, want) in &differ {
        eprintln!("== {name}");
        for (got, want) in got.iter().zip(want) {
            for field in [
                "containers",
                "initContainers",
                "volumes",
                "labels",
                "imagePullSecrets",
            ] {
                if got[field] != want[field] {
                    eprintln!(
                        "  {field}\n    ours   {}\n    istio  {}",
                        got[field], want[field]
                    );
                }
            }
        }
    }
    eprintln!("{same} agree");
    assert!(differ.is_empty(), "{} differ unexpectedly", differ.len());
}
