//! `/validate`: whether an object is let in. By `lateen_config`, as `lateen validate` judges files, each object alone:
//! what it names may come later.

use std::sync::Arc;

use lateen_config::{Problem, parse_value, validate};

use super::admission::{Answer, Review};
use super::metrics::Metrics;

pub(super) fn answer(review: &Review, metrics: &Metrics) -> Answer {
    if !matches!(review.operation.as_str(), "CREATE" | "UPDATE") {
        return Answer::allowed();
    }
    let origin: Arc<str> = "kubernetes".into();
    let (object, mut problems) = parse_value(&origin, &review.object);
    if let Some(object) = &object {
        problems.extend(validate(object));
    }
    problems.sort();
    problems.dedup();
    let (errors, warnings): (Vec<Problem>, Vec<Problem>) =
        problems.into_iter().partition(Problem::is_error);
    metrics.validated(&review.kind, errors.is_empty());
    let refusal = match errors.as_slice() {
        [] => None,
        errors => Some(errors.iter().map(text).collect::<Vec<_>>().join("; ")),
    };
    Answer {
        refusal,
        warnings: warnings.iter().map(text).collect(),
        patch: None,
    }
}

/// Without the object, which who asked has named.
fn text(problem: &Problem) -> String {
    problem.what().to_string()
}

#[cfg(test)]
mod tests {
    use lateen_service::prometheus_client::registry::Registry;
    use serde_json::{Value, json};

    use super::super::admission::GroupVersionKind;
    use super::*;

    fn ask(operation: &str, kind: &str, spec: Value) -> Answer {
        let metrics = Metrics::new(&mut Registry::default());
        let review = Review {
            uid: "u".into(),
            kind: GroupVersionKind {
                group: "networking.istio.io".into(),
                version: "v1".into(),
                kind: kind.into(),
            },
            namespace: "shop".into(),
            operation: operation.into(),
            object: json!({
                "apiVersion": "networking.istio.io/v1", "kind": kind,
                "metadata": {"name": "a", "namespace": "shop"}, "spec": spec,
            }),
        };
        answer(&review, &metrics)
    }

    #[test]
    fn errors_refuse_and_warnings_are_said() {
        let route = json!({"hosts": ["a"], "http": [{"timeuot": "2s", "route": [{"destination": {"host": "a"}}]}]});
        let said = ask("CREATE", "VirtualService", route.clone());
        assert_eq!(
            said.refusal.as_deref(),
            Some(
                "spec.http[0].timeuot: unknown field: HTTPRoute has no \"timeuot\" (did you mean timeout?)"
            )
        );
        // What goes is none of our business.
        assert_eq!(ask("DELETE", "VirtualService", route), Answer::allowed());
        let rule = json!({"host": "a", "trafficPolicy": {"proxyProtocol": {"version": "V2"}}});
        assert_eq!(
            ask("UPDATE", "DestinationRule", rule),
            Answer {
                warnings: vec![
                    "spec.trafficPolicy.proxyProtocol: not supported by this version; ignored"
                        .into()
                ],
                ..Answer::allowed()
            }
        );
        let good = json!({"host": "a"});
        assert_eq!(ask("CREATE", "DestinationRule", good), Answer::allowed());
    }
}
