//! Gateway: servers, their hosts, ports and TLS.

use super::{At, Check, text};

/// Cipher suites by the names Envoy takes.
const CIPHERS: &[&str] = &[
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
    "ECDHE-ECDSA-AES128-SHA256",
    "ECDHE-RSA-AES128-SHA256",
    "ECDHE-ECDSA-AES256-SHA384",
    "ECDHE-RSA-AES256-SHA384",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "AES128-SHA256",
    "AES256-SHA256",
    "PSK-AES128-CBC-SHA",
    "PSK-AES256-CBC-SHA",
    "DES-CBC3-SHA",
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "ALL",
    "HIGH",
    "3DES",
    "AES128",
    "AES256",
    "AES",
    "AESGCM",
    "CHACHA20",
    "ECDHE",
    "EECDH",
    "ECDSA",
    "RSA",
    "PSK",
    "SHA",
    "SHA1",
    "SHA256",
    "SHA384",
    "TLSv1",
    "TLSv1.2",
    "SSLv3",
    "FIPS",
    "kRSA",
    "aRSA",
    "aECDSA",
    "kECDHE",
    "kEECDH",
    "kPSK",
    "aPSK",
    "kGENERIC",
    "aGENERIC",
];

/// Whether TLS knows a cipher suite by that name.
#[must_use]
pub fn is_cipher_suite(name: &str) -> bool {
    CIPHERS.contains(&name)
}

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    if !text::is_dns_label(check.subject.name) && !check.subject.name.is_empty() {
        let at = At::new(spec.value, "metadata.name");
        let reason = format!(
            "{:?} is not a Gateway's name: letters, digits and - only",
            check.subject.name
        );
        check.error(&at, reason);
    }
    let servers = spec.get("servers");
    if servers.count() == 0 {
        check.error(&servers, "at least one server is required");
    }
    check.labels(&spec.get("selector"));
    let mut names: Vec<&str> = Vec::new();
    for server in servers.items() {
        server_hosts(check, &server);
        let port = server.get("port");
        let good_port = server_port(check, &server);
        bind(check, &server);
        server_tls(check, &server.get("tls"));
        if good_port {
            tls_fits_protocol(check, &server);
        }
        if port.is_set() {
            let name = port.str("name");
            if names.contains(&name) {
                check.error(
                    &port.get("name"),
                    format!("{name:?} is there twice; port names are unique"),
                );
            }
            names.push(name);
            if text::protocol(port.str("protocol")) != text::Protocol::Http
                && server.get("tls").flag("httpsRedirect")
            {
                check.warn(
                    &server.get("tls").get("httpsRedirect"),
                    "is for plain HTTP servers",
                );
            }
        }
    }
}

fn server_hosts(check: &mut Check<'_>, server: &At<'_>) {
    let hosts = server.get("hosts");
    if hosts.count() == 0 {
        check.error(&hosts, "at least one host is required");
    }
    for host in hosts.items() {
        namespaced_host(check, &host, true);
    }
}

/// `[NAMESPACE/]HOST` in a Gateway, `NAMESPACE/HOST` in a Sidecar.
pub(super) fn namespaced_host(check: &mut Check<'_>, at: &At<'_>, of_gateway: bool) {
    let host = match at.text().split_once('/') {
        None if of_gateway => at.text(),
        None => {
            check.error(
                at,
                format!(
                    "{:?} must be NAMESPACE/HOST, such as ./* or prod/*.example.com",
                    at.text()
                ),
            );
            return;
        }
        Some((namespace, host)) => {
            let special = matches!(namespace, "*" | ".") || namespace == "~" && !of_gateway;
            if !special && !text::is_dns_label(namespace) {
                check.error(
                    at,
                    format!("{namespace:?} is not a namespace, \".\" or \"*\""),
                );
            }
            host
        }
    };
    if of_gateway && text::is_ip(host) {
        return;
    }
    if host != "*" && !host.contains('.') && !host.is_empty() {
        check.error(at, format!("{host:?} is a short name; write the whole one, such as {host}.NAMESPACE.svc.cluster.local"));
    }
    check.wildcard_domain(at, host);
    if text::is_partial_wildcard(host) {
        check.error(
            at,
            format!("{host:?}: * stands for whole labels only, such as *.example.com"),
        );
    }
}

fn server_port(check: &mut Check<'_>, server: &At<'_>) -> bool {
    let before = check.findings.len();
    let port = server.get("port");
    if !port.is_set() {
        check.error(&port, "missing; it is required");
        return false;
    }
    let protocol = port.get("protocol");
    if protocol.text().is_empty() {
        check.error(&protocol, "missing; it is required");
    } else {
        check.protocol(&protocol, protocol.text());
    }
    if port.get("number").int() > 0 || !server.str("bind").starts_with("unix://") {
        check.port(&port.get("number"));
    }
    if port.get("targetPort").int() > 0 {
        check.error(
            &port.get("targetPort"),
            "has no effect on a Gateway; remove it",
        );
    }
    if port.str("name").is_empty() {
        check.error(&port.get("name"), "missing; it is required");
    }
    check.findings.len() == before
}

fn bind(check: &mut Check<'_>, server: &At<'_>) {
    let bind = server.get("bind");
    if let Some(path) = bind.text().strip_prefix("unix://") {
        check.unix_path(&bind, path);
        if server.get("port").get("number").int() != 0 {
            check.error(
                &server.get("port").get("number"),
                "must be 0 for a unix domain socket",
            );
        }
    } else if !bind.text().is_empty() && !text::is_ip(bind.text()) {
        check.error(&bind, format!("{:?} is not an IP address", bind.text()));
    }
}

fn tls_fits_protocol(check: &mut Check<'_>, server: &At<'_>) {
    let (tls, name) = (server.get("tls"), server.get("port").str("protocol"));
    let set = |name: &str| !tls.str(name).is_empty();
    match text::protocol(name) {
        text::Protocol::Tls if !tls.is_set() => {
            check.error(&tls, format!("required for {name}"));
        }
        text::Protocol::Tls => {}
        text::Protocol::Http if tls.is_set() => {
            let passthrough = matches!(tls.str("mode"), "" | "PASSTHROUGH" | "AUTO_PASSTHROUGH");
            if !passthrough
                || set("caCertificates")
                || set("privateKey")
                || set("serverCertificate")
            {
                check.error(&tls, format!("a plain {name} port has no TLS; use protocol HTTPS, or keep httpsRedirect only"));
            }
        }
        _ if tls.is_set() => {
            check.error(
                &tls,
                format!("{name} has no TLS; use protocol TLS or HTTPS"),
            );
        }
        _ => {}
    }
}

/// TLS of a server of a Gateway, or of an inbound listener of a Sidecar.
pub(super) fn server_tls(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let set = |name: &str| !at.str(name).is_empty();
    let many = |name: &str| at.get(name).count() > 0;
    let mode = match at.str("mode") {
        "" => "PASSTHROUGH",
        mode => mode,
    };
    let ciphers = at.get("cipherSuites");
    if matches!(at.str("minProtocolVersion"), "TLSV1_0" | "TLSV1_1") && ciphers.count() == 0 {
        check.warn(
            &at.get("minProtocolVersion"),
            "below TLSV1_2 no default cipher suite fits; name some in cipherSuites",
        );
    }
    let mut seen: Vec<&str> = Vec::new();
    for cipher in ciphers.items() {
        let name = cipher.text().trim_start_matches(['-', '+', '!']);
        if !CIPHERS.contains(&name) {
            check.warn(
                &cipher,
                format!("{:?} is not a cipher suite; ignored", cipher.text()),
            );
        } else if seen.contains(&cipher.text()) {
            check.warn(&cipher, format!("{:?} is listed twice", cipher.text()));
        }
        seen.push(cipher.text());
    }
    let files = ["serverCertificate", "privateKey", "caCertificates"];
    if mode == "ISTIO_MUTUAL" {
        for name in files.iter().chain(&["credentialName"]) {
            if set(name) {
                check.error(
                    &at.get(name),
                    "ISTIO_MUTUAL uses the mesh's certificates; remove it",
                );
            }
        }
        for name in ["tlsCertificates", "credentialNames"] {
            if many(name) {
                check.error(
                    &at.get(name),
                    "ISTIO_MUTUAL uses the mesh's certificates; remove it",
                );
            }
        }
        return;
    }
    let passes = matches!(mode, "PASSTHROUGH" | "AUTO_PASSTHROUGH");
    if passes
        && (files.iter().any(|name| set(name))
            || set("caCrl")
            || set("credentialName")
            || many("tlsCertificates")
            || many("credentialNames"))
    {
        check.warn(
            at,
            format!("{mode} uses no certificates; those given have no effect"),
        );
    }
    let sources = usize::from(set("serverCertificate") && set("privateKey"))
        + usize::from(set("credentialName"))
        + usize::from(many("credentialNames"))
        + usize::from(many("tlsCertificates"));
    if sources > 1 {
        check.error(at, "only one of credentialName, credentialNames, serverCertificate with privateKey, and tlsCertificates may be set");
    }
    if !passes && (set("credentialName") || many("credentialNames")) {
        return;
    }
    if !passes {
        certificates(check, at, mode);
    }
    if set("caCrl") {
        if set("credentialName") {
            check.error(
                &at.get("caCrl"),
                "a credential brings its own CRL; put it there",
            );
        }
        if mode == "SIMPLE" {
            check.error(
                &at.get("caCrl"),
                "SIMPLE asks clients for no certificate, so a CRL has no effect; use MUTUAL",
            );
        }
    }
}

fn certificates(check: &mut Check<'_>, at: &At<'_>, mode: &str) {
    if mode != "SIMPLE" && at.str("caCertificates").is_empty() {
        check.error(
            &at.get("caCertificates"),
            format!("required for {mode}, or credentialName"),
        );
    }
    let listed: Vec<At<'_>> = at.get("tlsCertificates").items().collect();
    if listed.len() > 2 {
        check.warn(&at.get("tlsCertificates"), "only the first two are used");
    }
    let all = if listed.is_empty() {
        vec![at.clone()]
    } else {
        listed
    };
    for certificate in all {
        for name in ["serverCertificate", "privateKey"] {
            if certificate.str(name).is_empty() {
                check.error(
                    &certificate.get(name),
                    format!("required for {mode}, or credentialName"),
                );
            }
        }
    }
}
