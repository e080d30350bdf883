//! Whether the caller may have a certificate, and for which identity: exactly the one it proved. The
//! one place where entitlement is decided; a [`Permit`] is what signing asks for.

use lateen_identity::{SpiffeId, TrustDomain};

use crate::authenticate::Caller;
use crate::token::TokenError;

/// Why an authenticated caller gets nothing. Callers learn none of this; the audit log does.
#[derive(Debug, thiserror::Error)]
pub enum AuthorizeError {
    /// An identity we do not vouch for.
    #[error("{0} is outside the trust domain")]
    TrustDomain(SpiffeId),
    /// Not of the form that policies understand.
    #[error("{0} is not of the form /ns/<namespace>/sa/<service account>")]
    Form(SpiffeId),
    /// Auth's own identity would let its holder pose as Auth.
    #[error("{0} is the identity of Auth itself")]
    Own(SpiffeId),
    /// The token was used by somebody else meanwhile.
    #[error("the token cannot be used up")]
    Token(#[source] TokenError),
    /// The process is stopping.
    #[error("interrupted")]
    Interrupted,
}

/// The right to one certificate of one identity.
#[derive(Debug)]
pub(crate) struct Permit(SpiffeId);

impl Permit {
    /// For whom.
    pub(crate) fn identity(&self) -> &SpiffeId {
        &self.0
    }

    /// Auth's own certificate needs nobody's permission.
    pub(crate) fn own(id: SpiffeId) -> Self {
        Self(id)
    }
}

/// Grants, and uses the token up; call it when nothing but signing can fail any more.
pub(crate) async fn authorize(
    caller: Caller,
    trust_domain: &TrustDomain,
    own: &SpiffeId,
) -> Result<Permit, AuthorizeError> {
    let id = caller.identity();
    if id.trust_domain() != trust_domain {
        return Err(AuthorizeError::TrustDomain(id.clone()));
    }
    if id.namespace().is_none() {
        return Err(AuthorizeError::Form(id.clone()));
    }
    if id == own {
        return Err(AuthorizeError::Own(id.clone()));
    }
    match caller {
        Caller::Certificate(id) | Caller::ServiceAccount(id) => Ok(Permit(id)),
        // It waits for the disk, so not on the runtime's threads.
        Caller::Token(token) => match tokio::task::spawn_blocking(move || token.consume()).await {
            Ok(consumed) => consumed.map(Permit).map_err(AuthorizeError::Token),
            Err(_) => Err(AuthorizeError::Interrupted),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(id: &str) -> Result<Permit, AuthorizeError> {
        let own = "spiffe://td/ns/istio-system/sa/auth".parse().unwrap();
        authorize(
            Caller::Certificate(id.parse().unwrap()),
            &"td".parse().unwrap(),
            &own,
        )
        .await
    }

    #[tokio::test]
    async fn only_members_get_only_their_own() {
        assert_eq!(
            ask("spiffe://td/ns/a/sa/b")
                .await
                .unwrap()
                .identity()
                .to_string(),
            "spiffe://td/ns/a/sa/b"
        );
        assert!(matches!(
            ask("spiffe://other/ns/a/sa/b").await,
            Err(AuthorizeError::TrustDomain(_))
        ));
        assert!(matches!(
            ask("spiffe://td/admin").await,
            Err(AuthorizeError::Form(_))
        ));
        assert!(matches!(
            ask("spiffe://td/ns/istio-system/sa/auth").await,
            Err(AuthorizeError::Own(_))
        ));
    }
}
