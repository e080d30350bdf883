//! The signing key, its certificate, chain and roots, as they lie in `<state>/ca`: the file names of Istio's
//! `cacerts` secret. A root of our own is made in a folder beside and renamed into place, so a crash
//! leaves either nothing or all of it.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lateen_identity::pki_types::CertificateDer;
use lateen_identity::pki_types::pem::{self, PemObject as _};
use lateen_identity::{BundleError, TrustBundle, TrustDomain};
use rand::RngCore as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SerialNumber,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

/// Life of a root we make.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Tolerates clocks that go behind ours.
const ROOT_BACKDATE: Duration = Duration::from_secs(3600);
/// Largest file read from the folder.
const MAX_FILE_BYTES: u64 = 1 << 20;

const CERT: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOTS: &str = "root-cert.pem";

/// Why there is no CA to sign with. Each message says what an operator can do.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Files are missing.
    #[error(
        "{dir} is incomplete: {missing} is missing. Restore it from a backup; only if no certificate of this CA is in use, remove {dir} and {public} to start with a new root"
    )]
    Incomplete {
        /// The folder.
        dir: PathBuf,
        /// What is missing.
        missing: &'static str,
        /// The published roots.
        public: PathBuf,
    },
    /// There was a CA here.
    #[error(
        "{public} exists but {dir} does not: the signing key is lost. Restore {dir} from a backup, or remove {public} to start with a new root, which no running workload will trust"
    )]
    Lost {
        /// The folder.
        dir: PathBuf,
        /// The published roots.
        public: PathBuf,
    },
    /// Reading.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Writing.
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
    /// Others may read the key.
    #[error("others may read {0}; make it mode 0600")]
    Mode(PathBuf),
    /// Not PEM.
    #[error("{0} is not PEM with one certificate first")]
    Pem(PathBuf, #[source] pem::Error),
    /// The certificate cannot sign.
    #[error("{path} cannot sign: {reason}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The key does not parse.
    #[error("{0} is not a private key")]
    Key(PathBuf, #[source] rcgen::Error),
    /// The key belongs to another certificate.
    #[error("{key} is not the key of {cert}; restore the pair that belongs together")]
    Mismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        cert: PathBuf,
    },
    /// The roots are unusable.
    #[error("{0} is not a trust bundle")]
    Roots(PathBuf, #[source] BundleError),
    /// A root of another trust domain.
    #[error("{path} holds a root of trust domain {found}, but --trust-domain is {wanted}")]
    TrustDomain {
        /// The file.
        path: PathBuf,
        /// Theirs.
        found: TrustDomain,
        /// Ours.
        wanted: TrustDomain,
    },
    /// Making a root.
    #[error("cannot make a root certificate")]
    Make(#[source] rcgen::Error),
}

/// What signs. Immutable; made by [`Ca::open`].
pub struct Ca {
    trust_domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    /// Signing certificate and intermediates, without the root: what goes between leaf and bundle.
    chain: Vec<CertificateDer<'static>>,
    bundle: Arc<TrustBundle>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca")
            .field("trust_domain", &self.trust_domain)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Ca {
    /// Loads the CA of a state folder, or makes one in an empty folder, and publishes its roots as
    /// `<state>/public/root-cert.pem`. With `given`, the CA is that folder's, and nothing is made.
    ///
    /// # Errors
    /// When the folder is damaged in any way: a half-written or mismatched CA is never repaired by guessing.
    pub fn open(
        state: &Path,
        given: Option<&Path>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let dir = given.map_or_else(|| state.join("ca"), Path::to_owned);
        let public = state.join("public").join(ROOTS);
        create_dir(state, 0o711).map_err(|error| CaError::Write(state.to_owned(), error))?;
        if given.is_none() && !exists(&dir)? {
            if exists(&public)? {
                return Err(CaError::Lost { dir, public });
            }
            make(state, &dir, trust_domain, now)?;
        }
        // Kubernetes hands the files of a Secret to root and to the pod's group, for reading.
        let others = if given.is_some() { 0o037 } else { 0o077 };
        let ca = Self::load(&dir, others, &public, trust_domain, now)?;
        let roots = ca.roots_pem();
        publish(&public, roots).map_err(|error| CaError::Write(public.clone(), error))?;
        Ok(ca)
    }

    /// `others`: which of the key's permission bits must not be there.
    fn load(
        dir: &Path,
        others: u32,
        public: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let incomplete = |missing| CaError::Incomplete {
            dir: dir.to_owned(),
            missing,
            public: public.to_owned(),
        };
        let cert_path = dir.join(CERT);
        let key_path = dir.join(KEY);
        let cert = read(&cert_path)?.ok_or_else(|| incomplete(CERT))?;
        let key = read(&key_path)?.ok_or_else(|| incomplete(KEY))?;
        let roots = read(&dir.join(ROOTS))?.ok_or_else(|| incomplete(ROOTS))?;
        let chain = read(&dir.join(CHAIN))?.unwrap_or_default();
        let mode =
            fs::metadata(&key_path).map_err(|error| CaError::Read(key_path.clone(), error))?;
        if mode.permissions().mode() & others != 0 {
            return Err(CaError::Mode(key_path));
        }

        let signing = CertificateDer::from_pem_slice(cert.as_bytes())
            .map_err(|error| CaError::Pem(cert_path.clone(), error))?;
        let refuse = |reason| CaError::Certificate {
            path: cert_path.clone(),
            reason,
        };
        let (_, parsed) =
            X509Certificate::from_der(&signing).map_err(|_| refuse("it is not valid X.509"))?;
        if !parsed.is_ca() {
            return Err(refuse("it is not a CA certificate"));
        }
        if !matches!(parsed.key_usage(), Ok(Some(usage)) if usage.value.key_cert_sign()) {
            return Err(refuse("its key usage does not allow to sign certificates"));
        }
        let (not_before, not_after) = (
            from_unix(parsed.validity().not_before.timestamp()),
            from_unix(parsed.validity().not_after.timestamp()),
        );
        if now < not_before {
            return Err(refuse("it is not valid yet; is the clock right?"));
        }
        if now >= not_after {
            return Err(refuse("it has expired"));
        }
        let key = KeyPair::from_pem(&key).map_err(|error| CaError::Key(key_path.clone(), error))?;
        if key.subject_public_key_info() != parsed.public_key().raw {
            return Err(CaError::Mismatch {
                key: key_path,
                cert: cert_path,
            });
        }

        let roots_path = dir.join(ROOTS);
        let root_ders =
            certificates(&roots).map_err(|error| CaError::Pem(roots_path.clone(), error))?;
        if let Ok(described) = TrustBundle::from_described_pem(&roots)
            && let Some(found) = described
                .trust_domains()
                .find(|found| *found != trust_domain)
        {
            return Err(CaError::TrustDomain {
                path: roots_path,
                found: found.clone(),
                wanted: trust_domain.clone(),
            });
        }
        let bundle = TrustBundle::from_pem(trust_domain.clone(), &roots)
            .map_err(|error| CaError::Roots(roots_path, error))?;
        let intermediates =
            certificates(&chain).map_err(|error| CaError::Pem(dir.join(CHAIN), error))?;
        let mut between = Vec::new();
        for certificate in std::iter::once(signing.clone()).chain(intermediates) {
            if !root_ders.contains(&certificate) && !between.contains(&certificate) {
                between.push(certificate);
            }
        }
        let issuer = Issuer::from_ca_cert_der(&signing, key).map_err(CaError::Make)?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            issuer,
            chain: between,
            bundle: Arc::new(bundle),
            not_before,
            not_after,
        })
    }

    /// Trust domain of all it signs.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots.
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// The roots as PEM.
    pub fn roots_pem(&self) -> &str {
        self.bundle.pem(&self.trust_domain).unwrap_or_default()
    }

    /// End of the signing certificate.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub(crate) fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub(crate) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
}

/// Makes a self-signed root: in `ca.new-<pid>`, then one rename. Of two processes that start at once, the slower
/// finds the folder there and uses it.
fn make(
    state: &Path,
    dir: &Path,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(), CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Make)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain.as_str());
    params
        .distinguished_name
        .push(DnType::CommonName, "Lateen root");
    // X509-SVID §4.2: a signing certificate may name its trust domain; workloads learn it from here.
    let name = trust_domain
        .id()
        .to_string()
        .try_into()
        .map_err(CaError::Make)?;
    params.subject_alt_names.push(SanType::URI(name));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + whole_seconds(now - ROOT_BACKDATE);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + whole_seconds(now + ROOT_LIFE);
    let root = params.self_signed(&key).map_err(CaError::Make)?.pem();
    let key = Zeroizing::new(key.serialize_pem());

    let new = state.join(format!("ca.new-{}", std::process::id()));
    let write = || -> io::Result<()> {
        remove_dir(&new)?;
        DirBuilder::new().mode(0o700).create(&new)?;
        write_new(&new.join(KEY), key.as_bytes(), 0o600)?;
        write_new(&new.join(CERT), root.as_bytes(), 0o644)?;
        write_new(&new.join(ROOTS), root.as_bytes(), 0o644)?;
        File::open(&new)?.sync_all()?;
        match fs::rename(&new, dir) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => remove_dir(&new)?,
            other => other?,
        }
        File::open(state)?.sync_all()
    };
    write().map_err(|error| CaError::Write(dir.to_owned(), error))?;
    tracing::info!(dir = %dir.display(), %trust_domain, "made a new root");
    Ok(())
}

/// A positive random number below 2^127, never zero. RFC 5280 §4.1.2.2.
pub(crate) fn serial() -> SerialNumber {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    // A fixed second-highest bit keeps it positive and of one length: 126 random bits remain.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// X.509 knows whole seconds only.
pub(crate) fn whole_seconds(time: SystemTime) -> Duration {
    Duration::from_secs(
        time.duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    )
}

pub(crate) fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)
}

/// Whoever publishes replaces the file as a whole: readers see the old or the new roots.
fn publish(path: &Path, roots: &str) -> io::Result<()> {
    let Some(dir) = path.parent() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    create_dir(dir, 0o755)?;
    let new = path.with_extension(format!("new-{}", std::process::id()));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write_new(&new, roots.as_bytes(), 0o644)?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn remove_dir(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn exists(path: &Path) -> Result<bool, CaError> {
    path.try_exists()
        .map_err(|error| CaError::Read(path.to_owned(), error))
}

fn read(path: &Path) -> Result<Option<Zeroizing<String>>, CaError> {
    let mut text = Zeroizing::new(String::new());
    let read =
        File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text));
    match read {
        // An empty file is what a full disk leaves behind.
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CaError::Read(path.to_owned(), error)),
    }
}

fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    CertificateDer::pem_slice_iter(text.as_bytes()).collect()
}

fn from_unix(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests;
