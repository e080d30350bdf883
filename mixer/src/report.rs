//! Report: what happened, to the adapters that want to know.

use std::sync::Arc;

use futures::future::join_all;
use lateen_adapter::{Call, Variety};
use lateen_engine::{Bag, Tracker};

use crate::{
    config::{Snapshot, rule::Rule},
    handler::LiveHandler,
    instance::{Batch, Made},
    metrics::Metrics,
    preprocess::preprocess,
};

/// Delivers the instances that rules make of `bags`, one batch to each handler. What goes wrong is counted
/// and costs only the instances it happened to: the sender could do nothing about it, and sending again
/// would count the others twice.
pub async fn report(snapshot: &Snapshot, metrics: &Metrics, bags: Vec<Bag>, call: &Call) {
    let mut matched: Vec<(&Arc<Rule>, u64)> = Vec::new();
    let mut batches: Vec<(&Arc<LiveHandler>, Batch)> = Vec::new();
    for mut bag in bags {
        metrics.took(1, bag.ignored());
        let mut tracker = Tracker::off();
        // A denial is for checks; here the failed generator is counted, and defaults stand in.
        if let Err(status) = preprocess(snapshot, metrics, &mut bag, &mut tracker, call).await {
            tracing::debug!(
                reason = status.message,
                "attributes are missing in a report"
            );
        }
        let selected = match snapshot.report.select(&bag, &mut tracker) {
            Ok(selected) => selected,
            Err(error) => {
                tracing::error!(%error, "a report is lost");
                continue;
            }
        };
        for one in &selected {
            let Some(rule) = one.rule.actions().first() else {
                continue;
            };
            if !one.applies() {
                metrics.match_failed(rule);
                continue;
            }
            if rule.sampling.as_ref().is_some_and(|s| !s.takes(&bag)) {
                metrics.sampled_out(&rule.name);
                continue;
            }
            if rule.is_dry_run {
                metrics.tried(&rule.name, "OK");
                continue;
            }
            match matched.iter_mut().find(|(r, _)| Arc::ptr_eq(r, rule)) {
                Some((_, times)) => *times += 1,
                None => matched.push((rule, 1)),
            }
            for action in &rule.actions {
                for instance in action.instances(Variety::Report) {
                    match instance.make(&bag, &mut tracker) {
                        Ok(made) => add(&mut batches, &action.handler, made),
                        Err(reason) => {
                            metrics.instance_failed(rule);
                            tracing::debug!(instance = %instance.name(), reason, "no instance");
                        }
                    }
                }
            }
        }
    }
    for (rule, times) in matched {
        metrics.rule_matched(rule, times);
    }
    // Each handler's own errors are counted where it is called.
    join_all(
        batches
            .into_iter()
            .map(|(handler, batch)| handler.report(batch, call)),
    )
    .await;
}

fn add<'a>(
    batches: &mut Vec<(&'a Arc<LiveHandler>, Batch)>,
    handler: &'a Arc<LiveHandler>,
    instance: Made,
) {
    match batches.iter_mut().find(|(h, _)| Arc::ptr_eq(h, handler)) {
        Some((_, batch)) => batch.push(instance),
        None => batches.extend(Batch::of(instance).map(|batch| (handler, batch))),
    }
}
