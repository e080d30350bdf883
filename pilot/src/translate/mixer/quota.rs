//! QuotaSpecs in the form our proxy reads.

use lateen_config::StringMatch;
use lateen_protocols::istio::mixer::v1::config::client::{
    AttributeMatch, Quota, QuotaRule, QuotaSpec, StringMatch as ClauseMatch,
    string_match::MatchType,
};

use crate::model::BoundQuota;

/// What a bound QuotaSpec charges when.
pub(super) fn spec(bound: &BoundQuota<'_>) -> QuotaSpec {
    let clause = |matcher: &StringMatch| ClauseMatch {
        match_type: match matcher {
            StringMatch::Present => None,
            StringMatch::Exact(text) => Some(MatchType::Exact(text.clone())),
            StringMatch::Prefix(text) => Some(MatchType::Prefix(text.clone())),
            StringMatch::Regex(pattern) => Some(MatchType::Regex(pattern.clone())),
        },
    };
    QuotaSpec {
        rules: bound
            .spec
            .rules
            .iter()
            .map(|rule| QuotaRule {
                r#match: rule
                    .matches
                    .iter()
                    .map(|entry| AttributeMatch {
                        clause: entry
                            .clause
                            .iter()
                            .map(|(name, matcher)| (name.clone(), clause(matcher)))
                            .collect(),
                    })
                    .collect(),
                quotas: rule
                    .quotas
                    .iter()
                    .map(|quota| Quota {
                        quota: quota.quota.clone(),
                        charge: quota.charge.max(1),
                    })
                    .collect(),
            })
            .collect(),
    }
}
