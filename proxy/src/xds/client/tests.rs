use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Mutex,
};

use envoy_types::pb::{
    envoy::{
        config::{cluster::v3::Cluster, listener::v3::Listener},
        service::discovery::v3::{
            Resource as DeltaResource,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
    },
    google::protobuf::Any,
};
use lateen_protocols::json;
use prost::{Message, Name};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Response, Streaming};

use super::*;
use crate::{
    secret::SecretStore,
    xds::{Outcome, Update},
};

/// Hands each stream's two ends to the test, which plays the server.
struct Server {
    sotw: mpsc::Sender<End<DiscoveryRequest, DiscoveryResponse>>,
    delta: mpsc::Sender<End<DeltaDiscoveryRequest, DeltaDiscoveryResponse>>,
}

struct End<Q, R> {
    requests: Streaming<Q>,
    responses: mpsc::Sender<Result<R, Status>>,
}

impl<Q, R> End<Q, R> {
    async fn next(&mut self) -> Q {
        self.requests
            .message()
            .await
            .unwrap()
            .expect("the client closed the stream")
    }

    async fn send(&self, response: R) {
        self.responses.send(Ok(response)).await.unwrap();
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        assert_eq!(request.metadata().get("x-token").unwrap(), "t");
        let (responses, receiver) = mpsc::channel(16);
        let requests = request.into_inner();
        self.sotw
            .send(End {
                requests,
                responses,
            })
            .await
            .unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, receiver) = mpsc::channel(16);
        let requests = request.into_inner();
        self.delta
            .send(End {
                requests,
                responses,
            })
            .await
            .unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Accepts everything whose name does not begin with "bad", and wants what the test says.
#[derive(Debug)]
struct Applied {
    updates: Mutex<Vec<Update>>,
    wanted: watch::Sender<Wanted>,
    connected: Mutex<Vec<bool>>,
}

impl Sink for Applied {
    fn apply(&self, update: Update) -> Outcome {
        let mut outcome = Outcome::default();
        for resource in &update.resources {
            let name = resource.name.clone().unwrap_or_else(|| {
                Cluster::decode(resource.body.value.as_slice())
                    .unwrap()
                    .name
            });
            if name.starts_with("bad") {
                outcome.error = Some(format!("cluster {name}: is bad"));
            } else {
                outcome.accepted.push((name, resource.version.clone()));
            }
        }
        self.updates.lock().unwrap().push(update);
        outcome
    }

    fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    fn connected(&self, _: &Source, connected: bool) {
        self.connected.lock().unwrap().push(connected);
    }
}

struct Mesh {
    sink: Arc<Applied>,
    client: JoinHandle<()>,
    sotw: mpsc::Receiver<End<DiscoveryRequest, DiscoveryResponse>>,
    delta: mpsc::Receiver<End<DeltaDiscoveryRequest, DeltaDiscoveryResponse>>,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.client.abort();
    }
}

async fn mesh(delta: bool) -> Mesh {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sotw_sender, sotw) = mpsc::channel(4);
    let (delta_sender, delta_receiver) = mpsc::channel(4);
    let service = AggregatedDiscoveryServiceServer::new(Server {
        sotw: sotw_sender,
        delta: delta_sender,
    });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let cluster: Cluster = json::from_yaml(&format!(
        "{{ name: xds, load_assignment: {{ cluster_name: xds, endpoints: [ {{ lb_endpoints: [ {{ endpoint: \
         {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }} }} }} ] }} ] }} }}"
    ))
    .unwrap();
    let sink = Arc::new(Applied {
        updates: Mutex::default(),
        wanted: watch::Sender::new(Wanted {
            clusters: true,
            ..Wanted::default()
        }),
        connected: Mutex::default(),
    });
    let client = Client {
        sink: sink.clone(),
        target: Target::compile(&cluster, &SecretStore::new()).unwrap(),
        service: Service::Aggregated,
        kinds: Kind::ALL.to_vec(),
        delta,
        metadata: vec![("x-token".into(), "t".into())],
        node: Node {
            id: "n".into(),
            ..Node::default()
        },
        source: Source::Ads,
    };
    Mesh {
        sink,
        client: tokio::spawn(client.run()),
        sotw,
        delta: delta_receiver,
    }
}

fn cluster(name: &str) -> Any {
    Any {
        type_url: Cluster::type_url(),
        value: Cluster {
            name: name.into(),
            ..Cluster::default()
        }
        .encode_to_vec(),
    }
}

fn state(version: &str, nonce: &str, names: &[&str]) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: version.into(),
        nonce: nonce.into(),
        type_url: Kind::Cluster.type_url().into(),
        resources: names.iter().map(|name| cluster(name)).collect(),
        ..DiscoveryResponse::default()
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn state_of_the_world_is_acked_nacked_and_resumed() {
    let mut mesh = mesh(false).await;
    let mut end = mesh.sotw.recv().await.unwrap();
    let first = end.next().await;
    assert_eq!(
        (first.node.unwrap().id.as_str(), first.type_url.as_str()),
        ("n", Kind::Cluster.type_url())
    );
    assert_eq!(
        (first.version_info.as_str(), first.response_nonce.as_str()),
        ("", "")
    );

    end.send(state("1", "a", &["one"])).await;
    let ack = end.next().await;
    assert_eq!(
        (ack.version_info.as_str(), ack.response_nonce.as_str()),
        ("1", "a")
    );
    assert_eq!((ack.error_detail, ack.node), (None, None));

    end.send(state("2", "b", &["one", "bad"])).await;
    let nack = end.next().await;
    assert_eq!(
        (nack.version_info.as_str(), nack.response_nonce.as_str()),
        ("1", "b")
    );
    assert_eq!(nack.error_detail.unwrap().message, "cluster bad: is bad");

    mesh.sink.wanted.send_modify(|wanted| {
        wanted.listeners = true;
        wanted.endpoints = set(&["x", "y"]);
    });
    let endpoints = end.next().await;
    assert_eq!(endpoints.type_url, Kind::Endpoint.type_url());
    assert_eq!(endpoints.resource_names, ["x", "y"]);
    assert_eq!(end.next().await.type_url, Listener::type_url());
    mesh.sink
        .wanted
        .send_modify(|wanted| wanted.endpoints = set(&["y"]));
    assert_eq!(end.next().await.resource_names, ["y"]);

    drop(end);
    let mut end = mesh.sotw.recv().await.unwrap();
    let again = end.next().await;
    assert_eq!(
        (again.version_info.as_str(), again.response_nonce.as_str()),
        ("1", "")
    );
    assert!(again.node.is_some());
    assert_eq!(end.next().await.resource_names, ["y"]);
    end.send(state("3", "c", &["one"])).await;
    assert_eq!(end.next().await.type_url, Listener::type_url());
    assert_eq!(end.next().await.version_info, "3");
    assert_eq!(*mesh.sink.connected.lock().unwrap(), [true, false, true]);
    let updates = mesh.sink.updates.lock().unwrap();
    assert!(updates.iter().all(|update| update.complete));
}

#[tokio::test]
async fn delta_is_acked_nacked_and_resumed_with_what_we_have() {
    let mut mesh = mesh(true).await;
    let mut end = mesh.delta.recv().await.unwrap();
    let first = end.next().await;
    assert!(first.node.is_some() && first.resource_names_subscribe.is_empty());
    assert!(first.initial_resource_versions.is_empty());

    let response = |nonce: &str, added: &[(&str, &str)], removed: &[&str]| DeltaDiscoveryResponse {
        type_url: Kind::Cluster.type_url().into(),
        nonce: nonce.into(),
        resources: added
            .iter()
            .map(|(name, version)| DeltaResource {
                name: name.to_string(),
                version: version.to_string(),
                resource: Some(cluster(name)),
                ..DeltaResource::default()
            })
            .collect(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryResponse::default()
    };
    end.send(response("a", &[("one", "1"), ("two", "1")], &[]))
        .await;
    let ack = end.next().await;
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("a", None));
    end.send(response("b", &[("one", "2"), ("bad", "2")], &["two"]))
        .await;
    let nack = end.next().await;
    assert_eq!(nack.error_detail.unwrap().message, "cluster bad: is bad");

    mesh.sink
        .wanted
        .send_modify(|wanted| wanted.routes = set(&["r", "s"]));
    assert_eq!(end.next().await.resource_names_subscribe, ["r", "s"]);
    mesh.sink
        .wanted
        .send_modify(|wanted| wanted.routes = set(&["s", "t"]));
    let change = end.next().await;
    assert_eq!(
        (
            change.resource_names_subscribe,
            change.resource_names_unsubscribe
        ),
        (vec!["t".to_owned()], vec!["r".to_owned()])
    );

    drop(end);
    let mut end = mesh.delta.recv().await.unwrap();
    let again = end.next().await;
    assert_eq!(
        again.initial_resource_versions,
        [("one".to_owned(), "2".to_owned())].into()
    );
    assert_eq!(end.next().await.resource_names_subscribe, ["s", "t"]);
}

#[test]
fn secrets_are_asked_for_by_source() {
    let mut session = Session::new(&[Kind::Secret], Source::Grpc("sds".into()), Node::default());
    let mut wanted = Wanted {
        clusters: true,
        secrets: BTreeMap::from([(Source::Ads, set(&["a"]))]),
        ..Wanted::default()
    };
    assert!(session.sync(&wanted).is_empty());
    wanted
        .secrets
        .insert(Source::Grpc("sds".into()), set(&["b"]));
    let requests = session.sync(&wanted);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].resource_names, ["b"]);
    assert!(session.sync(&wanted).is_empty());
}
