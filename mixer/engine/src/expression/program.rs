//! Checked syntax to a program: slots for names, one operation per type, constants folded.

use std::sync::Arc;

use regex::Regex;

use super::function::{Action, Builtin, Function, Param, regex, signature};
use super::syntax::{Expr, Kind};
use super::{CompileError, EvalError};
use crate::bag::Bag;
use crate::table::{AttributeTable, Slot};
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};

/// A program: a tree of typed operations. `|`, `&&` and `||` chains are one node each.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Constant(Value),
    Attribute(Slot, ValueType),
    Key(Box<[Node; 2]>),
    Default(Box<[Node]>),
    And(Box<[Node]>),
    Or(Box<[Node]>),
    Equal {
        negated: bool,
        operands: Box<[Node; 2]>,
    },
    Order {
        op: Order,
        operands: Box<[Node; 2]>,
    },
    Add(Box<[Node; 2]>),
    Conditional(Box<[Node; 3]>),
    ConditionalString(Box<[Node; 3]>),
    /// Functions of one argument.
    Unary(Unary, Box<Node>),
    /// Functions of two strings.
    Text(TextTest, Box<[Node; 2]>),
    /// `matches` with a pattern known at load.
    Regex(Regex, Box<Node>),
    Added(Arc<Function>, Box<[Node]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary {
    ToLower,
    Size,
    Ip,
    Timestamp,
    DnsName,
    Email,
    Uri,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextTest {
    Glob,
    Matches,
    StartsWith,
    EndsWith,
}

/// Makes programs of one expression.
pub(super) struct Lowering<'a> {
    pub(super) table: &'a AttributeTable,
    pub(super) added: &'a [Function],
    /// Parts that can do nothing but fail, such as `ip("x")`.
    pub(super) faults: Vec<String>,
    /// Slots that are read, once each.
    pub(super) slots: Vec<Slot>,
    empty: Bag,
}

impl<'a> Lowering<'a> {
    pub(super) fn new(table: &'a AttributeTable, added: &'a [Function]) -> Lowering<'a> {
        Lowering {
            table,
            added,
            faults: Vec::new(),
            slots: Vec::new(),
            empty: Bag::new(table),
        }
    }

    /// The program of an expression that has passed the check, and its type.
    pub(super) fn lower(&mut self, expr: &Expr) -> Result<(Node, ValueType), CompileError> {
        let (name, target, args) = match &expr.kind {
            Kind::Literal(_, value) => {
                return Ok((Node::Constant(value.clone()), value.value_type()));
            }
            Kind::Attribute(name) => {
                let Some(slot) = self.table.slot(name) else {
                    return Err(CompileError::new(
                        expr.at,
                        format!("unknown attribute {name}"),
                    ));
                };
                if !self.slots.contains(&slot) {
                    self.slots.push(slot);
                }
                let ty = self.table.type_of(slot);
                return Ok((Node::Attribute(slot, ty), ty));
            }
            Kind::Call { name, target, args } => (name, target, args),
        };
        let Some(function) = signature(name, self.added) else {
            return Err(CompileError::new(
                expr.at,
                format!("unknown function: {name}"),
            ));
        };
        let mut nodes = Vec::with_capacity(function.params.len() + 1);
        let mut any = None;
        let params = function.target.iter().chain(function.params);
        for (arg, param) in target.as_deref().into_iter().chain(args).zip(params) {
            let (node, ty) = self.lower(arg)?;
            if *param == Param::Any {
                any.get_or_insert(ty);
            }
            nodes.push(node);
        }
        let ty = match function.returns {
            Param::Of(ty) => ty,
            Param::Any => any.unwrap_or(ValueType::String),
        };
        let foldable = nodes.iter().all(|n| matches!(n, Node::Constant(_)));
        let node = match function.action {
            Action::Builtin(builtin) => builtin_node(builtin, nodes, any)
                .map_err(|reason| CompileError::new(expr.at, reason))?,
            Action::Added(function) => {
                Node::Added(Arc::new(function.clone()), nodes.into_boxed_slice())
            }
        };
        Ok((
            if foldable {
                self.fold(node, expr)
            } else {
                self.note_faults(node)
            },
            ty,
        ))
    }

    /// The value of a node that depends on no attribute. One that fails stays, to fail when it is reached.
    fn fold(&mut self, node: Node, expr: &Expr) -> Node {
        match node.value(&self.empty, &mut Tracker::off()) {
            Ok(value) => Node::Constant(value),
            Err(error) => {
                self.faults
                    .push(format!("{} always fails: {error}", expr.prefix()));
                node
            }
        }
    }

    /// A constant pattern is compiled once; a bad one fails when it is reached, and is a fault.
    fn note_faults(&mut self, node: Node) -> Node {
        if let Node::Text(TextTest::Matches, operands) = &node
            && let [Node::Constant(Value::String(pattern)), text] = &**operands
        {
            match regex(pattern) {
                Ok(compiled) => return Node::Regex(compiled, Box::new(text.clone())),
                Err(error) => self.faults.push(error.to_string()),
            }
        }
        node
    }
}

/// The operation for a builtin; `any` is the type of its generic arguments.
fn builtin_node(
    builtin: Builtin,
    nodes: Vec<Node>,
    any: Option<ValueType>,
) -> Result<Node, String> {
    // The check has counted the arguments; these only fail if it has not.
    let miscounted = |_| "internal compiler error -- arguments miscounted".to_owned();
    let one = |nodes: Vec<Node>| <[Node; 1]>::try_from(nodes).map_err(miscounted);
    let two = |nodes: Vec<Node>| <Box<[Node; 2]>>::try_from(nodes).map_err(miscounted);
    let three = |nodes: Vec<Node>| <Box<[Node; 3]>>::try_from(nodes).map_err(miscounted);
    let order = |op, phrase: &str, nodes| match any {
        Some(ty) if ty.is_text() || is_ordered(ty) => Ok(Node::Order {
            op,
            operands: two(nodes)?,
        }),
        _ => Err(unsupported(phrase, any)),
    };
    let unary = |function, nodes| {
        let [argument] = one(nodes)?;
        Ok(Node::Unary(function, Box::new(argument)))
    };
    let text = |test, nodes| Ok(Node::Text(test, two(nodes)?));
    match builtin {
        Builtin::Equal | Builtin::NotEqual => match any {
            None | Some(ValueType::Duration | ValueType::StringMap) => {
                Err(unsupported("equality", any))
            }
            Some(_) => Ok(Node::Equal {
                negated: builtin == Builtin::NotEqual,
                operands: two(nodes)?,
            }),
        },
        Builtin::Less => order(Order::Less, "less than", nodes),
        Builtin::LessOrEqual => order(Order::LessOrEqual, "less or equal", nodes),
        Builtin::Greater => order(Order::Greater, "greater than", nodes),
        Builtin::GreaterOrEqual => order(Order::GreaterOrEqual, "greater or equal", nodes),
        Builtin::Default => Ok(Node::Default(flatten(nodes, |n| match n {
            Node::Default(inner) => Ok(inner),
            other => Err(other),
        }))),
        Builtin::Or => Ok(Node::Or(flatten(nodes, |n| match n {
            Node::Or(inner) => Ok(inner),
            other => Err(other),
        }))),
        Builtin::And => Ok(Node::And(flatten(nodes, |n| match n {
            Node::And(inner) => Ok(inner),
            other => Err(other),
        }))),
        Builtin::Index => Ok(Node::Key(two(nodes)?)),
        Builtin::Add => match any {
            Some(ValueType::Int64 | ValueType::Double) => Ok(Node::Add(two(nodes)?)),
            Some(ty) if ty.is_text() => Ok(Node::Add(two(nodes)?)),
            _ => Err(unsupported("Add", any)),
        },
        Builtin::Conditional => Ok(Node::Conditional(three(nodes)?)),
        Builtin::ConditionalString => Ok(Node::ConditionalString(three(nodes)?)),
        Builtin::Size => match any {
            Some(ty) if ty.is_text() => unary(Unary::Size, nodes),
            _ => Err(unsupported("Size", any)),
        },
        Builtin::ToLower => unary(Unary::ToLower, nodes),
        Builtin::Ip => unary(Unary::Ip, nodes),
        Builtin::Timestamp => unary(Unary::Timestamp, nodes),
        Builtin::DnsName => unary(Unary::DnsName, nodes),
        Builtin::Email => unary(Unary::Email, nodes),
        Builtin::Uri => unary(Unary::Uri, nodes),
        Builtin::Match => text(TextTest::Glob, nodes),
        Builtin::Matches => text(TextTest::Matches, nodes),
        Builtin::StartsWith => text(TextTest::StartsWith, nodes),
        Builtin::EndsWith => text(TextTest::EndsWith, nodes),
        Builtin::EmptyStringMap => Ok(Node::Constant(Value::StringMap(Default::default()))),
    }
}

/// Takes the operands of operands of the same kind, so that a chain is one node.
fn flatten(nodes: Vec<Node>, inner: impl Fn(Node) -> Result<Box<[Node]>, Node>) -> Box<[Node]> {
    let mut flat = Vec::with_capacity(nodes.len());
    for node in nodes {
        match inner(node) {
            Ok(operands) => flat.extend(operands),
            Err(other) => flat.push(other),
        }
    }
    flat.into_boxed_slice()
}

fn is_ordered(ty: ValueType) -> bool {
    matches!(
        ty,
        ValueType::Int64 | ValueType::Double | ValueType::Timestamp
    )
}

fn unsupported(operation: &str, ty: Option<ValueType>) -> String {
    let storage = match ty {
        Some(ValueType::Bool) => "bool",
        Some(ValueType::Int64) => "integer",
        Some(ValueType::Double) => "double",
        Some(ValueType::Duration) => "duration",
        Some(ty) if ty.is_text() => "string",
        _ => "interface",
    };
    format!("internal compiler error -- {operation} for type not yet implemented: {storage}")
}

impl Node {
    /// The node's value; errors are those of evaluation.
    pub(super) fn value(&self, bag: &Bag, tracker: &mut Tracker) -> Result<Value, EvalError> {
        self.view(bag, tracker).map(|view| view.into_value())
    }

    /// Whether the node reads any of the slots that `unknown` picks.
    pub(super) fn reads(&self, unknown: &impl Fn(Slot) -> bool) -> bool {
        let any = |nodes: &[Node]| nodes.iter().any(|n| n.reads(unknown));
        match self {
            Node::Constant(_) => false,
            Node::Attribute(slot, _) => unknown(*slot),
            Node::Default(nodes) | Node::And(nodes) | Node::Or(nodes) | Node::Added(_, nodes) => {
                any(nodes)
            }
            Node::Key(nodes)
            | Node::Equal {
                operands: nodes, ..
            }
            | Node::Order {
                operands: nodes, ..
            }
            | Node::Add(nodes)
            | Node::Text(_, nodes) => any(&**nodes),
            Node::Conditional(nodes) | Node::ConditionalString(nodes) => any(&**nodes),
            Node::Unary(_, node) | Node::Regex(_, node) => node.reads(unknown),
        }
    }
}
