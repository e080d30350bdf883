//! The expression languages of rules and instances: CEXL, the language of Istio's Mixer, and [CEL](cel).
//!
//! CEXL text is [scanned](scan), [parsed](parse) into [syntax], [checked](check) against the attribute table and
//! the functions, [lowered](program) to a typed program and [evaluated](evaluate) on bags;
//! [partial] evaluation says what is certain when only some attributes are known. CEL goes the same way in
//! files of the same names, because nearly everything about it is different: what an absent attribute is, what
//! a failure next to `&&` is, and the values there are.

mod scan;
mod syntax;
mod parse;
mod function;
mod check;
mod program;
mod evaluate;
mod partial;
mod cel;

pub use function::{Body, Function, Param};
pub use partial::Verdict;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
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

/// The language an expression is written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Language {
    /// Istio's own: absent attributes are errors unless `|` gives a default.
    #[default]
    Cexl,
    /// CEL: absent attributes are zero.
    Cel,
    /// CEXL's syntax with CEL's meaning.
    Compat,
}

impl Language {
    /// As the annotation `policy.istio.io/lang` spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Language::Cexl => "CEXL",
            Language::Cel => "CEL",
            Language::Compat => "COMPAT",
        }
    }
}

/// In any letter case.
impl FromStr for Language {
    type Err = String;
    fn from_str(text: &str) -> Result<Language, String> {
        [Language::Cexl, Language::Cel, Language::Compat]
            .into_iter()
            .find(|l| l.as_str().eq_ignore_ascii_case(text))
            .ok_or_else(|| format!("'{text}' is no expression language; use CEXL, CEL or COMPAT"))
    }
}

/// A result as tools show it: CEL has some that no attribute can have.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A value.
    Value(Value),
    /// A map of texts that was made by a CEL expression and is no STRING_MAP.
    Map(BTreeMap<String, String>),
    /// The IP_ADDRESS of an absent attribute, which has no bytes.
    NoAddress,
}

#[derive(Debug)]
enum Program {
    Cexl(Node),
    Cel(cel::Program),
}

/// A checked expression, ready to be evaluated on bags of the table it was compiled against.
#[derive(Clone, Debug)]
pub struct Expression {
    text: Arc<str>,
    language: Language,
    table: AttributeTable,
    value_type: Option<ValueType>,
    program: Arc<Program>,
    slots: Arc<[Slot]>,
    equalities: Arc<[(Slot, Value)]>,
    faults: Arc<[String]>,
}

impl Expression {
    /// Compiles CEXL.
    ///
    /// # Errors
    /// The text is no expression, names what does not exist, or has a type error.
    pub fn compile(text: &str, table: &AttributeTable) -> Result<Expression, CompileError> {
        Expression::compile_with(text, table, &[])
    }

    /// Compiles text of a language whose value an attribute could have.
    ///
    /// # Errors
    /// As [`Expression::compile`]; or the value is a list, null or of a type known at run time only.
    pub fn compile_in(
        language: Language,
        text: &str,
        table: &AttributeTable,
    ) -> Result<Expression, CompileError> {
        let expression = Expression::compile_any(language, text, table)?;
        match expression.value_type {
            Some(_) => Ok(expression),
            None => Err(CompileError::new(
                0,
                "the value is of no type that attributes have",
            )),
        }
    }

    /// Compiles text of a language, whatever its value is: for tools.
    ///
    /// # Errors
    /// As [`Expression::compile`].
    pub fn compile_any(
        language: Language,
        text: &str,
        table: &AttributeTable,
    ) -> Result<Expression, CompileError> {
        let compiled = match language {
            Language::Cexl => return Expression::compile(text, table),
            Language::Cel => cel::compile(text, table)?,
            Language::Compat => cel::compile_compat(text, table)?,
        };
        Ok(Expression {
            text: text.into(),
            language,
            table: table.clone(),
            value_type: compiled.value_type,
            program: Arc::new(Program::Cel(compiled.program)),
            slots: compiled.slots.into(),
            equalities: compiled.equalities.into(),
            faults: compiled.faults.into(),
        })
    }

    /// Compiles CEXL that may call added functions.
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

    /// Compiles the right side of an attribute binding, which is CEXL: `table` holds a generator's results as
    /// `output.NAME`, which text may also write `$out.NAME`.
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
    /// As [`Expression::compile_in`]; or the parameter is null, a list or an object.
    pub fn compile_param(
        language: Language,
        param: &serde_json::Value,
        table: &AttributeTable,
    ) -> Result<Expression, CompileError> {
        let value = match param {
            serde_json::Value::String(text) => {
                return Expression::compile_in(language, text, table);
            }
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
            language: Language::Cexl,
            table: table.clone(),
            value_type: Some(value.value_type()),
            program: Arc::new(Program::Cexl(Node::Constant(value))),
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
            language: Language::Cexl,
            table: table.clone(),
            value_type: Some(value_type),
            program: Arc::new(Program::Cexl(program)),
            slots: lowering.slots.into(),
            equalities,
            faults: lowering.faults.into(),
        })
    }

    /// The source text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The language of the text.
    pub fn language(&self) -> Language {
        self.language
    }

    /// The table it was compiled against.
    pub fn table(&self) -> &AttributeTable {
        &self.table
    }

    /// Type of the value; STRING_MAP stands for any map when the value is of no type that attributes have, which
    /// only [`Expression::compile_any`] lets through.
    pub fn value_type(&self) -> ValueType {
        self.value_type.unwrap_or(ValueType::StringMap)
    }

    /// Type of the value; `None` when it is of no type that attributes have.
    pub fn known_type(&self) -> Option<ValueType> {
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
    pub fn as_constant(&self) -> Option<Value> {
        match &*self.program {
            Program::Cexl(Node::Constant(value)) => Some(value.clone()),
            Program::Cexl(_) => None,
            Program::Cel(program) => program.constant(),
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
        let program = match &*self.program {
            Program::Cexl(program) => program,
            Program::Cel(program) => return program.value(bag, tracker),
        };
        let view = program.view(bag, tracker)?;
        if let evaluate::View::Map(map, Some(slot)) = &view {
            tracker.look_up_map(bag, *slot, map);
        }
        Ok(view.into_value())
    }

    /// The value as tools show it.
    ///
    /// # Errors
    /// As [`Expression::evaluate`]; or the value is a list or null, which have no form here.
    pub fn outcome(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Outcome, EvalError> {
        self.accepts(bag)?;
        match &*self.program {
            Program::Cexl(_) => self.evaluate(bag, tracker).map(Outcome::Value),
            Program::Cel(program) => program.outcome(bag, tracker),
        }
    }

    /// The truth of a BOOL expression, operands left to right.
    ///
    /// # Errors
    /// As [`Expression::evaluate`]; or the expression is no BOOL.
    pub fn test(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        self.accepts(bag)?;
        match &*self.program {
            Program::Cexl(program) => program.test(bag, tracker),
            Program::Cel(program) => program.test(bag, tracker),
        }
    }

    /// Whether a rule with this match applies. As [`Expression::test`], except that in CEXL too, of operands
    /// joined by `&&` at the top one that is false decides, whatever another one fails with: a rule for one
    /// service does not fail on requests to another.
    ///
    /// # Errors
    /// As [`Expression::test`].
    pub fn holds(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        self.accepts(bag)?;
        match &*self.program {
            Program::Cexl(program) => program.holds(bag, tracker),
            Program::Cel(program) => program.test(bag, tracker),
        }
    }

    /// What [`Expression::holds`] will say when some attributes are known beforehand. An attribute for which
    /// `known` has nothing may have any value or be absent.
    pub fn partial(&self, known: &impl Fn(&str) -> Option<Value>) -> Verdict {
        if self.value_type != Some(ValueType::Bool) {
            return Verdict::Unknown;
        }
        let mut bag = Bag::new(&self.table);
        for slot in self.slots.iter() {
            if let Some(value) = known(self.table.name(*slot)) {
                bag.set(*slot, value);
            }
        }
        let is_unknown = |slot: Slot| bag.get(slot).is_none();
        match &*self.program {
            Program::Cexl(program) => partial::holds(program, &bag, &is_unknown),
            Program::Cel(program) => program.holds(&bag, &is_unknown),
        }
        .verdict()
    }
}
