//! Routes: which virtual host and route a request takes, and what the route does with it. Compiled from
//! `RouteConfiguration` into immutable tables; a request keeps the table it was matched in.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use lateen_protocols::envoy::{envoy::config::route::v3 as proto, google::protobuf as pb};
use proto::virtual_host::TlsRequirementType;

use crate::{
    config_error::ConfigError,
    filter::{RouteFilterConfig, ratelimit::Policies},
    head::{Name, RequestHead},
    info::TlsInfo,
    proto::invalid,
    shared::Shared,
};

mod compile;
mod conditions;
mod domains;
pub mod headers;
pub mod internal_redirect;
pub mod matcher;
pub mod policy;
mod rewrite;
mod selected;
mod slots;
pub mod template;
#[cfg(test)]
mod tests;

pub use compile::data_source;
use conditions::Conditions;
pub use conditions::RequestMatch;
use domains::Domains;
pub use domains::without_port;
use headers::HeaderOps;
pub use policy::{
    ClusterSpec, ForwardPolicy, HashKey, HashPolicy, HostRewrite, Mirror, SubsetMatch, Target,
    Weighted, WeightedCluster, WeightedName,
};
pub use rewrite::{PathRewrite, Redirect, append_forwarded_host};
pub use selected::Selected;
pub use slots::{RouteSlot, RouteSlots};

/// A compiled `RouteConfiguration`.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Arc<str>,
    domains: Domains,
    vhosts: Vec<VirtualHost>,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
    internal_only: Vec<Name>,
    most_specific_wins: bool,
}

/// A virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Arc<str>,
    /// Its routes in order.
    pub routes: Vec<Route>,
    /// What the rate limit filter asks about.
    pub rate_limits: Policies,
    require_tls: TlsRequirementType,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// Its name; may be empty.
    pub name: Option<Arc<str>>,
    /// What it does.
    pub action: Action,
    /// Name of the operation for traces.
    pub decorator: Option<Arc<str>>,
    /// Whether the decorator goes upstream in `x-envoy-decorator-operation`.
    pub decorator_propagates: bool,
    /// `metadata.filter_metadata`, for access logs.
    pub metadata: HashMap<String, pb::Struct>,
    conditions: Conditions,
    /// What the rate limit filter asks about.
    pub rate_limits: Policies,
    /// It asks about the virtual host's, too. Envoy: `include_vh_rate_limits`.
    pub include_vhost_rate_limits: bool,
    request_headers: HeaderOps,
    response_headers: HeaderOps,
    filters: FilterConfigs,
    /// Of each weighted cluster, everything merged.
    weighted_filters: Vec<FilterConfigs>,
}

/// Filter configuration by the filter's name; few, so a list is fastest.
type FilterConfigs = Vec<(Arc<str>, RouteFilterConfig)>;

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Forwards.
    Forward {
        /// Where and how.
        policy: Box<ForwardPolicy>,
        /// What becomes of the path.
        rewrite: PathRewrite,
    },
    /// Sends the client elsewhere.
    Redirect(Redirect),
    /// Answers.
    Direct {
        /// Status of the answer.
        status: u16,
        /// Its body.
        body: Bytes,
    },
}

/// Why no route was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    /// No virtual host or no route matches.
    NotFound,
    /// The virtual host wants TLS and the request came without: the place to go to instead.
    NeedsTls,
}

impl RouteTable {
    /// Compiles a route configuration. `shared` serves filters that look up clusters or secrets.
    ///
    /// # Errors
    /// When anything in it is invalid, or not supported and would change what happens.
    pub fn compile(
        config: &proto::RouteConfiguration,
        shared: &Shared,
    ) -> Result<RouteTable, ConfigError> {
        compile::table(config, shared)
            .map_err(|error| error.within(format_args!("route {}", config.name)))
    }

    /// Fails if a cluster that the table names is not there. Envoy: `validate_clusters`.
    ///
    /// # Errors
    /// The first cluster that is missing.
    pub fn require_clusters(&self, shared: &Shared) -> Result<(), ConfigError> {
        let warming = shared.clusters.warming();
        let unknown = |name: &Arc<str>| {
            shared.clusters.get(name).is_none() && !warming.iter().any(|c| *c.name == **name)
        };
        match self.clusters().find(unknown) {
            None => Ok(()),
            Some(name) => Err(invalid(
                format!("route {}", self.name),
                format!("unknown cluster '{name}'"),
            )),
        }
    }

    /// Virtual hosts in order.
    pub fn virtual_hosts(&self) -> &[VirtualHost] {
        &self.vhosts
    }

    /// Names of all clusters the table may forward to, as far as it names them.
    pub fn clusters(&self) -> impl Iterator<Item = Arc<str>> {
        self.vhosts
            .iter()
            .flat_map(|vhost| &vhost.routes)
            .filter_map(|route| match &route.action {
                Action::Forward { policy, .. } => Some(policy.clusters()),
                Action::Redirect(_) | Action::Direct { .. } => None,
            })
            .flatten()
    }

    /// Selects the route of a request.
    ///
    /// # Errors
    /// [`Unmatched`].
    pub fn select(
        self: &Arc<Self>,
        head: &RequestHead,
        tls: Option<&TlsInfo>,
        internal: bool,
    ) -> Result<Selected, Unmatched> {
        let vhost = self
            .domains
            .find(&head.authority)
            .ok_or(Unmatched::NotFound)?;
        let host = &self.vhosts[vhost];
        let needs_tls = match host.require_tls {
            TlsRequirementType::None => false,
            TlsRequirementType::ExternalOnly => !internal,
            TlsRequirementType::All => true,
        };
        if needs_tls && head.scheme.as_ref() != b"https" {
            return Err(Unmatched::NeedsTls);
        }
        let path = head.path_only();
        let route = host
            .routes
            .iter()
            .position(|route| route.conditions.hold(head, path, tls))
            .ok_or(Unmatched::NotFound)?;
        let weighted = match &host.routes[route].action {
            Action::Forward { policy, .. } => match &policy.cluster {
                ClusterSpec::Weighted(weighted) => Some(weighted.draw(&head.headers)),
                ClusterSpec::Name(_) | ClusterSpec::Header(_) => None,
            },
            Action::Redirect(_) | Action::Direct { .. } => None,
        };
        Ok(Selected::new(self.clone(), vhost, route, weighted))
    }
}
