//! Which quotas a request is charged: the compiled `QuotaSpec`s of its destination.

use lateen_protocols::istio::mixer::v1::config::client::{
    QuotaSpec, StringMatch, string_match::MatchType,
};
use regex::bytes::Regex;

use super::attributes::{Attributes, Key, Value};
use crate::config_error::ConfigError;

/// The rules of all quota specs of one destination.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    /// Any of them; none: every request.
    matches: Vec<Vec<(Key, Pattern)>>,
    charges: Vec<(String, i64)>,
}

#[derive(Debug)]
enum Pattern {
    Exact(Vec<u8>),
    Prefix(Vec<u8>),
    Regex(Regex),
}

impl Pattern {
    fn compile(pattern: &StringMatch) -> Result<Pattern, ConfigError> {
        match pattern.match_type.as_ref() {
            Some(MatchType::Exact(text)) => Ok(Pattern::Exact(text.clone().into_bytes())),
            Some(MatchType::Prefix(text)) => Ok(Pattern::Prefix(text.clone().into_bytes())),
            Some(MatchType::Regex(text)) => Regex::new(&format!("^(?:{text})$"))
                .map(Pattern::Regex)
                .map_err(|error| ConfigError::new("regex", error.to_string())),
            None => Err(ConfigError::new("clause", "no match type is given")),
        }
    }

    fn matches(&self, text: &[u8]) -> bool {
        match self {
            Pattern::Exact(exact) => text == exact.as_slice(),
            Pattern::Prefix(prefix) => text.starts_with(prefix),
            Pattern::Regex(regex) => regex.is_match(text),
        }
    }
}

impl Quotas {
    pub(super) fn compile(specs: &[QuotaSpec]) -> Result<Quotas, ConfigError> {
        let mut rules = Vec::new();
        for rule in specs.iter().flat_map(|spec| &spec.rules) {
            let mut matches = Vec::with_capacity(rule.r#match.len());
            for clause in &rule.r#match {
                let mut all = Vec::with_capacity(clause.clause.len());
                for (name, pattern) in &clause.clause {
                    let key = Key::of(name)
                        .ok_or_else(|| ConfigError::new(name.as_str(), "too many attributes"))?;
                    all.push((
                        key,
                        Pattern::compile(pattern).map_err(|error| error.within(name))?,
                    ));
                }
                matches.push(all);
            }
            let charges = rule
                .quotas
                .iter()
                .map(|quota| (quota.quota.clone(), quota.charge.max(1)))
                .collect();
            rules.push(Rule { matches, charges });
        }
        Ok(Quotas { rules })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Name and amount of every quota that the request is charged.
    pub(super) fn of(&self, attributes: &Attributes) -> Vec<(&str, i64)> {
        let mut all: Vec<(&str, i64)> = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.applies(attributes)) {
            for (name, charge) in &rule.charges {
                match all.iter_mut().find(|(known, _)| known == name) {
                    Some((_, sum)) => *sum = sum.saturating_add(*charge),
                    None => all.push((name, *charge)),
                }
            }
        }
        all
    }
}

impl Rule {
    fn applies(&self, attributes: &Attributes) -> bool {
        self.matches.is_empty()
            || self.matches.iter().any(|clause| {
                clause.iter().all(|(key, pattern)| {
                    matches!(attributes.get(*key), Some(Value::Text(text)) if pattern.matches(text))
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::attributes::KEYS, *};
    use lateen_protocols::istio::mixer::v1::config::client::{AttributeMatch, Quota, QuotaRule};

    #[test]
    fn clauses_are_and_matches_are_or() {
        let exact = |text: &str| StringMatch {
            match_type: Some(MatchType::Exact(text.into())),
        };
        let regex = |text: &str| StringMatch {
            match_type: Some(MatchType::Regex(text.into())),
        };
        let clause = |all: &[(&str, StringMatch)]| AttributeMatch {
            clause: all
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone()))
                .collect(),
        };
        let spec = QuotaSpec {
            rules: vec![QuotaRule {
                r#match: vec![
                    clause(&[
                        ("request.method", exact("GET")),
                        ("request.path", regex("/a.*")),
                    ]),
                    clause(&[("request.method", exact("PUT"))]),
                ],
                quotas: vec![Quota {
                    quota: "q".into(),
                    charge: 2,
                }],
            }],
        };
        let quotas = Quotas::compile(&[spec]).unwrap();
        for (method, path, charged) in [
            ("GET", "/ab", true),
            ("GET", "/b/a", false),
            ("PUT", "/b", true),
            ("POST", "/a", false),
        ] {
            let mut attributes = Attributes::default();
            attributes.set(KEYS.request_method, method.to_owned());
            attributes.set(KEYS.request_path, path.to_owned());
            let expected: &[(&str, i64)] = if charged { &[("q", 2)] } else { &[] };
            assert_eq!(quotas.of(&attributes), expected, "{method} {path}");
        }
    }
}
