//! QuotaSpecs by the services they are bound to.

use std::collections::BTreeMap;
use std::sync::Arc;

use lateen_config::policy::{QuotaSpec, QuotaSpecBinding};
use lateen_config::{Object, Spec};

/// A QuotaSpec bound to a service.
#[derive(Clone, Copy, Debug)]
pub struct BoundQuota<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a QuotaSpec,
}

#[derive(Debug, Default)]
pub(super) struct Quotas {
    specs: BTreeMap<(String, String), Arc<Object>>,
    bindings: Vec<Arc<Object>>,
}

impl Quotas {
    pub(super) fn read(objects: &[Arc<Object>]) -> Self {
        let mut all = Self::default();
        for object in objects {
            match &object.spec {
                Spec::QuotaSpec(_) => {
                    let key = (
                        object.key.namespace.to_string(),
                        object.key.name.to_string(),
                    );
                    all.specs.insert(key, object.clone());
                }
                Spec::QuotaSpecBinding(_) => all.bindings.push(object.clone()),
                _ => {}
            }
        }
        all
    }

    pub(super) fn of(&self, hostname: &str) -> Vec<BoundQuota<'_>> {
        let mut bound: BTreeMap<&(String, String), &Arc<Object>> = BTreeMap::new();
        for object in &self.bindings {
            let own_namespace = &*object.key.namespace;
            let Spec::QuotaSpecBinding(QuotaSpecBinding {
                services,
                quota_specs,
            }) = &object.spec
            else {
                continue;
            };
            if !services
                .iter()
                .any(|service| service.means(hostname, own_namespace))
            {
                continue;
            }
            for reference in quota_specs {
                let namespace = match reference.namespace.as_str() {
                    "" => own_namespace,
                    named => named,
                };
                let key = (namespace.to_owned(), reference.name.clone());
                bound.extend(self.specs.get_key_value(&key));
            }
        }
        bound
            .into_iter()
            .filter_map(|((namespace, name), object)| match &object.spec {
                Spec::QuotaSpec(spec) => Some(BoundQuota {
                    namespace,
                    name,
                    spec,
                }),
                _ => None,
            })
            .collect()
    }
}
