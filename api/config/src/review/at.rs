//! A place in a document: a value, and the path that leads to it.

use serde_json::Value;

static ABSENT: Value = Value::Null;

/// A value with its path (`spec.http[0].route`). What is not there reads as its default, as in protobuf.
#[derive(Clone, Debug)]
pub(crate) struct At<'a> {
    pub(crate) value: &'a Value,
    pub(crate) path: String,
}

impl<'a> At<'a> {
    pub(crate) fn new(value: &'a Value, path: &str) -> Self {
        Self {
            value,
            path: path.to_owned(),
        }
    }

    pub(crate) fn get(&self, name: &str) -> At<'a> {
        At {
            value: self.value.get(name).unwrap_or(&ABSENT),
            path: format!("{}.{name}", self.path),
        }
    }

    pub(crate) fn is_set(&self) -> bool {
        !self.value.is_null()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.value.get(name).is_some_and(|value| !value.is_null())
    }

    pub(crate) fn text(&self) -> &'a str {
        self.value.as_str().unwrap_or_default()
    }

    pub(crate) fn str(&self, name: &str) -> &'a str {
        self.value
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    pub(crate) fn int(&self) -> i64 {
        self.value.as_i64().unwrap_or_default()
    }

    pub(crate) fn number(&self) -> f64 {
        self.value.as_f64().unwrap_or_default()
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        self.value
            .get(name)
            .and_then(Value::as_bool)
            .unwrap_or_default()
    }

    /// A span of time in nanoseconds; `None` when it is absent.
    pub(crate) fn nanos(&self) -> Option<i128> {
        super::text::duration(self.value.as_str()?)
    }

    pub(crate) fn count(&self) -> usize {
        match self.value {
            Value::Array(all) => all.len(),
            Value::Object(all) => all.len(),
            _ => 0,
        }
    }

    pub(crate) fn items(&self) -> impl Iterator<Item = At<'a>> + use<'a> {
        let path = self.path.clone();
        self.value
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .enumerate()
            .map(move |(index, value)| At {
                value,
                path: format!("{path}[{index}]"),
            })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a str, At<'a>)> + use<'a> {
        let path = self.path.clone();
        self.value
            .as_object()
            .into_iter()
            .flatten()
            .map(move |(key, value)| {
                let at = At {
                    value,
                    path: format!("{path}.{key}"),
                };
                (key.as_str(), at)
            })
    }

    /// The texts of a list.
    pub(crate) fn texts(&self) -> Vec<&'a str> {
        self.value
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default()
            .iter()
            .filter_map(Value::as_str)
            .collect()
    }
}
