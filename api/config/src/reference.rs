//! Judges objects against each other: names that nobody defines.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use crate::networking::{Destination, VirtualService};
use crate::object::{Object, Spec};
use crate::problem::{Problem, Severity};

/// A host as the object's author means it: one without dots is completed with the object's own
/// namespace, never the client's.
#[must_use]
pub fn full_host(host: &str, namespace: &str) -> String {
    if host.contains('.') || host.starts_with('*') || host.contains(':') {
        host.trim_end_matches('.').to_ascii_lowercase()
    } else {
        format!(
            "{}.{namespace}.svc.cluster.local",
            host.to_ascii_lowercase()
        )
    }
}

/// A gateway as `NAMESPACE/NAME`; `mesh` stays. `NAME.NAMESPACE.svc.cluster.local` is the oldest form.
#[must_use]
pub fn full_gateway(name: &str, namespace: &str) -> String {
    if name == "mesh" || name.contains('/') {
        return name.to_owned();
    }
    match name.split_once('.') {
        Some((name, rest)) => {
            let namespace = rest.split('.').next().unwrap_or(namespace);
            format!("{namespace}/{name}")
        }
        None => format!("{namespace}/{name}"),
    }
}

/// Every destination of a VirtualService with the path of its field.
pub fn destinations(service: &VirtualService) -> impl Iterator<Item = (String, &Destination)> {
    let http = service.http.iter().enumerate().flat_map(|(index, route)| {
        let path = format!("spec.http[{index}]");
        let to = path.clone();
        route
            .route
            .iter()
            .enumerate()
            .map(move |(index, weighted)| {
                (
                    format!("{to}.route[{index}].destination"),
                    &weighted.destination,
                )
            })
            .chain(route.mirror.iter().map({
                let path = path.clone();
                move |mirror| (format!("{path}.mirror"), mirror)
            }))
            .chain(
                route
                    .mirrors
                    .iter()
                    .enumerate()
                    .map(move |(index, mirror)| {
                        (
                            format!("{path}.mirrors[{index}].destination"),
                            &mirror.destination,
                        )
                    }),
            )
            .collect::<Vec<_>>()
    });
    let tcp = service
        .tls
        .iter()
        .map(|route| &route.route)
        .enumerate()
        .map(|(index, route)| (format!("spec.tls[{index}]"), route))
        .chain(
            service
                .tcp
                .iter()
                .map(|route| &route.route)
                .enumerate()
                .map(|(index, route)| (format!("spec.tcp[{index}]"), route)),
        )
        .flat_map(|(path, route)| {
            route
                .iter()
                .enumerate()
                .map(|(index, weighted)| {
                    (
                        format!("{path}.route[{index}].destination"),
                        &weighted.destination,
                    )
                })
                .collect::<Vec<_>>()
        });
    http.chain(tcp)
}

/// The subsets every DestinationRule defines, by full host.
#[derive(Clone, Debug, Default)]
pub struct Subsets(BTreeMap<String, BTreeSet<String>>);

impl Subsets {
    /// Of these objects.
    pub fn of<'a>(objects: impl IntoIterator<Item = &'a Object>) -> Self {
        let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for object in objects {
            if let Spec::DestinationRule(rule) = &object.spec {
                all.entry(full_host(&rule.host, &object.key.namespace))
                    .or_default()
                    .extend(rule.subsets.iter().map(|subset| subset.name.clone()));
            }
        }
        Self(all)
    }

    /// Whether some rule for `host` (or a wildcard over it) defines `subset`.
    #[must_use]
    pub fn defines(&self, host: &str, subset: &str) -> bool {
        self.0.iter().any(|(rule_host, subsets)| {
            subsets.contains(subset)
                && (rule_host == host
                    || rule_host
                        .strip_prefix('*')
                        .is_some_and(|suffix| host.ends_with(suffix)))
        })
    }

    /// What is defined for `host`, for hints.
    fn listed(&self, host: &str) -> String {
        match self.0.get(host) {
            None => format!("no DestinationRule for {host} is there; apply it first"),
            Some(subsets) if subsets.is_empty() => {
                format!("the DestinationRule for {host} has no subsets")
            }
            Some(subsets) => {
                format!(
                    "subsets of {host} are {}",
                    subsets.iter().cloned().collect::<Vec<_>>().join(", ")
                )
            }
        }
    }
}

/// The subsets one VirtualService names that nobody defines.
#[must_use]
pub fn undefined_subsets(object: &Object, subsets: &Subsets) -> Vec<Problem> {
    let Spec::VirtualService(service) = &object.spec else {
        return Vec::new();
    };
    destinations(service)
        .filter(|(_, to)| !to.subset.is_empty())
        .filter_map(|(path, to)| {
            let host = full_host(&to.host, &object.key.namespace);
            (!subsets.defines(&host, &to.subset)).then(|| {
                object.problem(
                    Severity::Error,
                    format!("{path}.subset"),
                    format!("subset {:?} of {host} is not defined", to.subset),
                    subsets.listed(&host),
                )
            })
        })
        .collect()
}

/// Names that nobody defines: subsets (errors: requests would have nowhere to go), gateways and
/// QuotaSpecs (warnings: they may still come).
#[must_use]
pub fn check_references<O: Borrow<Object>>(objects: &[O]) -> Vec<Problem> {
    let subsets = Subsets::of(objects.iter().map(Borrow::borrow));
    let gateways: BTreeSet<String> = names(objects, "Gateway");
    let quotas: BTreeSet<String> = names(objects, "QuotaSpec");
    let mut problems = Vec::new();
    for object in objects.iter().map(Borrow::borrow) {
        let namespace = &object.key.namespace;
        match &object.spec {
            Spec::VirtualService(service) => {
                problems.extend(undefined_subsets(object, &subsets));
                for (index, gateway) in service.gateways.iter().enumerate() {
                    let full = full_gateway(gateway, namespace);
                    if full != "mesh" && !gateways.contains(&full) {
                        problems.push(object.problem(
                            Severity::Warning,
                            format!("spec.gateways[{index}]"),
                            format!("gateway {full} is not defined"),
                            "the routes have no effect there until it is",
                        ));
                    }
                }
            }
            Spec::QuotaSpecBinding(binding) => {
                for (index, spec) in binding.quota_specs.iter().enumerate() {
                    let of = if spec.namespace.is_empty() {
                        namespace
                    } else {
                        spec.namespace.as_str()
                    };
                    let full = format!("{of}/{}", spec.name);
                    if !quotas.contains(&full) {
                        problems.push(object.problem(
                            Severity::Warning,
                            format!("spec.quotaSpecs[{index}]"),
                            format!("QuotaSpec {full} is not defined"),
                            "nothing is charged until it is",
                        ));
                    }
                }
            }
            _ => {}
        }
    }
    problems
}

fn names<O: Borrow<Object>>(objects: &[O], kind: &str) -> BTreeSet<String> {
    objects
        .iter()
        .map(Borrow::borrow)
        .filter(|object| &*object.key.kind == kind)
        .map(|object| format!("{}/{}", object.key.namespace, object.key.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse_file;

    const TEXT: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: reviews }
spec:
  hosts: [reviews]
  gateways: [mesh, front, other/back]
  http:
  - route:
    - destination: { host: reviews, subset: v1 }
    - destination: { host: reviews.default.svc.cluster.local, subset: v9 }
      weight: 1
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: reviews }
spec: { host: reviews, subsets: [{ name: v1, labels: { version: v1 } }] }
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: front }
spec: { servers: [{ port: { number: 80, protocol: HTTP, name: http }, hosts: ['*'] }] }
";

    #[test]
    fn undefined_names_are_reported_at_their_line() {
        let (objects, problems) = parse_file("r.yaml", TEXT);
        assert_eq!(problems, []);
        let found: Vec<String> = check_references(&objects)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            found,
            [
                "r.yaml:11: VirtualService default/reviews: spec.http[0].route[1].destination.subset: \
                 subset \"v9\" of reviews.default.svc.cluster.local is not defined (subsets of reviews.default.svc.cluster.local are v1)",
                "r.yaml:7: VirtualService default/reviews: spec.gateways[2]: gateway other/back is not defined \
                 (the routes have no effect there until it is)",
            ]
        );
    }
}
