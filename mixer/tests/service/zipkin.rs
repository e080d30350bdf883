//! zipkin: spans as its API version 2 has them, for both sides of a request.

use lateen_adapter::Value;
use serde_json::{Value as Json, json};

use crate::{
    collector,
    support::{Mesh, get, map, text},
};

pub(crate) const SPAN: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: tracespan
metadata: { name: span, namespace: istio-system }
spec:
  traceId: request.headers["x-b3-traceid"] | ""
  spanId: request.headers["x-b3-spanid"] | ""
  parentSpanId: request.headers["x-b3-parentspanid"] | ""
  spanName: request.path | "/"
  startTime: request.time
  endTime: response.time
  clientSpan: (context.reporter.kind | "inbound") == "outbound"
  rewriteClientSpanId: "true"
  sourceName: source.workload.name | ""
  sourceIp: source.ip | ip("0.0.0.0")
  destinationName: destination.workload.name | ""
  destinationIp: destination.ip | ip("0.0.0.0")
  httpStatusCode: response.code | 0
  requestSize: request.size | 0
  spanTags:
    http.method: request.method | ""
    mtls: connection.mtls | false
"#;

fn rules(params: &str) -> String {
    format!(
        r#"{SPAN}
---
apiVersion: config.istio.io/v1alpha2
kind: zipkin
metadata: {{ name: handler, namespace: istio-system }}
spec: {params}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: trace, namespace: istio-system }}
spec: {{ actions: [ {{ handler: handler.zipkin, instances: [ span.tracespan ] }} ] }}
"#
    )
}

pub(crate) fn request(reporter: &str, trace: &str, code: i64) -> Vec<(&'static str, Value)> {
    let time = |t: &str| Value::Timestamp(lateen_engine::parse_timestamp(t).unwrap());
    let ip = |last| lateen_adapter::value::address([10, 0, 0, last].into());
    vec![
        (
            "request.headers",
            map(&[
                ("x-b3-traceid", trace),
                ("x-b3-spanid", "00000000000000ab"),
                ("x-b3-parentspanid", "00000000000000cd"),
            ]),
        ),
        ("request.path", text("/p")),
        ("request.method", text("GET")),
        ("request.time", time("2026-11-24T00:00:00Z")),
        ("response.time", time("2026-11-24T00:00:00.0125Z")),
        ("context.reporter.kind", text(reporter)),
        ("source.workload.name", text("productpage")),
        ("source.ip", ip(1)),
        ("destination.workload.name", text("reviews")),
        ("destination.ip", ip(2)),
        ("response.code", Value::Int64(code)),
    ]
}

const LONG: &str = "463ac35c9f6413ad48485a3953bb6124";

#[tokio::test]
async fn both_sides_of_a_request_are_one_trace() {
    let (address, mut received) = collector::listen(|_| 202).await;
    let params = format!("{{ url: \"http://{address}/api/v2/spans\" }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let (client, server) = (
        request("outbound", LONG, 200),
        request("inbound", LONG, 503),
    );
    let (short, none) = (
        request("inbound", "48485a3953bb6124", 200),
        request("inbound", "", 200),
    );
    mesh.report(&[&client, &server, &short, &none]).await;
    let post = received.recv().await.unwrap();
    assert_eq!(post.path, "/api/v2/spans");
    assert_eq!(post.headers["content-type"], "application/json");
    let spans: Vec<Json> = serde_json::from_slice(&post.body).unwrap();
    let [client, server, short] = &spans[..] else {
        panic!("{spans:?}");
    };
    let rewritten = client["id"].as_str().unwrap();
    assert_ne!(rewritten, "00000000000000ab");
    let productpage = json!({ "serviceName": "productpage", "ipv4": "10.0.0.1" });
    let reviews = json!({ "serviceName": "reviews", "ipv4": "10.0.0.2" });
    let want = |id: &str, parent: &str, kind: &str, local: &Json, remote: &Json, tags: Json| {
        json!({
            "traceId": LONG, "id": id, "parentId": parent, "name": "/p", "kind": kind,
            "timestamp": 1_795_478_400_000_000_i64, "duration": 12_500,
            "localEndpoint": local, "remoteEndpoint": remote, "tags": tags,
        })
    };
    let tags = json!({ "http.method": "GET", "mtls": "false", "http.status_code": "200" });
    let want_client = want(
        rewritten,
        "00000000000000cd",
        "CLIENT",
        &productpage,
        &reviews,
        tags,
    );
    assert_eq!(*client, want_client);
    let tags =
        json!({ "http.method": "GET", "mtls": "false", "http.status_code": "503", "error": "503" });
    let id = "00000000000000ab";
    assert_eq!(
        *server,
        want(id, rewritten, "SERVER", &reviews, &productpage, tags)
    );
    assert_eq!(short["traceId"], "48485a3953bb6124");
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    assert!(
        metrics.contains("adapter=\"zipkin\",event=\"spans_without_trace\"} 1\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_share_of_the_traces_is_sent_whole() {
    let (address, mut received) = collector::listen(|_| 202).await;
    let params = format!("{{ url: \"http://{address}/api/v2/spans\", sampleProbability: 0.25 }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    let requests: Vec<_> = (0..800)
        .map(|i| {
            request(
                if i % 2 == 0 { "outbound" } else { "inbound" },
                &format!("{:032x}", i / 2 + 1),
                200,
            )
        })
        .collect();
    let all: Vec<&[_]> = requests.iter().map(Vec::as_slice).collect();
    mesh.report(&all).await;
    let mut sent = std::collections::BTreeMap::new();
    let post = received.recv().await.unwrap();
    for span in serde_json::from_slice::<Vec<Json>>(&post.body).unwrap() {
        *sent.entry(span["traceId"].to_string()).or_insert(0) += 1;
    }
    assert!(sent.values().all(|spans| *spans == 2), "{sent:?}");
    assert!((50..=150).contains(&sent.len()), "{}", sent.len()); // 100 ± 9
}

#[tokio::test]
async fn a_receiver_that_is_busy_is_asked_again_and_one_that_refuses_is_not() {
    let attempts = std::sync::atomic::AtomicU32::new(0);
    let (address, mut received) = collector::listen(move |_| {
        match attempts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => 503,
            1 => 429,
            2 => 202,
            _ => 400,
        }
    })
    .await;
    let params = format!("{{ url: \"http://{address}/api/v2/spans\" }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    let one = request("inbound", LONG, 200);
    mesh.report(&[&one]).await;
    let mut bodies = Vec::new();
    for _ in 0..3 {
        bodies.push(received.recv().await.unwrap().body);
    }
    assert!(bodies.iter().all(|b| *b == bodies[0]));
    mesh.report(&[&one]).await;
    received.recv().await.unwrap();
    let begun = std::time::Instant::now();
    loop {
        let metrics = get(mesh.running.admin_address, "/metrics").await;
        let has = |event: &str| metrics.contains(&format!("adapter=\"zipkin\",event=\"{event}\n"));
        if has("records_sent\"} 1") && has("records_dropped\"} 1") && has("send_failures\"} 3") {
            return;
        }
        assert!(begun.elapsed().as_secs() < 20, "{metrics}");
    }
}

#[tokio::test]
async fn parameters_that_cannot_be_meant_are_refused() {
    for (params, reason) in [
        (
            "{ url: \"zipkin:9411\" }",
            "is not of the form http://HOST:9411",
        ),
        (
            "{ sampleProbability: 2 }",
            "sampleProbability: 2 is not between",
        ),
    ] {
        let mesh = Mesh::start(&[("rules.yaml", &rules(params))]).await;
        assert!(
            mesh.refused().iter().any(|r| r.contains(reason)),
            "{:?}",
            mesh.refused()
        );
    }
}
