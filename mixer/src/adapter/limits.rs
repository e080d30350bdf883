//! What the two quota adapters share: limits with overrides, and the names of counters.

use std::{collections::HashMap, fmt::Write as _};

use lateen_adapter::{
    InstanceType,
    instance::{QuotaInstance, Values},
    value,
};

/// Whether `dimensions` have all the values that an override asks for.
pub(super) fn is_met(wanted: &HashMap<String, String>, dimensions: &Values) -> bool {
    wanted.iter().all(|(name, want)| {
        dimensions
            .iter()
            .any(|(n, v)| **n == **name && *value::text(v) == **want)
    })
}

/// Names a counter: the instance and its dimensions. Lengths keep `a=b` apart from `a` and `=b`.
pub(super) fn key(instance: &QuotaInstance) -> String {
    let mut key = String::with_capacity(64);
    key.push_str(&instance.name);
    for (name, value) in &instance.dimensions {
        let text = value::text(value);
        let _infallible = write!(key, "\0{name}\0{}\0{text}", text.len());
    }
    key
}

/// A limit as far as it can be checked without knowing the adapter.
pub(super) struct Written<'a> {
    pub(super) name: &'a str,
    pub(super) max_amount: i64,
    /// Amounts of the overrides.
    pub(super) overrides: Vec<i64>,
}

/// What is wrong with `limits` for `instances`.
pub(super) fn problems(limits: &[Written<'_>], instances: &[InstanceType]) -> Vec<String> {
    let mut problems = Vec::new();
    for (i, limit) in limits.iter().enumerate() {
        let name = limit.name;
        if limits.iter().take(i).any(|l| l.name == name) {
            problems.push(format!("quotas: {name} is limited twice"));
        }
        let amounts = limit.overrides.iter().copied();
        for amount in amounts.chain([limit.max_amount]) {
            if amount < 0 {
                problems.push(format!("quotas: {name}: maxAmount {amount} is negative"));
            }
        }
    }
    for instance in instances {
        if limits.iter().all(|l| *l.name != *instance.name) {
            problems.push(format!(
                "quotas: instance {} is sent here but has no limit; limits are named by the \
                 instance's full name",
                instance.name
            ));
        }
    }
    problems
}
