use super::*;
use crate::expression::Language;

fn table() -> AttributeTable {
    AttributeTable::default_vocabulary()
}

fn spec(namespace: &str, name: &str, condition: &str) -> RuleSpec<u32> {
    RuleSpec {
        namespace: namespace.into(),
        name: name.into(),
        condition: (!condition.is_empty())
            .then(|| Expression::compile(condition, &table()).unwrap()),
        priority: 0,
        on_error: OnMatchError::Deny,
        actions: vec![],
    }
}

fn bag(attributes: &[(&str, &str)]) -> Bag {
    let mut bag = Bag::new(&table());
    for (name, value) in attributes {
        bag.set_by_name(name, *value).unwrap();
    }
    bag
}

fn plan(specs: Vec<RuleSpec<u32>>) -> Plan<u32> {
    Plan::build(specs, &table(), "istio-system")
}

fn names(plan: &Plan<u32>, attributes: &[(&str, &str)]) -> Vec<String> {
    let selected = plan.select(&bag(attributes), &mut Tracker::new()).unwrap();
    selected
        .iter()
        .map(|s| {
            let mark = match &s.decision {
                Decision::Applies => "",
                Decision::Failed(..) if s.denies().is_some() => "!",
                Decision::Failed(..) => "?",
            };
            format!("{mark}{}/{}", s.rule.namespace(), s.rule.name())
        })
        .collect()
}

#[test]
fn mesh_wide_rules_come_before_those_of_the_namespace() {
    let urgent = RuleSpec {
        priority: 5,
        ..spec("shop", "z", "")
    };
    let plan = plan(vec![
        spec("shop", "b", ""),
        spec("shop", "a", ""),
        spec("istio-system", "m", ""),
        spec("other", "o", ""),
        urgent,
    ]);
    let shop = ["shop/z", "istio-system/m", "shop/a", "shop/b"];
    assert_eq!(names(&plan, &[("destination.namespace", "shop")]), shop);
    assert_eq!(
        names(
            &plan,
            &[
                ("context.reporter.kind", "outbound"),
                ("source.namespace", "shop"),
                ("destination.namespace", "other"),
            ]
        ),
        shop
    );
    assert_eq!(
        names(
            &plan,
            &[
                ("context.reporter.kind", "inbound"),
                ("source.namespace", "shop")
            ]
        ),
        ["istio-system/m"]
    );
    assert_eq!(
        names(&plan, &[("destination.namespace", "nobody")]),
        ["istio-system/m"]
    );
    assert_eq!(names(&plan, &[]), ["istio-system/m"]);
}

#[test]
fn a_match_that_fails_denies_unless_the_rule_says_otherwise() {
    let condition = r#"request.headers["x"] == "1""#;
    let plan = plan(vec![
        spec("istio-system", "a", condition),
        RuleSpec {
            on_error: OnMatchError::Skip,
            ..spec("istio-system", "b", condition)
        },
        RuleSpec {
            on_error: OnMatchError::Apply,
            ..spec("istio-system", "c", condition)
        },
    ]);
    let bag = bag(&[]);
    let selected = plan.select(&bag, &mut Tracker::new()).unwrap();
    let told: Vec<_> = selected
        .iter()
        .map(|s| (s.denies().is_some(), s.applies()))
        .collect();
    assert_eq!(told, [(true, false), (false, false), (false, true)]);
}

#[test]
fn a_rule_for_another_service_does_not_fail_on_this_one() {
    let plan = plan(vec![spec(
        "istio-system",
        "a",
        r#"request.headers["x"] == "1" && destination.service.host == "reviews""#,
    )]);
    assert!(names(&plan, &[("destination.service.host", "ratings")]).is_empty());
    assert_eq!(
        names(&plan, &[("destination.service.host", "reviews")]),
        ["!istio-system/a"]
    );
    assert_eq!(names(&plan, &[]), ["!istio-system/a"]);
}

#[test]
fn an_index_selects_what_a_walk_over_all_rules_selects() {
    let mut specs = Vec::new();
    for i in 0..40 {
        let host = i % 7;
        let condition = match i % 4 {
            0 => format!(r#"destination.service.host == "h{host}""#),
            1 => format!(r#"destination.service.host == "h{host}" && request.method == "GET""#),
            2 => format!(r#""h{host}" == destination.service.host && source.name == "a""#),
            _ => r#"request.method == "GET""#.to_owned(),
        };
        specs.push(spec("istio-system", &format!("r{i:02}"), &condition));
    }
    let plan = plan(specs);
    assert!(plan.everywhere.index.is_some());
    for host in ["h0", "h3", "nobody"] {
        for method in ["GET", "PUT"] {
            let attributes = [
                ("destination.service.host", host),
                ("request.method", method),
                ("source.name", "b"),
            ];
            let bag = bag(&attributes);
            let walk: Vec<String> = plan
                .rules()
                .iter()
                .filter(|r| {
                    r.condition()
                        .unwrap()
                        .holds(&bag, &mut Tracker::off())
                        .unwrap()
                })
                .map(|r| format!("{}/{}", r.namespace(), r.name()))
                .collect();
            assert_eq!(names(&plan, &attributes), walk, "{host} {method}");
        }
    }
    let all_fail = names(&plan, &[("request.method", "PUT"), ("source.name", "b")]);
    assert_eq!(
        all_fail.len(),
        10,
        "only those that ask for nothing but the host: {all_fail:?}"
    );
}

#[test]
fn what_was_looked_at_is_recorded() {
    let plan = plan(vec![spec(
        "istio-system",
        "a",
        r#"request.method == "GET""#,
    )]);
    let mut tracker = Tracker::new();
    plan.select(&bag(&[("request.method", "PUT")]), &mut tracker)
        .unwrap();
    assert_eq!(
        tracker.names(&table()),
        [
            "-context.reporter.kind",
            "-destination.namespace",
            "request.method"
        ]
    );
}

#[test]
fn a_rule_in_cel_takes_absent_attributes_for_empty() {
    let text = r#"request.headers["x"] == "1" && destination.service.host == "reviews""#;
    let condition = Expression::compile_in(Language::Cel, text, &table()).unwrap();
    let plan = plan(vec![RuleSpec {
        condition: Some(condition),
        ..spec("istio-system", "a", "")
    }]);
    assert!(names(&plan, &[]).is_empty());
    assert!(names(&plan, &[("destination.service.host", "ratings")]).is_empty());
    // A key that is not there is an error in CEL too.
    assert_eq!(
        names(&plan, &[("destination.service.host", "reviews")]),
        ["!istio-system/a"]
    );
}

#[test]
fn bags_of_another_configuration_are_refused() {
    let plan = plan(vec![spec("istio-system", "a", "")]);
    let (other, _) = AttributeTable::from_manifests([]);
    let error = plan
        .select(&Bag::new(&other), &mut Tracker::off())
        .unwrap_err();
    assert_eq!(error, EvalError::ForeignBag);
}

#[test]
fn partial_evaluation_finds_rules_that_can_never_matter() {
    let plan = plan(vec![
        spec("istio-system", "all", ""),
        spec(
            "istio-system",
            "ratings",
            r#"destination.service.host == "ratings""#,
        ),
        spec(
            "istio-system",
            "user",
            r#"request.headers["x"] == "1" && match(destination.service.host, "rev*")"#,
        ),
    ]);
    let known = |host: &'static str| {
        move |name: &str| (name == "destination.service.host").then(|| Value::from(host))
    };
    let verdicts = |host| {
        plan.rules_for(None)
            .map(|r| r.partial(&known(host)))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        verdicts("ratings"),
        [Verdict::True, Verdict::True, Verdict::False]
    );
    assert_eq!(
        verdicts("reviews"),
        [Verdict::True, Verdict::False, Verdict::Unknown]
    );
}
