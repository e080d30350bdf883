//! VirtualService: hosts, routes, what goes together and what does not.

use std::collections::BTreeSet;

use indexmap::IndexMap;

use crate::networking::{
    CorsPolicy, Destination, Headers, HttpFault, HttpMatch, HttpRetry, HttpRoute, TcpDestination,
    TcpRoute, TlsRoute, VirtualService,
};
use crate::value::StringMatch;

use super::{Check, is_dns_label, is_subnet};

/// Envoy's retry conditions, HTTP and gRPC.
const RETRY_CONDITIONS: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

pub(super) fn virtual_service(check: &mut Check<'_>, spec: &VirtualService) {
    let is_delegate = spec.hosts.is_empty();
    if is_delegate && (spec.http.is_empty() || !spec.gateways.is_empty()) {
        check.error("spec.hosts", "at least one host is required");
    }
    let binds_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|name| name == "mesh");
    let mut seen = BTreeSet::new();
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        check.host(field.clone(), host, true);
        if host == "*" && binds_mesh {
            check.error(
                &*field,
                "\"*\" is for gateways only, and this binds the mesh",
            );
        }
        if !seen.insert(host.to_ascii_lowercase()) {
            check.error(field, format!("{host:?} is listed twice"));
        }
    }
    for (index, gateway) in spec.gateways.iter().enumerate() {
        gateway_name(check, format!("spec.gateways[{index}]"), gateway);
    }
    if spec.http.is_empty() && spec.tls.is_empty() && spec.tcp.is_empty() {
        check.error("spec", "one of http, tls and tcp is required");
    }
    check.export_to(&spec.export_to, false);
    for (index, route) in spec.http.iter().enumerate() {
        http_route(check, &format!("spec.http[{index}]"), route, is_delegate);
        if index + 1 < spec.http.len()
            && (route.matches.is_empty() || route.matches.iter().any(matches_everything))
        {
            check.warn(
                format!("spec.http[{}]", index + 1),
                format!("never reached: http[{index}] matches everything"),
            );
        }
    }
    for (index, route) in spec.tls.iter().enumerate() {
        tls_route(check, &format!("spec.tls[{index}]"), route, &spec.hosts);
    }
    for (index, route) in spec.tcp.iter().enumerate() {
        tcp_route(check, &format!("spec.tcp[{index}]"), route);
    }
}

fn matches_everything(entry: &HttpMatch) -> bool {
    let path = match &entry.uri {
        None => true,
        Some(StringMatch::Prefix(prefix)) => prefix == "/",
        Some(StringMatch::Regex(regex)) => regex == ".*" || regex == "*",
        Some(_) => false,
    };
    let rest = HttpMatch {
        uri: None,
        name: String::new(),
        stat_prefix: String::new(),
        ignore_uri_case: false,
        ..entry.clone()
    };
    path && rest == HttpMatch::default()
}

fn gateway_name(check: &mut Check<'_>, field: String, name: &str) {
    if name == "mesh" {
        return;
    }
    let ok = match name.split_once('/') {
        Some((namespace, name)) => {
            is_dns_label(namespace) && !name.is_empty() && !name.contains('/')
        }
        // Names with dots (the old `NAME.NAMESPACE` form) are still about.
        None => !name.is_empty() && name.split('.').all(is_dns_label),
    };
    if !ok {
        check.error(field, format!("{name:?} is not NAME or NAMESPACE/NAME"));
    }
}

fn http_route(check: &mut Check<'_>, field: &str, route: &HttpRoute, is_delegate: bool) {
    if route.delegate.is_some() {
        if is_delegate {
            check.error(format!("{field}.delegate"), "a delegate may not delegate");
        }
        if !route.route.is_empty() || route.redirect.is_some() || route.direct_response.is_some() {
            check.error(
                format!("{field}.delegate"),
                "a route that delegates has no route, redirect or directResponse",
            );
        }
        check.warn(
            format!("{field}.delegate"),
            "delegation is not supported by this version; the route is left out",
        );
    }
    match (&route.redirect, &route.direct_response) {
        (Some(redirect), None) => {
            if !route.route.is_empty() {
                check.error(
                    format!("{field}.redirect"),
                    "a route is either redirected or sent somewhere",
                );
            }
            if route.fault.is_some() {
                check.error(format!("{field}.fault"), "a redirect has no fault");
            }
            if route.rewrite.is_some() {
                check.error(format!("{field}.rewrite"), "a redirect has no rewrite");
            }
            if redirect.uri.is_empty()
                && redirect.authority.is_empty()
                && redirect.scheme.is_empty()
                && redirect.port.is_none()
                && redirect.derive_port.is_none()
            {
                check.error(
                    format!("{field}.redirect"),
                    "one of uri, authority, scheme and port is required",
                );
            }
            if !matches!(redirect.redirect_code, 0 | 301 | 302 | 303 | 307 | 308) {
                check.error(
                    format!("{field}.redirect.redirectCode"),
                    format!(
                        "{} is not 301, 302, 303, 307 or 308",
                        redirect.redirect_code
                    ),
                );
            }
            if !matches!(redirect.scheme.as_str(), "" | "http" | "https") {
                check.error(format!("{field}.redirect.scheme"), "must be http or https");
            }
            if let Some(port) = redirect.port {
                check.port(format!("{field}.redirect.port"), port);
            }
        }
        (None, Some(response)) => {
            if !route.route.is_empty() {
                check.error(
                    format!("{field}.directResponse"),
                    "a route is either answered at once or sent somewhere",
                );
            }
            if route.fault.is_some()
                || route.rewrite.is_some()
                || !route.mirrors.is_empty()
                || route.mirror.is_some()
            {
                check.error(
                    format!("{field}.directResponse"),
                    "a direct response has no fault, rewrite or mirror",
                );
            }
            if !(200..=599).contains(&response.status) {
                check.error(
                    format!("{field}.directResponse.status"),
                    format!("{} is not between 200 and 599", response.status),
                );
            }
            if let Some(body) = &response.body {
                let length = body
                    .string
                    .as_deref()
                    .or(body.bytes.as_deref())
                    .map_or(0, str::len);
                if length > 1 << 20 {
                    check.error(
                        format!("{field}.directResponse.body"),
                        "may not be larger than 1 MiB",
                    );
                }
                if body.string.is_some() && body.bytes.is_some() {
                    check.error(
                        format!("{field}.directResponse.body"),
                        "string and bytes exclude each other",
                    );
                }
            }
        }
        (Some(_), Some(_)) => {
            check.error(field, "redirect and directResponse exclude each other");
        }
        (None, None) => {
            if route.route.is_empty() && route.delegate.is_none() {
                check.error(
                    field,
                    "one of route, redirect, directResponse and delegate is required",
                );
            }
        }
    }
    for (index, entry) in route.matches.iter().enumerate() {
        http_match(check, &format!("{field}.match[{index}]"), entry);
    }
    let total: i64 = route.route.iter().map(|to| i64::from(to.weight)).sum();
    for (index, to) in route.route.iter().enumerate() {
        let field = format!("{field}.route[{index}]");
        weight(check, &field, to.weight, route.route.len(), total);
        destination(check, &format!("{field}.destination"), &to.destination);
        headers(check, &format!("{field}.headers"), &to.headers);
        old_headers(
            check,
            &field,
            &to.append_request_headers,
            &to.append_response_headers,
        );
    }
    if let Some(rewrite) = &route.rewrite {
        let field = format!("{field}.rewrite");
        match &rewrite.uri_regex_rewrite {
            Some(regex) => {
                if !rewrite.uri.is_empty() {
                    check.error(&*field, "uri and uriRegexRewrite exclude each other");
                }
                check.regex(format!("{field}.uriRegexRewrite.match"), &regex.pattern);
            }
            None if rewrite.uri.is_empty() && rewrite.authority.is_empty() => {
                check.error(
                    field,
                    "one of uri, authority and uriRegexRewrite is required",
                );
            }
            None => {}
        }
    }
    // Zero switches the timeout off; anything else must be a duration Envoy takes.
    check.duration(
        format!("{field}.timeout"),
        route.timeout.filter(|timeout| !timeout.0.is_zero()),
    );
    if let Some(policy) = &route.retries {
        retries(check, &format!("{field}.retries"), policy);
    }
    if let Some(policy) = &route.fault {
        fault(check, &format!("{field}.fault"), policy);
    }
    if let Some(mirror) = &route.mirror {
        destination(check, &format!("{field}.mirror"), mirror);
        if !route.mirrors.is_empty() {
            check.error(
                format!("{field}.mirrors"),
                "mirror and mirrors exclude each other",
            );
        }
    }
    for (index, mirror) in route.mirrors.iter().enumerate() {
        destination(
            check,
            &format!("{field}.mirrors[{index}].destination"),
            &mirror.destination,
        );
        check.percent(
            format!("{field}.mirrors[{index}].percentage"),
            mirror.percentage,
        );
    }
    check.percent(format!("{field}.mirrorPercentage"), route.mirror_percentage);
    check.whole_percent(
        format!("{field}.mirrorPercent"),
        route.mirror_percent.map(i64::from),
    );
    if let Some(policy) = &route.cors_policy {
        cors(check, &format!("{field}.corsPolicy"), policy);
    }
    headers(check, &format!("{field}.headers"), &route.headers);
    old_headers(
        check,
        field,
        &route.append_headers,
        &route.append_response_headers,
    );
    old_headers(
        check,
        field,
        &route.append_request_headers,
        &IndexMap::new(),
    );
}

fn http_match(check: &mut Check<'_>, field: &str, entry: &HttpMatch) {
    for (name, matcher) in [
        ("uri", &entry.uri),
        ("scheme", &entry.scheme),
        ("method", &entry.method),
        ("authority", &entry.authority),
    ] {
        if let Some(matcher) = matcher {
            check.string_match(format!("{field}.{name}"), matcher);
            if *matcher == StringMatch::Present {
                check.error(
                    format!("{field}.{name}"),
                    "one of exact, prefix and regex is required",
                );
            }
        }
    }
    for (name, matcher) in &entry.headers {
        check.header_name(format!("{field}.headers.{name}"), name);
        check.string_match(format!("{field}.headers.{name}"), matcher);
        if name.starts_with("@request.auth.") {
            check.warn(
                format!("{field}.headers.{name}"),
                "routing by claims is not supported by this version; never matches",
            );
        }
    }
    for (name, matcher) in &entry.without_headers {
        check.header_name(format!("{field}.withoutHeaders.{name}"), name);
        if !matches!(matcher, StringMatch::Regex(regex) if regex == "*") {
            check.string_match(format!("{field}.withoutHeaders.{name}"), matcher);
        }
    }
    for (name, matcher) in &entry.query_params {
        if name.is_empty() {
            check.error(
                format!("{field}.queryParams"),
                "a parameter name may not be empty",
            );
        }
        check.string_match(format!("{field}.queryParams.{name}"), matcher);
    }
    if entry.port != 0 {
        check.port(format!("{field}.port"), entry.port);
    }
    check.labels(&format!("{field}.sourceLabels"), &entry.source_labels);
    for (index, gateway) in entry.gateways.iter().enumerate() {
        gateway_name(check, format!("{field}.gateways[{index}]"), gateway);
    }
}

fn weight(check: &mut Check<'_>, field: &str, weight: i32, count: usize, total: i64) {
    if weight < 0 {
        check.error(format!("{field}.weight"), "may not be negative");
    } else if count > 1 && total == 0 {
        check.error(format!("{field}.weight"), "the weights add up to 0");
    } else if total > i64::from(u32::MAX) {
        check.error(
            format!("{field}.weight"),
            "the weights add up to more than 4294967295",
        );
    }
}

fn destination(check: &mut Check<'_>, field: &str, to: &Destination) {
    if to.host == "*" {
        check.error(format!("{field}.host"), "\"*\" is no destination");
    } else {
        check.host(format!("{field}.host"), &to.host, true);
    }
    if !to.subset.is_empty() && !to.subset.split('.').all(is_dns_label) {
        check.error(
            format!("{field}.subset"),
            format!("{:?} is not a subset name", to.subset),
        );
    }
    if let Some(port) = &to.port {
        check.port(format!("{field}.port.number"), port.number);
    }
}

fn headers(check: &mut Check<'_>, field: &str, headers: &Headers) {
    for (side, operations) in [
        ("request", &headers.request),
        ("response", &headers.response),
    ] {
        for (verb, values) in [("set", &operations.set), ("add", &operations.add)] {
            for (name, value) in values {
                check.header_value(format!("{field}.{side}.{verb}.{name}"), value);
                check.header_name(format!("{field}.{side}.{verb}.{name}"), name);
                if name.starts_with(':')
                    && !(verb == "set" && name.eq_ignore_ascii_case(":authority"))
                {
                    check.error(
                        format!("{field}.{side}.{verb}.{name}"),
                        "of the pseudo headers only :authority may be set",
                    );
                }
            }
        }
        for (index, name) in operations.remove.iter().enumerate() {
            check.header_name(format!("{field}.{side}.remove[{index}]"), name);
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                check.error(
                    format!("{field}.{side}.remove[{index}]"),
                    format!("{name} may not be removed"),
                );
            }
        }
    }
}

fn old_headers(
    check: &mut Check<'_>,
    field: &str,
    request: &IndexMap<String, String>,
    response: &IndexMap<String, String>,
) {
    for name in request.keys().chain(response.keys()) {
        check.header_name(field.to_owned(), name);
    }
}

fn retries(check: &mut Check<'_>, field: &str, policy: &HttpRetry) {
    if policy.attempts < 0 {
        check.error(format!("{field}.attempts"), "may not be negative");
    }
    if policy.attempts == 0 && (policy.per_try_timeout.is_some() || !policy.retry_on.is_empty()) {
        check.error(
            format!("{field}.attempts"),
            "0 attempts, yet perTryTimeout or retryOn is set",
        );
    }
    check.duration(
        format!("{field}.perTryTimeout"),
        policy.per_try_timeout.filter(|time| !time.0.is_zero()),
    );
    check.duration(format!("{field}.backoff"), policy.backoff);
    for condition in policy
        .retry_on
        .split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty())
    {
        let known = RETRY_CONDITIONS.contains(&condition)
            || condition
                .parse::<u16>()
                .is_ok_and(|status| (100..600).contains(&status));
        if !known {
            check.error(
                format!("{field}.retryOn"),
                format!("{condition:?} is neither a retry condition nor a status code"),
            );
        }
    }
}

fn fault(check: &mut Check<'_>, field: &str, policy: &HttpFault) {
    if policy.delay.is_none() && policy.abort.is_none() {
        check.error(field, "one of delay and abort is required");
    }
    if let Some(delay) = &policy.delay {
        let field = format!("{field}.delay");
        match (delay.fixed_delay, delay.exponential_delay) {
            (Some(fixed), _) => check.duration(format!("{field}.fixedDelay"), Some(fixed)),
            (None, Some(_)) => check.error(
                format!("{field}.exponentialDelay"),
                "not supported; use fixedDelay",
            ),
            (None, None) => check.error(&*field, "fixedDelay is required"),
        }
        check.percent(format!("{field}.percentage"), delay.percentage);
        check.whole_percent(format!("{field}.percent"), delay.percent.map(i64::from));
    }
    if let Some(abort) = &policy.abort {
        let field = format!("{field}.abort");
        match (abort.http_status, &abort.grpc_status, &abort.http2_error) {
            (Some(status), None, None) => {
                if !(200..=600).contains(&status) {
                    check.error(
                        format!("{field}.httpStatus"),
                        format!("{status} is not between 200 and 600"),
                    );
                }
            }
            (None, Some(status), None) => {
                if crate::value::grpc_status(status).is_none() {
                    check.error(
                        format!("{field}.grpcStatus"),
                        format!("{status:?} is not a gRPC status"),
                    );
                }
            }
            (_, _, Some(_)) => check.error(
                format!("{field}.http2Error"),
                "not supported; use httpStatus",
            ),
            (None, None, None) => {
                check.error(&*field, "one of httpStatus and grpcStatus is required")
            }
            (Some(_), Some(_), None) => {
                check.error(&*field, "httpStatus and grpcStatus exclude each other")
            }
        }
        check.percent(format!("{field}.percentage"), abort.percentage);
        check.whole_percent(format!("{field}.percent"), abort.percent.map(i64::from));
    }
}

fn cors(check: &mut Check<'_>, field: &str, policy: &CorsPolicy) {
    for (index, origin) in policy.allow_origins.iter().enumerate() {
        let field = format!("{field}.allowOrigins[{index}]");
        check.string_match(field.clone(), origin);
        if *origin == StringMatch::Present {
            check.error(field, "one of exact, prefix and regex is required");
        }
    }
    for (index, method) in policy.allow_methods.iter().enumerate() {
        let known = matches!(
            method.as_str(),
            "GET"
                | "HEAD"
                | "POST"
                | "PUT"
                | "PATCH"
                | "DELETE"
                | "CONNECT"
                | "OPTIONS"
                | "TRACE"
                | "*"
        );
        if !known {
            check.error(
                format!("{field}.allowMethods[{index}]"),
                format!("{method:?} is not an HTTP method"),
            );
        }
    }
    for (index, name) in policy.allow_headers.iter().enumerate() {
        check.header_name(format!("{field}.allowHeaders[{index}]"), name);
    }
    for (index, name) in policy.expose_headers.iter().enumerate() {
        check.header_name(format!("{field}.exposeHeaders[{index}]"), name);
    }
    if let Some(age) = policy.max_age
        && age.0.subsec_nanos() != 0
    {
        check.error(format!("{field}.maxAge"), "must be whole seconds");
    }
    if !matches!(
        policy.unmatched_preflights.as_str(),
        "" | "UNSPECIFIED" | "FORWARD" | "IGNORE"
    ) {
        check.error(
            format!("{field}.unmatchedPreflights"),
            "must be FORWARD or IGNORE",
        );
    }
}

fn tcp_destinations(check: &mut Check<'_>, field: &str, route: &[TcpDestination]) {
    if route.is_empty() {
        check.error(
            format!("{field}.route"),
            "at least one destination is required",
        );
    }
    let total: i64 = route.iter().map(|to| i64::from(to.weight)).sum();
    for (index, to) in route.iter().enumerate() {
        let field = format!("{field}.route[{index}]");
        weight(check, &field, to.weight, route.len(), total);
        destination(check, &format!("{field}.destination"), &to.destination);
    }
}

fn subnets(check: &mut Check<'_>, field: &str, list: &[String]) {
    for (index, subnet) in list.iter().enumerate() {
        if !is_subnet(subnet) {
            check.error(
                format!("{field}[{index}]"),
                format!("{subnet:?} is not an address or CIDR"),
            );
        }
    }
}

fn tls_route(check: &mut Check<'_>, field: &str, route: &TlsRoute, hosts: &[String]) {
    if route.matches.is_empty() {
        check.error(
            format!("{field}.match"),
            "at least one match with sniHosts is required",
        );
    }
    for (index, entry) in route.matches.iter().enumerate() {
        let field = format!("{field}.match[{index}]");
        if entry.sni_hosts.is_empty() {
            check.error(format!("{field}.sniHosts"), "at least one is required");
        }
        for (index, sni) in entry.sni_hosts.iter().enumerate() {
            let field = format!("{field}.sniHosts[{index}]");
            check.host(field.clone(), sni, false);
            if !hosts.iter().any(|host| covers(host, sni)) {
                check.error(
                    field,
                    format!("{sni:?} is not among the hosts of this VirtualService"),
                );
            }
        }
        subnets(
            check,
            &format!("{field}.destinationSubnets"),
            &entry.destination_subnets,
        );
        if entry.port != 0 {
            check.port(format!("{field}.port"), entry.port);
        }
        check.labels(&format!("{field}.sourceLabels"), &entry.source_labels);
        for (index, gateway) in entry.gateways.iter().enumerate() {
            gateway_name(check, format!("{field}.gateways[{index}]"), gateway);
        }
    }
    tcp_destinations(check, field, &route.route);
}

/// Whether every name `inner` stands for is one `outer` stands for.
fn covers(outer: &str, inner: &str) -> bool {
    outer == "*"
        || outer.eq_ignore_ascii_case(inner)
        || outer.strip_prefix('*').is_some_and(|suffix| {
            inner
                .to_ascii_lowercase()
                .ends_with(&suffix.to_ascii_lowercase())
        })
}

fn tcp_route(check: &mut Check<'_>, field: &str, route: &TcpRoute) {
    for (index, entry) in route.matches.iter().enumerate() {
        let field = format!("{field}.match[{index}]");
        subnets(
            check,
            &format!("{field}.destinationSubnets"),
            &entry.destination_subnets,
        );
        if !entry.source_subnet.is_empty() && !is_subnet(&entry.source_subnet) {
            check.error(format!("{field}.sourceSubnet"), "not an address or CIDR");
        }
        if entry.port != 0 {
            check.port(format!("{field}.port"), entry.port);
        }
        check.labels(&format!("{field}.sourceLabels"), &entry.source_labels);
        for (index, gateway) in entry.gateways.iter().enumerate() {
            gateway_name(check, format!("{field}.gateways[{index}]"), gateway);
        }
    }
    tcp_destinations(check, field, &route.route);
}
