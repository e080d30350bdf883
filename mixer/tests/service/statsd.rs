//! statsd and dogstatsd: what arrives at a UDP port, read as StatsD's documentation has it.

use std::{collections::BTreeMap, time::Duration};

use lateen_adapter::Value;
use tokio::net::UdpSocket;

use crate::support::{Mesh, get, map};

fn rules(adapter: &str, params: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: {adapter}
metadata: {{ name: handler, namespace: istio-system }}
spec:
{params}
---
apiVersion: config.istio.io/v1alpha2
kind: metric
metadata: {{ name: requestcount, namespace: istio-system }}
spec:
  value: "1"
  dimensions:
    code: response.code | 0
    app: source.labels["app"] | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: metric
metadata: {{ name: latency, namespace: istio-system }}
spec: {{ value: 'response.duration | "0ms"' }}
---
apiVersion: config.istio.io/v1alpha2
kind: metric
metadata: {{ name: size, namespace: istio-system }}
spec: {{ value: response.size | 0 }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: send, namespace: istio-system }}
spec:
  actions:
  - {{ handler: handler.{adapter}, instances: [ requestcount.metric, latency.metric, size.metric ] }}
"#
    )
}

fn request(app: &str, size: i64) -> Vec<(&'static str, Value)> {
    vec![
        ("source.labels", map(&[("app", app)])),
        ("response.code", Value::Int64(200)),
        ("response.size", Value::Int64(size)),
        (
            "response.duration",
            Value::Duration(lateen_engine::parse_duration("6.5ms").unwrap()),
        ),
    ]
}

/// A line taken apart: `NAME:VALUE|TYPE[|@RATE][|#TAG,TAG]`.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    name: String,
    value: f64,
    kind: String,
    rate: Option<f64>,
    tags: Vec<String>,
}

fn line(text: &str) -> Line {
    let (name, rest) = text.split_once(':').unwrap();
    let mut parts = rest.split('|');
    let mut line = Line {
        name: name.to_owned(),
        value: parts.next().unwrap().parse().unwrap(),
        kind: parts.next().unwrap().to_owned(),
        rate: None,
        tags: Vec::new(),
    };
    for part in parts {
        match part.split_at(1) {
            ("@", rate) => line.rate = Some(rate.parse().unwrap()),
            ("#", tags) => line.tags = tags.split(',').map(str::to_owned).collect(),
            _ => panic!("{text}"),
        }
    }
    line
}

/// Packets until there are `count` lines.
async fn receive(socket: &UdpSocket, count: usize) -> (Vec<Line>, Vec<usize>) {
    let (mut lines, mut sizes) = (Vec::new(), Vec::new());
    let mut packet = vec![0; 65_536];
    while lines.len() < count {
        let received = tokio::time::timeout(Duration::from_secs(20), socket.recv(&mut packet));
        let size = received.await.expect("a packet").unwrap();
        sizes.push(size);
        lines.extend(
            std::str::from_utf8(&packet[..size])
                .unwrap()
                .lines()
                .map(line),
        );
    }
    (lines, sizes)
}

#[tokio::test]
async fn statsd_gets_names_made_of_dimensions() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let params = format!(
        r#"  address: "{address}"
  prefix: mesh.
  flushBytes: 64
  metrics:
    requestcount.metric.istio-system: {{ type: COUNTER, nameTemplate: "{{{{.app}}}}.{{{{ .code }}}}" }}
    latency.metric.istio-system: {{ type: DISTRIBUTION, name_template: latency }}
    size.metric.istio-system: {{ type: GAUGE }}"#
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules("statsd", &params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh.report(&[&request("a|b", -5)]).await;
    let (lines, sizes) = receive(&socket, 4).await;
    let want = |name: &str, value: f64, kind: &str| Line {
        name: name.to_owned(),
        value,
        kind: kind.to_owned(),
        rate: None,
        tags: Vec::new(),
    };
    assert_eq!(
        lines,
        [
            want("mesh.a_b.200", 1.0, "c"),
            want("mesh.latency", 6.5, "ms"),
            want("mesh.size.metric.istio-system", 0.0, "g"), // a sign means a difference
            want("mesh.size.metric.istio-system", -5.0, "g"),
        ]
    );
    assert!(sizes.iter().all(|s| *s <= 64), "{sizes:?}");
}

#[tokio::test]
async fn what_is_sampled_says_so_and_adds_up() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let params = format!(
        r#"  address: "{address}"
  samplingRate: 0.25
  flushBytes: 1400
  metrics:
    requestcount.metric.istio-system: {{ type: COUNTER, nameTemplate: requests }}
    latency.metric.istio-system: {{ type: DISTRIBUTION, nameTemplate: latency }}
    size.metric.istio-system: {{ type: GAUGE, nameTemplate: size }}"#
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules("statsd", &params))]).await;
    let one = request("a", 3);
    let all: Vec<&[_]> = vec![&one; 1000];
    mesh.report(&all).await;
    // Gauges are not sampled, and are the last of each record.
    let mut lines = Vec::new();
    while lines.iter().filter(|l: &&Line| l.name == "size").count() < 1000 {
        lines.extend(receive(&socket, 1).await.0);
    }
    let mut estimates = BTreeMap::new();
    for line in &lines {
        *estimates.entry(line.name.as_str()).or_insert(0.0) += 1.0 / line.rate.unwrap_or(1.0);
        assert_eq!(line.rate, (line.name != "size").then_some(0.25));
    }
    // Binomial: 1000 ± 55; nine deviations.
    for name in ["requests", "latency"] {
        let estimate = estimates[name];
        assert!((500.0..1500.0).contains(&estimate), "{name} {estimate}");
    }
}

#[tokio::test]
async fn dogstatsd_gets_tags() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    for (buffer, packets) in [(0, 3), (10, 1)] {
        let params = format!(
            r#"  address: "{address}"
  buffer_length: {buffer}
  global_tags: {{ mesh: one }}
  metrics:
    requestcount.metric.istio-system: {{ name: requestcount, type: COUNTER, tags: {{ my: "istio:metric" }} }}
    latency.metric.istio-system: {{ name: latency, type: DISTRIBUTION }}
    size.metric.istio-system: {{ name: size, type: DISTRIBUTION }}"#
        );
        let mut mesh = Mesh::start(&[("rules.yaml", &rules("dogstatsd", &params))]).await;
        assert_eq!(mesh.refused(), [""; 0]);
        mesh.report(&[&request("a,b#c", 7)]).await;
        let (lines, sizes) = receive(&socket, 3).await;
        let want = |name: &str, value: f64, kind: &str, tags: &[&str]| Line {
            name: name.to_owned(),
            value,
            kind: kind.to_owned(),
            rate: None,
            tags: tags.iter().map(|t| (*t).to_owned()).collect(),
        };
        let tags = ["mesh:one", "my:istio:metric", "app:a_b_c", "code:200"];
        assert_eq!(
            lines,
            [
                want("istio.requestcount", 1.0, "c", &tags),
                want("istio.latency", 6.5, "ms", &["mesh:one"]),
                want("istio.size", 7.0, "h", &["mesh:one"]),
            ]
        );
        assert_eq!(sizes.len(), packets);
    }
}

#[tokio::test]
async fn parameters_that_cannot_be_meant_are_refused() {
    let statsd = [
        ("  samplingRate: 0", "samplingRate: 0 is not above 0"),
        ("  flushBytes: 1", "flushBytes: 1 is not"),
        ("  address: here", "address: \"here\" is not HOST:PORT"),
        (
            "  metrics: { requestcount.metric.istio-system: {} }",
            "type must be COUNTER",
        ),
        (
            "  metrics: {}",
            "instance latency.metric.istio-system is sent here but has no entry",
        ),
        (
            "  metrics: { requestcount.metric.istio-system: { type: COUNTER, nameTemplate: \"{{.nothing}}\" } }",
            "there is no dimension nothing",
        ),
        (
            "  metrics: { requestcount.metric.istio-system: { type: COUNTER, nameTemplate: \"{{nothing}}\" } }",
            "is not of the form {{.DIMENSION}}",
        ),
    ];
    for (params, reason) in statsd {
        let mesh = Mesh::start(&[("rules.yaml", &rules("statsd", params))]).await;
        assert!(
            mesh.refused().iter().any(|r| r.contains(reason)),
            "{reason} {:?}",
            mesh.refused()
        );
    }
    let params = "  sampleRate: 2";
    let mesh = Mesh::start(&[("rules.yaml", &rules("dogstatsd", params))]).await;
    assert!(mesh.refused().iter().any(|r| r.contains("sampleRate: 2")));
}

#[tokio::test]
async fn a_receiver_that_is_not_there_is_counted() {
    let address = UdpSocket::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let params = format!(
        r#"  address: "{address}"
  flushDuration: 1ms
  metrics:
    requestcount.metric.istio-system: {{ type: COUNTER }}
    latency.metric.istio-system: {{ type: DISTRIBUTION }}
    size.metric.istio-system: {{ type: GAUGE }}"#
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules("statsd", &params))]).await;
    let begun = std::time::Instant::now();
    loop {
        // The kernel tells of the first packet's failure at the second.
        mesh.report(&[&request("a", 1)]).await;
        let metrics = get(mesh.running.admin_address, "/metrics").await;
        let lost = metrics
            .lines()
            .find(|l| l.contains("event=\"packets_lost\""))
            .unwrap();
        if !lost.ends_with(" 0") {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{metrics}");
    }
}
