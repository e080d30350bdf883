//! The functions of CEL and Istio's own: which types they take, and what they do.

use chrono::{DateTime, Datelike, FixedOffset, TimeDelta, Timelike, Utc};

use super::value::{Val, entry, fail};
use crate::expression::EvalError;
use crate::expression::evaluate::convert;
use crate::expression::function::{cached_regex, matches_glob};
use crate::expression::program::Unary;
use crate::text::Text;
use crate::value::parse_duration;

/// What a function does. Operands of other types than the overloads have are errors at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Negate,
    Not,
    In,
    Index,
    Size,
    Contains,
    StartsWith,
    EndsWith,
    Matches,
    Glob,
    Reverse,
    Convert(Unary),
    Int,
    Uint,
    Double,
    Text,
    Bytes,
    Bool,
    Duration,
    Dyn,
    TypeOf,
    EmptyStringMap,
    Part(Part),
    /// Of seconds and nanoseconds.
    TimestampOf,
    DurationOf,
}

/// A part of a timestamp or duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    FullYear,
    Month,
    Date,
    DayOfMonth,
    DayOfWeek,
    DayOfYear,
    Hours,
    Minutes,
    Seconds,
    Milliseconds,
}

/// Longest text, and longest list, that an expression makes.
pub(super) const MAX_SIZE: usize = 1 << 20;

impl Function {
    /// The result. Looking up a key of an attribute is the caller's, who records it.
    pub(super) fn call(self, args: &[Val]) -> Result<Val, EvalError> {
        match (self, args) {
            (Function::Equal, [a, b]) => a.equals(b).map(Val::Bool),
            (Function::NotEqual, [a, b]) => a.equals(b).map(|same| Val::Bool(!same)),
            (Function::Less, [a, b]) => ordered(a, b, |o| o.is_lt()),
            (Function::LessOrEqual, [a, b]) => ordered(a, b, |o| o.is_le()),
            (Function::Greater, [a, b]) => ordered(a, b, |o| o.is_gt()),
            (Function::GreaterOrEqual, [a, b]) => ordered(a, b, |o| o.is_ge()),
            (Function::Add, [a, b]) => add(a, b),
            (Function::Subtract, [a, b]) => subtract(a, b),
            (Function::Multiply, [a, b]) => match (a, b) {
                (Val::Int(a), Val::Int(b)) => a.checked_mul(*b).map(Val::Int).ok_or(OUT_OF_RANGE),
                (Val::Uint(a), Val::Uint(b)) => {
                    a.checked_mul(*b).map(Val::Uint).ok_or(OUT_OF_RANGE)
                }
                (Val::Double(a), Val::Double(b)) => Ok(Val::Double(a * b)),
                _ => self.no_overload(args),
            },
            (Function::Divide, [a, b]) => match (a, b) {
                (Val::Int(_), Val::Int(0)) | (Val::Uint(_), Val::Uint(0)) => fail("divide by zero"),
                (Val::Int(a), Val::Int(b)) => a.checked_div(*b).map(Val::Int).ok_or(OUT_OF_RANGE),
                (Val::Uint(a), Val::Uint(b)) => {
                    a.checked_div(*b).map(Val::Uint).ok_or(OUT_OF_RANGE)
                }
                (Val::Double(a), Val::Double(b)) => Ok(Val::Double(a / b)),
                _ => self.no_overload(args),
            },
            (Function::Modulo, [a, b]) => match (a, b) {
                (Val::Int(_), Val::Int(0)) | (Val::Uint(_), Val::Uint(0)) => {
                    fail("modulus by zero")
                }
                (Val::Int(a), Val::Int(b)) => a.checked_rem(*b).map(Val::Int).ok_or(OUT_OF_RANGE),
                (Val::Uint(a), Val::Uint(b)) => {
                    a.checked_rem(*b).map(Val::Uint).ok_or(OUT_OF_RANGE)
                }
                _ => self.no_overload(args),
            },
            (Function::Negate, [Val::Int(v)]) => v.checked_neg().map(Val::Int).ok_or(OUT_OF_RANGE),
            (Function::Negate, [Val::Double(v)]) => Ok(Val::Double(-v)),
            (Function::Not, [Val::Bool(v)]) => Ok(Val::Bool(!v)),
            (Function::In, [item, Val::List(list)]) => {
                for other in list.iter() {
                    if item.equals(other)? {
                        return Ok(Val::Bool(true));
                    }
                }
                Ok(Val::Bool(false))
            }
            (Function::In, [key, Val::Map(map)]) => Ok(Val::Bool(entry(map, key)?.is_some())),
            (Function::Index, [Val::List(list), Val::Int(at)]) => {
                let found = usize::try_from(*at).ok().and_then(|at| list.get(at));
                found.cloned().map_or_else(
                    || {
                        let size = list.len();
                        fail(format!(
                            "index '{at}' out of range in list of size '{size}'"
                        ))
                    },
                    Ok,
                )
            }
            (Function::Index, [Val::Map(map), key]) => match entry(map, key)? {
                Some(value) => Ok(value.clone()),
                None => fail(format!("no such key: {}", key.shown())),
            },
            (Function::Size, [value]) => {
                let size = match value {
                    Val::Text(text) => text.chars().count(),
                    Val::Bytes(bytes) => bytes.len(),
                    Val::List(list) => list.len(),
                    Val::Map(map) => map.len(),
                    Val::StringMap(..) => return fail("size not implemented on stringmaps"),
                    _ => return self.no_overload(args),
                };
                Ok(Val::Int(i64::try_from(size).unwrap_or(i64::MAX)))
            }
            (Function::Contains, [Val::Text(a), Val::Text(b)]) => {
                Ok(Val::Bool(a.contains(b.as_str())))
            }
            (Function::StartsWith, [Val::Text(a), Val::Text(b)]) => {
                Ok(Val::Bool(a.starts_with(b.as_str())))
            }
            (Function::EndsWith, [Val::Text(a), Val::Text(b)]) => {
                Ok(Val::Bool(a.ends_with(b.as_str())))
            }
            (Function::Matches, [Val::Text(text), Val::Text(pattern)]) => {
                Ok(Val::Bool(cached_regex(pattern)?.is_match(text)))
            }
            (Function::Glob, [Val::Text(text), Val::Text(pattern)]) => {
                Ok(Val::Bool(matches_glob(text, pattern)))
            }
            (Function::Reverse, [Val::Text(text)]) => {
                Ok(Val::Text(text.chars().rev().collect::<String>().into()))
            }
            (Function::Convert(Unary::Timestamp), [time @ Val::Timestamp(_)]) => Ok(time.clone()),
            (Function::Convert(Unary::Timestamp), [Val::Int(seconds)]) => {
                time_in_range(DateTime::from_timestamp(*seconds, 0))
            }
            (Function::Convert(unary), [Val::Text(text)]) => {
                convert(unary, text).map(|value| Val::of(&value, None))
            }
            (Function::Int, [value]) => to_int(value),
            (Function::Uint, [value]) => to_uint(value),
            (Function::Double, [value]) => to_double(value),
            (Function::Text, [value]) => to_text(value),
            (Function::Bytes, [Val::Text(text)]) => Ok(Val::Bytes(text.as_bytes().into())),
            (Function::Bytes, [bytes @ Val::Bytes(_)]) => Ok(bytes.clone()),
            (Function::Bool, [truth @ Val::Bool(_)]) => Ok(truth.clone()),
            (Function::Bool, [Val::Text(text)]) => match text.as_str() {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Val::Bool(true)),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Val::Bool(false)),
                _ => fail(format!("'{text}' is no bool")),
            },
            (Function::Duration, [span @ Val::Duration(_)]) => Ok(span.clone()),
            (Function::Duration, [Val::Text(text)]) => match parse_duration(text) {
                Some(span) => Ok(Val::Duration(span)),
                None => fail(format!("'{text}' is no duration; write 1h2m3.5s")),
            },
            (Function::Dyn, [value]) => Ok(value.clone()),
            (Function::TypeOf, [value]) => Ok(Val::Type(value.type_of())),
            (Function::EmptyStringMap, []) => Ok(Val::StringMap(Default::default(), None)),
            (Function::TimestampOf, [Val::Int(seconds), Val::Int(nanos)]) => {
                let nanos = u32::try_from(*nanos).map_err(|_| OUT_OF_RANGE)?;
                time_in_range(DateTime::from_timestamp(*seconds, nanos))
            }
            (Function::DurationOf, [Val::Int(seconds), Val::Int(nanos)]) => {
                let whole = TimeDelta::try_seconds(*seconds).ok_or(OUT_OF_RANGE)?;
                span_in_range(whole.checked_add(&TimeDelta::nanoseconds(*nanos)))
            }
            (Function::Part(part), [Val::Timestamp(time)]) => {
                Ok(Val::Int(part.of_time(&time.fixed_offset())))
            }
            (Function::Part(part), [Val::Timestamp(time), Val::Text(zone)]) => {
                let offset = offset(zone)?;
                Ok(Val::Int(part.of_time(&time.with_timezone(&offset))))
            }
            (Function::Part(part), [Val::Duration(span)]) => part.of_span(*span),
            _ => self.no_overload(args),
        }
    }

    fn no_overload(self, args: &[Val]) -> Result<Val, EvalError> {
        let types: Vec<String> = args.iter().map(|a| a.type_of().to_string()).collect();
        fail(format!("no such overload: {self:?}({})", types.join(", ")))
    }
}

impl Val {
    /// As error messages show a key.
    pub(super) fn shown(&self) -> String {
        match self {
            Val::Text(text) => format!("'{text}'"),
            other => match to_text(other) {
                Ok(Val::Text(text)) => text.to_string(),
                _ => other.type_of().to_string(),
            },
        }
    }
}

const OUT_OF_RANGE: EvalError = EvalError::Overflow;

fn ordered(a: &Val, b: &Val, test: impl Fn(std::cmp::Ordering) -> bool) -> Result<Val, EvalError> {
    Ok(Val::Bool(a.order(b)?.is_some_and(test)))
}

/// CEL's timestamps are those of years 1 to 9999.
fn time_in_range(time: Option<DateTime<Utc>>) -> Result<Val, EvalError> {
    match time.filter(|t| (1..=9999).contains(&t.year())) {
        Some(time) => Ok(Val::Timestamp(time)),
        None => Err(OUT_OF_RANGE),
    }
}

/// CEL's durations are those that 64 bits of nanoseconds hold.
fn span_in_range(span: Option<TimeDelta>) -> Result<Val, EvalError> {
    match span.filter(|s| s.num_nanoseconds().is_some()) {
        Some(span) => Ok(Val::Duration(span)),
        None => Err(OUT_OF_RANGE),
    }
}

fn add(a: &Val, b: &Val) -> Result<Val, EvalError> {
    Ok(match (a, b) {
        (Val::Int(a), Val::Int(b)) => Val::Int(a.checked_add(*b).ok_or(OUT_OF_RANGE)?),
        (Val::Uint(a), Val::Uint(b)) => Val::Uint(a.checked_add(*b).ok_or(OUT_OF_RANGE)?),
        (Val::Double(a), Val::Double(b)) => Val::Double(a + b),
        (Val::Text(a), Val::Text(b)) => {
            bounded(a.len(), b.len())?;
            Val::Text(Text::from(format!("{a}{b}")))
        }
        (Val::Bytes(a), Val::Bytes(b)) => {
            bounded(a.len(), b.len())?;
            Val::Bytes([&**a, &**b].concat().into())
        }
        (Val::List(a), Val::List(b)) => {
            bounded(a.len(), b.len())?;
            Val::List(a.iter().chain(b.iter()).cloned().collect())
        }
        (Val::Timestamp(time), Val::Duration(span))
        | (Val::Duration(span), Val::Timestamp(time)) => {
            return time_in_range(time.checked_add_signed(*span));
        }
        (Val::Duration(a), Val::Duration(b)) => return span_in_range(a.checked_add(b)),
        _ => return Function::Add.no_overload(&[a.clone(), b.clone()]),
    })
}

fn bounded(a: usize, b: usize) -> Result<(), EvalError> {
    if a.saturating_add(b) > MAX_SIZE {
        return Err(OUT_OF_RANGE);
    }
    Ok(())
}

fn subtract(a: &Val, b: &Val) -> Result<Val, EvalError> {
    Ok(match (a, b) {
        (Val::Int(a), Val::Int(b)) => Val::Int(a.checked_sub(*b).ok_or(OUT_OF_RANGE)?),
        (Val::Uint(a), Val::Uint(b)) => Val::Uint(a.checked_sub(*b).ok_or(OUT_OF_RANGE)?),
        (Val::Double(a), Val::Double(b)) => Val::Double(a - b),
        (Val::Timestamp(a), Val::Timestamp(b)) => return span_in_range(Some(*a - *b)),
        (Val::Timestamp(time), Val::Duration(span)) => {
            return time_in_range(time.checked_sub_signed(*span));
        }
        (Val::Duration(a), Val::Duration(b)) => return span_in_range(a.checked_sub(b)),
        _ => return Function::Subtract.no_overload(&[a.clone(), b.clone()]),
    })
}

fn to_int(value: &Val) -> Result<Val, EvalError> {
    let number = match value {
        Val::Int(v) => Some(*v),
        Val::Uint(v) => i64::try_from(*v).ok(),
        // The bounds are exact as doubles: -2^63, and 2^63 which is one too many.
        #[allow(clippy::cast_possible_truncation, reason = "in range")]
        Val::Double(v)
            if *v >= -9_223_372_036_854_775_808.0 && *v < 9_223_372_036_854_775_808.0 =>
        {
            Some(v.trunc() as i64)
        }
        Val::Timestamp(v) => Some(v.timestamp()),
        Val::Text(text) => match text.parse() {
            Ok(v) => Some(v),
            Err(_) => return fail(format!("'{text}' is no int")),
        },
        _ => None,
    };
    number.map(Val::Int).ok_or(OUT_OF_RANGE)
}

fn to_uint(value: &Val) -> Result<Val, EvalError> {
    let number = match value {
        Val::Uint(v) => Some(*v),
        Val::Int(v) => u64::try_from(*v).ok(),
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in range"
        )]
        Val::Double(v) if *v >= 0.0 && *v < 18_446_744_073_709_551_616.0 => Some(v.trunc() as u64),
        Val::Text(text) => match text.parse() {
            Ok(v) => Some(v),
            Err(_) => return fail(format!("'{text}' is no uint")),
        },
        _ => None,
    };
    number.map(Val::Uint).ok_or(OUT_OF_RANGE)
}

#[allow(
    clippy::cast_precision_loss,
    reason = "as the specification has it: the nearest double"
)]
fn to_double(value: &Val) -> Result<Val, EvalError> {
    Ok(Val::Double(match value {
        Val::Double(v) => *v,
        Val::Int(v) => *v as f64,
        Val::Uint(v) => *v as f64,
        Val::Text(text) => match text.parse() {
            Ok(v) => v,
            Err(_) => return fail(format!("'{text}' is no double")),
        },
        other => return Function::Double.no_overload(std::slice::from_ref(other)),
    }))
}

fn to_text(value: &Val) -> Result<Val, EvalError> {
    let text = match value {
        Val::Text(text) => return Ok(Val::Text(text.clone())),
        Val::Int(v) => v.to_string(),
        Val::Uint(v) => v.to_string(),
        Val::Double(v) => v.to_string(),
        Val::Bool(v) => v.to_string(),
        Val::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => return fail("invalid UTF-8 in bytes"),
        },
        Val::Timestamp(v) => crate::value::Value::Timestamp(*v).to_string(),
        Val::Duration(v) => crate::value::Value::Duration(*v).to_string(),
        other => return Function::Text.no_overload(std::slice::from_ref(other)),
    };
    Ok(Val::Text(text.into()))
}

/// A time zone: `UTC` or an offset such as `+02:00`.
fn offset(zone: &str) -> Result<FixedOffset, EvalError> {
    let unknown =
        || EvalError::Conversion(format!("unknown time zone {zone}; write UTC, or +02:00"));
    let (sign, rest) = match zone.as_bytes().first() {
        Some(b'-') => (-1, zone.get(1..).unwrap_or_default()),
        Some(b'+') => (1, zone.get(1..).unwrap_or_default()),
        _ if matches!(zone, "UTC" | "GMT" | "Z" | "") => (1, "00:00"),
        _ => (1, zone),
    };
    let (hours, minutes) = rest.split_once(':').ok_or_else(unknown)?;
    let hours: i32 = hours.parse().map_err(|_| unknown())?;
    let minutes: i32 = minutes.parse().map_err(|_| unknown())?;
    if !(0..24).contains(&hours) || !(0..60).contains(&minutes) {
        return Err(unknown());
    }
    FixedOffset::east_opt(sign * (hours * 3600 + minutes * 60)).ok_or_else(unknown)
}

impl Part {
    fn of_time(self, time: &DateTime<FixedOffset>) -> i64 {
        i64::from(match self {
            Part::FullYear => return i64::from(time.year()),
            Part::Month => time.month0(),
            Part::Date => time.day(),
            Part::DayOfMonth => time.day0(),
            Part::DayOfWeek => time.weekday().num_days_from_sunday(),
            Part::DayOfYear => time.ordinal0(),
            Part::Hours => time.hour(),
            Part::Minutes => time.minute(),
            Part::Seconds => time.second(),
            Part::Milliseconds => time.timestamp_subsec_millis(),
        })
    }

    fn of_span(self, span: TimeDelta) -> Result<Val, EvalError> {
        Ok(Val::Int(match self {
            Part::Hours => span.num_hours(),
            Part::Minutes => span.num_minutes(),
            Part::Seconds => span.num_seconds(),
            Part::Milliseconds => span.num_milliseconds(),
            other => return Function::Part(other).no_overload(&[Val::Duration(span)]),
        }))
    }
}
