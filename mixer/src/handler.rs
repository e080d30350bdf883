//! A handler in service: its calls are bounded in number and time, what it panics or stalls with stays
//! here, and every call is counted.

use std::{fmt, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt as _;
use lateen_adapter::{
    Adapter, Call, Candidate, CheckResult, Clock, Code, Env, Handler, HandlerError, InstanceType,
    Output, QuotaArgs, QuotaResult,
    env::Closer,
    instance::{
        CheckInstance, CheckOutputInstance, GenerateInstance, QuotaInstance, ReportInstance,
    },
    workload::Workloads,
};
use serde_json::Value as Json;
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::task::TaskTracker;

use crate::metrics::{Metrics, Outcome};

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
pub struct Signature {
    /// Name of the adapter.
    pub adapter: &'static str,
    /// Parameters as written.
    pub params: Json,
    /// Instances it gets, sorted by name.
    pub instances: Vec<InstanceType>,
}

/// A built handler. Closed when the last snapshot and the last call that hold it are gone.
#[derive(Debug)]
pub struct LiveHandler {
    /// `NAME.KIND.NAMESPACE`.
    pub name: Arc<str>,
    /// What it was built of.
    pub signature: Signature,
    handler: Handler,
    calls: Semaphore,
    metrics: Arc<Metrics>,
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
        let (env, closer) = Env::new(
            Arc::clone(&name),
            world.clock.clone(),
            Arc::clone(&world.workloads),
            world.tracker.clone(),
        );
        let env = env.with_meter(world.metrics.events.of(&name, signature.adapter));
        let candidate = Candidate {
            name: &name,
            params: &signature.params,
            instances: &signature.instances,
        };
        let build = || adapter.build(&candidate, env);
        let handler = match std::panic::catch_unwind(AssertUnwindSafe(build)) {
            Ok(Ok(handler)) => handler,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("adapter {} panicked", signature.adapter)),
        };
        Ok(Self {
            name,
            signature,
            handler,
            calls: Semaphore::new(MAX_CALLS),
            metrics: Arc::clone(&world.metrics),
            _closer: closer,
        })
    }

    /// What the adapter finds wrong with `signature`.
    pub fn problems(name: &str, adapter: &dyn Adapter, signature: &Signature) -> Vec<String> {
        let candidate = Candidate {
            name,
            params: &signature.params,
            instances: &signature.instances,
        };
        let validate = || adapter.validate(&candidate);
        std::panic::catch_unwind(AssertUnwindSafe(validate))
            .unwrap_or_else(|_| vec![format!("adapter {} panicked", signature.adapter)])
    }

    /// Asks for a verdict.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn check(
        &self,
        instance: CheckInstance,
        call: &Call,
    ) -> Result<CheckResult, HandlerError> {
        let part = self.handler.check().ok_or_else(|| self.unable("checks"))?;
        self.guard(call, || part.check(instance, call)).await
    }

    /// Asks for a verdict and what was found out.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn check_output(
        &self,
        instance: CheckOutputInstance,
        call: &Call,
    ) -> Result<(CheckResult, Output), HandlerError> {
        let part = self
            .handler
            .check_output()
            .ok_or_else(|| self.unable("checks with output"))?;
        self.guard(call, || part.check(instance, call)).await
    }

    /// Delivers a batch.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn report(
        &self,
        batch: Vec<ReportInstance>,
        call: &Call,
    ) -> Result<(), HandlerError> {
        let part = self
            .handler
            .report()
            .ok_or_else(|| self.unable("reports"))?;
        self.guard(call, || part.report(batch, call)).await
    }

    /// Asks for an amount.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn quota(
        &self,
        instance: QuotaInstance,
        args: &QuotaArgs,
        call: &Call,
    ) -> Result<QuotaResult, HandlerError> {
        let part = self.handler.quota().ok_or_else(|| self.unable("quota"))?;
        self.guard(call, || part.quota(instance, args, call)).await
    }

    /// Asks for attributes.
    ///
    /// # Errors
    /// What went wrong; lateness is UNAVAILABLE.
    pub async fn generate(
        &self,
        instance: GenerateInstance,
        call: &Call,
    ) -> Result<Output, HandlerError> {
        let part = self
            .handler
            .generate()
            .ok_or_else(|| self.unable("attributes"))?;
        self.guard(call, || part.generate(instance, call)).await
    }

    fn unable(&self, what: &str) -> HandlerError {
        HandlerError {
            code: Code::Unimplemented,
            message: format!("adapter {} does not do {what}", self.signature.adapter),
        }
    }

    async fn guard<T, F>(&self, call: &Call, start: impl FnOnce() -> F) -> Result<T, HandlerError>
    where
        F: Future<Output = Result<T, HandlerError>>,
    {
        let begun = Instant::now();
        let (result, outcome) = self.bounded(call, start).await;
        self.metrics
            .dispatched(&self.name, self.signature.adapter, outcome, begun.elapsed());
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
        let work = AssertUnwindSafe(async { start().await }).catch_unwind();
        match tokio::time::timeout_at(call.deadline, work).await {
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
