use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256,
    PublicKeyData as _, RsaKeySize, SignatureAlgorithm,
};

use super::*;

fn csr(key: &KeyPair) -> String {
    CertificateParams::default()
        .serialize_request(key)
        .unwrap()
        .pem()
        .unwrap()
}

fn generated(algorithm: &'static SignatureAlgorithm) -> String {
    csr(&KeyPair::generate_for(algorithm).unwrap())
}

#[test]
fn good_keys_are_taken() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let parsed = Csr::parse(&csr(&key)).unwrap();
        assert_eq!(
            parsed.public_key().subject_public_key_info(),
            key.subject_public_key_info()
        );
        assert_eq!(parsed.key_hash().len(), 64);
    }
    let rsa = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    assert!(Csr::parse(&csr(&rsa)).is_ok());
}

#[test]
fn other_keys_are_refused() {
    for algorithm in [&PKCS_ED25519, &PKCS_ECDSA_P521_SHA512] {
        assert!(matches!(
            Csr::parse(&generated(algorithm)),
            Err(CsrError::Key)
        ));
    }
}

#[test]
fn extensions_do_not_matter() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let text = params.serialize_request(&key);
    // rcgen may refuse to write such a CSR; if it does not, the CA flag is ignored like the rest.
    if let Ok(text) = text {
        assert!(Csr::parse(&text.pem().unwrap()).is_ok());
    }
}

#[test]
fn size_comes_before_parsing() {
    let padded = format!(
        "{}{}",
        generated(&PKCS_ECDSA_P256_SHA256),
        " ".repeat(MAX_BYTES)
    );
    assert!(matches!(Csr::parse(&padded), Err(CsrError::TooLarge)));
}

#[test]
fn garbage_is_refused() {
    let good = generated(&PKCS_ECDSA_P256_SHA256);
    assert!(matches!(Csr::parse(""), Err(CsrError::Pem(_))));
    assert!(matches!(Csr::parse("hello"), Err(CsrError::Pem(_))));
    assert!(matches!(
        Csr::parse(&good.repeat(2)),
        Err(CsrError::Several)
    ));
    let certificate = good.replace("CERTIFICATE REQUEST", "CERTIFICATE");
    assert!(matches!(Csr::parse(&certificate), Err(CsrError::Pem(_))));
    let empty = "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n";
    assert!(matches!(Csr::parse(empty), Err(CsrError::Malformed)));
}

/// Re-wraps changed DER.
fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
}

#[test]
fn the_key_must_be_the_senders() {
    let mut der = CertificateParams::default()
        .serialize_request(&KeyPair::generate().unwrap())
        .unwrap()
        .der()
        .to_vec();
    let last = der.len() - 1;
    der[last] ^= 1;
    assert!(matches!(Csr::parse(&pem(&der)), Err(CsrError::Possession)));
    der[last] ^= 1;
    assert!(Csr::parse(&pem(&der)).is_ok());
    der.push(0);
    assert!(matches!(Csr::parse(&pem(&der)), Err(CsrError::Malformed)));
}

proptest! {
    #[test]
    fn parsing_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Csr::parse(&pem(&bytes)).is_err());
    }

    /// Nothing signed can be changed. Around it, x509-parser is lenient about some DER tags; those
    /// carry neither key nor proof.
    #[test]
    fn a_changed_byte_is_outside_what_is_signed(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let der =
            CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let key = Csr::parse(&pem(&der)).unwrap().key_hash;
        let signed = {
            let (_, request) = X509CertificationRequest::from_der(&der).unwrap();
            let raw = request.certification_request_info.raw;
            let start = raw.as_ptr() as usize - der.as_ptr() as usize;
            start..start + raw.len()
        };
        let at = at.index(der.len());
        let mut changed = der;
        changed[at] ^= flip;
        if let Ok(accepted) = Csr::parse(&pem(&changed)) {
            prop_assert_eq!(accepted.key_hash, key);
            prop_assert!(!signed.contains(&at), "byte {} of {:?}", at, signed);
        }
    }
}
