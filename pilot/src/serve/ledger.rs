//! Who is connected and what each has acknowledged: the exact answer to "is it live yet".
//!
//! Each stream's task owns its session behind a lock held only between awaits; the ledger reads the
//! same sessions, so the two cannot disagree.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::session::{Mode, Rejection, Session, Step};
use crate::encode::Kind;
use crate::model::{Node, Role};

/// How the node ids of Mixers begin.
const MIXER: &str = "mixer~";
/// What Mixers read, among other things.
const RULE: &str = "config.istio.io/v1alpha2/rule";

/// One connected client.
#[derive(Debug)]
pub struct Connection {
    /// Number of the stream, never used twice.
    pub stream: u64,
    /// What the client says it is.
    pub node: Arc<Node>,
    /// What its certificate says, on the authenticated port.
    pub peer: Option<String>,
    connected_at: Instant,
    session: Mutex<Session>,
    noticed_live: AtomicU64,
}

impl Connection {
    pub(crate) fn new(
        stream: u64,
        node: Arc<Node>,
        peer: Option<String>,
        session: Session,
    ) -> Self {
        Self {
            stream,
            node,
            peer,
            connected_at: Instant::now(),
            session: Mutex::new(session),
            noticed_live: AtomicU64::new(0),
        }
    }

    /// The session, for as short as possible.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What had to be left out for it, and why.
    #[must_use]
    pub fn conflicts(&self) -> Vec<String> {
        self.session().conflicts().to_vec()
    }

    /// Notes that a generation is live. If that is news, the generation that was live before.
    pub(crate) fn note_live(&self, live: u64) -> Option<u64> {
        let before = self.noticed_live.swap(live, Ordering::Relaxed);
        (before != live).then_some(before)
    }
}

/// All connected clients. Streams enter and leave by themselves.
#[derive(Debug)]
pub struct Ledger {
    connections: Mutex<BTreeMap<u64, Arc<Connection>>>,
    changed: watch::Sender<u64>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            connections: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

/// Takes a client off the ledger when its stream ends, however it ends.
#[derive(Debug)]
pub(crate) struct Entry {
    ledger: Arc<Ledger>,
    stream: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ledger.lock().remove(&self.stream);
        self.ledger.touch();
    }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Connection>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(self: &Arc<Self>, connection: Arc<Connection>) -> Entry {
        let stream = connection.stream;
        self.lock().insert(stream, connection);
        self.touch();
        Entry {
            ledger: self.clone(),
            stream,
        }
    }

    /// Tells those who wait that an acknowledgement or a connection came or went.
    pub(crate) fn touch(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Is told of every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Everybody who is connected, in order of connecting.
    #[must_use]
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.lock().values().cloned().collect()
    }

    /// The clients with that node id.
    #[must_use]
    pub fn find(&self, node_id: &str) -> Vec<Arc<Connection>> {
        self.lock()
            .values()
            .filter(|connection| connection.node.id == node_id)
            .cloned()
            .collect()
    }

    /// The newest generation of which every connected client has acknowledged everything it asks for;
    /// `current` when nobody is connected.
    #[must_use]
    pub fn live(&self, current: u64) -> u64 {
        self.connections()
            .iter()
            .map(|connection| connection.session().live())
            .min()
            .unwrap_or(current)
    }

    /// Whether a Mixer reads rules, by its certificate one of namespace `root`, and all who read configuration have
    /// acknowledged everything of `generation` and refuse nothing.
    #[must_use]
    pub fn rules_are_confirmed(&self, generation: u64, root: &str) -> bool {
        let connections = self.connections();
        let mut readers = connections
            .iter()
            .filter(|connection| connection.node.role == Role::Reader);
        let mut has_mixer = false;
        readers.all(|connection| {
            let session = connection.session();
            has_mixer |= connection.peer.is_some()
                && connection.node.namespace == root
                && connection.node.id.starts_with(MIXER)
                && session
                    .kinds()
                    .any(|(kind, _)| *kind == Kind::Generic(RULE.into()));
            session.live() >= generation
                && session
                    .kinds()
                    .all(|(_, status)| status.rejection().is_none())
        }) && has_mixer
    }

    /// Refusals that stand, in words.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        let mut all = Vec::new();
        for connection in self.connections() {
            for (kind, status) in connection.session().kinds() {
                if let Some(rejection) = status.rejection() {
                    all.push(format!(
                        "{} refuses {} ({}): {}",
                        connection.node.id,
                        kind.short(),
                        rejection.resources.join(", "),
                        rejection.message,
                    ));
                }
            }
        }
        all
    }

    /// `/debug/syncz`.
    #[must_use]
    pub fn syncz(&self, resources: bool) -> Vec<ProxyStatus> {
        self.connections()
            .iter()
            .map(|connection| ProxyStatus::of(connection, resources))
            .collect()
    }
}

/// One client in `/debug/syncz`.
#[derive(Clone, Debug, Serialize)]
pub struct ProxyStatus {
    /// Its node id.
    pub proxy: String,
    /// Whether it reads configuration objects only: Mixer, tools.
    pub reader: bool,
    stream: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    protocol: Mode,
    connected_seconds: u64,
    /// Generation being pushed, or pushed last.
    pub generation: u64,
    /// Newest generation acknowledged whole.
    pub live: u64,
    step: Step,
    types: BTreeMap<String, TypeStatus>,
}

/// One type of one client in `/debug/syncz`.
#[derive(Clone, Debug, Serialize)]
struct TypeStatus {
    sent: String,
    acked: String,
    /// `SYNCED`, `STALE` (sent, not answered) or `NACKED`.
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nacked: Option<Rejection>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unacked: Vec<String>,
    /// Referred to by what it holds, never asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unclaimed: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_milliseconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resources: Option<BTreeMap<String, String>>,
}

impl ProxyStatus {
    fn of(connection: &Connection, resources: bool) -> Self {
        let session = connection.session();
        let types = session
            .kinds()
            .map(|(kind, status)| {
                let nacked = status.rejection();
                let waiting = status
                    .in_flight()
                    .map(|(_, sent_at)| sent_at.elapsed())
                    .max();
                let state = match (&nacked, waiting) {
                    (Some(_), _) => "NACKED",
                    (None, Some(_)) => "STALE",
                    (None, None) => "SYNCED",
                };
                let status = TypeStatus {
                    sent: status.sent().to_owned(),
                    acked: status.acked().to_owned(),
                    status: state,
                    error: nacked.as_ref().map(|rejection| rejection.message.clone()),
                    nacked,
                    unacked: status.unacked().iter().map(ToString::to_string).collect(),
                    unclaimed: status.unclaimed().iter().map(ToString::to_string).collect(),
                    waiting_milliseconds: waiting
                        .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
                    resources: resources.then(|| {
                        status
                            .resources()
                            .map(|(name, version)| (name.to_owned(), version.to_owned()))
                            .collect()
                    }),
                };
                (column(kind), status)
            })
            .collect();
        Self {
            proxy: connection.node.id.clone(),
            reader: connection.node.role == Role::Reader,
            stream: connection.stream,
            identity: connection.peer.clone(),
            protocol: session.mode(),
            connected_seconds: connection.connected_at.elapsed().as_secs(),
            generation: session.generation(),
            live: session.live(),
            step: session.step(),
            types,
        }
    }
}

/// `CDS`, `EDS`, ...; a type URL as it is.
fn column(kind: &Kind) -> String {
    match kind {
        Kind::Generic(url) => url.to_string(),
        other => other.short().to_ascii_uppercase(),
    }
}

/// What one client was sent, by type, for `/debug/config_dump`.
#[must_use]
pub fn dump(connection: &Connection) -> BTreeMap<Kind, Vec<Arc<crate::encode::Encoded>>> {
    let session = connection.session();
    Kind::XDS
        .into_iter()
        .map(|kind| {
            let held = session.held(&kind).cloned().collect();
            (kind, held)
        })
        .collect()
}
