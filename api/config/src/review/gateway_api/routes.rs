//! Routes: their parents and host names, rules, matches, filters and backends.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{At, Check, LIST, api, at_most, hostname, one_of, required, section_name, some, text};

const PARENTS: usize = 32;
const HOSTNAMES: usize = 16;
const RULES: usize = 16;
const MATCHES: usize = 64;
const MATCHES_OF_ALL_RULES: usize = 128;
const PATH_BYTES: usize = 1024;
const WEIGHT: i64 = 1_000_000;

const METHODS: &[&str] = &[
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];

fn parents_and_hosts(check: &mut Check<'_>, spec: &At<'_>) {
    let parents = spec.get("parentRefs");
    at_most(check, &parents, PARENTS);
    let mut seen: Vec<(Vec<&str>, &str, i64)> = Vec::new();
    for parent in parents.items() {
        required(check, &parent.get("name"));
        if parent.has("port") {
            check.port(&parent.get("port"));
        }
        if parent.str("sectionName").is_empty() && parent.has("sectionName") {
            check.error(&parent.get("sectionName"), "may not be empty");
        }
        let own = check.subject.namespace;
        let group = match parent.value.get("group").and_then(Value::as_str) {
            None => api::GROUP,
            Some(group) => group,
        };
        let or = |name: &str, default| match parent.str(name) {
            "" => default,
            text => text,
        };
        let who = vec![
            group,
            or("kind", "Gateway"),
            or("namespace", own),
            parent.str("name"),
        ];
        let (section, port) = (parent.str("sectionName"), parent.get("port").int());
        for (other, other_section, other_port) in &seen {
            if *other != who {
                continue;
            }
            if (section, port) == (*other_section, *other_port) {
                check.error(
                    &parent,
                    "names the same parent twice; sectionName and port tell them apart",
                );
            } else if (section.is_empty() && port == 0)
                || (other_section.is_empty() && *other_port == 0)
            {
                check.error(
                    &parent,
                    "sectionName or port must be set in all references to one parent",
                );
            }
        }
        seen.push((who, section, port));
    }
    let hostnames = spec.get("hostnames");
    at_most(check, &hostnames, HOSTNAMES);
    for host in hostnames.items() {
        hostname(check, &host, true);
    }
}

fn rule_names(check: &mut Check<'_>, rules: &At<'_>) {
    let mut names = BTreeSet::new();
    for rule in rules.items() {
        let name = rule.get("name");
        if name.is_set() {
            section_name(check, &name);
            if !names.insert(name.text()) {
                check.error(
                    &name,
                    format!("{:?} is there twice; names are unique", name.text()),
                );
            }
        }
    }
}

pub(super) fn http_route(check: &mut Check<'_>, spec: &At<'_>) {
    parents_and_hosts(check, spec);
    let rules = spec.get("rules");
    at_most(check, &rules, RULES);
    rule_names(check, &rules);
    let mut matches = 0;
    for rule in rules.items() {
        let all = rule.get("matches");
        at_most(check, &all, MATCHES);
        matches += all.count();
        for entry in all.items() {
            http_match(check, &entry);
        }
        let kinds = filters(check, &rule.get("filters"), true);
        let backends = rule.get("backendRefs");
        at_most(check, &backends, LIST);
        for backend in backends.items() {
            backend_ref(check, &backend);
            filters(check, &backend.get("filters"), true);
        }
        if kinds.contains("RequestRedirect") && backends.count() > 0 {
            check.error(
                &backends,
                "are not for a rule with a RequestRedirect filter",
            );
        }
        for filter in rule.get("filters").items() {
            for name in ["requestRedirect", "urlRewrite"] {
                let path = filter.get(name).get("path");
                let one_prefix = all.count() == 1
                    && all
                        .items()
                        .all(|entry| matches!(entry.get("path").str("type"), "" | "PathPrefix"));
                // A rule without a match has the prefix `/`.
                if path.has("replacePrefixMatch") && !one_prefix && all.count() != 0 {
                    check.error(
                        &path.get("replacePrefixMatch"),
                        "needs exactly one match, of type PathPrefix",
                    );
                }
            }
        }
        let timeouts = rule.get("timeouts");
        let request = duration(check, &timeouts.get("request"));
        let backend = duration(check, &timeouts.get("backendRequest"));
        if let (Some(request), Some(backend)) = (request, backend)
            && request > 0
            && backend > request
        {
            check.error(
                &timeouts.get("backendRequest"),
                "may not be longer than timeouts.request",
            );
        }
        let retry = rule.get("retry");
        for code in retry.get("codes").items() {
            if !(400..=599).contains(&code.int()) {
                check.error(&code, format!("{} is not between 400 and 599", code.int()));
            }
        }
        duration(check, &retry.get("backoff"));
    }
    if matches > MATCHES_OF_ALL_RULES {
        check.error(
            &rules,
            format!("{matches} matches of all rules are more than {MATCHES_OF_ALL_RULES}"),
        );
    }
}

/// GEP-2257: up to four numbers of up to five digits, each with `h`, `m`, `s` or `ms`. In nanoseconds.
fn duration(check: &mut Check<'_>, at: &At<'_>) -> Option<i128> {
    if !at.is_set() {
        return None;
    }
    let mut rest = at.text();
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let tail = rest.get(digits..).unwrap_or_default();
        let unit = ["ms", "h", "m", "s"]
            .into_iter()
            .find(|unit| tail.starts_with(unit));
        match unit {
            Some(unit) if (1..=5).contains(&digits) && parts < 4 => {
                parts += 1;
                rest = tail.get(unit.len()..).unwrap_or_default();
            }
            _ => {
                parts = 0;
                break;
            }
        }
    }
    if parts == 0 {
        check.error(
            at,
            format!(
                "{:?} is not a duration such as 10s, 500ms or 1h30m",
                at.text()
            ),
        );
        return None;
    }
    at.nanos()
}

fn http_match(check: &mut Check<'_>, entry: &At<'_>) {
    let path = entry.get("path");
    one_of(
        check,
        &path.get("type"),
        &["Exact", "PathPrefix", "RegularExpression"],
    );
    let value = path.get("value");
    if value.text().len() > PATH_BYTES {
        check.error(&value, format!("is longer than {PATH_BYTES} bytes"));
    }
    if path.str("type") == "RegularExpression" {
        check.regex(&value);
    } else if value.is_set() {
        path_value(check, &value);
    }
    one_of(check, &entry.get("method"), METHODS);
    value_matches(check, &entry.get("headers"), true);
    value_matches(check, &entry.get("queryParams"), false);
}

fn path_value(check: &mut Check<'_>, at: &At<'_>) {
    let path = at.text();
    if !path.starts_with('/') {
        check.error(at, format!("{path:?} must begin with /"));
        return;
    }
    for bad in ["//", "/./", "/../", "%2f", "%2F", "#"] {
        if path.contains(bad) {
            check.error(at, format!("{path:?} may not contain {bad}"));
        }
    }
    if path.ends_with("/..") || path.ends_with("/.") {
        check.error(at, format!("{path:?} may not end with a dot segment"));
    }
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || b"-/._~!$&'()*+,;=:@%#".contains(&byte);
    if !path.bytes().all(allowed) {
        check.error(at, format!("{path:?} has bytes that a path has not"));
    }
}

fn value_matches(check: &mut Check<'_>, all: &At<'_>, headers: bool) {
    at_most(check, all, LIST);
    for entry in all.items() {
        one_of(check, &entry.get("type"), &["Exact", "RegularExpression"]);
        let name = entry.get("name");
        if required(check, &name) && !text::is_header_token(name.text()) {
            let what = if headers { "header" } else { "parameter" };
            check.error(
                &name,
                format!("{:?} is not the name of a {what}", name.text()),
            );
        }
        let value = entry.get("value");
        if required(check, &value) && entry.str("type") == "RegularExpression" {
            check.regex(&value);
        }
    }
}

/// Judges filters; the types that are there.
fn filters<'a>(check: &mut Check<'_>, all: &At<'a>, http: bool) -> BTreeSet<&'a str> {
    const FIELDS: &[(&str, &str)] = &[
        ("RequestHeaderModifier", "requestHeaderModifier"),
        ("ResponseHeaderModifier", "responseHeaderModifier"),
        ("RequestMirror", "requestMirror"),
        ("RequestRedirect", "requestRedirect"),
        ("URLRewrite", "urlRewrite"),
        ("CORS", "cors"),
        ("ExternalAuth", "externalAuth"),
        ("ExtensionRef", "extensionRef"),
    ];
    at_most(check, all, LIST);
    let mut kinds = BTreeSet::new();
    for filter in all.items() {
        let kind = filter.get("type");
        if !required(check, &kind) {
            continue;
        }
        let known = FIELDS.iter().any(|(name, _)| *name == kind.text())
            && (http
                || !matches!(
                    kind.text(),
                    "RequestRedirect" | "URLRewrite" | "CORS" | "ExternalAuth"
                ));
        if !known {
            check.error(
                &kind,
                format!("there is no filter of type {:?}", kind.text()),
            );
        }
        for (name, field) in FIELDS {
            if *name == kind.text() && !filter.has(field) {
                check.error(&filter.get(field), format!("missing; type {name} needs it"));
            }
            if *name != kind.text() && filter.has(field) {
                check.error(
                    &filter.get(field),
                    format!("is for type {name}, not {}", kind.text()),
                );
            }
        }
        let repeats = matches!(kind.text(), "RequestMirror" | "ExtensionRef");
        if !kinds.insert(kind.text()) && !repeats {
            check.error(&filter, format!("{} cannot be repeated", kind.text()));
        }
        for name in ["requestHeaderModifier", "responseHeaderModifier"] {
            modifier(check, &filter.get(name));
        }
        redirect(check, &filter.get("requestRedirect"));
        let rewrite = filter.get("urlRewrite");
        hostname(check, &rewrite.get("hostname"), false);
        path_modifier(check, &rewrite.get("path"));
        mirror(check, &filter.get("requestMirror"));
        cors(check, &filter.get("cors"));
    }
    if kinds.contains("RequestRedirect") && kinds.contains("URLRewrite") {
        check.error(all, "RequestRedirect and URLRewrite exclude each other");
    }
    kinds
}

fn modifier(check: &mut Check<'_>, at: &At<'_>) {
    for list in ["set", "add"] {
        let all = at.get(list);
        at_most(check, &all, LIST);
        for header in all.items() {
            let name = header.get("name");
            if required(check, &name) && !text::is_header_token(name.text()) {
                check.error(
                    &name,
                    format!("{:?} is not the name of a header", name.text()),
                );
            }
            required(check, &header.get("value"));
        }
    }
    at_most(check, &at.get("remove"), LIST);
}

fn redirect(check: &mut Check<'_>, at: &At<'_>) {
    one_of(check, &at.get("scheme"), &["http", "https"]);
    hostname(check, &at.get("hostname"), false);
    path_modifier(check, &at.get("path"));
    if at.has("port") {
        check.port(&at.get("port"));
    }
    let code = at.get("statusCode");
    if code.is_set() && !matches!(code.int(), 301 | 302 | 303 | 307 | 308) {
        check.error(
            &code,
            format!("{} is not 301, 302, 303, 307 or 308", code.int()),
        );
    }
}

fn path_modifier(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let kind = at.get("type");
    one_of(check, &kind, &["ReplaceFullPath", "ReplacePrefixMatch"]);
    required(check, &kind);
    for (name, field) in [
        ("ReplaceFullPath", "replaceFullPath"),
        ("ReplacePrefixMatch", "replacePrefixMatch"),
    ] {
        if kind.text() == name && !at.has(field) {
            check.error(&at.get(field), format!("missing; type {name} needs it"));
        }
        if kind.text() != name && at.has(field) {
            check.error(&at.get(field), format!("is for type {name}"));
        }
    }
}

fn mirror(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    backend_ref(check, &at.get("backendRef"));
    let (percent, fraction) = (at.get("percent"), at.get("fraction"));
    if percent.is_set() && fraction.is_set() {
        check.error(&fraction, "percent and fraction exclude each other");
    }
    if percent.is_set() {
        check.whole_percent(&percent);
    }
    if fraction.is_set() {
        let denominator = if fraction.has("denominator") {
            fraction.get("denominator").int()
        } else {
            100
        };
        let numerator = fraction.get("numerator").int();
        if denominator < 1 || !(0..=denominator).contains(&numerator) {
            check.error(
                &fraction,
                format!("{numerator} of {denominator} is not between 0 and 1"),
            );
        }
    }
}

fn cors(check: &mut Check<'_>, at: &At<'_>) {
    let origins = at.get("allowOrigins");
    at_most(check, &origins, 64);
    if origins.count() > 1 && origins.texts().contains(&"*") {
        check.error(&origins, "* is all origins; others beside it mean nothing");
    }
    for method in at.get("allowMethods").items() {
        if method.text() != "*" {
            one_of(check, &method, METHODS);
        }
    }
    if at.has("maxAge") && at.get("maxAge").int() < 1 {
        check.error(&at.get("maxAge"), "must be at least 1 second");
    }
}

fn backend_ref(check: &mut Check<'_>, at: &At<'_>) {
    required(check, &at.get("name"));
    let is_service = at.str("group").is_empty() && matches!(at.str("kind"), "" | "Service");
    if at.has("port") {
        check.port(&at.get("port"));
    } else if is_service {
        check.error(&at.get("port"), "missing; a Service needs it");
    }
    let weight = at.get("weight").int();
    if !(0..=WEIGHT).contains(&weight) {
        check.error(
            &at.get("weight"),
            format!("{weight} is not between 0 and {WEIGHT}"),
        );
    }
}

pub(super) fn grpc_route(check: &mut Check<'_>, spec: &At<'_>) {
    parents_and_hosts(check, spec);
    let rules = spec.get("rules");
    at_most(check, &rules, RULES);
    rule_names(check, &rules);
    let mut matches = 0;
    for rule in rules.items() {
        let all = rule.get("matches");
        at_most(check, &all, MATCHES);
        matches += all.count();
        for entry in all.items() {
            let method = entry.get("method");
            if method.is_set() {
                grpc_method(check, &method);
            }
            value_matches(check, &entry.get("headers"), true);
        }
        filters(check, &rule.get("filters"), false);
        let backends = rule.get("backendRefs");
        at_most(check, &backends, LIST);
        for backend in backends.items() {
            backend_ref(check, &backend);
            filters(check, &backend.get("filters"), false);
        }
    }
    if matches > MATCHES_OF_ALL_RULES {
        check.error(
            &rules,
            format!("{matches} matches of all rules are more than {MATCHES_OF_ALL_RULES}"),
        );
    }
}

fn grpc_method(check: &mut Check<'_>, at: &At<'_>) {
    one_of(check, &at.get("type"), &["Exact", "RegularExpression"]);
    let (service, method) = (at.get("service"), at.get("method"));
    if service.text().is_empty() && method.text().is_empty() {
        check.error(at, "service or method, or both, are required");
    }
    let word = |text: &str| {
        text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    if at.str("type") == "RegularExpression" {
        check.regex(&service);
        check.regex(&method);
        return;
    }
    let named = |text: &str| text.trim_start_matches('.').split('.').all(word);
    for (at, good) in [
        (&service, named(service.text())),
        (&method, word(method.text())),
    ] {
        if !at.text().is_empty() && !good {
            check.error(
                at,
                format!(
                    "{:?} is not the name of a gRPC service or method",
                    at.text()
                ),
            );
        }
    }
}

pub(super) fn tcp_route(check: &mut Check<'_>, spec: &At<'_>, tls: bool) {
    parents_and_hosts(check, spec);
    let rules = spec.get("rules");
    some(check, &rules, RULES);
    rule_names(check, &rules);
    if !tls && spec.has("hostnames") {
        check.error(&spec.get("hostnames"), "is not for TCPRoute");
    }
    for rule in rules.items() {
        let backends = rule.get("backendRefs");
        some(check, &backends, LIST);
        for backend in backends.items() {
            backend_ref(check, &backend);
        }
    }
}
