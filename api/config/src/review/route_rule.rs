//! `config.istio.io/v1alpha2` of 0.x: RouteRule, DestinationPolicy, EgressRule.

use super::{At, Check, quota, text};
use text::Protocol;

/// No span of time in these kinds is longer.
const HOUR_NANOS: i128 = 3600 * 1_000_000_000;

pub(super) fn route_rule(check: &mut Check<'_>, spec: &At<'_>) {
    let destination = spec.get("destination");
    if destination.is_set() {
        service(check, &destination);
    } else {
        check.error(&destination, "missing; it is required");
    }
    if destination.get("labels").count() > 0 {
        check.error(&destination.get("labels"), "labels belong to spec.route");
    }
    matcher(check, &spec.get("match"));
    if spec.has("match") && spec.get("match").has("udp") {
        check.error(&spec.get("match").get("udp"), "UDP is not routed");
    }
    redirect_and_rewrite(check, spec);
    weights(check, &spec.get("route"));
    http_fault(check, &spec.get("httpFault"));
    l4_fault(check, &spec.get("l4Fault"));
    if spec.has("httpFault") && spec.has("l4Fault") {
        check.error(
            &spec.get("l4Fault"),
            "httpFault and l4Fault exclude each other",
        );
    }
    let timeout = spec.get("httpReqTimeout").get("simpleTimeout");
    if timeout.is_set() {
        span(check, &timeout.get("timeout"));
    }
    let retry = spec.get("httpReqRetries").get("simpleRetry");
    if retry.is_set() {
        check.not_negative(&retry, &["attempts"]);
        span(check, &retry.get("perTryTimeout"));
    }
    if spec.has("mirror") {
        service(check, &spec.get("mirror"));
    }
    for (name, value) in spec.get("appendHeaders").entries() {
        header(check, &value, name);
        if value.text().is_empty() {
            check.error(&value, "may not be empty");
        }
    }
    cors(check, &spec.get("corsPolicy"));
}

/// A service by its parts, or whole.
fn service(check: &mut Check<'_>, at: &At<'_>) {
    quota::istio_service(check, at);
}

/// At least a millisecond, whole ones, at most an hour.
fn span(check: &mut Check<'_>, at: &At<'_>) {
    check.duration(at);
    if at.nanos().is_some_and(|nanos| nanos > HOUR_NANOS) {
        check.error(at, format!("{} is more than an hour", at.text()));
    }
}

/// Header names are in lower case here.
fn header(check: &mut Check<'_>, at: &At<'_>, name: &str) {
    if !text::is_header_name(name) || name.contains(|c: char| c.is_ascii_uppercase() || c == '_') {
        check.error(at, format!("{name:?} is not a header name in lower case"));
    }
}

fn matcher(check: &mut Check<'_>, at: &At<'_>) {
    if at.has("source") {
        service(check, &at.get("source"));
    }
    for name in ["tcp", "udp"] {
        let l4 = at.get(name);
        for subnet in l4
            .get("sourceSubnet")
            .items()
            .chain(l4.get("destinationSubnet").items())
        {
            check.subnet(&subnet);
        }
    }
    for (name, value) in at.get("request").get("headers").entries() {
        if !matches!(name, "uri" | "scheme" | "method" | "authority") {
            header(check, &value, name);
        }
        match ["exact", "prefix", "regex"]
            .into_iter()
            .find(|kind| value.has(kind))
        {
            Some("regex") => check.regex(&value.get("regex")),
            Some(kind) if value.str(kind).is_empty() => {
                check.error(&value.get(kind), "may not be empty")
            }
            Some(_) => {}
            None => check.error(&value, "one of exact, prefix and regex is required"),
        }
    }
}

fn redirect_and_rewrite(check: &mut Check<'_>, spec: &At<'_>) {
    let (redirect, rewrite) = (spec.get("redirect"), spec.get("rewrite"));
    for at in [&redirect, &rewrite] {
        if at.is_set() && at.str("uri").is_empty() && at.str("authority").is_empty() {
            check.error(at, "one of uri and authority is required");
        }
    }
    if redirect.is_set() {
        for name in ["route", "httpFault", "rewrite"] {
            if spec.has(name) {
                check.error(
                    &spec.get(name),
                    format!("redirect and {name} exclude each other"),
                );
            }
        }
        if spec.flag("websocketUpgrade") {
            check.error(
                &spec.get("websocketUpgrade"),
                "WebSockets cannot be redirected",
            );
        }
    }
}

fn weights(check: &mut Check<'_>, routes: &At<'_>) {
    let mut total = 0;
    for route in routes.items() {
        if route.has("destination") {
            service(check, &route.get("destination"));
        }
        check.labels(&route.get("labels"));
        let weight = route.get("weight");
        check.whole_percent(&weight);
        total += weight.int();
    }
    let alone = routes.count() == 1 && total == 0;
    if routes.count() > 0 && total != 100 && !alone {
        check.error(routes, format!("the weights add up to {total}, not 100"));
    }
}

fn share(check: &mut Check<'_>, at: &At<'_>) {
    let value = at.number();
    if !(0.0..=100.0).contains(&value) {
        check.error(at, format!("{value} is not between 0 and 100"));
    }
}

fn http_fault(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (delay, abort) = (at.get("delay"), at.get("abort"));
    if !delay.is_set() && !abort.is_set() {
        check.error(at, "at least one of abort and delay is required");
    }
    share(check, &delay.get("percent"));
    share(check, &abort.get("percent"));
    if delay.is_set() {
        span(check, &delay.get("fixedDelay"));
        if delay.has("exponentialDelay") {
            check.error(
                &delay.get("exponentialDelay"),
                "exponential delays cannot be injected; use fixedDelay",
            );
        }
    }
    if abort.has("grpcStatus") || abort.has("http2Error") {
        check.error(&abort, "only httpStatus can be injected");
    } else if abort.is_set() && !(200..=599).contains(&abort.get("httpStatus").int()) {
        let status = abort.get("httpStatus");
        check.error(
            &status,
            format!("{} is not an HTTP status between 200 and 599", status.int()),
        );
    }
}

fn l4_fault(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (throttle, terminate) = (at.get("throttle"), at.get("terminate"));
    if !throttle.is_set() && !terminate.is_set() {
        check.error(at, "at least one of throttle and terminate is required");
    }
    share(check, &throttle.get("percent"));
    share(check, &terminate.get("percent"));
    check.not_negative(&throttle, &["downstreamLimitBps", "upstreamLimitBps"]);
    for name in ["throttleAfterPeriod", "throttleForPeriod"] {
        span(check, &throttle.get(name));
    }
    span(check, &terminate.get("terminateAfterPeriod"));
}

fn cors(check: &mut Check<'_>, at: &At<'_>) {
    for method in at.get("allowMethods").items() {
        if !matches!(
            method.text(),
            "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "CONNECT" | "OPTIONS" | "TRACE"
        ) {
            check.error(
                &method,
                format!("{:?} is not an HTTP method", method.text()),
            );
        }
    }
    for name in at
        .get("allowHeaders")
        .items()
        .chain(at.get("exposeHeaders").items())
    {
        header(check, &name, name.text());
    }
    let max_age = at.get("maxAge");
    span(check, &max_age);
    if max_age
        .nanos()
        .is_some_and(|nanos| nanos % 1_000_000_000 != 0)
    {
        check.error(
            &max_age,
            format!("{} is not a whole number of seconds", max_age.text()),
        );
    }
}

pub(super) fn destination_policy(check: &mut Check<'_>, spec: &At<'_>) {
    let destination = spec.get("destination");
    if destination.is_set() {
        service(check, &destination);
    } else {
        check.error(&destination, "missing; it is required");
    }
    if spec.has("source") {
        service(check, &spec.get("source"));
    }
    let breaker = spec.get("circuitBreaker").get("simpleCb");
    check.not_negative(
        &breaker,
        &[
            "maxConnections",
            "httpMaxPendingRequests",
            "httpMaxRequests",
            "httpConsecutiveErrors",
            "httpMaxRequestsPerConnection",
            "httpMaxRetries",
        ],
    );
    check.whole_percent(&breaker.get("httpMaxEjectionPercent"));
    for name in ["sleepWindow", "httpDetectionInterval"] {
        span(check, &breaker.get(name));
    }
}

pub(super) fn egress_rule(check: &mut Check<'_>, spec: &At<'_>) {
    let destination = spec.get("destination");
    let host = destination.get("service");
    for name in ["name", "namespace", "domain", "labels"] {
        if destination.has(name) {
            check.error(
                &destination.get(name),
                "an outside host is named by service only",
            );
        }
    }
    let by_address = text::is_subnet(host.text());
    if !by_address && host.text() != "*" && !text::is_wildcard_domain(host.text()) {
        check.error(
            &host,
            format!("{:?} is neither a host name nor an address", host.text()),
        );
    }
    let ports = spec.get("ports");
    if ports.count() == 0 {
        check.error(&ports, "at least one port is required");
    }
    let mut seen: Vec<(i64, &str)> = Vec::new();
    for port in ports.items() {
        let (number, protocol) = (port.get("port").int(), port.str("protocol"));
        check.port(&port.get("port"));
        let kind = text::protocol(protocol);
        if !matches!(kind, Protocol::Http | Protocol::Tls | Protocol::Tcp) {
            check.error(
                &port.get("protocol"),
                format!(
                    "{protocol:?} is not a protocol of egress; use http, http2, grpc, https or tcp"
                ),
            );
        }
        if seen.iter().any(|(other, _)| *other == number) {
            check.error(&port.get("port"), format!("port {number} is there twice"));
        }
        seen.push((number, protocol));
        let is_block = host.text().contains('/');
        if is_block && kind != Protocol::Tcp {
            check.error(&port.get("protocol"), "a CIDR block is reached by TCP only");
        }
        if kind == Protocol::Tcp && !by_address {
            check.error(
                &port.get("protocol"),
                "TCP goes to an address or CIDR block, not to a name",
            );
        }
    }
    if spec.flag("useEgressProxy") {
        check.error(
            &spec.get("useEgressProxy"),
            "there is no egress proxy of its own; remove it",
        );
    }
}
