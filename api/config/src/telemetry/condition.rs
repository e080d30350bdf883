//! Access log expressions that plain conditions can say: comparisons of the response's status, of headers and of
//! what is like a header, with `&&`, `||` and `!`.
//!
//! In CEL what names something that is not there is an error, and an error is no log; conditions on headers
//! therefore hold only where the header is, negated ones too.

use cel::common::ast::{CallExpr, Expr, LiteralValue, operators};

use crate::review::telemetry::is_bounded;

/// Nesting beyond which an expression is not read.
const DEPTH_LIMIT: usize = 32;

/// When a line is written.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// All of them.
    All(Vec<Condition>),
    /// Any of them.
    Any(Vec<Condition>),
    /// The response's status.
    Status(Compare, u32),
    /// A header of the request is there, and this is true of it (or, negated, false).
    Header {
        /// Its name; `:method`, `:path`, `:authority` and `:scheme` count as such.
        name: String,
        /// What is true of it.
        text: Text,
        /// Rather what is false.
        negated: bool,
    },
    /// A header of the request is there, or not.
    Present {
        /// Its name.
        name: String,
        /// Rather not.
        negated: bool,
    },
}

/// A comparison of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The same.
    Equal,
    /// Another.
    NotEqual,
    /// At least.
    AtLeast,
    /// At most.
    AtMost,
}

/// What may be true of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// It is this.
    Exact(String),
    /// It begins so.
    Prefix(String),
    /// It ends so.
    Suffix(String),
    /// It has this in it.
    Contains(String),
}

impl Condition {
    /// The conditions that say what an expression says, if there are any.
    #[must_use]
    pub fn read(expression: &str) -> Option<Self> {
        if !is_bounded(expression) {
            return None;
        }
        let program = cel::Program::compile(expression).ok()?;
        read(&program.expression().expr, false, DEPTH_LIMIT)
    }
}

fn read(expr: &Expr, negated: bool, depth: usize) -> Option<Condition> {
    let depth = depth.checked_sub(1)?;
    let Expr::Call(call) = expr else {
        return None;
    };
    if let (operators::IN, [name, of]) = (call.func_name.as_str(), call.args.as_slice()) {
        return (path(&of.expr)? == "request.headers").then_some(Condition::Present {
            name: text(&name.expr)?.to_ascii_lowercase(),
            negated,
        });
    }
    if let Some(target) = &call.target {
        return method(call, &target.expr, negated);
    }
    match (call.func_name.as_str(), call.args.as_slice()) {
        (operators::LOGICAL_NOT, [inner]) => read(&inner.expr, !negated, depth),
        (name @ (operators::LOGICAL_AND | operators::LOGICAL_OR), parts) => {
            let all = parts
                .iter()
                .map(|part| read(&part.expr, negated, depth))
                .collect::<Option<Vec<_>>>()?;
            Some(if (name == operators::LOGICAL_AND) == negated {
                Condition::Any(all)
            } else {
                Condition::All(all)
            })
        }
        (name, [left, right]) => compare(name, &left.expr, &right.expr, negated)
            .or_else(|| compare(mirrored(name)?, &right.expr, &left.expr, negated)),
        _ => None,
    }
}

/// The operator with its sides exchanged.
fn mirrored(name: &str) -> Option<&'static str> {
    Some(match name {
        operators::EQUALS => operators::EQUALS,
        operators::NOT_EQUALS => operators::NOT_EQUALS,
        operators::GREATER => operators::LESS,
        operators::LESS => operators::GREATER,
        operators::GREATER_EQUALS => operators::LESS_EQUALS,
        operators::LESS_EQUALS => operators::GREATER_EQUALS,
        _ => return None,
    })
}

fn compare(name: &str, left: &Expr, right: &Expr, negated: bool) -> Option<Condition> {
    if path(left).is_some_and(|path| path == "response.code") {
        return status(name, number(right)?, negated);
    }
    let negated = match name {
        operators::EQUALS => negated,
        operators::NOT_EQUALS => !negated,
        _ => return None,
    };
    Some(Condition::Header {
        name: header(left)?,
        text: Text::Exact(text(right)?.to_owned()),
        negated,
    })
}

fn status(name: &str, number: u32, negated: bool) -> Option<Condition> {
    let (compare, number) = match (name, negated) {
        (operators::EQUALS, false) | (operators::NOT_EQUALS, true) => (Compare::Equal, number),
        (operators::NOT_EQUALS, false) | (operators::EQUALS, true) => (Compare::NotEqual, number),
        (operators::GREATER_EQUALS, false) | (operators::LESS, true) => (Compare::AtLeast, number),
        (operators::LESS_EQUALS, false) | (operators::GREATER, true) => (Compare::AtMost, number),
        (operators::GREATER, false) | (operators::LESS_EQUALS, true) => {
            (Compare::AtLeast, number.checked_add(1)?)
        }
        (operators::LESS, false) | (operators::GREATER_EQUALS, true) => {
            (Compare::AtMost, number.checked_sub(1)?)
        }
        _ => return None,
    };
    Some(Condition::Status(compare, number))
}

fn method(call: &CallExpr, target: &Expr, negated: bool) -> Option<Condition> {
    let [argument] = call.args.as_slice() else {
        return None;
    };
    let argument = text(&argument.expr)?.to_owned();
    let name = match path(target) {
        // The path without its query begins as the whole does.
        Some(path)
            if path == "request.url_path"
                && call.func_name == "startsWith"
                && !argument.contains('?') =>
        {
            ":path".to_owned()
        }
        _ => header(target)?,
    };
    let text = match call.func_name.as_str() {
        "startsWith" => Text::Prefix(argument),
        "endsWith" => Text::Suffix(argument),
        "contains" => Text::Contains(argument),
        _ => return None,
    };
    Some(Condition::Header {
        name,
        text,
        negated,
    })
}

/// The header an expression is the value of.
fn header(expr: &Expr) -> Option<String> {
    if let Expr::Call(call) = expr
        && let (operators::INDEX, [of, name]) = (call.func_name.as_str(), call.args.as_slice())
    {
        return (path(&of.expr)? == "request.headers")
            .then(|| text(&name.expr).map(str::to_ascii_lowercase))?;
    }
    Some(
        match path(expr)?.as_str() {
            "request.method" => ":method",
            "request.host" => ":authority",
            "request.path" => ":path",
            "request.scheme" => ":scheme",
            "request.useragent" => "user-agent",
            "request.referer" => "referer",
            "request.id" => "x-request-id",
            _ => return None,
        }
        .to_owned(),
    )
}

/// `a.b.c`.
fn path(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) if !select.test => {
            Some(format!("{}.{}", path(&select.operand.expr)?, select.field))
        }
        _ => None,
    }
}

fn text(expr: &Expr) -> Option<&str> {
    match expr {
        Expr::Literal(LiteralValue::String(text)) => Some(text.inner()),
        _ => None,
    }
}

fn number(expr: &Expr) -> Option<u32> {
    match expr {
        Expr::Literal(LiteralValue::Int(number)) => u32::try_from(*number.inner()).ok(),
        Expr::Literal(LiteralValue::UInt(number)) => u32::try_from(*number.inner()).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_conditions_can_say_is_read() {
        let status = Condition::Status;
        let header = |name: &str, text: Text, negated| Condition::Header {
            name: name.into(),
            text,
            negated,
        };
        let table = [
            ("response.code >= 400", status(Compare::AtLeast, 400)),
            ("400 > response.code", status(Compare::AtMost, 399)),
            ("!(response.code == 200)", status(Compare::NotEqual, 200)),
            (
                "request.headers['X-Log'] == 'yes'",
                header("x-log", Text::Exact("yes".into()), false),
            ),
            (
                "!request.url_path.startsWith('/health')",
                header(":path", Text::Prefix("/health".into()), true),
            ),
            (
                "!('x-a' in request.headers)",
                Condition::Present {
                    name: "x-a".into(),
                    negated: true,
                },
            ),
            (
                "!(response.code < 500 && request.method != 'GET')",
                Condition::Any(vec![
                    status(Compare::AtLeast, 500),
                    header(":method", Text::Exact("GET".into()), false),
                ]),
            ),
        ];
        for (expression, want) in table {
            assert_eq!(Condition::read(expression), Some(want), "{expression}");
        }
        for expression in [
            "connection.mtls",
            "request.url_path == '/a'",
            "request.url_path.startsWith('/a?b')",
            "response.code + 1 > 200",
            "response.code > -1",
            "request.headers['a'].matches('b')",
            "request.duration > duration('1s')",
            "has(request.a)",
            "response.code",
            "(",
            "",
        ] {
            assert_eq!(Condition::read(expression), None, "{expression}");
        }
    }
}
