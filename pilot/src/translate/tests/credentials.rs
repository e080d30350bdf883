//! Who gets which Secret.

use super::*;

/// A Gateway with a certificate and authorities for its clients, and Secrets in three namespaces.
fn secrets() -> String {
    let pem = "-----BEGIN CERTIFICATE-----";
    let secret = |namespace: &str, name: &str, keys: &[&str]| {
        let data: Vec<_> = keys
            .iter()
            .map(|key| format!("{key}: {pem} {namespace}/{name}"))
            .collect();
        format!(
            "
---
apiVersion: v1
kind: Secret
metadata: {{ name: {name}, namespace: {namespace} }}
stringData: {{ {} }}
",
            data.join(", ")
        )
    };
    let gateway = "
apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata: { name: gateway, namespace: default }
spec:
  selector: { istio: ingressgateway }
  servers:
  - port: { number: 443, name: https, protocol: HTTPS }
    hosts: [a.example]
    tls: { mode: MUTUAL, credentialName: a }
  - port: { number: 443, name: https-b, protocol: HTTPS }
    hosts: [b.example]
    tls: { mode: SIMPLE, credentialName: b }
";
    [
        gateway.to_owned(),
        secret("istio-system", "a", &["tls.crt", "tls.key", "ca.crt"]),
        // Another namespace's, one that nobody names, and the one of clients' authorities.
        secret("default", "b", &["tls.crt", "tls.key"]),
        secret("istio-system", "unused", &["tls.crt", "tls.key"]),
        secret("istio-system", "a-cacert", &["ca.crt"]),
    ]
    .concat()
}

#[test]
fn a_verified_gateway_gets_what_it_names_from_its_own_namespace() {
    let snapshot = world(&secrets());
    let node = Node {
        verified: true,
        ..router("envoy")
    };
    let resources = translate(&snapshot, &node);
    let names: Vec<_> = resources.secrets.keys().collect();
    assert_eq!(names, ["kubernetes://a", "kubernetes://a-cacert"]);
    let authorities = resources.secrets["kubernetes://a-cacert"].clone();
    // The Secret of that name goes before `ca.crt` of the other.
    let shown = format!("{authorities:?}");
    let bytes = format!("{:?}", b"istio-system/a-cacert");
    assert!(shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
    let missing = "kubernetes://b: no Secret b with tls.crt and tls.key in namespace istio-system";
    assert!(
        resources.conflicts.iter().any(|text| text == missing),
        "{:?}",
        resources.conflicts
    );
}

#[test]
fn nobody_else_gets_any() {
    let snapshot = world(&secrets());
    let unverified = translate(&snapshot, &router("envoy"));
    assert_eq!(unverified.secrets, BTreeMap::new());
    assert!(
        unverified
            .conflicts
            .iter()
            .any(|text| text.contains("mTLS port"))
    );
    let other = Node {
        verified: true,
        ..sidecar("envoy")
    };
    assert_eq!(translate(&snapshot, &other).secrets, BTreeMap::new());
}
