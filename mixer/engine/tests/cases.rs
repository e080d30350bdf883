//! Runs the cases of `testdata/*.yaml`.
#![cfg(test)]

use std::collections::BTreeMap;
use std::path::Path;

use lateen_engine::{AttributeTable, Bag, Expression, StringMap, Text, Tracker, Value, ValueType};
use serde::Deserialize;
use serde_json::Value as Json;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    types: BTreeMap<String, ValueType>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    note: String,
    expr: String,
    attributes: Option<BTreeMap<String, Json>>,
    want: Option<String>,
    error: Option<String>,
    refused: Option<String>,
    looked_up: Option<Vec<String>>,
}

fn value(ty: ValueType, json: &Json) -> Value {
    let text = json.as_str().map(Text::from);
    match (ty, json) {
        (ValueType::Bool, Json::Bool(v)) => Value::Bool(*v),
        (ValueType::Int64, Json::Number(n)) => Value::Int64(n.as_i64().unwrap()),
        (ValueType::Double, Json::Number(n)) => Value::Double(n.as_f64().unwrap()),
        (ValueType::StringMap, Json::Object(map)) => Value::StringMap(
            map.iter()
                .map(|(k, v)| (k.as_str(), v.as_str().unwrap()))
                .collect::<StringMap>(),
        ),
        (ValueType::IpAddress, _) => Value::Ip(text.unwrap().parse().unwrap()),
        (ValueType::Timestamp, _) => {
            Value::Timestamp(lateen_engine::parse_timestamp(&text.unwrap()).unwrap())
        }
        (ValueType::Duration, _) => {
            Value::Duration(lateen_engine::parse_duration(&text.unwrap()).unwrap())
        }
        (ty, _) => Value::from_text(ty, text.unwrap()).unwrap(),
    }
}

fn run(case: &Case, types: &BTreeMap<String, ValueType>) -> Result<(), String> {
    let table = AttributeTable::new(types.iter().map(|(n, t)| (n, *t))).unwrap();
    let expression = match (Expression::compile(&case.expr, &table), &case.refused) {
        (Err(e), Some(part)) if e.reason.contains(part) => return Ok(()),
        (Err(e), _) => return Err(format!("refused: {e}")),
        (Ok(_), Some(_)) => return Err("compiles".into()),
        (Ok(expression), None) => expression,
    };
    let mut bag = Bag::new(&table);
    for (name, json) in case.attributes.iter().flatten() {
        bag.set_by_name(name, value(types[name], json)).unwrap();
    }
    let mut tracker = Tracker::new();
    match (
        expression.evaluate(&bag, &mut tracker),
        &case.want,
        &case.error,
    ) {
        (Ok(got), Some(want), None) if got.to_string() == *want => {}
        (Err(e), None, Some(start)) if e.to_string().starts_with(start) => {}
        (got, ..) => return Err(format!("{got:?}")),
    }
    match &case.looked_up {
        Some(want) if *want != tracker.names(&table) => {
            Err(format!("looked up {:?}", tracker.names(&table)))
        }
        _ => Ok(()),
    }
}

#[test]
fn every_case_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut count = 0;
    let mut failures = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let file: File = serde_saphyr::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for case in &file.cases {
            count += 1;
            if let Err(why) = run(case, &file.types) {
                failures.push(format!("{}: {}: {why}", case.note, case.expr));
            }
        }
    }
    assert!(count > 50, "only {count} cases found");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
