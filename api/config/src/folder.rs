//! A watched directory of YAML files, as one set of good objects.
//!
//! Bad input never replaces good state: a file that is no YAML keeps all its last good objects, an
//! object that is refused keeps its own last good version, and a subset that accepted routes still
//! name outlives the DestinationRule that defined it. Every such case is listed as a [`Problem`]
//! until it is mended.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::object::{Key, Object, Spec};
use crate::parse::parse_file;
use crate::problem::{Problem, Severity};
use crate::reference::{Subsets, check_references, undefined_subsets};
use crate::validate::validate;

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

/// The good objects of a directory at one moment.
#[derive(Clone, Debug, Default)]
pub struct ConfigSet {
    /// By file name, then by line.
    pub objects: Vec<Arc<Object>>,
    /// Everything wrong at this moment.
    pub problems: Vec<Problem>,
    /// Counts up with every change of the above.
    pub generation: u64,
}

/// A directory of YAML files. Owner of the last good state; [`Folder::refresh`] reads again.
#[derive(Debug)]
pub struct Folder {
    directory: PathBuf,
    files: BTreeMap<PathBuf, File>,
    current: Arc<ConfigSet>,
}

#[derive(Debug, Default)]
struct File {
    text: String,
    /// Objects that parse and are valid, or were before their present text.
    good: Vec<Arc<Object>>,
    problems: Vec<Problem>,
}

impl Folder {
    /// Reads a directory and all below it.
    ///
    /// # Errors
    /// The directory cannot be listed. Files that cannot be read are problems, not errors.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let mut folder = Self {
            directory: directory.into(),
            files: BTreeMap::new(),
            current: Arc::default(),
        };
        folder.try_refresh()?;
        Ok(folder)
    }

    /// The set as last read.
    #[must_use]
    pub fn current(&self) -> Arc<ConfigSet> {
        self.current.clone()
    }

    /// Reads what has changed. When the directory cannot be listed the last set stays.
    pub fn refresh(&mut self) -> Arc<ConfigSet> {
        if let Err(error) = self.try_refresh() {
            tracing::warn!(directory = %self.directory.display(), %error, "cannot list; the last good configuration stays");
        }
        self.current()
    }

    fn try_refresh(&mut self) -> io::Result<()> {
        let mut paths = BTreeSet::new();
        list(&self.directory, 0, &mut paths)?;
        self.files.retain(|path, _| paths.contains(path));
        for path in paths {
            let shown = path
                .strip_prefix(&self.directory)
                .unwrap_or(&path)
                .display()
                .to_string();
            let file = self.files.entry(path.clone()).or_default();
            match read(&path) {
                Ok(text) => file.take(&shown, text),
                Err(error) => {
                    file.text.clear();
                    file.problems = vec![Problem {
                        file: shown.as_str().into(),
                        line: 1,
                        severity: Severity::Error,
                        key: None,
                        field: String::new(),
                        reason: format!("cannot be read: {error}"),
                        hint: "the last good version of this file stays in effect".into(),
                    }];
                }
            }
        }
        let next = compose(&self.files, &self.current);
        let same = next.problems == self.current.problems
            && next.objects.len() == self.current.objects.len()
            && next
                .objects
                .iter()
                .zip(&self.current.objects)
                .all(|(a, b)| Arc::ptr_eq(a, b) || a == b);
        if !same || self.current.generation == 0 {
            self.current = Arc::new(ConfigSet {
                generation: self.current.generation + 1,
                ..next
            });
        }
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
        let (sender, receiver) = watch::channel(self.current());
        tokio::spawn(async move {
            // Owned here, so that it lives as long as somebody listens.
            let _watcher = watcher;
            loop {
                // Both branches may be dropped at any time: recv and closed lose nothing.
                tokio::select! {
                    change = changes.recv() => if change.is_none() { return },
                    () = sender.closed() => return,
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
                    let set = self.refresh();
                    (self, set)
                });
                let Ok((folder, set)) = read.await else {
                    tracing::error!("reading the configuration panicked; it is no longer watched");
                    return;
                };
                self = folder;
                sender.send_if_modified(|last| {
                    let changed = last.generation != set.generation;
                    *last = set;
                    changed
                });
            }
        });
        Ok(receiver)
    }
}

impl File {
    /// Takes the file's text: good objects replace their predecessors, bad ones do not.
    fn take(&mut self, name: &str, text: String) {
        if text == self.text && !(self.good.is_empty() && self.problems.is_empty()) {
            return;
        }
        let (objects, mut problems) = parse_file(name, &text);
        self.text = text;
        let no_yaml = objects.is_empty()
            && problems
                .iter()
                .any(|problem| problem.key.is_none() && problem.is_error());
        if no_yaml {
            self.problems = problems;
            return;
        }
        let old = std::mem::take(&mut self.good);
        let last_good = |key: &Key| old.iter().find(|object| object.key == *key).cloned();
        for object in objects {
            let found = validate(&object);
            if found.iter().any(Problem::is_error) {
                self.good.extend(last_good(&object.key));
            } else {
                // The same object keeps its identity, so that "nothing changed" is cheap to see.
                let kept = last_good(&object.key).filter(|kept| **kept == object);
                self.good.push(kept.unwrap_or_else(|| Arc::new(object)));
            }
            problems.extend(found);
        }
        // Objects whose document says who they are but not properly what.
        let broken: BTreeSet<&Key> = problems
            .iter()
            .filter(|problem| problem.is_error())
            .filter_map(|problem| problem.key.as_ref())
            .collect();
        let missing: Vec<Arc<Object>> = broken
            .into_iter()
            .filter(|key| !self.good.iter().any(|object| object.key == **key))
            .filter_map(last_good)
            .collect();
        self.good.extend(missing);
        self.problems = problems;
    }
}

/// One set of all files: the first of several with one key wins; routes to undefined subsets are
/// not let in; subsets still in use are not let go.
fn compose(files: &BTreeMap<PathBuf, File>, last: &ConfigSet) -> ConfigSet {
    let mut problems: Vec<Problem> = files
        .values()
        .flat_map(|file| file.problems.iter().cloned())
        .collect();
    let mut objects: Vec<Arc<Object>> = Vec::new();
    let mut seen: BTreeMap<&Key, &Arc<Object>> = BTreeMap::new();
    for object in files.values().flat_map(|file| &file.good) {
        match seen.get(&object.key) {
            Some(first) => problems.push(object.problem(
                Severity::Error,
                "metadata.name",
                format!(
                    "already defined at {}:{}, which wins",
                    first.origin.file, first.origin.line
                ),
                "",
            )),
            None => {
                seen.insert(&object.key, object);
                objects.push(object.clone());
            }
        }
    }

    let before: BTreeMap<&Key, &Arc<Object>> = last
        .objects
        .iter()
        .map(|object| (&object.key, object))
        .collect();
    let subsets = Subsets::of(objects.iter().map(AsRef::as_ref));
    let mut kept_rules: BTreeMap<Key, Arc<Object>> = BTreeMap::new();
    objects.retain_mut(|object| {
        let undefined = undefined_subsets(object, &subsets);
        if undefined.is_empty() {
            return true;
        }
        problems.extend(undefined);
        // Its last good version stays, with the DestinationRules it relies on.
        let Some(accepted) = before.get(&object.key) else {
            return false;
        };
        for problem in undefined_subsets(accepted, &subsets) {
            tracing::debug!(%problem, "subset still in use");
            for rule in last
                .objects
                .iter()
                .filter(|rule| matches!(rule.spec, Spec::DestinationRule(_)))
            {
                if undefined_subsets(accepted, &Subsets::of([rule.as_ref()])).len()
                    < undefined_subsets(accepted, &Subsets::default()).len()
                {
                    kept_rules.insert(rule.key.clone(), rule.clone());
                }
            }
        }
        *object = (*accepted).clone();
        true
    });
    for (key, rule) in kept_rules {
        problems.push(rule.problem(
            Severity::Warning,
            "",
            "changed or removed while routes still name its subsets; the last version stays until they do not",
            "",
        ));
        match objects.iter_mut().find(|object| object.key == key) {
            Some(object) => *object = rule,
            None => objects.push(rule),
        }
    }
    objects.sort_by(|a, b| (&a.origin.file, a.origin.line).cmp(&(&b.origin.file, b.origin.line)));

    let plain: Vec<Object> = objects.iter().map(|object| (**object).clone()).collect();
    problems.extend(check_references(&plain));
    problems.sort();
    problems.dedup();
    ConfigSet {
        objects,
        problems,
        generation: last.generation,
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
