//! What there is to follow: the built-in kinds, and the custom ones whose definitions are there.

use serde_json::Value;

use crate::client::KubernetesArgs;

/// One collection of objects, as the API server has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// API group; empty for the core.
    pub group: String,
    /// Version to ask for.
    pub version: String,
    /// Kind of the objects.
    pub kind: String,
    /// Its name in paths.
    pub plural: String,
    /// Only this namespace's.
    pub namespace: Option<String>,
    /// Only those that this field selector selects.
    pub fields: Option<String>,
    /// Whether a definition makes it.
    pub custom: bool,
}

impl Resource {
    fn new(group: &str, version: &str, kind: &str, plural: &str) -> Self {
        Self {
            group: group.to_owned(),
            version: version.to_owned(),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
            namespace: None,
            fields: None,
            custom: false,
        }
    }

    /// `GROUP/VERSION`, or the version alone in the core group.
    #[must_use]
    pub fn api_version(&self) -> String {
        match self.group.as_str() {
            "" => self.version.clone(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// Path of the collection.
    #[must_use]
    pub fn path(&self) -> String {
        let root = if self.group.is_empty() {
            "/api"
        } else {
            "/apis"
        };
        let version = self.api_version();
        match &self.namespace {
            Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{}", self.plural),
            None => format!("{root}/{version}/{}", self.plural),
        }
    }

    /// Whose objects these are, whatever the version: no two collections that are followed at once share it.
    #[must_use]
    pub(crate) fn id(&self) -> String {
        let text = |part: &Option<String>| part.clone().unwrap_or_default();
        format!(
            "{}/{}/{}/{}|",
            self.group,
            self.plural,
            text(&self.namespace),
            text(&self.fields)
        )
    }
}

/// Definitions of custom kinds.
pub(crate) fn definitions() -> Resource {
    Resource::new(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
    )
}

/// Built-in kinds that every cluster has.
pub(crate) fn built_in(args: &KubernetesArgs) -> Vec<Resource> {
    let mut all = vec![
        Resource::new("", "v1", "Namespace", "namespaces"),
        Resource::new("", "v1", "Node", "nodes"),
        Resource::new("", "v1", "Service", "services"),
        Resource {
            // What has ended answers nobody, and Jobs leave many.
            fields: Some("status.phase!=Failed,status.phase!=Succeeded".into()),
            ..Resource::new("", "v1", "Pod", "pods")
        },
        Resource {
            namespace: Some(args.kube_namespace.clone()),
            fields: Some("metadata.name=istio".into()),
            ..Resource::new("", "v1", "ConfigMap", "configmaps")
        },
    ];
    let mut namespaces: Vec<Option<String>> = args
        .kube_secret_namespaces
        .iter()
        .filter(|namespace| !namespace.is_empty())
        .map(|namespace| Some(namespace.clone()))
        .collect();
    namespaces.sort();
    namespaces.dedup();
    if namespaces.is_empty() {
        namespaces.push(None);
    }
    for namespace in namespaces {
        // The two types that hold certificates for gateways; tokens, releases and passwords for registries are
        // never asked for.
        for of_type in ["kubernetes.io/tls", "Opaque"] {
            all.push(Resource {
                namespace: namespace.clone(),
                fields: Some(format!("type={of_type}")),
                ..Resource::new("", "v1", "Secret", "secrets")
            });
        }
    }
    all
}

/// Who answers for services, best first: the first that the cluster has is followed.
pub(crate) fn endpoints() -> [Resource; 2] {
    [
        Resource::new("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
        Resource::new("", "v1", "Endpoints", "endpoints"),
    ]
}

/// Built-in kinds that are followed where the cluster has them and we read them.
pub(crate) fn optional() -> Vec<Resource> {
    [
        Resource::new("networking.k8s.io", "v1", "Ingress", "ingresses"),
        Resource::new("networking.k8s.io", "v1", "IngressClass", "ingressclasses"),
    ]
    .into_iter()
    .filter(|resource| lateen_config::is_read(&resource.group, &resource.kind))
    .collect()
}

/// The collection that a definition makes, if it is one of ours and is served.
pub(crate) fn defined(definition: &Value) -> Option<Resource> {
    let spec = definition.get("spec")?;
    let text = |value: &Value, name: &str| Some(value.get(name)?.as_str()?.to_owned());
    let group = text(spec, "group")?;
    let names = spec.get("names")?;
    let kind = text(names, "kind")?;
    if !lateen_config::is_read(&group, &kind) {
        return None;
    }
    let established = definition
        .pointer("/status/conditions")?
        .as_array()?
        .iter()
        .any(|condition| {
            condition.get("type").and_then(Value::as_str) == Some("Established")
                && condition.get("status").and_then(Value::as_str) == Some("True")
        });
    if !established {
        return None;
    }
    let version = spec
        .get("versions")?
        .as_array()?
        .iter()
        .filter(|version| version.get("served").and_then(Value::as_bool) == Some(true))
        .filter_map(|version| text(version, "name"))
        // One that we know, or else the objects say what is wrong with it.
        .max_by_key(|version| {
            let known = lateen_config::review::versions(&group, &kind);
            let is_known = known.is_none_or(|known| known.contains(&version.as_str()));
            (is_known, priority(version))
        })?;
    Some(Resource {
        custom: true,
        ..Resource::new(&group, &version, &kind, &text(names, "plural")?)
    })
}

/// Kubernetes' order of versions: `v2`, `v1`, `v1beta2`, `v1beta1`, `v1alpha1`, anything else.
fn priority(version: &str) -> (u8, u32, u32) {
    let split = |text: &str| {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, rest) = text.split_at(end);
        Some((number.parse::<u32>().ok()?, rest.to_owned()))
    };
    let read = || {
        let (major, rest) = split(version.strip_prefix('v')?)?;
        if rest.is_empty() {
            return Some((3, major, 0));
        }
        for (stability, name) in [(2, "beta"), (1, "alpha")] {
            if let Some(minor) = rest.strip_prefix(name) {
                return Some((stability, major, minor.parse().ok()?));
            }
        }
        None
    };
    read().unwrap_or((0, 0, 0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_stand_in_kubernetes_order() {
        let mut all = [
            "v1alpha3", "foo", "v1", "v1beta1", "v2", "v1beta2", "v2alpha1",
        ];
        all.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        assert_eq!(
            all,
            [
                "v2", "v1", "v1beta2", "v1beta1", "v2alpha1", "v1alpha3", "foo"
            ]
        );
    }

    #[test]
    fn only_established_kinds_of_ours_are_followed() {
        let definition = |group: &str, kind: &str, established: &str| {
            json!({
                "spec": {
                    "group": group,
                    "names": {"kind": kind, "plural": "things"},
                    "versions": [
                        {"name": "v1alpha3", "served": true},
                        {"name": "v1", "served": false},
                        {"name": "v2", "served": true},
                        {"name": "v1beta1", "served": true},
                    ],
                },
                "status": {"conditions": [{"type": "Established", "status": established}]},
            })
        };
        let ours = definition("networking.istio.io", "VirtualService", "True");
        let found = defined(&ours).unwrap();
        assert_eq!(found.path(), "/apis/networking.istio.io/v1beta1/things");
        for other in [
            definition("networking.istio.io", "VirtualService", "False"),
            definition("cert-manager.io", "Certificate", "True"),
            json!({}),
        ] {
            assert_eq!(defined(&other), None);
        }
    }

    #[test]
    fn secrets_are_asked_for_where_they_are_allowed() {
        let args = KubernetesArgs {
            kube_secret_namespaces: vec!["edge".into(), "edge".into()],
            kube_namespace: "mesh".into(),
            ..KubernetesArgs::default()
        };
        let paths: Vec<String> = built_in(&args)
            .iter()
            .filter(|resource| resource.kind == "Secret" || resource.kind == "ConfigMap")
            .map(|resource| format!("{}?{}", resource.path(), resource.fields.clone().unwrap()))
            .collect();
        assert_eq!(
            paths,
            [
                "/api/v1/namespaces/mesh/configmaps?metadata.name=istio",
                "/api/v1/namespaces/edge/secrets?type=kubernetes.io/tls",
                "/api/v1/namespaces/edge/secrets?type=Opaque",
            ]
        );
    }
}
