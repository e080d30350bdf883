//! Instances and answers as values of the component model, and back. What comes from a guest has the type that was
//! asked for, and nothing else is certain about it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use lateen_adapter::{
    CheckResult, Code, DirectResponse, Field, FieldKind, InstanceType, Output, QuotaArgs,
    QuotaResult, QuotaWindow, Status, StringMap, Template, Value, ValueType,
    instance::{Custom, FieldValue, Fields, Values},
    wit::{self, BadName},
};
use wasmtime::component::Val;

/// How instances of one template are made into records, and its outputs out of them.
#[derive(Clone, Debug)]
pub struct Lowering {
    fields: Vec<Lowered>,
    outputs: &'static [(&'static str, ValueType)],
}

#[derive(Clone, Debug)]
struct Lowered {
    label: String,
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Exact(ValueType),
    Any,
    Map,
    Message(Vec<Lowered>),
}

impl Lowering {
    /// Of `template`.
    ///
    /// # Errors
    /// When the template makes no interface.
    pub fn of(template: &Template) -> Result<Self, BadName> {
        Ok(Self {
            fields: lowered(template.fields)?,
            outputs: template.outputs,
        })
    }

    /// An instance as the record `instance`.
    pub fn instance(&self, instance: Custom) -> Val {
        let mut record = vec![("name".to_owned(), text(&instance.name))];
        lower(&self.fields, instance.fields, &mut record);
        Val::Record(record)
    }

    /// The record `output` as the values it has.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn output(&self, output: &Val) -> Result<Output, String> {
        let fields = record(output)?;
        let mut found = Output::new();
        for ((name, ty), (_, value)) in self.outputs.iter().zip(fields) {
            let value = option(value)?.map(|value| lift(value, *ty));
            found.extend(value.transpose()?.map(|value| (*name, value)));
        }
        Ok(found)
    }
}

fn lowered(fields: &'static [Field]) -> Result<Vec<Lowered>, BadName> {
    let one = |field: &'static Field| {
        Ok(Lowered {
            label: wit::kebab(field.name)?,
            name: field.name,
            kind: match &field.kind {
                FieldKind::Exact(ty) => Kind::Exact(*ty),
                FieldKind::Any => Kind::Any,
                FieldKind::Map => Kind::Map,
                FieldKind::Message(fields) => Kind::Message(lowered(fields)?),
            },
        })
    };
    fields.iter().map(one).collect()
}

fn lower(plan: &[Lowered], mut fields: Fields, record: &mut Vec<(String, Val)>) {
    for Lowered { label, name, kind } in plan {
        let at = fields.0.iter().position(|(n, _)| n == name);
        let given = at.map(|at| fields.0.swap_remove(at).1);
        let value = match (kind, given) {
            (Kind::Exact(ty), given) => exact(*ty, given),
            (Kind::Any, Some(FieldValue::One(value))) => some(variant(&value)),
            (Kind::Any, _) => Val::Option(None),
            (Kind::Map, Some(FieldValue::Map(values))) => map(&values),
            (Kind::Map, _) => Val::List(Vec::new()),
            (Kind::Message(plan), given) => {
                let inner = match given {
                    Some(FieldValue::Message(fields)) => fields,
                    _ => Fields::default(),
                };
                let mut record = Vec::with_capacity(plan.len());
                lower(plan, inner, &mut record);
                if record.is_empty() {
                    record.push(("empty".to_owned(), Val::Bool(true)));
                }
                Val::Record(record)
            }
        };
        record.push((label.clone(), value));
    }
}

/// A field of one type; what is absent or, by a mistake of ours, of another type is nothing.
fn exact(ty: ValueType, given: Option<FieldValue>) -> Val {
    let value = match given {
        Some(FieldValue::One(value)) if value.value_type() == ty => Some(payload(&value)),
        _ => None,
    };
    match ty {
        ValueType::String => value.unwrap_or_else(|| Val::String(String::new())),
        ValueType::Int64 => value.unwrap_or(Val::S64(0)),
        ValueType::Double => value.unwrap_or(Val::Float64(0.0)),
        ValueType::Bool => value.unwrap_or(Val::Bool(false)),
        ValueType::StringMap => value.unwrap_or_else(|| Val::List(Vec::new())),
        ValueType::Timestamp
        | ValueType::IpAddress
        | ValueType::EmailAddress
        | ValueType::Uri
        | ValueType::DnsName
        | ValueType::Duration => Val::Option(value.map(Box::new)),
    }
}

fn map(values: &Values) -> Val {
    let pair =
        |(name, value): &(std::sync::Arc<str>, Value)| Val::Tuple(vec![text(name), variant(value)]);
    Val::List(values.iter().map(pair).collect())
}

/// A value as the variant `value`.
pub fn variant(value: &Value) -> Val {
    let case = wit::shared::case(value.value_type());
    Val::Variant(case.to_owned(), Some(Box::new(payload(value))))
}

/// A value as what its type is made of.
fn payload(value: &Value) -> Val {
    match value {
        Value::String(t) | Value::Email(t) | Value::Uri(t) | Value::DnsName(t) => text(t),
        Value::Int64(n) => Val::S64(*n),
        Value::Double(n) => Val::Float64(*n),
        Value::Bool(b) => Val::Bool(*b),
        Value::Timestamp(time) => Val::Record(vec![
            ("seconds".to_owned(), Val::S64(time.timestamp())),
            (
                "nanoseconds".to_owned(),
                // A leap second has more than a second's worth.
                Val::U32(time.timestamp_subsec_nanos().min(999_999_999)),
            ),
        ]),
        Value::Duration(span) => Val::Record(vec![
            ("seconds".to_owned(), Val::S64(span.num_seconds())),
            ("nanoseconds".to_owned(), Val::S32(span.subsec_nanos())),
        ]),
        Value::Ip(ip) => {
            let bytes: Vec<u8> = match ip {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            Val::List(bytes.into_iter().map(Val::U8).collect())
        }
        Value::StringMap(map) => {
            let pair = |(k, v): (&_, &_)| Val::Tuple(vec![text(k), text(v)]);
            Val::List(map.iter().map(|(k, v)| pair((&**k, &**v))).collect())
        }
    }
}

/// What a guest says a value of type `ty` is.
///
/// # Errors
/// When it is none.
pub fn lift(value: &Val, ty: ValueType) -> Result<Value, String> {
    let wrong = || format!("no {ty}");
    Ok(match (ty, value) {
        (
            ValueType::String | ValueType::EmailAddress | ValueType::Uri | ValueType::DnsName,
            Val::String(text),
        ) => Value::from_text(ty, text.as_str().into()).ok_or_else(wrong)?,
        (ValueType::Int64, Val::S64(n)) => Value::Int64(*n),
        (ValueType::Double, Val::Float64(n)) => Value::Double(*n),
        (ValueType::Bool, Val::Bool(b)) => Value::Bool(*b),
        (ValueType::Timestamp, Val::Record(fields)) => match fields.as_slice() {
            [(_, Val::S64(seconds)), (_, Val::U32(nanos))] if *nanos < 1_000_000_000 => {
                Value::Timestamp(DateTime::from_timestamp(*seconds, *nanos).ok_or_else(wrong)?)
            }
            _ => return Err(wrong()),
        },
        (ValueType::Duration, Val::Record(fields)) => match fields.as_slice() {
            [(_, Val::S64(seconds)), (_, Val::S32(nanos))]
                if nanos.unsigned_abs() < 1_000_000_000 =>
            {
                let span = TimeDelta::try_seconds(*seconds)
                    .and_then(|s| s.checked_add(&TimeDelta::nanoseconds((*nanos).into())));
                Value::Duration(span.ok_or_else(wrong)?)
            }
            _ => return Err(wrong()),
        },
        (ValueType::IpAddress, Val::List(bytes)) => {
            let byte = |byte: &Val| match byte {
                Val::U8(byte) => Some(*byte),
                _ => None,
            };
            let bytes: Option<Vec<u8>> = bytes.iter().take(17).map(byte).collect();
            Value::ip_from_bytes(&bytes.ok_or_else(wrong)?).ok_or_else(wrong)?
        }
        (ValueType::StringMap, Val::List(_)) => {
            Value::StringMap(pairs(value)?.into_iter().collect::<StringMap>())
        }
        _ => return Err(wrong()),
    })
}

/// The amount that is asked for.
pub fn quota_args(args: &QuotaArgs) -> Val {
    Val::Record(vec![
        ("dedup-id".to_owned(), text(&args.dedup_id)),
        ("amount".to_owned(), Val::S64(args.amount)),
        ("best-effort".to_owned(), Val::Bool(args.best_effort)),
    ])
}

/// The types of the instances that will come.
pub fn instance_types(instances: &[InstanceType]) -> Val {
    let one = |instance: &InstanceType| {
        let fields = instance.fields.iter().map(|(path, ty)| {
            let ty = wit::shared::type_case(*ty).to_owned();
            Val::Tuple(vec![text(path), Val::Enum(ty)])
        });
        Val::Record(vec![
            ("name".to_owned(), text(&instance.name)),
            ("template".to_owned(), text(instance.template)),
            ("fields".to_owned(), Val::List(fields.collect())),
        ])
    };
    Val::List(instances.iter().map(one).collect())
}

/// What a guest finds wrong with its configuration.
pub(crate) fn configured(answer: &Val) -> Result<Vec<String>, String> {
    match answer {
        Val::Result(Ok(_)) => Ok(Vec::new()),
        Val::Result(Err(Some(problems))) => match &**problems {
            Val::List(problems) if problems.is_empty() => {
                Ok(vec!["the guest refuses its configuration".to_owned()])
            }
            Val::List(problems) => problems.iter().take(16).map(string).collect(),
            _ => Err("no list of problems".to_owned()),
        },
        _ => Err("no result".to_owned()),
    }
}

/// The answer of `handle`, if the guest did not fail; else what it says.
///
/// # Errors
/// When it is no result.
pub fn handled(answer: &Val) -> Result<Result<Option<&Val>, String>, String> {
    match answer {
        Val::Result(Ok(ok)) => Ok(Ok(ok.as_deref())),
        Val::Result(Err(Some(said))) => Ok(Err(string(said)?)),
        _ => Err("no result".to_owned()),
    }
}

/// The answer to a check.
///
/// # Errors
/// What is wrong with it.
pub fn check_result(answer: &Val) -> Result<CheckResult, String> {
    match record(answer)? {
        [(_, status), (_, valid), (_, count)] => Ok(CheckResult {
            status: self::status(status)?,
            valid_duration: milliseconds(valid)?,
            valid_use_count: match option(count)? {
                None => None,
                Some(Val::S32(count)) => Some(*count),
                Some(_) => return Err("no use count".to_owned()),
            },
        }),
        _ => Err("no check-result".to_owned()),
    }
}

/// The answer to a check with output, in its two parts.
///
/// # Errors
/// When it is no pair.
pub fn checked_with_output(answer: &Val) -> Result<(&Val, &Val), String> {
    match answer {
        Val::Tuple(parts) => match parts.as_slice() {
            [result, output] => Ok((result, output)),
            _ => Err("no pair".to_owned()),
        },
        _ => Err("no pair".to_owned()),
    }
}

/// The answer about quota.
///
/// # Errors
/// What is wrong with it.
pub fn quota_result(answer: &Val) -> Result<QuotaResult, String> {
    let [(_, status), (_, valid), (_, granted), (_, window)] = record(answer)? else {
        return Err("no quota-result".to_owned());
    };
    let Val::S64(granted) = granted else {
        return Err("no amount".to_owned());
    };
    let window = match option(window)?.map(record).transpose()? {
        None => None,
        Some(
            [
                (_, Val::S64(limit)),
                (_, Val::S64(remaining)),
                (_, Val::U64(reset)),
            ],
        ) => Some(QuotaWindow {
            limit: *limit,
            remaining: *remaining,
            reset: Duration::from_millis(*reset),
        }),
        Some(_) => return Err("no quota-window".to_owned()),
    };
    Ok(QuotaResult {
        status: self::status(status)?,
        valid_duration: milliseconds(valid)?,
        granted: *granted,
        window,
    })
}

fn status(value: &Val) -> Result<Status, String> {
    let [(_, Val::U32(code)), (_, message), (_, direct)] = record(value)? else {
        return Err("no status".to_owned());
    };
    let direct_response = option(direct)?.map(direct_response).transpose()?;
    Ok(Status {
        code: Code::from_number((*code).into()).ok_or_else(|| format!("{code} is no code"))?,
        message: string(message)?,
        direct_response,
    })
}

fn direct_response(value: &Val) -> Result<DirectResponse, String> {
    match record(value)? {
        [(_, Val::U32(code)), (_, body), (_, headers)] if (200..600).contains(code) => {
            Ok(DirectResponse {
                code: *code,
                body: string(body)?,
                headers: pairs(headers)?,
            })
        }
        [(_, Val::U32(code)), ..] => Err(format!("{code} is no status of a response")),
        _ => Err("no direct-response".to_owned()),
    }
}

fn milliseconds(value: &Val) -> Result<Option<Duration>, String> {
    match option(value)? {
        None => Ok(None),
        Some(Val::U64(millis)) => Ok(Some(Duration::from_millis(*millis))),
        Some(_) => Err("no milliseconds".to_owned()),
    }
}

fn record(value: &Val) -> Result<&[(String, Val)], String> {
    match value {
        Val::Record(fields) => Ok(fields),
        _ => Err("no record".to_owned()),
    }
}

fn option(value: &Val) -> Result<Option<&Val>, String> {
    match value {
        Val::Option(value) => Ok(value.as_deref()),
        _ => Err("no option".to_owned()),
    }
}

fn pairs(value: &Val) -> Result<Vec<(String, String)>, String> {
    let Val::List(pairs) = value else {
        return Err("no list".to_owned());
    };
    let pair = |pair: &Val| match pair {
        Val::Tuple(parts) => match parts.as_slice() {
            [k, v] => Ok((string(k)?, string(v)?)),
            _ => Err("no pair".to_owned()),
        },
        _ => Err("no pair".to_owned()),
    };
    pairs.iter().map(pair).collect()
}

fn string(value: &Val) -> Result<String, String> {
    match value {
        Val::String(text) => Ok(text.clone()),
        _ => Err("no text".to_owned()),
    }
}

fn text(text: &str) -> Val {
    Val::String(text.to_owned())
}

fn some(value: Val) -> Val {
    Val::Option(Some(Box::new(value)))
}
