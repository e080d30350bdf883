//! Adapters with sessions: parameters once, an id with each call. The adapter here is plain tonic, by the
//! services that Istio's protos generate.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use lateen_protocols::{
    google::rpc,
    istio::mixer::adapter::model::v1beta1::{
        self as model,
        infrastructure_backend_server::{InfrastructureBackend, InfrastructureBackendServer},
    },
    template::listentry::{
        HandleListEntryRequest, Type,
        handle_list_entry_service_server::{HandleListEntryService, HandleListEntryServiceServer},
    },
};
use prost::Message as _;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use super::events;
use crate::support::{Mesh, text, told};

/// Allows what the parameters of the session list.
#[derive(Clone)]
struct Lists {
    sessions: Arc<Mutex<HashMap<String, Vec<String>>>>,
    told: mpsc::UnboundedSender<String>,
}

/// `own.Params`: `repeated string entries = 1`.
#[derive(Clone, PartialEq, prost::Message)]
struct Params {
    #[prost(string, repeated, tag = "1")]
    entries: Vec<String>,
}

const PARAMS: &str =
    r#"syntax = "proto3"; package lists; message Params { repeated string entries = 1; }"#;

impl Lists {
    fn params(config: Option<prost_types::Any>) -> Params {
        let config = config.unwrap();
        assert_eq!(config.type_url, "type.googleapis.com/lists.Params");
        Params::decode(&*config.value).unwrap()
    }
}

#[tonic::async_trait]
impl InfrastructureBackend for Lists {
    async fn validate(
        &self,
        request: Request<model::ValidateRequest>,
    ) -> Result<Response<model::ValidateResponse>, Status> {
        let params = Self::params(request.into_inner().adapter_config);
        let is_empty = params.entries.is_empty();
        let status = rpc::Status {
            code: if is_empty { 3 } else { 0 },
            message: if is_empty {
                "an empty list".to_owned()
            } else {
                String::new()
            },
            details: Vec::new(),
        };
        Ok(Response::new(model::ValidateResponse {
            status: Some(status),
        }))
    }

    async fn create_session(
        &self,
        request: Request<model::CreateSessionRequest>,
    ) -> Result<Response<model::CreateSessionResponse>, Status> {
        let request = request.into_inner();
        let any = &request.inferred_types["entry.instance.istio-system"];
        let ty = Type::decode(&*any.value).unwrap();
        let params = Self::params(request.adapter_config);
        let mut sessions = self.sessions.lock().unwrap();
        let session_id = format!("s{}", sessions.len() + 1);
        let what = format!(
            "create {session_id} {:?} value {}",
            params.entries, ty.value
        );
        sessions.insert(session_id.clone(), params.entries);
        self.told.send(what).unwrap();
        Ok(Response::new(model::CreateSessionResponse {
            session_id,
            status: None,
        }))
    }

    async fn close_session(
        &self,
        request: Request<model::CloseSessionRequest>,
    ) -> Result<Response<model::CloseSessionResponse>, Status> {
        let id = request.into_inner().session_id;
        self.told.send(format!("close {id}")).unwrap();
        Ok(Response::new(model::CloseSessionResponse { status: None }))
    }
}

#[tonic::async_trait]
impl HandleListEntryService for Lists {
    async fn handle_list_entry(
        &self,
        request: Request<HandleListEntryRequest>,
    ) -> Result<Response<model::CheckResult>, Status> {
        let metadata = request
            .metadata()
            .get("session_id")
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let request = request.into_inner();
        let config = request.adapter_config.unwrap();
        assert_eq!(config.type_url, "google.protobuf.Any.type_url");
        assert_eq!(config.value, metadata.as_bytes());
        let sessions = self.sessions.lock().unwrap();
        let entries = sessions
            .get(&metadata)
            .ok_or_else(|| Status::not_found("no such session"))?;
        let value = request.instance.unwrap().value.unwrap().value.unwrap();
        use lateen_protocols::istio::policy::v1beta1::value::Value;
        let Value::StringValue(value) = value else {
            return Err(Status::invalid_argument("not a text"));
        };
        let status = rpc::Status {
            code: if entries.contains(&value) { 0 } else { 5 },
            message: value,
            details: Vec::new(),
        };
        Ok(Response::new(model::CheckResult {
            status: Some(status),
            valid_duration: None,
            valid_use_count: 0,
        }))
    }
}

/// Istio's template without an object for it; an instance in the old and one in the new style.
fn rules(address: &str, entries: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("params.proto"), PARAMS).unwrap();
    let set = protox::Compiler::new([folder.path()])
        .unwrap()
        .open_file("params.proto")
        .unwrap()
        .encode_file_descriptor_set();
    use base64::Engine as _;
    let config = base64::engine::general_purpose::STANDARD.encode(set);
    format!(
        r#"
apiVersion: config.istio.io/v1alpha2
kind: adapter
metadata: {{ name: lists, namespace: istio-system }}
spec: {{ session_based: true, templates: [ listentry ], config: "{config}" }}
---
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: {{ name: one, namespace: istio-system }}
spec:
  adapter: lists
  params: {{ entries: {entries} }}
  connection: {{ address: "{address}" }}
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: {{ name: entry, namespace: istio-system }}
spec: {{ template: listentry, params: {{ value: source.name | "" }} }}
---
apiVersion: config.istio.io/v1alpha2
kind: listentry
metadata: {{ name: host, namespace: istio-system }}
spec: {{ value: request.host | "v1" }}
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: {{ name: lists, namespace: istio-system }}
spec: {{ actions: [ {{ handler: one, instances: [ entry, host.listentry ] }} ] }}
"#
    )
}

async fn lists() -> (Lists, String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (told, tells) = mpsc::unbounded_channel();
    let lists = Lists {
        sessions: Arc::default(),
        told,
    };
    let server = Server::builder()
        .add_service(InfrastructureBackendServer::new(lists.clone()))
        .add_service(HandleListEntryServiceServer::new(lists.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(async move { server.await.unwrap() });
    (lists, address, tells)
}

#[tokio::test]
async fn a_session_has_the_parameters_and_calls_have_its_id() {
    let (lists, address, mut tells) = lists().await;
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&address, "[ v1, v2 ]"))]).await;
    assert_eq!(mesh.refused(), [""; 0]);
    let name = |name: &str| [("source.name", text(name))];
    assert_eq!(told(&mesh.check(&name("v2")).await), "OK:");
    assert_eq!(
        told(&mesh.check(&name("v3")).await),
        "NOT_FOUND:one.handler.istio-system:v3"
    );
    // value: STRING is 1 of ValueType.
    assert_eq!(
        tells.recv().await.unwrap(),
        r#"create s1 ["v1", "v2"] value 1"#
    );

    // The process forgets its sessions, as when it restarts: another is opened, and the call made again.
    lists.sessions.lock().unwrap().remove("s1");
    lists
        .sessions
        .lock()
        .unwrap()
        .insert("other".to_owned(), Vec::new());
    let verdict = told(&mesh.check(&name("v2")).await);
    assert_eq!(verdict, "OK:");
    assert_eq!(
        tells.recv().await.unwrap(),
        r#"create s2 ["v1", "v2"] value 1"#
    );
    assert_eq!(tells.recv().await.unwrap(), "close s1");
    assert_eq!(events(&mesh, "sessions_opened").await, 2);

    // New parameters: a new session, and the old one is closed after its last call.
    mesh.apply("rules.yaml", Some(&rules(&address, "[ v1, v3 ]")))
        .await;
    assert_eq!(told(&mesh.check(&name("v3")).await), "OK:");
    let mut both = [tells.recv().await.unwrap(), tells.recv().await.unwrap()];
    both.sort();
    assert_eq!(both, ["close s2", r#"create s3 ["v1", "v3"] value 1"#]);
    mesh.running.stop(std::time::Duration::from_secs(5)).await;
    assert_eq!(tells.recv().await.unwrap(), "close s3");
}

#[tokio::test]
async fn parameters_that_the_process_refuses_are_told_to_callers() {
    let (_lists, address, _tells) = lists().await;
    let mut mesh = Mesh::start(&[("rules.yaml", &rules(&address, "[]"))]).await;
    let verdict = told(&mesh.check(&[]).await);
    assert!(
        verdict.contains(
            "the adapter refuses the handler's parameters: INVALID_ARGUMENT: an empty list"
        ),
        "{verdict}"
    );
}
