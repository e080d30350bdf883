//! Routes and matches of a VirtualService that nothing can reach.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{At, Check};

pub(super) const UNREACHABLE_RULE: &str = "VirtualServiceUnreachableRule";
pub(super) const INEFFECTIVE_MATCH: &str = "VirtualServiceIneffectiveMatch";

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    for name in ["http", "tcp", "tls"] {
        duplicates(check, &spec.get(name));
    }
    covered_prefixes(check, &spec.get("http"));
}

fn report(check: &mut Check<'_>, at: &At<'_>, message: &'static str, reason: String) {
    check.warn(at, reason);
    if let Some(finding) = check.findings.last_mut() {
        finding.message = Some(message);
    }
}

/// How a route or match is called: by name, else by number.
fn called(at: &At<'_>, index: usize) -> String {
    match at.str("name") {
        "" => format!("#{index}"),
        name => format!("{name:?}"),
    }
}

/// Routes after one without a match, and matches that an earlier route has word for word.
fn duplicates(check: &mut Check<'_>, routes: &At<'_>) {
    let mut seen: HashMap<String, String> = HashMap::new();
    let mut catches_all = false;
    for (index, route) in routes.items().enumerate() {
        let name = called(&route, index);
        let matches = route.get("match");
        if matches.count() == 0 {
            if catches_all {
                let reason =
                    format!("route {name} is never used: only the last route may have no match");
                report(check, &route, UNREACHABLE_RULE, reason);
            }
            catches_all = true;
            continue;
        }
        let mut repeated = 0;
        for (number, matcher) in matches.items().enumerate() {
            let content = without_name(matcher.value);
            match seen.get(&content) {
                Some(earlier) => {
                    let reason = format!(
                        "match {} of route {name} has no effect: route {earlier} has the same",
                        called(&matcher, number)
                    );
                    report(check, &matcher, INEFFECTIVE_MATCH, reason);
                    repeated += 1;
                }
                None => {
                    seen.insert(content, name.clone());
                }
            }
        }
        if repeated == matches.count() {
            let reason = format!("route {name} is never used: earlier routes have all its matches");
            report(check, &route, UNREACHABLE_RULE, reason);
        }
    }
}

/// A match as text, whatever it is called.
fn without_name(matcher: &Value) -> String {
    let mut matcher = matcher.clone();
    if let Value::Object(fields) = &mut matcher {
        fields.remove("name");
    }
    matcher.to_string()
}

/// What besides its path a match asks.
struct Prefix<'a> {
    prefix: &'a str,
    port: i64,
    method: String,
    authority: String,
    maps: [Vec<(String, String)>; 3],
    at: At<'a>,
    route: String,
    name: String,
}

impl<'a> Prefix<'a> {
    fn of(at: At<'a>, route: String, number: usize) -> Option<Self> {
        let prefix = at.get("uri").str("prefix");
        if prefix.is_empty() {
            return None;
        }
        let map = |name: &str| {
            let mut all: Vec<(String, String)> = at
                .get(name)
                .entries()
                .map(|(key, matcher)| (key.to_owned(), by_words(&matcher)))
                .collect();
            all.sort();
            all
        };
        let method = match by_words(&at.get("method")) {
            none if none.is_empty() => "exact:GET".into(),
            given => given,
        };
        Some(Self {
            prefix,
            port: at.get("port").int(),
            method,
            authority: by_words(&at.get("authority")),
            maps: [map("headers"), map("queryParams"), map("withoutHeaders")],
            name: called(&at, number),
            at,
            route,
        })
    }

    /// Whether every request of `later` is taken by this one before.
    fn covers(&self, later: &Self) -> bool {
        later.prefix != self.prefix
            && later.prefix.starts_with(self.prefix)
            && later.port == self.port
            && self.method.starts_with(&later.method)
            && self.authority.starts_with(&later.authority)
            && self.maps.iter().zip(&later.maps).all(|(own, other)| {
                own.len() == other.len()
                    && own
                        .iter()
                        .zip(other)
                        .all(|((key, value), (other_key, other_value))| {
                            key == other_key && value.starts_with(other_value.as_str())
                        })
            })
    }
}

/// Exact and prefix matches as one text; a regex is not looked into.
fn by_words(matcher: &At<'_>) -> String {
    match (matcher.str("exact"), matcher.str("prefix")) {
        ("", "") => String::new(),
        ("", prefix) => format!("prefix:{prefix}"),
        (exact, _) => format!("exact:{exact}"),
    }
}

/// `/debug/x` after `/debug`: the first takes it all.
fn covered_prefixes(check: &mut Check<'_>, routes: &At<'_>) {
    let mut seen: HashSet<String> = HashSet::new();
    let mut prefixes: Vec<Prefix<'_>> = Vec::new();
    for (index, route) in routes.items().enumerate() {
        let name = called(&route, index);
        for (number, matcher) in route.get("match").items().enumerate() {
            if !seen.insert(without_name(matcher.value)) {
                continue;
            }
            prefixes.extend(Prefix::of(matcher, name.clone(), number));
        }
    }
    for (index, first) in prefixes.iter().enumerate() {
        for later in prefixes
            .iter()
            .skip(index + 1)
            .filter(|later| first.covers(later))
        {
            let reason = format!(
                "match {} of route {} (prefix {}) has no effect: match {} of route {} (prefix {}) takes its requests before; put it first",
                later.name, later.route, later.prefix, first.name, first.route, first.prefix
            );
            report(check, &later.at, INEFFECTIVE_MATCH, reason);
        }
    }
}
