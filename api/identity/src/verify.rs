//! rustls verifiers by SPIFFE ID, and the two TLS configurations everything in the mesh uses.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

use crate::{SpiffeId, SvidCell, TrustBundle, TrustDomain};

/// The one cryptography provider (aws-lc-rs) that every TLS configuration of the mesh is built with.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(aws_lc_rs::default_provider())))
}

/// Where a verifier finds its roots.
#[derive(Clone)]
pub enum Trust {
    /// Roots that never change: those given by file before the first SVID.
    Fixed(Arc<TrustBundle>),
    /// The bundle that came with the newest SVID.
    Live(Arc<SvidCell>),
    /// Whatever the function answers at each handshake; `None` refuses the peer.
    Dynamic(Arc<dyn Fn() -> Option<Arc<TrustBundle>> + Send + Sync>),
}

impl Trust {
    fn bundle(&self) -> Result<Arc<TrustBundle>, Error> {
        let bundle = match self {
            Self::Fixed(bundle) => Some(Arc::clone(bundle)),
            Self::Live(cell) => cell.load().map(|svid| Arc::clone(svid.bundle())),
            Self::Dynamic(load) => load(),
        };
        // No roots yet: nobody can be verified, so nobody is let in.
        bundle.ok_or_else(|| CertificateError::UnknownIssuer.into())
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(bundle) => f.debug_tuple("Fixed").field(bundle).finish(),
            Self::Live(cell) => f.debug_tuple("Live").field(cell).finish(),
            Self::Dynamic(_) => f.write_str("Dynamic"),
        }
    }
}

/// Which verified peers are the right ones.
#[derive(Clone)]
pub enum PeerMatch {
    /// Anybody the bundle vouches for.
    AnyTrusted,
    /// One of these IDs.
    Ids(Arc<[SpiffeId]>),
    /// Any member of this trust domain.
    TrustDomain(TrustDomain),
    /// Whomever the function accepts.
    Predicate(Arc<dyn Fn(&SpiffeId) -> bool + Send + Sync>),
}

impl PeerMatch {
    /// Exactly this peer.
    pub fn id(id: SpiffeId) -> Self {
        Self::Ids(Arc::new([id]))
    }

    /// Whether a verified peer of this ID is accepted.
    pub fn accepts(&self, id: &SpiffeId) -> bool {
        match self {
            Self::AnyTrusted => true,
            Self::Ids(ids) => ids.contains(id),
            Self::TrustDomain(domain) => id.trust_domain() == domain,
            Self::Predicate(accepts) => accepts(id),
        }
    }
}

impl fmt::Debug for PeerMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyTrusted => f.write_str("AnyTrusted"),
            Self::Ids(ids) => f.debug_tuple("Ids").field(ids).finish(),
            Self::TrustDomain(domain) => f.debug_tuple("TrustDomain").field(domain).finish(),
            Self::Predicate(_) => f.write_str("Predicate"),
        }
    }
}

fn refuse(id: &SpiffeId) -> Error {
    #[derive(Debug, thiserror::Error)]
    #[error("peer {0} is verified but not the one expected here")]
    struct UnexpectedPeer(SpiffeId);
    CertificateError::Other(rustls::OtherError(Arc::new(UnexpectedPeer(id.clone())))).into()
}

fn chain<'a>(
    leaf: &CertificateDer<'a>,
    intermediates: &[CertificateDer<'a>],
) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf)
        .chain(intermediates)
        .cloned()
        .collect()
}

/// Client side: the server's chain must verify and its ID must match; the DNS name asked for plays no part.
#[derive(Debug)]
pub struct SpiffeServerVerifier {
    trust: Trust,
    expected: PeerMatch,
}

impl SpiffeServerVerifier {
    /// Verifies against `trust`, accepts `expected`.
    pub fn new(trust: Trust, expected: PeerMatch) -> Arc<Self> {
        Arc::new(Self { trust, expected })
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let id = self
            .trust
            .bundle()?
            .verify_server(&chain(end_entity, intermediates), now)?;
        if !self.expected.accepts(&id) {
            return Err(refuse(&id));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &provider().signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Whether clients must show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A client without one is let in, without identity. One that is shown must still verify.
    Optional,
    /// A client without one is refused.
    Required,
}

/// Server side: a client certificate, if shown, must verify and its ID must match.
#[derive(Debug)]
pub struct SpiffeClientVerifier {
    trust: Trust,
    expected: PeerMatch,
    auth: ClientAuth,
}

impl SpiffeClientVerifier {
    /// Verifies against `trust`, accepts `expected`.
    pub fn new(trust: Trust, expected: PeerMatch, auth: ClientAuth) -> Arc<Self> {
        Arc::new(Self {
            trust,
            expected,
            auth,
        })
    }
}

impl ClientCertVerifier for SpiffeClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.auth == ClientAuth::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: they would be stale after a root rotation, and mesh clients hold one certificate anyway.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let id = self
            .trust
            .bundle()?
            .verify_client(&chain(end_entity, intermediates), now)?;
        if !self.expected.accepts(&id) {
            return Err(refuse(&id));
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &provider().signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// A server configuration: certificate by `resolver`, clients by `verifier`, TLS 1.2 and 1.3.
///
/// Sessions are not resumed: a resumed session skips the verification of the peer's certificate, so it
/// would outlive an expired certificate or a withdrawn root (SPIRE 1.14).
pub fn server_config(
    resolver: Arc<dyn ResolvesServerCert>,
    verifier: Arc<SpiffeClientVerifier>,
    alpn: &[&[u8]],
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("aws-lc-rs supports the versions rustls has")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

/// A client configuration: servers by `verifier`, own certificate by `resolver` (`None`: anonymous).
/// No resumption, for the reason given at [`server_config`].
pub fn client_config(
    resolver: Option<Arc<dyn ResolvesClientCert>>,
    verifier: Arc<SpiffeServerVerifier>,
    alpn: &[&[u8]],
) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("aws-lc-rs supports the versions rustls has")
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match resolver {
        Some(resolver) => builder.with_client_cert_resolver(resolver),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}
