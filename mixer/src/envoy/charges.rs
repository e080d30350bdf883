//! Quotas that a request is charged: the `QuotaSpec`s of its destination, as Pilot writes them into Envoy's
//! configuration. In JSON: `[{"quota": "requestcount", "charge": 1, "match": [{"request.path": {"prefix": "/a"}}]}]`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use lateen_engine::Bag;
use lateen_protocols::istio::mixer::v1::check_request::QuotaParams;
use regex::Regex;
use serde::Deserialize;

use super::facts::text_of;

/// The context extension that holds them.
pub(super) const EXTENSION: &str = "mixer-quotas";
/// Texts that are kept compiled; above it all are forgotten.
const MAX_COMPILED: usize = 1024;
/// Longest text that is read.
const MAX_BYTES: usize = 64 * 1024;

/// Compiled texts. There are as many as the configuration has bound services.
#[derive(Debug, Default)]
pub(super) struct Compiled(Mutex<HashMap<String, Arc<Charges>>>);

/// What is charged when.
#[derive(Debug)]
pub(super) struct Charges(Vec<Charge>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Charge {
    quota: String,
    #[serde(default = "one")]
    charge: i64,
    /// Any of them; none: every request.
    #[serde(default, rename = "match")]
    matches: Vec<BTreeMap<String, Pattern>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pattern {
    Exact(String),
    Prefix(String),
    #[serde(deserialize_with = "regex")]
    Regex(Regex),
}

fn one() -> i64 {
    1
}

fn regex<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Regex, D::Error> {
    let text = String::deserialize(from)?;
    Regex::new(&format!("^(?:{text})$")).map_err(serde::de::Error::custom)
}

impl Compiled {
    /// The charges that a text says.
    ///
    /// # Errors
    /// It does not say any.
    pub(super) fn get(&self, text: &str) -> Result<Arc<Charges>, String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(charges) = known.get(text) {
            return Ok(Arc::clone(charges));
        }
        if text.len() > MAX_BYTES {
            return Err(format!("longer than {MAX_BYTES} bytes"));
        }
        let charges: Vec<Charge> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let charges = Arc::new(Charges(charges));
        if known.len() >= MAX_COMPILED {
            known.clear();
        }
        known.insert(text.to_owned(), Arc::clone(&charges));
        Ok(charges)
    }
}

impl Charges {
    /// Name and amount of every quota that the request is charged.
    pub(super) fn of(&self, bag: &Bag) -> BTreeMap<String, QuotaParams> {
        let mut all: BTreeMap<String, QuotaParams> = BTreeMap::new();
        for charge in self.0.iter().filter(|charge| charge.applies(bag)) {
            let params = all.entry(charge.quota.clone()).or_default();
            params.amount = params.amount.saturating_add(charge.charge.max(1));
        }
        all
    }
}

impl Charge {
    fn applies(&self, bag: &Bag) -> bool {
        self.matches.is_empty()
            || self.matches.iter().any(|clause| {
                clause.iter().all(|(name, pattern)| {
                    text_of(bag, name).is_some_and(|text| pattern.matches(text))
                })
            })
    }
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lateen_engine::AttributeTable;

    #[test]
    fn clauses_are_and_matches_are_or() {
        let compiled = Compiled::default();
        let text = r#"[{"quota": "q", "charge": 2, "match": [
            {"request.method": {"exact": "GET"}, "request.path": {"regex": "/a.*"}},
            {"request.method": {"exact": "PUT"}}]},
            {"quota": "q"}, {"quota": "p", "match": [{"request.path": {"prefix": "/b"}}]}]"#;
        let charges = compiled.get(text).unwrap();
        for (method, path, want) in [
            ("GET", "/ab", vec![("q", 3)]),
            ("GET", "/b/a", vec![("p", 1), ("q", 1)]),
            ("PUT", "/x", vec![("q", 3)]),
            ("POST", "/a", vec![("q", 1)]),
        ] {
            let mut bag = Bag::new(&AttributeTable::default_vocabulary());
            bag.set_by_name("request.method", method).unwrap();
            bag.set_by_name("request.path", path).unwrap();
            let all = charges.of(&bag);
            let all: Vec<_> = all
                .iter()
                .map(|(name, p)| (name.as_str(), p.amount))
                .collect();
            assert_eq!(all, want, "{method} {path}");
        }
        assert!(
            compiled
                .get(r#"[{"quota": "q", "match": [{"a": {"regex": "("}}]}]"#)
                .is_err()
        );
        assert!(compiled.get("{}").is_err());
    }
}
