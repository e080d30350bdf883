use lateen_config::parse_file;
use serde_json::{Value, json};

use super::*;

fn snapshot(yaml: &str) -> Snapshot {
    let (objects, problems) = parse_file("test.yaml", yaml);
    assert!(
        problems.iter().all(|problem| !problem.is_error()),
        "{problems:?}"
    );
    Snapshot::build(&ConfigSet {
        objects: objects.into_iter().map(Arc::new).collect(),
        problems: Vec::new(),
        generation: 1,
    })
}

fn node(name: &str, namespace: &str, labels: &[(&str, &str)]) -> Node {
    let raw = envoy_types::pb::envoy::config::core::v3::Node {
        id: format!("sidecar~127.1.0.1~{name}.{namespace}~{namespace}.svc.cluster.local"),
        ..Default::default()
    };
    let mut node = Node::parse(Some(&raw)).unwrap();
    node.labels = labels
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    node
}

const REVIEWS: &str = r"
apiVersion: v1
kind: Service
metadata: { name: reviews, namespace: default }
spec:
  selector: { app: reviews }
  ports:
  - { name: http, port: 80, targetPort: web }
  - { name: tcp-db, port: 3306 }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: reviews-v1, namespace: default }
spec: {}
---
apiVersion: v1
kind: Pod
metadata:
  name: reviews-v1-abc-x
  namespace: default
  labels: { app: reviews, version: v1, security.istio.io/tlsMode: istio }
  ownerReferences: [{ apiVersion: apps/v1, kind: ReplicaSet, name: reviews-v1-abc }]
spec:
  serviceAccountName: reviews
  containers: [{ name: app, ports: [{ name: web, containerPort: 9080 }] }]
status: { podIP: 127.1.0.1, phase: Running }
---
apiVersion: v1
kind: Pod
metadata: { name: reviews-v2-x, namespace: default, labels: { app: reviews, version: v2 } }
spec: { containers: [{ name: app, ports: [{ name: web, containerPort: 9081 }] }] }
status: { podIP: 127.1.0.2, phase: Running, conditions: [{ type: Ready, status: 'False' }] }
---
apiVersion: v1
kind: Pod
metadata: { name: reviews-v3-x, namespace: default, labels: { app: reviews, version: v3 } }
spec: { containers: [{ name: app }] }
status: { phase: Pending }
";

#[test]
fn endpoints_are_the_ready_pods_that_a_service_selects() {
    let snapshot = snapshot(REVIEWS);
    let host = "reviews.default.svc.cluster.local";
    let service = snapshot.service(host).unwrap();
    assert_eq!(service.port(80).unwrap().protocol, Protocol::Http);
    assert_eq!(service.port(3306).unwrap().protocol, Protocol::Tcp);
    let all = snapshot.endpoints(host, 80);
    assert_eq!(all.len(), 1, "{all:?}");
    let endpoint = &all[0];
    assert_eq!(
        (endpoint.address.as_str(), endpoint.port),
        ("127.1.0.1", 9080),
        "named port"
    );
    assert_eq!(
        endpoint.spiffe_id.as_deref(),
        Some("spiffe://cluster.local/ns/default/sa/reviews")
    );
    assert_eq!(endpoint.tls_mode, TlsMode::Istio);
    assert_eq!(endpoint.workload_name, "reviews-v1");
    assert_eq!(snapshot.status().pods_without_address, 1);
    let workload = snapshot.workload_at("127.1.0.1".parse().unwrap()).unwrap();
    assert_eq!(
        workload.owner,
        "kubernetes://apis/apps/v1/namespaces/default/deployments/reviews-v1"
    );
    assert_eq!(workload.services, [host.into()]);
    let inbound = snapshot.inbound_ports(&node("reviews-v1-abc-x", "default", &[]));
    assert_eq!(
        inbound
            .iter()
            .map(|port| (port.port.number, port.workload_port))
            .collect::<Vec<_>>(),
        [(3306, 3306), (80, 9080)]
    );
}

#[test]
fn service_entries_have_their_own_endpoints_and_lose_to_services() {
    let snapshot = snapshot(&format!(
        "{REVIEWS}---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{ name: ext, namespace: default }}
spec:
  hosts: [api.example.com, reviews.default.svc.cluster.local]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [{{ number: 443, name: tls, protocol: TLS }}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{ name: vms, namespace: default }}
spec:
  hosts: [vm.internal]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{ number: 80, name: http, protocol: HTTP, targetPort: 8080 }}]
  workloadSelector: {{ labels: {{ app: vm }} }}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{ name: vm-1, namespace: default }}
spec: {{ address: 127.2.0.1, labels: {{ app: vm }}, ports: {{ http: 8081 }}, serviceAccount: vm }}
"
    ));
    let dns = snapshot.endpoints("api.example.com", 443);
    assert_eq!(
        (dns[0].address.as_str(), dns[0].port),
        ("api.example.com", 443)
    );
    let vm = snapshot.endpoints("vm.internal", 80);
    assert_eq!((vm[0].address.as_str(), vm[0].port), ("127.2.0.1", 8081));
    assert_eq!(
        snapshot.status().conflicts.len(),
        1,
        "{:?}",
        snapshot.status()
    );
    assert_eq!(
        snapshot
            .service("reviews.default.svc.cluster.local")
            .unwrap()
            .registry,
        Registry::Kubernetes
    );
}

#[test]
fn virtual_services_are_found_by_host_oldest_first() {
    let rule = |name: &str, namespace: &str, host: &str, extra: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n  hosts: ['{host}']\n{extra}  http: [{{ route: [{{ destination: {{ host: x }} }}] }}]\n---\n"
        )
    };
    let snapshot = snapshot(
        &[
            rule("wide", "default", "*.default.svc.cluster.local", ""),
            rule("first", "default", "reviews", ""),
            rule("second", "default", "reviews", ""),
            rule(
                "private",
                "other",
                "ratings.default.svc.cluster.local",
                "  exportTo: ['.']\n",
            ),
            rule("edge", "default", "reviews", "  gateways: [gw, infra/gw]\n"),
        ]
        .concat(),
    );
    let client = node("a", "default", &[]);
    let name = |host: &str, node: &Node| {
        snapshot
            .mesh_routes(host, node)
            .map(|routes| routes.object.key.name.to_string())
    };
    assert_eq!(
        name("reviews.default.svc.cluster.local", &client).as_deref(),
        Some("first")
    );
    assert_eq!(
        name("ratings.default.svc.cluster.local", &client).as_deref(),
        Some("wide")
    );
    assert_eq!(
        name(
            "ratings.default.svc.cluster.local",
            &node("a", "other", &[])
        )
        .as_deref(),
        Some("private")
    );
    assert_eq!(name("elsewhere.com", &client), None);
    assert_eq!(snapshot.gateway_routes("infra/gw").len(), 1);
    assert_eq!(snapshot.gateway_routes("default/gw").len(), 1);
    assert_eq!(
        snapshot.status().conflicts.len(),
        1,
        "{:?}",
        snapshot.status()
    );
}

#[test]
fn destination_rules_are_the_clients_then_the_services_then_the_roots() {
    let rule = |name: &str, namespace: &str, host: &str, rest: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n  host: '{host}'\n{rest}---\n"
        )
    };
    let host = "reviews.default.svc.cluster.local";
    let snapshot = snapshot(&format!(
        "{REVIEWS}---\n{}",
        [
            rule("own", "client", host, ""),
            rule("v1", "default", "reviews", "  subsets: [{ name: v1, labels: { version: v1 } }]\n"),
            rule("v2", "default", "reviews", "  subsets: [{ name: v2, labels: { version: v2 } }]\n  trafficPolicy: { loadBalancer: { simple: RANDOM } }\n"),
            rule("special", "default", "reviews", "  workloadSelector: { matchLabels: { app: special } }\n"),
            rule("mesh", "istio-system", "*.cluster.local", ""),
        ]
        .concat()
    ));
    let policy = |host: &str, namespace: &str, labels: &Labels| {
        snapshot.destination_policy(host, namespace, labels)
    };
    let none = Labels::new();
    assert_eq!(policy(host, "client", &none).unwrap().namespace, "client");
    let merged = policy(host, "elsewhere", &none).unwrap();
    assert_eq!(merged.namespace, "default");
    assert!(merged.subset("v1").is_some() && merged.subset("v2").is_some());
    assert!(merged.rule.traffic_policy.is_some());
    let special = Labels::from([("app".to_owned(), "special".to_owned())]);
    assert!(
        policy(host, "default", &special)
            .unwrap()
            .rule
            .workload_selector
            .is_some()
    );
    assert_eq!(
        policy("x.y.svc.cluster.local", "elsewhere", &none)
            .unwrap()
            .namespace,
        "istio-system"
    );
    assert!(policy("example.com", "elsewhere", &none).is_none());
}

#[test]
fn mutual_tls_is_the_workloads_then_the_namespaces_then_the_meshs() {
    let policy = |name: &str, namespace: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {spec}\n---\n"
        )
    };
    let snapshot = snapshot(&format!(
        "{REVIEWS}---\n{}",
        [
            policy("mesh", "istio-system", "{ mtls: { mode: STRICT } }"),
            policy("late", "istio-system", "{ mtls: { mode: DISABLE } }"),
            policy("ns", "quiet", "{ mtls: { mode: DISABLE } }"),
            policy(
                "reviews",
                "default",
                "{ selector: { matchLabels: { version: v1 } }, mtls: { mode: UNSET }, portLevelMtls: { 9080: { mode: DISABLE } } }"
            ),
        ]
        .concat()
    ));
    let v1 = Labels::from([("version".to_owned(), "v1".to_owned())]);
    assert_eq!(
        snapshot.mutual_tls("default", &v1, 9080),
        MutualTlsMode::Disable
    );
    assert_eq!(
        snapshot.mutual_tls("default", &v1, 9090),
        MutualTlsMode::Strict,
        "unset: the mesh's, oldest"
    );
    assert_eq!(
        snapshot.mutual_tls("quiet", &v1, 9080),
        MutualTlsMode::Disable
    );
    assert_eq!(
        snapshot.mutual_tls("other", &Labels::new(), 1),
        MutualTlsMode::Strict
    );
    // Clients must not try mTLS where the policy switched it off.
    assert_eq!(
        snapshot.endpoints("reviews.default.svc.cluster.local", 80)[0].tls_mode,
        TlsMode::Disabled
    );
}

#[test]
fn without_policy_mutual_tls_is_permissive_and_old_policies_are_heard() {
    assert_eq!(
        snapshot(REVIEWS).mutual_tls("default", &Labels::new(), 1),
        MutualTlsMode::Permissive
    );
    let old = snapshot(
        "apiVersion: authentication.istio.io/v1alpha1\nkind: MeshPolicy\nmetadata: { name: default }\nspec: { peers: [{ mtls: {} }] }\n",
    );
    assert_eq!(
        old.mutual_tls("default", &Labels::new(), 1),
        MutualTlsMode::Strict
    );
}

#[test]
fn a_sidecar_narrows_what_its_workload_sees() {
    let snapshot = snapshot(&format!(
        "{REVIEWS}---
apiVersion: v1
kind: Service
metadata: {{ name: far, namespace: other }}
spec: {{ ports: [{{ name: http, port: 80 }}] }}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{ name: narrow, namespace: default }}
spec:
  workloadSelector: {{ labels: {{ app: narrow }} }}
  egress: [{{ hosts: ['./*'] }}]
"
    ));
    let seen = |labels: &[(&str, &str)]| {
        snapshot
            .visible_services(&node("a", "default", labels))
            .len()
    };
    assert_eq!((seen(&[]), seen(&[("app", "narrow")])), (2, 1));
}

#[test]
fn quotas_are_those_bound_to_the_service() {
    let snapshot = snapshot(
        "apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: { name: one, namespace: istio-system }
spec: { rules: [{ quotas: [{ quota: requestcount, charge: 1 }] }] }
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpecBinding
metadata: { name: bind, namespace: istio-system }
spec:
  quotaSpecs: [{ name: one }]
  services: [{ name: reviews, namespace: default }]
",
    );
    assert_eq!(
        snapshot.quotas("reviews.default.svc.cluster.local").len(),
        1
    );
    assert_eq!(
        snapshot.quotas("ratings.default.svc.cluster.local").len(),
        0
    );
}

#[test]
fn hosts_match_by_wildcard() {
    assert!(host_matches("*", "a.b"));
    assert!(host_matches("*.b", "a.b"));
    assert!(!host_matches("*.b", "b"));
    assert!(host_matches("a.b", "a.b"));
    assert!(host_matches("*.com", "*.example.com"));
}

#[test]
fn delegates_are_merged_into_those_who_delegate() {
    let snapshot = snapshot(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: root, namespace: default }
spec:
  hosts: [shop.example]
  http:
  - name: cart
    match: [{ uri: { prefix: /cart }, port: 80 }, { uri: { exact: /basket } }]
    delegate: { name: cart, namespace: carts }
    timeout: 3s
  - delegate: { name: hidden, namespace: carts }
  - delegate: { name: nobody }
  - route: [{ destination: { host: front } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: cart, namespace: carts }
spec:
  http:
  - name: pay
    match: [{ uri: { prefix: /cart/pay }, method: { exact: POST } }, { uri: { prefix: /other } }]
    route: [{ destination: { host: pay } }]
    timeout: 9s
  - route: [{ destination: { host: cart } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: hidden, namespace: carts }
spec: { exportTo: ['.'], http: [{ route: [{ destination: { host: hidden } }] }] }
",
    );
    let routes = snapshot
        .mesh_routes("shop.example", &node("a", "default", &[]))
        .unwrap();
    let seen: Vec<(&str, Vec<Value>, &str, Option<u128>)> = routes
        .spec()
        .http
        .iter()
        .map(|route| {
            (
                route.name.as_str(),
                route
                    .matches
                    .iter()
                    .map(|entry| json!([entry.uri, entry.method, entry.port]))
                    .collect(),
                route
                    .route
                    .first()
                    .map_or("", |to| to.destination.host.as_str()),
                route.timeout.map(|time| time.0.as_secs().into()),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (
                "cart-pay",
                vec![json!([{"prefix": "/cart/pay"}, {"exact": "POST"}, 80])],
                "pay.carts.svc.cluster.local",
                Some(9)
            ),
            (
                "cart",
                vec![
                    json!([{"prefix": "/cart"}, null, 80]),
                    json!([{"exact": "/basket"}, null, 0])
                ],
                "cart.carts.svc.cluster.local",
                Some(3)
            ),
            ("", vec![], "front", None),
        ]
    );
    assert_eq!(
        snapshot.status().conflicts,
        [
            "test.yaml:12: VirtualService default/root: delegate carts/hidden is not exported to this namespace; its routes are left out",
            "test.yaml:13: VirtualService default/root: delegate default/nobody is no VirtualService without hosts; its routes are left out",
        ]
    );
}

#[test]
fn slices_say_who_answers_and_external_names_are_aliases() {
    let snapshot = snapshot(
        "
apiVersion: v1
kind: Service
metadata: { name: web, namespace: default }
spec: { clusterIP: 10.0.0.1, ports: [{ name: http, port: 80 }] }
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: { name: web-x, namespace: default, labels: { kubernetes.io/service-name: web } }
endpoints: [{ addresses: [10.1.0.1] }, { addresses: [10.1.0.2], conditions: { ready: false } }]
ports: [{ name: http, port: 8080 }, { name: other, port: 1 }]
---
apiVersion: v1
kind: Service
metadata: { name: alias, namespace: other }
spec: { type: ExternalName, externalName: again.default.svc.cluster.local }
---
apiVersion: v1
kind: Service
metadata: { name: again, namespace: default }
spec: { type: ExternalName, externalName: web.default.svc.cluster.local. }
---
apiVersion: v1
kind: Service
metadata: { name: circle, namespace: default }
spec: { type: ExternalName, externalName: circle.default.svc.cluster.local }
",
    );
    let addresses: Vec<(&str, u16)> = snapshot
        .endpoints("web.default.svc.cluster.local", 80)
        .iter()
        .map(|endpoint| (endpoint.address.as_str(), endpoint.port))
        .collect();
    assert_eq!(addresses, [("10.1.0.1", 8080)]);
    let web = snapshot.service("web.default.svc.cluster.local").unwrap();
    assert_eq!(
        web.aliases.iter().map(|name| &**name).collect::<Vec<_>>(),
        [
            "again.default.svc.cluster.local",
            "alias.other.svc.cluster.local"
        ]
    );
    assert!(snapshot.service("alias.other.svc.cluster.local").is_none());
}
