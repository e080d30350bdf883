//! Services, their ports and endpoints, and the workloads behind them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Labels of a workload, a service or a subset.
pub type Labels = BTreeMap<String, String>;

/// Whether every label of `selector` is among `labels`; an empty selector selects everything.
#[must_use]
pub fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1, and HTTP/2 where the client starts it.
    Http,
    /// HTTP/2 without TLS (h2c).
    Http2,
    /// gRPC: HTTP/2.
    Grpc,
    /// gRPC-Web: HTTP/1.1 or 2.
    GrpcWeb,
    /// TLS with HTTP inside: opaque to sidecars.
    Https,
    /// TLS: opaque to sidecars.
    Tls,
    /// Plain TCP.
    Tcp,
    /// Mongo: TCP.
    Mongo,
    /// Redis: TCP.
    Redis,
    /// MySQL: TCP, the server speaks first.
    Mysql,
    /// Not declared: to be sniffed, or TCP.
    Unknown,
    /// UDP: ignored.
    Udp,
}

/// Ports whose servers speak first, so that sniffing would hang: SMTP, DNS, MySQL, MongoDB.
const SERVER_FIRST_PORTS: [u16; 4] = [25, 53, 3306, 27017];

impl Protocol {
    /// The protocol a Kubernetes service port declares: `appProtocol`, else its name's prefix,
    /// else TCP for well-known server-first ports, else unknown.
    #[must_use]
    pub fn of_service_port(
        app_protocol: Option<&str>,
        name: &str,
        number: u16,
        transport: &str,
    ) -> Self {
        if transport.eq_ignore_ascii_case("udp") {
            return Self::Udp;
        }
        if let Some(declared) = app_protocol.and_then(Self::by_app_protocol) {
            return declared;
        }
        if let Some(named) = Self::by_port_name(name) {
            return named;
        }
        if SERVER_FIRST_PORTS.contains(&number) {
            Self::Tcp
        } else {
            Self::Unknown
        }
    }

    fn by_app_protocol(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "kubernetes.io/h2c" => Some(Self::Http2),
            "kubernetes.io/ws" => Some(Self::Http),
            "kubernetes.io/wss" => Some(Self::Https),
            other => Self::by_name(other),
        }
    }

    /// `grpc-web-x` is gRPC-Web; otherwise what stands before the first `-` decides.
    fn by_port_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Some(Self::GrpcWeb);
        }
        Self::by_name(name.split('-').next().unwrap_or_default())
    }

    /// The protocol of that name, as in Gateway and ServiceEntry ports.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "http" | "http_proxy" => Self::Http,
            "http2" | "h2c" => Self::Http2,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "tcp" => Self::Tcp,
            "mongo" => Self::Mongo,
            "redis" => Self::Redis,
            "mysql" => Self::Mysql,
            "udp" => Self::Udp,
            _ => return None,
        })
    }

    /// Whether requests can be seen: HTTP connection manager rather than TCP proxy.
    #[must_use]
    pub fn is_http(self) -> bool {
        match self {
            Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb => true,
            Self::Https
            | Self::Tls
            | Self::Tcp
            | Self::Mongo
            | Self::Redis
            | Self::Mysql
            | Self::Unknown
            | Self::Udp => false,
        }
    }

    /// Whether the upstream must be spoken to in HTTP/2.
    #[must_use]
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc)
    }

    /// Whether it is TLS of the application's own: routed by SNI.
    #[must_use]
    pub fn is_opaque_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name, possibly empty.
    pub name: String,
    /// What clients connect to.
    pub number: u16,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it goes on the workload.
    pub target: Target,
}

/// A service port's destination on the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// That port.
    Number(u16),
    /// The container port of that name.
    Named(String),
}

/// How clients find the endpoints of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// Pilot tells: EDS.
    Endpoints,
    /// By DNS, every address used.
    Dns,
    /// By DNS, one address at a time.
    DnsRoundRobin,
    /// The address the client dialled: original destination.
    Passthrough,
}

/// Where a service's description came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Registry {
    /// A Kubernetes Service.
    Kubernetes,
    /// A ServiceEntry.
    External,
}

/// A service: one host name, its ports and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `NAME.NAMESPACE.svc.cluster.local`, or a ServiceEntry's host (may begin with `*.`).
    pub hostname: Arc<str>,
    /// Further host names: ExternalNames that lead to it.
    pub aliases: Vec<Arc<str>>,
    /// Kubernetes name; of a ServiceEntry, its own.
    pub name: String,
    /// Namespace it is declared in.
    pub namespace: String,
    /// Labels of the Service.
    pub labels: Labels,
    /// Labels that select its pods; empty for none.
    pub selector: Labels,
    /// Ports, by number.
    pub ports: Vec<Port>,
    /// Virtual addresses, IP or CIDR; empty when it has none (headless, in-folder).
    pub addresses: Vec<String>,
    /// `clusterIP: None`.
    pub headless: bool,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Outside of the mesh: no mTLS, no Mixer on the other side.
    pub external: bool,
    /// Where its description came from.
    pub registry: Registry,
    /// Who may see it.
    pub export_to: ExportTo,
    /// SANs that clients must demand, if it lists any.
    pub subject_alt_names: Vec<String>,
    /// Which endpoints a client prefers, if the service says so itself.
    pub preference: Option<Preference>,
}

/// Which endpoints clients prefer. Kubernetes: `trafficDistribution`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preference {
    /// The closest: same zone, then same region.
    Close,
    /// Those on the same machine, then the closest.
    SameNode,
}

impl Preference {
    /// `PreferClose`, `PreferSameZone`, `PreferSameNode`; `None` for what says nothing.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "PreferClose" | "PreferSameZone" => Some(Self::Close),
            "PreferSameNode" => Some(Self::SameNode),
            _ => None,
        }
    }
}

impl Service {
    /// The port of that number.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.number == number)
    }
}

/// Who may see an object: `exportTo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExportTo {
    /// Everybody: `*`.
    #[default]
    Everyone,
    /// These namespaces (`.` is already replaced by the object's own).
    Namespaces(Vec<String>),
    /// Nobody: `~`.
    Nobody,
}

impl ExportTo {
    /// Reads `exportTo` of an object in `namespace`; empty means `default`.
    #[must_use]
    pub fn of(list: &[String], namespace: &str, default: &[String]) -> Self {
        let list = if list.is_empty() { default } else { list };
        if list.is_empty() || list.iter().any(|item| item == "*") {
            return Self::Everyone;
        }
        if list.iter().any(|item| item == "~") {
            return Self::Nobody;
        }
        Self::Namespaces(
            list.iter()
                .map(|item| {
                    if item == "." {
                        namespace
                    } else {
                        item.as_str()
                    }
                    .to_owned()
                })
                .collect(),
        )
    }

    /// Whether clients in `namespace` may see it.
    #[must_use]
    pub fn allows(&self, namespace: &str) -> bool {
        match self {
            Self::Everyone => true,
            Self::Namespaces(list) => list.iter().any(|item| item == namespace),
            Self::Nobody => false,
        }
    }
}

/// Whether a workload's sidecar takes mesh mTLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TlsMode {
    /// No sidecar: plain text.
    #[default]
    Disabled,
    /// `security.istio.io/tlsMode: istio`.
    Istio,
}

/// One place that answers for a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// IP address, DNS name, or `unix:///path`.
    pub address: String,
    /// Port on the workload; 0 for unix sockets.
    pub port: u16,
    /// Number of the service port it answers for.
    pub service_port: u16,
    /// Labels of the workload.
    pub labels: Arc<Labels>,
    /// Namespace of the workload.
    pub namespace: String,
    /// `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    pub spiffe_id: Option<String>,
    /// Whether it takes mesh mTLS.
    pub tls_mode: TlsMode,
    /// Deployment name, or the like; else the pod's.
    pub workload_name: String,
    /// Load-balancing weight; at least 1.
    pub weight: u32,
    /// `region/zone/subzone`, possibly empty.
    pub locality: String,
    /// Network it is in, possibly empty.
    pub network: String,
    /// Machine it is on, possibly empty.
    pub machine: String,
}

/// A running workload: one pod or WorkloadEntry. Also what Mixer is told to look up attributes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `kubernetes://NAME.NAMESPACE`.
    pub uid: String,
    /// Pod or entry name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Address; a WorkloadEntry may name a host.
    pub address: String,
    /// Labels.
    pub labels: Arc<Labels>,
    /// Service account.
    pub service_account: String,
    /// Its SPIFFE ID.
    pub spiffe_id: String,
    /// Deployment name, or the like; else the pod's.
    pub workload_name: String,
    /// `kubernetes://apis/apps/v1/namespaces/NS/deployments/NAME`, or empty.
    pub owner: String,
    /// Host names of the services that select it, sorted.
    pub services: Vec<Arc<str>>,
    /// Containers and their ports.
    pub containers: Vec<Container>,
    /// Whether it takes mesh mTLS.
    pub tls_mode: TlsMode,
    /// Ready to serve.
    pub ready: bool,
    /// `region/zone/subzone`, possibly empty.
    pub locality: String,
    /// Machine it is on, possibly empty.
    pub machine: String,
}

/// A container of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Name.
    pub name: String,
    /// Ports: name (possibly empty) and number.
    pub ports: Vec<(String, u16)>,
}

impl Workload {
    /// The address as an IP, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.parse().ok()
    }

    /// The number a service port's target means on this workload.
    #[must_use]
    pub fn resolve(&self, target: &Target) -> Option<u16> {
        match target {
            Target::Number(number) => Some(*number),
            Target::Named(name) => self
                .containers
                .iter()
                .flat_map(|container| &container.ports)
                .find(|(port_name, _)| port_name == name)
                .map(|(_, number)| *number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ports_protocol_comes_from_app_protocol_then_name_then_number() {
        let of = |app, name, number| Protocol::of_service_port(app, name, number, "TCP");
        assert_eq!(of(None, "http-web", 80), Protocol::Http);
        assert_eq!(of(None, "grpc-web-x", 80), Protocol::GrpcWeb);
        assert_eq!(of(None, "grpc-x", 80), Protocol::Grpc);
        assert_eq!(of(Some("kubernetes.io/h2c"), "tcp", 80), Protocol::Http2);
        assert_eq!(of(None, "db", 3306), Protocol::Tcp);
        assert_eq!(of(None, "web", 80), Protocol::Unknown);
        assert_eq!(
            Protocol::of_service_port(None, "http", 80, "UDP"),
            Protocol::Udp
        );
    }

    #[test]
    fn export_to_resolves_the_own_namespace() {
        let own = ExportTo::of(&[".".into()], "a", &[]);
        assert!(own.allows("a") && !own.allows("b"));
        assert!(ExportTo::of(&[], "a", &[]).allows("b"));
        assert!(!ExportTo::of(&["~".into()], "a", &[]).allows("a"));
    }
}
