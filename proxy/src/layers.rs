//! Envoy's "runtime": named values in layers that override what is configured, changed through the admin
//! interface. Static layers and the admin layer; a value that nobody asks for costs nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use lateen_protocols::envoy::{
    envoy::config::{
        bootstrap::v3::{LayeredRuntime, runtime_layer::LayerSpecifier},
        core::v3::RuntimeFractionalPercent,
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use serde_json::json;

use crate::{
    config_error::ConfigError,
    proto::{Chance, invalid},
    stats::Scope,
};

/// No layer has a value.
const UNSET: u64 = u64::MAX;
/// Values of the admin layer.
const MAX_ADMIN_VALUES: usize = 1024;

/// The layers; the later ones override.
#[derive(Default)]
pub struct RuntimeLayers(Mutex<State>);

#[derive(Default)]
struct State {
    layers: Vec<Layer>,
    /// What compiled configuration watches, by key.
    watched: HashMap<String, Weak<AtomicU64>>,
}

struct Layer {
    name: String,
    admin: bool,
    values: BTreeMap<String, Text>,
}

/// A value as text and, for a fraction, in parts of a million.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Text {
    text: String,
    parts: Option<u32>,
}

impl RuntimeLayers {
    /// Reads the layers of a bootstrap.
    ///
    /// # Errors
    /// A layer comes from a disk or a control plane, which is not supported, or there are two admin layers.
    pub fn new(proto: Option<&LayeredRuntime>) -> Result<RuntimeLayers, ConfigError> {
        let mut layers = Vec::new();
        for layer in proto.iter().flat_map(|proto| &proto.layers) {
            let mut values = BTreeMap::new();
            let mut admin = false;
            match layer.layer_specifier.as_ref() {
                Some(LayerSpecifier::StaticLayer(fields)) => flatten("", fields, &mut values),
                Some(LayerSpecifier::AdminLayer(_)) => admin = true,
                Some(LayerSpecifier::DiskLayer(_)) => {
                    return Err(invalid(layer.name.clone(), "disk_layer is not supported"));
                }
                Some(LayerSpecifier::RtdsLayer(_)) => {
                    return Err(invalid(layer.name.clone(), "rtds_layer is not supported"));
                }
                None => return Err(invalid(layer.name.clone(), "layer_specifier is required")),
            }
            if admin && layers.iter().any(|layer: &Layer| layer.admin) {
                return Err(invalid(layer.name.clone(), "is a second admin_layer"));
            }
            layers.push(Layer {
                name: layer.name.clone(),
                admin,
                values,
            });
        }
        Ok(RuntimeLayers(Mutex::new(State {
            layers,
            watched: HashMap::new(),
        })))
    }

    /// A fraction that follows its key; without one it is the default value, or `default` if there is none.
    pub fn fraction(
        &self,
        percent: Option<&RuntimeFractionalPercent>,
        default: Chance,
    ) -> Fraction {
        let default = Chance::of_runtime(percent, default);
        let key = percent
            .map(|percent| percent.runtime_key.as_str())
            .unwrap_or_default();
        Fraction {
            watched: (!key.is_empty()).then(|| self.watch(key)),
            default,
        }
    }

    fn watch(&self, key: &str) -> Arc<AtomicU64> {
        let mut state = self.lock();
        if let Some(found) = state.watched.get(key).and_then(Weak::upgrade) {
            return found;
        }
        state.watched.retain(|_, cell| cell.strong_count() > 0);
        let cell = Arc::new(AtomicU64::new(state.parts(key)));
        state.watched.insert(key.to_owned(), Arc::downgrade(&cell));
        cell
    }

    /// Changes values of the admin layer; an empty value takes one away.
    ///
    /// # Errors
    /// There is no admin layer, or it is full.
    pub fn modify(&self, values: &[(String, String)]) -> Result<(), &'static str> {
        let mut state = self.lock();
        let Some(layer) = state.layers.iter_mut().find(|layer| layer.admin) else {
            return Err("No admin layer specified");
        };
        for (key, value) in values {
            if value.is_empty() {
                layer.values.remove(key);
            } else if layer.values.len() < MAX_ADMIN_VALUES || layer.values.contains_key(key) {
                layer.values.insert(key.clone(), Text::of_text(value));
            } else {
                return Err("The admin layer is full");
            }
        }
        for (key, cell) in &state.watched {
            if let Some(cell) = cell.upgrade() {
                cell.store(state.parts(key), Relaxed);
            }
        }
        Ok(())
    }

    /// Sets `runtime.*`.
    pub fn count(&self, scope: &Scope) {
        let state = self.lock();
        let keys = |admin: bool| {
            let layers = state.layers.iter().filter(|layer| !admin || layer.admin);
            let keys: BTreeSet<_> = layers.flat_map(|layer| layer.values.keys()).collect();
            keys.len() as u64
        };
        scope.gauge("num_keys").set(keys(false));
        scope.gauge("num_layers").set(state.layers.len() as u64);
        scope
            .gauge("admin_overrides_active")
            .set(u64::from(keys(true) > 0));
    }

    /// The form of `/runtime`.
    pub fn dump(&self) -> serde_json::Value {
        let state = self.lock();
        let names: Vec<_> = state.layers.iter().map(|layer| &layer.name).collect();
        let mut keys: Vec<_> = state
            .layers
            .iter()
            .flat_map(|layer| layer.values.keys())
            .collect();
        keys.sort_unstable();
        keys.dedup();
        let entries: serde_json::Map<_, _> = keys
            .into_iter()
            .map(|key| {
                let values: Vec<&str> = state
                    .layers
                    .iter()
                    .map(|layer| layer.values.get(key).map_or("", |value| &value.text))
                    .collect();
                let last = values.iter().rev().find(|value| !value.is_empty()).copied();
                let entry =
                    json!({"layer_values": values, "final_value": last.unwrap_or_default()});
                (key.clone(), entry)
            })
            .collect();
        json!({"layers": names, "entries": entries})
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for RuntimeLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RuntimeLayers({} layers)", self.lock().layers.len())
    }
}

impl State {
    fn parts(&self, key: &str) -> u64 {
        self.layers
            .iter()
            .rev()
            .find_map(|layer| layer.values.get(key))
            .and_then(|value| value.parts)
            .map_or(UNSET, u64::from)
    }
}

impl Text {
    /// A number is a percentage. Envoy: an integer runtime value for a fraction is out of 100.
    fn of_text(text: &str) -> Text {
        Text {
            text: text.to_owned(),
            parts: text
                .trim()
                .parse::<u32>()
                .ok()
                .map(|percent| percent.saturating_mul(10_000).min(1_000_000)),
        }
    }
}

/// `{a: {b: 1}}` is the key `a.b`; a fraction (`numerator`, `denominator`) is a value.
fn flatten(prefix: &str, fields: &Struct, values: &mut BTreeMap<String, Text>) {
    for (name, value) in &fields.fields {
        let key = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        match &value.kind {
            Some(Kind::StructValue(inner)) => match fraction(inner) {
                Some(value) => {
                    values.insert(key, value);
                }
                None => flatten(&key, inner, values),
            },
            Some(Kind::NumberValue(number)) => {
                values.insert(key, Text::of_text(&number.to_string()));
            }
            Some(Kind::StringValue(text)) => {
                values.insert(key, Text::of_text(text));
            }
            Some(Kind::BoolValue(truth)) => {
                values.insert(key, Text::of_text(&truth.to_string()));
            }
            Some(Kind::NullValue(_) | Kind::ListValue(_)) | None => {}
        }
    }
}

fn fraction(fields: &Struct) -> Option<Text> {
    let number = |value: &Value| match value.kind {
        Some(Kind::NumberValue(number)) if number >= 0.0 => Some(number),
        _ => None,
    };
    let numerator = number(fields.fields.get("numerator")?)?;
    let denominator = fields
        .fields
        .get("denominator")
        .and_then(|value| match &value.kind {
            Some(Kind::StringValue(text)) => Some(text.as_str()),
            _ => None,
        });
    let factor = match denominator {
        Some("MILLION") => 1.0,
        Some("TEN_THOUSAND") => 100.0,
        _ => 10_000.0,
    };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and a million"
    )]
    let parts = (numerator * factor).min(1_000_000.0) as u32;
    Some(Text {
        text: format!(
            "{{\"numerator\":{numerator},\"denominator\":\"{}\"}}",
            denominator.unwrap_or("HUNDRED")
        ),
        parts: Some(parts),
    })
}

/// A chance that a runtime key may override.
#[derive(Clone, Debug)]
pub struct Fraction {
    watched: Option<Arc<AtomicU64>>,
    default: Chance,
}

impl Fraction {
    /// A chance that nothing overrides.
    pub fn fixed(chance: Chance) -> Fraction {
        Fraction {
            watched: None,
            default: chance,
        }
    }

    /// The chance at this moment.
    pub fn chance(&self) -> Chance {
        match self.watched.as_ref().map(|cell| cell.load(Relaxed)) {
            None | Some(UNSET) => self.default,
            Some(parts) => Chance(u32::try_from(parts).unwrap_or(u32::MAX)),
        }
    }

    /// Draws.
    pub fn hits(&self) -> bool {
        self.chance().hits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(yaml: &str) -> Result<RuntimeLayers, ConfigError> {
        let proto: LayeredRuntime = lateen_protocols::json::from_yaml(yaml).unwrap();
        RuntimeLayers::new(Some(&proto))
    }

    fn percent(key: &str, numerator: u32) -> RuntimeFractionalPercent {
        lateen_protocols::json::from_yaml(&format!(
            "{{runtime_key: {key}, default_value: {{numerator: {numerator}}}}}"
        ))
        .unwrap()
    }

    #[test]
    fn later_layers_override_and_admin_changes_what_is_compiled() {
        let layers = layers(
            "layers: [{name: a, static_layer: {x: {y: 10, z: {numerator: 5, denominator: MILLION}}}}, \
             {name: b, admin_layer: {}}]",
        )
        .unwrap();
        let of = |key| layers.fraction(Some(&percent(key, 50)), Chance::NEVER);
        let (y, z, unset) = (of("x.y"), of("x.z"), of("x.w"));
        assert_eq!(y.chance(), Chance(100_000));
        assert_eq!(z.chance(), Chance(5));
        assert_eq!(unset.chance(), Chance(500_000));
        let set = |key: &str, value: &str| layers.modify(&[(key.to_owned(), value.to_owned())]);
        set("x.y", "200").unwrap();
        set("x.w", "0").unwrap();
        assert_eq!(y.chance(), Chance::ALWAYS);
        assert_eq!(unset.chance(), Chance::NEVER);
        assert_eq!(
            layers.dump()["entries"]["x.y"],
            json!({"layer_values": ["10", "200"], "final_value": "200"})
        );
        set("x.y", "").unwrap();
        assert_eq!(y.chance(), Chance(100_000));
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for yaml in [
            "layers: [{name: a, disk_layer: {symlink_root: /x}}]",
            "layers: [{name: a, rtds_layer: {name: x}}]",
            "layers: [{name: a, admin_layer: {}}, {name: b, admin_layer: {}}]",
            "layers: [{name: a}]",
        ] {
            assert!(layers(yaml).is_err(), "{yaml}");
        }
        let none = RuntimeLayers::default();
        assert!(none.modify(&[("x".to_owned(), "1".to_owned())]).is_err());
    }
}
