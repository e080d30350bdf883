//! SDS for one Envoy: `default` (the newest certificate and key) and `ROOTCA` (the newest roots), by
//! StreamSecrets and DeltaSecrets, pushed again at each rotation.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::path::Path;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret::Type,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use envoy_types::util::pack_any;
use lateen_identity::Svid;
use lateen_service::identity::Source;
use prost::Name as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::socket::{self, Socket};

/// The workload's own certificate. Istio's name.
const DEFAULT: &str = "default";
/// The roots. Istio's name.
const ROOTCA: &str = "ROOTCA";
/// Most names one stream may ask for; two exist.
const MAX_NAMES: usize = 64;
/// Largest request.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Answers waiting to be read by Envoy. When full, the stream waits, and then sends what is newest.
const QUEUE: usize = 1;

/// A running SDS server; dropping it ends it and removes its socket.
#[derive(Debug)]
pub(super) struct Serving {
    _tasks: JoinSet<()>,
    _socket: Socket,
}

/// Serves secrets on `path`, or stands back (`None`) when somebody else does.
pub(super) fn serve(path: &Path, identity: &Source) -> io::Result<Option<Serving>> {
    let Some((listener, socket)) = socket::bind(path)? else {
        tracing::info!(path = %path.display(), "secrets are served by somebody else; standing back");
        return Ok(None);
    };
    let service = SecretDiscoveryServiceServer::new(Secrets {
        newest: identity.subscribe(),
    })
    .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let server = Server::builder()
        .max_concurrent_streams(1024)
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the secret service ended");
        }
    });
    tracing::info!(path = %path.display(), "serving secrets");
    Ok(Some(Serving {
        _tasks: tasks,
        _socket: socket,
    }))
}

#[derive(Debug)]
struct Secrets {
    newest: watch::Receiver<Option<Arc<Svid>>>,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Secrets {
    type StreamSecretsStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type DeltaSecretsStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        Ok(Response::new(converse::<Sotw>(
            request.into_inner(),
            self.newest.clone(),
        )))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Ok(Response::new(converse::<Delta>(
            request.into_inner(),
            self.newest.clone(),
        )))
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        let mut client = Sotw::default();
        client.hear(request.into_inner())?;
        let newest = self.newest.borrow().clone();
        let newest = newest.ok_or_else(|| Status::unavailable("there is no certificate yet"))?;
        let answer = client.answer(&newest);
        answer
            .map(Response::new)
            .ok_or_else(|| Status::not_found("no such secret"))
    }
}

/// What one stream has asked for and been told.
trait Client: Default + Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    /// Takes a request in.
    fn hear(&mut self, request: Self::Request) -> Result<(), Status>;

    /// What the client does not know yet, if anything.
    fn answer(&mut self, newest: &Svid) -> Option<Self::Response>;
}

/// One stream: hears requests, answers whenever there is news. Ends when Envoy ends it.
fn converse<C: Client>(
    mut requests: Streaming<C::Request>,
    mut newest: watch::Receiver<Option<Arc<Svid>>>,
) -> ReceiverStream<Result<C::Response, Status>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut client = C::default();
        loop {
            // Cancel-safe: `message` keeps partial frames, `changed` is level-triggered.
            let heard = tokio::select! {
                message = requests.message() => match message {
                    Ok(Some(request)) => client.hear(request),
                    Ok(None) | Err(_) => return,
                },
                changed = newest.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
            };
            if let Err(status) = heard {
                drop(sender.send(Err(status)).await);
                return;
            }
            let svid = newest.borrow_and_update().clone();
            if let Some(answer) = svid.and_then(|svid| client.answer(&svid))
                && sender.send(Ok(answer)).await.is_err()
            {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// A secret by name, with a version that changes exactly when its content does.
fn secret(name: &str, svid: &Svid) -> Option<(String, Secret)> {
    let inline = |bytes: Vec<u8>| {
        Some(DataSource {
            specifier: Some(Specifier::InlineBytes(bytes)),
            ..DataSource::default()
        })
    };
    let (version, content) = match name {
        DEFAULT => {
            let certificate = TlsCertificate {
                certificate_chain: inline(svid.chain_pem().into_bytes()),
                private_key: inline(svid.key_pem().as_bytes().to_vec()),
                ..TlsCertificate::default()
            };
            (svid.serial().to_owned(), Type::TlsCertificate(certificate))
        }
        ROOTCA => {
            let roots = svid.bundle().all_pem();
            let mut hasher = DefaultHasher::new();
            roots.hash(&mut hasher);
            let context = CertificateValidationContext {
                trusted_ca: inline(roots.into_bytes()),
                ..CertificateValidationContext::default()
            };
            (
                format!("{:016x}", hasher.finish()),
                Type::ValidationContext(context),
            )
        }
        _ => return None,
    };
    Some((
        version,
        Secret {
            name: name.to_owned(),
            r#type: Some(content),
        },
    ))
}

fn check(type_url: &str, names: usize) -> Result<(), Status> {
    if !type_url.is_empty() && type_url != Secret::type_url() {
        return Err(Status::invalid_argument("only secrets are served here"));
    }
    if names > MAX_NAMES {
        return Err(Status::invalid_argument("too many names"));
    }
    Ok(())
}

/// State of the world: the client names all it wants, and gets all of it in each answer.
#[derive(Default)]
struct Sotw {
    names: Vec<String>,
    /// Versions in the last answer; empty means that an answer is due.
    sent: BTreeMap<String, String>,
    nonce: u64,
}

impl Client for Sotw {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn hear(&mut self, request: DiscoveryRequest) -> Result<(), Status> {
        check(&request.type_url, request.resource_names.len())?;
        if !request.response_nonce.is_empty() && request.response_nonce != self.nonce.to_string() {
            return Ok(()); // about an answer that a newer one has overtaken
        }
        if let Some(error) = request.error_detail {
            // What was refused is not sent again; the next certificate will be.
            tracing::warn!(names = ?request.resource_names, error = error.message, "Envoy refused a secret");
        }
        if self.names != request.resource_names {
            self.names = request.resource_names;
            self.sent.clear();
        }
        Ok(())
    }

    fn answer(&mut self, newest: &Svid) -> Option<DiscoveryResponse> {
        let secrets: Vec<_> = self
            .names
            .iter()
            .filter_map(|name| Some((name, secret(name, newest)?)))
            .collect();
        let versions: BTreeMap<_, _> = secrets
            .iter()
            .map(|(name, (version, _))| ((*name).clone(), version.clone()))
            .collect();
        if versions == self.sent {
            return None;
        }
        self.nonce += 1;
        let version_info = versions.values().cloned().collect::<Vec<_>>().join(".");
        self.sent = versions;
        Some(DiscoveryResponse {
            version_info,
            resources: secrets
                .into_iter()
                .map(|(_, (_, secret))| pack_any(secret))
                .collect(),
            type_url: Secret::type_url(),
            nonce: self.nonce.to_string(),
            ..DiscoveryResponse::default()
        })
    }
}

/// Incremental: the client says what it wants more or less, and gets what is new.
#[derive(Default)]
struct Delta {
    /// By name, the version that the client has; an empty one for "does not exist".
    subscribed: BTreeMap<String, Option<String>>,
    nonce: u64,
}

impl Client for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn hear(&mut self, mut request: DeltaDiscoveryRequest) -> Result<(), Status> {
        check(
            &request.type_url,
            self.subscribed.len() + request.resource_names_subscribe.len(),
        )?;
        if let Some(error) = request.error_detail {
            tracing::warn!(error = error.message, "Envoy refused a secret");
        }
        for name in request.resource_names_unsubscribe {
            self.subscribed.remove(&name);
        }
        for name in request.resource_names_subscribe {
            // A repeated subscription asks to be told again.
            let version = request.initial_resource_versions.remove(&name);
            self.subscribed.insert(name, version);
        }
        Ok(())
    }

    fn answer(&mut self, newest: &Svid) -> Option<DeltaDiscoveryResponse> {
        let (mut resources, mut removed_resources) = (Vec::new(), Vec::new());
        for (name, known) in &mut self.subscribed {
            let (version, content) = secret(name, newest).unzip();
            let version = version.unwrap_or_default();
            if known.as_ref() == Some(&version) {
                continue;
            }
            match content {
                Some(content) => resources.push(Resource {
                    name: name.clone(),
                    version: version.clone(),
                    resource: Some(pack_any(content)),
                    ..Resource::default()
                }),
                None => removed_resources.push(name.clone()),
            }
            *known = Some(version);
        }
        if resources.is_empty() && removed_resources.is_empty() {
            return None;
        }
        self.nonce += 1;
        Some(DeltaDiscoveryResponse {
            system_version_info: newest.serial().to_owned(),
            resources,
            removed_resources,
            type_url: Secret::type_url(),
            nonce: self.nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        })
    }
}
