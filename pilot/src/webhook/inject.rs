//! `/inject`: a pod in, a patch that adds its sidecar out. By `lateen_inject`, as `lateen inject` does it to files.

use lateen_inject::{Outcome, Settings, inject_pod};
use serde_json::Value;
use tracing::{debug, warn};

use super::admission::{Answer, Review};
use super::metrics::Metrics;

/// The settings that these texts say: the values first, if there are any, then a template a name.
pub(super) fn settings(
    texts: &[String],
    has_values: bool,
    names: &[String],
) -> Result<Settings, String> {
    let (values, templates) = texts.split_at(usize::from(has_values).min(texts.len()));
    let mut settings = match values.first() {
        // An empty document is no map, but says as little.
        Some(text) if !text.trim().is_empty() => {
            serde_saphyr::from_str(text).map_err(|error| format!("the values: {error}"))?
        }
        _ => Settings::default(),
    };
    for (name, text) in names.iter().zip(templates) {
        let template: Value =
            serde_saphyr::from_str(text).map_err(|error| format!("template {name}: {error}"))?;
        settings.templates.insert(name.clone(), template);
    }
    Ok(settings)
}

pub(super) fn answer(review: &Review, settings: &Settings, metrics: &Metrics) -> Answer {
    metrics.injection_requests.inc();
    let is_pod = (review.kind.group.as_str(), review.kind.kind.as_str()) == ("", "Pod");
    if !is_pod || review.operation != "CREATE" {
        // Containers of a pod that is there cannot be added.
        metrics.injection_skips.inc();
        return Answer::allowed();
    }
    let mut pod = review.object.clone();
    // Objects in a review have them, but nothing says that they must.
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    let before = pod.clone();
    let arriving = inject_pod(&mut pod, &review.namespace, settings);
    match arriving.outcome {
        Err(error) => {
            metrics.injection_failures.inc();
            warn!(pod = arriving.name, %error, "no sidecar can be made");
            Answer::refused(format!(
                "no sidecar can be made for {}: {error}. Mend the pod (its template, if a workload makes it), or do \
                 without by its label sidecar.istio.io/inject: \"false\"",
                arriving.name
            ))
        }
        Ok(Outcome::Left(why)) => {
            metrics.injection_skips.inc();
            debug!(pod = arriving.name, %why, "left as it is");
            Answer::allowed()
        }
        Ok(Outcome::Injected(_)) => {
            metrics.injection_successes.inc();
            debug!(pod = arriving.name, "has a sidecar");
            let patch = json_patch::diff(&before, &pod);
            match serde_json::to_value(patch) {
                Ok(patch) => Answer {
                    patch: Some(patch),
                    ..Answer::allowed()
                },
                Err(error) => Answer::refused(format!(
                    "the sidecar of {} cannot be written: {error}",
                    arriving.name
                )),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lateen_inject::PROXY;
    use lateen_service::prometheus_client::registry::Registry;
    use serde_json::json;

    use super::super::admission::GroupVersionKind;
    use super::*;

    fn review(pod: Value) -> Review {
        Review {
            uid: "u".into(),
            kind: GroupVersionKind {
                group: String::new(),
                version: "v1".into(),
                kind: "Pod".into(),
            },
            namespace: "shop".into(),
            operation: "CREATE".into(),
            object: pod,
        }
    }

    fn pod(annotations: Value) -> Value {
        json!({
            "metadata": {"generateName": "cart-", "annotations": annotations},
            "spec": {"containers": [{"name": "app", "image": "app:1"}], "volumes": []},
        })
    }

    fn ask(review: &Review) -> Answer {
        let metrics = Metrics::new(&mut Registry::default());
        answer(review, &Settings::default(), &metrics)
    }

    #[test]
    fn the_patch_makes_the_pod_that_the_library_makes() {
        let review = review(pod(json!({"a/b~c": "x"})));
        let said = ask(&review);
        assert_eq!(said.refusal, None);
        let mut patched = review.object.clone();
        let patch: json_patch::Patch = serde_json::from_value(said.patch.unwrap()).unwrap();
        json_patch::patch(&mut patched, &patch).unwrap();
        let mut want = review.object.clone();
        want["apiVersion"] = json!("v1");
        want["kind"] = json!("Pod");
        let made = inject_pod(&mut want, "shop", &Settings::default());
        assert_eq!(made.outcome, Ok(Outcome::Injected(1)));
        let want = want.as_object_mut().unwrap();
        want.retain(|name, _| !matches!(name.as_str(), "apiVersion" | "kind"));
        assert_eq!(&patched, &Value::Object(want.clone()));
        assert_eq!(patched["spec"]["containers"][1]["name"], PROXY);
        // Asked again, because another webhook has changed the pod: nothing to add.
        let again = ask(&Review {
            object: patched,
            ..review
        });
        assert_eq!(again, Answer::allowed());
    }

    #[test]
    fn a_refusal_says_which_pod_and_what_to_do() {
        let bad = pod(json!({"sidecar.istio.io/interceptionMode": "MAGIC"}));
        assert_eq!(
            ask(&review(bad)).refusal.unwrap(),
            "no sidecar can be made for pod shop/cart-*: annotation sidecar.istio.io/interceptionMode: \"MAGIC\" is none of \
             REDIRECT, TPROXY, NONE. Mend the pod (its template, if a workload makes it), or do without by its label \
             sidecar.istio.io/inject: \"false\""
        );
    }

    #[test]
    fn what_is_no_new_pod_passes() {
        let mut update = review(pod(json!({})));
        update.operation = "UPDATE".into();
        assert_eq!(ask(&update), Answer::allowed());
        let mut other = review(pod(json!({})));
        other.kind.kind = "Service".into();
        assert_eq!(ask(&other), Answer::allowed());
        let mut empty = review(Value::Null);
        empty.object = json!({});
        assert!(ask(&empty).refusal.unwrap().contains("Pod has no"));
    }

    #[test]
    fn settings_come_of_texts() {
        let texts = ["image: x:1\n", "metadata: {}\n"].map(str::to_owned);
        let names = ["extra".to_owned()];
        let read = settings(&texts, true, &names).unwrap();
        assert_eq!(read.image, "x:1");
        assert_eq!(read.templates["extra"], json!({"metadata": {}}));
        assert_eq!(settings(&[], false, &[]).unwrap(), Settings::default());
        assert_eq!(
            settings(&["\n".into()], true, &[]).unwrap(),
            Settings::default()
        );
        assert!(settings(&["imagge: x\n".into()], true, &[]).is_err());
        assert!(settings(&["{".into()], false, &names).is_err());
    }
}
