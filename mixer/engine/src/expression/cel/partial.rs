//! What can be said about a CEL condition when only some attributes are known.

use super::evaluate::Env;
use super::program::Node;
use crate::bag::Bag;
use crate::expression::partial::Outcomes;
use crate::table::Slot;
use crate::tracker::Tracker;

/// Possible outcomes of a condition.
pub(super) fn holds(node: &Node, known: &Bag, is_unknown: &impl Fn(Slot) -> bool) -> Outcomes {
    if !node.reads(is_unknown) {
        return match Env::new(known, &mut Tracker::off()).test(node) {
            Ok(true) => Outcomes::YES,
            Ok(false) => Outcomes::NO,
            Err(_) => Outcomes::FAILURE,
        };
    }
    // Operands in any order: one that surely decides does so whatever the others are.
    let chain = |nodes: &[Node], deciding: Outcomes| {
        let mut sum = Outcomes {
            yes: false,
            no: false,
            failure: false,
        };
        let is_or = deciding == Outcomes::YES;
        let mut all_go_on = true;
        for node in nodes {
            let one = holds(node, known, is_unknown);
            if one == deciding {
                return deciding;
            }
            sum.failure |= one.failure;
            if is_or {
                sum.yes |= one.yes;
                all_go_on &= one.no;
            } else {
                sum.no |= one.no;
                all_go_on &= one.yes;
            }
        }
        if is_or {
            sum.no = all_go_on;
        } else {
            sum.yes = all_go_on;
        }
        sum
    };
    match node {
        Node::And(nodes) => chain(nodes, Outcomes::NO),
        Node::Or(nodes) => chain(nodes, Outcomes::YES),
        _ => Outcomes::ALL,
    }
}
