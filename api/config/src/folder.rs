//! A watched directory of YAML files, as a source of a [`Store`].

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::store::{ConfigSet, Source, Store};

/// A file larger than this is refused: no configuration is.
const FILE_LIMIT_BYTES: u64 = 8 << 20;
/// Directories nested deeper than this are not entered (symbolic links may form cycles).
const DEPTH_LIMIT: usize = 16;
/// More files than this are refused.
const FILE_LIMIT: usize = 20_000;
/// Files change in bursts (`kubectl`-like writers, editors, git): wait until it has been quiet so long,
const DEBOUNCE: Duration = Duration::from_millis(50);
/// but never longer than this.
const DEBOUNCE_LIMIT: Duration = Duration::from_millis(500);

/// A directory of YAML files; [`Folder::refresh`] reads again.
#[derive(Debug)]
pub struct Folder {
    directory: PathBuf,
    store: Arc<Store>,
}

impl Folder {
    /// Reads a directory and all below it.
    ///
    /// # Errors
    /// The directory cannot be listed. Files that cannot be read are problems, not errors.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        Self::open_in(directory, Store::new([Source::Folder]))
    }

    /// Reads a directory and all below it into a store that has other sources beside it.
    ///
    /// # Errors
    /// As [`Folder::open`].
    pub fn open_in(directory: impl Into<PathBuf>, store: Arc<Store>) -> io::Result<Self> {
        let folder = Self {
            directory: directory.into(),
            store,
        };
        folder.try_refresh()?;
        Ok(folder)
    }

    /// The set as last read.
    #[must_use]
    pub fn current(&self) -> Arc<ConfigSet> {
        self.store.current()
    }

    /// Reads what has changed. When the directory cannot be listed the last set stays.
    pub fn refresh(&mut self) -> Arc<ConfigSet> {
        if let Err(error) = self.try_refresh() {
            tracing::warn!(directory = %self.directory.display(), %error, "cannot list; the last good configuration stays");
        }
        self.current()
    }

    fn try_refresh(&self) -> io::Result<()> {
        let mut paths = BTreeSet::new();
        list(&self.directory, 0, &mut paths)?;
        let texts: Vec<(Arc<str>, io::Result<String>)> = paths
            .iter()
            .map(|path| {
                let shown = path
                    .strip_prefix(&self.directory)
                    .unwrap_or(path)
                    .display()
                    .to_string();
                (shown.into(), read(path))
            })
            .collect();
        self.store.change(Source::Folder, |parts| {
            let there: BTreeSet<&str> = texts.iter().map(|(name, _)| &**name).collect();
            parts.retain(|name| there.contains(name));
            for (name, text) in &texts {
                match text {
                    Ok(text) => parts.text(name, text),
                    Err(error) => parts.unreadable(name, error),
                }
            }
            parts.listed();
        });
        Ok(())
    }

    /// Watches the directory: every change, after a short quiet time, becomes the receiver's value.
    ///
    /// The watch ends when every receiver is gone. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The platform's file notification cannot be set up.
    pub fn watch(mut self) -> notify::Result<watch::Receiver<Arc<ConfigSet>>> {
        // One waiting event says all there is to say: read again.
        let (changed, mut changes) = mpsc::channel::<()>(1);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                if event.as_ref().is_ok_and(|event| event.kind.is_access()) {
                    return;
                }
                if changed.try_send(()).is_err() {
                    tracing::trace!("a change is already waiting to be seen");
                }
            })?;
        watcher.watch(&self.directory, RecursiveMode::Recursive)?;
        // Whatever changed between reading and watching.
        self.refresh();
        let receiver = self.store.subscribe();
        tokio::spawn(async move {
            // Owned here, so that it lives as long as somebody listens.
            let _watcher = watcher;
            loop {
                // Both branches may be dropped at any time: recv and closed lose nothing.
                tokio::select! {
                    change = changes.recv() => if change.is_none() { return },
                    () = self.store.unwatched() => return,
                }
                let limit = Instant::now() + DEBOUNCE_LIMIT;
                while Instant::now() < limit {
                    match tokio::time::timeout(DEBOUNCE, changes.recv()).await {
                        Ok(Some(())) => {}
                        Ok(None) => return,
                        Err(_) => break,
                    }
                }
                let read = tokio::task::spawn_blocking(move || {
                    self.refresh();
                    self
                });
                let Ok(folder) = read.await else {
                    tracing::error!("reading the configuration panicked; it is no longer watched");
                    return;
                };
                self = folder;
            }
        });
        Ok(receiver)
    }
}

fn list(directory: &Path, depth: usize, paths: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        // Hidden files are editors' and Kubernetes' (`..data` behind mounted ConfigMaps).
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        // Follows links; a dangling one is no file.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            if depth < DEPTH_LIMIT {
                // A directory that vanished meanwhile has no files.
                drop(list(&path, depth + 1, paths));
            }
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml")
        {
            if paths.len() >= FILE_LIMIT {
                return Err(io::Error::other(format!("more than {FILE_LIMIT} files")));
            }
            paths.insert(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> io::Result<String> {
    let length = fs::metadata(path)?.len();
    if length > FILE_LIMIT_BYTES {
        return Err(io::Error::other(format!(
            "{length} bytes are more than {FILE_LIMIT_BYTES}"
        )));
    }
    fs::read_to_string(path)
}

#[cfg(test)]
mod tests;
