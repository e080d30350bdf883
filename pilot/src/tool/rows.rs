//! Rows: configuration, a proxy, and what is asked of it.
//!
//! Rows name hosts as Istio's own tests do: objects of Istio's kinds know no DNS domain there, so a short
//! host `a` in namespace `default` means `a.default`.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3::{
    VirtualHost, route::Action, route_action::ClusterSpecifier,
};
use lateen_config::{Object, parse_file};
use lateen_protocols::json::from_json;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::model::{Node, Snapshot};
use crate::translate::translate;

use super::walk::{Call, Outcome, Walk};

/// Address of a proxy whose row names none.
const PROXY_ADDRESS: &str = "1.1.1.1";

/// A row of `simulate`.
#[derive(Debug, Deserialize)]
pub(super) struct SimulationRow {
    name: String,
    proxy: Proxy,
    #[serde(default)]
    config: Vec<Value>,
    #[serde(default)]
    kube: Vec<Value>,
    #[serde(default)]
    calls: Vec<NamedCall>,
}

#[derive(Debug, Deserialize)]
struct NamedCall {
    #[serde(default)]
    name: String,
    call: Call,
}

/// A row of `routes`.
#[derive(Debug, Deserialize)]
pub(super) struct RouteRow {
    name: String,
    proxy: Proxy,
    #[serde(rename = "routeName")]
    route_name: String,
    #[serde(default)]
    config: Vec<Value>,
    #[serde(default)]
    kube: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Proxy {
    /// `sidecar` or `router`.
    #[serde(rename = "type")]
    role: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    ip: Option<String>,
    #[serde(default)]
    ips: Vec<String>,
    /// Further node metadata.
    #[serde(default)]
    metadata: serde_json::Map<String, Value>,
}

impl Proxy {
    fn node(&self) -> Result<Node, String> {
        let namespace = match self.namespace.as_str() {
            "" => "default",
            named => named,
        };
        let ips = match (&self.ip, self.ips.as_slice()) {
            (Some(ip), []) => ip.clone(),
            (None, []) => PROXY_ADDRESS.to_owned(),
            (_, all) => all.join(","),
        };
        let mut metadata = json!({
            "NAMESPACE": namespace,
            "LABELS": self.labels,
            "INSTANCE_IPS": ips,
        });
        if let Value::Object(fields) = &mut metadata {
            fields.extend(self.metadata.clone());
        }
        let node: core::Node = from_json(&json!({
            "id": format!("{}~{PROXY_ADDRESS}~proxy.{namespace}~{namespace}.svc.cluster.local", self.role),
            "metadata": metadata,
        }))
        .map_err(|error| error.to_string())?;
        Node::parse(Some(&node)).map_err(|error| error.to_string())
    }
}

impl SimulationRow {
    /// `{"name", "calls": [{"name", …}]}`; a row that is wrong has an `Error` instead of calls.
    pub(super) fn run(self) -> Value {
        let (node, snapshot, problems) = match world(&self.proxy, self.config, self.kube) {
            Ok(world) => world,
            Err(error) => return json!({"name": self.name, "Error": error}),
        };
        let resources = translate(&snapshot, &node);
        let walk = Walk::new(&resources);
        let calls: Vec<Value> = self
            .calls
            .into_iter()
            .map(|named| {
                let outcome: Outcome = walk.run(named.call);
                let mut fields = serde_json::Map::new();
                fields.insert("name".to_owned(), named.name.into());
                fields.extend(outcome.fields());
                Value::Object(fields)
            })
            .collect();
        with_problems(json!({"name": self.name, "calls": calls}), problems)
    }
}

impl RouteRow {
    /// `{"name", "vhost_clusters": {DOMAIN: [CLUSTER]}}`; null when there is no such route configuration.
    pub(super) fn run(self) -> Value {
        let (node, snapshot, problems) = match world(&self.proxy, self.config, self.kube) {
            Ok(world) => world,
            Err(error) => return json!({"name": self.name, "Error": error}),
        };
        let resources = translate(&snapshot, &node);
        let hosts = resources.routes.get(&self.route_name).map(|config| {
            config
                .virtual_hosts
                .iter()
                .flat_map(|host| {
                    let clusters = clusters(host);
                    host.domains
                        .iter()
                        .map(move |domain| (domain.clone(), json!(clusters)))
                })
                .collect::<serde_json::Map<String, Value>>()
        });
        with_problems(
            json!({"name": self.name, "vhost_clusters": hosts}),
            problems,
        )
    }
}

/// What was left out of a row's configuration, so that an answer without it is not taken for a whole one.
fn with_problems(mut answer: Value, problems: Vec<String>) -> Value {
    if let Value::Object(fields) = &mut answer
        && !problems.is_empty()
    {
        fields.insert("problems".to_owned(), json!(problems));
    }
    answer
}

/// Clusters that routes lead to, in order, each once.
fn clusters(host: &VirtualHost) -> Vec<&str> {
    let mut all: Vec<&str> = Vec::new();
    for route in &host.routes {
        let Some(Action::Route(action)) = &route.action else {
            continue;
        };
        let found = match &action.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) => vec![name.as_str()],
            Some(ClusterSpecifier::WeightedClusters(weighted)) => weighted
                .clusters
                .iter()
                .map(|cluster| cluster.name.as_str())
                .collect(),
            _ => Vec::new(),
        };
        for name in found {
            if !all.contains(&name) {
                all.push(name);
            }
        }
    }
    all
}

/// A row's node and snapshot, and what of its configuration could not be read.
fn world(
    proxy: &Proxy,
    config: Vec<Value>,
    kube: Vec<Value>,
) -> Result<(Node, Snapshot, Vec<String>), String> {
    let node = proxy.node()?;
    let mut text = String::new();
    for mut object in config {
        complete_hosts(&mut object);
        text.push_str(&format!("---\n{object}\n"));
    }
    for object in kube {
        text.push_str(&format!("---\n{object}\n"));
    }
    let (objects, problems): (Vec<Object>, _) = parse_file("row", &text);
    let problems = problems
        .iter()
        .filter(|problem| problem.is_error())
        .map(ToString::to_string)
        .collect();
    Ok((node, super::snapshot(objects), problems))
}

/// Completes short hosts with the object's namespace alone.
fn complete_hosts(object: &mut Value) {
    let namespace = match object["metadata"]["namespace"].as_str() {
        None | Some("") => "default".to_owned(),
        Some(named) => named.to_owned(),
    };
    let complete = |host: &mut Value| {
        if let Value::String(name) = host
            && !name.contains(['.', '*', '/', ':'])
        {
            name.push('.');
            name.push_str(&namespace);
        }
    };
    match object["kind"].as_str() {
        Some("VirtualService") => {
            if let Some(Value::Array(hosts)) = object.pointer_mut("/spec/hosts") {
                hosts.iter_mut().for_each(complete);
            }
            if let Some(spec) = object.get_mut("spec") {
                destinations(spec, &complete);
            }
        }
        Some("DestinationRule") => {
            if let Some(host) = object.pointer_mut("/spec/host") {
                complete(host);
            }
        }
        _ => {}
    }
}

/// The `host` of every `destination` and `mirror` below.
fn destinations(value: &mut Value, complete: &impl Fn(&mut Value)) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if matches!(name.as_str(), "destination" | "mirror")
                    && let Some(host) = field.get_mut("host")
                {
                    complete(host);
                }
                destinations(field, complete);
            }
        }
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| destinations(item, complete)),
        _ => {}
    }
}
