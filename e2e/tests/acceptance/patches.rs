//! EnvoyFilters: what they add is seen by requests, and gone with them.

use std::time::Duration;

use e2e::{app, http::Client, mesh::Mesh, workload::Workload};

use super::support::{Sidecar, add_sleep, ask, eventually, on_both};

on_both!(filters_routes_and_clusters_are_patched);

const HTTPBIN: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
";

const PATCHES: &str = "apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: { name: hello }
spec:
  workloadSelector: { labels: { app: sleep } }
  configPatches:
  - applyTo: HTTP_FILTER
    match: { context: SIDECAR_OUTBOUND, listener: { filterChain: { filter: { name: envoy.filters.network.http_connection_manager, subFilter: { name: envoy.filters.http.router } } } } }
    patch:
      operation: INSERT_BEFORE
      value:
        name: hello
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
          default_source_code: { inline_string: \"function envoy_on_response(h) h:headers():add('x-hello', 'there') end\" }
  - applyTo: VIRTUAL_HOST
    match: { context: SIDECAR_OUTBOUND, routeConfiguration: { vhost: { name: 'httpbin.default.svc.cluster.local:8000' } } }
    patch: { operation: MERGE, value: { response_headers_to_add: [ { header: { key: x-host, value: patched } } ] } }
  - applyTo: HTTP_ROUTE
    match: { context: SIDECAR_OUTBOUND, routeConfiguration: { vhost: { name: 'httpbin.default.svc.cluster.local:8000' } } }
    patch: { operation: INSERT_FIRST, value: { match: { path: /teapot }, direct_response: { status: 418 } } }
  - applyTo: CLUSTER
    match: { context: SIDECAR_OUTBOUND, cluster: { service: httpbin.default.svc.cluster.local } }
    patch: { operation: MERGE, value: { circuit_breakers: { thresholds: [ { priority: HIGH, max_connections: 77, track_remaining: true } ] } } }
";

async fn filters_routes_and_clusters_are_patched(sidecar: Sidecar) -> anyhow::Result<()> {
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
    let patched = async |mesh: &Mesh| -> anyhow::Result<(bool, bool, bool, bool)> {
        // A connection keeps the filters of the listener that took it.
        let client = Client::new();
        let from = mesh.instance("sleep-0")?;
        let response = ask(&client, from, "httpbin:8000", "/anything", &[]).await?;
        anyhow::ensure!(response.status == 200, "status {}", response.status);
        let teapot = ask(&client, from, "httpbin:8000", "/teapot", &[]).await?;
        let limits = client.get(&format!("{}/clusters", from.admin())).await?;
        Ok((
            response.header("x-hello") == Some("there"),
            response.header("x-host") == Some("patched"),
            teapot.status == 418,
            limits.text().contains("high_priority::max_connections::77"),
        ))
    };
    assert_eq!(patched(&mesh).await?, (false, false, false, false));
    mesh.apply("patches.yaml", PATCHES).await?;
    assert_eq!(patched(&mesh).await?, (true, true, true, true));

    // What cannot be read, and what is refused by Pilot, leaves things as they are.
    let broken = PATCHES
        .replace("name: hello }", "name: broken }")
        .replace("lua.v3.Lua", "nobody.v3.Knows")
        .replace("max_connections: 77", "max_connexions: 78");
    mesh.apply("broken.yaml", &broken).await?;
    let (hello, host, teapot, limits) = patched(&mesh).await?;
    assert!(hello && host && teapot && limits);
    let generation = mesh.generation().await?.to_string();
    assert!(
        generation.contains("broken.yaml:") && generation.contains("the patch is NOT applied"),
        "{generation}"
    );

    mesh.delete("broken.yaml").await?;
    mesh.delete("patches.yaml").await?;
    eventually(Duration::from_secs(5), async || {
        let left = patched(&mesh).await?;
        anyhow::ensure!(left == (false, false, false, false), "{left:?}");
        Ok(())
    })
    .await
}
