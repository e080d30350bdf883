//! EnvoyFilters: patches of what has been translated, in Istio's order and by its rules.
//!
//! [`apply`] → [`listener`] (filter chains, filters and the routes within them), [`route`], clusters, extensions.
//! [`merge`] is how a value and what is there become one.
//!
//! A patch either changes what it matches to something that can be decoded, or nothing: what is wrong, and what
//! matches nothing, is noted for the node with file and line. What stands on the patched resources must find
//! them, so their names do not change.

mod merge;
mod listener;
mod route;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, btree_map::Entry};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use lateen_config::envoy_filter::{
    ApplyTo, ClusterMatch, ConfigPatch, PatchContext, PatchOperation, ProxyMatch,
};
use lateen_config::{Object, Spec};
use prost::{Message, Name};

use crate::model::{Agent, Node, Role};

use self::merge::merged;
use super::names::{self, Outbound};
use super::{Resources, Scope};

/// Most bytes that patches may add to what one node gets.
const GROWTH_LIMIT: usize = 16 * 1024 * 1024;

/// Most patches of one node.
const PATCHES_LIMIT: usize = 4096;

/// Changes resources as the EnvoyFilters of the node say.
pub(super) fn apply(scope: &Scope<'_>, resources: &mut Resources) {
    let patches = Patches::of(scope);
    if patches.all.is_empty() {
        return;
    }
    patches.extensions(&mut resources.extensions);
    patches.clusters(&mut resources.clusters);
    patches.listeners(&mut resources.listeners, &resources.extensions);
    patches.routes(&mut resources.routes);
    for patch in &patches.all {
        if !patch.used.get() {
            scope.note(format!("{} matches nothing of this node", patch.place));
        }
    }
    for note in patches.notes.take() {
        scope.note(note);
    }
}

/// The patches of one node, in the order in which they apply.
struct Patches<'a> {
    all: Vec<Patch<'a>>,
    role: Role,
    agent: Agent,
    notes: RefCell<Vec<String>>,
    /// Bytes that may still be added.
    room: Cell<usize>,
}

struct Patch<'a> {
    /// File, line, object and field.
    place: String,
    config: &'a ConfigPatch,
    /// Whether it has found something to change.
    used: Cell<bool>,
}

impl Patch<'_> {
    fn operation(&self) -> PatchOperation {
        self.config.patch.operation
    }

    /// Whether its context is this one.
    fn is_in(&self, context: PatchContext) -> bool {
        let wanted = self.config.matches.context;
        wanted == PatchContext::Any || wanted == context
    }
}

impl<'a> Patches<'a> {
    fn of(scope: &'a Scope<'_>) -> Self {
        let node = scope.node;
        let root = scope.snapshot.mesh().root_namespace.as_str();
        let mut objects: Vec<(&Object, _)> = scope
            .snapshot
            .envoy_filters(&node.namespace, scope.labels())
            .filter_map(|object| match &object.spec {
                Spec::EnvoyFilter(filter) => Some((object, filter)),
                _ => None,
            })
            .collect();
        objects.sort_by_key(|(object, filter)| {
            let of_root = &*object.key.namespace == root;
            (filter.priority, !of_root, &object.created, &object.key)
        });
        let mut all = Vec::new();
        for (object, filter) in objects {
            for (index, config) in filter.config_patches.iter().enumerate() {
                let usable = config.patch.fault.is_none()
                    && config.matches.waypoint.is_none()
                    && !matches!(config.apply_to, ApplyTo::Bootstrap | ApplyTo::Invalid);
                if usable && is_for(config, node) {
                    let field = format!("spec.configPatches[{index}]");
                    let place = format!(
                        "{}:{}: {}: {field}",
                        object.origin.file,
                        object.origin.line_of(&field),
                        object.key,
                    );
                    all.push(Patch {
                        place,
                        config,
                        used: Cell::new(false),
                    });
                }
            }
        }
        let notes = RefCell::default();
        if all.len() > PATCHES_LIMIT {
            all.truncate(PATCHES_LIMIT);
            scope.note(format!(
                "more than {PATCHES_LIMIT} patches of EnvoyFilters: the last ones are not applied"
            ));
        }
        Self {
            all,
            role: node.role,
            agent: node.agent,
            notes,
            room: Cell::new(GROWTH_LIMIT),
        }
    }

    /// Patches of a kind for a context.
    fn to(&self, kind: ApplyTo, context: PatchContext) -> impl Iterator<Item = &Patch<'a>> {
        self.all
            .iter()
            .filter(move |patch| patch.config.apply_to == kind && patch.is_in(context))
    }

    fn note(&self, patch: &Patch<'_>, why: impl std::fmt::Display) {
        // It has been told, so it need not be told that it matches nothing.
        patch.used.set(true);
        self.notes
            .borrow_mut()
            .push(format!("{}: not applied: {why}", patch.place));
    }

    /// Whether a patch may add its value once more.
    fn has_room(&self, patch: &Patch<'_>) -> bool {
        let size = patch.config.patch.encoded.len();
        match self.room.get().checked_sub(size) {
            Some(left) => {
                self.room.set(left);
                true
            }
            None => {
                self.note(
                    patch,
                    format_args!("patches add more than {GROWTH_LIMIT} bytes"),
                );
                false
            }
        }
    }

    /// A patch's value.
    fn value<M: Message + Default>(&self, patch: &Patch<'_>) -> Option<M> {
        if !self.has_room(patch) {
            return None;
        }
        match M::decode(patch.config.patch.encoded.as_slice()) {
            Ok(value) => Some(value),
            Err(error) => {
                self.note(patch, error);
                None
            }
        }
    }

    /// Merges a patch's value into a message, unless `refuse` gives a reason against what comes of it.
    fn merge<M: Message + Name + Default>(
        &self,
        patch: &Patch<'_>,
        message: &mut M,
        refuse: impl Fn(&M, &M) -> Option<String>,
    ) {
        patch.used.set(true);
        if !self.has_room(patch) {
            return;
        }
        match merged(message, &patch.config.patch.encoded) {
            Ok(new) => match refuse(message, &new) {
                Some(why) => self.note(patch, why),
                None => *message = new,
            },
            Err(why) => self.note(patch, why),
        }
    }

    /// Puts values into a list as the patches of a kind say which are for it and do: ADD, INSERT and REPLACE.
    /// `find` says before or after which item, if a patch names one: `Some(None)` if it is not there.
    fn insert<T: Message + Default>(
        &self,
        patches: &[&Patch<'a>],
        list: &mut Vec<T>,
        find: impl Fn(&Patch<'a>, &[T]) -> Option<Option<usize>>,
        prepare: impl Fn(T) -> T,
    ) {
        for patch in patches {
            let place = match (patch.operation(), find(patch, list)) {
                (PatchOperation::Add, _) => list.len(),
                (PatchOperation::InsertFirst, _) | (PatchOperation::InsertBefore, None) => 0,
                (PatchOperation::InsertAfter, None) => list.len(),
                (PatchOperation::InsertBefore | PatchOperation::Replace, Some(Some(at))) => at,
                (PatchOperation::InsertAfter, Some(Some(at))) => at + 1,
                _ => continue,
            };
            let Some(value) = self.value(patch) else {
                continue;
            };
            let value = prepare(value);
            patch.used.set(true);
            match list.get_mut(place) {
                Some(there) if patch.operation() == PatchOperation::Replace => *there = value,
                _ => list.insert(place.min(list.len()), value),
            }
        }
    }

    fn clusters(&self, clusters: &mut BTreeMap<String, Cluster>) {
        clusters.retain(|name, cluster| {
            for patch in self.to(ApplyTo::Cluster, self.context_of_cluster(name)) {
                if !cluster_fits(patch.config.matches.cluster.as_ref(), name) {
                    continue;
                }
                match patch.operation() {
                    PatchOperation::Remove => {
                        patch.used.set(true);
                        return false;
                    }
                    PatchOperation::Merge => self.merge(patch, cluster, |old, new| {
                        (old.name != new.name).then(|| renames("cluster", &old.name))
                    }),
                    _ => {}
                }
            }
            true
        });
        for patch in self.added(ApplyTo::Cluster) {
            if let Some(cluster) = self.value::<Cluster>(patch) {
                self.add(patch, clusters, cluster.name.clone(), cluster);
            }
        }
    }

    /// Patches of operation ADD that bring a resource of their own.
    fn added(&self, kind: ApplyTo) -> impl Iterator<Item = &Patch<'a>> {
        self.all.iter().filter(move |patch| {
            patch.config.apply_to == kind
                && patch.operation() == PatchOperation::Add
                && match self.role {
                    Role::Router => patch.is_in(PatchContext::Gateway),
                    _ => {
                        patch.is_in(PatchContext::SidecarInbound)
                            || patch.is_in(PatchContext::SidecarOutbound)
                    }
                }
        })
    }

    fn add<T>(&self, patch: &Patch<'_>, all: &mut BTreeMap<String, T>, name: String, value: T) {
        patch.used.set(true);
        if name.is_empty() {
            return self.note(patch, "it has no name");
        }
        match all.entry(name) {
            Entry::Vacant(free) => {
                free.insert(value);
            }
            Entry::Occupied(there) => self.note(
                patch,
                format_args!("there is one of name {:?} already", there.key()),
            ),
        }
    }

    fn extensions(&self, extensions: &mut BTreeMap<String, TypedExtensionConfig>) {
        for patch in self.added(ApplyTo::ExtensionConfig) {
            if let Some(extension) = self.value::<TypedExtensionConfig>(patch) {
                self.add(patch, extensions, extension.name.clone(), extension);
            }
        }
    }

    fn context_of_cluster(&self, name: &str) -> PatchContext {
        if self.role == Role::Router {
            PatchContext::Gateway
        } else if name.starts_with("inbound|") || name == names::INBOUND_PASSTHROUGH {
            PatchContext::SidecarInbound
        } else {
            PatchContext::SidecarOutbound
        }
    }
}

/// Why a merge that changes a name is refused.
fn renames(what: &str, name: &str) -> String {
    format!("it would give {what} {name} another name, by which nobody would find it")
}

/// Whether a patch is for proxies like this one.
fn is_for(config: &ConfigPatch, node: &Node) -> bool {
    let Some(ProxyMatch {
        proxy_version,
        metadata,
    }) = &config.matches.proxy
    else {
        return true;
    };
    let said = |key: &str| node.metadata.get(key).map(String::as_str);
    let is_version = proxy_version.is_empty()
        || said("ISTIO_VERSION").is_some_and(|version| {
            regex::Regex::new(proxy_version).is_ok_and(|pattern| pattern.is_match(version))
        });
    is_version
        && metadata
            .iter()
            .all(|(key, value)| said(key) == Some(value.as_str()))
}

fn cluster_fits(wanted: Option<&ClusterMatch>, name: &str) -> bool {
    let Some(wanted) = wanted else {
        return true;
    };
    if !wanted.name.is_empty() {
        return wanted.name == name;
    }
    let inbound = || {
        name.strip_prefix("inbound|")?
            .split('|')
            .next()?
            .parse()
            .ok()
    };
    let (port, subset, host) = match Outbound::parse(name) {
        Some(parts) => (u32::from(parts.port), parts.subset, parts.host),
        None => (inbound().unwrap_or(0), "", ""),
    };
    (wanted.port_number == 0 || wanted.port_number == port)
        && (wanted.subset.is_empty() || wanted.subset == subset)
        && (wanted.service.is_empty() || wanted.service.eq_ignore_ascii_case(host))
}

/// Whether a filter is the one that is named, by the name of today or of old (`envoy.router`).
fn is_named(name: &str, wanted: &str) -> bool {
    name == wanted
        || wanted
            .strip_prefix("envoy.")
            .filter(|old| !old.contains('.'))
            .is_some_and(|old| {
                name.starts_with("envoy.filters.") && name.rsplit('.').next() == Some(old)
            })
}
