//! Keeps the certificate over a restart: one file, `svid.json`, readable by its owner alone. One file and
//! not three, because it is replaced atomically: key, chain and roots always belong together.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use lateen_identity::{Svid, TrustBundle, TrustDomain};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

const FILE: &str = "svid.json";
/// Largest file read.
const MAX_BYTES: u64 = 1 << 20;

/// Why the stored certificate cannot be used, or a new one not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Writing.
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
    /// Others may read the key.
    #[error("{0} holds a private key but others may read it; make it mode 0600")]
    Mode(PathBuf),
    /// Encoding.
    #[error("cannot encode the certificate")]
    Encode(#[source] serde_json::Error),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    trust_domain: TrustDomain,
    chain: String,
    key: Zeroizing<String>,
    roots: String,
}

/// What is stored, if it is good now. A damaged or expired file counts as none, with a warning: the join
/// token is the way back. One that others may read is an error.
pub(super) fn load(dir: &Path) -> Result<Option<Arc<Svid>>, StoreError> {
    let path = dir.join(FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::Read(path, error)),
    };
    let metadata = file
        .metadata()
        .map_err(|error| StoreError::Read(path.clone(), error))?;
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(StoreError::Mode(path));
    }
    let mut text = Zeroizing::new(String::new());
    let usable = match file.take(MAX_BYTES).read_to_string(&mut text) {
        Ok(_) => decode(&text),
        Err(error) => Err(error.to_string()),
    };
    match usable {
        Ok(svid) if !svid.remaining(SystemTime::now()).is_zero() => Ok(Some(Arc::new(svid))),
        Ok(_) => Ok(None),
        Err(reason) => {
            tracing::warn!(path = %path.display(), reason, "the stored certificate is unusable");
            Ok(None)
        }
    }
}

fn decode(text: &str) -> Result<Svid, String> {
    let stored: Stored = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let bundle = TrustBundle::from_pem(stored.trust_domain, &stored.roots)
        .map_err(|error| super::chain(&error))?;
    Svid::from_pem(&stored.chain, &stored.key, Arc::new(bundle))
        .map_err(|error| super::chain(&error))
}

/// Replaces what is stored.
pub(super) fn save(dir: &Path, svid: &Svid) -> Result<(), StoreError> {
    let path = dir.join(FILE);
    let domain = svid.spiffe_id().trust_domain();
    let stored = Stored {
        trust_domain: domain.clone(),
        chain: svid.chain_pem(),
        key: svid.key_pem(),
        roots: svid.bundle().pem(domain).unwrap_or_default().to_owned(),
    };
    let text = Zeroizing::new(serde_json::to_string(&stored).map_err(StoreError::Encode)?);
    replace(dir, &path, text.as_bytes()).map_err(|error| StoreError::Write(path, error))
}

fn replace(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = dir.join(format!("{FILE}.new"));
    // A leftover of a crash is removed first, so that the mode below is the file's from its creation.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use lateen_identity::SpiffeId;
    use rcgen::{
        BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair,
        KeyUsagePurpose, SanType,
    };

    use super::*;

    fn svid() -> Svid {
        let root_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = params.self_signed(&root_key).unwrap().pem();
        let issuer = Issuer::new(params, root_key);
        let id: SpiffeId = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .subject_alt_names
            .push(SanType::URI(id.to_string().try_into().unwrap()));
        let chain = params.signed_by(&key, &issuer).unwrap().pem();
        let bundle = TrustBundle::from_pem(id.trust_domain().clone(), &root).unwrap();
        Svid::from_pem(&chain, &key.serialize_pem(), Arc::new(bundle)).unwrap()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("svid");
        assert!(load(&dir).unwrap().is_none());
        let svid = svid();
        save(&dir, &svid).unwrap();
        save(&dir, &svid).unwrap();
        let loaded = load(&dir).unwrap().unwrap();
        assert_eq!(loaded.serial(), svid.serial());
        assert_eq!(loaded.bundle(), svid.bundle());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(FILE))), (0o700, 0o600));
    }

    #[test]
    fn damage_is_survived_and_exposure_is_not() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &svid()).unwrap();
        let file = dir.path().join(FILE);
        let text = fs::read_to_string(&file).unwrap();
        for damaged in [
            "",
            "{}",
            "\u{0}",
            &text[..text.len() / 2],
            &text.replace("td", "other"),
        ] {
            fs::write(&file, damaged).unwrap();
            assert!(load(dir.path()).unwrap().is_none(), "{damaged:.20}");
        }
        fs::write(&file, &text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load(dir.path()), Err(StoreError::Mode(_))));
    }
}
