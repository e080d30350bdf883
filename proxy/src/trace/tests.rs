use std::{collections::HashMap, rc::Rc};

use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lateen_protocols::envoy::envoy::config::{
    core::v3::{
        GrpcService, HttpService, Node, TypedExtensionConfig,
        grpc_service::{EnvoyGrpc, TargetSpecifier},
    },
    route::v3 as route,
    trace::v3::tracing::Http,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value,
};
use prost::Message;
use tokio::{net::TcpListener, sync::mpsc, time::timeout};

use super::*;
use crate::{
    cluster::ClusterManager,
    drain::Drain,
    head::Protocol,
    info::{ConnectionInfo, ResponseFlags, StreamInfo},
    route::{RouteSlots, RouteTable},
    secret::SecretStore,
    stats::Registry,
    testing::{self, LIMIT, Proxy, exchange},
};
use bytes::Bytes;

fn shared() -> Arc<Shared> {
    Arc::new(Shared {
        stats: Registry::new(),
        clusters: ClusterManager::new(),
        routes: RouteSlots::default(),
        destinations: Default::default(),
        secrets: SecretStore::new(),
        drain: Drain::new(Duration::from_secs(1)),
        node: Node {
            id: "sidecar~127.0.0.1~a.b~b.svc.cluster.local".to_owned(),
            cluster: "a.b".to_owned(),
            ..Node::default()
        },
        layers: Default::default(),
        runtime: tokio::runtime::Handle::current(),
    })
}

fn any<T: Message + prost::Name>(message: &T) -> pb::Any {
    pb::Any {
        type_url: T::type_url(),
        value: message.encode_to_vec(),
    }
}

fn open_telemetry() -> OpenTelemetryConfig {
    OpenTelemetryConfig {
        grpc_service: Some(GrpcService {
            target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                cluster_name: "collector".to_owned(),
                ..EnvoyGrpc::default()
            })),
            ..GrpcService::default()
        }),
        service_name: "a.b".to_owned(),
        ..OpenTelemetryConfig::default()
    }
}

fn provider(config: pb::Any) -> Option<Http> {
    Some(Http {
        name: "p".to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
    })
}

fn tracing() -> Tracing {
    Tracing {
        provider: provider(any(&open_telemetry())),
        ..Tracing::default()
    }
}

fn percent(value: f64) -> Option<Percent> {
    Some(Percent { value })
}

fn tracer(config: &Tracing, direction: TrafficDirection) -> Arc<Tracer> {
    Tracer::compile(config, direction, &shared())
        .unwrap()
        .unwrap()
}

fn head(headers: &[(&str, &str)]) -> RequestHead {
    let mut list = Headers::default();
    for (name, value) in headers {
        list.append(Name::new(name), *value);
    }
    RequestHead {
        method: "GET".into(),
        scheme: "http".into(),
        authority: "reviews:9080".into(),
        path: "/reviews/0?x=y".into(),
        protocol: Protocol::Http11,
        headers: list,
    }
}

fn info() -> StreamInfo {
    let connection = ConnectionInfo {
        id: 1,
        remote: "127.0.0.9:4711".parse().unwrap(),
        direct_remote: "127.0.0.9:4711".parse().unwrap(),
        local: "127.0.0.1:80".parse().unwrap(),
        local_restored: false,
        tls: None,
        requested_server_name: None,
        filter_chain: None,
        original_src: None,
        started: tokio::time::Instant::now(),
    };
    let mut info = StreamInfo::new(Rc::new(connection), Some(Protocol::Http11));
    info.response_code = 200;
    info.bytes_received = 3;
    info.bytes_sent = 5;
    info.upstream_cluster = Some("outbound|9080||reviews".into());
    info.upstream_host = Some("127.0.0.7:9080".parse().unwrap());
    info.upstream_attempts = 1;
    info.response_end = Some(Duration::from_millis(7));
    info
}

fn facts<'a>(info: &'a StreamInfo, request: &'a RequestHead) -> Facts<'a> {
    Facts {
        request: Some(request),
        ..Facts::of_connection(info)
    }
}

fn selected(decorator: &str, propagate: bool) -> Selected {
    let config = route::RouteConfiguration {
        virtual_hosts: vec![route::VirtualHost {
            name: "v".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route::Route {
                r#match: Some(route::RouteMatch {
                    path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".to_owned())),
                    ..route::RouteMatch::default()
                }),
                action: Some(route::route::Action::DirectResponse(
                    route::DirectResponseAction {
                        status: 200,
                        ..route::DirectResponseAction::default()
                    },
                )),
                decorator: Some(route::Decorator {
                    operation: decorator.to_owned(),
                    propagate: Some(pb::BoolValue { value: propagate }),
                }),
                ..route::Route::default()
            }],
            ..route::VirtualHost::default()
        }],
        ..route::RouteConfiguration::default()
    };
    let table = Arc::new(RouteTable::compile(&config, &shared()).unwrap());
    table.select(&head(&[]), None, false).unwrap()
}

#[tokio::test]
async fn what_cannot_be_done_is_refused() {
    let shared = shared();
    let compile = |config: &Tracing| {
        Tracer::compile(config, TrafficDirection::Inbound, &shared)
            .map(|tracer| tracer.is_some())
            .map_err(|error| error.to_string())
    };
    let with = |change: fn(&mut OpenTelemetryConfig)| {
        let mut config = open_telemetry();
        change(&mut config);
        Tracing {
            provider: provider(any(&config)),
            ..Tracing::default()
        }
    };
    assert_eq!(compile(&tracing()), Ok(true));
    assert_eq!(
        compile(&Tracing::default()),
        Ok(false),
        "without a provider nothing is traced"
    );
    for (config, want) in [
        (
            with(|config| {
                config.grpc_service = None;
                config.http_service = Some(HttpService::default());
            }),
            "provider p: http_service: not supported; use grpc_service",
        ),
        (
            with(|config| config.sampler = Some(TypedExtensionConfig::default())),
            "provider p: sampler: not supported; use grpc_service",
        ),
        (
            with(|config| config.grpc_service = None),
            "provider p: grpc_service: absent",
        ),
        (
            with(|config| config.grpc_service = Some(GrpcService::default())),
            "provider p: grpc_service: envoy_grpc: absent; nothing else is supported",
        ),
        (
            Tracing {
                provider: provider(any(&ZipkinConfig {
                    collector_cluster: "zipkin".to_owned(),
                    collector_endpoint: "/api/v2/spans".to_owned(),
                    collector_endpoint_version: 2,
                    ..ZipkinConfig::default()
                })),
                ..Tracing::default()
            },
            "provider p: collector_endpoint_version: HTTP_PROTO is not supported",
        ),
        (
            Tracing {
                provider: provider(any(&Node::default())),
                ..Tracing::default()
            },
            "provider p: type.googleapis.com/envoy.config.core.v3.Node: this trace provider is not \
             supported; OpenTelemetryConfig and ZipkinConfig are",
        ),
        (
            Tracing {
                custom_tags: vec![CustomTag {
                    tag: "t".to_owned(),
                    r#type: Some(custom_tag::Type::Environment(
                        custom_tag::Environment::default(),
                    )),
                }],
                ..tracing()
            },
            "custom_tags t: environment: not supported: the environment is read at start only; use a literal",
        ),
        (
            Tracing {
                random_sampling: percent(f64::NAN),
                ..tracing()
            },
            "random_sampling: not a percentage",
        ),
    ] {
        assert_eq!(compile(&config), Err(want.to_owned()));
    }
}

#[tokio::test]
async fn a_hop_is_a_child_of_its_caller() {
    let outbound = tracer(&tracing(), TrafficDirection::Outbound);
    let inbound = tracer(&tracing(), TrafficDirection::Inbound);
    let mut request = head(&[]);
    let root = *outbound.start(&mut request, None).context();
    assert_eq!((root.parent, root.sampled), (None, true));
    let child = *inbound.start(&mut request, None).context();
    assert_eq!((child.trace, child.parent), (root.trace, Some(root.span)));
    // An application that forwards only the B3 headers does not break the trace.
    request.headers.remove(&Name::Known(Known::TraceParent));
    let grandchild = *outbound.start(&mut request, None).context();
    assert_eq!(
        (grandchild.trace, grandchild.parent),
        (root.trace, Some(child.span))
    );
}

#[tokio::test]
async fn the_callers_decision_holds() {
    let config = |client, random, overall| {
        let config = Tracing {
            client_sampling: percent(client),
            random_sampling: percent(random),
            overall_sampling: percent(overall),
            ..tracing()
        };
        tracer(&config, TrafficDirection::Inbound)
    };
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0";
    let (yes, no) = (format!("{parent}1"), format!("{parent}0"));
    for (tracer, headers, want) in [
        (
            config(100.0, 0.0, 0.0),
            vec![("traceparent", yes.as_str())],
            true,
        ),
        (
            config(100.0, 100.0, 100.0),
            vec![("traceparent", no.as_str())],
            false,
        ),
        (
            config(100.0, 100.0, 100.0),
            vec![("x-b3-sampled", "0")],
            false,
        ),
        (config(100.0, 0.0, 100.0), vec![], false),
        (
            config(100.0, 0.0, 100.0),
            vec![("x-client-trace-id", "c")],
            true,
        ),
        (
            config(0.0, 0.0, 100.0),
            vec![("x-client-trace-id", "c")],
            false,
        ),
        (
            config(0.0, 0.0, 100.0),
            vec![("x-envoy-force-trace", "true")],
            true,
        ),
        (
            config(100.0, 100.0, 0.0),
            vec![("x-client-trace-id", "c")],
            false,
        ),
    ] {
        let mut request = head(&headers);
        let trace = tracer.start(&mut request, None);
        assert_eq!(trace.context().sampled, want, "{headers:?}");
        let flag = if want { "1" } else { "0" };
        assert_eq!(
            request.headers.known(Known::XB3Sampled).unwrap(),
            flag.as_bytes()
        );
    }
}

#[tokio::test]
async fn one_percent_is_one_percent() {
    let config = Tracing {
        random_sampling: percent(1.0),
        ..tracing()
    };
    let tracer = tracer(&config, TrafficDirection::Outbound);
    let sampled = (0..100_000)
        .filter(|_| tracer.start(&mut head(&[]), None).context().sampled)
        .count();
    // Six standard deviations (31.5) around 1000: wrong less than once in 10^8 runs.
    assert!((811..=1189).contains(&sampled), "{sampled}");
}

#[tokio::test]
async fn the_decorator_names_both_sides() {
    let outbound = tracer(&tracing(), TrafficDirection::Outbound);
    let inbound = tracer(&tracing(), TrafficDirection::Inbound);
    let info = info();
    let mut request = head(&[]);
    let name =
        |trace: &Trace, request: &RequestHead| trace.downstream_span(&facts(&info, request)).name;
    let client = outbound.start(&mut request, Some(&selected("reviews", true)));
    assert_eq!(name(&client, &request), "reviews");
    let mut server = inbound.start(&mut request, Some(&selected("other", true)));
    assert_eq!(name(&server, &request), "reviews", "the peer's name wins");
    assert_eq!(request.headers.known(Known::XEnvoyDecoratorOperation), None);
    let mut response = ResponseHead {
        status: 200,
        headers: Headers::default(),
    };
    server.on_response(&mut response);
    assert!(response.headers.is_empty(), "the peer knows it");
    // A caller that has no name is told ours.
    let mut request = head(&[]);
    let mut client = outbound.start(&mut request, None);
    let mut server = inbound.start(&mut request, Some(&selected("mine", true)));
    assert_eq!(name(&client, &request), "egress reviews:9080");
    server.on_response(&mut response);
    client.on_response(&mut response);
    assert_eq!(name(&client, &request), "mine");
    assert!(response.headers.is_empty());
    let quiet = outbound.start(&mut request, Some(&selected("quiet", false)));
    assert_eq!(name(&quiet, &request), "quiet");
    assert_eq!(request.headers.known(Known::XEnvoyDecoratorOperation), None);
    assert_eq!(
        name(&inbound.start(&mut request, None), &request),
        "ingress"
    );
}

#[tokio::test]
async fn a_span_has_envoys_tags() {
    let config = Tracing {
        max_path_tag_length: Some(pb::UInt32Value { value: 8 }),
        custom_tags: vec![
            CustomTag {
                tag: "mesh".to_owned(),
                r#type: Some(custom_tag::Type::Literal(custom_tag::Literal {
                    value: "m1".to_owned(),
                })),
            },
            CustomTag {
                tag: "user".to_owned(),
                r#type: Some(custom_tag::Type::RequestHeader(custom_tag::Header {
                    name: "End-User".to_owned(),
                    default_value: "nobody".to_owned(),
                })),
            },
            CustomTag {
                tag: "code".to_owned(),
                r#type: Some(custom_tag::Type::Value("is %RESPONSE_CODE%".to_owned())),
            },
        ],
        ..tracing()
    };
    let tracer = tracer(&config, TrafficDirection::Outbound);
    let mut request = head(&[
        ("x-request-id", "id-1"),
        ("user-agent", "curl"),
        ("end-user", "jason"),
        ("tracestate", "a=b"),
        ("tracestate", "c=d"),
        (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ),
    ]);
    let trace = tracer.start(&mut request, None);
    let mut info = info();
    info.response_code = 503;
    info.flags.set(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
    let span = export::otlp_span(trace.downstream_span(&facts(&info, &request)));
    assert_eq!(span.kind, 3, "client");
    assert_eq!(span.trace_state, "a=b,c=d");
    assert_eq!(span.parent_span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
    assert_eq!(
        span.end_time_unix_nano - span.start_time_unix_nano,
        7_000_000
    );
    assert_eq!(span.status.unwrap().code, 2);
    let tags: Vec<_> = span
        .attributes
        .into_iter()
        .map(|attribute| {
            let value = attribute.value.and_then(|value| value.value);
            let Some(opentelemetry_proto::tonic::common::v1::any_value::Value::StringValue(value)) =
                value
            else {
                panic!("{} is not text", attribute.key);
            };
            (attribute.key, value)
        })
        .collect();
    let want = [
        ("node_id", "sidecar~127.0.0.1~a.b~b.svc.cluster.local"),
        ("guid:x-request-id", "id-1"),
        ("http.url", "http://reviews:9080/reviews"),
        ("http.method", "GET"),
        ("user_agent", "curl"),
        ("http.protocol", "HTTP/1.1"),
        ("peer.address", "127.0.0.9"),
        ("request_size", "3"),
        ("response_size", "5"),
        ("component", "proxy"),
        ("upstream_cluster", "outbound|9080||reviews"),
        ("upstream_cluster.name", "outbound|9080||reviews"),
        ("http.status_code", "503"),
        ("response_flags", "UF"),
        ("error", "true"),
        ("mesh", "m1"),
        ("user", "jason"),
        ("code", "is 503"),
    ];
    assert_eq!(
        tags,
        want.map(|(key, value)| (key.to_owned(), value.to_owned()))
    );
}

#[tokio::test]
async fn what_counts_as_failed() {
    let inbound = tracer(&tracing(), TrafficDirection::Inbound);
    let outbound = tracer(&tracing(), TrafficDirection::Outbound);
    for (code, server, client) in [
        (200, false, false),
        (404, false, true),
        (500, true, true),
        (0, true, true),
    ] {
        let mut info = info();
        info.response_code = code;
        for (tracer, want) in [(&inbound, server), (&outbound, client)] {
            let mut request = head(&[]);
            let trace = tracer.start(&mut request, None);
            assert_eq!(
                trace.downstream_span(&facts(&info, &request)).failed,
                want,
                "{code}"
            );
        }
    }
    for (code, want) in [(0, false), (5, false), (7, false), (13, true), (14, true)] {
        let mut info = info();
        info.grpc_status = Some(code);
        let mut request = head(&[("content-type", "application/grpc")]);
        let trace = inbound.start(&mut request, None);
        assert_eq!(
            trace.downstream_span(&facts(&info, &request)).failed,
            want,
            "gRPC {code}"
        );
    }
}

#[tokio::test]
async fn the_upstream_side_may_have_a_span_of_its_own() {
    let config = Tracing {
        spawn_upstream_span: Some(pb::BoolValue { value: true }),
        ..tracing()
    };
    let tracer = tracer(&config, TrafficDirection::Outbound);
    let mut request = head(&[]);
    let trace = tracer.start(&mut request, None);
    let handed_on = context::extract(&request.headers).parent.unwrap().1;
    let info = info();
    let facts = facts(&info, &request);
    let upstream = trace.upstream_span(trace.upstream.unwrap(), &facts);
    assert_eq!(upstream.id, handed_on);
    assert_eq!(upstream.parent, Some(trace.context().span));
    assert_eq!(upstream.kind, span::Kind::Client);
    assert_eq!(upstream.name, "router outbound|9080||reviews egress");
    assert_eq!(trace.downstream_span(&facts).kind, span::Kind::Server);
}

#[tokio::test]
async fn zipkin_gets_its_json() {
    let config = Tracing {
        provider: provider(any(&ZipkinConfig {
            collector_cluster: "zipkin".to_owned(),
            collector_endpoint: "/api/v2/spans".to_owned(),
            collector_endpoint_version: 1,
            ..ZipkinConfig::default()
        })),
        ..Tracing::default()
    };
    let tracer = tracer(&config, TrafficDirection::Inbound);
    let mut request = head(&[
        ("x-b3-traceid", "00f067aa0ba902b7"),
        ("x-b3-spanid", "00f067aa0ba902b8"),
        ("x-b3-sampled", "1"),
    ]);
    let trace = tracer.start(&mut request, None);
    let info = info();
    let json = export::zipkin_span(&trace.downstream_span(&facts(&info, &request)), "s");
    let get = |key: &str| json[key].clone();
    assert_eq!(get("traceId"), "000000000000000000f067aa0ba902b7");
    assert_eq!(get("parentId"), "00f067aa0ba902b8");
    assert_eq!(get("id"), trace.context().span.to_string());
    assert_eq!(get("kind"), "SERVER");
    assert_eq!(get("duration"), 7000);
    assert_eq!(json["localEndpoint"]["serviceName"], "s");
    assert_eq!(json["tags"]["http.status_code"], "200");
}

#[tokio::test]
async fn a_worker_keeps_no_more_spans_than_it_should() {
    let shared = shared();
    let tracer = Tracer::compile(&tracing(), TrafficDirection::Inbound, &shared)
        .unwrap()
        .unwrap();
    let dropped = || {
        shared
            .stats
            .value("tracing.opentelemetry.spans_dropped")
            .unwrap()
    };
    let local = tokio::task::LocalSet::new();
    let info = info();
    local
        .run_until(async {
            for _ in 0..2100 {
                let mut request = head(&[]);
                let trace = tracer.start(&mut request, None);
                trace.finish(&shared, &facts(&info, &request));
            }
            assert_eq!(dropped(), 2100 - 2048);
            // There is no such cluster, so the others are lost, too.
            while dropped() < 2100 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    assert_eq!(
        shared.stats.value("tracing.opentelemetry.spans_sent"),
        Some(0)
    );
}

/// A collector of OTLP over gRPC: hands each request on to the test.
async fn fake_collector() -> (
    std::net::SocketAddr,
    mpsc::Receiver<ExportTraceServiceRequest>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sender = sender.clone();
            let service = service_fn(move |request: http::Request<Incoming>| {
                let sender = sender.clone();
                async move {
                    assert_eq!(
                        request.uri().path(),
                        "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
                    );
                    assert_eq!(request.headers()["x-tenant"], "blue");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let message = ExportTraceServiceRequest::decode(&body[5..]).unwrap();
                    sender.send(message).await.unwrap();
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let empty = Full::new(Bytes::from_static(&[0; 5]))
                        .with_trailers(async { Some(Ok(trailers)) });
                    let mut response = http::Response::new(empty);
                    response
                        .headers_mut()
                        .insert("content-type", "application/grpc".parse().unwrap());
                    Ok::<_, std::convert::Infallible>(response)
                }
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    (address, receiver)
}

/// An application that answers with the trace headers it got; given an address, after asking there with
/// the B3 headers only.
async fn fake_application(next: Option<std::net::SocketAddr>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(move |request: http::Request<Incoming>| async move {
                let all: Vec<(String, String)> = request
                    .headers()
                    .iter()
                    .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
                    .collect();
                let answer = match next {
                    None => all
                        .iter()
                        .map(|(name, value)| format!("{name}: {value}\n"))
                        .collect(),
                    Some(next) => {
                        let forwarded: String = all
                            .iter()
                            .filter(|(name, _)| name.starts_with("x-b3-"))
                            .map(|(name, value)| format!("{name}: {value}\r\n"))
                            .collect();
                        let request = format!(
                            "GET /two HTTP/1.1\r\nhost: ratings\r\n{forwarded}connection: close\r\n\r\n"
                        );
                        exchange(next, request.as_bytes()).await
                    }
                };
                Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(Bytes::from(
                    answer,
                ))))
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    address
}

/// A listener of this direction that forwards everything to `cluster` and traces it.
fn traced(direction: &str, cluster: &str, sampling: &str) -> String {
    let vhosts = format!(
        "[{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}]"
    );
    let tracing = format!(
        "tracing: {{random_sampling: {{value: {sampling}}}, provider: {{name: otel, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig, service_name: {cluster}, grpc_service: \
         {{envoy_grpc: {{cluster_name: otel}}, initial_metadata: [{{key: X-Tenant, value: blue}}]}}}}}}}}"
    );
    format!(
        "traffic_direction: {direction}\n{}",
        testing::http(&vhosts, &tracing)
    )
}

const HTTP2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
    {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
    explicit_http_config: {http2_protocol_options: {}}}}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connected_trace_over_all_hops() {
    let (collector, mut received) = fake_collector().await;
    let proxy = Proxy::start();
    proxy.cluster("otel", collector, HTTP2);
    // client → outbound 1 → inbound 1 → application → outbound 2 → inbound 2 → application
    proxy.cluster("ratings", fake_application(None).await, "");
    let inbound_2 = proxy.listen("i2", &traced("INBOUND", "ratings", "0"));
    proxy.cluster("to_ratings", inbound_2, "");
    let outbound_2 = proxy.listen("o2", &traced("OUTBOUND", "to_ratings", "0"));
    proxy.cluster("reviews", fake_application(Some(outbound_2)).await, "");
    let inbound_1 = proxy.listen("i1", &traced("INBOUND", "reviews", "0"));
    proxy.cluster("to_reviews", inbound_1, "");
    let outbound_1 = proxy.listen("o1", &traced("OUTBOUND", "to_reviews", "100"));
    let answer = exchange(
        outbound_1,
        b"GET /one HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut spans = HashMap::new();
    while spans.len() < 4 {
        let request = timeout(LIMIT, received.recv()).await.unwrap().unwrap();
        for resource in request.resource_spans {
            let service = resource
                .resource
                .unwrap()
                .attributes
                .remove(0)
                .value
                .unwrap();
            let Some(Value::StringValue(service)) = service.value else {
                panic!("the service has no name");
            };
            for span in resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans)
            {
                spans.insert(service.clone(), span);
            }
        }
    }
    let chain = ["to_reviews", "reviews", "to_ratings", "ratings"].map(|name| &spans[name]);
    assert!(
        chain[0].parent_span_id.is_empty(),
        "the first span is the root"
    );
    for pair in chain.windows(2) {
        assert_eq!(pair[1].parent_span_id, pair[0].span_id, "{pair:?}");
        assert_eq!(pair[1].trace_id, pair[0].trace_id);
        assert!(pair[0].start_time_unix_nano <= pair[1].start_time_unix_nano);
    }
    assert_eq!(
        chain.map(|span| span.kind),
        [3, 2, 3, 2],
        "client and server by turns"
    );
    assert_eq!(chain[2].name, "egress ratings");
    // The last application got the context of the last span, in both forms.
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let (trace, span) = (hex(&chain[3].trace_id), hex(&chain[3].span_id));
    assert!(
        answer.contains(&format!("traceparent: 00-{trace}-{span}-01\n")),
        "{answer}"
    );
    assert!(
        answer.contains(&format!("x-b3-spanid: {span}\n")),
        "{answer}"
    );
    proxy.wait_for("tracing.opentelemetry.spans_sent", 4).await;
    assert_eq!(proxy.counter("tracing.opentelemetry.spans_dropped"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_ends_sends_what_it_has() {
    let (collector, mut received) = fake_collector().await;
    let proxy = Proxy::start();
    proxy.cluster("otel", collector, HTTP2);
    proxy.cluster("up", fake_application(None).await, "");
    let address = proxy.listen("l", &traced("INBOUND", "up", "100"));
    exchange(
        address,
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    )
    .await;
    proxy.wait_for("http.t.downstream_rq_completed", 1).await;
    let workers = proxy.workers;
    tokio::task::spawn_blocking(move || workers.stop())
        .await
        .unwrap();
    // The span was handed over before the worker's thread ended.
    assert!(received.try_recv().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tracing_the_headers_pass_as_they_are() {
    let proxy = Proxy::start();
    proxy.cluster("up", fake_application(None).await, "");
    let vhosts =
        "[{name: v, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: up}}]}]";
    let address = proxy.listen(
        "l",
        &testing::http(vhosts, "tracing: {random_sampling: {value: 100}}"),
    );
    let headers =
        "traceparent: 00-not-a-context\r\ntracestate: a=b\r\nb3: 0\r\nx-b3-traceid: 12\r\n";
    let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}connection: close\r\n\r\n");
    let answer = exchange(address, request.as_bytes()).await;
    for header in headers.lines() {
        assert!(answer.contains(&format!("{header}\n")), "{answer}");
    }
    assert!(!answer.contains("x-b3-spanid"), "{answer}");
}
