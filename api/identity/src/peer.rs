//! The identity in a peer's certificate. Says what the certificate claims and whether it has the form
//! of an X.509-SVID; whether anybody vouches for it is [`crate::TrustBundle`]'s question.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{IdError, SpiffeId};

/// Why a certificate is not an X.509-SVID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No certificate at all.
    #[error("the peer presented no certificate")]
    Absent,
    /// Not DER, or not X.509.
    #[error("the peer's certificate is not valid X.509")]
    Malformed,
    /// Zero or several URI names.
    #[error("the peer's certificate has {0} URI names; an SVID has exactly one")]
    UriNames(usize),
    /// The URI name is not a SPIFFE ID.
    #[error("the peer's URI name is not a SPIFFE ID")]
    Id(#[source] IdError),
    /// The ID names a trust domain, not a workload.
    #[error("the peer's SPIFFE ID has no path")]
    NoPath,
    /// A signing certificate where a leaf is expected.
    #[error("the peer presented a CA certificate as its own")]
    SigningCertificate,
    /// The subject is empty and the name extension is not critical. X509-SVID §4.
    #[error("the peer's certificate has no subject, so its names must be critical")]
    NamesNotCritical,
}

/// The SPIFFE ID of the leaf, which is `chain[0]`: exactly one URI name, the rules for leaves of
/// X509-SVID §4 and §5.2. The chain is **not** verified here.
///
/// # Errors
/// When the leaf is not an X.509-SVID.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let der = chain.first().ok_or(PeerError::Absent)?;
    let (rest, leaf) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    let id = single_uri(&leaf)?;
    if id.path().is_empty() {
        return Err(PeerError::NoPath);
    }
    for extension in leaf.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(PeerError::SigningCertificate);
            }
            ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
                return Err(PeerError::SigningCertificate);
            }
            ParsedExtension::SubjectAlternativeName(_)
                if !extension.critical && leaf.subject().iter().next().is_none() =>
            {
                return Err(PeerError::NamesNotCritical);
            }
            ParsedExtension::ParseError { .. } => return Err(PeerError::Malformed),
            _ => {}
        }
    }
    Ok(id)
}

/// The one URI name of a certificate, be it a leaf or a root.
pub(crate) fn single_uri(certificate: &X509Certificate<'_>) -> Result<SpiffeId, PeerError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| PeerError::Malformed)?;
    let mut uris = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let (first, others) = (uris.next(), uris.count());
    match (first, others) {
        (Some(uri), 0) => uri.parse().map_err(PeerError::Id),
        (first, others) => Err(PeerError::UriNames(others + usize::from(first.is_some()))),
    }
}
