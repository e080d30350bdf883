//! What is wrong with a configuration, said so that its author can mend it.

use std::fmt;
use std::sync::Arc;

use crate::object::Key;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The object works, but something in it is ignored or doubtful.
    Warning,
    /// The object is refused; its last good version, if any, stays.
    Error,
}

/// One thing wrong with a file or an object.
///
/// Prints as `FILE:LINE: KIND NAMESPACE/NAME: FIELD: REASON (HINT)`; without `:LINE` if it is in no file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// The file, as it was named to us.
    pub file: Arc<str>,
    /// Line in the file, from 1; 0 if it is in no file.
    pub line: u32,
    /// Whether the object is refused.
    pub severity: Severity,
    /// The object, if the document says which.
    pub key: Option<Key>,
    /// Path to the field, such as `spec.http[0].route[1].weight`; empty for the whole object.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to do about it; may be empty.
    pub hint: String,
}

impl Problem {
    /// Whether the object is refused.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// Field, reason and hint, without the object: for who has named it already.
    #[must_use]
    pub fn what(&self) -> What<'_> {
        What(self)
    }
}

/// See [`Problem::what`].
#[derive(Debug)]
pub struct What<'a>(&'a Problem);

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem {
            field,
            reason,
            hint,
            ..
        } = self.0;
        if !field.is_empty() {
            write!(f, "{field}: ")?;
        }
        f.write_str(reason)?;
        if !hint.is_empty() {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: ", self.file)?;
        } else {
            write!(f, "{}:{}: ", self.file, self.line)?;
        }
        if let Some(key) = &self.key {
            write!(f, "{} {}/{}: ", key.kind, key.namespace, key.name)?;
        }
        self.what().fmt(f)
    }
}
