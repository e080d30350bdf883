//! Located documents into typed objects.
//!
//! Istio's kinds are read strictly, against [`crate::review`]'s schema: a field nobody knows is an error
//! naming it, for a misspelt field that is silently dropped is the worst kind of configuration bug. A
//! field that the API has and we do not is left out with a warning. Kubernetes' kinds are read for the
//! parts we need.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::envoy_filter::EnvoyFilter;
use crate::gateway_api::{self, GatewayApi, Kind};
use crate::kubernetes::{
    ConfigMap, IntOrString, Namespace, Node, OwnerReference, Pod, Service, ServiceAccount,
};
use crate::mesh::MeshConfig;
use crate::object::{Key, Labels, Object, Order, Origin, Spec};
use crate::policy::MixerObject;
use crate::problem::{Problem, Severity};
use crate::review::{self, Finding, Subject};
use crate::secret::Secret;
use crate::telemetry::Telemetry;
use crate::yaml::{Document, documents};

/// Kinds that other programs act on, or that change nothing in a mesh of ours: no warning for them.
const FOREIGN_KINDS: &[&str] = &[
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "Endpoints",
    "HorizontalPodAutoscaler",
    "Job",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "ReplicaSet",
    "Role",
    "RoleBinding",
];

/// Reads every object of a YAML file. `file` is how problems name it.
///
/// A file that is no YAML yields one problem and no object; a document that is wrong yields a problem
/// and the others stand.
#[must_use]
pub fn parse_file(file: &str, text: &str) -> (Vec<Object>, Vec<Problem>) {
    let file: Arc<str> = file.into();
    match documents(text) {
        Ok(documents) => {
            let mut objects = Vec::new();
            let mut problems = Vec::new();
            for document in documents {
                parse_document(&file, document, &mut objects, &mut problems);
            }
            (objects, problems)
        }
        Err(error) => (
            Vec::new(),
            vec![Problem {
                file,
                line: error.line,
                severity: Severity::Error,
                key: None,
                field: String::new(),
                reason: format!("not valid YAML: {}", error.reason),
                hint: "the last good version of this file stays in effect".into(),
            }],
        ),
    }
}

/// Reads one object that is in no file, as an API gives it. `origin` is how problems name where it is.
#[must_use]
pub fn parse_value(origin: &Arc<str>, value: &Value) -> (Option<Object>, Vec<Problem>) {
    let mut problems = Vec::new();
    let mut reader = Reader {
        origin: Origin {
            file: origin.clone(),
            line: 0,
            lines: Arc::default(),
        },
        key: None,
        in_schema: false,
        prunes: false,
        problems: &mut problems,
    };
    let object = reader.object(value);
    (object, problems)
}

fn parse_document(
    file: &Arc<str>,
    document: Document,
    objects: &mut Vec<Object>,
    problems: &mut Vec<Problem>,
) {
    // `kubectl get -o yaml` writes lists.
    if document.value.get("kind").and_then(Value::as_str) == Some("List")
        && let Some(Value::Array(items)) = document.value.get("items")
    {
        for (index, item) in items.iter().enumerate() {
            let prefix = format!("items[{index}].");
            let lines = document
                .lines
                .iter()
                .filter_map(|(path, line)| Some((path.strip_prefix(&prefix)?.to_owned(), *line)))
                .collect();
            let line = document
                .lines
                .get(prefix.trim_end_matches('.'))
                .copied()
                .unwrap_or(document.line);
            parse_document(
                file,
                Document {
                    line,
                    value: item.clone(),
                    lines,
                },
                objects,
                problems,
            );
        }
        return;
    }
    let mut reader = Reader {
        origin: Origin {
            file: file.clone(),
            line: document.line,
            lines: Arc::new(document.lines),
        },
        key: None,
        in_schema: false,
        prunes: false,
        problems,
    };
    if let Some(object) = reader.object(&document.value) {
        objects.push(object);
    }
}

struct Reader<'a> {
    origin: Origin,
    key: Option<Key>,
    /// Whether the shape has been checked, so that what cannot be read is our lack, not a fault.
    in_schema: bool,
    /// Whether an API server drops fields that the kind does not have.
    prunes: bool,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    fn report(&mut self, severity: Severity, field: &str, reason: impl Into<String>, hint: &str) {
        self.problems.push(Problem {
            file: self.origin.file.clone(),
            line: self.origin.line_of(field),
            severity,
            key: self.key.clone(),
            field: field.to_owned(),
            reason: reason.into(),
            hint: hint.to_owned(),
        });
    }

    fn refuse<T>(&mut self, field: &str, reason: impl Into<String>) -> Option<T> {
        self.report(Severity::Error, field, reason, "");
        None
    }

    fn object(&mut self, value: &Value) -> Option<Object> {
        let Value::Object(document) = value else {
            return self.refuse(
                "",
                "a document must be a map with apiVersion, kind and metadata",
            );
        };
        let text = |name: &str| {
            document
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        if kind.is_empty() || api_version.is_empty() {
            // Some other program's YAML, perhaps.
            self.report(
                Severity::Warning,
                "",
                "no apiVersion and kind that say what this is; ignored",
                "",
            );
            return None;
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let metadata = document.get("metadata").unwrap_or(&Value::Null);
        let meta = |name: &str| {
            metadata
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let name = meta("name");
        let namespace = match (kind, meta("namespace")) {
            (
                "Namespace" | "Node" | "MeshPolicy" | "ClusterRbacConfig" | "GatewayClass"
                | "IngressClass",
                _,
            ) => "",
            (_, "") => "default",
            (_, named) => named,
        };
        self.key = Some(Key {
            group: group.into(),
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        });
        if name.is_empty() {
            if is_read(group, kind) {
                return self.refuse("metadata.name", "missing");
            }
            return None;
        }
        let labels = self.strings(metadata, "labels")?;
        let annotations = self.strings(metadata, "annotations")?;
        let spec = self.spec((group, version, kind), document, metadata, &annotations)?;
        let timestamp = chrono::DateTime::parse_from_rfc3339(meta("creationTimestamp"))
            .map_or(i64::MAX, |time| time.timestamp());
        Some(Object {
            key: self.key.clone()?,
            version: version.to_owned(),
            labels,
            annotations,
            created: Order {
                timestamp,
                file: self.origin.file.clone(),
                line: self.origin.line,
            },
            origin: self.origin.clone(),
            spec,
            raw: Arc::new(document.get("spec").cloned().unwrap_or(Value::Null)),
        })
    }

    fn strings(&mut self, metadata: &Value, name: &str) -> Option<Labels> {
        let mut all = Labels::new();
        if let Some(Value::Object(map)) = metadata.get(name) {
            for (key, value) in map {
                match value {
                    Value::String(text) => {
                        all.insert(key.clone(), text.clone());
                    }
                    Value::Null => {}
                    _ => {
                        return self.refuse(
                            &format!("metadata.{name}.{key}"),
                            format!("must be a string, not {value}; put it in quotes"),
                        );
                    }
                }
            }
        }
        Some(all)
    }

    fn spec(
        &mut self,
        (group, version, kind): (&str, &str, &str),
        document: &serde_json::Map<String, Value>,
        metadata: &Value,
        annotations: &Labels,
    ) -> Option<Spec> {
        let written = document.get("spec").unwrap_or(&Value::Null);
        let normal;
        let message = review::schema::message_of(group, kind);
        let spec = match message {
            Some(message) => {
                normal = self.normal(message, document, version, written)?;
                &normal
            }
            None => {
                if group == "config.istio.io" {
                    let findings = review::top_level(document.keys());
                    self.take_over(findings)?;
                }
                written
            }
        };
        self.in_schema = message.is_some();
        Some(match (group, kind) {
            ("networking.istio.io", "VirtualService") => Spec::VirtualService(self.typed(spec)?),
            ("networking.istio.io", "DestinationRule") => Spec::DestinationRule(self.typed(spec)?),
            ("networking.istio.io", "Gateway") => Spec::Gateway(self.typed(spec)?),
            ("networking.istio.io", "ServiceEntry") => Spec::ServiceEntry(self.typed(spec)?),
            ("networking.istio.io", "WorkloadEntry") => Spec::WorkloadEntry(self.typed(spec)?),
            ("networking.istio.io", "Sidecar") => Spec::Sidecar(self.typed(spec)?),
            ("networking.istio.io", "EnvoyFilter") => {
                let mut filter: EnvoyFilter = self.typed(spec)?;
                filter.encode();
                Spec::EnvoyFilter(Box::new(filter))
            }
            ("telemetry.istio.io", "Telemetry") => {
                let mut telemetry: Telemetry = self.typed(spec)?;
                telemetry.read_conditions();
                Spec::Telemetry(Box::new(telemetry))
            }
            ("security.istio.io", "PeerAuthentication") => {
                Spec::PeerAuthentication(self.typed(spec)?)
            }
            ("security.istio.io", "RequestAuthentication") => {
                Spec::RequestAuthentication(self.typed(spec)?)
            }
            ("security.istio.io", "AuthorizationPolicy") => {
                Spec::AuthorizationPolicy(self.typed(spec)?)
            }
            ("authentication.istio.io", "Policy" | "MeshPolicy") => {
                Spec::AuthenticationPolicy(self.typed(spec)?)
            }
            ("config.istio.io", "QuotaSpec") => Spec::QuotaSpec(self.typed(spec)?),
            ("config.istio.io", "QuotaSpecBinding") => Spec::QuotaSpecBinding(self.typed(spec)?),
            ("config.istio.io", "RouteRule" | "DestinationPolicy" | "EgressRule") => {
                self.rules(spec, annotations)?;
                self.report(
                    Severity::Warning,
                    "kind",
                    format!("{kind} is of Istio 0.x and not served by this version; ignored"),
                    "write VirtualService, DestinationRule or ServiceEntry",
                );
                return None;
            }
            ("config.istio.io", _) => {
                // Some templates have nothing to say.
                let spec = match written {
                    Value::Null => Value::Object(serde_json::Map::new()),
                    Value::Object(_) => written.clone(),
                    _ => return self.refuse("spec", "must be a map"),
                };
                Spec::Mixer(MixerObject {
                    kind: kind.to_owned(),
                    spec,
                })
            }
            (
                "rbac.istio.io",
                "ServiceRole" | "ServiceRoleBinding" | "RbacConfig" | "ClusterRbacConfig",
            ) => {
                self.report(
                    Severity::Warning,
                    "kind",
                    format!("{kind} is enforced by Mixer only, where a rule asks its rbac adapter"),
                    "send authorization instances to a handler of it (docs/adapters/rbac.md)",
                );
                Spec::Mixer(MixerObject {
                    kind: kind.to_owned(),
                    spec: written.clone(),
                })
            }
            (gateway_api::GROUP | gateway_api::INFERENCE_GROUP, _)
                if !gateway_api::versions(group, kind).is_empty() =>
            {
                self.gateway_api(group, version, kind, spec, document)?
            }
            ("networking.k8s.io" | "extensions", "Ingress") => {
                self.prunes = true;
                Spec::Ingress(self.typed(spec)?)
            }
            ("networking.k8s.io", "IngressClass") => {
                self.prunes = true;
                Spec::IngressClass(self.typed(spec)?)
            }
            ("", "Service") => {
                let mut service: Service = self.typed(spec)?;
                service.load_balancer = load_balancer(document);
                Spec::Service(service)
            }
            ("", "Pod") => {
                let mut pod: Pod = self.typed(&spec_and_status(document))?;
                pod.owner_references = metadata
                    .get("ownerReferences")
                    .and_then(|list| {
                        serde_json::from_value::<Vec<OwnerReference>>(list.clone()).ok()
                    })
                    .unwrap_or_default();
                Spec::Pod(Box::new(pod))
            }
            ("apps" | "extensions", "Deployment") => Spec::Deployment(self.typed(spec)?),
            ("discovery.k8s.io", "EndpointSlice") => Spec::EndpointSlice(
                self.typed(&Whole(Value::Object(
                    document
                        .iter()
                        .filter(|(key, _)| matches!(key.as_str(), "endpoints" | "ports"))
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect(),
                )))?,
            ),
            ("", "ServiceAccount") => Spec::ServiceAccount(ServiceAccount::default()),
            ("", "Namespace") => Spec::Namespace(Namespace::default()),
            ("", "Node") => Spec::Node(Node::default()),
            ("", "ConfigMap") => Spec::ConfigMap(self.config_map(document)?),
            ("", "Secret") => match Secret::read(document) {
                Ok(secret) => Spec::Secret(secret?),
                Err((field, reason)) => return self.refuse(&field, reason),
            },
            ("security.istio.io" | "rbac.istio.io", _) => {
                self.rules(spec, annotations)?;
                self.report(
                    Severity::Warning,
                    "kind",
                    format!("{group} {kind} is NOT enforced: this version does not implement it"),
                    "keep such a workload closed by other means",
                );
                return None;
            }
            _ => {
                self.rules(spec, annotations)?;
                if !FOREIGN_KINDS.contains(&kind) {
                    let shown = if group.is_empty() {
                        kind.to_owned()
                    } else {
                        format!("{group} {kind}")
                    };
                    self.report(
                        Severity::Warning,
                        "kind",
                        format!("{shown} is not read by this version; ignored"),
                        "",
                    );
                }
                return None;
            }
        })
    }

    /// A kind of the Gateway API. As an API server would, it drops unknown fields; unlike one, it says so.
    fn gateway_api(
        &mut self,
        group: &str,
        version: &str,
        kind: &str,
        spec: &Value,
        document: &serde_json::Map<String, Value>,
    ) -> Option<Spec> {
        let served = gateway_api::versions(group, kind);
        if !served.contains(&version) {
            return self.refuse(
                "apiVersion",
                format!(
                    "{kind} has no version {version:?}; write {group}/{}",
                    served.join(", ")
                ),
            );
        }
        self.prunes = true;
        let kind = match kind {
            "GatewayClass" => Kind::GatewayClass(self.typed(spec)?),
            "Gateway" => Kind::Gateway(self.typed(spec)?),
            "ListenerSet" => Kind::ListenerSet(self.typed(spec)?),
            "HTTPRoute" => Kind::HttpRoute(self.typed(spec)?),
            "GRPCRoute" => Kind::GrpcRoute(self.typed(spec)?),
            "TLSRoute" => Kind::TlsRoute(self.typed(spec)?),
            "TCPRoute" => Kind::TcpRoute(self.typed(spec)?),
            "ReferenceGrant" => Kind::ReferenceGrant(self.typed(spec)?),
            "BackendTLSPolicy" => Kind::BackendTlsPolicy(self.typed(spec)?),
            _ => {
                self.report(
                    Severity::Warning,
                    "kind",
                    format!("the endpoint picker of {kind} is not asked by this version"),
                    "requests are spread over the pool's Service",
                );
                Kind::InferencePool
            }
        };
        Some(Spec::GatewayApi(Box::new(GatewayApi {
            kind,
            status: document.get("status").cloned().unwrap_or(Value::Null),
        })))
    }

    /// What a review found becomes problems; `None` when it refuses the object.
    fn take_over(&mut self, findings: Vec<Finding>) -> Option<()> {
        let refused = findings.iter().any(Finding::is_error);
        for finding in findings {
            self.report(
                finding.severity,
                &finding.field,
                finding.reason,
                &finding.hint,
            );
        }
        (!refused).then_some(())
    }

    /// The spec in normal form, if its shape is right.
    fn normal(
        &mut self,
        message: &'static str,
        document: &serde_json::Map<String, Value>,
        version: &str,
        spec: &Value,
    ) -> Option<Value> {
        let key = self.key.clone()?;
        let mut findings = review::top_level(document.keys());
        findings.extend(review::served(&key.group, &key.kind, version));
        let (normal, wrong) = review::schema::normal(message, spec, "spec");
        findings.extend(wrong);
        self.take_over(findings)?;
        Some(normal)
    }

    /// Judges a kind that becomes no object, so that [`crate::validate()`] never sees it.
    fn rules(&mut self, spec: &Value, annotations: &Labels) -> Option<()> {
        if !self.in_schema {
            return Some(());
        }
        let key = self.key.clone()?;
        let subject = Subject {
            group: &key.group,
            kind: &key.kind,
            namespace: &key.namespace,
            name: &key.name,
            annotations,
        };
        self.take_over(review::rules(&subject, spec))
    }

    fn config_map(&mut self, document: &serde_json::Map<String, Value>) -> Option<ConfigMap> {
        let mut map = ConfigMap::default();
        if let Some(Value::Object(data)) = document.get("data") {
            map.data = data
                .iter()
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect();
        }
        let is_mesh = self.key.as_ref().is_some_and(|key| &*key.name == "istio");
        if is_mesh && let Some(text) = map.data.get("mesh").cloned() {
            map.mesh = Some(Box::new(self.mesh(&text)?));
        }
        Some(map)
    }

    /// The mesh configuration is YAML inside YAML; its lines follow the `mesh:` line.
    fn mesh(&mut self, text: &str) -> Option<MeshConfig> {
        let documents = match documents(text) {
            Ok(documents) => documents,
            Err(error) => return self.refuse("data.mesh", format!("not valid YAML: {error}")),
        };
        let Some(document) = documents.into_iter().next() else {
            return Some(MeshConfig::default());
        };
        let config: MeshConfig =
            match serde_path_to_error::deserialize(without_nulls(&document.value)) {
                Ok(config) => config,
                Err(error) => {
                    let path = path_of(error.path());
                    return self.refuse("data.mesh", format!("{path}: {}", error.inner()));
                }
            };
        for unknown in config.other.keys() {
            self.report(
                Severity::Warning,
                "data.mesh",
                format!("{unknown} is not read by this version; ignored"),
                "",
            );
        }
        for provider in &config.extension_providers {
            let name = provider.get("name").and_then(Value::as_str).unwrap_or("");
            if let Err(why) = config.provider(name) {
                let decides = ["envoyExtAuthzGrpc", "envoyExtAuthzHttp"]
                    .iter()
                    .any(|field| provider.get(field).is_some());
                let hint = if decides {
                    "requests that CUSTOM policies ask it about are refused"
                } else {
                    "Telemetry that names it logs and traces nothing there"
                };
                self.report(
                    Severity::Warning,
                    "data.mesh",
                    format!("{why}; ignored"),
                    hint,
                );
            }
        }
        Some(config)
    }

    fn typed<T: DeserializeOwned>(&mut self, spec: impl AsSpec) -> Option<T> {
        let (value, prefix) = spec.as_spec();
        let value = match value {
            Value::Null => Value::Object(serde_json::Map::new()),
            value => without_nulls(value),
        };
        self.typed_at(value, prefix)
    }

    fn typed_at<T: DeserializeOwned>(&mut self, mut value: Value, prefix: &str) -> Option<T> {
        loop {
            let error = match serde_path_to_error::deserialize(&value) {
                Ok(typed) => return Some(typed),
                Err(error) => error,
            };
            let path = path_of(error.path());
            let field = match (prefix, path.as_str()) {
                ("", path) => path.to_owned(),
                (prefix, "") => prefix.to_owned(),
                (prefix, path) => format!("{prefix}.{path}"),
            };
            let reason = error.inner().to_string();
            if self.prunes
                && reason.starts_with("unknown field")
                && remove(&mut value, error.path())
            {
                self.report(
                    Severity::Warning,
                    &field,
                    "no field of this kind; ignored",
                    "is it misspelt?",
                );
                continue;
            }
            if !self.in_schema {
                return self.refuse(&field, reason);
            }
            // The API has it, we do not: without it the rest is still worth something.
            if reason.starts_with("unknown field") && remove(&mut value, error.path()) {
                self.report(
                    Severity::Warning,
                    &field,
                    "not supported by this version; ignored",
                    "",
                );
                continue;
            }
            self.report(
                Severity::Warning,
                &field,
                format!("cannot be read by this version, so the object is ignored: {reason}"),
                "",
            );
            return None;
        }
    }
}

/// Takes a field away; whether it was there.
fn remove(value: &mut Value, path: &serde_path_to_error::Path) -> bool {
    use serde_path_to_error::Segment;
    let mut at = value;
    let mut segments = path.iter().peekable();
    while let Some(segment) = segments.next() {
        let next = match (segment, at) {
            (Segment::Seq { index }, Value::Array(all)) => all.get_mut(*index),
            (Segment::Map { key }, Value::Object(all)) if segments.peek().is_none() => {
                return all.remove(key).is_some();
            }
            (Segment::Map { key }, Value::Object(all)) => all.get_mut(key),
            _ => None,
        };
        match next {
            Some(inner) => at = inner,
            None => return false,
        }
    }
    false
}

/// What a typed value is read from, and where that is in the document.
trait AsSpec {
    fn as_spec(&self) -> (&Value, &str);
}

impl AsSpec for &Value {
    fn as_spec(&self) -> (&Value, &str) {
        (self, "spec")
    }
}

/// A whole document: paths have no prefix.
struct Whole(Value);

impl AsSpec for &Whole {
    fn as_spec(&self) -> (&Value, &str) {
        (&self.0, "")
    }
}

/// Addresses of a Service's load balancer.
fn load_balancer(document: &serde_json::Map<String, Value>) -> Vec<String> {
    let ingress = document
        .get("status")
        .and_then(|status| status.get("loadBalancer"))
        .and_then(|balancer| balancer.get("ingress"))
        .and_then(Value::as_array);
    ingress
        .into_iter()
        .flatten()
        .filter_map(|one| {
            let text = |name: &str| one.get(name).and_then(Value::as_str);
            text("ip").or_else(|| text("hostname"))
        })
        .filter(|address| !address.is_empty())
        .map(str::to_owned)
        .collect()
}

fn spec_and_status(document: &serde_json::Map<String, Value>) -> Whole {
    Whole(Value::Object(
        document
            .iter()
            .filter(|(key, _)| matches!(key.as_str(), "spec" | "status"))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    ))
}

/// Whether objects of a kind are of use to us: judged at least, if nothing more.
#[must_use]
pub fn is_read(group: &str, kind: &str) -> bool {
    is_typed(group, kind) || review::is_known(group, kind)
}

/// Whether a kind is one we give a typed form to.
fn is_typed(group: &str, kind: &str) -> bool {
    match group {
        "networking.istio.io" => matches!(
            kind,
            "VirtualService"
                | "DestinationRule"
                | "Gateway"
                | "ServiceEntry"
                | "WorkloadEntry"
                | "Sidecar"
                | "EnvoyFilter"
        ),
        "security.istio.io" => matches!(
            kind,
            "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy"
        ),
        "telemetry.istio.io" => kind == "Telemetry",
        "authentication.istio.io" => matches!(kind, "Policy" | "MeshPolicy"),
        "config.istio.io" => true,
        "" => matches!(
            kind,
            "Service" | "ServiceAccount" | "Pod" | "ConfigMap" | "Namespace" | "Node"
        ),
        "apps" => kind == "Deployment",
        "extensions" => matches!(kind, "Deployment" | "Ingress"),
        "networking.k8s.io" => matches!(kind, "Ingress" | "IngressClass"),
        _ => !gateway_api::versions(group, kind).is_empty(),
    }
}

/// `field: null` and `field:` mean the field is not set.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key.clone(), without_nulls(value)))
                .collect(),
        ),
        Value::Array(all) => Value::Array(all.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

fn path_of(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    text
}

impl IntOrString {
    /// The number, if it is one (also in quotes).
    #[must_use]
    pub fn number(&self) -> Option<u16> {
        match self {
            Self::Int(number) => Some(*number),
            Self::String(text) => text.parse().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata:
  name: reviews
  creationTimestamp: 2020-01-01T00:00:00Z
spec:
  hosts:
  - reviews
  http:
  - match:
    - headers:
        end-user:
          exact: jason
    route:
    - destination:
        host: reviews
        subset: v2
    timeout: 1.5s
---
apiVersion: v1
kind: Pod
metadata: { name: a, namespace: b, labels: { app: x } , ownerReferences: [{kind: ReplicaSet, name: a-1}]}
spec: { serviceAccountName: sa, containers: [{name: c, ports: [{containerPort: 80}]}] }
status: { podIP: 10.0.0.1, phase: Running }
---
apiVersion: config.istio.io/v1alpha2
kind: memquota
metadata: { name: handler, namespace: istio-system }
spec: { quotas: [] }
";

    #[test]
    fn documents_become_typed_objects() {
        let (objects, problems) = parse_file("a.yaml", FILE);
        assert_eq!(problems, []);
        assert_eq!(objects.len(), 3);
        let Spec::VirtualService(service) = &objects[0].spec else {
            panic!()
        };
        assert_eq!(&*objects[0].key.namespace, "default");
        assert_eq!(objects[0].created.timestamp, 1_577_836_800);
        assert_eq!(service.http[0].route[0].destination.subset, "v2");
        assert_eq!(service.http[0].timeout, crate::Duration::parse("1.5s"));
        let Spec::Pod(pod) = &objects[1].spec else {
            panic!()
        };
        assert!(pod.is_ready());
        assert_eq!(pod.owner_references[0].name, "a-1");
        assert_eq!(pod.spec.account(), "sa");
        let Spec::Mixer(mixer) = &objects[2].spec else {
            panic!()
        };
        assert_eq!(mixer.kind, "memquota");
        assert_eq!(objects[2].raw["quotas"], serde_json::json!([]));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let (objects, problems) =
            parse_file("a.yaml", &FILE.replace("timeout: 1.5s", "timeuot: 1.5s"));
        assert_eq!(objects.len(), 2, "the other documents stand");
        assert_eq!(problems.len(), 1);
        let text = problems[0].to_string();
        assert!(
            text.starts_with(
                "a.yaml:19: VirtualService default/reviews: spec.http[0].timeuot: unknown field"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_bad_value_is_named_with_its_line() {
        let (_, problems) = parse_file("a.yaml", &FILE.replace("1.5s", "soon"));
        let text = problems[0].to_string();
        assert!(
            text.starts_with("a.yaml:19: VirtualService default/reviews: spec.http[0].timeout: "),
            "{text}"
        );
        assert!(text.contains("\"soon\""), "{text}");
    }

    #[test]
    fn mesh_config_is_read_from_its_config_map() {
        let text = "
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |-
    mixerCheckServer: mixer.istio-system.svc.cluster.local:15004
    accessLogEncoding: JSON
    outboundTrafficPolicy: { mode: REGISTRY_ONLY }
    somethingNew: 3
";
        let (objects, problems) = parse_file("m.yaml", text);
        let Spec::ConfigMap(map) = &objects[0].spec else {
            panic!()
        };
        let mesh = map.mesh.as_ref().unwrap();
        assert_eq!(
            mesh.mixer_check_server,
            "mixer.istio-system.svc.cluster.local:15004"
        );
        assert_eq!(
            mesh.access_log_encoding,
            crate::mesh::AccessLogEncoding::Json
        );
        assert!(mesh.enable_auto_mtls);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].reason.contains("somethingNew"));
    }

    #[test]
    fn policy_presence_counts() {
        let text = "
apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: { name: default }
spec:
  peers:
  - mtls:
";
        let (objects, problems) = parse_file("p.yaml", text);
        assert_eq!(problems, []);
        let Spec::AuthenticationPolicy(policy) = &objects[0].spec else {
            panic!()
        };
        assert_eq!(policy.mode(), crate::security::MutualTlsMode::Strict);
    }
}
