//! Quota: exact amounts, retries, what is not limited, what is not known.

use lateen_adapter::Value;

use crate::support::{Mesh, map, seconds, text};

const RATELIMIT: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: quotahandler, namespace: istio-system }
spec:
  compiledAdapter: memquota
  params:
    quotas:
    - name: requestcount.instance.istio-system
      maxAmount: 500
      validDuration: 1s
      overrides:
      - { dimensions: { source: "10.28.11.20" }, maxAmount: 500, validDuration: 1s }
      - { dimensions: { destination: productpage }, maxAmount: 2, validDuration: 600s }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: requestcount, namespace: istio-system }
spec:
  compiledTemplate: quota
  params:
    dimensions:
      source: request.headers["x-forwarded-for"] | "unknown"
      destination: destination.labels["app"] | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: quota, namespace: istio-system }
spec:
  match: match(request.headers["cookie"] | "", "session=*") == false
  actions: [ { handler: quotahandler, instances: [ requestcount ] } ]
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: { name: request-count, namespace: istio-system }
spec: { rules: [ { quotas: [ { charge: 1, quota: requestcount }, { charge: 1, quota: typo } ] } ] }
"#;

fn from(client: &str, cookie: &str) -> Vec<(&'static str, Value)> {
    vec![
        (
            "request.headers",
            map(&[("x-forwarded-for", client), ("cookie", cookie)]),
        ),
        ("destination.labels", map(&[("app", "productpage")])),
    ]
}

async fn granted(mesh: &mut Mesh, attributes: &[(&str, Value)], id: &str) -> i64 {
    let answer = mesh
        .check_with(attributes, &[("RequestCount", 1, false)], id)
        .await;
    assert_eq!(answer.precondition.unwrap().status.unwrap().code, 0);
    let quota = &answer.quotas["RequestCount"];
    assert_eq!(quota.status.clone().unwrap().code, 0);
    quota.granted_amount
}

#[tokio::test]
async fn exactly_two_of_ten_are_granted_to_each_client() {
    let mut mesh = Mesh::start(&[("quota.yaml", RATELIMIT)]).await;
    assert_eq!(
        mesh.refused(),
        [
            "quota.yaml:36: QuotaSpec istio-system/request-count: no rule sends a quota instance typo to a \
          handler; requests charged to it are denied"
        ]
    );
    for client in ["1.1.1.1", "2.2.2.2"] {
        let mut all = 0;
        for i in 0..10 {
            all += granted(&mut mesh, &from(client, ""), &format!("{client}-{i}")).await;
        }
        assert_eq!(all, 2);
    }
    for i in 0..10 {
        let id = format!("override-{i}");
        assert_eq!(granted(&mut mesh, &from("10.28.11.20", ""), &id).await, 1);
        let id = format!("cookie-{i}");
        assert_eq!(
            granted(&mut mesh, &from("1.1.1.1", "session=a"), &id).await,
            1
        );
    }
}

#[tokio::test]
async fn a_retry_takes_nothing_twice_and_best_effort_takes_the_rest() {
    let mut mesh = Mesh::start(&[("quota.yaml", RATELIMIT)]).await;
    for _ in 0..5 {
        assert_eq!(
            granted(&mut mesh, &from("3.3.3.3", ""), "the same").await,
            1
        );
    }
    let wanted = [("requestcount", 10, true)];
    let answer = mesh
        .check_with(&from("3.3.3.3", ""), &wanted, "another")
        .await;
    assert_eq!(answer.quotas["requestcount"].granted_amount, 1);
    assert_eq!(
        seconds(answer.quotas["requestcount"].valid_duration.as_ref()),
        600.0
    );
}

#[tokio::test]
async fn parallel_requests_get_no_more_than_there_is() {
    let mesh = Mesh::start(&[("quota.yaml", RATELIMIT)]).await;
    let calls = (0..50).map(|i| {
        let mut client = mesh.client.clone();
        async move {
            let request = lateen_protocols::istio::mixer::v1::CheckRequest {
                attributes: Some(crate::support::compress(&from("4.4.4.4", ""))),
                global_word_count: 222,
                deduplication_id: i.to_string(),
                quotas: [(
                    "requestcount".to_owned(),
                    lateen_protocols::istio::mixer::v1::check_request::QuotaParams {
                        amount: 1,
                        best_effort: false,
                    },
                )]
                .into(),
            };
            client.check(request).await.unwrap().into_inner().quotas["requestcount"].granted_amount
        }
    });
    let granted: i64 = futures::future::join_all(calls).await.into_iter().sum();
    assert_eq!(granted, 2);
}

#[tokio::test]
async fn a_quota_nobody_has_is_refused_and_told() {
    let mut mesh = Mesh::start(&[("quota.yaml", RATELIMIT)]).await;
    let answer = mesh.check_with(&[], &[("typo", 1, false)], "").await;
    let quota = &answer.quotas["typo"];
    assert_eq!(quota.granted_amount, 0);
    assert_eq!(
        quota.status.clone().unwrap().message,
        "no rule has a quota named typo"
    );
    let problems = mesh.problems();
    assert!(
        problems
            .iter()
            .any(|p| p.reason.contains("quota instance typo")),
        "{problems:?}"
    );
}

#[tokio::test]
async fn a_denied_request_takes_no_quota() {
    let deny = r#"
apiVersion: config.istio.io/v1alpha2
kind: denier
metadata: { name: denier, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: nothing, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: deny, namespace: istio-system }
spec:
  match: (request.path | "") == "/no"
  actions: [ { handler: denier.denier, instances: [ nothing.checknothing ] } ]
"#;
    let mut mesh = Mesh::start(&[("quota.yaml", RATELIMIT), ("deny.yaml", deny)]).await;
    let mut denied = from("5.5.5.5", "");
    denied.push(("request.path", text("/no")));
    for i in 0..5 {
        let id = format!("denied-{i}");
        let answer = mesh
            .check_with(&denied, &[("requestcount", 1, false)], &id)
            .await;
        assert_eq!(answer.precondition.unwrap().status.unwrap().code, 9);
        assert!(answer.quotas.is_empty());
    }
    assert_eq!(granted(&mut mesh, &from("5.5.5.5", ""), "a").await, 1);
    assert_eq!(granted(&mut mesh, &from("5.5.5.5", ""), "b").await, 1);
}

#[tokio::test]
async fn counters_survive_changes_elsewhere() {
    let mut mesh = Mesh::start(&[("quota.yaml", RATELIMIT)]).await;
    for id in ["a", "b"] {
        assert_eq!(granted(&mut mesh, &from("6.6.6.6", ""), id).await, 1);
    }
    let other = "
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: unrelated, namespace: default }
";
    mesh.apply("other.yaml", Some(other)).await;
    mesh.apply(
        "quota.yaml",
        Some(&RATELIMIT.replace("session=*", "session*")),
    )
    .await;
    assert_eq!(granted(&mut mesh, &from("6.6.6.6", ""), "c").await, 0);
}

#[tokio::test]
async fn a_rule_on_trial_takes_nothing_from_those_that_grant() {
    let tried = RATELIMIT
        .split("---")
        .find(|part| part.contains("kind: rule"))
        .unwrap()
        .replace(
            "{ name: quota,",
            "{ name: tried, annotations: { policy.istio.io/dry-run: \"true\", policy.istio.io/priority: \"1\" },",
        );
    let rules = format!("{RATELIMIT}---{tried}").replace(", { charge: 1, quota: typo }", "");
    let mut mesh = Mesh::start(&[("quota.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let mut sum = 0;
    for number in 0..10 {
        sum += granted(&mut mesh, &from("a", ""), &number.to_string()).await;
    }
    assert_eq!(sum, 2);
    // It counts by itself what it would have granted.
    let metrics = crate::support::get(mesh.running.admin_address, "/metrics").await;
    for (code, count) in [("OK", 2), ("RESOURCE_EXHAUSTED", 8)] {
        let line = format!(
            "mixer_dry_run_verdicts_total{{rule=\"tried.rule.istio-system\",code=\"{code}\"}} {count}"
        );
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn what_cannot_be_evaluated_refuses_and_is_not_called_exhausted() {
    let failing_match = RATELIMIT.replace(
        r#"match(request.headers["cookie"] | "", "session=*") == false"#,
        r#"request.path == "/paid""#,
    );
    let failing_instance = RATELIMIT.replace(
        r#"request.headers["x-forwarded-for"] | "unknown""#,
        "request.path",
    );
    for rules in [failing_match, failing_instance] {
        let mut mesh = Mesh::start(&[("quota.yaml", &rules)]).await;
        let wanted = [("requestcount", 1, false)];
        let answer = mesh.check_with(&from("7.7.7.7", ""), &wanted, "a").await;
        let status = answer.precondition.unwrap().status.unwrap();
        assert_eq!(
            status.code,
            i32::from(tonic::Code::PermissionDenied),
            "{status:?}"
        );
        assert!(status.message.contains("lookup failed"), "{status:?}");
        assert_eq!(answer.quotas["requestcount"].granted_amount, 0);
    }
}
