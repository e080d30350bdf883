//! AuthorizationPolicy.

use std::net::IpAddr;

use crate::authorization::{AuthorizationAction, AuthorizationPolicy, Operation, Source};

use super::Check;

pub(super) fn authorization_policy(check: &mut Check<'_>, spec: &AuthorizationPolicy) {
    if let Some(selector) = &spec.selector {
        check.labels("spec.selector.matchLabels", &selector.match_labels);
    }
    if spec.has_targets() {
        check.warn(
            "spec.targetRefs",
            "the policy is NOT enforced: this version selects workloads by selector only",
        );
    }
    match spec.action {
        AuthorizationAction::Custom => check.warn(
            "spec.action",
            "nobody is asked by this version: requests that the rules match are refused",
        ),
        AuthorizationAction::Deny if spec.rules.is_empty() => {
            check.error("spec.rules", "DENY without rules denies nothing");
        }
        _ => {}
    }
    for (index, rule) in spec.rules.iter().enumerate() {
        let rule_field = format!("spec.rules[{index}]");
        for (index, from) in rule.from.iter().enumerate() {
            let field = format!("{rule_field}.from[{index}].source");
            let Some(source) = &from.source else {
                check.error(field, "missing");
                continue;
            };
            if *source == Source::default() {
                check.error(
                    field.clone(),
                    "says nothing; leave `from` out for everybody",
                );
            }
            for (name, blocks) in [
                ("ipBlocks", &source.ip_blocks),
                ("notIpBlocks", &source.not_ip_blocks),
                ("remoteIpBlocks", &source.remote_ip_blocks),
                ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
            ] {
                ranges(check, &format!("{field}.{name}"), blocks);
            }
        }
        for (index, to) in rule.to.iter().enumerate() {
            let field = format!("{rule_field}.to[{index}].operation");
            let Some(operation) = &to.operation else {
                check.error(field, "missing");
                continue;
            };
            if *operation == Operation::default() {
                check.error(field.clone(), "says nothing; leave `to` out for everything");
            }
            for (name, list) in [
                ("ports", &operation.ports),
                ("notPorts", &operation.not_ports),
            ] {
                ports(check, &format!("{field}.{name}"), list);
            }
        }
        for (index, condition) in rule.when.iter().enumerate() {
            let field = format!("{rule_field}.when[{index}]");
            if condition.values.is_empty() && condition.not_values.is_empty() {
                check.error(field.clone(), "values or notValues are required");
            }
            let lists = [
                (format!("{field}.values"), &condition.values),
                (format!("{field}.notValues"), &condition.not_values),
            ];
            for (field, values) in lists {
                match condition.key.as_str() {
                    "source.ip" | "remote.ip" | "destination.ip" => ranges(check, &field, values),
                    "destination.port" => ports(check, &field, values),
                    _ => {}
                }
            }
            if !is_condition(&condition.key) {
                check.error(
                    format!("{field}.key"),
                    format!("{:?} is no attribute of a condition", condition.key),
                );
            }
        }
    }
}

fn ranges(check: &mut Check<'_>, field: &str, list: &[String]) {
    for (index, text) in list.iter().enumerate() {
        let (address, bits) = text.split_once('/').unwrap_or((text, "0"));
        let fits = address.parse::<IpAddr>().is_ok_and(|ip| {
            bits.parse::<u8>()
                .is_ok_and(|bits| bits <= if ip.is_ipv4() { 32 } else { 128 })
        });
        if !fits {
            check.error(
                format!("{field}[{index}]"),
                format!("{text:?} is neither an IP address nor a range of them"),
            );
        }
    }
}

fn ports(check: &mut Check<'_>, field: &str, list: &[String]) {
    for (index, text) in list.iter().enumerate() {
        if text.parse::<u16>().ok().filter(|port| *port != 0).is_none() {
            check.error(
                format!("{field}[{index}]"),
                format!("{text:?} is not a port between 1 and 65535"),
            );
        }
    }
}

/// Whether an attribute of AuthorizationPolicy's `when` is known.
fn is_condition(key: &str) -> bool {
    let bracketed = |name: &str| {
        key.strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('['))
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|inner| !inner.is_empty())
    };
    matches!(
        key,
        "source.ip"
            | "remote.ip"
            | "source.namespace"
            | "source.principal"
            | "source.serviceAccount"
            | "source.trustDomain"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
            | "destination.ip"
            | "destination.port"
            | "connection.sni"
    ) || bracketed("request.headers")
        || bracketed("request.auth.claims")
        || key.starts_with("experimental.envoy.filters.") && key.ends_with(']')
}
