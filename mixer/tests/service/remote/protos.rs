//! Templates of a user's own and two of Istio's, described as their generator does, and messages of them.

use base64::Engine as _;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::Value as Json;

use crate::collector::Received;

/// A status of gRPC and a message.
pub(crate) type Said = (u16, Vec<u8>);

/// What the files of templates begin with.
const HEAD: &str = r#"
syntax = "proto3";
package NAME;
import "istio/mixer/adapter/model/v1beta1/extensions.proto";
import "google/protobuf/any.proto";
import "istio/policy/v1beta1/type.proto";
import "istio/mixer/adapter/model/v1beta1/model.proto";
option (istio.mixer.adapter.model.v1beta1.template_variety) = TEMPLATE_VARIETY_VARIETY;
option (istio.mixer.adapter.model.v1beta1.template_name) = "NAME";
"#;

const GATE: &str = r#"
service HandleGateService { rpc HandleGate(HandleGateRequest) returns (HandleGateResponse); }
message HandleGateRequest { InstanceMsg instance = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3; }
message HandleGateResponse { istio.mixer.adapter.model.v1beta1.CheckResult result = 1; OutputMsg output = 2; }
message OutputMsg { string group = 1; int64 level = 2; map<string, string> labels = 3; }
message InstanceMsg {
  string name = 72295727;
  istio.policy.v1beta1.Value user = 1;
  string city = 2;
  istio.policy.v1beta1.TimeStamp when = 3;
  istio.policy.v1beta1.Duration took = 4;
  int64 port = 5;
  bool secure = 6;
  map<string, string> labels = 7;
  map<string, istio.policy.v1beta1.Value> facts = 8;
  Deep deep = 9;
  Mode mode = 10;
}
message Deep { Inner inner = 1; }
message Inner { repeated string list = 1; }
enum Mode { LOOSE = 0; STRICT = 1; }
message Type { istio.policy.v1beta1.ValueType user = 1; map<string, istio.policy.v1beta1.ValueType> facts = 8; }
"#;

const WHERE: &str = r#"
service HandleWhereService { rpc HandleWhere(HandleWhereRequest) returns (OutputMsg); }
message HandleWhereRequest { InstanceMsg instance = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3; }
message InstanceMsg { string name = 72295727; istio.policy.v1beta1.IPAddress ip = 1; }
message OutputMsg { string city = 1; istio.policy.v1beta1.IPAddress ip = 2; }
"#;

const QUOTA: &str = r#"
service HandleQuotaService { rpc HandleQuota(HandleQuotaRequest) returns (istio.mixer.adapter.model.v1beta1.QuotaResult); }
message HandleQuotaRequest {
  InstanceMsg instance = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3;
  istio.mixer.adapter.model.v1beta1.QuotaRequest quota_request = 4;
}
message InstanceMsg { string name = 72295727; map<string, istio.policy.v1beta1.Value> dimensions = 1; }
"#;

const METRIC: &str = r#"
service HandleMetricService { rpc HandleMetric(HandleMetricRequest) returns (istio.mixer.adapter.model.v1beta1.ReportResult); }
message HandleMetricRequest { repeated InstanceMsg instances = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3; }
message InstanceMsg {
  string name = 72295727;
  istio.policy.v1beta1.Value value = 1;
  map<string, istio.policy.v1beta1.Value> dimensions = 2;
}
"#;

const PARAMS: &str = r#"
syntax = "proto3";
package own;
message Params { string path = 1; map<string, int32> limits = 2; }
"#;

const TEMPLATES: [(&str, &str, &str); 4] = [
    ("gate", "CHECK_WITH_OUTPUT", GATE),
    ("where", "ATTRIBUTE_GENERATOR", WHERE),
    ("quota", "QUOTA", QUOTA),
    ("metric", "REPORT", METRIC),
];

/// The set of `main` and all that it imports.
fn set(main: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let shared = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/protocols/proto");
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("params.proto", PARAMS);
    for (name, variety, text) in TEMPLATES {
        let head = HEAD
            .replace("NAME", name)
            .replace("VARIETY_VARIETY", &format!("VARIETY_{variety}"));
        write(&format!("{name}.proto"), &format!("{head}{text}"));
    }
    protox::Compiler::new([folder.path(), shared.as_ref()])
        .unwrap()
        .include_imports(true)
        .open_file(main)
        .unwrap()
        .encode_file_descriptor_set()
}

fn base64(main: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(set(main))
}

/// The templates, and the adapter `own` that takes them.
pub(crate) fn described(session_based: bool) -> String {
    let templates = TEMPLATES.map(|(name, ..)| {
        format!(
            r#"
apiVersion: config.istio.io/v1alpha2
kind: template
metadata: {{ name: {name}, namespace: istio-system }}
spec: {{ descriptor: "{}" }}
---"#,
            base64(&format!("{name}.proto"))
        )
    });
    format!(
        r#"{}
apiVersion: config.istio.io/v1alpha2
kind: adapter
metadata: {{ name: own, namespace: istio-system }}
spec:
  description: an adapter of this test
  session_based: {session_based}
  templates: [ gate, quota, metric, where ]
  config: "{}"
---"#,
        templates.concat(),
        base64("params.proto")
    )
}

/// [`described`], and handler `process` at `address`.
pub(crate) fn configuration(address: &str, session_based: bool) -> String {
    format!(
        r#"{}
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: process, namespace: istio-system }}
spec:
  adapter: own
  params: {{ path: /x, limits: {{ a: 1 }} }}
  connection: {{ address: "{address}" }}
---"#,
        described(session_based)
    )
}

pub(crate) fn pool() -> DescriptorPool {
    let mut pool = DescriptorPool::new();
    for name in TEMPLATES
        .map(|(name, ..)| name)
        .into_iter()
        .chain(["params"])
    {
        pool.decode_file_descriptor_set(&*set(&format!("{name}.proto")))
            .unwrap();
    }
    pool
}

/// The message `json` as an answer.
pub(crate) fn say(message: &str, json: &Json) -> Said {
    let descriptor = pool().get_message_by_name(message).unwrap();
    let message = DynamicMessage::deserialize(descriptor, json).unwrap();
    (0, message.encode_to_vec())
}

/// What came, as JSON.
pub(crate) fn open(call: &Received, message: &str) -> Json {
    let descriptor = pool().get_message_by_name(message).unwrap();
    let (_, body) = call.body.split_at(5);
    serde_json::to_value(DynamicMessage::decode(descriptor, body).unwrap()).unwrap()
}
