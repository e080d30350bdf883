//! One stream to one management server, kept alive: connect, ask, apply, answer, and again after a
//! pause when it breaks. While the server is away everything serves on with what it has.

use std::{fmt, sync::Arc, time::Duration};

use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::{
        cluster::v3::cluster_discovery_service_client::ClusterDiscoveryServiceClient,
        discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
        listener::v3::listener_discovery_service_client::ListenerDiscoveryServiceClient,
        secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
};
use futures::{StreamExt, TryFutureExt, stream::BoxStream};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    metadata::{MetadataKey, MetadataValue},
    transport::Channel,
};

use super::{Kind, Sink, Wanted, protocol::Session, target::Target};
use crate::secret::Source;

/// First pause after a stream broke; doubles up to [`PAUSE_MAX`], each drawn between a half and the whole.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// A control plane that came back is found within this time.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A stream that lived this long was healthy: its end is no reason to wait long.
const HEALTHY: Duration = Duration::from_secs(10);
/// Requests waiting to be sent; more than a stream has kinds means that the server does not read.
const QUEUE: usize = 64;
/// A server that does not read for so long is not going to.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Bounds one message; a push of 10,000 clusters has about 30 MB.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// Which service the stream calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// All kinds on one stream.
    Aggregated,
    /// SDS alone.
    Secrets,
    /// LDS alone.
    Listeners,
    /// CDS alone.
    Clusters,
}

impl Service {
    fn kinds(self) -> &'static [Kind] {
        match self {
            Service::Aggregated => &Kind::ALL,
            Service::Secrets => &[Kind::Secret],
            Service::Listeners => &[Kind::Listener],
            Service::Clusters => &[Kind::Cluster],
        }
    }
}

/// A stream in the making.
#[derive(Debug)]
pub struct Client {
    /// Who decides.
    pub sink: Arc<dyn Sink>,
    /// Whom to ask.
    pub target: Target,
    /// What to call there.
    pub service: Service,
    /// Kinds to ask for, of those the service has.
    pub kinds: Vec<Kind>,
    /// Incremental instead of state of the world.
    pub delta: bool,
    /// Sent with the request.
    pub metadata: Vec<(String, String)>,
    /// Who we are.
    pub node: Node,
    /// How secrets from here are marked.
    pub source: Source,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("cannot connect: {}", chain(.0))]
    Connect(tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(Status),
    #[error("the server closed the stream")]
    Closed,
    #[error("the server does not read")]
    Stuck,
}

/// tonic says "transport error" and hides why in the sources.
fn chain(error: &(dyn std::error::Error + 'static)) -> impl fmt::Display {
    let sources = std::iter::successors(Some(error), |e| e.source());
    sources
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

impl Client {
    /// Runs until dropped.
    pub async fn run(self) {
        let kinds: Vec<Kind> = self
            .service
            .kinds()
            .iter()
            .filter(|kind| self.kinds.contains(kind))
            .copied()
            .collect();
        let mut session = Session::new(&kinds, self.source.clone(), self.node.clone());
        let mut pause = PAUSE_MIN;
        loop {
            // Our own certificate may be on its way; failing until then would only make us late.
            self.target.ready().await;
            let started = Instant::now();
            let ended = if self.delta {
                self.stream::<Delta>(&mut session).await
            } else {
                self.stream::<StateOfTheWorld>(&mut session).await
            };
            self.sink.connected(&self.source, false);
            session.reconnect();
            if started.elapsed() > HEALTHY {
                pause = PAUSE_MIN;
            }
            let drawn = pause.mul_f64(rand::random_range(0.5..1.0));
            tracing::warn!(server = self.target.name(), reason = %ended, ?drawn, "xDS stream ended; will reconnect");
            tokio::time::sleep(drawn).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn stream<V: Variant>(&self, session: &mut Session) -> Ended {
        let channel = match self.target.connect().await {
            Ok(channel) => channel,
            Err(error) => return Ended::Connect(error),
        };
        let mut wanted = self.sink.wanted();
        let (requests, receiver) = mpsc::channel(QUEUE);
        for request in V::sync(session, &wanted.borrow_and_update().clone()) {
            // The queue has room for one request of each kind.
            if requests.try_send(request).is_err() {
                return Ended::Stuck;
            }
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        for (key, value) in &self.metadata {
            let key = MetadataKey::from_bytes(key.as_bytes());
            let value = MetadataValue::try_from(value.as_str());
            if let (Ok(key), Ok(value)) = (key, value) {
                request.metadata_mut().insert(key, value);
            }
        }
        // Some servers send their headers with the first response only, so the call itself is part of
        // what is waited for below.
        let mut responses = V::open(self.service, channel, request);
        let mut announced = false;
        loop {
            // Both branches are cancel-safe: `next` of a stream, and `changed` of a watch.
            let answers = tokio::select! {
                response = responses.next() => match response {
                    Some(Ok(response)) => {
                        if !announced {
                            announced = true;
                            tracing::info!(server = self.target.name(), delta = self.delta, "xDS stream is up");
                            self.sink.connected(&self.source, true);
                        }
                        let answer = V::respond(session, response, self.sink.as_ref());
                        // What the update made wanted is asked for at once, behind its ACK.
                        let more = V::sync(session, &wanted.borrow_and_update().clone());
                        answer.into_iter().chain(more).collect::<Vec<_>>()
                    }
                    Some(Err(status)) => return Ended::Status(status),
                    None => return Ended::Closed,
                },
                changed = wanted.changed() => match changed {
                    Ok(()) => V::sync(session, &wanted.borrow_and_update().clone()),
                    Err(_) => return Ended::Closed,
                },
            };
            for answer in answers {
                match requests.send_timeout(answer, SEND_TIMEOUT).await {
                    Ok(()) => {}
                    Err(mpsc::error::SendTimeoutError::Timeout(_)) => return Ended::Stuck,
                    Err(mpsc::error::SendTimeoutError::Closed(_)) => return Ended::Closed,
                }
            }
        }
    }
}

type Responses<T> = BoxStream<'static, Result<T, Status>>;

/// The two variants differ in their messages only.
trait Variant {
    type Request: Send + 'static;
    type Response: Send + 'static;
    fn sync(session: &mut Session, wanted: &Wanted) -> Vec<Self::Request>;
    fn respond(
        session: &mut Session,
        response: Self::Response,
        sink: &dyn Sink,
    ) -> Option<Self::Request>;
    fn open(
        service: Service,
        channel: Channel,
        request: Request<ReceiverStream<Self::Request>>,
    ) -> Responses<Self::Response>;
}

struct StateOfTheWorld;
struct Delta;

/// Calls `$method` of a `$client` and gives its responses, the opening included.
macro_rules! call {
    ($channel:ident, $request:ident, $client:ident, $method:ident) => {{
        let mut client = $client::new($channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        async move { client.$method($request).await }
            .map_ok(tonic::Response::into_inner)
            .try_flatten_stream()
            .boxed()
    }};
}

impl Variant for StateOfTheWorld {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn sync(session: &mut Session, wanted: &Wanted) -> Vec<DiscoveryRequest> {
        session.sync(wanted)
    }

    fn respond(
        session: &mut Session,
        response: DiscoveryResponse,
        sink: &dyn Sink,
    ) -> Option<DiscoveryRequest> {
        session.respond(response, sink)
    }

    fn open(
        service: Service,
        channel: Channel,
        request: Request<ReceiverStream<DiscoveryRequest>>,
    ) -> Responses<DiscoveryResponse> {
        match service {
            Service::Aggregated => {
                call!(
                    channel,
                    request,
                    AggregatedDiscoveryServiceClient,
                    stream_aggregated_resources
                )
            }
            Service::Secrets => call!(
                channel,
                request,
                SecretDiscoveryServiceClient,
                stream_secrets
            ),
            Service::Listeners => call!(
                channel,
                request,
                ListenerDiscoveryServiceClient,
                stream_listeners
            ),
            Service::Clusters => call!(
                channel,
                request,
                ClusterDiscoveryServiceClient,
                stream_clusters
            ),
        }
    }
}

impl Variant for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn sync(session: &mut Session, wanted: &Wanted) -> Vec<DeltaDiscoveryRequest> {
        session.sync_delta(wanted)
    }

    fn respond(
        session: &mut Session,
        response: DeltaDiscoveryResponse,
        sink: &dyn Sink,
    ) -> Option<DeltaDiscoveryRequest> {
        session.respond_delta(response, sink)
    }

    fn open(
        service: Service,
        channel: Channel,
        request: Request<ReceiverStream<DeltaDiscoveryRequest>>,
    ) -> Responses<DeltaDiscoveryResponse> {
        match service {
            Service::Aggregated => {
                call!(
                    channel,
                    request,
                    AggregatedDiscoveryServiceClient,
                    delta_aggregated_resources
                )
            }
            Service::Secrets => call!(
                channel,
                request,
                SecretDiscoveryServiceClient,
                delta_secrets
            ),
            Service::Listeners => call!(
                channel,
                request,
                ListenerDiscoveryServiceClient,
                delta_listeners
            ),
            Service::Clusters => call!(
                channel,
                request,
                ClusterDiscoveryServiceClient,
                delta_clusters
            ),
        }
    }
}

#[cfg(test)]
mod tests;
