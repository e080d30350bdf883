//! The handler: each part of it asks the guest.

use std::sync::Arc;

use arc_swap::ArcSwap;
use futures::{FutureExt as _, future::BoxFuture};
use lateen_adapter::{
    Call, CheckHandler, CheckOutputHandler, CheckResult, Code, GenerateHandler, HandlerError,
    Output, QuotaArgs, QuotaHandler, QuotaResult, ReportHandler,
    instance::{
        CheckInstance, CheckOutputInstance, Custom, GenerateInstance, QuotaInstance, ReportInstance,
    },
};
use wasmtime::component::Val;

use crate::{
    abi::{self, Lowering},
    copies::{CallError, Copies},
};

/// Whatever program there is now. Calls under way end with the one they began with.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) copies: ArcSwap<Copies>,
}

impl Guest {
    pub(crate) fn new(copies: ArcSwap<Copies>) -> Self {
        Self { copies }
    }

    /// Asks about one instance; `read` reads the answer.
    async fn ask<T>(
        &self,
        instance: impl Into<Custom>,
        args: Option<&QuotaArgs>,
        call: &Call,
        read: impl Fn(&Lowering, &Val) -> Result<T, String>,
    ) -> Result<T, HandlerError> {
        let copies = self.copies.load_full();
        let instance = instance.into();
        let entry = copies.program().entry(instance.template).ok_or_else(|| {
            HandlerError::invalid(format!("no guest takes {}", instance.template.name))
        })?;
        let mut params = vec![entry.lowering.instance(instance)];
        params.extend(args.map(abi::quota_args));
        let answer = copies.call(entry, &params, call.deadline).await;
        let answer = answer.map_err(CallError::told)?;
        let handled = abi::handled(&answer).and_then(|handled| match handled {
            Err(said) => Ok(Err(said)),
            Ok(Some(answer)) => read(&entry.lowering, answer).map(Ok),
            Ok(None) => Err("nothing".to_owned()),
        });
        match handled {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(said)) => Err(failed(said)),
            Err(reason) => {
                copies.setting().counts.bad_answers.inc();
                Err(CallError::BadAnswer(reason).told())
            }
        }
    }
}

/// What a guest says when it cannot answer.
fn failed(said: String) -> HandlerError {
    HandlerError {
        code: Code::Unavailable,
        message: said,
    }
}

impl CheckHandler for Guest {
    fn check<'a>(
        &'a self,
        instance: CheckInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CheckResult, HandlerError>> {
        self.ask(instance, None, call, |_, answer| abi::check_result(answer))
            .boxed()
    }
}

impl CheckOutputHandler for Guest {
    fn check<'a>(
        &'a self,
        instance: CheckOutputInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(CheckResult, Output), HandlerError>> {
        self.ask(instance, None, call, |lowering, answer| {
            let (result, output) = abi::checked_with_output(answer)?;
            Ok((abi::check_result(result)?, lowering.output(output)?))
        })
        .boxed()
    }
}

impl QuotaHandler for Guest {
    fn quota<'a>(
        &'a self,
        instance: QuotaInstance,
        args: &'a QuotaArgs,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<QuotaResult, HandlerError>> {
        let wanted = args.amount;
        self.ask(instance, Some(args), call, move |_, answer| {
            let result = abi::quota_result(answer)?;
            // Nobody gets more than was asked for, whatever a guest says.
            if wanted >= 0 && !(0..=wanted).contains(&result.granted) {
                return Err(format!("{} granted of {wanted}", result.granted));
            }
            Ok(result)
        })
        .boxed()
    }
}

impl GenerateHandler for Guest {
    fn generate<'a>(
        &'a self,
        instance: GenerateInstance,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Output, HandlerError>> {
        self.ask(instance, None, call, Lowering::output).boxed()
    }
}

impl ReportHandler for Guest {
    fn report<'a>(
        &'a self,
        batch: Vec<ReportInstance>,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<(), HandlerError>> {
        async move {
            let copies: Arc<Copies> = self.copies.load_full();
            // One call for each template, in the order of their first instances.
            let mut batches: Vec<(&'static str, Vec<Custom>)> = Vec::new();
            for instance in batch.into_iter().map(Custom::from) {
                let name = instance.template.name;
                match batches.iter_mut().find(|(n, _)| *n == name) {
                    Some((_, batch)) => batch.push(instance),
                    None => batches.push((name, vec![instance])),
                }
            }
            let mut outcome = Ok(());
            for (name, batch) in batches {
                let template = batch.first().map(|instance| instance.template);
                let entry = template.and_then(|t| copies.program().entry(t));
                let Some(entry) = entry else {
                    outcome = Err(HandlerError::invalid(format!("no guest takes {name}")));
                    continue;
                };
                let instances = batch.into_iter().map(|i| entry.lowering.instance(i));
                let params = [Val::List(instances.collect())];
                let answer = copies.call(entry, &params, call.deadline).await;
                let told = answer.map_err(CallError::told).and_then(|answer| {
                    match abi::handled(&answer) {
                        Ok(Ok(_)) => Ok(()),
                        Ok(Err(said)) => Err(failed(said)),
                        Err(reason) => {
                            copies.setting().counts.bad_answers.inc();
                            Err(CallError::BadAnswer(reason).told())
                        }
                    }
                });
                outcome = outcome.and(told);
            }
            outcome
        }
        .boxed()
    }
}
