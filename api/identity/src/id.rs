//! SPIFFE IDs and trust domains, parsed once and strictly (SPIFFE-ID §2).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest SPIFFE ID in bytes. SPIFFE-ID §2.3.
const MAX_ID_BYTES: usize = 2048;
/// Longest trust domain name in bytes. SPIFFE-ID §2.3.
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// Why a string is not a SPIFFE ID or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// More than 2048 bytes.
    #[error("SPIFFE ID is longer than {MAX_ID_BYTES} bytes")]
    TooLong,
    /// Does not start with `spiffe://`.
    #[error("SPIFFE ID must begin with spiffe://")]
    Scheme,
    /// The trust domain is empty, too long, or has a character outside `[a-z0-9._-]`.
    #[error("trust domain must be 1 to {MAX_TRUST_DOMAIN_BYTES} characters of [a-z0-9._-]")]
    TrustDomain,
    /// A path segment is empty, `.`, `..`, or has a character outside `[A-Za-z0-9._-]`.
    #[error(
        "each path segment of a SPIFFE ID must be of [A-Za-z0-9._-], and neither empty, '.' nor '..'"
    )]
    Path,
}

/// The name of a trust domain: `cluster.local`. Always lower case.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ID of the domain itself, `spiffe://name`, as a root certificate may carry it.
    pub fn id(&self) -> SpiffeId {
        SpiffeId {
            trust_domain: self.clone(),
            path: Arc::from(""),
        }
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if s.is_empty() || s.len() > MAX_TRUST_DOMAIN_BYTES || !s.bytes().all(valid) {
            return Err(IdError::TrustDomain);
        }
        // Compared without case (SPIFFE-ID §2.1), so it is kept in one.
        Ok(Self(Arc::from(s.to_ascii_lowercase())))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE ID: `spiffe://<trust domain>/<path>`, at most 2048 bytes. SPIFFE-ID §2.
///
/// Only [`FromStr`] and the constructors here make one, so holders need not check again.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    /// Empty, or `/segment` repeated.
    path: Arc<str>,
}

impl SpiffeId {
    /// The mesh form, `spiffe://<domain>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// When the namespace or account is not one valid path segment.
    pub fn workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        account: &str,
    ) -> Result<Self, IdError> {
        // Checked one by one: a slash inside either would move the boundary between them.
        if !is_segment(namespace) || !is_segment(account) {
            return Err(IdError::Path);
        }
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}").parse()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash, or empty for the ID of a trust domain.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `N` of `/ns/N/sa/S`; `None` for paths of another form.
    pub fn namespace(&self) -> Option<&str> {
        self.mesh_parts().map(|(namespace, _)| namespace)
    }

    /// `S` of `/ns/N/sa/S`; `None` for paths of another form.
    pub fn service_account(&self) -> Option<&str> {
        self.mesh_parts().map(|(_, account)| account)
    }

    fn mesh_parts(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path.strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then_some((namespace, account))
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        if s.len() > MAX_ID_BYTES {
            return Err(IdError::TooLong);
        }
        let (scheme, rest) = s.split_once("://").ok_or(IdError::Scheme)?;
        if !scheme.eq_ignore_ascii_case("spiffe") {
            return Err(IdError::Scheme);
        }
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let trust_domain = domain.parse()?;
        if let Some(segments) = path.strip_prefix('/')
            && !segments.split('/').all(is_segment)
        {
            return Err(IdError::Path);
        }
        Ok(Self {
            trust_domain,
            path: Arc::from(path),
        })
    }
}

fn is_segment(s: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !s.is_empty() && s != "." && s != ".." && s.bytes().all(valid)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! serde_by_string {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_by_string!(TrustDomain);
serde_by_string!(SpiffeId);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mesh_ids_have_parts() {
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/bookinfo-reviews"
            .parse()
            .unwrap();
        assert_eq!(id.trust_domain().as_str(), "cluster.local");
        assert_eq!(id.namespace(), Some("default"));
        assert_eq!(id.service_account(), Some("bookinfo-reviews"));
        let built = SpiffeId::workload(id.trust_domain(), "default", "bookinfo-reviews").unwrap();
        assert_eq!(built, id);
    }

    #[test]
    fn scheme_and_domain_compare_without_case() {
        let upper: SpiffeId = "SPIFFE://Cluster.Local/ns/A/sa/b".parse().unwrap();
        assert_eq!(upper.to_string(), "spiffe://cluster.local/ns/A/sa/b");
        let lower: SpiffeId = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        assert_ne!(upper, lower, "paths keep their case");
    }

    #[test]
    fn other_paths_have_no_parts() {
        for path in ["/ns/a", "/ns/a/sa/b/c", "/x/ns/a/sa/b", "", "/ns/a/b/sa/c"] {
            let id: SpiffeId = format!("spiffe://td{path}").parse().unwrap();
            assert_eq!(
                (id.namespace(), id.service_account()),
                (None, None),
                "{path}"
            );
        }
    }

    #[test]
    fn parts_with_separators_are_refused() {
        let domain: TrustDomain = "td".parse().unwrap();
        for part in ["", "a/b", "..", "a,b", "a\0", "a%2f", "é"] {
            assert_eq!(
                SpiffeId::workload(&domain, part, "x"),
                Err(IdError::Path),
                "{part:?}"
            );
            assert_eq!(
                SpiffeId::workload(&domain, "x", part),
                Err(IdError::Path),
                "{part:?}"
            );
        }
    }

    #[test]
    fn what_the_standard_forbids_is_refused() {
        for bad in [
            "",
            "spiffe:/td/x",
            "http://td/x",
            "spiffe://",
            "spiffe:///x",
            "spiffe://td/",
            "spiffe://td//x",
            "spiffe://td/x/",
            "spiffe://td/./x",
            "spiffe://td/../x",
            "spiffe://td:80/x",
            "spiffe://u@td/x",
            "spiffe://td/x?q",
            "spiffe://td/x#f",
            "spiffe://td/%41",
            "spiffe://td/x\0",
            "spiffe://t\0d/x",
            "spiffe://td/x,spiffe://td/y",
            " spiffe://td/x",
            "spiffe://td/x ",
            "spiffe://t*d/x",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?}");
        }
        assert!(
            format!("spiffe://{}/x", "a".repeat(256))
                .parse::<SpiffeId>()
                .is_err()
        );
        assert_eq!(
            format!("spiffe://td/{}", "a".repeat(2048)).parse::<SpiffeId>(),
            Err(IdError::TooLong)
        );
    }

    proptest! {
        #[test]
        fn parsing_is_total(s in ".{0,300}") {
            if let Ok(id) = s.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string().parse::<SpiffeId>(), Ok(id));
            }
        }

        #[test]
        fn printed_ids_parse_back(s in "spiffe://[a-z0-9._-]{1,20}(/[A-Za-z0-9_-]{1,9}){0,5}") {
            let id: SpiffeId = s.parse().unwrap();
            prop_assert_eq!(id.to_string(), s);
        }
    }
}
