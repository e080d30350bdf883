//! One configuration object: who it is, where it was written, what it says.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use crate::authorization::AuthorizationPolicy;
use crate::envoy_filter::EnvoyFilter;
use crate::gateway_api::GatewayApi;
use crate::ingress::{Ingress, IngressClass};
use crate::kubernetes::{
    ConfigMap, Deployment, EndpointSlice, Namespace, Node, Pod, Service, ServiceAccount,
};
use crate::networking::{
    DestinationRule, Gateway, ServiceEntry, Sidecar, VirtualService, WorkloadEntry,
};
use crate::policy::{MixerObject, QuotaSpec, QuotaSpecBinding};
use crate::problem::{Problem, Severity};
use crate::secret::Secret;
use crate::security::{AuthenticationPolicy, PeerAuthentication, RequestAuthentication};
use crate::telemetry::Telemetry;

/// Labels or annotations.
pub type Labels = BTreeMap<String, String>;

/// What names an object. All served versions of a kind share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// API group; empty for Kubernetes' core.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Namespace; `default` when the document names none, empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// Where objects stand by age: creation time if they carry one (those come first), else file and line.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Order {
    /// `metadata.creationTimestamp`, seconds since 1970; `i64::MAX` without one.
    pub timestamp: i64,
    /// File.
    pub file: Arc<str>,
    /// Line the document starts on.
    pub line: u32,
}

/// Where an object was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// File, as named to the parser; or where else it is.
    pub file: Arc<str>,
    /// Line the document starts on, from 1; 0 if it is in no file.
    pub line: u32,
    /// Line of each field, by path.
    pub(crate) lines: Arc<BTreeMap<String, u32>>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        match self.line {
            0 => Ok(()),
            line => write!(f, ":{line}"),
        }
    }
}

/// The annotation by which an object's origin travels with it: [`Origin::to_text`].
pub const ORIGIN: &str = "lateen.io/origin";

impl Origin {
    /// As text, for a copy of the object that is elsewhere.
    #[must_use]
    pub fn to_text(&self) -> String {
        serde_json::json!({"file": *self.file, "line": self.line, "lines": *self.lines}).to_string()
    }

    /// What [`Origin::to_text`] has written; `None` when the text is something else.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Written {
            file: String,
            line: u32,
            lines: BTreeMap<String, u32>,
        }
        let written: Written = serde_json::from_str(text).ok()?;
        Some(Self {
            file: written.file.into(),
            line: written.line,
            lines: Arc::new(written.lines),
        })
    }

    /// The line of a field, else of the closest field around it that is written down.
    #[must_use]
    pub fn line_of(&self, field: &str) -> u32 {
        let mut path = field;
        loop {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return self.line,
            }
        }
    }
}

/// What an object says, by kind.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the kind of its name")]
pub enum Spec {
    VirtualService(Box<VirtualService>),
    DestinationRule(Box<DestinationRule>),
    Gateway(Gateway),
    ServiceEntry(ServiceEntry),
    WorkloadEntry(WorkloadEntry),
    Sidecar(Sidecar),
    Telemetry(Box<Telemetry>),
    EnvoyFilter(Box<EnvoyFilter>),
    PeerAuthentication(PeerAuthentication),
    RequestAuthentication(Box<RequestAuthentication>),
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    /// `authentication.istio.io` Policy and MeshPolicy.
    AuthenticationPolicy(AuthenticationPolicy),
    QuotaSpec(QuotaSpec),
    QuotaSpecBinding(QuotaSpecBinding),
    /// Every other `config.istio.io` kind, and the policies of `rbac.istio.io`.
    Mixer(MixerObject),
    Service(Service),
    ServiceAccount(ServiceAccount),
    Deployment(Deployment),
    EndpointSlice(EndpointSlice),
    Pod(Box<Pod>),
    /// A machine.
    Node(Node),
    ConfigMap(ConfigMap),
    /// One with TLS material; others are not kept.
    Secret(Secret),
    Namespace(Namespace),
    /// Any kind of the Gateway API.
    GatewayApi(Box<GatewayApi>),
    Ingress(Box<Ingress>),
    IngressClass(IngressClass),
}

/// One parsed object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Who it is.
    pub key: Key,
    /// Version of the API it was written in: `v1alpha3`, `v1`.
    pub version: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.annotations`.
    pub annotations: Labels,
    /// Its place by age.
    pub created: Order,
    /// Where it was written.
    pub origin: Origin,
    /// What it says.
    pub spec: Spec,
    /// The document's `spec` as written (`null` if it has none), for those who pass it on.
    pub raw: Arc<Value>,
}

impl Object {
    /// A problem of this object at `field`.
    #[must_use]
    pub fn problem(
        &self,
        severity: Severity,
        field: impl Into<String>,
        reason: impl Into<String>,
        hint: impl Into<String>,
    ) -> Problem {
        let field = field.into();
        Problem {
            file: self.origin.file.clone(),
            line: self.origin.line_of(&field),
            severity,
            key: Some(self.key.clone()),
            field,
            reason: reason.into(),
            hint: hint.into(),
        }
    }

    /// Whether two objects say the same, wherever they are written.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.key == other.key
            && self.spec == other.spec
            && self.raw == other.raw
            && self.labels == other.labels
            && self.annotations == other.annotations
    }
}
