//! What objects come to, and what is said of them.

use lateen_config::{ConfigSet, parse_file};

use super::*;
use crate::model::{DNS_DOMAIN, Snapshot};

/// A gateway's Service with a pod, two Services in two namespaces, a Gateway with two listeners.
const WORLD: &str = "
apiVersion: v1
kind: Service
metadata: { name: gateway, namespace: edge }
spec: { selector: { app: gateway }, ports: [{ name: http, port: 80, targetPort: 8080 }, { name: https, port: 443 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: gateway-1, namespace: edge, labels: { app: gateway } }
spec: { containers: [{ name: c, ports: [{ containerPort: 8080 }, { containerPort: 443 }] }] }
status: { podIP: 127.40.0.1, phase: Running }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop }
spec: { selector: { app: web }, ports: [{ name: http, port: 80 }] }
---
apiVersion: v1
kind: Service
metadata: { name: vault, namespace: bank }
spec: { selector: { app: vault }, ports: [{ name: http, port: 80 }] }
---
apiVersion: v1
kind: Namespace
metadata: { name: shop, labels: { tier: front } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: gw, namespace: edge }
spec:
  gatewayClassName: istio
  addresses: [{ type: Hostname, value: gateway }]
  listeners:
  - name: all
    port: 80
    protocol: HTTP
    allowedRoutes: { namespaces: { from: Selector, selector: { matchLabels: { tier: front } } } }
  - name: secure
    port: 443
    protocol: HTTPS
    hostname: '*.example.com'
    allowedRoutes: { namespaces: { from: All } }
    tls: { certificateRefs: [{ name: cert, namespace: bank }] }
---
";

fn objects(more: &str) -> Vec<Arc<Object>> {
    let (objects, problems) = parse_file("w.yaml", &format!("{WORLD}{more}"));
    let errors: Vec<_> = problems
        .iter()
        .filter(|problem| problem.is_error())
        .collect();
    assert!(errors.is_empty(), "{errors:?}");
    objects.into_iter().map(Arc::new).collect()
}

fn converted(more: &str) -> Output {
    convert(&objects(more), &MeshConfig::default(), DNS_DOMAIN, None)
}

fn spec<'a>(output: &'a Output, name: &str) -> &'a Value {
    let found = output
        .objects
        .iter()
        .find(|object| &*object.key.name == name);
    let names: Vec<_> = output
        .objects
        .iter()
        .map(|object| &object.key.name)
        .collect();
    &found
        .unwrap_or_else(|| panic!("no {name} among {names:?}"))
        .raw
}

/// A condition of an object: `STATUS REASON: MESSAGE`.
fn condition(output: &Output, kind: &str, name: &str, path: &str, of: &str) -> String {
    let status = output
        .statuses
        .iter()
        .find(|status| status.kind == kind && &*status.name == name)
        .unwrap();
    let conditions = status.value.pointer(path).unwrap();
    let one = conditions
        .as_array()
        .unwrap()
        .iter()
        .find(|condition| condition["type"] == of)
        .unwrap();
    let text = |name: &str| one[name].as_str().unwrap();
    format!("{} {}: {}", text("status"), text("reason"), text("message"))
}

fn route(namespace: &str, parent: &str, rest: &str) -> String {
    format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: r, namespace: {namespace} }}
spec:
  parentRefs: [{parent}]
  {rest}
---"
    )
}

const TO_GATEWAY: &str = "{ name: gw, namespace: edge }";

#[test]
fn a_route_attaches_where_namespace_and_host_allow() {
    let rules = "rules: [{ backendRefs: [{ name: web, port: 80 }] }]";
    let of = |namespace: &str, parent: &str, hosts: &str| {
        let output = converted(&route(
            namespace,
            parent,
            &format!("hostnames: [{hosts}]\n  {rules}"),
        ));
        condition(
            &output,
            "HTTPRoute",
            "r",
            "/parents/0/conditions",
            "Accepted",
        )
    };
    assert_eq!(
        of("shop", TO_GATEWAY, "a.example.com"),
        "True Accepted: Route was valid, bound to 2 parents"
    );
    assert_eq!(
        of("shop", TO_GATEWAY, "a.example.org"),
        "True Accepted: Route was valid"
    );
    // The listener for all hosts is not for namespace bank, the other not for this host.
    assert_eq!(
        of("bank", TO_GATEWAY, "a.example.org"),
        "False NotAllowedByListeners: hostnames matched parent hostname \"\", but namespace \"bank\" is not allowed by the parent"
    );
    assert_eq!(
        of(
            "shop",
            "{ name: gw, namespace: edge, sectionName: secure }",
            "a.example.org"
        ),
        "False NoMatchingListenerHostname: no hostnames matched parent hostname \"*.example.com\""
    );
    assert_eq!(
        of(
            "shop",
            "{ name: gw, namespace: edge, port: 81 }",
            "a.example.com"
        ),
        "False NoMatchingParent: port 81 not found; port 81 not found"
    );
}

#[test]
fn references_into_other_namespaces_need_a_grant() {
    const GRANT: &str = "
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: { name: g, namespace: bank }
spec:
  from: [{ group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop }, { group: gateway.networking.k8s.io, kind: Gateway, namespace: edge }]
  to: [{ group: '', kind: Service, name: vault }, { group: '', kind: Secret }]
---
apiVersion: v1
kind: Secret
metadata: { name: cert, namespace: bank }
stringData: { tls.crt: '-----BEGIN CERTIFICATE-----', tls.key: '-----BEGIN PRIVATE KEY-----' }
---";
    let to_vault = route(
        "shop",
        TO_GATEWAY,
        "rules: [{ backendRefs: [{ name: vault, namespace: bank, port: 80 }] }]",
    );
    let closed = converted(&to_vault);
    assert_eq!(
        condition(
            &closed,
            "HTTPRoute",
            "r",
            "/parents/0/conditions",
            "ResolvedRefs"
        ),
        "False RefNotPermitted: backendRef vault/bank not accessible to a HTTPRoute in namespace \"shop\" (missing a ReferenceGrant?)"
    );
    assert_eq!(
        condition(
            &closed,
            "Gateway",
            "gw",
            "/listeners/1/conditions",
            "ResolvedRefs"
        ),
        "False InvalidCertificateRef: invalid certificate reference //cert.bank, secret bank/cert not found"
    );
    let name = "edge~gw~istio-autogenerated-k8s-gateway~all~*";
    assert_eq!(
        spec(&closed, name)["http"][0]["route"][0]["destination"],
        serde_json::json!({})
    );
    assert!(closed.credentials.is_empty());

    let open = converted(&format!("{to_vault}{GRANT}"));
    assert_eq!(
        condition(
            &open,
            "HTTPRoute",
            "r",
            "/parents/0/conditions",
            "ResolvedRefs"
        ),
        "True ResolvedRefs: All references resolved"
    );
    assert_eq!(
        spec(&open, name)["http"][0]["route"][0]["destination"]["host"],
        "vault.bank.svc.cluster.local"
    );
    // Given to the pods behind the Gateway's Service, and to no others.
    let pods = &open.credentials["kubernetes-gateway://bank/cert"];
    assert_eq!(pods.iter().collect::<Vec<_>>(), ["edge"]);
}

#[test]
fn listeners_that_conflict_lose_to_the_first() {
    let output = converted(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: two, namespace: edge }
spec:
  gatewayClassName: lateen
  addresses: [{ type: Hostname, value: gateway }]
  listeners:
  - { name: first, port: 80, protocol: HTTP }
  - { name: other, port: 80, protocol: HTTP, hostname: a.example.com }
  - { name: tcp, port: 80, protocol: TCP }
  - { name: udp, port: 53, protocol: UDP }
",
    );
    let of = |index: usize, of: &str| {
        condition(
            &output,
            "Gateway",
            "two",
            &format!("/listeners/{index}/conditions"),
            of,
        )
    };
    assert_eq!(of(0, "Conflicted"), "False NoConflicts: No errors found");
    assert_eq!(of(1, "Conflicted"), "False NoConflicts: No errors found");
    assert!(of(2, "Conflicted").starts_with("True ProtocolConflict: "));
    assert!(of(2, "Accepted").starts_with("False ProtocolConflict: "));
    assert_eq!(
        of(3, "Accepted"),
        "False UnsupportedProtocol: protocol \"UDP\" is unsupported"
    );
    let made: Vec<_> = output
        .objects
        .iter()
        .filter(|object| object.key.name.starts_with("two~"))
        .map(|object| object.raw["servers"][0]["port"]["protocol"].clone())
        .collect();
    assert_eq!(made, ["HTTP", "HTTP"]);
    assert!(
        output.problems.iter().any(|problem| problem
            .to_string()
            .contains("Gateway edge/two: spec.listeners[3]: protocol \"UDP\" is unsupported")),
        "{:?}",
        output.problems
    );
}

#[test]
fn what_is_not_supported_is_said_and_nothing_half_of_it_is_served() {
    let output = converted(&route(
        "shop",
        TO_GATEWAY,
        "rules:
  - filters: [{ type: ExtensionRef, extensionRef: { group: x, kind: Y, name: z } }]
    backendRefs: [{ name: web, port: 80 }]",
    ));
    assert_eq!(
        condition(
            &output,
            "HTTPRoute",
            "r",
            "/parents/0/conditions",
            "ResolvedRefs"
        ),
        "False InvalidFilter: unsupported filter type \"ExtensionRef\""
    );
    assert!(
        output
            .objects
            .iter()
            .all(|object| &*object.key.kind == "Gateway")
    );
    assert!(output.problems.iter().any(|problem| {
        let text = problem.to_string();
        text.starts_with("w.yaml:") && text.contains("HTTPRoute shop/r")
    }));
}

#[test]
fn the_certificate_of_a_backend_must_have_the_policys_name() {
    let output = converted(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: { name: p, namespace: bank }
spec:
  targetRefs: [{ group: '', kind: Service, name: vault }]
  validation: { hostname: vault.example, wellKnownCACertificates: System }
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: { name: q, namespace: bank }
spec:
  targetRefs: [{ group: '', kind: Service, name: vault }]
  validation: { hostname: other.example, wellKnownCACertificates: System }
",
    );
    let rule = output
        .objects
        .iter()
        .find_map(|object| match &object.spec {
            Spec::DestinationRule(rule) => Some(rule),
            _ => None,
        })
        .unwrap();
    let tls = rule.traffic_policy.as_ref().unwrap().tls.as_ref().unwrap();
    assert_eq!(
        (tls.sni.as_str(), tls.subject_alt_names.as_slice()),
        ("vault.example", &["vault.example".to_owned()][..])
    );
    assert!(
        condition(
            &output,
            "BackendTLSPolicy",
            "q",
            "/ancestors/0/conditions",
            "Accepted"
        )
        .starts_with("False Conflicted: ")
    );
}

fn snapshot(more: &str) -> Snapshot {
    Snapshot::build(&ConfigSet {
        objects: objects(more),
        ..Default::default()
    })
}

#[test]
fn only_a_gateways_own_services_serve_it() {
    let elsewhere = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: foreign, namespace: shop }
spec:
  gatewayClassName: istio
  addresses: [{ type: Hostname, value: gateway.edge.svc.cluster.local }]
  listeners: [{ name: http, port: 80, protocol: HTTP }]
";
    let snapshot = snapshot(elsewhere);
    let services = |prefix: &str| {
        let all = snapshot.objects().iter();
        let found = all.filter(|object| object.key.name.starts_with(prefix));
        let annotation = |object: &Arc<Object>| object.annotations.get(GATEWAY_SERVICE).cloned();
        found.filter_map(annotation).collect::<Vec<_>>()
    };
    assert_eq!(services("gw~"), ["gateway.edge.svc.cluster.local"]);
    assert_eq!(services("foreign~"), [""]);
    let said = snapshot
        .gateway_statuses()
        .iter()
        .find(|status| &*status.name == "foreign")
        .unwrap();
    assert!(
        said.value.to_string().contains("AddressNotUsable"),
        "{}",
        said.value
    );
}

#[test]
fn routes_of_one_service_come_together_for_the_mesh() {
    let mesh = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: a, namespace: shop }
spec:
  parentRefs: [{ group: '', kind: Service, name: web, port: 80 }]
  rules: [{ backendRefs: [{ name: web, port: 80 }] }]
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: { name: b, namespace: shop }
spec:
  parentRefs: [{ group: '', kind: Service, name: web, port: 81 }]
  rules: [{ backendRefs: [{ name: web, port: 80 }] }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: c, namespace: bank }
spec:
  parentRefs: [{ group: '', kind: Service, name: web, namespace: shop }]
  rules: [{ backendRefs: [{ name: vault, port: 80 }] }]
";
    let snapshot = snapshot(mesh);
    let of = |namespace: &str| {
        let id = format!("sidecar~127.40.0.9~x.{namespace}~{namespace}.svc.cluster.local");
        let node = envoy_types::pb::envoy::config::core::v3::Node {
            id,
            ..Default::default()
        };
        let node = crate::model::Node::parse(Some(&node)).unwrap();
        let routes = snapshot.mesh_routes("web.shop.svc.cluster.local", &node);
        routes.map(|routes| {
            (
                routes.namespace().to_owned(),
                routes.spec().http.len(),
                routes.spec().tcp.len(),
            )
        })
    };
    assert_eq!(of("shop"), Some(("shop".into(), 1, 1)));
    // A Service's own namespace speaks for all clients, another for its own.
    assert_eq!(of("edge"), Some(("shop".into(), 1, 1)));
    assert_eq!(of("bank"), Some(("bank".into(), 1, 0)));
}

#[test]
fn ingresses_are_served_by_class() {
    let ingress = |spec: &str| {
        format!(
            "
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {{ name: i, namespace: shop }}
spec: {{ {spec} rules: [{{ host: a.example, http: {{ paths: [{{ path: /a, pathType: Prefix, backend: {{ service: {{ name: web, port: {{ name: http }} }} }} }}] }} }}] }}
"
        )
    };
    let ours = converted(&ingress("ingressClassName: istio,"));
    let route = spec(&ours, "a-example-i-istio-autogenerated-k8s-ingress");
    assert_eq!(
        route["http"][0]["route"][0]["destination"]["port"]["number"],
        80
    );
    let others = converted(&ingress("ingressClassName: nginx,"));
    assert!(
        others
            .objects
            .iter()
            .all(|object| !object.key.name.starts_with("a-example"))
    );
    assert!(
        others
            .problems
            .iter()
            .any(|problem| problem.reason.contains("not served"))
    );
}
