//! Rules and which of them a request meets.
//!
//! A plan knows rules only by namespace, name, match and some action of the caller's; building instances and
//! calling adapters is somebody else's. One plan serves one phase (say, checks): whoever builds plans gives
//! each the actions of its phase.

use std::collections::HashMap;
use std::fmt;

use crate::bag::Bag;
use crate::dictionary::WordMap;
use crate::expression::{EvalError, Expression, Verdict};
use crate::table::{AttributeTable, Slot};
use crate::text::Text;
use crate::tracker::Tracker;
use crate::value::{Value, ValueType};

/// From how many rules on a list gets an index.
const INDEX_FROM: usize = 8;

/// What a rule does to requests for which its match has no value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMatchError {
    /// The request is refused: the rule may have been there to refuse it.
    #[default]
    Deny,
    /// The rule does not apply. For rules whose actions grant or observe nothing that matters.
    Skip,
    /// The rule applies.
    Apply,
}

/// A rule as configured; `A` is what the caller does when the rule applies.
#[derive(Clone, Debug)]
pub struct RuleSpec<A> {
    /// The namespace it is in, which is the namespace it works for, unless that is the default one.
    pub namespace: String,
    /// Its name in the namespace.
    pub name: String,
    /// The condition, a BOOL compiled against the plan's table; `None` means always.
    pub condition: Option<Expression>,
    /// Rules of a higher priority come first; 0 is usual.
    pub priority: i32,
    /// What to do when the condition fails.
    pub on_error: OnMatchError,
    /// What to do when it holds.
    pub actions: Vec<A>,
}

/// A rule of a plan.
#[derive(Debug)]
pub struct Rule<A> {
    namespace: Text,
    name: Text,
    priority: i32,
    on_error: OnMatchError,
    condition: Option<Expression>,
    actions: Vec<A>,
}

impl<A> Rule<A> {
    /// Namespace of the rule.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Name of the rule.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the caller does when the rule applies.
    pub fn actions(&self) -> &[A] {
        &self.actions
    }

    /// The condition; `None` means always.
    pub fn condition(&self) -> Option<&Expression> {
        self.condition.as_ref()
    }

    /// What the rule does when its condition fails.
    pub fn on_error(&self) -> OnMatchError {
        self.on_error
    }

    /// Whether the rule can apply, or fail, given the attributes that are known. [`Verdict::False`] means that
    /// it never does either.
    pub fn partial(&self, known: &impl Fn(&str) -> Option<Value>) -> Verdict {
        self.condition
            .as_ref()
            .map_or(Verdict::True, |c| c.partial(known))
    }

    /// `None`: does not apply.
    fn decide(&self, bag: &Bag, tracker: &mut Tracker) -> Option<Decision> {
        let Some(condition) = &self.condition else {
            return Some(Decision::Applies);
        };
        // Most rules are for some other service: one comparison tells.
        for (slot, want) in condition.equalities() {
            if let Some(got) = tracker.look_up(bag, *slot)
                && got.value_type() == want.value_type()
                && got != want
            {
                return None;
            }
        }
        match condition.holds(bag, tracker) {
            Ok(true) => Some(Decision::Applies),
            Ok(false) => None,
            Err(error) => Some(Decision::Failed(error, self.on_error)),
        }
    }
}

/// What a rule's match says of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It holds.
    Applies,
    /// It has no value; and what the rule wants done then.
    Failed(EvalError, OnMatchError),
}

/// A rule that has something to say about a request.
#[derive(Debug)]
pub struct Selected<'p, A> {
    /// The rule.
    pub rule: &'p Rule<A>,
    /// What its match said.
    pub decision: Decision,
}

impl<A> Selected<'_, A> {
    /// Whether the rule's actions are to be done.
    pub fn applies(&self) -> bool {
        match &self.decision {
            Decision::Applies => true,
            Decision::Failed(_, on_error) => *on_error == OnMatchError::Apply,
        }
    }

    /// The failure for which the request is to be refused.
    pub fn denies(&self) -> Option<&EvalError> {
        match &self.decision {
            Decision::Failed(error, OnMatchError::Deny) => Some(error),
            Decision::Failed(_, OnMatchError::Skip | OnMatchError::Apply) | Decision::Applies => {
                None
            }
        }
    }
}

/// The rules of a mesh, ready to be matched. Order: priority, highest first; then the default namespace before
/// the request's; then name.
pub struct Plan<A> {
    table: AttributeTable,
    rules: Vec<Rule<A>>,
    /// Of the default namespace alone: for namespaces without rules and requests without a namespace.
    everywhere: List,
    by_namespace: WordMap<Text, List>,
    scope: Scope,
}

/// Positions in `rules`, ascending, and a way to skip most of them.
#[derive(Debug)]
struct List {
    rules: Vec<usize>,
    index: Option<Index>,
}

/// Rules by the value they want a STRING attribute to have.
#[derive(Debug)]
struct Index {
    slot: Slot,
    by_value: WordMap<Text, Vec<usize>>,
    /// Those that want no value of it.
    others: Vec<usize>,
}

/// Attributes that say which namespace a request belongs to.
#[derive(Debug)]
struct Scope {
    reporter_kind: Option<Slot>,
    source_namespace: Option<Slot>,
    destination_namespace: Option<Slot>,
}

impl<A> Plan<A> {
    /// Builds a plan. Conditions of another table than `table` fail on every request.
    pub fn build(
        specs: impl IntoIterator<Item = RuleSpec<A>>,
        table: &AttributeTable,
        default_namespace: &str,
    ) -> Plan<A> {
        let mut rules: Vec<Rule<A>> = specs
            .into_iter()
            .map(|spec| Rule {
                namespace: spec.namespace.into(),
                name: spec.name.into(),
                priority: spec.priority,
                on_error: spec.on_error,
                condition: spec.condition,
                actions: spec.actions,
            })
            .collect();
        rules.sort_by(|a, b| {
            let key = |r: &Rule<A>| {
                (
                    std::cmp::Reverse(r.priority),
                    r.namespace != default_namespace,
                )
            };
            key(a)
                .cmp(&key(b))
                .then_with(|| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)))
        });
        let mut everywhere = Vec::new();
        let mut own: HashMap<Text, Vec<usize>> = HashMap::new();
        for (at, rule) in rules.iter().enumerate() {
            if rule.namespace == default_namespace {
                everywhere.push(at);
            } else {
                own.entry(rule.namespace.clone()).or_default().push(at);
            }
        }
        let by_namespace = own
            .into_iter()
            .map(|(namespace, own)| {
                let all = merge(&everywhere, &own).collect();
                (namespace, List::new(all, &rules, table))
            })
            .collect();
        let everywhere = List::new(everywhere, &rules, table);
        let scope = Scope {
            reporter_kind: table.slot("context.reporter.kind"),
            source_namespace: table.slot("source.namespace"),
            destination_namespace: table.slot("destination.namespace"),
        };
        Plan {
            table: table.clone(),
            rules,
            everywhere,
            by_namespace,
            scope,
        }
    }

    /// Every rule, in order.
    pub fn rules(&self) -> &[Rule<A>] {
        &self.rules
    }

    /// Rules that requests of a namespace meet, in order; `None` for requests that have none.
    pub fn rules_for<'p>(
        &'p self,
        namespace: Option<&str>,
    ) -> impl Iterator<Item = &'p Rule<A>> + use<'p, A> {
        self.list(namespace)
            .rules
            .iter()
            .filter_map(|at| self.rules.get(*at))
    }

    fn list(&self, namespace: Option<&str>) -> &List {
        namespace
            .and_then(|n| self.by_namespace.get(n))
            .unwrap_or(&self.everywhere)
    }

    /// The namespace a request belongs to: the source's when a client's proxy reports (`outbound`), else the
    /// destination's.
    pub fn namespace<'b>(&self, bag: &'b Bag, tracker: &mut Tracker) -> Option<&'b Text> {
        let mut read = |slot: Option<Slot>| match tracker.look_up(bag, slot?)? {
            Value::String(text) => Some(text),
            _ => None,
        };
        let outbound = read(self.scope.reporter_kind).is_some_and(|kind| kind == "outbound");
        read(if outbound {
            self.scope.source_namespace
        } else {
            self.scope.destination_namespace
        })
    }

    /// Rules that apply to a request, or that failed on it, in order.
    ///
    /// # Errors
    /// The bag is of another table than the plan.
    pub fn select<'p>(
        &'p self,
        bag: &Bag,
        tracker: &mut Tracker,
    ) -> Result<Vec<Selected<'p, A>>, EvalError> {
        if !self.table.same(bag.table()) {
            return Err(EvalError::ForeignBag);
        }
        let list = self.list(self.namespace(bag, tracker).map(Text::as_str));
        let (indexed, others) = list.candidates(bag, tracker);
        let mut selected = Vec::new();
        for at in merge(indexed, others) {
            let Some(rule) = self.rules.get(at) else {
                continue;
            };
            if let Some(decision) = rule.decide(bag, tracker) {
                selected.push(Selected { rule, decision });
            }
        }
        Ok(selected)
    }
}

impl<A> fmt::Debug for Plan<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self
            .rules
            .iter()
            .map(|r| format!("{}/{}", r.namespace, r.name));
        f.debug_list().entries(rules).finish()
    }
}

impl List {
    fn new<A>(positions: Vec<usize>, rules: &[Rule<A>], table: &AttributeTable) -> List {
        let wanted = |at: usize| -> &[(Slot, Value)] {
            rules
                .get(at)
                .and_then(|r| r.condition.as_ref())
                .map_or(&[], |c| c.equalities())
        };
        let mut popular: HashMap<Slot, usize> = HashMap::new();
        for (slot, value) in positions.iter().flat_map(|at| wanted(*at)) {
            if matches!(value, Value::String(_)) && table.type_of(*slot) == ValueType::String {
                *popular.entry(*slot).or_default() += 1;
            }
        }
        // Equally popular: the first in the table, so that the same rules make the same plan.
        let best = popular
            .into_iter()
            .max_by_key(|(slot, count)| (*count, std::cmp::Reverse(*slot)));
        let index = best
            .filter(|(_, count)| *count >= INDEX_FROM)
            .map(|(slot, _)| {
                let mut index = Index {
                    slot,
                    by_value: WordMap::default(),
                    others: Vec::new(),
                };
                for at in &positions {
                    match wanted(*at).iter().find(|(s, _)| *s == slot) {
                        Some((_, Value::String(text))) => {
                            index.by_value.entry(text.clone()).or_default().push(*at);
                        }
                        _ => index.others.push(*at),
                    }
                }
                index
            });
        List {
            rules: positions,
            index,
        }
    }

    /// Two ascending lists that hold every rule which can apply or fail.
    fn candidates(&self, bag: &Bag, tracker: &mut Tracker) -> (&[usize], &[usize]) {
        let Some(index) = &self.index else {
            return (&self.rules, &[]);
        };
        match tracker.look_up(bag, index.slot) {
            Some(Value::String(text)) => (
                index.by_value.get(text).map_or(&[], Vec::as_slice),
                &index.others,
            ),
            _ => (&self.rules, &[]), // absent or malformed: each rule says what that means
        }
    }
}

/// Merges two ascending lists.
fn merge<'a>(mut a: &'a [usize], mut b: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
    std::iter::from_fn(move || {
        let from = match (a.first(), b.first()) {
            (Some(x), Some(y)) if x < y => &mut a,
            (Some(_), None) => &mut a,
            _ => &mut b,
        };
        let (first, rest) = from.split_first()?;
        *from = rest;
        Some(*first)
    })
}

#[cfg(test)]
mod tests;
