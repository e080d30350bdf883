//! Resources from files: a DiscoveryResponse in YAML or JSON, read again when the file changes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
use lateen_protocols::json;

use super::{Kind, Resource, Sink, Update};
use crate::secret::Source;

/// How often the file's times are looked at; also works where inotify does not (network file systems).
const POLL: Duration = Duration::from_millis(500);
/// Bounds what is read.
const MAX_BYTES: u64 = 64 << 20;

/// Follows one file for one kind of resource; runs until dropped.
pub async fn follow(sink: Arc<dyn Sink>, kind: Kind, path: PathBuf, source: Source) {
    let mut last = None;
    let mut ticks = tokio::time::interval(POLL);
    loop {
        ticks.tick().await;
        let stamp = stamp(&path);
        if stamp.is_some() && stamp != last {
            last = stamp;
            match read(&path, kind, &source) {
                Ok(update) => {
                    if let Some(error) = sink.apply(update).error {
                        tracing::warn!(path = %path.display(), error, "resources of the file were refused");
                    }
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), error, "keeping what the file said before")
                }
            }
        }
    }
}

/// Changes when the file is replaced or written to.
fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

/// Reads the file as one whole update.
fn read(path: &Path, kind: Kind, source: &Source) -> Result<Update, String> {
    let failed = |e: io::Error| e.to_string();
    if fs::metadata(path).map_err(failed)?.len() > MAX_BYTES {
        return Err(format!("larger than {MAX_BYTES} bytes"));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    let response: DiscoveryResponse = json::from_yaml(&text).map_err(|e| e.to_string())?;
    let version = response.version_info;
    let resources = response.resources.into_iter().map(|body| Resource {
        name: None,
        version: version.clone(),
        body,
    });
    Ok(Update {
        kind,
        source: source.clone(),
        resources: resources.collect(),
        version,
        removed: Vec::new(),
        complete: kind.is_wildcard(),
    })
}
