//! `security.istio.io` PeerAuthentication and RequestAuthentication, and the older `authentication.istio.io` Policy
//! and MeshPolicy.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::object::Labels;
use crate::value::{Duration, MatchLabels};

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

/// Which tokens of end users are good at some workloads. A request with a bad one is refused, one without passes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RequestAuthentication {
    /// Workloads; none: the namespace, or from the root namespace the mesh.
    pub selector: Option<MatchLabels>,
    /// The old form of `target_refs`.
    pub target_ref: Option<PolicyTarget>,
    /// What it is for, instead of a selector.
    pub target_refs: Vec<PolicyTarget>,
    /// Issuers, and how their tokens are verified.
    pub jwt_rules: Vec<JwtRule>,
}

impl RequestAuthentication {
    /// The labels it selects by; none: everything in its scope.
    #[must_use]
    pub fn labels(&self) -> Option<&Labels> {
        self.selector
            .as_ref()
            .map(|selector| &selector.match_labels)
            .filter(|labels| !labels.is_empty())
    }

    /// What it is for by reference.
    pub fn targets(&self) -> impl Iterator<Item = &PolicyTarget> {
        self.target_ref.iter().chain(&self.target_refs)
    }
}

/// What a policy is for, by reference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyTarget {
    /// API group; empty: Kubernetes' own.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Its namespace; only the policy's own is allowed.
    pub namespace: String,
}

impl PolicyTarget {
    /// The name of the Gateway (of the Gateway API), if it is one. Other targets are for waypoints.
    #[must_use]
    pub fn gateway(&self) -> Option<&str> {
        (self.group == "gateway.networking.k8s.io" && self.kind == "Gateway")
            .then_some(self.name.as_str())
    }
}

/// Tokens of one issuer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct JwtRule {
    /// Claim `iss`.
    pub issuer: String,
    /// Claim `aud`, any of these; none: any.
    pub audiences: Vec<String>,
    /// Where the keys are published.
    pub jwks_uri: String,
    /// The keys themselves.
    pub jwks: String,
    /// Where tokens stand; none at all: `Authorization: Bearer`, or the parameter `access_token`.
    pub from_headers: Vec<JwtHeader>,
    /// Names of query parameters.
    pub from_params: Vec<String>,
    /// Names of cookies.
    pub from_cookies: Vec<String>,
    /// Whether the workload sees the token.
    pub forward_original_token: bool,
    /// A header that gets the payload, base64url.
    pub output_payload_to_header: String,
    /// Headers that get claims.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// Claims whose text is a list, as `scope` and `permission` always are.
    pub space_delimited_claims: Vec<String>,
    /// To fetch keys within; 5 s unless set.
    pub timeout: Option<Duration>,
}

/// A header with a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JwtHeader {
    /// Name.
    pub name: String,
    /// Before the token, with the space.
    pub prefix: String,
}

/// A header that gets a claim.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClaimToHeader {
    /// Header.
    pub header: String,
    /// Claim; `a.b` is `b` within `a`.
    pub claim: String,
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
    /// How end users prove who they are: any of these.
    pub origins: Vec<AuthenticationOrigin>,
    /// Whether a request without token is let in all the same.
    #[serde(alias = "origin_is_optional")]
    pub origin_is_optional: bool,
    /// Whose identity counts as the request's; both can be asked for here.
    #[serde(alias = "principal_binding")]
    pub principal_binding: String,
}

/// One way for end users to prove who they are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthenticationOrigin {
    /// By token.
    pub jwt: Option<OriginJwt>,
}

/// Tokens of one issuer, as older Policies say it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct OriginJwt {
    /// Claim `iss`.
    pub issuer: String,
    /// Claim `aud`, any of these; none: any.
    pub audiences: Vec<String>,
    /// Where the keys are published.
    #[serde(alias = "jwks_uri")]
    pub jwks_uri: String,
    /// The keys themselves.
    pub jwks: String,
    /// Names of headers with tokens.
    #[serde(alias = "jwt_headers")]
    pub jwt_headers: Vec<String>,
    /// Names of query parameters with tokens.
    #[serde(alias = "jwt_params")]
    pub jwt_params: Vec<String>,
    /// Paths a token is demanded on. Not read: it is demanded on all.
    #[serde(alias = "trigger_rules")]
    pub trigger_rules: Vec<Value>,
}

impl OriginJwt {
    /// The same in today's words.
    #[must_use]
    pub fn rule(&self) -> JwtRule {
        JwtRule {
            issuer: self.issuer.clone(),
            audiences: self.audiences.clone(),
            jwks_uri: self.jwks_uri.clone(),
            jwks: self.jwks.clone(),
            from_headers: self
                .jwt_headers
                .iter()
                .map(|name| JwtHeader {
                    name: name.clone(),
                    prefix: String::new(),
                })
                .collect(),
            from_params: self.jwt_params.clone(),
            // Istio 1.0 to 1.4: always.
            forward_original_token: true,
            ..JwtRule::default()
        }
    }
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
