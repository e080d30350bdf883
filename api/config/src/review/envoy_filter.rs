//! EnvoyFilter: whether a patch is something that Envoy's API knows, and fits what it is applied to.

use lateen_protocols::json;
use prost_reflect::prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{At, Check, text};
use crate::envoy_filter::ApplyTo;

const HTTP_CONNECTION_MANAGER: &str = "envoy.filters.network.http_connection_manager";

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    check.workload_selector(&spec.get("workloadSelector"));
    if spec.has("workloadSelector") && spec.get("targetRefs").count() > 0 {
        check.error(
            spec,
            "only one of targetRefs or workloadSelector may be set",
        );
    }
    for target in spec.get("targetRefs").items() {
        check.target(&target);
    }
    for name in ["workloadLabels", "filters"] {
        if spec.has(name) {
            check.warn(
                &spec.get(name),
                "gone since Istio 1.5, without effect; use workloadSelector and configPatches",
            );
        }
    }
    for patch in spec.get("configPatches").items() {
        config_patch(check, &patch);
    }
}

fn config_patch(check: &mut Check<'_>, at: &At<'_>) {
    let apply_to = at.str("applyTo");
    if matches!(apply_to, "" | "INVALID") {
        check.error(&at.get("applyTo"), "missing; it is required");
        return;
    }
    let patch = at.get("patch");
    if !patch.is_set() {
        check.error(&patch, "missing; it is required");
        return;
    }
    let operation = patch.str("operation");
    if matches!(operation, "" | "INVALID") {
        check.error(&patch.get("operation"), "missing; it is required");
        return;
    }
    if operation != "REMOVE" && !patch.has("value") {
        check.error(&patch.get("value"), format!("required for {operation}"));
        return;
    }
    let version = at.get("match").get("proxy").get("proxyVersion");
    if let Some(fault) = Some(version.text())
        .filter(|text| !text.is_empty())
        .and_then(text::uncompilable)
    {
        check.error(&version, fault);
    }
    let before = check.findings.len();
    fits(check, apply_to, &at.get("match"));
    if check
        .findings
        .iter()
        .skip(before)
        .any(super::Finding::is_error)
    {
        return;
    }
    if patch.has("value") {
        value(check, apply_to, &patch.get("value"));
    }
}

/// Whether the match is about the same class of object as the patch.
fn fits(check: &mut Check<'_>, apply_to: &str, at: &At<'_>) {
    let wanted = match apply_to {
        "LISTENER" | "FILTER_CHAIN" | "NETWORK_FILTER" | "HTTP_FILTER" | "LISTENER_FILTER" => {
            "listener"
        }
        "ROUTE_CONFIGURATION" | "VIRTUAL_HOST" | "HTTP_ROUTE" => "routeConfiguration",
        "CLUSTER" => "cluster",
        _ => return,
    };
    let given = ["listener", "routeConfiguration", "cluster"]
        .into_iter()
        .find(|name| at.has(name));
    if let Some(given) = given.filter(|given| *given != wanted) {
        check.error(
            &at.get(given),
            format!("{apply_to} is matched by {wanted}, not {given}"),
        );
        return;
    }
    let filter = at.get("listener").get("filterChain").get("filter");
    if !filter.is_set() || wanted != "listener" {
        return;
    }
    if matches!(apply_to, "LISTENER" | "FILTER_CHAIN") {
        check.warn(&filter, format!("has no effect with {apply_to}"));
    }
    let sub = filter.get("subFilter");
    if filter.str("name").is_empty() {
        check.error(
            &filter.get("name"),
            "missing; a filter is matched by its name",
        );
    } else if sub.is_set() {
        if apply_to != "HTTP_FILTER" {
            check.error(&sub, format!("is for HTTP_FILTER only, not {apply_to}"));
        } else if !matches!(
            filter.str("name"),
            HTTP_CONNECTION_MANAGER | "envoy.http_connection_manager"
        ) {
            check.error(&sub, format!("needs filter.name {HTTP_CONNECTION_MANAGER}"));
        } else if sub.str("name").is_empty() {
            check.error(&sub.get("name"), "missing; a filter is matched by its name");
        }
    }
    for name in [filter.get("name"), sub.get("name")] {
        let old = name
            .text()
            .strip_prefix("envoy.")
            .is_some_and(|rest| !rest.contains('.') && !rest.is_empty());
        if old {
            check.warn(
                &name,
                format!("{:?} is a name of old; use envoy.filters.…", name.text()),
            );
        }
    }
}

/// The message a patch's value is part of.
fn message(apply_to: &str) -> Option<&'static str> {
    ApplyTo::deserialize(Value::from(apply_to)).ok()?.message()
}

/// The value of a patch as that message, encoded; what is not wholly such a message is refused.
pub(crate) fn encode(message: &str, value: &Value) -> Result<Vec<u8>, String> {
    let pool = json::pool();
    let descriptor = pool
        .get_message_by_name(message)
        .ok_or_else(|| format!("{message} is not known to this version"))?;
    let mut walk = Walk {
        pool: &pool,
        unknown_types: Vec::new(),
    };
    let normal = walk.message(&descriptor, value, "", 0);
    if let Some((_, unknown)) = walk.unknown_types.first() {
        return Err(format!("{unknown:?} is not known to this version"));
    }
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(descriptor, &normal, &options)
        .map_err(|error| format!("is not wholly a {message}: {error}"))?;
    Ok(message.encode_to_vec())
}

/// Reads the value as Envoy would; unknown fields are warnings, for Envoy may be newer than we are.
fn value(check: &mut Check<'_>, apply_to: &str, at: &At<'_>) {
    let Some(name) = message(apply_to) else {
        return;
    };
    let pool = json::pool();
    let Some(descriptor) = pool.get_message_by_name(name) else {
        check.warn(
            at,
            format!("{name} is not known to this version; not looked at"),
        );
        return;
    };
    let mut walk = Walk {
        pool: &pool,
        unknown_types: Vec::new(),
    };
    let normal = walk.message(&descriptor, at.value, &at.path, 0);
    for (path, type_url) in &walk.unknown_types {
        let at = At::new(at.value, path);
        let name = type_url.rsplit('/').next().unwrap_or_default();
        if name.contains(".v2.") || name.contains(".v2alpha") {
            check.error(
                &at,
                format!("{name} is of Envoy's API v2, which is gone; use v3"),
            );
        } else if name.starts_with("envoy.") && !name.contains(".v3") {
            check.error(&at, format!("{name} is not a message of Envoy's API"));
        } else {
            check.warn(
                &at,
                format!("{name} is not known to this version; not looked at"),
            );
        }
    }
    if !walk.unknown_types.is_empty() {
        return;
    }
    let read = |strict: bool| {
        DynamicMessage::deserialize_with_options(
            descriptor.clone(),
            &normal,
            &DeserializeOptions::new().deny_unknown_fields(strict),
        )
    };
    match read(false) {
        Err(error) => check.error(at, format!("not a {name}: {error}")),
        Ok(_) => {
            if let Err(error) = read(true) {
                check.warn(at, format!("not wholly a {name}: {error}"));
            }
        }
    }
    let by_name = matches!(
        apply_to,
        "NETWORK_FILTER" | "HTTP_FILTER" | "LISTENER_FILTER" | "EXTENSION_CONFIG"
    );
    let typed = [
        "typed_config",
        "typedConfig",
        "config_discovery",
        "configDiscovery",
    ];
    if by_name && !typed.iter().any(|field| at.has(field)) {
        check.warn(
            at,
            format!(
                "{:?} has no typed_config; Envoy no longer finds filters by name",
                at.str("name")
            ),
        );
    }
}

/// Brings a value into the form that protobuf's JSON prescribes, and notes messages nobody knows.
struct Walk<'a> {
    pool: &'a DescriptorPool,
    unknown_types: Vec<(String, String)>,
}

/// A patch nested deeper than this is not walked further.
const DEPTH_LIMIT: usize = 48;

impl Walk<'_> {
    fn message(
        &mut self,
        descriptor: &MessageDescriptor,
        value: &Value,
        path: &str,
        depth: usize,
    ) -> Value {
        let Value::Object(fields) = value else {
            // `500ms` is a duration to Go, `0.5s` to protobuf.
            if descriptor.full_name() == "google.protobuf.Duration"
                && let Some(nanos) = value.as_str().and_then(text::duration)
            {
                let (sign, nanos) = (if nanos < 0 { "-" } else { "" }, nanos.unsigned_abs());
                return Value::String(format!(
                    "{sign}{}.{:09}s",
                    nanos / 1_000_000_000,
                    nanos % 1_000_000_000
                ));
            }
            return value.clone();
        };
        if depth > DEPTH_LIMIT {
            return value.clone();
        }
        let mut inner = None;
        if descriptor.full_name() == "google.protobuf.Any" {
            let type_url = fields
                .get("@type")
                .and_then(Value::as_str)
                .unwrap_or_default();
            inner = self
                .pool
                .get_message_by_name(type_url.rsplit('/').next().unwrap_or_default());
            if inner.is_none() {
                self.unknown_types
                    .push((format!("{path}.@type"), type_url.to_owned()));
                return value.clone();
            }
        }
        let descriptor = inner.as_ref().unwrap_or(descriptor);
        if descriptor.full_name().starts_with("google.protobuf.") {
            return value.clone();
        }
        let mut normal = Map::new();
        for (key, value) in fields {
            let field = descriptor
                .get_field_by_name(key)
                .or_else(|| descriptor.get_field_by_json_name(key));
            let path = format!("{path}.{key}");
            let value = match &field {
                Some(field) => self.field(field, value, &path, depth),
                None => value.clone(),
            };
            normal.insert(key.clone(), value);
        }
        Value::Object(normal)
    }

    fn field(&mut self, field: &FieldDescriptor, value: &Value, path: &str, depth: usize) -> Value {
        let Kind::Message(descriptor) = field.kind() else {
            return value.clone();
        };
        match value {
            Value::Array(all) if field.is_list() => all
                .iter()
                .enumerate()
                .map(|(index, value)| {
                    self.message(&descriptor, value, &format!("{path}[{index}]"), depth + 1)
                })
                .collect(),
            Value::Object(all) if field.is_map() => {
                let Kind::Message(entry) = descriptor.map_entry_value_field().kind() else {
                    return value.clone();
                };
                all.iter()
                    .map(|(key, value)| {
                        (
                            key.clone(),
                            self.message(&entry, value, &format!("{path}.{key}"), depth + 1),
                        )
                    })
                    .collect::<Map<_, _>>()
                    .into()
            }
            value => self.message(&descriptor, value, path, depth + 1),
        }
    }
}
