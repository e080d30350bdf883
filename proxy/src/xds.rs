//! The client of the control plane: streams that ask for what listeners, clusters and routes want,
//! and tell the server what was accepted and what was not.
//!
//! [`protocol`] knows the rules of both variants and does no I/O; [`client`] keeps one stream alive;
//! [`target`] connects. What resources mean is decided behind [`Sink`].

pub mod protocol;
pub mod client;
pub mod target;
pub mod file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
};

use envoy_types::pb::google::protobuf::Any;
use tokio::sync::watch;

use crate::secret::Source;

/// Kinds of resources, in the order in which they are asked for and applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// CDS
    Cluster,
    /// EDS
    Endpoint,
    /// LDS
    Listener,
    /// RDS
    Route,
    /// SDS
    Secret,
}

impl Kind {
    /// All, in order.
    pub const ALL: [Kind; 5] = [
        Kind::Cluster,
        Kind::Endpoint,
        Kind::Listener,
        Kind::Route,
        Kind::Secret,
    ];

    /// What identifies the kind on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Kind::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Kind::Endpoint => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Kind::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Kind::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Kind::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The kind of a type URL.
    pub fn from_type_url(url: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// Whether one asks for all there are, and an answer is the whole truth.
    pub const fn is_wildcard(self) -> bool {
        matches!(self, Kind::Cluster | Kind::Listener)
    }
}

/// What is wanted from whom right now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Whether clusters are to be asked for.
    pub clusters: bool,
    /// Whether listeners are to be asked for (after the first clusters are warm).
    pub listeners: bool,
    /// EDS names that no file gives.
    pub endpoints: BTreeSet<String>,
    /// RDS names that no file gives.
    pub routes: BTreeSet<String>,
    /// EDS and RDS names by the file that gives them.
    pub files: BTreeMap<(Kind, String), BTreeSet<String>>,
    /// SDS names by source.
    pub secrets: BTreeMap<Source, BTreeSet<String>>,
}

impl Wanted {
    /// Whether a name of EDS or RDS is wanted, from a stream (`asked`) or a file.
    pub(crate) fn names(&self, kind: Kind, asked: &BTreeSet<String>, name: &str) -> bool {
        let mut files = self.files.iter().filter(|((of, _), _)| *of == kind);
        asked.contains(name) || files.any(|(_, names)| names.contains(name))
    }
}

/// One resource as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    /// Its name, where the protocol tells; else it is inside.
    pub name: Option<String>,
    /// Its own version (delta), or that of the response.
    pub version: String,
    /// The resource.
    pub body: Any,
}

/// One response, whichever variant it came by.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// Of what.
    pub kind: Kind,
    /// From whom (it matters for secrets only).
    pub source: Source,
    /// Version of the whole.
    pub version: String,
    /// New and changed ones.
    pub resources: Vec<Resource>,
    /// Names of those that are gone.
    pub removed: Vec<String>,
    /// Whether what is not mentioned is gone too.
    pub complete: bool,
}

/// What became of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Names and versions of the resources in use.
    pub accepted: Vec<(String, String)>,
    /// Why the rest is not: the reason of the NACK.
    pub error: Option<String>,
}

/// Who decides what resources mean.
pub trait Sink: Debug + Send + Sync {
    /// Applies an update. Good resources are used; a bad one leaves its predecessor in place.
    fn apply(&self, update: Update) -> Outcome;

    /// What to ask for; changes when configuration does.
    fn wanted(&self) -> watch::Receiver<Wanted>;

    /// A stream came up or went down.
    fn connected(&self, source: &Source, connected: bool);
}
