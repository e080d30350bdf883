//! A63: from plain text to mutual TLS step by step.

use std::net::SocketAddr;

use e2e::{app, http::Client, mesh::Mesh, workload::Workload};
use serde_json::Value;

use super::support::{ask, empty};

fn policy(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {{ name: default, namespace: foo }}
spec: {{ mtls: {{ mode: {mode} }} }}
"
    )
}

/// Status of the three callers, and whether httpbin saw a client certificate (`x-forwarded-client-cert`).
async fn call(mesh: &Mesh, client: &Client) -> anyhow::Result<[Option<(u16, bool)>; 3]> {
    let mut all = [None; 3];
    for (index, name) in ["sleep-foo-0", "sleep-bar-0"].into_iter().enumerate() {
        let from = mesh.instance(name)?;
        let response = ask(client, from, "httpbin.foo:8000", "/headers", &[]).await?;
        all[index] = Some((response.status, certified(&response)));
    }
    // The third caller has no sidecar: it goes straight to the workload's address.
    let to = mesh.instance("httpbin-0")?.address.ip;
    let direct = Client::new();
    all[2] = direct
        .get(&format!("http://{to}:8000/headers"))
        .await
        .ok()
        .map(|response| (response.status, certified(&response)));
    Ok(all)
}

fn certified(response: &e2e::http::Response) -> bool {
    let echo: Value = response.json().unwrap_or_default();
    echo["headers"]["x-forwarded-client-cert"]
        .as_str()
        .is_some_and(|header| header.contains("URI=spiffe://cluster.local/ns/"))
}

fn in_namespace(name: &str, namespace: &str, app: &str, port: u16) -> Workload {
    Workload {
        namespace: namespace.to_owned(),
        service_account: app.to_owned(),
        ..Workload::new(name, &[("app", app)], port)
    }
}

#[tokio::test]
async fn a63_permissive_then_mutual_then_strict() -> anyhow::Result<()> {
    let (mut mesh, client) = empty().await?;
    let instance = mesh.add(in_namespace("httpbin", "foo", "httpbin", 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::httpbin(address, "v1").await?;
    mesh.add(in_namespace("sleep-foo", "foo", "sleep", 80), false)?;
    mesh.add(in_namespace("sleep-bar", "bar", "sleep", 80), false)?;
    mesh.ready().await?;
    let service = "apiVersion: v1
kind: Service
metadata: { name: httpbin, namespace: foo }
spec:
  selector: { app: httpbin }
  ports: [{ name: http, port: 8000 }]
";
    mesh.apply("httpbin.yaml", service).await?;
    let rule = |mode: &str| {
        format!(
            "apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {{ name: httpbin, namespace: foo }}
spec:
  host: httpbin.foo.svc.cluster.local
  trafficPolicy: {{ tls: {{ mode: {mode} }} }}
"
        )
    };

    // Clients that are told to use plain text, a server that takes both.
    mesh.apply("policy.yaml", &policy("PERMISSIVE")).await?;
    mesh.apply("rule.yaml", &rule("DISABLE")).await?;
    let plain = Some((200, false));
    assert_eq!(call(&mesh, &client).await?, [plain, plain, plain]);

    mesh.apply("rule.yaml", &rule("ISTIO_MUTUAL")).await?;
    let mutual = Some((200, true));
    assert_eq!(call(&mesh, &client).await?, [mutual, mutual, plain]);

    mesh.apply("policy.yaml", &policy("STRICT")).await?;
    // A plain-text caller gets no HTTP answer at all.
    assert_eq!(call(&mesh, &client).await?, [mutual, mutual, None]);

    // Without any rule, clients find out by themselves.
    mesh.delete("rule.yaml").await?;
    assert_eq!(call(&mesh, &client).await?, [mutual, mutual, None]);
    Ok(())
}
