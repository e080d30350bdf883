use std::net::TcpListener;

use lateen_protocols::json;

use super::{dump::Selection, *};
use crate::{
    cluster::ClusterManager, drain::Drain, route::RouteSlots, secret::SecretStore, stats::Registry,
};

const ALL: Dynamic = Dynamic {
    clusters: true,
    listeners: true,
};

fn control(dynamic: Dynamic) -> Arc<Control> {
    let shared = Arc::new(Shared {
        stats: Registry::new(),
        clusters: ClusterManager::new(),
        routes: RouteSlots::default(),
        destinations: Default::default(),
        secrets: SecretStore::new(),
        drain: Drain::new(Duration::from_secs(1)),
        node: Default::default(),
        layers: Default::default(),
        runtime: tokio::runtime::Handle::current(),
    });
    let workers = Workers::start(1, shared.clone()).unwrap();
    Control::new(shared, workers, dynamic)
}

fn resource<M: Message + Name + Default>(yaml: &str) -> Resource {
    let message: M = json::from_yaml(yaml).unwrap();
    Resource {
        name: None,
        version: "v".into(),
        body: Any {
            type_url: M::type_url(),
            value: message.encode_to_vec(),
        },
    }
}

fn cluster(name: &str, kind: &str) -> Resource {
    let eds = match kind {
        "EDS" => ", eds_cluster_config: { eds_config: { ads: {} }, service_name: service }",
        _ => "",
    };
    resource::<Cluster>(&format!(
        "{{ name: {name}, type: {kind}, connect_timeout: 1s{eds} }}"
    ))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn listener(name: &str, port: u16, routes: &str) -> Resource {
    resource::<ListenerProto>(&format!(
        r"
name: {name}
address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
filter_chains:
- filters:
  - name: envoy.filters.network.http_connection_manager
    typed_config:
      '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: {name}
      {routes}
      http_filters:
      - name: envoy.filters.http.router
        typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
"
    ))
}

fn by_rds(name: &str) -> String {
    format!("rds: {{ route_config_name: {name}, config_source: {{ ads: {{}} }} }}")
}

const INLINE: &str = "route_config: { name: inline }";

fn routes(name: &str) -> Resource {
    resource::<RouteConfiguration>(&format!(
        "{{ name: {name}, virtual_hosts: [ {{ name: all, domains: ['*'], routes: \
         [ {{ match: {{ prefix: / }}, direct_response: {{ status: 204 }} }} ] }} ] }}"
    ))
}

fn update(kind: Kind, resources: Vec<Resource>) -> Update {
    Update {
        kind,
        source: Source::Ads,
        version: "1".into(),
        resources,
        removed: Vec::new(),
        complete: kind.is_wildcard(),
    }
}

fn active(control: &Control) -> Vec<String> {
    control
        .active_listeners()
        .into_iter()
        .map(|(name, _)| name)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_goes_from_clusters_over_routes_to_live() {
    let control = control(ALL);
    control.start(&[], &[], &[]).unwrap();
    let wanted = control.wanted();
    assert!(wanted.borrow().clusters && !wanted.borrow().listeners);

    let accepted = control.apply(update(Kind::Cluster, vec![cluster("c", "EDS")]));
    assert_eq!(accepted.error, None);
    assert!(wanted.borrow().endpoints.contains("service"));
    assert_eq!(*control.phase().borrow(), Phase::Clusters);
    let endpoints = resource::<ClusterLoadAssignment>("{ cluster_name: service }");
    assert_eq!(
        control.apply(update(Kind::Endpoint, vec![endpoints])).error,
        None
    );
    let mut phase = control.phase();
    phase
        .wait_for(|phase| *phase >= Phase::Listeners)
        .await
        .unwrap();
    assert!(control.wanted().borrow().listeners);

    let accepted = control.apply(update(
        Kind::Listener,
        vec![listener("l", free_port(), &by_rds("r"))],
    ));
    assert_eq!(accepted.error, None);
    assert!(wanted.borrow().routes.contains("r"));
    assert!(active(&control).is_empty() && *control.phase().borrow() == Phase::Listeners);
    assert_eq!(
        control.apply(update(Kind::Route, vec![routes("r")])).error,
        None
    );
    assert_eq!(active(&control), ["l"]);
    assert_eq!(*control.phase().borrow(), Phase::Live);

    let bad = resource::<RouteConfiguration>(
        "{ name: r, virtual_hosts: [ { name: a, domains: ['*'] }, { name: b, domains: ['*'] } ] }",
    );
    assert!(
        control
            .apply(update(Kind::Route, vec![bad]))
            .error
            .is_some()
    );
    for (name, want) in [
        ("update_attempt", 2),
        ("update_success", 1),
        ("update_rejected", 1),
    ] {
        let value = control
            .shared()
            .stats
            .value(&format!("http.l.rds.r.{name}"));
        assert_eq!(value, Some(want), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_resource_is_refused_its_predecessor_stays_and_good_ones_are_used() {
    let control = control(ALL);
    control.start(&[], &[], &[]).unwrap();
    control.apply(update(Kind::Cluster, Vec::new()));
    let port = free_port();
    let good = control.apply(update(Kind::Listener, vec![listener("l", port, INLINE)]));
    assert_eq!(
        (good.error, good.accepted),
        (None, vec![("l".into(), "v".into())])
    );

    let mut bad = listener("l", port, INLINE);
    let mut proto = ListenerProto::decode(bad.body.value.as_slice()).unwrap();
    proto.filter_chains[0].filters[0].config_type = None;
    bad.body.value = proto.encode_to_vec();
    bad.version = "bad".into();
    let outcome = control.apply(update(
        Kind::Listener,
        vec![bad, listener("m", free_port(), INLINE)],
    ));
    assert!(
        outcome
            .error
            .as_ref()
            .is_some_and(|e| e.contains("listener l")),
        "{outcome:?}"
    );
    assert_eq!(outcome.accepted, [("m".into(), "v".into())]);
    assert_eq!(active(&control), ["l", "m"]);
    let dump = control.dump(serde_json::Value::Null, &Selection::default());
    let listeners = &dump["configs"][2]["dynamic_listeners"];
    assert_eq!(listeners[0]["active_state"]["version_info"], "v");
    assert_eq!(listeners[0]["error_state"]["version_info"], "bad");
    assert_eq!(listeners[1].get("error_state"), None);

    let stats = &control.shared().stats;
    assert_eq!(stats.value("listener_manager.lds.update_rejected"), Some(1));
    assert_eq!(stats.value("listener_manager.lds.update_success"), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_is_removed_and_what_is_static_stays() {
    let control = control(ALL);
    let fixed: Cluster = Cluster::decode(cluster("fixed", "STATIC").body.value.as_slice()).unwrap();
    control.start(&[], &[fixed], &[]).unwrap();
    control.apply(update(
        Kind::Cluster,
        vec![cluster("c", "STATIC"), cluster("fixed", "EDS")],
    ));
    control.apply(update(
        Kind::Listener,
        vec![listener("l", free_port(), INLINE)],
    ));
    assert_eq!(active(&control), ["l"]);

    control.apply(update(Kind::Listener, Vec::new()));
    assert!(active(&control).is_empty());
    control.apply(update(Kind::Cluster, Vec::new()));
    let names = || {
        let state = control.state();
        state.clusters.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(names(), ["fixed"]);
    // Routes may name it for a moment yet.
    assert!(control.shared().clusters.get("c").is_some());
    control.apply(update(Kind::Cluster, vec![cluster("c", "STATIC")]));
    assert_eq!(names(), ["c", "fixed"]);
    assert!(control.state().leaving.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_with_a_reason() {
    let control = control(ALL);
    control.start(&[], &[], &[]).unwrap();
    let mut garbage = cluster("c", "STATIC");
    garbage.body.value = vec![0xff; 9];
    garbage.name = Some("garbage".into());
    let other = routes("r");
    let twice = cluster("d", "STATIC");
    let outcome = control.apply(update(
        Kind::Cluster,
        vec![garbage, other, twice.clone(), twice],
    ));
    let error = outcome.error.unwrap();
    for part in [
        "garbage: does not decode",
        "is not type.googleapis.com/envoy.config.cluster",
        "d: is there twice",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_static_resource_stops_the_start() {
    let control = control(Dynamic::default());
    let error = control
        .start(
            &[],
            &[],
            &[ListenerProto::decode(listener("l", 0, "rds: {}").body.value.as_slice()).unwrap()],
        )
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("static_resources.listeners: listener l"),
        "{error}"
    );
}
