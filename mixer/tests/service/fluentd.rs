//! fluentd: what a receiver of the forward protocol gets, also when it goes away and comes back.

use std::time::{Duration, Instant};

use lateen_adapter::Value as Attribute;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    msgpack::{self, Value},
    support::{Mesh, get, map},
};

fn rules(params: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: fluentd
metadata: {{ name: handler, namespace: istio-system }}
spec: {params}
---
apiVersion: config.istio.io/v1alpha2
kind: logentry
metadata: {{ name: newlog, namespace: istio-system }}
spec:
  severity: '"warning"'
  timestamp: request.time
  variables:
    source: source.labels["app"] | "unknown"
    ip: source.ip | ip("0.0.0.0")
    responseCode: response.code | 0
    latency: response.duration | "0ms"
    mtls: connection.mtls | false
    labels: source.labels | emptyStringMap()
    tag: request.headers["tag"] | ""
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: newlogtofluentd, namespace: istio-system }}
spec: {{ actions: [ {{ handler: handler.fluentd, instances: [ newlog.logentry ] }} ] }}
"#
    )
}

fn record(app: &str, tag: &str) -> Vec<(&'static str, Attribute)> {
    vec![
        ("source.labels", map(&[("app", app), ("version", "v1")])),
        (
            "source.ip",
            lateen_adapter::value::address([10, 1, 2, 3].into()),
        ),
        ("response.code", Attribute::Int64(200)),
        (
            "response.duration",
            Attribute::Duration(lateen_engine::parse_duration("6.848ms").unwrap()),
        ),
        ("connection.mtls", Attribute::Bool(true)),
        ("request.headers", map(&[("tag", tag)])),
        (
            "request.time",
            Attribute::Timestamp(lateen_engine::parse_timestamp("2026-11-24T01:02:03.5Z").unwrap()),
        ),
    ]
}

/// A connection that messages come in on.
struct Receiver {
    stream: TcpStream,
    bytes: Vec<u8>,
}

/// An event as it is told: tag, time, record.
type Event = (String, (u32, u32), Value);

impl Receiver {
    async fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        Self {
            stream,
            bytes: Vec::new(),
        }
    }

    /// The next message: its events and its options. `None`: the sender has closed.
    async fn message(&mut self) -> Option<(Vec<Event>, Value)> {
        loop {
            let mut rest = self.bytes.as_slice();
            if let Some(message) = msgpack::read(&mut rest) {
                self.bytes = rest.to_vec();
                return Some(events(message));
            }
            if self.stream.read_buf(&mut self.bytes).await.unwrap() == 0 {
                assert!(self.bytes.is_empty(), "half a message");
                return None;
            }
        }
    }
}

/// PackedForward mode, option `size` checked.
fn events(message: Value) -> (Vec<Event>, Value) {
    let Value::Array(parts) = message else {
        panic!("{message:?}");
    };
    let [Value::Text(tag), Value::Bytes(entries), option] = &parts[..] else {
        panic!("{parts:?}");
    };
    let mut rest = entries.as_slice();
    let mut all = Vec::new();
    while !rest.is_empty() {
        let Some(Value::Array(entry)) = msgpack::read(&mut rest) else {
            panic!("an entry is cut");
        };
        let [Value::Extension(0, time), record] = &entry[..] else {
            panic!("{entry:?}");
        };
        let number = |part: &[u8]| u32::from_be_bytes(part.try_into().unwrap());
        all.push((
            tag.clone(),
            (number(&time[..4]), number(&time[4..])),
            record.clone(),
        ));
    }
    assert_eq!(option.get("size"), &Value::Int(all.len() as i64));
    (all, option.clone())
}

#[tokio::test]
async fn records_arrive_as_they_are() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    for (params, latency) in [
        ("integerDuration: n", Value::Text("6.848ms".into())),
        ("integerDuration: true", Value::Int(6)),
    ] {
        let params = format!("{{ address: \"{address}\", pushIntervalDuration: 10ms, {params} }}");
        let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
        assert_eq!(mesh.refused(), [""; 0]);
        mesh.report(&[&record("productpage", "")]).await;
        let mut receiver = Receiver::accept(&listener).await;
        let (events, _) = receiver.message().await.unwrap();
        let [(tag, time, got)] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(tag, "newlog.logentry.istio-system");
        assert_eq!(*time, (1_795_482_123, 500_000_000));
        let text = |t: &str| Value::Text(t.into());
        let labels = [("app", "productpage"), ("version", "v1")];
        let want = [
            ("severity", text("warning")),
            ("source", text("productpage")),
            ("ip", text("10.1.2.3")),
            ("responseCode", Value::Int(200)),
            ("latency", latency),
            ("mtls", Value::Bool(true)),
            (
                "labels",
                Value::Map(labels.map(|(k, v)| (k.into(), text(v))).into()),
            ),
            ("tag", text("")),
        ];
        let want = Value::Map(want.map(|(k, v)| (k.to_owned(), v)).into());
        assert_eq!(*got, want);
    }
}

#[tokio::test]
async fn a_variable_may_name_the_tag_and_what_is_queued_at_the_end_arrives() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let params = format!("{{ address: \"{address}\", pushIntervalDuration: 600s }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    let (a, b, c) = (record("a", "one"), record("b", "two"), record("c", "one"));
    mesh.report(&[&a, &b, &c]).await;
    // Nobody has connected yet; the handler goes, and sends what it has.
    mesh.apply("rules.yaml", None).await;
    let mut receiver = Receiver::accept(&listener).await;
    let mut told = Vec::new();
    while let Some((events, _)) = receiver.message().await {
        told.extend(
            events
                .iter()
                .map(|(tag, _, r)| (tag.clone(), r.get("source").clone())),
        );
    }
    let text = |t: &str| Value::Text(t.into());
    let want = [("one", text("a")), ("one", text("c")), ("two", text("b"))];
    assert_eq!(told, want.map(|(tag, source)| (tag.to_owned(), source)));
}

#[tokio::test]
async fn a_receiver_that_goes_away_gets_the_rest_when_it_is_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let params =
        format!("{{ address: \"{address}\", pushIntervalDuration: 10ms, requireAck: true }}");
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    mesh.report(&[&record("first", "")]).await;
    let mut receiver = Receiver::accept(&listener).await;
    let (events, option) = receiver.message().await.unwrap();
    assert_eq!(events[0].2.get("source"), &Value::Text("first".into()));
    // It is not acknowledged, so it comes again; then it is.
    drop(receiver);
    let mut receiver = Receiver::accept(&listener).await;
    let (again, second) = receiver.message().await.unwrap();
    assert_eq!(again, events);
    assert_ne!(second.get("chunk"), option.get("chunk"));
    let Value::Text(chunk) = second.get("chunk") else {
        panic!("{second:?}");
    };
    let mut ack = vec![0x81, 0xa3, b'a', b'c', b'k', 0xa0 | chunk.len() as u8];
    ack.extend(chunk.bytes());
    receiver.stream.write_all(&ack).await.unwrap();
    mesh.report(&[&record("second", "")]).await;
    let (events, _) = receiver.message().await.unwrap();
    assert_eq!(events[0].2.get("source"), &Value::Text("second".into()));
}

#[tokio::test]
async fn what_has_no_room_is_dropped_and_counted() {
    // A port that nobody listens on.
    let address = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let params = format!(
        "{{ address: \"{address}\", instanceBufferSize: 10, pushIntervalDuration: 1ms, maxBatchSizeBytes: 1 }}"
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&params))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let one = record("a", "");
    let all: Vec<&[_]> = vec![&one; 100];
    let begun = Instant::now();
    mesh.report(&all).await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "nobody waits for the receiver"
    );
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    let dropped: u64 = metrics
        .lines()
        .find(|l| l.contains("adapter=\"fluentd\",event=\"records_dropped\""))
        .and_then(|l| l.rsplit(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("{metrics}"));
    assert!((88..=90).contains(&dropped), "{dropped}");
}

#[tokio::test]
async fn parameters_that_cannot_be_meant_are_refused() {
    for (params, reason) in [
        (
            "{ address: nowhere }",
            "address: \"nowhere\" is not HOST:PORT",
        ),
        ("{ instanceBufferSize: 0 }", "instanceBufferSize: 0"),
        ("{ integerDuration: perhaps }", "true or false"),
        ("{ maxBatchSizeBytes: 0 }", "must not be 0"),
    ] {
        let mesh = Mesh::start(&[("rules.yaml", &rules(params))]).await;
        assert!(
            mesh.refused().iter().any(|r| r.contains(reason)),
            "{:?}",
            mesh.refused()
        );
    }
}
