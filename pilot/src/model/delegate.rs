//! VirtualServices that delegate routes to others, made whole: each delegating route is replaced by the
//! delegate's routes, with the matches of both and what only the delegating one says.
//!
//! Istio: a delegate has no hosts, may not delegate further, must be exported to the root's namespace; where a
//! match of the delegate says other than the root's, the pair is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::networking::{HttpMatch, HttpRoute, VirtualService};
use lateen_config::{MeshConfig, Object, Spec, StringMatch};

use super::service::ExportTo;
use super::{Status, full_host};

/// Routes that one VirtualService may come to, so that delegates cannot multiply without bound.
const ROUTE_LIMIT: usize = 10_000;

/// The objects, with delegating VirtualServices replaced by whole ones.
pub(super) fn resolve(
    objects: &[Arc<Object>],
    mesh: &MeshConfig,
    status: &mut Status,
) -> Vec<Arc<Object>> {
    let delegates: BTreeMap<(&str, &str), (&Object, &VirtualService)> = objects
        .iter()
        .filter_map(|object| match &object.spec {
            Spec::VirtualService(spec) if spec.hosts.is_empty() => Some((
                (&*object.key.namespace, &*object.key.name),
                (&**object, &**spec),
            )),
            _ => None,
        })
        .collect();
    objects
        .iter()
        .map(|object| match &object.spec {
            Spec::VirtualService(spec)
                if spec.http.iter().any(|route| route.delegate.is_some()) =>
            {
                let mut whole = (**object).clone();
                whole.spec = Spec::VirtualService(Box::new(VirtualService {
                    http: http(object, spec, &delegates, mesh, status),
                    ..(**spec).clone()
                }));
                Arc::new(whole)
            }
            _ => object.clone(),
        })
        .collect()
}

fn http(
    object: &Object,
    spec: &VirtualService,
    delegates: &BTreeMap<(&str, &str), (&Object, &VirtualService)>,
    mesh: &MeshConfig,
    status: &mut Status,
) -> Vec<HttpRoute> {
    let mut all = Vec::new();
    for (index, route) in spec.http.iter().enumerate() {
        let Some(delegate) = &route.delegate else {
            all.push(route.clone());
            continue;
        };
        let namespace = match delegate.namespace.as_str() {
            "" => &*object.key.namespace,
            named => named,
        };
        let mut refuse = |why: &str| {
            status.conflicts.push(format!(
                "{}:{}: {}: delegate {namespace}/{} {why}; its routes are left out",
                object.origin.file,
                object
                    .origin
                    .line_of(&format!("spec.http[{index}].delegate")),
                object.key,
                delegate.name,
            ));
        };
        let Some((of, leaf)) = delegates.get(&(namespace, delegate.name.as_str())) else {
            refuse("is no VirtualService without hosts");
            continue;
        };
        let export_to = ExportTo::of(
            &leaf.export_to,
            namespace,
            &mesh.default_virtual_service_export_to,
        );
        if !export_to.allows(&object.key.namespace) {
            refuse("is not exported to this namespace");
            continue;
        }
        for own in leaf.http.iter().filter(|own| own.delegate.is_none()) {
            if all.len() >= ROUTE_LIMIT {
                refuse("makes more than 10,000 routes");
                break;
            }
            all.extend(merge(route, own, &of.key.namespace));
        }
    }
    all
}

/// `None` if no match of the delegate goes with one of the root's.
fn merge(root: &HttpRoute, leaf: &HttpRoute, namespace: &str) -> Option<HttpRoute> {
    let mut merged = leaf.clone();
    merged.matches = match (root.matches.as_slice(), leaf.matches.as_slice()) {
        (of_root, []) => of_root.to_vec(),
        ([], of_leaf) => of_leaf.to_vec(),
        (of_root, of_leaf) => {
            let pairs: Vec<HttpMatch> = of_root
                .iter()
                .flat_map(|root| of_leaf.iter().filter_map(move |leaf| both(root, leaf)))
                .take(ROUTE_LIMIT)
                .collect();
            if pairs.is_empty() {
                return None;
            }
            pairs
        }
    };
    merged.name = match (root.name.as_str(), leaf.name.as_str()) {
        (root, "") => root.to_owned(),
        ("", leaf) => leaf.to_owned(),
        (root, leaf) => format!("{root}-{leaf}"),
    };
    fn fill<T: Clone>(leaf: &mut Option<T>, root: &Option<T>) {
        if leaf.is_none() {
            leaf.clone_from(root);
        }
    }
    // The delegate's short hosts are of its own namespace, the root's of the root's (completed by the reader).
    for to in &mut merged.route {
        to.destination.host = full_host(&to.destination.host.to_ascii_lowercase(), namespace);
    }
    for to in merged.mirror.iter_mut().chain(
        merged
            .mirrors
            .iter_mut()
            .map(|mirror| &mut mirror.destination),
    ) {
        to.host = full_host(&to.host.to_ascii_lowercase(), namespace);
    }
    fill(&mut merged.rewrite, &root.rewrite);
    fill(&mut merged.timeout, &root.timeout);
    fill(&mut merged.retries, &root.retries);
    fill(&mut merged.fault, &root.fault);
    fill(&mut merged.cors_policy, &root.cors_policy);
    if merged.mirror.is_none() && merged.mirrors.is_empty() {
        merged.mirror.clone_from(&root.mirror);
        merged.mirrors.clone_from(&root.mirrors);
        merged.mirror_percentage = root.mirror_percentage;
        merged.mirror_percent = root.mirror_percent;
    }
    if merged.headers == Default::default() {
        merged.headers.clone_from(&root.headers);
    }
    Some(merged)
}

/// A match that demands what both demand. `None` if the delegate's is no part of the root's.
fn both(root: &HttpMatch, leaf: &HttpMatch) -> Option<HttpMatch> {
    let text = |root: &Option<StringMatch>, leaf: &Option<StringMatch>| match (root, leaf) {
        (Some(root), Some(leaf)) => within(root, leaf).then(|| Some(leaf.clone())),
        (one, None) => Some(one.clone()),
        (None, one) => Some(one.clone()),
    };
    let texts = |root: &BTreeMap<String, StringMatch>, leaf: &BTreeMap<String, StringMatch>| {
        let mut all = root.clone();
        for (name, matcher) in leaf {
            if root.get(name).is_some_and(|root| !within(root, matcher)) {
                return None;
            }
            all.insert(name.clone(), matcher.clone());
        }
        Some(all)
    };
    let equal_or_one = |root: &str, leaf: &str| match (root, leaf) {
        ("", one) | (one, "") => Some(one.to_owned()),
        (root, leaf) => (root == leaf).then(|| leaf.to_owned()),
    };
    let mut source_labels = root.source_labels.clone();
    for (name, value) in &leaf.source_labels {
        if root
            .source_labels
            .get(name)
            .is_some_and(|root| root != value)
        {
            return None;
        }
        source_labels.insert(name.clone(), value.clone());
    }
    Some(HttpMatch {
        name: match (root.name.as_str(), leaf.name.as_str()) {
            (root, "") => root.to_owned(),
            ("", leaf) => leaf.to_owned(),
            (root, leaf) => format!("{root}-{leaf}"),
        },
        uri: text(&root.uri, &leaf.uri)?,
        scheme: text(&root.scheme, &leaf.scheme)?,
        method: text(&root.method, &leaf.method)?,
        authority: text(&root.authority, &leaf.authority)?,
        headers: texts(&root.headers, &leaf.headers)?,
        without_headers: texts(&root.without_headers, &leaf.without_headers)?,
        query_params: texts(&root.query_params, &leaf.query_params)?,
        ignore_uri_case: root.ignore_uri_case || leaf.ignore_uri_case,
        port: match (root.port, leaf.port) {
            (0, one) | (one, 0) => one,
            (root, leaf) if root == leaf => leaf,
            _ => return None,
        },
        source_labels,
        source_namespace: equal_or_one(&root.source_namespace, &leaf.source_namespace)?,
        // A delegate is bound to no gateway of its own.
        gateways: root.gateways.clone(),
        stat_prefix: if leaf.stat_prefix.is_empty() {
            root.stat_prefix.clone()
        } else {
            leaf.stat_prefix.clone()
        },
    })
}

/// Whether everything that `leaf` takes, `root` takes. What expressions take is not compared, only their text.
fn within(root: &StringMatch, leaf: &StringMatch) -> bool {
    match (root, leaf) {
        (StringMatch::Present, _) => true,
        (StringMatch::Exact(root), StringMatch::Exact(leaf)) => root == leaf,
        (StringMatch::Prefix(root), StringMatch::Exact(leaf) | StringMatch::Prefix(leaf)) => {
            leaf.starts_with(root.as_str())
        }
        (StringMatch::Regex(root), StringMatch::Regex(leaf)) => root == leaf,
        _ => false,
    }
}
