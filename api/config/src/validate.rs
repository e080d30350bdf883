//! Judges one object by itself: what parses may still make no sense, or more than we can serve.
//!
//! The rules are the API's ([`crate::review`]); what this version of Pilot leaves out of an object that is
//! right is said here, by warnings. What needs other objects is in [`crate::reference`].

use std::collections::BTreeSet;

use crate::kubernetes::Service;
use crate::object::{Object, Spec};
use crate::problem::{Problem, Severity};
use crate::review::{self, At, Subject};

/// Everything wrong with an object taken alone.
#[must_use]
pub fn validate(object: &Object) -> Vec<Problem> {
    if let Spec::Service(service) = &object.spec {
        return self::service(object, service);
    }
    let message = review::schema::message_of(&object.key.group, &object.key.kind);
    if message.is_none() && !matches!(object.spec, Spec::GatewayApi(_)) {
        // Mixer's objects are judged where their adapters and templates are known; the rest of
        // Kubernetes' kinds have passed an API server, or are only read in part.
        return Vec::new();
    }
    let subject = Subject {
        group: &object.key.group,
        kind: &object.key.kind,
        namespace: &object.key.namespace,
        name: &object.key.name,
        annotations: &object.annotations,
    };
    let (spec, mut findings) = match message {
        Some(message) => review::schema::normal(message, &object.raw, "spec"),
        // Its shape has been checked when it was read.
        None => ((*object.raw).clone(), Vec::new()),
    };
    findings.extend(review::rules(&subject, &spec));
    let mut problems: Vec<Problem> = findings
        .into_iter()
        .map(|finding| {
            object.problem(
                finding.severity,
                finding.field,
                finding.reason,
                finding.hint,
            )
        })
        .collect();
    for (field, reason) in unread_patches(&object.spec) {
        problems.push(object.problem(Severity::Warning, field, reason, ""));
    }
    for (at, reason) in not_served(&object.spec, &At::new(&spec, "spec")) {
        problems.push(object.problem(Severity::Warning, at.path, reason, ""));
    }
    problems
}

const IGNORED: &str = "not supported by this version; ignored";

/// Values that the API lets in and that cannot be read whole.
fn unread_patches(kind: &Spec) -> impl Iterator<Item = (String, String)> {
    let patches = match kind {
        Spec::EnvoyFilter(filter) => filter.config_patches.as_slice(),
        _ => &[],
    };
    patches.iter().enumerate().filter_map(|(index, patch)| {
        let fault = patch.patch.fault.as_ref()?;
        Some((
            format!("spec.configPatches[{index}].patch.value"),
            format!("the patch is NOT applied: the value {fault}"),
        ))
    })
}

/// Fields that are right and without effect here.
fn not_served<'a>(kind: &Spec, spec: &At<'a>) -> Vec<(At<'a>, &'static str)> {
    let mut all = Vec::new();
    match kind {
        Spec::VirtualService(_) => {
            for route in spec.get("http").items() {
                let headers = route.get("match").items().flat_map(|matcher| {
                    let without = matcher.get("withoutHeaders");
                    matcher
                        .get("headers")
                        .entries()
                        .chain(without.entries())
                        .collect::<Vec<_>>()
                });
                for (_, header) in headers.filter(|(name, _)| name.starts_with("@request.auth.")) {
                    all.push((
                        header,
                        "routing by claims is not supported by this version; never matches",
                    ));
                }
            }
        }
        Spec::DestinationRule(_) => {
            let subsets = spec
                .get("subsets")
                .items()
                .map(|subset| subset.get("trafficPolicy"));
            for policy in std::iter::once(spec.get("trafficPolicy")).chain(subsets) {
                for name in ["tunnel", "proxyProtocol"] {
                    all.push((policy.get(name), IGNORED));
                }
            }
        }
        Spec::ServiceEntry(_) if spec.str("resolution") == "DYNAMIC_DNS" => {
            all.push((
                spec.get("resolution"),
                "DYNAMIC_DNS is not supported by this version; the hosts have no endpoints",
            ));
        }
        Spec::Sidecar(_) => {
            for listener in spec.get("egress").items() {
                all.push((listener.get("port"), IGNORED));
            }
            for listener in spec.get("ingress").items() {
                for name in ["bind", "tls", "connectionPool"] {
                    all.push((listener.get(name), IGNORED));
                }
                if listener.str("captureMode") == "NONE" {
                    all.push((listener.get("captureMode"), IGNORED));
                }
            }
        }
        Spec::EnvoyFilter(_) => {
            all.extend(waypoints(spec));
            for patch in spec.get("configPatches").items() {
                let matches = patch.get("match");
                all.push((
                    matches.get("waypoint"),
                    "this version has no waypoints; the patch is NOT applied",
                ));
                if patch.str("applyTo") == "BOOTSTRAP" {
                    all.push((
                        patch.get("applyTo"),
                        "Pilot makes no bootstraps; the patch is NOT applied",
                    ));
                }
                all.push((patch.get("patch").get("filterClass"), IGNORED));
            }
        }
        Spec::Telemetry(_) => {
            all.extend(waypoints(spec));
            for entry in spec.get("tracing").items() {
                for name in ["useRequestIdForTraceSampling", "enableIstioTags"] {
                    all.push((entry.get(name), IGNORED));
                }
            }
            for entry in spec.get("metrics").items() {
                for change in entry.get("overrides").items() {
                    all.push((
                        change,
                        "not supported by this version; metrics are made by Mixer's rules: change those",
                    ));
                }
                all.push((entry.get("reportingInterval"), IGNORED));
            }
        }
        Spec::AuthorizationPolicy(_) => {
            all.extend(waypoints(spec));
        }
        Spec::RequestAuthentication(_) => {
            all.extend(waypoints(spec));
            for rule in spec.get("jwtRules").items() {
                if !rule.has("jwks") && !rule.has("jwksUri") {
                    all.push((
                        rule,
                        "the issuer is not asked for its keys by this version: all its tokens are refused; write jwks or jwksUri",
                    ));
                }
            }
        }
        Spec::AuthenticationPolicy(_) => {
            for peer in spec.get("peers").items() {
                all.push((
                    peer.get("jwt"),
                    "NOT enforced, as in Istio; write it in origins",
                ));
            }
            for origin in spec.get("origins").items() {
                all.push((
                    origin.get("jwt").get("triggerRules"),
                    "not supported by this version; a token is demanded on every path",
                ));
            }
        }
        _ => {}
    }
    all.retain(|(at, _)| at.is_set());
    all
}

/// Targets other than Gateways are for waypoints.
fn waypoints<'a>(spec: &At<'a>) -> Vec<(At<'a>, &'static str)> {
    std::iter::once(spec.get("targetRef"))
        .chain(spec.get("targetRefs").items())
        .filter(|target| target.is_set() && target.str("kind") != "Gateway")
        .map(|target| {
            (
                target,
                "the policy is NOT enforced there: this version has no waypoints; select workloads, or name a Gateway",
            )
        })
        .collect()
}

/// A Kubernetes Service: its ports.
fn service(object: &Object, spec: &Service) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let mut wrong = |reason: String| {
            let field = format!("spec.ports[{index}].port");
            problems.push(object.problem(Severity::Error, field, reason, ""));
        };
        if port.port == 0 {
            wrong("port 0 is not between 1 and 65535".into());
        }
        if !seen.insert((port.port, port.protocol.to_ascii_uppercase())) {
            wrong(format!("{} is there twice", port.port));
        }
    }
    problems
}

#[cfg(test)]
mod tests;
