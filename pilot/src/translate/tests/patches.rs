//! EnvoyFilters: what they change, in which order, and what they may not.

use super::*;

/// An EnvoyFilter of namespace `default`; patches are items of a YAML list.
fn filter(name: &str, more: &str, patches: &str) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {{ name: {name}, namespace: default }}
spec:
  {more}
  configPatches:
{patches}
"
    )
}

const LUA: &str = "{ name: lua, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua, default_source_code: { inline_string: 'x = NAME' } } }";

fn lua(name: &str) -> String {
    LUA.replace("name: lua", &format!("name: {name}"))
        .replace("NAME", name)
}

/// Beside reviews-v1, captured by iptables.
fn captured(agent: &str) -> Node {
    node(
        agent,
        "
id: sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, LABELS: { app: reviews, version: v1 }, ISTIO_VERSION: 1.30.3, TIER: gold }
",
    )
}

fn patched(text: &str) -> Resources {
    translate(&world(text), &captured("envoy"))
}

fn plain() -> Resources {
    patched("")
}

fn http_filters(listener: &Value, chain: usize) -> Vec<String> {
    filter_names(&listener["filter_chains"][chain]["filters"][0]["typed_config"]["http_filters"])
}

fn filter_names(filters: &Value) -> Vec<String> {
    filters
        .as_array()
        .into_iter()
        .flatten()
        .map(|filter| filter["name"].as_str().unwrap().to_owned())
        .collect()
}

const OUTBOUND: &str = "0.0.0.0_9080";

/// Position of each of these among the HTTP filters of the outbound listener.
fn order(resources: &Resources) -> Vec<String> {
    http_filters(&j(&resources.listeners[OUTBOUND]), 0)
}

#[test]
fn http_filters_are_put_where_they_are_wanted() {
    let before = order(&plain());
    let patch = |operation: &str, sub: &str, value: &str| {
        format!(
            "  - applyTo: HTTP_FILTER
    match: {{ context: SIDECAR_OUTBOUND, listener: {{ portNumber: 9080, filterChain: {{ filter: {{ name: envoy.filters.network.http_connection_manager{sub} }} }} }} }}
    patch: {{ operation: {operation}, value: {value} }}
"
        )
    };
    let at = |name: &str| format!(", subFilter: {{ name: {name} }}");
    let text = [
        patch("INSERT_BEFORE", &at("envoy.filters.http.router"), &lua("a")),
        patch("INSERT_FIRST", "", &lua("b")),
        patch("INSERT_AFTER", &at("envoy.filters.http.cors"), &lua("c")),
        patch("ADD", "", &lua("d")),
        patch("INSERT_BEFORE", &at("envoy.fault"), &lua("e")),
        patch("REPLACE", &at("c"), &lua("f")),
        patch("INSERT_BEFORE", &at("nobody"), &lua("never")),
        patch("REMOVE", &at("envoy.filters.http.fault"), "{}"),
        patch(
            "MERGE",
            &at("a"),
            "{ typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua, stat_prefix: merged } }",
        ),
        patch(
            "MERGE",
            "",
            "{ typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors } }",
        ),
    ]
    .concat();
    let resources = patched(&filter("x", "priority: 0", &text));
    let mut want = vec!["b".to_owned()];
    for name in before {
        match name.as_str() {
            "envoy.filters.http.cors" => want.extend([name, "f".into()]),
            "envoy.filters.http.fault" => want.push("e".into()),
            "envoy.filters.http.router" => want.extend(["a".into(), "d".into(), name]),
            _ => want.push(name),
        }
    }
    assert_eq!(order(&resources), want);
    let listener = j(&resources.listeners[OUTBOUND]);
    let filters = &listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
    let a = filters
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["name"] == "a");
    assert_eq!(
        a.unwrap()["typed_config"],
        json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": "x = a"}, "stat_prefix": "merged",
        }),
        "of one type the messages within are merged"
    );
    let told: Vec<&String> = resources
        .conflicts
        .iter()
        .filter(|note| note.contains("EnvoyFilter"))
        .collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0]
            .ends_with("EnvoyFilter default/x: spec.configPatches[6] matches nothing of this node")
            && told[0].starts_with("world.yaml:"),
        "{told:?}"
    );
    stock_envoy::accepts("http patches", &resources);
}

#[test]
fn listeners_chains_and_network_filters_are_patched() {
    let text = "
  - applyTo: LISTENER
    match: { context: SIDECAR_OUTBOUND, listener: { portNumber: 9080 } }
    patch: { operation: MERGE, value: { per_connection_buffer_limit_bytes: 7, stat_prefix: 'patched', listener_filters_timeout: 500ms } }
  - applyTo: LISTENER
    match: { context: SIDECAR_OUTBOUND, listener: { portNumber: 9091 } }
    patch: { operation: REMOVE }
  - applyTo: LISTENER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: ADD, value: { name: mine, address: { socket_address: { address: 127.0.0.1, port_value: 15999 } }, filter_chains: [ { filters: [ { name: envoy.filters.network.echo, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo } } ] } ] } }
  - applyTo: LISTENER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: ADD, value: { name: mine } }
  - applyTo: LISTENER
    match: { context: SIDECAR_OUTBOUND, listener: { name: virtualOutbound } }
    patch: { operation: MERGE, value: { name: other } }
  - applyTo: NETWORK_FILTER
    match: { context: SIDECAR_INBOUND, listener: { portNumber: 9080, filterChain: { transportProtocol: tls, applicationProtocols: 'istio,istio-h2', filter: { name: envoy.http_connection_manager } } } }
    patch: { operation: MERGE, value: { typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, server_name: patched, common_http_protocol_options: { idle_timeout: 30s } } } }
  - applyTo: NETWORK_FILTER
    match: { context: SIDECAR_INBOUND, listener: { filterChain: { destinationPort: 9080 } } }
    patch: { operation: INSERT_FIRST, value: { name: limit, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit, stat_prefix: x, max_connections: 10 } } }
  - applyTo: LISTENER_FILTER
    match: { context: SIDECAR_INBOUND, listener: { name: virtualInbound } }
    patch: { operation: INSERT_FIRST, value: { name: envoy.filters.listener.proxy_protocol, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol, allow_requests_without_proxy_protocol: true } } }
  - applyTo: FILTER_CHAIN
    match: { context: SIDECAR_INBOUND, listener: { filterChain: { destinationPort: 9080, transportProtocol: raw_buffer } } }
    patch: { operation: REMOVE }
";
    let before = plain();
    let resources = patched(&filter(
        "x",
        "workloadSelector: { labels: { app: reviews } }",
        text,
    ));
    let listener = j(&resources.listeners[OUTBOUND]);
    assert_eq!(
        (
            &listener["per_connection_buffer_limit_bytes"],
            &listener["stat_prefix"],
            &listener["listener_filters_timeout"]
        ),
        (&json!(7), &json!("patched"), &json!("0.500s"))
    );
    let gone: Vec<&String> = before
        .listeners
        .keys()
        .filter(|name| !resources.listeners.contains_key(*name))
        .collect();
    assert_eq!(gone, ["0.0.0.0_9091"]);
    assert!(resources.listeners.contains_key("mine"));
    let chains = |resources: &Resources| -> Vec<Value> {
        let inbound = j(&resources.listeners["virtualInbound"]);
        let chains = inbound["filter_chains"].as_array().unwrap();
        chains
            .iter()
            .filter(|chain| chain["filter_chain_match"]["destination_port"] == 9080)
            .cloned()
            .collect()
    };
    let (old, new) = (chains(&before), chains(&resources));
    let is_raw = |chain: &Value| chain["filter_chain_match"]["transport_protocol"] == "raw_buffer";
    assert!(old.iter().any(is_raw) && !new.iter().any(is_raw), "{new:?}");
    for chain in &new {
        assert_eq!(chain["filters"][0]["name"], "limit");
        let manager = &chain["filters"][1]["typed_config"];
        let patched = manager["server_name"] == "patched";
        let protocols = &chain["filter_chain_match"]["application_protocols"];
        let wanted = protocols
            .as_array()
            .is_some_and(|all| all.contains(&json!("istio-h2")));
        assert_eq!(patched, wanted, "{protocols}");
        if patched {
            assert_eq!(
                manager["common_http_protocol_options"],
                json!({"idle_timeout": "30s"})
            );
            assert!(manager["http_filters"].is_array(), "the rest stays");
        }
    }
    let inbound = j(&resources.listeners["virtualInbound"]);
    assert_eq!(
        inbound["listener_filters"][0]["name"],
        "envoy.filters.listener.proxy_protocol"
    );
    let told: Vec<&str> = resources
        .conflicts
        .iter()
        .filter_map(|note| note.split_once("EnvoyFilter default/x: "))
        .map(|(_, note)| note)
        .collect();
    assert_eq!(
        told,
        [
            "spec.configPatches[3]: not applied: there is one of name \"mine\" already",
            "spec.configPatches[4]: not applied: it would give listener virtualOutbound another name, by which nobody would find it",
        ]
    );
    stock_envoy::accepts("listener patches", &resources);
}

#[test]
fn routes_and_virtual_hosts_are_patched() {
    let reviews = "reviews.default.svc.cluster.local:9080";
    let ratings = "ratings.default.svc.cluster.local:9080";
    let text = format!(
        "
  - applyTo: ROUTE_CONFIGURATION
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ portNumber: 9080 }} }}
    patch: {{ operation: MERGE, value: {{ response_headers_to_add: [ {{ header: {{ key: x-a, value: b }} }} ] }} }}
  - applyTo: VIRTUAL_HOST
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ vhost: {{ name: '{reviews}' }} }} }}
    patch: {{ operation: MERGE, value: {{ include_request_attempt_count: false, request_headers_to_remove: [x-b] }} }}
  - applyTo: VIRTUAL_HOST
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ name: '9080' }} }}
    patch: {{ operation: ADD, value: {{ name: mine, domains: [mine.example], routes: [ {{ match: {{ prefix: / }}, direct_response: {{ status: 204 }} }} ] }} }}
  - applyTo: VIRTUAL_HOST
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ name: '9080' }} }}
    patch: {{ operation: ADD, value: {{ name: thief, domains: [ratings] }} }}
  - applyTo: VIRTUAL_HOST
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ vhost: {{ domainName: ratings }} }} }}
    patch: {{ operation: REPLACE, value: {{ name: '{ratings}', domains: [ratings], routes: [] }} }}
  - applyTo: HTTP_ROUTE
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ vhost: {{ name: '{reviews}', route: {{ action: ROUTE }} }} }} }}
    patch: {{ operation: MERGE, value: {{ route: {{ max_stream_duration: {{ max_stream_duration: 5s }} }} }} }}
  - applyTo: HTTP_ROUTE
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ vhost: {{ name: '{reviews}' }} }} }}
    patch: {{ operation: INSERT_FIRST, value: {{ name: first, match: {{ path: /teapot }}, direct_response: {{ status: 418 }} }} }}
  - applyTo: HTTP_ROUTE
    match: {{ context: SIDECAR_OUTBOUND, routeConfiguration: {{ vhost: {{ name: '{reviews}', route: {{ name: first }} }} }} }}
    patch: {{ operation: INSERT_AFTER, value: {{ name: second, match: {{ path: /coffee }}, direct_response: {{ status: 200 }} }} }}
  - applyTo: HTTP_ROUTE
    match: {{ context: SIDECAR_INBOUND, routeConfiguration: {{ portNumber: 9080 }} }}
    patch: {{ operation: MERGE, value: {{ route: {{ timeout: 3s }} }} }}
"
    );
    let resources = patched(&filter("x", "", &text));
    let config = j(&resources.routes["9080"]);
    assert_eq!(config["response_headers_to_add"][0]["header"]["key"], "x-a");
    let host = vhost(&resources, "9080", reviews);
    assert_eq!(host["request_headers_to_remove"], json!(["x-b"]));
    let names: Vec<&Value> = host["routes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|route| &route["name"])
        .collect();
    assert_eq!(names[..2], [&json!("first"), &json!("second")]);
    assert_eq!(
        host["routes"][2]["route"]["max_stream_duration"],
        json!({"max_stream_duration": "5s"})
    );
    assert_eq!(
        host["routes"][2]["route"]["cluster"],
        "outbound|9080||reviews.default.svc.cluster.local"
    );
    assert!(vhost(&resources, "9080", "mine")["routes"].is_array());
    assert_eq!(
        vhost(&resources, "9080", ratings)["domains"],
        json!(["ratings"])
    );
    let inbound = j(&resources.routes["inbound|9080||"]);
    assert_eq!(
        inbound["virtual_hosts"][0]["routes"][0]["route"]["timeout"],
        "3s"
    );
    let told: Vec<&str> = resources
        .conflicts
        .iter()
        .filter_map(|note| note.split_once("EnvoyFilter default/x: "))
        .map(|(_, note)| note)
        .collect();
    assert_eq!(
        told,
        ["spec.configPatches[3]: not applied: two virtual hosts would be for domain \"ratings\""]
    );
    stock_envoy::accepts("route patches", &resources);
}

#[test]
fn clusters_are_patched() {
    let text = "
  - applyTo: CLUSTER
    match: { context: SIDECAR_OUTBOUND, cluster: { service: reviews.default.svc.cluster.local, portNumber: 9080 } }
    patch: { operation: MERGE, value: { connect_timeout: 250ms, track_timeout_budgets: true, typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: { idle_timeout: 9s } } } } }
  - applyTo: CLUSTER
    match: { cluster: { name: BlackHoleCluster } }
    patch: { operation: REMOVE }
  - applyTo: CLUSTER
    match: { context: SIDECAR_INBOUND, cluster: { portNumber: 9080 } }
    patch: { operation: MERGE, value: { per_connection_buffer_limit_bytes: 4096 } }
  - applyTo: CLUSTER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: ADD, value: { name: mine, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: mine, endpoints: [] } } }
  - applyTo: CLUSTER
    match: { context: GATEWAY }
    patch: { operation: REMOVE }
  - applyTo: EXTENSION_CONFIG
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: ADD, value: { name: shared, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua, default_source_code: { inline_string: 'x = 1' } } } }
  - applyTo: HTTP_FILTER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: INSERT_FIRST, value: { name: shared, config_discovery: { config_source: { ads: {}, resource_api_version: V3 }, type_urls: [type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua] } } }
";
    let text = filter("x", "", text);
    let resources = patched(&text);
    let cluster = j(&resources.clusters["outbound|9080||reviews.default.svc.cluster.local"]);
    assert_eq!(
        (
            &cluster["connect_timeout"],
            &cluster["track_timeout_budgets"]
        ),
        (&json!("0.250s"), &json!(true))
    );
    let options = &cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
    assert!(
        options["explicit_http_config"].is_object()
            && options["common_http_protocol_options"] == json!({"idle_timeout": "9s"}),
        "{options}"
    );
    assert!(!resources.clusters.contains_key("BlackHoleCluster"));
    assert_eq!(
        resources.clusters["inbound|9080||"]
            .per_connection_buffer_limit_bytes
            .unwrap()
            .value,
        4096
    );
    assert!(resources.clusters.contains_key("mine"));
    assert_eq!(names(&resources.extensions), ["shared"]);
    let discovered = |resources: &Resources| {
        let listener = j(&resources.listeners[OUTBOUND]);
        let filters = &listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
        filters[0].clone()
    };
    assert!(discovered(&resources)["config_discovery"].is_object());
    let ours = translate(&world(&text), &captured("lateen"));
    assert!(
        discovered(&ours)["typed_config"]["default_source_code"].is_object(),
        "our proxy is told at once"
    );
}

#[test]
fn filters_are_for_some_proxies_and_come_in_order() {
    let put = |name: &str, of: &str| {
        format!(
            "  - applyTo: HTTP_FILTER\n    match: {{ context: SIDECAR_OUTBOUND{of} }}\n    patch: {{ operation: INSERT_FIRST, value: {} }}\n",
            lua(name)
        )
    };
    let of = |proxy: &str| {
        put(
            &proxy.replace(['{', '}', ' ', ':', '.', '^'], ""),
            &format!(", proxy: {{ {proxy} }}"),
        )
    };
    let first = |text: &str, count: usize| -> Vec<String> {
        order(&patched(text)).into_iter().take(count).collect()
    };
    assert_eq!(
        first(
            &filter(
                "x",
                "",
                &[
                    of("proxyVersion: ^1.30.*"),
                    of("proxyVersion: ^1.4.*"),
                    of("metadata: { TIER: gold }"),
                    of("metadata: { TIER: iron }"),
                    put("gateways", "").replace("SIDECAR_OUTBOUND", "GATEWAY"),
                ]
                .concat()
            ),
            2
        ),
        [
            "metadata TIER gold".replace(' ', ""),
            "proxyVersion130*".to_owned()
        ]
    );
    // What is applied last comes first.
    let root =
        filter("r", "", &put("root", "")).replace("namespace: default", "namespace: istio-system");
    let own = filter("o", "", &put("own", ""));
    let urgent = filter("u", "priority: -1", &put("urgent", ""));
    let late = filter("l", "priority: 5", &put("late", ""))
        .replace("namespace: default", "namespace: istio-system");
    let elsewhere =
        filter("e", "", &put("elsewhere", "")).replace("namespace: default", "namespace: other");
    let others = filter(
        "s",
        "workloadSelector: { labels: { app: ratings } }",
        &put("others", ""),
    );
    let gateways = filter(
        "g",
        "targetRefs: [{ group: gateway.networking.k8s.io, kind: Gateway, name: front }]",
        &put("gateways", ""),
    );
    let all = [late, own, elsewhere, root, urgent, others, gateways].concat();
    assert_eq!(first(&all, 4), ["late", "own", "root", "urgent"]);
    assert_eq!(
        order(&patched(&all)).len(),
        order(&plain()).len() + 4,
        "and no other"
    );
}

#[test]
fn what_cannot_be_read_changes_nothing_and_is_told() {
    let text = filter(
        "x",
        "",
        "
  - applyTo: CLUSTER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: MERGE, value: { connect_timeout: 1s, from_the_future: true } }
  - applyTo: HTTP_FILTER
    match: { context: SIDECAR_OUTBOUND }
    patch: { operation: INSERT_FIRST, value: { name: y, typed_config: { '@type': type.googleapis.com/udpa.of.nobody } } }
  - applyTo: BOOTSTRAP
    patch: { operation: MERGE, value: { node: { id: x } } }
",
    );
    let same = |resources: &Resources| -> Vec<Value> {
        let listeners = resources.listeners.values().map(j);
        let clusters = resources.clusters.values().map(j);
        listeners.chain(clusters).collect()
    };
    let resources = patched(&text);
    assert!(same(&resources) == same(&plain()) && resources.extensions.is_empty());
    assert_eq!(resources.conflicts, plain().conflicts);
    let (objects, problems) = parse_file("x.yaml", &text);
    assert_eq!(problems, []);
    let told: Vec<String> = objects
        .iter()
        .flat_map(validate)
        .filter(|problem| problem.reason.contains("NOT applied"))
        .map(|problem| problem.to_string())
        .collect();
    assert_eq!(told.len(), 3, "{told:#?}");
    assert!(
        told[0].starts_with("x.yaml:12: EnvoyFilter default/x: spec.configPatches[0].patch.value: the patch is NOT applied: the value is not wholly a envoy.config.cluster.v3.Cluster"),
        "{told:#?}"
    );
}

#[test]
fn what_patches_add_is_bounded() {
    // Each of many patches puts a long value into every HTTP listener.
    let long = "y".repeat(200_000);
    let value = lua("long").replace("x = long", &long);
    let patch = format!(
        "  - applyTo: HTTP_FILTER\n    match: {{ context: ANY }}\n    patch: {{ operation: INSERT_FIRST, value: {value} }}\n"
    );
    let resources = patched(&filter("x", "", &patch.repeat(40)));
    let size: usize = resources.listeners.values().map(Message::encoded_len).sum();
    assert!(
        (8 << 20..17 << 20).contains(&size),
        "{size} bytes of listeners"
    );
    assert!(
        resources
            .conflicts
            .iter()
            .any(|note| note.contains("patches add more than")),
        "{:?}",
        resources.conflicts
    );
}
