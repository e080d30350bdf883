//! The patches of an EnvoyFilter, as YAML, against all that a sidecar and a gateway get.
#![no_main]

use std::sync::{Arc, OnceLock};

use lateen_config::{ConfigSet, Object, parse_file, validate};
use lateen_protocols::envoy::envoy::config::core::v3 as core;
use lateen_protocols::json;
use libfuzzer_sys::fuzz_target;
use pilot::model::{Node, Snapshot};
use pilot::translate::translate;

const WORLD: &str = "
apiVersion: v1
kind: Service
metadata: { name: a, namespace: default }
spec: { selector: { app: a }, ports: [{ name: http, port: 80 }, { name: tcp, port: 81 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: a-1, namespace: default, labels: { app: a } }
spec: { containers: [{ name: a, ports: [{ containerPort: 80 }] }] }
status: { podIP: 10.0.0.1, phase: Running }
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: front, namespace: default }
spec: { selector: { app: a }, servers: [{ port: { number: 80, name: http, protocol: HTTP }, hosts: ['*'] }] }
";

const FILTER: &str = "
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: { name: x, namespace: default }
spec:
  configPatches:
";

fn world() -> &'static [Arc<Object>] {
    static WORLD_: OnceLock<Vec<Arc<Object>>> = OnceLock::new();
    WORLD_.get_or_init(|| {
        let (objects, problems) = parse_file("world.yaml", WORLD);
        assert_eq!(problems, []);
        objects.into_iter().map(Arc::new).collect()
    })
}

fn nodes() -> &'static [Node] {
    static NODES: OnceLock<Vec<Node>> = OnceLock::new();
    NODES.get_or_init(|| {
        ["sidecar", "router"]
            .iter()
            .map(|role| {
                let node: core::Node = json::from_yaml(&format!(
                    "{{ id: '{role}~10.0.0.1~a-1.default~default.svc.cluster.local', \
                     metadata: {{ NAMESPACE: default, LABELS: {{ app: a }}, ISTIO_VERSION: 1.30.3 }} }}"
                ))
                .expect("a node");
                Node::parse(Some(&node)).expect("a node")
            })
            .collect()
    })
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    // Items of the list of patches.
    let (objects, _) = parse_file("x.yaml", &format!("{FILTER}{text}"));
    let objects: Vec<Arc<Object>> = objects
        .into_iter()
        .filter(|object| validate(object).iter().all(|problem| !problem.is_error()))
        .map(Arc::new)
        .collect();
    if objects.is_empty() {
        return;
    }
    let snapshot = Snapshot::build(&ConfigSet {
        objects: world().iter().cloned().chain(objects).collect(),
        ..Default::default()
    });
    for node in nodes() {
        let resources = translate(&snapshot, node);
        // What is sent is found by its name, and can be read.
        for (name, listener) in &resources.listeners {
            assert_eq!(*name, listener.name);
            assert!(json::to_json(listener).is_ok());
        }
        for (name, cluster) in &resources.clusters {
            assert_eq!(*name, cluster.name);
            assert!(json::to_json(cluster).is_ok());
        }
        for (name, routes) in &resources.routes {
            assert_eq!(*name, routes.name);
            assert!(json::to_json(routes).is_ok());
        }
    }
});
