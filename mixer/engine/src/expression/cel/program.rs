//! CEL syntax to a program: names resolved, types checked, constants folded.

use regex::Regex;

use super::evaluate::Env;
use super::function::Function;
use super::overload::resolve;
use super::syntax::{Expr, Kind, Loop};
use super::types::Type;
use super::value::Val;
use crate::bag::Bag;
use crate::expression::CompileError;
use crate::expression::function::regex;
use crate::table::{AttributeTable, Slot};
use crate::text::Text;
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};

/// A program: a tree of operations. `&&` and `||` chains are one node each.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Constant(Val),
    Attribute(Slot, ValueType),
    /// `has()` of an attribute.
    Has(Slot),
    /// A variable of a macro, by how many others are around it.
    Variable(usize),
    And(Box<[Node]>),
    Or(Box<[Node]>),
    Conditional(Box<[Node; 3]>),
    /// `_[_]`: what is indexed, and the index.
    Key(Box<[Node; 2]>),
    /// `_in_`: the key, and where it is looked for.
    In(Box<[Node; 2]>),
    Equal {
        negated: bool,
        operands: Box<[Node; 2]>,
    },
    List(Box<[Node]>),
    Map(Box<[(Node, Node)]>),
    Call(Function, Box<[Node]>),
    /// `matches` with a pattern known at load.
    Regex(Regex, Box<Node>),
    Loop {
        kind: Loop,
        range: Box<Node>,
        body: Box<[Node]>,
    },
}

/// Makes the program of one expression.
pub(super) struct Lowering<'a> {
    table: &'a AttributeTable,
    /// Parts that can do nothing but fail.
    pub(super) faults: Vec<String>,
    /// Slots that are read, once each.
    pub(super) slots: Vec<Slot>,
    /// Variables of the macros around.
    variables: Vec<(String, Type)>,
    empty: Bag,
}

/// What a dotted name stands for.
enum Named {
    Attribute(Slot),
    /// Attributes whose names begin so.
    Group(String),
}

type Lowered = Result<(Node, Type), CompileError>;

impl<'a> Lowering<'a> {
    pub(super) fn new(table: &'a AttributeTable) -> Lowering<'a> {
        Lowering {
            table,
            faults: Vec::new(),
            slots: Vec::new(),
            variables: Vec::new(),
            empty: Bag::new(table),
        }
    }

    /// The program of a whole expression, and its type.
    pub(super) fn lower_all(&mut self, expr: &Expr) -> Lowered {
        let (node, ty) = self.lower(expr)?;
        if !matches!(node, Node::Constant(_))
            && !node.reads(&|_| true)
            && let Err(error) = Env::new(&self.empty, &mut Tracker::off()).evaluate(&node)
        {
            self.faults.push(format!("always fails: {error}"));
        }
        Ok((node, ty))
    }

    fn lower(&mut self, expr: &Expr) -> Lowered {
        match &expr.kind {
            Kind::Literal(value) => Ok((Node::Constant(value.clone()), value.type_of())),
            Kind::Ident(_) => self.ident(expr),
            Kind::Select {
                operand,
                field,
                is_test,
            } => self.select(expr, operand, field, *is_test),
            Kind::Call { name, target, args } => self.call(expr, name, target.as_deref(), args),
            Kind::List(items) => {
                let mut nodes = Vec::with_capacity(items.len());
                let mut item_type = None;
                for item in items {
                    let (node, ty) = self.lower(item)?;
                    nodes.push(node);
                    item_type = Some(common(item_type, ty));
                }
                let item_type = item_type.unwrap_or(Type::Dyn);
                Ok((self.fold(Node::List(nodes.into())), Type::list(item_type)))
            }
            Kind::Map(entries) => {
                let mut nodes = Vec::with_capacity(entries.len());
                let (mut keys, mut values) = (None, None);
                for (key, value) in entries {
                    let (key_node, key_type) = self.lower(key)?;
                    let (value_node, value_type) = self.lower(value)?;
                    nodes.push((key_node, value_node));
                    keys = Some(common(keys, key_type));
                    values = Some(common(values, value_type));
                }
                let ty = Type::map(keys.unwrap_or(Type::Dyn), values.unwrap_or(Type::Dyn));
                Ok((self.fold(Node::Map(nodes.into())), ty))
            }
            Kind::Message(name, fields) => self.message(expr, name, fields),
            Kind::Loop {
                kind,
                range,
                variable,
                body,
            } => self.repeat(*kind, range, variable, body),
        }
    }

    fn variable(&self, name: &str) -> Option<(usize, &Type)> {
        let at = self.variables.iter().rposition(|(n, _)| n == name)?;
        self.variables.get(at).map(|(_, ty)| (at, ty))
    }

    /// What a dotted name stands for; `None` when it is no name of attributes.
    fn named(&self, expr: &Expr) -> Option<Named> {
        match &expr.kind {
            Kind::Ident(name) if self.variable(name).is_none() => self.declared(name),
            Kind::Select {
                operand,
                field,
                is_test: false,
            } => match self.named(operand)? {
                Named::Group(name) => self.declared(&format!("{name}.{field}")),
                Named::Attribute(slot) => {
                    self.declared(&format!("{}.{field}", self.table.name(slot)))
                }
            },
            _ => None,
        }
    }

    fn declared(&self, name: &str) -> Option<Named> {
        match self.table.slot(name) {
            Some(slot) => Some(Named::Attribute(slot)),
            None if self.table.is_group(name) => Some(Named::Group(name.to_owned())),
            None => None,
        }
    }

    fn attribute(&mut self, named: Named) -> (Node, Type) {
        match named {
            Named::Attribute(slot) => {
                self.note(slot);
                let ty = self.table.type_of(slot);
                (Node::Attribute(slot, ty), Type::of(ty))
            }
            Named::Group(name) => {
                let node = Node::Constant(Val::Group(Text::from(name.as_str())));
                (node, Type::Group(name))
            }
        }
    }

    fn note(&mut self, slot: Slot) {
        if !self.slots.contains(&slot) {
            self.slots.push(slot);
        }
    }

    fn ident(&mut self, expr: &Expr) -> Lowered {
        if let Some(named) = self.named(expr) {
            return Ok(self.attribute(named));
        }
        let name = expr.path().unwrap_or_default();
        if let Some((at, ty)) = self.variable(&name) {
            return Ok((Node::Variable(at), ty.clone()));
        }
        match Type::named(&name) {
            Some(ty) => {
                let node = Node::Constant(Val::Type(ty.clone()));
                Ok((node, Type::Meta(Box::new(ty))))
            }
            None => Err(undeclared(expr.at, &name)),
        }
    }

    fn select(&mut self, expr: &Expr, operand: &Expr, field: &str, is_test: bool) -> Lowered {
        let undefined = || CompileError::new(expr.at, format!("undefined field '{field}'"));
        if is_test {
            if let Some(Named::Group(name)) = self.named(operand) {
                return match self.declared(&format!("{name}.{field}")) {
                    Some(Named::Attribute(slot)) => {
                        self.note(slot);
                        Ok((Node::Has(slot), Type::Bool))
                    }
                    Some(Named::Group(_)) => Ok((Node::Constant(Val::Bool(true)), Type::Bool)),
                    None => Err(undefined()),
                };
            }
        } else if let Some(named) = self.named(expr) {
            return Ok(self.attribute(named));
        } else if expr.path().is_some_and(|path| Type::named(&path).is_some()) {
            return self.ident(expr);
        }
        let (node, ty) = self.lower(operand)?;
        let key = Node::Constant(Val::Text(field.into()));
        match ty {
            Type::Group(_) => Err(undefined()),
            Type::Map(_, value) if !is_test => {
                Ok((self.fold(Node::Key(Box::new([node, key]))), *value))
            }
            Type::Dyn if !is_test => Ok((Node::Key(Box::new([node, key])), Type::Dyn)),
            Type::Map(..) | Type::Dyn => {
                Ok((self.fold(Node::In(Box::new([key, node]))), Type::Bool))
            }
            Type::Wrapper(inner) if field == "value" && !is_test => Ok((node, *inner)),
            other => Err(CompileError::new(
                expr.at,
                format!("type '{other}' does not support field selection"),
            )),
        }
    }

    fn call(&mut self, expr: &Expr, name: &str, target: Option<&Expr>, args: &[Expr]) -> Lowered {
        let mut nodes = Vec::with_capacity(args.len() + 1);
        let mut types = Vec::with_capacity(args.len() + 1);
        for arg in target.into_iter().chain(args) {
            let (node, ty) = self.lower(arg)?;
            nodes.push(node);
            types.push(ty);
        }
        let mismatch = || {
            let types: Vec<String> = types.iter().map(Type::to_string).collect();
            let types = types.join(", ");
            CompileError::new(
                expr.at,
                format!("found no matching overload for '{name}' applied to '({types})'"),
            )
        };
        let (node, ty) = match (name, types.as_slice()) {
            ("_&&_" | "_||_", operands) => {
                if !operands.iter().all(|ty| ty.fits(&Type::Bool)) {
                    return Err(mismatch());
                }
                (chain(name == "_&&_", nodes), Type::Bool)
            }
            ("_?_:_", [condition, yes, no]) => {
                if !condition.fits(&Type::Bool) || !yes.fits(no) {
                    return Err(mismatch());
                }
                let ty = yes.clone().join(no.clone());
                match <Box<[Node; 3]>>::try_from(nodes) {
                    Ok(nodes) => (Node::Conditional(nodes), ty),
                    Err(_) => return Err(mismatch()),
                }
            }
            _ => {
                let (function, ty) = resolve(name, target.is_some(), &types)
                    .map_err(|reason| CompileError::new(expr.at, reason))?;
                (self.function(function, nodes), ty)
            }
        };
        Ok((self.fold(node), ty))
    }

    fn function(&mut self, function: Function, nodes: Vec<Node>) -> Node {
        let nodes = match (function, <Box<[Node; 2]>>::try_from(nodes)) {
            (Function::Equal | Function::NotEqual, Ok(operands)) => {
                return Node::Equal {
                    negated: function == Function::NotEqual,
                    operands,
                };
            }
            (Function::Index, Ok(operands)) => return Node::Key(operands),
            (Function::In, Ok(operands)) => return Node::In(operands),
            (Function::Matches, Ok(operands)) => {
                let [text, pattern] = *operands;
                if let Node::Constant(Val::Text(pattern)) = &pattern {
                    match regex(pattern) {
                        Ok(compiled) => return Node::Regex(compiled, Box::new(text)),
                        Err(error) => self.faults.push(error.to_string()),
                    }
                }
                vec![text, pattern]
            }
            (_, Ok(operands)) => Vec::from(operands as Box<[Node]>),
            (_, Err(nodes)) => nodes,
        };
        Node::Call(function, nodes.into())
    }

    fn message(&mut self, expr: &Expr, name: &str, fields: &[(String, Expr)]) -> Lowered {
        match name {
            "google.protobuf.Timestamp" => {
                return self.seconds(expr, fields, Function::TimestampOf, Type::Timestamp);
            }
            "google.protobuf.Duration" => {
                return self.seconds(expr, fields, Function::DurationOf, Type::Duration);
            }
            _ => {}
        }
        let Some(inner) = Type::wrapped(name) else {
            return Err(undeclared(expr.at, name));
        };
        let ty = Type::Wrapper(Box::new(inner.clone()));
        match fields {
            [] => {
                let zero = match &inner {
                    Type::Uint => Val::Uint(0),
                    Type::Bytes => Val::Bytes([].into()),
                    other => other.value_type().map_or(Val::Null, Val::zero),
                };
                Ok((Node::Constant(zero), ty))
            }
            [(field, value)] if field == "value" => {
                let (node, got) = self.lower(value)?;
                if got.fits(&inner) {
                    Ok((node, ty))
                } else {
                    Err(CompileError::new(
                        value.at,
                        format!(
                            "expected type of field 'value' is '{inner}' but provided type is '{got}'"
                        ),
                    ))
                }
            }
            _ => {
                let wrong = fields.iter().map(|(f, _)| f).find(|f| *f != "value");
                let reason = match wrong {
                    Some(field) => format!("undefined field '{field}'"),
                    None => "field 'value' is there twice".to_owned(),
                };
                Err(CompileError::new(expr.at, reason))
            }
        }
    }

    /// A message of `seconds` and `nanos`.
    fn seconds(
        &mut self,
        expr: &Expr,
        fields: &[(String, Expr)],
        function: Function,
        ty: Type,
    ) -> Lowered {
        let mut parts = [
            ("seconds", Node::Constant(Val::Int(0))),
            ("nanos", Node::Constant(Val::Int(0))),
        ];
        for (field, value) in fields {
            let Some((_, place)) = parts.iter_mut().find(|(name, _)| name == field) else {
                let reason = format!("undefined field '{field}'");
                return Err(CompileError::new(expr.at, reason));
            };
            let (node, got) = self.lower(value)?;
            if !got.fits(&Type::Int) {
                let reason = format!(
                    "expected type of field '{field}' is 'int' but provided type is '{got}'"
                );
                return Err(CompileError::new(value.at, reason));
            }
            *place = node;
        }
        let nodes = parts.map(|(_, node)| node);
        Ok((self.fold(Node::Call(function, Box::new(nodes))), ty))
    }

    fn repeat(&mut self, kind: Loop, range: &Expr, variable: &str, body: &[Expr]) -> Lowered {
        let (range_node, range_type) = self.lower(range)?;
        let item = match &range_type {
            Type::List(item) => (**item).clone(),
            Type::Map(key, _) => (**key).clone(),
            Type::Dyn => Type::Dyn,
            other => {
                return Err(CompileError::new(
                    range.at,
                    format!(
                        "expression of type '{other}' cannot be range of a comprehension (must be list, map, or dynamic)"
                    ),
                ));
            }
        };
        self.variables.push((variable.to_owned(), item.clone()));
        let lowered: Result<Vec<_>, _> = body.iter().map(|e| Ok((self.lower(e)?, e.at))).collect();
        self.variables.pop();
        let mut nodes = Vec::new();
        let mut last = Type::Bool;
        let lowered = lowered?;
        let count = lowered.len();
        for (i, ((node, ty), at)) in lowered.into_iter().enumerate() {
            let is_predicate = kind != Loop::Map && (kind != Loop::FilterMap || i + 1 < count);
            if is_predicate && !ty.fits(&Type::Bool) {
                return Err(CompileError::new(
                    at,
                    format!("expected type 'bool' but found '{ty}'"),
                ));
            }
            nodes.push(node);
            last = ty;
        }
        let ty = match kind {
            Loop::All | Loop::Exists | Loop::ExistsOne => Type::Bool,
            Loop::Filter => Type::list(item),
            Loop::Map | Loop::FilterMap => Type::list(last),
        };
        let node = Node::Loop {
            kind,
            range: Box::new(range_node),
            body: nodes.into(),
        };
        Ok((node, ty))
    }

    /// The value of a node that depends on constants alone. One that fails stays: `&&` and `||` may absorb it.
    fn fold(&self, node: Node) -> Node {
        let is_constant = |n: &Node| matches!(n, Node::Constant(_));
        let foldable = match &node {
            Node::And(nodes) | Node::Or(nodes) | Node::List(nodes) | Node::Call(_, nodes) => {
                nodes.iter().all(is_constant)
            }
            Node::Conditional(nodes) => nodes.iter().all(is_constant),
            Node::Key(nodes)
            | Node::In(nodes)
            | Node::Equal {
                operands: nodes, ..
            } => nodes.iter().all(is_constant),
            Node::Map(entries) => entries
                .iter()
                .all(|(k, v)| is_constant(k) && is_constant(v)),
            Node::Regex(_, node) => is_constant(node),
            _ => false,
        };
        if foldable && let Ok(value) = Env::new(&self.empty, &mut Tracker::off()).evaluate(&node) {
            return Node::Constant(value);
        }
        node
    }
}

fn undeclared(at: usize, name: &str) -> CompileError {
    CompileError::new(
        at,
        format!("undeclared reference to '{name}' (in container '')"),
    )
}

/// The type of all items so far and one more.
fn common(so_far: Option<Type>, next: Type) -> Type {
    match so_far {
        None => next,
        Some(ty) if ty.fits(&next) => ty.join(next),
        Some(_) => Type::Dyn,
    }
}

/// `&&` or `||`, operands of the same operation being taken in.
fn chain(is_and: bool, nodes: Vec<Node>) -> Node {
    let mut flat = Vec::with_capacity(nodes.len());
    for node in nodes {
        match (is_and, node) {
            (true, Node::And(inner)) | (false, Node::Or(inner)) => flat.extend(inner),
            (_, other) => flat.push(other),
        }
    }
    if is_and {
        Node::And(flat.into())
    } else {
        Node::Or(flat.into())
    }
}

impl Node {
    /// Whether the node reads any of the slots that `wanted` picks.
    pub(super) fn reads(&self, wanted: &impl Fn(Slot) -> bool) -> bool {
        let any = |nodes: &[Node]| nodes.iter().any(|n| n.reads(wanted));
        match self {
            Node::Constant(_) | Node::Variable(_) => false,
            Node::Attribute(slot, _) | Node::Has(slot) => wanted(*slot),
            Node::And(nodes) | Node::Or(nodes) | Node::List(nodes) | Node::Call(_, nodes) => {
                any(nodes)
            }
            Node::Conditional(nodes) => any(&**nodes),
            Node::Key(nodes)
            | Node::In(nodes)
            | Node::Equal {
                operands: nodes, ..
            } => any(&**nodes),
            Node::Map(entries) => entries
                .iter()
                .any(|(k, v)| k.reads(wanted) || v.reads(wanted)),
            Node::Regex(_, node) => node.reads(wanted),
            Node::Loop { range, body, .. } => range.reads(wanted) || any(body),
        }
    }

    /// Equalities between an attribute and a constant that must hold for the expression to be true.
    pub(super) fn equalities(&self) -> Vec<(Slot, Value)> {
        let nodes = match self {
            Node::And(nodes) => nodes,
            other => std::slice::from_ref(other),
        };
        let equality = |node: &Node| {
            let Node::Equal {
                negated: false,
                operands,
            } = node
            else {
                return None;
            };
            let [left, right] = &**operands;
            let ((Node::Attribute(slot, _), Node::Constant(value))
            | (Node::Constant(value), Node::Attribute(slot, _))) = (left, right)
            else {
                return None;
            };
            let value = match value {
                Val::Text(t) => Value::String(t.clone()),
                Val::Int(v) => Value::Int64(*v),
                Val::Bool(v) => Value::Bool(*v),
                _ => return None, // equal values may have different forms
            };
            Some((*slot, value))
        };
        nodes.iter().filter_map(equality).collect()
    }
}
