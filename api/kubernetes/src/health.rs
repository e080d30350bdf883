//! Whether the API server can be followed: metrics, and one line in the log when that changes.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tracing::{debug, info, warn};

use crate::resource::Resource;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    r#type: String,
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    r#type: String,
}

/// How one follower fares.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Well,
    Failing(String),
}

/// What is known of the connection, of all kinds together.
#[derive(Debug, Default)]
pub struct Health {
    /// By number of the follower; those that were stopped are not here, whatever they may still have to say.
    followers: Mutex<BTreeMap<u64, State>>,
    events: Family<EventLabels, Counter>,
    errors: Family<TypeLabel, Counter>,
    relists: Family<TypeLabel, Counter>,
    connected: Gauge,
}

impl Health {
    /// Nothing is known yet, which counts as not connected.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let health = Self::default();
        registry.register(
            "pilot_k8s_events",
            "Objects that Kubernetes has told of, by kind and event",
            health.events.clone(),
        );
        registry.register(
            "pilot_k8s_errors",
            "Requests to Kubernetes that failed, by kind",
            health.errors.clone(),
        );
        registry.register(
            "pilot_k8s_lists",
            "Times all objects of a kind were listed",
            health.relists.clone(),
        );
        registry.register(
            "pilot_k8s_connected",
            "1 while every kind in Kubernetes is being followed, else 0",
            health.connected.clone(),
        );
        Arc::new(health)
    }

    pub(crate) fn event(&self, resource: &Resource, event: &'static str) {
        self.events
            .get_or_create(&EventLabels {
                r#type: resource.kind.clone(),
                event,
            })
            .inc();
    }

    pub(crate) fn listed(&self, resource: &Resource) {
        let label = TypeLabel {
            r#type: resource.kind.clone(),
        };
        self.relists.get_or_create(&label).inc();
    }

    /// A follower begins.
    pub(crate) fn open(&self, number: u64) {
        self.followers().insert(number, State::Starting);
        self.connected.set(0);
    }

    /// A follower is stopped.
    pub(crate) fn close(&self, number: u64) {
        let mut followers = self.followers();
        let state = followers.remove(&number);
        self.settle(&followers, state.as_ref());
    }

    /// A request failed and will be tried again.
    pub(crate) fn failed(&self, number: u64, resource: &Resource, error: &impl Display) {
        let label = TypeLabel {
            r#type: resource.kind.clone(),
        };
        self.errors.get_or_create(&label).inc();
        let mut followers = self.followers();
        if !followers.contains_key(&number) {
            return;
        }
        self.connected.set(0);
        let path = resource.path();
        let state = State::Failing(error.to_string());
        // The first of an outage, and what is peculiar to one kind (a role that lacks it); not the same a hundred times.
        if followers.values().any(|known| *known == state) {
            debug!(%path, %error, "Kubernetes cannot be followed");
        } else {
            warn!(%path, %error, "Kubernetes cannot be followed; the last good configuration stays, trying again");
        }
        followers.insert(number, state);
    }

    /// A follower's collection is being watched.
    pub(crate) fn well(&self, number: u64) {
        let mut followers = self.followers();
        if let Some(state) = followers.get_mut(&number) {
            let before = std::mem::replace(state, State::Well);
            self.settle(&followers, Some(&before));
        }
    }

    /// After one follower is no longer what it was.
    fn settle(&self, followers: &BTreeMap<u64, State>, before: Option<&State>) {
        let all_well = followers.values().all(|state| *state == State::Well);
        if all_well && before.is_some_and(|state| *state != State::Well) {
            self.connected.set(1);
            info!("all of Kubernetes is being followed");
        }
    }

    fn followers(&self) -> MutexGuard<'_, BTreeMap<u64, State>> {
        self.followers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
