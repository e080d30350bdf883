//! Many verdicts into one.

use std::{sync::Arc, time::Duration};

use lateen_adapter::{QuotaWindow, Status};
use lateen_engine::{Bag, Tracker};
use lateen_protocols::istio::mixer::v1::{
    HeaderOperation, RouteDirective, header_operation::Operation as WireOperation,
};

use crate::{
    config::rule::{self, Operation, Rule},
    instance::Found,
};

/// How far a verdict may be reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// For so long.
    pub duration: Duration,
    /// So often; negative: without limit.
    pub uses: i32,
}

impl Reuse {
    /// When no adapter had a say: only a configuration change can change the verdict, so callers who learn of those
    /// need not ask again about such requests. An hour, lest a mistake about that last for ever.
    pub const MOST: Self = Self {
        duration: Duration::from_secs(3600),
        uses: -1,
    };
    /// For callers who do not learn of configuration changes. docs/adr/0003-check-cache-generation.md
    pub const BRIEFLY: Self = Self {
        duration: Duration::from_secs(1),
        uses: 10_000,
    };
    /// For this request alone.
    pub const NEVER: Self = Self {
        duration: Duration::ZERO,
        uses: 0,
    };

    /// What an adapter said; what it did not say is nothing.
    pub fn new(duration: Option<Duration>, uses: Option<i32>) -> Self {
        Self {
            duration: duration.unwrap_or_default(),
            uses: uses.unwrap_or_default(),
        }
    }

    /// The shorter and the fewer of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let uses = match (self.uses, other.uses) {
            (a, b) if a < 0 => b,
            (a, b) if b < 0 => a,
            (a, b) => a.min(b),
        };
        let duration = self.duration.min(other.duration);
        if duration.is_zero() || uses == 0 {
            Self::NEVER
        } else {
            Self { duration, uses }
        }
    }

    /// Not longer than `limit`.
    #[must_use]
    pub fn at_most(self, limit: Duration) -> Self {
        Self {
            duration: self.duration.min(limit),
            ..self
        }
    }
}

/// One rule's opinion.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Of the request.
    pub status: Status,
    /// How far it holds.
    pub reuse: Reuse,
}

/// The answer to a check.
#[derive(Debug)]
pub struct Merged {
    /// OK, or the first verdict that is not, with the messages of all that are not.
    pub status: Status,
    /// The least of all.
    pub reuse: Reuse,
    /// What to do to the request.
    pub directive: Directive,
}

impl Merged {
    /// Of verdicts in the order in which they count.
    pub fn new(verdicts: Vec<Verdict>) -> Self {
        let mut status = Status::ok();
        let mut reuse: Option<Reuse> = None;
        for verdict in verdicts {
            reuse = Some(reuse.map_or(verdict.reuse, |r| r.and(verdict.reuse)));
            if verdict.status.is_ok() {
                continue;
            }
            if status.is_ok() {
                status = verdict.status;
            } else {
                status.message.push_str(", ");
                status.message.push_str(&verdict.status.message);
            }
        }
        let reuse = reuse.unwrap_or(Reuse::MOST);
        Self {
            status,
            reuse: reuse.and(reuse),
            directive: Directive::default(),
        }
    }

    /// A quota could not be asked for: the request is refused for that reason, this once. Nothing granted alone would
    /// tell the caller that the quota is exhausted.
    pub fn fail(&mut self, status: &Status) {
        self.reuse = Reuse::NEVER;
        if self.status.is_ok() {
            self.status = status.clone();
        }
    }

    /// Has the caller told how its quota stands. With several quotas the one with least left counts.
    /// The next request has other numbers, so this verdict is for once.
    pub fn tell_quota(&mut self, window: QuotaWindow, is_granted: bool) {
        self.reuse = Reuse::NEVER;
        let told = &mut self.directive.quota;
        if told.is_none_or(|(t, _)| window.remaining < t.remaining) {
            *told = Some((window, is_granted));
        }
    }

    /// A request that got no further.
    pub fn denied(status: Status) -> Self {
        Self {
            status,
            reuse: Reuse::NEVER,
            directive: Directive::default(),
        }
    }
}

/// What the actions of a rule found out, by their names.
pub type Outputs = Vec<(Arc<str>, Found)>;

/// Changes to the headers, of all rules that matched.
#[derive(Debug, Default)]
pub struct Directive {
    request: Vec<HeaderOperation>,
    response: Vec<HeaderOperation>,
    /// How a quota stands, and whether the request got its part.
    quota: Option<(QuotaWindow, bool)>,
}

impl Directive {
    /// Adds the operations of `rule`, whose actions found `outputs`. One whose value is empty or cannot be told is left out.
    pub fn apply(&mut self, rule: &Rule, outputs: &Outputs, bag: &Bag, tracker: &mut Tracker) {
        let (request, response) = (&mut self.request, &mut self.response);
        evaluate(&rule.request_headers, outputs, bag, tracker, request);
        evaluate(&rule.response_headers, outputs, bag, tracker, response);
    }

    /// As the wire has it; `None` when there is nothing to do.
    pub fn encode(self, status: &Status) -> Option<RouteDirective> {
        let mut directive = RouteDirective {
            request_header_operations: self.request,
            response_header_operations: self.response,
            direct_response_code: 0,
            direct_response_body: String::new(),
        };
        if let Some(direct) = status.direct_response.as_ref().filter(|_| !status.is_ok()) {
            directive.direct_response_code = direct.code;
            directive.direct_response_body = direct.body.clone();
            for (name, value) in &direct.headers {
                let operation = if name.eq_ignore_ascii_case("set-cookie") {
                    WireOperation::Append
                } else {
                    WireOperation::Replace
                };
                directive.response_header_operations.push(HeaderOperation {
                    name: name.clone(),
                    value: value.clone(),
                    operation: operation.into(),
                });
            }
        }
        if let Some((window, is_granted)) = self.quota {
            let fields = &mut directive.response_header_operations;
            fields.extend(rate_limit_fields(window, is_granted));
        }
        (directive != RouteDirective::default()).then_some(directive)
    }
}

/// `RateLimit-Limit`, `-Remaining` and `-Reset` (draft-ietf-httpapi-ratelimit-headers-06); for a request that
/// got nothing `Retry-After` (RFC 9110 §10.2.3) too.
fn rate_limit_fields(
    window: QuotaWindow,
    is_granted: bool,
) -> impl Iterator<Item = HeaderOperation> {
    // Whole seconds, rounded up: who waits so long finds something.
    let reset = window.reset.as_millis().div_ceil(1000).to_string();
    let retry = (!is_granted && !window.reset.is_zero()).then(|| ("retry-after", reset.clone()));
    [
        ("ratelimit-limit", window.limit.to_string()),
        ("ratelimit-remaining", window.remaining.to_string()),
        ("ratelimit-reset", reset),
    ]
    .into_iter()
    .chain(retry)
    .map(|(name, value)| HeaderOperation {
        name: name.to_owned(),
        value,
        operation: WireOperation::Replace.into(),
    })
}

fn evaluate(
    operations: &[rule::HeaderOperation],
    outputs: &Outputs,
    bag: &Bag,
    tracker: &mut Tracker,
    out: &mut Vec<HeaderOperation>,
) {
    for rule::HeaderOperation {
        name,
        values,
        operation,
    } in operations
    {
        let wire = match operation {
            Operation::Replace => WireOperation::Replace,
            Operation::Remove => WireOperation::Remove,
            Operation::Append => WireOperation::Append,
        };
        let operation = |value: String, wire: WireOperation| HeaderOperation {
            name: name.clone(),
            value,
            operation: wire.into(),
        };
        if wire == WireOperation::Remove {
            out.push(operation(String::new(), wire));
            continue;
        }
        let mut wire = wire;
        for expression in values {
            let Some(value) = expression.evaluate(bag, outputs, tracker) else {
                continue;
            };
            let text = value.as_str().unwrap_or_default();
            if text.is_empty() || text.contains(['\r', '\n', '\0']) {
                continue;
            }
            out.push(operation(text.to_owned(), wire));
            wire = WireOperation::Append; // the second value must not replace the first
        }
    }
}

#[cfg(test)]
mod tests {
    use lateen_adapter::Code;

    use super::*;

    fn verdict(code: Code, message: &str, seconds: u64, uses: i32) -> Verdict {
        Verdict {
            status: Status::new(code, message),
            reuse: Reuse {
                duration: Duration::from_secs(seconds),
                uses,
            },
        }
    }

    #[test]
    fn the_first_denial_decides_and_all_are_told() {
        let merged = Merged::new(vec![
            verdict(Code::Ok, "", 10, 100),
            verdict(Code::PermissionDenied, "a:no", 5, 1000),
            verdict(Code::ResourceExhausted, "b:never", 60, -1),
        ]);
        assert_eq!(
            merged.status,
            Status::new(Code::PermissionDenied, "a:no, b:never")
        );
        assert_eq!(
            merged.reuse,
            Reuse {
                duration: Duration::from_secs(5),
                uses: 100
            }
        );
    }

    #[test]
    fn silence_is_not_consent_to_caching() {
        assert_eq!(Merged::new(Vec::new()).reuse, Reuse::MOST);
        let silent = Verdict {
            status: Status::ok(),
            reuse: Reuse::new(None, None),
        };
        assert_eq!(Merged::new(vec![silent]).reuse, Reuse::NEVER);
        let half = Verdict {
            status: Status::ok(),
            reuse: Reuse::new(Some(Duration::from_secs(5)), None),
        };
        assert_eq!(Merged::new(vec![half]).reuse, Reuse::NEVER);
    }

    #[test]
    fn unlimited_uses_yield_to_a_limit() {
        for (a, b, want) in [(-1, -1, -1), (-1, 5, 5), (5, -1, 5), (7, 5, 5)] {
            let reuse = |uses| Reuse {
                duration: Duration::from_secs(1),
                uses,
            };
            assert_eq!(reuse(a).and(reuse(b)).uses, want);
        }
    }

    #[test]
    fn answers_are_cut_for_those_who_do_not_know_generations() {
        let long = Reuse {
            duration: Duration::from_secs(300),
            uses: 9,
        };
        let brief = long.at_most(Reuse::BRIEFLY.duration);
        assert_eq!(
            brief,
            Reuse {
                duration: Duration::from_secs(1),
                uses: 9
            }
        );
    }
}
