//! One proxy's conversation, without I/O: what it asks for, what it holds, what it acknowledged, and
//! what to send next. Owned by the stream's task; the ledger reads it.
//!
//! State of the world and delta are the same conversation here. They differ in how a request changes the
//! subscription ([`Session::sotw`], [`Session::delta`]) and in how a response is written (`wire.rs`).
//!
//! A new target reaches the proxy in three steps, so that no route ever points at a cluster that is not
//! there (make before break):
//! 1. [`Step::Make`]: new and changed clusters, and the endpoints they wait for; nothing is removed.
//! 2. [`Step::Switch`], once these are acknowledged: listeners and routes.
//! 3. [`Step::Break`], once those are acknowledged: clusters no longer wanted are removed.
//!
//! The next target is taken only when the last step is acknowledged: at most one push is under way.
//! Requests are answered at once, whatever the step.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use tokio::time::Instant;

use crate::encode::{Catalog, Encoded, Encoder, Kind, SetVersion};

/// How long a push waits for a client to ask for the endpoints of a new cluster, or the routes of a new
/// listener. Envoy asks within the same turn of its loop; a client that never does must not be stuck.
const CLAIM_WAIT: Duration = Duration::from_secs(5);

/// Most types one stream may watch: a proxy has six, Mixer one for each of its kinds.
const KIND_LIMIT: usize = 256;

/// Most names one stream may ask for, over all types.
const NAME_LIMIT: usize = 100_000;

/// Most bytes of all these names together.
const NAMES_BYTES_LIMIT: usize = 16 << 20;

/// Longest resource name believed.
const NAME_BYTES_LIMIT: usize = 4096;

/// Most unacknowledged responses of one type: a client may ask on without acknowledging, but not for ever.
const IN_FLIGHT_LIMIT: usize = 64;

/// Which of the two protocols the stream speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// State of the world.
    Sotw,
    /// Delta.
    Delta,
}

/// What a proxy should have: all resources of one generation.
#[derive(Clone, Debug, Default)]
pub struct Target {
    /// The generation of the configuration it was computed from.
    pub generation: u64,
    /// By kind; a kind that is absent has no resources.
    pub catalogs: BTreeMap<Kind, Arc<Catalog>>,
    /// What had to be left out for this proxy, and why.
    pub conflicts: Vec<String>,
    /// Where it is the target before but for load assignments: those that may differ. `None`: anything may.
    pub endpoints_only: Option<Arc<[Arc<str>]>>,
}

/// How much of the target has to be compared with what the client holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Doubt {
    /// Everything.
    All,
    /// The client had all of the target before, has asked for nothing since, and these assignments may differ.
    Endpoints(Arc<[Arc<str>]>),
    /// It has everything.
    Nothing,
}

/// How far the present target has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Clusters and endpoints are added and changed.
    Make,
    /// Listeners and routes are.
    Switch,
    /// What nothing stands on any more is removed.
    Break,
    /// Nothing left to do.
    Settled,
}

/// A request in delta's terms.
#[derive(Clone, Debug, Default)]
pub struct DeltaAsk {
    /// Names asked for from now on.
    pub subscribe: Vec<String>,
    /// Names no longer asked for.
    pub unsubscribe: Vec<String>,
    /// What a reconnecting client holds: name to version.
    pub initial: HashMap<String, String>,
}

/// Why a stream is closed on its client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// More types than any proxy has.
    #[error("a stream may watch at most {KIND_LIMIT} types")]
    TooManyTypes,
    /// More names than any proxy needs.
    #[error(
        "a stream may ask for at most {NAME_LIMIT} names, of at most {NAME_BYTES_LIMIT} bytes each"
    )]
    TooManyNames,
    /// It asks and asks, and acknowledges nothing.
    #[error("{IN_FLIGHT_LIMIT} responses of one type are unacknowledged")]
    TooManyUnacknowledged,
}

/// What became of an acknowledgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No nonce to speak of: a first request, or a change of subscription.
    None,
    /// Accepted.
    Ack,
    /// Refused; the message and the resources in the refused response.
    Nack {
        /// The client's words.
        message: String,
        /// Names in the response.
        names: Vec<String>,
    },
    /// A nonce that is not the last one.
    Stale,
}

/// A response, before it is written in either protocol.
#[derive(Clone, Debug)]
pub struct Response {
    /// Type of its resources.
    pub kind: Kind,
    /// What the client repeats to acknowledge it.
    pub nonce: String,
    /// Version of the whole of what the client will hold.
    pub version: String,
    /// New and changed resources; for state of the world all that belong into the message.
    pub set: Vec<Arc<Encoded>>,
    /// Names that are gone (delta only).
    pub removed: Vec<Arc<str>>,
    /// Whether nobody asked: a push.
    pub pushed: bool,
}

/// What the client holds of one name, as far as we know.
#[derive(Clone, Debug)]
enum Held {
    /// What we sent last.
    Sent(Arc<Encoded>),
    /// What it said it had when it reconnected.
    Known(Arc<str>),
    /// Nothing: we told it so.
    Absent,
}

impl Held {
    /// Whether it is that resource. Equal ones are mostly one copy, see [`Encoder`].
    fn is(&self, encoded: &Arc<Encoded>) -> bool {
        matches!(self, Self::Sent(held) if Arc::ptr_eq(held, encoded))
            || *self.version() == *encoded.version
    }

    fn version(&self) -> &str {
        match self {
            Self::Sent(encoded) => &encoded.version,
            Self::Known(version) => version,
            Self::Absent => "",
        }
    }
}

/// One response that the client has not yet answered.
#[derive(Debug)]
struct InFlight {
    nonce: String,
    version: String,
    /// Name and resource, `None` for removed.
    changes: Vec<(Arc<str>, Option<Arc<Encoded>>)>,
    sent_at: Instant,
}

/// A refusal that stands.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Rejection {
    /// Version refused.
    pub version: String,
    /// The client's words.
    pub message: String,
    /// Resources in the response that are not accepted yet.
    pub resources: Vec<String>,
}

/// One type on one stream.
#[derive(Debug, Default)]
struct Watch {
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    held: BTreeMap<Arc<str>, Held>,
    /// Of all that is held; see [`Watch::hold`].
    version: SetVersion,
    /// What the client accepted last: this is what it serves by, whatever we sent since.
    acked: BTreeMap<Arc<str>, Held>,
    /// Sent (or removed), and not acknowledged in that version.
    unacked: BTreeSet<Arc<str>>,
    in_flight: VecDeque<InFlight>,
    last_nonce: String,
    sent_version: String,
    acked_version: String,
    rejection: Option<Rejection>,
    /// An answer is due even if it is empty.
    must_answer: bool,
    /// The client had content before this stream: even the first answer waits for its turn.
    reconnected: bool,
    /// Names just asked for, to be answered at once.
    asked: BTreeSet<Arc<str>>,
    /// Names to be sent again though unchanged.
    force: BTreeSet<Arc<str>>,
    /// Names we stopped waiting for the client to ask for.
    unclaimed: BTreeSet<Arc<str>>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Session {
    mode: Mode,
    watches: BTreeMap<Kind, Watch>,
    target: Target,
    step: Step,
    doubt: Doubt,
    claim_deadline: Option<Instant>,
    live: u64,
    nonces: u64,
    nonce_prefix: String,
    encoder: Arc<Encoder>,
    out: VecDeque<Response>,
    adopted_at: Instant,
}

impl Session {
    /// A stream that has asked for nothing yet. `stream` makes nonces unlike those of other streams.
    #[must_use]
    pub fn new(
        mode: Mode,
        stream: u64,
        target: Target,
        encoder: Arc<Encoder>,
        now: Instant,
    ) -> Self {
        Self {
            mode,
            watches: BTreeMap::new(),
            target,
            step: Step::Make,
            doubt: Doubt::All,
            claim_deadline: None,
            live: 0,
            nonces: 0,
            nonce_prefix: format!("{stream:x}-"),
            encoder,
            out: VecDeque::new(),
            adopted_at: now,
        }
    }

    /// Takes a state-of-the-world request.
    ///
    /// # Errors
    /// The client exceeds a bound; close the stream.
    pub fn sotw(
        &mut self,
        kind: &Kind,
        version: &str,
        names: &[String],
        nonce: &str,
        error: Option<String>,
        now: Instant,
    ) -> Result<Verdict, Misuse> {
        check_names(names)?;
        self.doubt = Doubt::All;
        let names: BTreeSet<Arc<str>> = names.iter().map(|name| name.as_str().into()).collect();
        if names.is_empty() && !kind.is_wildcard() {
            // Unsubscribed. It may also be the answer to the last response, which no longer matters.
            let verdict = match (self.watches.remove(kind), error) {
                (Some(mut watch), Some(message)) => watch.refuse(nonce, message),
                _ => Verdict::None,
            };
            self.pump(now);
            return Ok(verdict);
        }
        // CDS and LDS are always the whole; of configuration objects one may ask for some.
        let wildcard = matches!(kind, Kind::Cluster | Kind::Listener) || names.is_empty();

        let verdict = match self.watches.get_mut(kind) {
            None if error.is_some() => Verdict::Nack {
                message: error.unwrap_or_default(),
                names: Vec::new(),
            },
            None => {
                self.open(
                    kind,
                    Watch {
                        wildcard,
                        names,
                        reconnected: !version.is_empty(),
                        ..Watch::default()
                    },
                )?;
                Verdict::None
            }
            // A fresh start within the stream.
            Some(watch) if nonce.is_empty() && error.is_none() => {
                *watch = Watch {
                    wildcard,
                    asked: names.clone(),
                    names,
                    must_answer: true,
                    ..Watch::default()
                };
                self.step = Step::Make;
                Verdict::None
            }
            Some(watch) if nonce != watch.last_nonce => {
                // Nothing is taken from it but the ledger's knowledge about an earlier response.
                watch.settle_early(nonce, error);
                Verdict::Stale
            }
            Some(watch) => {
                let verdict = match error {
                    Some(message) => watch.refuse(nonce, message),
                    None => watch.accept(nonce),
                };
                watch.wildcard = wildcard;
                watch.rename(names);
                verdict
            }
        };
        self.check_size()?;
        self.pump(now);
        Ok(verdict)
    }

    /// Takes a delta request.
    ///
    /// # Errors
    /// The client exceeds a bound; close the stream.
    pub fn delta(
        &mut self,
        kind: &Kind,
        ask: DeltaAsk,
        nonce: &str,
        error: Option<String>,
        now: Instant,
    ) -> Result<Verdict, Misuse> {
        check_names(&ask.subscribe)?;
        check_names(&ask.unsubscribe)?;
        if ask.initial.len() > NAME_LIMIT
            || ask
                .initial
                .iter()
                .any(|(n, v)| n.len().max(v.len()) > NAME_BYTES_LIMIT)
        {
            return Err(Misuse::TooManyNames);
        }
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let acknowledges = !nonce.is_empty()
            && error.is_none()
            && ask.subscribe.is_empty()
            && ask.unsubscribe.is_empty();
        if !acknowledges {
            self.doubt = Doubt::All;
        }

        let Some(watch) = self.watches.get_mut(kind) else {
            if let Some(message) = error {
                return Ok(Verdict::Nack {
                    message,
                    names: Vec::new(),
                });
            }
            if ask.subscribe.is_empty() && !kind.is_wildcard() {
                return Ok(Verdict::None);
            }
            let held: BTreeMap<Arc<str>, Held> = ask
                .initial
                .iter()
                .map(|(name, version)| (name.as_str().into(), Held::Known(version.as_str().into())))
                .collect();
            let mut watch = Watch {
                wildcard: kind.is_wildcard() && (ask.subscribe.is_empty() || star(&ask.subscribe)),
                reconnected: !held.is_empty(),
                acked: held.clone(),
                ..Watch::default()
            };
            for (name, held) in held {
                watch.hold(&name, Some(held));
            }
            watch.subscribe(&ask.subscribe);
            self.open(kind, watch)?;
            self.check_size()?;
            self.pump(now);
            return Ok(Verdict::None);
        };

        // A subscription changes even when the nonce is stale: delta requests are increments.
        let verdict = match (nonce.is_empty(), error) {
            (true, None) => Verdict::None,
            (true, Some(message)) => Verdict::Nack {
                message,
                names: Vec::new(),
            },
            (false, error)
                if nonce == watch.last_nonce
                    || watch.in_flight.iter().any(|sent| sent.nonce == nonce) =>
            {
                match error {
                    Some(message) => watch.refuse_one(nonce, message),
                    None => watch.accept_one(nonce),
                }
            }
            (false, _) => Verdict::Stale,
        };
        if kind.is_wildcard() && star(&ask.subscribe) && !watch.wildcard {
            watch.wildcard = true;
            watch.must_answer = true;
        }
        if star(&ask.unsubscribe) && watch.wildcard {
            watch.wildcard = false;
            for name in watch.held.keys().cloned().collect::<Vec<_>>() {
                if !watch.names.contains(&name) {
                    watch.forget(&name);
                }
            }
        }
        watch.subscribe(&ask.subscribe);
        watch.unsubscribe(&ask.unsubscribe);
        if !watch.wildcard && watch.names.is_empty() && watch.in_flight.is_empty() {
            self.watches.remove(kind);
        }
        if self
            .watches
            .get(kind)
            .is_some_and(|watch| watch.in_flight.len() >= IN_FLIGHT_LIMIT)
        {
            return Err(Misuse::TooManyUnacknowledged);
        }
        if !ask.subscribe.is_empty() {
            self.check_size()?;
        }
        self.pump(now);
        Ok(verdict)
    }

    /// Bounds what a client makes us remember.
    fn check_size(&self) -> Result<(), Misuse> {
        let names = || self.watches.values().flat_map(|watch| &watch.names);
        if names().count() > NAME_LIMIT
            || names().map(|name| name.len()).sum::<usize>() > NAMES_BYTES_LIMIT
        {
            return Err(Misuse::TooManyNames);
        }
        Ok(())
    }

    fn open(&mut self, kind: &Kind, mut watch: Watch) -> Result<(), Misuse> {
        if self.watches.len() >= KIND_LIMIT {
            return Err(Misuse::TooManyTypes);
        }
        if Kind::XDS.contains(kind) && !self.watches_xds() {
            // What was live so far said nothing about proxy configuration.
            self.live = 0;
        }
        watch.must_answer = true;
        if !watch.reconnected {
            watch.asked = watch.names.clone();
        }
        self.watches.insert(kind.clone(), watch);
        self.doubt = Doubt::All;
        self.step = Step::Make;
        Ok(())
    }

    /// Whether the next target may be adopted: the present one has been pushed and answered.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.step == Step::Settled
    }

    /// Takes a new target and begins to push it.
    pub fn adopt(&mut self, target: Target, now: Instant) {
        self.doubt = match (&target.endpoints_only, &self.doubt) {
            (Some(names), Doubt::Nothing) => Doubt::Endpoints(names.clone()),
            _ => Doubt::All,
        };
        self.target = target;
        self.step = Step::Make;
        self.claim_deadline = None;
        self.adopted_at = now;
        self.pump(now);
    }

    /// Fills in the resources of the present target that were not computed before, because nothing had
    /// asked for their kind.
    pub fn complete(&mut self, target: Target) {
        debug_assert_eq!(
            target.generation, self.target.generation,
            "the same target, more of it"
        );
        self.doubt = Doubt::All;
        self.target = target;
    }

    /// When [`Session::expire`] must be called, if nothing else happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.claim_deadline
    }

    /// Goes on without what the client was expected to ask for and did not.
    pub fn expire(&mut self, now: Instant) {
        if self.claim_deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.claim_deadline = None;
        self.doubt = Doubt::All;
        let (from, to) = match self.step {
            Step::Make => (Kind::Cluster, Kind::Endpoint),
            Step::Switch | Step::Break | Step::Settled => (Kind::Listener, Kind::Route),
        };
        let unclaimed = self.awaited(&from, &to);
        if let Some(watch) = self.watches.get_mut(&from) {
            watch.unclaimed.extend(unclaimed);
        }
        self.pump(now);
    }

    /// Responses to be sent, in order.
    pub fn take_responses(&mut self) -> VecDeque<Response> {
        std::mem::take(&mut self.out)
    }

    /// The newest generation of which everything this proxy asks for has been acknowledged.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.live
    }

    /// The generation being pushed, or pushed last.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.target.generation
    }

    /// What the client should have.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What had to be left out of the present target, and why.
    #[must_use]
    pub fn conflicts(&self) -> &[String] {
        &self.target.conflicts
    }

    /// When the present target was adopted.
    #[must_use]
    pub fn adopted_at(&self) -> Instant {
        self.adopted_at
    }

    /// How far the present target has got.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// Which protocol is spoken.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The state of each type, for the ledger.
    pub fn kinds(&self) -> impl Iterator<Item = (&Kind, KindStatus<'_>)> {
        self.watches
            .iter()
            .map(|(kind, watch)| (kind, KindStatus { watch }))
    }

    /// Everything sent of one type, for configuration dumps.
    pub fn held(&self, kind: &Kind) -> impl Iterator<Item = &Arc<Encoded>> {
        self.watches
            .get(kind)
            .into_iter()
            .flat_map(|watch| &watch.held)
            .filter_map(|(_, held)| match held {
                Held::Sent(encoded) => Some(encoded),
                Held::Known(_) | Held::Absent => None,
            })
    }

    /// Whether it watches any type that is computed for it alone.
    #[must_use]
    pub fn watches_xds(&self) -> bool {
        self.watches.keys().any(|kind| Kind::XDS.contains(kind))
    }

    /// Moves on as far as acknowledgements allow.
    fn pump(&mut self, now: Instant) {
        loop {
            for kind in self.watches.keys().cloned().collect::<Vec<_>>() {
                self.flush(&kind, now);
            }
            let claims = match self.step {
                Step::Make => self.awaited(&Kind::Cluster, &Kind::Endpoint),
                Step::Switch => self.awaited(&Kind::Listener, &Kind::Route),
                Step::Break | Step::Settled => Vec::new(),
            };
            let quiet = match self.step {
                Step::Make => self.is_quiet(&Kind::Cluster) && self.is_quiet(&Kind::Endpoint),
                Step::Switch => self.is_quiet(&Kind::Listener) && self.is_quiet(&Kind::Route),
                Step::Break => self
                    .watches
                    .values()
                    .all(|watch| watch.in_flight.is_empty()),
                Step::Settled => false,
            };
            if !quiet {
                self.claim_deadline = None;
                break;
            }
            if !claims.is_empty() {
                self.claim_deadline.get_or_insert(now + CLAIM_WAIT);
                break;
            }
            self.claim_deadline = None;
            self.step = match self.step {
                Step::Make => Step::Switch,
                Step::Switch => Step::Break,
                Step::Break | Step::Settled => Step::Settled,
            };
        }
        if self.step == Step::Settled && self.is_clean() {
            self.doubt = Doubt::Nothing;
            self.live = self.live.max(self.target.generation);
        }
    }

    fn is_quiet(&self, kind: &Kind) -> bool {
        self.watches
            .get(kind)
            .is_none_or(|watch| watch.in_flight.is_empty() && !watch.must_answer)
    }

    /// Whether everything of the target that the client asks for is acknowledged.
    fn is_clean(&self) -> bool {
        // A proxy asks for clusters first. Until it has asked for listeners it is still starting.
        let starting = self.watches.contains_key(&Kind::Cluster)
            && !self.watches.contains_key(&Kind::Listener);
        !starting
            && self
                .watches
                .values()
                .all(|watch| watch.in_flight.is_empty() && watch.unacked.is_empty())
            && self.awaited(&Kind::Cluster, &Kind::Endpoint).is_empty()
            && self.awaited(&Kind::Listener, &Kind::Route).is_empty()
            && self
                .watches
                .keys()
                .all(|kind| self.changes(kind, Scope::Everything).is_empty())
    }

    /// Names of kind `to` that accepted resources of kind `from` stand on, and that the client has not
    /// asked for yet.
    fn awaited(&self, from: &Kind, to: &Kind) -> Vec<Arc<str>> {
        if self.doubt != Doubt::All {
            return Vec::new(); // nothing was, and neither clusters nor listeners have changed
        }
        let Some(watch) = self.watches.get(from) else {
            return Vec::new();
        };
        let asked = self.watches.get(to);
        watch
            .held
            .iter()
            .filter(|(name, held)| {
                watch
                    .acked
                    .get(*name)
                    .is_some_and(|acked| acked.version() == held.version())
            })
            .filter_map(|(_, held)| match held {
                Held::Sent(encoded) => Some(&encoded.refers.next),
                Held::Known(_) | Held::Absent => None,
            })
            .flatten()
            .filter(|name| !watch.unclaimed.contains(*name))
            .filter(|name| asked.is_none_or(|asked| !asked.names.contains(*name)))
            .cloned()
            .collect()
    }

    /// Sends what is due of one type now.
    fn flush(&mut self, kind: &Kind, now: Instant) {
        let Some(watch) = self.watches.get(kind) else {
            return;
        };
        let may_change = match kind {
            Kind::Listener | Kind::Route => self.step >= Step::Switch,
            _ => true,
        };
        let may_push = may_change && watch.in_flight.is_empty();
        let answers =
            !watch.asked.is_empty() || (watch.must_answer && (may_change || !watch.reconnected));
        if !may_push && !answers {
            return;
        }
        let whole_state = self.mode == Mode::Sotw && !kind.is_sticky();
        let scope = if may_push || watch.must_answer || whole_state {
            Scope::Everything
        } else {
            Scope::Asked
        };
        let changes = self.changes(kind, scope);
        if changes.is_empty() && !answers {
            return;
        }
        self.send(kind, changes, whole_state, !answers, now);
    }

    /// What differs between what the client should have now and what it holds.
    fn changes(&self, kind: &Kind, scope: Scope) -> Changes {
        static EMPTY: Catalog = Catalog::new();
        let mut changes = Changes::default();
        let Some(watch) = self.watches.get(kind) else {
            return changes;
        };
        let wanted: &Catalog = self
            .target
            .catalogs
            .get(kind)
            .map_or(&EMPTY, |catalog| catalog);

        let in_use = match kind {
            Kind::Cluster if self.step >= Step::Break && self.doubt == Doubt::All => {
                self.clusters_in_use()
            }
            _ => InUse::default(),
        };
        let consider = |changes: &mut Changes, name: &Arc<str>, wanted: Option<&Arc<Encoded>>| {
            let held = watch.held.get(name);
            let asked = watch.asked.contains(name);
            let again = asked || watch.force.contains(name);
            match wanted {
                Some(encoded) => {
                    let same = held.is_some_and(|held| held.is(encoded));
                    if (again || !same) && (asked || !self.is_blocked(kind, encoded)) {
                        changes.set.push(encoded.clone());
                    }
                }
                None if kind.is_sticky() => match held {
                    Some(Held::Sent(encoded)) if again => changes.set.push(encoded.clone()),
                    Some(Held::Sent(_) | Held::Known(_)) => {}
                    Some(Held::Absent) | None => changes.set.push(self.empty(kind, name)),
                },
                None => {
                    let retained = *kind == Kind::Cluster && self.retains(name, &in_use);
                    let known = held.is_some_and(|held| !matches!(held, Held::Absent));
                    // A name that does not exist is said to be gone, once.
                    if (known && !retained) || (!known && (asked || held.is_none())) {
                        changes.removed.push(name.clone());
                    }
                }
            }
        };

        match (scope, &self.doubt) {
            (Scope::Everything, Doubt::Nothing) if Kind::XDS.contains(kind) => {}
            (Scope::Everything, Doubt::Endpoints(names)) if Kind::XDS.contains(kind) => {
                let names = names.iter().filter(|name| {
                    *kind == Kind::Endpoint && (watch.wildcard || watch.names.contains(*name))
                });
                for name in names {
                    consider(&mut changes, name, wanted.get(name));
                }
            }
            (Scope::Asked, _) => {
                for name in &watch.asked {
                    consider(&mut changes, name, wanted.get(name));
                }
            }
            (Scope::Everything, _) => {
                if watch.wildcard {
                    for (name, encoded) in wanted {
                        consider(&mut changes, name, Some(encoded));
                    }
                    for name in watch.held.keys().filter(|name| !wanted.contains_key(*name)) {
                        consider(&mut changes, name, None);
                    }
                }
                for name in &watch.names {
                    if !watch.wildcard
                        || !(wanted.contains_key(name) || watch.held.contains_key(name))
                    {
                        consider(&mut changes, name, wanted.get(name));
                    }
                }
            }
        }
        changes
    }

    /// Whether a route configuration stands on a cluster which the client has refused: it keeps the
    /// routes it has, rather than take some that lead nowhere.
    fn is_blocked(&self, kind: &Kind, encoded: &Encoded) -> bool {
        *kind == Kind::Route
            && self.watches.get(&Kind::Cluster).is_some_and(|clusters| {
                !clusters.unacked.is_empty()
                    && encoded.refers.clusters.iter().any(|name| {
                        clusters.unacked.contains(name) && !clusters.acked.contains_key(name)
                    })
            })
    }

    /// Whether a cluster that is no longer wanted has to stay all the same: nothing is removed before
    /// routes have moved, and nothing that the client still sends traffic to.
    fn retains(&self, name: &Arc<str>, in_use: &InUse) -> bool {
        self.step < Step::Break || in_use.unknown || in_use.clusters.contains(name)
    }

    /// Clusters which accepted listeners and routes lead to, where those are not the wanted ones: the client
    /// refused their successors, we held these back, or an old listener still drains.
    fn clusters_in_use(&self) -> InUse {
        let mut in_use = InUse::default();
        for kind in [Kind::Listener, Kind::Route] {
            let Some(watch) = self.watches.get(&kind) else {
                continue;
            };
            let wanted = self.target.catalogs.get(&kind);
            for (name, acked) in &watch.acked {
                if wanted
                    .and_then(|all| all.get(name))
                    .is_some_and(|encoded| acked.is(encoded))
                {
                    continue;
                }
                match acked {
                    Held::Sent(encoded) => in_use
                        .clusters
                        .extend(encoded.refers.clusters.iter().cloned()),
                    Held::Known(_) => in_use.unknown = true,
                    Held::Absent => {}
                }
            }
        }
        in_use
    }

    /// What is answered for a name that has no content: a draining listener may still ask for its routes,
    /// and a cluster without an assignment would warm for ever.
    fn empty(&self, kind: &Kind, name: &Arc<str>) -> Arc<Encoded> {
        match kind {
            Kind::Endpoint => self.encoder.encode(
                name,
                &ClusterLoadAssignment {
                    cluster_name: name.to_string(),
                    ..Default::default()
                },
            ),
            _ => self.encoder.encode(
                name,
                &RouteConfiguration {
                    name: name.to_string(),
                    ..Default::default()
                },
            ),
        }
    }

    fn send(
        &mut self,
        kind: &Kind,
        changes: Changes,
        whole_state: bool,
        pushed: bool,
        now: Instant,
    ) {
        let Some(watch) = self.watches.get_mut(kind) else {
            return;
        };
        let mut log = Vec::with_capacity(changes.set.len() + changes.removed.len());
        let mut stands_on: Vec<Arc<str>> = Vec::new();
        for encoded in &changes.set {
            let before = watch.hold(&encoded.name, Some(Held::Sent(encoded.clone())));
            if before.is_none_or(|held| *held.version() != *encoded.version) {
                stands_on.extend(encoded.refers.next.iter().cloned());
            }
            watch.unacked.insert(encoded.name.clone());
            log.push((encoded.name.clone(), Some(encoded.clone())));
        }
        for name in &changes.removed {
            let absent = watch.names.contains(name).then_some(Held::Absent);
            watch.hold(name, absent);
            watch.unacked.insert(name.clone());
            log.push((name.clone(), None));
        }
        let version = watch.version.text();
        let set = if whole_state {
            watch
                .held
                .values()
                .filter_map(|held| match held {
                    Held::Sent(encoded) => Some(encoded.clone()),
                    Held::Known(_) | Held::Absent => None,
                })
                .collect()
        } else {
            changes.set
        };
        self.nonces += 1;
        let nonce = format!("{}{}", self.nonce_prefix, self.nonces);
        for (name, _) in &log {
            watch.asked.remove(name);
            watch.force.remove(name);
        }
        watch.asked.clear();
        watch.must_answer = false;
        watch.reconnected = false;
        watch.last_nonce.clone_from(&nonce);
        watch.sent_version.clone_from(&version);
        watch.in_flight.push_back(InFlight {
            nonce: nonce.clone(),
            version: version.clone(),
            changes: log,
            sent_at: now,
        });

        // A changed cluster warms until its endpoints come again, a changed listener until its routes do,
        // and a client that holds them does not always ask (Envoy, both modes).
        let dependent = match kind {
            Kind::Cluster => Some(Kind::Endpoint),
            Kind::Listener => Some(Kind::Route),
            _ => None,
        };
        if let Some(dependent) = dependent.and_then(|kind| self.watches.get_mut(&kind)) {
            dependent.force.extend(
                stands_on
                    .into_iter()
                    .filter(|name| dependent.names.contains(name)),
            );
        }
        let removed = if self.mode == Mode::Delta {
            changes.removed
        } else {
            Vec::new()
        };
        self.out.push_back(Response {
            kind: kind.clone(),
            nonce,
            version,
            set,
            removed,
            pushed,
        });
    }
}

/// Clusters that must not be removed.
#[derive(Debug, Default)]
struct InUse {
    clusters: BTreeSet<Arc<str>>,
    /// Something is in use that an earlier stream sent: anything may be meant.
    unknown: bool,
}

/// Which names to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Everything,
    Asked,
}

#[derive(Debug, Default)]
struct Changes {
    set: Vec<Arc<Encoded>>,
    removed: Vec<Arc<str>>,
}

impl Changes {
    fn is_empty(&self) -> bool {
        self.set.is_empty() && self.removed.is_empty()
    }
}

fn check_names(names: &[String]) -> Result<(), Misuse> {
    if names.len() > NAME_LIMIT || names.iter().any(|name| name.len() > NAME_BYTES_LIMIT) {
        return Err(Misuse::TooManyNames);
    }
    Ok(())
}

impl Watch {
    /// Notes what the client holds of a name from now on; what it held before.
    fn hold(&mut self, name: &Arc<str>, held: Option<Held>) -> Option<Held> {
        if let Some(held) = &held {
            self.version.toggle(name, held.version());
        }
        let before = match held {
            Some(held) => self.held.insert(name.clone(), held),
            None => self.held.remove(name),
        };
        if let Some(before) = &before {
            self.version.toggle(name, before.version());
        }
        before
    }

    /// The response of that nonce, and all before it, are accepted (state of the world).
    fn accept(&mut self, nonce: &str) -> Verdict {
        if !self.in_flight.iter().any(|sent| sent.nonce == nonce) {
            return Verdict::None; // the same nonce again: only the subscription may have changed
        }
        while let Some(sent) = self.in_flight.pop_front() {
            let last = sent.nonce == nonce;
            self.accepted(sent);
            if last {
                break;
            }
        }
        Verdict::Ack
    }

    /// The response of that nonce alone is accepted (delta).
    fn accept_one(&mut self, nonce: &str) -> Verdict {
        let Some(at) = self.in_flight.iter().position(|sent| sent.nonce == nonce) else {
            return Verdict::None;
        };
        if let Some(sent) = self.in_flight.remove(at) {
            self.accepted(sent);
        }
        Verdict::Ack
    }

    fn accepted(&mut self, sent: InFlight) {
        for (name, resource) in sent.changes {
            let current = match (self.held.get(&name), &resource) {
                (Some(held), Some(resource)) => held.is(resource),
                (None | Some(Held::Absent), None) => true,
                _ => false,
            };
            if current {
                self.unacked.remove(&name);
            }
            match resource {
                Some(resource) => self.acked.insert(name, Held::Sent(resource)),
                None => self.acked.remove(&name),
            };
        }
        self.acked_version = sent.version;
        if self.unacked.is_empty() {
            self.rejection = None;
        }
    }

    /// The response of that nonce is refused; those before it are no longer waited for (state of the world).
    fn refuse(&mut self, nonce: &str, message: String) -> Verdict {
        while self
            .in_flight
            .front()
            .is_some_and(|sent| sent.nonce != nonce)
            && self.in_flight.iter().any(|sent| sent.nonce == nonce)
        {
            self.in_flight.pop_front();
        }
        self.refuse_one(nonce, message)
    }

    /// The response of that nonce is refused. What was sent stays noted as held, so that it is not sent again.
    fn refuse_one(&mut self, nonce: &str, message: String) -> Verdict {
        let at = self.in_flight.iter().position(|sent| sent.nonce == nonce);
        let sent = at.and_then(|at| self.in_flight.remove(at));
        let (version, names) = sent.map_or_else(
            || (self.sent_version.clone(), Vec::new()),
            |sent| {
                (
                    sent.version,
                    sent.changes
                        .iter()
                        .map(|(name, _)| name.to_string())
                        .collect(),
                )
            },
        );
        let message: String = message.chars().take(4096).collect();
        self.rejection = Some(Rejection {
            version,
            message: message.clone(),
            resources: names.clone(),
        });
        Verdict::Nack { message, names }
    }

    /// An answer to a response that is not the last: noted, and nothing else.
    fn settle_early(&mut self, nonce: &str, error: Option<String>) {
        match error {
            None => _ = self.accept_one(nonce),
            Some(message) if self.in_flight.iter().any(|sent| sent.nonce == nonce) => {
                _ = self.refuse_one(nonce, message);
            }
            Some(_) => {}
        }
    }

    /// State of the world: these are the names from now on.
    fn rename(&mut self, names: BTreeSet<Arc<str>>) {
        for gone in self.names.difference(&names).cloned().collect::<Vec<_>>() {
            self.forget(&gone);
        }
        self.asked.extend(names.difference(&self.names).cloned());
        self.names = names;
    }

    /// Delta: these names, too. Asking again for one that is held means: send it again.
    fn subscribe(&mut self, names: &[String]) {
        for name in names.iter().filter(|name| *name != "*") {
            let name: Arc<str> = name.as_str().into();
            // Of what a reconnecting client holds, the version tells whether it needs it.
            if !matches!(self.held.get(&name), Some(Held::Known(_))) {
                self.asked.insert(name.clone());
            }
            self.names.insert(name);
        }
    }

    /// Delta: these names no longer.
    fn unsubscribe(&mut self, names: &[String]) {
        for name in names.iter().filter(|name| *name != "*") {
            self.names.remove(name.as_str());
            if !self.wildcard {
                self.forget(name);
            }
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(before) = self.held.remove(name) {
            self.version.toggle(name, before.version());
        }
        self.acked.remove(name);
        self.unacked.remove(name);
        self.asked.remove(name);
        self.force.remove(name);
        if self.unacked.is_empty() {
            self.rejection = None;
        }
    }
}

/// One type of one stream, as the ledger shows it.
#[derive(Clone, Copy, Debug)]
pub struct KindStatus<'a> {
    watch: &'a Watch,
}

impl<'a> KindStatus<'a> {
    /// Version of everything sent.
    #[must_use]
    pub fn sent(&self) -> &'a str {
        &self.watch.sent_version
    }

    /// Version of the newest acknowledged response.
    #[must_use]
    pub fn acked(&self) -> &'a str {
        &self.watch.acked_version
    }

    /// The refusal that stands, if one does.
    #[must_use]
    pub fn rejection(&self) -> Option<Rejection> {
        self.watch.rejection.clone().map(|mut rejection| {
            rejection
                .resources
                .retain(|name| self.watch.unacked.contains(name.as_str()));
            rejection
        })
    }

    /// Nonces not answered yet, with when they were sent.
    pub fn in_flight(&self) -> impl Iterator<Item = (&'a str, Instant)> {
        self.watch
            .in_flight
            .iter()
            .map(|sent| (sent.nonce.as_str(), sent.sent_at))
    }

    /// Acknowledged version of each resource.
    pub fn resources(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.watch
            .acked
            .iter()
            .map(|(name, held)| (&**name, held.version()))
    }

    /// Names sent and not acknowledged.
    #[must_use]
    pub fn unacked(&self) -> &'a BTreeSet<Arc<str>> {
        &self.watch.unacked
    }

    /// Names it was expected to ask for, and did not.
    #[must_use]
    pub fn unclaimed(&self) -> &'a BTreeSet<Arc<str>> {
        &self.watch.unclaimed
    }
}

#[cfg(test)]
#[path = "session/tests.rs"]
mod tests;
