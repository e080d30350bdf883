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
        core::v3::{RuntimeFeatureFlag, RuntimeFractionalPercent},
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
    watched: HashMap<(Meaning, String), Weak<AtomicU64>>,
}

struct Layer {
    name: String,
    admin: bool,
    values: BTreeMap<String, Text>,
}

/// As what a value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Meaning {
    /// A fraction, in parts of a million.
    Fraction,
    /// A whole number.
    Number,
    /// A number, as its bits.
    Decimal,
    /// `true` (1) or `false` (0).
    Truth,
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
            watched: (!key.is_empty()).then(|| self.watch(key, Meaning::Fraction)),
            default,
        }
    }

    /// A fraction that follows `key`; without a value there it is the default of whoever asks.
    pub fn fraction_at(&self, key: &str, default: Chance) -> Fraction {
        Fraction {
            watched: Some(self.watch(key, Meaning::Fraction)),
            default,
        }
    }

    /// A whole number that follows `key`.
    pub fn number_at(&self, key: &str) -> Number {
        Number {
            watched: self.watch(key, Meaning::Number),
        }
    }

    /// A number that follows `key`; without a value there, or without a key, it is `default`.
    pub fn decimal(&self, key: &str, default: f64) -> Decimal {
        Decimal {
            watched: (!key.is_empty()).then(|| self.watch(key, Meaning::Decimal)),
            default,
        }
    }

    /// A switch that follows its key; without one it is the default value, or `default` if there is none.
    pub fn flag(&self, flag: Option<&RuntimeFeatureFlag>, default: bool) -> Flag {
        let key = flag.map_or("", |flag| flag.runtime_key.as_str());
        Flag {
            watched: (!key.is_empty()).then(|| self.watch(key, Meaning::Truth)),
            default: flag
                .and_then(|flag| flag.default_value.as_ref())
                .map_or(default, |value| value.value),
        }
    }

    fn watch(&self, key: &str, meaning: Meaning) -> Arc<AtomicU64> {
        let mut state = self.lock();
        let place = (meaning, key.to_owned());
        if let Some(found) = state.watched.get(&place).and_then(Weak::upgrade) {
            return found;
        }
        state.watched.retain(|_, cell| cell.strong_count() > 0);
        let cell = Arc::new(AtomicU64::new(state.read(key, meaning)));
        state.watched.insert(place, Arc::downgrade(&cell));
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
        for ((meaning, key), cell) in &state.watched {
            if let Some(cell) = cell.upgrade() {
                cell.store(state.read(key, *meaning), Relaxed);
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
    /// The value that counts; `UNSET` if there is none, or it makes no sense as what it is read.
    fn read(&self, key: &str, meaning: Meaning) -> u64 {
        let mut layers = self.layers.iter().rev();
        let Some(value) = layers.find_map(|layer| layer.values.get(key)) else {
            return UNSET;
        };
        let text = value.text.trim();
        match meaning {
            Meaning::Fraction => value.parts.map_or(UNSET, u64::from),
            Meaning::Number => text.parse().unwrap_or(UNSET),
            Meaning::Decimal => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => number.to_bits(),
                _ => UNSET,
            },
            Meaning::Truth => text.parse().map_or(UNSET, |truth: bool| u64::from(truth)),
        }
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

    /// The same with another default.
    #[must_use]
    pub fn or(&self, default: Chance) -> Fraction {
        Fraction {
            watched: self.watched.clone(),
            default,
        }
    }
}

/// A whole number that a runtime key gives.
#[derive(Clone, Debug)]
pub struct Number {
    watched: Arc<AtomicU64>,
}

impl Number {
    /// The number at this moment, if there is one.
    pub fn get(&self) -> Option<u64> {
        Some(self.watched.load(Relaxed)).filter(|number| *number != UNSET)
    }
}

/// A number that a runtime key may override.
#[derive(Clone, Debug)]
pub struct Decimal {
    watched: Option<Arc<AtomicU64>>,
    default: f64,
}

impl Decimal {
    /// The number at this moment.
    pub fn value(&self) -> f64 {
        match self.watched.as_ref().map(|cell| cell.load(Relaxed)) {
            None | Some(UNSET) => self.default,
            Some(bits) => f64::from_bits(bits),
        }
    }
}

/// A switch that a runtime key may override.
#[derive(Clone, Debug)]
pub struct Flag {
    watched: Option<Arc<AtomicU64>>,
    default: bool,
}

impl Flag {
    /// Whether it is on at this moment.
    pub fn is_on(&self) -> bool {
        match self.watched.as_ref().map(|cell| cell.load(Relaxed)) {
            None | Some(UNSET) => self.default,
            Some(truth) => truth != 0,
        }
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
    fn numbers_and_switches_follow_their_keys() {
        let layers = layers(
            "layers: [{name: a, static_layer: {n: 7, t: false}}, {name: b, admin_layer: {}}]",
        )
        .unwrap();
        let flag: RuntimeFeatureFlag =
            lateen_protocols::json::from_yaml("{runtime_key: t, default_value: true}").unwrap();
        let (number, flag) = (layers.number_at("n"), layers.flag(Some(&flag), true));
        // One key may be read as several things.
        let fraction = layers.fraction_at("n", Chance::NEVER);
        assert_eq!((number.get(), flag.is_on()), (Some(7), false));
        assert_eq!(fraction.chance(), Chance(70_000));
        for (key, value) in [("n", "x"), ("t", "1")] {
            layers
                .modify(&[(key.to_owned(), value.to_owned())])
                .unwrap();
        }
        assert_eq!((number.get(), flag.is_on()), (None, true));
        assert_eq!(fraction.or(Chance(3)).chance(), Chance(3));
        assert!(layers.flag(None, true).is_on());
        let (decimal, none) = (layers.decimal("d", 2.5), layers.decimal("", 2.5));
        assert_eq!((decimal.value(), none.value()), (2.5, 2.5));
        layers
            .modify(&[("d".to_owned(), "0.5".to_owned())])
            .unwrap();
        assert_eq!(decimal.value(), 0.5);
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
