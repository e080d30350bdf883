//! The objects that tell a Mixer of an adapter that is served.

use std::fmt::Write as _;

use base64::Engine as _;
use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

use crate::adapter::Info;

/// The message of an adapter's parameters: one field, `json`.
pub const PARAMS: &str = "lateen.adapter.Params";

/// The FileDescriptorSet of [`PARAMS`], in base64 as the field `config` of kind `adapter` has it.
fn descriptor() -> String {
    let json = FieldDescriptorProto {
        name: Some("json".to_owned()),
        json_name: Some("json".to_owned()),
        number: Some(1),
        label: Some(Label::Optional.into()),
        r#type: Some(Type::String.into()),
        ..FieldDescriptorProto::default()
    };
    let params = DescriptorProto {
        name: Some("Params".to_owned()),
        field: vec![json],
        ..DescriptorProto::default()
    };
    let file = FileDescriptorProto {
        name: Some("lateen/adapter/params.proto".to_owned()),
        package: Some("lateen.adapter".to_owned()),
        message_type: vec![params],
        syntax: Some("proto3".to_owned()),
        ..FileDescriptorProto::default()
    };
    let set = FileDescriptorSet { file: vec![file] };
    base64::prelude::BASE64_STANDARD.encode(set.encode_to_vec())
}

/// YAML of the adapter that `info` speaks of, and of a handler of it at `address`, both in `namespace`. Rules use the
/// handler by the adapter's name.
pub fn yaml(info: Info, address: &str, namespace: &str) -> String {
    let mut text = String::new();
    let templates: Vec<&str> = info.templates.iter().map(|t| t.name).collect();
    write!(
        text,
        "apiVersion: config.istio.io/v1alpha2\n\
         kind: adapter\n\
         metadata: {{ name: {name}, namespace: {namespace} }}\n\
         spec:\n\
         \x20 description: {description}\n\
         \x20 sessionBased: true\n\
         \x20 templates: [ {templates} ]\n\
         \x20 config: {config}\n\
         ---\n\
         apiVersion: config.istio.io/v1alpha2\n\
         kind: handler\n\
         metadata: {{ name: {name}, namespace: {namespace} }}\n\
         spec:\n\
         \x20 adapter: {name}\n\
         \x20 connection: {{ address: \"{address}\" }}\n\
         \x20 params: {{ json: '{{}}' }}\n",
        name = info.name,
        description = serde_json::Value::from(info.description),
        templates = templates.join(", "),
        config = descriptor(),
    )
    .expect("a String takes everything");
    text
}
