//! CEL programs run on bags. An absent attribute is the zero of its type; a failure of one operand of `&&` or
//! `||` does not matter when the other decides.

use super::function::{Function, MAX_SIZE};
use super::program::Node;
use super::syntax::Loop;
use super::value::{Val, entry, fail};
use crate::bag::Bag;
use crate::expression::EvalError;
use crate::table::Slot;
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};

/// Operations of one evaluation: macros over lists inside each other would otherwise take any time.
const MAX_STEPS: u32 = 100_000;

/// What a program runs in.
#[derive(Debug)]
pub(super) struct Env<'a> {
    bag: &'a Bag,
    tracker: &'a mut Tracker,
    variables: Vec<Val>,
    steps: u32,
}

impl<'a> Env<'a> {
    pub(super) fn new(bag: &'a Bag, tracker: &'a mut Tracker) -> Env<'a> {
        Env {
            bag,
            tracker,
            variables: Vec::new(),
            steps: 0,
        }
    }

    pub(super) fn evaluate(&mut self, node: &Node) -> Result<Val, EvalError> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return fail(format!("the expression takes more than {MAX_STEPS} steps"));
        }
        match node {
            Node::Constant(value) => Ok(value.clone()),
            Node::Attribute(slot, ty) => self.attribute(*slot, *ty),
            Node::Variable(at) => self
                .variables
                .get(*at)
                .cloned()
                .ok_or(EvalError::Internal("no such variable")),
            Node::And(_) | Node::Or(_) | Node::Has(_) | Node::In(_) | Node::Equal { .. } => {
                self.test(node).map(Val::Bool)
            }
            Node::Conditional(operands) => {
                let [condition, yes, no] = &**operands;
                let chosen = if self.test(condition)? { yes } else { no };
                self.evaluate(chosen)
            }
            Node::Key(operands) => {
                let [map, key] = &**operands;
                let map = self.evaluate(map)?;
                let key = self.evaluate(key)?;
                if let (Val::StringMap(map, slot), Val::Text(key)) = (&map, &key) {
                    let found = map.get(key);
                    if let Some(slot) = slot {
                        self.tracker
                            .look_up_key(self.bag, *slot, key, found.is_some());
                    }
                    return match found {
                        Some(text) => Ok(Val::Text(text.clone())),
                        None => fail(format!("no such key: '{key}'")),
                    };
                }
                Function::Index.call(&[map, key])
            }
            Node::List(nodes) => {
                let items: Result<Vec<Val>, _> = nodes.iter().map(|n| self.evaluate(n)).collect();
                Ok(Val::List(items?.into()))
            }
            Node::Map(nodes) => {
                let mut entries: Vec<(Val, Val)> = Vec::with_capacity(nodes.len());
                for (key, value) in nodes {
                    let key = self.evaluate(key)?;
                    if !matches!(
                        key,
                        Val::Text(_) | Val::Int(_) | Val::Uint(_) | Val::Bool(_)
                    ) {
                        return fail(format!("a map's key cannot be {}", key.type_of()));
                    }
                    if entry(&entries, &key)?.is_some() {
                        return fail(format!("duplicate key in map: {}", key.shown()));
                    }
                    entries.push((key, self.evaluate(value)?));
                }
                Ok(Val::Map(entries.into()))
            }
            Node::Call(function, nodes) => match &**nodes {
                [one] => function.call(&[self.evaluate(one)?]),
                [left, right] => {
                    let left = self.evaluate(left)?;
                    let right = self.evaluate(right)?;
                    function.call(&[left, right])
                }
                nodes => {
                    let args: Result<Vec<Val>, _> =
                        nodes.iter().map(|n| self.evaluate(n)).collect();
                    function.call(&args?)
                }
            },
            Node::Regex(regex, text) => match self.evaluate(text)? {
                Val::Text(text) => Ok(Val::Bool(regex.is_match(&text))),
                other => fail(format!("no such overload: matches({})", other.type_of())),
            },
            Node::Loop { kind, range, body } => self.repeat(*kind, range, body),
        }
    }

    /// The truth of a bool.
    pub(super) fn test(&mut self, node: &Node) -> Result<bool, EvalError> {
        match node {
            Node::And(nodes) => self.decide(nodes, false),
            Node::Or(nodes) => self.decide(nodes, true),
            Node::Has(slot) => Ok(self.tracker.look_up(self.bag, *slot).is_some()),
            Node::Equal { negated, operands } => {
                let [left, right] = &**operands;
                // Comparing an attribute with a text copies nothing.
                if let (Node::Attribute(slot, ValueType::String), Node::Constant(Val::Text(want)))
                | (Node::Constant(Val::Text(want)), Node::Attribute(slot, ValueType::String)) =
                    (left, right)
                {
                    return match self.tracker.look_up(self.bag, *slot) {
                        Some(Value::String(got)) => Ok((got == want) != *negated),
                        None => Ok(want.is_empty() != *negated),
                        Some(other) => Err(self.wrong_type(*slot, ValueType::String, other)),
                    };
                }
                let left = self.evaluate(left)?;
                let right = self.evaluate(right)?;
                Ok(left.equals(&right)? != *negated)
            }
            Node::In(operands) => {
                let [key, map] = &**operands;
                let key = self.evaluate(key)?;
                let map = self.evaluate(map)?;
                if let (Val::StringMap(map, slot), Val::Text(key)) = (&map, &key) {
                    let found = map.get(key).is_some();
                    if let Some(slot) = slot {
                        self.tracker.look_up_key(self.bag, *slot, key, found);
                    }
                    return Ok(found);
                }
                Function::In.call(&[key, map])?.truth()
            }
            other => self.evaluate(other)?.truth(),
        }
    }

    /// Operands of `||` (`deciding` is true) or `&&`, left to right until one decides. A failure counts only when
    /// none does.
    fn decide(&mut self, nodes: &[Node], deciding: bool) -> Result<bool, EvalError> {
        let mut failure = None;
        for node in nodes {
            match self.test(node) {
                Ok(truth) if truth == deciding => return Ok(deciding),
                Ok(_) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(!deciding), Err)
    }

    fn attribute(&mut self, slot: Slot, ty: ValueType) -> Result<Val, EvalError> {
        match self.tracker.look_up(self.bag, slot) {
            None => Ok(Val::zero(ty)),
            Some(value) if value.value_type() == ty => Ok(Val::of(value, Some(slot))),
            Some(value) => Err(self.wrong_type(slot, ty, value)),
        }
    }

    fn wrong_type(&self, slot: Slot, want: ValueType, value: &Value) -> EvalError {
        EvalError::WrongType {
            attribute: self.bag.table().name(slot).clone(),
            want,
            value: value.to_string(),
        }
    }

    fn repeat(&mut self, kind: Loop, range: &Node, body: &[Node]) -> Result<Val, EvalError> {
        let items: Vec<Val> = match self.evaluate(range)? {
            Val::List(items) => items.to_vec(),
            Val::Map(entries) => entries.iter().map(|(key, _)| key.clone()).collect(),
            Val::StringMap(map, slot) => {
                if let Some(slot) = slot {
                    self.tracker.look_up_map(self.bag, slot, &map);
                }
                map.iter().map(|(key, _)| Val::Text(key.clone())).collect()
            }
            other => return fail(format!("cannot go through a {}", other.type_of())),
        };
        let (predicate, result) = match (kind, body) {
            (Loop::Map, [result]) => (None, Some(result)),
            (Loop::FilterMap, [predicate, result]) => (Some(predicate), Some(result)),
            (_, [predicate]) => (Some(predicate), None),
            _ => return Err(EvalError::Internal("macro of another shape")),
        };
        let mut made = Vec::new();
        let mut count = 0_u64;
        let mut failure = None;
        for item in items {
            self.variables.push(item.clone());
            let outcome = match (predicate.map_or(Ok(true), |p| self.test(p)), result) {
                (Ok(true), Some(result)) => self.evaluate(result).map(|value| (true, value)),
                (Ok(truth), _) => Ok((truth, item)),
                (Err(error), _) => Err(error),
            };
            self.variables.pop();
            match (kind, outcome) {
                (Loop::All, Ok((false, _))) => return Ok(Val::Bool(false)),
                (Loop::Exists, Ok((true, _))) => return Ok(Val::Bool(true)),
                // One that decides makes failures of the others irrelevant.
                (Loop::All | Loop::Exists, Err(error)) if self.steps <= MAX_STEPS => {
                    failure = failure.or(Some(error));
                }
                (_, Err(error)) => return Err(error),
                (_, Ok((false, _))) => {}
                (_, Ok((true, value))) => {
                    count += 1;
                    made.push(value);
                    if made.len() > MAX_SIZE {
                        return Err(EvalError::Overflow);
                    }
                }
            }
        }
        match (kind, failure) {
            (_, Some(error)) => Err(error),
            (Loop::All, None) => Ok(Val::Bool(true)),
            (Loop::Exists, None) => Ok(Val::Bool(false)),
            (Loop::ExistsOne, None) => Ok(Val::Bool(count == 1)),
            (Loop::Filter | Loop::Map | Loop::FilterMap, None) => Ok(Val::List(made.into())),
        }
    }
}
