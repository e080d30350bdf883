//! Aggregated discovery: streams of requests and responses → sessions → what is sent.
//!
//! [`Discovery`] is what all streams share; each stream has a task ([`Discovery::converse`]) that owns
//! its [`session::Session`] and moves it along: requests first, then the newest configuration.

pub mod session;
pub mod ledger;
pub mod refresh;
mod wire;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3 as xds;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use lateen_config::Problem;
use lateen_identity::SpiffeId;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, debug, error, info, info_span, warn};

use self::ledger::{Connection, Ledger};
pub use self::refresh::EndpointChanges;
use self::session::{Session, Target, Verdict};
use self::wire::Ask;
use crate::encode::{Catalog, Encoder, Kind};
use crate::generic::ObjectGenerations;
use crate::metrics::Metrics;
use crate::model::{Node, Role, Snapshot};
use crate::translate::translate;

/// Streams at a time, over all ports; one more is refused.
const STREAM_LIMIT: usize = 20_000;

/// How long a client may take to say who it is.
const FIRST_REQUEST_WAIT: Duration = Duration::from_secs(10);

/// How long one response may wait for its client to read; then the stream is closed, and the client
/// reconnects with what it has.
const SEND_WAIT: Duration = Duration::from_secs(10);

/// Responses handed to a stream ahead of its client.
const SEND_QUEUE: usize = 8;

/// One generation of configuration, ready to be served.
#[derive(Debug)]
pub struct Served {
    /// The model.
    pub snapshot: Arc<Snapshot>,
    /// Configuration objects for those who read them as they are, by kind.
    pub generic: BTreeMap<Kind, Arc<Catalog>>,
    /// Generation of the last change, by object.
    pub object_generations: ObjectGenerations,
    /// What is wrong with the sources; what they said before still holds.
    pub problems: Vec<Problem>,
    /// When the oldest change in it was noticed.
    pub changed_at: Instant,
    /// Counts what is served: a generation is served once more when Mixers have acknowledged its rules.
    pub revision: u64,
    /// What is to be computed for those who have an earlier revision.
    pub endpoints: EndpointChanges,
}

/// What all streams share.
#[derive(Debug)]
pub struct Discovery {
    served: watch::Receiver<Option<Arc<Served>>>,
    encoder: Arc<Encoder>,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    /// Translations at a time: as many as there are cores.
    workers: Semaphore,
    streams: Arc<Semaphore>,
    next_stream: AtomicU64,
    tasks: TaskTracker,
    drain: CancellationToken,
}

/// What a port knows about its callers.
#[derive(Clone, Copy, Debug)]
pub enum Trust {
    /// Nothing: the plain port. Whoever can reach it is believed.
    Network,
    /// The SPIFFE ID in the certificate of the connection; without one the stream is refused.
    Certificate(fn(&tonic::Extensions) -> Option<SpiffeId>),
}

impl Discovery {
    /// Serves what comes out of `served`; closes its streams when `drain` is cancelled.
    #[must_use]
    pub fn new(
        served: watch::Receiver<Option<Arc<Served>>>,
        encoder: Arc<Encoder>,
        metrics: Arc<Metrics>,
        drain: CancellationToken,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self {
            served,
            encoder,
            ledger: Arc::default(),
            metrics,
            workers: Semaphore::new(cores),
            streams: Arc::new(Semaphore::new(STREAM_LIMIT)),
            next_stream: AtomicU64::new(1),
            tasks: TaskTracker::new(),
            drain,
        })
    }

    /// Who is connected, and what each has acknowledged.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The newest generation, once there is one.
    #[must_use]
    pub fn served(&self) -> Option<Arc<Served>> {
        self.served.borrow().clone()
    }

    /// Is told of every new generation.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Served>>> {
        self.served.clone()
    }

    /// The gRPC service for one port.
    #[must_use]
    pub fn service(self: &Arc<Self>, trust: Trust) -> AggregatedDiscoveryServiceServer<Ads> {
        AggregatedDiscoveryServiceServer::new(Ads {
            discovery: self.clone(),
            trust,
        })
    }

    /// Waits until all streams have ended, after `drain`.
    pub async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// One stream, from its first request to its end.
    async fn converse<A, R>(
        self: Arc<Self>,
        mut asks: Streaming<A>,
        answers: mpsc::Sender<Result<R, Status>>,
        peer: Option<SpiffeId>,
    ) where
        A: Ask,
        R: From<session::Response> + Send + 'static,
    {
        if let Err(status) = self.clone().hold::<A, R>(&mut asks, &answers, peer).await
            && status.code() != tonic::Code::Ok
        {
            debug!(code = ?status.code(), reason = status.message(), "stream ended");
            // The client may be gone, or not reading: it learns from the end of the stream.
            _ = answers.try_send(Err(status));
        }
    }

    async fn hold<A, R>(
        self: Arc<Self>,
        asks: &mut Streaming<A>,
        answers: &mpsc::Sender<Result<R, Status>>,
        peer: Option<SpiffeId>,
    ) -> Result<(), Status>
    where
        A: Ask,
        R: From<session::Response> + Send + 'static,
    {
        let first = match timeout(FIRST_REQUEST_WAIT, asks.message()).await {
            Err(_) => {
                return Err(self.refuse("silent", Status::deadline_exceeded("no request came")));
            }
            Ok(Err(_) | Ok(None)) => return Ok(()),
            Ok(Ok(Some(first))) => first,
        };
        let mut node = Node::parse(first.node())
            .map_err(|e| self.refuse("node", Status::invalid_argument(e.to_string())))?;
        if let Some(peer) = &peer {
            check_identity(peer, &mut node).map_err(|status| self.refuse("identity", status))?;
        }
        let mut newest = self.served.clone();
        let mut served = newest.borrow_and_update().clone().ok_or_else(|| {
            self.refuse(
                "unready",
                Status::unavailable("no configuration has been read yet"),
            )
        })?;

        let stream = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(node);
        let span = info_span!("ads", stream, node = %node.id);
        let target = Target {
            generation: served.snapshot.generation,
            catalogs: served.generic.clone(),
            conflicts: Vec::new(),
            endpoints_only: None,
        };
        let session = Session::new(
            A::MODE,
            stream,
            target,
            self.encoder.clone(),
            Instant::now(),
        );
        let connection = Arc::new(Connection::new(
            stream,
            node.clone(),
            peer.map(|id| id.to_string()),
            session,
        ));
        let _entry = self.ledger.enter(connection.clone());
        let _gauge = Connected::new(self.metrics.clone());
        span.in_scope(|| info!(mode = ?A::MODE, "connected"));

        let result = async {
            let mut has_xds = false;
            let mut ask = Some(first);
            let mut computing: Option<Computing> = None;
            let mut failed = 0;
            loop {
                if let Some(ask) = ask.take() {
                    let kind = Kind::of_type_url(ask.type_url())
                        .ok_or_else(|| Status::invalid_argument(format!("unknown type URL {:?}", ask.type_url())))?;
                    if Kind::XDS.contains(&kind) && !has_xds {
                        if node.role == Role::Reader {
                            return Err(Status::invalid_argument(
                                "only nodes of type sidecar and router get proxy configuration",
                            ));
                        }
                        // The session takes more of the same generation, so it waits for it here.
                        let target = self
                            .compute(served.clone(), node.clone())
                            .await
                            .ok_or_else(|| Status::internal("the configuration of this proxy cannot be computed"))?;
                        connection.session().complete(target);
                        has_xds = true;
                        // What was begun without proxy configuration would miss it.
                        computing = None;
                    }
                    let verdict = ask
                        .apply(&mut connection.session(), &kind, Instant::now())
                        .map_err(|e| Status::resource_exhausted(e.to_string()))?;
                    self.note(&kind, &verdict);
                }
                self.send_all(&connection, answers).await?;

                let (settled, deadline, live) = {
                    let session = connection.session();
                    (session.is_settled(), session.deadline(), session.live())
                };
                self.note_live(&connection, live, &served);
                if settled && computing.is_none() {
                    let next = newest.borrow().clone();
                    let known = served.revision.max(failed);
                    if let Some(next) = next.filter(|next| next.revision > known) {
                        let had = has_xds.then(|| connection.session().target().clone());
                        let had = had.map(|had| (served.revision, had));
                        let work = Box::pin(self.clone().compute_owned(next.clone(), node.clone(), had));
                        computing = Some(Computing { next, work });
                    }
                }

                // All branches are cancel-safe: a message is taken whole or not at all, a computation
                // stays in `computing`, the others keep no state.
                tokio::select! {
                    biased;
                    message = asks.message() => match message {
                        Ok(Some(message)) => ask = Some(message),
                        Ok(None) => return Ok(()),
                        Err(status) => {
                            debug!(%status, "stream broke");
                            return Ok(());
                        }
                    },
                    (next, target) = finish(&mut computing), if computing.is_some() => {
                        computing = None;
                        match target {
                            Some(target) => {
                                served = next;
                                connection.session().adopt(target, Instant::now());
                            }
                            None => {
                                failed = next.revision;
                                error!(generation = next.snapshot.generation, "cannot be computed; the last good configuration stays");
                            }
                        }
                    }
                    changed = newest.changed(), if settled && computing.is_none() => {
                        if changed.is_err() {
                            return Err(Status::unavailable("pilot is stopping"));
                        }
                    }
                    () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                        connection.session().expire(Instant::now());
                    }
                    () = answers.closed() => return Ok(()),
                    () = self.drain.cancelled() => {
                        return Err(Status::unavailable("pilot is stopping; connect again"));
                    }
                }
            }
        }
        .instrument(span.clone())
        .await;
        span.in_scope(|| info!("disconnected"));
        result
    }

    fn refuse(&self, reason: &'static str, status: Status) -> Status {
        self.metrics.refused(reason);
        status
    }

    fn note(&self, kind: &Kind, verdict: &Verdict) {
        match verdict {
            Verdict::None => {}
            Verdict::Ack => debug!(kind = kind.short(), "ACK"),
            Verdict::Nack { message, names } => {
                self.metrics.rejected(kind);
                warn!(kind = kind.short(), reason = message, resources = ?names, "NACK");
            }
            Verdict::Stale => {
                self.metrics.stale(kind);
                debug!(kind = kind.short(), "stale nonce");
            }
        }
        self.ledger.touch();
    }

    fn note_live(&self, connection: &Connection, live: u64, served: &Served) {
        let Some(before) = connection.note_live(live) else {
            return;
        };
        self.ledger.touch();
        // A client that has just come did not wait for the change.
        if before > 0 && live == served.snapshot.generation {
            self.metrics
                .converged(served.changed_at.elapsed().as_secs_f64());
        }
        debug!(generation = live, "live");
    }

    async fn send_all<R>(
        &self,
        connection: &Connection,
        answers: &mpsc::Sender<Result<R, Status>>,
    ) -> Result<(), Status>
    where
        R: From<session::Response> + Send + 'static,
    {
        let responses = connection.session().take_responses();
        for response in responses {
            let started = Instant::now();
            let bytes = response
                .set
                .iter()
                .map(|encoded| encoded.body.value.len())
                .sum();
            let kind = response.kind.clone();
            debug!(
                kind = kind.short(),
                nonce = response.nonce,
                version = response.version,
                resources = response.set.len(),
                removed = response.removed.len(),
                pushed = response.pushed,
                "send"
            );
            match answers.send_timeout(Ok(response.into()), SEND_WAIT).await {
                Ok(()) => self
                    .metrics
                    .sent(&kind, bytes, started.elapsed().as_secs_f64()),
                Err(mpsc::error::SendTimeoutError::Closed(_)) => return Err(Status::ok("gone")),
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                    self.metrics.write_timed_out();
                    warn!(
                        kind = kind.short(),
                        "the client does not read; closing its stream"
                    );
                    return Err(Status::deadline_exceeded("responses are not being read"));
                }
            }
        }
        Ok(())
    }

    async fn compute_owned(
        self: Arc<Self>,
        served: Arc<Served>,
        node: Arc<Node>,
        had: Option<(u64, Target)>,
    ) -> Option<Target> {
        let Some((revision, had)) = had else {
            return Some(Target {
                generation: served.snapshot.generation,
                catalogs: served.generic.clone(),
                ..Target::default()
            });
        };
        // Some assignments are quicker made than handed to another thread.
        match refresh::refresh(&served, &node, revision, &had, &self.encoder) {
            Some(target) => Some(target),
            None => self.compute(served, node).await,
        }
    }

    /// What a node should have; `None` if translation failed.
    async fn compute(&self, served: Arc<Served>, node: Arc<Node>) -> Option<Target> {
        let mut target = Target {
            generation: served.snapshot.generation,
            catalogs: served.generic.clone(),
            conflicts: Vec::new(),
            endpoints_only: None,
        };
        let _permit = self.workers.acquire().await.ok()?;
        let started = Instant::now();
        let encoder = self.encoder.clone();
        // Off the runtime: a large mesh takes tens of milliseconds, and acknowledgements should not wait.
        let catalogs =
            tokio::task::spawn_blocking(move || catalogs(&served.snapshot, &node, &encoder))
                .await
                .inspect_err(|e| error!(error = %e, "translation panicked"))
                .ok()?;
        self.metrics.translated(started.elapsed().as_secs_f64());
        target.catalogs.extend(catalogs.0);
        target.conflicts = catalogs.1;
        Some(target)
    }
}

/// The next target of one client, on its way.
struct Computing {
    next: Arc<Served>,
    work: Pin<Box<dyn Future<Output = Option<Target>> + Send>>,
}

/// Waits for the computation under way, if one is.
async fn finish(computing: &mut Option<Computing>) -> (Arc<Served>, Option<Target>) {
    match computing {
        Some(Computing { next, work }) => (next.clone(), work.await),
        None => std::future::pending().await,
    }
}

/// A node's resources, encoded, and what had to be left out of them.
#[must_use]
pub fn catalogs(
    snapshot: &Snapshot,
    node: &Node,
    encoder: &Encoder,
) -> (BTreeMap<Kind, Arc<Catalog>>, Vec<String>) {
    let resources = translate(snapshot, node);
    let clusters: Catalog = resources
        .clusters
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let endpoints: Catalog = resources
        .endpoints
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let listeners: Catalog = resources
        .listeners
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let routes: Catalog = resources
        .routes
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let extensions: Catalog = resources
        .extensions
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let secrets: Catalog = resources
        .secrets
        .iter()
        .map(|(name, message)| (name.as_str().into(), encoder.encode(name, message)))
        .collect();
    let catalogs = [
        (Kind::Cluster, clusters),
        (Kind::Endpoint, endpoints),
        (Kind::Listener, listeners),
        (Kind::Route, routes),
        (Kind::Secret, secrets),
        (Kind::Extension, extensions),
    ];
    let catalogs = catalogs
        .into_iter()
        .map(|(kind, catalog)| (kind, encoder.share_catalog(catalog)))
        .collect();
    (catalogs, resources.conflicts)
}

/// The namespace and service account in the certificate must be those the node claims; an account it
/// does not claim is taken from the certificate.
fn check_identity(peer: &SpiffeId, node: &mut Node) -> Result<(), Status> {
    let (Some(namespace), Some(account)) = (peer.namespace(), peer.service_account()) else {
        return Err(Status::permission_denied(format!(
            "{peer} is not the identity of a workload"
        )));
    };
    if namespace != node.namespace {
        return Err(Status::permission_denied(format!(
            "{peer} may not act for node {:?}: it claims namespace {:?}",
            node.id, node.namespace
        )));
    }
    node.verified = true;
    match &node.service_account {
        Some(claimed) if claimed != account => Err(Status::permission_denied(format!(
            "{peer} may not act for node {:?}: it claims service account {claimed:?}",
            node.id
        ))),
        Some(_) => Ok(()),
        None => {
            node.service_account = Some(account.to_owned());
            Ok(())
        }
    }
}

/// Counts a connected client for as long as it lives.
#[derive(Debug)]
struct Connected(Arc<Metrics>);

impl Connected {
    fn new(metrics: Arc<Metrics>) -> Self {
        metrics.connected();
        Self(metrics)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.disconnected();
    }
}

/// The gRPC face of [`Discovery`] on one port.
#[derive(Clone, Debug)]
pub struct Ads {
    discovery: Arc<Discovery>,
    trust: Trust,
}

impl Ads {
    fn accept<A, R>(
        &self,
        request: Request<Streaming<A>>,
    ) -> Result<Response<AnswerStream<R>>, Status>
    where
        A: Ask,
        R: From<session::Response> + Send + 'static,
    {
        let discovery = &self.discovery;
        let peer = match self.trust {
            Trust::Network => None,
            Trust::Certificate(identity) => {
                Some(identity(request.extensions()).ok_or_else(|| {
                    discovery.refuse(
                        "identity",
                        Status::unauthenticated("present a certificate of the mesh"),
                    )
                })?)
            }
        };
        if discovery.drain.is_cancelled() {
            return Err(discovery.refuse(
                "draining",
                Status::unavailable("pilot is stopping; connect again"),
            ));
        }
        let permit = discovery.streams.clone().try_acquire_owned().map_err(|_| {
            discovery.refuse(
                "full",
                Status::resource_exhausted("too many streams; try another pilot"),
            )
        })?;
        let (answers, stream) = mpsc::channel(SEND_QUEUE);
        let task = discovery
            .clone()
            .converse(request.into_inner(), answers, peer);
        discovery.tasks.spawn(async move {
            task.await;
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type AnswerStream<R> = Pin<Box<dyn Stream<Item = Result<R, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = AnswerStream<xds::DiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<xds::DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.accept(request)
    }

    type DeltaAggregatedResourcesStream = AnswerStream<xds::DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<xds::DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.accept(request)
    }
}
