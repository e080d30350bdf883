//! Why a check came out as it did, for those who ask: which rules applied, whom they asked, what was answered,
//! and what the request had that was looked at.

use std::collections::BTreeMap;

use lateen_adapter::Status;
use lateen_engine::{Bag, Tracker};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::{
    config::{rule::Rule, sent::Sent},
    handler::LiveHandler,
    merge::Verdict,
};

/// Rules named that did not apply.
const MAX_OTHERS: usize = 50;
/// Longest attribute value that is told whole, in bytes.
const MAX_VALUE_BYTES: usize = 256;
/// Longest explanation, in bytes of JSON: it travels in a header.
const MAX_BYTES: usize = 12 << 10;

/// Why a check came out as it did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Explanation {
    /// The verdict's id.
    pub id: String,
    /// Generation of the configuration that decided.
    pub generation: String,
    /// Name of the status code.
    pub code: String,
    /// What the caller is told.
    pub message: String,
    /// Rules that applied, that failed on the request, or that are refused and stand in its way; in order.
    pub rules: Vec<RuleTold>,
    /// Other rules that requests of this namespace meet, which did not apply; the first fifty.
    pub not_applied: Vec<String>,
    /// The quotas asked for.
    pub quotas: Vec<QuotaTold>,
    /// What was looked at; null for what the request lacks.
    pub attributes: BTreeMap<String, Json>,
}

/// A rule's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleTold {
    /// `NAME.rule.NAMESPACE`.
    pub rule: String,
    /// `FILE:LINE`.
    pub place: String,
    /// Its match.
    #[serde(rename = "match")]
    pub condition: String,
    /// Whether it is only tried.
    pub dry_run: bool,
    /// What it asked, and what was answered. A match that failed has one entry without a handler.
    pub asked: Vec<AskedTold>,
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AskedTold {
    /// `NAME.handler.NAMESPACE`.
    pub handler: String,
    /// Its adapter.
    pub adapter: String,
    /// What it got.
    pub instance: String,
    /// Name of the status code.
    pub code: String,
    /// Why.
    pub message: String,
    /// For how long the answer may be kept, in milliseconds.
    pub valid_ms: u64,
}

/// What became of a quota.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct QuotaTold {
    /// As the request called it.
    pub quota: String,
    /// The rule that decided; empty: none.
    pub rule: String,
    /// `FILE:LINE`.
    pub place: String,
    /// Who was asked.
    pub handler: String,
    /// How much was asked for.
    pub asked: i64,
    /// How much was granted.
    pub granted: i64,
    /// Why.
    pub message: String,
}

impl RuleTold {
    fn of(rule: &Rule) -> Self {
        Self {
            rule: rule.name.to_string(),
            place: rule.place.to_string(),
            condition: rule.condition.as_ref().map_or("", |c| c.text()).to_owned(),
            dry_run: rule.is_dry_run,
            asked: Vec::new(),
        }
    }
}

impl Explanation {
    /// Adds an answer to what `rule` asked.
    pub(crate) fn answered(
        &mut self,
        rule: &Rule,
        sent: Option<(&LiveHandler, &Sent)>,
        verdict: &Verdict,
    ) {
        let asked = AskedTold {
            handler: sent.map_or(String::new(), |(h, _)| h.name.to_string()),
            adapter: sent.map_or("", |(h, _)| h.signature.adapter()).to_owned(),
            instance: sent.map_or(String::new(), |(_, i)| i.name().to_string()),
            code: verdict.status.code.name().to_owned(),
            message: verdict.status.message.clone(),
            valid_ms: u64::try_from(verdict.reuse.duration.as_millis()).unwrap_or(u64::MAX),
        };
        self.applied(rule);
        let told = self.rules.iter_mut().find(|r| *r.rule == *rule.name);
        if let Some(told) = told {
            told.asked.push(asked);
        }
    }

    /// Adds a rule that applied, or failed.
    pub(crate) fn applied(&mut self, rule: &Rule) {
        if !self.rules.iter().any(|r| *r.rule == *rule.name) {
            self.rules.push(RuleTold::of(rule));
        }
    }

    /// Adds the names of rules that did not apply.
    pub(crate) fn others<'r>(&mut self, all: impl Iterator<Item = &'r std::sync::Arc<Rule>>) {
        for rule in all {
            if self.not_applied.len() >= MAX_OTHERS {
                return;
            }
            if !self.rules.iter().any(|r| *r.rule == *rule.name) {
                self.not_applied.push(rule.name.to_string());
            }
        }
    }

    /// Adds the verdict and what it depends on.
    pub(crate) fn conclude(&mut self, status: &Status, bag: &Bag, tracker: &Tracker) {
        self.code = status.code.name().to_owned();
        self.message = status.message.clone();
        for name in tracker.names(bag.table()) {
            let (name, is_absent) = match name.strip_prefix('-') {
                Some(name) => (name, true),
                None => (name.as_str(), false),
            };
            let (attribute, key) = match name.strip_suffix(']').and_then(|n| n.split_once('[')) {
                Some((attribute, key)) => (attribute, Some(key)),
                None => (name, None),
            };
            let found = bag.table().slot(attribute).and_then(|slot| bag.get(slot));
            let value = match (found, key) {
                _ if is_absent => Json::Null,
                (None, _) => Json::Null,
                (Some(value), Some(key)) => {
                    let text = value.as_map().and_then(|map| map.get(key));
                    text.map_or(Json::Null, |text| Json::String(text.to_string()))
                }
                // A map is looked at key by key; all of it would be all headers.
                (Some(value), None) if value.as_map().is_some() => continue,
                (Some(value), None) => value.to_json(),
            };
            self.attributes.insert(name.to_owned(), shortened(value));
        }
    }

    /// As JSON that fits into a header: what is too much is left out, the least important first.
    pub fn to_json(&self) -> String {
        let mut told = self.clone();
        loop {
            let text = serde_json::to_string(&told).unwrap_or_default();
            if text.len() <= MAX_BYTES {
                return text;
            }
            if !told.not_applied.is_empty() {
                told.not_applied.clear();
            } else if told.attributes.pop_last().is_none() && told.rules.pop().is_none() {
                return String::new();
            }
        }
    }
}

fn shortened(value: Json) -> Json {
    match value {
        Json::String(text) if text.len() > MAX_VALUE_BYTES => {
            let end = (0..=MAX_VALUE_BYTES)
                .rev()
                .find(|end| text.is_char_boundary(*end))
                .unwrap_or(0);
            Json::String(format!("{}…", text.get(..end).unwrap_or_default()))
        }
        other => other,
    }
}
