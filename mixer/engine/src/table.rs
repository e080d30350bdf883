//! The attributes that exist: name, type, and the slot that holds the value in a bag.

use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use lateen_protocols::dictionary::GLOBAL_WORDS;
use serde::Deserialize;

use crate::dictionary::WordMap;
use crate::text::Text;
use crate::value::ValueType;
use crate::vocabulary;

/// Most attributes a table may have.
pub(crate) const MAX_ATTRIBUTES: usize = 4096;
/// Longest attribute name, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// Where a bag keeps an attribute's value. Of use with bags of the table it came from only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u16);

impl Slot {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The declared attributes, made once per configuration and shared by clones. Expressions compiled
/// against one table work on bags of that table only; [`AttributeTable::same`] tells.
#[derive(Clone)]
pub struct AttributeTable(Arc<Inner>);

struct Inner {
    id: u64,
    attributes: Vec<(Text, ValueType)>, // by slot; sorted by name
    by_name: WordMap<Text, Slot>,
    by_word: Vec<Option<Slot>>, // by index in the global dictionary
}

/// A manifest that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The spec does not have the shape of an attributemanifest.
    #[error("not an attribute manifest: {0}")]
    Shape(String),
    /// The name is not dotted identifiers, so no expression could name it.
    #[error("'{0}' is not an attribute name; use letters, digits, '_' and '.'")]
    Name(String),
    /// No such type.
    #[error(
        "attribute '{name}' has unknown type '{value_type}'; use STRING, INT64, DOUBLE, BOOL, TIMESTAMP, IP_ADDRESS, EMAIL_ADDRESS, URI, DNS_NAME, DURATION or STRING_MAP"
    )]
    Type {
        /// The attribute.
        name: String,
        /// What the manifest says.
        value_type: String,
    },
    /// Two manifests disagree.
    #[error("attribute '{name}' is declared {first} and {second}")]
    Conflict {
        /// The attribute.
        name: String,
        /// Type declared first.
        first: ValueType,
        /// Type declared next.
        second: ValueType,
    },
    /// More attributes than a table may hold.
    #[error("more than {MAX_ATTRIBUTES} attributes")]
    TooMany,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    attributes: BTreeMap<String, AttributeInfo>,
}

#[derive(Deserialize)]
struct AttributeInfo {
    #[serde(rename = "valueType", alias = "value_type")]
    value_type: Option<serde_json::Value>,
}

static DEFAULT: LazyLock<AttributeTable> = LazyLock::new(|| {
    AttributeTable::new(vocabulary::DEFAULT.iter().copied())
        .expect("the built-in vocabulary is valid")
});

impl AttributeTable {
    /// A table of exactly these attributes.
    ///
    /// # Errors
    /// A name is no attribute name, or declared with two types.
    pub fn new<N: AsRef<str>>(
        attributes: impl IntoIterator<Item = (N, ValueType)>,
    ) -> Result<AttributeTable, ManifestError> {
        let mut all = BTreeMap::new();
        declare(&mut all, attributes)?;
        AttributeTable::build(all)
    }

    /// The built-in vocabulary: attributes of Istio 1.4 and 1.0.
    pub fn default_vocabulary() -> AttributeTable {
        DEFAULT.clone()
    }

    /// The built-in vocabulary with the `spec` of each attributemanifest on top:
    /// `{attributes: {name: {valueType: STRING}}}`. Declaring an attribute again with the same type is
    /// allowed. A manifest is taken whole or not at all; those refused are told with their position.
    pub fn from_manifests<'a>(
        specs: impl IntoIterator<Item = &'a serde_json::Value>,
    ) -> (AttributeTable, Vec<(usize, ManifestError)>) {
        let mut refused = Vec::new();
        let mut all: BTreeMap<String, ValueType> = vocabulary::DEFAULT
            .iter()
            .map(|(n, t)| ((*n).to_owned(), *t))
            .collect();
        for (position, spec) in specs.into_iter().enumerate() {
            let mut tentative = all.clone();
            match manifest(spec).and_then(|list| declare(&mut tentative, list)) {
                Ok(()) => all = tentative,
                Err(error) => refused.push((position, error)),
            }
        }
        // Everything in `all` has passed `declare`, which is all that `build` asks for.
        (
            AttributeTable::build(all).unwrap_or_else(|_| DEFAULT.clone()),
            refused,
        )
    }

    fn build(all: BTreeMap<String, ValueType>) -> Result<AttributeTable, ManifestError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let attributes: Vec<_> = all.into_iter().map(|(n, t)| (Text::from(n), t)).collect();
        let mut by_name = WordMap::default();
        for (index, (name, _)) in attributes.iter().enumerate() {
            let slot = Slot(u16::try_from(index).map_err(|_| ManifestError::TooMany)?);
            by_name.insert(name.clone(), slot);
        }
        let by_word = GLOBAL_WORDS
            .iter()
            .map(|word| by_name.get(*word).copied())
            .collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(AttributeTable(Arc::new(Inner {
            id,
            attributes,
            by_name,
            by_word,
        })))
    }

    /// The slot of an attribute.
    pub fn slot(&self, name: &str) -> Option<Slot> {
        self.0.by_name.get(name).copied()
    }

    /// Whether some attribute's name is `name`, a dot, and more.
    pub(crate) fn is_group(&self, name: &str) -> bool {
        // Names are sorted, and what begins with `name.` stands together.
        let prefix = format!("{name}.");
        let at = self
            .0
            .attributes
            .partition_point(|(n, _)| n.as_str() < prefix.as_str());
        let next = self.0.attributes.get(at);
        next.is_some_and(|(n, _)| n.starts_with(&prefix))
    }

    /// The slot of the attribute whose name is this word of the global dictionary.
    pub(crate) fn slot_of_word(&self, index: usize) -> Option<Slot> {
        self.0.by_word.get(index).copied().flatten()
    }

    /// The declared type of an attribute.
    pub fn value_type(&self, name: &str) -> Option<ValueType> {
        self.slot(name).map(|slot| self.type_of(slot))
    }

    /// The declared type of a slot.
    pub fn type_of(&self, slot: Slot) -> ValueType {
        self.0
            .attributes
            .get(slot.index())
            .map_or(ValueType::String, |(_, ty)| *ty)
    }

    /// The name of a slot.
    pub fn name(&self, slot: Slot) -> &Text {
        static NONE: Text = Text::EMPTY;
        self.0
            .attributes
            .get(slot.index())
            .map_or(&NONE, |(name, _)| name)
    }

    /// Every attribute, sorted by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, ValueType)> {
        self.0
            .attributes
            .iter()
            .map(|(name, ty)| (name.as_str(), *ty))
    }

    /// Every slot.
    pub(crate) fn slots(&self) -> impl ExactSizeIterator<Item = Slot> + use<> {
        // `build` has checked that the length fits.
        (0..u16::try_from(self.len()).unwrap_or(u16::MAX)).map(Slot)
    }

    /// Number of attributes.
    pub fn len(&self) -> usize {
        self.0.attributes.len()
    }

    /// Whether there is no attribute at all.
    pub fn is_empty(&self) -> bool {
        self.0.attributes.is_empty()
    }

    /// Whether slots of one are slots of the other: both are clones of one table.
    pub fn same(&self, other: &AttributeTable) -> bool {
        self.0.id == other.0.id
    }
}

impl fmt::Debug for AttributeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AttributeTable(#{}, {} attributes)",
            self.0.id,
            self.len()
        )
    }
}

fn manifest(spec: &serde_json::Value) -> Result<Vec<(String, ValueType)>, ManifestError> {
    let spec = Spec::deserialize(spec).map_err(|e| ManifestError::Shape(e.to_string()))?;
    spec.attributes
        .into_iter()
        .map(|(name, info)| {
            let written = info.value_type.unwrap_or(serde_json::Value::Null);
            let known = match &written {
                serde_json::Value::String(text) => text.parse().ok(),
                serde_json::Value::Number(n) => n
                    .as_i64()
                    .and_then(|n| ValueType::from_number(i32::try_from(n).ok()?)),
                _ => None,
            };
            match known {
                Some(ty) => Ok((name, ty)),
                None => Err(ManifestError::Type {
                    name,
                    value_type: written.as_str().map_or(written.to_string(), str::to_owned),
                }),
            }
        })
        .collect()
}

fn declare<N: AsRef<str>>(
    all: &mut BTreeMap<String, ValueType>,
    attributes: impl IntoIterator<Item = (N, ValueType)>,
) -> Result<(), ManifestError> {
    for (name, ty) in attributes {
        let name = name.as_ref();
        if !is_attribute_name(name) {
            return Err(ManifestError::Name(name.to_owned()));
        }
        match all.entry(name.to_owned()) {
            Entry::Vacant(entry) => {
                entry.insert(ty);
            }
            Entry::Occupied(entry) if *entry.get() == ty => {}
            Entry::Occupied(entry) => {
                return Err(ManifestError::Conflict {
                    name: name.to_owned(),
                    first: *entry.get(),
                    second: ty,
                });
            }
        }
        if all.len() > MAX_ATTRIBUTES {
            return Err(ManifestError::TooMany);
        }
    }
    Ok(())
}

fn is_attribute_name(name: &str) -> bool {
    name.len() <= MAX_NAME_BYTES
        && name.split('.').all(|part| {
            let mut chars = part.chars();
            chars.next().is_some_and(|c| c == '_' || c.is_alphabetic())
                && chars.all(|c| c == '_' || c.is_alphanumeric())
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn manifests_extend_the_vocabulary() {
        let good = json!({"attributes": {
            "my.attr": {"valueType": "DURATION", "description": "ours"},
            "source.ip": {"valueType": "IP_ADDRESS"},
        }});
        let conflict = json!({"attributes": {"source.ip": {"valueType": "STRING"}, "x": {"valueType": "BOOL"}}});
        let unknown = json!({"attributes": {"x": {"valueType": "STRUCT"}}});
        let (table, refused) = AttributeTable::from_manifests([&good, &conflict, &unknown]);
        assert_eq!(table.value_type("my.attr"), Some(ValueType::Duration));
        assert_eq!(table.value_type("source.ip"), Some(ValueType::IpAddress));
        assert_eq!(
            table.value_type("x"),
            None,
            "a refused manifest leaves nothing behind"
        );
        assert_eq!(
            refused,
            vec![
                (
                    1,
                    ManifestError::Conflict {
                        name: "source.ip".into(),
                        first: ValueType::IpAddress,
                        second: ValueType::String
                    }
                ),
                (
                    2,
                    ManifestError::Type {
                        name: "x".into(),
                        value_type: "STRUCT".into()
                    }
                ),
            ]
        );
    }

    #[test]
    fn names_are_dotted_identifiers() {
        for name in ["", ".", "a.", "a-b", "a b", "1a", "a.1"] {
            assert!(matches!(
                AttributeTable::new([(name, ValueType::Bool)]),
                Err(ManifestError::Name(_))
            ));
        }
    }
}
