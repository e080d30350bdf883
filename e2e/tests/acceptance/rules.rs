//! A48, A51, A52, and rules that cannot matter: no policy, calls that need not be, rules that cannot be told, rules that are wrong.

use std::time::Duration;

use e2e::{
    http::{Client, Response},
    mesh::Options,
    samples,
};

use super::support::{bookinfo, eventually, stat};

const DENIER: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: deny, namespace: istio-system }
spec: { compiledAdapter: denier, params: { status: { code: 7, message: no } } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: nothing, namespace: istio-system }
spec: { compiledTemplate: checknothing }
---
"#;

fn rule(annotations: &str, condition: &str, handler: &str, instance: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: deny, namespace: istio-system, annotations: {{ {annotations} }} }}
spec:
  match: {condition}
  actions: [ {{ handler: {handler}, instances: [ {instance} ] }} ]
---"#
    )
}

/// What details answers to a request sent by productpage.
async fn details(
    client: &Client,
    proxy: &str,
    headers: &[(&str, &str)],
) -> anyhow::Result<Response> {
    let headers = [&[("host", "details:9080")], headers].concat();
    client
        .get_with(&format!("{proxy}/details/0"), &headers)
        .await
}

#[tokio::test]
async fn a48_without_policy_checks_nobody_asks() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let off = samples::MESH.replace("disablePolicyChecks: false", "disablePolicyChecks: true");
    assert_ne!(off, samples::MESH);
    mesh.apply("mesh.yaml", &off).await?;
    let from = mesh.instance("productpage-v1-0")?.http_proxy();
    let server = mesh.instance("details-v1-0")?.admin();
    let total = async || stat(&client, &server, "mixer.http.total_check_calls").await;
    let before = total().await?;
    for _ in 0..100 {
        let answer = details(&client, &from, &[]).await?;
        assert_eq!(answer.status, 200);
    }
    assert_eq!(total().await? - before, 0);
    Ok(())
}

/// Calls that Mixer has had: checks, reports.
async fn calls(client: &Client, mixer: &str) -> anyhow::Result<[u64; 2]> {
    let text = client.get(&format!("{mixer}/metrics")).await?.text();
    let of = |method: &str| {
        text.lines()
            .filter(|line| line.starts_with(&format!("mixer_requests_total{{method=\"{method}\"")))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
            .sum()
    };
    Ok(["Check", "Report"].map(of))
}

#[tokio::test]
async fn nobody_asks_where_no_rule_can_matter() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let mixer = mesh.mixer_url();
    let from = mesh.instance("productpage-v1-0")?.http_proxy();
    let john = [("x-user", "john")];
    let quiet = async |checks: bool, reports: bool| {
        // Proxies are told once Mixer has said that it has these rules, and send their last reports.
        eventually(Duration::from_secs(10), async || {
            let before = calls(&client, &mixer).await?;
            for _ in 0..20 {
                let answer = details(&client, &from, &john).await?;
                anyhow::ensure!(answer.status == 200, "status {}", answer.status);
            }
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let after = calls(&client, &mixer).await?;
            let asked = (after[0] > before[0], after[1] > before[1]);
            anyhow::ensure!(asked == (!checks, !reports), "{before:?} {after:?}");
            Ok(())
        })
        .await
    };
    // The mesh as it comes has no rule that checks.
    quiet(true, false).await?;
    // A rule for another service; the same of what details answers to is asked.
    let condition = |service: &str| {
        format!(
            "destination.service.name == \"{service}\" && request.headers[\"x-user\"] == \"john\""
        )
    };
    let elsewhere = rule("", &condition("ratings"), "deny", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{elsewhere}"))
        .await?;
    quiet(true, false).await?;
    // In force as soon as the change is live.
    let here = rule("", &condition("details"), "deny", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{here}")).await?;
    assert_eq!(details(&client, &from, &john).await?.status, 403);
    // A version that is refused leaves that one in force, and so the question.
    let broken = rule("", &condition("ratings"), "nobody", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{broken}"))
        .await
        .unwrap_err();
    assert_eq!(details(&client, &from, &john).await?.status, 403);
    mesh.apply("rules.yaml", &format!("{DENIER}{elsewhere}"))
        .await?;
    quiet(true, false).await?;
    // Without the rules that report nobody reports.
    mesh.delete("telemetry.yaml").await?;
    quiet(true, true).await
}

#[tokio::test]
async fn who_may_ask_is_told_why() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let from = mesh.instance("productpage-v1-0")?.http_proxy();
    let condition =
        "destination.service.name == \"details\" && request.headers[\"x-user\"] == \"john\"";
    let yaml = format!("{DENIER}{}", rule("", condition, "deny", "nothing"));
    mesh.apply("rules.yaml", &yaml).await?;
    let why = ("x-lateen-explain", "1");
    let told = |answer: &Response| {
        [
            "x-lateen-rule",
            "x-lateen-rule-place",
            "x-lateen-handler",
            "x-lateen-reason",
        ]
        .map(|name| answer.header(name).unwrap_or("-").to_owned())
    };
    // Nobody who is not allowed to.
    let answer = details(&client, &from, &[("x-user", "john"), why]).await?;
    assert_eq!(answer.status, 403);
    assert_eq!(told(&answer), ["-"; 4]);
    let allowed = samples::MESH.replace(
        "disablePolicyChecks: false",
        "disablePolicyChecks: false\n    allowPolicyExplanation: true",
    );
    mesh.apply("mesh.yaml", &allowed).await?;
    // Connections between proxies have the listener they were accepted by, until they are drained.
    eventually(Duration::from_secs(10), async || {
        let answer = details(&client, &from, &[("x-user", "john"), why]).await?;
        anyhow::ensure!(told(&answer)[0] != "-", "nothing is told");
        Ok(())
    })
    .await?;
    let line = 1 + yaml
        .lines()
        .position(|l| l == "kind: rule")
        .unwrap_or_default();
    for _ in 0..2 {
        let answer = details(&client, &from, &[("x-user", "john"), why]).await?;
        assert_eq!(answer.status, 403);
        let [rule, place, handler, reason] = told(&answer);
        assert_eq!(rule, "deny.rule.istio-system");
        let (file, at) = place.rsplit_once(':').unwrap_or_default();
        assert!(file.ends_with("rules.yaml"), "{place}");
        let at: usize = at.parse()?;
        assert!(
            at.abs_diff(line) <= 2,
            "{place}, kind: rule is in line {line}"
        );
        assert_eq!(handler, "deny.handler.istio-system");
        assert_eq!(reason, "PERMISSION_DENIED:deny.handler.istio-system:no");
        assert!(answer.header("x-lateen-verdict-id").is_some());
    }
    let answer = details(&client, &from, &[("x-user", "jim"), why]).await?;
    assert_eq!(answer.status, 200);
    assert_eq!(told(&answer), ["-", "-", "-", "no rule applies"]);
    // Who does not ask is told nothing.
    let answer = details(&client, &from, &[("x-user", "john")]).await?;
    assert_eq!(
        (answer.status, told(&answer)),
        (403, ["-"; 4].map(str::to_owned))
    );
    Ok(())
}

#[tokio::test]
async fn a51_what_cannot_be_told_is_never_allowed() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let from = mesh.instance("productpage-v1-0")?.http_proxy();
    // Declared, but these requests do not have it.
    let absent = rule("", "request.auth.principal == \"root\"", "deny", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{absent}"))
        .await?;
    let answer = details(&client, &from, &[]).await?;
    assert_eq!(answer.status, 403, "{}", answer.text());
    assert!(
        answer
            .text()
            .contains("lookup failed: 'request.auth.principal'"),
        "{}",
        answer.text()
    );
    // Declared nowhere: refused, with the reason; the rule before it stays.
    let unknown = rule("", "request.auth.princpal == \"root\"", "deny", "nothing");
    let error = mesh
        .apply("rules.yaml", &format!("{DENIER}{unknown}"))
        .await
        .unwrap_err();
    assert!(
        format!("{error:#}").contains("unknown attribute request.auth.princpal")
            && format!("{error:#}").contains("rules.yaml:17: rule"),
        "{error:#}"
    );
    assert_eq!(details(&client, &from, &[]).await?.status, 403);
    // In CEL absent is empty, and has() tells.
    let cel = "policy.istio.io/lang: CEL";
    let is_root = rule(cel, "request.auth.principal == 'root'", "deny", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{is_root}"))
        .await?;
    eventually(Duration::from_secs(3), async || {
        let status = details(&client, &from, &[]).await?.status;
        anyhow::ensure!(status == 200, "status {status}");
        Ok(())
    })
    .await?;
    let is_nobody = rule(cel, "'!has(request.auth.principal)'", "deny", "nothing");
    mesh.apply("rules.yaml", &format!("{DENIER}{is_nobody}"))
        .await?;
    eventually(Duration::from_secs(3), async || {
        let status = details(&client, &from, &[]).await?.status;
        anyhow::ensure!(status == 403, "status {status}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a52_what_is_wrong_is_refused_and_the_last_good_rule_stays() -> anyhow::Result<()> {
    let (mut mesh, client) = bookinfo(Options::default()).await?;
    let from = mesh.instance("productpage-v1-0")?.http_proxy();
    let john = [("x-user", "john")];
    let john_is_denied = async || {
        eventually(Duration::from_secs(3), async || {
            let status = details(&client, &from, &john).await?.status;
            anyhow::ensure!(status == 403, "status {status}");
            Ok(())
        })
        .await
    };
    let condition = "request.headers[\"x-user\"] == \"john\"";
    let good = format!("{DENIER}{}", rule("", condition, "deny", "nothing"));
    mesh.apply("rules.yaml", &good).await?;
    john_is_denied().await?;
    for (wrong, reason) in [
        (
            good.replace("checknothing", "checksomething"),
            "unknown template \"checksomething\"",
        ),
        (
            good.replace("compiledAdapter: denier", "compiledAdapter: dneier"),
            "unknown adapter \"dneier\"",
        ),
        (
            good.replace("handler: deny,", "handler: allow,"),
            "there is no handler istio-system/allow",
        ),
        (good.replace("code: 7", "cod: 7"), "unknown field `cod`"),
    ] {
        assert_ne!(wrong, good);
        let error = format!("{:#}", mesh.apply("rules.yaml", &wrong).await.unwrap_err());
        let error = error.replace("\\\"", "\""); // it is a list in JSON
        assert!(error.contains(reason), "{error}");
        john_is_denied().await?;
        mesh.apply("rules.yaml", &good).await?;
    }
    // A rule that has never been good protects if it says so.
    let closed = rule(
        "policy.istio.io/fail-mode: closed",
        condition,
        "allow",
        "nothing",
    );
    mesh.delete("rules.yaml").await?;
    mesh.apply("new.yaml", &closed).await.unwrap_err();
    john_is_denied().await?;
    let answer = details(&client, &from, &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    Ok(())
}
