//! RequestAuthentications and the origins of older Policies as the JWT filter.

use super::*;
use crate::model::Labels;

const KEYS: &str =
    r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;

fn rules() -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: users, namespace: default }}
spec:
  selector: {{ matchLabels: {{ app: reviews }} }}
  jwtRules:
  - issuer: z.test
    jwksUri: http://ratings:9080/keys
    audiences: [shop]
    fromHeaders: [{{ name: x-token, prefix: 'T ' }}]
    fromParams: [token]
    fromCookies: [session]
    forwardOriginalToken: true
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{{ header: x-user, claim: sub }}]
    spaceDelimitedClaims: [roles]
    timeout: 2s
  - issuer: a.test
    jwks: '{KEYS}'
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: others, namespace: default }}
spec:
  selector: {{ matchLabels: {{ app: ratings }} }}
  jwtRules: [{{ issuer: other.test, jwks: '{KEYS}' }}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: everywhere, namespace: istio-system }}
spec:
  jwtRules: [{{ issuer: m.test, jwksUri: 'https://nobody.test/keys' }}]
"
    )
}

/// The JWT filter of a listener's first connection manager.
fn jwt(resources: &Resources, listener: &str) -> Option<Value> {
    let listener = j(&resources.listeners[listener]);
    let filters = filter(&listener, 0, 0)["http_filters"].clone();
    filters
        .as_array()
        .unwrap()
        .iter()
        .find(|filter| filter["name"] == "envoy.filters.http.jwt_authn")
        .map(|filter| filter["typed_config"].clone())
}

#[test]
fn issuers_of_all_that_hold_for_the_workload_are_providers_in_the_order_of_their_names() {
    let snapshot = world(&rules());
    let resources = translate(&snapshot, &sidecar("envoy"));
    let config = jwt(&resources, "127.30.0.11_9080").unwrap();
    let issuers: Vec<&str> = ["origins-0", "origins-1", "origins-2"]
        .into_iter()
        .map(|name| config["providers"][name]["issuer"].as_str().unwrap())
        .collect();
    assert_eq!(issuers, ["a.test", "m.test", "z.test"]);
    assert_eq!(config["providers"].as_object().unwrap().len(), 3);
    assert_eq!(
        config["providers"]["origins-2"],
        json!({
            "issuer": "z.test",
            "audiences": ["shop"],
            "forward": true,
            "forward_payload_header": "x-payload",
            "from_headers": [{"name": "x-token", "value_prefix": "T "}],
            "from_params": ["token"],
            "from_cookies": ["session"],
            "payload_in_metadata": "payload",
            "normalize_payload_in_metadata": {"space_delimited_claims": ["scope", "permission", "roles"]},
            "claim_to_headers": [{"header_name": "x-user", "claim_name": "sub"}],
            "remote_jwks": {
                "http_uri": {
                    "uri": "http://ratings:9080/keys",
                    "cluster": "outbound|9080||ratings.default.svc.cluster.local",
                    "timeout": "2s",
                },
                "cache_duration": "300s",
                "async_fetch": {"fast_listener": true},
            },
        })
    );
    assert_eq!(
        config["providers"]["origins-0"]["local_jwks"]["inline_string"],
        format!(
            r#"{{"keys":[{}]}}"#,
            serde_json::from_str::<Value>(KEYS).unwrap()
        )
    );
    assert_eq!(config["bypass_cors_preflight"], true);
    let one = |name: &str| json!({"provider_name": name});
    let lax = |name: &str| json!({"requires_any": {"requirements": [{"provider_name": name}, {"allow_missing": {}}]}});
    assert_eq!(
        config["rules"],
        json!([{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [
            one("origins-0"), one("origins-1"), one("origins-2"),
            {"requires_all": {"requirements": [lax("origins-0"), lax("origins-1"), lax("origins-2")]}},
        ]}}}])
    );
}

#[test]
fn keys_that_cannot_be_had_are_nobodys_and_that_is_told() {
    let snapshot = world(&rules());
    let resources = translate(&snapshot, &sidecar("envoy"));
    let config = jwt(&resources, "127.30.0.11_9080").unwrap();
    let keys = &config["providers"]["origins-1"]["local_jwks"]["inline_string"];
    assert!(keys.as_str().unwrap().contains("\"kid\":\"nobody\""));
    let told: Vec<&String> = resources
        .conflicts
        .iter()
        .filter(|text| text.contains("refused"))
        .collect();
    assert_eq!(
        told,
        [
            "RequestAuthentication istio-system/everywhere: tokens of \"m.test\" are refused: the workload may call no \
             service nobody.test with port 443 for the keys; write a ServiceEntry for it"
        ]
    );
}

#[test]
fn only_where_requests_come_in_and_before_they_are_judged() {
    let policy = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: users, namespace: default }
spec: { rules: [{ from: [{ source: { requestPrincipals: ['*'] } }] }] }
";
    let resources = translate(&world(&format!("{}{policy}", rules())), &sidecar("lateen"));
    let listener = j(&resources.listeners["127.30.0.11_9080"]);
    let filters = filter(&listener, 0, 0)["http_filters"].clone();
    assert_eq!(filters[0]["name"], "envoy.filters.http.jwt_authn");
    assert_eq!(filters[1]["name"], "envoy.filters.http.rbac");
    assert_eq!(jwt(&resources, "127.30.1.11_15002"), None);
}

#[test]
fn a_policy_for_a_gateway_by_name_holds_for_those_that_are_of_it() {
    let policy = |target: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{ name: edge, namespace: istio-system }}
spec:
  targetRefs: [{{ group: gateway.networking.k8s.io, kind: Gateway, name: {target} }}]
  jwtRules: [{{ issuer: a.test, jwks: '{KEYS}' }}]
"
        )
    };
    let labels: Labels = [(
        "gateway.networking.k8s.io/gateway-name".to_owned(),
        "edge".to_owned(),
    )]
    .into_iter()
    .collect();
    let found = |target: &str, namespace: &str, labels: &Labels| {
        world(&policy(target))
            .token_rules(namespace, labels, None)
            .rules
            .len()
    };
    assert_eq!(found("edge", "istio-system", &labels), 1);
    assert_eq!(found("other", "istio-system", &labels), 0);
    assert_eq!(found("edge", "default", &labels), 0);
    assert_eq!(found("edge", "istio-system", &Labels::default()), 0);
}

#[test]
fn older_origins_demand_a_token_on_the_ports_they_name() {
    let policy = |more: &str| {
        format!(
            "
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{ name: users, namespace: default }}
spec:
  targets: [{{ name: reviews, ports: [{{ number: 9080 }}] }}]
  origins: [{{ jwt: {{ issuer: a.test, jwks: '{KEYS}', jwtHeaders: [x-token] }} }}]
{more}
"
        )
    };
    let labels: Labels = [("app".to_owned(), "reviews".to_owned())]
        .into_iter()
        .collect();
    let snapshot = world(&policy(""));
    assert!(
        snapshot
            .token_rules("default", &labels, Some(9080))
            .required
    );
    assert!(snapshot.token_rules("default", &labels, None).required);
    assert_eq!(
        snapshot.token_rules("default", &labels, Some(9081)).rules,
        []
    );
    let config = jwt(&translate(&snapshot, &sidecar("envoy")), "127.30.0.11_9080").unwrap();
    assert_eq!(
        config["rules"][0]["requires"],
        json!({"requires_any": {"requirements": [{"provider_name": "origins-0"}]}})
    );
    assert_eq!(config["bypass_cors_preflight"], Value::Null);
    assert_eq!(
        config["providers"]["origins-0"]["from_headers"],
        json!([{"name": "x-token"}])
    );

    let snapshot = world(&policy("  originIsOptional: true"));
    assert!(
        !snapshot
            .token_rules("default", &labels, Some(9080))
            .required
    );
    // Where a RequestAuthentication holds, the older kind is not asked.
    let both = world(&format!("{}---{}", policy(""), rules()));
    let rules = both.token_rules("default", &labels, Some(9080));
    assert!(!rules.required && rules.rules.len() == 3);
}
