//! Which redirects of an upstream the proxy follows itself. Envoy: `InternalRedirectPolicy`.

use std::sync::Arc;

use lateen_protocols::envoy::envoy::{
    config::route::v3 as proto,
    extensions::internal_redirect::{
        allow_listed_routes::v3::AllowListedRoutesConfig,
        previous_routes::v3::PreviousRoutesConfig, safe_cross_scheme::v3::SafeCrossSchemeConfig,
    },
};

use crate::{
    config_error::ConfigError,
    head::Name,
    proto::{invalid, unpack},
};

/// Statuses that may be followed at all; others in a configuration are ignored.
const REDIRECTS: [u32; 5] = [301, 302, 303, 307, 308];

/// A route's policy.
#[derive(Debug)]
pub struct InternalRedirect {
    /// How many redirects one request may take.
    pub max: u32,
    statuses: Vec<u32>,
    /// Redirects from `http` to `https` and back are followed, too.
    pub cross_scheme: bool,
    /// Headers that the next request has from the response.
    pub copy: Vec<Name>,
    predicates: Vec<Predicate>,
}

/// A condition on the route that a redirect leads to.
#[derive(Debug)]
enum Predicate {
    /// No redirect from this route has led there yet.
    PreviousRoutes,
    /// It has one of these names.
    AllowListed(Vec<String>),
    /// It does not lead from `http` to `https`.
    SafeCrossScheme,
}

/// What became of a request's redirects so far.
#[derive(Debug, Default)]
pub struct Taken {
    /// How many were followed.
    pub count: u32,
    /// Routes that were left by a redirect, and the routes these led to.
    steps: Vec<(Step, Step)>,
}

type Step = Option<Arc<str>>;

/// Where a redirect leads from and to.
#[derive(Clone, Copy, Debug)]
pub struct Leads<'a> {
    /// Name of the route whose response it is.
    pub from: &'a Option<Arc<str>>,
    /// Name of the route it leads to.
    pub to: &'a Option<Arc<str>>,
    /// The request came by `https`.
    pub from_https: bool,
    /// It is to go on by `https`.
    pub to_https: bool,
}

impl InternalRedirect {
    /// Compiles a policy.
    ///
    /// # Errors
    /// A predicate is not valid or not known.
    pub fn compile(policy: &proto::InternalRedirectPolicy) -> Result<Self, ConfigError> {
        let mut statuses = policy.redirect_response_codes.clone();
        statuses.retain(|status| REDIRECTS.contains(status));
        if policy.redirect_response_codes.is_empty() {
            statuses.push(302);
        }
        let mut predicates = Vec::new();
        for extension in &policy.predicates {
            let Some(any) = extension.typed_config.as_ref() else {
                return Err(invalid("predicates", "typed_config is absent"));
            };
            predicates.push(if unpack::<PreviousRoutesConfig>(any)?.is_some() {
                Predicate::PreviousRoutes
            } else if let Some(list) = unpack::<AllowListedRoutesConfig>(any)? {
                Predicate::AllowListed(list.allowed_route_names)
            } else if unpack::<SafeCrossSchemeConfig>(any)?.is_some() {
                Predicate::SafeCrossScheme
            } else {
                let reason = format!("{} is not supported", any.type_url);
                return Err(invalid("predicates", reason));
            });
        }
        Ok(InternalRedirect {
            max: policy
                .max_internal_redirects
                .as_ref()
                .map_or(1, |max| max.value),
            statuses,
            cross_scheme: policy.allow_cross_scheme_redirect,
            copy: policy
                .response_headers_to_copy
                .iter()
                .map(Name::new)
                .collect(),
            predicates,
        })
    }

    /// Whether responses of this status are looked at.
    pub fn handles(&self, status: u16) -> bool {
        self.statuses.contains(&u32::from(status))
    }

    /// Whether the predicates allow a redirect; what they remember is kept in `taken`.
    pub fn allows(&self, leads: Leads<'_>, taken: &mut Taken) -> bool {
        self.predicates.iter().all(|predicate| match predicate {
            Predicate::PreviousRoutes => {
                let step = (leads.from.clone(), leads.to.clone());
                let new = !taken.steps.contains(&step);
                if new {
                    taken.steps.push(step);
                }
                new
            }
            Predicate::AllowListed(names) => {
                let to = leads.to.as_deref().unwrap_or_default();
                names.iter().any(|name| name == to)
            }
            Predicate::SafeCrossScheme => leads.from_https || !leads.to_https,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(yaml: &str) -> Result<InternalRedirect, ConfigError> {
        InternalRedirect::compile(&lateen_protocols::json::from_yaml(yaml).unwrap())
    }

    fn predicate(name: &str, rest: &str) -> String {
        format!(
            "{{name: p, typed_config: {{'@type': \
             type.googleapis.com/envoy.extensions.internal_redirect.{name}{rest}}}}}"
        )
    }

    #[test]
    fn statuses_and_defaults() {
        let usual = policy("{}").unwrap();
        assert_eq!((usual.max, usual.cross_scheme), (1, false));
        assert!(usual.handles(302) && !usual.handles(301));
        let own =
            policy("{max_internal_redirects: 0, redirect_response_codes: [303, 304]}").unwrap();
        assert_eq!(own.max, 0);
        assert!(own.handles(303) && !own.handles(302) && !own.handles(304));
        assert!(policy("{predicates: [{name: p}]}").is_err());
        let other = "'@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
        assert!(
            policy(&format!(
                "{{predicates: [{{name: p, typed_config: {{{other}}}}}]}}"
            ))
            .is_err()
        );
    }

    #[test]
    fn predicates_judge_where_it_leads() {
        let list = [
            predicate("previous_routes.v3.PreviousRoutesConfig", ""),
            predicate(
                "allow_listed_routes.v3.AllowListedRoutesConfig",
                ", allowed_route_names: [a]",
            ),
            predicate("safe_cross_scheme.v3.SafeCrossSchemeConfig", ""),
        ];
        let judge = |index: usize, steps: &[(&str, &str, bool, bool)]| {
            let policy = policy(&format!("{{predicates: [{}]}}", list[index])).unwrap();
            let mut taken = Taken::default();
            let allows = |&(from, to, from_https, to_https): &(&str, &str, bool, bool)| {
                let leads = Leads {
                    from: &Some(from.into()),
                    to: &Some(to.into()),
                    from_https,
                    to_https,
                };
                policy.allows(leads, &mut taken)
            };
            steps.iter().map(allows).collect::<Vec<_>>()
        };
        let steps = [
            ("a", "b", false, false),
            ("b", "a", false, false),
            ("a", "b", false, false),
        ];
        assert_eq!(judge(0, &steps), [true, true, false]);
        assert_eq!(judge(1, &steps), [false, true, false]);
        let steps = [
            ("a", "b", false, true),
            ("a", "b", true, false),
            ("a", "b", true, true),
        ];
        assert_eq!(judge(2, &steps), [false, true, true]);
    }
}
