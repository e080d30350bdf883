//! CEL: our compiled form against the interpreter of the `cel` crate, and the rules that are Istio's.
#![cfg(test)]

use std::collections::HashMap;

use lateen_engine::{
    AttributeTable, Bag, Expression, Language, Outcome, StringMap, Tracker, Value, ValueType,
    Verdict,
};
use proptest::prelude::*;
use proptest::sample::select;

fn table() -> AttributeTable {
    thread_local! {
        static TABLE: AttributeTable = AttributeTable::new([
            ("i", ValueType::Int64), ("j", ValueType::Int64), ("s", ValueType::String),
            ("t", ValueType::String), ("b", ValueType::Bool), ("c", ValueType::Bool),
            ("d", ValueType::Double), ("m", ValueType::StringMap), ("a.b.c", ValueType::String),
            ("a.ip", ValueType::IpAddress), ("a.map", ValueType::StringMap),
            ("source.namespace", ValueType::String), ("as", ValueType::String),
        ]).unwrap();
    }
    TABLE.with(Clone::clone)
}

type Strategies = (
    BoxedStrategy<String>,
    BoxedStrategy<String>,
    BoxedStrategy<String>,
);

/// Well-typed expressions: bool, int, string.
fn expressions(depth: u32) -> Strategies {
    let bools =
        select(vec!["b", "c", "true", "false", "has(m.x)", r#""y" in m"#]).prop_map(str::to_owned);
    let ints =
        select(vec!["i", "j", "0", "1", "2", "-3", "9223372036854775807"]).prop_map(str::to_owned);
    let texts = select(vec![
        "s",
        "t",
        r#""x""#,
        r#""""#,
        r#""xy""#,
        r#"m["x"]"#,
        "m.y",
    ])
    .prop_map(str::to_owned);
    if depth == 0 {
        return (bools.boxed(), ints.boxed(), texts.boxed());
    }
    let (b, i, t) = expressions(depth - 1);
    let compare = || select(vec!["==", "!=", "<", "<=", ">", ">="]);
    let arithmetic = select(vec!["+", "-", "*", "/", "%"]);
    let methods = select(vec!["startsWith", "endsWith", "contains"]);
    let loops = select(vec!["all", "exists", "exists_one"]);
    let bools = prop_oneof![
        2 => bools,
        3 => (b.clone(), select(vec!["&&", "||"]), b.clone()).prop_map(|(x, op, y)| format!("({x} {op} {y})")),
        1 => b.clone().prop_map(|x| format!("!({x})")),
        2 => (i.clone(), compare(), i.clone()).prop_map(|(x, op, y)| format!("({x} {op} {y})")),
        2 => (t.clone(), compare(), t.clone()).prop_map(|(x, op, y)| format!("({x} {op} {y})")),
        1 => (t.clone(), methods, t.clone()).prop_map(|(x, f, y)| format!("({x}).{f}({y})")),
        1 => t.clone().prop_map(|x| format!("({x}).matches('^x+$')")),
        1 => (i.clone(), i.clone(), i.clone()).prop_map(|(x, y, z)| format!("({x} in [{y}, {z}])")),
        1 => (i.clone(), loops, i.clone(), i.clone())
            .prop_map(|(x, f, y, z)| format!("[{x}, {y}].{f}(v, v < {z})")),
        1 => (b.clone(), b.clone(), b.clone()).prop_map(|(x, y, z)| format!("({x} ? {y} : {z})")),
    ];
    let ints = prop_oneof![
        2 => ints,
        3 => (i.clone(), arithmetic, i.clone()).prop_map(|(x, op, y)| format!("({x} {op} {y})")),
        1 => t.clone().prop_map(|x| format!("size({x})")),
        1 => (i.clone(), i.clone(), i.clone()).prop_map(|(x, y, z)| format!("[{x}, {y}][{z}]")),
        1 => (i.clone(), i.clone()).prop_map(|(x, y)| format!("size([{x}, {y}, 4].filter(v, v > 1))")),
        1 => (i.clone(), i.clone()).prop_map(|(x, y)| format!("[{x}, {y}].map(v, v + 1)[1]")),
        1 => (b.clone(), i.clone(), i.clone()).prop_map(|(x, y, z)| format!("({x} ? {y} : {z})")),
        1 => i.clone().prop_map(|x| format!("-({x})")),
    ];
    let texts = prop_oneof![
        2 => texts,
        2 => (t.clone(), t.clone()).prop_map(|(x, y)| format!("({x} + {y})")),
        1 => i.prop_map(|x| format!("string({x})")),
        1 => (t.clone(), t.clone()).prop_map(|(x, y)| format!("{{'k': {x}, 'l': {y}}}['l']")),
        1 => (b, t.clone(), t).prop_map(|(x, y, z)| format!("({x} ? {y} : {z})")),
    ];
    (bools.boxed(), ints.boxed(), texts.boxed())
}

fn any_expression() -> impl Strategy<Value = String> {
    let (bools, ints, texts) = expressions(3);
    prop_oneof![3 => bools, 1 => ints, 1 => texts]
}

#[derive(Clone, Debug)]
struct Attributes {
    ints: [i64; 2],
    texts: [&'static str; 2],
    bools: [bool; 2],
    map: HashMap<&'static str, &'static str>,
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let text = || select(vec!["", "x", "y", "xx"]);
    let map = proptest::collection::hash_map(select(vec!["x", "y"]), text(), 0..3);
    (
        any::<[bool; 2]>(),
        -2..3_i64,
        -2..3_i64,
        text(),
        text(),
        map,
    )
        .prop_map(|(bools, i, j, s, t, map)| Attributes {
            ints: [i, j],
            texts: [s, t],
            bools,
            map,
        })
}

impl Attributes {
    fn bag(&self) -> Bag {
        let mut bag = Bag::new(&table());
        let map: StringMap = self.map.iter().map(|(k, v)| (*k, *v)).collect();
        for (name, value) in [
            ("i", Value::Int64(self.ints[0])),
            ("j", Value::Int64(self.ints[1])),
            ("s", self.texts[0].into()),
            ("t", self.texts[1].into()),
            ("b", self.bools[0].into()),
            ("c", self.bools[1].into()),
            ("m", map.into()),
        ] {
            bag.set_by_name(name, value).unwrap();
        }
        bag
    }

    fn interpret(&self, text: &str) -> Result<String, String> {
        let mut context = cel::Context::default();
        context.add_variable_from_value("i", self.ints[0]);
        context.add_variable_from_value("j", self.ints[1]);
        context.add_variable_from_value("s", self.texts[0]);
        context.add_variable_from_value("t", self.texts[1]);
        context.add_variable_from_value("b", self.bools[0]);
        context.add_variable_from_value("c", self.bools[1]);
        let map: HashMap<String, String> = self
            .map
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        context.add_variable_from_value("m", map);
        let program = cel::Program::compile(text).map_err(|e| e.to_string())?;
        match program.execute(&context).map_err(|e| e.to_string())? {
            cel::Value::Int(v) => Ok(v.to_string()),
            cel::Value::Bool(v) => Ok(v.to_string()),
            cel::Value::String(v) => Ok((*v).clone()),
            other => panic!("{text} is {other:?}"),
        }
    }
}

fn compile(text: &str) -> Expression {
    Expression::compile_in(Language::Cel, text, &table()).unwrap_or_else(|e| panic!("{text}: {e}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn the_compiled_form_is_as_the_interpreter(text in any_expression(), attributes in attributes()) {
        let ours = compile(&text).evaluate(&attributes.bag(), &mut Tracker::new()).map(|v| v.to_string());
        let theirs = attributes.interpret(&text);
        match (&ours, &theirs) {
            (Ok(a), Ok(b)) => prop_assert_eq!(a, b),
            (Err(_), Err(_)) => {}
            _ => prop_assert!(false, "{:?} and {:?}", ours, theirs),
        }
    }

    #[test]
    fn partial_verdicts_come_true(
        text in expressions(3).0, attributes in attributes(),
        hidden in proptest::collection::vec(select(vec!["i", "j", "s", "b", "c", "m"]), 0..4),
    ) {
        let expression = compile(&text);
        let bag = attributes.bag();
        let known = |name: &str| {
            let value = bag.get(table().slot(name).unwrap())?;
            (!hidden.contains(&name)).then(|| value.clone())
        };
        let held = expression.holds(&bag, &mut Tracker::off());
        match expression.partial(&known) {
            Verdict::True => prop_assert_eq!(held, Ok(true)),
            Verdict::False => prop_assert_eq!(held, Ok(false)),
            Verdict::Unknown => {}
        }
    }

    #[test]
    fn required_equalities_are_required(text in expressions(3).0, attributes in attributes()) {
        let expression = compile(&text);
        let bag = attributes.bag();
        let differs = expression.equalities().iter().any(|(slot, want)| {
            bag.get(*slot).is_some_and(|got| got != want)
        });
        if differs {
            prop_assert_ne!(expression.holds(&bag, &mut Tracker::off()), Ok(true));
        }
    }

    #[test]
    fn any_text_is_compiled_or_refused(text in r#"([a-z."(\[\])|&=<!' `\\0-9{}$@,:*+\n?-]|in|has|b"|r'|\PC){0,60}"#) {
        for language in [Language::Cel, Language::Compat] {
            if let Ok(expression) = Expression::compile_any(language, &text, &table()) {
                drop(expression.outcome(&Bag::new(&table()), &mut Tracker::new()));
            }
        }
    }
}

fn outcome(text: &str, attributes: &[(&str, Value)]) -> Result<String, String> {
    let expression = match Expression::compile_any(Language::Cel, text, &table()) {
        Ok(expression) => expression,
        Err(error) => return Err(format!("refused: {error}")),
    };
    let mut bag = Bag::new(&table());
    for (name, value) in attributes {
        bag.set_by_name(name, value.clone()).unwrap();
    }
    match expression.outcome(&bag, &mut Tracker::new()) {
        Ok(Outcome::Value(value)) => Ok(value.to_string()),
        Ok(other) => Ok(format!("{other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn istios_rules_hold() {
    let map: Value = [("k", "v")].into_iter().collect::<StringMap>().into();
    let present = [("a.b.c", Value::from("x")), ("a.map", map)];
    for (text, attributes, want) in [
        // Absent attributes are zero; has() tells.
        ("a.b.c", &[][..], Ok("")),
        ("has(a.b.c)", &[], Ok("false")),
        ("has(a.b.c)", &present, Ok("true")),
        ("has(a.b)", &[], Ok("true")),
        ("a.ip", &[], Ok("NoAddress")),
        ("a.ip == ip('1.2.3.4')", &[], Ok("false")),
        // Attributes may have names that CEL reserves.
        ("source.namespace == as", &[], Ok("true")),
        // Maps.
        ("a.map.k", &present, Ok("v")),
        ("a.map['k']", &present, Ok("v")),
        ("a.map['z']", &present, Err("no such key: 'z'")),
        ("has(a.map.k) && !('z' in a.map)", &present, Ok("true")),
        (
            "size(a.map)",
            &present,
            Err("size not implemented on stringmaps"),
        ),
        (
            "a.map == a.map",
            &present,
            Err("stringmap does not support equality"),
        ),
        (
            "a.map.exists(key, key.startsWith('k'))",
            &present,
            Ok("true"),
        ),
        (
            "a.b == a.b",
            &[],
            Err("attribute message does not support equality"),
        ),
        // pick and conditional.
        ("pick(a.b.c, a.map['k'], 'z')", &present[1..], Ok("v")),
        ("pick(as, 'z')", &[], Ok("")),
        (
            "pick()",
            &[],
            Err("refused: undeclared reference to 'pick' (in container '')"),
        ),
        (
            "pick(has(a.b), true)",
            &[],
            Err("refused: unsupported use of has() macro in pick()"),
        ),
        ("conditional(b, 1, 2)", &[], Ok("2")),
        // Types are checked at load.
        ("a.z", &[], Err("refused: undefined field 'z'")),
        (
            "z",
            &[],
            Err("refused: undeclared reference to 'z' (in container '')"),
        ),
        (
            "1 + 1.0",
            &[],
            Err("refused: found no matching overload for '_+_' applied to '(int, double)'"),
        ),
        (
            "b ? 1 : 'x'",
            &[],
            Err("refused: found no matching overload for '_?_:_' applied to '(bool, int, string)'"),
        ),
        (
            "s.startsWith(1)",
            &[],
            Err("refused: found no matching overload for 'startsWith' applied to 'string.(int)'"),
        ),
        (
            "[1, 2].all(x, x)",
            &[],
            Err("refused: expected type 'bool' but found 'int'"),
        ),
        (
            "i.k",
            &[],
            Err("refused: type 'int' does not support field selection"),
        ),
        // The rest of the language.
        ("'a' in ['a', 'b']", &[], Ok("true")),
        ("[1, 2, 3].filter(x, x > 1).map(x, x * x)[1]", &[], Ok("9")),
        ("{'a': 1, 'b': 2}.b", &[], Ok("2")),
        ("{'a': 1}['b']", &[], Err("no such key: 'b'")),
        (
            "[1][1]",
            &[],
            Err("index '1' out of range in list of size '1'"),
        ),
        ("1 / i", &[], Err("divide by zero")),
        ("1 % 0 == 1 || true", &[], Ok("true")),
        ("-9223372036854775808 + 9223372036854775807", &[], Ok("-1")),
        (
            "9223372036854775807 + 1",
            &[],
            Err("result is out of range"),
        ),
        ("int('7') + int(2.9) + int(3u)", &[], Ok("12")),
        (
            "r'\\d' + '\\x41\\u00e9\\101' + '''q'q'''",
            &[],
            Ok("\\dA\u{e9}Aq'q"),
        ),
        ("size(b'\\xff\\000')", &[], Ok("2")),
        (
            "timestamp('2026-01-31T10:20:30Z').getDayOfWeek('+14:00')",
            &[],
            Ok("0"),
        ),
        ("duration('90m').getHours()", &[], Ok("1")),
        (
            "string(duration('90m') + google.protobuf.Duration{seconds: i})",
            &[],
            Ok("5400s"),
        ),
        (
            "timestamp('2026-01-01T00:00:00Z') - timestamp('2025-12-31T23:00:00Z')",
            &[],
            Ok("3600s"),
        ),
        (
            "type(1) == int && type([]) == list && type(s) != type(i)",
            &[],
            Ok("true"),
        ),
        ("dyn(1) == 'a'", &[], Err("no such overload: int == string")),
        (
            "google.protobuf.StringValue{value: 'x'}.value + 'y'",
            &[],
            Ok("xy"),
        ),
        (
            "google.protobuf.Int64Value{}.value + int(google.protobuf.Timestamp{seconds: 5, nanos: 1})",
            &[],
            Ok("5"),
        ),
        (
            "google.rpc.Status{}",
            &[],
            Err("refused: undeclared reference to 'google.rpc.Status' (in container '')"),
        ),
        ("[1]", &[], Err("failed to recover of type list(dyn)")),
        ("{'a': 'b'}", &[], Ok("Map({\"a\": \"b\"})")),
        ("null == null // said twice", &[], Ok("true")),
    ] {
        let got = outcome(text, attributes);
        let got = got.as_ref().map(String::as_str).map_err(String::as_str);
        assert_eq!(got, want, "{text}");
    }
}

#[test]
fn what_no_attribute_can_have_is_no_parameter() {
    for text in ["[1, 2]", "null", "1u", "b'x'", "dyn(1)", "{'a': 1}"] {
        let error = Expression::compile_in(Language::Cel, text, &table()).unwrap_err();
        assert_eq!(
            error.reason, "the value is of no type that attributes have",
            "{text}"
        );
    }
}

#[test]
fn work_is_bounded() {
    let hundred = format!("[{}]", vec!["i"; 100].join(","));
    let text = format!("{hundred}.all(x, {hundred}.all(y, {hundred}.all(z, x == z)))");
    assert_eq!(
        outcome(&text, &[]),
        Err("the expression takes more than 100000 steps".to_owned())
    );
    for (text, reason) in [
        (
            format!("{}b{}", "(".repeat(5000), ")".repeat(5000)),
            "nested",
        ),
        (format!("{}b", "!".repeat(5000)), "nested"),
        (vec!["i"; 2000].join("+"), "deep"),
        (format!("s{}", ".f()".repeat(2000)), "deep"),
        (format!("\"{}\"", "x".repeat(20_000)), "longer"),
    ] {
        for language in [Language::Cel, Language::Compat] {
            let error = Expression::compile_any(language, &text, &table()).unwrap_err();
            assert!(error.reason.contains(reason), "{error}");
        }
    }
    for language in [Language::Cel, Language::Compat] {
        let chain = vec!["b"; 400].join("||");
        let expression = Expression::compile_any(language, &chain, &table()).unwrap();
        assert_eq!(
            expression.test(&Bag::new(&table()), &mut Tracker::off()),
            Ok(false)
        );
    }
}
