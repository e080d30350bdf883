//! The certificate: profile, life, chain. Checked as a peer would check it before it leaves.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lateen_identity::SpiffeId;
use lateen_identity::pki_types::{CertificateDer, UnixTime};
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PublicKeyData, SanType,
};

use crate::authorize::Permit;
use crate::ca::{Ca, serial, whole_seconds};

/// Tolerates clocks that go behind ours. Istio: 2 min.
const BACKDATE: Duration = Duration::from_secs(120);
/// A shorter life would end before it can be renewed.
pub(crate) const MIN_TTL: Duration = Duration::from_secs(5);

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The caller asked for too long a life; clamping silently would surprise it later.
    #[error("a certificate lives at most {} seconds", .0.as_secs())]
    TooLong(Duration),
    /// The caller asked for too short a life.
    #[error("a certificate lives at least {} seconds", MIN_TTL.as_secs())]
    TooShort,
    /// The signing certificate ends now.
    #[error("the signing certificate has expired")]
    IssuerExpired,
    /// rcgen failed.
    #[error("cannot make the certificate")]
    Make(#[source] rcgen::Error),
    /// What we made does not verify; a peer would refuse it.
    #[error("the new certificate does not verify against our own roots")]
    Verify(#[source] lateen_identity::rustls::Error),
    /// What we made names somebody else.
    #[error("the new certificate names {0}")]
    Identity(SpiffeId),
}

/// A certificate, ready to be sent.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) identity: SpiffeId,
    pub(crate) serial: String,
    pub(crate) not_after: SystemTime,
    /// PEM: leaf, intermediates, and last the root bundle.
    pub(crate) answer: Vec<String>,
    /// DER: leaf, intermediates.
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

/// Names beside the SPIFFE ID: of Auth itself, and of those that its operator gives some.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerNames {
    pub(crate) dns: Vec<String>,
    pub(crate) addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug)]
pub(crate) struct Signer {
    ca: Arc<Ca>,
    default_ttl: Duration,
    max_ttl: Duration,
}

impl Signer {
    pub(crate) fn new(ca: Arc<Ca>, default_ttl: Duration, max_ttl: Duration) -> Self {
        Self {
            ca,
            default_ttl,
            max_ttl,
        }
    }

    pub(crate) fn ca(&self) -> &Arc<Ca> {
        &self.ca
    }

    /// The life that a request asks for: `seconds` ≤ 0 is the default.
    pub(crate) fn ttl(&self, seconds: i64) -> Result<Duration, SignError> {
        let ttl = match u64::try_from(seconds) {
            Ok(0) | Err(_) => return Ok(self.default_ttl),
            Ok(seconds) => Duration::from_secs(seconds),
        };
        if ttl > self.max_ttl {
            return Err(SignError::TooLong(self.max_ttl));
        }
        if ttl < MIN_TTL {
            return Err(SignError::TooShort);
        }
        Ok(ttl)
    }

    /// Signs `key` as the permit's identity.
    pub(crate) fn sign(
        &self,
        permit: &Permit,
        key: &impl PublicKeyData,
        names: &ServerNames,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, SignError> {
        // A leaf never outlives, nor precedes, its issuer.
        let not_after = (now + ttl).min(self.ca.not_after());
        let not_before = (now - BACKDATE).max(self.ca.not_before());
        if not_after <= now {
            return Err(SignError::IssuerExpired);
        }
        let identity = permit.identity().clone();
        let mut params = CertificateParams::default();
        // Without a subject rcgen marks the names critical, as RFC 5280 §4.2.1.6 demands.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = alternative_names(&identity, names).map_err(SignError::Make)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let number = serial();
        params.serial_number = Some(number.clone());
        params.not_before = rcgen::date_time_ymd(1970, 1, 1) + whole_seconds(not_before);
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + whole_seconds(not_after);
        let leaf = params
            .signed_by(key, self.ca.issuer())
            .map_err(SignError::Make)?;

        let mut answer = vec![leaf.pem()];
        answer.extend(
            self.ca
                .chain()
                .iter()
                .map(|der| lateen_identity::certificate_pem(der)),
        );
        answer.push(self.ca.roots_pem().to_owned());
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.ca.chain().iter().cloned());
        self.verify(&chain, &identity, now)?;
        Ok(Issued {
            identity,
            serial: hex::encode(number.to_bytes()),
            not_after: UNIX_EPOCH + whole_seconds(not_after),
            answer,
            chain,
        })
    }

    fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        identity: &SpiffeId,
        now: SystemTime,
    ) -> Result<(), SignError> {
        let now = UnixTime::since_unix_epoch(whole_seconds(now));
        for verified in [
            self.ca.bundle().verify_server(chain, now),
            self.ca.bundle().verify_client(chain, now),
        ] {
            let got = verified.map_err(SignError::Verify)?;
            if got != *identity {
                return Err(SignError::Identity(got));
            }
        }
        Ok(())
    }
}

fn alternative_names(
    identity: &SpiffeId,
    names: &ServerNames,
) -> Result<Vec<SanType>, rcgen::Error> {
    let mut all = vec![SanType::URI(identity.to_string().try_into()?)];
    for dns in &names.dns {
        all.push(SanType::DnsName(dns.as_str().try_into()?));
    }
    all.extend(names.addresses.iter().copied().map(SanType::IpAddress));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use lateen_identity::pki_types::pem::PemObject as _;
    use proptest::prelude::*;
    use rcgen::KeyPair;
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    use super::*;

    fn signer(state: &std::path::Path) -> Signer {
        let ca = Ca::open(
            state,
            None,
            &"cluster.local".parse().unwrap(),
            SystemTime::now(),
        )
        .unwrap();
        Signer::new(
            Arc::new(ca),
            Duration::from_secs(3600),
            Duration::from_secs(86_400),
        )
    }

    fn permit() -> Permit {
        Permit::own("spiffe://cluster.local/ns/a/sa/b".parse().unwrap())
    }

    #[test]
    fn the_profile_is_that_of_an_svid() {
        let state = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let now = SystemTime::now();
        let issued = signer(state.path())
            .sign(&permit(), &key, &ServerNames::default(), MIN_TTL, now)
            .unwrap();
        let der = CertificateDer::from_pem_slice(issued.answer[0].as_bytes()).unwrap();
        let (_, leaf) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(leaf.subject().iter().count(), 0);
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical);
        assert_eq!(names.value.general_names.len(), 1);
        let usage = leaf.key_usage().unwrap().unwrap();
        assert!(
            usage.critical && usage.value.digital_signature() && usage.value.key_encipherment()
        );
        assert!(!usage.value.key_cert_sign());
        let extended = leaf.extended_key_usage().unwrap().unwrap();
        assert!(extended.value.server_auth && extended.value.client_auth);
        assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
        let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
        assert_eq!(life, 125);
        assert_eq!(issued.answer.len(), 2, "leaf and roots");
        assert_eq!(
            issued.answer[1],
            std::fs::read_to_string(state.path().join("public/root-cert.pem")).unwrap()
        );
    }

    #[test]
    fn lives_outside_the_limits_are_refused() {
        let state = tempfile::tempdir().unwrap();
        let signer = signer(state.path());
        assert_eq!(signer.ttl(0).unwrap(), Duration::from_secs(3600));
        assert_eq!(signer.ttl(i64::MIN).unwrap(), Duration::from_secs(3600));
        assert_eq!(signer.ttl(86_400).unwrap(), Duration::from_secs(86_400));
        assert!(matches!(signer.ttl(86_401), Err(SignError::TooLong(_))));
        assert!(matches!(signer.ttl(i64::MAX), Err(SignError::TooLong(_))));
        assert!(matches!(signer.ttl(4), Err(SignError::TooShort)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_certificate_never_outlives_its_issuer(ttl in 5u64..400_000_000, later in 0u64..315_000_000) {
            let state = tempfile::tempdir().unwrap();
            let signer = signer(state.path());
            let key = KeyPair::generate().unwrap();
            let now = SystemTime::now() + Duration::from_secs(later);
            let ttl = Duration::from_secs(ttl);
            let issued = signer.sign(&permit(), &key, &ServerNames::default(), ttl, now).unwrap();
            prop_assert!(issued.not_after <= signer.ca().not_after());
            prop_assert!(issued.not_after <= now + ttl);
        }
    }
}
