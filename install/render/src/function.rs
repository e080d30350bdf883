//! The functions of Go's templates, of Sprig and of Helm that the chart calls.

use serde_json::{Map, Value};

use crate::run::{is_true, order};

/// What is printed of a value; nothing of one that is not there.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// # Errors
/// No such function, or not these arguments.
pub(crate) fn apply(name: &str, arguments: &[Value]) -> Result<Value, String> {
    let fail = || format!("{name} does not take {}", Value::from(arguments.to_vec()));
    Ok(match (name, arguments) {
        ("not", [value]) => Value::Bool(!is_true(value)),
        ("eq", [value, others @ ..]) if !others.is_empty() => {
            if others.iter().any(|other| !is_comparable(value, other)) {
                return Err(fail());
            }
            Value::Bool(others.iter().any(|other| is_equal(value, other)))
        }
        ("ne", [a, b]) if is_comparable(a, b) => Value::Bool(!is_equal(a, b)),
        ("lt", [a, b]) => Value::Bool(order(a, b).ok_or_else(fail)?.is_lt()),
        ("le", [a, b]) => Value::Bool(order(a, b).ok_or_else(fail)?.is_le()),
        ("gt", [a, b]) => Value::Bool(order(a, b).ok_or_else(fail)?.is_gt()),
        ("ge", [a, b]) => Value::Bool(order(a, b).ok_or_else(fail)?.is_ge()),
        ("default", [other, value]) => if is_true(value) { value } else { other }.clone(),
        ("ternary", [yes, no, Value::Bool(test)]) => if *test { yes } else { no }.clone(),
        ("required", [Value::String(message), value]) => match value {
            Value::Null => return Err(message.clone()),
            Value::String(text) if text.is_empty() => return Err(message.clone()),
            value => value.clone(),
        },
        ("fail", [Value::String(message)]) => return Err(message.clone()),
        ("quote", [Value::Null]) => Value::String(String::new()),
        ("quote", [value]) => {
            let text = text(value).unwrap_or_default();
            Value::String(Value::String(text).to_string())
        }
        ("int", [value]) => match value {
            Value::Null => Value::from(0),
            Value::String(text) => Value::from(text.parse::<i64>().unwrap_or(0)),
            Value::Number(number) => Value::from(whole(number).ok_or_else(fail)?),
            _ => return Err(fail()),
        },
        ("toString", [value]) => Value::String(text(value).unwrap_or_default()),
        ("toJson", [value]) => Value::String(value.to_string()),
        ("toYaml", [value]) => Value::String(yaml(value).ok_or_else(fail)?),
        ("indent", [Value::Number(by), Value::String(text)]) => {
            Value::String(indent(whole(by).ok_or_else(fail)?, text))
        }
        ("nindent", [Value::Number(by), Value::String(text)]) => {
            Value::String(format!("\n{}", indent(whole(by).ok_or_else(fail)?, text)))
        }
        ("trunc", [Value::Number(length), Value::String(text)]) => {
            let length = usize::try_from(whole(length).ok_or_else(fail)?).map_err(|_| fail())?;
            Value::String(text.chars().take(length).collect())
        }
        ("trimSuffix", [Value::String(end), Value::String(text)]) => {
            Value::from(text.strip_suffix(end.as_str()).unwrap_or(text))
        }
        ("replace", [Value::String(old), Value::String(new), Value::String(text)]) => {
            Value::String(text.replace(old.as_str(), new))
        }
        ("join", [Value::String(between), Value::Array(items)]) => {
            let items: Vec<String> = items.iter().filter_map(text).collect();
            Value::String(items.join(between))
        }
        ("printf", [Value::String(format), arguments @ ..]) => {
            Value::String(printf(format, arguments).ok_or_else(fail)?)
        }
        ("list", items) => Value::from(items.to_vec()),
        ("dict", pairs) if pairs.len().is_multiple_of(2) => {
            let mut map = Map::new();
            for pair in pairs.chunks_exact(2) {
                let [Value::String(key), value] = pair else {
                    return Err(fail());
                };
                map.insert(key.clone(), value.clone());
            }
            Value::Object(map)
        }
        ("hasKey", [Value::Object(map), Value::String(key)]) => Value::Bool(map.contains_key(key)),
        // The last one wins; maps are merged, maps inside of them too.
        ("mergeOverwrite", [Value::Object(first), others @ ..]) => {
            let mut merged = Value::Object(first.clone());
            for other in others {
                crate::values::overlay(&mut merged, other);
            }
            merged
        }
        _ if KNOWN.contains(&name) => return Err(fail()),
        _ => return Err(format!("{name} is not a function that is supported")),
    })
}

/// So that wrong arguments are told from a function that is not there.
const KNOWN: [&str; 26] = [
    "not",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "default",
    "ternary",
    "required",
    "fail",
    "quote",
    "int",
    "toString",
    "toJson",
    "toYaml",
    "indent",
    "nindent",
    "trunc",
    "trimSuffix",
    "replace",
    "join",
    "printf",
    "dict",
    "hasKey",
    "mergeOverwrite",
];

/// Go compares what has one type; numbers of a chart's values have another one than numbers that are written down, and
/// pass only through `int`. We do not tell them apart.
fn is_comparable(a: &Value, b: &Value) -> bool {
    matches!(
        (a, b),
        (Value::Bool(_), Value::Bool(_))
            | (Value::Number(_), Value::Number(_))
            | (Value::String(_), Value::String(_))
            | (Value::Null, _)
            | (_, Value::Null)
    )
}

fn is_equal(a: &Value, b: &Value) -> bool {
    a == b || order(a, b) == Some(std::cmp::Ordering::Equal)
}

fn whole(number: &serde_json::Number) -> Option<i64> {
    let float = || {
        let float = number.as_f64()?;
        // Cut as Sprig cuts it; the bound keeps the cast exact.
        (float.abs() < 9e15).then_some(float as i64)
    };
    number.as_i64().or_else(float)
}

fn yaml(value: &Value) -> Option<String> {
    let text = serde_saphyr::to_string(value).ok()?;
    Some(text.trim_end_matches('\n').to_owned())
}

fn indent(by: i64, text: &str) -> String {
    let pad = " ".repeat(usize::try_from(by).unwrap_or(0));
    pad.clone() + &text.replace('\n', &format!("\n{pad}"))
}

/// `%s`, `%v`, `%d`, `%q` and `%%`.
fn printf(format: &str, arguments: &[Value]) -> Option<String> {
    let mut out = String::new();
    let mut arguments = arguments.iter();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        out += before;
        let verb = after.chars().next()?;
        match verb {
            '%' => out.push('%'),
            's' | 'v' | 'd' => out += &text(arguments.next()?)?,
            'q' => out += &Value::String(text(arguments.next()?)?).to_string(),
            _ => return None,
        }
        rest = &after[1..];
    }
    arguments.next().is_none().then(|| out + rest)
}
