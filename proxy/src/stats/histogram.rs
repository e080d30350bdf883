//! Distributions of values, mostly milliseconds.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::cells::{self, SHARDS};

/// Upper bounds of the buckets `/stats/prometheus` shows: Envoy's default, in milliseconds.
pub const BUCKETS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5,
    1.8e6, 3.6e6,
];
/// Values below this have a bucket each.
const EXACT: u64 = 16;
/// Above, every power of two is cut into eight: quantiles are right within 6 %.
const FINE: usize = 16 + 28 * 8;
/// Quantiles see no difference beyond: 49 days in milliseconds.
const LARGEST: u64 = u32::MAX as u64;

struct Shards([OnceLock<Box<Shard>>; SHARDS]);

impl Default for Shards {
    fn default() -> Shards {
        Shards([const { OnceLock::new() }; SHARDS])
    }
}

struct Shard {
    sum: AtomicU64,
    fine: [AtomicU64; FINE],
    coarse: [AtomicU64; BUCKETS.len() + 1],
}

fn fine_index(value: u64) -> usize {
    let value = value.min(LARGEST);
    if value < EXACT {
        return usize::try_from(value).unwrap_or(0);
    }
    let power = value.ilog2(); // 4..=31
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

fn coarse_index(value: u64) -> usize {
    #[allow(clippy::cast_precision_loss, reason = "the bounds are small")]
    let value = value as f64;
    BUCKETS.iter().take_while(|bound| value > **bound).count()
}

impl Shards {
    fn record(&self, value: u64) {
        let worker = cells::worker();
        let shard = self.0[worker].get_or_init(|| {
            Box::new(Shard {
                sum: AtomicU64::new(0),
                fine: [const { AtomicU64::new(0) }; FINE],
                coarse: [const { AtomicU64::new(0) }; BUCKETS.len() + 1],
            })
        });
        cells::add(&shard.sum, worker, value);
        cells::add(&shard.fine[fine_index(value)], worker, 1);
        cells::add(&shard.coarse[coarse_index(value)], worker, 1);
    }

    fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for shard in self.0.iter().filter_map(OnceLock::get) {
            summary.sum = summary.sum.wrapping_add(shard.sum.load(Relaxed));
            summary.fine.resize(FINE, 0);
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

/// A histogram of a group: nothing is allocated before the first value.
#[derive(Default)]
pub struct LazyHistogram(OnceLock<Arc<Shards>>);

impl LazyHistogram {
    /// Adds one value.
    pub fn record(&self, value: u64) {
        self.0.get_or_init(Arc::default).record(value);
    }

    /// The sums over all workers.
    pub fn summary(&self) -> Summary {
        self.0
            .get()
            .map(|shards| shards.summary())
            .unwrap_or_default()
    }

    /// A handle.
    pub(super) fn share(&self) -> Histogram {
        Histogram(self.0.get_or_init(Arc::default).clone())
    }
}

impl fmt::Debug for LazyHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram({} values)", self.summary().count)
    }
}

/// A histogram. Clones are the same histogram.
#[derive(Clone)]
pub struct Histogram(Arc<Shards>);

impl Histogram {
    /// Adds one value.
    pub fn record(&self, value: u64) {
        self.0.record(value);
    }

    /// The sums over all workers.
    pub fn summary(&self) -> Summary {
        self.0.summary()
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Histogram({} values)", self.summary().count)
    }
}

/// What a histogram has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_buckets() {
        let histogram = LazyHistogram::default();
        assert_eq!(histogram.summary(), Summary::default());
        for value in 1..=100 {
            histogram.record(value);
        }
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.sum), (100, 5050));
        assert_eq!(summary.buckets[..7], [0, 1, 5, 10, 25, 50, 100]);
        assert_eq!(summary.quantile(50.0), Some(48)); // 48..52 share a bucket
        assert_eq!(summary.quantile(0.0), Some(1));
        let again = histogram.share();
        again.record(u64::from(u32::MAX));
        again.record(u64::MAX);
        assert_eq!(histogram.summary().quantile(100.0), Some(15 << 28));
        assert_eq!(histogram.summary().count, 102);
    }
}
