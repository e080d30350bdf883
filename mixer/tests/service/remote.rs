//! Adapters that are processes of their own: what they get, and what becomes of what they answer.

mod protos;
mod python;
pub(crate) mod security;
mod sessions;

use std::time::Duration;

use lateen_adapter::Value;
use lateen_protocols::istio::mixer::v1::check_response::PreconditionResult;
use serde_json::json;
use tokio::net::TcpListener;

use self::protos::{Said, configuration, open, say};
use crate::{
    collector::{self, Received},
    support::{Mesh, map, seconds, text, told},
};

/// An adapter that allows who is called `ann`, grants half, and knows who lives where.
fn adapter(call: &Received) -> Said {
    match call.path.as_str() {
        "/gate.HandleGateService/HandleGate" => {
            let asked = open(call, "gate.HandleGateRequest");
            if asked["instance"]["user"]["stringValue"] == "ann" {
                let result = json!({"validDuration": "7s", "validUseCount": 3});
                let output = json!({"group": "admin", "level": 5, "labels": {"a": "b"}});
                say(
                    "gate.HandleGateResponse",
                    &json!({"result": result, "output": output}),
                )
            } else {
                let status = json!({"code": 7, "message": "who are you?"});
                say(
                    "gate.HandleGateResponse",
                    &json!({"result": {"status": status}}),
                )
            }
        }
        "/quota.HandleQuotaService/HandleQuota" => {
            let asked = open(call, "quota.HandleQuotaRequest");
            let name = asked["instance"]["name"].as_str().unwrap();
            let wanted = &asked["quotaRequest"]["quotas"][name]["amount"];
            let granted = wanted.as_str().unwrap().parse::<i64>().unwrap() / 2;
            let one = json!({"validDuration": "2s", "grantedAmount": granted});
            say(
                "istio.mixer.adapter.model.v1beta1.QuotaResult",
                &json!({"quotas": {name: one}}),
            )
        }
        "/where.HandleWhereService/HandleWhere" => {
            let output = json!({"city": "Rome", "ip": {"value": "CgAAAQ=="}});
            say("where.OutputMsg", &output)
        }
        "/metric.HandleMetricService/HandleMetric" => (0, Vec::new()),
        _ => (12, Vec::new()),
    }
}

/// A connection without TLS.
async fn plain(stream: tokio::net::TcpStream) -> Option<tokio::net::TcpStream> {
    Some(stream)
}

const RULES: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: attributemanifest
metadata: { name: more, namespace: istio-system }
spec: { attributes: { source.city: { valueType: STRING }, source.home: { valueType: IP_ADDRESS } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: where, namespace: istio-system }
spec:
  template: where
  params: { ip: source.ip }
  attributeBindings: { source.city: 'output.city | "nowhere"', source.home: output.ip }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: gate, namespace: istio-system }
spec:
  template: gate
  params:
    user: request.headers["user"] | "nobody"
    city: source.city
    when: request.time
    took: response.duration | "10ms"
    port: destination.port | 0
    secure: connection.mtls | false
    labels: source.labels
    facts: { home: source.home, host: 'dnsName("a.b")', page: 'uri("http://a/b")', mail: 'email("a@b.c")', half: 0.5, headers: request.headers, size: request.size | 7, time: request.time, took: '"2s"', ok: 'true' }
    deep: { inner: { list: [ '"x"', source.city ] } }
    mode: STRICT
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: rq, namespace: istio-system }
spec: { template: quota, params: { dimensions: { city: source.city } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: size, namespace: istio-system }
spec: { template: metric, params: { value: response.size | 0, dimensions: { city: source.city } } }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: everything, namespace: istio-system }
spec:
  actions:
  - { handler: process, instances: [ where, rq, size ] }
  - { handler: process, instances: [ gate ], name: g }
  requestHeaderOperations:
  - { name: user-group, values: [ g.output.group ] }
  - { name: user-label, values: [ 'g.output.labels["a"] + "@" + source.city' ] }
"#;

fn user(name: &'static str) -> Vec<(&'static str, Value)> {
    vec![
        ("request.headers", map(&[("user", name)])),
        (
            "source.ip",
            lateen_adapter::value::address([10, 1, 2, 3].into()),
        ),
        ("source.labels", map(&[("app", "web")])),
        (
            "request.time",
            Value::Timestamp(lateen_engine::parse_timestamp("2026-01-02T03:04:05Z").unwrap()),
        ),
    ]
}

fn headers(result: &PreconditionResult) -> Vec<String> {
    let directive = result.route_directive.clone().unwrap_or_default();
    let operations = directive.request_header_operations.iter();
    operations
        .map(|o| format!("{}={}", o.name, o.value))
        .collect()
}

#[tokio::test]
async fn every_variety_of_template_reaches_the_process_and_back() {
    let (address, mut received) = collector::listen_and_say(adapter).await;
    let rules = format!("{}{RULES}", configuration(&address.to_string(), false));
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let answer = mesh
        .check_with(&user("ann"), &[("rq", 9, true)], "id")
        .await;
    let verdict = answer.precondition.unwrap();
    assert_eq!(told(&verdict), "OK:");
    assert_eq!(
        verdict.valid_use_count, 0,
        "all headers and labels were read"
    );
    assert_eq!(headers(&verdict), ["user-group=admin", "user-label=b@Rome"]);
    let quota = &answer.quotas["rq"];
    assert_eq!(
        (quota.granted_amount, seconds(quota.valid_duration.as_ref())),
        (4, 2.0)
    );

    let call = received.recv().await.unwrap();
    assert!(call.headers.contains_key("grpc-timeout"));
    let asked = open(&call, "where.HandleWhereRequest");
    assert_eq!(asked["instance"]["ip"]["value"], "CgECAw==");
    let mut asked = open(&received.recv().await.unwrap(), "gate.HandleGateRequest");
    let dedup_id = asked["dedupId"].take();
    assert!(
        dedup_id.as_str().unwrap().parse::<u64>().is_ok(),
        "{dedup_id}"
    );
    let config =
        json!({"@type": "type.googleapis.com/own.Params", "path": "/x", "limits": {"a": 1}});
    let headers = json!({"stringMapValue": {"value": {"user": "ann"}}});
    let instance = json!({
        "name": "gate.instance.istio-system",
        "user": {"stringValue": "ann"},
        "city": "Rome",
        "when": {"value": "2026-01-02T03:04:05Z"},
        "took": {"value": "0.010s"},
        "labels": {"app": "web"},
        "facts": {
            "home": {"ipAddressValue": {"value": "CgAAAQ=="}},
            "host": {"dnsNameValue": {"value": "a.b"}},
            "page": {"uriValue": {"value": "http://a/b"}},
            "mail": {"emailAddressValue": {"value": "a@b.c"}},
            "half": {"doubleValue": 0.5},
            "headers": headers,
            "size": {"int64Value": "7"},
            "time": {"timestampValue": {"value": "2026-01-02T03:04:05Z"}},
            "took": {"durationValue": {"value": "2s"}},
            "ok": {"boolValue": true},
        },
        "deep": {"inner": {"list": ["x", "Rome"]}},
        "mode": "STRICT",
    });
    assert_eq!(
        asked,
        json!({"instance": instance, "adapterConfig": config, "dedupId": null})
    );
    let asked = open(&received.recv().await.unwrap(), "quota.HandleQuotaRequest");
    assert_eq!(asked["dedupId"], "idrq");
    assert_eq!(
        asked["quotaRequest"]["quotas"]["rq.instance.istio-system"],
        json!({"amount": "9", "bestEffort": true})
    );

    // Denied, and for this reason.
    let denied = mesh.check(&user("bob")).await;
    assert_eq!(
        told(&denied),
        "PERMISSION_DENIED:process.handler.istio-system:who are you?"
    );
    assert_eq!(
        denied.valid_use_count, 0,
        "nothing was said of using it again"
    );

    // Reports come in batches.
    let sets: Vec<_> = [70, 80]
        .map(|n| {
            let mut set = user("ann");
            set.push(("response.size", Value::Int64(n)));
            set
        })
        .into();
    let sets: Vec<&[_]> = sets.iter().map(Vec::as_slice).collect();
    mesh.report(&sets).await;
    let measured = loop {
        let call = received.recv().await.unwrap();
        if call.path == "/metric.HandleMetricService/HandleMetric" {
            break open(&call, "metric.HandleMetricRequest");
        }
    };
    let size = |n: &str| {
        json!({
            "name": "size.instance.istio-system",
            "value": {"int64Value": n},
            "dimensions": {"city": {"stringValue": "Rome"}},
        })
    };
    assert_eq!(measured["instances"], json!([size("70"), size("80")]));
    assert_eq!(measured["adapterConfig"], config);
}

/// A rule of a check with one handler at `address`.
fn one_check(address: &str, connection: &str, annotations: &str) -> String {
    format!(
        r#"{}
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: one, namespace: istio-system }}
spec:
  adapter: own
  connection: {{ address: "{address}", {connection} }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: simple, namespace: istio-system }}
spec: {{ template: gate, params: {{ user: '"ann"' }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: one, namespace: istio-system, annotations: {{ {annotations} }} }}
spec: {{ actions: [ {{ handler: one, instances: [ simple ] }} ] }}
"#,
        protos::described(false)
    )
}

pub(crate) async fn events(mesh: &Mesh, event: &str) -> u64 {
    let page = crate::support::get(mesh.running.admin_address, "/metrics").await;
    let line = page.lines().find(|line| {
        line.starts_with("mixer_adapter_events_total")
            && line.contains(&format!("event=\"{event}\""))
            && line.contains("handler=\"one.")
    });
    line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok())
        .unwrap_or(0)
}

#[tokio::test]
async fn a_process_that_hangs_costs_its_timeout_and_then_nothing() {
    // It accepts and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let rules = one_check(&address, "timeout: 50ms", "");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for _ in 0..5 {
        let begun = std::time::Instant::now();
        let verdict = told(&mesh.check(&[]).await);
        assert_eq!(
            verdict,
            format!(
                "UNAVAILABLE:one.handler.istio-system:the adapter at {address}: no answer within 50ms"
            )
        );
        assert!(begun.elapsed() >= Duration::from_millis(50));
    }
    let begun = std::time::Instant::now();
    let verdict = told(&mesh.check(&[]).await);
    assert!(
        verdict.contains("it has failed 5 times in a row and is not called again for"),
        "{verdict}"
    );
    assert!(begun.elapsed() < Duration::from_millis(50));
    assert_eq!(events(&mesh, "circuit_opened").await, 1);
    // A rule that fails open lets such requests through.
    let open = one_check(&address, "timeout: 50ms", "policy.istio.io/fail-mode: open");
    mesh.apply("rules.yaml", Some(&open)).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn a_process_that_comes_back_is_called_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut mesh = Mesh::start(&[("rules.yaml", &one_check(&address.to_string(), "", ""))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let verdict = told(&mesh.check(&[]).await);
    assert!(
        verdict.starts_with("UNAVAILABLE:one.handler.istio-system:the adapter at"),
        "{verdict}"
    );
    assert!(verdict.contains("onnection refused"), "{verdict}");
    assert_eq!(events(&mesh, "calls_retried").await, 1);
    let listener = TcpListener::bind(address).await.unwrap();
    let _received = collector::serve(listener, plain, adapter);
    let verdict = mesh.check(&[]).await;
    assert_eq!(told(&verdict), "OK:");
    let valid = seconds(verdict.valid_duration.as_ref());
    assert_eq!(
        (verdict.valid_use_count, valid),
        (3, 1.0),
        "who does not know generations asks again soon"
    );
}

#[tokio::test]
async fn a_call_that_was_not_taken_is_made_once_more() {
    let first = std::sync::atomic::AtomicBool::new(true);
    let (address, mut received) = collector::listen_and_say(move |call| {
        if first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            return (14, Vec::new());
        }
        adapter(call)
    })
    .await;
    let mut mesh = Mesh::start(&[("rules.yaml", &one_check(&address.to_string(), "", ""))]).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    let ids = [
        received.recv().await.unwrap(),
        received.recv().await.unwrap(),
    ]
    .map(|call| open(&call, "gate.HandleGateRequest")["dedupId"].clone());
    assert_eq!(ids[0], ids[1], "the process can tell that it is the same");
}

#[tokio::test]
async fn a_process_that_restarts_is_not_noticed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // The first connection breaks when a call has come.
    let (tell, mut told_calls) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.windows(6).any(|w| w == b"simple") {
            let n = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer)
                .await
                .unwrap();
            assert_ne!(n, 0);
            seen.extend_from_slice(&buffer[..n]);
        }
        drop(stream);
        let mut received = collector::serve(listener, plain, adapter);
        while let Some(call) = received.recv().await {
            tell.send(call).unwrap();
        }
    });
    let mut mesh = Mesh::start(&[("rules.yaml", &one_check(&address, "", ""))]).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    assert!(told_calls.recv().await.is_some());
    assert_eq!(events(&mesh, "calls_retried").await, 1);
}

#[tokio::test]
async fn answers_that_make_no_sense_are_errors_of_that_rule() {
    for (answer, reason) in [
        ((0, b"\xff".to_vec()), "the adapter's answer makes no sense"),
        ((3, Vec::new()), "InvalidArgument"),
        (
            say(
                "gate.HandleGateResponse",
                &json!({"result": {"status": {"code": 99}}}),
            ),
            "99 is no status",
        ),
    ] {
        let (address, _received) = collector::listen_and_say(move |_| answer.clone()).await;
        let rules = one_check(&address.to_string(), "", "");
        let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
        let verdict = told(&mesh.check(&[]).await);
        assert!(
            verdict.starts_with("UNAVAILABLE:") && verdict.contains(reason),
            "{verdict}"
        );
    }
}

#[tokio::test]
async fn what_a_process_does_not_take_is_refused_at_load() {
    let rules = one_check("a:1", "", "");
    let compiled = rules.replace(
        "{ template: gate, params: { user: '\"ann\"' } }",
        "{ compiledTemplate: checknothing }",
    );
    let mesh = Mesh::start(&[("rules.yaml", &compiled)]).await;
    let refused = mesh.refused().join("\n");
    assert!(
        refused.contains("the handler does not take instances of checknothing; it takes gate.template.istio-system"),
        "{refused}"
    );
    let other = rules.replace(
        "templates: [ gate, quota, metric, where ]",
        "templates: [ quota ]",
    );
    let mesh = Mesh::start(&[("rules.yaml", &other)]).await;
    let refused = mesh.refused().join("\n");
    assert!(
        refused.contains("does not take instances of gate.template.istio-system; it takes quota.template.istio-system"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_rule_keeps_its_process_when_a_change_is_bad() {
    let (address, _received) = collector::listen_and_say(adapter).await;
    let rules = one_check(&address.to_string(), "", "");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    let generation = mesh.generation();
    let bad = rules.replace(
        "params: { user: '\"ann\"' }",
        "params: { user: source.nothing }",
    );
    mesh.apply("rules.yaml", Some(&bad)).await;
    assert!(
        mesh.refused()
            .join("\n")
            .contains("unknown attribute source.nothing")
    );
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    let gone = rules
        .replace("kind: template", "kind: reportnothing")
        .replace("descriptor:", "name:");
    mesh.apply("rules.yaml", Some(&gone)).await;
    assert_eq!(
        told(&mesh.check(&[("source.name", text("x"))]).await),
        "OK:",
        "with the template it had"
    );
    mesh.apply("rules.yaml", Some(&rules)).await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(
        mesh.generation(),
        generation,
        "nothing that decides has changed"
    );
}

#[tokio::test]
async fn reports_wait_for_a_process_that_is_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let rules = one_check(&address.to_string(), "", "")
        .replace("instances: [ simple ]", "instances: [ size ]");
    let size = "---\napiVersion: config.istio.io/v1alpha2\nkind: metric\n\
                metadata: { name: size, namespace: istio-system }\nspec: { value: response.size }\n";
    let rules = format!("{}{size}", rules.replace("[ size ]", "[ size.metric ]"));
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for n in [1, 2] {
        mesh.report(&[&[("response.size", Value::Int64(n))]]).await;
    }
    let listener = TcpListener::bind(address).await.unwrap();
    let mut received = collector::serve(listener, plain, adapter);
    let call = tokio::time::timeout(Duration::from_secs(20), received.recv());
    let call = call.await.expect("they come").unwrap();
    let mut values = Vec::new();
    let measured = open(&call, "metric.HandleMetricRequest");
    for instance in measured["instances"].as_array().unwrap() {
        values.push(instance["value"]["int64Value"].clone());
    }
    assert_eq!(values, ["1", "2"]);
    assert_eq!(measured["instances"][0]["name"], "size.metric.istio-system");
}
