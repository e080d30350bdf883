//! Gives streams fixed dynamic metadata. Envoy: `envoy.filters.http.set_metadata`.

use lateen_protocols::envoy::{
    envoy::extensions::filters::http::set_metadata::v3::Config, google::protobuf as pb,
};
use pb::value::Kind;

use crate::{
    config_error::ConfigError,
    filter::FilterContext,
    proto::invalid,
    stats::{Counter, Scope},
};

/// The filter of one connection manager.
#[derive(Debug)]
pub struct SetMetadata {
    entries: Vec<Entry>,
    denied: Counter,
}

#[derive(Debug)]
struct Entry {
    namespace: String,
    fields: pb::Struct,
    /// Adds to metadata that is there already.
    merges: bool,
}

impl SetMetadata {
    /// Compiles the filter; counts in `http.PREFIX.set_metadata.`.
    ///
    /// # Errors
    /// When an entry has no namespace, or a typed value.
    pub fn compile(config: &Config, scope: &Scope) -> Result<SetMetadata, ConfigError> {
        let mut entries = Vec::new();
        // The older form, one entry beside the list.
        if let Some(fields) = &config.value {
            entries.push(Entry {
                namespace: config.metadata_namespace.clone(),
                fields: fields.clone(),
                merges: true,
            });
        }
        for metadata in &config.metadata {
            if metadata.typed_value.is_some() {
                return Err(invalid("metadata.typed_value", "not supported"));
            }
            entries.push(Entry {
                namespace: metadata.metadata_namespace.clone(),
                fields: metadata.value.clone().unwrap_or_default(),
                merges: metadata.allow_overwrite,
            });
        }
        if entries.iter().any(|entry| entry.namespace.is_empty()) {
            return Err(invalid("metadata_namespace", "absent"));
        }
        Ok(SetMetadata {
            entries,
            denied: scope.counter("set_metadata.overwrite_denied"),
        })
    }

    pub(super) fn on_request(&self, cx: &FilterContext<'_>) {
        let mut info = cx.info.borrow_mut();
        let all = info.metadata.get_or_insert_default();
        for entry in &self.entries {
            match all.get_mut(&entry.namespace) {
                None => {
                    all.insert(entry.namespace.clone(), entry.fields.clone());
                }
                Some(present) if entry.merges => update(present, &entry.fields),
                Some(_) => self.denied.inc(),
            }
        }
    }
}

/// Structs are merged, lists joined, all else is replaced. Envoy: `StructUtil::update`.
fn update(present: &mut pb::Struct, with: &pb::Struct) {
    for (key, value) in &with.fields {
        let Some(old) = present.fields.get_mut(key) else {
            present.fields.insert(key.clone(), value.clone());
            continue;
        };
        match (old.kind.as_mut(), value.kind.as_ref()) {
            (Some(Kind::StructValue(old)), Some(Kind::StructValue(new))) => update(old, new),
            (Some(Kind::ListValue(old)), Some(Kind::ListValue(new))) => {
                old.values.extend(new.values.iter().cloned());
            }
            _ => *old = value.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, kind: Kind) -> pb::Struct {
        let value = pb::Value { kind: Some(kind) };
        pb::Struct {
            fields: [(key.to_owned(), value)].into(),
        }
    }

    #[test]
    fn structs_merge_lists_join_and_the_rest_is_replaced() {
        let text = |text: &str| Kind::StringValue(text.to_owned());
        let mut all = one("s", Kind::StructValue(one("a", text("1"))));
        update(&mut all, &one("s", Kind::StructValue(one("b", text("2")))));
        let Some(Kind::StructValue(inner)) = &all.fields["s"].kind else {
            panic!("{all:?}");
        };
        assert_eq!(inner.fields.len(), 2);
        let list = |item: &str| {
            let value = pb::Value {
                kind: Some(text(item)),
            };
            Kind::ListValue(pb::ListValue {
                values: vec![value],
            })
        };
        let mut all = one("l", list("x"));
        update(&mut all, &one("l", list("y")));
        let Some(Kind::ListValue(joined)) = &all.fields["l"].kind else {
            panic!("{all:?}");
        };
        assert_eq!(joined.values.len(), 2);
        update(&mut all, &one("l", text("gone")));
        assert_eq!(all, one("l", text("gone")));
    }
}
