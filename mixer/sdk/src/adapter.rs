//! An adapter: knows how to check and build handlers of its kind.

use std::sync::Arc;

use lateen_engine::ValueType;
use serde_json::Value as Json;

use crate::{env::Env, handler::Handler, template::Template};

/// Builds handlers of one kind.
pub trait Adapter: Send + Sync {
    /// Its name and what it can do.
    fn info(&self) -> Info;

    /// Everything that is wrong with `candidate`, without touching the world: no file, no socket, no task.
    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String>;

    /// Makes a handler. Called only with what [`Adapter::validate`] finds nothing wrong with. The
    /// handler is closed by dropping it; tasks spawned with `env` end then by themselves.
    ///
    /// # Errors
    /// When the world is not as the parameters say: a file cannot be opened, a metric is defined elsewhere.
    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError>;
}

/// What an adapter says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// As `compiledAdapter` and the legacy kinds spell it.
    pub name: &'static str,
    /// One sentence for the operator.
    pub description: &'static str,
    /// The templates whose instances it takes.
    pub templates: &'static [&'static Template],
}

/// A handler as configured, and the instances that rules send to it.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Full name of the handler: `NAME.handler.NAMESPACE`, or with the kind of a legacy object.
    pub name: &'a str,
    /// Its parameters, as written.
    pub params: &'a Json,
    /// The instances it will get, by full name.
    pub instances: &'a [InstanceType],
}

/// The types of an instance's expressions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceType {
    /// Full name of the instance.
    pub name: Arc<str>,
    /// Name of its template.
    pub template: &'static str,
    /// Path of each field that has an expression (`value`, `dimensions.source`, `subject.user`) and its type.
    pub fields: Vec<(Arc<str>, ValueType)>,
}

impl InstanceType {
    /// The type of the field at `path`.
    pub fn field(&self, path: &str) -> Option<ValueType> {
        self.fields
            .iter()
            .find(|(p, _)| **p == *path)
            .map(|(_, t)| *t)
    }

    /// Names and types in the map at `path`.
    pub fn map<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a str, ValueType)> {
        self.fields
            .iter()
            .filter_map(move |(p, t)| Some((p.strip_prefix(path)?.strip_prefix('.')?, *t)))
    }
}

/// A handler cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BuildError(pub String);
