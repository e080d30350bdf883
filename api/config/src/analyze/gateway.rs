//! Gateways: their pods, ports, secrets, and each other.

use x509_parser::pem::Pem;

use super::{Mesh, Resource, selects, strings};
use crate::object::Labels;
use crate::review::At;

fn selector(gateway: &Resource) -> Labels {
    strings(gateway.spec().get("selector").value)
}

/// IST0101: no pods are selected; IST0162: the Service before them has no such port.
pub(super) fn ports(mesh: &mut Mesh<'_>) {
    for gateway in mesh.of("networking.istio.io", "Gateway") {
        let wanted = selector(gateway);
        if wanted.is_empty() {
            continue;
        }
        let pods: Vec<&Resource> = mesh
            .of("", "Pod")
            .filter(|pod| selects(&wanted, &pod.labels))
            .collect();
        if pods.is_empty() && !Mesh::is_default_gateway(&wanted) {
            mesh.report(
                "IST0101",
                gateway,
                "spec.selector",
                "the selector picks no pods",
            );
            continue;
        }
        let mut open: Vec<i64> = Vec::new();
        let mut served = false;
        for service in mesh.of("", "Service") {
            let selector = strings(service.spec().get("selector").value);
            let before = pods.iter().any(|pod| {
                pod.namespace() == service.namespace()
                    && !selector.is_empty()
                    && selects(&selector, &pod.labels)
            });
            if !before {
                continue;
            }
            served = true;
            for port in service
                .spec()
                .get("ports")
                .items()
                .filter(|port| matches!(port.str("protocol"), "" | "TCP"))
            {
                // A gateway listens where traffic arrives: on the target port.
                let target = port.get("targetPort");
                open.push(if target.int() > 0 {
                    target.int()
                } else {
                    port.get("port").int()
                });
            }
        }
        if !served {
            continue;
        }
        for server in gateway.spec().get("servers").items() {
            let number = server.get("port").get("number");
            if number.is_set() && !open.contains(&number.int()) {
                let text = format!(
                    "port {} is not a target port of any Service before these pods",
                    number.int()
                );
                mesh.report("IST0162", gateway, &number.path, text);
            }
        }
    }
}

/// IST0101: no such secret where the pods are; IST0161: it holds no certificate that is valid now.
pub(super) fn secrets(mesh: &mut Mesh<'_>) {
    for gateway in mesh.of("networking.istio.io", "Gateway") {
        let wanted = selector(gateway);
        let home = mesh
            .of("", "Pod")
            .find(|pod| selects(&wanted, &pod.labels))
            .map(Resource::namespace)
            .or_else(|| Mesh::is_default_gateway(&wanted).then(|| mesh.root()));
        for server in gateway.spec().get("servers").items() {
            let tls = server.get("tls");
            let name = tls.get("credentialName");
            let many = tls.get("credentialNames").items();
            for name in std::iter::once(name)
                .chain(many)
                .filter(|name| !name.text().is_empty())
            {
                let secret = mesh
                    .of("", "Secret")
                    .find(|secret| secret.name == name.text() && Some(secret.namespace()) == home);
                match secret {
                    None => {
                        let place = home.unwrap_or("that of its pods, which are not there");
                        let text =
                            format!("there is no Secret {} in namespace {place}", name.text());
                        mesh.report("IST0101", gateway, &name.path, text);
                    }
                    Some(secret) => {
                        if let Err(reason) = usable(secret) {
                            mesh.report(
                                "IST0161",
                                gateway,
                                &name.path,
                                format!("{}: {reason}", secret.shown()),
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Whether a TLS secret can be served: a key, and a certificate for it that is valid now.
fn usable(secret: &Resource) -> Result<(), String> {
    let part = |names: [&str; 2]| {
        names.iter().find_map(|name| {
            let data = secret.value["data"][name].as_str().and_then(decode);
            data.or_else(|| {
                secret.value["stringData"][name]
                    .as_str()
                    .map(|text| text.as_bytes().to_vec())
            })
        })
    };
    let certificate = part(["tls.crt", "cert"]).ok_or("no tls.crt")?;
    let key = part(["tls.key", "key"]).ok_or("no tls.key")?;
    let block = |bytes: &[u8]| Pem::iter_from_buffer(bytes).next().and_then(Result::ok);
    let pem = block(&certificate).ok_or("tls.crt is not PEM")?;
    let parsed = pem
        .parse_x509()
        .map_err(|error| format!("tls.crt is no certificate: {error}"))?;
    let key = block(&key).ok_or("tls.key is not PEM")?;
    if !key.label.ends_with("PRIVATE KEY") {
        return Err("tls.key is no private key".into());
    }
    if !parsed.validity().is_valid() {
        return Err(format!(
            "tls.crt is valid from {} to {}",
            parsed.validity().not_before,
            parsed.validity().not_after
        ));
    }
    Ok(())
}

/// Base64 as Kubernetes writes it.
fn decode(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    let text: String = text.split_whitespace().collect();
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

fn servers(gateway: &Resource) -> Vec<At<'_>> {
    gateway.spec().get("servers").items().collect()
}

/// IST0145: two Gateways of the same pods serve the same host on the same port by different protocols.
pub(super) fn conflicts(mesh: &mut Mesh<'_>) {
    let all: Vec<(&Resource, Labels)> = mesh
        .of("networking.istio.io", "Gateway")
        .map(|gateway| (gateway, selector(gateway)))
        .collect();
    let pods: Vec<&Resource> = mesh.of("", "Pod").collect();
    for (index, (gateway, wanted)) in all.iter().enumerate() {
        for (other_index, (other, other_wanted)) in all.iter().enumerate() {
            let same_pods = wanted == other_wanted
                || pods
                    .iter()
                    .any(|pod| selects(wanted, &pod.labels) && selects(other_wanted, &pod.labels));
            if index == other_index || !same_pods {
                continue;
            }
            for server in servers(gateway) {
                let clash = servers(other)
                    .into_iter()
                    .any(|rival| clash(gateway, &server, other, &rival));
                if clash {
                    let port = server.get("port").get("number").int();
                    let text = format!(
                        "{} serves the same hosts on port {port} in another way; keep one",
                        other.shown()
                    );
                    mesh.report("IST0145", gateway, &server.path, text);
                }
            }
        }
    }
}

fn clash(a: &Resource, server: &At<'_>, b: &Resource, rival: &At<'_>) -> bool {
    let (port, other) = (server.get("port"), rival.get("port"));
    let secret = |server: &At<'_>| server.get("tls").str("credentialName").to_owned();
    let same_way = port
        .str("protocol")
        .eq_ignore_ascii_case(other.str("protocol"))
        && port.str("name") == other.str("name")
        && secret(server) == secret(rival);
    port.get("number").int() != 0
        && port.get("number").int() == other.get("number").int()
        && server.str("bind") == rival.str("bind")
        && !same_way
        && server.get("hosts").texts().iter().any(|host| {
            rival
                .get("hosts")
                .texts()
                .iter()
                .any(|other| same_host(a, host, b, other))
        })
}

/// `[NAMESPACE/]HOST` of two Gateways: the same host, visible to the same namespace.
fn same_host(a: &Resource, host: &str, b: &Resource, other: &str) -> bool {
    fn parts<'t>(gateway: &'t Resource, host: &'t str) -> (&'t str, &'t str) {
        match host.split_once('/') {
            Some((".", host)) => (gateway.namespace(), host),
            Some(parts) => parts,
            None => ("*", host),
        }
    }
    let ((namespace, host), (other_namespace, other)) = (parts(a, host), parts(b, other));
    host == other && (namespace == other_namespace || namespace == "*" || other_namespace == "*")
}

/// IST0138: one certificate at several Gateways of the same pods. Browsers reuse the connection of one
/// for the hosts of the other, which then answers 404.
pub(super) fn duplicate_certificates(mesh: &mut Mesh<'_>) {
    let all: Vec<(&Resource, Labels)> = mesh
        .of("networking.istio.io", "Gateway")
        .map(|gateway| (gateway, selector(gateway)))
        .collect();
    let content = |gateway: &Resource, name: &str| {
        // The secret lies beside the gateway's pods; the root namespace is where those are by default.
        let secret = mesh.of("", "Secret").find(|secret| {
            secret.name == name
                && (secret.namespace() == gateway.namespace() || secret.namespace() == mesh.root())
        });
        secret.map_or_else(
            || name.to_owned(),
            |secret| secret.value["data"].to_string(),
        )
    };
    let mut found = Vec::new();
    for (gateway, wanted) in &all {
        for server in servers(gateway) {
            let name = server.get("tls").str("credentialName");
            if name.is_empty() {
                continue;
            }
            let rivals: Vec<String> = all
                .iter()
                .filter(|(other, _)| !std::ptr::eq(*other, *gateway))
                .filter(|(_, other_wanted)| {
                    selects(wanted, other_wanted) || selects(other_wanted, wanted)
                })
                .filter(|(other, _)| {
                    servers(other).iter().any(|rival| {
                        let other_name = rival.get("tls").str("credentialName");
                        !other_name.is_empty()
                            && content(gateway, name) == content(other, other_name)
                    })
                })
                .map(|(other, _)| other.shown())
                .collect();
            if !rivals.is_empty() {
                found.push((*gateway, server.get("tls").path, rivals.join(", ")));
                break;
            }
        }
    }
    for (gateway, path, rivals) in found {
        let text = format!(
            "{rivals} use the same certificate: browsers reuse connections and get 404; merge the Gateways"
        );
        mesh.report("IST0138", gateway, &path, text);
    }
}

/// IST0166: a selector for pods of a Kubernetes Gateway, which only targetRefs reach.
pub(super) fn selectors(mesh: &mut Mesh<'_>) {
    const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
    let pods: Vec<&Resource> = mesh
        .of("", "Pod")
        .filter(|pod| pod.labels.contains_key(GATEWAY_NAME))
        .collect();
    for (group, kind) in [
        ("security.istio.io", "RequestAuthentication"),
        ("security.istio.io", "AuthorizationPolicy"),
        ("telemetry.istio.io", "Telemetry"),
        ("extensions.istio.io", "WasmPlugin"),
    ] {
        for policy in mesh.of(group, kind) {
            let spec = policy.spec();
            let wanted = strings(spec.get("selector").get("matchLabels").value);
            if wanted.is_empty() || spec.has("targetRef") || spec.get("targetRefs").count() > 0 {
                continue;
            }
            let reached = pods
                .iter()
                .find(|pod| pod.namespace() == policy.namespace() && selects(&wanted, &pod.labels));
            if let Some(pod) = reached {
                let name = pod.labels.get(GATEWAY_NAME).map_or("", String::as_str);
                let text = format!(
                    "selectors do not reach pods of the Kubernetes Gateway {name}; use targetRefs"
                );
                mesh.report("IST0166", policy, "spec.selector", text);
            }
        }
    }
}
