//! CEL expressions as parsed, before types.

use super::value::Val;

/// A parsed expression. Operators are calls of the functions the CEL specification names: `_==_`, `_[_]`, …
#[derive(Clone, Debug)]
pub(crate) struct Expr {
    pub(super) kind: Kind,
    /// Byte of the source where the expression's own token is.
    pub(super) at: usize,
    /// Longest path to a leaf.
    pub(super) depth: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Literal(Val),
    Ident(String),
    Select {
        operand: Box<Expr>,
        field: String,
        /// `has()`: whether it is there.
        is_test: bool,
    },
    Call {
        name: String,
        target: Option<Box<Expr>>,
        args: Vec<Expr>,
    },
    List(Vec<Expr>),
    Map(Vec<(Expr, Expr)>),
    Message(String, Vec<(String, Expr)>),
    Loop {
        kind: Loop,
        range: Box<Expr>,
        variable: String,
        body: Vec<Expr>,
    },
}

/// The macros that go through a list or the keys of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loop {
    All,
    Exists,
    ExistsOne,
    Filter,
    Map,
    FilterMap,
}

impl Kind {
    pub(super) fn call(name: &str, args: Vec<Expr>) -> Kind {
        Kind::Call {
            name: name.to_owned(),
            target: None,
            args,
        }
    }

    pub(super) fn select(operand: Expr, field: String) -> Kind {
        Kind::Select {
            operand: Box::new(operand),
            field,
            is_test: false,
        }
    }
}

impl Expr {
    pub(super) fn new(at: usize, kind: Kind) -> Expr {
        let deepest = |all: &mut dyn Iterator<Item = usize>| all.max().unwrap_or(0);
        let below = match &kind {
            Kind::Literal(_) | Kind::Ident(_) => 0,
            Kind::Select { operand, .. } => operand.depth,
            Kind::Call { target, args, .. } => {
                let target = target.iter().map(|t| t.depth);
                deepest(&mut args.iter().map(|a| a.depth).chain(target))
            }
            Kind::List(items) => deepest(&mut items.iter().map(|i| i.depth)),
            Kind::Map(entries) => deepest(&mut entries.iter().map(|(k, v)| k.depth.max(v.depth))),
            Kind::Message(_, fields) => deepest(&mut fields.iter().map(|(_, v)| v.depth)),
            Kind::Loop { range, body, .. } => {
                deepest(&mut body.iter().map(|b| b.depth).chain([range.depth]))
            }
        };
        Expr {
            kind,
            at,
            depth: below + 1,
        }
    }

    /// The dotted name that the expression is, if it is one.
    pub(super) fn path(&self) -> Option<String> {
        match &self.kind {
            Kind::Ident(name) => Some(name.clone()),
            Kind::Select {
                operand,
                field,
                is_test: false,
            } => Some(format!("{}.{field}", operand.path()?)),
            _ => None,
        }
    }
}
