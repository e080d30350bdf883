//! Prints what decoding, matching and a plan of a thousand rules cost. Run with `--release`.
use std::hint::black_box;
use std::time::Instant;

use lateen_engine::wire::{self, GLOBAL_WORD_COUNT, Limits};
use lateen_engine::{
    AttributeTable, Bag, Expression, Language, OnMatchError, Plan, RuleSpec, StringMap, Tracker,
    Value,
};

fn measure(name: &str, mut work: impl FnMut()) {
    const ROUNDS: u32 = 20_000;
    for _ in 0..ROUNDS / 10 {
        work();
    }
    let start = Instant::now();
    for _ in 0..ROUNDS {
        work();
    }
    println!(
        "{name:<44} {:>9.0} ns",
        start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
    );
}

fn main() {
    let table = AttributeTable::default_vocabulary();
    let headers: StringMap = (0..20)
        .map(|i| {
            (
                format!("x-header-{i}"),
                format!("value of header number {i}"),
            )
        })
        .chain([("user-agent".to_owned(), "Mozilla/5.0".to_owned())])
        .collect();
    let mut bag = Bag::new(&table);
    for (name, value) in [
        ("context.protocol", Value::from("http")),
        ("context.reporter.kind", Value::from("inbound")),
        ("destination.namespace", Value::from("default")),
        (
            "destination.service.host",
            Value::from("s500.default.svc.cluster.local"),
        ),
        ("request.headers", headers.into()),
        ("request.method", Value::from("GET")),
        ("request.path", Value::from("/productpage")),
        ("source.namespace", Value::from("default")),
    ] {
        bag.set_by_name(name, value).expect("declared");
    }
    let message = wire::encode(bag.iter(), GLOBAL_WORD_COUNT);
    let known = u32::try_from(GLOBAL_WORD_COUNT).unwrap_or(0);
    let limits = Limits::default();
    measure("decode 8 attributes, 21 headers", || {
        black_box(wire::decode(&message, known, &table, &limits).is_ok());
    });
    for text in [
        r#"request.method == "GET""#,
        r#"(context.protocol == "http" || context.protocol == "grpc") && match((request.headers["user-agent"] | "-"), "kube-probe*") == false"#,
        r#""^Mozilla/[0-9]".matches(request.headers["user-agent"])"#,
    ] {
        let expression = Expression::compile(text, &table).expect("compiles");
        let mut tracker = Tracker::new();
        measure(text.get(..44).unwrap_or(text), || {
            tracker.reset();
            black_box(expression.holds(&bag, &mut tracker).is_ok());
        });
    }
    for text in [
        r#"request.method == "GET""#,
        r#"(context.protocol == "http" || context.protocol == "grpc") && !pick(request.headers["user-agent"], "-").startsWith("kube-probe")"#,
        r#"request.headers["user-agent"].matches("^Mozilla/[0-9]")"#,
    ] {
        let expression = Expression::compile_in(Language::Cel, text, &table).expect("compiles");
        let mut tracker = Tracker::new();
        measure(&format!("CEL: {}", text.get(..39).unwrap_or(text)), || {
            tracker.reset();
            black_box(expression.holds(&bag, &mut tracker).is_ok());
        });
    }
    let specs = (0..1000).map(|i| RuleSpec {
        namespace: "istio-system".to_owned(),
        name: format!("r{i}"),
        condition: Expression::compile(
            &format!(
                r#"destination.service.host == "s{i}.default.svc.cluster.local" && request.method == "GET""#
            ),
            &table,
        )
        .ok(),
        priority: 0,
        on_error: OnMatchError::Deny,
        actions: vec![i],
    });
    let plan = Plan::build(specs, &table, "istio-system");
    let mut tracker = Tracker::new();
    measure("select from 1000 rules", || {
        tracker.reset();
        black_box(plan.select(&bag, &mut tracker).is_ok_and(|s| s.len() == 1));
    });
    measure("encode what was looked up", || {
        black_box(tracker.encode(&table, GLOBAL_WORD_COUNT));
    });
}
