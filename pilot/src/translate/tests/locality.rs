//! Localities: who is asked first, and what share each gets.

use super::*;

/// Where endpoints of `static.example` are, beside one in a zone of no region.
const PLACES: [(&str, &str); 6] = [
    ("10.0.0.1", "us/a/1"),
    ("10.0.0.2", "us/a/2"),
    ("10.0.0.3", "us/b/1"),
    ("10.0.0.4", "eu/a/1"),
    ("10.0.0.5", "asia/a/1"),
    ("10.0.0.6", ""),
];

fn entry() -> String {
    let endpoints: Vec<String> = PLACES
        .iter()
        .map(|(address, locality)| {
            format!(
                "{{ address: {address}, locality: '{locality}', weight: 3, labels: {{ shard: s{} }} }}",
                1 + usize::from(locality.starts_with("us"))
            )
        })
        .collect();
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{ name: static, namespace: default }}
spec:
  hosts: [static.example]
  ports: [{{ number: 80, name: http, protocol: HTTP }}]
  resolution: STATIC
  endpoints: [{}]
",
        endpoints.join(", ")
    )
}

fn rule(policy: &str) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: static, namespace: default }}
spec: {{ host: static.example, trafficPolicy: {policy} }}
"
    )
}

fn client(locality: &str) -> Node {
    node(
        "envoy",
        &format!(
            "
id: sidecar~10.9.9.9~lone-x.default~default.svc.cluster.local
locality: {locality}
metadata: {{ NAMESPACE: default, LABELS: {{ app: reviews, shard: s2 }}, NODE_NAME: m1 }}
"
        ),
    )
}

/// Address, level and weight of its locality.
fn arranged(snapshot: &Snapshot, node: &Node, cluster: &str) -> Vec<(String, u64, u64)> {
    let assignment = j(&endpoints(snapshot, cluster, node).unwrap());
    let mut all: Vec<(String, u64, u64)> = assignment["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| {
            let level = group["priority"].as_u64().unwrap_or(0);
            let weight = group["load_balancing_weight"].as_u64().unwrap_or(0);
            group["lb_endpoints"]
                .as_array()
                .unwrap()
                .iter()
                .map(move |endpoint| {
                    let address = &endpoint["endpoint"]["address"]["socket_address"]["address"];
                    (address.as_str().unwrap().to_owned(), level, weight)
                })
        })
        .collect();
    all.sort();
    all
}

const STATIC: &str = "outbound|80||static.example";
const US: &str = "{ region: us, zone: a, sub_zone: '1' }";

fn levels(mesh: &str, policy: &str) -> Vec<u64> {
    let snapshot = world_with(mesh, &(entry() + &rule(policy)));
    arranged(&snapshot, &client(US), STATIC)
        .into_iter()
        .map(|(_, level, _)| level)
        .collect()
}

#[test]
fn the_closest_come_first_where_failing_hosts_are_ejected() {
    let ejects = "outlierDetection: { consecutive5xxErrors: 1 }";
    let with = |setting: &str| {
        levels(
            "",
            &format!("{{ {ejects}, loadBalancer: {{ localityLbSetting: {setting} }} }}"),
        )
    };
    assert_eq!(
        levels("", "{ loadBalancer: { simple: RANDOM } }"),
        [0; 6],
        "nothing would make the next level help"
    );
    assert_eq!(levels("", &format!("{{ {ejects} }}")), [0, 1, 2, 3, 3, 3]);
    assert_eq!(with("{ enabled: false }"), [0; 6]);
    assert_eq!(
        with("{ failover: [{ from: us, to: eu }, { from: eu, to: asia }] }"),
        [0, 1, 2, 3, 4, 4]
    );
    assert_eq!(
        levels(
            "    localityLbSetting: { failover: [{ from: us, to: asia }] }\n",
            &format!("{{ {ejects} }}")
        ),
        [0, 1, 2, 4, 3, 4],
        "as the mesh says"
    );
    assert_eq!(
        levels(
            "    localityLbSetting: { enabled: false }\n",
            &format!("{{ {ejects} }}")
        ),
        [0; 6]
    );
    // s2: those in the us; s1: the others.
    assert_eq!(with("{ failoverPriority: [shard] }"), [0, 0, 0, 1, 1, 1]);
    assert_eq!(with("{ failoverPriority: [shard=s1] }"), [1, 1, 1, 0, 0, 0]);
    assert_eq!(
        with("{ failoverPriority: [topology.kubernetes.io/region, topology.kubernetes.io/zone] }"),
        [0, 0, 1, 2, 2, 2],
        "a zone counts only within the region"
    );
    assert_eq!(
        with("{ failoverPriority: [shard], failover: [{ from: us, to: asia }] }"),
        [0, 1, 2, 4, 3, 4],
        "labels first, then places"
    );
}

#[test]
fn localities_get_the_shares_they_are_given() {
    let policy = "{ loadBalancer: { localityLbSetting: { distribute: [
      { from: us/b/*, to: { us/b/1: 100 } },
      { from: us/a/*, to: { us/a/*: 71, eu: 29 } } ] } } }";
    let snapshot = world(&(entry() + &rule(policy)));
    let of = |address: &str, weight| (address.to_owned(), 0, weight);
    assert_eq!(
        arranged(&snapshot, &client(US), STATIC),
        [of("10.0.0.1", 36), of("10.0.0.2", 36), of("10.0.0.4", 29)],
        "two localities divide the 71, and the rest gets nothing"
    );
    let elsewhere = arranged(&snapshot, &client("{ region: eu, zone: a }"), STATIC);
    assert!(
        elsewhere.len() == 6
            && elsewhere
                .iter()
                .all(|(_, level, weight)| (*level, *weight) == (0, 3)),
        "{elsewhere:?}"
    );
    let cluster = j(&translate(&snapshot, &client(US)).clusters[STATIC]);
    assert_eq!(
        cluster["common_lb_config"],
        json!({"locality_weighted_lb_config": {}})
    );
}

#[test]
fn machines_and_labels_say_where_pods_are() {
    let world = world(&format!(
        "
apiVersion: v1
kind: Node
metadata: {{ name: m1, labels: {{ topology.kubernetes.io/region: us, topology.kubernetes.io/zone: a }} }}
---
apiVersion: v1
kind: Node
metadata: {{ name: m2, labels: {{ failure-domain.beta.kubernetes.io/region: us, failure-domain.beta.kubernetes.io/zone: b }} }}
---
apiVersion: v1
kind: Service
metadata: {{ name: near, namespace: default }}
spec: {{ selector: {{ app: near }}, ports: [{{ name: http, port: 80 }}], trafficDistribution: PreferClose }}
---
apiVersion: v1
kind: Service
metadata: {{ name: same, namespace: default, annotations: {{ networking.istio.io/traffic-distribution: PreferSameNode }} }}
spec: {{ selector: {{ app: near }}, ports: [{{ name: http, port: 80 }}] }}
---
apiVersion: v1
kind: Service
metadata: {{ name: listed, namespace: default }}
spec: {{ ports: [{{ name: http, port: 80 }}] }}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: listed-x, namespace: default, labels: {{ kubernetes.io/service-name: listed }} }}
ports: [{{ name: http, port: 80 }}]
endpoints: [{{ addresses: [10.1.0.1], nodeName: m2 }}, {{ addresses: [10.1.0.2], zone: b }}, {{ addresses: [10.1.0.3] }}]
{}",
        [("m1", "10.0.0.1", ""), ("m2", "10.0.0.2", ""), ("m2", "10.0.0.3", "istio-locality: eu.c.1,")]
            .map(|(machine, ip, label)| format!(
                "
---
apiVersion: v1
kind: Pod
metadata: {{ name: p-{ip}, namespace: default, labels: {{ {label} app: near }} }}
spec: {{ nodeName: {machine}, containers: [{{ name: c }}] }}
status: {{ podIP: {ip}, phase: Running }}
"
            ))
            .concat()
    ));
    let localities: Vec<&str> = ["near", "listed"]
        .iter()
        .flat_map(|name| world.endpoints(&format!("{name}.default.svc.cluster.local"), 80))
        .map(|endpoint| endpoint.locality.as_str())
        .collect();
    assert_eq!(localities, ["us/a", "us/b", "eu/c/1", "us/b", "us/b", ""]);
    let levels = |node: &Node, name: &str| -> Vec<u64> {
        let cluster = format!("outbound|80||{name}.default.svc.cluster.local");
        arranged(&world, node, &cluster)
            .into_iter()
            .map(|(_, level, _)| level)
            .collect()
    };
    assert_eq!(
        levels(&client("{ region: us, zone: a }"), "near"),
        [0, 1, 2]
    );
    assert_eq!(
        levels(&client("{ region: us, zone: b }"), "near"),
        [1, 0, 2]
    );
    assert_eq!(
        levels(&client("{ region: us, zone: a }"), "same"),
        [0, 1, 2]
    );
    let by_registry = node(
        "envoy",
        "
id: sidecar~10.0.0.3~p-10.0.0.3.default~default.svc.cluster.local
metadata: { NAMESPACE: default }
",
    );
    assert_eq!(
        levels(&by_registry, "near"),
        [1, 1, 0],
        "the pod's own label"
    );
}

#[test]
fn warmup_and_retry_budgets_are_envoys() {
    let policy = "{ retryBudget: { percent: 30, minRetryConcurrency: 5 }, loadBalancer: { simple: ROUND_ROBIN,
      warmup: { duration: 30s, minimumPercent: 20, aggression: 2 } },
      portLevelSettings: [{ port: { number: 81 }, loadBalancer: { warmupDurationSecs: 5s } }] }";
    let entry = entry().replace(
        "protocol: HTTP }]",
        "protocol: HTTP }, { number: 81, name: http-b, protocol: HTTP }]",
    );
    let resources = translate(&world(&(entry + &rule(policy))), &client(US));
    let cluster = j(&resources.clusters[STATIC]);
    assert_eq!(
        cluster["round_robin_lb_config"]["slow_start_config"],
        json!({
            "slow_start_window": "30s", "min_weight_percent": {"value": 20},
            "aggression": {"default_value": 2, "runtime_key": "upstream.slow_start.aggression"},
        })
    );
    let budget = json!({"budget_percent": {"value": 30}, "min_retry_concurrency": 5});
    assert_eq!(
        cluster["circuit_breakers"]["thresholds"][0]["retry_budget"],
        budget
    );
    let cluster = j(&resources.clusters["outbound|81||static.example"]);
    assert_eq!(
        cluster["least_request_lb_config"]["slow_start_config"],
        json!({"slow_start_window": "5s"})
    );
    assert_eq!(
        cluster["circuit_breakers"]["thresholds"][0]["retry_budget"],
        budget
    );
    stock_envoy::accepts("locality", &resources);
}

#[test]
fn names_looked_up_by_the_proxy_have_localities_too() {
    let entry = entry()
        .replace("STATIC", "DNS")
        .replace("address: 10.0.0.1", "address: one.example");
    let policy = "{ outlierDetection: { consecutive5xxErrors: 1 } }";
    let resources = translate(&world(&(entry + &rule(policy))), &client(US));
    let cluster = j(&resources.clusters[STATIC]);
    let groups = cluster["load_assignment"]["endpoints"].as_array().unwrap();
    let levels: Vec<u64> = groups
        .iter()
        .map(|group| group["priority"].as_u64().unwrap_or(0))
        .collect();
    assert_eq!(levels, [0, 1, 2, 3, 3, 3]);
    stock_envoy::accepts("localities by name", &resources);
}
