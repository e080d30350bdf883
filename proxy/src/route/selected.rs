//! The outcome of matching, and what the levels of configuration say together about it.

use std::sync::Arc;

use super::{
    Action, ClusterSpec, Route, RouteTable, SubsetMatch, Target, VirtualHost, Weighted,
    WeightedCluster, WeightedName, headers::HeaderOps,
};
use crate::{
    filter::RouteFilterConfig,
    head::{Headers, Name, RequestHead},
};

/// The outcome of matching: the route, and the cluster when it is weighted. Keeps its table alive.
#[derive(Clone, Debug)]
pub struct Selected {
    table: Arc<RouteTable>,
    vhost: usize,
    route: usize,
    weighted: Option<usize>,
}

impl Weighted {
    pub(super) fn draw(&self, headers: &Headers) -> usize {
        let from_header = self
            .random_header
            .as_ref()
            .and_then(|name| headers.get(name))
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(|text| text.parse::<u64>().ok());
        let random = from_header.unwrap_or_else(rand::random) % u64::from(self.total);
        let mut sum = 0;
        self.clusters
            .iter()
            .position(|cluster| {
                sum += u64::from(cluster.weight);
                random < sum
            })
            .unwrap_or(0)
    }
}

impl Selected {
    pub(super) fn new(
        table: Arc<RouteTable>,
        vhost: usize,
        route: usize,
        weighted: Option<usize>,
    ) -> Selected {
        Selected {
            table,
            vhost,
            route,
            weighted,
        }
    }

    /// The route.
    pub fn route(&self) -> &Route {
        &self.virtual_host().routes[self.route]
    }

    /// Its virtual host.
    pub fn virtual_host(&self) -> &VirtualHost {
        &self.table.vhosts[self.vhost]
    }

    /// Configuration for the filter of this name, of the most specific level that has one.
    pub fn filter_config(&self, filter: &str) -> Option<&RouteFilterConfig> {
        let route = self.route();
        let configs = match self.weighted {
            Some(index) => route.weighted_filters.get(index).unwrap_or(&route.filters),
            None => &route.filters,
        };
        configs
            .iter()
            .find(|(name, _)| **name == *filter)
            .map(|(_, config)| config)
    }

    /// The chosen weighted cluster.
    pub fn weighted(&self) -> Option<&WeightedCluster> {
        match &self.route().action {
            Action::Forward { policy, .. } => match &policy.cluster {
                ClusterSpec::Weighted(weighted) => weighted.clusters.get(self.weighted?),
                ClusterSpec::Name(_) | ClusterSpec::Header(_) => None,
            },
            Action::Redirect(_) | Action::Direct { .. } => None,
        }
    }

    /// The cluster to forward to; `None` if a header should name it and does not.
    pub fn target(&self, head: &RequestHead) -> Option<Target> {
        let Action::Forward { policy, .. } = &self.route().action else {
            return None;
        };
        let by_header = |name: &Name| -> Option<Arc<str>> {
            let value = std::str::from_utf8(head.headers.get(name)?).ok()?;
            (!value.is_empty()).then(|| value.into())
        };
        let (cluster, subset) = match (&policy.cluster, self.weighted()) {
            (ClusterSpec::Name(name), _) => (name.clone(), policy.subset.clone()),
            (ClusterSpec::Header(name), _) => (by_header(name)?, policy.subset.clone()),
            (ClusterSpec::Weighted(_), Some(weighted)) => {
                let cluster = match &weighted.name {
                    WeightedName::Name(name) => name.clone(),
                    WeightedName::Header(name) => by_header(name)?,
                };
                (
                    cluster,
                    merged_subset(policy.subset.as_ref(), weighted.subset.as_ref()),
                )
            }
            (ClusterSpec::Weighted(_), None) => return None,
        };
        Some(Target { cluster, subset })
    }

    /// Header operations on the request, in the order they apply.
    pub fn request_ops(&self) -> impl Iterator<Item = &HeaderOps> {
        self.ordered([
            self.weighted().map(|weighted| &weighted.request_headers),
            Some(&self.route().request_headers),
            Some(&self.virtual_host().request_headers),
            Some(&self.table.request_headers),
        ])
    }

    /// Header operations on the response, in the order they apply.
    pub fn response_ops(&self) -> impl Iterator<Item = &HeaderOps> {
        self.ordered([
            self.weighted().map(|weighted| &weighted.response_headers),
            Some(&self.route().response_headers),
            Some(&self.virtual_host().response_headers),
            Some(&self.table.response_headers),
        ])
    }

    fn ordered<'a>(
        &self,
        mut levels: [Option<&'a HeaderOps>; 4],
    ) -> impl Iterator<Item = &'a HeaderOps> + use<'a> {
        if self.table.most_specific_wins {
            levels.reverse();
        }
        levels.into_iter().flatten().filter(|ops| !ops.is_empty())
    }

    /// Headers that only internal requests may carry.
    pub fn internal_only(&self) -> &[Name] {
        &self.table.internal_only
    }
}

fn merged_subset(
    route: Option<&SubsetMatch>,
    cluster: Option<&SubsetMatch>,
) -> Option<SubsetMatch> {
    match (route, cluster) {
        (None, one) | (one, None) => one.cloned(),
        (Some(route), Some(cluster)) => {
            let mut all = route.as_ref().clone();
            all.extend(
                cluster
                    .iter()
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
            Some(Arc::new(all))
        }
    }
}
