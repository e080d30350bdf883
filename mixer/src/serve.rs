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
use bytes::Bytes;
use lateen_adapter::{Call, Code};
use lateen_engine::{AttributeTable, Bag};
use lateen_protocols::istio::mixer::v1::{CheckResponse, ReportResponse};
use tokio::time::Instant;
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
    overload::Overload,
    report,
    verdicts::{Parties, Verdicts},
};

/// Largest message that is read.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
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

/// Which calls of the API a Mixer answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Checks only: a deployment that decides (Istio: `istio-policy`).
    Check,
    /// Reports only: a deployment that collects (Istio: `istio-telemetry`).
    Report,
    /// Both.
    #[default]
    Both,
}

impl Role {
    /// Whether it answers calls of `method`.
    pub const fn does(self, method: Method) -> bool {
        match self {
            Self::Both => true,
            Self::Check => matches!(method, Method::Check),
            Self::Report => matches!(method, Method::Report),
        }
    }

    /// # Errors
    /// UNIMPLEMENTED when it does not answer calls of `method`: whoever calls has the wrong address.
    fn admit(self, method: Method) -> Result<(), Status> {
        if self.does(method) {
            return Ok(());
        }
        let (called, role, setting) = match method {
            Method::Check => ("checks", "report", "mixerCheckServer"),
            Method::Report => ("reports", "check", "mixerReportServer"),
        };
        Err(Status::unimplemented(format!(
            "this mixer takes no {called} (--role {role}); the mesh's {setting} should name another"
        )))
    }
}

/// Serves checks and reports by the newest snapshot.
#[derive(Clone, Debug)]
pub struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Arc<Metrics>,
    role: Role,
    overload: Overload,
    verdicts: Arc<Verdicts>,
    ids: VerdictIds,
    tracker: TaskTracker,
}

impl Service {
    /// Answers by `snapshot`. Reports under way are counted in `tracker`, so that drain can wait for them.
    pub fn new(
        snapshot: Arc<ArcSwap<Snapshot>>,
        metrics: Arc<Metrics>,
        role: Role,
        overload: Overload,
        verdicts: Arc<Verdicts>,
        tracker: TaskTracker,
    ) -> Self {
        Self(Arc::new(Inner {
            snapshot,
            metrics,
            role,
            overload,
            verdicts,
            ids: VerdictIds {
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
        let begun = Instant::now();
        inner.role.admit(Method::Check)?;
        let _slot = inner.overload.admit(Method::Check)?;
        let snapshot = configured(&inner.snapshot)?;
        let call = Call {
            deadline: deadline(timeout(metadata)),
        };
        let id = inner.ids.next();
        let question = question(&snapshot);
        let parties = Parties::of(&question.bag);
        let answer = check::answer(&snapshot, &inner.metrics, question, &call, true, None).await?;
        self.told(&answer, id, snapshot.generation, begun, &parties);
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
        let begun = Instant::now();
        let slot = self.0.role.admit(Method::Report);
        let slot = match slot.and_then(|()| self.0.overload.admit(Method::Report)) {
            Ok(slot) => slot,
            Err(status) => return self.count(Method::Report, begun, Err(status)),
        };
        let inner = Arc::clone(&self.0);
        let call = Call {
            deadline: deadline(DEFAULT_TIMEOUT),
        };
        let work = self.0.tracker.spawn(async move {
            let _slot = slot;
            let snapshot = configured(&inner.snapshot)?;
            let bags = read(&snapshot.table);
            report::report(&snapshot, &inner.metrics, bags, &call).await;
            Ok(())
        });
        let answer = work
            .await
            .unwrap_or_else(|_| Err(Status::internal("the report failed")));
        self.count(Method::Report, begun, answer)
    }

    /// Notes a verdict.
    fn told(
        &self,
        answer: &CheckResponse,
        id: VerdictId,
        generation: u64,
        begun: Instant,
        parties: &Parties,
    ) {
        let status = answer.precondition.as_ref().and_then(|p| p.status.as_ref());
        if let Some(status) = status.filter(|status| status.code != 0) {
            tracing::debug!(%id, code = status.code, reason = status.message, "denied");
        }
        let code = status.and_then(|s| Code::from_number(s.code.into()));
        let message = || status.map(|s| s.message.clone()).unwrap_or_default();
        self.0.verdicts.note(
            code.map_or("UNKNOWN", Code::name),
            parties,
            || (id.to_string(), message(), generation),
            begun.elapsed(),
        );
    }

    /// Counts an answer to a call that came at `begun`.
    pub(crate) fn count<T>(
        &self,
        method: Method,
        begun: Instant,
        answer: Result<T, Status>,
    ) -> Result<T, Status> {
        let code = match &answer {
            Ok(_) => "OK",
            Err(status) => code_name(status),
        };
        self.0.metrics.answered(method, code, begun.elapsed());
        answer
    }

    /// Answers a CheckRequest.
    pub(crate) async fn check(
        &self,
        request: Request<Bytes>,
    ) -> Result<Response<CheckResponse>, Status> {
        let Inner {
            snapshot,
            metrics,
            role,
            overload,
            ..
        } = &*self.0;
        let begun = Instant::now();
        let answer = async {
            role.admit(Method::Check)?;
            let _slot = overload.admit(Method::Check)?;
            let snapshot = configured(snapshot)?;
            let call = Call {
                deadline: deadline(timeout(request.metadata())),
            };
            let knows = request
                .metadata()
                .get(KNOWS_GENERATION)
                .is_some_and(|v| v == "1");
            let id = self.0.ids.next();
            let mut explanation = request.metadata().get(EXPLAIN).map(|_| Explanation {
                id: id.to_string(),
                generation: snapshot.generation.to_string(),
                ..Explanation::default()
            });
            let question = attribute::read_check(&request.into_inner(), &snapshot.table)?;
            let parties = Parties::of(&question.bag);
            let answer = check::answer(
                &snapshot,
                metrics,
                question,
                &call,
                knows,
                explanation.as_mut(),
            );
            let answer = answer.await?;
            self.told(&answer, id, snapshot.generation, begun, &parties);
            Ok((answer, snapshot.generation, id, explanation))
        };
        let (answer, told) = match answer.await {
            Ok((answer, generation, id, explanation)) => {
                (Ok((answer, generation)), Some((id, explanation)))
            }
            Err(status) => (Err(status), None),
        };
        let mut response = respond(answer, Method::Check, metrics, begun)?;
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

    /// Takes a ReportRequest.
    pub(crate) async fn report(
        &self,
        request: Request<Bytes>,
    ) -> Result<Response<ReportResponse>, Status> {
        let begun = Instant::now();
        let slot = self.0.role.admit(Method::Report);
        let slot = match slot.and_then(|()| self.0.overload.admit(Method::Report)) {
            Ok(slot) => slot,
            Err(status) => return respond(Err(status), Method::Report, &self.0.metrics, begun),
        };
        let inner = Arc::clone(&self.0);
        let call = Call {
            deadline: deadline(timeout(request.metadata())),
        };
        let request = request.into_inner();
        // A caller that leaves must not cut a batch in two: the work goes on without it.
        let work = self.0.tracker.spawn(async move {
            let _slot = slot;
            let Inner {
                snapshot, metrics, ..
            } = &*inner;
            let snapshot = configured(snapshot)?;
            let bags = attribute::read_report(&request, &snapshot.table)?;
            drop(request);
            report::report(&snapshot, metrics, bags, &call).await;
            Ok((ReportResponse {}, snapshot.generation))
        });
        let answer = work
            .await
            .unwrap_or_else(|_| Err(Status::internal("the report failed")));
        respond(answer, Method::Report, &self.0.metrics, begun)
    }
}

fn respond<T>(
    answer: Result<(T, u64), Status>,
    method: Method,
    metrics: &Metrics,
    begun: Instant,
) -> Result<Response<T>, Status> {
    let took = begun.elapsed();
    match answer {
        Ok((body, generation)) => {
            metrics.answered(method, "OK", took);
            let mut response = Response::new(body);
            response
                .metadata_mut()
                .insert(GENERATION, AsciiMetadataValue::from(generation));
            Ok(response)
        }
        Err(status) => {
            metrics.answered(method, code_name(&status), took);
            Err(status)
        }
    }
}

fn code_name(status: &Status) -> &'static str {
    let code = Code::from_number(i64::from(i32::from(status.code())));
    code.map_or("UNKNOWN", Code::name)
}

/// The newest snapshot. Before there is one, rules are unknown, not absent: the proxy's fail policy decides.
fn configured(snapshot: &ArcSwap<Snapshot>) -> Result<Arc<Snapshot>, Status> {
    let snapshot = snapshot.load_full();
    if snapshot.generation == 0 {
        return Err(Status::unavailable("mixer has no configuration yet"));
    }
    Ok(snapshot)
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
