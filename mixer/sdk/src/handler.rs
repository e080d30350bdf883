//! What a built handler can do: one trait per variety of template.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use lateen_engine::Value;
use tokio::time::Instant;

use crate::{
    instance::{
        CheckInstance, CheckOutputInstance, GenerateInstance, QuotaInstance, ReportInstance,
    },
    status::{Code, Status},
};

/// What a call knows of its caller.
#[derive(Clone, Debug)]
pub struct Call {
    /// After this moment nobody waits for the answer.
    pub deadline: Instant,
}

/// Answers checks.
pub trait CheckHandler: Send + Sync {
    /// The verdict on one instance. Dropped when the deadline passes.
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>>;
}

/// Answers checks, and says what it found out.
pub trait CheckOutputHandler: Send + Sync {
    /// The verdict on one instance, and values of the template's outputs: those count when the verdict is OK.
    /// Dropped when the deadline passes.
    fn check<'a>(
        &'a self,
        instance: CheckOutputInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(CheckResult, Output), HandlerError>>;
}

/// Takes reports.
pub trait ReportHandler: Send + Sync {
    /// Takes all instances that one Report call made for this handler.
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>>;
}

/// Grants quota.
pub trait QuotaHandler: Send + Sync {
    /// Takes `args.amount` from the counter that `instance` names.
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>>;
}

/// Produces attributes.
pub trait GenerateHandler: Send + Sync {
    /// What is known about `instance`; what is unknown is left out.
    fn generate<'a>(
        &'a self,
        instance: GenerateInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Output, HandlerError>>;
}

/// A verdict and how long it may be used again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    /// The verdict.
    pub status: Status,
    /// For how long it holds; `None`: it must not be used again.
    pub valid_duration: Option<Duration>,
    /// How often it may be used; `None`: it must not be used again. Negative: without limit.
    pub valid_use_count: Option<i32>,
}

/// How much is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaArgs {
    /// Equal for all attempts of one request; empty: unknown.
    pub dedup_id: Arc<str>,
    /// How much; negative: give back.
    pub amount: i64,
    /// Take what is left when that is less than `amount`.
    pub best_effort: bool,
}

/// How much was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaResult {
    /// Not OK when quota cannot be told.
    pub status: Status,
    /// For how long the amount is good.
    pub valid_duration: Option<Duration>,
    /// How much; 0: nothing left.
    pub granted: i64,
    /// How the limit stands now, for those who want to tell the caller; `None`: unknown.
    pub window: Option<QuotaWindow>,
}

/// How a limit stands after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaWindow {
    /// How much there is in all.
    pub limit: i64,
    /// How much is left.
    pub remaining: i64,
    /// When more is there, at the earliest; zero: not by waiting, or all is there.
    pub reset: Duration,
}

/// What a generator or a check found: values of the template's outputs.
pub type Output = Vec<(&'static str, Value)>;

/// A handler could not do its work. The rule's fail mode decides what that means.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HandlerError {
    /// For the rule that fails closed.
    pub code: Code,
    /// For the operator, and for the caller of a rule that fails closed.
    pub message: String,
}

impl HandlerError {
    /// Something the handler needs does not answer.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            code: Code::Unavailable,
            message: message.into(),
        }
    }

    /// The instance makes no sense to this handler.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            code: Code::InvalidArgument,
            message: message.into(),
        }
    }
}

/// A built handler: what it can do, and nothing else.
#[derive(Clone, Default)]
pub struct Handler {
    check: Option<Arc<dyn CheckHandler>>,
    check_output: Option<Arc<dyn CheckOutputHandler>>,
    report: Option<Arc<dyn ReportHandler>>,
    quota: Option<Arc<dyn QuotaHandler>>,
    generate: Option<Arc<dyn GenerateHandler>>,
}

impl Handler {
    /// A handler that can do nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// And it answers checks.
    #[must_use]
    pub fn with_check(mut self, handler: Arc<dyn CheckHandler>) -> Self {
        self.check = Some(handler);
        self
    }

    /// And it answers checks with output.
    #[must_use]
    pub fn with_check_output(mut self, handler: Arc<dyn CheckOutputHandler>) -> Self {
        self.check_output = Some(handler);
        self
    }

    /// And it takes reports.
    #[must_use]
    pub fn with_report(mut self, handler: Arc<dyn ReportHandler>) -> Self {
        self.report = Some(handler);
        self
    }

    /// And it grants quota.
    #[must_use]
    pub fn with_quota(mut self, handler: Arc<dyn QuotaHandler>) -> Self {
        self.quota = Some(handler);
        self
    }

    /// And it produces attributes.
    #[must_use]
    pub fn with_generate(mut self, handler: Arc<dyn GenerateHandler>) -> Self {
        self.generate = Some(handler);
        self
    }

    /// The part that answers checks.
    pub fn check(&self) -> Option<&dyn CheckHandler> {
        self.check.as_deref()
    }

    /// The part that answers checks with output.
    pub fn check_output(&self) -> Option<&dyn CheckOutputHandler> {
        self.check_output.as_deref()
    }

    /// The part that takes reports.
    pub fn report(&self) -> Option<&dyn ReportHandler> {
        self.report.as_deref()
    }

    /// The part that grants quota.
    pub fn quota(&self) -> Option<&dyn QuotaHandler> {
        self.quota.as_deref()
    }

    /// The part that produces attributes.
    pub fn generate(&self) -> Option<&dyn GenerateHandler> {
        self.generate.as_deref()
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handler")
            .field("check", &self.check.is_some())
            .field("check_output", &self.check_output.is_some())
            .field("report", &self.report.is_some())
            .field("quota", &self.quota.is_some())
            .field("generate", &self.generate.is_some())
            .finish()
    }
}
