//! Values of CEL, and how they become attribute values.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use super::types::Type;
use crate::expression::EvalError;
use crate::names;
use crate::table::Slot;
use crate::text::Text;
use crate::value::{StringMap, Value, ValueType};

/// A value. Clones are cheap: a reference count at most.
#[derive(Clone, Debug)]
pub(super) enum Val {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Text(Text),
    Bytes(Arc<[u8]>),
    Timestamp(DateTime<Utc>),
    Duration(TimeDelta),
    /// `None`: what an absent attribute has.
    Ip(Option<IpAddr>),
    Email(Text),
    Uri(Text),
    DnsName(Text),
    /// A STRING_MAP, and the attribute it came from.
    StringMap(StringMap, Option<Slot>),
    List(Arc<[Val]>),
    Map(Arc<[(Val, Val)]>),
    Type(Type),
    /// The attributes whose names begin so.
    Group(Text),
}

pub(super) fn fail<T>(reason: impl Into<String>) -> Result<T, EvalError> {
    Err(EvalError::Conversion(reason.into()))
}

impl Val {
    /// An attribute's value.
    pub(super) fn of(value: &Value, slot: Option<Slot>) -> Val {
        match value {
            Value::String(t) => Val::Text(t.clone()),
            Value::Int64(v) => Val::Int(*v),
            Value::Double(v) => Val::Double(*v),
            Value::Bool(v) => Val::Bool(*v),
            Value::Timestamp(v) => Val::Timestamp(*v),
            Value::Duration(v) => Val::Duration(*v),
            Value::Ip(v) => Val::Ip(Some(*v)),
            Value::Email(t) => Val::Email(t.clone()),
            Value::Uri(t) => Val::Uri(t.clone()),
            Value::DnsName(t) => Val::DnsName(t.clone()),
            Value::StringMap(m) => Val::StringMap(m.clone(), slot),
        }
    }

    /// What an absent attribute of a type is.
    pub(super) fn zero(ty: ValueType) -> Val {
        match ty {
            ValueType::String => Val::Text(Text::EMPTY),
            ValueType::Int64 => Val::Int(0),
            ValueType::Double => Val::Double(0.0),
            ValueType::Bool => Val::Bool(false),
            ValueType::Timestamp => Val::Timestamp(DateTime::UNIX_EPOCH),
            ValueType::Duration => Val::Duration(TimeDelta::zero()),
            ValueType::IpAddress => Val::Ip(None),
            ValueType::EmailAddress => Val::Email(Text::EMPTY),
            ValueType::Uri => Val::Uri(Text::EMPTY),
            ValueType::DnsName => Val::DnsName(Text::EMPTY),
            ValueType::StringMap => Val::StringMap(StringMap::default(), None),
        }
    }

    /// The run-time type.
    pub(super) fn type_of(&self) -> Type {
        match self {
            Val::Null => Type::Null,
            Val::Bool(_) => Type::Bool,
            Val::Int(_) => Type::Int,
            Val::Uint(_) => Type::Uint,
            Val::Double(_) => Type::Double,
            Val::Text(_) => Type::Text,
            Val::Bytes(_) => Type::Bytes,
            Val::Timestamp(_) => Type::Timestamp,
            Val::Duration(_) => Type::Duration,
            Val::Ip(_) => Type::Ip,
            Val::Email(_) => Type::Email,
            Val::Uri(_) => Type::Uri,
            Val::DnsName(_) => Type::DnsName,
            Val::List(_) => Type::list(Type::Dyn),
            Val::Map(_) | Val::StringMap(..) => Type::map(Type::Dyn, Type::Dyn),
            Val::Type(_) => Type::Meta(Box::new(Type::Dyn)),
            Val::Group(name) => Type::Group(name.to_string()),
        }
    }

    pub(super) fn truth(&self) -> Result<bool, EvalError> {
        match self {
            Val::Bool(truth) => Ok(*truth),
            other => fail(format!("no such overload: {} is no bool", other.type_of())),
        }
    }

    /// `==`. Types never differ where they were checked; values of type `dyn` may, and are then an error.
    pub(super) fn equals(&self, other: &Val) -> Result<bool, EvalError> {
        let named =
            |r: Result<bool, names::NameError>| r.map_err(|e| EvalError::Conversion(e.to_string()));
        match (self, other) {
            (Val::Null, Val::Null) => Ok(true),
            (Val::Null, _) | (_, Val::Null) => Ok(false),
            (Val::Bool(a), Val::Bool(b)) => Ok(a == b),
            (Val::Int(a), Val::Int(b)) => Ok(a == b),
            (Val::Uint(a), Val::Uint(b)) => Ok(a == b),
            (Val::Double(a), Val::Double(b)) => Ok(a == b),
            (Val::Text(a), Val::Text(b)) => Ok(a == b),
            (Val::Bytes(a), Val::Bytes(b)) => Ok(a == b),
            (Val::Timestamp(a), Val::Timestamp(b)) => Ok(a == b),
            (Val::Duration(a), Val::Duration(b)) => Ok(a == b),
            (Val::Ip(a), Val::Ip(b)) => {
                Ok(a.map(|a| a.to_canonical()) == b.map(|b| b.to_canonical()))
            }
            (Val::Email(a), Val::Email(b)) => named(names::email_equal(a, b)),
            (Val::Uri(a), Val::Uri(b)) => named(names::uri_equal(a, b)),
            (Val::DnsName(a), Val::DnsName(b)) => named(names::dns_equal(a, b)),
            (Val::Type(a), Val::Type(b)) => Ok(a == b),
            (Val::StringMap(..), _) | (_, Val::StringMap(..)) => {
                fail("stringmap does not support equality")
            }
            (Val::Group(_), _) | (_, Val::Group(_)) => {
                fail("attribute message does not support equality")
            }
            (Val::List(a), Val::List(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (a, b) in a.iter().zip(b.iter()) {
                    if !a.equals(b)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            (Val::Map(a), Val::Map(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (key, value) in a.iter() {
                    match entry(b, key)? {
                        Some(other) if value.equals(other)? => {}
                        _ => return Ok(false),
                    }
                }
                Ok(true)
            }
            (a, b) => fail(format!(
                "no such overload: {} == {}",
                a.type_of(),
                b.type_of()
            )),
        }
    }

    /// `None` when a number is not a number.
    pub(super) fn order(&self, other: &Val) -> Result<Option<Ordering>, EvalError> {
        Ok(match (self, other) {
            (Val::Bool(a), Val::Bool(b)) => Some(a.cmp(b)),
            (Val::Int(a), Val::Int(b)) => Some(a.cmp(b)),
            (Val::Uint(a), Val::Uint(b)) => Some(a.cmp(b)),
            (Val::Double(a), Val::Double(b)) => a.partial_cmp(b),
            (Val::Text(a), Val::Text(b)) => Some(a.cmp(b)),
            (Val::Bytes(a), Val::Bytes(b)) => Some(a.cmp(b)),
            (Val::Timestamp(a), Val::Timestamp(b)) => Some(a.cmp(b)),
            (Val::Duration(a), Val::Duration(b)) => Some(a.cmp(b)),
            (a, b) => {
                let (a, b) = (a.type_of(), b.type_of());
                return fail(format!("no such overload: {a} < {b}"));
            }
        })
    }

    /// As an attribute value.
    ///
    /// # Errors
    /// No attribute can have such a value: a list, null, the address of an absent attribute.
    pub(super) fn recover(self) -> Result<Value, EvalError> {
        Ok(match self {
            Val::Bool(v) => Value::Bool(v),
            Val::Int(v) => Value::Int64(v),
            Val::Double(v) => Value::Double(v),
            Val::Text(t) => Value::String(t),
            Val::Timestamp(v) => Value::Timestamp(v),
            Val::Duration(v) => Value::Duration(v),
            Val::Ip(Some(v)) => Value::Ip(v),
            Val::Ip(None) => return fail("no address: the attribute is absent"),
            Val::Email(t) => Value::Email(t),
            Val::Uri(t) => Value::Uri(t),
            Val::DnsName(t) => Value::DnsName(t),
            Val::StringMap(m, _) => Value::StringMap(m),
            Val::Map(entries) => {
                let mut texts = Vec::with_capacity(entries.len());
                for (key, value) in entries.iter() {
                    match (key, value) {
                        (Val::Text(key), Val::Text(value)) => {
                            texts.push((key.clone(), value.clone()));
                        }
                        _ => return fail("failed to recover of type map"),
                    }
                }
                Value::StringMap(StringMap::new(texts))
            }
            other => return fail(format!("failed to recover of type {}", other.type_of())),
        })
    }
}

/// The value of a key.
pub(super) fn entry<'m>(
    entries: &'m [(Val, Val)],
    key: &Val,
) -> Result<Option<&'m Val>, EvalError> {
    for (k, value) in entries {
        // Keys of other types are other keys.
        if k.type_of() == key.type_of() && k.equals(key)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}
