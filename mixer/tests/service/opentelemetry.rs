//! opentelemetry: what a collector gets by OTLP, read with OTLP's own messages.

use std::collections::BTreeMap;

use lateen_adapter::Value;
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceRequest,
    },
    common::v1::{KeyValue, any_value},
    metrics::v1::{metric::Data, number_data_point},
};

use crate::{
    collector,
    support::{Mesh, get},
    zipkin,
};

fn rules(params: &str) -> String {
    format!(
        r#"{}
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: otel, namespace: istio-system }}
spec:
  compiledAdapter: opentelemetry
  params: {params}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: requests, namespace: istio-system }}
spec:
  compiledTemplate: metric
  params:
    value: "1"
    dimensions:
      source: source.workload.name | "unknown"
      code: response.code | 0
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: latency, namespace: istio-system }}
spec:
  compiledTemplate: metric
  params: {{ value: 'response.duration | "0ms"' }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: line, namespace: istio-system }}
spec:
  compiledTemplate: logentry
  params:
    severity: '"warning"'
    timestamp: request.time
    variables:
      path: request.path | "/"
      code: response.code | 0
      mtls: connection.mtls | false
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: otel, namespace: istio-system }}
spec:
  actions:
  - {{ handler: otel, instances: [ requests, latency, line, span.tracespan ] }}
"#,
        zipkin::SPAN
    )
}

const METRICS: &str = r#"metrics: [
      { instanceName: requests.instance.istio-system, name: istio.requests, unit: "{request}", kind: COUNTER },
      { instanceName: latency.instance.istio-system, kind: DISTRIBUTION, unit: s, buckets: { explicit_buckets: { bounds: [ 0.01, 0.1 ] } } } ]"#;

fn attributes(all: &[KeyValue]) -> BTreeMap<&str, String> {
    let text = |a: &KeyValue| match a.value.clone().unwrap().value.unwrap() {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(n) => format!("int {n}"),
        any_value::Value::BoolValue(b) => format!("bool {b}"),
        other => panic!("{other:?}"),
    };
    all.iter().map(|a| (a.key.as_str(), text(a))).collect()
}

fn pairs<'a>(all: &[(&'a str, &str)]) -> BTreeMap<&'a str, String> {
    all.iter().map(|(k, v)| (*k, (*v).to_owned())).collect()
}

#[tokio::test]
async fn metrics_logs_and_spans_arrive() {
    let (address, mut received) = collector::listen(|_| 0).await;
    let params = format!(
        "{{ address: \"{address}\", headers: {{ X-Api-Key: secret }}, exportInterval: 600s, \
         resource: {{ deployment.environment: test }},\n    {METRICS} }}"
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let duration = |ms: &str| Value::Duration(lateen_engine::parse_duration(ms).unwrap());
    let with = |code, ms| {
        let mut all = zipkin::request("inbound", "463ac35c9f6413ad48485a3953bb6124", code);
        all.push(("response.duration", duration(ms)));
        all
    };
    let (a, b, c) = (with(200, "5ms"), with(200, "50ms"), with(500, "5s"));
    mesh.report(&[&a, &b, &c]).await;
    mesh.apply("rules.yaml", None).await; // the last export has everything
    let (mut last, mut logs, mut spans) = (None, Vec::new(), Vec::new());
    while last.is_none() || logs.is_empty() || spans.is_empty() {
        let call = received.recv().await.unwrap();
        assert_eq!(call.headers["x-api-key"], "secret");
        match call.path.as_str() {
            "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export" => {
                last = Some(call.message::<ExportMetricsServiceRequest>());
            }
            "/opentelemetry.proto.collector.logs.v1.LogsService/Export" => {
                logs.push(call.message::<ExportLogsServiceRequest>());
            }
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
                spans.push(call.message::<ExportTraceServiceRequest>());
            }
            other => panic!("{other}"),
        }
    }

    let metrics = last.unwrap().resource_metrics.remove(0);
    assert_eq!(
        attributes(&metrics.resource.unwrap().attributes),
        pairs(&[
            ("deployment.environment", "test"),
            ("service.name", "mixer")
        ])
    );
    let metrics = &metrics.scope_metrics[0].metrics;
    let [requests, latency] = &metrics[..] else {
        panic!("{metrics:?}");
    };
    assert_eq!(
        (&*requests.name, &*requests.unit),
        ("istio.requests", "{request}")
    );
    let Some(Data::Sum(sum)) = &requests.data else {
        panic!("{requests:?}");
    };
    assert!(sum.is_monotonic);
    assert_eq!(sum.aggregation_temporality, 2, "cumulative");
    let points: Vec<_> = sum
        .data_points
        .iter()
        .map(|p| {
            assert!(0 < p.start_time_unix_nano && p.start_time_unix_nano <= p.time_unix_nano);
            let Some(number_data_point::Value::AsDouble(n)) = p.value else {
                panic!("{p:?}");
            };
            (attributes(&p.attributes), n)
        })
        .collect();
    let of = |code| pairs(&[("source", "productpage"), ("code", code)]);
    assert_eq!(points, [(of("200"), 2.0), (of("500"), 1.0)]);
    let Some(Data::Histogram(histogram)) = &latency.data else {
        panic!("{latency:?}");
    };
    assert_eq!(latency.name, "latency");
    let point = &histogram.data_points[0];
    assert_eq!(point.explicit_bounds, [0.01, 0.1]);
    assert_eq!(point.bucket_counts, [1, 1, 1]);
    assert_eq!((point.count, point.sum), (3, Some(5.055)));

    let records: Vec<_> = logs
        .iter()
        .flat_map(|l| &l.resource_logs[0].scope_logs[0].log_records)
        .collect();
    assert_eq!(records.len(), 3);
    let record = records[2];
    assert_eq!(
        (record.severity_number, &*record.severity_text),
        (13, "warning")
    );
    assert_eq!(record.time_unix_nano, 1_795_478_400_000_000_000);
    assert_eq!(record.event_name, "line.instance.istio-system");
    assert_eq!(
        attributes(&record.attributes),
        pairs(&[("path", "/p"), ("code", "int 500"), ("mtls", "bool false")])
    );

    let of_service = &spans[0].resource_spans[0];
    let resource = attributes(&of_service.resource.as_ref().unwrap().attributes);
    assert_eq!(resource["service.name"], "reviews");
    let spans = &of_service.scope_spans[0].spans;
    let span = &spans[2];
    assert_eq!(
        span.trace_id,
        0x463a_c35c_9f64_13ad_4848_5a39_53bb_6124_u128.to_be_bytes()
    );
    assert_eq!(span.span_id, 0xab_u64.to_be_bytes());
    assert_eq!(span.parent_span_id.len(), 8);
    assert_eq!((&*span.name, span.kind), ("/p", 2));
    assert_eq!(
        span.end_time_unix_nano - span.start_time_unix_nano,
        12_500_000
    );
    assert_eq!(span.status.as_ref().unwrap().code, 2);
    let attributes = attributes(&span.attributes);
    assert_eq!(attributes["http.response.status_code"], "int 500");
    assert_eq!(attributes["peer.service"], "productpage");
    assert_eq!(attributes["mtls"], "bool false");
}

#[tokio::test]
async fn what_may_come_again_does_and_what_is_refused_does_not() {
    let calls = std::sync::atomic::AtomicU32::new(0);
    let (address, mut received) = collector::listen(move |call| {
        if !call.path.contains("LogsService") {
            return 0;
        }
        match calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => 14, // UNAVAILABLE
            1 => 0,
            _ => 3, // INVALID_ARGUMENT
        }
    })
    .await;
    let params = format!("{{ address: \"http://{address}\", {METRICS} }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let one = zipkin::request("inbound", "", 200);
    let mut bodies = Vec::new();
    mesh.report(&[&one]).await;
    while bodies.len() < 3 {
        let call = received.recv().await.unwrap();
        if call.path.contains("LogsService") {
            bodies.push(call.body);
            if bodies.len() == 2 {
                mesh.report(&[&one]).await;
            }
        }
    }
    assert_eq!(bodies[0], bodies[1]);
    assert_ne!(bodies[1], bodies[2]);
    let begun = std::time::Instant::now();
    loop {
        let metrics = get(mesh.running.admin_address, "/metrics").await;
        let has =
            |event: &str| metrics.contains(&format!("adapter=\"opentelemetry\",event=\"{event}\n"));
        if has("records_sent\"} 1") && has("records_dropped\"} 1") {
            return;
        }
        assert!(begun.elapsed().as_secs() < 20, "{metrics}");
    }
}

#[tokio::test]
async fn parameters_that_cannot_be_meant_are_refused() {
    for (params, reason) in [
        (
            "{ address: \"https://x:1\" }",
            "is not HOST:PORT (without TLS)",
        ),
        ("{ exportInterval: 1ms }", "at least 10ms"),
        ("{ headers: { \"a b\": c } }", "a b is no header"),
        (
            "{ metrics: [ { instanceName: a.instance.b } ] }",
            "kind must be COUNTER",
        ),
        ("{ metrics: [] }", "no metric has it as instanceName"),
    ] {
        let mesh = Mesh::start(&[("rules.yaml", &rules(params))]).await;
        assert!(
            mesh.refused().iter().any(|r| r.contains(reason)),
            "{reason} {:?}",
            mesh.refused()
        );
    }
}
