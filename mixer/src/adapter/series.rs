//! Samples added up: what the adapters share that keep metrics themselves.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use lateen_adapter::{Text, params};
use serde::Deserialize;

/// Series of one metric. Labels come from requests: without a bound a caller could fill our memory.
pub const MAX_SERIES: usize = 10_000;
/// Bounds of a histogram.
const MAX_BUCKETS: usize = 200;
/// A full metric looks for expired series so often.
const SWEEP: Duration = Duration::from_secs(1);
/// The labels of the series that takes what exceeds [`MAX_SERIES`].
pub(super) const OVERFLOW: &str = "overflow";

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Kind {
    Counter,
    Gauge,
    Distribution,
}

/// The buckets of a distribution as written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) enum Buckets {
    #[serde(rename = "linearBuckets", alias = "linear_buckets")]
    Linear(Linear),
    #[serde(rename = "exponentialBuckets", alias = "exponential_buckets")]
    Exponential(Exponential),
    #[serde(rename = "explicitBuckets", alias = "explicit_buckets")]
    Explicit(Explicit),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Linear {
    #[serde(alias = "num_finite_buckets", deserialize_with = "params::integer")]
    num_finite_buckets: u32,
    width: f64,
    #[serde(default)]
    offset: f64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Exponential {
    #[serde(alias = "num_finite_buckets", deserialize_with = "params::integer")]
    num_finite_buckets: u32,
    #[serde(alias = "growth_factor")]
    growth_factor: f64,
    scale: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Explicit {
    bounds: Vec<f64>,
}

const DEFAULT_BOUNDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
]; // the client libraries'

impl Buckets {
    fn bounds(&self) -> Result<Vec<f64>, String> {
        let finite = match self {
            Self::Linear(b) => b.num_finite_buckets,
            Self::Exponential(b) => b.num_finite_buckets,
            Self::Explicit(b) => u32::try_from(b.bounds.len()).unwrap_or(u32::MAX),
        };
        if finite as usize >= MAX_BUCKETS {
            return Err(format!("buckets: {finite} are more than {MAX_BUCKETS}"));
        }
        let bounds: Vec<f64> = match self {
            Self::Linear(b) => (0..=finite)
                .map(|i| b.offset + f64::from(i) * b.width)
                .collect(),
            Self::Exponential(b) => {
                let mut bound = b.scale;
                (0..=finite)
                    .map(|_| {
                        let this = bound;
                        bound *= b.growth_factor;
                        this
                    })
                    .collect()
            }
            Self::Explicit(b) => b.bounds.clone(),
        };
        let grow = bounds
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a < b));
        if !grow || bounds.iter().any(|b| !b.is_finite()) {
            return Err("buckets: bounds must grow".into());
        }
        Ok(bounds)
    }
}

/// How samples are added up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) kind: Kind,
    /// Of a distribution.
    pub(super) bounds: Vec<f64>,
    /// A series that nobody writes to goes after so long; `None`: never.
    pub(super) expiry: Option<Duration>,
}

impl Shape {
    /// As written; says what is wrong with it.
    pub(super) fn new(
        kind: Option<Kind>,
        buckets: Option<&Buckets>,
        expiry: Option<Duration>,
    ) -> Result<Self, String> {
        let kind = kind.ok_or("kind must be COUNTER, GAUGE or DISTRIBUTION")?;
        let bounds = match (kind, buckets) {
            (Kind::Distribution, Some(buckets)) => buckets.bounds()?,
            (Kind::Distribution, None) => DEFAULT_BOUNDS.to_vec(),
            (_, Some(_)) => return Err("buckets are for DISTRIBUTION".into()),
            (_, None) => Vec::new(),
        };
        Ok(Self {
            kind,
            bounds,
            expiry,
        })
    }
}

/// The series of one metric, by the values of their labels.
#[derive(Debug, Default)]
pub(super) struct Table(Mutex<All>);

#[derive(Debug, Default)]
struct All {
    series: HashMap<Box<[Text]>, Series>,
    /// When what has expired was last looked for.
    swept: Duration,
}

/// One series.
#[derive(Debug)]
pub(super) struct Series {
    /// When it was begun, and last written, by the clock of whoever records.
    pub(super) begun: Duration,
    pub(super) written: Duration,
    /// The value, or the sum of a distribution.
    pub(super) value: f64,
    /// Observations per bucket, the last one beyond all bounds.
    pub(super) buckets: Box<[u64]>,
}

/// Where a sample went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    /// Into the series of its labels.
    Apart,
    /// Into the one for all that exceed the budget.
    Together,
}

impl Table {
    /// Adds a sample.
    pub(super) fn record(
        &self,
        shape: &Shape,
        labels: &[Text],
        sample: f64,
        now: Duration,
    ) -> Result<Recorded, String> {
        if shape.kind == Kind::Counter && sample < 0.0 {
            return Err(format!("a counter cannot go down by {sample}"));
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = all.series.get_mut(labels) {
            series.add(shape, sample, now);
            return Ok(Recorded::Apart);
        }
        // Not for every sample: who sends a crowd would make all others wait.
        if all.series.len() >= MAX_SERIES && now.saturating_sub(all.swept) >= SWEEP {
            all.expire(shape, now);
        }
        // The texts are parts of the request they came in; a series outlives it.
        let (labels, recorded): (Box<[Text]>, _) = if all.series.len() < MAX_SERIES {
            (labels.iter().map(Text::compact).collect(), Recorded::Apart)
        } else {
            let all_the_same = labels.iter().map(|_| Text::from(OVERFLOW));
            (all_the_same.collect(), Recorded::Together)
        };
        let series = all.series.entry(labels).or_insert_with(|| {
            let buckets = match shape.kind {
                Kind::Distribution => vec![0; shape.bounds.len() + 1],
                Kind::Counter | Kind::Gauge => Vec::new(),
            };
            Series {
                begun: now,
                written: now,
                value: 0.0,
                buckets: buckets.into(),
            }
        });
        series.add(shape, sample, now);
        Ok(recorded)
    }

    /// Shows all series, sorted by their labels, after those that have expired are dropped.
    pub(super) fn read<R>(
        &self,
        shape: &Shape,
        now: Duration,
        show: impl FnOnce(&[(&[Text], &Series)]) -> R,
    ) -> R {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.expire(shape, now);
        let mut sorted: Vec<_> = all
            .series
            .iter()
            .map(|(labels, s)| (&**labels, s))
            .collect();
        sorted.sort_by(|a, b| a.0.cmp(b.0));
        show(&sorted)
    }
}

impl Series {
    fn add(&mut self, shape: &Shape, sample: f64, now: Duration) {
        self.written = now;
        match shape.kind {
            Kind::Counter => self.value += sample,
            Kind::Gauge => self.value = sample,
            Kind::Distribution => {
                self.value += sample;
                let bucket = shape.bounds.partition_point(|bound| *bound < sample);
                if let Some(count) = self.buckets.get_mut(bucket) {
                    *count += 1;
                }
            }
        }
    }
}

impl All {
    fn expire(&mut self, shape: &Shape, now: Duration) {
        self.swept = now;
        if let Some(expiry) = shape.expiry {
            self.series
                .retain(|_, series| now.saturating_sub(series.written) < expiry);
        }
    }
}
