//! AuthorizationPolicies as RBAC filters: CUSTOM before DENY before ALLOW, then AUDIT.
//!
//! What cannot be said to a proxy is decided for the strict side: a rule that is not understood allows nobody
//! and denies everybody. CUSTOM policies whose provider cannot be asked refuse what they match.

use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::config::rbac::v3::{
    Permission, Policy, Principal, Rbac, permission, principal, rbac::Action,
};
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use lateen_config::Object;
use lateen_config::authorization::{
    AuthorizationAction, AuthorizationPolicy, AuthorizationRule, is_dry_run,
};

use super::Scope;
use super::external;
use super::http;
use super::rbac::{self, Layer};
use super::wire::any;

pub(super) const HTTP: &str = "envoy.filters.http.rbac";
const NETWORK: &str = "envoy.filters.network.rbac";

/// The filter that asks; where Mixer has one of that name, which routes go by, another.
pub(super) const EXTERNAL: &str = "envoy.filters.http.ext_authz";
const EXTERNAL_BESIDE_MIXER: &str = "envoy.filters.http.ext_authz.custom";

/// Ends names of rules that refuse as their provider cannot be asked. Istio's.
const BAD_CUSTOM: &str = "-deny-due-to-bad-CUSTOM-action";

/// Of statistics of policies that are only tried.
const DRY_RUN_ALLOW: &str = "istio_dry_run_allow_";
const DRY_RUN_DENY: &str = "istio_dry_run_deny_";

/// Of statistics of network filters.
const TCP: &str = "tcp.";

/// One filter: what is enforced, what is only counted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rules {
    enforced: Option<Rbac>,
    tried: Option<Rbac>,
    deny: bool,
}

impl Rules {
    fn prefix(&self) -> String {
        if self.deny && self.tried.is_some() {
            DRY_RUN_DENY
        } else {
            DRY_RUN_ALLOW
        }
        .to_owned()
    }
}

/// CUSTOM as HTTP filters, which stand before all others: for each provider one that marks what is meant, and the one
/// that asks. `beside_mixer`: Mixer's filter that asks is there as well.
pub(super) fn custom_filters(scope: &Scope<'_>, beside_mixer: bool) -> Vec<HttpFilter> {
    let policies = policies(scope, AuthorizationAction::Custom);
    let mut providers: Vec<&str> = Vec::new();
    for (_, policy) in &policies {
        let name = provider(policy);
        if !providers.contains(&name) {
            providers.push(name);
        }
    }
    let mut filters = Vec::new();
    for name in providers {
        let (asked, tried): (Vec<_>, Vec<_>) = policies
            .iter()
            .copied()
            .filter(|(_, policy)| provider(policy) == name)
            .partition(|(object, _)| !is_dry_run(&object.annotations));
        match external::filter(scope, name) {
            Ok(asks) => {
                let marks = of_action(
                    scope,
                    &asked,
                    Action::Deny,
                    Layer::Http,
                    &external::policy_prefix(name),
                    "",
                );
                if let Some(marks) = marks {
                    filters.push(rbac_filter(external::MARK.to_owned(), None, marks.enforced));
                    let named = if beside_mixer {
                        EXTERNAL_BESIDE_MIXER
                    } else {
                        EXTERNAL
                    };
                    filters.push(http::named(named, &asks));
                }
            }
            Err(why) => {
                for (object, _) in &asked {
                    scope.note(format!(
                        "{}: what its rules match is refused: {why}",
                        object.key
                    ));
                }
                let refuses = of_action(scope, &asked, Action::Deny, Layer::Http, "", BAD_CUSTOM);
                filters
                    .extend(refuses.map(|rules| rbac_filter(rules.prefix(), rules.enforced, None)));
            }
        }
        let counted = of_action(scope, &tried, Action::Deny, Layer::Http, "", "");
        filters.extend(counted.map(|rules| rbac_filter(rules.prefix(), None, rules.tried)));
    }
    filters
}

fn provider(policy: &AuthorizationPolicy) -> &str {
    policy
        .provider
        .as_ref()
        .map_or("", |provider| &provider.name)
}

/// The HTTP filters that decide, in their order.
pub(super) fn http_filters(scope: &Scope<'_>) -> Vec<HttpFilter> {
    [
        (AuthorizationAction::Deny, Action::Deny),
        (AuthorizationAction::Allow, Action::Allow),
        (AuthorizationAction::Audit, Action::Log),
    ]
    .into_iter()
    .filter_map(|(wanted, action)| {
        of_action(scope, &policies(scope, wanted), action, Layer::Http, "", "")
    })
    .map(|rules| rbac_filter(rules.prefix(), rules.enforced, rules.tried))
    .collect()
}

fn rbac_filter(prefix: String, enforced: Option<Rbac>, tried: Option<Rbac>) -> HttpFilter {
    http::named(
        HTTP,
        &HttpRbac {
            shadow_rules_stat_prefix: prefix,
            rules: enforced,
            shadow_rules: tried,
            ..Default::default()
        },
    )
}

/// The network filters that stand before all others of a TCP chain. Nobody is asked about connections: what CUSTOM
/// matches is refused.
pub(super) fn network_filters(scope: &Scope<'_>) -> Vec<Filter> {
    [
        (AuthorizationAction::Custom, Action::Deny, BAD_CUSTOM),
        (AuthorizationAction::Deny, Action::Deny, ""),
        (AuthorizationAction::Allow, Action::Allow, ""),
        (AuthorizationAction::Audit, Action::Log, ""),
    ]
    .into_iter()
    .filter_map(|(wanted, action, suffix)| {
        of_action(
            scope,
            &policies(scope, wanted),
            action,
            Layer::Tcp,
            "",
            suffix,
        )
    })
    .map(|rules| Filter {
        name: NETWORK.to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(any(&NetworkRbac {
            shadow_rules_stat_prefix: rules.prefix(),
            rules: rules.enforced,
            shadow_rules: rules.tried,
            stat_prefix: TCP.to_owned(),
            ..Default::default()
        }))),
    })
    .collect()
}

fn policies<'a>(
    scope: &'a Scope<'_>,
    wanted: AuthorizationAction,
) -> Vec<(&'a Object, &'a AuthorizationPolicy)> {
    scope
        .snapshot
        .authorization_policies(&scope.node.namespace, scope.labels())
        .filter(|(_, policy)| policy.action == wanted)
        .collect()
}

/// `before` and `after` go around the rules' names.
fn of_action(
    scope: &Scope<'_>,
    policies: &[(&Object, &AuthorizationPolicy)],
    action: Action,
    layer: Layer,
    before: &str,
    after: &str,
) -> Option<Rules> {
    let mut rules = Rules {
        deny: action == Action::Deny,
        ..Rules::default()
    };
    for (object, policy) in policies {
        let slot = if is_dry_run(&object.annotations) {
            &mut rules.tried
        } else {
            &mut rules.enforced
        };
        // There even without a rule: then it allows nobody.
        let built = slot.get_or_insert_with(|| Rbac {
            action: action as i32,
            ..Default::default()
        });
        let name = |index: usize| {
            let join = if before.is_empty() { "" } else { "-" };
            format!(
                "{before}{join}ns[{}]-policy[{}]-rule[{index}]{after}",
                object.key.namespace, object.key.name
            )
        };
        if policy.rules.is_empty() && action != Action::Deny {
            built.policies.insert(name(0), nothing());
        }
        for (index, rule) in policy.rules.iter().enumerate() {
            match of_rule(scope, object, rule, action, layer) {
                Some(policy) => {
                    built.policies.insert(name(index), policy);
                }
                None if action == Action::Deny => {
                    built.policies.insert(name(index), everything());
                }
                None => {}
            }
        }
    }
    // A DENY that denies nothing is no filter.
    let empty = |rbac: &Rbac| action != Action::Allow && rbac.policies.is_empty();
    rules.enforced = rules.enforced.filter(|rbac| !empty(rbac));
    rules.tried = rules.tried.filter(|rbac| !empty(rbac));
    (rules.enforced.is_some() || rules.tried.is_some()).then_some(rules)
}

/// `None` for what nobody is to match on this layer, or what is not understood.
fn of_rule(
    scope: &Scope<'_>,
    object: &Object,
    rule: &AuthorizationRule,
    action: Action,
    layer: Layer,
) -> Option<Policy> {
    let context = rbac::Context {
        layer,
        deny: action == Action::Deny,
        trust_domains: scope.trust_domains().map(str::to_owned).collect(),
        namespace: &object.key.namespace,
    };
    let operations: Vec<_> = rule.to.iter().map(|to| to.operation.as_ref()).collect();
    let sources: Vec<_> = rule.from.iter().map(|from| from.source.as_ref()).collect();
    let operations = if operations.is_empty() {
        vec![None]
    } else {
        operations
    };
    let sources = if sources.is_empty() {
        vec![None]
    } else {
        sources
    };
    Some(Policy {
        permissions: operations
            .into_iter()
            .map(|operation| context.permission(operation, &rule.when))
            .collect::<Option<_>>()?,
        principals: sources
            .into_iter()
            .map(|source| context.principal(source, &rule.when))
            .collect::<Option<_>>()?,
        ..Default::default()
    })
}

fn nothing() -> Policy {
    Policy {
        permissions: vec![rbac::not_permission(Permission {
            rule: Some(permission::Rule::Any(true)),
        })],
        principals: vec![rbac::not_principal(Principal {
            identifier: Some(principal::Identifier::Any(true)),
        })],
        ..Default::default()
    }
}

fn everything() -> Policy {
    Policy {
        permissions: vec![Permission {
            rule: Some(permission::Rule::Any(true)),
        }],
        principals: vec![Principal {
            identifier: Some(principal::Identifier::Any(true)),
        }],
        ..Default::default()
    }
}
