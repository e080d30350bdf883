use std::{cell::RefCell, collections::HashMap, net::SocketAddr, rc::Rc};

use lateen_protocols::{envoy::envoy::config::cluster::v3::Cluster, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::TcpListener,
    task::LocalSet,
};

use super::*;
use crate::{
    info::{ConnectionInfo, StreamInfo},
    testing::{LIMIT, shared},
    upstream::testing::{Reply, Server, dead_address},
};

fn run(test: impl AsyncFnOnce(Arc<Shared>)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let shared = shared();
        tokio::time::timeout(LIMIT, test(shared))
            .await
            .expect("the test does not hang");
    });
}

fn cluster(shared: &Shared, name: &str, addresses: &[SocketAddr], rest: &str) {
    let list: Vec<String> = addresses
        .iter()
        .map(|address| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}",
                address.ip(),
                address.port()
            )
        })
        .collect();
    let yaml = format!(
        "name: {name}\nload_assignment: {{endpoints: [{{lb_endpoints: [{}]}}]}}\n{rest}",
        list.join(", ")
    );
    let proto: Cluster = json::from_yaml(&yaml).unwrap();
    shared.clusters.apply(&proto, shared).unwrap();
}

fn filter(shared: &Shared, yaml: &str) -> TcpProxy {
    let proto: proto::TcpProxy = json::from_yaml(&format!("{{stat_prefix: t, {yaml}}}")).unwrap();
    TcpProxy::compile(&proto, shared).unwrap()
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
    Rc::new(RefCell::new(StreamInfo::new(Rc::new(connection), None)))
}

/// A server that sends `banner`, then everything back.
async fn echo(banner: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                stream.write_all(banner.as_bytes()).await.unwrap();
                let (mut reader, mut writer) = stream.split();
                tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            });
        }
    });
    address
}

/// Sends `text`, closes, reads to the end; what came and the facts.
async fn talk(shared: &Arc<Shared>, filter: &TcpProxy, text: &str) -> (String, SharedInfo) {
    let (mut client, downstream) = duplex(4096);
    let info = new_info();
    let talking = async {
        // A proxy that has given up already takes nothing.
        drop(client.write_all(text.as_bytes()).await);
        drop(client.shutdown().await);
        let mut got = String::new();
        client.read_to_string(&mut got).await.unwrap();
        got
    };
    let ((), got) = tokio::join!(
        filter.serve(shared, downstream.into(), Bytes::new(), &info),
        talking
    );
    (got, info)
}

#[test]
fn bytes_pass_both_ways_and_are_counted() {
    run(async |shared| {
        let server = echo("hi ").await;
        cluster(&shared, "a", &[server], "");
        let (got, info) = talk(&shared, &filter(&shared, "cluster: a"), "question").await;
        assert_eq!(got, "hi question");
        let info = info.borrow();
        assert_eq!((info.bytes_received, info.bytes_sent), (8, 11));
        assert_eq!(
            (info.upstream_host, info.flags.short().as_str()),
            (Some(server), "-")
        );
        assert!(info.response_end.is_some() && info.upstream_local.is_some());
        let stat = |name: &str| shared.stats.value(name);
        assert_eq!(stat("tcp.t.downstream_cx_total"), Some(1));
        assert_eq!(stat("tcp.t.downstream_cx_tx_bytes_total"), Some(11));
        assert_eq!(stat("cluster.a.upstream_cx_total"), Some(1));
        assert_eq!(stat("cluster.a.upstream_cx_active"), Some(0));
        assert_eq!(stat("cluster.a.upstream_cx_rx_bytes_total"), Some(11));
    });
}

#[test]
fn a_connection_is_retried_and_given_up_with_flags() {
    run(async |shared| {
        cluster(&shared, "dead", &[dead_address().await], "");
        cluster(
            &shared,
            "mixed",
            &[dead_address().await, echo("").await],
            "",
        );
        cluster(&shared, "empty", &[], "");
        for (yaml, flags) in [
            ("cluster: dead", "UF,URX"),
            ("cluster: empty", "UH"),
            ("cluster: none", "NC"),
        ] {
            let (got, info) = talk(&shared, &filter(&shared, yaml), "x").await;
            assert_eq!(
                (got.as_str(), info.borrow().flags.short().as_str()),
                ("", flags)
            );
        }
        let patient = filter(&shared, "cluster: mixed, max_connect_attempts: 2");
        for _ in 0..2 {
            let (got, info) = talk(&shared, &patient, "x").await;
            assert_eq!(
                (got.as_str(), info.borrow().flags.short().as_str()),
                ("x", "-")
            );
        }
        assert_eq!(
            shared
                .stats
                .value("cluster.dead.upstream_cx_connect_attempts_exceeded"),
            Some(1)
        );
        assert_eq!(shared.stats.value("tcp.t.downstream_cx_no_route"), Some(1));
    });
}

#[test]
fn the_breaker_limits_connections() {
    run(async |shared| {
        cluster(
            &shared,
            "a",
            &[echo("").await],
            "circuit_breakers: {thresholds: [{max_connections: 1}]}",
        );
        let filter = filter(&shared, "cluster: a");
        let (mut client, downstream) = duplex(64);
        let info = new_info();
        let second = async {
            client.write_all(b"x").await.unwrap();
            client.read_u8().await.unwrap();
            let (got, info) = talk(&shared, &filter, "y").await;
            assert_eq!(
                (got.as_str(), info.borrow().flags.short().as_str()),
                ("", "UO")
            );
            drop(client);
        };
        tokio::join!(
            filter.serve(&shared, downstream.into(), Bytes::new(), &info),
            second
        );
        assert_eq!(
            shared.stats.value("cluster.a.upstream_cx_overflow"),
            Some(1)
        );
    });
}

#[test]
fn weights_decide_once_for_each_connection() {
    run(async |shared| {
        let filter = filter(
            &shared,
            "weighted_clusters: {clusters: [{name: a, weight: 80}, {name: b, weight: 20}]}",
        );
        let mut counts: HashMap<&str, u32> = HashMap::new();
        for value in 0..filter.total {
            *counts.entry(&filter.draw(value).unwrap().name).or_default() += 1;
        }
        assert_eq!(counts, HashMap::from([("a", 80), ("b", 20)]));
        assert!(filter.draw(filter.total).is_none());
        assert_eq!(filter.clusters(), ["a".into(), "b".into()]);
    });
}

/// An HTTP/2 server that agrees to every request and sends back what comes in it; the requests' heads are kept.
async fn tunnel_echo() -> (SocketAddr, Rc<RefCell<Vec<http::request::Parts>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads = Rc::new(RefCell::new(Vec::new()));
    let kept = heads.clone();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::task::spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let (head, mut body) = request.into_parts();
                    kept.borrow_mut().push(head);
                    let mut answer = respond
                        .send_response(http::Response::new(()), false)
                        .unwrap();
                    tokio::task::spawn_local(async move {
                        while let Some(Ok(data)) = body.data().await {
                            body.flow_control().release_capacity(data.len()).unwrap();
                            answer.send_data(data, false).unwrap();
                        }
                        answer.send_data(Bytes::new(), true).unwrap();
                    });
                }
            });
        }
    });
    (address, heads)
}

const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                     {'@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                     explicit_http_config: {http2_protocol_options: {}}}}";

#[test]
fn a_tunnel_of_http2_carries_both_ways() {
    run(async |shared| {
        let (server, heads) = tunnel_echo().await;
        cluster(&shared, "a", &[server], HTTP2);
        let connect = filter(
            &shared,
            "cluster: a, tunneling_config: {hostname: 'host.test:80', headers_to_add: [{header: {key: x-a, value: b}}]}",
        );
        let post = filter(
            &shared,
            "cluster: a, tunneling_config: {hostname: host.test, use_post: true, post_path: /tunnel}",
        );
        for filter in [&connect, &post] {
            let (got, info) = talk(&shared, filter, "question").await;
            assert_eq!(got, "question");
            let info = info.borrow();
            assert_eq!((info.bytes_received, info.bytes_sent), (8, 8));
            assert_eq!(info.flags.short(), "-");
        }
        let heads = heads.borrow();
        let head = &heads[0];
        assert_eq!(
            (&head.method, head.uri.to_string()),
            (&http::Method::CONNECT, "host.test:80".into())
        );
        assert_eq!(head.headers["x-a"], "b");
        let head = &heads[1];
        assert_eq!(
            (&head.method, head.uri.path()),
            (&http::Method::POST, "/tunnel")
        );
        assert_eq!(shared.stats.value("cluster.a.upstream_cx_total"), Some(1));
    });
}

#[test]
fn a_tunnel_of_http1_is_its_connection() {
    run(async |shared| {
        let server = Server::start(|_, _| Reply::Echo("HTTP/1.1 200 OK\r\n\r\n")).await;
        cluster(&shared, "a", &[server.address()], "");
        let filter = filter(
            &shared,
            "cluster: a, tunneling_config: {hostname: 'host.test:80'}",
        );
        let (got, info) = talk(&shared, &filter, "question").await;
        assert_eq!(
            (got.as_str(), info.borrow().flags.short().as_str()),
            ("question", "-")
        );
        let head = &server.seen()[0].head;
        assert!(
            head.starts_with("CONNECT host.test:80 HTTP/1.1\r\n"),
            "{head}"
        );
    });
}

#[test]
fn a_tunnel_that_is_refused_is_told_and_tried_again() {
    run(async |shared| {
        let server = Server::start(|_, _| Reply::Status(403)).await;
        cluster(&shared, "a", &[server.address()], "");
        let filter = filter(
            &shared,
            "cluster: a, max_connect_attempts: 2, tunneling_config: {hostname: x}",
        );
        let (got, info) = talk(&shared, &filter, "question").await;
        let info = info.borrow();
        assert_eq!((got.as_str(), info.flags.short().as_str()), ("", "UF,URX"));
        assert_eq!(
            (
                info.upstream_transport_failure.as_deref(),
                info.upstream_attempts
            ),
            (Some("tunnel_response:403"), 2)
        );
        assert_eq!(server.seen().len(), 2);
    });
}

#[test]
fn what_a_tunnel_cannot_be_is_refused() {
    run(async |shared| {
        for (yaml, field) in [
            ("{}", "hostname"),
            ("{hostname: x, post_path: /a}", "post_path"),
            ("{hostname: '%NO_SUCH%'}", "hostname"),
        ] {
            let yaml = format!("{{stat_prefix: t, cluster: a, tunneling_config: {yaml}}}");
            let proto: proto::TcpProxy = json::from_yaml(&yaml).unwrap();
            let error = TcpProxy::compile(&proto, &shared).unwrap_err().to_string();
            assert!(
                error.contains("tunneling_config") && error.contains(field),
                "{error}"
            );
        }
    });
}
