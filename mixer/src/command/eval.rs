//! `mixer eval`: one expression with attributes from flags or YAML, or a file of rows, so that anybody can run
//! their own vectors.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use lateen_engine::{
    AttributeTable, Bag, Expression, Language, Outcome, Tracker, Value, ValueType,
    expression::{Function, Param},
};
use serde::Serialize;
use serde_json::{Value as Json, json};

use super::attributes::{Attributes, read, types};

/// `mixer eval`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The expression.
    #[arg(required_unless_present = "jsonl", conflicts_with = "jsonl")]
    pub expression: Option<String>,
    /// Rows of `id`, `expr`, `manifest` (a name in --manifest, or an object of types) and `attributes`
    /// (`{NAME: {type, value}}`), one JSON object a line.
    #[arg(long, value_name = "FILE", requires = "manifest")]
    pub jsonl: Option<PathBuf>,
    /// The language: cexl, cel or compat.
    #[arg(long, value_name = "LANGUAGE", default_value = "cexl")]
    pub lang: Language,
    /// Which attributes there are, and which are present.
    #[command(flatten)]
    pub attributes: Attributes,
}

/// Evaluates, and prints to `out`.
///
/// # Errors
/// The expression does not compile or has no value; a file cannot be read. What is wrong with a row is printed
/// as its result.
pub fn run(options: &Options, out: &mut impl Write) -> anyhow::Result<()> {
    if let (Some(rows), Some(manifest)) = (&options.jsonl, &options.attributes.manifest) {
        return run_rows(rows, manifest, options.lang, out);
    }
    let text = options
        .expression
        .as_deref()
        .context("there is no expression")?;
    let table = options.attributes.table()?;
    let bag = options.attributes.bag(&table)?;
    let expression = Expression::compile_any(options.lang, text, &table)
        .map_err(|error| anyhow::anyhow!("{error}\n  {text}\n  {}^", " ".repeat(error.at)))?;
    let mut tracker = Tracker::new();
    let result = expression.outcome(&bag, &mut tracker);
    let looked_at = tracker.names(&table).join(", ");
    match result {
        Ok(outcome) => {
            let Shown {
                value_type: ty,
                value,
            } = shown(&outcome, options.lang);
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            writeln!(
                out,
                "{value}\n  type        {ty}\n  looked at   {looked_at}"
            )?;
            Ok(())
        }
        Err(error) => {
            writeln!(out, "no value\n  looked at   {looked_at}")?;
            Err(error.into())
        }
    }
}

fn run_rows(
    rows: &Path,
    manifest: &Path,
    language: Language,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let manifests = read(manifest)?;
    let mut tables: HashMap<String, AttributeTable> = HashMap::new();
    let file =
        std::fs::File::open(rows).with_context(|| format!("cannot read {}", rows.display()))?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", rows.display()))?;
        if line.trim().is_empty() {
            continue;
        }
        let place = || format!("{}:{}", rows.display(), number + 1);
        let row: Json = serde_json::from_str(&line).with_context(place)?;
        let key = row["manifest"].to_string();
        if !tables.contains_key(&key) {
            let table = table(&row["manifest"], &manifests).with_context(place)?;
            tables.insert(key.clone(), table);
        }
        let table = tables
            .get(&key)
            .context("no manifest")
            .with_context(place)?;
        let answer = run_row(&row, table, language).with_context(place)?;
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

fn table(manifest: &Json, manifests: &Json) -> anyhow::Result<AttributeTable> {
    let declared = match manifest {
        Json::String(name) => {
            let found = &manifests["manifests"][name];
            anyhow::ensure!(
                found.is_object(),
                "the manifest file has no manifest {name}"
            );
            found
        }
        // A row that names none may read no attribute of a file of several.
        Json::Null if manifests["manifests"].is_object() => {
            return Ok(AttributeTable::new(Vec::<(String, ValueType)>::new())?);
        }
        Json::Null => manifests,
        inline => inline,
    };
    Ok(AttributeTable::new(types(declared)?)?)
}

/// What came of a row, in the order it is printed.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    id: &'a Json,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    value_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Shown>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compile_error: Option<String>,
    referenced: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(rename = "type")]
    value_type: &'static str,
    value: Json,
}

fn run_row<'r>(
    row: &'r Json,
    table: &AttributeTable,
    language: Language,
) -> anyhow::Result<Answer<'r>> {
    let mut answer = Answer {
        id: &row["id"],
        value_type: None,
        result: None,
        error: None,
        compile_error: None,
        referenced: Vec::new(),
    };
    let text = row["expr"].as_str().context("the row has no expr")?;
    let added = added(row)?;
    let compiled = match language {
        Language::Cexl => Expression::compile_with(text, table, &added),
        // CEL has no functions of one's own; Istio's are all there.
        Language::Cel | Language::Compat => Expression::compile_any(language, text, table),
    };
    let expression = match compiled {
        Ok(expression) => expression,
        Err(error) => {
            answer.compile_error = Some(error.to_string());
            return Ok(answer);
        }
    };
    let mut bag = Bag::new(table);
    for (name, given) in row["attributes"].as_object().into_iter().flatten() {
        // What the manifest lacks cannot be read by any expression.
        let Some(slot) = table.slot(name) else {
            continue;
        };
        let ty: ValueType = given["type"]
            .as_str()
            .with_context(|| format!("attribute {name} has no type"))?
            .parse()?;
        // An address of no bytes is no address.
        if ty == ValueType::IpAddress && given["value"] == "" {
            continue;
        }
        bag.set(
            slot,
            Value::from_json(ty, &given["value"]).with_context(|| name.clone())?,
        );
    }
    let mut tracker = Tracker::new();
    let result = expression.outcome(&bag, &mut tracker);
    answer.referenced = tracker.names(table);
    let ty = expression.known_type();
    answer.value_type = Some(ty.map_or("VALUE_TYPE_UNSPECIFIED", ValueType::as_str));
    match result {
        Ok(outcome) => answer.result = Some(shown(&outcome, language)),
        Err(error) => answer.error = Some(error.to_string()),
    }
    Ok(answer)
}

/// A result and the name of its type. CEL gives DNS names, e-mail addresses and URIs back as strings.
fn shown(outcome: &Outcome, language: Language) -> Shown {
    let (value_type, value) = match outcome {
        Outcome::Value(value) => {
            let ty = value.value_type();
            let is_text = language == Language::Cel && ty.is_text();
            let ty = if is_text { ValueType::String } else { ty };
            (ty.as_str(), value.to_json())
        }
        Outcome::Map(map) => ("CEL_MAP", json!(map)),
        Outcome::NoAddress => (ValueType::IpAddress.as_str(), json!("")),
    };
    Shown { value_type, value }
}

/// Functions that a row declares. What they do cannot be written in JSON; `reverse` is known.
fn added(row: &Json) -> anyhow::Result<Vec<Function>> {
    let param = |json: &Json| -> anyhow::Result<Param> {
        match json.as_str() {
            None | Some("ANY") => Ok(Param::Any),
            Some(name) => Ok(Param::Of(name.parse()?)),
        }
    };
    let declared = row["custom_functions"].as_array();
    declared
        .into_iter()
        .flatten()
        .map(|function| {
            let name = function["name"]
                .as_str()
                .context("a function has no name")?
                .to_owned();
            let is_method = function["instance"] == true;
            let target = is_method.then(|| param(&function["target"])).transpose()?;
            let params = function["args"].as_array().into_iter().flatten();
            let call: Arc<lateen_engine::expression::Body> = if name == "reverse" {
                Arc::new(|args: &[Value]| {
                    let text = args.first().and_then(Value::as_str).ok_or("no text")?;
                    Ok(Value::string(text.chars().rev().collect::<String>()))
                })
            } else {
                let name = name.clone();
                Arc::new(move |_: &[Value]| Err(format!("it is not known what {name} does")))
            };
            Ok(Function {
                target,
                params: params.map(param).collect::<anyhow::Result<_>>()?,
                returns: param(&function["returns"])?,
                name,
                call,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser as _;

    use super::*;
    use crate::command::{Cli, Command};

    fn eval(args: &[&str]) -> Result<String, String> {
        let args = ["mixer", "eval"].iter().chain(args);
        let Some(Command::Eval(options)) = Cli::try_parse_from(args).unwrap().command else {
            panic!("it is eval");
        };
        let mut out = Vec::new();
        match run(&options, &mut out) {
            Ok(()) => Ok(String::from_utf8(out).unwrap()),
            Err(error) => Err(format!("{error:#}")),
        }
    }

    #[test]
    fn one_expression_is_shown_with_what_it_depends_on() {
        let headers = "request.headers[user]=jason";
        assert_eq!(
            eval(&[r#"request.headers["user"] | "nobody""#, "-a", headers]),
            Ok("jason\n  type        STRING\n  looked at   request.headers, request.headers[user]\n".into())
        );
        assert_eq!(
            eval(&["--lang", "cel", "!has(source.ip) && response.code == 0"]),
            Ok("true\n  type        BOOL\n  looked at   -response.code, -source.ip\n".into())
        );
        assert_eq!(
            eval(&["source.name"]),
            Err("lookup failed: 'source.name'".into())
        );
        assert_eq!(
            eval(&["true && sorce.name"]),
            Err("unknown attribute sorce.name\n  true && sorce.name\n          ^".into())
        );
    }

    #[test]
    fn rows_are_answered_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = folder.path().join("manifest.json");
        let rows = folder.path().join("rows.jsonl");
        fs::write(
            &manifest,
            r#"{"manifests": {"m": {"as": "STRING", "ar": "STRING_MAP", "ip": "IP_ADDRESS"}}}"#,
        )
        .unwrap();
        let lines = [
            r#"{"id": 1, "expr": "ar[\"k\"] | as", "manifest": "m", "attributes": {"as": {"type": "STRING", "value": "x"}, "ar": {"type": "STRING_MAP", "value": {}}}}"#,
            r#"{"id": 2, "expr": "as", "manifest": "m", "attributes": {}}"#,
            r#"{"id": 3, "expr": "az", "manifest": {"as": "STRING"}}"#,
            r#"{"id": 4, "expr": "as.reverse()", "manifest": "m", "attributes": {"as": {"type": "STRING", "value": "xy"}}, "custom_functions": [{"name": "reverse", "instance": true, "target": "STRING", "args": [], "returns": "STRING"}]}"#,
        ];
        fs::write(&rows, lines.join("\n")).unwrap();
        let paths = [rows.to_str().unwrap(), manifest.to_str().unwrap()];
        let args = |lang| ["--jsonl", paths[0], "--manifest", paths[1], "--lang", lang];
        assert_eq!(
            eval(&args("cexl")).unwrap().lines().collect::<Vec<_>>(),
            [
                r#"{"id":1,"type":"STRING","result":{"type":"STRING","value":"x"},"referenced":["-ar[k]","ar","as"]}"#,
                r#"{"id":2,"type":"STRING","error":"lookup failed: 'as'","referenced":["-as"]}"#,
                r#"{"id":3,"compile_error":"unknown attribute az","referenced":[]}"#,
                r#"{"id":4,"type":"STRING","result":{"type":"STRING","value":"yx"},"referenced":["as"]}"#,
            ]
        );
        let compat = eval(&args("compat")).unwrap();
        assert!(
            compat.contains(r#"{"id":2,"type":"STRING","result":{"type":"STRING","value":""},"referenced":["-as"]}"#),
            "{compat}"
        );
        fs::write(&rows, r#"{"id": 1, "manifest": "m"}"#).unwrap();
        let error = eval(&args("cexl")).unwrap_err();
        assert!(
            error.ends_with("rows.jsonl:1: the row has no expr"),
            "{error}"
        );
    }
}
