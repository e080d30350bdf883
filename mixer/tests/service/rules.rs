//! What annotations make of rules: languages, dry run, sampling, protection while refused; and why a verdict is
//! what it is.

use lateen_adapter::Value;
use mixer::{
    explain::Explanation,
    serve::{EXPLAIN, EXPLANATION, VERDICT},
};

use crate::support::{Mesh, get, map, text, told};

const PARTS: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: deny, namespace: shop }
spec: { compiledAdapter: denier, params: { status: { code: 7, message: no }, validDuration: 9s } }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: nothing, namespace: shop }
spec: { compiledTemplate: checknothing }
---
"#;

fn rule(name: &str, annotations: &str, condition: &str, rest: &str) -> String {
    format!(
        "apiVersion: config.istio.io/v1alpha2\nkind: rule\nmetadata: {{ name: {name}, namespace: shop, annotations: {{ {annotations} }} }}\nspec:\n  match: {condition}\n  {rest}\n---\n"
    )
}

const DENY: &str = "actions: [ { handler: deny, instances: [ nothing ] } ]";

fn to_shop(more: &[(&'static str, Value)]) -> Vec<(&'static str, Value)> {
    let mut all = vec![("destination.namespace", text("shop"))];
    all.extend_from_slice(more);
    all
}

#[tokio::test]
async fn a_rule_chooses_its_language() {
    let cel = r#""!has(source.namespace) || source.namespace in ['a', 'b']""#;
    let rules = format!(
        "{PARTS}{}",
        rule("r", "policy.istio.io/lang: CEL", cel, DENY)
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (attributes, want) in [
        (vec![], "PERMISSION_DENIED:deny.handler.shop:no"),
        (
            vec![("source.namespace", text("b"))],
            "PERMISSION_DENIED:deny.handler.shop:no",
        ),
        (vec![("source.namespace", text("c"))], "OK:"),
    ] {
        assert_eq!(
            told(&mesh.check(&to_shop(&attributes)).await),
            want,
            "{attributes:?}"
        );
    }
    // The same text is no CEXL, and a language must be one of three.
    mesh.apply(
        "rules.yaml",
        Some(&format!("{PARTS}{}", rule("r", "", cel, DENY))),
    )
    .await;
    assert!(
        mesh.refused()[0].contains("spec.match") || mesh.refused()[0].contains("match:"),
        "{:?}",
        mesh.refused()
    );
    let unknown = rule("r", "policy.istio.io/lang: Rego", "'true'", DENY);
    mesh.apply("rules.yaml", Some(&format!("{PARTS}{unknown}")))
        .await;
    assert!(
        mesh.refused()[0].contains("'Rego' is no expression language"),
        "{:?}",
        mesh.refused()
    );
}

#[tokio::test]
async fn a_rule_that_is_tried_denies_nobody_and_is_counted() {
    let tried = rule("tried", "policy.istio.io/dry-run: 'true'", "'true'", DENY);
    let headers = "requestHeaderOperations: [ { name: x, values: [ '\"y\"' ] } ]";
    let with_headers = rule(
        "headers",
        "policy.istio.io/dry-run: 'true'",
        "'true'",
        headers,
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &format!("{PARTS}{tried}{with_headers}"))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let answer = mesh.check(&to_shop(&[])).await;
    assert_eq!(told(&answer), "OK:");
    assert_eq!(answer.route_directive, None);
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    let counted =
        r#"mixer_dry_run_verdicts_total{rule="tried.rule.shop",code="PERMISSION_DENIED"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
    let enforced = tried.replace("'true' }", "'false' }");
    mesh.apply("rules.yaml", Some(&format!("{PARTS}{enforced}")))
        .await;
    assert_eq!(
        told(&mesh.check(&to_shop(&[])).await),
        "PERMISSION_DENIED:deny.handler.shop:no"
    );
}

#[tokio::test]
async fn a_new_rule_that_is_refused_protects_if_it_says_so() {
    let broken = "actions: [ { handler: dney, instances: [ nothing ] } ]";
    let condition = "request.path == \"/admin\"";
    let closed = "policy.istio.io/fail-mode: closed";
    let at = |path: &str| to_shop(&[("request.path", text(path))]);
    let mut mesh = Mesh::start(&[(
        "rules.yaml",
        &format!("{PARTS}{}", rule("r", closed, condition, broken)),
    )])
    .await;
    assert_eq!(mesh.refused().len(), 1);
    let refused = "PERMISSION_DENIED:r.rule.shop:the rule is refused";
    assert_eq!(told(&mesh.check(&at("/admin")).await), refused);
    assert_eq!(told(&mesh.check(&at("/")).await), "OK:");
    // With a match that is wrong too it stands in the way of its whole namespace, and of nobody else.
    let all_wrong = rule("r", closed, "request.pth == \"/admin\"", broken);
    mesh.apply("rules.yaml", Some(&format!("{PARTS}{all_wrong}")))
        .await;
    assert_eq!(told(&mesh.check(&at("/")).await), refused);
    let elsewhere = [("destination.namespace", text("other"))];
    assert_eq!(told(&mesh.check(&elsewhere).await), "OK:");
    // Mended, it does what it says; broken again, the last good version is in force.
    mesh.apply(
        "rules.yaml",
        Some(&format!("{PARTS}{}", rule("r", closed, condition, DENY))),
    )
    .await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(told(&mesh.check(&at("/")).await), "OK:");
    mesh.apply("rules.yaml", Some(&format!("{PARTS}{all_wrong}")))
        .await;
    assert_eq!(
        told(&mesh.check(&at("/admin")).await),
        "PERMISSION_DENIED:deny.handler.shop:no"
    );
    assert_eq!(told(&mesh.check(&at("/")).await), "OK:");
    // Without the annotation a new rule that is refused disturbs nobody.
    mesh.apply(
        "rules.yaml",
        Some(&format!("{PARTS}{}", rule("new", "", condition, broken))),
    )
    .await;
    assert_eq!(told(&mesh.check(&at("/admin")).await), "OK:");
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    assert!(metrics.contains("mixer_config_refused 1"), "{metrics}");
    assert!(metrics.contains("mixer_config_held 0"), "{metrics}");
}

#[tokio::test]
async fn sampling_is_for_reports() {
    const LOG: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: log, namespace: shop }
spec: { compiledAdapter: stdio }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: entry, namespace: shop }
spec: { compiledTemplate: logentry, params: { variables: { id: request.id } } }
---
"#;
    let half = "actions: [ { handler: log, instances: [ entry ] } ]\n  sampling: { random: { attributeExpression: request.id, percentSampled: { numerator: 50 } } }";
    let sampled = rule("sampled", "", "'true'", half);
    let mut mesh = Mesh::start(&[("rules.yaml", &format!("{LOG}{sampled}"))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let sets: Vec<Vec<(&str, Value)>> = (0..200)
        .map(|i| to_shop(&[("request.id", text(&format!("id-{i}")))]))
        .collect();
    let sets: Vec<&[(&str, Value)]> = sets.iter().map(Vec::as_slice).collect();
    mesh.report(&sets).await;
    let lines = mesh.stdout.0.lock().unwrap().len();
    assert!((60..140).contains(&lines), "{lines}");
    mesh.report(&sets).await;
    assert_eq!(
        mesh.stdout.0.lock().unwrap().len(),
        2 * lines,
        "the same ones again"
    );
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    let left_out = format!(
        r#"mixer_sampled_out_total{{rule="sampled.rule.shop"}} {}"#,
        2 * (200 - lines)
    );
    assert!(metrics.contains(&left_out), "{metrics}");

    let of_check = rule(
        "check",
        "",
        "'true'",
        &format!("{DENY}\n  sampling: {{ random: {{}} }}"),
    );
    mesh.apply("rules.yaml", Some(&format!("{PARTS}{of_check}")))
        .await;
    assert!(
        mesh.refused()[0].contains("only reports can be sampled"),
        "{:?}",
        mesh.refused()
    );
}

#[tokio::test]
async fn who_asks_is_told_why() {
    let rules = format!(
        "{PARTS}{}{}{}",
        rule(
            "a",
            "",
            "source.labels[\"app\"] == \"x\" && request.headers[\"user\"] == \"jason\"",
            DENY
        ),
        rule("b", "policy.istio.io/dry-run: 'true'", "'true'", DENY),
        rule("c", "", "request.path == \"/other\"", DENY),
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let attributes = to_shop(&[
        ("source.labels", map(&[("app", "x")])),
        (
            "request.headers",
            map(&[("user", "jason"), ("cookie", "secret")]),
        ),
        ("request.path", text(&"/p".repeat(400))),
    ]);
    let plain = mesh.call(&attributes, &[], "", &[]).await;
    assert!(plain.metadata().get_bin(EXPLANATION).is_none());
    let first: String = plain
        .metadata()
        .get(VERDICT)
        .unwrap()
        .to_str()
        .unwrap()
        .into();

    let answer = mesh
        .call(&attributes, &[("q", 1, false)], "", &[(EXPLAIN, "1")])
        .await;
    let id = answer.metadata().get(VERDICT).unwrap().to_str().unwrap();
    assert_ne!(id, first);
    let json = answer
        .metadata()
        .get_bin(EXPLANATION)
        .unwrap()
        .to_bytes()
        .unwrap();
    let why: Explanation = serde_json::from_slice(&json).unwrap();
    assert_eq!(why.id, id);
    assert_eq!(why.generation, mesh.generation().to_string());
    assert_eq!(
        (&*why.code, &*why.message),
        ("PERMISSION_DENIED", "deny.handler.shop:no")
    );
    let rules: Vec<(&str, &str, bool)> = why
        .rules
        .iter()
        .map(|r| (&*r.rule, &*r.place, r.dry_run))
        .collect();
    assert_eq!(
        rules,
        [
            ("a.rule.shop", "rules.yaml:15", false),
            ("b.rule.shop", "rules.yaml:22", true)
        ]
    );
    let asked = &why.rules[0].asked[0];
    assert_eq!(
        (
            &*asked.handler,
            &*asked.adapter,
            &*asked.instance,
            &*asked.code,
            asked.valid_ms
        ),
        (
            "deny.handler.shop",
            "denier",
            "nothing.instance.shop",
            "PERMISSION_DENIED",
            9000
        )
    );
    assert_eq!(why.not_applied, ["c.rule.shop"]);
    let told: Vec<String> = why
        .attributes
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    let path = format!("request.path=\"{}…\"", "/p".repeat(128));
    assert_eq!(
        told,
        [
            "context.reporter.kind=null",
            "destination.namespace=\"shop\"",
            "request.headers[user]=\"jason\"",
            &path,
            "source.labels[app]=\"x\"",
        ]
    );
    // A denied request takes no quota; one that passes is told about it.
    assert_eq!(why.quotas, []);
    let passing = to_shop(&[
        ("source.labels", map(&[("app", "y")])),
        ("request.path", text("/")),
    ]);
    let answer = mesh
        .call(&passing, &[("q", 1, false)], "", &[(EXPLAIN, "1")])
        .await;
    let json = answer
        .metadata()
        .get_bin(EXPLANATION)
        .unwrap()
        .to_bytes()
        .unwrap();
    let why: Explanation = serde_json::from_slice(&json).unwrap();
    assert_eq!(why.quotas[0].message, "no rule has a quota named q");
}

#[tokio::test]
async fn checks_and_reports_can_be_made_by_hand() {
    use clap::Parser as _;
    use mixer::command::{Cli, Command, client};
    let rules = format!(
        "{PARTS}{}",
        rule("a", "", "request.headers[\"user\"] == \"jason\"", DENY)
    );
    let mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    let address = format!("http://{}", mesh.running.address);
    let call = |args: &[&str]| {
        let args = [&["mixer", args[0], "--mixer", &address], &args[1..]].concat();
        Cli::try_parse_from(args).unwrap().command.unwrap()
    };
    let shop = [
        "-a",
        "destination.namespace=shop",
        "-a",
        "request.headers[user]=jason",
    ];
    let Command::Check(options) = call(&[&["check", "--explain", "-q", "q=2"], &shop[..]].concat())
    else {
        panic!("it is a check");
    };
    let mut out = Vec::new();
    client::check(&options, &mut out).await.unwrap();
    let out = String::from_utf8(out).unwrap();
    for line in [
        "PERMISSION_DENIED deny.handler.shop:no",
        "  valid       9s, 1000 uses",
        "  depends on  -context.reporter.kind, destination.namespace, request.headers[user]",
        "    a.rule.shop rules.yaml:15: if request.headers[\"user\"] == \"jason\"",
        "    request.headers[user] = \"jason\"",
    ] {
        assert!(out.lines().any(|l| l == line), "{line}\nin\n{out}");
    }
    let Command::Report(options) = call(&[&["report", "--repeat", "3"], &shop[..2]].concat())
    else {
        panic!("it is a report");
    };
    let mut out = Vec::new();
    client::report(&options, &mut out).await.unwrap();
    assert!(
        String::from_utf8(out)
            .unwrap()
            .starts_with("OK, 3 reported")
    );
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    assert!(metrics.contains("mixer_reported_total 3"), "{metrics}");
    let Command::Check(options) = Cli::try_parse_from(["mixer", "check", "--mixer", "127.0.0.1:1"])
        .unwrap()
        .command
        .unwrap()
    else {
        panic!("it is a check");
    };
    let error = client::check(&options, &mut Vec::new()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot reach 127.0.0.1:1; is Mixer there (--mixer)?"
    );
}
