//! A53, A54, A56, A57: what Mixer and the proxies tell about traffic.

use std::time::Duration;

use e2e::mesh::Options;
use serde_json::Value;

use super::{
    msgpack,
    routing::{ALL_RULES, ALL_V1},
    support::{Sidecar, ask, bookinfo, eventually, metrics, on_both, page},
};

on_both!(
    a53_every_hop_is_counted_once_per_reporter,
    a56_one_json_line_per_hop_and_the_same_record_at_fluentd,
);

const LABELS: [&str; 20] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "response_code",
    "response_flags",
    "permissive_response_code",
    "permissive_response_policyid",
    "connection_security_policy",
];

async fn a53_every_hop_is_counted_once_per_reporter(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("all-v1.yaml", ALL_V1).await?;
    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    // Hops of one page with all v1: gateway → productpage → details, reviews.
    let hops = [
        ("istio-ingressgateway", "productpage"),
        ("productpage", "details"),
        ("productpage", "reviews"),
    ];
    let found = eventually(Duration::from_secs(10), async || {
        let all = metrics(&client, &mesh).await?;
        let requests: Vec<_> = all
            .into_iter()
            .filter(|s| s.name == "istio_requests_total")
            .collect();
        anyhow::ensure!(
            requests.len() == 2 * hops.len(),
            "{} series of istio_requests_total: {requests:#?}",
            requests.len()
        );
        Ok(requests)
    })
    .await?;
    for (source, destination) in hops {
        for reporter in ["source", "destination"] {
            let one: Vec<_> = found
                .iter()
                .filter(|s| {
                    s.label("reporter") == reporter
                        && s.label("source_app") == source
                        && s.label("destination_app") == destination
                })
                .collect();
            let [sample] = one[..] else {
                panic!("{source} → {destination} by {reporter}: {one:?} of {found:#?}");
            };
            assert!((sample.value - 1.0).abs() < f64::EPSILON);
            let names: Vec<_> = sample.labels.keys().map(String::as_str).collect();
            let mut expected = LABELS;
            expected.sort_unstable();
            assert_eq!(names, expected);
            for (label, value) in [
                ("destination_service_name", destination),
                ("destination_service_namespace", "default"),
                ("destination_version", "v1"),
                ("destination_workload_namespace", "default"),
                ("request_protocol", "http"),
                ("response_code", "200"),
                ("response_flags", "-"),
            ] {
                assert_eq!(sample.label(label), value, "{label} of {sample:?}");
            }
            assert_eq!(
                sample.label("destination_workload"),
                format!("{destination}-v1")
            );
            assert_eq!(
                sample.label("destination_service"),
                format!("{destination}.default.svc.cluster.local")
            );
            if reporter == "destination" {
                assert_eq!(sample.label("connection_security_policy"), "mutual_tls");
                assert_eq!(
                    sample.label("destination_principal"),
                    format!("cluster.local/ns/default/sa/bookinfo-{destination}")
                );
            }
        }
    }
    let all = metrics(&client, &mesh).await?;
    for name in [
        "istio_request_duration_seconds_count",
        "istio_request_bytes_count",
        "istio_response_bytes_count",
    ] {
        assert_eq!(all.iter().filter(|s| s.name == name).count(), 6, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn a54_a_metric_of_ones_own_counts_double() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let yaml = r#"
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
      destination: destination.workload.name | "unknown"
      message: '"twice the fun!"'
    monitored_resource_type: '"UNSPECIFIED"'
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: doublehandler, namespace: istio-system }
spec:
  compiledAdapter: prometheus
  params:
    metrics:
    - name: double_request_count
      instance_name: doublerequestcount.instance.istio-system
      kind: COUNTER
      label_names: [reporter, source, destination, message]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: doubleprom, namespace: istio-system }
spec:
  actions:
  - handler: doublehandler
    instances: [doublerequestcount]
"#;
    mesh.apply("double.yaml", yaml).await?;
    let from = mesh.instance("productpage-v1-0")?;
    for _ in 0..8 {
        assert_eq!(
            ask(&client, from, "details:9080", "/details/0", &[])
                .await?
                .status,
            200
        );
    }
    eventually(Duration::from_secs(10), async || {
        let all = metrics(&client, &mesh).await?;
        let series: Vec<_> = all
            .iter()
            .filter(|s| s.name == "istio_double_request_count")
            .collect();
        anyhow::ensure!(series.len() == 2, "{series:?}");
        for sample in series {
            anyhow::ensure!((sample.value - 16.0).abs() < f64::EPSILON, "{sample:?}");
            anyhow::ensure!(sample.label("message") == "twice the fun!", "{sample:?}");
            anyhow::ensure!(sample.label("destination") == "details-v1", "{sample:?}");
        }
        Ok(())
    })
    .await
}

async fn a56_one_json_line_per_hop_and_the_same_record_at_fluentd(
    sidecar: Sidecar,
) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let fluentd = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let yaml = r#"
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
      destination: destination.labels["app"] | destination.workload.name | "unknown"
      responseCode: response.code | 0
      responseSize: response.size | 0
      latency: response.duration | "0ms"
    monitored_resource_type: '"UNSPECIFIED"'
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: newloghandler, namespace: istio-system }
spec:
  compiledAdapter: stdio
  params:
    severity_levels: { warning: 1 }
    outputAsJson: true
---
apiVersion: config.istio.io/v1alpha2
kind: fluentd
metadata: { name: handler, namespace: istio-system }
spec: { address: FLUENTD }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: newlogstdio, namespace: istio-system }
spec:
  match: context.reporter.kind == "inbound"
  actions:
  - handler: newloghandler
    instances: [newlog]
  - handler: handler.fluentd
    instances: [newlog]
"#;
    let yaml = yaml.replace("FLUENTD", &fluentd.local_addr()?.to_string());
    mesh.apply("log.yaml", &yaml).await?;
    let from = mesh.instance("productpage-v1-0")?;
    assert_eq!(
        ask(&client, from, "details:9080", "/details/0", &[])
            .await?
            .status,
        200
    );
    let line = eventually(Duration::from_secs(10), async || {
        let output = mesh.mixer.output();
        let lines: Vec<Value> = output
            .lines()
            .filter(|line| line.contains("newlog.instance.istio-system"))
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        anyhow::ensure!(lines.len() == 1, "{} lines of newlog", lines.len());
        Ok(lines[0].clone())
    })
    .await?;
    assert_eq!(line["level"], "warn");
    assert_eq!(line["source"], "productpage");
    assert_eq!(line["destination"], "details");
    assert_eq!(line["responseCode"], 200);
    assert_eq!(
        line["user"],
        "cluster.local/ns/default/sa/bookinfo-productpage"
    );
    assert!(line["responseSize"].as_i64() > Some(100), "{line}");
    assert!(line["latency"].is_string(), "{line}");

    // The same record at Fluentd.
    let (tag, record) = forwarded(&fluentd).await?;
    assert_eq!(tag, "newlog.instance.istio-system");
    assert_eq!(
        record.get("severity"),
        &msgpack::Value::Text("warning".into())
    );
    for field in ["source", "user", "destination", "latency"] {
        let text = line[field].as_str().unwrap_or_default();
        assert_eq!(
            record.get(field),
            &msgpack::Value::Text(text.into()),
            "{field}"
        );
    }
    for field in ["responseCode", "responseSize"] {
        let number = line[field].as_i64().unwrap_or_default();
        assert_eq!(record.get(field), &msgpack::Value::Int(number), "{field}");
    }
    Ok(())
}

/// The tag and the record of the first event that arrives by the forward protocol, PackedForward mode.
async fn forwarded(listener: &tokio::net::TcpListener) -> anyhow::Result<(String, msgpack::Value)> {
    use tokio::io::AsyncReadExt as _;
    let mut bytes = Vec::new();
    let receive = async {
        let (mut stream, _) = listener.accept().await?;
        loop {
            if let Some(message) = msgpack::read(&mut bytes.as_slice()) {
                return Ok::<_, anyhow::Error>(message);
            }
            anyhow::ensure!(
                stream.read_buf(&mut bytes).await? > 0,
                "the sender has closed"
            );
        }
    };
    let message = tokio::time::timeout(Duration::from_secs(20), receive).await??;
    let msgpack::Value::Array(parts) = &message else {
        anyhow::bail!("{message:?} is no array");
    };
    let [
        msgpack::Value::Text(tag),
        msgpack::Value::Bytes(entries),
        ..,
    ] = &parts[..]
    else {
        anyhow::bail!("{parts:?} is not PackedForward");
    };
    match msgpack::read(&mut entries.as_slice()) {
        Some(msgpack::Value::Array(entry)) if entry.len() == 2 => {
            Ok((tag.clone(), entry[1].clone()))
        }
        other => anyhow::bail!("{other:?} is no entry"),
    }
}

#[tokio::test]
async fn a57_one_access_log_line_in_each_proxy() -> anyhow::Result<()> {
    let (mesh, client) = bookinfo(Options::default()).await?;
    let from = mesh.instance("productpage-v1-0")?;
    let headers = [("x-request-id", "11111111-2222-4333-8444-555555555555")];
    assert_eq!(
        ask(&client, from, "details:9080", "/details/77", &headers)
            .await?
            .status,
        200
    );
    for name in ["productpage-v1-0", "details-v1-0"] {
        let instance = mesh.instance(name)?;
        let line = eventually(Duration::from_secs(5), async || {
            let output = instance.sidecar_output();
            let lines: Vec<_> = output
                .lines()
                .filter(|l| l.contains("/details/77"))
                .collect();
            anyhow::ensure!(
                lines.len() == 1,
                "{} lines in {name}: {lines:?}",
                lines.len()
            );
            Ok(lines[0].to_owned())
        })
        .await?;
        assert!(
            line.contains("\"GET /details/77 HTTP/1.1\" 200 - via_upstream"),
            "{line}"
        );
        assert!(
            line.contains("11111111-2222-4333-8444-555555555555"),
            "{line}"
        );
        assert!(line.contains("|9080||"), "no cluster name: {line}");
    }
    Ok(())
}

#[tokio::test]
async fn a57_json_access_log() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let yaml = e2e::samples::MESH.replace(
        "accessLogFile: /dev/stdout",
        "accessLogFile: /dev/stdout\n    accessLogEncoding: JSON",
    );
    mesh.apply("mesh.yaml", &yaml).await?;
    let from = mesh.instance("productpage-v1-0")?;
    assert_eq!(
        ask(&client, from, "details:9080", "/details/78", &[])
            .await?
            .status,
        200
    );
    let instance = mesh.instance("details-v1-0")?;
    let line = eventually(Duration::from_secs(5), async || {
        let output = instance.sidecar_output();
        let line = output
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["path"] == "/details/78");
        line.ok_or_else(|| anyhow::anyhow!("no JSON line"))
    })
    .await?;
    assert_eq!(line["response_code"], 200);
    assert_eq!(line["method"], "GET");
    assert_eq!(line["authority"], "details:9080");
    assert_eq!(line["upstream_cluster"], "inbound|9080||");
    Ok(())
}
