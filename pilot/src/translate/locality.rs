//! Which endpoints a client prefers by where they are: shares of localities, or levels of which the next helps when
//! the one before fails. Istio: `localityLbSetting`; Kubernetes: `trafficDistribution`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::Locality;
use envoy_types::pb::envoy::config::endpoint::v3::LocalityLbEndpoints;
use lateen_config::networking::{LocalityBalancing, LocalityFailover, LocalityShares};

use crate::model::{Endpoint, Preference, Service};

use super::Scope;
use super::endpoint::lb_endpoint;
use super::policy::Policy;
use super::wire::u32_value;

const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";
const NETWORK: &str = "topology.istio.io/network";
const CLUSTER: &str = "topology.istio.io/cluster";
const MACHINE: &str = "kubernetes.io/hostname";

/// Label of a workload with its locality, where nobody else knows it.
const LOCALITY_LABEL: &str = "istio-locality";

/// How many levels places make: same subzone, zone, region, the region that helps, and the rest.
const PLACES: usize = 5;

/// How endpoints of one cluster are arranged for one client.
#[derive(Debug, Default)]
pub(super) struct Arrangement<'a> {
    shares: &'a [LocalityShares],
    /// Labels that endpoints should have in common with the client.
    labels: Vec<Cow<'a, str>>,
    failover: &'a [LocalityFailover],
    /// Whether endpoints stand on levels. Only what is ejected sends traffic to the next.
    levels: bool,
}

impl<'a> Arrangement<'a> {
    /// For a service and what holds for its port; `None` when localities do not matter.
    pub(super) fn of(scope: &'a Scope<'_>, service: &Service, policy: &Policy<'a>) -> Option<Self> {
        let own = policy
            .balancer
            .and_then(|balancer| balancer.locality_lb_setting.as_ref());
        let ejects = policy.outlier.is_some();
        match (own, service.preference) {
            (Some(own), _) => Self::by(own, ejects),
            (None, Some(preference)) => {
                let labels: &[&str] = match preference {
                    Preference::Close => &[NETWORK, REGION, ZONE, SUBZONE],
                    Preference::SameNode => &[NETWORK, REGION, ZONE, SUBZONE, MACHINE],
                };
                Some(Self {
                    labels: labels.iter().map(|label| Cow::Borrowed(*label)).collect(),
                    levels: true,
                    ..Self::default()
                })
            }
            (None, None) => match &scope.snapshot.mesh().locality_lb_setting {
                Some(mesh) => Self::by(mesh, ejects),
                None => Some(Self {
                    levels: ejects,
                    ..Self::default()
                }),
            },
        }
    }

    fn by(setting: &'a LocalityBalancing, ejects: bool) -> Option<Self> {
        (setting.enabled != Some(false)).then(|| Self {
            shares: &setting.distribute,
            labels: setting
                .failover_priority
                .iter()
                .map(|label| Cow::Borrowed(label.as_str()))
                .collect(),
            failover: &setting.failover,
            levels: ejects,
        })
    }

    fn level(&self, client: &Client<'_>, endpoint: &Endpoint) -> usize {
        if !self.levels || !self.shares.is_empty() {
            return 0;
        }
        let missed = self
            .labels
            .iter()
            .position(|label| !client.shares_label(label, endpoint));
        let by_labels = missed.map_or(0, |index| self.labels.len() - index);
        if !self.labels.is_empty() && self.failover.is_empty() {
            return by_labels;
        }
        by_labels * PLACES + client.distance(self.failover, &endpoint.locality)
    }
}

/// The endpoints as a client gets them: by level and locality.
pub(super) fn arrange<'e>(
    scope: &Scope<'_>,
    arrangement: Option<&Arrangement<'_>>,
    endpoints: impl Iterator<Item = &'e Endpoint>,
) -> Vec<LocalityLbEndpoints> {
    let client = Client::of(scope);
    let mut groups: BTreeMap<(usize, &str), LocalityLbEndpoints> = BTreeMap::new();
    for endpoint in endpoints {
        let level = arrangement.map_or(0, |arrangement| arrangement.level(&client, endpoint));
        groups
            .entry((level, &endpoint.locality))
            .or_insert_with(|| LocalityLbEndpoints {
                locality: Some(locality_of(&endpoint.locality)),
                ..Default::default()
            })
            .lb_endpoints
            .push(lb_endpoint(scope, endpoint));
    }
    for group in groups.values_mut() {
        let weights = group
            .lb_endpoints
            .iter()
            .filter_map(|endpoint| endpoint.load_balancing_weight.as_ref());
        let sum = weights.fold(0, |sum: u32, weight| sum.saturating_add(weight.value));
        group.load_balancing_weight = u32_value(sum);
    }
    if let Some(shares) = arrangement.and_then(|arrangement| client.shares(arrangement.shares)) {
        distribute(shares, &mut groups);
    }
    // Envoy wants levels without gaps.
    let mut last = None;
    let mut priority = 0;
    groups
        .into_iter()
        .map(|((level, _), group)| {
            if last.is_some_and(|last| last != level) {
                priority += 1;
            }
            last = Some(level);
            LocalityLbEndpoints { priority, ..group }
        })
        .collect()
}

/// Gives localities their shares; those that are given none get nothing.
fn distribute(shares: &LocalityShares, groups: &mut BTreeMap<(usize, &str), LocalityLbEndpoints>) {
    let to = |locality: &str| {
        shares
            .to
            .iter()
            .find(|(pattern, _)| covers(pattern, locality))
    };
    let mut alike: BTreeMap<&str, u32> = BTreeMap::new();
    for (_, locality) in groups.keys() {
        if let Some((pattern, _)) = to(locality) {
            *alike.entry(pattern).or_default() += 1;
        }
    }
    groups.retain(|(_, locality), group| {
        let Some((pattern, share)) = to(locality) else {
            return false;
        };
        // Localities of one pattern divide what it gets.
        let among = alike.get(pattern.as_str()).copied().unwrap_or(1);
        group.load_balancing_weight = u32_value(share.div_ceil(among).max(1));
        true
    });
}

/// Whether `REGION[/ZONE[/SUBZONE]]`, where `*` is anything, holds a locality.
fn covers(pattern: &str, locality: &str) -> bool {
    let mut parts = locality.splitn(3, '/');
    pattern.splitn(3, '/').all(|wanted| {
        let part = parts.next().unwrap_or_default();
        matches!(wanted, "*" | "") || wanted == part
    })
}

fn locality_of(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    // An empty locality is written all the same: Envoy groups by it.
    Locality {
        region: parts.next().unwrap_or_default(),
        zone: parts.next().unwrap_or_default(),
        sub_zone: parts.next().unwrap_or_default(),
    }
}

/// Where the client is.
struct Client<'a> {
    scope: &'a Scope<'a>,
    locality: Cow<'a, str>,
}

impl<'a> Client<'a> {
    /// What the node says, else its label, else what the registry knows.
    fn of(scope: &'a Scope<'a>) -> Self {
        let known = || {
            scope
                .snapshot
                .workload(scope.node)
                .map_or("", |workload| &workload.locality)
        };
        let locality = match (&scope.node.locality, scope.node.labels.get(LOCALITY_LABEL)) {
            (said, _) if !said.is_empty() => Cow::Borrowed(said.as_str()),
            (_, Some(label)) if label.contains('/') => Cow::Borrowed(label.as_str()),
            (_, Some(label)) if !label.is_empty() => Cow::Owned(label.replace('.', "/")),
            _ => Cow::Borrowed(known()),
        };
        Self { scope, locality }
    }

    /// The shares for clients here.
    fn shares<'s>(&self, all: &'s [LocalityShares]) -> Option<&'s LocalityShares> {
        if self.locality.is_empty() {
            return None;
        }
        all.iter()
            .find(|shares| covers(&shares.from, &self.locality))
    }

    /// 0: the same subzone; 1: zone; 2: region; 3: the region that helps; 4: another one that does not.
    fn distance(&self, failover: &[LocalityFailover], locality: &str) -> usize {
        let mut here = self.locality.splitn(3, '/');
        let mut there = locality.splitn(3, '/');
        let region = (here.next().unwrap_or(""), there.next().unwrap_or(""));
        if region.0 == region.1 {
            let mut next = || here.next().unwrap_or("") == there.next().unwrap_or("");
            return match (next(), next()) {
                (true, true) => 0,
                (true, false) => 1,
                (false, _) => 2,
            };
        }
        let helper = failover.iter().find(|failover| failover.from == region.0);
        match helper {
            Some(helper) if helper.to != region.1 => 4,
            Some(_) | None => 3,
        }
    }

    /// Whether an endpoint has the client's value of a label, or the one of `LABEL=VALUE`. Neither having it is alike.
    fn shares_label(&self, label: &str, endpoint: &Endpoint) -> bool {
        let part = |locality: &str, index: usize| {
            let part = locality.splitn(3, '/').nth(index);
            part.unwrap_or_default().to_owned()
        };
        let (label, wanted) = match label.split_once('=') {
            Some((label, wanted)) => (label, Some(wanted)),
            None => (label, None),
        };
        let node = self.scope.node;
        let workload = || self.scope.snapshot.workload(node);
        let said = |key: &str| node.metadata.get(key).cloned().unwrap_or_default();
        let (ours, theirs) = match label {
            REGION => (part(&self.locality, 0), part(&endpoint.locality, 0)),
            ZONE => (part(&self.locality, 1), part(&endpoint.locality, 1)),
            SUBZONE => (part(&self.locality, 2), part(&endpoint.locality, 2)),
            NETWORK => (said("NETWORK"), endpoint.network.clone()),
            // All endpoints are of the registry that the node is of.
            CLUSTER => (node.cluster_id.clone(), node.cluster_id.clone()),
            MACHINE => (
                match said("NODE_NAME") {
                    said if said.is_empty() => {
                        workload().map_or_else(String::new, |workload| workload.machine.clone())
                    }
                    said => said,
                },
                endpoint.machine.clone(),
            ),
            other => {
                let of = |labels: &crate::model::Labels| labels.get(other).cloned();
                (
                    of(self.scope.labels()).unwrap_or_default(),
                    of(&endpoint.labels).unwrap_or_default(),
                )
            }
        };
        wanted.unwrap_or(&ours) == theirs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_cover_what_lies_within() {
        for (pattern, locality, want) in [
            ("us", "us/a/1", true),
            ("us/*", "us/a", true),
            ("us/a/*", "us/a/1", true),
            ("us/a", "us/b", false),
            ("us/a/1", "us/a", false),
            ("*", "", true),
            ("eu", "us", false),
        ] {
            assert_eq!(covers(pattern, locality), want, "{pattern} {locality}");
        }
    }
}
