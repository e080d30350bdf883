//! Tools run as the command line runs them, on rows of our own and on foreign ones where they are.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

const MESH: &str = "
apiVersion: v1
kind: Service
metadata: { name: reviews, namespace: default }
spec: { clusterIP: 10.0.0.1, selector: { app: reviews }, ports: [{ name: http, port: 9080 }] }
";

fn run(tool: &Tool) -> (Result<String, String>, String) {
    let (mut out, mut complaints) = (Vec::new(), Vec::new());
    let result = tool.run(&mut out, &mut complaints);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        result
            .map(|()| text(out))
            .map_err(|error| error.to_string()),
        text(complaints),
    )
}

fn translated(folder: &Path, node: &str) -> (Result<String, String>, String) {
    run(&Tool::Translate(TranslateArgs {
        node: node.to_owned(),
        metadata: "{ LABELS: { app: x } }".to_owned(),
        agent: "envoy".to_owned(),
        files: vec![folder.to_owned()],
        registry: Vec::new(),
    }))
}

const NODE: &str = "sidecar~10.1.1.1~a.default~default.svc.cluster.local";

#[test]
fn translate_prints_envoys_json() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.yaml"), MESH).unwrap();
    let (out, complaints) = translated(folder.path(), NODE);
    assert_eq!(complaints, "");
    let out: Value = serde_json::from_str(&out.unwrap()).unwrap();
    let names = |kind: &str| -> Vec<&str> {
        out[kind]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|one| one["name"].as_str())
            .collect()
    };
    assert_eq!(
        names("listeners"),
        ["0.0.0.0_9080", "virtualInbound", "virtualOutbound"]
    );
    assert!(names("clusters").contains(&"outbound|9080||reviews.default.svc.cluster.local"));
    assert_eq!(names("routes"), ["9080", "InboundPassthroughCluster"]);
}

#[test]
fn what_is_wrong_is_told_with_its_place_and_nothing_is_translated() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    std::fs::write(&file, MESH.replace("port: 9080", "port: many")).unwrap();
    let (out, complaints) = translated(folder.path(), NODE);
    assert_eq!(
        out.unwrap_err(),
        "errors in the configuration: 1; nothing is translated"
    );
    assert!(
        complaints.starts_with(&format!("{}:5: ", file.display())),
        "{complaints}"
    );
    let (out, _) = translated(folder.path(), "nobody");
    assert!(out.unwrap_err().contains("TYPE~IP~NAME.NAMESPACE~DOMAIN"));
}

fn rows(text: &str, tool: impl Fn(RowsArgs) -> Tool) -> Result<Vec<Value>, String> {
    let folder = tempfile::tempdir().unwrap();
    let jsonl = folder.path().join("rows.jsonl");
    std::fs::write(&jsonl, text).unwrap();
    let (out, _) = run(&tool(RowsArgs { jsonl }));
    Ok(out?
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect())
}

fn service(name: &str, ip: &str, port: u16, port_name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"name": port_name, "port": port}]}})
}

#[test]
fn a_call_is_walked_to_its_cluster() {
    let row = json!({
        "name": "walk",
        "proxy": {"type": "sidecar", "namespace": "default"},
        "kube": [service("web", "10.0.0.1", 80, "http"), service("db", "10.0.0.2", 5432, "tcp")],
        "config": [{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "web"},
            "spec": {"hosts": ["web.default.svc.cluster.local"], "http": [
                {"name": "v2", "match": [{"uri": {"prefix": "/v2"}, "headers": {"user": {"exact": "ann"}}}],
                 "route": [{"destination": {"host": "other"}}]},
                {"name": "rest", "route": [{"destination": {"host": "web.default.svc.cluster.local"}}]}]}}],
        "calls": [
            {"name": "v2", "call": {"Address": "10.0.0.1", "Port": 80, "Protocol": "HTTP", "Path": "/v2/x",
                "HostHeader": "web", "Headers": {"User": ["ann"]}}},
            {"name": "rest", "call": {"Address": "10.0.0.1", "Port": 80, "Protocol": "HTTP", "Path": "/v2/x", "HostHeader": "web"}},
            {"name": "db", "call": {"Address": "10.0.0.2", "Port": 5432, "Protocol": "TCP"}},
            {"name": "bytes", "call": {"Address": "10.0.0.1", "Port": 15001, "Protocol": "TCP"}},
        ],
    });
    let answers = rows(&row.to_string(), Tool::Simulate).unwrap();
    let calls = answers[0]["calls"].as_array().unwrap();
    assert_eq!(
        calls[0],
        json!({"name": "v2", "ListenerMatched": "0.0.0.0_80", "FilterChainMatched": calls[0]["FilterChainMatched"],
            "VirtualHostMatched": "web.default.svc.cluster.local:80", "RouteMatched": "v2",
            "RouteConfigMatched": "80", "ClusterMatched": "outbound|80||other.default", "Error": ""})
    );
    let cluster = |at: usize| calls[at]["ClusterMatched"].as_str().unwrap();
    assert_eq!(cluster(1), "outbound|80||web.default.svc.cluster.local");
    assert_eq!(cluster(2), "outbound|5432||db.default.svc.cluster.local");
    assert_eq!(cluster(3), "BlackHoleCluster");
}

#[test]
fn routes_lists_clusters_by_domain() {
    let row = |name: &str| {
        json!({"name": name, "proxy": {"type": "sidecar", "namespace": "default"}, "routeName": name,
            "kube": [service("web", "10.0.0.1", 80, "http")]})
    };
    let answers = rows(&format!("{}\n\n{}", row("80"), row("81")), Tool::Routes).unwrap();
    assert_eq!(
        answers[0]["vhost_clusters"]["web.default.svc.cluster.local"],
        json!(["outbound|80||web.default.svc.cluster.local"])
    );
    assert_eq!(answers[1], json!({"name": "81", "vhost_clusters": null}));
}

#[test]
fn a_line_that_is_no_row_is_named() {
    let error = rows("{}\n", Tool::Routes).unwrap_err();
    assert!(error.ends_with("rows.jsonl:1: not a row"), "{error}");
}

/// The rows of a foreign file, with our answers.
fn foreign(file: &str, tool: impl Fn(RowsArgs) -> Tool) -> Option<Vec<(Value, Value)>> {
    let Some(corpus) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("LATEEN_CORPUS is not set: {file} is not run");
        return None;
    };
    let path = Path::new(&corpus).join("pilot").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let (out, _) = run(&tool(RowsArgs { jsonl: path }));
    let out = out.unwrap();
    let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    Some(
        text.lines()
            .map(parse)
            .zip(out.lines().map(parse))
            .collect(),
    )
}

/// What differs from the fields that a call expects; with `StrictMatch`, from all of them.
fn differs(expected: &Value, got: &Value) -> BTreeMap<String, (Value, Value)> {
    let strict = expected["StrictMatch"] == true;
    [
        "ListenerMatched",
        "FilterChainMatched",
        "VirtualHostMatched",
        "RouteMatched",
        "RouteConfigMatched",
        "ClusterMatched",
        "Error",
    ]
    .into_iter()
    .filter_map(|field| {
        let want = match &expected[field] {
            Value::Null if strict => json!(""),
            // Upstream's walk stops at the error; a cluster that was found must not be there either.
            Value::Null if field == "Error" => json!(""),
            Value::Null => return None,
            value => value.clone(),
        };
        (want != got[field]).then(|| (field.to_owned(), (want, got[field].clone())))
    })
    .collect()
}

#[test]
fn calls_end_where_istios_do() {
    let Some(rows) = foreign("simulation.jsonl", Tool::Simulate) else {
        return;
    };
    let mut wrong = Vec::new();
    let mut calls = 0;
    for (row, answer) in rows {
        for (index, call) in row["calls"].as_array().unwrap().iter().enumerate() {
            calls += 1;
            let differs = differs(&call["expect"], &answer["calls"][index]);
            if !differs.is_empty() {
                wrong.push(format!(
                    "{} / {}: {differs:?} {}",
                    row["name"], call["name"], answer["problems"]
                ));
            }
        }
    }
    // One asks for addresses that Pilot does not give out: of ServiceEntries without any.
    assert!(
        wrong.len() <= 1,
        "{} of {calls}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn virtual_hosts_are_istios() {
    let Some(rows) = foreign("sidecar-routes.jsonl", Tool::Routes) else {
        return;
    };
    let mut wrong = Vec::new();
    let count = rows.len();
    for (row, answer) in rows {
        let got = &answer["vhost_clusters"];
        let fits = match &row["expected_vhost_clusters"] {
            Value::Object(hosts) => hosts.iter().all(|(host, want)| got[host] == *want),
            _ => got.is_null(),
        };
        if !fits {
            wrong.push(format!(
                "{}: {} {got} {}",
                row["name"], row["expected_vhost_clusters"], answer["problems"]
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {count}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// The row and the answer that the documentation shows.
#[test]
fn the_documented_row_is_answered_as_documented() {
    let page = include_str!("../../../docs/reference/translate.md");
    let blocks: Vec<Value> = page
        .split("```json\n")
        .skip(1)
        .map(|rest| serde_json::from_str(rest.split("```").next().unwrap()).unwrap())
        .collect();
    let [row, want] = blocks.as_slice() else {
        panic!("{blocks:?}")
    };
    let answers = rows(&row.to_string(), Tool::Simulate).unwrap();
    assert_eq!(answers[0]["name"], want["name"]);
    for (field, value) in want["calls"][0].as_object().unwrap() {
        assert_eq!(answers[0]["calls"][0][field], *value, "{field}");
    }
}
