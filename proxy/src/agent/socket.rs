//! The Unix socket: ours alone (mode 0600 from the start), replaced if nobody serves it, removed at the end.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Removes the socket when dropped, if it is still the one we made.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    inode: u64,
}

/// Binds `path`. Answers `None` when somebody else (SPIRE, say) serves it already: then they are asked, not we.
pub(super) fn bind(path: &Path) -> io::Result<Option<(UnixListener, Socket)>> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Nobody listens: what a killed agent left behind.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error),
    }
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // Made under another name, closed to others, then moved into place: at no moment can others connect.
    let mut new = path.as_os_str().to_owned();
    new.push(".n");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, Permissions::from_mode(0o600))?;
    let inode = fs::metadata(&new)?.ino();
    fs::rename(&new, path)?;
    Ok(Some((
        listener,
        Socket {
            path: path.to_owned(),
            inode,
        },
    )))
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_serves_others_stand_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/socket");
        let (_listener, socket) = bind(&path).unwrap().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(dir.path().join("a/b")).unwrap().mode() & 0o777,
            0o700
        );
        assert!(bind(&path).unwrap().is_none());
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn leftovers_are_replaced_and_successors_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (listener, first) = bind(&path).unwrap().unwrap();
        drop(listener);
        let (_listener, _second) = bind(&path).unwrap().unwrap();
        drop(first);
        assert!(
            path.exists(),
            "the first must not remove the second's socket"
        );
    }
}
