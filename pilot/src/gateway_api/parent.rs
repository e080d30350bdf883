//! What routes attach to: listeners, or the mesh for a Service; and what their status says of it.

use std::sync::Arc;

use lateen_config::Object;
use lateen_config::gateway_api::{GROUP, ParentReference};
use serde_json::{Value, json};

use super::Fault;
use super::attached::{Listeners, Owner, Parent};
use super::status::{Condition, conditions};
use super::world::{CONTROLLER, World, target};

/// A route, whatever its kind.
#[derive(Clone, Copy)]
pub(super) struct RouteOf<'a> {
    pub(super) object: &'a Object,
    pub(super) kind: &'static str,
    pub(super) parents: &'a [ParentReference],
    pub(super) hostnames: &'a [String],
    pub(super) status: &'a Value,
}

impl RouteOf<'_> {
    pub(super) fn namespace(&self) -> &str {
        &self.object.key.namespace
    }
}

/// A route's reference to one listener, or to the mesh.
pub(super) struct Bound<'a> {
    pub(super) reference: &'a ParentReference,
    pub(super) to: To,
    /// Why it does not attach.
    pub(super) denied: Option<Fault>,
    /// `NAMESPACE/NAME` of the Istio Gateway, or `mesh`.
    pub(super) internal: String,
    /// Host name of the listener; empty for all.
    hostname: String,
    /// Host names of the Gateway's other listeners of that port and protocol.
    others: Arc<Vec<String>>,
}

/// What it is a reference to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// A listener, by its place.
    Listener(usize),
    /// Requests to a Service in the mesh.
    Service,
    /// Requests to a ServiceEntry's hosts.
    ServiceEntry,
}

impl Bound<'_> {
    pub(super) fn is_mesh(&self) -> bool {
        !matches!(self.to, To::Listener(_))
    }

    /// Whether a route's host is this listener's, and not that of one whose host name fits it better.
    pub(super) fn serves(&self, host: &str) -> bool {
        if self.is_mesh() || !self.hostname.is_empty() && !self.hostname.starts_with('*') {
            return true;
        }
        if !self.hostname.is_empty() && !matches(host, &self.hostname) {
            return false;
        }
        !self
            .others
            .iter()
            .any(|other| other.len() >= self.hostname.len() && is_within(host, other))
    }
}

/// All parents of a route that are ours; several for a Gateway whose listeners it does not choose from.
pub(super) fn of<'a>(
    world: &World<'_>,
    listeners: &Listeners<'_>,
    route: &RouteOf<'a>,
) -> Vec<Bound<'a>> {
    let mut all = Vec::new();
    for reference in route.parents {
        let namespace = reference.namespace.as_deref().unwrap_or(route.namespace());
        let (group, kind) = target(&reference.group, &reference.kind, (GROUP, "Gateway"));
        let mesh = |to: To, there: bool, what: &str| Bound {
            reference,
            to,
            denied: (!there).then(|| {
                Fault::new(
                    "NoMatchingParent",
                    format!("parent {what}: {:?} not found", reference.name),
                )
            }),
            internal: "mesh".to_owned(),
            hostname: String::new(),
            others: Arc::default(),
        };
        let owner: Owner = match (group, kind) {
            (GROUP, "Gateway") => ("Gateway", namespace.to_owned(), reference.name.clone()),
            (GROUP, "ListenerSet") => ("ListenerSet", namespace.to_owned(), reference.name.clone()),
            ("", "Service") => {
                let host = world.host(&reference.name, namespace);
                all.push(mesh(To::Service, world.service(&host).is_some(), "service"));
                continue;
            }
            ("networking.istio.io", "ServiceEntry") => {
                let there = world.entry(namespace, &reference.name).is_some();
                all.push(mesh(To::ServiceEntry, there, "service entry"));
                continue;
            }
            // For another controller, perhaps.
            _ => continue,
        };
        let parents = listeners.of(&owner).iter();
        for (place, parent) in
            parents.filter_map(|place| Some((*place, listeners.parents.get(*place)?)))
        {
            all.push(Bound {
                reference,
                to: To::Listener(place),
                denied: denied(parent, reference, route),
                internal: parent.internal.clone(),
                hostname: parent.hostname.clone(),
                others: parent.others.clone(),
            });
        }
    }
    all.sort_by_key(|bound| shown(bound.reference, route.namespace()));
    all
}

/// Those that it attaches to, by the name of the Istio Gateway.
pub(super) fn attached<'b, 'a>(all: &'b [Bound<'a>]) -> Vec<&'b Bound<'a>> {
    let mut attached: Vec<&Bound<'a>> = all.iter().filter(|bound| bound.denied.is_none()).collect();
    attached.sort_by(|a, b| a.internal.cmp(&b.internal));
    attached
}

/// Why a listener does not take a route.
fn denied(parent: &Parent, reference: &ParentReference, route: &RouteOf<'_>) -> Option<Fault> {
    if let Some(port) = reference.port
        && u32::from(port) != parent.port
    {
        return Some(Fault::new(
            "NoMatchingParent",
            format!("port {port} not found"),
        ));
    }
    if let Some(section) = &reference.section_name
        && !section.is_empty()
        && *section != parent.section
    {
        return Some(Fault::new(
            "NoMatchingParent",
            format!("sectionName {section:?} not found"),
        ));
    }
    let any = ["*".to_owned()];
    let hostnames = if route.hostnames.is_empty() {
        &any[..]
    } else {
        route.hostnames
    };
    let mut host_fits = false;
    let mut both_fit = false;
    for (namespace, host) in &parent.hosts {
        let fits = hostnames.iter().any(|hostname| matches(host, hostname));
        host_fits |= fits;
        both_fit |= fits && (namespace == "*" || namespace == route.namespace());
    }
    if !host_fits {
        return Some(Fault::new(
            "NoMatchingListenerHostname",
            format!("no hostnames matched parent hostname {:?}", parent.hostname),
        ));
    }
    if !both_fit {
        return Some(Fault::new(
            "NotAllowedByListeners",
            format!(
                "hostnames matched parent hostname {:?}, but namespace {:?} is not allowed by the parent",
                parent.hostname,
                route.namespace()
            ),
        ));
    }
    if !parent.kinds.contains(&route.kind) {
        let version = match route.kind {
            "TCPRoute" => "v1alpha2",
            _ => "v1",
        };
        return Some(Fault::new(
            "NotAllowedByListeners",
            format!("kind {GROUP}/{version}/{} is not allowed", route.kind),
        ));
    }
    None
}

/// Gateway API: host names and wildcards that have something in common.
pub(super) fn matches(one: &str, other: &str) -> bool {
    match (one.strip_prefix('*'), other.strip_prefix('*')) {
        (Some(one), Some(other)) => one.ends_with(other) || other.ends_with(one),
        (Some(suffix), None) => other.ends_with(suffix),
        (None, Some(suffix)) => one.ends_with(suffix),
        (None, None) => one == other,
    }
}

/// Whether everything that `narrow` is, `wide` is too.
fn is_within(narrow: &str, wide: &str) -> bool {
    match (narrow.strip_prefix('*'), wide.strip_prefix('*')) {
        (Some(narrow), Some(wide)) => narrow.ends_with(wide),
        (Some(_), None) => false,
        (None, Some(suffix)) => narrow.ends_with(suffix),
        (None, None) => narrow == wide,
    }
}

/// A reference with its defaults, for comparison.
fn shown(reference: &ParentReference, namespace: &str) -> String {
    format!(
        "{}/{}/{}/{}/{}.{}",
        reference.group.as_deref().unwrap_or(GROUP),
        reference.kind.as_deref().unwrap_or("Gateway"),
        reference.name,
        reference.section_name.as_deref().unwrap_or_default(),
        reference.port.unwrap_or_default(),
        reference.namespace.as_deref().unwrap_or(namespace),
    )
}

/// How near a reference has come to being attached, the nearest first: what is said of it is the nearest.
fn rank(fault: Option<&Fault>) -> usize {
    match fault.map(|fault| fault.reason) {
        None => 0,
        Some("NotAllowedByListeners") => 1,
        Some("NoMatchingListenerHostname") => 2,
        Some(_) => 3,
    }
}

/// A route's status: an entry for each of its references that is ours, those of other controllers as they were.
/// `fault` is what is wrong with the route itself, as seen from the mesh or from gateways. Also what there is to
/// complain about.
pub(super) fn status(
    route: &RouteOf<'_>,
    bound: &[Bound<'_>],
    fault: impl Fn(bool) -> Option<Fault>,
) -> (Value, Vec<String>) {
    let namespace = route.namespace();
    let before = route
        .status
        .get("parents")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let key_of = |entry: &Value| -> Option<String> {
        let reference: ParentReference = serde_json::from_value(entry["parentRef"].clone()).ok()?;
        Some(shown(&reference, namespace))
    };
    let is_ours = |entry: &Value| entry["controllerName"] == CONTROLLER;
    let mut keys: Vec<String> = Vec::new();
    let mut ours: Vec<(String, Value)> = Vec::new();
    let mut complaints = Vec::new();
    for one in bound {
        let key = shown(one.reference, namespace);
        if keys.contains(&key) {
            continue;
        }
        keys.push(key.clone());
        let same: Vec<&Bound<'_>> = bound
            .iter()
            .filter(|other| shown(other.reference, namespace) == key)
            .collect();
        let successes = same.iter().filter(|bound| bound.denied.is_none()).count();
        let nearest = same
            .iter()
            .map(|bound| rank(bound.denied.as_ref()))
            .min()
            .unwrap_or_default();
        let denied = same
            .iter()
            .filter(|bound| rank(bound.denied.as_ref()) == nearest)
            .fold(None, |all, bound| Fault::join(all, bound.denied.clone()));
        let message = match successes {
            0 | 1 => "Route was valid".to_owned(),
            several => format!("Route was valid, bound to {several} parents"),
        };
        let of_route = fault(one.is_mesh());
        complaints.extend(
            denied
                .iter()
                .chain(&of_route)
                .map(|fault| fault.message.clone()),
        );
        let said = vec![
            Condition::new("Accepted", "Accepted", message).fault(denied),
            Condition::new("ResolvedRefs", "ResolvedRefs", "All references resolved")
                .fault(of_route),
        ];
        let there = before
            .iter()
            .find(|entry| is_ours(entry) && key_of(entry).as_ref() == Some(&key));
        let conditions = conditions(
            there.map_or(&Value::Null, |there| &there["conditions"]),
            said,
        );
        let value = json!({
            "parentRef": one.reference,
            "controllerName": CONTROLLER,
            "conditions": conditions,
        });
        ours.push((key, value));
    }
    let mut parents = Vec::new();
    for entry in before {
        if !is_ours(entry) {
            parents.push(entry.clone());
        } else if let Some(key) = key_of(entry)
            && let Some(place) = ours.iter().position(|(own, _)| *own == key)
        {
            parents.push(ours.remove(place).1);
        }
    }
    ours.sort_by(|a, b| b.0.cmp(&a.0));
    parents.extend(ours.into_iter().map(|(_, value)| value));
    (json!({ "parents": parents }), complaints)
}
