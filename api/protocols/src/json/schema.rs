//! Names and types of all messages, searched where they lie in the program: nothing is loaded. Written by
//! `build/schema.rs`.

static SCHEMA: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));

const SECTIONS: usize = 5;
const MESSAGE: usize = 16;
const FIELD: usize = 20;
const ENUM: usize = 8;
const VALUE: usize = 12;

/// How a message is written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Special {
    /// As an object with its fields.
    No,
    Any,
    Duration,
    Struct,
    Value,
    ListValue,
    /// As the value of its only field.
    Wrapper,
    /// In some other way.
    Other,
}

#[derive(Clone, Copy)]
pub(super) struct Message {
    at: usize,
}

/// A field of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub(super) number: u32,
    /// As in `FieldDescriptorProto.Type`.
    pub(super) kind: u8,
    pub(super) repeated: bool,
    pub(super) map: bool,
    /// Whether absence is told from the default.
    pub(super) presence: bool,
    pub(super) oneof: Option<u32>,
    target: usize,
}

fn u32_at(at: usize) -> usize {
    SCHEMA
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes) as usize
}

fn byte_at(at: usize) -> u8 {
    SCHEMA.get(at).copied().unwrap_or(0)
}

/// Where a section begins, and how long it is.
fn section(index: usize) -> (usize, usize) {
    let begin = (0..index).map(|i| u32_at(i * 4)).sum::<usize>() + SECTIONS * 4;
    (begin, u32_at(index * 4))
}

/// The name whose place is written at `at`.
fn name_at(at: usize) -> &'static [u8] {
    let len = usize::from(u16::from_le_bytes([byte_at(at + 4), byte_at(at + 5)]));
    let begin = section(4).0 + u32_at(at);
    SCHEMA.get(begin..begin + len).unwrap_or_default()
}

/// Searches `count` entries of `size` bytes, sorted by name; gives where the entry is.
fn search(begin: usize, count: usize, size: usize, name: &[u8]) -> Option<usize> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = usize::midpoint(low, high);
        let at = begin + middle * size;
        match name_at(at).cmp(name) {
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
            std::cmp::Ordering::Equal => return Some(at),
        }
    }
    None
}

impl Message {
    /// The message of this full name.
    pub(super) fn named(name: &str) -> Option<Message> {
        let (begin, len) = section(0);
        search(begin, len / MESSAGE, MESSAGE, name.as_bytes()).map(|at| Message { at })
    }

    pub(super) fn special(self) -> Special {
        match byte_at(self.at + 6) {
            0 => Special::No,
            1 => Special::Any,
            2 => Special::Duration,
            3 => Special::Struct,
            4 => Special::Value,
            5 => Special::ListValue,
            6 => Special::Wrapper,
            _ => Special::Other,
        }
    }

    /// The field of this name, as written in the proto or in JSON.
    pub(super) fn field(self, name: &str) -> Option<Field> {
        let begin = section(1).0 + u32_at(self.at + 8) * FIELD;
        let at = search(begin, u32_at(self.at + 12), FIELD, name.as_bytes())?;
        let flags = byte_at(at + 7);
        Some(Field {
            kind: byte_at(at + 6),
            repeated: flags & 1 != 0,
            map: flags & 2 != 0,
            presence: flags & 4 != 0,
            number: u32_at(at + 8) as u32,
            target: u32_at(at + 12),
            oneof: Some(u32_at(at + 16) as u32).filter(|oneof| *oneof != u32::MAX),
        })
    }
}

impl Field {
    /// The same, written even when it has its default value.
    pub(super) fn always_written(self) -> Field {
        Field {
            presence: true,
            ..self
        }
    }

    /// The message that it holds.
    pub(super) fn message(&self) -> Message {
        Message {
            at: section(0).0 + self.target * MESSAGE,
        }
    }

    /// The number of a value of its enum.
    pub(super) fn enum_value(&self, name: &str) -> Option<i32> {
        let head = section(2).0 + self.target * ENUM;
        let begin = section(3).0 + u32_at(head) * VALUE;
        let at = search(begin, u32_at(head + 4), VALUE, name.as_bytes())?;
        Some((u32_at(at + 8) as u32).cast_signed())
    }
}
