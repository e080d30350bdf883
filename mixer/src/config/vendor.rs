//! Adapters that came with Istio and are not part of Mixer here. Their handlers are checked as far as
//! names go, so that files which hold them load; a rule that sends to one is refused.

use serde_json::Value as Json;

use super::object::Fault;

/// An adapter of Istio that is not here.
#[derive(Debug)]
pub struct Vendor {
    /// As `compiledAdapter` and the legacy kinds spell it.
    pub name: &'static str,
    /// The fields of its parameters, in the spelling of the proto.
    fields: &'static [&'static str],
}

/// istio.io/istio `mixer/adapter/*/config/config.proto`, 1.0 to 1.4.
static VENDORS: &[Vendor] = &[
    Vendor {
        name: "apigee",
        fields: &[
            "apigee_base",
            "customer_base",
            "org_name",
            "env_name",
            "key",
            "secret",
            "temp_dir",
            "client_timeout",
            "products",
            "analytics",
        ],
    },
    Vendor {
        name: "circonus",
        fields: &["submission_url", "submission_interval", "metrics"],
    },
    Vendor {
        name: "cloudwatch",
        fields: &[
            "namespace",
            "metric_info",
            "log_group_name",
            "log_stream_name",
            "logs",
        ],
    },
    Vendor {
        name: "servicecontrol",
        fields: &["runtime_config", "credential_path", "service_configs"],
    },
    Vendor {
        name: "signalfx",
        fields: &[
            "metrics",
            "ingest_url",
            "access_token",
            "datapoint_interval",
            "enable_metrics",
            "enable_tracing",
            "tracing_buffer_size",
            "tracing_sample_probability",
        ],
    },
    Vendor {
        name: "solarwinds",
        fields: &[
            "appoptics_access_token",
            "appoptics_batch_size",
            "papertrail_url",
            "papertrail_local_retention_duration",
            "metrics",
            "logs",
        ],
    },
    Vendor {
        name: "stackdriver",
        fields: &[
            "endpoint",
            "project_id",
            "mesh_uid",
            "push_interval",
            "app_credentials",
            "api_key",
            "service_account_path",
            "metric_info",
            "log_info",
            "trace",
        ],
    },
];

/// The adapter called `name`.
pub fn find(name: &str) -> Option<&'static Vendor> {
    VENDORS.iter().find(|vendor| vendor.name == name)
}

/// All names.
pub fn names() -> impl Iterator<Item = &'static str> {
    VENDORS.iter().map(|vendor| vendor.name)
}

impl Vendor {
    /// Checks the names of parameters.
    ///
    /// # Errors
    /// The adapter has no such parameter.
    pub fn check(&self, params: &Json, field: &str) -> Result<(), Fault> {
        let fields = match params {
            Json::Null => return Ok(()),
            Json::Object(fields) => fields,
            other => return Err(Fault::new(field, format!("{other} is no map"))),
        };
        for key in fields.keys() {
            let same = |known: &&&str| {
                known
                    .chars()
                    .filter(|c| *c != '_')
                    .collect::<String>()
                    .eq_ignore_ascii_case(&key.chars().filter(|c| *c != '_').collect::<String>())
            };
            if !self.fields.iter().any(|known| same(&known)) {
                let at = if field.is_empty() {
                    key.clone()
                } else {
                    format!("{field}.{key}")
                };
                let reason = format!(
                    "adapter {} has no such parameter; it has {}",
                    self.name,
                    self.fields.join(", ")
                );
                return Err(Fault::new(at, reason));
            }
        }
        Ok(())
    }
}
