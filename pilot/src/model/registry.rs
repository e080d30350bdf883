//! Services, workloads and endpoints out of Kubernetes objects, ServiceEntries and WorkloadEntries.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use lateen_config::kubernetes::{self, EndpointSlice, IntOrString, Pod};
use lateen_config::networking::{
    Location, Resolution as EntryResolution, ServiceEntry, WorkloadEntry,
};
use lateen_config::{MeshConfig, Object, Spec};

use super::service::{
    Container, Endpoint, ExportTo, Labels, Port, Preference, Protocol, Registry, Resolution,
    Service, Target, TlsMode, Workload, selects,
};
use super::{DNS_DOMAIN, Status};

/// Label by which an injected workload says that its sidecar takes mTLS.
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

/// Service annotation of Istio for `exportTo`.
const EXPORT_TO_ANNOTATION: &str = "networking.istio.io/exportTo";

/// Annotation of Services and ServiceEntries instead of `trafficDistribution`.
const PREFERENCE_ANNOTATION: &str = "networking.istio.io/traffic-distribution";

/// Label of a workload with its locality; `.` may stand for `/`.
const LOCALITY_LABEL: &str = "istio-locality";

/// Labels of a machine with region, zone and subzone; the older name second.
const MACHINE_LABELS: [[&str; 2]; 3] = [
    [
        "topology.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/region",
    ],
    [
        "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/zone",
    ],
    ["topology.istio.io/subzone", ""],
];

/// Label of an EndpointSlice with the name of its service.
const SLICE_SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Longest chain of ExternalNames that is followed.
const ALIAS_LIMIT: usize = 8;

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
    network: String,
    is_entry: bool,
}

pub(super) fn read(objects: &[Arc<Object>], mesh: &MeshConfig, status: &mut Status) -> Read {
    let mut services: BTreeMap<Arc<str>, Arc<Service>> = BTreeMap::new();
    // Of each host and port, the entry that says it.
    let mut entries: BTreeMap<(Arc<str>, u16), &ServiceEntry> = BTreeMap::new();

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
            match services.get_mut(&service.hostname) {
                // One host in several entries of one namespace: their ports come together.
                Some(winner) if adds_ports(winner, &service) => {
                    for port in &service.ports {
                        if winner.port(port.number).is_none() {
                            entries.insert((service.hostname.clone(), port.number), entry);
                            Arc::make_mut(winner).ports.push(port.clone());
                        }
                    }
                }
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
                    for port in &service.ports {
                        entries.insert((service.hostname.clone(), port.number), entry);
                    }
                    services.insert(service.hostname.clone(), Arc::new(service));
                }
            }
        }
    }

    find_aliases(objects, &mut services);
    let slices = endpoint_slices(objects);
    let machines = machines(objects);
    let mut instances = instances(objects, mesh, &machines, status);
    // The first of an address counts, as for whoever looks through all of them.
    let mut by_address: HashMap<(&str, &str), &Instance> = HashMap::new();
    for instance in &instances {
        let workload = &instance.workload;
        by_address
            .entry((&workload.namespace, &workload.address))
            .or_insert(instance);
    }
    let mut endpoints: BTreeMap<Arc<str>, BTreeMap<u16, Vec<Endpoint>>> = BTreeMap::new();
    for service in services.values() {
        let listed = (service.registry == Registry::Kubernetes)
            .then(|| slices.get(&(service.namespace.as_str(), service.name.as_str())))
            .flatten();
        let mut ports = BTreeMap::new();
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol != Protocol::Udp)
        {
            let mut all = match listed {
                Some(slices) => sliced_endpoints(service, port, slices, &by_address, &machines),
                None => selected_endpoints(service, port, &instances),
            };
            if let Some(entry) = entries.get(&(service.hostname.clone(), port.number)) {
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

/// Whether a ServiceEntry's host is the same service as one that is there, with further ports.
fn adds_ports(there: &Service, more: &Service) -> bool {
    there.registry == Registry::External
        && there.namespace == more.namespace
        && there.resolution == more.resolution
        && there.external == more.external
        && there.selector == more.selector
        && there.export_to == more.export_to
        && more
            .ports
            .iter()
            .any(|port| there.port(port.number).is_none())
}

/// ExternalNames of services that are known here are further names of those.
fn find_aliases(objects: &[Arc<Object>], services: &mut BTreeMap<Arc<str>, Arc<Service>>) {
    let names: BTreeMap<Arc<str>, Arc<str>> = objects
        .iter()
        .filter_map(|object| match &object.spec {
            Spec::Service(spec) if spec.service_type == "ExternalName" => {
                let target = spec
                    .external_name
                    .trim_end_matches('.')
                    .to_ascii_lowercase();
                Some((kubernetes_host(object).into(), target.into()))
            }
            _ => None,
        })
        .collect();
    for (alias, first) in &names {
        let mut target = first.clone();
        // Aliases of aliases; a circle ends nowhere.
        for _ in 0..ALIAS_LIMIT {
            match names.get(&target) {
                Some(next) => target = next.clone(),
                None => break,
            }
        }
        if names.contains_key(&target) || !services.contains_key(&target) {
            continue;
        }
        services.remove(alias);
        if let Some(service) = services.get_mut(&target) {
            Arc::make_mut(service).aliases.push(alias.clone());
        }
    }
}

fn kubernetes_host(object: &Object) -> String {
    format!(
        "{}.{}.svc.{DNS_DOMAIN}",
        object.key.name, object.key.namespace
    )
}

/// By namespace and name of the service.
fn endpoint_slices(objects: &[Arc<Object>]) -> BTreeMap<(&str, &str), Vec<&EndpointSlice>> {
    let mut all: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
    for object in objects {
        if let Spec::EndpointSlice(slice) = &object.spec
            && let Some(service) = object.labels.get(SLICE_SERVICE_LABEL)
        {
            all.entry((&object.key.namespace, service))
                .or_default()
                .push(slice);
        }
    }
    all
}

/// What Kubernetes says answers for a service, with what is known of the workload at each address.
fn sliced_endpoints(
    service: &Service,
    port: &Port,
    slices: &[&EndpointSlice],
    instances: &HashMap<(&str, &str), &Instance>,
    machines: &BTreeMap<&str, String>,
) -> Vec<Endpoint> {
    let mut all = Vec::new();
    for slice in slices {
        let Some(number) = slice
            .ports
            .iter()
            .find(|sliced| sliced.name == port.name)
            .and_then(|sliced| sliced.port)
        else {
            continue;
        };
        let ready = slice
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.conditions.ready != Some(false));
        let addresses =
            ready.flat_map(|endpoint| endpoint.addresses.iter().map(move |at| (endpoint, at)));
        for (endpoint, address) in addresses {
            let known = instances
                .get(&(service.namespace.as_str(), address.as_str()))
                .copied();
            let workload = known.map(|instance| &instance.workload);
            all.push(Endpoint {
                address: address.clone(),
                port: number,
                service_port: port.number,
                labels: workload.map_or_else(Arc::default, |workload| workload.labels.clone()),
                namespace: service.namespace.clone(),
                spiffe_id: workload.map(|workload| workload.spiffe_id.clone()),
                tls_mode: workload.map_or(TlsMode::Disabled, |workload| workload.tls_mode),
                workload_name: workload.map_or_else(
                    || service.name.clone(),
                    |workload| workload.workload_name.clone(),
                ),
                weight: known.map_or(1, |instance| instance.weight),
                locality: match workload.filter(|workload| !workload.locality.is_empty()) {
                    Some(workload) => workload.locality.clone(),
                    None => slice_locality(endpoint, machines),
                },
                network: known.map_or_else(String::new, |instance| instance.network.clone()),
                machine: endpoint.node_name.clone(),
            });
        }
    }
    all
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
        hostname: kubernetes_host(object).into(),
        aliases: Vec::new(),
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
        preference: Preference::by_name(
            object
                .annotations
                .get(PREFERENCE_ANNOTATION)
                .unwrap_or(&spec.traffic_distribution),
        ),
    }
}

fn entry_service(object: &Object, entry: &ServiceEntry, host: &str, mesh: &MeshConfig) -> Service {
    let namespace = object.key.namespace.to_string();
    Service {
        hostname: host.to_ascii_lowercase().into(),
        aliases: Vec::new(),
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
        preference: object
            .annotations
            .get(PREFERENCE_ANNOTATION)
            .and_then(|name| Preference::by_name(name)),
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

/// Localities of machines, by name.
fn machines(objects: &[Arc<Object>]) -> BTreeMap<&str, String> {
    objects
        .iter()
        .filter(|object| matches!(object.spec, Spec::Node(_)))
        .map(|object| {
            let parts = MACHINE_LABELS.map(|names| {
                let label = names.iter().find_map(|name| object.labels.get(*name));
                label.map_or("", String::as_str)
            });
            (&*object.key.name, joined(parts))
        })
        .collect()
}

/// `region/zone/subzone`, as far as there is something.
fn joined(parts: [&str; 3]) -> String {
    parts.join("/").trim_end_matches('/').to_owned()
}

/// A workload's own label before what is `known` otherwise.
fn locality(labels: &Labels, known: &str) -> String {
    match labels.get(LOCALITY_LABEL) {
        Some(label) if label.contains('/') => label.clone(),
        Some(label) if !label.is_empty() => label.replace('.', "/"),
        _ => known.to_owned(),
    }
}

/// Of an endpoint that no workload is known for: its machine's, else the zone with the region that a machine there
/// is in.
fn slice_locality(
    endpoint: &kubernetes::SliceEndpoint,
    machines: &BTreeMap<&str, String>,
) -> String {
    if let Some(locality) = machines.get(endpoint.node_name.as_str()) {
        return locality.clone();
    }
    if endpoint.zone.is_empty() {
        return String::new();
    }
    let mut regions = machines.values().filter_map(|locality| {
        let mut parts = locality.split('/');
        let region = parts.next()?;
        (parts.next()? == endpoint.zone).then_some(region)
    });
    format!("{}/{}", regions.next().unwrap_or_default(), endpoint.zone)
}

/// Pods and WorkloadEntries, each namespace's own.
fn instances(
    objects: &[Arc<Object>],
    mesh: &MeshConfig,
    machines: &BTreeMap<&str, String>,
    status: &mut Status,
) -> Vec<Instance> {
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
                    workload: pod_workload(object, pod, &deployments, mesh, machines),
                    ports: BTreeMap::new(),
                    weight: 1,
                    network: String::new(),
                    is_entry: false,
                });
            }
            Spec::WorkloadEntry(entry) => all.push(Instance {
                workload: entry_workload(object, entry, mesh),
                ports: entry_ports(entry),
                weight: entry.weight.max(1),
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
    machines: &BTreeMap<&str, String>,
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
        locality: locality(
            &object.labels,
            machines
                .get(pod.spec.node_name.as_str())
                .map_or("", String::as_str),
        ),
        machine: pod.spec.node_name.clone(),
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
        locality: locality(&labels, &entry.locality),
        machine: String::new(),
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
                locality: workload.locality.clone(),
                network: instance.network.clone(),
                machine: workload.machine.clone(),
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
                locality: locality(&endpoint.labels, &endpoint.locality),
                network: endpoint.network.clone(),
                machine: String::new(),
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
        machine: String::new(),
    }
}
