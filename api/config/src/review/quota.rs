//! QuotaSpec, HTTPAPISpec and their bindings.

use super::{At, Check, text};

pub(super) fn quota_spec(check: &mut Check<'_>, spec: &At<'_>) {
    let rules = spec.get("rules");
    if rules.count() == 0 {
        check.error(&rules, "at least one rule is required");
    }
    for rule in rules.items() {
        for clause in rule
            .get("match")
            .items()
            .map(|matcher| matcher.get("clause"))
        {
            for (_, matcher) in clause.entries() {
                attribute_match(check, &matcher);
            }
        }
        let quotas = rule.get("quotas");
        if quotas.count() == 0 {
            check.error(&quotas, "at least one quota is required");
        }
        for quota in quotas.items() {
            if quota.str("quota").is_empty() {
                check.error(&quota.get("quota"), "missing; it is required");
            }
            let charge = quota.get("charge");
            if charge.int() <= 0 {
                check.error(&charge, "a charge of at least 1 is required");
            }
        }
    }
}

fn attribute_match(check: &mut Check<'_>, at: &At<'_>) {
    match ["exact", "prefix", "regex"]
        .into_iter()
        .find(|name| at.has(name))
    {
        Some("regex") => check.regex(&at.get("regex")),
        Some(name) if at.str(name).is_empty() => check.error(&at.get(name), "may not be empty"),
        _ => {}
    }
}

/// The services and specs of a binding; `specs` is the name of the latter's field.
pub(super) fn binding(check: &mut Check<'_>, spec: &At<'_>, specs: &str) {
    let services = spec.get("services");
    if services.count() == 0 {
        check.error(&services, "at least one service is required");
    }
    for service in services.items() {
        istio_service(check, &service);
    }
    let list = spec.get(specs);
    if list.count() == 0 {
        check.error(&list, "at least one is required");
    }
    for reference in list.items() {
        for name in ["name", "namespace"] {
            let text = reference.str(name);
            if !text::is_dns_label(text) && (name == "name" || !text.is_empty()) {
                check.error(
                    &reference.get(name),
                    format!("{text:?} is not a {name}: letters, digits and - only"),
                );
            }
        }
    }
}

/// A service by its parts, or whole.
pub(super) fn istio_service(check: &mut Check<'_>, at: &At<'_>) {
    let (name, service) = (at.str("name"), at.str("service"));
    if name.is_empty() && service.is_empty() {
        check.error(at, "one of name and service is required");
    }
    if !service.is_empty() {
        for part in ["name", "namespace", "domain"] {
            if !at.str(part).is_empty() {
                check.error(
                    &at.get(part),
                    "service is the whole name; remove one or the other",
                );
            }
        }
        let good = service == "*" || text::is_wildcard_domain(service) || text::is_subnet(service);
        if !good {
            check.error(
                &at.get("service"),
                format!("{service:?} is not a host name"),
            );
        }
    }
    for part in ["name", "namespace"] {
        if !at.str(part).is_empty() && !text::is_dns_label(at.str(part)) {
            check.error(
                &at.get(part),
                format!(
                    "{:?} is not a {part}: letters, digits and - only",
                    at.str(part)
                ),
            );
        }
    }
    if !at.str("domain").is_empty() && !text::is_fqdn(at.str("domain")) {
        check.error(
            &at.get("domain"),
            format!("{:?} is not a domain", at.str("domain")),
        );
    }
    check.labels(&at.get("labels"));
}

pub(super) fn api_spec(check: &mut Check<'_>, spec: &At<'_>) {
    attributes(check, &spec.get("attributes"));
    let patterns = spec.get("patterns");
    if patterns.count() == 0 {
        check.error(&patterns, "at least one pattern is required");
    }
    for pattern in patterns.items() {
        attributes(check, &pattern.get("attributes"));
        if pattern.str("httpMethod").is_empty() {
            check.error(&pattern.get("httpMethod"), "missing; it is required");
        }
        if pattern.has("regex") {
            check.regex(&pattern.get("regex"));
        } else if pattern.str("uriTemplate").is_empty() {
            check.error(
                &pattern.get("uriTemplate"),
                "one of uriTemplate and regex is required",
            );
        }
    }
    for key in spec.get("apiKeys").items() {
        if ["query", "header", "cookie"]
            .iter()
            .all(|name| key.str(name).is_empty())
        {
            check.error(&key, "one of query, header and cookie is required");
        }
    }
}

fn attributes(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    if at.get("attributes").count() == 0 {
        check.error(&at.get("attributes"), "at least one attribute is required");
    }
    for (_, value) in at.get("attributes").entries() {
        let empty = ["stringValue", "bytesValue"]
            .iter()
            .any(|name| value.has(name) && value.str(name).is_empty());
        if empty || value.count() == 0 {
            check.error(&value, "may not be empty");
        }
    }
}
