//! Bodies that are slowed: the bandwidth limit, and fault's rate limit.

use std::time::Duration;

use tokio::{net::TcpStream, time::Instant};

use super::{DIRECT, with_filter};
use crate::testing::{Proxy, exchange};

const GET: &[u8] = b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

fn bandwidth(rest: &str) -> String {
    format!(
        "{{name: envoy.filters.http.bandwidth_limit, typed_config: {{'@type': \
         type.googleapis.com/envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit, stat_prefix: b, {rest}}}}}"
    )
}

fn fault(rest: &str) -> String {
    format!(
        "{{name: envoy.filters.http.fault, typed_config: {{'@type': \
         type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, response_rate_limit: {{{rest}, \
         percentage: {{numerator: 100}}}}}}}}"
    )
}

/// A route that answers with `bytes` bytes.
fn answers(bytes: usize) -> String {
    format!(
        "[{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, body: \
         {{inline_string: '{}'}}}}}}]}}]",
        "x".repeat(bytes)
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bandwidth_limit_slows_responses_and_counts_them() {
    let proxy = Proxy::start();
    let limit = bandwidth("enable_mode: RESPONSE, limit_kbps: 2, fill_interval: 0.02s");
    let address = proxy.listen("l", &with_filter(&answers(1024), &limit));
    let began = Instant::now();
    let got = exchange(address, GET).await;
    // Half a second's worth, but for the first interval's.
    assert!(
        began.elapsed() >= Duration::from_millis(450),
        "{:?}",
        began.elapsed()
    );
    assert!(got.contains("content-length: 1024\r\n"), "{got}");
    assert_eq!(got.split("\r\n\r\n").nth(1).map(str::len), Some(1024));
    let count = |name: &str| proxy.counter(&format!("b.http_bandwidth_limit.{name}"));
    proxy
        .wait_for("b.http_bandwidth_limit.response_pending", 0)
        .await;
    for (name, want) in [
        ("response_enabled", 1),
        ("response_incoming_total_size", 1024),
        ("response_allowed_total_size", 1024),
        ("request_enabled", 0),
    ] {
        assert_eq!(count(name), want, "{name}");
    }
    assert!(count("response_enforced") > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_not_pending_any_more() {
    let proxy = Proxy::start();
    let limit = bandwidth("enable_mode: RESPONSE, limit_kbps: 1");
    let address = proxy.listen("l", &with_filter(&answers(4000), &limit));
    let mut stream = TcpStream::connect(address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, GET)
        .await
        .unwrap();
    proxy
        .wait_for("b.http_bandwidth_limit.response_pending", 1)
        .await;
    drop(stream);
    proxy
        .wait_for("b.http_bandwidth_limit.response_pending", 0)
        .await;
    proxy.wait_for("http.t.downstream_rq_active", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_slows_responses_by_its_rate_or_that_of_a_header() {
    let proxy = Proxy::start();
    let fixed = proxy.listen(
        "fixed",
        &with_filter(&answers(512), &fault("fixed_limit: {limit_kbps: 1}")),
    );
    let by_header = proxy.listen("h", &with_filter(&answers(512), &fault("header_limit: {}")));
    let slowed = |header: &str| {
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{header}connection: close\r\n\r\n");
        let address = if header.is_empty() { fixed } else { by_header };
        async move {
            let began = Instant::now();
            let got = exchange(address, request.as_bytes()).await;
            assert!(got.ends_with(&"x".repeat(512)), "{got}");
            began.elapsed() >= Duration::from_millis(400)
        }
    };
    assert!(slowed("").await);
    assert!(slowed("x-envoy-fault-throughput-response: 1\r\n").await);
    assert!(!slowed("x-envoy-fault-throughput-response: 0\r\n").await);
    assert!(!slowed("x-other: 1\r\n").await);
    proxy.wait_for("http.t.fault.active_faults", 0).await;
    assert_eq!(proxy.counter("http.t.fault.response_rl_injected"), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_that_make_no_sense_are_refused() {
    let proxy = Proxy::start();
    for filter in [
        bandwidth("limit_kbps: 0"),
        bandwidth("limit_kbps: 1, fill_interval: 0.001s"),
        bandwidth("limit_kbps: 1, fill_interval: 2s"),
        fault("fixed_limit: {limit_kbps: 0}"),
    ] {
        let listener = with_filter(DIRECT, &filter);
        assert!(proxy.compile("l", &listener).is_err(), "{filter}");
    }
}
