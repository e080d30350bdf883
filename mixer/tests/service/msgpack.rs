//! MessagePack, read by its specification alone: <https://github.com/msgpack/msgpack/blob/master/spec.md>.

use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Nil,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    Array(Vec<Value>),
    Map(BTreeMap<String, Value>),
    Extension(i8, Vec<u8>),
}

impl Value {
    pub(crate) fn get(&self, key: &str) -> &Value {
        let Value::Map(map) = self else {
            panic!("{self:?} is no map");
        };
        map.get(key).unwrap_or(&Value::Nil)
    }
}

/// Reads one value; `None`: `bytes` ends within it.
pub(crate) fn read(bytes: &mut &[u8]) -> Option<Value> {
    let mut rest = *bytes;
    let value = value(&mut rest)?;
    *bytes = rest;
    Some(value)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

fn number(bytes: &mut &[u8], width: usize) -> Option<u64> {
    let taken = take(bytes, width)?;
    Some(taken.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
}

fn value(bytes: &mut &[u8]) -> Option<Value> {
    let mark = number(bytes, 1)? as u8;
    let length =
        |bytes: &mut &[u8], first: u8| number(bytes, 1 << (mark - first)).map(|n| n as usize);
    Some(match mark {
        0x00..=0x7f => Value::Int(mark.into()),
        0x80..=0x8f => map(bytes, (mark & 0x0f).into())?,
        0x90..=0x9f => array(bytes, (mark & 0x0f).into())?,
        0xa0..=0xbf => text(bytes, (mark & 0x1f).into())?,
        0xc0 => Value::Nil,
        0xc2 | 0xc3 => Value::Bool(mark == 0xc3),
        0xc4..=0xc6 => {
            let count = length(bytes, 0xc4)?;
            Value::Bytes(take(bytes, count)?.to_vec())
        }
        0xc7..=0xc9 => {
            let count = length(bytes, 0xc7)?;
            extension(bytes, count)?
        }
        0xca => Value::Float(f32::from_bits(number(bytes, 4)? as u32).into()),
        0xcb => Value::Float(f64::from_bits(number(bytes, 8)?)),
        0xcc..=0xcf => Value::Int(length(bytes, 0xcc)?.try_into().unwrap()),
        0xd0 => Value::Int((number(bytes, 1)? as u8 as i8).into()),
        0xd1 => Value::Int((number(bytes, 2)? as u16 as i16).into()),
        0xd2 => Value::Int((number(bytes, 4)? as u32 as i32).into()),
        0xd3 => Value::Int(number(bytes, 8)? as i64),
        0xd4..=0xd8 => extension(bytes, 1 << (mark - 0xd4))?,
        0xd9..=0xdb => {
            let count = length(bytes, 0xd9)?;
            text(bytes, count)?
        }
        0xdc | 0xdd => {
            let count = number(bytes, 2 << (mark - 0xdc))? as usize;
            array(bytes, count)?
        }
        0xde | 0xdf => {
            let count = number(bytes, 2 << (mark - 0xde))? as usize;
            map(bytes, count)?
        }
        0xe0..=0xff => Value::Int((mark as i8).into()),
        0xc1 => panic!("0xc1 is never used"),
    })
}

fn text(bytes: &mut &[u8], count: usize) -> Option<Value> {
    let text = take(bytes, count)?.to_vec();
    Some(Value::Text(String::from_utf8(text).unwrap()))
}

fn extension(bytes: &mut &[u8], count: usize) -> Option<Value> {
    let kind = number(bytes, 1)? as u8 as i8;
    Some(Value::Extension(kind, take(bytes, count)?.to_vec()))
}

fn array(bytes: &mut &[u8], count: usize) -> Option<Value> {
    let all: Option<Vec<_>> = (0..count).map(|_| value(bytes)).collect();
    all.map(Value::Array)
}

fn map(bytes: &mut &[u8], count: usize) -> Option<Value> {
    let mut all = BTreeMap::new();
    for _ in 0..count {
        let Value::Text(key) = value(bytes)? else {
            panic!("a key is no text");
        };
        all.insert(key, value(bytes)?);
    }
    Some(Value::Map(all))
}
