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

/// What a call comes to: the cluster, or the error.
fn ends(row: &Value) -> Vec<String> {
    let answers = rows(&row.to_string(), Tool::Simulate).unwrap();
    assert_eq!(answers[0]["problems"], Value::Null);
    answers[0]["calls"]
        .as_array()
        .unwrap()
        .iter()
        .map(|call| match (&call["Error"], &call["ClusterMatched"]) {
            (Value::String(error), _) if !error.is_empty() => error.clone(),
            (_, cluster) => cluster.as_str().unwrap().to_owned(),
        })
        .collect()
}

fn istio(kind: &str, name: &str, spec: Value) -> Value {
    let group = match kind {
        "PeerAuthentication" => "security.istio.io/v1",
        _ => "networking.istio.io/v1",
    };
    json!({"apiVersion": group, "kind": kind, "metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

#[test]
fn unknown_protocols_and_address_ranges_are_told_apart_by_connection() {
    let to = |address: &str, port: u16, protocol: &str, tls: &str| json!({"call": {"Address": address, "Port": port, "Protocol": protocol, "TLS": tls, "HostHeader": "x.example"}});
    let row = json!({
        "name": "outbound",
        "proxy": {"type": "sidecar", "namespace": "default"},
        "kube": [service("auto", "10.0.0.1", 81, "auto"), service("web", "10.0.0.2", 80, "http")],
        "config": [
            istio("ServiceEntry", "net", json!({"hosts": ["net.example"], "addresses": ["10.5.0.0/16"],
                "ports": [{"number": 80, "name": "tcp", "protocol": "TCP"}], "resolution": "NONE"})),
            istio("ServiceEntry", "one", json!({"hosts": ["two.example"], "ports": [{"number": 443, "name": "https", "protocol": "HTTPS"}],
                "resolution": "DNS"})),
        ],
        "calls": [
            to("10.0.0.1", 81, "HTTP", "Plaintext"), to("10.0.0.1", 81, "TCP", "Plaintext"), to("10.0.0.1", 81, "HTTP", "TLS"),
            to("10.5.1.1", 80, "HTTP", "Plaintext"), to("10.6.1.1", 80, "TCP", "Plaintext"), to("10.0.0.2", 80, "HTTP", "Plaintext"),
            to("1.2.3.4", 443, "TCP", "TLS"),
        ],
    });
    assert_eq!(
        ends(&row),
        [
            "outbound|81||auto.default.svc.cluster.local",
            "outbound|81||auto.default.svc.cluster.local",
            "outbound|81||auto.default.svc.cluster.local",
            "outbound|80||net.example",
            "PassthroughCluster",
            // The host named is nobody's.
            "PassthroughCluster",
            "PassthroughCluster",
        ]
    );
}

#[test]
fn inbound_ports_follow_the_sidecar_and_their_own_modes() {
    let to = |port: u16, protocol: &str, tls: &str| json!({"call": {"Port": port, "Protocol": protocol, "TLS": tls, "CallMode": "CallModeInbound"}});
    let row = json!({
        "name": "inbound",
        "proxy": {"type": "sidecar", "namespace": "default", "labels": {"app": "a"}},
        "config": [
            istio("PeerAuthentication", "own", json!({"selector": {"matchLabels": {"app": "a"}}, "mtls": {"mode": "STRICT"},
                "portLevelMtls": {"9090": {"mode": "PERMISSIVE"}, "7000": {"mode": "DISABLE"}}})),
            istio("Sidecar", "own", json!({"ingress": [
                {"port": {"number": 9090, "name": "tcp", "protocol": "TCP"}, "defaultEndpoint": "127.0.0.1:1"},
                {"port": {"number": 9091, "name": "http", "protocol": "HTTP"}, "defaultEndpoint": "unix:///s"}]})),
        ],
        "calls": [
            to(9090, "TCP", "MTLS"), to(9090, "TCP", "Plaintext"), to(9090, "TCP", "TLS"),
            to(9091, "HTTP", "MTLS"), to(9091, "HTTP", "Plaintext"),
            to(7000, "TCP", "Plaintext"), to(7001, "TCP", "Plaintext"), to(7001, "HTTP", "MTLS"),
        ],
    });
    assert_eq!(
        ends(&row),
        [
            "inbound|9090||",
            "inbound|9090||",
            "inbound|9090||",
            "inbound|9091||",
            "ErrNoFilterChain",
            "InboundPassthroughCluster",
            "ErrNoFilterChain",
            "InboundPassthroughCluster",
        ]
    );
}

#[test]
fn a_gateways_port_serves_the_kind_of_its_oldest_server() {
    let server = |protocol: &str| json!({"selector": {"istio": "gw"}, "servers": [{"port": {"number": 80, "name": "p", "protocol": protocol}, "hosts": ["*"]}]});
    let row = |kinds: [&str; 2]| {
        json!({
            "name": "gateway",
            "proxy": {"type": "router", "namespace": "default", "labels": {"istio": "gw"}},
            "config": [
                istio("Gateway", "a", server(kinds[0])),
                istio("Gateway", "b", server(kinds[1])),
                istio("VirtualService", "v", json!({"hosts": ["*"], "gateways": ["a", "b"],
                    "http": [{"route": [{"destination": {"host": "web"}}]}],
                    "tcp": [{"route": [{"destination": {"host": "db", "port": {"number": 1}}}]}]})),
            ],
            "calls": [
                {"call": {"Port": 80, "Protocol": "HTTP", "HostHeader": "x"}},
                {"call": {"Port": 80, "Protocol": "TCP"}},
            ],
        })
    };
    assert_eq!(
        ends(&row(["HTTP", "TCP"])),
        ["outbound|80||web.default", "ErrProtocolError"]
    );
    assert_eq!(
        ends(&row(["TCP", "HTTP"])),
        ["outbound|1||db.default", "outbound|1||db.default"]
    );
}

mod gateway_api;
