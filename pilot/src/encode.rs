//! Resources as they go on the wire: canonical bytes, a version that is a hash of them, and one copy
//! in memory for all proxies that get the same.
//!
//! The version must be the same for the same content, in this process and the next, or a restart would
//! push everything to everybody. prost writes map fields in the order of a randomly seeded hash map, so
//! bytes are brought into one order first ([`Shapes`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use envoy_types::pb::envoy::config::cluster::v3::{
    Cluster, cluster::ClusterDiscoveryType, cluster::DiscoveryType,
};
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::{Listener, filter::ConfigType};
use envoy_types::pb::envoy::config::route::v3::{
    RouteConfiguration, route::Action, route_action::ClusterSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_connection_manager::RouteSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{
    TcpProxy, tcp_proxy::ClusterSpecifier as TcpDestination,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, Kind as FieldKind};
use sha2::{Digest, Sha256};

/// A type of resource. The order is the order of pushing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoint,
    /// LDS.
    Listener,
    /// RDS.
    Route,
    /// SDS.
    Secret,
    /// ECDS.
    Extension,
    /// Configuration objects, by `GROUP/VERSION/KIND`.
    Generic(Arc<str>),
}

impl Kind {
    /// The types proxies ask for, in push order.
    pub const XDS: [Self; 6] = [
        Self::Cluster,
        Self::Endpoint,
        Self::Listener,
        Self::Route,
        Self::Secret,
        Self::Extension,
    ];

    /// The kind of that type URL; `None` for one that could be neither.
    #[must_use]
    pub fn of_type_url(url: &str) -> Option<Self> {
        if let Some(known) = Self::XDS.iter().find(|kind| kind.type_url() == url) {
            return Some(known.clone());
        }
        let mut parts = url.split('/');
        let (Some(group), Some(version), Some(kind), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let plain = |part: &str| {
            !part.is_empty()
                && part.len() <= 128
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
        };
        (plain(group) && plain(version) && plain(kind)).then(|| Self::Generic(url.into()))
    }

    /// The type URL on the wire.
    #[must_use]
    pub fn type_url(&self) -> &str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoint => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Self::Generic(url) => url,
        }
    }

    /// `cds`, `eds`, ... as metrics and debug pages say it; a generic kind by its type URL.
    #[must_use]
    pub fn short(&self) -> &str {
        match self {
            Self::Cluster => "cds",
            Self::Endpoint => "eds",
            Self::Listener => "lds",
            Self::Route => "rds",
            Self::Secret => "sds",
            Self::Extension => "ecds",
            Self::Generic(url) => url,
        }
    }

    /// Whether asking without names means everything.
    #[must_use]
    pub fn is_wildcard(&self) -> bool {
        match self {
            Self::Cluster | Self::Listener | Self::Generic(_) => true,
            Self::Endpoint | Self::Route | Self::Secret | Self::Extension => false,
        }
    }

    /// Whether a name is kept for as long as the client asks for it, content or not: a cluster or
    /// listener that is being replaced may still stand on it.
    #[must_use]
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Endpoint | Self::Route)
    }
}

/// Resources of one kind, by name.
pub type Catalog = BTreeMap<Arc<str>, Arc<Encoded>>;

/// One resource, ready to be sent.
#[derive(Debug)]
pub struct Encoded {
    /// Its name.
    pub name: Arc<str>,
    /// Hash of kind, name and canonical bytes, in hex.
    pub version: Arc<str>,
    /// Its bytes.
    pub body: Any,
    /// What it stands on.
    pub refers: Refers,
}

/// Names of other resources in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refers {
    /// What the client will ask for next: a cluster's EDS name, a listener's route configurations.
    pub next: Vec<Arc<str>>,
    /// Clusters that a listener or a route configuration sends traffic to.
    pub clusters: Vec<Arc<str>>,
}

/// A message that is a resource.
pub trait Resource: Message + Name {
    /// Which kind.
    const KIND: Kind;

    /// What it stands on.
    fn refers(&self) -> Refers;
}

impl Resource for Cluster {
    const KIND: Kind = Kind::Cluster;

    fn refers(&self) -> Refers {
        let eds = ClusterDiscoveryType::Type(DiscoveryType::Eds as i32);
        if self.cluster_discovery_type != Some(eds) {
            return Refers::default();
        }
        let name = match &self.eds_cluster_config {
            Some(eds) if !eds.service_name.is_empty() => eds.service_name.as_str(),
            _ => self.name.as_str(),
        };
        Refers {
            next: vec![name.into()],
            clusters: Vec::new(),
        }
    }
}

impl Resource for ClusterLoadAssignment {
    const KIND: Kind = Kind::Endpoint;

    fn refers(&self) -> Refers {
        Refers::default()
    }
}

impl Resource for TypedExtensionConfig {
    const KIND: Kind = Kind::Extension;

    fn refers(&self) -> Refers {
        Refers::default()
    }
}

impl Resource for Secret {
    const KIND: Kind = Kind::Secret;

    fn refers(&self) -> Refers {
        Refers::default()
    }
}

impl Resource for Listener {
    const KIND: Kind = Kind::Listener;

    fn refers(&self) -> Refers {
        let mut next = BTreeSet::new();
        let mut clusters = BTreeSet::new();
        let filters = self
            .filter_chains
            .iter()
            .chain(&self.default_filter_chain)
            .flat_map(|chain| &chain.filters);
        for filter in filters {
            let Some(ConfigType::TypedConfig(any)) = &filter.config_type else {
                continue;
            };
            if any.type_url == HttpConnectionManager::type_url() {
                match HttpConnectionManager::decode(any.value.as_slice())
                    .ok()
                    .and_then(|hcm| hcm.route_specifier)
                {
                    Some(RouteSpecifier::Rds(rds)) => {
                        next.insert(rds.route_config_name);
                    }
                    Some(RouteSpecifier::RouteConfig(inline)) => {
                        clusters_of(&inline, &mut clusters)
                    }
                    Some(RouteSpecifier::ScopedRoutes(_)) | None => {}
                }
            } else if any.type_url == TcpProxy::type_url() {
                match TcpProxy::decode(any.value.as_slice())
                    .ok()
                    .and_then(|tcp| tcp.cluster_specifier)
                {
                    Some(TcpDestination::Cluster(name)) => {
                        clusters.insert(name);
                    }
                    Some(TcpDestination::WeightedClusters(all)) => {
                        clusters.extend(all.clusters.into_iter().map(|cluster| cluster.name));
                    }
                    _ => {}
                }
            }
        }
        Refers {
            next: shared(next),
            clusters: shared(clusters),
        }
    }
}

impl Resource for RouteConfiguration {
    const KIND: Kind = Kind::Route;

    fn refers(&self) -> Refers {
        let mut clusters = BTreeSet::new();
        clusters_of(self, &mut clusters);
        Refers {
            next: Vec::new(),
            clusters: shared(clusters),
        }
    }
}

fn clusters_of(routes: &RouteConfiguration, clusters: &mut BTreeSet<String>) {
    for route in routes.virtual_hosts.iter().flat_map(|host| &host.routes) {
        let Some(Action::Route(action)) = &route.action else {
            continue;
        };
        match &action.cluster_specifier {
            Some(ClusterSpecifier::Cluster(name)) => {
                clusters.insert(name.clone());
            }
            Some(ClusterSpecifier::WeightedClusters(all)) => {
                clusters.extend(all.clusters.iter().map(|cluster| cluster.name.clone()));
            }
            _ => {}
        }
        clusters.extend(
            action
                .request_mirror_policies
                .iter()
                .map(|mirror| mirror.cluster.clone()),
        );
    }
}

fn shared(names: BTreeSet<String>) -> Vec<Arc<str>> {
    names.into_iter().map(Arc::from).collect()
}

/// Encodes resources and keeps one copy of each that is in use, whoever holds it.
#[derive(Debug, Default)]
pub struct Encoder {
    shared: Mutex<Shared>,
    catalogs: Mutex<Catalogs>,
}

/// Catalogs in use.
#[derive(Debug, Default)]
struct Catalogs {
    by_version: HashMap<String, Weak<Catalog>>,
    /// As [`Shared::sweep_at`].
    sweep_at: usize,
}

#[derive(Debug, Default)]
struct Shared {
    by_hash: HashMap<[u8; 16], Weak<Encoded>>,
    /// Dead entries are swept when the map has grown to this many.
    sweep_at: usize,
}

impl Encoder {
    /// Encodes one resource.
    pub fn encode<M: Resource>(&self, name: &str, message: &M) -> Arc<Encoded> {
        self.share(
            &M::KIND,
            name,
            &M::type_url(),
            message.encode_to_vec(),
            || message.refers(),
        )
    }

    /// Wraps one resource of a kind whose content stands on nothing.
    pub fn encode_plain<M: Message + Name>(
        &self,
        kind: &Kind,
        name: &str,
        message: &M,
    ) -> Arc<Encoded> {
        self.share(
            kind,
            name,
            &M::type_url(),
            message.encode_to_vec(),
            Refers::default,
        )
    }

    /// One copy of equal catalogs: proxies that see the same share it.
    pub fn share_catalog(&self, catalog: Catalog) -> Arc<Catalog> {
        // Versions hash the kind too, so only the empty ones of two kinds are alike.
        let members = catalog.iter().map(|(name, one)| (&**name, &*one.version));
        let version = set_version(members);
        let mut shared = self.catalogs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shared.by_version.get(&version).and_then(Weak::upgrade) {
            return known;
        }
        let fresh = Arc::new(catalog);
        if shared.by_version.len() >= shared.sweep_at {
            shared.by_version.retain(|_, weak| weak.strong_count() > 0);
            shared.sweep_at = (shared.by_version.len() * 2).max(1024);
        }
        shared.by_version.insert(version, Arc::downgrade(&fresh));
        fresh
    }

    fn share(
        &self,
        kind: &Kind,
        name: &str,
        body_url: &str,
        bytes: Vec<u8>,
        refers: impl FnOnce() -> Refers,
    ) -> Arc<Encoded> {
        let bytes = SHAPES.canonical(name_in(body_url), &bytes).unwrap_or(bytes);
        let hash = fingerprint(&[kind.type_url().as_bytes(), name.as_bytes(), &bytes]);

        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shared.by_hash.get(&hash).and_then(Weak::upgrade) {
            return known;
        }
        let fresh = Arc::new(Encoded {
            name: name.into(),
            version: hex::encode(hash).into(),
            body: Any {
                type_url: body_url.to_owned(),
                value: bytes,
            },
            refers: refers(),
        });
        if shared.by_hash.len() >= shared.sweep_at {
            shared.by_hash.retain(|_, weak| weak.strong_count() > 0);
            shared.sweep_at = (shared.by_hash.len() * 2).max(1024);
        }
        shared.by_hash.insert(hash, Arc::downgrade(&fresh));
        fresh
    }
}

/// The first half of SHA-256 over length-prefixed parts.
fn fingerprint(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize()[..16]);
    half
}

/// One version for a set of resources, whatever their order: the exclusive or of their hashes.
pub(crate) fn set_version<'a>(members: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut all = SetVersion::default();
    members.for_each(|(name, version)| all.toggle(name, version));
    all.text()
}

/// A [`set_version`] that follows its set: whoever adds a member or takes it out says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SetVersion([u8; 16]);

impl SetVersion {
    /// Adds a member that is not there, or takes one out that is.
    pub(crate) fn toggle(&mut self, name: &str, version: &str) {
        let one = fingerprint(&[name.as_bytes(), version.as_bytes()]);
        self.0.iter_mut().zip(one).for_each(|(a, b)| *a ^= b);
    }

    pub(crate) fn text(self) -> String {
        let text = String::with_capacity(32);
        self.0.iter().fold(text, |mut text, byte| {
            write!(text, "{byte:02x}").expect("a String takes everything");
            text
        })
    }
}

/// Where bytes may come in more than one order: the fields of each message that are maps, are `Any` (whose
/// content may have a map), or lead to one. Copied out of the descriptors because those take 20 MB and many
/// look-ups a field; this takes some hundred kilobytes.
#[derive(Debug, Default)]
struct Shapes {
    by_name: HashMap<String, usize>,
    /// By number of the message; each sorted by number of the field.
    fields: Vec<Vec<(u32, Shape)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    is_map: bool,
    /// The message inside, unless its bytes come in one order only.
    inner: Option<usize>,
}

static SHAPES: LazyLock<Shapes> = LazyLock::new(|| {
    let shapes = Shapes::of(&lateen_protocols::json::pool());
    lateen_protocols::json::unload();
    shapes
});

const ANY: &str = "google.protobuf.Any";

impl Shapes {
    fn of(pool: &DescriptorPool) -> Self {
        let mut users: HashMap<String, Vec<String>> = HashMap::new();
        let mut found: Vec<String> = vec![ANY.to_owned()];
        for message in pool.all_messages() {
            for field in message.fields() {
                if field.is_map() {
                    found.push(message.full_name().to_owned());
                }
                if let FieldKind::Message(inner) = field.kind() {
                    users
                        .entry(inner.full_name().to_owned())
                        .or_default()
                        .push(message.full_name().to_owned());
                }
            }
        }
        let mut by_name = HashMap::new();
        while let Some(name) = found.pop() {
            if !by_name.contains_key(&name) {
                found.extend(users.get(&name).into_iter().flatten().cloned());
                by_name.insert(name, by_name.len());
            }
        }
        let mut fields = vec![Vec::new(); by_name.len()];
        for (name, number) in &by_name {
            let (Some(message), Some(shapes)) =
                (pool.get_message_by_name(name), fields.get_mut(*number))
            else {
                continue;
            };
            shapes.extend(message.fields().filter_map(|field| {
                let inner = match field.kind() {
                    FieldKind::Message(inner) => by_name.get(inner.full_name()).copied(),
                    _ => None,
                };
                let is_map = field.is_map();
                (is_map || inner.is_some()).then_some((field.number(), Shape { is_map, inner }))
            }));
            shapes.sort_unstable_by_key(|(field, _)| *field);
        }
        Self { by_name, fields }
    }

    /// The same message with the entries of each map sorted; `None` if the bytes are not well-formed.
    /// A message that is not known, or has no such fields, is given back as it is.
    fn canonical(&self, message: &str, bytes: &[u8]) -> Option<Vec<u8>> {
        match self.by_name.get(message) {
            Some(number) => self.sorted(*number, bytes),
            None => Some(bytes.to_vec()),
        }
    }

    fn sorted(&self, message: usize, bytes: &[u8]) -> Option<Vec<u8>> {
        if self.by_name.get(ANY) == Some(&message) {
            let any = Any::decode(bytes).ok()?;
            let value = self.canonical(name_in(&any.type_url), &any.value)?;
            return Some(
                Any {
                    type_url: any.type_url,
                    value,
                }
                .encode_to_vec(),
            );
        }
        let fields = self.fields.get(message)?;
        let mut out = Vec::with_capacity(bytes.len());
        let mut entries: Vec<Vec<u8>> = Vec::new();
        let mut entries_of = 0;
        let mut rest = bytes;
        while !rest.is_empty() {
            let field = WireField::take(&mut rest)?;
            if entries_of != field.number {
                append_sorted(&mut entries, &mut out);
                entries_of = field.number;
            }
            let shape = fields
                .binary_search_by_key(&field.number, |(number, _)| *number)
                .ok();
            let shape = shape.and_then(|at| fields.get(at)).map(|(_, shape)| *shape);
            let (Some(payload), Some(Shape { is_map, inner })) = (field.payload, shape) else {
                out.extend_from_slice(field.whole);
                continue;
            };
            let whole = match inner {
                None => field.whole.to_vec(),
                Some(inner) => {
                    let payload = self.sorted(inner, payload)?;
                    let mut whole = Vec::with_capacity(payload.len() + 8);
                    put_varint(&mut whole, u64::from(field.number) << 3 | 2);
                    put_varint(&mut whole, payload.len() as u64);
                    whole.extend_from_slice(&payload);
                    whole
                }
            };
            if is_map {
                entries.push(whole)
            } else {
                out.extend_from_slice(&whole)
            }
        }
        append_sorted(&mut entries, &mut out);
        Some(out)
    }
}

fn append_sorted(entries: &mut Vec<Vec<u8>>, out: &mut Vec<u8>) {
    entries.sort_unstable();
    entries
        .drain(..)
        .for_each(|entry| out.extend_from_slice(&entry));
}

/// The full name of the message of a type URL.
fn name_in(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or_default()
}

/// One field as it stands in the bytes.
struct WireField<'a> {
    number: u32,
    /// Tag and payload together.
    whole: &'a [u8],
    /// Of a length-delimited field, what is inside.
    payload: Option<&'a [u8]>,
}

impl<'a> WireField<'a> {
    fn take(rest: &mut &'a [u8]) -> Option<Self> {
        let start = *rest;
        let key = take_varint(rest)?;
        let payload = match key & 7 {
            0 => {
                take_varint(rest)?;
                None
            }
            1 => {
                *rest = rest.get(8..)?;
                None
            }
            2 => {
                let length = usize::try_from(take_varint(rest)?).ok()?;
                let payload = rest.get(..length)?;
                *rest = rest.get(length..)?;
                Some(payload)
            }
            5 => {
                *rest = rest.get(4..)?;
                None
            }
            _ => return None,
        };
        Some(Self {
            number: u32::try_from(key >> 3).ok()?,
            whole: start.get(..start.len() - rest.len())?,
            payload,
        })
    }
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::core::v3::Metadata;
    use envoy_types::pb::google::protobuf::{Struct, Value, value};
    use envoy_types::util::pack_any;

    fn cluster(keys: impl Iterator<Item = u32>) -> Cluster {
        let fields = keys
            .map(|k| {
                (
                    k.to_string(),
                    Value {
                        kind: Some(value::Kind::NumberValue(f64::from(k))),
                    },
                )
            })
            .collect();
        let inner = Struct { fields };
        Cluster {
            name: "c".into(),
            metadata: Some(Metadata {
                filter_metadata: [("istio".to_owned(), inner.clone())].into(),
                typed_filter_metadata: [("any".to_owned(), pack_any(inner))].into(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_same_content_has_the_same_bytes_and_one_copy() {
        let encoder = Encoder::default();
        let first = encoder.encode("c", &cluster(0..40));
        for _ in 0..5 {
            let again = encoder.encode("c", &cluster((0..40).rev()));
            assert!(Arc::ptr_eq(&first, &again));
        }
        let decoded = Cluster::decode(first.body.value.as_slice()).unwrap();
        assert_eq!(
            decoded.metadata.unwrap().filter_metadata,
            cluster(0..40).metadata.unwrap().filter_metadata
        );
        let other = encoder.encode("c", &cluster(0..41));
        assert_ne!(first.version, other.version);
    }

    #[test]
    fn type_urls_are_known_or_generic() {
        for kind in Kind::XDS {
            assert_eq!(Kind::of_type_url(kind.type_url()), Some(kind));
        }
        assert_eq!(
            Kind::of_type_url("config.istio.io/v1alpha2/rule"),
            Some(Kind::Generic("config.istio.io/v1alpha2/rule".into()))
        );
        assert_eq!(Kind::of_type_url("type.googleapis.com/x"), None);
        assert_eq!(Kind::of_type_url(""), None);
    }

    #[test]
    fn broken_bytes_have_no_canonical_form() {
        let canonical = |bytes: &[u8]| SHAPES.canonical("google.protobuf.Struct", bytes);
        assert_eq!(canonical(&[0x0a, 0x05, 0x01]), None);
        assert_eq!(canonical(&[0x0b]), None);
        assert_eq!(canonical(&[0xff; 11]), None);
        assert_eq!(canonical(&[]), Some(Vec::new()));
    }

    #[test]
    fn what_a_resource_stands_on_is_read_from_it() {
        use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain};
        let tcp = TcpProxy {
            cluster_specifier: Some(TcpDestination::Cluster("db".into())),
            ..TcpProxy::default()
        };
        let filter = Filter {
            config_type: Some(ConfigType::TypedConfig(pack_any(tcp))),
            ..Filter::default()
        };
        let chain = FilterChain {
            filters: vec![filter],
            ..FilterChain::default()
        };
        let listener = Listener {
            filter_chains: vec![chain],
            ..Listener::default()
        };
        assert_eq!(*listener.refers().clusters, ["db".into()]);
        let mut cluster = Cluster {
            name: "c".into(),
            ..Cluster::default()
        };
        assert_eq!(cluster.refers(), Refers::default(), "static by default");
        cluster.cluster_discovery_type =
            Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32));
        assert_eq!(*cluster.refers().next, ["c".into()]);
    }
}
