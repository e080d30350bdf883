//! The rules of xDS, without I/O: which request follows from a response or from a change of what is
//! wanted. A [`Session`] outlives streams, so that a reconnect tells the server what we have.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            Resource as Wrapped,
        },
    },
    google::rpc::Status,
};
use prost::Message;

use super::{Kind, Outcome, Resource, Sink, Update, Wanted};
use crate::secret::Source;

/// `INVALID_ARGUMENT`, as Envoy NACKs.
const NACK_CODE: i32 = 3;
/// A NACK's reason travels in a header-sized message and into the server's logs.
const MAX_REASON_BYTES: usize = 4096;

/// Names to ask for; an empty set is "everything" for the wildcard kinds.
fn names(wanted: &Wanted, kind: Kind, source: &Source) -> Option<BTreeSet<String>> {
    let set = match kind {
        Kind::Cluster => return wanted.clusters.then(BTreeSet::new),
        Kind::Listener => return wanted.listeners.then(BTreeSet::new),
        Kind::Endpoint => wanted.endpoints.clone(),
        Kind::Route => wanted.routes.clone(),
        Kind::Secret => wanted.secrets.get(source).cloned().unwrap_or_default(),
    };
    Some(set)
}

fn reason(error: &str) -> Status {
    let mut end = error.len().min(MAX_REASON_BYTES);
    while !error.is_char_boundary(end) {
        end -= 1;
    }
    Status {
        code: NACK_CODE,
        message: error[..end].into(),
        details: Vec::new(),
    }
}

/// What one stream asks for, and what we already have of it.
#[derive(Debug)]
pub struct Session {
    kinds: Vec<Kind>,
    source: Source,
    node: Node,
    node_sent: bool,
    states: BTreeMap<Kind, State>,
}

#[derive(Debug, Default)]
struct State {
    /// What this stream has asked for; `None` before the first request.
    subscribed: Option<BTreeSet<String>>,
    nonce: String,
    /// Last accepted version (state of the world).
    version: String,
    /// Versions of what we have (delta).
    versions: HashMap<String, String>,
}

impl Session {
    /// A session of these kinds.
    pub fn new(kinds: &[Kind], source: Source, node: Node) -> Session {
        Session {
            kinds: kinds.to_vec(),
            source,
            node,
            node_sent: false,
            states: BTreeMap::new(),
        }
    }

    /// Forgets what belonged to the last stream; keeps what we have.
    pub fn reconnect(&mut self) {
        self.node_sent = false;
        for state in self.states.values_mut() {
            state.subscribed = None;
            state.nonce.clear();
        }
    }

    fn node(&mut self) -> Option<Node> {
        (!std::mem::replace(&mut self.node_sent, true)).then(|| self.node.clone())
    }

    /// Requests that bring the server up to date with what is wanted (state of the world).
    pub fn sync(&mut self, wanted: &Wanted) -> Vec<DiscoveryRequest> {
        let mut requests = Vec::new();
        for kind in self.kinds.clone() {
            let Some(names) = names(wanted, kind, &self.source) else {
                continue;
            };
            let state = self.states.entry(kind).or_default();
            let first = state.subscribed.is_none();
            let idle = first && names.is_empty() && !kind.is_wildcard();
            if idle || state.subscribed.as_ref() == Some(&names) {
                continue;
            }
            state.subscribed = Some(names);
            requests.push(self.request(kind, None));
        }
        requests
    }

    fn request(&mut self, kind: Kind, error: Option<&str>) -> DiscoveryRequest {
        let node = self.node();
        let state = self.states.entry(kind).or_default();
        DiscoveryRequest {
            version_info: state.version.clone(),
            node,
            resource_names: state.subscribed.iter().flatten().cloned().collect(),
            type_url: kind.type_url().into(),
            response_nonce: state.nonce.clone(),
            error_detail: error.map(reason),
            ..DiscoveryRequest::default()
        }
    }

    /// Applies a response and gives its ACK or NACK (state of the world). `None` for a type that
    /// was not asked for, which is not ours to judge.
    pub fn respond(
        &mut self,
        response: DiscoveryResponse,
        sink: &dyn Sink,
    ) -> Option<DiscoveryRequest> {
        let kind = self.kind(&response.type_url)?;
        let resources = response
            .resources
            .into_iter()
            .map(|body| unwrap(body, &response.version_info));
        let outcome = sink.apply(Update {
            kind,
            source: self.source.clone(),
            version: response.version_info.clone(),
            resources: resources.collect(),
            removed: Vec::new(),
            complete: kind.is_wildcard(),
        });
        let state = self.states.entry(kind).or_default();
        state.nonce = response.nonce;
        if outcome.error.is_none() {
            state.version = response.version_info;
        }
        Some(self.request(kind, outcome.error.as_deref()))
    }

    /// Requests that bring the server up to date with what is wanted (delta).
    pub fn sync_delta(&mut self, wanted: &Wanted) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for kind in self.kinds.clone() {
            let Some(names) = names(wanted, kind, &self.source) else {
                continue;
            };
            let state = self.states.entry(kind).or_default();
            let first = state.subscribed.is_none();
            let old = state.subscribed.clone().unwrap_or_default();
            if (first && names.is_empty() && !kind.is_wildcard()) || (!first && names == old) {
                continue;
            }
            if !kind.is_wildcard() {
                // What nobody wants any more is dropped by its users; having it is no longer true.
                state.versions.retain(|name, _| names.contains(name));
            }
            let request = DeltaDiscoveryRequest {
                type_url: kind.type_url().into(),
                resource_names_subscribe: names.difference(&old).cloned().collect(),
                resource_names_unsubscribe: old.difference(&names).cloned().collect(),
                initial_resource_versions: if first {
                    state.versions.clone()
                } else {
                    HashMap::new()
                },
                ..DeltaDiscoveryRequest::default()
            };
            state.subscribed = Some(names);
            let node = self.node();
            requests.push(DeltaDiscoveryRequest { node, ..request });
        }
        requests
    }

    /// Applies a response and gives its ACK or NACK (delta). `None` as for [`Session::respond`].
    pub fn respond_delta(
        &mut self,
        response: DeltaDiscoveryResponse,
        sink: &dyn Sink,
    ) -> Option<DeltaDiscoveryRequest> {
        let kind = self.kind(&response.type_url)?;
        let mut removed = response.removed_resources;
        let mut resources = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            match resource.resource {
                Some(body) => resources.push(Resource {
                    name: Some(resource.name).filter(|name| !name.is_empty()),
                    version: resource.version,
                    body,
                }),
                // Without a body it is the removal of a name (or a TTL heartbeat, which we do not ask for).
                None => removed.push(resource.name),
            }
        }
        let Outcome { accepted, error } = sink.apply(Update {
            kind,
            source: self.source.clone(),
            version: response.system_version_info,
            resources,
            removed: removed.clone(),
            complete: false,
        });
        let state = self.states.entry(kind).or_default();
        state.nonce = response.nonce;
        for name in &removed {
            state.versions.remove(name);
        }
        state.versions.extend(accepted);
        let nonce = state.nonce.clone();
        Some(DeltaDiscoveryRequest {
            node: self.node(),
            type_url: kind.type_url().into(),
            response_nonce: nonce,
            error_detail: error.as_deref().map(reason),
            ..DeltaDiscoveryRequest::default()
        })
    }

    fn kind(&self, type_url: &str) -> Option<Kind> {
        let kind = Kind::from_type_url(type_url).filter(|kind| self.kinds.contains(kind));
        if kind.is_none() {
            tracing::warn!(
                type_url,
                "ignoring resources of a type that was not asked for"
            );
        }
        kind
    }
}

/// State-of-the-world resources may come wrapped, with a name of their own.
fn unwrap(body: envoy_types::pb::google::protobuf::Any, version: &str) -> Resource {
    const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";
    if body.type_url == WRAPPER
        && let Ok(Wrapped {
            name,
            resource: Some(inner),
            ..
        }) = Wrapped::decode(body.value.as_slice())
    {
        return Resource {
            name: Some(name).filter(|name| !name.is_empty()),
            version: version.into(),
            body: inner,
        };
    }
    Resource {
        name: None,
        version: version.into(),
        body,
    }
}
