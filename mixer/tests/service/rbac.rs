//! The rbac adapter: policies from the folder, who may do what, where, and what permissive means.

use crate::support::{Mesh, get, map, text, told};

const ASK: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: authorization
metadata: { name: requestcontext, namespace: istio-system }
spec:
  subject:
    user: source.principal | ""
    groups: request.headers["groups"] | ""
    properties:
      namespace: source.namespace | ""
      ip: source.ip | ip("0.0.0.0")
  action:
    namespace: destination.namespace | ""
    service: destination.service.host | ""
    method: request.method | ""
    path: request.path | ""
    properties: { version: 'request.headers["version"] | ""' }
---
apiVersion: config.istio.io/v1alpha2
kind: rbac
metadata: { name: handler, namespace: istio-system }
spec: { config_store_url: "k8s://" }
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: rbaccheck, namespace: istio-system }
spec: { actions: [ { handler: handler.rbac, instances: [ requestcontext.authorization ] } ] }
"#;

const POLICIES: &str = r#"
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: { name: products-viewer, namespace: default }
spec:
  rules:
  - services: [ products.default.svc.cluster.local ]
    methods: [ GET, HEAD ]
    constraints: [ { key: version, values: [ v1, "v2*" ] } ]
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: { name: products, namespace: default }
spec:
  subjects:
  - user: alice@yahoo.com
  - group: readers
  - properties: { namespace: abc, ip: "10.1.*" }
  roleRef: { kind: ServiceRole, name: products-viewer }
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: { name: book-reader, namespace: default }
spec:
  rules:
  - { services: [ "reviews*" ], methods: [ "*" ] }
  - { services: [ bookstore.default.svc.cluster.local ], paths: [ "*/review" ], methods: [ GET ] }
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: { name: book, namespace: default }
spec:
  subjects: [ { properties: { namespace: acme } } ]
  roleRef: { kind: ServiceRole, name: book-reader }
"#;

const DENIED: &str = "PERMISSION_DENIED:handler.rbac.istio-system:RBAC: permission denied.";

/// `user groups namespace ip METHOD host path version`, `-` for nothing.
async fn ask(mesh: &mut Mesh, request: &str) -> String {
    let parts: Vec<_> = request
        .split(' ')
        .map(|p| if p == "-" { "" } else { p })
        .collect();
    let [user, groups, namespace, ip, method, host, path, version] = parts[..] else {
        panic!("{request}");
    };
    let mut attributes = vec![
        ("destination.namespace", text("default")),
        (
            "request.headers",
            map(&[("groups", groups), ("version", version)]),
        ),
    ];
    for (name, value) in [
        ("source.principal", user),
        ("source.namespace", namespace),
        ("request.method", method),
        ("request.path", path),
    ] {
        if !value.is_empty() {
            attributes.push((name, text(value)));
        }
    }
    let host = format!("{host}.default.svc.cluster.local");
    attributes.push(("destination.service.host", text(&host)));
    if !ip.is_empty() {
        let ip = lateen_adapter::value::address(ip.parse().unwrap());
        attributes.push(("source.ip", ip));
    }
    told(&mesh.check(&attributes).await)
}

#[tokio::test]
async fn a_role_permits_what_it_says_to_those_who_have_it() {
    let mut mesh = Mesh::start(&[("ask.yaml", ASK), ("policies.yaml", POLICIES)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    for (request, is_permitted) in [
        ("alice@yahoo.com - - - GET products /p v1", true),
        ("alice@yahoo.com - - - HEAD products /p v2beta", true),
        ("alice@yahoo.com - - - POST products /p v1", false),
        ("alice@yahoo.com - - - GET products /p v3", false),
        ("alice@yahoo.com - - - GET products /p -", false),
        ("alice@yahoo.com - - - GET details /p v1", false),
        ("alice@yahoo.co - - - GET products /p v1", false),
        ("bob writers,readers - - GET products /p v1", true),
        ("bob writers - - GET products /p v1", false),
        ("- - abc 10.1.2.3 GET products /p v1", true),
        ("- - abc 10.2.2.3 GET products /p v1", false),
        ("- - ab 10.1.2.3 GET products /p v1", false),
        ("- - acme - DELETE reviews-v2 /x -", true),
        ("- - acme - - reviews - -", true), // TCP: the rule asks for nothing of HTTP
        ("- - acme - GET bookstore /a/review -", true),
        ("- - acme - GET bookstore /a/reviews -", false),
        ("- - acme - PUT bookstore /a/review -", false),
        ("- - - - GET reviews / -", false),
    ] {
        let want = if is_permitted { "OK:" } else { DENIED };
        assert_eq!(ask(&mut mesh, request).await, want, "{request}");
    }
}

#[tokio::test]
async fn verdicts_are_reused_until_a_policy_changes() {
    let mut mesh = Mesh::start(&[("ask.yaml", ASK), ("policies.yaml", POLICIES)]).await;
    let before = mesh.generation();
    let request = "bob - - - GET products /p v1";
    assert_eq!(ask(&mut mesh, request).await, DENIED);
    mesh.apply(
        "policies.yaml",
        Some(&POLICIES.replace("alice@yahoo.com", "bob")),
    )
    .await;
    assert!(
        mesh.generation() > before,
        "proxies drop what they have kept"
    );
    assert_eq!(ask(&mut mesh, request).await, "OK:");
    // A policy that is wrong is refused; the one before it stays.
    mesh.apply(
        "policies.yaml",
        Some(&POLICIES.replace("user: alice@yahoo.com", "usr: bob")),
    )
    .await;
    let refused = mesh.refused();
    assert!(
        refused.len() == 1 && refused[0].contains("usr") && refused[0].contains("policies.yaml:"),
        "{refused:?}"
    );
    assert_eq!(ask(&mut mesh, request).await, "OK:");
    // Without policies there is nobody with a role.
    mesh.apply("policies.yaml", None).await;
    assert_eq!(ask(&mut mesh, request).await, DENIED);
}

#[tokio::test]
async fn what_is_wrong_with_policies_is_told() {
    let wrong = r#"
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: { name: nothing, namespace: default }
spec: { rules: [ { services: [] } ] }
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: { name: everybody, namespace: default }
spec: { subjects: [ {} ], roleRef: { kind: ServiceRole, name: nothing } }
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: { name: dangling, namespace: default }
spec: { subjects: [ { user: "*" } ], roleRef: { kind: ServiceRole, name: nowhere } }
---
apiVersion: rbac.istio.io/v1alpha1
kind: RbacConfig
metadata: { name: other, namespace: istio-system }
spec: { mode: "ON" }
"#;
    let mesh = Mesh::start(&[("wrong.yaml", wrong)]).await;
    let problems = mesh.problems();
    for want in [
        "spec.rules[0]: says nothing; name services",
        "spec.subjects[0]: says nothing; name a user",
        "there is no ServiceRole default/nowhere",
        "must be called default",
    ] {
        assert!(
            problems.iter().any(|p| p.to_string().contains(want)),
            "{want}: {problems:?}"
        );
    }
}

#[tokio::test]
async fn the_configuration_says_where_it_is_enforced() {
    let config = |spec: &str| {
        format!(
            "{POLICIES}\n---\napiVersion: rbac.istio.io/v1alpha1\nkind: ClusterRbacConfig\n\
             metadata: {{ name: default }}\nspec: {spec}\n"
        )
    };
    let mut mesh = Mesh::start(&[("ask.yaml", ASK), ("policies.yaml", POLICIES)]).await;
    let products = "mallory - - - GET products /p v1";
    let details = "mallory - - - GET details /p v1";
    for (spec, are_denied) in [
        ("{ mode: \"ON\" }", [true, true]),
        ("{ mode: \"OFF\" }", [false, false]),
        (
            "{ mode: ON_WITH_INCLUSION, inclusion: { services: [ products.default.svc.cluster.local ] } }",
            [true, false],
        ),
        (
            "{ mode: ON_WITH_EXCLUSION, exclusion: { services: [ products.default.svc.cluster.local ] } }",
            [false, true],
        ),
        (
            "{ mode: ON_WITH_EXCLUSION, exclusion: { namespaces: [ default ] } }",
            [false, false],
        ),
        (
            "{ mode: \"ON\", enforcement_mode: PERMISSIVE }",
            [false, false],
        ),
    ] {
        mesh.apply("policies.yaml", Some(&config(spec))).await;
        assert_eq!(mesh.refused(), [""; 0]);
        for (request, is_denied) in [products, details].into_iter().zip(are_denied) {
            let want = if is_denied { DENIED } else { "OK:" };
            assert_eq!(ask(&mut mesh, request).await, want, "{spec} {request}");
        }
    }
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    let counted = "adapter=\"rbac\",event=\"permissive_denied\"} 2\n";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn a_permissive_binding_permits_nothing_and_is_counted() {
    let policies = POLICIES.replace(
        "roleRef: { kind: ServiceRole, name: products-viewer }",
        "mode: PERMISSIVE\n  roleRef: { kind: ServiceRole, name: products-viewer }",
    );
    let mut mesh = Mesh::start(&[("ask.yaml", ASK), ("policies.yaml", &policies)]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let alice = "alice@yahoo.com - - - GET products /p v1";
    assert_eq!(ask(&mut mesh, alice).await, DENIED);
    let metrics = get(mesh.running.admin_address, "/metrics").await;
    let counted = "adapter=\"rbac\",event=\"permissive_allowed\"} 1\n";
    assert!(metrics.contains(counted), "{metrics}");
}
