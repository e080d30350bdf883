//! Judges one object by itself: what parses may still make no sense.
//!
//! The rules are Istio's admission rules where a proxy would otherwise refuse or misread what we
//! derive from the object. What needs other objects is in [`crate::reference`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::object::{Object, Spec};
use crate::problem::{Problem, Severity};
use crate::value::{Duration, Percent, StringMatch};

mod virtual_service;
mod authorization;
mod destination_rule;
mod other;

/// Everything wrong with an object taken alone.
#[must_use]
pub fn validate(object: &Object) -> Vec<Problem> {
    let mut check = Check {
        object,
        problems: Vec::new(),
    };
    match &object.spec {
        Spec::VirtualService(spec) => virtual_service::virtual_service(&mut check, spec),
        Spec::DestinationRule(spec) => destination_rule::destination_rule(&mut check, spec),
        Spec::Gateway(spec) => other::gateway(&mut check, spec),
        Spec::ServiceEntry(spec) => other::service_entry(&mut check, spec),
        Spec::WorkloadEntry(spec) => other::workload_entry(&mut check, "spec", spec),
        Spec::Sidecar(spec) => other::sidecar(&mut check, spec),
        Spec::AuthorizationPolicy(spec) => authorization::authorization_policy(&mut check, spec),
        Spec::PeerAuthentication(spec) => other::peer_authentication(&mut check, spec),
        Spec::AuthenticationPolicy(spec) => other::authentication_policy(&mut check, spec),
        Spec::QuotaSpec(spec) => other::quota_spec(&mut check, spec),
        Spec::QuotaSpecBinding(spec) => other::quota_spec_binding(&mut check, spec),
        Spec::Service(spec) => other::service(&mut check, spec),
        // Mixer's objects are judged where their adapters and templates are known; the rest of
        // Kubernetes' kinds have passed an API server, or are only read in part.
        Spec::Mixer(_)
        | Spec::ServiceAccount(_)
        | Spec::Deployment(_)
        | Spec::Pod(_)
        | Spec::ConfigMap(_)
        | Spec::EndpointSlice(_)
        | Spec::Secret(_)
        | Spec::Namespace(_) => {}
    }
    check.problems
}

/// Collects problems of one object.
struct Check<'a> {
    object: &'a Object,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn error(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems
            .push(self.object.problem(Severity::Error, field, reason, ""));
    }

    fn warn(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems
            .push(self.object.problem(Severity::Warning, field, reason, ""));
    }

    fn port(&mut self, field: String, number: u32) {
        if number == 0 || number > 65535 {
            self.error(field, format!("port {number} is not between 1 and 65535"));
        }
    }

    /// A duration must be at least a millisecond, and whole milliseconds.
    fn duration(&mut self, field: String, duration: Option<Duration>) {
        if let Some(duration) = duration {
            if duration.0.as_millis() < 1 {
                self.error(field, format!("{duration} is less than 1ms"));
            } else if duration.0.subsec_nanos() % 1_000_000 != 0 {
                self.error(
                    field,
                    format!("{duration} is not a whole number of milliseconds"),
                );
            }
        }
    }

    fn percent(&mut self, field: String, percent: Option<Percent>) {
        if let Some(Percent { value }) = percent
            && !(0.0..=100.0).contains(&value)
        {
            self.error(field, format!("{value} is not between 0 and 100"));
        }
    }

    fn whole_percent(&mut self, field: String, percent: Option<i64>) {
        if let Some(value) = percent
            && !(0..=100).contains(&value)
        {
            self.error(field, format!("{value} is not between 0 and 100"));
        }
    }

    fn regex(&mut self, field: String, pattern: &str) {
        if pattern.is_empty() {
            self.error(field, "an empty regular expression matches nothing");
        } else if pattern.len() > 1024 {
            self.error(
                field,
                "a regular expression may not be longer than 1024 bytes",
            );
        } else if let Err(error) = regex::Regex::new(pattern) {
            let reason = error.to_string();
            let last = reason.lines().last().unwrap_or_default().trim();
            self.error(field, format!("not a regular expression: {last}"));
        }
    }

    fn string_match(&mut self, field: String, matcher: &StringMatch) {
        match matcher {
            StringMatch::Regex(pattern) => self.regex(format!("{field}.regex"), pattern),
            StringMatch::Exact(_) | StringMatch::Prefix(_) | StringMatch::Present => {}
        }
    }

    fn header_name(&mut self, field: String, name: &str) {
        let name = name.strip_prefix(':').unwrap_or(name);
        if name.is_empty() {
            self.error(field, "a header name may not be empty");
        } else if !name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
        {
            self.error(field, format!("{name:?} is not a header name"));
        }
    }

    /// Envoy substitutes `%COMMAND(…)%` in header values; a lone `%` makes it refuse the whole route.
    fn header_value(&mut self, field: String, value: &str) {
        let mut rest = value;
        while let Some((_, after)) = rest.split_once('%') {
            if let Some(escaped) = after.strip_prefix('%') {
                rest = escaped;
                continue;
            }
            let name = after
                .find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
                .unwrap_or(0);
            let tail = after.get(name..).unwrap_or_default();
            let tail = match tail.strip_prefix('(') {
                Some(arguments) => arguments.split_once(')').map(|(_, tail)| tail),
                None => Some(tail),
            };
            match tail.and_then(|tail| {
                tail.strip_prefix('%').or_else(|| {
                    tail.split_once('%')
                        .filter(|(limit, _)| limit.starts_with(':'))
                        .map(|(_, tail)| tail)
                })
            }) {
                Some(tail) if name > 0 => rest = tail,
                _ => {
                    self.error(field, "a lone % must be written %%");
                    return;
                }
            }
        }
    }

    fn labels(&mut self, field: &str, labels: &crate::object::Labels) {
        for (key, value) in labels {
            let name = key.rsplit('/').next().unwrap_or_default();
            if !is_label(name) || name.is_empty() || key.len() > 317 {
                self.error(
                    format!("{field}.{key}"),
                    format!("{key:?} is not a label name"),
                );
            }
            if !is_label(value) {
                self.error(
                    format!("{field}.{key}"),
                    format!("{value:?} is not a label value"),
                );
            }
        }
    }

    fn export_to(&mut self, list: &[String], allow_none: bool) {
        let mut seen = BTreeSet::new();
        for (index, item) in list.iter().enumerate() {
            let field = format!("spec.exportTo[{index}]");
            if !seen.insert(item) {
                self.error(&*field, format!("{item:?} is listed twice"));
            }
            match item.as_str() {
                "*" | "~" if list.len() > 1 => self.error(field, format!("{item:?} stands alone")),
                "~" if !allow_none => self.error(field, "\"~\" is for ServiceEntry only"),
                "*" | "." | "~" => {}
                namespace if is_dns_label(namespace) => {}
                other => self.error(
                    field,
                    format!("{other:?} is not a namespace, \".\" or \"*\""),
                ),
            }
        }
    }

    /// A host users may name: DNS name, wildcard, possibly an address.
    fn host(&mut self, field: String, host: &str, allow_ip: bool) {
        if host.is_empty() {
            self.error(field, "a host may not be empty");
        } else if !(is_wildcard_dns(host) || allow_ip && host.parse::<IpAddr>().is_ok()) {
            self.error(
                field,
                format!("{host:?} is neither a DNS name nor a wildcard such as *.example.com"),
            );
        }
    }
}

/// Kubernetes label value: empty, or up to 63 of letters, digits, `-_.`, beginning and ending with
/// a letter or digit.
fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.is_empty()
        || text.len() <= 63
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
            && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// RFC 1123 label, case ignored.
fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    !text.is_empty()
        && text.len() <= 63
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// DNS name of labels; a trailing dot is allowed, an all-numeric last label is not.
fn is_dns(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    name.len() <= 253
        && !name.is_empty()
        && name.split('.').all(is_dns_label)
        && (!name.contains('.')
            || !name
                .rsplit('.')
                .next()
                .is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit())))
}

/// DNS name whose first label may be `*`, or begin with it.
fn is_wildcard_dns(text: &str) -> bool {
    match text.strip_prefix('*') {
        Some("") => true,
        Some(rest) => is_dns(
            rest.strip_prefix('.')
                .or_else(|| rest.strip_prefix('-'))
                .unwrap_or(rest),
        ),
        None => is_dns(text),
    }
}

/// IP address or CIDR.
fn is_subnet(text: &str) -> bool {
    match text.split_once('/') {
        None => text.parse::<IpAddr>().is_ok(),
        Some((address, length)) => match (address.parse::<IpAddr>(), length.parse::<u8>()) {
            (Ok(IpAddr::V4(_)), Ok(length)) => length <= 32,
            (Ok(IpAddr::V6(_)), Ok(length)) => length <= 128,
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests;
