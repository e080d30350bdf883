//! Admission: whether one object may be let in, judged by what its kind's API says.
//!
//! The same judgement for Pilot's folder, `lateen validate` and the admission webhook: first the shape
//! ([`schema`]), then the rules that fields have among each other. What this version of Pilot can
//! serve is another question, answered in [`crate::validate`] and [`crate::parse`] by warnings.

use serde_json::Value;

use crate::object::Labels;
use crate::problem::Severity;

mod at;
pub(crate) mod schema;
pub(crate) mod text;
mod virtual_service;
mod http_route;
mod unreachable;
mod destination_rule;
mod gateway;
mod gateway_api;
mod service_entry;
mod sidecar;
pub(crate) mod envoy_filter;
mod security;
mod jwt;
pub(crate) mod telemetry;
mod extension;
mod quota;
mod rbac;
mod route_rule;

pub(crate) use at::At;
pub use gateway::is_cipher_suite;

/// One thing to say about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it refuses the object.
    pub severity: Severity,
    /// Path to the field (`spec.http[0].timeout`); empty for the whole object.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to do about it; may be empty.
    pub hint: String,
    /// Istio's name of the analysis message it is, when that is not just a schema message.
    pub message: Option<&'static str>,
}

impl Finding {
    pub(crate) fn error(field: &str, reason: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            field: field.to_owned(),
            reason: reason.into(),
            hint: String::new(),
            message: None,
        }
    }

    /// Whether it refuses the object.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// Whom the rules judge: what they need to know beside the spec.
#[derive(Clone, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) group: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) annotations: &'a Labels,
}

/// Whether objects of this kind are judged here.
#[must_use]
pub fn is_known(group: &str, kind: &str) -> bool {
    schema::message_of(group, kind).is_some()
        || !crate::gateway_api::versions(group, kind).is_empty()
}

/// Judges a whole document, as the API server hands it to a webhook. A kind we do not know has no
/// findings.
///
/// # Errors
/// The document says neither what it is nor who: no `apiVersion`, `kind` or `metadata.name`.
pub fn review(document: &Value) -> Result<Vec<Finding>, Finding> {
    let text = |value: &Value, name: &str| {
        value
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    if !document.is_object() {
        return Err(Finding::error(
            "",
            "must be a map with apiVersion, kind and metadata",
        ));
    }
    let (api_version, kind) = (text(document, "apiVersion"), text(document, "kind"));
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    if kind.is_empty() || version.is_empty() {
        return Err(Finding::error(
            "",
            "no apiVersion and kind that say what this is",
        ));
    }
    let metadata = document.get("metadata").unwrap_or(&Value::Null);
    let name = text(metadata, "name");
    let message = schema::message_of(group, &kind);
    if message.is_none() && crate::gateway_api::versions(group, &kind).is_empty() {
        return Ok(Vec::new());
    }
    if name.is_empty() && text(metadata, "generateName").is_empty() {
        return Err(Finding::error("metadata.name", "missing; it is required"));
    }
    let annotations = metadata
        .get("annotations")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect();
    let namespace = match text(metadata, "namespace") {
        named if named.is_empty() => "default".to_owned(),
        named => named,
    };
    let subject = Subject {
        group,
        kind: &kind,
        namespace: &namespace,
        name: &name,
        annotations: &annotations,
    };
    let spec = document.get("spec").unwrap_or(&Value::Null);
    let Some(message) = message else {
        let mut findings: Vec<Finding> = gateway_api::shape(&kind, spec).into_iter().collect();
        findings.extend(rules(&subject, spec));
        return Ok(findings);
    };
    let mut findings = top_level(
        document
            .as_object()
            .into_iter()
            .flat_map(serde_json::Map::keys),
    );
    findings.extend(served(group, &kind, version));
    findings.extend(judge(&subject, message, spec));
    Ok(findings)
}

/// Fields beside the spec that nobody reads: most likely a spec that is not indented.
pub(crate) fn top_level<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<Finding> {
    keys.map(String::as_str)
        .filter(|key| !matches!(*key, "apiVersion" | "kind" | "metadata" | "spec" | "status"))
        .map(|key| {
            let mut finding =
                Finding::error(key, "unknown field: not apiVersion, kind, metadata or spec");
            finding.hint = "is it meant to be below spec?".into();
            finding
        })
        .collect()
}

/// Versions under which a kind is known, newest first. `None`: whatever it is called.
#[must_use]
pub fn versions(group: &str, kind: &str) -> Option<&'static [&'static str]> {
    Some(match (group, kind) {
        ("networking.istio.io", "EnvoyFilter") => &["v1alpha3"],
        ("networking.istio.io", "ProxyConfig") => &["v1beta1"],
        ("networking.istio.io", _) => &["v1", "v1beta1", "v1alpha3"],
        ("security.istio.io", _) => &["v1", "v1beta1"],
        ("telemetry.istio.io", _) => &["v1", "v1alpha1"],
        ("extensions.istio.io" | "rbac.istio.io" | "authentication.istio.io", _) => &["v1alpha1"],
        ("config.istio.io", _) => &["v1alpha2"],
        _ => match crate::gateway_api::versions(group, kind) {
            [] => return None,
            versions => versions,
        },
    })
}

/// Whether a kind is known under a version.
pub(crate) fn served(group: &str, kind: &str, version: &str) -> Option<Finding> {
    let versions = versions(group, kind)?;
    (!versions.contains(&version)).then(|| {
        let mut finding =
            Finding::error("apiVersion", format!("{kind} has no version {version:?}"));
        finding.hint = format!("write {group}/{}", versions.join(", "));
        finding
    })
}

/// Shape and rules of a spec.
pub(crate) fn judge(subject: &Subject<'_>, message: &'static str, spec: &Value) -> Vec<Finding> {
    let (normal, mut findings) = schema::normal(message, spec, "spec");
    if spec.is_null()
        && matches!(
            subject.kind,
            "ServiceEntry" | "WorkloadEntry" | "WasmPlugin"
        )
    {
        findings.push(Finding::error("spec", "missing; it is required"));
    }
    findings.extend(rules(subject, &normal));
    findings
}

/// The rules of a spec in normal form.
pub(crate) fn rules(subject: &Subject<'_>, spec: &Value) -> Vec<Finding> {
    let mut check = Check {
        subject,
        findings: Vec::new(),
    };
    let at = At::new(spec, "spec");
    check.annotations(&at);
    match (subject.group, subject.kind) {
        ("networking.istio.io", "VirtualService") => virtual_service::check(&mut check, &at),
        ("networking.istio.io", "DestinationRule") => destination_rule::check(&mut check, &at),
        ("networking.istio.io", "Gateway") => gateway::check(&mut check, &at),
        ("networking.istio.io", "ServiceEntry") => service_entry::check(&mut check, &at),
        ("networking.istio.io", "WorkloadEntry") => {
            service_entry::workload_entry(&mut check, &at, None, true);
        }
        ("networking.istio.io", "WorkloadGroup") => service_entry::workload_group(&mut check, &at),
        ("networking.istio.io", "Sidecar") => sidecar::check(&mut check, &at),
        ("networking.istio.io", "EnvoyFilter") => envoy_filter::check(&mut check, &at),
        ("networking.istio.io", "ProxyConfig") => {
            check.policy_selector(&at.get("selector"));
            if at.get("concurrency").int() < 0 {
                check.error(&at.get("concurrency"), "may not be negative");
            }
        }
        ("security.istio.io", "PeerAuthentication") => security::peer(&mut check, &at),
        ("security.istio.io", "RequestAuthentication") => security::request(&mut check, &at),
        ("security.istio.io", "AuthorizationPolicy") => security::authorization(&mut check, &at),
        ("telemetry.istio.io", "Telemetry") => telemetry::check(&mut check, &at),
        ("extensions.istio.io", "WasmPlugin") => extension::wasm_plugin(&mut check, &at),
        ("extensions.istio.io", "TrafficExtension") => {
            extension::traffic_extension(&mut check, &at);
        }
        ("authentication.istio.io", _) => security::older_policy(&mut check, &at),
        ("rbac.istio.io", "ServiceRole") => rbac::service_role(&mut check, &at),
        ("rbac.istio.io", "ServiceRoleBinding") => rbac::service_role_binding(&mut check, &at),
        ("rbac.istio.io", _) => rbac::config(&mut check, &at),
        ("config.istio.io", "QuotaSpec") => quota::quota_spec(&mut check, &at),
        ("config.istio.io", "QuotaSpecBinding") => quota::binding(&mut check, &at, "quotaSpecs"),
        ("config.istio.io", "HTTPAPISpec") => quota::api_spec(&mut check, &at),
        ("config.istio.io", "HTTPAPISpecBinding") => quota::binding(&mut check, &at, "apiSpecs"),
        ("config.istio.io", "RouteRule") => route_rule::route_rule(&mut check, &at),
        ("config.istio.io", "DestinationPolicy") => {
            route_rule::destination_policy(&mut check, &at);
        }
        ("config.istio.io", "EgressRule") => route_rule::egress_rule(&mut check, &at),
        (crate::gateway_api::GROUP, _) => gateway_api::check(&mut check, &at),
        _ => {}
    }
    check.findings
}

/// Collects what there is to say about one object.
struct Check<'a> {
    subject: &'a Subject<'a>,
    findings: Vec<Finding>,
}

impl Check<'_> {
    fn error(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.findings.push(Finding::error(&at.path, reason));
    }

    fn warn(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.findings.push(Finding {
            severity: Severity::Warning,
            ..Finding::error(&at.path, reason)
        });
    }

    /// `istio.io/dry-run` is for authorization that allows or denies.
    fn annotations(&mut self, spec: &At<'_>) {
        const DRY_RUN: &str = "istio.io/dry-run";
        let Some(value) = self.subject.annotations.get(DRY_RUN) else {
            return;
        };
        let at = At::new(spec.value, &format!("metadata.annotations.{DRY_RUN}"));
        if self.subject.kind != "AuthorizationPolicy" {
            self.error(&at, "is for AuthorizationPolicy only; remove it");
        } else if !matches!(spec.str("action"), "" | "ALLOW" | "DENY") {
            self.error(
                &at,
                format!("is for ALLOW and DENY, not {}", spec.str("action")),
            );
        } else if !matches!(
            value.as_str(),
            "1" | "t"
                | "T"
                | "true"
                | "TRUE"
                | "True"
                | "0"
                | "f"
                | "F"
                | "false"
                | "FALSE"
                | "False"
        ) {
            self.error(&at, format!("must be \"true\" or \"false\", not {value:?}"));
        }
    }

    fn port(&mut self, at: &At<'_>) {
        let number = at.int();
        if !(1..=65535).contains(&number) {
            self.error(at, format!("port {number} is not between 1 and 65535"));
        }
    }

    fn port_name(&mut self, at: &At<'_>, name: &str) {
        if !text::is_dns_label(name) {
            self.error(
                at,
                format!("{name:?} is not a port name: letters, digits and - only"),
            );
        }
    }

    /// A span must be at least a millisecond, and whole milliseconds.
    fn duration(&mut self, at: &At<'_>) {
        if let Some(nanos) = at.nanos() {
            if nanos < 1_000_000 {
                self.error(at, format!("{} is less than 1ms", at.text()));
            } else if nanos % 1_000_000 != 0 {
                self.error(
                    at,
                    format!("{} is not a whole number of milliseconds", at.text()),
                );
            }
        }
    }

    fn not_negative(&mut self, at: &At<'_>, names: &[&str]) {
        for name in names {
            let field = at.get(name);
            if field.int() < 0 {
                self.error(&field, "may not be negative");
            }
        }
    }

    fn whole_percent(&mut self, at: &At<'_>) {
        let value = at.int();
        if !(0..=100).contains(&value) {
            self.error(at, format!("{value} is not between 0 and 100"));
        }
    }

    fn labels(&mut self, at: &At<'_>) {
        for (key, value) in at.entries() {
            if !text::is_label_name(key) {
                self.error(&value, format!("{key:?} is not a label name"));
            }
            if !text::is_label_value(value.text()) {
                self.error(&value, format!("{:?} is not a label value", value.text()));
            }
        }
    }

    /// Host name or wildcard.
    fn wildcard_domain(&mut self, at: &At<'_>, host: &str) -> bool {
        let good = text::is_wildcard_domain(host);
        if host.is_empty() {
            self.error(at, "a host may not be empty");
        } else if !good {
            self.error(
                at,
                format!("{host:?} is neither a DNS name nor a wildcard such as *.example.com"),
            );
        }
        good
    }

    fn subnet(&mut self, at: &At<'_>) {
        if !text::is_subnet(at.text()) {
            self.error(
                at,
                format!("{:?} is neither an IP address nor a CIDR block", at.text()),
            );
        }
    }

    fn unix_path(&mut self, at: &At<'_>, path: &str) {
        if !path.starts_with('@') && (!path.starts_with('/') || path.ends_with('/')) {
            self.error(
                at,
                format!("unix://{path} is neither an absolute path nor an abstract socket (unix://@NAME)"),
            );
        }
    }

    /// A protocol by name; empty means that it is recognised from the bytes.
    fn protocol(&mut self, at: &At<'_>, name: &str) {
        if !name.is_empty() && text::protocol(name) == text::Protocol::Unknown {
            self.error(
                at,
                format!("{name:?} is not a protocol; known are HTTP, HTTP2, GRPC, GRPC-WEB, HTTPS, TLS, TCP, MONGO, REDIS, MYSQL, UDP"),
            );
        }
    }

    fn regex(&mut self, at: &At<'_>) {
        if let Some(fault) = text::regex_fault(at.text()) {
            self.error(at, fault);
        }
    }

    fn subset_name(&mut self, at: &At<'_>) {
        if at.text().is_empty() {
            self.error(at, "a subset name may not be empty");
        } else if !text::is_dns_label(at.text()) {
            self.error(at, format!("{:?} is not a subset name", at.text()));
        }
    }

    /// Host, subset and port of a destination.
    fn destination(&mut self, at: &At<'_>) {
        if !at.is_set() {
            return;
        }
        let host = at.get("host");
        if host.text() == "*" {
            self.error(&host, "\"*\" is not a destination");
        } else {
            self.wildcard_domain(&host, host.text());
        }
        let subset = at.get("subset");
        if !subset.text().is_empty() {
            self.subset_name(&subset);
        }
        if at.has("port") {
            self.port(&at.get("port").get("number"));
        }
    }

    /// `selector.matchLabels` of policies.
    fn policy_selector(&mut self, at: &At<'_>) {
        if !at.is_set() {
            return;
        }
        let labels = at.get("matchLabels");
        self.selector_labels(&labels);
        if labels.count() == 0 {
            self.warn(
                at,
                "without labels it selects every workload; leave it out, or name labels",
            );
        }
    }

    /// `workloadSelector.labels` of the networking kinds.
    fn workload_selector(&mut self, at: &At<'_>) {
        if !at.is_set() {
            return;
        }
        let labels = at.get("labels");
        self.selector_labels(&labels);
        if labels.count() == 0 {
            self.warn(
                at,
                "without labels it is for every workload of the namespace; leave it out, or name labels",
            );
        }
    }

    fn selector_labels(&mut self, at: &At<'_>) {
        for (key, value) in at.entries() {
            if key.is_empty() {
                self.error(&value, "a label's name may not be empty");
            }
            if key.contains('*') || value.text().contains('*') {
                self.error(&value, "a selector takes no wildcards; write the label out");
            }
        }
    }

    /// `selector`, `targetRef` and `targetRefs` of policies.
    fn targets(&mut self, spec: &At<'_>) {
        let set = usize::from(spec.has("selector"))
            + usize::from(spec.has("targetRef"))
            + usize::from(spec.get("targetRefs").count() > 0);
        if set > 1 {
            self.error(spec, "only one of targetRefs or selector may be set");
        }
        self.policy_selector(&spec.get("selector"));
        if spec.has("targetRef") {
            self.target(&spec.get("targetRef"));
        }
        for target in spec.get("targetRefs").items() {
            self.target(&target);
        }
    }

    fn target(&mut self, at: &At<'_>) {
        if at.str("name").is_empty() {
            self.error(&at.get("name"), "missing; it is required");
        }
        if !at.str("namespace").is_empty() {
            self.error(
                &at.get("namespace"),
                "must be left out: only objects of the same namespace can be targeted",
            );
        }
        let known = matches!(
            (at.str("group"), at.str("kind")),
            ("" | "core", "Service")
                | ("networking.istio.io", "ServiceEntry")
                | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
        );
        if !known {
            self.error(
                at,
                format!(
                    "{:?} of group {:?} cannot be targeted; Service, ServiceEntry (networking.istio.io), Gateway and GatewayClass (gateway.networking.k8s.io) can",
                    at.str("kind"),
                    at.str("group")
                ),
            );
        }
    }

    /// Namespaces an object is visible in. `nobody`: "~" is allowed. `selected`: the object has a
    /// workload selector, so that it cannot leave its namespace.
    fn export_to(&mut self, at: &At<'_>, nobody: bool, selected: bool) {
        let mut seen: Vec<&str> = Vec::new();
        for item in at.items() {
            let given = item.text();
            let meant = if given == "." {
                self.subject.namespace
            } else {
                given
            };
            if seen.contains(&meant) {
                self.error(&item, format!("{given:?} is listed twice"));
                continue;
            }
            match meant {
                "*" => {}
                "~" if nobody => {}
                "~" => {
                    self.error(&item, "\"~\" (nobody) is for ServiceEntry only");
                    continue;
                }
                namespace if text::is_dns_label(namespace) => {}
                other => {
                    self.error(
                        &item,
                        format!("{other:?} is not a namespace, \".\" or \"*\""),
                    );
                    continue;
                }
            }
            seen.push(meant);
        }
        if selected && !seen.is_empty() && seen != [self.subject.namespace] {
            self.error(
                at,
                "an object with a workload selector is visible in its own namespace only; write \".\"",
            );
        }
        if (seen.contains(&"*") || seen.contains(&"~")) && at.count() > 1 {
            self.error(at, "\"*\" and \"~\" stand alone");
        }
    }
}

#[cfg(test)]
mod tests;
