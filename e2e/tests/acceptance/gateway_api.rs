//! Gateway API on the local mesh: Gateways of class `istio` share the ingress gateway, routes go through it and, for a
//! Service, through sidecars.

use std::net::SocketAddr;

use e2e::{app, mesh::Mesh, workload::Workload};

use super::support::{Sidecar, ask, on_both};

const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: one }
spec:
  selector: { app: one }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: v1
kind: Service
metadata: { name: two }
spec:
  selector: { app: two }
  ports: [{ name: http, port: 8000 }]
---
"#;

const ROUTES: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: shop }
spec:
  gatewayClassName: istio
  listeners:
  - { name: http, port: 80, protocol: HTTP, hostname: "*.example.com" }
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: shop }
spec:
  parentRefs: [{ name: shop }]
  hostnames: [shop.example.com]
  rules:
  - matches: [{ path: { value: /status } }]
    backendRefs: [{ name: one, port: 8000 }]
  - matches: [{ path: { value: /status }, headers: [{ name: who, value: two }] }]
    filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: { set: [{ name: served-by, value: rule-two }] }
    backendRefs: [{ name: two, port: 8000 }]
  - matches: [{ path: { value: /old/path } }]
    filters:
    - type: URLRewrite
      urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: / } }
    backendRefs: [{ name: one, port: 8000 }]
  - matches: [{ path: { value: /moved } }]
    filters:
    - type: RequestRedirect
      requestRedirect: { statusCode: 301, path: { type: ReplacePrefixMatch, replacePrefixMatch: /status } }
  - matches: [{ path: { value: /nothing } }]
  - matches: [{ path: { value: /drained } }]
    backendRefs: [{ name: one, port: 8000, weight: 0 }]
  - matches: [{ path: { value: /missing } }]
    backendRefs: [{ name: nobody, port: 8000 }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: mesh }
spec:
  parentRefs: [{ group: "", kind: Service, name: one }]
  rules:
  - matches: [{ path: { value: /status/204 } }]
    filters:
    - type: ResponseHeaderModifier
      responseHeaderModifier: { set: [{ name: served-by, value: mesh-rule }] }
    backendRefs: [{ name: two, port: 8000 }]
  - backendRefs: [{ name: one, port: 8000 }]
"#;

/// Two applications that answer alike behind Services of two names.
async fn two(mesh: &mut Mesh) -> anyhow::Result<Vec<app::App>> {
    let mut apps = Vec::new();
    for name in ["one", "two"] {
        let instance = mesh.add(Workload::new(name, &[("app", name)], 8000), false)?;
        let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
        apps.push(app::httpbin(address, name).await?);
    }
    mesh.ready().await?;
    Ok(apps)
}

async fn gateway_api_routes_requests(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let mut mesh = Mesh::start(options).await?;
    let client = e2e::http::Client::new();
    let _apps = two(&mut mesh).await?;
    mesh.apply("shop.yaml", &format!("{SERVICES}{ROUTES}"))
        .await?;
    let url = mesh.gateway_url();
    let shop = ("host", "shop.example.com");
    for (headers, path, status, header) in [
        (&[shop][..], "/status/200", 200, None),
        // A prefix is whole segments.
        (&[shop], "/statusX", 404, None),
        // More specific, though it comes later.
        (
            &[shop, ("who", "two")],
            "/status/200",
            200,
            Some(("served-by", "rule-two")),
        ),
        (&[shop], "/old/path/status/418", 418, None),
        (
            &[shop],
            "/moved/201",
            301,
            Some(("location", "http://shop.example.com/status/201")),
        ),
        (&[shop], "/nothing", 404, None),
        (&[shop], "/drained", 500, None),
        (&[shop], "/missing", 500, None),
        (&[("host", "other.example.com")], "/status/200", 404, None),
        (&[("host", "shop.example.org")], "/status/200", 404, None),
    ] {
        let response = client.get_with(&format!("{url}{path}"), headers).await?;
        assert_eq!(
            response.status,
            status,
            "{headers:?} {path}: {}",
            response.text()
        );
        if let Some((name, expected)) = header {
            let got = response.header(name).unwrap_or_default();
            assert_eq!(got, expected, "{path}: {name}");
        }
    }

    // Another workload calls the Service, through its own sidecar.
    let caller = mesh.instance("two-0")?;
    for (path, served_by) in [("/status/204", Some("mesh-rule")), ("/status/200", None)] {
        let response = ask(&client, caller, "one:8000", path, &[]).await?;
        assert_eq!(response.header("served-by"), served_by, "{path}");
    }

    // What is wrong is said with its place.
    let status = client
        .get(&format!("{}/debug/push_status", mesh.pilot_url()))
        .await?;
    let text = status.text();
    assert!(
        text.contains("backend(nobody.default.svc.cluster.local) not found"),
        "{text}"
    );
    Ok(())
}

on_both!(gateway_api_routes_requests);
