//! VirtualService: hosts, gateways, TLS and TCP routes, destinations. HTTP routes: [`super::http_route`].

use super::http_route::{header_operations, http_route, old_header_operations};
use super::{At, Check, text, unreachable};

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    let hosts = spec.get("hosts");
    let delegate = hosts.count() == 0;
    if delegate {
        for (name, what) in [
            ("gateways", "gateways"),
            ("tls", "TLS routes"),
            ("tcp", "TCP routes"),
        ] {
            if spec.get(name).count() > 0 {
                check.error(
                    &spec.get(name),
                    format!("a VirtualService without hosts is a delegate, which has no {what}; name hosts, or remove them"),
                );
            }
        }
    }
    let gateways = spec.get("gateways");
    gateway_names(check, &gateways);
    let for_gateway = gateways.count() > 0 && !gateways.texts().contains(&"mesh");
    if !for_gateway {
        claim_routes(check, spec);
    }
    virtual_hosts(check, spec, for_gateway);
    if ["http", "tcp", "tls"]
        .iter()
        .all(|name| spec.get(name).count() == 0)
    {
        check.error(spec, "at least one of http, tcp and tls is required");
    }
    for route in spec.get("http").items() {
        http_route(check, &route, delegate);
    }
    for route in spec.get("tls").items() {
        tls_route(check, &route, spec, for_gateway);
    }
    for route in spec.get("tcp").items() {
        for matcher in route.get("match").items() {
            l4_match(check, &matcher);
        }
        if route.get("route").count() == 0 {
            check.error(&route.get("route"), "at least one destination is required");
        }
        destinations(check, &route.get("route"), false);
    }
    check.export_to(&spec.get("exportTo"), false, false);
    unreachable::check(check, spec);
}

/// Routing by a token's claims needs a gateway: sidecars verify no tokens before they route.
fn claim_routes(check: &mut Check<'_>, spec: &At<'_>) {
    for matcher in spec
        .get("http")
        .items()
        .flat_map(|route| route.get("match").items())
    {
        for (name, header) in matcher
            .get("headers")
            .entries()
            .chain(matcher.get("withoutHeaders").entries())
        {
            if text::is_claim_route(name) {
                check.error(
                    &header,
                    "routing by JWT claims is for gateways only; name a gateway in spec.gateways",
                );
            }
        }
    }
}

fn virtual_hosts(check: &mut Check<'_>, spec: &At<'_>, for_gateway: bool) {
    let by_sni = spec
        .get("tls")
        .items()
        .flat_map(|route| route.get("match").items())
        .any(|matcher| matcher.get("sniHosts").count() > 0);
    let hosts = spec.get("hosts");
    let mut all_good = true;
    for at in hosts.items() {
        let host = at.text();
        if for_gateway && by_sni && is_sni_cluster(host) || text::is_ip(host) {
            continue;
        }
        if host == "*" && !for_gateway {
            check.error(
                &at,
                "\"*\" is for gateways; name one in spec.gateways and leave mesh out",
            );
            all_good = false;
        } else {
            all_good &= check.wildcard_domain(&at, host);
        }
    }
    if !all_good {
        return;
    }
    let names = hosts.texts();
    for (index, (at, host)) in hosts.items().zip(&names).enumerate() {
        if let Some(other) = names
            .iter()
            .skip(index + 1)
            .find(|other| text::overlap(host, other))
        {
            check.error(
                &at,
                format!("{host:?} and {other:?} are about the same hosts; keep one"),
            );
        }
    }
}

/// `outbound_.PORT_.SUBSET_.HOST`, the server name of Istio's own mTLS.
fn is_sni_cluster(host: &str) -> bool {
    host.strip_prefix("outbound_.")
        .is_some_and(|rest| rest.contains(|c: char| ('0'..='8').contains(&c)))
}

/// `NAMESPACE/NAME`, `NAME`, or the old `NAME.NAMESPACE.svc.DOMAIN`.
fn gateway_names(check: &mut Check<'_>, at: &At<'_>) {
    for item in at.items() {
        let name = item.text();
        match name.split_once('/') {
            Some((namespace, gateway)) => {
                if !text::is_dns_label(namespace) {
                    check.error(
                        &item,
                        format!("{namespace:?} is not a namespace; write NAMESPACE/NAME"),
                    );
                }
                if !text::is_dns_label(gateway) {
                    check.error(&item, format!("{gateway:?} is not the name of a Gateway"));
                }
            }
            None => {
                if let Some((gateway, rest)) = name.split_once('.') {
                    let namespace = rest.split('.').next().unwrap_or_default();
                    check.warn(
                        &item,
                        format!("an old way to name a gateway; write {namespace}/{gateway}"),
                    );
                }
                if !text::is_fqdn(name) {
                    check.error(&item, format!("{name:?} is not the name of a Gateway"));
                }
            }
        }
    }
}

pub(super) fn match_common(check: &mut Check<'_>, at: &At<'_>) {
    let port = at.get("port");
    if port.int() != 0 {
        check.port(&port);
    }
    check.labels(&at.get("sourceLabels"));
    gateway_names(check, &at.get("gateways"));
}

/// Weighted destinations.
pub(super) fn destinations(check: &mut Check<'_>, at: &At<'_>, http: bool) {
    let mut total = 0;
    for weighted in at.items() {
        if !weighted.has("destination") {
            check.error(&weighted.get("destination"), "missing; it is required");
        }
        if http {
            header_operations(check, &weighted.get("headers"));
            old_header_operations(check, &weighted);
        }
        check.destination(&weighted.get("destination"));
        check.not_negative(&weighted, &["weight"]);
        total += weighted.get("weight").int();
    }
    if at.count() > 1 && total == 0 {
        check.error(
            at,
            "the weights add up to 0; give at least one destination a weight",
        );
    }
}

fn tls_route(check: &mut Check<'_>, route: &At<'_>, spec: &At<'_>, for_gateway: bool) {
    if route.get("match").count() == 0 {
        check.error(
            &route.get("match"),
            "at least one match with sniHosts is required",
        );
    }
    for matcher in route.get("match").items() {
        if matcher.get("sniHosts").count() == 0 {
            check.error(
                &matcher.get("sniHosts"),
                "at least one SNI host is required",
            );
        }
        for sni in matcher.get("sniHosts").items() {
            sni_host(check, &sni, spec, for_gateway);
        }
        l4_match(check, &matcher);
    }
    if route.get("route").count() == 0 {
        check.error(&route.get("route"), "at least one destination is required");
    }
    destinations(check, &route.get("route"), false);
}

fn sni_host(check: &mut Check<'_>, at: &At<'_>, spec: &At<'_>, for_gateway: bool) {
    let sni = at.text();
    if text::is_ip(sni) {
        check.warn(
            at,
            format!("{sni:?} is an address; clients send no SNI for those"),
        );
        return;
    }
    let good = for_gateway && is_sni_cluster(sni) || check.wildcard_domain(at, sni);
    if !good {
        return;
    }
    let hosts = spec.get("hosts").texts();
    if !hosts.iter().any(|host| text::covers(host, sni)) {
        check.error(
            at,
            format!(
                "{sni:?} is not among the hosts of the VirtualService, {}",
                hosts.join(", ")
            ),
        );
    }
}

fn l4_match(check: &mut Check<'_>, at: &At<'_>) {
    for subnet in at.get("destinationSubnets").items() {
        check.subnet(&subnet);
    }
    match_common(check, at);
}
