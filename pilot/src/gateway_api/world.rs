//! What Gateways and routes refer to, found by name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lateen_config::gateway_api::{
    Gateway, GatewayApi, INFERENCE_GROUP, Kind, ReferenceGrant, Selector,
};
use lateen_config::kubernetes::{ConfigMap, IntOrString};
use lateen_config::networking::ServiceEntry;
use lateen_config::{Key, Labels, Object, Secret, Spec};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{CLASSES, Endpoints};
use crate::model::DNS_DOMAIN;

/// Who answers for a class: Istio's names, so that users' GatewayClasses keep their meaning.
pub(super) const CONTROLLER: &str = "istio.io/gateway-controller";
pub(super) const MESH_CONTROLLER: &str = "istio.io/mesh-controller";
const EAST_WEST_CONTROLLER: &str = "istio.io/eastwest-controller";
const REMOTE_CONTROLLER: &str = "istio.io/unmanaged-gateway";

/// Label that every namespace has, whether it is written or not.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// Label of a Service that a controller has made for a Gateway.
const MANAGED: &str = "gateway.istio.io/managed";

/// What becomes of a class's Gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Listeners for clients.
    Ingress,
    /// A waypoint: its routes are not VirtualServices. Not served by our proxy.
    Waypoint,
    /// A gateway between networks.
    EastWest,
    /// Somebody else's, of which only the address counts.
    Remote,
}

impl Class {
    fn of_controller(name: &str) -> Option<Self> {
        Some(match name {
            CONTROLLER => Self::Ingress,
            MESH_CONTROLLER => Self::Waypoint,
            EAST_WEST_CONTROLLER => Self::EastWest,
            REMOTE_CONTROLLER => Self::Remote,
            _ => return None,
        })
    }

    /// Of a class that no GatewayClass describes.
    fn builtin(name: &str) -> Option<Self> {
        Some(match name {
            "istio" | "lateen" => Self::Ingress,
            "istio-waypoint" => Self::Waypoint,
            "istio-east-west" => Self::EastWest,
            "istio-remote" => Self::Remote,
            _ => return None,
        })
    }

    /// Whether the Service of a Gateway without addresses has the class in its name.
    pub(super) fn has_suffix(self) -> bool {
        matches!(self, Self::Ingress | Self::Remote)
    }
}

/// A Service, or a host of a ServiceEntry.
#[derive(Debug)]
pub(super) struct Service<'a> {
    pub(super) namespace: &'a str,
    pub(super) labels: &'a Labels,
    /// Number, name, and number on the workload where that is said.
    pub(super) ports: Vec<(u16, &'a str, Option<u16>)>,
    /// Addresses outside of the cluster.
    pub(super) external: Vec<&'a str>,
    /// Addresses within.
    pub(super) addresses: Vec<&'a str>,
    pub(super) wants_load_balancer: bool,
    /// See [`CLASSES`].
    classes: Vec<&'a str>,
    /// Host name as the registry knows it.
    registered: String,
}

impl Service<'_> {
    pub(super) fn has_port(&self, number: u32) -> bool {
        self.ports.iter().any(|(own, ..)| u32::from(*own) == number)
    }

    pub(super) fn is_managed(&self) -> bool {
        self.labels.contains_key(MANAGED)
    }
}

/// An object with its spec.
pub(super) type Of<'a, T> = (&'a Arc<Object>, &'a T);

pub(super) struct World<'a> {
    pub(super) domain: &'a str,
    pub(super) objects: Vec<(&'a Arc<Object>, &'a GatewayApi)>,
    pub(super) all: &'a [Arc<Object>],
    services: BTreeMap<String, Service<'a>>,
    entries: BTreeMap<(&'a str, &'a str), &'a ServiceEntry>,
    namespaces: BTreeMap<&'a str, Labels>,
    secrets: BTreeMap<(&'a str, &'a str), &'a Secret>,
    config_maps: BTreeMap<(&'a str, &'a str), &'a ConfigMap>,
    pools: BTreeSet<(&'a str, &'a str)>,
    grants: Vec<(&'a str, &'a ReferenceGrant)>,
    classes: BTreeMap<&'a str, &'a str>,
    statuses: BTreeMap<&'a Key, &'a Value>,
    endpoints: Option<&'a Endpoints>,
}

impl<'a> World<'a> {
    pub(super) fn read(
        all: &'a [Arc<Object>],
        domain: &'a str,
        endpoints: Option<&'a Endpoints>,
    ) -> Self {
        let mut world = Self {
            domain,
            objects: Vec::new(),
            all,
            services: BTreeMap::new(),
            entries: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            secrets: BTreeMap::new(),
            config_maps: BTreeMap::new(),
            pools: BTreeSet::new(),
            grants: Vec::new(),
            classes: BTreeMap::new(),
            statuses: BTreeMap::new(),
            endpoints,
        };
        for object in all {
            let (namespace, name) = (&*object.key.namespace, &*object.key.name);
            if !namespace.is_empty() {
                world.namespaces.entry(namespace).or_default();
            }
            match &object.spec {
                Spec::Namespace(_) => {
                    world.namespaces.insert(name, object.labels.clone());
                }
                Spec::Service(service) => {
                    world.add_service(object, service);
                }
                Spec::ServiceEntry(entry) => {
                    world.entries.insert((namespace, name), entry);
                    world.add_entry(object, entry);
                }
                Spec::Secret(secret) => {
                    world.secrets.insert((namespace, name), secret);
                }
                Spec::ConfigMap(map) => {
                    world.config_maps.insert((namespace, name), map);
                }
                Spec::GatewayApi(spec) => {
                    match &spec.kind {
                        Kind::GatewayClass(class) => {
                            world.classes.insert(name, &class.controller_name);
                        }
                        Kind::ReferenceGrant(grant) => world.grants.push((namespace, grant)),
                        Kind::InferencePool => {
                            world.pools.insert((namespace, name));
                        }
                        _ => {}
                    }
                    world.statuses.insert(&object.key, &spec.status);
                    world.objects.push((object, spec));
                }
                _ => {}
            }
        }
        for (name, labels) in &mut world.namespaces {
            labels.insert(NAMESPACE_NAME.to_owned(), (*name).to_owned());
        }
        world
    }

    fn add_service(&mut self, object: &'a Object, service: &'a lateen_config::kubernetes::Service) {
        let clean = |addresses: &'a [String]| -> Vec<&'a str> {
            let real = addresses.iter().map(String::as_str);
            real.filter(|text| !text.is_empty() && *text != "None")
                .collect()
        };
        let mut addresses = clean(&service.cluster_ips);
        if addresses.is_empty() {
            addresses = clean(std::slice::from_ref(&service.cluster_ip));
        }
        let mut external = clean(&service.load_balancer);
        external.extend(clean(&service.external_ips));
        let host = self.host(&object.key.name, &object.key.namespace);
        self.services.insert(
            host,
            Service {
                namespace: &object.key.namespace,
                labels: &object.labels,
                ports: service
                    .ports
                    .iter()
                    .map(|port| {
                        let target = port.target_port.as_ref().and_then(IntOrString::number);
                        (port.port, port.name.as_str(), target)
                    })
                    .collect(),
                external,
                addresses,
                wants_load_balancer: service.service_type == "LoadBalancer",
                classes: classes_of(object),
                registered: format!(
                    "{}.{}.svc.{DNS_DOMAIN}",
                    object.key.name, object.key.namespace
                ),
            },
        );
    }

    fn add_entry(&mut self, object: &'a Object, entry: &'a ServiceEntry) {
        for host in &entry.hosts {
            let host = host.to_ascii_lowercase();
            self.services
                .entry(host.clone())
                .or_insert_with(|| Service {
                    namespace: &object.key.namespace,
                    labels: &object.labels,
                    ports: entry
                        .ports
                        .iter()
                        .filter_map(|port| {
                            let number = u16::try_from(port.number).ok()?;
                            Some((number, port.name.as_str(), None))
                        })
                        .collect(),
                    external: Vec::new(),
                    addresses: entry.addresses.iter().map(String::as_str).collect(),
                    wants_load_balancer: false,
                    classes: Vec::new(),
                    registered: host,
                });
        }
    }

    /// Whether it is known who answers: what comes out is served, not only shown.
    pub(super) fn is_live(&self) -> bool {
        self.endpoints.is_some()
    }

    /// Host name of a Service.
    pub(super) fn host(&self, name: &str, namespace: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.domain)
    }

    pub(super) fn service(&self, host: &str) -> Option<&Service<'a>> {
        self.services.get(host)
    }

    /// Whether somebody answers at a Service's port.
    pub(super) fn answers(&self, service: &Service<'_>, port: u32) -> bool {
        let Some(endpoints) = self.endpoints else {
            return service.has_port(port);
        };
        let number = u16::try_from(port).ok();
        number
            .and_then(|number| endpoints.get(service.registered.as_str())?.get(&number))
            .is_some_and(|all| !all.is_empty())
    }

    /// Whether somebody answers at any of its ports.
    pub(super) fn answers_at_all(&self, service: &Service<'_>) -> bool {
        let ports = service.ports.iter();
        ports
            .map(|(number, ..)| u32::from(*number))
            .any(|port| self.answers(service, port))
    }

    /// Service ports that lead to this port of the workload.
    pub(super) fn leads_to(&self, service: &Service<'_>, workload_port: u32) -> Vec<u16> {
        let known = self
            .endpoints
            .and_then(|all| all.get(service.registered.as_str()));
        let leads = |(number, _, target): &&(u16, &str, Option<u16>)| match known {
            Some(ports) => ports.get(number).is_some_and(|all| {
                all.iter()
                    .any(|endpoint| u32::from(endpoint.port) == workload_port)
            }),
            None => target.is_some_and(|target| u32::from(target) == workload_port),
        };
        service
            .ports
            .iter()
            .filter(leads)
            .map(|(number, ..)| *number)
            .collect()
    }

    /// The Service that all Gateways of a class share.
    pub(super) fn shared_service(&self, class: &str) -> Option<&str> {
        self.services
            .iter()
            .find(|(_, service)| service.classes.contains(&class))
            .map(|(host, _)| host.as_str())
    }

    pub(super) fn is_shared(&self, host: &str, class: &str) -> bool {
        self.services
            .get(host)
            .is_some_and(|service| service.classes.contains(&class))
    }

    /// The status that an object of the Gateway API carries.
    pub(super) fn status_of(&self, key: &Key) -> &'a Value {
        self.statuses.get(key).copied().unwrap_or(&Value::Null)
    }

    pub(super) fn entry(&self, namespace: &str, name: &str) -> Option<&'a ServiceEntry> {
        self.entries.get(&(namespace, name)).copied()
    }

    pub(super) fn secret(&self, namespace: &str, name: &str) -> Option<&'a Secret> {
        self.secrets.get(&(namespace, name)).copied()
    }

    pub(super) fn config_map(&self, namespace: &str, name: &str) -> Option<&'a ConfigMap> {
        self.config_maps.get(&(namespace, name)).copied()
    }

    pub(super) fn has_pool(&self, namespace: &str, name: &str) -> bool {
        self.pools.contains(&(namespace, name))
    }

    /// What becomes of Gateways of a class; `None`: they are not ours.
    pub(super) fn class(&self, name: &str) -> Option<Class> {
        match self.classes.get(name) {
            Some(controller) => Class::of_controller(controller),
            None => Class::builtin(name),
        }
    }

    pub(super) fn gateways(&self) -> impl Iterator<Item = Of<'a, Gateway>> {
        self.objects
            .iter()
            .filter_map(|(object, spec)| match &spec.kind {
                Kind::Gateway(gateway) => Some((*object, &**gateway)),
                _ => None,
            })
    }

    /// Namespaces whose labels fit, by name.
    pub(super) fn select(&self, selector: &Selector) -> Vec<&'a str> {
        self.namespaces
            .iter()
            .filter(|(_, labels)| fits(selector, labels))
            .map(|(name, _)| *name)
            .collect()
    }

    pub(super) fn selects(&self, selector: &Selector, namespace: &str) -> bool {
        self.namespaces
            .get(namespace)
            .is_some_and(|labels| fits(selector, labels))
    }

    /// Whether an object of a kind may refer to another in another namespace.
    pub(super) fn granted(
        &self,
        (from_kind, from_namespace): (&str, &str),
        (to_group, to_kind): (&str, &str),
        (to_namespace, to_name): (&str, &str),
    ) -> bool {
        self.grants
            .iter()
            .filter(|(namespace, _)| *namespace == to_namespace)
            .any(|(_, grant)| {
                let from = grant.from.iter().any(|from| {
                    from.group == lateen_config::gateway_api::GROUP
                        && from.kind == from_kind
                        && from.namespace == from_namespace
                });
                from && grant.to.iter().any(|to| {
                    to.group == to_group
                        && to.kind == to_kind
                        && to.name.as_deref().is_none_or(|name| name == to_name)
                })
            })
    }
}

fn classes_of(object: &Object) -> Vec<&str> {
    object
        .annotations
        .get(CLASSES)
        .map(|list| list.split(',').map(str::trim).collect())
        .unwrap_or_default()
}

fn fits(selector: &Selector, labels: &Labels) -> bool {
    let equal = selector
        .match_labels
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().all(|expression| {
            let value = labels.get(&expression.key);
            let listed = value.is_some_and(|value| expression.values.contains(value));
            match expression.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                // Kubernetes: a selector that makes no sense selects nothing.
                _ => false,
            }
        })
}

/// Group and kind of a reference, with its defaults.
pub(super) fn target<'a>(
    group: &'a Option<String>,
    kind: &'a Option<String>,
    default: (&'static str, &'static str),
) -> (&'a str, &'a str) {
    (
        group.as_deref().unwrap_or(default.0),
        kind.as_deref().unwrap_or(default.1),
    )
}

/// Name of the Service that stands for an InferencePool, as Istio makes it: hashed, for there may be a Service of the
/// pool's own name.
pub(super) fn pool_service(pool: &str) -> String {
    /// DNS labels are no longer.
    const LIMIT: usize = 63;
    const SEPARATOR: &str = "-ip-";
    const HASH: usize = 8;
    let hash = hex::encode(Sha256::digest(pool.as_bytes()));
    let hash = hash.get(..HASH).unwrap_or_default();
    let room = LIMIT - SEPARATOR.len() - HASH;
    let pool = pool.get(..room).unwrap_or(pool);
    format!("{pool}{SEPARATOR}{hash}")
}

/// Group and kind of a reference to an InferencePool.
pub(super) const POOL: (&str, &str) = (INFERENCE_GROUP, "InferencePool");
