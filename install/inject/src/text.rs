//! YAML text in and out. Documents that are not changed stay as they are written, comments and all.

use lateen_config::yaml;
use serde_json::Value;

use crate::{InjectError, Outcome, settings::Settings};

/// A text with sidecars.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    /// The text.
    pub text: String,
    /// What became of each document that holds an object: line it starts on, `Kind/name`, outcome.
    pub outcomes: Vec<(u32, String, Outcome)>,
}

/// Why a text is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It is not YAML.
    #[error("line {line}: not valid YAML: {reason}")]
    Syntax {
        /// Where.
        line: u32,
        /// Why.
        reason: String,
    },
    /// A workload cannot have a sidecar.
    #[error("line {line}: {object}")]
    Object {
        /// Where its document starts.
        line: u32,
        /// `Kind/name`.
        object: String,
        /// Why.
        #[source]
        source: InjectError,
    },
}

/// Adds sidecars to all workloads of a text of one or more documents.
///
/// # Errors
/// The text is not YAML, or a workload that should have a sidecar cannot.
pub fn inject_text(text: &str, settings: &Settings) -> Result<Injected, TextError> {
    let mut outcomes = Vec::new();
    let mut out = String::new();
    let mut line = 1;
    for (index, part) in split(text).into_iter().enumerate() {
        let lines = u32::try_from(part.lines().count()).unwrap_or(u32::MAX);
        let documents = yaml::documents(part).map_err(|error| TextError::Syntax {
            line: line + error.line.saturating_sub(1),
            reason: error.reason,
        })?;
        let mut written = None;
        if let Some(document) = documents.into_iter().next() {
            let at = line + document.line.saturating_sub(1);
            let mut object = document.value;
            let name = name(&object);
            let outcome =
                crate::inject(&mut object, settings).map_err(|source| TextError::Object {
                    line: at,
                    object: name.clone(),
                    source,
                })?;
            if matches!(outcome, Outcome::Injected(_)) {
                written = Some(write(&object));
            }
            outcomes.push((at, name, outcome));
        }
        if index > 0 {
            out += "---\n";
        }
        out += written.as_deref().unwrap_or(part);
        if !out.is_empty() && !out.ends_with('\n') {
            out.push('\n');
        }
        // The separator is a line, too.
        line += lines + 1;
    }
    Ok(Injected {
        text: out,
        outcomes,
    })
}

fn name(object: &Value) -> String {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str);
    let name = text("/metadata/name").or_else(|| text("/metadata/generateName"));
    format!("{}/{}", text("/kind").unwrap_or("?"), name.unwrap_or("?"))
}

/// The documents between lines `---`. Inside of a document every line of a text block is indented, so such a line is
/// always a separator.
fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        let next = at + line.len();
        if line.trim_end() == "---" || line.starts_with("--- #") {
            // One before everything separates nothing.
            if at != 0 {
                parts.push(text.get(start..at).unwrap_or_default());
            }
            start = next;
        }
        at = next;
    }
    parts.push(text.get(start..).unwrap_or_default());
    parts
}

/// Writes an object as YAML that every reader of YAML 1.1 and 1.2 reads the same.
pub fn write(object: &Value) -> String {
    let mut out = String::new();
    match object {
        Value::Object(map) if !map.is_empty() => write_block(object, 0, &mut out),
        other => {
            out += &scalar(other);
            out.push('\n');
        }
    }
    out
}

fn write_block(value: &Value, indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (index, (key, value)) in map.iter().enumerate() {
                // The first field stands where the caller has stopped.
                if index > 0 || out.is_empty() || out.ends_with('\n') {
                    *out += &pad;
                }
                *out += &text(key);
                out.push(':');
                write_value(value, indent, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                *out += &pad;
                *out += "- ";
                match item {
                    Value::Object(map) if !map.is_empty() => write_block(item, indent + 2, out),
                    // A list in a list: flow style, which is rare and short.
                    other => {
                        *out += &scalar(other);
                        out.push('\n');
                    }
                }
            }
        }
        _ => {}
    }
}

fn write_value(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            write_block(value, indent + 2, out);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            write_block(value, indent, out);
        }
        other => {
            out.push(' ');
            *out += &scalar(other);
            out.push('\n');
        }
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(string) => text(string),
        // JSON is YAML.
        other => other.to_string(),
    }
}

/// A string: bare only where no reader takes it for anything else.
fn text(string: &str) -> String {
    const WORDS: [&str; 11] = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf",
    ];
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
    let bare = string.starts_with(|first: char| first.is_ascii_alphabetic() || first == '/')
        && string.bytes().all(plain)
        && !WORDS.contains(&string.to_ascii_lowercase().as_str());
    if bare {
        return string.to_owned();
    }
    // A string of JSON is one of YAML, but YAML wants more characters escaped.
    let mut quoted = String::new();
    for char in Value::String(string.to_owned()).to_string().chars() {
        match char {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' => {
                quoted += &format!("\\u{:04x}", u32::from(char));
            }
            other => quoted.push(other),
        }
    }
    quoted
}
