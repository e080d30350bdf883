//! Analysis: what is wrong with objects taken together, in the words of `istioctl analyze`.
//!
//! Unlike [`crate::review`], which judges one object as an API server would, this looks at everything
//! that was given, Kubernetes' kinds too. Messages carry Istio's codes, so that what operators know and
//! their tools expect still holds. Nothing here refuses anything.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::object::Labels;
use crate::review::{self, At, text};
use crate::yaml::{SyntaxError, documents};

mod routing;
mod gateway;
mod workload;
mod service;
mod policy;
mod platform;

/// Where mesh-wide objects live unless the mesh configuration says otherwise.
const ROOT_NAMESPACE: &str = "istio-system";

/// How urgent a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Worth knowing.
    Info,
    /// Probably not what is wanted.
    Warning,
    /// Does not work.
    Error,
}

impl Level {
    /// As Istio writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "Info",
            Self::Warning => "Warning",
            Self::Error => "Error",
        }
    }
}

/// One finding of the analysis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Istio's code, `IST0101`.
    pub code: &'static str,
    /// How urgent.
    pub level: Level,
    /// `KIND [NAMESPACE/]NAME`, as written.
    pub resource: String,
    /// What is wrong and what to do.
    pub text: String,
    /// File the resource is in.
    pub file: String,
    /// Line of the field, from 1.
    pub line: u32,
}

/// One document of the input.
#[derive(Clone, Debug)]
pub struct Resource {
    group: String,
    kind: String,
    namespace: String,
    name: String,
    labels: Labels,
    annotations: Labels,
    value: Value,
    file: String,
    line: u32,
    lines: BTreeMap<String, u32>,
}

impl Resource {
    /// Reads all of a text's documents that say what they are; a `List` is its items.
    ///
    /// # Errors
    /// The text is not YAML.
    pub fn read(file: &str, text: &str) -> Result<Vec<Self>, SyntaxError> {
        let mut all = Vec::new();
        for document in documents(text)? {
            let items = document.value.get("items").and_then(Value::as_array);
            match items {
                Some(items)
                    if document.value["kind"]
                        .as_str()
                        .is_some_and(|kind| kind.ends_with("List")) =>
                {
                    for (index, item) in items.iter().enumerate() {
                        let prefix = format!("items[{index}]");
                        let line = document
                            .lines
                            .get(&prefix)
                            .copied()
                            .unwrap_or(document.line);
                        let inner = format!("{prefix}.");
                        let lines = document
                            .lines
                            .iter()
                            .filter_map(|(path, line)| {
                                Some((path.strip_prefix(&inner)?.to_owned(), *line))
                            })
                            .collect();
                        all.extend(Self::of(file, line, lines, item.clone()));
                    }
                }
                _ => all.extend(Self::of(
                    file,
                    document.line,
                    document.lines,
                    document.value,
                )),
            }
        }
        Ok(all)
    }

    fn of(file: &str, line: u32, lines: BTreeMap<String, u32>, value: Value) -> Option<Self> {
        let api_version = value["apiVersion"].as_str()?;
        let metadata = &value["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Some(Self {
            group: api_version
                .split_once('/')
                .map_or("", |(group, _)| group)
                .to_owned(),
            kind: value["kind"].as_str()?.to_owned(),
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]),
            labels: strings(&metadata["labels"]),
            annotations: strings(&metadata["annotations"]),
            file: file.to_owned(),
            line,
            lines,
            value,
        })
    }

    fn spec(&self) -> At<'_> {
        At::new(&self.value["spec"], "spec")
    }

    /// A field of the document beside the spec.
    fn at(&self, name: &str) -> At<'_> {
        At::new(&self.value[name], name)
    }

    fn namespace(&self) -> &str {
        if self.namespace.is_empty() {
            "default"
        } else {
            &self.namespace
        }
    }

    /// The pod template of a Deployment, the spec of a Pod.
    fn pod_spec(&self) -> At<'_> {
        match self.kind.as_str() {
            "Pod" => self.spec(),
            _ => self.spec().get("template").get("spec"),
        }
    }

    fn shown(&self) -> String {
        if self.namespace.is_empty() {
            format!("{} {}", self.kind, self.name)
        } else {
            format!("{} {}/{}", self.kind, self.namespace, self.name)
        }
    }

    fn line_of(&self, field: &str) -> u32 {
        let mut path = field;
        while !path.is_empty() {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            path = path
                .rfind(['.', '['])
                .and_then(|end| path.get(..end))
                .unwrap_or_default();
        }
        self.line
    }
}

fn strings(value: &Value) -> Labels {
    value
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

/// Whether `selector` picks something with these labels.
fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Everything that is looked at, and what there is to say about it.
struct Mesh<'a> {
    resources: &'a [Resource],
    config: &'a Value,
    networks: &'a Value,
    messages: Vec<Message>,
}

impl<'a> Mesh<'a> {
    fn of(
        &self,
        group: &'static str,
        kind: &'static str,
    ) -> impl Iterator<Item = &'a Resource> + use<'a> {
        self.resources
            .iter()
            .filter(move |resource| resource.kind == kind && resource.group == group)
    }

    fn root(&self) -> &'a str {
        self.config["rootNamespace"]
            .as_str()
            .unwrap_or(ROOT_NAMESPACE)
    }

    fn report(
        &mut self,
        code: &'static str,
        resource: &Resource,
        field: &str,
        text: impl Into<String>,
    ) {
        self.messages.push(Message {
            code,
            level: level(code),
            resource: resource.shown(),
            text: text.into(),
            file: resource.file.clone(),
            line: resource.line_of(field),
        });
    }

    fn namespace_labels(&self, name: &str) -> Option<&'a Labels> {
        self.of("", "Namespace")
            .find(|namespace| namespace.name == name)
            .map(|namespace| &namespace.labels)
    }

    /// Whether sidecars are put into a namespace's pods.
    fn injects(&self, namespace: &str) -> bool {
        self.namespace_labels(namespace).is_some_and(|labels| {
            labels.get("istio-injection").map(String::as_str) == Some("enabled")
                || labels.contains_key("istio.io/rev") && labels.get("istio-injection").is_none()
        })
    }

    /// Whether a pod with this metadata in this namespace gets a sidecar.
    fn injects_pod(&self, namespace: &str, labels: &Labels, annotations: &Labels) -> bool {
        const INJECT: &str = "sidecar.istio.io/inject";
        match labels
            .get(INJECT)
            .or_else(|| annotations.get(INJECT))
            .map(String::as_str)
        {
            Some("false") => false,
            Some("true") if labels.contains_key(INJECT) => true,
            _ => self.injects(namespace),
        }
    }

    /// Pods of the gateway that is there by default, which Istio knows without being shown.
    fn is_default_gateway(selector: &Labels) -> bool {
        selector.len() == 1 && selector.get("istio").map(String::as_str) == Some("ingressgateway")
    }
}

fn level(code: &str) -> Level {
    match code {
        "IST0102" | "IST0118" | "IST0131" | "IST0135" | "IST0136" | "IST0148" | "IST0164" => {
            Level::Info
        }
        "IST0101" | "IST0106" | "IST0109" | "IST0110" | "IST0111" | "IST0112" | "IST0126"
        | "IST0139" | "IST0143" | "IST0145" | "IST0147" | "IST0149" | "IST0152" | "IST0153"
        | "IST0154" | "IST0159" | "IST0160" | "IST0161" | "IST0173" => Level::Error,
        _ => Level::Warning,
    }
}

type Analyzer = fn(&mut Mesh<'_>);

/// By Istio's names of the analyzers.
const ANALYZERS: &[(&str, Analyzer)] = &[
    ("schema.ValidationAnalyzer", schema),
    ("deprecation.FieldAnalyzer", deprecation),
    (
        "virtualservice.DestinationHostAnalyzer",
        routing::destination_hosts,
    ),
    (
        "virtualservice.DestinationRuleAnalyzer",
        routing::destination_rules,
    ),
    ("virtualservice.GatewayAnalyzer", routing::gateways),
    (
        "virtualservice.JWTClaimRouteAnalyzer",
        routing::claim_routes,
    ),
    (
        "virtualservice.ConflictingMeshGatewayHostsAnalyzer",
        routing::conflicting_hosts,
    ),
    (
        "destinationrule.CaCertificateAnalyzer",
        routing::certificates,
    ),
    (
        "destinationrule.PodNotSelectedAnalyzer",
        routing::subsets_without_pods,
    ),
    ("serviceentry.ProtocolAddressesAnalyzer", routing::addresses),
    ("gateway.IngressGatewayPortAnalyzer", gateway::ports),
    ("gateway.SecretAnalyzer", gateway::secrets),
    ("gateway.ConflictingGatewayAnalyzer", gateway::conflicts),
    (
        "gateway.CertificateAnalyzer",
        gateway::duplicate_certificates,
    ),
    ("k8sgateway.SelectorAnalyzer", gateway::selectors),
    ("sidecar.SelectorAnalyzer", workload::sidecars),
    ("telemetry.SelectorAnalyzer", workload::telemetries),
    ("injection.Analyzer", workload::injection),
    ("injection.ImageAutoAnalyzer", workload::image_auto),
    (
        "deployment.ServiceAssociationAnalyzer",
        service::association,
    ),
    ("deployment.ApplicationUIDAnalyzer", service::user_ids),
    ("service.PortNameAnalyzer", service::port_names),
    ("authz.AuthorizationPoliciesAnalyzer", policy::authorization),
    ("telemetry.ProviderAnalyzer", policy::providers),
    ("envoyfilter.EnvoyPatchAnalyzer", policy::envoy_patches),
    ("multicluster.MeshNetworksAnalyzer", platform::mesh_networks),
    (
        "externalcontrolplane.ExternalControlPlaneAnalyzer",
        platform::external_control_plane,
    ),
    ("webhook.Analyzer", platform::webhooks),
];

/// The names of the analyzers, in the order in which they run.
pub fn analyzers() -> impl Iterator<Item = &'static str> {
    ANALYZERS.iter().map(|(name, _)| *name)
}

/// What to look at.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// All objects.
    pub resources: Vec<Resource>,
    /// The mesh configuration; `null`: that of the ConfigMap `istio`, if it is among the objects.
    pub mesh_config: Value,
    /// The mesh networks; `null`: those of that ConfigMap.
    pub mesh_networks: Value,
}

/// Runs the analyzers that are named, or all if none is; messages by file and line.
#[must_use]
pub fn analyze(input: &Input, only: &[String]) -> Vec<Message> {
    let written = |key: &str| {
        input
            .resources
            .iter()
            .find(|resource| resource.kind == "ConfigMap" && resource.name == "istio")
            .and_then(|map| map.value["data"][key].as_str())
            .and_then(|text| documents(text).ok()?.into_iter().next())
            .map_or(Value::Null, |document| document.value)
    };
    let or_written = |given: &Value, key: &str| {
        if given.is_null() {
            written(key)
        } else {
            given.clone()
        }
    };
    let config = or_written(&input.mesh_config, "mesh");
    let networks = or_written(&input.mesh_networks, "meshNetworks");
    let mut mesh = Mesh {
        resources: &input.resources,
        config: &config,
        networks: &networks,
        messages: Vec::new(),
    };
    for (name, analyzer) in ANALYZERS {
        // Istio has a validation analyzer for each collection, which names it.
        let is_named = |wanted: &String| {
            wanted == name
                || *name == "schema.ValidationAnalyzer" && wanted.starts_with("schemaValidation.")
        };
        if only.is_empty() || only.iter().any(is_named) {
            analyzer(&mut mesh);
        }
    }
    let mut messages = mesh.messages;
    messages.sort_by(|a, b| (&a.file, a.line, a.code).cmp(&(&b.file, b.line, b.code)));
    messages
}

/// What admission says of each object alone: IST0106, IST0133, and unreachable routes.
fn schema(mesh: &mut Mesh<'_>) {
    for resource in mesh.resources {
        let findings = match review::review(&resource.value) {
            Ok(findings) => findings,
            Err(finding) => vec![finding],
        };
        for finding in findings {
            let code = match finding.message {
                Some("VirtualServiceUnreachableRule") => "IST0130",
                Some("VirtualServiceIneffectiveMatch") => "IST0131",
                _ if finding.is_error() => "IST0106",
                _ => "IST0133",
            };
            let text = finding.to_string();
            mesh.report(code, resource, &finding.field, text);
        }
    }
}

/// Fields that are on their way out: IST0002.
fn deprecation(mesh: &mut Mesh<'_>) {
    for resource in mesh.of("networking.istio.io", "VirtualService") {
        for route in resource.spec().get("http").items() {
            let delay = route.get("fault").get("delay").get("percent");
            if delay.int() > 0 {
                mesh.report(
                    "IST0002",
                    resource,
                    &delay.path,
                    "percent is deprecated; use percentage.value",
                );
            }
        }
    }
    for resource in mesh.of("networking.istio.io", "Sidecar") {
        let policy = resource.spec().get("outboundTrafficPolicy");
        if policy.has("egressProxy") {
            mesh.report(
                "IST0002",
                resource,
                &policy.path,
                "egressProxy is deprecated; use a Gateway for egress",
            );
        }
    }
}

/// `NAME.NAMESPACE.svc.cluster.local`, or the host itself if it is not short.
fn full_host(host: &str, namespace: &str) -> String {
    crate::reference::full_host(host, namespace)
}

/// Whether an `exportTo` (a list, or the comma-separated annotation of a Service) lets `namespace` see it.
fn is_visible(export_to: &[&str], own: &str, namespace: &str) -> bool {
    export_to.is_empty()
        || export_to.iter().any(|entry| match *entry {
            "*" => true,
            "." => own == namespace,
            named => named == namespace,
        })
}

/// Whether `pattern`, a namespace with `*` at an end, is `name`.
fn namespace_matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => true,
        (Some(end), _) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => pattern == name,
    }
}

/// Whether a host pattern covers a host.
fn covers(pattern: &str, host: &str) -> bool {
    text::covers(pattern, host)
}

#[cfg(test)]
mod tests;
