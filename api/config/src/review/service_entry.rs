//! ServiceEntry, WorkloadEntry, WorkloadGroup.

use super::{At, Check, text};
use text::Protocol;

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    let resolution = match spec.str("resolution") {
        "" => "NONE",
        named => named,
    };
    let (hosts, ports, endpoints) = (spec.get("hosts"), spec.get("ports"), spec.get("endpoints"));
    let selector = spec.get("workloadSelector");
    check.workload_selector(&selector);
    if selector.is_set() && endpoints.count() > 0 {
        check.error(
            &selector,
            "workloadSelector and endpoints exclude each other",
        );
    }
    if hosts.count() == 0 {
        check.error(&hosts, "at least one host is required");
    }
    for host in hosts.items() {
        if host.text() == "*" {
            check.error(&host, "\"*\" is too wide");
        } else {
            check.wildcard_domain(&host, host.text());
            if text::is_partial_wildcard(host.text()) {
                check.warn(
                    &host,
                    format!(
                        "{:?}: * stands for whole labels only, such as *.example.com",
                        host.text()
                    ),
                );
            }
        }
    }
    for address in spec.get("addresses").items() {
        check.subnet(&address);
        if address.text().contains('/') && !matches!(resolution, "NONE" | "STATIC") {
            check.error(
                &address,
                format!("a CIDR block needs resolution NONE or STATIC, not {resolution}"),
            );
        }
    }
    let names = service_ports(check, spec);
    match resolution {
        "NONE" => {
            if endpoints.count() > 0 {
                check.error(
                    &endpoints,
                    "resolution NONE takes no endpoints; use STATIC or DNS",
                );
            }
            if selector.is_set() {
                check.warn(&selector, "has no effect with resolution NONE; use STATIC");
            }
        }
        "STATIC" => {
            for endpoint in endpoints.items() {
                workload_entry(check, &endpoint, Some(&names), false);
            }
        }
        "DYNAMIC_DNS" => dynamic_dns(check, spec),
        _ => dns(check, spec, resolution, &names),
    }
    if resolution != "NONE" && hosts.count() > 1 {
        let other = ports.items().find(|port| {
            !matches!(
                text::protocol(port.str("protocol")),
                Protocol::Http | Protocol::Tls
            )
        });
        if let Some(port) = other {
            check.error(&port, "several hosts can only be told apart on HTTP and TLS ports; write a ServiceEntry for each host");
        }
    }
    check.export_to(&spec.get("exportTo"), true, false);
}

/// Checks the ports; their names.
fn service_ports<'a>(check: &mut Check<'_>, spec: &At<'a>) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    let mut numbers: Vec<i64> = Vec::new();
    // Istio allocates addresses for names that DNS could resolve one by one.
    let allocated = !matches!(spec.str("resolution"), "" | "NONE")
        && !spec
            .get("hosts")
            .texts()
            .iter()
            .all(|host| host.contains('*'));
    for port in spec.get("ports").items() {
        let (name, number) = (port.str("name"), port.get("number").int());
        if names.contains(&name) {
            check.error(
                &port.get("name"),
                format!("{name:?} is there twice; port names are unique"),
            );
        }
        names.push(name);
        if numbers.contains(&number) {
            check.error(&port.get("number"), format!("port {number} is there twice"));
        }
        numbers.push(number);
        if port.get("targetPort").int() != 0 {
            check.port(&port.get("targetPort"));
        }
        if spec.get("addresses").count() == 0
            && !allocated
            && matches!(port.str("protocol"), "" | "TCP")
        {
            check.warn(
                &port,
                "a TCP port needs spec.addresses: without them its traffic cannot be recognised",
            );
        }
        check.port_name(&port.get("name"), name);
        check.protocol(&port.get("protocol"), port.str("protocol"));
        check.port(&port.get("number"));
    }
    names
}

fn dns(check: &mut Check<'_>, spec: &At<'_>, resolution: &str, names: &[&str]) {
    let (hosts, endpoints) = (spec.get("hosts"), spec.get("endpoints"));
    if endpoints.count() == 0 {
        for host in hosts.items() {
            if !text::is_fqdn(host.text()) {
                check.error(&host, "a wildcard has no address in DNS; list endpoints");
            }
        }
    }
    if resolution == "DNS_ROUND_ROBIN" && endpoints.count() > 1 {
        check.error(
            &endpoints,
            "DNS_ROUND_ROBIN takes one endpoint at most; use DNS",
        );
    }
    for endpoint in endpoints.items() {
        let address = endpoint.get("address");
        if !text::is_ip(address.text()) && !text::is_fqdn(address.text()) {
            check.error(
                &address,
                format!(
                    "{:?} is neither a host name nor an IP address",
                    address.text()
                ),
            );
        }
        check.labels(&endpoint.get("labels"));
        endpoint_ports(check, &endpoint, Some(names));
    }
    let tcp = spec.get("ports").items().any(|port| {
        text::protocol(port.str("protocol")) == Protocol::Tcp
            || text::protocol(port.str("protocol")) == Protocol::Tls
    });
    if spec.get("addresses").count() > 0 && tcp && hosts.count() > 1 {
        check.warn(&hosts, "several hosts share these addresses, which TCP cannot tell apart; write a ServiceEntry for each");
    }
}

/// Each wildcard host is resolved when it is asked for, by the name in the request.
fn dynamic_dns(check: &mut Check<'_>, spec: &At<'_>) {
    for host in spec.get("hosts").items() {
        if !host.text().starts_with("*.") {
            check.error(
                &host,
                "DYNAMIC_DNS is for wildcard hosts such as *.example.com; use DNS",
            );
        }
    }
    if spec.get("addresses").count() > 0 {
        check.error(&spec.get("addresses"), "DYNAMIC_DNS takes no addresses");
    }
    if spec.get("endpoints").count() > 0 {
        check.error(&spec.get("endpoints"), "DYNAMIC_DNS takes no endpoints");
    }
    if spec.has("workloadSelector") {
        check.error(
            &spec.get("workloadSelector"),
            "DYNAMIC_DNS takes no workloadSelector",
        );
    }
    for port in spec.get("ports").items() {
        if !matches!(
            text::protocol(port.str("protocol")),
            Protocol::Http | Protocol::Tls
        ) {
            check.error(
                &port.get("protocol"),
                "DYNAMIC_DNS needs a name in the request: HTTP or TLS",
            );
        }
    }
}

fn endpoint_ports(check: &mut Check<'_>, endpoint: &At<'_>, names: Option<&[&str]>) {
    for (name, port) in endpoint.get("ports").entries() {
        if names.is_some_and(|names| !names.contains(&name)) {
            check.error(&port, format!("the ServiceEntry has no port {name:?}"));
        }
        check.port_name(&port, name);
        check.port(&port);
    }
}

/// A WorkloadEntry, alone or as an endpoint of a ServiceEntry with these port names.
pub(super) fn workload_entry(
    check: &mut Check<'_>,
    at: &At<'_>,
    names: Option<&[&str]>,
    names_allowed: bool,
) {
    let address = at.get("address");
    if address.text().is_empty() {
        if at.str("network").is_empty() {
            check.error(&address, "missing; it is required unless network is set");
            return;
        }
        check.warn(
            &address,
            "missing: only other networks reach it, through a gateway of its network",
        );
    } else if let Some(path) = address.text().strip_prefix("unix://") {
        check.unix_path(&address, path);
        if at.get("ports").count() > 0 {
            check.error(&at.get("ports"), "a unix domain socket has no ports");
        }
        if names.is_some_and(|names| names.len() != 1) {
            check.error(&address, "a unix domain socket serves exactly one port");
        }
    } else if !(text::is_ip(address.text()) || names_allowed && text::is_fqdn(address.text())) {
        let wanted = if names_allowed {
            "neither a host name nor an IP address"
        } else {
            "not an IP address"
        };
        check.error(&address, format!("{:?} is {wanted}", address.text()));
    }
    endpoint_ports(check, at, names);
    check.labels(&at.get("labels"));
}

pub(super) fn workload_group(check: &mut Check<'_>, spec: &At<'_>) {
    check.labels(&spec.get("metadata").get("labels"));
    let probe = spec.get("probe");
    if !probe.is_set() {
        return;
    }
    if !["httpGet", "tcpSocket", "exec", "grpc"]
        .iter()
        .any(|name| probe.has(name))
    {
        check.error(
            &probe,
            "one of httpGet, tcpSocket, exec and grpc is required",
        );
    }
    let http = probe.get("httpGet");
    if !matches!(http.str("scheme"), "" | "HTTP" | "HTTPS") {
        check.error(&http.get("scheme"), "must be HTTP or HTTPS");
    }
    if probe.has("exec") && probe.get("exec").get("command").count() == 0 {
        check.error(&probe.get("exec").get("command"), "missing; it is required");
    }
}
