//! A01–A04 and A07–A12: where requests go, how long they may take, and what is broken on purpose.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{app, mesh::Mesh, workload::Workload};
use http_body_util::Full;

use super::support::{
    Sidecar, Stars, add_sleep, ask, assert_share, bookinfo, eventually, on_both, page, stars, stat,
};

pub(crate) const ALL_RULES: &str = r"
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: productpage }
spec:
  host: productpage
  subsets: [{ name: v1, labels: { version: v1 } }]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: reviews }
spec:
  host: reviews
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 } }
  - { name: v3, labels: { version: v3 } }
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: ratings }
spec:
  host: ratings
  subsets: [{ name: v1, labels: { version: v1 } }]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: details }
spec:
  host: details
  subsets: [{ name: v1, labels: { version: v1 } }]
";

pub(crate) const ALL_V1: &str = r"
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: productpage }
spec:
  hosts: [productpage]
  http: [{ route: [{ destination: { host: productpage, subset: v1 } }] }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: reviews }
spec:
  hosts: [reviews]
  http: [{ route: [{ destination: { host: reviews, subset: v1 } }] }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: ratings }
spec:
  hosts: [ratings]
  http: [{ route: [{ destination: { host: ratings, subset: v1 } }] }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: details }
spec:
  hosts: [details]
  http: [{ route: [{ destination: { host: details, subset: v1 } }] }]
";

/// `reviews` to one subset, with more lines under the HTTP route.
pub(crate) fn reviews_to(subset: &str, more: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: reviews }}
spec:
  hosts: [reviews]
  http:
  - route: [{{ destination: {{ host: reviews, subset: {subset} }} }}]
{more}"
    )
}

/// `ratings` with a fault, for jason only or for all.
pub(crate) fn ratings_fault(fault: &str, for_jason: bool) -> String {
    let only = if for_jason {
        "    match: [{ headers: { end-user: { exact: jason } } }]\n"
    } else {
        ""
    };
    format!(
        "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: ratings }}
spec:
  hosts: [ratings]
  http:
  - route: [{{ destination: {{ host: ratings, subset: v1 }} }}]
    fault: {fault}
{only}  - route: [{{ destination: {{ host: ratings, subset: v1 }} }}]
"
    )
}

async fn routed(sidecar: Sidecar) -> anyhow::Result<Option<(Mesh, e2e::http::Client)>> {
    let Some(options) = sidecar.options() else {
        return Ok(None);
    };
    let (mut mesh, client) = bookinfo(options).await?;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    Ok(Some((mesh, client)))
}

on_both!(
    a01_every_version_is_seen_without_rules,
    a02_all_v1_shows_no_stars,
    a03_jason_goes_to_v2,
    a04_weights_are_kept,
    a07_delay_finds_the_timeout_bug,
    a08_shorter_delay_is_fine_with_v3,
    a09_abort_hides_the_ratings,
    a10_route_timeout,
    a11_timeout_by_header,
    a12_retries_hide_failures,
);

async fn a01_every_version_is_seen_without_rules(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let (mesh, client) = bookinfo(options).await?;
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        let response = page(&client, &mesh, None).await?;
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(
            response
                .text()
                .contains("<title>Simple Bookstore App</title>")
        );
        assert!(
            response.text().contains("PublisherA"),
            "{}",
            response.text()
        );
        seen.insert(stars(&response));
    }
    assert_eq!(
        seen,
        BTreeSet::from([Stars::None, Stars::Black, Stars::Red])
    );
    Ok(())
}

async fn a02_all_v1_shows_no_stars(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    mesh.apply("all-v1.yaml", ALL_V1).await?;
    for user in [None, Some("jason")] {
        for _ in 0..25 {
            let response = page(&client, &mesh, user).await?;
            assert_eq!((response.status, stars(&response)), (200, Stars::None));
        }
    }
    for (name, expected) in [("reviews-v2-0", 0), ("reviews-v3-0", 0)] {
        let admin = mesh.instance(name)?.admin();
        let count = stat(&client, &admin, "cluster.inbound|9080||.upstream_rq_total").await?;
        assert_eq!(count, expected, "{name} was asked");
    }
    let admin = mesh.instance("reviews-v1-0")?.admin();
    assert_eq!(
        stat(&client, &admin, "cluster.inbound|9080||.upstream_rq_total").await?,
        50
    );
    Ok(())
}

async fn a03_jason_goes_to_v2(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    mesh.apply("all-v1.yaml", ALL_V1).await?;
    let jason = "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: reviews }
spec:
  hosts: [reviews]
  http:
  - match: [{ headers: { end-user: { exact: jason } } }]
    route: [{ destination: { host: reviews, subset: v2 } }]
  - route: [{ destination: { host: reviews, subset: v1 } }]
";
    // The same object in another file: take it out of the first.
    let rest: Vec<_> = ALL_V1
        .split("---\n")
        .filter(|d| !d.contains("name: reviews }"))
        .collect();
    mesh.apply("all-v1.yaml", &rest.join("---\n")).await?;
    mesh.apply("reviews.yaml", jason).await?;
    for _ in 0..20 {
        assert_eq!(
            stars(&page(&client, &mesh, Some("jason")).await?),
            Stars::Black
        );
        assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::None);
    }
    Ok(())
}

async fn a04_weights_are_kept(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    for (v1, v3) in [(50, 50), (80, 20), (90, 10)] {
        let yaml = format!(
            "apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {{ name: reviews }}
spec:
  hosts: [reviews]
  http:
  - route:
    - {{ destination: {{ host: reviews, subset: v1 }}, weight: {v1} }}
    - {{ destination: {{ host: reviews, subset: v3 }}, weight: {v3} }}
"
        );
        mesh.apply("reviews.yaml", &yaml).await?;
        let from = mesh.instance("productpage-v1-0")?;
        let mut red = 0;
        for _ in 0..1000 {
            let response = ask(&client, from, "reviews:9080", "/reviews/0", &[]).await?;
            assert_eq!(response.status, 200);
            match stars(&response) {
                Stars::Red => red += 1,
                Stars::None => {}
                Stars::Black => panic!("v2 has no weight"),
            }
        }
        assert_share(red, 1000, f64::from(v3) / 100.0);
    }
    Ok(())
}

async fn a07_delay_finds_the_timeout_bug(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    mesh.apply("reviews.yaml", &reviews_to("v2", "")).await?;
    let fault = "{ delay: { fixedDelay: 7s, percentage: { value: 100 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, true))
        .await?;
    let started = Instant::now();
    let response = page(&client, &mesh, Some("jason")).await?;
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(5950)..Duration::from_millis(6700)).contains(&took),
        "two attempts of 3 s, but it took {took:?}"
    );
    assert!(response.text().contains("Error fetching product reviews"));
    let started = Instant::now();
    assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Black);
    assert!(started.elapsed() < Duration::from_secs(1));
    Ok(())
}

async fn a08_shorter_delay_is_fine_with_v3(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    mesh.apply("reviews.yaml", &reviews_to("v3", "")).await?;
    let fault = "{ delay: { fixedDelay: 2s, percentage: { value: 100 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, true))
        .await?;
    let started = Instant::now();
    let response = page(&client, &mesh, Some("jason")).await?;
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(1990)..Duration::from_millis(2480)).contains(&took),
        "{took:?}"
    );
    assert_eq!(stars(&response), Stars::Red);
    Ok(())
}

async fn a09_abort_hides_the_ratings(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    mesh.apply("reviews.yaml", &reviews_to("v2", "")).await?;
    let fault = "{ abort: { httpStatus: 500, percentage: { value: 100 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, true))
        .await?;
    for _ in 0..50 {
        let response = page(&client, &mesh, Some("jason")).await?;
        let text = response.text();
        assert!(
            text.contains("Ratings service is currently unavailable"),
            "{text}"
        );
    }
    let instance = mesh.instance("reviews-v2-0")?;
    eventually(Duration::from_secs(15), async || {
        anyhow::ensure!(
            instance.sidecar_output().contains(" FI "),
            "no access log line has the flag FI"
        );
        Ok(())
    })
    .await?;

    let fault = "{ abort: { httpStatus: 500, percentage: { value: 50 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, true))
        .await?;
    let from = mesh.instance("reviews-v2-0")?;
    let mut aborted = 0;
    for _ in 0..400 {
        let headers = [("end-user", "jason")];
        match ask(&client, from, "ratings:9080", "/ratings/0", &headers)
            .await?
            .status
        {
            500 => aborted += 1,
            200 => {}
            other => panic!("status {other}"),
        }
    }
    assert_share(aborted, 400, 0.5);
    Ok(())
}

async fn a10_route_timeout(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    let fault = "{ delay: { fixedDelay: 2s, percentage: { value: 100 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, false))
        .await?;
    mesh.apply("reviews.yaml", &reviews_to("v2", "    timeout: 0.5s\n"))
        .await?;
    let started = Instant::now();
    let response = page(&client, &mesh, None).await?;
    let took = started.elapsed();
    assert!(
        (Duration::from_millis(990)..Duration::from_millis(1500)).contains(&took),
        "two attempts of 0.5 s, but it took {took:?}"
    );
    assert!(
        response
            .text()
            .contains("product reviews are currently unavailable")
    );
    // Envoy flushes its access log every ten seconds.
    let instance = mesh.instance("productpage-v1-0")?;
    eventually(Duration::from_secs(15), async || {
        let log = instance.sidecar_output();
        let line = log
            .lines()
            .find(|line| line.contains("/reviews/0") && line.contains(" 504 "));
        anyhow::ensure!(line.is_some_and(|line| line.contains(" UT ")), "{line:?}");
        Ok(())
    })
    .await?;
    Ok(())
}

async fn a11_timeout_by_header(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some((mut mesh, client)) = routed(sidecar).await? else {
        return Ok(());
    };
    let fault = "{ delay: { fixedDelay: 2s, percentage: { value: 100 } } }";
    mesh.apply("ratings.yaml", &ratings_fault(fault, false))
        .await?;
    mesh.apply("reviews.yaml", &reviews_to("v2", "")).await?;
    let from = mesh.instance("productpage-v1-0")?;
    let started = Instant::now();
    let headers = [("x-envoy-upstream-rq-timeout-ms", "200")];
    let response = ask(&client, from, "reviews:9080", "/reviews/0", &headers).await?;
    let took = started.elapsed();
    assert_eq!(response.status, 504, "{}", response.text());
    assert!(
        (Duration::from_millis(195)..Duration::from_millis(600)).contains(&took),
        "{took:?}"
    );
    Ok(())
}

async fn a12_retries_hide_failures(sidecar: Sidecar) -> anyhow::Result<()> {
    let Some(options) = sidecar.options() else {
        return Ok(());
    };
    let mut mesh = Mesh::start(options).await?;
    let client = e2e::http::Client::new();
    add_sleep(&mut mesh)?;
    let flaky = Workload::new("flaky", &[("app", "flaky")], 8000);
    let instance = mesh.add(flaky, false)?;
    let address = SocketAddr::from((instance.address.ip, instance.workload.app_port(8000)));
    let attempts = std::sync::Arc::new(AtomicU64::new(0));
    let counted = attempts.clone();
    let _app = app::serve(address, move |_, _| {
        // Two of three fail.
        let number = counted.fetch_add(1, Ordering::SeqCst);
        async move {
            let status = if number % 3 == 2 { 200 } else { 503 };
            http::Response::builder()
                .status(status)
                .body(Full::new(Bytes::from_static(b"x")))
                .unwrap()
        }
    })
    .await?;
    mesh.ready().await?;
    let yaml = "apiVersion: v1
kind: Service
metadata: { name: flaky }
spec:
  selector: { app: flaky }
  ports: [{ name: http, port: 8000 }]
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: flaky }
spec:
  hosts: [flaky]
  http:
  - route: [{ destination: { host: flaky } }]
    retries: { attempts: 3, perTryTimeout: 1s, retryOn: 5xx }
";
    mesh.apply("flaky.yaml", yaml).await?;
    let from = mesh.instance("sleep-0")?;
    for _ in 0..100 {
        let response = ask(&client, from, "flaky:8000", "/", &[]).await?;
        assert_eq!(response.status, 200);
    }
    let name = "cluster.outbound|8000||flaky.default.svc.cluster.local.upstream_rq_retry";
    assert_eq!(stat(&client, &from.admin(), name).await?, 200);
    assert_eq!(attempts.load(Ordering::SeqCst), 300);
    Ok(())
}
