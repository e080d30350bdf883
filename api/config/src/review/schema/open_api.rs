//! The shape of a kind as a CustomResourceDefinition says it: OpenAPI v3, structural.

use serde_json::{Map, Value, json};

use super::{Bounds, Field, Kind, Limits, Message, SCHEMA};

/// The schema of a message.
pub(crate) fn of_message(name: &'static str) -> Value {
    message(name, &mut Vec::new())
}

/// What is open: any value that JSON has.
fn open() -> Value {
    json!({"x-kubernetes-preserve-unknown-fields": true})
}

fn message(name: &'static str, around: &mut Vec<&'static str>) -> Value {
    // A schema cannot name itself; no kind needs a message within itself more than once.
    if around.contains(&name) {
        return json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    }
    let Message { fields, oneofs } = SCHEMA
        .messages
        .get(name)
        .expect("a test has looked up every message");
    around.push(name);
    let properties: Map<String, Value> = fields
        .iter()
        .map(|(name, field)| ((*name).to_owned(), of_field(field, around)))
        .collect();
    around.pop();
    let mut required: Vec<&str> = fields
        .iter()
        .filter(|(_, field)| field.required)
        .map(|(name, _)| *name)
        .collect();
    required.sort_unstable();
    let mut schema = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    let mut choices = oneofs.iter().map(|names| one_at_most(names));
    match (choices.next(), choices.next()) {
        (Some(only), None) => schema["oneOf"] = only,
        (Some(first), Some(second)) => {
            let all: Vec<Value> = [first, second]
                .into_iter()
                .chain(choices)
                .map(|choice| json!({"oneOf": choice}))
                .collect();
            schema["allOf"] = json!(all);
        }
        (None, _) => {}
    }
    schema
}

/// None of them, or exactly one.
fn one_at_most(names: &[&'static str]) -> Value {
    let each: Vec<Value> = names
        .iter()
        .map(|name| json!({"required": [name]}))
        .collect();
    let mut all = vec![json!({"not": {"anyOf": each}})];
    all.extend(each);
    json!(all)
}

fn of_field(field: &Field, around: &mut Vec<&'static str>) -> Value {
    let mut schema = of_kind(&field.kind, around);
    if matches!(field.kind, Kind::Message("OlderMutualTls")) {
        // `mtls:` with nothing after it says something.
        schema["nullable"] = json!(true);
    }
    let Limits {
        range,
        len,
        count,
        each,
        pattern,
    } = &field.limits;
    bound(&mut schema, range, "minimum", "maximum");
    bound(&mut schema, len, "minLength", "maxLength");
    match field.kind {
        Kind::Map(_) => bound(&mut schema, count, "minProperties", "maxProperties"),
        _ => bound(&mut schema, count, "minItems", "maxItems"),
    }
    let inner = ["items", "additionalProperties"]
        .into_iter()
        .find(|name| schema.get(*name).is_some());
    if let Some(inner) = inner.and_then(|name| schema.get_mut(name)) {
        bound(inner, each, "minLength", "maxLength");
    }
    if let Some(pattern) = pattern {
        schema["pattern"] = json!(pattern.as_str());
    }
    schema
}

/// Numbers as JSON writes them: whole ones without a point.
fn bound(schema: &mut Value, bounds: &Option<Bounds>, low: &str, high: &str) {
    let Some((from, to)) = bounds else { return };
    for (name, limit) in [(low, *from), (high, *to)] {
        if limit.is_finite() {
            #[allow(
                clippy::cast_possible_truncation,
                reason = "limits in our own files are small whole numbers, or have a fraction"
            )]
            let whole = limit as i64;
            schema[name] = if limit.fract() == 0.0 {
                json!(whole)
            } else {
                json!(limit)
            };
        }
    }
}

fn of_kind(kind: &Kind, around: &mut Vec<&'static str>) -> Value {
    match kind {
        Kind::Text | Kind::Duration => json!({"type": "string"}),
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Integer { min, max } => {
            let mut schema = json!({"type": "integer"});
            // What fits into 64 bits needs no bound: JSON numbers of Kubernetes do.
            if *max <= u32::MAX.into() {
                schema["minimum"] = json!(i64::try_from(*min).unwrap_or(i64::MIN));
                schema["maximum"] = json!(i64::try_from(*max).unwrap_or(i64::MAX));
            } else if *min == 0 {
                schema["minimum"] = json!(0);
            }
            schema
        }
        Kind::Number => json!({"type": "number"}),
        Kind::Any => open(),
        Kind::Struct => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
        Kind::Enum(names) => json!({"type": "string", "enum": names}),
        Kind::Message(name) => message(name, around),
        Kind::List(item) => json!({"type": "array", "items": of_kind(item, around)}),
        Kind::Map(value) => {
            json!({"type": "object", "additionalProperties": of_kind(value, around)})
        }
    }
}
