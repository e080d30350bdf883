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
const POLL: Duration = Duration::from_millis(100);
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

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::xds::{Outcome, Wanted};

    #[derive(Debug)]
    struct Told(mpsc::UnboundedSender<Update>);

    impl Sink for Told {
        fn apply(&self, update: Update) -> Outcome {
            self.0.send(update).unwrap();
            Outcome::default()
        }

        fn wanted(&self) -> watch::Receiver<Wanted> {
            watch::Sender::new(Wanted::default()).subscribe()
        }

        fn connected(&self, _: &Source, _: bool) {}
    }

    const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

    #[tokio::test]
    async fn a_file_is_one_whole_update_and_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cds.yaml");
        let one =
            format!("{{ version_info: one, resources: [ {{ '@type': {CLUSTER}, name: a }} ] }}");
        fs::write(&path, one).unwrap();
        let (sender, mut updates) = mpsc::unbounded_channel();
        let follow = follow(
            Arc::new(Told(sender)),
            Kind::Cluster,
            path.clone(),
            Source::Ads,
        );
        let following = tokio::spawn(follow);
        let first = updates.recv().await.unwrap();
        assert_eq!(
            (
                first.version.as_str(),
                first.resources.len(),
                first.complete
            ),
            ("one", 1, true)
        );

        fs::write(&path, "version_info: [").unwrap();
        let error = read(&path, Kind::Cluster, &Source::Ads).unwrap_err();
        assert!(error.contains("not valid YAML"), "{error}");
        fs::write(&path, "{ version_info: number two }").unwrap();
        assert_eq!(updates.recv().await.unwrap().version, "number two");
        following.abort();
    }
}
