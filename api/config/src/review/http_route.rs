//! HTTP routes of a VirtualService: matches and actions.

use super::virtual_service::{destinations, match_common};
use super::{At, Check, text};

/// HTTP statuses with a name; `retryOn` takes them.
const STATUSES: &[u16] = &[
    100, 101, 102, 103, 200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304,
    305, 307, 308, 400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415,
    416, 417, 418, 421, 422, 423, 424, 425, 426, 428, 429, 431, 451, 500, 501, 502, 503, 504, 505,
    506, 507, 508, 510, 511,
];

/// Envoy: x-envoy-retry-on and x-envoy-retry-grpc-on.
const RETRY_ON: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

const METHODS: &[&str] = &[
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE",
];

const GRPC_STATUSES: &[&str] = &[
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
];

/// A direct response longer than this is refused; one longer than [`LARGE_BODY_BYTES`] is doubtful,
/// for every proxy is sent it.
const BODY_LIMIT_BYTES: usize = 1 << 20;
const LARGE_BODY_BYTES: usize = 100 << 10;

pub(super) fn http_route(check: &mut Check<'_>, route: &At<'_>, delegate: bool) {
    conflicts(check, route, delegate);
    for matcher in route.get("match").items() {
        http_match(check, &matcher);
    }
    header_operations(check, &route.get("headers"));
    old_header_operations(check, route);
    cors(check, &route.get("corsPolicy"));
    fault(check, &route.get("fault"));
    mirrors(check, route);
    redirect(check, &route.get("redirect"));
    direct_response(check, &route.get("directResponse"));
    retries(check, &route.get("retries"));
    rewrite(check, route);
    destinations(check, &route.get("route"), true);
    check.duration(&route.get("timeout"));
}

fn conflicts(check: &mut Check<'_>, route: &At<'_>, delegate: bool) {
    let has = |name: &str| route.has(name);
    let routes = route.get("route").count() > 0;
    if has("delegate") && !delegate {
        for name in ["redirect", "route"] {
            if has(name) && (name == "redirect" || routes) {
                check.error(
                    &route.get(name),
                    "a route that delegates has no actions of its own; keep delegate or this",
                );
            }
        }
        return;
    }
    if has("delegate") {
        check.error(
            &route.get("delegate"),
            "a delegate (a VirtualService without hosts) cannot delegate again",
        );
    }
    let action = if has("redirect") {
        "redirect"
    } else if has("directResponse") {
        "directResponse"
    } else {
        ""
    };
    if !action.is_empty() {
        for name in ["route", "fault", "rewrite", "directResponse"] {
            if name != action && (has(name) && name != "route" || name == "route" && routes) {
                check.error(
                    &route.get(name),
                    format!("{action} and {name} exclude each other"),
                );
            }
        }
    } else if !routes {
        check.error(
            &route.get("route"),
            "one of route, redirect and directResponse is required",
        );
    }
    if has("mirror") && route.get("mirrors").count() > 0 {
        check.error(
            &route.get("mirror"),
            "mirror and mirrors exclude each other; keep mirrors",
        );
    }
}

fn http_match(check: &mut Check<'_>, at: &At<'_>) {
    for (name, matcher) in at.get("headers").entries() {
        match_header_name(check, &matcher, name);
        string_match(check, &matcher);
    }
    for (name, matcher) in at.get("withoutHeaders").entries() {
        match_header_name(check, &matcher, name);
        // "*" here means that the header is present at all.
        if matcher.str("regex") != "*" {
            string_match(check, &matcher);
        }
    }
    // An empty prefix is every path; Envoy takes it for paths only.
    if at.get("uri").has("regex") {
        check.regex(&at.get("uri").get("regex"));
    }
    for name in ["scheme", "method", "authority"] {
        string_match(check, &at.get(name));
    }
    for (_, matcher) in at.get("queryParams").entries() {
        string_match(check, &matcher);
    }
    match_common(check, at);
    let namespace = at.get("sourceNamespace");
    if !namespace.text().is_empty() && !text::is_dns_label(namespace.text()) {
        check.error(
            &namespace,
            format!("{:?} is not a namespace", namespace.text()),
        );
    }
}

fn match_header_name(check: &mut Check<'_>, at: &At<'_>, name: &str) {
    if !text::is_claim_route(name) && !text::is_header_token(name) {
        check.error(at, format!("{name:?} is not a header name"));
    }
}

fn string_match(check: &mut Check<'_>, at: &At<'_>) {
    let prefix = at.get("prefix");
    if prefix.is_set() && prefix.text().is_empty() {
        check.error(
            &prefix,
            "an empty prefix matches everything; remove the condition",
        );
    }
    let regex = at.get("regex");
    if regex.is_set() {
        check.regex(&regex);
    }
}

/// `headers.request` and `headers.response`: set, add, remove.
pub(super) fn header_operations(check: &mut Check<'_>, headers: &At<'_>) {
    for (side, in_request) in [("request", true), ("response", false)] {
        let operations = headers.get(side);
        for (name, value) in operations
            .get("add")
            .entries()
            .chain(operations.get("set").entries())
        {
            let authority = is_authority(name);
            if name.is_empty() {
                check.error(&value, "a header name may not be empty");
            } else if is_internal(name) && !(in_request && authority) {
                check.error(
                    &value,
                    format!("{name:?} cannot be set; use rewrite.authority for the host"),
                );
            }
            if let Some(fault) = text::header_value_fault(value.text()) {
                check.error(&value, fault);
            }
        }
        for name in operations.get("remove").items() {
            if name.text().is_empty() {
                check.error(&name, "a header name may not be empty");
            } else if is_internal(name.text()) {
                check.error(&name, format!("{:?} cannot be removed", name.text()));
            }
        }
    }
}

/// The same operations as 1.1 to 1.4 wrote them.
pub(super) fn old_header_operations(check: &mut Check<'_>, at: &At<'_>) {
    for name in [
        "appendHeaders",
        "appendRequestHeaders",
        "appendResponseHeaders",
        "removeRequestHeaders",
        "removeResponseHeaders",
    ] {
        let field = at.get(name);
        if !field.is_set() {
            continue;
        }
        check.warn(
            &field,
            "deprecated; use headers.request and headers.response",
        );
        let listed: Vec<(&str, At<'_>)> = match name.starts_with("remove") && field.value.is_array()
        {
            true => field.items().map(|item| (item.text(), item)).collect(),
            false => field.entries().collect(),
        };
        for (name, at) in listed {
            if !text::is_header_name(name) {
                check.error(&at, format!("{name:?} is not a header name"));
            }
        }
    }
}

fn is_internal(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

fn cors(check: &mut Check<'_>, at: &At<'_>) {
    for origin in at.get("allowOrigins").items() {
        let given = ["exact", "prefix", "regex"]
            .iter()
            .map(|name| origin.str(name))
            .find(|text| !text.is_empty());
        if given.is_none() {
            check.error(
                &origin,
                "one of exact, prefix and regex is required, and not empty",
            );
        } else if origin.has("regex") {
            check.regex(&origin.get("regex"));
        }
    }
    for method in at.get("allowMethods").items() {
        if !METHODS.contains(&method.text()) && method.text() != "*" {
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
        if name.text() != "*" && !text::is_header_name(name.text()) {
            check.error(&name, format!("{:?} is not a header name", name.text()));
        }
    }
    let max_age = at.get("maxAge");
    check.duration(&max_age);
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

fn fault(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (abort, delay) = (at.get("abort"), at.get("delay"));
    if !abort.is_set() && !delay.is_set() {
        check.error(at, "at least one of abort and delay is required");
    }
    for fault in [&abort, &delay] {
        percentage(check, &fault.get("percentage"));
        check.whole_percent(&fault.get("percent"));
    }
    if abort.has("grpcStatus") {
        let status = abort.get("grpcStatus");
        if !GRPC_STATUSES.contains(&status.text()) {
            check.error(
                &status,
                format!(
                    "{:?} is not a gRPC status such as UNAVAILABLE",
                    status.text()
                ),
            );
        }
    } else if abort.has("http2Error") {
        check.error(
            &abort.get("http2Error"),
            "HTTP/2 errors cannot be injected; use httpStatus",
        );
    } else if abort.has("httpStatus") {
        http_status(check, &abort.get("httpStatus"));
    } else if abort.is_set() {
        check.warn(
            &abort,
            "neither httpStatus nor grpcStatus: nothing is aborted",
        );
    }
    check.duration(&delay.get("fixedDelay"));
    if delay.has("exponentialDelay") {
        check.error(
            &delay.get("exponentialDelay"),
            "exponential delays cannot be injected; use fixedDelay",
        );
    }
}

/// 0, or at least Envoy's smallest share: one in a million.
fn percentage(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let value = at.get("value").number();
    if !(0.0..=100.0).contains(&value) || value > 0.0 && value < 0.0001 {
        check.error(
            at,
            format!("{value} is neither 0 nor between 0.0001 and 100"),
        );
    }
}

fn http_status(check: &mut Check<'_>, at: &At<'_>) {
    if !(200..=600).contains(&at.int()) {
        check.error(
            at,
            format!("{} is not an HTTP status between 200 and 599", at.int()),
        );
    }
}

fn mirrors(check: &mut Check<'_>, route: &At<'_>) {
    let percent = route.get("mirrorPercent");
    if percent.is_set() {
        if percent.int() > 100 {
            check.error(&percent, format!("{} is more than 100", percent.int()));
        }
        check.warn(&percent, "deprecated; use mirrorPercentage: {value: …}");
    }
    let in_range = |check: &mut Check<'_>, at: &At<'_>| {
        let value = at.get("value").number();
        if !(0.0..=100.0).contains(&value) {
            check.error(at, format!("{value} is not between 0 and 100"));
        }
    };
    in_range(check, &route.get("mirrorPercentage"));
    check.destination(&route.get("mirror"));
    for mirror in route.get("mirrors").items() {
        if !mirror.has("destination") {
            check.error(&mirror.get("destination"), "missing; it is required");
        }
        check.destination(&mirror.get("destination"));
        in_range(check, &mirror.get("percentage"));
    }
}

fn redirect(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    if ["uri", "authority", "scheme"]
        .iter()
        .all(|name| at.str(name).is_empty())
        && !at.has("port")
        && !at.has("derivePort")
    {
        check.error(at, "one of uri, authority, scheme and port is required");
    }
    let code = at.get("redirectCode");
    if code.int() != 0 && !(300..=399).contains(&code.int()) {
        check.error(
            &code,
            format!("{} is not a redirect code (3xx)", code.int()),
        );
    }
    if !matches!(at.str("scheme"), "" | "http" | "https") {
        check.error(&at.get("scheme"), "must be http or https");
    }
    if at.get("port").int() > 0 {
        check.port(&at.get("port"));
    }
}

fn direct_response(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let body = at.get("body");
    let size = body.str("string").len().max(body.str("bytes").len());
    if size > BODY_LIMIT_BYTES {
        check.error(
            &body,
            format!("{size} bytes; a direct response may have {BODY_LIMIT_BYTES}"),
        );
    } else if size > LARGE_BODY_BYTES {
        check.warn(
            &body,
            format!("{size} bytes, which every proxy is sent; serve it from a service"),
        );
    }
    http_status(check, &at.get("status"));
}

fn retries(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    check.not_negative(at, &["attempts"]);
    if at.get("attempts").int() == 0
        && (at.has("perTryTimeout")
            || !at.str("retryOn").is_empty()
            || at.has("retryRemoteLocalities"))
    {
        check.error(
            &at.get("attempts"),
            "0 attempts switch retries off, so the other fields have no effect; remove them",
        );
    }
    check.duration(&at.get("perTryTimeout"));
    check.duration(&at.get("backoff"));
    let on = at.get("retryOn");
    for policy in on.text().split(',').filter(|_| !on.text().is_empty()) {
        let status = policy
            .parse::<u16>()
            .is_ok_and(|status| STATUSES.contains(&status));
        if !status && !RETRY_ON.contains(&policy) {
            check.error(
                &on,
                format!(
                    "{policy:?} is neither a condition for retries nor an HTTP status; {} are",
                    RETRY_ON.join(", ")
                ),
            );
        }
    }
}

fn rewrite(check: &mut Check<'_>, route: &At<'_>) {
    let at = route.get("rewrite");
    if at.is_set() {
        let by_regex = at.get("uriRegexRewrite");
        match (at.str("uri").is_empty(), by_regex.is_set()) {
            (false, true) => check.error(&at, "uri and uriRegexRewrite exclude each other"),
            (true, false) if at.str("authority").is_empty() => {
                check.error(&at, "one of uri, uriRegexRewrite and authority is required");
            }
            _ => {}
        }
        if by_regex.is_set() {
            if by_regex.str("match").is_empty() || by_regex.str("rewrite").is_empty() {
                check.error(&by_regex, "match and rewrite are both required");
            } else {
                check.regex(&by_regex.get("match"));
            }
        }
    }
    let request = route.get("headers").get("request");
    let mut set = usize::from(!at.str("authority").is_empty());
    for (name, value) in request
        .get("set")
        .entries()
        .chain(request.get("add").entries())
    {
        if is_authority(name) {
            set += usize::from(!value.text().is_empty());
            if set > 1 {
                check.error(&value, "the authority is set more than once; keep one");
                return;
            }
        }
    }
}
