//! Numbers that a handler tells of itself, on Mixer's monitoring port.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64, Ordering},
};

/// Makes the counters of one handler. A handler that is rebuilt gets the same ones again and goes on counting.
pub trait Meter: Send + Sync {
    /// The counter of `event`: `mixer_adapter_events_total{handler,adapter,event}`. Name events in snake case
    /// and from a fixed set: `records_dropped`, never a value of a request.
    fn counter(&self, event: &'static str) -> Counter;

    /// The level of what `queue` holds: `mixer_adapter_queue{handler,adapter,queue}`. Name queues as events.
    fn gauge(&self, queue: &'static str) -> Gauge {
        let _for_nobody = queue;
        Gauge::default()
    }
}

/// Counts up. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// One more.
    pub fn inc(&self) {
        self.inc_by(1);
    }

    /// So many more.
    pub fn inc_by(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Goes up and down. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    /// More, or with a negative number less.
    pub fn add(&self, by: i64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// The level now.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts for nobody.
#[derive(Clone, Copy, Debug)]
pub struct NoMeter;

impl Meter for NoMeter {
    fn counter(&self, _event: &'static str) -> Counter {
        Counter::default()
    }
}
