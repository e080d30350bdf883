//! Metadata as Lua values, and back.

use lateen_protocols::envoy::google::protobuf as pb;
use mlua::{Lua, Table, Value};
use pb::value::Kind;

/// Deepest nesting that is taken from a script.
const MAX_DEPTH: usize = 32;
/// Most entries of one table that is taken from a script.
const MAX_ENTRIES: usize = 10_000;

pub(super) fn fields_to_table(lua: &Lua, fields: &pb::Struct) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    for (key, value) in &fields.fields {
        table.set(key.as_str(), to_lua(lua, value)?)?;
    }
    Ok(table)
}

pub(super) fn to_lua(lua: &Lua, value: &pb::Value) -> mlua::Result<Value> {
    Ok(match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Value::Nil,
        Some(Kind::BoolValue(flag)) => Value::Boolean(*flag),
        Some(Kind::NumberValue(number)) => Value::Number(*number),
        Some(Kind::StringValue(text)) => Value::String(lua.create_string(text)?),
        Some(Kind::StructValue(fields)) => Value::Table(fields_to_table(lua, fields)?),
        Some(Kind::ListValue(list)) => {
            let table = lua.create_table()?;
            for value in &list.values {
                table.push(to_lua(lua, value)?)?;
            }
            Value::Table(table)
        }
    })
}

/// # Errors
/// The value is no data, or too deep or large.
pub(super) fn from_lua(value: &Value, depth: usize) -> mlua::Result<pb::Value> {
    if depth > MAX_DEPTH {
        return Err(mlua::Error::runtime("the table is too deep"));
    }
    let kind = match value {
        Value::Nil => Kind::NullValue(0),
        Value::Boolean(flag) => Kind::BoolValue(*flag),
        Value::Integer(number) => Kind::NumberValue(*number as f64),
        Value::Number(number) => Kind::NumberValue(*number),
        Value::String(text) => Kind::StringValue(text.to_string_lossy()),
        Value::Table(table) => {
            let length = table.raw_len();
            if length > MAX_ENTRIES {
                return Err(mlua::Error::runtime("the table is too large"));
            }
            if length > 0 {
                let values = table.sequence_values::<Value>();
                Kind::ListValue(pb::ListValue {
                    values: values
                        .map(|value| from_lua(&value?, depth + 1))
                        .collect::<mlua::Result<_>>()?,
                })
            } else {
                let mut fields = pb::Struct::default();
                for pair in table.pairs::<String, Value>() {
                    let (key, value) = pair?;
                    if fields.fields.len() >= MAX_ENTRIES {
                        return Err(mlua::Error::runtime("the table is too large"));
                    }
                    fields.fields.insert(key, from_lua(&value, depth + 1)?);
                }
                Kind::StructValue(fields)
            }
        }
        _ => return Err(mlua::Error::runtime("only data can be metadata")),
    };
    Ok(pb::Value { kind: Some(kind) })
}
