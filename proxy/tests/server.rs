//! The whole proxy in process: static bootstrap, control plane, admin, drain.
#![cfg(test)]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    pin::Pin,
    time::Duration,
};

use clap::Parser;
use lateen_protocols::{
    envoy::{
        envoy::admin::v3::ConfigDump,
        envoy::service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
        google::protobuf::Any,
    },
    json,
};
use proxy::{config::Options, control::Phase, logging::Logging, server::Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Longer than anything here takes; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    socket.local_addr().unwrap().port()
}

/// Answers every request with its request line and `name`, keeping connections open.
async fn http_backend(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    head.push(byte);
                    if head.ends_with(b"\r\n\r\n") {
                        let line = String::from_utf8_lossy(&head)
                            .lines()
                            .next()
                            .unwrap_or_default()
                            .to_owned();
                        let body = format!("{name}: {line}");
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                        head.clear();
                    }
                }
            });
        }
    });
    address
}

async fn echo_backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    address
}

/// One request on a connection of its own: status and body.
async fn send(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    send(address, "GET", path).await
}

fn cluster(name: &str, address: SocketAddr) -> String {
    format!(
        "{{ name: {name}, type: STATIC, connect_timeout: 1s, load_assignment: {{ cluster_name: {name}, endpoints: \
         [ {{ lb_endpoints: [ {} ] }} ] }} }}",
        endpoint(address)
    )
}

fn endpoint(address: SocketAddr) -> String {
    format!(
        "{{ endpoint: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }} }}",
        address.ip(),
        address.port()
    )
}

fn http_listener(name: &str, port: u16, routes: &str) -> String {
    format!(
        r#"{{ name: {name}, address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}, filter_chains: [ {{ filters: [ {{
  name: envoy.filters.network.http_connection_manager,
  typed_config: {{
    "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager,
    stat_prefix: {name}, {routes},
    http_filters: [ {{ name: envoy.filters.http.router, typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }} }} ] }} }} ] }} ] }}"#
    )
}

fn to_cluster(name: &str, cluster: &str) -> String {
    format!(
        "{{ name: {name}, virtual_hosts: [ {{ name: all, domains: ['*'], routes: [ {{ match: {{ prefix: / }}, route: \
         {{ cluster: {cluster} }} }} ] }} ] }}"
    )
}

fn tcp_listener(name: &str, port: u16, cluster: &str) -> String {
    format!(
        r#"{{ name: {name}, address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}, filter_chains: [ {{ filters: [ {{
  name: envoy.filters.network.tcp_proxy,
  typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {name}, cluster: {cluster} }} }} ] }} ] }}"#
    )
}

const ADMIN: &str = "admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }";

async fn start(yaml: &str) -> Server {
    let arguments = [
        "proxy",
        "--config-yaml",
        yaml,
        "--concurrency",
        "2",
        "--drain-time-s",
        "5",
    ];
    let options = Options::try_parse_from(arguments).unwrap();
    Server::start(&options, Logging::none()).await.unwrap()
}

fn run(server: Server) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.run(async move { drop(stopped.await) }));
    (stop, task)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_static_bootstrap_serves_http_and_tcp_and_admin_tells_of_it() {
    let (web, echo) = (http_backend("web").await, echo_backend().await);
    let (http, tcp) = (free_port().await, free_port().await);
    let yaml = format!(
        "node: {{ id: me }}\n{ADMIN}\nstatic_resources:\n  clusters: [ {}, {} ]\n  listeners: [ {}, {} ]\n",
        cluster("web", web),
        cluster("echo", echo),
        http_listener(
            "in",
            http,
            &format!("route_config: {}", to_cluster("r", "web"))
        ),
        tcp_listener("raw", tcp, "echo"),
    );
    let server = start(&yaml).await;
    server.ready().await;
    let admin = server.admin_address().unwrap();
    let (stop, task) = run(server);

    let http = SocketAddr::from(([127, 0, 0, 1], http));
    assert_eq!(
        get(http, "/a?b=c").await,
        (200, "web: GET /a?b=c HTTP/1.1".into())
    );
    let mut raw = TcpStream::connect(("127.0.0.1", tcp)).await.unwrap();
    raw.write_all(b"hello").await.unwrap();
    raw.shutdown().await.unwrap();
    let mut back = String::new();
    raw.read_to_string(&mut back).await.unwrap();
    assert_eq!(back, "hello");

    assert_eq!(get(admin, "/ready").await, (200, "LIVE\n".into()));
    assert_eq!(
        get(admin, "/listeners").await.1,
        format!("in::{http}\nraw::127.0.0.1:{tcp}\n")
    );
    let (_, clusters) = get(admin, "/clusters").await;
    assert!(
        clusters.contains(&format!("web::{web}::rq_total::1\n")),
        "{clusters}"
    );
    let (_, stats) = get(
        admin,
        "/stats?filter=cluster.web.upstream_rq_200|tcp.raw.downstream_cx_total",
    )
    .await;
    assert_eq!(
        stats,
        "cluster.web.upstream_rq_200: 1\ntcp.raw.downstream_cx_total: 1\n"
    );
    let (_, prometheus) = get(admin, "/stats/prometheus").await;
    let line =
        "envoy_cluster_upstream_rq{envoy_cluster_name=\"web\",envoy_response_code=\"200\"} 1\n";
    assert!(prometheus.contains(line), "{prometheus}");
    for path in [
        "/config_dump?include_eds",
        "/clusters?format=json",
        "/listeners?format=json",
        "/server_info",
    ] {
        let (status, body) = get(admin, path).await;
        assert_eq!(status, 200, "{path}: {body}");
        let _: serde_json::Value = serde_json::from_str(&body).unwrap();
    }
    let (_, dump) = get(admin, "/config_dump").await;
    let dump: ConfigDump = json::from_yaml(&dump).unwrap();
    assert_eq!(dump.configs.len(), 5);
    assert_eq!(get(admin, "/quitquitquit").await.0, 405);
    assert_eq!(get(admin, "/nothing").await.0, 404);
    assert_eq!(get(admin, "/stats?filter=(").await.0, 400);

    assert_eq!(send(admin, "POST", "/healthcheck/fail").await.0, 200);
    assert_eq!(get(admin, "/ready").await, (503, "DRAINING\n".into()));
    assert_eq!(send(admin, "POST", "/healthcheck/ok").await.0, 200);
    assert_eq!(get(admin, "/ready").await.0, 200);

    drop(stop);
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
    assert!(TcpStream::connect(http).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_under_way_is_finished_by_the_drain() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, port) = (listener.local_addr().unwrap(), free_port().await);
    let yaml = format!(
        "node: {{ id: me }}\nstatic_resources: {{ clusters: [ {} ], listeners: [ {} ] }}\n",
        cluster("slow", address),
        http_listener(
            "in",
            port,
            &format!("route_config: {}", to_cluster("r", "slow"))
        ),
    );
    let server = start(&yaml).await;
    server.ready().await;
    let drain = server.control().shared().drain.clone();
    let (stop, task) = run(server);
    let client = tokio::spawn(get(SocketAddr::from(([127, 0, 0, 1], port)), "/"));
    let (mut upstream, _) = listener.accept().await.unwrap();
    assert_eq!(upstream.read_u8().await.unwrap(), b'G');
    drop(stop);
    drain.started().await;
    upstream
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")
        .await
        .unwrap();
    assert_eq!(client.await.unwrap(), (200, "done".into()));
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_and_routes_come_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    // As one moves a new file into place, so that nobody reads half of it.
    let put = |name: &str, kind: &str, resource: String| {
        let resource =
            resource.replacen('{', &format!("{{ '@type': type.googleapis.com/{kind},"), 1);
        let new = folder.path().join("new");
        std::fs::write(&new, format!("resources: [ {resource} ]")).unwrap();
        std::fs::rename(new, folder.path().join(name)).unwrap();
    };
    let assignment = |address| {
        let endpoint = endpoint(address);
        format!("{{ cluster_name: svc, endpoints: [ {{ lb_endpoints: [ {endpoint} ] }} ] }}")
    };
    let (one, two) = (http_backend("one").await, http_backend("two").await);
    put("eds.yaml", EDS, assignment(one));
    put("rds.yaml", RDS, to_cluster("r", "absent"));
    let port = free_port().await;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let yaml = format!(
        "node: {{ id: me }}\nstatic_resources: {{ clusters: [ {{ name: a, type: EDS, eds_cluster_config: {{ service_name: svc, \
         eds_config: {{ path_config_source: {{ path: {} }} }} }} }} ], listeners: [ {} ] }}\n",
        path("eds.yaml"),
        http_listener(
            "in",
            port,
            &format!(
                "rds: {{ route_config_name: r, config_source: {{ path_config_source: {{ path: {} }} }} }}",
                path("rds.yaml")
            )
        ),
    );
    let server = start(&yaml).await;
    server.ready().await;
    let (_stop, _task) = run(server);
    assert_eq!(get(address, "/").await.0, 503, "no such cluster");
    let answered = async |name: &str| {
        let told = async {
            while !get(address, "/").await.1.contains(name) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, told)
            .await
            .expect("the file is read");
    };
    put("rds.yaml", RDS, to_cluster("r", "a"));
    answered("one").await;
    put("eds.yaml", EDS, assignment(two));
    answered("two").await;
}

/// What a control plane says: resources of each kind, as YAML, and a version.
type State = (u64, BTreeMap<&'static str, Vec<String>>);

const CDS: &str = "envoy.config.cluster.v3.Cluster";
const EDS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
const LDS: &str = "envoy.config.listener.v3.Listener";
const RDS: &str = "envoy.config.route.v3.RouteConfiguration";

/// A management server: pushes its whole state to whoever asked, and tells the test what came back.
#[derive(Clone)]
struct Pilot {
    state: watch::Receiver<State>,
    answers: mpsc::UnboundedSender<DiscoveryRequest>,
}

fn any(kind: &str, yaml: &str) -> Any {
    let typed: serde_json::Value = serde_saphyr::from_str(yaml).unwrap();
    let mut object = serde_json::Map::from_iter([(
        "@type".to_owned(),
        serde_json::Value::from(format!("type.googleapis.com/{kind}")),
    )]);
    object.extend(typed.as_object().unwrap().clone());
    let response: DiscoveryResponse =
        json::from_json(&serde_json::json!({ "resources": [object] })).unwrap();
    response.resources.into_iter().next().unwrap()
}

impl Pilot {
    fn response(&self, kind: &str) -> DiscoveryResponse {
        let (version, resources) = self.state.borrow().clone();
        DiscoveryResponse {
            version_info: version.to_string(),
            nonce: version.to_string(),
            type_url: format!("type.googleapis.com/{kind}"),
            resources: resources
                .get(kind)
                .into_iter()
                .flatten()
                .map(|yaml| any(kind, yaml))
                .collect(),
            ..DiscoveryResponse::default()
        }
    }

    /// Serves on a runtime of its own: dropping that is the death of the process.
    fn run(&self, listener: std::net::TcpListener) -> Runtime {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let service = AggregatedDiscoveryServiceServer::new(self.clone());
        runtime.spawn(async move {
            listener.set_nonblocking(true).unwrap();
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
        });
        runtime
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Pilot {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (sender, receiver) = mpsc::channel(64);
        let (mut requests, pilot) = (request.into_inner(), self.clone());
        tokio::spawn(async move {
            let mut state = pilot.state.clone();
            let mut asked: HashMap<String, Vec<String>> = HashMap::new();
            loop {
                tokio::select! {
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        let kind = request.type_url.rsplit('/').next().unwrap().to_owned();
                        let names = request.resource_names.clone();
                        if asked.insert(kind.clone(), names.clone()) != Some(names) {
                            drop(sender.send(Ok(pilot.response(&kind))).await);
                        }
                        drop(pilot.answers.send(request));
                    }
                    _ = state.changed() => {
                        for kind in [CDS, EDS, LDS, RDS].into_iter().filter(|kind| asked.contains_key(*kind)) {
                            drop(sender.send(Ok(pilot.response(kind))).await);
                        }
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(
            tokio_stream::wrappers::ReceiverStream::new(receiver),
        )))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state of the world only"))
    }
}

/// Waits for the answer to `version` of `kind`: `None` is an ACK, else the reason.
async fn verdict(
    answers: &mut mpsc::UnboundedReceiver<DiscoveryRequest>,
    kind: &str,
    version: u64,
) -> Option<String> {
    let wait = async {
        loop {
            let answer = answers.recv().await.unwrap();
            if answer.type_url.ends_with(kind) && answer.response_nonce == version.to_string() {
                return answer.error_detail.map(|status| status.message);
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_configures_it_and_may_err_and_die() {
    let (one, two) = (http_backend("one").await, http_backend("two").await);
    let port = free_port().await;
    let rds = "rds: { route_config_name: r, config_source: { ads: {} } }";
    let eds = "{ name: c, type: EDS, connect_timeout: 1s, eds_cluster_config: { eds_config: { ads: {} } } }";
    let endpoints = |address| {
        format!(
            "{{ cluster_name: c, endpoints: [ {{ lb_endpoints: [ {} ] }} ] }}",
            endpoint(address)
        )
    };
    let good: BTreeMap<&str, Vec<String>> = BTreeMap::from([
        (CDS, vec![eds.to_owned()]),
        (EDS, vec![endpoints(one)]),
        (LDS, vec![http_listener("in", port, rds)]),
        (RDS, vec![to_cluster("r", "c")]),
    ]);
    let (state, receiver) = watch::channel((1, good.clone()));
    let (sender, mut answers) = mpsc::unbounded_channel();
    let pilot = Pilot {
        state: receiver,
        answers: sender,
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let running = pilot.run(listener);

    let yaml = format!(
        "node: {{ id: me }}\n{ADMIN}\ndynamic_resources:\n  cds_config: {{ ads: {{}} }}\n  lds_config: {{ ads: {{}} }}\n  \
         ads_config: {{ api_type: GRPC, grpc_services: [ {{ envoy_grpc: {{ cluster_name: pilot }} }} ] }}\n\
         static_resources: {{ clusters: [ {} ] }}\n",
        cluster("pilot", address)
    );
    let server = start(&yaml).await;
    tokio::time::timeout(PATIENCE, server.ready())
        .await
        .unwrap();
    assert_eq!(*server.control().phase().borrow(), Phase::Live);
    let stats = server.control().shared().stats.clone();
    let (stop, task) = run(server);
    let http = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(get(http, "/").await.1, "one: GET / HTTP/1.1");
    assert_eq!(stats.value("control_plane.connected_state"), Some(1));

    let mut bad = good.clone();
    bad.insert(
        RDS,
        vec!["{ name: r, virtual_hosts: [ { name: x, domains: [] } ] }".to_owned()],
    );
    state.send((2, bad)).unwrap();
    let reason = verdict(&mut answers, RDS, 2).await.expect("a NACK");
    assert!(reason.contains("route r"), "{reason}");
    assert_eq!(get(http, "/").await.1, "one: GET / HTTP/1.1");

    // The control plane dies, everything serves on, and what it says when it is back is taken.
    // Waits for its threads, after which the address is free.
    tokio::task::spawn_blocking(|| running.shutdown_timeout(PATIENCE))
        .await
        .unwrap();
    let mut moved = good.clone();
    moved.insert(EDS, vec![endpoints(two)]);
    state.send((3, moved)).unwrap();
    assert_eq!(get(http, "/").await.1, "one: GET / HTTP/1.1");
    // std sets SO_REUSEADDR, so the address is free again at once.
    let listener = std::net::TcpListener::bind(address).unwrap();
    let running = pilot.run(listener);
    assert_eq!(verdict(&mut answers, EDS, 3).await, None);
    assert_eq!(get(http, "/").await.1, "two: GET / HTTP/1.1");

    drop(stop);
    tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
    running.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_before_anything_serves() {
    let arguments =
        |yaml: &'static str| Options::try_parse_from(["proxy", "--config-yaml", yaml]).unwrap();
    let validate = |yaml| {
        let runtime = tokio::runtime::Handle::current();
        proxy::server::validate(&arguments(yaml), runtime).map_err(|e| e.to_string())
    };
    assert_eq!(validate("static_resources: {}"), Ok(()));
    let error = validate(
        "static_resources: { clusters: [ { name: c, type: STATIC, lb_policy: MAGLEV_ } ] }",
    )
    .unwrap_err();
    assert!(error.contains("MAGLEV_"), "{error}");
    let error = validate("static_resources: { listeners: [ { name: l } ] }").unwrap_err();
    assert!(
        error.starts_with("static_resources.listeners: listener l"),
        "{error}"
    );
    let bad = arguments("static_resources: { listeners: [ { name: l } ] }");
    assert!(Server::start(&bad, Logging::none()).await.is_err());
}
