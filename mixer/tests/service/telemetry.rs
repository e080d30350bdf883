//! Reports: metrics for Prometheus, lines on standard output, the default telemetry.

use chrono::{DateTime, TimeDelta};
use lateen_adapter::Value;
use lateen_protocols::istio::mixer::v1::{CompressedAttributes, ReportRequest};
use serde_json::{Value as Json, json};

use crate::support::{Mesh, map, text, told};

const DOUBLE: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: doublerequestcount, namespace: istio-system }
spec:
  compiledTemplate: metric
  params:
    value: "2"
    dimensions:
      reporter: conditional((context.reporter.kind | "inbound") == "outbound", "client", "server")
      source: source.workload.name | "unknown"
      message: '"twice the fun!"'
    monitored_resource_type: '"UNSPECIFIED"'
---
apiVersion: config.istio.io/v1alpha2
kind: prometheus
metadata: { name: doublehandler, namespace: istio-system }
spec:
  metrics:
  - name: double_request_count
    instance_name: doublerequestcount.instance.istio-system
    kind: COUNTER
    label_names: [ reporter, source, message ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: doubleprom, namespace: istio-system }
spec:
  actions: [ { handler: doublehandler.prometheus, instances: [ doublerequestcount ] } ]
"#;

#[tokio::test]
async fn reports_become_metrics() {
    let mut mesh = Mesh::start(&[("double.yaml", DOUBLE)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let outbound: &[(&str, Value)] = &[
        ("context.reporter.kind", text("outbound")),
        ("source.workload.name", text("sleep")),
    ];
    for _ in 0..4 {
        mesh.report(&[outbound, &[], outbound]).await;
    }
    let line = "istio_double_request_count{reporter=\"client\",source=\"sleep\",message=\"twice the fun!\"} 16";
    let other = "istio_double_request_count{reporter=\"server\",source=\"unknown\",message=\"twice the fun!\"} 8";
    let metrics = mesh.metrics().await;
    assert!(
        metrics.contains(line) && metrics.contains(other),
        "{metrics}"
    );

    // A change of the rule leaves the counters alone; its removal takes them away.
    mesh.apply(
        "double.yaml",
        Some(&DOUBLE.replace("spec:\n  actions", "spec:\n  match: \"true\"\n  actions")),
    )
    .await;
    assert!(mesh.metrics().await.contains(line));
    mesh.apply("double.yaml", None).await;
    assert_eq!(mesh.metrics().await, "");
}

#[tokio::test]
async fn elements_of_a_delta_report_build_on_each_other() {
    let mut mesh = Mesh::start(&[("double.yaml", DOUBLE)]).await;
    let words = ["source.workload.name", "a", "b"]
        .map(str::to_owned)
        .to_vec();
    let element = |value: i32| CompressedAttributes {
        strings: [(-1, value)].into(),
        ..CompressedAttributes::default()
    };
    let request = ReportRequest {
        attributes: vec![element(-2), CompressedAttributes::default(), element(-3)],
        default_words: words,
        global_word_count: 222,
        repeated_attributes_semantics: 0,
    };
    mesh.client.report(request).await.unwrap();
    let metrics = mesh.metrics().await;
    assert!(
        metrics.contains("source=\"a\",message=\"twice the fun!\"} 4"),
        "{metrics}"
    );
    assert!(
        metrics.contains("source=\"b\",message=\"twice the fun!\"} 2"),
        "{metrics}"
    );
}

const LOG: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: newlog, namespace: istio-system }
spec:
  compiledTemplate: logentry
  params:
    severity: '"warning"'
    timestamp: request.time
    variables:
      source: source.labels["app"] | source.workload.name | "unknown"
      user: source.user | "unknown"
      responseCode: response.code | 0
      latency: response.duration | "0ms"
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: newloghandler, namespace: istio-system }
spec:
  compiledAdapter: stdio
  params: { severity_levels: { warning: 1 }, outputAsJson: true }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: newlogstdio, namespace: istio-system }
spec:
  match: "true"
  actions: [ { handler: newloghandler, instances: [ newlog ] } ]
"#;

#[tokio::test]
async fn log_entries_become_lines_of_json() {
    let mut mesh = Mesh::start(&[("log.yaml", LOG)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let time = DateTime::from_timestamp(1_540_000_000, 123_456_000).unwrap();
    let complete: &[(&str, Value)] = &[
        ("request.time", Value::Timestamp(time)),
        ("source.labels", map(&[("app", "product\"page")])),
        ("response.code", Value::Int64(200)),
        (
            "response.duration",
            Value::Duration(TimeDelta::microseconds(6848)),
        ),
    ];
    // The second has no time: it costs itself, not its neighbours.
    mesh.report(&[complete, &[("response.code", Value::Int64(500))], complete])
        .await;
    let lines = mesh.stdout.0.lock().unwrap().clone();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        serde_json::from_str::<Json>(&lines[0]).unwrap(),
        json!({
            "level": "warn",
            "time": "2018-10-20T01:46:40.123456Z",
            "instance": "newlog.instance.istio-system",
            "latency": "6.848ms",
            "responseCode": 200,
            "source": "product\"page",
            "user": "unknown",
        })
    );
    assert!(lines[0].starts_with(r#"{"level":"warn","time":"#));
}

const TELEMETRY: &str = include_str!("../../../install/config/mixer/telemetry.yaml");

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: productpage-v1-5d-abc
  namespace: default
  labels: { app: productpage, version: v1, pod-template-hash: 5d }
  ownerReferences: [ { apiVersion: apps/v1, kind: ReplicaSet, name: productpage-v1-5d } ]
spec:
  serviceAccountName: bookinfo-productpage
  containers: [ { name: productpage, ports: [ { containerPort: 9080 } ] } ]
status: { podIP: 127.30.0.11, phase: Running }
---
apiVersion: v1
kind: Pod
metadata:
  name: reviews-v3-0
  namespace: default
  labels: { app: reviews, version: v3 }
  ownerReferences: [ { apiVersion: apps/v1, kind: Deployment, name: reviews-v3 } ]
spec:
  containers: [ { name: reviews, ports: [ { containerPort: 9080 } ] } ]
status: { podIP: 127.30.0.12, phase: Running }
"#;

fn request() -> Vec<(&'static str, Value)> {
    vec![
        ("context.protocol", text("http")),
        ("context.reporter.kind", text("inbound")),
        ("source.ip", Value::Ip("127.30.0.11".parse().unwrap())),
        (
            "source.principal",
            text("cluster.local/ns/default/sa/bookinfo-productpage"),
        ),
        ("destination.uid", text("kubernetes://reviews-v3-0.default")),
        ("destination.ip", Value::Ip("127.30.0.12".parse().unwrap())),
        ("destination.port", Value::Int64(9080)),
        (
            "destination.service.host",
            text("reviews.default.svc.cluster.local"),
        ),
        ("destination.service.name", text("reviews")),
        ("destination.service.namespace", text("default")),
        ("connection.mtls", Value::Bool(true)),
        ("request.size", Value::Int64(0)),
        ("response.size", Value::Int64(375)),
        ("response.code", Value::Int64(200)),
        (
            "response.duration",
            Value::Duration(TimeDelta::milliseconds(7)),
        ),
    ]
}

#[tokio::test]
async fn the_default_telemetry_is_istios() {
    let mut mesh = Mesh::start(&[("telemetry.yaml", TELEMETRY), ("pods.yaml", PODS)]).await;
    assert_eq!(mesh.problems(), []);
    let request = request();
    let mut probe = request.clone();
    probe.push(("request.useragent", text("kube-probe/1.30")));
    mesh.report(&[&request, &probe]).await;
    let labels = concat!(
        r#"reporter="destination",source_app="productpage","#,
        r#"source_principal="cluster.local/ns/default/sa/bookinfo-productpage",source_workload="productpage-v1","#,
        r#"source_workload_namespace="default",source_version="v1",destination_app="reviews","#,
        r#"destination_principal="unknown",destination_workload="reviews-v3","#,
        r#"destination_workload_namespace="default",destination_version="v3","#,
        r#"destination_service="reviews.default.svc.cluster.local",destination_service_name="reviews","#,
        r#"destination_service_namespace="default",request_protocol="http",response_code="200","#,
        r#"response_flags="-",permissive_response_code="none",permissive_response_policyid="none","#,
        r#"connection_security_policy="mutual_tls""#
    );
    let metrics = mesh.metrics().await;
    for line in [
        format!("istio_requests_total{{{labels}}} 1"),
        format!("istio_request_duration_seconds_bucket{{{labels},le=\"0.01\"}} 1"),
        format!("istio_request_duration_seconds_sum{{{labels}}} 0.007"),
        format!("istio_response_bytes_bucket{{{labels},le=\"100\"}} 0"),
        format!("istio_response_bytes_bucket{{{labels},le=\"1000\"}} 1"),
        format!("istio_response_bytes_bucket{{{labels},le=\"1e+08\"}} 1"),
        format!("istio_request_bytes_count{{{labels}}} 1"),
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }

    let tcp: Vec<(&str, Value)> = vec![
        ("context.protocol", text("tcp")),
        ("connection.event", text("open")),
        ("connection.sent.bytes", Value::Int64(10)),
        ("connection.received.bytes", Value::Int64(20)),
    ];
    mesh.report(&[&tcp, &tcp]).await;
    let metrics = mesh.metrics().await;
    let count = |name: &str| {
        let line = metrics
            .lines()
            .find(|l| l.starts_with(&format!("{name}{{")));
        line.map(|l| {
            (
                l.rsplit(' ').next().unwrap().to_owned(),
                l.matches("=\"").count(),
            )
        })
    };
    let sixteen = |value: &str| Some((value.to_owned(), 16));
    assert_eq!(count("istio_tcp_sent_bytes_total"), sixteen("20"));
    assert_eq!(count("istio_tcp_received_bytes_total"), sixteen("40"));
    assert_eq!(count("istio_tcp_connections_opened_total"), sixteen("2"));
    assert_eq!(count("istio_tcp_connections_closed_total"), None);
}

#[tokio::test]
async fn generated_attributes_are_not_what_an_answer_depends_on() {
    let mut mesh = Mesh::start(&[("telemetry.yaml", TELEMETRY), ("pods.yaml", PODS)]).await;
    let answer = mesh.check(&request()).await;
    let referenced = answer.referenced_attributes.unwrap();
    assert!(
        !referenced
            .words
            .iter()
            .any(|w| w.contains("labels") || w.contains("workload"))
    );
    assert!(!referenced.attribute_matches.is_empty());
}

#[tokio::test]
async fn a_workload_that_changes_makes_cached_answers_old() {
    let mut mesh = Mesh::start(&[("telemetry.yaml", TELEMETRY), ("pods.yaml", PODS)]).await;
    mesh.check(&request()).await;
    let before = mesh.generation();
    let third = "
apiVersion: v1
kind: Pod
metadata: { name: other, namespace: default }
spec: { containers: [ { name: other } ] }
status: { podIP: 127.30.0.13, phase: Running }
";
    mesh.apply("third.yaml", Some(third)).await;
    assert_eq!(mesh.generation(), before, "nobody has asked for it");
    mesh.apply(
        "pods.yaml",
        Some(&PODS.replace("version: v3", "version: v4")),
    )
    .await;
    assert_ne!(mesh.generation(), before);
}

#[tokio::test]
async fn a_caller_from_outside_keeps_its_address() {
    let list = r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: { name: net, namespace: istio-system }
spec: { overrides: ["10.57.0.0/16"], entryType: IP_ADDRESSES }
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: { name: sourceip, namespace: istio-system }
spec: { value: 'source.ip | ip("0.0.0.0")' }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: checkip, namespace: istio-system }
spec: { actions: [ { handler: net.listchecker, instances: [ sourceip.listentry ] } ] }
"#;
    let mut mesh = Mesh::start(&[("telemetry.yaml", TELEMETRY), ("list.yaml", list)]).await;
    assert_eq!(mesh.problems(), []);
    let from = |ip: &str| [("source.ip", Value::Ip(ip.parse().unwrap()))];
    assert_eq!(told(&mesh.check(&from("10.57.1.1")).await), "OK:");
    assert_eq!(
        told(&mesh.check(&from("203.0.113.9")).await),
        "PERMISSION_DENIED:net.listchecker.istio-system:203.0.113.9 is not whitelisted"
    );
}
