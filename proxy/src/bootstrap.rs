//! The bootstrap file: Envoy's message from YAML or JSON, and what of it decides how we start.
//! What it says about listeners and clusters is compiled by their own modules.

use std::{fs, net::SocketAddr, ops::Range, path::PathBuf};

use bytes::Bytes;
use envoy_types::pb::envoy::config::{
    bootstrap::v3 as proto,
    cluster::v3::Cluster,
    core::v3::{
        Address, ApiConfigSource, ConfigSource, Node, address, api_config_source::ApiType,
        config_source::ConfigSourceSpecifier, grpc_service::TargetSpecifier,
        node::UserAgentVersionType, socket_address::PortSpecifier,
    },
};
use lateen_protocols::json;
use prost::{
    DecodeError, Message,
    encoding::{
        DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
    },
};

use crate::config_error::ConfigError;

/// A bootstrap is written by hand or by an agent; none comes near this.
const MAX_BYTES: u64 = 16 << 20;

/// The bootstrap, read and checked.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    /// As written, but for the static clusters.
    pub proto: proto::Bootstrap,
    /// All of it. Clusters can be many, and a decoded one is ten times as large.
    encoded: Bytes,
    clusters: Vec<Range<usize>>,
    /// Who we are, completed with our name and version.
    pub node: Node,
    /// Where admin listens, if anywhere.
    pub admin: Option<SocketAddr>,
    /// The aggregated stream, if any.
    pub ads: Option<GrpcSource>,
    /// Where listeners come from besides the file.
    pub listeners: Option<DiscoverySource>,
    /// Where clusters come from besides the file.
    pub dynamic_clusters: Option<DiscoverySource>,
}

/// A management server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcSource {
    /// A static cluster.
    pub cluster: String,
    /// Incremental instead of state of the world.
    pub delta: bool,
    /// Sent with the stream's request.
    pub metadata: Vec<(String, String)>,
}

/// Where resources of one kind come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiscoverySource {
    /// The aggregated stream.
    Ads,
    /// A stream of their own.
    Grpc(GrpcSource),
    /// A file with a DiscoveryResponse, read again when it changes.
    Path(PathBuf),
}

/// Where the text of a bootstrap comes from, and what flags say over it.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// `--config-path`.
    pub path: Option<PathBuf>,
    /// `--config-yaml`, merged over the file.
    pub yaml: Option<String>,
    /// `--service-node`.
    pub node_id: Option<String>,
    /// `--service-cluster`.
    pub node_cluster: Option<String>,
    /// `--service-zone`.
    pub node_zone: Option<String>,
}

impl Bootstrap {
    /// Reads and merges what the flags name.
    ///
    /// # Errors
    /// A file cannot be read, is not a bootstrap, or asks for what we do not have.
    pub fn load(origin: &Origin) -> Result<Bootstrap, ConfigError> {
        let mut encoded = Vec::new();
        if let Some(path) = &origin.path {
            let name = path.display().to_string();
            let failed =
                |e: std::io::Error| ConfigError::new(name.clone(), format!("cannot be read: {e}"));
            if fs::metadata(path).map_err(failed)?.len() > MAX_BYTES {
                return Err(ConfigError::new(
                    name,
                    format!("is larger than {MAX_BYTES} bytes"),
                ));
            }
            let text = fs::read_to_string(path).map_err(failed)?;
            encoded = json::encode_yaml::<proto::Bootstrap>(&text)
                .map_err(|e| ConfigError::new(name, e.to_string()))?;
        }
        if let Some(text) = &origin.yaml {
            let path = "--config-yaml";
            let over = json::encode_yaml::<proto::Bootstrap>(text)
                .map_err(|e| ConfigError::new(path, e.to_string()))?;
            // One message after another is both merged.
            encoded.extend(over);
        }
        if origin.path.is_none() && origin.yaml.is_none() {
            return Err(ConfigError::new(
                "bootstrap",
                "give --config-path (-c) or --config-yaml",
            ));
        }
        let mut flags = Node {
            id: origin.node_id.clone().unwrap_or_default(),
            cluster: origin.node_cluster.clone().unwrap_or_default(),
            ..Node::default()
        };
        if let Some(zone) = &origin.node_zone {
            flags.locality.get_or_insert_default().zone.clone_from(zone);
        }
        let flags = proto::Bootstrap {
            node: Some(flags),
            ..proto::Bootstrap::default()
        };
        encoded.extend(flags.encode_to_vec());
        Bootstrap::new(encoded.into())
    }

    /// Checks an encoded bootstrap.
    ///
    /// # Errors
    /// It contradicts itself or asks for what we do not have.
    pub fn new(encoded: Bytes) -> Result<Bootstrap, ConfigError> {
        let broken = |e: DecodeError| ConfigError::new("bootstrap", e.to_string());
        let (rest, clusters) = take_clusters(&encoded).map_err(broken)?;
        let proto = proto::Bootstrap::decode(rest.as_slice()).map_err(broken)?;
        let mut node = proto.node.clone().unwrap_or_default();
        node.user_agent_name = "lateen".into();
        node.user_agent_version_type = Some(UserAgentVersionType::UserAgentVersion(
            env!("CARGO_PKG_VERSION").into(),
        ));
        let admin = match proto
            .admin
            .as_ref()
            .and_then(|admin| admin.address.as_ref())
        {
            None => None,
            Some(address) => Some(socket_address(address).map_err(|e| e.within("admin.address"))?),
        };
        let mut bootstrap = Bootstrap {
            node,
            admin,
            ads: None,
            listeners: None,
            dynamic_clusters: None,
            proto,
            encoded,
            clusters,
        };
        let dynamic = bootstrap
            .proto
            .dynamic_resources
            .clone()
            .unwrap_or_default();
        let within =
            |e: ConfigError, field: &str| e.within(format_args!("dynamic_resources.{field}"));
        if let Some(api) = &dynamic.ads_config {
            bootstrap.ads = Some(
                bootstrap
                    .grpc_source(api, true)
                    .map_err(|e| within(e, "ads_config"))?,
            );
        }
        if let Some(source) = &dynamic.cds_config {
            let source = bootstrap
                .source(source)
                .map_err(|e| within(e, "cds_config"))?;
            bootstrap.dynamic_clusters = Some(source);
        }
        if let Some(source) = &dynamic.lds_config {
            let source = bootstrap
                .source(source)
                .map_err(|e| within(e, "lds_config"))?;
            bootstrap.listeners = Some(source);
        }
        if bootstrap.proto.dynamic_resources.is_some() && bootstrap.node.id.is_empty() {
            return Err(ConfigError::new(
                "node.id",
                "is needed for dynamic resources (or --service-node)",
            ));
        }
        bootstrap.warn_about_ignored();
        Ok(bootstrap)
    }

    /// The clusters of the file, one after another.
    pub fn clusters(&self) -> impl Iterator<Item = Cluster> {
        // A cluster that does not decode, which none does that was read from text, has no name and is
        // refused for that.
        self.clusters
            .iter()
            .map(|range| Cluster::decode(&self.encoded[range.clone()]).unwrap_or_default())
    }

    /// The cluster of the file with this name.
    pub fn cluster(&self, name: &str) -> Option<Cluster> {
        self.clusters().find(|cluster| cluster.name == name)
    }

    /// All of it, as it was written.
    pub fn encoded(&self) -> &Bytes {
        &self.encoded
    }

    fn source(&self, source: &ConfigSource) -> Result<DiscoverySource, ConfigError> {
        match &source.config_source_specifier {
            Some(ConfigSourceSpecifier::Ads(_)) => match &self.ads {
                Some(_) => Ok(DiscoverySource::Ads),
                None => Err(ConfigError::new(
                    "ads",
                    "dynamic_resources.ads_config is not set",
                )),
            },
            Some(ConfigSourceSpecifier::Path(path)) => Ok(DiscoverySource::Path(path.into())),
            Some(ConfigSourceSpecifier::PathConfigSource(path)) => {
                Ok(DiscoverySource::Path(path.path.clone().into()))
            }
            Some(ConfigSourceSpecifier::ApiConfigSource(api)) => self
                .grpc_source(api, false)
                .map(DiscoverySource::Grpc)
                .map_err(|e| e.within("api_config_source")),
            Some(ConfigSourceSpecifier::Self_(_)) | None => Err(ConfigError::new(
                "config_source_specifier",
                "one of ads, path or gRPC is needed",
            )),
        }
    }

    fn grpc_source(
        &self,
        api: &ApiConfigSource,
        aggregated: bool,
    ) -> Result<GrpcSource, ConfigError> {
        let delta = match (ApiType::try_from(api.api_type), aggregated) {
            (Ok(ApiType::Grpc), _) | (Ok(ApiType::AggregatedGrpc), true) => false,
            (Ok(ApiType::DeltaGrpc), _) | (Ok(ApiType::AggregatedDeltaGrpc), true) => true,
            _ => {
                return Err(ConfigError::new(
                    "api_type",
                    "only GRPC and DELTA_GRPC are supported",
                ));
            }
        };
        let [service] = api.grpc_services.as_slice() else {
            return Err(ConfigError::new("grpc_services", "exactly one is needed"));
        };
        let Some(TargetSpecifier::EnvoyGrpc(grpc)) = &service.target_specifier else {
            return Err(ConfigError::new(
                "grpc_services[0]",
                "only envoy_grpc is supported",
            ));
        };
        if self.cluster(&grpc.cluster_name).is_none() {
            return Err(ConfigError::new(
                "grpc_services[0].envoy_grpc.cluster_name",
                format!("no static cluster is called {:?}", grpc.cluster_name),
            ));
        }
        Ok(GrpcSource {
            cluster: grpc.cluster_name.clone(),
            delta,
            metadata: service
                .initial_metadata
                .iter()
                .map(|header| (header.key.to_ascii_lowercase(), header.value.clone()))
                .collect(),
        })
    }

    /// Parts that change nothing about who may pass or where traffic goes.
    fn warn_about_ignored(&self) {
        let ignored = [
            (self.proto.hds_config.is_some(), "hds_config"),
            (!self.proto.stats_sinks.is_empty(), "stats_sinks"),
            (self.proto.overload_manager.is_some(), "overload_manager"),
            (
                !self.proto.bootstrap_extensions.is_empty(),
                "bootstrap_extensions",
            ),
            (self.proto.watchdogs.is_some(), "watchdogs"),
        ];
        for (_, field) in ignored.into_iter().filter(|(used, _)| *used) {
            tracing::warn!(field, "ignoring a part of the bootstrap");
        }
    }
}

/// Where the static clusters are in an encoded bootstrap, and all the rest of it.
fn take_clusters(encoded: &[u8]) -> Result<(Vec<u8>, Vec<Range<usize>>), DecodeError> {
    const STATIC_RESOURCES: u32 = 2;
    const CLUSTERS: u32 = 2;
    let (mut rest, mut clusters) = (Vec::new(), Vec::new());
    let all = 0..encoded.len();
    for (number, whole, content) in fields(encoded, all)? {
        if number != STATIC_RESOURCES {
            rest.extend_from_slice(&encoded[whole]);
            continue;
        }
        let mut others = Vec::new();
        for (number, whole, content) in fields(encoded, content)? {
            match number {
                CLUSTERS => clusters.push(content),
                _ => others.extend_from_slice(&encoded[whole]),
            }
        }
        encode_key(STATIC_RESOURCES, WireType::LengthDelimited, &mut rest);
        encode_varint(others.len() as u64, &mut rest);
        rest.extend(others);
    }
    Ok((rest, clusters))
}

/// A field: its number, where it is with its key, and where its content is if it has a length.
type Field = (u32, Range<usize>, Range<usize>);

fn fields(encoded: &[u8], within: Range<usize>) -> Result<Vec<Field>, DecodeError> {
    let mut left = &encoded[within.clone()];
    let mut found = Vec::new();
    while !left.is_empty() {
        let begin = within.end - left.len();
        let (number, wire) = decode_key(&mut left)?;
        let mut content = left;
        skip_field(wire, number, &mut left, DecodeContext::default())?;
        let end = within.end - left.len();
        let start = match wire {
            WireType::LengthDelimited => {
                end - usize::try_from(decode_varint(&mut content)?).unwrap_or(0)
            }
            _ => end,
        };
        found.push((number, begin..end, start..end));
    }
    Ok(found)
}

/// An address to bind: an IP and a port.
///
/// # Errors
/// It is a name, a pipe, or has no port.
pub fn socket_address(address: &Address) -> Result<SocketAddr, ConfigError> {
    let Some(address::Address::SocketAddress(socket)) = &address.address else {
        return Err(ConfigError::new("socket_address", "must be set"));
    };
    let ip = socket.address.parse().map_err(|_| {
        ConfigError::new(
            "socket_address.address",
            format!("{:?} is no IP", socket.address),
        )
    })?;
    let port = match socket.port_specifier {
        Some(PortSpecifier::PortValue(port)) => u16::try_from(port).ok(),
        _ => None,
    };
    let port =
        port.ok_or_else(|| ConfigError::new("socket_address.port_value", "must be 0 to 65535"))?;
    Ok(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r"
node: { id: me, cluster: c }
admin: { address: { socket_address: { address: 127.0.0.1, port_value: 15000 } } }
dynamic_resources:
  lds_config: { ads: {} }
  cds_config: { path_config_source: { path: /tmp/cds.yaml } }
  ads_config:
    api_type: DELTA_GRPC
    grpc_services:
    - envoy_grpc: { cluster_name: xds-grpc }
      initial_metadata: [ { key: X-Token, value: t } ]
static_resources: { clusters: [ { name: xds-grpc } ] }
";

    fn load(yaml: &str) -> Result<Bootstrap, ConfigError> {
        Bootstrap::load(&Origin {
            yaml: Some(yaml.into()),
            ..Origin::default()
        })
    }

    #[test]
    fn sources_and_addresses_are_read() {
        let bootstrap = load(GOOD).unwrap();
        assert_eq!(bootstrap.admin, Some(([127, 0, 0, 1], 15000).into()));
        let ads = GrpcSource {
            cluster: "xds-grpc".into(),
            delta: true,
            metadata: vec![("x-token".into(), "t".into())],
        };
        assert_eq!(bootstrap.ads, Some(ads));
        assert_eq!(bootstrap.listeners, Some(DiscoverySource::Ads));
        assert_eq!(
            bootstrap.dynamic_clusters,
            Some(DiscoverySource::Path("/tmp/cds.yaml".into()))
        );
        assert_eq!(bootstrap.node.user_agent_name, "lateen");
    }

    #[test]
    fn errors_name_the_place() {
        let error = |from: &str, to: &str| load(&GOOD.replace(from, to)).unwrap_err().to_string();
        assert!(error("me, cluster", "me, clutter").contains("clutter"));
        assert_eq!(
            error("[ { name: xds-grpc", "[ { name: other"),
            "dynamic_resources.ads_config: grpc_services[0].envoy_grpc.cluster_name: \
             no static cluster is called \"xds-grpc\""
        );
        assert_eq!(
            error("address: 127.0.0.1", "address: here"),
            "admin.address: socket_address.address: \"here\" is no IP"
        );
        assert!(error("id: me, ", "").starts_with("node.id: "));
        assert!(error("DELTA_GRPC", "REST").starts_with("dynamic_resources.ads_config: api_type"));
        let missing = Bootstrap::load(&Origin {
            path: Some("/does/not/exist".into()),
            ..Origin::default()
        });
        assert!(
            missing
                .unwrap_err()
                .to_string()
                .starts_with("/does/not/exist: cannot be read")
        );
    }

    #[test]
    fn flags_and_yaml_go_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.yaml");
        fs::write(&path, GOOD).unwrap();
        let bootstrap = Bootstrap::load(&Origin {
            path: Some(path),
            yaml: Some("node: { cluster: over }".into()),
            node_id: Some("flag".into()),
            ..Origin::default()
        })
        .unwrap();
        assert_eq!(
            (bootstrap.node.id.as_str(), bootstrap.node.cluster.as_str()),
            ("flag", "over")
        );
        assert!(bootstrap.ads.is_some());
    }

    #[test]
    fn clusters_are_kept_encoded() {
        let yaml = "static_resources: { clusters: [ { name: a }, { name: b, connect_timeout: 3s } ], \
                    listeners: [ { name: l } ], secrets: [ { name: s } ] }\nadmin: {}";
        let bootstrap = load(yaml).unwrap();
        let resources = bootstrap.proto.static_resources.clone().unwrap();
        assert_eq!(
            (resources.clusters.len(), resources.listeners.len()),
            (0, 1)
        );
        assert_eq!(resources.secrets[0].name, "s");
        let names: Vec<_> = bootstrap.clusters().map(|cluster| cluster.name).collect();
        assert_eq!(names, ["a", "b"]);
        let b = bootstrap.cluster("b").unwrap();
        assert_eq!(b.connect_timeout.unwrap().seconds, 3);
        assert!(bootstrap.cluster("c").is_none());
        let whole = proto::Bootstrap::decode(bootstrap.encoded().clone()).unwrap();
        assert_eq!(whole.static_resources.unwrap().clusters[1], b);
    }
}
