//! Go's template language, as much of it as our chart is written in: text into a tree. [`crate::run`] walks it.
//!
//! There are actions with trimming (`{{- … -}}`), comments, `if`, `else if`, `with`, `range`, `define`, `template`,
//! variables, pipelines, parentheses and fields. What is not here (methods, `break`, `block`) is refused by name, so a
//! chart that loads here means what it means to Helm.

use std::collections::BTreeMap;

use serde_json::Value;

/// Actions nested deeper than this are refused.
const DEPTH_LIMIT: usize = 64;

/// Why a template is none.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{file}:{line}: {reason}")]
pub struct SyntaxError {
    /// The file.
    pub file: String,
    /// Its line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// A part of a template.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// Line of the file it is written in.
    pub(crate) line: usize,
    pub(crate) action: Action,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    Text(String),
    Print(Pipeline),
    /// `$name := …`, or `$name = …` of one that is there.
    Set {
        name: String,
        is_new: bool,
        value: Pipeline,
    },
    /// The first branch whose condition holds; else the last part.
    If(Vec<(Pipeline, Vec<Node>)>, Vec<Node>),
    With {
        name: Option<String>,
        value: Pipeline,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
    Range {
        key: Option<String>,
        item: Option<String>,
        value: Pipeline,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
    /// `template "name" pipeline`.
    Call(String, Option<Pipeline>),
}

/// Commands; each gets the result of the one before it as its last argument.
pub(crate) type Pipeline = Vec<Command>;

/// A function with its arguments, or one operand.
pub(crate) type Command = Vec<Operand>;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Operand {
    pub(crate) base: Base,
    /// Fields taken of it.
    pub(crate) fields: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Base {
    Literal(Value),
    Dot,
    /// Without the dollar; empty for `$`.
    Variable(String),
    Function(String),
    Group(Pipeline),
}

/// The files of a chart: what each prints, and the templates they define for all.
#[derive(Debug, Default)]
pub struct Templates {
    pub(crate) files: BTreeMap<String, Vec<Node>>,
    pub(crate) defined: BTreeMap<String, (String, Vec<Node>)>,
}

impl Templates {
    /// Reads one more file.
    ///
    /// # Errors
    /// It is no template, or defines one that is there already.
    pub fn add(&mut self, file: &str, text: &str) -> Result<(), SyntaxError> {
        let mut parser = Parser {
            file,
            actions: split(file, text)?.into_iter().peekable(),
            line: 1,
            templates: self,
        };
        let (nodes, end) = parser.body(0)?;
        if let Some(end) = end {
            return Err(parser.wrong(format!("`{}` closes nothing", end.0)));
        }
        self.files.insert(file.to_owned(), nodes);
        Ok(())
    }
}

/// Text or the inside of an action, with its line.
enum Piece {
    Text(String),
    Action(String),
}

fn split(file: &str, text: &str) -> Result<Vec<(usize, Piece)>, SyntaxError> {
    let mut pieces = Vec::new();
    let (mut rest, mut line, mut trim_next) = (text, 1, false);
    while !rest.is_empty() {
        let start = rest.find("{{").unwrap_or(rest.len());
        let (before, after) = rest.split_at(start);
        let trims_before = after.starts_with("{{- ") || after.starts_with("{{-\n");
        let mut shown = before;
        if trim_next {
            shown = shown.trim_start();
        }
        if trims_before {
            shown = shown.trim_end();
        }
        if !shown.is_empty() {
            pieces.push((line, Piece::Text(shown.to_owned())));
        }
        line += before.matches('\n').count();
        if after.is_empty() {
            break;
        }
        let inside = if trims_before {
            &after[3..]
        } else {
            &after[2..]
        };
        let length = end_of_action(inside).ok_or_else(|| SyntaxError {
            file: file.to_owned(),
            line,
            reason: "`{{` without `}}`".to_owned(),
        })?;
        let mut action = &inside[..length];
        trim_next = action.ends_with(" -") || action.ends_with("\n-") || action.ends_with("*/ -");
        if trim_next {
            action = &action[..action.len() - 1];
        }
        let is_comment = action.trim().starts_with("/*");
        if !is_comment {
            pieces.push((line, Piece::Action(action.trim().to_owned())));
        }
        line += inside[..length].matches('\n').count();
        rest = &inside[length + 2..];
    }
    Ok(pieces)
}

/// Where `}}` is, outside of strings and comments.
fn end_of_action(text: &str) -> Option<usize> {
    if text.trim_start().starts_with("/*") {
        let close = text.find("*/")?;
        return text[close..].find("}}").map(|at| close + at);
    }
    let bytes = text.as_bytes();
    let (mut at, mut quote) = (0, None);
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (None, b'}') if bytes.get(at + 1) == Some(&b'}') => return Some(at),
            (None, open @ (b'"' | b'`')) => quote = Some(open),
            (Some(b'"'), b'\\') => at += 1,
            (Some(open), byte) if open == byte => quote = None,
            _ => {}
        }
        at += 1;
    }
    None
}

/// What ended a body: `end` or `else`, with the rest of the action.
type End = (&'static str, String);

struct Parser<'a> {
    file: &'a str,
    actions: std::iter::Peekable<std::vec::IntoIter<(usize, Piece)>>,
    line: usize,
    templates: &'a mut Templates,
}

impl Parser<'_> {
    fn wrong(&self, reason: impl Into<String>) -> SyntaxError {
        SyntaxError {
            file: self.file.to_owned(),
            line: self.line,
            reason: reason.into(),
        }
    }

    fn body(&mut self, depth: usize) -> Result<(Vec<Node>, Option<End>), SyntaxError> {
        if depth > DEPTH_LIMIT {
            return Err(self.wrong("nested too deeply"));
        }
        let mut nodes = Vec::new();
        while let Some((line, piece)) = self.actions.next() {
            self.line = line;
            let text = match piece {
                Piece::Text(text) => {
                    nodes.push(Node {
                        line,
                        action: Action::Text(text),
                    });
                    continue;
                }
                Piece::Action(text) => text,
            };
            let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((&text, ""));
            let rest = rest.trim();
            let action = match word {
                "end" => return Ok((nodes, Some(("end", rest.to_owned())))),
                "else" => return Ok((nodes, Some(("else", rest.to_owned())))),
                "if" => self.condition(rest, depth)?,
                "with" => self.with(rest, depth)?,
                "range" => self.range(rest, depth)?,
                "define" => {
                    self.define(rest, depth)?;
                    continue;
                }
                "template" => self.call(rest)?,
                "block" | "break" | "continue" => {
                    return Err(self.wrong(format!("`{word}` is not supported")));
                }
                _ => self.print(&text)?,
            };
            nodes.push(Node { line, action });
        }
        Ok((nodes, None))
    }

    /// The body of what was opened at `line`, which `else` does not end.
    fn closed(&mut self, depth: usize) -> Result<(Vec<Node>, Vec<Node>), SyntaxError> {
        let (body, end) = self.body(depth + 1)?;
        match end {
            Some(("end", _)) => Ok((body, Vec::new())),
            Some((_, rest)) if rest.is_empty() => {
                let (otherwise, end) = self.body(depth + 1)?;
                match end {
                    Some(("end", _)) => Ok((body, otherwise)),
                    _ => Err(self.wrong("`else` without `end`")),
                }
            }
            Some((_, rest)) => Err(self.wrong(format!("`else {rest}` is not supported here"))),
            None => Err(self.wrong("`end` is missing")),
        }
    }

    fn condition(&mut self, text: &str, depth: usize) -> Result<Action, SyntaxError> {
        let mut branches = Vec::new();
        let mut condition = self.pipeline(text)?;
        loop {
            let (body, end) = self.body(depth + 1)?;
            branches.push((condition, body));
            match end {
                Some(("end", _)) => return Ok(Action::If(branches, Vec::new())),
                Some((_, rest)) if rest.is_empty() => break,
                Some((_, rest)) => match rest.strip_prefix("if ") {
                    Some(text) => condition = self.pipeline(text)?,
                    None => return Err(self.wrong(format!("`else {rest}` is not supported"))),
                },
                None => return Err(self.wrong("`end` is missing")),
            }
        }
        match self.body(depth + 1)? {
            (otherwise, Some(("end", _))) => Ok(Action::If(branches, otherwise)),
            _ => Err(self.wrong("`else` without `end`")),
        }
    }

    fn with(&mut self, text: &str, depth: usize) -> Result<Action, SyntaxError> {
        let (mut names, value) = self.declared(text)?;
        let (body, otherwise) = self.closed(depth)?;
        Ok(Action::With {
            name: names.pop(),
            value,
            body,
            otherwise,
        })
    }

    fn range(&mut self, text: &str, depth: usize) -> Result<Action, SyntaxError> {
        let (mut names, value) = self.declared(text)?;
        let (body, otherwise) = self.closed(depth)?;
        let item = names.pop();
        Ok(Action::Range {
            key: names.pop(),
            item,
            value,
            body,
            otherwise,
        })
    }

    fn define(&mut self, text: &str, depth: usize) -> Result<(), SyntaxError> {
        let name = self.name(text)?;
        let (body, otherwise) = self.closed(depth)?;
        if !otherwise.is_empty() {
            return Err(self.wrong("`define` has no `else`"));
        }
        let old = self
            .templates
            .defined
            .insert(name.clone(), (self.file.to_owned(), body));
        match old {
            Some((file, _)) => Err(self.wrong(format!("{name:?} is defined in {file} already"))),
            None => Ok(()),
        }
    }

    fn call(&mut self, text: &str) -> Result<Action, SyntaxError> {
        let mut tokens = self.tokens(text)?;
        match tokens.first() {
            Some(Token::Literal(Value::String(name))) => {
                let name = name.clone();
                tokens.remove(0);
                let argument = match tokens.is_empty() {
                    true => None,
                    false => Some(self.commands(&mut tokens.into_iter().peekable(), false)?),
                };
                Ok(Action::Call(name, argument))
            }
            _ => Err(self.wrong("`template` needs a name in quotes")),
        }
    }

    fn name(&self, text: &str) -> Result<String, SyntaxError> {
        match self.tokens(text)?.as_slice() {
            [Token::Literal(Value::String(name))] => Ok(name.clone()),
            _ => Err(self.wrong("a name in quotes is needed")),
        }
    }

    fn print(&mut self, text: &str) -> Result<Action, SyntaxError> {
        for (sign, is_new) in [(":=", true), ("=", false)] {
            if let Some((left, right)) = text.split_once(sign)
                && let Some(name) = left.trim().strip_prefix('$')
                && !name.is_empty()
                && name.chars().all(is_word)
            {
                return Ok(Action::Set {
                    name: name.to_owned(),
                    is_new,
                    value: self.pipeline(right)?,
                });
            }
        }
        Ok(Action::Print(self.pipeline(text)?))
    }

    /// `$a, $b := pipeline`, or a pipeline alone.
    fn declared(&self, text: &str) -> Result<(Vec<String>, Pipeline), SyntaxError> {
        let Some((left, right)) = text
            .split_once(":=")
            .filter(|(left, _)| left.starts_with('$'))
        else {
            return Ok((Vec::new(), self.pipeline(text)?));
        };
        let names = left.split(',').map(|name| {
            let name = name.trim().strip_prefix('$')?;
            name.chars().all(is_word).then(|| name.to_owned())
        });
        match names.collect::<Option<Vec<String>>>() {
            Some(names) if names.len() <= 2 => Ok((names, self.pipeline(right)?)),
            _ => Err(self.wrong(format!("`{left}` are no variables"))),
        }
    }

    fn pipeline(&self, text: &str) -> Result<Pipeline, SyntaxError> {
        self.commands(&mut self.tokens(text)?.into_iter().peekable(), false)
    }

    fn commands(
        &self,
        tokens: &mut std::iter::Peekable<std::vec::IntoIter<Token>>,
        in_group: bool,
    ) -> Result<Pipeline, SyntaxError> {
        let (mut commands, mut command) = (Vec::new(), Vec::new());
        loop {
            let token = tokens.next();
            match token {
                Some(Token::Pipe) | Some(Token::Close) | None => {
                    if command.is_empty() {
                        return Err(self.wrong("an expression is missing"));
                    }
                    commands.push(std::mem::take(&mut command));
                    match (token, in_group) {
                        (Some(Token::Pipe), _) => {}
                        (Some(Token::Close), true) | (None, false) => return Ok(commands),
                        (None, true) => return Err(self.wrong("`)` is missing")),
                        _ => return Err(self.wrong("`)` closes nothing")),
                    }
                }
                Some(Token::Open) => {
                    let base = Base::Group(self.commands(tokens, true)?);
                    let fields = match tokens.peek() {
                        Some(Token::Fields(fields)) => {
                            let fields = fields.clone();
                            tokens.next();
                            fields
                        }
                        _ => Vec::new(),
                    };
                    command.push(Operand { base, fields });
                }
                Some(Token::Fields(fields)) | Some(Token::Dot(fields)) => command.push(Operand {
                    base: Base::Dot,
                    fields,
                }),
                Some(Token::Variable(name, fields)) => command.push(Operand {
                    base: Base::Variable(name),
                    fields,
                }),
                Some(Token::Literal(value)) => command.push(Operand {
                    base: Base::Literal(value),
                    fields: Vec::new(),
                }),
                Some(Token::Function(name)) => command.push(Operand {
                    base: Base::Function(name),
                    fields: Vec::new(),
                }),
            }
        }
    }

    fn tokens(&self, text: &str) -> Result<Vec<Token>, SyntaxError> {
        let mut tokens = Vec::new();
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = |from: usize| {
                let end = rest[from..]
                    .find(|c| !is_word(c) && c != '.')
                    .map_or(rest.len(), |end| end + from);
                (&rest[from..end], end)
            };
            let (token, length) = match first {
                '|' => (Token::Pipe, 1),
                '(' => (Token::Open, 1),
                ')' => (Token::Close, 1),
                '"' | '`' => self.text(rest)?,
                // Right after `)` it is a field of the group; elsewhere of the dot.
                '.' => {
                    let (path, end) = word(1);
                    let follows_group = matches!(tokens.last(), Some(Token::Close))
                        && !text[..text.len() - rest.len()].ends_with(char::is_whitespace);
                    let fields = fields(path);
                    match follows_group {
                        true => (Token::Fields(fields), end),
                        false => (Token::Dot(fields), end),
                    }
                }
                '$' => {
                    let (path, end) = word(1);
                    let (name, path) = path.split_once('.').unwrap_or((path, ""));
                    (Token::Variable(name.to_owned(), fields(path)), end)
                }
                '-' | '0'..='9' => {
                    let (number, end) = word(1);
                    let number = format!("{first}{number}");
                    let value = serde_json::from_str::<serde_json::Number>(&number)
                        .map_err(|_| self.wrong(format!("`{number}` is no number")))?;
                    (Token::Literal(Value::Number(value)), end)
                }
                _ if is_word(first) => {
                    let (name, end) = word(0);
                    let token = match name {
                        "true" => Token::Literal(Value::Bool(true)),
                        "false" => Token::Literal(Value::Bool(false)),
                        "nil" => Token::Literal(Value::Null),
                        name if name.contains('.') => {
                            return Err(self.wrong(format!("`{name}` is no function")));
                        }
                        name => Token::Function(name.to_owned()),
                    };
                    (token, end)
                }
                _ => return Err(self.wrong(format!("`{first}` is not understood"))),
            };
            tokens.push(token);
            let after = &rest[length..];
            rest = after.trim_start();
        }
        Ok(tokens)
    }

    fn text(&self, rest: &str) -> Result<(Token, usize), SyntaxError> {
        let open = rest.as_bytes()[0];
        let bytes = rest.as_bytes();
        let mut at = 1;
        while at < bytes.len() && bytes[at] != open {
            at += if open == b'"' && bytes[at] == b'\\' {
                2
            } else {
                1
            };
        }
        if at >= bytes.len() {
            return Err(self.wrong("a string has no end"));
        }
        let inside = &rest[1..at];
        let value = match open {
            b'`' => inside.to_owned(),
            // Go's escapes that the chart uses are JSON's.
            _ => serde_json::from_str(&rest[..=at])
                .map_err(|error| self.wrong(format!("`{inside}` is no string: {error}")))?,
        };
        Ok((Token::Literal(Value::String(value)), at + 1))
    }
}

#[derive(Clone, Debug)]
enum Token {
    Pipe,
    Open,
    Close,
    Literal(Value),
    Function(String),
    Variable(String, Vec<String>),
    Dot(Vec<String>),
    /// Of the group before it.
    Fields(Vec<String>),
}

fn fields(path: &str) -> Vec<String> {
    let parts = path.split('.').filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
