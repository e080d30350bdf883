//! The manifests beside the chart are what it renders to, profile by profile; and each object is what Kubernetes says it is.
#![cfg(test)]

use std::collections::BTreeSet;
use std::path::PathBuf;

use k8s_openapi::api::{
    admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
    apps::v1::Deployment,
    autoscaling::v2::HorizontalPodAutoscaler,
    core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    scheduling::v1::PriorityClass,
};
use lateen_render::{Chart, PROFILES, Release, RenderError};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

fn release() -> Release {
    Release {
        name: "lateen".to_owned(),
        namespace: "default".to_owned(),
        is_upgrade: false,
    }
}

fn objects(profile: &str, values: &[Value]) -> Vec<Value> {
    let chart = Chart::ours().unwrap();
    let values = chart.values(profile, values).unwrap();
    chart.objects(&release(), &values).unwrap()
}

/// All that is kept as files: each profile, and a revision.
fn all() -> Vec<(String, Vec<Value>)> {
    let mut all: Vec<_> = PROFILES
        .iter()
        .map(|profile| ((*profile).to_owned(), objects(profile, &[])))
        .collect();
    let revision = objects("default", &[json!({"revision": "canary"})]);
    all.push(("revision-canary".to_owned(), revision));
    all
}

/// `LATEEN_ACCEPT=1` writes them.
#[test]
fn manifests_are_what_the_chart_renders_to() {
    for (name, objects) in all() {
        let file =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../manifests/{name}.yaml"));
        let text = lateen_render::chart::text(&objects).unwrap();
        if std::env::var_os("LATEEN_ACCEPT").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(kept == text, "out of date: make manifests ({name}.yaml)");
    }
}

/// Reads `object` as a `T` and writes it again: a field that `T` does not know is gone then.
fn known<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let again = serde_json::to_value(typed).map_err(|error| error.to_string())?;
    missing(object, &again, String::new())
}

fn missing(written: &Value, again: &Value, path: String) -> Result<(), String> {
    match (written, again) {
        (Value::Object(written), Value::Object(again)) => {
            for (key, value) in written {
                let path = format!("{path}.{key}");
                match again.get(key) {
                    Some(again) => missing(value, again, path)?,
                    // Nothing to say is not said again.
                    None if value == &json!({}) || value == &json!([]) => {}
                    None => return Err(format!("{path} is no field")),
                }
            }
            Ok(())
        }
        (Value::Array(written), Value::Array(again)) if written.len() == again.len() => written
            .iter()
            .zip(again)
            .enumerate()
            .try_for_each(|(at, (a, b))| missing(a, b, format!("{path}[{at}]"))),
        (written, again) if written == again => Ok(()),
        (written, again) => Err(format!("{path}: {written} became {again}")),
    }
}

#[test]
fn every_object_has_only_fields_of_its_type() {
    for (name, objects) in all() {
        for object in &objects {
            let kind = object["kind"].as_str().unwrap();
            let outcome = match (object["apiVersion"].as_str().unwrap(), kind) {
                ("v1", "Namespace") => known::<Namespace>(object),
                ("v1", "ConfigMap") => known::<ConfigMap>(object),
                ("v1", "Service") => known::<Service>(object),
                ("v1", "ServiceAccount") => known::<ServiceAccount>(object),
                ("v1", "PersistentVolumeClaim") => known::<PersistentVolumeClaim>(object),
                ("apps/v1", "Deployment") => known::<Deployment>(object),
                ("autoscaling/v2", _) => known::<HorizontalPodAutoscaler>(object),
                ("policy/v1", _) => known::<PodDisruptionBudget>(object),
                ("networking.k8s.io/v1", _) => known::<NetworkPolicy>(object),
                ("scheduling.k8s.io/v1", _) => known::<PriorityClass>(object),
                ("rbac.authorization.k8s.io/v1", "ClusterRole") => known::<ClusterRole>(object),
                ("rbac.authorization.k8s.io/v1", "Role") => known::<Role>(object),
                ("rbac.authorization.k8s.io/v1", "RoleBinding") => known::<RoleBinding>(object),
                ("rbac.authorization.k8s.io/v1", _) => known::<ClusterRoleBinding>(object),
                (_, "MutatingWebhookConfiguration") => {
                    known::<MutatingWebhookConfiguration>(object)
                }
                (_, "ValidatingWebhookConfiguration") => {
                    known::<ValidatingWebhookConfiguration>(object)
                }
                // Mixer's rules, which the mesh itself reads.
                ("config.istio.io/v1alpha2", _) => Ok(()),
                (version, kind) => Err(format!("{version} {kind} is not expected here")),
            };
            let object = &object["metadata"]["name"];
            assert_eq!(outcome, Ok(()), "{name}: {kind} {object}");
        }
    }
}

#[test]
fn mesh_objects_are_let_in_by_the_rules_of_their_kinds() {
    let mut seen = 0;
    for object in objects("default", &[]) {
        let group = object["apiVersion"].as_str().unwrap();
        if group.contains(".istio.io/") {
            assert_eq!(
                lateen_config::review(&object).map(|_| ()),
                Ok(()),
                "{object}"
            );
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn no_object_is_there_twice_and_all_are_ours() {
    for (name, objects) in all() {
        let mut seen = BTreeSet::new();
        for object in objects {
            let meta = &object["metadata"];
            let key = format!("{} {} {}", object["kind"], meta["namespace"], meta["name"]);
            assert!(seen.insert(key.clone()), "{name}: {key} is there twice");
            if !object["apiVersion"]
                .as_str()
                .unwrap()
                .contains(".istio.io/")
            {
                assert_eq!(
                    meta["labels"]["app.kubernetes.io/part-of"], "lateen",
                    "{name}: {key}"
                );
            }
        }
    }
}

/// A revision beside the installation takes nothing from it.
#[test]
fn a_revision_shares_no_object_with_the_installation() {
    let names = |objects: Vec<Value>| -> BTreeSet<String> {
        let name = |o: &Value| format!("{} {}", o["kind"], o["metadata"]["name"]);
        objects.iter().map(name).collect()
    };
    let base = names(objects("production", &[]));
    let canary = names(objects("production", &[json!({"revision": "canary"})]));
    assert!(
        base.is_disjoint(&canary),
        "{:?}",
        base.intersection(&canary)
    );
    assert!(
        canary.contains(r#""Deployment" "pilot-canary""#),
        "{canary:?}"
    );
}

#[test]
fn every_pod_is_locked_down() {
    for (name, objects) in all() {
        for object in objects.iter().filter(|o| o["kind"] == "Deployment") {
            let pod = &object["spec"]["template"]["spec"];
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
            assert_eq!(
                pod["securityContext"]["seccompProfile"]["type"],
                "RuntimeDefault"
            );
            for container in pod["containers"].as_array().unwrap() {
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true);
                assert_eq!(security["allowPrivilegeEscalation"], false);
                assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
                assert!(!container["readinessProbe"].is_null());
                assert!(!container["resources"]["requests"].is_null());
            }
        }
    }
}

#[test]
fn wrong_values_are_told_with_their_place() {
    let chart = Chart::ours().unwrap();
    for (values, want) in [
        (json!({"pilot": {"replcas": 2}}), "pilot: "),
        (json!({"pilot": {"replicas": "2"}}), "pilot.replicas: "),
        (
            json!({"meshConfig": {"trustDomain": "x"}}),
            "meshConfig.trustDomain: ",
        ),
        (json!({"revision": "default"}), "revision: "),
    ] {
        match chart.values("default", &[values]) {
            Err(RenderError::Values(wrong)) => assert!(wrong[0].starts_with(want), "{wrong:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(
        chart.values("huge", &[]),
        Err(RenderError::Profile(_))
    ));
    let values = chart
        .values("default", &[json!({"auth": {"replicas": 2}})])
        .unwrap();
    let error = chart.objects(&release(), &values).unwrap_err();
    assert!(error.to_string().contains("needs auth.caSecret"), "{error}");
}
