use lateen_protocols::json;

use super::*;
use crate::testing::shared;

fn apply(shared: &Shared, yaml: &str) -> Result<(), String> {
    let proto: Proto = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    shared
        .clusters
        .apply(&proto, shared)
        .map_err(|error| error.to_string())
}

fn assignment(yaml: &str) -> ClusterLoadAssignment {
    json::from_yaml(yaml).unwrap()
}

fn endpoint(port: u16) -> String {
    format!(
        "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
    )
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_and_the_old_stays() {
    let shared = shared();
    apply(&shared, "name: a\nconnect_timeout: 1s").unwrap();
    let table = [
        (
            "name: a\nhealth_checks: [{timeout: 1s}]",
            "cluster a: health_checks: health_checker: is required",
        ),
        (
            "name: a\nload_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: \
             {address: a.test, port_value: 1}}}}]}]}",
            "cluster a: load_assignment: endpoint.address: address: 'a.test' is not an IP address; names need a DNS cluster",
        ),
        (
            "name: a\nlb_policy: MAGLEV\nmaglev_lb_config: {table_size: 100}",
            "cluster a: maglev_lb_config.table_size: is not a prime number up to 5000011",
        ),
        (
            "name: a\ntransport_socket: {name: x, typed_config: {\"@type\": \
             type.googleapis.com/envoy.extensions.transport_sockets.starttls.v3.StartTlsConfig}}",
            "cluster a: transport_socket: type.googleapis.com/envoy.extensions.transport_sockets.starttls.v3.\
             StartTlsConfig: this transport socket is not supported",
        ),
        (
            "name: a\ntype: LOGICAL_DNS",
            "cluster a: load_assignment: LOGICAL_DNS must have exactly one endpoint",
        ),
    ];
    for (yaml, want) in table {
        assert_eq!(apply(&shared, yaml).unwrap_err(), want);
    }
    assert_eq!(
        shared.clusters.get("a").unwrap().config.connect_timeout,
        Duration::from_secs(1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_cluster_shows_when_it_has_endpoints_or_has_waited_long_enough() {
    let shared = shared();
    let manager = &shared.clusters;
    for name in ["a", "late"] {
        apply(
            &shared,
            &format!("name: {name}\ntype: EDS\neds_cluster_config: {{service_name: {name}-s}}"),
        )
        .unwrap();
    }
    assert!(manager.get("a").is_none() && !manager.is_warm("a"));
    assert_eq!(
        manager.eds_wanted(),
        [("a".into(), "a-s".into()), ("late".into(), "late-s".into())]
    );
    manager
        .set_endpoints(&assignment("{cluster_name: a-s}"))
        .unwrap();
    manager
        .changes()
        .wait_for(|_| manager.is_warm("a"))
        .await
        .unwrap();
    assert!(manager.get("late").is_none());
    tokio::time::advance(WARMING_TIMEOUT).await;
    let mut changes = manager.changes();
    changes.wait_for(|_| manager.is_warm("late")).await.unwrap();
    // A cluster that comes later finds the endpoints that are known already.
    apply(
        &shared,
        "name: b\ntype: EDS\neds_cluster_config: {service_name: a-s}",
    )
    .unwrap();
    assert!(manager.is_warm("b"));
}

#[tokio::test]
async fn hosts_keep_what_is_remembered_of_them() {
    let shared = shared();
    let manager = &shared.clusters;
    let cluster = |timeout: u32| {
        format!(
            "name: a\nconnect_timeout: {timeout}s\noutlier_detection: {{max_ejection_percent: 100}}\ntype: EDS"
        )
    };
    manager
        .set_endpoints(&assignment("{cluster_name: a}"))
        .unwrap();
    apply(&shared, &cluster(1)).unwrap();
    let set = |ports: &[u16]| {
        let list: Vec<String> = ports.iter().map(|port| endpoint(*port)).collect();
        let yaml = format!(
            "{{cluster_name: a, endpoints: [{{lb_endpoints: [{}]}}]}}",
            list.join(", ")
        );
        manager.set_endpoints(&assignment(&yaml)).unwrap();
    };
    let warm = async || {
        manager
            .changes()
            .wait_for(|_| manager.is_warm("a"))
            .await
            .unwrap();
        manager.get("a").unwrap()
    };
    let first = warm().await;
    set(&[1, 2]);
    let host = first.hosts().hosts[0].clone();
    first.eject(Cause::Consecutive5xx, &host.state);
    let active = || {
        shared
            .stats
            .value("cluster.a.outlier_detection.ejections_active")
    };
    assert_eq!((host.health(), active()), (Health::Unhealthy, Some(1)));
    set(&[3, 1]);
    assert_eq!(first.hosts().hosts[1].health(), Health::Unhealthy);
    apply(&shared, &cluster(2)).unwrap();
    let second = warm().await;
    assert_ne!(second.id, first.id);
    assert!(Arc::ptr_eq(&second.hosts().hosts[1].state, &host.state));
    set(&[3]);
    assert_eq!(active(), Some(0));
    assert_eq!(shared.stats.value("cluster.a.membership_total"), Some(1));
}

#[tokio::test]
async fn a_bad_assignment_changes_nothing() {
    let shared = shared();
    let manager = &shared.clusters;
    apply(&shared, "name: a\ntype: EDS").unwrap();
    let good = format!(
        "{{cluster_name: a, endpoints: [{{lb_endpoints: [{}]}}]}}",
        endpoint(1)
    );
    manager.set_endpoints(&assignment(&good)).unwrap();
    manager
        .changes()
        .wait_for(|_| manager.is_warm("a"))
        .await
        .unwrap();
    let error = manager
        .set_endpoints(&assignment(
            "{cluster_name: a, endpoints: [{priority: 200, lb_endpoints: [{endpoint: {}}]}]}",
        ))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "endpoints of a: endpoint.address: address: is required"
    );
    assert_eq!(manager.get("a").unwrap().hosts().hosts.len(), 1);
}

#[tokio::test]
async fn transport_sockets_are_chosen_by_metadata() {
    let shared = shared();
    let raw = "{name: x, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}}";
    let tls = "{name: x, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext}}";
    let of = |port: u16, meta: &str| {
        let mut text = endpoint(port);
        text.insert_str(
            1,
            &format!("metadata: {{filter_metadata: {{envoy.transport_socket_match: {meta}}}}}, "),
        );
        text
    };
    apply(
        &shared,
        &format!(
            "name: a\ntransport_socket_matches: [{{name: mtls, match: {{tlsMode: istio}}, transport_socket: {tls}}}, \
             {{name: disabled, match: {{}}, transport_socket: {raw}}}]\nload_assignment: {{cluster_name: a, endpoints: \
             [{{lb_endpoints: [{}, {}]}}]}}",
            of(1, "{tlsMode: istio}"),
            of(2, "{tlsMode: other}")
        ),
    )
    .unwrap();
    let cluster = shared.clusters.get("a").unwrap();
    let kinds: Vec<bool> = cluster
        .hosts()
        .hosts
        .iter()
        .map(|host| matches!(cluster.transports.get(host.transport), Transport::Tls(_)))
        .collect();
    assert_eq!(kinds, [true, false]);
}

#[tokio::test]
async fn names_are_resolved() {
    let shared = shared();
    let cluster = |name: &str, kind: &str, host: &str| {
        format!(
            "name: {name}\ntype: {kind}\ndns_lookup_family: V4_ONLY\nload_assignment: {{endpoints: [{{lb_endpoints: \
             [{{endpoint: {{address: {{socket_address: {{address: {host}, port_value: 80}}}}}}}}]}}]}}"
        )
    };
    apply(&shared, &cluster("strict", "STRICT_DNS", "localhost")).unwrap();
    apply(&shared, &cluster("logical", "LOGICAL_DNS", "localhost")).unwrap();
    let manager = &shared.clusters;
    for name in ["strict", "logical"] {
        manager
            .changes()
            .wait_for(|_| manager.is_warm(name))
            .await
            .unwrap();
        let cluster = manager.get(name).unwrap();
        let set = cluster.hosts();
        assert_eq!(set.hosts.len(), 1);
        assert_eq!(set.hosts[0].address.to_string(), "127.0.0.1:80");
        assert_eq!(set.hosts[0].hostname.as_deref(), Some("localhost"));
    }
}
