//! Files that are read again when they change, for what is mounted from a Secret or a ConfigMap.
//!
//! They are looked at every few seconds, not watched: a kubelet swaps a link to a folder, of which a watch of the file
//! hears nothing, and the files are few and small.

use std::fmt::Display;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lateen_service::shutdown::Drain;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};
use zeroize::Zeroizing;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// Largest file.
const LIMIT: u64 = 1 << 20;

/// Why files are of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// One cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Which.
        file: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What they say makes no sense.
    #[error("{files}: {reason}")]
    Content {
        /// All of them.
        files: String,
        /// Why not.
        reason: String,
    },
}

/// What `read` makes of the texts of `files`, now and whenever one has changed. What makes no sense later changes nothing.
pub(crate) fn follow<T, E, F>(
    files: Vec<PathBuf>,
    read: F,
    drain: &Drain,
) -> Result<watch::Receiver<Arc<T>>, FileError>
where
    T: Send + Sync + 'static,
    E: Display,
    F: Fn(&[String]) -> Result<T, E> + Send + Sync + 'static,
{
    follow_each(files, read, LOOK, drain)
}

fn follow_each<T, E, F>(
    files: Vec<PathBuf>,
    read: F,
    look: Duration,
    drain: &Drain,
) -> Result<watch::Receiver<Arc<T>>, FileError>
where
    T: Send + Sync + 'static,
    E: Display,
    F: Fn(&[String]) -> Result<T, E> + Send + Sync + 'static,
{
    let names = || {
        let names: Vec<String> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        names.join(", ")
    };
    let mut texts = texts(&files)?;
    let content = |error: E| FileError::Content {
        files: names(),
        reason: error.to_string(),
    };
    let (out, kept) = watch::channel(Arc::new(read(&texts).map_err(content)?));
    if files.is_empty() {
        // Nothing changes any more; the sender is kept, so that waiting for a change is no error.
        drain.spawn_until_stop(async move { out.closed().await });
        return Ok(kept);
    }
    drain.spawn_until_stop(async move {
        let mut complaint = String::new();
        loop {
            sleep(look).await;
            let wanted = files.clone();
            let news = match tokio::task::spawn_blocking(move || self::texts(&wanted)).await {
                Ok(Ok(news)) if *news == *texts => continue,
                Ok(Ok(news)) => match read(&news) {
                    Ok(value) => {
                        info!(?files, "read again");
                        out.send_replace(Arc::new(value));
                        complaint.clear();
                        texts = news;
                        continue;
                    }
                    // A pair of files may be caught in the middle of their replacement.
                    Err(error) => error.to_string(),
                },
                Ok(Err(error)) => format!("{error}: {}", source(&error)),
                Err(error) => error.to_string(),
            };
            if complaint != news {
                warn!(
                    ?files,
                    error = news,
                    "cannot be used; what they said before stays"
                );
                complaint = news;
            }
        }
    });
    Ok(kept)
}

fn source(error: &FileError) -> String {
    std::error::Error::source(error).map_or_else(String::new, ToString::to_string)
}

fn texts(files: &[PathBuf]) -> Result<Zeroizing<Vec<String>>, FileError> {
    let all = files.iter().map(|file| {
        text(file).map_err(|source| FileError::Read {
            file: file.clone(),
            source,
        })
    });
    all.collect::<Result<Vec<_>, _>>().map(Zeroizing::new)
}

fn text(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(file)?
        .take(LIMIT + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > LIMIT {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {LIMIT} bytes"),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_are_taken_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        let number = |texts: &[String]| texts[0].trim().parse::<u32>();
        let drain = Drain::new();
        let look = Duration::from_millis(5);
        let follow = || follow_each(vec![file.clone()], number, look, &drain);
        assert!(matches!(follow(), Err(FileError::Read { .. })));
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(follow(), Err(FileError::Content { .. })));
        std::fs::write(&file, "1").unwrap();
        let mut kept = follow().unwrap();
        assert_eq!(**kept.borrow_and_update(), 1);
        std::fs::write(&file, "x").unwrap();
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, "2").unwrap();
        kept.changed().await.unwrap();
        assert_eq!(**kept.borrow_and_update(), 2);
        drain.finish(Duration::from_secs(5)).await;
    }
}
