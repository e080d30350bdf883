//! Writes the names and types of all messages in a form that can be searched where it lies; see
//! `src/json/schema.rs` for the reader.

use std::collections::HashMap;

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// How a message is written in JSON; the numbers are those of `Special` in the reader.
fn special(name: &str) -> u8 {
    match name {
        "google.protobuf.Any" => 1,
        "google.protobuf.Duration" => 2,
        "google.protobuf.Struct" => 3,
        "google.protobuf.Value" => 4,
        "google.protobuf.ListValue" => 5,
        "google.protobuf.BoolValue"
        | "google.protobuf.UInt32Value"
        | "google.protobuf.UInt64Value"
        | "google.protobuf.Int32Value"
        | "google.protobuf.Int64Value"
        | "google.protobuf.DoubleValue"
        | "google.protobuf.FloatValue"
        | "google.protobuf.StringValue" => 6,
        "google.protobuf.Timestamp"
        | "google.protobuf.FieldMask"
        | "google.protobuf.BytesValue" => 255,
        _ => 0,
    }
}

struct Message<'a> {
    name: String,
    proto3: bool,
    proto: &'a DescriptorProto,
}

#[derive(Default)]
struct Strings {
    bytes: Vec<u8>,
    known: HashMap<String, u32>,
}

impl Strings {
    /// Offset and length.
    fn put(&mut self, text: &str, out: &mut Vec<u8>) {
        let at = *self.known.entry(text.to_owned()).or_insert_with(|| {
            let at = self.bytes.len();
            self.bytes.extend_from_slice(text.as_bytes());
            u32::try_from(at).expect("names are some hundred KB")
        });
        out.extend_from_slice(&at.to_le_bytes());
        let len = u16::try_from(text.len()).expect("a name is short");
        out.extend_from_slice(&len.to_le_bytes());
    }
}

/// The whole table.
pub(crate) fn schema(files: &FileDescriptorSet) -> Vec<u8> {
    let mut messages = Vec::new();
    let mut enums = Vec::new();
    for file in &files.file {
        let package = file.package().to_owned();
        let proto3 = file.syntax() == "proto3";
        for proto in &file.enum_type {
            enums.push((format!("{package}.{}", proto.name()), proto));
        }
        for proto in &file.message_type {
            collect(&package, proto3, proto, &mut messages, &mut enums);
        }
    }
    messages.sort_by(|a, b| a.name.cmp(&b.name));
    messages.dedup_by(|a, b| a.name == b.name);
    let message_index: HashMap<String, usize> = messages
        .iter()
        .enumerate()
        .map(|(index, message)| (message.name.clone(), index))
        .collect();
    let enum_index: HashMap<String, usize> = enums
        .iter()
        .enumerate()
        .map(|(index, (name, _))| (name.clone(), index))
        .collect();

    let (mut strings, mut heads, mut fields) = (Strings::default(), Vec::new(), Vec::new());
    for message in &messages {
        strings.put(&message.name, &mut heads);
        heads.push(match message.proto3 {
            true => special(&message.name),
            false => 255,
        });
        heads.push(0);
        let mut named: Vec<(&str, &FieldDescriptorProto)> = Vec::new();
        for field in &message.proto.field {
            named.push((field.name(), field));
            if field.json_name() != field.name() {
                named.push((field.json_name(), field));
            }
        }
        named.sort_by_key(|(name, _)| *name);
        number(fields.len() / FIELD, &mut heads);
        number(named.len(), &mut heads);
        for (name, field) in named {
            strings.put(name, &mut fields);
            let target = field.type_name().trim_start_matches('.');
            let kind = field.r#type();
            let is_map = kind == Type::Message
                && messages[message_index[target]]
                    .proto
                    .options
                    .as_ref()
                    .is_some_and(|options| options.map_entry());
            let repeated = field.label() == Label::Repeated;
            let presence = field.oneof_index.is_some() || kind == Type::Message;
            fields.push(kind as u8);
            fields.push(u8::from(repeated) | u8::from(is_map) << 1 | u8::from(presence) << 2);
            number(
                usize::try_from(field.number()).expect("positive"),
                &mut fields,
            );
            number(
                match kind {
                    Type::Message | Type::Group => message_index[target],
                    Type::Enum => enum_index[target],
                    _ => 0,
                },
                &mut fields,
            );
            // A field that is merely optional is in a oneof of its own, which does no harm.
            number(
                field
                    .oneof_index
                    .map_or(usize::try_from(u32::MAX).expect("64 bits"), |index| {
                        usize::try_from(index).expect("positive")
                    }),
                &mut fields,
            );
        }
    }
    let (mut enum_heads, mut values) = (Vec::new(), Vec::new());
    for (_, proto) in &enums {
        let mut named: Vec<_> = proto.value.iter().map(|v| (v.name(), v.number())).collect();
        named.sort_unstable();
        number(values.len() / VALUE, &mut enum_heads);
        number(named.len(), &mut enum_heads);
        for (name, value) in named {
            strings.put(name, &mut values);
            values.extend_from_slice(&[0, 0]);
            values.extend_from_slice(&value.to_le_bytes());
        }
    }
    let mut out = Vec::new();
    for section in [&heads, &fields, &enum_heads, &values, &strings.bytes] {
        number(section.len(), &mut out);
    }
    for section in [heads, fields, enum_heads, values, strings.bytes] {
        out.extend(section);
    }
    out
}

const FIELD: usize = 20;
const VALUE: usize = 12;

fn number(n: usize, out: &mut Vec<u8>) {
    let n = u32::try_from(n).expect("tables are small");
    out.extend_from_slice(&n.to_le_bytes());
}

fn collect<'a>(
    within: &str,
    proto3: bool,
    proto: &'a DescriptorProto,
    messages: &mut Vec<Message<'a>>,
    enums: &mut Vec<(String, &'a EnumDescriptorProto)>,
) {
    let name = format!("{within}.{}", proto.name());
    for nested in &proto.nested_type {
        collect(&name, proto3, nested, messages, enums);
    }
    for nested in &proto.enum_type {
        enums.push((format!("{name}.{}", nested.name()), nested));
    }
    messages.push(Message {
        name,
        proto3,
        proto,
    });
}
