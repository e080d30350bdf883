//! Trust bundles: for each trust domain, the roots that may vouch for its members. Never one merged pool.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::peer::single_uri;
use crate::verify::provider;
use crate::{PeerError, SpiffeId, TrustDomain, peer_identity};

/// Most roots in one bundle; more is a mistake or an attack on path building.
const MAX_ROOTS: usize = 128;

/// Why PEM text is not a trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not PEM.
    #[error("the trust bundle is not valid PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// No CERTIFICATE block.
    #[error("the trust bundle holds no certificate")]
    Empty,
    /// More roots than anybody needs.
    #[error("the trust bundle holds more than {MAX_ROOTS} certificates")]
    TooMany,
    /// A block does not parse, or cannot be a root.
    #[error("a certificate of the trust bundle cannot serve as a root")]
    Root(#[source] rustls::Error),
    /// rustls refuses the roots.
    #[error("the trust bundle cannot verify clients")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    /// A root does not say whose it is.
    #[error("a root has no URI name spiffe://<trust domain>, so its trust domain is unknown")]
    Domain(#[source] PeerError),
}

/// Roots by trust domain. Cheap to share, immutable; a new set of roots is a new bundle.
#[derive(Clone, Default)]
pub struct TrustBundle {
    domains: BTreeMap<TrustDomain, Domain>,
}

#[derive(Clone)]
struct Domain {
    pem: Arc<str>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl TrustBundle {
    /// A bundle of one trust domain.
    ///
    /// # Errors
    /// When `pem` is not one or more certificates.
    pub fn from_pem(trust_domain: TrustDomain, pem: &str) -> Result<Self, BundleError> {
        Self::default().with(trust_domain, pem)
    }

    /// Adds, or replaces, the roots of one trust domain.
    ///
    /// # Errors
    /// When `pem` is not one or more certificates.
    pub fn with(mut self, trust_domain: TrustDomain, pem: &str) -> Result<Self, BundleError> {
        let mut roots = RootCertStore::empty();
        for root in certificates(pem)? {
            roots.add(root).map_err(BundleError::Root)?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(BundleError::Verifier)?;
        self.domains.insert(
            trust_domain,
            Domain {
                pem: Arc::from(pem),
                roots,
                clients,
            },
        );
        Ok(self)
    }

    /// A bundle whose roots say their trust domain themselves, by a URI name `spiffe://<trust domain>`
    /// (X509-SVID §4.2); Auth's roots do.
    ///
    /// # Errors
    /// When `pem` is not one or more such certificates.
    pub fn from_described_pem(pem: &str) -> Result<Self, BundleError> {
        let mut by_domain = BTreeMap::<TrustDomain, String>::new();
        for root in certificates(pem)? {
            let (_, parsed) = X509Certificate::from_der(&root)
                .map_err(|_| BundleError::Root(rustls::CertificateError::BadEncoding.into()))?;
            let id = single_uri(&parsed).map_err(BundleError::Domain)?;
            let text = by_domain.entry(id.trust_domain().clone()).or_default();
            text.push_str(&crate::svid::pem_block("CERTIFICATE", &root));
        }
        by_domain
            .into_iter()
            .try_fold(Self::default(), |bundle, (domain, pem)| {
                bundle.with(domain, &pem)
            })
    }

    /// The trust domains it has roots for.
    pub fn trust_domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.domains.keys()
    }

    /// The PEM text of one trust domain's roots.
    pub fn pem(&self, trust_domain: &TrustDomain) -> Option<&str> {
        self.domains.get(trust_domain).map(|domain| &*domain.pem)
    }

    /// The PEM text of all roots, for peers that can only hold one pool (Envoy's `ROOTCA`).
    pub fn all_pem(&self) -> String {
        let mut text = String::new();
        for domain in self.domains.values() {
            text.push_str(&domain.pem);
            if !text.ends_with('\n') {
                text.push('\n');
            }
        }
        text
    }

    /// Verifies a server's chain, leaf first, against the roots of the leaf's own trust domain.
    ///
    /// # Errors
    /// When the leaf is not an SVID, its domain is not in the bundle, or the chain does not verify at `now`.
    pub fn verify_server(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeId, rustls::Error> {
        let (id, domain, leaf, intermediates) = self.select(chain)?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &domain.roots,
            intermediates,
            now,
            provider().signature_verification_algorithms.all,
        )?;
        Ok(id)
    }

    /// Verifies a client's chain, leaf first, against the roots of the leaf's own trust domain.
    ///
    /// # Errors
    /// When the leaf is not an SVID, its domain is not in the bundle, or the chain does not verify at `now`.
    pub fn verify_client(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<SpiffeId, rustls::Error> {
        let (id, domain, leaf, intermediates) = self.select(chain)?;
        domain
            .clients
            .verify_client_cert(leaf, intermediates, now)?;
        Ok(id)
    }

    /// The parts of a chain and the roots of the leaf's trust domain, and no others.
    fn select<'c, 'd>(
        &self,
        chain: &'c [CertificateDer<'d>],
    ) -> Result<
        (
            SpiffeId,
            &Domain,
            &'c CertificateDer<'d>,
            &'c [CertificateDer<'d>],
        ),
        rustls::Error,
    > {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or(rustls::Error::NoCertificatesPresented)?;
        let id = peer_identity(chain).map_err(|error| {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(
                Arc::new(error),
            )))
        })?;
        let domain = self
            .domains
            .get(id.trust_domain())
            .ok_or(rustls::CertificateError::UnknownIssuer)?;
        Ok((id, domain, leaf, intermediates))
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes())
        .take(MAX_ROOTS + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(BundleError::Pem)?;
    match certificates.len() {
        0 => Err(BundleError::Empty),
        n if n > MAX_ROOTS => Err(BundleError::TooMany),
        _ => Ok(certificates),
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.domains.len() == other.domains.len()
            && self
                .domains
                .iter()
                .all(|(name, domain)| other.pem(name) == Some(&domain.pem))
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.domains
                    .iter()
                    .map(|(name, domain)| (name, domain.roots.len())),
            )
            .finish()
    }
}
