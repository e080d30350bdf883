//! The router over real sockets: one worker (the test's thread), small servers beside it.

use std::{
    cell::RefCell,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use lateen_codec::h2;
use lateen_protocols::{
    envoy::envoy::config::{
        cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, route::v3 as proto,
    },
    json,
};
use tokio::{task::LocalSet, time::timeout};

use super::*;
use crate::{
    body::Frame,
    head::{Headers, Name, Protocol},
    info::ConnectionInfo,
    testing::{LIMIT, shared},
    tls::testing::{Authority, common, downstream, upstream},
    upstream::testing::{Reply, Server, dead_address},
};

struct World {
    shared: Arc<Shared>,
}

/// Runs a test on a worker of its own.
fn run(test: impl AsyncFnOnce(World)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let world = World { shared: shared() };
        timeout(LIMIT, test(world))
            .await
            .expect("the test does not hang");
    });
}

fn endpoints(name: &str, addresses: &[SocketAddr]) -> String {
    let endpoints: Vec<String> = addresses
        .iter()
        .map(|address| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}",
                address.ip(),
                address.port()
            )
        })
        .collect();
    format!(
        "{{cluster_name: {name}, endpoints: [{{lb_endpoints: [{}]}}]}}",
        endpoints.join(", ")
    )
}

const H2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
    {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
    explicit_http_config: {http2_protocol_options: {}}}}";
const AUTO: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
    {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
    auto_config: {}}}";

/// What a request came to.
#[derive(Debug)]
struct Got {
    status: u16,
    headers: Headers,
    body: Result<String, BodyError>,
    trailers: Option<Headers>,
    flags: String,
    attempts: u32,
    transport: Option<String>,
}

impl Got {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .get(&Name::new(name))
            .and_then(|value| std::str::from_utf8(value).ok())
    }
}

fn head(method: &'static str, path: &'static str, headers: &[(&str, &str)]) -> RequestHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), *value);
    }
    RequestHead {
        method: method.into(),
        scheme: "http".into(),
        authority: "a.test:80".into(),
        path: path.into(),
        protocol: Protocol::Http11,
        headers: list,
    }
}

fn policy(yaml: &str) -> ForwardPolicy {
    let route: proto::Route =
        json::from_yaml(&format!("match: {{prefix: /}}\nroute: {{{yaml}}}")).unwrap();
    let Some(proto::route::Action::Route(action)) = &route.action else {
        panic!("a route");
    };
    ForwardPolicy::compile(
        action,
        &route,
        &proto::VirtualHost::default(),
        &Default::default(),
    )
    .unwrap()
}

fn new_info() -> SharedInfo {
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let connection = ConnectionInfo {
        id: 1,
        remote: address,
        direct_remote: address,
        local: address,
        local_restored: false,
        tls: None,
        requested_server_name: None,
        filter_chain: None,
        original_src: None,
        started: Instant::now(),
    };
    let mut info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http11));
    info.start_time = SystemTime::UNIX_EPOCH;
    Rc::new(RefCell::new(info))
}

impl World {
    fn cluster(&self, name: &str, addresses: &[SocketAddr], rest: &str) {
        let yaml = format!(
            "name: {name}\nload_assignment: {}\n{rest}",
            endpoints(name, addresses)
        );
        self.apply(&yaml);
    }

    fn apply(&self, yaml: &str) {
        let proto: Cluster = json::from_yaml(yaml).unwrap();
        self.shared.clusters.apply(&proto, &self.shared).unwrap();
    }

    fn stat(&self, name: &str) -> u64 {
        self.shared.stats.value(name).unwrap_or_default()
    }

    async fn wait_stat(&self, name: &str, value: u64) {
        while self.stat(name) != value {
            tokio::task::yield_now().await;
        }
    }

    async fn send(&self, policy: &ForwardPolicy, head: RequestHead, body: Body) -> Got {
        let info = new_info();
        let target = Target {
            cluster: policy.clusters()[0].clone(),
            subset: policy.subset.clone(),
        };
        let result = forward(&self.shared, policy, &target, head, body, &info).await;
        let (head, mut body, flags) = match result {
            Ok((head, body)) => (head, body, ResponseFlags::default()),
            Err(reject) => {
                let flags = reject.flags;
                let (head, body) = reject.into_response(false);
                (head, body, flags)
            }
        };
        let (mut text, mut trailers, mut error) = (String::new(), None, None);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(Frame::Data(data)) => text.push_str(&String::from_utf8_lossy(&data)),
                Ok(Frame::Trailers(list)) => trailers = Some(list),
                Err(broken) => error = Some(broken),
            }
        }
        // As the connection manager does.
        let mut all = flags;
        all.set(info.borrow().flags);
        info.borrow_mut().flags = all;
        let info = info.borrow();
        Got {
            status: head.status,
            headers: head.headers,
            body: error.map_or(Ok(text), Err),
            trailers,
            flags: info.flags.short(),
            attempts: info.upstream_attempts,
            transport: info.upstream_transport_failure.clone(),
        }
    }

    async fn get(&self, policy: &ForwardPolicy, path: &'static str) -> Got {
        self.send(policy, head("GET", path, &[]), Body::empty())
            .await
    }
}

fn text(got: &Got) -> &str {
    got.body.as_deref().expect("a whole body")
}

#[test]
fn a_connection_is_used_again() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("hello")).await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        for _ in 0..3 {
            let got = world.get(&policy, "/x?y").await;
            assert_eq!((got.status, text(&got), &*got.flags), (200, "hello", "-"));
            assert!(got.header("x-envoy-upstream-service-time").is_some());
        }
        assert_eq!(server.connections(), 1);
        let seen = &server.seen()[0];
        assert!(
            seen.head.starts_with("GET /x?y HTTP/1.1\r\n"),
            "{}",
            seen.head
        );
        assert_eq!(seen.header("host"), Some("a.test:80"));
        assert_eq!(seen.header("x-envoy-expected-rq-timeout-ms"), Some("15000"));
        assert_eq!(world.stat("cluster.a.upstream_rq_200"), 3);
        assert_eq!(world.stat("cluster.a.upstream_rq_total"), 3);
        assert_eq!(world.stat("cluster.a.upstream_cx_http1_total"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
        assert_eq!(world.stat("cluster.a.upstream_cx_active"), 1);
    });
}

#[test]
fn a_connection_closed_while_idle_is_not_used() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("hello")).await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a, timeout: 5s");
        assert_eq!(world.get(&policy, "/1").await.status, 200);
        // The close may arrive before or while the next request is sent: both must work.
        server.close();
        assert_eq!(world.get(&policy, "/2").await.status, 200);
        assert_eq!(
            world
                .send(
                    &policy,
                    head("POST", "/3", &[("content-length", "1")]),
                    Body::full("x"),
                )
                .await
                .status,
            200
        );
        let served: Vec<_> = server.seen().iter().map(|seen| seen.connection).collect();
        assert_eq!(served, [0, 1, 1]);
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn a_reused_connection_that_ends_without_an_answer_is_tried_once_more_if_harmless() {
    run(async |world| {
        let server = Server::start(|n, _| {
            if n % 2 == 1 {
                Reply::Close("")
            } else {
                Reply::Ok("x")
            }
        })
        .await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        assert_eq!(world.get(&policy, "/").await.status, 200);
        assert_eq!(world.get(&policy, "/").await.status, 200);
        assert_eq!(server.seen().len(), 3);
        let got = world
            .send(&policy, head("POST", "/", &[]), Body::full("x"))
            .await;
        assert_eq!((got.status, &*got.flags), (503, "UC"));
        assert_eq!(
            text(&got),
            "upstream connect error or disconnect/reset before headers. reset reason: connection termination"
        );
    });
}

#[test]
fn a_connection_serves_so_many_requests_and_no_more() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("x")).await;
        world.cluster("a", &[server.address()], "max_requests_per_connection: 2");
        let policy = policy("cluster: a");
        for _ in 0..4 {
            assert_eq!(world.get(&policy, "/").await.status, 200);
        }
        assert_eq!(server.connections(), 2);
        world
            .wait_stat("cluster.a.upstream_cx_max_requests", 2)
            .await;
    });
}

#[test]
fn retries_until_it_works_with_the_body_each_time() {
    run(async |world| {
        let server = Server::start(|n, _| {
            if n < 2 {
                Reply::Status(503)
            } else {
                Reply::Ok("done")
            }
        })
        .await;
        world.cluster("a", &[server.address()], "");
        let mut policy = policy(
            "cluster: a, retry_policy: {retry_on: 5xx, num_retries: 3, retry_back_off: {base_interval: 0.001s}}",
        );
        policy.include_attempt_count = true;
        policy.include_attempt_count_in_response = true;
        let got = world
            .send(
                &policy,
                head("POST", "/", &[("content-length", "4")]),
                Body::full("body"),
            )
            .await;
        assert_eq!((got.status, got.attempts, &*got.flags), (200, 3, "-"));
        assert_eq!(got.header("x-envoy-attempt-count"), Some("3"));
        let seen = server.seen();
        assert!(seen.iter().all(|seen| seen.body == "body"));
        let counts: Vec<_> = seen
            .iter()
            .map(|seen| seen.header("x-envoy-attempt-count"))
            .collect();
        assert_eq!(counts, [Some("1"), Some("2"), Some("3")]);
        assert_eq!(world.stat("cluster.a.upstream_rq_retry"), 2);
        assert_eq!(world.stat("cluster.a.upstream_rq_retry_success"), 1);
        assert_eq!(world.stat("cluster.a.retry.upstream_rq_503"), 2);
        assert_eq!(world.stat("cluster.a.upstream_rq_completed"), 1);
    });
}

#[test]
fn the_last_answer_is_given_when_no_retry_is_left() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Status(503)).await;
        world.cluster("a", &[server.address()], "");
        let policy = policy(
            "cluster: a, retry_policy: {retry_on: 5xx, retry_back_off: {base_interval: 0.001s}}",
        );
        let got = world.get(&policy, "/").await;
        assert_eq!((got.status, got.attempts, &*got.flags), (503, 2, "URX"));
        assert_eq!(world.stat("cluster.a.upstream_rq_retry_limit_exceeded"), 1);
    });
}

#[test]
fn a_body_too_large_to_keep_is_not_sent_again() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Status(503)).await;
        world.cluster(
            "a",
            &[server.address()],
            "per_connection_buffer_limit_bytes: 1000",
        );
        let policy = policy("cluster: a, retry_policy: {retry_on: 5xx}");
        let body = Body::full(vec![b'x'; 2000]);
        let got = world.send(&policy, head("POST", "/", &[]), body).await;
        assert_eq!((got.status, got.attempts), (503, 1));
        assert_eq!(world.stat("cluster.a.retry_or_shadow_abandoned"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_retry"), 0);
    });
}

#[test]
fn a_retry_goes_to_another_host() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("alive")).await;
        world.cluster("a", &[dead_address().await, server.address()], "");
        world.cluster("dead", &[dead_address().await], "");
        let retry = "retry_policy: {retry_on: connect-failure, num_retries: 1, host_selection_retry_max_attempts: 5, \
             retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, typed_config: {\"@type\": \
             type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}], \
             retry_back_off: {base_interval: 0.001s}}";
        let both = policy(&format!("cluster: a, {retry}"));
        for _ in 0..6 {
            assert_eq!(world.get(&both, "/").await.status, 200);
        }
        // In turn: every request begins with the dead one, but for the first perhaps.
        assert!((5..=6).contains(&world.stat("cluster.a.upstream_rq_retry")));
        let got = world
            .get(&policy(&format!("cluster: dead, {retry}")), "/")
            .await;
        assert_eq!((got.status, &*got.flags), (503, "URX,UF"));
        assert_eq!(
            got.transport.as_deref(),
            Some("delayed connect error: Connection refused")
        );
        assert_eq!(
            text(&got),
            "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: \
             remote connection failure"
        );
        assert_eq!(world.stat("cluster.dead.upstream_cx_connect_fail"), 2);
        assert_eq!(world.stat("cluster.dead.upstream_rq_503"), 1);
        assert_eq!(world.stat("cluster.dead.upstream_cx_active"), 0);
    });
}

#[test]
fn the_route_timeout_is_504_ut() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Hang).await;
        world.cluster("a", &[server.address()], "");
        let got = world.get(&policy("cluster: a, timeout: 0.05s"), "/").await;
        assert_eq!(
            (got.status, text(&got), &*got.flags),
            (504, "upstream request timeout", "UT")
        );
        assert_eq!(world.stat("cluster.a.upstream_rq_timeout"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_504"), 1);
        server.wait_open(0).await;
        let asked = head("GET", "/", &[("x-envoy-upstream-rq-timeout-ms", "20")]);
        let began = Instant::now();
        assert_eq!(
            world
                .send(&policy("cluster: a"), asked, Body::empty())
                .await
                .status,
            504
        );
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn a_timeout_in_the_midst_of_the_body_cuts_it() {
    run(async |world| {
        let server =
            Server::start(|_, _| Reply::Raw("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"))
                .await;
        world.cluster("a", &[server.address()], "");
        let got = world.get(&policy("cluster: a, timeout: 0.05s"), "/").await;
        assert_eq!(
            (got.status, &got.body, &*got.flags),
            (200, &Err(BodyError::Timeout), "UT")
        );
        server.wait_open(0).await;
    });
}

#[test]
fn one_slow_try_is_not_the_end() {
    run(async |world| {
        let server = Server::start(|n, _| if n == 0 { Reply::Hang } else { Reply::Ok("x") }).await;
        world.cluster("a", &[server.address()], "");
        let limited = policy(
            "cluster: a, timeout: 10s, retry_policy: {retry_on: 5xx, num_retries: 1, per_try_timeout: 0.05s, \
             retry_back_off: {base_interval: 0.001s}}",
        );
        let got = world.get(&limited, "/").await;
        assert_eq!((got.status, got.attempts, &*got.flags), (200, 2, "-"));
        assert_eq!(world.stat("cluster.a.upstream_rq_per_try_timeout"), 1);
        let hanging = Server::start(|_, _| Reply::Hang).await;
        world.cluster("b", &[hanging.address()], "");
        let never = policy(
            "cluster: b, timeout: 10s, retry_policy: {retry_on: 5xx, num_retries: 1, per_try_timeout: 0.02s, \
             retry_back_off: {base_interval: 0.001s}}",
        );
        let got = world.get(&never, "/").await;
        assert_eq!((got.status, got.attempts, &*got.flags), (504, 2, "URX,UT"));
        assert_eq!(world.stat("cluster.b.upstream_rq_timeout"), 0);
    });
}

#[test]
fn a_hedged_request_takes_the_first_good_answer() {
    const HEDGED: &str = "timeout: 10s, hedge_policy: {hedge_on_per_try_timeout: true}, retry_policy: {retry_on: 5xx, \
        num_retries: 1, per_try_timeout: 0.02s, retry_back_off: {base_interval: 0.001s}}";
    run(async |world| {
        // The first hangs, and is given up when the second has answered.
        let server = Server::start(|n, _| if n == 0 { Reply::Hang } else { Reply::Ok("x") }).await;
        world.cluster("a", &[server.address()], "");
        let got = world
            .get(&policy(&format!("cluster: a, {HEDGED}")), "/")
            .await;
        assert_eq!((got.status, got.attempts, &*got.flags), (200, 2, "-"));
        assert_eq!(world.stat("cluster.a.upstream_rq_retry"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_per_try_timeout"), 0);
        world.wait_stat("cluster.a.upstream_rq_active", 0).await;
        // A bad answer waits for the others; when all are bad, the last is the answer.
        let bad = Server::start(|n, _| {
            if n == 0 {
                Reply::Hang
            } else {
                Reply::Status(503)
            }
        })
        .await;
        world.cluster("b", &[bad.address()], "");
        let short = HEDGED.replace("10s", "0.2s");
        let got = world
            .get(&policy(&format!("cluster: b, {short}")), "/")
            .await;
        assert_eq!((got.status, got.attempts, &*got.flags), (504, 2, "URX,UT"));
        assert_eq!(world.stat("cluster.b.upstream_rq_retry_limit_exceeded"), 1);
        let gone = Server::start(|n, _| match n {
            0 => Reply::Hang,
            _ => Reply::Close(""),
        })
        .await;
        world.cluster("c", &[gone.address()], "");
        let asked = head("GET", "/", &[("x-envoy-hedge-on-per-try-timeout", "false")]);
        let hedged = policy(&format!("cluster: c, {HEDGED}"));
        let got = world.send(&hedged, asked, Body::empty()).await;
        assert_eq!((got.status, got.attempts, &*got.flags), (503, 2, "URX,UC"));
        assert_eq!(
            world.stat("cluster.c.upstream_rq_per_try_timeout"),
            1,
            "as the request asks"
        );
    });
}

#[test]
fn beyond_the_breakers_is_503_uo() {
    run(async |world| {
        let server = Server::start(|n, _| if n == 0 { Reply::Hang } else { Reply::Ok("x") }).await;
        world.cluster(
            "a",
            &[server.address()],
            "circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 1}]}",
        );
        let short = policy("cluster: a, timeout: 0.2s");
        let policy = policy("cluster: a");
        let third = async {
            world.wait_stat("cluster.a.upstream_rq_active", 1).await;
            world
                .wait_stat("cluster.a.upstream_rq_pending_active", 1)
                .await;
            world.get(&policy, "/3").await
        };
        let second = async {
            world.wait_stat("cluster.a.upstream_rq_active", 1).await;
            world.get(&policy, "/2").await
        };
        let (first, second, third) = tokio::join!(world.get(&short, "/1"), second, third);
        assert_eq!((third.status, &*third.flags), (503, "UO"));
        assert_eq!(
            text(&third),
            "upstream connect error or disconnect/reset before headers. reset reason: overflow"
        );
        assert_eq!(third.header("x-envoy-overloaded"), Some("true"));
        // The first hangs and times out; its connection goes, and the one that waited gets a new one.
        assert_eq!((first.status, second.status), (504, 200));
        assert_eq!(world.stat("cluster.a.upstream_rq_pending_overflow"), 1);
        assert_eq!(world.stat("cluster.a.upstream_cx_total"), 2);
        assert!(world.stat("cluster.a.upstream_cx_overflow") >= 1);
        assert_eq!(
            world.stat("cluster.a.circuit_breakers.default.rq_pending_open"),
            0
        );
    });
}

#[test]
fn max_requests_counts_by_priority() {
    run(async |world| {
        let server = Server::start(|_, seen| {
            if seen.head.contains("/slow") {
                Reply::Hang
            } else {
                Reply::Ok("x")
            }
        })
        .await;
        world.cluster(
            "a",
            &[server.address()],
            "circuit_breakers: {thresholds: [{max_requests: 1}, {priority: HIGH, max_requests: 5}]}",
        );
        let slow = policy("cluster: a, timeout: 0.2s");
        let high = policy("cluster: a, priority: HIGH");
        let others = async {
            world.wait_stat("cluster.a.upstream_rq_active", 1).await;
            let second = world.get(&slow, "/x").await;
            (second, world.get(&high, "/x").await)
        };
        let (_, (second, third)) = tokio::join!(world.get(&slow, "/slow"), others);
        assert_eq!((second.status, &*second.flags), (503, "UO"));
        assert_eq!(third.status, 200);
    });
}

#[test]
fn a_failing_host_is_ejected_and_returns() {
    run(async |world| {
        let bad = Server::start(|_, _| Reply::Status(500)).await;
        world.cluster(
            "a",
            &[bad.address()],
            "common_lb_config: {healthy_panic_threshold: {}}\noutlier_detection: {consecutive_5xx: 2, interval: 0.05s, \
             base_ejection_time: 0.1s, max_ejection_percent: 100}",
        );
        let policy = policy("cluster: a");
        assert_eq!(world.get(&policy, "/").await.status, 500);
        assert_eq!(world.get(&policy, "/").await.status, 500);
        world
            .wait_stat("cluster.a.outlier_detection.ejections_active", 1)
            .await;
        assert_eq!(world.stat("cluster.a.membership_healthy"), 0);
        let got = world.get(&policy, "/").await;
        assert_eq!(
            (got.status, text(&got), &*got.flags),
            (503, "no healthy upstream", "UH")
        );
        world
            .wait_stat("cluster.a.outlier_detection.ejections_active", 0)
            .await;
        assert_eq!(world.get(&policy, "/").await.status, 500);
        assert_eq!(
            world.stat("cluster.a.outlier_detection.ejections_enforced_consecutive_5xx"),
            1
        );
        assert_eq!(bad.seen().len(), 3);
    });
}

#[test]
fn no_cluster_and_no_hosts_are_told_apart() {
    run(async |world| {
        let got = world.get(&policy("cluster: nowhere"), "/").await;
        assert_eq!((got.status, text(&got), &*got.flags), (503, "", "NC"));
        world.cluster("empty", &[], "");
        let got = world.get(&policy("cluster: empty"), "/").await;
        assert_eq!(
            (got.status, text(&got), &*got.flags),
            (503, "no healthy upstream", "UH")
        );
        assert_eq!(world.stat("cluster.empty.upstream_cx_none_healthy"), 1);
    });
}

#[test]
fn an_upstream_that_dies_in_the_midst_of_the_body_is_uc() {
    run(async |world| {
        let server =
            Server::start(|_, _| Reply::Close("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"))
                .await;
        world.cluster("a", &[server.address()], "");
        let got = world.get(&policy("cluster: a"), "/").await;
        assert_eq!((got.status, &*got.flags), (200, "UC"));
        assert_eq!(got.body, Err(BodyError::Disconnected));
        world.wait_stat("cluster.a.upstream_cx_active", 0).await;
    });
}

#[test]
fn nonsense_from_the_upstream_is_502_upe() {
    run(async |world| {
        const BAD: [&str; 4] = [
            "this is not http\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx-a",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        ];
        let server = Server::start(|n, _| Reply::Close(BAD[n])).await;
        world.cluster("a", &[server.address()], "");
        for bad in BAD {
            let got = world.get(&policy("cluster: a"), "/").await;
            assert_eq!((got.status, &*got.flags), (502, "UPE"), "{bad}");
        }
        assert_eq!(world.stat("cluster.a.upstream_cx_protocol_error"), 4);
    });
}

#[test]
fn a_client_that_leaves_takes_its_upstream_request_along() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Hang).await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        let arrived = async {
            while server.seen().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = world.get(&policy, "/") => panic!("an answer"),
            () = arrived => {}
        }
        server.wait_open(0).await;
        world.wait_stat("cluster.a.upstream_cx_active", 0).await;
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
    });
}

#[test]
fn mirrors_get_copies_and_nobody_notices() {
    run(async |world| {
        let main = Server::start(|_, _| Reply::Ok("main")).await;
        let copy = Server::start(|_, _| Reply::Status(500)).await;
        world.cluster("a", &[main.address()], "");
        world.cluster("copy", &[copy.address()], "");
        world.cluster("dead", &[dead_address().await], "");
        let policy =
            policy("cluster: a, request_mirror_policies: [{cluster: copy}, {cluster: dead}]");
        let request = head("POST", "/m", &[("content-length", "5"), ("x-k", "v")]);
        let got = world.send(&policy, request, Body::full("hello")).await;
        assert_eq!((got.status, text(&got)), (200, "main"));
        world.wait_stat("cluster.copy.upstream_rq_500", 1).await;
        world
            .wait_stat("cluster.dead.upstream_cx_connect_fail", 1)
            .await;
        let seen = copy.seen();
        assert_eq!(seen.len(), 1);
        assert_eq!(
            (seen[0].header("host"), &*seen[0].body),
            (Some("a.test-shadow:80"), "hello")
        );
        assert_eq!(seen[0].header("x-k"), Some("v"));
        assert_eq!(main.seen()[0].header("host"), Some("a.test:80"));
    });
}

/// A request body that is fed by the test.
struct Fed(tokio::sync::mpsc::UnboundedReceiver<Bytes>);

impl crate::body::Source for Fed {
    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame, BodyError>>> {
        self.0
            .poll_recv(cx)
            .map(|piece| piece.map(|piece| Ok(Frame::Data(piece))))
    }
}

#[test]
fn an_upgraded_stream_is_a_tunnel() {
    run(async |world| {
        let server = Server::start(|_, seen| {
            if seen.head.contains("/refuse") {
                return Reply::Status(403);
            }
            Reply::Echo("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi ")
        })
        .await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        let target = Target {
            cluster: "a".into(),
            subset: None,
        };
        let (feed, fed) = tokio::sync::mpsc::unbounded_channel();
        let request = head("GET", "/chat", &[("upgrade", "websocket")]);
        let info = new_info();
        let answer = forward(
            &world.shared,
            &policy,
            &target,
            request,
            Body::stream(Fed(fed)),
            &info,
        )
        .await;
        let (answer, mut body) = answer.unwrap();
        assert_eq!(answer.status, 101);
        assert_eq!(
            answer.headers.known(Known::Upgrade),
            Some(&b"websocket"[..])
        );
        assert_eq!(server.seen()[0].header("connection"), Some("Upgrade"));
        let mut got = String::new();
        feed.send("one".into()).unwrap();
        while got != "hi one" {
            match body.frame().await {
                Some(Ok(Frame::Data(data))) => got.push_str(&String::from_utf8_lossy(&data)),
                other => panic!("{other:?}"),
            }
        }
        drop(feed);
        assert_eq!(body.frame().await, None);
        assert_eq!(info.borrow().flags.short(), "DC", "the downstream ended it");
        let request = head("GET", "/refuse", &[("upgrade", "websocket")]);
        let got = world.send(&policy, request, Body::empty()).await;
        assert_eq!(got.status, 403);
        world.wait_stat("cluster.a.upstream_rq_active", 0).await;
    });
}

/// An HTTP/2 server that echoes with trailers; TLS if there is a context.
async fn h2_server(
    tls: Option<crate::tls::ServerContext>,
) -> (SocketAddr, Rc<std::cell::Cell<u32>>) {
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;
    async fn serve<S>(stream: S)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        use http_body_util::BodyExt as _;
        let service =
            hyper::service::service_fn(async |request: http::Request<hyper::body::Incoming>| {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await?.to_bytes();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("5"));
                let body = http_body_util::Full::new(body)
                    .with_trailers(std::future::ready(Some(Ok(trailers))));
                let mut response = http::Response::new(body);
                if path == "/unavailable" {
                    response
                        .headers_mut()
                        .insert("grpc-status", http::HeaderValue::from_static("14"));
                }
                Ok::<_, hyper::Error>(response)
            });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        drop(
            connection
                .serve_connection(TokioIo::new(stream), service)
                .await,
        );
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Rc::new(std::cell::Cell::new(0));
    let counted = connections.clone();
    let tls = tls.map(Rc::new);
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.set(counted.get() + 1);
            let tls = tls.clone();
            tokio::task::spawn_local(async move {
                match tls {
                    None => serve(stream).await,
                    Some(tls) => {
                        if let Ok((stream, _)) = tls.accept(stream.into(), Vec::new()).await {
                            serve(stream).await;
                        }
                    }
                }
            });
        }
    });
    (address, connections)
}

#[test]
fn http2_requests_share_a_connection() {
    run(async |world| {
        let (address, connections) = h2_server(None).await;
        world.cluster("a", &[address], H2);
        let policy = policy("cluster: a");
        let one = || world.send(&policy, head("POST", "/echo", &[]), Body::full("hello"));
        let (first, second, third) = tokio::join!(one(), one(), one());
        for got in [first, second, third] {
            assert_eq!((got.status, text(&got)), (200, "hello"));
            let trailers = got.trailers.unwrap();
            assert_eq!(trailers.known(Known::GrpcStatus), Some(&b"5"[..]));
        }
        assert_eq!(connections.get(), 1);
        assert_eq!(world.stat("cluster.a.upstream_cx_http2_total"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
    });
}

#[test]
fn a_grpc_status_is_retried() {
    run(async |world| {
        let (address, _) = h2_server(None).await;
        world.cluster("a", &[address], H2);
        let policy = policy(
            "cluster: a, retry_policy: {retry_on: unavailable, num_retries: 2, retry_back_off: {base_interval: 0.001s}}",
        );
        let got = world.get(&policy, "/unavailable").await;
        assert_eq!((got.status, got.attempts, &*got.flags), (200, 3, "URX"));
    });
}

#[test]
fn tls_to_the_upstream_negotiates_and_verifies() {
    use lateen_protocols::envoy::envoy::config::core::v3::{
        TransportSocket, transport_socket::ConfigType,
    };
    run(async |world| {
        let authority = Authority::new();
        let issued = authority.issue("spiffe://cluster.local/ns/b/sa/server", &["server.test"]);
        let context = downstream(common(Some(&issued), None, &[], &["h2", "http/1.1"]), false);
        let server = crate::tls::ServerContext::compile(&context, &world.shared.secrets).unwrap();
        let (address, _) = h2_server(Some(server)).await;
        let apply = |name: &str, roots: &str, uri: &str| {
            let context = upstream(common(None, Some(roots), &[uri], &[]), "server.test");
            let yaml = format!(
                "name: {name}\nload_assignment: {}\n{AUTO}",
                endpoints(name, &[address])
            );
            let mut proto: Cluster = json::from_yaml(&yaml).unwrap();
            proto.transport_socket = Some(TransportSocket {
                name: "tls".to_owned(),
                config_type: Some(ConfigType::TypedConfig(envoy_types::util::pack_any(
                    context,
                ))),
            });
            world.shared.clusters.apply(&proto, &world.shared).unwrap();
        };
        apply(
            "good",
            &authority.pem(),
            "spiffe://cluster.local/ns/b/sa/server",
        );
        apply(
            "stranger",
            &Authority::new().pem(),
            "spiffe://cluster.local/ns/b/sa/server",
        );
        apply(
            "other",
            &authority.pem(),
            "spiffe://cluster.local/ns/b/sa/other",
        );
        let got = world
            .send(
                &policy("cluster: good"),
                head("POST", "/", &[]),
                Body::full("hello"),
            )
            .await;
        assert_eq!((got.status, text(&got)), (200, "hello"));
        assert_eq!(world.stat("cluster.good.upstream_cx_http2_total"), 1);
        for name in ["stranger", "other"] {
            let got = world.get(&policy(&format!("cluster: {name}")), "/").await;
            assert_eq!((got.status, &*got.flags), (503, "UF"), "{name}");
            assert!(
                got.transport
                    .is_some_and(|reason| reason.starts_with("TLS error: "))
            );
        }
    });
}

#[test]
fn a_change_of_endpoints_keeps_the_connections_to_those_that_stay() {
    run(async |world| {
        let stays = Server::start(|_, _| Reply::Ok("stays")).await;
        let goes = Server::start(|_, _| Reply::Ok("goes")).await;
        world.apply(
            "name: a\ntype: EDS\neds_cluster_config: {service_name: s, eds_config: {ads: {}}}",
        );
        let set = |addresses: &[SocketAddr]| {
            let proto: ClusterLoadAssignment = json::from_yaml(&endpoints("s", addresses)).unwrap();
            world.shared.clusters.set_endpoints(&proto).unwrap();
        };
        let policy = policy("cluster: a");
        assert_eq!(&*world.get(&policy, "/").await.flags, "NC", "not warm yet");
        set(&[stays.address(), goes.address()]);
        world
            .shared
            .clusters
            .changes()
            .wait_for(|_| world.shared.clusters.is_warm("a"))
            .await
            .unwrap();
        for _ in 0..4 {
            assert_eq!(world.get(&policy, "/").await.status, 200);
        }
        assert_eq!((stays.connections(), goes.connections()), (1, 1));
        set(&[stays.address()]);
        goes.wait_open(0).await;
        for _ in 0..4 {
            assert_eq!(text(&world.get(&policy, "/").await), "stays");
        }
        assert_eq!(stays.connections(), 1);
        // The same cluster said once more, and one that differs: no request fails either time.
        world.apply(
            "name: a\ntype: EDS\neds_cluster_config: {service_name: s, eds_config: {ads: {}}}",
        );
        assert_eq!(world.get(&policy, "/").await.status, 200);
        assert_eq!(stays.connections(), 1);
        world.apply(
            "name: a\ntype: EDS\nconnect_timeout: 1s\neds_cluster_config: {service_name: s, eds_config: {ads: {}}}",
        );
        assert_eq!(world.get(&policy, "/").await.status, 200);
        assert_eq!(stays.connections(), 2);
        world.shared.clusters.remove("a");
        stays.wait_open(0).await;
        assert_eq!(&*world.get(&policy, "/").await.flags, "NC");
        assert_eq!(
            world.stat("cluster.a.upstream_rq_total"),
            0,
            "its statistics went with it"
        );
    });
}

const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";

#[test]
fn a_connection_is_free_again_as_soon_as_its_response_has_been_read() {
    run(async |world| {
        let server = Server::start(|n, _| {
            if n == 0 {
                Reply::Raw(CHUNKED)
            } else {
                Reply::Ok("x")
            }
        })
        .await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        assert_eq!(text(&world.get(&policy, "/").await), "abcde");
        assert_eq!(text(&world.get(&policy, "/").await), "x");
        assert_eq!(server.connections(), 1);
        let sent: usize = server.seen().iter().map(|seen| seen.head.len() + 4).sum();
        let received = CHUNKED.len() + "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx".len();
        assert_eq!(
            world.stat("cluster.a.upstream_cx_tx_bytes_total"),
            sent as u64
        );
        assert_eq!(
            world.stat("cluster.a.upstream_cx_rx_bytes_total"),
            received as u64
        );
    });
}

#[test]
fn more_than_was_asked_for_ends_the_connection() {
    run(async |world| {
        let server =
            Server::start(|_, _| Reply::Raw("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokMORE"))
                .await;
        world.cluster("a", &[server.address()], "");
        let policy = policy("cluster: a");
        assert_eq!(text(&world.get(&policy, "/").await), "ok");
        server.wait_open(0).await;
        assert_eq!(text(&world.get(&policy, "/").await), "ok");
        assert_eq!(server.connections(), 2);
        assert_eq!(world.stat("cluster.a.upstream_cx_protocol_error"), 2);
    });
}

#[test]
fn an_idle_connection_is_closed_in_time() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("x")).await;
        world.cluster(
            "a",
            &[server.address()],
            "common_http_protocol_options: {idle_timeout: 0.05s}",
        );
        assert_eq!(world.get(&policy("cluster: a"), "/").await.status, 200);
        server.wait_open(0).await;
        assert_eq!(world.stat("cluster.a.upstream_cx_idle_timeout"), 1);
        assert_eq!(world.stat("cluster.a.upstream_cx_active"), 0);
    });
}

#[test]
fn answers_before_the_final_one_are_handed_on() {
    run(async |world| {
        let server = Server::start(|_, _| {
            Reply::Raw(
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n\
                 HTTP/1.1 204 No Content\r\n\r\n",
            )
        })
        .await;
        world.cluster("a", &[server.address()], "");
        let target = Target {
            cluster: "a".into(),
            subset: None,
        };
        let told = RefCell::new(Vec::new());
        let answer = forward_informed(
            &world.shared,
            &policy("cluster: a"),
            &target,
            &mut head("GET", "/", &[]),
            Body::empty(),
            &new_info(),
            Hooks {
                on_informational: &|head| {
                    told.borrow_mut().push((head.status, head.headers.len()));
                },
                follow: &mut |_, _, _| false,
            },
        )
        .await;
        assert_eq!(answer.unwrap().0.status, 204);
        assert_eq!(*told.borrow(), [(100, 0), (103, 1)]);
    });
}

#[test]
fn an_answer_before_the_end_of_the_request_ends_the_connection() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Ok("early")).await;
        world.cluster("a", &[server.address()], "");
        let (feed, fed) = tokio::sync::mpsc::unbounded_channel();
        feed.send("one".into()).unwrap();
        let got = world
            .send(
                &policy("cluster: a"),
                head("POST", "/", &[]),
                Body::stream(Fed(fed)),
            )
            .await;
        assert_eq!((got.status, text(&got)), (200, "early"));
        server.wait_open(0).await;
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
    });
}

#[test]
fn request_and_response_go_on_together() {
    run(async |world| {
        let server = Server::start(|_, _| Reply::Echo("HTTP/1.1 200 OK\r\n\r\n")).await;
        world.cluster("a", &[server.address()], "");
        let target = Target {
            cluster: "a".into(),
            subset: None,
        };
        let (feed, fed) = tokio::sync::mpsc::unbounded_channel();
        let answer = forward(
            &world.shared,
            &policy("cluster: a"),
            &target,
            head("POST", "/", &[]),
            Body::stream(Fed(fed)),
            &new_info(),
        )
        .await;
        let (answer, mut body) = answer.unwrap();
        assert_eq!(answer.status, 200);
        let mut got = String::new();
        for piece in ["one", "three"] {
            feed.send(piece.into()).unwrap();
            while !got.ends_with(&format!("{piece}\r\n")) {
                match body.frame().await {
                    Some(Ok(Frame::Data(data))) => got.push_str(&String::from_utf8_lossy(&data)),
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(got, "3\r\none\r\n5\r\nthree\r\n");
        drop(body);
        server.wait_open(0).await;
    });
}

/// An HTTP/2 server that does with each event what `act` says; that is given the number of the connection.
async fn scripted_h2(
    options: h2::Options,
    act: impl Fn(usize, &mut h2::Connection, h2::Event) + 'static,
) -> SocketAddr {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (act, options) = (Rc::new(act), Arc::new(options));
    tokio::task::spawn_local(async move {
        let mut number = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            let (act, connection) = (act.clone(), number);
            let mut codec = h2::Connection::new(h2::Role::Server, options.clone());
            number += 1;
            tokio::task::spawn_local(async move {
                let mut input = bytes::BytesMut::new();
                while stream.read_buf(&mut input).await.unwrap_or(0) > 0 {
                    let mut events = Vec::new();
                    codec
                        .receive(&mut input, &mut |event| events.push(event))
                        .unwrap();
                    for event in events {
                        act(connection, &mut codec, event);
                    }
                    loop {
                        let mut slices = [std::io::IoSlice::new(&[]); 16];
                        let count = codec.output(&mut slices);
                        if count == 0 {
                            break;
                        }
                        let written = stream.write_vectored(&slices[..count]).await.unwrap();
                        codec.advance(written);
                    }
                }
            });
        }
    });
    address
}

fn ok() -> ResponseHead {
    ResponseHead {
        status: 200,
        headers: Headers::default(),
    }
}

#[test]
fn a_stream_that_a_departing_connection_never_saw_goes_to_another() {
    run(async |world| {
        let address = scripted_h2(
            h2::Options::default(),
            |connection, codec, event| match event {
                h2::Event::Settings if connection == 0 => codec.drain(),
                h2::Event::Request { stream, .. } => {
                    codec.respond(stream, &ok(), true).unwrap();
                }
                _ => {}
            },
        )
        .await;
        world.cluster("a", &[address], H2);
        let got = world
            .send(
                &policy("cluster: a"),
                head("POST", "/", &[]),
                Body::full("x"),
            )
            .await;
        assert_eq!((got.status, got.attempts), (200, 1));
        assert_eq!(world.stat("cluster.a.upstream_cx_http2_total"), 2);
        world.wait_stat("cluster.a.upstream_cx_active", 1).await;
    });
}

#[test]
fn resets_are_told_apart() {
    run(async |world| {
        let address = scripted_h2(h2::Options::default(), |_, codec, event| {
            if let h2::Event::Request { stream, head, .. } = event {
                match &*head.path {
                    b"/refused" => codec.reset(stream, h2::Code::REFUSED_STREAM),
                    b"/connect" => codec.reset(stream, h2::Code::CONNECT_ERROR),
                    b"/protocol" => codec.reset(stream, h2::Code::PROTOCOL_ERROR),
                    b"/cut" => {
                        codec.respond(stream, &ok(), false).unwrap();
                        codec
                            .send_data(stream, Bytes::from_static(b"abc"), false)
                            .unwrap();
                    }
                    _ => codec.reset(stream, h2::Code::CANCEL),
                }
            }
        })
        .await;
        world.cluster("a", &[address], H2);
        let policy = policy("cluster: a, timeout: 0.05s");
        for (path, status, flags, reason) in [
            ("/", 503, "UR", "remote reset"),
            ("/refused", 503, "UR", "remote refused stream reset"),
            ("/connect", 503, "UR", "remote error with CONNECT request"),
            ("/protocol", 502, "UPE", "protocol error"),
        ] {
            let got = world.get(&policy, path).await;
            assert_eq!((got.status, &*got.flags), (status, flags), "{path}");
            assert!(text(&got).ends_with(reason), "{}", text(&got));
        }
        assert_eq!(world.stat("cluster.a.upstream_rq_rx_reset"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_tx_reset"), 1);
        assert_eq!(world.stat("cluster.a.upstream_cx_protocol_error"), 0);
        let got = world.get(&policy, "/cut").await;
        assert_eq!((got.status, &*got.flags), (200, "UT"));
        assert_eq!(world.stat("cluster.a.upstream_cx_http2_total"), 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
    });
}

#[test]
fn the_peers_limit_on_streams_is_kept() {
    run(async |world| {
        let options = h2::Options {
            max_concurrent_streams: 1,
            ..h2::Options::default()
        };
        let address = scripted_h2(options, |_, codec, event| match event {
            h2::Event::Request {
                stream, end: true, ..
            } => codec.respond(stream, &ok(), true).unwrap(),
            h2::Event::Data {
                stream, data, end, ..
            } => {
                codec.consumed(stream, data.len());
                if end {
                    codec.respond(stream, &ok(), true).unwrap();
                }
            }
            h2::Event::Reset { code, .. } => panic!("{code:?}"),
            _ => {}
        })
        .await;
        world.cluster("a", &[address], H2);
        let policy = policy("cluster: a");
        assert_eq!(world.get(&policy, "/").await.status, 200);
        let long = || {
            let body = Body::full(vec![b'x'; 300_000]);
            world.send(&policy, head("POST", "/", &[]), body)
        };
        let (one, two, three) = tokio::join!(long(), long(), long());
        for got in [one, two, three] {
            assert_eq!((got.status, got.body), (200, Ok(String::new())));
        }
        assert!(world.stat("cluster.a.upstream_cx_http2_total") > 1);
        assert_eq!(world.stat("cluster.a.upstream_rq_active"), 0);
    });
}

#[test]
fn a_peer_that_answers_no_ping_is_given_up() {
    run(async |world| {
        // Accepts and reads nothing.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let h2 = H2.replace(
            "http2_protocol_options: {}",
            "http2_protocol_options: {connection_keepalive: {interval: 0.02s, timeout: 0.02s}}",
        );
        world.cluster("a", &[address], &h2);
        let got = world.get(&policy("cluster: a, timeout: 5s"), "/").await;
        assert_eq!((got.status, &*got.flags), (503, "UC"));
        world.wait_stat("cluster.a.upstream_cx_active", 0).await;
    });
}

#[test]
fn trailers_come_from_http1_where_they_are_enabled() {
    run(async |world| {
        let server = Server::start(|_, _| {
            Reply::Raw(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-t: v\r\n\r\n",
            )
        })
        .await;
        world.cluster("off", &[server.address()], "");
        world.cluster(
            "on",
            &[server.address()],
            "http_protocol_options: {enable_trailers: true}",
        );
        let got = world.get(&policy("cluster: off"), "/").await;
        assert_eq!((text(&got), got.trailers.is_none()), ("a", true));
        let got = world.get(&policy("cluster: on"), "/").await;
        let trailers = got.trailers.as_ref().expect("trailers");
        assert_eq!(trailers.get(&Name::new("x-t")), Some(&b"v"[..]));
    });
}
