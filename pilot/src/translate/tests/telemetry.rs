//! Telemetry: who logs and traces what, the narrowest object last.

use super::*;

const PROVIDERS: &str = "    extensionProviders:
    - { name: text, envoyFileAccessLog: { path: /text, logFormat: { text: '%PROTOCOL% %RESPONSE_CODE%' } } }
    - { name: json, envoyFileAccessLog: { path: /json, logFormat: { labels: { status: '%RESPONSE_CODE%' } } } }
    - { name: zipkin, zipkin: { service: istio-system/collector.istio-system.svc.cluster.local, port: 9411, maxTagLength: 99 } }
    - { name: otel, opentelemetry: { service: collector.istio-system.svc.cluster.local, port: 4317 } }
    - { name: gone, opentelemetry: { service: nowhere.example, port: 4317 } }
";

const COLLECTOR: &str = "
apiVersion: v1
kind: Service
metadata: { name: collector, namespace: istio-system }
spec: { selector: { app: collector }, ports: [{ name: grpc-otlp, port: 4317 }, { name: http-zipkin, port: 9411 }] }
";

fn telemetry(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{ name: {name}, namespace: {namespace} }}
spec: {spec}
"
    )
}

fn resources(agent: &str, mesh: &str, objects: &[String]) -> Resources {
    let mesh = format!("{PROVIDERS}{mesh}");
    let snapshot = world_with(&mesh, &(COLLECTOR.to_owned() + &objects.concat()));
    translate(&snapshot, &sidecar(agent))
}

/// The connection managers of the outbound HTTP proxy, and of the inbound port.
fn managers(resources: &Resources) -> [Value; 2] {
    ["127.30.1.11_15002", "127.30.0.11_9080"]
        .map(|name| filter(&j(&resources.listeners[name]), 0, 0).clone())
}

/// Paths of the files each side logs to, without Mixer's reports.
fn files(resources: &Resources) -> [Vec<String>; 2] {
    managers(resources).map(|manager| {
        let logs = manager["access_log"].as_array().cloned();
        logs.into_iter()
            .flatten()
            .filter_map(|log| Some(log["typed_config"]["path"].as_str()?.to_owned()))
            .collect()
    })
}

fn told(resources: &Resources) -> Vec<&str> {
    resources
        .conflicts
        .iter()
        .filter_map(|note| note.split_once("Telemetry "))
        .map(|(_, note)| note)
        .collect()
}

#[test]
fn logs_go_where_the_narrowest_object_says() {
    let of = |mesh: &str, objects: &[(&str, &str, &str)]| {
        let objects: Vec<String> = objects
            .iter()
            .map(|(namespace, name, spec)| telemetry(namespace, name, spec))
            .collect();
        files(&resources("envoy", mesh, &objects))
    };
    let both = |path: &str| [vec![path.to_owned()], vec![path.to_owned()]];
    let text = "{ accessLogging: [{ providers: [{ name: text }] }] }";
    let json = "{ accessLogging: [{ providers: [{ name: json }] }] }";
    let off = "{ accessLogging: [{ disabled: true }] }";
    let root = |spec: &'static str| ("istio-system", "mesh", spec);
    let namespace = |spec: &'static str| ("default", "namespace", spec);
    assert_eq!(of("", &[]), both("/dev/stdout"), "as the mesh has it");
    assert_eq!(of("", &[root(text)]), both("/text"));
    assert_eq!(of("", &[root(text), namespace(json)]), both("/json"));
    assert_eq!(
        of("", &[namespace(json), ("other", "x", text)]),
        both("/json")
    );
    assert_eq!(
        of(
            "",
            &[root(
                "{ accessLogging: [{ providers: [{ name: text }, { name: json }] }] }"
            )]
        ),
        [
            vec!["/json".to_owned(), "/text".to_owned()],
            vec!["/json".into(), "/text".into()]
        ]
    );
    assert_eq!(
        of("", &[root(text), namespace(off)]),
        [Vec::<String>::new(), vec![]]
    );
    assert_eq!(
        of(
            "",
            &[
                root(text),
                namespace(off),
                (
                    "default",
                    "workload",
                    "{ selector: { matchLabels: { app: reviews } }, accessLogging: [{ match: { mode: SERVER }, providers: [{ name: json }] }] }"
                )
            ]
        ),
        [vec![], vec!["/json".to_owned()]],
        "only what comes in, for this workload"
    );
    assert_eq!(
        of(
            "",
            &[namespace(
                "{ selector: { matchLabels: { app: ratings } }, accessLogging: [{ disabled: true }] }"
            )]
        ),
        both("/dev/stdout"),
        "another workload's"
    );
    let default = "    defaultProviders: { accessLogging: [text] }\n";
    assert_eq!(of(default, &[]), both("/text"));
    assert_eq!(
        of(
            default,
            &[namespace(
                "{ accessLogging: [{ match: { mode: CLIENT }, disabled: true }] }"
            )]
        ),
        [vec![], vec!["/text".to_owned()]]
    );
    assert_eq!(
        of(
            default,
            &[namespace("{ tracing: [{ randomSamplingPercentage: 1 }] }")]
        ),
        both("/text")
    );
    assert_eq!(
        of(
            "",
            &[namespace(
                "{ accessLogging: [{ providers: [{ name: envoy }] }] }"
            )]
        ),
        both("/dev/stdout")
    );

    let unknown = telemetry(
        "default",
        "x",
        "{ accessLogging: [{ providers: [{ name: nobody }, { name: otel }] }] }",
    );
    let resources = resources("envoy", "", &[unknown]);
    assert_eq!(files(&resources), [vec![], Vec::<String>::new()]);
    assert_eq!(
        told(&resources),
        [
            "default/x: spec.accessLogging[0]: provider \"otel\" writes no access logs",
            "default/x: spec.accessLogging[0]: there is no extensionProvider \"nobody\"; nothing is logged there",
        ]
    );
}

#[test]
fn formats_and_filters_are_envoys() {
    let spec = "{ accessLogging: [
      { providers: [{ name: text }], filter: { expression: \"response.code >= 500 || 'x-log' in request.headers\" } },
      { providers: [{ name: json }], filter: { expression: 'connection.mtls' } } ] }";
    let log = |resources: &Resources, path: &str| -> Value {
        managers(resources)[1]["access_log"]
            .as_array()
            .unwrap()
            .iter()
            .find(|log| log["typed_config"]["path"] == path)
            .unwrap()
            .clone()
    };
    let object = [telemetry("default", "x", spec)];
    let envoy = resources("envoy", "", &object);
    let cel = |expression: &str| {
        json!({"extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": expression,
            },
        }})
    };
    assert_eq!(
        log(&envoy, "/text")["filter"],
        cel("response.code >= 500 || 'x-log' in request.headers")
    );
    assert_eq!(log(&envoy, "/json")["filter"], cel("connection.mtls"));
    assert_eq!(
        log(&envoy, "/text")["typed_config"]["log_format"],
        json!({"text_format_source": {"inline_string": "%PROTOCOL% %RESPONSE_CODE%\n"}})
    );
    assert_eq!(
        log(&envoy, "/json")["typed_config"]["log_format"],
        json!({"json_format": {"status": "%RESPONSE_CODE%"}})
    );
    stock_envoy::accepts("telemetry", &envoy);

    let ours = resources("lateen", "", &object);
    assert_eq!(
        log(&ours, "/text")["filter"],
        json!({"or_filter": {"filters": [
            {"status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "access_log.status"}}}},
            {"header_filter": {"header": {"name": "x-log", "present_match": true}}},
        ]}})
    );
    assert_eq!(log(&ours, "/json")["filter"], Value::Null);
    assert_eq!(
        told(&ours),
        [
            "default/x: spec.accessLogging[1].filter.expression: Lateen's proxy cannot evaluate it; everything is logged there"
        ]
    );
}

#[test]
fn traces_are_overlaid_from_mesh_to_workload() {
    let tracing = |mesh: &str, agent: &str, objects: &[(&str, &str, &str)]| {
        let objects: Vec<String> = objects
            .iter()
            .map(|(namespace, name, spec)| telemetry(namespace, name, spec))
            .collect();
        let resources = resources(agent, mesh, &objects);
        if agent == "envoy" {
            stock_envoy::accepts("tracing by telemetry", &resources);
        }
        (
            managers(&resources).map(|manager| manager["tracing"].clone()),
            told(&resources)
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        )
    };
    let ([client, server], _) = tracing("", "envoy", &[]);
    assert_eq!((client, server), (Value::Null, Value::Null));
    let ([client, server], told) = tracing(
        "",
        "envoy",
        &[
            (
                "istio-system",
                "mesh",
                "{ tracing: [{ providers: [{ name: zipkin }], randomSamplingPercentage: 10, customTags: { a: { literal: { value: b } } } }] }",
            ),
            (
                "default",
                "namespace",
                "{ tracing: [{ match: { mode: SERVER }, randomSamplingPercentage: 50, customTags: { h: { header: { name: x-h, defaultValue: none } }, e: { environment: { name: HOME } }, f: { formatter: { value: '%PROTOCOL%' } } } }] }",
            ),
        ],
    );
    assert_eq!(told, Vec::<String>::new());
    assert_eq!(client["random_sampling"], json!({"value": 10}));
    assert_eq!(
        client["custom_tags"],
        json!([{"tag": "a", "literal": {"value": "b"}}])
    );
    let config = &client["provider"]["typed_config"];
    assert_eq!(
        (
            &config["collector_cluster"],
            &config["collector_endpoint"],
            &client["max_path_tag_length"]
        ),
        (
            &json!("outbound|9411||collector.istio-system.svc.cluster.local"),
            &json!("/api/v2/spans"),
            &json!(99)
        )
    );
    assert_eq!(server["random_sampling"], json!({"value": 50}));
    assert_eq!(
        server["custom_tags"],
        json!([
            {"tag": "e", "environment": {"name": "HOME"}},
            {"tag": "f", "value": "%PROTOCOL%"},
            {"tag": "h", "request_header": {"name": "x-h", "default_value": "none"}},
        ]),
        "tags are replaced, not merged"
    );
    let default = "    defaultProviders: { tracing: [otel] }\n";
    let ([client, server], _) = tracing(
        default,
        "lateen",
        &[(
            "default",
            "x",
            "{ tracing: [{ match: { mode: CLIENT }, disableSpanReporting: true }] }",
        )],
    );
    assert_eq!(client, Value::Null);
    assert_eq!(
        server["provider"]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"],
        "outbound|4317||collector.istio-system.svc.cluster.local"
    );
    assert_eq!(server["random_sampling"], json!({"value": 1}));
    // The mesh configuration's own collector, with another share.
    let own = "    enableTracing: true\n    defaultConfig: { tracing: { sampling: 5, zipkin: { address: 'collector.istio-system:9411' } } }\n";
    let ([client, _], _) = tracing(
        own,
        "envoy",
        &[(
            "default",
            "x",
            "{ tracing: [{ randomSamplingPercentage: 7 }] }",
        )],
    );
    assert_eq!(client["random_sampling"], json!({"value": 7}));
    assert!(client["provider"]["typed_config"].is_object());
    let ([client, _], told) = tracing(
        "",
        "lateen",
        &[(
            "default",
            "x",
            "{ tracing: [{ providers: [{ name: gone }] }] }",
        )],
    );
    assert_eq!(client, Value::Null);
    assert_eq!(
        told,
        [
            "default/x: spec.tracing[0]: the workload may call no service nowhere.example with port 4317; nothing is traced"
        ]
    );
    let ([client, _], told) = tracing(
        default,
        "lateen",
        &[(
            "default",
            "x",
            "{ tracing: [{ customTags: { e: { environment: { name: HOME } }, l: { literal: { value: m } } } }] }",
        )],
    );
    assert_eq!(
        client["custom_tags"],
        json!([{"tag": "l", "literal": {"value": "m"}}])
    );
    assert_eq!(told.len(), 1, "{told:?}");
}
