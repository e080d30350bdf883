//! What a certificate says: names, subject, validity, fingerprint.

use std::{cell::RefCell, net::IpAddr, sync::Arc, time::SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer, x509::X509Name,
};

use crate::secret::material::at;

/// Certificates a thread remembers, a KiB or two each.
const REMEMBERED: usize = 64;

/// A certificate as it came, and what was read in it.
type Parsed = (Box<[u8]>, Arc<PeerCertificate>);

thread_local! {
    /// Those that came last are first.
    static READ: RefCell<Vec<Parsed>> = const { RefCell::new(Vec::new()) };
}

/// A certificate, read; whether it is to be trusted is another question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// URI SANs in order; in a mesh the first is the SPIFFE ID.
    pub uri_sans: Vec<Arc<str>>,
    /// DNS SANs in order.
    pub dns_sans: Vec<Arc<str>>,
    /// IP SANs in order.
    pub ip_sans: Vec<IpAddr>,
    /// Email SANs in order.
    pub email_sans: Vec<Arc<str>>,
    /// Subject, RFC 2253.
    pub subject: Arc<str>,
    /// Issuer, RFC 2253.
    pub issuer: Arc<str>,
    /// SHA-256 of the DER, hex.
    pub fingerprint: Arc<str>,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub spki_sha256: [u8; 32],
    /// Serial number, hex.
    pub serial: Arc<str>,
    /// Begin of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl PeerCertificate {
    /// Reads one certificate.
    ///
    /// # Errors
    /// It is not a DER certificate, with a short reason.
    pub fn read(der: &CertificateDer<'_>) -> Result<PeerCertificate, String> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|e| format!("not an X.509 certificate: {e}"))?;
        if !rest.is_empty() {
            return Err("bytes follow the certificate".into());
        }
        let mut read = PeerCertificate {
            uri_sans: Vec::new(),
            dns_sans: Vec::new(),
            ip_sans: Vec::new(),
            email_sans: Vec::new(),
            subject: rfc2253(certificate.subject()).into(),
            issuer: rfc2253(certificate.issuer()).into(),
            fingerprint: hex(&sha256(der)).into(),
            spki_sha256: sha256(certificate.public_key().raw),
            serial: hex(certificate.raw_serial()).into(),
            not_before: at(certificate.validity().not_before.timestamp()),
            not_after: at(certificate.validity().not_after.timestamp()),
        };
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| format!("subject alternative names: {e}"))?;
        for name in names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
        {
            match name {
                GeneralName::URI(uri) => read.uri_sans.push((*uri).into()),
                GeneralName::DNSName(dns) => read.dns_sans.push((*dns).into()),
                GeneralName::RFC822Name(email) => read.email_sans.push((*email).into()),
                GeneralName::IPAddress(bytes) => {
                    let ip = <[u8; 4]>::try_from(*bytes)
                        .map(IpAddr::from)
                        .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                    read.ip_sans.extend(ip);
                }
                _ => {}
            }
        }
        Ok(read)
    }

    /// [`PeerCertificate::read`] with a memory: in a mesh the same few peers come again and again, and a
    /// certificate is looked at by the verifier and once more for the record.
    ///
    /// # Errors
    /// As there.
    pub fn of(der: &CertificateDer<'_>) -> Result<Arc<PeerCertificate>, String> {
        let known = READ.with_borrow_mut(|read| {
            let at = read.iter().position(|(bytes, _)| **bytes == **der)?;
            read[..=at].rotate_right(1);
            read.first().map(|(_, peer)| peer.clone())
        });
        if let Some(known) = known {
            return Ok(known);
        }
        let peer = Arc::new(PeerCertificate::read(der)?);
        READ.with_borrow_mut(|read| {
            read.truncate(REMEMBERED - 1);
            read.insert(0, (der.to_vec().into(), peer.clone()));
        });
        Ok(peer)
    }

    /// Whether a DNS SAN covers `name`, wildcards in the leftmost label included.
    pub fn has_dns_name(&self, name: &str) -> bool {
        self.dns_sans.iter().any(|san| dns_covers(san, name))
    }
}

/// Whether the pattern of a DNS SAN covers a name. RFC 6125 §6.4.3: `*` is one whole leftmost label.
pub(super) fn dns_covers(san: &str, name: &str) -> bool {
    if san.eq_ignore_ascii_case(name) {
        return true;
    }
    match (san.strip_prefix("*."), name.split_once('.')) {
        (Some(parent), Some((_, rest))) => parent.eq_ignore_ascii_case(rest),
        _ => false,
    }
}

/// SHA-256 of `data`.
pub(super) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    let hash = super::provider().cipher_suites.iter().find_map(|suite| {
        let suite = suite.tls13()?;
        let hash = suite.common.hash_provider;
        (hash.algorithm() == rustls::crypto::hash::HashAlgorithm::SHA256).then(|| hash.hash(data))
    });
    if let Some(hash) = hash {
        out.copy_from_slice(hash.as_ref());
    }
    out
}

/// Lower case.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|n| char::from_digit(n.into(), 16))
        .collect()
}

/// `CN=reviews,O=Example`: the most specific part first, specials escaped.
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter()
        .map(|rdn| {
            let attributes: Vec<String> = rdn
                .iter()
                .map(|attribute| {
                    let oid = attribute.attr_type();
                    let key =
                        x509_parser::objects::oid2abbrev(oid, x509_parser::objects::oid_registry())
                            .map_or_else(|_| oid.to_id_string(), str::to_owned);
                    format!("{key}={}", escape(attribute.as_str().unwrap_or("")))
                })
                .collect();
            attributes.join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// As OpenSSL prints it: what is not printable ASCII is the hex of its bytes.
fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (index, c) in value.chars().enumerate() {
        if !c.is_ascii() || c.is_ascii_control() {
            let mut bytes = [0; 4];
            for byte in c.encode_utf8(&mut bytes).bytes() {
                out.push_str(&format!("\\{byte:02X}"));
            }
            continue;
        }
        let edge_space = c == ' ' && (index == 0 || index == last);
        if matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || edge_space
            || (c == '#' && index == 0)
        {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_cover_one_label() {
        assert!(dns_covers("*.example.com", "a.Example.com"));
        assert!(!dns_covers("*.example.com", "a.b.example.com"));
        assert!(!dns_covers("*.example.com", "example.com"));
        assert!(!dns_covers("*", "com"));
        assert!(dns_covers("x.y", "X.Y"));
    }

    #[test]
    fn a_certificate_that_comes_again_is_the_one_it_was() {
        let ca = crate::tls::testing::Authority::new();
        let der = |name: &str| {
            let issued = ca.issue("", &[name]);
            <CertificateDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_slice(
                issued.chain.as_bytes(),
            )
            .unwrap()
        };
        let first = der("first");
        let once = PeerCertificate::of(&first).unwrap();
        for n in 0..REMEMBERED {
            let other = PeerCertificate::of(&der(&format!("n{n}"))).unwrap();
            assert_eq!(&*other.dns_sans[0], format!("n{n}"));
            // Asked for all the time, it stays.
            assert!(Arc::ptr_eq(&PeerCertificate::of(&first).unwrap(), &once));
        }
        assert_eq!(READ.with_borrow(Vec::len), REMEMBERED);
    }

    #[test]
    fn a_certificate_is_read_whole() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["a.example".into()]).unwrap();
        params.subject_alt_names.push(rcgen::SanType::URI(
            "spiffe://td/ns/a/sa/b".try_into().unwrap(),
        ));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::OrganizationName, "Acme, Inc");
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "b");
        let certificate = params.self_signed(&key).unwrap();
        let read = PeerCertificate::read(certificate.der()).unwrap();
        assert_eq!(&*read.uri_sans[0], "spiffe://td/ns/a/sa/b");
        assert_eq!(&*read.dns_sans[0], "a.example");
        assert_eq!(&*read.subject, r"CN=b,O=Acme\, Inc");
        assert_eq!(read.issuer, read.subject);
        assert_eq!(read.fingerprint.len(), 64);
        assert_ne!(read.spki_sha256, [0; 32]);
        assert!(PeerCertificate::read(&CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])).is_err());
    }
}
