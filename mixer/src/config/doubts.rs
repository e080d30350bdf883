//! What works but may not be what its author meant.

use std::sync::Arc;

use lateen_adapter::{ValueType, Variety};
use lateen_config::Severity;
use lateen_engine::{AttributeTable, Bag, EvalError, Tracker, Value};

use super::{
    object::{Problem, Source},
    rule::{FailMode, Rule},
};

/// Rules that deny requests which lack an attribute, whether their author meant it or not.
pub fn absent_attributes<'s>(
    table: &AttributeTable,
    rules: &[Arc<Rule>],
    written: impl Fn(&str) -> Option<&'s Source>,
) -> Vec<Problem> {
    // A request as poor as can be: what every proxy sends, and what generators always add.
    let mut bag = Bag::new(table);
    let always = rules
        .iter()
        .filter(|r| r.condition.is_none())
        .flat_map(|r| &r.actions);
    let generated = always
        .flat_map(|a| a.instances(Variety::AttributeGenerator))
        .flat_map(|i| i.generated());
    let sent = [
        "context.protocol",
        "context.reporter.kind",
        "request.headers",
    ]
    .into_iter()
    .filter_map(|name| table.slot(name));
    for slot in generated.chain(sent).collect::<Vec<_>>() {
        let value = match table.type_of(slot) {
            ValueType::StringMap => Value::StringMap(lateen_engine::StringMap::default()),
            ValueType::IpAddress => Value::Ip([0, 0, 0, 0].into()),
            ValueType::Int64 => Value::Int64(0),
            ty => match Value::from_text(ty, "".into()) {
                Some(value) => value,
                None => continue,
            },
        };
        bag.set(slot, value);
    }
    let mut problems = Vec::new();
    for rule in rules {
        if !rule.checks() && !rule.has(Variety::Quota) {
            continue;
        }
        let Some(condition) = &rule.condition else {
            continue;
        };
        if let Err(EvalError::Absent(attribute)) = condition.holds(&bag, &mut Tracker::off()) {
            let reason = format!(
                "the match cannot be told for requests without {attribute}, which this rule treats by its \
                 fail mode ({}); give a default with |",
                match rule.match_fail_mode {
                    FailMode::Open => "open: it is skipped",
                    FailMode::Closed => "closed: they are denied",
                }
            );
            let source = written(&rule.name);
            problems.extend(source.map(|s| s.problem(Severity::Warning, "match", reason)));
        }
    }
    problems
}

/// Quotas that proxies ask for and no rule has: such requests are denied. Where there are rules it is a mistake in
/// a name; where there are none, they may be yet to come.
pub fn unknown_quotas(wanted: Vec<(String, Source)>, rules: &[Arc<Rule>]) -> Vec<Problem> {
    let is_known = |name: &str| {
        rules
            .iter()
            .flat_map(|r| &r.actions)
            .flat_map(|a| a.instances(Variety::Quota))
            .any(|i| i.is_called(name))
    };
    let severity = if rules.is_empty() {
        Severity::Warning
    } else {
        Severity::Error
    };
    wanted
        .into_iter()
        .filter(|(name, _)| !is_known(name))
        .map(|(name, source)| {
            source.problem(
                severity,
                "",
                format!("no rule sends a quota instance {name} to a handler; requests charged to it are denied"),
            )
        })
        .collect()
}
