//! The smallest management server: hands whole sets of resources to whoever subscribes (ADS, state of the
//! world), again at every push, in the order in which they make sense.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use lateen_protocols::{
    envoy::envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
    json::from_json,
};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

/// Answers that a slow client leaves unread.
const QUEUE: usize = 64;

/// A version of everything, type by type, in the order of pushes.
type Snapshot = Arc<Vec<(String, DiscoveryResponse)>>;

/// What is served, and what clients said of it.
#[derive(Debug)]
pub(crate) struct Server {
    snapshots: watch::Sender<Snapshot>,
    refusals: Mutex<Vec<String>>,
    acknowledged: AtomicU64,
}

impl Server {
    /// Starts it on a thread of its own.
    pub(crate) fn start(listener: std::net::TcpListener) -> anyhow::Result<Arc<Server>> {
        let server = Arc::new(Server {
            snapshots: watch::Sender::new(Snapshot::default()),
            refusals: Mutex::default(),
            acknowledged: AtomicU64::new(0),
        });
        let service = AggregatedDiscoveryServiceServer::new(Service(server.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("ads".to_owned())
            .spawn(move || {
                let served = runtime.block_on(async {
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    tonic::transport::Server::builder()
                        .add_service(service)
                        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(
                            listener,
                        ))
                        .await?;
                    anyhow::Ok(())
                });
                if let Err(error) = served {
                    eprintln!("ADS ended: {error:#}");
                }
            })?;
        Ok(server)
    }

    /// Makes these the current resources. Each is a DiscoveryResponse in JSON.
    pub(crate) fn push(&self, responses: &[Value]) -> anyhow::Result<()> {
        let snapshot = responses
            .iter()
            .map(|response| {
                let response: DiscoveryResponse = from_json(response)?;
                Ok((response.type_url.clone(), response))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.snapshots.send_replace(Arc::new(snapshot));
        Ok(())
    }

    /// What clients refused.
    pub(crate) fn refusals(&self) -> Vec<String> {
        let refusals = self.refusals.lock();
        refusals.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many responses clients took.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Service(Arc<Server>);

/// What one stream has asked for and got, by type.
#[derive(Debug, Default)]
struct Subscription {
    names: Vec<String>,
    nonce: String,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Server {
    async fn talk(
        self: Arc<Server>,
        mut requests: Streaming<DiscoveryRequest>,
        answers: mpsc::Sender<Result<DiscoveryResponse, Status>>,
    ) {
        let mut snapshots = self.snapshots.subscribe();
        let mut subscriptions: HashMap<String, Subscription> = HashMap::new();
        let mut sent = 0_u64;
        loop {
            // Both branches are cancel safe: messages and changes wait to be taken.
            let due: Vec<String> = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.note(request, &mut subscriptions).into_iter().collect(),
                    Ok(None) | Err(_) => return,
                },
                changed = snapshots.changed() => match changed {
                    Ok(()) => subscriptions.keys().cloned().collect(),
                    Err(_) => return,
                },
            };
            let snapshot = snapshots.borrow_and_update().clone();
            for (kind, response) in snapshot.iter().filter(|(kind, _)| due.contains(kind)) {
                let Some(subscription) = subscriptions.get_mut(kind) else {
                    continue;
                };
                sent += 1;
                subscription.nonce = sent.to_string();
                let answer = DiscoveryResponse {
                    nonce: subscription.nonce.clone(),
                    ..response.clone()
                };
                if answers.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Takes a request; the type that is due an answer for it.
    fn note(
        &self,
        request: DiscoveryRequest,
        subscriptions: &mut HashMap<String, Subscription>,
    ) -> Option<String> {
        let kind = request.type_url;
        let first = !subscriptions.contains_key(&kind);
        let subscription = subscriptions.entry(kind.clone()).or_default();
        if !first && request.response_nonce != subscription.nonce {
            // About an answer that a later one has overtaken; the word on that one will follow.
            return None;
        }
        match request.error_detail {
            Some(error) => self
                .refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(format!("{kind}: {}", error.message)),
            None if !first => {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            None => {}
        }
        let changed = subscription.names != request.resource_names;
        subscription.names = request.resource_names;
        (first || changed).then_some(kind)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (answers, stream) = mpsc::channel(QUEUE);
        tokio::spawn(self.0.clone().talk(request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state of the world only"))
    }
}

/// Where the bootstrap finds it.
pub(crate) fn cluster(at: SocketAddr) -> Value {
    crate::bootstrap::cluster("xds", at, true, None)
}
