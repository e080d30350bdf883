//! `/clusters`: every cluster with its hosts, their numbers and their health, as Envoy shows them.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::stats;
use crate::{
    circuit::Resource,
    cluster::{ActiveHealth, Address, Cluster, Health, Host},
    control::Control,
};

fn numbers(host: &Host) -> [(&'static str, u64); 8] {
    let numbers = &host.state.numbers;
    [
        ("cx_active", numbers.cx_active.load(Relaxed)),
        ("cx_connect_fail", numbers.cx_connect_fail.load(Relaxed)),
        ("cx_total", numbers.cx_total.load(Relaxed)),
        ("rq_active", u64::from(host.state.active_requests())),
        ("rq_error", numbers.rq_error.load(Relaxed)),
        ("rq_success", numbers.rq_success.load(Relaxed)),
        ("rq_timeout", numbers.rq_timeout.load(Relaxed)),
        ("rq_total", numbers.rq_total.load(Relaxed)),
    ]
}

fn flags(host: &Host) -> String {
    let ejected = host
        .state
        .monitor
        .is_ejected()
        .then_some("/failed_outlier_check");
    let active = match host.state.active_health() {
        Some(ActiveHealth::Failed) => Some("/failed_active_hc"),
        Some(ActiveHealth::Degraded) => Some("/degraded_active_hc"),
        Some(ActiveHealth::Passed) | None => None,
    };
    let pending = host.state.is_pending().then_some("/pending_active_hc");
    let reported = match host.reported {
        Health::Healthy => None,
        Health::Degraded => Some("/degraded_eds_health"),
        Health::Unhealthy => Some("/failed_eds_health"),
    };
    let all: String = [active, ejected, reported, pending]
        .into_iter()
        .flatten()
        .collect();
    if all.is_empty() {
        "healthy".into()
    } else {
        all
    }
}

fn all(control: &Control) -> Vec<std::sync::Arc<Cluster>> {
    control.shared().clusters.all()
}

/// The text form, one fact a line.
pub(super) fn text(control: &Control) -> String {
    let mut out = String::new();
    for cluster in all(control) {
        let name = &*cluster.name;
        let mut line = |what: &str, value: &dyn std::fmt::Display| {
            stats::line(&mut out, format_args!("{name}::{what}::{value}"));
        };
        line("observability_name", &name);
        for (priority, high) in [("default_priority", false), ("high_priority", true)] {
            let circuit = cluster.circuits.of(high);
            for (what, resource) in [
                ("max_connections", Resource::Connections),
                ("max_pending_requests", Resource::Pending),
                ("max_requests", Resource::Requests),
                ("max_retries", Resource::Retries),
            ] {
                line(&format!("{priority}::{what}"), &circuit.max(resource));
            }
        }
        line("added_via_api", &control.is_added_via_api(name));
        if let Some(service) = cluster.eds_service_name() {
            line("eds_service_name", service);
        }
        for host in &cluster.hosts().hosts {
            let address = host.address.to_string();
            let mut fact = |what: &str, value: &dyn std::fmt::Display| {
                stats::line(&mut out, format_args!("{name}::{address}::{what}::{value}"));
            };
            for (what, value) in numbers(host) {
                fact(what, &value);
            }
            fact("hostname", &host.hostname.as_deref().unwrap_or_default());
            fact("health_flags", &flags(host));
            fact("weight", &host.weight);
            fact("region", &host.locality.region);
            fact("zone", &host.locality.zone);
            fact("sub_zone", &host.locality.sub_zone);
            fact("canary", &false);
            fact("priority", &host.priority);
            fact("success_rate", &"-1");
            fact("local_origin_success_rate", &"-1");
        }
    }
    out
}

/// The form of `envoy.admin.v3.Clusters`.
pub(super) fn json(control: &Control) -> Value {
    let statuses = all(control)
        .iter()
        .map(|cluster| status(control, cluster))
        .collect::<Vec<_>>();
    json!({ "cluster_statuses": statuses })
}

fn status(control: &Control, cluster: &Cluster) -> Value {
    let name = &*cluster.name;
    let thresholds = [("DEFAULT", false), ("HIGH", true)].map(|(priority, high)| {
        let circuit = cluster.circuits.of(high);
        json!({
            "priority": priority,
            "max_connections": circuit.max(Resource::Connections),
            "max_pending_requests": circuit.max(Resource::Pending),
            "max_requests": circuit.max(Resource::Requests),
            "max_retries": circuit.max(Resource::Retries),
        })
    });
    let hosts = cluster
        .hosts()
        .hosts
        .iter()
        .map(|host| host_status(host))
        .collect::<Vec<_>>();
    let mut status = json!({
        "name": name,
        "observability_name": name,
        "added_via_api": control.is_added_via_api(name),
        "circuit_breakers": { "thresholds": thresholds },
        "host_statuses": hosts,
    });
    if let Some(service) = cluster.eds_service_name() {
        status["eds_service_name"] = Value::from(&**service);
    }
    status
}

fn host_status(host: &Host) -> Value {
    let address = match &host.address {
        Address::Ip(address) => json!({
            "socket_address": {"address": address.ip().to_string(), "port_value": address.port()},
        }),
        Address::Pipe(path) => json!({"pipe": {"path": &**path}}),
    };
    let stats = numbers(host).map(|(name, value)| {
        let kind = if name.ends_with("_active") {
            "GAUGE"
        } else {
            "COUNTER"
        };
        json!({"name": name, "type": kind, "value": value.to_string()})
    });
    let eds = match host.reported {
        Health::Healthy => "HEALTHY",
        Health::Degraded => "DEGRADED",
        Health::Unhealthy => "UNHEALTHY",
    };
    let mut health = json!({"eds_health_status": eds});
    if host.state.monitor.is_ejected() {
        health["failed_outlier_check"] = true.into();
    }
    match host.state.active_health() {
        Some(ActiveHealth::Failed) => health["failed_active_health_check"] = true.into(),
        Some(ActiveHealth::Degraded) => health["failed_active_degraded_check"] = true.into(),
        Some(ActiveHealth::Passed) | None => {}
    }
    if host.state.is_pending() {
        health["pending_active_hc"] = true.into();
    }
    json!({
        "address": address,
        "stats": stats,
        "health_status": health,
        "weight": host.weight,
        "hostname": host.hostname.as_deref().unwrap_or_default(),
        "priority": host.priority,
        "locality": {
            "region": host.locality.region,
            "zone": host.locality.zone,
            "sub_zone": host.locality.sub_zone,
        },
    })
}
