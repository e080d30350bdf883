//! bypass: what an adapter process gets and answers, by the protos of Istio's templates.

use std::time::Duration;

use lateen_adapter::Value;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::{Value as Json, json};

use crate::{
    collector,
    support::{Mesh, map, seconds, told},
};

/// istio.io/istio `mixer/template/{checknothing,metric,quota}/template_handler_service.proto`.
const TEMPLATES: [(&str, &str); 3] = [
    (
        "checknothing.proto",
        r#"
syntax = "proto3";
package checknothing;
import "google/protobuf/any.proto";
message HandleCheckNothingRequest { InstanceMsg instance = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3; }
message InstanceMsg { string name = 72295727; }
"#,
    ),
    (
        "metric.proto",
        r#"
syntax = "proto3";
package metric;
import "google/protobuf/any.proto";
import "istio/policy/v1beta1/type.proto";
message HandleMetricRequest { repeated InstanceMsg instances = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3; }
message InstanceMsg {
  string name = 72295727;
  istio.policy.v1beta1.Value value = 1;
  map<string, istio.policy.v1beta1.Value> dimensions = 2;
  string monitored_resource_type = 3;
  map<string, istio.policy.v1beta1.Value> monitored_resource_dimensions = 4;
}
"#,
    ),
    (
        "quota.proto",
        r#"
syntax = "proto3";
package quota;
import "google/protobuf/any.proto";
import "istio/policy/v1beta1/type.proto";
import "istio/mixer/adapter/model/v1beta1/model.proto";
message HandleQuotaRequest {
  InstanceMsg instance = 1; google.protobuf.Any adapter_config = 2; string dedup_id = 3;
  istio.mixer.adapter.model.v1beta1.QuotaRequest quota_request = 4;
}
message InstanceMsg { string name = 72295727; map<string, istio.policy.v1beta1.Value> dimensions = 1; }
"#,
    ),
];

fn pool() -> DescriptorPool {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in TEMPLATES {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let shared = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/protocols/proto");
    let set = protox::compile(
        TEMPLATES.map(|(name, _)| name),
        [folder.path(), shared.as_ref()],
    );
    DescriptorPool::from_file_descriptor_set(set.unwrap()).unwrap()
}

fn say(message: &str, json: &Json) -> Vec<u8> {
    let name = format!("istio.mixer.adapter.model.v1beta1.{message}");
    let descriptor = pool().get_message_by_name(&name).unwrap();
    DynamicMessage::deserialize(descriptor, json)
        .unwrap()
        .encode_to_vec()
}

fn rules(address: &str) -> String {
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: process, namespace: istio-system }}
spec:
  compiledAdapter: bypass
  params:
    backend_address: "{address}"
    params: {{ "@type": type.googleapis.com/my.Params, value: CAE= }}
---
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: {{ name: nothing, namespace: istio-system }}
---
apiVersion: config.istio.io/v1alpha2
kind: quota
metadata: {{ name: rq, namespace: istio-system }}
spec: {{ dimensions: {{ app: 'source.labels["app"] | ""' }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: metric
metadata: {{ name: size, namespace: istio-system }}
spec:
  value: response.size | 0
  dimensions: {{ ip: 'source.ip | ip("0.0.0.0")', took: 'response.duration | "0ms"' }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: process, namespace: istio-system }}
spec:
  actions: [ {{ handler: process, instances: [ nothing.checknothing, rq.quota, size.metric ] }} ]
"#
    )
}

#[tokio::test]
async fn a_process_decides_grants_and_measures() {
    let (address, mut received) = collector::listen_and_say(|call| match call.path.as_str() {
        "/checknothing.HandleCheckNothingService/HandleCheckNothing" => {
            let answer = json!({ "status": {}, "validDuration": "7s", "validUseCount": 3 });
            (0, say("CheckResult", &answer))
        }
        "/quota.HandleQuotaService/HandleQuota" => {
            let one = json!({ "validDuration": "2s", "grantedAmount": 4 });
            (
                0,
                say(
                    "QuotaResult",
                    &json!({ "quotas": { "rq.quota.istio-system": one } }),
                ),
            )
        }
        "/metric.HandleMetricService/HandleMetric" => (0, Vec::new()),
        _ => (12, Vec::new()),
    })
    .await;
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&address.to_string()))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let config = json!({ "@type": "type.googleapis.com/my.Params" });
    let attributes = [("source.labels", map(&[("app", "a")]))];
    let answer = mesh.check_with(&attributes, &[("rq", 5, true)], "id").await;
    let verdict = answer.precondition.unwrap();
    assert_eq!(told(&verdict), "OK:");
    assert_eq!(verdict.valid_use_count, 3);
    let quota = &answer.quotas["rq"];
    assert_eq!(
        (quota.granted_amount, seconds(quota.valid_duration.as_ref())),
        (4, 2.0)
    );

    let call = received.recv().await.unwrap();
    assert!(call.headers.contains_key("grpc-timeout"));
    let mut check = open(&call, "checknothing.HandleCheckNothingRequest");
    assert_eq!(check.take_any(), config);
    assert_eq!(
        check.0,
        json!({ "instance": { "name": "nothing.checknothing.istio-system" } })
    );
    let call = received.recv().await.unwrap();
    let mut asked = open(&call, "quota.HandleQuotaRequest");
    assert_eq!(asked.take_any(), config);
    let want = json!({
        "instance": { "name": "rq.quota.istio-system", "dimensions": { "app": { "stringValue": "a" } } },
        "dedupId": "idrq",
        "quotaRequest": { "quotas": { "rq.quota.istio-system": { "amount": "5", "bestEffort": true } } },
    });
    assert_eq!(asked.0, want);

    let size = [
        ("response.size", Value::Int64(70)),
        (
            "source.ip",
            lateen_adapter::value::address([10, 1, 2, 3].into()),
        ),
        (
            "response.duration",
            Value::Duration(lateen_engine::parse_duration("1.5s").unwrap()),
        ),
    ];
    mesh.report(&[&size, &[]]).await;
    let call = received.recv().await.unwrap();
    let mut measured = open(&call, "metric.HandleMetricRequest");
    assert_eq!(measured.take_any(), config);
    let want = json!({
        "name": "size.metric.istio-system",
        "value": { "int64Value": "70" },
        "dimensions": {
            "ip": { "ipAddressValue": { "value": "CgECAw==" } },
            "took": { "durationValue": { "value": "1.500s" } },
        },
    });
    assert_eq!(measured.0["instances"][0], want);
    assert_eq!(measured.0["instances"].as_array().unwrap().len(), 2);
}

/// A request, whose parameters are of a type that nobody knows here.
struct Asked(Json, Json);

impl Asked {
    fn take_any(&mut self) -> Json {
        self.1.take()
    }
}

fn open(call: &collector::Received, message: &str) -> Asked {
    let descriptor = pool().get_message_by_name(message).unwrap();
    let (_, body) = call.body.split_at(5);
    let mut asked = DynamicMessage::decode(descriptor, body).unwrap();
    let any = asked
        .get_field_by_name("adapter_config")
        .unwrap()
        .into_owned();
    let any = any.as_message().unwrap().clone();
    let url = any.get_field_by_name("type_url").unwrap();
    let value = any.get_field_by_name("value").unwrap();
    assert_eq!(value.as_bytes().unwrap().as_ref(), [8, 1]);
    let config = json!({ "@type": url.as_str().unwrap() });
    asked.clear_field_by_name("adapter_config");
    Asked(serde_json::to_value(asked).unwrap(), config)
}

#[tokio::test]
async fn a_process_that_denies_fails_or_is_away() {
    let (address, _received) = collector::listen_and_say(|call| {
        if call.path.contains("CheckNothing") {
            let answer = json!({ "status": { "code": 16, "message": "who are you?" } });
            (0, say("CheckResult", &answer))
        } else {
            (13, Vec::new())
        }
    })
    .await;
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&address.to_string()))]).await;
    let verdict = mesh.check(&[]).await;
    assert_eq!(
        told(&verdict),
        "UNAUTHENTICATED:process.handler.istio-system:who are you?"
    );
    assert_eq!(
        verdict.valid_use_count, 0,
        "nothing was said of using it again"
    );

    let nobody = "127.0.0.1:1";
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(nobody))]).await;
    let begun = std::time::Instant::now();
    let verdict = told(&mesh.check(&[]).await);
    assert!(
        verdict.starts_with("UNAVAILABLE:process.handler.istio-system:"),
        "{verdict}"
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
    let session = rules(nobody).replace("    params: {", "    sessionBased: true\n    params: {");
    let mesh = Mesh::start(&[("rules.yaml", &session)]).await;
    assert!(
        mesh.refused()
            .iter()
            .any(|r| r.contains("sessions are not supported"))
    );
}
