//! The phase before rules: attribute generators add what they know about a request.

use std::sync::Arc;

use futures::future::join_all;
use lateen_adapter::{Call, Code, Status, Variety};
use lateen_engine::{Bag, Rule, Slot, Tracker, Verdict};

use crate::{
    config::{Snapshot, rule::FailMode, sent::Sent},
    handler::LiveHandler,
    metrics::Metrics,
};

/// Adds generated attributes to `bag`.
///
/// # Errors
/// The denial that a generator's rule asks for when it fails. What could be generated is there all the same.
pub async fn preprocess(
    snapshot: &Snapshot,
    metrics: &Metrics,
    bag: &mut Bag,
    tracker: &mut Tracker,
    call: &Call,
) -> Result<(), Status> {
    if snapshot.generate.rules().is_empty() {
        return Ok(());
    }
    let selected = snapshot
        .generate
        .select(bag, tracker)
        .map_err(|error| Status::new(Code::Unavailable, error.to_string()))?;
    let mut denial = None;
    let mut deny = |fail_mode: FailMode, message: String| {
        if fail_mode == FailMode::Closed && denial.is_none() {
            denial = Some(Status::new(Code::Unavailable, message));
        }
    };
    let mut calls: Vec<(FailMode, &Arc<LiveHandler>, &Sent, _)> = Vec::new();
    for one in &selected {
        let Some(rule) = one.rule.actions().first() else {
            continue;
        };
        if !one.applies() {
            metrics.match_failed(rule);
            if let Some(error) = one.denies() {
                deny(rule.match_fail_mode, format!("{}:{error}", rule.name));
            }
            continue;
        }
        for action in &rule.actions {
            for instance in action.instances(Variety::AttributeGenerator) {
                let is_asked = calls.iter().any(|(_, handler, asked, _)| {
                    Arc::ptr_eq(handler, &action.handler) && asked.same(instance)
                });
                if is_asked {
                    continue; // another rule has sent the same: the answer is the same
                }
                match instance.make(bag, tracker) {
                    Ok(made) => {
                        let answer = action.handler.generate(made, call);
                        calls.push((rule.adapter_fail_mode, &action.handler, instance, answer));
                    }
                    Err(reason) => {
                        metrics.instance_failed(rule);
                        deny(
                            rule.match_fail_mode,
                            format!("{}:{reason}", instance.name()),
                        );
                    }
                }
            }
        }
    }
    let answers = join_all(calls.into_iter().map(
        |(fail_mode, handler, instance, answer)| async move {
            (fail_mode, handler, instance, answer.await)
        },
    ))
    .await;
    for (fail_mode, handler, instance, answer) in answers {
        match answer {
            Ok(found) => instance.bind(found, bag),
            Err(error) => deny(fail_mode, format!("{}:{error}", handler.name)),
        }
    }
    denial.map_or(Ok(()), Err)
}

/// What says which namespace's rules a request meets.
const SCOPE: [&str; 3] = [
    "context.reporter.kind",
    "source.namespace",
    "destination.namespace",
];

/// Whether some rule of the check phase may need what generators tell of this request: its match is not false
/// already by what is known without them.
pub fn is_needed(snapshot: &Snapshot, bag: &Bag) -> bool {
    let written: Vec<Slot> = snapshot
        .generate
        .rules()
        .iter()
        .flat_map(|rule| rule.actions())
        .flat_map(|rule| &rule.actions)
        .flat_map(|action| action.instances(Variety::AttributeGenerator))
        .flat_map(|instance| instance.writes())
        .collect();
    let known = |name: &str| {
        let slot = snapshot.table.slot(name)?;
        bag.get(slot).filter(|_| !written.contains(&slot)).cloned()
    };
    let may_matter = |rule: &Rule<_>| rule.partial(&known) != Verdict::False;
    // Without what says which namespace's rules count, those of all do.
    let is_scoped = SCOPE
        .iter()
        .filter_map(|name| snapshot.table.slot(name))
        .all(|slot| !written.contains(&slot));
    if !is_scoped {
        return snapshot.check.rules().iter().any(may_matter);
    }
    let namespace = snapshot.check.namespace(bag, &mut Tracker::off());
    snapshot
        .check
        .rules_for(namespace.map(|namespace| namespace.as_str()))
        .any(may_matter)
}
