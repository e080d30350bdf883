use serde_json::json;

use super::*;

/// What a review of `KIND` with this spec (in YAML) says, warnings with a `~` in front.
fn judged(kind: &str, spec: &str) -> Vec<String> {
    let api_version = match kind {
        "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy" => {
            "security.istio.io/v1"
        }
        "Telemetry" => "telemetry.istio.io/v1",
        "WasmPlugin" | "TrafficExtension" => "extensions.istio.io/v1alpha1",
        "Policy" | "MeshPolicy" => "authentication.istio.io/v1alpha1",
        "ServiceRole" | "ServiceRoleBinding" | "ClusterRbacConfig" => "rbac.istio.io/v1alpha1",
        "QuotaSpec" | "HTTPAPISpec" | "RouteRule" | "DestinationPolicy" | "EgressRule" => {
            "config.istio.io/v1alpha2"
        }
        "EnvoyFilter" => "networking.istio.io/v1alpha3",
        "ProxyConfig" => "networking.istio.io/v1beta1",
        _ => "networking.istio.io/v1",
    };
    let spec = crate::yaml::documents(spec).unwrap().remove(0).value;
    let document = json!({
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": "x", "namespace": "ns"},
        "spec": spec,
    });
    review(&document)
        .unwrap()
        .iter()
        .map(|finding| {
            let sign = if finding.is_error() { "" } else { "~" };
            format!("{sign}{}: {}", finding.field, finding.reason)
        })
        .collect()
}

/// Each spec says exactly one thing, which begins so.
fn say_one_thing(kind: &str, cases: &[(&str, &str)]) {
    for (spec, want) in cases {
        let got = judged(kind, spec);
        assert!(
            got.len() == 1 && got[0].starts_with(want),
            "{kind} {spec}: {got:#?}, not {want:?}"
        );
    }
}

fn say_nothing(kind: &str, specs: &[&str]) {
    for spec in specs {
        assert_eq!(judged(kind, spec), Vec::<String>::new(), "{kind} {spec}");
    }
}

#[test]
fn a_document_says_what_and_who_it_is() {
    assert!(review(&json!([])).is_err());
    assert!(review(&json!({"kind": "Gateway"})).is_err());
    let no_name = json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway"});
    assert_eq!(review(&no_name).unwrap_err().field, "metadata.name");
    let foreign = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}});
    assert_eq!(review(&foreign), Ok(Vec::new()));
    let old = json!({
        "apiVersion": "networking.istio.io/v2", "kind": "EnvoyFilter", "hosts": [], "metadata": {"name": "x"},
    });
    let said: Vec<String> = review(&old)
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        said,
        [
            "hosts: unknown field: not apiVersion, kind, metadata or spec (is it meant to be below spec?)",
            "apiVersion: EnvoyFilter has no version \"v2\" (write networking.istio.io/v1alpha3)",
        ]
    );
}

#[test]
fn virtual_services() {
    const TO: &str = "route: [{destination: {host: b.c}}]";
    let route = |more: &str| format!("{{hosts: [a.b], http: [{{{TO}, {more}}}]}}");
    for (more, want) in [
        (
            "redirect: {uri: /}",
            "spec.http[0].route: redirect and route",
        ),
        (
            "headers: {request: {set: {a: '%'}}}",
            "spec.http[0].headers.request.set.a: a lone %",
        ),
        (
            "headers: {response: {set: {host: a}}}",
            "spec.http[0].headers.response.set.host: \"host\" cannot",
        ),
        (
            "headers: {request: {set: {host: a, ':authority': b}}}",
            "spec.http[0].headers.request.set.host: the authority",
        ),
        (
            "corsPolicy: {maxAge: 1.5s}",
            "spec.http[0].corsPolicy.maxAge: 1.5s is not a whole",
        ),
        (
            "fault: {abort: {grpcStatus: X}}",
            "spec.http[0].fault.abort.grpcStatus: \"X\"",
        ),
        (
            "fault: {abort: {percentage: {value: 1}}}",
            "~spec.http[0].fault.abort: neither",
        ),
        (
            "retries: {attempts: 0, retryOn: 5xx}",
            "spec.http[0].retries.attempts: 0 attempts",
        ),
        (
            "rewrite: {uri: /, uriRegexRewrite: {match: a, rewrite: b}}",
            "spec.http[0].rewrite: uri and",
        ),
        (
            "mirrorPercent: 5",
            "~spec.http[0].mirrorPercent: deprecated",
        ),
        (
            "match: [{headers: {'@request.auth.claims.a': {exact: x}}}]",
            "spec.http[0].match[0].headers.@request.auth.claims.a: routing by JWT",
        ),
        (
            "match: [{method: {prefix: ''}}]",
            "spec.http[0].match[0].method.prefix: an empty",
        ),
    ] {
        say_one_thing("VirtualService", &[(&route(more), want)]);
    }
    say_one_thing(
        "VirtualService",
        &[
            (
                &format!("{{hosts: ['*.b', a.b], http: [{{{TO}}}]}}"),
                "spec.hosts[0]: \"*.b\" and",
            ),
            (
                &format!("{{hosts: [a.b], gateways: [g.ns.svc], http: [{{{TO}}}]}}"),
                "~spec.gateways[0]: an old",
            ),
            (
                &format!("{{hosts: [a.b], exportTo: ['*', x], http: [{{{TO}}}]}}"),
                "spec.exportTo: \"*\"",
            ),
            (
                &format!("{{hosts: [a.b], exportTo: [., ns], http: [{{{TO}}}]}}"),
                "spec.exportTo[1]: \"ns\"",
            ),
            (
                &format!("{{hosts: [a.b], http: [{{delegate: {{name: x}}, {TO}}}]}}"),
                "spec.http[0].route: a route that",
            ),
            (
                &format!("{{hosts: [a.b], tls: [{{match: [{{sniHosts: [1.2.3.4]}}], {TO}}}]}}"),
                "~spec.tls[0].match[0].sniHosts[0]: \"1.2.3.4\"",
            ),
        ],
    );
    say_nothing(
        "VirtualService",
        &[
            &format!("{{http: [{{{TO}}}]}}"),
            &format!(
                "{{hosts: ['*'], gateways: [g], http: [{{match: [{{headers: {{a: {{}}}}}}], {TO}}}]}}"
            ),
            &format!(
                "{{hosts: [a.b], tls: [{{match: [{{sniHosts: [a.b]}}], {TO}}}], tcp: [{{{TO}}}]}}"
            ),
        ],
    );
}

#[test]
fn routes_that_nothing_reaches() {
    const TO: &str = "route: [{destination: {host: b.c}}]";
    say_one_thing(
        "VirtualService",
        &[
            (
                &format!("{{hosts: [a.b], http: [{{{TO}}}, {{{TO}}}]}}"),
                "~spec.http[1]: route #1 is never used",
            ),
            (
                &format!(
                    "{{hosts: [a.b], http: [{{match: [{{uri: {{prefix: /a}}}}], {TO}}}, \
                     {{name: n, match: [{{uri: {{prefix: /a/b}}}}], {TO}}}]}}"
                ),
                "~spec.http[1].match[0]: match #0 of route \"n\" (prefix /a/b) has no effect",
            ),
        ],
    );
    let twice = judged(
        "VirtualService",
        &format!(
            "{{hosts: [a.b], tcp: [{{match: [{{port: 1}}], {TO}}}, {{match: [{{port: 1}}], {TO}}}]}}"
        ),
    );
    assert_eq!(
        twice,
        [
            "~spec.tcp[1].match[0]: match #0 of route #1 has no effect: route #0 has the same",
            "~spec.tcp[1]: route #1 is never used: earlier routes have all its matches",
        ]
    );
}

#[test]
fn destination_rules() {
    let policy = |text: &str| format!("{{host: a, trafficPolicy: {{{text}}}}}");
    for (text, want) in [
        ("", "spec.trafficPolicy: says nothing"),
        (
            "connectionPool: {}",
            "spec.trafficPolicy.connectionPool: says nothing",
        ),
        (
            "tls: {mode: SIMPLE, credentialName: a, caCrl: b}",
            "spec.trafficPolicy.tls.credentialName: ",
        ),
        (
            "loadBalancer: {consistentHash: {maglev: {tableSize: 1000}}}",
            "spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize: 1000",
        ),
        (
            "loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}",
            "spec.trafficPolicy.loadBalancer: only one of",
        ),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 50}}]}}",
            "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to: the weights add up to 50",
        ),
        (
            "loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b/c: 50, b/*: 50}}]}}",
            "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to.b/c: \"b/c\" overlaps",
        ),
        (
            "loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}",
            "~spec.trafficPolicy.loadBalancer.localityLbSetting: failover",
        ),
        (
            "loadBalancer: {warmup: {duration: 1s, aggression: 0.5}}",
            "spec.trafficPolicy.loadBalancer.warmup.aggression: 0.5",
        ),
        (
            "portLevelSettings: [{port: {number: 1}}]",
            "spec.trafficPolicy.portLevelSettings[0]: says nothing",
        ),
    ] {
        say_one_thing("DestinationRule", &[(&policy(text), want)]);
    }
    say_one_thing(
        "DestinationRule",
        &[(
            "{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [x]}",
            "spec.exportTo: ",
        )],
    );
}

#[test]
fn gateways_and_sidecars() {
    let server = |tls: &str| {
        format!(
            "{{servers: [{{hosts: [a.b], port: {{number: 1, name: n, protocol: HTTPS}}, tls: {{{tls}}}}}]}}"
        )
    };
    for (tls, want) in [
        (
            "mode: SIMPLE, credentialName: a, credentialNames: [b]",
            "spec.servers[0].tls: only one",
        ),
        (
            "mode: SIMPLE, privateKey: a",
            "spec.servers[0].tls.serverCertificate: required",
        ),
        (
            "mode: ISTIO_MUTUAL, credentialName: a",
            "spec.servers[0].tls.credentialName: ISTIO_MUTUAL",
        ),
        (
            "credentialName: a",
            "~spec.servers[0].tls: PASSTHROUGH uses",
        ),
        (
            "mode: SIMPLE, credentialName: a, cipherSuites: [x]",
            "~spec.servers[0].tls.cipherSuites[0]: \"x\"",
        ),
    ] {
        say_one_thing("Gateway", &[(&server(tls), want)]);
    }
    say_one_thing(
        "Gateway",
        &[
            (
                "{servers: [{hosts: [a], port: {number: 1, name: n, protocol: HTTP}}]}",
                "spec.servers[0].hosts[0]: \"a\" is a short",
            ),
            (
                "{servers: [{hosts: ['*'], port: {number: 1, name: n, protocol: HTTP}, tls: {mode: SIMPLE, credentialName: a}}]}",
                "spec.servers[0].tls: a plain HTTP port",
            ),
        ],
    );
    say_one_thing(
        "Sidecar",
        &[
            ("{}", "spec: says nothing"),
            (
                "{egress: [{hosts: [a]}]}",
                "spec.egress[0].hosts[0]: \"a\" must be",
            ),
            (
                "{egress: [{hosts: ['*/*', ./a.b]}]}",
                "~spec.egress[0].hosts: */*",
            ),
            (
                "{egress: [{hosts: [./*]}, {port: {number: 1, protocol: HTTP}, hosts: [./*]}]}",
                "spec.egress[0]: a listener without",
            ),
            (
                "{ingress: [{port: {number: 1, protocol: HTTP}, defaultEndpoint: 1.2.3.4:5}]}",
                "spec.ingress[0].defaultEndpoint: ",
            ),
            (
                "{egress: [{hosts: [./*]}], outboundTrafficPolicy: {egressProxy: {host: a}}}",
                "spec.outboundTrafficPolicy.egressProxy: needs",
            ),
        ],
    );
}

#[test]
fn service_entries_and_workloads() {
    let entry = |text: &str| {
        format!("{{hosts: [a.b], ports: [{{number: 80, name: http, protocol: HTTP}}], {text}}}")
    };
    for (text, want) in [
        (
            "resolution: DNS, addresses: [10.0.0.0/8]",
            "spec.addresses[0]: a CIDR",
        ),
        (
            "resolution: STATIC, endpoints: [{address: c.d}]",
            "spec.endpoints[0].address: \"c.d\" is not",
        ),
        (
            "resolution: STATIC, endpoints: [{address: 1.1.1.1, ports: {x: 1}}]",
            "spec.endpoints[0].ports.x: the ServiceEntry",
        ),
        (
            "endpoints: [{address: 1.1.1.1}]",
            "spec.endpoints: resolution NONE",
        ),
        (
            "resolution: DNS_ROUND_ROBIN, endpoints: [{address: a}, {address: b}]",
            "spec.endpoints: DNS_ROUND_ROBIN",
        ),
        ("resolution: DYNAMIC_DNS", "spec.hosts[0]: DYNAMIC_DNS"),
        (
            "workloadSelector: {labels: {a: b}}",
            "~spec.workloadSelector: has no effect",
        ),
    ] {
        say_one_thing("ServiceEntry", &[(&entry(text), want)]);
    }
    say_one_thing(
        "WorkloadEntry",
        &[
            ("{}", "spec.address: missing"),
            ("{network: n}", "~spec.address: missing"),
            ("{address: 'unix://a'}", "spec.address: unix://a"),
            ("{address: a_b}", "spec.address: \"a_b\" is neither"),
        ],
    );
    say_one_thing(
        "WorkloadGroup",
        &[
            ("{}", "spec.template: missing"),
            ("{template: {}, probe: {}}", "spec.probe: one of"),
            (
                "{template: {}, probe: {httpGet: {}}}",
                "spec.probe.httpGet.port: missing",
            ),
        ],
    );
}

#[test]
fn policies() {
    say_one_thing(
        "AuthorizationPolicy",
        &[
            ("{action: DENY}", "spec.rules: DENY"),
            (
                "{action: CUSTOM, rules: [{}]}",
                "spec.provider.name: required",
            ),
            (
                "{provider: {name: x}, rules: [{}]}",
                "spec.provider: is for CUSTOM",
            ),
            (
                "{rules: [{from: [{source: {}}]}]}",
                "spec.rules[0].from[0].source: says nothing",
            ),
            (
                "{rules: [{to: [{operation: {ports: [http]}}]}]}",
                "spec.rules[0].to[0].operation.ports[0]: \"http\"",
            ),
            (
                "{rules: [{to: [{operation: {paths: ['/a/{**}/{*}']}}]}]}",
                "spec.rules[0].to[0].operation.paths[0]: ",
            ),
            (
                "{rules: [{when: [{key: a.b, values: [c]}]}]}",
                "spec.rules[0].when[0].key: \"a.b\"",
            ),
            (
                "{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
                "spec.rules[0].from[0].source: serviceAccounts",
            ),
            (
                "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
                "~spec.rules[0]: on TCP",
            ),
            (
                "{selector: {matchLabels: {a: 'b*'}}}",
                "spec.selector.matchLabels.a: a selector",
            ),
            (
                "{targetRefs: [{kind: Pod, name: x}]}",
                "spec.targetRefs[0]: \"Pod\"",
            ),
        ],
    );
    say_nothing(
        "AuthorizationPolicy",
        &[
            "{}",
            "{rules: [{}]}",
            "{rules: [{to: [{operation: {paths: ['/a/{*}/{**}']}}]}]}",
        ],
    );
    say_one_thing(
        "RequestAuthentication",
        &[
            (
                "{jwtRules: [{issuer: a, jwksUri: a.b}]}",
                "spec.jwtRules[0].jwksUri: ",
            ),
            (
                "{jwtRules: [{issuer: a, jwks: '{'}]}",
                "spec.jwtRules[0].jwks: not JSON",
            ),
            (
                "{jwtRules: [{issuer: a, jwks: '{\"keys\":[{\"kty\":\"RSA\",\"n\":\"a\"}]}'}]}",
                "spec.jwtRules[0].jwks: key 0 (RSA) has no e",
            ),
            (
                "{jwtRules: [{issuer: a, jwks: '{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"a\",\"y\":\"b\",\"d\":\"c\"}'}]}",
                "~spec.jwtRules[0].jwks: key 0 holds",
            ),
        ],
    );
    say_one_thing(
        "Telemetry",
        &[
            (
                "{accessLogging: [{filter: {expression: 'response.code >='}}]}",
                "spec.accessLogging[0].filter.expression: not a CEL",
            ),
            (
                "{accessLogging: [{filter: {expression: 'answer.code >= 400'}}]}",
                "spec.accessLogging[0].filter.expression: \"answer\"",
            ),
            (
                "{metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: b}}}]}]}",
                "spec.metrics[0].overrides[0].tagOverrides.a.value: ",
            ),
        ],
    );
    say_one_thing(
        "WasmPlugin",
        &[
            ("{url: 'ftp://a'}", "spec.url: ftp://"),
            ("{url: a, sha256: b}", "spec.sha256: must be"),
            (
                "{url: a, vmConfig: {env: [{name: A}, {name: A}]}}",
                "spec.vmConfig.env[1].name: \"A\"",
            ),
        ],
    );
    say_one_thing(
        "ProxyConfig",
        &[("{concurrency: -1}", "spec.concurrency: may not")],
    );
}

#[test]
fn envoy_filters() {
    let patch = |text: &str| format!("{{configPatches: [{{{text}}}]}}");
    for (text, want) in [
        ("applyTo: CLUSTER", "spec.configPatches[0].patch: missing"),
        (
            "applyTo: CLUSTER, patch: {operation: ADD}",
            "spec.configPatches[0].patch.value: required",
        ),
        (
            "applyTo: CLUSTER, match: {listener: {}}, patch: {operation: REMOVE}",
            "spec.configPatches[0].match.listener: CLUSTER",
        ),
        (
            "applyTo: CLUSTER, patch: {operation: ADD, value: {name: 1}}",
            "spec.configPatches[0].patch.value: not a envoy",
        ),
        (
            "applyTo: CLUSTER, patch: {operation: ADD, value: {nome: a}}",
            "~spec.configPatches[0].patch.value: not wholly",
        ),
        (
            "applyTo: HTTP_FILTER, patch: {operation: INSERT_FIRST, value: {name: a, typed_config: {'@type': type.googleapis.com/envoy.config.x.v2.Y}}}",
            "spec.configPatches[0].patch.value.typed_config.@type: envoy.config.x.v2.Y is of",
        ),
        (
            "applyTo: HTTP_FILTER, match: {listener: {filterChain: {filter: {name: envoy.http_connection_manager}}}}, patch: {operation: REMOVE}",
            "~spec.configPatches[0].match.listener.filterChain.filter.name: \"envoy.http_connection_manager\"",
        ),
    ] {
        say_one_thing("EnvoyFilter", &[(&patch(text), want)]);
    }
    say_nothing(
        "EnvoyFilter",
        &[&patch(
            "applyTo: CLUSTER, patch: {operation: MERGE, value: {connect_timeout: 500ms, lb_policy: RING_HASH}}",
        )],
    );
}

#[test]
fn kinds_of_old() {
    say_one_thing(
        "Policy",
        &[
            ("{}", "spec.targets: at least one"),
            ("{targets: [{name: a.b}]}", "spec.targets[0].name: \"a.b\""),
        ],
    );
    say_one_thing("MeshPolicy", &[("{}", "metadata.name: a MeshPolicy")]);
    say_one_thing(
        "ClusterRbacConfig",
        &[("{mode: ON}", "metadata.name: a ClusterRbacConfig")],
    );
    say_one_thing(
        "ServiceRole",
        &[(
            "{rules: [{services: [a], methods: [GET], notMethods: [PUT]}]}",
            "spec.rules[0].notMethods: methods and",
        )],
    );
    say_one_thing(
        "ServiceRoleBinding",
        &[(
            "{subjects: [{names: ['*']}], roleRef: {kind: ServiceRole, name: a}}",
            "spec.subjects[0].names[0]: \"*\"",
        )],
    );
    say_one_thing(
        "QuotaSpec",
        &[(
            "{rules: [{quotas: [{quota: a}]}]}",
            "spec.rules[0].quotas[0].charge: ",
        )],
    );
    say_one_thing(
        "HTTPAPISpec",
        &[(
            "{patterns: [{httpMethod: GET}]}",
            "spec.patterns[0].uriTemplate: one of",
        )],
    );
    say_one_thing(
        "RouteRule",
        &[
            (
                "{destination: {name: a}, route: [{weight: 50}, {weight: 49}]}",
                "spec.route: the weights",
            ),
            (
                "{destination: {name: a}, httpFault: {delay: {percent: 10, fixedDelay: 2h}}}",
                "spec.httpFault.delay.fixedDelay: 2h",
            ),
        ],
    );
    say_one_thing(
        "EgressRule",
        &[(
            "{destination: {service: 1.0.0.0/8}, ports: [{port: 80, protocol: http}]}",
            "spec.ports[0].protocol: a CIDR",
        )],
    );
    say_one_thing("DestinationPolicy", &[("{}", "spec.destination: missing")]);
}
