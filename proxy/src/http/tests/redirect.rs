//! Redirects that are followed here.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::testing::{Proxy, exchange, http};

/// Answers each request with what `answer` makes of its head and body.
async fn serve(listener: TcpListener, answer: fn(&str) -> String) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut read = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                let text = String::from_utf8_lossy(&read).into_owned();
                let length = |head: &str| {
                    let line = head
                        .lines()
                        .find_map(|line| line.strip_prefix("content-length: "));
                    line.map_or(0, |length| length.parse::<usize>().unwrap())
                };
                if let Some((head, body)) = text.split_once("\r\n\r\n")
                    && body.len() >= length(head)
                {
                    stream.write_all(answer(&text).as_bytes()).await.unwrap();
                    read.clear();
                    continue;
                }
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(n) => read.extend_from_slice(&buffer[..n]),
                }
            }
        });
    }
}

async fn start(policy: &str, answer: fn(&str) -> String) -> (Proxy, std::net::SocketAddr) {
    let proxy = Proxy::start();
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    proxy.cluster("up", upstream.local_addr().unwrap(), "");
    tokio::spawn(serve(upstream, answer));
    let vhosts = format!(
        "[{{name: v, domains: ['*'], routes: [\
         {{match: {{path: /direct}}, direct_response: {{status: 200, body: {{inline_string: direct}}}}}}, \
         {{match: {{prefix: /}}, route: {{cluster: up, internal_redirect_policy: {{{policy}}}}}}}]}}]"
    );
    let address = proxy.listen("l", &http(&vhosts, ""));
    (proxy, address)
}

/// `/STATUS/REST` is redirected to `http://other.test/REST`; everything else is told what it asked for.
fn tell(request: &str) -> String {
    let path = request.split(' ').nth(1).unwrap();
    match path.strip_prefix("/30") {
        Some(rest) => {
            let (digit, rest) = rest.split_at(1);
            format!(
                "HTTP/1.1 30{digit} Moved\r\nlocation: http://other.test{rest}\r\nx-copy: 1\r\n\
                 content-length: 0\r\n\r\n"
            )
        }
        None => format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{request}",
            request.len()
        ),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_is_followed_with_the_body_and_told_as_two_streams() {
    let (proxy, address) = start("response_headers_to_copy: [x-copy]", tell).await;
    let got = exchange(
        address,
        b"POST /302/there?q=1#f HTTP/1.1\r\nhost: a.test\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbody",
    )
    .await;
    assert!(got.starts_with("HTTP/1.1 400"), "a fragment: {got}");
    let got = exchange(
        address,
        b"POST /302/there?q=1 HTTP/1.1\r\nhost: a.test\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbody",
    )
    .await;
    assert!(got.starts_with("HTTP/1.1 200"), "{got}");
    for line in [
        "POST /there?q=1 HTTP/1.1\r\n",
        "host: other.test\r\n",
        "x-envoy-original-url: http://a.test/302/there?q=1\r\n",
        "x-copy: 1\r\n",
    ] {
        assert!(got.contains(line), "{line} in {got}");
    }
    assert!(got.ends_with("\r\n\r\nbody"), "{got}");
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
    for (name, want) in [
        ("http.t.downstream_rq_total", 3),
        ("http.t.downstream_rq_completed", 2),
        ("http.t.downstream_rq_3xx", 0),
        ("http.t.downstream_rq_2xx", 1),
        ("cluster.up.upstream_internal_redirect_succeeded_total", 1),
        ("cluster.up.upstream_rq_302", 0),
        ("cluster.up.upstream_rq_200", 1),
    ] {
        assert_eq!(proxy.counter(name), want, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn see_other_becomes_get_and_too_many_are_passed_on() {
    let policy = "max_internal_redirects: 1, redirect_response_codes: [303]";
    let (proxy, address) = start(policy, tell).await;
    let post = |path: &str| {
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: a.test\r\ncontent-length: 4\r\nconnection: close\r\n\r\nbody"
        );
        async move { exchange(address, request.as_bytes()).await }
    };
    let got = post("/303/there").await;
    assert!(got.contains("\r\n\r\nGET /there HTTP/1.1\r\n"), "{got}");
    assert!(got.ends_with("\r\n\r\n"), "{got}");
    assert!(post("/303/direct").await.ends_with("direct"));
    let got = post("/303/303/there").await;
    assert!(
        got.contains("location: http://other.test/there\r\n"),
        "{got}"
    );
    assert!(post("/302/there").await.starts_with("HTTP/1.1 302"));
    let too_many = "http.t.passthrough_internal_redirect_too_many_redirects";
    proxy.wait_for(too_many, 1).await;
    let failed = "cluster.up.upstream_internal_redirect_failed_total";
    assert_eq!(proxy.counter(failed), 1);
}
