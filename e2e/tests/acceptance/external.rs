//! AuthorizationPolicies of action CUSTOM on both data planes: a service of the mesh's configuration is asked.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use e2e::{app, http::Client, mesh::Mesh, samples, workload::Workload};
use http_body_util::Full;

use super::support::{Sidecar, add_sleep, ask, eventually, on_both};

on_both!(a_provider_is_asked_about_what_a_policy_names);

/// `asked` answers over HTTP, `mixer` over gRPC; nobody serves `gone`.
const PROVIDERS: &str = r#"    extensionProviders:
    - name: asked
      envoyExtAuthzHttp:
        service: asked.test
        port: 80
        pathPrefix: /check
        timeout: 5s
        includeRequestHeadersInCheck: [x-ticket]
        includeAdditionalHeadersInCheck: { x-mesh: bookinfo }
        headersToUpstreamOnAllow: [x-who]
        headersToDownstreamOnDeny: [x-why]
    - name: mixer
      envoyExtAuthzGrpc: { service: mixer.istio-system.svc.cluster.local, port: 15004, timeout: 5s }
    - name: gone
      envoyExtAuthzHttp: { service: gone.test, port: 80, failOpen: true }
"#;

type Headers<'a> = &'a [(&'a str, &'a str)];

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec: { selector: { app: httpbin }, ports: [{ name: http, port: 8000 }] }
";

fn policy(name: &str, provider: &str, path: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: {name}, namespace: default }}
spec:
  selector: {{ matchLabels: {{ app: httpbin }} }}
  action: CUSTOM
  provider: {{ name: {provider} }}
  rules: [{{ to: [{{ operation: {{ paths: ['{path}'] }} }}] }}]
---
"
    )
}

async fn a_provider_is_asked_about_what_a_policy_names(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::httpbin(address, "v1").await?;
    add_sleep(&mut mesh)?;
    // Lets in who has a ticket; says what it was asked.
    let outside = SocketAddr::from((mesh.block().outside(0), 0));
    let provider = app::serve(outside, |_, request| {
        let has = |name: &str, value: &str| {
            request
                .headers()
                .get(name)
                .is_some_and(|found| found == value)
        };
        let good = has("x-ticket", "good")
            && has("x-mesh", "bookinfo")
            && request.uri().path().starts_with("/check/")
            && !request.headers().contains_key("x-secret");
        let answer = http::Response::builder()
            .status(if good { 200 } else { 403 })
            .header("x-who", "joe")
            .header("x-why", "no-ticket")
            .body(Full::new(Bytes::from_static(b"who are you?")))
            .unwrap_or_default();
        async move { answer }
    })
    .await?;
    let entry = format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{ name: asked, namespace: default }}
spec:
  hosts: [asked.test]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{ number: 80, name: http, protocol: HTTP }}]
  endpoints: [{{ address: {}, ports: {{ http: {} }} }}]
",
        provider.address.ip(),
        provider.address.port()
    );
    mesh.apply("httpbin.yaml", SERVICE).await?;
    mesh.apply("asked.yaml", &entry).await?;
    let settings = samples::MESH.trim_end();
    mesh.apply("mesh.yaml", &format!("{settings}\n{PROVIDERS}"))
        .await?;
    mesh.ready().await?;

    let policies = policy("http", "asked", "/anything/*")
        + &policy("grpc", "mixer", "/headers")
        + &policy("gone", "gone", "/gone")
        + &policy("unknown", "somebody", "/unknown");
    mesh.apply("policies.yaml", &policies).await?;
    let send = async |path: &str, headers: &[(&str, &str)]| {
        let from = mesh.instance("sleep-0")?;
        ask(&client, from, "httpbin:8000", path, headers).await
    };
    let good: Headers<'_> = &[("x-ticket", "good"), ("x-secret", "s"), ("x-who", "root")];
    let rows: [(&str, Headers<'_>, u16); 6] = [
        ("/anything/a", &[], 403),
        ("/anything/a", good, 200),
        ("/headers", &[], 200),
        // Nobody can be asked: refused, whatever the provider says about failures.
        ("/gone", good, 403),
        ("/unknown", good, 403),
        ("/elsewhere", &[], 200),
    ];
    eventually(Duration::from_secs(10), async || {
        for (path, headers, status) in rows {
            let response = send(path, headers).await?;
            anyhow::ensure!(
                response.status == status,
                "{path}: {}, not {status}: {}",
                response.status,
                response.text()
            );
        }
        Ok(())
    })
    .await?;
    let refused = send("/anything/a", &[]).await?;
    assert_eq!(refused.text(), "who are you?");
    assert_eq!(refused.header("x-why"), Some("no-ticket"));
    assert_eq!(refused.header("x-who"), None);
    let passed = send("/anything/a", good).await?.json()?["headers"].clone();
    assert_eq!(passed["x-who"], "joe");
    assert_eq!(passed["x-ticket"], "good");

    let before = provider.count();
    assert_eq!(send("/elsewhere", &[]).await?.status, 200);
    assert_eq!(provider.count(), before, "nobody had to be asked");
    Ok(())
}
