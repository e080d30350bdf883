//! Configuration: bad objects are refused with a reason and leave what is good in force.

use std::time::Duration;

use serde_json::Value as Json;

use crate::support::{Mesh, get, told};

const RULES: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: deny, namespace: istio-system }
spec:
  compiledAdapter: denier
  params:
    status: { code: 7, message: first }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: nothing, namespace: istio-system }
spec:
  compiledTemplate: checknothing
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: all, namespace: istio-system }
spec:
  actions:
  - handler: deny
    instances: [ nothing ]
"#;

const FIRST: &str = "PERMISSION_DENIED:deny.handler.istio-system:first";

#[tokio::test]
async fn what_is_refused_leaves_its_last_good_version_in_force() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    let generation = mesh.generation();
    for (from, to, reason) in [
        (
            "code: 7",
            "code: 99",
            "rules.yaml:7: handler istio-system/deny: params: status.code: 99 is no",
        ),
        (
            "status:",
            "stat:",
            "rules.yaml:7: handler istio-system/deny: params: unknown field `stat`",
        ),
        (
            "compiledAdapter: denier",
            "compiledAdapter: denyer",
            "rules.yaml:6: handler istio-system/deny: compiledAdapter: unknown adapter \"denyer\"",
        ),
        (
            "compiledTemplate: checknothing",
            "compiledTemplate: nothing",
            "rules.yaml:14: instance istio-system/nothing: compiledTemplate: unknown template \"nothing\"",
        ),
        (
            "compiledTemplate: checknothing",
            "compiledTemplate: logentry",
            "does not take instances of logentry",
        ),
        (
            "compiledTemplate: checknothing",
            "compiledTemplate: checknothing\n  params: { x: '1' }",
            "params.x: the template has no such field",
        ),
        (
            "handler: deny\n",
            "handler: denyy\n",
            "rules.yaml:21: rule istio-system/all: actions[0].handler: there is no handler istio-system/denyy",
        ),
        (
            "instances: [ nothing ]",
            "instances: [ nothing, nothing ]",
            "is there twice",
        ),
        (
            "instances: [ nothing ]",
            "instances: []",
            "the action sends nothing",
        ),
        (
            "  actions:",
            "  match: request.path\n  actions:",
            "match: the match is STRING, not BOOL",
        ),
        (
            "  actions:",
            "  match: request.pth == \"a\"\n  actions:",
            "match: unknown attribute request.pth",
        ),
        (
            "  actions:",
            "  matsch: 'true'\n  actions:",
            "unknown field `matsch`",
        ),
        (
            "name: all,",
            "annotations: { policy.istio.io/fail-mode: maybe }, name: all,",
            "is \"maybe\", not open or closed",
        ),
    ] {
        let broken = RULES.replacen(from, to, 1);
        assert_ne!(broken, RULES, "{from}");
        mesh.apply("rules.yaml", Some(&broken)).await;
        let refused = mesh.refused();
        assert!(
            refused
                .iter()
                .any(|p| p.contains(reason) && p.ends_with("stays in force)")),
            "{reason}: {refused:?}"
        );
        assert_eq!(told(&mesh.check(&[]).await), FIRST, "{to}");
        assert_eq!(
            mesh.generation(),
            generation,
            "nothing in force has changed: {to}"
        );
        mesh.apply("rules.yaml", Some(RULES)).await;
        assert_eq!(mesh.refused(), [""; 0]);
    }
}

#[tokio::test]
async fn what_a_rule_uses_stays_until_the_rule_goes() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    let rule_only = RULES.rsplit("---").next().unwrap();
    mesh.apply("rules.yaml", Some(rule_only)).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    let refused = mesh.refused();
    assert!(
        refused
            .iter()
            .any(|p| p.contains("there is no handler istio-system/deny")),
        "{refused:?}"
    );
    // Again, from the same state: what was held is still held.
    let other =
        "apiVersion: config.istio.io/v1alpha2\nkind: checknothing\nmetadata: { name: other }\n";
    mesh.apply("other.yaml", Some(other)).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    mesh.apply("rules.yaml", Some("# nothing\n")).await;
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
    assert_eq!(mesh.refused(), [""; 0]);
}

#[tokio::test]
async fn a_file_that_is_no_yaml_changes_nothing() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    mesh.apply("rules.yaml", Some("kind: [ what\n  ever")).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    assert!(!mesh.refused().is_empty());
}

#[tokio::test]
async fn attributes_of_a_deleted_manifest_stay_while_rules_need_them() {
    let manifest = "
apiVersion: config.istio.io/v1alpha2
kind: attributemanifest
metadata: { name: mine, namespace: istio-system }
spec: { attributes: { my.attribute: { valueType: STRING } } }
";
    let rules = RULES.replace(
        "  actions:",
        "  match: (my.attribute | \"\") == \"x\"\n  actions:",
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules), ("manifest.yaml", manifest)]).await;
    let x = [("my.attribute", crate::support::text("x"))];
    assert_eq!(told(&mesh.check(&x).await), FIRST);
    mesh.apply("manifest.yaml", None).await;
    assert!(
        mesh.refused()[0].contains("unknown attribute my.attribute"),
        "{:?}",
        mesh.refused()
    );
    assert_eq!(told(&mesh.check(&x).await), FIRST);
    assert_eq!(told(&mesh.check(&[]).await), "OK:");
}

#[tokio::test]
async fn a_new_object_that_is_refused_disturbs_nobody() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    let dangling = RULES
        .rsplit("---")
        .next()
        .unwrap()
        .replace("name: all", "name: dangling")
        .replace("handler: deny", "handler: redisquota.ns");
    mesh.apply("new.yaml", Some(&dangling)).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    let refused = mesh.refused();
    assert_eq!(refused.len(), 1);
    assert!(
        refused[0]
            .starts_with("new.yaml:7: rule istio-system/dangling: actions[0].handler: there is no"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_debug_page_shows_what_is_in_force_and_what_is_wrong() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    mesh.apply("rules.yaml", Some(&RULES.replace("code: 7", "code: 0")))
        .await;
    let page: Json =
        serde_json::from_str(&get(mesh.running.admin_address, "/debug/config").await).unwrap();
    assert_eq!(page["generation"], mesh.generation().to_string());
    assert_eq!(page["rules"][0]["name"], "all.rule.istio-system");
    assert_eq!(
        page["rules"][0]["actions"][0]["handler"],
        "deny.handler.istio-system"
    );
    assert_eq!(page["problems"][0]["place"], "rules.yaml:7");
    assert_eq!(
        get(mesh.running.admin_address, "/healthz/ready").await,
        "ok\n"
    );
}

#[tokio::test]
async fn stopping_waits_for_what_is_under_way_and_frees_the_ports() {
    let mut mesh = Mesh::start(&[("rules.yaml", RULES)]).await;
    assert_eq!(told(&mesh.check(&[]).await), FIRST);
    let address = mesh.running.address;
    mesh.running.stop(Duration::from_secs(5)).await;
    tokio::net::TcpListener::bind(address).await.unwrap();
}
