//! What becomes of a request while Mixer cannot be asked, when rules say so for themselves: annotation
//! `policy.istio.io/fail-mode: open|closed`. Proxies do not know rules, so it is worked out here for each
//! destination: of the annotated rules that may apply to it, one that is `closed` decides; else one
//! that is `open`; else the mesh's `policyCheckFailOpen`.

use lateen_config::{Labels, Spec};
use lateen_engine::{AttributeTable, Expression, Language, StringMap, Value, Verdict};
use lateen_protocols::istio::mixer::v1::Attributes;
use lateen_protocols::istio::mixer::v1::attributes::attribute_value;

use crate::model::Snapshot;

/// The annotation; Mixer reads it too, for matches and adapters that fail.
const FAIL_MODE: &str = "policy.istio.io/fail-mode";
/// The annotation that names the language of a rule's match.
const LANGUAGE: &str = "policy.istio.io/lang";

/// The annotated rules that concern a namespace.
#[derive(Debug, Default)]
pub(super) struct FailModes {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    open: bool,
    /// `None`: it always applies.
    condition: Option<Expression>,
}

impl FailModes {
    pub(super) fn of(snapshot: &Snapshot, namespace: &str) -> Self {
        let root = snapshot.mesh().root_namespace.as_str();
        let table = table(snapshot);
        let rules = snapshot.objects().iter().filter_map(|object| {
            let Spec::Mixer(rule) = &object.spec else {
                return None;
            };
            let concerns = *object.key.namespace == *root || *object.key.namespace == *namespace;
            if rule.kind != "rule" || !concerns {
                return None;
            }
            let open = match object.annotations.get(FAIL_MODE)?.as_str() {
                "open" => true,
                "closed" => false,
                _ => return None, // Mixer refuses the rule and says why
            };
            let condition = match rule.spec["match"].as_str().unwrap_or_default().trim() {
                "" => None,
                // A match that does not compile is refused by Mixer; until it is mended it may apply to all.
                text => object
                    .annotations
                    .get(LANGUAGE)
                    .map_or(Ok(Language::Cexl), |name| name.parse())
                    .ok()
                    .and_then(|language| Expression::compile_in(language, text, &table).ok()),
            };
            Some(Rule { open, condition })
        });
        Self {
            rules: rules.collect(),
        }
    }

    /// Whether requests to a destination go on while Mixer cannot be asked; `None`: as the mesh says.
    pub(super) fn is_open(&self, attributes: &Attributes, labels: Option<&Labels>) -> Option<bool> {
        let known = |name: &str| match name {
            "context.reporter.kind" => Some(Value::string("inbound")),
            "destination.labels" => labels.map(map),
            _ => match attributes.attributes.get(name)?.value.as_ref()? {
                attribute_value::Value::StringValue(value) => Some(Value::string(value.as_str())),
                _ => None,
            },
        };
        let mut found = None;
        for rule in &self.rules {
            let applies = rule
                .condition
                .as_ref()
                .is_none_or(|condition| condition.partial(&known) != Verdict::False);
            if applies {
                found = Some(found.unwrap_or(true) && rule.open);
            }
        }
        found
    }
}

/// Labels as rules see them.
pub(super) fn map(labels: &Labels) -> Value {
    let text = |text: &str| lateen_engine::Text::from(text);
    let entries = labels.iter().map(|(k, v)| (text(k), text(v)));
    Value::StringMap(StringMap::new(entries))
}

/// The vocabulary that rules are written in.
fn table(snapshot: &Snapshot) -> AttributeTable {
    let manifests = snapshot
        .objects()
        .iter()
        .filter_map(|object| match &object.spec {
            Spec::Mixer(manifest) if manifest.kind == "attributemanifest" => Some(&manifest.spec),
            _ => None,
        });
    AttributeTable::from_manifests(manifests).0
}

#[cfg(test)]
mod tests {
    use super::super::tests::world;
    use super::*;
    use lateen_protocols::istio::mixer::v1::attributes::AttributeValue;

    fn destination(name: &str) -> Attributes {
        let value = attribute_value::Value::StringValue(name.to_owned());
        let entry = AttributeValue { value: Some(value) };
        Attributes {
            attributes: [("destination.service.name".to_owned(), entry)].into(),
        }
    }

    #[test]
    fn the_strictest_rule_that_may_apply_decides() {
        let rule = |name: &str, mode: &str, condition: &str| {
            format!(
                "\napiVersion: config.istio.io/v1alpha2\nkind: rule\nmetadata: {{ name: {name}, namespace: istio-system, annotations: {{ policy.istio.io/fail-mode: {mode} }} }}\nspec: {{ match: '{condition}' }}\n---"
            )
        };
        let yaml = [
            rule(
                "a",
                "closed",
                r#"destination.service.name == "pay" && request.method == "PUT""#,
            ),
            rule("b", "open", r#"destination.service.name == "pay""#),
            rule("c", "open", r#"destination.labels["app"] == "web""#),
            rule(
                "d",
                "closed, policy.istio.io/lang: CEL",
                r#"destination.service.name in ["vault"] && !has(source.user)"#,
            ),
        ]
        .concat();
        let modes = FailModes::of(&world(&yaml), "default");
        let web: Labels = [("app".to_owned(), "web".to_owned())].into_iter().collect();
        let other: Labels = [("app".to_owned(), "x".to_owned())].into_iter().collect();
        for (service, labels, expected) in [
            ("pay", &other, Some(false)),
            ("shop", &web, Some(true)),
            ("shop", &other, None),
            ("vault", &other, Some(false)),
        ] {
            let open = modes.is_open(&destination(service), Some(labels));
            assert_eq!(open, expected, "{service}");
        }
    }
}
