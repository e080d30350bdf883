//! Quota counted in memory: exact within one Mixer, not shared between replicas.
//!
//! A limit with a duration is a rolling window: at no moment have more than `maxAmount` been granted within
//! the last `validDuration`. A limit without one is a stock that is given back by negative amounts.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Clock, Code, Counter, Env, Handler, HandlerError, Info,
    QuotaArgs, QuotaHandler, QuotaResult, QuotaWindow, Status,
    instance::{QuotaInstance, Values},
    params, template,
};
use serde::Deserialize;

use super::limits;

/// Counters of one handler. One more is refused until an old one is idle.
const MAX_CELLS: usize = 100_000; // about 20 MB; more distinct dimension values are an attack or a mistake
/// Remembered deduplication ids; when there are more, the oldest half is forgotten early.
const MAX_DEDUPLICATED: usize = 100_000;
/// Grants a window tells apart; above it, neighbours are counted as if they came with the later one.
const MAX_GRANTS: usize = 256;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct MemQuota;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    quotas: Vec<Quota>,
    #[serde(
        alias = "min_deduplication_duration",
        deserialize_with = "params::duration"
    )]
    min_deduplication_duration: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            quotas: Vec::new(),
            min_deduplication_duration: Duration::from_secs(1),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Quota {
    name: String,
    #[serde(alias = "max_amount", deserialize_with = "params::integer", default)]
    max_amount: i64,
    #[serde(
        alias = "valid_duration",
        deserialize_with = "params::duration",
        default
    )]
    valid_duration: Duration,
    #[serde(default)]
    overrides: Vec<Override>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Override {
    #[serde(default)]
    dimensions: HashMap<String, String>,
    #[serde(alias = "max_amount", deserialize_with = "params::integer", default)]
    max_amount: i64,
    #[serde(
        alias = "valid_duration",
        deserialize_with = "params::duration",
        default
    )]
    valid_duration: Duration,
}

/// How much per how long; zero duration: for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    max_amount: i64,
    valid_duration: Duration,
}

impl Quota {
    /// The first override whose dimensions all have these values, or the quota's own limit.
    fn limit(&self, dimensions: &Values) -> Limit {
        let found = self
            .overrides
            .iter()
            .find(|o| limits::is_met(&o.dimensions, dimensions));
        match found {
            Some(o) => Limit {
                max_amount: o.max_amount,
                valid_duration: o.valid_duration,
            },
            None => Limit {
                max_amount: self.max_amount,
                valid_duration: self.valid_duration,
            },
        }
    }
}

impl Adapter for MemQuota {
    fn info(&self) -> Info {
        Info {
            name: "memquota",
            description: "grants quota from counters in memory",
            templates: const { &[&template::QUOTA] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let params = match params::parse::<Params>(candidate.params) {
            Ok(params) => params,
            Err(problem) => return vec![problem],
        };
        let written: Vec<_> = params
            .quotas
            .iter()
            .map(|q| limits::Written {
                name: &q.name,
                max_amount: q.max_amount,
                overrides: q.overrides.iter().map(|o| o.max_amount).collect(),
            })
            .collect();
        limits::problems(&written, candidate.instances)
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        let quotas = params
            .quotas
            .into_iter()
            .map(|q| (q.name.clone(), q))
            .collect();
        let now = env.clock().now();
        Ok(Handler::new().with_quota(Arc::new(Counters {
            quotas,
            clock: env.clock().clone(),
            refused: env.counter("counters_refused"),
            state: Mutex::new(State {
                cells: HashMap::new(),
                recent: Deduplication::new(params.min_deduplication_duration, now),
            }),
        })))
    }
}

struct Counters {
    quotas: HashMap<String, Quota>,
    clock: Clock,
    /// Calls refused because there are too many counters.
    refused: Counter,
    state: Mutex<State>,
}

struct State {
    cells: HashMap<String, Cell>,
    recent: Deduplication,
}

impl QuotaHandler for Counters {
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        async move { self.take(&instance, args) }.boxed()
    }
}

impl Counters {
    fn take(
        &self,
        instance: &QuotaInstance,
        args: &QuotaArgs,
    ) -> Result<QuotaResult, HandlerError> {
        let quota = self
            .quotas
            .get(&*instance.name)
            .ok_or_else(|| HandlerError::invalid(format!("{} has no limit", instance.name)))?;
        let limit = quota.limit(&instance.dimensions);
        let key = limits::key(instance);
        let now = self.clock.now();

        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { cells, recent } = &mut *state;
        let before = recent.find(&args.dedup_id, &key, now);
        if !cells.contains_key(&key) && cells.len() >= MAX_CELLS {
            cells.retain(|_, cell| !cell.is_idle(now));
            if cells.len() >= MAX_CELLS {
                self.refused.inc();
                return Err(HandlerError {
                    code: Code::ResourceExhausted,
                    message: format!("{} has too many counters", instance.name),
                });
            }
        }
        let cell = cells.entry(key.clone()).or_insert_with(|| Cell::new(limit));
        let granted = match before {
            Some(granted) => {
                cell.expire(now);
                granted
            }
            None => {
                let granted = cell.take(args.amount, args.best_effort, now);
                recent.remember(&args.dedup_id, key, granted);
                granted
            }
        };
        Ok(QuotaResult {
            status: Status::ok(),
            valid_duration: Some(limit.valid_duration),
            granted,
            window: Some(cell.window(now)),
        })
    }
}

/// What has been taken of one limit.
struct Cell {
    limit: Limit,
    /// Oldest first. Without a duration: one for all.
    grants: VecDeque<Grant>,
    taken: i64,
}

/// What was granted at one time, or between two.
#[derive(Clone, Copy, Debug)]
struct Grant {
    first: Duration,
    last: Duration,
    amount: i64,
}

impl Cell {
    fn new(limit: Limit) -> Self {
        Self {
            limit,
            grants: VecDeque::new(),
            taken: 0,
        }
    }

    fn take(&mut self, amount: i64, best_effort: bool, now: Duration) -> i64 {
        self.expire(now);
        if amount < 0 {
            return self.give_back(amount.saturating_neg());
        }
        let left = self.limit.max_amount.saturating_sub(self.taken);
        let granted = match (amount <= left, best_effort) {
            (true, _) => amount,
            (false, true) => left.max(0),
            (false, false) => 0,
        };
        if granted > 0 {
            self.taken = self.taken.saturating_add(granted);
            self.record(granted, now);
        }
        granted
    }

    /// How the limit stands; expired before.
    fn window(&self, now: Duration) -> QuotaWindow {
        let leaves = self.grants.front().map(|grant| {
            let until = grant.last.saturating_add(self.limit.valid_duration);
            until.saturating_sub(now)
        });
        QuotaWindow {
            limit: self.limit.max_amount,
            remaining: self.limit.max_amount.saturating_sub(self.taken).max(0),
            reset: match leaves {
                Some(leaves) if !self.limit.valid_duration.is_zero() => leaves,
                _ => Duration::ZERO,
            },
        }
    }

    fn record(&mut self, granted: i64, now: Duration) {
        let window = self.limit.valid_duration;
        let is_crowded = self.grants.len() >= MAX_GRANTS / 2;
        match self.grants.back_mut() {
            Some(grant) if window.is_zero() => grant.amount = grant.amount.saturating_add(granted),
            // Grants that are counted with a later one stay in force a little longer, never shorter:
            // the limit holds in any window.
            Some(grant)
                if is_crowded
                    && now.saturating_sub(grant.first) < window / (MAX_GRANTS as u32 / 2) =>
            {
                grant.last = now;
                grant.amount = grant.amount.saturating_add(granted);
            }
            _ => self.grants.push_back(Grant {
                first: now,
                last: now,
                amount: granted,
            }),
        }
    }

    /// Gives back the newest first; answers with the negative of what it could.
    fn give_back(&mut self, mut amount: i64) -> i64 {
        let mut returned = 0;
        while amount > 0 {
            let Some(grant) = self.grants.back_mut() else {
                break;
            };
            let part = amount.min(grant.amount);
            grant.amount -= part;
            amount -= part;
            returned += part;
            if grant.amount == 0 {
                self.grants.pop_back();
            }
        }
        self.taken -= returned;
        -returned
    }

    fn expire(&mut self, now: Duration) {
        if self.limit.valid_duration.is_zero() {
            return;
        }
        while let Some(oldest) = self.grants.front().copied() {
            if now.saturating_sub(oldest.last) < self.limit.valid_duration {
                break;
            }
            self.taken -= oldest.amount;
            self.grants.pop_front();
        }
    }

    fn is_idle(&mut self, now: Duration) -> bool {
        self.expire(now);
        self.grants.is_empty()
    }
}

/// What was granted to whom lately: two generations, so that each grant is remembered for at least the
/// minimum and at most twice that.
struct Deduplication {
    minimum: Duration,
    rotated: Duration,
    young: HashMap<(Arc<str>, String), i64>,
    old: HashMap<(Arc<str>, String), i64>,
}

impl Deduplication {
    fn new(minimum: Duration, now: Duration) -> Self {
        Self {
            minimum,
            rotated: now,
            young: HashMap::new(),
            old: HashMap::new(),
        }
    }

    fn find(&mut self, id: &Arc<str>, key: &str, now: Duration) -> Option<i64> {
        if id.is_empty() {
            return None;
        }
        if now.saturating_sub(self.rotated) >= self.minimum {
            if now.saturating_sub(self.rotated) >= self.minimum * 2 {
                self.young.clear();
            }
            self.rotate();
            self.rotated = now;
        }
        let wanted = (Arc::clone(id), key.to_owned());
        self.young
            .get(&wanted)
            .or_else(|| self.old.get(&wanted))
            .copied()
    }

    fn remember(&mut self, id: &Arc<str>, key: String, granted: i64) {
        if id.is_empty() {
            return;
        }
        if self.young.len() >= MAX_DEDUPLICATED / 2 {
            self.rotate();
        }
        self.young.insert((Arc::clone(id), key), granted);
    }

    fn rotate(&mut self) {
        self.old = std::mem::take(&mut self.young);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn cell(max_amount: i64, valid_duration: Duration) -> Cell {
        Cell::new(Limit {
            max_amount,
            valid_duration,
        })
    }

    #[test]
    fn no_window_sees_more_than_the_limit() {
        let mut cell = cell(2, S(5));
        let granted = |cell: &mut Cell, at: u64| cell.take(1, false, Duration::from_millis(at));
        assert_eq!([0, 4900, 4950].map(|t| granted(&mut cell, t)), [1, 1, 0]);
        assert_eq!(
            [5000, 5001].map(|t| granted(&mut cell, t)),
            [1, 0],
            "one has left the window"
        );
        assert_eq!([9899, 9900].map(|t| granted(&mut cell, t)), [0, 1]);
    }

    #[test]
    fn crowded_windows_stay_strict_and_small() {
        let mut cell = cell(10_000, S(1));
        let mut grants = Vec::new();
        for at in 0..20_000u64 {
            let now = Duration::from_micros(at * 100);
            if cell.take(1, false, now) == 1 {
                grants.push(now);
            }
            assert!(cell.grants.len() <= 2 * MAX_GRANTS);
        }
        for (i, start) in grants.iter().enumerate() {
            let within = grants
                .iter()
                .skip(i)
                .take_while(|t| **t < *start + S(1))
                .count();
            assert!(within <= 10_000);
        }
        assert!(grants.len() >= 19_800, "{}", grants.len());
    }

    #[test]
    fn best_effort_takes_what_is_left() {
        let mut cell = cell(5, S(1));
        assert_eq!(cell.take(3, false, S(0)), 3);
        assert_eq!(cell.take(3, false, S(0)), 0);
        assert_eq!(cell.take(3, true, S(0)), 2);
        assert_eq!(cell.take(3, true, S(0)), 0);
    }

    #[test]
    fn a_stock_is_given_back() {
        let mut cell = cell(5, Duration::ZERO);
        assert_eq!(cell.take(5, false, S(0)), 5);
        assert_eq!(cell.take(1, false, S(1000)), 0);
        assert_eq!(cell.take(-2, false, S(1000)), -2);
        assert_eq!(cell.take(3, true, S(1000)), 2);
        assert_eq!(cell.take(-100, false, S(1000)), -5);
        assert!(cell.is_idle(S(1000)));
    }

    #[test]
    fn a_retry_is_counted_once() {
        let mut recent = Deduplication::new(S(1), S(0));
        let id: Arc<str> = Arc::from("a1");
        assert_eq!(recent.find(&id, "k", S(0)), None);
        recent.remember(&id, "k".into(), 4);
        assert_eq!(recent.find(&id, "k", S(1)), Some(4));
        assert_eq!(recent.find(&id, "other", S(1)), None);
        assert_eq!(recent.find(&id, "k", S(3)), None);
    }
}
