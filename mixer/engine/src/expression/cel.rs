//! CEL: the language of `policy.istio.io/lang: CEL`, and, behind CEXL's syntax, of COMPAT.
//!
//! Attributes are fields of messages with presence: one that a request lacks is the zero of its type, and
//! `has(a.b)` tells. The rest is the CEL specification with the functions and macros that Istio added. The
//! parser and the checker are our own because attributes have names that CEL reserves (`as`, `namespace`), the
//! answer's cache key needs every look-up, absent ones too, and what is wrong must be told at load.

mod scan;
mod syntax;
mod parse;
mod types;
mod value;
mod overload;
mod function;
mod program;
mod evaluate;
mod compat;
mod partial;

use std::collections::BTreeMap;

use program::{Lowering, Node};
use value::Val;

use super::partial::Outcomes;
use super::{CompileError, EvalError, Outcome};
use crate::bag::Bag;
use crate::table::{AttributeTable, Slot};
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};

/// Longest path to a leaf; chains of `&&` and `||` count once.
const MAX_DEPTH: usize = 100;

/// A checked CEL expression.
#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) program: Program,
    /// `None` when no attribute could have such a value.
    pub(super) value_type: Option<ValueType>,
    pub(super) slots: Vec<Slot>,
    pub(super) equalities: Vec<(Slot, Value)>,
    pub(super) faults: Vec<String>,
}

/// Compiles CEL text.
pub(super) fn compile(text: &str, table: &AttributeTable) -> Result<Compiled, CompileError> {
    lower(&parse::parse(text)?, table)
}

/// Compiles CEXL text as CEL.
pub(super) fn compile_compat(text: &str, table: &AttributeTable) -> Result<Compiled, CompileError> {
    lower(
        &compat::translate(&super::parse::parse(text, false)?)?,
        table,
    )
}

fn lower(expr: &syntax::Expr, table: &AttributeTable) -> Result<Compiled, CompileError> {
    let mut lowering = Lowering::new(table);
    let (program, ty) = lowering.lower_all(expr)?;
    Ok(Compiled {
        value_type: ty.value_type(),
        slots: std::mem::take(&mut lowering.slots),
        faults: std::mem::take(&mut lowering.faults),
        equalities: program.equalities(),
        program: Program(program),
    })
}

/// A program of CEL.
#[derive(Debug)]
pub(super) struct Program(Node);

impl Program {
    /// The value for a request.
    pub(super) fn value(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Value, EvalError> {
        let found = evaluate::Env::new(bag, tracker).evaluate(&self.0)?;
        if let Val::StringMap(map, Some(slot)) = &found {
            tracker.look_up_map(bag, *slot, map);
        }
        found.recover()
    }

    /// The truth of a BOOL.
    pub(super) fn test(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        evaluate::Env::new(bag, tracker).test(&self.0)
    }

    /// The value when it depends on nothing.
    pub(super) fn constant(&self) -> Option<Value> {
        match &self.0 {
            Node::Constant(value) => value.clone().recover().ok(),
            _ => None,
        }
    }

    /// The value as tools show it: also what no attribute can have.
    pub(super) fn outcome(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Outcome, EvalError> {
        match evaluate::Env::new(bag, tracker).evaluate(&self.0)? {
            Val::Ip(None) => Ok(Outcome::NoAddress),
            Val::Map(entries) if entries.is_empty() => {
                Ok(Outcome::Value(Value::StringMap(Default::default())))
            }
            map @ Val::Map(_) => match map.recover()? {
                Value::StringMap(map) => {
                    let entries = map.iter().map(|(k, v)| (k.to_string(), v.to_string()));
                    Ok(Outcome::Map(entries.collect::<BTreeMap<_, _>>()))
                }
                other => Ok(Outcome::Value(other)),
            },
            other => other.recover().map(Outcome::Value),
        }
    }

    /// The outcomes a condition can have when only `known` is known.
    pub(super) fn holds(&self, known: &Bag, is_unknown: &impl Fn(Slot) -> bool) -> Outcomes {
        partial::holds(&self.0, known, is_unknown)
    }
}
