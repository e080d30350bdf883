//! What we say, judged by Envoy itself (`ENVOY_BIN`, else the project's `.venv`): `--mode validate` of a
//! bootstrap that holds the resources.

use std::path::PathBuf;
use std::process::Command;

use super::*;

fn envoy() -> Option<PathBuf> {
    let path = match std::env::var_os("ENVOY_BIN") {
        Some(named) => PathBuf::from(named),
        None => PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../.venv/lib/python3.11/site-packages/envoy/_bin/envoy"
        )),
    };
    if path.exists() {
        Some(path)
    } else {
        eprintln!("skipped: no Envoy at {} (set ENVOY_BIN)", path.display());
        None
    }
}

/// A bootstrap of everything: listeners and clusters as they are, route configurations in listeners
/// made for them. In a `closed` world every route must have its cluster.
fn bootstrap(resources: &Resources, closed: bool) -> Value {
    let cluster = |name: &str| {
        json!({
            "name": name, "type": "STATIC", "connect_timeout": "1s",
            "load_assignment": {"cluster_name": name},
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }},
        })
    };
    let mut clusters: Vec<Value> = resources.clusters.values().map(j).collect();
    clusters.push(cluster("sds-grpc"));
    clusters.push(cluster("xds-grpc"));
    let mut listeners: Vec<Value> = resources.listeners.values().map(j).collect();
    for (index, config) in resources.routes.values().enumerate() {
        let mut config = j(config);
        config["validate_clusters"] = json!(closed);
        listeners.push(json!({
            "name": format!("routes-{index}"),
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 20000 + index}},
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "x",
                    "route_config": config,
                    "http_filters": [
                        {"name": "envoy.filters.http.cors", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}},
                        {"name": "envoy.filters.http.fault", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"}},
                        {"name": "envoy.filters.http.router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}},
                    ],
                },
            }]}],
        }));
    }
    json!({
        "node": {"id": "x", "cluster": "x"},
        "dynamic_resources": {"ads_config": {
            "api_type": "GRPC", "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
        }},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

pub(super) fn accepts(name: &str, resources: &Resources) {
    accepts_world(name, resources, true);
}

fn accepts_world(name: &str, resources: &Resources, closed: bool) {
    let Some(envoy) = envoy() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(format!("{name}.json"));
    std::fs::write(
        &file,
        serde_json::to_string_pretty(&bootstrap(resources, closed)).unwrap(),
    )
    .unwrap();
    let output = Command::new(envoy)
        .args([
            "--mode",
            "validate",
            "--log-level",
            "error",
            "--base-id",
            "0",
            "--use-dynamic-base-id",
            "-c",
        ])
        .arg(&file)
        .output()
        .unwrap();
    let told = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{name}: {told}");
}

/// One of everything a user may write.
const EVERYTHING: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: reviews, namespace: default }
spec:
  hosts: [reviews]
  http:
  - match: [{ headers: { end-user: { exact: jason } }, uri: { prefix: /reviews } }, { uri: { prefix: '' }, scheme: { exact: http }, authority: { prefix: rev } }]
    fault: { delay: { fixedDelay: 7s }, abort: { grpcStatus: UNAVAILABLE } }
    rewrite: { uri: / }
    timeout: 0.5s
    retries: { attempts: 3, perTryTimeout: 1s, retryOn: '5xx,503', backoff: 10ms }
    mirror: { host: reviews, subset: v2 }
    headers: { request: { set: { x-a: '100%%', Host: other }, remove: [x-b] }, response: { add: { x-c: '%PROTOCOL%' } } }
    corsPolicy: { allowOrigin: ['*'], allowMethods: [GET], allowHeaders: [x], exposeHeaders: [y], maxAge: 24h, allowCredentials: true, unmatchedPreflights: IGNORE }
    route: [{ destination: { host: reviews, subset: v1 } }]
  - match: [{ uri: { exact: /old } }]
    redirect: { uri: /new, authority: a.example, scheme: https, derivePort: FROM_PROTOCOL_DEFAULT, redirectCode: 308 }
  - match: [{ uri: { regex: /hi.* }, ignoreUriCase: true, queryParams: { a: { exact: b }, c: {} }, withoutHeaders: { x: { exact: y }, z: {}, w: { regex: '*' } }, method: { regex: 'GET|POST' } }]
    directResponse: { status: 418, body: { bytes: dGVh } }
  - match: [{ uri: { prefix: /re } }]
    rewrite: { uriRegexRewrite: { match: '^/re/(.*)$', rewrite: '/\\1' } }
    route: [{ destination: { host: ratings }, headers: { request: { set: { ':authority': x } } } }]
  - route:
    - { destination: { host: reviews, subset: v1 }, weight: 80, headers: { request: { set: { Host: h } } } }
    - { destination: { host: reviews, subset: v2 }, weight: 20, headers: { response: { remove: [x-d] } } }
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: reviews, namespace: default }
spec:
  host: reviews
  trafficPolicy:
    connectionPool:
      tcp: { maxConnections: 1, connectTimeout: 250ms, tcpKeepalive: { time: 60s, interval: 5s, probes: 3 }, maxConnectionDuration: 1h, idleTimeout: 5m }
      http: { http1MaxPendingRequests: 1, http2MaxRequests: 2, maxRequestsPerConnection: 1, maxRetries: 3, idleTimeout: 30s, useClientProtocol: true, maxConcurrentStreams: 10 }
    outlierDetection: { consecutive5xxErrors: 1, consecutiveGatewayErrors: 2, interval: 1s, baseEjectionTime: 3m, maxEjectionPercent: 100, minHealthPercent: 50, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 4 }
  subsets:
  - { name: v1, labels: { version: v1 }, trafficPolicy: { loadBalancer: { consistentHash: { httpCookie: { name: user, ttl: 0s } } } } }
  - { name: v2, labels: { version: v2 }, trafficPolicy: { loadBalancer: { simple: ROUND_ROBIN, warmupDurationSecs: 10s }, tls: { mode: ISTIO_MUTUAL } } }
  - { name: m, labels: { version: v2 }, trafficPolicy: { loadBalancer: { consistentHash: { useSourceIp: true, maglev: { tableSize: 65537 } } }, tls: { mode: DISABLE } } }
  - { name: p, labels: { version: v2 }, trafficPolicy: { loadBalancer: { simple: PASSTHROUGH } } }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: out, namespace: default }
spec:
  hosts: [www.example.com, '*.wild.example']
  addresses: [10.1.2.3]
  ports: [{ number: 443, name: tls, protocol: TLS }, { number: 80, name: http, protocol: HTTP }, { number: 8443, name: https, protocol: HTTPS }]
  resolution: NONE
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: rr, namespace: default }
spec:
  hosts: [rr.example]
  ports: [{ number: 80, name: http, protocol: HTTP }]
  resolution: DNS_ROUND_ROBIN
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: rr, namespace: default }
spec: { host: rr.example, trafficPolicy: { tls: { mode: SIMPLE, sni: rr.example, subjectAltNames: [rr.example] } } }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: static, namespace: default }
spec:
  hosts: [static.example]
  ports: [{ number: 9999, name: tcp, protocol: TCP }]
  resolution: STATIC
  endpoints: [{ address: 10.0.0.1 }, { address: 'unix:///tmp/x' }]
---
apiVersion: v1
kind: Service
metadata: { name: headless, namespace: default }
spec: { clusterIP: None, selector: { app: reviews }, ports: [{ name: http, port: 9080 }, { name: tcp-x, port: 9999 }] }
";

#[test]
fn a_sidecar_is_accepted() {
    accepts("sidecar", &translate(&world(EVERYTHING), &sidecar("envoy")));
}

#[test]
fn a_redirected_sidecar_is_accepted() {
    let redirected = node(
        "envoy",
        "
id: sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local
metadata: { NAMESPACE: default, LABELS: { app: reviews } }
",
    );
    accepts("redirected", &translate(&world(EVERYTHING), &redirected));
}

#[test]
fn a_gateway_is_accepted() {
    let text = GATEWAYS.replace(
        "mode: SIMPLE, serverCertificate: /c, privateKey: /k",
        "mode: MUTUAL, credentialName: front-credential, minProtocolVersion: TLSV1_2",
    );
    accepts("gateway", &translate(&world(&text), &router("envoy")));
}

#[test]
fn tracing_and_json_logs_are_accepted() {
    let collector = "
apiVersion: v1
kind: Service
metadata: { name: collector, namespace: istio-system }
spec: { selector: { app: collector }, ports: [{ name: grpc-otlp, port: 4317 }, { name: http-zipkin, port: 9411 }] }
";
    for tracing in [
        "zipkin: { address: 'collector.istio-system:9411' }",
        "openTelemetry: { address: 'collector.istio-system.svc.cluster.local:4317' }",
    ] {
        let mesh = format!(
            "    accessLogEncoding: JSON\n    enableTracing: true\n    defaultConfig: {{ tracing: {{ sampling: 100, {tracing} }} }}\n    protocolDetectionTimeout: 5s\n"
        );
        let resources = translate(&world_with(&mesh, collector), &sidecar("envoy"));
        let manager = j(&resources.listeners["127.30.1.11_15002"]);
        let tracing = &filter(&manager, 0, 0)["tracing"];
        assert_eq!(tracing["random_sampling"], json!({"value": 100}));
        assert!(tracing["provider"]["typed_config"].is_object(), "{tracing}");
        accepts("tracing", &resources);
    }
}

#[test]
fn strict_and_plain_workloads_are_accepted() {
    for mode in ["STRICT", "DISABLE"] {
        let policy = format!(
            "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{ name: default, namespace: istio-system }}
spec: {{ mtls: {{ mode: {mode} }} }}
"
        );
        accepts(mode, &translate(&world(&policy), &sidecar("envoy")));
    }
}

/// Files nobody here wrote, in the folder that `LATEEN_CORPUS` names.
fn corpus(part: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("skipped: LATEEN_CORPUS names no folder");
        return None;
    };
    let path = PathBuf::from(root).join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("not run: LATEEN_CORPUS has no {}", path.display());
    None
}

#[test]
fn istios_bookinfo_is_accepted() {
    for version in ["1.4.10", "1.30.3"] {
        let Some(directory) = corpus(&format!("pilot/samples/{version}/samples/bookinfo")) else {
            return;
        };
        let services =
            std::fs::read_to_string(directory.join("platform/kube/bookinfo.yaml")).unwrap();
        let subsets =
            std::fs::read_to_string(directory.join("networking/destination-rule-all.yaml"))
                .unwrap();
        let mut files: Vec<PathBuf> = std::fs::read_dir(directory.join("networking"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.ends_with("destination-rule-all.yaml"))
            .collect();
        files.sort();
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let all = format!("{MESH}\n---\n{services}\n---\n{subsets}\n---\n{text}");
            let (objects, _) = parse_file("bookinfo.yaml", &all);
            let objects = objects.into_iter().map(Arc::new).collect();
            let snapshot = Snapshot::build(&ConfigSet {
                objects,
                ..Default::default()
            });
            accepts_world(
                &file.display().to_string().replace('/', "_"),
                &translate(&snapshot, &sidecar("envoy")),
                false,
            );
            accepts_world("gateway", &translate(&snapshot, &router("envoy")), false);
        }
    }
}
