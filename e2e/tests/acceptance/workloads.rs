//! A53 (TCP), A55, A61, A62: what is told of connections, of requests that went nowhere, and of the workloads at both ends.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use e2e::{app, http::Client, mesh::Mesh, mesh::Options, workload::Workload};
use prost::Message;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    collector,
    routing::{ALL_RULES, ratings_fault},
    support::{Sidecar, add_sleep, ask, bookinfo, eventually, metrics, on_both},
};

/// Istio's task on TCP metrics, as it stands there.
const MONGO_METRICS: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: mongosentbytes, namespace: default }
spec:
  compiledTemplate: metric
  params:
    value: connection.sent.bytes | 0
    dimensions:
      source_service: source.workload.name | "unknown"
      source_version: source.labels["version"] | "unknown"
      destination_version: destination.labels["version"] | "unknown"
    monitoredResourceType: '"UNSPECIFIED"'
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: mongoreceivedbytes, namespace: default }
spec:
  compiledTemplate: metric
  params:
    value: connection.received.bytes | 0
    dimensions:
      source_service: source.workload.name | "unknown"
      source_version: source.labels["version"] | "unknown"
      destination_version: destination.labels["version"] | "unknown"
    monitoredResourceType: '"UNSPECIFIED"'
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: mongohandler, namespace: default }
spec:
  compiledAdapter: prometheus
  params:
    metrics:
    - name: mongo_sent_bytes
      instance_name: mongosentbytes.instance.default
      kind: COUNTER
      label_names: [ source_service, source_version, destination_version ]
    - name: mongo_received_bytes
      instance_name: mongoreceivedbytes.instance.default
      kind: COUNTER
      label_names: [ source_service, source_version, destination_version ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: mongoprom, namespace: default }
spec:
  match: context.protocol == "tcp" && destination.service.host == "mongodb.default.svc.cluster.local"
  actions:
  - handler: mongohandler
    instances: [ mongoreceivedbytes, mongosentbytes ]
"#;

on_both!(a53_a55_bytes_and_connections_of_a_database_are_counted);

async fn a53_a55_bytes_and_connections_of_a_database_are_counted(
    sidecar: Sidecar,
) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    add_sleep(&mut mesh)?;
    let labels = [("app", "mongodb"), ("version", "v1")];
    let instance = mesh.add(Workload::new("mongodb", &labels, 27017), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(27017)));
    let _app = app::tcp_echo(address, "one").await?;
    mesh.ready().await?;
    let service = "apiVersion: v1
kind: Service
metadata: { name: mongodb }
spec:
  selector: { app: mongodb }
  ports: [{ name: mongo, port: 27017 }]
";
    mesh.apply("mongodb.yaml", service).await?;
    mesh.apply("mongo-metrics.yaml", MONGO_METRICS).await?;
    let outbound = mesh.instance("sleep-0")?.address.outbound;
    let mut stream = TcpStream::connect((outbound, 27017)).await?;
    stream.write_all(b"hello").await?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"one hello");
    drop(stream);
    eventually(Duration::from_secs(15), async || {
        let all = metrics(&client, &mesh).await?;
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 1.0),
            ("istio_tcp_connections_closed_total", 1.0),
            ("istio_tcp_received_bytes_total", 5.0),
            ("istio_tcp_sent_bytes_total", 9.0),
        ] {
            for reporter in ["source", "destination"] {
                let found: Vec<_> = all
                    .iter()
                    .filter(|s| {
                        s.name == name
                            && s.label("reporter") == reporter
                            && s.label("source_app") == "sleep"
                            && s.label("destination_app") == "mongodb"
                    })
                    .collect();
                anyhow::ensure!(
                    found.len() == 1 && (found[0].value - value).abs() < f64::EPSILON,
                    "{name} by {reporter}: {found:?}"
                );
            }
        }
        // Both sides report, and this metric does not ask which.
        for (name, value) in [
            ("istio_mongo_received_bytes", 10.0),
            ("istio_mongo_sent_bytes", 18.0),
        ] {
            let found: Vec<_> = all.iter().filter(|s| s.name == name).collect();
            anyhow::ensure!(
                found.len() == 1
                    && (found[0].value - value).abs() < f64::EPSILON
                    && found[0].label("source_service") == "sleep"
                    && found[0].label("destination_version") == "v1",
                "{name}: {found:?}"
            );
        }
        Ok(())
    })
    .await
}

/// What an adapter process gets of a metric (istio.io/istio `mixer/template/metric`).
#[derive(Clone, PartialEq, Message)]
struct MetricRequest {
    #[prost(message, repeated, tag = "1")]
    instances: Vec<Metric>,
}

#[derive(Clone, PartialEq, Message)]
struct Metric {
    #[prost(map = "string, message", tag = "2")]
    dimensions: std::collections::HashMap<String, Text>,
}

/// `istio.policy.v1beta1.Value` that holds a string.
#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
}

/// Counts requests by the workloads at their ends, in Mixer and in the process at `address`.
fn ends(address: SocketAddr) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: ends, namespace: istio-system }}
spec:
  compiledTemplate: metric
  params:
    value: "1"
    dimensions:
      reporter: context.reporter.kind | "unknown"
      source_pod: source.name | "unknown"
      source_uid: source.uid | "unknown"
      source_owner: source.owner | "unknown"
      source_workload: source.workload.name | "unknown"
      source_account: source.serviceAccount | "unknown"
      destination_pod: destination.name | "unknown"
      destination_owner: destination.owner | "unknown"
      destination_workload: destination.workload.uid | "unknown"
      destination_namespace: destination.workload.namespace | "unknown"
      destination_container: destination.container.name | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: here, namespace: istio-system }}
spec:
  compiledAdapter: prometheus
  params:
    metrics:
    - name: request_count_here
      instance_name: ends.instance.istio-system
      kind: COUNTER
      label_names: [ reporter, source_pod, source_uid, source_owner, source_workload, source_account, destination_pod, destination_owner, destination_workload, destination_namespace, destination_container ]
---
apiVersion: config.istio.io/v1alpha2
kind: adapter
metadata: {{ name: counter, namespace: istio-system }}
spec: {{ templates: [ metric ], session_based: false }}
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: oop, namespace: istio-system }}
spec: {{ adapter: counter, connection: {{ address: "{address}" }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: ends, namespace: istio-system }}
spec:
  match: context.protocol == "http"
  actions:
  - {{ handler: here, instances: [ ends ] }}
  - {{ handler: oop, instances: [ ends ] }}
"#
    )
}

type Labels = BTreeMap<String, String>;

#[tokio::test]
async fn a61_a62_faults_are_counted_and_workloads_named_in_mixer_and_beside_it()
-> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let (address, mut received) = collector::listen(|_| 0).await;
    mesh.apply("ends.yaml", &ends(address)).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply(
        "ratings.yaml",
        &ratings_fault(
            "{ abort: { httpStatus: 500, percentage: { value: 100 } } }",
            false,
        ),
    )
    .await?;
    for _ in 0..50 {
        let from = mesh.instance("reviews-v3-0")?;
        let answer = ask(&client, from, "ratings:9080", "/ratings/0", &[]).await?;
        assert_eq!(answer.status, 500, "{}", answer.text());
    }
    for _ in 0..7 {
        let from = mesh.instance("productpage-v1-0")?;
        let answer = ask(&client, from, "details:9080", "/details/0", &[]).await?;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let mut beside: BTreeMap<Labels, f64> = BTreeMap::new();
    let counted = eventually(Duration::from_secs(10), async || {
        // A61: by the caller's proxy alone, which kept the requests to itself.
        let all = metrics(&client, &mesh).await?;
        let faults: Vec<_> = all
            .iter()
            .filter(|s| {
                s.name == "istio_requests_total" && s.label("destination_service_name") == "ratings"
            })
            .collect();
        anyhow::ensure!(
            faults.len() == 1
                && (faults[0].value - 50.0).abs() < f64::EPSILON
                && faults[0].label("reporter") == "source"
                && faults[0].label("response_code") == "500"
                && faults[0].label("response_flags") == "FI",
            "{faults:?}"
        );
        // A62
        while let Ok(call) = received.try_recv() {
            anyhow::ensure!(
                call.path == "/metric.HandleMetricService/HandleMetric",
                "{}",
                call.path
            );
            for metric in call.message::<MetricRequest>().instances {
                let labels = metric
                    .dimensions
                    .into_iter()
                    .map(|(name, value)| (name, value.text));
                *beside.entry(labels.collect()).or_default() += 1.0;
            }
        }
        let here: BTreeMap<Labels, f64> = all
            .into_iter()
            .filter(|s| s.name == "istio_request_count_here")
            .map(|s| (s.labels, s.value))
            .collect();
        anyhow::ensure!(here == beside, "{here:#?}\n{beside:#?}");
        anyhow::ensure!(here.values().sum::<f64>() == 50.0 + 2.0 * 7.0, "{here:#?}");
        Ok(here)
    })
    .await?;
    for reporter in ["outbound", "inbound"] {
        let wanted: Labels = [
            ("reporter", reporter),
            ("source_pod", "productpage-v1-0"),
            ("source_uid", "kubernetes://productpage-v1-0.default"),
            (
                "source_owner",
                "kubernetes://apis/apps/v1/namespaces/default/deployments/productpage-v1",
            ),
            ("source_workload", "productpage-v1"),
            ("source_account", "bookinfo-productpage"),
            ("destination_pod", "details-v1-0"),
            (
                "destination_owner",
                "kubernetes://apis/apps/v1/namespaces/default/deployments/details-v1",
            ),
            (
                "destination_workload",
                "istio://default/workloads/details-v1",
            ),
            ("destination_namespace", "default"),
            ("destination_container", "app"),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        assert_eq!(
            counted.get(&wanted),
            Some(&7.0),
            "{wanted:#?} in {counted:#?}"
        );
    }
    Ok(())
}
