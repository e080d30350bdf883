//! VirtualServices, DestinationRules, ServiceEntries: what they name and whether it is there.

use std::collections::BTreeMap;

use super::{Mesh, Resource, covers, full_host, is_visible, selects, strings};
use crate::review::{At, text};

/// Every destination of a VirtualService: routes, mirrors.
fn destinations<'a>(service: &'a Resource) -> Vec<At<'a>> {
    let spec = service.spec();
    let mut all = Vec::new();
    for kind in ["http", "tcp", "tls"] {
        for route in spec.get(kind).items() {
            all.extend(route.get("route").items().map(|to| to.get("destination")));
            all.push(route.get("mirror"));
            all.extend(route.get("mirrors").items().map(|to| to.get("destination")));
        }
    }
    // A mirror may be left out; a route's entry that says nothing goes nowhere.
    all.retain(|to| to.is_set() || to.path.contains(".route["));
    all
}

/// A destination that somebody offers: its ports, if they are known.
struct Offer {
    host: String,
    namespace: String,
    export_to: Vec<String>,
    ports: Vec<i64>,
    by_entry: bool,
}

fn offers(mesh: &Mesh<'_>) -> Vec<Offer> {
    let mut all = Vec::new();
    for service in mesh.of("", "Service") {
        let export_to = service
            .annotations
            .get("networking.istio.io/exportTo")
            .map(|list| {
                list.split(',')
                    .map(|entry| entry.trim().to_owned())
                    .collect()
            })
            .unwrap_or_default();
        all.push(Offer {
            host: full_host(&service.name, service.namespace()),
            namespace: service.namespace().to_owned(),
            export_to,
            ports: service
                .spec()
                .get("ports")
                .items()
                .map(|port| port.get("port").int())
                .collect(),
            by_entry: false,
        });
    }
    for entry in mesh.of("networking.istio.io", "ServiceEntry") {
        let spec = entry.spec();
        for host in spec.get("hosts").texts() {
            all.push(Offer {
                host: full_host(host, entry.namespace()),
                namespace: entry.namespace().to_owned(),
                export_to: spec
                    .get("exportTo")
                    .texts()
                    .into_iter()
                    .map(str::to_owned)
                    .collect(),
                ports: spec
                    .get("ports")
                    .items()
                    .map(|port| port.get("number").int())
                    .collect(),
                by_entry: true,
            });
        }
    }
    all
}

/// IST0101: nobody offers the host; IST0112: several ports and none named; IST0140: rules that a gateway skips.
pub(super) fn destination_hosts(mesh: &mut Mesh<'_>) {
    let offers = offers(mesh);
    for service in mesh.of("networking.istio.io", "VirtualService") {
        // Who uses the routes: the namespaces that see them.
        let export_to = service.spec().get("exportTo").texts();
        let own = service.namespace();
        let viewers: Vec<&str> = export_to
            .iter()
            .filter(|entry| **entry != "*")
            .map(|entry| if *entry == "." { own } else { entry })
            .collect();
        let viewers = if viewers.is_empty() {
            vec![own]
        } else {
            viewers
        };
        for to in destinations(service) {
            let host = full_host(to.str("host"), own);
            let found = offers.iter().find(|offer| {
                let entries: Vec<&str> = offer.export_to.iter().map(String::as_str).collect();
                let offered = offer.host == host
                    || offer.by_entry && offer.host.starts_with('*') && covers(&offer.host, &host);
                offered
                    && viewers
                        .iter()
                        .all(|viewer| is_visible(&entries, &offer.namespace, viewer))
            });
            let Some(offer) = found else {
                let text = format!(
                    "host {} is offered by no Service or ServiceEntry that is visible here",
                    to.str("host")
                );
                mesh.report("IST0101", service, &to.get("host").path, text);
                continue;
            };
            let port = to.get("port").get("number");
            if port.int() != 0 {
                if !offer.ports.is_empty() && !offer.ports.contains(&port.int()) {
                    let text = format!("host {} has no port {}", to.str("host"), port.int());
                    mesh.report("IST0101", service, &port.path, text);
                }
            } else if offer.ports.len() > 1 && !offer.by_entry {
                let text = format!(
                    "host {} has several ports; name one in port.number",
                    to.str("host")
                );
                mesh.report("IST0112", service, &to.path, text);
            }
        }
        skipped_rules(mesh, service);
    }
}

/// A gateway sends to pods at once: rules of the destination's own VirtualService do not apply, so a
/// subset that only they choose is never chosen.
fn skipped_rules(mesh: &mut Mesh<'_>, service: &Resource) {
    let gateways = service.spec().get("gateways").texts();
    if gateways.is_empty() || gateways.contains(&"mesh") {
        return;
    }
    let targets: Vec<(String, At<'_>)> = service
        .spec()
        .get("http")
        .items()
        .flat_map(|route| route.get("route").items().collect::<Vec<_>>())
        .map(|to| to.get("destination"))
        .filter(|to| !to.str("host").is_empty() && to.str("subset").is_empty())
        .map(|to| (full_host(to.str("host"), service.namespace()), to))
        .collect();
    for other in mesh.of("networking.istio.io", "VirtualService") {
        let spec = other.spec();
        let for_mesh =
            spec.get("gateways").count() == 0 || spec.get("gateways").texts().contains(&"mesh");
        if !for_mesh || std::ptr::eq(other, service) {
            continue;
        }
        let hosts: Vec<String> = spec
            .get("hosts")
            .texts()
            .iter()
            .map(|host| full_host(host, other.namespace()))
            .collect();
        let by_subset = destinations(other)
            .iter()
            .any(|to| !to.str("subset").is_empty());
        if let Some((_, to)) = targets
            .iter()
            .find(|(host, _)| by_subset && hosts.contains(host))
        {
            let text = format!(
                "the subsets that {} chooses do not apply to requests through the gateway; choose one here",
                other.shown()
            );
            mesh.report("IST0140", service, &to.path, text);
        }
    }
}

/// IST0101: no DestinationRule defines the subset.
pub(super) fn destination_rules(mesh: &mut Mesh<'_>) {
    let mut subsets: Vec<(String, String)> = Vec::new();
    for rule in mesh.of("networking.istio.io", "DestinationRule") {
        let host = full_host(rule.spec().str("host"), rule.namespace());
        for subset in rule.spec().get("subsets").items() {
            subsets.push((host.clone(), subset.str("name").to_owned()));
        }
    }
    for service in mesh.of("networking.istio.io", "VirtualService") {
        for to in destinations(service) {
            let (host, subset) = (
                full_host(to.str("host"), service.namespace()),
                to.str("subset"),
            );
            if !subset.is_empty()
                && !subsets
                    .iter()
                    .any(|(known, name)| name == subset && covers(known, &host))
            {
                let text = format!(
                    "subset {subset} of {} is defined by no DestinationRule",
                    to.str("host")
                );
                mesh.report("IST0101", service, &to.get("subset").path, text);
            }
        }
    }
}

/// IST0101: no such Gateway; IST0132: the Gateway does not serve the host; IST0165: a Gateway that Pilot
/// has made itself.
pub(super) fn gateways(mesh: &mut Mesh<'_>) {
    for service in mesh.of("networking.istio.io", "VirtualService") {
        for item in service.spec().get("gateways").items() {
            let name = item.text();
            if name == "mesh" {
                continue;
            }
            let full = crate::reference::full_gateway(name, service.namespace());
            let (namespace, short) = full.split_once('/').unwrap_or(("", &full));
            let found = mesh
                .of("networking.istio.io", "Gateway")
                .find(|gateway| gateway.name == short && gateway.namespace() == namespace);
            let Some(gateway) = found else {
                mesh.report(
                    "IST0101",
                    service,
                    &item.path,
                    format!("there is no Gateway {full}"),
                );
                unserved_hosts(mesh, service, &full, None);
                continue;
            };
            if gateway
                .annotations
                .contains_key("internal.istio.io/gateway-service")
                || gateway
                    .annotations
                    .contains_key("internal.istio.io/gateway-semantics")
            {
                mesh.report("IST0165", service, &item.path, format!("Gateway {full} is made by Pilot from a Kubernetes Gateway and may change; use an HTTPRoute"));
            }
            unserved_hosts(mesh, service, &full, Some(gateway));
        }
    }
}

fn unserved_hosts(mesh: &mut Mesh<'_>, service: &Resource, name: &str, gateway: Option<&Resource>) {
    let mut served: Vec<&str> = Vec::new();
    if let Some(gateway) = gateway {
        for server in gateway.spec().get("servers").items() {
            for host in server.get("hosts").texts() {
                match host.split_once('/') {
                    None | Some(("*", _)) => {}
                    Some((".", _)) if gateway.namespace() == service.namespace() => {}
                    Some((named, _)) if named == service.namespace() => {}
                    Some(_) => continue,
                }
                served.push(host.split_once('/').map_or(host, |(_, host)| host));
            }
        }
    }
    let hosts = service.spec().get("hosts");
    let any = hosts
        .texts()
        .iter()
        .any(|host| served.iter().any(|pattern| text::overlap(pattern, host)));
    if !any && hosts.count() > 0 {
        let text = format!(
            "Gateway {name} has no server for any of {}",
            hosts.texts().join(", ")
        );
        mesh.report("IST0132", service, &hosts.path, text);
    }
}

/// IST0149: a route by a token's claim, at a gateway where no RequestAuthentication verifies tokens.
pub(super) fn claim_routes(mesh: &mut Mesh<'_>) {
    for service in mesh.of("networking.istio.io", "VirtualService") {
        let mut claims = Vec::new();
        for matcher in service
            .spec()
            .get("http")
            .items()
            .flat_map(|route| route.get("match").items().collect::<Vec<_>>())
        {
            let headers = matcher
                .get("headers")
                .entries()
                .chain(matcher.get("withoutHeaders").entries());
            claims.extend(headers.filter(|(name, _)| text::is_claim_route(name)));
        }
        let Some((claim, at)) = claims.first() else {
            continue;
        };
        for name in service.spec().get("gateways").texts() {
            let full = crate::reference::full_gateway(name, service.namespace());
            let gateway = mesh
                .of("networking.istio.io", "Gateway")
                .find(|gateway| format!("{}/{}", gateway.namespace(), gateway.name) == full);
            let Some(gateway) = gateway else { continue };
            let selector = strings(gateway.spec().get("selector").value);
            // Pods of the gateway that is there by default need not be shown.
            let mut pods: Vec<(String, &str, &super::Labels)> = mesh
                .of("", "Pod")
                .filter(|pod| selects(&selector, &pod.labels))
                .map(|pod| (pod.shown(), pod.namespace(), &pod.labels))
                .collect();
            if pods.is_empty() && Mesh::is_default_gateway(&selector) {
                pods.push(("the ingress gateway".into(), mesh.root(), &selector));
            }
            for (shown, namespace, labels) in pods {
                let verified =
                    mesh.of("security.istio.io", "RequestAuthentication")
                        .any(|policy| {
                            let wanted =
                                strings(policy.spec().get("selector").get("matchLabels").value);
                            (policy.namespace() == namespace || policy.namespace() == mesh.root())
                                && selects(&wanted, labels)
                        });
                if !verified {
                    let text = format!(
                        "route by {claim}, but no RequestAuthentication verifies tokens at {shown} (Gateway {full})"
                    );
                    mesh.report("IST0149", service, &at.path, text);
                }
            }
        }
    }
}

/// IST0109: the same host in two VirtualServices for sidecars, seen by the same namespace.
pub(super) fn conflicting_hosts(mesh: &mut Mesh<'_>) {
    // Host to those who claim it.
    let mut claims: BTreeMap<String, Vec<&Resource>> = BTreeMap::new();
    for service in mesh.of("networking.istio.io", "VirtualService") {
        let gateways = service.spec().get("gateways").texts();
        if !gateways.is_empty() && !gateways.contains(&"mesh") {
            continue;
        }
        for host in service.spec().get("hosts").texts() {
            claims
                .entry(full_host(host, service.namespace()))
                .or_default()
                .push(service);
        }
    }
    for (host, claimants) in claims {
        for service in &claimants {
            let sees = |of: &Resource, namespace: &str| {
                is_visible(
                    &of.spec().get("exportTo").texts(),
                    of.namespace(),
                    namespace,
                )
            };
            let rivals: Vec<String> = claimants
                .iter()
                .filter(|other| !std::ptr::eq(**other, *service))
                .filter(|other| {
                    let namespaces = [service.namespace(), other.namespace()];
                    let named = service.spec().get("exportTo").texts();
                    let other_named = other.spec().get("exportTo").texts();
                    namespaces
                        .into_iter()
                        .chain(named.into_iter().filter(|name| !matches!(*name, "*" | ".")))
                        .chain(
                            other_named
                                .into_iter()
                                .filter(|name| !matches!(*name, "*" | ".")),
                        )
                        .any(|namespace| sees(service, namespace) && sees(other, namespace))
                })
                .map(|other| format!("{}/{}", other.namespace(), other.name))
                .collect();
            if !rivals.is_empty() {
                let text = format!(
                    "{} define host {host} as well; which one applies is not defined: merge them",
                    rivals.join(", ")
                );
                mesh.report("IST0109", service, "spec.hosts", text);
            }
        }
    }
}

/// IST0128 and IST0129: TLS without an authority to verify the server by.
pub(super) fn certificates(mesh: &mut Mesh<'_>) {
    for rule in mesh.of("networking.istio.io", "DestinationRule") {
        let policy = rule.spec().get("trafficPolicy");
        let selected = rule.spec().has("workloadSelector");
        let unverified = |tls: &At<'_>| {
            matches!(tls.str("mode"), "SIMPLE" | "MUTUAL")
                && tls.str("caCertificates").is_empty()
                && (!selected || tls.str("credentialName").is_empty())
        };
        let what = "the server's certificate is not verified; set caCertificates";
        let tls = policy.get("tls");
        if unverified(&tls) {
            mesh.report("IST0128", rule, &tls.path, what);
        }
        for port in policy.get("portLevelSettings").items() {
            if unverified(&port.get("tls")) {
                mesh.report("IST0129", rule, &port.get("tls").path, what);
            }
        }
    }
}

/// IST0173: a subset that no pod is in; IST0174: a host that nobody offers.
pub(super) fn subsets_without_pods(mesh: &mut Mesh<'_>) {
    let offers = offers(mesh);
    for rule in mesh.of("networking.istio.io", "DestinationRule") {
        let host = full_host(rule.spec().str("host"), rule.namespace());
        let known = host.starts_with('*')
            || offers
                .iter()
                .any(|offer| offer.host == host || covers(&offer.host, &host));
        if !known {
            let text = format!(
                "host {} is offered by no Service or ServiceEntry",
                rule.spec().str("host")
            );
            mesh.report("IST0174", rule, "spec.host", text);
            continue;
        }
        let service = mesh
            .of("", "Service")
            .find(|service| full_host(&service.name, service.namespace()) == host);
        let Some(service) = service else { continue };
        let selector = strings(service.spec().get("selector").value);
        if selector.is_empty() {
            continue;
        }
        for subset in rule.spec().get("subsets").items() {
            let labels: super::Labels = strings(subset.get("labels").value)
                .into_iter()
                .filter(|(key, _)| !key.starts_with("topology."))
                .collect();
            let picks =
                |found: &super::Labels| selects(&selector, found) && selects(&labels, found);
            let pods = mesh
                .of("", "Pod")
                .any(|pod| pod.namespace() == service.namespace() && picks(&pod.labels));
            let templates = mesh.of("apps", "Deployment").any(|deployment| {
                let labels = strings(
                    deployment
                        .spec()
                        .get("template")
                        .get("metadata")
                        .get("labels")
                        .value,
                );
                deployment.namespace() == service.namespace() && picks(&labels)
            });
            if !labels.is_empty() && !pods && !templates {
                let text = format!(
                    "subset {} of {} has no pods",
                    subset.str("name"),
                    rule.spec().str("host")
                );
                mesh.report("IST0173", rule, &subset.path, text);
            }
        }
    }
}

/// IST0134: a TCP port of a ServiceEntry whose traffic cannot be recognised for lack of addresses.
pub(super) fn addresses(mesh: &mut Mesh<'_>) {
    let allocates = mesh.config["defaultConfig"]["proxyMetadata"]["ISTIO_META_DNS_AUTO_ALLOCATE"]
        .as_str()
        == Some("true");
    if allocates {
        return;
    }
    for entry in mesh.of("networking.istio.io", "ServiceEntry") {
        let allocated = entry.value["status"]["addresses"]
            .as_array()
            .is_some_and(|all| !all.is_empty());
        if entry.spec().get("addresses").count() > 0 || allocated {
            continue;
        }
        for port in entry.spec().get("ports").items() {
            if port.str("protocol").is_empty() || port.str("protocol").eq_ignore_ascii_case("TCP") {
                mesh.report("IST0134", entry, &port.path, "a TCP port needs spec.addresses, or addresses allocated by proxies (ISTIO_META_DNS_AUTO_ALLOCATE)");
            }
        }
    }
}
