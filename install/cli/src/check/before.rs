//! Before an installation: the cluster's version and kinds, our rights, what is there already.

use std::collections::BTreeSet;

use anyhow::Context as _;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::{Api, PostParams};
use serde_json::Value;

use super::{Finding, text};
use crate::cluster::{Cluster, Key, inventory::Inventory, is_ours};

/// Kubernetes 1.N and later.
const MINOR: u32 = 28;
/// What is done to objects of each kind.
const VERBS: [&str; 4] = ["get", "create", "patch", "delete"];

/// What stands against applying `objects`.
pub(crate) async fn before(
    cluster: &mut Cluster,
    objects: &[Value],
    installed: Option<&Inventory>,
) -> anyhow::Result<Vec<Finding>> {
    let mut findings = vec![version(cluster).await?];
    findings.push(kinds(cluster, objects).await?);
    findings.push(rights(cluster, objects).await?);
    findings.extend(conflicts(cluster, objects, installed).await?);
    Ok(findings)
}

async fn version(cluster: &Cluster) -> anyhow::Result<Finding> {
    let version = cluster.client.apiserver_version().await;
    let version = version.context("cannot ask the API server for its version")?;
    // Some vendors write `28+`.
    let minor = version
        .minor
        .trim_end_matches(|c: char| !c.is_ascii_digit());
    let is_new = version.major != "1" || minor.parse::<u32>().is_ok_and(|minor| minor >= MINOR);
    let said = &version.git_version;
    Ok(match is_new {
        true => Finding::passed("version", format!("the cluster is {said}")),
        false => Finding::failed(
            "version",
            format!("the cluster is {said}; 1.{MINOR} is needed"),
        ),
    })
}

/// Kinds of ours come with their definitions.
fn comes_with_us(key: &Key) -> bool {
    key.api_version.contains(".istio.io/")
}

async fn kinds(cluster: &mut Cluster, objects: &[Value]) -> anyhow::Result<Finding> {
    let mut missing = BTreeSet::new();
    for key in objects
        .iter()
        .map(Key::of)
        .filter(|key| !comes_with_us(key))
    {
        if cluster.kind(&key).await?.is_none() {
            missing.insert(format!("{} {}", key.api_version, key.kind));
        }
    }
    let list = missing.into_iter().collect::<Vec<_>>().join(", ");
    Ok(match list.as_str() {
        "" => Finding::passed("kinds", "the cluster has all kinds that are needed"),
        list => Finding::failed("kinds", format!("the cluster has no {list}")),
    })
}

async fn rights(cluster: &mut Cluster, objects: &[Value]) -> anyhow::Result<Finding> {
    let mut wanted = BTreeSet::new();
    for key in objects.iter().map(Key::of) {
        let group = key
            .api_version
            .split_once('/')
            .map_or("", |(group, _)| group);
        let plural = match cluster.kind(&key).await? {
            Some((resource, _)) => resource.plural,
            None if comes_with_us(&key) => format!("{}s", key.kind.to_lowercase()),
            None => continue,
        };
        wanted.insert((group.to_owned(), plural, key.namespace));
    }
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let mut missing = Vec::new();
    for (group, resource, namespace) in &wanted {
        for verb in VERBS {
            let question = SelfSubjectAccessReview {
                spec: SelfSubjectAccessReviewSpec {
                    resource_attributes: Some(ResourceAttributes {
                        group: Some(group.clone()),
                        resource: Some(resource.clone()),
                        namespace: Some(namespace.clone()).filter(|name| !name.is_empty()),
                        verb: Some(verb.to_owned()),
                        ..ResourceAttributes::default()
                    }),
                    ..SelfSubjectAccessReviewSpec::default()
                },
                ..SelfSubjectAccessReview::default()
            };
            let answer = reviews.create(&PostParams::default(), &question).await;
            let answer = answer.context("cannot ask what we may do")?;
            if !answer.status.is_some_and(|status| status.allowed) {
                let place = match namespace.as_str() {
                    "" => String::new(),
                    namespace => format!(" in {namespace}"),
                };
                missing.push(format!("{verb} {resource}{place}"));
            }
        }
    }
    Ok(match missing.is_empty() {
        true => Finding::passed("rights", "we may do all that is needed"),
        false => Finding::failed("rights", format!("we may not {}", missing.join(", "))),
    })
}

async fn conflicts(
    cluster: &mut Cluster,
    objects: &[Value],
    installed: Option<&Inventory>,
) -> anyhow::Result<Vec<Finding>> {
    let mut found = Vec::new();
    for key in objects.iter().map(Key::of) {
        // Definitions and the namespace of somebody else are used as they are.
        let may_be_shared = ["CustomResourceDefinition", "Namespace"].contains(&key.kind.as_str());
        let is_known = installed.is_some_and(|installed| installed.objects.contains(&key));
        if may_be_shared || is_known {
            continue;
        }
        if let Some(there) = cluster.get(&key).await?.filter(|there| !is_ours(there)) {
            let by = match text(&there, "/metadata/labels/app.kubernetes.io~1managed-by") {
                "Helm" => "; Helm installed it, and upgrades it (helm upgrade)",
                _ => "",
            };
            found.push(Finding::failed(
                "conflicts",
                format!("{key} is there and not ours{by}"),
            ));
        }
    }
    for other in cluster.list(&deployment()).await? {
        if text(&other, "/metadata/name") == "istiod" {
            let namespace = text(&other, "/metadata/namespace");
            let message = format!("Istio runs here (Deployment {namespace}/istiod)");
            found.push(Finding::failed("conflicts", message));
        }
    }
    for other in cluster.list(&injector()).await? {
        let name = text(&other, "/metadata/name");
        if !name.starts_with("lateen-") && other["webhooks"].to_string().contains("istio-injection")
        {
            let message = format!("{name} adds sidecars to the same namespaces");
            found.push(Finding::failed("conflicts", message));
        }
    }
    if found.is_empty() {
        found.push(Finding::passed("conflicts", "nothing is in the way"));
    }
    Ok(found)
}

fn deployment() -> Key {
    Key {
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        namespace: String::new(),
        name: String::new(),
    }
}

fn injector() -> Key {
    Key {
        api_version: "admissionregistration.k8s.io/v1".to_owned(),
        kind: "MutatingWebhookConfiguration".to_owned(),
        namespace: String::new(),
        name: String::new(),
    }
}
