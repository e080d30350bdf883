//! Which AuthorizationPolicies hold for a workload: those of its namespace and of the root namespace that
//! select it, oldest first.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::authorization::AuthorizationPolicy;
use lateen_config::{Object, Spec};

use super::service::{Labels, selects};

/// All policies, by namespace.
#[derive(Debug, Default)]
pub(super) struct Policies(BTreeMap<String, Vec<Arc<Object>>>);

impl Policies {
    pub(super) fn read(objects: &[Arc<Object>]) -> Self {
        let mut all: BTreeMap<String, Vec<Arc<Object>>> = BTreeMap::new();
        for object in objects {
            if let Spec::AuthorizationPolicy(_) = &object.spec {
                all.entry(object.key.namespace.to_string())
                    .or_default()
                    .push(object.clone());
            }
        }
        Self(all)
    }

    pub(super) fn of<'a>(
        &'a self,
        namespace: &str,
        labels: &'a Labels,
        root_namespace: &str,
    ) -> impl Iterator<Item = (&'a Object, &'a AuthorizationPolicy)> {
        let own = self.0.get(namespace);
        let root = (root_namespace != namespace)
            .then(|| self.0.get(root_namespace))
            .flatten();
        root.into_iter()
            .chain(own)
            .flatten()
            .filter_map(|object| match &object.spec {
                Spec::AuthorizationPolicy(policy) => Some((&**object, &**policy)),
                _ => None,
            })
            .filter(|(_, policy)| !policy.has_targets())
            .filter(|(_, policy)| {
                policy
                    .labels()
                    .is_none_or(|selector| selects(selector, labels))
            })
    }
}
