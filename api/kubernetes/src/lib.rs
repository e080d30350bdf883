//! Kubernetes' API as a source of configuration.
//!
//! [`client`] (flags, credentials) → [`resource`] (what there is to follow; custom kinds as their definitions come and
//! go) → [`follow`] (list, then watch, for ever) → [`reduce`] (only what is used is kept) → [`source`] (one writer of
//! a [`lateen_config::Store`], which parses, judges and publishes). Beside the path: [`health`] (metrics, and what the
//! log says when the API server cannot be reached); [`review`] and [`roots`] (whose a token is, and root certificates for
//! all namespaces; for Auth); [`lease`] (one of several works), [`bundle`] and [`status`] (what that one writes: by which
//! roots webhooks are checked, what became of objects; for Pilot); [`testing`], an API server in process for tests.
//!
//! Objects are read by the very parser that reads YAML files, so what holds for a file holds for a cluster: an object
//! that is refused keeps its last good version, and the refusal names it. An API server that is away changes nothing.

pub mod client;
pub mod resource;
mod follow;
mod reduce;
pub mod review;
pub mod roots;
pub mod lease;
pub mod bundle;
pub mod status;
pub mod health;
pub mod source;
#[cfg(feature = "testing")]
#[allow(clippy::unwrap_used, reason = "for tests only")]
pub mod testing;

pub use bundle::{BundleMetrics, Bundles, WebhookKind};
pub use client::{ClusterArgs, ConnectError, KubernetesArgs};
pub use health::Health;
pub use lease::Candidate;
pub use review::{ReviewError, Reviewer, ServiceAccount};
pub use roots::Roots;
pub use source::Kubernetes;
pub use status::{Memory, ObjectId, Observed, Statuses};
