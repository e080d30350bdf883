//! HTTP/2 as a client of another make sees it.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{DIRECT, FORWARD, h1::log_to, read_until};
use crate::testing::{LIMIT, Proxy, http};

async fn connect<B>(address: std::net::SocketAddr) -> SendRequest<B>
where
    B: http_body::Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    client
}

fn get(path: &str) -> http::Request<Empty<Bytes>> {
    http::Request::get(format!("http://a.test{path}"))
        .body(Empty::new())
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_share_a_connection() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    tokio::spawn(async move {
        while let Ok((stream, _)) = upstream.accept().await {
            let service = hyper::service::service_fn(
                |request: http::Request<hyper::body::Incoming>| async move {
                    let body = request.into_body().collect().await?.to_bytes();
                    Ok::<_, hyper::Error>(http::Response::new(Full::new(body)))
                },
            );
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    let address = proxy.listen("l", &http(FORWARD, ""));
    let client = connect::<Full<Bytes>>(address).await;
    let mut all = tokio::task::JoinSet::new();
    for number in 0_usize..50 {
        let mut client = client.clone();
        all.spawn(async move {
            let body = vec![b'a' + u8::try_from(number % 26).unwrap(); number * 5000];
            let request = http::Request::post("http://a.test/")
                .body(Full::new(Bytes::from(body.clone())))
                .unwrap();
            let response = client.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            let got = response.into_body().collect().await.unwrap().to_bytes();
            assert!(got == body, "{number}");
        });
    }
    timeout(LIMIT, all.join_all()).await.unwrap();
    assert_eq!(proxy.counter("http.t.downstream_cx_http2_total"), 1);
    proxy.wait_for("http.t.downstream_rq_completed", 50).await;
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_reset_is_given_up_and_written_down() {
    let proxy = Proxy::start();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("access.log");
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen(
        "l",
        &http(
            FORWARD,
            &log_to(
                &log,
                "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%",
            ),
        ),
    );
    let mut client = connect(address).await;
    let waiting = tokio::spawn(client.send_request(get("/")));
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    read_until(&mut served, b"\r\n\r\n").await;
    waiting.abort();
    assert!(waiting.await.is_err());
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    proxy.wait_for("http.t.downstream_rq_rx_reset", 1).await;
    assert_eq!(read_until(&mut served, b"never").await, "");
    crate::access_log::flush(LIMIT);
    assert_eq!(
        std::fs::read_to_string(log).unwrap(),
        "0 DR http2.remote_reset\n"
    );
    assert_eq!(proxy.counter("http2.rx_reset"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_allowed_stream_makes_the_connection_go() {
    let proxy = Proxy::start();
    let address = proxy.listen(
        "l",
        &http(
            DIRECT,
            "drain_timeout: 0.05s, common_http_protocol_options: {max_requests_per_connection: 2}",
        ),
    );
    let mut client = connect(address).await;
    for _ in 0..2 {
        let response = timeout(LIMIT, client.send_request(get("/hello")))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(response.status(), 200);
    }
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    assert_eq!(
        proxy.counter("http.t.downstream_cx_max_requests_reached"),
        1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_ends_the_request() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://a.test/hello").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    let response = timeout(LIMIT, response).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let reason = timeout(LIMIT, std::future::poll_fn(|cx| body.poll_reset(cx)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(reason, h2::Reason::NO_ERROR);
    proxy.wait_for("http.t.downstream_rq_completed", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_pass_over_http2() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen(
        "l",
        &http(
            FORWARD,
            "upgrade_configs: [{upgrade_type: websocket}], http2_protocol_options: {allow_connect: true}",
        ),
    );
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    // The settings that allow it come with the answer to another request.
    let (response, _) = client
        .send_request(
            http::Request::get("http://a.test/first").body(()).unwrap(),
            true,
        )
        .unwrap();
    let (mut first, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    read_until(&mut first, b"\r\n\r\n").await;
    first
        .write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(
        timeout(LIMIT, response).await.unwrap().unwrap().status(),
        204
    );
    let mut request = http::Request::builder()
        .method("CONNECT")
        .uri("http://a.test/chat")
        .body(())
        .unwrap();
    request
        .extensions_mut()
        .insert(h2::ext::Protocol::from_static("websocket"));
    let (response, mut body) = client.send_request(request, false).unwrap();
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    let seen = read_until(&mut served, b"\r\n\r\n")
        .await
        .to_ascii_lowercase();
    assert!(
        seen.starts_with("get /chat http/1.1") && seen.contains("upgrade: websocket"),
        "{seen}"
    );
    served
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        .await
        .unwrap();
    let response = timeout(LIMIT, response).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    body.send_data(Bytes::from_static(b"ping"), false).unwrap();
    assert_eq!(read_until(&mut served, b"ping").await, "ping");
    served.write_all(b"pong").await.unwrap();
    let data = timeout(LIMIT, response.into_body().data()).await.unwrap();
    assert_eq!(data.unwrap().unwrap(), "pong");
    body.send_data(Bytes::new(), true).unwrap();
    drop(served);
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    proxy
        .wait_for("http.t.downstream_cx_upgrades_active", 0)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_floods_and_reads_nothing_is_held_up_and_ended() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    let mut stream = TcpStream::connect(address).await.unwrap();
    let settings = b"\0\0\0\x04\0\0\0\0\0";
    stream
        .write_all(&[&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], settings].concat())
        .await
        .unwrap();
    let pings = b"\0\0\x08\x06\0\0\0\0\x0012345678".repeat(4096);
    let mut sent = 0;
    let flood = async {
        while let Ok(n) = stream.write(&pings).await {
            sent += n;
        }
    };
    timeout(LIMIT, flood).await.expect("an end");
    // What the kernel's buffers hold both ways, and a little more; at full speed it would be hundreds.
    assert!(sent < 48 << 20, "{sent} bytes");
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    assert_eq!(proxy.counter("http2.outbound_control_flood"), 1);
    assert_eq!(proxy.counter("http.t.downstream_cx_protocol_error"), 1);
}
