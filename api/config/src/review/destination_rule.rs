//! DestinationRule: host, subsets, traffic policies.

use super::{At, Check, text};

/// Maglev tables must be smaller: Envoy refuses this size.
const MAGLEV_LIMIT: i64 = 5_000_011;

pub(super) fn check(check: &mut Check<'_>, spec: &At<'_>) {
    check.wildcard_domain(&spec.get("host"), spec.str("host"));
    traffic_policy(check, &spec.get("trafficPolicy"));
    let mut seen: Vec<&str> = Vec::new();
    for subset in spec.get("subsets").items() {
        let name = subset.get("name");
        if seen.contains(&name.text()) {
            check.error(&name, format!("{:?} is there twice", name.text()));
        }
        seen.push(name.text());
        check.subset_name(&name);
        check.labels(&subset.get("labels"));
        traffic_policy(check, &subset.get("trafficPolicy"));
    }
    check.export_to(&spec.get("exportTo"), false, spec.has("workloadSelector"));
    check.policy_selector(&spec.get("workloadSelector"));
}

fn traffic_policy(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let fields = [
        "loadBalancer",
        "connectionPool",
        "outlierDetection",
        "tls",
        "portLevelSettings",
        "tunnel",
        "proxyProtocol",
        "retryBudget",
    ];
    if !fields.iter().any(|name| at.has(name)) {
        check.error(
            at,
            format!(
                "says nothing; set one of {}, or remove it",
                fields.join(", ")
            ),
        );
    }
    if at.has("tunnel") && at.has("proxyProtocol") {
        check.error(at, "tunnel and proxyProtocol exclude each other");
    }
    settings(check, at);
    for port in at.get("portLevelSettings").items() {
        if !port.has("port") {
            check.error(&port.get("port"), "missing; it is required");
        } else {
            check.port(&port.get("port").get("number"));
        }
        if !["loadBalancer", "connectionPool", "outlierDetection", "tls"]
            .iter()
            .any(|name| port.has(name))
        {
            check.error(&port, "says nothing about the port; set one of loadBalancer, connectionPool, outlierDetection, tls");
        }
        settings(check, &port);
    }
    let tunnel = at.get("tunnel");
    if tunnel.is_set() {
        if !matches!(tunnel.str("protocol"), "" | "CONNECT" | "POST") {
            check.error(&tunnel.get("protocol"), "must be CONNECT or POST");
        }
        let host = tunnel.get("targetHost");
        if !text::is_fqdn(host.text()) && !text::is_ip(host.text()) {
            check.error(
                &host,
                format!("{:?} is neither a host name nor an IP address", host.text()),
            );
        }
        check.port(&tunnel.get("targetPort"));
    }
}

fn settings(check: &mut Check<'_>, at: &At<'_>) {
    outlier_detection(check, &at.get("outlierDetection"));
    connection_pool(check, &at.get("connectionPool"));
    load_balancer(check, &at.get("loadBalancer"), at.has("outlierDetection"));
    client_tls(check, &at.get("tls"));
}

fn outlier_detection(check: &mut Check<'_>, at: &At<'_>) {
    check.duration(&at.get("baseEjectionTime"));
    check.duration(&at.get("interval"));
    if at.get("consecutiveErrors").int() != 0 {
        check.warn(
            &at.get("consecutiveErrors"),
            "deprecated; use consecutive5xxErrors or consecutiveGatewayErrors",
        );
    }
    if at.get("consecutiveLocalOriginFailures").int() > 0
        && !at.flag("splitExternalLocalOriginErrors")
    {
        check.error(
            &at.get("consecutiveLocalOriginFailures"),
            "has no effect without splitExternalLocalOriginErrors: true",
        );
    }
    check.whole_percent(&at.get("maxEjectionPercent"));
    check.whole_percent(&at.get("minHealthPercent"));
}

pub(super) fn connection_pool(check: &mut Check<'_>, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (http, tcp) = (at.get("http"), at.get("tcp"));
    if !http.is_set() && !tcp.is_set() {
        check.error(at, "says nothing; set http or tcp, or remove it");
    }
    check.not_negative(
        &http,
        &[
            "http1MaxPendingRequests",
            "http2MaxRequests",
            "maxRequestsPerConnection",
            "maxRetries",
            "maxConcurrentStreams",
        ],
    );
    check.duration(&http.get("idleTimeout"));
    if http.str("h2UpgradePolicy") == "UPGRADE" && http.flag("useClientProtocol") {
        check.error(
            &http.get("useClientProtocol"),
            "contradicts h2UpgradePolicy: UPGRADE; keep one",
        );
    }
    check.not_negative(&tcp, &["maxConnections"]);
    for name in ["connectTimeout", "maxConnectionDuration", "idleTimeout"] {
        check.duration(&tcp.get(name));
    }
    check.duration(&tcp.get("tcpKeepalive").get("time"));
    check.duration(&tcp.get("tcpKeepalive").get("interval"));
}

fn load_balancer(check: &mut Check<'_>, at: &At<'_>, outlier: bool) {
    let hash = at.get("consistentHash");
    if hash.has("httpCookie") && hash.get("httpCookie").str("name").is_empty() {
        check.error(
            &hash.get("httpCookie").get("name"),
            "missing; it is required",
        );
    }
    let mut attributes: Vec<&str> = Vec::new();
    for attribute in hash.get("httpCookie").get("attributes").items() {
        let name = attribute.get("name");
        if name.text().is_empty() {
            check.error(&name, "missing; it is required");
        } else if attributes.contains(&name.text()) {
            check.error(&name, format!("{:?} is there twice", name.text()));
        }
        attributes.push(name.text());
    }
    if hash.get("minimumRingSize").int() != 0 {
        check.warn(
            &hash.get("minimumRingSize"),
            "deprecated; use ringHash.minimumRingSize",
        );
        if hash.has("ringHash") || hash.has("maglev") {
            check.error(
                &hash.get("minimumRingSize"),
                "only one of minimumRingSize, ringHash and maglev may be set",
            );
        }
    }
    if hash.has("maglev") {
        let at = hash.get("maglev").get("tableSize");
        let size = at.int();
        if !(1..MAGLEV_LIMIT).contains(&size) || !is_prime(size) {
            check.error(
                &at,
                format!("{size} is not a prime number below {MAGLEV_LIMIT}"),
            );
        }
    }
    locality(check, &at.get("localityLbSetting"), outlier);
    check.duration(&at.get("warmupDurationSecs"));
    check.duration(&at.get("warmup").get("duration"));
}

/// As Envoy asks: 1 counts too.
fn is_prime(number: i64) -> bool {
    number < 4
        || number % 2 != 0
            && (3..)
                .step_by(2)
                .take_while(|factor| factor * factor <= number)
                .all(|factor| number % factor != 0)
}

fn locality(check: &mut Check<'_>, at: &At<'_>, outlier: bool) {
    if !at.is_set() {
        return;
    }
    let (distribute, failover, priority) = (
        at.get("distribute"),
        at.get("failover"),
        at.get("failoverPriority"),
    );
    if distribute.count() > 0 && failover.count() > 0 {
        check.error(at, "distribute and failover exclude each other");
        return;
    }
    if failover.count() > 0 {
        for label in priority.items() {
            if matches!(
                label.text(),
                "topology.kubernetes.io/region"
                    | "topology.kubernetes.io/zone"
                    | "topology.istio.io/subzone"
            ) {
                check.error(
                    &label,
                    "a topology label here and failover exclude each other",
                );
                return;
            }
        }
    }
    let mut sources = Vec::new();
    for entry in distribute.items() {
        let mut total = 0;
        let mut targets = Vec::new();
        for (name, weight) in entry.get("to").entries() {
            targets.push((name, weight.clone()));
            if !(1..=100).contains(&weight.int()) {
                check.error(
                    &weight,
                    format!("{} is not between 1 and 100", weight.int()),
                );
                return;
            }
            total += weight.int();
        }
        if total != 100 {
            check.error(
                &entry.get("to"),
                format!("the weights add up to {total}, not 100"),
            );
            return;
        }
        localities(check, &targets);
        sources.push((entry.str("from"), entry.get("from")));
    }
    localities(check, &sources);
    if (failover.count() > 0 || priority.count() > 0) && !outlier {
        check.warn(at, "failover has no effect without outlierDetection");
    }
    for entry in failover.items() {
        let (from, to) = (entry.str("from"), entry.str("to"));
        if from == to {
            check.error(&entry, "from and to must be different regions");
        }
        if from.contains('/') || to.contains('/') {
            check.error(&entry, "failover is between regions; leave zones out");
        }
        if from.contains('*') || to.contains('*') {
            check.error(&entry, "a region may hold no wildcard");
        }
    }
}

/// `REGION[/ZONE[/SUBZONE]]`, the last part possibly `*`; no locality may lie within another.
fn localities(check: &mut Check<'_>, all: &[(&str, At<'_>)]) {
    let mut seen: Vec<Vec<&str>> = Vec::new();
    for (locality, at) in all {
        let stars = locality.matches('*').count();
        if stars > 1 || stars == 1 && !locality.ends_with('*') {
            check.error(at, format!("{locality:?}: * may stand at the end only"));
            return;
        }
        let parts: Vec<&str> = locality.splitn(3, '/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            check.error(
                at,
                format!("{locality:?} has an empty region, zone or subzone"),
            );
            return;
        }
        let covers = |wide: &[&str], narrow: &[&str]| {
            wide.iter().enumerate().all(|(index, part)| {
                *part == "*" || narrow.get(index).is_some_and(|other| other == part)
            })
        };
        if seen
            .iter()
            .any(|earlier| covers(earlier, &parts) || covers(&parts, earlier))
        {
            check.error(at, format!("{locality:?} overlaps with another locality"));
            return;
        }
        seen.push(parts);
    }
}

/// TLS to the destination.
fn client_tls(check: &mut Check<'_>, at: &At<'_>) {
    let set = |name: &str| !at.str(name).is_empty();
    let mode = at.str("mode");
    config_map(check, &at.get("credentialName"));
    if at.flag("insecureSkipVerify") {
        let sans = at.get("subjectAltNames").count() > 0;
        let verifies = match mode {
            "SIMPLE" => set("caCertificates") || set("credentialName") || sans,
            "MUTUAL" => set("caCertificates") || sans,
            _ => false,
        };
        if verifies {
            check.error(&at.get("insecureSkipVerify"), "nothing is verified, so caCertificates, credentialName and subjectAltNames have no effect; remove one or the other");
        }
    }
    if matches!(mode, "SIMPLE" | "MUTUAL") && set("credentialName") {
        if ["clientCertificate", "caCertificates", "privateKey", "caCrl"]
            .iter()
            .any(|name| set(name))
        {
            check.error(
                &at.get("credentialName"),
                "credentialName and file paths exclude each other",
            );
        }
        return;
    }
    if mode == "MUTUAL" {
        for name in ["clientCertificate", "privateKey"] {
            if !set(name) {
                check.error(&at.get(name), "required for MUTUAL");
            }
        }
    }
    if mode == "ISTIO_MUTUAL"
        && ["clientCertificate", "caCertificates", "privateKey"]
            .iter()
            .any(|name| set(name))
    {
        check.warn(
            at,
            "ISTIO_MUTUAL uses the mesh's certificates; the files have no effect",
        );
    }
}

/// `configmap://[NAMESPACE/]NAME`: certificates of authorities in a ConfigMap of the rule's own namespace.
fn config_map(check: &mut Check<'_>, at: &At<'_>) {
    let Some(name) = at.text().strip_prefix("configmap://") else {
        return;
    };
    let (namespace, name) = name
        .split_once('/')
        .unwrap_or((check.subject.namespace, name));
    if name.is_empty() || name.contains('/') {
        check.error(at, "must be configmap://NAME or configmap://NAMESPACE/NAME");
    } else if namespace != check.subject.namespace {
        check.error(
            at,
            format!(
                "the ConfigMap must be of namespace {}",
                check.subject.namespace
            ),
        );
    }
}
