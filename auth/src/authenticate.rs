//! Who is calling: from the certificate of the connection, or from a join token. Never from a header that
//! only claims something, never from the CSR.

use std::time::SystemTime;

use lateen_identity::SpiffeId;
use lateen_service::tls::PeerIdentity;
use tonic::metadata::MetadataMap;

use crate::token::{Pending, TokenError, Tokens};

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
}

/// An authenticated caller. A token is not used up yet: that happens when its use is granted.
#[derive(Debug)]
pub(crate) enum Caller {
    Certificate(SpiffeId),
    Token(Pending),
}

impl Caller {
    /// Whom it proved to be.
    pub(crate) fn identity(&self) -> &SpiffeId {
        match self {
            Self::Certificate(id) => id,
            Self::Token(token) => token.identity(),
        }
    }

    /// How, for the audit log.
    pub(crate) fn method(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "certificate",
            Self::Token(_) => "join-token",
        }
    }
}

/// The first credential that authenticates counts: the certificate of the connection (verified by the
/// listener against our own roots), then the token.
pub(crate) fn authenticate(
    peer: &PeerIdentity,
    metadata: &MetadataMap,
    tokens: &Tokens,
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
    tokens
        .find(token, now)
        .map(Caller::Token)
        .map_err(AuthenticateError::Token)
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

    #[test]
    fn plaintext_callers_are_nobody() {
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
        let refused = authenticate(&PeerIdentity::default(), &metadata, &tokens, now);
        assert!(matches!(refused, Err(AuthenticateError::Plaintext)));
    }
}
