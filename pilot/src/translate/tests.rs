//! Worlds in YAML, translated, compared in Envoy's JSON.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use lateen_config::{ConfigSet, parse_file, validate};
use lateen_protocols::json::{from_yaml, to_json};
use prost::{Message, Name};
use serde_json::{Value, json};

use super::*;

mod authorization;
mod credentials;
mod gateway_api;
mod locality;
mod patches;
mod stock_envoy;
mod stock_mixer;
mod telemetry;
mod tokens;

const MESH: &str = "
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    accessLogFile: /dev/stdout
    mixerCheckServer: mixer.istio-system.svc.cluster.local:15004
    mixerReportServer: mixer.istio-system.svc.cluster.local:9091
---
apiVersion: v1
kind: Service
metadata: { name: mixer, namespace: istio-system }
spec: { selector: { app: mixer }, ports: [{ name: grpc-mixer, port: 9091 }, { name: grpc-mixer-mtls, port: 15004 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: mixer-1, namespace: istio-system, labels: { app: mixer } }
spec: { serviceAccountName: mixer, containers: [{ name: mixer, ports: [{ containerPort: 9091 }, { containerPort: 15004 }] }] }
status: { podIP: 127.30.0.2, phase: Running }
---
apiVersion: v1
kind: Service
metadata: { name: reviews, namespace: default, labels: { app: reviews } }
spec: { selector: { app: reviews }, ports: [{ name: http, port: 9080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: ratings, namespace: default }
spec: { selector: { app: ratings }, ports: [{ name: grpc, port: 9080, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: mongodb, namespace: default }
spec: { selector: { app: mongodb }, ports: [{ name: mongo, port: 27017 }] }
---
apiVersion: v1
kind: Service
metadata: { name: istio-ingressgateway, namespace: istio-system }
spec: { selector: { istio: ingressgateway }, ports: [{ name: http2, port: 80, targetPort: 8080 }, { name: https, port: 443, targetPort: 8443 }, { name: tcp, port: 31400 }] }
";

fn pod(name: &str, app: &str, version: &str, ip: &str, tls: bool) -> String {
    let tls = if tls {
        ", security.istio.io/tlsMode: istio"
    } else {
        ""
    };
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, namespace: default, labels: {{ app: {app}, version: {version}{tls} }} }}
spec: {{ serviceAccountName: bookinfo-{app}, containers: [{{ name: c, ports: [{{ containerPort: 9080 }}] }}] }}
status: {{ podIP: {ip}, phase: Running }}
"
    )
}

pub(super) fn world(more: &str) -> Snapshot {
    world_with("", more)
}

/// `mesh` are further lines of the mesh configuration.
fn world_with(mesh: &str, more: &str) -> Snapshot {
    let mut text = MESH.replace("    accessLogFile", &format!("{mesh}    accessLogFile"));
    text += &pod("reviews-v1-x", "reviews", "v1", "127.30.0.11", true);
    text += &pod("reviews-v2-x", "reviews", "v2", "127.30.0.12", true);
    text += &pod("ratings-v1-x", "ratings", "v1", "127.30.0.13", false);
    text += "---";
    text += more;
    let (objects, problems) = parse_file("world.yaml", &text);
    assert_eq!(problems, []);
    let wrong: Vec<String> = objects
        .iter()
        .flat_map(validate)
        .filter(lateen_config::Problem::is_error)
        .map(|p| p.to_string())
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
    Snapshot::build(&ConfigSet {
        objects: objects.into_iter().map(Arc::new).collect(),
        ..Default::default()
    })
}

fn node(agent: &str, text: &str) -> Node {
    let mut node: core::Node = from_yaml(text).unwrap();
    node.user_agent_name = agent.to_owned();
    Node::parse(Some(&node)).unwrap()
}

/// Beside reviews-v1.
fn sidecar(agent: &str) -> Node {
    node(
        agent,
        "
id: sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata:
  NAMESPACE: default
  INTERCEPTION_MODE: NONE
  LABELS: { app: reviews, version: v1 }
  APP_PORTS: { '9080': '127.30.0.11:19080' }
  OUTBOUND_BIND: 127.30.1.11
  HTTP_PROXY_PORT: '15002'
",
    )
}

fn router(agent: &str) -> Node {
    node(
        agent,
        "
id: router~127.30.0.5~istio-ingressgateway-x.istio-system~istio-system.svc.cluster.local
metadata: { NAMESPACE: istio-system, INTERCEPTION_MODE: NONE, LABELS: { istio: ingressgateway } }
",
    )
}

fn j<M: Message + Name>(message: &M) -> Value {
    to_json(message).unwrap()
}

/// The virtual host of that name.
fn vhost(resources: &Resources, config: &str, name: &str) -> Value {
    let config = j(resources.routes.get(config).unwrap());
    let hosts = config["virtual_hosts"].as_array().unwrap();
    hosts
        .iter()
        .find(|host| host["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {hosts:#?}"))
        .clone()
}

fn names<T>(map: &BTreeMap<String, T>) -> Vec<&str> {
    map.keys().map(String::as_str).collect()
}

/// The network filter's configuration.
fn filter(listener: &Value, chain: usize, filter: usize) -> &Value {
    &listener["filter_chains"][chain]["filters"][filter]["typed_config"]
}

#[test]
fn a_sidecar_gets_its_listeners_and_clusters() {
    let resources = translate(&world(""), &sidecar("envoy"));
    assert_eq!(
        names(&resources.listeners),
        [
            "127.30.0.11_9080",
            "127.30.1.11_15002",
            "127.30.1.11_27017",
            "127.30.1.11_31400"
        ]
    );
    assert_eq!(names(&resources.routes), ["http_proxy", "inbound|9080||"]);
    assert_eq!(
        names(&resources.clusters),
        [
            "BlackHoleCluster",
            "inbound|9080||",
            "outbound|15004||mixer.istio-system.svc.cluster.local",
            "outbound|27017||mongodb.default.svc.cluster.local",
            "outbound|31400||istio-ingressgateway.istio-system.svc.cluster.local",
            "outbound|443||istio-ingressgateway.istio-system.svc.cluster.local",
            "outbound|80||istio-ingressgateway.istio-system.svc.cluster.local",
            "outbound|9080||ratings.default.svc.cluster.local",
            "outbound|9080||reviews.default.svc.cluster.local",
            "outbound|9091||mixer.istio-system.svc.cluster.local",
        ]
    );
    let inbound = j(&resources.clusters["inbound|9080||"]);
    assert_eq!(
        inbound["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"],
        json!({"address": "127.30.0.11", "port_value": 19080})
    );
    let cluster = j(&resources.clusters["outbound|9080||reviews.default.svc.cluster.local"]);
    assert_eq!(cluster["type"], "EDS");
    assert_eq!(cluster["lb_policy"], "LEAST_REQUEST");
    assert_eq!(
        cluster["eds_cluster_config"]["eds_config"]["ads"],
        json!({})
    );
    let tls = &cluster["transport_socket_matches"][0];
    assert_eq!(tls["match"], json!({"tlsMode": "istio"}));
    let tls = &tls["transport_socket"]["typed_config"];
    assert_eq!(
        tls["sni"],
        "outbound_.9080_._.reviews.default.svc.cluster.local"
    );
    let validation = &tls["common_tls_context"]["combined_validation_context"];
    assert_eq!(
        validation["default_validation_context"]["match_typed_subject_alt_names"],
        json!([{"san_type": "URI", "matcher": {"exact": "spiffe://cluster.local/ns/default/sa/bookinfo-reviews"}}])
    );
    assert_eq!(
        validation["validation_context_sds_secret_config"]["name"],
        "ROOTCA"
    );
    assert_eq!(
        cluster["transport_socket_matches"][1]["transport_socket"]["name"],
        "envoy.transport_sockets.raw_buffer"
    );
    let grpc = j(&resources.clusters["outbound|9080||ratings.default.svc.cluster.local"]);
    let options = &grpc["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
    assert_eq!(
        options["explicit_http_config"],
        json!({"http2_protocol_options": {}})
    );
    assert_eq!(
        resources.conflicts,
        [
            "port 443 of istio-ingressgateway.istio-system.svc.cluster.local needs a privilege to bind; TCP clients of this node cannot reach it"
        ]
    );
}

#[test]
fn endpoints_say_whether_they_take_mtls() {
    let snapshot = world("");
    let node = sidecar("envoy");
    let resources = translate(&snapshot, &node);
    let name = "outbound|9080||reviews.default.svc.cluster.local";
    let assignment = j(&resources.endpoints[name]);
    let endpoint = &assignment["endpoints"][0]["lb_endpoints"][0];
    assert_eq!(
        endpoint["endpoint"]["address"]["socket_address"],
        json!({"address": "127.30.0.11", "port_value": 9080})
    );
    assert_eq!(
        endpoint["metadata"]["filter_metadata"]["envoy.transport_socket_match"],
        json!({"tlsMode": "istio"})
    );
    assert_eq!(
        endpoint["metadata"]["filter_metadata"]["istio"]["uid"],
        "kubernetes://reviews-v1-x.default"
    );
    let ratings = j(&resources.endpoints["outbound|9080||ratings.default.svc.cluster.local"]);
    let endpoint = &ratings["endpoints"][0]["lb_endpoints"][0];
    assert_eq!(
        endpoint["metadata"]["filter_metadata"]["envoy.transport_socket_match"],
        Value::Null
    );
    assert_eq!(
        endpoint["endpoint"]["address"]["socket_address"]["port_value"],
        8080
    );
    for (name, assignment) in &resources.endpoints {
        assert_eq!(
            endpoints(&snapshot, name, &node).as_ref(),
            Some(assignment),
            "alone as with the rest"
        );
    }
    assert_eq!(endpoints(&snapshot, "inbound|9080||", &node), None);
    assert_eq!(endpoints(&snapshot, "outbound|1||nobody", &node), None);
}

#[test]
fn inbound_chains_follow_peer_authentication() {
    let chains = |more: &str| {
        let resources = translate(&world(more), &sidecar("envoy"));
        let listener = j(&resources.listeners["127.30.0.11_9080"]);
        let shape: Vec<(Value, bool)> = listener["filter_chains"]
            .as_array()
            .unwrap()
            .iter()
            .map(|chain| {
                (
                    chain["filter_chain_match"].clone(),
                    !chain["transport_socket"].is_null(),
                )
            })
            .collect();
        (listener, shape)
    };
    let (listener, shape) = chains("");
    assert_eq!(
        shape,
        [
            (
                json!({"transport_protocol": "tls", "application_protocols":
                    ["istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"]}),
                true
            ),
            (json!({"transport_protocol": "raw_buffer"}), false),
        ]
    );
    assert_eq!(
        listener["listener_filters"][0]["name"],
        "envoy.filters.listener.tls_inspector"
    );
    let tls = &listener["filter_chains"][0]["transport_socket"]["typed_config"];
    assert_eq!(tls["require_client_certificate"], true);
    assert_eq!(
        tls["common_tls_context"]["combined_validation_context"]["default_validation_context"],
        json!({"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}]})
    );
    let manager = filter(&listener, 0, 0);
    assert_eq!(manager["forward_client_cert_details"], "APPEND_FORWARD");
    assert_eq!(manager["rds"]["route_config_name"], "inbound|9080||");
    let host = vhost(
        &translate(&world(""), &sidecar("envoy")),
        "inbound|9080||",
        "inbound|http|9080",
    );
    assert_eq!(host["routes"][0]["route"]["cluster"], "inbound|9080||");
    let filters: Vec<&str> = manager["http_filters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        filters,
        [
            "envoy.filters.http.header_to_metadata",
            "envoy.filters.http.ext_authz",
            "envoy.filters.http.cors",
            "envoy.filters.http.fault",
            "envoy.filters.http.router"
        ]
    );

    let policy = |mode: &str| {
        format!(
            "\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{ name: default, namespace: default }}\nspec: {{ mtls: {{ mode: {mode} }} }}\n"
        )
    };
    assert_eq!(
        chains(&policy("STRICT")).1,
        [(json!({"transport_protocol": "tls"}), true)]
    );
    assert_eq!(chains(&policy("DISABLE")).1, [(Value::Null, false)]);
}

#[test]
fn a_virtual_service_routes_by_header_weight_and_fault() {
    let snapshot = world(
        "
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: { name: reviews, namespace: default }
spec:
  hosts: [reviews]
  http:
  - name: jason
    match:
    - headers: { end-user: { exact: jason } }
      uri: { prefix: /reviews }
    fault: { delay: { fixedDelay: 7s, percentage: { value: 50 } }, abort: { httpStatus: 500, percent: 10 } }
    rewrite: { uri: / }
    timeout: 0.5s
    retries: { attempts: 3, perTryTimeout: 1s, retryOn: '5xx,503' }
    mirror: { host: reviews, subset: v2 }
    mirrorPercentage: { value: 25 }
    headers: { request: { set: { x-a: '1', Host: other }, remove: [x-b] }, response: { add: { x-c: '2' } } }
    corsPolicy: { allowOrigins: [{ exact: https://a.example }], allowMethods: [GET], maxAge: 24h }
    route: [{ destination: { host: reviews, subset: v1 } }]
  - match:
    - { uri: { exact: /old }, sourceLabels: { app: reviews } }
    - { uri: { exact: /never }, sourceLabels: { app: ratings } }
    - { uri: { exact: /gate }, gateways: [gate] }
    redirect: { uri: /new, authority: a.example, redirectCode: 302 }
  - match: [{ uri: { regex: /hi.* }, ignoreUriCase: true, queryParams: { a: { exact: b } }, withoutHeaders: { x: { exact: y }, z: {} }, method: { exact: GET } }]
    directResponse: { status: 418, body: { string: tea } }
  - route:
    - { destination: { host: reviews, subset: v1 }, weight: 80 }
    - { destination: { host: reviews.default.svc.cluster.local, subset: v2 }, weight: 20, headers: { response: { set: { x-d: '3' } } } }
    - { destination: { host: ratings }, weight: 0 }
  - route: [{ destination: { host: ratings } }]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: reviews, namespace: default }
spec:
  host: reviews
  trafficPolicy:
    connectionPool: { tcp: { maxConnections: 1, connectTimeout: 250ms }, http: { http1MaxPendingRequests: 1, maxRequestsPerConnection: 1 } }
    outlierDetection: { consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 3m, maxEjectionPercent: 100 }
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 }, trafficPolicy: { loadBalancer: { simple: RANDOM }, tls: { mode: ISTIO_MUTUAL } } }
",
    );
    let resources = translate(&snapshot, &sidecar("envoy"));
    let host = vhost(
        &resources,
        "http_proxy",
        "reviews.default.svc.cluster.local:9080",
    );
    assert_eq!(
        host["domains"],
        json!([
            "reviews.default.svc.cluster.local:9080",
            "reviews:9080",
            "reviews.default:9080",
            "reviews.default.svc:9080",
            "reviews.default.svc.cluster.local.:9080"
        ])
    );
    let routes = host["routes"].as_array().unwrap();
    assert_eq!(routes.len(), 4, "{routes:#?}");
    let first = &routes[0];
    assert_eq!(first["name"], "jason");
    assert_eq!(
        first["match"],
        json!({"prefix": "/reviews", "headers": [{"name": "end-user", "string_match": {"exact": "jason"}}]})
    );
    let action = &first["route"];
    assert_eq!(
        action["cluster"],
        "outbound|9080|v1|reviews.default.svc.cluster.local"
    );
    assert_eq!(action["timeout"], "0.500s");
    assert_eq!(action["host_rewrite_literal"], "other");
    assert_eq!(
        action["regex_rewrite"],
        json!({"pattern": {"regex": "^/reviews(/?)(.*)"}, "substitution": "/\\2"})
    );
    assert_eq!(
        action["retry_policy"]["retry_on"],
        "5xx,retriable-status-codes"
    );
    assert_eq!(
        action["retry_policy"]["retriable_status_codes"],
        json!([503])
    );
    assert_eq!(action["retry_policy"]["num_retries"], 3);
    assert_eq!(
        action["request_mirror_policies"][0]["cluster"],
        "outbound|9080|v2|reviews.default.svc.cluster.local"
    );
    assert_eq!(
        action["request_mirror_policies"][0]["runtime_fraction"]["default_value"],
        json!({"numerator": 250_000, "denominator": "MILLION"})
    );
    assert_eq!(
        first["request_headers_to_add"][0],
        json!({"header": {"key": "x-a", "value": "1"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
    );
    assert_eq!(first["request_headers_to_remove"], json!(["x-b"]));
    assert_eq!(
        first["response_headers_to_add"],
        json!([{"header": {"key": "x-c", "value": "2"}}])
    );
    let fault = &first["typed_per_filter_config"]["envoy.filters.http.fault"];
    assert_eq!(
        fault["delay"],
        json!({"fixed_delay": "7s", "percentage": {"numerator": 500_000, "denominator": "MILLION"}})
    );
    assert_eq!(
        fault["abort"],
        json!({"http_status": 500, "percentage": {"numerator": 100_000, "denominator": "MILLION"}})
    );
    assert_eq!(
        first["typed_per_filter_config"]["envoy.filters.http.cors"]["max_age"],
        "86400"
    );

    assert_eq!(
        routes[1]["match"],
        json!({"path": "/old"}),
        "only what is for this client"
    );
    assert_eq!(
        routes[1]["redirect"],
        json!({"host_redirect": "a.example", "path_redirect": "/new", "response_code": "FOUND"})
    );
    assert_eq!(
        routes[2]["direct_response"],
        json!({"status": 418, "body": {"inline_string": "tea"}})
    );
    assert_eq!(
        routes[2]["match"],
        json!({
            "safe_regex": {"regex": "/hi.*"},
            "headers": [
                {"name": ":method", "string_match": {"exact": "GET"}},
                {"name": "x", "string_match": {"exact": "y"}, "invert_match": true, "treat_missing_header_as_empty": true},
                {"name": "z", "present_match": true, "invert_match": true},
            ],
            "query_parameters": [{"name": "a", "string_match": {"exact": "b"}}],
        })
    );
    let weighted = &routes[3]["route"]["weighted_clusters"]["clusters"];
    assert_eq!(weighted.as_array().unwrap().len(), 2);
    assert_eq!(
        (&weighted[0]["weight"], &weighted[1]["weight"]),
        (&json!(80), &json!(20))
    );
    assert_eq!(
        weighted[1]["response_headers_to_add"][0]["header"]["key"],
        "x-d"
    );
    assert_eq!(routes[3]["route"]["retry_policy"]["num_retries"], 2);

    let cluster = j(&resources.clusters["outbound|9080|v2|reviews.default.svc.cluster.local"]);
    assert_eq!(cluster["lb_policy"], "RANDOM");
    assert_eq!(cluster["connect_timeout"], "0.250s");
    let thresholds = &cluster["circuit_breakers"]["thresholds"][0];
    assert_eq!(
        (
            &thresholds["max_connections"],
            &thresholds["max_pending_requests"]
        ),
        (&json!(1), &json!(1))
    );
    assert_eq!(thresholds["max_requests"], u32::MAX);
    assert_eq!(
        cluster["outlier_detection"],
        json!({
            "consecutive_5xx": 1, "enforcing_consecutive_5xx": 100, "enforcing_success_rate": 0,
            "interval": "1s", "base_ejection_time": "180s", "max_ejection_percent": 100
        })
    );
    let tls = &cluster["transport_socket"]["typed_config"];
    assert_eq!(
        tls["sni"],
        "outbound_.9080_.v2_.reviews.default.svc.cluster.local"
    );
    let assignment = j(&resources.endpoints["outbound|9080|v2|reviews.default.svc.cluster.local"]);
    let of_subset = assignment["endpoints"][0]["lb_endpoints"]
        .as_array()
        .unwrap();
    assert_eq!(of_subset.len(), 1);
    assert_eq!(
        of_subset[0]["endpoint"]["address"]["socket_address"]["address"],
        "127.30.0.12"
    );
}

#[test]
fn tcp_is_split_by_weight_and_tls_by_name() {
    let snapshot = world(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: mongodb, namespace: default }
spec:
  hosts: [mongodb]
  tcp:
  - match: [{ port: 1 }]
    route: [{ destination: { host: nobody } }]
  - route:
    - { destination: { host: mongodb, port: { number: 27017 } }, weight: 80 }
    - { destination: { host: ratings, port: { number: 9080 } }, weight: 20 }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: google, namespace: default }
spec:
  hosts: [www.google.com]
  ports: [{ number: 443, name: tls, protocol: TLS }]
  resolution: DNS
",
    );
    let mut node = sidecar("lateen");
    node.metadata
        .insert("UNPRIVILEGED_POD".to_owned(), "false".to_owned());
    let resources = translate(&snapshot, &node);
    let listener = j(&resources.listeners["127.30.1.11_27017"]);
    let mixer = filter(&listener, 0, 0);
    assert_eq!(
        mixer["mixer_attributes"]["attributes"]["destination.service.name"],
        json!({"string_value": "mongodb"})
    );
    assert_eq!(mixer["disable_check_calls"], true);
    assert_eq!(
        filter(&listener, 0, 1)["weighted_clusters"]["clusters"],
        json!([
            {"name": "outbound|27017||mongodb.default.svc.cluster.local", "weight": 80},
            {"name": "outbound|9080||ratings.default.svc.cluster.local", "weight": 20},
        ])
    );
    let listener = j(&resources.listeners["127.30.1.11_443"]);
    let sni: Vec<&Value> = listener["filter_chains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|chain| &chain["filter_chain_match"]["server_names"])
        .collect();
    assert_eq!(
        sni,
        [
            &json!(["istio-ingressgateway.istio-system.svc.cluster.local"]),
            &json!(["www.google.com"])
        ]
    );
    let cluster = j(&resources.clusters["outbound|443||www.google.com"]);
    assert_eq!(cluster["type"], "STRICT_DNS");
    assert_eq!(
        cluster["transport_socket_matches"],
        Value::Null,
        "outside of the mesh"
    );
}

#[test]
fn our_proxy_is_told_about_mixer_in_its_own_words_and_stock_envoy_is_not() {
    let snapshot = world(
        "
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpec
metadata: { name: request-count, namespace: istio-system }
spec: { rules: [{ match: [{ clause: { request.path: { prefix: /x } } }], quotas: [{ charge: 1, quota: requestcount }] }] }
---
apiVersion: config.istio.io/v1alpha2
kind: QuotaSpecBinding
metadata: { name: request-count, namespace: istio-system }
spec: { quotaSpecs: [{ name: request-count, namespace: istio-system }], services: [{ name: reviews, namespace: default }] }
",
    );
    let resources = translate(&snapshot, &sidecar("lateen"));
    let listener = j(&resources.listeners["127.30.0.11_9080"]);
    let manager = filter(&listener, 0, 0);
    assert_eq!(manager["http_filters"][0]["name"], "mixer");
    let config = &manager["http_filters"][0]["typed_config"];
    assert_eq!(
        config["transport"]["check_cluster"],
        "outbound|15004||mixer.istio-system.svc.cluster.local"
    );
    assert_eq!(
        config["transport"]["report_cluster"],
        "outbound|9091||mixer.istio-system.svc.cluster.local"
    );
    assert_eq!(
        config["transport"]["network_fail_policy"]["policy"],
        "FAIL_CLOSE"
    );
    assert_eq!(
        config["service_configs"]["default"],
        json!({}),
        "checks are on"
    );
    let attributes = &config["mixer_attributes"]["attributes"];
    assert_eq!(
        attributes["destination.uid"],
        json!({"string_value": "kubernetes://reviews-v1-x.default"})
    );
    assert_eq!(
        attributes["destination.ip"],
        json!({"bytes_value": "fx4ACw=="})
    );
    assert_eq!(attributes["destination.port"], json!({"int64_value": 9080}));
    assert_eq!(
        attributes["context.reporter.kind"],
        json!({"string_value": "inbound"})
    );
    let host = vhost(&resources, "inbound|9080||", "inbound|http|9080");
    let route = &host["routes"][0]["typed_per_filter_config"]["mixer"];
    assert_eq!(
        route["quota_spec"],
        json!([{"rules": [{"match": [{"clause": {"request.path": {"prefix": "/x"}}}], "quotas": [{"quota": "requestcount", "charge": 1}]}]}])
    );
    assert_eq!(
        route["mixer_attributes"]["attributes"]["destination.service.uid"],
        json!({"string_value": "istio://default/services/reviews"})
    );
    let outbound = j(&resources.listeners["127.30.1.11_15002"]);
    let config = &filter(&outbound, 0, 0)["http_filters"][0]["typed_config"];
    assert_eq!(
        config["service_configs"]["default"]["disable_check_calls"], true,
        "the server's side checks"
    );
    assert_eq!(
        config["forward_attributes"]["attributes"]["source.uid"],
        json!({"string_value": "kubernetes://reviews-v1-x.default"})
    );
    let cluster = j(&resources.clusters["outbound|15004||mixer.istio-system.svc.cluster.local"]);
    let tls = &cluster["transport_socket"]["typed_config"];
    assert_eq!(
        tls["common_tls_context"]["combined_validation_context"]["default_validation_context"]["match_typed_subject_alt_names"]
            [0]["matcher"]["exact"],
        "spiffe://cluster.local/ns/istio-system/sa/mixer"
    );
    assert_eq!(
        resources.clusters["outbound|9091||mixer.istio-system.svc.cluster.local"].transport_socket,
        None
    );

    let text = |resources: &Resources| {
        let mut text = String::new();
        for listener in resources.listeners.values() {
            text += &j(listener).to_string();
        }
        for config in resources.routes.values() {
            text += &j(config).to_string();
        }
        text
    };
    assert!(text(&resources).contains("istio.mixer"));
    assert!(!text(&translate(&snapshot, &sidecar("envoy"))).contains("istio.mixer"));
}

const GATEWAYS: &str = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: front, namespace: default }
spec:
  selector: { istio: ingressgateway }
  servers:
  - { port: { number: 80, name: http, protocol: HTTP }, hosts: [httpbin.example.com, '*.book.example'] }
  - { port: { number: 80, name: http-b, protocol: HTTP }, hosts: [secure.example], tls: { httpsRedirect: true } }
  - { port: { number: 443, name: https, protocol: HTTPS }, hosts: [secure.example], tls: { mode: SIMPLE, serverCertificate: /c, privateKey: /k } }
  - { port: { number: 31400, name: tcp, protocol: TCP }, hosts: ['*'] }
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: elsewhere, namespace: default }
spec:
  selector: { istio: egressgateway }
  servers: [{ port: { number: 81, name: http, protocol: HTTP }, hosts: ['*'] }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: httpbin, namespace: default }
spec:
  hosts: [httpbin.example.com, unrelated.example]
  gateways: [front]
  http:
  - match: [{ uri: { prefix: /status } }, { uri: { prefix: /delay } }]
    route: [{ destination: { host: reviews, port: { number: 9080 } } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: first, namespace: default }
spec:
  hosts: ['*.book.example', secure.example]
  gateways: [front]
  http: [{ route: [{ destination: { host: reviews } }] }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: second, namespace: default }
spec:
  hosts: ['*']
  gateways: [default/front]
  http: [{ match: [{ uri: { exact: /ratings } }], route: [{ destination: { host: ratings } }] }]
  tcp: [{ match: [{ port: 31400 }], route: [{ destination: { host: mongodb } }] }]
";

#[test]
fn a_gateway_merges_servers_and_virtual_services() {
    let resources = translate(&world(GATEWAYS), &router("lateen"));
    assert_eq!(
        names(&resources.listeners),
        ["127.30.0.5_31400", "127.30.0.5_8080", "127.30.0.5_8443"]
    );
    assert_eq!(
        names(&resources.routes),
        ["http.8080", "https.443.https.front.default"]
    );
    let listener = j(&resources.listeners["127.30.0.5_8080"]);
    let manager = filter(&listener, 0, 0);
    assert_eq!(manager["rds"]["route_config_name"], "http.8080");
    assert_eq!(manager["use_remote_address"], true);
    assert_eq!(manager["forward_client_cert_details"], "SANITIZE_SET");
    let mixer = &manager["http_filters"][0]["typed_config"];
    assert_eq!(mixer["ignore_forwarded_attributes"], true);
    assert_eq!(
        mixer["service_configs"]["default"],
        json!({}),
        "gateways check"
    );

    let config = j(&resources.routes["http.8080"]);
    assert_eq!(config["ignore_port_in_host_matching"], true);
    let hosts: Vec<&str> = config["virtual_hosts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|host| host["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        hosts,
        [
            "*.book.example:80",
            "httpbin.example.com:80",
            "secure.example:80"
        ]
    );
    let httpbin = vhost(&resources, "http.8080", "httpbin.example.com:80");
    let paths: Vec<&Value> = httpbin["routes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|route| &route["match"])
        .collect();
    assert_eq!(
        paths,
        [
            &json!({"prefix": "/status"}),
            &json!({"prefix": "/delay"}),
            &json!({"path": "/ratings"})
        ]
    );
    let book = vhost(&resources, "http.8080", "*.book.example:80");
    let paths: Vec<&Value> = book["routes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|route| &route["match"])
        .collect();
    assert_eq!(
        paths,
        [&json!({"path": "/ratings"}), &json!({"prefix": "/"})],
        "what takes everything is last"
    );
    assert_eq!(
        vhost(&resources, "http.8080", "secure.example:80")["require_tls"],
        "ALL"
    );

    let listener = j(&resources.listeners["127.30.0.5_8443"]);
    let chain = &listener["filter_chains"][0];
    assert_eq!(
        chain["filter_chain_match"],
        json!({"transport_protocol": "tls", "server_names": ["secure.example"]})
    );
    let tls = &chain["transport_socket"]["typed_config"]["common_tls_context"];
    assert_eq!(
        tls["tls_certificates"],
        json!([{"certificate_chain": {"filename": "/c"}, "private_key": {"filename": "/k"}}])
    );
    let listener = j(&resources.listeners["127.30.0.5_31400"]);
    assert_eq!(
        filter(&listener, 0, 1)["cluster"],
        "outbound|27017||mongodb.default.svc.cluster.local"
    );
}

#[test]
fn gateways_take_the_question_why_away_and_sidecars_answer_it() {
    let resources = |mesh: &str, node: &Node| translate(&world_with(mesh, GATEWAYS), node);
    let allowed = "    allowPolicyExplanation: true\n";
    for (mesh, removed) in [(allowed, json!(["x-lateen-explain"])), ("", Value::Null)] {
        for agent in ["lateen", "envoy"] {
            let resources = resources(mesh, &router(agent));
            for name in ["http.8080", "https.443.https.front.default"] {
                let config = j(&resources.routes[name]);
                assert_eq!(
                    config["request_headers_to_remove"], removed,
                    "{agent} {name}"
                );
            }
        }
    }
    let explains = |resources: &Resources, listener: &str| {
        let listener = j(&resources.listeners[listener]);
        filter(&listener, 0, 0)["http_filters"][0]["typed_config"]["allow_explanation"].clone()
    };
    let sidecar = resources(allowed, &sidecar("lateen"));
    assert_eq!(explains(&sidecar, "127.30.0.11_9080"), true);
    let gateway = resources(allowed, &router("lateen"));
    assert_eq!(explains(&gateway, "127.30.0.5_8080"), Value::Null);
}

#[test]
fn a_gateway_without_routes_answers_404() {
    let snapshot = world(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: front, namespace: default }
spec: { selector: { istio: ingressgateway }, servers: [{ port: { number: 80, name: http, protocol: HTTP }, hosts: ['*'] }] }
",
    );
    let resources = translate(&snapshot, &router("envoy"));
    let host = vhost(&resources, "http.8080", "blackhole:80");
    assert_eq!(
        host,
        json!({"name": "blackhole:80", "domains": ["*"]}),
        "no route: 404"
    );
}

#[test]
fn redirected_traffic_gets_istios_layout() {
    let redirected = node(
        "envoy",
        "
id: sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, LABELS: { app: reviews } }
",
    );
    let resources = translate(&world(""), &redirected);
    assert_eq!(
        names(&resources.listeners),
        [
            "0.0.0.0_15004",
            "0.0.0.0_27017",
            "0.0.0.0_31400",
            "0.0.0.0_443",
            "0.0.0.0_80",
            "0.0.0.0_9080",
            "0.0.0.0_9091",
            "virtualInbound",
            "virtualOutbound"
        ]
    );
    assert!(names(&resources.routes).contains(&"9080"));
    let host = vhost(&resources, "9080", "reviews.default.svc.cluster.local:9080");
    assert_eq!(host["domains"][2], "reviews");
    assert_eq!(
        vhost(&resources, "9080", "allow_any")["routes"][0]["route"]["cluster"],
        "PassthroughCluster"
    );
    // To the address that the client had meant, from one that is not redirected again.
    for name in ["inbound|9080||", "InboundPassthroughCluster"] {
        let inbound = j(&resources.clusters[name]);
        assert_eq!(inbound["type"], "ORIGINAL_DST", "{name}");
        let source = &inbound["upstream_bind_config"]["source_address"];
        assert_eq!(source["address"], "127.0.0.6", "{name}");
    }
}

#[test]
fn a_redirected_node_of_both_families_passes_both_through() {
    let both = node(
        "envoy",
        "
id: sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, LABELS: { app: reviews }, INSTANCE_IPS: '127.30.0.11,fd00::11' }
",
    );
    let resources = translate(&world(""), &both);
    let passed = j(&resources.clusters["InboundPassthroughCluster"]);
    let bind = &passed["upstream_bind_config"];
    assert_eq!(bind["source_address"]["address"], "127.0.0.6");
    assert_eq!(
        bind["extra_source_addresses"][0]["address"]["address"],
        "::6"
    );
    let outbound = j(&resources.listeners["virtualOutbound"]);
    assert_eq!(
        outbound["additional_addresses"][0]["address"]["socket_address"]["address"],
        "::"
    );
}

#[test]
fn equal_input_gives_equal_output() {
    // As JSON: the bytes of map fields are ordered when they are encoded.
    let print = |resources: Resources| -> Vec<Value> {
        let listeners = resources.listeners.values().map(j);
        let routes = resources.routes.values().map(j);
        let clusters = resources.clusters.values().map(j);
        listeners
            .chain(routes)
            .chain(clusters)
            .chain(resources.endpoints.values().map(j))
            .collect()
    };
    let once = || print(translate(&world(GATEWAYS), &router("lateen")));
    assert_eq!(once(), once());
    let once = || print(translate(&world(""), &sidecar("envoy")));
    assert_eq!(once(), once());
}
