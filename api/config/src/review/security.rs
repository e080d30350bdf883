//! Who may call whom: PeerAuthentication, RequestAuthentication, AuthorizationPolicy, and the older
//! Policy and MeshPolicy.

use super::{At, Check, jwt, text};

pub(super) fn peer(check: &mut Check<'_>, spec: &At<'_>) {
    check.policy_selector(&spec.get("selector"));
    let ports = spec.get("portLevelMtls");
    if ports.count() > 0 && spec.get("selector").get("matchLabels").count() == 0 {
        check.error(
            &ports,
            "needs a selector: ports are those of certain workloads",
        );
    }
    for (number, port) in ports.entries() {
        if !number.parse::<u16>().is_ok_and(|number| number > 0) {
            check.error(&port, format!("port {number:?} is not between 1 and 65535"));
        }
    }
}

pub(super) fn request(check: &mut Check<'_>, spec: &At<'_>) {
    check.targets(spec);
    for rule in spec.get("jwtRules").items() {
        jwt::rule(check, &rule);
    }
}

pub(super) fn authorization(check: &mut Check<'_>, spec: &At<'_>) {
    check.targets(spec);
    let action = match spec.str("action") {
        "" => "ALLOW",
        action => action,
    };
    let rules = spec.get("rules");
    if matches!(action, "DENY" | "CUSTOM") && rules.count() == 0 {
        check.error(&rules, format!("{action} without rules never applies; an empty rule, - {{}}, is about every request"));
    }
    let provider = spec.get("provider");
    if action == "CUSTOM" {
        if rules.count() > 0 && provider.str("name").is_empty() {
            check.error(&provider.get("name"), "required for CUSTOM");
        }
    } else if provider.is_set() {
        check.error(&provider, format!("is for CUSTOM, not {action}"));
    }
    for rule in rules.items() {
        if rule
            .value
            .as_object()
            .is_some_and(|fields| fields.contains_key("from"))
            && rule.get("from").count() == 0
        {
            check.error(
                &rule.get("from"),
                "may not be an empty list; leave it out for everybody",
            );
        }
        let (mut sources_fit_tcp, mut operations_fit_tcp) = (false, false);
        for from in rule.get("from").items() {
            sources_fit_tcp |= source(check, &from.get("source"), action);
        }
        for to in rule.get("to").items() {
            operations_fit_tcp |= operation(check, &to.get("operation"));
        }
        for condition in rule.get("when").items() {
            when(check, &condition, action);
        }
        let (from, to) = (rule.get("from").count() > 0, rule.get("to").count() > 0);
        if action == "DENY" && (from && !to && !sources_fit_tcp || to && !operations_fit_tcp) {
            check.warn(&rule, "on TCP ports this denies everything, for it asks only about HTTP; name ports in to.operation.ports");
        }
    }
}

/// Whether the source means anything on TCP.
fn source(check: &mut Check<'_>, at: &At<'_>, action: &str) -> bool {
    const ATTRIBUTES: [&str; 7] = [
        "principals",
        "requestPrincipals",
        "namespaces",
        "serviceAccounts",
        "ipBlocks",
        "remoteIpBlocks",
        "trustDomains",
    ];
    let names: Vec<String> = ATTRIBUTES
        .iter()
        .flat_map(|name| [(*name).to_owned(), negated(name)])
        .collect();
    not_empty(check, at, &names);
    for name in [
        "ipBlocks",
        "notIpBlocks",
        "remoteIpBlocks",
        "notRemoteIpBlocks",
    ] {
        for block in at.get(name).items() {
            if !block.text().is_empty() {
                check.subnet(&block);
            }
        }
    }
    let set = |name: &str| at.get(name).count() > 0;
    let by_account = ["serviceAccounts", "notServiceAccounts"];
    let by_name = ["principals", "notPrincipals", "namespaces", "notNamespaces"];
    if by_account.iter().any(|name| set(name)) && by_name.iter().any(|name| set(name)) {
        check.error(at, "serviceAccounts exclude namespaces and principals");
    }
    for account in by_account.iter().flat_map(|name| at.get(name).items()) {
        let text = account.text();
        let parts: Vec<&str> = text.split('/').collect();
        if text.contains('*') {
            check.error(&account, "a service account takes no wildcard");
        } else if !text.is_empty() && (parts.len() > 2 || parts.iter().any(|part| part.is_empty()))
        {
            check.error(
                &account,
                format!("{text:?} must be ACCOUNT or NAMESPACE/ACCOUNT"),
            );
        }
    }
    for domain in ["trustDomains", "notTrustDomains"]
        .iter()
        .flat_map(|name| at.get(name).items())
    {
        if domain.text().contains('/') {
            check.error(
                &domain,
                format!("{:?} is not a trust domain", domain.text()),
            );
        }
    }
    if action == "CUSTOM" {
        for name in [
            "namespaces",
            "principals",
            "requestPrincipals",
            "serviceAccounts",
            "trustDomains",
        ] {
            for name in [name.to_owned(), negated(name)] {
                if set(&name) {
                    check.error(
                        &at.get(&name),
                        "cannot be asked with CUSTOM; ask it in another policy",
                    );
                }
            }
        }
    }
    names
        .iter()
        .any(|name| !name.to_lowercase().contains("requestprincipals") && set(name))
}

fn negated(name: &str) -> String {
    let mut letters = name.chars();
    let first = letters.next().unwrap_or_default().to_uppercase();
    format!("not{first}{}", letters.as_str())
}

/// Every list of a source or operation: not all may be empty, and no entry of any.
fn not_empty(check: &mut Check<'_>, at: &At<'_>, names: &[String]) {
    if !at.is_set() {
        check.error(at, "missing; it is required");
    } else if names.iter().all(|name| at.get(name).count() == 0) {
        check.error(
            at,
            format!(
                "says nothing; set one of {}, or remove the rule's part",
                names.join(", ")
            ),
        );
    }
    for item in names.iter().flat_map(|name| at.get(name).items()) {
        if item.text().is_empty() {
            check.error(&item, "may not be empty");
        }
    }
}

/// Whether the operation means anything on TCP.
fn operation(check: &mut Check<'_>, at: &At<'_>) -> bool {
    let names: Vec<String> = ["hosts", "ports", "methods", "paths"]
        .iter()
        .flat_map(|name| [(*name).to_owned(), negated(name)])
        .collect();
    not_empty(check, at, &names);
    for port in at.get("ports").items().chain(at.get("notPorts").items()) {
        port_text(check, &port);
    }
    for path in at.get("paths").items().chain(at.get("notPaths").items()) {
        path_template(check, &path);
    }
    at.get("ports").count() + at.get("notPorts").count() > 0
}

fn port_text(check: &mut Check<'_>, at: &At<'_>) {
    if !at.text().is_empty() && !at.text().parse::<u16>().is_ok_and(|port| port > 0) {
        check.error(
            at,
            format!("{:?} is not a port between 1 and 65535", at.text()),
        );
    }
}

/// `{*}` is one segment of a path, `{**}` any number of them at the end.
fn path_template(check: &mut Check<'_>, at: &At<'_>) {
    let path = at.text();
    let is_template = path.contains("{*}") || path.contains("{**}");
    let mut ended = false;
    for segment in path.trim_matches('/').split('/') {
        match segment {
            "{*}" | "{**}" if ended => {
                check.error(at, format!("{path:?}: {{**}} must come last"));
                return;
            }
            "{*}" => {}
            "{**}" => ended = true,
            _ if segment.contains(['{', '}']) => {
                check.error(
                    at,
                    format!("{path:?}: braces are for {{*}} and {{**}} as whole segments"),
                );
                return;
            }
            _ if is_template && segment.contains('*') => {
                check.error(at, format!("{path:?}: {{*}} and * cannot be mixed"));
                return;
            }
            _ if is_template
                && !segment.is_empty()
                && !segment
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b)) =>
            {
                check.error(
                    at,
                    format!("{path:?}: {segment:?} is not a segment of a path"),
                );
                return;
            }
            _ => {}
        }
    }
}

fn when(check: &mut Check<'_>, at: &At<'_>, action: &str) {
    let key = at.get("key");
    let name = key.text();
    if name.is_empty() {
        check.error(&key, "missing; it is required");
        return;
    }
    let (values, not_values) = (at.get("values"), at.get("notValues"));
    if values.count() == 0 && not_values.count() == 0 {
        check.error(at, "at least one of values and notValues is required");
        return;
    }
    if action == "CUSTOM"
        && (matches!(
            name,
            "source.namespace"
                | "source.principal"
                | "source.serviceAccount"
                | "source.trustDomain"
        ) || name.starts_with("request.auth."))
    {
        check.error(
            &key,
            format!("{name} cannot be asked with CUSTOM; ask it in another policy"),
        );
    }
    for value in values.items().chain(not_values.items()) {
        if value.text().is_empty() {
            check.error(&value, "may not be empty");
            continue;
        }
        match name {
            "source.ip" | "remote.ip" | "destination.ip" => check.subnet(&value),
            "destination.port" => port_text(check, &value),
            _ => {}
        }
    }
    let bracketed = |prefix: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with('[') && rest.ends_with(']') && rest.len() > 2)
    };
    let known = matches!(
        name,
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
        || name.starts_with("experimental.envoy.filters.");
    if !known {
        check.error(&key, format!("{name:?} is not an attribute of requests, such as source.ip or request.headers[NAME]"));
    }
}

/// Policy and MeshPolicy, whose names say what they are about.
pub(super) fn older_policy(check: &mut Check<'_>, spec: &At<'_>) {
    let name = At::new(spec.value, "metadata.name");
    let (is_default, is_mesh) = (
        check.subject.name == "default",
        check.subject.kind == "MeshPolicy",
    );
    let targets = spec.get("targets");
    if is_mesh && !is_default {
        check.error(&name, "a MeshPolicy must be called default");
    }
    if (is_mesh || is_default) && targets.count() > 0 {
        check.error(
            &targets,
            "a policy called default is for all services; give it another name",
        );
    }
    if !is_mesh && !is_default && targets.count() == 0 {
        check.error(
            &targets,
            "at least one is required, except in a policy called default",
        );
    }
    for target in targets.items() {
        if !text::is_dns_label(target.str("name")) {
            check.error(
                &target.get("name"),
                format!("{:?} is not a service's short name", target.str("name")),
            );
        }
        for port in target.get("ports").items() {
            if port.has("number") {
                check.port(&port.get("number"));
            } else if !port.str("name").is_empty() {
                check.port_name(&port.get("name"), port.str("name"));
            }
        }
    }
    let mut issuers: Vec<&str> = Vec::new();
    for method in spec.get("peers").items().chain(spec.get("origins").items()) {
        let token = method.get("jwt");
        if !token.is_set() {
            if !method.has("mtls") {
                check.error(&method, "one of mtls and jwt is required");
            }
            continue;
        }
        let issuer = token.str("issuer");
        if issuers.contains(&issuer) {
            check.error(&token.get("issuer"), format!("{issuer:?} is there twice"));
        }
        issuers.push(issuer);
        jwt::older(check, &token);
    }
}
