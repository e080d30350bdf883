//! A cluster as the source, and a sidecar that sees what becomes of it.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::{Node, address, socket_address};
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, lb_endpoint};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
};
use lateen_kubernetes::testing::ApiServer;
use lateen_kubernetes::{ClusterArgs, KubernetesArgs};
use lateen_service::shutdown::Drain;
use pilot::encode::Kind;
use pilot::server::{Config, Pilot};
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::world::{Client, SOON, config, delta, get};

const CLUSTER: &str = "outbound|80||cart.shop.svc.cluster.local";
const SUBSET: &str = "outbound|80|v1|cart.shop.svc.cluster.local";

struct Cluster {
    server: ApiServer,
    pilot: Pilot,
    _drain: Drain,
    _folder: TempDir,
}

impl Cluster {
    async fn new(server: ApiServer) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            kubernetes: KubernetesArgs {
                cluster: ClusterArgs {
                    kubeconfig: Some(server.kubeconfig(folder.path())),
                    ..ClusterArgs::default()
                },
                kube_namespace: "istio-system".into(),
                ..KubernetesArgs::default()
            },
            ..config()
        };
        let drain = Drain::new();
        let pilot = Pilot::start(&config, &drain).await.unwrap();
        Self {
            server,
            pilot,
            _drain: drain,
            _folder: folder,
        }
    }

    async fn until_ready(&self) {
        let ready = async {
            while get(self.pilot.http, "/healthz/ready").await.0 != 200 {
                sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        timeout(SOON, ready).await.unwrap();
    }

    async fn page(&self, path: &str) -> Value {
        let (status, body) = get(self.pilot.http, path).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// A client that follows the endpoints of two clusters.
struct Sidecar {
    client: Client<DeltaDiscoveryRequest, DeltaDiscoveryResponse>,
    /// By cluster: addresses.
    endpoints: BTreeMap<String, Vec<String>>,
    /// How often a cluster that had endpoints has lost all.
    emptied: usize,
}

impl Sidecar {
    async fn new(cluster: &Cluster) -> Self {
        let client = delta(cluster.pilot.grpc).await;
        client
            .ask(DeltaDiscoveryRequest {
                node: Some(Node {
                    id: "sidecar~10.0.9.9~client.shop~shop.svc.cluster.local".into(),
                    ..Node::default()
                }),
                type_url: Kind::Endpoint.type_url().into(),
                resource_names_subscribe: vec![CLUSTER.into(), SUBSET.into()],
                ..DeltaDiscoveryRequest::default()
            })
            .await;
        Self {
            client,
            endpoints: BTreeMap::new(),
            emptied: 0,
        }
    }

    /// Takes answers until a cluster has these endpoints.
    async fn until(&mut self, cluster: &str, wanted: &[&str]) {
        while self
            .endpoints
            .get(cluster)
            .is_none_or(|have| have != wanted)
        {
            let answer = timeout(SOON, self.client.answers.message()).await;
            let Ok(answer) = answer else {
                panic!("wanted {wanted:?}, have {:?}", self.endpoints);
            };
            self.take(answer.unwrap().unwrap()).await;
        }
    }

    async fn take(&mut self, answer: DeltaDiscoveryResponse) {
        for name in answer.removed_resources {
            self.take_one(name, Vec::new());
        }
        for resource in answer.resources {
            let any = resource.resource.unwrap();
            let load = ClusterLoadAssignment::decode(any.value.as_slice()).unwrap();
            let addresses = load
                .endpoints
                .iter()
                .flat_map(|locality| &locality.lb_endpoints)
                .map(|endpoint| match endpoint.host_identifier.clone() {
                    Some(lb_endpoint::HostIdentifier::Endpoint(endpoint)) => {
                        match endpoint.address.unwrap().address.unwrap() {
                            address::Address::SocketAddress(at) => match at.port_specifier {
                                Some(socket_address::PortSpecifier::PortValue(port)) => {
                                    format!("{}:{port}", at.address)
                                }
                                other => panic!("{other:?}"),
                            },
                            other => panic!("{other:?}"),
                        }
                    }
                    other => panic!("{other:?}"),
                })
                .collect();
            self.take_one(load.cluster_name, addresses);
        }
        self.client
            .ask(DeltaDiscoveryRequest {
                type_url: answer.type_url,
                response_nonce: answer.nonce,
                ..DeltaDiscoveryRequest::default()
            })
            .await;
    }
}

impl Sidecar {
    fn take_one(&mut self, cluster: String, addresses: Vec<String>) {
        let is_empty = addresses.is_empty();
        let before = self.endpoints.insert(cluster, addresses);
        self.emptied += usize::from(is_empty && before.is_some_and(|before| !before.is_empty()));
    }
}

fn slice(addresses: &[(&str, bool)]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|(ip, ready)| json!({"addresses": [ip], "conditions": {"ready": ready}}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "cart-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "cart"}},
        "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}

fn shop(server: &ApiServer) {
    server.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.7", "selector": {"app": "cart"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    }));
    server.apply(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cart-1", "namespace": "shop", "labels": {"app": "cart", "version": "v1"}},
        "spec": {"serviceAccountName": "cart", "containers": [{"name": "app", "ports": [{"containerPort": 8080}]}]},
        "status": {"podIP": "10.0.0.1", "phase": "Running"},
    }));
    server.apply(slice(&[("10.0.0.1", true)]));
}

fn destination_rules() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "destinationrules.networking.istio.io"},
        "spec": {
            "group": "networking.istio.io", "names": {"kind": "DestinationRule", "plural": "destinationrules"},
            "versions": [{"name": "v1beta1", "served": true}, {"name": "v1", "served": true}],
        },
    })
}

#[tokio::test]
async fn services_endpoints_and_rules_of_a_cluster_reach_a_sidecar() {
    let server = ApiServer::start().await;
    shop(&server);
    let cluster = Cluster::new(server).await;
    cluster.until_ready().await;
    let mut sidecar = Sidecar::new(&cluster).await;
    sidecar.until(CLUSTER, &["10.0.0.1:8080"]).await;

    // Of the two only the ready one.
    cluster
        .server
        .apply(slice(&[("10.0.0.2", false), ("10.0.0.3", true)]));
    sidecar.until(CLUSTER, &["10.0.0.3:8080"]).await;
    cluster
        .server
        .apply(slice(&[("10.0.0.1", true), ("10.0.0.3", true)]));
    sidecar
        .until(CLUSTER, &["10.0.0.1:8080", "10.0.0.3:8080"])
        .await;

    // A kind that was not defined when Pilot started.
    cluster.server.apply(destination_rules());
    cluster.server.apply(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"host": "cart", "subsets": [{"name": "v1", "labels": {"version": "v1"}}]},
    }));
    sidecar.until(SUBSET, &["10.0.0.1:8080"]).await;

    // A wrong one is named and changes nothing.
    let before = cluster.page("/debug/generation").await["generation"].as_u64();
    cluster.server.apply(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"host": "cart", "subsetz": []},
    }));
    let named = async {
        loop {
            let page = cluster.page("/debug/generation").await;
            if page["generation"].as_u64() > before {
                break page["problems"].to_string();
            }
        }
    };
    let problems = timeout(SOON, named).await.unwrap();
    assert!(
        problems.contains("kubernetes: DestinationRule shop/cart: spec.subsetz"),
        "{problems}"
    );
    let objects = cluster.page("/debug/generation?objects").await.to_string();
    assert!(objects.contains("DestinationRule"), "{objects}");

    cluster
        .server
        .delete("discovery.k8s.io", "endpointslices", "shop", "cart-x");
    // Without a slice, by the selector: the pod that is there.
    sidecar.until(CLUSTER, &["10.0.0.1:8080"]).await;
    cluster.server.delete("", "pods", "shop", "cart-1");
    sidecar.until(CLUSTER, &[]).await;
}

#[tokio::test]
async fn an_outage_of_the_api_server_reaches_no_sidecar() {
    let server = ApiServer::start().await;
    shop(&server);
    let cluster = Cluster::new(server).await;
    cluster.until_ready().await;
    let mut sidecar = Sidecar::new(&cluster).await;
    sidecar.until(CLUSTER, &["10.0.0.1:8080"]).await;
    let before = cluster.page("/debug/generation").await["generation"].clone();

    cluster.server.stop();
    let noticed = async {
        loop {
            let (_, metrics) = get(cluster.pilot.http, "/metrics").await;
            if metrics.contains("pilot_k8s_connected 0") {
                break;
            }
        }
    };
    timeout(SOON, noticed).await.unwrap();
    assert_eq!(
        get(cluster.pilot.http, "/healthz/ready").await.0,
        200,
        "what is known is still served"
    );
    // Everything is other when the server comes back, and too long ago to be told one by one.
    cluster.server.apply(slice(&[("10.0.0.3", true)]));
    cluster.server.compact();
    assert_eq!(
        cluster.page("/debug/generation").await["generation"],
        before
    );
    cluster.server.restart().await;
    sidecar.until(CLUSTER, &["10.0.0.3:8080"]).await;
    assert_eq!(sidecar.emptied, 0, "it was never told that nobody answers");
}

#[tokio::test]
async fn pilot_is_not_ready_and_serves_nothing_until_the_cluster_has_been_read() {
    let server = ApiServer::start().await;
    shop(&server);
    server.refuse(Some(("/endpointslices", 503)));
    let cluster = Cluster::new(server).await;
    let asked = async {
        let lists = |request: &String| request.contains("/endpointslices?");
        while cluster
            .server
            .requests()
            .iter()
            .filter(|r| lists(r))
            .count()
            < 3
        {
            sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, asked).await.unwrap();
    let (status, body) = get(cluster.pilot.http, "/healthz/ready").await;
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("configuration"), "{body}");
    assert!(cluster.pilot.discovery.served().is_none());
    cluster.server.refuse(None);
    cluster.until_ready().await;
    let mut sidecar = Sidecar::new(&cluster).await;
    sidecar.until(CLUSTER, &["10.0.0.1:8080"]).await;
}
