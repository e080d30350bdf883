//! A19, A22, A28–A30: which rules and which services a workload sees, inside the mesh and beyond it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use e2e::{app, http::Client, mesh::Mesh, workload::Workload};

use super::support::{Sidecar, add_sleep, ask, empty, eventually, on_both};

on_both!(
    a22_a_sidecar_sees_what_its_egress_says,
    a28_a29_a30_what_lies_beyond_the_mesh_is_named_first,
);

/// An instance of `name` in `namespace` that answers on port 8000, and its service.
async fn add_service(mesh: &mut Mesh, name: &str, namespace: &str) -> anyhow::Result<app::App> {
    let mut workload = Workload::new(name, &[("app", name)], 8000);
    workload.namespace = namespace.to_owned();
    let instance = mesh.add(workload, false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let app = app::httpbin(address, "v1").await?;
    mesh.ready().await?;
    let service = format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: {namespace} }}
spec:
  selector: {{ app: {name} }}
  ports: [{{ name: http, port: 8000 }}]
"
    );
    mesh.apply(&format!("{name}.yaml"), &service).await?;
    Ok(app)
}

#[tokio::test]
async fn a19_two_virtual_services_of_one_host_are_merged_in_order() -> anyhow::Result<()> {
    let (mut mesh, client) = empty().await?;
    let _httpbin = add_service(&mut mesh, "httpbin", "default").await?;
    let gateway = "apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata: { name: gateway }
spec:
  selector: { istio: ingressgateway }
  servers:
  - port: { number: 80, name: http, protocol: HTTP }
    hosts: [\"httpbin.example.com\"]
";
    let routes = |name: &str, created: &str, answer: u16, prefix: &str| {
        format!(
            "---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: {name}, creationTimestamp: \"{created}\" }}
spec:
  hosts: [httpbin.example.com]
  gateways: [gateway]
  http:
  - match: [{{ uri: {{ prefix: /same }} }}, {{ uri: {{ prefix: {prefix} }} }}]
    rewrite: {{ uri: /status/{answer} }}
    route: [{{ destination: {{ host: httpbin, port: {{ number: 8000 }} }} }}]
"
        )
    };
    // The older one's routes come first, whatever the names and the order in the file.
    let yaml = [
        gateway.to_owned(),
        routes("a-younger", "2024-02-01T00:00:00Z", 418, "/younger"),
        routes("z-older", "2024-01-01T00:00:00Z", 202, "/older"),
    ];
    mesh.apply("routes.yaml", &yaml.concat()).await?;
    let url = mesh.gateway_url();
    for (path, expected) in [("/same", 202), ("/older", 202), ("/younger", 418)] {
        let headers = [("host", "httpbin.example.com")];
        let response = client.get_with(&format!("{url}{path}"), &headers).await?;
        assert_eq!(response.status, expected, "{path}: {}", response.text());
    }
    Ok(())
}

async fn a22_a_sidecar_sees_what_its_egress_says(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    add_sleep(&mut mesh)?;
    let _near = add_service(&mut mesh, "near", "default").await?;
    let _far = add_service(&mut mesh, "far", "ns2").await?;
    let from = mesh.instance("sleep-0")?;
    let (near, far) = ("near:8000", "far.ns2:8000");
    for host in [near, far] {
        let response = ask(&client, from, host, "/anything", &[]).await?;
        assert_eq!(response.status, 200, "{host}");
    }
    let scope = "apiVersion: networking.istio.io/v1alpha3
kind: Sidecar
metadata: { name: default, namespace: default }
spec:
  egress:
  - hosts: [\"./*\", \"istio-system/*\"]
";
    mesh.apply("sidecar.yaml", scope).await?;
    let from = mesh.instance("sleep-0")?;
    eventually(Duration::from_secs(5), async || {
        let status = ask(&client, from, far, "/anything", &[]).await?.status;
        anyhow::ensure!(
            status == 502,
            "status {status}: nobody is known of that name"
        );
        Ok(())
    })
    .await?;
    assert_eq!(
        ask(&client, from, near, "/anything", &[]).await?.status,
        200
    );
    // What is gone is kept for requests that are under way.
    eventually(Duration::from_secs(15), async || {
        let url = format!("{}/clusters", from.admin());
        let clusters = client.get(&url).await?.text();
        anyhow::ensure!(
            clusters.contains("near.default.svc.cluster.local") && !clusters.contains("ns2"),
            "{clusters}"
        );
        Ok(())
    })
    .await?;
    Ok(())
}

async fn a28_a29_a30_what_lies_beyond_the_mesh_is_named_first(
    sidecar: Sidecar,
) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    add_sleep(&mut mesh)?;
    mesh.ready().await?;
    // Somebody's server that is not part of the mesh.
    let server = app::httpbin(SocketAddr::from(([127, 0, 0, 1], 0)), "outside").await?;
    let (outside, port) = (server.address.ip(), server.address.port());
    let host = "api.example.com";
    let from = mesh.instance("sleep-0")?;
    assert_eq!(
        ask(&client, from, host, "/status/200", &[]).await?.status,
        502
    );
    eventually(Duration::from_secs(15), async || {
        let log = from.sidecar_output();
        let line = log.lines().find(|line| line.contains("/status/200"));
        anyhow::ensure!(
            line.is_some_and(|line| line.contains("block_all")),
            "{line:?}"
        );
        Ok(())
    })
    .await?;
    assert_eq!(server.count(), 0);

    let entry = format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {{ name: api }}
spec:
  hosts: [api.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{ number: 80, name: http, protocol: HTTP }}]
  endpoints: [{{ address: {outside}, ports: {{ http: {port} }} }}]
"
    );
    mesh.apply("api.yaml", &entry).await?;
    let from = mesh.instance("sleep-0")?;
    let response = ask(&client, from, host, "/headers", &[]).await?;
    assert_eq!(response.json()?["version"], "outside");
    eventually(Duration::from_secs(15), async || {
        let log = from.sidecar_output();
        let line = log.lines().find(|line| line.contains("/headers"));
        anyhow::ensure!(
            line.is_some_and(|line| line.contains("outbound|80||api.example.com")),
            "{line:?}"
        );
        Ok(())
    })
    .await?;

    let timeout = "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: api }
spec:
  hosts: [api.example.com]
  http:
  - timeout: 1s
    route: [{ destination: { host: api.example.com } }]
";
    mesh.apply("timeout.yaml", timeout).await?;
    let from = mesh.instance("sleep-0")?;
    let started = Instant::now();
    let response = ask(&client, from, host, "/delay/3", &[]).await?;
    let took = started.elapsed();
    assert_eq!(response.status, 504, "{}", response.text());
    assert!(
        (Duration::from_millis(990)..Duration::from_millis(1900)).contains(&took),
        "{took:?}"
    );
    Ok(())
}
