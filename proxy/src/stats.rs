//! Counters, gauges and histograms under Envoy's names.
//!
//! Writing is for the hot path: every worker adds to memory of its own (a shard), found by a
//! thread-local number, allocated when first touched. Reading sums the shards and is for admin only.
//! The same full name is always the same instrument; what a scope made goes when the scope is removed.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

/// Shard 0 is everybody's who is not a worker; workers beyond the last share shards.
const SHARDS: usize = 65;
/// Cells allocated at once: one page.
const CHUNK: usize = 512;
/// Bounds the number of counters and gauges to 4M, far above what a configuration can make.
const CHUNKS: usize = 8192;

thread_local! {
    static WORKER: Cell<usize> = const { Cell::new(0) };
}

/// Gives the calling thread a shard of its own; `index` counts workers from 0.
pub fn set_worker(index: usize) {
    WORKER.set(1 + index % (SHARDS - 1));
}

type Chunk = [AtomicU64; CHUNK];
/// Chunks of one shard, allocated when first touched.
type Shard = Box<[OnceLock<Box<Chunk>>]>;

/// The numbers themselves; instruments are indexes into it.
struct Cells {
    shards: Box<[OnceLock<Shard>]>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    next: usize,
    returned: Vec<usize>,
}

impl Cells {
    fn new() -> Cells {
        Cells {
            shards: (0..SHARDS).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
        }
    }

    fn cell(&self, index: usize) -> &AtomicU64 {
        let shard = self.shards[WORKER.get()]
            .get_or_init(|| (0..CHUNKS).map(|_| OnceLock::new()).collect());
        let chunk =
            shard[index / CHUNK].get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK]));
        &chunk[index % CHUNK]
    }

    fn sum(&self, index: usize) -> u64 {
        self.each(index)
            .fold(0, |sum, cell| sum.wrapping_add(cell.load(Relaxed)))
    }

    fn each(&self, index: usize) -> impl Iterator<Item = &AtomicU64> {
        self.shards
            .iter()
            .filter_map(move |shard| shard.get()?.get(index / CHUNK)?.get())
            .map(move |chunk| &chunk[index % CHUNK])
    }

    /// The last cell is handed out again and again when all are taken: wrong numbers, no crash.
    fn allocate(&self) -> usize {
        let mut free = lock(&self.free);
        free.returned.pop().unwrap_or_else(|| {
            let index = free.next;
            free.next = (index + 1).min(CHUNK * CHUNKS - 1);
            index
        })
    }

    fn give_back(&self, index: usize) {
        for cell in self.each(index) {
            cell.store(0, Relaxed);
        }
        if index < CHUNK * CHUNKS - 1 {
            lock(&self.free).returned.push(index);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Slot {
    index: usize,
    cells: Arc<Cells>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.cells.give_back(self.index);
    }
}

/// Only grows. Clones are the same counter.
#[derive(Clone)]
pub struct Counter(Arc<Slot>);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.cells.cell(self.0.index).fetch_add(n, Relaxed);
    }

    /// The sum over all workers.
    pub fn value(&self) -> u64 {
        self.0.cells.sum(self.0.index)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counter({})", self.value())
    }
}

struct GaugeSlot {
    slot: Slot,
    /// What `set` decided; the shards hold differences to it.
    base: AtomicI64,
}

/// Goes up and down. Clones are the same gauge.
#[derive(Clone)]
pub struct Gauge(Arc<GaugeSlot>);

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
        let slot = &self.0.slot;
        slot.cells
            .cell(slot.index)
            .fetch_add(n.cast_unsigned(), Relaxed);
    }

    /// Makes the value `value`. A gauge is either set or counted, not both at once.
    pub fn set(&self, value: u64) {
        let base = value.cast_signed().wrapping_sub(self.shards());
        self.0.base.store(base, Relaxed);
    }

    /// The sum over all workers; a difference that is briefly negative reads as 0.
    pub fn value(&self) -> u64 {
        let value = self.0.base.load(Relaxed).wrapping_add(self.shards());
        u64::try_from(value).unwrap_or(0)
    }

    fn shards(&self) -> i64 {
        self.0.slot.cells.sum(self.0.slot.index).cast_signed()
    }
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gauge({})", self.value())
    }
}

/// Upper bounds of the buckets `/stats/prometheus` shows: Envoy's default, in milliseconds.
pub const BUCKETS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5,
    1.8e6, 3.6e6,
];
/// Values below this have a bucket each.
const EXACT: u64 = 16;
/// Above, every power of two is cut into eight: quantiles are right within 6 %.
const FINE: usize = 16 + 60 * 8;

struct HistogramShard {
    sum: AtomicU64,
    fine: [AtomicU64; FINE],
    coarse: [AtomicU64; BUCKETS.len() + 1],
}

fn fine_index(value: u64) -> usize {
    if value < EXACT {
        return usize::try_from(value).unwrap_or(0);
    }
    let power = value.ilog2(); // 4..=63
    let eighth = (value >> (power - 3)) & 7;
    16 + (power as usize - 4) * 8 + usize::try_from(eighth).unwrap_or(0)
}

fn fine_bound(index: usize) -> u64 {
    if index < 16 {
        return index as u64;
    }
    let (power, eighth) = ((index - 16) / 8 + 4, (index - 16) % 8);
    (8 + eighth as u64) << (power - 3)
}

/// Distribution of values, mostly milliseconds. Clones are the same histogram.
#[derive(Clone)]
pub struct Histogram(Arc<[OnceLock<Box<HistogramShard>>]>);

impl Histogram {
    fn new() -> Histogram {
        Histogram((0..SHARDS).map(|_| OnceLock::new()).collect())
    }

    /// Adds one value.
    pub fn record(&self, value: u64) {
        let shard = self.0[WORKER.get()].get_or_init(|| {
            Box::new(HistogramShard {
                sum: AtomicU64::new(0),
                fine: [const { AtomicU64::new(0) }; FINE],
                coarse: [const { AtomicU64::new(0) }; BUCKETS.len() + 1],
            })
        });
        shard.sum.fetch_add(value, Relaxed);
        shard.fine[fine_index(value)].fetch_add(1, Relaxed);
        #[allow(clippy::cast_precision_loss, reason = "the bounds are small")]
        let coarse = BUCKETS
            .iter()
            .take_while(|bound| value as f64 > **bound)
            .count();
        shard.coarse[coarse].fetch_add(1, Relaxed);
    }

    /// The sums over all workers.
    pub fn summary(&self) -> Summary {
        let mut summary = Summary {
            count: 0,
            sum: 0,
            buckets: [0; BUCKETS.len()],
            fine: vec![0; FINE],
        };
        for shard in self.0.iter().filter_map(OnceLock::get) {
            summary.sum += shard.sum.load(Relaxed);
            for (total, cell) in summary.fine.iter_mut().zip(&shard.fine) {
                *total += cell.load(Relaxed);
            }
            let mut below = 0;
            for (index, cell) in shard.coarse.iter().enumerate() {
                below += cell.load(Relaxed);
                match summary.buckets.get_mut(index) {
                    Some(bucket) => *bucket += below,
                    None => summary.count += below,
                }
            }
        }
        summary
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram({} values)", self.summary().count)
    }
}

/// What a histogram has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of values.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// How many were at most the bound of the same index in [`BUCKETS`].
    pub buckets: [u64; BUCKETS.len()],
    fine: Vec<u64>,
}

impl Summary {
    /// The value below which `percent` of all lie.
    pub fn quantile(&self, percent: f64) -> Option<u64> {
        let total: u64 = self.fine.iter().sum();
        if total == 0 {
            return None;
        }
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank among counted values"
        )]
        let rank = ((total as f64 * percent / 100.0).ceil() as u64).max(1);
        let mut seen = 0;
        self.fine
            .iter()
            .position(|n| {
                seen += n;
                seen >= rank
            })
            .map(fine_bound)
    }
}

/// One instrument as admin sees it.
#[derive(Clone, Debug)]
pub enum Instrument {
    /// Only grows.
    Counter(Counter),
    /// Goes up and down.
    Gauge(Gauge),
    /// A distribution.
    Histogram(Histogram),
}

struct ScopeInner {
    prefix: Arc<str>,
    /// Prefix of the outermost scope this one was made from: it tells what the names are about.
    root: Arc<str>,
    instruments: Mutex<BTreeMap<Arc<str>, Instrument>>,
    inner: Arc<Inner>,
}

struct Inner {
    cells: Arc<Cells>,
    scopes: Mutex<BTreeMap<Arc<str>, Arc<ScopeInner>>>,
    /// `upstream_rq_total` is stored once, however many clusters have one.
    names: Mutex<HashSet<Arc<str>>>,
    /// What instruments of a kind that the name does not have are counted in, lest anybody panics.
    stray: Mutex<HashMap<&'static str, Instrument>>,
}

/// All instruments of this process (or of one test).
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

impl Registry {
    /// An empty one.
    #[allow(clippy::new_ret_no_self, reason = "always shared")]
    pub fn new() -> Arc<Registry> {
        Arc::new(Registry(Arc::new(Inner {
            cells: Arc::new(Cells::new()),
            scopes: Mutex::default(),
            names: Mutex::default(),
            stray: Mutex::default(),
        })))
    }

    /// The scope of a prefix such as `cluster.x.` (with the dot); the same prefix is the same scope.
    /// A `:` in it becomes `_`, as Envoy writes it.
    pub fn scope(&self, prefix: &str) -> Scope {
        let prefix: Arc<str> = prefix.replace(':', "_").into();
        self.scope_within(prefix.clone(), prefix)
    }

    fn scope_within(&self, prefix: Arc<str>, root: Arc<str>) -> Scope {
        let mut scopes = lock(&self.0.scopes);
        let scope = scopes.entry(prefix.clone()).or_insert_with(|| {
            Arc::new(ScopeInner {
                prefix,
                root,
                instruments: Mutex::default(),
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
    pub fn each(&self, mut see: impl FnMut(&str, &str, &Instrument)) {
        let scopes: Vec<Arc<ScopeInner>> = lock(&self.0.scopes).values().cloned().collect();
        let mut all = Vec::new();
        for scope in scopes {
            for (name, instrument) in lock(&scope.instruments).iter() {
                all.push((
                    format!("{}{name}", scope.prefix),
                    scope.root.clone(),
                    instrument.clone(),
                ));
            }
        }
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        for (full, root, instrument) in &all {
            see(root, full.strip_prefix(&**root).unwrap_or(full), instrument);
        }
    }

    /// The value of a counter or gauge by its full name.
    pub fn value(&self, full_name: &str) -> Option<u64> {
        let scopes: Vec<Arc<ScopeInner>> = lock(&self.0.scopes)
            .values()
            .filter(|scope| full_name.starts_with(&*scope.prefix))
            .cloned()
            .collect();
        scopes.iter().find_map(|scope| {
            let instruments = lock(&scope.instruments);
            match instruments.get(&full_name[scope.prefix.len()..])? {
                Instrument::Counter(counter) => Some(counter.value()),
                Instrument::Gauge(gauge) => Some(gauge.value()),
                Instrument::Histogram(_) => None,
            }
        })
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
    /// The counter of this name in this scope.
    pub fn counter(&self, name: &str) -> Counter {
        match self.instrument("counter", name, |inner| {
            Instrument::Counter(inner.counter())
        }) {
            Instrument::Counter(counter) => counter,
            _ => self.0.inner.counter(),
        }
    }

    /// The gauge of this name in this scope.
    pub fn gauge(&self, name: &str) -> Gauge {
        match self.instrument("gauge", name, |inner| Instrument::Gauge(inner.gauge())) {
            Instrument::Gauge(gauge) => gauge,
            _ => self.0.inner.gauge(),
        }
    }

    /// The histogram of this name in this scope.
    pub fn histogram(&self, name: &str) -> Histogram {
        match self.instrument("histogram", name, |_| {
            Instrument::Histogram(Histogram::new())
        }) {
            Instrument::Histogram(histogram) => histogram,
            _ => Histogram::new(),
        }
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

    fn instrument(
        &self,
        kind: &'static str,
        name: &str,
        make: impl FnOnce(&Inner) -> Instrument,
    ) -> Instrument {
        let mut instruments = lock(&self.0.instruments);
        if let Some(found) = instruments.get(name) {
            if found.kind() == kind {
                return found.clone();
            }
            tracing::warn!(
                scope = &*self.0.prefix,
                name,
                kind,
                "this name is another kind of statistic"
            );
            let mut stray = lock(&self.0.inner.stray);
            return stray
                .entry(kind)
                .or_insert_with(|| make(&self.0.inner))
                .clone();
        }
        let made = make(&self.0.inner);
        instruments.insert(self.0.inner.intern(name), made.clone());
        made
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scope({})", self.0.prefix)
    }
}

impl Instrument {
    fn kind(&self) -> &'static str {
        match self {
            Instrument::Counter(_) => "counter",
            Instrument::Gauge(_) => "gauge",
            Instrument::Histogram(_) => "histogram",
        }
    }
}

impl Inner {
    fn slot(&self) -> Slot {
        Slot {
            index: self.cells.allocate(),
            cells: self.cells.clone(),
        }
    }

    fn counter(&self) -> Counter {
        Counter(Arc::new(self.slot()))
    }

    fn gauge(&self) -> Gauge {
        Gauge(Arc::new(GaugeSlot {
            slot: self.slot(),
            base: AtomicI64::new(0),
        }))
    }

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
mod tests {
    use super::*;

    #[test]
    fn the_same_name_is_the_same_instrument_on_every_worker() {
        let registry = Registry::new();
        let counter = registry.scope("cluster.a:b.").counter("upstream_rq_total");
        let again = registry.scope("cluster.a_b.").counter("upstream_rq_total");
        std::thread::scope(|threads| {
            for worker in 0..4 {
                let counter = &counter;
                threads.spawn(move || {
                    set_worker(worker);
                    counter.add(10);
                });
            }
        });
        again.inc();
        assert_eq!(counter.value(), 41);
        assert_eq!(registry.value("cluster.a_b.upstream_rq_total"), Some(41));
    }

    #[test]
    fn gauges_are_set_or_counted() {
        let registry = Registry::new();
        let scope = registry.scope("server.");
        let gauge = scope.gauge("live");
        gauge.inc();
        gauge.inc();
        gauge.dec();
        assert_eq!(gauge.value(), 1);
        gauge.set(7);
        assert_eq!(gauge.value(), 7);
        gauge.add(-9);
        assert_eq!(gauge.value(), 0);
    }

    #[test]
    fn a_cell_is_clean_when_it_is_used_again() {
        let registry = Registry::new();
        registry.scope("cluster.a.").counter("x").add(5);
        registry.scope("cluster.a.sub.").counter("y").add(5);
        registry.remove("cluster.a.");
        assert_eq!(registry.value("cluster.a.x"), None);
        assert_eq!(registry.scope("cluster.b.").counter("x").value(), 0);
        assert_eq!(registry.scope("cluster.b.").counter("y").value(), 0);
    }

    #[test]
    fn a_name_used_as_two_kinds_stays_what_it_was_first() {
        let registry = Registry::new();
        let scope = registry.scope("");
        scope.counter("x").inc();
        scope.gauge("x").inc();
        assert_eq!(registry.value("x"), Some(1));
    }

    #[test]
    fn quantiles_and_buckets() {
        let histogram = Registry::new().scope("").histogram("time");
        for value in 1..=100 {
            histogram.record(value);
        }
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.sum), (100, 5050));
        assert_eq!(summary.buckets[..7], [0, 1, 5, 10, 25, 50, 100]);
        assert_eq!(summary.quantile(50.0), Some(48)); // 48..52 share a bucket
        assert_eq!(summary.quantile(0.0), Some(1));
        histogram.record(u64::MAX);
        assert_eq!(histogram.summary().quantile(100.0), Some(15 << 60));
    }
}
