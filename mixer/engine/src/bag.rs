//! The attributes of one request.

use std::fmt;

use crate::table::{AttributeTable, Slot};
use crate::value::Value;

/// The attributes of one request, in slots of an [`AttributeTable`], with a layer on top for what the
/// attribute generators add. Reading costs an array access.
#[derive(Clone)]
pub struct Bag {
    table: AttributeTable,
    received: Vec<Option<Value>>,
    generated: Vec<Option<Value>>, // empty until something is generated
    ignored: u32,
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
            received: vec![None; table.len()],
            generated: Vec::new(),
            ignored: 0,
        }
    }

    /// What the slots mean.
    pub fn table(&self) -> &AttributeTable {
        &self.table
    }

    /// The value of a slot, generated or received. The slot must come from this bag's table.
    pub fn get(&self, slot: Slot) -> Option<&Value> {
        match self.generated.get(slot.index()) {
            Some(Some(value)) => Some(value),
            _ => self.received.get(slot.index())?.as_ref(),
        }
    }

    /// The value of an attribute by name.
    pub fn get_by_name(&self, name: &str) -> Option<&Value> {
        self.get(self.table.slot(name)?)
    }

    /// Whether the value of a slot was generated here, so that the sender of the request knows nothing of it.
    pub fn is_generated(&self, slot: Slot) -> bool {
        matches!(self.generated.get(slot.index()), Some(Some(_)))
    }

    /// Sets a received attribute. A value of another type than the declared one is kept; whoever reads
    /// it gets an error.
    pub fn set(&mut self, slot: Slot, value: Value) {
        if let Some(place) = self.received.get_mut(slot.index()) {
            *place = Some(value);
        }
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
        if self.generated.is_empty() {
            self.generated.resize(self.table.len(), None);
        }
        if let Some(place) = self.generated.get_mut(slot.index()) {
            *place = Some(value);
        }
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
