//! Configuration objects as every source gives them, and what is wrong with them.

use std::{collections::BTreeMap, fmt, sync::Arc};

use lateen_config::{Origin, Severity};
use lateen_engine::Language;
use serde::Serialize;
use serde_json::Value as Json;

/// The annotation that names the language of an object's expressions: CEXL (usual), CEL or COMPAT.
pub const LANGUAGE: &str = "policy.istio.io/lang";

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// `rule`, `handler`, `instance`, `attributemanifest` or a legacy kind.
    pub kind: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl Key {
    /// `NAME.KIND.NAMESPACE`, the name that adapters and callers see.
    pub fn full_name(&self) -> Arc<str> {
        Arc::from(format!("{}.{}.{}", self.name, self.kind, self.namespace))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// An object as written.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name.
    pub key: Key,
    /// `metadata.annotations`.
    pub annotations: Arc<BTreeMap<String, String>>,
    /// Its spec; null when there is none.
    pub spec: Arc<Json>,
    /// Where in which file, if it comes from one.
    pub origin: Option<Origin>,
}

impl Source {
    /// Whether both say the same, wherever they are written.
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.key == other.key && self.spec == other.spec && self.annotations == other.annotations
    }

    /// `FILE:LINE` of `field` of its spec; empty when it comes from no file.
    pub fn place(&self, field: &str) -> String {
        let path = if field.is_empty() {
            "spec".to_owned()
        } else {
            format!("spec.{field}")
        };
        match &self.origin {
            Some(origin) => format!("{}:{}", origin.file, origin.line_of(&path)),
            None => String::new(),
        }
    }

    /// A problem of this object at `field` of its spec.
    pub fn problem(&self, severity: Severity, field: &str, reason: impl Into<String>) -> Problem {
        Problem {
            object: self.key.to_string(),
            place: self.place(field),
            field: field.to_owned(),
            reason: reason.into(),
            is_refused: severity == Severity::Error,
            is_held: false,
        }
    }

    /// The language of the object's expressions.
    ///
    /// # Errors
    /// The annotation names none.
    pub fn language(&self) -> Result<Language, Fault> {
        match self.annotations.get(LANGUAGE) {
            None => Ok(Language::default()),
            Some(text) => text
                .parse()
                .map_err(|reason| Fault::new("", format!("{LANGUAGE}: {reason}"))),
        }
    }

    /// An error of this object at `field`.
    pub fn error(&self, field: &str, reason: impl Into<String>) -> Problem {
        self.problem(Severity::Error, field, reason)
    }
}

/// What is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// `KIND NAMESPACE/NAME`; empty when a file could not be read so far.
    pub object: String,
    /// `FILE:LINE`; empty when it comes from no file.
    pub place: String,
    /// Path within the spec.
    pub field: String,
    /// What is wrong, and what to do about it.
    pub reason: String,
    /// Whether the object is refused; otherwise it works, but doubtfully.
    pub is_refused: bool,
    /// Whether a former version of it is in force.
    pub is_held: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.place, &self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)?;
        if self.is_held {
            f.write_str(" (the last good version stays in force)")?;
        }
        Ok(())
    }
}

/// What is wrong with one field, before it is known whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Path within the spec.
    pub field: String,
    /// What is wrong.
    pub reason: String,
}

impl Fault {
    /// At `field`, `reason`.
    pub fn new(field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            field: field.into(),
            reason: reason.to_string(),
        }
    }
}
