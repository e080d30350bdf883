//! AuthorizationPolicies as RBAC filters: CUSTOM before DENY before ALLOW, then AUDIT.
//!
//! What cannot be said to a proxy is decided for the strict side: a rule that is not understood allows nobody
//! and denies everybody. So do CUSTOM policies, as long as nobody can be asked.

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
use super::http;
use super::rbac::{self, Layer};
use super::wire::any;

const HTTP: &str = "envoy.filters.http.rbac";
const NETWORK: &str = "envoy.filters.network.rbac";

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

/// The HTTP filters that stand before all others.
pub(super) fn http_filters(scope: &Scope<'_>) -> Vec<HttpFilter> {
    rules(scope, Layer::Http)
        .into_iter()
        .map(|rules| {
            http::named(
                HTTP,
                &HttpRbac {
                    shadow_rules_stat_prefix: rules.prefix(),
                    rules: rules.enforced,
                    shadow_rules: rules.tried,
                    ..Default::default()
                },
            )
        })
        .collect()
}

/// The network filters that stand before all others of a TCP chain.
pub(super) fn network_filters(scope: &Scope<'_>) -> Vec<Filter> {
    rules(scope, Layer::Tcp)
        .into_iter()
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

/// In the order in which they decide.
fn rules(scope: &Scope<'_>, layer: Layer) -> Vec<Rules> {
    let policies: Vec<(&Object, &AuthorizationPolicy)> = scope
        .snapshot
        .authorization_policies(&scope.node.namespace, scope.labels())
        .collect();
    [
        // Nobody to ask: refused.
        (AuthorizationAction::Custom, Action::Deny),
        (AuthorizationAction::Deny, Action::Deny),
        (AuthorizationAction::Allow, Action::Allow),
        (AuthorizationAction::Audit, Action::Log),
    ]
    .into_iter()
    .filter_map(|(wanted, action)| {
        let all: Vec<_> = policies
            .iter()
            .copied()
            .filter(|(_, policy)| policy.action == wanted)
            .collect();
        of_action(scope, &all, action, layer)
    })
    .collect()
}

fn of_action(
    scope: &Scope<'_>,
    policies: &[(&Object, &AuthorizationPolicy)],
    action: Action,
    layer: Layer,
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
            format!(
                "ns[{}]-policy[{}]-rule[{index}]",
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
