//! X.509-SVIDs: the certificate, its key and the bundle it came with; and the cell that holds the newest.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::verify::provider;
use crate::{PeerError, SpiffeId, TrustBundle, peer_identity};

/// Most certificates in a chain.
const MAX_CHAIN: usize = 16;

/// Why a chain and a key are not a usable SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// Not PEM.
    #[error("the certificate chain or key is not valid PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// More certificates than any hierarchy needs.
    #[error("the certificate chain holds more than {MAX_CHAIN} certificates")]
    TooLong,
    /// The leaf is not an X.509-SVID.
    #[error("the certificate is not an SVID")]
    Leaf(#[source] PeerError),
    /// The key is of no use, or belongs to another certificate.
    #[error("the private key does not fit the certificate")]
    Key(#[source] rustls::Error),
    /// The bundle does not vouch for it now.
    #[error("the certificate does not verify against the trust bundle it came with")]
    Untrusted(#[source] rustls::Error),
}

/// An identity document and its key. `Debug` hides the key, which is wiped on drop.
pub struct Svid {
    spiffe_id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
    bundle: Arc<TrustBundle>,
    certified: Arc<CertifiedKey>,
}

impl Svid {
    /// From PEM: the chain leaf first, and a PKCS#8, SEC1 or PKCS#1 key.
    ///
    /// # Errors
    /// See [`SvidError`]; an expired certificate is [`SvidError::Untrusted`].
    pub fn from_pem(chain: &str, key: &str, bundle: Arc<TrustBundle>) -> Result<Self, SvidError> {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
            .take(MAX_CHAIN + 1)
            .collect::<Result<Vec<_>, _>>()
            .map_err(SvidError::Pem)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(SvidError::Pem)?;
        Self::new(chain, key, bundle)
    }

    /// From DER: the chain leaf first, and the key. Checks everything a peer would: the form of an
    /// SVID, that the key fits, that the chain verifies now against `bundle`.
    ///
    /// # Errors
    /// See [`SvidError`]; an expired certificate is [`SvidError::Untrusted`].
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        bundle: Arc<TrustBundle>,
    ) -> Result<Self, SvidError> {
        if chain.len() > MAX_CHAIN {
            return Err(SvidError::TooLong);
        }
        let spiffe_id = peer_identity(&chain).map_err(SvidError::Leaf)?;
        let leaf = chain.first().ok_or(SvidError::Leaf(PeerError::Absent))?;
        let (_, parsed) =
            X509Certificate::from_der(leaf).map_err(|_| SvidError::Leaf(PeerError::Malformed))?;
        let validity = parsed.validity();
        let (not_before, not_after) = (
            system_time(validity.not_before.timestamp()),
            system_time(validity.not_after.timestamp()),
        );
        let serial = parsed.raw_serial_as_string().replace(':', "");
        let secret = Zeroizing::new(key.secret_der().to_vec());
        let certified =
            CertifiedKey::from_der(chain.clone(), key, &provider()).map_err(SvidError::Key)?;
        bundle
            .verify_server(&chain, UnixTime::now())
            .map_err(SvidError::Untrusted)?;
        Ok(Self {
            spiffe_id,
            chain,
            key: secret,
            not_before,
            not_after,
            serial,
            bundle,
            certified: Arc::new(certified),
        })
    }

    /// Whose it is.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// Leaf first, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        self.chain
            .iter()
            .map(|certificate| pem_block("CERTIFICATE", certificate))
            .collect()
    }

    /// The key as PEM, wiped when dropped.
    pub fn key_pem(&self) -> Zeroizing<String> {
        let label = match self.key_kind() {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        Zeroizing::new(pem_block(label, &self.key))
    }

    fn key_kind(&self) -> PrivateKeyDer<'_> {
        // The bytes were a valid key when this was made; which of the three forms follows from them.
        PrivateKeyDer::try_from(&self.key[..]).unwrap_or_else(|_| {
            PrivateKeyDer::Pkcs8(rustls::pki_types::PrivatePkcs8KeyDer::from(&self.key[..]))
        })
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// What is left of its life at `now`; zero when expired.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// Serial number in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The roots that were current when it was issued.
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// Chain and key as rustls wants them.
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("spiffe_id", &self.spiffe_id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .field("key", &"***")
            .finish_non_exhaustive()
    }
}

/// Holds the newest SVID; one task writes, every handshake reads. As a rustls resolver it answers with
/// what is newest when the handshake happens, so rotation swaps the resolver's answer, never a connection.
#[derive(Default)]
pub struct SvidCell(ArcSwapOption<Svid>);

impl SvidCell {
    /// A cell that holds nothing yet.
    pub fn empty() -> Arc<Self> {
        Arc::default()
    }

    /// A cell that holds `svid`.
    pub fn holding(svid: Arc<Svid>) -> Arc<Self> {
        Arc::new(Self(ArcSwapOption::new(Some(svid))))
    }

    /// The newest SVID.
    pub fn load(&self) -> Option<Arc<Svid>> {
        self.0.load_full()
    }

    /// Replaces it.
    pub fn store(&self, svid: Arc<Svid>) {
        self.0.store(Some(svid));
    }
}

impl fmt::Debug for SvidCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SvidCell").field(&self.load()).finish()
    }
}

impl ResolvesServerCert for SvidCell {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.load().map(|svid| svid.certified_key())
    }
}

impl ResolvesClientCert for SvidCell {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.load().map(|svid| svid.certified_key())
    }

    fn has_certs(&self) -> bool {
        self.0.load().is_some()
    }
}

fn system_time(unix_seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or_default())
}

/// One certificate as PEM.
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    pem_block("CERTIFICATE", certificate)
}

pub(crate) fn pem_block(label: &str, der: &[u8]) -> String {
    // Room for all of it, so that no growth leaves a copy of a key behind.
    let mut text = String::with_capacity(der.len() * 3 / 2 + 2 * label.len() + 80);
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    for line in der.chunks(48) {
        STANDARD.encode_string(line, &mut text);
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}
