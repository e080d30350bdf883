//! Accepts everything and does nothing: for tests and for measuring what Mixer itself costs.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Adapter, BuildError, Call, Candidate, CheckHandler, CheckResult, Env, Handler, HandlerError,
    Info, QuotaArgs, QuotaHandler, QuotaResult, ReportHandler, Status,
    instance::{CheckInstance, QuotaInstance, ReportInstance},
    template,
};

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Noop;

impl Adapter for Noop {
    fn info(&self) -> Info {
        Info {
            name: "noop",
            description: "does nothing",
            templates: const {
                &[
                    &template::CHECKNOTHING,
                    &template::LISTENTRY,
                    &template::APIKEY,
                    &template::AUTHORIZATION,
                    &template::QUOTA,
                    &template::REPORTNOTHING,
                    &template::METRIC,
                    &template::LOGENTRY,
                    &template::TRACESPAN,
                ]
            },
        }
    }

    fn validate(&self, _candidate: &Candidate<'_>) -> Vec<String> {
        Vec::new()
    }

    fn build(&self, _candidate: &Candidate<'_>, _env: Env) -> Result<Handler, BuildError> {
        let handler = Arc::new(*self);
        Ok(Handler::new()
            .with_check(handler.clone())
            .with_quota(handler.clone())
            .with_report(handler))
    }
}

impl CheckHandler for Noop {
    fn check<'a>(
        &'a self,
        _instance: CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        let result = CheckResult {
            status: Status::ok(),
            valid_duration: Some(Duration::from_secs(5)),
            valid_use_count: Some(1000),
        };
        async move { Ok(result) }.boxed()
    }
}

impl QuotaHandler for Noop {
    fn quota<'a>(
        &'a self,
        _instance: QuotaInstance,
        args: &'a QuotaArgs,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        let result = QuotaResult {
            status: Status::ok(),
            valid_duration: Some(Duration::from_secs(5)),
            granted: args.amount,
            window: None,
        };
        async move { Ok(result) }.boxed()
    }
}

impl ReportHandler for Noop {
    fn report<'a>(
        &'a self,
        _batch: Vec<ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async { Ok(()) }.boxed()
    }
}
