use lateen_config::{parse_file, validate};
use lateen_engine::{Bag, OnMatchError, Plan, RuleSpec, StringMap, Text, Tracker};
use proptest::prelude::*;

use super::*;

/// The generator that ships with the mesh.
const KUBERNETESENV: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: handler
metadata: { name: kubernetesenv, namespace: istio-system }
spec: { compiledAdapter: kubernetesenv, params: {} }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: attributes, namespace: istio-system }
spec:
  compiledTemplate: kubernetes
  params: { source_uid: source.uid | "", destination_uid: destination.uid | "" }
  attributeBindings:
    source.labels: $out.source_labels | emptyStringMap()
    destination.labels: $out.destination_labels | emptyStringMap()
    destination.namespace: $out.destination_namespace | "default"
    destination.workload.name: $out.destination_workload_name | "unknown"
---
apiVersion: config.istio.io/v1alpha2
kind: rule
metadata: { name: kubeattrgenrulerule, namespace: istio-system }
spec: { actions: [ { handler: kubernetesenv, instances: [ attributes ] } ] }
---"#;

const INSTANCES: &str = r#"
apiVersion: config.istio.io/v1alpha2
kind: checknothing
metadata: { name: asked, namespace: istio-system }
---
apiVersion: config.istio.io/v1alpha2
kind: instance
metadata: { name: told, namespace: istio-system }
spec: { compiledTemplate: reportnothing }
---"#;

fn rule(name: &str, namespace: &str, instance: &str, condition: &str) -> String {
    let condition = serde_json::to_string(condition).unwrap();
    format!(
        "\napiVersion: config.istio.io/v1alpha2\nkind: rule\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {{ match: {condition}, actions: [ {{ handler: h, instances: [ {instance} ] }} ] }}\n---"
    )
}

fn objects(yaml: &str) -> Vec<Arc<Object>> {
    let (objects, problems) = parse_file("rules.yaml", yaml);
    assert_eq!(problems, []);
    let wrong: Vec<_> = objects.iter().flat_map(validate).collect();
    assert!(wrong.iter().all(|p| !p.is_error()), "{wrong:?}");
    objects.into_iter().map(Arc::new).collect()
}

fn rules(yaml: &str) -> Arc<Rules> {
    Arc::new(Rules::read(&objects(yaml), "istio-system"))
}

/// What is known of requests to `service` in namespace default, whose workload has the label `app`.
fn known(service: &str, app: &str) -> impl Fn(&str) -> Option<Value> {
    let (service, app) = (service.to_owned(), app.to_owned());
    move |name| match name {
        "context.reporter.kind" => Some(Value::string("inbound")),
        "destination.namespace" => Some(Value::string("default")),
        "destination.service.name" => Some(Value::string(service.as_str())),
        "destination.labels" => Some(labels(&app)),
        _ => None,
    }
}

fn labels(app: &str) -> Value {
    Value::StringMap(StringMap::new([(Text::from("app"), Text::from(app))]))
}

fn phases(rules: &Rules, service: &str, app: &str) -> (bool, bool) {
    let of = |phase| rules.matters(phase, "default", &known(service, app));
    (of(Phase::Check), of(Phase::Report))
}

#[test]
fn a_rule_counts_where_it_can_matter_for_what_it_does() {
    let pay = r#"destination.service.name == "pay" && request.method == "PUT""#;
    let web = r#"destination.labels["app"] == "web""#;
    for (rule, pay_shop_web) in [
        (
            rule("a", "istio-system", "asked", pay),
            [(true, false), (false, false), (false, false)],
        ),
        (
            rule("a", "istio-system", "told", pay),
            [(false, true), (false, false), (false, false)],
        ),
        // It denies while Mixer refuses it.
        (
            rule("a", "istio-system", "told", pay).replace(
                "name: a,",
                "name: a, annotations: { policy.istio.io/fail-mode: closed },",
            ),
            [(true, true), (false, false), (false, false)],
        ),
        (
            rule("a", "istio-system", "told.instance.istio-system", web),
            [(false, false), (false, false), (false, true)],
        ),
        // Rules of other namespaces are for requests there.
        (rule("a", "other", "asked", web), [(false, false); 3]),
        (
            rule("a", "default", "asked", web),
            [(false, false), (false, false), (true, false)],
        ),
        // What is not understood counts everywhere.
        (rule("a", "istio-system", "nobody", ""), [(true, true); 3]),
        (
            rule("a", "istio-system", "asked", "no.such == 1"),
            [(true, false); 3],
        ),
    ] {
        let rules = rules(&[KUBERNETESENV, INSTANCES, &rule].concat());
        let found =
            [("pay", "x"), ("shop", "x"), ("shop", "web")].map(|(s, a)| phases(&rules, s, a));
        assert_eq!(found, pay_shop_web, "{rule}");
    }
}

#[test]
fn generated_attributes_are_known_only_by_pilots_own_word() {
    let web = rule(
        "a",
        "istio-system",
        "asked",
        r#"destination.labels["app"] == "web""#,
    );
    let of = |generator: &str| {
        let rules = rules(&[generator, INSTANCES, &web].concat());
        rules.matters(Phase::Check, "default", &known("shop", "x"))
    };
    assert!(!of(KUBERNETESENV));
    // Another end's labels, another question, a match, another adapter, a second generator.
    assert!(of(
        &KUBERNETESENV.replace("$out.destination_labels", "$out.source_labels")
    ));
    assert!(of(&KUBERNETESENV.replace(
        "destination_uid: destination.uid",
        "destination_uid: source.uid"
    )));
    assert!(of(&KUBERNETESENV.replace(
        "spec: { actions",
        "spec: { match: 'request.method == \"GET\"', actions"
    )));
    assert!(of(
        &KUBERNETESENV.replace("compiledAdapter: kubernetesenv", "adapter: other")
    ));
    let second = KUBERNETESENV
        .replace("name: kubernetesenv,", "name: second,")
        .replace("name: kubeattrgenrulerule", "name: more")
        .replace("name: attributes", "name: others")
        .replace("[ attributes ]", "[ others ]")
        .replace("handler: kubernetesenv", "handler: second");
    assert!(of(&[KUBERNETESENV, &second].concat()));
}

#[test]
fn older_rules_count_until_every_mixer_has_the_newest() {
    let yaml = |service: &str| {
        let condition = format!("destination.service.name == \"{service}\"");
        [INSTANCES, &rule("a", "istio-system", "asked", &condition)].concat()
    };
    let matters =
        |reach: &Reach, service| reach.matters(Phase::Check, "default", &known(service, "x"));
    let one = rules(&yaml("one"));
    // Nobody has said what Mixers have.
    let reach = Reach::after(None, &one, false);
    assert!(matters(&reach, "two") && !reach.is_settled());
    let reach = Reach::after(Some(&reach), &one, true);
    assert!(matters(&reach, "one") && !matters(&reach, "two") && reach.is_settled());
    // Something else changes.
    let reach = Reach::after(Some(&reach), &rules(&yaml("one")), false);
    assert!(reach.is_settled());
    let two = rules(&yaml("two"));
    let reach = Reach::after(Some(&reach), &two, false);
    assert!(matters(&reach, "one") && matters(&reach, "two") && !matters(&reach, "three"));
    let reach = Reach::after(Some(&reach), &two, true);
    assert!(!matters(&reach, "one") && matters(&reach, "two"));
    // Changes that are never acknowledged do not pile up.
    let mut reach = reach;
    for number in 0..10 {
        reach = Reach::after(Some(&reach), &rules(&yaml(&format!("s{number}"))), false);
        assert!(matters(&reach, "two"));
    }
    assert!(matters(&reach, "nobody"));
}

fn condition() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        Just(r#"destination.service.name == "pay""#),
        Just(r#"destination.service.name != "pay""#),
        Just(r#"match(destination.service.name, "pa*")"#),
        Just(r#"destination.labels["app"] == "web""#),
        Just(r#"destination.labels["version"] == "v1""#),
        Just(r#"(destination.labels["version"] | "none") == "v1""#),
        Just(r#"(destination.workload.name | "none") == "pay""#),
        Just(r#"destination.namespace == "default""#),
        Just(r#"context.reporter.kind == "outbound""#),
        Just(r#"request.method == "GET""#),
        Just(r#"request.headers["x"] == "1""#),
        Just(r#"(request.headers["x"] | "none") == "1""#),
        Just("connection.mtls"),
        Just("true"),
        Just("false"),
    ]
    .prop_map(str::to_owned);
    atom.prop_recursive(3, 8, 2, |inner| {
        (inner.clone(), inner, any::<bool>()).prop_map(|(left, right, and)| {
            format!("({left}) {} ({right})", if and { "&&" } else { "||" })
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// The law: where it is said that no rule matters, Mixer's plan has nothing for any request.
    #[test]
    fn nothing_that_is_skipped_would_have_met_a_rule(
        conditions in prop::collection::vec((condition(), 0..3_usize, any::<bool>()), 1..4),
        service in prop_oneof![Just("pay"), Just("shop")],
        app in prop_oneof![Just("web"), Just("x")],
        with_generator in 0..3_usize,
        requests in prop::collection::vec((
            prop::option::of(prop_oneof![Just("GET"), Just("PUT")]),
            prop::option::of(prop_oneof![Just("1"), Just("2")]),
            prop::option::of(any::<bool>()),
            prop::option::of(prop_oneof![Just("pay"), Just("shop")]),
        ), 8),
    ) {
        // The last writes the service's name as well.
        let foreign = KUBERNETESENV.replace("attributeBindings:", "attributeBindings:\n    destination.service.name: $out.destination_pod_name | \"pay\"");
        let generator = ["", KUBERNETESENV, &foreign][with_generator];
        let spaces = ["istio-system", "default", "other"];
        let mut yaml = [generator, INSTANCES].concat();
        for (number, (condition, space, check)) in conditions.iter().enumerate() {
            let instance = if *check { "asked" } else { "told" };
            yaml += &rule(&format!("r{number}"), spaces[*space], instance, condition);
        }
        let rules = rules(&yaml);
        let table = AttributeTable::default_vocabulary();
        for (phase, check) in [(Phase::Check, true), (Phase::Report, false)] {
            let specs = conditions.iter().enumerate().filter(|(_, (_, _, c))| *c == check);
            let plan = Plan::build(
                specs.map(|(number, (condition, space, _))| RuleSpec {
                    namespace: spaces[*space].to_owned(),
                    name: format!("r{number}"),
                    condition: Some(Expression::compile_in(Language::Cexl, condition, &table).unwrap()),
                    priority: 0,
                    on_error: OnMatchError::Deny,
                    actions: vec![()],
                }),
                &table,
                "istio-system",
            );
            let matters = rules.matters(phase, "default", &known(service, app));
            for (method, header, mtls, written) in &requests {
                let mut bag = Bag::new(&table);
                let mut set = |name: &str, value: Option<Value>| {
                    if let (Some(slot), Some(value)) = (table.slot(name), value) {
                        bag.set(slot, value);
                    }
                };
                for name in ["context.reporter.kind", "destination.namespace", "destination.service.name", "destination.labels"] {
                    let is_there = name != "destination.labels" || with_generator > 0;
                    set(name, known(service, app)(name).filter(|_| is_there));
                }
                if with_generator == 2 {
                    set("destination.service.name", Some(Value::string(written.unwrap_or("pay"))));
                }
                set("destination.workload.name", written.map(Value::string));
                set("request.method", method.map(Value::string));
                set("connection.mtls", mtls.map(Value::Bool));
                set("request.headers", header.map(|h| Value::StringMap(StringMap::new([(Text::from("x"), Text::from(h))]))));
                let met = plan.select(&bag, &mut Tracker::off()).unwrap();
                prop_assert!(matters || met.is_empty(), "{phase:?} of {yaml}");
            }
        }
    }
}
