//! Whether a peer is who it must be: a chain to the roots, then the names and hashes of the
//! validation context. There is no way through that skips the chain.

use std::{
    cell::RefCell,
    fmt,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use envoy_types::pb::envoy::{
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, subject_alt_name_matcher::SanType,
    },
    r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
};
use regex::Regex;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use super::peer::{PeerCertificate, dns_covers, hex, sha256};
use crate::config_error::ConfigError;

/// Names and hashes a peer's certificate is held to. Empty rules admit every verified peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    names: Vec<NameRule>,
    /// SHA-256 of certificates, hex.
    certificates: Vec<String>,
    /// SHA-256 of public keys.
    keys: Vec<[u8; 32]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct NameRule {
    kind: Option<San>,
    matcher: Matcher,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum San {
    Dns,
    Uri,
    Email,
    Ip,
}

impl Rules {
    /// Reads the matchers of a validation context (not its roots).
    ///
    /// # Errors
    /// A matcher is malformed or of an unsupported kind.
    pub fn compile(context: &CertificateValidationContext) -> Result<Rules, ConfigError> {
        let mut rules = Rules::default();
        for (index, typed) in context.match_typed_subject_alt_names.iter().enumerate() {
            let within =
                |e: ConfigError| e.within(format_args!("match_typed_subject_alt_names[{index}]"));
            let kind = match SanType::try_from(typed.san_type) {
                Ok(SanType::Dns) => San::Dns,
                Ok(SanType::Uri) => San::Uri,
                Ok(SanType::Email) => San::Email,
                Ok(SanType::IpAddress) => San::Ip,
                Ok(SanType::OtherName | SanType::Unspecified) | Err(_) => {
                    return Err(within(ConfigError::new("san_type", "is not supported")));
                }
            };
            let matcher = Matcher::compile(typed.matcher.as_ref()).map_err(within)?;
            rules.names.push(NameRule {
                kind: Some(kind),
                matcher,
            });
        }
        for (index, matcher) in context.match_subject_alt_names.iter().enumerate() {
            let matcher = Matcher::compile(Some(matcher))
                .map_err(|e| e.within(format_args!("match_subject_alt_names[{index}]")))?;
            rules.names.push(NameRule {
                kind: None,
                matcher,
            });
        }
        for hash in &context.verify_certificate_hash {
            let plain = hash.replace(':', "").to_ascii_lowercase();
            if plain.len() != 64 || !plain.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(ConfigError::new(
                    "verify_certificate_hash",
                    format!("{hash:?} is no SHA-256"),
                ));
            }
            rules.certificates.push(plain);
        }
        for hash in &context.verify_certificate_spki {
            let key = BASE64_STANDARD
                .decode(hash)
                .ok()
                .and_then(|bytes| bytes.try_into().ok());
            rules.keys.push(key.ok_or_else(|| {
                ConfigError::new(
                    "verify_certificate_spki",
                    format!("{hash:?} is no base64 SHA-256"),
                )
            })?);
        }
        Ok(rules)
    }

    /// Whether every verified peer passes.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.certificates.is_empty() && self.keys.is_empty()
    }

    fn check(&self, peer: &PeerCertificate) -> Result<(), Denied> {
        if !self.names.is_empty() && !self.names.iter().any(|rule| rule.matches(peer)) {
            return Err(Denied::Name(
                peer.uri_sans.first().or(peer.dns_sans.first()).cloned(),
            ));
        }
        // Hashes of certificates and of keys are alternatives to each other, as in Envoy.
        let pinned = !self.certificates.is_empty() || !self.keys.is_empty();
        let fits = self
            .certificates
            .iter()
            .any(|hash| **hash == *peer.fingerprint)
            || self.keys.contains(&peer.spki_sha256);
        if pinned && !fits {
            return Err(Denied::Hash(hex(&peer.spki_sha256)));
        }
        Ok(())
    }
}

impl NameRule {
    fn matches(&self, peer: &PeerCertificate) -> bool {
        let wants = |kind: San| self.kind.is_none_or(|k| k == kind);
        (wants(San::Uri) && peer.uri_sans.iter().any(|san| self.matcher.matches(san)))
            || (wants(San::Dns)
                && peer
                    .dns_sans
                    .iter()
                    .any(|san| self.matcher.matches_dns(san)))
            || (wants(San::Email) && peer.email_sans.iter().any(|san| self.matcher.matches(san)))
            || (wants(San::Ip) && peer.ip_sans.iter().any(|san| self.matcher.matches_ip(*san)))
    }
}

/// Why a peer with a good chain is still refused.
#[derive(Debug, thiserror::Error)]
enum Denied {
    #[error("the peer's certificate names {}, which is not an accepted name", .0.as_deref().unwrap_or("nobody"))]
    Name(Option<Arc<str>>),
    #[error("the peer's certificate (key {0}) has none of the accepted hashes")]
    Hash(String),
}

#[derive(Clone, Debug)]
enum Matcher {
    Exact(String, bool),
    Prefix(String, bool),
    Suffix(String, bool),
    Contains(String, bool),
    Regex(Regex),
}

impl Matcher {
    fn compile(matcher: Option<&StringMatcher>) -> Result<Matcher, ConfigError> {
        let matcher = matcher.ok_or_else(|| ConfigError::new("matcher", "must be set"))?;
        let fold = matcher.ignore_case;
        let text = |s: &String| {
            if fold {
                s.to_ascii_lowercase()
            } else {
                s.clone()
            }
        };
        match &matcher.match_pattern {
            Some(MatchPattern::Exact(s)) => Ok(Matcher::Exact(text(s), fold)),
            Some(MatchPattern::Prefix(s)) => Ok(Matcher::Prefix(text(s), fold)),
            Some(MatchPattern::Suffix(s)) => Ok(Matcher::Suffix(text(s), fold)),
            Some(MatchPattern::Contains(s)) => Ok(Matcher::Contains(text(s), fold)),
            // Envoy matches the whole name, so the pattern is anchored.
            Some(MatchPattern::SafeRegex(r)) => Regex::new(&format!("^(?:{})$", r.regex))
                .map(Matcher::Regex)
                .map_err(|e| ConfigError::new("safe_regex", e.to_string())),
            Some(MatchPattern::Custom(_)) => Err(ConfigError::new("custom", "is not supported")),
            None => Err(ConfigError::new("match_pattern", "must be set")),
        }
    }

    fn matches(&self, name: &str) -> bool {
        let folded = |fold: bool| {
            if fold {
                name.to_ascii_lowercase()
            } else {
                name.to_owned()
            }
        };
        match self {
            Matcher::Exact(want, fold) => folded(*fold) == *want,
            Matcher::Prefix(want, fold) => folded(*fold).starts_with(want),
            Matcher::Suffix(want, fold) => folded(*fold).ends_with(want),
            Matcher::Contains(want, fold) => folded(*fold).contains(want),
            Matcher::Regex(regex) => regex.is_match(name),
        }
    }

    /// An exact matcher for DNS also meets wildcard certificates, as in Envoy.
    fn matches_dns(&self, san: &str) -> bool {
        match self {
            Matcher::Exact(want, _) => dns_covers(san, want),
            _ => self.matches(san),
        }
    }

    fn matches_ip(&self, san: IpAddr) -> bool {
        match self {
            Matcher::Exact(want, _) => want.parse() == Ok(san),
            _ => self.matches(&san.to_string()),
        }
    }
}

impl PartialEq for Matcher {
    fn eq(&self, other: &Matcher) -> bool {
        match (self, other) {
            (Matcher::Exact(a, x), Matcher::Exact(b, y))
            | (Matcher::Prefix(a, x), Matcher::Prefix(b, y))
            | (Matcher::Suffix(a, x), Matcher::Suffix(b, y))
            | (Matcher::Contains(a, x), Matcher::Contains(b, y)) => a == b && x == y,
            (Matcher::Regex(a), Matcher::Regex(b)) => a.as_str() == b.as_str(),
            _ => false,
        }
    }
}

impl Eq for Matcher {}

fn check_all(rules: &[Rules], leaf: &CertificateDer<'_>) -> Result<(), Error> {
    let peer = PeerCertificate::of(leaf)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    for rules in rules {
        rules.check(&peer).map_err(|e| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e))))
        })?;
    }
    Ok(())
}

/// Chains that a thread remembers as good.
const REMEMBERED: usize = 64;

thread_local! {
    /// Those that came last are first.
    static GOOD: RefCell<Vec<Good>> = const { RefCell::new(Vec::new()) };
}

/// A chain that a verifier has found good. Its signatures, names and roots do not change, nor do the
/// verifier's rules; the time does. So it is good for that verifier from then on until a certificate of it
/// expires. The proof that the peer has the key is made in each handshake all the same.
struct Good {
    verifier: u64,
    /// SHA-256 of the chain.
    chain: [u8; 32],
    since: UnixTime,
    /// Seconds since 1970.
    until: u64,
}

/// One verifier's share of the memory.
struct Memory(u64);

impl Memory {
    fn new() -> Memory {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Memory(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Verifies a chain unless it is remembered as good.
    fn or(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut text = Vec::new();
        for certificate in std::iter::once(end_entity).chain(intermediates) {
            text.extend_from_slice(&certificate.len().to_be_bytes());
            text.extend_from_slice(certificate);
        }
        let chain = sha256(&text);
        let known = GOOD.with_borrow_mut(|good| {
            let at = good.iter().position(|one| {
                one.verifier == self.0
                    && one.chain == chain
                    && one.since <= now
                    && now.as_secs() < one.until
            })?;
            good[..=at].rotate_right(1);
            Some(())
        });
        if known.is_some() {
            return Ok(());
        }
        verify()?;
        let expiry = |der: &CertificateDer<'_>| {
            let end = PeerCertificate::of(der).ok()?.not_after;
            let end = end.duration_since(SystemTime::UNIX_EPOCH).ok()?;
            Some(end.as_secs())
        };
        let until = std::iter::once(end_entity)
            .chain(intermediates)
            .map(expiry)
            .collect::<Option<Vec<_>>>()
            .and_then(|all| all.into_iter().min());
        if let Some(until) = until {
            GOOD.with_borrow_mut(|good| {
                good.truncate(REMEMBERED - 1);
                good.insert(
                    0,
                    Good {
                        verifier: self.0,
                        chain,
                        since: now,
                        until,
                    },
                );
            });
        }
        Ok(())
    }
}

/// Client certificates: the chain by rustls' own verifier, then the rules.
pub(super) struct ClientRules {
    chains: Arc<dyn ClientCertVerifier>,
    rules: Vec<Rules>,
    memory: Memory,
}

impl ClientRules {
    pub(super) fn new(chains: Arc<dyn ClientCertVerifier>, rules: Vec<Rules>) -> ClientRules {
        ClientRules {
            chains,
            rules,
            memory: Memory::new(),
        }
    }
}

impl fmt::Debug for ClientRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientRules({:?})", self.rules)
    }
}

impl ClientCertVerifier for ClientRules {
    fn offer_client_auth(&self) -> bool {
        self.chains.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chains.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.memory.or(end_entity, intermediates, now, || {
            self.chains
                .verify_client_cert(end_entity, intermediates, now)?;
            check_all(&self.rules, end_entity)
        })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

/// Server certificates: the chain, then the rules; the SNI only when the context says so, because in
/// a mesh it names a cluster and not the peer.
pub(super) struct ServerRules {
    roots: Arc<RootCertStore>,
    rules: Vec<Rules>,
    match_sni: bool,
    provider: Arc<CryptoProvider>,
    memory: Memory,
}

impl ServerRules {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        rules: Vec<Rules>,
        match_sni: bool,
        provider: Arc<CryptoProvider>,
    ) -> ServerRules {
        ServerRules {
            roots,
            rules,
            match_sni,
            provider,
            memory: Memory::new(),
        }
    }
}

impl fmt::Debug for ServerRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerRules({:?})", self.rules)
    }
}

impl ServerCertVerifier for ServerRules {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.memory.or(end_entity, intermediates, now, || {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(end_entity)?,
                &self.roots,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
            check_all(&self.rules, end_entity)
        })?;
        // The name is this connection's.
        if self.match_sni {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            rustls::client::verify_server_name(&certificate, server_name)?;
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
            &self.provider.signature_verification_algorithms,
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
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// For contexts without a validation context: encryption without knowing to whom, as Envoy does.
/// Nothing of such a peer's certificate is ever shown as its identity.
pub(super) struct NoVerification {
    provider: Arc<CryptoProvider>,
}

impl NoVerification {
    pub(super) fn new(provider: Arc<CryptoProvider>) -> NoVerification {
        NoVerification { provider }
    }
}

impl fmt::Debug for NoVerification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NoVerification")
    }
}

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
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
            &self.provider.signature_verification_algorithms,
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
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Duration};

    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::tls::testing::Authority;

    #[test]
    fn a_good_chain_is_remembered_by_its_verifier_until_it_expires() {
        let ca = Authority::new();
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let (leaf, other) = (
            der(&ca.issue("", &["a"]).chain),
            der(&ca.issue("", &["b"]).chain),
        );
        let (memory, foreign) = (Memory::new(), Memory::new());
        let verified = Cell::new(0);
        let mut good = true;
        let ask = |memory: &Memory, leaf: &CertificateDer<'_>, at: u64, good: bool| {
            let now = UnixTime::since_unix_epoch(Duration::from_secs(at));
            memory.or(leaf, &[], now, || {
                verified.set(verified.get() + 1);
                if good {
                    Ok(())
                } else {
                    Err(Error::DecryptError)
                }
            })
        };
        let today = 1_700_000_000;
        ask(&memory, &leaf, today, good).unwrap();
        // Verified before: what the verifier would say now does not matter.
        good = false;
        ask(&memory, &leaf, today + 1, good).unwrap();
        assert_eq!(verified.get(), 1);
        for (memory, leaf, at) in [
            (&memory, &other, today),
            (&foreign, &leaf, today),
            (&memory, &leaf, today - 1),
            // The year 4096, when it has expired.
            (&memory, &leaf, 67_093_000_000),
        ] {
            ask(memory, leaf, at, good).unwrap_err();
        }
        assert_eq!(verified.get(), 5);
        // A refusal is not remembered.
        ask(&foreign, &leaf, today, true).unwrap();
    }
}
