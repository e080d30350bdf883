//! What is in a secret: certificates with keys, roots with rules. Parsed and checked once, here.

use std::{fmt, sync::Arc, time::SystemTime};

use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, Secret, TlsCertificate,
        certificate_validation_context::TrustChainVerification, secret::Type,
    },
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use zeroize::Zeroizing;

use crate::{
    config_error::ConfigError,
    tls::{peer::PeerCertificate, provider, verify::Rules},
};

/// Certificates and keys are a few KiB; a bundle of all public roots is 200 KiB.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A certificate chain with its private key, and what it says about us.
#[derive(Clone)]
pub struct Certificate {
    /// For rustls.
    pub key: Arc<CertifiedKey>,
    /// The end-entity certificate, read.
    pub facts: Arc<PeerCertificate>,
    /// Where the chain came from, for `/certs`.
    pub path: String,
}

impl Certificate {
    /// Reads Envoy's form of it.
    ///
    /// # Errors
    /// A part is missing, unreadable or of an unsupported kind, or key and certificate do not match.
    pub fn load(source: &TlsCertificate) -> Result<Certificate, ConfigError> {
        if source.pkcs12.is_some()
            || source.password.is_some()
            || source.private_key_provider.is_some()
        {
            return Err(ConfigError::new(
                "tls_certificate",
                "pkcs12, password and private_key_provider are not supported",
            ));
        }
        let chain = read(source.certificate_chain.as_ref(), "certificate_chain")?;
        let key = read(source.private_key.as_ref(), "private_key")?;
        let mut certificate = Certificate::from_pem(&chain, &key)?;
        certificate.path = path_of(source.certificate_chain.as_ref());
        Ok(certificate)
    }

    /// Reads PEM.
    ///
    /// # Errors
    /// Either does not parse, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Certificate, ConfigError> {
        let chain = certificates(chain, "certificate_chain")?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| ConfigError::new("private_key", format!("no PEM private key: {e}")))?;
        Certificate::from_der(chain, key)
    }

    /// Takes DER.
    ///
    /// # Errors
    /// The leaf or key does not parse, or they do not belong together.
    pub fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Certificate, ConfigError> {
        let leaf = chain
            .first()
            .ok_or_else(|| ConfigError::new("certificate_chain", "has no certificate"))?;
        let facts =
            PeerCertificate::read(leaf).map_err(|e| ConfigError::new("certificate_chain", e))?;
        let key = provider()
            .key_provider
            .load_private_key(key)
            .map_err(|e| ConfigError::new("private_key", e.to_string()))?;
        let key = CertifiedKey::new(chain, key);
        match key.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(_) => {
                return Err(ConfigError::new(
                    "private_key",
                    "does not belong to the certificate",
                ));
            }
        }
        Ok(Certificate {
            key: Arc::new(key),
            facts: Arc::new(facts),
            path: "<inline>".into(),
        })
    }

    /// Whether both have the same chain (and so the same key).
    pub fn same(&self, other: &Certificate) -> bool {
        self.key.cert == other.key.cert
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("facts", &self.facts)
            .field("key", &"***")
            .finish()
    }
}

/// Roots that peers must chain to, and what else must hold for them.
#[derive(Clone)]
pub struct Trust {
    /// For rustls; empty when a context has rules only.
    pub roots: Arc<RootCertStore>,
    /// The same, for `/certs`.
    pub authorities: Vec<CertificateDer<'static>>,
    /// Names and hashes peers are held to.
    pub rules: Rules,
    /// Where the roots came from, for `/certs`.
    pub path: String,
}

impl Trust {
    /// Reads Envoy's form of it. Everything in it that we could not enforce is an error.
    ///
    /// # Errors
    /// The roots do not parse or a rule is not supported.
    pub fn load(context: &CertificateValidationContext) -> Result<Trust, ConfigError> {
        refuse_unsupported(context)?;
        let mut trust = Trust {
            roots: Arc::new(RootCertStore::empty()),
            authorities: Vec::new(),
            rules: Rules::compile(context)?,
            path: path_of(context.trusted_ca.as_ref()),
        };
        if context.trusted_ca.is_some() {
            trust.set_roots(certificates(
                &read(context.trusted_ca.as_ref(), "trusted_ca")?,
                "trusted_ca",
            )?)?;
        } else if context.system_root_certs.is_some() {
            trust.set_roots(system_roots()?)?;
        }
        Ok(trust)
    }

    /// Reads PEM roots without further rules.
    ///
    /// # Errors
    /// They do not parse.
    pub fn from_pem(roots: &[u8]) -> Result<Trust, ConfigError> {
        Trust::from_der(certificates(roots, "trusted_ca")?)
    }

    /// Takes DER roots without further rules.
    ///
    /// # Errors
    /// One of them is no certificate.
    pub fn from_der(roots: Vec<CertificateDer<'static>>) -> Result<Trust, ConfigError> {
        let mut trust = Trust {
            roots: Arc::new(RootCertStore::empty()),
            authorities: Vec::new(),
            rules: Rules::default(),
            path: "<inline>".into(),
        };
        trust.set_roots(roots)?;
        Ok(trust)
    }

    fn set_roots(&mut self, authorities: Vec<CertificateDer<'static>>) -> Result<(), ConfigError> {
        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            roots
                .add(authority.clone())
                .map_err(|e| ConfigError::new("trusted_ca", e.to_string()))?;
        }
        self.roots = Arc::new(roots);
        self.authorities = authorities;
        Ok(())
    }

    /// Whether both admit the same peers.
    pub fn same(&self, other: &Trust) -> bool {
        self.authorities == other.authorities && self.rules == other.rules
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Trust({} roots, {:?})",
            self.authorities.len(),
            self.rules
        )
    }
}

fn refuse_unsupported(context: &CertificateValidationContext) -> Result<(), ConfigError> {
    let unsupported = [
        (context.crl.is_some(), "crl"),
        (
            context.allow_expired_certificate,
            "allow_expired_certificate",
        ),
        (
            context.custom_validator_config.is_some(),
            "custom_validator_config",
        ),
        (context.max_verify_depth.is_some(), "max_verify_depth"),
        (
            context
                .require_signed_certificate_timestamp
                .is_some_and(|v| v.value),
            "require_signed_certificate_timestamp",
        ),
        (
            context.ca_certificate_provider_instance.is_some(),
            "ca_certificate_provider_instance",
        ),
        (
            context.trust_chain_verification == TrustChainVerification::AcceptUntrusted as i32,
            "trust_chain_verification ACCEPT_UNTRUSTED",
        ),
    ];
    match unsupported.into_iter().find(|(used, _)| *used) {
        Some((_, name)) => Err(ConfigError::new(name, "is not supported")),
        None => Ok(()),
    }
}

fn certificates(pem: &[u8], path: &str) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| ConfigError::new(path, format!("not PEM: {e}")))?;
    if all.is_empty() {
        return Err(ConfigError::new(path, "has no PEM certificate"));
    }
    Ok(all)
}

/// Where distributions keep the public roots.
fn system_roots() -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    const PLACES: [&str; 3] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/cert.pem",
    ];
    let found = PLACES
        .into_iter()
        .find(|place| std::path::Path::new(place).exists());
    let place = found.ok_or_else(|| {
        ConfigError::new(
            "system_root_certs",
            "no bundle found; is ca-certificates installed?",
        )
    })?;
    certificates(&read_file(place, "system_root_certs")?, "system_root_certs")
}

/// Whether a secret has to be read again when files change.
pub fn names_files(secret: &Secret) -> bool {
    let is_file = |source: &Option<DataSource>| {
        matches!(
            source.as_ref().and_then(|s| s.specifier.as_ref()),
            Some(Specifier::Filename(_))
        )
    };
    match &secret.r#type {
        Some(Type::TlsCertificate(c)) => is_file(&c.certificate_chain) || is_file(&c.private_key),
        Some(Type::ValidationContext(c)) => is_file(&c.trusted_ca),
        _ => false,
    }
}

fn path_of(source: Option<&DataSource>) -> String {
    match source.and_then(|s| s.specifier.as_ref()) {
        Some(Specifier::Filename(name)) => name.clone(),
        _ => "<inline>".into(),
    }
}

fn read(source: Option<&DataSource>, path: &str) -> Result<Zeroizing<Vec<u8>>, ConfigError> {
    let missing = || ConfigError::new(path, "must be set");
    match source
        .and_then(|s| s.specifier.as_ref())
        .ok_or_else(missing)?
    {
        Specifier::Filename(name) => read_file(name, path),
        Specifier::InlineBytes(bytes) => Ok(Zeroizing::new(bytes.clone())),
        Specifier::InlineString(text) => Ok(Zeroizing::new(text.clone().into_bytes())),
        Specifier::EnvironmentVariable(name) => match std::env::var(name) {
            Ok(value) => Ok(Zeroizing::new(value.into_bytes())),
            Err(e) => Err(ConfigError::new(
                path,
                format!("environment variable {name}: {e}"),
            )),
        },
    }
}

fn read_file(name: &str, path: &str) -> Result<Zeroizing<Vec<u8>>, ConfigError> {
    let failed = |e: std::io::Error| ConfigError::new(path, format!("cannot read {name}: {e}"));
    let meta = std::fs::metadata(name).map_err(failed)?;
    if !meta.is_file() || meta.len() > MAX_FILE_BYTES {
        return Err(ConfigError::new(
            path,
            format!("{name} is no file of at most {MAX_FILE_BYTES} bytes"),
        ));
    }
    std::fs::read(name).map(Zeroizing::new).map_err(failed)
}

/// Seconds since 1970 as a time, for certificates' validity.
pub(crate) fn at(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(after) => SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(after),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}
