//! What is on the wire against Istio's own descriptors.

use lateen_engine::Value;
use lateen_protocols::TEMPLATES;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor};

use super::{path, wire};
use crate::{
    instance::{FieldValue, Fields},
    template::{self, Field, FieldKind},
    value,
};

/// `message` has the fields `ours`; those of inner messages are numbered from 1.
fn agrees(message: &MessageDescriptor, ours: &'static [Field], is_inner: bool) {
    let theirs: Vec<_> = message
        .fields()
        .filter(|f| f.number() != 72_295_727)
        .collect();
    assert_eq!(theirs.len(), ours.len(), "{}", message.full_name());
    for theirs in theirs {
        let at = ours.iter().position(|f| f.is_named(theirs.json_name()));
        let at = at.unwrap_or_else(|| panic!("{}", theirs.full_name()));
        let number = usize::try_from(theirs.number()).unwrap();
        assert!(!is_inner || number == at + 1, "{}", theirs.full_name());
        if let FieldKind::Message(inner) = &ours[at].kind {
            agrees(theirs.kind().as_message().unwrap(), inner, true);
        }
    }
}

#[test]
fn templates_are_istios() {
    let pool = DescriptorPool::decode(TEMPLATES).unwrap();
    let mut seen = 0;
    for template in template::ALL {
        let Some(message) = pool.get_message_by_name(&format!("{}.InstanceMsg", template.name))
        else {
            assert!(["servicecontrolreport", "kubernetes"].contains(&template.name));
            continue;
        };
        seen += 1;
        agrees(&message, template.fields, template.name != "edge");
        // A text in one field is read as the field of that name.
        for theirs in message.fields() {
            let is_text = matches!(theirs.kind(), Kind::String);
            if !is_text || theirs.name() == "name" {
                continue;
            }
            let mut sent = DynamicMessage::new(message.clone());
            sent.set_field(&theirs, prost_reflect::Value::String("x".to_owned()));
            let (_, Fields(read)) = wire::instance(template, &sent.encode_to_vec()).unwrap();
            let [(name, FieldValue::One(Value::String(text)))] = read.as_slice() else {
                panic!("{}: {read:?}", theirs.full_name());
            };
            assert_eq!((*name, text.as_str()), (theirs.name(), "x"));
        }
        let service = message.parent_file().services().next().unwrap();
        let method = service.methods().next().unwrap();
        let theirs = format!("/{}/{}", service.full_name(), method.name());
        assert_eq!(path(template), theirs);
    }
    assert_eq!(seen, 11);
}

#[test]
fn what_is_malformed_is_refused() {
    let refused = |bytes: &[u8]| {
        wire::instance(&template::METRIC, bytes)
            .unwrap_err()
            .to_string()
    };
    for (bytes, want) in [
        (&[0x80][..], "cut off"),
        (&[0xff; 11][..], "no end"),
        (&[0x1a, 5, b'a'][..], "cut off"),
        (&[0x1a, 1, 0xff][..], "UTF-8"),
        (&[0x18, 1][..], "a number stands where a text should"),
        (&[0x0b][..], "no type"),
    ] {
        let told = refused(bytes);
        assert!(told.contains(want), "{bytes:?}: {told}");
    }
}

#[test]
fn outputs_are_written_by_their_numbers() {
    let output = vec![("value", value::string("x")), ("other", value::string("y"))];
    let bytes = wire::output(&template::KEYVAL, &output);
    assert_eq!(bytes, [0x0a, 1, b'x']);
}
