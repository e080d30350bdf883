//! COMPAT: CEXL's syntax with CEL's meaning. `a | b` is `pick(a, b)` and a text that is a duration is one;
//! all else means what it says in CEL, so that `matches` is called on the text and not on the pattern.

use super::parse::{bounded, pick};
use super::syntax::{Expr, Kind};
use super::value::Val;
use crate::expression::CompileError;
use crate::expression::syntax as cexl;

/// CEXL's names of operators, and CEL's.
const OPERATORS: [(&str, usize, &str); 16] = [
    ("EQ", 2, "_==_"),
    ("NEQ", 2, "_!=_"),
    ("LT", 2, "_<_"),
    ("LEQ", 2, "_<=_"),
    ("GT", 2, "_>_"),
    ("GEQ", 2, "_>=_"),
    ("LAND", 2, "_&&_"),
    ("LOR", 2, "_||_"),
    ("ADD", 2, "_+_"),
    ("SUB", 2, "_-_"),
    ("MUL", 2, "_*_"),
    ("QUO", 2, "_/_"),
    ("REM", 2, "_%_"),
    ("INDEX", 2, "_[_]"),
    ("SUB", 1, "-_"),
    ("NOT", 1, "!_"),
];

/// CEXL syntax as CEL syntax.
pub(super) fn translate(expr: &cexl::Expr) -> Result<Expr, CompileError> {
    let at = expr.at;
    let kind = match &expr.kind {
        cexl::Kind::Literal(_, value) => Kind::Literal(Val::of(value, None)),
        cexl::Kind::Attribute(name) => return bounded(attribute(at, name)),
        cexl::Kind::Call { name, target, args } => {
            let is_chain = target.is_none() && matches!(name.as_str(), "OR" | "LAND" | "LOR");
            let mut args: Vec<Expr> = if is_chain && args.len() == 2 {
                let operands = operands(expr, name).into_iter();
                operands.map(translate).collect::<Result<_, _>>()?
            } else {
                args.iter().map(translate).collect::<Result<_, _>>()?
            };
            let target = target.as_deref().map(translate).transpose()?;
            let count = if is_chain { 2 } else { args.len() };
            let found = OPERATORS
                .iter()
                .find(|(cexl, operands, _)| *cexl == name && *operands == count);
            match (found, name.as_str(), &target) {
                (Some((.., cel)), _, None) => Kind::call(cel, args),
                // A plus sign changes nothing.
                (None, "ADD", None) if args.len() == 1 => return Ok(args.remove(0)),
                (None, "conditional", None) if args.len() == 3 => Kind::call("_?_:_", args),
                (None, "OR" | "pick", None) if !args.is_empty() => pick(at, args)?,
                _ => Kind::Call {
                    name: name.clone(),
                    target: target.map(Box::new),
                    args,
                },
            }
        }
    };
    bounded(Expr::new(at, kind))
}

fn attribute(at: usize, name: &str) -> Expr {
    let mut parts = name.split('.');
    let first = parts.next().unwrap_or_default();
    let root = Expr::new(at, Kind::Ident(first.to_owned()));
    parts.fold(root, |operand, field| {
        Expr::new(at, Kind::select(operand, field.to_owned()))
    })
}

/// The operands of a chain of one operator, whatever is in parentheses, left to right.
fn operands<'e>(expr: &'e cexl::Expr, operator: &str) -> Vec<&'e cexl::Expr> {
    let mut found = Vec::new();
    let mut pending = vec![expr];
    while let Some(expr) = pending.pop() {
        match &expr.kind {
            cexl::Kind::Call {
                name,
                target: None,
                args,
            } if name == operator && args.len() == 2 => pending.extend(args.iter().rev()),
            _ => found.push(expr),
        }
    }
    found
}
