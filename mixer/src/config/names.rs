//! What names in configuration mean: `NAME`, `NAME.KIND`, `NAME.NAMESPACE`, `NAME.KIND.NAMESPACE`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use lateen_adapter::template;
use lateen_engine::AttributeTable;

use super::{
    instance::Instance,
    object::{Key, Source},
    recipe::Recipe,
    remote::{RemoteTemplate, instance::RemoteInstance},
    rule::{Directory, Takes},
    sent::Sent,
};

/// The version of an object that is used.
#[derive(Debug)]
pub struct Found<T> {
    /// As written.
    pub source: Source,
    /// What it means.
    pub what: T,
}

/// What `name` may mean to an object of `namespace`, the likeliest first. What the own namespace lacks is looked
/// for in the mesh-wide one.
fn meanings(name: &str, generic: &str, namespace: &str, default_namespace: &str) -> Vec<Key> {
    let key = |kind: &str, namespace: &str, name: &str| Key {
        kind: Arc::from(kind),
        namespace: Arc::from(namespace),
        name: Arc::from(name),
    };
    let mut all = Vec::new();
    if let Some((front, last)) = name.rsplit_once('.') {
        if let Some((name, kind)) = front.rsplit_once('.') {
            all.push(key(kind, last, name));
        }
        all.push(key(last, namespace, front));
        all.push(key(generic, last, front));
        all.push(key(last, default_namespace, front));
    }
    all.push(key(generic, namespace, name)); // Kubernetes allows dots in names
    all.push(key(generic, default_namespace, name));
    let mut seen = BTreeSet::new();
    all.retain(|key| seen.insert(key.clone()));
    all
}

/// The object that `name` means to an object of `namespace`.
///
/// # Errors
/// There is none; and what was looked for.
pub fn find<'m, T>(
    map: &'m BTreeMap<Key, T>,
    name: &str,
    generic: &str,
    namespace: &str,
    default_namespace: &str,
) -> Result<(&'m Key, &'m T), String> {
    let candidates = meanings(name, generic, namespace, default_namespace);
    candidates
        .iter()
        .find_map(|key| map.get_key_value(key))
        .ok_or_else(|| {
            let tried: Vec<String> = candidates.iter().map(Key::to_string).collect();
            format!("there is no {} (or it is refused)", tried.join(" and no "))
        })
}

/// Names in rules that use what there is now.
#[derive(Debug)]
pub struct Names<'a> {
    /// The handlers there are.
    pub handlers: &'a BTreeMap<Key, Found<Recipe>>,
    /// The instances there are.
    pub instances: &'a BTreeMap<Key, Found<Arc<Instance>>>,
    /// Those of remote templates.
    pub remote_instances: &'a BTreeMap<Key, Found<Arc<RemoteInstance>>>,
    /// The remote templates there are.
    pub templates: &'a BTreeMap<Key, Found<Arc<RemoteTemplate>>>,
    /// The attributes there are.
    pub table: &'a AttributeTable,
    /// Handlers that cannot be built, and why.
    pub broken: &'a BTreeMap<Key, String>,
    /// Where rules for everybody are.
    pub default_namespace: &'a str,
}

impl Directory for Names<'_> {
    fn handler(&self, name: &str, namespace: &str) -> Result<(Key, Takes), String> {
        let (key, found) = find(
            self.handlers,
            name,
            "handler",
            namespace,
            self.default_namespace,
        )?;
        if let Some(reason) = self.broken.get(key) {
            return Err(format!("{key} cannot be built: {reason}"));
        }
        match &found.what {
            Recipe::Compiled { adapter, .. } => {
                let templates = adapter.info().templates.iter().map(|t| t.name);
                Ok((key.clone(), Takes::Compiled(templates.collect())))
            }
            Recipe::Remote(handler) => {
                let adapter = &handler.adapter;
                let templates = adapter.templates.iter().filter_map(|name| {
                    let (home, default) = (&adapter.namespace, self.default_namespace);
                    let found = find(self.templates, name, "template", home, default).ok();
                    found.map(|(_, found)| Arc::clone(&found.what))
                });
                Ok((key.clone(), Takes::Remote(templates.collect())))
            }
            Recipe::Vendor(vendor) => Err(format!(
                "{key} is of adapter {}, which is not part of this Mixer; run it as a process of its own",
                vendor.name
            )),
        }
    }

    fn instance(&self, name: &str, namespace: &str, takes: &Takes) -> Result<(Key, Sent), String> {
        let default = self.default_namespace;
        let compiled = || find(self.instances, name, "instance", namespace, default);
        let remote = || find(self.remote_instances, name, "instance", namespace, default);
        match takes {
            Takes::Compiled(_) => match (compiled(), remote()) {
                (Ok((key, found)), _) => Ok((key.clone(), Sent::Compiled(Arc::clone(&found.what)))),
                (Err(_), Ok((key, found))) => Err(format!(
                    "{key} is of {}, which only adapters that are processes of their own take",
                    found.what.template.name
                )),
                (Err(reason), Err(_)) => Err(reason),
            },
            Takes::Remote(templates) => match (remote(), compiled()) {
                (Ok((key, found)), _) => Ok((key.clone(), Sent::Remote(Arc::clone(&found.what)))),
                (Err(_), Ok((key, found))) => {
                    let wanted = found.what.template.name;
                    let template = templates.iter().find(|t| t.template_name == wanted);
                    let template = template.ok_or_else(|| {
                        let takes: Vec<&str> = templates.iter().map(|t| &*t.name).collect();
                        let takes = takes.join(", ");
                        format!("the handler does not take instances of {wanted}; it takes {takes}")
                    })?;
                    let instance =
                        RemoteInstance::read(&found.source, Arc::clone(template), self.table);
                    let instance = instance.map_err(|faults| {
                        let told = faults.iter().map(|f| format!("{}: {}", f.field, f.reason));
                        format!(
                            "{key} is no instance for a process: {}",
                            told.collect::<Vec<_>>().join("; ")
                        )
                    })?;
                    Ok((key.clone(), Sent::Remote(Arc::new(instance))))
                }
                (Err(reason), Err(_)) => Err(reason),
            },
        }
    }
}

/// Names in a rule that uses what it used before.
#[derive(Debug)]
pub struct OwnNames<'a> {
    /// Its handlers, and whether each is of an adapter process.
    pub handlers: BTreeMap<Key, bool>,
    /// Its instances.
    pub instances: BTreeMap<Key, Sent>,
    /// Where rules for everybody are.
    pub default_namespace: &'a str,
}

impl Directory for OwnNames<'_> {
    fn handler(&self, name: &str, namespace: &str) -> Result<(Key, Takes), String> {
        let default = self.default_namespace;
        let (key, is_remote) = find(&self.handlers, name, "handler", namespace, default)?;
        // What it takes was asked when the rule came into force.
        let takes = if *is_remote {
            let remote = |sent: &Sent| match sent {
                Sent::Remote(instance) => Some(Arc::clone(&instance.template)),
                Sent::Compiled(_) => None,
            };
            Takes::Remote(self.instances.values().filter_map(remote).collect())
        } else {
            Takes::Compiled(template::ALL.iter().map(|t| t.name).collect())
        };
        Ok((key.clone(), takes))
    }

    fn instance(&self, name: &str, namespace: &str, _: &Takes) -> Result<(Key, Sent), String> {
        let default = self.default_namespace;
        let (key, sent) = find(&self.instances, name, "instance", namespace, default)?;
        Ok((key.clone(), sent.clone()))
    }
}
