//! Verdicts: deny, lists, order, caching, what they depend on.

use lateen_adapter::Value;
use lateen_protocols::dictionary::GLOBAL_WORDS;
use lateen_protocols::istio::mixer::v1::referenced_attributes::Condition;
use mixer::serve::{GENERATION, KNOWS_GENERATION};

use crate::support::{Mesh, get, map, seconds, text, told};

const DENY_V3: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: denyv3handler, namespace: default }
spec:
  compiledAdapter: denier
  params:
    status: { code: 7, message: Not allowed }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: denyv3request, namespace: default }
spec: { compiledTemplate: checknothing }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: denyv3, namespace: default }
spec:
  match: destination.labels["app"] == "ratings" && source.labels["version"] == "v3"
  actions:
  - handler: denyv3handler
    instances: [ denyv3request ]
"#;

fn to_ratings(version: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("destination.namespace", text("default")),
        ("destination.labels", map(&[("app", "ratings")])),
        (
            "source.labels",
            map(&[("app", "reviews"), ("version", version)]),
        ),
    ]
}

#[tokio::test]
async fn a_denier_denies_what_its_rule_matches() {
    let mut mesh = Mesh::start(&[("deny.yaml", DENY_V3)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let v3 = mesh.check(&to_ratings("v3")).await;
    assert_eq!(
        told(&v3),
        "PERMISSION_DENIED:denyv3handler.handler.default:Not allowed"
    );
    assert_eq!(told(&mesh.check(&to_ratings("v2")).await), "OK:");
    let elsewhere = [("destination.namespace", text("other"))];
    assert_eq!(
        told(&mesh.check(&elsewhere).await),
        "OK:",
        "the rule is default's"
    );
}

#[tokio::test]
async fn legacy_kinds_are_rules_too() {
    let legacy = DENY_V3
        .replace("kind: handler", "kind: denier")
        .replace(
            "  compiledAdapter: denier\n  params:\n    status:",
            "  status:",
        )
        .replace("kind: instance", "kind: checknothing")
        .replace("spec: { compiledTemplate: checknothing }", "spec:")
        .replace("handler: denyv3handler", "handler: denyv3handler.denier")
        .replace(
            "[ denyv3request ]",
            "[ denyv3request.checknothing.default ]",
        );
    let mut mesh = Mesh::start(&[("deny.yaml", &legacy)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let v3 = mesh.check(&to_ratings("v3")).await;
    assert_eq!(
        told(&v3),
        "PERMISSION_DENIED:denyv3handler.denier.default:Not allowed"
    );
}

#[tokio::test]
async fn answers_say_what_they_depend_on() {
    let mut mesh = Mesh::start(&[("deny.yaml", DENY_V3)]).await;
    let answer = mesh.check(&to_ratings("v2")).await;
    let referenced = answer.referenced_attributes.unwrap();
    let word = |index: i32| match usize::try_from(index) {
        Ok(index) => GLOBAL_WORDS[index].to_owned(),
        Err(_) => referenced.words[usize::try_from(-index - 1).unwrap()].clone(),
    };
    let mut names: Vec<String> = referenced
        .attribute_matches
        .iter()
        .map(|m| {
            let sign = if m.condition == i32::from(Condition::Absence) {
                "-"
            } else {
                ""
            };
            let key = if m.map_key == 0 {
                String::new()
            } else {
                format!("[{}]", word(m.map_key))
            };
            format!("{sign}{}{key}", word(m.name))
        })
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "-context.reporter.kind",
            "destination.labels[app]",
            "destination.namespace",
            "source.labels[version]"
        ]
    );
}

#[tokio::test]
async fn only_clients_that_know_generations_may_keep_answers() {
    let mut mesh = Mesh::start(&[("deny.yaml", DENY_V3)]).await;
    let plain = mesh.check(&to_ratings("v3")).await;
    assert_eq!(seconds(plain.valid_duration.as_ref()), 1.0);
    assert_eq!(plain.valid_use_count, 1000);
    let known = [(KNOWS_GENERATION, "1")];
    let response = mesh.call(&to_ratings("v3"), &[], "", &known).await;
    let generation = response
        .metadata()
        .get(GENERATION)
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    assert_eq!(generation, mesh.generation().to_string());
    let denial = response.into_inner().precondition.unwrap();
    assert_eq!(seconds(denial.valid_duration.as_ref()), 5.0);
    let nothing = mesh.call(&to_ratings("v1"), &[], "", &known).await;
    let nothing = nothing.into_inner().precondition.unwrap();
    assert_eq!(
        (
            seconds(nothing.valid_duration.as_ref()),
            nothing.valid_use_count
        ),
        (3600.0, -1)
    );

    mesh.apply(
        "deny.yaml",
        Some(&DENY_V3.replace("Not allowed", "Go away")),
    )
    .await;
    let response = mesh.call(&to_ratings("v3"), &[], "", &known).await;
    assert_ne!(
        response.metadata().get(GENERATION).unwrap(),
        generation.as_str()
    );
    assert!(told(&response.into_inner().precondition.unwrap()).ends_with("Go away"));
}

#[tokio::test]
async fn an_unchanged_configuration_keeps_its_generation() {
    let mut mesh = Mesh::start(&[("deny.yaml", DENY_V3)]).await;
    let before = mesh.generation();
    mesh.apply(
        "moved.yaml",
        Some(&format!("# the same, elsewhere\n{DENY_V3}")),
    )
    .await;
    mesh.apply("deny.yaml", None).await;
    assert_eq!(mesh.generation(), before);
}

const LISTS: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: { name: staticversion, namespace: istio-system }
spec: { overrides: ["v1", "v2"], blacklist: false }
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: { name: appversion, namespace: istio-system }
spec: { value: 'source.labels["version"]' }
---
apiVersion: config.istio.io/v1alpha2
kind: listchecker
metadata: { name: net, namespace: istio-system }
spec: { overrides: ["10.57.0.0/16", "2001:db8::/32"], entryType: IP_ADDRESSES }
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: { name: sourceip, namespace: istio-system }
spec: { value: 'source.ip | ip("0.0.0.0")' }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: versions, namespace: istio-system }
spec:
  match: (destination.labels["app"] | "") == "ratings"
  actions: [ { handler: staticversion.listchecker, instances: [ appversion.listentry ] } ]
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: network, namespace: istio-system }
spec:
  match: (source.labels["istio"] | "") == "ingressgateway"
  actions: [ { handler: net.listchecker, instances: [ sourceip.listentry ] } ]
"#;

#[tokio::test]
async fn lists_allow_what_is_on_them() {
    let mut mesh = Mesh::start(&[("lists.yaml", LISTS)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(told(&mesh.check(&to_ratings("v2")).await), "OK:");
    assert_eq!(
        told(&mesh.check(&to_ratings("v3")).await),
        "PERMISSION_DENIED:staticversion.listchecker.istio-system:v3 is not whitelisted"
    );
    let from = |ip: &str| {
        vec![
            ("source.labels", map(&[("istio", "ingressgateway")])),
            ("source.ip", Value::Ip(ip.parse().unwrap())),
        ]
    };
    for ip in ["10.57.3.4", "2001:db8::7"] {
        assert_eq!(told(&mesh.check(&from(ip)).await), "OK:");
    }
    assert_eq!(
        told(&mesh.check(&from("10.58.0.1")).await),
        "PERMISSION_DENIED:net.listchecker.istio-system:10.58.0.1 is not whitelisted"
    );
}

#[tokio::test]
async fn the_first_rule_in_order_gives_the_code_and_all_give_their_reasons() {
    let one = |name: &str, code: u32| {
        format!(
            r#"
apiVersion: config.istio.io/v1alpha2
kind: denier
metadata: {{ name: {name}, namespace: istio-system }}
spec: {{ status: {{ code: {code}, message: {name} }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: {name}, namespace: istio-system }}
spec: {{ actions: [ {{ handler: {name}.denier, instances: [ nothing.checknothing ] }} ] }}
---
"#
        )
    };
    let nothing = "
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: nothing, namespace: istio-system }
";
    let text = format!("{}{}{nothing}", one("b", 16), one("a", 8));
    let mut mesh = Mesh::start(&[("rules.yaml", &text)]).await;
    let want = "RESOURCE_EXHAUSTED:a.denier.istio-system:a, b.denier.istio-system:b";
    for _ in 0..20 {
        assert_eq!(told(&mesh.check(&[]).await), want);
    }
    let urgent = text.replacen(
        "kind: rule\nmetadata: { name: b,",
        "kind: rule\nmetadata: { annotations: { policy.istio.io/priority: '1' }, name: b,",
        1,
    );
    mesh.apply("rules.yaml", Some(&urgent)).await;
    let want = "UNAUTHENTICATED:b.denier.istio-system:b, a.denier.istio-system:a";
    assert_eq!(told(&mesh.check(&[]).await), want);
}

#[tokio::test]
async fn a_match_on_an_absent_attribute_denies_unless_the_rule_fails_open() {
    let mut mesh = Mesh::start(&[("deny.yaml", DENY_V3)]).await;
    let poor = [
        ("destination.namespace", text("default")),
        ("destination.labels", map(&[("app", "ratings")])),
    ];
    assert_eq!(
        told(&mesh.check(&poor).await),
        "PERMISSION_DENIED:denyv3.rule.default:lookup failed: 'source.labels'"
    );
    let warned = mesh.problems();
    assert!(
        warned
            .iter()
            .any(|p| !p.is_refused && p.field == "match" && p.place == "deny.yaml:19"),
        "{warned:?}"
    );
    let open = DENY_V3.replace(
        "metadata: { name: denyv3, ",
        "metadata: { annotations: { policy.istio.io/fail-mode: open }, name: denyv3, ",
    );
    mesh.apply("deny.yaml", Some(&open)).await;
    assert_eq!(told(&mesh.check(&poor).await), "OK:");
    let own = get(mesh.running.admin_address, "/metrics").await;
    assert!(
        own.contains("mixer_match_errors_total{rule=\"denyv3.rule.default\"} 2"),
        "{own}"
    );
}

#[tokio::test]
async fn a_direct_response_reaches_the_proxy() {
    let direct = DENY_V3.replace(
        "status: { code: 7, message: Not allowed }",
        "status: { code: 7, message: Moved, details: [ { '@type': \
         type.googleapis.com/istio.policy.v1beta1.DirectHttpResponse, code: 302, body: there, \
         headers: { location: /login } } ] }",
    );
    let mut mesh = Mesh::start(&[("deny.yaml", &direct)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let directive = mesh.check(&to_ratings("v3")).await.route_directive.unwrap();
    assert_eq!(
        (
            directive.direct_response_code,
            directive.direct_response_body.as_str()
        ),
        (302, "there")
    );
    let header = &directive.response_header_operations[0];
    assert_eq!(
        (header.name.as_str(), header.value.as_str()),
        ("location", "/login")
    );
}

#[tokio::test]
async fn headers_are_changed_by_rules_that_match() {
    let rule = r#"
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: headers, namespace: istio-system }
spec:
  match: (request.path | "") == "/"
  requestHeaderOperations:
  - { name: x-user, values: [ 'source.user | ""', '"second"' ] }
  - { name: x-empty, values: [ '""' ] }
  - { name: x-gone, operation: REMOVE }
  responseHeaderOperations:
  - { name: x-mixer, values: [ '"yes"' ], operation: APPEND }
"#;
    let mut mesh = Mesh::start(&[("rule.yaml", rule)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    assert_eq!(mesh.check(&[]).await.route_directive, None);
    let answer = mesh
        .check(&[("request.path", text("/")), ("source.user", text("jason"))])
        .await;
    let directive = answer.route_directive.unwrap();
    let told: Vec<_> = directive
        .request_header_operations
        .iter()
        .chain(&directive.response_header_operations)
        .map(|o| (o.name.as_str(), o.value.as_str(), o.operation))
        .collect();
    assert_eq!(
        told,
        [
            ("x-user", "jason", 0),
            ("x-user", "second", 2),
            ("x-gone", "", 1),
            ("x-mixer", "yes", 2)
        ]
    );
}
