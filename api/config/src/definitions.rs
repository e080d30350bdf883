//! CustomResourceDefinitions of every kind we judge or serve, made of what [`crate::review`] knows.

use serde_json::{Value, json};

use crate::review;
use crate::review::schema::{message_of, open_api};

/// One kind as clusters know it.
struct Custom {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    cluster: bool,
    /// Columns of `kubectl get`: name, type, path.
    columns: &'static [[&'static str; 3]],
}

const fn of(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    columns: &'static [[&'static str; 3]],
) -> Custom {
    Custom {
        group,
        kind,
        plural,
        short,
        cluster: false,
        columns,
    }
}

const NETWORKING: &str = "networking.istio.io";
const SECURITY: &str = "security.istio.io";
const EXTENSIONS: &str = "extensions.istio.io";
const MIXER: &str = "config.istio.io";
const RBAC: &str = "rbac.istio.io";
const AUTHENTICATION: &str = "authentication.istio.io";

const HOSTS: [&str; 3] = ["Hosts", "string", ".spec.hosts"];

/// Istio's kinds, in its names.
const KINDS: [Custom; 27] = [
    of(
        NETWORKING,
        "VirtualService",
        "virtualservices",
        &["vs"],
        &[["Gateways", "string", ".spec.gateways"], HOSTS],
    ),
    of(
        NETWORKING,
        "DestinationRule",
        "destinationrules",
        &["dr"],
        &[["Host", "string", ".spec.host"]],
    ),
    of(NETWORKING, "Gateway", "gateways", &["gw"], &[]),
    of(
        NETWORKING,
        "ServiceEntry",
        "serviceentries",
        &["se"],
        &[
            HOSTS,
            ["Location", "string", ".spec.location"],
            ["Resolution", "string", ".spec.resolution"],
        ],
    ),
    of(
        NETWORKING,
        "WorkloadEntry",
        "workloadentries",
        &["we"],
        &[["Address", "string", ".spec.address"]],
    ),
    of(NETWORKING, "WorkloadGroup", "workloadgroups", &["wg"], &[]),
    of(NETWORKING, "Sidecar", "sidecars", &[], &[]),
    of(NETWORKING, "EnvoyFilter", "envoyfilters", &[], &[]),
    of(NETWORKING, "ProxyConfig", "proxyconfigs", &[], &[]),
    of(
        SECURITY,
        "PeerAuthentication",
        "peerauthentications",
        &["pa"],
        &[["Mode", "string", ".spec.mtls.mode"]],
    ),
    of(
        SECURITY,
        "RequestAuthentication",
        "requestauthentications",
        &["ra"],
        &[],
    ),
    of(
        SECURITY,
        "AuthorizationPolicy",
        "authorizationpolicies",
        &["ap"],
        &[["Action", "string", ".spec.action"]],
    ),
    of(
        "telemetry.istio.io",
        "Telemetry",
        "telemetries",
        &["telemetry"],
        &[],
    ),
    of(EXTENSIONS, "WasmPlugin", "wasmplugins", &[], &[]),
    of(
        EXTENSIONS,
        "TrafficExtension",
        "trafficextensions",
        &[],
        &[],
    ),
    of(
        MIXER,
        "rule",
        "rules",
        &[],
        &[["Match", "string", ".spec.match"]],
    ),
    of(
        MIXER,
        "handler",
        "handlers",
        &[],
        &[["Adapter", "string", ".spec.compiledAdapter"]],
    ),
    of(
        MIXER,
        "instance",
        "instances",
        &[],
        &[["Template", "string", ".spec.compiledTemplate"]],
    ),
    of(MIXER, "attributemanifest", "attributemanifests", &[], &[]),
    of(MIXER, "adapter", "adapters", &[], &[]),
    of(MIXER, "template", "templates", &[], &[]),
    of(MIXER, "QuotaSpec", "quotaspecs", &[], &[]),
    of(MIXER, "QuotaSpecBinding", "quotaspecbindings", &[], &[]),
    of(MIXER, "HTTPAPISpec", "httpapispecs", &[], &[]),
    of(MIXER, "HTTPAPISpecBinding", "httpapispecbindings", &[], &[]),
    of(AUTHENTICATION, "Policy", "policies", &[], &[]),
    Custom {
        cluster: true,
        ..of(AUTHENTICATION, "MeshPolicy", "meshpolicies", &[], &[])
    },
];

/// Istio's older kinds for the rbac adapter.
const ROLES: [Custom; 4] = [
    of(RBAC, "ServiceRole", "serviceroles", &[], &[]),
    of(
        RBAC,
        "ServiceRoleBinding",
        "servicerolebindings",
        &[],
        &[["Reference", "string", ".spec.roleRef.name"]],
    ),
    of(RBAC, "RbacConfig", "rbacconfigs", &[], &[]),
    Custom {
        cluster: true,
        ..of(RBAC, "ClusterRbacConfig", "clusterrbacconfigs", &[], &[])
    },
];

/// Mixer's kinds of the old style, a kind for each adapter and template: kind and plural.
const OLD_STYLE: [(&str, &str); 25] = [
    ("apikey", "apikeys"),
    ("authorization", "authorizations"),
    ("checknothing", "checknothings"),
    ("edge", "edges"),
    ("kubernetes", "kuberneteses"),
    ("listentry", "listentries"),
    ("logentry", "logentries"),
    ("metric", "metrics"),
    ("quota", "quotas"),
    ("reportnothing", "reportnothings"),
    ("tracespan", "tracespans"),
    ("bypass", "bypasses"),
    ("denier", "deniers"),
    ("dogstatsd", "dogstatsds"),
    ("fluentd", "fluentds"),
    ("kubernetesenv", "kubernetesenvs"),
    ("listchecker", "listcheckers"),
    ("memquota", "memquotas"),
    ("noop", "noops"),
    ("opa", "opas"),
    ("prometheus", "prometheuses"),
    ("rbac", "rbacs"),
    ("redisquota", "redisquotas"),
    ("stdio", "stdios"),
    ("zipkin", "zipkins"),
];

/// All definitions, sorted by name. Apply them before the first object of their kinds.
#[must_use]
pub fn definitions() -> Vec<Value> {
    let old = OLD_STYLE
        .iter()
        .map(|(kind, plural)| of(MIXER, kind, plural, &[], &[]));
    let mut all: Vec<Value> = KINDS
        .iter()
        .chain(&ROLES)
        .map(definition)
        .chain(old.map(|kind| definition(&kind)))
        .collect();
    all.sort_by_cached_key(|one| one["metadata"]["name"].as_str().map(str::to_owned));
    all
}

fn definition(kind: &Custom) -> Value {
    let versions = review::versions(kind.group, kind.kind).unwrap_or_default();
    let versions: Vec<Value> = versions
        .iter()
        .enumerate()
        // The newest is the first.
        .map(|(index, version)| of_version(kind, version, index == 0))
        .collect();
    let lower = kind.kind.to_ascii_lowercase();
    let mut names = json!({
        "kind": kind.kind,
        "listKind": format!("{}List", kind.kind),
        "plural": kind.plural,
        "singular": lower,
        "categories": ["istio-io"],
    });
    if !kind.short.is_empty() {
        names["shortNames"] = json!(kind.short);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{}", kind.plural, kind.group),
            "labels": {"app.kubernetes.io/part-of": "lateen"},
            // An uninstaller that follows ownership must not take users' configuration with it.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": kind.group,
            "names": names,
            "scope": if kind.cluster { "Cluster" } else { "Namespaced" },
            "versions": versions,
        },
    })
}

fn of_version(kind: &Custom, version: &str, storage: bool) -> Value {
    let spec = match message_of(kind.group, kind.kind) {
        Some(message) => open_api::of_message(message),
        // Each adapter and template has fields of its own; Mixer judges them.
        None => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
    };
    let columns: Vec<Value> = kind
        .columns
        .iter()
        .chain(&[["Age", "date", ".metadata.creationTimestamp"]])
        .map(|[name, of_type, path]| json!({"name": name, "type": of_type, "jsonPath": path}))
        .collect();
    json!({
        "name": version,
        "served": true,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": {
            "type": "object",
            "properties": {
                "spec": spec,
                "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            },
        }},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a schema; false when a rule of structural schemas is broken.
    fn is_structural(schema: &Value) -> bool {
        let open = schema.get("x-kubernetes-preserve-unknown-fields").is_some();
        let typed = schema.get("type").is_some() || open;
        let below = |name: &str| schema.get(name).into_iter();
        typed
            && below("properties")
                .flat_map(|all| all.as_object().unwrap().values())
                .chain(below("items"))
                .chain(below("additionalProperties"))
                .all(is_structural)
            // Properties and additionalProperties exclude each other.
            && !(schema.get("properties").is_some() && schema.get("additionalProperties").is_some())
    }

    #[test]
    fn every_kind_that_is_read_is_defined_and_every_definition_is_of_a_kind_that_is_read() {
        let all = definitions();
        for one in &all {
            let spec = &one["spec"];
            let (group, kind) = (
                spec["group"].as_str().unwrap(),
                spec["names"]["kind"].as_str().unwrap(),
            );
            assert!(crate::is_read(group, kind), "{group} {kind}");
            let versions = spec["versions"].as_array().unwrap();
            let stored = versions.iter().filter(|version| version["storage"] == true);
            assert_eq!(stored.count(), 1, "{kind}");
            for version in versions {
                assert!(
                    is_structural(&version["schema"]["openAPIV3Schema"]),
                    "{kind}"
                );
            }
        }
        let names: Vec<&str> = all
            .iter()
            .map(|one| one["metadata"]["name"].as_str().unwrap())
            .collect();
        assert!(names.is_sorted());
        assert_eq!(all.len(), 56);
    }

    #[test]
    fn a_virtual_service_is_stored_as_v1_and_served_as_it_ever_was() {
        let all = definitions();
        let found = all
            .iter()
            .find(|one| one["metadata"]["name"] == "virtualservices.networking.istio.io")
            .unwrap();
        let versions: Vec<(&str, bool)> = found["spec"]["versions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|version| {
                (
                    version["name"].as_str().unwrap(),
                    version["storage"].as_bool().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            versions,
            [("v1", true), ("v1beta1", false), ("v1alpha3", false)]
        );
        let spec = &found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let route = &spec["properties"]["http"]["items"]["properties"]["match"]["items"];
        assert_eq!(
            route["properties"]["uri"]["properties"]["exact"],
            json!({"type": "string"})
        );
        assert_eq!(
            route["properties"]["uri"]["oneOf"][0],
            json!({"not": {"anyOf": [{"required": ["exact"]}, {"required": ["prefix"]}, {"required": ["regex"]}]}})
        );
    }
}
