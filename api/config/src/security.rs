//! `security.istio.io` PeerAuthentication, and the older `authentication.istio.io` Policy and MeshPolicy.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::object::Labels;
use crate::value::MatchLabels;

/// Whether workloads demand mesh mTLS of their clients.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct PeerAuthentication {
    /// Workloads; none: the namespace, or in the root namespace the mesh.
    pub selector: Option<MatchLabels>,
    /// For all ports.
    pub mtls: Option<MutualTls>,
    /// By workload port.
    #[serde(alias = "port_level_mtls")]
    pub port_level_mtls: BTreeMap<u16, MutualTls>,
}

/// A mode, boxed as users write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MutualTls {
    /// The mode.
    pub mode: MutualTlsMode,
}

/// Whether mesh mTLS is demanded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MutualTlsMode {
    /// As the wider scope says.
    #[default]
    Unset,
    /// Plain text only.
    Disable,
    /// Both.
    Permissive,
    /// mTLS only.
    Strict,
}

impl PeerAuthentication {
    /// The labels it selects by; empty: everything in its scope.
    #[must_use]
    pub fn labels(&self) -> Option<&Labels> {
        self.selector
            .as_ref()
            .map(|selector| &selector.match_labels)
            .filter(|labels| !labels.is_empty())
    }

    /// The mode of the whole workload.
    #[must_use]
    pub fn mode(&self) -> MutualTlsMode {
        self.mtls.unwrap_or_default().mode
    }
}

/// `authentication.istio.io` Policy (one namespace, some services) or MeshPolicy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthenticationPolicy {
    /// Services; none: all of the scope.
    pub targets: Vec<AuthenticationTarget>,
    /// How peers prove who they are; none: not at all.
    pub peers: Vec<AuthenticationPeer>,
    /// Whether a peer that proves nothing is let in all the same.
    #[serde(alias = "peer_is_optional")]
    pub peer_is_optional: bool,
    /// End-user authentication; not supported yet.
    pub origins: Vec<Value>,
    /// See `origins`.
    #[serde(alias = "origin_is_optional")]
    pub origin_is_optional: bool,
    /// See `origins`.
    #[serde(alias = "principal_binding")]
    pub principal_binding: String,
}

/// A service a Policy is for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthenticationTarget {
    /// Short name.
    pub name: String,
    /// Ports; none: all.
    pub ports: Vec<AuthenticationPort>,
    /// Old: subset of workloads.
    pub labels: Labels,
    /// Old: subset.
    pub subset: String,
}

/// A port by number or name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthenticationPort {
    /// Number.
    pub number: Option<u16>,
    /// Name.
    pub name: Option<String>,
}

/// One way to prove who a peer is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthenticationPeer {
    /// Mesh mTLS; written `mtls: {}` or `mtls:`, so presence counts.
    #[serde(deserialize_with = "present")]
    pub mtls: Option<PolicyMutualTls>,
    /// Not supported yet.
    pub jwt: Option<Value>,
}

/// Parameters of mTLS in a Policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct PolicyMutualTls {
    /// Old: TLS without client certificate.
    #[serde(alias = "allow_tls")]
    pub allow_tls: bool,
    /// `STRICT` (the default) or `PERMISSIVE`.
    pub mode: String,
}

fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PolicyMutualTls>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

impl AuthenticationPolicy {
    /// What it demands, in PeerAuthentication's terms.
    #[must_use]
    pub fn mode(&self) -> MutualTlsMode {
        match self.peers.iter().find_map(|peer| peer.mtls.as_ref()) {
            None => MutualTlsMode::Disable,
            Some(mtls) if mtls.mode == "PERMISSIVE" || self.peer_is_optional => {
                MutualTlsMode::Permissive
            }
            Some(_) => MutualTlsMode::Strict,
        }
    }
}
