//! Probes: the kubelet has no certificate of the mesh, so under strict mutual TLS its checks of the application would
//! be refused. They are sent to the sidecar's own port instead, and the sidecar makes them.

use serde_json::{Map, Value, json};

use crate::InjectError;

/// The kinds of checks: field, and what the path at the sidecar ends with.
const PROBES: [(&str, &str, &str); 5] = [
    ("/readinessProbe", "app-health", "readyz"),
    ("/livenessProbe", "app-health", "livez"),
    ("/startupProbe", "app-health", "startupz"),
    ("/lifecycle/preStop", "app-lifecycle", "prestopz"),
    ("/lifecycle/postStart", "app-lifecycle", "poststartz"),
];

/// Points the checks of a container at `status_port`; adds the original ones to `probers` by their new path.
pub(crate) fn rewrite(
    container: &mut Value,
    status_port: u16,
    probers: &mut Map<String, Value>,
) -> Result<(), InjectError> {
    let name = container
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or("")
        .to_owned();
    let ports = container
        .get("ports")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    for (field, folder, end) in PROBES {
        let Some(probe) = container.pointer_mut(field).and_then(Value::as_object_mut) else {
            continue;
        };
        let Some(kind) = ["httpGet", "tcpSocket", "grpc"]
            .into_iter()
            .find(|k| probe.contains_key(*k))
        else {
            continue;
        };
        // A hook of the lifecycle only ever opens a connection, which the sidecar takes.
        if folder == "app-lifecycle" && kind != "httpGet" {
            continue;
        }
        let check = probe
            .get(kind)
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        // Somebody else's address is not the application's.
        if check
            .get("host")
            .is_some_and(|host| host.as_str() != Some(""))
        {
            continue;
        }
        let number =
            port_number(check.get("port"), &ports).map_err(|reason| InjectError::Probe {
                container: name.clone(),
                reason: format!("{}: {reason}", field.trim_start_matches('/')),
            })?;
        if number == status_port {
            continue;
        }
        let path = format!("/{folder}/{name}/{end}");
        let mut original = check.clone();
        original.insert("port".to_owned(), json!(number));
        let mut prober = Map::from_iter([(kind.to_owned(), Value::Object(original))]);
        if let Some(seconds) = probe.get("timeoutSeconds") {
            prober.insert("timeoutSeconds".to_owned(), seconds.clone());
        }
        probers.insert(path.clone(), Value::Object(prober));
        probe.remove(kind);
        // Headers are for the application, and the sidecar knows them.
        probe.insert(
            "httpGet".to_owned(),
            json!({"path": path, "port": status_port}),
        );
    }
    Ok(())
}

fn port_number(port: Option<&Value>, ports: &[Value]) -> Result<u16, String> {
    match port {
        Some(Value::Number(number)) => number
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .ok_or_else(|| format!("{number} is no port")),
        Some(Value::String(name)) => {
            if let Ok(number) = name.parse() {
                return Ok(number);
            }
            let named = ports
                .iter()
                .find(|port| port.get("name").and_then(Value::as_str) == Some(name));
            let number = named.and_then(|port| port.get("containerPort")?.as_u64());
            number
                .and_then(|number| u16::try_from(number).ok())
                .ok_or_else(|| format!("{name:?} is no name of a port of the container"))
        }
        _ => Err("has no port".to_owned()),
    }
}
