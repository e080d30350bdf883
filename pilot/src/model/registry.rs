//! Services, workloads and endpoints out of Kubernetes objects, ServiceEntries and WorkloadEntries.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use lateen_config::kubernetes::{self, IntOrString, Pod};
use lateen_config::networking::{
    Location, Resolution as EntryResolution, ServiceEntry, WorkloadEntry,
};
use lateen_config::{MeshConfig, Object, Spec};

use super::service::{
    Container, Endpoint, ExportTo, Labels, Port, Protocol, Registry, Resolution, Service, Target,
    TlsMode, Workload, selects,
};
use super::{DNS_DOMAIN, Status};

/// Label by which an injected workload says that its sidecar takes mTLS.
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

/// Service annotation of Istio for `exportTo`.
const EXPORT_TO_ANNOTATION: &str = "networking.istio.io/exportTo";

pub(super) struct Read {
    pub(super) services: BTreeMap<Arc<str>, Arc<Service>>,
    pub(super) workloads: BTreeMap<String, Arc<Workload>>,
    pub(super) endpoints: BTreeMap<Arc<str>, BTreeMap<u16, Vec<Endpoint>>>,
}

/// A workload with what only endpoints need.
struct Instance {
    workload: Workload,
    /// Of a WorkloadEntry: port name to number.
    ports: BTreeMap<String, u16>,
    weight: u32,
    locality: String,
    network: String,
    is_entry: bool,
}

pub(super) fn read(objects: &[Arc<Object>], mesh: &MeshConfig, status: &mut Status) -> Read {
    let mut services: BTreeMap<Arc<str>, Arc<Service>> = BTreeMap::new();
    let mut entries: BTreeMap<Arc<str>, (&ServiceEntry, &str)> = BTreeMap::new();

    // Kubernetes services first: they win over entries for the same host; then the oldest wins.
    for object in objects {
        if let Spec::Service(spec) = &object.spec {
            let service = kubernetes_service(object, spec, mesh);
            services.insert(service.hostname.clone(), Arc::new(service));
        }
    }
    for object in objects {
        let Spec::ServiceEntry(entry) = &object.spec else {
            continue;
        };
        for host in &entry.hosts {
            let service = entry_service(object, entry, host, mesh);
            match services.get(&service.hostname) {
                Some(winner) => status.conflicts.push(format!(
                    "{}:{}: host {host} of {} is already that of {} {}/{}",
                    object.origin.file,
                    object.origin.line_of("spec.hosts"),
                    object.key,
                    match winner.registry {
                        Registry::Kubernetes => "Service",
                        Registry::External => "ServiceEntry",
                    },
                    winner.namespace,
                    winner.name,
                )),
                None => {
                    entries.insert(service.hostname.clone(), (entry, &object.key.namespace));
                    services.insert(service.hostname.clone(), Arc::new(service));
                }
            }
        }
    }

    let mut instances = instances(objects, mesh, status);
    let mut endpoints: BTreeMap<Arc<str>, BTreeMap<u16, Vec<Endpoint>>> = BTreeMap::new();
    for service in services.values() {
        let entry = entries.get(&service.hostname).map(|(entry, _)| *entry);
        let mut ports = BTreeMap::new();
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol != Protocol::Udp)
        {
            let mut all = selected_endpoints(service, port, &instances);
            if let Some(entry) = entry {
                all.extend(listed_endpoints(service, port, entry, mesh));
            }
            all.sort_by(|a, b| {
                (&a.address, a.port, &a.labels).cmp(&(&b.address, b.port, &b.labels))
            });
            all.dedup();
            ports.insert(port.number, all);
        }
        if let Some((_, external_name)) = external_name(objects, service) {
            for port in &service.ports {
                ports.insert(
                    port.number,
                    vec![dns_endpoint(service, port, external_name)],
                );
            }
        }
        endpoints.insert(service.hostname.clone(), ports);
    }

    for instance in &mut instances {
        instance.workload.services = services
            .values()
            .filter(|service| service.namespace == instance.workload.namespace)
            .filter(|service| {
                !service.selector.is_empty()
                    && selects(&service.selector, &instance.workload.labels)
            })
            .map(|service| service.hostname.clone())
            .collect();
    }
    let workloads = instances
        .into_iter()
        .map(|instance| (instance.workload.uid.clone(), Arc::new(instance.workload)))
        .collect();
    Read {
        services,
        workloads,
        endpoints,
    }
}

fn kubernetes_service(object: &Object, spec: &kubernetes::Service, mesh: &MeshConfig) -> Service {
    let namespace = object.key.namespace.to_string();
    let mut addresses: Vec<String> = spec.cluster_ips.clone();
    if addresses.is_empty() {
        addresses.push(spec.cluster_ip.clone());
    }
    addresses.retain(|address| !address.is_empty() && address != "None");
    let export_to: Vec<String> = object
        .annotations
        .get(EXPORT_TO_ANNOTATION)
        .map(|list| list.split(',').map(|item| item.trim().to_owned()).collect())
        .unwrap_or_default();
    let is_external_name = spec.service_type == "ExternalName";
    Service {
        hostname: format!("{}.{namespace}.svc.{DNS_DOMAIN}", object.key.name).into(),
        name: object.key.name.to_string(),
        export_to: ExportTo::of(&export_to, &namespace, &mesh.default_service_export_to),
        namespace,
        labels: object.labels.clone(),
        selector: if is_external_name {
            Labels::new()
        } else {
            spec.selector.clone()
        },
        ports: spec
            .ports
            .iter()
            .map(|port| Port {
                name: port.name.clone(),
                number: port.port,
                protocol: Protocol::of_service_port(
                    port.app_protocol.as_deref(),
                    &port.name,
                    port.port,
                    &port.protocol,
                ),
                target: match &port.target_port {
                    None => Target::Number(port.port),
                    Some(IntOrString::Int(0)) => Target::Number(port.port),
                    Some(IntOrString::Int(number)) => Target::Number(*number),
                    Some(IntOrString::String(text)) => match text.parse() {
                        Ok(number) => Target::Number(number),
                        Err(_) => Target::Named(text.clone()),
                    },
                },
            })
            .collect(),
        addresses,
        headless: spec.cluster_ip == "None",
        resolution: if is_external_name {
            Resolution::Dns
        } else if spec.cluster_ip == "None" {
            Resolution::Passthrough
        } else {
            Resolution::Endpoints
        },
        external: is_external_name,
        registry: Registry::Kubernetes,
        subject_alt_names: Vec::new(),
    }
}

fn entry_service(object: &Object, entry: &ServiceEntry, host: &str, mesh: &MeshConfig) -> Service {
    let namespace = object.key.namespace.to_string();
    Service {
        hostname: host.to_ascii_lowercase().into(),
        name: object.key.name.to_string(),
        export_to: ExportTo::of(
            &entry.export_to,
            &namespace,
            &mesh.default_service_export_to,
        ),
        namespace,
        labels: object.labels.clone(),
        selector: entry
            .workload_selector
            .as_ref()
            .map(|selector| selector.labels.clone())
            .unwrap_or_default(),
        ports: entry
            .ports
            .iter()
            .filter_map(|port| {
                let number = u16::try_from(port.number)
                    .ok()
                    .filter(|number| *number != 0)?;
                let target = u16::try_from(port.target_port)
                    .ok()
                    .filter(|target| *target != 0)
                    .unwrap_or(number);
                Some(Port {
                    name: port.name.clone(),
                    number,
                    protocol: Protocol::by_name(&port.protocol).unwrap_or_else(|| {
                        Protocol::of_service_port(None, &port.name, number, "TCP")
                    }),
                    target: Target::Number(target),
                })
            })
            .collect(),
        addresses: entry.addresses.clone(),
        headless: false,
        resolution: match entry.resolution {
            EntryResolution::None => Resolution::Passthrough,
            EntryResolution::Static => Resolution::Endpoints,
            // A wildcard's concrete name is known only when a request names it.
            EntryResolution::Dns | EntryResolution::DynamicDns => Resolution::Dns,
            EntryResolution::DnsRoundRobin => Resolution::DnsRoundRobin,
        },
        external: entry.location == Location::MeshExternal,
        registry: Registry::External,
        subject_alt_names: entry.subject_alt_names.clone(),
    }
}

fn external_name<'a>(
    objects: &'a [Arc<Object>],
    service: &Service,
) -> Option<(&'a Object, &'a str)> {
    if service.registry != Registry::Kubernetes || service.resolution != Resolution::Dns {
        return None;
    }
    objects.iter().find_map(|object| match &object.spec {
        Spec::Service(spec)
            if *object.key.name == *service.name
                && *object.key.namespace == *service.namespace
                && !spec.external_name.is_empty() =>
        {
            Some((&**object, spec.external_name.as_str()))
        }
        _ => None,
    })
}

/// Pods and WorkloadEntries, each namespace's own.
fn instances(objects: &[Arc<Object>], mesh: &MeshConfig, status: &mut Status) -> Vec<Instance> {
    let deployments: HashSet<(&str, &str)> = objects
        .iter()
        .filter(|object| matches!(object.spec, Spec::Deployment(_)))
        .map(|object| (&*object.key.namespace, &*object.key.name))
        .collect();
    let mut all = Vec::new();
    for object in objects {
        match &object.spec {
            Spec::Pod(pod) => {
                if pod.status.pod_ip.is_empty() {
                    status.pods_without_address += 1;
                    continue;
                }
                all.push(Instance {
                    workload: pod_workload(object, pod, &deployments, mesh),
                    ports: BTreeMap::new(),
                    weight: 1,
                    locality: String::new(),
                    network: String::new(),
                    is_entry: false,
                });
            }
            Spec::WorkloadEntry(entry) => all.push(Instance {
                workload: entry_workload(object, entry, mesh),
                ports: entry_ports(entry),
                weight: entry.weight.max(1),
                locality: entry.locality.clone(),
                network: entry.network.clone(),
                is_entry: true,
            }),
            _ => {}
        }
    }
    all
}

fn pod_workload(
    object: &Object,
    pod: &Pod,
    deployments: &HashSet<(&str, &str)>,
    mesh: &MeshConfig,
) -> Workload {
    let namespace = object.key.namespace.to_string();
    let name = object.key.name.to_string();
    let account = pod.spec.account().to_owned();
    let (workload_name, owner) = owner(object, pod, deployments);
    Workload {
        uid: format!("kubernetes://{name}.{namespace}"),
        address: pod.status.pod_ip.clone(),
        spiffe_id: spiffe_id(mesh, &namespace, &account),
        service_account: account,
        workload_name,
        owner,
        services: Vec::new(),
        containers: pod
            .spec
            .containers
            .iter()
            .map(|container| Container {
                name: container.name.clone(),
                ports: container
                    .ports
                    .iter()
                    .map(|port| (port.name.clone(), port.container_port))
                    .collect(),
            })
            .collect(),
        tls_mode: tls_mode(&object.labels),
        ready: pod.is_ready(),
        labels: Arc::new(object.labels.clone()),
        name,
        namespace,
    }
}

/// What made a pod, as Kubernetes' users name it: the Deployment behind a ReplicaSet.
fn owner(object: &Object, pod: &Pod, deployments: &HashSet<(&str, &str)>) -> (String, String) {
    let namespace = &*object.key.namespace;
    let Some(owner) = pod.owner_references.first() else {
        return (
            object.key.name.to_string(),
            format!(
                "kubernetes://apis/v1/namespaces/{namespace}/pods/{}",
                object.key.name
            ),
        );
    };
    let (kind, name) = if owner.kind == "ReplicaSet" {
        let hash = object
            .labels
            .get("pod-template-hash")
            .map(|hash| format!("-{hash}"));
        let stripped = hash.and_then(|hash| owner.name.strip_suffix(&hash));
        let known = |name: &&str| deployments.contains(&(namespace, *name));
        let by_name = Some(owner.name.as_str()).filter(known).or_else(|| {
            owner
                .name
                .rsplit_once('-')
                .map(|(stem, _)| stem)
                .filter(known)
        });
        match stripped.or(by_name) {
            Some(deployment) => ("Deployment", deployment),
            None => ("ReplicaSet", owner.name.as_str()),
        }
    } else {
        (owner.kind.as_str(), owner.name.as_str())
    };
    let version = if owner.api_version.is_empty() {
        "apps/v1"
    } else {
        owner.api_version.as_str()
    };
    let uid = format!(
        "kubernetes://apis/{version}/namespaces/{namespace}/{}s/{name}",
        kind.to_ascii_lowercase()
    );
    (name.to_owned(), uid)
}

fn entry_workload(object: &Object, entry: &WorkloadEntry, mesh: &MeshConfig) -> Workload {
    let namespace = object.key.namespace.to_string();
    let name = object.key.name.to_string();
    let account = match entry.service_account.as_str() {
        "" => "default".to_owned(),
        account => account.to_owned(),
    };
    // The entry's labels and its metadata's count alike.
    let mut labels = object.labels.clone();
    labels.extend(entry.labels.clone());
    Workload {
        uid: format!("kubernetes://{name}.{namespace}"),
        address: entry.address.clone(),
        spiffe_id: spiffe_id(mesh, &namespace, &account),
        service_account: account,
        workload_name: name.clone(),
        owner: String::new(),
        services: Vec::new(),
        containers: vec![Container {
            name: String::new(),
            ports: entry_ports(entry).into_iter().collect(),
        }],
        tls_mode: tls_mode(&labels),
        ready: true,
        labels: Arc::new(labels),
        name,
        namespace,
    }
}

fn entry_ports(entry: &WorkloadEntry) -> BTreeMap<String, u16> {
    entry
        .ports
        .iter()
        .filter_map(|(name, number)| {
            Some((
                name.clone(),
                u16::try_from(*number).ok().filter(|number| *number != 0)?,
            ))
        })
        .collect()
}

fn tls_mode(labels: &Labels) -> TlsMode {
    match labels.get(TLS_MODE_LABEL).map(String::as_str) {
        Some("istio") => TlsMode::Istio,
        _ => TlsMode::Disabled,
    }
}

fn spiffe_id(mesh: &MeshConfig, namespace: &str, account: &str) -> String {
    let trust_domain = match mesh.trust_domain.as_str() {
        "" => DNS_DOMAIN,
        named => named,
    };
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}

/// Ready workloads that a service's selector selects, in its own namespace.
fn selected_endpoints(service: &Service, port: &Port, instances: &[Instance]) -> Vec<Endpoint> {
    if service.selector.is_empty() {
        return Vec::new();
    }
    instances
        .iter()
        .filter(|instance| {
            instance.workload.namespace == service.namespace && instance.workload.ready
        })
        .filter(|instance| selects(&service.selector, &instance.workload.labels))
        .filter_map(|instance| {
            let workload = &instance.workload;
            let number = match instance.ports.get(&port.name) {
                Some(number) => *number,
                None if instance.is_entry => match &port.target {
                    Target::Number(number) => *number,
                    Target::Named(name) => *instance.ports.get(name)?,
                },
                None => workload.resolve(&port.target)?,
            };
            Some(Endpoint {
                address: workload.address.clone(),
                port: number,
                service_port: port.number,
                labels: workload.labels.clone(),
                namespace: workload.namespace.clone(),
                spiffe_id: Some(workload.spiffe_id.clone()),
                tls_mode: workload.tls_mode,
                workload_name: workload.workload_name.clone(),
                weight: instance.weight,
                locality: instance.locality.clone(),
                network: instance.network.clone(),
            })
        })
        .collect()
}

/// Endpoints a ServiceEntry lists itself; of a DNS one that lists none, its host.
fn listed_endpoints(
    service: &Service,
    port: &Port,
    entry: &ServiceEntry,
    mesh: &MeshConfig,
) -> Vec<Endpoint> {
    let dns = matches!(
        service.resolution,
        Resolution::Dns | Resolution::DnsRoundRobin
    );
    if entry.endpoints.is_empty() {
        let concrete = !service.hostname.starts_with('*');
        return if dns && concrete && service.selector.is_empty() {
            vec![dns_endpoint(service, port, &service.hostname)]
        } else {
            Vec::new()
        };
    }
    let target = match port.target {
        Target::Number(number) => number,
        Target::Named(_) => port.number,
    };
    entry
        .endpoints
        .iter()
        .map(|endpoint| {
            let unix = endpoint.address.starts_with("unix://");
            let number = entry_ports(endpoint)
                .get(&port.name)
                .copied()
                .unwrap_or(target);
            Endpoint {
                address: endpoint.address.clone(),
                port: if unix { 0 } else { number },
                service_port: port.number,
                labels: Arc::new(endpoint.labels.clone()),
                namespace: service.namespace.clone(),
                spiffe_id: (!endpoint.service_account.is_empty())
                    .then(|| spiffe_id(mesh, &service.namespace, &endpoint.service_account)),
                tls_mode: tls_mode(&endpoint.labels),
                workload_name: service.name.clone(),
                weight: endpoint.weight.max(1),
                locality: endpoint.locality.clone(),
                network: endpoint.network.clone(),
            }
        })
        .collect()
}

fn dns_endpoint(service: &Service, port: &Port, name: &str) -> Endpoint {
    Endpoint {
        address: name.to_owned(),
        port: match port.target {
            Target::Number(number) => number,
            Target::Named(_) => port.number,
        },
        service_port: port.number,
        labels: Arc::default(),
        namespace: service.namespace.clone(),
        spiffe_id: None,
        tls_mode: TlsMode::Disabled,
        workload_name: service.name.clone(),
        weight: 1,
        locality: String::new(),
        network: String::new(),
    }
}
