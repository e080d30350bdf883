//! Translation at the command line: what a node would get ([`translate`](crate::translate)), and what becomes
//! of calls there ([`walk`]). Reads files, prints JSON, serves nothing.
//!
//! The rows of `simulate` and `routes` are those of conformance collections: configuration, a proxy, and what
//! is asked of it ([`rows`]).

mod convert;
mod rows;
mod walk;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use lateen_config::{ConfigSet, Object, Problem, parse_file, validate};
use lateen_protocols::json::{JsonError, from_yaml, to_json};
use prost::{Message, Name};
use serde_json::{Value, json};

use crate::model::{Node, NodeError, Snapshot};
use crate::translate::translate;

pub use self::convert::GatewayApiArgs;
use self::rows::{RouteRow, SimulationRow};

/// Largest file read, in bytes: as the folder source.
const FILE_LIMIT_BYTES: u64 = 64 << 20;

/// What the program can do beside serving.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Tool {
    /// Print what a node would get, as Envoy's JSON.
    Translate(TranslateArgs),
    /// Walk calls through what proxies would get: a row of JSON a line, a line of JSON for each.
    Simulate(RowsArgs),
    /// Print the clusters of virtual hosts of one route configuration: rows as `simulate`.
    Routes(RowsArgs),
    /// Print what Gateway API objects and Ingresses come to, as YAML: Istio's objects, and statuses.
    GatewayApi(GatewayApiArgs),
}

/// Flags of `translate`.
#[derive(Clone, Debug, clap::Args)]
pub struct TranslateArgs {
    /// `TYPE~IP~NAME.NAMESPACE~DOMAIN`, as the proxy would say it.
    #[arg(long, value_name = "ID")]
    pub node: String,
    /// The node's metadata, YAML or JSON: INTERCEPTION_MODE, LABELS and so on.
    #[arg(long, value_name = "YAML", default_value = "{}")]
    pub metadata: String,
    /// Which program the node runs: `envoy` gets stock filters only.
    #[arg(long, value_parser = ["envoy", "lateen"], default_value = "envoy")]
    pub agent: String,
    /// Configuration: YAML files, or folders of them.
    #[arg(short, long = "file", value_name = "FILE", required = true, num_args = 1..)]
    pub files: Vec<PathBuf>,
    /// Services and workloads, if they are kept apart: YAML files, or folders of them.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub registry: Vec<PathBuf>,
}

/// Flags of `simulate` and `routes`.
#[derive(Clone, Debug, clap::Args)]
pub struct RowsArgs {
    /// File of rows; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    pub jsonl: PathBuf,
}

/// Why a tool has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A file that cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// Which.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file larger than [`FILE_LIMIT_BYTES`].
    #[error("{0} is larger than 64 MiB")]
    TooLarge(PathBuf),
    /// Objects with errors; they have been listed.
    #[error("errors in the configuration: {0}; nothing is translated")]
    Invalid(usize),
    /// Objects with errors; they have been listed, and what else there is has been done.
    #[error("errors in the configuration: {0}; Pilot would leave out what they are in")]
    Doubtful(usize),
    /// The node's id or metadata.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The node's metadata is not YAML, or a resource is not to be written.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// A row that is none.
    #[error("{file}:{line}: not a row")]
    Row {
        /// File of the row.
        file: PathBuf,
        /// Its line.
        line: usize,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// What is to be printed is not for YAML.
    #[error("cannot be written as YAML")]
    Yaml(#[from] serde_saphyr::ser::Error),
    /// Nobody reads what is printed.
    #[error("cannot write")]
    Write(#[from] std::io::Error),
}

impl Tool {
    /// Does it: answers to `out`, what is wrong with the configuration to `complaints`.
    ///
    /// # Errors
    /// Files or rows that cannot be read, configuration with errors, a node that is none.
    pub fn run(&self, out: &mut impl Write, complaints: &mut impl Write) -> Result<(), ToolError> {
        match self {
            Self::Translate(args) => {
                let resources = args.run(complaints)?;
                serde_json::to_writer_pretty(&mut *out, &resources)
                    .map_err(std::io::Error::from)?;
                writeln!(out)?;
            }
            Self::Simulate(args) => args.each(out, |row: SimulationRow| row.run())?,
            Self::Routes(args) => args.each(out, |row: RouteRow| row.run())?,
            Self::GatewayApi(args) => args.run(out, complaints)?,
        }
        Ok(())
    }
}

impl TranslateArgs {
    fn run(&self, complaints: &mut impl Write) -> Result<Value, ToolError> {
        let mut node: core::Node = from_yaml(&format!("metadata: {}", self.metadata))?;
        node.id.clone_from(&self.node);
        node.user_agent_name.clone_from(&self.agent);
        let node = Node::parse(Some(&node))?;

        let objects = objects(self.files.iter().chain(&self.registry), complaints)?;
        let resources = translate(&snapshot(objects), &node);
        Ok(json!({
            "listeners": list(resources.listeners.values())?,
            "routes": list(resources.routes.values())?,
            "extensions": list(resources.extensions.values())?,
            "clusters": list(resources.clusters.values())?,
            "endpoints": list(resources.endpoints.values())?,
            "conflicts": resources.conflicts,
        }))
    }
}

impl RowsArgs {
    fn each<R: serde::de::DeserializeOwned>(
        &self,
        out: &mut impl Write,
        answer: impl Fn(R) -> Value,
    ) -> Result<(), ToolError> {
        let fail = |source| ToolError::Read {
            file: self.jsonl.clone(),
            source,
        };
        let reader: Box<dyn std::io::Read> = if self.jsonl.as_os_str() == "-" {
            Box::new(std::io::stdin())
        } else {
            Box::new(std::fs::File::open(&self.jsonl).map_err(fail)?)
        };
        for (index, line) in BufReader::new(reader).lines().enumerate() {
            let line = line.map_err(fail)?;
            if line.trim().is_empty() {
                continue;
            }
            let row = serde_json::from_str(&line).map_err(|source| ToolError::Row {
                file: self.jsonl.clone(),
                line: index + 1,
                source,
            })?;
            writeln!(out, "{}", answer(row))?;
        }
        Ok(())
    }
}

/// All objects of files and folders, if none is wrong; what is doubtful is said.
fn objects<'a>(
    paths: impl Iterator<Item = &'a PathBuf>,
    complaints: &mut impl Write,
) -> Result<Vec<Object>, ToolError> {
    match all_objects(paths, complaints)? {
        (objects, 0) => Ok(objects),
        (_, errors) => Err(ToolError::Invalid(errors)),
    }
}

/// All objects of files and folders that can be read, and how many errors there are in them.
fn all_objects<'a>(
    paths: impl Iterator<Item = &'a PathBuf>,
    complaints: &mut impl Write,
) -> Result<(Vec<Object>, usize), ToolError> {
    let mut files = BTreeSet::new();
    for path in paths {
        yaml_files(path, &mut files)?;
    }
    let mut objects = Vec::new();
    let mut errors = 0;
    for file in &files {
        let (parsed, mut problems) = parse_file(&file.display().to_string(), &read(file)?);
        problems.extend(parsed.iter().flat_map(validate));
        for problem in problems {
            writeln!(complaints, "{problem}")?;
            errors += usize::from(Problem::is_error(&problem));
        }
        objects.extend(parsed);
    }
    Ok((objects, errors))
}

fn snapshot(objects: Vec<Object>) -> Snapshot {
    Snapshot::build(&ConfigSet {
        objects: objects.into_iter().map(Arc::new).collect(),
        ..Default::default()
    })
}

fn list<'a, M: Message + Name + 'a>(
    all: impl Iterator<Item = &'a M>,
) -> Result<Vec<Value>, JsonError> {
    all.map(to_json).collect()
}

fn read(file: &Path) -> Result<String, ToolError> {
    let fail = |source| ToolError::Read {
        file: file.to_owned(),
        source,
    };
    if std::fs::metadata(file).map_err(fail)?.len() > FILE_LIMIT_BYTES {
        return Err(ToolError::TooLarge(file.to_owned()));
    }
    std::fs::read_to_string(file).map_err(fail)
}

/// The file, or the YAML files below the folder.
fn yaml_files(path: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), ToolError> {
    let fail = |source| ToolError::Read {
        file: path.to_owned(),
        source,
    };
    if !path.is_dir() {
        files.insert(path.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?.path();
        // What is linked to might lead back here.
        if entry.is_dir() && !entry.is_symlink() {
            yaml_files(&entry, files)?;
        } else if entry
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml")
        {
            files.insert(entry);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
