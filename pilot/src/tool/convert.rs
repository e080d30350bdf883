//! Gateway API objects and Ingresses at the command line: what they come to ([`crate::gateway_api`]).

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use lateen_config::{MeshConfig, Object, Spec};
use serde_json::{Map, Value, json};

use super::{ToolError, all_objects};
use crate::gateway_api::{self, Output};
use crate::model::DNS_DOMAIN;

/// Flags of `gateway-api`.
#[derive(Clone, Debug, clap::Args)]
pub struct GatewayApiArgs {
    /// Configuration: YAML files, or folders of them.
    #[arg(short, long = "file", value_name = "FILE", required = true, num_args = 1..)]
    pub files: Vec<PathBuf>,
    /// Services, namespaces and Secrets, if they are kept apart: YAML files, or folders of them.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub registry: Vec<PathBuf>,
    /// Print statuses instead of objects.
    #[arg(long)]
    pub status: bool,
    /// What the host names of Services end with.
    #[arg(long, value_name = "DOMAIN", default_value = DNS_DOMAIN)]
    pub domain_suffix: String,
}

impl GatewayApiArgs {
    pub(super) fn run(
        &self,
        out: &mut impl Write,
        complaints: &mut impl Write,
    ) -> Result<(), ToolError> {
        // What an API server would refuse is converted all the same: to see what it would come to is what this is for.
        let (objects, errors) = all_objects(self.files.iter().chain(&self.registry), complaints)?;
        let converted = convert(objects, &self.domain_suffix);
        for problem in &converted.problems {
            writeln!(complaints, "{problem}")?;
        }
        let documents: Vec<Value> = if self.status {
            converted
                .statuses
                .iter()
                .map(gateway_api::Status::document)
                .collect()
        } else {
            converted
                .objects
                .iter()
                .map(|object| shown(object))
                .collect()
        };
        for document in documents {
            let text = serde_saphyr::to_string(&sorted(&document))?;
            writeln!(out, "{}\n---", text.trim_end())?;
        }
        match errors {
            0 => Ok(()),
            errors => Err(ToolError::Doubtful(errors)),
        }
    }
}

/// What objects come to. Who answers for a Service is not known here: all its ports count as answered.
pub(super) fn convert(objects: Vec<Object>, domain: &str) -> Output {
    let objects: Vec<Arc<Object>> = objects.into_iter().map(Arc::new).collect();
    let mesh = objects
        .iter()
        .filter(|object| &*object.key.name == "istio")
        .find_map(|object| match &object.spec {
            Spec::ConfigMap(map) => map.mesh.as_deref().cloned(),
            _ => None,
        })
        .unwrap_or_else(MeshConfig::default);
    gateway_api::convert(&objects, &mesh, domain, None)
}

/// An object as it would be written.
pub(super) fn shown(object: &Object) -> Value {
    let mut metadata = json!({
        "name": *object.key.name,
        "namespace": *object.key.namespace,
    });
    if !object.annotations.is_empty() {
        metadata["annotations"] = json!(object.annotations);
    }
    json!({
        "apiVersion": format!("{}/{}", object.key.group, object.version),
        "kind": *object.key.kind,
        "metadata": metadata,
        "spec": *object.raw,
    })
}

/// Fields by name, as Kubernetes' tools write them.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut fields: Vec<(&String, &Value)> = map.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            let fields = fields
                .into_iter()
                .map(|(name, value)| (name.clone(), sorted(value)));
            Value::Object(fields.collect::<Map<String, Value>>())
        }
        Value::Array(all) => Value::Array(all.iter().map(sorted).collect()),
        other => other.clone(),
    }
}
