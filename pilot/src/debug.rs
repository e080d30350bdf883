//! The operator's view over HTTP: who is connected, what is live, what is wrong. Reads only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lateen_config::Severity;
use lateen_protocols::envoy::envoy::admin::v3 as admin;
use lateen_service::admin::{Admin, Query, Reply};
use prost::Message;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::encode::{Encoded, Kind};
use crate::model::{Endpoint, Snapshot};
use crate::serve::ledger::{Connection, ProxyStatus, dump};
use crate::serve::{Discovery, Served};

/// Longest a request may wait for a generation to become live; a client asks again.
const WAIT_LIMIT: Duration = Duration::from_secs(8);

/// Adds the pages to the operator's endpoint.
#[must_use]
pub fn routes(admin: Admin, discovery: &Arc<Discovery>) -> Admin {
    let page = |handler: fn(&Discovery, &Query) -> Reply| {
        let discovery = discovery.clone();
        move |query: Query| {
            let reply = handler(&discovery, &query);
            async move { reply }
        }
    };
    let waiting = discovery.clone();
    let admin = admin.route("/debug/generation", move |query| {
        let discovery = waiting.clone();
        async move { generation(&discovery, &query).await }
    });
    admin
        .route("/debug", page(|_, _| Reply::text(INDEX)))
        .route(
            "/debug/syncz",
            page(|discovery, query| json_reply(&discovery.ledger().syncz(query.has("resources")))),
        )
        .route("/debug/config_status", page(config_status))
        .route("/debug/registryz", page(registryz))
        .route("/debug/configz", page(configz))
        .route("/debug/push_status", page(push_status))
        .route("/debug/config_dump", page(config_dump))
}

const INDEX: &str = "\
/debug/generation      newest and live generation; ?wait=N waits until N is live, ?objects lists objects
/debug/syncz           what each client was sent and acknowledged; ?resources lists versions
/debug/config_status   generation of each object, and where it is live; ?kind= ?namespace= ?name=
/debug/registryz       services, endpoints, workloads
/debug/configz         configuration objects in use
/debug/push_status     conflicts, empty services, refusals, problems
/debug/config_dump     what a client was sent; ?proxyID=
/debug/injection       pods that should have a sidecar and have none
";

fn json_reply(value: &impl Serialize) -> Reply {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => Reply::json(body),
        Err(e) => Reply::status(http::StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
    }
}

fn unready() -> Reply {
    Reply::status(
        http::StatusCode::SERVICE_UNAVAILABLE,
        "no configuration has been read yet\n",
    )
}

/// Answers with the newest generation and the newest that is live; with `?wait=N`, not before generation N
/// is live or the wait is over.
async fn generation(discovery: &Discovery, query: &Query) -> Reply {
    if let Some(wanted) = query.get("wait") {
        let Ok(wanted) = wanted.parse::<u64>() else {
            return Reply::status(http::StatusCode::BAD_REQUEST, "wait must be a generation\n");
        };
        let deadline = Instant::now() + WAIT_LIMIT;
        let mut ledger = discovery.ledger().subscribe();
        let mut served = discovery.subscribe();
        while live(discovery) < wanted {
            let news = async {
                // Both are cancel-safe, and either is a reason to look again.
                tokio::select! {
                    changed = ledger.changed() => changed.is_ok(),
                    changed = served.changed() => changed.is_ok(),
                }
            };
            match timeout_at(deadline, news).await {
                Ok(true) => {}
                Ok(false) | Err(_) => break,
            }
        }
    }
    let Some(served) = discovery.served() else {
        return unready();
    };
    let current = served.snapshot.generation;
    let (readers, proxies): (Vec<_>, Vec<_>) = discovery
        .ledger()
        .syncz(false)
        .into_iter()
        .partition(|client| client.reader);
    let brief = |clients: Vec<ProxyStatus>| -> Vec<Value> {
        clients
            .iter()
            .map(|client| json!({ "proxy": client.proxy, "generation": client.generation, "live": client.live }))
            .collect()
    };
    json_reply(&json!({
        "generation": current,
        "live": discovery.ledger().live(current),
        "proxies": brief(proxies),
        "readers": brief(readers),
        "problems": problems(&served, Severity::Error),
        "warnings": problems(&served, Severity::Warning),
        "refusals": discovery.ledger().refusals(),
    }))
}

/// What is refused, or merely doubtful, in the sources: `FILE:LINE: ...`.
fn problems(served: &Served, severity: Severity) -> Vec<String> {
    served
        .problems
        .iter()
        .filter(|problem| problem.severity == severity)
        .map(ToString::to_string)
        .collect()
}

fn live(discovery: &Discovery) -> u64 {
    discovery.served().map_or(0, |served| {
        discovery.ledger().live(served.snapshot.generation)
    })
}

/// For each object (or the one asked for): the generation of its last change, whether that is live
/// everywhere, and the clients it is not live on yet.
fn config_status(discovery: &Discovery, query: &Query) -> Reply {
    let Some(served) = discovery.served() else {
        return unready();
    };
    let proxies = discovery.ledger().syncz(false);
    let wanted = |field: &str, value: &str| query.get(field).is_none_or(|wanted| wanted == value);
    let objects: Vec<Value> = served
        .object_generations
        .iter()
        .filter(|(key, _)| {
            wanted("kind", &key.kind)
                && wanted("namespace", &key.namespace)
                && wanted("name", &key.name)
        })
        .map(|(key, generation)| {
            let behind: Vec<&str> = proxies
                .iter()
                .filter(|proxy| proxy.live < *generation)
                .map(|proxy| proxy.proxy.as_str())
                .collect();
            json!({
                "kind": &*key.kind,
                "namespace": &*key.namespace,
                "name": &*key.name,
                "generation": generation,
                "live": behind.is_empty(),
                "behind": behind,
            })
        })
        .collect();
    json_reply(&objects)
}

fn registryz(discovery: &Discovery, _: &Query) -> Reply {
    let Some(served) = discovery.served() else {
        return unready();
    };
    let snapshot = &served.snapshot;
    let services: Vec<Value> = snapshot
        .services()
        .map(|service| {
            let ports: Vec<Value> = service
                .ports
                .iter()
                .map(|port| {
                    let endpoints: Vec<Value> = snapshot
                        .endpoints(&service.hostname, port.number)
                        .iter()
                        .map(|e| endpoint(e))
                        .collect();
                    json!({
                        "name": port.name,
                        "number": port.number,
                        "protocol": format!("{:?}", port.protocol),
                        "endpoints": endpoints,
                    })
                })
                .collect();
            json!({
                "hostname": &*service.hostname,
                "namespace": service.namespace,
                "registry": format!("{:?}", service.registry),
                "resolution": format!("{:?}", service.resolution),
                "external": service.external,
                "addresses": service.addresses,
                "ports": ports,
            })
        })
        .collect();
    let workloads: Vec<Value> = snapshot
        .workloads()
        .map(|workload| {
            json!({
                "uid": workload.uid,
                "address": workload.address,
                "workload": workload.workload_name,
                "serviceAccount": workload.service_account,
                "labels": *workload.labels,
                "ready": workload.ready,
                "mutualTls": format!("{:?}", workload.tls_mode),
                "services": workload.services.iter().map(|host| &**host).collect::<Vec<_>>(),
            })
        })
        .collect();
    json_reply(&json!({ "services": services, "workloads": workloads }))
}

fn endpoint(endpoint: &Endpoint) -> Value {
    json!({
        "address": endpoint.address,
        "port": endpoint.port,
        "workload": endpoint.workload_name,
        "identity": endpoint.spiffe_id,
        "mutualTls": format!("{:?}", endpoint.tls_mode),
        "labels": *endpoint.labels,
    })
}

fn configz(discovery: &Discovery, _: &Query) -> Reply {
    let Some(served) = discovery.served() else {
        return unready();
    };
    json_reply(&objects(&served.snapshot, &served))
}

/// Istio's objects only: Kubernetes' may hold what is not ours to show.
fn objects(snapshot: &Snapshot, served: &Served) -> Vec<Value> {
    snapshot
        .objects()
        .iter()
        .filter(|object| object.key.group.ends_with(".istio.io"))
        .map(|object| {
            json!({
                "kind": &*object.key.kind,
                "apiVersion": format!("{}/{}", object.key.group, object.version),
                "namespace": &*object.key.namespace,
                "name": &*object.key.name,
                "file": format!("{}:{}", object.origin.file, object.origin.line),
                "generation": served.object_generations.get(&object.key),
                "spec": *object.raw,
            })
        })
        .collect()
}

fn push_status(discovery: &Discovery, _: &Query) -> Reply {
    let Some(served) = discovery.served() else {
        return unready();
    };
    let left_out: BTreeMap<String, Vec<String>> = discovery
        .ledger()
        .connections()
        .iter()
        .map(|connection| (connection.node.id.clone(), connection.conflicts()))
        .filter(|(_, conflicts)| !conflicts.is_empty())
        .collect();
    json_reply(&json!({
        "generation": served.snapshot.generation,
        "status": served.snapshot.status(),
        "left_out": left_out,
        "problems": problems(&served, Severity::Error),
        "warnings": problems(&served, Severity::Warning),
        "refusals": discovery.ledger().refusals(),
    }))
}

/// Envoy's form of a dump, of what was sent; private keys are not in it.
fn config_dump(discovery: &Discovery, query: &Query) -> Reply {
    let Some(id) = query.get("proxyID") else {
        return Reply::status(
            http::StatusCode::BAD_REQUEST,
            "name a client: ?proxyID=NODE_ID, as in /debug/syncz\n",
        );
    };
    // `POD.NAMESPACE` will do, as in Istio.
    let found = discovery
        .ledger()
        .connections()
        .into_iter()
        .filter(|connection| {
            connection.node.id == id
                || format!("{}.{}", connection.node.name, connection.node.namespace) == id
        });
    let Some(connection) = found.last() else {
        return Reply::status(
            http::StatusCode::NOT_FOUND,
            format!("{id} is not connected\n"),
        );
    };
    json_reply(&dump_of(&connection))
}

fn dump_of(connection: &Connection) -> Value {
    let dumps: BTreeMap<Kind, Vec<Arc<Encoded>>> = dump(connection);
    let resources: BTreeMap<&str, Vec<Value>> = dumps
        .iter()
        .filter(|(kind, _)| **kind != Kind::Secret)
        .map(|(kind, all)| {
            let all = all
                .iter()
                .map(|encoded| {
                    json!({ "name": &*encoded.name, "version_info": &*encoded.version, "config": readable(encoded) })
                })
                .collect();
            (kind.short(), all)
        })
        .collect();
    json!({ "node": connection.node.id, "resources": resources })
}

/// The resource as JSON, with its `@type`.
fn readable(encoded: &Encoded) -> Value {
    let wrapped = admin::ConfigDump {
        configs: vec![encoded.body.clone()],
    };
    match lateen_protocols::json::to_json(&wrapped) {
        Ok(mut value) => value
            .pointer_mut("/configs/0")
            .map(Value::take)
            .unwrap_or_default(),
        Err(e) => json!({ "unreadable": e.to_string(), "bytes": encoded.body.encoded_len() }),
    }
}
