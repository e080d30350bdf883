use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use base64::Engine as _;
use lateen_adapter::Variety;
use lateen_engine::{AttributeTable, Bag, StringMap, Tracker, Value, parse_timestamp};
use prost_reflect::DynamicMessage;
use serde_json::{Value as Json, json};

use super::{
    RemoteAdapter, RemoteTemplate,
    handler::{Authentication, Connection, RemoteHandler},
    instance::{RemoteInstance, Written},
    types::inferred_type,
};
use crate::config::object::{Fault, Key, Source};

const OPTIONS: &str = r#"
syntax = "proto3";
package istio.mixer.adapter.model.v1beta1;
import "google/protobuf/descriptor.proto";
enum TemplateVariety { CHECK = 0; REPORT = 1; QUOTA = 2; ATTRIBUTE_GENERATOR = 3; CHECK_WITH_OUTPUT = 4; }
extend google.protobuf.FileOptions { TemplateVariety template_variety = 72295727; string template_name = 72295888; }
"#;

const TYPES: &str = r#"
syntax = "proto3";
package istio.policy.v1beta1;
import "google/protobuf/timestamp.proto";
message Value { oneof value { string string_value = 1; int64 int64_value = 2; IPAddress ip_address_value = 5; StringMap string_map_value = 11; } }
message IPAddress { bytes value = 1; }
message TimeStamp { google.protobuf.Timestamp value = 1; }
message StringMap { map<string, string> value = 1; }
"#;

const TEMPLATE: &str = r#"
syntax = "proto3";
package depth;
import "options.proto";
import "types.proto";
option (istio.mixer.adapter.model.v1beta1.template_variety) = VARIETY;
option (istio.mixer.adapter.model.v1beta1.template_name) = "depth";
service HandleDepthService { rpc HandleDepth(Request) returns (Response); }
message Request { InstanceMsg instance = 5; string dedup_id = 6; }
message Response { int32 result = 8; OutputMsg output = 9; }
message InstanceMsg {
  string name = 72295727;
  string text = 1;
  uint32 small = 2;
  istio.policy.v1beta1.Value any = 3;
  istio.policy.v1beta1.IPAddress ip = 4;
  istio.policy.v1beta1.TimeStamp time = 5;
  map<string, string> labels = 6;
  map<string, istio.policy.v1beta1.Value> values = 7;
  repeated int64 many = 8;
  Inner inner = 9;
  Color color = 10;
  bytes raw = 11;
}
message Inner { bool is_it = 1; sint32 zig = 2; fixed64 fixed = 3; sfixed32 sfixed = 4; float part = 5; double whole = 6; }
message OutputMsg { string text = 1; map<string, string> labels = 2; istio.policy.v1beta1.IPAddress ip = 3; int32 n = 4; istio.policy.v1beta1.Value any = 5; istio.policy.v1beta1.TimeStamp time = 6; }
message Type { ValueType any = 3; map<string, ValueType> values = 7; InnerType inner = 9; }
message InnerType { ValueType nothing = 7; }
enum ValueType { UNSPECIFIED = 0; STRING = 1; INT64 = 2; IP_ADDRESS = 6; STRING_MAP = 11; }
enum Color { RED = 0; GREEN = 1; }
"#;

fn descriptor(files: &[(&str, &str)], main: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let set = protox::Compiler::new([folder.path()])
        .unwrap()
        .include_imports(true)
        .open_file(main)
        .unwrap()
        .encode_file_descriptor_set();
    base64::engine::general_purpose::STANDARD.encode(set)
}

fn source(kind: &str, spec: Json) -> Source {
    Source {
        key: Key {
            kind: kind.into(),
            namespace: "ns".into(),
            name: "x".into(),
        },
        annotations: Arc::new(BTreeMap::new()),
        spec: Arc::new(spec),
        origin: None,
    }
}

fn template(variety: &str) -> Result<RemoteTemplate, Fault> {
    let text = TEMPLATE.replace("VARIETY", variety);
    let files = [
        ("options.proto", OPTIONS),
        ("types.proto", TYPES),
        ("main.proto", &*text),
    ];
    let descriptor = descriptor(&files, "main.proto");
    // Line breaks as YAML's block texts have them.
    let (front, back) = descriptor.split_at(40);
    RemoteTemplate::read(&source(
        "template",
        json!({"descriptor": format!("{front}\n  {back}\n")}),
    ))
}

#[test]
fn a_template_is_what_its_descriptor_says() {
    let read = template("QUOTA").unwrap();
    assert_eq!(&*read.name, "x.template.ns");
    assert_eq!(read.template_name, "depth");
    let numbers = (
        read.numbers.instance,
        read.numbers.adapter_config,
        read.numbers.dedup_id,
    );
    assert_eq!(
        numbers,
        (5, 2, 6),
        "what is not said is as Istio's generator writes it"
    );
    assert_eq!(read.variety, Variety::Quota);
    assert_eq!(read.path, "/depth.HandleDepthService/HandleDepth");
    assert!(read.output.is_none(), "a quota has none");
    let read = template("CHECK_WITH_OUTPUT").unwrap();
    assert_eq!((read.numbers.result, read.numbers.output), (8, 9));
}

#[test]
fn what_is_no_descriptor_is_refused() {
    let plain = descriptor(&[("types.proto", TYPES)], "types.proto");
    for (spec, reason) in [
        (json!({}), "the template has no descriptor"),
        (json!({"descriptor": "%"}), "the descriptor is not base64"),
        (
            json!({"descriptor": "AAAA"}),
            "no google.protobuf.FileDescriptorSet",
        ),
        (
            json!({"descriptor": plain}),
            "no file of the descriptor has the option",
        ),
        (json!({"descripter": ""}), "unknown field `descripter`"),
        (json!({"descriptor": "A".repeat(5 << 20)}), "longer than"),
    ] {
        let error = RemoteTemplate::read(&source("template", spec)).unwrap_err();
        assert!(error.reason.contains(reason), "{}", error.reason);
    }
}

fn table() -> AttributeTable {
    AttributeTable::default_vocabulary()
}

fn instance(params: Json) -> Result<RemoteInstance, Vec<Fault>> {
    let template = Arc::new(template("CHECK").unwrap());
    let params = params.as_object().unwrap().clone();
    RemoteInstance::compile(
        &source("instance", Json::Null),
        template,
        written(&params),
        &table(),
    )
}

fn written(params: &serde_json::Map<String, Json>) -> Written<'_> {
    Written {
        params: Some(params),
        bindings: None,
    }
}

#[test]
fn expressions_may_stand_anywhere() {
    let instance = instance(json!({
        "text": "source.name",
        "small": "response.code | 0",
        "any": "source.ip",
        "ip": "source.ip",
        "time": "request.time",
        "labels": "source.labels",
        "values": {"a": "request.headers", "b": 5},
        "many": ["response.code", 7],
        "inner": {"isIt": "connection.mtls | true", "zig": "response.size | 0", "fixed": 1, "sfixed": "response.size | 0", "part": 0.5, "whole": 2.5},
        "color": "GREEN",
    }))
    .unwrap();
    let mut bag = Bag::new(&table());
    let labels: StringMap = [("app", "ratings")].into_iter().collect();
    for (name, value) in [
        ("source.name", Value::from("me")),
        ("response.code", Value::Int64(503)),
        ("response.size", Value::Int64(-7)),
        ("source.ip", Value::Ip([10, 0, 0, 1].into())),
        (
            "request.time",
            Value::Timestamp(parse_timestamp("2026-01-02T03:04:05Z").unwrap()),
        ),
        ("source.labels", labels.clone().into()),
        ("request.headers", labels.into()),
    ] {
        bag.set_by_name(name, value).unwrap();
    }
    let message = instance.encode(&bag, &mut Tracker::new()).unwrap();
    let descriptor = instance.template.instance.clone();
    let message = DynamicMessage::decode(descriptor, &*message).unwrap();
    let shown = serde_json::to_value(&message).unwrap();
    assert_eq!(
        shown,
        json!({
            "name": "x.instance.ns",
            "text": "me",
            "small": 503,
            "any": {"ipAddressValue": {"value": "CgAAAQ=="}},
            "ip": {"value": "CgAAAQ=="},
            "time": {"value": "2026-01-02T03:04:05Z"},
            "labels": {"app": "ratings"},
            "values": {"a": {"stringMapValue": {"value": {"app": "ratings"}}}, "b": {"int64Value": "5"}},
            "many": ["503", "7"],
            "inner": {"isIt": true, "zig": -7, "fixed": "1", "sfixed": -7, "part": 0.5, "whole": 2.5},
            "color": "GREEN",
        })
    );
    let any = inferred_type(&instance);
    assert_eq!(any.type_url, "type.googleapis.com/depth.Type");
    let types = instance.template.types.clone().unwrap();
    let types = DynamicMessage::decode(types, &*any.value).unwrap();
    assert_eq!(
        serde_json::to_value(&types).unwrap(),
        json!({"any": "IP_ADDRESS", "values": {"a": "STRING_MAP", "b": "INT64"}})
    );
    bag.set_by_name("response.code", -1_i64).unwrap();
    let error = instance.encode(&bag, &mut Tracker::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "-1 does not fit into field depth.InstanceMsg.small"
    );
    let error = instance
        .encode(&Bag::new(&table()), &mut Tracker::new())
        .unwrap_err();
    assert_eq!(error.to_string(), "lookup failed: 'source.ip'");
}

#[test]
fn every_mistake_of_an_instance_is_told() {
    let faults = instance(json!({
        "text": "response.code",
        "small": "response.coed",
        "what": "1",
        "name": "\"me\"",
        "many": "response.code",
        "labels": ["a"],
        "inner": {"isIt": "1"},
        "color": "BLUE",
        "raw": "source.name",
        "any": "ip(\"nonsense\")",
    }))
    .unwrap_err();
    let mut told: Vec<String> = faults
        .iter()
        .map(|f| format!("{}: {}", f.field, f.reason))
        .collect();
    told.sort();
    assert_eq!(
        told,
        [
            "params.any: ip(\"nonsense\") always fails: could not convert nonsense to IP_ADDRESS",
            "params.color: \"BLUE\" is none of RED, GREEN",
            "params.inner.isIt: '1' is INT64, but the field is BOOL",
            "params.labels: [\"a\"] is not an expression",
            "params.many: \"response.code\" is no list",
            "params.name: the template has no such field; it has text, small, any, ip, time, labels, values, many, inner, color, raw",
            "params.raw: no expression has such values (bytes)",
            "params.small: unknown attribute response.coed",
            "params.text: 'response.code' is INT64, but the field is STRING",
            "params.what: the template has no such field; it has text, small, any, ip, time, labels, values, many, inner, color, raw",
        ]
    );
}

const CONFIG: &str = r#"
syntax = "proto3";
package own;
message Params { string path = 1; map<string, int32> limits = 2; Mode mode = 3; }
enum Mode { FAST = 0; EXACT = 1; }
"#;

fn adapter(spec: Json) -> Result<RemoteAdapter, Fault> {
    RemoteAdapter::read(&source("adapter", spec))
}

fn handler(params: &Json, connection: &Json) -> Result<RemoteHandler, Fault> {
    let config = descriptor(&[("config.proto", CONFIG)], "config.proto");
    let adapter =
        adapter(json!({"templates": ["depth"], "config": config, "session_based": false})).unwrap();
    RemoteHandler::read("h.handler.ns".into(), Arc::new(adapter), params, connection)
}

#[test]
fn parameters_are_the_adapters_message() {
    let address = json!({"address": "keyval:9070", "timeout": "250ms"});
    let read = handler(
        &json!({"path": "/x", "limits": {"a": 1}, "mode": "EXACT"}),
        &address,
    )
    .unwrap();
    assert_eq!(read.params.type_url, "type.googleapis.com/own.Params");
    assert_eq!(
        read.params.value,
        b"\x0a\x02/x\x12\x05\x0a\x01a\x10\x01\x18\x01"
    );
    assert_eq!(
        read.connection,
        Connection {
            address: "keyval:9070".into(),
            timeout: Some(Duration::from_millis(250)),
            authentication: Authentication::Plain,
        }
    );
    for params in [
        json!({"pfad": "/x"}),
        json!({"path": 1}),
        json!({"mode": "SLOW"}),
    ] {
        let error = handler(&params, &address).unwrap_err();
        assert_eq!(error.field, "params", "{}", error.reason);
    }
    let none = Arc::new(adapter(json!({"description": null, "templates": null})).unwrap());
    let error = RemoteHandler::read("h".into(), none, &json!({"a": 1}), &address).unwrap_err();
    assert_eq!(
        error.reason,
        "x.adapter.ns takes no parameters: it has no config"
    );
}

#[test]
fn connections_are_checked() {
    let tls = |tls: Json| json!({"address": "a:1", "authentication": {"tls": tls}});
    for (connection, field) in [
        (json!({}), "connection.address"),
        (json!({"address": "host"}), "connection.address"),
        (json!({"address": "host:x"}), "connection.address"),
        (
            json!({"address": "a:1", "timeout": "5"}),
            "connection.timeout",
        ),
        (json!({"address": "a:1", "adress": "b:2"}), "connection"),
        (
            json!({"address": "a:1", "authentication": {"tls": {}, "mutual": {}}}),
            "connection.authentication",
        ),
        (
            json!({"address": "a:1", "authentication": {"mutual": {}}}),
            "connection.authentication.mutual",
        ),
        (
            tls(json!({"tokenPath": "/t", "oauth": {}})),
            "connection.authentication.tls",
        ),
        (
            tls(json!({"oauth": {"clientId": "me"}})),
            "connection.authentication.tls.oauth",
        ),
    ] {
        let error = handler(&Json::Null, &connection).unwrap_err();
        assert_eq!(error.field, field, "{connection}");
    }
    let good = tls(json!({"ca_certificates": "/ca", "tokenPath": "/t", "authHeader": "BEARER"}));
    assert!(matches!(
        handler(&Json::Null, &good)
            .unwrap()
            .connection
            .authentication,
        Authentication::Tls(_)
    ));
}

#[test]
fn outputs_are_read_as_attributes() {
    let template = template("ATTRIBUTE_GENERATOR").unwrap();
    let plan = template.output.unwrap();
    let fields: Vec<_> = plan
        .fields()
        .map(|(name, ty)| format!("{name} {ty}"))
        .collect();
    assert_eq!(
        fields,
        [
            "text STRING",
            "labels STRING_MAP",
            "ip IP_ADDRESS",
            "n INT64",
            "time TIMESTAMP"
        ],
        "a Value has no type of its own"
    );
    // text "x", ip 10.0.0.1, n -1, labels {a: b}, time 5 s
    let message = b"\x0a\x01x\x1a\x06\x0a\x04\x0a\x00\x00\x01\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x12\x06\x0a\x01a\x12\x01b\x32\x04\x0a\x02\x08\x05";
    let found = plan.decode(message.as_slice().to_vec().into()).unwrap();
    let found: Vec<_> = found
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    assert_eq!(
        found,
        [
            "text=x",
            "labels={a: b}",
            "ip=10.0.0.1",
            "n=-1",
            "time=1970-01-01T00:00:05Z"
        ]
    );
    assert_eq!(
        plan.decode(Vec::new().into()).unwrap(),
        [],
        "what is not there has no value"
    );
    assert!(plan.decode(vec![0x0a, 9].into()).is_err());
}

/// Descriptors come from whoever may write configuration: none may bring Mixer down.
#[test]
fn damaged_descriptors_are_refused_or_read() {
    let text = TEMPLATE.replace("VARIETY", "CHECK");
    let files = [
        ("options.proto", OPTIONS),
        ("types.proto", TYPES),
        ("main.proto", &*text),
    ];
    let engine = base64::engine::general_purpose::STANDARD;
    let good = engine.decode(descriptor(&files, "main.proto")).unwrap();
    let params = json!({"text": "source.name", "values": {"a": "5"}, "inner": {"isIt": true}});
    let params = params.as_object().unwrap();
    let mut read = 0;
    for round in 0..3000_usize {
        let mut bytes = good.clone();
        for _ in 0..=round % 4 {
            let at = rand::random_range(0..bytes.len());
            match rand::random_range(0..3) {
                0 => bytes[at] = rand::random(),
                1 => bytes[at] ^= 1 << rand::random_range(0..8),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let spec = json!({"descriptor": engine.encode(&bytes)});
        let Ok(template) = RemoteTemplate::read(&source("template", spec)) else {
            continue;
        };
        read += 1;
        let instance = source("instance", Json::Null);
        let template = Arc::new(template);
        if let Some(output) = &template.output {
            drop(output.decode(bytes.into()));
        }
        let compiled = RemoteInstance::compile(&instance, template, written(params), &table());
        if let Ok(compiled) = compiled {
            let mut bag = Bag::new(&table());
            bag.set_by_name("source.name", "x").unwrap();
            drop(compiled.encode(&bag, &mut Tracker::new()));
            inferred_type(&compiled);
        }
    }
    assert!(
        read > 100,
        "{read} were read: the damage is too large to test anything behind the parser"
    );
}
