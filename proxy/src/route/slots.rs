//! Where route tables are put by their names, and looked for by listeners.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use arc_swap::ArcSwapOption;

use super::RouteTable;
use crate::stats::Scope;

/// Route tables by the name under which listeners ask for them. The main runtime sets them (RDS, static
/// configuration); listeners hold the slots and see a new table at the next request.
#[derive(Debug, Default)]
pub struct RouteSlots {
    slots: Mutex<HashMap<Arc<str>, Weak<RouteSlot>>>,
}

/// The current table of one name; empty until it has come.
#[derive(Debug)]
pub struct RouteSlot {
    name: Arc<str>,
    table: ArcSwapOption<RouteTable>,
    /// The file that gives it; a stream does otherwise.
    file: Mutex<Option<String>>,
    /// Where the updates of this table are counted: `http.PREFIX.rds.NAME.` of its users.
    scopes: Mutex<Vec<Scope>>,
}

impl RouteSlots {
    /// The slot of a name, made when it is first asked for. It stays while somebody holds it.
    pub fn slot(&self, name: &str) -> Arc<RouteSlot> {
        let mut slots = self.lock();
        if let Some(slot) = slots.get(name).and_then(Weak::upgrade) {
            return slot;
        }
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(RouteSlot {
            name: name.into(),
            table: ArcSwapOption::empty(),
            file: Mutex::default(),
            scopes: Mutex::default(),
        });
        slots.insert(slot.name.clone(), Arc::downgrade(&slot));
        slot
    }

    /// The slot of a name, if somebody holds it.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<RouteSlot>> {
        self.lock().get(name)?.upgrade()
    }

    /// Names that listeners refer to, sorted.
    pub fn wanted(&self) -> Vec<Arc<str>> {
        let slots = self.lock();
        let mut names: Vec<_> = slots
            .iter()
            .filter(|(_, slot)| slot.strong_count() > 0)
            .map(|(name, _)| name.clone())
            .collect();
        names.sort_unstable();
        names
    }

    /// The files from which tables are to come, by name.
    pub(crate) fn files(&self) -> HashMap<Arc<str>, String> {
        let slots = self.lock();
        let held = slots.values().filter_map(Weak::upgrade);
        held.filter_map(|slot| Some((slot.name.clone(), slot.file().clone()?)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Weak<RouteSlot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RouteSlot {
    /// The name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Says from which file the table comes; `None` is a stream.
    pub(crate) fn come_from(&self, file: Option<&str>) {
        *self.file() = file.map(str::to_owned);
    }

    fn file(&self) -> MutexGuard<'_, Option<String>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts updates of this table in a scope, too.
    pub(crate) fn count_in(&self, scope: Scope) {
        let mut scopes = self.scopes();
        if scopes.iter().all(|known| known.prefix() != scope.prefix()) {
            scopes.push(scope);
        }
    }

    /// Counts an update for all users of the table.
    pub(crate) fn count(&self, accepted: bool) {
        for scope in self.scopes().iter() {
            scope.counter("update_attempt").inc();
            scope
                .counter(if accepted {
                    "update_success"
                } else {
                    "update_rejected"
                })
                .inc();
        }
    }

    fn scopes(&self) -> MutexGuard<'_, Vec<Scope>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a new table in place.
    pub fn set(&self, table: Arc<RouteTable>) {
        self.table.store(Some(table));
    }

    /// The current table.
    pub fn load(&self) -> Option<Arc<RouteTable>> {
        self.table.load_full()
    }
}
