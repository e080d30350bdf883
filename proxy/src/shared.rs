//! Where the two worlds meet: what the main runtime writes and the workers read.

use std::{fmt, sync::Arc};

use envoy_types::pb::envoy::config::core::v3::Node;

use crate::{
    cluster::ClusterManager, drain::Drain, layers::RuntimeLayers, listener::Destinations,
    route::RouteSlots, secret::SecretStore, stats::Registry,
};

/// Everything a worker needs besides its own sockets. The main runtime owns the writing: it swaps
/// whole immutable tables inside; workers only load them.
pub struct Shared {
    /// Counters, gauges and histograms.
    pub stats: Arc<Registry>,
    /// Clusters and their hosts.
    pub clusters: ClusterManager,
    /// Route tables by name.
    pub routes: RouteSlots,
    /// Listeners by the address that redirected connections were meant for.
    pub destinations: Destinations,
    /// Certificates and trust bundles by name.
    pub secrets: SecretStore,
    /// Whether the process is leaving.
    pub drain: Drain,
    /// Who we are for the control plane, access logs and headers.
    pub node: Node,
    /// Values that override configured fractions.
    pub layers: RuntimeLayers,
    /// The main runtime, for work that must not hold up a worker (DNS, export).
    pub runtime: tokio::runtime::Handle,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("node", &self.node.id)
            .finish_non_exhaustive()
    }
}
