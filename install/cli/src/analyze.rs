//! `lateen analyze`: what is wrong with configuration taken together, with Istio's codes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use lateen_config::analyze::{Input, Level, Message, Resource, analyze, analyzers};
use lateen_config::yaml::documents;
use serde_json::{Value, json};

use crate::source;
use crate::terminal::{bold, paint_error, paint_warning};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Files, or directories with all below them; `-` is standard input.
    #[arg(short, long = "filename", value_name = "FILE", num_args = 1.., required_unless_present = "list")]
    filenames: Vec<PathBuf>,
    /// How to print the messages.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// The mesh configuration, instead of the ConfigMap `istio` among the files.
    #[arg(long, value_name = "FILE")]
    mesh_config: Option<PathBuf>,
    /// The mesh networks, instead of those of that ConfigMap.
    #[arg(long, value_name = "FILE")]
    mesh_networks: Option<PathBuf>,
    /// Run this analyzer only (may be given several times; --list names them).
    #[arg(long, value_name = "NAME")]
    analyzer: Vec<String>,
    /// Leave out messages with this code, or this code of this resource (`IST0102` or
    /// `IST0102=Namespace shop`); may be given several times.
    #[arg(short = 'S', long, value_name = "CODE[=RESOURCE]")]
    suppress: Vec<String>,
    /// From which level on the exit code is 1.
    #[arg(long, value_enum, default_value_t = Threshold::Error)]
    failure_threshold: Threshold,
    /// Name the analyzers and end.
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Output {
    /// `FILE:LINE: LEVEL [CODE] RESOURCE: MESSAGE`.
    Text,
    /// A list of `{"code", "level", "resource", "message", "file", "line"}`.
    Json,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Threshold {
    Info,
    Warning,
    Error,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if options.list {
        for name in analyzers() {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let files = source::read(&options.filenames)?;
    anyhow::ensure!(!files.is_empty(), "no YAML or JSON files there");
    for name in &options.analyzer {
        anyhow::ensure!(
            analyzers().any(|known| known == name) || name.starts_with("schemaValidation."),
            "there is no analyzer {name}; --list names them"
        );
    }
    let input = Input {
        resources: resources(&files)?,
        mesh_config: one(options.mesh_config.as_ref())?,
        mesh_networks: one(options.mesh_networks.as_ref())?,
    };
    let mut messages = analyze(&input, &options.analyzer);
    messages.retain(|message| {
        !options
            .suppress
            .iter()
            .any(|rule| suppresses(rule, message))
    });
    match options.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&as_json(&messages))?),
        Output::Text => print!("{}", as_text(&messages)),
    }
    let threshold = match options.failure_threshold {
        Threshold::Info => Level::Info,
        Threshold::Warning => Level::Warning,
        Threshold::Error => Level::Error,
    };
    let failed = messages.iter().any(|message| message.level >= threshold);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn resources(files: &[(String, String)]) -> anyhow::Result<Vec<Resource>> {
    let mut all = Vec::new();
    for (file, text) in files {
        let read = Resource::read(file, text)
            .map_err(|error| anyhow::anyhow!("{file}:{}: not valid YAML: {error}", error.line))?;
        all.extend(read);
    }
    Ok(all)
}

/// A file with one document.
fn one(path: Option<&PathBuf>) -> anyhow::Result<Value> {
    let Some(path) = path else {
        return Ok(Value::Null);
    };
    let files = source::read(std::slice::from_ref(path))?;
    let (file, text) = files.first().context("no file")?;
    let read = documents(text)
        .map_err(|error| anyhow::anyhow!("{file}:{}: not valid YAML: {error}", error.line))?;
    Ok(read
        .into_iter()
        .next()
        .map_or(Value::Null, |document| document.value))
}

fn suppresses(rule: &str, message: &Message) -> bool {
    match rule.split_once('=') {
        None => rule == message.code,
        Some((code, resource)) => code == message.code && resource == message.resource,
    }
}

fn as_json(messages: &[Message]) -> Value {
    messages
        .iter()
        .map(|message| {
            json!({
                "code": message.code,
                "level": message.level.name(),
                "resource": message.resource,
                "message": message.text,
                "file": message.file,
                "line": message.line,
            })
        })
        .collect()
}

fn as_text(messages: &[Message]) -> String {
    let mut out = String::new();
    for message in messages {
        let level = match message.level {
            Level::Error => paint_error("Error"),
            Level::Warning => paint_warning("Warning"),
            Level::Info => "Info".to_owned(),
        };
        out.push_str(&format!(
            "{}:{}: {level} [{}] ({}) {}\n",
            message.file, message.line, message.code, message.resource, message.text
        ));
    }
    if messages.is_empty() {
        out.push_str(&bold("Nothing to say.\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop }\n";

    fn said() -> Vec<Message> {
        let files = [("n.yaml".to_owned(), NAMESPACE.to_owned())];
        let input = Input {
            resources: resources(&files).unwrap(),
            ..Input::default()
        };
        analyze(&input, &[])
    }

    #[test]
    fn messages_are_printed_both_ways() {
        let messages = said();
        assert!(
            as_text(&messages)
                .starts_with("n.yaml:3: Info [IST0102] (Namespace shop) sidecars are not put"),
            "{}",
            as_text(&messages)
        );
        let json = as_json(&messages);
        assert_eq!(json[0]["code"], "IST0102");
        assert_eq!(json[0]["level"], "Info");
        assert_eq!(json[0]["resource"], "Namespace shop");
        assert_eq!(json[0]["line"], 3);
        assert_eq!(as_text(&[]), "Nothing to say.\n");
    }

    /// The documented example says what the page shows.
    #[test]
    fn the_page_is_true() {
        let page = include_str!("../../../docs/reference/validation.md");
        let yaml = page.split("```yaml\n").nth(2).unwrap();
        let text = yaml.split("```").next().unwrap().to_owned();
        let input = Input {
            resources: resources(&[("all.yaml".to_owned(), text)]).unwrap(),
            ..Input::default()
        };
        let block = format!(
            "$ lateen analyze -f all.yaml\n{}```",
            as_text(&analyze(&input, &[]))
        );
        assert!(page.contains(&block), "{block}");
    }

    #[test]
    fn messages_can_be_suppressed() {
        let message = &said()[0];
        assert!(suppresses("IST0102", message));
        assert!(suppresses("IST0102=Namespace shop", message));
        assert!(!suppresses("IST0102=Namespace other", message));
        assert!(!suppresses("IST0101", message));
    }

    #[test]
    fn what_is_not_yaml_is_told_where() {
        let error = resources(&[("x.yaml".to_owned(), "a: [\nb: 2\n".to_owned())]).unwrap_err();
        assert!(error.to_string().contains(": not valid YAML"), "{error}");
    }
}
