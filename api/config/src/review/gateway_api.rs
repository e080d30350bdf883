//! Gateway API: what its custom resource definitions refuse, `gateway.networking.k8s.io` v1 with its experimental
//! fields.

mod routes;

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::Value;

use self::routes::{grpc_route, http_route, tcp_route};
use super::{At, Check, Finding, text};
use crate::gateway_api as api;
use crate::problem::Severity;

/// Limits of the definitions.
const LISTENERS: usize = 64;
const LIST: usize = 16;

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    match check.subject.kind {
        "GatewayClass" => controller(check, &spec.get("controllerName")),
        "Gateway" => gateway(check, spec),
        "ListenerSet" => {
            required(check, &spec.get("parentRef").get("name"));
            listeners(check, &spec.get("listeners"));
        }
        "HTTPRoute" => http_route(check, spec),
        "GRPCRoute" => grpc_route(check, spec),
        "TLSRoute" => tcp_route(check, spec, true),
        "TCPRoute" => tcp_route(check, spec, false),
        "ReferenceGrant" => grant(check, spec),
        "BackendTLSPolicy" => backend_tls(check, spec),
        _ => {}
    }
}

/// Whether every field is what it should be; one that the kind does not have is dropped by API servers.
pub(super) fn shape(kind: &str, spec: &Value) -> Option<Finding> {
    fn of<T: DeserializeOwned>(spec: &Value) -> Option<Finding> {
        let error = serde_path_to_error::deserialize::<_, T>(spec).err()?;
        let reason = error.inner().to_string();
        let field = format!("spec.{}", error.path());
        let mut finding = Finding::error(&field, reason);
        if finding.reason.starts_with("unknown field") {
            finding.severity = Severity::Warning;
        }
        Some(finding)
    }
    if spec.is_null() {
        return Some(Finding::error("spec", "missing; it is required"));
    }
    match kind {
        "GatewayClass" => of::<api::GatewayClass>(spec),
        "Gateway" => of::<api::Gateway>(spec),
        "ListenerSet" => of::<api::ListenerSet>(spec),
        "HTTPRoute" => of::<api::HttpRoute>(spec),
        "GRPCRoute" => of::<api::GrpcRoute>(spec),
        "TLSRoute" | "TCPRoute" => of::<api::TcpRoute>(spec),
        "ReferenceGrant" => of::<api::ReferenceGrant>(spec),
        "BackendTLSPolicy" => of::<api::BackendTlsPolicy>(spec),
        _ => None,
    }
}

fn required(check: &mut Check<'_>, at: &At<'_>) -> bool {
    let there = !at.text().is_empty();
    if !there {
        check.error(at, "missing; it is required");
    }
    there
}

fn at_most(check: &mut Check<'_>, at: &At<'_>, limit: usize) {
    if at.count() > limit {
        check.error(at, format!("{} entries are more than {limit}", at.count()));
    }
}

fn some(check: &mut Check<'_>, at: &At<'_>, limit: usize) {
    if at.count() == 0 {
        check.error(at, "at least one is required");
    }
    at_most(check, at, limit);
}

fn one_of(check: &mut Check<'_>, at: &At<'_>, values: &[&str]) {
    if at.is_set() && !values.contains(&at.text()) {
        check.error(
            at,
            format!("{:?} is not one of {}", at.text(), values.join(", ")),
        );
    }
}

/// A domain, and a path below it.
fn controller(check: &mut Check<'_>, at: &At<'_>) {
    if !required(check, at) {
        return;
    }
    let good = at
        .text()
        .split_once('/')
        .is_some_and(|(domain, path)| text::is_fqdn(domain) && !path.is_empty());
    if !good {
        check.error(
            at,
            format!(
                "{:?} is not a domain with a path, such as example.com/gateway",
                at.text()
            ),
        );
    }
}

fn gateway(check: &mut Check<'_>, spec: &At<'_>) {
    required(check, &spec.get("gatewayClassName"));
    listeners(check, &spec.get("listeners"));
    let addresses = spec.get("addresses");
    at_most(check, &addresses, LIST);
    let mut seen = BTreeSet::new();
    for address in addresses.items() {
        let kind = match address.str("type") {
            "" => "IPAddress",
            kind => kind,
        };
        let value = address.str("value");
        if !value.is_empty() && !seen.insert((kind, value)) {
            check.error(&address, format!("{value:?} is there twice"));
        }
        if kind == "IPAddress" && !value.is_empty() && !text::is_ip(value) {
            check.error(
                &address.get("value"),
                format!("{value:?} is no IP address; a host name needs type: Hostname"),
            );
        }
    }
    let allowed = spec.get("allowedListeners").get("namespaces").get("from");
    one_of(check, &allowed, &["All", "Selector", "Same", "None"]);
    let frontend = spec.get("tls").get("frontend");
    if frontend.is_set() && !frontend.has("default") {
        check.error(&frontend.get("default"), "missing; it is required");
    }
    for validation in frontend
        .get("perPort")
        .items()
        .map(|port| port.get("tls"))
        .chain([frontend.get("default")])
        .map(|tls| tls.get("validation"))
        .filter(At::is_set)
    {
        some(check, &validation.get("caCertificateRefs"), 8);
        let modes = ["AllowValidOnly", "AllowInsecureFallback"];
        one_of(check, &validation.get("mode"), &modes);
    }
}

fn listeners(check: &mut Check<'_>, all: &At<'_>) {
    some(check, all, LISTENERS);
    let mut names = BTreeSet::new();
    let mut places = BTreeSet::new();
    let is_set = check.subject.kind == "ListenerSet";
    for listener in all.items() {
        let name = listener.get("name");
        if required(check, &name) {
            section_name(check, &name);
            if !names.insert(name.text()) {
                check.error(
                    &name,
                    format!("{:?} is there twice; names are unique", name.text()),
                );
            }
        }
        hostname(check, &listener.get("hostname"), true);
        let port = listener.get("port");
        // A ListenerSet may leave the choice to us.
        if !(is_set && port.int() == 0) {
            check.port(&port);
        }
        let protocol = listener.get("protocol");
        required(check, &protocol);
        let tls = listener.get("tls");
        match protocol.text() {
            plain @ ("HTTP" | "TCP" | "UDP") if tls.is_set() => {
                check.error(&tls, format!("is not for protocol {plain}"));
            }
            "HTTPS" if !matches!(tls.str("mode"), "" | "Terminate") => {
                check.error(&tls.get("mode"), "must be Terminate for protocol HTTPS");
            }
            "TLS" if tls.is_set() && tls.str("mode").is_empty() && !tls.has("certificateRefs") => {
                check.error(&tls.get("mode"), "must be set for protocol TLS");
            }
            _ => {}
        }
        let host = listener.str("hostname");
        if matches!(protocol.text(), "TCP" | "UDP") && !host.is_empty() {
            check.error(
                &listener.get("hostname"),
                format!("is not for protocol {}", protocol.text()),
            );
        }
        if !places.insert((port.int(), protocol.text(), host)) {
            check.error(
                &listener,
                "port, protocol and hostname are those of another listener; together they are unique",
            );
        }
        one_of(check, &tls.get("mode"), &["Terminate", "Passthrough"]);
        at_most(check, &tls.get("certificateRefs"), 64);
        at_most(check, &tls.get("options"), LIST);
        let terminates = tls.is_set() && matches!(tls.str("mode"), "" | "Terminate");
        if terminates && tls.get("certificateRefs").count() == 0 && tls.get("options").count() == 0
        {
            check.error(
                &tls.get("certificateRefs"),
                "certificateRefs or options are required to terminate TLS",
            );
        }
        for reference in tls.get("certificateRefs").items() {
            required(check, &reference.get("name"));
        }
        let routes = listener.get("allowedRoutes");
        at_most(check, &routes.get("kinds"), 8);
        for kind in routes.get("kinds").items() {
            required(check, &kind.get("kind"));
        }
        let from = routes.get("namespaces").get("from");
        one_of(check, &from, &["All", "Selector", "Same", "None"]);
    }
}

fn section_name(check: &mut Check<'_>, at: &At<'_>) {
    let good = at.text().len() <= 253
        && at
            .text()
            .split('.')
            .all(|label| text::is_dns_label(label) && label == label.to_ascii_lowercase());
    if !good {
        check.error(
            at,
            format!(
                "{:?} is not a name: lowercase letters, digits, - and .",
                at.text()
            ),
        );
    }
}

/// A host name, or (`wild`) one whose first label is `*`.
fn hostname(check: &mut Check<'_>, at: &At<'_>, wild: bool) {
    if !at.is_set() {
        return;
    }
    let host = at.text();
    let plain = if wild {
        host.strip_prefix("*.").unwrap_or(host)
    } else {
        host
    };
    if host.is_empty() {
        check.error(at, "may not be empty; leave it out for all hosts");
    } else if text::is_ip(host) {
        check.error(at, format!("{host:?} is an IP address, not a host name"));
    } else if host.len() > 253
        || !text::is_fqdn(plain)
        || plain.contains('_')
        || plain != plain.to_ascii_lowercase()
    {
        check.error(
            at,
            format!("{host:?} is not a host name: lowercase labels, the first of which may be *"),
        );
    }
}

fn grant(check: &mut Check<'_>, spec: &At<'_>) {
    let (from, to) = (spec.get("from"), spec.get("to"));
    some(check, &from, LIST);
    some(check, &to, LIST);
    for entry in from.items() {
        required(check, &entry.get("kind"));
        required(check, &entry.get("namespace"));
    }
    for entry in to.items() {
        required(check, &entry.get("kind"));
    }
}

fn backend_tls(check: &mut Check<'_>, spec: &At<'_>) {
    let targets = spec.get("targetRefs");
    some(check, &targets, LIST);
    let mut seen = BTreeSet::new();
    for target in targets.items() {
        required(check, &target.get("kind"));
        required(check, &target.get("name"));
        let who = (
            target.str("group"),
            target.str("kind"),
            target.str("name"),
            target.str("sectionName"),
        );
        if !seen.insert(who) {
            check.error(&target, "is there twice; sectionName tells them apart");
        }
    }
    let validation = spec.get("validation");
    if required(check, &validation.get("hostname")) {
        hostname(check, &validation.get("hostname"), false);
    }
    let (references, known) = (
        validation.get("caCertificateRefs"),
        validation.get("wellKnownCACertificates"),
    );
    at_most(check, &references, 8);
    match (references.count() > 0, !known.text().is_empty()) {
        (true, true) => check.error(&known, "and caCertificateRefs exclude each other"),
        (false, false) => check.error(
            &references,
            "caCertificateRefs or wellKnownCACertificates is required",
        ),
        _ => {}
    }
    let names = validation.get("subjectAltNames");
    at_most(check, &names, 5);
    for name in names.items() {
        let kind = name.get("type");
        one_of(check, &kind, &["Hostname", "URI"]);
        for (of, field) in [("Hostname", "hostname"), ("URI", "uri")] {
            if kind.text() == of && name.str(field).is_empty() {
                check.error(&name.get(field), format!("missing; type {of} needs it"));
            }
            if kind.text() != of && !name.str(field).is_empty() {
                check.error(&name.get(field), format!("is for type {of}"));
            }
        }
    }
    at_most(check, &spec.get("options"), LIST);
}

#[cfg(test)]
mod tests;
