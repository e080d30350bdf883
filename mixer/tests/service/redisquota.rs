//! redisquota against a real Redis: windows, replicas, retries, and a Redis that is down or hangs.

use std::time::{Duration, Instant};

use lateen_adapter::Value;
use lateen_protocols::istio::mixer::v1::CheckResponse;
use nix::sys::signal::Signal;

use crate::{
    redis::Redis,
    support::{Mesh, map, told},
};

fn rules(port: u16, quota: &str, annotations: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: quotahandler, namespace: istio-system }}
spec:
  compiledAdapter: redisquota
  params:
    redisServerUrl: 127.0.0.1:{port}
    connectionPoolSize: 4
    quotas:
    - name: requestcount.instance.istio-system
{quota}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: requestcount, namespace: istio-system }}
spec:
  compiledTemplate: quota
  params:
    dimensions:
      source: request.headers["x-forwarded-for"] | "unknown"
      destination: destination.labels["app"] | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: quota, namespace: istio-system, annotations: {{ {annotations} }} }}
spec:
  actions: [ {{ handler: quotahandler, instances: [ requestcount ] }} ]
"#
    )
}

fn from(client: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("request.headers", map(&[("x-forwarded-for", client)])),
        ("destination.labels", map(&[("app", "productpage")])),
    ]
}

async fn mesh(redis: &Redis, quota: &str) -> Mesh {
    let mesh = Mesh::start(&[("quota.yaml", &rules(redis.port, quota, ""))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    mesh
}

async fn ask(mesh: &mut Mesh, client: &str, amount: i64, best_effort: bool, id: &str) -> i64 {
    let wanted = [("requestcount", amount, best_effort)];
    let answer = mesh.check_with(&from(client), &wanted, id).await;
    assert_eq!(told(answer.precondition.as_ref().unwrap()), "OK:");
    let quota = &answer.quotas["requestcount"];
    let code = quota.status.clone().unwrap().code;
    assert_eq!(code, if quota.granted_amount > 0 { 0 } else { 8 });
    quota.granted_amount
}

#[tokio::test]
async fn a_fixed_window_grants_two_again_and_again() {
    let redis = Redis::start();
    let mut mesh = mesh(&redis, "      maxAmount: 2\n      validDuration: 2s").await;
    let begun = Instant::now();
    let mut grants = Vec::new(); // the moments after the answers
    while grants.len() < 4 {
        if ask(&mut mesh, "a", 1, false, "").await == 1 {
            grants.push(begun.elapsed());
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{grants:?}");
    }
    // Two of many in the first window, and none until it is over.
    let between = grants[2] - grants[0];
    assert!(between > Duration::from_millis(1900), "{grants:?}");
    assert!(between < Duration::from_secs(4), "{grants:?}");
}

#[tokio::test]
async fn no_rolling_window_has_more_than_the_limit() {
    const LIMIT: usize = 20;
    const WINDOW: Duration = Duration::from_millis(500);
    let redis = Redis::start();
    let quota = "      maxAmount: 20\n      validDuration: 500ms\n      bucketDuration: 10ms\n      \
                 rateLimitAlgorithm: ROLLING_WINDOW";
    let mut mesh = mesh(&redis, quota).await;
    let begun = Instant::now();
    let mut grants = Vec::new(); // the moments before and after, between which Redis granted
    while begun.elapsed() < 5 * WINDOW {
        let before = begun.elapsed();
        if ask(&mut mesh, "a", 1, false, "").await == 1 {
            grants.push((before, begun.elapsed()));
        }
    }
    for (first, more) in grants.iter().zip(grants.iter().skip(LIMIT)) {
        assert!(more.1 - first.0 >= WINDOW, "{first:?} {more:?}");
    }
    // And no less: a slot is given back at most its own length after its last grant has left.
    assert!(grants.len() >= 4 * LIMIT, "{}", grants.len());
}

#[tokio::test]
async fn replicas_share_one_limit() {
    let redis = Redis::start();
    for quota in [
        "      maxAmount: 37\n      validDuration: 600s",
        "      maxAmount: 37\n      validDuration: 600s\n      bucketDuration: 1s\n      \
         rateLimitAlgorithm: ROLLING_WINDOW",
    ] {
        let (one, two) = (mesh(&redis, quota).await, mesh(&redis, quota).await);
        let calls = (0..200).map(|i| {
            let mesh = if i % 2 == 0 { &one } else { &two };
            let mut client = mesh.client.clone();
            async move {
                let request = crate::support::request(
                    &from("b"),
                    &[("requestcount", 1, false)],
                    &i.to_string(),
                );
                let answer: CheckResponse = client.check(request).await.unwrap().into_inner();
                answer.quotas["requestcount"].granted_amount
            }
        });
        let granted: i64 = futures::future::join_all(calls).await.into_iter().sum();
        assert_eq!(granted, 37);
    }
    // Neither opened more connections than it may (and one is ours).
    let clients: String = redis.ask(&["CLIENT", "LIST"]).await;
    let theirs = clients.lines().count() - 1;
    assert!((1..=4 * 4).contains(&theirs), "{clients}");
}

#[tokio::test]
async fn overrides_best_effort_and_retries() {
    let redis = Redis::start();
    let quota = r#"      maxAmount: 5
      validDuration: 600s
      overrides:
      - { dimensions: { destination: ratings }, maxAmount: 1 }
      - { dimensions: { source: "10.28.11.20", destination: productpage }, maxAmount: 500 }
      - { dimensions: { source: "10.28.11.20" }, maxAmount: 3 }"#;
    let mut mesh = mesh(&redis, quota).await;
    assert_eq!(ask(&mut mesh, "10.28.11.20", 400, false, "").await, 400);
    assert_eq!(ask(&mut mesh, "10.28.11.20", 400, true, "").await, 100);
    assert_eq!(ask(&mut mesh, "c", 6, false, "").await, 0);
    for _ in 0..5 {
        assert_eq!(ask(&mut mesh, "c", 2, false, "the same").await, 2);
    }
    assert_eq!(ask(&mut mesh, "c", 4, false, "another").await, 0);
    assert_eq!(ask(&mut mesh, "c", 4, true, "a third").await, 3);
    assert_eq!(ask(&mut mesh, "c", 2, false, "the same").await, 2);
    assert_eq!(
        ask(&mut mesh, "d", 5, false, "").await,
        5,
        "another counter"
    );
    let long = "e".repeat(10_000);
    assert_eq!(ask(&mut mesh, &long, 5, false, "").await, 5);
    assert_eq!(ask(&mut mesh, &long, 1, false, "").await, 0);
    let keys: Vec<String> = redis.ask(&["KEYS", "*"]).await;
    assert!(keys.iter().all(|k| k.len() < 400));
    for key in keys {
        let left: i64 = redis.ask(&["PTTL", &key]).await;
        assert!(left > 0, "{key:?} stays for ever");
    }
}

#[tokio::test]
async fn a_call_is_one_round_trip_even_when_redis_forgets_scripts() {
    let redis = Redis::start();
    let mut mesh = mesh(&redis, "      maxAmount: 100\n      validDuration: 600s").await;
    for _ in 0..10 {
        assert_eq!(ask(&mut mesh, "a", 1, false, "").await, 1);
    }
    let _: String = redis.ask(&["SCRIPT", "FLUSH"]).await;
    for _ in 0..10 {
        assert_eq!(ask(&mut mesh, "a", 1, false, "").await, 1);
    }
    let stats: String = redis.ask(&["INFO", "commandstats"]).await;
    let calls = |command: &str| -> u64 {
        let line = stats
            .lines()
            .find_map(|l| l.strip_prefix(&format!("cmdstat_{command}:calls=")))
            .unwrap_or("0,");
        line.split(',').next().unwrap().parse().unwrap()
    };
    // 20 calls, two of which found no script and came again after loading it.
    assert_eq!(calls("evalsha"), 22, "{stats}");
    assert_eq!(calls("script|load"), 2, "{stats}");
    assert_eq!(calls("eval"), 0, "{stats}");
}

#[tokio::test]
async fn a_redis_that_is_gone_is_the_rules_fail_mode() {
    let redis = Redis::start();
    let quota = "      maxAmount: 1\n      validDuration: 600s";
    let mut closed = mesh(&redis, quota).await;
    let open = rules(redis.port, quota, "policy.istio.io/fail-mode: open");
    let mut open = Mesh::start(&[("quota.yaml", &open)]).await;
    assert_eq!(ask(&mut closed, "a", 1, false, "").await, 1);
    assert_eq!(ask(&mut open, "a", 1, false, "").await, 0);
    let port = redis.stop();
    for _ in 0..50 {
        let answer = closed
            .check_with(&from("a"), &[("requestcount", 1, false)], "")
            .await;
        let verdict = told(answer.precondition.as_ref().unwrap());
        assert!(
            verdict
                .starts_with("UNAVAILABLE:quotahandler.handler.istio-system:Redis at 127.0.0.1:"),
            "{verdict}"
        );
        assert_eq!(answer.precondition.unwrap().valid_use_count, 0);
        assert_eq!(ask(&mut open, "a", 1, false, "").await, 1);
    }
    // It comes back, empty, without anybody's help.
    let redis = Redis::start_on(port).expect("the port is free");
    let mut granted = 0;
    let begun = Instant::now();
    while granted == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20));
        let answer = closed
            .check_with(&from("a"), &[("requestcount", 1, false)], "")
            .await;
        granted = answer
            .quotas
            .get("requestcount")
            .map_or(0, |q| q.granted_amount);
    }
    assert_eq!(ask(&mut closed, "a", 1, false, "").await, 0);
    drop(redis);
    let metrics = crate::support::get(closed.running.admin_address, "/metrics").await;
    let failures = "mixer_adapter_events_total{handler=\"quotahandler.handler.istio-system\",\
                    adapter=\"redisquota\",event=\"redis_failures\"}";
    assert!(metrics.contains(failures), "{metrics}");
}

#[tokio::test]
async fn a_redis_that_hangs_holds_nobody_for_long() {
    let redis = Redis::start();
    let mut mesh = mesh(&redis, "      maxAmount: 1000\n      validDuration: 600s").await;
    assert_eq!(ask(&mut mesh, "a", 1, false, "").await, 1);
    redis.signal(Signal::SIGSTOP);
    let mut waited = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        let answer = mesh
            .check_with(&from("a"), &[("requestcount", 1, false)], "")
            .await;
        waited.push(begun.elapsed());
        let verdict = told(answer.precondition.as_ref().unwrap());
        assert!(verdict.starts_with("UNAVAILABLE:"), "{verdict}");
    }
    redis.signal(Signal::SIGCONT);
    assert!(
        waited.iter().all(|w| *w < Duration::from_secs(1)),
        "{waited:?}"
    );
    // Only those that really asked waited.
    let waiting = waited.iter().filter(|w| **w > Duration::from_millis(400));
    assert!(waiting.count() <= 3, "{waited:?}");
}

#[tokio::test]
async fn callers_are_told_how_their_quota_stands() {
    let redis = Redis::start();
    let quota = "      maxAmount: 2\n      validDuration: 600s";
    let told = rules(
        redis.port,
        quota,
        "policy.istio.io/rate-limit-headers: \"true\"",
    );
    let mut mesh = Mesh::start(&[("quota.yaml", &told)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (left, is_granted) in [("1", true), ("0", true), ("0", false)] {
        let answer = mesh
            .check_with(&from("a"), &[("requestcount", 1, false)], "")
            .await;
        let precondition = answer.precondition.unwrap();
        assert_eq!(
            precondition.valid_use_count, 0,
            "the next one has other numbers"
        );
        let fields: Vec<_> = precondition
            .route_directive
            .unwrap()
            .response_header_operations
            .into_iter()
            .map(|o| (o.name, o.value))
            .collect();
        let value = |name: &str| {
            let found = fields.iter().find(|(n, _)| n == name);
            found.map(|(_, v)| v.as_str())
        };
        assert_eq!(value("ratelimit-limit"), Some("2"));
        assert_eq!(value("ratelimit-remaining"), Some(left));
        let reset: u64 = value("ratelimit-reset").unwrap().parse().unwrap();
        assert!((590..=600).contains(&reset), "{reset}");
        assert_eq!(value("retry-after").is_some(), !is_granted);
    }
}
