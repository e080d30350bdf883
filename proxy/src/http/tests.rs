//! Real sockets, real workers; the upstream, where there is one, is a task of the test.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::testing::{LIMIT, Proxy, exchange, http, read_all};

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
        ("two hosts", b"GET /hello HTTP/1.1\r\nhost: a\r\nhost: b\r\nconnection: close\r\n\r\n", "HTTP/1.1 400"),
        ("HTTP/1.0", b"GET /hello HTTP/1.0\r\nhost: a\r\n\r\n", "HTTP/1.0 426"),
        ("large headers", big.as_bytes(), "HTTP/1.1 431"),
        ("many headers", many.as_bytes(), "HTTP/1.1 431"),
        (
            "two lengths",
            b"POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
            "HTTP/1.1 400",
        ),
    ];
    for (note, request, want) in cases {
        let got = exchange(address, request).await;
        assert!(got.starts_with(want), "{note}: {got}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_idle_connections_are_cut() {
    let proxy = Proxy::start();
    let slow = proxy.listen("slow", &http(DIRECT, "request_headers_timeout: 0.1s"));
    let idle = proxy.listen(
        "idle",
        &http(DIRECT, "common_http_protocol_options: {idle_timeout: 0.1s}"),
    );
    let mut stream = TcpStream::connect(slow).await.unwrap();
    stream
        .write_all(b"GET /hello HTTP/1.1\r\nhost: a\r\nx-a")
        .await
        .unwrap();
    assert_eq!(read_all(&mut stream).await, "");
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
        "x-forwarded-for: 1.2.3.4,127.0.0.1",
        "x-forwarded-proto: http",
        "te: trailers",
        "via: v",
    ] {
        assert!(
            seen.contains(&format!("\r\n{line}\r\n")),
            "{line} in {seen}"
        );
    }
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
