//! Telemetry objects: access logs with a condition, and traces, to providers of the mesh.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use e2e::{app, http::Client, mesh::Mesh, samples, workload::Workload};
use http_body_util::{BodyExt as _, Full};
use serde_json::Value;

use super::support::{Sidecar, add_sleep, ask, eventually, on_both};

on_both!(telemetry_says_what_is_logged_and_traced);

const HTTPBIN: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
";

fn telemetry(spec: &str) -> String {
    format!(
        "apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{ name: telemetry }}
spec: {spec}
"
    )
}

const BOTH: &str = "
  accessLogging:
  - providers: [{ name: errors }]
    filter: { expression: \"response.code >= 400 && request.headers['x-log'] == 'yes'\" }
  tracing:
  - providers: [{ name: zipkin }]
    randomSamplingPercentage: 100
    customTags: { team: { literal: { value: blue } } }
";

const NEITHER: &str = "
  accessLogging: [{ providers: [{ name: errors }], disabled: true }]
  tracing: [{ disableSpanReporting: true }]
";

async fn telemetry_says_what_is_logged_and_traced(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let mut mesh = Mesh::start(options).await?;
    add_sleep(&mut mesh)?;
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let port = instance.workload.app_port(8000);
    let _app = app::httpbin((instance.address.ip, port).into(), "v1").await?;
    mesh.ready().await?;
    mesh.apply("httpbin.yaml", HTTPBIN).await?;

    let address = SocketAddr::from((mesh.block().outside(0), 9411));
    let spans: Arc<Mutex<Vec<Value>>> = Arc::default();
    let collected = Arc::clone(&spans);
    let _zipkin = app::serve(address, move |_, request| {
        let collected = Arc::clone(&collected);
        async move {
            let body = request.into_body().collect().await;
            let body = body.map(|body| body.to_bytes()).unwrap_or_default();
            let batch: Vec<Value> = serde_json::from_slice(&body).unwrap_or_default();
            collected
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .extend(batch);
            let mut answer = http::Response::new(Full::new(Bytes::new()));
            *answer.status_mut() = http::StatusCode::ACCEPTED;
            answer
        }
    })
    .await?;
    let zipkin = include_str!("../../../install/samples/bookinfo/zipkin.yaml");
    let zipkin = zipkin.replace("127.0.0.1", &address.ip().to_string());
    mesh.apply("zipkin.yaml", &zipkin).await?;
    let file = mesh.folder().join("run/errors.log");
    let providers = format!(
        "{}    extensionProviders:
    - {{ name: errors, envoyFileAccessLog: {{ path: {}, logFormat: {{ text: 'error %RESPONSE_CODE% %UPSTREAM_CLUSTER%' }} }} }}
    - {{ name: zipkin, zipkin: {{ service: zipkin.example.com, port: 9411 }} }}
",
        samples::MESH,
        file.display()
    );
    mesh.apply("mesh.yaml", &providers).await?;
    mesh.apply("telemetry.yaml", &telemetry(BOTH)).await?;

    let send = async |mesh: &Mesh, path: &str, log: &str| -> anyhow::Result<()> {
        // A connection keeps the settings of the listener that took it; so does the one between the sidecars, which is
        // why only the client's side is looked at after changes.
        let client = Client::new();
        let from = mesh.instance("sleep-0")?;
        ask(&client, from, "httpbin:8000", path, &[("x-log", log)]).await?;
        Ok(())
    };
    let lines = |of: &str| {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.lines()
            .filter(|line| line.starts_with(&format!("error {of}")))
            .count()
    };
    // Stock Envoy's own questions to Mixer are spans, too, without tags.
    let tagged = |kind: &str| {
        let all = spans.lock().unwrap_or_else(|e| e.into_inner());
        all.iter()
            .filter(|span| span["kind"] == kind && span["tags"]["team"] == "blue")
            .count()
    };
    send(&mesh, "/status/200", "yes").await?;
    send(&mesh, "/status/404", "no").await?;
    send(&mesh, "/status/503", "yes").await?;
    eventually(Duration::from_secs(20), async || {
        let got = (lines("503 outbound|"), lines("503 inbound|"));
        anyhow::ensure!(got == (1, 1), "lines: {got:?}");
        let got = (tagged("CLIENT"), tagged("SERVER"));
        anyhow::ensure!(got == (3, 3), "spans: {got:?}");
        Ok(())
    })
    .await?;
    assert_eq!((lines("200"), lines("404")), (0, 0), "not meant");

    mesh.apply("telemetry.yaml", &telemetry(NEITHER)).await?;
    send(&mesh, "/status/502", "yes").await?;
    mesh.apply("telemetry.yaml", &telemetry(BOTH)).await?;
    send(&mesh, "/status/418", "yes").await?;
    // What comes later is there, what was sent in between is not.
    eventually(Duration::from_secs(20), async || {
        let got = (lines("418 outbound|"), tagged("CLIENT"));
        anyhow::ensure!(got.0 == 1 && got.1 >= 4, "{got:?}");
        Ok(())
    })
    .await?;
    assert_eq!((lines("502 outbound|"), tagged("CLIENT")), (0, 4));
    Ok(())
}
