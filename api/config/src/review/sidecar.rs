//! Sidecar: listeners, hosts in sight.

use std::collections::{BTreeMap, BTreeSet};

use super::{At, Check, destination_rule, gateway, text};

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    check.workload_selector(&spec.get("workloadSelector"));
    let (ingress, egress) = (spec.get("ingress"), spec.get("egress"));
    if ingress.count() == 0
        && egress.count() == 0
        && !spec.has("outboundTrafficPolicy")
        && !spec.has("inboundConnectionPool")
    {
        check.error(
            spec,
            "says nothing; set egress, ingress, outboundTrafficPolicy or inboundConnectionPool",
        );
    }
    let mut ports = BTreeSet::new();
    for listener in ingress.items() {
        ingress_listener(check, &listener);
        let number = listener.get("port").get("number");
        if listener.has("port") && !ports.insert(number.int()) {
            check.error(&number, format!("port {} is there twice", number.int()));
        }
    }
    destination_rule::connection_pool(check, &spec.get("inboundConnectionPool"));
    egress_listeners(check, &egress);
    outbound_policy(check, &spec.get("outboundTrafficPolicy"));
}

fn ingress_listener(check: &mut Check<'_>, listener: &At<'_>) {
    let port = listener.get("port");
    if !port.is_set() {
        check.error(&port, "missing; it is required");
        return;
    }
    listener_port(check, &port);
    check.port(&port.get("number"));
    bind_address(check, listener);
    default_endpoint(check, &listener.get("defaultEndpoint"));
    let tls = listener.get("tls");
    if tls.is_set() {
        for name in ["subjectAltNames", "credentialNames", "tlsCertificates"] {
            if tls.get(name).count() > 0 {
                check.error(
                    &tls.get(name),
                    "is for gateways; a Sidecar takes files only",
                );
            }
        }
        if tls.flag("httpsRedirect") {
            check.error(&tls.get("httpsRedirect"), "is for gateways; remove it");
        }
        if !tls.str("credentialName").is_empty() {
            check.error(
                &tls.get("credentialName"),
                "is for gateways; a Sidecar takes files only",
            );
        }
        if matches!(tls.str("mode"), "ISTIO_MUTUAL" | "AUTO_PASSTHROUGH") {
            check.error(
                &tls.get("mode"),
                format!("{} is for gateways; use SIMPLE or MUTUAL", tls.str("mode")),
            );
        }
        if text::protocol(port.str("protocol")) != text::Protocol::Tls {
            check.error(&tls, "needs protocol HTTPS or TLS");
        }
        gateway::server_tls(check, &tls);
    }
    let pool = listener.get("connectionPool");
    destination_rule::connection_pool(check, &pool);
    if pool.has("http") && text::protocol(port.str("protocol")) != text::Protocol::Http {
        check.warn(
            &pool.get("http"),
            "has no effect: the port's protocol is not HTTP",
        );
    }
}

/// What inbound and outbound ports share.
fn listener_port(check: &mut Check<'_>, port: &At<'_>) {
    if port.get("targetPort").int() > 0 {
        check.error(
            &port.get("targetPort"),
            "has no effect on a Sidecar; remove it",
        );
    }
    if !port.str("name").is_empty() {
        check.port_name(&port.get("name"), port.str("name"));
    }
    check.protocol(&port.get("protocol"), port.str("protocol"));
}

fn bind_address(check: &mut Check<'_>, listener: &At<'_>) {
    let bind = listener.get("bind");
    if !bind.text().is_empty() && !text::is_ip(bind.text()) {
        check.error(&bind, format!("{:?} is not an IP address", bind.text()));
    }
}

/// `127.0.0.1:PORT`, `0.0.0.0:PORT`, `[::1]:PORT`, `[::]:PORT`, `:PORT` or `unix://PATH`.
fn default_endpoint(check: &mut Check<'_>, at: &At<'_>) {
    if at.text().is_empty() {
        return;
    }
    if let Some(path) = at.text().strip_prefix("unix://") {
        check.unix_path(at, path);
        return;
    }
    let good = at.text().rsplit_once(':').is_some_and(|(host, port)| {
        matches!(host, "" | "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]")
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if !good {
        check.error(
            at,
            format!(
                "{:?} must be 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix://PATH",
                at.text()
            ),
        );
    }
}

fn egress_listeners(check: &mut Check<'_>, egress: &At<'_>) {
    let (mut ports, mut sockets) = (BTreeSet::new(), BTreeSet::new());
    let last = egress.count().saturating_sub(1);
    for (index, listener) in egress.items().enumerate() {
        let port = listener.get("port");
        if port.is_set() {
            egress_port(check, &listener);
            let number = port.get("number").int();
            let fresh = if number == 0 {
                sockets.insert(listener.str("bind"))
            } else {
                ports.insert(number)
            };
            if !fresh {
                check.error(&port, "this port or socket is there twice");
            }
        } else if index != last {
            check.error(&listener, "a listener without port takes all that is left, so it must be the last, and only one");
        }
        egress_hosts(check, &listener.get("hosts"));
    }
}

fn egress_port(check: &mut Check<'_>, listener: &At<'_>) {
    let port = listener.get("port");
    listener_port(check, &port);
    let bind = listener.get("bind");
    if port.get("number").int() != 0 {
        check.port(&port.get("number"));
        bind_address(check, listener);
        return;
    }
    match bind.text().strip_prefix("unix://") {
        Some(path) => check.unix_path(&bind, path),
        None => check.error(
            &port.get("number"),
            "port 0 needs a unix domain socket as bind (unix://PATH)",
        ),
    }
    if listener.str("captureMode") == "IPTABLES" {
        check.error(
            &listener.get("captureMode"),
            "a unix domain socket cannot be captured; use NONE",
        );
    }
}

fn egress_hosts(check: &mut Check<'_>, hosts: &At<'_>) {
    if hosts.count() == 0 {
        check.error(
            hosts,
            "at least one host is required, such as ./* or istio-system/*",
        );
    }
    let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let own = check.subject.namespace.to_owned();
    for host in hosts.items() {
        gateway::namespaced_host(check, &host, false);
        let Some((namespace, service)) = host.text().split_once('/') else {
            continue;
        };
        let namespace = if namespace == own { "." } else { namespace };
        let services = seen.entry(namespace).or_default();
        let known = match service {
            "*" => !services.is_empty(),
            service => services.contains(service) || services.contains("*"),
        };
        if known {
            check.warn(
                &host,
                format!("{:?} is covered by another entry of the list", host.text()),
            );
        }
        services.insert(service);
    }
    if seen.get("*").is_some_and(|services| services.contains("*")) && seen.len() > 1 {
        check.warn(hosts, "*/* is everything; the other entries have no effect");
    }
}

fn outbound_policy(check: &mut Check<'_>, at: &At<'_>) {
    let proxy = at.get("egressProxy");
    if !proxy.is_set() {
        return;
    }
    if at.str("mode") != "ALLOW_ANY" {
        check.error(&proxy, "needs mode: ALLOW_ANY");
        return;
    }
    let host = proxy.get("host");
    if !text::is_fqdn(host.text()) {
        check.error(&host, format!("{:?} is not a host name", host.text()));
    }
    if !proxy.has("port") {
        check.error(&proxy.get("port"), "missing; it is required");
        return;
    }
    check.destination(&proxy);
}
