//! What Mixer is asked under load, and the rules it answers by.

use std::fmt::Write as _;

use chrono::{DateTime, TimeDelta};
use lateen_engine::{Value, dictionary::WordList, wire};
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, ReportRequest, report_request::RepeatedAttributesSemantics,
};

/// What ships with the mesh: metrics of 20 labels each, and the workload lookup they need.
const TELEMETRY: &str = include_str!("../../../../install/config/mixer/telemetry.yaml");
/// Records of a batch: what a proxy sends at most.
pub(super) const BATCH: usize = 100;
/// Namespaces of the large configuration, and rules in each.
const NAMESPACES: usize = 1000;
const RULES: usize = 10;
/// No file may have more than a thousand objects or so.
const NAMESPACES_A_FILE: usize = 50;

/// The two ends of the request, so that the lookup finds something.
const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: productpage-v1-5d-abc
  namespace: default
  labels: { app: productpage, version: v1, pod-template-hash: 5d }
  ownerReferences: [ { apiVersion: apps/v1, kind: ReplicaSet, name: productpage-v1-5d } ]
spec:
  serviceAccountName: bookinfo-productpage
  containers: [ { name: productpage, ports: [ { containerPort: 9080 } ] } ]
status: { podIP: 127.30.0.11, phase: Running }
---
apiVersion: v1
kind: Pod
metadata:
  name: reviews-v3-0
  namespace: default
  labels: { app: reviews, version: v3 }
  ownerReferences: [ { apiVersion: apps/v1, kind: Deployment, name: reviews-v3 } ]
spec:
  containers: [ { name: reviews, ports: [ { containerPort: 9080 } ] } ]
status: { podIP: 127.30.0.12, phase: Running }
"#;

/// Ten policies: four that ask an adapter about this very request, six that are for others.
fn policies(out: &mut String, namespace: &str) {
    let mut put = |kind: &str, name: &str, spec: &str| {
        let _infallible = write!(
            out,
            "---\napiVersion: config.istio.io/v1alpha2\nkind: {kind}\n\
             metadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n{spec}\n"
        );
    };
    let lists = [
        (
            "versions",
            "blacklist: false, overrides: [v1, v2]",
            r#"source.labels["version"] | "unknown""#,
        ),
        (
            "callers",
            "blacklist: false, entryType: IP_ADDRESSES, overrides: [127.0.0.0/8, 10.0.0.0/8]",
            r#"source.ip | ip("0.0.0.0")"#,
        ),
        (
            "scanners",
            "blacklist: true, entryType: REGEX, overrides: ['^sqlmap', '^nikto']",
            r#"request.headers["user-agent"] | "-""#,
        ),
        (
            "methods",
            "blacklist: false, entryType: CASE_INSENSITIVE_STRINGS, overrides: [GET, HEAD, POST]",
            r#"request.method | "-""#,
        ),
    ];
    for (name, params, value) in lists {
        put(
            "handler",
            name,
            &format!("  compiledAdapter: listchecker\n  params: {{ {params} }}"),
        );
        put(
            "instance",
            name,
            &format!("  compiledTemplate: listentry\n  params: {{ value: '{value}' }}"),
        );
        put(
            "rule",
            name,
            &format!(
                "  match: destination.service.host == \"reviews.default.svc.cluster.local\"\n  \
                 actions: [ {{ handler: {name}, instances: [ {name} ] }} ]"
            ),
        );
    }
    put(
        "handler",
        "deny",
        "  compiledAdapter: denier\n  params: { status: { code: 7, message: no } }",
    );
    put("instance", "nothing", "  compiledTemplate: checknothing");
    for (number, condition) in [
        r#"destination.service.host == "ratings.default.svc.cluster.local" && source.labels["version"] == "v9""#,
        r#"request.headers["x-internal"] == "yes" && connection.mtls == false"#,
        r#"request.path.startsWith("/admin")"#,
        r#"match(request.host, "*.internal.example.com")"#,
        r#"request.method == "DELETE" || request.method == "PUT""#,
        r#"source.namespace == "untrusted""#,
    ]
    .iter()
    .enumerate()
    {
        put(
            "rule",
            &format!("deny-{number}"),
            &format!("  match: '{condition}'\n  actions: [ {{ handler: deny, instances: [ nothing ] }} ]"),
        );
    }
}

/// Files of Istio's default rules and ten policies.
pub(super) fn usual() -> Vec<(String, String)> {
    let mut policy = String::new();
    policies(&mut policy, "default");
    vec![
        ("telemetry.yaml".to_owned(), TELEMETRY.to_owned()),
        ("pods.yaml".to_owned(), PODS.to_owned()),
        ("policy.yaml".to_owned(), policy),
    ]
}

/// And ten thousand rules for a thousand other namespaces.
pub(super) fn large() -> Vec<(String, String)> {
    let mut files = usual();
    let mut others = String::new();
    for number in 0..NAMESPACES {
        if number % NAMESPACES_A_FILE == 0 && number > 0 {
            files.push((format!("others-{number}.yaml"), std::mem::take(&mut others)));
        }
        let namespace = format!("team-{number}");
        let _infallible = write!(
            others,
            "---\napiVersion: config.istio.io/v1alpha2\nkind: handler\n\
             metadata: {{ name: deny, namespace: {namespace} }}\n\
             spec: {{ compiledAdapter: denier, params: {{ status: {{ code: 7 }} }} }}\n\
             ---\napiVersion: config.istio.io/v1alpha2\nkind: instance\n\
             metadata: {{ name: nothing, namespace: {namespace} }}\nspec: {{ compiledTemplate: checknothing }}\n"
        );
        for rule in 0..RULES {
            let _infallible = write!(
                others,
                "---\napiVersion: config.istio.io/v1alpha2\nkind: rule\n\
                 metadata: {{ name: deny-{rule}, namespace: {namespace} }}\n\
                 spec:\n  match: destination.service.host == \"s{rule}.{namespace}.svc.cluster.local\" && source.namespace != \"{namespace}\"\n  \
                 actions: [ {{ handler: deny, instances: [ nothing ] }} ]\n"
            );
        }
    }
    files.push(("others.yaml".to_owned(), others));
    files
}

/// One metric of 20 labels, and a log that nobody keeps.
pub(super) fn metric_and_null_log() -> Vec<(String, String)> {
    let telemetry: Vec<&str> = TELEMETRY
        .split("\n---\n")
        .filter(|object| {
            let is = |kind: &str, name: &str| {
                object.contains(&format!("kind: {kind}\n"))
                    && object.contains(&format!("  name: {name}\n"))
            };
            is("instance", "requestcount") || is("instance", "accesslog")
        })
        .collect();
    let labels = [
        "reporter",
        "source_app",
        "source_principal",
        "source_workload",
        "source_workload_namespace",
        "source_version",
        "destination_app",
        "destination_principal",
        "destination_workload",
        "destination_workload_namespace",
        "destination_version",
        "destination_service",
        "destination_service_name",
        "destination_service_namespace",
        "request_protocol",
        "response_code",
        "response_flags",
        "permissive_response_code",
        "permissive_response_policyid",
        "connection_security_policy",
    ];
    let rules = format!(
        "apiVersion: config.istio.io/v1alpha2\nkind: handler\nmetadata: {{ name: prometheus, namespace: istio-system }}\n\
         spec:\n  compiledAdapter: prometheus\n  params:\n    metrics:\n    - name: requests_total\n      \
         instance_name: requestcount.instance.istio-system\n      kind: COUNTER\n      label_names: [{}]\n\
         ---\napiVersion: config.istio.io/v1alpha2\nkind: handler\nmetadata: {{ name: null-log, namespace: istio-system }}\n\
         spec: {{ compiledAdapter: noop }}\n\
         ---\napiVersion: config.istio.io/v1alpha2\nkind: rule\nmetadata: {{ name: both, namespace: istio-system }}\n\
         spec:\n  actions:\n  - {{ handler: prometheus, instances: [ requestcount ] }}\n  - {{ handler: null-log, instances: [ accesslog ] }}\n",
        labels.join(", ")
    );
    vec![
        ("instances.yaml".to_owned(), telemetry.join("\n---\n")),
        ("rules.yaml".to_owned(), rules),
    ]
}

fn headers(agent: &str) -> Value {
    let all = [
        (":authority", "reviews:9080"),
        (":method", "GET"),
        (":path", "/reviews/0"),
        ("user-agent", agent),
        ("accept", "*/*"),
        ("accept-encoding", "gzip, deflate"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "4b7c1d52-51c9-9d39-8c65-1d1f7a1c3b58"),
        ("x-b3-traceid", "463ac35c9f6413ad48485a3953bb6124"),
        ("x-b3-spanid", "a2fb4a1d1a96d312"),
        ("x-b3-sampled", "1"),
        ("content-length", "0"),
    ];
    Value::StringMap(all.into_iter().collect())
}

/// What a sidecar knows when a request comes in.
fn request(agent: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("connection.mtls", true.into()),
        ("context.protocol", "http".into()),
        ("context.reporter.kind", "inbound".into()),
        (
            "context.reporter.uid",
            "kubernetes://reviews-v3-0.default".into(),
        ),
        (
            "destination.ip",
            Value::Ip(std::net::Ipv4Addr::new(127, 30, 0, 12).into()),
        ),
        ("destination.namespace", "default".into()),
        ("destination.port", 9080_i64.into()),
        (
            "destination.service.host",
            "reviews.default.svc.cluster.local".into(),
        ),
        ("destination.service.name", "reviews".into()),
        ("destination.service.namespace", "default".into()),
        (
            "destination.service.uid",
            "istio://default/services/reviews".into(),
        ),
        (
            "destination.uid",
            "kubernetes://reviews-v3-0.default".into(),
        ),
        ("request.headers", headers(agent)),
        ("request.host", "reviews:9080".into()),
        ("request.method", "GET".into()),
        ("request.path", "/reviews/0".into()),
        ("request.scheme", "http".into()),
        ("request.time", time().into()),
        ("request.url_path", "/reviews/0".into()),
        ("request.useragent", agent.into()),
        (
            "source.ip",
            Value::Ip(std::net::Ipv4Addr::new(127, 30, 0, 11).into()),
        ),
        ("source.namespace", "default".into()),
        (
            "source.principal",
            "cluster.local/ns/default/sa/bookinfo-productpage".into(),
        ),
        (
            "source.uid",
            "kubernetes://productpage-v1-5d-abc.default".into(),
        ),
    ]
}

fn time() -> DateTime<chrono::Utc> {
    DateTime::UNIX_EPOCH + TimeDelta::seconds(1_540_000_000)
}

fn borrowed<'a>(all: &'a [(&'static str, Value)]) -> impl Iterator<Item = (&'a str, &'a Value)> {
    all.iter().map(|(name, value)| (*name, value))
}

fn known() -> u32 {
    u32::try_from(wire::GLOBAL_WORD_COUNT).unwrap_or_default()
}

/// A check that every policy lets pass.
pub(super) fn check(agent: &str) -> CheckRequest {
    CheckRequest {
        attributes: Some(wire::encode(
            borrowed(&request(agent)),
            wire::GLOBAL_WORD_COUNT,
        )),
        global_word_count: known(),
        deduplication_id: "5a4e8a0c-3a37-45f6-8a52-8b5a7f3d2f7b1".to_owned(),
        quotas: std::collections::HashMap::default(),
    }
}

/// The check, and a header of this name.
pub(super) fn check_with_header(name: &str) -> CheckRequest {
    let mut attributes = request("curl/8.5.0");
    for (attribute, value) in &mut attributes {
        if let Value::StringMap(map) = value
            && *attribute == "request.headers"
        {
            let more = map
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .chain([(name.to_owned(), "x".to_owned())]);
            *value = Value::StringMap(more.collect());
        }
    }
    CheckRequest {
        attributes: Some(wire::encode(borrowed(&attributes), wire::GLOBAL_WORD_COUNT)),
        global_word_count: known(),
        ..CheckRequest::default()
    }
}

/// A batch of records as a proxy sends it: words shared, each record whole. `principal` makes series.
pub(super) fn report(principal: impl Fn(usize) -> String) -> ReportRequest {
    let mut words = WordList::new(wire::GLOBAL_WORD_COUNT);
    let attributes = (0..BATCH)
        .map(|number| {
            let mut all = request("curl/8.5.0");
            all.retain(|(name, _)| *name != "source.principal");
            let count = i64::try_from(number).unwrap_or_default();
            all.extend([
                ("check.cache_hit", Value::from(true)),
                ("check.error_code", 0_i64.into()),
                ("connection.id", format!("{number}").as_str().into()),
                (
                    "request.id",
                    format!("4b7c1d52-51c9-9d39-8c65-{number:012}")
                        .as_str()
                        .into(),
                ),
                ("request.size", 0_i64.into()),
                ("request.total_size", 512_i64.into()),
                (
                    "response.code",
                    if number % 10 == 0 { 404_i64 } else { 200 }.into(),
                ),
                (
                    "response.duration",
                    TimeDelta::microseconds(3000 + 17 * count).into(),
                ),
                ("response.size", (295 + count).into()),
                ("response.time", time().into()),
                ("response.total_size", (400 + count).into()),
                ("source.principal", principal(number).as_str().into()),
            ]);
            wire::encode_with(borrowed(&all), &mut words)
        })
        .collect();
    ReportRequest {
        attributes,
        default_words: words.into_words(),
        global_word_count: known(),
        repeated_attributes_semantics: i32::from(RepeatedAttributesSemantics::IndependentEncoding),
    }
}
