//! The smaller kinds.

use std::collections::BTreeSet;

use crate::kubernetes;
use crate::networking::{Gateway, Resolution, Server, ServiceEntry, Sidecar, WorkloadEntry};
use crate::policy::{QuotaSpec, QuotaSpecBinding};
use crate::security::{AuthenticationPolicy, PeerAuthentication};

use super::{Check, is_dns, is_dns_label, is_subnet};

const PROTOCOLS: &[&str] = &[
    "HTTP",
    "HTTP2",
    "GRPC",
    "GRPC-WEB",
    "HTTPS",
    "TLS",
    "TCP",
    "MONGO",
    "REDIS",
    "MYSQL",
    "HTTP_PROXY",
];

fn protocol(check: &mut Check<'_>, field: String, name: &str) {
    if !PROTOCOLS.contains(&name.to_ascii_uppercase().as_str()) && !name.eq_ignore_ascii_case("UDP")
    {
        check.error(
            field,
            format!(
                "{name:?} is not a protocol; known are {}",
                PROTOCOLS.join(", ")
            ),
        );
    }
}

pub(super) fn gateway(check: &mut Check<'_>, spec: &Gateway) {
    if spec.servers.is_empty() {
        check.error("spec.servers", "at least one server is required");
    }
    check.labels("spec.selector", &spec.selector);
    let mut names = BTreeSet::new();
    for (index, server) in spec.servers.iter().enumerate() {
        let field = format!("spec.servers[{index}]");
        gateway_server(check, &field, server);
        if let Some(port) = &server.port
            && !port.name.is_empty()
            && !names.insert(port.name.clone())
        {
            check.error(
                format!("{field}.port.name"),
                format!("{:?} is there twice; port names are unique", port.name),
            );
        }
    }
}

fn gateway_server(check: &mut Check<'_>, field: &str, server: &Server) {
    if server.hosts.is_empty() {
        check.error(format!("{field}.hosts"), "at least one host is required");
    }
    for (index, host) in server.hosts.iter().enumerate() {
        let field = format!("{field}.hosts[{index}]");
        let host = match host.split_once('/') {
            None => host.as_str(),
            Some((namespace, host)) => {
                if !(matches!(namespace, "." | "*") || is_dns_label(namespace)) {
                    check.error(
                        &*field,
                        format!("{namespace:?} is not a namespace, \".\" or \"*\""),
                    );
                }
                host
            }
        };
        check.host(field, host, true);
    }
    if !server.bind.is_empty()
        && server.bind.parse::<std::net::IpAddr>().is_err()
        && !server.bind.starts_with("unix://")
    {
        check.error(format!("{field}.bind"), "not an IP address");
    }
    let Some(port) = &server.port else {
        check.error(format!("{field}.port"), "missing");
        return;
    };
    if !server.bind.starts_with("unix://") {
        check.port(format!("{field}.port.number"), port.number);
    }
    protocol(check, format!("{field}.port.protocol"), &port.protocol);
    let secure = matches!(port.protocol.to_ascii_uppercase().as_str(), "HTTPS" | "TLS");
    match &server.tls {
        None if secure => {
            check.error(
                format!("{field}.tls"),
                format!("required for {}", port.protocol),
            );
        }
        Some(tls) => {
            if tls.https_redirect && secure {
                check.error(
                    format!("{field}.tls.httpsRedirect"),
                    "is for plain HTTP servers",
                );
            }
            let files = !tls.server_certificate.is_empty() && !tls.private_key.is_empty()
                || !tls.tls_certificates.is_empty();
            let secret = !tls.credential_name.is_empty() || !tls.credential_names.is_empty();
            if secret && files {
                check.error(
                    format!("{field}.tls"),
                    "credentialName and file paths exclude each other",
                );
            }
            match tls.mode.as_str() {
                "ISTIO_MUTUAL" if files || secret => check.error(
                    format!("{field}.tls"),
                    "ISTIO_MUTUAL uses the mesh's certificates; leave files and secrets out",
                ),
                "SIMPLE" | "MUTUAL" | "OPTIONAL_MUTUAL" if !files && !secret => check.error(
                    format!("{field}.tls"),
                    format!(
                        "{} needs serverCertificate and privateKey, or credentialName",
                        tls.mode
                    ),
                ),
                "MUTUAL" if files && !secret && tls.ca_certificates.is_empty() => {
                    check.error(format!("{field}.tls.caCertificates"), "required for MUTUAL");
                }
                "" | "PASSTHROUGH" | "SIMPLE" | "MUTUAL" | "AUTO_PASSTHROUGH" | "ISTIO_MUTUAL"
                | "OPTIONAL_MUTUAL" => {}
                other => check.error(
                    format!("{field}.tls.mode"),
                    format!("{other:?} is not a TLS mode"),
                ),
            }
        }
        None => {}
    }
}

pub(super) fn service_entry(check: &mut Check<'_>, spec: &ServiceEntry) {
    if spec.hosts.is_empty() {
        check.error("spec.hosts", "at least one host is required");
    }
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        if host == "*" {
            check.error(field, "\"*\" is too wide");
        } else {
            check.host(field, host, false);
            if host.starts_with('*')
                && matches!(spec.resolution, Resolution::Dns | Resolution::DnsRoundRobin)
                && spec.endpoints.is_empty()
            {
                check.error(
                    format!("spec.hosts[{index}]"),
                    "a wildcard has no address in DNS; list endpoints",
                );
            }
        }
    }
    for (index, address) in spec.addresses.iter().enumerate() {
        if !is_subnet(address) {
            check.error(
                format!("spec.addresses[{index}]"),
                format!("{address:?} is not an address or CIDR"),
            );
        }
    }
    check.export_to(&spec.export_to, true);
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    if spec.ports.is_empty() {
        check.warn("spec.ports", "no port: this entry has no effect");
    }
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        check.port(format!("{field}.number"), port.number);
        if port.target_port != 0 {
            check.port(format!("{field}.targetPort"), port.target_port);
        }
        if port.name.is_empty() {
            check.error(format!("{field}.name"), "missing");
        } else if !names.insert(&port.name) {
            check.error(
                format!("{field}.name"),
                format!("{:?} is there twice", port.name),
            );
        }
        if !numbers.insert(port.number) {
            check.error(
                format!("{field}.number"),
                format!("{} is there twice", port.number),
            );
        }
        if !port.protocol.is_empty() {
            protocol(check, format!("{field}.protocol"), &port.protocol);
        }
    }
    if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
        check.error(
            "spec.endpoints",
            "endpoints and workloadSelector exclude each other",
        );
    }
    if spec.resolution == Resolution::None && !spec.endpoints.is_empty() {
        check.error("spec.endpoints", "resolution NONE has no endpoints");
    }
    if spec.resolution == Resolution::Static
        && spec.endpoints.is_empty()
        && spec.workload_selector.is_none()
    {
        check.warn(
            "spec.endpoints",
            "resolution STATIC without endpoints: nothing will answer",
        );
    }
    if spec.resolution == Resolution::DynamicDns {
        check.warn(
            "spec.resolution",
            "DYNAMIC_DNS is not supported by this version",
        );
    }
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let field = format!("spec.endpoints[{index}]");
        workload_entry(check, &field, endpoint);
        if spec.resolution == Resolution::Static
            && endpoint.address.parse::<std::net::IpAddr>().is_err()
            && !endpoint.address.starts_with("unix://")
        {
            check.error(
                format!("{field}.address"),
                "resolution STATIC needs an IP address",
            );
        }
        for name in endpoint.ports.keys() {
            if !names.contains(name) {
                check.error(
                    format!("{field}.ports.{name}"),
                    format!("{name:?} is not a port of this entry"),
                );
            }
        }
    }
}

pub(super) fn workload_entry(check: &mut Check<'_>, field: &str, spec: &WorkloadEntry) {
    let address = format!("{field}.address");
    if let Some(path) = spec.address.strip_prefix("unix://") {
        if !path.starts_with('/') && !path.starts_with('@') {
            check.error(address, "a unix socket needs an absolute path");
        }
        if !spec.ports.is_empty() {
            check.error(format!("{field}.ports"), "a unix socket has no ports");
        }
    } else if spec.address.is_empty() {
        if spec.network.is_empty() {
            check.error(address, "missing");
        }
    } else if spec.address.parse::<std::net::IpAddr>().is_err() && !is_dns(&spec.address) {
        check.error(
            address,
            format!("{:?} is neither an address nor a DNS name", spec.address),
        );
    }
    for (name, number) in &spec.ports {
        check.port(format!("{field}.ports.{name}"), *number);
    }
    check.labels(&format!("{field}.labels"), &spec.labels);
}

pub(super) fn sidecar(check: &mut Check<'_>, spec: &Sidecar) {
    for (index, listener) in spec.egress.iter().enumerate() {
        let field = format!("spec.egress[{index}].hosts");
        if listener.hosts.is_empty() {
            check.error(&*field, "at least one host is required");
        }
        for (index, host) in listener.hosts.iter().enumerate() {
            let field = format!("{field}[{index}]");
            match host.split_once('/') {
                None => check.error(field, format!("{host:?} is not NAMESPACE/HOST")),
                Some((namespace, name)) => {
                    if !(matches!(namespace, "." | "*" | "~") || is_dns_label(namespace)) {
                        check.error(
                            &*field,
                            format!("{namespace:?} is not a namespace, \".\", \"*\" or \"~\""),
                        );
                    }
                    check.host(field, name, false);
                }
            }
        }
        if listener.port.is_some() {
            check.warn(
                format!("spec.egress[{index}].port"),
                "not supported by this version; ignored",
            );
        }
    }
    if spec.ingress.iter().any(|listener| {
        listener.tls.is_some()
            || listener.connection_pool.is_some()
            || !listener.bind.is_empty()
            || listener.capture_mode == "NONE"
    }) {
        check.warn(
            "spec.ingress",
            "bind, captureMode, tls and connectionPool are not supported by this version; ignored",
        );
    }
}

pub(super) fn peer_authentication(check: &mut Check<'_>, spec: &PeerAuthentication) {
    if let Some(selector) = &spec.selector {
        check.labels("spec.selector.matchLabels", &selector.match_labels);
    }
    if !spec.port_level_mtls.is_empty() && spec.labels().is_none() {
        check.error(
            "spec.portLevelMtls",
            "needs a selector: ports are the workload's",
        );
    }
    if spec.port_level_mtls.contains_key(&0) {
        check.error("spec.portLevelMtls.0", "port 0 is not between 1 and 65535");
    }
}

pub(super) fn authentication_policy(check: &mut Check<'_>, spec: &AuthenticationPolicy) {
    if check.object.key.kind.as_ref() == "MeshPolicy" && check.object.key.name.as_ref() != "default"
    {
        check.error("metadata.name", "a MeshPolicy must be called default");
    }
    for (index, target) in spec.targets.iter().enumerate() {
        let field = format!("spec.targets[{index}].name");
        if target.name.is_empty() {
            check.error(field, "missing");
        } else if !is_dns_label(&target.name) {
            check.error(field, "must be a service's short name");
        }
    }
    if !spec.origins.is_empty() || spec.peers.iter().any(|peer| peer.jwt.is_some()) {
        check.warn(
            "spec.origins",
            "end-user authentication is NOT enforced by this version",
        );
    }
}

pub(super) fn quota_spec(check: &mut Check<'_>, spec: &QuotaSpec) {
    if spec.rules.is_empty() {
        check.error("spec.rules", "at least one rule is required");
    }
    for (index, rule) in spec.rules.iter().enumerate() {
        let field = format!("spec.rules[{index}]");
        if rule.quotas.is_empty() {
            check.error(format!("{field}.quotas"), "at least one quota is required");
        }
        for (index, quota) in rule.quotas.iter().enumerate() {
            let field = format!("{field}.quotas[{index}]");
            if quota.quota.is_empty() {
                check.error(format!("{field}.quota"), "missing");
            }
            if quota.charge <= 0 {
                check.error(
                    format!("{field}.charge"),
                    format!("{} is not a positive number", quota.charge),
                );
            }
        }
        for (index, entry) in rule.matches.iter().enumerate() {
            for (attribute, matcher) in &entry.clause {
                check.string_match(
                    format!("{field}.match[{index}].clause.{attribute}"),
                    matcher,
                );
            }
        }
    }
}

pub(super) fn quota_spec_binding(check: &mut Check<'_>, spec: &QuotaSpecBinding) {
    if spec.services.is_empty() {
        check.error("spec.services", "at least one service is required");
    }
    for (index, service) in spec.services.iter().enumerate() {
        let field = format!("spec.services[{index}]");
        if service.name.is_empty() && service.service.is_empty() {
            check.error(field, "name or service is required");
        } else if !service.service.is_empty()
            && (!service.namespace.is_empty() || !service.name.is_empty())
        {
            check.error(field, "service stands alone, without name and namespace");
        }
    }
    if spec.quota_specs.is_empty() {
        check.error("spec.quotaSpecs", "at least one QuotaSpec is required");
    }
    for (index, reference) in spec.quota_specs.iter().enumerate() {
        if !is_dns(&reference.name) {
            check.error(
                format!("spec.quotaSpecs[{index}].name"),
                format!("{:?} is not a name", reference.name),
            );
        }
    }
}

pub(super) fn service(check: &mut Check<'_>, spec: &kubernetes::Service) {
    let mut seen = BTreeSet::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        check.port(format!("{field}.port"), port.port.into());
        if !seen.insert((port.port, port.protocol.to_ascii_uppercase())) {
            check.error(
                format!("{field}.port"),
                format!("{} is there twice", port.port),
            );
        }
    }
}
