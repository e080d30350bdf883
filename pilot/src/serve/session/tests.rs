use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::cluster::v3::{
    Cluster,
    cluster::{ClusterDiscoveryType, DiscoveryType},
};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, Listener, filter::ConfigType,
};
use envoy_types::pb::envoy::config::route::v3::{
    Route, RouteAction, RouteConfiguration, VirtualHost, route::Action,
    route_action::ClusterSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, Rds, http_connection_manager::RouteSpecifier,
};
use envoy_types::util::pack_any;

use super::*;

/// A proxy's configuration in short: clusters with a revision, and where the one route goes.
struct Mesh {
    encoder: Arc<Encoder>,
}

impl Mesh {
    fn new() -> Self {
        Self {
            encoder: Arc::default(),
        }
    }

    fn target(&self, generation: u64, clusters: &[(&str, u32)], route_to: &str) -> Target {
        let eds = |name: &str, revision| Cluster {
            name: name.into(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
            per_connection_buffer_limit_bytes: Some(
                envoy_types::pb::google::protobuf::UInt32Value { value: revision },
            ),
            ..Cluster::default()
        };
        let hcm = HttpConnectionManager {
            route_specifier: Some(RouteSpecifier::Rds(Rds {
                route_config_name: "80".into(),
                ..Rds::default()
            })),
            ..HttpConnectionManager::default()
        };
        let listener = Listener {
            name: "0.0.0.0_80".into(),
            filter_chains: vec![FilterChain {
                filters: vec![Filter {
                    name: "hcm".into(),
                    config_type: Some(ConfigType::TypedConfig(pack_any(hcm))),
                }],
                ..FilterChain::default()
            }],
            ..Listener::default()
        };
        let route = RouteConfiguration {
            name: "80".into(),
            virtual_hosts: vec![VirtualHost {
                name: "v".into(),
                routes: vec![Route {
                    action: Some(Action::Route(RouteAction {
                        cluster_specifier: Some(ClusterSpecifier::Cluster(route_to.into())),
                        ..RouteAction::default()
                    })),
                    ..Route::default()
                }],
                ..VirtualHost::default()
            }],
            ..RouteConfiguration::default()
        };
        let encoder = &self.encoder;
        let set = |all: Vec<Arc<Encoded>>| {
            Arc::new(
                all.into_iter()
                    .map(|e| (e.name.clone(), e))
                    .collect::<Catalog>(),
            )
        };
        Target {
            generation,
            catalogs: BTreeMap::from([
                (
                    Kind::Cluster,
                    set(clusters
                        .iter()
                        .map(|(name, rev)| encoder.encode(name, &eds(name, *rev)))
                        .collect()),
                ),
                (
                    Kind::Endpoint,
                    set(clusters
                        .iter()
                        .map(|(name, _)| {
                            let message = ClusterLoadAssignment {
                                cluster_name: (*name).into(),
                                ..ClusterLoadAssignment::default()
                            };
                            encoder.encode(name, &message)
                        })
                        .collect()),
                ),
                (
                    Kind::Listener,
                    set(vec![encoder.encode("0.0.0.0_80", &listener)]),
                ),
                (Kind::Route, set(vec![encoder.encode("80", &route)])),
            ]),
            conflicts: Vec::new(),
            endpoints_only: None,
        }
    }

    fn client(&self, mode: Mode, target: Target) -> Client {
        Client {
            session: Session::new(mode, 1, target, self.encoder.clone(), Instant::now()),
            names: BTreeMap::new(),
        }
    }
}

/// A proxy that asks as Envoy does.
struct Client {
    session: Session,
    names: BTreeMap<Kind, Vec<String>>,
}

fn names_of(response: &Response) -> Vec<&str> {
    response.set.iter().map(|encoded| &*encoded.name).collect()
}

impl Client {
    fn ask(&mut self, kind: Kind, names: &[&str], nonce: &str, error: Option<&str>) -> Verdict {
        let new: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let old = self
            .names
            .insert(kind.clone(), new.clone())
            .unwrap_or_default();
        let error = error.map(str::to_owned);
        let now = Instant::now();
        match self.session.mode() {
            Mode::Sotw => self
                .session
                .sotw(&kind, "", &new, nonce, error, now)
                .unwrap(),
            Mode::Delta => {
                let subscribe = new
                    .iter()
                    .filter(|name| !old.contains(name))
                    .cloned()
                    .collect();
                let unsubscribe = old
                    .iter()
                    .filter(|name| !new.contains(name))
                    .cloned()
                    .collect();
                let ask = DeltaAsk {
                    subscribe,
                    unsubscribe,
                    ..DeltaAsk::default()
                };
                self.session.delta(&kind, ask, nonce, error, now).unwrap()
            }
        }
    }

    fn answer(&mut self, response: &Response, error: Option<&str>) -> Verdict {
        let names = self.names.get(&response.kind).cloned().unwrap_or_default();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.ask(response.kind.clone(), &names, &response.nonce, error)
    }

    fn take(&mut self) -> Vec<Response> {
        self.session.take_responses().into()
    }

    /// The one response there is, of that kind.
    fn one(&mut self, kind: &Kind) -> Response {
        let mut all = self.take();
        assert_eq!(all.len(), 1, "{all:?}");
        let response = all.pop().unwrap();
        assert_eq!(response.kind, *kind);
        response
    }

    fn nothing(&mut self) {
        let all = self.take();
        assert!(all.is_empty(), "{all:?}");
    }

    /// Starts as Envoy does and acknowledges everything.
    fn start(&mut self, clusters: &[&str]) {
        self.ask(Kind::Cluster, &[], "", None);
        let cds = self.one(&Kind::Cluster);
        self.answer(&cds, None);
        self.ask(Kind::Endpoint, clusters, "", None);
        let eds = self.one(&Kind::Endpoint);
        self.answer(&eds, None);
        self.ask(Kind::Listener, &[], "", None);
        let lds = self.one(&Kind::Listener);
        self.answer(&lds, None);
        self.ask(Kind::Route, &["80"], "", None);
        let rds = self.one(&Kind::Route);
        self.answer(&rds, None);
        self.nothing();
    }
}

const BOTH: [Mode; 2] = [Mode::Sotw, Mode::Delta];

#[test]
fn a_proxy_is_live_only_when_all_it_needs_is_acknowledged() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.ask(Kind::Cluster, &[], "", None);
        let cds = client.one(&Kind::Cluster);
        assert_eq!(names_of(&cds), ["a"]);
        client.answer(&cds, None);
        assert_eq!(
            client.session.live(),
            0,
            "endpoints and listeners are missing"
        );
        client.ask(Kind::Endpoint, &["a"], "", None);
        let eds = client.one(&Kind::Endpoint);
        client.answer(&eds, None);
        assert_eq!(client.session.live(), 0, "listeners are missing");
        client.ask(Kind::Listener, &[], "", None);
        let lds = client.one(&Kind::Listener);
        client.answer(&lds, None);
        assert_eq!(client.session.live(), 0, "routes are missing");
        client.ask(Kind::Route, &["80"], "", None);
        let rds = client.one(&Kind::Route);
        assert_eq!(client.session.live(), 0, "not acknowledged");
        client.answer(&rds, None);
        assert_eq!(client.session.live(), 1);
    }
}

#[test]
fn routes_move_between_making_and_breaking() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.start(&["a"]);

        client
            .session
            .adopt(mesh.target(2, &[("b", 0)], "b"), Instant::now());
        let cds = client.one(&Kind::Cluster);
        match mode {
            Mode::Sotw => assert_eq!(
                names_of(&cds),
                ["a", "b"],
                "what is replaced stays at first"
            ),
            Mode::Delta => {
                assert_eq!(names_of(&cds), ["b"]);
                assert!(cds.removed.is_empty());
            }
        }
        client.answer(&cds, None);
        client.nothing(); // the new cluster has no endpoints yet
        client.ask(
            Kind::Endpoint,
            &["a", "b"],
            &nonce_of(&client, &Kind::Endpoint, mode),
            None,
        );
        let eds = client.one(&Kind::Endpoint);
        assert_eq!(names_of(&eds), ["b"]);
        client.nothing(); // not acknowledged
        client.answer(&eds, None);
        let rds = client.one(&Kind::Route);
        client.nothing();
        assert_eq!(client.session.live(), 1);
        client.answer(&rds, None);
        let cds = client.one(&Kind::Cluster);
        match mode {
            Mode::Sotw => assert_eq!(names_of(&cds), ["b"]),
            Mode::Delta => assert_eq!(*cds.removed, ["a".into()]),
        }
        client.answer(&cds, None);
        client.nothing();
        assert!(client.session.is_settled());
        assert_eq!(client.session.live(), 2);
    }
}

/// What a client sends with a spontaneous change of subscription.
fn nonce_of(client: &Client, kind: &Kind, mode: Mode) -> String {
    match mode {
        Mode::Sotw => client.session.watches[kind].last_nonce.clone(),
        Mode::Delta => String::new(),
    }
}

#[test]
fn endpoints_follow_a_changed_cluster_unasked() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0), ("b", 0)], "a"));
        client.start(&["a", "b"]);
        client
            .session
            .adopt(mesh.target(2, &[("a", 1), ("b", 0)], "a"), Instant::now());
        let sent = client.take();
        assert_eq!(
            sent.iter().map(|r| r.kind.clone()).collect::<Vec<_>>(),
            [Kind::Cluster, Kind::Endpoint]
        );
        assert_eq!(names_of(&sent[1]), ["a"], "only those that warm again");
        // Envoy acknowledges the cluster only once it is warm.
        client.answer(&sent[1], None);
        client.nothing();
        client.answer(&sent[0], None);
        client.nothing();
        assert_eq!(client.session.live(), 2);
    }
}

#[test]
fn a_refusal_is_kept_and_nothing_is_sent_again() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.start(&["a"]);
        client.session.adopt(
            mesh.target(2, &[("a", 0), ("bad", 0)], "bad"),
            Instant::now(),
        );
        let cds = client.one(&Kind::Cluster);
        let verdict = client.answer(&cds, Some("no such thing"));
        assert!(matches!(verdict, Verdict::Nack { .. }));
        client.nothing(); // neither the clusters again, nor routes to one that is not there
        assert!(client.session.is_settled());
        assert_eq!(client.session.live(), 1);
        let (_, status) = client
            .session
            .kinds()
            .find(|(kind, _)| **kind == Kind::Cluster)
            .unwrap();
        let rejection = status.rejection().unwrap();
        assert_eq!(
            (rejection.message.as_str(), &*rejection.resources),
            ("no such thing", &["bad".to_owned()][..])
        );
        assert!(status.resources().all(|(name, _)| name != "bad"));

        // Mended: everything goes on.
        client.session.adopt(
            mesh.target(3, &[("a", 0), ("good", 0)], "good"),
            Instant::now(),
        );
        let cds = client.one(&Kind::Cluster);
        client.answer(&cds, None);
        client.ask(
            Kind::Endpoint,
            &["a", "good"],
            &nonce_of(&client, &Kind::Endpoint, mode),
            None,
        );
        let eds = client.one(&Kind::Endpoint);
        client.answer(&eds, None);
        let rds = client.one(&Kind::Route);
        client.answer(&rds, None);
        for response in client.take() {
            client.answer(&response, None);
        }
        assert_eq!(client.session.live(), 3);
        assert!(
            client
                .session
                .kinds()
                .all(|(_, status)| status.rejection().is_none())
        );
    }
}

#[test]
fn a_generation_that_changes_nothing_is_live_at_once() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.start(&["a"]);
        client
            .session
            .adopt(mesh.target(2, &[("a", 0)], "a"), Instant::now());
        client.nothing();
        assert_eq!(client.session.live(), 2);
    }
}

#[test]
fn a_stale_nonce_changes_nothing() {
    let mesh = Mesh::new();
    let mut client = mesh.client(Mode::Sotw, mesh.target(1, &[("a", 0)], "a"));
    client.start(&["a"]);
    assert_eq!(
        client.ask(Kind::Endpoint, &["a", "b"], "nonsense", None),
        Verdict::Stale
    );
    client.nothing();
    assert_eq!(
        client.ask(Kind::Cluster, &[], "nonsense", Some("late")),
        Verdict::Stale
    );
    assert_eq!(client.session.live(), 1);
    assert!(
        client
            .session
            .kinds()
            .all(|(_, status)| status.rejection().is_none())
    );
}

#[test]
fn an_empty_nonce_is_a_fresh_start() {
    let mesh = Mesh::new();
    let mut client = mesh.client(Mode::Sotw, mesh.target(1, &[("a", 0)], "a"));
    client.start(&["a"]);
    client.ask(Kind::Cluster, &[], "", None);
    // The clusters again, and endpoints forced: the client starts over.
    let sent = client.take();
    assert_eq!(
        sent.iter().map(|r| r.kind.clone()).collect::<Vec<_>>(),
        [Kind::Cluster, Kind::Endpoint]
    );
}

#[test]
fn names_without_content_are_answered_all_the_same() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.ask(Kind::Route, &["draining"], "", None);
        let rds = client.one(&Kind::Route);
        assert_eq!(names_of(&rds), ["draining"]);
        client.ask(Kind::Secret, &["missing"], "", None);
        let sds = client.one(&Kind::Secret);
        assert!(sds.set.is_empty());
        assert_eq!(sds.removed.len(), usize::from(mode == Mode::Delta));
    }
}

#[test]
fn a_route_that_is_gone_stays_until_it_is_no_longer_asked_for() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.start(&["a"]);
        let mut next = mesh.target(2, &[("a", 0)], "a");
        next.catalogs.remove(&Kind::Route);
        client.session.adopt(next, Instant::now());
        client.nothing();
        assert_eq!(client.session.live(), 2);
    }
}

#[test]
fn no_names_means_unsubscribed() {
    let mesh = Mesh::new();
    let mut client = mesh.client(Mode::Sotw, mesh.target(1, &[("a", 0)], "a"));
    client.start(&["a"]);
    let nonce = nonce_of(&client, &Kind::Endpoint, Mode::Sotw);
    client.ask(Kind::Endpoint, &[], &nonce, None);
    client.nothing();
    // Asking again with the old nonce is answered: the type is unknown on this stream.
    client.ask(Kind::Endpoint, &["a"], &nonce, None);
    assert_eq!(names_of(&client.one(&Kind::Endpoint)), ["a"]);
}

#[test]
fn a_client_that_comes_back_gets_only_what_differs_and_in_order() {
    let mesh = Mesh::new();
    let old = mesh.target(1, &[("a", 0), ("gone", 0)], "a");
    let version = |kind: &Kind, name: &str| old.catalogs[kind][name].version.to_string();
    let new = mesh.target(1, &[("a", 0), ("b", 0)], "b");
    let mut client = mesh.client(Mode::Delta, new);
    let mut resume = |kind: Kind, names: &[&str], held: &[&str]| {
        let ask = DeltaAsk {
            subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
            initial: held
                .iter()
                .map(|n| ((*n).to_owned(), version(&kind, n)))
                .collect(),
            ..DeltaAsk::default()
        };
        client.names.insert(kind.clone(), ask.subscribe.clone());
        client
            .session
            .delta(&kind, ask, "", None, Instant::now())
            .unwrap();
    };
    resume(Kind::Cluster, &[], &["a", "gone"]);
    resume(Kind::Endpoint, &["a", "gone"], &["a", "gone"]);
    resume(Kind::Listener, &[], &["0.0.0.0_80"]);
    resume(Kind::Route, &["80"], &["80"]);

    let sent = client.take();
    assert_eq!(sent.len(), 2, "{sent:?}");
    assert_eq!((names_of(&sent[0]), sent[0].removed.len()), (vec!["b"], 0));
    assert_eq!(
        (names_of(&sent[1]), sent[1].removed.len()),
        (vec![], 0),
        "endpoints: forced, and empty"
    );
    client.answer(&sent[0], None);
    client.answer(&sent[1], None);
    client.ask(Kind::Endpoint, &["a", "gone", "b"], "", None);
    let eds = client.one(&Kind::Endpoint);
    assert_eq!(names_of(&eds), ["b"]);
    client.answer(&eds, None);
    let sent = client.take();
    assert_eq!(
        sent.iter()
            .map(|r| (r.kind.clone(), names_of(r)))
            .collect::<Vec<_>>(),
        [(Kind::Listener, vec![]), (Kind::Route, vec!["80"])]
    );
    for response in &sent {
        client.answer(response, None);
    }
    let cds = client.one(&Kind::Cluster);
    assert_eq!(*cds.removed, ["gone".into()]);
    client.answer(&cds, None);
    assert_eq!(client.session.live(), 1);
}

#[test]
fn a_state_of_the_world_client_that_comes_back_is_answered_in_order() {
    let mesh = Mesh::new();
    let mut client = mesh.client(Mode::Sotw, mesh.target(1, &[("a", 0)], "a"));
    let now = Instant::now();
    let names = |kind: &Kind| match kind {
        Kind::Endpoint => vec!["a".to_owned()],
        Kind::Route => vec!["80".to_owned()],
        _ => Vec::new(),
    };
    for kind in [Kind::Cluster, Kind::Endpoint, Kind::Listener, Kind::Route] {
        client.names.insert(kind.clone(), names(&kind));
        client
            .session
            .sotw(
                &kind,
                "version",
                &names(&kind),
                "nonce of another stream",
                None,
                now,
            )
            .unwrap();
    }
    let first = client.take();
    assert_eq!(
        first.iter().map(|r| r.kind.clone()).collect::<Vec<_>>(),
        [Kind::Cluster, Kind::Endpoint]
    );
    first
        .iter()
        .for_each(|response| drop(client.answer(response, None)));
    let second = client.take();
    assert_eq!(
        second.iter().map(|r| r.kind.clone()).collect::<Vec<_>>(),
        [Kind::Listener, Kind::Route]
    );
    second
        .iter()
        .for_each(|response| drop(client.answer(response, None)));
    client.nothing();
    assert_eq!(client.session.live(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_claims_a_name_is_not_waited_for_for_ever() {
    let mesh = Mesh::new();
    let mut client = mesh.client(Mode::Delta, mesh.target(1, &[("a", 0)], "a"));
    client.start(&["a"]);
    client
        .session
        .adopt(mesh.target(2, &[("a", 0), ("b", 0)], "b"), Instant::now());
    let cds = client.one(&Kind::Cluster);
    client.answer(&cds, None);
    client.nothing();
    let deadline = client.session.deadline().unwrap();
    tokio::time::sleep_until(deadline).await;
    client.session.expire(Instant::now());
    let rds = client.one(&Kind::Route);
    client.answer(&rds, None);
    assert!(client.session.is_settled());
    assert_eq!(client.session.deadline(), None);
}

#[test]
fn versions_are_the_same_in_the_next_process() {
    let (one, two) = (Mesh::new(), Mesh::new());
    let mut first = one.client(Mode::Sotw, one.target(1, &[("a", 0), ("b", 0)], "a"));
    let mut second = two.client(Mode::Sotw, two.target(7, &[("b", 0), ("a", 0)], "a"));
    first.ask(Kind::Cluster, &[], "", None);
    second.ask(Kind::Cluster, &[], "", None);
    assert_eq!(
        first.one(&Kind::Cluster).version,
        second.one(&Kind::Cluster).version
    );
}

#[test]
fn floods_are_refused() {
    let mesh = Mesh::new();
    let mut session = mesh.client(Mode::Delta, mesh.target(1, &[], "a")).session;
    let now = Instant::now();
    let flood = (0..=IN_FLIGHT_LIMIT).try_for_each(|n| {
        let ask = DeltaAsk {
            subscribe: vec![n.to_string()],
            ..DeltaAsk::default()
        };
        session.delta(&Kind::Endpoint, ask, "", None, now).map(drop)
    });
    assert_eq!(flood, Err(Misuse::TooManyUnacknowledged));
    let kinds = (0..=KIND_LIMIT).try_for_each(|n| {
        let kind = Kind::Generic(format!("g/v/{n}").into());
        session
            .delta(&kind, DeltaAsk::default(), "", None, now)
            .map(drop)
    });
    assert_eq!(kinds, Err(Misuse::TooManyTypes));
    let long = DeltaAsk {
        subscribe: vec!["x".repeat(NAME_BYTES_LIMIT + 1)],
        ..DeltaAsk::default()
    };
    assert_eq!(
        session.delta(&Kind::Endpoint, long, "", None, now),
        Err(Misuse::TooManyNames)
    );
    let many = DeltaAsk {
        subscribe: (0..=NAME_LIMIT).map(|n| n.to_string()).collect(),
        ..DeltaAsk::default()
    };
    assert_eq!(
        session.delta(&Kind::Secret, many, "", None, now),
        Err(Misuse::TooManyNames)
    );
}

#[test]
fn configuration_objects_come_whole_or_by_name() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let kind = Kind::Generic("config.istio.io/v1alpha2/rule".into());
        let rules = |names: &[&str]| {
            let all = names.iter().map(|name| {
                let encoded = mesh.encoder.encode_plain(
                    &kind,
                    name,
                    &Cluster {
                        name: (*name).into(),
                        ..Cluster::default()
                    },
                );
                (encoded.name.clone(), encoded)
            });
            BTreeMap::from([(kind.clone(), Arc::new(all.collect::<Catalog>()))])
        };
        let mut client = mesh.client(
            mode,
            Target {
                generation: 1,
                catalogs: rules(&["ns/a", "ns/b"]),
                conflicts: Vec::new(),
                endpoints_only: None,
            },
        );
        client.ask(kind.clone(), &[], "", None);
        let first = client.one(&kind);
        assert_eq!(names_of(&first), ["ns/a", "ns/b"]);
        client.answer(&first, None);
        assert_eq!(client.session.live(), 1);
        client.session.adopt(
            Target {
                generation: 2,
                catalogs: rules(&["ns/b", "ns/c"]),
                conflicts: Vec::new(),
                endpoints_only: None,
            },
            Instant::now(),
        );
        let second = client.one(&kind);
        match mode {
            Mode::Sotw => assert_eq!(names_of(&second), ["ns/b", "ns/c"]),
            Mode::Delta => assert_eq!(
                (names_of(&second), &*second.removed),
                (vec!["ns/c"], &["ns/a".into()][..])
            ),
        }
        client.answer(&second, None);
        assert_eq!(client.session.live(), 2);
    }
}

#[test]
fn a_cluster_stays_while_refused_routes_leave_traffic_on_it() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let mut client = mesh.client(mode, mesh.target(1, &[("a", 0)], "a"));
        client.start(&["a"]);
        client
            .session
            .adopt(mesh.target(2, &[("b", 0)], "b"), Instant::now());
        let cds = client.one(&Kind::Cluster);
        client.answer(&cds, None);
        client.ask(
            Kind::Endpoint,
            &["a", "b"],
            &nonce_of(&client, &Kind::Endpoint, mode),
            None,
        );
        let eds = client.one(&Kind::Endpoint);
        client.answer(&eds, None);
        let rds = client.one(&Kind::Route);
        client.answer(&rds, Some("no"));
        client.nothing(); // `a` still serves
        assert!(client.session.is_settled());
        assert_eq!(client.session.live(), 1);

        // Once other routes are accepted, it goes.
        client
            .session
            .adopt(mesh.target(3, &[("b", 0), ("c", 0)], "c"), Instant::now());
        let cds = client.one(&Kind::Cluster);
        client.answer(&cds, None);
        client.ask(
            Kind::Endpoint,
            &["a", "b", "c"],
            &nonce_of(&client, &Kind::Endpoint, mode),
            None,
        );
        let eds = client.one(&Kind::Endpoint);
        client.answer(&eds, None);
        let rds = client.one(&Kind::Route);
        client.answer(&rds, None);
        let cds = client.one(&Kind::Cluster);
        match mode {
            Mode::Sotw => assert_eq!(names_of(&cds), ["b", "c"]),
            Mode::Delta => assert_eq!(*cds.removed, ["a".into()]),
        }
        client.answer(&cds, None);
        assert_eq!(client.session.live(), 3);
    }
}

/// The target before with other endpoints of one cluster.
fn with_endpoints(mesh: &Mesh, before: &Target, name: &str, policy: u32) -> Target {
    use envoy_types::pb::envoy::config::endpoint::v3::cluster_load_assignment::Policy;
    let message = ClusterLoadAssignment {
        cluster_name: name.into(),
        policy: Some(Policy {
            overprovisioning_factor: Some(envoy_types::pb::google::protobuf::UInt32Value {
                value: policy,
            }),
            ..Policy::default()
        }),
        ..ClusterLoadAssignment::default()
    };
    let one = mesh.encoder.encode(name, &message);
    let mut target = before.clone();
    let mut endpoints = Catalog::clone(&target.catalogs[&Kind::Endpoint]);
    endpoints.insert(one.name.clone(), one.clone());
    target.catalogs.insert(Kind::Endpoint, Arc::new(endpoints));
    target.generation += 1;
    target.endpoints_only = Some([one.name.clone()].into());
    target
}

#[test]
fn where_only_endpoints_changed_only_these_are_sent_and_waited_for() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let first = mesh.target(1, &[("a", 0), ("b", 0)], "a");
        let mut client = mesh.client(mode, first.clone());
        client.start(&["a", "b"]);
        let second = with_endpoints(&mesh, &first, "b", 100);
        client.session.adopt(second.clone(), Instant::now());
        let eds = client.one(&Kind::Endpoint);
        assert_eq!(names_of(&eds), ["b"]);
        let all = second.catalogs[&Kind::Endpoint].iter();
        let version = crate::encode::set_version(all.map(|(name, one)| (&**name, &*one.version)));
        assert_eq!(eds.version, version, "of all that the client holds");
        assert!(!client.session.is_settled());
        client.answer(&eds, None);
        client.nothing();
        assert!(client.session.is_settled());
        assert_eq!(client.session.live(), 2);

        // Nobody watches that one: nothing is to be said, and it is live at once.
        let third = with_endpoints(&mesh, &second, "unknown", 1);
        client.session.adopt(third, Instant::now());
        client.nothing();
        assert_eq!(client.session.live(), 3);
    }
}

#[test]
fn a_client_that_refused_endpoints_is_compared_with_everything() {
    for mode in BOTH {
        let mesh = Mesh::new();
        let first = mesh.target(1, &[("a", 0), ("b", 0)], "a");
        let mut client = mesh.client(mode, first.clone());
        client.start(&["a", "b"]);
        let second = with_endpoints(&mesh, &first, "b", 100);
        client.session.adopt(second.clone(), Instant::now());
        let eds = client.one(&Kind::Endpoint);
        client.answer(&eds, Some("no"));
        assert_eq!(client.session.live(), 1);
        // Made from the second as if nothing had happened: what it says is not all that is due.
        let mut third = with_endpoints(&mesh, &second, "b", 200);
        third.catalogs.insert(
            Kind::Cluster,
            mesh.target(3, &[("a", 1), ("b", 0)], "a").catalogs[&Kind::Cluster].clone(),
        );
        client.session.adopt(third, Instant::now());
        let sent = client.take();
        let kinds: Vec<_> = sent.iter().map(|response| response.kind.clone()).collect();
        assert_eq!(kinds, [Kind::Cluster, Kind::Endpoint]);
        sent.iter().for_each(|response| {
            client.answer(response, None);
        });
        client.nothing();
        assert_eq!(client.session.live(), 3);
    }
}
