//! What the operator chose, over what the chart says.

use serde_json::{Map, Value};

/// Puts `over` over `base`: maps are merged, anything else takes the place, and null takes the key away.
pub fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match value {
                    Value::Null => {
                        base.remove(key);
                    }
                    value => overlay(base.entry(key.clone()).or_insert(Value::Null), value),
                }
            }
        }
        (base @ Value::Null, Value::Object(_)) => {
            *base = Value::Object(Map::new());
            overlay(base, over);
        }
        (base, over) => *base = over.clone(),
    }
}

/// Why a `--set` is none.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("`{0}` is not PATH=VALUE, like pilot.replicas=2 (a dot inside of a name is written `\\.`)")]
pub struct SetError(String);

/// `a.b=value` as what [`overlay`] takes. Values are YAML's `true`, `false`, `null` and numbers, or text; `text` says that it
/// is text whatever it looks like.
///
/// # Errors
/// It has no `=`, or a part of the path is empty.
pub fn set(argument: &str, text: bool) -> Result<Value, SetError> {
    let wrong = || SetError(argument.to_owned());
    let (path, value) = argument.split_once('=').ok_or_else(wrong)?;
    let value = match value {
        value if text => Value::from(value),
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        value => match value.parse::<i64>() {
            Ok(number) if number.to_string() == value => Value::from(number),
            _ => Value::from(value),
        },
    };
    let mut parts = vec![String::new()];
    let mut letters = path.chars();
    while let Some(letter) = letters.next() {
        let last = parts.last_mut().ok_or_else(wrong)?;
        match letter {
            '.' => parts.push(String::new()),
            '\\' => last.push(letters.next().ok_or_else(wrong)?),
            letter => last.push(letter),
        }
    }
    if parts.iter().any(String::is_empty) {
        return Err(wrong());
    }
    let inner = parts.into_iter().rev().fold(value, |value, part| {
        Value::Object(Map::from_iter([(part, value)]))
    });
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn maps_merge_the_rest_is_replaced_and_null_removes() {
        let mut base = json!({"a": {"b": 1, "c": [1, 2]}, "d": "x", "e": null});
        overlay(
            &mut base,
            &json!({"a": {"c": [3], "n": {"m": null}}, "d": null, "e": {"f": 1}}),
        );
        assert_eq!(
            base,
            json!({"a": {"b": 1, "c": [3], "n": {}}, "e": {"f": 1}})
        );
    }

    #[test]
    fn a_path_and_a_value() {
        let all = [
            ("pilot.replicas=2", json!({"pilot": {"replicas": 2}})),
            (r"l.a\.b/c=true", json!({"l": {"a.b/c": true}})),
            ("tag=007", json!({"tag": "007"})),
            ("x=a=b", json!({"x": "a=b"})),
            ("x=null", json!({"x": null})),
        ];
        for (argument, want) in all {
            assert_eq!(set(argument, false), Ok(want), "{argument}");
        }
        assert_eq!(set("x=2", true), Ok(json!({"x": "2"})));
        for bad in ["x", "=1", "a..b=1", "a.=1"] {
            assert!(set(bad, false).is_err(), "{bad}");
        }
    }
}
