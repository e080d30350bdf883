//! Static types of CEL, as far as attributes and literals can have them.

use std::fmt;

use crate::value::ValueType;

/// A type. `Dyn` is known at run time only; so is the element of an empty list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Type {
    Dyn,
    Null,
    Bool,
    Int,
    Uint,
    Double,
    Text,
    Bytes,
    Timestamp,
    Duration,
    Ip,
    Email,
    Uri,
    DnsName,
    List(Box<Type>),
    Map(Box<Type>, Box<Type>),
    /// A `google.protobuf.*Value` of this.
    Wrapper(Box<Type>),
    /// Of a type itself.
    Meta(Box<Type>),
    /// The attributes whose names begin so.
    Group(String),
}

impl Type {
    pub(super) fn list(item: Type) -> Type {
        Type::List(Box::new(item))
    }

    pub(super) fn map(key: Type, value: Type) -> Type {
        Type::Map(Box::new(key), Box::new(value))
    }

    pub(super) fn string_map() -> Type {
        Type::map(Type::Text, Type::Text)
    }

    pub(super) fn of(ty: ValueType) -> Type {
        match ty {
            ValueType::String => Type::Text,
            ValueType::Int64 => Type::Int,
            ValueType::Double => Type::Double,
            ValueType::Bool => Type::Bool,
            ValueType::Timestamp => Type::Timestamp,
            ValueType::IpAddress => Type::Ip,
            ValueType::EmailAddress => Type::Email,
            ValueType::Uri => Type::Uri,
            ValueType::DnsName => Type::DnsName,
            ValueType::Duration => Type::Duration,
            ValueType::StringMap => Type::string_map(),
        }
    }

    /// The attribute type that values of this have; `None` when no attribute can have them.
    pub(super) fn value_type(&self) -> Option<ValueType> {
        Some(match self {
            Type::Text => ValueType::String,
            Type::Int => ValueType::Int64,
            Type::Double => ValueType::Double,
            Type::Bool => ValueType::Bool,
            Type::Timestamp => ValueType::Timestamp,
            Type::Duration => ValueType::Duration,
            Type::Ip => ValueType::IpAddress,
            Type::Email => ValueType::EmailAddress,
            Type::Uri => ValueType::Uri,
            Type::DnsName => ValueType::DnsName,
            Type::Wrapper(inner) => return inner.value_type(),
            Type::Map(key, value) if **key == Type::Text || **key == Type::Dyn => match **value {
                Type::Text | Type::Dyn => ValueType::StringMap,
                _ => return None,
            },
            _ => return None,
        })
    }

    /// Whether a value of this type can stand where `want` is asked for.
    pub(super) fn fits(&self, want: &Type) -> bool {
        match (self, want) {
            (Type::Dyn, _) | (_, Type::Dyn) => true,
            (Type::Null, Type::Wrapper(_)) => true,
            (Type::Wrapper(a), b) | (b, Type::Wrapper(a)) => a.fits(b),
            (Type::List(a), Type::List(b)) => a.fits(b),
            (Type::Map(a, x), Type::Map(b, y)) => a.fits(b) && x.fits(y),
            (Type::Meta(_), Type::Meta(_)) => true,
            (a, b) => a == b,
        }
    }

    /// The more particular of two types that fit.
    pub(super) fn join(self, other: Type) -> Type {
        match (self, other) {
            (Type::Dyn, other) => other,
            (Type::Null, wrapper @ Type::Wrapper(_)) => wrapper,
            (Type::List(a), Type::List(b)) => Type::list(a.join(*b)),
            (Type::Map(a, x), Type::Map(b, y)) => Type::map(a.join(*b), x.join(*y)),
            (one, _) => one,
        }
    }

    /// The type that a name of the language stands for.
    pub(super) fn named(name: &str) -> Option<Type> {
        Some(match name {
            "dyn" => Type::Dyn,
            "null_type" => Type::Null,
            "bool" => Type::Bool,
            "int" => Type::Int,
            "uint" => Type::Uint,
            "double" => Type::Double,
            "string" => Type::Text,
            "bytes" => Type::Bytes,
            "google.protobuf.Timestamp" => Type::Timestamp,
            "google.protobuf.Duration" => Type::Duration,
            "list" => Type::list(Type::Dyn),
            "map" => Type::map(Type::Dyn, Type::Dyn),
            "type" => Type::Meta(Box::new(Type::Dyn)),
            _ => return None,
        })
    }

    /// What a message of the well-known types wraps.
    pub(super) fn wrapped(message: &str) -> Option<Type> {
        Some(match message {
            "google.protobuf.BoolValue" => Type::Bool,
            "google.protobuf.Int32Value" | "google.protobuf.Int64Value" => Type::Int,
            "google.protobuf.UInt32Value" | "google.protobuf.UInt64Value" => Type::Uint,
            "google.protobuf.FloatValue" | "google.protobuf.DoubleValue" => Type::Double,
            "google.protobuf.StringValue" => Type::Text,
            "google.protobuf.BytesValue" => Type::Bytes,
            _ => return None,
        })
    }
}

/// As cel-go's messages have it.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Dyn => "dyn",
            Type::Null => "null",
            Type::Bool => "bool",
            Type::Int => "int",
            Type::Uint => "uint",
            Type::Double => "double",
            Type::Text => "string",
            Type::Bytes => "bytes",
            Type::Timestamp => "google.protobuf.Timestamp",
            Type::Duration => "google.protobuf.Duration",
            Type::Ip => "istio.policy.v1beta1.IPAddress",
            Type::Email => "istio.policy.v1beta1.EmailAddress",
            Type::Uri => "istio.policy.v1beta1.Uri",
            Type::DnsName => "istio.policy.v1beta1.DNSName",
            Type::List(item) => return write!(f, "list({item})"),
            Type::Map(key, value) => return write!(f, "map({key}, {value})"),
            Type::Wrapper(inner) => return write!(f, "wrapper({inner})"),
            Type::Meta(inner) => return write!(f, "type({inner})"),
            Type::Group(name) => return write!(f, ".{name}"),
        })
    }
}
