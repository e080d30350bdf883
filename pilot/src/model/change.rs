//! What a snapshot has in common with the one before. The most frequent change by far, endpoints that come and go,
//! needs neither listeners nor routes nor clusters to be computed again.

use std::collections::BTreeSet;
use std::sync::Arc;

use lateen_config::{Object, Spec};

use super::{Endpoint, Labels, Resolution, Service, Snapshot};

impl Snapshot {
    /// Host names of the services whose endpoints are not those of `before`, provided that what any node gets differs
    /// in nothing but load assignments of theirs. `None`: more may differ, and everything is to be computed.
    ///
    /// Beside load assignments, endpoints are read by DNS clusters, by listeners of headless services, by inbound
    /// ports of services without selector, and for the identities that clusters accept: a change that reaches these
    /// is not one of endpoints only.
    #[must_use]
    pub fn changed_endpoints(&self, before: &Snapshot) -> Option<Vec<Arc<str>>> {
        let alike = self.reach == before.reach
            && self.credentials == before.credentials
            && self.services == before.services
            && self.workloads == before.workloads
            && same_objects(&self.objects, &before.objects);
        if !alike {
            return None;
        }
        let none = Default::default();
        let mut changed = Vec::new();
        let hosts: BTreeSet<&Arc<str>> = self
            .endpoints
            .keys()
            .chain(before.endpoints.keys())
            .collect();
        for host in hosts {
            let now = self.endpoints.get(host).unwrap_or(&none);
            let then = before.endpoints.get(host).unwrap_or(&none);
            if now == then {
                continue;
            }
            if !self
                .service(host)
                .is_some_and(|service| is_told_by_assignments(service))
            {
                return None;
            }
            let ports: BTreeSet<u16> = now.keys().chain(then.keys()).copied().collect();
            for port in ports {
                if identities(self.endpoints(host, port))
                    != identities(before.endpoints(host, port))
                {
                    return None;
                }
            }
            changed.push(host.clone());
        }
        Some(changed)
    }
}

/// Whether nothing but load assignments says who answers for a service.
fn is_told_by_assignments(service: &Service) -> bool {
    service.resolution == Resolution::Endpoints && !service.headless && !service.selector.is_empty()
}

/// What clusters of any subset can read: who the endpoints are, not where or how many.
fn identities(endpoints: &[Arc<Endpoint>]) -> BTreeSet<(&Labels, Option<&str>)> {
    endpoints
        .iter()
        .map(|endpoint| (&*endpoint.labels, endpoint.spiffe_id.as_deref()))
        .collect()
}

/// Whether all objects but EndpointSlices are the same, written in the same place: messages name it.
fn same_objects(now: &[Arc<Object>], before: &[Arc<Object>]) -> bool {
    let others = |all: &[Arc<Object>]| {
        all.iter()
            .filter(|object| !matches!(object.spec, Spec::EndpointSlice(_)))
            .cloned()
            .collect::<Vec<_>>()
    };
    let (now, before) = (others(now), others(before));
    now.len() == before.len()
        && now.iter().zip(&before).all(|(now, before)| {
            Arc::ptr_eq(now, before)
                || (now.same_content(before)
                    && now.created == before.created
                    && now.version == before.version
                    && now.origin == before.origin)
        })
}
