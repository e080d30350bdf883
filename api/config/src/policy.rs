//! `config.istio.io/v1alpha2`: Mixer's objects, and the quota bindings Pilot reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::value::StringMatch;

/// An object of Mixer's own: attributemanifest, handler, instance, rule, adapter, template, or one of
/// the older kinds named after an adapter (`memquota`) or template (`quota`).
#[derive(Clone, Debug, PartialEq)]
pub struct MixerObject {
    /// Kind as written.
    pub kind: String,
    /// Spec as written.
    pub spec: Value,
}

/// Which quotas a request is charged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaSpec {
    /// Rules.
    pub rules: Vec<QuotaRule>,
}

/// Quotas for requests that match.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaRule {
    /// Any of them; empty: every request.
    #[serde(rename = "match")]
    pub matches: Vec<AttributeMatch>,
    /// What is charged.
    pub quotas: Vec<Quota>,
}

/// What a request's attributes must be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttributeMatch {
    /// All of them.
    pub clause: BTreeMap<String, StringMatch>,
}

/// One charge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Quota instance.
    pub quota: String,
    /// Amount; 0: 1.
    #[serde(deserialize_with = "integer")]
    pub charge: i64,
}

/// protobuf JSON lets 64-bit numbers be strings.
fn integer<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Raw {
        Number(i64),
        Text(String),
    }
    match Raw::deserialize(deserializer)? {
        Raw::Number(number) => Ok(number),
        Raw::Text(text) => text
            .parse()
            .map_err(|_| serde::de::Error::custom("not a whole number")),
    }
}

/// Which services QuotaSpecs are for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct QuotaSpecBinding {
    /// The services.
    pub services: Vec<IstioService>,
    /// The QuotaSpecs.
    #[serde(alias = "quota_specs")]
    pub quota_specs: Vec<QuotaSpecReference>,
}

/// A service by its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IstioService {
    /// Short name.
    pub name: String,
    /// Namespace; empty: the binding's.
    pub namespace: String,
    /// Domain; empty: the mesh's.
    pub domain: String,
    /// Whole host name, or `*`, instead of the parts.
    pub service: String,
    /// Without effect here.
    pub labels: BTreeMap<String, String>,
}

impl IstioService {
    /// Whether it means the service `host`, `NAME.NAMESPACE.svc.DOMAIN`, seen from `namespace`.
    #[must_use]
    pub fn means(&self, host: &str, own_namespace: &str) -> bool {
        if self.service == "*" {
            return true;
        }
        if !self.service.is_empty() {
            return self.service == host;
        }
        let namespace = match self.namespace.as_str() {
            "" => own_namespace,
            named => named,
        };
        let domain = match self.domain.as_str() {
            "" => "cluster.local",
            named => named.trim_start_matches("svc."),
        };
        host == format!("{}.{namespace}.svc.{domain}", self.name)
    }
}

/// A QuotaSpec by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaSpecReference {
    /// Name.
    pub name: String,
    /// Namespace; empty: the binding's.
    pub namespace: String,
}
