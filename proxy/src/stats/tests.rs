use super::*;

instruments! {
    /// As a cluster has them.
    struct Some {
        counter { upstream_rq_total, handshake = "ssl.handshake" }
        gauge { upstream_cx_active }
        on_demand { upstream_rq_200 }
        histogram { upstream_rq_time }
    }
}

fn names(registry: &Registry) -> Vec<String> {
    let mut names = Vec::new();
    registry.each(|root, name, _| names.push(format!("{root}{name}")));
    names
}

#[test]
fn the_same_name_is_the_same_instrument_on_every_worker() {
    let registry = Registry::new();
    let counter = registry.scope("cluster.a:b.").counter("upstream_rq_total");
    let again = registry.scope("cluster.a_b.").counter("upstream_rq_total");
    std::thread::scope(|threads| {
        for worker in 0..4 {
            let counter = &counter;
            threads.spawn(move || {
                set_worker(worker);
                for _ in 0..10 {
                    counter.inc();
                }
            });
        }
    });
    again.inc();
    assert_eq!(counter.value(), 41);
    assert_eq!(registry.value("cluster.a_b.upstream_rq_total"), Some(41));
}

#[test]
fn workers_beyond_the_last_lose_no_count() {
    let counter = Registry::new().scope("").counter("x");
    std::thread::scope(|threads| {
        for worker in 60..70 {
            let counter = &counter;
            threads.spawn(move || {
                set_worker(worker);
                for _ in 0..10_000 {
                    counter.inc();
                }
            });
        }
    });
    assert_eq!(counter.value(), 100_000);
}

#[test]
fn gauges_are_set_or_counted() {
    let registry = Registry::new();
    let scope = registry.scope("server.");
    let gauge = scope.gauge("live");
    gauge.inc();
    gauge.inc();
    gauge.dec();
    assert_eq!(gauge.value(), 1);
    gauge.set(7);
    assert_eq!(gauge.value(), 7);
    gauge.add(-9);
    assert_eq!(gauge.value(), 0);
}

#[test]
fn a_group_costs_nothing_until_it_is_touched() {
    let registry = Registry::new();
    let scope = registry.scope("cluster.a.");
    let group = scope.group::<Some>();
    assert!(Arc::ptr_eq(&group, &registry.scope("cluster.a.").group()));
    let shown = [
        "cluster.a.ssl.handshake",
        "cluster.a.upstream_cx_active",
        "cluster.a.upstream_rq_time",
        "cluster.a.upstream_rq_total",
    ];
    assert_eq!(names(&registry), shown);
    registry.each(|_, _, instrument| assert!(!instrument.touched()));
    group.upstream_cx_active.set(0);
    assert!(!group.upstream_cx_active.0.touched());
    group.upstream_rq_200.inc();
    assert_eq!(registry.value("cluster.a.upstream_rq_200"), Some(1));
    assert_eq!(registry.value("cluster.a.upstream_rq_404"), None);
    assert_eq!(names(&registry).len(), shown.len() + 1);
}

#[test]
fn a_name_of_a_group_is_the_groups_instrument() {
    let registry = Registry::new();
    let scope = registry.scope("cluster.a.");
    let group = scope.group::<Some>();
    let counter = scope.counter("upstream_rq_total");
    counter.inc();
    group.upstream_rq_total.add(2);
    assert_eq!(counter.value(), 3);
    scope.gauge("upstream_cx_active").set(4);
    assert_eq!(group.upstream_cx_active.value(), 4);
    scope.histogram("upstream_rq_time").record(1);
    assert_eq!(group.upstream_rq_time.summary().count, 1);
    drop((scope, group));
    registry.remove("cluster.a.");
    counter.inc();
    assert_eq!(counter.value(), 4, "a handle keeps what it counts in");
}

#[test]
fn names_are_sorted_across_scopes() {
    let registry = Registry::new();
    let outer = registry.scope("cluster.a.");
    outer.counter("z").inc();
    outer.scope("m.").counter("x").inc();
    outer.counter("b").inc();
    registry.scope("cluster.a").counter("0").inc();
    registry.scope("http.").counter("a").inc();
    assert_eq!(
        names(&registry),
        [
            "cluster.a.b",
            "cluster.a.m.x",
            "cluster.a.z",
            "cluster.a0",
            "http.a"
        ]
    );
    assert_eq!(registry.value("cluster.a.m.x"), Some(1));
}

#[test]
fn a_removed_scope_begins_anew() {
    let registry = Registry::new();
    registry.scope("cluster.a.").counter("x").add(5);
    registry.scope("cluster.a.sub.").counter("y").add(5);
    registry.remove("cluster.a.");
    assert_eq!(registry.value("cluster.a.x"), None);
    assert_eq!(registry.scope("cluster.b.").counter("x").value(), 0);
    assert_eq!(registry.scope("cluster.a.sub.").counter("y").value(), 0);
}

#[test]
fn a_name_used_as_two_kinds_stays_what_it_was_first() {
    let registry = Registry::new();
    let scope = registry.scope("");
    scope.counter("x").inc();
    scope.gauge("x").inc();
    assert_eq!(registry.value("x"), Some(1));
    assert_eq!(names(&registry), ["x"]);
}
