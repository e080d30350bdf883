//! A39, A46, A47: quota in Redis, and what a check finds out in the headers of requests. Roles, from Pilot to Mixer.

use std::{net::SocketAddr, time::Duration};

use e2e::{
    app,
    http::Client,
    mesh::{Mesh, Options},
    workload::Workload,
};

use super::{
    redis::Redis,
    support::{Sidecar, ask, bookinfo, eventually, on_both},
};

on_both!(
    a39_without_redis_the_rules_fail_policy_decides,
    a46_a47_what_a_check_finds_goes_into_headers_and_the_path,
);

fn quota(port: u16, fail_mode: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: redisquota
metadata: {{ name: handler, namespace: istio-system }}
spec:
  redisServerUrl: 127.0.0.1:{port}
  quotas: [ {{ name: requestcount.quota.istio-system, maxAmount: 2, validDuration: 600s }} ]
---
apiVersion: config.istio.io/v1alpha2
kind: quota
metadata: {{ name: requestcount, namespace: istio-system }}
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: {{ name: request-count, namespace: istio-system }}
spec: {{ rules: [ {{ quotas: [ {{ charge: 1, quota: requestcount }} ] }} ] }}
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpecBinding
metadata: {{ name: request-count, namespace: istio-system }}
spec:
  quotaSpecs: [ {{ name: request-count, namespace: istio-system }} ]
  services: [ {{ name: details, namespace: default }} ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata:
  name: quota
  namespace: istio-system
  annotations: {{ policy.istio.io/fail-mode: {fail_mode}, policy.istio.io/rate-limit-headers: "true" }}
spec:
  match: destination.service.name == "details"
  actions: [ {{ handler: handler.redisquota, instances: [ requestcount.quota ] }} ]
"#
    )
}

async fn a39_without_redis_the_rules_fail_policy_decides(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let (redis, port) = Redis::start()?;
    mesh.apply("quota.yaml", &quota(port, "closed")).await?;
    let mut outcomes = Vec::new();
    for _ in 0..5 {
        let from = mesh.instance("productpage-v1-0")?;
        let response = ask(&client, from, "details:9080", "/details/0", &[]).await?;
        let header = |name| response.header(name).unwrap_or("-").to_owned();
        outcomes.push((
            response.status,
            header("ratelimit-remaining"),
            header("retry-after") != "-",
        ));
        assert_eq!(header("ratelimit-limit"), "2", "{}", response.text());
    }
    let want = [
        (200, "1", false),
        (200, "0", false),
        (429, "0", true),
        (429, "0", true),
        (429, "0", true),
    ];
    assert_eq!(
        outcomes,
        want.map(|(s, left, retry)| (s, left.to_owned(), retry))
    );

    drop(redis);
    for (fail_mode, expected) in [("closed", 503), ("open", 200)] {
        if fail_mode == "open" {
            mesh.apply("quota.yaml", &quota(port, fail_mode)).await?;
        }
        for _ in 0..50 {
            let from = mesh.instance("productpage-v1-0")?;
            let response = ask(&client, from, "details:9080", "/details/0", &[]).await?;
            assert_eq!(response.status, expected, "{}", response.text());
            if expected == 503 {
                let text = response.text();
                assert!(
                    text.starts_with("UNAVAILABLE:handler.redisquota."),
                    "{text}"
                );
            }
        }
    }
    Ok(())
}

async fn a46_a47_what_a_check_finds_goes_into_headers_and_the_path(
    sidecar: Sidecar,
) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = (Mesh::start(options).await?, Client::new());
    let instance = mesh.add(Workload::new("httpbin", &[("app", "httpbin")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::httpbin(address, "v1").await?;
    super::support::add_sleep(&mut mesh)?;
    let service = r#"
apiVersion: v1
kind: Service
metadata: { name: httpbin }
spec:
  selector: { app: httpbin }
  ports: [ { name: http, port: 8000 } ]
---
"#;
    let rules = |operation: &str| {
        format!(
            r#"{service}
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: keyval, namespace: istio-system }}
spec: {{ compiledAdapter: keyval, params: {{ table: {{ jason: admin }} }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: keyval, namespace: istio-system }}
spec: {{ compiledTemplate: keyval, params: {{ key: 'request.headers["user"] | ""' }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: keyval, namespace: istio-system }}
spec:
  match: destination.labels["app"] == "httpbin"
  actions: [ {{ handler: keyval, instances: [ keyval ], name: x }} ]
  requestHeaderOperations: [ {operation} ]
"#
        )
    };
    mesh.apply(
        "keyval.yaml",
        &rules("{ name: user-group, values: [ x.output.value ] }"),
    )
    .await?;
    mesh.ready().await?;
    let send = async |path: &str, user: &str| {
        let from = mesh.instance("sleep-0")?;
        ask(&client, from, "httpbin:8000", path, &[("user", user)]).await
    };
    let response = send("/headers", "jason").await?;
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.json()?["headers"]["user-group"], "admin");
    let response = send("/headers", "jim").await?;
    assert_eq!(response.status, 404);
    assert!(
        response.text().starts_with("NOT_FOUND:keyval."),
        "{}",
        response.text()
    );

    mesh.apply(
        "keyval.yaml",
        &rules("{ name: \":path\", values: [ '\"/status/418\"' ] }"),
    )
    .await?;
    eventually(Duration::from_secs(5), async || {
        let from = mesh.instance("sleep-0")?;
        let headers = [("user", "jason")];
        let status = ask(&client, from, "httpbin:8000", "/headers", &headers)
            .await?
            .status;
        anyhow::ensure!(status == 418, "status {status}");
        Ok(())
    })
    .await
}

/// Policies of `rbac.istio.io` reach Mixer through Pilot, as rules do.
#[tokio::test]
async fn roles_are_enforced_and_a_change_of_them_counts_at_once() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let rules = |caller: &str| {
        format!(
            r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: rbac, namespace: istio-system }}
spec: {{ compiledAdapter: rbac }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: who, namespace: istio-system }}
spec:
  compiledTemplate: authorization
  params:
    subject:
      properties:
        app: source.labels["app"] | ""
    action:
      namespace: destination.service.namespace | ""
      service: destination.service.name | ""
      method: request.method | ""
      path: request.path | ""
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: rbac, namespace: istio-system }}
spec:
  match: destination.service.name == "details"
  actions: [ {{ handler: rbac, instances: [ who ] }} ]
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {{ name: details-viewer, namespace: default }}
spec: {{ rules: [ {{ services: [ details ], methods: [ GET ], paths: [ "/details/*" ] }} ] }}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {{ name: details-viewer, namespace: default }}
spec:
  subjects: [ {{ properties: {{ app: {caller} }} }} ]
  roleRef: {{ kind: ServiceRole, name: details-viewer }}
"#
        )
    };
    for (allowed, denied) in [("productpage", "reviews"), ("reviews", "productpage")] {
        mesh.apply("rbac.yaml", &rules(allowed)).await?;
        for (app, expected) in [(allowed, 200), (denied, 403)] {
            // A proxy learns of the change with its next answer, at most a second later.
            eventually(Duration::from_millis(1500), async || {
                let name = if app == "reviews" {
                    "reviews-v2-0"
                } else {
                    "productpage-v1-0"
                };
                let from = mesh.instance(name)?;
                let response = ask(&client, from, "details:9080", "/details/0", &[]).await?;
                anyhow::ensure!(response.status == expected, "{app}: {}", response.text());
                if expected == 403 {
                    let text = response.text();
                    anyhow::ensure!(text.ends_with("RBAC: permission denied."), "{text}");
                }
                Ok(())
            })
            .await?;
        }
    }
    let from = mesh.instance("reviews-v2-0")?;
    let other = ask(&client, from, "details:9080", "/other", &[]).await?;
    assert_eq!(other.status, 403, "{}", other.text());
    Ok(())
}
