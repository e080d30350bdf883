//! The attributes of one request.

use std::fmt;

use crate::table::{AttributeTable, Slot};
use crate::value::Value;

/// Attributes of a usual request; a layer with more grows once.
const USUAL: usize = 32;

/// The attributes of one request, in slots of an [`AttributeTable`], with a layer on top for what the
/// attribute generators add. Reading costs two array accesses.
#[derive(Clone)]
pub struct Bag {
    table: AttributeTable,
    received: Layer,
    generated: Layer,
    ignored: u32,
}

/// Values of some slots. A request has a fifth of the attributes that exist, so the values stand together, and
/// what has to be cleared for each request are two bytes a slot.
#[derive(Clone, Debug, Default)]
struct Layer {
    /// By slot, one more than the value's position; 0: there is none. Empty in a layer without values.
    places: Vec<u16>,
    values: Vec<Value>,
}

impl Layer {
    fn get(&self, slot: Slot) -> Option<&Value> {
        let place = usize::from(*self.places.get(slot.index())?);
        self.values.get(place.checked_sub(1)?)
    }

    fn has(&self, slot: Slot) -> bool {
        self.places
            .get(slot.index())
            .is_some_and(|place| *place > 0)
    }

    /// `slots`: how many the table has, at most 4096.
    fn set(&mut self, slot: Slot, value: Value, slots: usize) {
        if self.places.is_empty() {
            self.places = vec![0; slots];
            self.values.reserve(USUAL.min(slots));
        }
        let Some(place) = self.places.get_mut(slot.index()) else {
            return;
        };
        match usize::from(*place).checked_sub(1) {
            Some(at) => {
                if let Some(old) = self.values.get_mut(at) {
                    *old = value;
                }
            }
            None => {
                self.values.push(value);
                // A layer has no more values than the table has slots, and those have numbers of this size.
                *place = u16::try_from(self.values.len()).unwrap_or(0);
            }
        }
    }

    fn clear(&mut self) {
        self.places.clear();
        self.values.clear();
    }
}

/// The table has no such attribute.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown attribute {0}; declare it in an attributemanifest")]
pub struct UnknownAttribute(pub String);

impl Bag {
    /// An empty bag.
    pub fn new(table: &AttributeTable) -> Bag {
        Bag {
            table: table.clone(),
            received: Layer::default(),
            generated: Layer::default(),
            ignored: 0,
        }
    }

    /// What the slots mean.
    pub fn table(&self) -> &AttributeTable {
        &self.table
    }

    /// The value of a slot, generated or received. The slot must come from this bag's table.
    pub fn get(&self, slot: Slot) -> Option<&Value> {
        self.generated.get(slot).or_else(|| self.received.get(slot))
    }

    /// The value of an attribute by name.
    pub fn get_by_name(&self, name: &str) -> Option<&Value> {
        self.get(self.table.slot(name)?)
    }

    /// Whether the value of a slot was generated here, so that the sender of the request knows nothing of it.
    pub fn is_generated(&self, slot: Slot) -> bool {
        self.generated.has(slot)
    }

    /// Sets a received attribute. A value of another type than the declared one is kept; whoever reads
    /// it gets an error.
    pub fn set(&mut self, slot: Slot, value: Value) {
        self.received.set(slot, value, self.table.len());
    }

    /// Sets a received attribute by name.
    ///
    /// # Errors
    /// The table has no such attribute.
    pub fn set_by_name(
        &mut self,
        name: &str,
        value: impl Into<Value>,
    ) -> Result<(), UnknownAttribute> {
        let slot = self
            .table
            .slot(name)
            .ok_or_else(|| UnknownAttribute(name.to_owned()))?;
        self.set(slot, value.into());
        Ok(())
    }

    /// Sets an attribute of the generated layer, hiding a received one of that name.
    pub fn generate(&mut self, slot: Slot, value: Value) {
        self.generated.set(slot, value, self.table.len());
    }

    /// Drops the generated layer.
    pub fn clear_generated(&mut self) {
        self.generated.clear();
    }

    /// How many attributes of the message were left out: undeclared, or bytes that are no IP address.
    pub fn ignored(&self) -> u32 {
        self.ignored
    }

    pub(crate) fn ignore(&mut self) {
        self.ignored = self.ignored.saturating_add(1);
    }

    /// Present attributes by name, in the order of the table.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.slots()
            .map(|(slot, value)| (self.table.name(slot).as_str(), value))
    }

    /// Present attributes by slot.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, &Value)> {
        self.table
            .slots()
            .filter_map(|slot| Some((slot, self.get(slot)?)))
    }
}

/// Names and types only: values may be credentials.
impl fmt::Debug for Bag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (name, value.value_type())))
            .finish()
    }
}
