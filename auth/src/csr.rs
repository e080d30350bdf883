//! The signing request: bounded, parsed, its key held to policy, its proof of possession checked, in this
//! order, because the checks get dearer. Only the public key leaves this module.

use lateen_identity::pki_types::CertificateSigningRequestDer;
use lateen_identity::pki_types::pem::{self, PemObject as _};
use rcgen::SubjectPublicKeyInfo;
use sha2::{Digest as _, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_PKCS1_RSASSAPSS, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
    OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey;

/// Largest CSR text. One with RSA 4096 and a few names has 2 KiB.
const MAX_BYTES: usize = 16 * 1024;
/// Sizes of RSA keys that are neither weak nor a burden.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;
/// RSA exponents. Below is weak, above costs the verifiers.
const RSA_EXPONENTS: std::ops::RangeInclusive<u64> = 65_537..=0xffff_ffff;

/// Why a CSR is refused. The text goes to the caller: it describes what the caller sent.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Too many bytes.
    #[error("the CSR is larger than {MAX_BYTES} bytes")]
    TooLarge,
    /// Not PEM, or no CSR in it.
    #[error("the CSR is not a PEM block CERTIFICATE REQUEST")]
    Pem(#[source] pem::Error),
    /// More than one.
    #[error("there must be exactly one CSR")]
    Several,
    /// Not PKCS#10.
    #[error("the CSR is not valid DER of PKCS#10")]
    Malformed,
    /// A key we do not certify.
    #[error("the key of the CSR must be ECDSA P-256 or P-384, or RSA of 2048 to 4096 bits")]
    Key,
    /// A signature algorithm we do not accept.
    #[error("the CSR must be signed with SHA-256, SHA-384 or SHA-512")]
    Algorithm,
    /// The sender does not hold the key.
    #[error("the signature of the CSR does not verify with its own key")]
    Possession,
}

/// A request whose sender has proved to hold the private key.
#[derive(Debug)]
pub struct Csr {
    public_key: SubjectPublicKeyInfo,
    key_hash: String,
}

impl Csr {
    /// Parses and checks PEM text.
    ///
    /// # Errors
    /// See [`CsrError`].
    pub fn parse(text: &str) -> Result<Self, CsrError> {
        if text.len() > MAX_BYTES {
            return Err(CsrError::TooLarge);
        }
        let mut blocks = CertificateSigningRequestDer::pem_slice_iter(text.as_bytes());
        let der = match blocks.next() {
            Some(block) => block.map_err(CsrError::Pem)?,
            None => return Err(CsrError::Pem(pem::Error::NoItemsFound)),
        };
        if blocks.next().is_some() {
            return Err(CsrError::Several);
        }
        let (rest, request) =
            X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        check_key(&request)?;
        check_algorithm(&request)?;
        request
            .verify_signature()
            .map_err(|_| CsrError::Possession)?;
        let spki = request.certification_request_info.subject_pki.raw;
        // Fails for parameters of the algorithm that rcgen would not write itself.
        let public_key = SubjectPublicKeyInfo::from_der(spki).map_err(|_| CsrError::Key)?;
        Ok(Self {
            public_key,
            key_hash: hex::encode(Sha256::digest(spki)),
        })
    }

    /// The key to certify.
    pub(crate) fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public_key
    }

    /// SHA-256 of the SubjectPublicKeyInfo, for the audit log.
    pub fn key_hash(&self) -> &str {
        &self.key_hash
    }
}

fn check_key(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    let spki = &request.certification_request_info.subject_pki;
    let algorithm = &spki.algorithm;
    if algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = algorithm
            .parameters
            .as_ref()
            .and_then(|curve| curve.as_oid().ok())
            .ok_or(CsrError::Key)?;
        return if curve == OID_EC_P256 || curve == OID_NIST_EC_P384 {
            Ok(())
        } else {
            Err(CsrError::Key)
        };
    }
    if algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        let Ok(PublicKey::RSA(key)) = spki.parsed() else {
            return Err(CsrError::Key);
        };
        let exponent = key.try_exponent().map_err(|_| CsrError::Key)?;
        let fits = RSA_BITS.contains(&key.key_size())
            && RSA_EXPONENTS.contains(&exponent)
            && exponent % 2 == 1;
        return if fits { Ok(()) } else { Err(CsrError::Key) };
    }
    Err(CsrError::Key)
}

fn check_algorithm(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    let allowed = [
        OID_SIG_ECDSA_WITH_SHA256,
        OID_SIG_ECDSA_WITH_SHA384,
        OID_PKCS1_SHA256WITHRSA,
        OID_PKCS1_SHA384WITHRSA,
        OID_PKCS1_SHA512WITHRSA,
        OID_PKCS1_RSASSAPSS,
    ];
    if allowed.contains(&request.signature_algorithm.algorithm) {
        Ok(())
    } else {
        Err(CsrError::Algorithm)
    }
}

#[cfg(test)]
mod tests;
