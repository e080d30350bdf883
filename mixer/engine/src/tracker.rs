//! What an answer depends on: the attributes that were looked at.

use lateen_protocols::istio::mixer::v1::ReferencedAttributes;
use lateen_protocols::istio::mixer::v1::referenced_attributes::{AttributeMatch, Condition};

use crate::bag::Bag;
use crate::dictionary::WordList;
use crate::table::{AttributeTable, Slot};
use crate::text::Text;
use crate::value::{StringMap, Value};

/// Records which received attributes were looked up, so that the asker can tell which later requests
/// have the same answer. Generated attributes are not recorded: the asker does not have them.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    enabled: bool,
    seen: Vec<Seen>, // by slot; grows when a slot is first seen
    keys: Vec<(Slot, Text, bool)>,
    maps: Vec<(Slot, StringMap)>, // looked at as a whole
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Seen {
    #[default]
    Never,
    Absent,
    Present,
}

impl Tracker {
    /// A tracker that has seen nothing.
    pub fn new() -> Tracker {
        Tracker {
            enabled: true,
            ..Tracker::default()
        }
    }

    /// A tracker that records nothing: for reports, whose answer nobody caches.
    pub fn off() -> Tracker {
        Tracker::default()
    }

    /// Forgets everything; keeps its memory for the next request.
    pub fn reset(&mut self) {
        self.seen.clear();
        self.keys.clear();
        self.maps.clear();
    }

    /// Records a lookup and returns what the bag has.
    pub fn look_up<'b>(&mut self, bag: &'b Bag, slot: Slot) -> Option<&'b Value> {
        let found = bag.get(slot);
        if self.enabled && !bag.is_generated(slot) {
            if self.seen.len() <= slot.index() {
                self.seen.resize(slot.index() + 1, Seen::Never);
            }
            if let Some(seen) = self.seen.get_mut(slot.index()) {
                *seen = if found.is_some() {
                    Seen::Present
                } else {
                    Seen::Absent
                };
            }
        }
        found
    }

    /// Records the lookup of one key of a present map.
    pub fn look_up_key(&mut self, bag: &Bag, slot: Slot, key: &Text, found: bool) {
        if self.enabled
            && !bag.is_generated(slot)
            && !self.keys.iter().any(|(s, k, _)| *s == slot && k == key)
        {
            self.keys.push((slot, key.clone(), found));
        }
    }

    /// Records that an answer depends on every entry of a present map, including that there are no others.
    pub fn look_up_map(&mut self, bag: &Bag, slot: Slot, map: &StringMap) {
        if self.enabled && !bag.is_generated(slot) && !self.maps.iter().any(|(s, _)| *s == slot) {
            self.maps.push((slot, map.clone()));
        }
    }

    /// Whether the answer depends on a map as a whole. The protocol cannot say "no other key", so such an
    /// answer must not be cached by the asker: give it no valid use.
    pub fn whole_map(&self) -> bool {
        !self.maps.is_empty()
    }

    /// What was looked up, sorted: `name`, `-name` when absent, `name[key]`, `-name[key]`.
    pub fn names(&self, table: &AttributeTable) -> Vec<String> {
        let mut names: Vec<String> = table
            .slots()
            .zip(&self.seen)
            .filter_map(|(slot, seen)| match seen {
                Seen::Never => None,
                Seen::Absent => Some(format!("-{}", table.name(slot))),
                Seen::Present => Some(table.name(slot).to_string()),
            })
            .collect();
        names.extend(self.keys.iter().map(|(slot, key, found)| {
            format!(
                "{}{}[{key}]",
                if *found { "" } else { "-" },
                table.name(*slot)
            )
        }));
        names.sort();
        names
    }

    /// The wire form for an asker who knows the first `global_words` words. A present map is told by its keys
    /// only, all of them when it was looked at as a whole; sorted by name and key, so that equal sets encode equally.
    pub fn encode(&self, table: &AttributeTable, global_words: usize) -> ReferencedAttributes {
        let mut list = WordList::new(global_words);
        let mut keys: Vec<(Slot, &Text, bool)> = self
            .keys
            .iter()
            .map(|(slot, key, found)| (*slot, key, *found))
            .collect();
        for (slot, map) in &self.maps {
            keys.extend(map.iter().map(|(key, _)| (*slot, key, true)));
        }
        keys.sort();
        keys.dedup();
        let mut matches = Vec::with_capacity(self.seen.len().min(16) + keys.len());
        let mut entry = |name: i32, map_key: i32, found: bool| {
            let condition = if found {
                Condition::Exact
            } else {
                Condition::Absence
            };
            matches.push(AttributeMatch {
                name,
                condition: condition.into(),
                regex: String::new(),
                map_key,
            });
        };
        for (slot, seen) in table.slots().zip(&self.seen) {
            let is_map = table.type_of(slot) == crate::value::ValueType::StringMap;
            match seen {
                Seen::Never => {}
                Seen::Present if is_map => {}
                Seen::Present => entry(list.index(table.name(slot)), 0, true),
                Seen::Absent => entry(list.index(table.name(slot)), 0, false),
            }
        }
        for (slot, key, found) in keys {
            let name = list.index(table.name(slot));
            entry(name, list.index(key), found);
        }
        ReferencedAttributes {
            words: list.into_words(),
            attribute_matches: matches,
        }
    }
}
