//! Types: every attribute declared, every function known, every argument of the right type.

use super::CompileError;
use super::function::{Function, Param, signature};
use super::syntax::{Expr, Kind};
use crate::table::AttributeTable;
use crate::value::ValueType;

/// The type of an expression.
pub(super) fn check(
    expr: &Expr,
    table: &AttributeTable,
    added: &[Function],
) -> Result<ValueType, CompileError> {
    let (name, target, args) = match &expr.kind {
        Kind::Literal(_, value) => return Ok(value.value_type()),
        Kind::Attribute(name) => {
            return table
                .value_type(name)
                .ok_or_else(|| CompileError::new(expr.at, format!("unknown attribute {name}")));
        }
        Kind::Call { name, target, args } => (name, target, args),
    };
    let fail = |reason: String| Err(CompileError::new(expr.at, reason));
    let Some(function) = signature(name, added) else {
        return fail(format!("unknown function: {name}"));
    };
    let mut any = None; // the type that `Any` stands for in this call
    match (target, function.target) {
        (Some(target), Some(want)) => {
            let got = check(target, table, added)?;
            match want {
                Param::Any => any = Some(got),
                Param::Of(want) if want != got => {
                    return fail(format!(
                        "{} target typeError got {got}, expected {want}",
                        expr.prefix()
                    ));
                }
                Param::Of(_) => {}
            }
        }
        (Some(_), None) => {
            return fail(format!(
                "invoking regular function on instance method: {name}"
            ));
        }
        (None, Some(_)) => {
            return fail(format!(
                "invoking instance method without an instance: {name}"
            ));
        }
        (None, None) => {}
    }
    if args.len() < function.params.len() {
        return fail(format!(
            "{} arity mismatch. Got {} arg(s), expected {} arg(s)",
            expr.prefix(),
            args.len(),
            function.params.len()
        ));
    }
    for (position, (arg, param)) in args.iter().zip(function.params).enumerate() {
        let got = check(arg, table, added)?;
        let want = match param {
            Param::Of(want) => *want,
            Param::Any => *any.get_or_insert(got),
        };
        if got != want {
            return Err(CompileError::new(
                arg.at,
                format!(
                    "{} arg {} ({}) typeError got {got}, expected {want}",
                    expr.prefix(),
                    position + 1,
                    arg.prefix()
                ),
            ));
        }
    }
    // More arguments than parameters are tolerated, as they always were, but must mean something.
    for arg in args.iter().skip(function.params.len()) {
        check(arg, table, added)?;
    }
    match (function.returns, any) {
        (Param::Of(ty), _) | (Param::Any, Some(ty)) => Ok(ty),
        (Param::Any, None) => fail(format!("{name} returns no particular type")),
    }
}
