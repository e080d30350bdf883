//! Objects without what nobody reads: a cluster's pods are many, and managed fields are most of each.

use serde_json::{Map, Value, json};

use crate::resource::Resource;

/// `kubectl apply` keeps a whole copy here.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Label of an EndpointSlice with the name of its service.
const SLICE_SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Names of certificates, keys and authorities in a Secret, as gateways know them.
const CERTIFICATES: [&str; 2] = ["tls.crt", "cert"];
const KEYS: [&str; 2] = ["tls.key", "key"];
const AUTHORITIES: [&str; 2] = ["ca.crt", "cacert"];

/// An object as it is kept.
#[derive(Debug, PartialEq)]
pub(crate) struct Reduced {
    /// `NAMESPACE/NAME`.
    pub(crate) name: String,
    /// What the parser gets to see; none if it is of no use to us.
    pub(crate) documents: Vec<Value>,
    /// Of a custom kind's object, for who writes its status.
    pub(crate) state: Option<ObjectState>,
}

/// What the API server says of an object beside what its author says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ObjectState {
    /// Counts the changes of its spec.
    pub(crate) generation: i64,
    /// Counts all changes.
    pub(crate) version: String,
    /// Its status.
    pub(crate) status: Value,
}

/// `NAMESPACE/NAME` of an object.
pub(crate) fn name(object: &Value) -> Option<String> {
    let metadata = object.get("metadata")?;
    let name = metadata.get("name")?.as_str()?;
    let namespace = metadata
        .get("namespace")
        .and_then(Value::as_str)
        .unwrap_or_default();
    Some(format!("{namespace}/{name}"))
}

/// Keeps what is read. `None`: no name, so not an object.
pub(crate) fn reduce(resource: &Resource, mut object: Value) -> Option<Reduced> {
    let name = name(&object)?;
    let api_version = resource.api_version();
    let state = resource.custom.then(|| state(&mut object));
    let metadata = object.get_mut("metadata").map_or(Value::Null, metadata);
    let document = |parts: &[(&str, Value)]| {
        let mut map = Map::new();
        map.insert("apiVersion".into(), Value::String(api_version.clone()));
        map.insert("kind".into(), Value::String(resource.kind.clone()));
        map.insert("metadata".into(), metadata.clone());
        for (name, value) in parts.iter().filter(|(_, value)| !value.is_null()) {
            map.insert((*name).to_owned(), value.clone());
        }
        Value::Object(map)
    };
    let mut take = |name: &str| object.get_mut(name).map_or(Value::Null, Value::take);
    let documents = match (resource.group.as_str(), resource.kind.as_str()) {
        ("", "Node" | "Namespace") => vec![document(&[])],
        ("", "Pod") => {
            let spec = pod_spec(&mut take("spec"));
            let status = pod_status(&mut take("status"));
            vec![document(&[("spec", spec), ("status", status)])]
        }
        ("", "ConfigMap") => vec![document(&[("data", take("data"))])],
        ("", "Secret") => match secret_data(take("data"), &take("type")) {
            Some(data) => vec![document(&[("data", data)])],
            None => Vec::new(),
        },
        ("discovery.k8s.io", "EndpointSlice") => vec![document(&[
            ("endpoints", take("endpoints")),
            ("ports", take("ports")),
        ])],
        ("", "Endpoints") => slices(&metadata, &take("subsets")),
        // Schemas are hundreds of kilobytes.
        ("apiextensions.k8s.io", _) => {
            let mut spec = pick(&mut take("spec"), &["group", "names", "versions"]);
            if let Some(Value::Array(versions)) = spec.get_mut("versions") {
                for version in versions {
                    *version = pick(version, &["name", "served"]);
                }
            }
            let status = pick(&mut take("status"), &["conditions"]);
            vec![document(&[("spec", spec), ("status", status)])]
        }
        // Whatever else is at the top level is for the parser to judge.
        _ => {
            let mut parts: Vec<(&str, Value)> = Vec::new();
            if let Value::Object(map) = &object {
                parts.extend(
                    map.iter()
                        .filter(|(name, _)| {
                            !matches!(name.as_str(), "apiVersion" | "kind" | "metadata" | "status")
                        })
                        .map(|(name, value)| (name.as_str(), value.clone())),
                );
            }
            vec![document(&parts)]
        }
    };
    Some(Reduced {
        name,
        documents,
        state,
    })
}

fn state(object: &mut Value) -> ObjectState {
    let metadata = |name: &str| object.get("metadata").and_then(|all| all.get(name));
    ObjectState {
        generation: metadata("generation")
            .and_then(Value::as_i64)
            .unwrap_or_default(),
        version: metadata("resourceVersion")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        status: object.get_mut("status").map_or(Value::Null, Value::take),
    }
}

fn metadata(written: &mut Value) -> Value {
    let mut kept = pick(
        written,
        &[
            "name",
            "namespace",
            "labels",
            "annotations",
            "creationTimestamp",
            "ownerReferences",
        ],
    );
    if let Some(Value::Object(annotations)) = kept.get_mut("annotations") {
        annotations.remove(LAST_APPLIED);
    }
    kept
}

fn pick(from: &mut Value, names: &[&str]) -> Value {
    let mut kept = Map::new();
    for name in names {
        if let Some(value) = from.get_mut(*name) {
            kept.insert((*name).to_owned(), value.take());
        }
    }
    Value::Object(kept)
}

fn pod_spec(spec: &mut Value) -> Value {
    let mut kept = pick(
        spec,
        &[
            "serviceAccountName",
            "serviceAccount",
            "nodeName",
            "hostNetwork",
            "containers",
        ],
    );
    if let Some(Value::Array(containers)) = kept.get_mut("containers") {
        for container in containers {
            *container = pick(container, &["name", "ports"]);
        }
    }
    kept
}

fn pod_status(status: &mut Value) -> Value {
    let mut kept = pick(status, &["podIP", "podIPs", "phase", "conditions"]);
    if let Some(Value::Array(conditions)) = kept.get_mut("conditions") {
        conditions
            .retain(|condition| condition.get("type").and_then(Value::as_str) == Some("Ready"));
        for condition in conditions {
            *condition = pick(condition, &["type", "status"]);
        }
    }
    kept
}

/// The data of a Secret that is a certificate's or an authority's. A password under the name `key` is none.
fn secret_data(mut data: Value, of_type: &Value) -> Option<Value> {
    let has = |names: &[&str]| names.iter().any(|name| data.get(name).is_some());
    let certificate = has(&CERTIFICATES) && has(&KEYS);
    let useful = certificate || has(&AUTHORITIES) || of_type.as_str() == Some("kubernetes.io/tls");
    if !useful {
        return None;
    }
    let mut names = vec!["ca.crt", "cacert", "ca.crl"];
    if certificate || of_type.as_str() == Some("kubernetes.io/tls") {
        names.extend(CERTIFICATES);
        names.extend(KEYS);
    }
    Some(pick(&mut data, &names))
}

/// Endpoints as the EndpointSlices that newer clusters would have: one a subset, for a slice has one list of ports.
/// Without subsets there is still a slice: that nobody answers is known, too.
fn slices(metadata: &Value, subsets: &Value) -> Vec<Value> {
    let name = metadata
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let none = Vec::new();
    let subsets = subsets.as_array().unwrap_or(&none);
    let slice = |index: usize, subset: &Value| {
        let endpoints: Vec<Value> = [("addresses", true), ("notReadyAddresses", false)]
            .into_iter()
            .flat_map(|(list, ready)| {
                let addresses = subset.get(list).and_then(Value::as_array);
                addresses.into_iter().flatten().map(move |address| {
                    json!({
                        "addresses": [address.get("ip")],
                        "conditions": {"ready": ready},
                        "nodeName": address.get("nodeName"),
                    })
                })
            })
            .collect();
        let mut slice_metadata = metadata.clone();
        slice_metadata["name"] = json!(format!("{name}-{index}"));
        slice_metadata["labels"] = json!({SLICE_SERVICE_LABEL: name});
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": slice_metadata,
            "endpoints": endpoints,
            "ports": subset.get("ports"),
        })
    };
    if subsets.is_empty() {
        return vec![slice(0, &Value::Null)];
    }
    subsets
        .iter()
        .enumerate()
        .map(|(index, subset)| slice(index, subset))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(group: &str, kind: &str) -> Resource {
        Resource {
            group: group.into(),
            version: "v1".into(),
            kind: kind.into(),
            plural: String::new(),
            namespace: None,
            fields: None,
            custom: false,
        }
    }

    #[test]
    fn a_pod_keeps_what_is_read() {
        let pod = json!({
            "metadata": {
                "name": "a", "namespace": "n", "labels": {"app": "a"}, "uid": "1", "managedFields": [{}],
                "annotations": {LAST_APPLIED: "{}", "x": "y"},
            },
            "spec": {
                "nodeName": "m", "volumes": [{}],
                "containers": [{"name": "c", "image": "i", "env": [{}], "ports": [{"containerPort": 80}]}],
            },
            "status": {
                "podIP": "10.0.0.1", "phase": "Running", "containerStatuses": [{}],
                "conditions": [{"type": "Ready", "status": "True", "reason": "x"}, {"type": "Initialized", "status": "True"}],
            },
        });
        let reduced = reduce(&resource("", "Pod"), pod).unwrap();
        assert_eq!(reduced.name, "n/a");
        assert_eq!(
            reduced.documents,
            [json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "a", "namespace": "n", "labels": {"app": "a"}, "annotations": {"x": "y"}},
                "spec": {"nodeName": "m", "containers": [{"name": "c", "ports": [{"containerPort": 80}]}]},
                "status": {"podIP": "10.0.0.1", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            })]
        );
    }

    #[test]
    fn of_secrets_only_certificates_are_kept() {
        let keep = |of_type: &str, data: Value| {
            let secret =
                json!({"metadata": {"name": "s", "namespace": "n"}, "type": of_type, "data": data});
            let reduced = reduce(&resource("", "Secret"), secret).unwrap();
            reduced.documents.first().map(|kept| kept["data"].clone())
        };
        assert_eq!(keep("Opaque", json!({"key": "a", "password": "b"})), None);
        assert_eq!(
            keep("Opaque", json!({"cert": "c", "key": "k", "password": "b"})),
            Some(json!({"cert": "c", "key": "k"}))
        );
        assert_eq!(
            keep("Opaque", json!({"cacert": "c", "key": "a password"})),
            Some(json!({"cacert": "c"}))
        );
        // A broken one must be heard of.
        assert_eq!(
            keep("kubernetes.io/tls", json!({"tls.crt": "c"})),
            Some(json!({"tls.crt": "c"}))
        );
    }

    #[test]
    fn endpoints_become_slices() {
        let endpoints = json!({
            "metadata": {"name": "reviews", "namespace": "n", "labels": {"app": "x"}},
            "subsets": [
                {
                    "addresses": [{"ip": "10.0.0.1", "nodeName": "m"}],
                    "notReadyAddresses": [{"ip": "10.0.0.2"}],
                    "ports": [{"name": "http", "port": 9080}],
                },
                {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"name": "http", "port": 9081}]},
            ],
        });
        let reduced = reduce(&resource("", "Endpoints"), endpoints).unwrap();
        assert_eq!(reduced.documents.len(), 2);
        assert_eq!(
            reduced.documents[0],
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": "reviews-0", "namespace": "n", "labels": {SLICE_SERVICE_LABEL: "reviews"}},
                "endpoints": [
                    {"addresses": ["10.0.0.1"], "conditions": {"ready": true}, "nodeName": "m"},
                    {"addresses": ["10.0.0.2"], "conditions": {"ready": false}, "nodeName": null},
                ],
                "ports": [{"name": "http", "port": 9080}],
            })
        );
        let empty = json!({"metadata": {"name": "reviews", "namespace": "n"}});
        let reduced = reduce(&resource("", "Endpoints"), empty).unwrap();
        assert_eq!(reduced.documents[0]["endpoints"], json!([]));
    }
}
