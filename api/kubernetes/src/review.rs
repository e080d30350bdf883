//! Asks the API server whose a token is (`TokenReview` of authentication.k8s.io/v1).

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::{Api, PostParams};
use tokio::time::timeout;

use crate::client::{ClusterArgs, ConnectError};

/// The API server is given so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// The group all service accounts are in, and nobody else.
const GROUP: &str = "system:serviceaccounts";
/// What the name of a service account's user begins with.
const USER: &str = "system:serviceaccount:";

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Why a token is nobody's.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// The API server cannot be asked, or does not let us ask.
    #[error("the API server cannot be asked whose the token is")]
    Unavailable(#[source] Box<kube::Error>),
    /// It took too long.
    #[error("the API server did not say within {} seconds whose the token is", PATIENCE.as_secs())]
    Slow,
    /// It does not know the token, or it has expired, or is for somebody else; in its words.
    #[error("the API server does not accept the token: {0}")]
    Refused(String),
    /// It says that the token is good, but not for whom: it does not know about audiences.
    #[error("the API server does not say that the token is for us")]
    Audience,
    /// It is the token of somebody else than a service account.
    #[error("{0:?} is not a service account")]
    User(String),
}

impl ReviewError {
    /// Whether the next try may go otherwise with the same token.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Slow)
    }
}

/// Asks one cluster. Nothing is remembered of a token: one that is revoked is refused from then on.
#[derive(Clone)]
pub struct Reviewer {
    reviews: Api<TokenReview>,
    audiences: Vec<String>,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer")
            .field("audiences", &self.audiences)
            .finish_non_exhaustive()
    }
}

impl Reviewer {
    /// For tokens for one of `audiences`. `None` when no flag names a cluster.
    ///
    /// # Errors
    /// The cluster's credentials cannot be used; nothing is asked yet.
    pub async fn new(
        args: &ClusterArgs,
        audiences: Vec<String>,
    ) -> Result<Option<Self>, ConnectError> {
        let client = args.client().await?;
        Ok(client.map(|client| Self {
            reviews: Api::all(client),
            audiences,
        }))
    }

    /// The service account whose token this is.
    ///
    /// # Errors
    /// Nobody's, or nobody can say.
    pub async fn review(&self, token: &str) -> Result<ServiceAccount, ReviewError> {
        let question = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(self.audiences.clone()),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let answer = timeout(PATIENCE, self.reviews.create(&params, &question)).await;
        let answer = answer
            .map_err(|_| ReviewError::Slow)?
            .map_err(|error| ReviewError::Unavailable(Box::new(error)))?;
        let status = answer.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            return Err(ReviewError::Refused(status.error.unwrap_or_default()));
        }
        // A server that does not know about audiences leaves them out, and takes the token for whomever it was made.
        let meant = status.audiences.unwrap_or_default();
        if !meant.iter().any(|one| self.audiences.contains(one)) {
            return Err(ReviewError::Audience);
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        let is_account = user.groups.unwrap_or_default().iter().any(|g| g == GROUP);
        match account(&name).filter(|_| is_account) {
            Some(account) => Ok(account),
            None => Err(ReviewError::User(name)),
        }
    }
}

/// `system:serviceaccount:NAMESPACE:NAME`, and nothing more or less.
fn account(user: &str) -> Option<ServiceAccount> {
    let (namespace, name) = user.strip_prefix(USER)?.split_once(':')?;
    let is_part = |part: &str| !part.is_empty() && !part.contains(':');
    (is_part(namespace) && is_part(name)).then(|| ServiceAccount {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_has_two_names() {
        let found = account("system:serviceaccount:shop:cart").unwrap();
        assert_eq!((&*found.namespace, &*found.name), ("shop", "cart"));
        for other in [
            "",
            "kubernetes-admin",
            "system:serviceaccount:",
            "system:serviceaccount:shop",
            "system:serviceaccount:shop:",
            "system:serviceaccount::cart",
            "system:serviceaccount:shop:cart:more",
            "xsystem:serviceaccount:shop:cart",
        ] {
            assert_eq!(account(other), None, "{other}");
        }
    }
}
