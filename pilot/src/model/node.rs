//! The proxy at the other end of a stream, as its first request describes it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

/// Longest node id, namespace or other name believed.
const NAME_LIMIT: usize = 1024;

/// Most labels and addresses a node may name.
const LIST_LIMIT: usize = 256;

/// What a node is there for: the first part of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Beside one workload.
    Sidecar,
    /// A gateway.
    Router,
    /// No proxy: reads configuration objects only (Mixer, tools).
    Reader,
}

/// How the application's traffic reaches its sidecar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Interception {
    /// iptables REDIRECT to 15001 and 15006.
    #[default]
    Redirect,
    /// iptables TPROXY.
    Tproxy,
    /// Not at all: the sidecar binds the ports it serves.
    None,
}

/// Which program the node runs: what it understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Agent {
    /// Our proxy: knows the Mixer filters.
    Lateen,
    /// Stock Envoy, or unknown: gets stock filters only.
    #[default]
    Envoy,
}

/// A node: everything about the client that translation may depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `ROLE~IP~NAME.NAMESPACE~DOMAIN`, as sent.
    pub id: String,
    /// What it is there for.
    pub role: Role,
    /// Its addresses, at least one; from INSTANCE_IPS, else from the id.
    pub addresses: Vec<IpAddr>,
    /// Pod or VM name.
    pub name: String,
    /// The namespace whose configuration it sees.
    pub namespace: String,
    /// DNS domain: `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    /// Workload labels.
    pub labels: BTreeMap<String, String>,
    /// Whether a certificate of the mesh has proven namespace and service account.
    pub verified: bool,
    /// Service account, if it says so.
    pub service_account: Option<String>,
    /// Deployment name, or the like.
    pub workload_name: Option<String>,
    /// Cluster of the registry it lives in.
    pub cluster_id: String,
    /// Mesh id.
    pub mesh_id: String,
    /// `region/zone/subzone` as the node says, possibly empty.
    pub locality: String,
    /// How traffic reaches it.
    pub interception: Interception,
    /// Which program it runs.
    pub agent: Agent,
    /// With interception NONE: service or container port to where the application really listens.
    pub app_ports: BTreeMap<u16, SocketAddr>,
    /// With interception NONE: the address on which outbound listeners bind.
    pub outbound_bind: Option<IpAddr>,
    /// With interception NONE: port of the outbound HTTP proxy listener.
    pub http_proxy_port: Option<u16>,
    /// Other metadata of type string, by key.
    pub metadata: BTreeMap<String, String>,
}

/// Why a node is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The first request carries none.
    #[error("the first request of a stream must carry a node")]
    Missing,
    /// The id is not four parts.
    #[error("node id {0:?} is not TYPE~IP~NAME.NAMESPACE~DOMAIN")]
    Id(String),
    /// No usable address.
    #[error("node {0:?} names no valid IP address, neither in INSTANCE_IPS nor in its id")]
    Address(String),
    /// Neither NAMESPACE nor a domain to take it from.
    #[error("node {0:?} names no namespace")]
    Namespace(String),
    /// A metadata field does not parse.
    #[error("node metadata {key} is not {wanted}")]
    Metadata {
        /// The field.
        key: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
}

impl Node {
    /// Reads a node as a stream's first request carries it.
    ///
    /// # Errors
    /// No node, a malformed id, no address, no namespace, or metadata we depend on that does not parse.
    pub fn parse(node: Option<&core::Node>) -> Result<Self, NodeError> {
        let node = node.ok_or(NodeError::Missing)?;
        let bad_id = || NodeError::Id(node.id.chars().take(NAME_LIMIT).collect());
        if node.id.len() > NAME_LIMIT {
            return Err(bad_id());
        }
        let mut parts = node.id.split('~');
        let (Some(role), Some(ip), Some(name), Some(domain), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(bad_id());
        };
        let role = match role {
            "sidecar" => Role::Sidecar,
            "router" | "ingress" => Role::Router,
            "" => return Err(bad_id()),
            _ => Role::Reader,
        };
        let facts = Facts(node.metadata.as_ref());

        let mut addresses: Vec<IpAddr> = facts
            .text("INSTANCE_IPS")
            .iter()
            .flat_map(|all| all.split(','))
            .filter_map(|ip| ip.trim().parse().ok())
            .take(LIST_LIMIT)
            .collect();
        if addresses.is_empty() {
            addresses.extend(ip.parse::<IpAddr>());
        }
        if addresses.is_empty() {
            return Err(NodeError::Address(node.id.clone()));
        }

        let namespace = match facts.text("NAMESPACE") {
            Some(namespace) if !namespace.is_empty() => namespace,
            _ => domain.split('.').next().unwrap_or_default().to_owned(),
        };
        if namespace.is_empty() || namespace.len() > NAME_LIMIT {
            return Err(NodeError::Namespace(node.id.clone()));
        }

        let interception = match facts.text("INTERCEPTION_MODE").as_deref() {
            None | Some("" | "REDIRECT") => Interception::Redirect,
            Some("TPROXY") => Interception::Tproxy,
            Some("NONE") => Interception::None,
            Some(_) => {
                return Err(NodeError::Metadata {
                    key: "INTERCEPTION_MODE",
                    wanted: "REDIRECT, TPROXY or NONE",
                });
            }
        };
        let app_ports = facts
            .map("APP_PORTS")
            .into_iter()
            .map(|(port, address)| Some((port.parse().ok()?, address.parse().ok()?)))
            .collect::<Option<BTreeMap<u16, SocketAddr>>>()
            .ok_or(NodeError::Metadata {
                key: "APP_PORTS",
                wanted: "a map from port to IP:PORT",
            })?;
        let outbound_bind = facts
            .parsed("OUTBOUND_BIND")
            .map_err(|()| NodeError::Metadata {
                key: "OUTBOUND_BIND",
                wanted: "an IP address",
            })?;
        let http_proxy_port =
            facts
                .parsed("HTTP_PROXY_PORT")
                .map_err(|()| NodeError::Metadata {
                    key: "HTTP_PROXY_PORT",
                    wanted: "a port",
                })?;
        let some = |key| facts.text(key).filter(|text| !text.is_empty());

        Ok(Self {
            id: node.id.clone(),
            role,
            addresses,
            name: name
                .rsplit_once('.')
                .map_or(name, |(name, _)| name)
                .to_owned(),
            namespace,
            domain: domain.to_owned(),
            labels: facts.map("LABELS"),
            verified: false,
            service_account: some("SERVICE_ACCOUNT"),
            workload_name: some("WORKLOAD_NAME"),
            cluster_id: some("CLUSTER_ID").unwrap_or_default(),
            mesh_id: some("MESH_ID").unwrap_or_default(),
            locality: node.locality.as_ref().map_or_else(String::new, locality),
            interception,
            agent: match node.user_agent_name.as_str() {
                "lateen" => Agent::Lateen,
                _ => Agent::Envoy,
            },
            app_ports,
            outbound_bind,
            http_proxy_port,
            metadata: facts.strings(),
        })
    }

    /// The node's first address.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.addresses
            .first()
            .copied()
            .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST))
    }
}

/// `region/zone/subzone`, as far as there is something believable.
fn locality(of: &core::Locality) -> String {
    let parts = [&of.region, &of.zone, &of.sub_zone].map(String::as_str);
    if parts.iter().any(|part| part.len() > NAME_LIMIT) {
        return String::new();
    }
    parts.join("/").trim_end_matches('/').to_owned()
}

/// Node metadata; scalars may come as strings, numbers or booleans.
struct Facts<'a>(Option<&'a Struct>);

impl Facts<'_> {
    fn kind(&self, key: &str) -> Option<&Kind> {
        self.0?.fields.get(key)?.kind.as_ref()
    }

    fn text(&self, key: &str) -> Option<String> {
        scalar(self.kind(key)?)
    }

    fn parsed<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, ()> {
        match self.text(key) {
            None => Ok(None),
            Some(text) if text.is_empty() => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| ()),
        }
    }

    fn map(&self, key: &str) -> BTreeMap<String, String> {
        let Some(Kind::StructValue(map)) = self.kind(key) else {
            return BTreeMap::new();
        };
        map.fields
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), scalar(value.kind.as_ref()?)?)))
            .take(LIST_LIMIT)
            .collect()
    }

    fn strings(&self) -> BTreeMap<String, String> {
        self.0
            .iter()
            .flat_map(|all| &all.fields)
            .filter_map(|(key, Value { kind })| Some((key.clone(), scalar(kind.as_ref()?)?)))
            .take(LIST_LIMIT)
            .collect()
    }
}

fn scalar(kind: &Kind) -> Option<String> {
    match kind {
        Kind::StringValue(text) => Some(text.clone()),
        Kind::NumberValue(number) => Some(number.to_string()),
        Kind::BoolValue(flag) => Some(flag.to_string()),
        // Istio's agents send lists such as INSTANCE_IPS joined by commas; accept real lists too.
        Kind::ListValue(list) => Some(
            list.values
                .iter()
                .filter_map(|value| scalar(value.kind.as_ref()?))
                .collect::<Vec<_>>()
                .join(","),
        ),
        Kind::NullValue(_) | Kind::StructValue(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, metadata: &[(&str, Kind)]) -> core::Node {
        core::Node {
            id: id.into(),
            metadata: Some(Struct {
                fields: metadata
                    .iter()
                    .map(|(k, v)| {
                        (
                            (*k).to_owned(),
                            Value {
                                kind: Some(v.clone()),
                            },
                        )
                    })
                    .collect(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_sidecar_is_read_whole() {
        let ports = Struct {
            fields: [(
                "9080".to_owned(),
                Value {
                    kind: Some(Kind::StringValue("127.30.0.11:19080".into())),
                },
            )]
            .into(),
        };
        let mut raw = node(
            "sidecar~127.30.0.11~reviews-v1-x.default~default.svc.cluster.local",
            &[
                ("NAMESPACE", Kind::StringValue("default".into())),
                ("INTERCEPTION_MODE", Kind::StringValue("NONE".into())),
                ("APP_PORTS", Kind::StructValue(ports)),
                ("OUTBOUND_BIND", Kind::StringValue("127.30.1.11".into())),
                ("HTTP_PROXY_PORT", Kind::StringValue("15002".into())),
            ],
        );
        raw.user_agent_name = "lateen".into();
        let node = Node::parse(Some(&raw)).unwrap();
        assert_eq!(node.role, Role::Sidecar);
        assert_eq!(node.name, "reviews-v1-x");
        assert_eq!(node.agent, Agent::Lateen);
        assert_eq!(node.app_ports[&9080], "127.30.0.11:19080".parse().unwrap());
        assert_eq!(node.http_proxy_port, Some(15002));
    }

    #[test]
    fn four_parts_and_an_address_are_required() {
        assert_eq!(Node::parse(None), Err(NodeError::Missing));
        assert!(matches!(
            Node::parse(Some(&node("sidecar~a~b", &[]))),
            Err(NodeError::Id(_))
        ));
        assert!(matches!(
            Node::parse(Some(&node("sidecar~nope~a.b~b.svc", &[]))),
            Err(NodeError::Address(_))
        ));
        let saved = node(
            "sidecar~nope~a.b~b.svc",
            &[("INSTANCE_IPS", Kind::StringValue("x,10.0.0.1".into()))],
        );
        let parsed = Node::parse(Some(&saved)).unwrap();
        assert_eq!(parsed.ip(), "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(parsed.namespace, "b", "taken from the domain");
    }

    #[test]
    fn a_broken_fact_refuses_the_node() {
        let raw = node(
            "sidecar~10.0.0.1~a.b~b.svc",
            &[("OUTBOUND_BIND", Kind::StringValue("x".into()))],
        );
        assert!(matches!(
            Node::parse(Some(&raw)),
            Err(NodeError::Metadata {
                key: "OUTBOUND_BIND",
                ..
            })
        ));
    }
}
