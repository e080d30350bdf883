//! What checks found out, in the values of headers: `ACTION.output.FIELD`.
//!
//! Such a value is compiled against the attributes and the outputs of the rule's actions together, and
//! evaluated on a bag of its own: outputs are not attributes of the request, and no other rule sees them.

use std::sync::Arc;

use lateen_adapter::{Value, ValueType};
use lateen_engine::{AttributeTable, Bag, CompileError, Expression, Language, Slot, Tracker};

use crate::instance::Found;

/// An action's name, and the names and types of its outputs.
pub(super) type Named = (Arc<str>, Vec<(Arc<str>, ValueType)>);

/// The attributes there are and the outputs of a rule's actions.
#[derive(Debug)]
pub(super) struct Scope<'a> {
    base: &'a AttributeTable,
    /// `None`: no action has an output.
    all: Option<AttributeTable>,
    outputs: Vec<(Arc<str>, Arc<str>, String)>,
}

/// The value of a header.
#[derive(Debug)]
pub enum HeaderValue {
    /// Of attributes only.
    Plain(Expression),
    /// Of what checks found out.
    Output(Box<OutputValue>),
}

/// A value that needs outputs.
#[derive(Debug)]
pub struct OutputValue {
    expression: Expression,
    /// Attributes it reads too: where the request has them, and where this expression wants them.
    reads: Vec<(Slot, Slot)>,
    /// Action, field, and where this expression wants it.
    outputs: Vec<(Arc<str>, Arc<str>, Slot)>,
}

impl<'a> Scope<'a> {
    /// Of a rule with these named actions.
    pub(super) fn new(base: &'a AttributeTable, actions: &[Named]) -> Result<Self, String> {
        let mut outputs = Vec::new();
        for (action, fields) in actions {
            for (field, value_type) in fields {
                let name = format!("{action}.output.{field}");
                outputs.push((Arc::clone(action), Arc::clone(field), name, *value_type));
            }
        }
        let all = if outputs.is_empty() {
            None
        } else {
            let attributes = base.iter().map(|(name, ty)| (name.to_owned(), ty));
            let own = outputs.iter().map(|(_, _, name, ty)| (name.clone(), *ty));
            let all = attributes.chain(own).collect::<Vec<_>>();
            Some(AttributeTable::new(all).map_err(|e| e.to_string())?)
        };
        let outputs = outputs.into_iter().map(|(a, f, n, _)| (a, f, n)).collect();
        Ok(Self { base, all, outputs })
    }

    /// Of attributes only.
    pub(super) fn plain(base: &'a AttributeTable) -> Self {
        Self {
            base,
            all: None,
            outputs: Vec::new(),
        }
    }

    /// Compiles the value of a header.
    pub(super) fn compile(
        &self,
        language: Language,
        text: &str,
    ) -> Result<HeaderValue, CompileError> {
        let plain = || Expression::compile_in(language, text, self.base).map(HeaderValue::Plain);
        let Some(all) = &self.all else {
            return plain();
        };
        let expression = Expression::compile_in(language, text, all)?;
        let mut reads = Vec::new();
        let mut outputs = Vec::new();
        for name in expression.attributes() {
            let Some(there) = all.slot(name) else {
                continue;
            };
            match self.outputs.iter().find(|(_, _, n)| n == name) {
                Some((action, field, _)) => {
                    outputs.push((Arc::clone(action), Arc::clone(field), there));
                }
                None => reads.extend(self.base.slot(name).map(|here| (here, there))),
            }
        }
        if outputs.is_empty() {
            return plain();
        }
        Ok(HeaderValue::Output(Box::new(OutputValue {
            expression,
            reads,
            outputs,
        })))
    }
}

impl HeaderValue {
    /// The type of the value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::Plain(expression) => expression.value_type(),
            Self::Output(value) => value.expression.value_type(),
        }
    }

    /// The value for a request; `None`: it has none. `outputs` are those of the rule's actions.
    pub fn evaluate(
        &self,
        bag: &Bag,
        outputs: &[(Arc<str>, Found)],
        tracker: &mut Tracker,
    ) -> Option<Value> {
        let value = match self {
            Self::Plain(expression) => return expression.evaluate(bag, tracker).ok(),
            Self::Output(value) => value,
        };
        let mut own = Bag::new(value.expression.table());
        for (here, there) in &value.reads {
            let Some(found) = tracker.look_up(bag, *here) else {
                continue;
            };
            if let Value::StringMap(map) = found {
                tracker.look_up_map(bag, *here, map); // which key matters is not known out here
            }
            own.set(*there, found.clone());
        }
        for (action, field, there) in &value.outputs {
            let output = outputs.iter().find(|(name, _)| name == action);
            if let Some(found) = output.and_then(|(_, found)| found.get(field)) {
                own.set(*there, found.clone());
            }
        }
        value.expression.evaluate(&own, &mut Tracker::off()).ok()
    }
}
