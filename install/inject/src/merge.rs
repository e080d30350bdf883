//! Merging one pod over another, as Kubernetes' strategic merge does it.

use serde_json::{Map, Value};

/// The field by which the items of a list are known; `None`: the list is one value.
fn key_of(field: &str) -> Option<&'static str> {
    match field {
        "containers" | "initContainers" | "volumes" | "env" | "imagePullSecrets" => Some("name"),
        "ports" => Some("containerPort"),
        "volumeMounts" => Some("mountPath"),
        _ => None,
    }
}

/// Merges `over` into `base`: maps field by field, lists of known things item by item (new ones behind), everything
/// else replaced; a null takes a field away.
pub(crate) fn merge(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => merge_maps(base, over),
        (base, over) => base.clone_from(over),
    }
}

fn merge_maps(base: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (field, value) in over {
        if value.is_null() {
            base.remove(field);
            continue;
        }
        let present = base.entry(field.clone()).or_insert(Value::Null);
        match (present, value, key_of(field)) {
            (Value::Array(present), Value::Array(items), Some(key)) => {
                merge_lists(present, items, key);
            }
            (present, value, _) => merge(present, value),
        }
    }
}

fn merge_lists(base: &mut Vec<Value>, over: &[Value], key: &str) {
    for item in over {
        let same = base
            .iter_mut()
            .find(|present| present.get(key).is_some() && present.get(key) == item.get(key));
        match same {
            Some(present) => {
                // The other source of an environment variable would be left beside the new one.
                if let (Value::Object(present), Value::Object(item)) = (&mut *present, item) {
                    let value = |map: &Map<String, Value>| map.contains_key("value");
                    let from = |map: &Map<String, Value>| map.contains_key("valueFrom");
                    if value(item) && from(present) {
                        present.remove("valueFrom");
                    } else if from(item) && value(present) {
                        present.remove("value");
                    }
                }
                merge(present, item);
            }
            None => base.push(item.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_of_things_are_merged_and_lists_of_words_replaced() {
        let mut base = json!({
            "containers": [
                {"name": "a", "args": ["1", "2"], "env": [{"name": "X", "valueFrom": {}}], "image": "i"},
                {"name": "b"},
            ],
            "hostAliases": 1,
        });
        merge(
            &mut base,
            &json!({
                "containers": [
                    {"name": "c"},
                    {"name": "a", "args": ["3"], "env": [{"name": "Y", "value": "y"}, {"name": "X", "value": "x"}]},
                ],
                "hostAliases": null,
            }),
        );
        assert_eq!(
            base,
            json!({"containers": [
                {
                    "name": "a", "args": ["3"], "image": "i",
                    "env": [{"name": "X", "value": "x"}, {"name": "Y", "value": "y"}],
                },
                {"name": "b"},
                {"name": "c"},
            ]})
        );
    }
}
