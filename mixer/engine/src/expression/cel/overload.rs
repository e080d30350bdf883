//! Which types the functions of CEL take: the specification's overloads and those of Istio's functions.

use super::function::{Function, Part};
use super::types::Type;
use crate::expression::program::Unary;

/// A type in a signature. `A` and `B` stand for any type, the same wherever they are in a call.
#[derive(Clone, Copy, Debug)]
enum P {
    A,
    ListA,
    B,
    MapAB,
    TypeA,
    Dyn,
    Bool,
    Int,
    Uint,
    Double,
    Text,
    Bytes,
    Time,
    Span,
    Ip,
    Email,
    Uri,
    DnsName,
    StringMap,
}

use P::{Bool, Bytes, Double, Int, Span, Text as Str, Time, Uint};

/// Name, whether it is a method (the first parameter is what it is called on), function, and overloads: the
/// parameters, and the result last.
type Row = (&'static str, bool, Function, &'static [&'static [P]]);

const EQUALITY: &[&[P]] = &[&[P::A, P::A, Bool]];
const ORDER: &[&[P]] = &[
    &[Bool, Bool, Bool],
    &[Int, Int, Bool],
    &[Uint, Uint, Bool],
    &[Double, Double, Bool],
    &[Str, Str, Bool],
    &[Bytes, Bytes, Bool],
    &[Time, Time, Bool],
    &[Span, Span, Bool],
];
const NUMBERS: &[&[P]] = &[
    &[Int, Int, Int],
    &[Uint, Uint, Uint],
    &[Double, Double, Double],
];
const SIZE: &[&[P]] = &[
    &[Str, Int],
    &[Bytes, Int],
    &[P::ListA, Int],
    &[P::MapAB, Int],
];
const TWO_TEXTS: &[&[P]] = &[&[Str, Str, Bool]];
const OF_TIME: &[&[P]] = &[&[Time, Int], &[Time, Str, Int]];
const OF_TIME_OR_SPAN: &[&[P]] = &[&[Time, Int], &[Time, Str, Int], &[Span, Int]];

static TABLE: &[Row] = &[
    ("_==_", false, Function::Equal, EQUALITY),
    ("_!=_", false, Function::NotEqual, EQUALITY),
    ("_<_", false, Function::Less, ORDER),
    ("_<=_", false, Function::LessOrEqual, ORDER),
    ("_>_", false, Function::Greater, ORDER),
    ("_>=_", false, Function::GreaterOrEqual, ORDER),
    (
        "_+_",
        false,
        Function::Add,
        &[
            &[Int, Int, Int],
            &[Uint, Uint, Uint],
            &[Double, Double, Double],
            &[Str, Str, Str],
            &[Bytes, Bytes, Bytes],
            &[P::ListA, P::ListA, P::ListA],
            &[Time, Span, Time],
            &[Span, Time, Time],
            &[Span, Span, Span],
        ],
    ),
    (
        "_-_",
        false,
        Function::Subtract,
        &[
            &[Int, Int, Int],
            &[Uint, Uint, Uint],
            &[Double, Double, Double],
            &[Time, Time, Span],
            &[Time, Span, Time],
            &[Span, Span, Span],
        ],
    ),
    ("_*_", false, Function::Multiply, NUMBERS),
    ("_/_", false, Function::Divide, NUMBERS),
    (
        "_%_",
        false,
        Function::Modulo,
        &[&[Int, Int, Int], &[Uint, Uint, Uint]],
    ),
    (
        "-_",
        false,
        Function::Negate,
        &[&[Int, Int], &[Double, Double]],
    ),
    ("!_", false, Function::Not, &[&[Bool, Bool]]),
    (
        "_in_",
        false,
        Function::In,
        &[&[P::A, P::ListA, Bool], &[P::A, P::MapAB, Bool]],
    ),
    (
        "_[_]",
        false,
        Function::Index,
        &[&[P::ListA, Int, P::A], &[P::MapAB, P::A, P::B]],
    ),
    ("size", false, Function::Size, SIZE),
    ("size", true, Function::Size, SIZE),
    ("contains", true, Function::Contains, TWO_TEXTS),
    ("startsWith", true, Function::StartsWith, TWO_TEXTS),
    ("endsWith", true, Function::EndsWith, TWO_TEXTS),
    ("matches", true, Function::Matches, TWO_TEXTS),
    ("matches", false, Function::Matches, TWO_TEXTS),
    ("match", false, Function::Glob, TWO_TEXTS),
    ("reverse", true, Function::Reverse, &[&[Str, Str]]),
    ("reverse", false, Function::Reverse, &[&[Str, Str]]),
    (
        "toLower",
        false,
        Function::Convert(Unary::ToLower),
        &[&[Str, Str]],
    ),
    ("ip", false, Function::Convert(Unary::Ip), &[&[Str, P::Ip]]),
    (
        "email",
        false,
        Function::Convert(Unary::Email),
        &[&[Str, P::Email]],
    ),
    (
        "uri",
        false,
        Function::Convert(Unary::Uri),
        &[&[Str, P::Uri]],
    ),
    (
        "dnsName",
        false,
        Function::Convert(Unary::DnsName),
        &[&[Str, P::DnsName]],
    ),
    (
        "emptyStringMap",
        false,
        Function::EmptyStringMap,
        &[&[P::StringMap]],
    ),
    (
        "timestamp",
        false,
        Function::Convert(Unary::Timestamp),
        &[&[Str, Time], &[Time, Time], &[Int, Time]],
    ),
    (
        "duration",
        false,
        Function::Duration,
        &[&[Str, Span], &[Span, Span]],
    ),
    (
        "int",
        false,
        Function::Int,
        &[
            &[Int, Int],
            &[Uint, Int],
            &[Double, Int],
            &[Str, Int],
            &[Time, Int],
        ],
    ),
    (
        "uint",
        false,
        Function::Uint,
        &[&[Uint, Uint], &[Int, Uint], &[Double, Uint], &[Str, Uint]],
    ),
    (
        "double",
        false,
        Function::Double,
        &[
            &[Double, Double],
            &[Int, Double],
            &[Uint, Double],
            &[Str, Double],
        ],
    ),
    (
        "string",
        false,
        Function::Text,
        &[
            &[Str, Str],
            &[Int, Str],
            &[Uint, Str],
            &[Double, Str],
            &[Bytes, Str],
            &[Time, Str],
            &[Span, Str],
        ],
    ),
    (
        "bytes",
        false,
        Function::Bytes,
        &[&[Bytes, Bytes], &[Str, Bytes]],
    ),
    (
        "bool",
        false,
        Function::Bool,
        &[&[Bool, Bool], &[Str, Bool]],
    ),
    ("dyn", false, Function::Dyn, &[&[P::A, P::Dyn]]),
    ("type", false, Function::TypeOf, &[&[P::A, P::TypeA]]),
    ("getFullYear", true, Function::Part(Part::FullYear), OF_TIME),
    ("getMonth", true, Function::Part(Part::Month), OF_TIME),
    ("getDate", true, Function::Part(Part::Date), OF_TIME),
    (
        "getDayOfMonth",
        true,
        Function::Part(Part::DayOfMonth),
        OF_TIME,
    ),
    (
        "getDayOfWeek",
        true,
        Function::Part(Part::DayOfWeek),
        OF_TIME,
    ),
    (
        "getDayOfYear",
        true,
        Function::Part(Part::DayOfYear),
        OF_TIME,
    ),
    (
        "getHours",
        true,
        Function::Part(Part::Hours),
        OF_TIME_OR_SPAN,
    ),
    (
        "getMinutes",
        true,
        Function::Part(Part::Minutes),
        OF_TIME_OR_SPAN,
    ),
    (
        "getSeconds",
        true,
        Function::Part(Part::Seconds),
        OF_TIME_OR_SPAN,
    ),
    (
        "getMilliseconds",
        true,
        Function::Part(Part::Milliseconds),
        OF_TIME_OR_SPAN,
    ),
];

/// Finds the function that takes operands of these types (`is_method`: the first is what it is called on), and
/// the type of its result. The error is cel-go's.
pub(super) fn resolve(
    name: &str,
    is_method: bool,
    operands: &[Type],
) -> Result<(Function, Type), String> {
    let mut result: Option<(Function, Type)> = None;
    let mut is_known = false;
    for (_, method, function, overloads) in TABLE.iter().filter(|row| row.0 == name) {
        is_known = true;
        if *method != is_method {
            continue;
        }
        for overload in *overloads {
            let Some(ty) = apply(overload, operands) else {
                continue;
            };
            result = Some(match result {
                // Operands of type dyn: which overload it is shows at run time.
                Some((function, other)) if other != ty => (function, Type::Dyn),
                Some(same) => same,
                None => (*function, ty),
            });
        }
    }
    match result {
        Some(found) => Ok(found),
        None if !is_known => Err(format!(
            "undeclared reference to '{name}' (in container '')"
        )),
        None => {
            let types: Vec<String> = operands.iter().map(Type::to_string).collect();
            let shown = match types.split_first() {
                Some((target, rest)) if is_method => format!("{target}.({})", rest.join(", ")),
                _ => format!("({})", types.join(", ")),
            };
            Err(format!(
                "found no matching overload for '{name}' applied to '{shown}'"
            ))
        }
    }
}

/// The result of an overload, if it takes these operands.
fn apply(overload: &[P], operands: &[Type]) -> Option<Type> {
    let (result, params) = overload.split_last()?;
    if params.len() != operands.len() {
        return None;
    }
    let (mut a, mut b) = (Type::Dyn, Type::Dyn);
    for (param, operand) in params.iter().zip(operands) {
        let want = param.with(&a, &b);
        if !operand.fits(&want) {
            return None;
        }
        match (param, operand) {
            (P::A, ty) => a = a.join(ty.clone()),
            (P::ListA, Type::List(item)) => a = a.join((**item).clone()),
            (P::MapAB, Type::Map(key, value)) => {
                a = a.join((**key).clone());
                b = b.join((**value).clone());
            }
            _ => {}
        }
    }
    Some(result.with(&a, &b))
}

impl P {
    fn with(self, a: &Type, b: &Type) -> Type {
        match self {
            P::A => a.clone(),
            P::B => b.clone(),
            P::ListA => Type::list(a.clone()),
            P::MapAB => Type::map(a.clone(), b.clone()),
            P::TypeA => Type::Meta(Box::new(a.clone())),
            P::Dyn => Type::Dyn,
            Bool => Type::Bool,
            Int => Type::Int,
            Uint => Type::Uint,
            Double => Type::Double,
            Str => Type::Text,
            Bytes => Type::Bytes,
            Time => Type::Timestamp,
            Span => Type::Duration,
            P::Ip => Type::Ip,
            P::Email => Type::Email,
            P::Uri => Type::Uri,
            P::DnsName => Type::DnsName,
            P::StringMap => Type::string_map(),
        }
    }
}
