//! Programs run on bags. Values are borrowed from the bag or the program wherever they exist there, so that
//! comparing allocates nothing.

use std::cmp::Ordering;
use std::net::IpAddr;

use super::EvalError;
use super::function::{cached_regex, matches_glob};
use super::program::{Node, Order, TextTest, Unary};
use crate::bag::Bag;
use crate::names;
use crate::table::Slot;
use crate::text::Text;
use crate::tracker::Tracker;
use crate::value::{StringMap, Value, ValueType, parse_timestamp};

/// A value, borrowed where possible.
#[derive(Debug)]
pub(super) enum View<'a> {
    Borrowed(&'a Value),
    /// A STRING inside something else.
    Text(&'a Text),
    /// A map, and the slot it came from.
    Map(&'a StringMap, Option<Slot>),
    Owned(Value),
}

static MISSING_KEY: Text = Text::EMPTY;

impl View<'_> {
    pub(super) fn into_value(self) -> Value {
        match self {
            View::Borrowed(value) => value.clone(),
            View::Text(text) => Value::String(text.clone()),
            View::Map(map, _) => Value::StringMap(map.clone()),
            View::Owned(value) => value,
        }
    }

    fn text(&self) -> Result<&Text, EvalError> {
        let text = match self {
            View::Text(text) => Some(*text),
            View::Borrowed(value) => value.as_text(),
            View::Owned(value) => value.as_text(),
            View::Map(..) => None,
        };
        text.ok_or(EvalError::Internal("text expected"))
    }

    fn map(&self) -> Result<(&StringMap, Option<Slot>), EvalError> {
        let map = match self {
            View::Map(map, slot) => Some((*map, *slot)),
            View::Borrowed(value) => value.as_map().map(|map| (map, None)),
            View::Owned(value) => value.as_map().map(|map| (map, None)),
            View::Text(_) => None,
        };
        map.ok_or(EvalError::Internal("string map expected"))
    }

    /// The parts of a scalar as the comparisons want them.
    fn scalar(&self) -> Scalar<'_> {
        let value = match self {
            View::Text(text) => return Scalar::String(text),
            View::Map(..) => return Scalar::Other,
            View::Borrowed(value) => *value,
            View::Owned(value) => value,
        };
        match value {
            Value::String(text) => Scalar::String(text),
            Value::Email(text) => Scalar::Email(text),
            Value::Uri(text) => Scalar::Uri(text),
            Value::DnsName(text) => Scalar::DnsName(text),
            Value::Int64(v) => Scalar::Int64(*v),
            Value::Double(v) => Scalar::Double(*v),
            Value::Bool(v) => Scalar::Bool(*v),
            Value::Timestamp(v) => Scalar::Timestamp(v),
            Value::Ip(v) => Scalar::Ip(v),
            Value::Duration(_) | Value::StringMap(_) => Scalar::Other,
        }
    }
}

enum Scalar<'a> {
    String(&'a str),
    Email(&'a str),
    Uri(&'a str),
    DnsName(&'a str),
    Int64(i64),
    Double(f64),
    Bool(bool),
    Timestamp(&'a chrono::DateTime<chrono::Utc>),
    Ip(&'a IpAddr),
    Other,
}

impl Scalar<'_> {
    fn equals(&self, other: &Scalar<'_>) -> Result<bool, EvalError> {
        let named =
            |r: Result<bool, names::NameError>| r.map_err(|e| EvalError::Conversion(e.to_string()));
        match (self, other) {
            (Scalar::String(a), Scalar::String(b)) => Ok(a == b),
            (Scalar::Int64(a), Scalar::Int64(b)) => Ok(a == b),
            (Scalar::Double(a), Scalar::Double(b)) => Ok(a == b),
            (Scalar::Bool(a), Scalar::Bool(b)) => Ok(a == b),
            (Scalar::Timestamp(a), Scalar::Timestamp(b)) => Ok(a == b),
            (Scalar::Ip(a), Scalar::Ip(b)) => Ok(a.to_canonical() == b.to_canonical()),
            (Scalar::DnsName(a), Scalar::DnsName(b)) => named(names::dns_equal(a, b)),
            (Scalar::Email(a), Scalar::Email(b)) => named(names::email_equal(a, b)),
            (Scalar::Uri(a), Scalar::Uri(b)) => named(names::uri_equal(a, b)),
            _ => Err(EvalError::Internal("operands of == differ in type")),
        }
    }

    /// `None` when a number is not a number.
    fn order(&self, other: &Scalar<'_>) -> Result<Option<Ordering>, EvalError> {
        match (self, other) {
            (Scalar::String(a), Scalar::String(b))
            | (Scalar::Email(a), Scalar::Email(b))
            | (Scalar::Uri(a), Scalar::Uri(b))
            | (Scalar::DnsName(a), Scalar::DnsName(b)) => Ok(Some(a.cmp(b))),
            (Scalar::Int64(a), Scalar::Int64(b)) => Ok(Some(a.cmp(b))),
            (Scalar::Double(a), Scalar::Double(b)) => Ok(a.partial_cmp(b)),
            (Scalar::Timestamp(a), Scalar::Timestamp(b)) => Ok(Some(a.cmp(b))),
            _ => Err(EvalError::Internal("operands of < differ in type")),
        }
    }
}

impl Value {
    /// The expression language's `==`: IPv4 equals its IPv6-mapped form; DNS names, e-mail addresses and URIs
    /// are compared as what they name.
    ///
    /// # Errors
    /// The types differ, have no equality (DURATION, STRING_MAP), or a name is malformed.
    pub fn equals(&self, other: &Value) -> Result<bool, EvalError> {
        View::Borrowed(self)
            .scalar()
            .equals(&View::Borrowed(other).scalar())
    }
}

impl Node {
    /// The node's value, absent attributes being errors.
    pub(super) fn view<'a>(
        &'a self,
        bag: &'a Bag,
        tracker: &mut Tracker,
    ) -> Result<View<'a>, EvalError> {
        match self {
            Node::Constant(value) => Ok(View::Borrowed(value)),
            Node::Attribute(slot, ty) => match attribute(*slot, *ty, bag, tracker)? {
                Some(view) => Ok(view),
                None => Err(EvalError::Absent(bag.table().name(*slot).clone())),
            },
            Node::Key(operands) => {
                let [map, key] = &**operands;
                let map = map.view(bag, tracker)?;
                let key = key.view(bag, tracker)?;
                let found = look_up_key(&map, &key, bag, tracker)?;
                Ok(match (map, found) {
                    (_, None) => View::Text(&MISSING_KEY),
                    (View::Map(map, _), Some(key)) => {
                        View::Text(map.get(key).unwrap_or(&MISSING_KEY))
                    }
                    (map, Some(key)) => View::Owned(Value::String(
                        map.map()?.0.get(key).cloned().unwrap_or_default(),
                    )),
                })
            }
            Node::Default(nodes) => {
                let Some((last, first)) = nodes.split_last() else {
                    return Err(EvalError::Internal("nothing to default to"));
                };
                for node in first {
                    if let Some(view) = node.maybe(bag, tracker)? {
                        return Ok(view);
                    }
                }
                last.view(bag, tracker)
            }
            Node::And(_)
            | Node::Or(_)
            | Node::Equal { .. }
            | Node::Order { .. }
            | Node::Text(..)
            | Node::Regex(..) => Ok(View::Owned(Value::Bool(self.test(bag, tracker)?))),
            Node::Add(operands) => {
                let [left, right] = &**operands;
                let left = left.view(bag, tracker)?;
                let right = right.view(bag, tracker)?;
                add(&left, &right).map(View::Owned)
            }
            Node::Conditional(operands) => {
                let [condition, yes, no] = &**operands;
                if condition.test(bag, tracker)? {
                    yes
                } else {
                    no
                }
                .view(bag, tracker)
            }
            Node::ConditionalString(operands) => {
                let [condition, yes, no] = &**operands;
                let condition = condition.test(bag, tracker)?;
                let yes = yes.view(bag, tracker)?;
                let no = no.view(bag, tracker)?;
                Ok(if condition { yes } else { no })
            }
            Node::Unary(function, argument) => {
                let argument = argument.view(bag, tracker)?;
                convert(*function, argument.text()?).map(View::Owned)
            }
            Node::Added(function, nodes) => {
                let arguments: Vec<Value> = nodes
                    .iter()
                    .map(|n| n.value(bag, tracker))
                    .collect::<Result<_, _>>()?;
                (function.call)(&arguments)
                    .map(View::Owned)
                    .map_err(EvalError::Conversion)
            }
        }
    }

    /// The node's value, or `None` when it is an absent attribute or key: what stands left of `|`.
    fn maybe<'a>(
        &'a self,
        bag: &'a Bag,
        tracker: &mut Tracker,
    ) -> Result<Option<View<'a>>, EvalError> {
        match self {
            Node::Attribute(slot, ty) => attribute(*slot, *ty, bag, tracker),
            Node::Key(operands) => {
                let [map, key] = &**operands;
                let Some(map) = map.maybe(bag, tracker)? else {
                    return Ok(None);
                };
                let Some(key) = key.maybe(bag, tracker)? else {
                    return Ok(None);
                };
                let Some(key) = look_up_key(&map, &key, bag, tracker)? else {
                    return Ok(None);
                };
                Ok(match map {
                    View::Map(map, _) => map.get(key).map(View::Text),
                    map => map
                        .map()?
                        .0
                        .get(key)
                        .cloned()
                        .map(|t| View::Owned(Value::String(t))),
                })
            }
            Node::Default(nodes) => {
                for node in nodes {
                    if let Some(view) = node.maybe(bag, tracker)? {
                        return Ok(Some(view));
                    }
                }
                Ok(None)
            }
            other => other.view(bag, tracker).map(Some),
        }
    }

    /// The truth of a BOOL node.
    pub(super) fn test(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        match self {
            Node::And(nodes) => {
                for node in nodes {
                    if !node.test(bag, tracker)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Node::Or(nodes) => {
                for node in nodes {
                    if node.test(bag, tracker)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Node::Equal { negated, operands } => {
                let [left, right] = &**operands;
                let left = left.view(bag, tracker)?;
                let right = right.view(bag, tracker)?;
                Ok(left.scalar().equals(&right.scalar())? != *negated)
            }
            Node::Order { op, operands } => {
                let [left, right] = &**operands;
                let left = left.view(bag, tracker)?;
                let right = right.view(bag, tracker)?;
                let order = left.scalar().order(&right.scalar())?;
                Ok(order.is_some_and(|order| match op {
                    Order::Less => order.is_lt(),
                    Order::LessOrEqual => order.is_le(),
                    Order::Greater => order.is_gt(),
                    Order::GreaterOrEqual => order.is_ge(),
                }))
            }
            Node::Text(test, operands) => {
                let [left, right] = &**operands;
                let left = left.view(bag, tracker)?;
                let right = right.view(bag, tracker)?;
                let (left, right) = (left.text()?, right.text()?);
                Ok(match test {
                    TextTest::Glob => matches_glob(left, right),
                    TextTest::StartsWith => left.starts_with(right.as_str()),
                    TextTest::EndsWith => left.ends_with(right.as_str()),
                    TextTest::Matches => cached_regex(left)?.is_match(right),
                })
            }
            Node::Regex(regex, text) => Ok(regex.is_match(text.view(bag, tracker)?.text()?)),
            other => match other.view(bag, tracker)? {
                View::Borrowed(Value::Bool(truth)) => Ok(*truth),
                View::Owned(Value::Bool(truth)) => Ok(truth),
                _ => Err(EvalError::Internal("BOOL expected")),
            },
        }
    }

    /// Whether a conjunction holds when one false operand decides whatever the others would have failed
    /// with: what a rule's match means.
    pub(super) fn holds(&self, bag: &Bag, tracker: &mut Tracker) -> Result<bool, EvalError> {
        let Node::And(nodes) = self else {
            return self.test(bag, tracker);
        };
        let mut failure = None;
        for node in nodes {
            match node.test(bag, tracker) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            None => Ok(true),
            Some(error) => Err(error),
        }
    }
}

fn attribute<'a>(
    slot: Slot,
    ty: ValueType,
    bag: &'a Bag,
    tracker: &mut Tracker,
) -> Result<Option<View<'a>>, EvalError> {
    match tracker.look_up(bag, slot) {
        None => Ok(None),
        Some(Value::StringMap(map)) if ty == ValueType::StringMap => {
            Ok(Some(View::Map(map, Some(slot))))
        }
        Some(value) if value.value_type() == ty => Ok(Some(View::Borrowed(value))),
        Some(value) => Err(EvalError::WrongType {
            attribute: bag.table().name(slot).clone(),
            want: ty,
            value: value.to_string(),
        }),
    }
}

/// Records the lookup of a key; returns it when the map has it.
fn look_up_key<'k>(
    map: &View<'_>,
    key: &'k View<'_>,
    bag: &Bag,
    tracker: &mut Tracker,
) -> Result<Option<&'k Text>, EvalError> {
    let key = key.text()?;
    let (map, slot) = map.map()?;
    let found = map.get(key).is_some();
    if let Some(slot) = slot {
        tracker.look_up_key(bag, slot, key, found);
    }
    Ok(found.then_some(key))
}

/// Longest text that concatenation makes, in bytes: as much as a request may carry.
const MAX_TEXT_BYTES: usize = 1 << 20;

fn add(left: &View<'_>, right: &View<'_>) -> Result<Value, EvalError> {
    let concat = |a: &str, b: &str| {
        if a.len().saturating_add(b.len()) > MAX_TEXT_BYTES {
            return Err(EvalError::Overflow);
        }
        let mut text = String::with_capacity(a.len() + b.len());
        text.push_str(a);
        text.push_str(b);
        Ok(Text::from(text))
    };
    match (left.scalar(), right.scalar()) {
        (Scalar::Int64(a), Scalar::Int64(b)) => a
            .checked_add(b)
            .map(Value::Int64)
            .ok_or(EvalError::Overflow),
        (Scalar::Double(a), Scalar::Double(b)) => Ok(Value::Double(a + b)),
        (Scalar::String(a), Scalar::String(b)) => concat(a, b).map(Value::String),
        (Scalar::Email(a), Scalar::Email(b)) => concat(a, b).map(Value::Email),
        (Scalar::Uri(a), Scalar::Uri(b)) => concat(a, b).map(Value::Uri),
        (Scalar::DnsName(a), Scalar::DnsName(b)) => concat(a, b).map(Value::DnsName),
        _ => Err(EvalError::Internal("operands of + differ in type")),
    }
}

pub(super) fn convert(function: Unary, text: &Text) -> Result<Value, EvalError> {
    let fail = |reason: String| EvalError::Conversion(reason);
    match function {
        Unary::ToLower => Ok(Value::String(Text::from(text.to_lowercase()))),
        Unary::Size => Ok(Value::Int64(i64::try_from(text.len()).unwrap_or(i64::MAX))),
        Unary::Ip => text
            .parse()
            .map(|ip: IpAddr| Value::Ip(ip.to_canonical()))
            .map_err(|_| fail(format!("could not convert {text} to IP_ADDRESS"))),
        Unary::Timestamp => parse_timestamp(text)
            .map(Value::Timestamp)
            .map_err(|e| fail(e.to_string())),
        Unary::DnsName => names::check_dns(text)
            .map(|()| Value::DnsName(text.clone()))
            .map_err(|e| fail(format!("error converting '{text}' to dns name: '{e}'"))),
        Unary::Email => names::check_email(text)
            .map(|()| Value::Email(text.clone()))
            .map_err(|e| fail(format!("error converting '{text}' to e-mail: '{e}'"))),
        Unary::Uri if text.is_empty() => Err(fail(
            "error converting string to uri: empty string".to_owned(),
        )),
        Unary::Uri => names::check_uri(text)
            .map(|()| Value::Uri(text.clone()))
            .map_err(|e| fail(format!("error converting string to uri '{text}': '{e}'"))),
    }
}
