//! Updates from Pilot: generic resources over delta ADS, `config.istio.io/v1alpha2/KIND`,
//! `rbac.istio.io/v1alpha1/KIND` and the workload view `lateen.io/v1/Workload`.
//!
//! A response is acknowledged when what it brought is in force, and refused, with the reasons, when objects
//! in it are; so "acknowledged" means "enforced" to whoever asks Pilot. What was received stays in force while
//! Pilot is away; after a reconnect only differences are sent.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use lateen_adapter::workload::{Container, Workload};
use lateen_config::{ORIGIN, Origin};
use lateen_protocols::{
    envoy::{
        envoy::{
            config::core::v3::Node,
            service::discovery::v3::{
                DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
                aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
            },
        },
        google::rpc::Status as WireStatus,
    },
    istio::mcp::v1alpha1::Resource,
};
use prost::Message as _;
use serde::Deserialize;
use serde_json::{Map, Number, Value as Json};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{
    Update,
    object::{Key, Problem, Source},
};
use crate::adapter::rbac;

/// Prefix of the type URLs of Mixer's kinds.
const GROUP: &str = "config.istio.io/v1alpha2/";
/// Prefix of the type URLs of the rbac adapter's policies.
const POLICY_GROUP: &str = "rbac.istio.io/v1alpha1/";
/// Type URL of the workload view.
const WORKLOAD: &str = "lateen.io/v1/Workload";
/// Largest response that is read.
const MAX_RESPONSE_BYTES: usize = 64 << 20;
/// Objects and workloads that are kept.
const MAX_RESOURCES: usize = 500_000;
/// Responses of several kinds belong together: a rule comes before or after its handler.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Pilot is asked again after a failure, at first soon, then more seldom.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// The first snapshot needs a response to every kind; what is missing is told this often.
const TELL_MISSING: Duration = Duration::from_secs(5);
/// Responses taken in before rules are built, even if more are coming.
const MAX_BATCH: usize = 256;

/// A subscription to Pilot.
#[derive(Debug)]
pub struct Ads {
    /// How to reach it.
    pub channel: Channel,
    /// What this Mixer calls itself.
    pub node: Node,
    /// The kinds to ask for.
    pub kinds: Vec<String>,
}

/// What Pilot has told so far, over all connections.
#[derive(Debug, Default)]
struct State {
    /// A kind is here once it has been answered.
    by_type: HashMap<String, BTreeMap<String, Kept>>,
    count: usize,
    /// A snapshot has been made of it: with less than every kind none is, for a rule that is missing refuses nobody.
    is_told: bool,
}

#[derive(Debug)]
struct Kept {
    version: String,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Object(Source),
    Workload(Box<Workload>),
    Unreadable(Problem),
}

/// A response that has not been answered.
#[derive(Debug)]
struct Unanswered {
    type_url: String,
    nonce: String,
    objects: Vec<String>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("Pilot closed the stream")]
    Closed,
    #[error("Pilot sent more than {MAX_RESOURCES} resources")]
    TooMany,
    /// Nobody wants updates any more.
    #[error("stopped")]
    Stopped,
}

impl Ads {
    /// Keeps a stream to Pilot and sends what it tells, until the receiver is gone.
    pub async fn run(self, updates: mpsc::Sender<Update>) {
        let mut state = State::default();
        let mut pause = RETRY.0;
        while !updates.is_closed() {
            let begun = Instant::now();
            match self.stream(&mut state, &updates).await {
                Err(StreamEnd::Stopped) | Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%error, ?pause, "no configuration from Pilot; what was received stays");
                }
            }
            if begun.elapsed() > RETRY.1 {
                pause = RETRY.0;
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    fn type_urls(&self) -> Vec<String> {
        let kinds = self.kinds.iter().map(|kind| format!("{GROUP}{kind}"));
        let policies = rbac::KINDS.iter().map(|k| format!("{POLICY_GROUP}{k}"));
        let all = kinds.chain(policies).chain([WORKLOAD.to_owned()]);
        all.collect()
    }

    async fn stream(
        &self,
        state: &mut State,
        updates: &mpsc::Sender<Update>,
    ) -> Result<(), StreamEnd> {
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_RESPONSE_BYTES);
        let types = self.type_urls();
        let (requests, receiver) = mpsc::channel(types.len() + 64);
        let mut node = Some(self.node.clone());
        for type_url in &types {
            let known = state.by_type.get(type_url);
            let request = DeltaDiscoveryRequest {
                node: node.take(),
                type_url: type_url.clone(),
                resource_names_subscribe: vec!["*".to_owned()],
                initial_resource_versions: known
                    .into_iter()
                    .flatten()
                    .map(|(name, kept)| (name.clone(), kept.version.clone()))
                    .collect(),
                ..DeltaDiscoveryRequest::default()
            };
            requests
                .send(request)
                .await
                .map_err(|_| StreamEnd::Closed)?;
        }
        let mut responses = client
            .delta_aggregated_resources(ReceiverStream::new(receiver))
            .await?
            .into_inner();

        let mut unanswered = Vec::new();
        loop {
            let missing = |state: &State| -> Vec<&str> {
                let all = types
                    .iter()
                    .filter(|kind| !state.by_type.contains_key(*kind));
                all.map(String::as_str).collect()
            };
            // A stream may have ended between the last answer and the first snapshot: nothing new need come then.
            if state.is_told || !missing(state).is_empty() {
                let response = loop {
                    // Dropping the wait loses nothing: what has been received stays in the stream.
                    match timeout(TELL_MISSING, next(&mut responses)).await {
                        Ok(response) => break response?,
                        Err(_) if state.is_told => {}
                        Err(_) => {
                            let missing = missing(state).join(", ");
                            tracing::warn!(
                                missing,
                                "not ready: Pilot has not answered these kinds yet"
                            );
                        }
                    }
                };
                unanswered.push(state.take(response)?);
            }
            // As above.
            while let Ok(response) = timeout(DEBOUNCE, next(&mut responses)).await {
                unanswered.push(state.take(response?)?);
                if unanswered.len() > MAX_BATCH {
                    break;
                }
            }
            if !state.is_told && !missing(state).is_empty() {
                // Whether an object is refused depends on the others: all are answered once rules are built.
                continue;
            }
            let (reply, verdict) = oneshot::channel();
            let update = Update {
                reply: Some(reply),
                ..state.update()
            };
            updates.send(update).await.map_err(|_| StreamEnd::Stopped)?;
            let problems = verdict.await.map_err(|_| StreamEnd::Stopped)?;
            state.is_told = true;
            answer(&requests, std::mem::take(&mut unanswered), &problems).await?;
        }
    }
}

async fn next(
    responses: &mut Streaming<DeltaDiscoveryResponse>,
) -> Result<DeltaDiscoveryResponse, StreamEnd> {
    responses.message().await?.ok_or(StreamEnd::Closed)
}

async fn answer(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    unanswered: Vec<Unanswered>,
    problems: &[Problem],
) -> Result<(), StreamEnd> {
    for response in unanswered {
        let reasons: Vec<String> = problems
            .iter()
            .filter(|p| p.is_refused && response.objects.contains(&p.object))
            .map(ToString::to_string)
            .collect();
        let error_detail = (!reasons.is_empty()).then(|| WireStatus {
            code: tonic::Code::InvalidArgument.into(),
            message: reasons.join("\n"),
            details: Vec::new(),
        });
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        };
        requests
            .send(request)
            .await
            .map_err(|_| StreamEnd::Closed)?;
    }
    Ok(())
}

impl State {
    fn take(&mut self, response: DeltaDiscoveryResponse) -> Result<Unanswered, StreamEnd> {
        let DeltaDiscoveryResponse {
            type_url,
            nonce,
            resources,
            removed_resources,
            ..
        } = response;
        let mut objects = Vec::with_capacity(resources.len());
        let all = self.by_type.entry(type_url.clone()).or_default();
        for name in removed_resources {
            if all.remove(&name).is_some() {
                self.count -= 1;
            }
        }
        for resource in resources {
            let (name, version) = (resource.name.clone(), resource.version.clone());
            let what = read(&type_url, resource);
            objects.extend(match &what {
                What::Object(source) => Some(source.key.to_string()),
                What::Unreadable(problem) => Some(problem.object.clone()),
                What::Workload(_) => None,
            });
            if all.insert(name, Kept { version, what }).is_none() {
                self.count += 1;
            }
        }
        if self.count > MAX_RESOURCES {
            return Err(StreamEnd::TooMany);
        }
        Ok(Unanswered {
            type_url,
            nonce,
            objects,
        })
    }

    fn update(&self) -> Update {
        let mut update = Update::default();
        for kept in self.by_type.values().flat_map(BTreeMap::values) {
            match &kept.what {
                What::Object(source) if &*source.key.kind == "QuotaSpec" => {
                    let quotas = source.spec["rules"].as_array().into_iter().flatten();
                    let names = quotas
                        .flat_map(|rule| rule["quotas"].as_array().into_iter().flatten())
                        .filter_map(|quota| quota["quota"].as_str());
                    update
                        .wanted_quotas
                        .extend(names.map(|name| (name.to_owned(), source.clone())));
                }
                What::Object(source) => update.objects.push(source.clone()),
                What::Workload(workload) => update.workloads.push((**workload).clone()),
                What::Unreadable(problem) => update.problems.push(problem.clone()),
            }
        }
        update
    }
}

fn read(type_url: &str, resource: WireResource) -> What {
    let name = resource.name.clone();
    read_resource(type_url, resource).unwrap_or_else(|reason| {
        What::Unreadable(Problem {
            object: format!("{} {name}", type_url.rsplit('/').next().unwrap_or(type_url)),
            place: String::new(),
            field: String::new(),
            reason,
            is_refused: true,
            is_held: false,
        })
    })
}

fn read_resource(type_url: &str, resource: WireResource) -> Result<What, String> {
    let any = resource.resource.ok_or("it has no body")?;
    let body = Resource::decode(any.value.as_slice()).map_err(|e| e.to_string())?;
    let mut metadata = body.metadata.unwrap_or_default();
    // Where it is written is no part of what it says.
    let origin = metadata.annotations.remove(ORIGIN);
    let spec = match body.body {
        Some(any) => {
            let fields =
                prost_types::Struct::decode(any.value.as_slice()).map_err(|e| e.to_string())?;
            object(fields, 0)?
        }
        None => Json::Null,
    };
    if type_url == WORKLOAD {
        let raw = RawWorkload::deserialize(&spec).map_err(|e| e.to_string())?;
        return Ok(What::Workload(Box::new(raw.into())));
    }
    let kind = type_url
        .strip_prefix(GROUP)
        .or_else(|| type_url.strip_prefix(POLICY_GROUP))
        .ok_or("it is of a kind that was not asked for")?;
    let full = if metadata.name.is_empty() {
        &resource.name
    } else {
        &metadata.name
    };
    let (namespace, name) = full
        .split_once('/')
        .ok_or_else(|| format!("{full:?} is not NAMESPACE/NAME"))?;
    Ok(What::Object(Source {
        key: Key {
            kind: Arc::from(kind),
            namespace: Arc::from(namespace),
            name: Arc::from(name),
        },
        annotations: Arc::new(metadata.annotations.into_iter().collect()),
        spec: Arc::new(spec),
        origin: origin.and_then(|text| Origin::from_text(&text)),
    }))
}

/// Deepest nesting of a spec.
const MAX_DEPTH: usize = 64;

fn object(fields: prost_types::Struct, depth: usize) -> Result<Json, String> {
    let fields = fields.fields.into_iter();
    let entries = fields.map(|(key, value)| Ok((key, json(value, depth + 1)?)));
    Ok(Json::Object(
        entries.collect::<Result<Map<_, _>, String>>()?,
    ))
}

fn json(value: prost_types::Value, depth: usize) -> Result<Json, String> {
    use prost_types::value::Kind;
    if depth > MAX_DEPTH {
        return Err(format!("it is nested deeper than {MAX_DEPTH}"));
    }
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(b)) => Json::Bool(b),
        Some(Kind::StringValue(text)) => Json::String(text),
        // A Struct has no integers: what is whole was one in the YAML.
        #[allow(clippy::cast_possible_truncation, reason = "in range")]
        Some(Kind::NumberValue(n)) if n.fract() == 0.0 && n.abs() < 9e15 => Json::from(n as i64),
        Some(Kind::NumberValue(n)) => Number::from_f64(n).map_or(Json::Null, Json::Number),
        Some(Kind::ListValue(list)) => Json::Array(
            list.values
                .into_iter()
                .map(|v| json(v, depth + 1))
                .collect::<Result<_, _>>()?,
        ),
        Some(Kind::StructValue(fields)) => object(fields, depth)?,
    })
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RawWorkload {
    uid: String,
    ip: Option<String>,
    host_ip: Option<String>,
    name: String,
    namespace: String,
    labels: BTreeMap<String, String>,
    service_account: String,
    workload_name: String,
    workload_namespace: String,
    owner: String,
    services: Vec<String>,
    containers: Vec<RawContainer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawContainer {
    name: String,
    ports: Vec<u16>,
}

impl From<RawWorkload> for Workload {
    fn from(raw: RawWorkload) -> Self {
        Self {
            uid: raw.uid,
            ip: raw.ip.and_then(|ip| ip.parse().ok()),
            host_ip: raw.host_ip.and_then(|ip| ip.parse().ok()),
            name: raw.name,
            namespace: raw.namespace,
            labels: raw.labels,
            service_account: raw.service_account,
            workload_name: raw.workload_name,
            workload_namespace: raw.workload_namespace,
            owner: raw.owner,
            services: raw.services,
            containers: raw
                .containers
                .into_iter()
                .map(|c| Container {
                    name: c.name,
                    ports: c.ports,
                })
                .collect(),
        }
    }
}
