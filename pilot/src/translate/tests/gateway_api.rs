//! Gateway API at the gateway: what routes and TLS become.

use super::*;

const PEM: &str = "-----BEGIN CERTIFICATE-----";

fn gateway(more: &str) -> String {
    format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{ name: gw, namespace: istio-system }}
spec:
  gatewayClassName: istio
  addresses: [{{ type: Hostname, value: istio-ingressgateway }}]
  listeners:
  - {{ name: http, port: 80, protocol: HTTP, hostname: '*.example.com', allowedRoutes: {{ namespaces: {{ from: All }} }} }}
  - {{ name: pass, port: 443, protocol: TLS, tls: {{ mode: Passthrough }}, hostname: pass.example.com, allowedRoutes: {{ namespaces: {{ from: All }} }} }}
  - name: https
    port: 443
    protocol: HTTPS
    hostname: a.example.com
    tls: {{ certificateRefs: [{{ name: cert, namespace: certs }}] }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: istio-ingressgateway-x, namespace: istio-system, labels: {{ istio: ingressgateway }} }}
spec: {{ containers: [{{ name: c, ports: [{{ containerPort: 8080 }}, {{ containerPort: 8443 }}] }}] }}
status: {{ podIP: 127.30.0.5, phase: Running }}
---
apiVersion: v1
kind: Secret
metadata: {{ name: cert, namespace: certs }}
stringData: {{ tls.crt: {PEM}, tls.key: {PEM} }}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{ name: grant, namespace: certs }}
spec:
  from: [{{ group: gateway.networking.k8s.io, kind: Gateway, namespace: istio-system }}]
  to: [{{ group: '', kind: Secret }}]
---{more}"
    )
}

const ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: r, namespace: default }
spec:
  parentRefs: [{ name: gw, namespace: istio-system, sectionName: http }]
  hostnames: [a.example.com]
  rules:
  - matches: [{ path: { value: /a/ } }]
    backendRefs: [{ name: reviews, port: 9080 }]
  - matches: [{ path: { value: /long/redirect } }]
    filters: [{ type: RequestRedirect, requestRedirect: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /to } } }]
  - matches: [{ path: { value: /long/to-root } }]
    filters: [{ type: RequestRedirect, requestRedirect: { path: { type: ReplacePrefixMatch, replacePrefixMatch: / } } }]
  - matches: [{ path: { value: /half } }]
    backendRefs: [{ name: reviews, port: 9080 }, { name: nobody, namespace: other, port: 1 }]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: { name: t, namespace: default }
spec:
  parentRefs: [{ name: gw, namespace: istio-system, sectionName: pass }]
  hostnames: [pass.example.com]
  rules: [{ backendRefs: [{ name: ratings, port: 9080 }] }]
";

#[test]
fn paths_match_by_segment_and_what_is_not_there_is_500() {
    let resources = translate(&world(&gateway(ROUTES)), &router("envoy"));
    let routes = j(&resources.routes["http.8080"]);
    let routes = &routes["virtual_hosts"][0]["routes"];
    let all: Vec<Value> = routes
        .as_array()
        .unwrap()
        .iter()
        .map(|route| {
            json!([
                route["match"]["path_separated_prefix"],
                route["redirect"],
                route["route"]["cluster"],
                route["route"]["weighted_clusters"]["clusters"]
                    .as_array()
                    .map(|all| all
                        .iter()
                        .map(|one| one["name"].clone())
                        .collect::<Vec<_>>()),
            ])
        })
        .collect();
    let reviews = "outbound|9080||reviews.default.svc.cluster.local";
    assert_eq!(all[0][0], "/long/redirect");
    assert_eq!(all[0][1]["prefix_rewrite"], "/to");
    assert_eq!(all[1][0], "/long/to-root");
    assert_eq!(all[1][1]["regex_rewrite"]["substitution"], r"/\2");
    assert_eq!(
        all[2],
        json!(["/half", null, null, [reviews, "UnknownService"]])
    );
    assert_eq!(all[3], json!(["/a", null, reviews, null]));
    for route in routes.as_array().unwrap().iter().skip(2) {
        assert_eq!(
            route["route"]["cluster_not_found_response_code"],
            "INTERNAL_SERVER_ERROR"
        );
    }
}

#[test]
fn tls_is_ended_or_passed_on_by_listener() {
    let snapshot = world(&gateway(ROUTES));
    let node = Node {
        verified: true,
        ..router("envoy")
    };
    let resources = translate(&snapshot, &node);
    let listener = j(&resources.listeners["127.30.0.5_8443"]);
    let chains: Vec<Value> = listener["filter_chains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|chain| {
            let secret = chain.pointer(
                "/transport_socket/typed_config/common_tls_context/tls_certificate_sds_secret_configs/0/name",
            );
            json!([chain["filter_chain_match"]["server_names"], secret])
        })
        .collect();
    assert_eq!(
        chains,
        [
            json!([["a.example.com"], "kubernetes-gateway://certs/cert"]),
            json!([["pass.example.com"], null]),
        ]
    );
    // From another namespace, which grants it; to nobody else who asks by that name.
    assert_eq!(
        resources.secrets.keys().collect::<Vec<_>>(),
        ["kubernetes-gateway://certs/cert"]
    );
    let without = gateway("").replace(
        "kind: Gateway, namespace: istio-system",
        "kind: Gateway, namespace: elsewhere",
    );
    let resources = translate(&world(&without), &node);
    assert_eq!(resources.secrets, BTreeMap::new());
    assert_eq!(
        j(&resources.listeners["127.30.0.5_8080"])["name"],
        "127.30.0.5_8080"
    );
    assert!(!resources.listeners.contains_key("127.30.0.5_8443"));
}

#[test]
fn a_gateway_of_istios_own_kind_gets_nothing_by_such_a_name() {
    let thief = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: thief, namespace: default }
spec:
  selector: { app: reviews }
  servers:
  - port: { number: 443, name: https, protocol: HTTPS }
    hosts: ['*']
    tls: { mode: SIMPLE, credentialName: 'kubernetes-gateway://certs/cert' }
";
    let snapshot = world(&gateway(thief));
    let node = Node {
        verified: true,
        ..node(
            "envoy",
            "
id: router~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, INTERCEPTION_MODE: NONE, LABELS: { app: reviews } }
",
        )
    };
    let resources = translate(&snapshot, &node);
    assert_eq!(resources.secrets, BTreeMap::new());
    assert!(
        resources
            .conflicts
            .iter()
            .any(|text| text.contains("gives it to pods of namespace default")),
        "{:?}",
        resources.conflicts
    );
}

#[test]
fn a_backends_certificate_is_verified_by_its_policy() {
    let policy = format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {{ name: p, namespace: default }}
spec:
  targetRefs: [{{ group: '', kind: Service, name: ratings }}]
  validation: {{ hostname: ratings.example, caCertificateRefs: [{{ group: '', kind: ConfigMap, name: ca }}] }}
---
apiVersion: v1
kind: ConfigMap
metadata: {{ name: ca, namespace: default }}
data: {{ ca.crt: '{PEM} x' }}
"
    );
    let node = Node {
        verified: true,
        ..router("envoy")
    };
    let resources = translate(&world(&gateway(&format!("{ROUTES}---{policy}"))), &node);
    let cluster = j(&resources.clusters["outbound|9080||ratings.default.svc.cluster.local"]);
    let text = cluster.to_string();
    assert!(text.contains("ratings.example"), "{text}");
    assert!(text.contains("configmap://default/ca-cacert"), "{text}");
    assert!(
        resources
            .secrets
            .contains_key("configmap://default/ca-cacert")
    );
}
