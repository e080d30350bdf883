//! A24: what the ingress gateway lets in.

use std::net::SocketAddr;

use e2e::{app, workload::Workload};

use super::support::empty;

#[tokio::test]
async fn a24_the_gateway_lets_in_what_its_routes_say() -> anyhow::Result<()> {
    let (mut mesh, client) = empty().await?;
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::httpbin(address, "v1").await?;
    mesh.ready().await?;
    let yaml = r#"
apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata: { name: httpbin-gateway }
spec:
  selector: { istio: ingressgateway }
  servers:
  - port: { number: 80, name: http, protocol: HTTP }
    hosts: ["httpbin.example.com"]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: httpbin }
spec:
  hosts: ["httpbin.example.com"]
  gateways: [httpbin-gateway]
  http:
  - match: [{ uri: { prefix: /status } }, { uri: { prefix: /delay } }]
    route: [{ destination: { port: { number: 8000 }, host: httpbin } }]
"#;
    mesh.apply("httpbin.yaml", yaml).await?;
    let url = mesh.gateway_url();
    for (host, path, expected) in [
        ("httpbin.example.com", "/status/200", 200),
        ("httpbin.example.com", "/status/418", 418),
        ("httpbin.example.com", "/delay/0.1", 200),
        ("httpbin.example.com", "/headers", 404),
        ("other.example.com", "/status/200", 404),
    ] {
        let response = client
            .get_with(&format!("{url}{path}"), &[("host", host)])
            .await?;
        assert_eq!(
            response.status,
            expected,
            "{host}{path}: {}",
            response.text()
        );
    }
    Ok(())
}
