//! The expression language of rules and instances (CEXL, the language of Istio's Mixer).
//!
//! Text is [scanned](scan), [parsed](parse) into [syntax], [checked](check) against the attribute table and
//! the functions, [lowered](program) to a typed program and [evaluated](evaluate) on bags;
//! [partial] evaluation says what is certain when only some attributes are known. The program knows nothing
//! of the syntax, so that another language can be lowered onto it.

mod scan;
mod syntax;
mod parse;
mod function;
mod check;
mod program;
mod evaluate;
mod partial;

pub use function::{Body, Function, Param};
pub use partial::Verdict;

use std::fmt;
use std::sync::Arc;

use crate::bag::Bag;
use crate::table::{AttributeTable, Slot};
use crate::text::Text;
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};
use program::{Lowering, Node};
use syntax::Expr;

/// Longest expression, in bytes.
pub const MAX_BYTES: usize = 16 * 1024;
/// Deepest nesting of parentheses, calls, keys and operators to the right.
pub const MAX_NESTING: usize = 64;
/// Longest chain of operators, and so the depth of the tree.
pub const MAX_DEPTH: usize = 400;

/// An expression that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct CompileError {
    /// Byte of the text where the mistake is.
    pub at: usize,
    /// What is wrong.
    pub reason: String,
}

impl CompileError {
    fn new(at: usize, reason: impl Into<String>) -> CompileError {
        CompileError {
            at,
            reason: reason.into(),
        }
    }

    /// The text is no expression at all: told with line and column.
    fn syntax(text: &str, at: usize, reason: &str) -> CompileError {
        let before = text.get(..at).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.len() - before.rfind('\n').map_or(0, |n| n + 1) + 1;
        let reason = format!("unable to parse expression '{text}': {line}:{column}: {reason}");
        CompileError { at, reason }
    }
}

/// An expression that has no value for a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {
    /// An attribute the request lacks.
    #[error("lookup failed: '{0}'")]
    Absent(Text),
    /// An attribute of another type than its manifest says.
    #[error("error converting value to {}: '{value}' of attribute {attribute}", storage(*want))]
    WrongType {
        /// The attribute.
        attribute: Text,
        /// What the manifest says.
        want: ValueType,
        /// What the request has.
        value: String,
    },
    /// Text that is not what a function or a comparison needs.
    #[error("{0}")]
    Conversion(String),
    /// A pattern that is no regular expression.
    #[error("error parsing regexp '{pattern}': {reason}")]
    Regex {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A sum that does not fit.
    #[error("result is out of range")]
    Overflow,
    /// The bag's table is not the one the expression was compiled against.
    #[error("expression and attributes belong to different configurations")]
    ForeignBag,
    /// The compiler let something through; a defect here.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// How an error names a type.
fn storage(ty: ValueType) -> &'static str {
    match ty {
        ValueType::Int64 => "integer",
        ValueType::Double => "double",
        ValueType::Bool => "bool",
        ValueType::Duration => "duration",
        ty if ty.is_text() => "string",
        ty => ty.as_str(),
    }
}

/// A parsed expression without types: for tools that show or compare text.
#[derive(Clone, Debug, PartialEq)]
pub struct Syntax(Expr);

impl Syntax {
    /// Parses text.
    ///
    /// # Errors
    /// The text is no expression.
    pub fn parse(text: &str) -> Result<Syntax, CompileError> {
        parse::parse(text, false).map(Syntax)
    }

    /// The form error messages show: operators as functions, `$` before attributes.
    pub fn prefix(&self) -> String {
        self.0.prefix().to_string()
    }

    /// Equalities between an attribute and a literal that must hold for the expression to be true.
    pub fn equalities(&self) -> Vec<(&str, &Value)> {
        self.0.equalities()
    }
}

/// The source form; parsing it gives the same syntax.
impl fmt::Display for Syntax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A checked expression, ready to be evaluated on bags of the table it was compiled against.
#[derive(Clone, Debug)]
pub struct Expression {
    text: Arc<str>,
    table: AttributeTable,
    value_type: ValueType,
    program: Arc<Node>,
    slots: Arc<[Slot]>,
    equalities: Arc<[(Slot, Value)]>,
    faults: Arc<[String]>,
}

impl Expression {
    /// Compiles text.
    ///
    /// # Errors
    /// The text is no expression, names what does not exist, or has a type error.
    pub fn compile(text: &str, table: &AttributeTable) -> Result<Expression, CompileError> {
        Expression::compile_with(text, table, &[])
    }

    /// Compiles text that may call added functions.
    ///
    /// # Errors
    /// As [`Expression::compile`].
    pub fn compile_with(
        text: &str,
        table: &AttributeTable,
        added: &[Function],
    ) -> Result<Expression, CompileError> {
        Expression::from_syntax(text, &parse::parse(text, false)?, table, added)
    }

    /// Compiles the right side of an attribute binding: `table` holds a generator's results as `output.NAME`,
    /// which text may also write `$out.NAME`.
    ///
    /// # Errors
    /// As [`Expression::compile`].
    pub fn compile_output(text: &str, table: &AttributeTable) -> Result<Expression, CompileError> {
        Expression::from_syntax(text, &parse::parse(text, true)?, table, &[])
    }

    /// Compiles an instance parameter as configuration has it: text is an expression; a number or a truth
    /// value is itself.
    ///
    /// # Errors
    /// As [`Expression::compile`]; or the parameter is null, a list or an object.
    pub fn compile_param(
        param: &serde_json::Value,
        table: &AttributeTable,
    ) -> Result<Expression, CompileError> {
        let value = match param {
            serde_json::Value::String(text) => return Expression::compile(text, table),
            serde_json::Value::Bool(truth) => Value::Bool(*truth),
            serde_json::Value::Number(n) => match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => Value::Int64(n),
                (None, Some(n)) => Value::Double(n),
                (None, None) => return Err(CompileError::new(0, format!("{n} is out of range"))),
            },
            other => {
                return Err(CompileError::new(
                    0,
                    format!("{other} is not an expression"),
                ));
            }
        };
        Ok(Expression::constant(value, table))
    }

    /// An expression that always has this value.
    pub fn constant(value: Value, table: &AttributeTable) -> Expression {
        Expression {
            text: value.to_string().into(),
            table: table.clone(),
            value_type: value.value_type(),
            program: Arc::new(Node::Constant(value)),
            slots: Arc::from([]),
            equalities: Arc::from([]),
            faults: Arc::from([]),
        }
    }

    fn from_syntax(
        text: &str,
        syntax: &Expr,
        table: &AttributeTable,
        added: &[Function],
    ) -> Result<Expression, CompileError> {
        check::check(syntax, table, added)?;
        let mut lowering = Lowering::new(table, added);
        let (program, value_type) = lowering.lower(syntax)?;
        let equalities = syntax
            .equalities()
            .into_iter()
            .filter_map(|(name, value)| Some((table.slot(name)?, value.clone())))
            .collect();
        Ok(Expression {
            text: text.into(),
            table: table.clone(),
            value_type,
            program: Arc::new(program),
            slots: lowering.slots.into(),
            equalities,
            faults: lowering.faults.into(),
        })
    }

    /// The source text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Type of the value.
    pub fn value_type(&self) -> ValueType {
        self.value_type
    }

    /// Names of the attributes that evaluation may read, in order of appearance.
    pub fn attributes(&self) -> impl Iterator<Item = &str> {
        self.slots
            .iter()
            .map(|slot| self.table.name(*slot).as_str())
    }

    /// Slots of [`Expression::attributes`].
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Equalities between an attribute and a constant that must hold for the expression to be true.
    pub fn equalities(&self) -> &[(Slot, Value)] {
        &self.equalities
    }

    /// Parts that can only fail, such as `ip("x")` or a bad constant pattern. The language accepts them;
    /// whoever loads configuration should not, or at least say so.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// The value when it depends on no attribute.
    pub fn as_constant(&self) -> Option<&Value> {
        match &*self.program {
            Node::Constant(value) => Some(value),
            _ => None,
        }
    }

    fn accepts(&self, bag: &Bag) -> Result<(), EvalError> {
        if self.table.same(bag.table()) {
            Ok(())
        } else {
            Err(EvalError::ForeignBag)
        }
    }

    /// The value for a request.
    ///
    /// # Errors
    /// An attribute is absent or of the wrong type, text is malformed, or `bag` is of another table.
    pub fn evaluate(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Value, EvalError> {
        self.accepts(bag)?;
        let view = self.program.view(bag, tracker)?;
        if let evaluate::View::Map(map, Some(slot)) = &view {
            tracker.look_up_map(bag, *slot, map);
        }
        Ok(view.into_value())
    }

    /// The truth of a BOOL expression, operands left to right.
    ///
    /// # Errors
    /// As [`Expression::evaluate`]; or the expression is no BOOL.
    pub fn test(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        self.accepts(bag)?;
        self.program.test(bag, tracker)
    }

    /// Whether a rule with this match applies. As [`Expression::test`], except that of operands joined by `&&`
    /// at the top one that is false decides, whatever another one fails with: a rule for one service does not
    /// fail on requests to another.
    ///
    /// # Errors
    /// As [`Expression::test`].
    pub fn holds(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        self.accepts(bag)?;
        self.program.holds(bag, tracker)
    }

    /// What [`Expression::holds`] will say when some attributes are known beforehand. An attribute for which
    /// `known` has nothing may have any value or be absent.
    pub fn partial(&self, known: &impl Fn(&str) -> Option<Value>) -> Verdict {
        if self.value_type != ValueType::Bool {
            return Verdict::Unknown;
        }
        let mut bag = Bag::new(&self.table);
        for slot in self.slots.iter() {
            if let Some(value) = known(self.table.name(*slot)) {
                bag.set(*slot, value);
            }
        }
        partial::holds(&self.program, &bag, &|slot| bag.get(slot).is_none()).verdict()
    }
}
