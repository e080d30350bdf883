//! DestinationRule: host, subsets, policies.

use std::collections::BTreeSet;

use crate::networking::{
    ClientTls, ConnectionPool, DestinationRule, LoadBalancer, OutlierDetection, TlsMode,
    TrafficPolicy,
};

use super::{Check, is_dns_label};

pub(super) fn destination_rule(check: &mut Check<'_>, spec: &DestinationRule) {
    check.host("spec.host".into(), &spec.host, false);
    check.export_to(&spec.export_to, false);
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(check, "spec.trafficPolicy", policy);
    }
    let mut seen = BTreeSet::new();
    for (index, subset) in spec.subsets.iter().enumerate() {
        let field = format!("spec.subsets[{index}]");
        if subset.name.is_empty() {
            check.error(format!("{field}.name"), "missing");
        } else if !subset.name.split('.').all(is_dns_label) {
            check.error(
                format!("{field}.name"),
                format!("{:?} is not a subset name", subset.name),
            );
        } else if !seen.insert(&subset.name) {
            check.error(
                format!("{field}.name"),
                format!("{:?} is there twice", subset.name),
            );
        }
        check.labels(&format!("{field}.labels"), &subset.labels);
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(check, &format!("{field}.trafficPolicy"), policy);
        }
    }
}

fn traffic_policy(check: &mut Check<'_>, field: &str, policy: &TrafficPolicy) {
    settings(
        check,
        field,
        policy.load_balancer.as_ref(),
        policy.connection_pool.as_ref(),
        policy.outlier_detection.as_ref(),
        policy.tls.as_ref(),
    );
    let mut seen = BTreeSet::new();
    for (index, port) in policy.port_level_settings.iter().enumerate() {
        let field = format!("{field}.portLevelSettings[{index}]");
        match &port.port {
            None => check.error(format!("{field}.port"), "missing"),
            Some(selector) => {
                check.port(format!("{field}.port.number"), selector.number);
                if !seen.insert(selector.number) {
                    check.error(format!("{field}.port.number"), "this port is there twice");
                }
            }
        }
        settings(
            check,
            &field,
            port.load_balancer.as_ref(),
            port.connection_pool.as_ref(),
            port.outlier_detection.as_ref(),
            port.tls.as_ref(),
        );
    }
    for (name, value) in [
        ("tunnel", &policy.tunnel),
        ("proxyProtocol", &policy.proxy_protocol),
        ("retryBudget", &policy.retry_budget),
    ] {
        if value.is_some() {
            check.warn(
                format!("{field}.{name}"),
                "not supported by this version; ignored",
            );
        }
    }
}

fn settings(
    check: &mut Check<'_>,
    field: &str,
    balancer: Option<&LoadBalancer>,
    pool: Option<&ConnectionPool>,
    outlier: Option<&OutlierDetection>,
    tls: Option<&ClientTls>,
) {
    if let Some(balancer) = balancer {
        load_balancer(check, &format!("{field}.loadBalancer"), balancer);
    }
    if let Some(pool) = pool {
        connection_pool(check, &format!("{field}.connectionPool"), pool);
    }
    if let Some(outlier) = outlier {
        outlier_detection(check, &format!("{field}.outlierDetection"), outlier);
    }
    if let Some(tls) = tls {
        client_tls(check, &format!("{field}.tls"), tls);
    }
}

fn load_balancer(check: &mut Check<'_>, field: &str, balancer: &LoadBalancer) {
    if let Some(hash) = &balancer.consistent_hash {
        let field = format!("{field}.consistentHash");
        if balancer.simple.is_some() {
            check.error(&*field, "simple and consistentHash exclude each other");
        }
        let keys = usize::from(hash.http_header_name.is_some())
            + usize::from(hash.http_cookie.is_some())
            + usize::from(hash.use_source_ip.is_some())
            + usize::from(hash.http_query_parameter_name.is_some());
        if keys != 1 {
            check.error(&*field, "exactly one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName is required");
        }
        if let Some(cookie) = &hash.http_cookie
            && cookie.name.is_empty()
        {
            check.error(format!("{field}.httpCookie.name"), "missing");
        }
        if hash.ring_hash.is_some() && hash.maglev.is_some() {
            check.error(field, "ringHash and maglev exclude each other");
        } else if let Some(size) = hash.maglev.as_ref().and_then(|maglev| maglev.table_size)
            && (!(2..=5_000_011).contains(&size)
                || (2..).take_while(|n| n * n <= size).any(|n| size % n == 0))
        {
            check.error(
                format!("{field}.maglev.tableSize"),
                "must be a prime up to 5000011",
            );
        }
    }
    check.duration(
        format!("{field}.warmupDurationSecs"),
        balancer.warmup_duration_secs,
    );
    if balancer.locality_lb_setting.is_some() {
        check.warn(
            format!("{field}.localityLbSetting"),
            "not supported by this version; ignored",
        );
    }
    if balancer.warmup.is_some() {
        check.warn(
            format!("{field}.warmup"),
            "not supported by this version; ignored",
        );
    }
}

fn connection_pool(check: &mut Check<'_>, field: &str, pool: &ConnectionPool) {
    for (name, value) in [
        ("tcp.maxConnections", pool.tcp.max_connections),
        (
            "http.http1MaxPendingRequests",
            pool.http.http1_max_pending_requests,
        ),
        ("http.http2MaxRequests", pool.http.http2_max_requests),
        (
            "http.maxRequestsPerConnection",
            pool.http.max_requests_per_connection,
        ),
        ("http.maxRetries", pool.http.max_retries),
        (
            "http.maxConcurrentStreams",
            pool.http.max_concurrent_streams,
        ),
    ] {
        if value.is_some_and(|value| value < 0) {
            check.error(format!("{field}.{name}"), "may not be negative");
        }
    }
    check.duration(
        format!("{field}.tcp.connectTimeout"),
        pool.tcp.connect_timeout,
    );
    check.duration(
        format!("{field}.tcp.maxConnectionDuration"),
        pool.tcp.max_connection_duration,
    );
    check.duration(
        format!("{field}.tcp.idleTimeout"),
        pool.tcp.idle_timeout.filter(|time| !time.0.is_zero()),
    );
    check.duration(
        format!("{field}.http.idleTimeout"),
        pool.http.idle_timeout.filter(|time| !time.0.is_zero()),
    );
    if !matches!(
        pool.http.h2_upgrade_policy.as_str(),
        "" | "DEFAULT" | "DO_NOT_UPGRADE" | "UPGRADE"
    ) {
        check.error(
            format!("{field}.http.h2UpgradePolicy"),
            "must be DEFAULT, DO_NOT_UPGRADE or UPGRADE",
        );
    }
}

fn outlier_detection(check: &mut Check<'_>, field: &str, outlier: &OutlierDetection) {
    check.duration(format!("{field}.interval"), outlier.interval);
    check.duration(
        format!("{field}.baseEjectionTime"),
        outlier.base_ejection_time,
    );
    for (name, value) in [
        ("maxEjectionPercent", outlier.max_ejection_percent),
        ("minHealthPercent", outlier.min_health_percent),
    ] {
        check.whole_percent(format!("{field}.{name}"), Some(value.into()));
    }
    if outlier.consecutive_errors.is_some_and(|count| count < 0) {
        check.error(format!("{field}.consecutiveErrors"), "may not be negative");
    }
    if outlier.consecutive_local_origin_failures.is_some()
        && !outlier.split_external_local_origin_errors
    {
        check.error(
            format!("{field}.consecutiveLocalOriginFailures"),
            "has no effect without splitExternalLocalOriginErrors: true",
        );
    }
}

fn client_tls(check: &mut Check<'_>, field: &str, tls: &ClientTls) {
    let files = [
        &tls.client_certificate,
        &tls.private_key,
        &tls.ca_certificates,
    ];
    match tls.mode {
        TlsMode::Mutual if tls.credential_name.is_empty() => {
            if tls.client_certificate.is_empty() {
                check.error(format!("{field}.clientCertificate"), "required for MUTUAL");
            }
            if tls.private_key.is_empty() {
                check.error(format!("{field}.privateKey"), "required for MUTUAL");
            }
        }
        TlsMode::Mutual | TlsMode::Simple if !tls.credential_name.is_empty() => {
            if files.iter().any(|file| !file.is_empty()) {
                check.error(
                    format!("{field}.credentialName"),
                    "credentialName and file paths exclude each other",
                );
            }
        }
        TlsMode::IstioMutual if files.iter().any(|file| !file.is_empty()) => {
            check.error(
                field,
                "ISTIO_MUTUAL uses the mesh's certificates; leave the files out",
            );
        }
        TlsMode::Disable | TlsMode::Simple | TlsMode::Mutual | TlsMode::IstioMutual => {}
    }
}
