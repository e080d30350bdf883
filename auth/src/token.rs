//! Join tokens: one-time proofs of identity, made by whoever may write the state folder. A file per token,
//! named by the token's hash, so the folder gives no usable token away. Using one renames its file, and
//! a rename succeeds once, whoever else tries at the same moment.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lateen_identity::SpiffeId;
use rand::RngCore as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// So that people and secret scanners recognise one.
pub(crate) const PREFIX: &str = "lateen-join-";
/// Random part, before base64.
const RANDOM_BYTES: usize = 32;
/// Largest token file read.
const MAX_FILE_BYTES: u64 = 8 * 1024;
/// Longest life of a token.
const MAX_TTL: Duration = Duration::from_secs(30 * 86_400);

/// Why a token is not honoured, or not made. None of this is told to the caller.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not of the form of a token.
    #[error("not a join token")]
    Form,
    /// Nobody made it, or it was used.
    #[error("the join token is unknown or was used")]
    Unknown,
    /// Its time is over.
    #[error("the join token has expired")]
    Expired,
    /// It would live too long.
    #[error("a join token lives at most {} days", MAX_TTL.as_secs() / 86_400)]
    Ttl,
    /// Not an identity of this mesh.
    #[error("{0} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Identity(SpiffeId),
    /// Its file is damaged.
    #[error("the file of the join token is damaged")]
    Damaged(#[source] serde_json::Error),
    /// The folder cannot be read or written.
    #[error("cannot use the token folder")]
    Io(#[from] io::Error),
}

/// The token folder. Several processes may use it at once.
#[derive(Clone, Debug)]
pub struct Tokens {
    dir: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    identity: SpiffeId,
    expires: u64,
}

/// A token that exists, is not expired and not yet used.
#[derive(Debug)]
pub struct Pending {
    identity: SpiffeId,
    file: PathBuf,
}

impl Pending {
    /// What its bearer becomes.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Uses the token up.
    ///
    /// # Errors
    /// [`TokenError::Unknown`] when somebody else was faster.
    pub fn consume(self) -> Result<SpiffeId, TokenError> {
        match fs::rename(&self.file, self.file.with_extension("used")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TokenError::Unknown);
            }
            Err(error) => return Err(error.into()),
        }
        // On disk before anything is signed: a crash must not make the token good again.
        if let Some(dir) = self.file.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(self.identity)
    }
}

impl Tokens {
    /// The tokens in `<state>/join-tokens`, which is created if needed.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn open(state: &Path) -> io::Result<Self> {
        let dir = state.join("join-tokens");
        crate::ca::create_dir(state, 0o711)?;
        crate::ca::create_dir(&dir, 0o700)?;
        Ok(Self { dir })
    }

    /// Makes a token.
    ///
    /// # Errors
    /// When `ttl` is too long or the folder cannot be written.
    pub fn create(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Zeroizing<String>, TokenError> {
        if ttl > MAX_TTL {
            return Err(TokenError::Ttl);
        }
        let mut random = Zeroizing::new([0; RANDOM_BYTES]);
        rand::rng().fill_bytes(&mut *random);
        let token = Zeroizing::new(format!(
            "{PREFIX}{}",
            &*Zeroizing::new(URL_SAFE_NO_PAD.encode(*random))
        ));
        let record = Record {
            identity: identity.clone(),
            expires: unix(now + ttl),
        };
        let text = serde_json::to_vec(&record).map_err(TokenError::Damaged)?;
        let file = self.file(&token);
        let new = file.with_extension("new");
        let mut out = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        out.write_all(&text)?;
        out.sync_all()?;
        fs::rename(&new, &file)?;
        File::open(&self.dir)?.sync_all()?;
        Ok(token)
    }

    /// Finds a token without using it up.
    ///
    /// # Errors
    /// When it is not of the form of one, unknown, used or expired.
    pub fn find(&self, token: &str, now: SystemTime) -> Result<Pending, TokenError> {
        let random = token.strip_prefix(PREFIX).ok_or(TokenError::Form)?;
        // The length first: nothing longer is decoded or hashed.
        if random.len() != RANDOM_BYTES.div_ceil(3) * 4 - 1
            || URL_SAFE_NO_PAD.decode(random).is_err()
        {
            return Err(TokenError::Form);
        }
        let file = self.file(token);
        let record = match read(&file) {
            Ok(text) => serde_json::from_str::<Record>(&text).map_err(TokenError::Damaged)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TokenError::Unknown);
            }
            Err(error) => return Err(error.into()),
        };
        if unix(now) >= record.expires {
            return Err(TokenError::Expired);
        }
        Ok(Pending {
            identity: record.identity,
            file,
        })
    }

    /// Removes what is expired, used and expired, or left over by a crash. Says how many files went.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn sweep(&self, now: SystemTime) -> io::Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let expired = match path.extension().and_then(|extension| extension.to_str()) {
                Some("json" | "used") => {
                    // A damaged file is kept for whoever looks into it; it is never honoured.
                    let record = read(&path)
                        .ok()
                        .and_then(|text| serde_json::from_str::<Record>(&text).ok());
                    record.is_some_and(|record| unix(now) >= record.expires)
                }
                Some("new") => fs::metadata(&path)
                    .and_then(|metadata| metadata.modified())
                    .is_ok_and(|made| {
                        now.duration_since(made)
                            .is_ok_and(|age| age > Duration::from_secs(60))
                    }),
                _ => false,
            };
            if expired && fs::remove_file(&path).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn file(&self, token: &str) -> PathBuf {
        self.dir.join(format!(
            "{}.json",
            hex::encode(Sha256::digest(token.as_bytes()))
        ))
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_FILE_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> SpiffeId {
        "spiffe://td/ns/a/sa/b".parse().unwrap()
    }

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const TTL: Duration = Duration::from_secs(600);

    #[test]
    fn a_token_works_once() {
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(state.path()).unwrap();
        let token = tokens.create(&id(), TTL, NOW).unwrap();
        let (first, second) = (
            tokens.find(&token, NOW).unwrap(),
            tokens.find(&token, NOW).unwrap(),
        );
        assert_eq!(first.consume().unwrap(), id());
        assert!(matches!(second.consume(), Err(TokenError::Unknown)));
        assert!(matches!(tokens.find(&token, NOW), Err(TokenError::Unknown)));
    }

    #[test]
    fn of_many_at_once_one_wins() {
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(state.path()).unwrap();
        let token = tokens.create(&id(), TTL, NOW).unwrap();
        let pending: Vec<_> = (0..8).map(|_| tokens.find(&token, NOW).unwrap()).collect();
        let won = std::thread::scope(|scope| {
            let tries: Vec<_> = pending
                .into_iter()
                .map(|one| scope.spawn(|| one.consume().is_ok()))
                .collect();
            tries
                .into_iter()
                .map(|one| one.join().unwrap())
                .filter(|won| *won)
                .count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn expired_tokens_are_refused_and_swept() {
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(state.path()).unwrap();
        let token = tokens.create(&id(), TTL, NOW).unwrap();
        let used = tokens.create(&id(), TTL, NOW).unwrap();
        tokens.find(&used, NOW).unwrap().consume().unwrap();
        assert_eq!(tokens.sweep(NOW + TTL - Duration::from_secs(1)).unwrap(), 0);
        assert!(matches!(
            tokens.find(&token, NOW + TTL),
            Err(TokenError::Expired)
        ));
        assert_eq!(tokens.sweep(NOW + TTL).unwrap(), 2);
        assert!(matches!(tokens.find(&token, NOW), Err(TokenError::Unknown)));
    }

    #[test]
    fn the_folder_gives_no_token_away() {
        use std::os::unix::fs::PermissionsExt as _;
        let state = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(state.path()).unwrap();
        let token = tokens.create(&id(), TTL, NOW).unwrap();
        let entry = fs::read_dir(state.path().join("join-tokens"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        let secret = token.strip_prefix(PREFIX).unwrap();
        assert!(!entry.file_name().to_string_lossy().contains(secret));
        assert!(!fs::read_to_string(entry.path()).unwrap().contains(secret));
        assert_eq!(
            entry.metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    proptest! {
        #[test]
        fn no_text_is_a_token_by_chance(text in "(lateen-join-)?[ -~/.]{0,60}") {
            let state = tempfile::tempdir().unwrap();
            let tokens = Tokens::open(state.path()).unwrap();
            prop_assert!(tokens.find(&text, NOW).is_err());
        }
    }
}
