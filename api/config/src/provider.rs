//! The mesh's `extensionProviders`: services that policies and Telemetry name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::mesh::MeshConfig;

/// Fields of a provider that say something we do not serve.
const FOREIGN: [&str; 9] = [
    "lightstep",
    "datadog",
    "stackdriver",
    "opencensus",
    "skywalking",
    "envoyHttpAls",
    "envoyTcpAls",
    "envoyOtelAls",
    "sds",
];

/// What a provider is.
#[derive(Clone, Debug, PartialEq)]
pub enum Provider {
    /// Decides about requests; see [`MeshConfig::authorizer`].
    Authorizer,
    /// Access logs in a file.
    FileLog(FileLog),
    /// Spans to Zipkin.
    Zipkin(ZipkinProvider),
    /// Spans to an OpenTelemetry collector, OTLP over gRPC.
    OpenTelemetry(OpenTelemetryProvider),
    /// Metrics for Prometheus.
    Prometheus,
}

/// `envoyFileAccessLog`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct FileLog {
    /// The file.
    pub path: String,
    /// How lines look; none: as the mesh says.
    pub log_format: Option<LogFormat>,
    /// In JSON: leave out what is not known.
    pub omit_empty_values: bool,
}

/// One of these.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LogFormat {
    /// Lines of text.
    pub text: Option<String>,
    /// JSON: formats by name.
    pub labels: Option<BTreeMap<String, Value>>,
}

/// `zipkin`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ZipkinProvider {
    /// Its host, `HOST` or `NAMESPACE/HOST`.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// Longest path in a tag.
    pub max_tag_length: u32,
    /// 64 bits of a trace's id instead of 128.
    #[serde(rename = "enable64bitTraceId")]
    pub short_trace_id: bool,
    /// Where spans are posted; empty: `/api/v2/spans`.
    pub path: String,
}

/// `opentelemetry`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct OpenTelemetryProvider {
    /// Its host, `HOST` or `NAMESPACE/HOST`.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// Longest path in a tag.
    pub max_tag_length: u32,
}

impl MeshConfig {
    /// The provider of that name; `envoy` and `prometheus` are there without being written.
    ///
    /// # Errors
    /// There is none, it cannot be read, or nobody here serves it; the text says which.
    pub fn provider(&self, name: &str) -> Result<Provider, String> {
        let Some(written) = self
            .extension_providers
            .iter()
            .find(|provider| provider.get("name").and_then(Value::as_str) == Some(name))
        else {
            return match name {
                "envoy" => Ok(Provider::FileLog(FileLog {
                    path: match self.access_log_file.as_str() {
                        "" => "/dev/stdout".to_owned(),
                        path => path.to_owned(),
                    },
                    ..FileLog::default()
                })),
                "prometheus" => Ok(Provider::Prometheus),
                _ => Err(format!("there is no extensionProvider {name:?}")),
            };
        };
        let fault = |why: String| format!("extensionProvider {name:?}: {why}");
        fn read<T: DeserializeOwned>(written: &Value, field: &str) -> Option<Result<T, String>> {
            let spec = written.get(field)?;
            Some(T::deserialize(spec).map_err(|error| format!("{field}: {error}")))
        }
        let served = |service: &str, port: u16| match (service, port) {
            ("", _) => Err(fault("no service".into())),
            (_, 0) => Err(fault("no port".into())),
            _ => Ok(()),
        };
        if let Some(log) = read::<FileLog>(written, "envoyFileAccessLog") {
            let log = log.map_err(fault)?;
            if log.path.is_empty() {
                return Err(fault("envoyFileAccessLog: no path".into()));
            }
            return Ok(Provider::FileLog(log));
        }
        if let Some(zipkin) = read::<ZipkinProvider>(written, "zipkin") {
            let zipkin = zipkin.map_err(fault)?;
            served(&zipkin.service, zipkin.port)?;
            return Ok(Provider::Zipkin(zipkin));
        }
        if let Some(collector) = read::<OpenTelemetryProvider>(written, "opentelemetry") {
            let collector = collector.map_err(fault)?;
            served(&collector.service, collector.port)?;
            return Ok(Provider::OpenTelemetry(collector));
        }
        if written.get("prometheus").is_some() {
            return Ok(Provider::Prometheus);
        }
        if let Some(foreign) = FOREIGN.iter().find(|field| written.get(field).is_some()) {
            return Err(fault(format!("{foreign} is not served by this version")));
        }
        self.authorizer(name).map(|_| Provider::Authorizer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_provider_is_what_its_field_says() {
        let mesh: MeshConfig = serde_json::from_value(json!({"extensionProviders": [
            {"name": "log", "envoyFileAccessLog": {"path": "/x", "logFormat": {"labels": {"a": "%PROTOCOL%"}}}},
            {"name": "zipkin", "zipkin": {"service": "ns/z", "port": 9411, "enable64bitTraceId": true}},
            {"name": "otel", "opentelemetry": {"service": "o", "port": 4317, "http": {"path": "/v1"}}},
            {"name": "no port", "opentelemetry": {"service": "o"}},
            {"name": "als", "envoyOtelAls": {"service": "o", "port": 4317}},
            {"name": "authz", "envoyExtAuthzGrpc": {"service": "a", "port": 1}},
            {"name": "nothing"},
        ]}))
        .unwrap();
        assert!(matches!(mesh.provider("log"), Ok(Provider::FileLog(log)) if log.path == "/x"));
        assert!(matches!(mesh.provider("zipkin"), Ok(Provider::Zipkin(z)) if z.short_trace_id));
        assert_eq!(mesh.provider("authz"), Ok(Provider::Authorizer));
        assert_eq!(mesh.provider("prometheus"), Ok(Provider::Prometheus));
        assert!(
            matches!(mesh.provider("envoy"), Ok(Provider::FileLog(log)) if log.path == "/dev/stdout")
        );
        let fault = |name: &str| mesh.provider(name).unwrap_err();
        assert!(
            fault("otel").contains("opentelemetry: unknown field `http`"),
            "{}",
            fault("otel")
        );
        assert_eq!(fault("no port"), "extensionProvider \"no port\": no port");
        assert_eq!(
            fault("als"),
            "extensionProvider \"als\": envoyOtelAls is not served by this version"
        );
        assert_eq!(fault("nobody"), "there is no extensionProvider \"nobody\"");
        assert!(fault("nothing").contains("neither envoyExtAuthzGrpc"));
    }
}
