//! Configuration from Pilot: a fake one that says what it is told to say.

use std::{collections::HashMap, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use lateen_protocols::{
    envoy::{
        envoy::service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            Resource as WireResource,
            aggregated_discovery_service_server::{
                AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
            },
        },
        google::protobuf::Any as WireAny,
    },
    istio::{
        mcp::v1alpha1::{Metadata, Resource},
        mixer::v1::{CheckRequest, mixer_client::MixerClient},
    },
};
use mixer::Running;
use prost::Message as _;
use prost_types::{Any, Struct};
use serde_json::{Value as Json, json};
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::support::{args, client, told};

/// One Pilot: hands each stream to the test.
struct FakePilot {
    streams: mpsc::Sender<PilotStream>,
}

struct PilotStream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    nonce: u32,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for FakePilot {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, receiver) = mpsc::channel(64);
        let stream = PilotStream {
            requests: request.into_inner(),
            responses,
            nonce: 0,
        };
        self.streams
            .send(stream)
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }
}

impl PilotStream {
    /// The subscriptions a stream begins with, of which workloads are the last: type URL to what the client has already.
    async fn subscriptions(&mut self) -> HashMap<String, HashMap<String, String>> {
        let mut all = HashMap::new();
        while !all.contains_key(WORKLOAD) {
            let request = self.requests.message().await.unwrap().unwrap();
            assert_eq!(request.resource_names_subscribe, ["*"]);
            assert_eq!(
                request.node.is_some(),
                all.is_empty(),
                "the first request has the node"
            );
            all.insert(request.type_url, request.initial_resource_versions);
        }
        all
    }

    /// Answers, with nothing, the kinds of `asked` that are not in `told`.
    async fn send_nothing_else(
        &mut self,
        asked: &HashMap<String, HashMap<String, String>>,
        told: &[&str],
    ) {
        for kind in asked.keys().filter(|kind| !told.contains(&kind.as_str())) {
            self.send(kind, &[], &[]).await;
        }
    }

    async fn send(&mut self, kind: &str, resources: &[(&str, Json)], removed: &[&str]) {
        self.nonce += 1;
        let response = DeltaDiscoveryResponse {
            type_url: kind.to_owned(),
            nonce: self.nonce.to_string(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            resources: resources
                .iter()
                .map(|(name, spec)| WireResource {
                    name: (*name).to_owned(),
                    version: self.nonce.to_string(),
                    resource: Some(WireAny {
                        type_url: kind.to_owned(),
                        value: resource(name, spec).encode_to_vec(),
                    }),
                    ..WireResource::default()
                })
                .collect(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.unwrap();
    }

    /// The answer to the last response: what was wrong, empty if nothing.
    async fn verdict(&mut self) -> String {
        self.verdict_of(self.nonce).await
    }

    /// The answer to an earlier one, of which none after it has been read.
    async fn verdict_of(&mut self, nonce: u32) -> String {
        loop {
            let request = self.requests.message().await.unwrap().unwrap();
            if request.response_nonce == nonce.to_string() {
                return request.error_detail.map(|e| e.message).unwrap_or_default();
            }
        }
    }
}

fn resource(name: &str, spec: &Json) -> Resource {
    let body = match value(spec).kind {
        Some(prost_types::value::Kind::StructValue(body)) => body,
        _ => Struct::default(),
    };
    Resource {
        metadata: Some(Metadata {
            name: name.to_owned(),
            ..Metadata::default()
        }),
        body: Some(Any {
            type_url: "type.googleapis.com/google.protobuf.Struct".into(),
            value: body.encode_to_vec(),
        }),
    }
}

fn value(json: &Json) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(b) => Kind::BoolValue(*b),
        Json::Number(n) => Kind::NumberValue(n.as_f64().unwrap()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(list) => Kind::ListValue(prost_types::ListValue {
            values: list.iter().map(value).collect(),
        }),
        Json::Object(map) => Kind::StructValue(Struct {
            fields: map.iter().map(|(k, v)| (k.clone(), value(v))).collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}

const HANDLER: &str = "config.istio.io/v1alpha2/handler";
const INSTANCE: &str = "config.istio.io/v1alpha2/instance";
const RULE: &str = "config.istio.io/v1alpha2/rule";
const WORKLOAD: &str = "lateen.io/v1/Workload";

async fn start() -> (Running, Arc<Mutex<mpsc::Receiver<PilotStream>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (streams, receiver) = mpsc::channel(1);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(FakePilot { streams }))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let mut args = args();
    args.config_ads = Some(address.to_string());
    let running = mixer::start(&args, |i| i).await.unwrap();
    (running, Arc::new(Mutex::new(receiver)))
}

fn deny(message: &str) -> Json {
    json!({ "compiledAdapter": "denier", "params": { "status": { "code": 7, "message": message } } })
}

#[tokio::test]
async fn rules_and_workloads_come_from_pilot() {
    let (running, streams) = start().await;
    let mut pilot = streams.lock().await.recv().await.unwrap();
    let asked = pilot.subscriptions().await;
    let early = client(&running)
        .await
        .check(CheckRequest::default())
        .await
        .unwrap_err();
    assert_eq!(
        early.code(),
        tonic::Code::Unavailable,
        "no rules yet is not no rules"
    );
    assert!(asked.contains_key(RULE) && asked.contains_key("config.istio.io/v1alpha2/memquota"));

    // A rule that comes before what it uses is not refused for that.
    let rule = json!({
        "match": "source.labels[\"version\"] == \"v3\"",
        "actions": [{ "handler": "deny", "instances": ["nothing"] }],
    });
    let generate = json!({ "actions": [{ "handler": "env", "instances": ["attributes"] }] });
    pilot
        .send(
            RULE,
            &[
                ("istio-system/deny", rule.clone()),
                ("istio-system/env", generate),
            ],
            &[],
        )
        .await;
    let attributes = json!({
        "compiledTemplate": "kubernetes",
        "params": { "source_ip": "source.ip | ip(\"0.0.0.0\")" },
        "attributeBindings": { "source.labels": "$out.source_labels | emptyStringMap()" },
    });
    let nothing = json!({ "compiledTemplate": "checknothing" });
    pilot
        .send(
            INSTANCE,
            &[
                ("istio-system/nothing", nothing),
                ("istio-system/attributes", attributes),
            ],
            &[],
        )
        .await;
    let env = json!({ "compiledAdapter": "kubernetesenv" });
    pilot
        .send(
            HANDLER,
            &[
                ("istio-system/deny", deny("first")),
                ("istio-system/env", env),
            ],
            &[],
        )
        .await;
    let workload = json!({
        "uid": "kubernetes://reviews.default", "ip": "10.0.0.3", "name": "reviews", "namespace": "default",
        "labels": { "version": "v3" }, "workloadName": "reviews-v3", "workloadNamespace": "default",
        "containers": [{ "name": "reviews", "ports": [9080] }],
    });
    pilot
        .send(WORKLOAD, &[("default/reviews", workload)], &[])
        .await;
    // While a kind may be missing nobody is told anything by the others.
    let early = client(&running)
        .await
        .check(CheckRequest::default())
        .await
        .unwrap_err();
    assert_eq!(early.code(), tonic::Code::Unavailable);
    let told_of = [RULE, INSTANCE, HANDLER, WORKLOAD];
    pilot.send_nothing_else(&asked, &told_of).await;
    for nonce in 1..=pilot.nonce {
        assert_eq!(pilot.verdict_of(nonce).await, "");
    }

    let mut updates = running.updates.clone();
    updates.wait_for(|count| *count > 0).await.unwrap();
    let client = client(&running).await;
    let attributes = |ip: &str| {
        let ip = lateen_adapter::Value::Ip(ip.parse().unwrap());
        CheckRequest {
            attributes: Some(crate::support::compress(&[("source.ip", ip)])),
            global_word_count: 222,
            ..Default::default()
        }
    };
    let check = |mut client: MixerClient<_>, ip| {
        let request = attributes(ip);
        async move {
            told(
                &client
                    .check(request)
                    .await
                    .unwrap()
                    .into_inner()
                    .precondition
                    .unwrap(),
            )
        }
    };
    let denied = "PERMISSION_DENIED:deny.handler.istio-system:first";
    assert_eq!(check(client.clone(), "10.0.0.3").await, denied);
    assert_eq!(check(client.clone(), "10.0.0.4").await, "OK:");

    // A refused object is a NACK with the reason; what is acknowledged is in force.
    pilot
        .send(
            HANDLER,
            &[("istio-system/deny", json!({ "compiledAdapter": "denyer" }))],
            &[],
        )
        .await;
    let reason = pilot.verdict().await;
    assert!(
        reason.contains("handler istio-system/deny") && reason.contains("denyer"),
        "{reason}"
    );
    assert_eq!(check(client.clone(), "10.0.0.3").await, denied);
    pilot
        .send(HANDLER, &[("istio-system/deny", deny("second"))], &[])
        .await;
    assert_eq!(pilot.verdict().await, "");
    assert!(check(client.clone(), "10.0.0.3").await.ends_with(":second"));

    // Pilot goes and comes back: the rules stay, and only differences are sent.
    drop(pilot);
    assert!(check(client.clone(), "10.0.0.3").await.ends_with(":second"));
    let mut pilot = streams.lock().await.recv().await.unwrap();
    let known = pilot.subscriptions().await;
    assert_eq!(known[HANDLER].len(), 2);
    pilot.nonce = 100;
    pilot.send(RULE, &[], &["istio-system/deny"]).await;
    assert_eq!(pilot.verdict().await, "");
    assert_eq!(check(client.clone(), "10.0.0.3").await, "OK:");
    running.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_one_stream_began_to_tell_the_next_completes() {
    let (running, streams) = start().await;
    let mut pilot = streams.lock().await.recv().await.unwrap();
    pilot.subscriptions().await;
    let rule = json!({ "actions": [{ "handler": "deny", "instances": ["nothing"] }] });
    pilot.send(RULE, &[("istio-system/deny", rule)], &[]).await;
    // What is on its way arrives before the end.
    drop(pilot);

    let mut pilot = streams.lock().await.recv().await.unwrap();
    let known = pilot.subscriptions().await;
    assert_eq!(known[RULE].len(), 1);
    let handler = ("istio-system/deny", deny("no"));
    pilot.send(HANDLER, &[handler], &[]).await;
    // Nothing more comes of the rules, for they are known.
    let nothing = json!({ "compiledTemplate": "checknothing" });
    pilot
        .send(INSTANCE, &[("istio-system/nothing", nothing)], &[])
        .await;
    pilot
        .send_nothing_else(&known, &[RULE, HANDLER, INSTANCE])
        .await;
    let mut updates = running.updates.clone();
    updates.wait_for(|count| *count > 0).await.unwrap();
    let answer = client(&running).await.check(CheckRequest::default()).await;
    let verdict = told(&answer.unwrap().into_inner().precondition.unwrap());
    assert_eq!(verdict, "PERMISSION_DENIED:deny.handler.istio-system:no");
    running.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn resources_that_cannot_be_read_are_refused() {
    let (running, streams) = start().await;
    let mut pilot = streams.lock().await.recv().await.unwrap();
    let asked = pilot.subscriptions().await;
    pilot.nonce = 1;
    let response = DeltaDiscoveryResponse {
        type_url: RULE.to_owned(),
        nonce: "1".into(),
        resources: vec![WireResource {
            name: "istio-system/garbage".into(),
            resource: Some(WireAny {
                type_url: RULE.into(),
                value: vec![0xff; 9],
            }),
            ..WireResource::default()
        }],
        ..DeltaDiscoveryResponse::default()
    };
    pilot.responses.send(Ok(response)).await.unwrap();
    pilot.send_nothing_else(&asked, &[RULE]).await;
    let reason = pilot.verdict_of(1).await;
    assert!(reason.contains("rule istio-system/garbage"), "{reason}");
    let mut updates = running.updates.clone();
    updates.wait_for(|count| *count > 0).await.unwrap();
    let problems = running.snapshot.load().problems.clone();
    assert!(
        problems
            .iter()
            .any(|p| p.object == "rule istio-system/garbage" && p.is_refused),
        "{problems:?}"
    );
}
