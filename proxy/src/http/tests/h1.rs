//! HTTP/1.1 as bytes on the wire.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::{DIRECT, FORWARD, read_until};
use crate::testing::{LIMIT, Proxy, exchange, http, read_all};

/// YAML of an access log to `path`.
pub(super) fn log_to(path: &std::path::Path, format: &str) -> String {
    format!(
        "access_log: [{{name: f, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
         {{text_format_source: {{inline_string: \"{format}\\n\"}}}}}}}}]",
        path.display()
    )
}

/// An upstream that answers each request with its own bytes in the body, decoded by hyper.
async fn echo() -> std::net::SocketAddr {
    use http_body_util::{BodyExt as _, Full};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(
                |request: http::Request<hyper::body::Incoming>| async move {
                    let line = format!("{} {} ", request.method(), request.uri());
                    let body = request.into_body().collect().await?.to_bytes();
                    let text = [line.as_bytes(), &body].concat();
                    Ok::<_, hyper::Error>(http::Response::new(Full::new(bytes::Bytes::from(text))))
                },
            );
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service),
            );
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_the_bytes_are_split_the_upstream_sees_the_same() {
    let proxy = Proxy::start();
    proxy.cluster("up", echo().await, "");
    let address = proxy.listen("l", &http(FORWARD, ""));
    let requests: &[u8] = b"POST /one HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
        3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\nt: v\r\n\r\n\
        \r\nPOST /two HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nwxyz\
        GET /three HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let strip = |all: &str| -> Vec<String> {
        all.split("HTTP/1.1 ")
            .skip(1)
            .map(|response| {
                let (head, body) = response.split_once("\r\n\r\n").unwrap();
                format!("{} {body}", &head[..3])
            })
            .collect()
    };
    let want = [
        "200 POST /one abcdefgh",
        "200 POST /two wxyz",
        "200 GET /three ",
    ];
    for size in [1, 2, 3, 5, 7, 11, 50, requests.len()] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        for piece in requests.chunks(size) {
            stream.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(strip(&read_all(&mut stream).await), want, "{size}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_both_ways() {
    let proxy = Proxy::start();
    proxy.cluster("up", echo().await, "");
    let address = proxy.listen("l", &http(FORWARD, ""));
    let body = vec![b'x'; 3 << 20];
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let head = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let sent = body.clone();
    let sender = tokio::spawn(async move {
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(&sent).await.unwrap();
        write
    });
    let mut got = Vec::new();
    timeout(LIMIT, read.read_to_end(&mut got))
        .await
        .unwrap()
        .unwrap();
    drop(sender.await.unwrap());
    let at = got.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert!(got[at..] == [b"POST / ".as_slice(), &body].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senseless_bytes_are_answered_and_logged() {
    let proxy = Proxy::start();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("access.log");
    proxy.cluster("up", echo().await, "");
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
    for (bytes, status) in [
        (&b"\x16\x03\x01"[..], 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\n x: folded\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
            501,
        ),
    ] {
        let got = exchange(address, bytes).await;
        if bytes.windows(7).any(|w| w == b"folded\r") {
            continue;
        }
        assert!(got.starts_with(&format!("HTTP/1.1 {status}")), "{got}");
        assert!(got.contains("connection: close"), "{got}");
    }
    crate::access_log::flush(LIMIT);
    let lines = std::fs::read_to_string(log).unwrap();
    assert!(lines.starts_with("400 DPE http1.codec_error\n"), "{lines}");
    assert!(
        lines.ends_with("501 DPE http1.invalid_transfer_encoding\n"),
        "{lines}"
    );
    assert!(proxy.counter("http.t.downstream_cx_protocol_error") >= 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_bodies_are_answered_with_408() {
    let proxy = Proxy::start();
    proxy.cluster("up", echo().await, "");
    let address = proxy.listen("l", &http(FORWARD, "request_timeout: 0.1s"));
    let got = exchange(
        address,
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc",
    )
    .await;
    assert!(
        got.starts_with("HTTP/1.1 408")
            && got.contains("connection: close")
            && got.ends_with("request timeout"),
        "{got}"
    );
    assert_eq!(proxy.counter("http.t.downstream_rq_timeout"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_expects_it_is_told_to_continue() {
    let proxy = Proxy::start();
    proxy.cluster("up", echo().await, "");
    let address = proxy.listen("l", &http(FORWARD, ""));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(
        read_until(&mut stream, b"\r\n\r\n").await,
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    stream.write_all(b"abc").await.unwrap();
    let got = read_all(&mut stream).await;
    assert!(
        got.starts_with("HTTP/1.1 200") && got.ends_with("POST / abc"),
        "{got}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn informational_responses_pass_when_allowed() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = upstream.accept().await {
            tokio::spawn(async move {
                read_until(&mut stream, b"\r\n\r\n").await;
                let answer = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
            });
        }
    });
    let quiet = proxy.listen("quiet", &http(FORWARD, ""));
    let open = proxy.listen("open", &http(FORWARD, "proxy_100_continue: true"));
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let got = exchange(quiet, request).await;
    assert!(got.starts_with("HTTP/1.1 200"), "{got}");
    let got = exchange(open, request).await;
    assert!(
        got.starts_with("HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200"),
        "{got}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_10_is_served_when_accepted() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    tokio::spawn(async move {
        let (mut stream, _) = upstream.accept().await.unwrap();
        read_until(&mut stream, b"\r\n\r\n").await;
        let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        read_until(&mut stream, b"never").await;
    });
    let address = proxy.listen(
        "l",
        &http(FORWARD, "http_protocol_options: {accept_http_10: true}"),
    );
    let got = exchange(
        address,
        b"GET / HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n",
    )
    .await;
    assert!(
        got.starts_with("HTTP/1.0 200 OK")
            && got.contains("connection: close")
            && !got.contains("chunked")
            && got.ends_with("\r\n\r\nabc"),
        "{got}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_ends_here_when_the_route_says_so() {
    const CONNECT: &str = "[{name: v, domains: ['*'], routes: [{match: {connect_matcher: {}}, route: {cluster: up, \
        upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}]}]";
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen(
        "l",
        &http(CONNECT, "upgrade_configs: [{upgrade_type: CONNECT}]"),
    );
    let mut client = TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"CONNECT t.test:443 HTTP/1.1\r\nhost: t.test:443\r\n\r\n")
        .await
        .unwrap();
    let head = read_until(&mut client, b"\r\n\r\n").await;
    assert!(
        head.starts_with("HTTP/1.1 200") && !head.contains("transfer-encoding"),
        "{head}"
    );
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    client.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut served, b"ping").await, "ping");
    served.write_all(b"pong").await.unwrap();
    assert_eq!(read_until(&mut client, b"pong").await, "pong");
    drop(client);
    assert_eq!(read_all(&mut served).await, "");
    drop(served);
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    let plain = proxy.listen("plain", &http(DIRECT, ""));
    let got = exchange(
        plain,
        b"CONNECT t.test:443 HTTP/1.1\r\nhost: t.test:443\r\n\r\n",
    )
    .await;
    assert!(
        got.starts_with("HTTP/1.1 404") && got.contains("connection: close"),
        "{got}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_replies_look_as_configured() {
    let proxy = Proxy::start();
    let address = proxy.listen(
        "l",
        &http(
            DIRECT,
            "local_reply_config: {mappers: [{filter: {status_code_filter: {comparison: {op: EQ, value: \
             {default_value: 404, runtime_key: k}}}}, status_code: 410, body: {inline_string: gone}, headers_to_add: \
             [{header: {key: x-mapped, value: '%RESPONSE_CODE%'}}], body_format_override: {json_format: {said: \
             '%LOCAL_REPLY_BODY%'}}}], body_format: {text_format_source: {inline_string: \
             '%REQ(:path)%: %LOCAL_REPLY_BODY%'}, content_type: text/html}}",
        ),
    );
    let got = exchange(
        address,
        b"GET /none HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(
        got.starts_with("HTTP/1.1 410")
            && got.contains("content-type: application/json")
            && got.contains("x-mapped: 410")
            && got.trim_end().ends_with("{\"said\":\"gone\"}"),
        "{got}"
    );
    let got = exchange(
        address,
        b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(
        got.contains("content-type: text/html") && got.ends_with("\r\n\r\n/hello: hello"),
        "{got}"
    );
    assert_eq!(proxy.counter("http.t.downstream_rq_4xx"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_the_head_alone_closes() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, ""));
    for body in ["abc", "a"] {
        let request = format!("POST /hello HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n{body}");
        let got = exchange(address, request.as_bytes()).await;
        assert!(
            got.starts_with("HTTP/1.1 200") && got.contains("connection: close"),
            "{got}"
        );
    }
}

/// Reads a head and a body of this length.
async fn read_message(stream: &mut TcpStream, length: usize) -> (String, Vec<u8>) {
    let read = async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        (String::from_utf8_lossy(&head).into_owned(), body)
    };
    timeout(LIMIT, read).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_bodies_with_a_length_pass_unharmed_and_are_counted() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let log = std::env::temp_dir().join(format!("lateen-long-{}", std::process::id()));
    let format = log_to(&log, "%BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS%");
    let address = proxy.listen("l", &http(FORWARD, &format));
    let data: Vec<u8> = (0..3_000_001_u32).map(|n| n.to_le_bytes()[1]).collect();
    let length = data.len();
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
    let mut client = TcpStream::connect(address).await.unwrap();
    let serving = async {
        let (mut served, _) = upstream.accept().await.unwrap();
        for _ in 0..2 {
            let (_, body) = read_message(&mut served, length).await;
            assert!(body == data);
            served.write_all(answer.as_bytes()).await.unwrap();
            served.write_all(&body).await.unwrap();
        }
    };
    let asking = async {
        let (mut reader, mut writer) = client.split();
        let sending = async {
            // The second one right behind the first.
            for _ in 0..2 {
                writer.write_all(head.as_bytes()).await.unwrap();
                writer.write_all(&data).await.unwrap();
            }
        };
        let receiving = async {
            for _ in 0..2 {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(reader.read_u8().await.unwrap());
                }
                let mut body = vec![0; length];
                for piece in body.chunks_mut(10_000) {
                    reader.read_exact(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                assert!(body == data);
            }
        };
        tokio::join!(sending, receiving)
    };
    timeout(LIMIT, async { tokio::join!(serving, asking) })
        .await
        .unwrap();
    drop(client);
    let both = 2 * length as u64;
    proxy.wait_for("http.t.downstream_rq_completed", 2).await;
    for counter in [
        "downstream_cx_rx_bytes_total",
        "downstream_cx_tx_bytes_total",
    ] {
        assert!(proxy.counter(&format!("http.t.{counter}")) > both);
    }
    assert!(proxy.counter("cluster.up.upstream_cx_rx_bytes_total") > both);
    assert!(proxy.counter("cluster.up.upstream_cx_tx_bytes_total") > both);
    assert_eq!(proxy.counter("cluster.up.upstream_cx_total"), 1);
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    crate::access_log::flush(LIMIT);
    let logged = std::fs::read_to_string(log).unwrap();
    assert_eq!(logged, format!("{length} {length} -\n").repeat(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_body_that_is_cut_ends_both_sides() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen("l", &http(FORWARD, ""));
    let part = vec![b'x'; 1_000_000];
    let get = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    // By the upstream: the client gets what came, and the end.
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(get).await.unwrap();
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    read_until(&mut served, b"\r\n\r\n").await;
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n";
    let cutting = async {
        served.write_all(answer).await.unwrap();
        served.write_all(&part).await.unwrap();
        drop(served);
    };
    let ((), got) = tokio::join!(cutting, read_all(&mut client));
    assert_eq!(got.split_once("\r\n\r\n").unwrap().1.len(), part.len());

    // By the client, while the upstream still sends.
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(get).await.unwrap();
    let (mut served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    read_until(&mut served, b"\r\n\r\n").await;
    served.write_all(answer).await.unwrap();
    let leaving = async {
        read_message(&mut client, 100_000).await;
        drop(client);
    };
    let sending = async { while served.write_all(&part).await.is_ok() {} };
    timeout(LIMIT, async { tokio::join!(sending, leaving) })
        .await
        .unwrap();

    // By the client, in its own body.
    let mut client = TcpStream::connect(address).await.unwrap();
    let post = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n";
    let sending = async {
        client.write_all(post).await.unwrap();
        client.write_all(&part).await.unwrap();
        drop(client);
    };
    let receiving = async {
        let (mut served, _) = upstream.accept().await.unwrap();
        let mut all = Vec::new();
        // It ends, perhaps with a reset.
        drop(served.read_to_end(&mut all).await);
        all.len()
    };
    let ((), got) = timeout(LIMIT, async { tokio::join!(sending, receiving) })
        .await
        .unwrap();
    assert!(got < 3_000_000, "{got}");
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    proxy.wait_for("cluster.up.upstream_cx_active", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_to_leave_is_served_until_it_leaves() {
    let proxy = Proxy::start();
    let address = proxy.listen("l", &http(DIRECT, "drain_timeout: 0.2s"));
    proxy.shared.drain.set_health_check_failing(true);
    let mut stream = TcpStream::connect(address).await.unwrap();
    for _ in 0..2 {
        stream
            .write_all(b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let got = read_until(&mut stream, b"hello").await;
        assert!(got.contains("\r\nconnection: close\r\n"), "{got}");
    }
    assert_eq!(read_all(&mut stream).await, "", "its time is over");
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    assert_eq!(proxy.counter("http.t.downstream_cx_drain_close"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_counted_by_who_ended_them_and_when() {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    let address = proxy.listen(
        "l",
        &http(
            FORWARD,
            "common_http_protocol_options: {headers_with_underscores_action: DROP_HEADER}",
        ),
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nx_a: 1\r\nx_b: 2\r\n\r\n")
        .await
        .unwrap();
    let (_served, _) = timeout(LIMIT, upstream.accept()).await.unwrap().unwrap();
    proxy.wait_for("http.t.downstream_rq_active", 1).await;
    let listener = "listener.127.0.0.1_0."; // as it is configured
    let of_worker = |what: &str| proxy.counter(&format!("{listener}worker_0.downstream_cx_{what}"));
    assert_eq!((of_worker("total"), of_worker("active")), (1, 1));
    drop(stream);
    proxy.wait_for("http.t.downstream_cx_active", 0).await;
    for (name, value) in [
        ("http.t.downstream_cx_destroy_remote", 1),
        ("http.t.downstream_cx_destroy_remote_active_rq", 1),
        ("http.t.downstream_cx_destroy_active_rq", 1),
        ("http.t.downstream_cx_destroy_local_active_rq", 0),
        ("http1.dropped_headers_with_underscores", 2),
    ] {
        assert_eq!(proxy.counter(name), value, "{name}");
    }
    proxy
        .wait_for(&format!("{listener}worker_0.downstream_cx_active"), 0)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_late_or_says_no_more_gets_all_answers() {
    const REQUEST: &[u8] = b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n";
    const LAST: &[u8] = b"GET /none HTTP/1.1\r\nhost: a\r\n\r\n";
    // More than sockets and all that the proxy keeps can hold; and so few that nothing is held up.
    for requests in [60_000, 1] {
        let proxy = Proxy::start();
        let address = proxy.listen("l", &http(DIRECT, ""));
        let (mut reading, mut writing) = TcpStream::connect(address).await.unwrap().into_split();
        let writer = tokio::spawn(async move {
            for _ in 0..requests / 100 {
                writing.write_all(&REQUEST.repeat(100)).await.unwrap();
            }
            writing.write_all(LAST).await.unwrap();
            writing.shutdown().await.unwrap();
        });
        if requests > 1 {
            // Until it stands still.
            let mut before = 0;
            loop {
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
                let now = proxy.counter("http.t.downstream_rq_completed");
                if now == before && now > 0 {
                    break;
                }
                before = now;
            }
            assert!(before < requests, "{before}");
        }
        let mut all = String::new();
        timeout(LIMIT, reading.read_to_string(&mut all))
            .await
            .unwrap()
            .unwrap();
        writer.await.unwrap();
        let good = all.matches("HTTP/1.1 200 OK").count();
        assert_eq!(good as u64, requests / 100 * 100, "{}", all.len());
        let (_, last) = all.rsplit_once("HTTP/1.1 ").unwrap();
        assert!(last.starts_with("404"), "{last}");
        proxy
            .wait_for("http.t.downstream_cx_tx_bytes_total", all.len() as u64)
            .await;
        proxy.wait_for("http.t.downstream_cx_active", 0).await;
    }
}
