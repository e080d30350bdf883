//! AuthorizationPolicies as RBAC filters.

use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter, http_filter,
};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;

use super::*;
use crate::translate::authorization::{custom_filters, http_filters, network_filters};

const POLICIES: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: readers, namespace: default }
spec:
  selector: { matchLabels: { app: reviews } }
  rules:
  - from: [{ source: { principals: [cluster.local/ns/default/sa/page] } }]
    to: [{ operation: { methods: [GET], paths: ['/reviews/*', '/{*}/info'] } }]
    when: [{ key: 'request.headers[x-user]', values: ['*'] }]
---
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: { name: no-strangers, namespace: istio-system }
spec:
  action: DENY
  rules:
  - from: [{ source: { notNamespaces: [default], notIpBlocks: [10.0.0.0/8] } }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: others, namespace: default }
spec:
  selector: { matchLabels: { app: ratings } }
  rules: [{}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: ask, namespace: default }
spec:
  action: CUSTOM
  provider: { name: somebody }
  rules: [{ to: [{ operation: { paths: [/admin] } }] }]
";

fn scoped<T>(snapshot: &Snapshot, node: &Node, of: impl Fn(&Scope<'_>) -> T) -> T {
    of(&Scope::new(snapshot, node))
}

#[test]
fn policies_of_the_workload_become_filters_in_the_order_they_decide() {
    let snapshot = world(POLICIES);
    let filters: Vec<Value> = scoped(&snapshot, &sidecar("envoy"), |scope| {
        [custom_filters(scope, false), http_filters(scope)].concat()
    })
    .iter()
    .map(j)
    .collect();
    let rules = |at: usize| &filters[at]["typed_config"]["rules"];
    assert_eq!(filters.len(), 3);
    assert_eq!(rules(0)["action"], "DENY");
    assert_eq!(
        rules(0)["policies"]["ns[default]-policy[ask]-rule[0]-deny-due-to-bad-CUSTOM-action"]["permissions"]
            [0]["and_rules"]["rules"][0]["or_rules"]["rules"][0]["url_path"]["path"]["exact"],
        "/admin",
        "nobody can be asked: refused"
    );
    assert_eq!(
        rules(1)["policies"]["ns[istio-system]-policy[no-strangers]-rule[0]"]["principals"],
        json!([{"and_ids": {"ids": [
            {"not_id": {"or_ids": {"ids": [{"authenticated": {"principal_name": {"safe_regex": {"regex": ".*/ns/default/.*"}}}}]}}},
            {"not_id": {"or_ids": {"ids": [{"direct_remote_ip": {"address_prefix": "10.0.0.0", "prefix_len": 8}}]}}},
        ]}}])
    );
    assert_eq!(
        *rules(2),
        json!({"policies": {"ns[default]-policy[readers]-rule[0]": {
            "permissions": [{"and_rules": {"rules": [
                {"or_rules": {"rules": [{"header": {"name": ":method", "string_match": {"exact": "GET"}}}]}},
                {"or_rules": {"rules": [
                    {"url_path": {"path": {"prefix": "/reviews/"}}},
                    {"url_path": {"path": {"safe_regex": {"regex": "/[^/]+/info"}}}},
                ]}},
            ]}}],
            "principals": [{"and_ids": {"ids": [
                {"or_ids": {"ids": [{"authenticated": {"principal_name": {"exact": "spiffe://cluster.local/ns/default/sa/page"}}}]}},
                {"or_ids": {"ids": [{"header": {"name": "x-user", "present_match": true}}]}},
            ]}}],
        }}})
    );
}

#[test]
fn requests_are_judged_before_anything_else_and_only_where_they_come_in() {
    let snapshot = world(POLICIES);
    let resources = translate(&snapshot, &sidecar("lateen"));
    let names = |listener: &str| -> Vec<String> {
        let listener = j(&resources.listeners[listener]);
        filter(&listener, 0, 0)["http_filters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|filter| filter["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(
        names("127.30.0.11_9080")[..4],
        [
            "envoy.filters.http.rbac",
            "envoy.filters.http.rbac",
            "envoy.filters.http.rbac",
            "mixer"
        ]
    );
    assert!(!names("127.30.1.11_15002").contains(&"envoy.filters.http.rbac".to_owned()));
}

#[test]
fn what_a_connection_cannot_show_is_not_allowed_and_does_not_save_from_denial() {
    let snapshot = world(POLICIES);
    let filters = scoped(&snapshot, &sidecar("envoy"), network_filters);
    let filters: Vec<Value> = filters.iter().map(j).collect();
    // CUSTOM's path is not seen: denied whatever it is. ALLOW's method neither: allowed to nobody.
    assert_eq!(
        filters[0]["typed_config"]["rules"]["policies"]["ns[default]-policy[ask]-rule[0]-deny-due-to-bad-CUSTOM-action"]
            ["permissions"],
        json!([{"and_rules": {"rules": [{"any": true}]}}])
    );
    assert_eq!(filters[2]["typed_config"]["rules"], json!({}));
}

#[test]
fn a_rule_that_is_not_understood_is_taken_strictly() {
    let of = |action: &str| {
        let (objects, problems) = parse_file(
            "p.yaml",
            &format!(
                "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: p, namespace: default }}
spec: {{ action: {action}, rules: [{{ when: [{{ key: source.mood, values: [good] }}] }}] }}
"
            ),
        );
        assert_eq!(problems, []);
        assert!(
            validate(&objects[0])
                .iter()
                .any(lateen_config::Problem::is_error)
        );
        let snapshot = Snapshot::build(&ConfigSet {
            objects: objects.into_iter().map(Arc::new).collect(),
            ..Default::default()
        });
        let filters = scoped(&snapshot, &sidecar("envoy"), http_filters);
        j(&filters[0])["typed_config"]["rules"].clone()
    };
    assert_eq!(of("ALLOW"), json!({}));
    assert_eq!(
        of("DENY")["policies"]["ns[default]-policy[p]-rule[0]"],
        json!({"permissions": [{"any": true}], "principals": [{"any": true}]})
    );
}

/// A trust domain and its aliases, as upstream's tests of that name have them.
fn trust(name: &str) -> &'static str {
    match name {
        "simple-policy-multiple-td-aliases" => {
            "    trustDomain: td1\n    trustDomainAliases: [cluster.local, some-td]\n"
        }
        "td-aliases-source-principal" => {
            "    trustDomain: new-td\n    trustDomainAliases: [old-td, some-trustdomain]\n"
        }
        _ => "",
    }
}

#[test]
fn filters_are_istios() {
    let Some(corpus) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("LATEEN_CORPUS is not set: Istio's RBAC filters are not compared");
        return;
    };
    let mut compared = 0;
    for layer in ["http", "tcp"] {
        let folder = std::path::Path::new(&corpus)
            .join("pilot/extra/authz")
            .join(layer);
        let mut files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        for file in files {
            let name = file.file_name().unwrap().to_str().unwrap();
            let Some(name) = name.strip_suffix("-in.yaml") else {
                continue;
            };
            // Nobody is asked yet.
            if name.starts_with("custom") {
                continue;
            }
            let wanted: Vec<String> = ["", "1", "2"]
                .iter()
                .filter_map(|number| {
                    std::fs::read_to_string(folder.join(format!("{name}-out{number}.yaml"))).ok()
                })
                .collect();
            assert!(!wanted.is_empty(), "{name}");
            let policies = std::fs::read_to_string(&file).unwrap();
            let snapshot = world_with(trust(name), &format!("\n{policies}"));
            let node = node(
                "envoy",
                "
id: sidecar~10.1.1.1~httpbin.foo~foo.svc.cluster.local
metadata: { NAMESPACE: foo, LABELS: { app: httpbin, version: v1 } }
",
            );
            if layer == "http" {
                let unpack = |filter: &HttpFilter| {
                    let Some(http_filter::ConfigType::TypedConfig(any)) = &filter.config_type
                    else {
                        panic!()
                    };
                    HttpRbac::decode(any.value.as_slice()).unwrap()
                };
                let got = scoped(&snapshot, &node, http_filters);
                let got: Vec<HttpRbac> = got.iter().map(unpack).collect();
                let wanted: Vec<HttpRbac> = wanted
                    .iter()
                    .map(|text| unpack(&from_yaml(text).unwrap()))
                    .collect();
                assert_eq!(got, wanted, "{name}");
            } else {
                let unpack = |filter: &Filter| {
                    let Some(filter::ConfigType::TypedConfig(any)) = &filter.config_type else {
                        panic!()
                    };
                    NetworkRbac::decode(any.value.as_slice()).unwrap()
                };
                let got = scoped(&snapshot, &node, network_filters);
                let got: Vec<NetworkRbac> = got.iter().map(unpack).collect();
                let wanted: Vec<NetworkRbac> = wanted
                    .iter()
                    .map(|text| unpack(&from_yaml(text).unwrap()))
                    .collect();
                assert_eq!(got, wanted, "{name}");
            }
            compared += 1;
        }
    }
    assert!(compared > 10, "{compared}");
}

#[test]
fn stock_envoy_takes_them() {
    super::stock_envoy::accepts(
        "authorization",
        &translate(&world(POLICIES), &sidecar("envoy")),
    );
}

#[test]
fn the_documented_policy_is_read() {
    let page = include_str!("../../../../docs/reference/authorization.md");
    let yaml = page
        .split("```yaml")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let snapshot = world(yaml);
    let ratings = node(
        "envoy",
        "
id: sidecar~127.30.0.13~ratings-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, LABELS: { app: ratings } }
",
    );
    assert_eq!(scoped(&snapshot, &ratings, http_filters).len(), 1);
    assert_eq!(scoped(&snapshot, &sidecar("envoy"), http_filters).len(), 0);
}

const PROVIDERS: &str = "    extensionProviders:
    - name: call
      envoyExtAuthzGrpc:
        service: default/ratings.default.svc.cluster.local
        port: 9080
        timeout: 2ms
        failOpen: true
        includeRequestBodyInCheck: { maxRequestBytes: 4096, allowPartialMessage: true }
    - name: web
      envoyExtAuthzHttp:
        service: ratings.default.svc.cluster.local
        port: 9080
        pathPrefix: /check
        statusOnError: '503'
        includeRequestHeadersInCheck: [x-id, x-prefix-*, '*-suffix']
        includeAdditionalHeadersInCheck: { x-b: '2', x-a: '1' }
        headersToUpstreamOnAllow: [authorization]
        headersToDownstreamOnDeny: [set-cookie]
        headersToDownstreamOnAllow: [x-ok]
    - name: far
      envoyExtAuthzGrpc: { service: nobody.test, port: 80 }
    - name: odd
      zipkin: { service: ratings.default.svc.cluster.local, port: 9080 }
";

fn custom(name: &str, provider: &str, path: &str) -> String {
    format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: {name}, namespace: default }}
spec: {{ action: CUSTOM, provider: {{ name: {provider} }}, rules: [{{ to: [{{ operation: {{ paths: [{path}] }} }}] }}] }}
"
    )
}

fn world_of_providers(policies: &str) -> Snapshot {
    let (objects, problems) = parse_file(
        "world.yaml",
        &format!(
            "{}{}---{policies}",
            MESH.replace(
                "    accessLogFile",
                &format!("{PROVIDERS}    accessLogFile")
            ),
            pod("reviews-v1-x", "reviews", "v1", "127.30.0.11", true)
        ),
    );
    assert_eq!(problems, []);
    Snapshot::build(&ConfigSet {
        objects: objects.into_iter().map(Arc::new).collect(),
        ..Default::default()
    })
}

#[test]
fn a_provider_is_asked_about_what_shadow_rules_mark() {
    let snapshot = world_of_providers(
        &[
            custom("a", "call", "/a"),
            custom("b", "web", "/b"),
            custom("c", "call", "/c"),
        ]
        .concat(),
    );
    let filters: Vec<Value> = scoped(&snapshot, &sidecar("envoy"), |scope| {
        custom_filters(scope, false)
    })
    .iter()
    .map(j)
    .collect();
    let names: Vec<&Value> = filters.iter().map(|filter| &filter["name"]).collect();
    let (marks, asks) = ("envoy.filters.http.rbac", "envoy.filters.http.ext_authz");
    assert_eq!(names, [marks, asks, marks, asks]);
    let marked = &filters[0]["typed_config"];
    assert_eq!(marked["rules"], Value::Null);
    assert_eq!(marked["shadow_rules_stat_prefix"], "istio_ext_authz_");
    assert_eq!(marked["shadow_rules"]["action"], "DENY");
    let policies = marked["shadow_rules"]["policies"].as_object().unwrap();
    assert_eq!(
        policies.keys().collect::<Vec<_>>(),
        [
            "istio-ext-authz-call-ns[default]-policy[a]-rule[0]",
            "istio-ext-authz-call-ns[default]-policy[c]-rule[0]"
        ]
    );
    let meant = |provider: &str| {
        json!({
            "filter": "envoy.filters.http.rbac",
            "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
            "value": {"string_match": {"prefix": format!("istio-ext-authz-{provider}")}},
        })
    };
    let without_type = |filter: &Value| {
        let mut config = filter["typed_config"].clone();
        config.as_object_mut().unwrap().remove("@type");
        config
    };
    let (host, cluster) = (
        "ratings.default.svc.cluster.local",
        "outbound|9080||ratings.default.svc.cluster.local",
    );
    assert_eq!(
        without_type(&filters[1]),
        json!({
            "grpc_service": {
                "envoy_grpc": {"cluster_name": cluster, "authority": host},
                "timeout": "0.002s",
            },
            "failure_mode_allow": true,
            "transport_api_version": "V3",
            "status_on_error": {"code": "Forbidden"},
            "with_request_body": {"max_request_bytes": 4096, "allow_partial_message": true},
            "filter_enabled_metadata": meant("call"),
        })
    );
    let exact = |text: &str| json!({"exact": text, "ignore_case": true});
    assert_eq!(
        without_type(&filters[3]),
        json!({
            "http_service": {
                "server_uri": {"uri": format!("http://{host}"), "cluster": cluster, "timeout": "600s"},
                "path_prefix": "/check",
                "authorization_request": {
                    "headers_to_add": [{"key": "x-a", "value": "1"}, {"key": "x-b", "value": "2"}],
                },
                "authorization_response": {
                    "allowed_upstream_headers": {"patterns": [exact("authorization")]},
                    "allowed_client_headers": {"patterns": [exact("set-cookie")]},
                    "allowed_client_headers_on_success": {"patterns": [exact("x-ok")]},
                },
            },
            "allowed_headers": {"patterns": [
                exact("x-id"),
                {"prefix": "x-prefix-", "ignore_case": true},
                {"suffix": "-suffix", "ignore_case": true},
            ]},
            "transport_api_version": "V3",
            "status_on_error": {"code": "ServiceUnavailable"},
            "filter_enabled_metadata": meant("web"),
        })
    );
}

#[test]
fn whom_nobody_can_be_asked_about_is_refused_and_that_is_told() {
    for (provider, why) in [
        (
            "far",
            "the workload may call no service nobody.test with port 80",
        ),
        (
            "odd",
            "extensionProvider \"odd\" is neither envoyExtAuthzGrpc nor envoyExtAuthzHttp",
        ),
        ("who", "there is no extensionProvider \"who\""),
    ] {
        let snapshot = world_of_providers(&custom("a", provider, "/a"));
        let filters = scoped(&snapshot, &sidecar("lateen"), |scope| {
            custom_filters(scope, false)
        });
        let filters: Vec<Value> = filters.iter().map(j).collect();
        assert_eq!(filters.len(), 1);
        assert_eq!(filters[0]["typed_config"]["rules"]["action"], "DENY");
        let conflicts = translate(&snapshot, &sidecar("lateen")).conflicts;
        let told = format!("AuthorizationPolicy default/a: what its rules match is refused: {why}");
        assert!(conflicts.contains(&told), "{conflicts:?}");
    }
}

#[test]
fn who_asks_mixer_by_the_same_filter_is_told_apart() {
    // Routes set Mixer's filter by its name; those settings are not the provider's.
    let snapshot = world_of_providers(&custom("a", "call", "/a"));
    let listener = j(&translate(&snapshot, &sidecar("envoy")).listeners["127.30.0.11_9080"]);
    let filters = filter(&listener, 0, 0)["http_filters"].clone();
    let mut names: Vec<&str> = filters
        .as_array()
        .unwrap()
        .iter()
        .map(|filter| filter["name"].as_str().unwrap())
        .filter(|name| name.contains("ext_authz"))
        .collect();
    assert_eq!(names.first(), Some(&"envoy.filters.http.ext_authz.custom"));
    names.dedup();
    assert_eq!(names.len(), 2);
}
