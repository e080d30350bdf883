//! One request to Auth: key → CSR → CreateCertificate → checked SVID.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lateen_identity::pki_types::pem::PemObject as _;
use lateen_identity::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use lateen_identity::{
    BundleError, IdError, PeerMatch, SpiffeId, SpiffeServerVerifier, Svid, SvidCell, SvidError,
    Trust, TrustBundle, peer_identity,
};
use lateen_protocols::istio::v1::auth::IstioCertificateRequest;
use lateen_protocols::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::ClientConfig;
use tonic::metadata::{Ascii, MetadataValue};

use crate::tls;

/// A request that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// Largest answer: a chain of 16 and a bundle of 128 roots fit well.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Namespace and service account under which Auth itself runs.
const AUTH_ACCOUNT: (&str, &str) = ("istio-system", "auth");

/// Why a request brought no certificate.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A file that cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The root file is unusable.
    #[error("the file given by --auth-root is unusable")]
    Roots(#[source] BundleError),
    /// The token has characters no token has.
    #[error("the file given by --join-token-file holds no token")]
    Token,
    /// The certificate ended and there is no token.
    #[error("the certificate has expired; a new join token is needed (--join-token-file)")]
    Expired,
    /// The address of Auth.
    #[error("cannot dial Auth")]
    Address(#[source] tls::AddressError),
    /// Making the key or the CSR.
    #[error("cannot make a key and a signing request")]
    Csr(#[source] rcgen::Error),
    /// Own identity.
    #[error("cannot name Auth")]
    Name(#[source] IdError),
    /// Auth did not answer in time.
    #[error("Auth did not answer within {DEADLINE:?}; is it running and reachable?")]
    Deadline,
    /// Auth refused, or could not be reached.
    #[error("Auth answered {:?}: {}", .0.code(), .0.message())]
    Refused(#[source] Box<tonic::Status>),
    /// Fewer than two elements.
    #[error("Auth's answer lacks the root bundle")]
    Incomplete,
    /// An element does not parse.
    #[error("Auth's answer is not a PEM chain")]
    Pem(#[source] lateen_identity::pki_types::pem::Error),
    /// The certificate is unusable.
    #[error("Auth's certificate is unusable")]
    Svid(#[source] SvidError),
    /// The bundle is unusable.
    #[error("the root bundle in Auth's answer is unusable")]
    Bundle(#[source] BundleError),
    /// The certificate is for somebody else.
    #[error("asked to renew {held}, got a certificate for {got}")]
    Changed {
        /// Who we are.
        held: SpiffeId,
        /// Who Auth says we are.
        got: SpiffeId,
    },
}

/// The first certificate: the token says who we are, `roots` say who Auth is.
pub(super) async fn join(
    address: &str,
    auth_id: Option<&SpiffeId>,
    token: &str,
    roots: Arc<TrustBundle>,
    before: Option<&Svid>,
) -> Result<Svid, RequestError> {
    let bearer: MetadataValue<Ascii> = format!("Bearer {token}")
        .parse()
        .map_err(|_| RequestError::Token)?;
    if token.is_empty() {
        return Err(RequestError::Token);
    }
    let expected = auth_ids(auth_id, &roots)?;
    let verifier = SpiffeServerVerifier::new(Trust::Fixed(roots), expected);
    let config = lateen_identity::client_config(None, verifier, &[tls::ALPN_H2]);
    request(address, config, Some(bearer), before.map(Svid::spiffe_id)).await
}

/// A further certificate: the one we hold says who we are.
pub(super) async fn renew(
    address: &str,
    auth_id: Option<&SpiffeId>,
    held: Arc<Svid>,
) -> Result<Svid, RequestError> {
    let expected = auth_ids(auth_id, held.bundle())?;
    let verifier = SpiffeServerVerifier::new(Trust::Fixed(Arc::clone(held.bundle())), expected);
    let cell = SvidCell::holding(Arc::clone(&held));
    let config = lateen_identity::client_config(Some(cell), verifier, &[tls::ALPN_H2]);
    request(address, config, None, Some(held.spiffe_id())).await
}

fn auth_ids(given: Option<&SpiffeId>, roots: &TrustBundle) -> Result<PeerMatch, RequestError> {
    if let Some(id) = given {
        return Ok(PeerMatch::id(id.clone()));
    }
    let (namespace, account) = AUTH_ACCOUNT;
    let ids = roots
        .trust_domains()
        .map(|domain| SpiffeId::workload(domain, namespace, account));
    Ok(PeerMatch::Ids(
        ids.collect::<Result<_, _>>().map_err(RequestError::Name)?,
    ))
}

async fn request(
    address: &str,
    config: ClientConfig,
    bearer: Option<MetadataValue<Ascii>>,
    held: Option<&SpiffeId>,
) -> Result<Svid, RequestError> {
    // A new key for each certificate: what leaks with one is worth nothing after the next.
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(RequestError::Csr)?;
    let csr = csr(&key, held).map_err(RequestError::Csr)?;
    let channel = tls::channel(address, Arc::new(config)).map_err(RequestError::Address)?;
    let mut client =
        IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let mut call = tonic::Request::new(IstioCertificateRequest {
        csr,
        ..Default::default()
    });
    if let Some(mut bearer) = bearer {
        bearer.set_sensitive(true);
        call.metadata_mut().insert("authorization", bearer);
    }
    let answer = tokio::time::timeout(DEADLINE, client.create_certificate(call))
        .await
        .map_err(|_| RequestError::Deadline)?
        .map_err(|status| RequestError::Refused(Box::new(status)))?
        .into_inner();
    let svid = svid(&answer.cert_chain, &key)?;
    match held {
        Some(held) if held != svid.spiffe_id() => Err(RequestError::Changed {
            held: held.clone(),
            got: svid.spiffe_id().clone(),
        }),
        _ => Ok(svid),
    }
}

/// The identity is in the CSR when we know it: Auth ignores it, other signers of this API demand it.
fn csr(key: &KeyPair, id: Option<&SpiffeId>) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(id) = id {
        params
            .subject_alt_names
            .push(SanType::URI(id.to_string().try_into()?));
    }
    params.serialize_request(key)?.pem()
}

fn svid(answer: &[String], key: &KeyPair) -> Result<Svid, RequestError> {
    let (roots, chain) = answer.split_last().ok_or(RequestError::Incomplete)?;
    if chain.is_empty() {
        return Err(RequestError::Incomplete);
    }
    let chain = chain
        .iter()
        .flat_map(|element| CertificateDer::pem_slice_iter(element.as_bytes()).collect::<Vec<_>>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(RequestError::Pem)?;
    let id = peer_identity(&chain).map_err(|error| RequestError::Svid(SvidError::Leaf(error)))?;
    let bundle =
        TrustBundle::from_pem(id.trust_domain().clone(), roots).map_err(RequestError::Bundle)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Svid::new(chain, key, Arc::new(bundle)).map_err(RequestError::Svid)
}
