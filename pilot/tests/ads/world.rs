//! A Pilot in process, its configuration given as text, and plain gRPC clients of it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use lateen_config::{ConfigSet, parse_file};
use lateen_kubernetes::KubernetesArgs;
use lateen_service::identity::IdentityArgs;
use lateen_service::shutdown::Drain;
use pilot::controller::ControllerArgs;
use pilot::server::{Config, Pilot};
use pilot::webhook::WebhookArgs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Nothing here takes long; a test that waits this long has failed.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) const RULE: &str = "config.istio.io/v1alpha2/rule";
pub(crate) const WORKLOAD: &str = "lateen.io/v1/Workload";

pub(crate) struct World {
    pub(crate) source: watch::Sender<Arc<ConfigSet>>,
    pub(crate) pilot: Pilot,
    pub(crate) drain: Drain,
}

pub(crate) fn config() -> Config {
    Config {
        webhook: WebhookArgs::default(),
        controller: ControllerArgs::default(),
        config_dir: None,
        kubernetes: KubernetesArgs::default(),
        bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
        grpc_port: 0,
        tls_port: 0,
        http_port: 0,
        identity: IdentityArgs::default(),
    }
}

pub(crate) fn set(generation: u64, yaml: &str) -> Arc<ConfigSet> {
    let (objects, problems) = parse_file("test.yaml", yaml);
    assert!(
        problems.iter().all(|problem| !problem.is_error()),
        "{problems:?}"
    );
    Arc::new(ConfigSet {
        objects: objects.into_iter().map(Arc::new).collect(),
        problems: Vec::new(),
        generation,
    })
}

pub(crate) fn rule(name: &str, expression: &str) -> String {
    format!(
        "apiVersion: config.istio.io/v1alpha2\nkind: rule\nmetadata: {{ name: {name}, namespace: ns }}\nspec:\n  match: {expression}\n  actions: [{{ handler: h, instances: [i] }}]\n---\n"
    )
}

impl World {
    pub(crate) async fn new(yaml: &str) -> Self {
        let (source, receiver) = watch::channel(set(1, yaml));
        let drain = Drain::new();
        let pilot = Pilot::with_source(&config(), receiver, None, &drain)
            .await
            .unwrap();
        let world = Self {
            source,
            pilot,
            drain,
        };
        world.built(1).await;
        world
    }

    /// Waits until that generation is served.
    pub(crate) async fn built(&self, generation: u64) {
        let mut served = self.pilot.discovery.subscribe();
        let built = served.wait_for(|served| {
            served
                .as_ref()
                .is_some_and(|s| s.snapshot.generation >= generation)
        });
        timeout(SOON, built).await.unwrap().unwrap();
    }

    pub(crate) async fn apply(&self, yaml: &str) -> u64 {
        let generation = self.source.borrow().generation + 1;
        self.source.send_replace(set(generation, yaml));
        self.built(generation).await;
        generation
    }

    pub(crate) fn live(&self) -> u64 {
        self.pilot
            .discovery
            .ledger()
            .live(self.source.borrow().generation)
    }

    /// Waits until the ledger says so.
    pub(crate) async fn live_at(&self, generation: u64) {
        let mut ledger = self.pilot.discovery.ledger().subscribe();
        let waiting = async {
            while self.live() < generation {
                ledger.changed().await.unwrap();
            }
        };
        timeout(SOON, waiting)
            .await
            .unwrap_or_else(|_| panic!("{generation} is not live: {}", self.live()));
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        get(self.pilot.http, path).await
    }

    pub(crate) async fn delta(&self) -> Client<DeltaDiscoveryRequest, DeltaDiscoveryResponse> {
        delta(self.pilot.grpc).await
    }

    pub(crate) async fn sotw(&self) -> Client<DiscoveryRequest, DiscoveryResponse> {
        let (sender, receiver) = mpsc::channel(16);
        let mut client =
            AggregatedDiscoveryServiceClient::connect(format!("http://{}", self.pilot.grpc))
                .await
                .unwrap();
        let answers = client
            .stream_aggregated_resources(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        Client { sender, answers }
    }
}

pub(crate) async fn delta(
    grpc: SocketAddr,
) -> Client<DeltaDiscoveryRequest, DeltaDiscoveryResponse> {
    let (sender, receiver) = mpsc::channel(16);
    let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{grpc}"))
        .await
        .unwrap();
    let answers = client
        .delta_aggregated_resources(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    Client { sender, answers }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: pilot\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head.split(' ').nth(1).unwrap().parse().unwrap(),
        body.to_owned(),
    )
}

pub(crate) struct Client<A, R> {
    pub(crate) sender: mpsc::Sender<A>,
    pub(crate) answers: Streaming<R>,
}

impl<A, R> Client<A, R> {
    pub(crate) async fn ask(&self, ask: A) {
        self.sender
            .send(ask)
            .await
            .unwrap_or_else(|_| panic!("the stream is closed"));
    }

    pub(crate) async fn answer(&mut self) -> R {
        timeout(SOON, self.answers.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }

    pub(crate) async fn end(&mut self) -> Status {
        match timeout(SOON, self.answers.message()).await.unwrap() {
            Err(status) => status,
            Ok(None) => Status::ok(""),
            Ok(Some(_)) => panic!("the stream goes on"),
        }
    }
}
