//! What a sidecar is: YAML with places to fill in.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{InjectError, settings::Settings};

/// The built-in template.
pub const SIDECAR: &str = include_str!("sidecar.yaml");

/// What is filled in, by name.
pub(crate) type Values = BTreeMap<&'static str, Value>;

/// The template of this name, filled in.
pub(crate) fn render(
    name: &str,
    settings: &Settings,
    values: &Values,
) -> Result<Value, InjectError> {
    let fail = |reason: String| InjectError::Template {
        name: name.to_owned(),
        reason,
    };
    let template = match settings.templates.get(name) {
        Some(template) => template.clone(),
        None if name == "sidecar" => serde_saphyr::from_str(SIDECAR)
            .map_err(|error| fail(format!("is not YAML: {error}")))?,
        None => {
            return Err(fail(
                "is not known; give it by --template NAME=FILE".to_owned(),
            ));
        }
    };
    if !template.is_object() {
        return Err(fail("is no map with `metadata` and `spec`".to_owned()));
    }
    let mut filled = fill(&template, values).map_err(fail)?;
    // In the built-in one null is «nothing to say»; in a patch it takes a field away.
    if name == "sidecar" {
        drop_nulls(&mut filled);
    }
    Ok(filled)
}

fn fill(template: &Value, values: &Values) -> Result<Value, String> {
    Ok(match template {
        Value::String(text) => fill_text(text, values)?,
        Value::Array(items) => Value::Array(
            items
                .iter()
                .map(|item| fill(item, values))
                .collect::<Result<_, _>>()?,
        ),
        Value::Object(map) => {
            let fields = map.iter().map(|(k, v)| Ok((k.clone(), fill(v, values)?)));
            Value::Object(fields.collect::<Result<Map<_, _>, String>>()?)
        }
        other => other.clone(),
    })
}

fn fill_text(text: &str, values: &Values) -> Result<Value, String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            return Err(format!("{text:?} has no `}}` after `${{`"));
        };
        let value = values.get(name).ok_or_else(|| {
            let known: Vec<&str> = values.keys().copied().collect();
            format!("`${{{name}}}` is not known; there are {}", known.join(", "))
        })?;
        if before.is_empty() && after.is_empty() && rest.len() == text.len() {
            return Ok(value.clone());
        }
        filled += before;
        match value {
            Value::String(value) => filled += value,
            other => filled += &other.to_string(),
        }
        rest = after;
    }
    Ok(Value::String(filled + rest))
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => {
            items.iter_mut().for_each(drop_nulls);
            // A variable that was left without a value.
            items.retain(|item| {
                item.as_object()
                    .is_none_or(|map| map.len() != 1 || !map.contains_key("name"))
            });
        }
        _ => {}
    }
}
