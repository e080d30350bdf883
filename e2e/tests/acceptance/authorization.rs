//! AuthorizationPolicies on both data planes: who may call whom, by the identity in the certificate.

use super::support::{Sidecar, ask, bookinfo, eventually, on_both};
use std::time::Duration;

on_both!(a_policy_lets_in_whom_it_names_and_nobody_else);

/// Nobody is let in anywhere in the namespace.
const NOBODY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: nobody, namespace: default }
spec: {}
";

/// `productpage` may read details, but not one of them.
const PRODUCTPAGE: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: productpage, namespace: default }
spec:
  selector: { matchLabels: { app: details } }
  rules:
  - from: [{ source: { principals: ["cluster.local/ns/default/sa/bookinfo-productpage"] } }]
    to: [{ operation: { methods: [GET], paths: ["/details/*"] } }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: secret, namespace: default }
spec:
  selector: { matchLabels: { app: details } }
  action: DENY
  rules:
  - to: [{ operation: { paths: ["/details/7"] } }]
"#;

async fn a_policy_lets_in_whom_it_names_and_nobody_else(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let answers = async |mesh: &e2e::mesh::Mesh, expected: [(&str, &str, u16); 4]| {
        eventually(Duration::from_secs(10), async || {
            for (from, path, status) in expected {
                let from = mesh.instance(from)?;
                let response = ask(&client, from, "details:9080", path, &[]).await?;
                anyhow::ensure!(response.status == status, "{path}: {}", response.status);
                anyhow::ensure!(
                    status != 403 || response.text() == "RBAC: access denied",
                    "{}",
                    response.text()
                );
            }
            Ok(())
        })
        .await
    };
    let (page, reviews) = ("productpage-v1-0", "reviews-v1-0");
    let asked = [
        (page, "/details/0"),
        (page, "/details/7"),
        (reviews, "/details/0"),
        (page, "/health"),
    ];
    let expect = |statuses: [u16; 4]| {
        let mut all = [("", "", 0); 4];
        for (slot, ((from, path), status)) in all.iter_mut().zip(asked.into_iter().zip(statuses)) {
            *slot = (from, path, status);
        }
        all
    };
    answers(&mesh, expect([200, 200, 200, 200])).await?;
    mesh.apply("nobody.yaml", NOBODY).await?;
    answers(&mesh, expect([403, 403, 403, 403])).await?;
    mesh.apply("productpage.yaml", PRODUCTPAGE).await?;
    answers(&mesh, expect([200, 403, 403, 403])).await?;
    mesh.delete("productpage.yaml").await?;
    mesh.delete("nobody.yaml").await?;
    answers(&mesh, expect([200, 200, 200, 200])).await
}
