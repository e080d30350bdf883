//! An adapter for Mixer: what it is configured with, and what it does with the instances that rules send.
//!
//! `cargo run -- test cases/*.yaml` runs its cases, `cargo run -- serve` serves it to a Mixer.

use std::sync::Arc;

use lateen_adapter::{
    Adapter, BoxFuture, BuildError, Call, Candidate, Env, Handler, HandlerError, Info, params,
    template,
};
use serde::Deserialize;

/// The adapter.
#[derive(Clone, Copy, Debug)]
pub struct Scaffold;

/// What a handler is configured with. Fields that are not here are refused.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Params {
    /// Values that may pass.
    allowed: Vec<String>,
    /// How much quota there is.
    #[serde(deserialize_with = "params::integer")]
    limit: i64,
}

impl Adapter for Scaffold {
    fn info(&self) -> Info {
        Info {
            name: "__NAME__",
            description: "what __NAME__ does, in a sentence",
            templates: const {
                &[
                    //{check
                    &template::LISTENTRY,
                    //}
                    //{report
                    &template::LOGENTRY,
                    //}
                    //{quota
                    &template::QUOTA,
                    //}
                ]
            },
        }
    }

    /// Everything that is wrong with a configuration, without touching the world.
    fn validate(&self, candidate: &Candidate<'_>) -> Vec<String> {
        match params::parse::<Params>(candidate.params) {
            Err(problem) => vec![problem],
            Ok(params) if params.limit < 0 => vec![format!("limit: {} is negative", params.limit)],
            Ok(_) => Vec::new(),
        }
    }

    fn build(&self, candidate: &Candidate<'_>, env: Env) -> Result<Handler, BuildError> {
        let params = params::parse::<Params>(candidate.params).map_err(BuildError)?;
        let work = Arc::new(Work {
            left: std::sync::atomic::AtomicI64::new(params.limit),
            params,
            env,
        });
        let handler = Handler::new();
        //{check
        let handler = handler.with_check(work.clone());
        //}
        //{report
        let handler = handler.with_report(work.clone());
        //}
        //{quota
        let handler = handler.with_quota(work.clone());
        //}
        drop(work);
        Ok(handler)
    }
}

/// A handler at work. Many calls may be in here at a time.
#[allow(dead_code, reason = "not every kind of work needs everything")]
struct Work {
    params: Params,
    left: std::sync::atomic::AtomicI64,
    env: Env,
}
//{check

impl lateen_adapter::CheckHandler for Work {
    fn check<'a>(
        &'a self,
        instance: lateen_adapter::instance::CheckInstance,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<lateen_adapter::CheckResult, HandlerError>> {
        use lateen_adapter::{CheckResult, Code, Status, instance::CheckInstance, value};
        Box::pin(async move {
            let CheckInstance::ListEntry(entry) = instance else {
                return Err(HandlerError::invalid("only listentry is taken"));
            };
            let value = entry.value.as_ref().map(value::text).unwrap_or_default();
            let status = if self.params.allowed.iter().any(|allowed| *allowed == value) {
                Status::ok()
            } else {
                Status::new(Code::PermissionDenied, format!("{value} is not allowed"))
            };
            Ok(CheckResult {
                status,
                valid_duration: Some(std::time::Duration::from_secs(5)),
                valid_use_count: Some(1000),
            })
        })
    }
}
//}
//{report

impl lateen_adapter::ReportHandler for Work {
    fn report<'a>(
        &'a self,
        batch: Vec<lateen_adapter::instance::ReportInstance>,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        use lateen_adapter::instance::ReportInstance;
        Box::pin(async move {
            for instance in batch {
                let ReportInstance::LogEntry(entry) = instance else {
                    return Err(HandlerError::invalid("only logentry is taken"));
                };
                self.env.counter("entries").inc();
                let severity = entry.severity.as_str();
                eprintln!("{severity} {}: {:?}", entry.name, entry.variables);
            }
            Ok(())
        })
    }
}
//}
//{quota

impl lateen_adapter::QuotaHandler for Work {
    fn quota<'a>(
        &'a self,
        _instance: lateen_adapter::instance::QuotaInstance,
        args: &'a lateen_adapter::QuotaArgs,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<lateen_adapter::QuotaResult, HandlerError>> {
        use std::sync::atomic::Ordering::SeqCst;

        use lateen_adapter::{QuotaResult, Status};
        Box::pin(async move {
            let grant = |left: i64| match args.amount {
                amount if amount <= left => amount,
                _ if args.best_effort => left,
                _ => 0,
            };
            let took = |left| Some(left - grant(left));
            let before = self.left.fetch_update(SeqCst, SeqCst, took);
            Ok(QuotaResult {
                status: Status::ok(),
                valid_duration: None,
                granted: grant(before.unwrap_or_default()),
                window: None,
            })
        })
    }
}
//}
