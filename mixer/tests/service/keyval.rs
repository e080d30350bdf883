//! Checks with output: what a handler finds out goes into headers.

use lateen_protocols::istio::mixer::v1::{HeaderOperation, header_operation::Operation};

use crate::support::{Mesh, map, text, told};

fn rules(operations: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: keyval, namespace: istio-system }}
spec: {{ compiledAdapter: keyval, params: {{ table: {{ jason: admin, kim: "two words" }} }} }}
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
  match: (request.path | "") != "/open"
  actions:
  - {{ handler: keyval.istio-system, instances: [ keyval ], name: x }}
{operations}
"#
    )
}

fn told_to(operations: Vec<HeaderOperation>) -> Vec<String> {
    let mark = |o: &HeaderOperation| match o.operation() {
        Operation::Replace => "=",
        Operation::Append => "+=",
        Operation::Remove => "-",
    };
    operations
        .iter()
        .map(|o| format!("{}{}{}", o.name, mark(o), o.value))
        .collect()
}

#[tokio::test]
async fn what_is_found_goes_into_headers_and_what_is_not_rejects() {
    let rules = rules(
        r#"  requestHeaderOperations:
  - { name: user-group, values: [ x.output.value ] }
  - { name: ":path", values: [ '"/status/418"' ] }
  - { name: both, values: [ 'x.output.value + "@" + (request.host | "nowhere")' ] }
  - { name: user, operation: REMOVE }
  responseHeaderOperations:
  - { name: group, values: [ x.output.value, '"more"' ], operation: APPEND }"#,
    );
    let mut mesh = Mesh::start(&[("rules.yaml", &rules)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let user = |name: &str| {
        [
            ("request.headers", map(&[("user", name)])),
            ("request.host", text("h")),
        ]
    };
    let answer = mesh.check(&user("jason")).await;
    assert_eq!(told(&answer), "OK:");
    assert_eq!(answer.valid_use_count, -1, "the proxy may keep it");
    let directive = answer.route_directive.unwrap();
    assert_eq!(
        told_to(directive.request_header_operations),
        [
            "user-group=admin",
            ":path=/status/418",
            "both=admin@h",
            "user-"
        ]
    );
    assert_eq!(
        told_to(directive.response_header_operations),
        ["group+=admin", "group+=more"]
    );
    // It is kept for requests that are equal in all that was read.
    let mut names: Vec<_> = answer.referenced_attributes.unwrap().words;
    names.sort();
    assert!(names.contains(&"user".to_owned()), "{names:?}");

    let answer = mesh.check(&user("jim")).await;
    assert_eq!(
        told(&answer),
        "NOT_FOUND:keyval.handler.istio-system:key \"jim\" is not in the table"
    );
    assert!(answer.route_directive.is_none());

    let answer = mesh.check(&[("request.path", text("/open"))]).await;
    assert_eq!(told(&answer), "OK:");
    assert!(answer.route_directive.is_none());
}

#[tokio::test]
async fn outputs_are_checked_when_the_rule_is_loaded() {
    for (operations, reason) in [
        ("x.output.nothing", "unknown attribute x.output.nothing"),
        ("y.output.value", "unknown attribute y.output.value"),
        (
            "x.output.value == \"a\"",
            "a header's value is BOOL, not STRING",
        ),
    ] {
        let operations =
            format!("  requestHeaderOperations: [ {{ name: a, values: [ '{operations}' ] }} ]");
        let mesh = Mesh::start(&[("rules.yaml", &rules(&operations))]).await;
        let refused = mesh.refused();
        assert!(
            refused.iter().any(|r| r.contains(reason)),
            "{reason}: {refused:?}"
        );
    }
    let named = rules("").replace("name: x }", "name: \"x-y\" }");
    let mesh = Mesh::start(&[("rules.yaml", &named)]).await;
    assert!(
        mesh.refused()
            .iter()
            .any(|r| r.contains("is no identifier"))
    );
}
