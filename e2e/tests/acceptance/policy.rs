//! A35, A41, A42, A44, A46, A49, A50: what Mixer decides, and what happens without it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{app, mesh::Mesh, mesh::Options, samples, workload::Workload};
use http_body_util::Full;

use super::{
    routing::{ALL_RULES, reviews_to},
    support::{Sidecar, Stars, add_sleep, ask, bookinfo, eventually, on_both, page, stars, stat},
};

on_both!(
    a35_quota_is_exact,
    a41_denier_on_reviews_v3,
    a42_denier_by_header_in_the_mesh_and_at_the_ingress,
    a44_addresses_that_may_come_in,
    a46_what_an_adapter_finds_goes_into_headers,
    a49_each_rule_has_its_own_fail_policy,
);

/// Two requests of productpage per five seconds; everybody else has plenty.
const QUOTA: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: memquota
metadata: { name: handler, namespace: istio-system }
spec:
  quotas:
  - name: requestcount.quota.istio-system
    maxAmount: 500
    validDuration: 1s
    overrides:
    - dimensions: { destination: productpage }
      maxAmount: 2
      validDuration: 5s
---
apiVersion: config.istio.io/v1alpha2
kind: quota
metadata: { name: requestcount, namespace: istio-system }
spec:
  dimensions:
    source: request.headers["x-forwarded-for"] | "unknown"
    destination: destination.labels["app"] | destination.service.name | "unknown"
    destinationVersion: destination.labels["version"] | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: { name: request-count, namespace: istio-system }
spec:
  rules: [{ quotas: [{ charge: 1, quota: requestcount }] }]
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpecBinding
metadata: { name: request-count, namespace: istio-system }
spec:
  quotaSpecs: [{ name: request-count, namespace: istio-system }]
  services: [{ name: productpage, namespace: default }]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: quota, namespace: istio-system }
spec:
  actions:
  - handler: handler.memquota
    instances: [requestcount.quota]
"#;

async fn a35_quota_is_exact(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    // Connections that are open already are charged as well.
    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    mesh.apply("quota.yaml", QUOTA).await?;
    for round in 0..2 {
        let started = Instant::now();
        let mut allowed = 0;
        for _ in 0..10 {
            let response = page(&client, &mesh, None).await?;
            match response.status {
                200 => allowed += 1,
                429 => assert_eq!(
                    response.text(),
                    "RESOURCE_EXHAUSTED:Quota is exhausted for: requestcount"
                ),
                other => panic!("status {other}: {}", response.text()),
            }
        }
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "the machine is too slow for this row"
        );
        assert_eq!(allowed, 2, "round {round}");
        // The window is what is tested, so this waits by the clock.
        tokio::time::sleep(Duration::from_millis(5200)).await;
    }
    Ok(())
}

async fn a41_denier_on_reviews_v3(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let deny = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: denyreviewsv3handler }
spec:
  compiledAdapter: denier
  params: { status: { code: 7, message: Not allowed } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: denyreviewsv3request }
spec: { compiledTemplate: checknothing }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: denyreviewsv3 }
spec:
  match: destination.labels["app"] == "ratings" && source.labels["app"] == "reviews" && source.labels["version"] == "v3"
  actions:
  - handler: denyreviewsv3handler
    instances: [denyreviewsv3request]
"#;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Red);
    mesh.apply("deny.yaml", deny).await?;
    // A proxy may use what it was told for one second more.
    eventually(Duration::from_millis(1200), async || {
        let text = page(&client, &mesh, None).await?.text();
        anyhow::ensure!(
            text.contains("Ratings service is currently unavailable"),
            "{text}"
        );
        Ok(())
    })
    .await?;
    let from = mesh.instance("reviews-v3-0")?;
    let refused = ask(&client, from, "ratings:9080", "/ratings/0", &[]).await?;
    assert_eq!(refused.status, 403);
    let text = refused.text();
    assert!(
        text.starts_with("PERMISSION_DENIED:denyreviewsv3handler."),
        "{text}"
    );
    assert!(text.ends_with(":Not allowed"), "{text}");
    let from = mesh.instance("reviews-v2-0")?;
    assert_eq!(
        ask(&client, from, "ratings:9080", "/ratings/0", &[])
            .await?
            .status,
        200
    );
    Ok(())
}

pub(crate) const DENY_JOHN: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: denyjohn, namespace: istio-system }
spec:
  compiledAdapter: denier
  params: { status: { code: 7, message: "" } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: denyjohnrequest, namespace: istio-system }
spec: { compiledTemplate: checknothing }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: denyjohn, namespace: istio-system }
spec:
  match: request.headers["x-user"] == "john"
  actions:
  - handler: denyjohn
    instances: [denyjohnrequest]
"#;

async fn a42_denier_by_header_in_the_mesh_and_at_the_ingress(
    sidecar: Sidecar,
) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    mesh.apply("deny.yaml", DENY_JOHN).await?;
    let url = format!("{}/productpage", mesh.gateway_url());
    let from = mesh.instance("productpage-v1-0")?;
    for (user, expected) in [("john", 403), ("testuser", 200)] {
        let headers = [("x-user", user)];
        let inside = ask(&client, from, "details:9080", "/details/0", &headers).await?;
        assert_eq!(inside.status, expected, "in the mesh: {}", inside.text());
        let outside = client.get_with(&url, &headers).await?;
        assert_eq!(
            outside.status,
            expected,
            "at the ingress: {}",
            outside.text()
        );
    }
    // No header at all: the attribute is absent, which must not let anything slip or break.
    assert_eq!(client.get(&url).await?.status, 200);
    Ok(())
}

/// Lets in at the ingress who comes from 10.57.0.0/16.
const WHITELIST: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: whitelistip, namespace: istio-system }
spec:
  compiledAdapter: listchecker
  params: { blacklist: false, overrides: ["10.57.0.0/16"], entryType: IP_ADDRESSES }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: sourceip, namespace: istio-system }
spec:
  compiledTemplate: listentry
  params: { value: source.ip | ip("0.0.0.0") }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: checkip, namespace: istio-system }
spec:
  match: source.labels["istio"] == "ingressgateway"
  actions:
  - handler: whitelistip
    instances: [sourceip]
"#;

async fn a44_addresses_that_may_come_in(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    assert_eq!(page(&client, &mesh, None).await?.status, 200);
    mesh.apply("whitelist.yaml", WHITELIST).await?;
    eventually(Duration::from_millis(1200), async || {
        let refused = page(&client, &mesh, None).await?;
        anyhow::ensure!(refused.status == 403, "status {}", refused.status);
        let text = refused.text();
        anyhow::ensure!(
            text.starts_with("PERMISSION_DENIED:whitelistip.")
                && text.ends_with(" is not whitelisted"),
            "{text}"
        );
        Ok(())
    })
    .await?;
    // Who is not the ingress is not concerned.
    let from = mesh.instance("productpage-v1-0")?;
    let inside = ask(&client, from, "details:9080", "/details/0", &[]).await?;
    assert_eq!(inside.status, 200, "{}", inside.text());

    let loopback = WHITELIST.replace("10.57.0.0/16", "127.0.0.0/8");
    mesh.apply("whitelist.yaml", &loopback).await?;
    eventually(Duration::from_millis(1200), async || {
        let status = page(&client, &mesh, None).await?.status;
        anyhow::ensure!(status == 200, "status {status}");
        Ok(())
    })
    .await
}

/// The adapter that knows who is in which group.
const GROUPS: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: keyval, namespace: istio-system }
spec: { compiledAdapter: keyval, params: { table: { jason: admin } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: keyval, namespace: istio-system }
spec: { compiledTemplate: keyval, params: { key: 'request.headers["user"] | ""' } }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: keyval, namespace: istio-system }
spec:
  match: destination.labels["app"] == "echo" && (context.reporter.kind | "inbound") == "inbound"
  actions: [{ handler: keyval, instances: [keyval], name: x }]
  requestHeaderOperations:
  - { name: user-group, values: [x.output.value] }
  - { name: user, values: ['"known"'], operation: APPEND }
  - { name: secret, operation: REMOVE }
  responseHeaderOperations:
  - { name: group, values: [x.output.value] }
"#;

async fn a46_what_an_adapter_finds_goes_into_headers(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let mut mesh = Mesh::start(options).await?;
    let client = e2e::http::Client::new();
    add_sleep(&mut mesh)?;
    let instance = mesh.add(Workload::new("echo", &[("app", "echo")], 8000), false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let _app = app::serve(address, |_, request| async move {
        let header = |name: &str| {
            // On one line or on several is the same (RFC 9110 §5.2).
            let all = request.headers().get_all(name).iter();
            let all: Vec<_> = all.filter_map(|value| value.to_str().ok()).collect();
            format!("{name}={}", all.join(","))
        };
        let told = ["user-group", "user", "secret", "x-istio-attributes"].map(header);
        http::Response::new(Full::new(Bytes::from(told.join(" "))))
    })
    .await?;
    mesh.ready().await?;
    let service = "apiVersion: v1
kind: Service
metadata: { name: echo }
spec: { selector: { app: echo }, ports: [{ name: http, port: 8000 }] }
";
    mesh.apply("echo.yaml", service).await?;
    mesh.apply("groups.yaml", GROUPS).await?;
    let from = mesh.instance("sleep-0")?;
    let send = async |user: &str| {
        let headers = [("user", user), ("secret", "1"), ("x-istio-attributes", "!")];
        ask(&client, from, "echo:8000", "/headers", &headers).await
    };
    let known = eventually(Duration::from_secs(5), async || {
        let known = send("jason").await?;
        anyhow::ensure!(known.status == 200, "{}: {}", known.status, known.text());
        anyhow::ensure!(known.text().contains("admin"), "{}", known.text());
        Ok(known)
    })
    .await?;
    assert_eq!(
        known.text(),
        "user-group=admin user=jason,known secret= x-istio-attributes="
    );
    assert_eq!(known.header("group"), Some("admin"));
    let unknown = send("nobody").await?;
    assert_eq!(unknown.status, 404, "{}", unknown.text());
    assert!(
        unknown
            .text()
            .starts_with("NOT_FOUND:keyval.handler.istio-system:"),
        "{}",
        unknown.text()
    );
    Ok(())
}

pub(crate) fn fail_open(open: bool) -> String {
    samples::MESH.replace(
        "policyCheckFailOpen: true",
        &format!("policyCheckFailOpen: {open}"),
    )
}

#[tokio::test]
async fn a49_without_mixer_the_fail_policy_decides() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let details = |mesh: &Mesh| {
        mesh.instance("productpage-v1-0")
            .map(e2e::mesh::Instance::http_proxy)
    };
    let url = format!("{}/details/0", details(&mesh)?);
    let host = [("host", "details:9080")];
    let first = client.get_with(&url, &host).await?;
    assert_eq!(first.status, 200, "{}", first.text());

    mesh.apply("mesh.yaml", &fail_open(false)).await?;
    mesh.mixer.crash()?;
    // Answers in the cache may live a second longer.
    eventually(Duration::from_secs(5), async || {
        let status = client.get_with(&url, &host).await?.status;
        anyhow::ensure!(status == 503, "status {status}");
        Ok(())
    })
    .await?;
    for _ in 0..100 {
        let response = client.get_with(&url, &host).await?;
        assert_eq!(response.status, 503);
        assert!(
            response.text().starts_with("UNAVAILABLE"),
            "{}",
            response.text()
        );
    }
    mesh.mixer.restart()?;
    eventually(Duration::from_secs(15), async || {
        let status = client.get_with(&url, &host).await?.status;
        anyhow::ensure!(status == 200, "status {status} after Mixer came back");
        Ok(())
    })
    .await?;

    mesh.apply("mesh.yaml", &fail_open(true)).await?;
    mesh.mixer.crash()?;
    let mut slowest = Duration::ZERO;
    for _ in 0..100 {
        let started = Instant::now();
        let response = client.get_with(&url, &host).await?;
        slowest = slowest.max(started.elapsed());
        assert_eq!(response.status, 200, "{}", response.text());
    }
    assert!(
        slowest < Duration::from_millis(500),
        "a request waited {slowest:?} for Mixer"
    );
    mesh.mixer.restart()
}

/// A rule for one service with its own word on what happens without Mixer.
fn rule_for(service: &str, fail_mode: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata:
  name: {service}-needs-policy
  annotations: {{ policy.istio.io/fail-mode: {fail_mode} }}
spec:
  match: destination.service.name == "{service}" && request.headers["x-user"] == "john"
  actions:
  - handler: denyjohn.handler.istio-system
    instances: [denyjohnrequest.instance.istio-system]
---"#
    )
}

async fn a49_each_rule_has_its_own_fail_policy(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.everywhere() else {
        return Ok(());
    };
    let (mut mesh, client) = bookinfo(options).await?;
    let rules = [rule_for("details", "closed"), rule_for("ratings", "open")].concat();
    for (mesh_open, services) in [
        (true, [("details", 503), ("ratings", 200), ("reviews", 200)]),
        (
            false,
            [("details", 503), ("ratings", 200), ("reviews", 503)],
        ),
    ] {
        if !mesh_open {
            mesh.apply("mesh.yaml", &fail_open(mesh_open)).await?;
        }
        mesh.apply("rules.yaml", &format!("{rules}{DENY_JOHN}"))
            .await?;
        mesh.mixer.crash()?;
        for (service, expected) in services {
            let from = mesh.instance("productpage-v1-0")?;
            let (host, path) = (format!("{service}:9080"), format!("/{service}/0"));
            eventually(Duration::from_secs(5), async || {
                let status = ask(&client, from, &host, &path, &[]).await?.status;
                anyhow::ensure!(status == expected, "{service} answers {status}");
                Ok(())
            })
            .await?;
        }
        mesh.mixer.restart()?;
        mesh.delete("rules.yaml").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a50_verdicts_are_cached_and_dropped_when_rules_change() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let from = mesh.instance("productpage-v1-0")?;
    let server = mesh.instance("details-v1-0")?.admin();
    let check = |_: u32| {
        ask(
            &client,
            from,
            "details:9080",
            "/details/0",
            &[("x-user", "john")],
        )
    };
    assert_eq!(check(0).await?.status, 200);
    let remote = "mixer.http.remote_check_calls";
    let before = stat(&client, &server, remote).await?;
    for number in 0..1000 {
        assert_eq!(check(number).await?.status, 200);
    }
    let calls = stat(&client, &server, remote).await? - before;
    assert!(calls <= 20, "{calls} of 1000 checks went to Mixer");

    let from = from.http_proxy();
    mesh.apply("deny.yaml", DENY_JOHN).await?;
    let changed = Instant::now();
    let url = format!("{from}/details/0");
    let headers = [("host", "details:9080"), ("x-user", "john")];
    eventually(Duration::from_secs(3), async || {
        let status = client.get_with(&url, &headers).await?.status;
        anyhow::ensure!(status == 403, "status {status}");
        Ok(())
    })
    .await?;
    let took = changed.elapsed();
    assert!(
        took <= Duration::from_millis(1200),
        "effective after {took:?}"
    );

    let before = stat(&client, &server, remote).await?;
    for _ in 0..1000 {
        assert_eq!(client.get_with(&url, &headers).await?.status, 403);
    }
    let calls = stat(&client, &server, remote).await? - before;
    assert!(calls <= 20, "{calls} of 1000 denied checks went to Mixer");
    Ok(())
}
