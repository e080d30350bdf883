//! Expressions as parsed, before types.

use std::fmt;

use crate::value::Value;

/// A parsed expression. Operators are calls of the functions their names stand for: `EQ`, `OR`, `INDEX`, …
#[derive(Clone, Debug)]
pub(crate) struct Expr {
    pub(crate) kind: Kind,
    /// Byte of the source where the expression's own token is.
    pub(crate) at: usize,
    /// Longest path to a leaf.
    pub(crate) depth: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Source form and value.
    Literal(String, Value),
    Attribute(String),
    Call {
        name: String,
        target: Option<Box<Expr>>,
        args: Vec<Expr>,
    },
}

/// Where it was written does not matter.
impl PartialEq for Expr {
    fn eq(&self, other: &Expr) -> bool {
        self.kind == other.kind
    }
}

/// Binary operators: source form, function, precedence (higher binds tighter).
pub(super) const BINARY: [(&str, &str, u8); 19] = [
    ("||", "LOR", 1),
    ("&&", "LAND", 2),
    ("==", "EQ", 3),
    ("!=", "NEQ", 3),
    ("<", "LT", 3),
    ("<=", "LEQ", 3),
    (">", "GT", 3),
    (">=", "GEQ", 3),
    ("+", "ADD", 4),
    ("-", "SUB", 4),
    ("|", "OR", 4),
    ("^", "XOR", 4),
    ("*", "MUL", 5),
    ("/", "QUO", 5),
    ("%", "REM", 5),
    ("<<", "SHL", 5),
    (">>", "SHR", 5),
    ("&", "AND", 5),
    ("&^", "AND_NOT", 5),
];

/// Unary operators: source form and function.
pub(super) const UNARY: [(&str, &str); 6] = [
    ("+", "ADD"),
    ("-", "SUB"),
    ("!", "NOT"),
    ("^", "XOR"),
    ("&", "AND"),
    ("<-", "ARROW"),
];

impl Expr {
    pub(crate) fn leaf(at: usize, kind: Kind) -> Expr {
        Expr { kind, at, depth: 1 }
    }

    pub(crate) fn call(at: usize, name: &str, target: Option<Expr>, args: Vec<Expr>) -> Expr {
        let deepest = args
            .iter()
            .chain(&target)
            .map(|e| e.depth)
            .max()
            .unwrap_or(0);
        let kind = Kind::Call {
            name: name.to_owned(),
            target: target.map(Box::new),
            args,
        };
        Expr {
            kind,
            at,
            depth: deepest + 1,
        }
    }

    /// The prefix form that error messages show: `EQ($a, 2)`, `$a:f("x")`.
    pub(crate) fn prefix(&self) -> Prefix<'_> {
        Prefix(self)
    }

    /// Equalities between an attribute and a literal that must all hold for the expression to be true:
    /// those reachable through `&&` alone.
    pub(crate) fn equalities(&self) -> Vec<(&str, &Value)> {
        let mut found = Vec::new();
        let mut pending = vec![self];
        while let Some(expr) = pending.pop() {
            let Kind::Call {
                name,
                target: None,
                args,
            } = &expr.kind
            else {
                continue;
            };
            match (name.as_str(), args.as_slice()) {
                ("LAND", [left, right]) => {
                    pending.push(right);
                    pending.push(left);
                }
                ("EQ", [left, right]) => match (&left.kind, &right.kind) {
                    (Kind::Attribute(name), Kind::Literal(_, value))
                    | (Kind::Literal(_, value), Kind::Attribute(name)) => {
                        found.push((name.as_str(), value));
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        found
    }
}

/// Shows an expression in prefix form.
#[derive(Debug)]
pub(crate) struct Prefix<'a>(&'a Expr);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.kind {
            Kind::Literal(source, _) => f.write_str(source),
            Kind::Attribute(name) => write!(f, "${name}"),
            Kind::Call { name, target, args } => {
                if let Some(target) = target {
                    write!(f, "{}:", target.prefix())?;
                }
                write!(f, "{name}(")?;
                for (i, arg) in args.iter().enumerate() {
                    write!(f, "{}{}", if i == 0 { "" } else { ", " }, arg.prefix())?;
                }
                f.write_str(")")
            }
        }
    }
}

/// The source form, with parentheses only where they are needed; parsing it gives the expression back.
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Literal(source, _) => f.write_str(source),
            Kind::Attribute(name) => f.write_str(name),
            Kind::Call {
                name,
                target: None,
                args,
            } => match args.as_slice() {
                [map, key] if name == "INDEX" => {
                    map.write_at(f, u8::MAX)?;
                    write!(f, "[{key}]")
                }
                [left, right] if binary(name).is_some() => {
                    let (operator, precedence) = binary(name).unwrap_or_default();
                    left.write_at(f, precedence)?;
                    write!(f, " {operator} ")?;
                    right.write_at(f, precedence + 1)
                }
                [only] if unary(name).is_some() => {
                    f.write_str(unary(name).unwrap_or_default())?;
                    // `- -x` would be the token `--` without a space between.
                    if matches!(&only.kind, Kind::Call { name, target: None, args }
                        if args.len() == 1 && unary(name).is_some())
                    {
                        f.write_str(" ")?;
                    }
                    only.write_at(f, 6)
                }
                args => write_call(f, name, args),
            },
            Kind::Call {
                name,
                target: Some(target),
                args,
            } => {
                target.write_at(f, u8::MAX)?;
                f.write_str(".")?;
                write_call(f, name, args)
            }
        }
    }
}

impl Expr {
    /// Writes the expression, in parentheses when it binds looser than its place asks.
    fn write_at(&self, f: &mut fmt::Formatter<'_>, precedence: u8) -> fmt::Result {
        let own = match &self.kind {
            Kind::Call {
                name,
                target: None,
                args,
            } => match args.len() {
                2 if name != "INDEX" => binary(name).map_or(u8::MAX, |(_, own)| own),
                1 if unary(name).is_some() => 6,
                _ => u8::MAX,
            },
            // `1.f()` would be a number followed by a name.
            Kind::Literal(source, _)
                if source.starts_with(|c: char| c.is_ascii_digit() || c == '.') =>
            {
                7
            }
            _ => u8::MAX,
        };
        if own < precedence {
            write!(f, "({self})")
        } else {
            write!(f, "{self}")
        }
    }
}

fn write_call(f: &mut fmt::Formatter<'_>, name: &str, args: &[Expr]) -> fmt::Result {
    write!(f, "{name}(")?;
    for (i, arg) in args.iter().enumerate() {
        write!(f, "{}{arg}", if i == 0 { "" } else { ", " })?;
    }
    f.write_str(")")
}

fn binary(name: &str) -> Option<(&'static str, u8)> {
    BINARY
        .iter()
        .find(|(_, n, _)| *n == name)
        .map(|(op, _, p)| (*op, *p))
}

fn unary(name: &str) -> Option<&'static str> {
    UNARY.iter().find(|(_, n)| *n == name).map(|(op, _)| *op)
}
