use crate::parse_file;

use super::*;

/// The problems of a `KIND` with this spec, without file and object.
fn judge(kind: &str, spec: &str) -> Vec<String> {
    let group = match kind {
        "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy" => {
            "security.istio.io/v1"
        }
        "QuotaSpec" | "QuotaSpecBinding" => "config.istio.io/v1alpha2",
        _ => "networking.istio.io/v1",
    };
    let text =
        format!("apiVersion: {group}\nkind: {kind}\nmetadata: {{ name: x }}\nspec: {spec}\n");
    let (objects, problems) = parse_file("x.yaml", &text);
    assert_eq!(problems, [], "{spec}");
    objects
        .iter()
        .flat_map(validate)
        .map(|problem| format!("{}: {}", problem.field, problem.reason))
        .collect()
}

#[test]
fn a_good_virtual_service_has_no_problem() {
    assert_eq!(
        judge(
            "VirtualService",
            "{hosts: [reviews], http: [{match: [{headers: {end-user: {exact: jason}}}], \
             route: [{destination: {host: reviews, subset: v1}, weight: 90}, {destination: {host: reviews, subset: v2}, weight: 10}], \
             timeout: 0.5s, retries: {attempts: 3, perTryTimeout: 1s, retryOn: 'gateway-error,503'}}, {route: [{destination: {host: reviews}}]}]}"
        ),
        Vec::<String>::new()
    );
}

#[test]
fn a_bad_virtual_service_is_told_where() {
    let cases = [
        ("{http: []}", "spec: at least one of http"),
        (
            "{gateways: [g], http: [{route: [{destination: {host: a}}]}]}",
            "spec.gateways: a VirtualService without hosts",
        ),
        (
            "{hosts: ['*'], http: [{route: [{destination: {host: a}}]}]}",
            "spec.hosts[0]: \"*\" is for gateways",
        ),
        (
            "{hosts: [a], http: [{route: [{destination: {host: ''}}]}]}",
            "spec.http[0].route[0].destination.host: ",
        ),
        (
            "{hosts: [a], http: [{route: [{destination: {host: b, port: {number: 70000}}}]}]}",
            "spec.http[0].route[0].destination.port.number: port 70000",
        ),
        (
            "{hosts: [a], http: [{timeout: 0.0001s, route: [{destination: {host: b}}]}]}",
            "spec.http[0].timeout: ",
        ),
        (
            "{hosts: [a], http: [{match: [{uri: {regex: '('}}], route: [{destination: {host: b}}]}]}",
            "spec.http[0].match[0].uri.regex: not a regular",
        ),
        (
            "{hosts: [a], http: [{route: [{destination: {host: b}, weight: -1}]}]}",
            "spec.http[0].route[0].weight: ",
        ),
        (
            "{hosts: [a], http: [{fault: {abort: {httpStatus: 700}}, route: [{destination: {host: b}}]}]}",
            "spec.http[0].fault.abort.httpStatus: 700",
        ),
        (
            "{hosts: [a], http: [{fault: {delay: {fixedDelay: 1s, percentage: {value: 101}}}, route: [{destination: {host: b}}]}]}",
            "spec.http[0].fault.delay.percentage: 101",
        ),
        (
            "{hosts: [a], http: [{redirect: {}}]}",
            "spec.http[0].redirect: one of",
        ),
        (
            "{hosts: [a], http: [{retries: {attempts: 2, retryOn: often}, route: [{destination: {host: b}}]}]}",
            "spec.http[0].retries.retryOn: \"often\"",
        ),
        (
            "{hosts: [a.b], tls: [{match: [{sniHosts: [c.d]}], route: [{destination: {host: b}}]}]}",
            "spec.tls[0].match[0].sniHosts[0]: \"c.d\" is not among",
        ),
        (
            "{hosts: [a], tcp: [{route: []}]}",
            "spec.tcp[0].route: at least one",
        ),
    ];
    for (spec, want) in cases {
        let got = judge("VirtualService", spec);
        assert!(
            got.iter().any(|problem| problem.starts_with(want)),
            "{spec}: {got:?}"
        );
    }
}

#[test]
fn other_kinds_are_told_where() {
    let cases = [
        ("DestinationRule", "{host: ''}", "spec.host: "),
        (
            "DestinationRule",
            "{host: a, subsets: [{name: v1}, {name: v1}]}",
            "spec.subsets[1].name: \"v1\" is there twice",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}}",
            "spec.trafficPolicy.connectionPool.tcp.maxConnections: ",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {tls: {mode: MUTUAL}}}",
            "spec.trafficPolicy.tls.clientCertificate: ",
        ),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {outlierDetection: {interval: 0.1ms}}}",
            "spec.trafficPolicy.outlierDetection.interval: ",
        ),
        ("Gateway", "{servers: []}", "spec.servers: "),
        (
            "Gateway",
            "{servers: [{port: {number: 80, protocol: HTPP, name: a}, hosts: ['*']}]}",
            "spec.servers[0].port.protocol: \"HTPP\"",
        ),
        (
            "Gateway",
            "{servers: [{port: {number: 443, protocol: HTTPS, name: a}, hosts: ['*']}]}",
            "spec.servers[0].tls: required",
        ),
        (
            "ServiceEntry",
            "{hosts: [a.b], ports: [{number: 0, name: http, protocol: HTTP}]}",
            "spec.ports[0].number: ",
        ),
        (
            "ServiceEntry",
            "{hosts: ['*.b'], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}",
            "spec.hosts[0]: a wildcard",
        ),
        (
            "PeerAuthentication",
            "{portLevelMtls: {8080: {mode: STRICT}}}",
            "spec.portLevelMtls: needs a selector",
        ),
        (
            "QuotaSpec",
            "{rules: [{quotas: [{quota: a, charge: 0}]}]}",
            "spec.rules[0].quotas[0].charge: ",
        ),
        (
            "QuotaSpecBinding",
            "{quotaSpecs: [{name: a}]}",
            "spec.services: ",
        ),
    ];
    for (kind, spec, want) in cases {
        let got = judge(kind, spec);
        assert!(
            got.iter().any(|problem| problem.starts_with(want)),
            "{kind} {spec}: {got:?}"
        );
    }
}

#[test]
fn what_is_right_and_not_served_is_a_warning() {
    let text = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: x }
spec: { host: a, trafficPolicy: { proxyProtocol: { version: V2 } } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: x }
spec: { hosts: [a], http: [{ delegate: { name: y } }] }
---
apiVersion: networking.istio.io/v1beta1
kind: ProxyConfig
metadata: { name: x }
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: x }
spec: { rules: [{ from: [{ source: { ipBlocks: [x] } }] }] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: y }
spec: { hosts: [a], http: [{ route: [{ destination: { host: a } }], removeResponseHeaders: [x-y] }] }
";
    let (objects, mut problems) = parse_file("x.yaml", text);
    problems.extend(objects.iter().flat_map(validate));
    problems.sort();
    let told: Vec<String> = problems
        .iter()
        .map(|problem| format!("{} {problem}", problem.is_error()))
        .collect();
    assert_eq!(
        told,
        [
            "false x.yaml:5: DestinationRule default/x: spec.trafficPolicy.proxyProtocol: not supported by this version; ignored",
            "false x.yaml:13: ProxyConfig default/x: kind: networking.istio.io ProxyConfig is not read by this version; ignored",
            "true x.yaml:20: AuthorizationPolicy default/x: spec.rules[0].from[0].source.ipBlocks[0]: \"x\" is neither an IP address nor a CIDR block",
            "false x.yaml:25: VirtualService default/y: spec.http[0].removeResponseHeaders: deprecated; use headers.request and headers.response",
        ]
    );
}

#[test]
fn tokens_that_nobody_can_verify_are_told() {
    assert_eq!(
        judge(
            "RequestAuthentication",
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: a}], jwtRules: [{issuer: a, jwksUri: 'http://b/c'}]}"
        ),
        Vec::<String>::new()
    );
    let found = judge(
        "RequestAuthentication",
        "{targetRef: {kind: Service, name: a}, jwtRules: [{issuer: a}]}",
    );
    assert!(
        found.len() == 2
            && found[0].starts_with("spec.targetRef: the policy is NOT enforced there")
            && found[1].starts_with("spec.jwtRules[0]: the issuer is not asked"),
        "{found:?}"
    );
}

#[test]
fn an_authorization_policy_is_judged() {
    let good = "{selector: {matchLabels: {app: a}}, rules: [{from: [{source: {principals: ['*'], ipBlocks: [10.0.0.0/8, '::1']}}], \
        to: [{operation: {ports: ['80']}}], when: [{key: 'request.headers[x]', values: [a]}, {key: source.ip, notValues: [1.2.3.4]}]}]}";
    assert_eq!(judge("AuthorizationPolicy", good), Vec::<String>::new());
    let cases = [
        ("{action: DENY}", "spec.rules: "),
        ("{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source: "),
        (
            "{rules: [{from: [{source: {}}]}]}",
            "spec.rules[0].from[0].source: ",
        ),
        (
            "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}",
            "spec.rules[0].from[0].source.ipBlocks[0]: ",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['0']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]: ",
        ),
        (
            "{rules: [{when: [{key: source.ip, values: [here]}]}]}",
            "spec.rules[0].when[0].values[0]: ",
        ),
        (
            "{rules: [{when: [{key: source.mood, values: [good]}]}]}",
            "spec.rules[0].when[0].key: ",
        ),
        (
            "{rules: [{when: [{key: source.ip}]}]}",
            "spec.rules[0].when[0]: ",
        ),
        (
            "{targetRefs: [{kind: Service, name: a}], rules: [{}]}",
            "spec.targetRefs[0]: the policy is NOT enforced there",
        ),
    ];
    for (spec, start) in cases {
        let found = judge("AuthorizationPolicy", spec);
        assert!(
            found.len() == 1 && found[0].starts_with(start),
            "{spec}: {found:?}"
        );
    }
}

#[test]
fn what_telemetry_cannot_have_here_is_told() {
    let text = "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: { name: x }
spec:
  metrics:
  - overrides: [{ match: { metric: REQUEST_COUNT }, disabled: true }]
    reportingInterval: 5s
  tracing: [{ enableIstioTags: false }]
---
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    defaultProviders: { accessLogging: [envoy] }
    extensionProviders:
    - { name: als, envoyOtelAls: { service: a, port: 1 } }
    - { name: log, envoyFileAccessLog: { path: /dev/stdout } }
";
    let (objects, mut problems) = parse_file("x.yaml", text);
    problems.extend(objects.iter().flat_map(validate));
    problems.sort();
    let told: Vec<String> = problems
        .iter()
        .map(|problem| format!("{} {problem}", problem.is_error()))
        .collect();
    assert_eq!(
        told,
        [
            "false x.yaml:7: Telemetry default/x: spec.metrics[0].overrides[0]: not supported by this version; metrics are made by Mixer's rules: change those",
            "false x.yaml:8: Telemetry default/x: spec.metrics[0].reportingInterval: not supported by this version; ignored",
            "false x.yaml:9: Telemetry default/x: spec.tracing[0].enableIstioTags: not supported by this version; ignored",
            "false x.yaml:15: ConfigMap istio-system/istio: data.mesh: extensionProvider \"als\": envoyOtelAls is not served by this version; ignored (Telemetry that names it logs and traces nothing there)",
        ]
    );
}
