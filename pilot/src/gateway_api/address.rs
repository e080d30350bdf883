//! Where a Gateway is: the Services that stand for it, whether they answer, and at which addresses.

use std::collections::BTreeSet;

use lateen_config::Object;
use lateen_config::gateway_api::Gateway;

use super::Fault;
use super::status::Condition;
use super::world::{Class, World};

/// Annotations of a Gateway for the Service of one that has no addresses.
const NAME_OVERRIDE: &str = "gateway.istio.io/name-override";
const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
/// Annotation of a Gateway: which addresses its status lists.
const ADDRESS_TYPE: &str = "networking.istio.io/address-type";

/// A Gateway in its world.
#[derive(Clone, Copy)]
pub(super) struct Place<'a, 'w> {
    pub(super) world: &'w World<'a>,
    pub(super) object: &'a Object,
    pub(super) gateway: &'a Gateway,
    pub(super) class: Class,
}

impl Place<'_, '_> {
    /// Whether the Gateway has no addresses of its own, so that somebody deploys it.
    fn is_managed(&self) -> bool {
        match self.gateway.addresses.as_slice() {
            [] => true,
            [only] => matches!(only.address_type.as_deref(), None | Some("IPAddress")),
            _ => false,
        }
    }

    fn default_name(&self) -> String {
        let name = &self.object.key.name;
        if self.class.has_suffix() {
            format!("{name}-{}", self.gateway.gateway_class_name)
        } else {
            name.to_string()
        }
    }

    /// Account of its pods; empty for those that somebody else runs.
    pub(super) fn account(&self) -> String {
        if !self.is_managed() {
            return String::new();
        }
        let named = self.object.annotations.get(SERVICE_ACCOUNT);
        named.cloned().unwrap_or_else(|| self.default_name())
    }

    /// Host names of the Services that stand for the Gateway.
    pub(super) fn services(&self) -> (Vec<String>, Option<Fault>) {
        let namespace = &self.object.key.namespace;
        if self.is_managed() {
            let named = self.object.annotations.get(NAME_OVERRIDE);
            let own = self
                .world
                .host(named.unwrap_or(&self.default_name()), namespace);
            let shared = self.world.shared_service(&self.gateway.gateway_class_name);
            return match (self.world.service(&own), shared) {
                (None, Some(shared)) => (vec![shared.to_owned()], None),
                _ => (vec![own], None),
            };
        }
        let mut services = Vec::new();
        let mut skipped = Vec::new();
        for address in &self.gateway.addresses {
            if address
                .address_type
                .as_deref()
                .is_some_and(|kind| kind != "Hostname")
            {
                skipped.push(address.value.as_str());
            } else if address.value.contains('.') {
                services.push(address.value.to_ascii_lowercase());
            } else {
                services.push(self.world.host(&address.value, namespace));
            }
        }
        let fault = (!skipped.is_empty()).then(|| {
            Fault::new(
                "UnsupportedAddress",
                format!(
                    "only Hostname is supported, ignoring [{}]",
                    skipped.join(" ")
                ),
            )
        });
        (services, fault)
    }

    /// A Gateway's own Services: of its namespace, or shared by its class.
    pub(super) fn is_own(&self, host: &str) -> bool {
        self.world
            .service(host)
            .is_some_and(|service| service.namespace == &*self.object.key.namespace)
            || self.world.is_shared(host, &self.gateway.gateway_class_name)
    }

    /// Whether the Gateway's Services answer at its ports.
    pub(super) fn programmed(&self, services: &[String], ports: &[u32]) -> (Condition, Found) {
        let mut condition = Condition::new("Programmed", "Programmed", "Resource programmed");
        let mut found = Found::default();
        let ports: BTreeSet<u32> = ports.iter().copied().collect();
        for host in services {
            let service = self.world.service(host);
            let Some(service) = service.filter(|_| self.is_own(host)) else {
                found.warnings.push(match service {
                    Some(other) => format!(
                        "hostname {host:?} not found in namespace {:?}, but it was found in namespace(s) {:?}",
                        &*self.object.key.namespace, other.namespace
                    ),
                    None => format!("hostname {host:?} not found"),
                });
                found.unusable = true;
                continue;
            };
            for port in &ports {
                if self.world.answers(service, *port) {
                    found.internal.insert(format!("{host}:{port}"));
                    found
                        .within
                        .extend(service.addresses.iter().map(|ip| (*ip).to_owned()));
                    if !service.external.is_empty() {
                        found
                            .external
                            .extend(service.external.iter().map(|ip| (*ip).to_owned()));
                    } else if service.wants_load_balancer && found.pending.insert(host.clone()) {
                        found
                            .warnings
                            .push(format!("address pending for hostname {host:?}"));
                    }
                    continue;
                }
                if !self.world.answers_at_all(service) {
                    found
                        .warnings
                        .push(format!("no instances found for hostname {host:?}"));
                    continue;
                }
                let hints = self.world.leads_to(service, *port);
                if !hints.is_empty() {
                    let hints: Vec<String> = hints.iter().map(u16::to_string).collect();
                    found.warnings.push(format!(
                        "port {port} not found for hostname {host:?} (hint: the service port should be specified, not the workload port. Did you mean one of these ports: [{}]?)",
                        hints.join(" ")
                    ));
                    found.unusable = true;
                } else if !(service.is_managed() && service.has_port(*port)) {
                    found
                        .warnings
                        .push(format!("port {port} not found for hostname {host:?}"));
                    found.unusable = true;
                }
            }
        }
        found.warnings.sort();
        let internal: Vec<&str> = found.internal.iter().map(String::as_str).collect();
        if !internal.is_empty() {
            condition.say(format!(
                "Resource programmed, assigned to service(s) {}",
                enumerated(&internal)
            ));
        }
        let fault = if services.is_empty() {
            Some(Fault::new(
                "UnsupportedAddress",
                "Failed to assign to any requested addresses",
            ))
        } else if found.warnings.is_empty() {
            None
        } else {
            let warnings = found.warnings.join("; ");
            let message = if internal.is_empty() {
                format!("Failed to assign to any requested addresses: {warnings}")
            } else {
                format!(
                    "Assigned to service(s) {}, but failed to assign to all requested addresses: {warnings}",
                    enumerated(&internal)
                )
            };
            let reason = if found.unusable {
                "AddressNotUsable"
            } else {
                "AddressNotAssigned"
            };
            Some(Fault::new(reason, message))
        };
        (condition.fault(fault), found)
    }
}

/// Where a Gateway's Services are.
#[derive(Default)]
pub(super) struct Found {
    /// `HOST:PORT`.
    internal: BTreeSet<String>,
    within: BTreeSet<String>,
    external: BTreeSet<String>,
    pending: BTreeSet<String>,
    warnings: Vec<String>,
    unusable: bool,
}

impl Found {
    /// Addresses outside of the cluster, else those within, as class or annotation wants them.
    pub(super) fn addresses(&self, gateway: &Object, class: Class) -> Vec<String> {
        if !self.external.is_empty() {
            return self.external.iter().cloned().collect();
        }
        let default = if class == Class::Ingress {
            "Hostname"
        } else {
            ""
        };
        let wanted = gateway
            .annotations
            .get(ADDRESS_TYPE)
            .map_or(default, String::as_str);
        let mut all: Vec<String> = Vec::new();
        if wanted != "Hostname" {
            all.extend(self.within.iter().cloned());
        }
        if wanted != "IPAddress" {
            for place in &self.internal {
                let host = place
                    .rsplit_once(':')
                    .map_or(place.as_str(), |(host, _)| host);
                if !self.pending.contains(host) && !all.iter().any(|there| there == host) {
                    all.push(host.to_owned());
                }
            }
        }
        all
    }
}

/// `a`, `a and b`, `a, b, and c`.
fn enumerated(all: &[&str]) -> String {
    match all {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first, second] => format!("{first} and {second}"),
        [most @ .., last] => format!("{}, and {last}", most.join(", ")),
    }
}
