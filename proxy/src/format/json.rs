//! JSON log lines and bodies: objects whose leaves are literals or formats.

use std::io::Write;

use lateen_protocols::envoy::google::protobuf as pb;
use pb::value::Kind;

use super::{Command, Facts, Format, Part};
use crate::{config_error::ConfigError, proto::invalid};

/// A JSON log line: an object whose leaves are literals or formats; keys sorted.
#[derive(Debug)]
pub struct JsonFormat {
    root: Node,
    omit_empty: bool,
}

#[derive(Debug)]
enum Node {
    Literal(String),
    Command(Command),
    Text(Format),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl JsonFormat {
    /// Compiles Envoy's `json_format`.
    ///
    /// # Errors
    /// When a command is not known or not well formed.
    pub fn compile(format: &pb::Struct, omit_empty: bool) -> Result<JsonFormat, ConfigError> {
        Ok(JsonFormat {
            root: object(format, omit_empty, 0)?,
            omit_empty,
        })
    }

    /// Writes the object, without a line end.
    pub fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) {
        if !self.root.write(facts, self.omit_empty, out) {
            out.extend_from_slice(b"{}");
        }
    }
}

fn object(format: &pb::Struct, omit_empty: bool, depth: usize) -> Result<Node, ConfigError> {
    const DEEPEST: usize = 16;
    if depth > DEEPEST {
        return Err(invalid("json_format", "nested too deep"));
    }
    let mut entries: Vec<_> = format.fields.iter().collect();
    entries.sort_by_key(|(key, _)| key.as_str());
    let mut nodes = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let mut quoted = Vec::new();
        write_json_string(&mut quoted, key.as_bytes());
        let quoted = String::from_utf8_lossy(&quoted).into_owned();
        nodes.push((
            quoted,
            node(value, omit_empty, depth).map_err(|error| error.within(key))?,
        ));
    }
    Ok(Node::Object(nodes))
}

fn node(value: &pb::Value, omit_empty: bool, depth: usize) -> Result<Node, ConfigError> {
    Ok(match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Node::Literal("null".to_owned()),
        Some(Kind::BoolValue(flag)) => Node::Literal(flag.to_string()),
        Some(Kind::NumberValue(number)) => Node::Literal(number.to_string()),
        Some(Kind::StructValue(nested)) => object(nested, omit_empty, depth + 1)?,
        Some(Kind::ListValue(list)) => Node::List(
            list.values
                .iter()
                .map(|value| node(value, omit_empty, depth + 1))
                .collect::<Result<_, _>>()?,
        ),
        Some(Kind::StringValue(text)) => {
            let mut format = Format::text(text, omit_empty)?;
            match (format.parts.len(), format.parts.pop()) {
                (1, Some(Part::Command(command))) => Node::Command(command),
                (_, last) => {
                    format.parts.extend(last);
                    Node::Text(format)
                }
            }
        }
    })
}

impl Node {
    /// Writes the value; `false` if it is to be left out.
    fn write(&self, facts: &Facts<'_>, omit_empty: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Node::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Node::Command(command) => {
                if !command.write_json(facts, out) {
                    if omit_empty {
                        return false;
                    }
                    out.extend_from_slice(b"null");
                }
            }
            Node::Text(format) => {
                out.push(b'"');
                let start = out.len();
                format.write(facts, out);
                escape_from(out, start);
                out.push(b'"');
            }
            Node::List(nodes) => {
                out.push(b'[');
                let mut first = true;
                for node in nodes {
                    let before = out.len();
                    if !first {
                        out.push(b',');
                    }
                    if node.write(facts, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(b']');
            }
            Node::Object(entries) => {
                out.push(b'{');
                let mut first = true;
                for (key, node) in entries {
                    let before = out.len();
                    if !first {
                        out.push(b',');
                    }
                    out.extend_from_slice(key.as_bytes());
                    out.push(b':');
                    if node.write(facts, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(before);
                    }
                }
                out.push(b'}');
            }
        }
        true
    }
}

/// Writes a quoted JSON string; bytes that are not UTF-8 become U+FFFD.
pub(super) fn write_json_string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    let start = out.len();
    out.extend_from_slice(text);
    escape_from(out, start);
    out.push(b'"');
}

/// Makes what was written since `start` the inside of a JSON string.
pub(super) fn escape_from(out: &mut Vec<u8>, start: usize) {
    let odd = |byte: &u8| *byte < b' ' || *byte >= 0x80 || matches!(byte, b'"' | b'\\');
    let Some(first) = out[start..].iter().position(odd) else {
        return;
    };
    let rest = out.split_off(start + first);
    for character in String::from_utf8_lossy(&rest).chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            control if control < ' ' => {
                // Writing to a Vec cannot fail.
                drop(write!(out, "\\u{:04x}", u32::from(control)));
            }
            other => out.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}
