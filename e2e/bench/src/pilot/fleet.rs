//! Sidecars as Pilot sees them: each has a connection and a delta stream of its own, asks as Envoy does (clusters,
//! then their endpoints; listeners, then their routes), keeps name and version of what it got, and acknowledges all.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lateen_protocols::envoy::{
    envoy::{
        config::{
            core::v3::Node,
            listener::v3::{Listener, filter::ConfigType},
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager, http_connection_manager::RouteSpecifier,
        },
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::protobuf::{Struct, Value, value},
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
const KINDS: [&str; 4] = [CLUSTER, ENDPOINT, LISTENER, ROUTE];

/// Between two tries to connect.
const RETRY: Duration = Duration::from_millis(50);

/// Requests that a client has ready for its connection.
const REQUESTS: usize = 64;

/// Largest response believed: all clusters come in one.
const RESPONSE_LIMIT: usize = 256 << 20;

/// One sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Sidecar {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) address: String,
    pub(crate) app: String,
}

/// What a sidecar has done.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) client: usize,
    pub(crate) at: Instant,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// All four types have been answered and acknowledged on its present stream.
    Ready,
    /// A later response has been acknowledged.
    Acknowledged {
        resources: usize,
        bytes: usize,
        /// What was waited for is in it: see [`Fleet::expect`].
        expected: bool,
    },
}

/// All sidecars.
#[derive(Debug)]
pub(crate) struct Fleet {
    runtime: tokio::runtime::Runtime,
    shared: Arc<Shared>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    pub(crate) clients: usize,
}

#[derive(Debug)]
struct Shared {
    pilot: SocketAddr,
    /// Suffix of the name of the resource that is waited for.
    expected: Mutex<String>,
    /// One copy of each name and version: a thousand clients hold the same.
    texts: Mutex<HashSet<Arc<str>>>,
}

impl Shared {
    fn text(&self, text: &str) -> Arc<str> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = texts.get(text) {
            return known.clone();
        }
        let fresh: Arc<str> = text.into();
        texts.insert(fresh.clone());
        fresh
    }
}

impl Fleet {
    /// Nobody yet, for a Pilot at this address.
    pub(crate) fn new(pilot: SocketAddr) -> anyhow::Result<Fleet> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (sender, events) = mpsc::channel(1 << 16);
        Ok(Fleet {
            runtime,
            shared: Arc::new(Shared {
                pilot,
                expected: Mutex::default(),
                texts: Mutex::default(),
            }),
            events,
            sender,
            clients: 0,
        })
    }

    /// One more sidecar; it connects as soon as the fleet is waited on, and again whenever its stream ends.
    pub(crate) fn join(&mut self, sidecar: Sidecar) {
        let client = Client {
            number: self.clients,
            sidecar,
            held: BTreeMap::new(),
            shared: self.shared.clone(),
            events: self.sender.clone(),
        };
        self.clients += 1;
        self.runtime.spawn(client.run());
    }

    /// From now on a response with a resource whose name ends so is the expected one; nothing is if it is empty.
    pub(crate) fn expect(&self, suffix: &str) {
        let expected = self.shared.expected.lock();
        suffix.clone_into(&mut expected.unwrap_or_else(PoisonError::into_inner));
    }

    /// Runs until `wanted` sidecars have had an event that `matches`, or the limit; when each was.
    pub(crate) fn wait(
        &mut self,
        wanted: usize,
        limit: Duration,
        matches: impl Fn(&What) -> bool,
    ) -> anyhow::Result<HashMap<usize, Instant>> {
        let mut done = HashMap::new();
        let all = async {
            while done.len() < wanted {
                let event = self.events.recv().await.context("the fleet has ended")?;
                if matches(&event.what) {
                    done.entry(event.client).or_insert(event.at);
                }
            }
            anyhow::Ok(())
        };
        // The limit's timer is the runtime's own.
        let waited = self
            .runtime
            .block_on(async { tokio::time::timeout(limit, all).await });
        match waited {
            Ok(result) => result?,
            Err(_) => anyhow::bail!(
                "after {limit:?} {} of {wanted} sidecars were done",
                done.len()
            ),
        }
        Ok(done)
    }

    /// Runs for that long; all that happened.
    pub(crate) fn run_for(&mut self, time: Duration) -> Vec<Event> {
        let mut all = Vec::new();
        self.runtime.block_on(async {
            let end = tokio::time::Instant::now() + time;
            while let Ok(Some(event)) = tokio::time::timeout_at(end, self.events.recv()).await {
                all.push(event);
            }
        });
        all
    }
}

#[derive(Debug)]
struct Client {
    number: usize,
    sidecar: Sidecar,
    /// Versions by name, by type.
    held: BTreeMap<&'static str, HashMap<Arc<str>, Arc<str>>>,
    shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
}

impl Client {
    async fn run(mut self) {
        while !self.events.is_closed() {
            // Pilot may be down, which is what a cold start begins with.
            self.converse().await.ok();
            tokio::time::sleep(RETRY).await;
        }
    }

    /// One stream.
    async fn converse(&mut self) -> anyhow::Result<()> {
        let address = format!("http://{}", self.shared.pilot);
        let mut ads = AggregatedDiscoveryServiceClient::connect(address)
            .await?
            .max_decoding_message_size(RESPONSE_LIMIT);
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let mut node = Some(self.node());
        // Who comes again asks for all at once, and says what it has.
        for kind in KINDS {
            let held = self.held.get(kind);
            let whole = kind == CLUSTER || kind == LISTENER;
            if !whole && held.is_none() {
                continue;
            }
            let names = || held.into_iter().flatten();
            let subscribe = if whole {
                Vec::new()
            } else {
                names().map(|(name, _)| name.to_string()).collect()
            };
            requests
                .send(DeltaDiscoveryRequest {
                    node: node.take(),
                    type_url: kind.to_owned(),
                    resource_names_subscribe: subscribe,
                    initial_resource_versions: names()
                        .map(|(name, version)| (name.to_string(), version.to_string()))
                        .collect(),
                    ..Default::default()
                })
                .await?;
        }
        let mut asked: HashMap<&'static str, HashSet<Arc<str>>> = HashMap::new();
        for kind in [ENDPOINT, ROUTE] {
            let names = self.held.get(kind).into_iter().flatten();
            asked.insert(kind, names.map(|(name, _)| name.clone()).collect());
        }
        let mut answered = HashSet::new();
        let mut responses = ads
            .delta_aggregated_resources(ReceiverStream::new(outgoing))
            .await?
            .into_inner();
        while let Some(response) = responses.message().await? {
            let kind = KINDS
                .into_iter()
                .find(|kind| *kind == response.type_url)
                .with_context(|| format!("nobody asked for {}", response.type_url))?;
            let (next, names) = self.take(kind, &response)?;
            requests
                .send(DeltaDiscoveryRequest {
                    type_url: kind.to_owned(),
                    response_nonce: response.nonce.clone(),
                    ..Default::default()
                })
                .await?;
            if let Some(next) = next {
                let asked = asked.entry(next).or_default();
                let new: Vec<_> = names
                    .into_iter()
                    .filter(|name| asked.insert(name.clone()))
                    .collect();
                if !new.is_empty() {
                    requests
                        .send(DeltaDiscoveryRequest {
                            type_url: next.to_owned(),
                            resource_names_subscribe: new
                                .iter()
                                .map(|name| name.to_string())
                                .collect(),
                            ..Default::default()
                        })
                        .await?;
                }
            }
            let what = if answered.len() == KINDS.len() {
                What::Acknowledged {
                    resources: response.resources.len() + response.removed_resources.len(),
                    bytes: response.encoded_len(),
                    expected: self.is_expected(&response),
                }
            } else {
                answered.insert(kind);
                if answered.len() < KINDS.len() {
                    continue;
                }
                What::Ready
            };
            self.events
                .send(Event {
                    client: self.number,
                    at: Instant::now(),
                    what,
                })
                .await?;
        }
        Ok(())
    }

    /// Keeps what came; the type to ask for next, and its names.
    fn take(
        &mut self,
        kind: &'static str,
        response: &DeltaDiscoveryResponse,
    ) -> anyhow::Result<(Option<&'static str>, Vec<Arc<str>>)> {
        let shared = self.shared.clone();
        let held = self.held.entry(kind).or_default();
        for name in &response.removed_resources {
            held.remove(name.as_str());
        }
        let mut names = Vec::new();
        for resource in &response.resources {
            let name = shared.text(&resource.name);
            held.insert(name.clone(), shared.text(&resource.version));
            match kind {
                // All of the scene's services have discovered endpoints.
                CLUSTER if name.starts_with("outbound|") => names.push(name),
                LISTENER => {
                    let body = resource
                        .resource
                        .as_ref()
                        .context("a resource without body")?;
                    let listener = Listener::decode(body.value.as_slice())?;
                    names.extend(routes(&listener)?.iter().map(|route| shared.text(route)));
                }
                _ => {}
            }
        }
        Ok(match kind {
            CLUSTER => (Some(ENDPOINT), names),
            LISTENER => (Some(ROUTE), names),
            _ => (None, names),
        })
    }

    fn is_expected(&self, response: &DeltaDiscoveryResponse) -> bool {
        let expected = self.shared.expected.lock();
        let expected = expected.unwrap_or_else(PoisonError::into_inner);
        !expected.is_empty()
            && response
                .resources
                .iter()
                .any(|resource| resource.name.ends_with(expected.as_str()))
    }

    fn node(&self) -> Node {
        let Sidecar {
            name,
            namespace,
            address,
            app,
        } = &self.sidecar;
        let text = |text: &str| Value {
            kind: Some(value::Kind::StringValue(text.to_owned())),
        };
        let labels = Struct {
            fields: [("app".to_owned(), text(app))].into(),
        };
        let fields = [
            ("NAMESPACE", text(namespace)),
            ("SERVICE_ACCOUNT", text("default")),
            (
                "LABELS",
                Value {
                    kind: Some(value::Kind::StructValue(labels)),
                },
            ),
        ];
        Node {
            id: format!("sidecar~{address}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            cluster: format!("{app}.{namespace}"),
            metadata: Some(Struct {
                fields: fields.map(|(key, value)| (key.to_owned(), value)).into(),
            }),
            ..Default::default()
        }
    }
}

/// Route configurations that a listener asks for by name.
fn routes(listener: &Listener) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    let chains = listener
        .filter_chains
        .iter()
        .chain(&listener.default_filter_chain);
    for filter in chains.flat_map(|chain| &chain.filters) {
        let Some(ConfigType::TypedConfig(any)) = &filter.config_type else {
            continue;
        };
        if !any.type_url.ends_with(".HttpConnectionManager") {
            continue;
        }
        let manager = HttpConnectionManager::decode(any.value.as_slice())?;
        if let Some(RouteSpecifier::Rds(rds)) = manager.route_specifier {
            names.push(rds.route_config_name);
        }
    }
    Ok(names)
}
