//! A request costs as many allocations as another, however many attributes it has.

#![allow(
    unsafe_code,
    reason = "an allocator that counts can be written in no other way"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use lateen_engine::{
    AttributeTable, Bag, Expression, Limits, OnMatchError, Plan, RuleSpec, StringMap, Tracker,
    Value,
    wire::{self, GLOBAL_WORD_COUNT, raw::RawCheck},
};
use lateen_protocols::istio::mixer::v1::CheckRequest;
use prost::Message as _;

thread_local! {
    static COUNTED: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is done by `System`; counting touches no memory but a cell of this thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNTED.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above; `at` is `System`'s.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `work` allocates.
fn allocations<T>(work: impl FnOnce() -> T) -> usize {
    let before = COUNTED.with(Cell::get);
    let made = work();
    let after = COUNTED.with(Cell::get);
    drop(made);
    after - before
}

/// The bytes of a check with so many text attributes and so many headers, none of them a word both ends know.
fn message(table: &AttributeTable, attributes: usize, headers: usize) -> Vec<u8> {
    let mut bag = Bag::new(table);
    let texts = table
        .iter()
        .filter(|(name, ty)| ty.is_text() && *name != "destination.namespace");
    let mut given = 0;
    for (name, ty) in texts.take(attributes) {
        let value = Value::from_text(ty, format!("value-{given}").into());
        bag.set_by_name(name, value.expect("it is a text's type"))
            .expect("it is declared");
        given += 1;
    }
    assert_eq!(given, attributes);
    let map: StringMap = (0..headers)
        .map(|number| (format!("x-header-{number}"), format!("v{number}")))
        .collect();
    bag.set_by_name("request.headers", map)
        .expect("it is declared");
    CheckRequest {
        attributes: Some(wire::encode(bag.iter(), GLOBAL_WORD_COUNT)),
        global_word_count: u32::try_from(GLOBAL_WORD_COUNT).expect("it is a few hundred"),
        ..CheckRequest::default()
    }
    .encode_to_vec()
}

#[test]
fn decoding_and_matching_allocate_nothing_per_attribute_or_rule() {
    let table = AttributeTable::default_vocabulary();
    let plan = |rules: usize| {
        let specs = (0..rules).map(|number| RuleSpec {
            namespace: "istio-system".to_owned(),
            name: format!("rule-{number}"),
            condition: Expression::compile(
                &format!(
                    r#"request.headers["x-header-1"] == "other-{number}" && match(request.headers["x-header-0"], "v*")"#
                ),
                &table,
            )
            .ok(),
            priority: 0,
            on_error: OnMatchError::Skip,
            actions: vec![number],
        });
        Plan::build(specs, &table, "istio-system")
    };
    let plans = [plan(10), plan(40)];
    let cost = |attributes, headers, plan: &Plan<usize>| {
        let message = message(&table, attributes, headers);
        let mut tracker = Tracker::new();
        let count = || {
            let check = RawCheck::parse(&message).expect("it is a usual check");
            let bag = check.bag(&table, &Limits::default());
            let bag = bag.expect("it is a usual check");
            let selected = plan
                .select(&bag, &mut tracker)
                .map(|selected| selected.len());
            (bag, selected)
        };
        allocations(count)
    };
    let few = cost(8, 4, &plans[0]);
    // What is known to be usual fits into what is set aside at once; more makes a buffer grow, now and then.
    assert_eq!(cost(12, 6, &plans[0]), few);
    assert_eq!(cost(8, 4, &plans[1]), few);
    assert!(few < 16, "{few} allocations");
}
