//! Header operations of routes: what to remove, what to add, with values made from the stream's facts.

use bytes::Bytes;
use lateen_protocols::envoy::envoy::config::core::v3::{
    HeaderValueOption, header_value_option::HeaderAppendAction,
};

use crate::{
    config_error::ConfigError,
    format::{Facts, Format},
    head::{Headers, Name},
    proto::invalid,
};

/// Removals, then additions, of one level (weighted cluster, route, virtual host or table).
#[derive(Debug, Default)]
pub struct HeaderOps {
    remove: Vec<Name>,
    add: Vec<Addition>,
}

#[derive(Debug)]
struct Addition {
    name: Name,
    value: Value,
    action: HeaderAppendAction,
    keep_empty: bool,
}

#[derive(Debug)]
enum Value {
    Literal(Bytes),
    Format(Format),
}

impl HeaderOps {
    /// Compiles one level's lists.
    ///
    /// # Errors
    /// When a pseudo header or `host` would be changed, or a format string is not valid.
    pub fn compile(add: &[HeaderValueOption], remove: &[String]) -> Result<HeaderOps, ConfigError> {
        let mut ops = HeaderOps::default();
        for name in remove {
            ops.remove.push(changeable(name)?);
        }
        for option in add {
            let header = option
                .header
                .as_ref()
                .ok_or_else(|| invalid("headers_to_add", "an entry has no header"))?;
            let action = match option.append.as_ref() {
                Some(append) if append.value => HeaderAppendAction::AppendIfExistsOrAdd,
                Some(_) => HeaderAppendAction::OverwriteIfExistsOrAdd,
                None => option.append_action(),
            };
            let value = if header.raw_value.is_empty() {
                let format =
                    Format::text(&header.value, true).map_err(|error| error.within(&header.key))?;
                match format.literal() {
                    Some(text) => Value::Literal(text.to_owned().into()),
                    None => Value::Format(format),
                }
            } else {
                Value::Literal(header.raw_value.clone().into())
            };
            if let Value::Literal(text) = &value
                && text.iter().any(|b| matches!(b, b'\r' | b'\n' | 0))
            {
                return Err(invalid(
                    header.key.clone(),
                    "the value holds a control character",
                ));
            }
            ops.add.push(Addition {
                name: changeable(&header.key)?,
                value,
                action,
                keep_empty: option.keep_empty_value,
            });
        }
        Ok(ops)
    }

    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// The values to add, made from `facts`. Separate from [`HeaderOps::apply`], because `facts` usually
    /// borrows the headers that are to be changed.
    pub fn values(&self, facts: &Facts<'_>) -> Vec<Bytes> {
        self.add
            .iter()
            .map(|addition| match &addition.value {
                Value::Literal(text) => text.clone(),
                Value::Format(format) => {
                    let mut text = Vec::new();
                    format.write(facts, &mut text);
                    // A value taken from a peer must not end the header.
                    text.retain(|b| !matches!(b, b'\r' | b'\n' | 0));
                    text.into()
                }
            })
            .collect()
    }

    /// Removes, then adds `values` as made by [`HeaderOps::values`].
    pub fn apply(&self, headers: &mut Headers, values: Vec<Bytes>) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (addition, value) in self.add.iter().zip(values) {
            if value.is_empty() && !addition.keep_empty {
                continue;
            }
            let name = addition.name.clone();
            let exists = headers.get(&name).is_some();
            match addition.action {
                HeaderAppendAction::AppendIfExistsOrAdd => headers.append(name, value),
                HeaderAppendAction::AddIfAbsent if !exists => headers.append(name, value),
                HeaderAppendAction::OverwriteIfExistsOrAdd => headers.set(name, value),
                HeaderAppendAction::OverwriteIfExists if exists => headers.set(name, value),
                HeaderAppendAction::AddIfAbsent | HeaderAppendAction::OverwriteIfExists => {}
            }
        }
    }
}

fn changeable(name: &str) -> Result<Name, ConfigError> {
    let token = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(invalid(
            name,
            ":-prefixed or host headers may not be modified",
        ));
    }
    if !token {
        return Err(invalid(name, "not a header name"));
    }
    Ok(Name::new(name))
}
