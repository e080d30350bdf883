//! The shape of every kind: fields, types, limits; written down in `schema/*.schema`.
//!
//! [`normal`] checks a spec and gives it back in protobuf's normal form: lower-camel names, no nulls,
//! numbers as numbers. The rules after it need not ask again what type something has.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Number, Value};

use super::Finding;
use super::text;

pub(crate) mod open_api;

/// Objects nested deeper than this are refused.
const DEPTH_LIMIT: usize = 64;

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let mut schema = Schema::default();
    for text in [
        include_str!("schema/networking.schema"),
        include_str!("schema/security.schema"),
        include_str!("schema/older.schema"),
    ] {
        schema.read(text);
    }
    schema
});

#[derive(Debug, Default)]
struct Schema {
    messages: HashMap<&'static str, Message>,
}

#[derive(Debug, Default)]
struct Message {
    fields: HashMap<&'static str, Field>,
    /// Fields of which one at most may be set.
    oneofs: Vec<Vec<&'static str>>,
}

#[derive(Debug)]
struct Field {
    kind: Kind,
    required: bool,
    limits: Limits,
}

#[derive(Debug)]
enum Kind {
    Text,
    Flag,
    Integer { min: i128, max: i128 },
    Number,
    Duration,
    Any,
    Struct,
    Enum(Vec<&'static str>),
    Message(&'static str),
    List(Box<Kind>),
    Map(Box<Kind>),
}

/// Bounds, both ends inclusive.
type Bounds = (f64, f64);

#[derive(Debug, Default)]
struct Limits {
    /// Value of a number.
    range: Option<Bounds>,
    /// Characters of a text.
    len: Option<Bounds>,
    /// Entries of a list or map.
    count: Option<Bounds>,
    /// Characters of each text in a list or map.
    each: Option<Bounds>,
    /// What a text must match.
    pattern: Option<Regex>,
}

impl Schema {
    fn read(&mut self, text: &'static str) {
        let mut name = "";
        for line in text.lines() {
            let body = line.trim();
            if body.is_empty() || body.starts_with('#') {
                continue;
            }
            if !line.starts_with(' ') {
                name = body.trim_end_matches(':');
                self.messages.insert(name, Message::default());
                continue;
            }
            let message = self.messages.entry(name).or_default();
            if let Some(fields) = body.strip_prefix("oneof ") {
                message.oneofs.push(fields.split(' ').collect());
                continue;
            }
            let (names, rest) = body.split_once(": ").expect("NAMES: TYPE");
            let (kind, limits) = rest.split_once(' ').unwrap_or((rest, ""));
            for field in names.split(' ') {
                let bare = field.trim_end_matches('!');
                message.fields.insert(
                    bare,
                    Field {
                        kind: Kind::read(kind),
                        required: bare.len() != field.len(),
                        limits: Limits::read(limits),
                    },
                );
            }
        }
    }
}

impl Kind {
    fn read(text: &'static str) -> Self {
        let inner = |open: char, close: char| {
            text.strip_prefix(open)
                .and_then(|rest| rest.strip_suffix(close))
        };
        if let Some(item) = inner('[', ']') {
            return Self::List(Box::new(Self::read(item)));
        }
        if let Some(item) = inner('{', '}') {
            return Self::Map(Box::new(Self::read(item)));
        }
        if let Some(names) = text
            .strip_prefix("enum(")
            .and_then(|rest| rest.strip_suffix(')'))
        {
            return Self::Enum(names.split('|').collect());
        }
        match text {
            "string" => Self::Text,
            "bool" => Self::Flag,
            "int32" => Self::Integer {
                min: i32::MIN.into(),
                max: i32::MAX.into(),
            },
            "int64" => Self::Integer {
                min: i64::MIN.into(),
                max: i64::MAX.into(),
            },
            "uint32" => Self::Integer {
                min: 0,
                max: u32::MAX.into(),
            },
            "uint64" => Self::Integer {
                min: 0,
                max: u64::MAX.into(),
            },
            "double" => Self::Number,
            "duration" => Self::Duration,
            "any" => Self::Any,
            "struct" => Self::Struct,
            message => Self::Message(message),
        }
    }
}

impl Limits {
    fn read(text: &'static str) -> Self {
        let bounds = |text: &str| {
            let (low, high) = text.split_once("..").expect("LOW..HIGH");
            let high = if high.is_empty() {
                f64::INFINITY
            } else {
                high.parse().expect("a number")
            };
            Some((low.parse().expect("a number"), high))
        };
        let mut limits = Self::default();
        for part in text.split(' ').filter(|part| !part.is_empty()) {
            match part.split_once('=').expect("NAME=LIMIT") {
                ("range", value) => limits.range = bounds(value),
                ("len", value) => limits.len = bounds(value),
                ("count", value) => limits.count = bounds(value),
                ("each", value) => limits.each = bounds(value),
                ("match", value) => limits.pattern = Some(Regex::new(value).expect("a constant")),
                (other, _) => unreachable!("limit {other}"),
            }
        }
        limits
    }
}

/// The message a kind's spec is, if we know the kind.
pub(crate) fn message_of(group: &str, kind: &str) -> Option<&'static str> {
    let name = match (group, kind) {
        (
            "networking.istio.io",
            "VirtualService" | "DestinationRule" | "Gateway" | "ServiceEntry" | "WorkloadEntry"
            | "WorkloadGroup" | "Sidecar" | "EnvoyFilter" | "ProxyConfig",
        )
        | (
            "security.istio.io",
            "PeerAuthentication" | "RequestAuthentication" | "AuthorizationPolicy",
        )
        | ("telemetry.istio.io", "Telemetry")
        | ("extensions.istio.io", "WasmPlugin" | "TrafficExtension")
        | ("rbac.istio.io", "ServiceRole" | "ServiceRoleBinding")
        | (
            "config.istio.io",
            "QuotaSpec" | "QuotaSpecBinding" | "HTTPAPISpec" | "HTTPAPISpecBinding" | "RouteRule"
            | "DestinationPolicy" | "EgressRule",
        ) => kind,
        ("authentication.istio.io", "Policy" | "MeshPolicy") => "AuthenticationPolicy",
        ("rbac.istio.io", "RbacConfig" | "ClusterRbacConfig") => "RbacConfig",
        _ => return None,
    };
    SCHEMA.messages.get_key_value(name).map(|(name, _)| *name)
}

/// Checks `value` against a message; the normal form, and what is wrong.
pub(crate) fn normal(message: &'static str, value: &Value, path: &str) -> (Value, Vec<Finding>) {
    let mut reader = Reader {
        path: path.to_owned(),
        findings: Vec::new(),
        depth: 0,
    };
    let value = match value {
        Value::Null => Value::Object(Map::new()),
        value => reader.message(message, value),
    };
    (value, reader.findings)
}

struct Reader {
    path: String,
    findings: Vec<Finding>,
    depth: usize,
}

impl Reader {
    fn wrong(&mut self, reason: impl Into<String>) -> Value {
        self.findings.push(Finding::error(&self.path, reason));
        Value::Null
    }

    /// Does `work` one step further down.
    fn below<T>(&mut self, step: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.path.len();
        if !step.starts_with('[') && !self.path.is_empty() {
            self.path.push('.');
        }
        self.path.push_str(step);
        self.depth += 1;
        let done = work(self);
        self.depth -= 1;
        self.path.truncate(length);
        done
    }

    fn message(&mut self, name: &'static str, value: &Value) -> Value {
        let Value::Object(given) = value else {
            return self.wrong(format!("must be a map of fields, not {}", shown(value)));
        };
        if self.depth > DEPTH_LIMIT {
            return self.wrong("nested too deeply");
        }
        let message = SCHEMA
            .messages
            .get(name)
            .expect("a test has looked up every message");
        let mut normal = Map::new();
        for (key, value) in given {
            let camel = camel(key);
            let Some((known, field)) = message.fields.get_key_value(camel.as_str()) else {
                let hint = similar(key, message.fields.keys().copied());
                let mut finding = self.below(key, |reader| {
                    Finding::error(
                        &reader.path,
                        format!("unknown field: {name} has no {key:?}"),
                    )
                });
                finding.hint = hint.map_or_else(
                    || {
                        let mut names: Vec<&str> = message.fields.keys().copied().collect();
                        names.sort_unstable();
                        format!("fields are {}", names.join(", "))
                    },
                    |name| format!("did you mean {name}?"),
                );
                self.findings.push(finding);
                continue;
            };
            if value.is_null() && !matches!(field.kind, Kind::Message("OlderMutualTls")) {
                continue;
            }
            if normal.contains_key(*known) {
                self.below(key, |reader| reader.wrong("given twice, in two spellings"));
                continue;
            }
            let value = self.below(key, |reader| reader.field(field, value));
            if !value.is_null() {
                normal.insert((*known).to_owned(), value);
            }
        }
        for (name, field) in &message.fields {
            if field.required
                && !normal.contains_key(*name)
                && !given
                    .keys()
                    .any(|key| camel(key) == *name && !given[key].is_null())
            {
                self.below(name, |reader| reader.wrong("missing; it is required"));
            }
        }
        for oneof in &message.oneofs {
            let set: Vec<&str> = oneof
                .iter()
                .copied()
                .filter(|name| normal.contains_key(*name))
                .collect();
            if set.len() > 1 {
                self.wrong(format!("only one of {} may be set", set.join(", ")));
            }
        }
        Value::Object(normal)
    }

    fn field(&mut self, field: &Field, value: &Value) -> Value {
        let value = match (&field.kind, value) {
            (Kind::Message("OlderMutualTls"), Value::Null) => Value::Object(Map::new()),
            (kind, value) => self.kind(kind, value),
        };
        self.limits(&field.limits, &value);
        value
    }

    fn limits(&mut self, limits: &Limits, value: &Value) {
        let outside = |bounds: &Bounds, value: f64| value < bounds.0 || value > bounds.1;
        let words = |bounds: &Bounds| match *bounds {
            (low, high) if high.is_infinite() => format!("at least {low}"),
            (low, high) => format!("between {low} and {high}"),
        };
        if let (Some(bounds), Some(number)) = (&limits.range, value.as_f64())
            && outside(bounds, number)
        {
            self.wrong(format!("{number} is not {}", words(bounds)));
        }
        if let Value::String(text) = value {
            if let Some(bounds) = &limits.len
                && outside(bounds, text.chars().count() as f64)
            {
                self.wrong(if text.is_empty() {
                    "may not be empty".to_owned()
                } else {
                    format!(
                        "{} characters; must be {}",
                        text.chars().count(),
                        words(bounds)
                    )
                });
            }
            if let Some(pattern) = &limits.pattern
                && !pattern.is_match(text)
            {
                self.wrong(format!("{text:?} does not match {}", pattern.as_str()));
            }
        }
        let (entries, texts): (usize, Vec<(String, &Value)>) = match value {
            Value::Array(all) => (
                all.len(),
                all.iter()
                    .enumerate()
                    .map(|(index, value)| (format!("[{index}]"), value))
                    .collect(),
            ),
            Value::Object(all) => (
                all.len(),
                all.iter()
                    .map(|(key, value)| (key.clone(), value))
                    .collect(),
            ),
            _ => return,
        };
        if let Some(bounds) = &limits.count
            && outside(bounds, entries as f64)
        {
            self.wrong(format!("{entries} entries; must be {}", words(bounds)));
        }
        if let Some(bounds) = &limits.each {
            for (step, value) in texts {
                if let Value::String(text) = value
                    && outside(bounds, text.chars().count() as f64)
                {
                    self.below(&step, |reader| {
                        reader.wrong(if text.is_empty() {
                            "may not be empty".to_owned()
                        } else {
                            format!(
                                "{} characters; must be {}",
                                text.chars().count(),
                                words(bounds)
                            )
                        })
                    });
                }
            }
        }
    }

    fn kind(&mut self, kind: &Kind, value: &Value) -> Value {
        match (kind, value) {
            (Kind::Text, Value::String(_))
            | (Kind::Flag, Value::Bool(_))
            | (Kind::Any, _)
            | (Kind::Struct, Value::Object(_))
            | (Kind::Number, Value::Number(_)) => value.clone(),
            (Kind::Text, Value::Number(_) | Value::Bool(_)) => {
                self.wrong(format!("must be a string; put {value} in quotes"))
            }
            (Kind::Integer { min, max }, _) => self.integer(*min, *max, value),
            (Kind::Number, Value::String(text)) => {
                match text.parse::<f64>().ok().and_then(Number::from_f64) {
                    Some(number) => Value::Number(number),
                    None => self.wrong(format!("{text:?} is not a number")),
                }
            }
            (Kind::Duration, Value::String(text)) => {
                if text::duration(text).is_some() {
                    value.clone()
                } else {
                    self.wrong(format!("{text:?} is not a duration such as \"1.5s\""))
                }
            }
            (Kind::Enum(names), Value::String(text)) => {
                if names.contains(&text.as_str()) {
                    value.clone()
                } else {
                    self.wrong(format!("{text:?} is not one of {}", names.join(", ")))
                }
            }
            (Kind::Enum(names), Value::Number(number)) => {
                match number
                    .as_u64()
                    .and_then(|number| names.get(usize::try_from(number).ok()?))
                {
                    Some(name) => Value::String((*name).to_owned()),
                    None => self.wrong(format!("{number} is not one of {}", names.join(", "))),
                }
            }
            (Kind::Message(name), value) => self.message(name, value),
            (Kind::List(item), Value::Array(all)) => Value::Array(
                all.iter()
                    .enumerate()
                    .map(|(index, value)| {
                        self.below(&format!("[{index}]"), |reader| match value {
                            Value::Null => reader.wrong("an entry may not be empty; remove it"),
                            value => reader.kind(item, value),
                        })
                    })
                    .collect(),
            ),
            (Kind::Map(item), Value::Object(all)) => {
                let mut normal = Map::new();
                for (key, value) in all {
                    let value = self.below(key, |reader| match value {
                        Value::Null => reader.wrong("may not be empty"),
                        value => reader.kind(item, value),
                    });
                    normal.insert(key.clone(), value);
                }
                Value::Object(normal)
            }
            (Kind::List(_), value) => self.wrong(format!(
                "must be a list (lines that begin with -), not {}",
                shown(value)
            )),
            (Kind::Map(_) | Kind::Struct, value) => {
                self.wrong(format!("must be a map, not {}", shown(value)))
            }
            (Kind::Flag, value) => {
                self.wrong(format!("must be true or false, not {}", shown(value)))
            }
            (Kind::Number, value) => self.wrong(format!("must be a number, not {}", shown(value))),
            (Kind::Text, value) => self.wrong(format!("must be a string, not {}", shown(value))),
            (Kind::Duration, value) => self.wrong(format!(
                "must be a duration such as \"1.5s\", not {}",
                shown(value)
            )),
            (Kind::Enum(names), value) => self.wrong(format!(
                "must be one of {}, not {}",
                names.join(", "),
                shown(value)
            )),
        }
    }

    fn integer(&mut self, min: i128, max: i128, value: &Value) -> Value {
        let number: Option<i128> = match value {
            Value::Number(number) => number
                .as_i64()
                .map(i128::from)
                .or_else(|| number.as_u64().map(i128::from))
                .or_else(|| {
                    let number = number.as_f64()?;
                    // 2^53: every whole number up to it is exact
                    (number.fract() == 0.0 && number.abs() < 9e15).then(|| {
                        #[allow(clippy::cast_possible_truncation, reason = "whole and small")]
                        let whole = number as i64;
                        i128::from(whole)
                    })
                }),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        match number {
            Some(number) if number >= min && number <= max => match i64::try_from(number) {
                Ok(number) => Value::Number(number.into()),
                Err(_) => value.clone(),
            },
            Some(number) => self.wrong(format!("{number} is not between {min} and {max}")),
            None => self.wrong(format!("must be a whole number, not {}", shown(value))),
        }
    }
}

/// A value as a message shows it: short.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a map".into(),
        other => {
            let text = other.to_string();
            if text.chars().count() > 60 {
                format!("{}…", text.chars().take(60).collect::<String>())
            } else {
                text
            }
        }
    }
}

/// protobuf's JSON name of a field: `export_to` is `exportTo`.
fn camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        if c == '_' {
            upper = true;
        } else if upper {
            out.extend(c.to_uppercase());
            upper = false;
        } else {
            out.push(c);
        }
    }
    out
}

/// A known name that differs little from what was written.
fn similar<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| {
            (
                distance(&name.to_lowercase(), &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(distance, candidate)| *distance <= candidate.len() / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance; names of more than 64 bytes are far from everything.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let above = *cell;
            left = (corner + usize::from(x != y)).min(left + 1).min(above + 1);
            corner = above;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_message_a_field_names_is_written_down() {
        fn named(kind: &Kind) -> Option<&'static str> {
            match kind {
                Kind::Message(name) => Some(name),
                Kind::List(item) | Kind::Map(item) => named(item),
                _ => None,
            }
        }
        for (name, message) in &SCHEMA.messages {
            for (field, what) in &message.fields {
                if let Some(inner) = named(&what.kind) {
                    assert!(
                        SCHEMA.messages.contains_key(inner),
                        "{name}.{field}: {inner}"
                    );
                }
            }
            for field in message.oneofs.iter().flatten() {
                assert!(message.fields.contains_key(field), "{name}: oneof {field}");
            }
        }
    }

    fn findings(message: &'static str, value: Value) -> Vec<String> {
        normal(message, &value, "spec")
            .1
            .iter()
            .map(|finding| format!("{}: {} ({})", finding.field, finding.reason, finding.hint))
            .collect()
    }

    #[test]
    fn the_normal_form_is_protobufs() {
        let (value, wrong) = normal(
            "VirtualService",
            &json!({"export_to": ["."], "tcp": null, "http": [{"match": [{"port": "80"}], "timeout": "1s"}]}),
            "spec",
        );
        assert_eq!(wrong, []);
        assert_eq!(
            value,
            json!({"exportTo": ["."], "http": [{"match": [{"port": 80}], "timeout": "1s"}]})
        );
        let (value, _) = normal("PeerAuthenticationMethod", &json!({"mtls": null}), "");
        assert_eq!(value, json!({"mtls": {}}));
    }

    #[test]
    fn what_is_wrong_is_told_where_and_what_to_do() {
        assert_eq!(
            findings(
                "VirtualService",
                json!({"host": [], "http": [{"match": {}, "timeout": 5, "retries": {"attempts": "x"}}]})
            ),
            [
                "spec.host: unknown field: VirtualService has no \"host\" (did you mean hosts?)",
                "spec.http[0].match: must be a list (lines that begin with -), not a map ()",
                "spec.http[0].retries.attempts: must be a whole number, not \"x\" ()",
                "spec.http[0].timeout: must be a duration such as \"1.5s\", not 5 ()",
            ]
        );
        assert_eq!(
            findings("StringMatch", json!({"exact": "a", "regex": "b"})),
            ["spec: only one of exact, regex may be set ()"]
        );
        assert_eq!(
            findings("Subset", json!({"name": "v1", "labels": {"version": 1.0}})),
            ["spec.labels.version: must be a string; put 1.0 in quotes ()"]
        );
        assert_eq!(
            findings("MutualTLS", json!({"mode": "strict"})),
            ["spec.mode: \"strict\" is not one of UNSET, DISABLE, PERMISSIVE, STRICT ()"]
        );
        assert_eq!(
            findings("LiteralTag", json!({})),
            ["spec.value: missing; it is required ()"]
        );
    }
}
