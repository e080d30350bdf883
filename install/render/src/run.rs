//! A template and data → text.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use crate::function;
use crate::template::{Action, Base, Command, Node, Operand, Pipeline, Templates};

/// Templates that call each other deeper than this go in circles.
const DEPTH_LIMIT: usize = 64;
/// A file that renders to more is refused.
const TEXT_LIMIT_BYTES: usize = 16 << 20;

/// Why a template cannot be rendered.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{file}:{line}: {reason}")]
pub struct RunError {
    /// The file.
    pub file: String,
    /// Its line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// The text of `file` for `data`.
///
/// # Errors
/// There is no such file, or something in it cannot be said of this data: unlike in Helm, also a value that is printed and
/// not there.
pub fn run(templates: &Templates, file: &str, data: &Value) -> Result<String, RunError> {
    let nodes = templates.files.get(file).ok_or_else(|| RunError {
        file: file.to_owned(),
        line: 0,
        reason: "there is no such file".to_owned(),
    })?;
    let mut run = Run {
        templates,
        file,
        line: 1,
        depth: 0,
        variables: vec![(String::new(), data.clone())],
    };
    run.nodes(nodes, data)
}

pub(crate) struct Run<'a> {
    templates: &'a Templates,
    file: &'a str,
    line: usize,
    depth: usize,
    /// The newest last; `$` has an empty name.
    variables: Vec<(String, Value)>,
}

/// The place is put to it where it is known.
type Reason = String;

impl Run<'_> {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<String, RunError> {
        let mut out = String::new();
        let scope = self.variables.len();
        for node in nodes {
            self.line = node.line;
            self.action(&node.action, dot, &mut out)?;
            if out.len() > TEXT_LIMIT_BYTES {
                return Err(self.wrong(format!("more than {TEXT_LIMIT_BYTES} bytes")));
            }
        }
        self.variables.truncate(scope);
        Ok(out)
    }

    fn wrong(&self, reason: Reason) -> RunError {
        RunError {
            file: self.file.to_owned(),
            line: self.line,
            reason,
        }
    }

    fn action(&mut self, action: &Action, dot: &Value, out: &mut String) -> Result<(), RunError> {
        match action {
            Action::Text(text) => out.push_str(text),
            Action::Print(pipeline) => {
                let value = self.value(pipeline, dot)?;
                match function::text(&value) {
                    Some(text) => out.push_str(&text),
                    None => return Err(self.wrong("is printed, and has no value".to_owned())),
                }
            }
            Action::Set {
                name,
                is_new,
                value,
            } => {
                let value = self.value(value, dot)?;
                let old = self.variables.iter_mut().rev().find(|(n, _)| n == name);
                match (old, is_new) {
                    (Some((_, old)), false) => *old = value,
                    (None, false) => return Err(self.wrong(format!("there is no ${name}"))),
                    (_, true) => self.variables.push((name.clone(), value)),
                }
            }
            Action::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if is_true(&self.value(condition, dot)?) {
                        out.push_str(&self.nodes(body, dot)?);
                        return Ok(());
                    }
                }
                out.push_str(&self.nodes(otherwise, dot)?);
            }
            Action::With {
                name,
                value,
                body,
                otherwise,
            } => {
                let value = self.value(value, dot)?;
                let text = match is_true(&value) {
                    true => {
                        self.scoped([name.as_ref().map(|n| (n, value.clone()))], body, &value)?
                    }
                    false => self.nodes(otherwise, dot)?,
                };
                out.push_str(&text);
            }
            Action::Range {
                key,
                item,
                value,
                body,
                otherwise,
            } => {
                let entries = match self.value(value, dot)? {
                    Value::Array(items) => items
                        .into_iter()
                        .enumerate()
                        .map(|(index, item)| (Value::from(index), item))
                        .collect(),
                    Value::Object(map) => sorted(map),
                    Value::Null => Vec::new(),
                    other => {
                        return Err(self.wrong(format!("{other} has no items to range over")));
                    }
                };
                if entries.is_empty() {
                    out.push_str(&self.nodes(otherwise, dot)?);
                }
                for (index, entry) in entries {
                    let names = [
                        key.as_ref().map(|name| (name, index)),
                        item.as_ref().map(|name| (name, entry.clone())),
                    ];
                    out.push_str(&self.scoped(names, body, &entry)?);
                }
            }
            Action::Call(name, argument) => {
                let argument = match argument {
                    Some(pipeline) => self.value(pipeline, dot)?,
                    None => Value::Null,
                };
                out.push_str(&self.call(name, &argument)?);
            }
        }
        Ok(())
    }

    fn scoped<const N: usize>(
        &mut self,
        names: [Option<(&String, Value)>; N],
        body: &[Node],
        dot: &Value,
    ) -> Result<String, RunError> {
        let scope = self.variables.len();
        let named = names.into_iter().flatten();
        self.variables
            .extend(named.map(|(name, value)| (name.clone(), value)));
        let text = self.nodes(body, dot);
        self.variables.truncate(scope);
        text
    }

    /// A defined template, for `template` and `include`.
    pub(crate) fn call(&mut self, name: &str, dot: &Value) -> Result<String, RunError> {
        let templates = self.templates;
        let Some((file, body)) = templates.defined.get(name) else {
            return Err(self.wrong(format!("no template {name:?} is defined")));
        };
        if self.depth == DEPTH_LIMIT {
            return Err(self.wrong(format!("template {name:?} calls itself without end")));
        }
        let mut inner = Run {
            templates,
            file,
            line: 1,
            depth: self.depth + 1,
            variables: vec![(String::new(), dot.clone())],
        };
        inner.nodes(body, dot)
    }

    fn value(&mut self, pipeline: &Pipeline, dot: &Value) -> Result<Value, RunError> {
        let mut last = None;
        for command in pipeline {
            last = Some(self.command(command, dot, last)?);
        }
        Ok(last.unwrap_or(Value::Null))
    }

    fn command(
        &mut self,
        command: &Command,
        dot: &Value,
        piped: Option<Value>,
    ) -> Result<Value, RunError> {
        let Some((first, rest)) = command.split_first() else {
            return Err(self.wrong("an expression is missing".to_owned()));
        };
        if let ([.., files, get], [path]) = (first.fields.as_slice(), rest)
            && (files.as_str(), get.as_str()) == ("Files", "Get")
        {
            let path = self.operand(path, dot)?;
            let (_, data) = &self.variables[0];
            return match data["Files"].get(path.as_str().unwrap_or_default()) {
                Some(text) => Ok(text.clone()),
                None => Err(self.wrong(format!("the chart has no file {path}"))),
            };
        }
        let Base::Function(name) = &first.base else {
            if !rest.is_empty() || piped.is_some() {
                return Err(self.wrong("what is no function takes no arguments".to_owned()));
            }
            return self.operand(first, dot);
        };
        // These two look at no more arguments than they need.
        if let ("and" | "or", false) = (name.as_str(), rest.is_empty()) {
            for argument in rest {
                let value = self.operand(argument, dot)?;
                let is_last = piped.is_none() && std::ptr::eq(argument, &rest[rest.len() - 1]);
                if is_last || is_true(&value) == (name == "or") {
                    return Ok(value);
                }
            }
            return Ok(piped.unwrap_or(Value::Null));
        }
        let mut arguments = Vec::with_capacity(rest.len() + 1);
        for argument in rest {
            arguments.push(self.operand(argument, dot)?);
        }
        arguments.extend(piped);
        if name == "include" {
            let [Value::String(template), dot] = arguments.as_slice() else {
                return Err(self.wrong("include needs a name and a value".to_owned()));
            };
            return self.call(template, dot).map(Value::String);
        }
        function::apply(name, &arguments).map_err(|reason| self.wrong(reason))
    }

    fn operand(&mut self, operand: &Operand, dot: &Value) -> Result<Value, RunError> {
        let group;
        let mut value = match &operand.base {
            Base::Literal(value) => value,
            Base::Dot => dot,
            Base::Variable(name) => match self.variables.iter().rev().find(|(n, _)| n == name) {
                Some((_, value)) => value,
                None => return Err(self.wrong(format!("there is no ${name}"))),
            },
            Base::Group(pipeline) => {
                group = self.value(pipeline, dot)?;
                &group
            }
            // A function without arguments.
            Base::Function(_) => {
                return self.command(&vec![operand.clone()], dot, None);
            }
        };
        for (index, field) in operand.fields.iter().enumerate() {
            value = match value {
                Value::Object(map) => map.get(field).unwrap_or(&Value::Null),
                other => {
                    let path = operand.fields[..index].join(".");
                    let reason = format!("{other} at .{path} has no field {field}");
                    return Err(self.wrong(reason));
                }
            };
        }
        Ok(value.clone())
    }
}

fn sorted(map: Map<String, Value>) -> Vec<(Value, Value)> {
    let mut entries: Vec<_> = map.into_iter().collect();
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    let entries = entries.into_iter();
    entries
        .map(|(key, value)| (Value::String(key), value))
        .collect()
}

/// Go's idea: what is zero or empty is false.
pub(crate) fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64().unwrap_or(0.0) != 0.0,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// `None` for what has no order.
pub(crate) fn order(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64()?.partial_cmp(&b.as_f64()?),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
