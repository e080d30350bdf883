//! YAML text into documents whose every field knows its line.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

/// One YAML document.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Line it starts on, from 1.
    pub line: u32,
    /// What it says, as JSON.
    pub value: Value,
    /// Line of each field, by path (`spec.http[0].name`).
    pub lines: BTreeMap<String, u32>,
}

/// Why text is not YAML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct SyntaxError {
    /// Where, from 1.
    pub line: u32,
    /// What the YAML parser says.
    pub reason: String,
}

/// A text may hold so many documents,
pub const DOCUMENT_LIMIT: usize = 50_000;
/// and so many maps, lists and scalars in all of them.
pub const NODE_LIMIT: usize = 2_000_000;

/// Reads all documents of a text; empty ones are left out.
///
/// # Errors
/// The text is not YAML, or not such as JSON can say, or more than [`DOCUMENT_LIMIT`] and [`NODE_LIMIT`]
/// allow.
pub fn documents(text: &str) -> Result<Vec<Document>, SyntaxError> {
    // Templates and editors leave a byte order mark at times.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let options = serde_saphyr::options! {
        with_snippet: false,
        // YAML 1.2: `y`, `no` and `on` are strings. Where a flag is wanted, the error says so.
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_documents: DOCUMENT_LIMIT,
            max_nodes: NODE_LIMIT,
            // begin and end of each, and of each document
            max_events: 3 * NODE_LIMIT,
        },
    };
    let nodes: Vec<Spanned<Node>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| SyntaxError {
            line: error.location().map_or(1, |at| line_number(at.line())),
            reason: one_line(&error.to_string()),
        })?;
    Ok(nodes
        .into_iter()
        .map(|node| {
            let line = line_number(node.referenced.line());
            let mut lines = BTreeMap::new();
            let value = node.value.flatten(&mut String::new(), &mut lines);
            Document { line, value, lines }
        })
        .filter(|document| !document.value.is_null())
        .collect())
}

fn line_number(line: u64) -> u32 {
    u32::try_from(line).unwrap_or(u32::MAX).max(1)
}

fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// A YAML node; maps and lists keep the line of each entry.
#[derive(Debug)]
enum Node {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<Text>, Spanned<Node>)>),
}

impl Node {
    fn flatten(self, path: &mut String, lines: &mut BTreeMap<String, u32>) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(flag) => Value::Bool(flag),
            Self::Number(number) => Value::Number(number),
            Self::Text(text) => Value::String(text),
            Self::List(all) => Value::Array(
                all.into_iter()
                    .enumerate()
                    .map(|(index, node)| {
                        let length = path.len();
                        path.push_str(&format!("[{index}]"));
                        lines.insert(path.clone(), line_number(node.referenced.line()));
                        let value = node.value.flatten(path, lines);
                        path.truncate(length);
                        value
                    })
                    .collect(),
            ),
            Self::Map(all) => {
                let mut map = Map::new();
                for (key, node) in all {
                    let length = path.len();
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(&key.value.0);
                    lines.insert(path.clone(), line_number(key.referenced.line()));
                    let value = node.value.flatten(path, lines);
                    path.truncate(length);
                    map.insert(key.value.0, value);
                }
                Value::Object(map)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Node, E> {
        Ok(Node::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Node, E> {
        Ok(Node::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Node, E> {
        Ok(Node::Number(number.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Node, E> {
        Number::from_f64(number)
            .map(Node::Number)
            .ok_or_else(|| E::custom("infinite and undefined numbers cannot be configured"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Node, E> {
        Ok(Node::Text(text))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut all = Vec::new();
        while let Some(node) = seq.next_element()? {
            all.push(node);
        }
        Ok(Node::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut all = Vec::new();
        while let Some(key) = map.next_key_seed(KeySeed)? {
            all.push((key, map.next_value()?));
        }
        Ok(Node::Map(all))
    }
}

/// A map key: numbers and booleans are keys by their text (`8080: STRICT`).
#[derive(Debug)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Node::deserialize(deserializer)? {
            Node::Text(text) => Ok(Self(text)),
            Node::Number(number) => Ok(Self(number.to_string())),
            Node::Bool(flag) => Ok(Self(flag.to_string())),
            Node::Null | Node::List(_) | Node::Map(_) => {
                Err(serde::de::Error::custom("a map key must be a string"))
            }
        }
    }
}

struct KeySeed;

impl<'de> DeserializeSeed<'de> for KeySeed {
    type Value = Spanned<Text>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Spanned::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_knows_its_line() {
        let text = "# head\na: 1\nb:\n  c: [x, y]\n---\n---\nd:\n- e: true\n- f:\n  8080: z\n";
        let all = documents(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(
            all[0].value,
            serde_json::json!({"a": 1, "b": {"c": ["x", "y"]}})
        );
        assert_eq!(all[0].line, 2);
        assert_eq!(all[0].lines["b.c"], 4);
        assert_eq!(
            all[1].value,
            serde_json::json!({"d": [{"e": true}, {"f": null, "8080": "z"}]})
        );
        assert_eq!(all[1].line, 7);
        assert_eq!(all[1].lines["d[1].8080"], 10);
    }

    #[test]
    fn many_documents_are_read_and_too_many_are_not() {
        let text = "a: 1\n---\n".repeat(5_000);
        assert_eq!(documents(&text).unwrap().len(), 5_000);
        let text = "a: 1\n---\n".repeat(DOCUMENT_LIMIT + 1);
        assert!(documents(&text).is_err());
    }

    #[test]
    fn an_error_has_a_line() {
        let error = documents("a: 1\nb: [\nc: 2\n").unwrap_err();
        assert!(error.line >= 2, "{error:?}");
    }
}
