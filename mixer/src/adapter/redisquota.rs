//! Quota counted in Redis: one limit for all Mixers that share it.
//!
//! Every call is one round trip: a script in Redis looks the counter up, takes from it and remembers the
//! request, in one step and by Redis' clock, so that neither replicas nor their clocks can disagree. When
//! Redis does not answer, the call fails and the rule's fail mode decides; nothing is guessed from memory.
//!
//! - `FIXED_WINDOW`: a window begins with the first grant. At most twice the limit around an edge.
//! - `ROLLING_WINDOW`: within any `validDuration` no more than the limit. Grants are counted in slots of
//!   `bucketDuration`, and a slot counts until its last moment has left the window.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, Clock, Code, Counter, Env, Handler, HandlerError, Info,
    QuotaArgs, QuotaHandler, QuotaResult, QuotaWindow, Status,
    instance::{QuotaInstance, Values},
    params, template,
};
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo as _, RedisError, Script,
    aio::{ConnectionManager, ConnectionManagerConfig},
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::limits;

/// Longest wait for Redis. It answers within a millisecond; one that takes so long is not there.
const TIMEOUT: Duration = Duration::from_millis(500);
/// For so long nobody is asked after a failure, so that requests do not each wait in vain.
const REST: Duration = Duration::from_millis(500);
/// A connection whose peer acknowledges nothing for so long is given up.
const DEAD_PEER: Duration = Duration::from_secs(5);
/// How long a request is remembered: retries come within the caller's deadline, which is 5 s for proxies.
const MEMORY: Duration = Duration::from_secs(10);
/// Slots of a rolling window, which bounds both the work of one call and the size of one counter.
const MAX_SLOTS: u128 = 1000;
/// Larger amounts are not exact in Lua's numbers once they are summed.
const MAX_AMOUNT: i64 = 1 << 50;
/// Longer names of counters are hashed: dimensions come from requests.
const MAX_KEY: usize = 256;
const MAX_POOL: i64 = 1000;

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("redisquota.lua")));

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct RedisQuota;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    quotas: Vec<Quota>,
    #[serde(alias = "redis_server_url")]
    redis_server_url: String,
    #[serde(alias = "connection_pool_size", deserialize_with = "params::integer")]
    connection_pool_size: i64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            quotas: Vec::new(),
            redis_server_url: "localhost:6379".to_owned(),
            connection_pool_size: 10,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Quota {
    name: String,
    #[serde(alias = "max_amount", deserialize_with = "params::integer")]
    max_amount: i64,
    #[serde(alias = "valid_duration", deserialize_with = "params::duration")]
    valid_duration: Duration,
    #[serde(alias = "bucket_duration", deserialize_with = "params::duration")]
    bucket_duration: Duration,
    #[serde(alias = "rate_limit_algorithm")]
    rate_limit_algorithm: Algorithm,
    overrides: Vec<Override>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Algorithm {
    #[default]
    FixedWindow,
    RollingWindow,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Override {
    dimensions: HashMap<String, String>,
    #[serde(alias = "max_amount", deserialize_with = "params::integer")]
    max_amount: i64,
}

/// A quota in the script's terms.
#[derive(Debug)]
struct Limit {
    max_amount: i64,
    overrides: Vec<Override>,
    window_ms: u64,
    /// 0: a fixed window.
    slot_ms: u64,
}

impl Limit {
    /// The amount of the first override whose dimensions all have these values, or the quota's own.
    fn amount(&self, dimensions: &Values) -> i64 {
        let mut overrides = self.overrides.iter();
        overrides
            .find(|o| limits::is_met(&o.dimensions, dimensions))
            .map_or(self.max_amount, |o| o.max_amount)
    }
}

/// Where Redis is.
fn server(text: &str) -> Result<ConnectionInfo, String> {
    let url = match text.split_once("://") {
        Some(("rediss" | "valkeys", _)) => {
            return Err("redisServerUrl: TLS to Redis is not supported; use redis://".to_owned());
        }
        Some(_) => text.to_owned(),
        None => format!("redis://{text}"),
    };
    // Not quoted: it may hold a password.
    let info = url.as_str().into_connection_info().map_err(|e| {
        format!(
            "redisServerUrl: {e}; write HOST:PORT, redis://:PASSWORD@HOST:PORT/DB or redis+unix:///PATH"
        )
    })?;
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(TcpKeepalive::new().with_time(DEAD_PEER))
        .set_user_timeout(DEAD_PEER);
    Ok(info.set_tcp_settings(tcp))
}

fn limit(quota: Quota) -> Result<Limit, String> {
    let Quota {
        name,
        max_amount,
        valid_duration,
        bucket_duration,
        rate_limit_algorithm,
        overrides,
    } = quota;
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let (window_ms, mut slot_ms) = (millis(valid_duration), millis(bucket_duration));
    if window_ms == 0 || window_ms > 1 << 40 {
        return Err(format!(
            "quotas: {name}: validDuration must be at least 1ms and less than 30 years"
        ));
    }
    match rate_limit_algorithm {
        Algorithm::FixedWindow => slot_ms = 0,
        Algorithm::RollingWindow if slot_ms == 0 || slot_ms > window_ms => {
            return Err(format!(
                "quotas: {name}: a ROLLING_WINDOW needs a bucketDuration of at least 1ms and at most its \
                 validDuration, such as a hundredth of it"
            ));
        }
        Algorithm::RollingWindow if u128::from(window_ms) > MAX_SLOTS * u128::from(slot_ms) => {
            return Err(format!(
                "quotas: {name}: validDuration has more than {MAX_SLOTS} times bucketDuration"
            ));
        }
        Algorithm::RollingWindow => {}
    }
    let mut amounts = overrides.iter().map(|o| o.max_amount).chain([max_amount]);
    if let Some(amount) = amounts.find(|a| *a > MAX_AMOUNT) {
        return Err(format!(
            "quotas: {name}: maxAmount {amount} is more than {MAX_AMOUNT}"
        ));
    }
    Ok(Limit {
        max_amount,
        overrides,
        window_ms,
        slot_ms,
    })
}

impl Adapter for RedisQuota {
    fn info(&self) -> Info {
        Info {
            name: "redisquota",
            description: "grants quota from counters in Redis, which all Mixers share",
            templates: const { &[&template::QUOTA] },
        }
    }

    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        let params = match params::parse::<Params>(candidate.params) {
            Ok(params) => params,
            Err(problem) => return vec![problem],
        };
        let mut problems: Vec<String> =
            server(&params.redis_server_url).err().into_iter().collect();
        if !(0..=MAX_POOL).contains(&params.connection_pool_size) {
            problems.push(format!(
                "connectionPoolSize: {} is not between 0 (the default, 10) and {MAX_POOL}",
                params.connection_pool_size
            ));
        }
        if params.quotas.is_empty() {
            problems.push("quotas: there is no limit".to_owned());
        }
        let written: Vec<_> = params
            .quotas
            .iter()
            .map(|q| limits::Written {
                name: &q.name,
                max_amount: q.max_amount,
                overrides: q.overrides.iter().map(|o| o.max_amount).collect(),
            })
            .collect();
        problems.extend(limits::problems(&written, candidate.instances));
        problems.extend(params.quotas.into_iter().filter_map(|q| limit(q).err()));
        problems
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        let info = server(&params.redis_server_url).map_err(BuildError)?;
        let address = info.addr().to_string();
        // Opens nothing yet: a Redis that is down must not keep rules from being loaded.
        let client = Client::open(info).map_err(|e| BuildError(e.to_string()))?;
        let size = match usize::try_from(params.connection_pool_size) {
            Ok(0) | Err(_) => 10,
            Ok(size) => size,
        };
        let mut limits = HashMap::new();
        for quota in params.quotas {
            limits.insert(quota.name.clone(), limit(quota).map_err(BuildError)?);
        }
        Ok(Handler::new().with_quota(Arc::new(Counters {
            limits,
            pool: Pool {
                client,
                connections: (0..size).map(|_| Connection::default()).collect(),
            },
            address,
            clock: env.clock().clone(),
            rests_until: AtomicU64::new(0),
            failures: env.counter("redis_failures"),
            rested: env.counter("redis_not_asked"),
        })))
    }
}

struct Counters {
    limits: HashMap<String, Limit>,
    pool: Pool,
    address: String,
    clock: Clock,
    /// In milliseconds of `clock`.
    rests_until: AtomicU64,
    failures: Counter,
    rested: Counter,
}

impl QuotaHandler for Counters {
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        self.take(instance, args, call).boxed()
    }
}

impl Counters {
    async fn take(
        &self,
        instance: QuotaInstance,
        args: &QuotaArgs,
        call: &Call,
    ) -> Result<QuotaResult, HandlerError> {
        let limit = self
            .limits
            .get(&*instance.name)
            .ok_or_else(|| HandlerError::invalid(format!("{} has no limit", instance.name)))?;
        if args.amount < 0 {
            return Err(HandlerError::invalid("redisquota takes nothing back"));
        }
        let max_amount = limit.amount(&instance.dimensions);
        let counter = counter(&instance, limit);
        let is_known = !args.dedup_id.is_empty();
        let mut invocation = SCRIPT.prepare_invoke();
        invocation
            .key(&counter)
            .key(format!("{counter}:{}", args.dedup_id))
            .arg(args.amount)
            .arg(i32::from(args.best_effort))
            .arg(max_amount)
            .arg(limit.window_ms)
            .arg(limit.slot_ms)
            .arg(if is_known {
                MEMORY.as_millis() as u64
            } else {
                0
            });
        let (granted, remaining, reset) = self.invoke(&invocation, is_known, call).await?;
        let reset = Duration::from_millis(u64::try_from(reset).unwrap_or_default());
        let status = if granted == 0 && args.amount > 0 {
            Status::new(
                Code::ResourceExhausted,
                format!("{} is exhausted", instance.name),
            )
        } else {
            Status::ok()
        };
        Ok(QuotaResult {
            status,
            valid_duration: Some(match limit.slot_ms {
                0 => reset, // what is left of the window
                _ => Duration::from_millis(limit.window_ms),
            }),
            granted,
            window: Some(QuotaWindow {
                limit: max_amount,
                remaining,
                reset,
            }),
        })
    }

    /// Runs the script. A connection that was lost is tried once more if Redis would know the request again.
    async fn invoke(
        &self,
        invocation: &redis::ScriptInvocation<'_>,
        is_known: bool,
        call: &Call,
    ) -> Result<(i64, i64, i64), HandlerError> {
        if self.millis() < self.rests_until.load(Ordering::Relaxed) {
            self.rested.inc();
            return Err(self.unavailable("did not answer a moment ago"));
        }
        let deadline = call.deadline.min(Instant::now() + TIMEOUT);
        let work = async {
            let first = self.pool.invoke(invocation).await;
            match first {
                Err(error) if is_known && error.is_connection_dropped() => {
                    self.pool.invoke(invocation).await
                }
                first => first,
            }
        };
        match tokio::time::timeout_at(deadline, work).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                // Only what says that Redis is not there makes the others wait.
                if error.is_io_error() {
                    self.rest();
                }
                self.failures.inc();
                Err(self.unavailable(&format!("fails: {error}")))
            }
            Err(_late) => {
                self.rest();
                self.failures.inc();
                Err(self.unavailable("does not answer"))
            }
        }
    }

    fn unavailable(&self, what: &str) -> HandlerError {
        HandlerError::unavailable(format!("Redis at {} {what}", self.address))
    }

    fn rest(&self) {
        let until = self.millis() + REST.as_millis() as u64;
        self.rests_until.fetch_max(until, Ordering::Relaxed);
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.clock.now().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Names a counter in Redis. A change of the window begins anew; a change of the amount does not. What
/// is in braces decides on the node of a cluster, so that both keys of a call are on the same.
fn counter(instance: &QuotaInstance, limit: &Limit) -> String {
    let mut key = limits::key(instance);
    if key.len() > MAX_KEY {
        key = format!("{}\0{}", instance.name, hex::encode(Sha256::digest(&key)));
    }
    format!("mixer:{{{key}}}:{}:{}", limit.window_ms, limit.slot_ms)
}

/// Connections, each opened when the others are busy. A connection carries many calls at a time.
struct Pool {
    client: Client,
    connections: Vec<Connection>,
}

#[derive(Default)]
struct Connection {
    manager: OnceLock<ConnectionManager>,
    calls: AtomicUsize,
}

/// Calls that a connection carries before the next one is opened.
const BUSY: usize = 16;

impl Pool {
    async fn invoke(
        &self,
        invocation: &redis::ScriptInvocation<'_>,
    ) -> Result<(i64, i64, i64), RedisError> {
        let idle = self
            .connections
            .iter()
            .find(|c| c.calls.load(Ordering::Relaxed) < BUSY);
        let connection = idle
            .or_else(|| {
                let all = self.connections.iter();
                all.min_by_key(|c| c.calls.load(Ordering::Relaxed))
            })
            .ok_or_else(|| RedisError::from((redis::ErrorKind::Client, "the pool is empty")))?;
        let _taken = Taken::new(&connection.calls);
        let mut manager = match connection.manager.get() {
            Some(manager) => manager.clone(),
            None => {
                let config = ConnectionManagerConfig::new()
                    .set_number_of_retries(0) // the next call tries again
                    .set_connection_timeout(Some(TIMEOUT))
                    .set_response_timeout(None); // the call's own deadline decides
                let made = ConnectionManager::new_lazy_with_config(self.client.clone(), config)?;
                connection.manager.get_or_init(|| made).clone()
            }
        };
        invocation.invoke_async(&mut manager).await
    }
}

/// Counts a call until it is answered or given up.
struct Taken<'a>(&'a AtomicUsize);

impl<'a> Taken<'a> {
    fn new(calls: &'a AtomicUsize) -> Self {
        calls.fetch_add(1, Ordering::Relaxed);
        Self(calls)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
