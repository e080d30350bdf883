//! Sidecars, played by a client that keeps Envoy's rules and checks Pilot's: nothing it is given may
//! point at what it has not got.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::protobuf::{Any, Struct, Value, value};
use envoy_types::pb::google::rpc::Status as RpcStatus;
use pilot::encode::{Kind, Resource};
use prost::Message;
use tokio::task::JoinHandle;

use crate::world::{Client, SOON, World, get};

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: { name: reviews, namespace: default }
spec: { selector: { app: reviews }, ports: [{ name: http, port: 9080 }] }
---
";

fn pod(version: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{ name: reviews-{version}, namespace: default, labels: {{ app: reviews, version: {version} }} }}
spec: {{ serviceAccountName: reviews, containers: [{{ name: app, ports: [{{ containerPort: 9080 }}] }}] }}
status: {{ podIP: {ip}, phase: Running }}
---
"
    )
}

fn subsets(names: &[&str]) -> String {
    let subsets: Vec<String> = names
        .iter()
        .map(|name| format!("{{ name: {name}, labels: {{ version: {name} }} }}"))
        .collect();
    format!(
        "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: reviews, namespace: default }}
spec: {{ host: reviews, subsets: [{}] }}
---
",
        subsets.join(", ")
    )
}

fn route(subset: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: reviews, namespace: default }}
spec: {{ hosts: [reviews], http: [{{ route: [{{ destination: {{ host: reviews, subset: {subset} }} }}] }}] }}
---
"
    )
}

fn mesh(subset_names: &[&str], to: &str) -> String {
    [
        SERVICE.to_owned(),
        pod("v1", "127.1.0.1"),
        pod("v2", "127.1.0.2"),
        subsets(subset_names),
        route(to),
    ]
    .concat()
}

fn sidecar() -> Node {
    let text = |text: &str| Value {
        kind: Some(value::Kind::StringValue(text.into())),
    };
    let metadata = [
        ("NAMESPACE", text("default")),
        ("INTERCEPTION_MODE", text("NONE")),
        ("OUTBOUND_BIND", text("127.1.1.9")),
        ("HTTP_PROXY_PORT", text("15002")),
    ];
    Node {
        id: "sidecar~127.1.0.9~client.default~default.svc.cluster.local".into(),
        metadata: Some(Struct {
            fields: metadata
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect(),
        }),
        ..Node::default()
    }
}

/// What the sidecar has, and what it was given in which order.
#[derive(Debug, Default)]
struct Proxy {
    has: BTreeMap<Kind, BTreeMap<String, Any>>,
    subscribed: BTreeMap<Kind, BTreeSet<String>>,
    received: Vec<(Kind, usize)>,
    refuse: Option<Kind>,
}

fn refers<M: Resource + Default>(any: &Any) -> Vec<String> {
    let message = M::decode(any.value.as_slice()).unwrap();
    let refers = message.refers();
    refers
        .next
        .iter()
        .chain(&refers.clusters)
        .map(ToString::to_string)
        .collect()
}

fn name(kind: &Kind, any: &Any) -> String {
    let bytes = any.value.as_slice();
    match kind {
        Kind::Cluster => Cluster::decode(bytes).unwrap().name,
        Kind::Endpoint => ClusterLoadAssignment::decode(bytes).unwrap().cluster_name,
        Kind::Listener => Listener::decode(bytes).unwrap().name,
        Kind::Route => RouteConfiguration::decode(bytes).unwrap().name,
        other => panic!("{other:?} was not asked for"),
    }
}

impl Proxy {
    /// Takes what came. Says the reason if it refuses.
    fn take(
        &mut self,
        kind: &Kind,
        set: Vec<Any>,
        removed: &[String],
        whole: bool,
    ) -> Option<String> {
        self.received.push((kind.clone(), set.len()));
        if self.refuse.as_ref() == Some(kind) {
            return Some("not today".into());
        }
        let all = self.has.entry(kind.clone()).or_default();
        if whole {
            all.clear();
        }
        all.extend(set.into_iter().map(|any| (name(kind, &any), any)));
        removed.iter().for_each(|name| drop(all.remove(name)));
        self.check();
        None
    }

    /// Every cluster that a route names is there, with its endpoints.
    fn check(&self) {
        let of = |kind: &Kind| self.has.get(kind).cloned().unwrap_or_default();
        let (clusters, endpoints) = (of(&Kind::Cluster), of(&Kind::Endpoint));
        for (route, any) in of(&Kind::Route) {
            for cluster in refers::<RouteConfiguration>(&any) {
                let found = clusters
                    .get(&cluster)
                    .unwrap_or_else(|| panic!("{route} leads to {cluster}, which is not there"));
                for name in refers::<Cluster>(found) {
                    assert!(
                        endpoints.contains_key(&name),
                        "{route} leads to {cluster}, which has no endpoints"
                    );
                }
            }
        }
    }

    /// Names it asks for: of endpoints by its clusters, of routes by its listeners.
    fn wants(&self, kind: &Kind) -> BTreeSet<String> {
        let of = |kind: &Kind| {
            self.has
                .get(kind)
                .cloned()
                .unwrap_or_default()
                .into_values()
        };
        match kind {
            Kind::Endpoint => of(&Kind::Cluster)
                .flat_map(|any| refers::<Cluster>(&any))
                .collect(),
            Kind::Route => of(&Kind::Listener)
                .flat_map(|any| {
                    Listener::decode(any.value.as_slice())
                        .unwrap()
                        .refers()
                        .next
                })
                .map(|name| name.to_string())
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// Subscriptions that changed: kind, new names, names no longer wanted.
    fn changed(&mut self) -> Vec<(Kind, BTreeSet<String>, BTreeSet<String>)> {
        [Kind::Endpoint, Kind::Route]
            .into_iter()
            .filter_map(|kind| {
                let wants = self.wants(&kind);
                let old = self
                    .subscribed
                    .insert(kind.clone(), wants.clone())
                    .unwrap_or_default();
                (wants != old).then(|| {
                    if let Some(all) = self.has.get_mut(&kind) {
                        all.retain(|name, _| wants.contains(name));
                    }
                    (
                        kind,
                        wants.difference(&old).cloned().collect(),
                        old.difference(&wants).cloned().collect(),
                    )
                })
            })
            .collect()
    }
}

/// A sidecar that runs until it is dropped or something is wrong.
struct Running {
    proxy: Arc<Mutex<Proxy>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    fn received(&self) -> Vec<(Kind, usize)> {
        std::mem::take(&mut self.proxy.lock().unwrap().received)
    }

    /// Where the one route to reviews leads.
    fn destinations(&self) -> BTreeSet<String> {
        let proxy = self.proxy.lock().unwrap();
        proxy.has[&Kind::Route]
            .values()
            .flat_map(refers::<RouteConfiguration>)
            .filter(|cluster| cluster.contains("reviews"))
            .collect()
    }

    async fn delta(world: &World) -> Self {
        let client = world.delta().await;
        let proxy = Arc::new(Mutex::new(Proxy::default()));
        let task = tokio::spawn(run_delta(client, proxy.clone()));
        Self { proxy, task }
    }

    async fn sotw(world: &World) -> Self {
        let client = world.sotw().await;
        let proxy = Arc::new(Mutex::new(Proxy::default()));
        let task = tokio::spawn(run_sotw(client, proxy.clone()));
        Self { proxy, task }
    }

    /// Waits until the proxy is connected and a generation is live on it; one that failed says why.
    async fn live_at(&mut self, world: &World, generation: u64) {
        let ledger = world.pilot.discovery.ledger();
        let mut changes = ledger.subscribe();
        let live = async {
            while ledger.connections().is_empty() || world.live() < generation {
                changes.changed().await.unwrap();
            }
        };
        tokio::select! {
            done = tokio::time::timeout(SOON, live) => {
                done.unwrap_or_else(|_| panic!("{generation} is not live: {:?}", ledger.syncz(false)));
            }
            ended = &mut self.task => panic!("the proxy stopped: {ended:?}"),
        }
    }
}

fn refusal(reason: Option<String>) -> Option<RpcStatus> {
    reason.map(|message| RpcStatus {
        code: 3,
        message,
        ..RpcStatus::default()
    })
}

async fn run_delta(
    mut client: Client<DeltaDiscoveryRequest, DeltaDiscoveryResponse>,
    proxy: Arc<Mutex<Proxy>>,
) {
    for kind in [Kind::Cluster, Kind::Listener] {
        let node = (kind == Kind::Cluster).then(sidecar);
        client
            .ask(DeltaDiscoveryRequest {
                node,
                type_url: kind.type_url().into(),
                ..DeltaDiscoveryRequest::default()
            })
            .await;
    }
    loop {
        let Ok(Some(response)) = client.answers.message().await else {
            return;
        };
        let kind = Kind::of_type_url(&response.type_url).unwrap();
        let set = response
            .resources
            .into_iter()
            .filter_map(|resource| resource.resource)
            .collect();
        let (reason, changed) = {
            let mut proxy = proxy.lock().unwrap();
            (
                proxy.take(&kind, set, &response.removed_resources, false),
                proxy.changed(),
            )
        };
        client
            .ask(DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                error_detail: refusal(reason),
                ..DeltaDiscoveryRequest::default()
            })
            .await;
        for (kind, new, gone) in changed {
            client
                .ask(DeltaDiscoveryRequest {
                    type_url: kind.type_url().into(),
                    resource_names_subscribe: new.into_iter().collect(),
                    resource_names_unsubscribe: gone.into_iter().collect(),
                    ..DeltaDiscoveryRequest::default()
                })
                .await;
        }
    }
}

async fn run_sotw(
    mut client: Client<DiscoveryRequest, DiscoveryResponse>,
    proxy: Arc<Mutex<Proxy>>,
) {
    let mut nonces: BTreeMap<Kind, String> = BTreeMap::new();
    for kind in [Kind::Cluster, Kind::Listener] {
        client
            .ask(DiscoveryRequest {
                node: Some(sidecar()),
                type_url: kind.type_url().into(),
                ..DiscoveryRequest::default()
            })
            .await;
    }
    loop {
        let Ok(Some(response)) = client.answers.message().await else {
            return;
        };
        let kind = Kind::of_type_url(&response.type_url).unwrap();
        nonces.insert(kind.clone(), response.nonce.clone());
        let (reason, changed) = {
            let mut proxy = proxy.lock().unwrap();
            (
                proxy.take(&kind, response.resources, &[], kind.is_wildcard()),
                proxy.changed(),
            )
        };
        let ask = |kind: &Kind, reason: Option<String>| DiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names: proxy
                .lock()
                .unwrap()
                .subscribed
                .get(kind)
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            response_nonce: nonces.get(kind).cloned().unwrap_or_default(),
            error_detail: refusal(reason),
            ..DiscoveryRequest::default()
        };
        client.ask(ask(&kind, reason)).await;
        for (changed, ..) in changed {
            client.ask(ask(&changed, None)).await;
        }
    }
}

async fn flip(world: &World, mut proxy: Running) {
    proxy.live_at(world, 1).await;
    assert_eq!(proxy.destinations().len(), 1, "{:?}", proxy.destinations());
    assert!(
        proxy
            .destinations()
            .iter()
            .all(|cluster| cluster.contains("|v1|"))
    );

    // Back and forth, the subsets coming and going with the routes: the proxy itself checks each step.
    for round in 0..4 {
        let (subset, subsets) = if round % 2 == 0 {
            ("v2", ["v2"])
        } else {
            ("v1", ["v1"])
        };
        let generation = world.apply(&mesh(&subsets, subset)).await;
        proxy.live_at(world, generation).await;
        assert!(
            proxy
                .destinations()
                .iter()
                .all(|cluster| cluster.contains(&format!("|{subset}|")))
        );
    }
    proxy.received();

    // An endpoint comes: endpoints, and nothing else, are sent.
    let more = mesh(&["v1"], "v1") + &pod("v3", "127.1.0.3");
    let generation = world.apply(&more).await;
    proxy.live_at(world, generation).await;
    let received = proxy.received();
    assert!(
        received.iter().all(|(kind, _)| *kind == Kind::Endpoint),
        "{received:?}"
    );
    assert_eq!(received.len(), 1, "{received:?}");

    // The same configuration again: live without a word.
    let generation = world.apply(&more).await;
    proxy.live_at(world, generation).await;
    assert_eq!(proxy.received(), []);
    let (status, dump) = get(
        world.pilot.http,
        "/debug/config_dump?proxyID=client.default",
    )
    .await;
    assert!(status == 200 && dump.contains("reviews"), "{dump}");
}

#[tokio::test]
async fn flipping_subsets_never_leads_a_delta_proxy_nowhere() {
    let world = World::new(&mesh(&["v1"], "v1")).await;
    let proxy = Running::delta(&world).await;
    flip(&world, proxy).await;
}

#[tokio::test]
async fn flipping_subsets_never_leads_a_state_of_the_world_proxy_nowhere() {
    let world = World::new(&mesh(&["v1"], "v1")).await;
    let proxy = Running::sotw(&world).await;
    flip(&world, proxy).await;
}

#[tokio::test]
async fn a_refused_cluster_leaves_the_routes_where_they_are() {
    let world = World::new(&mesh(&["v1"], "v1")).await;
    let mut proxy = Running::delta(&world).await;
    proxy.live_at(&world, 1).await;
    proxy.proxy.lock().unwrap().refuse = Some(Kind::Cluster);
    world.apply(&mesh(&["v2"], "v2")).await;
    let refused = async {
        let mut ledger = world.pilot.discovery.ledger().subscribe();
        while world.pilot.discovery.ledger().refusals().is_empty() {
            ledger.changed().await.unwrap();
        }
    };
    tokio::time::timeout(SOON, refused).await.unwrap();
    assert!(
        proxy
            .destinations()
            .iter()
            .all(|cluster| cluster.contains("|v1|"))
    );
    assert_eq!(world.live(), 1);

    // Mended: what was refused is not sent again, something else is.
    proxy.proxy.lock().unwrap().refuse = None;
    let generation = world.apply(&mesh(&["v1", "v3"], "v3")).await;
    proxy.live_at(&world, generation).await;
    assert!(
        proxy
            .destinations()
            .iter()
            .all(|cluster| cluster.contains("|v3|"))
    );
}
