//! A58: one trace for one page, and the share of requests that is traced.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use e2e::{app, http::Client, mesh::Options, samples};
use http_body_util::{BodyExt as _, Full};
use serde_json::Value;

use super::{
    routing::{ALL_RULES, reviews_to},
    support::{assert_share, bookinfo, eventually, page},
};

const SENT: usize = 10_000;
/// Of a request whose span comes after all others, and is wanted.
const LAST: &str = "80f198ee56343ba864fe8b2a57d3eff7";

fn sampling(percent: u32) -> String {
    format!(
        "{}    enableTracing: true\n    defaultConfig:\n      tracing: {{ sampling: {percent}, zipkin: {{ address: \"zipkin.example.com:9411\" }} }}\n",
        samples::MESH
    )
}

#[tokio::test]
async fn a58_one_connected_trace_and_one_percent_of_them() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let address = SocketAddr::from((mesh.block().outside(0), 9411));
    let spans: Arc<Mutex<Vec<Value>>> = Arc::default();
    let collected = Arc::clone(&spans);
    let _zipkin = app::serve(address, move |_, request| {
        let collected = Arc::clone(&collected);
        async move {
            let body = request
                .into_body()
                .collect()
                .await
                .map(|b| b.to_bytes())
                .unwrap_or_default();
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
    let take = || std::mem::take(&mut *spans.lock().unwrap_or_else(|e| e.into_inner()));
    let zipkin = include_str!("../../../install/samples/bookinfo/zipkin.yaml");
    let zipkin = zipkin.replace("127.0.0.1", &address.ip().to_string());
    mesh.apply("zipkin.yaml", &zipkin).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    mesh.apply("mesh.yaml", &sampling(100)).await?;

    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    let mut all = Vec::new();
    // gateway → productpage → details, reviews → ratings: one span of the proxies at both ends of each hop,
    // and one of the gateway for what came in.
    eventually(Duration::from_secs(15), async || {
        all.extend(take());
        anyhow::ensure!(all.len() == 9, "{} spans: {all:#?}", all.len());
        Ok(())
    })
    .await?;
    let traces: BTreeSet<_> = all.iter().map(|s| s["traceId"].to_string()).collect();
    assert_eq!(traces.len(), 1, "{all:#?}");
    let ids: BTreeSet<_> = all.iter().map(|s| s["id"].to_string()).collect();
    let roots = all.iter().filter(|s| s["parentId"].is_null()).count();
    assert_eq!(roots, 1, "{all:#?}");
    for span in all.iter().filter(|s| !s["parentId"].is_null()) {
        assert!(ids.contains(&span["parentId"].to_string()), "{span:#}");
    }
    let kinds = |kind: &str| all.iter().filter(|s| s["kind"] == kind).count();
    assert_eq!((kinds("SERVER"), kinds("CLIENT")), (5, 4), "{all:#?}");

    mesh.apply("mesh.yaml", &sampling(1)).await?;
    take();
    // Connections that are open have the listener they were accepted by, until they are drained.
    let client = Client::new();
    let url = format!("{}/nothing", mesh.gateway_url());
    let mut senders = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (client, url) = (client.clone(), url.clone());
        senders.spawn(async move {
            for _ in 0..SENT / 8 {
                let answer = client.get(&url).await?;
                anyhow::ensure!(answer.status == 404, "status {}", answer.status);
            }
            Ok(())
        });
    }
    senders
        .join_all()
        .await
        .into_iter()
        .collect::<anyhow::Result<()>>()?;
    let wanted = format!("{LAST}-e457b5a2e4d86bd1-1");
    client.get_with(&url, &[("b3", &wanted)]).await?;
    let mut all = Vec::new();
    eventually(Duration::from_secs(15), async || {
        all.extend(take());
        anyhow::ensure!(
            all.iter().any(|s| s["traceId"] == LAST),
            "{} spans",
            all.len()
        );
        Ok(())
    })
    .await?;
    assert_share(all.len() - 1, SENT, 0.01);
    Ok(())
}
