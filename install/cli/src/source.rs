//! The files a command is given.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// A file larger than this is refused.
const FILE_LIMIT_BYTES: u64 = 64 << 20;
/// More files than this are refused.
const FILE_LIMIT: usize = 20_000;
/// Directories nested deeper than this are refused: symbolic links may form cycles.
const DEPTH_LIMIT: usize = 16;

/// The texts of files, and of all `*.yaml`, `*.yml` and `*.json` below directories; `-` is standard
/// input. By name, in order.
pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            list(path, 0, &mut files)?;
        } else {
            files.push(path.clone());
        }
    }
    files
        .iter()
        .map(|path| Ok((path.display().to_string(), text(path)?)))
        .collect()
}

fn list(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    anyhow::ensure!(
        depth <= DEPTH_LIMIT,
        "{} is nested too deeply",
        directory.display()
    );
    let mut entries = std::fs::read_dir(directory)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if path.is_dir() {
            list(&path, depth + 1, files)?;
        } else if path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension == *known)
        }) {
            anyhow::ensure!(files.len() < FILE_LIMIT, "more than {FILE_LIMIT} files");
            files.push(path);
        }
    }
    Ok(())
}

fn text(path: &Path) -> anyhow::Result<String> {
    let context = || format!("cannot read {}", path.display());
    let reader: Box<dyn std::io::Read> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).with_context(context)?)
    };
    let mut text = String::new();
    reader
        .take(FILE_LIMIT_BYTES + 1)
        .read_to_string(&mut text)
        .with_context(context)?;
    anyhow::ensure!(
        text.len() as u64 <= FILE_LIMIT_BYTES,
        "{} is larger than {FILE_LIMIT_BYTES} bytes",
        path.display()
    );
    Ok(text)
}
