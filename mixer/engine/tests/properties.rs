//! Laws that hold for any text, any expression and any request.
#![cfg(test)]

use std::collections::HashMap;

use lateen_engine::expression::Syntax;
use lateen_engine::wire::{self, Limits};
use lateen_engine::{
    AttributeTable, Bag, Expression, OnMatchError, Plan, RuleSpec, StringMap, Tracker, Value,
    ValueType, Verdict,
};
use lateen_protocols::istio::mixer::v1::{CompressedAttributes, StringMap as WireStringMap};
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use proptest::sample::select;

fn table() -> AttributeTable {
    thread_local! {
        static TABLE: AttributeTable = AttributeTable::new([
            ("b", ValueType::Bool), ("c", ValueType::Bool), ("i", ValueType::Int64), ("s", ValueType::String),
            ("u.v", ValueType::String), ("m", ValueType::StringMap), ("t", ValueType::Timestamp),
            ("ip", ValueType::IpAddress), ("dns", ValueType::DnsName), ("uri", ValueType::Uri),
            ("kx", ValueType::String), ("ky", ValueType::String), ("ke", ValueType::String),
            ("one", ValueType::Int64), ("yes", ValueType::Bool), ("no", ValueType::Bool),
        ]).unwrap();
    }
    TABLE.with(Clone::clone)
}

/// Well-formed text, well typed or not.
fn any_syntax() -> impl Strategy<Value = String> {
    let leaf = select(vec![
        "a", "a.b.c", "true", "False", "1", "2.5", "1e3", "\"x\"", "\"1s\"", "`r`", "'c'", "f()",
        "\"\\\"\"",
    ])
    .prop_map(str::to_owned);
    leaf.prop_recursive(6, 40, 3, |inner| {
        let operator = select(vec![
            "||", "&&", "==", "!=", "<", "<=", ">", ">=", "+", "-", "|", "^", "*", "/", "%", "<<",
            ">>", "&", "&^",
        ]);
        prop_oneof![
            (inner.clone(), operator, inner.clone()).prop_map(|(a, op, b)| format!("{a} {op} {b}")),
            inner.clone().prop_map(|a| format!("({a})")),
            (select(vec!["+", "-", "!", "^", "&", "<-"]), inner.clone())
                .prop_map(|(op, a)| format!("{op} ({a})")),
            vec(inner.clone(), 0..3).prop_map(|args| format!("f({})", args.join(", "))),
            (inner.clone(), vec(inner.clone(), 0..2))
                .prop_map(|(on, args)| format!("({on}).g({})", args.join(","))),
            (inner.clone(), inner).prop_map(|(map, key)| format!("({map})[{key}]")),
        ]
    })
}

fn text_expr() -> BoxedStrategy<String> {
    let leaf = select(vec![
        r#""x""#,
        r#""y""#,
        r#""""#,
        "s",
        "u.v",
        r#"m["x"]"#,
        "m[s]",
    ])
    .prop_map(str::to_owned);
    leaf.prop_recursive(3, 8, 2, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} | {b})")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} + {b})")),
            inner.clone().prop_map(|a| format!("toLower({a})")),
            (inner.clone(), inner).prop_map(|(a, b)| format!("conditional(b, {a}, {b})")),
        ]
    })
    .boxed()
}

/// A well-typed BOOL.
fn condition() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        select(vec![
            "b",
            "c",
            "true",
            "false",
            "i == 1",
            "i < 2",
            r#"ip == ip("10.0.0.1")"#,
            r#"dns == dnsName("x")"#,
            r#"uri == uri("http://x")"#,
            r#"t < timestamp("2026-01-01T00:00:00Z")"#,
            r#"s == "x""#,
            r#""y" == u.v"#,
        ])
        .prop_map(str::to_owned),
        (text_expr(), text_expr()).prop_map(|(a, b)| format!("{a} == {b}")),
        (text_expr(), text_expr()).prop_map(|(a, b)| format!("match({a}, {b})")),
        (text_expr(), text_expr()).prop_map(|(a, b)| format!("({a}).startsWith({b})")),
        (text_expr(), text_expr()).prop_map(|(a, b)| format!("({a}).matches({b})")),
    ];
    leaf.prop_recursive(4, 24, 2, |inner| {
        prop_oneof![
            3 => (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a}) && ({b})")),
            1 => (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a}) || ({b})")),
            1 => (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("(b | ({a})) == ({b})")),
            1 => (inner.clone(), inner.clone(), inner)
                .prop_map(|(a, b, c)| format!("conditional({a}, {b}, {c})")),
        ]
    })
}

/// Attributes, each present, absent, or now and then of the wrong type.
fn attributes() -> impl Strategy<Value = HashMap<&'static str, Value>> {
    let text = || select(vec!["x", "y", "", "x_", "("]);
    let map = || {
        vec((text(), text()), 0..3)
            .prop_map(|entries| Value::StringMap(entries.into_iter().collect::<StringMap>()))
    };
    let value = prop_oneof![
        4 => (select(vec!["s", "u.v"]), text()).prop_map(|(n, v)| (n, Value::from(v))),
        4 => (select(vec!["b", "c"]), any::<bool>()).prop_map(|(n, v)| (n, Value::Bool(v))),
        2 => (0..3_i64).prop_map(|v| ("i", Value::Int64(v))),
        2 => map().prop_map(|v| ("m", v)),
        1 => text().prop_map(|v| ("dns", Value::DnsName(v.into()))),
        1 => text().prop_map(|v| ("uri", Value::Uri(v.into()))),
        1 => any::<[u8; 4]>().prop_map(|v| ("ip", Value::Ip(v.into()))),
        1 => (select(vec!["s", "b", "i", "m", "ip", "t"]), text()).prop_map(|(n, v)| (n, Value::from(v))),
    ];
    vec(value, 0..8).prop_map(|list| list.into_iter().collect())
}

fn bag(attributes: &HashMap<&'static str, Value>) -> Bag {
    let mut bag = Bag::new(&table());
    for (name, value) in attributes {
        bag.set_by_name(name, value.clone()).unwrap();
    }
    bag
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in r#"([a-z."(\[\])|&=<!' `\\0-9{}$@,:*+\n-]|\PC){0,60}"#) {
        if let Ok(syntax) = Syntax::parse(&text) {
            let printed = syntax.to_string();
            prop_assert_eq!(Syntax::parse(&printed), Ok(syntax), "{}", printed);
        }
        drop(Expression::compile_output(&text, &table())); // does not panic
    }

    #[test]
    fn printed_syntax_parses_to_itself(text in any_syntax()) {
        let syntax = Syntax::parse(&text).unwrap();
        let printed = syntax.to_string();
        prop_assert_eq!(Syntax::parse(&printed), Ok(syntax), "{}", printed);
    }

    #[test]
    fn conditions_have_a_value_or_an_error(text in condition(), attributes in attributes()) {
        let expression = Expression::compile(&text, &table()).unwrap();
        let bag = bag(&attributes);
        let (mut first, mut second) = (Tracker::new(), Tracker::new());
        let strict = expression.evaluate(&bag, &mut first);
        prop_assert_eq!(
            &strict.clone().map(|v| v.as_bool().unwrap()),
            &expression.test(&bag, &mut second)
        );
        prop_assert_eq!(first.names(&table()), second.names(&table()));
        // A rule's match differs only in that a false operand absorbs another one's error.
        match (strict, expression.holds(&bag, &mut Tracker::off())) {
            (Ok(value), held) => prop_assert_eq!(Ok(value.as_bool().unwrap()), held),
            (Err(_), held) => prop_assert_ne!(held, Ok(true)),
        }
    }

    /// What is known at load is folded, compiled and indexed; what comes with the request is interpreted. Both must
    /// come to the same.
    #[test]
    fn the_compiled_form_is_as_the_interpreted_one(text in condition(), attributes in attributes()) {
        let interpreted = text
            .replace(r#"m["x"]"#, "m[kx]")
            .replace(r#""x""#, "kx").replace(r#""y""#, "ky").replace(r#""""#, "ke")
            .replace("== 1", "== one").replace("true", "yes").replace("false", "no");
        let compiled = Expression::compile(&text, &table()).unwrap();
        let interpreted = Expression::compile(&interpreted, &table()).unwrap();
        let mut bag = bag(&attributes);
        for (name, value) in [("kx", "x"), ("ky", "y"), ("ke", "")] {
            bag.set_by_name(name, value).unwrap();
        }
        bag.set_by_name("one", 1_i64).unwrap();
        bag.set_by_name("yes", true).unwrap();
        bag.set_by_name("no", false).unwrap();
        prop_assert_eq!(
            compiled.holds(&bag, &mut Tracker::off()), interpreted.holds(&bag, &mut Tracker::off())
        );
        prop_assert_eq!(
            compiled.evaluate(&bag, &mut Tracker::off()), interpreted.evaluate(&bag, &mut Tracker::off())
        );
    }

    #[test]
    fn an_answer_depends_on_nothing_but_what_was_looked_up(
        text in condition(), attributes in attributes(), others in attributes(),
    ) {
        let expression = Expression::compile(&text, &table()).unwrap();
        let here = bag(&attributes);
        let mut tracker = Tracker::new();
        let answer = expression.holds(&here, &mut tracker);
        let names = tracker.names(&table());
        // Change every attribute that was not looked up.
        let mut changed = attributes.clone();
        for (name, _) in table().iter() {
            let seen = names.iter().any(|n| n.trim_start_matches('-').split('[').next() == Some(name));
            if !seen {
                let Some(name) = ["b", "c", "i", "s", "u.v", "m", "t", "ip", "dns", "uri"]
                    .into_iter().find(|n| *n == name) else { continue };
                match others.get(name) {
                    Some(value) => changed.insert(name, value.clone()),
                    None => changed.remove(name),
                };
            }
        }
        prop_assert_eq!(expression.holds(&bag(&changed), &mut Tracker::off()), answer);
    }

    #[test]
    fn partial_verdicts_come_true(
        text in condition(), attributes in attributes(), hidden in vec(select(vec!["b", "c", "i", "s", "u.v", "m"]), 0..4),
    ) {
        let expression = Expression::compile(&text, &table()).unwrap();
        let known = |name: &str| attributes.get(name).filter(|_| !hidden.contains(&name)).cloned();
        let held = expression.holds(&bag(&attributes), &mut Tracker::off());
        match expression.partial(&known) {
            Verdict::True => prop_assert_eq!(held, Ok(true)),
            Verdict::False => prop_assert_eq!(held, Ok(false)),
            Verdict::Unknown => {}
        }
    }

    #[test]
    fn a_plan_decides_as_its_matches_do(
        conditions in vec(condition(), 1..30), attributes in attributes(),
    ) {
        let table = table();
        let specs = conditions.iter().enumerate().map(|(at, condition)| RuleSpec {
            namespace: "root".into(),
            name: format!("{at:03}"),
            condition: Some(Expression::compile(condition, &table).unwrap()),
            priority: 0,
            on_error: OnMatchError::Deny,
            actions: vec![at],
        });
        let plan = Plan::build(specs, &table, "root");
        let bag = bag(&attributes);
        let want: Vec<usize> = plan.rules().iter()
            .filter(|r| r.condition().is_none_or(|c| c.holds(&bag, &mut Tracker::off()) != Ok(false)))
            .map(|r| r.actions()[0]).collect();
        let got: Vec<usize> = plan.select(&bag, &mut Tracker::new()).unwrap().iter()
            .map(|s| s.rule.actions()[0]).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn any_message_is_decoded_or_refused(
        words in vec(select(vec!["source.ip", "request.headers", "x", ""]), 0..5),
        strings in hash_map(-6..230_i32, -6..230_i32, 0..6),
        maps in hash_map(-6..230_i32, hash_map(-6..230_i32, any::<i32>(), 0..4), 0..3),
        times in hash_map(any::<i32>(), (any::<i64>(), any::<i32>()), 0..3),
        bytes in hash_map(-6..230_i32, vec(any::<u8>(), 0..17), 0..4),
        count in 0..230_u32,
    ) {
        let message = CompressedAttributes {
            words: words.into_iter().map(str::to_owned).collect(),
            strings,
            string_maps: maps.into_iter().map(|(n, entries)| (n, WireStringMap { entries })).collect(),
            timestamps: times.iter().map(|(n, (seconds, nanos))| {
                (*n, prost_types::Timestamp { seconds: *seconds, nanos: *nanos })
            }).collect(),
            durations: times.into_iter().map(|(n, (seconds, nanos))| {
                (n, prost_types::Duration { seconds, nanos })
            }).collect(),
            bytes,
            ..Default::default()
        };
        let table = AttributeTable::default_vocabulary();
        if let Ok(bag) = wire::decode(&message, count, &table, &Limits::default()) {
            let again = wire::encode(bag.iter(), count as usize);
            let back = wire::decode(&again, count, &table, &Limits::default()).unwrap();
            prop_assert!(bag.iter().eq(back.iter()));
        }
    }
}

#[test]
fn deep_and_long_expressions_are_refused_in_time() {
    let table = table();
    let deep = format!("{}b{}", "(".repeat(5000), ")".repeat(5000));
    assert!(
        Expression::compile(&deep, &table)
            .unwrap_err()
            .reason
            .contains("nested")
    );
    let unary = format!("{}b", "!".repeat(5000));
    assert!(
        Expression::compile(&unary, &table)
            .unwrap_err()
            .reason
            .contains("nested")
    );
    let chain = vec!["b"; 2000].join("||");
    assert!(
        Expression::compile(&chain, &table)
            .unwrap_err()
            .reason
            .contains("deep")
    );
    let methods = format!("s{}", ".f()".repeat(2000));
    assert!(
        Expression::compile(&methods, &table)
            .unwrap_err()
            .reason
            .contains("deep")
    );
    let long = format!("\"{}\"", "x".repeat(20_000));
    assert!(
        Expression::compile(&long, &table)
            .unwrap_err()
            .reason
            .contains("longer")
    );
    let allowed = vec!["b"; 400].join("||");
    let expression = Expression::compile(&allowed, &table).unwrap();
    let mut bag = Bag::new(&table);
    bag.set_by_name("b", false).unwrap();
    assert_eq!(expression.test(&bag, &mut Tracker::off()), Ok(false));
}
