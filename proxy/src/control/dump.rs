//! What is configured, in the JSON of Envoy's `/config_dump`, without secrets.

use std::time::SystemTime;

use base64::{Engine, prelude::BASE64_STANDARD};
use envoy_types::pb::google::protobuf::Any;
use lateen_protocols::json as proto_json;
use serde_json::{Map, Value, json};

use super::{Control, Failure, Item, Kind, Listener, State};
use crate::{format::pem, secret::Source};
use std::sync::Arc;

/// What to show; empty means all but endpoints.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only this repeated field, such as `dynamic_listeners`.
    pub resource: Option<String>,
    /// Only resources whose name matches.
    pub name: Option<regex::Regex>,
    /// Endpoints too.
    pub include_eds: bool,
}

impl Control {
    /// `/config_dump`. `bootstrap` is put in front.
    pub fn dump(&self, bootstrap: Value, selection: &Selection) -> Value {
        let state = self.state();
        let mut configs = vec![
            bootstrap,
            clusters(self, &state),
            listeners(&state),
            routes(&state),
        ];
        configs.push(secrets(self, &state));
        if selection.include_eds {
            configs.push(endpoints(&state));
        }
        drop(state);
        for config in &mut configs {
            redact(config);
        }
        match &selection.resource {
            None => {
                if let Some(name) = &selection.name {
                    for list in configs
                        .iter_mut()
                        .filter_map(Value::as_object_mut)
                        .flat_map(Map::values_mut)
                    {
                        retain_named(list, name);
                    }
                }
                json!({ "configs": configs })
            }
            Some(field) => {
                let mut list = configs
                    .iter_mut()
                    .filter_map(Value::as_object_mut)
                    .find_map(|config| config.remove(field))
                    .unwrap_or(Value::Array(Vec::new()));
                if let Some(name) = &selection.name {
                    retain_named(&mut list, name);
                }
                json!({ "configs": list })
            }
        }
    }

    /// Name, address and listener of everything that serves.
    pub fn active_listeners(&self) -> Vec<(String, Arc<Listener>)> {
        let state = self.state();
        let active = state.listeners.iter();
        active
            .filter_map(|(name, l)| Some((name.clone(), l.active.as_ref()?.1.clone())))
            .collect()
    }

    /// Whether a cluster came from the control plane.
    pub fn is_added_via_api(&self, cluster: &str) -> bool {
        self.state()
            .clusters
            .get(cluster)
            .is_some_and(|item| !item.fixed)
    }
}

/// A message inside another, with its `@type`; one that does not decode is shown as bytes.
pub fn any(any: &Any) -> Value {
    let known = proto_json::pool()
        .get_message_by_name(any.type_url.rsplit('/').next().unwrap_or_default())
        .and_then(|descriptor| {
            prost_reflect::DynamicMessage::decode(descriptor, any.value.as_slice()).ok()
        })
        .and_then(|message| {
            let options = prost_reflect::SerializeOptions::new()
                .use_proto_field_name(true)
                .skip_default_fields(true)
                .stringify_64_bit_integers(false);
            message
                .serialize_with_options(serde_json::value::Serializer, &options)
                .ok()
        });
    let mut object = match known {
        Some(Value::Object(object)) => object,
        Some(other) => Map::from_iter([("value".to_owned(), other)]),
        None => Map::from_iter([(
            "value".to_owned(),
            BASE64_STANDARD.encode(&any.value).into(),
        )]),
    };
    let mut typed = Map::from_iter([("@type".to_owned(), Value::from(any.type_url.clone()))]);
    typed.append(&mut object);
    Value::Object(typed)
}

/// RFC 3339, as protobuf's Timestamp in JSON.
pub fn time(at: SystemTime) -> String {
    chrono::DateTime::<chrono::Utc>::from(at).to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

fn envelope(kind: &str) -> Map<String, Value> {
    Map::from_iter([(
        "@type".to_owned(),
        format!("type.googleapis.com/envoy.admin.v3.{kind}").into(),
    )])
}

fn put(object: &mut Map<String, Value>, field: &str, list: Vec<Value>) {
    if !list.is_empty() {
        object.insert(field.to_owned(), list.into());
    }
}

fn item(field: &str, item: &Item, failure: Option<&Failure>) -> Value {
    let mut object = Map::new();
    if !item.version.is_empty() {
        object.insert("version_info".into(), item.version.clone().into());
    }
    object.insert(field.into(), any(&item.body));
    object.insert("last_updated".into(), time(item.updated).into());
    if let Some(failure) = failure {
        object.insert("error_state".into(), error(failure));
    }
    Value::Object(object)
}

fn error(failure: &Failure) -> Value {
    json!({
        "failed_configuration": any(&failure.body),
        "last_update_attempt": time(failure.at),
        "details": failure.reason,
        "version_info": failure.version,
    })
}

fn clusters(control: &Control, state: &State) -> Value {
    let mut object = envelope("ClustersConfigDump");
    let version = state
        .versions
        .get(&Kind::Cluster)
        .cloned()
        .unwrap_or_default();
    object.insert("version_info".into(), version.into());
    let (mut fixed, mut active, mut warming) = (Vec::new(), Vec::new(), Vec::new());
    for (name, cluster) in &state.clusters {
        let failure = state.failures.get(&(Kind::Cluster, name.clone()));
        let shown = item("cluster", cluster, failure);
        match (cluster.fixed, control.shared.clusters.is_warm(name)) {
            (true, _) => fixed.push(shown),
            (false, true) => active.push(shown),
            (false, false) => warming.push(shown),
        }
    }
    put(&mut object, "static_clusters", fixed);
    put(&mut object, "dynamic_active_clusters", active);
    put(&mut object, "dynamic_warming_clusters", warming);
    Value::Object(object)
}

fn listeners(state: &State) -> Value {
    let mut object = envelope("ListenersConfigDump");
    let version = state
        .versions
        .get(&Kind::Listener)
        .cloned()
        .unwrap_or_default();
    object.insert("version_info".into(), version.into());
    let (mut fixed, mut dynamic) = (Vec::new(), Vec::new());
    for (name, listener) in &state.listeners {
        let newest = listener.active.as_ref().or(listener.warming.as_ref());
        if let Some((newest, _)) = newest.filter(|(newest, _)| newest.fixed) {
            fixed.push(item("listener", newest, None));
            continue;
        }
        let mut shown = Map::from_iter([("name".to_owned(), Value::from(name.clone()))]);
        for (field, part) in [
            ("active_state", &listener.active),
            ("warming_state", &listener.warming),
        ] {
            if let Some((part, _)) = part {
                shown.insert(field.into(), item("listener", part, None));
            }
        }
        if let Some(failure) = state.failures.get(&(Kind::Listener, name.clone())) {
            shown.insert("error_state".into(), error(failure));
        }
        if shown.len() > 1 {
            dynamic.push(Value::Object(shown));
        }
    }
    put(&mut object, "static_listeners", fixed);
    put(&mut object, "dynamic_listeners", dynamic);
    Value::Object(object)
}

fn routes(state: &State) -> Value {
    let mut object = envelope("RoutesConfigDump");
    let shown = state.routes.iter().map(|(name, route)| {
        item(
            "route_config",
            route,
            state.failures.get(&(Kind::Route, name.clone())),
        )
    });
    put(&mut object, "dynamic_route_configs", shown.collect());
    Value::Object(object)
}

fn endpoints(state: &State) -> Value {
    let mut object = envelope("EndpointsConfigDump");
    let shown = state.endpoints.iter().map(|(name, endpoints)| {
        item(
            "endpoint_config",
            endpoints,
            state.failures.get(&(Kind::Endpoint, name.clone())),
        )
    });
    put(&mut object, "dynamic_endpoint_configs", shown.collect());
    Value::Object(object)
}

/// Names, sources and validity only: material is never in a dump.
fn secrets(control: &Control, state: &State) -> Value {
    let mut object = envelope("SecretsConfigDump");
    let (mut fixed, mut active, mut warming) = (Vec::new(), Vec::new(), Vec::new());
    for slot in control.shared.secrets.wanted() {
        let key = (slot.source().clone(), slot.name().to_string());
        let known = state.secrets.get(&key);
        let mut secret = json!({
            "@type": Kind::Secret.type_url(),
            "name": &**slot.name(),
        });
        if let Some(certificate) = slot.certificate() {
            let chain = certificate
                .key
                .cert
                .iter()
                .map(|der| BASE64_STANDARD.encode(pem(der)));
            secret["tls_certificate"] = json!({
                "certificate_chain": {"inline_bytes": chain.collect::<String>()},
                "private_key": {"inline_string": "[redacted]"},
            });
        }
        if let Some(trust) = slot.trust() {
            let roots: String = trust.authorities.iter().map(|der| pem(der)).collect();
            secret["validation_context"] = json!({
                "trusted_ca": {"inline_bytes": BASE64_STANDARD.encode(roots)},
            });
        }
        let mut shown = json!({
            "name": &**slot.name(),
            "version_info": known.map(|item| item.version.clone()).unwrap_or_default(),
            "secret": secret,
        });
        if let Some(item) = known {
            shown["last_updated"] = time(item.updated).into();
        }
        match (slot.source(), slot.is_ready()) {
            (Source::Static, true) => fixed.push(shown),
            (_, true) => active.push(shown),
            (_, false) => warming.push(shown),
        }
    }
    put(&mut object, "static_secrets", fixed);
    put(&mut object, "dynamic_active_secrets", active);
    put(&mut object, "dynamic_warming_secrets", warming);
    Value::Object(object)
}

/// Fields whose value is a secret, wherever they stand.
const SENSITIVE: [&str; 7] = [
    "private_key",
    "password",
    "pkcs12",
    "session_ticket_keys",
    "generic_secret",
    "hmac_secret",
    "token_secret",
];

/// Replaces the contents of sensitive fields; file names stay, they tell nothing.
pub fn redact(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (field, value) in object.iter_mut() {
                if SENSITIVE.contains(&field.as_str()) {
                    blank(value);
                } else {
                    redact(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(redact),
        _ => {}
    }
}

fn blank(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (field, value) in object.iter_mut() {
                if field != "filename" && field != "@type" && field != "name" {
                    blank(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(blank),
        Value::String(text) => *text = "[redacted]".into(),
        _ => {}
    }
}

fn retain_named(list: &mut Value, name: &regex::Regex) {
    const HOLDERS: [&str; 6] = [
        "cluster",
        "listener",
        "route_config",
        "endpoint_config",
        "secret",
        "active_state",
    ];
    let Value::Array(list) = list else { return };
    list.retain(|entry| {
        let inner = HOLDERS.iter().filter_map(|holder| entry.get(holder));
        inner
            .chain([entry])
            .filter_map(|value| value.get("name").or(value.get("cluster_name")))
            .filter_map(Value::as_str)
            .any(|found| name.is_match(found))
    });
}

/// The bootstrap as its section of the dump.
pub fn bootstrap(encoded: &[u8], read: SystemTime) -> Value {
    let mut object = envelope("BootstrapConfigDump");
    let body = Any {
        type_url: "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap".into(),
        value: encoded.to_vec(),
    };
    let mut shown = any(&body);
    if let Some(shown) = shown.as_object_mut() {
        shown.remove("@type");
    }
    object.insert("bootstrap".into(), shown);
    object.insert("last_updated".into(), time(read).into());
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_blanked_wherever_they_stand() {
        let mut value = json!({
            "a": [{"private_key": {"inline_string": "k", "filename": "f"}, "name": "n"}],
            "generic_secret": {"secret": {"inline_bytes": "eA=="}},
        });
        redact(&mut value);
        let want = json!({
            "a": [{"private_key": {"inline_string": "[redacted]", "filename": "f"}, "name": "n"}],
            "generic_secret": {"secret": {"inline_bytes": "[redacted]"}},
        });
        assert_eq!(value, want);
    }

    #[test]
    fn an_unknown_type_is_shown_as_bytes() {
        let unknown = Any {
            type_url: "type.googleapis.com/un.Known".into(),
            value: vec![1],
        };
        assert_eq!(
            any(&unknown),
            json!({"@type": "type.googleapis.com/un.Known", "value": "AQ=="})
        );
    }

    #[test]
    fn lists_are_filtered_by_name() {
        let mut list = json!([{"cluster": {"name": "a"}}, {"name": "b"}, {"endpoint_config": {"cluster_name": "ab"}}]);
        retain_named(&mut list, &regex::Regex::new("^a").unwrap());
        assert_eq!(list.as_array().unwrap().len(), 2);
    }
}
