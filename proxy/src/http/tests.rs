//! Real sockets, real workers; the upstream, where there is one, is a task of the test.

mod conformance;
mod h1;
mod h2;
mod pace;
mod redirect;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::testing::{LIMIT, Proxy, exchange, http, manager, read_all};

const DIRECT: &str = "[{name: v, domains: ['*'], routes: [\
    {match: {path: /hello}, direct_response: {status: 200, body: {inline_string: 'hello'}}}, \
    {match: {path: /moved}, redirect: {path_redirect: /hello}}]}]";
const FORWARD: &str =
    "[{name: v, domains: ['*'], routes: [{name: all, match: {prefix: /}, route: {cluster: up}}]}]";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http1_direct_response_redirect_and_no_route() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    let all = exchange(
        address,
        b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\nHEAD /hello HTTP/1.1\r\nhost: a\r\n\r\n\
          GET /moved HTTP/1.1\r\nhost: a.test\r\n\r\nGET /none HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    let responses: Vec<&str> = all.split("HTTP/1.1 ").skip(1).collect();
    assert_eq!(responses.len(), 4, "{all}");
    assert!(
        responses[0].starts_with("200 OK") && responses[0].ends_with("\r\n\r\nhello"),
        "{all}"
    );
    assert!(
        responses[0].contains("server: envoy") && responses[0].contains("content-type: text/plain")
    );
    assert!(
        responses[1].contains("content-length: 5") && responses[1].ends_with("\r\n\r\n"),
        "{all}"
    );
    assert!(
        responses[2].contains("location: http://a.test/hello"),
        "{all}"
    );
    assert!(
        responses[3].starts_with("404 Not Found") && responses[3].contains("connection: close"),
        "{all}"
    );
    proxy.wait_for("http.t.downstream_rq_completed", 4).await;
    assert_eq!(proxy.counter("http.t.downstream_rq_2xx"), 2);
    assert_eq!(proxy.counter("http.t.no_route"), 1);
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_prior_knowledge_and_grpc_local_replies() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = |path: &str, content_type: &str| {
        http::Request::get(format!("http://a.test{path}"))
            .header("content-type", content_type)
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    let response = client
        .send_request(request("/hello", "text/plain"))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "hello"
    );
    let response = client
        .send_request(request("/none", "application/grpc"))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "12");
    assert_eq!(proxy.counter("http.t.downstream_cx_http2_total"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_http_is_refused() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, "max_request_headers_kb: 8"));
    let big = format!(
        "GET /hello HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n",
        "x".repeat(10_000)
    );
    let many = format!(
        "GET /hello HTTP/1.1\r\nhost: a\r\n{}\r\n",
        "x: y\r\n".repeat(101)
    );
    let cases: &[(&str, &[u8], &str)] = &[
        ("garbage", b"\x00\x01\x02 garbage\r\n\r\n", "HTTP/1.1 400"),
        ("no host", b"GET /hello HTTP/1.1\r\nconnection: close\r\n\r\n", "HTTP/1.1 400"),
        ("HTTP/1.0", b"GET /hello HTTP/1.0\r\nhost: a\r\n\r\n", "HTTP/1.1 426"),
        ("large headers", big.as_bytes(), "HTTP/1.1 431"),
        ("many headers", many.as_bytes(), "HTTP/1.1 431"),
        (
            "a coding we do not know",
            b"POST /hello HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 501",
        ),
        (
            "two lengths",
            b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
            "HTTP/1.1 400",
        ),
    ];
    for (note, request, want) in cases {
        let got = exchange(address, request).await;
        assert!(got.starts_with(want), "{note}: {got}");
        // Without a host nothing is wrong with the protocol, and nothing is said; as Envoy.
        let silent = got.ends_with("\r\n\r\n");
        assert_eq!(silent, *note == "no host", "{note}: {got}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_cannot_hide_its_address_in_a_line_of_its_own() {
    const TELL: &str = "[{name: v, domains: ['*'], routes: [{match: {prefix: /}, direct_response: {status: 200}}], \
        response_headers_to_add: [{header: {key: client, value: '%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%'}}]}]";
    let proxy = Proxy::start();
    // The balancer before us added 2.2.2.2; whatever stands before that is the client's own word.
    let edge = proxy.listen(
        "edge",
        &http(TELL, "use_remote_address: true, xff_num_trusted_hops: 1"),
    );
    let inner = proxy.listen("inner", &http(TELL, ""));
    for address in [edge, inner] {
        for lines in [
            "x-forwarded-for: 1.1.1.1, 2.2.2.2\r\n",
            "x-forwarded-for: 1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\n",
        ] {
            let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{lines}connection: close\r\n\r\n");
            let got = exchange(address, request.as_bytes()).await;
            assert!(got.contains("client: 2.2.2.2\r\n"), "{lines}: {got}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_idle_connections_are_cut() {
    let proxy = Proxy::start();
    let slow = proxy.listen("slow", &http(DIRECT, "request_headers_timeout: 0.1s"));
    let idle = proxy.listen(
        "idle",
        &http(
            DIRECT,
            "drain_timeout: 0.05s, common_http_protocol_options: {idle_timeout: 0.1s}",
        ),
    );
    let mut stream = TcpStream::connect(slow).await.unwrap();
    stream
        .write_all(b"GET /hello HTTP/1.1\r\nhost: a\r\nx-a")
        .await
        .unwrap();
    let got = read_all(&mut stream).await;
    assert!(
        got.starts_with("HTTP/1.1 408") && got.ends_with("request header timeout"),
        "{got}"
    );
    assert_eq!(proxy.counter("http.t.downstream_rq_header_timeout"), 1);
    let got = exchange(idle, b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(got.ends_with("hello"), "{got}");
    assert_eq!(proxy.counter("http.t.downstream_cx_idle_timeout"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_allowed_request_closes_the_connection() {
    let proxy = Proxy::start();
    let address = proxy.listen(
        "l",
        &http(
            DIRECT,
            "common_http_protocol_options: {max_requests_per_connection: 2}",
        ),
    );
    let request = b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n".repeat(3);
    let got = exchange(address, &request).await;
    assert_eq!(got.matches("200 OK").count(), 2, "{got}");
    assert_eq!(got.matches("connection: close").count(), 1, "{got}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_listener_keeps_its_socket_and_a_removed_one_does_not() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    let other = DIRECT.replace("hello'", "other'");
    let replaced = proxy.compile("l", &http(&other, "")).unwrap();
    proxy.workers.add_listener(replaced).unwrap();
    let request = b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    assert!(exchange(address, request).await.ends_with("other"));
    assert!(proxy.workers.remove_listener("l"));
    let closed = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, closed).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_record_is_written_once_whoever_ends_the_stream() {
    let proxy = Proxy::start();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("access.log");
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen(
        "l",
        &http(
            FORWARD,
            &format!(
                "access_log: [{{name: f, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
                 {{text_format_source: {{inline_string: \"%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
                 %BYTES_RECEIVED% %BYTES_SENT% %ROUTE_NAME% %UPSTREAM_CLUSTER%\\n\"}}}}}}}}]",
                log.display()
            ),
        ),
    );
    // The first request is answered, the second never is: its client leaves.
    let mut client = TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"POST /answered HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc")
        .await
        .unwrap();
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    read_until(&mut served, b"abc").await;
    served
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n12345")
        .await
        .unwrap();
    read_until(&mut client, b"12345").await;
    client
        .write_all(b"GET /left HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut served, b"\r\n\r\n").await;
    drop(client);
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    proxy.wait_for("http.t.downstream_rq_total", 2).await;
    crate::access_log::flush(LIMIT);
    assert_eq!(
        std::fs::read_to_string(log).unwrap(),
        "/answered 200 - via_upstream 3 5 all up\n/left 0 DC downstream_remote_disconnect 0 0 all up\n"
    );
}

async fn read_until(stream: &mut TcpStream, end: &[u8]) -> String {
    let mut all = Vec::new();
    let read = async {
        while !all.ends_with(end) {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                n => all.extend_from_slice(&buffer[..n]),
            }
        }
    };
    timeout(LIMIT, read)
        .await
        .unwrap_or_else(|_| panic!("the peer sends {}", String::from_utf8_lossy(end)));
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_reaches_the_upstream_as_envoy_would_send_it() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen("l", &http(FORWARD, "use_remote_address: true, via: v"));
    let client = tokio::spawn(async move {
        exchange(
            address,
            b"GET http://abs.test/p?q HTTP/1.1\r\nhost: other\r\nconnection: close, x-hop\r\nx-hop: 1\r\nte: gzip, trailers\r\n\
              x-envoy-retry-on: 5xx\r\nx-forwarded-for: 1.2.3.4\r\nx-request-id: faked\r\n\r\n",
        )
        .await
    });
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    let seen = read_until(&mut served, b"\r\n\r\n")
        .await
        .to_ascii_lowercase();
    served
        .write_all(b"HTTP/1.1 200 OK\r\nserver: up\r\nkeep-alive: x\r\ncontent-length: 2\r\n\r\nok")
        .await
        .unwrap();
    let got = timeout(LIMIT, client).await.unwrap().unwrap();
    assert!(seen.starts_with("get /p?q http/1.1\r\n"), "{seen}");
    for line in [
        "host: abs.test",
        "x-forwarded-proto: http",
        "te: trailers",
        "via: v",
    ] {
        assert!(
            seen.contains(&format!("\r\n{line}\r\n")),
            "{line} in {seen}"
        );
    }
    // For a peer on 127.0.0.1 the proxy gives its own address.
    assert!(seen.contains("\r\nx-forwarded-for: 1.2.3.4,"), "{seen}");
    for gone in ["x-hop", "x-envoy-retry-on", "faked", "connection: close"] {
        assert!(!seen.contains(gone), "{gone} in {seen}");
    }
    assert!(
        got.contains("server: envoy") && !got.contains("keep-alive") && got.ends_with("ok"),
        "{got}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_are_carried_when_allowed() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let request = b"GET /chat HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\r\n";
    let closed = proxy.listen("closed", &http(FORWARD, ""));
    let mut refused = TcpStream::connect(closed).await.unwrap();
    refused.write_all(request).await.unwrap();
    assert!(
        read_until(&mut refused, b"\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 403")
    );
    let open = proxy.listen(
        "open",
        &http(FORWARD, "upgrade_configs: [{upgrade_type: websocket}]"),
    );
    let mut client = TcpStream::connect(open).await.unwrap();
    client.write_all(request).await.unwrap();
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    let seen = read_until(&mut served, b"\r\n\r\n")
        .await
        .to_ascii_lowercase();
    assert!(
        seen.contains("upgrade: websocket") && seen.contains("connection: upgrade"),
        "{seen}"
    );
    served
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        .await
        .unwrap();
    let head = read_until(&mut client, b"\r\n\r\n")
        .await
        .to_ascii_lowercase();
    assert!(
        head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"),
        "{head}"
    );
    client.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut served, b"ping").await, "ping");
    served.write_all(b"pong").await.unwrap();
    assert_eq!(read_until(&mut client, b"pong").await, "pong");
    drop(served);
    assert_eq!(read_all(&mut client).await, "");
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_trailers_pass_over_http2() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster(
        "up",
        upstream.local_addr().unwrap(),
        "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {'@type': \
         type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
         {http2_protocol_options: {}}}}",
    );
    tokio::spawn(async move {
        let (stream, _) = upstream.accept().await.unwrap();
        let service = hyper::service::service_fn(
            |request: http::Request<hyper::body::Incoming>| async move {
                let body = request.into_body().collect().await?.to_bytes();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("5"));
                let body = Full::new(body).with_trailers(async move { Some(Ok(trailers)) });
                Ok::<_, hyper::Error>(http::Response::new(body))
            },
        );
        drop(
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await,
        );
    });
    let address = proxy.listen("l", &http(FORWARD, ""));
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://a.test/s/m")
        .header("content-type", "application/grpc")
        .body(Full::new(Bytes::from_static(b"message")))
        .unwrap();
    let response = timeout(LIMIT, client.send_request(request))
        .await
        .unwrap()
        .unwrap();
    let collected = timeout(LIMIT, response.into_body().collect())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "5");
    assert_eq!(collected.to_bytes(), "message");
}

/// A self-signed certificate for `localhost`, as PEM in YAML strings.
fn certificate() -> (rcgen::CertifiedKey<rcgen::KeyPair>, String) {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let yaml = format!(
        "{{certificate_chain: {{inline_string: {:?}}}, private_key: {{inline_string: {:?}}}}}",
        key.cert.pem(),
        key.signing_key.serialize_pem()
    );
    (key, yaml)
}

async fn tls_client(
    address: std::net::SocketAddr,
    key: &rcgen::CertifiedKey<rcgen::KeyPair>,
    alpn: &[u8],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(key.cert.der().clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(crate::tls::provider().clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect("localhost".try_into().unwrap(), stream)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_ends_here_and_chains_are_chosen_by_sni_alpn_and_transport() {
    let proxy = Proxy::start();
    let (key, certificate) = certificate();
    let socket = format!(
        "transport_socket: {{name: tls, typed_config: {{'@type': \
         type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, common_tls_context: \
         {{alpn_protocols: [h2, http/1.1], tls_certificates: [{certificate}]}}}}}}"
    );
    let says = |text: &str| {
        let vhosts = format!(
            "[{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: \
             {{inline_string: {text}}}}}, response_headers_to_add: [{{header: {{key: x-tls, value: \
             '%DOWNSTREAM_TLS_VERSION% %REQUESTED_SERVER_NAME%'}}}}]}}]}}]"
        );
        manager(&vhosts, "")
    };
    let address = proxy.listen(
        "l",
        &format!(
            "stat_prefix: t\nlistener_filters: [{{name: tls, typed_config: {{'@type': \
             type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}]\n\
             filter_chains:\n\
             - {{filter_chain_match: {{server_names: [localhost], application_protocols: [h2]}}, filters: [{}], {socket}}}\n\
             - {{filter_chain_match: {{server_names: [localhost]}}, filters: [{}], {socket}}}\n\
             - {{filter_chain_match: {{transport_protocol: raw_buffer}}, filters: [{}]}}\n",
            says("by-alpn"),
            says("any-tls"),
            says("clear")
        ),
    );
    let plain = exchange(
        address,
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(plain.ends_with("clear"), "{plain}");
    let mut stream = tls_client(address, &key, b"http/1.1").await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut got = String::new();
    // The peer closes without close_notify; what came before counts.
    drop(
        timeout(LIMIT, stream.read_to_string(&mut got))
            .await
            .unwrap(),
    );
    assert!(
        got.ends_with("any-tls") && got.contains("x-tls: TLSv1.3 localhost"),
        "{got}"
    );
    let stream = tls_client(address, &key, b"h2").await;
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("https://a.test/")
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = timeout(LIMIT, client.send_request(request))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "by-alpn"
    );
    // Clear text where TLS is expected ends the connection.
    let only = proxy.listen(
        "only",
        &format!(
            "stat_prefix: o\nfilter_chains:\n- {{filters: [{}], {socket}}}\n",
            says("x")
        ),
    );
    let refused = exchange(only, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!refused.contains("HTTP/1.1"), "{refused:?}");
    let count =
        |listener: &str, name: &str| proxy.counter(&format!("listener.{listener}.ssl.{name}"));
    for name in [
        "handshake",
        "no_certificate",
        "versions.TLSv1.3",
        "ciphers.TLS_AES_128_GCM_SHA256",
    ] {
        assert_eq!(count("t", name), 2, "{name}");
    }
    assert_eq!(count("t", "connection_error"), 0);
    assert_eq!(count("o", "connection_error"), 1);
}

fn with_filter(vhosts: &str, filter: &str) -> String {
    http(vhosts, "").replace("http_filters: [", &format!("http_filters: [{filter}, "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_delay_and_abort_whom_they_are_meant_for() {
    let proxy = Proxy::start();
    let fault = "{name: envoy.filters.http.fault, typed_config: {'@type': \
                 type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}}";
    let rules = "'@type': type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, headers: \
                 [{name: end-user, string_match: {exact: jason}}]";
    let vhosts = format!(
        "[{{name: v, domains: ['*'], routes: [\
         {{match: {{path: /abort}}, direct_response: {{status: 200}}, typed_per_filter_config: {{envoy.filters.http.fault: \
         {{{rules}, abort: {{http_status: 500, percentage: {{numerator: 100}}}}}}}}}}, \
         {{match: {{path: /delay}}, direct_response: {{status: 200}}, typed_per_filter_config: {{envoy.filters.http.fault: \
         {{{rules}, delay: {{fixed_delay: 0.05s, percentage: {{numerator: 100}}}}}}}}}}]}}]"
    );
    let address = proxy.listen("l", &with_filter(&vhosts, fault));
    let get = |path: &str, user: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{user}\r\n");
        async move { exchange(address, request.as_bytes()).await }
    };
    assert!(get("/abort", "").await.starts_with("HTTP/1.1 200"));
    let aborted = get("/abort", "end-user: jason\r\n").await;
    assert!(
        aborted.starts_with("HTTP/1.1 500") && aborted.ends_with("fault filter abort"),
        "{aborted}"
    );
    let began = tokio::time::Instant::now();
    assert!(
        get("/delay", "end-user: jason\r\n")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(began.elapsed() >= std::time::Duration::from_millis(50));
    proxy.wait_for("http.t.fault.active_faults", 0).await;
    assert_eq!(proxy.counter("http.t.fault.aborts_injected"), 1);
    assert_eq!(proxy.counter("http.t.fault.delays_injected"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cors_answers_preflights_and_marks_responses() {
    let proxy = Proxy::start();
    let cors = "{name: envoy.filters.http.cors, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors}}";
    let vhosts = "[{name: v, domains: ['*'], routes: [{match: {prefix: /}, direct_response: {status: 200}, typed_per_filter_config: \
        {envoy.filters.http.cors: {'@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy, \
        allow_origin_string_match: [{exact: 'https://ok.test'}], allow_methods: 'GET,PUT', max_age: '600', allow_credentials: true}}}]}]";
    let address = proxy.listen("l", &with_filter(vhosts, cors));
    let send = |method: &str, origin: &str, more: &str| {
        let request = format!(
            "{method} / HTTP/1.1\r\nhost: a\r\nconnection: close\r\norigin: {origin}\r\n{more}\r\n"
        );
        async move { exchange(address, request.as_bytes()).await }
    };
    let asks = "access-control-request-method: PUT\r\n";
    let preflight = send("OPTIONS", "https://ok.test", asks).await;
    for line in [
        "allow-origin: https://ok.test",
        "allow-methods: GET,PUT",
        "max-age: 600",
        "allow-credentials: true",
    ] {
        assert!(preflight.contains(line), "{line} in {preflight}");
    }
    assert_eq!(preflight.matches("allow-origin").count(), 1, "{preflight}");
    assert!(
        !send("OPTIONS", "https://evil.test", asks)
            .await
            .contains("allow-origin")
    );
    assert!(
        send("GET", "https://ok.test", "")
            .await
            .contains("allow-origin: https://ok.test")
    );
    assert_eq!(proxy.counter("http.t.cors.origin_valid"), 2);
    assert_eq!(proxy.counter("http.t.cors.origin_invalid"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_supported_is_refused() {
    let proxy = Proxy::start();
    for (note, listener) in [
        (
            "unknown HTTP filter",
            with_filter(
                DIRECT,
                "{name: x, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.aws_lambda.v3.Config}}",
            ),
        ),
        (
            "no router",
            http(DIRECT, "").replace(
                "{name: envoy.filters.http.router,",
                "{name: x, disabled: true,",
            ),
        ),
        ("no filter chain", String::new()),
        ("an unknown cluster", http(FORWARD, "")),
        (
            "scoped routes",
            http(DIRECT, "").replace(
                "route_config: {virtual_hosts",
                "scoped_routes: {name: s}, x: {virtual_hosts",
            ),
        ),
    ] {
        assert!(proxy.compile("l", &listener).is_err(), "{note}");
    }
}
