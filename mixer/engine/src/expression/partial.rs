//! What can be said about a condition when only some attributes are known.

use super::program::Node;
use crate::bag::Bag;
use crate::table::Slot;
use crate::tracker::Tracker;

/// What a match is, given the attributes that are known already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds, whatever the other attributes are.
    True,
    /// It does not hold, and does not fail either, whatever the other attributes are.
    False,
    /// It depends, or may fail.
    Unknown,
}

/// The outcomes that are possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcomes {
    pub(super) yes: bool,
    pub(super) no: bool,
    pub(super) failure: bool,
}

impl Outcomes {
    pub(super) const ALL: Outcomes = Outcomes {
        yes: true,
        no: true,
        failure: true,
    };
    pub(super) const YES: Outcomes = Outcomes {
        yes: true,
        no: false,
        failure: false,
    };
    pub(super) const NO: Outcomes = Outcomes {
        yes: false,
        no: true,
        failure: false,
    };
    pub(super) const FAILURE: Outcomes = Outcomes {
        yes: false,
        no: false,
        failure: true,
    };

    pub(super) fn verdict(self) -> Verdict {
        match self {
            Outcomes::YES => Verdict::True,
            Outcomes::NO => Verdict::False,
            _ => Verdict::Unknown,
        }
    }

    /// Outcomes of left then, unless it decided, right; `decides` is what decides.
    fn then(self, right: Outcomes, decides: bool) -> Outcomes {
        let goes_on = if decides { self.no } else { self.yes };
        let both = |left: bool, right: bool, deciding: bool| {
            if deciding {
                left || (goes_on && right)
            } else {
                goes_on && right
            }
        };
        Outcomes {
            yes: both(self.yes, right.yes, decides),
            no: both(self.no, right.no, !decides),
            failure: self.failure || (goes_on && right.failure),
        }
    }
}

/// Possible outcomes of `holds`: of a top-level conjunction one operand that is surely false decides.
pub(super) fn holds(node: &Node, known: &Bag, is_unknown: &impl Fn(Slot) -> bool) -> Outcomes {
    let Node::And(nodes) = node else {
        return outcomes(node, known, is_unknown);
    };
    let mut sum = Outcomes::YES;
    for node in nodes {
        let one = outcomes(node, known, is_unknown);
        if one == Outcomes::NO {
            return Outcomes::NO;
        }
        sum = Outcomes {
            yes: sum.yes && one.yes,
            no: sum.no || one.no,
            failure: sum.failure || one.failure,
        };
    }
    sum
}

fn outcomes(node: &Node, known: &Bag, is_unknown: &impl Fn(Slot) -> bool) -> Outcomes {
    if !node.reads(is_unknown) {
        return match node.test(known, &mut Tracker::off()) {
            Ok(true) => Outcomes::YES,
            Ok(false) => Outcomes::NO,
            Err(_) => Outcomes::FAILURE,
        };
    }
    let chain = |nodes: &[Node], start: Outcomes, decides: bool| {
        nodes.iter().fold(start, |sum, node| {
            sum.then(outcomes(node, known, is_unknown), decides)
        })
    };
    match node {
        Node::And(nodes) => chain(nodes, Outcomes::YES, false),
        Node::Or(nodes) => chain(nodes, Outcomes::NO, true),
        Node::Conditional(operands) => {
            let [condition, yes, no] = &**operands;
            let condition = outcomes(condition, known, is_unknown);
            let yes = outcomes(yes, known, is_unknown);
            let no = outcomes(no, known, is_unknown);
            let either = |from_yes: bool, from_no: bool| {
                (condition.yes && from_yes) || (condition.no && from_no)
            };
            Outcomes {
                yes: either(yes.yes, no.yes),
                no: either(yes.no, no.no),
                failure: condition.failure || either(yes.failure, no.failure),
            }
        }
        _ => Outcomes::ALL,
    }
}
