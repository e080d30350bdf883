use std::net::{Ipv4Addr, SocketAddr};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::testing::{Proxy, exchange};

const FILTERS: &str = "type.googleapis.com/envoy.extensions.filters.http";

/// A listener with these filters before the router, and these routes.
fn listen(proxy: &Proxy, filters: &str, routes: &str) -> Result<SocketAddr, String> {
    let yaml = format!(
        "filter_chains: [{{filters: [{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.\
         filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: t, route_config: \
         {{virtual_hosts: [{{name: v, domains: ['*'], routes: [{routes}]}}]}}, http_filters: [{filters}, \
         {{name: router, typed_config: {{\"@type\": {FILTERS}.router.v3.Router}}}}]}}}}]}}]"
    );
    let listener = proxy.compile("l", &yaml)?;
    proxy
        .workers
        .add_listener(listener)
        .map_err(|e| e.to_string())?;
    Ok(proxy.workers.addresses("l")[0])
}

fn filter(name: &str, kind: &str, fields: &str) -> String {
    format!("{{name: {name}, typed_config: {{\"@type\": {FILTERS}.{kind}, {fields}}}}}")
}

fn route(path: &str, filter: &str, config: &str) -> String {
    let own = match config {
        "" => String::new(),
        config => format!(", typed_per_filter_config: {{{filter}: {config}}}"),
    };
    format!(
        "{{match: {{prefix: {path}}}, direct_response: {{status: 200, body: {{inline_string: ok}}}}{own}}}"
    )
}

async fn status(address: SocketAddr, request: &str) -> String {
    let request = request.replace("HTTP/1.1", "HTTP/1.1\r\nhost: a\r\nconnection: close");
    let answer = exchange(address, request.as_bytes()).await;
    answer.lines().next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_route_turns_filters_off_and_on() {
    let proxy = Proxy::start();
    let nobody = filter("rbac", "rbac.v3.RBAC", "rules: {}");
    let off = filter("off", "rbac.v3.RBAC", "rules: {}")
        .replace("typed_config", "disabled: true, typed_config");
    let wrapped = "{\"@type\": type.googleapis.com/envoy.config.route.v3.FilterConfig, ";
    let routes = [
        route("/off", "rbac", &format!("{wrapped} disabled: true}}")),
        route(
            "/none",
            "rbac",
            &format!("{{\"@type\": {FILTERS}.rbac.v3.RBACPerRoute}}"),
        ),
        route(
            "/on",
            "off",
            &format!(
                "{wrapped} config: {{\"@type\": {FILTERS}.rbac.v3.RBACPerRoute, rbac: {{rules: {{}}}}}}}}"
            ),
        ),
        route("/", "", ""),
    ];
    let address = listen(&proxy, &nobody, &routes.join(", ")).unwrap();
    assert_eq!(
        status(address, "GET / HTTP/1.1\r\n\r\n").await,
        "HTTP/1.1 403 Forbidden"
    );
    assert_eq!(
        status(address, "GET /off HTTP/1.1\r\n\r\n").await,
        "HTTP/1.1 200 OK"
    );
    assert_eq!(
        status(address, "GET /none HTTP/1.1\r\n\r\n").await,
        "HTTP/1.1 200 OK"
    );
    proxy.wait_for("http.t.rbac.denied", 1).await;

    let proxy = Proxy::start();
    let address = listen(&proxy, &off, &routes.join(", ")).unwrap();
    assert_eq!(
        status(address, "GET / HTTP/1.1\r\n\r\n").await,
        "HTTP/1.1 200 OK"
    );
    assert_eq!(
        status(address, "GET /on HTTP/1.1\r\n\r\n").await,
        "HTTP/1.1 403 Forbidden"
    );
}

#[tokio::test]
async fn a_body_that_does_not_fit_is_refused() {
    let proxy = Proxy::start();
    let buffer = filter("buffer", "buffer.v3.Buffer", "max_request_bytes: 5");
    let off = format!("{{\"@type\": {FILTERS}.buffer.v3.BufferPerRoute, disabled: true}}");
    let wide = format!(
        "{{\"@type\": {FILTERS}.buffer.v3.BufferPerRoute, buffer: {{max_request_bytes: 6}}}}"
    );
    let routes = [
        route("/off", "buffer", &off),
        route("/wide", "buffer", &wide),
        route("/", "", ""),
    ];
    let address = listen(&proxy, &buffer, &routes.join(", ")).unwrap();
    let post = |path: &str, body: &str| {
        format!(
            "POST {path} HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    for (path, body, want) in [
        ("/", "12345", "HTTP/1.1 200 OK"),
        ("/", "123456", "HTTP/1.1 413 Payload Too Large"),
        ("/off", "123456", "HTTP/1.1 200 OK"),
        ("/wide", "123456", "HTTP/1.1 200 OK"),
    ] {
        assert_eq!(
            status(address, &post(path, body)).await,
            want,
            "{path} {body}"
        );
    }
}

#[tokio::test]
async fn headers_are_changed_in_the_order_of_the_list() {
    let proxy = Proxy::start();
    let mutation = filter(
        "m",
        "header_mutation.v3.HeaderMutation",
        "mutations: {request_mutations: [{append: {header: {key: x-a, value: '%REQ(:PATH)%'}, append_action: \
         OVERWRITE_IF_EXISTS_OR_ADD}}, {remove_on_match: {key_matcher: {prefix: x-gone}}}], response_mutations: \
         [{append: {header: {key: x-out, value: 'a=%REQ(X-A)% gone=%REQ(X-GONE-1)%'}}}]}",
    );
    let own = format!(
        "{{\"@type\": {FILTERS}.header_mutation.v3.HeaderMutationPerRoute, mutations: {{response_mutations: \
         [{{remove: x-out}}]}}}}"
    );
    let routes = [route("/own", "m", &own), route("/", "", "")];
    let address = listen(&proxy, &mutation, &routes.join(", ")).unwrap();
    let ask = |path: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\nx-a: 0\r\nx-gone-1: 1\r\nconnection: close\r\n\r\n"
        )
    };
    let answer = exchange(address, ask("/x").as_bytes()).await;
    assert!(answer.contains("x-out: a=/x gone=\r\n"), "{answer}");
    let answer = exchange(address, ask("/own").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && !answer.contains("x-out"),
        "{answer}"
    );
}

#[tokio::test]
async fn health_checks_are_answered() {
    let proxy = Proxy::start();
    let check = filter(
        "hc",
        "health_check.v3.HealthCheck",
        "pass_through_mode: false, headers: [{name: ':path', string_match: {exact: /check}}], \
         cluster_min_healthy_percentages: {a: {value: 50}}",
    );
    let address = listen(&proxy, &check, &route("/", "", "")).unwrap();
    let ask = "GET /check HTTP/1.1\r\n\r\n";
    assert_eq!(
        status(address, ask).await,
        "HTTP/1.1 503 Service Unavailable"
    );
    proxy.cluster("a", address, "");
    assert_eq!(status(address, ask).await, "HTTP/1.1 200 OK");
    proxy.shared.drain.set_health_check_failing(true);
    assert_eq!(
        status(address, ask).await,
        "HTTP/1.1 503 Service Unavailable"
    );
    let other = exchange(
        address,
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(
        other.starts_with("HTTP/1.1 200")
            && other.contains("x-envoy-immediate-health-check-fail: true"),
        "{other}"
    );
    for fields in ["headers: []", "pass_through_mode: false, cache_time: 1s"] {
        let bad = filter("hc", "health_check.v3.HealthCheck", fields);
        assert!(listen(&proxy, &bad, &route("/", "", "")).is_err());
    }
}

#[tokio::test]
async fn a_cached_health_check_does_not_reach_the_upstream() {
    let proxy = Proxy::start();
    let check = filter(
        "hc",
        "health_check.v3.HealthCheck",
        "pass_through_mode: true, cache_time: 3600s, headers: [{name: ':path', string_match: {exact: /check}}]",
    );
    let address = listen(&proxy, &check, &route("/", "", "")).unwrap();
    for _ in 0..2 {
        let answer = status(address, "GET /check HTTP/1.1\r\n\r\n").await;
        assert_eq!(answer, "HTTP/1.1 200 OK");
    }
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    assert_eq!(proxy.counter("http.t.rq_direct_response"), 1);
    assert_eq!(
        proxy.counter("http.t.downstream_rq_completed"),
        0,
        "health checks are not counted"
    );
    proxy.shared.drain.set_health_check_failing(true);
    let answer = status(address, "GET /check HTTP/1.1\r\n\r\n").await;
    assert_eq!(answer, "HTTP/1.1 503 Service Unavailable");
}

#[tokio::test]
async fn requests_beyond_the_buckets_are_refused() {
    let proxy = Proxy::start();
    let bucket = |most: u32| {
        format!("token_bucket: {{max_tokens: {most}, tokens_per_fill: 1, fill_interval: 3600s}}")
    };
    let always = "filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}";
    let limit = filter(
        "lr",
        "local_ratelimit.v3.LocalRateLimit",
        &format!(
            "stat_prefix: l, {always}, {}, enable_x_ratelimit_headers: DRAFT_VERSION_03, \
             rate_limits: [{{actions: [{{request_headers: {{header_name: x-who, descriptor_key: who}}}}]}}], \
             descriptors: [{{entries: [{{key: who, value: ann}}], {}}}], \
             response_headers_to_add: [{{header: {{key: x-over, value: 'true'}}}}]",
            bucket(3),
            bucket(1)
        ),
    );
    let shadow = format!(
        "{{\"@type\": {FILTERS}.local_ratelimit.v3.LocalRateLimit, stat_prefix: s, {}, \
         filter_enabled: {{default_value: {{numerator: 100}}}}}}",
        bucket(1)
    );
    let routes = [route("/shadow", "lr", &shadow), route("/", "", "")];
    let address = listen(&proxy, &limit, &routes.join(", ")).unwrap();
    let ask = |who: &str| {
        format!("GET / HTTP/1.1\r\nhost: a\r\nx-who: {who}\r\nconnection: close\r\n\r\n")
    };
    let answer = exchange(address, ask("ann").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 200")
            && answer.contains("x-ratelimit-limit: 1\r\nx-ratelimit-remaining: 0\r\n"),
        "{answer}"
    );
    let answer = exchange(address, ask("ann").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 429")
            && answer.contains("x-over: true")
            && answer.contains("x-ratelimit-remaining: 0")
            && answer.ends_with("local_rate_limited"),
        "{answer}"
    );
    // Who was refused has taken nothing from what is for all.
    for want in ["200", "200", "429"] {
        let answer = status(address, "GET / HTTP/1.1\r\n\r\n").await;
        assert!(answer.contains(want), "{answer}");
    }
    for _ in 0..2 {
        let answer = status(address, "GET /shadow HTTP/1.1\r\n\r\n").await;
        assert_eq!(answer, "HTTP/1.1 200 OK");
    }
    for (name, want) in [
        ("l.http_local_rate_limit.rate_limited", 2),
        ("l.http_local_rate_limit.ok", 3),
        ("s.http_local_rate_limit.rate_limited", 1),
        ("s.http_local_rate_limit.enforced", 0),
    ] {
        assert_eq!(proxy.counter(name), want, "{name}");
    }
    for fields in [
        format!("stat_prefix: l, {}", bucket(0)),
        bucket(1),
        "stat_prefix: l, local_cluster_rate_limit: {}".to_owned(),
    ] {
        let bad = filter("lr", "local_ratelimit.v3.LocalRateLimit", &fields);
        assert!(
            listen(&proxy, &bad, &route("/", "", "")).is_err(),
            "{fields}"
        );
    }
}

#[tokio::test]
async fn pages_of_other_sites_change_nothing() {
    let proxy = Proxy::start();
    let csrf = filter(
        "csrf",
        "csrf.v3.CsrfPolicy",
        "filter_enabled: {default_value: {numerator: 100}}, additional_origins: [{exact: good.example}]",
    );
    let off = format!(
        "{{\"@type\": {FILTERS}.csrf.v3.CsrfPolicy, filter_enabled: {{default_value: {{numerator: 0}}}}}}"
    );
    let routes = [route("/off", "csrf", &off), route("/", "", "")];
    let address = listen(&proxy, &csrf, &routes.join(", ")).unwrap();
    for (request, want) in [
        ("GET / HTTP/1.1\r\norigin: http://evil.example", "200"),
        ("POST / HTTP/1.1\r\norigin: http://evil.example", "403"),
        ("POST / HTTP/1.1\r\norigin: http://a", "200"),
        ("POST / HTTP/1.1\r\norigin: http://a:81", "403"),
        (
            "PUT / HTTP/1.1\r\norigin: null\r\nreferer: https://good.example/x",
            "200",
        ),
        ("DELETE / HTTP/1.1", "403"),
        ("DELETE /off HTTP/1.1", "200"),
    ] {
        let answer = status(address, &format!("{request}\r\n\r\n")).await;
        assert!(answer.contains(want), "{request}: {answer}");
    }
    assert_eq!(proxy.counter("http.t.csrf.request_invalid"), 2);
    assert_eq!(proxy.counter("http.t.csrf.missing_source_origin"), 1);
    assert_eq!(proxy.counter("http.t.csrf.request_valid"), 2);
}

#[tokio::test]
async fn headers_and_fixed_values_become_metadata() {
    let proxy = Proxy::start();
    let filters = [
        filter(
            "set",
            "set_metadata.v3.Config",
            "metadata: [{metadata_namespace: ns, value: {a: 1}}, {metadata_namespace: ns, value: {b: 2}}]",
        ),
        filter(
            "h2m",
            "header_to_metadata.v3.Config",
            "request_rules: [{header: x-ver, on_header_present: {metadata_namespace: ns, key: ver}, \
             on_header_missing: {metadata_namespace: ns, key: ver, value: none}, remove: true}]",
        ),
        filter(
            "show",
            "header_mutation.v3.HeaderMutation",
            "mutations: {response_mutations: [{append: {header: {key: x-ns, value: '%DYNAMIC_METADATA(ns)%'}}}, \
             {append: {header: {key: x-left, value: '[%REQ(X-VER)%]'}}}]}",
        ),
    ];
    let address = listen(&proxy, &filters.join(", "), &route("/", "", "")).unwrap();
    let ask = |more: &str| format!("GET / HTTP/1.1\r\nhost: a\r\n{more}connection: close\r\n\r\n");
    let answer = exchange(address, ask("x-ver: v1\r\n").as_bytes()).await;
    assert!(
        answer.contains("x-ns: {\"a\":1,\"ver\":\"v1\"}") && answer.contains("x-left: []"),
        "{answer}"
    );
    let answer = exchange(address, ask("").as_bytes()).await;
    assert!(answer.contains("\"ver\":\"none\""), "{answer}");
    assert_eq!(proxy.counter("http.t.set_metadata.overwrite_denied"), 2);
}

#[tokio::test]
async fn a_response_is_decompressed_unless_its_route_says_otherwise() {
    let proxy = Proxy::start();
    let library = "decompressor_library: {name: z, typed_config: {\"@type\": \
                   type.googleapis.com/envoy.extensions.compression.gzip.decompressor.v3.Gzip}}";
    let decompressor = filter("decompressor", "decompressor.v3.Decompressor", library);
    let packed = |path: &str, own: &str| {
        // "hello world"
        format!(
            "{{match: {{prefix: {path}}}, direct_response: {{status: 200, body: {{inline_bytes: \
             H4sIAAAAAAAAA8tIzcnJVyjPL8pJAQCFEUoNCwAAAA==}}}}, response_headers_to_add: [{{header: \
             {{key: content-encoding, value: gzip}}}}]{own}}}"
        )
    };
    let off = ", typed_per_filter_config: {decompressor: {\"@type\": \
               type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}";
    let routes = [packed("/off", off), packed("/", "")].join(", ");
    let address = listen(&proxy, &decompressor, &routes).unwrap();
    let get = |path: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").into_bytes()
    };
    let answer = exchange(address, &get("/")).await;
    assert!(answer.contains("hello world"), "{answer}");
    assert!(!answer.contains("content-encoding"), "{answer}");
    let answer = exchange(address, &get("/off")).await;
    assert!(answer.contains("content-encoding: gzip"), "{answer}");
    let count = "http.t.decompressor.z.gzip.response.";
    proxy.wait_for(&format!("{count}decompressed"), 1).await;
    proxy
        .wait_for(&format!("{count}total_uncompressed_bytes"), 11)
        .await;
}

#[tokio::test]
async fn requests_are_refused_while_too_few_succeed() {
    let proxy = Proxy::start();
    let control = filter(
        "control",
        "admission_control.v3.AdmissionControl",
        "success_criteria: {}, aggression: {default_value: 1e9, runtime_key: x}, \
         max_rejection_probability: {default_value: {value: 100}}",
    );
    let bad = "{match: {prefix: /}, direct_response: {status: 500, body: {inline_string: no}}}";
    let off = bad.replace("/", "/off").replace(
        "direct_response",
        "typed_per_filter_config: {control: {\"@type\": \
         type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}, direct_response",
    );
    let address = listen(&proxy, &control, &format!("{off}, {bad}")).unwrap();
    for (path, want) in [
        ("/", "500 Internal Server Error"),
        ("/", "503 Service Unavailable"),
        ("/off", "500 Internal Server Error"),
    ] {
        let got = status(address, &format!("GET {path} HTTP/1.1\r\n\r\n")).await;
        assert_eq!(got, format!("HTTP/1.1 {want}"), "{path}");
    }
    proxy
        .wait_for("http.t.admission_control.rq_failure", 1)
        .await;
    proxy
        .wait_for("http.t.admission_control.rq_rejected", 1)
        .await;
}

/// An upstream that answers each connection's request with who asked.
async fn upstream() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            let mut request = [0; 2048];
            let length = stream.read(&mut request).await.unwrap_or(0);
            let text = String::from_utf8_lossy(&request[..length]).to_ascii_lowercase();
            let host = text.lines().find(|line| line.starts_with("host:"));
            let body = format!("{} {}", peer.ip(), host.unwrap_or_default());
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close");
            let answer = format!("{head}\r\n\r\n{body}");
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    address
}

async fn get(address: SocketAddr, path: &str, host: &str, more: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{more}\r\n");
    exchange(address, request.as_bytes()).await
}

const FORWARD_CACHE: &str = "dns_cache_config: {name: d, dns_lookup_family: V4_ONLY}";

fn forward_cluster(rest: &str) -> lateen_protocols::envoy::envoy::config::cluster::v3::Cluster {
    lateen_protocols::json::from_yaml(&format!(
        "{{name: forward, connect_timeout: 1s, lb_policy: CLUSTER_PROVIDED, cluster_type: {{name: f, \
         typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.clusters.dynamic_forward_proxy.v3.\
         ClusterConfig, {FORWARD_CACHE}}}}}{rest}}}"
    ))
    .unwrap()
}

#[tokio::test]
async fn requests_go_to_the_hosts_that_they_name() {
    let proxy = Proxy::start();
    let up = upstream().await;
    let clusters = &proxy.shared.clusters;
    clusters.apply(&forward_cluster(""), &proxy.shared).unwrap();
    let forward = filter(
        "forward",
        "dynamic_forward_proxy.v3.FilterConfig",
        FORWARD_CACHE,
    );
    let own = format!(
        ", typed_per_filter_config: {{forward: {{\"@type\": {FILTERS}.dynamic_forward_proxy.v3.PerRouteConfig, \
         host_rewrite_header: x-to}}}}"
    );
    let routes = format!(
        "{{match: {{prefix: /by}}, route: {{cluster: forward}}{own}}}, {{match: {{prefix: /}}, route: {{cluster: forward}}}}"
    );
    let address = listen(&proxy, &forward, &routes).unwrap();
    let host = format!("localhost:{}", up.port());
    let answer = get(address, "/", &host, "").await;
    assert!(
        answer.ends_with(&format!("127.0.0.1 host: {host}")),
        "{answer}"
    );
    let to = format!("x-to: 127.0.0.1:{}\r\n", up.port());
    let answer = get(address, "/by", "nowhere.invalid", &to).await;
    assert!(
        answer.ends_with(&format!("host: 127.0.0.1:{}", up.port())),
        "{answer}"
    );
    let answer = get(address, "/", "nowhere.invalid", "").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("DNS resolution failure"), "{answer}");
    proxy.wait_for("dns_cache.d.num_hosts", 3).await;
    proxy.wait_for("cluster.forward.membership_total", 2).await;
}

#[tokio::test]
async fn server_names_of_forwarded_hosts_are_checked_unless_that_is_waived() {
    let proxy = Proxy::start();
    let apply = |rest: &str| {
        let clusters = &proxy.shared.clusters;
        clusters.apply(&forward_cluster(rest), &proxy.shared)
    };
    assert!(apply(", upstream_http_protocol_options: {auto_sni: true}").is_err());
    let both = ", upstream_http_protocol_options: {auto_sni: true, auto_san_validation: true}";
    apply(both).unwrap();
}

#[tokio::test]
async fn connections_come_from_the_address_of_the_downstream() {
    let proxy = Proxy::start();
    proxy.cluster("a", upstream().await, "");
    let source = filter("source", "original_src.v3.OriginalSrc", "mark: 0");
    let routes = "{match: {prefix: /}, route: {cluster: a}}";
    let address = listen(&proxy, &source, routes).unwrap();
    for (from, want) in [("127.0.0.1", "127.0.0.1 "), ("127.0.0.9", "127.0.0.9 ")] {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let answer = crate::testing::read_all(&mut stream).await;
        let body = answer.rsplit("\r\n\r\n").next().unwrap_or_default();
        assert!(body.starts_with(want), "{answer}");
    }
}
