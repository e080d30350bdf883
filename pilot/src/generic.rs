//! Configuration objects for those who read them as they are (Mixer, tools): type URL
//! `GROUP/VERSION/KIND`, body `istio.mcp.v1alpha1.Resource`, whose own body is the spec as a
//! `google.protobuf.Struct`. The workloads are among them, as `lateen.io/v1/Workload`.
//!
//! Only Istio's groups: Kubernetes' own objects, Secrets above all, are not handed on.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lateen_config::{ORIGIN, Object};
use lateen_protocols::istio::mcp::v1alpha1::{Metadata, Resource};
use prost::Message;
use prost_types::value::Kind as ValueKind;
use prost_types::{Any, ListValue, Struct, Value};
use serde_json::json;

use crate::encode::{Catalog, Encoder, Kind};
use crate::model::{Snapshot, Workload};

/// Type URL of the workload view.
pub const WORKLOAD: &str = "lateen.io/v1/Workload";

/// Type URL of the body of each.
const STRUCT: &str = "type.googleapis.com/google.protobuf.Struct";

/// All kinds that have objects.
#[must_use]
pub fn catalogs(snapshot: &Snapshot, encoder: &Encoder) -> BTreeMap<Kind, Arc<Catalog>> {
    let mut all: BTreeMap<Kind, Catalog> = BTreeMap::new();
    for object in snapshot.objects() {
        let group = &*object.key.group;
        if !group.ends_with(".istio.io") {
            continue;
        }
        let name = format!("{}/{}", object.key.namespace, object.key.name);
        let url =
            |version: &str| Kind::Generic(format!("{group}/{version}/{}", object.key.kind).into());
        let encoded = encoder.encode_plain(&url("*"), &name, &resource(&name, object));
        for version in served_versions(group)
            .iter()
            .copied()
            .chain([object.version.as_str()])
        {
            all.entry(url(version))
                .or_default()
                .insert(encoded.name.clone(), encoded.clone());
        }
    }
    let workloads = Kind::Generic(WORKLOAD.into());
    let catalog = all.entry(workloads.clone()).or_default();
    for workload in snapshot.workloads() {
        let name = format!("{}/{}", workload.namespace, workload.name);
        let encoded = encoder.encode_plain(&workloads, &name, &workload_resource(&name, workload));
        catalog.insert(encoded.name.clone(), encoded);
    }
    all.into_iter()
        .map(|(kind, catalog)| (kind, Arc::new(catalog)))
        .collect()
}

/// Versions under which any object of a group may be asked for.
fn served_versions(group: &str) -> &'static [&'static str] {
    match group {
        "networking.istio.io" => &["v1", "v1beta1", "v1alpha3"],
        "security.istio.io" => &["v1", "v1beta1"],
        "telemetry.istio.io" => &["v1", "v1alpha1"],
        _ => &[],
    }
}

fn resource(name: &str, object: &Object) -> Resource {
    Resource {
        metadata: Some(Metadata {
            name: name.to_owned(),
            labels: into_map(&object.labels),
            annotations: object
                .annotations
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()))
                // Whoever finds fault with it can say where it is written.
                .chain([(ORIGIN.to_owned(), object.origin.to_text())])
                .collect(),
            ..Metadata::default()
        }),
        body: Some(pack(&object.raw)),
    }
}

fn workload_resource(name: &str, workload: &Workload) -> Resource {
    let containers: Vec<_> = workload
        .containers
        .iter()
        .map(|container| {
            let ports: Vec<_> = container.ports.iter().map(|(_, number)| *number).collect();
            json!({ "name": container.name, "ports": ports })
        })
        .collect();
    let spec = json!({
        "uid": workload.uid,
        "ip": workload.address,
        "name": workload.name,
        "namespace": workload.namespace,
        "labels": *workload.labels,
        "serviceAccount": workload.service_account,
        "workloadName": workload.workload_name,
        "workloadNamespace": workload.namespace,
        "owner": workload.owner,
        "services": workload.services.iter().map(|host| &**host).collect::<Vec<_>>(),
        "containers": containers,
    });
    Resource {
        metadata: Some(Metadata {
            name: name.to_owned(),
            labels: into_map(&workload.labels),
            ..Metadata::default()
        }),
        body: Some(pack(&spec)),
    }
}

fn into_map<M: FromIterator<(String, String)>>(labels: &BTreeMap<String, String>) -> M {
    labels
        .iter()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// An object as a packed Struct; anything else (a kind without spec) as an empty one.
fn pack(spec: &serde_json::Value) -> Any {
    let body = match value(spec).kind {
        Some(ValueKind::StructValue(body)) => body,
        _ => Struct::default(),
    };
    Any {
        type_url: STRUCT.to_owned(),
        value: body.encode_to_vec(),
    }
}

fn value(json: &serde_json::Value) -> Value {
    let kind = match json {
        serde_json::Value::Null => ValueKind::NullValue(0),
        serde_json::Value::Bool(flag) => ValueKind::BoolValue(*flag),
        serde_json::Value::Number(number) => {
            ValueKind::NumberValue(number.as_f64().unwrap_or_default())
        }
        serde_json::Value::String(text) => ValueKind::StringValue(text.clone()),
        serde_json::Value::Array(items) => ValueKind::ListValue(ListValue {
            values: items.iter().map(value).collect(),
        }),
        serde_json::Value::Object(fields) => ValueKind::StructValue(Struct {
            fields: fields
                .iter()
                .map(|(key, field)| (key.clone(), value(field)))
                .collect(),
        }),
    };
    Value { kind: Some(kind) }
}

/// The generation in which each object last changed, given those of the snapshot before.
#[must_use]
pub fn object_generations(
    before: Option<(&Snapshot, &ObjectGenerations)>,
    now: &Snapshot,
) -> ObjectGenerations {
    let old: HashMap<&lateen_config::Key, &Arc<Object>> = before
        .iter()
        .flat_map(|(snapshot, _)| snapshot.objects())
        .map(|object| (&object.key, object))
        .collect();
    now.objects()
        .iter()
        .map(|object| {
            let unchanged = old
                .get(&object.key)
                .is_some_and(|old| Arc::ptr_eq(old, object) || old.same_content(object));
            let generation = before
                .filter(|_| unchanged)
                .and_then(|(_, generations)| generations.get(&object.key).copied())
                .unwrap_or(now.generation);
            (object.key.clone(), generation)
        })
        .collect()
}

/// Generation of the last change, by object.
pub type ObjectGenerations = BTreeMap<lateen_config::Key, u64>;
