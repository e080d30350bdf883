//! Matches, filters and backends of HTTP and gRPC rules in the words of a VirtualService.

use lateen_config::Duration;
use lateen_config::gateway_api::{
    Cors, GrpcMatch, HeaderModifier, HttpBackend, HttpFilter, HttpMatch, HttpRetry, HttpTimeouts,
    PathModifier, RequestMirror, RequestRedirect, UrlRewrite, ValueMatch,
};
use serde_json::{Map, Value, json};

use super::Fault;
use super::parent::RouteOf;
use super::world::{POOL, World, pool_service, target};

/// Retried beside the status codes that a rule lists: what cannot have reached the application.
const RETRY_ON: [&str; 4] = [
    "connect-failure",
    "refused-stream",
    "unavailable",
    "cancelled",
];
const DEFAULT_RETRIES: u32 = 2;
/// Any origin: a scheme and a host. `*` and credentials exclude each other, so that it is matched and echoed.
const ANY_ORIGIN: &str = r"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#]+$";

/// A rule with one match of it, or none.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) value: Value,
    pub(super) rank: Option<Rank>,
}

/// What decides between rules that both match, the more the better; those without a match come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    path: Path,
    length: usize,
    method: bool,
    headers: usize,
    query: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Path {
    None,
    Regex,
    Prefix,
    Exact,
}

/// Gateway API's order: of equals, the rule of the oldest route, and the first of one route, come first already.
pub(super) fn sort(rules: &mut [Rule]) {
    rules.sort_by_key(|rule| std::cmp::Reverse(rule.rank));
}

impl Rule {
    /// The same for one port of a Service.
    pub(super) fn on_port(&self, port: u16) -> Self {
        let mut rule = self.clone();
        match rule.value.get_mut("match").and_then(Value::as_array_mut) {
            Some(matches) => {
                for entry in matches {
                    entry["port"] = json!(port);
                }
            }
            None => {
                rule.value["match"] = json!([{ "port": port }]);
                rule.rank = Some(Rank::default());
            }
        }
        rule
    }
}

impl Default for Rank {
    fn default() -> Self {
        Self {
            path: Path::None,
            length: 0,
            method: false,
            headers: 0,
            query: 0,
        }
    }
}

fn path_rank(uri: Option<&Value>) -> (Path, usize) {
    let of = |name: &str| uri?.get(name)?.as_str().map(str::len);
    if let Some(length) = of("exact") {
        (Path::Exact, length)
    } else if let Some(length) = of("prefix") {
        (Path::Prefix, length)
    } else if let Some(length) = of("regex") {
        (Path::Regex, length)
    } else {
        (Path::None, 0)
    }
}

/// A match of HTTP.
pub(super) fn http_match(entry: &HttpMatch) -> Result<(Value, Rank), Fault> {
    let (kind, value) = match &entry.path {
        Some(path) => (
            path.match_type.as_deref().unwrap_or("PathPrefix"),
            path.value.as_deref().unwrap_or("/"),
        ),
        None => ("PathPrefix", "/"),
    };
    let uri = match kind {
        "PathPrefix" if value == "/" => json!({ "prefix": "/" }),
        "PathPrefix" => json!({ "prefix": value.strip_suffix('/').unwrap_or(value) }),
        "Exact" => json!({ "exact": value }),
        "RegularExpression" => json!({ "regex": value }),
        other => return Err(unknown(other, "Path match")),
    };
    let headers = values(&entry.headers, "HeaderMatch")?;
    let query = values(&entry.query_params, "QueryParams")?;
    let (path, length) = path_rank(Some(&uri));
    let rank = Rank {
        path,
        length,
        method: entry.method.is_some(),
        headers: headers.len(),
        query: query.len(),
    };
    let mut value = json!({ "uri": uri });
    put(&mut value, "headers", headers);
    put(&mut value, "queryParams", query);
    if let Some(method) = &entry.method {
        value["method"] = json!({ "exact": method });
    }
    Ok((value, rank))
}

/// A match of gRPC: service and method are the path.
pub(super) fn grpc_match(entry: &GrpcMatch) -> Result<(Value, Rank), Fault> {
    let mut value = json!({});
    if let Some(method) = &entry.method {
        let kind = method.match_type.as_deref().unwrap_or("Exact");
        let uri = match (kind, &method.service, &method.method) {
            (_, None, None) => {
                return Err(Fault::new(
                    "InvalidConfiguration",
                    "gRPC match must have method or service defined",
                ));
            }
            ("Exact", Some(service), None) => json!({ "prefix": format!("/{service}/") }),
            ("Exact" | "RegularExpression", None, Some(method)) => {
                json!({ "regex": format!("/[^/]+/{method}") })
            }
            ("Exact", Some(service), Some(method)) => {
                json!({ "exact": format!("/{service}/{method}") })
            }
            ("RegularExpression", Some(service), None) => {
                json!({ "regex": format!("/{service}/.+") })
            }
            ("RegularExpression", Some(service), Some(method)) => {
                json!({ "regex": format!("/{service}/{method}") })
            }
            (other, ..) => return Err(unknown(other, "Path match")),
        };
        value["uri"] = uri;
    }
    let headers = values(&entry.headers, "HeaderMatch")?;
    let (path, length) = path_rank(value.get("uri"));
    let rank = Rank {
        path,
        length,
        headers: headers.len(),
        ..Rank::default()
    };
    put(&mut value, "headers", headers);
    Ok((value, rank))
}

fn put(value: &mut Value, name: &str, map: Map<String, Value>) {
    if !map.is_empty() {
        value[name] = Value::Object(map);
    }
}

fn unknown(kind: &str, of: &str) -> Fault {
    Fault::new(
        "InvalidConfiguration",
        format!("unknown type: {kind:?} is not supported {of} type"),
    )
}

/// Headers or query parameters; of one that is there twice only the first counts.
fn values(list: &[ValueMatch], of: &str) -> Result<Map<String, Value>, Fault> {
    let mut all = Map::new();
    let mut seen: Vec<String> = Vec::new();
    for entry in list {
        let kind = match entry.match_type.as_deref().unwrap_or("Exact") {
            "Exact" => "exact",
            "RegularExpression" => "regex",
            other => return Err(unknown(other, of)),
        };
        let name = match of {
            "HeaderMatch" => entry.name.to_ascii_lowercase(),
            _ => entry.name.clone(),
        };
        if !seen.contains(&name) {
            seen.push(name);
            all.insert(entry.name.clone(), json!({ kind: entry.value }));
        }
    }
    Ok(all)
}

/// Filters of a rule into its route. What is wrong with a mirror alone leaves the rest standing.
pub(super) fn filters(
    world: &World<'_>,
    route: &RouteOf<'_>,
    filters: &[HttpFilter],
    from_gateway: bool,
    value: &mut Value,
) -> Result<Option<Fault>, Fault> {
    let is_http = route.kind == "HTTPRoute";
    let mut mirrors = Vec::new();
    let mut wrong = None;
    for filter in filters {
        match filter.filter_type.as_str() {
            "RequestHeaderModifier" => {
                if let Some(modifier) = &filter.request_header_modifier {
                    value["headers"]["request"] = operations(modifier);
                }
            }
            "ResponseHeaderModifier" => {
                if let Some(modifier) = &filter.response_header_modifier {
                    value["headers"]["response"] = operations(modifier);
                }
            }
            "RequestMirror" => {
                if let Some(mirror) = &filter.request_mirror {
                    match mirrored(world, route, mirror, from_gateway) {
                        Ok(mirror) => mirrors.push(mirror),
                        Err(fault) if !is_http => return Err(fault),
                        Err(fault) => wrong = Some(fault),
                    }
                }
            }
            "RequestRedirect" if is_http => {
                if let Some(redirect) = &filter.request_redirect {
                    value["redirect"] = redirected(redirect);
                }
            }
            "URLRewrite" if is_http => {
                if let Some(rewrite) = filter.url_rewrite.as_ref().and_then(rewritten) {
                    value["rewrite"] = rewrite;
                }
            }
            "CORS" if is_http => {
                if let Some(policy) = &filter.cors {
                    value["corsPolicy"] = cors(policy);
                }
            }
            other => return Err(unsupported(other)),
        }
    }
    if !mirrors.is_empty() {
        value["mirrors"] = Value::Array(mirrors);
    }
    Ok(wrong)
}

fn unsupported(filter: &str) -> Fault {
    Fault::new(
        "InvalidFilter",
        format!("unsupported filter type {filter:?}"),
    )
}

fn operations(modifier: &HeaderModifier) -> Value {
    let map = |list: &[lateen_config::gateway_api::Header]| {
        let mut all = Map::new();
        for header in list {
            // Gateway API: of names that are equal without case only the first counts.
            all.entry(header.name.to_ascii_lowercase())
                .or_insert_with(|| json!(header.value));
        }
        all
    };
    let mut value = json!({});
    put(&mut value, "set", map(&modifier.set));
    put(&mut value, "add", map(&modifier.add));
    if !modifier.remove.is_empty() {
        value["remove"] = json!(modifier.remove);
    }
    value
}

fn mirrored(
    world: &World<'_>,
    route: &RouteOf<'_>,
    mirror: &RequestMirror,
    from_gateway: bool,
) -> Result<Value, Fault> {
    let (destination, fault) = destination(world, route, &mirror.backend_ref, from_gateway)?;
    if let Some(fault) = fault {
        return Err(fault);
    }
    let mut value = json!({ "destination": destination });
    let percent = match (&mirror.fraction, mirror.percent) {
        (Some(fraction), _) => Some(
            100.0 * f64::from(fraction.numerator)
                / f64::from(fraction.denominator.unwrap_or(100).max(1)),
        ),
        (None, percent) => percent.map(f64::from),
    };
    if let Some(percent) = percent {
        value["percentage"] = json!({ "value": number(percent) });
    }
    Ok(value)
}

/// Whole numbers as such.
fn number(value: f64) -> Value {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "a share is at most 100, and this one is whole"
    )]
    if value.fract() == 0.0 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn redirected(redirect: &RequestRedirect) -> Value {
    let mut value = json!({});
    if let Some(code) = redirect.status_code {
        value["redirectCode"] = json!(code);
    }
    if let Some(hostname) = &redirect.hostname {
        value["authority"] = json!(hostname);
    }
    if let Some(scheme) = &redirect.scheme {
        value["scheme"] = json!(scheme);
    }
    match (redirect.port, &redirect.scheme) {
        (Some(port), _) => value["port"] = json!(port),
        (None, Some(_)) => value["derivePort"] = json!("FROM_PROTOCOL_DEFAULT"),
        (None, None) => value["derivePort"] = json!("FROM_REQUEST_PORT"),
    }
    if let Some(path) = &redirect.path {
        match modified(path) {
            Modified::Full(path) => value["uri"] = json!(path),
            Modified::Prefix(prefix) => value["uri"] = json!(format!("%PREFIX()%{prefix}")),
            Modified::Nothing => {}
        }
    }
    value
}

enum Modified<'a> {
    Full(&'a str),
    Prefix(&'a str),
    Nothing,
}

fn modified(path: &PathModifier) -> Modified<'_> {
    match (
        path.modifier_type.as_str(),
        &path.replace_full_path,
        &path.replace_prefix_match,
    ) {
        ("ReplaceFullPath", Some(path), _) => Modified::Full(path),
        ("ReplacePrefixMatch", _, Some(prefix)) => Modified::Prefix(prefix),
        _ => Modified::Nothing,
    }
}

fn rewritten(rewrite: &UrlRewrite) -> Option<Value> {
    let mut value = json!({});
    match rewrite.path.as_ref().map(modified) {
        Some(Modified::Prefix(prefix)) => {
            let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
            // No prefix at all: what is left begins with the slash.
            value["uri"] = json!(if prefix.is_empty() { "/" } else { prefix });
        }
        Some(Modified::Full(path)) => {
            value["uriRegexRewrite"] = json!({ "match": "/.*", "rewrite": path });
        }
        Some(Modified::Nothing) | None => {}
    }
    if let Some(hostname) = &rewrite.hostname {
        value["authority"] = json!(hostname);
    }
    (value != json!({})).then_some(value)
}

fn cors(policy: &Cors) -> Value {
    let origins: Vec<Value> = policy
        .allow_origins
        .iter()
        .filter(|origin| !origin.is_empty())
        .map(|origin| match origin.as_str() {
            "*" => json!({ "regex": ANY_ORIGIN }),
            origin if origin.contains('*') => {
                let pattern: Vec<String> = origin.split('*').map(regex::escape).collect();
                // Written as Go's QuoteMeta does, which leaves `-` and `/` alone; they mean themselves here.
                let pattern = pattern.join(".*").replace(r"\-", "-").replace(r"\/", "/");
                json!({ "regex": format!("^{pattern}$") })
            }
            origin => json!({ "exact": origin }),
        })
        .collect();
    let mut value = json!({ "unmatchedPreflights": "IGNORE" });
    if !origins.is_empty() {
        value["allowOrigins"] = Value::Array(origins);
    }
    if policy.allow_credentials == Some(true) {
        value["allowCredentials"] = json!(true);
    }
    for (name, list) in [
        ("allowMethods", &policy.allow_methods),
        ("allowHeaders", &policy.allow_headers),
        ("exposeHeaders", &policy.expose_headers),
    ] {
        if !list.is_empty() {
            value[name] = json!(list);
        }
    }
    if let Some(seconds) = policy.max_age.filter(|seconds| *seconds > 0) {
        value["maxAge"] = json!(format!("{seconds}s"));
    }
    value
}

/// Retries of a rule.
pub(super) fn retries(retry: &HttpRetry) -> Value {
    let attempts = retry.attempts.unwrap_or(DEFAULT_RETRIES);
    let mut value = json!({});
    if attempts > 0 {
        let codes = retry.codes.iter().map(u32::to_string);
        let on: Vec<String> = RETRY_ON
            .iter()
            .map(|on| (*on).to_owned())
            .chain(codes)
            .collect();
        value["attempts"] = json!(attempts);
        value["retryOn"] = json!(on.join(","));
    }
    if let Some(backoff) = retry.backoff.as_deref().and_then(Duration::parse) {
        value["backoff"] = json!(seconds(backoff));
    }
    value
}

/// Time limits of a rule: that of a try is one of the whole where there are no retries.
pub(super) fn timeouts(timeouts: &HttpTimeouts, value: &mut Value) {
    let read = |text: &Option<String>| {
        text.as_deref()
            .and_then(Duration::parse)
            .filter(|timeout| !timeout.0.is_zero())
    };
    if let Some(request) = read(&timeouts.request) {
        value["timeout"] = json!(seconds(request));
    }
    if let Some(backend) = read(&timeouts.backend_request) {
        if value.get("retries").is_some() {
            value["retries"]["perTryTimeout"] = json!(seconds(backend));
        } else {
            value["timeout"] = json!(seconds(backend));
        }
    }
}

/// As protobuf's JSON writes it: no fraction, or one of 3, 6 or 9 digits.
fn seconds(duration: Duration) -> String {
    let (seconds, nanos) = (duration.0.as_secs(), duration.0.subsec_nanos());
    match nanos {
        0 => format!("{seconds}s"),
        nanos if nanos % 1_000_000 == 0 => format!("{seconds}.{:03}s", nanos / 1_000_000),
        nanos if nanos % 1_000 == 0 => format!("{seconds}.{:06}s", nanos / 1_000),
        nanos => format!("{seconds}.{nanos:09}s"),
    }
}

/// Sum of the weights of backends.
pub(super) fn weight(backends: &[HttpBackend]) -> u64 {
    backends
        .iter()
        .map(|backend| u64::from(backend.weight.unwrap_or(1)))
        .sum()
}

/// Destinations of a rule. One that is not there or not allowed stays, without a host, for its share is answered
/// with an error; also the last such fault.
pub(super) fn destinations(
    world: &World<'_>,
    route: &RouteOf<'_>,
    backends: &[HttpBackend],
    from_gateway: bool,
) -> Result<(Vec<Value>, Option<Fault>), Fault> {
    let used: Vec<(&HttpBackend, u32)> = backends
        .iter()
        .map(|backend| (backend, backend.weight.unwrap_or(1)))
        .filter(|(_, weight)| *weight > 0)
        .collect();
    let mut all = Vec::new();
    let mut wrong = None;
    for (backend, weight) in &used {
        let (destination, fault) = destination(world, route, backend, from_gateway)?;
        wrong = fault.or(wrong);
        let mut value = json!({ "destination": destination });
        if used.len() > 1 {
            value["weight"] = json!(weight);
        }
        for filter in &backend.filters {
            match (
                filter.filter_type.as_str(),
                &filter.request_header_modifier,
                &filter.response_header_modifier,
            ) {
                ("RequestHeaderModifier", Some(modifier), _) => {
                    value["headers"]["request"] = operations(modifier);
                }
                ("ResponseHeaderModifier", _, Some(modifier)) => {
                    value["headers"]["response"] = operations(modifier);
                }
                ("RequestHeaderModifier" | "ResponseHeaderModifier", ..) => {}
                (other, ..) => return Err(unsupported(other)),
            }
        }
        all.push(value);
    }
    Ok((all, wrong))
}

/// Where a backend is: a host and port, or `{}` with what is wrong. An error is one of the whole route.
fn destination(
    world: &World<'_>,
    route: &RouteOf<'_>,
    backend: &HttpBackend,
    from_gateway: bool,
) -> Result<(Value, Option<Fault>), Fault> {
    let own = route.namespace();
    let namespace = backend.namespace.as_deref().unwrap_or(own);
    let kind = target(&backend.group, &backend.kind, ("", "Service"));
    let name = backend.name.as_str();
    // In the mesh, clients may call other namespaces' Services anyway.
    if from_gateway
        && namespace != own
        && !world.granted((route.kind, own), kind, (namespace, name))
    {
        return Ok((
            json!({}),
            Some(Fault::new(
                "RefNotPermitted",
                format!(
                    "backendRef {name}/{namespace} not accessible to a {} in namespace {own:?} (missing a ReferenceGrant?)",
                    route.kind
                ),
            )),
        ));
    }
    let invalid = |message: &str| Fault::new("InvalidDestination", message);
    let missing = |host: &str| {
        Some(Fault::new(
            "BackendNotFound",
            format!("backend({host}) not found"),
        ))
    };
    let (host, fault) = match kind {
        ("", "Service") | ("multicluster.x-k8s.io", "ServiceImport") => {
            if kind.1 == "Service" && name.contains('.') {
                return Err(invalid(
                    "service name invalid; the name of the Service must be used, not the hostname.",
                ));
            }
            let host = world.host(name, namespace);
            let fault = match world.service(&host) {
                Some(_) => None,
                None => missing(&host),
            };
            (host, fault)
        }
        ("networking.istio.io", "Hostname") => {
            if backend.namespace.is_some() {
                return Err(invalid("namespace may not be set with Hostname type"));
            }
            let host = name.to_ascii_lowercase();
            let there = world
                .service(&host)
                .is_some_and(|service| service.namespace == own);
            let fault = if there { None } else { missing(&host) };
            (host, fault)
        }
        POOL => {
            if name.contains('.') {
                return Err(invalid(
                    "InferencePool.Name invalid; the name of the InferencePool must be used, not the hostname.",
                ));
            }
            if !world.has_pool(namespace, name) {
                return Ok((json!({}), missing(name)));
            }
            let host = world.host(&pool_service(name), namespace);
            let Some(service) = world.service(&host) else {
                return Ok((json!({}), missing(&host)));
            };
            let Some((port, ..)) = service.ports.first() else {
                return Ok((json!({}), missing(&host)));
            };
            let destination = json!({ "host": host, "port": { "number": port } });
            return Ok((destination, None));
        }
        _ => {
            let (group, kind) = target(&backend.group, &backend.kind, ("", ""));
            return Ok((
                json!({}),
                Some(Fault::new(
                    "InvalidKind",
                    format!("referencing unsupported backendRef: group {group:?} kind {kind:?}"),
                )),
            ));
        }
    };
    let Some(port) = backend.port else {
        return Err(invalid("port is required in backendRef"));
    };
    Ok((json!({ "host": host, "port": { "number": port } }), fault))
}

/// Names by which several rules of one route are told apart, for logs and statistics.
pub(super) fn rule_name(route: &RouteOf<'_>, named: Option<&String>, index: usize) -> String {
    named
        .cloned()
        .unwrap_or_else(|| format!("{}.{}.{index}", route.namespace(), route.object.key.name))
}
