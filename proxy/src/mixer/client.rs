//! Calls to one Mixer cluster: Check with its cache and configuration generation, and Report in batches.
//! The rules of the cache are docs/adr/0003-check-cache-generation.md.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use lateen_engine::dictionary::GLOBAL_WORDS;
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse, ReportRequest, check_request::QuotaParams,
    config::client::TransportConfig, report_request::RepeatedAttributesSemantics,
};
use prost::Message as _;
use tokio::{task::AbortHandle, time::Instant};
use tokio_util::task::TaskTracker;

use super::{
    attributes::Attributes,
    cache::{Answer, Cache},
    encode::{self, Words},
    explain::Explained,
    presence::{Presence, is_about_request},
    verdict::{OK, UNAVAILABLE, Verdict},
};
use crate::{
    config_error::ConfigError,
    grpc::{self, CallError, Upstream},
    head::{Headers, Name},
    proto::wire,
    shared::Shared,
    stats::{Counter, Scope},
};

/// Longest wait for an answer to Check; then the fail policy decides.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for an answer to Report. Istio's client: 5 s.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer may be used while Mixer's generation was confirmed at most this long ago.
const CONFIRMED_FOR: Duration = Duration::from_secs(1);
/// Largest answer of Mixer.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Reports that one worker keeps, those being sent included; more are dropped and counted.
const MAX_WAITING_REPORTS: usize = 10_000;
const GENERATION_HEADER: &[u8] = b"lateen-config-generation";
const OBEYS_HEADER: &[u8] = b"lateen-cache-generation";
const WHY_HEADER: &[u8] = b"lateen-explain";

/// What became of a Check.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) verdict: Arc<Verdict>,
    pub(super) cached: bool,
    /// Name of the first quota that was not granted.
    pub(super) exhausted: Option<String>,
    /// Why, if that was asked.
    pub(super) explained: Option<Explained>,
}

/// Mixer could not be asked or did not answer; nothing in the cache stands in for it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unavailable(pub(super) String);

#[derive(Debug)]
struct Stats {
    check_calls: Counter,
    remote_check_calls: Counter,
    remote_check_errors: Counter,
    check_cache_hits: Counter,
    remote_quota_calls: Counter,
    report_calls: Counter,
    remote_report_calls: Counter,
    remote_report_errors: Counter,
    reports_dropped: Counter,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        Stats {
            check_calls: scope.counter("check_calls"),
            remote_check_calls: scope.counter("remote_check_calls"),
            remote_check_errors: scope.counter("remote_check_errors"),
            check_cache_hits: scope.counter("check_cache_hits"),
            remote_quota_calls: scope.counter("remote_quota_calls"),
            report_calls: scope.counter("report_calls"),
            remote_report_calls: scope.counter("remote_report_calls"),
            remote_report_errors: scope.counter("remote_report_errors"),
            reports_dropped: scope.counter("reports_dropped"),
        }
    }
}

/// A client, shared by all workers and by all filters with the same transport configuration.
#[derive(Debug)]
pub(super) struct Client {
    check: Upstream,
    report: Upstream,
    cache: Option<Cache>,
    /// (generation, confirmed at); written at most once per answer of Mixer.
    generation: Mutex<(u64, Option<Instant>)>,
    presence: Presence,
    batch_entries: usize,
    batch_time: Duration,
    deduplication: (String, AtomicU64),
    stats: Stats,
}

/// Clients by transport configuration, so that a new listener keeps the cache of the old one.
static CLIENTS: Mutex<Vec<(Vec<u8>, std::sync::Weak<Client>)>> = Mutex::new(Vec::new());

impl Client {
    /// The client for a transport configuration.
    pub(super) fn get(
        transport: &TransportConfig,
        shared: &Shared,
    ) -> Result<Arc<Client>, ConfigError> {
        // Which Shared it counts in is part of the key: tests run several in one process.
        let mut key = transport.encode_to_vec();
        key.extend_from_slice(&(std::ptr::from_ref(&*shared.stats) as usize).to_ne_bytes());
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|(_, client)| client.strong_count() > 0);
        if let Some(client) = clients
            .iter()
            .find_map(|(known, client)| (*known == key).then(|| client.upgrade())?)
        {
            return Ok(client);
        }
        let client = Arc::new(Client::new(transport, shared)?);
        clients.push((key, Arc::downgrade(&client)));
        Ok(client)
    }

    fn new(transport: &TransportConfig, shared: &Shared) -> Result<Client, ConfigError> {
        let cluster = |name: &str, field: &str, timeout| {
            if name.is_empty() {
                return Err(ConfigError::new(field, "no cluster is named"));
            }
            Upstream::new(name, timeout)
        };
        let report_cluster = if transport.report_cluster.is_empty() {
            &transport.check_cluster
        } else {
            &transport.report_cluster
        };
        Ok(Client {
            check: cluster(&transport.check_cluster, "check_cluster", CHECK_TIMEOUT)?,
            report: cluster(report_cluster, "report_cluster", REPORT_TIMEOUT)?,
            cache: (!transport.disable_check_cache).then(Cache::new),
            generation: Mutex::new((0, None)),
            presence: Presence::new(),
            batch_entries: match transport.report_batch_max_entries {
                _ if transport.disable_report_batch => 1,
                0 => 100,
                entries => entries as usize,
            },
            batch_time: transport
                .report_batch_max_time
                .and_then(|time| Duration::try_from(time).ok())
                .filter(|time| !time.is_zero())
                .unwrap_or(Duration::from_secs(1)),
            deduplication: (uuid::Uuid::new_v4().to_string(), AtomicU64::new(0)),
            stats: Stats::new(&shared.stats.scope("mixer.http.")),
        })
    }

    /// Asks whether a request may go on, of the cache if that knows; of Mixer itself when it is to say why.
    pub(super) async fn check(
        &self,
        shared: &Arc<Shared>,
        attributes: &Attributes,
        quotas: &[(&str, i64)],
        retries: &Retries,
        why: bool,
    ) -> Result<Checked, Unavailable> {
        self.stats.check_calls.inc();
        let now = Instant::now();
        let found = self
            .cache
            .as_ref()
            .and_then(|cache| cache.find(attributes, now));
        let (generation, confirmed) = *self.lock_generation();
        let fresh = confirmed.is_some_and(|at| now.duration_since(at) <= CONFIRMED_FOR);
        // Quota is never answered from the cache: it stays exact, at the price of a call.
        if let Some(answer) = &found
            && answer.generation == generation
            && fresh
            && !why
            && answer.take(now)
            && (quotas.is_empty() || answer.verdict.code != OK)
        {
            self.stats.check_cache_hits.inc();
            return Ok(Checked {
                verdict: answer.verdict.clone(),
                cached: true,
                exhausted: None,
                explained: None,
            });
        }
        match self.ask(shared, attributes, quotas, retries, why).await {
            Ok(checked) => Ok(checked),
            Err(error) => match found {
                // A refusal that is still valid outlives Mixer; an approval does so only if the fail
                // policy would let the request go on anyway, and then it need not be looked up.
                Some(answer) if answer.verdict.code != OK && answer.is_unexpired(now) => {
                    Ok(Checked {
                        verdict: answer.verdict.clone(),
                        cached: true,
                        exhausted: None,
                        explained: None,
                    })
                }
                _ => Err(error),
            },
        }
    }

    async fn ask(
        &self,
        shared: &Arc<Shared>,
        attributes: &Attributes,
        quotas: &[(&str, i64)],
        retries: &Retries,
        why: bool,
    ) -> Result<Checked, Unavailable> {
        let mut request = Vec::with_capacity(1024);
        wire::message(&mut request, 1, |out| {
            let mut words = Words::default();
            encode::attributes(attributes, &mut words, out);
            words.write(out, 1);
        });
        let number = self.deduplication.1.fetch_add(1, Ordering::Relaxed);
        let rest = CheckRequest {
            attributes: None,
            global_word_count: u32::try_from(GLOBAL_WORDS.len()).unwrap_or(u32::MAX),
            deduplication_id: format!("{}{number}", self.deduplication.0),
            quotas: quotas
                .iter()
                .map(|(name, amount)| {
                    let asked = QuotaParams {
                        amount: *amount,
                        best_effort: false,
                    };
                    ((*name).to_owned(), asked)
                })
                .collect(),
        };
        // A message is its fields one after the other.
        rest.encode_raw(&mut request);
        let mut wait = retries.base;
        for attempt in 0.. {
            let turn = self.presence.turn()?;
            self.stats.remote_check_calls.inc();
            if !quotas.is_empty() {
                self.stats.remote_quota_calls.inc();
            }
            let sent = Instant::now();
            let path = "/istio.mixer.v1.Mixer/Check";
            match call::<CheckResponse>(shared, &self.check, path, &request, why).await {
                Ok(answer) => {
                    turn.answered();
                    let generation = self.confirm(generation(&answer.headers), sent);
                    let explained = why.then(|| Explained::read(&answer.headers));
                    let checked = self.take_over(answer.message, generation, attributes, sent);
                    return Ok(Checked {
                        explained,
                        ..checked
                    });
                }
                Err(error) if is_about_request(&error) => {
                    turn.answered();
                    self.stats.remote_check_errors.inc();
                    return Err(Unavailable(error.to_string()));
                }
                Err(error) if attempt >= retries.max => {
                    self.stats.remote_check_errors.inc();
                    turn.failed(&error);
                    return Err(Unavailable(error.to_string()));
                }
                Err(_) => {
                    self.stats.remote_check_errors.inc();
                    tokio::time::sleep(wait.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
                    wait = (wait * 2).min(retries.longest);
                }
            }
        }
        Err(Unavailable("no attempt was made".to_owned()))
    }

    fn take_over(
        &self,
        response: CheckResponse,
        generation: u64,
        attributes: &Attributes,
        now: Instant,
    ) -> Checked {
        let precondition = response.precondition.unwrap_or_default();
        let status = precondition.status.unwrap_or_default();
        let verdict = Arc::new(Verdict {
            code: status.code,
            message: status.message,
            directive: precondition.route_directive,
        });
        // UNAVAILABLE is "no result" and never reused. A use count of 0 cannot be reused either.
        if let (Some(cache), Some(referenced)) = (&self.cache, &precondition.referenced_attributes)
            && verdict.code != UNAVAILABLE
            && precondition.valid_use_count != 0
        {
            let valid = precondition
                .valid_duration
                .and_then(|valid| Duration::try_from(valid).ok());
            let answer = Answer::new(
                verdict.clone(),
                generation,
                valid,
                precondition.valid_use_count,
                now,
            );
            cache.keep(referenced, attributes, answer);
        }
        let exhausted = response
            .quotas
            .into_iter()
            .filter(|(_, quota)| quota.granted_amount <= 0)
            .map(|(name, _)| name)
            .min();
        Checked {
            verdict,
            cached: false,
            exhausted,
            explained: None,
        }
    }

    /// Takes over what an answer says of Mixer's configuration; gives the generation it belongs to.
    fn confirm(&self, generation: Option<u64>, sent: Instant) -> u64 {
        // A Mixer that does not say (Istio's own) has one generation, and its durations are all there is.
        let generation = generation.unwrap_or(0);
        let mut current = self.lock_generation();
        if current.1.is_none_or(|confirmed| sent >= confirmed) {
            let changed = current.0 != generation;
            *current = (generation, Some(sent));
            drop(current);
            if changed && let Some(cache) = &self.cache {
                cache.clear();
            }
        }
        generation
    }

    fn lock_generation(&self) -> std::sync::MutexGuard<'_, (u64, Option<Instant>)> {
        self.generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a report into this worker's batch; a full or old batch is sent.
    pub(super) fn report(self: &Arc<Client>, shared: &Arc<Shared>, attributes: Attributes) {
        self.stats.report_calls.inc();
        let kept = KEPT.get();
        if kept >= MAX_WAITING_REPORTS {
            self.stats.reports_dropped.inc();
            return;
        }
        KEPT.set(kept + 1);
        let key = Arc::as_ptr(self) as usize;
        let full = BATCHES.with_borrow_mut(|batches| {
            let batch = batches.entry(key).or_insert_with(|| Batch {
                client: self.clone(),
                shared: shared.clone(),
                list: Vec::new(),
                timer: tokio::task::spawn_local(send_later(key, self.batch_time)).abort_handle(),
            });
            batch.list.push(attributes);
            (batch.list.len() >= self.batch_entries)
                .then(|| batches.remove(&key))
                .flatten()
        });
        if let Some(batch) = full {
            batch.timer.abort();
            batch.send();
        }
    }

    async fn send(self: Arc<Client>, shared: Arc<Shared>, list: Vec<Attributes>) {
        // One word list for the whole batch.
        let mut request = Vec::with_capacity(1024 * list.len().min(64));
        let mut words = Words::default();
        for attributes in &list {
            wire::message(&mut request, 1, |out| {
                encode::attributes(attributes, &mut words, out);
            });
        }
        words.write(&mut request, 2);
        let rest = ReportRequest {
            attributes: Vec::new(),
            default_words: Vec::new(),
            global_word_count: u32::try_from(GLOBAL_WORDS.len()).unwrap_or(u32::MAX),
            repeated_attributes_semantics: RepeatedAttributesSemantics::IndependentEncoding.into(),
        };
        rest.encode_raw(&mut request);
        self.stats.remote_report_calls.inc();
        let sent = Instant::now();
        let path = "/istio.mixer.v1.Mixer/Report";
        match call::<lateen_protocols::istio::mixer::v1::ReportResponse>(
            &shared,
            &self.report,
            path,
            &request,
            false,
        )
        .await
        {
            Ok(answer) if self.check.cluster() == self.report.cluster() => {
                self.confirm(generation(&answer.headers), sent);
            }
            Ok(_) => {}
            Err(error) => {
                self.stats.remote_report_errors.inc();
                self.stats.reports_dropped.add(list.len() as u64);
                tracing::debug!(%error, reports = list.len(), "reports are lost");
            }
        }
    }
}

/// Reports of one client that wait on one worker. It keeps the client, so that no other takes its place
/// in the table.
#[derive(Debug)]
struct Batch {
    client: Arc<Client>,
    shared: Arc<Shared>,
    list: Vec<Attributes>,
    timer: AbortHandle,
}

thread_local! {
    /// This worker's batches by the address of their client; a batch leaves when it is sent.
    static BATCHES: RefCell<HashMap<usize, Batch>> = RefCell::default();
    /// Reports in batches and on their way.
    static KEPT: Cell<usize> = const { Cell::new(0) };
    static SENDING: TaskTracker = TaskTracker::new();
}

impl Batch {
    fn send(self) {
        let count = self.list.len();
        SENDING.with(|sending| {
            sending.spawn_local(async move {
                self.client.send(self.shared, self.list).await;
                KEPT.set(KEPT.get().saturating_sub(count));
            })
        });
    }
}

async fn send_later(key: usize, wait: Duration) {
    tokio::time::sleep(wait).await;
    if let Some(batch) = BATCHES.with_borrow_mut(|batches| batches.remove(&key)) {
        batch.send();
    }
}

/// Sends what waits on this worker, for at most `limit`. For a worker that is about to end.
pub(super) async fn flush(limit: Duration) {
    for batch in BATCHES.take().into_values() {
        batch.timer.abort();
        batch.send();
    }
    let sending = SENDING.with(TaskTracker::clone);
    sending.close();
    if tokio::time::timeout(limit, sending.wait()).await.is_err() {
        tracing::warn!("Mixer is too slow; the last reports are lost");
    }
    sending.reopen();
}

/// How a failed Check is tried again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retries {
    pub(super) max: u32,
    pub(super) base: Duration,
    pub(super) longest: Duration,
}

/// One call; `why`: Mixer is to explain its answer.
async fn call<M: prost::Message + Default>(
    shared: &Arc<Shared>,
    upstream: &Upstream,
    path: &'static str,
    message: &[u8],
    why: bool,
) -> Result<grpc::Answer<M>, CallError> {
    let flag = |name: &'static [u8]| {
        let name = Name::from_lower(Bytes::from_static(name));
        (name, Bytes::from_static(b"1"))
    };
    let flags = [flag(OBEYS_HEADER), flag(WHY_HEADER)];
    let flags = if why { &flags[..] } else { &flags[..1] };
    upstream
        .unary(shared, path, flags, message, MAX_ANSWER_BYTES)
        .await
}

/// The configuration generation that an answer carries.
fn generation(metadata: &Headers) -> Option<u64> {
    let value = metadata.get(&Name::from_lower(Bytes::from_static(GENERATION_HEADER)))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;
    use crate::testing::shared;

    /// Reports `number` times to a Mixer that is not there, then flushes.
    async fn report(shared: &Arc<Shared>, batch: u32, number: usize) {
        let transport = TransportConfig {
            check_cluster: "mixer".to_owned(),
            report_batch_max_entries: batch,
            ..TransportConfig::default()
        };
        let client = Client::get(&transport, shared).unwrap();
        for _ in 0..number {
            client.report(shared, Attributes::default());
        }
        flush(Duration::from_secs(20)).await;
    }

    #[tokio::test]
    async fn a_worker_that_ends_sends_what_waits_and_keeps_nothing() {
        let shared = shared();
        LocalSet::new().run_until(report(&shared, 100, 250)).await;
        let value = |name: &str| shared.stats.value(&format!("mixer.http.{name}"));
        assert_eq!(value("remote_report_calls"), Some(3));
        assert_eq!(value("remote_report_errors"), Some(3));
        assert_eq!(value("reports_dropped"), Some(250));
        assert_eq!(KEPT.get(), 0);
        assert!(BATCHES.with_borrow(HashMap::is_empty));
    }

    #[tokio::test]
    async fn what_a_worker_keeps_is_bounded() {
        let shared = shared();
        let number = MAX_WAITING_REPORTS + 5;
        LocalSet::new()
            .run_until(report(&shared, u32::MAX, number))
            .await;
        let value = |name: &str| shared.stats.value(&format!("mixer.http.{name}"));
        assert_eq!(value("report_calls"), Some(number as u64));
        assert_eq!(value("remote_report_calls"), Some(1));
        // Five found no place, the others no Mixer.
        assert_eq!(value("reports_dropped"), Some(number as u64));
        assert_eq!(KEPT.get(), 0);
    }
}
