//! Functions that expressions may call, and their types.

use std::fmt;
use std::sync::{Arc, LazyLock};

use quick_cache::sync::Cache;
use regex::{Regex, RegexBuilder};

use super::EvalError;
use crate::text::Text;
use crate::value::{Value, ValueType};

/// Type of a parameter or a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Param {
    /// This type.
    Of(ValueType),
    /// One type, the same for every `Any` of a call.
    Any,
}

/// A function added to those of the language. It may not look at anything but its arguments.
#[derive(Clone)]
pub struct Function {
    /// How expressions call it.
    pub name: String,
    /// For a method, the type of what it is called on; its value is the first argument.
    pub target: Option<Param>,
    /// Types of the arguments.
    pub params: Vec<Param>,
    /// Type of the result.
    pub returns: Param,
    /// Computes the result.
    pub call: Arc<Body>,
}

/// What a function does.
pub type Body = dyn Fn(&[Value]) -> Result<Value, String> + Send + Sync;

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} -> {:?}", self.name, self.params, self.returns)
    }
}

/// What the language itself can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Builtin {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Default,
    Or,
    And,
    Index,
    Add,
    Conditional,
    ConditionalString,
    ToLower,
    Size,
    Ip,
    Timestamp,
    DnsName,
    Email,
    Uri,
    Match,
    Matches,
    StartsWith,
    EndsWith,
    EmptyStringMap,
}

/// Name, target type, parameter types and result type.
#[derive(Debug)]
pub(super) struct Signature<'f> {
    pub(super) target: Option<Param>,
    pub(super) params: &'f [Param],
    pub(super) returns: Param,
    pub(super) action: Action<'f>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Action<'f> {
    Builtin(Builtin),
    Added(&'f Function),
}

const ANY: Param = Param::Any;
const STRING: Param = Param::Of(ValueType::String);
const BOOL: Param = Param::Of(ValueType::Bool);
const MAP: Param = Param::Of(ValueType::StringMap);

type Row = (
    &'static str,
    Builtin,
    Option<Param>,
    &'static [Param],
    Param,
);

static BUILTINS: &[Row] = &[
    ("EQ", Builtin::Equal, None, &[ANY, ANY], BOOL),
    ("NEQ", Builtin::NotEqual, None, &[ANY, ANY], BOOL),
    ("LT", Builtin::Less, None, &[ANY, ANY], BOOL),
    ("LEQ", Builtin::LessOrEqual, None, &[ANY, ANY], BOOL),
    ("GT", Builtin::Greater, None, &[ANY, ANY], BOOL),
    ("GEQ", Builtin::GreaterOrEqual, None, &[ANY, ANY], BOOL),
    ("OR", Builtin::Default, None, &[ANY, ANY], ANY),
    ("LOR", Builtin::Or, None, &[BOOL, BOOL], BOOL),
    ("LAND", Builtin::And, None, &[BOOL, BOOL], BOOL),
    ("INDEX", Builtin::Index, None, &[MAP, STRING], STRING),
    ("ADD", Builtin::Add, None, &[ANY, ANY], ANY),
    (
        "conditional",
        Builtin::Conditional,
        None,
        &[BOOL, ANY, ANY],
        ANY,
    ),
    (
        "conditionalString",
        Builtin::ConditionalString,
        None,
        &[BOOL, STRING, STRING],
        STRING,
    ),
    ("toLower", Builtin::ToLower, None, &[STRING], STRING),
    (
        "size",
        Builtin::Size,
        None,
        &[ANY],
        Param::Of(ValueType::Int64),
    ),
    (
        "ip",
        Builtin::Ip,
        None,
        &[STRING],
        Param::Of(ValueType::IpAddress),
    ),
    (
        "timestamp",
        Builtin::Timestamp,
        None,
        &[STRING],
        Param::Of(ValueType::Timestamp),
    ),
    (
        "dnsName",
        Builtin::DnsName,
        None,
        &[STRING],
        Param::Of(ValueType::DnsName),
    ),
    (
        "email",
        Builtin::Email,
        None,
        &[STRING],
        Param::Of(ValueType::EmailAddress),
    ),
    (
        "uri",
        Builtin::Uri,
        None,
        &[STRING],
        Param::Of(ValueType::Uri),
    ),
    ("match", Builtin::Match, None, &[STRING, STRING], BOOL),
    ("matches", Builtin::Matches, Some(STRING), &[STRING], BOOL),
    (
        "startsWith",
        Builtin::StartsWith,
        Some(STRING),
        &[STRING],
        BOOL,
    ),
    ("endsWith", Builtin::EndsWith, Some(STRING), &[STRING], BOOL),
    ("emptyStringMap", Builtin::EmptyStringMap, None, &[], MAP),
];

/// Finds a function; an added one hides a builtin of the same name.
pub(super) fn signature<'f>(name: &str, added: &'f [Function]) -> Option<Signature<'f>> {
    if let Some(function) = added.iter().find(|f| f.name == name) {
        return Some(Signature {
            target: function.target,
            params: &function.params,
            returns: function.returns,
            action: Action::Added(function),
        });
    }
    let (_, builtin, target, params, returns) = BUILTINS.iter().find(|(n, ..)| *n == name)?;
    Some(Signature {
        target: *target,
        params,
        returns: *returns,
        action: Action::Builtin(*builtin),
    })
}

/// `match`: a trailing `*` asks for a prefix, else a leading `*` for a suffix, else all must be equal.
pub(super) fn matches_glob(text: &str, pattern: &str) -> bool {
    if let Some(prefix) = pattern.strip_suffix('*') {
        return text.starts_with(prefix);
    }
    match pattern.strip_prefix('*') {
        Some(suffix) => text.ends_with(suffix),
        None => text == pattern,
    }
}

/// Longest pattern that is compiled while a request waits.
const MAX_PATTERN_BYTES: usize = 4096;
/// Memory of one compiled pattern, in bytes.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// Patterns kept that came from attributes.
const CACHED_PATTERNS: usize = 256;

static PATTERNS: LazyLock<Cache<Text, Regex>> = LazyLock::new(|| Cache::new(CACHED_PATTERNS));

/// Compiles a pattern.
pub(super) fn regex(pattern: &str) -> Result<Regex, EvalError> {
    let fail = |reason: String| EvalError::Regex {
        pattern: pattern.to_owned(),
        reason,
    };
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(fail(format!("longer than {MAX_PATTERN_BYTES} bytes")));
    }
    RegexBuilder::new(pattern)
        .size_limit(MAX_REGEX_BYTES)
        .build()
        .map_err(|e| fail(e.to_string()))
}

/// A pattern that is known only now, compiled or from the cache.
pub(super) fn cached_regex(pattern: &str) -> Result<Regex, EvalError> {
    if let Some(found) = PATTERNS.get(pattern) {
        return Ok(found);
    }
    let compiled = regex(pattern)?;
    PATTERNS.insert(Text::from(pattern), compiled.clone());
    Ok(compiled)
}
