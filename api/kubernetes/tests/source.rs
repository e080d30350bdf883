//! A cluster as a source, against an API server in process.
#![cfg(test)]

use std::sync::Arc;
use std::time::Duration;

use lateen_config::{ConfigSet, Folder, Source, Spec, Store};
use lateen_kubernetes::testing::ApiServer;
use lateen_kubernetes::{ClusterArgs, Health, Kubernetes, KubernetesArgs};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What is awaited here takes milliseconds; after an outage up to the first waits between attempts.
const SOON: Duration = Duration::from_secs(20);

struct World {
    store: Arc<Store>,
    set: watch::Receiver<Arc<ConfigSet>>,
    registry: Registry,
    task: JoinHandle<()>,
    folder: TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    async fn new(server: ApiServer, others: &[Source]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(others.iter().copied().chain([Source::Kubernetes]));
        let args = KubernetesArgs {
            cluster: ClusterArgs {
                kubeconfig: Some(server.kubeconfig(folder.path())),
                ..ClusterArgs::default()
            },
            kube_namespace: "istio-system".into(),
            ..KubernetesArgs::default()
        };
        let mut registry = Registry::default();
        let health = Health::new(&mut registry);
        let source = Kubernetes::new(&args, store.clone(), health).await;
        Self {
            set: store.subscribe(),
            store,
            registry,
            task: tokio::spawn(source.unwrap().unwrap().run()),
            folder,
        }
    }

    /// Waits for a set of which this holds.
    async fn until(&mut self, what: impl Fn(&ConfigSet) -> bool) -> Arc<ConfigSet> {
        let found = timeout(SOON, self.set.wait_for(|set| what(set))).await;
        match found {
            Ok(set) => set.unwrap().clone(),
            Err(_) => panic!("{:#?}", self.store.current()),
        }
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    async fn until_metric(&self, line: &str) {
        self.until_metrics(|text| text.lines().any(|one| one == line))
            .await;
    }

    async fn until_metrics(&self, what: impl Fn(&str) -> bool) {
        let found = async {
            while !what(&self.metrics()) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(SOON, found).await.is_err() {
            panic!("{}", self.metrics());
        }
    }
}

fn definition(kind: &str, plural: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.networking.istio.io")},
        "spec": {
            "group": "networking.istio.io", "names": {"kind": kind, "plural": plural}, "scope": "Namespaced",
            "versions": [{"name": "v1", "served": true, "storage": true}],
        },
    })
}

fn entry(name: &str, host: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"hosts": [host], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "resolution": "DNS"},
    })
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}], "selector": {"app": name}},
        "status": {"loadBalancer": {}},
    })
}

fn secret(name: &str, of_type: &str, key: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "edge"}, "type": of_type,
        "data": {key: "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"},
    })
}

/// `KIND NAMESPACE/NAME` of all, sorted.
fn names(set: &ConfigSet) -> Vec<String> {
    let mut all: Vec<String> = set
        .objects
        .iter()
        .map(|object| object.key.to_string())
        .collect();
    all.sort();
    all
}

fn hosts(set: &ConfigSet) -> Vec<String> {
    set.objects
        .iter()
        .filter_map(|object| match &object.spec {
            Spec::ServiceEntry(entry) => entry.hosts.first().cloned(),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn what_is_there_and_what_changes_arrives() {
    let server = ApiServer::start().await;
    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    server.apply(service("cart"));
    server.apply(secret("front", "Opaque", "ca.crt"));
    server.apply(secret("password", "Opaque", "password"));
    server.apply(secret(
        "token",
        "kubernetes.io/service-account-token",
        "ca.crt",
    ));
    server.apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": "trustDomain: shop.example"},
    }));
    server.apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "elsewhere"},
        "data": {"mesh": "trustDomain: not.ours"},
    }));
    server.apply(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ended", "namespace": "shop"},
        "status": {"phase": "Succeeded", "podIP": "10.0.0.9"},
    }));
    let mut world = World::new(server.clone(), &[]).await;
    let set = world.until(|set| set.generation > 0).await;
    let wanted = [
        "ConfigMap istio-system/istio",
        "Secret edge/front",
        "Service shop/cart",
        "ServiceEntry shop/bank",
    ];
    assert_eq!(names(&set), wanted);
    assert_eq!(set.problems, []);
    assert_eq!(set.generation, 1, "all at once");
    world.until_metric("pilot_k8s_connected 1").await;

    server.apply(entry("bank", "bank.test"));
    let set = world.until(|set| hosts(set) == ["bank.test"]).await;
    assert_eq!(names(&set), wanted);
    server.delete("", "services", "shop", "cart");
    world.until(|set| set.objects.len() == 3).await;
    assert!(
        !server
            .requests()
            .iter()
            .any(|request| request.starts_with("/api/v1/secrets")
                && !request.contains("fieldSelector=type")),
        "only Secrets of types that gateways need are asked for"
    );
}

#[tokio::test]
async fn nothing_is_published_before_every_kind_has_been_listed() {
    let server = ApiServer::start().await;
    server.apply(service("cart"));
    server.refuse(Some(("/secrets", 403)));
    let mut world = World::new(server.clone(), &[]).await;
    // Two lists fail, each again and again.
    let errors = |text: &str| -> u32 {
        let count = text
            .lines()
            .find_map(|line| line.strip_prefix("pilot_k8s_errors_total{type=\"Secret\"} "));
        count.map_or(0, |count| count.parse().unwrap())
    };
    world.until_metrics(|text| errors(text) >= 3).await;
    assert_eq!(world.store.current().generation, 0);
    assert!(world.metrics().contains("pilot_k8s_connected 0"));
    server.refuse(None);
    let set = world.until(|set| set.generation > 0).await;
    assert_eq!(names(&set), ["Service shop/cart"]);
}

#[tokio::test]
async fn a_refused_object_keeps_its_last_good_version() {
    let server = ApiServer::start().await;
    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    let mut world = World::new(server.clone(), &[]).await;
    world.until(|set| hosts(set) == ["bank.example"]).await;

    server.apply(entry("bank", "*"));
    let set = world.until(|set| !set.problems.is_empty()).await;
    assert_eq!(hosts(&set), ["bank.example"]);
    let text = set.problems[0].to_string();
    assert!(
        text.starts_with("kubernetes: ServiceEntry shop/bank: spec.hosts"),
        "{text}"
    );

    let mut unknown = entry("bank", "bank.test");
    unknown["spec"]["hostz"] = json!([]);
    server.apply(unknown);
    let set = world
        .until(|set| set.problems.iter().any(|p| p.to_string().contains("hostz")))
        .await;
    assert_eq!(hosts(&set), ["bank.example"]);

    server.apply(entry("bank", "bank.test"));
    let set = world.until(|set| set.problems.is_empty()).await;
    assert_eq!(hosts(&set), ["bank.test"]);
    // A good one that was refused and then goes is gone.
    server.apply(entry("bank", "*"));
    world.until(|set| !set.problems.is_empty()).await;
    server.delete("networking.istio.io", "serviceentries", "shop", "bank");
    world
        .until(|set| set.problems.is_empty() && hosts(set).is_empty())
        .await;
}

#[tokio::test]
async fn while_the_server_is_away_nothing_changes_and_then_what_was_missed_arrives() {
    let server = ApiServer::start().await;
    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    server.apply(service("cart"));
    let mut world = World::new(server.clone(), &[]).await;
    let before = world.until(|set| set.generation > 0).await;
    world.until_metric("pilot_k8s_connected 1").await;

    server.stop();
    world.until_metric("pilot_k8s_connected 0").await;
    assert!(Arc::ptr_eq(&before, &world.store.current()));
    server.apply(entry("bank", "bank.test"));
    server.delete("", "services", "shop", "cart");
    let lists = world.metrics().matches("pilot_k8s_lists_total").count();
    server.restart().await;
    let set = world.until(|set| set.generation > before.generation).await;
    let set = if hosts(&set) == ["bank.test"] && set.objects.len() == 1 {
        set
    } else {
        world
            .until(|set| hosts(set) == ["bank.test"] && set.objects.len() == 1)
            .await
    };
    assert_eq!(set.problems, []);
    world.until_metric("pilot_k8s_connected 1").await;
    // From where it was: nothing was listed twice.
    assert_eq!(
        lists,
        world.metrics().matches("pilot_k8s_lists_total").count()
    );
    assert!(
        world
            .metrics()
            .contains("pilot_k8s_lists_total{type=\"Service\"} 1")
    );
}

#[tokio::test]
async fn who_was_away_too_long_lists_again_and_a_failed_list_deletes_nothing() {
    let server = ApiServer::start().await;
    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    server.apply(entry("post", "post.example"));
    let mut world = World::new(server.clone(), &[]).await;
    let before = world.until(|set| set.generation > 0).await;
    world.until_metric("pilot_k8s_connected 1").await;

    server.stop();
    world.until_metric("pilot_k8s_connected 0").await;
    server.delete("networking.istio.io", "serviceentries", "shop", "post");
    server.apply(entry("bank", "bank.test"));
    server.compact();
    server.refuse(Some(("/serviceentries", 500)));
    server.restart().await;
    let refused = async {
        let asked =
            |request: &String| request.contains("/serviceentries?") && request.contains("limit=");
        while server
            .requests()
            .iter()
            .filter(|request| asked(request))
            .count()
            < 3
        {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, refused).await.unwrap();
    assert_eq!(hosts(&world.store.current()), hosts(&before));
    server.refuse(None);
    let set = world.until(|set| hosts(set) == ["bank.test"]).await;
    assert_eq!(set.objects.len(), 1);
    world.until_metric("pilot_k8s_connected 1").await;
}

#[tokio::test]
async fn kinds_come_and_go_with_their_definitions() {
    let server = ApiServer::start().await;
    server.apply(service("cart"));
    let mut world = World::new(server.clone(), &[]).await;
    world.until(|set| set.generation > 0).await;
    let errors = |world: &World| world.metrics().contains("pilot_k8s_errors_total{");
    assert!(!errors(&world), "what is not defined is not asked for");

    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    world.until(|set| hosts(set) == ["bank.example"]).await;
    assert!(!errors(&world));
    server.apply(json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "names": {"kind": "Widget", "plural": "widgets"}, "versions": [{"name": "v1", "served": true}]},
    }));
    server.delete(
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        "",
        "serviceentries.networking.istio.io",
    );
    let set = world.until(|set| hosts(set).is_empty()).await;
    assert_eq!(names(&set), ["Service shop/cart"]);
    world.until_metric("pilot_k8s_connected 1").await;
    assert!(
        !server
            .requests()
            .iter()
            .any(|request| request.contains("widgets"))
    );
}

#[tokio::test]
async fn pages_are_put_together() {
    let server = ApiServer::start().await;
    for number in 0..1203 {
        server.apply(service(&format!("cart-{number}")));
    }
    let mut world = World::new(server.clone(), &[]).await;
    let set = world.until(|set| set.generation > 0).await;
    assert_eq!(set.objects.len(), 1203);
    let pages = server
        .requests()
        .iter()
        .filter(|request| request.starts_with("/api/v1/services?") && request.contains("limit=500"))
        .count();
    assert_eq!(pages, 3);
}

#[tokio::test]
async fn endpoints_are_read_where_there_are_no_slices() {
    let server = ApiServer::without(&["endpointslices", "ingresses"]).await;
    server.apply(json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "cart", "namespace": "shop"},
        "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "http", "port": 8080}]}],
    }));
    let mut world = World::new(server.clone(), &[]).await;
    let set = world.until(|set| set.generation > 0).await;
    assert_eq!(names(&set), ["EndpointSlice shop/cart-0"]);
    let Spec::EndpointSlice(slice) = &set.objects[0].spec else {
        panic!("{set:?}");
    };
    assert_eq!(slice.endpoints[0].addresses, ["10.0.0.1"]);
    assert_eq!(slice.ports[0].port, Some(8080));
}

#[tokio::test]
async fn a_folder_beside_the_cluster_wins() {
    let server = ApiServer::start().await;
    server.apply(definition("ServiceEntry", "serviceentries"));
    server.apply(entry("bank", "bank.example"));
    server.apply(entry("post", "post.example"));
    let mut world = World::new(server.clone(), &[Source::Folder]).await;
    world.until_metric("pilot_k8s_connected 1").await;
    assert_eq!(world.store.current().generation, 0, "one source is missing");

    let files = world.folder.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(
        files.join("bank.yaml"),
        entry("bank", "bank.test").to_string(),
    )
    .unwrap();
    Folder::open_in(&files, world.store.clone()).unwrap();
    let set = world.until(|set| set.objects.len() == 2).await;
    assert_eq!(hosts(&set), ["bank.test", "post.example"]);
    let text = set.problems[0].to_string();
    assert!(
        text.contains(
            "kubernetes: ServiceEntry shop/bank: metadata.name: already defined at bank.yaml:1"
        ),
        "{text}"
    );
}
