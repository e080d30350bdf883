//! Runs the conformance corpus of the expression language, when there is one: `LATEEN_CORPUS` names its
//! folder. Without it nothing of this runs, and says so.
#![cfg(test)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lateen_engine::expression::{Function, Param, Syntax};
use lateen_engine::{
    AttributeTable, Bag, Expression, Language, Outcome, StringMap, Text, Tracker, Value, ValueType,
    parse_timestamp,
};
use serde_json::Value as Json;

fn corpus(file: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("LATEEN_CORPUS") else {
        eprintln!("!!! NOT RUN: LATEEN_CORPUS names no folder");
        return None;
    };
    let path = Path::new(&folder).join("mixer").join(file);
    if path.is_file() {
        return Some(path);
    }
    eprintln!("not run: LATEEN_CORPUS has no {}", path.display());
    None
}

fn rows(file: &str) -> Option<Vec<Json>> {
    let text = std::fs::read_to_string(corpus(file)?).unwrap();
    Some(
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
    )
}

fn text<'a>(row: &'a Json, field: &str) -> &'a str {
    row[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field} of {row}"))
}

fn manifest(json: &Json) -> AttributeTable {
    let all = json.as_object().unwrap().iter();
    AttributeTable::new(all.map(|(n, t)| (n, t.as_str().unwrap().parse().unwrap()))).unwrap()
}

fn value(json: &Json) -> Option<Value> {
    let v = &json["value"];
    let string = || Text::from(v.as_str().unwrap_or_default());
    Some(match text(json, "type").parse().unwrap() {
        ValueType::String => Value::String(string()),
        ValueType::EmailAddress => Value::Email(string()),
        ValueType::Uri => Value::Uri(string()),
        ValueType::DnsName => Value::DnsName(string()),
        ValueType::Int64 => Value::Int64(
            v.as_i64()
                .unwrap_or_else(|| v.as_str().unwrap().parse().unwrap()),
        ),
        ValueType::Double => Value::Double(v.as_f64().unwrap()),
        ValueType::Bool => Value::Bool(v.as_bool().unwrap()),
        ValueType::Timestamp => Value::Timestamp(parse_timestamp(v.as_str().unwrap()).unwrap()),
        ValueType::Duration => {
            Value::Duration(lateen_engine::parse_duration(v.as_str().unwrap()).unwrap())
        }
        ValueType::IpAddress => Value::Ip(v.as_str()?.parse().ok()?),
        ValueType::StringMap => Value::StringMap(
            v.as_object()
                .unwrap()
                .iter()
                .map(|(k, v)| (k.as_str(), v.as_str().unwrap()))
                .collect::<StringMap>(),
        ),
    })
}

fn added(row: &Json) -> Vec<Function> {
    let param = |json: &Json| match json.as_str() {
        None => None,
        Some("ANY") => Some(Param::Any),
        Some(name) => Some(Param::Of(name.parse().unwrap())),
    };
    let list = row["custom_functions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    list.iter()
        .map(|f| Function {
            name: text(f, "name").to_owned(),
            target: if f["instance"] == true {
                param(&f["target"])
            } else {
                None
            },
            params: f["args"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(param)
                .collect(),
            returns: param(&f["returns"]).unwrap(),
            call: match text(f, "name") {
                "reverse" => Arc::new(|args: &[Value]| {
                    let text = args.first().and_then(Value::as_str).ok_or("no text")?;
                    Ok(Value::string(text.chars().rev().collect::<String>()))
                }),
                name => {
                    let name = name.to_owned();
                    Arc::new(move |_: &[Value]| Err(format!("{name} is for type checks only")))
                }
            },
        })
        .collect()
}

fn error_fits(row: &Json, got: &str) -> bool {
    let want = row["error"].as_str().unwrap_or_default();
    match row["error_match"].as_str().unwrap_or("any") {
        "exact" => got == want,
        "prefix" => got.starts_with(want),
        "contains" => got.contains(want),
        _ => true,
    }
}

/// Counts rows by kind, and gathers what went wrong with which.
#[derive(Default)]
struct Tally {
    passed: BTreeMap<String, usize>,
    failed: Vec<String>,
}

impl Tally {
    fn add(&mut self, kind: &str, row: &Json, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => *self.passed.entry(kind.to_owned()).or_default() += 1,
            Err(why) => self
                .failed
                .push(format!("{} {kind}: {why}\n    {row}", row["id"])),
        }
    }

    fn finish(self, file: &str) {
        let total: usize = self.passed.values().sum();
        eprintln!(
            "{file}: {total} passed {:?}, {} failed",
            self.passed,
            self.failed.len()
        );
        assert!(self.failed.is_empty(), "{}", self.failed.join("\n"));
        assert!(total > 0, "{file} has no rows");
    }
}

fn expression_row(row: &Json, table: &AttributeTable) -> Result<&'static str, String> {
    let compiled = Expression::compile_with(text(row, "expr"), table, &added(row));
    let expression = match compiled {
        Err(error) if row["compile_error"] == true => {
            let got = error.to_string();
            return if error_fits(row, &got) {
                Ok("compile error")
            } else {
                Err(got)
            };
        }
        Err(error) => return Err(format!("does not compile: {error}")),
        Ok(_) if row["compile_error"] == true => return Err("compiles".into()),
        Ok(expression) => expression,
    };
    if row["type"].as_str() != Some(expression.value_type().as_str()) {
        return Err(format!("type is {}", expression.value_type()));
    }
    let mut bag = Bag::new(table);
    for (name, json) in row["attributes"].as_object().into_iter().flatten() {
        if let (Some(slot), Some(value)) = (table.slot(name), value(json)) {
            bag.set(slot, value);
        }
    }
    let mut tracker = Tracker::new();
    let result = expression.evaluate(&bag, &mut tracker);
    if let Some(list) = row["referenced"].as_array() {
        let want: Vec<&str> = list.iter().filter_map(Json::as_str).collect();
        let got = tracker.names(table);
        if got != want {
            return Err(format!("referenced {got:?}, not {want:?}"));
        }
    }
    match (result, row["error"].as_str()) {
        (Ok(got), None) => {
            let want = value(&row["result"]).unwrap();
            // An address may have two forms; everything else must be the same value.
            let same = match (&got, &want) {
                (Value::Ip(_), Value::Ip(_)) => got.equals(&want) == Ok(true),
                _ => got == want,
            };
            if same {
                Ok("value")
            } else {
                Err(format!("is {got}"))
            }
        }
        (Err(error), Some(_)) => {
            let got = error.to_string();
            if error_fits(row, &got) {
                Ok("run-time error")
            } else {
                Err(got)
            }
        }
        (Ok(got), Some(_)) => Err(format!("is {got}")),
        (Err(error), None) => Err(format!("fails: {error}")),
    }
}

#[test]
fn expressions() {
    let Some(rows) = rows("expressions.jsonl") else {
        return;
    };
    let manifests: Json =
        serde_json::from_str(&std::fs::read_to_string(corpus("manifest.json").unwrap()).unwrap())
            .unwrap();
    let mut tally = Tally::default();
    for row in &rows {
        let table = manifest(&manifests["manifests"][text(row, "manifest")]);
        match expression_row(row, &table) {
            Ok(kind) => tally.add(kind, row, Ok(())),
            Err(why) => tally.add("expression", row, Err(why)),
        }
    }
    tally.finish("expressions.jsonl");
}

/// A row on the CEL runtime; `want` has the expected outcome.
fn cel_row(
    row: &Json,
    want: &Json,
    table: &AttributeTable,
    language: Language,
) -> Result<&'static str, String> {
    let may_fail = want["compile"] == "may-fail";
    let expression = match Expression::compile_any(language, text(row, "expr"), table) {
        Err(_) if may_fail => return Ok("may fail"),
        Err(error) if want["compile_error"] == true => {
            let got = error.to_string();
            return if error_fits(want, &got) {
                Ok("compile error")
            } else {
                Err(got)
            };
        }
        Err(error) => return Err(format!("does not compile: {error}")),
        Ok(_) if want["compile_error"] == true => return Err("compiles".into()),
        Ok(expression) => expression,
    };
    let mut bag = Bag::new(table);
    for (name, json) in row["attributes"].as_object().into_iter().flatten() {
        if let (Some(slot), Some(value)) = (table.slot(name), value(json)) {
            bag.set(slot, value);
        }
    }
    let mut tracker = Tracker::new();
    let result = expression.outcome(&bag, &mut tracker);
    if let Some(list) = want["referenced"].as_array() {
        let want: Vec<&str> = list.iter().filter_map(Json::as_str).collect();
        let got = tracker.names(table);
        if got != want {
            return Err(format!("referenced {got:?}, not {want:?}"));
        }
    }
    let got = match result {
        Err(_) if may_fail || want["or_error"] == true => return Ok("run-time error"),
        Err(error) if want["error"].is_string() && error_fits(want, &error.to_string()) => {
            return Ok("run-time error");
        }
        Err(error) => return Err(format!("fails: {error}")),
        Ok(_) if may_fail => return Ok("may fail"),
        Ok(got) if want["error"].is_string() => return Err(format!("is {got:?}")),
        Ok(got) => got,
    };
    let wanted = &want["result"];
    let same = match &got {
        Outcome::NoAddress => wanted["type"] == "IP_ADDRESS" && wanted["value"] == "",
        Outcome::Map(map) => {
            wanted["type"] == "CEL_MAP" && wanted["value"] == serde_json::to_value(map).unwrap()
        }
        Outcome::Value(got) => match (got, value(wanted)) {
            (Value::Ip(_), Some(want @ Value::Ip(_))) => got.equals(&want) == Ok(true),
            // Plain CEL rows write the texts of e-mail addresses, URIs and DNS names as strings.
            (got, Some(Value::String(want))) => got.as_text() == Some(&want),
            (got, want) => Some(got) == want.as_ref(),
        },
    };
    if same {
        Ok("value")
    } else {
        Err(format!("is {got:?}"))
    }
}

fn run_cel(file: &str, language: Language, want: impl Fn(&Json) -> Json) {
    let Some(rows) = rows(file) else {
        return;
    };
    let manifests: Json =
        serde_json::from_str(&std::fs::read_to_string(corpus("manifest.json").unwrap()).unwrap())
            .unwrap();
    let mut tally = Tally::default();
    for row in &rows {
        if !row["custom_functions"].is_null() {
            continue; // types it declares differently are for CEXL
        }
        let table = manifest(&manifests["manifests"][text(row, "manifest")]);
        match cel_row(row, &want(row), &table, language) {
            Ok(kind) => tally.add(kind, row, Ok(())),
            Err(why) => tally.add("expression", row, Err(why)),
        }
    }
    tally.finish(file);
}

#[test]
fn expressions_in_cel() {
    run_cel("expressions_cel.jsonl", Language::Cel, Json::clone);
}

#[test]
fn expressions_in_compat() {
    run_cel("expressions.jsonl", Language::Compat, |row| {
        row["compat"].clone()
    });
}

fn syntax_row(row: &Json) -> Result<(), String> {
    match text(row, "kind") {
        "parse_ok" => {
            let syntax = Syntax::parse(text(row, "expr")).map_err(|e| e.to_string())?;
            let got = syntax.prefix();
            let again = Syntax::parse(&syntax.to_string()).map_err(|e| e.to_string())?;
            if again != syntax {
                return Err(format!("{syntax} is not the same"));
            }
            if got == text(row, "prefix_form") {
                Ok(())
            } else {
                Err(got)
            }
        }
        "parse_error" => match Syntax::parse(text(row, "expr")) {
            Ok(syntax) => Err(format!("parses as {}", syntax.prefix())),
            Err(error) if error_fits(row, &error.to_string()) => Ok(()),
            Err(error) => Err(error.to_string()),
        },
        "literal" => {
            let table = AttributeTable::default_vocabulary();
            let got = Expression::compile(text(row, "token"), &table);
            match (got, row["error"].is_string()) {
                // The reference reads a literal apart from the parser, whose wording differs.
                (Err(_), true) => Ok(()),
                (Err(error), false) => Err(error.to_string()),
                (Ok(got), true) => Err(format!("is {:?}", got.as_constant())),
                (Ok(got), false) => {
                    let ty = row["type"].as_str().or(row["as_type"].as_str()).unwrap();
                    let want = value(&serde_json::json!({"type": ty, "value": row["value"]}));
                    if got.as_constant() == want {
                        Ok(())
                    } else {
                        Err(format!("is {:?}", got.as_constant()))
                    }
                }
            }
        }
        "hoistable_equalities" => {
            let syntax = Syntax::parse(text(row, "expr")).map_err(|e| e.to_string())?;
            let got: BTreeMap<String, Value> = syntax
                .equalities()
                .into_iter()
                .map(|(n, v)| (n.to_owned(), v.clone()))
                .collect();
            let want: BTreeMap<String, Value> = row["equalities"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(n, v)| (n.clone(), value(v).unwrap()))
                .collect();
            if got == want {
                Ok(())
            } else {
                Err(format!("{got:?}"))
            }
        }
        "typecheck" => {
            let table = manifest(&row["manifest"]);
            match Expression::compile_with(text(row, "expr"), &table, &added(row)) {
                Ok(e) if row["type"].as_str() == Some(e.value_type().as_str()) => Ok(()),
                Ok(e) => Err(format!("is {}", e.value_type())),
                Err(error) if row["error"].is_string() && error_fits(row, &error.to_string()) => {
                    Ok(())
                }
                Err(error) => Err(error.to_string()),
            }
        }
        other => Err(format!("unknown kind {other}")),
    }
}

#[test]
fn syntax() {
    let Some(rows) = rows("syntax.jsonl") else {
        return;
    };
    let mut tally = Tally::default();
    for row in &rows {
        tally.add(text(row, "kind"), row, syntax_row(row));
    }
    tally.finish("syntax.jsonl");
}

fn function_row(row: &Json) -> Result<(), String> {
    let args = row["args"].as_array().unwrap();
    let names = ["a1", "a2", "a3"];
    let function = text(row, "fn");
    let ty = |i: usize| match (row["operand_type"].as_str(), &args[i]) {
        (Some(ty), _) => ty.parse().unwrap(),
        (None, Json::Bool(_)) => ValueType::Bool,
        (None, Json::Number(_)) => ValueType::Int64,
        (None, _) => ValueType::String,
    };
    let table = AttributeTable::new((0..args.len()).map(|i| (names[i], ty(i)))).unwrap();
    let mut bag = Bag::new(&table);
    for (i, arg) in args.iter().enumerate() {
        let json = serde_json::json!({"type": ty(i).as_str(), "value": arg});
        if let Some(value) = value(&json) {
            bag.set(table.slot(names[i]).unwrap(), value);
        }
    }
    let list = names[..args.len()].join(", ");
    let expr = match (function, row["form"].as_str()) {
        ("==", _) => "a1 == a2".to_owned(),
        (_, Some("method")) => format!("a1.{function}(a2)"),
        ("matches", _) => "a1.matches(a2)".to_owned(),
        _ => format!("{function}({list})"),
    };
    let expression = Expression::compile(&expr, &table).map_err(|e| e.to_string())?;
    match (
        expression.evaluate(&bag, &mut Tracker::new()),
        row["error"] == true,
    ) {
        (Err(_), true) => Ok(()),
        (Err(error), false) => Err(error.to_string()),
        (Ok(got), true) => Err(format!("is {got}")),
        (Ok(got), false) => {
            let want = value(&row["result"]).unwrap();
            if got == want {
                Ok(())
            } else {
                Err(format!("is {got}"))
            }
        }
    }
}

#[test]
fn functions() {
    let Some(rows) = rows("functions.jsonl") else {
        return;
    };
    let mut tally = Tally::default();
    for row in &rows {
        tally.add(text(row, "fn"), row, function_row(row));
    }
    tally.finish("functions.jsonl");
}

#[test]
fn dictionary() {
    let Some(path) = corpus("global_dictionary.json") else {
        return;
    };
    let json: Json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let words: Vec<&str> = json["words"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Json::as_str)
        .collect();
    assert_eq!(lateen_engine::dictionary::GLOBAL_WORDS, words);
    eprintln!("global_dictionary.json: {} words are the same", words.len());
}

#[test]
fn vocabulary() {
    let Some(path) = corpus("attribute_vocabulary.yaml") else {
        return;
    };
    let yaml: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>> =
        serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let table = AttributeTable::default_vocabulary();
    let mut count = 0;
    for (name, ty) in yaml.values().flat_map(BTreeMap::values).flatten() {
        assert_eq!(
            table.value_type(name).map(ValueType::as_str),
            Some(ty.as_str()),
            "{name}"
        );
        count += 1;
    }
    eprintln!("attribute_vocabulary.yaml: {count} declarations are the same");
}

/// Kinds whose `spec` is a rule or an instance's parameters.
const INSTANCE_KINDS: [&str; 12] = [
    "apikey",
    "authorization",
    "checknothing",
    "edge",
    "instance",
    "kubernetes",
    "listentry",
    "logentry",
    "metric",
    "quota",
    "reportnothing",
    "tracespan",
];

fn expressions_of(doc: &Json) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    let spec = &doc["spec"];
    match doc["kind"].as_str() {
        Some("rule") => {
            let texts = spec["match"]
                .as_str()
                .into_iter()
                .map(|m| (true, m.to_owned()));
            found.extend(texts.filter(|(_, m)| !m.is_empty()));
        }
        Some("instance") => strings(&spec["params"], &mut found),
        Some(kind) if INSTANCE_KINDS.contains(&kind) => strings(spec, &mut found),
        _ => {}
    }
    found
}

fn strings(json: &Json, found: &mut Vec<(bool, String)>) {
    match json {
        Json::String(text) if text.is_empty() => {} // an empty parameter is none
        Json::String(text) => found.push((false, text.clone())),
        Json::Object(map) => map
            .iter()
            // Bindings read a generator's output; `name` and the like are no expressions.
            .filter(|(key, _)| {
                !["attribute_bindings", "attributeBindings", "name"].contains(&key.as_str())
            })
            .for_each(|(_, v)| strings(v, found)),
        Json::Array(list) => list.iter().for_each(|v| strings(v, found)),
        _ => {}
    }
}

fn yaml_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            yaml_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "yaml") {
            found.push(path);
        }
    }
}

/// Rules and instances that Istio shipped compile with the built-in vocabulary.
#[test]
fn shipped_configuration() {
    let Some(index) = corpus("yaml/INDEX.json") else {
        return;
    };
    let root = index.parent().unwrap();
    let mut files = Vec::new();
    for folder in [
        "1.0.9/install",
        "1.4.10/install",
        "1.0.9/samples",
        "1.4.10/samples",
        "1.0.9/mixer/testdata",
        "1.4.10/mixer/testdata",
        "1.0.9/mixer/adapter",
        "1.4.10/mixer/adapter",
    ] {
        let folder = root.join(folder);
        if folder.is_dir() {
            yaml_files(&folder, &mut files);
        }
    }
    files.sort();
    let table = AttributeTable::default_vocabulary();
    let (mut rules, mut params, mut failures) = (0, 0, Vec::new());
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        let Ok(docs) = serde_saphyr::from_multiple::<Json>(&text) else {
            continue;
        }; // a template
        for (is_match, expr) in docs.iter().flat_map(expressions_of) {
            match Expression::compile(&expr, &table) {
                Ok(e) if !is_match => {
                    params += 1;
                    assert!(e.faults().is_empty(), "{expr}: {:?}", e.faults());
                }
                Ok(e) if e.value_type() == ValueType::Bool => rules += 1,
                Ok(e) => failures.push(format!("{}: {expr}: {}", file.display(), e.value_type())),
                Err(e) => failures.push(format!("{}: {expr}: {e}", file.display())),
            }
        }
    }
    eprintln!(
        "shipped configuration: {rules} matches and {params} parameters compile, {} do not",
        failures.len()
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
