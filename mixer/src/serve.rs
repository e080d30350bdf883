//! The API: `istio.mixer.v1.Mixer`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use lateen_adapter::Call;
use lateen_engine::{AttributeTable, Bag};
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse, ReportRequest, ReportResponse,
    mixer_server::{Mixer, MixerServer},
};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tonic::{
    Request, Response, Status,
    metadata::{AsciiMetadataValue, MetadataMap, MetadataValue},
};

use crate::{
    attribute,
    check::{self, Question},
    config::Snapshot,
    explain::Explanation,
    handler::deadline,
    metrics::{Method, Metrics},
    report,
};

/// Largest message that is read.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Checks under way; the next one is refused at once, and the proxy's fail policy decides.
const MAX_CHECKS: usize = 4096;
/// Reports under way; the next one is refused at once.
const MAX_REPORTS: usize = 1024;
/// For callers who name no deadline: what Istio's client gives its own calls.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Nobody is waited for longer.
const MAX_TIMEOUT: Duration = Duration::from_secs(30);
/// The response header with the generation. docs/adr/0003-check-cache-generation.md
pub const GENERATION: &str = "lateen-config-generation";
/// The request header of callers who obey it.
pub const KNOWS_GENERATION: &str = "lateen-cache-generation";

/// The request header of callers who want to know why.
pub const EXPLAIN: &str = "lateen-explain";
/// The response header with an [`Explanation`], in JSON.
pub const EXPLANATION: &str = "lateen-explanation-bin";
/// The response header with the verdict's id.
pub const VERDICT: &str = "lateen-verdict-id";

/// Names verdicts: no two Mixers have the same, nor has one after a restart.
#[derive(Debug)]
struct VerdictIds {
    base: u64,
    next: AtomicU64,
}

/// Sixteen hexadecimal digits of the Mixer, and a number.
#[derive(Clone, Copy, Debug)]
struct VerdictId(u64, u64);

impl VerdictIds {
    fn next(&self) -> VerdictId {
        VerdictId(self.base, self.next.fetch_add(1, Ordering::Relaxed))
    }
}

impl fmt::Display for VerdictId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:x}", self.0, self.1)
    }
}

/// Serves checks and reports by the newest snapshot.
#[derive(Clone, Debug)]
pub struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Arc<Metrics>,
    checks: Semaphore,
    reports: Semaphore,
    verdicts: VerdictIds,
    tracker: TaskTracker,
}

impl Service {
    /// Answers by `snapshot`. Reports under way are counted in `tracker`, so that drain can wait for them.
    pub fn new(
        snapshot: Arc<ArcSwap<Snapshot>>,
        metrics: Arc<Metrics>,
        tracker: TaskTracker,
    ) -> Self {
        Self(Arc::new(Inner {
            snapshot,
            metrics,
            checks: Semaphore::new(MAX_CHECKS),
            reports: Semaphore::new(MAX_REPORTS),
            verdicts: VerdictIds {
                base: rand::random(),
                next: AtomicU64::new(1),
            },
            tracker,
        }))
    }

    /// Asks about what `question` makes of the newest snapshot. Gives the answer, the configuration's generation and
    /// the verdict's id. The caller counts it.
    ///
    /// # Errors
    /// Too many checks are under way, there is no configuration, or the question makes no sense.
    pub(crate) async fn decide(
        &self,
        metadata: &MetadataMap,
        question: impl FnOnce(&Snapshot) -> Question,
    ) -> Result<(CheckResponse, u64, String), Status> {
        let inner = &*self.0;
        let _slot = inner
            .checks
            .try_acquire()
            .map_err(|_| overloaded("checks"))?;
        let snapshot = configured(&inner.snapshot)?;
        let call = Call {
            deadline: deadline(timeout(metadata)),
        };
        let id = inner.verdicts.next();
        let question = question(&snapshot);
        let answer = check::answer(&snapshot, &inner.metrics, question, &call, true, None).await?;
        told(&answer, id);
        Ok((answer, snapshot.generation, id.to_string()))
    }

    /// Reports the bags that `read` makes by the newest snapshot's vocabulary, and counts it. Goes on when the
    /// caller leaves.
    ///
    /// # Errors
    /// Too many reports are under way, or there is no configuration.
    pub(crate) async fn deliver(
        &self,
        read: impl FnOnce(&AttributeTable) -> Vec<Bag> + Send + 'static,
    ) -> Result<(), Status> {
        let inner = Arc::clone(&self.0);
        let call = Call {
            deadline: deadline(DEFAULT_TIMEOUT),
        };
        let work = self.0.tracker.spawn(async move {
            let _slot = inner
                .reports
                .try_acquire()
                .map_err(|_| overloaded("reports"))?;
            let snapshot = configured(&inner.snapshot)?;
            let bags = read(&snapshot.table);
            report::report(&snapshot, &inner.metrics, bags, &call).await;
            Ok(())
        });
        let answer = work
            .await
            .unwrap_or_else(|_| Err(Status::internal("the report failed")));
        self.count(Method::Report, answer)
    }

    /// Counts an answer.
    pub(crate) fn count<T>(&self, method: Method, answer: Result<T, Status>) -> Result<T, Status> {
        let code = match &answer {
            Ok(_) => "OK",
            Err(status) => code_name(status),
        };
        self.0.metrics.answered(method, code);
        answer
    }

    /// For a tonic server.
    pub fn into_server(self) -> MixerServer<Self> {
        MixerServer::new(self).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl Mixer for Service {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let Inner {
            snapshot,
            metrics,
            checks,
            ..
        } = &*self.0;
        let answer = async {
            let _slot = checks.try_acquire().map_err(|_| overloaded("checks"))?;
            let snapshot = configured(snapshot)?;
            let call = Call {
                deadline: deadline(timeout(request.metadata())),
            };
            let knows = request
                .metadata()
                .get(KNOWS_GENERATION)
                .is_some_and(|v| v == "1");
            let id = self.0.verdicts.next();
            let mut explanation = request.metadata().get(EXPLAIN).map(|_| Explanation {
                id: id.to_string(),
                generation: snapshot.generation.to_string(),
                ..Explanation::default()
            });
            let request = request.into_inner();
            let answer = check::check(
                &snapshot,
                metrics,
                request,
                &call,
                knows,
                explanation.as_mut(),
            );
            let answer = answer.await?;
            told(&answer, id);
            Ok((answer, snapshot.generation, id, explanation))
        };
        let (answer, told) = match answer.await {
            Ok((answer, generation, id, explanation)) => {
                (Ok((answer, generation)), Some((id, explanation)))
            }
            Err(status) => (Err(status), None),
        };
        let mut response = respond(answer, Method::Check, metrics)?;
        if let Some((id, explanation)) = told {
            let metadata = response.metadata_mut();
            if let Ok(id) = id.to_string().parse() {
                metadata.insert(VERDICT, id);
            }
            if let Some(explanation) = explanation {
                let json = MetadataValue::from_bytes(explanation.to_json().as_bytes());
                metadata.insert_bin(EXPLANATION, json);
            }
        }
        Ok(response)
    }

    async fn report(
        &self,
        request: Request<ReportRequest>,
    ) -> Result<Response<ReportResponse>, Status> {
        let inner = Arc::clone(&self.0);
        let call = Call {
            deadline: deadline(timeout(request.metadata())),
        };
        let request = request.into_inner();
        // A caller that leaves must not cut a batch in two: the work goes on without it.
        let work = self.0.tracker.spawn(async move {
            let Inner {
                snapshot,
                metrics,
                reports,
                ..
            } = &*inner;
            let _slot = reports.try_acquire().map_err(|_| overloaded("reports"))?;
            let snapshot = configured(snapshot)?;
            let bags = attribute::decode_report(&request, &snapshot.table)?;
            drop(request);
            report::report(&snapshot, metrics, bags, &call).await;
            Ok((ReportResponse {}, snapshot.generation))
        });
        let answer = work
            .await
            .unwrap_or_else(|_| Err(Status::internal("the report failed")));
        respond(answer, Method::Report, &self.0.metrics)
    }
}

fn respond<T>(
    answer: Result<(T, u64), Status>,
    method: Method,
    metrics: &Metrics,
) -> Result<Response<T>, Status> {
    match answer {
        Ok((body, generation)) => {
            metrics.answered(method, "OK");
            let mut response = Response::new(body);
            response
                .metadata_mut()
                .insert(GENERATION, AsciiMetadataValue::from(generation));
            Ok(response)
        }
        Err(status) => {
            metrics.answered(method, code_name(&status));
            Err(status)
        }
    }
}

fn code_name(status: &Status) -> &'static str {
    let code = lateen_adapter::Code::from_number(i64::from(i32::from(status.code())));
    code.map_or("UNKNOWN", lateen_adapter::Code::name)
}

fn told(answer: &CheckResponse, id: VerdictId) {
    let status = answer.precondition.as_ref().and_then(|p| p.status.as_ref());
    if let Some(status) = status.filter(|status| status.code != 0) {
        tracing::debug!(%id, code = status.code, reason = status.message, "denied");
    }
}

/// The newest snapshot. Before there is one, rules are unknown, not absent: the proxy's fail policy decides.
fn configured(snapshot: &ArcSwap<Snapshot>) -> Result<Arc<Snapshot>, Status> {
    let snapshot = snapshot.load_full();
    if snapshot.generation == 0 {
        return Err(Status::unavailable("mixer has no configuration yet"));
    }
    Ok(snapshot)
}

fn overloaded(what: &str) -> Status {
    Status::unavailable(format!("too many {what} are under way"))
}

/// What the caller gives: `grpc-timeout`.
fn timeout(metadata: &MetadataMap) -> Duration {
    let given = metadata
        .get("grpc-timeout")
        .and_then(|value| value.to_str().ok())
        .and_then(parse_timeout);
    given.unwrap_or(DEFAULT_TIMEOUT).min(MAX_TIMEOUT)
}

/// Up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let digits = text.get(..text.len().checked_sub(1)?)?;
    let amount: u64 = (digits.len() <= 8).then(|| digits.parse().ok())??;
    Some(match text.get(digits.len()..)? {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        for (text, want) in [
            ("5S", Some(Duration::from_secs(5))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("", None),
            ("S", None),
            ("5", None),
            ("5s", None),
            ("-5S", None),
            ("999999999S", None),
            ("5µ", None),
        ] {
            assert_eq!(parse_timeout(text), want, "{text}");
        }
    }
}
