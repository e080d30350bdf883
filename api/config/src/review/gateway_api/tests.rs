//! A right object of each kind, and what is wrong when a line of it is another.

use crate::{Problem, parse_file, validate};

const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: g }
spec:
  gatewayClassName: istio
  addresses: [{ type: Hostname, value: a }]
  listeners:
  - { name: http, port: 80, protocol: HTTP, hostname: '*.example.com' }
  - { name: tls, port: 443, protocol: HTTPS, tls: { certificateRefs: [{ name: c }] } }
";

const HTTP: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: r }
spec:
  parentRefs: [{ name: g, sectionName: http }]
  hostnames: [a.example.com]
  rules:
  - matches: [{ path: { type: PathPrefix, value: /a }, method: GET, headers: [{ name: x, value: y }] }]
    filters: [{ type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: a, value: b }] } }]
    timeouts: { request: 10s, backendRequest: 2s }
    backendRefs: [{ name: web, port: 80, weight: 3 }]
";

const GRPC: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: { name: r }
spec:
  rules:
  - matches: [{ method: { service: a.B, method: C } }]
    backendRefs: [{ name: web, port: 80 }]
";

const POLICY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: { name: p }
spec:
  targetRefs: [{ group: '', kind: Service, name: web }]
  validation: { hostname: web.example, wellKnownCACertificates: System }
";

const GRANT: &str = "
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: { name: g }
spec:
  from: [{ group: gateway.networking.k8s.io, kind: Gateway, namespace: a }]
  to: [{ group: '', kind: Secret }]
";

const TCP: &str = "
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: { name: t }
spec:
  rules:
  - backendRefs: [{ name: web, port: 80 }]
";

fn problems(text: &str) -> Vec<Problem> {
    let (objects, mut problems) = parse_file("f.yaml", text);
    problems.extend(objects.iter().flat_map(validate));
    problems
}

#[test]
fn what_is_right_has_no_problems() {
    for text in [GATEWAY, HTTP, GRPC, POLICY, GRANT, TCP] {
        assert_eq!(problems(text), [], "{text}");
    }
}

#[test]
fn what_the_definitions_refuse_is_refused_with_its_place() {
    for (text, from, to, place) in [
        (
            GATEWAY,
            "gatewayClassName: istio",
            "gatewayClassName: ''",
            "6: Gateway default/g: spec.gatewayClassName: missing",
        ),
        (
            GATEWAY,
            "name: tls, port: 443",
            "name: http, port: 443",
            "10: Gateway default/g: spec.listeners[1].name: \"http\" is there twice",
        ),
        (
            GATEWAY,
            "port: 80",
            "port: 0",
            "9: Gateway default/g: spec.listeners[0].port: port 0",
        ),
        (
            GATEWAY,
            "'*.example.com'",
            "'a.*.com'",
            "9: Gateway default/g: spec.listeners[0].hostname: ",
        ),
        (
            GATEWAY,
            "'*.example.com'",
            "10.0.0.1",
            "9: Gateway default/g: spec.listeners[0].hostname: \"10.0.0.1\" is an IP",
        ),
        (
            GATEWAY,
            "protocol: HTTPS, tls: { certificateRefs: [{ name: c }] }",
            "protocol: HTTPS, tls: { mode: Passthrough }",
            "10: Gateway default/g: spec.listeners[1].tls.mode: must be Terminate",
        ),
        (
            GATEWAY,
            "protocol: HTTPS",
            "protocol: HTTP",
            "10: Gateway default/g: spec.listeners[1].tls: is not for protocol HTTP",
        ),
        (
            GATEWAY,
            "certificateRefs: [{ name: c }]",
            "mode: Terminate",
            "10: Gateway default/g: spec.listeners[1].tls.certificateRefs: certificateRefs or options",
        ),
        (
            HTTP,
            "/a }",
            "a }",
            "9: HTTPRoute default/r: spec.rules[0].matches[0].path.value: \"a\" must begin with /",
        ),
        (
            HTTP,
            "/a }",
            "/a/../b }",
            "9: HTTPRoute default/r: spec.rules[0].matches[0].path.value: \"/a/../b\" may not contain",
        ),
        (
            HTTP,
            "method: GET",
            "method: get",
            "9: HTTPRoute default/r: spec.rules[0].matches[0].method: \"get\" is not one of",
        ),
        (
            HTTP,
            "port: 80, ",
            "",
            "12: HTTPRoute default/r: spec.rules[0].backendRefs[0].port: missing",
        ),
        (
            HTTP,
            "weight: 3",
            "weight: 1000001",
            "12: HTTPRoute default/r: spec.rules[0].backendRefs[0].weight: ",
        ),
        (
            HTTP,
            "backendRequest: 2s",
            "backendRequest: 20s",
            "11: HTTPRoute default/r: spec.rules[0].timeouts.backendRequest: may not be longer",
        ),
        (
            HTTP,
            "request: 10s",
            "request: 1.5s",
            "11: HTTPRoute default/r: spec.rules[0].timeouts.request: \"1.5s\" is not a duration",
        ),
        (
            HTTP,
            "requestHeaderModifier: {",
            "urlRewrite: {}, requestHeaderModifier: {",
            "10: HTTPRoute default/r: spec.rules[0].filters[0].urlRewrite: is for type URLRewrite",
        ),
        (
            HTTP,
            "type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: a, value: b }] }",
            "type: RequestRedirect, requestRedirect: {}",
            "12: HTTPRoute default/r: spec.rules[0].backendRefs: are not for a rule with a RequestRedirect",
        ),
        (
            HTTP,
            "[{ name: g, sectionName: http }]",
            "[{ name: g }, { name: g, sectionName: http }]",
            "6: HTTPRoute default/r: spec.parentRefs[1]: sectionName or port must be set",
        ),
        (
            GRPC,
            "service: a.B, method: C",
            "service: a/B",
            "7: GRPCRoute default/r: spec.rules[0].matches[0].method.service: ",
        ),
        (
            GRPC,
            "{ service: a.B, method: C }",
            "{}",
            "7: GRPCRoute default/r: spec.rules[0].matches[0].method: service or method",
        ),
        (
            POLICY,
            ", wellKnownCACertificates: System",
            "",
            "7: BackendTLSPolicy default/p: spec.validation.caCertificateRefs: ",
        ),
        (
            POLICY,
            "hostname: web.example",
            "hostname: '*.example'",
            "7: BackendTLSPolicy default/p: spec.validation.hostname: ",
        ),
        (
            GRANT,
            "[{ group: '', kind: Secret }]",
            "[]",
            "7: ReferenceGrant default/g: spec.to: at least one",
        ),
        (
            TCP,
            "[{ name: web, port: 80 }]",
            "[]",
            "7: TCPRoute default/t: spec.rules[0].backendRefs: at least one",
        ),
        (
            TCP,
            "v1alpha2",
            "v2",
            "2: TCPRoute default/t: apiVersion: TCPRoute has no version \"v2\"",
        ),
        (
            HTTP,
            "weight: 3",
            "weight: many",
            "12: HTTPRoute default/r: spec.rules[0].backendRefs[0].weight: ",
        ),
    ] {
        assert!(text.contains(from), "{from}");
        let problems = problems(&text.replace(from, to));
        let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let expected = format!("f.yaml:{place}");
        assert!(
            problems
                .iter()
                .any(|problem| problem.is_error() && problem.to_string().starts_with(&expected)),
            "{to}: expected {expected}, got {shown:?}"
        );
    }
}

#[test]
fn an_unknown_field_is_dropped_with_a_warning() {
    let (objects, problems) = parse_file("f.yaml", &HTTP.replace("weight: 3", "wieght: 3"));
    assert_eq!(objects.len(), 1);
    let shown: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "f.yaml:12: HTTPRoute default/r: spec.rules[0].backendRefs[0].wieght: no field of this kind; ignored (is it misspelt?)"
        ]
    );
    assert!(!problems[0].is_error());
}
