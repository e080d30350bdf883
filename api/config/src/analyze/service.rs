//! Kubernetes Services and the Deployments behind them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Mesh, Resource, selects, strings};
use crate::object::Labels;

/// Protocols by the beginning of a port's name.
const PROTOCOLS: &[&str] = &[
    "http", "http2", "https", "tcp", "tls", "grpc", "grpc-web", "mongo", "redis", "mysql", "udp",
];

fn is_conventional(name: &str) -> bool {
    PROTOCOLS.iter().any(|protocol| {
        name == *protocol
            || name
                .strip_prefix(protocol)
                .is_some_and(|rest| rest.starts_with('-'))
    })
}

/// IST0118: a port whose name does not say its protocol; IST0150: the same where nothing else can tell.
pub(super) fn port_names(mesh: &mut Mesh<'_>) {
    for service in mesh.of("", "Service") {
        if matches!(
            service.namespace(),
            "kube-system" | "kube-public" | "kube-node-lease"
        ) || service.namespace() == mesh.root()
        {
            continue;
        }
        let external = service.spec().str("type") == "ExternalName";
        for port in service.spec().get("ports").items() {
            let name = port.str("name");
            if port.has("appProtocol") || port.str("protocol") == "UDP" || is_conventional(name) {
                continue;
            }
            if external {
                mesh.report("IST0150", service, &port.path, "an ExternalName Service needs the protocol in the port's name: tcp-…, http-…, tls-…");
            } else {
                let text = format!(
                    "port {} is called {name:?}; a name such as http-… or an appProtocol says the protocol",
                    port.get("port").int()
                );
                mesh.report("IST0118", service, &port.path, text);
            }
        }
    }
}

/// IST0116: Services that give one port of a Deployment several protocols; IST0137: several ports.
pub(super) fn association(mesh: &mut Mesh<'_>) {
    for deployment in mesh.of("apps", "Deployment") {
        let metadata = deployment.spec().get("template").get("metadata");
        let labels = strings(metadata.get("labels").value);
        let annotations = strings(metadata.get("annotations").value);
        if !mesh.injects_pod(deployment.namespace(), &labels, &annotations) {
            continue;
        }
        let services: Vec<&Resource> = mesh
            .of("", "Service")
            .filter(|service| service.namespace() == deployment.namespace())
            .filter(|service| {
                let selector: Labels = strings(service.spec().get("selector").value);
                !selector.is_empty() && selects(&selector, &labels)
            })
            .collect();
        several_protocols(mesh, deployment, &services);
        several_ports(mesh, deployment, &services);
    }
}

fn several_protocols(mesh: &mut Mesh<'_>, deployment: &Resource, services: &[&Resource]) {
    // Port to protocol to those who say so.
    let mut by_port: BTreeMap<i64, BTreeMap<String, BTreeSet<&str>>> = BTreeMap::new();
    for service in services {
        for port in service.spec().get("ports").items() {
            let protocol = match port.str("protocol") {
                "" => "TCP",
                named => named,
            };
            by_port
                .entry(port.get("port").int())
                .or_default()
                .entry(protocol.to_owned())
                .or_default()
                .insert(&service.name);
        }
    }
    for (port, protocols) in by_port
        .into_iter()
        .filter(|(_, protocols)| protocols.len() > 1)
    {
        let names: BTreeSet<&str> = protocols.into_values().flatten().collect();
        let text = format!(
            "Services {} give port {port} different protocols",
            join(&names)
        );
        mesh.report("IST0116", deployment, "spec", text);
    }
}

fn several_ports(mesh: &mut Mesh<'_>, deployment: &Resource, services: &[&Resource]) {
    // Target port to port to those who say so.
    let mut by_target: BTreeMap<String, BTreeMap<i64, BTreeSet<&str>>> = BTreeMap::new();
    for service in services {
        for port in service.spec().get("ports").items() {
            let target = port.get("targetPort");
            let target = match target.text() {
                "" if target.int() > 0 => target.int().to_string(),
                "" => continue,
                named => named.to_owned(),
            };
            by_target
                .entry(target)
                .or_default()
                .entry(port.get("port").int())
                .or_default()
                .insert(&service.name);
        }
    }
    for (target, ports) in by_target.into_iter().filter(|(_, ports)| ports.len() > 1) {
        let numbers: Vec<String> = ports.keys().map(i64::to_string).collect();
        let names: BTreeSet<&str> = ports.into_values().flatten().collect();
        let text = format!(
            "Services {} send ports {} to target port {target}",
            join(&names),
            numbers.join(", ")
        );
        mesh.report("IST0137", deployment, "spec", text);
    }
}

fn join(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(", ")
}

/// IST0144: the user id of the sidecar, whose traffic is not captured.
pub(super) fn user_ids(mesh: &mut Mesh<'_>) {
    const SIDECAR: i64 = 1337;
    let all: Vec<&Resource> = mesh
        .of("", "Pod")
        .chain(mesh.of("apps", "Deployment"))
        .collect();
    for resource in all {
        let spec = resource.pod_spec();
        let of_pod = spec.get("securityContext").get("runAsUser");
        let of_containers = spec
            .get("containers")
            .items()
            .filter(|container| !matches!(container.str("name"), "istio-proxy" | "istio-operator"))
            .map(|container| container.get("securityContext").get("runAsUser"));
        let found = std::iter::once(of_pod)
            .chain(of_containers)
            .find(|user| user.int() == SIDECAR);
        if let Some(user) = found {
            mesh.report(
                "IST0144",
                resource,
                &user.path,
                "1337 is the sidecar's user: its traffic is not captured; use another",
            );
        }
    }
}
