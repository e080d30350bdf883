//! Check: the verdict on one request, and the quota it may take.

use std::{collections::BTreeMap, sync::Arc};

use futures::future::join_all;
use lateen_adapter::{Call, CheckResult, Code, HandlerError, QuotaArgs, Status, Variety};
use lateen_engine::{Bag, EvalError, Tracker};
use lateen_protocols::istio::mixer::v1::{
    CheckRequest, CheckResponse,
    check_request::QuotaParams,
    check_response::{PreconditionResult, QuotaResult},
};
use tokio::time::Instant;
use tonic::Status as RpcStatus;

use crate::{
    config::{
        Snapshot,
        rule::{Action, FailMode, Rule},
        sent::Sent,
    },
    encode,
    explain::{Explanation, QuotaTold},
    handler::LiveHandler,
    instance::Found,
    merge::{Merged, Outputs, Reuse, Verdict},
    metrics::Metrics,
    preprocess::{is_needed, preprocess},
};

/// Quotas that one request may ask for.
const MAX_QUOTAS: usize = 64;

/// One check under way: all that its phases share.
struct Check<'a> {
    snapshot: &'a Snapshot,
    metrics: &'a Metrics,
    call: &'a Call,
    bag: Bag,
    global_words: usize,
    knows_generation: bool,
}

/// What is asked about one request.
#[derive(Debug)]
pub struct Question {
    /// Its attributes.
    pub bag: Bag,
    /// How many words of the global dictionary caller and server share.
    pub global_words: usize,
    /// Quotas it is charged, in the order of their names, so that the same request takes them in the same order.
    pub quotas: BTreeMap<String, QuotaParams>,
    /// Equal for repetitions of one request; may be empty.
    pub deduplication_id: String,
    /// Whether only the quotas are asked for: the precondition has been settled.
    pub only_quotas: bool,
}

/// Answers `request` by `snapshot`. The caller learns of configuration changes by itself if `knows_generation`.
/// What decided is added to `explanation`, if there is one.
///
/// # Errors
/// When the request makes no sense; a request that is denied is no error.
pub async fn check(
    snapshot: &Snapshot,
    metrics: &Metrics,
    request: CheckRequest,
    call: &Call,
    knows_generation: bool,
    explanation: Option<&mut Explanation>,
) -> Result<CheckResponse, RpcStatus> {
    let question = crate::attribute::question(request, &snapshot.table)?;
    answer(
        snapshot,
        metrics,
        question,
        call,
        knows_generation,
        explanation,
    )
    .await
}

/// As [`check`], of attributes that have been read.
///
/// # Errors
/// As [`check`].
pub async fn answer(
    snapshot: &Snapshot,
    metrics: &Metrics,
    question: Question,
    call: &Call,
    knows_generation: bool,
    mut explanation: Option<&mut Explanation>,
) -> Result<CheckResponse, RpcStatus> {
    let Question {
        bag,
        global_words,
        quotas: wanted,
        deduplication_id,
        only_quotas,
    } = question;
    if wanted.len() > MAX_QUOTAS {
        let count = wanted.len();
        return Err(RpcStatus::invalid_argument(format!(
            "{count} quotas are more than {MAX_QUOTAS}"
        )));
    }
    if let Some((name, params)) = wanted.iter().find(|(_, p)| p.amount < 0) {
        let amount = params.amount;
        return Err(RpcStatus::invalid_argument(format!(
            "quota {name}: {amount} is negative"
        )));
    }
    metrics.took(0, bag.ignored());
    let mut check = Check {
        snapshot,
        metrics,
        call,
        bag,
        global_words,
        knows_generation,
    };

    let mut tracker = Tracker::new();
    let denied = preprocess(snapshot, metrics, &mut check.bag, &mut tracker, call).await;
    let after_preprocess = (!wanted.is_empty()).then(|| tracker.clone());
    let mut merged = match denied {
        Err(status) if only_quotas || !wanted.is_empty() || is_needed(snapshot, &check.bag) => {
            Merged::denied(status)
        }
        Ok(()) if only_quotas => Merged::new(Vec::new()),
        told => {
            let explanation = explanation.as_deref_mut();
            let mut merged = check.precondition(&mut tracker, explanation).await?;
            if told.is_err() {
                // What was found out without a generator holds for this request only.
                merged.reuse = Reuse::NEVER;
            }
            merged
        }
    };
    let mut quotas = std::collections::HashMap::new();
    if merged.status.is_ok() {
        for (name, params) in wanted {
            let mut tracker = after_preprocess.clone().unwrap_or_else(Tracker::new);
            let result = check
                .quota(
                    &name,
                    params,
                    &deduplication_id,
                    &mut tracker,
                    &mut merged,
                    explanation.as_deref_mut(),
                )
                .await?;
            quotas.insert(name, result);
        }
    }
    if let Some(explanation) = explanation {
        explanation.conclude(&merged.status, &check.bag, &tracker);
    }
    Ok(CheckResponse {
        precondition: Some(check.encode(merged, &tracker)),
        quotas,
    })
}

/// Where a verdict comes from.
struct Asked<'a, F> {
    /// The rule that asks, and which of those that matched it is.
    rule: &'a Arc<Rule>,
    matched: usize,
    /// Who is asked with what; `None`: it was settled without asking.
    sent: Option<(&'a Action, &'a Sent)>,
    answer: Answer<F>,
}

/// An answer that is to come, or one that was settled without asking.
enum Answer<F> {
    Settled(Verdict),
    Waiting(F),
}

impl Check<'_> {
    async fn precondition(
        &self,
        tracker: &mut Tracker,
        mut explanation: Option<&mut Explanation>,
    ) -> Result<Merged, RpcStatus> {
        let selected = self
            .snapshot
            .check
            .select(&self.bag, tracker)
            .map_err(internal)?;
        let mut asked = Vec::new();
        let mut matched: Vec<&Arc<Rule>> = Vec::new();
        for one in &selected {
            let Some(rule) = one.rule.actions().first() else {
                continue;
            };
            let settled = |verdict: Verdict, sent| Asked {
                rule,
                matched: usize::MAX,
                sent,
                answer: Answer::Settled(verdict),
            };
            if let Some(explanation) = explanation
                .as_deref_mut()
                .filter(|_| one.applies() || one.denies().is_some())
            {
                explanation.applied(rule);
            }
            if let Some(error) = one.denies() {
                self.metrics.match_failed(rule);
                asked.push(settled(match_failed(rule, error), None));
                continue;
            }
            if !one.applies() {
                self.metrics.match_failed(rule);
                continue;
            }
            if rule.refused.is_some() {
                asked.push(settled(refused(rule), None));
                continue;
            }
            matched.push(rule);
            self.metrics.rule_matched(rule, 1);
            for action in &rule.actions {
                let with_output = action.instances(Variety::CheckWithOutput);
                for instance in action.instances(Variety::Check).chain(with_output) {
                    let sent = Some((action, instance));
                    match instance.make(&self.bag, tracker) {
                        Ok(made) => asked.push(Asked {
                            rule,
                            matched: matched.len() - 1,
                            sent,
                            answer: Answer::Waiting(action.handler.check(made, self.call)),
                        }),
                        Err(reason) => {
                            self.metrics.instance_failed(rule);
                            if rule.match_fail_mode == FailMode::Closed {
                                let source = &action.handler.name;
                                let verdict = instance_failed(source, instance, &reason);
                                asked.push(settled(verdict, sent));
                            }
                        }
                    }
                }
            }
        }
        let begun = Instant::now();
        // All at once; the order of the verdicts is that of the rules, whoever answers first.
        let told = join_all(asked.into_iter().map(|asked| async move {
            let Asked {
                rule,
                matched,
                sent,
                answer,
            } = asked;
            let (verdict, output) = match (answer, sent) {
                (Answer::Settled(verdict), _) => (verdict, Found::nothing()),
                (Answer::Waiting(answer), sent) => {
                    let handler = sent.map(|(action, _)| &*action.handler);
                    let answer = answer.await;
                    self.metrics.rule_asked(rule, begun.elapsed());
                    match answer {
                        Ok((result, output)) => {
                            (verdict(handler, rule.adapter_fail_mode, Ok(result)), output)
                        }
                        Err(error) => (
                            verdict(handler, rule.adapter_fail_mode, Err(error)),
                            Found::nothing(),
                        ),
                    }
                }
            };
            (rule, matched, sent, verdict, output)
        }))
        .await;
        let mut verdicts = Vec::with_capacity(told.len());
        let mut outputs: Vec<Outputs> = vec![Outputs::new(); matched.len()];
        for (rule, matched, sent, mut verdict, output) in told {
            if let Some(explanation) = explanation.as_deref_mut() {
                let sent = sent.map(|(action, instance)| (&*action.handler, instance));
                explanation.answered(rule, sent, &verdict);
            }
            if !verdict.status.is_ok() {
                self.metrics.rule_denied(rule);
            }
            if rule.is_dry_run {
                // It counts what it would do, as often as it would be asked.
                self.metrics.tried(&rule.name, verdict.status.code.name());
                verdict.status = Status::ok();
            }
            verdicts.push(verdict);
            if let (Some((action, _)), Some(of_rule)) = (sent, outputs.get_mut(matched))
                && !output.is_empty()
            {
                of_rule.push((Arc::clone(&action.name), output));
            }
        }
        let mut merged = Merged::new(verdicts);
        if merged.status.is_ok() {
            for (rule, outputs) in matched.iter().zip(&outputs) {
                if !rule.is_dry_run {
                    merged.directive.apply(rule, outputs, &self.bag, tracker);
                }
            }
        }
        if let Some(explanation) = explanation {
            let namespace = self.snapshot.check.namespace(&self.bag, tracker);
            let all = self.snapshot.check.rules_for(namespace.map(|n| n.as_str()));
            explanation.others(all.flat_map(|rule| rule.actions()));
        }
        Ok(merged)
    }

    fn encode(&self, merged: Merged, tracker: &Tracker) -> PreconditionResult {
        // "No other key in this map" cannot be said to the caller, so such a verdict is for once.
        let reuse = match (tracker.whole_map(), self.knows_generation) {
            (true, _) => Reuse::NEVER,
            (false, true) => merged.reuse,
            (false, false) => merged.reuse.at_most(Reuse::BRIEFLY.duration),
        };
        PreconditionResult {
            status: Some(encode::status(&merged.status)),
            valid_duration: Some(encode::duration(reuse.duration)),
            valid_use_count: reuse.uses,
            referenced_attributes: Some(tracker.encode(&self.snapshot.table, self.global_words)),
            route_directive: merged.directive.encode(&merged.status),
        }
    }

    /// Takes quota `name`. The first rule that has it decides; when no rule's match holds, nothing limits it.
    async fn quota(
        &self,
        name: &str,
        params: QuotaParams,
        deduplication_id: &str,
        tracker: &mut Tracker,
        merged: &mut Merged,
        mut explanation: Option<&mut Explanation>,
    ) -> Result<QuotaResult, RpcStatus> {
        let mut tell = |rule: Option<&Rule>, handler: &str, granted: i64, status: &Status| {
            if let Some(explanation) = explanation.as_deref_mut() {
                explanation.quotas.push(QuotaTold {
                    quota: name.to_owned(),
                    rule: rule.map_or(String::new(), |r| r.name.to_string()),
                    place: rule.map_or(String::new(), |r| r.place.to_string()),
                    handler: handler.to_owned(),
                    asked: params.amount,
                    granted,
                    message: status.message.clone(),
                });
            }
        };
        let selected = self
            .snapshot
            .quota
            .select(&self.bag, tracker)
            .map_err(internal)?;
        for one in &selected {
            let Some(rule) = one.rule.actions().first() else {
                continue;
            };
            let Some((handler, instance)) = rule.quota(name) else {
                continue;
            };
            if let Some(error) = one.denies() {
                self.metrics.match_failed(rule);
                let status = match_failed(rule, error).status;
                tell(Some(rule), "", 0, &status);
                if rule.is_dry_run {
                    self.metrics.tried(&rule.name, status.code.name());
                    continue;
                }
                merged.fail(&status);
                return Ok(self.granted(0, status, Reuse::NEVER, tracker));
            }
            if !one.applies() {
                self.metrics.match_failed(rule);
                continue;
            }
            let mut made = match (instance.make(&self.bag, tracker), rule.match_fail_mode) {
                (Ok(made), _) => made,
                (Err(reason), mode) => {
                    self.metrics.instance_failed(rule);
                    if mode == FailMode::Open {
                        continue;
                    }
                    let status = instance_failed(&handler.name, instance, &reason).status;
                    tell(Some(rule), &handler.name, 0, &status);
                    if rule.is_dry_run {
                        self.metrics.tried(&rule.name, status.code.name());
                        continue;
                    }
                    merged.fail(&status);
                    return Ok(self.granted(0, status, Reuse::NEVER, tracker));
                }
            };
            if rule.is_dry_run && !made.set_apart(&rule.name) {
                // What an adapter process counts it would count for good: it is not asked.
                self.metrics.tried(&rule.name, Code::Unknown.name());
                continue;
            }
            let args = QuotaArgs {
                dedup_id: match deduplication_id {
                    "" => Arc::from(""),
                    id => Arc::from(format!("{id}{name}")),
                },
                amount: params.amount,
                best_effort: params.best_effort,
            };
            let answer = handler.quota(made, &args, self.call).await;
            let (granted, status) = match &answer {
                Ok(result) => (result.granted, result.status.clone()),
                Err(_) if rule.adapter_fail_mode == FailMode::Open => (params.amount, Status::ok()),
                Err(error) => (0, Status::new(error.code, error.to_string())),
            };
            tell(Some(rule), &handler.name, granted, &status);
            if rule.is_dry_run {
                let code = match granted {
                    0 if status.is_ok() && params.amount > 0 => Code::ResourceExhausted,
                    _ => status.code,
                };
                self.metrics.tried(&rule.name, code.name());
                continue;
            }
            return Ok(match answer {
                Ok(result) => {
                    if let Some(window) = result.window.filter(|_| rule.tells_quota) {
                        merged.tell_quota(window, result.granted > 0);
                    }
                    let reuse = Reuse {
                        duration: result.valid_duration.unwrap_or_default(),
                        uses: 0,
                    };
                    self.granted(result.granted, result.status, reuse, tracker)
                }
                Err(_) if rule.adapter_fail_mode == FailMode::Open => {
                    self.granted(params.amount, Status::ok(), Reuse::NEVER, tracker)
                }
                Err(error) => {
                    let status = Status::new(error.code, format!("{}:{error}", handler.name));
                    merged.fail(&status);
                    self.granted(0, status, Reuse::NEVER, tracker)
                }
            });
        }
        if self.snapshot.has_quota(name, &self.bag, tracker) {
            tell(None, "", params.amount, &Status::ok());
            return Ok(self.granted(params.amount, Status::ok(), Reuse::BRIEFLY, tracker));
        }
        self.metrics.unknown_quota();
        let message = format!("no rule has a quota named {name}");
        let status = Status::new(Code::FailedPrecondition, message);
        tell(None, "", 0, &status);
        Ok(self.granted(0, status, Reuse::NEVER, tracker))
    }

    fn granted(&self, amount: i64, status: Status, reuse: Reuse, tracker: &Tracker) -> QuotaResult {
        let reuse = if tracker.whole_map() {
            Reuse::NEVER
        } else {
            reuse
        };
        QuotaResult {
            valid_duration: Some(encode::duration(reuse.duration)),
            granted_amount: amount,
            referenced_attributes: Some(tracker.encode(&self.snapshot.table, self.global_words)),
            status: Some(encode::status(&status)),
        }
    }
}

/// The rule may have been there to deny this very request.
fn match_failed(rule: &Rule, error: &EvalError) -> Verdict {
    Verdict {
        status: Status::new(Code::PermissionDenied, format!("{}:{error}", rule.name)),
        reuse: Reuse::MOST, // nothing but the attributes decides it
    }
}

/// A rule that is refused, and says that it fails closed. What is wrong with it is for operators, not for callers.
fn refused(rule: &Rule) -> Verdict {
    Verdict {
        status: Status::new(
            Code::PermissionDenied,
            format!("{}:the rule is refused", rule.name),
        ),
        reuse: Reuse::MOST,
    }
}

fn instance_failed(source: &str, instance: &Sent, reason: &str) -> Verdict {
    Verdict {
        status: Status::new(
            Code::PermissionDenied,
            format!("{source}:{}:{reason}", instance.name()),
        ),
        reuse: Reuse::MOST,
    }
}

fn verdict(
    handler: Option<&LiveHandler>,
    fail_mode: FailMode,
    answer: Result<CheckResult, HandlerError>,
) -> Verdict {
    let name = handler.map_or("", |handler| &handler.name);
    match answer {
        Ok(CheckResult {
            mut status,
            valid_duration,
            valid_use_count,
        }) => {
            if !status.is_ok() {
                status.message = format!("{name}:{}", status.message);
            }
            let reuse = Reuse::new(valid_duration, valid_use_count);
            Verdict { status, reuse }
        }
        // Neither outcome of a failure is kept: the handler may be back for the next request.
        Err(_) if fail_mode == FailMode::Open => Verdict {
            status: Status::ok(),
            reuse: Reuse::NEVER,
        },
        Err(error) => {
            // INTERNAL and OK would be let through by existing clients that fail open.
            let code = match error.code {
                Code::Ok | Code::Internal | Code::Unknown => Code::Unavailable,
                code => code,
            };
            let status = Status::new(code, format!("{name}:{error}"));
            Verdict {
                status,
                reuse: Reuse::NEVER,
            }
        }
    }
}

fn internal(error: EvalError) -> RpcStatus {
    RpcStatus::internal(error.to_string())
}
