//! A handler in service: its calls are bounded in number and time, what it panics or stalls with stays
//! here, and every call is counted.

use std::{
    fmt, future::Future, panic::AssertUnwindSafe, pin::pin, sync::Arc, task::Poll, time::Duration,
};

use futures::FutureExt as _;
use lateen_adapter::{
    Adapter, Call, Candidate, CheckResult, Clock, Code, Env, Handler, HandlerError, InstanceType,
    QuotaArgs, QuotaResult, env::Closer, workload::Workloads,
};
use serde_json::Value as Json;
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::task::TaskTracker;

use crate::{
    instance::{Batch, Encoded, Found, Made},
    metrics::{HandlerStats, Metrics, Outcome},
    remote::{self, Process},
};

/// Calls of one handler at a time; the next one is refused at once. A handler that stalls would otherwise
/// hold every request that meets it until its deadline.
pub const MAX_CALLS: usize = 1024;

/// What handlers are built in.
#[derive(Clone)]
pub struct World {
    /// The clock they measure with.
    pub clock: Clock,
    /// Who runs where.
    pub workloads: Arc<dyn Workloads>,
    /// Counts their tasks.
    pub tracker: TaskTracker,
    /// Counts their calls.
    pub metrics: Arc<Metrics>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// What a handler was built of. A handler is built anew only when this changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Signature {
    /// Of an adapter that is part of this program.
    Compiled {
        /// Name of the adapter.
        adapter: &'static str,
        /// Parameters as written.
        params: Json,
        /// Instances it gets, sorted by name.
        instances: Vec<InstanceType>,
    },
    /// Of an adapter that is a process of its own.
    Remote(Box<remote::Signature>),
}

/// What metrics call all adapters that are processes: their names are free text, and the handler's says which.
pub const REMOTE: &str = "grpc";

impl Signature {
    /// Name of the adapter.
    pub fn adapter(&self) -> &str {
        match self {
            Self::Compiled { adapter, .. } => adapter,
            Self::Remote(signature) => &signature.adapter,
        }
    }

    /// Whether the adapter is a process of its own.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(_))
    }

    /// What metrics call the adapter.
    fn label(&self) -> &'static str {
        match self {
            Self::Compiled { adapter, .. } => adapter,
            Self::Remote(_) => REMOTE,
        }
    }

    fn candidate<'a>(&'a self, name: &'a str) -> Option<Candidate<'a>> {
        match self {
            Self::Compiled {
                params, instances, ..
            } => Some(Candidate {
                name,
                params,
                instances,
            }),
            Self::Remote(_) => None,
        }
    }
}

/// Who does the work.
#[derive(Debug)]
enum Worker {
    Adapter(Handler),
    Process(Process),
}

/// A built handler. Closed when the last snapshot and the last call that hold it are gone.
#[derive(Debug)]
pub struct LiveHandler {
    /// `NAME.KIND.NAMESPACE`.
    pub name: Arc<str>,
    /// What it was built of.
    pub signature: Signature,
    worker: Worker,
    calls: Semaphore,
    stats: Arc<HandlerStats>,
    _closer: Closer,
}

impl LiveHandler {
    /// Builds a handler that [`Adapter::validate`] has nothing against.
    ///
    /// # Errors
    /// What the adapter says, or that it panicked.
    pub fn build(
        name: Arc<str>,
        adapter: &dyn Adapter,
        signature: Signature,
        world: &World,
    ) -> Result<Self, String> {
        Self::make(name, signature, world, |name, signature, env| {
            let candidate = signature.candidate(name).ok_or("it is no such handler")?;
            let handler = adapter.build(&candidate, env).map_err(|e| e.to_string())?;
            Ok(Worker::Adapter(handler))
        })
    }

    /// Builds a handler whose adapter is a process. It is not called yet.
    ///
    /// # Errors
    /// A file of its connection cannot be used.
    pub fn build_remote(
        name: Arc<str>,
        signature: Signature,
        world: &World,
    ) -> Result<Self, String> {
        Self::make(name, signature, world, |name, signature, env| {
            let Signature::Remote(signature) = signature else {
                return Err("it is no such handler".to_owned());
            };
            Process::build(name, signature, env).map(Worker::Process)
        })
    }

    /// A handler that does nothing, for where configuration is only checked.
    pub fn idle(name: Arc<str>, signature: Signature, world: &World) -> Result<Self, String> {
        Self::make(name, signature, world, |_, _, _| {
            Ok(Worker::Adapter(Handler::new()))
        })
    }

    fn make(
        name: Arc<str>,
        signature: Signature,
        world: &World,
        build: impl FnOnce(&Arc<str>, &Signature, Env) -> Result<Worker, String>,
    ) -> Result<Self, String> {
        let (env, closer) = Env::new(
            Arc::clone(&name),
            world.clock.clone(),
            Arc::clone(&world.workloads),
            world.tracker.clone(),
        );
        let env = env.with_meter(world.metrics.events.of(&name, signature.label()));
        let build = AssertUnwindSafe(|| build(&name, &signature, env));
        let worker = std::panic::catch_unwind(build)
            .unwrap_or_else(|_| Err(format!("adapter {} panicked", signature.adapter())))?;
        let stats = world.metrics.configured.handler(&name, signature.label());
        Ok(Self {
            name,
            signature,
            worker,
            calls: Semaphore::new(MAX_CALLS),
            stats,
            _closer: closer,
        })
    }

    /// What is counted of it.
    pub(crate) fn stats(&self) -> &HandlerStats {
        &self.stats
    }

    /// What the adapter finds wrong with `signature`.
    pub fn problems(name: &str, adapter: &dyn Adapter, signature: &Signature) -> Vec<String> {
        let Some(candidate) = signature.candidate(name) else {
            return Vec::new();
        };
        let validate = || adapter.validate(&candidate);
        std::panic::catch_unwind(AssertUnwindSafe(validate))
            .unwrap_or_else(|_| vec![format!("adapter {} panicked", signature.adapter())])
    }

    /// Asks for a verdict, and for what was found out.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn check(
        &self,
        made: Made,
        call: &Call,
    ) -> Result<(CheckResult, Found), HandlerError> {
        match (&self.worker, made) {
            (Worker::Adapter(handler), Made::Check(instance)) => {
                let part = handler.check().ok_or_else(|| self.unable("checks"))?;
                let template = instance.template();
                let ask = || part.check(instance, call);
                let result = self.guard(template, call, ask).await?;
                Ok((result, Found::nothing()))
            }
            (Worker::Adapter(handler), Made::CheckOutput(instance)) => {
                let part = handler.check_output();
                let part = part.ok_or_else(|| self.unable("checks with output"))?;
                let template = instance.template();
                let ask = || part.check(instance, call);
                let (result, output) = self.guard(template, call, ask).await?;
                Ok((result, Found::Compiled(output)))
            }
            (Worker::Process(process), Made::Remote(instance)) => {
                let template = instance.template();
                // A call over the network is a large future, and those of all rules are moved about together: it
                // is kept apart from them.
                let ask = || process.check(instance, call).boxed();
                self.guard(&template, call, ask).await
            }
            _ => Err(self.unable("such checks")),
        }
    }

    /// Delivers a batch.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn report(&self, batch: Batch, call: &Call) -> Result<(), HandlerError> {
        match (&self.worker, batch) {
            (Worker::Adapter(handler), Batch::Compiled(batch)) => {
                let part = handler.report().ok_or_else(|| self.unable("reports"))?;
                // A batch may be of several templates: it is counted with that of its first instance.
                let template = batch.first().map_or("", |i| i.template());
                self.guard(template, call, || part.report(batch, call))
                    .await
            }
            (Worker::Process(process), Batch::Remote(batch)) => {
                let template = batch.first().map(Encoded::template);
                let template = template.as_deref().unwrap_or_default();
                self.guard(template, call, || async { process.report(batch) })
                    .await
            }
            _ => Err(self.unable("such reports")),
        }
    }

    /// Asks for an amount.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn quota(
        &self,
        made: Made,
        args: &QuotaArgs,
        call: &Call,
    ) -> Result<QuotaResult, HandlerError> {
        match (&self.worker, made) {
            (Worker::Adapter(handler), Made::Quota(instance)) => {
                let part = handler.quota().ok_or_else(|| self.unable("quota"))?;
                self.guard("quota", call, || part.quota(instance, args, call))
                    .await
            }
            (Worker::Process(process), Made::Remote(instance)) => {
                let template = instance.template();
                let ask = || process.quota(instance, args, call).boxed();
                self.guard(&template, call, ask).await
            }
            _ => Err(self.unable("such quota")),
        }
    }

    /// Asks for attributes.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn generate(&self, made: Made, call: &Call) -> Result<Found, HandlerError> {
        match (&self.worker, made) {
            (Worker::Adapter(handler), Made::Generate(instance)) => {
                let part = handler
                    .generate()
                    .ok_or_else(|| self.unable("attributes"))?;
                let template = instance.template();
                let ask = || part.generate(instance, call);
                let output = self.guard(template, call, ask).await?;
                Ok(Found::Compiled(output))
            }
            (Worker::Process(process), Made::Remote(instance)) => {
                let template = instance.template();
                let ask = || process.generate(instance, call).boxed();
                self.guard(&template, call, ask).await
            }
            _ => Err(self.unable("such attributes")),
        }
    }

    fn unable(&self, what: &str) -> HandlerError {
        HandlerError {
            code: Code::Unimplemented,
            message: format!("adapter {} does not do {what}", self.signature.adapter()),
        }
    }

    async fn guard<T, F>(
        &self,
        template: &str,
        call: &Call,
        start: impl FnOnce() -> F,
    ) -> Result<T, HandlerError>
    where
        F: Future<Output = Result<T, HandlerError>>,
    {
        let begun = Instant::now();
        let _under_way = self.stats.begin();
        let (result, outcome) = self.bounded(call, start).await;
        self.stats.ended(template, outcome, begun.elapsed());
        if let Err(error) = &result {
            tracing::debug!(handler = %self.name, %error, "a handler failed");
        }
        result
    }

    async fn bounded<T, F>(
        &self,
        call: &Call,
        start: impl FnOnce() -> F,
    ) -> (Result<T, HandlerError>, Outcome)
    where
        F: Future<Output = Result<T, HandlerError>>,
    {
        let Ok(_slot) = self.calls.try_acquire() else {
            let error = HandlerError::unavailable("the handler has too many calls under way");
            return (Err(error), Outcome::Refused);
        };
        // `start` may panic too, before there is a future.
        let mut work = pin!(AssertUnwindSafe(async { start().await }).catch_unwind());
        // Most handlers answer at once: no timer is made for those.
        let answer = match futures::poll!(work.as_mut()) {
            Poll::Ready(answer) => Ok(answer),
            Poll::Pending => tokio::time::timeout_at(call.deadline, work).await,
        };
        match answer {
            Ok(Ok(Ok(answer))) => (Ok(answer), Outcome::Answered),
            Ok(Ok(Err(error))) => (Err(error), Outcome::Failed),
            Ok(Err(_panic)) => {
                tracing::error!(handler = %self.name, "a handler panicked");
                (
                    Err(HandlerError::unavailable("the handler panicked")),
                    Outcome::Panicked,
                )
            }
            Err(_late) => (
                Err(HandlerError::unavailable(
                    "the handler did not answer in time",
                )),
                Outcome::Late,
            ),
        }
    }
}

/// What is left for handlers of the time a caller gives: a tenth is kept for the answer to travel.
pub fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout.mul_f64(0.9)
}
