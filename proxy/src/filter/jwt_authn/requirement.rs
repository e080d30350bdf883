//! What tokens a request must carry.

use std::sync::Arc;

use lateen_protocols::envoy::envoy::extensions::filters::http::jwt_authn::v3 as proto;
use proto::jwt_requirement::RequiresType;

use super::provider::{Provider, sanitized};
use crate::{config_error::ConfigError, proto::invalid};

/// Deepest nesting of requirements.
const MAX_DEPTH: usize = 16;

#[derive(Debug)]
pub(super) enum Requirement {
    /// A token of this provider, for one of these audiences if they are given.
    Provider(Arc<Provider>, Option<Vec<String>>),
    /// Tokens of whichever providers, if there are any.
    Anyone(AllowMissing),
    All(Vec<Requirement>),
    /// One of these; or none at all, as far as that is allowed.
    Any(Vec<Requirement>, Option<AllowMissing>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AllowMissing {
    /// Tokens may be missing; those that are there must be good.
    Only,
    /// Tokens may be bad, too.
    OrFailed,
}

impl Requirement {
    pub(super) fn compile(
        requirement: &proto::JwtRequirement,
        providers: &[Arc<Provider>],
    ) -> Result<Requirement, ConfigError> {
        Requirement::nested(requirement, providers, 0)
    }

    fn nested(
        requirement: &proto::JwtRequirement,
        providers: &[Arc<Provider>],
        depth: usize,
    ) -> Result<Requirement, ConfigError> {
        if depth > MAX_DEPTH {
            return Err(invalid("requires", "nested too deep"));
        }
        let named = |name: &str| {
            let found = providers.iter().find(|provider| provider.name == name);
            found.cloned().ok_or_else(|| {
                invalid(
                    "provider_name",
                    format!("{name:?} is not among the providers"),
                )
            })
        };
        Ok(match requirement.requires_type.as_ref() {
            Some(RequiresType::ProviderName(name)) => Requirement::Provider(named(name)?, None),
            Some(RequiresType::ProviderAndAudiences(both)) => {
                let audiences = both.audiences.iter().map(|one| sanitized(one)).collect();
                Requirement::Provider(named(&both.provider_name)?, Some(audiences))
            }
            Some(RequiresType::RequiresAll(all)) => Requirement::All(
                all.requirements
                    .iter()
                    .map(|one| Requirement::nested(one, providers, depth + 1))
                    .collect::<Result<_, _>>()?,
            ),
            Some(RequiresType::RequiresAny(any)) => {
                let mut allow = None;
                let mut list = Vec::new();
                for one in &any.requirements {
                    match Requirement::nested(one, providers, depth + 1)? {
                        Requirement::Anyone(how) if allow != Some(AllowMissing::OrFailed) => {
                            allow = Some(how);
                        }
                        Requirement::Anyone(_) => {}
                        other => list.push(other),
                    }
                }
                match (list.is_empty(), allow) {
                    (true, Some(how)) => Requirement::Anyone(how),
                    (true, None) => return Err(invalid("requires_any", "empty")),
                    (false, allow) => Requirement::Any(list, allow),
                }
            }
            Some(RequiresType::AllowMissing(_)) => Requirement::Anyone(AllowMissing::Only),
            Some(RequiresType::AllowMissingOrFailed(_)) => {
                Requirement::Anyone(AllowMissing::OrFailed)
            }
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
                return Err(invalid("extract_only_without_validation", "not supported"));
            }
            None => return Err(invalid("requires", "empty")),
        })
    }
}
