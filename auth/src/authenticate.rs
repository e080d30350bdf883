//! Who is calling: from the certificate of the connection, a join token, or the token of a pod. Never from a header that
//! only claims something, never from the CSR.

use std::time::SystemTime;

use lateen_identity::{IdError, SpiffeId, TrustDomain};
use lateen_kubernetes::{ReviewError, Reviewer};
use lateen_service::tls::PeerIdentity;
use tonic::metadata::MetadataMap;

use crate::token::{self, Pending, TokenError, Tokens};

/// Longest `authorization` value looked at.
const MAX_BEARER_BYTES: usize = 4096;

/// Why nobody could be authenticated. Callers learn none of this; the audit log does.
#[derive(Debug, thiserror::Error)]
pub enum AuthenticateError {
    /// Not over TLS, so nothing about the caller is known.
    #[error("the connection is not encrypted")]
    Plaintext,
    /// Neither a certificate nor a token.
    #[error("the caller presented neither a certificate nor a bearer token")]
    Nothing,
    /// The certificate ended while the connection stayed open.
    #[error("the caller's certificate has expired since it connected")]
    Expired,
    /// The token is no good.
    #[error("the caller's token is not accepted")]
    Token(#[source] TokenError),
    /// Nor is it of a pod of the cluster.
    #[error("the caller's token is not accepted")]
    Review(#[source] ReviewError),
    /// The service account has a name that no identity can have.
    #[error("the caller's service account cannot be named")]
    Name(#[source] IdError),
}

impl AuthenticateError {
    /// Whether the same credential may be good a moment later.
    pub(crate) fn is_temporary(&self) -> bool {
        matches!(self, Self::Review(error) if error.is_temporary())
    }
}

/// An authenticated caller. A token is not used up yet: that happens when its use is granted.
#[derive(Debug)]
pub(crate) enum Caller {
    Certificate(SpiffeId),
    Token(Pending),
    ServiceAccount(SpiffeId),
}

impl Caller {
    /// Whom it proved to be.
    pub(crate) fn identity(&self) -> &SpiffeId {
        match self {
            Self::Certificate(id) | Self::ServiceAccount(id) => id,
            Self::Token(token) => token.identity(),
        }
    }

    /// How, for the audit log.
    pub(crate) fn method(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "certificate",
            Self::Token(_) => "join-token",
            Self::ServiceAccount(_) => "kubernetes-token",
        }
    }
}

/// What callers may prove themselves with, beside certificates.
#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) tokens: Tokens,
    /// Of the cluster whose pods are known by their tokens.
    pub(crate) reviewer: Option<Reviewer>,
}

impl Credentials {
    /// The first credential that authenticates counts: the certificate of the connection (verified by the
    /// listener against our own roots), then the token.
    pub(crate) async fn authenticate(
        &self,
        peer: &PeerIdentity,
        metadata: &MetadataMap,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Caller, AuthenticateError> {
        if !peer.is_encrypted() {
            return Err(AuthenticateError::Plaintext);
        }
        if let Some(id) = peer.spiffe_id() {
            return match peer.not_after() {
                Some(end) if now < end => Ok(Caller::Certificate(id.clone())),
                // Whoever holds an expired certificate and a token can connect without the certificate.
                _ => Err(AuthenticateError::Expired),
            };
        }
        let token = bearer(metadata).ok_or(AuthenticateError::Nothing)?;
        match &self.reviewer {
            // A join token is nobody's business but ours.
            Some(reviewer) if !token.starts_with(token::PREFIX) => {
                let account = reviewer.review(token).await;
                let account = account.map_err(AuthenticateError::Review)?;
                SpiffeId::workload(trust_domain, &account.namespace, &account.name)
                    .map(Caller::ServiceAccount)
                    .map_err(AuthenticateError::Name)
            }
            _ => self
                .tokens
                .find(token, now)
                .map(Caller::Token)
                .map_err(AuthenticateError::Token),
        }
    }
}

/// The first `authorization` value with the exact prefix, as Istio reads it.
fn bearer(metadata: &MetadataMap) -> Option<&str> {
    metadata
        .get_all("authorization")
        .iter()
        .filter(|value| value.len() <= MAX_BEARER_BYTES)
        .filter_map(|value| value.to_str().ok())
        .find_map(|value| value.strip_prefix("Bearer "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bearer_counts() {
        let mut metadata = MetadataMap::new();
        assert_eq!(bearer(&metadata), None);
        for value in ["Basic x", "bearer x", "Bearer one", "Bearer two"] {
            metadata.append("authorization", value.parse().unwrap());
        }
        assert_eq!(bearer(&metadata), Some("one"));
    }

    #[tokio::test]
    async fn plaintext_callers_are_nobody() {
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(state.path()).unwrap();
        let now = SystemTime::now();
        let token = tokens
            .create(
                &"spiffe://td/ns/a/sa/b".parse().unwrap(),
                std::time::Duration::from_secs(9),
                now,
            )
            .unwrap();
        let mut metadata = MetadataMap::new();
        metadata.insert(
            "authorization",
            format!("Bearer {}", &*token).parse().unwrap(),
        );
        let credentials = Credentials {
            tokens,
            reviewer: None,
        };
        let trust_domain = "td".parse().unwrap();
        let peer = PeerIdentity::default();
        let refused = credentials.authenticate(&peer, &metadata, &trust_domain, now);
        let refused = refused.await;
        assert!(matches!(refused, Err(AuthenticateError::Plaintext)));
    }
}
