//! `lateen version`: of this program, and of what is installed.

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::cluster::{self, Cluster, Key, inventory::Inventory};
use crate::output::Format;

/// Show the version of this program, and of every component in a cluster.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// This program's only; no cluster is asked.
    #[arg(long)]
    client: bool,
    /// Print as YAML or JSON.
    #[arg(short = 'o', long, value_enum)]
    output: Option<Format>,
    #[command(flatten)]
    cluster: cluster::Options,
}

/// Does it.
pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let own = env!("CARGO_PKG_VERSION");
    let mut state = json!({ "client": own });
    if !options.client {
        let mut cluster = Cluster::connect(&options.cluster).await?;
        let mut components = Vec::new();
        for installed in Inventory::all(&mut cluster).await? {
            for key in installed
                .objects
                .iter()
                .filter(|key| key.kind == "Deployment")
            {
                let object = cluster.get(key).await?;
                components.push(component(key, &installed, object.as_ref()));
            }
        }
        state["components"] = Value::from(components);
    }
    match options.output {
        Some(format) => format.print(&state)?,
        None => print!("{}", table(&state)),
    }
    Ok(ExitCode::SUCCESS)
}

fn component(key: &Key, installed: &Inventory, object: Option<&Value>) -> Value {
    let image = object.and_then(|object| {
        object
            .pointer("/spec/template/spec/containers/0/image")?
            .as_str()
    });
    // What stands behind the last colon, unless that belongs to a registry's port.
    let tag = image.and_then(|image| image.rsplit_once(':'));
    let tag = tag
        .filter(|(_, tag)| !tag.contains('/'))
        .map(|(_, tag)| tag);
    json!({
        "name": key.name, "namespace": key.namespace,
        "revision": if installed.revision.is_empty() { "default" } else { &installed.revision },
        "chart": installed.version, "image": image, "version": tag,
        "available": object.map(|object| object["status"]["availableReplicas"].as_u64().unwrap_or(0)),
    })
}

fn table(state: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut out = format!("lateen {}\n", text(&state["client"]));
    match state["components"].as_array().map(Vec::as_slice) {
        None => {}
        Some([]) => out += "nothing is installed\n",
        Some(components) => {
            out += &format!(
                "{:<24} {:<12} {:<12} {}\n",
                "COMPONENT", "REVISION", "VERSION", "AVAILABLE"
            );
            for one in components {
                let cell = |name: &str| text(&one[name]);
                out += &format!(
                    "{:<24} {:<12} {:<12} {}\n",
                    cell("name"),
                    cell("revision"),
                    cell("version"),
                    cell("available")
                );
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_has_the_version_of_its_image() {
        let key = Key {
            api_version: "apps/v1".to_owned(),
            kind: "Deployment".to_owned(),
            namespace: "istio-system".to_owned(),
            name: "pilot".to_owned(),
        };
        for (image, want) in [
            ("hub:5000/lateen/pilot:0.2.0", json!("0.2.0")),
            ("hub:5000/lateen/pilot", json!(null)),
            ("lateen/pilot", json!(null)),
        ] {
            let object =
                json!({"spec": {"template": {"spec": {"containers": [{"image": image}]}}}});
            let found = component(&key, &Inventory::default(), Some(&object));
            assert_eq!(found["version"], want, "{image}");
        }
        let text = table(
            &json!({"client": "1", "components": [component(&key, &Inventory::default(), None)]}),
        );
        assert!(text.contains("pilot") && text.ends_with(" -\n"), "{text}");
    }
}
