//! What a handler is to be built of.

use std::{collections::BTreeMap, fmt, sync::Arc};

use lateen_adapter::{Adapter, Candidate};
use serde_json::{Map, Value as Json};

use super::{
    names::{Found, find},
    object::{Fault, Key, Source},
    remote::{RemoteAdapter, handler::RemoteHandler},
    vendor::{self, Vendor},
};
use crate::adapter::Inventory;

/// What a handler is to be built of.
#[derive(Clone)]
pub enum Recipe {
    /// An adapter that is part of this program.
    Compiled {
        /// The adapter.
        adapter: Arc<dyn Adapter>,
        /// Its parameters.
        params: Json,
        /// Where the parameters stand in the spec.
        params_field: &'static str,
    },
    /// An adapter that is a process of its own.
    Remote(Arc<RemoteHandler>),
    /// An adapter of Istio that is not here.
    Vendor(&'static Vendor),
}

impl fmt::Debug for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiled { adapter, .. } => write!(f, "Compiled({})", adapter.info().name),
            Self::Remote(handler) => write!(f, "Remote({})", handler.name),
            Self::Vendor(vendor) => write!(f, "Vendor({})", vendor.name),
        }
    }
}

const KNOWN: [&str; 6] = [
    "name",
    "compiledAdapter",
    "compiled_adapter",
    "adapter",
    "params",
    "connection",
];

impl Recipe {
    /// Reads a handler, of a legacy kind too. The parameters are checked as far as they can be without the
    /// instances that rules will send.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(
        source: &Source,
        inventory: &Inventory,
        adapters: &BTreeMap<Key, Found<Arc<RemoteAdapter>>>,
        default_namespace: &str,
    ) -> Result<Self, Vec<Fault>> {
        let one = |fault: Fault| vec![fault];
        let kind = &*source.key.kind;
        if let Some(adapter) = inventory.find(kind) {
            return Self::compiled(source, adapter, (*source.spec).clone(), "");
        }
        if let Some(vendor) = vendor::find(kind) {
            vendor.check(&source.spec, "").map_err(one)?;
            return Ok(Self::Vendor(vendor));
        }
        let nothing = Map::new();
        let spec = match &*source.spec {
            Json::Object(spec) => spec,
            Json::Null => &nothing,
            other => return Err(one(Fault::new("", format!("{other} is no map")))),
        };
        if let Some(key) = spec.keys().find(|key| !KNOWN.contains(&key.as_str())) {
            return Err(one(Fault::new(key, "there is no such field in a handler")));
        }
        let (field, name) = ["compiledAdapter", "compiled_adapter", "adapter"]
            .into_iter()
            .find_map(|key| Some((key, spec.get(key)?)))
            .ok_or_else(|| {
                one(Fault::new(
                    "compiledAdapter",
                    "the handler names no adapter",
                ))
            })?;
        let Some(name) = name.as_str() else {
            return Err(one(Fault::new(
                field,
                format!("{name} is no adapter's name"),
            )));
        };
        let params = spec.get("params").cloned().unwrap_or(Json::Null);
        let connection = spec.get("connection").unwrap_or(&Json::Null);
        let compiled = inventory.find(name);
        // Descriptors of adapters that are part of this program may be there too: who gives no address means those.
        if field == "adapter" && (compiled.is_none() || !connection.is_null()) {
            let found = find(
                adapters,
                name,
                "adapter",
                &source.key.namespace,
                default_namespace,
            );
            if let Ok((_, found)) = found {
                let full_name = source.key.full_name();
                let adapter = Arc::clone(&found.what);
                let handler = RemoteHandler::read(full_name, adapter, &params, connection);
                return handler.map(|h| Self::Remote(Arc::new(h))).map_err(one);
            }
        }
        if let Some(adapter) = compiled {
            return Self::compiled(source, adapter, params, "params");
        }
        if let Some(vendor) = vendor::find(name) {
            vendor.check(&params, "params").map_err(one)?;
            return Ok(Self::Vendor(vendor));
        }
        let known: Vec<_> = inventory.names().collect();
        Err(one(Fault::new(
            field,
            format!(
                "unknown adapter \"{name}\"; there are {}, and those that objects of kind adapter describe",
                known.join(", ")
            ),
        )))
    }

    fn compiled(
        source: &Source,
        adapter: &Arc<dyn Adapter>,
        params: Json,
        params_field: &'static str,
    ) -> Result<Self, Vec<Fault>> {
        let name = source.key.full_name();
        let candidate = Candidate {
            name: &name,
            params: &params,
            instances: &[],
        };
        let check = std::panic::AssertUnwindSafe(|| adapter.validate(&candidate));
        let reasons = std::panic::catch_unwind(check)
            .unwrap_or_else(|_| vec![format!("adapter {} panicked", adapter.info().name)]);
        if !reasons.is_empty() {
            let faults = reasons
                .iter()
                .map(|reason| Fault::new(params_field, reason));
            return Err(faults.collect());
        }
        Ok(Self::Compiled {
            adapter: Arc::clone(adapter),
            params,
            params_field,
        })
    }
}
