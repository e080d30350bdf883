//! The chart itself: its files, and what becomes of them.

use serde_json::{Value, json};

use crate::run::{RunError, run};
use crate::template::{SyntaxError, Templates};
use crate::values::overlay;

/// Sets of values for common ends; Helm takes them by `-f install/chart/profiles/NAME.yaml`.
pub const PROFILES: [&str; 4] = ["minimal", "default", "demo", "production"];

/// The chart's files, as they are beside this crate.
macro_rules! chart_file {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../chart/", $name)))),*]
    };
}

const META: &str = include_str!("../../chart/Chart.yaml");
const VALUES: &str = include_str!("../../chart/values.yaml");
const SCHEMA: &str = include_str!("../../chart/values.schema.json");
const PROFILE_FILES: &[(&str, &str)] = chart_file![
    "profiles/minimal.yaml",
    "profiles/default.yaml",
    "profiles/demo.yaml",
    "profiles/production.yaml",
];
const TEMPLATES: &[(&str, &str)] = chart_file![
    "templates/_helpers.tpl",
    "templates/auth.yaml",
    "templates/config.yaml",
    "templates/gateway.yaml",
    "templates/mixer.yaml",
    "templates/network-policy.yaml",
    "templates/pilot.yaml",
    "templates/priority.yaml",
    "templates/rbac.yaml",
    "templates/webhook.yaml",
];

/// What templates put in as it is.
const FILES: &[(&str, &str)] = chart_file!["files/telemetry.yaml"];

/// Objects of these kinds come first, in this order, because others need them; webhooks last, because they stop others.
const FIRST: [&str; 9] = [
    "Namespace",
    "NetworkPolicy",
    "PriorityClass",
    "PodDisruptionBudget",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "PersistentVolumeClaim",
    "CustomResourceDefinition",
];
const LAST: [&str; 2] = [
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
];

/// What a chart is rendered for.
#[derive(Clone, Debug, PartialEq)]
pub struct Release {
    /// Its name.
    pub name: String,
    /// Namespace of everything that has none of its own.
    pub namespace: String,
    /// Whether an older version is there.
    pub is_upgrade: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Chart {
    meta: Value,
    values: Value,
    profiles: Vec<(&'static str, Value)>,
    schema: jsonschema::Validator,
    templates: Templates,
}

/// Why there are no objects.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The chart itself: a defect of ours.
    #[error("the chart's {file} is broken: {reason}")]
    Broken {
        /// Which file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A template that is none.
    #[error(transparent)]
    Syntax(#[from] SyntaxError),
    /// No such profile.
    #[error("there is no profile {0:?}; there are minimal, default, demo and production")]
    Profile(String),
    /// Values that the chart does not know or take.
    #[error("these values are wrong (docs/operations/install.md#values):{}", list(.0))]
    Values(Vec<String>),
    /// A template cannot be rendered with these values.
    #[error(transparent)]
    Run(#[from] RunError),
}

fn list(reasons: &[String]) -> String {
    reasons
        .iter()
        .map(|reason| format!("\n  {reason}"))
        .collect()
}

impl Chart {
    /// The chart of this version.
    ///
    /// # Errors
    /// Only when its files are broken.
    pub fn ours() -> Result<Chart, RenderError> {
        let mut templates = Templates::default();
        for (file, text) in TEMPLATES {
            templates.add(file, text)?;
        }
        let schema: Value = serde_json::from_str(SCHEMA)
            .map_err(|error| broken("values.schema.json", error.to_string()))?;
        let schema = jsonschema::validator_for(&schema)
            .map_err(|error| broken("values.schema.json", error.to_string()))?;
        let profiles = PROFILES.into_iter().zip(PROFILE_FILES);
        let profiles = profiles.map(|(name, (file, text))| Ok((name, yaml(file, text)?)));
        Ok(Chart {
            meta: yaml("Chart.yaml", META)?,
            values: yaml("values.yaml", VALUES)?,
            profiles: profiles.collect::<Result<_, RenderError>>()?,
            schema,
            templates,
        })
    }

    /// The chart's values, those of the profile over them, and the operator's over both.
    ///
    /// # Errors
    /// No such profile, or values that the schema refuses.
    pub fn values(&self, profile: &str, chosen: &[Value]) -> Result<Value, RenderError> {
        let known = self.profiles.iter().find(|(name, _)| *name == profile);
        let (_, profile) = known.ok_or_else(|| RenderError::Profile(profile.to_owned()))?;
        let mut values = self.values.clone();
        for over in std::iter::once(profile).chain(chosen) {
            overlay(&mut values, over);
        }
        let wrong: Vec<String> = self
            .schema
            .iter_errors(&values)
            .map(|error| format!("{}: {error}", place(&error.instance_path().to_string())))
            .collect();
        match wrong.is_empty() {
            true => Ok(values),
            false => Err(RenderError::Values(wrong)),
        }
    }

    /// All objects but the definitions of kinds ([`lateen_config::definitions`]), in the order in which they can be applied.
    ///
    /// # Errors
    /// Values that contradict each other.
    pub fn objects(&self, release: &Release, values: &Value) -> Result<Vec<Value>, RenderError> {
        let files: serde_json::Map<String, Value> = FILES
            .iter()
            .map(|(name, text)| ((*name).to_owned(), Value::from(*text)))
            .collect();
        let data = json!({
            "Values": values,
            "Files": files,
            "Chart": {
                "Name": self.meta["name"], "Version": self.meta["version"], "AppVersion": self.meta["appVersion"],
            },
            "Release": {
                "Name": release.name, "Namespace": release.namespace, "Service": "lateen",
                "IsInstall": !release.is_upgrade, "IsUpgrade": release.is_upgrade,
            },
        });
        let mut objects = Vec::new();
        for (file, _) in TEMPLATES {
            if file.ends_with(".tpl") {
                continue;
            }
            let text = run(&self.templates, file, &data)?;
            let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
                .map_err(|error| broken(file, format!("{error}\n{text}")))?;
            for object in documents.into_iter().filter(|object| !object.is_null()) {
                if object["kind"].as_str().is_none()
                    || object["metadata"]["name"].as_str().is_none()
                {
                    return Err(broken(file, "an object has no kind or no name".to_owned()));
                }
                objects.push(object);
            }
        }
        // The sort is stable: the rest stays as the files have it.
        objects.sort_by_key(rank);
        Ok(objects)
    }

    /// Version of the programs that this chart installs.
    #[must_use]
    pub fn version(&self) -> &str {
        self.meta["appVersion"].as_str().unwrap_or_default()
    }
}

fn rank(object: &Value) -> usize {
    let kind = object["kind"].as_str().unwrap_or_default();
    let first = FIRST.iter().position(|first| *first == kind);
    let last = LAST.iter().position(|last| *last == kind);
    match (first, last) {
        (Some(at), _) => at,
        (None, Some(at)) => FIRST.len() + 1 + at,
        (None, None) => FIRST.len(),
    }
}

fn yaml(file: &str, text: &str) -> Result<Value, RenderError> {
    serde_saphyr::from_str(text).map_err(|error| broken(file, error.to_string()))
}

fn broken(file: &str, reason: String) -> RenderError {
    RenderError::Broken {
        file: file.to_owned(),
        reason,
    }
}

/// `/pilot/replicas` as people write it.
fn place(pointer: &str) -> String {
    match pointer.trim_start_matches('/') {
        "" => "values".to_owned(),
        path => path.replace('/', "."),
    }
}

/// Objects as one YAML text.
///
/// # Errors
/// One of them cannot be written.
pub fn text(objects: &[Value]) -> Result<String, RenderError> {
    let mut text = String::new();
    for object in objects {
        text += "---\n";
        text += serde_saphyr::to_string(object)
            .map_err(|error| broken("output", error.to_string()))?
            .trim_end();
        text.push('\n');
    }
    Ok(text)
}
