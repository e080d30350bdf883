//! VirtualServices by host and gateway, DestinationRules by client and host.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::networking::{DestinationRule, Subset, VirtualService};
use lateen_config::{MeshConfig, Object, Spec};

use crate::gateway_api::ROUTE_SEMANTICS;

use super::service::{ExportTo, Labels, selects};
use super::{Status, full_host};

/// The gateway name that means every sidecar.
const MESH: &str = "mesh";

/// A VirtualService with its names completed.
#[derive(Debug)]
pub struct Routes {
    /// The object.
    pub object: Arc<Object>,
    /// Full hosts, possibly beginning with `*`.
    pub hosts: Vec<String>,
    /// `mesh`, or `NAMESPACE/NAME` of a Gateway.
    pub gateways: Vec<String>,
    /// Who sees it.
    pub export_to: ExportTo,
}

impl Routes {
    /// What it says.
    ///
    /// # Panics
    /// Never: only VirtualServices become `Routes`.
    #[must_use]
    pub fn spec(&self) -> &VirtualService {
        match &self.object.spec {
            Spec::VirtualService(spec) => spec,
            other => unreachable!("Routes are made of VirtualServices, not of {other:?}"),
        }
    }

    /// Whether it is made of Gateway API routes, whose rules it follows where Istio's are others.
    #[must_use]
    pub fn is_gateway_api(&self) -> bool {
        self.made_of("gateway")
    }

    /// Whether prefixes of paths are whole segments: `/a` is not for `/ab`. So in Gateway API and Ingress.
    #[must_use]
    pub fn matches_segments(&self) -> bool {
        self.is_gateway_api() || self.made_of("ingress")
    }

    fn made_of(&self, kind: &str) -> bool {
        self.object
            .annotations
            .get(ROUTE_SEMANTICS)
            .is_some_and(|semantics| semantics == kind)
    }

    /// Namespace of the object: completes the short hosts in it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.object.key.namespace
    }
}

/// What DestinationRules of one namespace say about one host, merged.
#[derive(Debug)]
pub struct DestinationPolicy {
    /// Full host, possibly beginning with `*`.
    pub host: String,
    /// Namespace of the rules.
    pub namespace: String,
    /// The rule: traffic policy of the oldest that has one, subsets of all.
    pub rule: DestinationRule,
    /// Who sees it.
    pub export_to: ExportTo,
    /// The objects it was merged from, oldest first.
    pub objects: Vec<Arc<Object>>,
}

impl DestinationPolicy {
    /// The subset of that name.
    #[must_use]
    pub fn subset(&self, name: &str) -> Option<&Subset> {
        self.rule.subsets.iter().find(|subset| subset.name == name)
    }

    fn selector(&self) -> Option<&Labels> {
        self.rule
            .workload_selector
            .as_ref()
            .map(|selector| &selector.labels)
            .filter(|labels| !labels.is_empty())
    }
}

/// All routing objects, indexed.
#[derive(Debug, Default)]
pub struct Routing {
    virtual_services: Vec<Arc<Routes>>,
    by_name: BTreeMap<(String, String), Arc<Routes>>,
    mesh_by_host: BTreeMap<String, Vec<Arc<Routes>>>,
    by_gateway: BTreeMap<String, Vec<Arc<Routes>>>,
    /// By namespace, then by host.
    destinations: BTreeMap<String, BTreeMap<String, Vec<Arc<DestinationPolicy>>>>,
}

impl Routing {
    pub(super) fn read(objects: &[Arc<Object>], mesh: &MeshConfig, status: &mut Status) -> Self {
        let mut routing = Self::default();
        for object in objects {
            match &object.spec {
                Spec::VirtualService(spec) => {
                    routing.add_virtual_service(object, spec, mesh, status)
                }
                Spec::DestinationRule(spec) => {
                    routing.add_destination_rule(object, spec, mesh, status)
                }
                _ => {}
            }
        }
        routing
    }

    fn add_virtual_service(
        &mut self,
        object: &Arc<Object>,
        spec: &VirtualService,
        mesh: &MeshConfig,
        status: &mut Status,
    ) {
        let namespace = &*object.key.namespace;
        let gateways = if spec.gateways.is_empty() {
            vec![MESH.to_owned()]
        } else {
            spec.gateways
                .iter()
                .map(|gateway| full_gateway(gateway, namespace))
                .collect()
        };
        let routes = Arc::new(Routes {
            object: object.clone(),
            hosts: spec
                .hosts
                .iter()
                .map(|host| full_host(&host.to_ascii_lowercase(), namespace))
                .collect(),
            gateways,
            export_to: ExportTo::of(
                &spec.export_to,
                namespace,
                &mesh.default_virtual_service_export_to,
            ),
        });
        self.by_name.insert(
            (namespace.to_owned(), object.key.name.to_string()),
            routes.clone(),
        );
        for gateway in &routes.gateways {
            if gateway != MESH {
                self.by_gateway
                    .entry(gateway.clone())
                    .or_default()
                    .push(routes.clone());
                continue;
            }
            for host in &routes.hosts {
                let all = self.mesh_by_host.entry(host.clone()).or_default();
                if let Some(winner) = all
                    .iter()
                    .find(|other| other.export_to == ExportTo::Everyone)
                {
                    status.conflicts.push(format!(
                        "{}:{}: host {host} of {} is already routed by {}, which is older and wins",
                        object.origin.file,
                        object.origin.line_of("spec.hosts"),
                        object.key,
                        winner.object.key,
                    ));
                }
                all.push(routes.clone());
            }
        }
        self.virtual_services.push(routes);
    }

    fn add_destination_rule(
        &mut self,
        object: &Arc<Object>,
        spec: &DestinationRule,
        mesh: &MeshConfig,
        status: &mut Status,
    ) {
        let namespace = &*object.key.namespace;
        let host = full_host(&spec.host.to_ascii_lowercase(), namespace);
        let export_to = ExportTo::of(
            &spec.export_to,
            namespace,
            &mesh.default_destination_rule_export_to,
        );
        let policies = self
            .destinations
            .entry(namespace.to_owned())
            .or_default()
            .entry(host.clone())
            .or_default();
        // Rules for the same clients merge; those for others stand beside each other.
        let same = policies.iter_mut().find(|other| {
            other.export_to == export_to && other.rule.workload_selector == spec.workload_selector
        });
        let Some(policy) = same.and_then(Arc::get_mut) else {
            policies.push(Arc::new(DestinationPolicy {
                host,
                namespace: namespace.to_owned(),
                rule: spec.clone(),
                export_to,
                objects: vec![object.clone()],
            }));
            return;
        };
        for subset in &spec.subsets {
            if policy
                .rule
                .subsets
                .iter()
                .any(|other| other.name == subset.name)
            {
                status.conflicts.push(format!(
                    "{}:{}: subset {} of {} for {host} is already defined by an older rule, which wins",
                    object.origin.file,
                    object.origin.line_of("spec.subsets"),
                    subset.name,
                    object.key,
                ));
            } else {
                policy.rule.subsets.push(subset.clone());
            }
        }
        if policy.rule.traffic_policy.is_none() {
            policy.rule.traffic_policy.clone_from(&spec.traffic_policy);
        }
        policy.objects.push(object.clone());
    }

    /// All VirtualServices, oldest first.
    pub fn virtual_services(&self) -> impl Iterator<Item = &Arc<Routes>> {
        self.virtual_services.iter()
    }

    /// The VirtualService of that namespace and name: what a delegate names.
    #[must_use]
    pub fn named(&self, namespace: &str, name: &str) -> Option<&Arc<Routes>> {
        self.by_name.get(&(namespace.to_owned(), name.to_owned()))
    }

    pub(super) fn for_mesh(
        &self,
        hostname: &str,
        visible: impl Fn(&Routes) -> bool,
    ) -> Option<&Arc<Routes>> {
        patterns(hostname).find_map(|pattern| {
            self.mesh_by_host
                .get(pattern.as_str())?
                .iter()
                .find(|routes| visible(routes))
        })
    }

    /// Hosts which VirtualServices route in the mesh, with those VirtualServices, oldest first.
    pub fn mesh_hosts(&self) -> impl Iterator<Item = (&str, &[Arc<Routes>])> {
        self.mesh_by_host
            .iter()
            .map(|(host, all)| (host.as_str(), all.as_slice()))
    }

    pub(super) fn for_gateway(&self, gateway: &str) -> &[Arc<Routes>] {
        self.by_gateway.get(gateway).map_or(&[], Vec::as_slice)
    }

    pub(super) fn destination(
        &self,
        hostname: &str,
        client_namespace: &str,
        client_labels: &Labels,
        service_namespace: Option<&str>,
        root_namespace: &str,
    ) -> Option<&Arc<DestinationPolicy>> {
        // In the client's own namespace exportTo does not matter; elsewhere workload selectors do not.
        let own = |policy: &&Arc<DestinationPolicy>| {
            policy
                .selector()
                .is_none_or(|labels| selects(labels, client_labels))
        };
        let exported = |policy: &&Arc<DestinationPolicy>| {
            policy.selector().is_none() && policy.export_to.allows(client_namespace)
        };
        self.best(client_namespace, hostname, own)
            .or_else(|| self.best(service_namespace?, hostname, exported))
            .or_else(|| self.best(root_namespace, hostname, exported))
    }

    fn best(
        &self,
        namespace: &str,
        hostname: &str,
        fits: impl Fn(&&Arc<DestinationPolicy>) -> bool,
    ) -> Option<&Arc<DestinationPolicy>> {
        let hosts = self.destinations.get(namespace)?;
        patterns(hostname).find_map(|pattern| {
            let all = hosts.get(pattern.as_str())?;
            // One that selects this very workload wins over one for everybody.
            all.iter()
                .filter(&fits)
                .find(|policy| policy.selector().is_some())
                .or_else(|| all.iter().find(&fits))
        })
    }
}

/// `NAMESPACE/NAME` of a gateway as a VirtualService names it: alone, `NAMESPACE/NAME`, or the old
/// `NAME.NAMESPACE.svc.cluster.local`.
fn full_gateway(gateway: &str, namespace: &str) -> String {
    if gateway == MESH {
        return gateway.to_owned();
    }
    if let Some((own, name)) = gateway.split_once('/') {
        let own = if own == "." { namespace } else { own };
        return format!("{own}/{name}");
    }
    let mut parts = gateway.split('.');
    match (parts.next(), parts.next()) {
        (Some(name), Some(named)) => format!("{named}/{name}"),
        _ => format!("{namespace}/{gateway}"),
    }
}

/// The host itself, then every wildcard that covers it, most specific first.
fn patterns(hostname: &str) -> impl Iterator<Item = String> + '_ {
    let suffixes = hostname
        .char_indices()
        .filter(|(at, c)| *c == '.' && *at > 0)
        .map(move |(at, _)| format!("*{}", hostname.get(at..).unwrap_or_default()));
    std::iter::once(hostname.to_owned())
        .chain(suffixes)
        .chain(std::iter::once("*".to_owned()))
}

/// Whether a pattern, a host or `*` or `*.SUFFIX`, covers a host (which may be a wildcard itself).
#[must_use]
pub fn host_matches(pattern: &str, hostname: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => {
            let hostname = hostname.strip_prefix('*').unwrap_or(hostname);
            hostname.ends_with(suffix) && (suffix.is_empty() || hostname.len() >= suffix.len())
        }
        None => pattern == hostname,
    }
}
