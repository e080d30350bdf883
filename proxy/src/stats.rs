//! Counters, gauges and histograms under Envoy's names.
//!
//! Writing is for the hot path: every worker adds to memory of its own, allocated when first touched.
//! Reading sums over the workers and is for admin only. The same full name is always the same instrument;
//! what a scope made goes when the scope is removed.
//!
//! Instruments come in two forms: groups ([`instruments`]) for what everything of a kind has, and handles
//! ([`Scope::counter`]) for what is named as it happens.

mod cells;
mod group;
mod histogram;

use std::{
    any::Any,
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use self::cells::count as count_in;
pub use self::{
    cells::set_worker,
    group::{Group, LazyCounter, LazyGauge, Shown},
    histogram::{BUCKETS, Histogram, LazyHistogram, Summary},
};
pub(crate) use self::{
    cells::{SHARDS, worker},
    group::instruments,
};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A difference that is briefly negative, because workers are read one after another, reads as 0.
fn positive(sum: u64) -> u64 {
    u64::try_from(sum.cast_signed()).unwrap_or(0)
}

/// What a handle's index belongs to.
type Owner = Arc<dyn Any + Send + Sync>;

/// Only grows. Clones are the same counter.
#[derive(Clone)]
pub struct Counter {
    index: u32,
    _owner: Owner,
}

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        count_in(self.index, n);
    }

    /// The sum over all workers.
    pub fn value(&self) -> u64 {
        cells::sum(self.index)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counter({})", self.value())
    }
}

/// Goes up and down. Clones are the same gauge. It is either set or counted, not both at once.
#[derive(Clone)]
pub struct Gauge {
    index: u32,
    _owner: Owner,
}

impl Gauge {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one off.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        count_in(self.index, n.cast_unsigned());
    }

    /// Makes the value `value`.
    pub fn set(&self, value: u64) {
        cells::set(self.index, value);
    }

    /// The sum over all workers; a difference that is briefly negative reads as 0.
    pub fn value(&self) -> u64 {
        positive(cells::sum(self.index))
    }
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gauge({})", self.value())
    }
}

/// One instrument as admin sees it.
#[derive(Clone, Copy, Debug)]
pub enum Instrument<'a> {
    /// Only grows.
    Counter(&'a LazyCounter),
    /// Goes up and down.
    Gauge(&'a LazyGauge),
    /// A distribution.
    Histogram(&'a LazyHistogram),
}

impl Instrument<'_> {
    fn touched(&self) -> bool {
        match self {
            Instrument::Counter(counter) => counter.0.touched(),
            Instrument::Gauge(gauge) => gauge.0.touched(),
            Instrument::Histogram(histogram) => histogram.summary().count > 0,
        }
    }
}

/// One that was made by its name.
#[derive(Clone)]
enum Single {
    Counter(Arc<LazyCounter>),
    Gauge(Arc<LazyGauge>),
    Histogram(Arc<LazyHistogram>),
}

impl Single {
    fn instrument(&self) -> Instrument<'_> {
        match self {
            Single::Counter(counter) => Instrument::Counter(counter),
            Single::Gauge(gauge) => Instrument::Gauge(gauge),
            Single::Histogram(histogram) => Instrument::Histogram(histogram),
        }
    }
}

#[derive(Default)]
struct Contents {
    groups: Vec<Arc<dyn Group>>,
    singles: BTreeMap<Arc<str>, Single>,
}

struct ScopeInner {
    prefix: Arc<str>,
    /// Prefix of the outermost scope this one was made from: it tells what the names are about.
    root: Arc<str>,
    contents: Mutex<Contents>,
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    scopes: Mutex<BTreeMap<Arc<str>, Arc<ScopeInner>>>,
    /// `ssl.handshake` is stored once, however many listeners have one.
    names: Mutex<HashSet<Arc<str>>>,
}

/// All instruments of this process (or of one test).
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

impl Registry {
    /// An empty one.
    #[allow(clippy::new_ret_no_self, reason = "always shared")]
    pub fn new() -> Arc<Registry> {
        Arc::new(Registry(Arc::default()))
    }

    /// The scope of a prefix such as `cluster.x.` (with the dot); the same prefix is the same scope.
    /// A `:` in it becomes `_`, as Envoy writes it.
    pub fn scope(&self, prefix: &str) -> Scope {
        let prefix: Arc<str> = match prefix.contains(':') {
            true => prefix.replace(':', "_").into(),
            false => prefix.into(),
        };
        self.scope_within(prefix.clone(), prefix)
    }

    fn scope_within(&self, prefix: Arc<str>, root: Arc<str>) -> Scope {
        let mut scopes = lock(&self.0.scopes);
        let scope = scopes.entry(prefix.clone()).or_insert_with(|| {
            Arc::new(ScopeInner {
                prefix,
                root,
                contents: Mutex::default(),
                inner: self.0.clone(),
            })
        });
        Scope(scope.clone())
    }

    /// Takes a scope and those beneath it from what [`Registry::each`] sees. Handles stay usable, unseen.
    pub fn remove(&self, prefix: &str) {
        let prefix = prefix.replace(':', "_");
        lock(&self.0.scopes).retain(|name, _| !name.starts_with(&prefix));
    }

    /// Calls `see` with the outermost scope, the name in it, and the instrument; sorted by full name.
    pub fn each(&self, mut see: impl FnMut(&str, &str, &Instrument<'_>)) {
        let scopes: Vec<Arc<ScopeInner>> = lock(&self.0.scopes).values().cloned().collect();
        // Scopes come sorted, but the names of one beneath another are among those of the other.
        let mut begin = 0;
        while begin < scopes.len() {
            let outer = &scopes[begin].prefix;
            let beneath = scopes[begin..]
                .iter()
                .take_while(|scope| scope.prefix.starts_with(&**outer))
                .count();
            see_sorted(&scopes[begin..begin + beneath], &mut see);
            begin += beneath;
        }
    }

    /// The value of a counter or gauge by its full name.
    pub fn value(&self, full_name: &str) -> Option<u64> {
        let mut value = None;
        self.each(|root, name, instrument| {
            if full_name.strip_prefix(root) == Some(name) {
                value = match instrument {
                    Instrument::Counter(counter) => Some(counter.value()),
                    Instrument::Gauge(gauge) => Some(gauge.value()),
                    Instrument::Histogram(_) => None,
                };
            }
        });
        value
    }
}

fn see_sorted(scopes: &[Arc<ScopeInner>], see: &mut impl FnMut(&str, &str, &Instrument<'_>)) {
    let contents: Vec<_> = scopes
        .iter()
        .map(|scope| {
            let contents = lock(&scope.contents);
            let singles: Vec<_> = contents
                .singles
                .iter()
                .map(|(name, single)| (name.clone(), single.clone()))
                .collect();
            (scope, contents.groups.clone(), singles)
        })
        .collect();
    let mut all: Vec<(&ScopeInner, &str, Instrument<'_>)> = Vec::new();
    for (scope, groups, singles) in &contents {
        for group in groups {
            group.each(&mut |name, instrument, shown| {
                if shown == Shown::Always || instrument.touched() {
                    all.push((scope, name, instrument));
                }
            });
        }
        all.extend(
            singles
                .iter()
                .map(|(name, single)| (&***scope, &**name, single.instrument())),
        );
    }
    let full = |scope: &ScopeInner, name: &str| format!("{}{name}", scope.prefix);
    all.sort_by_cached_key(|(scope, name, _)| full(scope, name));
    for (scope, name, instrument) in all {
        match scope.prefix.strip_prefix(&*scope.root) {
            Some("") => see(&scope.root, name, &instrument),
            _ => {
                let full = full(scope, name);
                let name = full.strip_prefix(&*scope.root).unwrap_or(&full);
                see(&scope.root, name, &instrument);
            }
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registry({} scopes)", lock(&self.0.scopes).len())
    }
}

/// A place for instruments whose names begin alike.
#[derive(Clone)]
pub struct Scope(Arc<ScopeInner>);

impl Scope {
    /// The group of this type in this scope. It must be made before single instruments of its names.
    pub fn group<G: Group + Default>(&self) -> Arc<G> {
        let mut contents = lock(&self.0.contents);
        for group in &contents.groups {
            let any: Owner = group.clone();
            if let Ok(group) = any.downcast::<G>() {
                return group;
            }
        }
        let group = Arc::<G>::default();
        contents.groups.reserve_exact(1);
        contents.groups.push(group.clone());
        group
    }

    /// The counter of this name in this scope.
    pub fn counter(&self, name: &str) -> Counter {
        let (index, owner) = self.single(
            name,
            |instrument| match instrument {
                Instrument::Counter(counter) => Some(counter.0.index()),
                _ => None,
            },
            || {
                let counter = Arc::<LazyCounter>::default();
                (counter.0.index(), counter.clone(), Single::Counter(counter))
            },
        );
        Counter {
            index,
            _owner: owner,
        }
    }

    /// The gauge of this name in this scope.
    pub fn gauge(&self, name: &str) -> Gauge {
        let (index, owner) = self.single(
            name,
            |instrument| match instrument {
                Instrument::Gauge(gauge) => Some(gauge.0.index()),
                _ => None,
            },
            || {
                let gauge = Arc::<LazyGauge>::default();
                (gauge.0.index(), gauge.clone(), Single::Gauge(gauge))
            },
        );
        Gauge {
            index,
            _owner: owner,
        }
    }

    /// The histogram of this name in this scope.
    pub fn histogram(&self, name: &str) -> Histogram {
        let (histogram, _) = self.single(
            name,
            |instrument| match instrument {
                Instrument::Histogram(histogram) => Some(histogram.share()),
                _ => None,
            },
            || {
                let histogram = Arc::<LazyHistogram>::default();
                (
                    histogram.share(),
                    histogram.clone(),
                    Single::Histogram(histogram),
                )
            },
        );
        histogram
    }

    /// A scope beneath this one: `x.` in `cluster.c.` is `cluster.c.x.`.
    pub fn scope(&self, prefix: &str) -> Scope {
        let prefix = format!("{}{}", self.0.prefix, prefix.replace(':', "_"));
        Registry(self.0.inner.clone()).scope_within(prefix.into(), self.0.root.clone())
    }

    /// Takes this scope, and those beneath it, from what admin shows.
    pub fn remove(&self) {
        Registry(self.0.inner.clone()).remove(&self.0.prefix);
    }

    /// What all names in it begin with.
    pub fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// The instrument of a name, as what `of` takes from it, with what keeps it; made unless there is one.
    /// A name that is there as another kind stays what it is, and the caller gets one that nobody sees.
    fn single<T, O: Any + Send + Sync>(
        &self,
        name: &str,
        of: impl Fn(Instrument<'_>) -> Option<T>,
        make: impl FnOnce() -> (T, Arc<O>, Single),
    ) -> (T, Owner) {
        let mut contents = lock(&self.0.contents);
        let mut taken = false;
        if let Some(single) = contents.singles.get(name) {
            taken = true;
            if let Some(found) = of(single.instrument()) {
                let owner: Owner = match single {
                    Single::Counter(counter) => counter.clone(),
                    Single::Gauge(gauge) => gauge.clone(),
                    Single::Histogram(histogram) => histogram.clone(),
                };
                return (found, owner);
            }
        }
        for group in &contents.groups {
            let mut found = None;
            group.each(&mut |known, instrument, _| {
                if known == name {
                    taken = true;
                    found = of(instrument);
                }
            });
            if let Some(found) = found {
                return (found, group.clone());
            }
        }
        let (made, owner, single) = make();
        if taken {
            tracing::warn!(
                scope = &*self.0.prefix,
                name,
                "this name is another kind of statistic"
            );
        } else {
            contents.singles.insert(self.0.inner.intern(name), single);
        }
        (made, owner)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scope({})", self.0.prefix)
    }
}

impl Inner {
    fn intern(&self, name: &str) -> Arc<str> {
        let mut names = lock(&self.names);
        match names.get(name) {
            Some(found) => found.clone(),
            None => {
                let new: Arc<str> = name.into();
                names.insert(new.clone());
                new
            }
        }
    }
}

#[cfg(test)]
mod tests;
