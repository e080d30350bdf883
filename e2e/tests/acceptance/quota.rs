//! A36, A37, A38, A40: who is counted, by what, and by how many Mixers.

use std::time::{Duration, Instant};

use e2e::{
    http::Client,
    mesh::{Mesh, Options},
};

use super::{
    redis::Redis,
    routing::ALL_RULES,
    support::{Stars, add_sleep, ask, bookinfo, eventually, page, stars},
};

/// Charges `service` one requestcount for every request.
fn charge(service: &str) -> String {
    format!(
        r#"
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
  services: [ {{ name: {service}, namespace: default }} ]
---
apiVersion: config.istio.io/v1alpha2
kind: quota
metadata: {{ name: requestcount, namespace: istio-system }}
spec:
  dimensions:
    source: request.headers["x-forwarded-for"] | "unknown"
    destination: destination.labels["app"] | destination.service.name | "unknown"
    sourceVersion: source.labels["version"] | "unknown"
---
"#
    )
}

/// What counts, and for which requests.
fn count(adapter: &str, spec: &str, condition: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: {adapter}
metadata: {{ name: handler, namespace: istio-system }}
spec:
{spec}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: quota, namespace: istio-system }}
spec:
  match: {condition}
  actions: [ {{ handler: handler.{adapter}, instances: [ requestcount.quota ] }} ]
"#
    )
}

/// The windows are so long that none ends while a row is looked at; A35 and A38 are about windows that do.
fn overrides(list: &[&str]) -> String {
    format!(
        "  quotas:\n  - name: requestcount.quota.istio-system\n    maxAmount: 5000\n    validDuration: 600s\n    overrides:\n{}",
        list.iter()
            .map(|one| format!("    - {one}\n"))
            .collect::<String>()
    )
}

/// How many of `number` requests pass; every other one is told that its quota is exhausted.
async fn pass(
    client: &Client,
    mesh: &Mesh,
    number: usize,
    headers: &[(&str, &str)],
) -> anyhow::Result<usize> {
    let from = mesh.instance("sleep-0")?;
    let mut passed = 0;
    for _ in 0..number {
        let answer = ask(client, from, "productpage:9080", "/health", headers).await?;
        match answer.status {
            200 => passed += 1,
            429 => assert_eq!(
                answer.text(),
                "RESOURCE_EXHAUSTED:Quota is exhausted for: requestcount"
            ),
            other => panic!("status {other}: {}", answer.text()),
        }
    }
    Ok(passed)
}

#[tokio::test]
async fn a36_a37_a40_dimensions_overrides_and_conditions_say_who_is_counted() -> anyhow::Result<()>
{
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    add_sleep(&mut mesh)?;
    mesh.ready().await?;

    // A36: two for each client, one of them excepted; the first override that fits decides.
    let excepted = "{ dimensions: { destination: productpage, source: 10.28.11.20 }, maxAmount: 500, validDuration: 1s }";
    let everybody =
        "{ dimensions: { destination: productpage }, maxAmount: 2, validDuration: 600s }";
    for (order, excepted_passes) in [([excepted, everybody], 100), ([everybody, excepted], 2)] {
        let yaml = count("memquota", &overrides(&order), "\"true\"");
        mesh.apply("quota.yaml", &(charge("productpage") + &yaml))
            .await?;
        let started = Instant::now();
        for (address, want) in [
            ("10.28.11.20", excepted_passes),
            ("10.28.11.21", 2),
            ("10.28.11.22", 2),
        ] {
            let headers = [("x-forwarded-for", address)];
            let number = if want == 100 { 100 } else { 10 };
            assert_eq!(
                pass(&client, &mesh, number, &headers).await?,
                want,
                "{address}"
            );
        }
        assert!(started.elapsed() < Duration::from_secs(300));
        // Another handler's counters begin at zero.
        mesh.delete("quota.yaml").await?;
    }

    // A37: who has logged in is not counted.
    let condition = r#"match(request.headers["cookie"] | "", "session=*") == false"#;
    let yaml = count("memquota", &overrides(&[everybody]), condition);
    mesh.apply("quota.yaml", &(charge("productpage") + &yaml))
        .await?;
    assert_eq!(pass(&client, &mesh, 10, &[]).await?, 2);
    assert_eq!(
        pass(&client, &mesh, 10, &[("cookie", "session=jason")]).await?,
        10
    );
    assert_eq!(
        pass(&client, &mesh, 10, &[("cookie", "user=jason")]).await?,
        0
    );
    mesh.delete("quota.yaml").await?;

    // A40: reviews v3 has one request of ratings; jason's reviews v2 has all it wants.
    let jason = r#"
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: reviews }
spec:
  hosts: [reviews]
  http:
  - match: [ { headers: { end-user: { exact: jason } } } ]
    route: [ { destination: { host: reviews, subset: v2 } } ]
  - route: [ { destination: { host: reviews, subset: v3 } } ]
"#;
    mesh.apply("destination-rules.yaml", ALL_RULES).await?;
    mesh.apply("reviews.yaml", jason).await?;
    assert_eq!(stars(&page(&client, &mesh, None).await?), Stars::Red);
    let v3 = "{ dimensions: { destination: ratings, sourceVersion: v3 }, maxAmount: 1, validDuration: 600s }";
    let condition = r#"destination.labels["app"] == "ratings" && source.labels["version"] == "v3""#;
    let yaml = count("memquota", &overrides(&[v3]), condition);
    mesh.apply("quota.yaml", &(charge("ratings") + &yaml))
        .await?;
    let anonymous = async || anyhow::Ok(stars(&page(&client, &mesh, None).await?));
    // A page asks reviews once or more often; after the first answer of ratings there is none.
    eventually(Duration::from_secs(5), async || {
        anyhow::ensure!(anonymous().await? == Stars::None, "still red");
        Ok(())
    })
    .await?;
    for _ in 0..10 {
        assert_eq!(anonymous().await?, Stars::None);
        assert_eq!(
            stars(&page(&client, &mesh, Some("jason")).await?),
            Stars::Black
        );
    }
    Ok(())
}

/// What a client saw of one request that was granted: Redis decided between these moments.
type Grant = (Duration, Duration);

/// Two bursts of requests without a break, `burst` long, the second beginning at `second`; what was granted.
async fn bursts(
    client: &Client,
    proxy: &str,
    second: Duration,
    burst: Duration,
) -> anyhow::Result<Vec<Grant>> {
    let url = format!("{proxy}/details/0");
    let begun = Instant::now();
    let mut grants = Vec::new();
    for start in [Duration::ZERO, second] {
        tokio::time::sleep(start.saturating_sub(begun.elapsed())).await;
        while begun.elapsed() < start + burst {
            let before = begun.elapsed();
            let answer = client.get_with(&url, &[("host", "details:9080")]).await?;
            match answer.status {
                200 => grants.push((before, begun.elapsed())),
                429 => {}
                other => anyhow::bail!("status {other}: {}", answer.text()),
            }
        }
    }
    Ok(grants)
}

/// The sum of a counter over its series at a `/metrics`.
async fn total(client: &Client, url: &str, name: &str) -> anyhow::Result<f64> {
    let text = client.get(&format!("{url}/metrics")).await?.text();
    Ok(text
        .lines()
        .filter(|line| line.starts_with(name))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum())
}

#[tokio::test]
async fn a38_two_mixers_share_one_limit_in_redis() -> anyhow::Result<()> {
    const LIMIT: usize = 10;
    const WINDOW: Duration = Duration::from_secs(2);
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let (_redis, port) = Redis::start()?;
    let replicas = [mesh.mixer_url(), mesh.add_mixer().await?];
    let proxy = mesh.instance("productpage-v1-0")?.http_proxy();
    for (algorithm, bucket) in [
        ("ROLLING_WINDOW", "    bucketDuration: 20ms\n"),
        ("FIXED_WINDOW", ""),
    ] {
        let spec = format!(
            "  redisServerUrl: 127.0.0.1:{port}\n  quotas:\n  - name: requestcount.quota.istio-system\n    maxAmount: {LIMIT}\n    validDuration: 2s\n    rateLimitAlgorithm: {algorithm}\n{bucket}"
        );
        let yaml = count(
            "redisquota",
            &spec,
            "destination.service.name == \"details\"",
        );
        mesh.apply("quota.yaml", &(charge("details") + &yaml))
            .await?;
        // The second burst goes over the end of the window that began with the first.
        let burst = WINDOW * 3 / 4;
        let grants = bursts(&client, &proxy, WINDOW - burst / 3, burst).await?;
        // The first burst has the limit, no more and no less, whichever Mixer was asked.
        let first = grants.iter().filter(|(before, _)| *before < burst).count();
        assert_eq!(first, LIMIT, "{algorithm}: {grants:?}");
        assert!(grants.len() >= 2 * LIMIT - 1, "{algorithm}: {grants:?}");
        if algorithm == "ROLLING_WINDOW" {
            for (one, beyond) in grants.iter().zip(grants.iter().skip(LIMIT)) {
                assert!(
                    beyond.1 - one.0 >= WINDOW,
                    "{one:?} {beyond:?} of {grants:?}"
                );
            }
        } else {
            // Both bursts lie within two windows.
            assert!(grants.len() <= 2 * LIMIT, "{grants:?}");
        }
        mesh.delete("quota.yaml").await?;
    }
    for url in &replicas {
        let asked = total(&client, url, "mixer_requests_total{method=\"Check\"").await?;
        assert!(asked > 20.0, "{url} was asked {asked} times");
    }
    Ok(())
}
